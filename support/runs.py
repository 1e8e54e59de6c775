"""The folder of a run: its lock, its log and checkpoints, and how a run ends.

    states = {"model": model, "progress": Progress(...), ...} | by_name(model, optimizers)
    with open_run(states, config, machine, files) as run:
        while True:
            if run.evaluation_due:        and not yet in the log
                run.log_evaluation(...)   a line of log.jsonl, and best.pt if it is the best so far
            if run.finished or run.stopped:     stopped by a signal
                break
            ...                           a step
            run.advance(tokens, finite, means, lr=lr, grad_norm=norm)
            if run.checkpoint_due:
                run.save()                ckpt.pt

An evaluation comes after the step's checkpoint, since it may fail. A run that is killed in it and
resumed begins with the same evaluation.

Only one process at a time writes to the folder. Checkpoints are written whole or not at all.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from support import advice
from support.checkpoints import CODE, NamedOptimizer, gather, load_checkpoint, note_edit, shard_like
from support.clock import Clock
from support.files import put_aside, write_whole
from support.flops import log_time
from support.processes import Machine, gather_objects
from support.settings import Refusal, info, short
from support.signals import Stop
from support.sizes import parameter_counts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- The folder ----------------------------------------------------------------------------------


def holds_run(out: Path) -> bool:
    """Whether the folder has a checkpoint or log that a new run would replace."""
    files = [out / name for name in ("ckpt.pt", "best.pt", "log.jsonl")]
    return any(file.exists() and file.stat().st_size for file in files)


def check_folder(out: Path, resume: bool, overwrite: bool):
    """Raises Refusal unless the run may write to the folder. Changes nothing."""
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file: give another --out.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names and ".lock" not in names and not holds_run(out):  # .lock: a run that has just begun
        raise Refusal(f"{out} holds files, but no run: give another --out.")
    if resume and "ckpt.pt" not in names:
        way = "wait for its first, or give --overwrite" if holds_run(out) else "leave out --resume"
        raise Refusal(f"{out} has no ckpt.pt to resume from: {way}, or give another --out.")
    if holds_run(out) and not (resume or overwrite):
        ways = "--resume, --overwrite" if "ckpt.pt" in names else "--overwrite"
        raise Refusal(f"{out} holds a run: give {ways}, or another --out.")


def lock_folder(folder: Path) -> BinaryIO:
    """Opens the folder's file .lock and locks it until it is closed; the system releases it however
    the process ends. Raises Refusal if another process holds the lock. Readers need none. Without
    fcntl nothing is locked or left open: Windows renames no folder that has an open file."""
    if not fcntl:
        (folder / ".lock").touch()
        info(f"{folder} is not locked, because this system lacks fcntl: start one train.py there")
        return io.BytesIO()
    file = open(folder / ".lock", "ab")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        message = f"another train.py is writing to {folder}: wait, or give another --out."
        raise Refusal(message) from None
    except OSError as error:  # ENOSYS or ENOLCK, on some network disks
        info(f"{folder} is not locked ({error.strerror}): start one train.py there")
    return file


def take_folder(out: Path, resume: bool, overwrite: bool) -> BinaryIO:
    """Creates and locks the folder, and returns the lock. A run that is not resumed is renamed.
    Raises Refusal as check_folder does."""
    check_folder(out, resume, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    check_folder(out, resume, overwrite)  # again: before the lock another process may have written
    if resume or not holds_run(out):
        return lock
    with lock:  # until the new folder is locked
        put_aside(out)
        out.mkdir()
        return lock_folder(out)


def cut_log(path: Path, step: int, evaluates: bool) -> bool:
    """Removes the lines that the resumed run writes again: those after this step and, if it
    `evaluates` first, the evaluation of this step. Removes a half-written line, too. Returns
    whether an evaluation of this step remains."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    last, kept, evaluated = 0, [], False
    for line in lines:
        if found := re.match(rb'\{"step": (\d+), .*\}\n$', line):
            last = max(last, int(found[1]))
            of_this_step = int(found[1]) == step and b'"val_loss"' in line
            if int(found[1]) <= step and not (of_this_step and evaluates):
                kept.append(line)
                evaluated = evaluated or of_this_step
    if last > step:
        info(f"{path} goes to step {last}: the lines after step {step}, the checkpoint's, are cut")
    if kept != lines:
        write_whole(path, lambda file: file.writelines(kept))
    return evaluated


def to_json(values: dict) -> str:
    """NaN and infinity, which JSON lacks, become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None))


# ---- A run ---------------------------------------------------------------------------------------

NO_BEST, REPLACED = (0, -math.inf), "the next evaluation replaces best.pt"
IF_DIVERGED = "give a lower --lr, or fix the edit that causes this."


class Run:
    """Decides what a training writes into its folder, and when. Created by `open_run`."""

    def __init__(
        self, states: dict[str, Any], config, machine: Machine, stop: Stop, mfu: float | None
    ):
        self.states, self.model, self.progress = states, states["model"], states["progress"]
        self.config, self.machine, self.out = config, machine, Path(config.out)
        self.stop, self.clock, self.mfu = stop, Clock(), mfu
        self.best = NO_BEST  # of best.pt: the windows trained for, minus its loss
        self.evaluated_step = -1  # the resumed one, if its evaluation is in the log
        self.resumable_step = 0  # of ckpt.pt (0: none that is worth resuming)
        self.bad_in_a_row = 0  # latest steps whose gradient was not finite
        self.save_due = False
        self.stopped = False  # by a signal
        self.first = True  # no step yet in this process

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.config.steps

    @property
    def evaluation_due(self) -> bool:
        """Whether this step has an evaluation that is not yet in the log. Initial weights have one
        if they come from elsewhere."""
        step = self.progress.step
        due = self.due(self.config.eval_every) if step else bool(self.config.init_from)
        return due and step != self.evaluated_step

    @property
    def checkpoint_due(self) -> bool:
        """A checkpoint waits for a finite gradient: weights that lead to bad ones cannot be
        resumed."""
        return self.save_due and self.bad_in_a_row == 0

    def due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last."""
        return self.finished or self.progress.step % every == 0

    # -- Beginning --

    def log_plan(self, tokens: int, length: int):
        """Prints the model's size, the machine, how many epochs of a text of `length` tokens the
        run reads, an estimate of the time for the remaining `tokens`, and whether it compiles."""
        config, machine, progress = self.config, self.machine, self.progress
        counts = parameter_counts(self.model)
        total, active, mtp = (f"{n / 1e6:.2f}M" for n in counts.values())
        info(f"model: {total} parameters, {active} active per token, MTP {mtp} more")
        where = f"{machine.world} x {machine.device} in {config.dtype} ({machine.dtype_reason})"
        info(f"run: {config.steps} steps on {where}")
        advice.log_epochs(progress.tokens + tokens, length, config.steps, progress.step == 0)
        if tokens and machine.speed:
            log_time(counts["active"], tokens, machine)
        if tokens and machine.compiled:
            info("compiling takes one to three minutes, less in later runs (--compile=False: none)")

    def write_copies(self, files: Iterable[Path] = ()):
        """Copies these files, the tokenizer's, and the code that will make the weights into the
        folder. A different copy, such as the code of an earlier process, is renamed."""
        copies = {file.name: file.read_bytes() for file in files}
        copies |= {name: text.encode() for name, text in CODE.items()}
        for name, content in copies.items() if self.machine.rank == 0 else ():
            path = self.out / name
            if path.exists() and path.read_bytes() != content:
                put_aside(path)
            if not path.exists():
                write_whole(path, lambda file, content=content: file.write(content))

    def restore(self):
        """Loads every state from ckpt.pt."""
        file = self.out / "ckpt.pt"
        saved = load_checkpoint(file, whole=False)  # load_model has compared its checksums
        note_edit("train.py", saved, file, "the rest of the run may be trained differently")
        try:
            if missing := self.states.keys() - saved.keys():
                raise Refusal(f"it has no state of {min(missing)}")
            for name, thing in self.states.items():
                state = saved[name]
                if not isinstance(thing, NamedOptimizer):  # NamedOptimizer shards its own tensors
                    state = shard_like(state, thing.state_dict())
                thing.load_state_dict(state)
        except Refusal as error:
            raise Refusal(f"{file} cannot be resumed: {error}; use --init_from.") from None
        self.resumable_step = self.progress.step
        info(f"resume: from step {self.resumable_step} of {self.config.steps}, in {file}")
        if (self.out / "best.pt").exists():
            self.restore_best()
        if self.finished:
            info("nothing is left to train: give more --steps")
        evaluated = False
        if self.machine.rank == 0:
            log, step = self.out / "log.jsonl", self.resumable_step
            open(log, "ab").close()  # fails now rather than at the first line
            again = self.evaluation_due and self.best == NO_BEST  # its weights become best.pt
            evaluated = cut_log(log, step, evaluates=again)
        if gather_objects(evaluated)[0]:
            self.evaluated_step = self.resumable_step
        self.write_copies()

    def restore_best(self):
        """Reads the loss of best.pt. It does not count, and a message says why, if it is damaged,
        of a later step than ckpt.pt, or its loss is of other text or windows than this run's."""
        path, now = self.out / "best.pt", asdict(self.config)
        try:
            saved = load_checkpoint(path, whole=False)
            best = saved["trained_length"], -saved["val_loss"]
        except (Refusal, KeyError) as error:
            info(f"{path} is no evaluated checkpoint ({short(error)}): {REPLACED}")
            return
        keys = ("data", "block_size", "eval_tokens")
        if changed := [key for key in keys if saved["train_config"].get(key) != now[key]]:
            info(f"other {' and '.join(changed)}, so other losses: {REPLACED}")
        elif saved["step"] > self.progress.step:
            info(f"{path} is of step {saved['step']}, after that of ckpt.pt: {REPLACED}")
        else:
            self.best = best

    # -- Steps --

    def advance(self, tokens: int, finite: bool, means: dict[str, Tensor], **now: Any):
        """Counts a step. Writes a line to the log if one is due, with the averages of `means` since
        the last line and the values of `now`. Then updates what else is due."""
        progress, config = self.progress, self.config
        progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens
        progress.skipped += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        dtype = next(self.model.parameters()).dtype
        for name, x in means.items():
            total, steps = progress.sums.get(name, (0.0, 0))
            progress.sums[name] = total + x.to(dtype), steps + 1
        # Up to four bad steps in a row are skipped.
        diverged = self.bad_in_a_row >= 5 or (self.finished and self.bad_in_a_row > 0)
        compiles = self.first and self.machine.compiled  # for minutes, which tell nothing of later
        if self.first and not compiles:
            self.clock.begin()
        if diverged or self.due(config.log_every):
            self.write_means(now)
        elif self.first:
            loss, left = float(means["loss"]), self.time_left()  # the first waits for the GPU
            seconds = self.clock.passed()
            info(f"step {progress.step}/{config.steps}: loss {loss:.5g}, {seconds:.1f} s{left}")
        if compiles:
            self.clock.restart(progress.tokens)
            self.clock.begin()
        self.first = False
        if diverged:
            n, step = self.bad_in_a_row, progress.step
            if self.resumable_step == step - n:  # its weights led to all of these gradients
                self.resumable_step = 0
            raise Refusal(f"{n} gradient(s) up to step {step} are not finite: {IF_DIVERGED}")
        self.stopped = self.stop.agreed()
        due = self.stopped or self.evaluation_due or self.due(config.save_every)
        self.save_due = self.save_due or due

    def write_means(self, now: dict):
        progress = self.progress
        line = {name: float(total) / steps for name, (total, steps) in progress.sums.items()}
        line |= {name: float(x) for name, x in now.items()}
        line["tokens_per_s"] = speed = round(self.clock.measure(progress.tokens), 1)
        if self.mfu:  # as nanoGPT's: of bf16's peak
            line["mfu"] = speed * self.mfu
        if self.machine.device.type == "cuda":
            line["peak_gb"] = torch.cuda.max_memory_allocated(self.machine.device) / 1e9
        skips = f", {progress.skipped} skipped: gradient not finite" if progress.skipped else ""
        self.write_line(line, self.time_left() + skips)
        progress.sums, progress.skipped = {}, 0

    def time_left(self) -> str:
        """As text."""
        steps = self.config.steps - self.progress.step
        tokens = steps * self.config.batch_size * self.config.block_size
        return self.clock.time_left(self.progress.tokens, tokens)

    def write_line(self, values: dict, more: str = ""):
        """Writes a line to log.jsonl, and one to the terminal."""
        numbers = ", ".join(f"{k} {v:.5g}" for k, v in values.items() if isinstance(v, float))
        info(f"step {self.progress.step}/{self.config.steps}: {numbers}{more}")
        if self.machine.rank == 0:
            path = self.out / "log.jsonl"
            counts = {"step": self.progress.step, "tokens": self.progress.tokens}
            try:
                with open(path, "ab") as file:
                    file.write(f"{to_json(counts | values)}\n".encode())
            except OSError as error:
                raise Refusal(f"{path} cannot be written ({error}).") from None

    def log_evaluation(self, result: dict):
        """Writes an evaluation to log.jsonl, and best.pt if these weights are the best so far:
        trained for longer windows or, at the same length, with a lower loss. Initial weights, at
        step 0, are not saved."""
        progress, loss = self.progress, result["val_loss"]
        self.stopped = self.stop.agreed()
        now = self.model.trained_length, -loss
        if now > self.best and math.isfinite(loss) and progress.step > 0:
            self.best = now
            losses = {k: x for k, x in result.items() if k.startswith("val")}
            self.write("best.pt", {"model": self.model}, **losses)
        self.write_line(result)
        if self.finished and not math.isfinite(loss):
            self.resumable_step = 0  # ckpt.pt has these weights
            raise Refusal(
                f"the validation loss after step {progress.step} is not finite: {IF_DIVERGED}"
            )
        self.clock.restart(progress.tokens)

    # -- Checkpoints --

    def save(self):
        """Writes ckpt.pt, from which the run can be resumed."""
        if self.config.parallel == "ddp":  # under FSDP no process has a copy to compare
            self.machine.check_weights(self.model)
        self.write("ckpt.pt", self.states)
        self.resumable_step, self.save_due = self.progress.step, False
        self.clock.restart(self.progress.tokens)

    def write(self, name: str, states: dict[str, Any], **more: Any):
        """Gathers the states of all processes, each of which has to call it; process 0 writes."""
        about = {
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            **CODE,  # best.pt may be older than the copies in the folder
            "trained_length": self.model.trained_length,
            "step": self.progress.step,
            "tokens": self.progress.tokens,
        }
        states = {key: thing.state_dict() for key, thing in states.items()}
        # Unlike |, dict() raises an error if a name occurs twice.
        saved = gather(dict(**states, **about, **more))
        if self.machine.rank > 0:
            return
        for weight, x in saved["model"].items():
            if not x.isfinite().all():
                raise Refusal(
                    f"{weight} is not finite after step {self.progress.step}: {IF_DIVERGED}"
                )
        write_whole(self.out / name, lambda file: torch.save(saved, file))


@contextmanager
def open_run(
    states: dict[str, Any], config, machine: Machine, files=(), mfu: float | None = None
) -> Iterator[Run]:
    """Begins a run in the folder config.out or, with config.resume, restores the one in it.

    states: by name, what a checkpoint contains, the model and a Progress included. files: the
    tokenizer's, copied into a new run's folder. mfu: that of one token per second; None: unknown.

    SIGINT, SIGTERM and SIGHUP set run.stopped at the end of the step or evaluation. If steps
    remain, the run then ends with KeyboardInterrupt. Raises Refusal if the folder cannot be used.
    """
    model, progress = states["model"], states["progress"]
    machine.check_alike(
        settings=asdict(config),
        network=asdict(model.config),
        tokenizer=[Path(file).read_bytes() for file in files],
    )
    with ExitStack() as at_end:  # restores the signals' handlers, then releases the lock
        if machine.rank == 0:
            lock = take_folder(Path(config.out), config.resume, config.overwrite)
            at_end.enter_context(lock)
        stop = Stop(machine)
        at_end.callback(stop.end)
        run = Run(states, config, machine, stop, mfu)
        if config.resume:
            run.restore()
        else:
            run.write_copies(files)
        machine.check_alike(step=progress.step, tokens=progress.tokens, best_loss=run.best)
        run.clock.restart(progress.tokens)
        try:
            yield run
            if run.stopped and not run.finished:
                raise KeyboardInterrupt  # the exit code tells scripts that the run is not finished
        except BaseException:  # also an error in another process, or a full disk
            if progress.step:
                way, last = "begin again with --overwrite", run.resumable_step
                if last:
                    way = f"continue from step {last} ({run.out}/ckpt.pt) with --resume"
                info(f"stopped at step {progress.step}; {way}.")
            raise
