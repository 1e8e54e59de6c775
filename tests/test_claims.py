"""Intervals, tables, the rule that gives a verdict, the plan of the fresh seeds, and the pages."""

import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import claims
import evidence
import intervals
import numpy as np
import plan
import pytest
import run
import tables
import verdicts
from test_experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
SPAN = r"(?s)<!-- {} -->\n(.*?)\n<!-- end of {} -->"  # of a page, what is written by a command


@pytest.fixture
def options(tmp_path) -> run.Options:
    return run.Options(config=str(ROOT / "config/tiny.py"), results=str(tmp_path))


# ---- Tables and figures --------------------------------------------------------------------------


def add_results(options, values: dict[str, list[float]], **more):
    """The results of arms of the experiment t, seed by seed."""
    for arm, ys in values.items():
        for seed, y in enumerate(ys):
            x = {"arm": arm, "seed": seed, "source": "s", "corpus": "c", "steps": 2, "test_bpb": y}
            tables.add_result(options, "base" if arm == "base" else "t", x | more)


def test_differences_are_paired_by_seed_length_code_and_data(options):
    add_results(options, {"a": [7.0, 7.0, 7.0]})  # made again below: the newest counts
    for other in {"source": "other"}, {"corpus": "other"}, {"steps": 3}:
        add_results(options, {"base": [9.0] * 3, "a": [0.0] * 3}, **other)
    add_results(options, {"base": [1.0, 2.0, 3.0], "a": [1.5, 2.25, 3.75]})
    e = run.Experiment(
        "t", lambda base: {"a": run.Arm(), "b": run.Arm()}, {"test_bpb": "bits"}, base="zero"
    )
    assert [x["against"] for x in tables.collect(e, options)["a"]] == [0.5, 0.25, 0.75]
    # Arms differ by 0.5 on average, and each pair by 0, -0.25, 0.25 from that; so the residuals are
    # half of these, their squares add up to 2 (1/64 + 1/64), and 6 - 2 - 3 + 1 = 2 are free.
    deviation = (4 / 64 / 2) ** 0.5
    half, t = 4.303 * deviation * (2 / 3) ** 0.5, 4.303 / 3**0.5
    lines = tables.table(e, options).splitlines()
    assert lines[0].endswith("| bits | bits against base |")
    assert lines[2:] == [
        f"| zero (base) | 3 | 2.000 ± {t:.3f} |  |",
        f"| a | 3 | 2.500 | +0.500 ± {half:.3f} |",  # the base's and the difference
        *("", "2 steps a run."),
        f"Intervals from the pairs of one arm alone: a ± {t / 4:.3f}.",
        *("", "Not yet run: b."),
    ]
    p = 1 - (x := 0.5 / (half / 4.303)) / (x * x + 2) ** 0.5  # the distribution with 2 of freedom
    found = tables.differences(e, options, tables.collect(e, options))
    assert found["a"].p == pytest.approx(p, rel=1e-3) and [*found] == ["a"]


def test_two_arms_are_compared_on_the_seeds_that_both_have(options):
    """Beside the base: the base is not asked."""
    add_results(options, {"base": [0.0, 9.0, 0.2], "a": [1.0, 1.2, 1.1], "b": [0.5, 0.9]})
    arms = {name: run.Arm() for name in "ab"}
    e = run.Experiment("t", lambda base: arms, {"test_bpb": "bits"}, pairs=(("a", "b"),))
    found = tables.differences(e, options, tables.collect(e, options))
    assert [*found] == ["a", "b", "a against b"]
    pair = found["a against b"]
    assert pair.mean == pytest.approx(0.4) and pair.pairs == 2
    assert pair.half == pytest.approx(found["a"].half * (3 / 2) ** 0.5)
    assert pair.alone == pytest.approx(12.706 * 0.1, rel=1e-3)
    lines = tables.table(e, options).splitlines()
    assert [line for line in lines if line.startswith("* a against b: +0.400 ± ")]
    none = tables.Spreads((), (0.0, 0), (0.0, 0))
    one = tables.compare(*([{"seed": 0, "y": y}] for y in (3.0, 1.0)), "y", none)
    assert (one.mean, one.half, one.alone, one.p) == (2, None, None, None)  # one seed


def test_how_much_bits_per_byte_vary_is_known_from_all_experiments(options):
    """Of the same code and data, by two classes of networks: like the base, and of other shapes."""
    add_results(options, {"base": [0.0, 0.1, 0.2], "a": [1.0, 1.2, 1.1]})
    values = {"x": [0.5, 0.7, 0.8], "u": [1.0, 2.0, 4.0], "v": [1.0, 1.0, 1.0]}
    for arm, ys in values.items():
        for seed, y in enumerate(ys):
            x = {"arm": arm, "seed": seed, "test_bpb": y, "source": "s", "corpus": "c", "steps": 2}
            x |= {"active": 7} if arm in "uv" else {}
            tables.add_result(options, "else", x)
            tables.add_result(options, "else", x | {"corpus": "another", "test_bpb": 9.0 * y})
    e = run.Experiment("t", lambda base: {"a": run.Arm()}, {"test_bpb": "bits"})
    varies = tables.spreads("test_bpb", options, tables.collect(e, options))
    like = {"base": [0.0, 0.1, 0.2], "a": [1.0, 1.2, 1.1], "x": values["x"]}
    others = {arm: values[arm] for arm in "uv"}
    for spread, arms, freedom in (varies.like_base, like, 4), (varies.others, others, 2):
        cells = {(arm, seed): y for arm, ys in arms.items() for seed, y in enumerate(ys)}
        assert spread == (pytest.approx(intervals.residual_deviation(cells)[0]), freedom)
    assert varies.of({"active": 7}) == varies.others != varies.of({}) == varies.like_base
    assert varies.of({"val_mtp_losses": [1.0]}) == varies.others  # one more module


def test_intervals_are_those_of_the_textbooks():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 30: 2.042, 120: 1.980}
    for freedom, t in known.items():
        assert intervals.quantile(0.05, freedom) == pytest.approx(t, abs=1e-3)
        assert intervals.p_value(-t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5}
    )
    assert intervals.holm({"a": 0.01, "b": 0.02}, 4) == pytest.approx({"a": 0.04, "b": 0.06})
    assert intervals.own_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5, abs=1e-3))
    # A seed that shifts all arms, and a missing run, leave no residual.
    exact = {(a, s): x + 10 * s for a, x in {"a": 1.0, "b": 3.0}.items() for s in range(4)}
    del exact["b", 2]
    deviation, freedom = intervals.residual_deviation(exact)
    assert deviation == pytest.approx(0, abs=1e-9) and freedom == 7 - 2 - 4 + 1
    assert intervals.residual_deviation({}) == (0.0, 0)
    # 1.96 + 0.84 standard errors, of many degrees of freedom
    assert intervals.seen_with(1.0, 1000, 1) == pytest.approx(2.80, abs=0.01)


def test_two_classes_of_arms_vary_as_welch_says():
    """A t of their mean difference, drawn at random, is as often beyond the quantile as it says."""
    assert intervals.standard_error((3.0, 9), (3.0, 9), 8) == (1.5, 9)  # one estimate, used twice
    assert intervals.standard_error((3.0, 9), (4.0, 0), 8) == (0.0, 0)
    error, freedom = intervals.standard_error((3.0, 10), (4.0, 5), 25)
    assert error == 1.0 and freedom == int(25**2 / (81 / 10 + 256 / 5))
    rng, beyond, draws = np.random.default_rng(0), 0, 4000
    for _ in range(draws):
        ones, others = rng.normal(0, 1, 6), rng.normal(0, 2, 9)
        spreads = (ones.std(ddof=1), 5), (others.std(ddof=1), 8)
        error, freedom = intervals.standard_error(*spreads, 4)
        mean = rng.normal(0, 1, 4).mean() - rng.normal(0, 2, 4).mean()
        beyond += abs(mean / error) > intervals.quantile(0.05, freedom)
    assert beyond / draws == pytest.approx(0.05, abs=0.012)


def test_p_of_an_equality_is_small_where_the_interval_lies_within_the_margin():
    for mean in (0.0, 0.3, -0.8, 1.1):
        half = intervals.quantile(0.05, 12) * 0.2
        p = intervals.p_of_equality(mean, 0.2, 12, 1.0)
        assert (p < 0.05) == (abs(mean) + half < 1.0)
    assert intervals.p_of_equality(1.1, 0.2, 12, 1.0) == 1.0
    assert intervals.p_of_equality(1.0 - half, 0.2, 12, 1.0) == pytest.approx(0.05, rel=1e-3)


def test_a_difference_that_is_said_to_be_found_is_found():
    """Of 400 tables drawn at random, of 4 arms without any difference and one with this one, all
    with 8 seeds but the last with 3: in 80 % its p-value stays below 0.05 after the correction by
    the number of arms, and its interval holds the difference in 95 %."""
    rng, draws, seeds = np.random.default_rng(0), 400, 8
    cells = [(arm, seed) for arm in range(6) for seed in range(3 if arm == 5 else seeds)]
    names = [(str(arm), seed) for arm, seed in cells]
    freedom = intervals.residual_deviation(dict.fromkeys(names, 0.0))[1]
    assert freedom == 43 - 6 - 8 + 1
    true = intervals.seen_with(math.sqrt(2 / 3), freedom, 5)
    strict, usual = (intervals.quantile(p, freedom) for p in (0.05 / 5, 0.05))
    found = held = 0
    for _ in range(draws):
        shift = 3 * rng.normal(size=seeds)
        y = {c: rng.normal() + shift[c[1]] + true * (c[0] == "5") for c in names}
        error = intervals.residual_deviation(y)[0] * math.sqrt(2 / 3)
        mean = np.mean([y["5", seed] - y["0", seed] for seed in range(3)])
        found += abs(mean) > strict * error
        held += abs(mean - true) < usual * error
    assert found / draws == pytest.approx(0.8, abs=0.05)
    assert held / draws == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_page_and_figures_show_what_the_json_files_hold(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    e, options = EXPERIMENTS[name], run.Options()
    again = f"python experiments/{Path(inspect.getfile(e.arms)).name}"
    text = Path("docs/RESULTS.md").read_text(encoding="utf-8")
    shown = re.search(SPAN.format(name, name), text)
    assert shown[1] == tables.section(e, options), f"{again} --plot"
    assert again in text
    if f"figures/{name}.svg" in text:
        svg = Path(f"docs/figures/{name}.svg").read_text(encoding="utf-8")
        digest = tables.digest(json.dumps(tables.collect(e, options)))
        assert f"results {digest}" in svg, f"{again} --plot"


def test_differences_stand_in_tables_alone():
    """Which are computed: the sentences around them say none, so that they cannot be stale."""
    for page in "docs/RESULTS.md", "README.md":
        text = (ROOT / page).read_text(encoding="utf-8")
        prose = re.sub(SPAN.format(r"(\w+)", r"\1"), "", text)
        assert len(prose) < len(text) and not re.findall(r"\d\s±\s\d", prose)


# ---- Verdicts ------------------------------------------------------------------------------------

SURE = {"mean": 0.02, "half": 0.004, "p": 0.001, "alone": 0.005}
EQUAL = {"mean": -0.001, "half": 0.002, "p": 0.7, "alone": 0.0024, "margin": 0.0035}
EQUAL |= {"p_equal": 0.01}


@pytest.mark.parametrize(
    "kind, numbers, word, opposite",
    [
        ("better", SURE, "shown", "contradicts"),
        ("better", SURE | {"tuned": (0.01, 0.009)}, "shown", "contradicts"),
        ("better", SURE | {"alone": None}, "shown", "contradicts"),
        ("better", SURE | {"simulated": True}, "seen in a simulation", "contradicts"),
        ("equal", SURE | {"margin": 0.0035, "p_equal": 1}, "differs: better", "differs: worse"),
        ("equal", EQUAL, "equal", "equal"),
        ("equal", EQUAL | {"p": 0.01, "half": 0.0005, "alone": 0.0005}, "equal", "equal"),
        ("equal", EQUAL | {"p_equal": 0.06}, "suggestive", "suggestive"),
        ("equal", EQUAL | {"alone": 0.0026}, "suggestive", "suggestive"),
        ("equal", EQUAL | {"tuned": (0.002, 0.002)}, "suggestive", "suggestive"),
        ("equal", EQUAL | {"elsewhere": False}, "cannot tell", "cannot tell"),
        ("equal", EQUAL | {"half": 0.0026}, "cannot tell", "cannot tell"),
        ("equal", EQUAL | {"mean": 0.0026}, *2 * ["suggestive of a difference"]),
        ("better", EQUAL, "cannot tell", "cannot tell"),  # a margin is for claims of equality
        ("better", SURE | {"half": 0.021, "p": 0.06}, "cannot tell", "cannot tell"),
        ("better", SURE | {"p": 0.06}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"alone": 0.021}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"unlike": True}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"tuned": (0.01, 0.011)}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"tuned": (-0.01, 0.004)}, "suggestive", "suggestive of the opposite"),
        ("equal", SURE | {"p": 0.06, "margin": 0.01}, *2 * ["suggestive of a difference"]),
        ("better", {"mean": 0.5}, "cannot tell", "cannot tell"),  # one seed
    ],
)
def test_a_verdict_is_a_function_of_numbers(kind, numbers, word, opposite):
    """The same conditions in both directions."""
    assert claims.verdict(kind, **numbers) == word
    tuned = numbers.get("tuned")
    turned = {"mean": -numbers["mean"], "tuned": tuned and (-tuned[0], tuned[1])}
    assert claims.verdict(kind, **numbers | turned) == opposite
    assert {word, opposite} <= claims.WORDS.keys()
    assert claims.verdict(kind, None) == "not yet run"


def test_a_bound_is_reached_missed_or_open():
    words = [claims.bound(0.85, mean, 0.02) for mean in (0.9, 0.86, 0.84, 0.8, None)]
    assert words == ["shown", "cannot tell", "cannot tell", "lower here", "not yet run"]
    assert claims.bound(0.85, 0.9, None) == "cannot tell"


def test_claims_name_arms_margins_and_rates_that_exist():
    assert len({claim.text for claim in claims.CLAIMS}) == len(claims.CLAIMS)
    base = run.Options(config=str(ROOT / "experiments/base.py")).base()
    known = {name: {"base", *e.arms(base)} for name, e in evidence.EXPERIMENTS.items()}
    for claim in claims.CLAIMS:
        assert {claim.one, claim.other} - {""} <= known[claim.experiment]
        assert (claim.kind == "equal") == (claim.margin in claims.MARGINS)
        assert {*claim.networks} <= {*plan.CHOSEN, *plan.LIKE_BASE} and claim.short
    for name, seeds in claims.SEEDS.items():
        assert {*seeds} <= known.get(name, {"base"})
    assert len(evidence.p_values(evidence.ON_FRESH_SEEDS)) == 10  # as PLAN.md has it


@pytest.mark.parametrize("page", ["docs/RESULTS.md", "README.md"])
def test_pages_have_the_words_that_the_rule_gives(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, part in verdicts.pages()[page].items():
        assert re.search(SPAN.format(name, name), text)[1] == part, "python experiments/verdicts.py"


@pytest.fixture
def asked(options, tmp_path, monkeypatch):
    """A function: the Numbers of a claim on hand-made runs of the arms a and b."""
    arms = {name: run.Arm() for name in "ab"}
    e = run.Experiment("t", lambda base: arms, {"test_bpb": ""}, pairs=(("b", "a"),))
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"t": e})
    options.results = str(tmp_path)

    def numbers(claim: claims.Claim, values: dict[str, list[float]], **more) -> evidence.Numbers:
        for path in tmp_path.glob("*.json"):
            path.unlink()
        add_results(options, values, **more)
        return evidence.numbers_of(claim, evidence.read_tables(options))

    return numbers


VALUES = {"base": [1.0, 1.1, 1.2], "a": [1.5, 1.6, 1.75], "b": [2.0, 2.1, 2.2]}


@pytest.mark.parametrize(
    "one, other, less, mean",
    [
        ("base", "b", True, 1.0),
        ("base", "b", False, -1.0),
        ("b", "base", True, -1.0),
        ("a", "b", True, 0.4833),
        ("b", "", True, 2.1),  # one figure alone
    ],
)
def test_numbers_above_zero_favour_the_claim(one, other, less, mean, asked):
    x = asked(claims.Claim("", "t", one, other, less=less), VALUES)
    assert x.mean == pytest.approx(mean, abs=1e-4) and x.pairs == 3 and x.p < 0.05


def test_numbers_of_equalities_and_of_other_measures(asked):
    x = asked(claims.Claim("", "t", "base", "b", kind="equal", margin="fp8"), VALUES)
    assert x.margin == pytest.approx(0.0025 * 1.1) and x.p_equal == 1
    x = asked(claims.Claim("", "t", "base", "a", other_measure="far"), VALUES, far=1.75)
    own = intervals.own_interval(VALUES["base"])[1]
    assert (x.mean, x.half) == (pytest.approx(1.75 - 1.1), pytest.approx(own))
    x = asked(claims.Claim("", "t", "a", "b"), VALUES)
    assert x.half != x.alone == pytest.approx(intervals.own_interval([0.5, 0.5, 0.45])[1])
    assert asked(claims.Claim("", "t", "a", "b"), {"base": [1.0], "a": [1.0]}).mean is None


def test_arms_that_differ_in_something_else_are_told(asked):
    claim = claims.Claim("", "t", "base", "b", alike="seed")
    assert not asked(claim, VALUES).unlike
    assert asked(claim, VALUES | {"b": [2.0, 2.1, 2.2, 2.3]}).unlike  # their means of it: 1, 1.5


def test_all_tests_of_a_page_are_one_family(asked, options):
    """An equality counts twice, a bound not at all, and a claim without runs counts, too."""
    kinds = {"a": "better", "b": "equal", "c": "better", "": "bound"}
    family = [claims.Claim(f"than {arm}", "t", "base", arm, kind=kind,
                           margin="loss" if kind == "equal" else "")
              for arm, kind in kinds.items()]  # fmt: skip
    near = {"base": [1.0, 1.1, 1.2], "a": [1.2, 1.1, 1.4], "b": [1.3, 1.2, 1.6]}
    asked(family[0], near)
    numbers = evidence.all_numbers(family, evidence.read_tables(options))
    tests = [("than a", "p"), ("than b", "p"), ("than b", "p_equal"), ("than c", "p")]
    assert evidence.p_values(family) == tests
    raw = {(text, test): getattr(numbers[text], test) for text, test in tests[:3]}
    p = evidence.corrected(family, numbers)
    assert p == intervals.holm(raw, 4) and p["than b", "p"] == 4 * raw["than b", "p"]
    words = evidence.words_of(family, numbers)
    assert words["than c"] == "not yet run" and words["than a"] == "cannot tell"


def test_an_equality_on_two_texts_needs_both():
    x, second = evidence.Numbers(p_equal=0.01), evidence.Numbers(0.002, 0.001, p_equal=0.2)
    second.margin = 0.0025
    evidence.with_second_text(x, second)
    assert x.p_equal == 0.2 and not x.elsewhere
    second.margin = 0.0035
    evidence.with_second_text(x, second)
    assert x.elsewhere
    second.alone = 0.0016  # the interval of its pairs alone is the wider one
    evidence.with_second_text(x, second)
    assert not x.elsewhere


def test_what_a_difference_is_worth_in_steps(monkeypatch):
    """From arms that differ in nothing but their length: e times the steps gain 0.2 here."""
    arms = {"a": run.Arm(), "a longer": run.Arm(longer=math.e)}
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"t": run.Experiment("t", lambda base: arms, {})})
    monkeypatch.setattr(evidence, "LONGER", (("t", "a", "a longer"),))
    runs = {"a": [1.0, 1.1, 9.0], "a longer": [0.8, 0.9]}  # seeds of both count
    runs = {k: [{"seed": i, "test_bpb": y} for i, y in enumerate(v)] for k, v in runs.items()}
    slope = evidence.bits_of_e_times_the_steps({"t": evidence.Table(runs, None)})
    assert slope == pytest.approx(0.2)
    numbers = evidence.Numbers(0.2 * math.log(1.05))
    assert verdicts.worth(claims.Claim("", "t", "a"), numbers, slope) == "+5.0%"


def test_power_of_an_equality():
    """At no difference the mean has to lie within the margin less half the interval."""
    error = 0.0029 * math.sqrt(2 / 8)
    rng = np.random.default_rng(0)
    means = abs(rng.normal(size=100_000))
    for tests, margin in (1, 0.004), (10, 0.0055):
        room = margin / error - intervals.quantile(0.05 / tests, 89)
        found = intervals.equal_with(error, 89, margin, tests)
        assert found == pytest.approx((means < room).mean(), abs=0.01)
    assert intervals.equal_with(0.0029, 89, 0.004) == 0


# ---- The plan ------------------------------------------------------------------------------------


@pytest.fixture
def planning(tmp_path, monkeypatch):
    """A function that writes the losses of a network's rates, seed by seed; the plan on them."""
    options = run.Options(results=str(tmp_path))
    monkeypatch.setattr(run.Options, "results", str(tmp_path))
    monkeypatch.setattr(run.Options.__init__, "__defaults__", tuple(vars(options).values()))
    monkeypatch.setattr(plan, "CONFIRMATION", str(tmp_path / "fresh"))

    def write(network: str, values: dict[float, list[float]], results=str(tmp_path), first=0):
        for times, ys in values.items():
            arm = plan.arm_at(network, times)
            file = "base" if arm == "base" else plan.CHOSEN[network]
            for seed, y in enumerate(ys, first):
                x = {"arm": arm, "seed": seed, "steps": 600, "source": "s", "corpus": "c"}
                x |= {"val_bpb": y, "test_bpb": y + 0.001 * (seed % 3)}
                tables.add_result(replace(options, results=results), file, x)

    return write


def test_the_rate_is_that_of_the_least_mean_on_the_validation_text(planning):
    """Known when all runs are there; the smallest is tried where the next one wins."""
    same = [2.0, 2.0, 2.0]
    planning("MLA", {1: same, 0.67: [1.0, 1.0, 3.9], 0.45: [2.0, 2.0]})
    assert plan.best_rate("MLA") is None
    planning("MLA", {0.45: [2.0, 2.0, 2.1]})
    assert plan.best_rate("MLA") == 0.67 and plan.rates_of("MLA") == (1, 0.67, 0.45)
    planning("dense", {1: same, 0.67: same, 0.45: [1.9, 1.9, 1.9]})
    assert plan.rates_of("dense")[-1] == 0.3 and plan.best_rate("dense") is None
    planning("dense", {0.3: [1.9, 1.9, 2.0]})
    arms = [plan.confirming(x, 8).arm for x in ("MLA", "loss 0.01", "tiles", "dense")]
    assert arms == ["MLA lr x0.67", "loss 0.01 lr x0.67", "tiles lr x0.67", "dense lr x0.45"]
    assert plan.confirming("GQA 2", 8) is None


def test_the_first_seeds_are_compared_at_each_networks_own_rate(planning, monkeypatch):
    """Chosen by the validation text, compared on the test text."""
    arms = {"MHA": run.Arm()} | run.at_rates({"MLA": run.Arm(), "MHA": run.Arm()}, {"lr": 1.0})
    e = run.Experiment("attention", lambda base: arms, {"test_bpb": ""})
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"attention": e})
    claim = claims.Claim("", "attention", "base", "MHA", networks=("MLA", "MHA"))
    planning("MLA", {1: [1.0, 1.1, 1.2], 0.67: [0.9, 1.0, 1.2], 0.45: [2.0] * 3})
    planning("MHA", {1: [1.5, 1.4, 1.8], 0.67: [1.8] * 3})
    assert evidence.numbers_of(claim, evidence.read_tables(run.Options())).tuned is None
    planning("MHA", {0.45: [1.9] * 3})
    x = evidence.numbers_of(claim, evidence.read_tables(run.Options()))
    assert x.mean == pytest.approx((0.5 + 0.3 + 0.6) / 3)
    assert x.tuned == (pytest.approx((0.6 + 0.4 + 0.6) / 3), pytest.approx(x.half))  # MLA has 0.67


def test_fresh_seeds_give_a_word_when_all_their_runs_are_there(planning, monkeypatch):
    claim = claims.Claim("it", "attention", "base", "MHA", networks=("MLA", "MHA"))
    monkeypatch.setattr(evidence, "ON_FRESH_SEEDS", [claim])
    monkeypatch.setattr(plan, "MORE", {"MLA": range(8, 24)})
    for network in plan.CHOSEN:
        planning(network, {x: [3.0 - x] * 3 for x in (1, 0.67, 0.45)})
    ys = [1.0, 1.1, 1.05, 1.2, 1.15, 1.0, 1.1, 1.3]
    planning("MLA", {1: ys}, plan.CONFIRMATION, first=8)
    planning("MHA", {1: [y + 0.1 for y in ys[:7]]}, plan.CONFIRMATION, first=8)
    x = evidence.on_fresh_seeds()["it"]
    assert (x.there, x.planned, x.word, x.numbers.mean) == (15, 16, "", None)
    planning("MHA", {1: [y + 0.1 + 0.01 * (i % 2) for i, y in enumerate(ys)]},
             plan.CONFIRMATION, first=8)  # fmt: skip
    x = evidence.on_fresh_seeds()["it"]
    assert (x.word, x.numbers.pairs) == ("shown", 8)
    planning("MLA", {1: [y + 9 for y in ys]}, plan.CONFIRMATION, first=16)
    assert evidence.on_fresh_seeds()["it"].numbers.mean == x.numbers.mean  # MHA has no such seeds


def test_a_row_has_the_fresh_seeds_once_all_are_there():
    """With them the difference, its worth, the seeds, the margin and what was compared."""
    claim = claims.Claim("it", "mtp", "base", "off", "with {one[a]}", kind="equal", margin="loss")
    first = evidence.Numbers(0.003, 0.001, margin=0.5, pairs=8, arms={"one": {"a": 1}})
    new = evidence.Numbers(0.2, 0.1, margin=0.3, pairs=16, arms={"one": {"a": 2}})
    slope, old = 0.2 / math.log(3), ["it", "with 1", "+0.0030 ± 0.0010 bits/byte", "+1.7%", "8"]
    assert verdicts.line_of(claim, first, "equal", None, slope) == [*old, "equal within 0.5000", ""]
    waiting = verdicts.line_of(claim, first, "equal", evidence.Fresh(new, 7, 9), slope)
    assert waiting == [*old, "equal within 0.5000; not yet confirmed: 7 of 9 runs", ""]
    done = evidence.Fresh(new, 9, 9, "differs: better")
    assert verdicts.line_of(claim, first, "equal", done, slope) == [
        "it", "with 2", "+0.2000 ± 0.1000 bits/byte", "+200.0%", "16, fresh",
        "differs: better (margin 0.3000)", "equal: +0.0030 ± 0.0010 bits/byte, 8 seeds",
    ]  # fmt: skip


def test_two_processes_never_train_the_same_run(tmp_path, monkeypatch):
    """One takes the first that is free; what another has ended meanwhile is not made again."""
    done, trained = set(), []

    class Run:
        def __init__(self, name):
            self.name = name

        def missing(self):
            todo = [] if self.name in done else ["x"]
            if self.name == "a":
                done.add("a")  # by another process, just now
            return todo, tmp_path / self.name

        def train(self):
            trained.append(self.name)
            done.add(self.name)

    runs = [Run(name) for name in "abc"]
    monkeypatch.setattr(plan, "planned", lambda: iter([runs[0], None, *runs[1:]]))
    with plan.taken(tmp_path / "b") as mine, plan.taken(tmp_path / "b") as again:
        assert mine and not again
        assert plan.train_next() and trained == ["c"]
        assert not plan.train_next()
    assert plan.train_next() and trained == ["c", "b"]
