"""From results to what `claims.verdict` takes: the numbers of a claim, and the words. Used by
verdicts.py, which writes the tables.

The first runs are read from experiments/results, those on fresh seeds from plan.py. Above zero a
difference is on the claim's side.
"""

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import Any

import attention
import balance
import claims
import experts
import fp8_error
import fp8_loss
import intervals
import long_context
import mtp
import node_limit
import plan
import run
import specialisation
import tables
from claims import CLAIMS, Claim

MODULES = attention, balance, experts, fp8_error, fp8_loss, long_context, mtp, node_limit
EXPERIMENTS = {x.EXPERIMENT.name: x.EXPERIMENT for x in (*MODULES, specialisation)}
EXPERIMENTS["fp8_accumulation"] = fp8_error.ACCUMULATION
ON_FRESH_SEEDS = [claim for claim in CLAIMS if claim.networks]
# Arms that are as others, but longer: what are more steps worth?
LONGER = ("experts", "dense", "dense longer"), ("mtp", "off", "off longer")

# ---- The first runs ------------------------------------------------------------------------------


@dataclass
class Table:
    """Of an experiment: the runs of every arm by its own name, and how much they vary."""

    runs: dict[str, list[dict]]
    options: run.Options

    def varies(self, key: str) -> tables.Spreads:
        return tables.spreads(key, self.options, self.runs)


def read_tables(options: run.Options) -> dict[str, Table]:
    found = {}
    for name, experiment in EXPERIMENTS.items():
        base, *others = tables.collect(experiment, options, rates=True).items()
        found[name] = Table({"base": base[1]} | dict(others), options)
    return found


@dataclass
class Numbers:
    """Of a claim: what `claims.verdict` and `claims.bound` take, and what the tables show."""

    mean: float | None = None
    half: float | None = None
    p: float | None = None  # that there is no difference, before any correction
    alone: float | None = None
    margin: float = 0.0
    p_equal: float | None = None  # that the difference is as large as the margin, the same
    elsewhere: bool = True
    unlike: bool = False
    tuned: tuple[float, float] | None = None
    rates: str = ""  # how the difference at the best learning rates reads
    pairs: int = 0
    arms: dict[str, Any] = field(default_factory=dict)  # means, for Claim.compared


def means(runs: list[dict]) -> dict[str, float]:
    keys = {key for x in runs for key, value in x.items() if isinstance(value, int | float)}
    return {key: tables.mean_of(runs, key) for key in keys}


def numbers_of(claim: Claim, found: dict[str, Table]) -> Numbers:
    """Above zero the difference is on the claim's side."""
    table, experiment = found[claim.experiment], EXPERIMENTS[claim.experiment]
    one, other = (table.runs.get(arm, []) for arm in (claim.one, claim.other))
    pooled = claim.measure in (*tables.TEXTS, experiment.against) and not claim.other_measure
    varies = table.varies(claim.measure) if pooled and not experiment.compute else None
    x = numbers_from(claim, one, other, varies, table.runs["base"])
    if x.half and claim.networks and claim.measure in tables.TEXTS:
        with_best_rates(x, claim, found)
    return x


def numbers_from(
    claim: Claim, one: list[dict], other: list[dict], varies: tables.Spreads | None, base: list
) -> Numbers:
    """From the runs of both arms. varies: how much all arms do; none: these two alone are known."""
    key, sign, x = claim.measure, 1 if claim.less else -1, Numbers()
    x.arms = {"one": means(one), "other": means(other)}
    if claim.other_measure:
        other = [y | {key: y[claim.other_measure]} for y in other if claim.other_measure in y]
    one, other = ([y for y in runs if key in y] for runs in (one, other))
    pairs = tables.paired(other, one, key)
    values = [sign * (b[key] - a[key]) for b, a in pairs] if claim.other else [a[key] for a in one]
    if not values:
        return x
    x.pairs, (x.mean, x.half) = len(values), intervals.own_interval(values)
    if pairs and all(x.arms[arm].get("cache_bytes") for arm in ("one", "other")):
        x.arms["ratio"] = x.arms["other"]["cache_bytes"] / x.arms["one"]["cache_bytes"]
    if claim.kind == "bound":
        return x
    if varies and claim.other:
        pooled = tables.compare(other, one, key, varies)
        x.half, x.alone, x.p, error = pooled.half, pooled.alone, pooled.p, pooled.error
    elif x.half:
        error = x.half / intervals.quantile(0.05, x.pairs - 1), x.pairs - 1
        x.p = intervals.p_value(x.mean / error[0], error[1])
    if claim.margin:
        x.margin = claims.MARGINS[claim.margin][0] * tables.mean_of(base, key)
        x.p_equal = intervals.p_of_equality(x.mean, *error, x.margin) if x.half else None
    if claim.alike:
        a, b = (x.arms[arm][claim.alike] for arm in ("one", "other"))
        x.unlike = abs(a - b) > 0.25
    return x


def with_second_text(x: Numbers, second: Numbers):
    """An equality has to hold on both texts, so the larger p-value and both intervals count."""
    if second.p_equal is not None and x.p_equal is not None:
        x.p_equal = max(x.p_equal, second.p_equal)
        widest = max(second.half, second.alone or 0.0)
        x.elsewhere = abs(second.mean) + widest < second.margin


def with_best_rates(x: Numbers, claim: Claim, found: dict[str, Table]):
    """The difference on the first seeds where each network has its own learning rate."""
    rates = [plan.best_rate(name) if name in plan.CHOSEN else None for name in claim.networks]
    if None in rates:
        return
    arms = [plan.arm_at(*pair) for pair in zip(claim.networks, rates, strict=True)]
    experiments = [plan.CHOSEN[name] for name in claim.networks]
    one, other = (found[e].runs.get(arm, []) for e, arm in zip(experiments, arms, strict=True))
    varies = found[claim.experiment].varies("test_bpb")
    if (tuned := tables.compare(other, one, "test_bpb", varies)) and tuned.half:
        x.tuned = tuned.mean, tuned.half
        x.rates = f"{tuned.mean:+.4f} ± {tuned.half:.4f}"


def all_numbers(asked: list[Claim], found: dict[str, Table]) -> dict[str, Numbers]:
    """By the claim's text."""
    numbers = {claim.text: numbers_of(claim, found) for claim in asked}
    for claim in asked:
        if claim.both_texts:
            second = numbers_of(replace(claim, measure="val_bpb"), found)
            with_second_text(numbers[claim.text], second)
    return numbers


def tests_of(claim: Claim) -> tuple[str, ...]:
    """A difference, and for claims of equality that, too."""
    return {"bound": (), "equal": ("p", "p_equal")}.get(claim.kind, ("p",))


def p_values(asked: list[Claim]) -> list[tuple[str, str]]:
    return [(claim.text, test) for claim in asked for test in tests_of(claim)]


def corrected(asked: list[Claim], numbers: dict[str, Numbers]) -> dict[tuple[str, str], float]:
    """By claim and test: the p-values of one family, corrected by Holm's method. Tests whose runs
    are missing count."""
    tests = p_values(asked)
    raw = {(text, test): getattr(numbers[text], test) for text, test in tests}
    return intervals.holm({k: p for k, p in raw.items() if p is not None}, len(tests))


def words_of(asked: list[Claim], numbers: dict[str, Numbers]) -> dict[str, str]:
    """The verdict on every claim, by its text."""
    p, words = corrected(asked, numbers), {}
    for claim in asked:
        x = numbers[claim.text]
        if claim.kind == "bound":
            words[claim.text] = claims.bound(claim.low, x.mean, x.half)
            continue
        words[claim.text] = claims.verdict(
            claim.kind, x.mean, x.half, p.get((claim.text, "p")), x.alone, margin=x.margin,
            p_equal=p.get((claim.text, "p_equal")), elsewhere=x.elsewhere, tuned=x.tuned,
            unlike=x.unlike, simulated=claim.simulated,
        )  # fmt: skip
    return words


# ---- Fresh seeds ---------------------------------------------------------------------------------


@dataclass
class Fresh:
    """A claim on the seeds of the plan. The word is "" as long as a run of it is missing."""

    numbers: Numbers
    there: int
    planned: int
    word: str = ""


def fresh_runs() -> dict[str, list[dict]]:
    """By the plan's name of the network."""
    return {name: plan.fresh_runs(name) for name in (*plan.CHOSEN, *plan.LIKE_BASE)}


def fresh_spreads(key: str) -> tables.Spreads:
    """How much these runs vary. The base is MLA, the first of fresh_runs()."""
    return tables.spreads(key, run.Options(results=plan.CONFIRMATION), fresh_runs())


def on_fresh_seeds() -> dict[str, Fresh]:
    """By the claim's text; all tests are one family, those whose runs are missing too."""
    runs, found = fresh_runs(), {}
    varies = {key: fresh_spreads(key) for key in tables.TEXTS}
    for claim in ON_FRESH_SEEDS:
        seeds = set.intersection(*({*plan.seeds_of(name)} for name in claim.networks))
        one, other = ([x for x in runs[name] if x["seed"] in seeds] for name in claim.networks)
        x = found[claim.text] = Fresh(Numbers(), len(one) + len(other), 2 * len(seeds))
        if x.there == x.planned:
            x.numbers, second = (
                numbers_from(replace(claim, measure=key), one, other, varies[key], runs["MLA"])
                for key in tables.TEXTS
            )
            if claim.both_texts:
                with_second_text(x.numbers, second)
    words = words_of(ON_FRESH_SEEDS, {text: x.numbers for text, x in found.items()})
    return {text: replace(x, word=words[text] if x.numbers.pairs else "")
            for text, x in found.items()}  # fmt: skip


# ---- What a difference is worth ------------------------------------------------------------------


def gain_of_steps(found: dict[str, Table]) -> dict[str, tuple[float, float]]:
    """By arm: times as many steps, and how many bits per byte they gain."""
    base = run.Options().base()
    gains = {}
    for name, arm, longer in LONGER:
        times, runs = EXPERIMENTS[name].arms(base)[longer].longer, found[name].runs
        if pairs := tables.paired(runs.get(arm, []), runs.get(longer, []), "test_bpb"):
            gains[arm] = times, statistics.mean(tables.changes(pairs, "test_bpb"))
    return gains


def bits_of_e_times_the_steps(found: dict[str, Table]) -> float:
    """The gain grows with the logarithm of the steps; the mean of what both arms say."""
    slopes = [gain / math.log(times) for times, gain in gain_of_steps(found).values()]
    return statistics.mean(slopes) if slopes else math.inf
