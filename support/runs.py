"""The folder of a run: its lock, checkpoints, log, and what it takes to go on bit for bit.

    with open_run(model, optimizers, config, machine, files) as run:
        ...                               a step
        run.advance(tokens, finite, means, lr=lr, grad_norm=norm)
        if run.due(config.save_every):
            run.save()                    ckpt.pt
        if run.due(config.eval_every):
            run.note(evaluate(...))       a line of log.jsonl, and best.pt if it is the best so far

One process at a time writes there. Files are written whole, or they stay what they were.
"""

import fcntl
import json
import math
import os
import re
import secrets
import signal
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from support import processes
from support.files import naming, put_aside
from support.processes import Machine
from support.settings import Refusal, info, read_stored, short

RUN_FILES = ("ckpt.pt", "best.pt", "log.jsonl")

# ---- Files ---------------------------------------------------------------------------------------


def open_here(path: Path, mode: str) -> BinaryIO:
    """Opens a file to write to. Raises OSError for a link, which may lead out of the folder."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]):
    """A file that is either the old one or the new one, whatever happens in between."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open_here(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink()
        cause = error.__context__ or error  # torch raises its own on top of the disk's
        raise Refusal(f"cannot write {path} ({cause}); what it held before is intact.") from None


def checkpoint_file(path: str | Path) -> Path:
    """The file with the weights: of a run's folder best.pt, else ckpt.pt."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    return folder / ("best.pt" if (folder / "best.pt").exists() else "ckpt.pt")


def load_checkpoint(path: str | Path, whole: bool = True) -> dict[str, Any]:
    """What train.py saved in a file, or in a run's folder (best.pt, else ckpt.pt).

    Tensors stay on the disk until they are used; nothing in the file can run code. `whole` reads
    all of it first and compares its checksums; its settings alone do not need that.
    """
    file = checkpoint_file(path)
    if not file.exists():
        kinds = "a run's folder, a checkpoint file, or a directory with a config.json"
        raise Refusal(f"there is no {file}: name {kinds}.")
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not look at the records' checksums
            damaged = archive.testzip() if whole else None
        saved = torch.load(file, "cpu", weights_only=True, mmap=True)
        dict(saved["model_config"])  # raises where another program has saved it
    except Exception as error:  # a damaged file may lead to any
        told = f"{file} is damaged, or no checkpoint of train.py"
        raise Refusal(f"{told} ({short(error, 100)})") from None
    if damaged:
        raise Refusal(f"{file} is damaged: {damaged} in it has another checksum than when saved")
    return saved


def stored_settings(file: Path, *config_classes: type) -> tuple[dict[str, Any], int]:
    """The settings of a run in a checkpoint, as the fields of these dataclasses, and its step.
    Raises OSError or Refusal."""
    saved = load_checkpoint(file, whole=False)
    values = {}
    for part in (saved.get("train_config"), saved["model_config"]):
        values |= read_stored(part, file, *config_classes)
    if type(step := saved.get("step")) is not int:
        raise Refusal(f"the step in {file} is {short(repr(step))}, expected a number.")
    return values, step


# ---- The folder ----------------------------------------------------------------------------------


def holds_run(out: Path) -> bool:
    """Whether something of a run would be lost there."""
    return any((out / name).exists() and (out / name).stat().st_size for name in RUN_FILES)


def check_folder(out: Path, resume: bool, overwrite: bool):
    """Raises Refusal unless a run may write there: one to go on with is there, or nothing is, or
    a run that may be put aside. Changes nothing."""
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file: give another --out.")
    inside = {path.name for path in out.iterdir()} - {".lock"} if out.exists() else set()
    run, data = holds_run(out), any(name.endswith(".bin") for name in inside)
    # What a run left that ended before its first line may be written over: its id is in .lock.
    signed = (out / ".lock").is_file() and (out / ".lock").stat().st_size > 0
    begun = "log.jsonl" in inside and signed
    if data or (inside and not run and not begun):
        kind = "token files, as a folder of data does" if data else "files, but no run"
        raise Refusal(f"{out} holds {kind}: give another --out.")
    if resume and not (out / "ckpt.pt").exists():
        instead = "give --overwrite instead" if run else "begin without --resume"
        raise Refusal(f"{out} has no ckpt.pt to go on from: {instead}.")
    if run and not (resume or overwrite):
        either = "--resume, --overwrite" if (out / "ckpt.pt").exists() else "--overwrite"
        raise Refusal(f"{out} holds a run: give {either}, or another --out.")


def lock(folder: Path) -> BinaryIO:
    """The folder's file .lock, opened and locked until it is closed. The system takes the lock back
    however the process ends. Raises Refusal where another process has it. Readers need none."""
    path = folder / ".lock"
    file = open_here(path, "ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError  # another has put the folder aside since it was opened
    except (BlockingIOError, FileNotFoundError):
        file.close()
        other = f"another train.py is writing to {folder}"
        raise Refusal(f"{other}: wait for its end, or give another --out.") from None
    except OSError as error:  # some network drives have no locks
        info(f"{folder} cannot be locked ({error}): let only one train.py write there")
    return file


def cut_log(path: Path, step: int, evaluated: bool):
    """Leaves out what a run that goes on from this step writes again: later lines, half a line, and
    unless `evaluated` this step's evaluation."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []

    def kept(line: bytes) -> bool:
        found = re.match(rb'\{"step": (\d+), .*\}\n$', line)
        again = found and int(found[1]) == step and not evaluated and b'"val_loss"' in line
        return bool(found) and int(found[1]) <= step and not again

    if not all(map(kept, lines)):
        write_atomically(path, lambda file: file.writelines(filter(kept, lines)))


def to_json(values: dict) -> str:
    """NaN and infinity, for which JSON has no name, become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None))


# ---- The optimisers' state -----------------------------------------------------------------------


def names_of(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[list[str]]:
    """The parameters of each optimiser, by name, in its own order. Raises Refusal unless each
    parameter of the model that asks for a gradient is in exactly one of them."""
    name = {id(p): name for name, p in model.named_parameters()}
    names = [[name[id(p)] for g in x.param_groups for p in g["params"]] for x in optimizers]
    having = [n for some in names for n in some]
    for n, p in model.named_parameters():
        if p.requires_grad and having.count(n) != 1:
            has = "no optimiser has" if n not in having else "more than one optimiser has"
            raise Refusal(f"{has} the parameter {n}: change make_optimizers in train.py.")
    return names


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


def options_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The settings of its groups: learning rate, weight decay and so on."""
    return [{k: x for k, x in g.items() if k != "params"} for g in optimizer.param_groups]


def needed_moments(optimizer: torch.optim.Optimizer, groups: list[dict]) -> set[str]:
    """What an optimiser of train.py keeps for each parameter, all tensors. Of others: nothing."""
    if type(optimizer) is torch.optim.AdamW:
        amsgrad = any(group.get("amsgrad") for group in groups + optimizer.param_groups)
        return {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    return {"momentum_buffer"} if kind_of(optimizer) == "Muon" else set()


def check_moments(optimizer: torch.optim.Optimizer, names: list[str], stored: dict, file: Path):
    """Raises Refusal unless the stored state fits. An optimiser does not look: a fused one of
    torch would read and write beyond the memory of a moment of another shape."""
    groups, state = stored["state"]["param_groups"], stored["state"]["state"]
    order = [i for group in groups for i in group["params"]]  # by which torch maps the moments
    if stored["names"] != names or order != [*range(len(names))]:
        raise Refusal(f"the optimiser in {file} has other parameters: use --init_from instead.")
    params = [p for g in optimizer.param_groups for p in g["params"]]
    kinds = {tuple(sorted(moments)) for moments in state.values()}
    trained = {i for i, p in enumerate(params) if p.requires_grad}
    needed = needed_moments(optimizer, groups)
    complete = trained <= state.keys() <= {*order} and len(kinds) == 1
    if not needed and not state:  # as of SGD without momentum, which keeps nothing
        complete = True
    if not complete or (needed and kinds != {tuple(sorted(needed))}):
        raise Refusal(f"{file} lacks moments of the optimiser: use --init_from instead.")
    # Others may count by tensors without dimensions, as NAdam does in mu_product.
    strict = needed or any(group.get("fused") for group in groups + optimizer.param_groups)
    for i, moments in state.items():
        name, p = names[i], params[i]
        for key, x in moments.items():
            if key in needed and not isinstance(x, Tensor):
                raise TypeError(f"{key} of {name} is {x!r}")
            shape = () if key == "step" else tuple(p.shape)
            if isinstance(x, Tensor) and tuple(x.shape) != shape and (strict or x.ndim):
                wrong = f"{key} of {name} in {file} is {tuple(x.shape)}, expected {shape}"
                raise Refusal(f"{wrong}: use --init_from instead.")


def alike(a: Any, b: Any) -> bool:
    """Whether both are of one type, of which int and float are one here."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) or {type(a), type(b)} == {int, float}


def restore_optimizer(optimizer: torch.optim.Optimizer, made: list[dict], stored: dict):
    """The state as it was, counters in its groups too. A setting that was made otherwise then than
    it is now (`made`), as by another --weight_decay, stays as it is now."""
    params = [p for g in optimizer.param_groups for p in g["params"]]

    def copied(x: Any, p: Tensor) -> Any:  # of what the file has, which may be mapped
        if not isinstance(x, Tensor):
            return x
        return processes.cut_like(x, p) if x.ndim else x.clone()

    state = stored["state"]["state"].items()
    moments = {i: {k: copied(x, params[i]) for k, x in own.items()} for i, own in state}
    try:
        optimizer.load_state_dict(stored["state"] | {"state": moments})
        for group, now, then in zip(optimizer.param_groups, made, stored["made"], strict=True):
            group |= {key: x for key, x in now.items() if key not in then or then[key] != x}
            if odd := [key for key, x in now.items() if not alike(group[key], x)]:
                raise TypeError(f"{odd[0]} of the optimiser is {group[odd[0]]!r}")
    except ValueError as error:  # as for groups of another number; it names no file
        raise TypeError(error) from None


# ---- Clock and signals ---------------------------------------------------------------------------


def seconds_waited() -> float:
    """How long this process's threads have waited for a core, in all. Only Linux tells; else 0."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread may end meanwhile
            total += int(path.read_text().split()[1])
    return total / 1e9


class Clock:
    """How fast the run is, how long it will last, and whether other programs keep it waiting."""

    def __init__(self, tokens: int):
        self.began, self.waited_before = time.perf_counter(), seconds_waited()
        self.steps = 0  # made by this process
        self.since, self.tokens_before = self.began, tokens  # when measuring began; the tokens then
        self.speed = 0.0  # tokens/s, smoothed
        self.told_busy = False

    def restart(self, tokens: int):
        """What has taken time until now, such as an evaluation, does not count."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement, or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        speed = (tokens - before) / (self.since - since)
        self.speed = 0.7 * self.speed + 0.3 * speed if self.speed else speed
        return speed

    def time_left(self, tokens: int) -> str:
        """For so many tokens, at the smoothed speed. Nothing in the first ten steps, which may be
        slow."""
        left = timedelta(seconds=round(tokens / self.speed))
        return f", {left} left" if self.steps >= 10 else ""

    def tell_if_busy(self):
        """Says once, after ten steps or seconds, that the machine has more work than cores."""
        seconds = time.perf_counter() - self.began
        waiting = (seconds_waited() - self.waited_before) / seconds  # threads, on average
        if waiting > 0.25 and not self.told_busy and (self.steps >= 10 or seconds >= 10):
            self.told_busy = True
            told = (
                f"the cores are busy: {waiting:.1f} of this run's threads wait for one on average"
            )
            fewer = torch.get_num_threads() - 1
            info(f"{told}; stop other programs" + f", or set OMP_NUM_THREADS={fewer}" * (fewer > 0))


class Stop:
    """Ctrl-C, pre-emption or a closed terminal: the run stops after the step, when all is saved."""

    def __init__(self, machine: Machine):
        self.machine, self.heard = machine, False
        # What is ignored, as under nohup, stays so, and what Python did not set up, too.
        left = (signal.SIG_IGN, None)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.before = {x: h for x in numbers if (h := signal.getsignal(x)) not in left}
        for number in self.before:
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.heard = True
        if self.machine.rank == 0:
            with suppress(OSError):  # of a terminal that is closed
                os.write(2, b"\nstopping after this step\n")
        if self.machine.world == 1:  # torchrun sends every signal twice
            self.end()

    def end(self):
        """The handlers from before are back: a second Ctrl-C ends the run at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process has heard a signal, so that all stop together."""
        return bool(self.machine.sum(torch.tensor(float(self.heard))))  # a sum on the CPU


# ---- A run ---------------------------------------------------------------------------------------


class Run:
    """How far a training has come, and what is written into its folder. `open_run` makes it."""

    def __init__(self, model: nn.Module, optimizers: list, config, machine: Machine, about: dict):
        self.model, self.optimizers = model, optimizers
        self.config, self.machine, self.out, self.about = config, machine, Path(config.out), about
        self.names = names_of(model, optimizers)
        self.made = [options_of(x) for x in optimizers]
        self.id = ""  # in .lock and the checkpoints, so that they are known to belong together
        self.step = self.tokens = 0
        self.saved_step = 0  # the step of ckpt.pt (0: there is none)
        self.best_length, self.best_loss = 0, math.inf  # of best.pt: tokens trained for, loss
        # By name: the sum since the last line of the log, on the device, so that no step has to
        # wait for it; and of how many steps it is.
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.skipped = 0  # steps since the last line whose gradient was not finite
        self.bad_in_a_row = 0  # such steps up to now
        self.stopped = False  # by a signal
        self.owes_evaluation = False  # a resumed run, that of the step that it goes on from

    @property
    def last(self) -> bool:
        """Whether the last step has been made."""
        return self.step >= self.config.steps

    def due(self, every: int) -> bool:
        """Whether something that comes every so many steps comes after this one; the last step has
        everything."""
        return self.last or self.step % every == 0

    # -- Beginning --

    def begin(self, files: Iterable[Path]):
        """A new run, whose folder gets copies of these files, the tokenizer's."""
        if self.machine.rank > 0:
            return
        self.id = secrets.token_hex(8)
        self.sign()
        open_here(self.out / "log.jsonl", "ab").close()  # from now on this is a run's folder
        for file in files:
            content = file.read_bytes()
            write_atomically(self.out / file.name, lambda copy, x=content: copy.write(x))

    def sign(self):
        """Writes the run's id into the folder's .lock."""
        with naming(self.out / ".lock"):
            self.lock.truncate(0)
            os.write(self.lock.fileno(), self.id.encode())  # no buffer, which close would try again

    def folder_id(self) -> str:
        """The id of the run whose folder this is, "" if none is known. A copy may lack .lock."""
        self.lock.seek(0)
        best = self.out / "best.pt"
        signed = self.lock.read().decode(errors="replace")
        if signed or not best.exists():
            return signed
        return load_checkpoint(best, whole=False).get("run", "")

    def restore(self):
        """Goes back to ckpt.pt: weights, optimisers, step, sums and random numbers of one file."""
        file = self.out / "ckpt.pt"
        saved = load_checkpoint(file)
        try:
            self.id = saved["run"]
            if type(self.id) is not str:
                raise TypeError(f"run is {self.id!r}")
            if self.machine.rank == 0 and self.folder_id() not in ("", self.id):
                raise Refusal(f"{file} is of another run than its folder: use --init_from.")
            for key in ("step", "tokens", "skipped", "best_length"):
                if type(saved[key]) is not int or saved[key] < 0:
                    raise TypeError(f"{key} is {saved[key]!r}")
            self.step = self.saved_step = saved["step"]
            self.tokens, self.skipped = saved["tokens"], saved["skipped"]
            self.owes_evaluation = bool(saved["owes_evaluation"])
            self.restore_state(saved, file)
            dtype = next(self.model.parameters()).dtype
            for name, (total, steps) in saved["sums"].items():
                if type(steps) is not int or steps < 1:
                    raise TypeError(f"the sum of {name} is over {steps!r} steps")
                total = total.reshape(()).to(self.machine.device, dtype, copy=True)
                self.sums[name] = total, steps
            if saved["measured"] == self.measured():
                self.best_length, self.best_loss = saved["best_length"], saved["best_loss"] + 0.0
            processes.set_random_states(saved["random"], self.machine)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            told = f"{type(error).__name__}: {short(error, 100)}"
            raise Refusal(f"{file} cannot be resumed ({told}): use --init_from.") from None
        info(f"resume: from step {self.step} of {self.config.steps}, in {file}")
        if self.last:
            info("nothing is left to train: give more --steps")
        if self.machine.rank == 0:
            self.sign()  # in a copy of the folder the file may be missing
            log = self.out / "log.jsonl"
            open_here(log, "ab").close()  # a link is refused before anything is trained
            cut_log(log, self.step, evaluated=not self.owes_evaluation)

    def restore_state(self, saved: dict, file: Path):
        """Weights and optimisers."""
        own = self.model.state_dict()
        if {n: x.shape for n, x in saved["model"].items()} != {n: x.shape for n, x in own.items()}:
            raise Refusal(f"{file} has weights of another network.")
        with torch.no_grad():
            for name, x in own.items():
                x.copy_(processes.cut_like(saved["model"][name], x))
        kind, stored = self.config.optimizer, saved["optimizers"]
        if [x["kind"] for x in stored] != [kind_of(x) for x in self.optimizers]:
            raise Refusal(f"no state of {kind} in {file}: use --init_from instead.")
        for parts in zip(self.optimizers, self.names, stored, strict=True):
            check_moments(*parts, file)
        for parts in zip(self.optimizers, self.made, stored, strict=True):
            restore_optimizer(*parts)

    # -- Steps --

    def advance(self, tokens: int, finite: bool, means: dict[str, Tensor], **now: Any):
        """After every step: counts it, and writes a line when it is time, with the means of these
        numbers since the last line, by name, and with what is true now."""
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.skipped += not finite
        self.clock.steps += 1
        dtype = next(self.model.parameters()).dtype
        for name, x in means.items():
            if name not in self.sums:
                self.sums[name] = x.new_zeros((), dtype=dtype), 0
            total, steps = self.sums[name]
            self.sums[name] = total + x, steps + 1
        # Up to four steps are left out, if a good one follows.
        lost = self.bad_in_a_row >= 5 or (self.last and self.bad_in_a_row > 0)
        if lost or self.due(self.config.log_every):
            self.write_means(now)
        self.clock.tell_if_busy()
        if lost:
            self.give_up()
        self.stopped = self.stop.agreed()

    def write_means(self, now: dict):
        totals = torch.stack([total for total, _ in self.sums.values()]).tolist()
        steps = [steps for _, steps in self.sums.values()]
        line = {name: x / n for name, x, n in zip(self.sums, totals, steps, strict=True)}
        line |= {name: float(x) for name, x in now.items()}
        line["tokens_per_s"] = round(self.clock.measure(self.tokens), 1)
        left = (self.config.steps - self.step) * self.config.batch_size * self.config.block_size
        skips = f", {self.skipped} skipped: gradient not finite" if self.skipped else ""
        self.show(line, self.clock.time_left(left) + skips)
        self.write_line(line)
        self.sums, self.skipped = {}, 0

    def show(self, values: dict, more: str = ""):
        numbers = ", ".join(f"{k} {v:.5g}" for k, v in values.items() if isinstance(v, float))
        info(f"step {self.step}/{self.config.steps}: {numbers}{more}")

    def write_line(self, values: dict):
        """A line of log.jsonl."""
        if self.machine.rank == 0:
            path = self.out / "log.jsonl"
            line = to_json({"step": self.step, "tokens": self.tokens} | values) + "\n"
            try:
                with open_here(path, "ab") as file:
                    file.write(line.encode())
            except OSError as error:
                raise Refusal(f"cannot write to {path} ({error}); {self.way_on()}.") from None

    # -- Checkpoints --

    def measured(self) -> list:
        """What a validation loss depends on besides the weights: only like ones are compared."""
        return [self.config.block_size, self.about.get("data", "")]

    def write(self, name: str, **more: Any):
        """Every process calls it, as FSDP's tensors are gathered; process 0 writes."""
        state = {
            "run": self.id,
            "model": processes.whole(self.model.state_dict()),
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            "trained_length": self.model.trained_length,
            "step": self.step,
            "tokens": self.tokens,
        }
        if self.machine.rank == 0:
            path = self.out / name
            for n, x in state["model"].items():
                if not x.isfinite().all():
                    bad = f"{n} is not finite after step {self.step}, and was not saved"
                    raise Refusal(f"{bad}; {self.way_on()} and a lower --lr.")
            write_atomically(path, lambda file: torch.save(state | self.about | more, file))

    def save(self):
        """ckpt.pt, from which the run can go on."""
        optimizers = []
        for x, names, made in zip(self.optimizers, self.names, self.made, strict=True):
            state = processes.whole(x.state_dict())
            optimizers.append({"kind": kind_of(x), "names": names, "made": made, "state": state})
        self.write(
            "ckpt.pt",
            optimizers=optimizers,
            sums=processes.whole(self.sums),
            skipped=self.skipped,
            owes_evaluation=self.due(self.config.eval_every),  # which comes after it
            best_length=self.best_length,
            best_loss=self.best_loss,
            measured=self.measured(),
            random=processes.random_states(self.machine),
        )
        self.saved_step = self.step

    def note(self, result: dict):
        """An evaluation: a line of log.jsonl, and best.pt if these weights are the best so far.

        Weights trained for longer windows always are; at the same length the lower loss is. (Those
        that a run starts from, at step 0, have files of their own.)
        """
        self.show(result)
        loss, length = result["val_loss"], self.model.trained_length
        better = length > self.best_length or (length == self.best_length and loss < self.best_loss)
        if better and math.isfinite(loss) and self.step > 0:
            self.best_length, self.best_loss = length, loss
            self.write("best.pt", **{k: v for k, v in result.items() if k.startswith("val")})
        self.write_line(result)
        self.clock.restart(self.tokens)
        if self.last and not math.isfinite(loss):
            bad = f"the validation loss after step {self.step} is not finite"
            raise Refusal(f"{bad}; {self.begin_again()}.")

    # -- Ends --

    def way_on(self) -> str:
        """Where a run that stops here can go on."""
        if not self.saved_step:
            return "nothing is saved: begin again" + " with --overwrite" * holds_run(self.out)
        return f"go on from step {self.saved_step}, in {self.out}/ckpt.pt, with --resume"

    def begin_again(self) -> str:
        """Where to begin if the weights of ckpt.pt are spoilt."""
        best = self.out / "best.pt"
        if math.isfinite(self.best_loss) and best.exists():
            return f"begin anew with --init_from={best}, another --out and a lower --lr"
        return "begin again with --overwrite and a lower --lr"

    def give_up(self):
        """Raises Refusal: the gradients of the last steps were not finite."""
        n, step = self.bad_in_a_row, self.step
        bad = f"{n} gradient(s) up to step {step} are not finite"
        if self.saved_step and self.saved_step == step - n and n > 1:
            raise Refusal(f"{bad}; {self.begin_again()}.")
        if n > 1 or not self.saved_step:
            raise Refusal(f"{bad}; {self.way_on()} and a lower --lr.")
        # A run to the same last step would end like this again; one with more steps leaves it out.
        bad = f"the gradient of step {step}, the last one, is not finite"
        raise Refusal(f"{bad}; {self.way_on()} and --steps={step + 1}.")


@contextmanager
def open_run(
    model: nn.Module, optimizers: list, config, machine: Machine, files=(), **about: Any
) -> Iterator[Run]:
    """The run in the folder config.out: a new one, with copies of `files` (a run that is there is
    put aside if config.overwrite), or with config.resume the one that is there, as its ckpt.pt has
    it. Checkpoints have what is in `about`, too; about["data"] tells validation texts apart.

    SIGINT, SIGTERM and SIGHUP set run.stopped at the end of the step; if it is set in the end,
    KeyboardInterrupt is raised. Raises Refusal where the folder cannot be used.
    """
    run, out = Run(model, optimizers, config, machine, about), Path(config.out)
    check_folder(out, config.resume, config.overwrite)
    tokenizer = [Path(file).read_bytes() for file in files]
    machine.check_alike(
        settings=asdict(config), network=asdict(model.config), tokenizer=tokenizer, **about
    )
    if machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        run.lock = lock(out)
        check_folder(out, config.resume, config.overwrite)  # which another may have begun meanwhile
        if holds_run(out) and not config.resume:
            put_aside(out)
            run.lock.close()
            out.mkdir()
            run.lock = lock(out)
    run.stop = Stop(machine)
    try:
        if config.resume:
            run.restore()
        else:
            run.begin(files)
        machine.check_alike(step=run.step, tokens=run.tokens)
        run.clock = Clock(run.tokens)
        try:
            yield run
        except RuntimeError:
            if run.stop.heard:  # a compiler, or another process, has heard the signal too
                raise KeyboardInterrupt from None
            raise
        if run.stopped:
            bad = ", whose gradient was not finite" if run.bad_in_a_row else ""
            info(f"stopped at step {run.step}{bad}; {run.way_on()}.")
            raise KeyboardInterrupt  # so that no script takes the run for finished
    finally:
        run.stop.end()
        if machine.rank == 0:
            run.lock.close()
