"""fp8.py against a loop over tiles and float64: the quantiser, the three products of a linear layer
against the same arithmetic in float64 (tight) and against no quantisation (what FP8 costs), on the
CPU and as the tensor cores are given them, and the life of a quantised weight."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from networks import calm, in_bf16, tiny, tokens_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fp8
import model as plain
from fp8 import BLOCK, COLUMN, TILE, FP8Linear, dequantize, quantize, quantized_once

BF16 = torch.bfloat16


def error(got, want):
    """Relative Frobenius error."""
    got, want = got.detach().double(), torch.as_tensor(want).detach().double()
    return ((got - want).norm() / want.norm()).item()


def step(model, x, dy=None):
    """y, dx and the gradients of the parameters, for the gradient dy of y, or y itself."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(y.detach() if dy is None else dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


class Experts(fp8.FP8Experts):
    def __init__(self, E, D, width):
        nn.Module.__init__(self)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * width, D) * D**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, width) * width**-0.5)

    def forward(self, x):
        """Two experts share the rows."""
        chosen = (torch.arange(len(x)) >= len(x) // 2).long()[:, None]
        return super().forward(x, chosen, torch.ones(len(x), 1))


def network():
    """Weights that are quantised; a bias and a head that are not."""
    return nn.Sequential(FP8Linear(128, 64, bias=True), Experts(2, 64, 32), nn.Linear(64, 8))


def cached(model):
    return [name for name, p in model.named_parameters() if hasattr(p, "_fp8")]


# ---- Reference --------------------------------------------------------------------------------


def reference(x, block, pow2=True):
    """(..., M, K) -> what the quantised matrix decodes to, float64, one tile after the other."""
    x, out = x.detach().float(), torch.empty(x.shape, dtype=torch.float64)
    for lead in np.ndindex(x.shape[:-2]):
        for i in range(0, x.shape[-2], block[0]):
            for j in range(0, x.shape[-1], block[1]):
                at = (*lead, slice(i, i + block[0]), slice(j, j + block[1]))
                scale = (x[at].abs().max() / 448).item() or 1.0
                if pow2:
                    scale = 2.0 ** math.ceil(math.log2(scale))
                out[at] = (x[at] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
    return out


def reference_products(x, w, dy):
    """y, dx, dW in float64 from the operands that the report quantises."""
    y = reference(x, TILE) @ reference(w, BLOCK).T
    dx = reference(dy, TILE) @ reference(w, BLOCK)
    dw = reference(dy.T, TILE) @ reference(reference(x, TILE).T, TILE).T
    return y, dx, dw


# ---- Quantiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("block", [TILE, COLUMN, BLOCK])
def test_quantize_equals_reference(block, pow2):
    """Of any shape, any size (no floor on amax hides in between), at the ends of E4M3."""
    shapes = (130, 100), (2, 129, 257), (1, 1), (0, 64)
    inputs = [torch.randn(shape) * torch.randn(*shape[:-1], 1).exp() for shape in shapes]
    inputs += [torch.randn(8, 128).clamp(-3, 3) * size for size in (1e-30, 1e-9, 1e38)]
    inputs += [torch.full((1, 128), x) for x in (0.0, 224.0, 448.0, 448.1)]
    for x in inputs:
        q, s = quantize(block=block, x=x, pow2=pow2)  # names of arguments are the interface's
        decoded = dequantize(q, s, block)  # checks the shape of s
        assert q.dtype == fp8.E4M3 and s.dtype == decoded.dtype == torch.float32
        torch.testing.assert_close(decoded.double(), reference(x, block, pow2), rtol=2e-7, atol=0)
        assert same(quantize(x, block, pow2, decode=True), (decoded, s))
        if pow2:
            assert torch.equal(decoded, dequantize(q, s, block, BF16).float())  # exact in bf16
            assert (torch.frexp(s).mantissa == 0.5).all()
    subnormal = torch.full((1, 128), 1e-43)  # a 448th of it is 0
    assert dequantize(*quantize(subnormal, block, pow2), block).isfinite().all()
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(256, 256)
        x[3, 5] = bad
        lost = dequantize(*quantize(x, block, pow2), block).isnan()
        assert torch.equal(quantize(x, block, pow2, decode=True)[0].isnan(), lost)
        rows, columns = (
            slice(i, i + 1) if n == 1 else slice(128) for i, n in ((3, block[0]), (5, block[1]))
        )
        assert lost[rows, columns].all()  # the whole tile: its scale is lost
        assert lost.sum() == lost[rows, columns].numel()


# ---- The three products -----------------------------------------------------------------------


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU (SM90): blockwise FP8 products exist there only",
)


class TensorCores(TorchDispatchMode):
    """Stands in for _scaled_mm_v2: checks what cuBLAS demands, reads the scales as it does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is not torch.ops.aten._scaled_mm_v2:
            return func(*args, **(kwargs or {}))
        a, b, (sa,), (ra,), swizzle_a, (sb,), (rb,), swizzle_b, bias, dtype, *rest = args
        (M, K), N, L = a.shape, b.shape[1], a.shape[1] // 128
        assert a.dtype == b.dtype == fp8.E4M3 and dtype in (BF16, torch.float32)
        assert M % 128 == N % 128 == K % 128 == 0
        assert a.stride(1) == b.stride(0) == 1  # rows of a and columns of b; they may lie apart
        assert all(
            x.data_ptr() % 16 == n % 16 == 0 for x, n in ((a, a.stride(0)), (b, b.stride(1)))
        )
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
        if func is torch.ops.aten._scaled_mm_v2.default:
            return y.to(dtype)
        out = kwargs["out"]
        assert out.dtype == dtype and out.is_contiguous()
        return out.copy_(y)


@pytest.mark.parametrize("machine", ["cpu", "operands", pytest.param("cuda", marks=hopper)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("T,K,N", [(130, 200, 140), (1, 128, 128)])
def test_products(T, K, N, dtype, autocast, machine, monkeypatch):
    """Emulated on a CPU, with the operands that cuBLAS would get, and on a Hopper GPU."""
    device = "cuda" if machine == "cuda" else "cpu"
    if machine == "cuda":
        assert fp8.has_blockwise_fp8(torch.device("cuda", 0)), "CUDA or torch too old for Hopper"
        K = 36 * K  # as long as V3's
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: machine != "cpu")
    low = BF16 if autocast else dtype
    layer, x = FP8Linear(K, N), torch.randn(T, K).to(dtype)
    dy = (torch.randn(T, N) * torch.randn(T, 1).exp()).to(low)
    cores = TensorCores() if machine == "operands" else contextlib.nullcontext()
    with cores, torch.autocast(device, BF16, enabled=autocast):  # no bits lost in backward either
        results = step(layer.to(device), x.to(device), dy.to(device))
    *got, dw = (z.cpu() for z in results)
    assert [z.dtype for z in got] == [low, dtype] and dw.dtype == torch.float32
    layer.cpu()
    *want, want_dw = reference_products(x, layer.weight, dy)
    # Hopper adds 128 products in 14 bits or so before it promotes: 2^-13 at worst.
    fp32 = 1e-3 if machine == "cuda" else 2e-6
    assert error(dw, want_dw) < fp32
    ulp = 2.0**-8 if low == BF16 else 0  # half a unit of the last place, plus a sum that cancels
    for g, tight in zip(got, want, strict=True):
        bound = ulp * tight.abs() + 5 * fp32 * tight.abs().max()
        assert ((g.double() - tight).abs() <= bound).all()
        assert ulp or error(g, tight) < fp32
    X, W, G = x.double(), layer.weight.double(), dy.double()
    for g, exact in zip((*got, dw), (X @ W.T, G @ W, G.T @ X), strict=True):
        assert error(g, exact) < (0.04 if T > 1 else 0.05)


@pytest.mark.parametrize("machine", ["cpu", "operands"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("counts", [[0, 128, 384, 0, 128, 0], [0, 0]])
def test_each_expert_is_a_linear_layer(counts, dtype, machine, monkeypatch):
    """Behind the experts' rows there may be others."""
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: machine != "cpu")
    cores = TensorCores() if machine == "operands" else contextlib.nullcontext()
    T, weight = sum(counts), nn.Parameter(torch.randn(len(counts), 96, 700) * 0.05)
    x = torch.randn(T, 700).to(dtype).requires_grad_()
    dy = torch.randn(T, 96).to(dtype)
    with cores:
        y = fp8._linear(x, weight, counts)
        dx, dw = torch.autograd.grad(y, [x, weight], dy)
    by_expert = zip(*(z.split(counts) for z in (dy, y, x, dx)), strict=True)
    for w, dw_e, (dy_e, y_e, x_e, dx_e) in zip(weight, dw, by_expert, strict=True):
        leaves = [z.detach().requires_grad_() for z in (x_e, w)]
        with cores:
            want = fp8._linear(*leaves)
            grads = torch.autograd.grad(want, leaves, dy_e)
        assert same((y_e, dx_e, dw_e), (want, *grads))
        assert len(dy_e) or not dw_e.any()


def test_tensor_cores_get_whole_tiles_of_each_expert(monkeypatch):
    """However many rows it has, and what they compute is what the emulation computes."""
    experts, x, gain = Experts(3, 128, 64), torch.randn(50, 128), torch.rand(50, 2)
    chosen = torch.rand(50, 3).topk(2).indices
    expected = fp8.FP8Experts.forward(experts, x, chosen, gain)
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: True)
    with TensorCores():
        assert error(fp8.FP8Experts.forward(experts, x, chosen, gain), expected) < 1e-5


# ---- The quantised weight ---------------------------------------------------------------------


def test_weights_are_quantised_once_and_not_a_bit_changes(monkeypatch):
    calls, model, x = [], network(), torch.randn(6, 128)

    def counting(x, block, **options):
        calls.extend([x.shape] * (block == BLOCK))
        return quantize(x, block, **options)

    monkeypatch.setattr(fp8, "quantize", counting)
    plain = step(model, x)
    assert len(calls) == 3 + 3  # outside: in forward and in backward
    calls.clear()
    with contextlib.suppress(ZeroDivisionError), quantized_once(model):
        assert cached(model) == ["0.weight", "1.gate_up_proj", "1.down_proj"]
        assert cached(copy.deepcopy(model)) == []
        assert same(step(model, x), plain)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=False)
        y.backward(y.detach())
        assert same([p.grad for p in model.parameters()], plain[2:])
        _ = 1 / 0
    assert calls == [(64, 128), (2, 64, 64), (2, 64, 32)] and cached(model) == []


# ---- Company: compile, DDP, FSDP --------------------------------------------------------------


def test_compiles_into_one_graph():
    model = FP8Linear(128, 64)
    weight = model.weight
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        with quantized_once(model), torch.autocast("cpu", BF16):
            x = torch.randn(30, 128, requires_grad=True)
            assert same(step(model, x), step(compiled, x))
            y, (q, s) = model(x), weight._fp8
            weight._fp8 = 2 * q, s  # the graph uses the weight kept, here a doctored one
            assert torch.equal(compiled(x), 2 * y)
        opt.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Inductor's own form of the product would hand Hopper the scales in another order.
    assert torch.ops.aten._scaled_mm_v2.default not in torch._inductor.lowering.lowerings


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


# ---- The network ------------------------------------------------------------------------------


def test_use_fp8_switches_projections_mlps_and_experts_and_nothing_else():
    model = tiny(torch.float32, attention_bias=True)
    model.gates()[0].own = nn.Linear(16, 8)  # a hacker's
    keys, high = list(model.state_dict()), (nn.Linear, plain.Experts)
    before = {name: type(x) for name, x in model.named_modules() if type(x) in high}
    fp8.use_fp8(model)
    assert list(model.state_dict()) == keys
    for name, kind in before.items():
        inside = (".self_attn." in name or ".mlp" in name) and ".gate." not in name
        low = FP8Linear if kind is nn.Linear else fp8.FP8Experts
        assert type(model.get_submodule(name)) is (low if inside else kind), name


def test_a_network_in_fp8_is_close_to_full_precision():
    """4 bits (E4M3) in every product: 10 to 17 % of the logits' norm over seeds, where gate and up
    exchanged, or forgotten gate values, make 46 % and more."""
    model = calm().train()
    tokens = tokens_of(model, 2, 8)

    def logits_losses_gradients():
        logits, losses = in_bf16(model, tokens).detach(), in_bf16(model, tokens, tokens).values()
        return [logits, *losses, *torch.autograd.grad(sum(losses), list(model.parameters()))]

    exact = logits_losses_gradients()
    fp8.use_fp8(model)
    results = logits_losses_gradients()
    logits, *losses = (error(a, b) for a, b in zip(results[:4], exact[:4], strict=True))
    assert 0.02 < logits < 0.3 and max(losses) < 0.1
    assert all(x.isfinite().all() and x.norm() > 0 for x in results)
