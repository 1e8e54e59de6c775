"""What one learns from: the tour, the stored network, the exercises; and figures of the pages."""

import code
import contextlib
import io
import re
import runpy
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch

import bench
from exercises import network
from support.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent

NOTEBOOK = runpy.run_path(str(ROOT / "docs/notebook.py"))


TOUR = ROOT / "docs/TOUR.md"
BLOCK = NOTEBOOK["BLOCK"]


def run_tour() -> list[tuple[str, str]]:
    """What every block of the tour shows, and what it prints where it is pasted line by line into
    `python`, which also prints the value of an expression."""
    console, shown = code.InteractiveConsole({}), []
    for block, told in BLOCK.findall(TOUR.read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for line in [*block.splitlines(), ""]:
                more = console.push(line)
            assert not more, block
        shown.append((told, printed.getvalue()))
    return shown


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    yield
    torch.set_grad_enabled(True)


def test_the_tour_prints_what_it_shows(at_root):
    """Words and whole numbers as they stand; others but for the last digit: machines round."""
    number = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    shown = run_tour()
    assert len(shown) == 15
    for told, printed in shown:
        assert number.sub("x", told) == number.sub("x", printed)
        for a, b in zip(number.findall(told), number.findall(printed), strict=True):
            digit = 10.0 ** Decimal(a).as_tuple().exponent  # what the last digit shown counts
            assert abs(float(a) - float(b)) < 1.1 * digit, printed


def test_the_stored_network_opens_and_has_its_loss():
    about = (ROOT / "weights/small/README.md").read_text(encoding="utf-8")
    told = float(re.search(r"(\d\.\d{4}) bits per byte on text.txt", about)[1])
    with torch.no_grad():
        model, _, windows = network.trained()
        loss = network.bits_per_byte([model(x) for x, _ in windows])
    assert loss == pytest.approx(told, abs=1e-3)
    saved = load_checkpoint(ROOT / "weights/small")
    assert (ROOT / "weights/small/best.pt").stat().st_size < 10.1e6
    assert saved["model"]["norm.weight"].dtype == torch.bfloat16
    assert saved["model"]["layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert model.trained_length == 1024 and model.config.rope_scaling["factor"] == 4


def test_sampling_from_the_stored_network():
    """README's first command, with nothing prepared."""
    command = [sys.executable, "sample.py", "weights/small", "--prompt=def main("]
    run = subprocess.run([*command, "--max_new_tokens=8"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("def main(")


# ---- In the trained network ----------------------------------------------------------------------


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


# ---- Pictures of runs ----------------------------------------------------------------------------


# ---- A card that is not there --------------------------------------------------------------------
