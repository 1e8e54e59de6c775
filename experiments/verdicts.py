"""The tables of claims in docs/RESULTS.md and README.md: python experiments/verdicts.py

The claims, and the rule that makes a word of numbers, are those of claims.py, and evidence.py reads
the numbers. Here they become tables, between the marks of the two pages.
"""

import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import claims
import evidence
import intervals
import plan
import run
import tables
from claims import CLAIMS, Claim
from evidence import Fresh, Numbers

HEADLINES = [claim for claim in CLAIMS if claim.headline]
NETWORKS = [*plan.CHOSEN, *plan.LIKE_BASE]
TESTS = {"p": "a difference", "p_equal": "an equality"}
HEADS = ["the claim", "compared", "difference", "worth in steps"]
HEADS += ["seeds", "verdict", "the first seeds said"]
SURE = "shown", "equal", "seen in a simulation"
NOT_SO = "contradicts", "differs: better", "differs: worse", "lower here"

# ---- Cells ---------------------------------------------------------------------------------------


def p_in_words(p: float | None) -> str:
    return "" if p is None else "< 0.0001" if p < 1e-4 else tables.number(p)


def measured(claim: Claim, x: Numbers) -> str:
    if x.mean is None:
        return ""
    if claim.kind == "bound":
        return f"{x.mean:.1%} ± {x.half:.1%} {claim.unit}"
    return f"{x.mean:+.4f}" + (f" ± {x.half:.4f}" if x.half else "") + f" {claim.unit}"


def worth(claim: Claim, x: Numbers, slope: float) -> str:
    """As many more steps would gain as much, or fewer lose it."""
    if claim.unit != "bits/byte" or x.mean is None:
        return ""
    return f"{math.expm1(x.mean / slope):+.1%}"


def seeds_cell(x: Numbers, planned: int) -> str:
    return str(x.pairs) if x.pairs >= planned else f"{x.pairs} of {planned}"


def planned_seeds(claim: Claim) -> int:
    planned, arms = claims.SEEDS.get(claim.experiment, {}), {claim.one, claim.other} - {""}
    return min(planned.get(arm, 3) for arm in arms - {"base"} or arms)


def with_margin(word: str, x: Numbers) -> str:
    if not x.margin or x.mean is None:
        return word
    return word + (f" within {x.margin:.4f}" if word == "equal" else f" (margin {x.margin:.4f})")


def line_of(
    claim: Claim, first: Numbers, said: str, fresh: Fresh | None, slope: float
) -> list[str]:
    """The cells under HEADS, of the fresh seeds where all their runs are there. said: the word that
    the first seeds give."""
    x, word, seeds, before = first, said, seeds_cell(first, planned_seeds(claim)), ""
    if fresh and fresh.word:
        x, word, seeds = fresh.numbers, fresh.word, f"{fresh.numbers.pairs}, fresh"
        before = f"{said}: {measured(claim, first)}, {first.pairs} seeds"
    compared = claim.compared.format(**x.arms) if x.mean is not None else ""
    word = with_margin(word, x)
    if fresh and not fresh.word:
        word += f"; not yet confirmed: {fresh.there} of {fresh.planned} runs"
    return [claim.text, compared, measured(claim, x), worth(claim, x, slope), seeds, word, before]


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return spaced("\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]))


def spaced(text: str) -> str:
    """5 % in place of 5%."""
    return re.sub(r"(?<=\d)%", " %", text)


# ---- The claims ----------------------------------------------------------------------------------


class Verdicts:
    """All that the tables of claims show, read once."""

    def __init__(self):
        self.found = evidence.read_tables(run.Options())
        self.numbers = evidence.all_numbers(CLAIMS, self.found)
        self.fresh = evidence.on_fresh_seeds()
        self.first_words = evidence.words_of(CLAIMS, self.numbers)
        self.words = self.first_words | {text: x.word for text, x in self.fresh.items() if x.word}
        self.slope = evidence.bits_of_e_times_the_steps(self.found)
        order = list(claims.WORDS)
        self.sorted = sorted(CLAIMS, key=lambda claim: order.index(self.words[claim.text]))

    def row(self, claim: Claim) -> list[str]:
        text = claim.text
        first = self.numbers[text], self.first_words[text]
        return line_of(claim, *first, self.fresh.get(text), self.slope)

    def summary(self) -> str:
        """Three lines: what is sure as claimed, what is surely not so, what is open."""

        def those(words: tuple[str, ...]) -> str:
            told = []
            for word in words:
                for claim in (x for x in self.sorted if self.words[x.text] == word):
                    notes = [word] if word != "shown" else []
                    waits = claim.text in self.fresh and not self.fresh[claim.text].word
                    notes += ["not yet confirmed"] if waits else []
                    told.append(claim.short + f" ({', '.join(notes)})" * bool(notes))
            return "; ".join(told)

        open_ = tuple(word for word in claims.WORDS if word not in (*SURE, *NOT_SO))
        done = sum(bool(x.word) for x in self.fresh.values())
        runs = [(len(plan.fresh_runs(x)), len(plan.seeds_of(x))) for x in NETWORKS]
        there, planned = map(sum, zip(*runs, strict=True))
        return "\n".join([
            f"* **As claimed**: {those(SURE)}.",
            f"* **Not so here**: {those(NOT_SO)}.",
            f"* **Open**: {those(open_)}.",
            "",
            f"Fresh seeds have answered {done} of the {len(self.fresh)} claims that were put to "
            f"them, with {there} of {planned} runs.",
        ])  # fmt: skip

    def table(self) -> str:
        return markdown(HEADS, [self.row(claim) for claim in self.sorted])

    def table_of_readme(self) -> str:
        """The headline claims alone, without what the first seeds said."""
        rows = [self.row(claim)[:-1] for claim in self.sorted if claim.headline]
        return markdown(HEADS[:-1], rows)

    def fp8_on_both_texts(self) -> str:
        base, tiles = (plan.fresh_runs(name) for name in ("MLA", "tiles"))
        changes = []
        for key in tables.TEXTS:
            pairs = tables.paired(tiles, base, key)
            share = statistics.mean(tables.changes(pairs, key)) / tables.mean_of(base, key)
            changes.append(f"{share:+.2%}")
        return spaced(
            f"On {len(pairs)} fresh seeds FP8 with tiles changes the loss by {changes[0]} on the "
            f"test text and by {changes[1]} on the validation text."
        )

    # ---- The appendix

    def tests_of_first_runs(self) -> str:
        return table_of_tests(CLAIMS, self.numbers)

    def tests_on_fresh_seeds(self) -> str:
        numbers = {text: x.numbers for text, x in self.fresh.items()}
        return table_of_tests(evidence.ON_FRESH_SEEDS, numbers)

    def power(self) -> str:
        """What so many pairs would find, and how surely, at the strictest step of Holm's method."""
        first, fresh = self.found["balance"].varies("test_bpb"), evidence.fresh_spreads("test_bpb")
        second = evidence.fresh_spreads("val_bpb")
        tests, (like, others) = len(evidence.p_values(evidence.ON_FRESH_SEEDS)), spread_of(fresh)
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
        told = [" and ".join(f"{x:.4f} ({freedom})" for x, freedom in spread_of(varies))
                for varies in (fresh, first, second)]  # fmt: skip
        return (
            "Standard deviation of the residuals, in bits/byte (degrees of freedom), of arms whose "
            f"shapes are the base's and of the others: {told[0]} on fresh seeds, {told[1]} of the "
            f"first runs; on the validation text {told[2]} on fresh seeds. With those of the fresh "
            "seeds, and at the strictest step of Holm's correction for their tests, so many pairs "
            "find this difference in 80 % of all cases, or an equality in so many where there is "
            "no difference:\n\n" + markdown(heads, rows)
        )

    def margins(self) -> str:
        texts = (f"{share:.2%} of the loss is {why}" for share, why in claims.MARGINS.values())
        return spaced(f"The margins: {'; '.join(texts)}.")

    def steps(self) -> str:
        gains = evidence.gain_of_steps(self.found)
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


def spread_of(varies: tables.Spreads) -> tuple[intervals.Spread, intervals.Spread]:
    return varies.like_base, varies.others


def table_of_tests(asked: list[Claim], numbers: dict[str, Numbers]) -> str:
    """All tests of one family, with what the words are made of."""
    rows, p = [], evidence.corrected(asked, numbers)
    for claim in asked:
        x = numbers[claim.text]
        for test in evidence.tests_of(claim):
            both = p_in_words(getattr(x, test)), p_in_words(p.get((claim.text, test)))
            alone = f"± {x.alone:.4f}" if x.alone else ""
            rows.append([claim.text, TESTS[test], measured(claim, x), alone, *both])
    heads = ["the claim", "test", "difference", "its pairs alone", "p"]
    return markdown([*heads, f"of {len(rows)} tests (Holm)"], rows)


# ---- Other texts, other runs ---------------------------------------------------------------------


def on_prose(slope: float) -> list[list[str]]:
    """A row for every headline claim, asked on the second text, a family of its own."""
    found = evidence.read_tables(run.Options(**claims.PROSE))
    numbers = evidence.all_numbers(HEADLINES, found)
    words = evidence.words_of(HEADLINES, numbers)
    return [short_row(claim, numbers[claim.text], words[claim.text], slope) for claim in HEADLINES]


def with_more_steps(slope: float) -> list[list[str]]:
    found = evidence.read_tables(run.Options(**claims.LONGER))
    asked = [claim for claim in CLAIMS if claim.other in ("dense", "dense longer")]
    numbers = evidence.all_numbers(asked, found)
    words = evidence.words_of(asked, numbers)
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
    found, rows = evidence.read_tables(run.Options(**claims.EARLIER)), []
    for claim in CLAIMS:
        if claim.measure == "test_bpb":
            x = evidence.numbers_of(replace(claim, measure="val_bpb"), found)
            if x.mean is not None:
                rows.append([claim.text, measured(claim, x), str(x.pairs),
                             measured(claim, now[claim.text])])  # fmt: skip
    return markdown(["the claim", "earlier runs, validation text", "seeds", "test text"], rows)


def pages() -> dict[str, dict[str, str]]:
    """By page, its generated parts by the name of the marks around them."""
    found = Verdicts()
    words = "\n".join(f"* **{word}**: {meaning}" for word, meaning in claims.WORDS.items())
    results = {
        "summary": found.summary(), "claims": found.table(), "words": words,
        "texts": table_of_texts(found.slope), "plan": found.table_of_plan(),
        "rates": found.table_of_rates(), "tests": found.tests_of_first_runs(),
        "fresh_tests": found.tests_on_fresh_seeds(),
        "power": found.power(),
        "worth": found.margins() + "\n\n" + found.steps(),
        "fp8_texts": found.fp8_on_both_texts(),
        "earlier": table_of_earlier_runs(found.numbers),
    }  # fmt: skip
    return {"docs/RESULTS.md": results, "README.md": {"claims": found.table_of_readme()}}


def main():
    for page, parts in pages().items():
        path = Path(run.ROOT, page)
        for name, part in parts.items():
            tables.write_part(path, name, part)
        print(page, file=sys.stderr)


if __name__ == "__main__":
    main()
