"""Tests run on one thread: their tensors are tiny, and threads of two processes that share the
cores (DDP on a CPU) would wait for each other at every barrier. All draw the same numbers."""

import functools
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # whatever the shell has


def pytest_addoption(parser):
    about = "a key of the network for all tests, such as attention_sink=True (docs/HACKING.md)"
    parser.addoption("--set", action="append", default=[], metavar="KEY=VALUE", help=about)


def pytest_configure(config):
    os.environ["SET_KEYS"] = " ".join(config.getoption("--set"))  # networks.py reads it


@pytest.fixture(autouse=True)
def seed():
    import torch  # after the number of threads is known

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """As in a program that was started at a terminal (a shell lets those in the background of a
    script ignore some signals). What a test installs is undone by whatever it runs."""
    usual = {signal.SIGINT: signal.default_int_handler}
    usual |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == usual


@pytest.fixture(scope="session")
def v3():
    """For tests that hold for DeepSeek-V3 alone: skips them once an edit has made another network
    of it. test_deepseek.py fails once and says what is another."""
    import networks

    if networks.departure():
        pytest.skip(networks.NO_LONGER_V3)


@pytest.fixture
def book(tmp_path) -> Path:
    """A small prepared folder."""
    from test_prepare_data import make, prose

    (tmp_path / "book.txt").write_text(prose(1, 200))
    return make(tmp_path, tmp_path / "book.txt", name="book")


# ---- Of the tests of train.py, support/runs.py and support/processes.py --------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    import training  # which imports torch, after the number of threads is known

    import prepare_data

    out = str(tmp_path_factory.mktemp("data"))
    config = prepare_data.DataConfig(training.TEXT, "tiny", out, vocab_size=512, val_fraction=0.01)
    return prepare_data.prepare(config)


@pytest.fixture
def workplace(data, tmp_path, monkeypatch):
    """A folder with data alone, and no sample after a run."""
    import training

    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/tiny").symlink_to(data)
    monkeypatch.setenv(
        "PYTHONPATH", f"{training.ROOT}{os.pathsep}{training.ROOT / 'tests'}", prepend=os.pathsep
    )
    monkeypatch.setattr(training.train, "show_result", lambda *arguments: None)


@pytest.fixture
def faults(monkeypatch):
    """A signal, bad gradients, or whatever happens at some step: see training.Faults."""
    import training

    return training.Faults(monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same, once for all tests that ask for these options; they only read the folder."""
    import training

    folder = tmp_path_factory.mktemp
    return functools.cache(lambda *options: training.run(*options, out=folder("shared") / "run"))


@pytest.fixture
def begun(workplace, shared) -> Path:
    """run/: a run of one step, to be changed."""
    return Path(shutil.copytree(shared("--steps=1"), "run"))


@pytest.fixture
def start():
    """Starts train.py in `world` processes, which have .log (a path); kills what is left."""
    import training

    everything = []

    def start(*options: str, world: int = 1, out: str = "run", setup=None):
        argv = [training.TINY_FILE, f"--out={out}", *training.SHORT, *options]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        common = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(world):
            log, environment = Path(f"{out}.{rank}.log"), common | {"RANK": str(rank)}
            process = training.FORKS.Process(
                target=training.command, args=(argv, log, environment, setup)
            )
            process.log = log
            log.touch()
            process.start()
            everything.append(process)
        return everything[-world:]

    yield start
    for process in everything:
        process.kill()
