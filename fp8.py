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
multiplies, slowly. FP8 pays on Hopper from widths of about 2000, with thousands of tokens, under
`torch.compile`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import model as formulas
from support.ops import by_expert, compute_dtype, fast_dtype, fingerprint
from support.settings import Refusal, info

TILE = (1, 128)  # activations and gradients: one scale per token and 128 channels
BLOCK = (128, 128)  # weights: coarser, but the transpose of a block is a block
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
Quantized = tuple[Tensor, Tensor]  # (q, s)
# What this file computes in place of model.py, and the digits of its source (ops.fast_twin) when
# the classes below were written.
COPIED = {
    "swiglu": "394a734a",
    "MLP.forward": "d5b0b9ec",
    "Experts.forward": "9ac86ddd",
    "routed_ffn": "4ca9d22e",
}
_emulated: set[torch.device] = set()  # devices for which has_blockwise_fp8 has said so


# ---- Quantiser --------------------------------------------------------------------------------


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Cuts (..., M, K), zero-padded at the edges, into (..., M/bm, bm, K/bk, bk), where bm and bk
    are the block's height and width. Raises ValueError for other blocks than TILE and BLOCK."""
    if tuple(block) not in (TILE, BLOCK) or x.ndim < 2:
        given = f"x has shape {tuple(x.shape)} and block is {block}"
        raise ValueError(f"{given}; use (..., M, K), so x[None] for a row, and {TILE} or {BLOCK}.")
    (bm, bk), (M, K) = block, x.shape[-2:]
    if M % bm or K % bk:
        x = F.pad(x, (0, -K % bk, 0, -M % bm))
    return x.reshape(*x.shape[:-2], -(-M // bm), bm, -(-K // bk), bk)


def quantize(x: Tensor, block: tuple[int, int], pow2: bool = False) -> Quantized:
    """x (..., M, K) -> q (..., M, K) in E4M3 and s (..., ceil(M/bm), ceil(K/bk)) in fp32, x ~ q s.

    Leading dimensions are separate matrices: stacked experts never share a block. The scale comes
    from the current maximum (section 3.3.2, "Online Quantization") and is 1 for a tile of zeros;
    pow2 rounds it up to a power of two. A tile that holds a NaN or an infinity decodes to NaN.
    Raises ValueError for another block than TILE, (1, 128), or BLOCK, (128, 128).
    """
    tiles = _tiles(x.float(), block)
    amax = tiles.abs().amax((-3, -1))  # (..., M/bm, K/bk)
    # 2^-126 only avoids subnormals. A larger floor such as 1e-4 would ruin gradients of size 1e-9.
    s = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp(min=2.0**-126))
    if pow2:  # exact: any bit of the mantissa carries into the exponent; then the mantissa is cut
        bits = (s.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF
        s = torch.where(s.isnan(), s, bits.view(torch.float32))
    q = (tiles / s[..., :, None, :, None]).to(E4M3)  # even 448 (1 + 2^-23) is rounded to 448
    q = q.flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]]
    return q.contiguous(), s


def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """q (..., M, K), scale (..., ceil(M/bm), ceil(K/bk)) -> q * scale (..., M, K) in fp32. Raises
    ValueError where the shapes do not fit."""
    tiles = _tiles(q.float(), block)
    shape, expected = tuple(scale.shape), (*tiles.shape[:-3], tiles.shape[-2])
    if shape != expected:
        raise ValueError(
            f"scale is {shape}, but q {tuple(q.shape)} in {block} blocks needs {expected}."
        )
    x = tiles * scale.float()[..., :, None, :, None]
    return x.flatten(-4, -3).flatten(-2)[..., : q.shape[-2], : q.shape[-1]]


# ---- Product: one meaning, two ways to multiply -----------------------------------------------


def scaled_mm(a: Quantized, b: Quantized, block: tuple[int, int], out_dtype: torch.dtype) -> Tensor:
    """A B^T -> (M, N) of out_dtype, for A (M, K) in 1x128 tiles and B (N, K) in tiles or blocks.

    Sums are in fp32. Raises ValueError where A and B have different K.
    """
    device, K = a[0].device, a[0].shape[1]
    if b[0].shape[1] != K:  # 100 and 120 would agree once they are padded for Hopper
        raise ValueError(f"x has {K} features but the weight {b[0].shape[1]}; give it as many.")
    if has_blockwise_fp8(device):
        return _hopper_mm(a, b, block, out_dtype)
    with torch.autocast(device.type, enabled=False):
        x, y = dequantize(*a, TILE), dequantize(*b, block)
        # bf16 holds these numbers exactly, so it is taken where it is fast (not on CUDA: that might
        # add up in bf16). Rows are padded, since oneDNN compiles a kernel for every new shape.
        if out_dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bf16(device):
            x, y = F.pad(x.bfloat16(), (0, 0, 0, -len(x) % 64)), y.bfloat16()
        return (x @ y.t())[: len(a[0])].to(out_dtype)


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


def _hopper_mm(a: Quantized, b: Quantized, block, out_dtype: torch.dtype) -> Tensor:
    """scaled_mm by cuBLAS. It wants M, N and K in multiples of 128, and scales column-major.

    Every row has L = K/128 scales.
    """
    M, N, K = a[0].shape[0], b[0].shape[0], a[0].shape[1]
    if 0 in (M, N, K):
        return a[0].new_zeros((M, N), dtype=out_dtype)

    def pad(q: Tensor) -> Tensor:  # as bytes, since padding is not written for float8; 0 is 0.0
        padding = (0, -q.shape[1] % 128, 0, -q.shape[0] % 128)
        return F.pad(q.view(torch.uint8), padding).view(E4M3) if any(padding) else q.contiguous()

    def rowwise(s: Tensor) -> Tensor:  # (M, L) -> (M padded, L) with strides (1, M padded)
        return F.pad(s, (0, 0, 0, -s.shape[0] % 128), value=1.0).t().contiguous().t()

    def blockwise(s: Tensor) -> Tensor:  # (N/128, L) -> (L4, N/128) with strides (1, L4)
        # L4 is L rounded up to a multiple of 4. cuBLAS takes that for granted: from unpadded scales
        # it computes wrong numbers, without an error.
        return F.pad(s, (0, -s.shape[1] % 4), value=1.0).contiguous().t()

    # cuBLAS calls a scale per 1x128 numbers recipe 4, one per 128x128 recipe 5.
    recipe, s_b = (4, rowwise(b[1])) if block == TILE else (5, blockwise(b[1]))
    direct = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32  # what it can return
    y = torch.ops.aten._scaled_mm_v2.default(
        *(pad(a[0]), pad(b[0]).t()),
        *([rowwise(a[1])], [4], []),  # scales of a, recipe, no swizzle
        *([s_b], [recipe], []),  # of b
        *(None, direct, [], False),  # no bias; dtype; usual dimensions; False: sums in fp32
    )
    return y[:M, :N].to(out_dtype)


# ---- The three products of a linear layer, alone or per expert --------------------------------


class _FP8Linear(torch.autograd.Function):
    """Y_e = X_e W_e^T for the rows X_e of every expert e; a plain linear layer is one expert.

    X (T, K) is x or, where `up` is given, SwiGLU: silu(x) * up * gain. The report keeps the input
    of SwiGLU in FP8 and recomputes its output X in backward (section 3.3.3), where the weight
    gradient needs it. So both are one function here. It keeps x and up, 2 bytes per token and
    channel; apart they would keep x, silu(x), up and X in bf16, 8 bytes. In `forward` X is
    quantised, (q, s); in `backward` it is decoded.

    wq and ws are the quantised weight where quantized_once holds it. Else forward and backward
    quantise the weight each, so that no copy outlives FSDP's release of a gathered weight.
    """

    @staticmethod
    def forward(ctx, x, up, gain, weight, wq, ws, rows: list[int]):
        X = kept = quantize(x, TILE, pow2=True)  # kept: what backward decodes, x and up if given
        if up is not None:
            kept = (*kept, *quantize(up, TILE, pow2=True))
            X = quantize(_swiglu(x.float(), up.float(), gain), TILE, pow2=True)
        w = quantize(weight, BLOCK, pow2=True) if wq is None else (wq, ws)
        ctx.save_for_backward(weight, wq, ws, gain, *kept)
        ctx.rows = rows
        return _grouped_mm(X, w, rows, compute_dtype(x))  # (T, N)

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, wq, ws, gain, xq, xs, *up = ctx.saved_tensors
        swiglu = bool(up)
        x = X = dequantize(xq, xs, TILE)  # (T, K)
        if swiglu:
            up = dequantize(*up, TILE)
            X = _swiglu(x, up, gain)
        dx = d_up = d_gain = dw = None
        if any(ctx.needs_input_grad[:3]):
            q, s = quantize(weight, BLOCK, pow2=True) if wq is None else (wq, ws)
            dx = _grouped_mm(quantize(dy, TILE, pow2=True), (q.mT, s.mT), ctx.rows, dy.dtype)
            if swiglu:  # that was the gradient of X
                dx, d_up, d_gain = _swiglu_backward(dx.float(), x, up, gain)
        if ctx.needs_input_grad[3]:
            dws = []
            for dy_e, X_e in zip(dy.split(ctx.rows), X.split(ctx.rows), strict=True):
                # Tiles run along the tokens of one expert: 128x1.
                columns = (quantize(z.t(), TILE, pow2=True) for z in (dy_e, X_e))
                dws.append(scaled_mm(*columns, TILE, torch.float32))  # (N, K)
            dw = dws[0] if weight.ndim == 2 else torch.stack(dws)
        return dx, d_up, d_gain, dw, None, None, None


def _grouped_mm(x: Quantized, w: Quantized, rows: list[int], dtype: torch.dtype) -> Tensor:
    """The `rows` of x (T, K) that belong to expert e times its matrix in w (E, N, K) or (N, K)."""
    xs = zip(*(z.split(rows) for z in x), strict=True)  # (q, s) by expert; no tile crosses a row
    ws = zip(*(z.view(len(rows), *z.shape[-2:]) for z in w), strict=True)
    ys = [scaled_mm(x_e, w_e, BLOCK, dtype) for x_e, w_e in zip(xs, ws, strict=True)]
    return ys[0] if len(ys) == 1 else torch.cat(ys)


def _swiglu(gate: Tensor, up: Tensor, gain: Tensor | None) -> Tensor:
    X = F.silu(gate) * up
    return X if gain is None else X * gain[:, None]


def _swiglu_backward(dX: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None):
    """The gradients of gate, up and gain, from that of _swiglu(gate, up, gain)."""
    sigmoid, d_gain = gate.sigmoid(), None
    silu = gate * sigmoid
    if gain is not None:
        d_gain = (dX * silu * up).sum(-1)  # (T,)
        dX = dX * gain[:, None]
    return dX * up * (sigmoid + silu * (1 - sigmoid)), dX * silu, d_gain


def _linear(x: Tensor, weight: Tensor, rows: list[int] | None = None, up=None, gain=None) -> Tensor:
    """x (..., K) -> (..., N), or (T, K) -> (T, N) with `rows` of each expert; see _FP8Linear."""
    flat = x.reshape(-1, x.shape[-1])  # (T, K)
    up = None if up is None else up.reshape(flat.shape)
    wq, ws = getattr(weight, "_fp8", (None, None))
    y = _FP8Linear.apply(flat, up, gain, weight, wq, ws, rows or [len(flat)])
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
        return by_expert(x, chosen, gain, len(self.down_proj), self.ffn)

    def ffn(self, x: Tensor, counts: Tensor, gain: Tensor) -> Tensor:
        """x (rows, D) sorted by expert, counts (E,) of each expert's rows, gate values (rows,) ->
        (rows, D)."""
        rows = counts.tolist()
        gate, up = _linear(x, self.gate_up_proj, rows).chunk(2, dim=-1)  # (T, F) each
        return _linear(gate, self.down_proj, rows, up, gain)


@functools.cache
def tell_compiler():
    """What torch.compile must know, told when FP8 is first used: importing that takes seconds."""
    from torch._inductor.lowering import lowerings

    # Else torch 2.13 compiles it to _scaled_mm, which reads scales in another order.
    lowerings.pop(torch.ops.aten._scaled_mm_v2.default, None)
    torch.compiler.assume_constant_result(has_blockwise_fp8)
    torch.compiler.assume_constant_result(multiplies_bf16)
    # How many rows each expert has is known only at run time.
    FP8Experts.ffn = torch.compiler.disable(FP8Experts.ffn)


def use_fp8(model: nn.Module):
    """Section 3.3.1: the products of attention projections and FFNs in FP8. Embedding, head, gate,
    norms, attention core and eh_proj stay in high precision.

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
        for module in block.modules():
            if type(module) is formulas.MLP and type(module.down_proj) is not nn.Linear:
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
            weight._fp8 = quantize(weight.detach(), BLOCK, pow2=True)
        yield
    finally:
        hook.remove()
        forget()
