"""The measurements measure what they say; how fast anything is, no test asks."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

import bench
import fp8
from bench import Spread

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name, total, mtp, cache_bytes",
    [
        ("v3_671b", 671_026_419_200, 11_610_068_224, 70_272),
        ("moonlight_16b", 15_960_110_208, 0, 31_104),
        ("kimi_k2", 1_026_408_232_448, 0, 70_272),
    ],
)
def test_sizes_are_those_of_the_releases(name, total, mtp, cache_bytes):
    row = bench.size_row(ROOT / f"config/{name}.py")
    assert (row["parameters"], row["MTP adds"], row["bf16 bytes"]) == (total, mtp, cache_bytes)
    parts = total + mtp
    assert parts / 1e9 < row["FP8 GB"] < 1.06 * parts / 1e9
    assert row["bf16 GB"] == pytest.approx(2 * parts / 1e9, rel=1e-4)


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
    calls, clock = [], 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)

    def work(name, *seconds):
        steps = iter(seconds)

        def run():
            nonlocal clock
            calls.append(name)
            clock += next(steps)

        return run

    # The machine is half as fast in the second round, for both: the ratio does not notice.
    functions = {"a": work("a", 64.0, 2.0, 4.0, 2.0), "b": work("b", 64.0, 1.0, 2.0, 0.5)}
    seconds = bench.interleaved(functions, 3)
    assert calls == ["a", "b"] * 4
    assert seconds == {"a": [2.0, 4.0, 2.0], "b": [1.0, 2.0, 0.5]}
    assert bench.ratio(seconds["a"], seconds["b"]) == Spread(2.0, 2.0, 4.0)
    assert bench.cell(Spread(2.0, 2.0, 4.0)) == "2 [2..4]"


def test_theorem():
    # (1 - 0.8^3) / ((1 - 0.8) (2 * 0.1 + 1)) = 0.488 / 0.24
    assert bench.theorem([0.8, 0.64], 0.1) == pytest.approx(0.488 / 0.24)
    assert bench.theorem([0.5], 0.25, verify=1.25) == pytest.approx(1.0)
    assert bench.theorem([], 0.3) == 1.0  # no drafts, no gain


def test_fp8_table_runs_in_emulation():
    table = bench.fp8_table([(128, 130)], [32], "cpu", 1, False)
    (row,) = table.rows
    assert "EMULATION" in str(table) and row["in -> out"] == "128 -> 130"
    assert all(row[key] > 0 for key in ("bf16 TFLOP/s", "FP8 TFLOP/s", "quantiser GB/s"))


@pytest.mark.parametrize("block", [fp8.TILE, fp8.BLOCK])
@pytest.mark.parametrize("shape", [(100, 200), (2, 100, 200)])
def test_contrast_has_one_scale_and_loses_small_tokens(block, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., :10, :] *= 1e-6
    q, tiles = fp8.quantize(x, block, pow2=True)
    with bench.one_scale_per_tensor():
        q_one, one = fp8.quantize(x, block, pow2=True)
        assert fp8.quantize(x[..., :0, :], block)[0].numel() == 0
    assert one.shape == tiles.shape and one.unique().numel() == 1 and one.max() == tiles.max()
    small = fp8.dequantize(q_one, one, block)[..., :10, :]
    assert not small.any()  # below the smallest number of E4M3 times the scale
    assert torch.equal(fp8.quantize(x, block, pow2=True)[0].float(), q.float())  # patch undone


def test_interval_and_smoothing():
    mean, half = bench.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert bench.interval([1.0]) == (1.0, None)
    assert bench.smooth([1.0, 2.0]) == [1.0, pytest.approx(1.1)]


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is missing")
def test_plot_writes_pictures(tmp_path, capsys):
    log = [{"step": s, "loss": 5.0 - s, "mtp_loss": 6.0 - s, "max_vio": 0.5} for s in range(3)]
    log.append({"step": 2, "val_loss": 3.0, "expert_load": [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    bench.main(["plot", str(tmp_path)])
    for name in ("loss.png", "expert_load.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert name in capsys.readouterr().out or name == "expert_load.png"


def test_plot_needs_a_run(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is missing")
    with pytest.raises(FileNotFoundError, match="no log"):
        bench.main(["plot", str(tmp_path)])
