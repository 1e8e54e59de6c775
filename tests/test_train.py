"""Training is exact, resumable, the same on any number of processes, and hard to kill.

Where processes matter they are forked from a server that has imported train.py once.

    KILLS=100 SEED=2 python -m pytest tests/test_train.py -k sigkill     more, and other kills
    COMPILE=1 python -m pytest tests/test_train.py -k resumed            --compile, too (minutes)
"""

import copy
import errno
import fcntl
import functools
import hashlib
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
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fp8
import huggingface
import prepare_data
import train
from huggingface import load_model
from model import DeepSeekV3, ModelConfig
from support import ops, processes
from support.runs import load_checkpoint
from support.settings import read_config_file, run_command
from support.tokenizer import END_OF_TEXT, load_tokenizer
from support.tokens import Dataset, Tokens, load_dataset

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "config" / "tiny.py")
SHORT = ["--steps=8", "--batch_size=4", "--block_size=16", "--eval_batch=32", "--dtype=float64"]
SHORT += ["--log_every=1", "--eval_every=4", "--save_every=4"]
# Schedules that do not depend on the length of the run.
CONSTANT = ("--warmup=0", "--decay_start=1", "--mtp_switch=1", "--gamma_stop=1")
SHOW_RESULT = train.show_result
MACHINE = processes.Machine(torch.device("cpu"), torch.float64)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_train"])  # so that no process needs time for its imports
TEXT = sysconfig.get_paths()["stdlib"] + "/a*.py"  # some 250 kB


# ---- Tools ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    out = str(tmp_path_factory.mktemp("data"))
    config = prepare_data.DataConfig(TEXT, "tiny", out, vocab_size=512, val_fraction=0.01)
    return prepare_data.prepare(config)


@pytest.fixture(autouse=True)
def workplace(data, tmp_path, monkeypatch):
    """A folder with data alone, no sample after a run, and afterwards the old signal handlers."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/tiny").symlink_to(data)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}", prepend=os.pathsep)
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def run(*options: str, out: Path | str = "run") -> Path:
    """Trains in this process; returns the run's folder."""
    train.main([TINY, f"--out={out}", *SHORT, *options])
    return Path(out)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same, once for all tests that ask for these options; they only read the folder."""
    folder = tmp_path_factory.mktemp
    return functools.cache(lambda *options: run(*options, out=folder("shared") / "run"))


def refused(*options: str) -> str:
    """The sentence with which training is refused."""
    with pytest.raises((ValueError, OSError)) as error:
        run(*options)
    return str(error.value)


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


@pytest.fixture
def start():
    """Starts train.py in `world` processes, which have .log (a path); kills what is left."""
    everything = []

    def start(*options: str, world: int = 1, out: str = "run", setup=None):
        argv = [TINY, f"--out={out}", *SHORT, *options]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        common = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(world):
            log, environment = Path(f"{out}.{rank}.log"), common | {"RANK": str(rank)}
            process = FORKS.Process(target=command, args=(argv, log, environment, setup))
            process.log = log
            log.touch()
            process.start()
            everything.append(process)
        return everything[-world:]

    yield start
    for process in everything:
        process.kill()


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
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def load(out: Path, name: str = "ckpt.pt") -> dict:
    return torch.load(Path(out) / name, weights_only=True)


def assert_same(a, b, tolerance: float = 0.0):
    """Equal, numbers within the tolerance (relative, and absolute for what is near 0)."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0):
    """All that two runs have made but their settings: the log and both checkpoints."""
    assert_same(log_of(a), log_of(b), tolerance)
    for name in ("ckpt.pt", "best.pt"):
        x, y = load(a, name), load(b, name)
        assert x.pop("train_config") and y.pop("train_config")
        assert all(x.pop(key) == y.pop(key) for key in ("model_config",))
        assert_same(x, y, tolerance)


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


def test_batch_grows_in_equal_stages():
    config = train.TrainConfig(steps=1000, batch_size=16, batch_start=4, batch_ramp=0.1)
    points = {0: 4, 24: 4, 25: 8, 49: 8, 50: 12, 75: 16, 99: 16, 100: 16, 999: 16}
    assert {step: train.batch_at(config, step) for step in points} == points
    assert train.batch_at(replace(config, batch_start=0), 0) == 16
    assert train.batch_at(replace(config, batch_start=3), 999) == 16


def test_what_changes_in_the_run_changes_at_its_very_step():
    config = train.TrainConfig(steps=10, block_size=16, long_block_size=64, long_start=0.5)
    config = replace(config, mtp_switch=0.5, gamma=0.25, gamma_stop=0.5)
    assert [train.block_at(config, step) for step in range(8)] == [16] * 5 + [64, 16, 64]
    assert [train.extended(config, step) for step in (4, 5, 6)] == [False, True, True]
    assert not train.extended(replace(config, long_block_size=0), 9)
    assert [train.mtp_weight_at(config, step) for step in (4, 5)] == [0.3, 0.1]
    assert [train.gamma_at(config, step) for step in (4, 5)] == [0.25, 0]


FILES = [*sorted((ROOT / "config").glob("[!_]*.py")), ROOT / "experiments/base.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schedules_of_our_configurations_are_in_order(file):
    values = read_config_file(str(file), ModelConfig, train.TrainConfig)
    assert train.TrainConfig(**train.split_configs(values)[1])


def test_long_windows_of_steps_that_take_turns_come_once_in_an_epoch():
    data = SimpleNamespace(train=Tokens([np.arange(1000, dtype=np.uint16)]))
    config = train.TrainConfig(batch_size=4, block_size=16, long_block_size=32, long_start=0)
    starts = [train.train_windows(data, config, step)[:, 0] for step in range(1, 15, 2)]
    first = train.epoch_starts(config.seed, 0, 1000, 32)  # 31, of which 14 steps of 64 see half
    assert np.array_equal(np.array(starts), first[:28].reshape(-1, 4)[:, 2:])


def test_every_token_comes_once_in_an_epoch():
    data = SimpleNamespace(train=Tokens([np.arange(1000, dtype=np.uint16)]))
    config = train.TrainConfig(batch_size=4, block_size=16)
    x = np.concatenate([train.train_windows(data, config, step) for step in range(31)])
    assert x.shape == (31 * 4, 17) and x.max() < 1000 and np.all(np.diff(x) == 1)
    one, two = x[:, :-1].reshape(2, -1)  # 62 windows each, so the 16th step has both
    for epoch in (one, two):
        assert np.array_equal(np.sort(epoch), epoch.min() + np.arange(62 * 16))
    assert not np.array_equal(one - one.min(), two - two.min())
    begins = {train.epoch_starts(1337, epoch, 1000, 16).min() for epoch in range(20)}
    assert len(begins) > 4 and max(begins) < 8  # the borders move, by what 62 windows leave
    assert not np.array_equal(x[:4], train.train_windows(data, replace(config, seed=1), 0))


# ---- The machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "dtype"), [(1.4, torch.float32), (1.6, torch.bfloat16)])
def test_products_run_in_what_is_measured_to_be_clearly_faster(times, dtype, monkeypatch):
    clock, threads = [0.0], torch.get_num_threads()

    def linear(x, w):
        assert torch.get_num_threads() == 1
        clock[0] += 1e-3 / (times if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(ops.F, "linear", linear)
    monkeypatch.setattr(ops.time, "perf_counter", lambda: clock[0])
    chosen, why = ops.fast_dtype.__wrapped__(torch.device("cpu"))
    assert chosen == dtype and f"bfloat16 {268.435 * times:.0f}, float32 268 GFLOP/s" in why
    assert torch.get_num_threads() == threads


def test_an_emulated_format_is_never_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.usable_device("auto").type != "mps"  # Apple's has to be named
    # Which counts emulation, too, unless it is asked not to.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **asked: not asked)
    for device in ("cuda:0", "mps"):
        assert ops.fast_dtype.__wrapped__(torch.device(device))[0] == torch.float32


def test_a_resumed_run_keeps_its_dtype_unless_asked(monkeypatch, capsys):
    short = [TINY, "--out=run", *(x for x in SHORT if "dtype" not in x)]
    dtypes = []
    monkeypatch.setattr(
        train, "backward", lambda *a, f=train.backward: dtypes.append(a[-1].dtype) or f(*a)
    )
    for fast, options, expected in (
        (torch.bfloat16, ["--steps=1"], "bfloat16 (measured)"),
        (
            torch.float32,
            ["--steps=2", "--resume"],
            "bfloat16 (as asked or as before; --dtype=auto would take float32",
        ),
        (torch.bfloat16, ["--steps=3", "--resume"], "bfloat16 (measured)"),
        (torch.float32, ["--steps=4", "--resume", "--dtype=auto"], "float32 (measured)"),
        (torch.bfloat16, ["--steps=1", "--overwrite", "--dtype=float32"], "float32 (as asked)"),
    ):
        monkeypatch.setattr(processes, "fast_dtype", lambda device, fast=fast: (fast, "measured"))
        train.main([*short, *options])
        assert f"1 x cpu in {expected}" in capsys.readouterr().err
        dtype = load("run")["train_config"]["dtype"]
        assert str(dtypes[-1]) == f"torch.{dtype}" and expected.startswith(dtype)


def each_process_measures_another():
    dtype = torch.bfloat16 if os.environ["RANK"] == "0" else torch.float32
    processes.fast_dtype = lambda device: (dtype, "measured")
    backward = train.backward

    def in_bf16(*args):
        assert args[-1].dtype == torch.bfloat16
        return backward(*args)

    train.backward = in_bf16


def test_the_first_process_chooses_the_dtype_for_all(start):
    """Both train in bfloat16, though the second one measures that float32 is fast."""
    said = finish(start("--steps=2", "--dtype=auto", world=2, setup=each_process_measures_another))
    assert "2 x cpu in bfloat16 (measured)" in said[0]


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_what_keeps_a_run_waiting_is_said_once(share, monkeypatch, capsys):
    """Other programs, where the system tells that threads wait for a core over 25 % of the time.
    And how long the run takes still: from the tenth step on."""
    monkeypatch.setattr(train, "seconds_waited", lambda: share * time.perf_counter())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    run("--steps=14", "--log_every=2")
    said = capsys.readouterr().err
    times = share > 0.25
    assert said.count("the cores are busy") == said.count("OMP_NUM_THREADS=3") == times
    times = [" left" in line for line in said.splitlines() if ": loss " in line]
    assert times == [False] * 4 + [True] * 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run("--steps=12", out="one thread")
    alone = "the core is busy: this run waits for it 30% of the time; stop other programs\n"
    said = capsys.readouterr().err
    assert (alone in said) == (share > 0.25) and "others" not in said


def test_times_that_are_left_follow_the_speed_smoothly(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 5.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock, times = train.Clock(), []
    clock.steps = 10
    for tokens in (100, 200, 300):  # 100, 50 and 50 tokens/s
        clock.measure(tokens)
        times.append(clock.time_left(5000))
    assert times == [", 0:00:50 left", ", 0:00:59 left", ", 0:01:07 left"]


def test_what_a_config_file_leaves_out_is_named(capsys):
    """And that the gate of one expert per token learns nothing from the main loss."""
    Path("my.py").write_text(Path(TINY).read_text().replace("num_attention_heads = 2\n", ""))
    small = ("--v_head_dim=4", "--qk_nope_head_dim=4", "--steps=1", "--num_experts_per_tok=1")
    train.main(["my.py", "--out=run", *SHORT, *small])
    said = capsys.readouterr().err
    line = said[said.index("keys of the network that are not set, and so as in V3: ") :]
    line = line[: line.index("model: ")]
    assert line.count(",") == 1 + 7  # eight keys
    assert "num_attention_heads, " in line and "norm_topk_prob" in line
    assert "hidden_size" not in line and all(len(x) < 100 for x in line.splitlines())
    assert "give --norm_topk_prob=False" in said
    assert "my.py: Half a minute on one core" in said  # what the file says of itself
    run("--overwrite", "--num_experts_per_tok=1", "--norm_topk_prob=False", "--steps=1")
    assert "give --norm_topk_prob=False" not in capsys.readouterr().err


def test_weights_that_a_run_starts_from_are_not_overwritten():
    run("--steps=1")
    for source in ("run", "run/ckpt.pt"):
        assert "would be overwritten" in refused("--overwrite", f"--init_from={source}")
    assert Path("run/ckpt.pt").exists()


def test_a_damaged_or_older_best_checkpoint_does_not_hinder_a_resumed_run(capsys):
    run("--steps=4")
    best = load("run", "best.pt")
    del best["trained_length"]  # an earlier version's
    torch.save(best, "run/best.pt")
    run("--resume", "--steps=5", "--eval_every=9")
    Path("run/best.pt").write_bytes(b"")
    run("--resume", "--steps=6", "--eval_every=6")
    assert "best.pt is damaged" in capsys.readouterr().err
    assert load("run", "best.pt")["step"] == 6
    Path("run/best.pt").write_bytes(b"")
    run("--resume", "--steps=6", "--eval_every=6")  # nothing is left to train
    best = load("run", "best.pt")
    assert best["step"] == 6
    # An older version's loss may be of a part of the text. Then the whole has another.
    best |= {"val_loss": 0.0, "val_tokens": 99}
    torch.save(best | {"val_loss_part": 0.0}, "run/best.pt")
    run("--resume", "--steps=7")
    assert load("run", "best.pt")["step"] == 6
    torch.save(best, "run/best.pt")
    run("--resume", "--steps=8")
    assert load("run", "best.pt")["step"] == 8


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(part, shared):
    shutil.copytree(shared("--steps=1"), "run")
    content = bytearray(Path("run/ckpt.pt").read_bytes())
    content[content.index(f"/{part}".encode()) + 300] ^= 4
    Path("run/ckpt.pt").write_bytes(content)
    assert re.match("run/ckpt.pt is damaged", refused("--resume"))


def test_the_same_data_by_another_name_are_compared():
    run("--steps=4")
    state = torch.load("run/best.pt", weights_only=True)
    torch.save(state | {"val_loss": 0.0}, "run/best.pt")
    run("--resume", "--steps=8", "--data=data/tiny")
    assert load("run", "best.pt")["val_loss"] == 0.0


def test_a_run_whose_sample_fails_has_ended_well(monkeypatch, capsys):
    """With FSDP the whole model may not fit on one device."""
    run("--steps=4")
    fail = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(train.sample, "main", fail)
    SHOW_RESULT(train.TrainConfig(out="run", block_size=16), "def")
    assert "no sample: CUDA out of memory" in capsys.readouterr().err


def test_a_lock_on_a_file_that_its_last_writer_has_removed_is_none(monkeypatch):
    Path("run").mkdir()
    path, flock, removed = Path("run/.lock"), fcntl.flock, []

    def late(file, how):
        flock(file, how)
        if not removed:  # between opening and locking
            removed.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", late)
    with train.lock(path) as file:
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())


def test_compiling_in_float32_is_refused_on_a_cpu(shared, capsys):
    """But not where nothing is compiled, as in the evaluation of a run that was, on a GPU."""
    assert "give --compile=False" in refused("--compile", "--dtype=float32")
    out = shared("--steps=4", "--dtype=float32")
    train.main(["--eval_only", f"--out={out}", "--compile"])
    assert json.loads(capsys.readouterr().out)["val_loss"] > 0


# ---- One step, exactly ---------------------------------------------------------------------------


def test_steps_equal_a_plain_training_loop(data):
    """Loss weights and their switch, clipping, AdamW, decay groups, schedule, bias update."""
    options = dict(
        steps=4, lr=0.02, warmup=0.3, decay_start=0.5, decay_end=0.9, min_lr=0.1, clip=0.5,
        weight_decay=0.3, beta1=0.8, beta2=0.9, mtp_weight=0.4, mtp_weight_late=0.2,
        mtp_switch=0.5, gamma=0.05, gamma_stop=0.75, alpha=0.3,
    )  # fmt: skip
    out = run("--attention_bias", *(f"--{key}={value}" for key, value in options.items()))
    config = train.TrainConfig(**options, batch_size=4, block_size=16)
    dataset, lines = load_dataset(data), [x for x in log_of(out) if "loss" in x]
    torch.manual_seed(config.seed)
    model = DeepSeekV3(ModelConfig(**load(out)["model_config"])).double()
    groups = []
    for name, p in model.named_parameters():
        decayed = not ("norm" in name or name.endswith("bias"))
        groups.append({"params": [p], "weight_decay": 0.3 if decayed else 0.0})
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    norms = []
    for t in range(4):
        x = torch.from_numpy(train.train_windows(dataset, config, t))
        main, mtp, balance = model(x[:, :-1], x[:, 1:])
        moe_layers = 3  # two in the main model, one in the MTP module
        loss = main + (0.4 if t < 2 else 0.2) * mtp + 0.3 * moe_layers * balance
        adamw.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        for group in adamw.param_groups:
            group["lr"] = train.lr_at(config, t)
        adamw.step()
        loads = [torch.bincount(chosen.flatten(), minlength=8).float() for chosen in model.routing]
        vio = sum((x.max() / x.mean() - 1).item() for x in loads) / 3
        for gate, load_ in zip(model.gates(), loads, strict=True):
            if t < 3:
                gate.e_score_correction_bias += 0.05 * (load_.mean() - load_).sign()
        expected = dict(
            step=t + 1, tokens=(t + 1) * 64, loss=main.item(), mtp_loss=mtp.item(), max_vio=vio,
            balance_loss=balance.item(), lr=train.lr_at(config, t), grad_norm=norms[-1],
        )  # fmt: skip
        assert lines[t] == pytest.approx(expected, rel=1e-6)
    assert_same(load(out)["model"], dict(model.state_dict()), 1e-10)
    assert max(norms) > 0.5, "no step was clipped"


def test_muon_takes_the_matrices_one_by_one_and_adamw_the_rest(shared):
    """In bfloat16, as torch.optim.Muon does."""
    model = load_model(shared("--n_routed_experts=64", "--optimizer=adamw"))[0].float()
    settings = dict(optimizer="muon", lr=0.01, adamw_lr=2.0, weight_decay=0.3, dtype="bfloat16")
    config = train.TrainConfig(**settings)
    optimizers, pairs = train.make_optimizers(model, config), []
    for name, p in model.named_parameters():
        matrices = [torch.nn.Parameter(x.clone()) for x in (p if p.ndim == 3 else [p])]
        if p.ndim == 1 or re.search(r"embed_tokens|lm_head|gate\.weight", name):
            decay = 0.3 if p.ndim > 1 else 0.0
            reference = torch.optim.AdamW(matrices, 0.02, (0.9, 0.95), weight_decay=decay)
        else:
            reference = torch.optim.Muon(matrices, 0.01, 0.3, adjust_lr_fn="match_rms_adamw")
        pairs.append((p, matrices, reference))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"]
    for _ in range(2):
        for p, matrices, reference in pairs:
            p.grad = torch.randn_like(p)
            for matrix, grad in zip(matrices, p.grad if p.ndim == 3 else [p.grad], strict=True):
                matrix.grad = grad.clone()
            reference.step()
        for optimizer in optimizers:
            optimizer.step()
    for p, matrices, _ in pairs:
        torch.testing.assert_close(p, torch.stack(matrices).view_as(p), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", ["grad_accum=4", "recompute", "deterministic", "compile"])
def test_how_a_step_is_computed_changes_nothing(how, shared):
    options = ["--dtype=bfloat16"] if how == "compile" else []
    torch._dynamo.utils.counters.clear()  # 3 graphs: dense, MoE, MTP; none for evaluation
    compile = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    with mock.patch.object(torch.nn.Module, "compile", compile):
        ours = run(f"--{how}", *options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 * (how == "compile")
    assert_same_run(shared(*options), ours, 1e-10 if how in ("grad_accum=4", "recompute") else 0.0)
    assert not torch.are_deterministic_algorithms_enabled()  # in training only


# ---- Resume --------------------------------------------------------------------------------------

CASES = {
    "bfloat16": ["--dtype=bfloat16"],
    "ramp, accumulation, tied": ["--dtype=float32", "--batch_start=2", "--batch_ramp=0.7"],
    "muon": ["--dtype=float32", "--optimizer=muon"],
    "long": ["--dtype=float32", "--long_block_size=32", "--long_start=0.5", "--log_every=3"],
}
CASES["ramp, accumulation, tied"] += ["--grad_accum=2", "--tie_word_embeddings", "--log_every=3"]
if os.environ.get("COMPILE"):
    CASES["compile"] = ["--dtype=bfloat16", "--compile", "--batch_start=2", "--batch_ramp=0.7"]
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # per block, mode and batch size


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(options, shared, capsys):
    def stop(data, config, step):
        if step == 4:  # the fifth, between two lines of the log where these come every third step
            os.kill(os.getpid(), signal.SIGTERM)
        return mock.DEFAULT

    train_windows = mock.Mock(wraps=train.train_windows, side_effect=stop)
    with mock.patch.object(train, "train_windows", train_windows), pytest.raises(KeyboardInterrupt):
        run(*options)
    said = capsys.readouterr().err
    assert "stopped at step 5" in said and "--resume" in said
    assert load("run")["step"] == 5
    with open("run/log.jsonl", "a") as file:  # what came after the checkpoint, and half a line
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    run(*options, "--resume")
    assert_same_run(shared(*options), Path("run"))


def test_a_resumed_run_keeps_its_settings_and_tells_what_differs(capsys):
    """What the command line does not name stays, whatever the config file says by now."""
    run(*CONSTANT, "--steps=2", "--lr=0.01", "--weight_decay=0")
    before = load("run")["model"]["lm_head.weight"]
    changed = "mtp_weight = 0.5\nrope_theta = 9.0\nrope_scaling = dict(factor=2.0)\n"
    Path("my.py").write_text(Path(TINY).read_text() + changed)
    options = ("--weight_decay=2", "--clip=1e-9", "--beta1=0", "--beta2=0", "--lr=0.5")
    train.main(["my.py", "--out=run", "--resume", "--steps=3", *options])
    said = capsys.readouterr().err
    kept = [x for x in said.splitlines() if " stays " in x]  # of those given here none
    assert not {"steps", "lr", "rope_scaling"} & {x.split()[0] for x in kept}
    assert "rope_theta stays 10000.0 (the config file has 9.0)" in kept
    assert "mtp_weight stays 0.3 (the config file has 0.5)" in kept
    assert "steps is now 3 (was 2)" in said and "lr is now 0.5 (was 0.01)" in said
    state = load("run")
    settings, after = state["train_config"], state["model"]["lm_head.weight"]
    assert log_of("run")[-2]["lr"] == 0.5 and after.dtype == torch.float64
    assert (state["step"], settings["batch_size"], settings["mtp_weight"]) == (3, 4, 0.3)
    # lr * weight_decay = 1 wipes the weight out, and the clipped gradient is far below Adam's eps
    assert after.abs().max() < 1e-2 < before.abs().max()
    state["train_config"] = {"steps": 5}  # an older version's: what it lacks was the default
    settings, _ = train.settle({"adamw_lr": 2.0, "out": "here"}, state, {})
    assert (settings.steps, settings.adamw_lr, settings.out) == (5, 1.0, "here")


def test_a_finished_run_can_go_on_for_longer(shared, capsys):
    run(*CONSTANT, "--steps=4")
    before = Path("run/ckpt.pt").stat().st_mtime_ns
    run(*CONSTANT, "--steps=3", "--resume")
    assert Path("run/ckpt.pt").stat().st_mtime_ns == before
    run(*CONSTANT, "--resume")
    assert_same_run(shared(*CONSTANT), Path("run"))
    shutil.copytree(shared(), "decayed")
    train.main(["--out=decayed", "--resume", "--steps=16"])
    assert "steps is now 16 (was 8)" in capsys.readouterr().err


def test_another_network_optimiser_or_tokenizer_is_refused_on_resume(shared):
    out = Path(shutil.copytree(shared("--steps=1"), "run"))
    before = (out / "ckpt.pt").read_bytes()
    assert "hidden_size is 64 here, but 48 in run" in refused("--resume", "--hidden_size=64")
    assert "no state of muon in run" in refused("--resume", "--optimizer=muon")
    prepare_data.prepare(prepare_data.DataConfig(TEXT, "other", vocab_size=512, val_fraction=0.4))
    for options in (["--resume"], ["--out=new", "--init_from=run"]):
        sentence = refused("--data=other", *options)
        assert "another tokenizer" in sentence and "--tokenizer=run" in sentence
    assert (out / "ckpt.pt").read_bytes() == before
    shutil.copyfile(out / "best.pt", out / "ckpt.pt")
    assert "no state of adamw in run" in refused("--resume")


def other_tokenizer(data: Path, changed: str):
    """data/other: the same texts with a tokenizer that gives train.py's docstring the same ids."""
    shutil.copytree(data, "data/other")
    ranks, meta = Path("data/other/tokenizer.tiktoken"), Path("data/other/meta.json")
    values = json.loads(meta.read_text())
    if changed == "token":  # the last one, which no other is made of
        *lines, _ = ranks.read_bytes().splitlines(keepends=True)
        ranks.write_bytes(b"".join(lines) + b"//79 %d\n" % len(lines))
        values["tokenizer_sha256"] = hashlib.sha256(ranks.read_bytes()).hexdigest()
    elif changed == "pattern":
        values["pattern"] = "qzqz|" + values["pattern"]
    else:
        values["special_tokens"] = {"<|end|>": 511}
    meta.write_text(json.dumps(values))
    ids = [load_tokenizer(x).encode_ordinary(train.__doc__) for x in (data, ranks.parent)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("changed", ["token", "pattern", "special token"])
def test_a_tokenizer_that_differs_where_no_text_shows_it_is_refused(changed, data, shared):
    shutil.copytree(shared("--steps=1"), "run")
    other_tokenizer(data, changed)
    for options in (
        ["--resume"],
        ["--eval_only"],
        ["--out=new", "--init_from=run"],
        ["--out=new", "--init_from=run/ckpt.pt"],
        ["--out=new", "--init_from=run", "--eval_only"],
    ):
        sentence = refused("--data=other", *options)
        assert "another tokenizer than data/other" in sentence
        assert sentence.endswith("with --tokenizer=run.")


def test_the_tokenizer_of_a_hugging_face_directory_is_tried_on_a_text(shared):
    huggingface.main([str(shared("--steps=1")), "released"])
    Path("released/meta.json").unlink()  # as in directories of others
    options = ("--steps=1", "--init_from=released")
    run(*options, out="new")
    prepare_data.prepare(prepare_data.DataConfig(TEXT, "other", vocab_size=512, val_fraction=0.4))
    assert "another tokenizer" in refused(*options, "--data=other", "--out=other")


def test_a_log_is_cut_by_its_steps_and_loses_damaged_lines(capsys):
    """Two processes may have written to it, and a disk may have been full."""
    run("--steps=4")
    log = Path("run/log.jsonl")
    good = log.read_bytes().splitlines(keepends=True)
    late, damaged = (
        b'{"step": 5, "val_loss": 1}\n',
        [b"}{\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\n"],
    )
    log.write_bytes(
        b"".join([late, *damaged[:2], *good[:3], late, *good, *damaged[2:], late]) + b'{"'
    )
    before = log.read_bytes()
    with mock.patch.object(os, "replace", side_effect=OSError("no space")):
        assert "cannot write run/log.jsonl (no space)" in refused("--resume", "--steps=4")
    assert log.read_bytes() == before
    run("--resume", "--steps=4")
    assert log.read_bytes() == b"".join(good[:3] + good)
    assert "run/log.jsonl: left out 4 damaged" in capsys.readouterr().err
    log.write_bytes(b"".join(good[:-1]))  # its evaluation is lost: it is made again
    run("--resume", "--steps=4")
    assert log.read_bytes() == b"".join(good)


def test_weights_of_a_hugging_face_directory_start_a_run(shared, capsys):
    out = shared("--steps=4", "--dtype=float32")
    huggingface.save_pretrained(load_model(out)[0], "released")
    options = (*SHORT, "--dtype=float32", "--eval_only", "--grad_accum=3")  # no use for that
    for source in (f"--out={out}", "--init_from=released"):
        train.main([TINY, *options, source])
    ours, theirs = map(json.loads, capsys.readouterr().out.splitlines())
    assert_same(ours, theirs, 1e-6)
    assert "exceed" in refused("--eval_only", "--init_from=released", "--block_size=257")
    assert not Path("out").exists()
    assert ours.items() <= log_of(out)[-1].items()  # the evaluation at the end of the run


# ---- Long context (section 4.3) ------------------------------------------------------------------


def test_the_last_part_of_a_run_extends_the_context(shared, data):
    out, dataset = shared(*CASES["long"]), load_dataset(data)
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


def test_another_run_may_stretch_the_context_further(shared):
    first = shared(*CASES["long"])
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}
    options = ("--dtype=float32", "--steps=1", "--lr=0", "--block_size=64")
    run(*options, f"--init_from={first}", f"--rope_scaling={yarn}", "--max_position_embeddings=64")
    second = load("run")
    assert second["model_config"]["rope_scaling"] == yarn and second["trained_length"] == 64
    assert_same(load(first)["model"]["norm.weight"], second["model"]["norm.weight"])
    assert second["step"] == 1 and log_of("run")[1]["tokens"] == 4 * 64
    sentence = refused("--init_from=run", *CASES["long"], "--out=shrunk")
    assert "less than the 64 trained before" in sentence
    run("--resume", "--steps=2", "--max_position_embeddings=128")
    assert load("run")["model_config"]["max_position_embeddings"] == 128
    model = load_model("run")[0]  # the factor counts from where the weights began
    train.extend_context(model, train.TrainConfig(block_size=32, long_block_size=256))
    assert model.config.rope_scaling == yarn | {"factor": 16}
    model.config.rope_scaling, model.trained_length = None, 32  # or from the length trained so far
    train.extend_context(model, train.TrainConfig(block_size=16, long_block_size=128))
    assert model.config.rope_scaling["factor"] == 4


def test_a_line_has_the_means_since_the_last_one(shared):
    steps = [line for line in log_of(shared()) if "loss" in line]
    lines = [line for line in log_of(shared("--log_every=5")) if "loss" in line]
    assert [line["step"] for line in lines] == [5, 8]
    for line, since in zip(lines, (steps[:5], steps[5:]), strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "max_vio"):
            assert line[key] == pytest.approx(sum(x[key] for x in since) / len(since), rel=1e-12)
        assert (line["lr"], line["grad_norm"]) == (since[-1]["lr"], since[-1]["grad_norm"])


# ---- Evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def trained(shared, data) -> tuple[DeepSeekV3, Dataset, train.TrainConfig]:
    model, dataset = load_model(shared())[0], load_dataset(data)
    dataset.val = Tokens([dataset.val.arrays[0][:1000]])  # its last window is ragged
    return model, dataset, train.TrainConfig(block_size=16, eval_batch=32)


def test_evaluation_predicts_every_token_once_whatever_its_batch(trained, data):
    model, dataset, config = trained
    evaluate = functools.partial(train.evaluate, model, dataset, machine=MACHINE)
    result, *others = (evaluate(config=replace(config, eval_batch=n)) for n in (32, 1, 7))
    for other in others:
        assert_same(result, other, 1e-12)
    tokens = torch.from_numpy(dataset.val.arrays[0].astype(np.int64))
    nats, mtp, nodes, counts = [], [], [], torch.zeros(3, 8)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start : start + 17]
            logits, (ahead, *_) = model(piece[None, :-1], return_mtp=True)
            nats += F.cross_entropy(logits[0], piece[1:], reduction="none").tolist()
            mtp += F.cross_entropy(ahead[0], piece[2:], reduction="none").tolist()
            for layer, chosen in enumerate(model.routing):
                counts[layer] += torch.bincount(chosen.flatten(), minlength=8)
                nodes += [len({e // 2 for e in experts}) for experts in chosen[0].tolist()]
    shares = counts / counts.sum(1, keepdim=True)
    assert_same(torch.tensor(result.pop("expert_load")), shares, 1e-5)
    assert result.pop("val_mtp_losses") == [result["val_mtp_loss"]]
    tokens_of_file = (data / "val.bin").stat().st_size // 2 - 512
    whole = load_tokenizer(data).decode(np.fromfile(data / "val.bin", "<u2")[512:])
    bytes_of_file = len(whole.replace(END_OF_TEXT, "").encode())
    assert result == pytest.approx({
        "val_loss": np.mean(nats),
        "val_bpb": np.mean(nats) / math.log(2) * tokens_of_file / bytes_of_file,
        "val_mtp_loss": np.mean(mtp),
        "max_vio_global": (counts.amax(1) / counts.mean(1) - 1).mean().item(),
        "nodes_per_token": np.mean(nodes),
        "experts_per_node": 2 / np.mean(nodes),
    })  # fmt: skip


def test_evaluation_in_fp8_quantises_each_weight_once_and_leaves_no_trace(trained):
    model, dataset, config = trained
    fp8.use_fp8(model.float())
    model.train()
    model(torch.arange(16)[None], torch.arange(16)[None])  # counts that wait for the bias update
    assert model.expert_counts.sum()
    before = copy.deepcopy(model.state_dict()), model.expert_counts.clone()
    with mock.patch.object(fp8, "quantize", wraps=fp8.quantize) as quantize:
        train.evaluate(model, dataset, replace(config, eval_batch=4), MACHINE)  # many batches
    calls = [call.args for call in quantize.call_args_list]
    weights = [x.data_ptr() for x, block in calls if block == fp8.BLOCK]
    assert len(weights) == len({*weights}) > 0
    alone = train.evaluate(model, dataset, replace(config, block_size=1, eval_batch=512), MACHINE)
    assert alone["val_mtp_losses"] == [0]  # one token has no second next
    assert_same(before, (model.state_dict(), model.expert_counts))
    assert all(p.grad is None for p in model.parameters())


def give_losses(monkeypatch, *losses: float):
    """What the next evaluations find."""
    others = dict(val_mtp_loss=9.0, max_vio_global=0.0)
    results = [dict(val_loss=loss, val_bpb=loss / 2, **others) for loss in losses]
    monkeypatch.setattr(train, "evaluate", mock.Mock(side_effect=results))


def test_best_checkpoint_has_the_lowest_loss_and_may_be_newer_than_the_other(monkeypatch):
    give_losses(monkeypatch, 3.0, 2.0, 2.5)
    with pytest.raises(StopIteration):  # dies at the fourth evaluation
        run("--eval_every=1", "--save_every=8")
    assert load("run")["step"] == 4 and load("run", "best.pt")["step"] == 2
    give_losses(monkeypatch, 2.0, 2.1, math.nan)
    best = load(run("--eval_every=2", "--resume"), "best.pt")
    assert (best["step"], best["val_loss"], best["val_bpb"]) == (2, 2.0, 1.0)
    losses = [x["val_loss"] for x in log_of("run") if "val_loss" in x]
    assert losses == [3.0, 2.0, 2.5, 2.0, 2.1, None]
    give_losses(monkeypatch, 9.0)  # in other windows: not to be compared
    assert load(run("--resume", "--steps=9", "--block_size=8"), "best.pt")["val_loss"] == 9.0


@pytest.mark.parametrize("name", ["other", "again"])
def test_losses_on_another_text_are_not_compared(monkeypatch, data, name):
    """Of another name, or made anew with the same. A run that has ended is not evaluated again."""
    shutil.copytree(data, "data/again")
    give_losses(monkeypatch, 2.0, 3.0, 9.0)
    run("--data=again")
    run("--resume", "--data=again")
    assert load("run", "best.pt")["val_loss"] == 2.0 != 9.0
    asked = prepare_data.DataConfig(TEXT, name, tokenizer=str(data), val_fraction=0.4)
    prepare_data.prepare(replace(asked, overwrite=True))
    best = load(run("--resume", "--steps=9", f"--data={name}"), "best.pt")
    assert (best["step"], best["val_loss"]) == (9, 9.0)


def test_the_best_checkpoint_is_one_of_the_last_phase(monkeypatch):
    give_losses(monkeypatch, 1.0, 2.0, 3.0)  # a resumed run keeps the evaluation it has
    run(*CASES["long"])
    run("--resume", "--steps=12")
    assert load("run", "best.pt")["step"] == 8


def test_weights_that_a_run_starts_from_are_named_and_evaluated(shared, capsys):
    """And a learning rate is named that may make it forget them."""
    out = shared("--steps=4", "--dtype=float32")
    capsys.readouterr()
    (before,) = (x for x in log_of(out) if "val_loss" in x)
    options = ("--steps=2", "--dtype=float32", "--eval_every=9")
    run(*options, f"--init_from={out}", "--lr=4e-3", out="low")
    said = capsys.readouterr().err
    assert f"start: from {out}/best.pt, step 4, 0.14M parameters" in said and "forget" not in said
    first, *_ = log_of("low")
    assert (first["step"], first["tokens"]) == (0, 0)
    assert first["val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)
    assert said.index("step 0/2: val_loss") < said.index("step 1/2: loss")
    assert load("low", "best.pt")["step"] == 2
    run("--resume", "--steps=3", out="low")  # the line stays, the evaluation is not repeated
    said = capsys.readouterr().err
    assert log_of("low")[0] == first and "step 0/3" not in said
    assert "resume: from step 2 of 3, in low/ckpt.pt" in said
    run(*options, f"--init_from={out}/ckpt.pt", out="high")
    said = capsys.readouterr().err
    assert "start: from" in said and "try a tenth, --lr=0.0005" in said
    assert "lr is 0.005, and" in said


def test_a_run_is_resumed_though_its_config_file_names_weights_to_start_from(shared, capsys):
    """Then nothing is said of a start, nor of a learning rate that may spoil what was learnt."""
    Path("my.py").write_text(f"{Path(TINY).read_text()}init_from = {str(shared('--steps=1'))!r}\n")
    for options in (["--steps=1"], ["--steps=2", "--resume"]):
        train.main(["my.py", "--out=run", *SHORT, *options])
    first, resumed = capsys.readouterr().err.split("resume: from step 1")
    assert first.count("start: from") == 1 and "try a tenth" in first and "start:" not in resumed
    assert "step 0/" in first and "step 0/" not in resumed


def test_evaluating_a_run_whose_config_file_names_weights_to_start_from(shared, capsys):
    """It is the run that is evaluated, once there is one; until then it is those weights."""
    Path("my.py").write_text(
        f"{Path(TINY).read_text()}init_from = {str(shared('--steps=1'))!r}\nout = ''\n"
    )

    def evaluated(*options):
        train.main(["my.py", *SHORT, "--eval_only", *options])
        return json.loads(capsys.readouterr().out)["val_loss"]

    before = evaluated()
    train.main(["my.py", *SHORT, "--steps=2"])  # into out/my, the default
    assert evaluated() == log_of("out/my")[-1]["val_loss"] < before
    assert evaluated(f"--init_from={shared('--steps=1')}") == before


def test_options_that_do_nothing_are_named(capsys):
    run("--steps=1", "--adamw_lr=2", "--long_start=0.5", "--batch_ramp=0.5", "--parallel=fsdp")
    said = capsys.readouterr().err
    assert re.findall(r"--(\w+) has no effect here: it needs (\S+)", said) == [
        ("adamw_lr", "--optimizer=muon"), ("long_start", "--long_block_size"),
        ("batch_ramp", "--batch_start"), ("parallel", "torchrun,"),
    ]  # fmt: skip
    run("--overwrite", "--steps=1", "--adamw_lr=2", "--optimizer=muon")
    assert "has no effect" not in capsys.readouterr().err


def test_which_evaluation_replaces_the_best_checkpoint(monkeypatch):
    """Not an equal one; once YaRN is on the first that is a number, then lower ones."""
    write, saved = train.write_atomically, []

    def watched(path, *rest):
        write(path, *rest)
        if path.suffix == ".pt":
            saved.append((path.stem, load(path.parent, path.name)["step"]))

    monkeypatch.setattr(train, "write_atomically", watched)
    give_losses(monkeypatch, 2.0, 2.0, 1.0, math.nan, 5.0, 6.0, 5.0, 4.0)
    options = ("--steps=16", "--eval_every=2", "--save_every=3")
    run(*options, "--long_block_size=32", "--long_start=0.375")
    assert [step for name, step in saved if name == "best"] == [2, 6, 10, 16]
    steps = [step for name, step in saved if name == "ckpt"]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]


def test_what_is_trained_for_long_windows_stays_so_in_short_ones(shared):
    options = ("--dtype=float32", "--steps=1", f"--init_from={shared(*CASES['long'])}")
    assert load(run(*options))["trained_length"] == 32
    assert load(run(*options, "--block_size=64", "--overwrite"))["trained_length"] == 64


def test_a_run_that_dies_in_an_evaluation_makes_up_for_it(shared):
    def die(windows, device):
        if to_device.call_count == 7:  # after four steps and two of many batches
            raise KeyboardInterrupt
        return mock.DEFAULT

    patch = mock.patch.object(train, "to_device", wraps=train.to_device, side_effect=die)
    with patch as to_device, pytest.raises(KeyboardInterrupt):
        run("--eval_batch=8")
    assert [len(call.args[0]) for call in to_device.call_args_list] == [4] * 4 + [8] * 3
    assert load("run")["step"] == 4 and "val_loss" not in log_of("run")[-1]
    run("--eval_batch=8", "--resume")
    assert_same_run(shared("--eval_batch=8"), Path("run"))
    run("--eval_batch=8", "--resume")  # the last evaluation comes after the last checkpoint too
    assert_same_run(shared("--eval_batch=8"), Path("run"))


def test_evaluation_that_was_left_out_is_made_first(shared):
    """To the same digits, where it is due before all else that a resumed run does."""
    options = ("--eval_every=2", "--eval_batch=3")
    out = Path(shutil.copytree(shared(*options), "run"))
    log = out / "log.jsonl"
    before = log.read_bytes()
    log.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
    run(*options, "--resume")
    assert log.read_bytes() == before


# ---- Several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parallel, accumulate, optimizer",
    [("ddp", 2, "adamw"), ("fsdp", 2, "adamw"), ("ddp", 1, "muon")],
)
def test_two_processes_equal_one(parallel, accumulate, optimizer, start, shared):
    """All that is logged and saved, with MTP, and experts that a batch leaves without tokens."""
    options = ("--n_routed_experts=64", f"--optimizer={optimizer}")
    parts = (f"--parallel={parallel}", f"--grad_accum={accumulate}")
    finish(start(*options, *parts, world=2, out="together"))
    assert_same_run(shared(*options), Path("together"), 1e-9)


def test_a_run_moves_between_one_process_ddp_and_fsdp(start, shared):
    run(*CONSTANT, "--steps=2", out="moved")
    for parallel, steps in (("ddp", 4), ("fsdp", 6)):
        options = (f"--parallel={parallel}", f"--steps={steps}", "--resume")
        finish(start(*CONSTANT, *options, world=2, out="moved"))
    run("--resume", "--steps=8", out="moved")
    moved, straight = load("moved"), load(shared(*CONSTANT))
    for key in ("model", "optimizer", "step", "tokens"):
        assert_same(moved[key], straight[key], 1e-9)


def make_release(run: Path):
    """release/: the network of a run with a tokenizer as Moonlight's, data/mine: a text for it."""
    huggingface.main([str(run), "release"])
    release = Path("release")
    (release / "tokenizer.tiktoken").rename(release / "tiktoken.model")  # they look alike
    for name in "meta.json", "tokenizer.json":
        (release / name).unlink()
    end = {"511": {"content": "[EOS]"}}
    told = {"added_tokens_decoder": end, "eos_token": "[EOS]"}
    (release / "tokenizer_config.json").write_text(json.dumps(told))
    prepare_data.prepare(prepare_data.DataConfig(TEXT, "mine", tokenizer="release"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_release_is_trained_on_by_two_processes_as_by_one(parallel, start, shared):
    make_release(shared("--steps=1"))
    options = ("--init_from=release", "--data=mine", "--steps=4")
    finish(start(*options, f"--parallel={parallel}", world=2, out="together"))
    run(*options, out="alone")
    assert_same_run(Path("alone"), Path("together"), 1e-9)
    copies = {"tiktoken.model", "tokenizer_config.json", "meta.json"}
    files = {path.name for path in Path("together").iterdir()}
    assert files == {"ckpt.pt", "best.pt", "log.jsonl", ".lock"} | copies
    assert load_model("together")[1].eos == [511]


def on_another_disk():
    if os.environ["RANK"] == "1":
        os.chdir("node")


def on_another_disk_and_without_text():
    on_another_disk()
    prepare_data.prepare = mock.Mock(side_effect=ValueError("no text here"))


@pytest.fixture
def node(data) -> Path:
    """The disk of process 1, with data, and an old checkpoint that it has no use for."""
    run("--steps=1", out="node/run")
    Path("node/run/log.jsonl").unlink()
    Path("node/data").mkdir()
    Path("node/data/tiny").symlink_to(data)
    return Path("node")


@pytest.mark.parametrize("options", [["--optimizer=muon"], ["--parallel=fsdp"]])
def test_only_the_first_process_needs_the_folder_of_the_run(options, node, start, capsys):
    """Resumed (where an evaluation is due before all else), evaluated, and taken for a new run."""
    old = {path.name: path.read_bytes() for path in (node / "run").iterdir()}
    run(*CONSTANT, options[0].replace("--parallel=fsdp", "--clip=1"), "--steps=4")
    straight = shutil.copytree("run", "straight")
    lines = Path("run/log.jsonl").read_bytes().splitlines(keepends=True)
    Path("run/log.jsonl").write_bytes(b"".join(lines[:-1]))
    several = dict(world=2, setup=on_another_disk)
    finish(start("--resume", *options, "--steps=6", **several))
    run("--resume", "--steps=6", out="straight")
    assert_same_run(straight, Path("run"), 1e-9)
    capsys.readouterr()
    train.main([TINY, *SHORT, "--out=run", "--eval_only"])
    said, nothing = finish(start("--eval_only", **several))
    result = json.loads(said.splitlines()[-1])
    assert_same(result, json.loads(capsys.readouterr().out), 1e-9)
    assert "{" not in nothing
    new = ("--init_from=run", "--steps=2", *options)
    finish(start(*new, out="new", **several))
    run(*new[:2], options[0].replace("--parallel=fsdp", "--clip=1"), out="alone")
    assert_same_run(Path("new"), Path("alone"), 1e-9)
    assert {path.name: path.read_bytes() for path in (node / "run").iterdir()} == old
    assert not (node / "new").exists()


def test_what_one_process_refuses_ends_all_with_a_sentence(node, start, data):
    several = dict(world=2, setup=on_another_disk)

    def refusal(*options: str, codes=(1, 1)) -> str:
        """The sentence, which process 0 alone says."""
        said, other = finish(start(*options, **several), [*codes])
        assert other == "" and "Traceback" not in said
        return said.splitlines()[-1]

    assert "error: steps is 0" in refusal("--steps=0")
    assert "did you mean steps?" in refusal("--stepps=9", codes=(2, 2))
    assert "error: block_size is 7" in refusal("--block_size=7")
    Path("run").mkdir()
    Path("run/log.jsonl").touch()
    assert "error: run holds a run: give --overwrite, or" in refusal()  # no ckpt.pt to resume
    assert "no ckpt.pt to go on from: give --overwrite instead." in refusal("--resume")
    Path("run/best.pt").mkdir()  # cannot be replaced
    assert "run/best.pt" in refusal("--overwrite")
    (node / "data/tiny").unlink()
    missing = refusal("--overwrite")
    assert "error: process 1: no data in data/tiny; make it with" in missing
    other = prepare_data.DataConfig(
        TEXT, "tiny", str(node / "data"), tokenizer=str(data), val_fraction=0.4
    )
    prepare_data.prepare(other)
    different = refusal("--overwrite")
    assert "error: process 1: data/tiny differs from that of process 0" in different
    Path("data/tiny").unlink()  # which process 0 makes
    several["setup"] = on_another_disk_and_without_text
    assert "error: no text here" in refusal("--overwrite")


def expect_no_whole_weight_kept():
    """Weights are cut up, and of a forward pass autograd keeps none of a block's in bf16."""
    backward = train.backward

    def watched(model, *rest):
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.ndim > 1)
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


@pytest.mark.parametrize(("parallel", "raises"), [("fsdp", False), ("ddp", True)])
def test_a_rank_that_dies_or_raises_ends_the_others_promptly(parallel, raises, start):
    setup = raise_at_third_step if raises else None
    options = ("--steps=5000", "--save_every=2", f"--parallel={parallel}")
    ranks = start(*options, world=2, setup=setup)
    if raises:
        wait_for(lambda: "had enough" in ranks[1].log.read_text())
    else:
        wait_for(lambda: "step 3/" in ranks[0].log.read_text())
        ranks[1].kill()
    said, culprit = finish(ranks, [1, 1 if raises else -signal.SIGKILL], seconds=20)
    assert "Traceback" in said  # that of torch, of a lost connection; torchrun names the culprit
    assert culprit.strip() == ("error: this rank has had enough" if raises else "")
    load_checkpoint("run/ckpt.pt")


def tell_threads():
    """Lists the threads that are left when the processes have parted."""
    destroy = processes.dist.destroy_process_group

    def watched():
        destroy()
        names = (file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))
        print("left:", *sorted(names), flush=True)

    processes.dist.destroy_process_group = watched


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_no_thread_of_gloo_outlives_the_training(start):
    """It could abort its process while Python ends, and torchrun would end the others."""
    for said in finish(start(world=2, setup=tell_threads)):
        assert "left: python" in said and "gloo" not in said.split("left:")[1]


def test_torchrun_trains_and_is_interrupted_and_resumed(shared):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*torchrun, str(ROOT / "train.py"), TINY, "--out=run", *SHORT, "--steps=12"]
    with open("said", "wb") as file:
        process = subprocess.Popen(argv, stderr=file)
    try:
        wait_for(lambda: "step 3/" in Path("said").read_text())
        process.send_signal(signal.SIGINT)  # the others have sessions of their own
        process.wait(60)
    finally:
        process.terminate()  # which it passes on
    assert "stopped at step" in Path("said").read_text(), Path("said").read_text()
    subprocess.run([*argv, "--resume"], check=True)
    assert_same_run(shared("--steps=12"), Path("run"), 1e-9)


# ---- Unkillable ----------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_at_the_same_step(start):
    """The last one gets it, twice as of torchrun."""
    ranks = start("--steps=5000", world=2)
    wait_for(lambda: "step 3/" in ranks[0].log.read_text())
    for _ in range(2):
        os.kill(ranks[-1].pid, signal.SIGINT)
        time.sleep(0.01)
    said, other = finish(ranks, [130, 130])
    step = re.search(r"stopped at step (\d+); go on from step \1, in \S+ckpt.pt,", said)[1]
    assert load("run")["step"] == int(step) and "Traceback" not in said and "stopped" not in other


def test_sigkill_at_any_moment_loses_nothing(start, shared):
    """Every second kill strikes while a file is being written, the others anywhere."""
    kills, chance = int(os.environ.get("KILLS", "10")), random.Random(os.environ.get("SEED", "1"))
    options = (f"--steps={3 * kills}", "--save_every=1", "--eval_every=3", "--dtype=float32")
    out, killed, torn = Path("run"), 0, 0

    def until(writing: bool, process):
        wait_for(lambda: not process.is_alive() or any(out.glob("*.tmp")) == writing)

    for kill in range(kills):
        (process,) = start(*options, "--resume" if (out / "ckpt.pt").exists() else "--overwrite")
        if kill % 2:
            process.join(chance.uniform(0.05, 0.3))
        else:
            for writing in (False, True) * chance.randint(1, 6):  # the so-manyth write that is seen
                until(writing, process)
        process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.log.read_text()
        killed += process.exitcode != 0  # the others were done before
        torn += any(out.glob("*.tmp"))
        if (out / "ckpt.pt").exists():
            load_model(out / "ckpt.pt")
    finish(start(*options, "--resume"))
    assert_same_run(shared(*options), out)
    assert killed > kills / 2 and torn


def test_a_resumed_run_keeps_no_old_checkpoint_on_the_disk(monkeypatch):
    """A file that is mapped takes up its space although it has been replaced."""
    run("--steps=4")
    mapped = []

    def look(*arguments):
        mapped.append("ckpt.pt" in Path("/proc/self/maps").read_text())
        return windows(*arguments)

    windows = train.train_windows
    monkeypatch.setattr(train, "train_windows", look)
    run("--resume")
    assert mapped == [False] * 4


def limit_files_to_60_kb():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_leaves_the_old_checkpoint(world, start, shared):
    shutil.copytree(shared("--steps=4"), "run")
    before = {name: Path(f"run/{name}").read_bytes() for name in ("ckpt.pt", "best.pt")}
    setup = limit_files_to_60_kb
    said, *others = finish(start("--resume", world=world, setup=setup), [1] * world)
    error = said.splitlines()[-1]
    assert re.match(r"error: cannot write \S+ \(.*File too large\); what it held before", error)
    assert said.count("error") == 1 and "Traceback" not in said and not any(others)
    assert {name: Path(f"run/{name}").read_bytes() for name in before} == before
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize(("steps", "bad", "lines"), [(40, 5, 1), (40, 5, 50), (8, 3, 1)])
def test_a_diverging_run_stops_or_has_failed_at_its_end_and_keeps_its_checkpoint(steps, bad, lines):
    run(*CONSTANT, "--dtype=float32", "--steps=4")
    before = Path("run/best.pt").read_bytes()
    options = ("--dtype=float32", "--lr=1e30", "--save_every=1", "--eval_every=6")
    sentence = refused("--resume", f"--steps={steps}", f"--log_every={lines}", *options)
    assert log_of("run")[-1]["grad_norm"] is None  # whether a line was due or not
    on = r"go on from step (\d+), in run/ckpt.pt, with --resume and a lower --lr"
    found = re.match(rf"{bad} gradient\(s\) up to step (\d+) are not finite; {on}", sentence)
    state = load_checkpoint("run/ckpt.pt")
    assert state["step"] == int(found[1]) - bad == int(found[2])
    assert all(x.isfinite().all() for x in state["model"].values())
    assert Path("run/best.pt").read_bytes() == before and load_model("run")
    assert "begin again with --overwrite" in refused(*options[:2], "--steps=8", "--out=new")


@pytest.mark.parametrize(
    ("good", "words"),
    [
        (2, "; go on from step 2, in run/ckpt.pt, with --resume."),
        (1, ", whose gradient was not finite; go on from step 1, in run/ckpt.pt, with --resume."),
        (0, ", whose gradient was not finite; nothing is saved: begin again with --overwrite."),
    ],
)
def test_a_stopped_run_says_truly_where_it_can_go_on(good, words, capsys):
    clip = torch.nn.utils.clip_grad_norm_

    def stopped(*options: str, good: int, after: int):
        """What a run says that is stopped after so many steps, not all with good gradients."""

        def clip_and_stop(*arguments):
            if (step := next(steps)) == after:
                signal.raise_signal(signal.SIGTERM)
            return clip(*arguments) if step <= good else torch.tensor(math.inf)

        steps = itertools.count(1)
        patch = mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip_and_stop)
        with patch, pytest.raises(KeyboardInterrupt):
            run("--save_every=1", *options)
        return capsys.readouterr().err

    assert f"stopped at step 2{words}" in stopped(good=good, after=2)
    assert good == (load("run")["step"] if Path("run/ckpt.pt").exists() else 0)
    if good:
        said = stopped("--resume", good=0, after=1)
        assert f"stopped at step {good + 1}, whose" in said and f"from step {good}, in" in said
    run("--resume" if good else "--overwrite", "--steps=1")


def test_a_second_signal_tells_where_the_run_can_go_on(capsys, monkeypatch):
    """It ends the run in the middle of a step."""
    lr_at, read_best, now = train.lr_at, train.Run.read_best, time.monotonic

    def killed(in_step=2):
        if in_step == 2:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(time, "monotonic", lambda: now() + 2)
            signal.raise_signal(signal.SIGINT)

    def said(*options: str) -> str:
        with pytest.raises(KeyboardInterrupt):
            run("--save_every=1", *options)
        return capsys.readouterr().err

    words = "stopped at once; go on from step 2, in run/ckpt.pt, with --resume"
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_at", lambda c, step: killed(in_step=step) or lr_at(c, step))
        assert words in said()
    monkeypatch.setattr(time, "monotonic", now)
    monkeypatch.setattr(train.Run, "read_best", lambda run: killed() or read_best(run))
    assert words in said("--resume")  # which has not yet begun to train
    monkeypatch.setattr(time, "monotonic", now)
    monkeypatch.setattr(train, "lr_at", lambda c, step: killed() or lr_at(c, step))
    assert "stopped at once; nothing is saved: begin again\n" in said("--out=new")


def test_a_text_that_is_read_too_often_is_told(capsys):
    values = train.split_configs(read_config_file(TINY, ModelConfig, train.TrainConfig))[0]
    model = DeepSeekV3(ModelConfig(**values))
    config = train.TrainConfig(steps=1000, batch_size=4, block_size=16)  # 64,000 tokens
    for length, told in (8000, False), (7999, True):
        data = SimpleNamespace(train=range(length))
        train.tell_plan(model, data, config, MACHINE, resumed=False)
        said = capsys.readouterr().err
        assert f"text: {length:,} tokens; the run reads 64,000, which makes 8.0 epochs" in said
        assert ("give --steps=625 for 5" in said) == told
    train.tell_plan(model, data, config, MACHINE, resumed=True)  # which has made most of them
    ramp = replace(config, batch_start=2, batch_ramp=1.0)
    train.tell_plan(model, data, ramp, MACHINE, resumed=False)
    resumed, ramp = capsys.readouterr().err.split("model: ")[1:]
    assert "--steps" not in resumed and "the run reads 48,000, which makes 6.0 epochs" in ramp


def test_phases_that_are_given_to_a_resumed_run_are_checked():
    run("--steps=1")
    said = refused("--resume", "--steps=2", "--decay_start=0.02")
    assert "warmup is 0.05, but decay_start is 0.02" in said
    run("--resume", "--steps=2", "--decay_start=0.6")


def test_steps_of_the_past_do_not_have_to_fit_a_resumed_run():
    """A batch that has grown can be cut into more parts than the first one."""
    ramp = ("--batch_start=2", "--batch_ramp=0.3")
    run("--steps=4", *ramp)
    more = (*ramp, "--steps=8", "--grad_accum=4")
    assert "the 32 tokens of step 0 are no multiple of 4" in refused("--overwrite", *more)
    assert load(run("--resume", *more))["step"] == 8


def test_a_folder_has_one_writer_and_many_readers(start, capsys):
    (writer,) = start("--steps=5000", "--save_every=1", "--eval_every=1")
    wait_for(lambda: "step 2/" in writer.log.read_text())
    for options in ([], ["--resume"], ["--overwrite"]):
        assert "another train.py is writing to run" in refused(*options)
    train.main([TINY, "--out=run", *SHORT, "--eval_only"])
    assert json.loads(capsys.readouterr().out)["val_loss"] > 0
    writer.kill()
    writer.join(60)
    for name in ("ckpt.pt.7.tmp", "log.jsonl.7.tmp", "ckpt.pt.tmp", "mine.tmp"):
        Path("run", name).touch()
    run("--resume", "--steps=1")
    assert [path.name for path in Path("run").glob("*.tmp")] == ["mine.tmp"]


def test_without_locks_training_goes_on_with_a_word(monkeypatch, capsys):
    Path("run").mkdir()
    for name in (".lock", "ckpt.pt.7.tmp"):  # neither is a run
        Path("run", name).touch()
    lacking = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=lacking))
    run("--steps=1")
    assert capsys.readouterr().err.count("run cannot be locked") == 1
    assert Path("run/ckpt.pt.7.tmp").exists()  # whose writer may live


def poison_third_gradient():
    clip, calls = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def poisoned(parameters, *rest):
        parameters = list(parameters)
        if next(calls) == 3:
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, *rest)

    torch.nn.utils.clip_grad_norm_ = poisoned


def test_one_bad_gradient_is_skipped_by_all_processes_and_the_run_goes_on(start):
    options = ("--parallel=fsdp", "--eval_every=8", "--save_every=8", "--log_every=2")
    said, *_ = finish(start(*options, world=2, setup=poison_third_gradient))
    assert re.search("step 4/8: .*, 1 skipped: gradient not finite", said)
    state = load("run")
    assert state["step"] == 8 and state["optimizer"]["norm.weight"]["step"] == 7
    assert all(x.isfinite().all() for x in state["model"].values())


def test_a_bad_gradient_in_the_last_step_fails_with_a_way_on():
    clip = torch.nn.utils.clip_grad_norm_

    def third_is_bad():
        calls = itertools.count(3 if Path("run/ckpt.pt").exists() else 1)
        bad = torch.tensor(math.inf)
        stand_in = mock.Mock(side_effect=lambda *x: bad if next(calls) == 3 else clip(*x))
        return mock.patch.object(torch.nn.utils, "clip_grad_norm_", stand_in)

    with third_is_bad():
        said = refused("--steps=3", "--save_every=1")
    assert "the gradient of step 3, the last one, is not finite; go on from step 2, in run/" in said
    assert said.endswith("with --resume and --steps=4.")
    with third_is_bad():
        run("--resume", "--steps=4")
    assert load("run")["step"] == 4 and load("run")["optimizer"]["norm.weight"]["step"] == 3


def test_a_bad_step_changes_neither_weights_nor_biases(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
    poison_third_gradient()
    updated, saved, update = [], [], DeepSeekV3.update_bias

    def update_bias(model, gamma):
        update(model, gamma)
        updated.append(copy.deepcopy(model.state_dict()))
        saved.append(load("run")["step"] if Path("run/ckpt.pt").exists() else 0)

    monkeypatch.setattr(DeepSeekV3, "update_bias", update_bias)
    run("--save_every=1", "--eval_every=8")
    assert_same(updated[1], updated[2])
    assert not updated[2]["norm.weight"].equal(updated[3]["norm.weight"])
    assert saved == [0, 1, 2, 2, 4, 5, 6, 7]  # in the bad step the older file stays
    line = log_of("run")[2]
    assert line["grad_norm"] is None and line["loss"] > 0


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--out=run"], ["--resume"]])
def test_no_configuration_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(argv)
    assert exit.value.code == 2 and "name a config file" in capsys.readouterr().err
    Path("empty.py").write_text("steps = 1\n")
    with pytest.raises(ValueError, match="no sizes of the network"):
        train.main(["empty.py"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps=0"], "steps is 0, but must be at least 1"),
        (["--grad_accum=3"], "the 64 tokens of step 0 are no multiple of 3 micro-batches"),
        (["--block_size=257"], "windows of 257 tokens exceed max_position_embeddings, 256"),
        (["--block_size=900000", "--max_position_embeddings=900000"], "do not fit in data/tiny"),
        (["--long_block_size=48", "--long_start=0"], "micro-batches (processes x grad_accum) of"),
        (["--long_block_size=8"], "long_block_size is 8, less than the 16 trained before"),
        (["--vocab_size=511"], "vocab_size is 511, but"),
        (["--vocab_size=1024"], "write vocab_size = 512 into the config file;"),
        (["--batch_start=-1"], "batch_start is -1, but must be at least 0"),
        (["--beta2=1"], "less than 1"),
        (["--data=nowhere"], "make it with: python prepare_data.py SOURCE --name=nowhere"),
        (["--resume"], "run has no ckpt.pt to go on from: begin without --resume"),
        (["--eval_only", "--out="], "there is no out/tiny: name a run's folder"),
        (["--out=/dev/null/run"], "/dev/null/run"),
        (["--optimizer=muon", "--parallel=fsdp"], "muon needs whole matrices"),
        (["--block_size=7"], "block_size is 7, but must be at least 8"),
        (["--num_nextn_predict_layers=16"], "block_size is 16, but must be at least 17"),
        (["--decay_start=0.9", "--decay_end=0.1"], "decay_start is 0.9, but decay_end is 0.1"),
        (["--warmup=0.6"], "warmup is 0.6, but decay_start is 0.5: raise decay_start to 0.6 at"),
        (["--decay_end=0.99"], "decay_end is 0.99, but final_start is 0.9887"),
        (["--data=nowhere", "--out=run/a/b"], "no data in data/nowhere"),
        (["--data=data/no"], "no data in data/no; make it with: python prepare_data.py SOURCE --"),
        (["--data=else/no"], "no data in else/no; make it with: python prepare_data.py SOURCE --"),
    ],
)
def test_refusals_are_one_sentence(options, words):
    assert words in refused(*options)
    assert not Path("run").exists()


def test_a_window_and_the_token_after_it_must_fit_in_the_shortest_file(data, monkeypatch):
    dataset = load_dataset(data)
    dataset.train = Tokens([np.zeros(99), np.zeros(33)])
    monkeypatch.setattr(train, "load_dataset", lambda folder: dataset)
    assert train.read_data(train.TrainConfig(block_size=32), data, 512) is dataset
    for sizes in (dict(block_size=33), dict(block_size=16, long_block_size=33)):
        with pytest.raises(ValueError, match="windows of 33 tokens do not fit"):
            train.read_data(train.TrainConfig(**sizes), data, 512)


def test_the_home_folder_is_meant_by_its_sign(monkeypatch, data):
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    shutil.copytree(data, "home/texts")
    run("--steps=1", "--data=~/texts", out="~/a")
    run("--steps=1", "--init_from=~/a", out="~/b")
    assert Path("home/b/ckpt.pt").exists() and not Path("~").exists()


def test_a_run_is_replaced_though_the_data_are_read_only():
    """Their copies in the run's folder are not."""
    shutil.copytree("data/tiny", "data/closed")
    for file in Path("data/closed").iterdir():
        file.chmod(0o444)
    run("--steps=1", "--data=closed")
    modes = [Path("run", name).stat().st_mode for name in ("meta.json", "tokenizer.tiktoken")]
    assert all(mode & 0o200 for mode in modes)
    Path("run/meta.json").chmod(0o444)
    run("--steps=1", "--data=closed", "--overwrite")
    assert load("run")["step"] == 1


def test_a_config_file_may_begin_with_a_byte_order_mark():
    Path("my.py").write_bytes(b"\xef\xbb\xbf" + Path(TINY).read_bytes())
    train.main(["my.py", *SHORT, "--steps=1"])
    assert load("out/my")["step"] == 1


def test_a_context_shorter_than_the_weights_were_trained_for_is_told(shared, capsys):
    trained = shared("--steps=1", "--block_size=64")
    run("--steps=1", f"--init_from={trained}", "--max_position_embeddings=32")
    assert "max_position_embeddings is 32, but" in capsys.readouterr().err


def test_an_existing_run_is_refused_and_kept(shared):
    shutil.copytree(shared("--steps=1"), "run")
    before = Path("run/ckpt.pt").read_bytes()
    for name in ("log.jsonl", "best.pt", "meta.json"):  # any of its files makes a run
        assert "run holds a run: give --resume, --overwrite" in refused()
        Path("run", name).unlink()
    assert all(refused("--overwrite", x) for x in ("--data=nowhere", "--beta1=1", "--resume"))
    lacking = torch._dynamo.exc.ShortenTraceback("no g++", first_useful_frame=None)
    with mock.patch.object(torch.optim.AdamW, "step", side_effect=lacking):
        assert "--compile cannot be used here (no g++)" in refused("--overwrite")
        stop = mock.patch.object(train, "lr_at", lambda *_: signal.raise_signal(2) or 0.1)
        with stop, pytest.raises(KeyboardInterrupt):  # a killed compiler is no lacking one
            run("--overwrite")
    assert Path("run/ckpt.pt").read_bytes() == before and not Path("run/meta.json").exists()
    for name in ("plot.png", "photo.png"):
        Path("run", name).touch()
    run("--steps=2", "--overwrite")
    assert Path("run/photo.png").exists() and not Path("run/plot.png").exists()
    assert [x["step"] for x in log_of("run")] == [1, 2, 2]


# ---- As a user would -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "world"), [("base_1b", 1), ("base_1b_8gpu", 8)])
def test_configurations_for_h100s_hold_what_they_promise(name, world):
    """Sizes, divisibility and data; no GPU has run them."""
    files = (str(ROOT / f"config/{x}.py") for x in (name, "base_1b"))
    both = [read_config_file(x, ModelConfig, train.TrainConfig) for x in files]
    (values, settings), (first, _) = map(train.split_configs, both)
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
    sides = {n: x.shape[-2:] for n, x in model.named_parameters() if x.ndim > 1}
    odd = {n.rsplit(".", 2)[-2] for n, (a, b) in sides.items() if a % 128 or b % 128}
    assert odd == {"gate", "kv_a_proj_with_mqa"}


def test_from_text_to_text_on_the_command_line():
    def user(script: str, *argv: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, str(ROOT / script), *argv]
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        assert "\r" not in done.stderr, "no progress bars in a file"
        return done

    user("prepare_data.py", TEXT, "--name=text", "--vocab_size=512")
    done = user("train.py", TINY, "--data=text", "--steps=40", "--block_size=32", "--log_every=2")
    for words in ("M parameters", "bits/byte", "python sample.py out/tiny"):
        assert words in done.stderr
    tokens = load_dataset("data/text").val.arrays[0][1:9].tolist()
    prompt = load_tokenizer("out/tiny").decode(tokens).strip()
    assert done.stdout.startswith(prompt)
    files = {path.name for path in Path("out/tiny").iterdir()}
    copies = {"tokenizer.tiktoken", "meta.json"}
    assert files == {"ckpt.pt", "best.pt", "log.jsonl", ".lock"} | copies
    losses = [line["loss"] for line in log_of("out/tiny") if "loss" in line]
    assert losses[0] > losses[-1] and len(losses) == 20
    done = user("sample.py", "--ckpt=out/tiny", "--prompt=import ", "--max_new_tokens=20")
    assert done.stdout.startswith("import ") and len(done.stdout) > 10
