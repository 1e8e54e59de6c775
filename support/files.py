"""Files: nothing is deleted, and errors name the file."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from support.settings import Refusal, info, short


def put_aside(folder: Path) -> Path:
    """Renames a folder or file to NAME.old-1, or the next free number, and prints a message."""
    number = 1
    while os.path.lexists(old := folder.with_name(f"{folder.name}.old-{number}")):
        number += 1
    folder.rename(old)  # of a link, the link itself
    info(f"the existing {folder} is now {old}")
    return old


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises Refusal if the name is taken, unless it is an empty folder."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not empty and not overwrite:
        raise Refusal(
            f"{folder} exists; choose another name, or give --overwrite, which renames the old one"
        )


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty temporary folder, which is renamed to `folder` when it is complete.

    overwrite: rename an existing folder first. Raises Refusal if it exists otherwise.
    """
    check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part-") as parent:
        new = Path(parent) / folder.name
        new.mkdir()
        try:
            yield new
        except OSError as error:
            if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise Refusal(f"{folder} cannot be written ({error.strerror})") from None
        for path in new.iterdir():
            if not path.is_symlink():  # a link leads to a download, which is complete
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        check_free(folder, overwrite)  # again: another program may have made it in the meantime
        if overwrite and os.path.lexists(folder):
            put_aside(folder)
        new.rename(folder)


def write_whole(path: Path, write: Callable[[BinaryIO], object], keep_old: bool = False) -> None:
    """Writes a file as a whole: whatever happens, `path` holds the old file or the new one.

    write: called with the open temporary file. keep_old: rename an existing file instead of
    replacing it. Without it only one process at a time may write the file. Raises Refusal if the
    disk refuses.
    """
    # With one name for all processes, a killed one leaves a single file, which the next removes.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if keep_old else f"{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a process that was killed
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_old and os.path.lexists(path):
            put_aside(path)
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C, too
        with suppress(OSError):
            temporary.unlink()
        # torch.save wraps the disk's error in one of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        message = f"{path} cannot be written ({cause}); its previous content is intact."
        raise Refusal(message) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises Refusal for invalid JSON, OSError if unreadable."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Refusal(f"{path} is not JSON ({short(error, 100)})") from None
