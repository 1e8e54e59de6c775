"""Three ways to fill a pipeline, simulated chunk by chunk: for experiments/scale.py

A model's layers are cut into stages, one to a rank (in DualPipe two, from either end). A step's
micro-batches pass through all stages forwards and then backwards; the time in which a rank waits is
its bubble. The report's Table 2 has formulas for the bubbles, weights and activations of 1F1B, ZB1P
and its own DualPipe. Here a schedule is only the order of each rank's chunks; when they begin
follows from what they need, and the formulas are what the outcome is compared with.
"""

from collections import Counter
from typing import Any, NamedTuple

import tables

SCHEDULES = ("1F1B", "ZB1P", "DualPipe")
TIMES = {"F": 1.0, "I": 1.0, "W": 1.0, "FB": 3.0}  # of the chunks below; FB: a pair


class Chunk(NamedTuple):
    kind: str  # F forward; B backward, or its halves: I for the input, W for the weights
    way: str  # a: enters the pipeline at rank 0; b: at the last rank
    stage: int
    micro: int  # micro-batch


def schedule(name: str, ranks: int, micros: int) -> list[list[list[Chunk]]]:
    """By rank, what it computes one after the other: a chunk, or two overlapped ones."""
    plan = {"1F1B": plan_1f1b, "ZB1P": plan_zb1p, "DualPipe": plan_dualpipe}[name]
    return [numbered(plan(rank, ranks, micros), rank, ranks) for rank in range(ranks)]


def plan_1f1b(rank: int, ranks: int, micros: int) -> list[str]:
    """Forwards until the first backward can come, then both in turns."""
    ahead = min(micros, ranks - 1 - rank)
    return ahead * ["Fa"] + (micros - ahead) * ["Fa", "Ba"] + ahead * ["Ba"]


def plan_zb1p(rank: int, ranks: int, micros: int) -> list[str]:
    """The same with the backward in two halves. Those for the weights come later, latest at the
    last rank, where otherwise there would be gaps at the end."""
    ahead = min(micros, ranks - 1 - rank)
    plan = ahead * ["Fa"]
    for i in range(micros):
        plan += ["Fa"] * (i + ahead < micros) + ["Ia"] + ["W"] * (i >= rank)
    return plan + min(rank, micros) * ["W"]


def plan_dualpipe(rank: int, ranks: int, micros: int) -> list[str]:
    """In its authors' order, for even numbers and at least 2 (ranks - 1) micro-batches: here for a
    rank of the first half, where a enters; the second half is its mirror image."""
    near, far = (
        min(rank, ranks - 1 - rank),
        abs(ranks - 1 - 2 * rank) // 2,
    )  # to the end, the middle
    pairs = (micros // 2 - ranks + near + 1) * ["Fa Bb", "Fb Ba"]
    if far == 0:  # the middle does not overlap its first two
        pairs[:1] = ["Fa", "Bb"]
    last = (near + 1) * ["Bb", "Ba"]
    last[near + 1 :] = [step.replace("B", "I") for step in last[near + 1 :]]
    plan = [
        *(2 * far * ["Fa"]),
        *((near + 1) * ["Fa", "Fb"]),  # b has arrived
        *(far * ["Ib", "W", "Fb"]),  # b comes back; nothing waits for the weights
        *pairs,
        *(far * ["Bb", "Fb Ba"]),  # a has ended
        *last,  # all forwards are done; from the middle on weights are put off
        *(far * ["W", "Ia"]),
        *((near + 1) * ["W"]),
    ]
    return plan if rank < ranks // 2 else [x.translate(str.maketrans("ab", "ba")) for x in plan]


def numbered(plan: list[str], rank: int, ranks: int) -> list[list[Chunk]]:
    """The plan's words as chunks: micro-batches in turn, and W for the oldest I without one."""
    turn, halves, order = Counter(), [], []
    for step in plan:
        order.append([])
        for kind, *way in step.split():
            if kind == "W":
                chunk = halves.pop(0)._replace(kind="W")
            else:
                key = (kind == "F", way[0])
                stage = rank if way[0] == "a" else ranks - 1 - rank
                chunk = Chunk(kind, way[0], stage, turn[key])
                turn[key] += 1
                halves += [chunk] if kind == "I" else []
            order[-1].append(chunk)
    return order


Event = tuple[int, float, float, list[Chunk]]  # rank, begin, end, what


def simulate(orders: list[list[list[Chunk]]], times: dict[str, float]) -> list[Event]:
    """Every rank computes its chunks in order, each as soon as what it needs is there. times: of
    F, I, W, and FB for two overlapped chunks. What ranks send takes no time."""
    ranks, done, events = len(orders), {}, []
    free, begun, progress = [0.0] * ranks, [0] * ranks, True
    times = times | {"B": times["I"] + times["W"]}

    def needs(kind: str, way: str, stage: int, micro: int) -> list[tuple]:
        if kind == "F":
            return [("F", way, stage - 1, micro)] if stage else []
        if kind == "W":
            return [("B", way, stage, micro)]
        after = [("B", way, stage + 1, micro)] if stage < ranks - 1 else []
        return [("F", way, stage, micro), *after]

    while progress:
        progress = False
        for rank, order in enumerate(orders):
            while begun[rank] < len(order):
                chunks = order[begun[rank]]
                needed = [x for chunk in chunks for x in needs(*chunk)]
                if not all(x in done for x in needed):
                    break
                begin = max([free[rank], *(done[x] for x in needed)])
                end = begin + times["FB" if len(chunks) == 2 else chunks[0].kind]
                done |= {c._replace(kind="B" if c.kind == "I" else c.kind): end for c in chunks}
                events.append((rank, begin, end, chunks))
                free[rank], begun[rank], progress = end, begun[rank] + 1, True
    if any(n < len(order) for n, order in zip(begun, orders, strict=True)):
        raise ValueError(f"the schedule waits for itself after {len(events)} steps")
    return events


def measured(events: list[Event], ranks: int) -> dict[str, float]:
    """Of the rank where it is largest: idle time, and micro-batches whose activations are held
    (from the forward until all of the backward); and the stages whose weights a rank has."""
    total, idle, held, stages = max(end for _, _, end, _ in events), [], [], []
    for rank in range(ranks):
        mine = [event for event in events if event[0] == rank]
        idle.append(total - sum(end - begin for _, begin, end, _ in mine))
        now, most, own = 0, 0, [c for _, _, _, chunks in mine for c in chunks]
        for _, _, _, chunks in mine:
            now += sum(c.kind == "F" for c in chunks)
            most = max(most, now)
            now -= sum(c.kind in "BW" for c in chunks)
        held.append(most)
        stages.append(len({c.stage for c in own}))
    return {
        "total": total, "bubble": max(idle), "stages": max(stages), "activations": max(held),
    }  # fmt: skip


def table_2(name: str, ranks: int, times: dict[str, float]) -> dict[str, float]:
    """The report's formulas for what `measured` measures."""
    F, W, FB, B = times["F"], times["W"], times["FB"], times["I"] + times["W"]
    bubble = {
        "1F1B": (ranks - 1) * (F + B),
        "ZB1P": (ranks - 1) * (F + B - 2 * W),
        "DualPipe": (ranks // 2 - 1) * (FB + B - 3 * W),
    }
    double = name == "DualPipe"
    return {"bubble": bubble[name], "stages": 1 + double, "activations": ranks + double}


def rows(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The table: each schedule for each (ranks, micro-batches)."""
    found = []
    for ranks, micros in sizes:
        for name in SCHEDULES:
            x = measured(simulate(schedule(name, ranks, micros), TIMES), ranks)
            report = table_2(name, ranks, TIMES)
            line = {"schedule": name, "ranks": ranks, "micro-batches": micros}
            for key in report:
                line |= {key: x[key], f"{key}, Table 2": report[key]}
            found.append(line | {"share of time idle": x["bubble"] / x["total"]})
    return found


KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, for the input",
    "W": "... for the weights",
}
COLOURS = dict(zip(KINDS, ("#db6d28", "#2da44e", "#2f81f7", "#a475f9"), strict=True))


def draw(figure, ranks: int = 8, micros: int = 20):
    """All three schedules. Two overlapped chunks share the height of their rank; chunks of the way
    that enters at the last rank are paler."""
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Shape

    axes = figure.subplots(len(SCHEDULES), 1, sharex=True)
    for ax, name in zip(axes, SCHEDULES, strict=True):
        boxes, events = {}, simulate(schedule(name, ranks, micros), TIMES)
        for rank, begin, end, chunks in events:
            for i, c in enumerate(chunks):
                high = 0.9 / len(chunks)
                x, y, right = begin + 0.06, rank - 0.45 + i * high, end - 0.06
                corners = [(x, y), (right, y), (right, y + high), (x, y + high), (x, y)]
                boxes.setdefault((c.kind, c.way), []).append(Shape(corners, closed=True))
        for (kind, way), shapes in boxes.items():  # one shape of a colour: a small file
            ax.add_patch(PathPatch(
                Shape.make_compound_path(*shapes), facecolor=COLOURS[kind], linewidth=0,
                alpha=1.0 if way == "a" else 0.5,
            ))  # fmt: skip
        ax.set(ylim=(ranks - 0.4, -0.6), yticks=range(ranks), ylabel="rank")
        ax.axvline(max(end for _, _, end, _ in events), color=tables.INK, linestyle=":")
        ax.set_title(name, fontsize=9, loc="left", color=tables.INK)
    axes[-1].set(xlabel="time, in forward chunks; dotted: the end of the step", xlim=(0, None))
    marks = [Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=KINDS[kind]) for kind in KINDS]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
