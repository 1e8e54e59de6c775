"""The measurements measure what they say; how fast anything is, no test asks."""

import json
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import bench
import train

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


@pytest.mark.parametrize("argv", [["trian"], ["decode", "x"], ["sizes", "--nonsense=1"], []])
def test_wrong_usage_is_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


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
        model.save_pretrained(tmp_path / "hf")
        model = bench.models_in(tmp_path / "hf", "cpu")["transformers eager"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    bench.training_step(model, config, train.start_machine(config))()
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
    (table,) = bench.fp8_(bench.Options(rounds=1, device="cpu"), [])
    assert "EMULATION" in table.title and table.rows[0]["in -> out"] == "128 -> 130"
    assert all(table.rows[0][key] > 0 for key in ("bf16 TFLOP/s", "FP8 TFLOP/s", "FP8 layer ms"))


def test_plot_compares_runs_in_one_picture(tmp_path, capsys, monkeypatch):
    Axes = pytest.importorskip("matplotlib.axes").Axes
    log = [{"step": s, "loss": 6.0 - s % 2, "mtp_loss": 6.5, "max_vio": 0.5} for s in range(40)]
    log.append({"step": 39, "val_loss": 3.25, "expert_load": [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]})
    log.append({"step": 39, "val_loss": None})  # it was not finite
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        Path(run).mkdir()
        Path(run, "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log) + '{"st')
    with mock.patch.object(Axes, "plot", autospec=True, side_effect=Axes.plot) as plot:
        bench.main(["plot", "a", "b", "both.svg"])
    assert "both.svg" in capsys.readouterr().out
    picture = Path("both.svg").read_text(encoding="utf-8")
    assert all(f">{text}<" in picture for text in ("b val_loss", "3.250", "a mtp_loss"))
    drawn = {call.kwargs.get("label"): call.args[2] for call in plot.call_args_list}
    assert drawn["b loss"][:4] == pytest.approx([6, 5.5, 17 / 3, 16 / 3])  # three lines of 40
    with mock.patch("matplotlib.figure.Figure.savefig") as savefig:
        bench.main(["plot", "b", "a"])
    assert savefig.call_args.args == (Path("b/plot.png"),)
    with pytest.raises(ValueError, match="name folders of runs"):
        bench.main(["plot"])
