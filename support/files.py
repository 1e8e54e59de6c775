"""Files: nothing is deleted, no link leads out of a folder, and errors name the file."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from support.settings import Refusal, info, short


def put_aside(folder: Path) -> Path:
    """Renames a folder or file to NAME.old-1, or to the first free number, with a message."""
    if folder.name in ("", ".."):
        raise Refusal(f"{folder} cannot be renamed: give the folder's name")
    number = 1
    while os.path.lexists(old := folder.with_name(f"{folder.name}.old-{number}")):
        number += 1
    folder.rename(old)  # of a link, the link itself
    info(f"the existing {folder} is now {old}")
    return old


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an error that does not name its file, such as a full disk's, into a Refusal that
    does."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:  # named already, or not the system's
            raise
        raise Refusal(f"{path} cannot be written ({error.strerror or error})") from None


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises Refusal if the name is taken, unless it is an empty folder."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not empty and not overwrite:
        raise Refusal(
            f"{folder} exists; choose another name, or give --overwrite, which renames the old one"
        )


@contextmanager
def new_path(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary path for a new file or folder, which becomes `path` when it is complete.

    overwrite: rename an existing `path` first. Raises Refusal if it exists otherwise.
    """
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.part-") as own:
        new = Path(own) / path.name
        with naming(new):
            yield new
        for part in [new] if new.is_file() else new.iterdir():
            if not part.is_symlink():  # a link leads to a download, which is complete
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
        check_free(path, overwrite)  # again: another program may have made it in the meantime
        if overwrite and os.path.lexists(path):
            put_aside(path)
        new.rename(path)


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """The same for a folder, which is created empty."""
    with new_path(folder, overwrite) as new:
        new.mkdir()
        yield new


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file as a whole: whatever happens, the path holds the old file or the new one.
    Only one process at a time may write it. Raises Refusal if the disk refuses."""
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
        # torch.save wraps the disk's error in one of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise Refusal(f"cannot write {path} ({cause}); its previous content is intact.") from None


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder once links are resolved.

    The cache of huggingface_hub consists of links from .../snapshots/VERSION to .../blobs, which
    count as the same folder.
    """
    real, folder = path.resolve(), folder.resolve()
    cache = next((above.parent for above in folder.parents if above.name == "snapshots"), folder)
    return real.is_relative_to(folder) or real.is_relative_to(cache / "blobs")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises Refusal for invalid JSON, OSError if unreadable."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Refusal(f"{path} is not JSON ({short(error, 100)})") from None
