"""A checkpoint: {name: thing.state_dict()} for the things that a run has, and its settings.

The things are named in one place, train() in train.py. Some are of torch, as the model. Here are
those that need more: optimisers by the names of their parameters, torch's random numbers, and how
far a run has come. Of sharded tensors a file has the whole (`gather`), and a process its part
(`cut_like`). support/runs.py says when a checkpoint is written, and where.
"""

import math
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.processes import Machine, of_all
from support.settings import Refusal, info, sentence_of, short

ROOT = Path(__file__).parent.parent
# The code that a run means, read when the process starts: what is edited later does not run in it.
CODE = {name: (ROOT / name).read_text("utf-8") for name in ("model.py", "train.py")}

# ---- The file ------------------------------------------------------------------------------------


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
    kinds = "a run's folder, a checkpoint file, or a directory with a config.json"
    if not file.exists():
        raise Refusal(f"there is no {file}: name {kinds}.")
    if file.suffix in (".safetensors", ".gguf", ".py"):
        raise Refusal(f"{file} is no checkpoint of train.py: name {kinds}.")
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not look at the records' checksums
            damaged = archive.testzip() if whole else None
        saved = torch.load(file, "cpu", weights_only=True, mmap=True)
        dict(saved["model_config"])  # raises where another program has saved it
    except Exception as error:  # a damaged file may lead to any
        if sentence_of(error):  # it may not be read, say: that is no damage
            raise
        told, why = f"{file} is damaged, or no checkpoint of train.py", short(error, 100)
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):  # weights_only does not open it
            why = f"it holds {short(foreign[1], 80)!r}; only tensors, numbers and text are opened"
        raise Refusal(f"{told} ({why})") from None
    if damaged:
        raise Refusal(f"{file} is damaged: {damaged} in it has another checksum than when saved")
    return saved


def note_edit(name: str, saved: dict[str, Any], checkpoint: Path, meaning: str) -> None:
    """Prints a line if this file of CODE is not the one that the checkpoint was saved with."""
    if saved.get(name, CODE[name]) != CODE[name]:
        copy = checkpoint.with_name(name)
        shown = f"diff {copy} {name} shows how, or an older copy there"
        info(f"{name} has changed since {checkpoint} was saved ({shown}): {meaning}")


# ---- The tensors of a state ----------------------------------------------------------------------

# What load_checkpoint opens besides tensors and these in dictionaries, lists and tuples.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def gather(x: Any) -> Any:
    """x, a state, with all its tensors on the CPU, gathered where FSDP has cut them up (every
    process has to call it; only process 0 gets the contents). Raises TypeError for what could be
    saved, but not opened, such as a number of NumPy."""
    if isinstance(x, dict):
        return {gather(key): gather(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map(gather, x))
    if not isinstance(x, Tensor):
        if type(x) in PLAIN:  # NumPy's float64 is an instance of float
            return x
        may = "only tensors, numbers and text may be saved (of NumPy: x.tolist())"
        raise TypeError(f"a state of this run holds {type(x)}, but {may}")
    x = x.detach()
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.cpu() if os.environ.get("RANK", "0") == "0" else None


def cut_like(x: Any, own: Any) -> Any:
    """The way back: a copy of x, a state in a file, where each tensor has the device, the layout
    and FSDP's cuts of the one that `own`, the state as it is now, has in its place."""
    if isinstance(x, dict):
        now = own if isinstance(own, dict) else {}
        return {key: cut_like(value, now.get(key)) for key, value in x.items()}
    if isinstance(x, list | tuple):
        now = own if isinstance(own, list | tuple) and len(own) == len(x) else [None] * len(x)
        return type(x)(map(cut_like, x, now))
    if not isinstance(x, Tensor):
        return x
    if not isinstance(own, Tensor) or own.shape != x.shape:
        return x.clone()  # the file may be mapped
    if not hasattr(own, "full_tensor"):
        return torch.empty_like(own, dtype=x.dtype).copy_(x)
    from torch.distributed.tensor import distribute_tensor

    x = x.to(own.device)
    return distribute_tensor(x, own.device_mesh, own.placements, src_data_rank=None)


# ---- Things with a state -------------------------------------------------------------------------


class Named:
    """An optimiser whose state goes by the names of its parameters; torch's goes by numbers."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module):
        name_of = {p: name for name, p in model.named_parameters()}
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.names = [name_of.get(p, f"number {i}") for i, p in enumerate(self.params)]
        self.made = [dict(group) for group in optimizer.param_groups]  # lr, weight decay and so on

    def state_dict(self) -> dict[str, Any]:
        """An option of a group is left out if it is what it was made, such as the weight decay: a
        run that goes on takes it from its settings, which may have changed. What the optimiser has
        changed, such as a counter, is kept."""
        state = self.optimizer.state_dict()
        moments = {self.names[i]: x for i, x in state["state"].items()}
        groups = [
            {k: x for k, x in now.items() if k != "params" and (k not in made or x != made[k])}
            for now, made in zip(state["param_groups"], self.made, strict=True)
        ]
        return state | {"names": self.names, "state": moments, "param_groups": groups}

    def load_state_dict(self, stored: dict[str, Any]):
        now, changed = self.optimizer.state_dict()["param_groups"], stored["param_groups"]
        if stored["names"] != self.names or len(changed) != len(now):
            raise Refusal("its optimiser has other parameters, or in other groups")
        groups = [
            group | options | {"params": group["params"]}  # a stranger's file may have others
            for group, options in zip(now, changed, strict=True)
        ]
        fused, moments = any(group.get("fused") for group in groups), {}
        for name, kept in stored["state"].items():
            i = self.names.index(name)
            for key, x in kept.items():
                shape = () if key == "step" else tuple(self.params[i].shape)
                # Nobody else looks: a fused optimiser would write beyond a moment's memory.
                if fused and isinstance(x, Tensor) and tuple(x.shape) != shape:
                    raise Refusal(f"{key} of {name} is {tuple(x.shape)}, expected {shape}")
            moments[i] = {key: cut_like(x, self.params[i]) for key, x in kept.items()}
        self.optimizer.load_state_dict(stored | {"state": moments, "param_groups": groups})
        # torch has cast them to the parameters' dtype, which only a fused optimiser depends on.
        for i, kept in moments.items() if not fused else ():
            state = self.optimizer.state[self.params[i]]
            state |= {k: x.to(state[k].device) for k, x in kept.items() if isinstance(x, Tensor)}


def by_name(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Named]:
    """The optimisers as states of a run."""
    return {f"{type(x).__name__} {i}": Named(x, model) for i, x in enumerate(optimizers)}


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0  # trained on
    # By name: the sum since the last line of the log, on the device, so that no step has to wait
    # for it; and of how many steps it is.
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    skipped: int = 0  # steps since that line whose gradient was not finite
    best_length: int = 0  # of best.pt: tokens of the windows trained for
    best_loss: float = math.inf  # of best.pt

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]):
        vars(self).update(state)


class RandomNumbers:
    """torch's generators, the CPU's and the device's, of every process: a thing with a state."""

    def __init__(self, machine: Machine):
        self.machine, self.cuda = machine, machine.device.type == "cuda"

    def state_dict(self) -> dict[str, list]:
        own = [torch.get_rng_state()]
        if self.cuda:
            own.append(torch.cuda.get_rng_state(self.machine.device))
        return {"by_rank": of_all(own)}

    def load_state_dict(self, state: dict[str, list]):
        """A process that the run has not had before keeps its own."""
        ranks, rank = state["by_rank"], self.machine.rank
        if rank >= len(ranks):
            return
        cpu, *rest = ranks[rank]
        torch.set_rng_state(cpu)
        if rest and self.cuda:
            torch.cuda.set_rng_state(rest[0], self.machine.device)
