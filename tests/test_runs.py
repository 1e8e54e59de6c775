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
    TEXT,
    TINY,
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
from support import runs
from support.runs import load_checkpoint

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
    write, saved = runs.write_atomically, []

    def watched(path, *rest):
        write(path, *rest)
        if path.suffix == ".pt":
            saved.append((path.stem, load(path.parent, path.name)["step"]))

    monkeypatch.setattr(runs, "write_atomically", watched)
    give_losses(monkeypatch, 2.0, 2.0, 1.0, math.nan, 5.0, 6.0, 5.0, 4.0)
    options = ("--steps=16", "--eval_every=2", "--save_every=3")
    run(*options, "--long_block_size=32", "--long_start=0.375")
    assert [step for name, step in saved if name == "best"] == [2, 6, 10, 16]
    steps = [step for name, step in saved if name == "ckpt"]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16]


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
    assert "run holds a run: give --resume, --overwrite, or another --out" in refused()
    assert all(refused("--overwrite", x) for x in ("--data=nowhere", "--beta1=1", "--resume"))
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
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


@pytest.mark.parametrize("kind", ["data", "data with a run", "meta.json", "photo", "file", "link"])
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


def test_weights_that_a_run_starts_from_are_not_put_aside():
    run("--steps=1")
    for source in ("run", "run/ckpt.pt"):
        assert "would be put aside" in refused("--overwrite", f"--init_from={source}")
    assert Path("run/ckpt.pt").exists()


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
    (adamw,) = load("run")["optimizers"]
    assert load("run")["step"] == 4 and adamw["state"]["state"][0]["step"] == 3


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
