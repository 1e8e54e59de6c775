"""The folder of a run: its lock, what is written there and when, and how a run ends.

train() names the things that have a state. This file knows no more of them, but that an optimiser
(Named) cuts its own tensors.

    states = {"model": model, "progress": Progress(...), ...} | by_name(model, optimizers)
    with open_run(states, config, machine, files) as run:
        while not (run.finished or run.stopped):     stopped by a signal
            ...                           a step
            run.advance(tokens, finite, means, lr=lr, grad_norm=norm)
            if run.owes_evaluation:
                run.log_evaluation(...)   a line of log.jsonl, and best.pt if it is the best so far
            if run.owes_checkpoint:
                run.save()                ckpt.pt

One process at a time writes there. Files are written whole, or they stay what they were.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from support.checkpoints import CODE, Named, cut_like, gather, load_checkpoint, note_edit
from support.clock import Clock
from support.files import put_aside, write_whole
from support.flops import peak_flops
from support.processes import Machine
from support.settings import Refusal, info
from support.signals import Stop

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# ---- The folder ----------------------------------------------------------------------------------


def open_here(path: Path, mode: str) -> BinaryIO:
    """Opens a file for writing and refuses a link: in a folder from a stranger it may lead out of
    that folder."""
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | no_link, 0o666))


def holds_run(out: Path) -> bool:
    """Whether something of a run would be lost there."""
    files = [out / name for name in ("ckpt.pt", "best.pt", "log.jsonl")]
    return any(file.exists() and file.stat().st_size for file in files)


def check_folder(out: Path, resume: bool, overwrite: bool):
    """Raises Refusal unless a run may write there: where nothing is, or a run that is to go on
    or to be put aside. Changes nothing."""
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file: give another --out.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if any(name.endswith(".bin") for name in names):
        raise Refusal(f"{out} holds token files, as a folder of data does: give another --out.")
    trained = holds_run(out)
    begun = {".lock", "log.jsonl"} <= names  # a run that has not written a line
    if names - {".lock"} and not (trained or begun):
        raise Refusal(f"{out} holds files, but no run: give another --out.")
    if "best.pt" in names and "ckpt.pt" not in names and not overwrite:
        start = f"--init_from={out}, and another --out"
        raise Refusal(f"{out} holds best.pt, but no ckpt.pt to resume from: give {start}.")
    if resume and "ckpt.pt" not in names:
        instead = "give --overwrite instead" if trained else "begin without --resume"
        raise Refusal(f"{out} has no ckpt.pt to resume from: {instead}.")
    if trained and not (resume or overwrite):
        either = "--resume, --overwrite" if "ckpt.pt" in names else "--overwrite"
        raise Refusal(f"{out} holds a run: give {either}, or another --out.")


def lock_folder(folder: Path) -> BinaryIO:
    """The folder's file .lock, opened and locked until it is closed. The system takes the lock back
    however the process ends. Raises Refusal where another process has it. Readers need none."""
    file = open_here(folder / ".lock", "ab")
    if fcntl is None:
        info(f"this system cannot lock {folder}: let only one train.py write there")
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        other = f"another train.py is writing to {folder}"
        raise Refusal(f"{other}: wait for its end, or give another --out.") from None
    return file


def take_folder(out: Path, resume: bool, overwrite: bool) -> BinaryIO:
    """The lock of the folder, which is made if it is missing. A run that is there and is not to go
    on is put aside. Raises Refusal as check_folder does."""
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    check_folder(out, resume, overwrite)  # only now can no other process change the answer
    if resume or not holds_run(out):
        return lock
    with lock:  # until the new folder is locked
        put_aside(out)
        out.mkdir()
        return lock_folder(out)


def cut_log(path: Path, step: int):
    """Leaves out what a run that goes on from the checkpoint of this step writes again, all later
    lines, and half a line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    last, kept = 0, []
    for line in lines:
        if found := re.match(rb'\{"step": (\d+), .*\}\n$', line):
            last = max(last, int(found[1]))
            if int(found[1]) <= step:
                kept.append(line)
    if last > step:
        info(f"{path} went on to step {last}: it is cut back to the checkpoint's step, {step}")
    if kept != lines:
        write_whole(path, lambda file: file.writelines(kept))


def to_json(values: dict) -> str:
    """NaN and infinity, for which JSON has no name, become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None))


# ---- A run ---------------------------------------------------------------------------------------


class Run:
    """What a training writes into its folder, and when. `open_run` makes it."""

    def __init__(
        self, states: dict[str, Any], config, machine: Machine, stop: Stop, flops: float | None
    ):
        self.states, self.model, self.progress = states, states["model"], states["progress"]
        self.config, self.machine, self.out = config, machine, Path(config.out)
        self.stop, self.clock, self.flops = stop, Clock(), flops
        self.saved_step = 0  # the step of ckpt.pt (0: there is none)
        self.bad_in_a_row = 0  # steps up to now whose gradient was not finite
        self.save_due = False
        self.stopped = False  # by a signal

    @property
    def finished(self) -> bool:
        """Whether the last step has been made."""
        return self.progress.step >= self.config.steps

    @property
    def owes_evaluation(self) -> bool:
        """Whether one is due after this step."""
        return self.due(self.config.eval_every)

    @property
    def owes_checkpoint(self) -> bool:
        """Whether one is due, and the last step's gradient was finite. Else it waits for the next
        good step: from weights that lead to bad gradients no run can go on."""
        return self.save_due and self.bad_in_a_row == 0

    def due(self, every: int) -> bool:
        """Whether something that comes every so many steps comes after this one. After the last
        step everything comes."""
        return self.finished or self.progress.step % every == 0

    # -- Beginning --

    def begin(self, files: Iterable[Path]):
        """A new run, whose folder gets copies of these files, the tokenizer's."""
        if self.machine.rank == 0:
            open_here(self.out / "log.jsonl", "ab").close()  # from now on this is a run's folder
            for file in files:
                content = file.read_bytes()
                write_whole(self.out / file.name, lambda copy, x=content: copy.write(x))

    def restore(self):
        """Goes back to ckpt.pt: every state is what it was."""
        file = self.out / "ckpt.pt"
        saved = load_checkpoint(file, whole=False)  # load_model has compared its checksums
        note_edit("train.py", saved, file, "from here on the run may be trained another way")
        try:
            if lacking := self.states.keys() - saved.keys():
                raise Refusal(f"it has no state of {min(lacking)}")
            for name, thing in self.states.items():
                kept = saved[name]
                if not isinstance(thing, Named):  # which cuts by its parameters
                    kept = cut_like(kept, thing.state_dict())
                thing.load_state_dict(kept)
        except Refusal as error:
            raise Refusal(f"{file} cannot be resumed: {error}; use --init_from.") from None
        self.saved_step = self.progress.step
        info(f"resume: from step {self.saved_step} of {self.config.steps}, in {file}")
        if self.finished:
            info("nothing is left to train: give more --steps")
        if self.machine.rank == 0:
            log = self.out / "log.jsonl"
            open_here(log, "ab").close()  # what cannot be written ends the run now, not later
            cut_log(log, self.saved_step)

    # -- Steps --

    def advance(self, tokens: int, finite: bool, means: dict[str, Tensor], **now: Any):
        """After every step: counts it, and writes a line when it is time, with the means of these
        numbers since the last line, by name, and with what is true now. Finds out what is due."""
        progress, config = self.progress, self.config
        progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
        progress.skipped += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.clock.steps += 1
        dtype = next(self.model.parameters()).dtype
        for name, x in means.items():
            total, steps = progress.sums.get(name, (0.0, 0))
            progress.sums[name] = total + x.to(dtype), steps + 1
        # Up to four bad steps are left out, if a good one follows.
        lost = self.bad_in_a_row >= 5 or (self.finished and self.bad_in_a_row > 0)
        if lost or self.due(config.log_every):
            self.write_means(now)
        if lost:
            self.give_up()
        self.stopped = self.stop.agreed()
        due = self.stopped or self.owes_evaluation or self.due(config.save_every)
        self.save_due = self.save_due or due
        if self.owes_evaluation:  # it is timed from here
            self.clock.restart(progress.tokens)

    def write_means(self, now: dict):
        progress = self.progress
        line = {name: float(total) / steps for name, (total, steps) in progress.sums.items()}
        line |= {name: float(x) for name, x in now.items()}
        line["tokens_per_s"] = speed = round(self.clock.measure(progress.tokens), 1)
        if self.flops:  # as nanoGPT's mfu: of bf16's peak
            peak = peak_flops(self.machine.device) * self.machine.world
            line["mfu"] = speed * self.flops / peak
        left = (self.config.steps - progress.step) * self.config.batch_size * self.config.block_size
        every = self.config.eval_every  # this step's evaluation is one of those that are left
        evaluations = math.ceil(self.config.steps / every) - (progress.step - 1) // every
        skips = f", {progress.skipped} skipped: gradient not finite" if progress.skipped else ""
        self.write_line(line, self.clock.time_left(left, evaluations) + skips)
        progress.sums, progress.skipped = {}, 0

    def write_line(self, values: dict, more: str = ""):
        """A line of log.jsonl, and one on the terminal."""
        numbers = ", ".join(f"{k} {v:.5g}" for k, v in values.items() if isinstance(v, float))
        info(f"step {self.progress.step}/{self.config.steps}: {numbers}{more}")
        if self.machine.rank == 0:
            path = self.out / "log.jsonl"
            counts = {"step": self.progress.step, "tokens": self.progress.tokens}
            try:
                with open_here(path, "ab") as file:
                    file.write(f"{to_json(counts | values)}\n".encode())
            except OSError as error:
                message = f"{path} cannot be written ({error}); {self.way_on()}."
                raise Refusal(message) from None

    def log_evaluation(self, result: dict):
        """An evaluation: a line of log.jsonl, and best.pt if these weights are the best so far.

        Weights trained for longer windows always are; at the same length the lower loss is. (Those
        that a run starts from, at step 0, have files of their own.)
        """
        self.clock.evaluation = time.perf_counter() - self.clock.since
        progress, loss, length = self.progress, result["val_loss"], self.model.trained_length
        self.stopped = self.stop.agreed()
        better = (length, -loss) > (progress.best_length, -progress.best_loss)
        if better and math.isfinite(loss) and progress.step > 0:
            progress.best_length, progress.best_loss = length, loss
            losses = {k: x for k, x in result.items() if k.startswith("val")}
            self.write("best.pt", {"model": self.model}, **losses)
        self.write_line(result)
        self.clock.restart(progress.tokens)
        if self.finished and not math.isfinite(loss):
            bad = f"the validation loss after step {progress.step} is not finite"
            raise Refusal(f"{bad}; {self.way_on(spoilt=True)} and a lower --lr.")

    # -- Checkpoints --

    def save(self):
        """ckpt.pt, from which the run can go on."""
        self.write("ckpt.pt", self.states)
        self.saved_step, self.save_due = self.progress.step, False
        self.clock.restart(self.progress.tokens)

    def write(self, name: str, states: dict[str, Any], **more: Any):
        """Every process calls it, as FSDP's tensors are gathered; process 0 writes."""
        about = {
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            **CODE,  # best.pt may be older than the copies in the folder, and mean others
            "trained_length": self.model.trained_length,
            "step": self.progress.step,
            "tokens": self.progress.tokens,
        }
        states = {key: thing.state_dict() for key, thing in states.items()}
        # Unlike |, dict() has an error where a name comes twice.
        saved = gather(dict(**states, **about, **more))
        if self.machine.rank > 0:
            return
        for n, x in saved["model"].items():
            if not x.isfinite().all():
                bad = f"{n} is not finite after step {self.progress.step}, and was not saved"
                raise Refusal(f"{bad}; {self.way_on()} and a lower --lr.")
        try:
            self.write_code()
            write_whole(self.out / name, lambda file: torch.save(saved, file))
        except Refusal as error:
            raise Refusal(f"{error} Mend that, then {self.way_on()}.") from None

    def write_code(self):
        """Copies of CODE beside the weights. A copy that differs, of an earlier process, is put
        aside."""
        for name, text in CODE.items():
            copy, code = self.out / name, text.encode()
            if copy.exists() and copy.read_bytes() != code:
                put_aside(copy)
            if not copy.exists():
                write_whole(copy, lambda file, code=code: file.write(code))

    # -- Ends --

    def way_on(self, spoilt: bool = False) -> str:
        """Where a run that stops here can go on: from ckpt.pt unless its weights are spoilt, else
        from best.pt, else from the beginning."""
        ckpt, best = self.out / "ckpt.pt", self.out / "best.pt"
        if self.saved_step and not spoilt:
            return f"continue from step {self.saved_step} ({ckpt}) with --resume"
        if math.isfinite(self.progress.best_loss) and best.exists():
            return f"begin anew with --init_from={best}, another --out"
        return "begin again with --overwrite"

    def give_up(self):
        """Raises Refusal: the gradients of the last steps were not finite."""
        n, step = self.bad_in_a_row, self.progress.step
        way = self.way_on(spoilt=self.saved_step == step - n)  # then its weights gave all of them
        bad = f"{n} gradient(s) up to step {step} are not finite"
        raise Refusal(f"{bad}; {way} and a lower --lr, or fix the edit that causes them.")


@contextmanager
def open_run(
    states: dict[str, Any], config, machine: Machine, files=(), flops: float | None = None
) -> Iterator[Run]:
    """The run in the folder config.out: a new one, with copies of `files` (a run that is there is
    put aside if config.overwrite), or with config.resume the one that is there, every state as
    its ckpt.pt has it. `states` are its things by name, a Progress and the model among them;
    `flops`: of a token, for the mfu.

    SIGINT, SIGTERM and SIGHUP set run.stopped at the end of the step or evaluation. A run that has
    steps left then ends with KeyboardInterrupt. Raises Refusal where the folder cannot be used.
    """
    model, progress = states["model"], states["progress"]
    machine.check_alike(
        settings=asdict(config),
        network=asdict(model.config),
        tokenizer=[Path(file).read_bytes() for file in files],
    )
    lock = None
    if machine.rank == 0:
        lock = take_folder(Path(config.out), config.resume, config.overwrite)
    stop = Stop(machine)
    try:
        run = Run(states, config, machine, stop, flops)
        if config.resume:
            run.restore()
        else:
            run.begin(files)
        machine.check_alike(step=progress.step, tokens=progress.tokens)
        run.clock.restart(progress.tokens)
        try:
            yield run
        except RuntimeError:
            # Another process, or a compiler, may have heard a signal, or may know what went wrong.
            if machine.world > 1 or stop.heard:
                info(f"this process cannot continue; {run.way_on()}.")
            raise
        if run.stopped and not run.finished:
            bad = ", whose gradient was not finite" if run.bad_in_a_row else ""
            info(f"stopped at step {progress.step}{bad}; {run.way_on()}.")
            raise KeyboardInterrupt  # so that no script takes the run for finished
    finally:
        stop.end()
        if lock:
            lock.close()
