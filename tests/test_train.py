"""Training is exact, resumable, the same on any number of processes, and hard to kill.

Where processes matter they are forked from a server that has imported train.py once.

    KILLS=100 python -m pytest tests/test_train.py -k sigkill     kills a hundred times, not ten
    COMPILE=1 python -m pytest tests/test_train.py -k "resumed or compiled"     --compile (minutes)
"""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fp8
import prepare_data
import train
from config import read_config_file, run_command
from huggingface import load_checkpoint, load_model
from model import DeepSeekV3, ModelConfig

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "config" / "tiny.py")
SHORT = (
    *("--steps=8", "--batch_size=4", "--block_size=16", "--eval_batch=32", "--dtype=float64"),
    *("--log_every=1", "--eval_every=4", "--save_every=4"),
)
# Schedules that do not depend on the length of the run.
CONSTANT = ("--warmup=0", "--decay_start=1", "--mtp_switch=1", "--gamma_stop=1")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


# ---- Tools ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with 200 kB of the standard library."""
    folder, size = tmp_path_factory.mktemp("source") / "text", 0
    folder.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
        if size < 200_000:
            size += path.stat().st_size
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def data(text, tmp_path_factory) -> Path:
    return prepare_data.prepare(
        prepare_data.DataConfig(
            source=str(text), name="tiny", out=str(tmp_path_factory.mktemp("data")),
            vocab_size=512, val_fraction=0.01,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_sample():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_result", lambda *arguments: None)
        yield


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder, and afterwards the signal handlers of before."""
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def train_in(out: Path | str, data: Path, *options: str) -> Path:
    train.main([TINY, f"--data={data}", f"--out={out}", *SHORT, *options])
    return Path(out)


@pytest.fixture
def run(data):
    """Trains in this process; returns the run's folder."""
    return lambda *options, out="run": train_in(out, data, *options)


@pytest.fixture(scope="module")
def shared(data, tmp_path_factory):
    """The same, once for all tests that ask for these options; they only read the folder."""
    folder = tmp_path_factory.mktemp
    return functools.cache(lambda *options: train_in(folder("shared") / "run", data, *options))


def copy(folder: Path, out: str = "run") -> Path:
    return Path(shutil.copytree(folder, out))


@pytest.fixture
def refused(capsys, monkeypatch):
    """The one sentence with which the command fails, as its user sees it."""

    def refused(*argv: str, code: int = 1) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as exit:
            run_command(train.main)
        error = capsys.readouterr().err
        assert exit.value.code == code and "Traceback" not in error
        progress = r"usage: train|model: |run: |step \d+|\w+ is now |the (run|schedule) "
        lines = [line for line in error.splitlines() if not re.match(progress, line)]
        assert len(lines) == 1 and error.splitlines()[-1] == lines[0], error
        return lines[0]

    return refused


@pytest.fixture(scope="session")
def server():
    """Forks processes that have imported this file, so that each costs no time to start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}", prepend=os.pathsep)
        context.Process(target=int).start()
    return context


def command(argv: list[str], log: str, environment: dict[str, str], setup):
    """The life of a forked process: train.py with its output in a file."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    with open(log, "wb", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    train.show_result = lambda *arguments: None
    if setup:
        setup()
    run_command(train.main)


@pytest.fixture
def start(data, server, tmp_path):
    """Starts train.py in `world` processes, which have .log (a path); kills what is left."""
    everything = []

    def start(*options: str, world: int = 1, out: str = "run", setup=None):
        argv = [TINY, f"--data={data}", f"--out={tmp_path / out}", *SHORT, *options]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(world):
            log = tmp_path / f"{out}.{rank}.log"
            log.write_text("")
            ranks = dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
            environment = ranks | {"MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
            process = server.Process(target=command, args=(argv, str(log), environment, setup))
            process.log = log
            process.start()
            processes.append(process)
        everything.extend(processes)
        return processes

    yield start
    for process in everything:
        process.kill()


def finish(processes, codes: int | list[int] = 0, seconds: float = 100) -> list[str]:
    """Waits for the end of all processes; returns what they said."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    said = [process.log.read_text() for process in processes]
    expected = codes if isinstance(codes, list) else [codes] * len(processes)
    assert [process.exitcode for process in processes] == expected, "\n".join(said)
    return said


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def log_of(out: Path) -> list[dict]:
    """log.jsonl without the times."""
    lines = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def load(out: Path, name: str = "ckpt.pt") -> dict:
    return torch.load(Path(out) / name, weights_only=True)


def assert_same(a, b, tolerance: float = 0.0, path: str = ""):
    """Equal, numbers within the tolerance (relative, and absolute for what is near 0)."""
    if isinstance(a, (dict, list)):
        pairs = a.items() if isinstance(a, dict) else enumerate(a)
        assert a.keys() == b.keys() if isinstance(a, dict) else len(a) == len(b), path
        for key, x in pairs:
            assert_same(x, b[key], tolerance, f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        close = dict(rtol=tolerance, atol=tolerance, msg=lambda m: f"{path}: {m}")
        torch.testing.assert_close(a, b, **close)
    elif isinstance(a, float) and tolerance:
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), path
    else:
        assert a == b, path


def assert_same_run(a: Path, b: Path):
    """All that a run has made, bit for bit."""
    assert log_of(a) == log_of(b)
    for name in ("ckpt.pt", "best.pt"):
        x, y = load(a, name), load(b, name)
        assert_same(x, y | {"train_config": x["train_config"]})


def assert_equivalent(a: Path, b: Path, tolerance: float = 1e-9):
    """The same loss curve, evaluations, weights, optimiser and biases but for rounding."""
    assert_same(log_of(a), log_of(b), tolerance)
    x, y = load(a), load(b)
    for key in ("model", "optimizer", "step", "tokens", "evaluated"):
        assert_same(x[key], y[key], tolerance)


def keep_saves(monkeypatch) -> dict[int, dict]:
    """Filled with every saved ckpt.pt, by step."""
    states, save = {}, train.save_atomically

    def keep(state, path):
        save(state, path)
        if path.name == "ckpt.pt":
            states[state["step"]] = load(path.parent)

    monkeypatch.setattr(train, "save_atomically", keep)
    return states


def stop_at(step: int, monkeypatch, number: int = signal.SIGTERM):
    """A signal as soon as the line of that step is in the log."""
    log = train.Run.log

    def log_and_stop(self, *line):
        log(self, *line)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Run, "log", log_and_stop)


# ---- Schedules and data --------------------------------------------------------------------------


def test_learning_rate_follows_section_4_2():
    config = train.TrainConfig(steps=10_000, lr=2.0)
    points = {
        0: 2 / 86, 42: 2 * 43 / 86, 84: 2 * 85 / 86, 85: 2, 6759: 2, 6760: 2,
        7485: 2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 8210: 2 * 0.55, 9659: 2 * 0.1,
        9660: 2 * 0.1, 9886: 2 * 0.1, 9887: 2 * 0.0332, 9999: 2 * 0.0332,
    }  # fmt: skip
    for step, expected in points.items():
        assert train.lr_at(config, step) == pytest.approx(expected, rel=1e-5), step
    rates = [train.lr_at(config, step) for step in range(10_000)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.14


def test_batch_grows_in_equal_stages():
    config = train.TrainConfig(steps=1000, batch_size=16, batch_start=4, batch_ramp=0.1)
    points = {0: 4, 24: 4, 25: 8, 49: 8, 50: 12, 75: 16, 99: 16, 100: 16, 999: 16}
    assert {step: train.batch_at(config, step) for step in points} == points
    assert train.batch_at(replace(config, batch_start=0), 0) == 16


def test_windows_come_from_seed_and_step_alone(data):
    dataset, text = prepare_data.load_dataset(data), (data / "train.bin").read_bytes()
    config = train.TrainConfig(batch_size=4, block_size=16)
    windows = train.train_windows(dataset, config, 3)
    assert windows.shape == (4, 17)
    assert all(row.astype(np.uint16).tobytes() in text for row in windows)
    changed = replace(config, grad_accum=4, steps=9, lr=1.0, parallel="fsdp")
    assert np.array_equal(windows, train.train_windows(dataset, changed, 3))
    for other in ((config, 4), (replace(config, seed=1), 3)):
        assert not np.array_equal(windows, train.train_windows(dataset, *other))
    x, y = train.to_device(windows, torch.device("cpu"))
    assert x[:, 1:].equal(y[:, :-1]) and x.shape == y.shape == (4, 16)


def test_every_token_comes_once_in_an_epoch():
    class Positions:
        def __len__(self):
            return 1000

        def windows(self, starts, n):
            return starts[:, None] + np.arange(n)

    data, config = (
        SimpleNamespace(train=Positions()),
        train.TrainConfig(batch_size=4, block_size=16),
    )
    x = np.concatenate([train.train_windows(data, config, step) for step in range(31)])
    one, two = x[:, :-1].reshape(2, -1)  # 62 windows each, so the 16th step has both
    for epoch in (one, two):
        assert np.array_equal(np.sort(epoch), epoch.min() + np.arange(62 * 16))
    assert x.max() < 1000 and not np.array_equal(one - one.min(), two - two.min())
    begins = {train.epoch_starts(1337, epoch, 1000, 16).min() for epoch in range(20)}
    assert len(begins) > 4 and max(begins) < 8  # the borders move, by what 62 windows leave


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(train.sample, "usable_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):

        def supported(including_emulation=True, native=native):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert train.start_machine(train.TrainConfig()).dtype == dtype


# ---- One step, exactly ---------------------------------------------------------------------------


def test_steps_equal_a_hand_written_training_loop(run, data, monkeypatch):
    """Loss weights and their switch, clipping, AdamW, decay groups, schedule, bias update."""
    states = keep_saves(monkeypatch)
    options = dict(
        steps=4, lr=0.02, warmup=0.3, decay_start=0.5, decay_end=0.9, min_lr=0.1,
        clip=0.5, weight_decay=0.3, beta1=0.8, beta2=0.9, mtp_weight=0.4,
        mtp_weight_late=0.2, mtp_switch=0.5, gamma=0.05,
        gamma_stop=0.75, alpha=0.3,
    )  # fmt: skip
    given = [f"--{key}={value}" for key, value in options.items()]
    out = run(*given, "--save_every=1", "--attention_bias")
    config = train.TrainConfig(**options, batch_size=4, block_size=16)
    dataset, lines = prepare_data.load_dataset(data), log_of(out)
    model = DeepSeekV3(ModelConfig(**load(out)["model_config"])).double().train()
    model.load_state_dict(states[0]["model"])
    assert abs(model.lm_head.weight.std() / model.config.initializer_range - 1) < 0.02
    parameters = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in parameters.items()}
    v = {name: torch.zeros_like(p) for name, p in parameters.items()}
    clipped = 0
    for t in range(1, 5):
        x = torch.from_numpy(train.train_windows(dataset, config, t - 1))
        main, mtp, balance = model(x[:, :-1], x[:, 1:])
        moe_layers = 3  # two in the main model, one in the MTP module
        loss = main + (0.4 if t <= 2 else 0.2) * mtp + 0.3 * moe_layers * balance
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        clipped += norm > 0.5
        lr = train.lr_at(config, t - 1)
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                g = g * min(1.0, 0.5 / (norm + 1e-6))
                decayed = not ("norm" in name or name.endswith("bias"))
                p *= 1 - lr * (0.3 if decayed else 0.0)
                m[name] = 0.8 * m[name] + 0.2 * g
                v[name] = 0.9 * v[name] + 0.1 * g * g
                p -= lr * (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.9**t)).sqrt() + 1e-8)
            for gate, chosen in zip(model.gates(), model.routing, strict=True):
                load_ = torch.bincount(chosen.flatten(), minlength=8).float()
                if t <= 3:
                    gate.e_score_correction_bias += 0.05 * (load_.mean() - load_).sign()
            loads = [torch.bincount(c.flatten(), minlength=8).float() for c in model.routing]
            vio = sum((x.max() / x.mean() - 1).item() for x in loads) / 3
        assert_same(states[t]["model"], dict(model.state_dict()), 1e-10)
        line = next(x for x in lines if x["step"] == t and "loss" in x)
        expected = dict(
            step=t, tokens=t * 64, loss=main.item(), mtp_loss=mtp.item(),
            balance_loss=balance.item(), lr=lr, grad_norm=norm, max_vio=vio,
        )  # fmt: skip
        assert line == pytest.approx(expected, rel=1e-6)
    assert clipped, "no step was clipped"


def test_muon_takes_the_matrices_one_by_one_and_adamw_the_rest(monkeypatch):
    monkeypatch.setattr(train, "multiplies_bf16", lambda device: True)  # as torch.optim.Muon does
    torch.manual_seed(0)
    model = DeepSeekV3(
        ModelConfig(
            **train.split_configs(read_config_file(TINY, ModelConfig, train.TrainConfig))[0]
        )
    )
    config = train.TrainConfig(optimizer="muon", lr=0.01, adamw_lr=2.0, weight_decay=0.3)
    optimizers, expected = train.make_optimizers(model, config), {}
    for name, p in model.named_parameters():
        copies = [torch.nn.Parameter(x.clone()) for x in (p if p.ndim == 3 else [p])]
        if p.ndim == 1 or re.search(r"embed_tokens|lm_head|gate\.weight", name):
            decay = 0.3 if p.ndim > 1 else 0.0
            reference = torch.optim.AdamW(copies, lr=0.02, betas=(0.9, 0.95), weight_decay=decay)
        else:
            reference = torch.optim.Muon(
                copies, lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
            )
        for _ in range(2):
            p.grad = torch.randn_like(p)
            expected.setdefault(name, []).append(p.grad)
            for copy, grad in zip(copies, p.grad if p.ndim == 3 else [p.grad], strict=True):
                copy.grad = grad.clone()
            reference.step()
        expected[name].append(torch.stack(copies).detach().view_as(p))
    for i in range(2):
        model.zero_grad(set_to_none=True)
        for name, p in model.named_parameters():
            p.grad = expected[name][i]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name][2], msg=name, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        ("--grad_accum=2", 1e-10),
        ("--grad_accum=4", 1e-10),
        ("--recompute", 1e-10),
        ("--deterministic", 0.0),
    ],
)
def test_how_a_step_is_computed_changes_nothing(option, tolerance, run, shared):
    whole = shared()
    assert_equivalent(whole, run(option), tolerance)
    assert load(whole)["model"]["layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0
    assert not torch.are_deterministic_algorithms_enabled()  # in training only


@pytest.mark.skipif("COMPILE" not in os.environ, reason="takes a minute; COMPILE=1 runs it")
def test_a_growing_batch_stays_compiled(run, monkeypatch):
    """dynamo, with the plainest backend, makes graphs for every block, mode and batch size."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile(block, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    sizes = ("--steps=2", "--batch_size=2", "--batch_start=1", "--batch_ramp=1")
    run("--dtype=bfloat16", "--compile", *sizes)


# ---- Resume --------------------------------------------------------------------------------------

CASES = {
    "float32": ["--dtype=float32"],
    "bfloat16": ["--dtype=bfloat16"],
    "batch ramp, accumulation, tied": [
        *("--dtype=float32", "--batch_start=2", "--batch_ramp=0.7", "--grad_accum=2"),
        *("--tie_word_embeddings", "--log_every=3"),
    ],
    "float64": [],
    "muon": ["--dtype=float32", "--optimizer=muon"],
    "long": ["--dtype=float32", "--long_block_size=32", "--long_start=0.5", "--log_every=3"],
}
if os.environ.get("COMPILE"):
    CASES["compile"] = ["--dtype=float32", "--compile"]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    options, run, shared, monkeypatch, capsys
):
    step = 3 if "--log_every=3" not in options else 6
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        run(*options)
    said = capsys.readouterr().err
    assert f"stopped at step {step}" in said and "--resume" in said
    assert load("run")["step"] == step == log_of("run")[-1]["step"]
    with open("run/log.jsonl", "a") as file:  # what came after the checkpoint, and half a line
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    run(*options, "--resume")
    assert_same_run(shared(*options), Path("run"))
    assert load("run")["tokens"] == log_of("run")[-1]["tokens"]


def test_a_resumed_run_keeps_its_settings_and_tells_what_differs(run, data, monkeypatch, capsys):
    """What the command line does not name stays, whatever the config file says by now."""
    argv = ("my.py", f"--data={data}", "--out=run", *SHORT)
    Path("my.py").write_text(Path(TINY).read_text())
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        train.main([*argv, "--lr=0.01"])
    Path("my.py").write_text(Path(TINY).read_text() + "weight_decay = 0.5\n")
    capsys.readouterr()
    train.main(["my.py", "--out=run", "--resume", "--steps=4", "--eval_batch=16"])
    said = capsys.readouterr().err
    (line,) = (x for x in said.splitlines() if x.startswith("the run keeps its settings"))
    assert "--lr=0.005" in line and "--weight_decay=0.5" in line and "--gamma" not in line
    assert "steps is now 4 (was 8)" in said and "eval_batch is now 16 (was 32)" in said
    train.main(["--out=run", "--resume", "--steps=5"])
    state = load("run")
    settings = state["train_config"]
    assert state["step"] == 5 and next(iter(state["model"].values())).dtype == torch.float64
    assert (settings["batch_size"], settings["lr"], settings["weight_decay"]) == (4, 0.01, 0.1)


def test_resume_may_change_optimiser_settings_and_says_so(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        run(*CONSTANT, "--lr=0.001", "--weight_decay=0")
    before = load("run")["model"]["lm_head.weight"]
    options = ("--lr=0.5", "--weight_decay=2", "--beta1=0", "--clip=1e-9", "--beta2=0")
    run(*CONSTANT, "--resume", "--steps=4", *options)
    said = capsys.readouterr().err
    assert "lr is now 0.5 (was 0.001)" in said and "weight_decay is now 2.0 (was 0.0)" in said
    assert log_of("run")[-2]["lr"] == 0.5
    # lr * weight_decay = 1 wipes the weight out, and the clipped gradient is far below Adam's eps
    after = load("run")["model"]["lm_head.weight"]
    assert after.abs().max() < 1e-2 < before.abs().max()


def test_a_finished_run_can_go_on_for_longer(run, shared, capsys):
    run(*CONSTANT, "--steps=4")
    before = Path("run/ckpt.pt").stat().st_mtime_ns
    run(*CONSTANT, "--steps=4", "--resume")  # nothing left to do
    assert Path("run/ckpt.pt").stat().st_mtime_ns == before
    run(*CONSTANT, "--resume")
    assert_same_run(shared(*CONSTANT), Path("run"))
    assert "stretched" not in capsys.readouterr().err
    out = copy(shared(), "decayed")
    train.main([f"--out={out}", "--resume", "--steps=16"])
    said = capsys.readouterr().err
    assert "the schedule is stretched: the rate goes from 0.000946 back to 0.005" in said


def test_another_network_or_tokenizer_is_refused_on_resume(shared, refused, data, text):
    out = copy(shared("--steps=1"))
    before = (out / "ckpt.pt").read_bytes()
    argv = (TINY, f"--data={data}", "--out=run", "--resume")
    assert "hidden_size is 64 here, but 48 in run" in refused(*argv, "--hidden_size=64")
    assert "optimizer is muon here, but adamw in run" in refused(*argv, "--optimizer=muon")
    other = prepare_data.DataConfig(
        source=str(text), name="other", vocab_size=512, val_fraction=0.4
    )
    prepare_data.prepare(other)
    for options in (["--out=run", "--resume"], ["--out=new", "--init_from=run"]):
        sentence = refused(TINY, "--data=other", "--block_size=16", *options)
        assert "another tokenizer" in sentence and "--tokenizer=run" in sentence
    assert (out / "ckpt.pt").read_bytes() == before


def test_weights_of_a_run_start_another(run, shared):
    first = shared("--steps=4")
    run("--steps=1", "--lr=0", "--gamma=0", f"--init_from={first}", out="second")
    assert_same(load(first)["model"], load("second")["model"])
    assert load("second")["step"] == 1 and log_of("second")[0]["tokens"] == 64


def test_weights_of_a_hugging_face_directory_start_a_run(shared, data, capsys):
    pytest.importorskip("safetensors")
    out = shared("--steps=4", "--dtype=float32")
    load_model(out)[0].save_pretrained("released")
    options = (f"--data={data}", *SHORT, "--dtype=float32", "--eval_only")
    capsys.readouterr()
    train.main([TINY, *options, f"--out={out}"])
    ours = json.loads(capsys.readouterr().out)
    train.main([TINY, *options, "--init_from=released", "--out=nowhere"])
    theirs = json.loads(capsys.readouterr().out)
    assert_same(ours, theirs, 1e-6)
    assert not Path("nowhere").exists()
    evaluation = [line for line in log_of(out) if "val_loss" in line][-1]
    assert {k: ours[k] for k in ours} == {k: evaluation[k] for k in ours}
    assert {"val_loss", "val_bpb", "max_vio_global"} <= ours.keys()


# ---- Long context (section 4.3) ------------------------------------------------------------------


def test_the_last_part_of_a_run_extends_the_context(shared, data, capsys):
    out, dataset = shared(*CASES["long"]), prepare_data.load_dataset(data)
    config = train.TrainConfig(**load(out)["train_config"])
    shapes = [train.train_windows(dataset, config, step).shape for step in range(8)]
    assert shapes == [(4, 17)] * 5 + [(2, 33), (4, 17), (2, 33)]
    model, *_ = load_model(out)
    yarn = model.config.rope_scaling
    assert (yarn["factor"], yarn["original_max_position_embeddings"]) == (2, 16)
    assert model.layers[0].self_attn.scale == pytest.approx((0.1 * math.log(2) + 1) ** 2 / 24**0.5)
    assert model.trained_length == 32
    first, last = (line for line in log_of(out) if "val_loss" in line)
    assert "val_bpb_long" not in first
    long = train.evaluate(model, dataset, replace(config, block_size=32), MACHINE)["val_bpb"]
    assert last["val_bpb_long"] == pytest.approx(long, rel=1e-6) != pytest.approx(last["val_bpb"])


def test_the_best_checkpoint_is_one_of_the_last_phase(run, monkeypatch):
    give_losses(monkeypatch, 1.0, 2.0, 3.0)
    run(*CASES["long"])
    assert load("run", "best.pt")["step"] == 8
    run("--resume", "--steps=12")
    assert load("run", "best.pt")["step"] == 8


def test_another_run_may_stretch_the_context_further(run, shared):
    first = shared(*CASES["long"])
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}
    options = ("--dtype=float32", "--steps=1", "--lr=0", "--block_size=64")
    run(*options, f"--init_from={first}", f"--rope_scaling={yarn}", "--max_position_embeddings=64")
    second = load("run")
    assert second["model_config"]["rope_scaling"] == yarn and second["trained_length"] == 64
    assert_same(load(first)["model"]["norm.weight"], second["model"]["norm.weight"])
    with pytest.raises(ValueError, match="less than the 64 tokens that run is trained for"):
        run("--init_from=run", *CASES["long"], out="shrunk")
    model = load_model("run")[0]  # the factor counts from where the weights began
    train.extend_context(model, train.TrainConfig(block_size=32, long_block_size=256))
    assert model.config.rope_scaling == yarn | {"factor": 16}
    model.config.rope_scaling, model.trained_length = None, 32  # or from the length trained so far
    train.extend_context(model, train.TrainConfig(block_size=16, long_block_size=128))
    assert model.config.rope_scaling["factor"] == 4


def test_what_an_older_checkpoint_lacks_was_the_default():
    old = {"train_config": {"steps": 5}, "model_config": {}, "step": 1}
    config = train.TrainConfig(adamw_lr=2.0)
    after = train.resumed(config, old, {}, {"adamw_lr": 2.0})
    assert (after.steps, after.adamw_lr) == (5, 1.0)


def test_json_gets_null_for_what_it_has_no_name_for():
    assert train.without_nan([math.nan, 1.0, [-math.inf]]) == [None, 1.0, [None]]


def test_context_keys_have_no_weights_and_may_change_on_resume(run, shared):
    copy(shared("--steps=1"))
    run("--resume", "--steps=2", "--block_size=300", "--max_position_embeddings=512")
    assert load("run")["model_config"]["max_position_embeddings"] == 512


# ---- Evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def trained(shared, data) -> tuple[DeepSeekV3, prepare_data.Dataset, train.TrainConfig]:
    model, *_ = load_model(shared())
    config = train.TrainConfig(block_size=16, eval_batch=32)
    return model, prepare_data.load_dataset(data), config


MACHINE = train.Machine(torch.device("cpu"), torch.float64)


def test_evaluation_predicts_every_token_once_whatever_its_batch(trained, data):
    model, dataset, config = trained
    result, *others = (
        train.evaluate(model, dataset, replace(config, eval_batch=n), MACHINE) for n in (32, 1, 7)
    )
    for other in others:
        assert_same(result, other, 1e-12)
    tokens = torch.from_numpy(dataset.val.arrays[0].astype(np.int64))
    assert (len(tokens) - 1) % 16, "the last window should be ragged"
    nats, mtp, mtp_count = 0.0, 0.0, 0
    counts, touched, visits = torch.zeros(3, 8), 0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start : start + 17]
            logits, (ahead, *_) = model(piece[None, :-1], return_mtp=True)
            nats += F.cross_entropy(logits[0], piece[1:], reduction="sum").item()
            mtp += F.cross_entropy(ahead[0], piece[2:], reduction="sum").item()
            mtp_count += len(piece) - 2
            for layer, chosen in enumerate(model.routing):
                counts[layer] += torch.bincount(chosen.flatten(), minlength=8)
                for experts in chosen.flatten(0, 1).tolist():
                    touched += len({expert // 2 for expert in experts})
                    visits += 1
    assert result["val_mtp_losses"] == [result["val_mtp_loss"]]
    n = len(tokens) - 1
    assert result["val_loss"] == pytest.approx(nats / n, rel=1e-12)
    assert result["val_mtp_loss"] == pytest.approx(mtp / mtp_count, rel=1e-12)
    size = len((data / "val.bin").read_bytes()[1024:]) // 2
    meta = json.loads((data / "meta.json").read_text())
    bits = nats / n / math.log(2) * size / meta["bytes"]["val"]
    assert result["val_bpb"] == pytest.approx(bits, rel=1e-6)
    vio = ((counts.amax(1) / counts.mean(1)) - 1).mean().item()
    assert result["max_vio_global"] == pytest.approx(vio, rel=1e-6)
    assert result["nodes_per_token"] == pytest.approx(touched / visits, rel=1e-12)
    assert result["experts_per_node"] == pytest.approx(2 * visits / touched, rel=1e-12)
    load_ = torch.tensor(result["expert_load"])
    assert torch.allclose(load_, counts / counts.sum(1, keepdim=True), atol=1e-5)


def test_evaluation_leaves_no_trace(trained):
    model, dataset, config = trained
    model.train()
    model(torch.arange(16)[None], torch.arange(16)[None])  # counts that wait for the bias update
    assert model.expert_counts.sum()
    before = {k: v.clone() for k, v in dict(model.named_buffers()).items()}
    before |= {k: v.clone() for k, v in model.named_parameters()}
    train.evaluate(model, dataset, config, MACHINE)
    assert_same(before, dict(model.named_buffers()) | dict(model.named_parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_quantises_each_weight_once(trained, monkeypatch):
    """In FP8, however many batches there are."""
    model, dataset, config = trained
    model.use_fp8()
    counts, quantize = [], fp8.quantize

    def counted(x, block, *rest, **named):
        counts[-1] += block == fp8.BLOCK
        return quantize(x, block, *rest, **named)

    monkeypatch.setattr(fp8, "quantize", counted)
    for batch in (4, 64):
        counts.append(0)
        train.evaluate(model.float(), dataset, replace(config, eval_batch=batch), MACHINE)
    assert counts[0] == counts[1] > 0


def test_more_evaluations_do_not_change_the_run(run, shared):
    run("--eval_every=1", "--save_every=1")
    assert_same(load(shared())["model"], load("run")["model"])


def give_losses(monkeypatch, *losses: float):
    """What the next evaluations find."""
    left = iter(losses)

    def evaluate(*arguments):
        loss = next(left)
        return dict(val_loss=loss, val_bpb=loss / 2, val_mtp_loss=9.0, max_vio_global=0.0)

    monkeypatch.setattr(train, "evaluate", evaluate)


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(run, monkeypatch):
    give_losses(monkeypatch, 3.0, 2.0, 2.5, math.nan, 2.1)
    states = keep_saves(monkeypatch)
    out = run("--eval_every=2", "--save_every=2")
    best = load(out, "best.pt")
    assert best["step"] == 4 and best["val_loss"] == 2.0 and best["val_bpb"] == 1.0
    assert_same(best["model"], states[4]["model"])
    model, tokenizer, _ = load_model(out)
    assert_same(dict(model.state_dict()), best["model"])
    assert tokenizer.encode("def ")
    run("--resume", "--steps=10", "--eval_every=2")
    assert load(out, "best.pt")["step"] == 4
    assert [x["val_loss"] for x in log_of(out) if "val_loss" in x] == [3.0, 2.0, 2.5, None, 2.1]


def test_a_resumed_run_keeps_a_best_checkpoint_newer_than_its_own(run, monkeypatch):
    give_losses(monkeypatch, 2.0)
    with pytest.raises(StopIteration):  # dies at the second evaluation, before its first save
        run("--eval_every=2", "--save_every=8")
    assert load("run")["step"] == 0 and load("run", "best.pt")["step"] == 2
    give_losses(monkeypatch, 2.3, 2.0, 2.1, 2.2)
    run("--eval_every=2", "--resume")
    assert load("run", "best.pt")["step"] == 2 and load("run", "best.pt")["val_loss"] == 2.0


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_up_for(
    run, shared, monkeypatch, capfd
):
    to_device, calls = train.to_device, []

    def signal_in_evaluation(windows, device):
        calls.append(len(windows))
        if len(calls) == 7:  # after four steps and two of many batches
            os.kill(os.getpid(), signal.SIGINT)
            assert "stopping after this step, or this batch" in capfd.readouterr().err
        return to_device(windows, device)

    with monkeypatch.context() as patch:
        patch.setattr(train, "to_device", signal_in_evaluation)
        run("--eval_batch=8")
    assert calls == [4] * 4 + [8] * 3
    assert load("run")["step"] == 4 and "val_loss" not in log_of("run")[-1]
    assert "stopped at step 4" in capfd.readouterr().err
    run("--eval_batch=8", "--resume")
    assert_same_run(shared("--eval_batch=8"), Path("run"))


# ---- Several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lonely(shared, tmp_path_factory) -> str:
    """A run in whose checkpoint the first expert of every layer is never chosen."""
    out = copy(shared("--steps=1"), tmp_path_factory.mktemp("lonely") / "run")
    state = load(out)
    for name, x in state["model"].items():
        if name.endswith("correction_bias"):
            x[0] = -1e6
    train.save_atomically(state, out / "best.pt")
    return f"--init_from={out}"


def expect_shards():
    make = train.make_optimizers

    def make_optimizers(model, config):
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.ndim > 1)
        return make(model, config)

    train.make_optimizers = make_optimizers


@pytest.mark.parametrize(
    "parallel, accumulate, optimizer",
    [*itertools.product(("ddp", "fsdp"), (1, 2), ("adamw",)), ("ddp", 1, "muon")],
)
def test_two_processes_equal_one(parallel, accumulate, optimizer, start, shared, lonely):
    """Loss curve, evaluations, biases, weights and optimiser; with MTP and an unused expert."""
    lonely = (lonely, f"--optimizer={optimizer}")
    alone = shared(*lonely)
    options = (f"--parallel={parallel}", f"--grad_accum={accumulate}", *lonely)
    setup = expect_shards if parallel == "fsdp" else None
    finish(start(*options, world=2, out="together", setup=setup))
    assert_equivalent(alone, Path("together"))
    bias = load("together")["model"]["layers.1.mlp.gate.e_score_correction_bias"]
    assert bias[0] < -1e5 and bias[1:].abs().max() > 0
    for name in ("best.pt", "ckpt.pt"):
        model, *_ = load_model(Path("together") / name)
        assert_same(dict(model.state_dict()), load("together", name)["model"])


def test_a_run_moves_between_one_process_ddp_and_fsdp(start, run, shared):
    run(*CONSTANT, "--steps=2", out="moved")
    stages = (("ddp", 2, 4), ("fsdp", 2, 6), ("ddp", 1, 8), ("fsdp", 2, 10), ("ddp", 2, 12))
    for parallel, world, steps in stages:
        options = (f"--parallel={parallel}", f"--steps={steps}", "--resume")
        if world == 1:
            run(*CONSTANT, *options, out="moved")
        else:
            finish(start(*CONSTANT, *options, world=world, out="moved"))
    moved, straight = load("moved"), load(shared(*CONSTANT, "--steps=12"))
    for key in ("model", "optimizer", "step", "tokens"):
        assert_same(moved[key], straight[key], 1e-9)


def expect_no_whole_weight_kept():
    """Autograd may keep activations of a forward pass, but no block's weight in bf16."""
    backward = train.backward

    def watched(model, *rest):
        shapes = {tuple(sorted(p.shape)) for p in model.layers.parameters() if p.ndim > 1}

        def keep(x):
            assert x.dtype != torch.bfloat16 or tuple(sorted(x.shape)) not in shapes, x.shape
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return backward(model, *rest)

    train.backward = watched


def test_fsdp_keeps_no_copy_of_the_weights_for_the_backward_pass(start):
    options = ("--parallel=fsdp", "--dtype=bfloat16", "--steps=2", "--block_size=20")
    finish(start(*options, world=2, setup=expect_no_whole_weight_kept))


def raise_at_third_step():
    windows = train.train_windows

    def fail(data, config, step):
        if step == 3 and os.environ["RANK"] == "1":
            raise ValueError("this rank has had enough")
        return windows(data, config, step)

    train.train_windows = fail


@pytest.mark.parametrize(("parallel", "raises"), [("ddp", False), ("fsdp", False), ("ddp", True)])
def test_a_rank_that_dies_or_raises_ends_the_others_promptly(parallel, raises, start):
    setup = raise_at_third_step if raises else None
    ranks = start("--steps=5000", f"--parallel={parallel}", world=2, setup=setup)
    if not raises:
        wait_for(lambda: "step 3/" in ranks[0].log.read_text())
        ranks[1].kill()
    said, culprit = finish(ranks, [1, 1 if raises else -signal.SIGKILL], seconds=20)
    errors = [line for line in said.splitlines() if not re.match("model:|run:|step ", line)]
    assert len(errors) == 1 and errors[0].startswith("error: rank 0 lost another process")
    assert culprit.strip() == ("error: this rank has had enough" if raises else "")
    load_checkpoint("run/ckpt.pt")


def test_torchrun_trains_and_is_interrupted_and_resumed(data, shared):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = [*torchrun, "--nproc_per_node=2", str(ROOT / "train.py"), TINY, f"--data={data}"]
    argv += ["--out=run", *SHORT, "--steps=24"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open("said", "wb") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=file, start_new_session=True, env=environment
        )
    try:
        wait_for(lambda: "step 3/" in Path("said").read_text())
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        process.wait(60)
        assert "stopped at step" in Path("said").read_text(), Path("said").read_text()
        done = subprocess.run([*argv, "--resume"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert_equivalent(shared("--steps=24"), Path("run"))


# ---- Unkillable ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "world"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)]
)
def test_a_signal_saves_at_the_next_step_and_exits_with_0(number, world, start, shared):
    """All ranks stop at the same step; here the last one gets the signal, twice as of torchrun."""
    ranks = start("--steps=24", world=world)
    wait_for(lambda: "step 3/" in ranks[0].log.read_text())
    for _ in range(2):
        os.kill(ranks[-1].pid, number)
        time.sleep(0.01)
    said, *others = finish(ranks, 0)
    step = int(re.search(r"stopped at step (\d+); go on from \S+ckpt.pt with --resume", said)[1])
    assert load("run")["step"] == step < 24 and "Traceback" not in said
    assert not any("stopped" in other for other in others)
    finish(start("--steps=24", "--resume", world=world))
    same = assert_same_run if world == 1 else assert_equivalent
    same(shared("--steps=24"), Path("run"))


def test_sigkill_at_any_moment_loses_nothing(start, shared):
    """Every second kill strikes while a file is being written, the others anywhere.

    KILLS=100 in the environment kills a hundred times; SEED=2 at other moments.
    """
    kills, chance = int(os.environ.get("KILLS", "10")), random.Random(os.environ.get("SEED", "1"))
    options = ("--steps=20", "--save_every=1", "--eval_every=3", "--dtype=float32")
    straight, out = shared(*options), Path("run")
    killed = resumed = torn = 0
    for _ in range(10 * kills):
        again = "--resume" if (out / "ckpt.pt").exists() else "--overwrite"
        resumed += again == "--resume"
        (process,) = start(*options, again)

        def until(writing: bool, process=process):
            wait_for(lambda: not process.is_alive() or any(out.glob("*.tmp")) == writing)

        if killed < kills and killed % 2:
            for _ in range(chance.randint(1, 6)):  # the so-manyth write that is seen
                until(writing=False)
                until(writing=True)
            process.kill()
        elif killed < kills:
            process.join(chance.uniform(0.05, 1.0))
            process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.log.read_text()
        killed += process.exitcode != 0
        torn += any(out.glob("*.tmp"))
        if (out / "ckpt.pt").exists():
            load_model(out / "ckpt.pt")
        if process.exitcode == 0:  # done before it could be killed, or all kills are survived
            assert_same_run(straight, out)
            if killed == kills:
                break
            shutil.rmtree(out)
    assert killed == kills and resumed > kills / 2 and torn


def limit_files_to_60_kb():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_leaves_the_old_checkpoint(start, shared):
    copy(shared("--steps=4"))
    before = {name: Path(f"run/{name}").read_bytes() for name in ("ckpt.pt", "best.pt")}
    (said,) = finish(start("--resume", setup=limit_files_to_60_kb), 1)
    error = said.splitlines()[-1]
    assert re.match(r"error: cannot write \S+ \(.*File too large\); what it held before is", error)
    assert said.count("error") == 1 and "Traceback" not in said
    assert {name: Path(f"run/{name}").read_bytes() for name in before} == before
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("out", ["file/run", "/proc/run"])
def test_an_output_that_cannot_be_written_is_one_sentence(out, data, refused):
    Path("file").write_text("in the way")
    sentence = refused(TINY, f"--data={data}", *SHORT, f"--out={out}")
    assert sentence.startswith("error: ") and out.split("/")[-1] in sentence


def test_a_diverging_run_stops_and_keeps_its_checkpoint(run, refused, data):
    run(*CONSTANT, "--dtype=float32", "--steps=4")
    before = Path("run/best.pt").read_bytes()
    argv = (TINY, f"--data={data}", "--out=run", *SHORT, "--dtype=float32", "--steps=40")
    sentence = refused(*argv, "--resume", "--lr=1e30", "--save_every=1", "--eval_every=6")
    found = re.match(r"error: loss \S+ and gradient norm \S+ at step (\d+), 5 steps", sentence)
    assert found, sentence
    assert "last good checkpoint in run is kept" in sentence
    state = load_checkpoint("run/ckpt.pt")
    assert state["step"] == int(found[1]) - 5
    assert all(x.isfinite().all() for x in state["model"].values())
    assert Path("run/best.pt").read_bytes() == before
    assert load_model("run")


def poison_third_gradient():
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *rest):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:
            grad = parameters[0].grad
            (grad.to_local() if hasattr(grad, "to_local") else grad).fill_(math.inf)
        return clip(parameters, *rest)

    torch.nn.utils.clip_grad_norm_ = poisoned


@pytest.mark.parametrize("parallel", ["", "ddp", "fsdp"])
def test_one_bad_gradient_is_skipped_and_the_run_goes_on(parallel, start):
    options = ("--eval_every=8", "--save_every=8", "--log_every=2")
    options += (f"--parallel={parallel or 'ddp'}",)
    said, *_ = finish(start(*options, world=2 if parallel else 1, setup=poison_third_gradient))
    assert "step 4: 1 skipped since the last line" in said
    state = load("run")
    assert state["step"] == 8 and state["optimizer"]["norm.weight"]["step"] == 7
    assert all(x.isfinite().all() for x in state["model"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_changes_neither_weights_nor_biases(optimizer, run, monkeypatch):
    states = keep_saves(monkeypatch)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
    poison_third_gradient()
    updates, update = [], DeepSeekV3.update_bias

    def update_bias(model, gamma):
        update(model, gamma)
        updates.append({k: v.clone() for k, v in model.state_dict().items()})

    monkeypatch.setattr(DeepSeekV3, "update_bias", update_bias)
    run("--save_every=1", "--eval_every=8", f"--optimizer={optimizer}")
    assert_same(updates[1], updates[2])
    assert not updates[2]["norm.weight"].equal(updates[3]["norm.weight"])
    assert states.keys() == {0, 1, 2, 4, 5, 6, 7, 8}  # the older file stays
    line = next(x for x in log_of("run") if x["step"] == 3)
    assert line["grad_norm"] is None and line["loss"] > 0


def test_a_run_that_ends_in_bad_steps_has_failed(run, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, c: clip(p, c) * math.nan)
    with pytest.raises(ValueError, match="at step 3, 3 steps in a row"):
        run("--steps=3", "--log_every=8")
    assert load("run")["step"] == 0


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--out=run"], ["--resume"], ["--init_from=x"]])
def test_no_configuration_is_a_usage_error(argv, refused):
    assert "name a config file" in refused(*argv, code=2)
    assert "unknown key batchsize; did you mean batch_size?" in refused("--batchsize=4", code=2)
    assert "dtype is 'float8', expected auto or" in refused(TINY, "--dtype=float8", code=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps=0"], "steps is 0, but must be at least 1"),
        (["--batch_size=0"], "batch_size is 0, but must be at least 1"),
        (
            ["--batch_size=10", "--batch_start=4"],
            "batch_size 10 must be a multiple of 4",
        ),
        (["--grad_accum=3"], "the first batch, 4, must be a multiple of processes x grad_accum, 3"),
        (["--device=abacus"], "device 'abacus' cannot be used here"),
        (["--block_size=257"], "windows of 257 tokens exceed max_position_embeddings 256"),
        (["--block_size=90000", "--max_position_embeddings=90000"], "no windows of 90001 tokens"),
        (["--long_block_size=48"], "the step's 64 tokens a multiple of it"),
        (["--long_block_size=32", "--long_start=1"], "must leave steps of 8 to long windows"),
        (["--vocab_size=1024"], "vocab_size is 1024"),
        (["--vocab_size=511"], "prepare the data again with --vocab_size=511"),
        (["--n_group=3"], "n_routed_experts 8 is not a multiple of n_group 3"),
        (["--data=nowhere"], "make it with: python prepare_data.py SOURCE --name=nowhere"),
        (["--resume"], "no checkpoint at run"),
        (["--eval_only"], "no checkpoint at run"),
        (["--init_from=nowhere"], "no checkpoint at nowhere"),
        (["--optimizer=muon", "--parallel=fsdp"], "muon needs whole matrices"),
    ],
)
def test_refusals_are_one_sentence(options, words, refused, data):
    assert words in refused(TINY, f"--data={data}", "--out=run", *SHORT, *options)
    assert not Path("run").exists()


def test_an_existing_run_is_refused_and_kept(run, shared, refused, data):
    copy(shared("--steps=1"))
    argv, before = (TINY, f"--data={data}", "--out=run", *SHORT), Path("run/ckpt.pt").read_bytes()
    for name in ("log.jsonl", "best.pt"):  # any of its files makes a run
        sentence = refused(*argv)
        assert "run holds a run already" in sentence
        assert "--resume" in sentence and "--overwrite" in sentence
        Path("run", name).unlink()
    assert "no data in" in refused(*argv, "--overwrite", "--data=nowhere")
    assert Path("run/ckpt.pt").read_bytes() == before
    for name in ("plot.png", "events.out.tfevents.1", "photo.png"):
        Path("run", name).touch()
    run("--steps=2", "--overwrite")
    assert Path("run/photo.png").exists() and not list(Path("run").glob("[ep]*[1t].*[1g]"))
    assert [x["step"] for x in log_of("run")] == [1, 2, 2]


def test_a_checkpoint_without_an_optimiser_or_cut_short_is_refused(shared, refused):
    out = copy(shared("--steps=1"))
    shutil.copyfile(out / "best.pt", out / "ckpt.pt")
    assert "no optimiser state to resume" in refused("--out=run", "--resume")
    half = (out / "best.pt").stat().st_size // 2
    os.truncate(out / "ckpt.pt", half)
    assert "truncated" in refused("--out=run", "--resume")


# ---- The network of a run ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world"), [("base_1b", 1), ("base_1b_8gpu", 8)])
def test_configurations_for_h100s_hold_what_they_promise(name, world):
    """Sizes, divisibility and data; no GPU has run them."""
    (values, settings), (first, _) = (
        train.split_configs(
            read_config_file(str(ROOT / f"config/{x}.py"), ModelConfig, train.TrainConfig)
        )
        for x in (name, "base_1b")
    )
    assert values == first  # one network for both
    config = train.TrainConfig(**settings)
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig(**values))
    count = model.parameter_counts()
    assert 0.9e9 < count["total"] < 1.1e9 and 0.15e9 < count["active"] < 0.25e9
    assert config.batch_size == 16 * world * config.grad_accum  # micro-batches of 16 windows
    assert config.batch_size * config.block_size == 524_288
    _, shards = prepare_data.SHARDS[config.data]
    assert config.steps * 524_288 < 1.01e8 * shards  # a pass, at most
    state, activations = 16 * (count["total"] + count["mtp"]), 0.85e6 * 16 * config.block_size
    assert state + activations < 50e9  # bytes
    sides = {n: x.shape[-2:] for n, x in model.named_parameters() if x.ndim > 1}
    odd = {n.rsplit(".", 2)[-2] for n, (a, b) in sides.items() if a % 128 or b % 128}
    assert odd == {"gate", "kv_a_proj_with_mqa"}


# ---- As a user would -----------------------------------------------------------------------------


def test_from_text_to_text_on_the_command_line(text):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def user(script: str, *argv: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *argv],
            capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        assert "\r" not in done.stderr, "no progress bars in a file"
        return done

    user("prepare_data.py", str(text), "--name=tiny", "--vocab_size=512")
    done = user("train.py", TINY, "--steps=40", "--block_size=32", "--log_every=2")
    assert (
        "M parameters" in done.stderr
        and "bits/byte" in done.stderr
        and "python sample.py out/tiny" in done.stderr
    )
    tokens = prepare_data.load_dataset("data/tiny").val.arrays[0][1:9].tolist()
    prompt = prepare_data.load_tokenizer("out/tiny").decode(tokens).strip()
    assert done.stdout.startswith(prompt)
    files = {path.name for path in Path("out/tiny").iterdir()}
    assert files == {"ckpt.pt", "best.pt", "log.jsonl", "tokenizer.tiktoken", "meta.json"}
    losses = [line["loss"] for line in log_of("out/tiny") if "loss" in line]
    assert losses[0] > losses[-1] and len(losses) == 20
    done = user("sample.py", "--ckpt=out/tiny", "--prompt=import ", "--max_new_tokens=20")
    assert done.stdout.startswith("import ") and len(done.stdout) > 10
