"""Files: nothing is deleted, nothing is read from outside a folder, and errors name the file."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from support.settings import Refusal, info, short
from support.signals import interruptible


def put_aside(folder: Path) -> Path:
    """Renames a folder or file to NAME.old-1, or the first such name that is free, and says so."""
    if folder.name in ("", ".."):
        raise Refusal(f"{folder} cannot be renamed: give the folder's name")
    number = 1
    while os.path.lexists(old := folder.with_name(f"{folder.name}.old-{number}")):
        number += 1
    folder.rename(old)  # of a link, the link itself
    info(f"{folder}, which was there, is now {old}")
    return old


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing that does not name its file, such as a full disk's, becomes a Refusal
    that does."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:  # it is in the message, or is not the system's
            raise
        raise Refusal(f"{path} cannot be written ({error.strerror or error})") from None


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises Refusal where a folder, file or link is in the way. An empty folder is not."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not empty and not overwrite:
        hint = "choose another name, or give --overwrite, which renames the old one"
        raise Refusal(f"{folder} exists; {hint}")


@contextmanager
def new_path(path: Path, overwrite: bool) -> Iterator[Path]:
    """Where to make a file or a folder that becomes `path` in the end: complete, or not at all.

    With overwrite, what is there is put aside. Raises Refusal without.
    """
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.part-")
    with interruptible(), scratch as own:
        new = Path(own) / path.name
        with naming(new):
            yield new
        for part in [new] if new.is_file() else new.iterdir():
            if not part.is_symlink():  # that is a download, in the care of another program
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
        check_free(path, overwrite)  # again: another program may have made it meanwhile
        if overwrite and os.path.lexists(path):
            put_aside(path)
        new.rename(path)


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """The same for a folder, which is made, to be filled."""
    with new_path(folder, overwrite) as new:
        new.mkdir()
        yield new


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A file that is either the old one or the new one, whatever happens in between. Only one
    process at a time may write it. Raises Refusal for what the disk refuses."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        part.unlink(missing_ok=True)  # left by a process that was killed
        with open(part, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:
        with suppress(OSError):
            part.unlink()
        # torch.save raises an error of its own on top of the disk's.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise Refusal(f"cannot write {path} ({cause}); what it held before is intact.") from None


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, wherever links lead.

    In the cache of huggingface_hub all files are links: from .../snapshots/VERSION to .../blobs.
    """
    real, folder = path.resolve(), folder.resolve()
    cache = next((above.parent for above in folder.parents if above.name == "snapshots"), folder)
    return real.is_relative_to(folder) or real.is_relative_to(cache / "blobs")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises Refusal for a file that is cut short, OSError."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Refusal(f"{path} is no JSON ({short(error, 100)})") from None
