"""The tables of claims in docs/RESULTS.md and README.md: python experiments/verdicts.py

The claims, and the rule that makes a word of numbers, are those of claims.py; plan.py has the runs
on fresh seeds. Here the numbers are read from experiments/results, and the tables are written
between the marks of the two pages.
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
import plan
import run
import specialisation
import tables
from claims import CLAIMS, Claim

MODULES = attention, balance, experts, fp8_error, fp8_loss, long_context, mtp, node_limit
EXPERIMENTS = {x.EXPERIMENT.name: x.EXPERIMENT for x in (*MODULES, specialisation)}
EXPERIMENTS["fp8_accumulation"] = fp8_error.ACCUMULATION
HEADLINES = [claim for claim in CLAIMS if claim.headline]
ON_FRESH_SEEDS = [claim for claim in CLAIMS if claim.networks]
# Arms that are as others, but longer: what are more steps worth?
LONGER = ("experts", "dense", "dense longer"), ("mtp", "off", "off longer")

# ---- From results to numbers ---------------------------------------------------------------------


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
    """An equality has to hold on both texts, so the larger p-value counts."""
    if second.p_equal is not None and x.p_equal is not None:
        x.p_equal = max(x.p_equal, second.p_equal)
        x.elsewhere = abs(second.mean) + second.half < second.margin


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


def on_fresh_seeds() -> dict[str, Fresh]:
    """By the claim's text; all tests are one family, those whose runs are missing too."""
    options, found, second = run.Options(results=plan.CONFIRMATION), {}, {}
    runs = {name: plan.fresh_runs(name) for name in (*plan.CHOSEN, *plan.LIKE_BASE)}
    for claim in ON_FRESH_SEEDS:
        seeds = [*set.intersection(*(set(plan.seeds_of(name)) for name in claim.networks))]
        one, other = ([x for x in runs[name] if x["seed"] in seeds] for name in claim.networks)
        there, planned = len(one) + len(other), 2 * len(seeds)
        for key, texts in ("test_bpb", found), ("val_bpb", second):
            varies = tables.spreads(key, options, {"MLA": runs["MLA"]} | runs)
            x = numbers_from(replace(claim, measure=key), one, other, varies, runs["MLA"])
            texts[claim.text] = Fresh(x if there == planned else Numbers(), there, planned)
        if claim.both_texts:
            with_second_text(found[claim.text].numbers, second[claim.text].numbers)
    words = words_of(ON_FRESH_SEEDS, {text: x.numbers for text, x in found.items()})
    for text, x in found.items():
        x.word = words[text] if x.there == x.planned else ""
    return found


def fresh_cell(claim: Claim, fresh: dict[str, Fresh]) -> str:
    if not (x := fresh.get(claim.text)):
        return "none planned"
    if not x.word:
        return f"not yet confirmed: {x.there} of {x.planned} runs"
    return f"{measured(claim, x.numbers)}, {x.numbers.pairs} seeds"


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


def worth(claim: Claim, x: Numbers, slope: float) -> str:
    """As many more steps would gain as much, or fewer lose it."""
    if claim.unit != "bits/byte" or x.mean is None:
        return ""
    return f"{math.expm1(x.mean / slope):+.1%}"


# ---- The tables ----------------------------------------------------------------------------------


def p_in_words(p: float | None) -> str:
    return "" if p is None else "< 0.0001" if p < 1e-4 else tables.number(p)


def measured(claim: Claim, x: Numbers) -> str:
    if x.mean is None:
        return ""
    if claim.kind == "bound":
        return f"{x.mean:.1%} ± {x.half:.1%} {claim.unit}"
    return f"{x.mean:+.4f}" + (f" ± {x.half:.4f}" if x.half else "") + f" {claim.unit}"


def seeds_cell(x: Numbers, planned: int) -> str:
    return str(x.pairs) if x.pairs >= planned else f"{x.pairs} of {planned}"


def planned_seeds(claim: Claim) -> int:
    planned, arms = claims.SEEDS.get(claim.experiment, {}), {claim.one, claim.other} - {""}
    return min(planned.get(arm, 3) for arm in arms - {"base"} or arms)


def with_margin(word: str, x: Numbers) -> str:
    if not x.margin or x.mean is None:
        return word
    return word + (f" within {x.margin:.4f}" if word == "equal" else f" (margin {x.margin:.4f})")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return spaced("\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]))


def spaced(text: str) -> str:
    """5 % in place of 5%."""
    return re.sub(r"(?<=\d)%", " %", text)


HEADS = ["the claim", "compared", "difference; above 0 it favours the claim", "worth in steps"]
HEADS += ["seeds", "verdict", "on fresh seeds"]
SURE = "shown", "equal", "seen in a model"
OTHERWISE = "contradicts", "differs: better", "differs: worse", "lower here"


class Claims:
    """All that the tables of claims show, read once."""

    def __init__(self):
        self.found = read_tables(run.Options())
        self.numbers = all_numbers(CLAIMS, self.found)
        self.fresh = on_fresh_seeds()
        self.words = words_of(CLAIMS, self.numbers)  # of the first seeds
        self.words |= {text: x.word for text, x in self.fresh.items() if x.word}
        self.slope = bits_of_e_times_the_steps(self.found)
        order = list(claims.WORDS)
        self.sorted = sorted(CLAIMS, key=lambda claim: order.index(self.words[claim.text]))

    def row(self, claim: Claim) -> list[str]:
        """The cells under HEADS. The word is that of the fresh seeds, where these are there."""
        x, fresh = self.numbers[claim.text], fresh_cell(claim, self.fresh)
        compared = claim.compared.format(**x.arms) if x.mean is not None else ""
        word = with_margin(self.words[claim.text], x)
        cells = measured(claim, x), worth(claim, x, self.slope)
        return [claim.text, compared, *cells, seeds_cell(x, planned_seeds(claim)), word, fresh]

    def summary(self) -> str:
        """Three lines: what is sure, what is otherwise than claimed, what is open."""

        def those(words: tuple[str, ...]) -> str:
            told = []
            for word in words:
                for claim in (x for x in self.sorted if self.words[x.text] == word):
                    notes = [word] if word != "shown" else []
                    waits = claim.text in self.fresh and not self.fresh[claim.text].word
                    notes += ["not yet confirmed"] if waits else []
                    told.append(claim.short + f" ({', '.join(notes)})" * bool(notes))
            return "; ".join(told)

        open_ = tuple(word for word in claims.WORDS if word not in (*SURE, *OTHERWISE))
        done = sum(bool(x.word) for x in self.fresh.values())
        runs = [(len(plan.fresh_runs(x)), len(plan.seeds_of(x))) for x in NETWORKS]
        there, planned = map(sum, zip(*runs, strict=True))
        return "\n".join([
            f"* **As claimed**: {those(SURE)}.",
            f"* **Otherwise than claimed**: {those(OTHERWISE)}.",
            f"* **Open**: {those(open_)}.",
            "",
            f"Fresh seeds have answered {done} of the {len(self.fresh)} claims that were put to "
            f"them; {there} of {planned} runs are there.",
        ])  # fmt: skip

    def table(self) -> str:
        return markdown(HEADS, [self.row(claim) for claim in self.sorted])

    def table_of_readme(self) -> str:
        """The headline claims, without what was compared in words."""
        rows = [self.row(claim) for claim in self.sorted if claim.headline]
        return markdown(HEADS, rows)

    def fp8_on_both_texts(self) -> str:
        base, tiles = (self.found["fp8_loss"].runs[arm] for arm in ("base", "tiles"))
        changes = []
        for key in tables.TEXTS:
            pairs = tables.paired(tiles, base, key)
            share = statistics.mean(tables.changes(pairs, key)) / tables.mean_of(base, key)
            changes.append(f"{share:+.2%}")
        return spaced(
            f"FP8 with tiles changes the loss by {changes[0]} on the test text and by {changes[1]} "
            f"on the validation text ({len(pairs)} pairs)."
        )

    # ---- The appendix

    def table_of_tests(self) -> str:
        rows, p = [], corrected(CLAIMS, self.numbers)
        for claim in CLAIMS:
            for test in tests_of(claim):
                raw, name = getattr(self.numbers[claim.text], test), TESTS[test]
                both = p_in_words(raw), p_in_words(p.get((claim.text, test)))
                rows.append([claim.text, name, *both])
        return markdown(["the claim", "test", "p", f"of {len(rows)} tests (Holm)"], rows)

    def power(self) -> str:
        """What so many pairs would find, and how surely, at the strictest step of Holm's method."""
        varies, tests = self.found["balance"].varies("test_bpb"), len(p_values(ON_FRESH_SEEDS))
        like, others = varies.like_base, varies.others
        kinds = {"both like the base": (like, like), "one of them": (like, others)}
        kinds |= {"none of them": (others, others)}
        counts, rows = (3, 8, 12, 16), []
        base = tables.mean_of(self.found["balance"].runs["base"], "test_bpb")
        for name, spreads in kinds.items():
            errors = [intervals.standard_error(*spreads, n) for n in counts]
            rows += [[name, "finds a difference of",
                      *(f"{intervals.seen_with(*x, tests):.4f}" for x in errors)]]  # fmt: skip
            for share, _ in claims.MARGINS.values():
                chances = [intervals.equal_with(*x, share * base, tests) for x in errors]
                rows += [[name, f"equality within {share:.2%}", *(f"{x:.0%}" for x in chances)]]
        heads = ["arms", "", *(f"{n} pairs" for n in counts)]
        return (
            f"The residuals of arms whose shapes are the base's have a standard deviation of "
            f"{like[0]:.4f} bits/byte ({like[1]} degrees of freedom), those of the others "
            f"{others[0]:.4f} ({others[1]}).\n\n" + markdown(heads, rows)
        )

    def margins(self) -> str:
        texts = (f"{share:.2%} of the loss is {why}" for share, why in claims.MARGINS.values())
        return spaced(f"The margins: {'; '.join(texts)}.")

    def steps(self) -> str:
        gains = gain_of_steps(self.found)
        more = (f'"{arm}" gains {gain:.4f} bits/byte by {times - 1:.0%} more steps'
                for arm, (times, gain) in gains.items())  # fmt: skip
        slope, slopes = self.slope, [g / math.log(t) for t, g in gains.values()]
        base, longer = (tables.read_results(run.Options(**x), "base") for x in ({}, claims.LONGER))
        pairs = [(x, y) for x in base for y in longer if x["seed"] == y["seed"]]
        times = claims.LONGER["steps"] / run.Options.steps
        far = [(x["test_bpb"] - y["test_bpb"]) / math.log(times) for x, y in pairs]
        return spaced(
            f"What a difference is worth in steps: {' and '.join(more)}. For e times as many steps "
            f"this is {' and '.join(f'{x:.3f}' for x in slopes)} (the base gains "
            f"{statistics.mean(far):.3f}, from {run.Options.steps} to {claims.LONGER['steps']:,} "
            f"steps with one seed). So a difference of d is worth exp(d / {slope:.3f}) - 1 more "
            f"steps: 0.001 is {math.expm1(0.001 / slope):.1%}."
        )

    def table_of_rates(self) -> str:
        """By network the bits per byte of the validation text at every rate, and what follows."""
        rates, rows = sorted({1.0, plan.SMALLEST, *plan.SMALLER}, reverse=True), []
        for name in plan.CHOSEN:
            values, best = [plan.validation(name, x) for x in rates], plan.best_rate(name)
            cells = [f"{x:.4f}" if x else "" for x in values]
            rows.append([name, *cells, str(best or "not yet known")])
        tuned = [f"* {claim.text}: {x.rates}" for claim in CLAIMS
                 if (x := self.numbers[claim.text]).rates]  # fmt: skip
        told = ["On the first seeds, where both networks have their own rate, the difference on "
                "the test text is:", "\n".join(tuned)]  # fmt: skip
        told = "\n\n".join(told) if tuned else ""
        return markdown(["network", *(f"x{x:g}" for x in rates), "chosen"], rows) + "\n\n" + told

    def table_of_plan(self) -> str:
        rows = []
        for name in NETWORKS:
            one, there = plan.confirming(name, 0), [x["seed"] for x in plan.fresh_runs(name)]
            seeds = plan.seeds_of(name)
            planned = f"{seeds[0]} to {seeds[-1]}"
            rows.append([name, one.arm if one else "rate not yet known", planned,
                         f"{len(there)} of {len(seeds)}"])  # fmt: skip
        return markdown(["network", "arm", "seeds", "runs that are there"], rows)


NETWORKS = [*plan.CHOSEN, *plan.LIKE_BASE]
TESTS = {"p": "a difference", "p_equal": "an equality"}


def on_prose(slope: float) -> list[list[str]]:
    """A row for every headline claim, asked on the second text, a family of its own."""
    found = read_tables(run.Options(**claims.PROSE))
    numbers = all_numbers(HEADLINES, found)
    words = words_of(HEADLINES, numbers)
    return [short_row(claim, numbers[claim.text], words[claim.text], slope) for claim in HEADLINES]


def with_more_steps(slope: float) -> list[list[str]]:
    found = read_tables(run.Options(**claims.LONGER))
    asked = [claim for claim in CLAIMS if claim.other in ("dense", "dense longer")]
    numbers = all_numbers(asked, found)
    words = words_of(asked, numbers)
    return [short_row(claim, numbers[claim.text], words[claim.text], slope) for claim in asked]


def short_row(claim: Claim, x: Numbers, word: str, slope: float) -> list[str]:
    cells = measured(claim, x), worth(claim, x, slope), str(x.pairs)
    return [claim.text, *cells, with_margin(word, x)]


def table_of_texts(slope: float) -> str:
    """The headline claims on the second text, and two of them with four times as many steps."""
    rows = [["English prose", *cells] for cells in on_prose(slope)]
    rows += [[f"{claims.LONGER['steps']:,} steps", *cells] for cells in with_more_steps(slope)]
    return markdown(["where", HEADS[0], *HEADS[2:-1]], rows)


def table_of_earlier_runs(now: dict[str, Numbers]) -> str:
    """The claims about the loss, on the validation text of runs that had no test text yet."""
    found, rows = read_tables(run.Options(**claims.EARLIER)), []
    for claim in CLAIMS:
        if claim.measure == "test_bpb":
            x = numbers_of(replace(claim, measure="val_bpb"), found)
            if x.mean is not None:
                rows.append([claim.text, measured(claim, x), str(x.pairs),
                             measured(claim, now[claim.text])])  # fmt: skip
    return markdown(["the claim", "earlier runs, validation text", "seeds", "test text"], rows)


def pages() -> dict[str, dict[str, str]]:
    """By page, its generated parts by the name of the marks around them."""
    all_claims = Claims()
    words = "\n".join(f"* **{word}**: {meaning}" for word, meaning in claims.WORDS.items())
    results = {
        "summary": all_claims.summary(), "claims": all_claims.table(), "words": words,
        "texts": table_of_texts(all_claims.slope), "plan": all_claims.table_of_plan(),
        "rates": all_claims.table_of_rates(), "tests": all_claims.table_of_tests(),
        "power": all_claims.power(),
        "worth": all_claims.margins() + "\n\n" + all_claims.steps(),
        "fp8_texts": all_claims.fp8_on_both_texts(),
        "earlier": table_of_earlier_runs(all_claims.numbers),
    }  # fmt: skip
    return {"docs/RESULTS.md": results, "README.md": {"claims": all_claims.table_of_readme()}}


def main():
    for page, parts in pages().items():
        path = Path(run.ROOT, page)
        for name, part in parts.items():
            tables.write_part(path, name, part)
        print(page, file=sys.stderr)


if __name__ == "__main__":
    main()
