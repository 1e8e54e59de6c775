"""A round of decoding as a graph that torch compiles (`--compile`).

A graph contains the code that ran when it was traced. Before each call PyTorch evaluates guards: it
checks that modules, settings and tensors have not changed, and compiles again if they have. With
the hundreds of modules of a network, this takes as long as the round itself. So guards are
evaluated only before the first compiled round of each text (`prepare`). They do not cover the
code of methods; `methods` does.

On a CPU, products with few rows become sums, which the compiler fuses with the operations around
them (`mm`, `addmm`, `bmm` below). This replaces aten's products, whatever the network.
"""

import functools
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.settings import info

ROWS = 16  # a product with up to this many rows of x (in bmm: or columns of w) becomes a sum
COMPILED: set[Callable] = set()  # the graphs that this process has compiled


def methods(*parts: nn.Module | type) -> frozenset:
    """The code of all methods of these classes, and of the classes of these modules and their
    submodules. nn.Module is left out: torch replaces two of its methods when it first compiles."""
    modules = [x for part in parts if isinstance(part, nn.Module) for x in part.modules()]
    kinds = {type(x) for x in modules} | {x for x in parts if isinstance(x, type)}
    bases = {base for kind in kinds for base in kind.__mro__} - {nn.Module}
    every = (x for base in bases for x in vars(base).values())
    return frozenset(code for x in every if (code := getattr(x, "__code__", None)))


@functools.cache
def compiled(function: Callable, on_cpu: bool, key: tuple) -> Callable:
    """The function, which torch compiles. key: the result of `methods`, and the kind of text. (If
    all kinds of text shared a function, they would soon reach its limit of graphs.)"""
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # a hook may be added later
    torch._dynamo.config.recompile_limit = 64  # a graph after each edit
    # torch.compile stores graphs by the function's code object, so each key has a copy of it.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__)
    how = {"backend": as_sums} if on_cpu else {"options": {"triton.cudagraphs": True}}
    return torch.compile(copy, fullgraph=True, dynamic=False, **how)


def room(size: int) -> int:
    """The next power of two. A graph fits texts of one size, so there are few sizes."""
    return max(256, 1 << (size - 1).bit_length())


def compiled_round(text: Any, n: int, u: Tensor) -> Callable[[int, Tensor], Tensor]:
    """Returns a function of n and u that runs the next round of a text (sample.py) of n tokens:
    text.run in the first rounds, which read fewer positions than compiled code does, then
    text.round, compiled. u: the random numbers of that round."""
    if n <= max(text.prompt, text.drafts + text.depth):
        return text.run
    if text.graph is None:
        B, size = text.tokens.shape
        sampled = isinstance(text.filters.temperature, Tensor)
        kind = sampled, *text.filters[1:], B, size, text.drafts, text.newest.dtype, u.device
        code = methods(text.model, type(text), type(text.cache))
        text.graph = compiled(type(text).round, u.device.type == "cpu", (code, kind))
        prepare(text, n, u)
    return lambda n, u: call(text, n, u, guarded=False)


def call(text: Any, n: int, u: Tensor, guarded: bool) -> Tensor:
    position = torch.full((), n, device=u.device)  # filled there: a copy to a GPU would wait for it
    with torch.compiler.set_stance(skip_guard_eval_unsafe=not guarded):
        return text.graph(text, position, u)


def prepare(text: Any, n: int, u: Tensor):
    """Runs a text's first compiled round, before time is measured: it evaluates the guards, and a
    new graph is compiled in its first call. The caller runs the same round again, with the same
    result. From then on nothing that the code depends on changes within the text.

    A CUDA graph is recorded with the addresses of its tensors, so the text's and the model's must
    not move. torch compares addresses before it replays a recording, and records again, without
    compiling, if they have changed. It keeps all recordings; after 128 of a graph it makes no more,
    and the graph's kernels are started one by one.
    (In torch: mark_static_address, cudagraph_trees.py.)
    """
    on_cpu, new, began = u.device.type == "cpu", text.graph not in COMPILED, time.perf_counter()
    if not on_cpu:
        # torch uses no CUDA graph if an input is written to, unless its address is fixed.
        for x in tensors([text.model, *map(vars, (text, text.cache, text.mtp_cache))]):
            torch._dynamo.mark_static_address(x)
    if new:
        info("compiling a round of decoding, which takes half a minute or more")
    for _ in range(1 if on_cpu else 3):  # a GPU records in the second call
        call(text, n, u, guarded=True)
    if new:
        COMPILED.add(text.graph)
        info(f"compiled in {time.perf_counter() - began:.0f} s")


def tensors(parts: Any) -> list[Tensor]:
    """All tensors in lists, tuples, dictionaries and modules."""
    leaves = []
    for part in torch.utils._pytree.tree_leaves(parts):
        if isinstance(part, nn.Module):
            leaves += [*part.parameters(), *part.buffers()]
        elif isinstance(part, Tensor):
            leaves.append(part)
    return leaves


# ---- Products of few rows, on a CPU --------------------------------------------------------------


def in_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mm(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K), w (K, N): the weight is read once for all rows."""
    if len(x) > ROWS or x.device.type != "cpu":
        return NotImplemented
    from torch._inductor.inductor_prims import force_stride_order

    # Writes x to memory first; otherwise it would be recomputed for every column of w.
    x = force_stride_order(in_float32(x), x.stride())
    return torch.cat([(w.mT * row).sum(-1)[None] for row in x.split(1)]).to(w.dtype)


def addmm(b: Tensor, x: Tensor, w: Tensor, *, beta=1, alpha=1) -> Tensor:
    y = mm(x, w)
    return y if y is NotImplemented else beta * b + alpha * y


def bmm(x: Tensor, w: Tensor) -> Tensor:
    """x (n, M, K), w (n, K, N)."""
    if min(x.shape[1], w.shape[2]) > ROWS or x.device.type != "cpu":
        return NotImplemented
    return (in_float32(x)[:, :, None] * w.mT[:, None]).sum(-1).to(w.dtype)


def baddbmm(b: Tensor, x: Tensor, w: Tensor, *, beta=1, alpha=1) -> Tensor:
    y = bmm(x, w)
    return y if y is NotImplemented else beta * b + alpha * y


def as_sums(graph: torch.fx.GraphModule, inputs: list[Tensor], **_) -> Callable:
    """Inductor with these products, for torch.compile(backend=...)."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    table = {aten.mm: mm, aten.addmm: addmm, aten.bmm: bmm, aten.baddbmm: baddbmm}
    table = {product.default: sums for product, sums in table.items()}
    options = dict(cpp_wrapper=True, size_asserts=False, alignment_asserts=False)
    options["cpp.enable_floating_point_contract_flag"] = "fast"  # a * b + c is one instruction
    return compile_fx(
        graph, inputs, config_patches=options, decompositions=select_decomp_table() | table
    )
