"""The folder of a run: nothing is lost, nothing foreign is touched, and a run goes on bit for bit.

KILLS=100 SEED=2 python -m pytest tests/test_runs.py -k sigkill     more, and other kills
COMPILE=1 python -m pytest tests/test_runs.py -k bit_for_bit        --compile, too (minutes)
"""

import errno
import fcntl
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from training import (
    CONSTANT,
    SHORT,
    SHOW_RESULT,
    TEXT,
    TINY,
    assert_alike,
    assert_same_run,
    finish,
    give_losses,
    load,
    log_of,
    refused,
    run,
    wait_for,
)  # fmt: skip

import prepare_data
import train
from huggingface import load_model
from model import DeepSeekV3, ModelConfig
from support import checkpoints, runs
from support.checkpoints import load_checkpoint

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
    said = capsys.readouterr().err
    kept = [x for x in said.splitlines() if " stays " in x]  # of those given here none
    assert not {"steps", "lr"} & {x.split()[0] for x in kept}
    assert "rope_theta stays 10000.0 (the config file has 9.0)" in kept
    assert "mtp_weight stays 0.3 (the config file has 0.5)" in kept
    assert "steps is now 3 (was 2)" in said and "lr is now 0.5 (was 0.01)" in said
    state = load("run")
    values, after = state["train_config"], state["model"]["lm_head.weight"]
    assert log_of("run")[-2]["lr"] == 0.5 and after.dtype == torch.float64
    assert (state["step"], values["batch_size"], values["mtp_weight"]) == (3, 4, 0.3)
    # lr * weight_decay = 1 wipes the weight out, and the clipped gradient is far below Adam's eps
    assert after.abs().max() < 1e-2 < before.abs().max()


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


def test_steps_of_the_past_do_not_have_to_fit_a_resumed_run():
    """A batch that has grown can be cut into more parts than the first one."""
    ramp = ("--batch_start=2", "--batch_ramp=0.3")
    run("--steps=4", *ramp)
    more = (*ramp, "--steps=8", "--grad_accum=4")
    assert "the 32 tokens of step 0 are no multiple of 4" in refused("--overwrite", *more)
    assert load(run("--resume", *more))["step"] == 8


def test_another_tokenizer_is_refused_on_resume(shared):
    out = Path(shutil.copytree(shared("--steps=1"), "run"))
    before = (out / "ckpt.pt").read_bytes()
    prepare_data.prepare(prepare_data.DataConfig(TEXT, "other", vocab_size=512, val_fraction=0.4))
    for options in (["--resume"], ["--out=new", "--init_from=run"]):
        sentence = refused("--data=other", *options)
        assert "another tokenizer" in sentence and "--tokenizer=run" in sentence
    assert (out / "ckpt.pt").read_bytes() == before


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


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(part, shared):
    shutil.copytree(shared("--steps=1"), "run")
    content = bytearray(Path("run/ckpt.pt").read_bytes())
    content[content.index(f"/{part}".encode()) + 300] ^= 4
    Path("run/ckpt.pt").write_bytes(content)
    assert re.match("run/ckpt.pt is damaged", refused("--resume"))


def test_a_resumed_run_keeps_no_old_checkpoint_on_the_disk(monkeypatch):
    """A file that is mapped takes up its space although it has been replaced."""
    run("--steps=4")
    mapped = []

    def look(*arguments):
        mapped.append(str(Path("run/ckpt.pt").resolve()) in Path("/proc/self/maps").read_text())
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
    ranks = start("--resume", world=world, setup=setup)
    ranks[0].join(60)
    said = ranks[0].log.read_text()
    error = said.splitlines()[-1]
    assert re.match(r"error: cannot write \S+ \(.*File too large\); what it held before", error)
    assert said.count("error") == 1 and "Traceback" not in said
    assert {name: Path(f"run/{name}").read_bytes() for name in before} == before
    assert not list(Path("run").glob("*.tmp"))


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


def test_best_checkpoint_has_the_lowest_loss(monkeypatch):
    give_losses(monkeypatch, 3.0, 2.0, 2.5)
    with pytest.raises(StopIteration):  # dies at the fourth evaluation
        run("--eval_every=1", "--save_every=8")
    assert load("run")["step"] == 4 and load("run", "best.pt")["step"] == 2
    give_losses(monkeypatch, 2.0, 2.1, math.nan, 2.2)
    best = load(run("--eval_every=2", "--resume", "--steps=10"), "best.pt")
    assert (best["step"], best["val_loss"], best["val_bpb"]) == (2, 2.0, 1.0)
    losses = [x["val_loss"] for x in log_of("run") if "val_loss" in x]
    assert losses == [3.0, 2.0, 2.5, 2.0, 2.1, None, 2.2]
    give_losses(monkeypatch, 9.0, 9.0)  # in other windows: not to be compared
    assert load(run("--resume", "--steps=11", "--block_size=8"), "best.pt")["val_loss"] == 9.0


@pytest.mark.parametrize("name", ["other", "again"])
def test_losses_on_another_text_are_not_compared(monkeypatch, data, name):
    """Of another name, or made anew with the same."""
    shutil.copytree(data, "data/again")
    give_losses(monkeypatch, 2.0, 3.0, 3.0, 9.0, 9.0)
    run("--data=again")
    run("--resume", "--data=again")
    assert load("run", "best.pt")["val_loss"] == 2.0 != 9.0
    asked = prepare_data.DataConfig(TEXT, name, tokenizer=str(data), val_fraction=0.4)
    prepare_data.prepare(replace(asked, overwrite=True))
    best = load(run("--resume", "--steps=9", f"--data={name}"), "best.pt")
    assert (best["step"], best["val_loss"]) == (8, 9.0)


def test_the_best_checkpoint_is_one_of_the_last_phase(monkeypatch):
    give_losses(monkeypatch, 1.0, 2.0, 2.0, 3.0)
    run(*CASES["long"])
    run("--resume", "--steps=12")
    assert load("run", "best.pt")["step"] == 8


def test_which_evaluation_replaces_the_best_checkpoint(monkeypatch):
    """Not an equal one; once YaRN is on the first that is a number, then lower ones."""
    write, saved = runs.write_whole, []

    def watched(path, *rest):
        write(path, *rest)
        if path.suffix == ".pt":
            saved.append((path.stem, load(path.parent, path.name)["step"]))

    monkeypatch.setattr(runs, "write_whole", watched)
    give_losses(monkeypatch, 2.0, 2.0, 1.0, math.nan, 5.0, 6.0, 5.0, 4.0)
    options = ("--steps=16", "--eval_every=2", "--save_every=3")
    run(*options, "--long_block_size=32", "--long_start=0.375")
    assert [step for name, step in saved if name == "best"] == [2, 6, 10, 16]
    steps = [step for name, step in saved if name == "ckpt"]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]


def test_a_text_that_has_changed_since_is_told(data, capsys):
    """Prepared anew with the same name, validation text and length: in one id of the training."""
    shutil.copytree(data, "data/mine")
    run("--data=mine", "--steps=1")
    run("--data=mine", "--steps=2", "--resume")
    told = "the text or block_size is another one now"
    assert told not in capsys.readouterr().err
    with open("data/mine/train.bin", "r+b") as file:
        file.seek(1024 + 2 * 50_000)
        file.write(b"\1\0")
    run("--data=mine", "--steps=3", "--resume")
    assert told in capsys.readouterr().err


def test_the_same_data_by_another_name_are_compared(monkeypatch):
    give_losses(monkeypatch, 1.0, 2.0, 2.0, 2.0)
    run("--data=tiny", "--eval_every=4")
    run("--resume", "--steps=9", "--data=data/tiny")
    assert load("run", "best.pt")["step"] == 4


def test_an_existing_run_is_refused_and_with_overwrite_put_aside_whole(shared, capsys):
    shutil.copytree(shared("--steps=1"), "run")
    for name in ("plot.png", "photo.png"):  # foreign files, too
        Path("run", name).touch()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    run("--steps=2", "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("run.old-1").iterdir()} == before
    assert "run, which was there, is now run.old-1\n" in capsys.readouterr().err
    assert [x["step"] for x in log_of("run")] == [1, 2, 2]
    assert not Path("run/photo.png").exists()
    Path("run/ckpt.pt").unlink()
    assert "run holds a run: give --overwrite, or another" in refused()
    run("--steps=1", "--overwrite")
    assert load("run.old-2", "best.pt")["step"] == 2 and load("run")["step"] == 1


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


KINDS = ["data", "data with a run", "meta.json", "photo", "log", "file", "link"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_run_is_refused_and_kept(kind, data, shared):
    """With --overwrite, too: the folder of the data, one with token files, or with any file."""
    if kind.startswith("data"):
        shutil.copytree(data, "mine")
    elif kind == "file":
        Path("mine").write_bytes(b"x")
    else:
        Path("mine").mkdir()
    if kind == "data with a run":
        shutil.copyfile(shared("--steps=1") / "ckpt.pt", "mine/ckpt.pt")
    if kind == "link":
        Path("mine/photo").symlink_to("/nowhere")
    if kind == "log":  # an empty one, which a run may have left, but beside its .lock
        Path("mine/log.jsonl").touch()
        Path("mine/meta.json").write_text("mine")
    if kind in ("meta.json", "photo"):
        Path("mine", kind).write_bytes(b"{}")

    def content():
        if kind == "file":
            return Path("mine").read_bytes()
        return {x.name: x.is_symlink() or x.read_bytes() for x in Path("mine").iterdir()}

    before = content()
    for options in ([], ["--overwrite"], ["--data=mine", "--overwrite"], ["--resume"]):
        assert re.search("mine (holds|is a file|has no ckpt)", refused("--out=mine", *options))
        assert content() == before and not Path("mine.old-1").exists()


def test_copies_of_read_only_data_can_be_written_to():
    shutil.copytree("data/tiny", "data/closed")
    for file in Path("data/closed").iterdir():
        file.chmod(0o444)
    run("--steps=1", "--data=closed")
    modes = [Path("run", name).stat().st_mode for name in ("meta.json", "tokenizer.tiktoken")]
    assert all(mode & 0o200 for mode in modes)


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


def test_without_locks_training_goes_on_with_a_word(monkeypatch, capsys):
    lacking = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=lacking))
    run("--steps=1")
    assert capsys.readouterr().err.count("run cannot be locked") == 1


@pytest.mark.parametrize(("steps", "bad", "lines"), [(40, 5, 1), (40, 5, 50), (8, 3, 1)])
def test_a_diverging_run_stops_or_has_failed_at_its_end(steps, bad, lines):
    """No gradient that is not finite is saved. Where the weights of ckpt.pt themselves have led to
    such gradients, best.pt is named to begin from, and that is possible."""
    run(*CONSTANT, "--dtype=float32", "--steps=4")
    options = ("--dtype=float32", "--lr=1e30", "--save_every=1", "--eval_every=6")
    sentence = refused("--resume", f"--steps={steps}", f"--log_every={lines}", *options)
    assert log_of("run")[-1]["grad_norm"] is None  # whether a line was due or not
    anew = "begin anew with --init_from=run/best.pt, another --out and a lower --lr."
    assert sentence == f"{bad} gradient(s) up to step {5 + bad} are not finite; {anew}"
    state = load_checkpoint("run/ckpt.pt")
    assert state["step"] == 5 and all(x.isfinite().all() for x in state["model"].values())
    assert load("run", "best.pt")["step"] == 4
    run("--init_from=run/best.pt", "--lr=1e-4", "--dtype=float32", "--steps=1", out="again")
    sentence = refused(*options[:2], "--steps=8", "--save_every=3", "--out=new")
    assert "begin again with --overwrite and a lower --lr" in sentence
    with mock.patch.object(train, "lr_at", lambda c, step: 1e30 if step == 6 else 1e-3):
        sentence = refused(*CONSTANT, *options[:1], "--steps=40", "--save_every=4", "--overwrite")
    assert "go on from step 4, in run/ckpt.pt, with --resume and a lower --lr" in sentence


@pytest.mark.parametrize(
    ("every", "way"),
    [
        (1, "begin again with --overwrite and a lower --lr"),  # from step 3 it would be the same
        (2, "go on from step 2, in run/ckpt.pt, with --resume and a lower --lr"),
    ],
)
def test_a_bad_gradient_in_the_last_step_fails_with_a_way_on(every, way):
    clip, calls, bad = torch.nn.utils.clip_grad_norm_, itertools.count(1), torch.tensor(math.inf)
    stand_in = mock.Mock(side_effect=lambda *x: bad if next(calls) == 4 else clip(*x))
    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", stand_in):
        said = refused("--steps=4", f"--save_every={every}")
    assert said == f"1 gradient(s) up to step 4 are not finite; {way}."


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


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_what_keeps_a_run_waiting_is_said_once(share, monkeypatch, capsys):
    """Other programs, where the system tells that threads wait for a core over 25 % of the time.
    And how long the run takes still: from the tenth step on."""
    monkeypatch.setattr(runs, "seconds_waited", lambda: share * time.perf_counter())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    run("--steps=14", "--log_every=2")
    said = capsys.readouterr().err
    times = share > 0.25
    assert said.count("the cores are busy") == said.count("OMP_NUM_THREADS=3") == times
    times = [" left" in line for line in said.splitlines() if ": loss " in line]
    assert times == [False] * 4 + [True] * 3


def test_times_that_are_left_follow_the_speed_smoothly(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 5.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock, times = runs.Clock(0), []
    clock.steps = 10
    for tokens in (100, 200, 300):  # 100, 50 and 50 tokens/s
        clock.measure(tokens)
        times.append(clock.time_left(5000))
    assert times == [", 0:00:50 left", ", 0:00:59 left", ", 0:01:07 left"]
    assert "days" in clock.time_left(10**18)


# ---- Random numbers and optimisers of one's own --------------------------------------------------


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


def test_the_whole_state_of_any_optimiser_goes_on(monkeypatch):
    """Ints and counters in groups, too. Settings that the command changes are changed."""
    monkeypatch.setattr(train, "make_optimizers", counting)
    straight = run(*CONSTANT, "--steps=4", out="straight")
    run(*CONSTANT, "--steps=2")
    run(*CONSTANT, "--steps=4", "--resume")
    for key in ("model", "Counting 0", "tokens"):
        assert_alike(load(straight)[key], load("run")[key])
    state = load("run")["Counting 0"]
    assert state["param_groups"][0]["k"] == 4
    assert state["state"]["norm.weight"]["n"] == 1 + 2 + 3 + 4
    made = []
    monkeypatch.setattr(train, "make_optimizers", lambda *x: made.extend(counting(*x)) or made)
    run(*CONSTANT, "--steps=5", "--resume", "--weight_decay=0.25")
    (group,) = made[0].param_groups
    assert (group["k"], group["weight_decay"], group["momentum"]) == (5, 0.25, 0.9)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.NAdam, torch.optim.Adam])
def test_an_optimiser_of_torch_goes_on_whatever_it_keeps(kind, monkeypatch):
    """SGD nothing, NAdam a tensor without dimensions more."""

    def other(model, config):
        return [kind([{"params": [*model.parameters()], "lr_scale": 1.0}], config.lr)]

    monkeypatch.setattr(train, "make_optimizers", other)
    options = (*CONSTANT, "--dtype=float32")  # to which torch casts what it loads
    straight = run(*options, "--steps=4", out="straight")
    run(*options, "--steps=2")
    run(*options, "--steps=4", "--resume")
    assert_alike(load(straight)["model"], load("run")["model"])


WRONG = {
    "no optimiser has the parameter ": [],
    "more than one optimiser has the parameter norm.weight": ["norm.weight"],
    "an optimiser has a weight that is not in the model": [None],
}


@pytest.mark.parametrize(("sentence", "more"), WRONG.items())
def test_every_parameter_is_in_exactly_one_optimiser(sentence, more, monkeypatch):
    made = train.make_optimizers

    def wrong(model, config):
        (adamw,), own = made(model, config), dict(model.named_parameters())
        if not more:
            del adamw.param_groups[1]["params"][0]
        new = [own[name] if name else torch.nn.Parameter(torch.ones(3)) for name in more]
        return [adamw, *(torch.optim.SGD([p]) for p in new)]

    monkeypatch.setattr(train, "make_optimizers", wrong)
    assert sentence in refused() and not Path("run").exists()


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


# ---- What an attack found ------------------------------------------------------------------------


def test_a_checkpoint_is_on_the_disk_before_it_replaces_another():
    """A power failure leaves the old one or the new one: fsync, then the replacement."""
    calls, fsync, replace_ = [], os.fsync, os.replace

    def watched_fsync(number):
        calls.append(("fsync", os.fstat(number).st_ino))
        fsync(number)

    def watched_replace(part, path):
        calls.append(("replace", os.stat(part).st_ino))
        replace_(part, path)

    with (
        mock.patch.object(os, "fsync", watched_fsync),
        mock.patch.object(os, "replace", watched_replace),
    ):
        run("--steps=1")
    whole = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(whole) == 4  # two files of the tokenizer, ckpt.pt, best.pt
    assert all([a, b] == [("fsync", a[1]), ("replace", a[1])] for a, b in whole)


@pytest.mark.parametrize("name", ["log.jsonl", ".lock"])
def test_nothing_is_written_through_a_link_out_of_a_strangers_folder(name, shared, faults):
    shutil.copytree(shared("--steps=1"), "run")
    faults.link(Path("run", name))
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


def test_nothing_in_a_checkpoint_can_run_code(shared):
    shutil.copytree(shared("--steps=1"), "run")
    for part in ({"model_config": Evil()}, {"random": Evil()}, {"train_config": {"lr": Evil()}}):
        torch.save(load(shared("--steps=1")) | part, "run/ckpt.pt")
        for options in (["--resume"], ["--out=new", "--init_from=run/ckpt.pt"]):
            assert "is damaged, or no checkpoint of train.py" in refused(*options, "--steps=2")
        assert not Path("made by a checkpoint").exists()


MOMENTS = {
    "another shape": lambda x: x["state"]["norm.weight"].update(exp_avg=torch.zeros(3, 3)),
    "no dimensions": lambda x: x["state"]["norm.weight"].update(exp_avg=torch.zeros(())),
    "an empty step": lambda x: x["state"]["norm.weight"].update(step=torch.zeros(0)),
    "other names": lambda x: x["names"].reverse(),
    "another group": lambda x: x["param_groups"].pop(),
}


@pytest.mark.parametrize("edit", MOMENTS.values(), ids=MOMENTS)
def test_a_fused_optimiser_gets_no_moment_of_another_shape(edit, shared):
    """It would read and write beyond its memory."""
    shutil.copytree(shared("--steps=1"), "run")
    saved = load("run")
    edit(saved["AdamW 0"])
    torch.save(saved, "run/ckpt.pt")
    said = refused("--resume", "--steps=2")
    assert re.fullmatch("run/ckpt.pt cannot be resumed: .*; use --init_from.", said)


def test_moments_lie_in_memory_as_their_weights_do(shared):
    """Those of a stranger may lie otherwise, and a fused optimiser does not look."""
    shutil.copytree(shared("--steps=4"), "run")
    saved = load("run")
    moments = saved["AdamW 0"]["state"]["lm_head.weight"]
    moments["exp_avg"] = moments["exp_avg"].T.contiguous().T
    torch.save(saved, "run/ckpt.pt")
    assert not load("run")["AdamW 0"]["state"]["lm_head.weight"]["exp_avg"].is_contiguous()
    run("--resume", *CONSTANT, "--steps=5")
    shutil.copytree(shared("--steps=4"), "straight")
    run("--resume", *CONSTANT, "--steps=5", out="straight")
    assert_same_run(Path("straight"), Path("run"))


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


def test_a_run_starts_from_a_file_of_weights_alone(shared, capsys):
    """As one makes it in Python; its settings are those of the network."""
    saved, start = load(shared("--steps=1")), shutil.copytree(shared("--steps=1"), "weights")
    for name in ("best.pt", "ckpt.pt"):
        Path(start, name).unlink()
    torch.save({key: saved[key] for key in ("model", "model_config")}, "weights/mine.pt")
    run("--init_from=weights/mine.pt", "--steps=1")
    assert "start: from weights/mine.pt, step 0" in capsys.readouterr().err


def test_a_state_that_the_checkpoint_lacks_is_named(shared):
    """As in the checkpoints of older versions."""
    shutil.copytree(shared("--steps=1"), "run")
    saved = load("run")
    del saved["progress"]
    torch.save(saved, "run/ckpt.pt")
    said = "run/ckpt.pt cannot be resumed: it has no state of progress; use --init_from."
    assert refused("--resume", "--steps=2") == said


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


def test_a_signal_that_is_ignored_stays_so(faults):
    """As SIGHUP is under nohup."""
    faults.signal(signal.SIGHUP, step=0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run("--steps=2")
    except KeyboardInterrupt:
        pytest.fail("the run has heard it")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load("run")["step"] == 2


def test_a_signal_whose_handler_python_does_not_know_is_left_alone():
    with mock.patch.object(signal, "getsignal", lambda number: None):
        run("--steps=1")


def test_a_batch_of_another_size_is_told_with_what_is_read_twice_or_left_out(capsys):
    run(*CONSTANT, "--steps=2")
    run(*CONSTANT, "--resume", "--steps=4", "--batch_size=2")
    said = capsys.readouterr().err
    assert "with batches of another size the run reads 64 tokens once more" in said
    assert "the run reads 192, which" in said  # 2 steps of 64 and 2 of 32
    run(*CONSTANT, "--resume", "--steps=5", "--batch_size=4")
    said = capsys.readouterr().err
    assert "the run skips 128 tokens" in said and "the run reads 256, which" in said
    run(*CONSTANT, "--resume", "--steps=6")
    assert "batches of another size" not in capsys.readouterr().err


def test_a_full_disk_at_a_line_of_the_log_names_the_file(faults):
    faults.at_step(4, lambda: faults.full_disk(Path("run/log.jsonl").stat().st_size))
    sentence = refused("--save_every=1")
    assert "cannot write to run/log.jsonl ([Errno 27] File too large); go on from" in sentence
    assert "go on from step 4, in run/ckpt.pt" in sentence and load("run")["step"] == 4


def test_a_full_disk_at_the_start_names_the_file(faults):
    faults.full_disk(20)
    sentence = refused("--steps=1")
    assert "run/tokenizer.tiktoken" in sentence and "File too large" in sentence


def test_a_renamed_folder_is_noticed_before_anything_is_written(faults):
    """Another run may have begun under its name by then."""

    def rename():
        Path("run").rename("moved")
        run("--steps=1", "--seed=2")
        shutil.copytree("run", "other")

    faults.at_step(2, rename)
    sentence = refused("--save_every=1")
    assert "run has been renamed" in sentence and "--resume" in sentence
    assert load("moved")["step"] == 2 and load("run")["step"] == 1
    for file in Path("other").iterdir():
        assert file.read_bytes() == Path("run", file.name).read_bytes()
    assert load(run("--resume", out="moved"))["step"] == 8


def test_a_run_ends_well_though_its_data_are_deleted_meanwhile(faults, monkeypatch, data, capsys):
    """The closing sample has the run's own tokenizer."""
    shutil.copytree(data, "data/mine")
    faults.at_step(1, lambda: shutil.rmtree("data/mine"))
    monkeypatch.setattr(train, "show_result", SHOW_RESULT)
    run("--data=mine", "--steps=2")
    assert "best validation loss" in capsys.readouterr().err
