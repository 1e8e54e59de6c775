"""The tables of claims in docs/RESULTS.md and README.md: python experiments/verdicts.py

The claims, and the rule that makes a word of numbers, are those of claims.py. Here the numbers are
read from experiments/results, and the tables are written between the marks of the two pages.
"""

import math
import re
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
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
import run
import specialisation
import tables
from claims import CLAIMS, Claim

MODULES = attention, balance, experts, fp8_error, fp8_loss, long_context, mtp, node_limit
EXPERIMENTS = {x.EXPERIMENT.name: x.EXPERIMENT for x in (*MODULES, specialisation)}
EXPERIMENTS["fp8_accumulation"] = fp8_error.ACCUMULATION
HEADLINES = [claim for claim in CLAIMS if claim.headline]
HEADS = ["the claim", "table", "compared", "difference; above 0 it favours the claim", "p", "seeds"]
HEADS += ["verdict"]

# ---- From results to numbers ---------------------------------------------------------------------


@dataclass
class Table:
    """Of an experiment: the runs of every arm by its own name, and the differences of tables.py."""

    runs: dict[str, list[dict]]
    differences: dict[str, tables.Difference]
    base: str  # what the base is called there


def read_tables(options: run.Options) -> dict[str, Table]:
    found = {}
    for name, experiment in EXPERIMENTS.items():
        results = tables.collect(experiment, options)
        differences, _ = tables.differences(experiment, options, results)
        base, *others = results
        runs = dict(zip(["base", *others], results.values(), strict=True))
        found[name] = Table(runs, differences, base)
    return found


@dataclass
class Numbers:
    """Of a claim: what `claims.verdict` and `claims.bound` take, and what the tables show."""

    mean: float | None = None
    half: float | None = None
    p: float | None = None
    raw: float | None = None  # the p-value before any correction
    alone: float | None = None
    margin: float | None = None
    tuned: tuple[float, float] | None = None
    rates: str = "not yet run"  # the difference at the best learning rates
    unlike: bool = False
    seeds: int = 0
    arms: dict[str, Any] = field(default_factory=dict)  # means, for Claim.compared


def means(runs: list[dict]) -> dict[str, float]:
    keys = {key for x in runs for key, value in x.items() if isinstance(value, int | float)}
    return {key: tables.mean_of(runs, key) for key in keys}


def numbers_of(claim: Claim, found: dict[str, Table]) -> Numbers:
    """Above zero the difference is on the claim's side."""
    table, key = found[claim.experiment], claim.measure
    one, other = (
        [x for x in table.runs.get(arm, []) if key in x] for arm in (claim.one, claim.other)
    )
    sign, x = 1 if claim.less else -1, Numbers(arms={"one": means(one), "other": means(other)})
    pairs = tables.paired(other, one, key)
    values = [sign * (b[key] - a[key]) for b, a in pairs] if claim.other else [a[key] for a in one]
    if not values:
        return x
    x.seeds, (x.mean, x.half) = len(values), intervals.own_interval(values)
    if pairs and all(x.arms[arm].get("cache_bytes") for arm in x.arms):
        x.arms["ratio"] = x.arms["other"]["cache_bytes"] / x.arms["one"]["cache_bytes"]
    if claim.kind == "bound":
        return x
    experiment = EXPERIMENTS[claim.experiment]
    if claim.other and key == experiment.against and not experiment.compute:
        one, other = claim.one, claim.other
        name = other if one == "base" else one if other == "base" else f"{other} against {one}"
        pooled = table.differences[name]
        x.half, x.alone, x.p, x.raw = pooled.half, pooled.alone, pooled.p, pooled.raw
    elif x.half:  # the one comparison of this kind in its table: nothing to correct for
        error = x.half / intervals.quantile(0.05, x.seeds - 1)
        x.p = x.raw = intervals.p_value(x.mean / error, x.seeds - 1)
    if claim.margin:
        x.margin = claims.MARGINS[claim.margin][0] * tables.mean_of(table.runs["base"], key)
    if claim.alike:
        a, b = (x.arms[arm][claim.alike] for arm in ("one", "other"))
        x.unlike = abs(a - b) > 0.25
    if claim.rates and x.half:
        with_best_rates(x, claim, found)
    return x


def with_best_rates(x: Numbers, claim: Claim, found: dict[str, Table]):
    """The difference where both arms have their best learning rate."""
    attention = found["attention"].runs
    runs = attention | {"MLA": attention["base"]} | found[claim.experiment].runs
    one, other = (best_rate(name, runs) for name in claim.rates)
    if one and other:
        pairs = tables.paired(runs[other], runs[one], "test_bpb")
        mean = statistics.mean(tables.changes(pairs, "test_bpb"))
        x.tuned = mean, x.half * math.sqrt(x.seeds / len(pairs))
        x.rates = f"{mean:+.4f} ± {x.tuned[1]:.4f} ({other} against {one})"


def best_rate(name: str, runs: dict[str, list[dict]]) -> str:
    """The arm with the best learning rate by the validation text, as claims.RATES has it; none
    where that asks for runs that are not there."""
    arms = [name, *(f"{name} lr x{x}" for x in claims.RATES)]
    values = {arm: {x["seed"]: x["val_bpb"] for x in runs.get(arm, [])} for arm in arms}
    better = min(arms, key=lambda arm: values[arm].get(0, 0.0))  # what is missing, before all
    if any(not {0, 1, 2} <= values[arm].keys() for arm in (name, better)):
        return ""
    return min((name, better), key=lambda arm: sum(values[arm][seed] for seed in range(3)))


def word_of(claim: Claim, x: Numbers) -> str:
    if claim.kind == "bound":
        return claims.bound(claim.low, x.mean, x.half)
    given = x.mean, x.half, x.p, x.alone, x.margin, x.tuned, x.unlike
    return claims.verdict(claim.kind, *given, claim.simulated)


# ---- The tables ----------------------------------------------------------------------------------


def p_in_words(p: float | None) -> str:
    return "" if p is None else "< 0.0001" if p < 1e-4 else tables.number(p)


def row(claim: Claim, x: Numbers, planned: int) -> list[str]:
    """The cells under HEADS."""
    if x.mean is None:
        return [claim.text, f"`{claim.experiment}`", "", "", "", f"0 of {planned}", "not yet run"]
    measured = f"{x.mean:+.4f}" + (f" ± {x.half:.4f}" if x.half else "")
    if claim.kind == "bound":
        measured = f"{x.mean:.1%} ± {x.half:.1%}"
    word = word_of(claim, x)
    if x.margin:
        word += f" within {x.margin:.4f}" if word == "equal" else f" (margin {x.margin:.4f})"
    seeds = str(x.seeds) if x.seeds >= planned else f"{x.seeds} of {planned}"
    compared, measured = claim.compared.format(**x.arms), f"{measured} {claim.unit}"
    return [claim.text, f"`{claim.experiment}`", compared, measured, p_in_words(x.p), seeds, word]


def planned_seeds(claim: Claim) -> int:
    planned, arms = claims.SEEDS.get(claim.experiment, {}), {claim.one, claim.other} - {""}
    return min(planned.get(arm, 3) for arm in arms - {"base"} or arms)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return spaced("\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]))


def spaced(text: str) -> str:
    """5 % in place of 5%."""
    return re.sub(r"(?<=\d)%", " %", text)


def corrected_for_all(found: dict[str, Table]) -> str:
    """A sentence: which words change if p is corrected for all comparisons of all tables."""
    raw, options = {}, run.Options()
    for name, table in found.items():
        arms = EXPERIMENTS[name].arms(options.base())
        checks = {arm for arm, x in arms.items() if x.check}
        raw |= {(name, arm): x.raw for arm, x in table.differences.items()
                if x.raw is not None and arm not in checks}  # fmt: skip
    asked = {claim.text: numbers_of(claim, found) for claim in CLAIMS}
    known = {*raw.values()}
    raw |= {text: x.raw for text, x in asked.items() if x.raw is not None and x.raw not in known}
    corrected = {raw[key]: p for key, p in intervals.holm(raw).items()}
    changed = []
    for claim in CLAIMS:
        x = asked[claim.text]
        other = replace(x, p=corrected.get(x.raw))
        if x.raw is not None and word_of(claim, other) != word_of(claim, x):
            words = f"{word_of(claim, x)} becomes {word_of(claim, other)}"
            changed.append(f'"{claim.text}": {words}, p {p_in_words(other.p)}')
    return (
        f"p is corrected by Holm's method for the comparisons of one table. Corrected for all "
        f"{len(raw)} comparisons of all tables, "
        + ("these words change: " + "; ".join(changed) if changed else "no word changes")
        + "."
    )


def power(found: dict[str, Table]) -> str:
    """A sentence: how many pairs an equality takes, if there is no difference."""
    options, table = run.Options(), found["fp8_loss"]
    values = tables.pooled("test_bpb", options, {"": table.runs["base"]})
    deviation, freedom = intervals.residual_deviation(values)
    base, parts = tables.mean_of(table.runs["base"], "test_bpb"), []
    for share, _ in claims.MARGINS.values():
        chances = [
            intervals.equal_with(deviation, freedom, n, share * base) for n in (2, 8, 12, 16)
        ]
        parts.append(f"within {share:.2%} in " + ", ".join(f"{x:.0%}" for x in chances))
    return (
        "Where there is no difference at all, 2, 8, 12 and 16 pairs of runs show an equality "
        f"{' and '.join(parts)} of all cases."
    )


def table_of_all(found: dict[str, Table]) -> str:
    rows = [row(claim, numbers_of(claim, found), planned_seeds(claim)) for claim in CLAIMS]
    margins = (f"{share:.2%} of the loss is {why}" for share, why in claims.MARGINS.values())
    rates = [f"* {x.text}: {numbers_of(x, found).rates}" for x in CLAIMS if x.rates]
    return "\n\n".join([
        markdown(HEADS, rows),
        corrected_for_all(found),
        spaced(f"The margins: {'; '.join(margins)}. {power(found)}"),
        "Where each arm has the best of three learning rates (by the validation text, three "
        "seeds), the difference on the test text is:",
        "\n".join(rates),
    ])  # fmt: skip


def on_prose() -> dict[str, list[str]]:
    """A row for every headline claim, asked on the second text, corrected for these claims."""
    found = read_tables(run.Options(**claims.PROSE))
    asked = {claim.text: numbers_of(claim, found) for claim in HEADLINES}
    raw = {text: x.raw for text, x in asked.items() if x.raw is not None}
    for text, p in intervals.holm(raw, len(HEADLINES)).items():
        asked[text].p = p
    return {claim.text: row(claim, asked[claim.text], 3) for claim in HEADLINES}


def table_of_texts() -> str:
    """The headline claims on the second text, and one of them with four times as many steps."""
    dense = next(claim for claim in CLAIMS if claim.other == "dense")
    longer = row(dense, numbers_of(dense, read_tables(run.Options(**claims.LONGER))), 1)
    rows = [["English prose", *cells] for cells in on_prose().values()]
    rows += [["2,400 steps", *longer]]
    return markdown(["where", *HEADS], rows)


def table_of_readme(found: dict[str, Table]) -> str:
    """The headline claims, and beside them the second text."""
    rows, prose = [], on_prose()
    for claim in HEADLINES:
        text, _, *cells = row(claim, numbers_of(claim, found), planned_seeds(claim))
        *_, again, _, seeds, word = prose[claim.text]
        rows.append([text, *cells, f"{again}, {seeds} seeds: {word}" if again else word])
    return markdown([HEADS[0], *HEADS[2:], "on English prose"], rows)


def pages() -> dict[str, dict[str, str]]:
    """By page, its generated parts by the name of the marks around them."""
    found = read_tables(run.Options())
    words = "\n".join(f"* **{word}**: {meaning}" for word, meaning in claims.WORDS.items())
    results = {"claims": table_of_all(found), "words": words, "texts": table_of_texts()}
    return {"docs/RESULTS.md": results, "README.md": {"claims": table_of_readme(found)}}


def main():
    for page, parts in pages().items():
        path = Path(run.ROOT, page)
        for name, part in parts.items():
            tables.write_part(path, name, part)
        print(page, file=sys.stderr)


if __name__ == "__main__":
    main()
