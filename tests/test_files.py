"""support/files.py: a folder or file is written whole or not at all; an existing one is kept."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from support import files
from support.settings import Refusal

ROOT = Path(files.__file__).parent.parent
NAMES = ("folder", "file.gguf")


def make(path: Path, overwrite: bool = False, last: Callable = lambda: None):
    """A folder of two files, or one file where the name has an ending; `last` is called last."""
    if path.suffix:
        files.check_free(path, overwrite)
        files.write_whole(path, lambda file: (file.write(b"new"), last()), keep_old=True)
    else:
        with files.new_folder(path, overwrite) as new:
            (new / "a").write_text("new")
            (new / "b").write_text("new")
            last()


def contents(folder: Path) -> dict[str, str]:
    """All files in it, and empty folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


@pytest.fixture
def old(tmp_path) -> dict[str, str]:
    """Existing files, under both names."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("old")
    (tmp_path / "folder/thesis").write_text("mine")
    (tmp_path / "file.gguf").write_text("old")
    return contents(tmp_path)


NEW = {"folder/a": "new", "folder/b": "new"}


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_and_a_full_disk_leave_existing_files_and_no_part(name, old, tmp_path):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    for path in (tmp_path / name, tmp_path / f"more_{name}"):
        with pytest.raises(KeyboardInterrupt):
            make(path, overwrite=True, last=lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Refusal, match=rf"{name} cannot be written .*No space left on device"):
            make(path, overwrite=True, last=full)
    assert contents(tmp_path) == old


STOPPED = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_files import make

steps = int(sys.argv[2])

def stop(event, args):  # before the first, second or third time
    global steps
    if event in ("os.rename", "os.remove", "os.rmdir"):
        steps -= 1
        if steps < 0:
            os._exit(9)  # nothing is cleaned up, as after kill -9

sys.addaudithook(stop)
make(Path(sys.argv[1]), overwrite=True)
"""
OLD = {"folder.old-1/a": "old", "folder.old-1/thesis": "mine"}


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_killed_at_any_step_every_folder_is_whole_or_a_part(steps, old, tmp_path):
    """Between the two renames the old folder has its new name, and there is no new one."""
    command = [sys.executable, "-c", STOPPED, tmp_path / "folder", str(steps)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    found = contents(tmp_path)
    parts = {name for name in found if name.startswith("folder.part-")}
    whole = {name: text for name, text in found.items() if name not in parts}
    expected = [old, OLD | {"file.gguf": "old"}, NEW | OLD | {"file.gguf": "old"}][steps]
    assert parts and whole == expected
    make(tmp_path / "folder", overwrite=True)  # the next try is not in its way
    assert NEW.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_that_write_the_same_name_both_succeed(name, tmp_path):
    path = tmp_path / name
    command = [sys.executable, "-c", STOPPED, path, "99"]
    make(path, overwrite=True, last=lambda: subprocess.run(command, cwd=ROOT, check=True))
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.old-1"}


def test_an_existing_folder_is_refused_or_put_aside_with_every_file_in_it(old, tmp_path, capsys):
    """Those that are not ours, too: nothing is deleted. An empty folder is not in the way."""
    for name in NAMES:
        said = rf"{name} exists; choose another name, or give --overwrite, which renames"
        with pytest.raises(Refusal, match=re.escape(said)):
            make(tmp_path / name)
    assert contents(tmp_path) == old
    for name in NAMES * 2:
        make(tmp_path / name, overwrite=True)
    assert (
        f"the existing {tmp_path}/folder is now {tmp_path}/folder.old-1" in capsys.readouterr().err
    )
    aside = {"file.gguf": "new", "file.gguf.old-1": "old", "file.gguf.old-2": "new"}
    twice = {"folder.old-2/a": "new", "folder.old-2/b": "new"}
    assert contents(tmp_path) == NEW | OLD | twice | aside
    (tmp_path / "empty/folder").mkdir(parents=True)
    make(tmp_path / "empty/folder")
    assert contents(tmp_path / "empty") == NEW
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "empty").stat().st_mode
