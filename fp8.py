"""FP8 training with fine-grained scaling: section 3.3 of DeepSeek-V3 (arXiv 2412.19437).

A linear layer y = x W^T is three matrix products, and the report runs all three in FP8 (E4M3):

    forward          y  = x W^T       x in 1x128 tiles along K      W in 128x128 blocks
    input gradient   dx = dy W        dy in 1x128 tiles along N     the same blocks, transposed
    weight gradient  dW = dy^T x      dy and x in 1x128 tiles along the tokens T

    T tokens (all leading dimensions as one), K in_features, N out_features, E experts
    q an E4M3 tensor, s the fp32 factors that decode it: x ~ q * s, one factor per tile
    D hidden size, F expert width, as in model.py (outside comments F is torch.nn.functional)

E4M3 has 4 significant bits and spans 2^-9 .. 448, so a scale shared by a whole tensor loses the
tokens that are 1e5 times smaller than the largest. One scale per 128 numbers loses none, and
the partial product of 128 numbers is multiplied by its two scales and added up in fp32.
Master weight and weight gradient are fp32; y and dx have the compute dtype (bf16).

Every scale of a product is a power of two. The report does that for the inputs of experts and of
the projection after attention (section 3.3.3), because turning 1x128 tiles into 128x1 tiles then
loses only what is too small for the new tile; DeepSeek-V3.1 does it throughout. On Gaussian data
the error is 3.7 %, 0.1 points more than with other scales. In return bf16 holds the decoded numbers
exactly. So machines without such products emulate them: they multiply the numbers that Hopper
multiplies, slowly. On Hopper FP8 can be faster from widths of about 2000, with thousands of tokens.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

import model as formulas
from support.ops import (
    by_expert,
    compute_dtype,
    fast_dtype,
    fingerprint,
    fused,
    on_gpu,
    swiglu32,
    swiglu_gradients,
)
from support.settings import Refusal, info

TILE = (1, 128)  # activations and gradients: one scale per token and 128 channels
COLUMN = (128, 1)  # the same two for the weight gradient, whose sums run over the tokens
BLOCK = (128, 128)  # weights: coarser, but the transpose of a block is a block
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
Quantized = tuple[Tensor, Tensor]  # (q, s)
Rows = list[int] | Tensor  # of each expert; a tensor (E,) on the CPU in a graph that is compiled
# What this file computes in place of model.py, and the digits of its source (ops.fast_twin) when
# the classes below were written.
COPIED = {
    "swiglu": "ba8bfa06",
    "MLP.forward": "2bbfa2a3",
    "Experts.forward": "787195ef",
    "routed_ffn": "e6cc3e80",
}
_emulated: set[torch.device] = set()  # devices for which has_blockwise_fp8 has said so


# ---- Quantiser --------------------------------------------------------------------------------


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Cuts (..., M, K), zero-padded at the edges, into (..., M/bm, bm, K/bk, bk), where bm and bk
    are the block's height and width. Raises ValueError for other blocks than the three."""
    if tuple(block) not in (TILE, COLUMN, BLOCK) or x.ndim < 2:
        given = f"x has shape {tuple(x.shape)} and block is {block}"
        takes = f"(..., M, K), so x[None] for a row, and {TILE}, {COLUMN} or {BLOCK}"
        raise ValueError(f"{given}; use {takes}.")
    (bm, bk), (M, K) = block, x.shape[-2:]
    if M % bm or K % bk:
        x = F.pad(x, (0, -K % bk, 0, -M % bm))
    return x.reshape(*x.shape[:-2], -(-M // bm), bm, -(-K // bk), bk)


@fused
def quantize(
    x: Tensor, block: tuple[int, int], pow2: bool = False, decode: bool = False
) -> Quantized:
    """x (..., M, K) -> q (..., M, K) in E4M3 and s (..., ceil(M/bm), ceil(K/bk)) in fp32, x ~ q s.

    Leading dimensions are separate matrices: stacked experts never share a block. The scale comes
    from the current maximum (section 3.3.2, "Online Quantization") and is 1 for a tile of zeros;
    pow2 rounds it up to a power of two. A tile that holds a NaN or an infinity decodes to NaN.
    decode: in place of the codes q has the numbers that these stand for, q s, in fp32.
    Raises ValueError for another block than TILE, (1, 128), COLUMN, (128, 1), or BLOCK, (128, 128).
    """
    tiles = _tiles(x.float(), block)
    amax = tiles.abs().amax((-3, -1))  # (..., M/bm, K/bk)
    # 2^-126 only avoids subnormals. A larger floor such as 1e-4 would ruin gradients of size 1e-9.
    s = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp(min=2.0**-126))
    if pow2:  # exact: any bit of the mantissa carries into the exponent; then the mantissa is cut
        bits = (s.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF
        s = torch.where(s.isnan(), s, bits.view(torch.float32))
    q = tiles / s[..., :, None, :, None]  # even 448 (1 + 2^-23) is rounded to 448
    q = _round(q).mul_(s[..., :, None, :, None]) if decode else q.to(E4M3)
    q = q.flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]]
    return (q if decode else q.contiguous()), s  # Hopper's products take dense codes


def _round(x: Tensor) -> Tensor:
    """x.to(E4M3).float() in place, for x in fp32, at most 448: in a quarter of the time.

    From e = -6 on, E4M3 has the multiples of 2^(e-3) between 2^e and 2^(e+1). Around 1.5 * 2^(e+20)
    fp32 has these multiples, too, and none between them. So adding 1.5 * 2^(e+20) to x rounds it to
    one of E4M3's numbers, and subtracting it again gives that number.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-6)  # 2^e
    return x.add_(power, alpha=1.5 * 2**20).sub_(power, alpha=1.5 * 2**20)


@fused
def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int], dtype=torch.float32) -> Tensor:
    """q (..., M, K), scale (..., ceil(M/bm), ceil(K/bk)) -> q * scale (..., M, K). bf16, too, holds
    it exactly if scales are powers of two. Raises ValueError where the shapes do not fit."""
    tiles = _tiles(_decoded(q, dtype), block)
    shape, expected = tuple(scale.shape), (*tiles.shape[:-3], tiles.shape[-2])
    if shape != expected:
        raise ValueError(
            f"scale is {shape}, but q {tuple(q.shape)} in {block} blocks needs {expected}."
        )
    x = tiles * scale.to(dtype)[..., :, None, :, None]
    return x.flatten(-4, -3).flatten(-2)[..., : q.shape[-2], : q.shape[-1]]


def _decoded(q: Tensor, dtype: torch.dtype) -> Tensor:
    """q.to(dtype), on a CPU by a table of the 256 codes, in a fifth of the time."""
    if q.device.type != "cpu" or q.dtype != E4M3:
        return q.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype)
    return table.index_select(0, q.reshape(-1).view(torch.uint8).int()).view(q.shape)


# ---- Products: one meaning, two ways to multiply ----------------------------------------------
#
# A factor of a product is (q, s), q in E4M3. Where products are emulated q is decoded already, in
# fp32, and s is not read.
#
# Experts are multiplied one by one: expert e has the next rows[e] rows of x (T, K), a multiple of
# 128, so that no tile, also along the tokens, belongs to two experts. A linear layer is one expert
# with any number of rows.


def _factor(x: Tensor, block: tuple[int, int]) -> Quantized:
    """x quantised for a product, by powers of two."""
    return quantize(x, block, pow2=True, decode=not has_blockwise_fp8(x.device))


def _numbers(q: Tensor, s: Tensor, block: tuple[int, int], dtype=torch.float32) -> Tensor:
    """What a factor (q, s) stands for."""
    return dequantize(q, s, block, dtype) if q.dtype == E4M3 else q.to(dtype)


def multiply(x: Quantized, w: Quantized, rows: Rows, dtype: torch.dtype) -> Tensor:
    """x (T, K) in tiles, w (E, N, K) in blocks -> (T, N): every x_e W_e^T, in dtype.

    Sums are in fp32. Raises ValueError where x and W have different K.
    """
    if isinstance(rows, Tensor):
        return _multiply(*x, *w, rows, dtype)
    device, K, wide = x[0].device, x[0].shape[1], w[0].shape[2]
    if wide != K:  # 100 and 120 would agree once they are padded for Hopper
        raise ValueError(f"x has {K} features but the weight {wide}; give it as many.")
    if has_blockwise_fp8(device):
        return _hopper_multiply(x, w, rows, dtype)
    # bf16 holds these numbers exactly, so it is taken where it is fast (not on CUDA: that might
    # add up in bf16).
    fast = dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bf16(device)
    exact = torch.bfloat16 if fast else torch.float32
    x, w = _numbers(*x, TILE, exact), _numbers(*w, BLOCK, exact)
    with torch.autocast(device.type, enabled=False):
        y = [x_e @ w_e.t() for x_e, w_e in zip(x.split(rows), w, strict=True)]
    return torch.cat(y).to(dtype)


def weight_gradient(dy: Quantized, x: Quantized, rows: Rows) -> Tensor:
    """dy (T, N), x (T, K), both in columns -> (E, N, K) in fp32: every dy_e^T x_e."""
    if isinstance(rows, Tensor):
        return _weight_gradient(*dy, *x, rows)
    device = dy[0].device
    if has_blockwise_fp8(device):
        return _hopper_weight_gradient(dy, x, rows)
    dy, x = _numbers(*dy, COLUMN), _numbers(*x, COLUMN)
    with torch.autocast(device.type, enabled=False):
        pairs = zip(dy.split(rows), x.split(rows), strict=True)
        return torch.stack([dy_e.t() @ x_e for dy_e, x_e in pairs])


# In a graph that is compiled no number is known: there rows is a tensor, and each of these is one
# operation, whose inside the compiler does not see.


@torch.library.custom_op("nanov3::multiply", mutates_args=())
def _multiply(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    return multiply((xq, xs), (wq, ws), rows.tolist(), dtype).contiguous()


@torch.library.custom_op("nanov3::weight_gradient", mutates_args=())
def _weight_gradient(dq: Tensor, ds: Tensor, xq: Tensor, xs: Tensor, rows: Tensor) -> Tensor:
    return weight_gradient((dq, ds), (xq, xs), rows.tolist()).contiguous()


@_multiply.register_fake
def _(xq, xs, wq, ws, rows, dtype):
    return xq.new_empty(len(xq), wq.shape[1], dtype=dtype)


@_weight_gradient.register_fake
def _(dq, ds, xq, xs, rows):
    return ds.new_empty(len(rows), dq.shape[1], xq.shape[1])


def _whole(q: Tensor, s: Tensor, block: tuple[int, int]) -> Quantized:
    """Both sides up to multiples of 128, by zeros."""
    right, below = -q.shape[-1] % 128, -q.shape[-2] % 128
    if right or below:  # as bytes, since padding is not written for float8; 0 is 0.0
        q = F.pad(q.view(torch.uint8), (0, right, 0, below)).view(E4M3)
        alone = [n == 1 for n in block]  # a row or a column that has its own scale
        s = F.pad(s, (0, right * alone[1], 0, below * alone[0]), value=1.0)
    return q, s


def _hopper_multiply(x: Quantized, w: Quantized, rows: list[int], dtype: torch.dtype) -> Tensor:
    """multiply by cuBLAS, which wants all sizes in multiples of 128.

    A row of x and of W has L = K/128 scales. Those of x_e lie column by column, (L, rows) in
    memory; those of W_e row by row, L rounded up to a multiple of 4. cuBLAS takes that for granted:
    from unpadded scales it computes wrong numbers, without an error.
    """
    T, N = len(x[0]), w[0].shape[1]
    (xq, xs), (wq, ws) = _whole(*x, TILE), _whole(*w, BLOCK)
    wq = wq.contiguous()  # it may be a transposed weight
    rows, L = rows if len(rows) > 1 else [len(xq)], xs.shape[1]
    xs = xs.view(-1, 128, L).mT.reshape(-1, 128)  # (T/128 * L, 128), an expert's tile by tile
    if len(rows) > 1:  # column by column
        place = np.arange(len(xs)).reshape(-1, L)
        ends = np.cumsum(rows) // 128
        order = np.concatenate([z.T.ravel() for z in np.split(place, ends[:-1])])
        xs = xs.index_select(0, torch.from_numpy(order).to(xs.device))
    else:
        xs = xs.view(-1, L, 128).transpose(0, 1)
    xs, ws = xs.flatten(), (F.pad(ws, (0, -L % 4), value=1.0) if L % 4 else ws).contiguous()
    y, begin = xq.new_empty(len(xq), wq.shape[1], dtype=_direct(dtype)), 0
    for wq_e, ws_e, n in zip(wq, ws, rows, strict=True):
        at, begin = slice(begin, begin + n), begin + n
        s = xs[at.start * L : at.stop * L].view(L, n).t()
        y = _hopper_mm(xq[at], s, wq_e.t(), ws_e.t(), BY_BLOCK, y, at)
    return y[:T, :N].to(dtype)


def _hopper_weight_gradient(dy: Quantized, x: Quantized, rows: list[int]) -> Tensor:
    """weight_gradient by cuBLAS: as rows of dy^T times columns of x."""
    N, K = dy[0].shape[1], x[0].shape[1]
    (dq, ds), (xq, xs) = _whole(*dy, COLUMN), _whole(*x, COLUMN)
    rows = rows if len(rows) > 1 else [len(xq)]
    dq, xq = dq.t().contiguous(), xq.t().contiguous()  # (N, T), (K, T); see _by_column
    dw, begin = ds.new_empty(len(rows), len(dq), len(xq)), 0
    for e, n in enumerate(rows):
        at, begin = slice(begin, begin + n), begin + n
        tiles = slice(at.start // 128, at.stop // 128)
        scales = ds[tiles].t(), xs[tiles].t()
        dw = _hopper_mm(dq[:, at], scales[0], xq[:, at].t(), scales[1], BY_TILE, dw, e)
    return dw.view(len(rows), len(dq), len(xq))[:, :N, :K]


BY_TILE, BY_BLOCK = 4, 5  # cuBLAS's numbers for a scale per 1x128 numbers, and per 128x128


def _direct(dtype: torch.dtype) -> torch.dtype:  # what cuBLAS can return
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _hopper_mm(a: Tensor, s_a: Tensor, b: Tensor, s_b: Tensor, recipe: int, y: Tensor, at):
    """A B for A (M, K) with a scale per tile, and B (K, N) with a scale as recipe says: written to
    y[at], or returned, which compilers prefer, where it is all of y."""
    if 0 in a.shape or 0 in b.shape:
        y[at] = 0
        return y
    rest = [s_a], [BY_TILE], [], [s_b], [recipe], [], None, y.dtype, [], False
    product = torch.ops.aten._scaled_mm_v2
    if a.shape[0] * b.shape[1] == y.numel():
        return product.default(a, b, *rest)
    product.out(a, b, *rest, out=y[at])
    return y


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is the fast format; a function of its own, for tell_compiler."""
    return fast_dtype(device)[0] == torch.bfloat16


def has_blockwise_fp8(device: torch.device) -> bool:
    """Whether this device multiplies FP8 with a scale per tile itself; says once if it does not."""
    hopper = (
        device.type == "cuda"
        and torch.version.cuda is not None  # AMD's cards number their generations alike
        and torch.cuda.get_device_capability(device) == (9, 0)
        and tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 9)
    )
    if not hopper and device not in _emulated:
        _emulated.add(device)
        info(f"fp8: emulated on {device}: exact, slow (Hopper, CUDA 12.9: fast)")
    return hopper


# ---- A linear layer, alone or per expert ------------------------------------------------------


class _FP8Linear(torch.autograd.Function):
    """Y_e = X_e W_e^T for the rows X_e of every expert e; a plain linear layer is one expert.

    X (T, K) is x or, where `up` is given, SwiGLU: silu(x) * up * gain. The report keeps the input
    of SwiGLU in FP8 and recomputes its output X in backward (section 3.3.3), where the weight
    gradient needs it. So both are one function here. It keeps x and up, 2 bytes per token and
    channel; apart they would keep x, silu(x), up and X in bf16, 8 bytes. (The emulation keeps x and
    up in fp32, so it saves nothing.) In the code X is a pair (q, s): `forward` quantises it in
    tiles, `backward` once more, along the tokens.

    wq and ws are the quantised weight where quantized_once holds it. Else forward and backward
    quantise the weight each, so that no copy outlives FSDP's release of a gathered weight.
    """

    @staticmethod
    def forward(ctx, x, up, gain, weight, wq, ws, rows: Rows):
        X = kept = _factor(x, TILE)  # kept: what backward decodes, x and up if given
        if up is not None:
            kept = (*kept, *_factor(up, TILE))
            X = _quantized_swiglu(x, up, gain)
        ctx.save_for_backward(weight, wq, ws, gain, *kept)
        ctx.rows = rows
        return multiply(X, _stacked(weight, wq, ws), rows, compute_dtype(x))  # (T, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        weight, wq, ws, gain, *kept = ctx.saved_tensors
        need_dx, need_dw = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3]
        dx = d_up = d_gain = dw = None
        tiles, columns = _both_ways(dy, need_dx, need_dw)
        if need_dx:
            q, s = _stacked(weight, wq, ws)
            dx = multiply(tiles, (q.mT, s.mT), ctx.rows, dy.dtype)
            if len(kept) > 2:  # that was the gradient of X
                dx, d_up, d_gain = _gradients_of_swiglu(dx, *kept, gain)
        if need_dw:
            X = _columns(*kept, gain=gain)
            dw = weight_gradient(columns, X, ctx.rows).view_as(weight)
        return dx, d_up, d_gain, dw, None, None, None


@fused
def _both_ways(dy: Tensor, tiles: bool, columns: bool) -> tuple[Quantized | None, Quantized | None]:
    """dy, read once, in tiles and in columns, as far as they are needed."""
    return _factor(dy, TILE) if tiles else None, _by_column(dy) if columns else None


def _by_column(x: Tensor) -> Quantized:
    """Quantised along the tokens. Hopper multiplies it transposed, so it is written that way."""
    q, s = _factor(x, COLUMN)
    return (q.t().contiguous().t() if on_gpu(x) else q), s


@fused
def _quantized_swiglu(x: Tensor, up: Tensor, gain: Tensor | None) -> Quantized:
    return _factor(swiglu32(x, up, gain), TILE)


@fused
def _gradients_of_swiglu(dX: Tensor, xq, xs, upq, ups, gain: Tensor | None):
    """Of x, up and gain, from the gradient of X."""
    x, up = _numbers(xq, xs, TILE), _numbers(upq, ups, TILE)
    dx, d_up, d_gain = swiglu_gradients(dX, x, up, gain)
    return dx.to(dX.dtype), d_up.to(dX.dtype), d_gain


@fused
def _columns(xq: Tensor, xs: Tensor, upq=None, ups=None, gain=None) -> Quantized:
    """X from what forward has kept, quantised along the tokens."""
    X = _numbers(xq, xs, TILE)  # (T, K)
    if upq is not None:
        X = swiglu32(X, _numbers(upq, ups, TILE), gain)
    return _by_column(X)


def _stacked(weight: Tensor, q: Tensor | None, s: Tensor | None) -> Quantized:
    """The weight, quantised here if it is not yet, as (E, N, K) also where E is 1."""
    w = _factor(weight, BLOCK) if q is None else (q, s)
    return w if weight.ndim == 3 else (w[0][None], w[1][None])


def _linear(x: Tensor, weight: Tensor, rows: Rows | None = None, up=None, gain=None) -> Tensor:
    """x (..., K) -> (..., N), or (T, K) -> (T, N) with `rows` of each expert; see _FP8Linear."""
    flat = x.reshape(-1, x.shape[-1])  # (T, K)
    up = None if up is None else up.reshape(flat.shape)
    wq, ws = getattr(weight, "_fp8", (None, None))
    y = _FP8Linear.apply(flat, up, gain, weight, wq, ws, [len(flat)] if rows is None else rows)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# ---- Modules ----------------------------------------------------------------------------------
#
# Those of model.py with FP8 arithmetic. `module.__class__ = FP8Linear` turns one into the other:
# parameters stay as they are. Results have autocast's dtype or, without autocast, that of x.


class FP8Linear(nn.Linear):
    """y = x W^T + b with all three products in FP8: x (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **factory):
        tell_compiler()
        super().__init__(in_features, out_features, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y = _linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FP8MLP(nn.Module):
    """model.MLP: W_down (silu(W_gate x) * W_up x), whose projections are FP8Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self.gate_proj(x), self.down_proj.weight, up=self.up_proj(x))


class FP8Experts(nn.Module):
    """model.Experts, the routed experts: gate_up_proj (E, 2F, D), down_proj (E, D, F)."""

    def forward(self, x: Tensor, chosen: Tensor, gain: Tensor) -> Tensor:
        """x (T, D), chosen experts and their gate values (T, K) -> (T, D)."""
        return by_expert(x, chosen, gain, len(self.down_proj), self.ffn, multiple=128)

    def ffn(self, x: Tensor, counts: Tensor, gain: Tensor) -> Tensor:
        """x (rows, D) sorted by expert, counts (E,) of each expert's rows, gate values (rows,) ->
        (rows, D)."""
        rows = rows_of(counts)
        gate, up = _linear(x, self.gate_up_proj, rows).chunk(2, dim=-1)  # (rows, F) each
        return _linear(gate, self.down_proj, rows, up, gain)


def rows_of(counts: Tensor) -> Rows:
    """How many rows each expert has: in a layer the one thing that the host waits for."""
    rows = counts.cpu()
    return rows if torch.compiler.is_compiling() else rows.tolist()


@functools.cache
def tell_compiler():
    """What torch.compile must know, told when FP8 is first used: importing that takes seconds."""
    from torch._inductor.lowering import lowerings

    # Else torch 2.13 compiles it to _scaled_mm, which reads scales in another order.
    lowerings.pop(torch.ops.aten._scaled_mm_v2.default, None)
    torch.compiler.assume_constant_result(has_blockwise_fp8)
    torch.compiler.assume_constant_result(multiplies_bf16)


def use_fp8(model: nn.Module):
    """Section 3.3.1: the products of attention projections and FFNs in FP8. Embedding, head, norms,
    attention core, eh_proj and gates, with all that these contain, stay in high precision.

    Raises Refusal where a formula of model.py that this file copies is edited.
    """
    for name, digits in COPIED.items():
        found = fingerprint(attrgetter(name)(formulas))
        if found != digits:
            raise Refusal(
                f"model.{name} is not the one that fp8.py copies: leave out --fp8, or edit the "
                f"copy in fp8.py alike and write its digits there, {found} in place of {digits}"
            )
    tell_compiler()
    swap = {nn.Linear: FP8Linear, formulas.MLP: FP8MLP, formulas.Experts: FP8Experts}
    for block in [*model.layers, *(module.block for module in model.mtp)]:
        gates = {part for gate in formulas.gates_in(block) for part in gate.modules()}
        for module in block.modules():
            if module in gates:
                continue
            if type(module) is formulas.MLP:
                down = module.down_proj
                if type(down) is not nn.Linear or down.bias is not None:
                    continue  # an adapter, say: FP8MLP would use its weight alone
            module.__class__ = swap.get(type(module), type(module))


# ---- One quantisation of the weights per step -------------------------------------------------


@contextmanager
def quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantises the weights once, for all that runs within `with quantized_once(model):`.

    The weights must not change there: put it around the micro-batches of a step, before
    optimizer.step(), or around an evaluation. (An optimiser's step within it ends the caching.)
    Outside it every forward and backward quantises the weight that it finds. No cache could tell
    by itself when a weight changes, since fused optimisers and `p.data` edits leave no trace.
    FSDP's weights, gathered anew for every forward, are left alone.
    """
    modules = [m for m in model.modules() if isinstance(m, FP8Linear | FP8Experts)]
    weights = [w for m in modules for w in m.parameters(recurse=False) if w.ndim > 1]  # no biases
    weights = [w for w in weights if type(w) is nn.Parameter]  # FSDP's are DTensors

    def forget(*_) -> None:
        for weight in weights:
            weight.__dict__.pop("_fp8", None)

    hook = register_optimizer_step_post_hook(forget)
    try:
        for weight in weights:
            weight._fp8 = _factor(weight.detach(), BLOCK)
        yield
    finally:
        hook.remove()
        forget()
