"""The folder of a run: nothing is lost, nothing foreign is touched, and a run goes on bit for bit.

KILLS=100 SEED=2 python -m pytest tests/test_runs.py -k sigkill     more, and other kills
COMPILE=1 python -m pytest tests/test_runs.py -k bit_for_bit        --compile, too (minutes)
"""

import fcntl
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from training import (
    CONSTANT,
    SHORT,
    SHOW_RESULT,
    TINY,
    assert_same,
    assert_same_run,
    edited,
    finish,
    give_losses,
    load,
    log_of,
    refused,
    run,
    wait_for,
)  # fmt: skip

import train
from huggingface import load_model
from model import DeepSeekV3, ModelConfig
from support import checkpoints, clock, runs

pytestmark = pytest.mark.usefixtures("workplace")


# ---- Going on ------------------------------------------------------------------------------------

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
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(options, shared, faults, capsys):
    # In the fifth step, between two lines of the log where these come every third step.
    faults.signal(signal.SIGTERM, step=4)
    with pytest.raises(KeyboardInterrupt):
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
    changed = "mtp_weight = 0.5\nrope_theta = 9.0\n"
    Path("my.py").write_text(Path(TINY).read_text() + changed)
    options = ("--weight_decay=2", "--clip=1e-9", "--beta1=0", "--beta2=0", "--lr=0.5")
    train.main(["my.py", "--out=run", "--resume", "--steps=3", *options])
    said = capsys.readouterr().err.splitlines()
    kept = [line for line in said if " stays " in line]  # of those given here none
    assert not {"steps", "lr"} & {line.split()[0] for line in kept}
    assert "rope_theta stays 10000.0 (the config file has 9.0)" in kept
    assert "mtp_weight stays 0.3 (the config file has 0.5)" in kept
    assert {"steps is now 3 (was 2)", "lr is now 0.5 (was 0.01)"} <= {*said}
    state = load("run")
    values, after = state["train_config"], state["model"]["lm_head.weight"]
    assert log_of("run")[-2]["lr"] == 0.5 and after.dtype == torch.float64
    assert (state["step"], values["batch_size"], values["mtp_weight"]) == (3, 4, 0.3)
    # lr * weight_decay = 1 wipes the weight out, and the clipped gradient is far below Adam's eps
    assert after.abs().max() < 1e-2 < before.abs().max()


def test_a_finished_run_can_go_on_for_longer(shared):
    run(*CONSTANT, "--steps=4")
    before = Path("run/ckpt.pt").stat().st_mtime_ns
    run(*CONSTANT, "--steps=3", "--resume")
    assert Path("run/ckpt.pt").stat().st_mtime_ns == before
    train.main(["--out=run", "--resume", "--steps=8"])  # a run needs no config file
    assert_same_run(shared(*CONSTANT), Path("run"))


def test_steps_of_the_past_do_not_have_to_fit_a_resumed_run():
    """A batch that has grown can be cut into more parts than the first one."""
    ramp = ("--batch_start=2", "--batch_ramp=0.3")
    run("--steps=4", *ramp)
    more = (*ramp, "--steps=8", "--grad_accum=4")
    assert "the 32 tokens of step 0 are no multiple of 4" in refused("--overwrite", *more)
    assert load(run("--resume", *more))["step"] == 8


def test_a_checkpoint_comes_before_every_evaluation_which_a_resumed_run_makes_up_for(shared):
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


def test_a_log_is_cut_to_the_step_that_a_run_goes_on_from():
    """Later lines, half a line and what is no line go; if it cannot be written, it stays."""
    run("--steps=4")
    log = Path("run/log.jsonl")
    good = log.read_bytes()
    late = b'{"step": 5, "tokens": 9, "val_loss": 1}\n'
    log.write_bytes(late + good + b'}{\n[1]\n{"loss": 1}\n\xff\n' + late + b'{"step": 1, "tok')
    before = log.read_bytes()
    with mock.patch.object(os, "replace", side_effect=OSError("no space")):
        assert "cannot write run/log.jsonl (no space)" in refused("--resume", "--steps=4")
    assert log.read_bytes() == before
    run("--resume", "--steps=4")
    assert log.read_bytes() == good and b'"val_loss"' in good


def test_random_numbers_drawn_in_training_go_on_where_they_were(monkeypatch):
    lr_at = train.lr_at
    monkeypatch.setattr(train, "lr_at", lambda *x: lr_at(*x) * torch.rand(1).item())
    straight = run(*CONSTANT, "--steps=4", out="straight")
    run(*CONSTANT, "--steps=2")
    torch.rand(9)  # another process would not know the state either
    run(*CONSTANT, "--steps=4", "--resume")
    lrs = [line["lr"] for line in log_of(straight) if "lr" in line]
    assert len({*lrs}) == 4 and lrs == [line["lr"] for line in log_of("run") if "lr" in line]


class Counting(torch.optim.SGD):
    """Counts in its group and, as an int, in the state of every parameter."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                self.state[p]["n"] = self.state[p].get("n", 0) + group["k"]


def counting(model, config):
    groups = [{"params": [*model.parameters()], "k": 0, "lr_scale": 1.0, "momentum": 0.9}]
    return [Counting(groups, config.lr, weight_decay=config.weight_decay)]


def one_group(kind):
    return lambda model, config: [
        kind([{"params": [*model.parameters()], "lr_scale": 1.0}], config.lr)
    ]


OPTIMISERS = {"Counting": counting} | {  # SGD keeps nothing, NAdam a tensor without dimensions
    kind.__name__: one_group(kind)
    for kind in (torch.optim.SGD, torch.optim.NAdam, torch.optim.Adam)
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_whole_state_of_any_optimiser_goes_on(name, monkeypatch):
    monkeypatch.setattr(train, "make_optimizers", OPTIMISERS[name])
    options = (*CONSTANT, "--dtype=float32")  # to which torch casts what it loads
    straight = run(*options, "--steps=4", out="straight")
    run(*options, "--steps=2")
    run(*options, "--steps=4", "--resume")
    for key in ("model", f"{name} 0", "tokens"):
        assert_same(load(straight)[key], load("run")[key])


def test_settings_of_an_optimiser_that_the_command_changes_are_changed(monkeypatch):
    made = []
    monkeypatch.setattr(train, "make_optimizers", lambda *x: made.extend(counting(*x)) or made)
    run(*CONSTANT, "--steps=4")
    state = load("run")["Counting 0"]
    assert state["param_groups"][0]["k"] == 4
    assert state["state"]["norm.weight"]["n"] == 1 + 2 + 3 + 4
    made.clear()
    run(*CONSTANT, "--steps=5", "--resume", "--weight_decay=0.25")
    (group,) = made[0].param_groups
    assert (group["k"], group["weight_decay"], group["momentum"]) == (5, 0.25, 0.9)


def test_a_new_mean_in_the_log_needs_one_line_and_breaks_no_older_run(monkeypatch):
    """Its mean is over the steps that had it."""
    run(*CONSTANT, "--steps=2", "--log_every=4")
    advance = runs.Run.advance

    def with_one_more(self, tokens, finite, means, **now):
        return advance(self, tokens, finite, means | {"mine": torch.tensor(2.0)}, **now)

    monkeypatch.setattr(runs.Run, "advance", with_one_more)
    run(*CONSTANT, "--steps=6", "--log_every=4", "--resume")
    lines = [line for line in log_of("run") if "loss" in line]
    assert [line.get("mine") for line in lines] == [None, 2.0, 2.0]


def test_a_state_by_the_name_of_a_setting_is_an_error_and_not_lost(monkeypatch):
    by_name = checkpoints.by_name
    monkeypatch.setattr(
        checkpoints, "by_name", lambda *x: {"tokens": torch.nn.Identity()} | by_name(*x)
    )
    with pytest.raises(TypeError, match="tokens"):
        run("--steps=1")


def test_what_could_not_be_opened_again_is_an_error_and_replaces_no_checkpoint(monkeypatch):
    """torch.save writes a NumPy number, and torch.load refuses it."""
    thing, by_name = (
        mock.Mock(**{"state_dict.side_effect": [1.0, np.float64(1)]}),
        checkpoints.by_name,
    )
    monkeypatch.setattr(checkpoints, "by_name", lambda *x: {"mine": thing} | by_name(*x))
    with pytest.raises(TypeError, match=r"holds numpy.*but only tensors, numbers and text may be"):
        run("--save_every=1")
    assert load("run")["mine"] == load("run")["step"] == 1
    assert not [*Path("run").glob("*.tmp")]


def test_a_run_starts_from_a_file_of_weights_alone(begun, capsys):
    """As one makes it in Python; its settings are those of the network."""
    saved = load(begun)
    torch.save({key: saved[key] for key in ("model", "model_config")}, begun / "mine.pt")
    run("--init_from=run/mine.pt", "--steps=1", out="new")
    assert "start: from run/mine.pt\n" in capsys.readouterr().err


def test_a_checkpoint_has_the_digits_of_model_py_as_the_run_began(shared, monkeypatch, capsys):
    """A file that is edited meanwhile is not what this process computes."""
    assert checkpoints.code_of(ModelConfig) == load(shared())["code"]
    load_model(shared())
    assert "another model.py" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoints, "file_source", lambda path: "edited")
    assert checkpoints.code_of(ModelConfig) == load(shared())["code"]
    checkpoints.code_of.cache_clear()  # another process
    load_model(shared())
    assert "another model.py" in capsys.readouterr().err
    checkpoints.code_of.cache_clear()


# ---- The best checkpoint -------------------------------------------------------------------------


def test_which_evaluation_replaces_the_best_checkpoint(monkeypatch):
    """Not an equal one; once YaRN is on the first that is a number, then lower ones."""
    write, saved = runs.write_whole, []

    def watched(path, *rest):
        write(path, *rest)
        if path.suffix == ".pt":
            saved.append((path.stem, load(path.parent, path.name)["step"]))

    monkeypatch.setattr(runs, "write_whole", watched)
    losses = (2.0, 2.0, 1.0, math.nan, 5.0, 6.0, 5.0, 4.0)
    give_losses(monkeypatch, *losses)
    options = ("--steps=16", "--eval_every=2", "--save_every=3")
    run(*options, "--long_block_size=32", "--long_start=0.375")
    assert [step for name, step in saved if name == "best"] == [2, 6, 10, 16]
    steps = [step for name, step in saved if name == "ckpt"]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]
    logged = [x["val_loss"] for x in log_of("run") if "val_loss" in x]
    assert logged == [None if math.isnan(x) else x for x in losses]
    best = load("run", "best.pt")
    assert (best["val_loss"], best["val_bpb"]) == (4.0, 2.0)
    assert checkpoints.checkpoint_file("run").name == "best.pt"  # what the folder means
    Path("run/best.pt").unlink()
    assert checkpoints.checkpoint_file("run").name == "ckpt.pt"


@pytest.mark.parametrize(
    "changed", ["", "val.bin", "train.bin", "--block_size=8", "--eval_tokens=99"]
)
def test_losses_are_compared_on_the_same_text_in_the_same_windows(
    changed, data, monkeypatch, capsys
):
    """By another name a text is the same; prepared anew, it may differ in one id."""
    shutil.copytree(data, "data/mine")
    give_losses(monkeypatch, 2.0, 3.0, 9.0, 9.0)
    run("--data=mine")
    if changed.endswith(".bin"):
        with open(f"data/mine/{changed}", "r+b") as file:
            file.seek(1024 + 2 * 500)
            file.write(b"\1\0")
    options = [changed] if changed.startswith("--") else []
    run("--resume", "--steps=9", "--data=data/mine", *options)
    told = "the text, eval_tokens or block_size is another one now" in capsys.readouterr().err
    found = told, load("run", "best.pt")["step"], load("run", "best.pt")["val_loss"]
    assert found == ((True, 8, 9.0) if changed else (False, 4, 2.0))


# ---- The folder ----------------------------------------------------------------------------------


def test_with_overwrite_a_run_is_put_aside_whole(begun, capsys):
    (begun / "photo.png").touch()  # a foreign file, too
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    run("--steps=2", "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("run.old-1").iterdir()} == before
    assert "run, which was there, is now run.old-1\n" in capsys.readouterr().err
    assert [x["step"] for x in log_of("run")] == [1, 2, 2]
    assert not Path("run/photo.png").exists()


def test_a_run_that_ended_before_its_first_line_is_in_no_way(shared):
    """It has left an empty log and the tokenizer's files. And a missing compiler is told."""
    lacking = torch._dynamo.exc.ShortenTraceback("no g++", first_useful_frame=None)
    with mock.patch.object(torch.optim.AdamW, "step", side_effect=lacking):
        assert "--compile cannot be used here (no g++)" in refused()
        stop = mock.patch.object(train, "lr_at", lambda *_: signal.raise_signal(2) or 0.1)
        with stop, pytest.raises(KeyboardInterrupt):  # a killed compiler is no lacking one
            run()
    assert Path("run/log.jsonl").read_bytes() == b""
    assert "has no ckpt.pt to go on from: begin without --resume" in refused("--resume")
    run("--steps=1")
    assert not Path("run.old-1").exists() and load("run")["step"] == 1


def test_copies_of_read_only_data_can_be_written_to():
    shutil.copytree("data/tiny", "data/closed")
    for file in Path("data/closed").iterdir():
        file.chmod(0o444)
    run("--steps=1", "--data=closed")
    assert all(path.stat().st_mode & 0o200 for path in Path("run").iterdir())


def test_a_folder_has_one_writer_and_many_readers(start, capsys):
    (writer,) = start("--steps=5000", "--save_every=1", "--eval_every=1")
    wait_for(lambda: "step 2/" in writer.log.read_text())
    for options in (["--resume"], ["--overwrite"]):
        assert "another train.py is writing to run" in refused(*options)
    train.main([TINY, "--out=run", *SHORT, "--eval_only"])
    assert json.loads(capsys.readouterr().out)["val_loss"] > 0
    writer.kill()
    writer.join(60)
    for name in ("ckpt.pt.tmp", "mine.tmp"):  # what a killed writer has left is written over
        Path("run", name).touch()
    run("--resume", "--steps=1")
    assert Path("run/mine.tmp").exists()
    run("--resume", f"--steps={load('run')['step'] + 1}")
    assert [path.name for path in Path("run").glob("*.tmp")] == ["mine.tmp"]


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_is_put_aside_while_it_is_locked_is_refused(anew, monkeypatch):
    """By another train.py, between our opening of .lock and our lock, which would be of no use."""
    flock = fcntl.flock

    def late(file, how):
        Path("run").rename("aside")
        if anew:
            Path("run").mkdir()
            Path("run/.lock").touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert "another train.py is writing to run" in refused("--steps=1")


def test_a_run_that_another_has_made_before_our_lock_stays(shared, monkeypatch):
    flock, made = fcntl.flock, shared("--steps=1")

    def late(file, how):
        shutil.copytree(made, "run", dirs_exist_ok=True)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert "run holds a run: give --resume, --overwrite, or" in refused()


def test_a_folder_that_is_renamed_while_a_checkpoint_is_written_is_noticed(monkeypatch):
    save = torch.save

    def renaming(*args):
        save(*args)
        Path("run").rename("moved")

    monkeypatch.setattr(torch, "save", renaming)
    assert "run has been renamed" in refused("--save_every=1")
    assert Path("moved/log.jsonl").exists()


def test_a_renamed_folder_is_noticed_before_anything_is_written(faults):
    """Another run may have begun under its name by then."""

    def rename():
        Path("run").rename("moved")
        run("--steps=1", "--seed=2")
        shutil.copytree("run", "other")

    faults.at_step(2, rename)
    sentence = refused("--save_every=1")
    assert "run has been renamed" in sentence and "--resume" in sentence
    assert load("moved")["step"] == 2
    for file in Path("other").iterdir():
        assert file.read_bytes() == Path("run", file.name).read_bytes()
    assert load(run("--resume", out="moved"))["step"] == 8


def test_a_resumed_run_keeps_no_old_checkpoint_on_the_disk(begun, faults):
    """A file that is mapped takes up its space although it has been replaced."""
    mapped, own = [], str((begun / "ckpt.pt").resolve())
    faults.at_step(1, lambda: mapped.append(own in Path("/proc/self/maps").read_text()))
    run("--resume", "--steps=2")
    assert mapped == [False]


# ---- Accidents -----------------------------------------------------------------------------------


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
    """A second signal is the system's own."""
    before = signal.getsignal(number)

    def close():
        monkeypatch.setattr("sys.stderr", open("/dev/full", "w"))  # noqa: SIM115
        signal.raise_signal(number)
        assert signal.getsignal(number) == before

    faults.at_step(2, close)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert load("run")["step"] == 3


def test_under_torchrun_one_process_may_get_a_signal_twice(faults, monkeypatch):
    """From a scheduler, which sends it to all processes, and from torchrun, which sends it on."""
    monkeypatch.setenv("RANK", "0")
    faults.at_step(2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert load("run")["step"] == 3


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_step_that_fails_after_a_signal_is_told_by_each_process(
    rank, faults, monkeypatch, capsys
):
    def fail():
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("a bug")

    monkeypatch.setenv("RANK", rank)
    faults.at_step(0, fail)
    with pytest.raises(KeyboardInterrupt):
        run()
    said = r"in fail\n(.*\n)*RuntimeError: a bug\nthe step failed; nothing is saved: begin again"
    assert re.search(said, capsys.readouterr().err)


def test_a_signal_that_is_ignored_stays_so(faults):
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faults.signal(signal.SIGHUP, step=0)
    try:
        run("--steps=2")
    except KeyboardInterrupt:
        pytest.fail("the run has heard it")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load("run")["step"] == 2


def test_a_signal_whose_handler_python_has_not_set_up_is_left_alone():
    get = signal.getsignal
    with mock.patch.object(signal, "getsignal", lambda x: get(x) if x != signal.SIGHUP else None):
        run("--steps=1")  # at its end the handlers from before are set again
    assert get(signal.SIGHUP) is signal.SIG_DFL


BAD = ", whose gradient was not finite"


@pytest.mark.parametrize(
    ("before", "bad", "words"),
    [
        (1, 0, "; go on from step 2, in run/ckpt.pt, with --resume."),
        (1, 1, f"{BAD}; go on from step 1, in run/ckpt.pt, with --resume."),
        (0, 2, f"{BAD}; nothing is saved: begin again with --overwrite."),
    ],
)
def test_a_run_stopped_at_step_2_says_truly_where_it_can_go_on(before, bad, words, faults, capsys):
    if before:
        run("--steps=1")
    faults.bad_gradients(*range(1, bad + 1))
    faults.signal(signal.SIGTERM, step=1)
    with pytest.raises(KeyboardInterrupt):
        run("--save_every=1", "--resume" if before else "--overwrite")
    assert f"stopped at step 2{words}" in capsys.readouterr().err
    saved = 2 - bad
    assert saved == (load("run")["step"] if Path("run/ckpt.pt").exists() else 0)
    run("--resume" if saved else "--overwrite", "--steps=3")


FULL = {
    "run/tokenizer.tiktoken": (0, lambda: 20, "what it held before is intact"),
    "run/log.jsonl": (4, lambda: Path("run/log.jsonl").stat().st_size, "go on from step 4, in run"),
    "run/ckpt.pt": (4, lambda: 60_000, "what it held before is intact"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_told_with_the_files_name_and_loses_nothing(name, faults):
    step, size, words = FULL[name]
    if step == 0:
        faults.full_disk(size())
    else:
        faults.at_step(step, lambda: faults.full_disk(size()))
    said = refused("--save_every=1")
    assert re.match(rf"cannot write (to )?{name} \(.*File too large\)", said) and words in said
    assert not [*Path("run").glob("*.tmp")]
    assert not step or (load("run")["step"], load("run", "best.pt")["step"]) == (4, 4)


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(part, begun):
    content = bytearray((begun / "ckpt.pt").read_bytes())
    content[content.index(f"/{part}".encode()) + 300] ^= 4
    (begun / "ckpt.pt").write_bytes(content)
    assert re.match("run/ckpt.pt is damaged", refused("--resume"))


def test_a_run_ends_well_though_its_data_are_deleted_meanwhile(faults, monkeypatch, data, capsys):
    """The closing sample has the run's own tokenizer."""
    shutil.copytree(data, "data/mine")
    faults.at_step(1, lambda: shutil.rmtree("data/mine"))
    monkeypatch.setattr(train, "show_result", SHOW_RESULT)
    run("--data=mine", "--steps=2")
    assert "best validation loss" in capsys.readouterr().err


@pytest.mark.parametrize("share, threads", [(0.2, 2), (0.3, 2), (0.3, 1)])
def test_that_other_programs_keep_a_run_waiting_is_said_once(share, threads, monkeypatch, capsys):
    """And from the tenth step on how long it still takes. One thread is no advice to one thread."""
    monkeypatch.setattr(clock, "seconds_waited", lambda: share * time.perf_counter())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    run("--steps=14", "--log_every=2")
    said, busy = capsys.readouterr().err, share > 0.25
    assert said.count("the cores are busy") == busy
    assert said.count("OMP_NUM_THREADS=1") == (busy and threads > 1)
    left = [" left" in line for line in said.splitlines() if ": loss " in line]
    assert left == [False] * 4 + [True] * 3


@pytest.mark.parametrize("every", [1, 3])
def test_the_time_of_a_save_is_no_time_of_training(every, monkeypatch):
    """By a clock on which a step takes one second and a save a thousand."""
    now, windows, write = [0.0], train.train_windows, runs.write_whole

    def wait(seconds: int):
        now[0] += seconds

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train, "train_windows", lambda *x: wait(1) or windows(*x))
    monkeypatch.setattr(runs, "write_whole", lambda *x: wait(1000) or write(*x))
    run(f"--save_every={every}", "--log_every=2")
    lines = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
    assert {line["tokens_per_s"] for line in lines if "loss" in line} == {64.0}


# ---- Numbers that are not finite -----------------------------------------------------------------

ANEW = "begin anew with --init_from=run/best.pt, another --out and a lower --lr"
AGAIN = "begin again with --overwrite and a lower --lr"


@pytest.mark.parametrize(
    ("bad", "steps", "every", "way"),
    [
        (range(6, 99), 40, 1, ANEW),  # from step 5 it would be the same
        (range(6, 99), 8, 1, ANEW),
        (range(4, 99), 4, 1, AGAIN),
        (range(2, 99), 40, 3, ANEW),
        (range(8, 99), 40, 4, "go on from step 4, in run/ckpt.pt, with --resume and a lower --lr"),
        (range(4, 99), 4, 2, "go on from step 2, in run/ckpt.pt, with --resume and a lower --lr"),
    ],
)
def test_a_diverging_run_stops_or_has_failed_at_its_end(bad, steps, every, way, faults):
    """Where the weights of ckpt.pt themselves have led to the bad gradients, it is of no use."""
    faults.bad_gradients(*bad)
    said = refused(f"--steps={steps}", f"--save_every={every}", "--log_every=50")
    last = min(bad[0] + 4, steps)
    told = f"{last - bad[0] + 1} gradient(s) up to step {last} are not finite"
    assert said == f"{told}; {way}, or mend the edit that makes them so."
    assert log_of("run")[-1]["grad_norm"] is None  # though no line was due


def test_a_checkpoint_that_is_due_in_bad_steps_comes_after_the_next_good_one(faults, monkeypatch):
    save, saved = runs.Run.save, []
    monkeypatch.setattr(runs.Run, "save", lambda run: saved.append(run.progress.step) or save(run))
    faults.bad_gradients(2, 3)
    run("--save_every=2", "--eval_every=8")
    assert saved == [4, 6, 8]
    saved.clear()
    faults.bad_gradients(4, 5, 8)  # in step 4 an evaluation, too
    run("--save_every=8", "--steps=9", "--overwrite")
    assert saved == [6, 9]


def test_weights_and_buffers_that_are_not_finite_are_never_saved(monkeypatch):
    """Gradients may be finite all the while, as for a gate's bias."""
    update, calls = DeepSeekV3.update_bias, itertools.count(1)

    def poisoned(model, gamma):
        update(model, gamma)
        if next(calls) == 3:
            model.layers[1].mlp.gate.e_score_correction_bias[0] = math.nan

    monkeypatch.setattr(DeepSeekV3, "update_bias", poisoned)
    sentence = refused("--save_every=1")
    assert "layers.1.mlp.gate.e_score_correction_bias is not finite after step 3" in sentence
    assert sentence.endswith("go on from step 2, in run/ckpt.pt, with --resume and a lower --lr.")
    assert load("run")["step"] == 2


def test_a_run_whose_last_weights_are_spoilt_has_failed(monkeypatch):
    """They may be finite, as after --lr=1e37, and so may the loss before them."""
    give_losses(monkeypatch, math.nan, 2.0, math.nan)
    sentence = refused("--steps=1")
    assert "the validation loss after step 1 is not finite; begin again with --over" in sentence
    assert not Path("run/best.pt").exists()
    sentence = refused("--steps=2", "--eval_every=1", out="new")
    assert "step 2 is not finite; begin anew with --init_from=new/best.pt, another" in sentence


# ---- Checkpoints of strangers --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", ".lock"])
def test_nothing_is_written_through_a_link_out_of_a_strangers_folder(name, begun, faults):
    faults.link(begun / name)
    for there in (False, True):
        with pytest.raises(OSError, match=name):
            run("--resume", "--steps=2")
        assert Path("elsewhere").exists() == there
        Path("elsewhere").write_text("mine")
    assert Path("elsewhere").read_text() == "mine"


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("made by a checkpoint"),)


@pytest.mark.parametrize("options", [["--resume"], ["--out=new", "--init_from=run/ckpt.pt"]])
def test_nothing_in_a_checkpoint_can_run_code(options, begun):
    with edited(begun / "ckpt.pt") as saved:
        saved["random"] = Evil()
    said = refused(*options, "--steps=2")
    assert "is damaged, or no checkpoint of train.py (it holds '" in said and "\x1b" not in said
    assert not Path("made by a checkpoint").exists()


MOMENTS = {
    "another shape": lambda x: x["state"]["norm.weight"].update(exp_avg=torch.zeros(3, 3)),
    "no dimensions": lambda x: x["state"]["norm.weight"].update(exp_avg=torch.zeros(())),
    "an empty step": lambda x: x["state"]["norm.weight"].update(step=torch.zeros(0)),
    "other names": lambda x: x["names"].reverse(),
    "another group": lambda x: x["param_groups"].pop(),
}


@pytest.mark.parametrize("edit", MOMENTS.values(), ids=MOMENTS)
def test_a_fused_optimiser_gets_no_moment_of_another_shape(edit, begun):
    """It would read and write beyond its memory."""
    with edited(begun / "ckpt.pt") as saved:
        edit(saved["AdamW 0"])
    said = refused("--resume", "--steps=2")
    assert re.fullmatch("run/ckpt.pt cannot be resumed: .*; use --init_from.", said)


def test_moments_lie_in_memory_as_their_weights_do(begun):
    """Those of a stranger may lie otherwise, and a fused optimiser does not look."""
    shutil.copytree(begun, "straight")
    with edited(begun / "ckpt.pt") as saved:
        moments = saved["AdamW 0"]["state"]["lm_head.weight"]
        moments["exp_avg"] = moments["exp_avg"].T.contiguous().T
        saved["AdamW 0"]["param_groups"][0]["params"] = []  # which say whose moments are whose
    assert not load("run")["AdamW 0"]["state"]["lm_head.weight"]["exp_avg"].is_contiguous()
    for out in ("run", "straight"):
        run("--resume", *CONSTANT, "--steps=2", out=out)
    assert_same_run(Path("straight"), begun)
