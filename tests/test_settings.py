"""How words of the command line and config files become values, and errors sentences."""

import inspect
import re
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest

from model import ConfigError, ModelConfig, check_ranges
from prepare_data import DataConfig
from sample import SampleConfig
from support import settings as config
from train import TrainConfig


@dataclass
class Config:
    steps: int = 1000  # optimiser steps, 100% of them
    lr: float = 3e-4
    fp8: bool = False  # use # eight bits
    name: str = "x"
    limit: int | None = 5
    scaling: dict | None = None
    mode: Literal["", "auto", "0"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    batch_size: int = 8


def parse(*words):
    return config.parse_args("What it does.", list(words), Config, positional="source")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("steps=1_000", 1000), ("steps=1e6", 10**6), ("steps=-1", -1), ("lr=1", 1.0),
        ("lr=1e-3", 1e-3), ("fp8", True), ("fp8=false", False), ("fp8=0", False), ("fp8=1", True),
        ("name=12", "12"), ("name='q'", "'q'"), ("name=", ""), ("name=a=b", "a=b"),
        ("name=none", "none"), ("name= x ", " x "), ("name=(", "("),
        ("limit=none", None), ("limit=7", 7), ("scaling={'factor': 4}", {"factor": 4}),
        ("scaling=none", None), ("mode=0", "0"), ("mode=", ""),
        ("compile=1", True), ("compile=0.0", False),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_field_and_text_stays_text(word, value):
    key = word.split("=")[0]
    positional, values = parse("here", f"--{word}")
    assert positional == "here" and values == {key: value} and type(values[key]) is type(value)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--steps=1.5", "steps is '1.5', expected a whole number"),
        ("--steps=1e999", "steps is '1e999', expected a whole number"),
        ("steps=3", "write --steps=3"),
        ("--fp8=maybe", "fp8 is 'maybe', expected True or False"),
        ("--mode=1", "mode is '1', expected one of '', auto, 0"),
        ("--scaling={{1: 2}}", "expected dict"),
        ("--steps=" + "1" * 9999 + "x", "steps is '111"),
        ("--step=1", "unknown key step; did you mean steps?"),
        ("--batch-size=1", "unknown key batch-size; did you mean batch_size?"),
        ("--n_embd=1", "unknown key n_embd; see --help"),  # no such key here
        ("--max_iters=1", "unknown key max_iters, nanoGPT's name; here it is steps"),
        ("--dropout=0.1", "unknown key dropout, nanoGPT's name; there is no dropout here"),
    ],
)
def test_wrong_keys_and_values_exit_with_2_and_a_sentence(word, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("here", word)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and sentence in said and len(said) < 400


def test_help_and_absent_values(capsys):
    assert parse() == (None, {})
    assert parse("--fp8", "here") == ("here", {"fp8": True})  # a flag takes no value
    assert parse("--steps", "5") == (None, {"steps": 5})
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "[SOURCE] [--key=value ...] What it does." in text
    assert "--steps int optimiser steps, 100% of them (default: 1000)" in text
    assert "--mode one of '', auto, 0 (default: 'auto')" in text


def test_config_files_are_assignments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    Path("config/a.py").write_text("\ufeff_base = 2\nsteps = 1e3\nlr = _base\nscaling = {'a': 1}\n")
    values = config.read_config_file("config/a.py", Config)
    assert values == {"steps": 1000, "lr": 2.0, "scaling": {"a": 1}}
    assert type(values["steps"]) is int and type(values["lr"]) is float
    for content, sentence in {
        "batchsize = 4": "my.py: unknown key batchsize; did you mean batch_size?",
        "steps = 'five'": "my.py: steps is 'five', expected a whole number",
        "steps = True": "my.py: steps is True, expected a whole number",
    }.items():
        Path("my.py").write_text(content)
        with pytest.raises(config.Refusal, match=re.escape(sentence)):
            config.read_config_file("my.py", Config)
    Path("my.py").write_text("steps = 1\nlr = 1 / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:  # with the line that is wrong
        config.read_config_file("my.py", Config)
    assert traceback.extract_tb(caught.tb)[-1].lineno == 2


MEMORY, SEE = "error: out of memory", f": {config.LESS_MEMORY}\n"
UNCOMPILED = "error: the network cannot be compiled"


def of_compiler(name: str) -> Exception:
    return type(name, (RuntimeError,), {"__module__": "torch._dynamo.exc"})("no g++")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (config.Refusal("no\nway"), 1, "error: no way\n"),
        (ModuleNotFoundError("no gguf", name="gguf"), 1, "error: no gguf: pip install gguf\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (of_compiler("Unsupported"), 1, f"{UNCOMPILED} (no g++): give --compile=False\n"),
        (RuntimeError("CUDA out of memory"), 1, f"{MEMORY} (CUDA out of memory){SEE}"),
        (MemoryError("8 TiB"), 1, f"{MEMORY} (8 TiB){SEE}"),
        (MemoryError(), 1, f"{MEMORY}{SEE}"),
        (FileNotFoundError(2, "No file", "x.py"), 1, "error: [Errno 2] No file: 'x.py'\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (OSError(12, "Cannot allocate"), 1, f"{MEMORY} ([Errno 12] Cannot allocate){SEE}"),
    ],
)
def test_run_command_turns_refusals_into_exit_codes(error, code, message, capsys):
    with pytest.raises(SystemExit) as caught:
        config.run_command(mock.Mock(side_effect=error))
    assert (caught.value.code, capsys.readouterr().err) == (code, message)


BUGS = [ValueError("2 values"), RuntimeError("shape"), of_compiler("TorchRuntimeError")]
BUGS += [ModuleNotFoundError("no x", name="support.x"), AssertionError("a shape of mine")]


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_is_raised_again_with_its_trace(bug):
    with pytest.raises(type(bug)) as caught:
        config.run_command(mock.Mock(side_effect=bug))
    assert caught.value is bug and not bug.__suppress_context__


def test_a_home_is_found_and_nan_is_in_no_range(monkeypatch):
    monkeypatch.setenv("HOME", "/here")
    assert config.with_home({"out": "~/a", "lr": 1}, "out", "data") == {"out": "/here/a"}
    with pytest.raises(ConfigError, match="lr is nan"):
        TrainConfig(lr=float("nan"))


def test_a_field_of_your_own_may_be_as_low_as_its_default():
    @dataclass
    class Own:
        size: int = 0
        shift: float = -0.5

    check_ranges(Own(), at_least_one={"size"})
    for low in (dict(size=-1), dict(shift=-0.6)):
        with pytest.raises(ConfigError, match=r"must be at least (0|-0\.5)\."):
            check_ranges(Own(**low), at_least_one={"size"})


def test_every_option_says_in_words_what_it_is():
    for kind in (TrainConfig, DataConfig, SampleConfig, ModelConfig):
        source = inspect.getsource(kind)
        for field in fields(kind):
            assert re.search(rf"(?m)^    {field.name}: .*  # .*\w+ \w+", source), field.name
    ours = {*" ".join(config.NANOGPT.values()).split()}
    kinds = (TrainConfig, SampleConfig, ModelConfig)
    assert ours <= {field.name for kind in kinds for field in fields(kind)}
