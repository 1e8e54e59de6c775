"""Three ways to fill a pipeline, simulated event by event: for experiments/scale.py

A model's layers are cut into stages, one for each rank. A step's micro-batches pass through all
stages forwards and then backwards. The time in which a rank waits is its bubble. A schedule is only
a plan for each rank: which chunks it computes, one after the other. When they begin follows from
what they need. tests/test_scale.py compares the outcome with the formulas of the report's Table 2.

Chunks: F is a forward. B is a backward; its halves are I for the input, which another rank waits
for, and W for the weights, which can wait. Micro-batches of way a enter the pipeline at rank 0,
those of way b (DualPipe's alone) at the last rank. "Fa Bb" are two chunks at once, overlapped.
"""

import math
from collections import defaultdict
from itertools import accumulate

TIMES = {"F": 1, "B": 2, "I": 1, "W": 1, "FB": 3}  # FB: two overlapped, with nothing gained by it
Event = tuple[float, float, str]  # begin, end, chunks


def plan_1f1b(rank: int, ranks: int, micros: int) -> list[str]:
    """Forwards until the first backward can come, then both in turns."""
    ahead = min(micros, ranks - 1 - rank)
    return ahead * ["Fa"] + (micros - ahead) * ["Fa", "Ba"] + ahead * ["Ba"]


def plan_zb1p(rank: int, ranks: int, micros: int) -> list[str]:
    """1F1B with each B in two halves. A rank's first W are put off to the end, where it would wait
    otherwise: the later the rank, the more of them."""
    halves = {"Fa": ["Fa"], "Ba": ["Ia", "W"]}
    plan = [half for chunk in plan_1f1b(rank, ranks, micros) for half in halves[chunk]]
    for _ in range(min(rank, micros)):
        plan.remove("W")  # the first that is there
        plan.append("W")
    return plan


def plan_dualpipe(rank: int, ranks: int, micros: int) -> list[str]:
    """The idea: half of the micro-batches enter at each end, so that every rank soon has forwards
    of one way and backwards of the other. It overlaps them: one computes while the other
    communicates. The price is a second stage on each rank, for way b.

    The order is its authors' (github.com/deepseek-ai/DualPipe), but for the first pair in the
    middle, which they do not overlap. ranks and micros are even, micros at least 2 (ranks - 1)."""
    if rank >= ranks // 2:  # the mirror image: a and b change places
        mirror = plan_dualpipe(ranks - 1 - rank, ranks, micros)
        return [chunks.translate(str.maketrans("ab", "ba")) for chunks in mirror]
    inner = ranks // 2 - 1 - rank  # ranks between this one and the middle
    last = (rank + 1) * ["Bb", "Ba"]
    return [
        *(2 * inner * ["Fa"]),  # b has not arrived yet
        *((rank + 1) * ["Fa", "Fb"]),
        *(inner * ["Ib", "W", "Fb"]),  # the first backwards: others wait for them
        *((micros // 2 - ranks + rank + 1) * ["Fa Bb", "Fb Ba"]),
        *(inner * ["Bb", "Fb Ba"]),  # no more forwards of a
        *last[: rank + 1],  # no more forwards at all
        *(chunk.replace("B", "I") for chunk in last[rank + 1 :]),  # from here on W is put off
        *(inner * ["W", "Ia"]),
        *((rank + 1) * ["W"]),
    ]


PLANS = {"1F1B": plan_1f1b, "ZB1P": plan_zb1p, "DualPipe": plan_dualpipe}


def simulate(schedule: str, ranks: int, micros: int, times=TIMES) -> list[list[Event]]:
    """By rank: it computes its plan in order, each chunk as soon as what it needs has arrived.

    Fa needs the same micro-batch's Fa of the rank before, Ba its Ba of the rank after; Fb and Bb
    the other way round. Micro-batches keep their order, so a rank's n-th Fa needs its neighbour's
    n-th. What it needs of itself is there by its plan's order. Sending takes no time.
    """
    todo = [PLANS[schedule](rank, ranks, micros) for rank in range(ranks)]
    events = [[] for _ in range(ranks)]
    ended = defaultdict(list)  # by rank and chunk: when the first, the second, ... ended

    def next_begin(rank: int) -> float:
        """Of what the rank computes next; infinity while what that needs has not been computed."""
        begin = events[rank][-1][1] if events[rank] else 0
        for chunk in todo[rank][0].replace("I", "B").split():  # for a neighbour I is as good as B
            sender = rank - 1 if chunk in ("Fa", "Bb") else rank + 1
            if chunk != "W" and sender in range(ranks):
                sent, n = ended[sender, chunk], len(ended[rank, chunk])
                begin = max(begin, sent[n] if n < len(sent) else math.inf)
        return begin

    while waiting := [rank for rank in range(ranks) if todo[rank]]:
        rank = min(waiting, key=next_begin)
        begin, chunks = next_begin(rank), todo[rank].pop(0)
        end = begin + times["FB" if " " in chunks else chunks[0]]
        events[rank].append((begin, end, chunks))
        for chunk in chunks.replace("I", "B").split():
            ended[rank, chunk].append(end)
    return events


def measure(events: list[list[Event]]) -> dict[str, float]:
    """Of the rank where it is largest: the time it waits, the stages whose weights it has, and the
    micro-batches whose activations it holds, each from its F to its B or W."""
    total, found = max(mine[-1][1] for mine in events), []
    for mine in events:
        letters = "".join(chunks for _, _, chunks in mine)
        held = accumulate({"F": 1, "B": -1, "W": -1}.get(letter, 0) for letter in letters)
        waits = total - sum(end - begin for begin, end, _ in mine)
        found.append((waits, len({*"ab"} & {*letters}), max(held)))
    bubble, stages, activations = map(max, zip(*found, strict=True))
    return {"bubble": bubble, "stages": stages, "activations": activations, "idle": bubble / total}
