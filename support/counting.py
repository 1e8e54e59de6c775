"""Kernels, bytes, waits and memory of a computation on a GPU that is not there.

Fake tensors have shapes and dtypes, but no numbers, so that a step of a large network takes seconds
on any machine. They claim to be on the CPU; `on_a_card` lets ops.py take the way of a Hopper GPU.

    kernel    a call of a PyTorch operation that is no view. Where the code fuses (ops.fused), the
              whole function is one.
    bytes     its inputs and outputs, each once, whatever is read again or stays in a cache
    wait      where the host needs a number that the GPU computes (where a size depends on it, as
              in nonzero(), fake tensors raise an error)
    peak      of all tensors alive at once; what the allocator loses between them comes on top

This cannot know how fast a kernel is, nor how much of it runs beside others. It gives limits.

Blocks that are compiled count as what Inductor's scheduler makes of their graphs. It decides as for
a CPU: on a GPU a kernel may be cut in two, or two be one, above all a sum or a maximum and what
follows from it, as in a norm and in FP8's quantisers: there the count is too high. What is alive
only within a graph is not in the peak, nor is a wait within it seen, nor what FP8's products for
all experts do beside them.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import ops

NO_KERNEL = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "device",
    "detach_",
    "lift_fresh",
}
FOR_ALL_EXPERTS = {"multiply", "weight_gradient"}  # fp8.py's operations in a compiled graph
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm_v2"} | FOR_ALL_EXPERTS


def tensors_in(*values: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def bytes_of(x: Tensor) -> int:
    """What has to be read: an expanded dimension counts once."""
    n = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride or size == 0 else 1
    return n


class Count(TorchDispatchMode):
    """Counts all that runs within `with count:`, by operation."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes, self.waits = Counter(), Counter(), Counter()
        self.fp8_flops, self.live, self.peak, self.paused = 0, 0, 0, False
        self.known = weakref.WeakSet()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else nothing is compiled within it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func is torch.ops.aten._local_scalar_dense.default:  # x.item()
            self.waits["item"] += 1
            return 1  # any number
        if func is torch.ops.aten._scaled_mm_v2.out:  # which has no rule for fake tensors
            torch.ops.aten._scaled_mm_v2.default(*args)  # but this, which checks all layouts
            out = kwargs["out"]
        else:
            out = func(*args, **kwargs)
        if self.paused:
            return out
        if name == "_scaled_mm_v2":
            self.fp8_flops += 2 * args[0].numel() * args[1].shape[1]
        if not (func.is_view or name in NO_KERNEL):
            self.note(name, (args, kwargs, out))
        return out

    def note(self, name: str, values: Any):
        """A kernel that reads and writes the tensors in values."""
        self.kernels[name] += 1
        self.bytes[name] += sum(map(bytes_of, tensors_in(values)))
        for x in tensors_in(values):
            self.follow(x)

    def follow(self, x: Tensor):
        """Counts x's memory until it is freed."""
        memory = x.untyped_storage()
        if memory not in self.known:
            self.known.add(memory)
            self.live += memory.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(memory, self.free, memory.nbytes())

    def free(self, size: int):
        self.live -= size

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def as_one(self, function: Callable) -> Callable:
        """The function as one kernel. No gradient runs through it."""

        def call(*args, **kwargs):
            with self.pause():
                out = function(*args, **kwargs)
            if not self.paused:
                self.note(function.__name__, (args, kwargs, out))
            return out

        return call


@contextmanager
def on_a_card() -> Iterator[Count]:
    """Within it tensors are fake, the code takes a Hopper GPU's way, and the count is its value."""
    count, yes = Count(), lambda *_: True
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.multiple(ops, on_gpu=yes, has_grouped_mm=yes, compiled=count.as_one),
    ):
        yield count


# ---- What torch.compile would make of it ---------------------------------------------------------


def scheduled(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> list[tuple[str, int]]:
    """The kernels, name and bytes, that Inductor makes of a graph: it lowers and fuses as for a
    CPU, and no code is written. FP8's operations for all experts are one product for each."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    view_to_reshape(graph_module)
    fake_mode = torch._guards.detect_fake_mode(inputs)
    graph, kernels = GraphLowering(graph_module, inputs, fake_mode.shape_env), []
    debug = V.set_debug_handler(DebugContext())
    with V.set_graph_handler(graph), V.set_fake_mode(fake_mode), debug:
        graph.run(*inputs)
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if isinstance(node, NopKernelSchedulerNode):
                continue
            name = "fused"
            if isinstance(node, ExternKernelSchedulerNode):
                operation = getattr(node.node, "op_overload", None)
                name = operation and operation.overloadpacket.__name__
                name = name or (node.node.python_kernel_name or "extern").rpartition(".")[2]
            kernels.append((name, node.get_read_write_buffers_sizes()))
            if name in FOR_ALL_EXPERTS:
                (experts,) = node.node.inputs[4].get_size()  # of `rows`
                kernels += [(name, 0)] * (int(experts) - 1)
    return kernels


def fp8_flops(graph_module: torch.fx.GraphModule) -> int:
    """Of a graph's products in FP8."""
    # Where an operation's second factor stands among its arguments; the first one is argument 0.
    flops, second = 0, {"_scaled_mm_v2": 1} | dict.fromkeys(FOR_ALL_EXPERTS, 2)
    for node in graph_module.graph.nodes:
        if place := second.get(getattr(node.target, "_opname", "")):
            a, b = (node.args[i].meta["val"] for i in (0, place))
            flops += 2 * a.numel() * b.shape[1]
    return flops


def as_compiled(count: Count) -> Callable:
    """A backend for torch.compile: a graph runs as it is, and counts as Inductor's kernels."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        flops, original = fp8_flops(graph_module), copy.deepcopy(graph_module)
        with count.pause():
            kernels = scheduled(graph_module, inputs)

        def run(*args):
            with count.pause():
                out = original(*args)
            for name, moved in kernels:
                count.kernels[name] += 1
                count.bytes[name] += moved
            count.fp8_flops += flops
            for x in tensors_in(out):
                count.follow(x)
            return out

        return make_boxed_func(run)

    table = select_decomp_table()
    cut = min_cut_rematerialization_partition
    return aot_autograd(fw_compiler=compiler, partition_fn=cut, decompositions=table)
