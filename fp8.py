"""FP8 training with fine-grained scaling: section 3.3 of DeepSeek-V3 (arXiv 2412.19437).

A linear layer y = x W^T is three matrix products, and the report runs all three in FP8 (E4M3):

    forward          y  = x W^T       x in 1x128 tiles along K       W in 128x128 blocks
    input gradient   dx = dy W        dy in 1x128 tiles along N      the same blocks, transposed
    weight gradient  dW = dy^T x      dy^T and x^T in 1x128 tiles along the tokens T

    T tokens (all leading dimensions as one), K in_features, N out_features, E experts
    q an E4M3 tensor, s the fp32 factors that decode it: x ~ q * s, one factor per tile
    (outside comments F is torch.nn.functional)

E4M3 has 4 significant bits and spans 2^-9 .. 448. With a single scale for a whole tensor, tokens
1e5 times smaller than the largest would be lost; with one scale per 128 numbers they are not. Each
partial product of 128 numbers is multiplied by its two scales and accumulated in fp32. Master
weights and weight gradients are fp32; y and dx have the compute dtype (bf16).

All scales in products are powers of two. The report rounds scales this way for the inputs of
experts and of the projection after attention (section 3.3.3), so that turning 1x128 tiles into
128x1 tiles loses only numbers too small for the new tile; DeepSeek-V3.1 does it throughout. On
Gaussian data the error is 3.7 %, 0.1 points more than with unrounded scales. In return, bf16 holds
the decoded numbers exactly, so a machine without FP8 products can emulate them: it multiplies the
same numbers as Hopper does.

This file shows, on any machine, how FP8 changes the loss. It does not save time: the emulation is
slow, and on Hopper the experts' products run one after another, since PyTorch 2.15 has no grouped
product with these scales. For the backward pass, the report keeps the inputs of linear layers and
of SwiGLU in FP8 (section 3.3.3). Here the inputs of SwiGLU stay in the compute dtype.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from model import Experts, compute_dtype, gates_in, grouped_linear
from support.processes import fast_dtype
from support.settings import info

TILE = (1, 128)  # activations and gradients: one scale per token and 128 channels
BLOCK = (128, 128)  # weights: coarser, but the transpose of a block is a block
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
_emulated: set[torch.device] = set()  # devices with the emulation message printed


class Quantized(NamedTuple):
    """A matrix in FP8: q (..., M, K), and s, one decoding factor for each tile or block."""

    q: Tensor
    s: Tensor


# ---- Quantiser --------------------------------------------------------------------------------


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Cuts (..., M, K), zero-padded at the edges, into (..., M/bm, bm, K/bk, bk), where bm and bk
    are the block's height and width. Raises ValueError unless block is TILE or BLOCK."""
    if tuple(block) not in (TILE, BLOCK) or x.ndim < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and block is {block}; "
            f"expected x (..., M, K), so x[None] for a vector, and {TILE} or {BLOCK}."
        )
    (bm, bk), (M, K) = block, x.shape[-2:]
    if M % bm or K % bk:
        x = F.pad(x, (0, -K % bk, 0, -M % bm))
    return x.reshape(*x.shape[:-2], -(-M // bm), bm, -(-K // bk), bk)


def quantize(x: Tensor, block: tuple[int, int], pow2: bool = False) -> Quantized:
    """x (..., M, K) -> q (..., M, K) in E4M3 and s (..., ceil(M/bm), ceil(K/bk)) in fp32, x ~ q s.

    Leading dimensions are separate matrices: stacked experts never share a block. Scales come from
    the current maximum (section 3.3.2, "Online Quantization"); a tile of zeros has scale 1. pow2
    rounds scales up to powers of two. A tile with a NaN or an infinity decodes to NaN. Raises
    ValueError unless block is TILE, (1, 128), or BLOCK, (128, 128).
    """
    tiles = _tiles(x.contiguous(), block)
    amax = tiles.abs().amax((-3, -1)).float()  # (..., M/bm, K/bk)
    # 2^-126 only avoids subnormals. A larger floor such as 1e-4 would ruin gradients of size 1e-9.
    s = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp(min=2.0**-126))
    if pow2:  # exact: any bit of the mantissa carries into the exponent, then the mantissa is cut
        bits = (s.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF
        s = torch.where(s.isnan(), s, bits.view(torch.float32))
    # The largest possible quotient, 448 (1 + 2^-23), is still rounded to 448.
    q = (tiles.float() / s[..., :, None, :, None]).to(E4M3)
    return Quantized(_joined(q, x).contiguous(), s)


def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int], dtype=torch.float32) -> Tensor:
    """q (..., M, K), scale (..., ceil(M/bm), ceil(K/bk)) -> q * scale (..., M, K), which is exact
    in bf16, too, if scales are powers of two. Raises ValueError if the shapes do not match."""
    tiles = _tiles(_numbers(q, dtype), block)
    shape, expected = tuple(scale.shape), (*tiles.shape[:-3], tiles.shape[-2])
    if shape != expected:
        raise ValueError(
            f"scale is {shape}, but q {tuple(q.shape)} in {block} blocks needs {expected}."
        )
    return _joined(tiles * scale.to(dtype)[..., :, None, :, None], q)


def _joined(tiles: Tensor, x: Tensor) -> Tensor:
    """Joins tiles into a matrix in the shape of x, without the padding."""
    return tiles.flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]]


def _numbers(q: Tensor, dtype: torch.dtype) -> Tensor:
    """q.to(dtype). On a CPU a table of the 256 codes takes a fifth of the time."""
    if q.device.type != "cpu" or q.dtype != E4M3:
        return q.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype)
    return table.index_select(0, q.reshape(-1).view(torch.uint8).int()).view(q.shape)


def to_fp8(x: Tensor, block: tuple[int, int]) -> Quantized:
    """Quantises a factor of a product, with powers of two as scales."""
    return Quantized(*quantize(x, block, pow2=True))


# ---- Products: native on Hopper, emulated elsewhere --------------------------------------------


def multiply(x: Quantized, w: Quantized, dtype: torch.dtype) -> Tensor:
    """x (T, K) in tiles, w (N, K) in blocks -> x W^T (T, N) in dtype, accumulated in fp32. Raises
    ValueError if x and W differ in K."""
    K, wide = x.q.shape[1], w.q.shape[1]
    if wide != K:  # else 100 and 120 would both be padded to 128 for Hopper
        raise ValueError(f"x has {K} features, but the weight expects {wide}.")
    if has_blockwise_fp8(x.q.device):
        return _hopper_product(x, w, BLOCK, dtype)
    x, w = _decoded(x, TILE, dtype), _decoded(w, BLOCK, dtype)
    with torch.autocast(x.device.type, enabled=False):
        return (x @ w.t()).to(dtype)


def weight_gradient(dy: Quantized, x: Quantized) -> Tensor:
    """dy^T (N, T) and x^T (K, T), both in tiles along the tokens -> dy^T x (N, K) in fp32."""
    if has_blockwise_fp8(x.q.device):
        return _hopper_product(dy, x, TILE, torch.float32)
    dy, x = _decoded(dy, TILE), _decoded(x, TILE)
    with torch.autocast(x.device.type, enabled=False):
        return dy @ x.t()


def _decoded(x: Quantized, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of x, for a product whose result is rounded to dtype. bf16 holds them exactly and
    is used where it is fast, except on CUDA, which might accumulate in bf16."""
    device = x.q.device
    low = dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bf16(device)
    return dequantize(*x, block, torch.bfloat16 if low else torch.float32)


# The experts' products, one after another. Expert e has the next rows[e] of the T rows. Every
# rows[e] is a multiple of 128, so no tile belongs to two experts, not even one along the tokens.
# The host needs these numbers, and a compiled graph cannot pass them to it. So both functions are
# custom operations, which the compiler does not trace. `rows` (E,) is on the CPU.


@torch.library.custom_op("nanov3::multiply_each", mutates_args=())
def multiply_each(
    xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """x (T, K) in tiles, w (E, N, K) in blocks -> every x_e W_e^T, (T, N)."""
    n = rows.tolist()
    if has_blockwise_fp8(xq.device):
        x, w = map(Quantized, xq.split(n), xs.split(n)), map(Quantized, wq, ws)
        y = [_hopper_product(*pair, BLOCK, dtype) for pair in zip(x, w, strict=True)]
    else:  # decoded all at once
        x, w = _decoded(Quantized(xq, xs), TILE, dtype), _decoded(Quantized(wq, ws), BLOCK, dtype)
        with torch.autocast(xq.device.type, enabled=False):
            y = [x_e @ w_e.t() for x_e, w_e in zip(x.split(n), w, strict=True)]
    return torch.cat(y).to(dtype)


@torch.library.custom_op("nanov3::weight_gradient_each", mutates_args=())
def weight_gradient_each(dq: Tensor, ds: Tensor, xq: Tensor, xs: Tensor, rows: Tensor) -> Tensor:
    """dy^T (N, T) and x^T (K, T), both in tiles along the tokens -> every dy_e^T x_e, (E, N, K)."""
    n, tiles = rows.tolist(), (rows // 128).tolist()
    if has_blockwise_fp8(xq.device):
        dy = map(Quantized, dq.split(n, 1), ds.split(tiles, 1))
        x = map(Quantized, xq.split(n, 1), xs.split(tiles, 1))
        dw = [_hopper_product(*pair, TILE, torch.float32) for pair in zip(dy, x, strict=True)]
    else:
        dy, x = _decoded(Quantized(dq, ds), TILE), _decoded(Quantized(xq, xs), TILE)
        with torch.autocast(xq.device.type, enabled=False):
            pairs = zip(dy.split(n, 1), x.split(n, 1), strict=True)
            dw = [dy_e @ x_e.t() for dy_e, x_e in pairs]
    return torch.stack(dw)


@multiply_each.register_fake
def _(xq, xs, wq, ws, rows, dtype):
    return xq.new_empty(len(xq), wq.shape[1], dtype=dtype)


@weight_gradient_each.register_fake
def _(dq, ds, xq, xs, rows):
    return ds.new_empty(len(rows), len(dq), len(xq))


KIND = {TILE: F.ScalingType.BlockWise1x128, BLOCK: F.ScalingType.BlockWise128x128}


def _hopper_product(a: Quantized, b: Quantized, block: tuple[int, int], dtype) -> Tensor:
    """A B^T by cuBLAS: A (M, K) in tiles, B (N, K) in tiles or blocks -> (M, N).

    cuBLAS expects sizes that are multiples of 128: codes are padded with zeros, and the result is
    cut to (M, N). The scales, L = K/128 for a row, must be laid out in memory like this:

        tiles    s[0,0] s[1,0] s[2,0] ... s[M-1,0]   s[0,1] s[1,1] ...      column by column
        blocks   s[0,0] s[0,1] ... s[0,L-1] 1 1 1   s[1,0] s[1,1] ...       row by row, of 4, 8, ...

    cuBLAS does not check the layout: any other gives wrong numbers without an error.
    """
    M, N = len(a.q), len(b.q)
    if 0 in (M, N, a.q.shape[1]):
        return torch.zeros(M, N, dtype=dtype, device=a.q.device)
    # Without fast accumulation, by default, partial products are accumulated in float32.
    y = F.scaled_mm(
        _whole(a.q), _whole(b.q).t(), _by_column(a.s), KIND[TILE],
        _by_row(b.s) if block == BLOCK else _by_column(b.s), KIND[block],
        output_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )  # fmt: skip
    return y[:M, :N].to(dtype)


def _whole(q: Tensor) -> Tensor:
    """Pads both sides with zeros to multiples of 128."""
    right, below = -q.shape[1] % 128, -q.shape[0] % 128
    if right or below:  # as bytes, since float8 has no padding; byte 0 is 0.0
        q = F.pad(q.view(torch.uint8), (0, right, 0, below)).view(E4M3)
    return q


def _by_column(s: Tensor) -> Tensor:
    """Scales of tiles (M, L), column by column in memory, with M padded to a multiple of 128."""
    return F.pad(s.t(), (0, -len(s) % 128), value=1.0).contiguous().t()


def _by_row(s: Tensor) -> Tensor:
    """Scales of blocks (rows, L), row by row in memory, with L padded to a multiple of 4."""
    return F.pad(s, (0, -s.shape[1] % 4), value=1.0).contiguous().t()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is the fast dtype. A function because prepare_compiler makes it constant."""
    return fast_dtype(device)[0] == torch.bfloat16


def has_blockwise_fp8(device: torch.device) -> bool:
    """Whether this device multiplies FP8 with a scale per tile. If not, prints a message once."""
    hopper = (
        device.type == "cuda"
        and torch.version.cuda is not None  # AMD's cards may have the same capability numbers
        and torch.cuda.get_device_capability(device) == (9, 0)
        and tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 9)
    )
    if not hopper and device not in _emulated:
        _emulated.add(device)
        info(f"fp8: emulated on {device}: exact but slow (native on Hopper with CUDA 12.9)")
    return hopper


# ---- A linear layer, alone or per expert ------------------------------------------------------


class _FP8Linear(torch.autograd.Function):
    """x (T, K), weight (N, K) -> x W^T (T, N). With `rows` (E,) the weight is (E, N, K), and expert
    e multiplies the next rows[e] rows of x. For the weight gradient x is saved in FP8, and backward
    quantises it again, along the tokens.

    wq and ws are the quantised weight if quantized_once holds one. Otherwise forward and backward
    both quantise the weight, so that no copy outlives FSDP's release of a gathered weight.
    """

    @staticmethod
    def forward(ctx, x, weight, wq, ws, rows: Tensor | None):
        x_fp8, w = to_fp8(x, TILE), to_fp8(weight, BLOCK) if wq is None else Quantized(wq, ws)
        ctx.save_for_backward(weight, wq, ws, *x_fp8)
        ctx.rows, dtype = rows, compute_dtype(x)
        if rows is None:
            return multiply(x_fp8, w, dtype)
        return multiply_each(*x_fp8, *w, rows, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        weight, wq, ws, *x_fp8 = ctx.saved_tensors
        rows, (need_dx, need_dw, *_) = ctx.rows, ctx.needs_input_grad
        dx = dw = None
        if need_dx:
            q, s = to_fp8(weight, BLOCK) if wq is None else (wq, ws)
            w, tiles = Quantized(q.mT.contiguous(), s.mT), to_fp8(dy, TILE)
            if rows is None:
                dx = multiply(tiles, w, dy.dtype)
            else:
                dx = multiply_each(*tiles, *w, rows, dy.dtype)
        if need_dw:
            x = dequantize(*x_fp8, TILE, dy.dtype)  # exact, even in bf16
            along_tokens = to_fp8(dy.t(), TILE), to_fp8(x.t(), TILE)
            if rows is None:
                dw = weight_gradient(*along_tokens)
            else:
                dw = weight_gradient_each(*along_tokens[0], *along_tokens[1], rows)
        return dx, dw, None, None, None


def _linear(x: Tensor, weight: Tensor, rows: Tensor | None = None) -> Tensor:
    """x (..., K) -> (..., N), or with `rows` (T, K) -> (T, N); see _FP8Linear."""
    flat = x.reshape(-1, x.shape[-1])  # (T, K)
    y = _FP8Linear.apply(flat, weight, *getattr(weight, "_fp8", (None, None)), rows)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# ---- Modules ----------------------------------------------------------------------------------
#
# Only products of model.py are replaced: `module.__class__ = FP8Linear` for an nn.Linear,
# `experts.product = grouped_fp8` for the experts, whose rows are padded to whole tiles. Parameters
# stay as they are. Results have autocast's dtype or, without autocast, the dtype of x.


class FP8Linear(nn.Linear):
    """y = x W^T + b with all three products in FP8: x (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **factory):
        prepare_compiler()
        super().__init__(in_features, out_features, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y = _linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def grouped_fp8(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """model.grouped_linear with FP8 products. The counts are multiples of 128 (`Experts.unit`)."""
    return _linear(x, weight, counts.cpu())  # here the host waits


@functools.cache
def prepare_compiler():
    """Prepares torch.compile when FP8 is first used, because the import takes seconds."""
    from torch._inductor.lowering import lowerings

    # Torch 2.13 would lower it to _scaled_mm, which reads scales in another order; 2.15 does not.
    lowerings.pop(torch.ops.aten._scaled_mm_v2.default, None)
    torch.compiler.assume_constant_result(has_blockwise_fp8)
    torch.compiler.assume_constant_result(multiplies_bf16)


def use_fp8(model: nn.Module):
    """Section 3.3.1: computes attention projections and FFNs in FP8. Embedding, head, norms,
    attention core, eh_proj and gates, including their submodules, stay in high precision. So do
    linear layers of a class of your own, and experts with a `product` of their own."""
    prepare_compiler()
    for block in [*model.layers, *(module.block for module in model.mtp)]:
        gates = {part for gate in gates_in(block) for part in gate.modules()}
        for module in block.modules():
            if type(module) is nn.Linear and module not in gates:
                module.__class__ = FP8Linear
            elif isinstance(module, Experts) and module.product is grouped_linear:
                module.product, module.unit = grouped_fp8, 128


# ---- One quantisation of the weights per step -------------------------------------------------


@contextmanager
def quantized_once(model: nn.Module, compiled: bool = False) -> Iterator[None]:
    """Quantises the weights once, for everything within `with quantized_once(model):`.

    The weights must not change within it: wrap the micro-batches of a step, before
    optimizer.step(), or an evaluation. (If an optimiser steps within it, the quantised weights are
    dropped.) Outside it every forward and backward quantises the current weight. A cache could not
    detect a changed weight: fused optimisers and `p.data` edits leave no trace. FSDP's weights,
    gathered again for every forward, are not cached. compiled: compile the quantiser, too, which
    runs outside the compiled blocks.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, FP8Linear)]
    for module in model.modules():
        if getattr(module, "product", None) is grouped_fp8:
            weights += module.parameters(recurse=False)
    weights = [w for w in weights if type(w) is nn.Parameter]  # FSDP's are DTensors
    quantise = torch.compile(to_fp8, dynamic=False) if compiled else to_fp8

    def forget(*_) -> None:
        for weight in weights:
            weight.__dict__.pop("_fp8", None)

    hook = register_optimizer_step_post_hook(forget)
    try:
        for weight in weights:
            weight._fp8 = quantise(weight.detach(), BLOCK)
        yield
    finally:
        hook.remove()
        forget()
