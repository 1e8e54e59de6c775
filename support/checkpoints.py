"""A checkpoint: {name: thing.state_dict()} for everything a run has to restore, and its settings.

train() in train.py names these things. Here are the ones that torch lacks: optimiser states by
parameter name, the state of random numbers, and the run's progress. A file holds whole tensors:
FSDP's shards are gathered before writing (`gather`) and cut again after reading (`shard_like`).
support/runs.py decides when and where a checkpoint is written.
"""

import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.processes import Machine, gather_objects
from support.settings import Refusal, info, sentence_of, short

ROOT = Path(__file__).parent.parent
# The code that made the weights, read when the process starts: later edits do not run in it.
CODE = {name: (ROOT / name).read_text("utf-8") for name in ("model.py", "train.py")}

# ---- The file ------------------------------------------------------------------------------------


def checkpoint_file(path: str | Path) -> Path:
    """The file with the weights: in a run's folder best.pt, else ckpt.pt."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    return folder / ("best.pt" if (folder / "best.pt").exists() else "ckpt.pt")


def load_checkpoint(path: str | Path, whole: bool = True) -> dict[str, Any]:
    """Opens what train.py saved in a file, or in a run's folder (best.pt, else ckpt.pt).

    Tensors stay on the disk until they are used; nothing in the file can run code. whole: first
    read the whole file and compare its checksums, which its settings alone do not need.
    """
    file = checkpoint_file(path)
    kinds = "a run's folder (such as weights/small), a checkpoint file, or a directory with a "
    kinds += "config.json"
    if not file.exists():
        raise Refusal(f"there is no {file}: name {kinds}.")
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not compare checksums
            if whole and (bad := archive.testzip()):
                raise ValueError(f"the checksum of {bad} in it is wrong")
        saved = torch.load(file, "cpu", weights_only=True, mmap=True)
        dict(saved["model_config"])  # fails in a file of another program
    except Exception as error:  # a damaged file may raise anything
        if sentence_of(error):  # such as a missing permission, which is no damage
            raise
        reason = short(error, 100)
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):  # an object of another class
            foreign = short(foreign[1], 80)
            reason = f"it holds {foreign!r}; only tensors, numbers and text are opened"
        message = f"{file} is damaged, or no checkpoint of train.py ({reason}): name {kinds}."
        raise Refusal(message) from None
    return saved


def note_edit(name: str, saved: dict[str, Any], checkpoint: Path, meaning: str) -> None:
    """Prints a message if this file of CODE has changed since the checkpoint was saved."""
    copy = checkpoint.with_name(name)
    if saved.get(name, CODE[name]) != CODE[name]:
        info(
            f"{name} has changed since {checkpoint} was saved: {meaning} (diff {copy} {name} shows "
            "how, or an older copy there)"
        )


# ---- The tensors of a state ----------------------------------------------------------------------

# Types that load_checkpoint opens, besides tensors, in dictionaries, lists and tuples.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def gather(x: Any) -> Any:
    """A state x with all its tensors on the CPU, gathered if FSDP has sharded them. Every process
    has to call it; only process 0 gets the tensors. Raises TypeError for a type that could be saved
    but not opened, such as NumPy's numbers."""
    if isinstance(x, dict):
        return {gather(key): gather(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map(gather, x))
    if not isinstance(x, Tensor):
        if type(x) in PLAIN:  # not isinstance: NumPy's float64 is a float
            return x
        raise TypeError(
            f"a state of this run holds {type(x)}, but only tensors, numbers and text may be saved "
            "(for NumPy's types: x.tolist())"
        )
    x = x.detach()
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.cpu() if os.environ.get("RANK", "0") == "0" else None


def shard_like(x: Any, own: Any) -> Any:
    """The inverse of `gather`: a copy of the stored state x, whose tensors have device, layout and
    shards of those at the same place in `own`, the current state."""
    if isinstance(x, dict):
        now = own if isinstance(own, dict) else {}
        return {key: shard_like(value, now.get(key)) for key, value in x.items()}
    if isinstance(x, list | tuple):
        now = own if isinstance(own, list | tuple) and len(own) == len(x) else [None] * len(x)
        return type(x)(map(shard_like, x, now))
    if not isinstance(x, Tensor):
        return x
    if not isinstance(own, Tensor) or own.shape != x.shape:
        return x.clone()  # x may be memory-mapped
    if not hasattr(own, "full_tensor"):
        return torch.empty_like(own, dtype=x.dtype).copy_(x)
    from torch.distributed.tensor import distribute_tensor

    x = x.to(own.device)
    return distribute_tensor(x, own.device_mesh, own.placements, src_data_rank=None)


# ---- Things with a state -------------------------------------------------------------------------


class NamedOptimizer:
    """An optimiser whose state is stored by parameter name; torch's own goes by number."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module):
        name_of = {p: name for name, p in model.named_parameters()}
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.names = [name_of.get(p, f"number {i}") for i, p in enumerate(self.params)]
        self.initial = [dict(group) for group in optimizer.param_groups]  # lr, weight decay, ...

    def state_dict(self) -> dict[str, Any]:
        """Leaves out options of a group that have their initial value, such as the weight decay: a
        resumed run takes them from its settings, which may have changed. Options that the optimiser
        has changed, such as a counter, are stored."""
        state = self.optimizer.state_dict()
        moments = {self.names[i]: x for i, x in state["state"].items()}
        groups = [
            {k: x for k, x in now.items() if k != "params" and (k not in old or x != old[k])}
            for now, old in zip(state["param_groups"], self.initial, strict=True)
        ]
        return state | {"names": self.names, "state": moments, "param_groups": groups}

    def load_state_dict(self, stored: dict[str, Any]):
        now, changed = self.optimizer.state_dict()["param_groups"], stored["param_groups"]
        if stored["names"] != self.names or len(changed) != len(now):
            raise Refusal("its optimiser has other parameters or groups")
        groups = [
            group | options | {"params": group["params"]}  # never the file's
            for group, options in zip(now, changed, strict=True)
        ]
        fused, moments = any(group.get("fused") for group in groups), {}
        for name, state in stored["state"].items():
            i = self.names.index(name)
            for key, x in state.items():
                shape = () if key == "step" else tuple(self.params[i].shape)
                # torch does not check this: a fused optimiser would write beyond a moment's memory.
                if fused and isinstance(x, Tensor) and tuple(x.shape) != shape:
                    raise Refusal(f"{key} of {name} is {tuple(x.shape)}, expected {shape}")
            moments[i] = {key: shard_like(x, self.params[i]) for key, x in state.items()}
        self.optimizer.load_state_dict(stored | {"state": moments, "param_groups": groups})
        # torch has cast the moments to the parameters' dtype. Only a fused optimiser needs that.
        for i, moment in moments.items() if not fused else ():
            state = self.optimizer.state[self.params[i]]
            state |= {k: x.to(state[k].device) for k, x in moment.items() if isinstance(x, Tensor)}


def by_name(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, NamedOptimizer]:
    """The optimisers, for the states of a run."""
    return {f"{type(x).__name__} {i}": NamedOptimizer(x, model) for i, x in enumerate(optimizers)}


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    tokens: int = 0  # trained on
    # {name: (sum, steps)} since the last line of the log. Sums stay on the device, so that no step
    # waits for them.
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    skipped: int = 0  # steps since that line, because their gradient was not finite

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]):
        """Numbers that older code has saved and this class does not have are left out."""
        vars(self).update({name: x for name, x in state.items() if name in vars(self)})


class RandomNumbers:
    """The states of torch's generators, the CPU's and the device's, of every process."""

    def __init__(self, machine: Machine):
        self.machine, self.cuda = machine, machine.device.type == "cuda"

    def state_dict(self) -> dict[str, list]:
        own = [torch.get_rng_state()]
        if self.cuda:
            own.append(torch.cuda.get_rng_state(self.machine.device))
        return {"by_rank": gather_objects(own)}

    def load_state_dict(self, state: dict[str, list]):
        """A process with a rank that the run did not have before keeps its own states."""
        ranks, rank = state["by_rank"], self.machine.rank
        if rank >= len(ranks):
            return
        cpu, *rest = ranks[rank]
        torch.set_rng_state(cpu)
        if rest and self.cuda:
            torch.cuda.set_rng_state(rest[0], self.machine.device)
