"""The measurements measure what they say; how fast anything is, no test asks."""

import json
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import bench
import huggingface
import train
from support import counting, processes
from support.plot import smooth
from support.settings import Refusal

ROOT = Path(__file__).parent.parent
SMALLER = dict(num_hidden_layers=2, vocab_size=512, max_position_embeddings=128)


@pytest.mark.parametrize(
    "name, total, active, mtp, cache_bytes, fp8_gb",
    [  # V3's files have 688.59 GB, 3.71 of which repeat embedding and head in the MTP layer
        ("v3_671b", 671_026_419_200, 37_552_297_472, 11_610_068_224, 70_272, 684.88),
        ("moonlight_16b", 15_960_110_208, 2_914_776_192, 0, 31_104, 16.638),
        ("kimi_k2", 1_026_408_232_448, 32_861_500_928, 0, 70_272, 1029.17),
    ],
)
def test_sizes_are_those_of_the_releases(name, total, active, mtp, cache_bytes, fp8_gb):
    row = bench.size_row(ROOT / f"config/{name}.py")
    assert [row[key] for key in ("parameters", "active", "MTP adds")] == [total, active, mtp]
    assert row["bf16 bytes"] == cache_bytes and row["FP8 GB"] == pytest.approx(fp8_gb, rel=1e-4)
    assert row["bf16 GB"] == pytest.approx(2e-9 * (total + mtp))
    assert name != "v3_671b" or row["MHA bytes"] == 2 * 61 * 128 * (128 + 128)


def test_flops_are_six_per_weight_that_multiplies_and_half_of_attention():
    """By hand for V3: no embedding or correction bias, 8 of MTP's 256 experts and a second head."""
    D, V, T = 7168, 129_280, 4096
    main = 37_552_297_472 - V * D - 58 * 256
    mtp = 11_610_068_224 - 256 - 248 * 3 * D * 2048 + V * D
    attention = 62 * 128 * (128 + 64 + 128) * T / 2
    model, _ = bench.open_config(ROOT / "config/v3_671b.py")
    assert bench.flops_per_token(model, T) == 6 * (main + mtp + attention)


def test_command_prints_and_writes_the_same_table(capsys, tmp_path):
    bench.main(["sizes", str(ROOT / "config/tiny.py"), f"--json={tmp_path}/x.json"])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert {"cpu", "torch", "threads", "command", "options"} <= written.keys()
    (row,) = written["tables"][0]["rows"]
    assert row["parameters"] == 144_472 and "144,472" in printed and torch.__version__ in printed


def test_interleaved_takes_turns_after_a_warm_up(monkeypatch):
    # The machine is half as fast in the second round, for both: the ratio does not notice.
    took, calls, clock = {"a": [64.0, 2.0, 4.0, 2.0], "b": [64.0, 1.0, 2.0, 0.5]}, [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name):
        clock[0] += took[name][calls.count(name)]
        calls.append(name)

    seconds = bench.interleaved({name: partial(work, name) for name in took}, 3)
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": [2.0, 4.0, 2.0], "b": [1.0, 2.0, 0.5]}
    assert bench.ratio(seconds["a"], seconds["b"]) == [2.0, 2.0, 4.0]
    assert bench.cell([2.0, 2.0, 4.0]) == "2 [2..4]"


def test_ratios_are_to_the_fastest_of_transformers():
    seconds = {"transformers a": [4.0, 8.0], "transformers b": [2.0, 6.0], "ours": [1.0, 2.0]}
    row = bench.speed_table("", seconds, 30).rows[-1]
    assert row["tokens/s"] == 20 and row["x transformers b"] == [2.0, 3.0]


@pytest.mark.parametrize("ours", [True, False])
def test_training_step_trains_the_whole_model(ours, tmp_path):
    model = bench.DeepSeekV3(bench.ModelConfig(**bench.REFERENCE | SMALLER))
    config = train.TrainConfig(batch_size=2, block_size=8, device="cpu", dtype="float32")
    if not ours:
        huggingface.save_pretrained(model, tmp_path / "hf")
        model = bench.models_in(tmp_path / "hf", "cpu")["transformers eager"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    bench.training_step(model, config, processes.start(config))()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    biases = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    assert biases and all(b.any() == ours for b in biases)  # transformers does not balance


def test_decoding_is_compared_on_one_text_and_at_every_context():
    options = bench.DecodeOptions(rounds=1, new_tokens=4, compile=False, contexts="8")
    with mock.patch.dict(bench.REFERENCE, SMALLER):
        plain, contexts = bench.decode(options, [])
    same = {row[""]: row["same text"] for row in plain.rows}
    assert same["transformers grouped_mm"] and same["transformers eager"] and "ours bf16" in same
    assert contexts.rows[0]["cache MB"] == 9 * 80 * 4 * 2 / 1e6


def test_fp8_table_says_that_it_emulates(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [(128, 130)])
    (table,) = bench.fp8_(bench.FP8Options(rounds=1, device="cpu"), [])
    assert "EMULATION" in table.title and table.rows[0]["in -> out"] == "128 -> 130"
    assert all(table.rows[0][key] > 0 for key in ("bf16 TFLOP/s", "FP8 TFLOP/s", "FP8 layer ms"))


@pytest.mark.parametrize("argv", [["decode"], ["train"]])
def test_missing_transformers_is_said_before_anything_is_measured(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    monkeypatch.setattr(bench, "interleaved", mock.Mock(side_effect=AssertionError("measured")))
    with pytest.raises(Refusal, match=r"transformers is not installed.*: pip install transf"):
        bench.main(argv)


# ---- Pictures of runs ----------------------------------------------------------------------------


def test_smooth_follows_a_curve_without_lag():
    """240 lines, as config/small.py's log has, so 6 neighbours on either side."""
    x = np.arange(10.0, 2401, 10)
    straight, steep = 5 - x / 1000, 2 + 6 * (1 + x / 25) ** -0.6
    assert smooth(x, straight) == pytest.approx(straight, abs=1e-9)  # both ends, too
    assert smooth(x, steep) == pytest.approx(steep, abs=0.03)
    before, after = smooth(x, x > 1000)[99:101]  # a jump stays where it is
    assert before == pytest.approx(6 / 13) and after == pytest.approx(7 / 13)
    noise = np.resize([0.1, -0.1], 240)
    assert abs(smooth(x, straight + noise) - straight)[30:].max() < 0.03
    assert smooth(x[:1], x[:1]) == [10.0] and not len(smooth(x[:0], x[:0]))


def evaluation(step: int, loss: float | None, bits: float = 0.4, **more) -> dict:
    load = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]
    known = {"step": step, "val_loss": loss, "val_bpb": loss and bits * loss}
    return known | {"val_mtp_losses": [4.0], "expert_load": load} | more


@pytest.fixture
def plot(tmp_path, monkeypatch):
    """Plots logs of 40 training lines and these evaluations into x.svg; returns the picture's
    texts, all that `Axes.plot` drew, and the axis on the right."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    monkeypatch.chdir(tmp_path)

    def plot(*options: str, mtp_loss: float = 6.5, **evaluations: list[dict]):
        for run, lines in evaluations.items():
            log = [{"step": s, "loss": 6.0 - s / 20, "mtp_loss": mtp_loss} for s in range(40)]
            Path(run).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in log + lines)
            Path(run, "log.jsonl").write_text(text + '{"step": 40, "lo', encoding="utf-8")
        watched = partial(mock.patch.object, axes, autospec=True)
        with (
            watched("plot", side_effect=axes.plot) as drawn,
            watched("secondary_yaxis", side_effect=axes.secondary_yaxis) as right,
        ):
            bench.main(["plot", *evaluations, "--out=x.svg", *options])
        texts = {x.text for x in ElementTree.parse("x.svg").iter() if x.tag.endswith("}text")}
        return texts, drawn.call_args_list, right.call_args

    return plot


def test_plot_draws_any_keys_of_the_log(plot):
    lines = [{"step": 40, "loss": 4.0, "mine": 2.0}, {"step": 41, "loss": 4.0, "mine": 3.0}]
    texts, drawn, _ = plot("--keys=mine,loss", a=lines, b=[])
    assert texts >= {"mine", "loss"}
    curves = [[list(x) for x in call.args[1:3]] for call in drawn[-4:]]  # two keys of two runs
    assert curves[:2] == [[[40, 41], [2, 3]], [[], []]] and len(curves[3][0]) == 40
    with pytest.raises(Refusal, match="no log of a, b has the key 'yours'"):
        plot("--keys=yours", a=lines, b=[])


def test_plot_leaves_out_the_loss_of_modules_that_are_not_there(plot):
    """Their 0 would squeeze the curve of the loss."""
    assert len(plot(a=[])[1]) == 5  # both losses twice, and the validation
    assert len(plot(a=[], mtp_loss=0.0)[1]) == 3


def test_plot_shows_validation_as_points_and_bits_per_byte(plot, capsys):
    lines = [evaluation(10, 5.0), evaluation(20, 4.0)]
    lines += [evaluation(30, None), evaluation(39, 3.25)]  # one was not finite
    texts, drawn, right = plot(a=lines)
    assert capsys.readouterr().out == "x.svg\n"
    assert "a: val_loss at step 39 is 3.250 nats per token, 1.300 bits per byte" in texts
    assert "a: load of the experts on the validation text at step 39" in texts
    assert texts >= {"nats per token", "bits per byte of text", "MoE layers,", "then MTP"}
    steps, losses, points_and_line = drawn[-1].args[1:4]
    assert (list(steps), list(losses)) == ([10, 20, 39], [5, 4, 3.25]) and points_and_line == "o-"
    to_bits, to_nats = right.kwargs["functions"]
    assert to_bits(5.0) == pytest.approx(2.0) and to_nats(2.0) == pytest.approx(5.0)
    picture = Path("x.svg").read_bytes()
    plot(a=lines)
    assert Path("x.svg").read_bytes() == picture


def test_plot_of_several_runs_leaves_the_picture_of_one(plot):
    plot(**{"out/a": [], "out/b": []})
    bench.main(["plot", "out/a"])
    own = Path("out/a/plot.png").read_bytes()
    bench.main(["plot", "out/a", "out/b/"])
    assert Path("out/a/plot.png").read_bytes() == own != Path("out/a-b.png").read_bytes()


# ---- A card that is not there --------------------------------------------------------------------


def test_kernels_bytes_and_memory_are_counted():
    with counting.on_a_card() as count, count:
        x, w = torch.empty(4, 8), torch.empty(8, 2, requires_grad=True)
        y = (x @ w).t().relu() + x[0, :1].expand(2, 4)  # the row that is expanded is read once
        del y
        w.detach().sum().item()
    assert count.kernels == {"mm": 1, "relu": 1, "add": 1, "sum": 1}
    assert count.bytes == {"mm": 4 * 56, "relu": 4 * 16, "add": 4 * 17, "sum": 4 * 17}
    assert count.waits == {"item": 1}
    assert count.peak == 4 * (32 + 16 + 2 * 8)  # x, w, and two results of 8 numbers at once


@pytest.mark.parametrize("use_fp8, kernels, megabytes", [(False, 698, 54.6), (True, 1701, 135)])
def test_a_step_on_a_gpu_needs_no_more_than_it_did(use_fp8, kernels, megabytes):
    """If a change needs more: see with `bench.py count --largest=20` what it is."""
    count, _ = bench.counted(ROOT / "config/tiny.py", use_fp8)
    assert count.kernels.total() <= 1.01 * kernels
    assert count.bytes.total() <= 1.01e6 * megabytes
    assert count.peak > 16 * 144_472  # weights, gradients, AdamW's two moments
    # Three products: of 4 blocks' 5 projections, 4 dense or shared MLPs, 7 experts that have rows.
    assert count.kernels["_scaled_mm_v2"] == use_fp8 * 3 * (4 * 5 + 4 * 3 + 3 * 7 * 2)
    assert count.waits.total() == use_fp8 * 3  # for each MoE layer's rows


def test_a_compiled_graph_counts_as_inductors_kernels():
    with counting.on_a_card() as count, count:
        x = torch.empty(4, 8, requires_grad=True)
        w = torch.empty(8, 2, requires_grad=True)
        f = torch.compile(
            lambda x, w: (x @ w).sin().exp() * 3, backend=counting.as_compiled(count), dynamic=False
        )
        y = f(x, w)
        forward, moved = count.kernels.copy(), count.bytes.copy()
        y.sum().backward()
    assert forward == {"mm": 1, "fused": 1}  # sin, exp and times are one
    assert moved == {"mm": 4 * (32 + 16 + 8), "fused": 4 * (8 + 8)}
    # Backward two products; one kernel makes the gradient of x @ w, and reads that of y as a number
    assert count.kernels["mm"] == 3 and count.kernels["fused"] == 2


def test_compiled_blocks_are_counted(tmp_path):
    text = (ROOT / "config/tiny.py").read_text()  # one block, with experts
    smaller = "num_hidden_layers = 1; num_nextn_predict_layers = first_k_dense_replace = 0\n"
    smaller += "q_lora_rank = None; n_shared_experts = 0"
    file = tmp_path / "one.py"
    file.write_text(f"{text}\n{smaller}\n")
    eager, compiled = (bench.counted(file, True, compile=c)[0] for c in (False, True))
    products = [sum(c.kernels[p] for p in counting.PRODUCTS) for c in (eager, compiled)]
    assert products[0] + 2 * 3 == products[1]  # eager, an expert has no rows, so no products
    assert compiled.kernels.total() <= 1.05 * 330 < eager.kernels.total()
    assert compiled.bytes.total() <= 1.05e6 * 25.7 < eager.bytes.total()
    assert compiled.kernels["normed"] == 1  # the last, which is in no block


def test_count_prints_shares_of_the_peak(capsys):
    bench.main(["count", str(ROOT / "config/tiny.py"), "--largest=2"])
    shown = capsys.readouterr().out
    assert "COUNTED, not measured" in shown and "tiny bf16" in shown and "of bf16's peak" in shown
