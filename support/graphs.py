"""A function as one graph, which torch compiles, for all calls of one kind (`--compile`).

A compiled graph has the code in it that ran when it was made. torch would look at every call
whether that code is still the same; for the few hundred tensors and modules of a network this takes
as long as the step. So here nobody looks: the caller names a kind, and `what_runs`, which is part
of it, is looked up once per text.
"""

import functools
import numbers
import sys
import time
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.processes import compiling
from support.settings import info

GRAPHS: dict[tuple, Callable] = {}  # by kind; they serve as long as the process lives


def graph_of(function: Callable, args: tuple, kind: tuple, parts: Any, on_cpu: bool) -> Callable:
    """`function` as the graph of this kind, compiled here with these args if it is the first.

    The function is called here first, once or several times, so that compiling and recording are
    over before time is measured. So a second call with the same args must give the same result.

    A CUDA graph is recorded with the addresses of its tensors, so those of `parts` (modules,
    dictionaries, tensors) must stay where they are. torch compares the addresses before it plays a
    recording. If they are others, it records once more, without compiling. So call this once for
    each set of tensors. (In torch: mark_static_address, cudagraph_trees.py.)
    """
    graph, trials, began = GRAPHS.get(kind), 0 if on_cpu else 1, time.perf_counter()
    if graph is None:
        info("compiling a round of decoding, which may take a minute")
        graph, trials = new_graph(function, on_cpu), 3  # a GPU records in the second
    if not on_cpu:
        # CUDA graphs are skipped where an input is written to, unless its address is fixed.
        for x in tensors(parts):
            torch._dynamo.mark_static_address(x)
    with compiling():
        for _ in range(trials):
            graph(*args)
    if kind not in GRAPHS:
        GRAPHS[kind] = graph
        info(f"compiled in {time.perf_counter() - began:.0f} s")
    return graph


def new_graph(function: Callable, on_cpu: bool) -> Callable:
    """The function, which torch compiles when it is called for the first time."""
    # torch.compile keeps graphs with a function's code object: each graph has a copy of that.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__)
    if on_cpu:
        options = dict(cpp_wrapper=True, size_asserts=False, alignment_asserts=False)
        options["cpp.enable_floating_point_contract_flag"] = "fast"  # a * b + c is one instruction
    else:
        options = {"triton.cudagraphs": True}
    options |= {"guard_filter_fn": lambda guards: [False] * len(guards)}  # see above
    return torch.compile(copy, fullgraph=True, dynamic=False, options=options)


def tensors(parts: Any) -> list[Tensor]:
    """All tensors in lists, tuples, dictionaries and modules."""
    leaves = []
    for part in torch.utils._pytree.tree_leaves(parts):
        if isinstance(part, nn.Module):
            leaves += [*part.parameters(), *part.buffers()]
        elif isinstance(part, Tensor):
            leaves.append(part)
    return leaves


def move(objects: tuple, buffers: dict):
    """Puts the objects' tensors into the memory in which an earlier call left tensors of the same
    sizes; `buffers` holds it. So a CUDA graph recorded with those addresses need not be recorded
    again."""
    tree = torch.utils._pytree
    new = [x for x in tree.tree_leaves([*map(vars, objects)]) if isinstance(x, Tensor)]
    old = iter(buffers.setdefault(tuple((x.shape, x.dtype, x.device) for x in new), new))
    for x in objects:
        vars(x).update(tree.tree_map_only(Tensor, lambda new: next(old).copy_(new), vars(x)))


# ---- What a graph has in it ----------------------------------------------------------------------

PLAIN = int | float | str | bytes | None | torch.dtype | torch.device | types.CodeType


def what_runs(*roots: Any) -> tuple:
    """The code of these classes and modules and of all that they call, and what it is set to: plain
    values, in objects and collections, too.

    Where this tuple is another, something was edited, patched, wrapped, hooked or set to another
    value, and a graph would do what was done before. Code is compared as code: an equal function,
    read a second time, is no other. Weights count by shape and dtype alone: a graph has none in it.
    What belongs to torch and to Python itself is followed no further.
    """
    found, seen, todo = [], {}, list(roots)
    while todo:
        x = todo.pop()
        if isinstance(x, PLAIN):  # True is not 1, and nan is nan
            found.append((type(x), repr(x) if isinstance(x, float) else x))
        elif isinstance(x, Tensor):
            found.append((x.shape, x.dtype, x.device))
        elif id(x) in seen:
            found.append(seen[id(x)][0])
        else:
            seen[id(x)] = len(seen), x  # x stays alive, so that no other gets its id
            todo += parts_of(x)
    return tuple(found)


def foreign(module: str) -> bool:
    """Whether a module belongs to torch or to Python itself."""
    package = module.split(".")[0]
    return package == "torch" or package in sys.stdlib_module_names


def parts_of(x: Any) -> list:
    """What tells x from others: plain values, and things that have parts themselves."""
    if isinstance(x, list | tuple | deque):
        return [item for item in x if not isinstance(item, Tensor)]  # results, not weights
    if isinstance(x, set | frozenset):
        return sorted(map(repr, x))
    if isinstance(x, dict):
        return [*map(str, x), *x.values()]
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, property):
        return [x.fget]
    if isinstance(x, functools.cached_property):
        return [x.func]
    if isinstance(x, staticmethod | classmethod):
        return [x.__func__]
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
        called = [] if foreign(x.__globals__.get("__name__", "")) else called_by(x)
        return [x.__code__, x.__defaults__, x.__kwdefaults__, *cells, *called]
    if isinstance(x, type):
        if x is nn.Module or x.__module__ == "builtins":
            return []
        if foreign(x.__module__):
            return [vars(x).get("forward"), *x.__bases__]
        own = {k: v for k, v in vars(x).items() if callable(v) or not k.startswith("__")}
        return [x.__qualname__, own, *x.__bases__]
    if isinstance(x, nn.Module):
        return [type(x), vars(x)]
    if isinstance(x, range | slice | numbers.Number):
        return [type(x), repr(x)]
    if isinstance(x, types.SimpleNamespace) or not foreign(type(x).__module__):
        attributes = [item for kind in type(x).__mro__ for item in vars(kind).items()]
        slots = [name for name, y in attributes if isinstance(y, types.MemberDescriptorType)]
        return [type(x), getattr(x, "__dict__", None), *(getattr(x, name, None) for name in slots)]
    # A function with a cache around it; or one in C, say.
    return [getattr(x, "__wrapped__", None), getattr(x, "__name__", None)]


def called_by(f: types.FunctionType) -> list:
    """What the names in a function mean, among its globals and in the modules that are there."""
    if f.__globals__ is globals():  # what makes graphs is in none, and GRAPHS grows
        return []
    names, codes = set(), [f.__code__]
    for code in codes:
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]  # functions in it
    spaces, found = [f.__globals__], []
    for space in spaces:
        own = not foreign(space.get("__name__", ""))
        for name in sorted(names & space.keys()):
            value = space[name]
            if type(value) is types.ModuleType:
                if own and all(vars(value) is not x for x in spaces):
                    spaces.append(vars(value))
            elif own or isinstance(value, types.FunctionType | type | bool | int | float | str):
                found += name, value
            else:
                found += name, getattr(value, "__name__", None)  # a function in C, say
    return found
