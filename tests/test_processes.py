"""Any number of processes, DDP or FSDP, train as one does; a device and a dtype that are fast."""

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import (
    CONSTANT,
    ROOT,
    SHORT,
    TINY_FILE,
    assert_same,
    assert_same_run,
    finish,
    load,
    run,
    wait_for,
)  # fmt: skip

import huggingface
import train
from model import DeepSeekV3
from support import processes
from support.checkpoints import load_checkpoint
from support.clock import Clock
from support.flops import log_time, peak_flops
from support.settings import Refusal

pytestmark = pytest.mark.usefixtures("workplace")


def no_second_copy():
    """From the second step on a first micro-batch's gradients lie in DDP's buckets, two or so."""
    calls, sync = itertools.count(), processes.sync_gradients

    def look(trainer, now):
        if now and next(calls):
            grads = [p.grad.untyped_storage().data_ptr() for p in trainer.parameters()]
            assert len(grads) > 50 and len({*grads}) < 5, "gradients are copies"
        sync(trainer, now)

    processes.sync_gradients = look


def draw_differently(out: str) -> bool:
    """Whether two processes have other random numbers, as dropout needs."""
    (one,), (other,) = load(out)["random"]["by_rank"]
    return not torch.equal(one, other)


def test_a_run_moves_between_one_process_ddp_and_fsdp(start, shared):
    run(*CONSTANT, "--steps=2", out="moved")
    ways = ("ddp", 4, 2, no_second_copy), ("fsdp", 6, 1, None)
    for parallel, steps, parts, setup in ways:
        options = (f"--parallel={parallel}", f"--steps={steps}", f"--grad_accum={parts}")
        finish(start(*CONSTANT, *options, "--resume", world=2, out="moved", setup=setup))
        assert draw_differently("moved")
    run("--resume", "--steps=8", out="moved")
    moved, straight = load("moved"), load(shared(*CONSTANT))
    for key in ("model", "step", "tokens"):
        assert_same(moved[key], straight[key], 1e-9)
    assert_same(moved["AdamW 0"]["state"], straight["AdamW 0"]["state"], 1e-9)


def test_two_processes_start_from_weights_as_one_does(start, shared):
    huggingface.main([str(shared("--steps=1")), "released"])
    options = ("--init_from=released", "--steps=4")
    finish(start(*options, "--parallel=fsdp", world=2, out="together"))
    assert_same_run(run(*options, out="alone"), Path("together"), 1e-9)


def other_word_in_process_1(word: str):
    if os.environ["RANK"] == "1":
        sys.argv.append(word)


def other_folder_in_process_1():
    if os.environ["RANK"] == "1":
        os.chdir("node")


def test_processes_that_read_other_files_are_refused_before_anything_is_written(start, data):
    """Other data, other settings, another checkpoint; and what all refuse is said by all."""
    ranks = start(world=2, setup=functools.partial(other_word_in_process_1, "--eval_tokens=500"))
    for rank, said in enumerate(finish(ranks, [1, 1])):
        who = "error" if rank == 0 else "error in process 1"
        assert f"{who}: data of process 1 differ from those of process 0: all have" in said
    ranks = start(world=2, setup=functools.partial(other_word_in_process_1, "--lr=0.5"))
    for said in finish(ranks, [1, 1]):
        assert "settings of process 1 differ" in said
    assert not Path("run").exists()
    run("--steps=2")
    Path("node/data").mkdir(parents=True)
    Path("node/data/tiny").symlink_to(data)
    run("--steps=1", out="node/run")
    ranks = start("--resume", "--steps=3", world=2, setup=other_folder_in_process_1)
    for said in finish(ranks, [1, 1]):
        assert "step and tokens and best_loss of process 1 differ" in said
    assert load("run")["step"] == 2
    for said in finish(start("--grad_accum=4", world=2, out="new"), [1, 1]):
        assert "the 64 tokens of a step are no multiple of 8 micro-batches" in said


def own_clip_in_each_process():
    update = DeepSeekV3.update_bias

    def edited(model, gamma):
        update(model, gamma)
        model.layers[0].self_attn.kv_b_proj.weight.data.mul_(1 - 0.01 * int(os.environ["RANK"]))

    DeepSeekV3.update_bias = edited


def test_weights_that_an_edit_has_parted_are_not_saved(start):
    for said in finish(start("--steps=2", world=2, setup=own_clip_in_each_process), [1, 1]):
        assert "layers.0.self_attn.kv_b_proj.weight of process 1 differs" in said
    assert not Path("run/ckpt.pt").exists()


def raise_at_third_step():
    windows = train.train_windows

    def fail(data, config, step):
        if step == 3 and os.environ["RANK"] == "1":
            raise Refusal("this rank has had enough")
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
    assert re.search(r"\nstopped at step \d+; continue from step \d+ \(run/ckpt.pt\)", said)
    assert culprit.strip() == ("error in process 1: this rank has had enough" if raises else "")
    load_checkpoint("run/ckpt.pt")


def test_torchrun_trains_and_is_interrupted_and_resumed(shared):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*torchrun, str(ROOT / "train.py"), TINY_FILE, "--out=run", *SHORT, "--steps=12"]
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
    assert draw_differently("run")


def test_where_nothing_can_be_compiled_a_line_says_so_and_the_run_goes_on(monkeypatch, capsys):
    """compile is "auto" and this machine's CPU stands for a GPU without Triton."""
    monkeypatch.setattr(processes, "can_compile", processes.can_compile.__wrapped__)

    def fail(function):
        raise RuntimeError("cannot find Triton")

    monkeypatch.setattr(torch, "compile", fail)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch, "ones", lambda n, device: None)
    config = train.TrainConfig(dtype="bfloat16", batch_size=64, block_size=512)
    assert not processes.compiles(config, gpu)
    assert capsys.readouterr().err == "nothing is compiled: cannot find Triton\n"
    monkeypatch.setattr(processes, "can_compile", lambda device: True)
    assert processes.compiles(config, gpu)
    assert not processes.compiles(replace(config, dtype="float32"), gpu)
    assert not processes.compiles(replace(config, batch_size=8), gpu)  # as small.py's steps
    assert processes.compiles(replace(config, batch_size=8, steps=10_000), gpu)
    cpu = torch.device("cpu")  # there in long runs alone
    assert not processes.compiles(config, cpu)
    assert processes.compiles(train.TrainConfig(dtype="bfloat16", steps=2000), cpu)
    assert not processes.compiles(train.TrainConfig(dtype="bfloat16", steps=2000, fp8=True), cpu)


def test_a_card_that_is_not_used_is_named(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes.shutil, "which", lambda name: f"/usr/bin/{name}")
    for device in ("cpu", "auto"):  # who asks for a CPU gets it without a remark
        assert processes.start_device(train.TrainConfig(device=device)).type == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the NVIDIA card is not used by PyTorch ") and "docs/GPU.md" in line


def test_the_time_of_a_run_is_estimated_and_then_measured(monkeypatch, capsys):
    """57M parameters on an RTX 4090: the log says three hours at the end, too."""
    machine = processes.Machine(torch.device("cuda"), torch.bfloat16, world=2, speed=165e12)
    log_time(57_000_000, 2 * 1_146_880_000, machine)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "time: roughly 2.6 hours, estimated from products at 330,000 GFLOP/s"
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    assert clock.time_left(10, 90) == ""
    now[0] = 100.0  # compiling
    clock.restart(10)
    clock.begin()
    now[0] = 160.0
    assert clock.measure(20) == 1 / 6
    assert clock.time_left(20, 80) == ", 0:08:00 left"


@pytest.mark.parametrize("compiled", [False, True])
def test_time_left_shows_from_the_first_line_on(compiled, monkeypatch, capsys):
    """In the line of step 1, too, but not if that step has compiled."""
    start = processes.start
    monkeypatch.setattr(
        processes, "start", lambda config: replace(start(config), compiled=compiled)
    )
    monkeypatch.setattr(processes, "compile_network", lambda *_: None)
    run("--log_every=2", "--steps=4", "--eval_every=9", "--save_every=9")
    said = capsys.readouterr().err.splitlines()
    (first,), (second,) = ([x for x in said if x.startswith(f"step {n}/4: loss")] for n in (1, 2))
    assert first.endswith("left") != compiled and second.endswith("left")


def test_a_gpu_that_cannot_be_used_is_refused_with_what_to_do(monkeypatch):
    def fail(n, device):
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(Refusal, match=r"'cuda:0' cannot be used here \(.*no kernel.*: try cpu"):
        processes.usable_device("cuda:0")


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", None),
        ("Tesla V100-PCIE-32GB", 14e12),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name(card, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops(torch.device("cuda")) == peak


def compile_in_vain():
    """As an edit's blocks under "auto" on CUDA."""

    def fail(graph, inputs):
        raise RuntimeError("no kernel for this")

    torch.compile = functools.partial(torch.compile, backend=fail)
    processes.compiles = lambda config, device: config.compile == "auto"


def test_a_block_that_cannot_be_compiled_stays_eager_and_torch_names_it(start, shared):
    (said,) = finish(start("--steps=1", setup=compile_in_vain))
    assert re.search(r"WON'T CONVERT forward .*model.py line \d+", said)
    assert said.index("compiling takes one to three minutes") < said.index("WON'T CONVERT")
    assert_same(load("run")["model"], load(shared("--steps=1"))["model"])
