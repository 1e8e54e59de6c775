"""FP8 training with fine-grained scaling: section 3.3 of DeepSeek-V3 (arXiv 2412.19437).

A linear layer y = x W^T is three matrix products, and the report runs all three in FP8 (E4M3):

    forward          y  = x W^T       x in 1x128 tiles along K      W in 128x128 blocks
    input gradient   dx = dy W        dy in 1x128 tiles along N     the same blocks, transposed
    weight gradient  dW = dy^T x      dy and x in 1x128 tiles along the tokens T

    T tokens (all leading dimensions flattened), K in_features, N out_features, E experts
    q an E4M3 tensor, s the fp32 factors that decode it: x ~ q * s, one factor per tile

E4M3 has 4 significant bits and spans 2^-9 .. 448, so a scale shared by a whole tensor loses the
tokens that are 1e5 times smaller than the largest. One scale per 128 numbers loses none, and the
tensor cores multiply each 128-long partial product by its two scales and add it up in fp32.
Master weight and weight gradient are fp32; y and dx have the compute dtype (bf16).

Every scale here is a power of two. The report does that for the activations kept for the backward
pass, because turning 1x128 tiles into 128x1 tiles is then exact (section 3.5.2); DeepSeek-V3.1
does it throughout. Measured on Gaussian data it costs 0.1 points of error (3.7 % in all) and buys
something: decoded numbers are exactly representable in bf16 and TF32, so that the emulation on
machines without FP8 blockwise products multiplies the very numbers that Hopper multiplies.

What is FP8 is decided in model.py: attention projections, dense and shared FFN, routed experts.
When it pays: products at least about 2000 wide on a Hopper GPU with thousands of tokens per
product, under `torch.compile`, which fuses the quantisers; below that, bf16 is faster. The
emulation is there to study FP8, never for speed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

TILE = (1, 128)  # activations and gradients: one scale per token and 128 channels
BLOCK = (128, 128)  # weights: coarser, but the transpose of a block is a block
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).tiny  # 2^-126: smaller scales are subnormal and may be flushed
Quantized = tuple[Tensor, Tensor]  # (q, s)


# ---- Quantiser --------------------------------------------------------------------------------


def _tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Cuts (..., M, K), zero-padded at the edges, into (..., M/bm, bm, K/bk, bk)."""
    if tuple(block) not in (TILE, BLOCK):
        raise ValueError(f"block is {block}; use {TILE} for activations or {BLOCK} for weights.")
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; tiles lie in the last two of at least two dimensions, "
            "so use x[None] for a single row."
        )
    (bm, bk), (M, K) = block, x.shape[-2:]
    if M % bm or K % bk:
        x = F.pad(x, (0, -K % bk, 0, -M % bm))
    return x.reshape(*x.shape[:-2], -(-M // bm), bm, -(-K // bk), bk)


def quantize(x: Tensor, block: tuple[int, int], pow2: bool = False) -> Quantized:
    """x (..., M, K) -> q (..., M, K) in E4M3 and s (..., ceil(M/bm), ceil(K/bk)) in fp32, x ~ q s.

    Leading dimensions are separate matrices: stacked experts never share a block. The scale comes
    from the current maximum (section 3.3.2, "Online Quantization") and is 1 for a tile of zeros;
    pow2 rounds it up to a power of two. A tile that holds a NaN or an infinity decodes to NaN.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; quantize needs floats, so use x.float().")
    tiles = _tiles(x.float(), block)
    amax = tiles.abs().amax((-3, -1))  # (..., M/bm, K/bk)
    # A floor such as 1e-4 on amax would be simpler and would ruin gradients of size 1e-9.
    s = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp(min=TINY))
    if pow2:  # carry any mantissa bit into the exponent, then drop the mantissa: exact
        bits = (s.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF
        s = torch.where(s.isnan(), s, bits.view(torch.float32))
    # Clamped because the cast of 464 and more is NaN in some versions of torch, 448 in others.
    q = (tiles / s[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    q = q.flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]]
    return q.contiguous(), s


def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """q (..., M, K), scale (..., ceil(M/bm), ceil(K/bk)) -> q * scale (..., M, K) in fp32."""
    tiles = _tiles(q.float(), block)
    expected = (*tiles.shape[:-3], tiles.shape[-2])
    if scale.shape != expected:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; q of shape {tuple(q.shape)} in blocks of "
            f"{block} needs {expected}, so pass the scale that quantize returned with q."
        )
    x = tiles * scale.float()[..., :, None, :, None]
    return x.flatten(-4, -3).flatten(-2)[..., : q.shape[-2], : q.shape[-1]]


# ---- Product: one meaning, two ways to multiply -----------------------------------------------


def scaled_mm(a: Quantized, b: Quantized, block: tuple[int, int], out_dtype: torch.dtype) -> Tensor:
    """A B^T -> (M, N) of out_dtype: A (M, K) in 1x128 tiles, B (N, K) in `block`, sums in fp32."""
    device = a[0].device
    if has_blockwise_fp8(device):
        return _hopper_mm(a, b, block, out_dtype)
    with torch.autocast(device.type, enabled=False):
        x, y = dequantize(*a, TILE), dequantize(*b, block)
        # bf16 holds these numbers exactly and is 2.4 times faster on a CPU that has it (which, for
        # every new shape, compiles a kernel: hence the padding). On CUDA it might add up in bf16.
        if out_dtype == torch.bfloat16 and device.type == "cpu":
            x, y = F.pad(x.bfloat16(), (0, 0, 0, -len(x) % 64)), y.bfloat16()
        return (x @ y.t())[: len(a[0])].to(out_dtype)


@torch.compiler.assume_constant_result
def has_blockwise_fp8(device: torch.device) -> bool:
    """Whether the card multiplies blockwise-scaled FP8 itself. Says so once if not."""
    hopper = (
        device.type == "cuda"
        and torch.version.cuda is not None  # AMD's cards number their generations alike
        and torch.cuda.get_device_capability(device) == (9, 0)
        and tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 9)
        and hasattr(torch.ops.aten, "_scaled_mm_v2")  # torch 2.10
    )
    if not hopper:
        need = "the real thing needs a Hopper GPU, CUDA 12.9 and torch 2.10"
        _say_once(f"fp8: emulated on {device} (exact, not fast; {need})")
    return hopper


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def _hopper_mm(
    a: Quantized, b: Quantized, block: tuple[int, int], out_dtype: torch.dtype
) -> Tensor:
    """scaled_mm by cuBLAS, which wants everything in multiples of 128 and scales column-major."""
    M, N, K = a[0].shape[0], b[0].shape[0], a[0].shape[1]
    if 0 in (M, N, K):
        return a[0].new_zeros((M, N), dtype=out_dtype)

    def pad(q: Tensor) -> Tensor:  # as bytes, since padding is not written for float8; 0 is 0.0
        rows, columns = q.shape
        padding = (0, -columns % 128, 0, -rows % 128)
        return F.pad(q.view(torch.uint8), padding).view(E4M3) if any(padding) else q.contiguous()

    def rowwise(s: Tensor) -> Tensor:  # (M, L) -> (M padded, L) with strides (1, M padded)
        return F.pad(s, (0, 0, 0, -s.shape[0] % 128), value=1.0).t().contiguous().t()

    def blockwise(s: Tensor) -> Tensor:  # (N/128, L) -> (L4, N/128) with strides (1, L4); L4 is L
        # rounded up to a multiple of 4: cuBLAS reads it so and, unpadded, silently goes astray.
        return F.pad(s, (0, -s.shape[1] % 4), value=1.0).contiguous().t()

    recipe, s_b = (4, rowwise(b[1])) if block == TILE else (5, blockwise(b[1]))
    # Results are bf16 or fp32; the sums are fp32 either way (fast accumulation off, the last word).
    direct = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    y = torch.ops.aten._scaled_mm_v2.default(
        *(pad(a[0]), pad(b[0]).t(), [rowwise(a[1])], [4], [], [s_b], [recipe], []),
        *(None, direct, [], False),
    )
    return y[:M, :N].to(out_dtype)


# ---- Linear, alone and per expert -------------------------------------------------------------


class _FP8Linear(torch.autograd.Function):
    """Y_e = X_e W_e^T for the rows X_e of every expert e; a plain linear layer is one expert.

    x (T, K) sorted by expert, `rows` of it per expert; weight (N, K) or (E, N, K) is here for its
    gradient, wq and ws are its content. X is x or, with `up` (T, K) and perhaps `gain` (T,) given,
    SwiGLU: X = silu(x) * up * gain. The report keeps the input of SwiGLU in FP8 and recomputes its
    output in backward (section 3.3.3). What needs that output is the weight gradient of the down
    projection, so the two must be one function to save it: 2 bytes per token and channel stay
    alive instead of 8 (bf16 x, silu(x), up and X).
    """

    @staticmethod
    def forward(ctx, x, up, gain, weight, wq, ws, rows: list[int], out_dtype: torch.dtype):
        wq, ws = wq.reshape(len(rows), *wq.shape[-2:]), ws.reshape(len(rows), *ws.shape[-2:])
        xq = kept = quantize(x, TILE, pow2=True)
        if up is not None:
            kept = (*xq, *quantize(up, TILE, pow2=True), gain)
            xq = quantize(_swiglu(x.float(), up.float(), gain), TILE, pow2=True)
        ctx.save_for_backward(wq, ws, *kept)
        ctx.rows, ctx.out_dtype, ctx.weight_shape = rows, out_dtype, weight.shape
        return _products(_split(xq, rows), _split((wq, ws)), BLOCK, out_dtype)  # (T, N)

    @staticmethod
    def backward(ctx, dy: Tensor):
        wq, ws, xq, xs, *glu = ctx.saved_tensors
        x = X = dequantize(xq, xs, TILE)  # (T, K)
        if glu:
            up, gain = dequantize(*glu[:2], TILE), glu[2]
            X = _swiglu(x, up, gain)
        dx = d_up = d_gain = dw = None
        if any(ctx.needs_input_grad[:3]):
            dyq = _split(quantize(dy, TILE, pow2=True), ctx.rows)
            w_t = [(q.t().contiguous(), s.t()) for q, s in _split((wq, ws))]  # (K, N) each
            dx = _products(dyq, w_t, BLOCK, ctx.out_dtype)  # (T, K)
            if glu:
                dx, sigmoid = dx.float(), x.sigmoid()
                silu = x * sigmoid
                if gain is not None:
                    d_gain = (dx * silu * up).sum(-1)  # (T,)
                    dx = dx * gain[:, None]
                dx, d_up = dx * up * (sigmoid + silu * (1 - sigmoid)), dx * silu
        if ctx.needs_input_grad[3]:  # here tiles run along the tokens of one expert: 128x1
            dy_t, x_t = (
                [quantize(rows.t(), TILE, pow2=True) for rows in z.split(ctx.rows)] for z in (dy, X)
            )
            dw = _products(dy_t, x_t, TILE, torch.float32).reshape(ctx.weight_shape)
        return dx, d_up, d_gain, dw, None, None, None, None


def _split(x: Quantized, rows: list[int] | None = None) -> list[Quantized]:
    """Per expert: the rows of a matrix (no tile crosses a row), or the matrices of a stack."""
    parts = x if rows is None else (x[0].split(rows), x[1].split(rows))
    return list(zip(*parts, strict=True))


def _products(xs: list[Quantized], ws: list[Quantized], block, out_dtype: torch.dtype) -> Tensor:
    parts = [scaled_mm(x, w, block, out_dtype) for x, w in zip(xs, ws, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _swiglu(gate: Tensor, up: Tensor, gain: Tensor | None) -> Tensor:
    X = F.silu(gate) * up
    return X if gain is None else X * gain[:, None]


def _linear(x: Tensor, up, gain, weight: Tensor, counts) -> Tensor:
    """Shapes, dtypes and the quantised weight for _FP8Linear: x (..., K) -> (..., N)."""
    if x.shape[-1] != weight.shape[-1] or (up is not None and up.shape != x.shape):
        raise ValueError(
            f"input is {[tuple(z.shape) for z in (x, up) if z is not None]} and weight "
            f"{tuple(weight.shape)}; give inputs of one shape that ends in {weight.shape[-1]}."
        )
    lead, device = x.shape[:-1], x.device.type
    x = x.reshape(-1, x.shape[-1])  # (T, K)
    up = None if up is None else up.reshape(x.shape)
    rows = counts.tolist() if isinstance(counts, Tensor) else counts or [len(x)]
    if sum(rows) != len(x) or len(rows) != (1 if counts is None else len(weight)):
        raise ValueError(
            f"counts has {len(rows)} entries that sum to {sum(rows)}, but the weight is "
            f"{tuple(weight.shape)} and x has {len(x)} rows; give the rows of x per expert."
        )
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    wq, ws = _quantized_weight(weight)
    y = _FP8Linear.apply(x, up, gain, weight, wq, ws, rows, out_dtype)
    return y.reshape(*lead, y.shape[-1])


# torch.compile leaves the loop over experts out: its sizes are known to the data only.
_linear_eager = torch.compiler.disable(_linear)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor | list[int]) -> Tensor:
    """Routed experts: x (T, K) sorted by expert, weight (E, N, K), counts (E,) rows -> (T, N).

    A tensor of counts on a GPU costs a synchronisation per call; a list (`counts.tolist()`, once
    for all products of a layer) does not. Empty experts get a zero gradient.
    """
    return _linear_eager(x, None, None, weight, counts)


def swiglu_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    counts: Tensor | list[int] | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """(silu(gate) * up) W^T, the down projection of an FFN, with SwiGLU recomputed in backward.

    gate and up (..., K), weight (N, K) -> (..., N). For routed experts, counts as in grouped_linear
    and gain (T,), the gate values of Eq. 12, which multiply the rows of silu(gate) * up.
    """
    return (_linear if counts is None else _linear_eager)(gate, up, gain, weight, counts)


class FP8Linear(nn.Linear):
    """y = x W^T + b with all three products in FP8: x (..., in_features) -> (..., out_features).

    It holds nothing that nn.Linear does not, so checkpoints move freely between the two and
    `module.__class__ = FP8Linear` turns one into the other. The output has autocast's dtype or,
    without autocast, x's.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **factory):
        super().__init__(in_features, out_features, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y = _linear(x, None, None, self.weight, None)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# ---- One quantisation of the weights per step -------------------------------------------------


@contextmanager
def quantized_once(model: nn.Module) -> Iterator[None]:
    """Within the block the weights are constant, hence quantised once, here, in place of once per
    micro-batch:

        with quantized_once(model):
            for batch in micro_batches:
                loss(model, batch).backward()
        optimizer.step()

    Outside the block a forward quantises the weight that it finds (its backward uses the same q),
    so that nothing can go stale. A cache that guesses would: fused optimisers and `p.data` edits
    leave no trace in a tensor's version counter. Inside, an optimiser's step ends the caching, and
    edits that do leave a trace, or move the tensor, are noticed. The weights of FSDP, gathered anew
    for every forward, are left alone.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, FP8Linear)]
    if weights:
        weights += [p for p in model.parameters() if p.ndim == 3]  # stacks of experts (E, N, K)
    weights = [w for w in weights if type(w) is nn.Parameter]  # FSDP's are DTensors

    def forget(*_) -> None:
        for weight in weights:
            weight.__dict__.pop("_fp8", None)

    hook = register_optimizer_step_post_hook(forget)
    try:
        with torch.no_grad():
            for w in weights:
                w._fp8 = _Kept((w._version, w.data_ptr(), *quantize(w, BLOCK, pow2=True)))
        yield
    finally:
        hook.remove()
        forget()


class _Kept(tuple):
    def __reduce__(self):  # whoever pickles a model within the block pickles no cache with it
        return _Kept, ((None, None),)


def _quantized_weight(weight: Tensor) -> Quantized:
    """(q, s) kept on the parameter by quantized_once, if it still is this weight's, or anew."""
    version, pointer, *kept = getattr(weight, "_fp8", (None, None))
    if torch.compiler.is_compiling():  # cannot ask, and need not where quantized_once is obeyed
        fresh = bool(kept)
    else:
        fresh = (version, pointer) == (weight._version, weight.data_ptr())
    with torch.no_grad():
        return tuple(kept) if fresh else quantize(weight, BLOCK, pow2=True)
