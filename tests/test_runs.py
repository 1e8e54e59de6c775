"""The folder of a run: nothing is lost, nothing foreign is touched, and a run goes on bit for bit.

KILLS=100 SEED=2 python -m pytest tests/test_runs.py -k sigkill     more, and other kills
"""

import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from training import (
    CONSTANT,
    MACHINE,
    SHORT,
    TINY_FILE,
    assert_same,
    assert_same_run,
    finish,
    load,
    log_of,
    refused,
    run,
    wait_for,
)  # fmt: skip

import train
from load import load_model
from model import DeepSeekV3
from support import checkpoints, runs

pytestmark = pytest.mark.usefixtures("workplace")


# ---- Going on ------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_settings_and_tells_what_differs(capsys):
    """What the command line does not name stays, whatever the config file says by now."""
    run(*CONSTANT, "--steps=2", "--lr=0.01", "--weight_decay=0")
    before = (saved := load("run"))["model"]["lm_head.weight"]
    saved["progress"] |= dict(best_loss=3.0, best_length=16)  # of older code
    torch.save(saved, "run/ckpt.pt")
    changed = "mtp_weight = 0.5\nrope_theta = 9.0\n"
    Path("my.py").write_text(Path(TINY_FILE).read_text() + changed)
    options = ("--weight_decay=2", "--clip=1e-9", "--beta1=0", "--beta2=0", "--lr=0.5")
    options += ("--routed_scaling_factor=9",)
    train.main(["my.py", "--out=run", "--resume", "--steps=3", *options])
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("routed_scaling_factor is now 9.0 (was ") for line in said) == 1
    kept = [line for line in said if " stays " in line]  # of those given here none
    assert not {"steps", "lr"} & {line.split()[0] for line in kept}
    assert "rope_theta stays 10000.0 (the config file has 9.0)" in kept
    assert "mtp_weight stays 0.3 (the config file has 0.5)" in kept
    assert {"steps is now 3 (was 2)", "lr is now 0.5 (was 0.01)"} <= {*said}
    state = load("run")
    assert not {"best_loss", "best_length"} & state["progress"].keys()
    values, after = state["train_config"], state["model"]["lm_head.weight"]
    assert log_of("run")[-2]["lr"] == 0.5 and after.dtype == torch.float64
    assert (state["step"], values["batch_size"], values["mtp_weight"]) == (3, 4, 0.3)
    # lr * weight_decay = 1 wipes the weight out, and the clipped gradient is far below Adam's eps
    assert after.abs().max() < 1e-2 < before.abs().max()


def test_a_run_has_copies_of_the_code_that_made_its_weights(monkeypatch, capsys):
    """Whoever opens a run with another model.py, or resumes it with another train.py, gets a line.
    A run that goes on puts its copies aside. best.pt may be older than the copies."""
    for name, code in (now := dict(checkpoints.CODE)).items():
        monkeypatch.setitem(checkpoints.CODE, name, f"# before\n{code}")
    run("--steps=1")
    checkpoints.CODE.update(now)
    shutil.copy("run/best.pt", "best.pt")
    meanings = (
        "if a formula has changed, the weights compute something else",
        "the rest of the run may be trained differently",
    )
    first, then = (
        f"{name} has changed since run/ckpt.pt was saved: {meaning} (diff run/{name} {name} shows"
        for name, meaning in zip(now, meanings, strict=True)
    )
    load_model("run")
    said = capsys.readouterr().err
    assert first.replace("ckpt.pt", "best.pt") in said and "train.py has changed" not in said
    run("--resume", "--steps=2")
    said = capsys.readouterr().err
    for name, told in ("model.py", first), ("train.py", then):
        assert told in said and f"the existing run/{name} is now run/{name}.old-1" in said
        assert Path(f"run/{name}").read_text() == Path(checkpoints.ROOT / name).read_text()
        assert Path(f"run/{name}.old-1").read_text().startswith("# before")
    run("--resume", "--steps=3")
    assert "has changed" not in capsys.readouterr().err
    shutil.copy("best.pt", "run")  # as if it were the best still
    load_model("run")
    assert first.replace("ckpt.pt", "best.pt") in capsys.readouterr().err


class LowMomentum(torch.optim.Optimizer):
    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                zeros = torch.zeros_like(p, dtype=torch.bfloat16)
                momentum = self.state[p].setdefault("momentum", zeros).mul_(0.9).add_(p.grad)
                p -= group["lr"] / group["steps"] * momentum


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.NAdam, LowMomentum])
def test_the_whole_state_of_any_optimiser_goes_on(kind, monkeypatch):
    """SGD keeps nothing, NAdam a tensor without dimensions, LowMomentum bfloat16 and an option that
    changes. The learning rate is a group's multiple of the schedule's."""
    made = []

    def one_group(model, config):
        made.append(kind([{"params": [*model.parameters()], "lr_scale": 0.25}], config.lr))
        return made[-1:]

    monkeypatch.setattr(train, "make_optimizers", one_group)
    options = (*CONSTANT, "--dtype=float32")  # to which torch casts what it loads
    straight = run(*options, "--steps=4", out="straight")
    run(*options, "--steps=2")
    run(*options, "--steps=4", "--resume")
    for key in ("model", f"{kind.__name__} 0", "tokens"):
        assert_same(load(straight)[key], load("run")[key])
    assert made[-1].param_groups[0]["lr"] == 0.25 * log_of("run")[-2]["lr"]


# ---- The best checkpoint -------------------------------------------------------------------------


def test_which_evaluation_replaces_the_best_checkpoint(monkeypatch, capsys):
    """Not an equal one; once YaRN is on the first that is a number, then lower ones."""
    write, saved = runs.write_whole, []

    def watched(path, *rest):
        write(path, *rest)
        if path.suffix == ".pt":
            saved.append((path.stem, load(path.parent, path.name)["step"]))

    monkeypatch.setattr(runs, "write_whole", watched)
    losses = (2.0, 2.0, 1.0, math.nan, 5.0, 6.0, 5.0, 4.0, 4.5)
    found = mock.Mock(side_effect=[dict(val_loss=x, val_bpb=x / 2) for x in losses])
    monkeypatch.setattr(train, "evaluate", found)
    monkeypatch.setattr(train, "try_evaluation", lambda *_: None)
    options = ("--steps=16", "--eval_every=2", "--save_every=3")
    run(*options, "--long_block_size=32", "--long_start=0.375")
    assert [step for name, step in saved if name == "best"] == [2, 6, 10, 16]
    steps = [step for name, step in saved if name == "ckpt"]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]
    logged = [x["val_loss"] for x in log_of("run") if "val_loss" in x]
    assert logged == [None if math.isnan(x) else x for x in losses[:-1]]
    best = load("run", "best.pt")
    assert (best["val_loss"], best["val_bpb"]) == (4.0, 2.0)
    for losses in ((4.5,), ()):  # of step 17; that of step 16 is in the log
        found.side_effect = [dict(val_loss=x, val_bpb=0.0) for x in losses]
        run(*options, "--resume", "--steps=17")
        assert load("run", "best.pt")["val_bpb"] == 2.0  # not written again
        assert [x["step"] for x in log_of("run")][-3:] == [16, 17, 17]
    found.side_effect = [dict(val_loss=9.0, val_bpb=4.5)]
    run(*options, "--resume", "--steps=18", "--block_size=8")  # its losses are others
    assert load("run", "best.pt")["val_loss"] == 9.0
    assert "other block_size, so other losses: the next eval" in capsys.readouterr().err
    found.side_effect = [dict(val_loss=x, val_bpb=5.0) for x in (10.0, 11.0)]
    run(*options, "--resume", "--steps=19", "--block_size=8", "--eval_tokens=300")
    assert load("run", "best.pt")["val_loss"] == 10.0
    assert checkpoints.checkpoint_file("run").name == "best.pt"  # what the folder means
    Path("run/best.pt").unlink()
    assert checkpoints.checkpoint_file("run").name == "ckpt.pt"


# ---- The folder ----------------------------------------------------------------------------------


def test_with_overwrite_a_run_is_put_aside_whole(begun, capsys):
    (begun / "photo.png").touch()  # a foreign file, too
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    run("--steps=2", "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("run.old-1").iterdir()} == before
    assert "the existing run is now run.old-1\n" in capsys.readouterr().err
    assert [x["step"] for x in log_of("run")] == [1, 2, 2]
    assert not Path("run/photo.png").exists()


def test_a_folder_has_one_writer_and_many_readers(start, capsys):
    (writer,) = start("--steps=5000", "--save_every=1", "--eval_every=1")
    wait_for(lambda: "step 2/" in writer.log.read_text())
    for options in (["--resume"], ["--overwrite"]):
        assert "another train.py is writing to run" in refused(*options)
    train.main([TINY_FILE, "--out=run", *SHORT, "--eval_only"])
    assert json.loads(capsys.readouterr().out)["val_loss"] > 0
    writer.kill()
    writer.join(60)
    for name in ("ckpt.pt.tmp", "mine.tmp"):  # what a killed writer has left is written over
        Path("run", name).touch()
    run("--resume", "--steps=1")
    assert Path("run/mine.tmp").exists()
    run("--resume", f"--steps={load('run')['step'] + 1}")
    assert [path.name for path in Path("run").glob("*.tmp")] == ["mine.tmp"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_trained_on_without_one(code, monkeypatch, capsys):
    broken = mock.Mock(side_effect=OSError(code, os.strerror(code)))
    monkeypatch.setattr(runs.fcntl, "flock", broken)
    assert load(run("--steps=1"))["step"] == 1
    said = f"run is not locked ({os.strerror(code)}): start one train.py there\n"
    assert said in capsys.readouterr().err


# ---- Accidents -----------------------------------------------------------------------------------

AGAIN = "begin again with --overwrite.\n"
CONTINUE = "continue from step {} (run/ckpt.pt) with --resume.\n"


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_or_a_closed_terminal_stops_the_run_when_all_is_saved(number, faults, monkeypatch):
    """A second signal is the system's own. An ignored one, as SIGHUP under nohup, stays ignored."""
    before = signal.signal(number, signal.SIG_IGN)
    faults.signal(number, step=0)
    with suppress(KeyboardInterrupt):
        run("--steps=2", out="ignoring")
    assert load("ignoring")["step"] == 2
    signal.signal(number, before)

    def close():
        monkeypatch.setattr("sys.stderr", open("/dev/full", "w"))  # noqa: SIM115
        signal.raise_signal(number)
        assert signal.getsignal(number) == before

    faults.at_step(2, close)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert load("run")["step"] == 3


def test_a_signal_in_an_evaluation_stops_the_run_after_it(shared, monkeypatch):
    evaluate = train.evaluate

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(train, "try_evaluation", lambda *_: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", interrupted)
        run("--eval_every=2")
    assert load("run")["step"] == 2
    assert_same_run(shared("--eval_every=2"), run("--eval_every=2", "--resume"))
    monkeypatch.setattr(train, "evaluate", interrupted)
    try:
        run("--steps=2", "--overwrite")
    except KeyboardInterrupt:
        pytest.fail("after the last evaluation nothing is left to stop")


@pytest.mark.parametrize("every", [4, 8])  # steps: the last evaluation, too
@pytest.mark.parametrize("when", ["before its line", "after its line"])
def test_a_run_that_dies_in_an_evaluation_resumes_with_it(when, every, shared, faults):
    """As for lack of memory, hours after the last checkpoint. One in the log is not repeated."""
    options = ("--save_every=50", f"--eval_every={every}")
    write_line = runs.Run.write_line

    def fail(*args):
        raise RuntimeError("CUDA out of memory")

    def write_and_fail(run, values, *more):
        write_line(run, values, *more)
        return fail() if "val_loss" in values else None

    targets = {"before its line": (train, "evaluate", fail)}
    targets["after its line"] = (runs.Run, "write_line", write_and_fail)
    with faults.monkeypatch.context() as patch:
        patch.setattr(train, "try_evaluation", lambda *_: None)
        patch.setattr(*targets[when])
        assert "(train.py: --grad_accum, --recompute)" in refused(*options)
    assert load("run")["step"] == every and ("val_loss" in log_of("run")[-1]) == (when[0] == "a")
    assert_same_run(shared(*options), run(*options, "--resume"))
    faults.monkeypatch.setattr(train, "evaluate", fail)
    assert_same_run(shared(*options), run(*options, "--resume"))  # by mistake: it is finished


@pytest.mark.parametrize("how", ["a cut branch's", "damaged", "without a loss"])
def test_a_best_checkpoint_that_does_not_count_is_named_and_replaced(how, shared, faults, capsys):
    """The last checkpoint is an older one. The log loses no evaluation, and gets none twice."""
    faults.at_step(4, lambda: shutil.copy("run/ckpt.pt", "backup.pt"))
    run()
    shutil.copy("backup.pt", "run/ckpt.pt")
    if how == "damaged":
        Path("run/best.pt").write_bytes(b"half")
    elif how == "without a loss":
        shutil.copy("backup.pt", "run/best.pt")
    capsys.readouterr()
    assert_same_run(shared(), run("--resume"))
    (told,) = (x for x in capsys.readouterr().err.splitlines() if "replaces best.pt" in x)
    assert ("is of step 8, after that of ckpt.pt" in told) == (how == "a cut branch's")
    losses = [x["val_loss"] for x in log_of("run") if "val_loss" in x]
    assert len(losses) == 2 and load("run", "best.pt")["val_loss"] == min(losses)
    Path("run/best.pt").write_bytes(b"half")  # after the last step: evaluated again
    assert_same_run(shared(), run("--resume"))
    assert load("run", "best.pt")["val_loss"] == losses[-1]


FULL = {
    "run/tokenizer.tiktoken": (0, lambda: 20, "its previous content is intact"),
    "run/log.jsonl": (4, lambda: Path("run/log.jsonl").stat().st_size, "run/log.jsonl"),
    "run/ckpt.pt": (4, lambda: 60_000, "its previous content is intact"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_reported_with_the_files_name_and_loses_nothing(name, faults, capsys):
    step, size, words = FULL[name]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():  # from now on no file grows beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (size(), limits[1]))

    faults.at_step(step, fill) if step else fill()
    try:
        said = refused("--save_every=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(rf"{name} cannot be written \(.*File too large\)", said) and words in said
    assert not [*Path("run").glob("*.tmp")]
    assert not step or (load("run")["step"], load("run", "best.pt")["step"]) == (4, 4)
    assert (CONTINUE.format(4) in capsys.readouterr().err) == (step > 0)


# ---- Numbers that are not finite -----------------------------------------------------------------

IF_DIVERGED = ": give a lower --lr, or fix the edit that causes this."


@pytest.mark.parametrize(
    ("bad", "steps", "every", "way"),
    [
        (range(6, 99), 40, 1, AGAIN),  # from step 5 it would be the same
        (range(4, 99), 4, 1, AGAIN),
        (range(2, 99), 40, 3, AGAIN),
        (range(8, 99), 40, 4, CONTINUE.format(4)),
        (range(4, 99), 4, 2, CONTINUE.format(2)),
    ],
)
def test_a_diverging_run_stops_or_has_failed_at_its_end(bad, steps, every, way, faults, capsys):
    """Where the weights of ckpt.pt themselves have led to the bad gradients, it is of no use."""
    faults.bad_gradients(*bad)
    said = refused(f"--steps={steps}", f"--save_every={every}", "--log_every=50")
    last = min(bad[0] + 4, steps)
    assert said == f"{last - bad[0] + 1} gradient(s) up to step {last} are not finite{IF_DIVERGED}"
    assert f"\nstopped at step {last}; {way}" in capsys.readouterr().err
    assert log_of("run")[-1]["grad_norm"] is None  # though no line was due


def test_a_run_whose_last_validation_loss_is_not_finite_has_failed(monkeypatch, capsys):
    evaluate, results = train.evaluate, [{}, {"val_loss": math.nan}]
    monkeypatch.setattr(train, "evaluate", lambda *x: evaluate(*x) | results.pop(0))
    monkeypatch.setattr(train, "try_evaluation", lambda *_: None)
    assert refused() == f"the validation loss after step 8 is not finite{IF_DIVERGED}"
    assert AGAIN in capsys.readouterr().err


def test_weights_and_buffers_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    """Gradients may be finite all the while, as for a gate's bias."""
    update, calls = DeepSeekV3.update_bias, itertools.count(1)

    def poisoned(model, gamma):
        update(model, gamma)
        if next(calls) == 3:
            model.layers[1].mlp.gate.e_score_correction_bias[0] = math.nan

    monkeypatch.setattr(DeepSeekV3, "update_bias", poisoned)
    sentence = refused("--save_every=1")
    name = "layers.1.mlp.gate.e_score_correction_bias"
    assert sentence == f"{name} is not finite after step 3{IF_DIVERGED}"
    assert CONTINUE.format(2) in capsys.readouterr().err
    assert load("run")["step"] == 2


@pytest.mark.parametrize("mistake", [np.float64(0.5), {np.int64(1): 2}, [b"", {1}]])
def test_a_state_that_could_not_be_opened_again_is_an_error_before_it_is_written(
    mistake, monkeypatch
):
    monkeypatch.setattr(checkpoints.RandomNumbers, "state_dict", lambda self: {"mine": mistake})
    with pytest.raises(TypeError, match="only tensors, numbers and text may be saved"):
        run("--steps=1")
    assert not [*Path("run").glob("ckpt.pt*")]


# ---- Checkpoints of strangers --------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("made by a checkpoint"),)


def moment_of(saved: dict) -> dict:
    return saved["AdamW 0"]["state"]["norm.weight"]


# A fused optimiser would read and write beyond the memory of a moment of another shape.
OPTIMISER = r"cannot be resumed: .*; use --init_from\.$"
EDITS = {
    "code": (r"is damaged, or no .* \(it holds '", lambda x: x.update(random=Evil())),
    "another shape": (OPTIMISER, lambda x: moment_of(x).update(exp_avg=torch.zeros(3, 3))),
    "no dimensions": (OPTIMISER, lambda x: moment_of(x).update(exp_avg=torch.zeros(()))),
    "an empty step": (OPTIMISER, lambda x: moment_of(x).update(step=torch.zeros(0))),
    "other names": (OPTIMISER, lambda x: x["AdamW 0"]["names"].reverse()),
    "another group": (OPTIMISER, lambda x: x["AdamW 0"]["param_groups"].pop()),
}


@pytest.mark.parametrize("sentence, edit", EDITS.values(), ids=EDITS)
def test_an_edited_checkpoint_runs_no_code_and_reaches_no_other_memory(sentence, edit, begun):
    edit(saved := load("run"))
    torch.save(saved, "run/ckpt.pt")
    assert re.match(f"run/ckpt.pt {sentence}", refused("--resume", "--steps=2"))
    assert not Path("made by a checkpoint").exists()


def test_a_flipped_bit_in_a_checkpoint_is_noticed(begun):
    content = bytearray((begun / "ckpt.pt").read_bytes())
    content[content.index(b"/data/0") + 300] ^= 4
    (begun / "ckpt.pt").write_bytes(content)
    assert re.match("run/ckpt.pt is damaged", refused("--resume"))


def test_random_numbers_go_on_where_they_were_saved():
    """As a dropout needs."""
    states = checkpoints.RandomNumbers(MACHINE)
    saved, expected = states.state_dict(), torch.rand(3)
    states.load_state_dict(saved)
    assert torch.equal(torch.rand(3), expected)
