"""Is it still DeepSeek-V3? By plain loops of the report's equations (reference.py), the sizes of
the releases, the stored weights and the tour; test_huggingface.py asks transformers, and
test_exercises.py the exercises.

The first test answers the question. Where the answer is no, as after an edit, all that holds for V3
alone is skipped, in every file (`v3` in conftest.py). Is the network right, whatever it is?
test_network.py.
"""

import code
import contextlib
import functools
import io
import math
import re
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from networks import (
    ATOL,
    NO_LONGER_V3,
    ROOT,
    SIZES,
    VARIANTS,
    biases,
    close,
    departure,
    in_bf16,
    referenced,
    tiny,
)
from torch import nn

import bench
from model import Cache, DeepSeekV3, Dispatch, ModelConfig, RMSNorm, balance_loss


@pytest.fixture(autouse=True)
def first(request):
    """All but the first test hold for V3 alone."""
    if request.function is not test_the_network_is_deepseek_v3:
        request.getfixturevalue("v3")


def test_the_network_is_deepseek_v3():
    if what := departure():
        pytest.fail(f"{NO_LONGER_V3} ({what})", pytrace=False)


# ---- The whole network ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_mtp_logits_equal_the_reference(variant):
    """Of short texts too: no output sees later tokens, and modules without any are left out."""
    model, tokens, logits, mtp = referenced(variant)
    for n in (9, 2, 1):
        with torch.no_grad():
            ours, ours_mtp = model(tokens[:, :n], return_mtp=True)
        assert {x.dtype for x in (ours, *ours_mtp)} == {torch.float64}
        close(ours, logits[:, :n])
        close(ours_mtp, [x[:, : n - k] for k, x in enumerate(mtp, 1) if n > k])
    close(model(tokens).detach(), logits)  # with gradients


# ---- Positions -------------------------------------------------------------------------


@torch.no_grad()
def test_positions_survive_bf16():
    """bf16 has 8 bits, so positions above 256 would collapse, were the angles computed in it."""
    model = tiny(qk_nope_head_dim=1)
    h, mla = torch.randn(1, 60, 16).bfloat16(), model.layers[0].self_attn
    positions = torch.arange(600, 660)
    expected = mla(h.double(), model.rope(h.double(), positions))
    model.bfloat16()
    assert (mla(h, model.rope(h, positions)).double() - expected).norm() < 0.03 * expected.norm()
    cache = Cache(model.config, model.layers, 1, 660, h)
    for ours, kept in zip(model.rope(h, positions), model.rope(h, positions, cache), strict=True):
        close(kept, ours, atol=1e-6)


# ---- Router --------------------------------------------------------------------------------------


@torch.no_grad()
def test_gate_computes_in_float32_under_autocast_and_in_a_bf16_model():
    gate, x = tiny(torch.float32).gates()[0], torch.randn(2, 5, 16)
    close(in_bf16(gate, x), gate(x), atol=0)
    gate.bfloat16()
    s, _, weight = gate(x.bfloat16())
    assert s.dtype == weight.dtype == torch.float32
    exact = F.linear(x.bfloat16().double(), gate.weight.double()).sigmoid()
    close(s.double(), exact, atol=1e-6)  # float32; bf16 would be off by 1e-3


# ---- Losses --------------------------------------------------------------------------------------


def test_scores_that_underflow_have_finite_losses_and_gradients():
    """All of a token's scores may be 0 in float32, and two formulas divide by their sum."""
    gate = tiny(torch.float32).gates()[0]
    nn.init.constant_(gate.weight, -20.0)
    s, _, gain = gate(torch.ones(1, 3, 16))  # sigmoid(-320)
    loss = gain.sum() + balance_loss(s, 3)
    loss.backward()
    assert not s.any() and loss.isfinite() and gate.weight.grad.isfinite().all()


# ---- Norm, dtypes --------------------------------------------------------------------------------


def test_rms_norm_computes_in_float32_and_rounds_before_its_weight():
    norm, x = RMSNorm(64, 1e-3), torch.randn(4, 64).bfloat16()
    nn.init.normal_(norm.weight)
    norm.bfloat16()
    y = x.double()
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight * y)
    assert in_bf16(RMSNorm(64, 1e-3), torch.randn(4, 64)).dtype == torch.bfloat16


# ---- Initialisation, sizes -----------------------------------------------------------------------


def test_what_the_report_initialises_is_initialised():
    """Linear layers, embedding, gates and experts have the stated deviation, biases are 0, norms 1.
    The mean square of n normals is within 5 sigma = 5 sqrt(2 / n) of its expectation."""
    sizes = dict(hidden_size=64, kv_lora_rank=32, q_lora_rank=48)
    model = DeepSeekV3(ModelConfig(**SIZES | sizes, attention_bias=True, initializer_range=0.5))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            spread = p.double().square().mean() / 0.5**2
            assert abs(spread - 1) < 5 * math.sqrt(2 / p.numel()), name
    assert not biases(model).any()


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, ATOL), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_experts_equal_a_loop(dtype, tolerance):
    """Value and gradients, also where an expert has no token; of few tokens without gradients. In
    bfloat16 with rows of padding."""
    experts = tiny(dtype).layers[1].mlp.experts
    x = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    gain = torch.rand(40, 3, dtype=dtype, requires_grad=True)
    chosen = torch.rand(40, 7).topk(3).indices  # none goes to the last expert
    y = torch.zeros_like(x)
    for e, (W_in, W_out) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        gate, up = (x @ W_in.T).chunk(2, -1)
        y = y + (gain * (chosen == e)).sum(-1, keepdim=True) * (F.silu(gate) * up @ W_out.T)
    leaves, direction = [x, gain, *experts.parameters()], torch.randn(40, 16, dtype=dtype)
    ours = experts(x, chosen, gain)
    close(ours, y, atol=tolerance * y.abs().max().item())
    for a, b in zip(
        torch.autograd.grad(ours, leaves, direction),
        torch.autograd.grad(y, leaves, direction),
        strict=True,
    ):
        close(a, b, atol=tolerance * b.abs().max().item())
    with torch.inference_mode():
        for n in (1, 4, 40):
            few = experts(x[:n], chosen[:n], gain[:n])
            close(few, y[:n], atol=tolerance * y.abs().max().item())


def test_a_sum_over_experts_is_rounded_once_in_bf16():
    """Forward and backward: one rounding errs by 2^-8 at most, five in a row soon by more. (The
    products of these experts are copies, which round nothing.)"""
    experts = tiny(torch.bfloat16).layers[1].mlp.experts
    experts.product = lambda x, weight, counts: x if weight is experts.down_proj else x.tile(2)
    x = torch.randn(40, 16, dtype=torch.bfloat16, requires_grad=True)
    chosen, gain = torch.rand(40, 8).topk(6).indices, torch.rand(40, 6, dtype=torch.bfloat16)
    rows = ((F.silu(x) * x)[:, None] * gain[..., None]).detach()  # (40, 6, 16)
    order = torch.randperm(240)
    token, place = order // 6, order.argsort().view(40, 6)
    copies, dy = Dispatch.apply(x, token, place), rows.flatten(0, 1)
    for ours, exact in (
        (experts(x, chosen, gain), rows.double().sum(1)),
        (torch.autograd.grad(copies, x, dy)[0], dy.double()[place].sum(1)),
    ):
        assert ((ours.double() - exact).abs() <= 1.0001 * 2**-8 * exact.abs()).all()


size_row = functools.cache(bench.size_row)  # which takes seconds


@pytest.mark.parametrize(
    "name, total, active, mtp, cache_bytes, fp8_gb",
    [  # V3's files have 688.59 GB, 3.71 of which repeat embedding and head in the MTP layer
        ("v3_671b", 671_026_419_200, 37_552_297_472, 11_610_068_224, 70_272, 684.88),
        ("moonlight_16b", 15_960_110_208, 2_914_776_192, 0, 31_104, 16.638),
        ("kimi_k2", 1_026_408_232_448, 32_861_500_928, 0, 70_272, 1029.17),
    ],
)
def test_sizes_are_those_of_the_releases(name, total, active, mtp, cache_bytes, fp8_gb):
    row = size_row(ROOT / f"config/{name}.py")
    assert [row[key] for key in ("parameters", "active", "MTP adds")] == [total, active, mtp]
    assert row["bf16 bytes"] == cache_bytes and row["FP8 GB"] == pytest.approx(fp8_gb, rel=1e-4)
    assert row["bf16 GB"] == pytest.approx(2e-9 * (total + mtp))
    assert name != "v3_671b" or row["MHA bytes"] == 2 * 61 * 128 * (128 + 128)


def test_sizes_finds_our_configs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "size_row", lambda file: {"": file.stem})
    (table,) = bench.sizes(bench.Options(), [])
    assert {"": "v3_671b"} in table.rows


def test_flops_are_six_per_weight_that_multiplies_and_half_of_attention():
    """By hand for V3: no embedding, norm or correction bias, 8 of MTP's 256 experts and a second
    head, which read a token less than the layers."""
    row = size_row(ROOT / "config/v3_671b.py")
    D, V, T = 7168, 129_280, row["window"]
    norms = 2 * D + 1536 + 512
    main = 37_552_297_472 - V * D - 58 * 256 - 61 * norms - D
    mtp = 11_610_068_224 - 256 - 248 * 3 * D * 2048 + V * D - norms - 3 * D
    pairs = (61 * T**2 + (T - 1) ** 2) / 2
    flops = 6 * (main * T + mtp * (T - 1) + 128 * (128 + 64 + 128) * pairs)
    assert row["GFLOP/trained token"] == pytest.approx(1e-9 * flops / T, rel=1e-9)


# ---- The stored network, the tour ----------------------------------------------------------------

TOUR = ROOT / "docs/TOUR.md"
BLOCK = re.compile(r"(?s)```python\n(.*?)```\n\n```\n(.*?)```")  # code and what it prints


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
    assert shown
    for told, printed in shown:
        assert number.sub("x", told) == number.sub("x", printed)
        for a, b in zip(number.findall(told), number.findall(printed), strict=True):
            digit = 10.0 ** Decimal(a).as_tuple().exponent  # what the last digit shown counts
            assert abs(float(a) - float(b)) < 1.1 * digit, printed
