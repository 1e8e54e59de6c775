"""fp8.py against numpy and float64: the quantiser code by code, the three products of a linear
layer against the same arithmetic in float64 (tight) and against no quantisation (what FP8
costs), the operands handed to the tensor cores, and the life of a quantised weight."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fp8
from fp8 import BLOCK, TILE, FP8Linear, dequantize, quantize, quantized_once

SHAPES = [(256, 512, 512), (200, 640, 576), (130, 100, 60), (1, 128, 128)]  # T, K, N
NAN, INF = float("nan"), float("inf")
BF16 = torch.bfloat16
both_kinds = pytest.mark.parametrize("pow2", [False, True])
both_blocks = pytest.mark.parametrize("block", [TILE, BLOCK])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def error(got, want):
    """Relative Frobenius error."""
    got, want = got.detach().double(), torch.as_tensor(want).detach().double()
    return ((got - want).norm() / want.norm()).item()


def forward_backward(layer, x, dy):
    """y, dx, dW of a layer at x for the output gradient dy."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def step(model, x):
    """What a model makes of x, and the gradients of its parameters."""
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def mlp(D, width):
    module = fp8.FP8MLP()
    module.gate_proj, module.up_proj = FP8Linear(D, width), FP8Linear(D, width)
    module.down_proj = FP8Linear(width, D)
    return module


class Experts(fp8.FP8Experts):
    def __init__(self, E, D, width):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * width, D) * D**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, width) * width**-0.5)

    def forward(self, x, counts=None, gain=None):
        if counts is None:  # two experts share the rows of the network below
            counts, gain = torch.tensor([len(x) // 2] * 2), torch.ones(len(x))
        return super().forward(x, counts, gain)


def network():
    """Weights that are quantised; a bias and a head that are not."""
    return nn.Sequential(FP8Linear(128, 64, bias=True), Experts(2, 64, 32), nn.Linear(64, 8))


def cached(model):
    return [name for name, p in model.named_parameters() if hasattr(p, "_fp8")]


# ---- A reference that shares nothing with fp8.py ----------------------------------------------

EXPONENT, MANTISSA = np.arange(127) >> 3, np.arange(127) & 7
POSITIVE = np.where(  # what the codes 0 .. 126 stand for: 0 .. 448, in order
    EXPONENT == 0, MANTISSA / 8 * 2.0**-6, (1 + MANTISSA / 8) * 2.0 ** (EXPONENT - 7)
)


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


def test_codes_decode_as_defined_and_numbers_round_to_the_nearest_even():
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).double().numpy()
    np.testing.assert_array_equal(codes, [*POSITIVE, NAN, *-POSITIVE, NAN])
    middle = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    x = np.concatenate([POSITIVE, middle, middle * (1 + 1e-6), middle * (1 - 1e-6)])
    x = torch.from_numpy(np.concatenate([x, -x])).float()
    tiles = F.pad(x, (0, -len(x) % 127)).view(-1, 127)
    tiles = F.pad(tiles, (0, 1), value=448.0)  # so that every scale is 1
    q, s = quantize(tiles, TILE)
    assert (s == 1).all()
    assert torch.equal(q.double(), torch.from_numpy(e4m3_round(tiles.numpy())))


@both_kinds
@both_blocks
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


@both_kinds
def test_magnitudes(pow2):
    for size in (1e-35, 1e-30, 1e-9, 1e-4, 1.0, 1e30, 1e38):  # no floor on amax hides in between
        x = torch.randn(8, 128).clamp(-3, 3) * size
        assert error(dequantize(*quantize(x, TILE, pow2), TILE), x) < 0.03, size
    q, s = quantize(torch.zeros(2, 256), TILE, pow2)
    assert (s == 1).all() and (q.float() == 0).all()
    subnormal = torch.full((1, 128), 1e-42)
    assert dequantize(*quantize(subnormal, TILE, pow2), TILE).isfinite().all()
    for largest, scale in ((448.0, 1), (448.1, 2), (224.0, 0.5)):  # the smallest that fits
        _, s = quantize(torch.full((1, 128), largest), TILE, pow2)
        assert s.item() == scale if pow2 else s.item() == pytest.approx(largest / 448)


@both_kinds
@both_blocks
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_numbers_are_not_hidden(bad, block, pow2):
    x = torch.randn(256, 256)
    x[3, 5] = bad
    decoded = dequantize(*quantize(x, block, pow2), block)
    assert decoded[3, :128].isnan().all()  # the whole tile: its scale is lost
    assert decoded[:, 128:].isfinite().all() and decoded[128:].isfinite().all()


@both_kinds
def test_requantisation_is_exact_for_powers_of_two_only(pow2):
    x = torch.randn(384, 256) * torch.randn(384, 1).exp()
    once = dequantize(*quantize(x, TILE, pow2), TILE)
    twice = dequantize(*quantize(once.t(), TILE, pow2), TILE).t()
    if pow2:  # but for what falls below the 2^-9 of its new tile
        assert (once - twice).abs().max() <= 2.0**-10 * 2 * once.abs().max() / 448
        big = once.abs() > once.abs().max() / 448 * 2.0**-5
        assert torch.equal(once[big], twice[big]) and big.float().mean() > 0.9
    assert error(twice, once) < 1e-5 if pow2 else error(twice, once) > 0.01


def test_errors_name_what_to_do():
    x = torch.randn(4, 128)
    for call, words in [
        (lambda: quantize(x, (1, 64)), r"block is \(1, 64\); use .*\(1, 128\) or \(128, 128\)"),
        (lambda: quantize(x[0], TILE), r"shape \(128,\).*x\[None\]"),
        (lambda: dequantize(x, torch.ones(4, 2), TILE), r"\(4, 2\).*needs \(4, 1\)"),
        (lambda: FP8Linear(100, 64)(x), "128 features but the weight 100"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_outliers_cost_no_accuracy():
    layer, x = FP8Linear(1024, 256), torch.randn(2, 256, 1024)
    x[0][:, torch.randperm(1024)[:10]] *= 50  # channels
    x[1].view(-1)[torch.randperm(256 * 1024)[:26]] *= 2000  # elements
    for z in x:
        # Two operands, each rounded by 2.6 % rms: sqrt(2) times that is 3.7 %.
        assert 0.02 < error(layer(z), z.double() @ layer.weight.double().T) < 0.045


def test_only_tiles_survive_a_spread_of_token_magnitudes():
    """Gradients of tokens differ by orders of magnitude (report, appendix B.2)."""
    x = torch.randn(512, 512) * (4 * torch.randn(512, 1)).exp()
    w = torch.randn(512, 256).double() * 0.006
    exact = x.double() @ w

    def bad_rows(decoded):
        deviation = (decoded.double() @ w - exact).norm(dim=1) / exact.norm(dim=1)
        return (deviation > 0.1).float().mean().item()

    scale = x.abs().max() / 448
    assert bad_rows((x / scale).to(fp8.E4M3).float() * scale) > 0.5  # per tensor
    assert bad_rows(dequantize(*quantize(x, BLOCK), BLOCK)) > 0.4
    assert bad_rows(dequantize(*quantize(x, TILE), TILE)) == 0
    assert bad_rows(dequantize(*quantize(x, TILE, pow2=True), TILE)) == 0


# ---- The three products -----------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("T,K,N", SHAPES)
def test_products(T, K, N, dtype, autocast):
    low = BF16 if autocast else dtype
    layer, x = FP8Linear(K, N), torch.randn(T, K).to(dtype)
    dy = (torch.randn(T, N) * torch.randn(T, 1).exp()).to(low)
    with torch.autocast("cpu", BF16, enabled=autocast):  # in backward too it must not cost bits
        *got, dw = forward_backward(layer, x, dy)
    *want, want_dw = reference_products(x, layer.weight, dy)
    assert [z.dtype for z in got] == [low, dtype] and dw.dtype == torch.float32
    assert error(dw, want_dw) < 2e-6
    ulp = 2.0**-8 if low == BF16 else 0  # half a unit of the last place, plus a sum that cancels
    for g, tight in zip(got, want, strict=True):
        assert ((g.double() - tight).abs() <= ulp * tight.abs() + 1e-5 * tight.abs().max()).all()
        assert ulp or error(g, tight) < 2e-6
    X, W, G = x.double(), layer.weight.double(), dy.double()
    for g, exact in zip((*got, dw), (X @ W.T, G @ W, G.T @ X), strict=True):
        assert error(g, exact) < (0.04 if T > 1 else 0.05)


def test_any_shape_and_no_gradient_of_a_frozen_weight():
    layer, x = FP8Linear(100, 60), torch.randn(2, 3, 100)
    assert torch.equal(layer(x), layer(x.view(6, 100)).view(2, 3, 60))
    assert torch.equal(layer(x[0, 0]), layer(x[0, :1])[0])
    for shape in ((0, 100), (2, 0, 100)):
        _, dx, dw = forward_backward(layer, torch.randn(shape), torch.randn(*shape[:-1], 60))
        assert dx.shape == shape and not dw.any()
    layer.zero_grad()
    layer.weight.requires_grad_(False)
    columns = torch.randn(100, 7, requires_grad=True)
    y = layer(columns.t())  # not contiguous
    assert torch.equal(y, layer(columns.t().contiguous()))
    y.sum().backward()  # a gradient of stride 0
    assert error(columns.grad, layer.weight.sum(0)[:, None].expand(100, 7)) < 0.05
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("counts", [[0, 5, 130, 0, 1, 0], [0, 0]])
def test_each_expert_is_a_linear_layer(counts, dtype):
    weight = nn.Parameter(torch.randn(len(counts), 96, 200) * 0.05)
    x = torch.randn(sum(counts), 200).to(dtype).requires_grad_()
    dy = torch.randn(sum(counts), 96).to(dtype)
    y = fp8._linear(x, weight, counts)
    y.backward(dy)
    by_expert = (z.split(counts) for z in (x, dy, y, x.grad))
    for w, dw, x_e, dy_e, *got in zip(weight, weight.grad, *by_expert, strict=True):
        layer = FP8Linear(200, 96)
        layer.weight = nn.Parameter(w.detach().clone())
        want = forward_backward(layer, x_e, dy_e)
        assert same((*got, dw), want)
        assert len(x_e) or not dw.any()


@pytest.mark.parametrize("counts", [[70], [30, 40]])
def test_swiglu_is_recomputed_from_fp8(counts):
    """Forward: the product of the exact SwiGLU. Backward: of SwiGLU recomputed from FP8."""
    T, K, N = 70, 200, 96
    weight, dy = nn.Parameter(torch.randn(len(counts), N, K)), torch.randn(T, N)
    gate, up = (torch.randn(T, K, requires_grad=True) for _ in range(2))
    gain = torch.rand(T, requires_grad=True) if len(counts) > 1 else None
    y = fp8._linear(gate, weight, counts, up, gain)
    y.backward(dy)

    g, u = (reference(z, TILE).requires_grad_() for z in (gate, up))
    a = torch.ones(T, dtype=torch.float64) if gain is None else gain.detach().double()
    X = F.silu(gate) * up * a[:, None].float()
    recomputed = F.silu(g) * u * a.requires_grad_()[:, None]
    dX, by_expert = [], (z.split(counts) for z in (X, recomputed, dy, y))
    for w, dw, X_e, recomputed_e, dy_e, y_e in zip(weight, weight.grad, *by_expert, strict=True):
        want, dX_e, _ = reference_products(X_e, w, dy_e)
        dX.append(dX_e)
        assert error(y_e, want) < 1e-5
        # Recomputing rounds in fp32: a number on the border of two codes may take the other.
        want_dw = reference(dy_e.T, TILE) @ reference(recomputed_e.T, TILE).T
        assert error(dw, want_dw) < 3e-3
    recomputed.backward(torch.cat(dX))
    for got, exact in ((gate, g), (up, u), (gain, a)):
        assert got is None or error(got.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("kind", ["mlp", "experts"])
def test_modules_compute_the_formulas_of_model_py(kind):
    """To what FP8 costs: gate and up, their product and the gradients are rounded."""
    x, gain = torch.randn(60, 128, requires_grad=True), torch.rand(60, requires_grad=True)
    if kind == "mlp":
        module, counts, more = mlp(128, 80), [60], []
        gate, up, down = (p[None] for p in module.parameters())
    else:
        module, counts, more = Experts(3, 128, 80), [25, 0, 35], [gain]
        (gate, up), down = module.gate_up_proj.chunk(2, dim=1), module.down_proj
    exact, factor = [], (gain if more else torch.ones(60))[:, None]
    for w, v, z, x_e, a in zip(gate, up, down, x.split(counts), factor.split(counts), strict=True):
        exact.append((F.silu(x_e @ w.T) * (x_e @ v.T) * a) @ z.T)
    y = module(x, torch.tensor(counts), *more) if more else module(x)
    dy, leaves = torch.randn_like(y), [x, *more, *module.parameters()]
    got, want = ([z, *torch.autograd.grad(z, leaves, dy)] for z in (y, torch.cat(exact)))
    assert all(0.01 < error(a, b) < 0.1 for a, b in zip(got, want, strict=True))


def test_what_is_kept_for_backward():
    """A byte a number, a scale a tile, two of these for SwiGLU, and no copy of the weight: FSDP's
    is released and gathered anew in between."""

    def kept_bytes(run):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            run()
        sizes = {t.data_ptr(): t.nbytes for t in kept if t.data_ptr() != weight.data_ptr()}
        return sum(sizes.values())

    T, K = 1024, 256
    layer = FP8Linear(K, 384)
    x, up, weight = *torch.randn(2, T, K).bfloat16().requires_grad_(), layer.weight
    one = T * K * (1 + 4 / 128)
    assert kept_bytes(lambda: layer(x)) == one
    assert kept_bytes(lambda: fp8._linear(x, weight, up=up)) == 2 * one
    assert kept_bytes(lambda: F.linear(F.silu(x) * up, weight.bfloat16())) > 7.9 * T * K


# ---- The quantised weight ---------------------------------------------------------------------


def test_weights_are_quantised_once_and_not_a_bit_changes(monkeypatch):
    calls, model, x = [], network(), torch.randn(6, 128)

    def counting(x, block, pow2=False):
        calls.extend([x.shape] * (block == BLOCK))
        return quantize(x, block, pow2)

    monkeypatch.setattr(fp8, "quantize", counting)
    plain = step(model, x)
    assert len(calls) == 3 + 2  # outside: in forward, and in backward wherever dx is needed
    calls.clear()
    with pytest.raises(ZeroDivisionError), quantized_once(model):
        assert cached(model) == ["0.weight", "1.gate_up_proj", "1.down_proj"]
        assert cached(copy.deepcopy(model)) == []
        assert same(step(model, x), plain)
        model.zero_grad()
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
        assert same([p.grad for p in model.parameters()], plain[1:])
        _ = 1 / 0
    assert calls == [(64, 128), (2, 64, 64), (2, 64, 32)] and cached(model) == []


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_step_within_the_block_leaves_no_stale_weight(how):
    layer = FP8Linear(128, 128)
    before = layer.weight.detach().clone()
    with quantized_once(layer):
        layer(torch.randn(4, 128)).sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=1.0, **how).step()
        want = dequantize(*quantize(layer.weight, BLOCK, pow2=True), BLOCK).t()
        assert torch.equal(layer(torch.eye(128)), want)
        assert not torch.equal(layer.weight, before)


def test_class_swap():
    plain, ours = nn.Linear(128, 64), FP8Linear(128, 64, bias=True)
    assert FP8Linear(128, 64).bias is None and FP8Linear(128, 64, device="meta").weight.is_meta
    ours.load_state_dict(plain.state_dict())
    x, want, weight = torch.randn(5, 128), plain(torch.zeros(1, 128)), plain.weight
    plain.__class__ = FP8Linear
    assert plain.weight is weight and torch.equal(plain(x), ours(x))
    assert torch.equal(plain(torch.zeros(1, 128)), want)  # the bias


# ---- Company: compile, DDP, FSDP --------------------------------------------------------------


def test_compiles_into_one_graph():
    model = nn.Sequential(FP8Linear(128, 256, bias=True), mlp(256, 128))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with quantized_once(model):
            x = torch.randn(30, 128)
            with torch.autocast("cpu", BF16):
                assert same(step(model, x), step(compiled, x))
        opt.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    layer, x = FP8Linear(256, 64), torch.randn(30, 256)
    twice, compiled = 2 * layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")
    with quantized_once(layer):  # the compiled forward uses the weight kept: here one doctored
        q, s = layer.weight._fp8
        layer.weight._fp8 = q, 2 * s
        assert torch.equal(compiled(x), twice)
    assert torch.equal(2 * compiled(x), twice)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_parallel_training_changes_no_bit(kind, request):
    """DDP uses the weights quantised once; FSDP's are quantised whenever they are gathered."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    model = network()
    twin = copy.deepcopy(model)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for part in (*model[:2], model):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, twin)]
    for _ in range(3):  # a gradient that differs is seen in the next output
        x = torch.randn(6, 128)
        with quantized_once(model):
            assert bool(cached(model)) == (kind == "ddp")
            y, *_ = step(model, x)
        assert torch.equal(y, step(twin, x)[0])
        for opt in optimizers:
            opt.step()


# ---- Tensor cores: operands, hardware ---------------------------------------------------------

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU (SM90): blockwise FP8 products exist there only",
)


class TensorCores(TorchDispatchMode):
    """Stands in for _scaled_mm_v2: checks what cuBLAS demands, reads the scales as it does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten._scaled_mm_v2.default:
            return func(*args, **(kwargs or {}))
        a, b, (sa,), (ra,), swizzle_a, (sb,), (rb,), swizzle_b, bias, dtype, *rest = args
        (M, K), N, L = a.shape, b.shape[1], a.shape[1] // 128
        assert a.dtype == b.dtype == fp8.E4M3 and dtype in (BF16, torch.float32)
        assert M % 128 == N % 128 == K % 128 == 0
        assert a.stride() == (K, 1) and b.stride() == (1, K)
        assert (swizzle_a, swizzle_b, bias) == ([], [], None)
        assert rest in ([], [[]], [[], False])  # no fast accumulation; torch trims defaults
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
            y = y + a[:, at].float() @ b[at].float() * sa[:, i, None] * per_row[:, i]
        return y.to(dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=hopper)])
@pytest.mark.parametrize("T,K,N", [*SHAPES, (1193, 7168, 576), (33, 896, 130), (0, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_hardware_equals_emulation(T, K, N, dtype, device, monkeypatch):
    if device == "cuda":
        assert fp8.has_blockwise_fp8(torch.device("cuda", 0)), "CUDA or torch too old for Hopper"
    K = K if device == "cuda" else min(K, 1792)
    layer, x = FP8Linear(K, N, device=device), torch.randn(T, K, device=device).to(dtype)
    dy = (torch.randn(T, N, device=device) * torch.randn(T, 1, device=device).exp()).to(dtype)
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: False)
    emulated = forward_backward(layer, x, dy)
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: True)
    with TensorCores() if device == "cpu" else contextlib.nullcontext():
        hardware = forward_backward(layer, x, dy)
    # Hopper adds 128 products in 14 bits or so before it promotes: 2^-13 at worst.
    fp32_error = 1e-3 if device == "cuda" else 2e-6
    for e, h in zip(emulated, hardware, strict=True):
        assert e.shape == h.shape and e.dtype == h.dtype
        assert not e.any() or error(h, e) < (4e-3 if e.dtype == BF16 else fp32_error)
    with FakeTensorMode():  # torch's own check of the layouts
        x, dy = torch.empty(T, K, dtype=dtype), torch.empty(T, N, dtype=dtype)
        fake = forward_backward(FP8Linear(K, N), x, dy)
    assert [(z.shape, z.dtype) for z in fake] == [(z.shape, z.dtype) for z in emulated]


def test_emulation_is_printed_once(capfd):
    fp8._emulated.clear()
    for _ in range(2):
        FP8Linear(128, 128)(torch.randn(1, 128))
    captured = capfd.readouterr()
    assert captured.err.count("fp8: emulated on cpu") == 1 and not captured.out


@hopper
def test_hardware_experts_and_compile():
    counts, module = torch.tensor([0, 5, 130, 1]), Experts(4, 200, 96)
    x, gain = torch.randn(136, 200), torch.rand(136)
    want = module(x, counts, gain)
    got = module.cuda()(x.cuda(), counts.cuda(), gain.cuda()).cpu()
    assert error(got, want) < 0.02  # a number on the border of two codes may take the other
    layer = FP8Linear(256, 384, device="cuda")
    x = torch.randn(200, 256, device="cuda", dtype=BF16)
    assert error(torch.compile(layer, fullgraph=True)(x).cpu(), layer(x).detach().cpu()) < 4e-3
