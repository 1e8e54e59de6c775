"""Processes under torchrun, the device, the dtype of products, and DDP or FSDP around a network."""

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.ops import fast_dtype, has_grouped_mm
from support.settings import info

Result = TypeVar("Result")


def join_processes():
    """Under torchrun, joins the other processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # A default argument in this module is the group that exists when it is imported. DDP and
        # dcp import it. Imported after the group was made, it would keep gloo's threads alive after
        # destroy_process_group, and they may abort the process while Python ends.
        import torch.distributed.nn

        # gloo beside nccl: flags and files that stay on the CPU never wait for the GPU.
        gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def is_first() -> bool:
    """Whether this is process 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_all(make: Callable[[], Result]) -> Result:
    """Calls make() on every process. If one refuses, all end: else they would wait for it. Process
    0 raises the refusal, the others exit without a word."""
    if not dist.is_initialized():
        return make()
    result, refusal = None, None
    try:
        result = make()
    except (ValueError, OSError, ImportError, SystemExit) as error:
        refusal = error
    refusals = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    refused = [(rank, error) for rank, error in enumerate(refusals) if error is not None]
    if not refused:
        return result
    rank, error = refused[0]
    if not is_first():
        sys.exit(error.code if isinstance(error, SystemExit) else 1)
    raise error if rank == 0 else ValueError(f"process {rank}: {error}")


def on_first(make: Callable[[], Result]) -> Result:
    """Calls make() on process 0 and gives its result to all. No other one touches the folder of
    a run."""
    if not dist.is_initialized():
        return make()
    result = [on_all(lambda: make() if is_first() else None)]
    dist.broadcast_object_list(result)
    return result[0]


@dataclass
class Machine:
    """Where this process runs, what it computes in, and which of how many it is."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    why: str = ""  # why products are in this dtype

    def autocast(self) -> torch.autocast:
        low = self.dtype == torch.bfloat16
        # Without its cache, which would hold the bf16 copies of all weights, FSDP's whole ones too.
        return torch.autocast(self.device.type, torch.bfloat16, low, cache_enabled=False)

    def sum(self, x: Tensor) -> Tensor:
        """x added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def start(config) -> Machine:
    """Device and dtype of this process. It sets config.dtype, which a checkpoint keeps."""
    join_processes()
    device = on_all(lambda: start_device(config))
    config.dtype, why = choose_dtype(config, device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Machine(device, getattr(torch, config.dtype), rank, world, why)


def start_device(config) -> torch.device:
    """The device that is asked for, set up. Raises ValueError where it cannot be used."""
    name = config.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    device = usable_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu" and sys.platform == "linux":
        # glibc returns large blocks to the kernel, whose pages cost a tenth of a step to get anew.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, of 32 MB
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device


def choose_dtype(config, device: torch.device) -> tuple[str, str]:
    """The dtype of products, and the reason in words: what is asked for, or what a resumed run has
    had; for auto what is fast, as process 0 measures it."""
    if config.dtype != "auto" and not config.resume:
        return config.dtype, "as asked"
    fast, why = on_first(lambda: fast_dtype(device))
    fast = str(fast).removeprefix("torch.")
    if config.dtype in ("auto", fast):
        return fast, why
    return config.dtype, f"as asked or as before; --dtype=auto would take {fast}: {why}"


def wrap(model: nn.Module, config, machine: Machine) -> nn.Module:
    """The module whose call trains: compiled, and averaging gradients over the processes."""
    sharded = machine.world > 1 and config.parallel == "fsdp"
    # Autograd keeps the bf16 or FP8 copies of the weights that it multiplied, and under FSDP these
    # are whole weights, of all blocks at once. Recomputing a block keeps none, for a third more
    # work. (FSDP's mixed precision would not be exact: it rounds gate and norms to bf16 too.)
    model.recompute = config.recompute or sharded
    blocks = [*model.layers, *model.mtp]
    if config.compile:
        # One graph per block, mode and batch size; beyond 8 of them dynamo would stop compiling.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.capture_dynamic_output_shape_ops = True  # rows in ops.sort_by_expert
        torch.compiler.assume_constant_result(has_grouped_mm)  # else a break before every call
        info("every new shape of a batch is compiled first, which may take minutes")
        for block in blocks:
            block.compile()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(machine.device.type, (machine.world,))
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
    elif machine.world > 1:
        # Buffers are broadcast at a step's first forward alone, when all expert counts are 0.
        return DistributedDataParallel(model)
    return model


def usable_device(name: str) -> torch.device:
    """The device of that name, `auto` CUDA if there is one, else the CPU. Raises ValueError."""
    if name == "auto":  # mps has to be named: PyTorch's results there have been wrong too often
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # meta has none
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: try cpu ({error!s:.150})") from None
    return torch.device(name)
