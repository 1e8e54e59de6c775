"""Files: nothing is deleted, nothing is read from outside a folder, and errors name the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.settings import info


def put_aside(folder: Path) -> Path:
    """Renames a folder to NAME.old-1, or the first such name that is free, and says so."""
    if folder.name in ("", ".."):
        raise ValueError(f"{folder} cannot be renamed: give the folder's name")
    number = 1
    while os.path.lexists(old := folder.with_name(f"{folder.name}.old-{number}")):
        number += 1
    folder.rename(old)  # of a link, the link itself
    info(f"{folder} was there: it is now {old}")
    return old


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an error of writing that does not: a full disk's, for one."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from None


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, wherever links lead.

    In the cache of huggingface_hub all files are links: from .../snapshots/VERSION to .../blobs.
    """
    real, folder = path.resolve(), folder.resolve()
    cache = next((above.parent for above in folder.parents if above.name == "snapshots"), folder)
    return real.is_relative_to(folder) or real.is_relative_to(cache / "blobs")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError for anything else, OSError."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error!s:.100})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {value!r:.100}, expected an object with keys")
    return value
