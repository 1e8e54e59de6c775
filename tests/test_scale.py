"""The run on paper: its figures are the report's, by hand, and the page shows what was computed."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import run
import scale
import schedules
import torch

import bench

ROOT = Path(__file__).parent.parent
V3 = ROOT / "config/v3_671b.py"
RESULTS = json.loads((ROOT / "experiments/results/scale.json").read_text("utf-8"))


def number(column: dict, name: str) -> float:
    """The one whose name begins so; the rest of a name is the unit or the report's figure."""
    [found] = [x for key, x in column.items() if key.startswith(name)]
    return found


# ---- Pipeline ------------------------------------------------------------------------------------

SIZES = [(2, 4), (4, 6), (4, 12), (6, 14), (8, 20), (8, 32), (16, 40)]
# The backward for the weights takes no longer than the forward and than that for the input; for
# DualPipe's formula these two take equally long; for 1F1B's anything goes.
EVEN = [{"F": 10, "I": 10, "W": w, "FB": fb} for w, fb in ((10, 30), (10, 22), (7, 27), (3, 13))]
ZERO = [*EVEN, {"F": 10, "I": 13, "W": 7, "FB": 25}, {"F": 9, "I": 8, "W": 8, "FB": 25}]
TIMES = {"DualPipe": EVEN, "ZB1P": ZERO, "1F1B": [*ZERO, {"F": 10, "I": 4, "W": 20, "FB": 30}]}


@pytest.mark.parametrize("ranks, micros", SIZES)
@pytest.mark.parametrize("name", schedules.PLANS)
def test_simulated_schedules_are_table_2s(name, ranks, micros):
    for times in TIMES[name]:
        F, W, FB, B = times["F"], times["W"], times["FB"], times["I"] + times["W"]
        expected = {
            "1F1B": ((ranks - 1) * (F + B), 1, ranks),
            "ZB1P": ((ranks - 1) * (F + B - 2 * W), 1, ranks),
            "DualPipe": ((ranks / 2 - 1) * (FB + B - 3 * W), 2, ranks + 1),
        }[name]
        events = schedules.simulate(name, ranks, micros, times | {"B": B})
        found = schedules.measure(events)
        assert (found["bubble"], found["stages"], found["activations"]) == expected
        total = max(end for mine in events for _, end, _ in mine)
        assert found["idle"] == pytest.approx(expected[0] / total)


@pytest.mark.parametrize("name", schedules.PLANS)
def test_every_chunk_is_computed_once_and_after_what_it_needs(name):
    ranks, micros, times = 6, 14, {"F": 10, "B": 20, "I": 13, "W": 7, "FB": 25}
    spans = {}  # by rank, kind, way and number: begin and end; I and B are one kind, W has no way
    for rank, mine in enumerate(schedules.simulate(name, ranks, micros, times)):
        free, count = 0, Counter()
        for begin, end, chunks in mine:
            assert begin >= free  # one thing at a time
            assert end - begin == (25 if " " in chunks else times[chunks[0]])
            assert " " not in chunks or chunks in ("Fa Bb", "Fb Ba")
            free = end
            for chunk in chunks.replace("I", "B").split():
                spans[rank, chunk[0], chunk[1:], count[chunk]] = begin, end
                count[chunk] += 1
        ways = {"a": micros // 2, "b": micros // 2} if name == "DualPipe" else {"a": micros}
        halves = sum("I" in chunks for _, _, chunks in mine)
        assert count == {f"{kind}{way}": n for kind in "FB" for way, n in ways.items()} | (
            {"W": halves} if halves else {}
        )
        begun = [begin for begin, _, chunks in mine if "W" in chunks]
        ended = [end for _, end, chunks in mine if "I" in chunks]
        assert all(x >= y for x, y in zip(begun, ended, strict=True))
    for (rank, kind, way, n), (begin, _) in spans.items():
        step = 1 if way == "a" else -1
        if kind == "B":
            assert spans[rank, "F", way, n][1] <= begin
        sender = rank - step if kind == "F" else rank + step
        if kind != "W" and 0 <= sender < ranks:
            assert spans[sender, kind, way, n][1] <= begin


def test_a_chunk_waits_for_its_own_micro_batch(monkeypatch):
    plans = [["Fa", "W", "Fa"], ["Fa", "Fa"]]
    monkeypatch.setitem(schedules.PLANS, "ours", lambda rank, ranks, micros: plans[rank])
    _, second = schedules.simulate("ours", 2, 2, {"F": 1, "B": 11, "I": 1, "W": 10})
    assert second == [(1, 2, "Fa"), (12, 13, "Fa")]


def test_activations_are_held_until_the_weights_have_their_gradient():
    def most(*order: str) -> float:
        return schedules.measure([[(i, i + 1, chunk) for i, chunk in enumerate(order)]])

    assert most("Fa", "Ia", "Fa", "W", "Ia", "W")["activations"] == 2
    assert most("Fa", "Ia", "W", "Fa", "Ba")["activations"] == 1
    assert most("Fa", "Fb Ba", "Bb")["activations"] == 2
    assert most("Fa", "Fb Ba", "Bb")["stages"] == 2


# ---- Traffic -------------------------------------------------------------------------------------


def test_traffic_of_experts_chosen_by_hand(monkeypatch):
    """Experts 0..3 lie on one card, 0..31 on one node: two nodes, three cards."""
    chosen = torch.tensor([[[0, 1, 2, 3, 31, 224, 225, 226]] * 2])
    monkeypatch.setattr(scale.Gate, "forward", lambda gate, x: (None, chosen, None))
    found = scale.traffic(V3)["limit"]
    sent = 7168 + 4 * 56 + 2 * 7168
    assert number(found, "nodes") == 2 and number(found, "experts per node") == 4
    assert number(found, "bytes between nodes") == 2 * 7 / 8 * sent
    assert number(found, "bytes within nodes") == 3 * 7 / 8 * sent
    assert number(found, "µs of InfiniBand") == pytest.approx(2 * 7 / 8 * sent / 50e3)
    assert number(found, "µs of NVLink") == pytest.approx(3 * 7 / 8 * sent / 160e3)


def test_random_tokens_visit_as_many_nodes_as_chance_has_it():
    found = scale.traffic(V3)
    limit, free, more = (found[x] for x in ("limit", "no limit", "limit, 13 experts"))
    chance = 8 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert number(free, "nodes") == pytest.approx(chance, abs=0.02)
    assert number(free, "experts per node") == pytest.approx(8 / chance, abs=0.01)
    assert 3.9 < number(limit, "nodes") <= 4 and 3.9 < number(more, "nodes") <= 4
    # What 3.2 experts on each node are free for: NVLink is done when InfiniBand is.
    assert 3.2 < number(more, "experts per node") < 3.4
    assert number(more, "µs of NVLink") < number(more, "µs of InfiniBand")


# ---- Cost and memory -----------------------------------------------------------------------------


def test_share_of_the_peak_is_the_one_that_the_makers_measured():
    """arXiv 2505.09343, Table 4. What follows from the inputs alone is not asserted."""
    x = scale.cost(V3)
    assert number(x, "GFLOP per token") == pytest.approx(250, rel=0.005)
    assert number(x, "V3's TFLOP/s a card") == pytest.approx(385, rel=0.01)
    assert number(x, "V3's share of the peak") == pytest.approx(0.3894, rel=0.01)
    with_mtp = bench.size_row(V3)["GFLOP/trained token"]
    share, more = number(x, "V3's share, with MTP"), with_mtp / number(x, "GFLOP per token")
    assert share == pytest.approx(number(x, "V3's share of the peak") * more)
    assert number(x, "PFLOP") == pytest.approx(14.8e12 * with_mtp / 1e6)
    more = 6 * (671_026_419_200 - 37_552_297_472) / 1e9 / number(x, "GFLOP per token")
    dense = [x[f"dollars if dense, as large as the {part}"] for part in ("active part", "whole")]
    assert dense[1] / dense[0] == pytest.approx(1 + more)


def test_cost_of_a_run_that_says_how_long_it_is():
    assert number(scale.cost(ROOT / "config/base_1b.py"), "tokens") == 10_000 * 256 * 2048
    v3, small = scale.cost(V3), scale.cost(ROOT / "config/small.py")
    flops = bench.size_row(ROOT / "config/small.py")["GFLOP/trained token"]
    assert number(small, "PFLOP") == pytest.approx(flops * 2400 * 8 * 256 / 1e6)
    for name in ("H800 hours", "dollars at"):  # at the same speed and price
        ratio = number(v3, name) / number(small, name)
        assert ratio == pytest.approx(number(v3, "PFLOP") / number(small, "PFLOP"))


def test_memory_is_all_of_the_model_once_and_twice():
    x = scale.memory(V3)
    ends, total = 2 * 129_280 * 7168, 671_026_419_200 + 11_610_068_224 - 59 * 256
    experts = 59 * 256 * 3 * 7168 * 2048
    rest = total - ends - experts
    held = 2 * (experts / 64 + rest) / 16 / 1e9
    token = 62 * (2 * (2 * 7168 + 1536 + 512 + 64) + 1.5 * 128 * 128)
    token += 59 * 9 * (7168 + 2 * 2048) + 3 * (7168 + 2 * 18432)  # three layers are dense
    kept = 17 / 16 * 4096 * token / 1e9
    buffers = 2 * 4096 * 8 * (1 + 2) * 7168 / 1e9
    optimiser = 8 * (experts + rest) / 2048 / 1e9
    parts = ("GB of weights, bf16", "GB of gradients", "GB of optimiser", "GB of activations")
    parts += ("GB of buffers",)
    found = [number(x, part) for part in parts]
    assert found == pytest.approx([2 * held, 4 * held, optimiser, kept, buffers])
    assert x["GB in training"] == pytest.approx(6 * held + optimiser + kept + buffers)
    assert number(x, "GB more at the ends: logits") == pytest.approx(2.118, abs=0.001)
    assert number(x, "GB more at the ends: embedding") == pytest.approx((6 + 8 / 256) * ends / 1e9)
    serving, cache = (experts / 256 + rest + 2 * ends) / 1e9, 70_272 * 131_072 / 1e9
    assert x["GB of weights in serving"] == pytest.approx(serving)
    assert number(x, "KB of cache per token, MLA") == 70.272
    assert x["GB of cache for 128K tokens, MLA"] == pytest.approx(cache)
    assert x["GB of cache for 128K tokens, multi-head"] == pytest.approx(cache * 32768 / 576)
    users = [x[f"users of 128K tokens, {kind}"] for kind in ("MLA", "multi-head")]
    assert users == pytest.approx([(80 - serving) / cache, (80 - serving) / cache / 32768 * 576])


# ---- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kimi_k2", "base_1b"])
def test_other_networks_fit(name, monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(bench, "Table", lambda title, rows: shown.setdefault(title, rows))
    monkeypatch.setattr(run, "ROOT", tmp_path)  # where nothing can be written, nothing is
    scale.main([str(ROOT / f"config/{name}.py")])
    assert shown.keys() == {"cost", "traffic", "pipeline", "memory"} and name in shown["cost"][0]
    numbers = [x for name in shown for row in shown[name] for key, x in row.items() if key]
    assert len(numbers) > 60 and all(x > 0 for x in numbers)


def test_text_of_the_page_has_the_numbers_of_the_json_file():
    page = " ".join((ROOT / "docs/SCALE.md").read_text("utf-8").split())
    card, v3 = RESULTS["memory"]["a card"], RESULTS["cost"]["v3_671b"]
    users = [x for key, x in card.items() if key.startswith("users")]
    free = card["GB of an H800"] - card["GB in training"]
    ends = sum(x for key, x in card.items() if key.startswith("GB more at the ends"))
    step, bubble = 19.926, 2.06  # arXiv 2505.09343, Table 4
    flops, share = number(v3, "V3's TFLOP/s"), number(v3, "V3's share of the peak")
    bubbles = {name: x["bubble"] for name, x in RESULTS["pipeline"].items()}
    few = {name: schedules.measure(schedules.simulate(name, 8, 20, scale.OVERLAPPED))["bubble"]
           for name in ("DualPipe", "ZB1P")}  # fmt: skip
    for sentence in (
        f"for {users[0]:.1f} users",
        f"room for {users[1]:.2f}.",
        f"{free:.0f} of 80 GB stay free, and {free - ends:.0f} on the first",
        f"which is {100 * bubble / step:.1f} %",
        f"as {flops:.0f} TFLOP/s and {100 * share:.1f} %",
        f"{bubbles['DualPipe, F&B 2.2']:.1f} against ZB1P's {bubbles['ZB1P']:.0f}",
        f"{few['DualPipe']:.1f} against {few['ZB1P']:.0f}.",
    ):
        assert sentence in page


def test_command_writes_todays_numbers_and_figures(tmp_path, monkeypatch):
    """To a fresh folder; the numbers are those of the repository, as its page and figures are."""
    for folder in ("docs/figures", "experiments/results"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    scale.main([])
    new = json.loads((tmp_path / "experiments/results/scale.json").read_text("utf-8"))
    assert len([*tmp_path.rglob("*.*")]) == 1 + 4 and list(new) == list(RESULTS)
    page = (ROOT / "docs/SCALE.md").read_text("utf-8")
    for name, part in RESULTS.items():
        assert list(part) == list(new[name])
        for column, numbers in part.items():  # of another machine's gate one token may differ
            near = 1e-3 if name == "traffic" else 1e-9
            assert numbers == pytest.approx(new[name][column], rel=near)
        rows = [{"": key} | {c: part[c][key] for c in part} for key in next(iter(part.values()))]
        _, _, table = str(bench.Table(name, rows)).split("\n", 2)
        if name != "memory":  # whose figure has all of it, and whose users the text has
            assert f"```\n{table}\n```" in page, "python experiments/scale.py prints it anew"
        drawn = scale.draw_bars(part, scale.BARS[name]) if name in scale.BARS else None
        svg = (ROOT / f"docs/figures/scale_{name}.svg").read_text("utf-8")
        assert svg == (drawn or scale.draw_pipeline()), "python experiments/scale.py draws it anew"
        assert f"(figures/scale_{name}.svg)" in page
