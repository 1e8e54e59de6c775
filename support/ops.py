"""Fast twins of formulas in model.py, a fast copy of the network for decoding, and the check that
both still copy what model.py says.

A twin has the name and the arguments of its formula and, but for rounding, the same result.
model.py marks the formula with `@fast_twin`. Then every call goes to the function of that name in
this file. Where a twin returns NotImplemented, or the formula has been edited, the formula itself
runs. So model.py may be read and edited without a look at this file.

The file's order: the twins (attention, experts, output head); the dtype in which this machine is
fast; `Decoder`, a copy of the whole network for decoding; and last, how a copy finds out that its
formula is no longer the one that it copies.

A twin is here if it saves 3 % or more of a training step of config/small.py on two CPU cores, or is
needed on a GPU; docs/notes/LOG.md has the figures. Letters are those of model.py.
"""

import functools
import hashlib
import inspect
import io
import linecache
import math
import textwrap
import time
import tokenize
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from support.settings import info

enabled = True  # the tests turn the twins off, to compare them with their formulas

# ---- Precision -----------------------------------------------------------------------------------


def upcast(x: Tensor) -> Tensor:
    """x in the precision of gate, norms, softmax and loss: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---- Attention -----------------------------------------------------------------------------------

SHORT = 512  # the longest window whose scores are written out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's fused kernel. On a CPU, in bf16 and short windows, written-out scores take a third
    of its time."""
    (B, _, T, _), V = q.shape, v.shape[-1]
    if not (isinstance(scale, float) and q.shape[:3] == k.shape[:3] == v.shape[:3]):
        return NotImplemented  # a learnt scale, say
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        later = q.new_full((T, T), -math.inf).triu_(1).expand(len(q), T, T)
        p = torch.baddbmm(later, q, k.mT, alpha=scale).softmax(-1)
        return torch.bmm(p, v).unflatten(0, (B, -1))
    width = max(q.shape[-1], V)  # the fused kernels want q, k and v of one width
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :V]


# ---- Experts -------------------------------------------------------------------------------------
#
# Under autocast on a CPU each expert gets rows up to the next multiple of MULTIPLE, since oneDNN
# compiles a kernel for every new number of rows. An extra row repeats the token of its expert's
# last row, which leaves FP8's scales alone. No slot leads to it: it has no part in any result. The
# example of model.sort_by_expert, chosen [[2, 0], [2, 1]], with multiples of 2 in place of 64:
#
#               expert 0   expert 1   expert 2
#     rows       0   0      1   1      0   1      the tokens; the second and the fourth are extra
#     slots                                       [[4, 0], [5, 2]]
#     counts        2          2          2

MULTIPLE = 64


def pads_rows(device: torch.device) -> bool:
    return device.type == "cpu" and torch.is_autocast_enabled("cpu")


def sort_by_expert(chosen: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """With extra rows, or not at all. The comments go on with the example."""
    if not pads_rows(chosen.device):
        return NotImplemented
    expert = chosen.flatten()  # 2 0 2 1
    counts = torch.zeros(E, dtype=torch.long).scatter_add_(0, expert, torch.ones_like(expert))
    missing = -counts % MULTIPLE  # 1 1 0
    extra = torch.arange(E).repeat_interleave(missing)  # 0 1, the experts of the extra rows
    # Sorted together, an expert's extra rows come after its others, as the sort is stable.
    order = torch.cat((expert, extra)).argsort(stable=True)  # 1 4 3 5 0 2: 4 and 5 are extra
    row = torch.arange(len(order))
    slots = torch.empty_like(order).scatter_(0, order, row)[: len(expert)]  # 4 0 5 2
    real = torch.where(order < len(expert), row, 0)  # 0 0 2 0 4 5: the row, 0 where it is extra
    real = real.cummax(0).values  # 0 0 2 2 4 5: of the last row up to here that is not extra
    return order[real] // chosen.shape[1], slots.view_as(chosen), counts + missing


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for an index (rows,). For an index (tokens, K) x[index].sum(1), (tokens, D), in one
    call, which is 5 to 20 times as fast."""
    return F.embedding_bag(index, x, mode="sum") if index.ndim == 2 else x.index_select(0, index)


class _Dispatch(torch.autograd.Function):
    """gather(x, rows). A token's gradient is the sum over its slots: it is gathered, too."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return gather(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return gather(dy, *ctx.saved_tensors), None, None


def dispatch(x: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Autograd's gradient of x[rows] adds row by row; with `combine` this saves 9 % in fp32."""
    return _Dispatch.apply(x, rows, slots)


class _Combine(torch.autograd.Function):
    """gather(y, slots). A row's gradient is that of its token. Extra rows are in no token's sum:
    their gradient is 0, taken from a row of zeros behind dy."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, slots: Tensor, padded: bool) -> Tensor:
        ctx.save_for_backward(rows, slots)
        ctx.padded = padded
        return gather(y, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, slots = ctx.saved_tensors
        if ctx.padded:
            owned = torch.zeros_like(rows, dtype=torch.bool).scatter_(0, slots.flatten(), True)
            rows = torch.where(owned, rows, len(dy))
            dy = torch.cat((dy, dy.new_zeros(1, dy.shape[1])))
        return gather(dy, rows), None, None, None


def combine(y: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """See dispatch."""
    return _Combine.apply(y, rows, slots, pads_rows(y.device))


def has_grouped_mm(device: torch.device) -> bool:
    """Whether PyTorch's one call for all experts is right and fast there: not on Blackwell, where
    an expert without rows can get a wrong gradient (pytorch #172439), and not on Ampere, where
    every call waits for the GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """PyTorch's one call for all experts, where it knows dtype and widths."""
    dtype = compute_dtype(x)
    aligned = all(n * dtype.itemsize % 16 == 0 for n in weight.shape[1:])
    known = dtype == torch.bfloat16 and has_grouped_mm(x.device)
    if dtype == torch.float32:  # refused on CUDA and in graphs
        known = not (x.is_cuda or torch.compiler.is_compiling())
    if not (aligned and known):
        return NotImplemented
    return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=counts.cumsum(0).int())


# ---- Output head ---------------------------------------------------------------------------------

CHUNK = 2**27  # logits at once on a GPU: 0.5 GB
CPU_ROWS = 256  # tokens: few enough for a CPU's caches, enough to pay for a pass over dw


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy by chunks of tokens. The gradients of a chunk are formed as soon as its logits
    are there, so that no more than (chunk, vocabulary) of them exist at once; backward only
    multiplies what forward has computed."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, need: bool) -> Tensor:
        real, w = (targets >= 0)[:, None], weight.to(h.dtype)  # (tokens, 1)
        h = h * real  # so that rows without a target add nothing to dw
        dh, dw = torch.empty_like(h), torch.zeros_like(weight) if need else None
        chunk = min(len(h), CPU_ROWS if h.device.type == "cpu" else CHUNK // len(w))
        # Two buffers for all chunks: on a CPU fresh ones would cost a third of the time.
        low, losses = h.new_empty(chunk, len(w)), []
        high = upcast(torch.empty_like(low))
        for x, y, dx in zip(*(t.split(chunk) for t in (h, targets, dh)), strict=True):
            low, high = low[: len(x)], high[: len(x)]  # (chunk, vocabulary)
            z = high.copy_(torch.mm(x, w.T, out=low))  # the logits, in float32
            row = torch.arange(len(x), device=x.device)
            z_max, z_y = z.amax(-1), z[row, y]
            p = torch.softmax(z, -1, out=high)  # takes the memory of z, which is not read any more
            # The loss is log sum exp z - z_y, and max p = exp(z_max) / sum exp z.
            losses.append(z_max - p.amax(-1).log() - z_y)
            if need:  # d loss / d z = softmax(z) - onehot(target)
                p[row, y] -= 1
                torch.mm(low.copy_(p), w, out=dx)
                dw += low.T @ x
        n = real.sum().clamp(min=1)
        ctx.save_for_backward(dh.mul_(real), dw, n)
        return (torch.cat(losses) * real.squeeze(1)).sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dh, dw, n = ctx.saved_tensors
        scale = grad / n
        return dh * scale, dw * scale, None, None


def head_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Never holds all the logits; the formula makes a step 18 % longer in fp32."""
    need = torch.is_grad_enabled()  # evaluation forms no gradient
    return _HeadLoss.apply(h.to(compute_dtype(h)), weight, targets, need)


# ---- The fast dtype of this machine --------------------------------------------------------------

CLEARLY = 1.5  # bfloat16 must be so many times as fast, to pay for casts and lost precision


@functools.cache
def fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype in which this machine should multiply, bfloat16 or float32, and why, in words.

    On a CPU it is measured, once per process and in some 50 ms: a flag of the processor tells that
    bfloat16 is known, not that it is fast. One core is timed, as other work disturbs that least.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has units for its products"
        return torch.float32, "this GPU emulates bfloat16"
    if device.type != "cpu":
        return torch.float32, "bfloat16 was never tried there"
    x, w = torch.randn(1024, 256), torch.randn(512, 256)
    seconds = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(8):  # in turns
            for dtype, times in seconds.items():
                factors = x.to(dtype), w.to(dtype)
                began = time.perf_counter()
                F.linear(*factors)
                times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    work = 2e-9 * len(w) * x.numel()  # 1e9 operations
    low, high = (work / min(seconds[d]) for d in (torch.bfloat16, torch.float32))
    reason = f"products of one core: bfloat16 {low:.0f}, float32 {high:.0f} GFLOP/s"
    return torch.bfloat16 if low > CLEARLY * high else torch.float32, reason


# ---- Decoding ------------------------------------------------------------------------------------
#
# A decoding step moves few numbers in many operations, and on a CPU each costs microseconds however
# small it is. So what stays the same from step to step is computed once, in `Decoder`. n = B * T.
# From the sizes that follow, measured on two cores, another way to compute the same is faster.

LONG = 2**14  # cached tokens from which the threads share them out
ABSORBED = 2**18  # weights that a block may gain so that W^UK and W^UV need no products
PAIRS = 2**13  # of queries and cached tokens, up to which loops are faster than products
LARGE = 2**16  # weights of a matrix from which oneDNN's layout pays
ROWS = 16  # rows of x that this layout is packed for; in a graph, the most for which loops pay
COPIED = 3 * 2**26  # weights in a layer's experts up to which these are copied into another order
FEW = 32  # tokens up to which each reads its experts' weights by itself
# Loops and oneDNN's layout are for AVX512; with AVX2 the BLAS is faster. This is not timed: where
# both are about as fast, two texts of one seed would differ.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def side_by_side(*weights: Tensor, compiled: bool) -> Tensor:
    """Weights (out, in) that multiply the same x as one matrix, laid out for `product`.

    A large one is laid out for oneDNN. That reads it at the speed of memory, and up to five rows of
    x take the time of one. Others stay plain tensors.
    """
    w = weights[0] if len(weights) == 1 else torch.cat(weights)
    # With AVX512 others are faster than the BLAS, which uses one core for few rows: oneDNN, or in a
    # graph the loops of `product`.
    fast = AVX512 and w.device.type == "cpu"
    known = w.dtype == torch.float32 or (
        w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if fast and known and not compiled and w.numel() >= LARGE:
        return torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), ROWS)
    # The BLAS reads columns faster than rows, unless a matrix has twice as many columns as rows.
    # The loops of `product` want rows.
    turned = 2 * len(w) > w.shape[1] and not (fast and compiled)
    return w.T.contiguous().T if turned else w.contiguous()


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (n, in) times w (out, in) of side_by_side: (n, out)."""
    if w.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    if torch.compiler.is_compiling() and x.device.type == "cpu" and AVX512 and len(x) <= ROWS:
        # Sums that the compiler turns into loops, which read w once for all rows of x. x is written
        # to memory before them, else they would compute it anew for every row of w.
        from torch._inductor.inductor_prims import force_stride_order

        x32 = upcast(x)
        x32 = force_stride_order(x32, x32.stride())
        return torch.cat([(w * row).sum(-1)[None] for row in x32.split(1)]).to(x.dtype)
    return torch.mm(x, w.T)


def normalise(x: Tensor, eps: Tensor) -> Tensor:
    """rms_norm in fewer operations; eps is a scalar tensor in the precision of norms."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)
    mean_square = torch.addcmul(eps, length, length, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt()).to(x.dtype)


def span(start: int | Tensor, length: int) -> slice | Tensor:
    """Positions from start on: a slice, or in a graph that serves every start a tensor."""
    if isinstance(start, int):
        return slice(start, start + length)
    return start + torch.arange(length, device=start.device)


def attend(q: Tensor, kv: Tensor, C: int, later: Tensor | None) -> Tensor:
    """softmax(q kv^T + later) kv[..., :C]: q (B, T, H, C+R), kv (B, S, C+R) -> (B, T*H, C).

    later (T*H, S) is 0 where a query may look and -inf elsewhere; None: each may look at all.
    """
    T, S, compiling = q.shape[1], kv.shape[1], torch.compiler.is_compiling()
    q, cpu = q.flatten(1, 2), q.device.type == "cpu"  # (B, T*H, C+R)
    if compiling and cpu and AVX512 and q.shape[1] * S <= PAIRS:
        # Loops, as in `product`.
        p = ((upcast(q)[:, :, None] * kv[:, None]).sum(-1) + later).softmax(-1)
        return (p[..., None] * kv[:, None, :, :C]).sum(2).to(q.dtype)
    if compiling or not cpu or S < LONG:
        score = torch.bmm(q, kv.mT) if later is None else torch.baddbmm(later, q, kv.mT)
        return torch.bmm(upcast(score).softmax(-1).to(q.dtype), kv[..., :C])  # (B, T*H, C)
    # The fused kernel gives every head to a thread. So the old tokens are cut into a piece for each
    # thread, which it takes for heads; the new tokens, which need the mask, are the rest. Each part
    # has a softmax of its own, and counts by its share of the whole denominator.
    pieces = torch.get_num_threads()
    old = (S - T) // pieces * pieces
    q, kv, rest = q[:, None], kv[:, :old].unflatten(1, (pieces, -1)), kv[:, None, old:]
    later = None if later is None else later[:, old:]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, log = fused(q.expand(-1, pieces, -1, -1), kv, kv, scale=1.0)  # o (B, pieces, T*H, C+R)
    o_rest, log_rest = fused(q, rest, rest, attn_mask=later, scale=1.0)
    share = torch.cat((log, log_rest), 1).softmax(1)[..., None]
    return (share * torch.cat((o, o_rest), 1)).sum(1)[..., :C].to(q.dtype)


class DecoderBlock:
    """A block of the model for few tokens. Matrices with the same input are one.

    Weights of norms and the scale of softmax are multiplied into the matrices that follow them:
    W (g * x) = (W * g) x.
    """

    def __init__(self, block, config, compiled: bool):
        norm = block.input_layernorm.weight
        self.eps, self.latent_eps = upcast(norm).new_tensor([config.rms_norm_eps, 1e-6])
        self.compiled = compiled
        self.prepare_attention(block.self_attn, norm, config)
        self.norm = block.post_attention_layernorm.weight
        self.prepare_ffn(block.mlp)

    def prepare_attention(self, mla, norm: Tensor, config):
        join = functools.partial(side_by_side, compiled=self.compiled)
        H, C, N = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
        if config.q_lora_rank is None:
            q = mla.q_proj.weight * norm
        else:
            q = mla.q_b_proj.weight * mla.q_a_layernorm.weight
        q = mla.scale * q.unflatten(0, (H, -1))  # (H, N+R, in)
        o = mla.o_proj.weight.unflatten(1, (H, -1))  # (D, H, V)
        up = mla.kv_b_proj.weight.unflatten(0, (H, -1))
        self.UK, self.UV = up[:, :N], up[:, N:]  # (H, N, C), (H, V, C)
        # In a small model these two become part of the matrices beside them, which grow by little.
        # That saves two products.
        more = H * ((C - N) * q.shape[-1] + (C - config.v_head_dim) * len(o))
        self.absorbed = more <= ABSORBED
        if self.absorbed:
            q = torch.cat((torch.einsum("hnc,hni->hci", self.UK, q[:, :N]), q[:, N:]), 1)
            o = torch.einsum("dhv,hvc->dhc", o, self.UV)
        q, self.o = q.flatten(0, 1), join(o.flatten(1))
        # qkv multiplies the hidden state. Of its three parts the first is the query or, where
        # queries have a latent, this latent; then self.q makes the query of it.
        self.q = None
        if config.q_lora_rank is not None:
            self.q, q = join(q), mla.q_a_proj.weight * norm
        self.qkv = join(q, mla.kv_a_proj_with_mqa.weight * norm)
        self.H, self.widths = H, [len(q), C, config.qk_rope_head_dim]
        self.kv_norm = mla.kv_a_layernorm.weight

    def prepare_ffn(self, mlp):
        self.moe = mlp if hasattr(mlp, "experts") else None
        self.turned = None  # W^T of all experts, one below the other: (E*D, 2F), (E*F, D)
        dense = mlp
        if self.moe:
            experts = list(mlp.experts.parameters())
            small = sum(w.numel() for w in experts) <= COPIED
            if self.norm.device.type == "cpu" and small:
                self.turned = [w.mT.flatten(0, 1) for w in experts]
            # Without `chosen_experts` the MoE computes its shared experts itself.
            dense = mlp.shared_experts if self.turned or self.compiled else None
        if dense:
            self.gate_up = side_by_side(
                dense.gate_proj.weight, dense.up_proj.weight, compiled=self.compiled
            )
            self.down = side_by_side(dense.down_proj.weight, compiled=self.compiled)

    def __call__(self, x: Tensor, kv: Tensor, place: tuple) -> Tensor:
        """x (n, D), kv (B, size, C+R) -> (n, D)."""
        B, (_, C, R), (slots, S, later, cos, sin, swap) = len(kv), self.widths, place
        # The query or its latent, the latent of keys and values, the key's rotary part.
        q, c, k = product(normalise(x, self.eps), self.qkv).split(self.widths, -1)
        if self.q is not None:
            q = product(normalise(q, self.latent_eps), self.q)
        c = (normalise(c, self.latent_eps) * self.kv_norm).view(B, -1, C)  # (B, T, C)
        q = q.view(B, c.shape[1], self.H, -1)  # (B, T, H, N+R), or C+R if absorbed
        pe = torch.cat((q[..., -R:], k.view(B, -1, 1, R)), 2)  # (B, T, H+1, R)
        pe = torch.addcmul(pe * cos, pe.index_select(-1, swap), sin).to(x.dtype)
        q, q_pe, k = q[..., :-R], pe[:, :, :-1], pe[:, :, -1]
        kv[:, slots] = torch.cat((c, k), -1)
        if not self.absorbed:
            q = torch.einsum("bthn,hnc->bthc", q, self.UK)
        o = attend(torch.cat((q, q_pe), -1), kv[:, :S], C, later)  # (B, T*H, C)
        if not self.absorbed:
            o = torch.einsum("nhc,hvc->nhv", o.view(len(x), -1, C), self.UV)
        x = x + product(o.reshape(len(x), -1), self.o)
        return x + self.ffn(normalise(x, self.eps) * self.norm)

    def ffn(self, z: Tensor) -> Tensor:
        """z (n, D) -> (n, D)."""
        # sample.py calls a compiled Decoder outside a graph, too: to check it on one token.
        few = len(z) <= FEW and (self.turned or self.compiled)
        if self.moe and (few or torch.compiler.is_compiling()):
            y = self.chosen_experts(z)
            return y + self.dense_ffn(z) if self.moe.shared_experts else y
        if self.moe:  # many tokens are sorted by expert, as in training
            y, _ = self.moe(z[None])
            return y[0]
        return self.dense_ffn(z)

    def dense_ffn(self, z: Tensor) -> Tensor:
        gate, up = product(z, self.gate_up).chunk(2, -1)
        return product(F.silu(gate) * up, self.down)

    def chosen_experts(self, z: Tensor) -> Tensor:
        """The sum of every token's K experts: z (n, D) -> (n, D).

        In a graph or without `turned` by loops, as in `product`. Else x W^T is a sum of rows of
        W^T, each times a number of x. That is what `embedding_bag` computes, for all tokens and
        experts in one call per projection, at the speed of memory.
        """
        _, chosen, gain = self.moe.gate(z[None])  # as one text of n tokens, as in model.py
        chosen, gain = chosen[0], gain[0]  # (n, K)
        loops = torch.compiler.is_compiling() or not self.turned

        def times(x: Tensor, w: Tensor) -> Tensor:  # (n, K, in) -> (n, K, out)
            if loops:
                return (w[chosen] * x.unsqueeze(-2)).sum(-1)
            index = chosen[..., None] * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
            bags = torch.arange(0, x.numel(), x.shape[-1], device=x.device)
            # mode 0 sums; F.embedding_bag takes half as long again.
            y = torch.embedding_bag(w, index.flatten(), bags, False, 0, False, x.flatten())[0]
            return y.unflatten(0, chosen.shape)

        gate_up, down = self.moe.experts.parameters() if loops else self.turned
        gate, up = times(z[:, None].expand(*chosen.shape, -1), gate_up).chunk(2, -1)  # (n, K, F)
        return times(F.silu(gate) * up * gain.to(z.dtype)[..., None], down).sum(1)


class Decoder:
    """trunk, predict_next and logits of a DeepSeekV3, on the same caches, for a few tokens.

    compiled: its matrices are laid out for products in a graph. There cache.length is a tensor, not
    a number, and attention reads all of the cache, behind a mask. Raises ValueError for biases.
    """

    def __init__(self, model, compiled: bool = False):
        config, R = model.config, model.config.qk_rope_head_dim
        if config.attention_bias:
            raise ValueError("a Decoder knows no biases")
        join = functools.partial(side_by_side, compiled=compiled)
        self.embedding, self.norm = model.embed_tokens.weight, model.norm.weight
        self.head = join(model.lm_head.weight)
        self.layers = [DecoderBlock(block, config, compiled) for block in model.layers]
        self.mtp = [DecoderBlock(m.block, config, compiled) for m in model.mtp]
        for block, m in zip(self.mtp, model.mtp, strict=True):
            norms = torch.cat((m.enorm.weight, m.hnorm.weight))
            block.eh, block.out_norm = join(m.eh_proj.weight * norms), m.norm.weight
        self.eps = self.layers[0].eps
        # Rotated, x is x cos + x[swap] sin: swap exchanges the two of each pair. sin has the sign.
        pair = -1 if config.rope_interleave else -2
        positions = config.max_position_embeddings + 16  # drafts, or a made-up text, go beyond
        cos, sin = model.rope(self.norm.expand(1, positions, -1), 0)  # (positions, R/2)
        self.cos = torch.stack((cos, cos), pair).flatten(1)[:, None]  # (positions, 1, R)
        self.sin = torch.stack((-sin, sin), pair).flatten(1)[:, None]
        swap = torch.arange(R, device=cos.device).view((-1, 2) if pair == -1 else (2, -1))
        self.swap = swap.flip(pair).flatten()

    def place(self, T: int, cache) -> tuple:
        """What attention must know of T new tokens: their slots in the cache, how many slots it
        reads, the mask (or None), cos, sin and swap."""
        later, device, in_graph = None, self.norm.device, not isinstance(cache.length, int)
        if in_graph:  # a graph cannot ask whether there is room: sample.py has made enough
            at, S = cache.length, cache.size
            cache.length = at + T
        else:
            at = cache.claim(T)  # ValueError where the cache is full
            S = at + T
        slots = span(at, T)
        if T > 1 or in_graph:
            last = at + torch.arange(T, device=device)[:, None]  # each token's own slot
            later = torch.where(torch.arange(S, device=device) <= last, 0.0, -math.inf)
            later = later.to(self.norm.dtype).repeat_interleave(self.layers[0].H, 0)  # (T*H, S)
        return slots, S, later, self.cos[slots], self.sin[slots], self.swap

    def trunk(self, tokens: Tensor, cache) -> Tensor:
        place, x = self.place(tokens.shape[1], cache), self.embedding[tokens.flatten()]
        for block, kv in zip(self.layers, cache.kv, strict=True):
            x = block(x, kv, place)
        return (normalise(x, self.eps) * self.norm).view(*tokens.shape, -1)

    def predict_next(self, k: int, h: Tensor, tokens: Tensor, cache) -> Tensor:
        block, x = self.mtp[k], self.embedding[tokens.flatten()]
        x = torch.cat((normalise(x, self.eps), normalise(h.flatten(0, 1), self.eps)), -1)
        x = block(product(x, block.eh), cache.kv[k], self.place(tokens.shape[1], cache))
        return (normalise(x, self.eps) * block.out_norm).view_as(h)

    def logits(self, h: Tensor) -> Tensor:
        return upcast(product(h.flatten(0, 1), self.head)).unflatten(0, h.shape[:2])


# ---- Is the formula still the one that was copied? -----------------------------------------------
#
# Every copy in this file and in fp8.py was made from one text of its formula. FINGERPRINTS has
# eight digits of that text. Say that someone writes F.relu(gate) in place of F.silu(gate) in
# model.swiglu: `fingerprint(model.swiglu)` is then not the one of the table. Three places ask:
#
#   a twin     `fast_twin` asks at every call, for the formula and for what the twin relies on. If
#              one of these is edited, it calls the formula.
#   --fp8      model.use_fp8 asks for what fp8.py copies (`edited`). In the example it refuses.
#   decoding   sample.py asks `not_as_copied` for nearly all of model.py, since the Decoder copies
#              that. In the example the answer is "model.swiglu", and model.py decodes.
#
# Edits may also be made while the program runs: another function or class, a method given to one
# module, a hook. So the check looks at the functions and modules in memory, not at the file. If you
# edit a formula and its copy alike, run `python ops.py` and replace the table by what it prints.

FINGERPRINTS = {
    "rms_norm": "8bc7d41e",
    "RMSNorm": "d158059f",
    "yarn_mscale": "263d83e0",
    "rope_table": "7b3d8007",
    "rotate": "bec1206a",
    "Cache": "ce6db608",
    "causal_attention": "847902e8",
    "MLA": "f65772da",
    "swiglu": "16d73f12",
    "MLP": "19ef2dbd",
    "Gate": "93d70a9a",
    "expert_counts": "c5cc6574",
    "sort_by_expert": "f1398087",
    "dispatch": "b4f7e8fa",
    "combine": "7b97e2c5",
    "grouped_linear": "67ad773c",
    "Experts": "f0c2bade",
    "MoE": "ae1cff9f",
    "Block": "74be6dd2",
    "MTP": "fe68f175",
    "head_loss": "25bcce7d",
    "DeepSeekV3.__init__": "f854eb75",
    "DeepSeekV3.run_block": "95f91f4a",
    "DeepSeekV3.rope": "888221fd",
    "DeepSeekV3.trunk": "7ebf7911",
    "DeepSeekV3.predict_next": "e0874a6d",
    "DeepSeekV3.forward": "1e12bbf1",
    "DeepSeekV3.logits": "d1423d81",
}
# Twins of experts also take for granted how rows and slots belong together, and who uses them.
ROUTING = ["sort_by_expert", "expert_counts", "Experts", "MoE"]
RELIES_ON = dict.fromkeys(("sort_by_expert", "dispatch", "combine"), ROUTING)
# These have no part in decoding (but `edited_forward` looks after forward).
NOT_DECODED = {"head_loss", "DeepSeekV3.__init__", "DeepSeekV3.forward"}
QUESTIONS: list[Callable] = []  # the question of each twin, for tell_compiler
LINES: dict[str, list[str]] = {}  # of files with formulas, as they were when these were imported


def codes_of(formula: Any) -> tuple[CodeType, ...]:
    """The compiled code of a function, or of the methods of a class and of its bases, those put in
    later included (but no static or class methods); () where there is none.

    A wrapper counts as itself, not as the function that it wraps: it may change the result.
    """
    if not inspect.isclass(formula):
        inner = getattr(formula, "formula", None)  # under @fast_twin
        # functools.wraps gives a wrapper of a twin this attribute too, but another __wrapped__.
        if inner is not None and getattr(formula, "__wrapped__", None) is inner:
            formula = inner
        return (formula.__code__,) if inspect.isfunction(formula) else ()
    stop = nn.Module if issubclass(formula, nn.Module) else object
    kinds = formula.__mro__[: formula.__mro__.index(stop)]
    members = (getattr(x, "fget", None) or x for kind in kinds for x in vars(kind).values())
    return tuple(x.__code__ for x in members if inspect.isfunction(x))


def source_tokens(code: CodeType) -> str:
    """A function's tokens from `def` on, without comments, docstring and layout. The end of a line
    is ¶, more indentation is », less is «. Returns "" where no source can be read."""
    lines = LINES.get(code.co_filename) or linecache.getlines(code.co_filename)
    try:
        block = inspect.getblock(lines[code.co_firstlineno - 1 :])
        source = textwrap.dedent("".join(block))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return ""
    layout = {tokenize.NEWLINE: "¶", tokenize.INDENT: "»", tokenize.DEDENT: "«"}
    kept = []
    for token in tokens:
        if not kept and token.string != "def":
            continue  # a decorator; one that changes the function has put another in its place
        begins = kept and kept[-1] in layout.values()  # a line
        if begins and token.type in (tokenize.STRING, tokenize.NEWLINE):
            continue  # a docstring, and the end of its line
        if token.type in layout:
            kept.append(layout[token.type])
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            kept.append(token.string)
    return "".join("".join(kept).split())  # Python 3.12 cuts up f-strings: blanks would differ


@functools.cache
def fingerprint_of(codes: tuple[CodeType, ...]) -> str:
    text = "".join(map(source_tokens, codes))
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text else "unknown"


def fingerprint(formula: Any) -> str:
    """Eight digits for the source of a function or class, without comments, docstrings and layout.

    The same under every Python from 3.10 on; "unknown" where there is no source to read.
    """
    return fingerprint_of(codes_of(formula))


def edited(source: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the names whose formulas are not as copied. `source` is the namespace of a model.py.

    First come `upcast` and `compute_dtype`, if that namespace has others than this file's: copies
    use these. A name such as "DeepSeekV3.trunk" means a method.
    """

    def find(name: str) -> Any:
        outer, _, inner = name.partition(".")
        return getattr(source.get(outer), inner, None) if inner else source.get(outer)

    helpers = [f.__name__ for f in (upcast, compute_dtype) if source.get(f.__name__, f) is not f]
    return helpers + [name for name in names if fingerprint(find(name)) != FINGERPRINTS[name]]


@functools.cache
def tell(sentence: str) -> None:
    """Says it once."""
    info(sentence)


def fast_twin(formula: Callable) -> Callable:
    """Calls the function of the same name in this file in the formula's place.

    The formula itself is called where it, or what its twin relies on, has been edited or replaced;
    with `enabled` off; on a device other than a CPU or CUDA; with named arguments; or where the
    twin returns NotImplemented. Raises ValueError for a formula without a twin.
    """
    name, inner = formula.__name__, inspect.unwrap(formula)
    if name not in FINGERPRINTS or name not in globals():
        raise ValueError(f"ops.py has no twin of {name}: leave out @fast_twin")
    twin, asked = globals()[name], [name, *RELIES_ON.get(name, [])]
    file, source = inner.__code__.co_filename, inner.__globals__
    linecache.checkcache(file)
    LINES[file] = linecache.getlines(file)

    def stands() -> bool:
        if changed := edited(source, asked):
            tell(f"model.{changed[0]} is not the one that ops.py copies: the formula runs instead")
        return not changed

    @functools.wraps(formula)
    def choose(*args, **kwargs):
        usable = enabled and not kwargs and args[0].device.type in ("cpu", "cuda")
        y = twin(*args) if usable and stands() else NotImplemented
        return formula(*args, **kwargs) if y is NotImplemented else y

    choose.formula = formula
    QUESTIONS.append(stands)
    return choose


def tell_compiler() -> None:
    """A graph may keep the answers to QUESTIONS. Called for torch.compile only: it imports that."""
    for question in QUESTIONS:
        torch.compiler.assume_constant_result(question)


def altered(module: nn.Module, model: nn.Module) -> str:
    """How this one module differs from what its class and the configuration say, if the Decoder
    would not notice: a method or configuration of its own, a hook, a bias. In words for a sentence;
    "" if it does not differ."""
    kind, config = type(module), model.config
    # Attributes of the module that hide a method of its class.
    own = {name for name in vars(module) if callable(getattr(kind, name, None))}
    if module is model:
        own &= {"trunk", "predict_next", "logits", "rope", "run_block"}
    elif module._forward_hooks or module._forward_pre_hooks:
        return f"a hook of one {kind.__name__}"
    if own:
        return f"{min(own)} of one {kind.__name__}"
    if kind is nn.Linear and module.bias is not None and not config.attention_bias:
        return "a bias"
    if kind is nn.Embedding and module.max_norm is not None:
        return "max_norm of an embedding"
    own_config = getattr(module, "config", config)
    if own_config is not config and own_config != config:
        return f"config of one {kind.__name__}"
    if getattr(module, "eps", 1e-6) not in (1e-6, config.rms_norm_eps):
        return f"eps of one {kind.__name__}"
    return ""


def not_as_copied(model: nn.Module) -> str:
    """What of this model the Decoder does not copy, as words for a sentence; "" if it copies all.

    It looks at the modules that the model really has, at their classes, and at the functions that
    these classes call.
    """
    for module in model.modules():
        if words := altered(module, model):
            return words
    names = [name for name in FINGERPRINTS if name not in NOT_DECODED]
    methods = [name for name in names if name.startswith("DeepSeekV3.")]
    namespaces = {}  # of the files that the classes come from: usually model.py alone
    for kind in dict.fromkeys(map(type, model.modules())):  # every class once
        name = kind.__name__
        if kind in (nn.Linear, nn.Embedding, nn.ModuleList):
            continue
        if kind is type(model):
            if changed := edited({"DeepSeekV3": kind}, methods):
                return f"model.{changed[0]}"
            source = kind.trunk.__globals__
        elif fingerprint(kind) != FINGERPRINTS.get(name):
            return f"model.{name}" if name in FINGERPRINTS else f"the class {name} of a module"
        else:
            source = kind.forward.__globals__
        namespaces[id(source)] = source
    for source in namespaces.values():
        if changed := edited(source, [name for name in names if name not in methods]):
            return f"model.{changed[0]}"
    return "a bias" if model.config.attention_bias else ""


def edited_forward(model: nn.Module) -> bool:
    """Whether DeepSeekV3.forward is edited. Decoding does not call it, but it may give other logits
    than trunk and logits do: then sample.py compares them."""
    return fingerprint(type(model).forward) != FINGERPRINTS["DeepSeekV3.forward"]


def state_of(model: nn.Module) -> tuple:
    """Something that changes with every edit of the model's code, whatever has been patched: so
    sample.py compares each edited state once."""
    source = type(model).trunk.__globals__
    functions = tuple(codes_of(source.get(name)) for name in FINGERPRINTS if "." not in name)
    modules = []
    for module in model.modules():
        own = [id(x) for x in vars(module).values() if callable(x)]
        hooks = *module._forward_hooks, *module._forward_pre_hooks
        modules.append((codes_of(type(module)), *own, hooks))
    return functions, *modules, str(vars(model.config))


if __name__ == "__main__":  # for who has edited a formula and its copy alike
    import model

    print("FINGERPRINTS = {")
    for name in FINGERPRINTS:
        outer, _, inner = name.partition(".")
        formula = getattr(model, outer)
        print(f'    "{name}": "{fingerprint(getattr(formula, inner) if inner else formula)}",')
    print("}")
