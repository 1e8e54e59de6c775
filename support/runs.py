"""The folder of a run: checkpoints written whole, and read with their checksums."""

import os
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]):
    """A file that is either the old one or the new one, whatever happens in between."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        cause = error.__context__ or error  # torch raises its own on top of the disk's
        raise OSError(f"cannot write {path} ({cause}); what it held before is intact.") from None


def checkpoint_file(path: str | Path) -> Path:
    """The file with the weights: of a run's folder best.pt, else ckpt.pt."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    return folder / ("best.pt" if (folder / "best.pt").exists() else "ckpt.pt")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What train.py saved in a file, or in a run's folder (best.pt, else ckpt.pt).

    Tensors stay on the disk until they are used (not on Windows, where a file that is mapped
    cannot be replaced); nothing in the file can run code.
    """
    file = checkpoint_file(path)
    if not file.exists():
        kinds = "a run's folder, a checkpoint file, or a directory with a config.json"
        raise FileNotFoundError(f"there is no {file}: name {kinds}.")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # a record whose checksum is wrong: torch does not look
        saved = torch.load(file, "cpu", weights_only=True, mmap=os.name == "posix")
        dict(saved["model_config"])  # raises where another program has saved it
    except Exception as error:  # a damaged file may lead to any
        told = f"{file} is damaged, or no checkpoint of train.py"
        raise ValueError(f"{told} ({textwrap.shorten(str(error), 100)})") from None
    if damaged:
        raise ValueError(f"{file} is damaged: {damaged} in it has another checksum than when saved")
    return saved
