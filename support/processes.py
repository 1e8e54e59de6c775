"""Where a training runs: processes under torchrun, device, dtype of products, DDP or FSDP.

Every process reads the same, shared folder, and process 0 writes. Where one refuses or dies,
torchrun ends the others.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.settings import Refusal, info, short


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

    def max(self, x: Tensor) -> Tensor:
        """The largest of all processes, element by element, in place."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def any(self, x: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum(torch.tensor(float(x))))  # on the CPU, so that no GPU is waited for

    def check_alike(self, **what: Any):
        """Raises Refusal, on every process, unless all have the same by each of the names."""
        digests = {k: hashlib.sha256(repr(x).encode()).hexdigest() for k, x in what.items()}
        first, *others = of_all(digests)
        for rank, other in enumerate(others, 1):
            if differ := [name for name in first if other[name] != first[name]]:
                told = f"{' and '.join(differ)} of process {rank} differ from those of process 0"
                raise Refusal(f"{told}: all have to read the same folders, on a shared disk.")

    def check_weights(self, model: nn.Module):
        """Raises Refusal, on every process, where DDP's have parted: an edit has changed a weight
        or buffer by what one process alone has seen. (Rounding may differ from card to card.)"""
        if self.world == 1:
            return
        norms = {name: x.double().norm().item() for name, x in model.state_dict().items()}
        first, *others = of_all(norms)
        for rank, other in enumerate(others, 1):
            for name, x in first.items():
                if not math.isclose(x, other[name], rel_tol=1e-3, abs_tol=1e-9) and x == x:
                    told = f"{name} of process {rank} differs from that of process 0"
                    way = "make what changes it alike with machine.sum or machine.max"
                    raise Refusal(f"{told}: {way} (docs/HACKING.md).")


def start(config) -> Machine:
    """Joins the processes of torchrun and opens the device. It sets config.dtype, which a
    checkpoint keeps. Raises Refusal where the device cannot be used."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        join()
    device = start_device(config)
    # A measurement may come out differently: process 0's holds for all.
    config.dtype, why = of_all(choose_dtype(config, device))[0]
    return Machine(device, getattr(torch, config.dtype), rank, world, why)


def join():
    """Makes the group of torchrun's processes."""
    if not dist.is_initialized():
        # A default argument in this module is the group that exists when it is imported. DDP
        # imports it. Imported after the group was made, it would keep gloo's threads alive after
        # destroy_process_group, and they may abort the process while Python ends. (Under FSDP they
        # stay in any case: its DeviceMesh, which has the group, is still alive then.)
        import torch.distributed.nn

        # gloo beside nccl: flags and objects that stay on the CPU never wait for the GPU.
        gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def of_all(x: Any) -> list:
    """What each process has for x, by rank."""
    everything = [x]
    if dist.is_initialized():
        everything *= dist.get_world_size()
        dist.all_gather_object(everything, x)
    return everything


def once(make: Callable[[], object]):
    """Process 0 calls make(), and the others wait for it."""
    if os.environ.get("RANK", "0") == "0":
        make()
    of_all(None)


def end():
    """Parts the processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_device(config) -> torch.device:
    """The device that is asked for, set up. Raises Refusal where it cannot be used."""
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


def usable_device(name: str) -> torch.device:
    """The device of that name, `auto` CUDA if there is one, else the CPU. Raises Refusal."""
    if name == "auto":  # mps has to be named: PyTorch's results there have been wrong too often
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # meta has none
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"device {name!r} cannot be used here: try cpu ({short(error)})") from None
    return torch.device(name)


def choose_dtype(config, device: torch.device) -> tuple[str, str]:
    """The dtype of products, and the reason in words: what is asked for, or what a resumed run has
    had; for auto what is measured to be fast."""
    if config.dtype != "auto" and not config.resume:
        return config.dtype, "as asked"
    fast, why = fast_dtype(device)
    fast = str(fast).removeprefix("torch.")
    if config.dtype in ("auto", fast):
        return fast, why
    return config.dtype, f"as asked or as before; --dtype=auto would take {fast}: {why}"


CLEARLY = 1.5  # bfloat16 must be so many times as fast, to pay for casts and lost precision


@functools.cache
def fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype in which this machine should multiply, bfloat16 or float32, and why, in words.

    On a CPU it is measured, once per process and in some 50 ms: a flag of the processor tells that
    bfloat16 is known, not that it is fast. One core is timed, as other work disturbs that least.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has units for its products"
        return torch.float32, "this GPU emulates bfloat16"
    if device.type != "cpu":
        return torch.float32, "bfloat16 was never tried there"
    x, w = torch.randn(1024, 256), torch.randn(512, 256)
    seconds = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(8):  # in turns
            for dtype, times in seconds.items():
                factors = x.to(dtype), w.to(dtype)
                began = time.perf_counter()
                F.linear(*factors)
                times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    work = 2e-9 * len(w) * x.numel()  # 1e9 operations
    low, high = (work / min(seconds[d]) for d in (torch.bfloat16, torch.float32))
    reason = f"products of one core: bfloat16 {low:.0f}, float32 {high:.0f} GFLOP/s"
    return torch.bfloat16 if low > CLEARLY * high else torch.float32, reason


def wrap(model: nn.Module, config, machine: Machine) -> nn.Module:
    """The module whose call trains: compiled, and averaging gradients over the processes."""
    sharded = machine.world > 1 and config.parallel == "fsdp"
    # Autograd keeps the bf16 or FP8 copies of the weights that it multiplied, and under FSDP these
    # are whole weights, of all blocks at once. Recomputing a block keeps none, for a third more
    # work. (FSDP's mixed precision would not be exact: it rounds gate and norms to bf16 too.)
    model.recompute = config.recompute or sharded
    blocks = [*model.layers, *model.mtp]
    compile_network(model, config, machine)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(machine.device.type, (machine.world,))
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
    elif machine.world > 1:
        # Buffers are broadcast at a step's first forward alone, when all expert counts are 0.
        # Gradients are views of its buckets, as long as they are set to zero and not to None: else
        # those of a step's first micro-batch would be a second copy.
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def compiles(config, device: torch.device) -> bool:
    """Whether the network is to be compiled: as config.compile says; "auto" is on CUDA in bfloat16,
    unless a trial finds that nothing can be compiled there. (In other formats the experts' counts
    are constants of the graphs, so that each step would compile its own.) FP8 never is on a CPU:
    there torch, up to 2.15 at least, compiles casts to E4M3 into wrong ones, where rows are no
    multiple of a vector's length."""
    if config.fp8 and device.type == "cpu":
        return False
    if config.compile != "auto":
        return bool(config.compile)
    return device.type == "cuda" and config.dtype == "bfloat16" and can_compile(device)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Tries it with one sum, in some seconds. Says in a line why not."""
    try:
        torch.compile(lambda x: x + x.sum())(torch.ones(8, device=device))
    except Exception as error:  # no Triton, no C compiler, an old GPU: each has its own error
        info(f"nothing is compiled, for {short(error)}")
        return False
    return True


def compile_network(model: nn.Module, config, machine: Machine):
    """Where `compiles` says so: each block becomes a graph, which torch compiles when it first
    runs, for each length and number of windows. On CUDA the last norm and the loss, too, and
    evaluations run these graphs. All is computed as model.py says, but for roundings."""
    if not compiles(config, machine.device):
        return
    settings = torch._dynamo.config
    # Layers of a kind share their graphs, one for each mode and size of windows. Beyond 8 of one
    # function dynamo would stop compiling.
    settings.recompile_limit = 64
    # Else every graph is cut in pieces the size of DDP's buckets; a block is a small graph.
    settings.optimize_ddp = False
    # What nobody has asked for must not end a run, if an edit is nothing that can be compiled.
    settings.suppress_errors = config.compile == "auto"
    logging.getLogger("torch._dynamo.convert_frame").addFilter(tell_uncompiled)
    parts = [*model.layers, *model.mtp]
    told = "each length of windows is compiled when it first comes, for one to three minutes"
    if machine.device.type == "cuda":
        parts.append(model.norm)
        # In a graph no logit is held in float32.
        model.cross_entropy = torch.compile(model.cross_entropy, dynamic=False)
    else:
        told += "; on a CPU a block is several graphs, as its experts' rows are counted in between"
    info(f"{told} (--compile=False does without)")
    for part in parts:
        part.compile(dynamic=False)  # a graph for each length of windows


def tell_uncompiled(record: logging.LogRecord) -> bool:
    """A filter of dynamo's log. Its warning that a function could not be compiled and stays eager
    is a page long; this prints a line in its place."""
    found = re.search(r"WON'T CONVERT (\S+) (\S+) line (\d+)", record.getMessage())
    if found and record.exc_info:
        function, file, line = found.groups()
        why = short(record.exc_info[1], 100)
        costs = "it runs eagerly, slower and with more memory (--compile=True ends the run there)"
        info(f"{function} at {file}:{line} is not compiled ({why}): {costs}")
    return not found


@contextmanager
def telling_compilation() -> Iterator[None]:
    """Says how long it took to run what is within, if graphs were compiled in it."""

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    loaded = "torch._dynamo" in sys.modules  # else nothing is compiled; to load it takes seconds
    before, began = loaded and graphs(), time.perf_counter()
    yield
    if loaded and (new := graphs() - before):
        info(f"compiled {new} graphs; with them this took {time.perf_counter() - began:.0f} s")


@contextmanager
def compiling() -> Iterator[None]:
    """Within `with compiling():` a failure of torch.compile becomes a Refusal that names the line
    of Python it came to: a compiler is missing, or this line cannot be compiled. An error that the
    code has without --compile, too, stays what it is."""
    try:
        yield
    except RuntimeError as error:
        known = torch._dynamo.exc  # imported no sooner, as that takes seconds
        if not isinstance(error, known.TorchDynamoException):
            raise
        if isinstance(error, known.TorchRuntimeError):  # of a product whose shapes do not fit, say
            raise
        stack = getattr(error, "real_stack", None)
        at = f" at {stack[-1].filename}:{stack[-1].lineno}, in {stack[-1].name}" if stack else ""
        why = short(error)
        raise Refusal(f"--compile cannot be used here ({why}{at}); leave it out") from error


def sync_gradients(trainer: nn.Module, now: bool):
    """Tells DDP whether the next backward pass averages gradients over the processes (`now`): that
    of the last micro-batch alone. FSDP averages in each: else every card would hold them all."""
    trainer.require_backward_grad_sync = now  # DDP's
