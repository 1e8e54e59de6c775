"""fp8.py against numpy and float64: the quantiser code by code, the three products of a linear
layer against the same arithmetic in float64 (tight) and against no quantisation (what FP8
costs), the operands handed to the tensor cores, and the life of a quantised weight."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fp8
from fp8 import BLOCK, TILE, FP8Linear, dequantize, grouped_linear, quantize, quantized_once

SHAPES = [(256, 512, 384), (200, 640, 576), (130, 100, 60), (1, 128, 128)]  # T, K, N
UPDATES_IN_PLACE = {
    "no_grad": lambda m: m.weight.detach().mul_(-1),
    "inference_mode": lambda m: torch.inference_mode()(m.weight.mul_)(-1),
    "load": lambda m: m.load_state_dict({"weight": -m.weight.detach()}),
    "load_assign": lambda m: m.load_state_dict({"weight": -m.weight.detach()}, assign=True),
    "data=": lambda m: setattr(m.weight, "data", -m.weight.data),
    "bf16": lambda m: m.bfloat16(),
}
UNTRACED = {  # these leave neither the version counter nor the address changed
    "data.mul_": lambda m: m.weight.data.mul_(-1),
    "data.copy_": lambda m: m.weight.data.copy_(-m.weight.data),
    "numpy": lambda m: np.negative(w := m.weight.detach().numpy(), out=w),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1.0),
    "adamw_loop": lambda p: torch.optim.AdamW(p, lr=1.0, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1.0, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "muon": lambda p: torch.optim.Muon(p, lr=1.0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def error(got, want):
    """Relative Frobenius error."""
    got, want = got.detach().double(), torch.as_tensor(want).double()
    return ((got - want).norm() / want.norm()).item()


# ---- A reference that shares nothing with fp8.py ----------------------------------------------


def e4m3_value(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


POSITIVE = np.array([e4m3_value(code) for code in range(127)])  # 0 .. 448, in order


def e4m3_round(x):
    """Nearest code, ties to the even code, saturating."""
    size = np.minimum(np.abs(x), 448.0)
    high = np.clip(np.searchsorted(POSITIVE, size), 1, 126)
    down, up = size - POSITIVE[high - 1], POSITIVE[high] - size
    take_low = (down < up) | ((down == up) & (high % 2 == 1))  # an odd high: the low one is even
    return np.copysign(POSITIVE[np.where(take_low, high - 1, high)], x)


def reference(x, block, pow2=True):
    """(..., M, K) -> what the quantised matrix decodes to, float64, one tile after the other."""
    x = x.detach().float().numpy()
    out = np.empty(x.shape)
    for lead in np.ndindex(x.shape[:-2]):
        for i in range(0, x.shape[-2], block[0]):
            for j in range(0, x.shape[-1], block[1]):
                at = (*lead, slice(i, i + block[0]), slice(j, j + block[1]))
                scale = np.abs(x[at]).max() / np.float32(448) or np.float32(1)
                if pow2:
                    mantissa, exponent = np.frexp(scale)
                    scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
                out[at] = e4m3_round(x[at] / scale) * np.float64(scale)
    return torch.from_numpy(out)


def reference_products(x, w, dy):
    """y, dx, dW in float64 from the operands that the report quantises."""
    y = reference(x, TILE) @ reference(w, BLOCK).T
    dx = reference(dy, TILE) @ reference(w, BLOCK)
    dw = reference(dy.T, TILE) @ reference(reference(x, TILE).T, TILE).T
    return y, dx, dw


# ---- Quantiser --------------------------------------------------------------------------------


def test_e4m3_decodes_as_defined():
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).float()
    torch.testing.assert_close(
        codes, torch.tensor([e4m3_value(c) for c in range(256)]), rtol=0, atol=0, equal_nan=True
    )


def test_rounds_to_nearest_even_and_saturates():
    middle = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    x = np.concatenate([POSITIVE, middle, middle * (1 + 1e-6), middle * (1 - 1e-6)])
    x = torch.from_numpy(np.concatenate([x, -x])).float()
    tiles = F.pad(x, (0, -len(x) % 127)).view(-1, 127)
    tiles = F.pad(tiles, (0, 1), value=448.0)  # so that every scale is 1
    q, s = quantize(tiles, TILE)
    assert (s == 1).all()
    assert torch.equal(q.double(), torch.from_numpy(e4m3_round(tiles.numpy())))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("block", [TILE, BLOCK])
@pytest.mark.parametrize("shape", [(256, 256), (130, 100), (2, 3, 129, 257), (1, 1), (0, 64)])
def test_quantize_equals_reference(shape, block, pow2):
    x = torch.randn(shape) * torch.randn(*shape[:-1], 1).exp()
    q, s = quantize(x, block, pow2)
    assert q.shape == x.shape and q.dtype == fp8.E4M3 and s.dtype == torch.float32
    assert s.shape == (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    decoded = dequantize(q, s, block)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), reference(x, block, pow2), rtol=2e-7, atol=0)
    if pow2:
        assert torch.equal(decoded, decoded.bfloat16().float())  # exact in bf16
        assert (torch.frexp(s).mantissa == 0.5).all()


@pytest.mark.parametrize("pow2", [False, True])
def test_magnitudes(pow2):
    for size in (1e-35, 1e-30, 1e-9, 1e-4, 1.0, 1e30, 1e38):  # no floor on amax hides in between
        x = torch.randn(8, 128).clamp(-3, 3) * size
        assert error(dequantize(*quantize(x, TILE, pow2), TILE), x) < 0.03, size
    q, s = quantize(torch.zeros(2, 256), TILE, pow2)
    assert (s == 1).all() and (q.float() == 0).all()
    subnormal = torch.full((1, 128), 1e-42)
    assert dequantize(*quantize(subnormal, TILE, pow2), TILE).isfinite().all()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(3, 128).to(dtype)
        assert torch.equal(quantize(x, TILE)[1], quantize(x.float(), TILE)[1])


def test_pow2_scale_is_the_smallest_that_fits():
    x = torch.zeros(3, 128)
    x[:, 0] = torch.tensor([448.0, 448.1, 224.0])
    assert quantize(x, TILE, pow2=True)[1].flatten().tolist() == [1, 2, 0.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block", [TILE, BLOCK])
@pytest.mark.parametrize("pow2", [False, True])
def test_non_finite_numbers_are_not_hidden(bad, block, pow2):
    x = torch.randn(256, 256)
    x[3, 5] = bad
    decoded = dequantize(*quantize(x, block, pow2), block)
    assert decoded[3, :128].isnan().all()  # the whole tile: its scale is lost
    assert decoded[:, 128:].isfinite().all() and decoded[128:].isfinite().all()


def test_non_finite_input_reaches_all_three_products():
    layer = FP8Linear(256, 256)
    x = torch.randn(200, 256, requires_grad=True)
    bad = x.detach().clone()
    bad[7, 9] = float("nan")
    bad.requires_grad_()
    y = layer(bad)
    assert y[7].isnan().all() and y[:7].isfinite().all() and y[8:].isfinite().all()
    y.nan_to_num().sum().backward()
    assert layer.weight.grad[:, 9].isnan().all()
    dy = torch.randn(200, 256)
    dy[11, 0] = float("inf")
    layer(x).backward(dy)
    assert x.grad[11].isnan().all() and x.grad[:11].isfinite().all()


def test_power_of_two_requantisation_is_exact():
    x = torch.randn(384, 256) * torch.randn(384, 1).exp()
    once = dequantize(*quantize(x, TILE, pow2=True), TILE)
    twice = dequantize(*quantize(once.t(), TILE, pow2=True), TILE).t()
    # Exact but for what falls below the 2^-9 of its new tile.
    assert (once - twice).abs().max() <= 2.0**-10 * 2 * once.abs().max() / 448
    big = once.abs() > once.abs().max() / 448 * 2.0**-5
    assert torch.equal(once[big], twice[big]) and big.float().mean() > 0.9
    rough = dequantize(*quantize(x, TILE), TILE)  # with fp32 scales it is a second rounding
    again = dequantize(*quantize(rough.t(), TILE), TILE).t()
    assert error(twice, once) < 1e-5 and error(again, rough) > 0.01


def test_errors_name_what_to_do():
    x = torch.randn(4, 128)
    for call, kind, words in [
        (lambda: quantize(x, (1, 64)), ValueError, r"\(1, 64\).*use"),
        (lambda: quantize(x.int(), TILE), TypeError, r"int32.*float\(\)"),
        (lambda: quantize(x[0], TILE), ValueError, r"\(128,\).*x\[None\]"),
        (lambda: dequantize(x.to(fp8.E4M3), torch.ones(4, 2), TILE), ValueError, r"needs \(4, 1\)"),
        (lambda: FP8Linear(64, 128)(x), ValueError, r"\(128, 64\).*ends in 64"),
        (lambda: fp8.swiglu_linear(x, x[:2], torch.ones(8, 128)), ValueError, "of one shape"),
        (lambda: grouped_linear(x, torch.ones(2, 8, 128), [1, 2]), ValueError, "sum to 3.*4 rows"),
        (lambda: grouped_linear(x, torch.ones(2, 8, 128), [4]), ValueError, "1 entries"),
    ]:
        with pytest.raises(kind, match=words):
            call()


# ---- What tiles buy ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "outlier_channels", "outlier_elements"])
def test_product_error_against_float64(kind):
    x, layer = torch.randn(256, 1024), FP8Linear(1024, 256)
    if kind == "outlier_channels":
        x[:, torch.randperm(1024)[:10]] *= 50
    elif kind == "outlier_elements":
        x.view(-1)[torch.randperm(x.numel())[:26]] *= 2000
    y = layer(x)
    # Two operands, each rounded with a relative error of 2.6 % rms: sqrt(2) times that is 3.7 %.
    assert 0.02 < error(y, x.double() @ layer.weight.detach().double().T) < 0.045


def test_only_tiles_survive_a_spread_of_token_magnitudes():
    """Gradients of tokens differ by orders of magnitude (report, appendix B.2)."""
    x = torch.randn(512, 512) * (4 * torch.randn(512, 1)).exp()
    w = torch.randn(512, 256) * 0.006
    exact = x.double() @ w.double()

    def bad_rows(decoded):
        deviation = (decoded.double() @ w.double() - exact).norm(dim=1) / exact.norm(dim=1)
        return (deviation > 0.1).float().mean().item()

    scale = x.abs().max() / 448
    assert bad_rows((x / scale).to(fp8.E4M3).float() * scale) > 0.5  # per tensor
    assert bad_rows(dequantize(*quantize(x, BLOCK), BLOCK)) > 0.4
    assert bad_rows(dequantize(*quantize(x, TILE), TILE)) == 0
    assert bad_rows(dequantize(*quantize(x, TILE, pow2=True), TILE)) == 0


# ---- The three products -----------------------------------------------------------------------


@pytest.mark.parametrize("T,K,N", SHAPES)
def test_products(T, K, N):
    layer, dy = FP8Linear(K, N), torch.randn(T, N) * torch.randn(T, 1).exp()
    x = torch.randn(T, K, requires_grad=True)
    w = layer.weight
    y = layer(x)
    y.backward(dy)
    got = (y, x.grad, w.grad)
    assert all(t.dtype == torch.float32 for t in got)
    for g, tight in zip(got, reference_products(x, w, dy), strict=True):
        assert error(g, tight) < 2e-6
    X, W, G = x.detach().double(), w.detach().double(), dy.double()
    for g, exact in zip(got, (X @ W.T, G @ W, G.T @ X), strict=True):
        assert error(g, exact) < (0.04 if T > 1 else 0.05)


def test_bf16_products_round_only_their_result():
    layer = FP8Linear(640, 576)
    x, dy = torch.randn(200, 640).bfloat16().requires_grad_(), torch.randn(200, 576).bfloat16()
    y = layer(x)
    y.backward(dy)
    want = reference_products(x, layer.weight, dy)
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    ulp = 2.0**-8  # half a unit of bf16's last place, plus a sum that cancels
    for g, tight in zip((y, x.grad), want, strict=False):
        assert ((g.double() - tight).abs() <= ulp * tight.abs() + 1e-5 * tight.abs().max()).all()
    assert error(layer.weight.grad, want[2]) < 2e-6


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype, enabled):
    layer = FP8Linear(128, 256, bias=True)
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = layer(x)
        y.float().square().sum().backward()  # backward within autocast must not lose bits either
    assert y.dtype == (torch.bfloat16 if enabled else dtype)
    assert x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    dy = (2 * y.detach().float()).to(y.dtype)
    assert error(layer.weight.grad, reference_products(x, layer.weight, dy)[2]) < 2e-6
    assert error(layer.bias.grad, dy.double().sum(0)) < 1e-2


def test_any_shape():
    layer = FP8Linear(100, 60)
    x = torch.randn(2, 3, 100)
    flat = layer(x.view(6, 100))
    assert torch.equal(layer(x), flat.view(2, 3, 60))
    assert torch.equal(layer(x[0, 0]), layer(x[0, :1])[0])
    wide = torch.randn(100, 7, requires_grad=True)
    y = layer(wide.t())  # not contiguous
    assert torch.equal(y, layer(wide.t().contiguous()))
    y.sum().backward()  # a gradient of stride 0
    assert error(wide.grad, layer.weight.detach().sum(0)[:, None].expand(100, 7)) < 0.05
    for shape in ((0, 100), (2, 0, 100)):
        layer.zero_grad()
        empty = torch.randn(shape, requires_grad=True)
        layer(empty).sum().backward()
        assert empty.grad.shape == shape and (layer.weight.grad == 0).all()


def test_gradients_only_where_asked():
    layer = FP8Linear(128, 128)
    layer(torch.randn(4, 128)).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and error(x.grad[0], layer.weight.sum(0)) < 0.06


# ---- Operands of the tensor cores -------------------------------------------------------------


class TensorCores(TorchDispatchMode):
    """Stands in for _scaled_mm_v2: checks what cuBLAS demands, reads the scales as it does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten._scaled_mm_v2.default:
            return func(*args, **(kwargs or {}))
        a, b, (sa,), (ra,), swizzle_a, (sb,), (rb,), swizzle_b, bias, dtype, *rest = args
        (M, K), N = a.shape, b.shape[1]
        assert a.dtype == b.dtype == fp8.E4M3 and dtype in (torch.bfloat16, torch.float32)
        assert M % 128 == N % 128 == K % 128 == 0
        assert a.stride() == (K, 1) and b.stride() == (1, K)
        assert (swizzle_a, swizzle_b, bias) == ([], [], None)
        assert rest in ([], [[]], [[], False])  # no fast accumulation; torch trims defaults
        L = K // 128
        assert ra == 4 and sa.shape == (M, L) and (L == 1 or sa.stride() == (1, M))
        if rb == 4:
            assert sb.shape == (N, L) and (L == 1 or sb.stride() == (1, N))
            per_row = sb
        else:
            L4 = -(-L // 4) * 4
            assert rb == 5 and sb.shape == (L4, N // 128) and sb.stride() == (1, L4)
            per_row = sb[:L].t().repeat_interleave(128, 0)
        y = 0
        for i in range(L):  # the order of the hardware: partial products, then scales
            at = slice(128 * i, 128 * i + 128)
            part = a[:, at].float() @ b[at].float()
            y = y + part * sa[:, i, None] * per_row[:, i]
        return y.to(dtype)


@pytest.mark.parametrize("T,K,N", [*SHAPES, (33, 896, 130), (0, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_mean_the_same_on_the_tensor_cores(T, K, N, dtype, monkeypatch):
    def run():
        x = X.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        return y, x.grad, layer.weight.grad

    layer, X, dy = FP8Linear(K, N), torch.randn(T, K).to(dtype), torch.randn(T, N).to(dtype)
    emulated = run()
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: True)
    with TensorCores():
        hardware = run()
    for e, h in zip(emulated, hardware, strict=True):
        assert e.shape == h.shape and e.dtype == h.dtype
        tolerance = 1e-2 if e.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(h, e, rtol=tolerance, atol=2e-6 * float(e.abs().sum() > 0))


@pytest.mark.parametrize("T,K,N", [*SHAPES, (128, 128 * 7, 256)])
def test_layouts_pass_torchs_own_check(T, K, N):
    with FakeTensorMode():
        x, w, dy = torch.randn(T, K), torch.randn(N, K), torch.randn(T, N)
        wq, ws = quantize(w, BLOCK)
        wt = (wq.t().contiguous(), ws.t())
        bf16 = torch.bfloat16
        y = fp8._hopper_mm(quantize(x, TILE), (wq, ws), BLOCK, bf16)
        dx = fp8._hopper_mm(quantize(dy, TILE), wt, BLOCK, bf16)
        columns = quantize(dy.t(), TILE), quantize(x.t(), TILE)
        dw = fp8._hopper_mm(*columns, TILE, torch.float32)
    assert (y.shape, dx.shape, dw.shape) == ((T, N), (T, K), (N, K))
    assert (y.dtype, dx.dtype, dw.dtype) == (bf16, bf16, torch.float32)


def test_emulation_is_said_once(capfd):
    fp8._say_once.cache_clear()
    for _ in range(2):
        FP8Linear(128, 128)(torch.randn(1, 128))
    captured = capfd.readouterr()
    assert captured.err.count("fp8: emulated on cpu") == 1 and not captured.out


# ---- Experts and SwiGLU -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_list", [False, True])
def test_grouped_linear_is_one_linear_per_expert(dtype, as_list):
    counts = [0, 5, 130, 0, 1, 0]
    weight = nn.Parameter(torch.randn(len(counts), 96, 200) * 0.05)
    x = torch.randn(sum(counts), 200).to(dtype).requires_grad_()
    dy = torch.randn(sum(counts), 96).to(dtype)
    y = grouped_linear(x, weight, counts if as_list else torch.tensor(counts))
    y.backward(dy)
    start = 0
    for e, n in enumerate(counts):
        at, layer = slice(start, start + n), FP8Linear(200, 96)
        layer.weight = nn.Parameter(weight[e].detach().clone())
        x_e = x.detach()[at].clone().requires_grad_()
        y_e = layer(x_e)
        y_e.backward(dy[at])
        assert torch.equal(y[at], y_e) and torch.equal(x.grad[at], x_e.grad)
        assert torch.equal(weight.grad[e], layer.weight.grad)
        assert n or (weight.grad[e] == 0).all()
        start += n


def test_grouped_linear_without_tokens():
    weight = nn.Parameter(torch.randn(3, 96, 200))
    y = grouped_linear(torch.randn(0, 200), weight, torch.zeros(3, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 96) and (weight.grad == 0).all()


@pytest.mark.parametrize("experts", [False, True])
def test_swiglu_linear(experts):
    """Forward: the product of the exact SwiGLU. Backward: of SwiGLU recomputed from FP8."""
    T, K, N = 70, 200, 96
    counts = [30, 0, 40] if experts else None
    weight = nn.Parameter(torch.randn(3, N, K) if experts else torch.randn(N, K))
    gate, up = (torch.randn(T, K, requires_grad=True) for _ in range(2))
    gain = torch.rand(T, requires_grad=True) if experts else None
    dy = torch.randn(T, N)
    y = fp8.swiglu_linear(gate, up, weight, counts, gain)
    y.backward(dy)

    g, u = (reference(z, TILE).requires_grad_() for z in (gate, up))
    a = gain.detach().double().requires_grad_() if experts else torch.ones(T, dtype=torch.float64)
    X = F.silu(gate) * up * (gain[:, None] if experts else 1)
    recomputed = F.silu(g) * u * a[:, None]
    dX, start = torch.empty(T, K, dtype=torch.float64), 0
    for e, n in enumerate(counts or [T]):
        at, w = slice(start, start + n), weight[e] if experts else weight
        dw = weight.grad[e] if experts else weight.grad
        if n:
            want, dX[at], want_dw = reference_products(X[at], w, dy[at])
            want_dw = reference(dy[at].T, TILE) @ reference(recomputed[at].T, TILE).T
            assert error(y[at], want) < 1e-5
            # Recomputing rounds in fp32: a number on the border of two codes may take the other.
            assert error(dw, want_dw) < 3e-3
        start += n
    recomputed.backward(dX)
    for got, exact in [(gate, g), (up, u)] + ([(gain, a)] if experts else []):
        assert error(got.grad, exact.grad) < 1e-5
    exact = F.silu(gate.detach()) * up.detach() * (gain.detach()[:, None] if experts else 1)
    if not experts:  # what FP8 costs in all: gate, up, their product and dy are rounded
        assert error(weight.grad, dy.double().T @ exact.double()) < 0.08


def saved_bytes(run):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())


def test_what_is_kept_for_backward():
    T, K = 1024, 256
    weight = nn.Parameter(torch.randn(1, K))
    x, up = (torch.randn(T, K).bfloat16().requires_grad_() for _ in range(2))
    layer = FP8Linear(K, 1)
    one = T * K * (1 + 4 / 128) + 129 * K  # a byte a number, a scale a tile, the weight's blocks
    assert saved_bytes(lambda: layer(x)) <= one
    assert saved_bytes(lambda: fp8.swiglu_linear(x, up, weight)) <= 2 * one
    assert saved_bytes(lambda: F.linear(F.silu(x) * up, weight.bfloat16())) > 7.9 * T * K


# ---- The quantised weight ---------------------------------------------------------------------


def count_weight_quantisations(monkeypatch):
    calls = []

    def counting(x, block, pow2=False):
        if block == BLOCK:
            calls.append(tuple(x.shape))
        return quantize(x, block, pow2)

    monkeypatch.setattr(fp8, "quantize", counting)
    return calls


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = FP8Linear(128, 64)
        self.down = nn.Parameter(torch.randn(2, 128, 64))
        self.head = nn.Linear(128, 8)

    def forward(self, x):
        return self.head(grouped_linear(self.up(x), self.down, [len(x) // 2] * 2))


def test_one_quantisation_per_step(monkeypatch):
    model, calls = Experts(), count_weight_quantisations(monkeypatch)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(1, 4):
        with quantized_once(model):
            for _ in range(4):
                model(torch.randn(6, 128)).sum().backward()
        opt.step()
        assert calls == [(64, 128), (2, 128, 64)] * step
    model(torch.randn(6, 128)).sum().backward()  # outside: once per forward, none in backward
    assert len(calls) == 8
    with quantized_once(nn.Sequential(model.head, nn.Conv1d(1, 1, 1))):  # nothing in FP8
        assert len(calls) == 8


def test_caching_changes_no_bit():
    model, x = Experts(), torch.randn(6, 128)
    plain = model(x)
    with quantized_once(model):
        assert torch.equal(model(x), plain)
        assert hasattr(model.down, "_fp8") and not hasattr(model.head.weight, "_fp8")
    assert not hasattr(model.down, "_fp8")
    with pytest.raises(ZeroDivisionError), quantized_once(model):
        _ = 1 / 0
    assert not hasattr(model.down, "_fp8") and not hasattr(model.up.weight, "_fp8")


def assert_fresh(layer, before):
    x = torch.eye(128, dtype=layer.weight.dtype)
    want = dequantize(*quantize(layer.weight, BLOCK, pow2=True), BLOCK).t()
    assert torch.equal(layer(x).float(), want.to(x.dtype).float())
    assert not torch.equal(layer.weight.detach().float(), before)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", [*OPTIMIZERS, *UPDATES_IN_PLACE, *UNTRACED])
def test_no_update_leaves_a_stale_weight(name, inside):
    layer = FP8Linear(128, 128)
    before = layer.weight.detach().clone()

    def update():
        if name in OPTIMIZERS:
            OPTIMIZERS[name](layer.parameters()).step()
        else:
            {**UPDATES_IN_PLACE, **UNTRACED}[name](layer)

    with quantized_once(layer):
        layer(torch.randn(4, 128)).sum().backward()
        if inside and name not in UNTRACED:  # those the docstring of quantized_once forbids
            update()
            assert_fresh(layer, before)
            return
    update()
    assert_fresh(layer, before)


def test_moves_and_copies_do_not_carry_the_cache():
    layer, x = FP8Linear(128, 128), torch.randn(4, 128)
    with quantized_once(layer):
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        assert "_fp8" not in vars(twins[0].weight)
    assert file.tell() < 128 * 128 * 4 + 4096
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True).keys() == {"weight"}
    for twin in twins:
        assert torch.equal(twin(x), layer(x))
        twin.weight.data.neg_()
        assert_fresh(twin, layer.weight.detach())
    assert FP8Linear(128, 64, device="meta").weight.is_meta


def test_state_dict_and_class_swap():
    plain, ours = nn.Linear(128, 64), FP8Linear(128, 64, bias=True)
    assert FP8Linear(128, 64).bias is None
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    x, want = torch.randn(5, 128), plain(torch.zeros(1, 128))
    weight = plain.weight
    plain.__class__ = FP8Linear
    assert plain.weight is weight and torch.equal(plain(x), ours(x))
    assert torch.equal(plain(torch.zeros(1, 128)), want)  # the bias
    assert list(plain.named_buffers()) == []


# ---- Company: compile, DDP, FSDP --------------------------------------------------------------


def test_compiles_into_one_graph():
    model = nn.Sequential(FP8Linear(128, 256, bias=True), FP8Linear(256, 128))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with quantized_once(model):
            for _ in range(2):
                grads = []
                x = torch.randn(30, 128)
                for f in (model, compiled):
                    opt.zero_grad()
                    with torch.autocast("cpu", torch.bfloat16):
                        y = f(x)
                    y.float().square().mean().backward()
                    grads.append([y, *(p.grad.clone() for p in model.parameters())])
                assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        opt.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    layer, x = model[1], torch.randn(30, 256)
    twice, compiled = 2 * layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")
    with quantized_once(layer):  # the compiled forward takes the weight kept: here one doctored
        kept = layer.weight._fp8
        layer.weight._fp8 = type(kept)((*kept[:3], 2 * kept[3]))
        assert torch.equal(compiled(x), twice)
    assert torch.equal(2 * compiled(x), twice)


def test_swiglu_linear_compiles():
    def f(gate, up):
        return fp8.swiglu_linear(gate, up, weight)

    weight = nn.Parameter(torch.randn(64, 128))
    x, up = torch.randn(9, 128), torch.randn(9, 128)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, up), f(x, up))


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(world):
    model = Experts()
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        x = torch.randn(6, 128)
        with quantized_once(wrapped):
            assert hasattr(model.down, "_fp8")
            wrapped(x).square().sum().backward()
        twin(x).square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            p.data.sub_(p.grad, alpha=1e-3)
            q.data.sub_(q.grad, alpha=1e-3)
            p.grad = q.grad = None


def test_fsdp_weights_are_quantised_at_every_forward(world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(FP8Linear(128, 64), FP8Linear(64, 128))
    twin = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(3):
        x = torch.randn(6, 128)
        with quantized_once(model):
            assert not any(hasattr(p, "_fp8") for p in model.parameters())
            assert torch.equal(model(x), twin(x))
            model(x).square().sum().backward()
        twin(x).square().sum().backward()
        for m in (model, twin):
            torch.optim.SGD(m.parameters(), lr=1e-3).step()
            m.zero_grad()


# ---- Hardware ---------------------------------------------------------------------------------

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU (SM90): blockwise FP8 products exist there only",
)


@hopper
@pytest.mark.parametrize("T,K,N", [*SHAPES, (1193, 7168, 576), (33, 896, 130), (0, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hardware_equals_emulation(T, K, N, dtype, monkeypatch):
    assert fp8.has_blockwise_fp8(torch.device("cuda", 0)), "CUDA or torch too old for Hopper"
    layer = FP8Linear(K, N, device="cuda")
    X = torch.randn(T, K, device="cuda").to(dtype)
    dy = (torch.randn(T, N, device="cuda") * torch.randn(T, 1, device="cuda").exp()).to(dtype)

    def run():
        x = X.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        return y, x.grad, layer.weight.grad

    hardware = run()
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: False)
    emulated = run()
    for h, e in zip(hardware, emulated, strict=True):
        assert h.shape == e.shape and h.dtype == e.dtype
        if T:  # Hopper adds 128 products in 14 bits or so before it promotes: 2^-13 at worst
            assert error(h, e) < (4e-3 if h.dtype == torch.bfloat16 else 1e-3)


@hopper
def test_hardware_experts_and_compile():
    counts = [0, 5, 130, 1]
    weight = nn.Parameter(torch.randn(4, 96, 200, device="cuda"))
    x = torch.randn(136, 200, device="cuda")
    y = grouped_linear(x, weight, torch.tensor(counts, device="cuda"))
    want = torch.cat([x[:5] @ weight[1].t(), x[5:135] @ weight[2].t(), x[135:] @ weight[3].t()])
    assert error(y.cpu(), want.detach().cpu()) < 0.04
    layer = FP8Linear(256, 384, device="cuda")
    x = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    assert error(torch.compile(layer, fullgraph=True)(x).cpu(), layer(x).detach().cpu()) < 4e-3
