"""Tools of the tests of train.py, support/runs.py and support/processes.py; fixtures: conftest.py.

Where processes matter they are forked from a server that has imported train.py once.
"""

import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
from pathlib import Path

import networks
import pytest
import torch

import train
from model import ModelConfig
from support import processes
from support.settings import Refusal, read_config_file, run_command, sentence_of

ROOT = Path(__file__).parent.parent
TINY_FILE = str(ROOT / "config" / "tiny.py")
TINY_NETWORK, _ = train.split_configs(read_config_file(TINY_FILE, ModelConfig, train.TrainConfig))
SHORT = [
    "--device=cpu",
    "--steps=8",
    "--batch_size=4",
    "--block_size=16",
    "--dtype=float64",
]
SHORT += ["--log_every=1", "--eval_every=4", "--save_every=4"]
SHORT += [f"--{key}={x}" for key, x in networks.SET.items()]
# Schedules that do not depend on the length of the run.
CONSTANT = ("--warmup=0", "--decay_start=1", "--decay_end=1", "--mtp_switch=1", "--gamma_stop=1")
CLIP = torch.nn.utils.clip_grad_norm_
MACHINE = processes.Machine(torch.device("cpu"), torch.float64)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["training"])  # so that no process needs time for its imports
TEXT = sysconfig.get_paths()["stdlib"] + "/a*.py"  # some 250 kB


def run(*options: str, out: Path | str = "run") -> Path:
    """Trains in this process; returns the run's folder."""
    train.main([TINY_FILE, f"--out={out}", *SHORT, *options])
    return Path(out)


def refused(*options: str, out: Path | str = "run") -> str:
    """The sentence with which training is refused."""
    with pytest.raises((Refusal, OSError, RuntimeError)) as error:
        run(*options, out=out)
    return sentence_of(error.value)


def command(argv: list[str], log: Path, environment: dict[str, str], setup):
    """The life of a forked process: train.py with its output in a file."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["train.py", *argv]
    train.show_result = lambda *arguments: None
    if setup:
        setup()
    run_command(train.main)


def finish(processes, codes: list[int] | None = None, seconds: float = 100) -> list[str]:
    """Waits for the end of all processes; returns what they said."""
    for process in processes:
        process.join(seconds)
    said = [process.log.read_text() for process in processes]
    assert [p.exitcode for p in processes] == (codes or [0] * len(processes)), "\n".join(said)
    return said


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def log_of(out: Path) -> list[dict]:
    """log.jsonl without the times."""
    lines = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    times = {"tokens_per_s", "mfu", "peak_gb"}
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def load(out: Path, name: str = "ckpt.pt") -> dict:
    return torch.load(Path(out) / name, weights_only=True)


def assert_same(a, b, tolerance: float = 0.0):
    """Equal, numbers within the tolerance (relative, and absolute for what is near 0)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, tolerance)
    elif isinstance(a, torch.Tensor | float):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0):
    """All that two runs have made but their settings: the log and both checkpoints."""
    assert_same(log_of(a), log_of(b), tolerance)
    for name in ("ckpt.pt", "best.pt"):
        x, y = load(a, name), load(b, name)
        assert x.pop("train_config") and y.pop("train_config")
        assert_same(*(z.pop("random", {"by_rank": [0]})["by_rank"][0] for z in (x, y)))
        assert_same(x, y, tolerance)


class Faults:
    """What goes wrong while a run is trained in this process. conftest.py undoes it."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def at_step(self, step: int, act):
        """Calls act() when this step, counted from 0, begins."""
        windows = train.train_windows

        def stand_in(data, config, now):
            if now == step:
                self.monkeypatch.setattr(train, "train_windows", windows)
                act()
            return windows(data, config, now)

        self.monkeypatch.setattr(train, "train_windows", stand_in)

    def signal(self, number: int, step: int):
        self.at_step(step, lambda: signal.raise_signal(number))

    def bad_gradients(self, *steps: int):
        """The gradients of these steps, counted from 1, are not finite."""
        calls = itertools.count(1)

        def spoiling(parameters, *rest):
            parameters = list(parameters)
            if next(calls) in steps:
                parameters[0].grad.fill_(math.inf)
            return CLIP(parameters, *rest)

        self.monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling)
