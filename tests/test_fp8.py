"""fp8.py against a loop over tiles and float64: the quantiser, the three products of a linear layer
against the same arithmetic in float64, on the CPU and as the tensor cores are given them, the life
of a quantised weight, and what FP8 costs a network."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fp8
import model
from fp8 import BLOCK, TILE, FP8Linear, dequantize, quantize, quantized_once

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


class Experts(model.Experts):
    """Each row goes to an expert of its own choice."""

    product, unit = staticmethod(fp8.grouped_fp8), 128

    def __init__(self, E, D, width):
        nn.Module.__init__(self)
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * width, D) * D**-0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, width) * width**-0.5)

    def forward(self, x):
        chosen = torch.arange(len(x))[:, None] % len(self.down_proj)
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
@pytest.mark.parametrize("block", [TILE, BLOCK])
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
        if pow2:
            assert torch.equal(decoded, dequantize(q, s, block, BF16).float())  # exact in bf16
            assert (torch.frexp(s).mantissa == 0.5).all()
    subnormal = torch.full((1, 128), 1e-43)  # a 448th of it is 0
    assert dequantize(*quantize(subnormal, block, pow2), block).isfinite().all()
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(256, 256)
        x[3, 5] = bad
        lost = dequantize(*quantize(x, block, pow2), block).isnan()
        rows, columns = (
            slice(i, i + 1) if n == 1 else slice(128) for i, n in ((3, block[0]), (5, block[1]))
        )
        assert lost[rows, columns].all()  # the whole tile: its scale is lost
        assert lost.sum() == lost[rows, columns].numel()


# ---- The three products -----------------------------------------------------------------------


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
        assert not any((*swizzle_a, *swizzle_b)) and bias is None  # 0: no swizzle
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


@pytest.fixture(params=["emulated", "operands"])
def products(request, monkeypatch):
    """How products are made: as on a CPU, or with the operands that cuBLAS would get."""
    if request.param == "emulated":
        yield
        return
    monkeypatch.setattr(fp8, "has_blockwise_fp8", lambda device: True)
    for name in ("multiply_each", "weight_gradient_each"):  # their insides, for TensorCores to see
        monkeypatch.setattr(fp8, name, getattr(fp8, name)._init_fn)
    with TensorCores():
        yield


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
@pytest.mark.parametrize("T,K,N", [(130, 200, 140), (1, 128, 128)])
def test_products(T, K, N, dtype, autocast, products):
    check_products(T, K, N, dtype, autocast, torch.device("cpu"), fp32=2e-6)


def test_factors_of_different_widths_are_refused(products):
    """Padded for cuBLAS, both would be 128 wide."""
    x, w = fp8.to_fp8(torch.randn(3, 100), TILE), fp8.to_fp8(torch.randn(5, 120), BLOCK)
    with pytest.raises(ValueError, match="x has 100 features, but the weight expects 120"):
        fp8.multiply(x, w, torch.float32)


def check_products(T, K, N, dtype, autocast, device, fp32):
    """A layer against the reference. fp32: the error of sums."""
    low = BF16 if autocast else dtype
    layer, x = FP8Linear(K, N), torch.randn(T, K).to(dtype)
    dy = (torch.randn(T, N) * torch.randn(T, 1).exp()).to(low)
    with torch.autocast(device.type, BF16, enabled=autocast):  # no bits lost in backward either
        results = step(layer.to(device), x.to(device), dy.to(device))
    *got, dw = (z.cpu() for z in results)
    assert [z.dtype for z in got] == [low, dtype] and dw.dtype == torch.float32
    layer.cpu()
    *want, want_dw = reference_products(x, layer.weight, dy)
    assert error(dw, want_dw) < fp32
    ulp = 2.0**-8 if low == BF16 else 0  # half a unit of the last place, plus a sum that cancels
    for g, tight in zip(got, want, strict=True):
        bound = ulp * tight.abs() + 5 * fp32 * tight.abs().max()
        assert ((g.double() - tight).abs() <= bound).all()
        assert ulp or error(g, tight) < fp32


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("counts", [[0, 5, 130, 1], [0, 128, 384, 0, 128, 0], [0, 0]])
def test_each_expert_is_a_linear_layer(counts, dtype, products):
    check_experts(counts, dtype, torch.device("cpu"), fp32=2e-6)


def check_experts(counts, dtype, device, fp32):
    """Rows, results and gradients of an expert are those of an FP8Linear of its own."""
    whole = [-(-n // 128) * 128 for n in counts]  # rows, which are zeros beyond the count
    real = torch.cat([torch.arange(rows) < n for rows, n in zip(whole, counts, strict=True)])
    weight = nn.Parameter(torch.randn(len(counts), 96, 700, device=device) * 0.05)
    x, dy = (torch.randn(len(real), n) * real[:, None] for n in (700, 96))
    x, dy = x.to(device, dtype).requires_grad_(), dy.to(device, dtype)
    y = fp8.grouped_fp8(x, weight, torch.tensor(whole, device=device))
    dx, dw = torch.autograd.grad(y, [x, weight], dy)
    assert y.shape == dy.shape and y.dtype == dx.dtype == dtype and dw.dtype == torch.float32
    tolerance = dict(rtol=2.0**-7 if dtype == BF16 else 5 * fp32, atol=20 * fp32)
    by_expert = zip(*(z[real].split(counts) for z in (x, dy, y, dx)), strict=True)
    for w, dw_e, (x_e, dy_e, *found) in zip(weight, dw, by_expert, strict=True):
        layer = FP8Linear(700, 96, device=device)
        layer.weight = nn.Parameter(w.detach())
        for ours, alone in zip((*found, dw_e), step(layer, x_e, dy_e), strict=True):
            torch.testing.assert_close(ours.float(), alone.float(), **tolerance)


# ---- The quantised weight ---------------------------------------------------------------------


def test_weights_are_quantised_once_and_not_a_bit_changes(monkeypatch):
    calls, model, x = [], network(), torch.randn(6, 128)

    def counting(x, block, **options):
        calls.extend([x.shape] * (block == BLOCK))
        return quantize(x, block, **options)

    monkeypatch.setattr(fp8, "quantize", counting)
    plain = step(model, x)
    assert len(calls) == 3 + 3  # outside: in forward and in backward
    with torch.no_grad():
        assert error(model(x[:1]), plain[0][:1]) < 1e-6  # few tokens without gradients, too
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
    with quantized_once(model):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert cached(model) == []  # of weights that have changed


# ---- Company: compile, DDP, FSDP --------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [FP8Linear(128, 64), Experts(2, 128, 32)], ids=["linear", "experts"]
)
def test_compiles_into_one_graph(part):
    part, counters = copy.deepcopy(part), torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    opt = torch.optim.AdamW(part.parameters(), lr=0.1, fused=True)
    *_, weight = part.parameters()
    for _ in range(3):
        with quantized_once(part):
            x = torch.randn(30, 128, requires_grad=True)
            assert same(step(part, x), step(compiled, x))
            (q, s), y = weight._fp8, part(x)
            weight._fp8 = fp8.Quantized(q, 2 * s)  # the graph uses the weight kept, here doctored
            assert torch.equal(compiled(x), 2 * y)
        opt.step()
    assert counters["stats"]["unique_graphs"] == 1
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


def tiny(**changes) -> model.DeepSeekV3:
    """A network whose tokens go to all experts, so that no rounding changes a choice."""
    torch.manual_seed(0)
    network = model.DeepSeekV3(
        model.ModelConfig(
            vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
            topk_group=1, num_experts_per_tok=4, num_nextn_predict_layers=1, **changes,
        )
    )  # fmt: skip
    for x in network.parameters():
        if x.ndim > 1:
            nn.init.normal_(x, std=0.7 * x.shape[-1] ** -0.5)
    return network


def losses_and_gradients(network, device="cpu"):
    x = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
    losses = network(x[:, :-1], x[:, 1:]).values()
    named = {n: p for n, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sum(losses), list(named.values()))
    return torch.stack([*losses]), dict(zip(named, gradients, strict=True))


def together(gradients):
    return torch.cat([x.flatten().cpu().double() for x in gradients.values()])


def test_projections_and_experts_are_switched_and_nothing_else():
    network = tiny(attention_bias=True)
    network.gates()[0].own = nn.Linear(32, 8)  # a hacker's
    network.layers[1].self_attn.adapter = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 32))
    network.mtp[0].block.mlp.experts.__class__ = type("OwnExperts", (model.Experts,), {})
    keys, linear = list(network.state_dict()), nn.Linear
    before = {name: type(x) for name, x in network.named_modules()}
    fp8.use_fp8(network)
    assert list(network.state_dict()) == keys
    for name, x in network.named_modules():
        inside = before[name] is linear and (".self_attn." in name or ".mlp" in name)
        inside &= ".gate." not in name
        assert type(x) is (FP8Linear if inside else before[name]), name
        if isinstance(x, model.Experts):
            assert x.product is fp8.grouped_fp8 and x.unit == 128
    assert network.layers[0].self_attn.o_proj(torch.ones(1, 16, dtype=BF16)).dtype == BF16


def test_training_is_close_to_full_precision():
    """4 bits (E4M3) in every product change the losses by 0.2 to 0.5 % here, and all gradients
    together by 14 to 21 % of their length."""
    network = tiny()
    exact, exact_gradients = losses_and_gradients(network)
    fp8.use_fp8(network)
    losses, gradients = losses_and_gradients(network)
    assert error(losses, exact) < 0.02
    assert 0.01 < error(together(gradients), together(exact_gradients)) < 0.3


@pytest.mark.parametrize("capability, cuda, right", [
    ((9, 0), "12.9", True), ((9, 0), "13.2", True), ((9, 0), "12.8", False),
    ((10, 0), "12.9", False), ((9, 0), None, False),
])  # fmt: skip
def test_which_cards_multiply_fp8_by_tiles(capability, cuda, right, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert fp8.has_blockwise_fp8(torch.device("cuda", 0)) is right
