"""support/files.py: a folder or a file is made whole or not at all; what was there is put aside."""

import os
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
SIGNALS = [x for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


def make(path: Path, overwrite: bool = False, last: Callable = lambda: None):
    """A folder of two files, or one file where the name has an ending; `last` is called last."""
    if path.suffix:
        with files.new_path(path, overwrite) as new:
            new.write_text("new")
            last()
    else:
        with files.new_folder(path, overwrite) as new:
            (new / "a").write_text("new")
            (new / "b").write_text("new")
            last()


def contents(folder: Path) -> dict[str, str]:
    """All in it; a link is where it leads, an empty folder is a name."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path.relative_to(folder).as_posix()] = f"-> {os.readlink(path)}"
        elif path.is_file() or not any(path.iterdir()):
            text = path.read_text() if path.is_file() else ""
            found[path.relative_to(folder).as_posix()] = text
    return found


@pytest.fixture
def old(tmp_path) -> dict[str, str]:
    """What is there already, under both names."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("old")
    (tmp_path / "folder/thesis").write_text("mine")
    (tmp_path / "file.gguf").write_text("old")
    return contents(tmp_path)


NEW = {"folder/a": "new", "folder/b": "new"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_leaves_what_was_there_and_nothing_unfinished(sent, name, old, tmp_path):
    number = getattr(signal, sent)
    before = signal.getsignal(number)
    for path in (tmp_path / name, tmp_path / f"more_{name}"):
        with pytest.raises(KeyboardInterrupt):
            make(path, overwrite=True, last=lambda: signal.raise_signal(number))
    assert contents(tmp_path) == old and signal.getsignal(number) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_told_with_the_name_and_leaves_what_was_there(name, old, tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(Refusal, match=rf"{name} cannot be written .No space left on device.$"):
        make(tmp_path / name, overwrite=True, last=full)
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


@pytest.mark.parametrize("name", [*NAMES, "checkpoint"])
def test_all_is_on_the_disk_before_the_rename(name, tmp_path, monkeypatch):
    """A power failure leaves the old one or the new one."""
    flushed, rename, replace = set(), Path.rename, os.replace

    def flush(file):
        assert os.fstat(file).st_size
        flushed.add(os.fstat(file).st_ino)

    def checked(function, new, target):
        assert flushed == {x.stat().st_ino for x in (new.iterdir() if new.is_dir() else [new])}
        return function(new, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", lambda new, to: checked(rename, new, to))
    monkeypatch.setattr(os, "replace", lambda new, to: checked(replace, new, to))
    if name == "checkpoint":
        files.write_whole(tmp_path / name, lambda file: file.write(b"new"))
    else:
        make(tmp_path / name)
    assert flushed and (tmp_path / name).exists()


def test_what_is_there_is_refused_or_put_aside_with_every_file_in_it(old, tmp_path, capsys):
    """Those that are not ours, too: nothing is deleted. An empty folder is not in the way."""
    for name in NAMES:
        said = rf"{name} exists; choose another name, or give --overwrite, which renames"
        with pytest.raises(Refusal, match=re.escape(said)):
            make(tmp_path / name)
    assert contents(tmp_path) == old
    for name in NAMES * 2:
        make(tmp_path / name, overwrite=True)
    assert f"folder, which was there, is now {tmp_path}/folder.old-1" in capsys.readouterr().err
    aside = {"file.gguf": "new", "file.gguf.old-1": "old", "file.gguf.old-2": "new"}
    twice = {"folder.old-2/a": "new", "folder.old-2/b": "new"}
    assert contents(tmp_path) == NEW | OLD | twice | aside
    (tmp_path / "empty/folder").mkdir(parents=True)
    make(tmp_path / "empty/folder")
    assert contents(tmp_path / "empty") == NEW
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "empty").stat().st_mode


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_is_put_aside_and_what_it_leads_to_stays(name, target, tmp_path):
    """And a link to nowhere is no free name: what is put aside would take its place."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_text("old")
    (tmp_path / name).symlink_to(target)
    (tmp_path / f"{name}.old-1").symlink_to("nowhere")
    with pytest.raises(Refusal):
        make(tmp_path / name)
    make(tmp_path / name, overwrite=True)
    made = {"file.gguf": "new"} if name == "file.gguf" else NEW
    links = {f"{name}.old-1": "-> nowhere", f"{name}.old-2": f"-> {target}"}
    assert contents(tmp_path) == made | links | {"elsewhere/a": "old"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_meanwhile_is_refused_or_put_aside(name, tmp_path):
    """Two that make the same do not write into each other's unfinished files."""
    with pytest.raises(Refusal, match=f"{name} exists; choose another name"):
        make(tmp_path / name, last=lambda: make(tmp_path / name))
    made = contents(tmp_path)
    assert made == ({"file.gguf": "new"} if name == "file.gguf" else NEW)
    make(tmp_path / f"more_{name}", True, last=lambda: make(tmp_path / f"more_{name}"))
    assert (tmp_path / f"more_{name}.old-1").exists() and len(contents(tmp_path)) == 3 * len(made)


def test_a_bug_in_what_writes_a_file_keeps_its_trace_and_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    for bug in (RuntimeError("shapes do not fit"), KeyError("x")):
        with pytest.raises(type(bug), match=str(bug)):
            files.write_whole(tmp_path / "a", mock.Mock(side_effect=bug))
        assert contents(tmp_path) == {"a": "old"}


def test_nothing_is_renamed_where_the_name_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="cannot be renamed: give the folder's name"):
        files.put_aside(Path())


def test_what_lies_in_a_folder_wherever_links_lead(tmp_path):
    """In the cache of huggingface_hub all files are links from snapshots/VERSION to blobs."""
    for name in "folder/a", "else/a", "cache/blobs/a", "cache/refs/a", "cache/snapshots/1/a":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target, inside in (
        ("folder/b", "a", True),
        ("folder/c", "../else/a", False),
        ("folder/nowhere", "../else/x", False),
        ("cache/snapshots/1/b", "../../blobs/a", True),
        ("cache/snapshots/1/c", "../../refs/a", False),
        ("cache/snapshots/1/d", "../../../else/a", False),
    ):
        (tmp_path / link).symlink_to(target)
        assert files.lies_in(tmp_path / link, (tmp_path / link).parent) == inside, link
