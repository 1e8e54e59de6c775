"""Any number of processes, DDP or FSDP, train as one does; a device and a dtype that are fast."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from training import (
    CONSTANT,
    ROOT,
    SHORT,
    TINY,
    assert_same,
    assert_same_run,
    finish,
    load,
    run,
    spoil_gradients,
    wait_for,
)  # fmt: skip

import huggingface
import train
from huggingface import load_model
from support import flops, ops, processes, runs, tokens
from support.checkpoints import load_checkpoint
from support.settings import Refusal

pytestmark = pytest.mark.usefixtures("workplace")


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
    backward, dtypes, kept = train.backward, [], "as asked or as before; --dtype=auto would take"
    monkeypatch.setattr(train, "backward", lambda *x: dtypes.append(x[-1].dtype) or backward(*x))
    for fast, options, expected in (
        (torch.bfloat16, ["--steps=1"], "bfloat16 (measured)"),
        (torch.float32, ["--steps=2", "--resume"], f"bfloat16 ({kept} float32"),
        (torch.bfloat16, ["--steps=3", "--resume"], "bfloat16 (measured)"),
        (torch.float32, ["--steps=4", "--resume", "--dtype=auto"], "float32 (measured)"),
        (torch.bfloat16, ["--steps=1", "--overwrite", "--dtype=float32"], "float32 (as asked)"),
    ):
        monkeypatch.setattr(processes, "fast_dtype", lambda device, fast=fast: (fast, "measured"))
        train.main([TINY, "--out=run", *(x for x in SHORT if "dtype" not in x), *options])
        assert f"1 x cpu in {expected}" in capsys.readouterr().err
        dtype = load("run")["train_config"]["dtype"]
        assert str(dtypes[-1]) == f"torch.{dtype}" and expected.startswith(dtype)


def test_the_share_of_a_known_cards_peak_is_in_the_log(monkeypatch):
    """With PaLM's FLOPs of a token, as nanoGPT's mfu."""
    cards = {"H100 PCIe": 756e12, "H100 80GB HBM3": 989e12, "H100 NVL": None, "L4": None}
    for card, peak in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, x=card: f"NVIDIA {x}")
        assert flops.peak_flops(torch.device("cuda")) == peak
    for peak in (None, 1e12):
        monkeypatch.setattr(runs, "peak_flops", lambda device, peak=peak: peak)
        run("--steps=1", "--overwrite")
        line = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])
        assert ("mfu" in line) == bool(peak)
    work = line["tokens_per_s"] * flops.flops_per_token(load_model("run")[0], 16)
    assert line["mfu"] == pytest.approx(work / 1e12)


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


def tell_threads():
    """Lists the threads that are left when the processes have parted, where Linux tells."""
    destroy = processes.dist.destroy_process_group

    def watched():
        destroy()
        names = (file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))
        print("left:", *sorted(names), flush=True)

    processes.dist.destroy_process_group = watched


@pytest.mark.parametrize(
    "parallel, accumulate, optimizer",
    [("ddp", 2, "adamw"), ("fsdp", 2, "adamw"), ("ddp", 1, "muon")],
)
def test_two_processes_equal_one(parallel, accumulate, optimizer, start, shared):
    """All that is logged and saved, with MTP, and experts that a batch leaves without tokens.

    And DDP leaves no thread of gloo, which could abort its process while Python ends."""
    options = ("--n_routed_experts=64", f"--optimizer={optimizer}")
    parts = (f"--parallel={parallel}", f"--grad_accum={accumulate}")
    for said in finish(start(*options, *parts, world=2, out="together", setup=tell_threads)):
        assert parallel == "fsdp" or "gloo" not in said.split("left:")[1]
    assert_same_run(shared(*options), Path("together"), 1e-9)


def test_a_run_moves_between_one_process_ddp_and_fsdp(start, shared):
    run(*CONSTANT, "--steps=2", out="moved")
    for parallel, steps in (("ddp", 4), ("fsdp", 6)):
        options = (f"--parallel={parallel}", f"--steps={steps}", "--resume")
        finish(start(*CONSTANT, *options, world=2, out="moved"))
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


def other_text_in_process_1():
    if os.environ["RANK"] == "1":
        load = tokens.load_dataset

        def other(*which):
            data = load(*which)
            data.val.arrays[0] = data.val.arrays[0][:-1]
            return data

        tokens.load_dataset = other


def other_rate_in_process_1():
    if os.environ["RANK"] == "1":
        sys.argv.append("--lr=0.5")


def other_step_in_process_1():
    if os.environ["RANK"] == "1":
        os.chdir("node")


def test_processes_that_read_other_files_are_refused_before_anything_is_written(start, data):
    """Other data, other settings, another checkpoint; and what all refuse is said by all."""
    ranks = start(world=2, setup=other_text_in_process_1)
    for rank, said in enumerate(finish(ranks, [1, 1])):
        who = "error" if rank == 0 else "error in process 1"
        assert f"{who}: data of process 1 differ from those of process 0: all have" in said
    ranks = start(world=2, setup=other_rate_in_process_1)
    for said in finish(ranks, [1, 1]):
        assert "settings of process 1 differ" in said
    assert not Path("run").exists()
    run("--steps=2")
    Path("node/data").mkdir(parents=True)
    Path("node/data/tiny").symlink_to(data)
    run("--steps=1", out="node/run")
    ranks = start("--resume", "--steps=3", world=2, setup=other_step_in_process_1)
    for said in finish(ranks, [1, 1]):
        assert "step and tokens of process 1 differ" in said
    assert load("run")["step"] == 2
    for said in finish(start("--stepps=9", world=2), [2, 2]):
        assert "did you mean steps?" in said


def expect_all_cut_up():
    """Weights and gradients; and of a forward pass autograd keeps none of a block's in bf16."""
    backward, sync = train.backward, processes.sync_gradients

    def watched(model, *rest):
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.ndim > 1)
        shapes = {tuple(sorted(p.shape)) for p in model.layers.parameters() if p.ndim > 1}

        def keep(x):
            assert x.dtype != torch.bfloat16 or tuple(sorted(x.shape)) not in shapes, x.shape
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return backward(model, *rest)

    def watched_sync(trainer, now):
        if now:  # the second of two micro-batches begins: the first has left its gradients
            gradients = [p.grad.to_local() for p in trainer.parameters()]
            held, whole = (sum(x.numel() for x in y) for y in (gradients, trainer.parameters()))
            assert 0.4 * whole < held < 0.6 * whole
        sync(trainer, now)

    train.backward, processes.sync_gradients = watched, watched_sync


def test_fsdp_holds_nothing_whole(start):
    """test_two_processes_equal_one: the sums are right."""
    options = ("--parallel=fsdp", "--grad_accum=2", "--dtype=bfloat16", "--block_size=20")
    finish(start(*options, "--steps=2", world=2, setup=expect_all_cut_up))


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
    assert re.search(r"this process cannot go on; go on from step \d+, in run/ckpt.pt", said)
    assert culprit.strip() == ("error in process 1: this rank has had enough" if raises else "")
    load_checkpoint("run/ckpt.pt")


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


def test_a_signal_to_one_process_stops_all_at_the_same_step(start):
    """The last one gets it, twice, as of a scheduler and torchrun."""
    ranks = start("--steps=5000", "--batch_size=64", world=2)  # a step outlasts both signals
    wait_for(lambda: "step 3/" in ranks[0].log.read_text())
    for _ in range(2):
        os.kill(ranks[-1].pid, signal.SIGINT)
        time.sleep(0.01)
    said, other = finish(ranks, [130, 130])
    step = re.search(r"stopped at step (\d+); go on from step \1, in \S+ckpt.pt,", said)[1]
    assert load("run")["step"] == int(step) and "Traceback" not in said and "stopped" not in other


def test_one_bad_gradient_is_skipped_by_all_processes_and_the_run_goes_on(start):
    options = ("--parallel=fsdp", "--eval_every=8", "--save_every=8", "--log_every=2")
    said, *_ = finish(start(*options, world=2, setup=partial(spoil_gradients, 3)))
    assert re.search("step 4/8: .*, 1 skipped: gradient not finite", said)
    state = load("run")
    assert state["step"] == 8
    assert {x["step"].item() for x in state["AdamW 0"]["state"].values()} == {7}
    assert all(x.isfinite().all() for x in state["model"].values())


AS_ON_WINDOWS = """
import os, signal, sys

sys.path.insert(0, sys.argv[1])
for name in ("fcntl", "resource", "readline"):
    sys.modules[name] = None
del signal.SIGHUP, os.O_NOFOLLOW
import huggingface, prepare_data, sample, train

prepare_data.main([sys.argv[2], "--name=own", "--vocab_size=512"])
options = ["--data=own", "--steps=2", "--batch_size=4", "--block_size=16", "--dtype=float32"]
for more in ("--eval_every=1", "--resume", "--overwrite"):
    train.main([os.path.join(sys.argv[1], "config", "tiny.py"), "--out=run", *options, more])
    options[1] = "--steps=3"
sample.main(["run", "--prompt=def", "--max_new_tokens=3"])
huggingface.main(["run", "hf"])
"""


def test_all_commands_work_without_what_windows_lacks():
    """Locks of files, SIGHUP, and opening a file without following links."""
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS, ROOT, train.__file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "run cannot be locked (this system has no such locks): let only one" in done.stderr
    assert Path("run.old-1").is_dir() and Path("hf/config.json").exists()
