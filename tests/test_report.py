"""experiments/report.py beside tables of a textbook and one difference that is computed by hand."""

import json
import math
from pathlib import Path

import pytest
import report

ROOT = Path(__file__).parent.parent


def test_intervals_and_p_values_are_those_of_the_textbooks():
    for freedom, t in {1: 12.706, 4: 2.776, 21: 2.080, 41: 2.020}.items():
        assert report.quantile(freedom) == pytest.approx(t, abs=1e-3)
        assert report.p_value(-t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert report.p_value(2.831, 21) == pytest.approx(0.01, abs=1e-4)
    assert report.own_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5, abs=1e-3))
    corrected = report.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5})
    assert corrected == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5})


def fresh(file: str, arm: str) -> list[float]:
    """Bits per byte of the test text, of seeds 8 to 15."""
    text = (ROOT / f"experiments/results/confirmation/{file}.json").read_text(encoding="utf-8")
    found = {x["seed"]: x["test_bpb"] for x in json.loads(text) if x["arm"] == arm}
    return [found[seed] for seed in range(8, 16)]


def test_a_difference_by_hand():
    """Grouped queries against multi-head attention, by sums over the four networks of their class:
    a residual is a value less its arm's mean, less its seed's, plus the mean of all."""
    arms = [fresh("attention", "MHA"), fresh("attention", "GQA 2")]
    arms += [fresh("experts", "dense lr x0.67"), fresh("mtp", "off lr x0.67")]
    of_arm = [sum(xs) / 8 for xs in arms]
    of_seed = [sum(xs) / 4 for xs in zip(*arms, strict=True)]
    squares = sum(
        (arms[i][j] - of_arm[i] - of_seed[j] + sum(of_arm) / 4) ** 2
        for i in range(4) for j in range(8)
    )  # fmt: skip
    half = 2.0796 * math.sqrt(squares / 21) * math.sqrt(2 / 8)  # Student's t of 3 x 7 degrees
    found = report.ask("test text").found["Grouped queries are worse than multi-head"]
    assert found.mean == pytest.approx(of_arm[1] - of_arm[0], abs=1e-9)
    assert found.half == pytest.approx(half, rel=1e-4)
    assert found.error[1] == 21 and found.pairs == 8
    # The interval ends where the p-value of an equality is 0.05.
    assert found.p_equal(found.mean + found.half) == pytest.approx(0.05, abs=1e-4)
    assert found.p_equal(found.mean / 2) == 1


def test_the_page_has_the_table():
    page = (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    assert report.table_of_claims() in page and len(report.tests()) == 10
