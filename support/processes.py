"""Where a training runs: processes under torchrun, device, dtype of products, DDP or FSDP.

All processes read the same, shared folder; only process 0 writes. If one refuses or dies, torchrun
ends the others.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    """This process's device, compute dtype, rank and number of processes: what `start` decides."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    dtype_reason: str = ""  # why products are in this dtype, as text
    speed: float = 0.0  # FLOP/s of bare products in it (0: not measured)
    compiled: bool = False  # whether `wrap` compiles the network

    def autocast(self) -> torch.autocast:
        low = self.dtype == torch.bfloat16
        # Without the cache, which would hold bf16 copies of all weights, even of gathered ones.
        return torch.autocast(self.device.type, torch.bfloat16, low, cache_enabled=False)

    def eager_on_cpu(self) -> AbstractContextManager:
        """Within it a compiled network runs uncompiled on a CPU: one more set of graphs would take
        minutes, more than it saves."""
        eager = self.compiled and self.device.type == "cpu"
        # Else nothing, since even set_stance("default") imports dynamo, which takes seconds.
        return torch.compiler.set_stance("force_eager") if eager else nullcontext()

    def sum(self, x: Tensor) -> Tensor:
        """Sums x over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum of x over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def any(self, x: bool) -> bool:
        """Whether x is true in any process."""
        return bool(self.sum(torch.tensor(float(x))))  # on the CPU: does not wait for a GPU

    def check_alike(self, **values: Any):
        """Raises Refusal, on every process, unless each value is the same in all processes."""
        digests = {k: hashlib.sha256(repr(x).encode()).hexdigest() for k, x in values.items()}
        first, *others = gather_objects(digests)
        for rank, other in enumerate(others, 1):
            if names := [name for name in first if other[name] != first[name]]:
                raise Refusal(
                    f"{' and '.join(names)} of process {rank} differ from those of process 0: "
                    "all have to read the same folders, on a shared disk."
                )

    def check_weights(self, model: nn.Module):
        """Raises Refusal, on every process, if DDP's copies of a weight or buffer have diverged,
        because an edit updates it from data of one process only. (Cards may round differently.)"""
        if self.world == 1:
            return
        norms = {name: x.double().norm().item() for name, x in model.state_dict().items()}
        first, *others = gather_objects(norms)
        for rank, other in enumerate(others, 1):
            for name, x in first.items():
                if not math.isclose(x, other[name], rel_tol=1e-3, abs_tol=1e-9) and x == x:
                    raise Refusal(
                        f"{name} of process {rank} differs from that of process 0: update it from "
                        "values that machine.sum or machine.max has made equal (docs/HACKING.md)."
                    )


def start(config) -> Machine:
    """Joins torchrun's processes and sets up the device. Replaces a config.dtype of "auto". Raises
    Refusal if the device cannot be used."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        join()
    device = start_device(config)
    dtype, reason = config.dtype, "as configured"
    if dtype == "auto":
        dtype, reason = fast_dtype(device)
        dtype = str(dtype).removeprefix("torch.")
    # Measurements vary, so all processes use the dtype of process 0.
    config.dtype, reason = gather_objects((dtype, reason))[0]
    dtype = getattr(torch, config.dtype)
    (speed,) = product_speeds(device, dtype)
    return Machine(device, dtype, rank, world, reason, speed, compiles(config, device))


def join():
    """Creates the process group."""
    if not dist.is_initialized():
        # In this module, which DDP imports, the current process group is a default argument. If it
        # were imported after init_process_group, it would keep gloo's threads alive after
        # destroy_process_group, and they may abort the process at exit. (Under FSDP they stay alive
        # in any case, because its DeviceMesh holds the group.)
        import torch.distributed.nn

        # gloo beside nccl: flags and objects on the CPU never wait for the GPU.
        gpu = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def gather_objects(x: Any) -> list:
    """The x of every process, by rank."""
    objects = [x]
    if dist.is_initialized():
        objects *= dist.get_world_size()
        dist.all_gather_object(objects, x)
    return objects


def once(make: Callable[[], object]):
    """Process 0 calls make(), and the others wait for it."""
    if os.environ.get("RANK", "0") == "0":
        make()
    gather_objects(None)


def end():
    """Destroys the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_device(config) -> torch.device:
    """Sets up config.device. Raises Refusal if it cannot be used."""
    name = config.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    device = usable_device(name)
    if name == "auto" and shutil.which("nvidia-smi") and "CUDA_VISIBLE_DEVICES" not in os.environ:
        info(f"the NVIDIA card is not used by PyTorch {torch.__version__}: {WHICH_PYTORCH}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu" and sys.platform == "linux":
        # By default glibc returns large blocks to the kernel; getting their pages back would cost a
        # tenth of a step.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, of 32 MB
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return device


WHICH_PYTORCH = 'see "Which cards" in docs/GPU.md for another build'


def usable_device(name: str) -> torch.device:
    """The device of this name; `auto` is CUDA if available, else the CPU. Raises Refusal."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # Apple's GPUs (mps) lack float64, in which tokens are drawn.
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise Refusal(f"device {name!r} is none of cpu, cuda and cuda:N: try cpu.")
    try:
        torch.ones(1, device=name).item()  # runs a kernel, which zeros does not; fails on meta, too
    except (RuntimeError, AssertionError) as error:
        why = f"cannot be used here ({short(error)})"
        raise Refusal(f"device {name!r} {why}: try cpu, or {WHICH_PYTORCH}.") from None
    return torch.device(name)


BF16_GAIN = 1.5  # how many times as fast bfloat16 must be, to pay for casts and lost precision


@functools.cache
def fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype in which this machine should multiply, bfloat16 or float32, and why, as text.

    On a CPU it is measured: the processor's flags say that it supports bfloat16, not that it is
    fast.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has units for its products"
        return torch.float32, "this GPU emulates bfloat16"
    low, high = (x / 1e9 for x in product_speeds(device, torch.bfloat16, torch.float32))
    reason = f"products of one core: bfloat16 {low:.0f}, float32 {high:.0f} GFLOP/s"
    return torch.bfloat16 if low > BF16_GAIN * high else torch.float32, reason


@functools.cache
def product_speeds(device: torch.device, *dtypes: torch.dtype) -> list[float]:
    """FLOP/s of a bare product in each of these dtypes, measured once. On a CPU this takes about
    50 ms and uses one core, which other work disturbs least."""
    K, M, N = (256, 1024, 512) if device.type == "cpu" else (4096, 4096, 4096)
    x, w = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    seconds = {dtype: [] for dtype in dtypes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(8):  # they take turns
            for dtype, times in seconds.items():
                factors = x.to(dtype), w.to(dtype)
                factors[0][0, 0].item()  # waits for a GPU
                began = time.perf_counter()
                F.linear(*factors)[0, 0].item()
                times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return [2 * M * N * K / min(times) for times in seconds.values()]


def wrap(model: nn.Module, config, machine: Machine) -> nn.Module:
    """Compiles the model if it is to be compiled, and wraps it for DDP or FSDP. Call the result to
    train."""
    sharded = machine.world > 1 and config.parallel == "fsdp"
    # For backward autograd keeps the bf16 or FP8 copies of weights. Under FSDP that would be whole
    # weights, of all blocks at once. Recomputing a block keeps none, for a third more work. (FSDP's
    # own mixed precision is no alternative: it rounds gate and norms to bf16, too.)
    model.recompute = config.recompute or sharded
    blocks = [*model.layers, *model.mtp]
    compile_network(model, config, machine)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(machine.device.type, (machine.world,))
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
    elif machine.world > 1:
        # DDP broadcasts buffers only in a step's first forward, when all expert counts are 0.
        # Gradients stay views of its buckets if they are set to zero, not to None. Otherwise those
        # of a step's first micro-batch would be a second copy.
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


LONG_RUN = 2000  # steps on a CPU; small.py saves 0.1 s in each, and compiles for 80 s
LONG_CUDA_RUN = 10_000  # steps; small.py has 42 graphs there, which take minutes
LARGE_STEP = 32_768  # tokens; compiled, such a step also takes half the memory


def compiles(config, device: torch.device) -> bool:
    """Whether to compile the network. "auto": in bfloat16, where minutes of compiling pay, that is
    in long runs and, on CUDA, with large steps, if a trial succeeds. (In other dtypes the experts'
    counts are constants in the graphs, so every step would compile again.) FP8 is never compiled on
    a CPU: torch, up to 2.15 at least, compiles casts to E4M3 wrongly if a row's length is no
    multiple of a vector's."""
    if config.fp8 and device.type == "cpu":
        return False
    if config.compile != "auto":
        return bool(config.compile)
    if device.type == "cuda":
        large = config.batch_size * config.block_size >= LARGE_STEP
        pays = large or config.steps >= LONG_CUDA_RUN
    else:
        pays = device.type == "cpu" and config.steps >= LONG_RUN
    return pays and config.dtype == "bfloat16" and can_compile(device)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Compiles a sum, which takes a few seconds. Prints the reason if that fails."""
    try:
        torch.compile(lambda x: x + x.sum())(torch.ones(8, device=device))
    except Exception as error:  # no Triton, no C compiler, an old GPU: each has its own error
        info(f"nothing is compiled: {short(error)}")
        return False
    return True


def compile_network(model: nn.Module, config, machine: Machine):
    """With machine.compiled, makes each block, the last norm and the loss a graph, which torch
    compiles at the first call. On CUDA evaluations use them, too. Results change only by
    rounding."""
    if not machine.compiled:
        return
    settings = torch._dynamo.config
    # Layers of the same kind share their graphs. By default dynamo stops at 8 per function.
    settings.recompile_limit = 64
    # By default DDP cuts graphs into pieces the size of its buckets; a block is a small graph.
    settings.optimize_ddp = False
    # With "auto" a block that the compiler refuses in forward runs eagerly, after a warning.
    settings.suppress_errors = config.compile == "auto"
    # On CUDA a graph for each size of windows; on a CPU one for all sizes. (A micro-batch of a
    # single window has its own.)
    dynamic = machine.device.type == "cpu"
    for part in (*model.layers, *model.mtp, model.norm):
        part.compile(dynamic=dynamic)
    # Compiled code upcasts every logit where it reads it, and so holds none in float32.
    model.cross_entropy = torch.compile(model.cross_entropy, dynamic=dynamic)


def sync_gradients(trainer: nn.Module, now: bool):
    """Sets whether DDP averages gradients over the processes in the next backward pass: `now` is
    true for the last micro-batch only. FSDP averages in every one; otherwise each card would hold
    all gradients."""
    trainer.require_backward_grad_sync = now
