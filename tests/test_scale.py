"""The run on paper: its figures are the report's, by hand, and the page shows what was computed."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import scale
import scale_page
import schedules
import tables

import bench
from model import DeepSeekV3, ModelConfig

ROOT = Path(__file__).parent.parent
V3 = str(ROOT / "config/v3_671b.py")
CONFIG = bench.open_config(V3)[0].config

# ---- Pipeline ------------------------------------------------------------------------------------

SIZES = [(2, 4), (4, 6), (4, 12), (6, 14), (8, 20), (8, 32), (16, 40)]
# The backward for the weights takes no longer than the forward and than that for the input; for
# DualPipe's formula these two take equally long; for 1F1B's anything goes.
EVEN = [{"F": 10, "I": 10, "W": w, "FB": fb} for w, fb in ((10, 30), (10, 22), (7, 27), (3, 13))]
ZERO = [*EVEN, {"F": 10, "I": 13, "W": 7, "FB": 25}, {"F": 9, "I": 8, "W": 8, "FB": 25}]
TIMES = {"DualPipe": EVEN, "ZB1P": ZERO, "1F1B": [*ZERO, {"F": 10, "I": 4, "W": 20, "FB": 30}]}


def simulated(name: str, ranks: int, micros: int, times: dict) -> list[schedules.Event]:
    return schedules.simulate(schedules.schedule(name, ranks, micros), times)


@pytest.mark.parametrize("ranks, micros", SIZES)
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_simulated_schedules_are_table_2s(name, ranks, micros):
    for times in TIMES[name]:
        found = schedules.measured(simulated(name, ranks, micros, times), ranks)
        B, W, FB = times["I"] + times["W"], times["W"], times["FB"]
        bubble = {
            "1F1B": (ranks - 1) * (times["F"] + B),
            "ZB1P": (ranks - 1) * (times["F"] + B - 2 * W),
            "DualPipe": (ranks / 2 - 1) * (FB + B - 3 * W),
        }[name]
        expected = {"bubble": bubble, "stages": 1, "activations": ranks}
        if name == "DualPipe":
            expected |= {"stages": 2, "activations": ranks + 1}
        assert {key: found[key] for key in expected} == expected
        assert schedules.table_2(name, ranks, times) == expected


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_every_chunk_is_computed_once_and_after_what_it_needs(name):
    ranks, micros, times = 6, 14, {"F": 10, "I": 13, "W": 7, "FB": 25}
    ends, free = {}, [0.0] * ranks
    for rank, begin, end, chunks in simulated(name, ranks, micros, times):
        assert begin >= free[rank]  # one thing at a time
        free[rank] = end
        long = {**times, "B": 20}
        assert end - begin == (long[chunks[0].kind] if len(chunks) == 1 else times["FB"])
        for kind, way, stage, micro in chunks:
            assert stage == (rank if way == "a" else ranks - 1 - rank)
            for half in "IW" if kind == "B" else kind:
                assert (half, way, stage, micro) not in ends
                ends[half, way, stage, micro] = begin, end
    ways = "ab" if name == "DualPipe" else "a"
    assert len(ends) == 3 * ranks * micros and {way for _, way, _, _ in ends} == {*ways}
    for (kind, way, stage, micro), (begin, end) in ends.items():
        if kind == "F" and stage:
            assert ends["F", way, stage - 1, micro][1] <= begin
        if kind == "I":
            assert ends["F", way, stage, micro][1] <= begin
            assert stage == ranks - 1 or ends["I", way, stage + 1, micro][1] <= begin
        if kind == "W":
            first = ends["I", way, stage, micro]
            assert first[1] <= begin or first == (begin, end)  # or both halves in one


def test_pairs_are_dualpipes_alone_and_the_middle_parts_its_first():
    orders = schedules.schedule("DualPipe", 8, 20)
    pairs = [sum(len(chunks) == 2 for chunks in order) for order in orders]
    assert pairs == [9, 10, 11, 11, 11, 11, 10, 9]  # 2 (20/2 - 8 + 1 + near) + far, the middle - 1
    for chunks in (x for order in orders for x in order if len(x) == 2):
        assert [c.kind for c in chunks] == ["F", "B"] and len({c.way for c in chunks}) == 2
    for name in ("1F1B", "ZB1P"):
        assert all(
            len(chunks) == 1 for order in schedules.schedule(name, 8, 20) for chunks in order
        )


def test_activations_are_held_until_the_weights_have_their_gradient():
    first, second = ([schedules.Chunk(kind, "a", 0, i) for kind in "FIW"] for i in (0, 1))
    order = [first[0], first[1], second[0], first[2], second[1], second[2]]
    events = schedules.simulate([[[chunk] for chunk in order]], schedules.TIMES)
    assert schedules.measured(events, 1)["activations"] == 2
    events = schedules.simulate([[[chunk] for chunk in first + second]], schedules.TIMES)
    assert schedules.measured(events, 1)["activations"] == 1


def test_a_schedule_that_waits_for_itself_is_refused():
    orders = schedules.schedule("1F1B", 2, 2)
    orders[1].reverse()
    with pytest.raises(ValueError, match="waits for itself after 2 steps"):
        schedules.simulate(orders, schedules.TIMES)


# ---- Traffic -------------------------------------------------------------------------------------


def test_routing_is_the_gates():
    scores = torch.rand(64, 256) * 0.98 + 0.01
    bias = 0.4 * torch.rand(256)
    free = scale.route(CONFIG, scores, bias, limit=False).sort().values
    assert torch.equal(free, (scores + bias).topk(8).indices.sort().values)
    limited = scale.route(CONFIG, scores, bias, limit=True)
    assert max(len({*row}) for row in (limited // 32).tolist()) == 4
    assert max(len({*row}) for row in (free // 32).tolist()) > 4


def test_traffic_of_experts_chosen_by_hand(monkeypatch):
    """Experts 0..3 lie on one card, 0..31 on one node: two nodes, three cards."""
    chosen = torch.tensor([[0, 1, 2, 3, 31, 224, 225, 226]] * 2)
    monkeypatch.setattr(scale, "route", lambda config, scores, bias, limit: chosen)
    limited, free = scale.traffic(V3)
    sent = 7168 + 4 * 56 + 2 * 7168
    assert (limited["nodes at most"], free["nodes at most"]) == (4, 8)
    assert limited["nodes"] == 2 and limited["experts per visited node"] == 4
    assert limited["bytes between nodes"] == 2 * 7 / 8 * sent
    assert limited["bytes within"] == 3 * 7 / 8 * sent
    assert limited["µs InfiniBand"] == pytest.approx(2 * 7 / 8 * sent / 50e3)
    assert limited["µs NVLink"] == pytest.approx(3 * 7 / 8 * sent / 160e3)
    assert limited["share"] == [0, 1, 0, 0, 0, 0, 0, 0]


def test_random_tokens_visit_as_many_nodes_as_chance_has_it():
    limited, free = scale.traffic(V3)
    chance = 8 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert free["nodes"] == pytest.approx(chance, abs=0.02)
    assert 3.9 < limited["nodes"] <= 4 and sum(limited["share"]) == pytest.approx(1)
    found = scale.links(V3, [limited, free])
    assert found["free"] == pytest.approx(3.2) and found["experts"] == pytest.approx(12.8)
    assert found["infiniband"] == pytest.approx(2 * 59 * limited["µs InfiniBand"])
    assert found["peak"] * 989e12 / 1e6 == pytest.approx(scale.cost(V3)["gflop_mtp"] * 1e9)
    assert found["card"] == pytest.approx(180e3 * 3600 / 1e12 * 1e6)


def test_scores_of_a_run_stand_side_by_side(monkeypatch):
    net = DeepSeekV3(ModelConfig(**vars(CONFIG) | SMALL)).eval()
    own = []  # every gate's scores, token by token
    for i, gate in enumerate(net.gates()):
        gate.e_score_correction_bias += torch.arange(16.0) + 100 * i
        gate.register_forward_hook(lambda gate, x, y: own.append({*map(tuple, y[0][0].tolist())}))
    tokenizer = SimpleNamespace(encode=lambda text: [ord(x) % 64 for x in text[:130]])
    monkeypatch.setattr(scale, "load_model", lambda *_: (net, tokenizer, None))
    layers = scale.trained_scores("a run", 40)
    assert len(layers) == 2  # not the MTP module's
    for i, (scores, bias) in enumerate(layers):
        assert scores.shape == (128, 40) and torch.equal(bias, torch.arange(40.0) % 16 + 100 * i)
        first, second = ({*map(tuple, x.tolist())} for x in (scores[:, :16], scores[:, 16:32]))
        assert first | second <= own[i] and len(first | second) > 20
        assert not torch.equal(scores[:, :16], scores[:, 16:32])
    monkeypatch.setattr(scale, "load_model", lambda *_: (net, None, None))
    with pytest.raises(ValueError, match="a run has no tokenizer or no experts"):
        scale.trained_scores("a run", 40)


SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=32,
    moe_intermediate_size=16, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=4,
    n_group=4, topk_group=2, max_position_embeddings=128, rope_scaling=None, initializer_range=0.5,
)  # fmt: skip


# ---- Cost and memory -----------------------------------------------------------------------------


def test_cost_is_the_reports():
    x = scale.cost(V3)
    assert x["gflop"] == pytest.approx(250, rel=0.005) and x["tokens"] == pytest.approx(14.8e12)
    assert x["hours"] == pytest.approx(2.664e6) and x["dollars"] == pytest.approx(5.328e6)
    assert x["days"] == pytest.approx(180e3 * 14.8 / 2048 / 24)
    assert x["bf16"] * 989e12 * 2.664e6 * 3600 == pytest.approx(x["flops"])
    assert x["fp8"] == pytest.approx(x["bf16"] / 2) and x["active"] == x["dollars"]
    more = 6 * (671_026_419_200 - 37_552_297_472)
    assert x["total"] / x["dollars"] == pytest.approx(1 + more / 1e9 / x["gflop"])
    file = ROOT / "config/base_1b.py"  # which says for how long it trains
    assert scale.cost(file)["tokens"] == pytest.approx(10_000 * 256 * 2048)
    small = bench.size_row(ROOT / "config/small.py")["GFLOP/trained token"]
    assert x["small"] == pytest.approx(small * 1e9 * 2400 * 8 * 256)
    assert x["small_seconds"] / 3600 * x["runs"] == pytest.approx(x["hours"])


def test_memory_is_all_of_the_model_once_and_twice():
    x = scale.memory(V3)
    ends, total = 2 * 129_280 * 7168, 671_026_419_200 + 11_610_068_224 - 59 * 256
    experts = 59 * 256 * 3 * 7168 * 2048
    rest = total - ends - experts
    assert x["held"] == pytest.approx(2 * (experts / 64 + rest) / 16 / 1e9)
    assert x["optimiser"] * 2048 == pytest.approx(8 * (experts + rest) / 1e9)
    assert (x["weights"], x["gradients"], x["whole_optimiser"]) == pytest.approx(
        (2 * x["held"], 4 * x["held"], 8 * x["held"])
    )
    token = 2 * (2 * 7168 + 1536 + 512 + 64) + 1.5 * 128 * 128 + 9 * (7168 + 2 * 2048)
    assert x["activations"] == pytest.approx(17 * 62 / 16 * 4096 * token / 1e9)
    heads = 128 * (192 + 192 + 128 + 128)
    token = 2 * (4 * 7168 + 2 * (1536 + 512 + 64) + heads + 9 * (7168 + 3 * 2048))
    assert x["whole_activations"] == pytest.approx(17 * 62 / 16 * 4096 * token / 1e9)
    assert x["all"] == pytest.approx(6 * x["held"] + x["optimiser"] + x["activations"])
    assert x["ends"] == pytest.approx((6 + 8 / 256) * ends / 1e9)
    assert x["token"] == 70.272 and x["mha"] / x["mla"] == pytest.approx(32768 / 576)
    assert x["served"] == pytest.approx((experts / 256 + rest + 2 * ends) / 1e9)
    assert x["mla_users"] == pytest.approx((80 - x["served"]) / (70_272 * 131_072 / 1e9))


@pytest.mark.parametrize("name", ["kimi_k2", "moonlight_16b", "base_1b"])
def test_other_networks_fit(name):
    file = str(ROOT / f"config/{name}.py")
    rows = scale.traffic(file)
    assert [x["nodes at most"] for x in rows] == ([4, 8] if name == "base_1b" else [8])
    numbers = [*scale.cost(file).values(), *scale.memory(file).values()]
    assert all(x > 0 for x in [*numbers, *scale.links(file, rows).values()])


def test_networks_that_do_not_fit_get_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"small\.py has 16 experts on 4 nodes.* of 32 experts, as"
    ):
        scale.main([str(ROOT / "config/small.py")])
    dense = tmp_path / "dense.py"
    dense.write_text(Path(V3).read_text() + "first_k_dense_replace = 61\n")
    with pytest.raises(ValueError, match=r"dense\.py has no layer of experts: name another, such"):
        scale.main([str(dense)])
    assert scale.nodes_of(replace(CONFIG, n_group=1, topk_group=1), V3) == 8


# ---- The page ------------------------------------------------------------------------------------


def test_page_and_figures_show_what_the_json_file_holds():
    again = "python experiments/scale.py --write"
    results = json.loads((ROOT / "experiments/results/scale.json").read_text("utf-8"))
    text = (ROOT / "docs/SCALE.md").read_text("utf-8")
    for name in scale_page.PARTS:
        shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)
        assert shown[1] == scale_page.table(name, results[name]), again
    for name in scale_page.DRAWINGS:
        svg = (ROOT / f"docs/figures/scale_{name}.svg").read_text("utf-8")
        assert f"results {tables.digest(json.dumps(results))}" in svg and len(svg) < 150_000, again
        assert f"(figures/scale_{name}.svg)" in text


def test_numbers_of_the_page_are_todays():
    results = json.loads((ROOT / "experiments/results/scale.json").read_text("utf-8"))
    for name, part in ("cost", scale.cost(V3)), ("memory", scale.memory(V3)):
        assert results[name] == pytest.approx(part, rel=1e-5)
    for old, new in zip(results["pipeline"], schedules.rows([(8, 20), (16, 120)]), strict=True):
        assert old.pop("schedule") == new.pop("schedule") and old == pytest.approx(new, rel=1e-5)
    for old, new in zip(results["traffic"], scale.traffic(V3), strict=False):
        assert old["bytes between nodes"] == pytest.approx(new["bytes between nodes"], rel=1e-3)


def test_command_writes_the_page(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "figures").mkdir()
    marks = "\n".join(f"a\n<!-- {x} -->\n<!-- end of {x} -->\nb" for x in scale_page.PARTS)
    (tmp_path / "SCALE.md").write_text(marks)
    monkeypatch.chdir(ROOT)
    scale.main(["--write=true", f"--results={tmp_path}", f"--docs={tmp_path}"])
    results, files = json.loads((tmp_path / "scale.json").read_text("utf-8")), tmp_path.rglob("*.*")
    written = {x: x.read_bytes() for x in files}
    assert len(written) == 1 + 1 + 4
    page, printed = (tmp_path / "SCALE.md").read_text("utf-8"), capsys.readouterr().out
    for name in scale_page.PARTS:
        table = scale_page.table(name, results[name])
        assert table in printed
        assert f"a\n<!-- {name} -->\n{table}\n<!-- end of {name} -->\nb" in page
    scale_page.write(results, tmp_path)  # into tables that are there: the same bytes
    assert {x: x.read_bytes() for x in written} == written
