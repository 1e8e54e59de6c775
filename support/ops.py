"""Fast twins of formulas in model.py: functions with the name, the arguments and, but for rounding,
the result of their formulas.

model.py marks such a formula with `@fast_twin("digits")`: the digits are of its source, as it was
when its twin was written. They are compared when model.py is imported. A formula that has been
edited runs itself, everywhere, and a line on stderr says so; where a twin returns NotImplemented
the formula runs, too. So model.py may be read and edited without a look at this file.

The file's order: the mark; precision; twins for training (attention, experts, norm and rotation on
a GPU, output head); twins for writing text, where few numbers are moved by many operations; copies
of weights, which these multiply by and which live as long as a text is written; the dtype in which
this machine is fast.

A twin is here if it saves 3 % or more of a training step of config/small.py or of its writing on
two CPU cores, or is needed on a GPU; docs/notes/LOG.md has the figures. Letters are model.py's.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from support.digits import digits_of, function_source
from support.settings import info, short

# ---- The mark ------------------------------------------------------------------------------------

enabled = True  # the tests turn the twins off, to compare them with their formulas
FORMULAS: dict[Callable, Callable] = {}  # a marked function -> its formula


def fingerprint(*functions: Callable) -> str:
    """Eight digits of the source of these functions together: see support/digits.py."""
    return digits_of(*(function_source(FORMULAS.get(f, f)) for f in functions))


def fast_twin(digits: str, *others: Callable) -> Callable:
    """Calls the function of the same name in this file in the formula's place.

    digits: the fingerprint of the formula, and of the others that its twin copies, when the twin
    was written. Where they have other digits now, the formula stays what it is. It is also called
    with `enabled` off, with named arguments, on a device other than a CPU or CUDA, and where one of
    the others was replaced while the program runs.
    """

    def mark(formula: Callable) -> Callable:
        found = fingerprint(formula, *others)
        if found != digits:
            which = " or ".join(f.__name__ for f in (formula, *others))
            info(f"{which} is edited (its digits are {found}): it runs without its fast twin")
            return formula
        twin = globals()[formula.__name__]

        @functools.wraps(formula)
        def choose(*args, **kwargs):
            # Whether their names still mean what the twin copies (`not others` saves time).
            copied = not others or all(formula.__globals__.get(f.__name__) is f for f in others)
            if enabled and copied and not kwargs and (args[0].is_cpu or args[0].is_cuda):
                y = twin(*args)
                if y is not NotImplemented:
                    return y
            return formula(*args, **kwargs)

        FORMULAS[choose] = formula
        return choose

    return mark


# ---- Precision and positions ---------------------------------------------------------------------


def upcast(x: Tensor) -> Tensor:
    """x in the precision of gate, norms, softmax and loss: float64 stays, all else is float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes a microsecond even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def linear32(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the precision of the gate, also under autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(upcast(x), upcast(weight))
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(upcast(x), upcast(weight))


def on_gpu(x: Tensor) -> bool:
    """Whether x is on CUDA. It is a function so that bench.py can replace it by one that says yes:
    that counts a GPU's kernels where there is none."""
    return x.is_cuda


def fused(function: Callable) -> Callable:
    """The function, on a GPU compiled to one kernel or two in place of one for each operation."""

    @functools.wraps(function)
    def choose(*args, **kwargs):
        if torch.compiler.is_compiling():  # a graph fuses it anyway
            return function(*args, **kwargs)
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return (compiled(function) if on_gpu(tensor) else function)(*args, **kwargs)

    return choose


@functools.cache
def compiled(function: Callable) -> Callable:
    if not compiles():
        return function
    # A graph for each dtype and kind of block. torch 2.13 keeps the limit by thread, and on a GPU
    # backward has its own: set here, where a function is first called, it holds in both.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


@functools.cache
def compiles() -> bool:
    """Whether a kernel can be compiled for this GPU; says once why not. That needs Triton (not on
    Windows), which needs a GPU of 2018 or later, a C compiler and Python's header files."""
    try:
        torch.compile(lambda: 2 * torch.arange(2, device="cuda"))()
    except Exception as error:  # of any kind: it comes from Triton, from gcc, ...
        info(f"kernels cannot be fused here, so training is slower: {short(error)}")
        return False
    return True


def span(start: int | Tensor, length: int) -> slice | Tensor:
    """Positions from start on: a slice, or in a graph that serves every start a tensor."""
    if isinstance(start, int):
        return slice(start, start + length)
    return start + torch.arange(length, device=start.device)


# ---- Training: attention -------------------------------------------------------------------------

SHORT = 512  # the longest window whose scores are written out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, start=None) -> Tensor:
    """PyTorch's fused kernel. On a CPU, in bf16 and short windows, written-out scores take a third
    of its time."""
    (B, _, T, _), V = q.shape, v.shape[-1]
    if not isinstance(scale, float) or not q.dtype == k.dtype == v.dtype:
        return NotImplemented  # a learnt scale, say
    one_head = k.shape[:2] == v.shape[:2] == (B, 1)
    # The queries must be the newest tokens: start is None or S - T. In a graph start is a tensor,
    # which cannot be compared here; attend_latents then masks by it.
    newest = isinstance(start, Tensor) or start in (None, k.shape[2] - T)
    if one_head and newest and writing():
        return attend_latents(q, k[:, 0], v[:, 0], scale, start)
    if not (q.shape[:3] == k.shape[:3] == v.shape[:3]) or isinstance(start, Tensor) or start:
        return NotImplemented
    if not on_gpu(q) and q.dtype == torch.bfloat16 and T <= SHORT:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        later = q.new_full((T, T), -math.inf).triu_(1).expand(len(q), T, T)
        p = torch.baddbmm(later, q, k.mT, alpha=scale).softmax(-1)
        return torch.bmm(p, v).unflatten(0, (B, -1))
    width = max(q.shape[-1], V)  # the fused kernels want q, k and v of one width
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :V]


# ---- Training: experts ---------------------------------------------------------------------------
#
# Tokens are sorted by expert, so that each expert's rows are one product. Two tokens, K = 2, E = 3:
# `chosen` [[2, 0], [2, 1]] says that expert 0 has token 0, expert 1 token 1, expert 2 both. Then
#
#               expert 0   expert 1   expert 2
#     rows       0          1          0   1      the token in each row
#     slots                                       [[2, 0], [3, 1]]: the rows of each token's experts
#     counts        1          1          2       how many rows each expert has
#
# Under autocast on a CPU each expert gets rows up to the next multiple of MULTIPLE, since oneDNN
# compiles a kernel for every new number of rows. An extra row repeats the token of its expert's
# last row, which leaves FP8's scales alone. No slot leads to it: it has no part in any result. With
# multiples of 2 in place of 64:
#
#     rows       0   0      1   1      0   1      the second and the fourth are extra
#     slots                                       [[4, 0], [5, 2]]
#     counts        2          2          2

MULTIPLE = 64


def rows_multiple(x: Tensor) -> int:
    return MULTIPLE if not on_gpu(x) and torch.is_autocast_enabled("cpu") else 1


def sort_by_expert(chosen: Tensor, E: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """chosen (tokens, K) -> rows (rows,), slots (tokens, K), counts (E,). The comments go on with
    the example."""
    expert = chosen.flatten()  # 2 0 2 1
    counts = torch.zeros(E, dtype=torch.long, device=expert.device)
    counts = counts.scatter_add_(0, expert, torch.ones_like(expert))  # 1 1 2
    padded = multiple > 1
    if padded:
        missing, size = -counts % multiple, None  # 1 1 0
        if on_gpu(expert):
            # As many as there can be, so that no size waits for the counts. The last expert has
            # those that nobody needs.
            size = E * multiple - len(expert) % multiple
            missing[-1] += size - missing.sum()
        extra = torch.arange(E, device=expert.device)  # 0 1, the experts of the extra rows
        extra = extra.repeat_interleave(missing, output_size=size)
        expert, counts = torch.cat((expert, extra)), counts + missing
    # Sorted together, an expert's extra rows come after its others, as the sort is stable.
    order = expert.argsort(stable=True)  # 1 4 3 5 0 2: 4 and 5 are extra
    row = torch.arange(len(order), device=order.device)
    slots = torch.empty_like(order).scatter_(0, order, row)[: chosen.numel()]  # 4 0 5 2
    if padded:
        real = torch.where(order < chosen.numel(), row, 0)  # 0 0 2 0 4 5: 0 where it is extra
        # cummax: 0 0 2 2 4 5, for each row the last real one up to it
        order = order[real.cummax(0).values]  # 1 1 3 3 0 2
    return order // chosen.shape[1], slots.view_as(chosen), counts


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
    """Every token's x to the rows of its experts: x (tokens, D) -> (rows, D). Autograd's gradient
    of x[rows] adds row by row; with `combine` this saves 9 % in fp32."""
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


def combine(y: Tensor, rows: Tensor, slots: Tensor, padded: bool) -> Tensor:
    """The sum of every token's K rows: y (rows, D) -> (tokens, D); see dispatch. padded: there are
    extra rows."""
    return _Combine.apply(y, rows, slots, padded)


def has_grouped_mm(device: torch.device) -> bool:
    """Whether PyTorch's one call for all experts is right and fast there: not on Blackwell, where
    an expert without rows can get a wrong gradient (pytorch #172439), and not on Ampere, where
    every call waits for the GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each row of x (rows, in), sorted by expert, times its expert's weight (E, out, in): by
    PyTorch's one call for all experts, where it knows dtype and widths."""
    dtype = compute_dtype(x)
    aligned = all(n * dtype.itemsize % 16 == 0 for n in weight.shape[1:])
    known = dtype == torch.bfloat16 and has_grouped_mm(x.device)
    if dtype == torch.float32:  # refused on CUDA and in graphs
        known = not (on_gpu(x) or torch.compiler.is_compiling())
    if aligned and known:
        ends = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=ends)
    parts = zip(x.split(counts.tolist()), weight, strict=True)
    return torch.cat([F.linear(x_e, w) for x_e, w in parts])  # (rows, out)


def among_experts(chosen: Tensor, gain: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """A choice that is none of the experts 0 .. E-1 adds nothing to the formula's sum, as a null
    expert. Here it goes to one of them, with the gate value 0: no size waits for the choices."""
    expert = chosen.remainder(E)
    return expert, gain * (expert == chosen)


@fused
def swiglu32(gate: Tensor, up: Tensor, gain: Tensor | None) -> Tensor:
    """model.swiglu, in float32 (float64 stays)."""
    y = F.silu(upcast(gate)) * upcast(up)
    return y if gain is None else y * gain[:, None]


@fused
def swiglu_gradients(dy: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None) -> tuple:
    """From the gradient of swiglu32(gate, up, gain) those of gate, up and gain, in float32 (float64
    stays)."""
    dy, gate, up = upcast(dy), upcast(gate), upcast(up)
    sigmoid, d_gain = gate.sigmoid(), None
    silu = gate * sigmoid
    if gain is not None:
        d_gain = (dy * silu * up).sum(-1)  # (rows,)
        dy = dy * gain[:, None]
    return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu, d_gain


@fused
def _low_swiglu(gate: Tensor, up: Tensor, gain: Tensor | None) -> Tensor:
    return swiglu32(gate, up, gain).to(torch.promote_types(gate.dtype, up.dtype))


@fused
def _low_gradients(dy: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None) -> tuple:
    d_gate, d_up, d_gain = swiglu_gradients(dy, gate, up, gain)
    return d_gate.to(gate.dtype), d_up.to(up.dtype), d_gain


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gain: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, gain)
        return _low_swiglu(gate, up, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return _low_gradients(dy, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor, gain: Tensor | None = None) -> Tensor:
    """In training on a GPU one kernel forward and one backward, in place of nine."""
    if writing() or not on_gpu(gate) or torch.compiler.is_compiling():
        return NotImplemented
    return _SwiGLU.apply(gate, up, gain)


def by_expert(
    x: Tensor, chosen: Tensor, gain: Tensor, E: int, ffn: Callable, multiple: int | None = None
) -> Tensor:
    """The sum of every token's experts: x (tokens, D), chosen and gain (tokens, K) -> (tokens, D).

    ffn(x (rows, D), counts (E,), gain (rows,)) -> (rows, D) computes all experts' rows. Each has a
    multiple of so many; None: of what suits the device.
    """
    multiple = multiple or rows_multiple(x)
    chosen, gain = among_experts(chosen, gain, E)
    rows, slots, counts = sort_by_expert(chosen, E, multiple)
    # Each gate value goes to the row of its token and expert; extra rows keep 0.
    gain = gain.new_zeros(len(rows)).scatter(0, slots.flatten(), gain.flatten())  # (rows,)
    return combine(ffn(dispatch(x, rows, slots), counts, gain), rows, slots, multiple > 1)


def routed_ffn(x: Tensor, chosen: Tensor, gain: Tensor, gate_up, down, swiglu) -> Tensor:
    """One product for all experts in place of a loop; for few tokens see `visit`."""
    if writing() and not torch.is_autocast_enabled(x.device.type):
        y = visit(x, chosen, gain, gate_up, down, swiglu)
        if y is not NotImplemented:
            return y

    def ffn(x: Tensor, counts: Tensor, gain: Tensor) -> Tensor:
        gate, up = grouped_linear(x, gate_up, counts).chunk(2, dim=-1)  # (rows, F) each
        return grouped_linear(swiglu(gate, up, gain), down, counts)

    return by_expert(x, chosen, gain, len(down), ffn)


# ---- Training: norm and rotation, on a GPU -------------------------------------------------------


@fused
def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """model.rms_norm, rounded once, to dtype; and 1 / sqrt(mean(x^2) + eps), (..., 1)."""
    x = upcast(x)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (weight * (x * r)).to(dtype), r


@fused
def norm_gradient(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """Of x: (..., D), in its dtype."""
    dy, y = weight * upcast(dy), upcast(x) * r
    return (r * (dy - y * (dy * y).mean(-1, keepdim=True))).to(x.dtype)


@fused
def norm_weight_gradient(dy: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """(D,), in float32 (float64 stays)."""
    return (upcast(dy) * (upcast(x) * r)).reshape(-1, x.shape[-1]).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, r = normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        dw = norm_weight_gradient(dy, x, r).to(weight.dtype)
        return norm_gradient(dy, x, weight, r), dw, None, None


@fused
def turned(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool, back: bool) -> Tensor:
    """model.rotate, forward or back."""
    cos, sin = cos[:, None], (-sin if back else sin)[:, None]  # (T, 1, R/2)
    pair = -1 if interleave else -2
    a, b = upcast(x).unflatten(-1, (-1, 2) if interleave else (2, -1)).unbind(pair)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), pair).flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return turned(x, cos, sin, interleave, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return turned(dy, *ctx.saved_tensors, ctx.interleave, True), None, None, None


# ---- Training: output head -----------------------------------------------------------------------

CHUNK = 2**28  # logits at once on a GPU: 0.5 GB in bf16, and as much for their gradients
CPU_ROWS = 256  # tokens: few enough for a CPU's caches, enough to pay for a pass over dw


@fused
def loss_and_gradient(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z (chunk, vocabulary), targets y (chunk,) -> the losses (chunk,), -log softmax(z)_y,
    and their gradients by z, softmax(z) - onehot(y), in z's dtype. For GPUs: it runs in passes."""
    z32, y = upcast(z), y.clamp(min=0)[:, None]
    log_sum = z32.logsumexp(-1, keepdim=True)
    hit = torch.arange(z.shape[1], device=z.device) == y
    return (log_sum - z32.gather(1, y))[:, 0], ((z32 - log_sum).exp() - hit.float()).to(z.dtype)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy by chunks of tokens. The gradients of a chunk are formed as soon as its logits
    are there, so that no more than (chunk, vocabulary) of them exist at once; backward only
    multiplies what forward has computed."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, need: bool) -> Tensor:
        real, w = (targets >= 0)[:, None], weight.to(h.dtype)  # (tokens, 1)
        h = h * real  # so that rows without a target add nothing to dw
        dh, dw = torch.empty_like(h), torch.zeros_like(weight) if need else None
        chunk = min(len(h), CHUNK // len(w) if on_gpu(h) else CPU_ROWS)
        # Two buffers for all chunks: on a CPU fresh ones would cost a third of the time.
        low, losses = h.new_empty(chunk, len(w)), []
        high = low if on_gpu(h) else upcast(torch.empty_like(low))
        for x, y, dx in zip(*(t.split(chunk) for t in (h, targets, dh)), strict=True):
            low, high = low[: len(x)], high[: len(x)]  # (chunk, vocabulary)
            torch.mm(x, w.T, out=low)  # the logits
            if on_gpu(h):
                loss, p = loss_and_gradient(low, y)
                losses.append(loss)
            else:
                z = high.copy_(low)  # in float32 (float64 stays)
                row, y = torch.arange(len(x), device=x.device), y.clamp(min=0)
                z_max, z_y = z.amax(-1), z[row, y]
                p = torch.softmax(z, -1, out=high)  # takes the memory of z, not read any more
                # The loss is log sum exp z - z_y, and max p = exp(z_max) / sum exp z.
                losses.append(z_max - p.amax(-1).log() - z_y)
                if need:  # d loss / d z = softmax(z) - onehot(target)
                    p[row, y] -= 1
                    p = low.copy_(p)
            if need:
                torch.mm(p, w, out=dx)
                dw += p.T @ x
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


# ---- Writing text --------------------------------------------------------------------------------
#
# Writing moves few numbers in many operations, and on a CPU each costs microseconds however small
# it is. From the sizes that follow, measured on two cores, another way to compute the same is
# faster. These twins work within `laid_out` (below), where no gradient is asked for.

LONG = 2**14  # cached tokens from which the threads share them out
PAIRS = 2**13  # of queries and cached tokens, up to which loops are faster than products
LARGE = 2**17  # weights of a matrix from which oneDNN's layout pays
ROWS = 16  # rows of x that this layout is packed for; in a graph, the most for which loops pay
MOST = 3 * 2**26  # weights in a layer's experts up to which these are copied into another order
PAYS = 32  # tokens to be written from which copies are made
FEW = 32  # tokens up to which each reads its experts' weights by itself
# Loops and oneDNN's layout are for AVX512; with AVX2 the BLAS is faster. This is not timed: where
# both are about as fast, two texts of one seed would differ.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


open_texts = 0  # how many are being written now, each within `laid_out`


def writing() -> bool:
    return open_texts > 0 and not torch.is_grad_enabled()


def as_loops(x: Tensor) -> bool:
    """Whether sums should be written out, which the compiler turns into loops: in a graph on a
    CPU, whose products of few rows are slower."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and AVX512


@functools.cache
def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """While a text is written: fewer operations (in a graph the formula is as fast). In training on
    a GPU: three kernels. The formula takes many more, and they would move 28 % of all bytes of a
    step."""
    if torch.compiler.is_compiling() or isinstance(eps, Tensor):  # a learnt eps, say
        return NotImplemented
    if not writing():
        if not on_gpu(x) or weight.shape != x.shape[-1:]:  # a weight for each head, say
            return NotImplemented
        return _RMSNorm.apply(x, weight, eps, compute_dtype(x))
    dtype = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    eps = scalar(eps, dtype, x.device)
    y = x * torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return cast(weight * cast(y, x.dtype), compute_dtype(x))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """A pair turned by an angle is a product of complex numbers. In training on a GPU one kernel
    forward and one backward; on a CPU the formula is as fast."""
    if torch.compiler.is_compiling():
        return NotImplemented
    if on_gpu(x) and not (writing() or any(table.requires_grad for table in rope)):
        return _Rotate.apply(x, *rope, interleave)
    if not (writing() and interleave):
        return NotImplemented
    x32 = upcast(x)
    *strides, last = x32.stride()
    if last != 1 or any(n % 2 for n in (x32.storage_offset(), *strides)):  # pairs lie anywhere
        return NotImplemented
    turned = torch.view_as_complex(x32.unflatten(-1, (-1, 2))) * complex_table(*rope)
    return cast(torch.view_as_real(turned).flatten(-2), x.dtype)


@functools.lru_cache(1)  # all layers turn by the same angles
def complex_table(cos: Tensor, sin: Tensor) -> Tensor:
    """cos + i sin (T, 1, R/2)."""
    return torch.complex(cos, sin)[:, None]


def per_head(x: Tensor, W: Tensor) -> Tensor:
    if not (writing() and as_loops(x) and x.shape[:2].numel() <= ROWS):
        return NotImplemented
    return (upcast(x)[..., None] * W).sum(-2).to(x.dtype)


def attend_latents(q: Tensor, k: Tensor, v: Tensor, scale: float, start) -> Tensor:
    """causal_attention with one head of keys k (B, S, W) and values v (B, S, V) for all queries.
    These are the newest of the S tokens, unless start is a tensor."""
    (_, H, T, _), S = q.shape, k.shape[1]
    known = not (torch.compiler.is_compiling() or isinstance(start, Tensor))
    later = None  # the newest token may look at all
    if not known:
        start = S - T if start is None else start
        later = mask.__wrapped__(start, T, S, H, q.dtype, q.device)
    elif T > 1:
        later = mask(S - T, T, S, H, q.dtype, q.device)
    q = (q * scale).reshape(len(q), H * T, -1)
    if as_loops(q) and q.shape[1] * S <= PAIRS:
        p = ((upcast(q)[:, :, None] * k[:, None]).sum(-1) + later).softmax(-1)
        o = cast((p[..., None] * v[:, None]).sum(2), q.dtype)
    elif known and S >= LONG and q.device.type == "cpu" and begins(k, v):
        o = attend_in_pieces(q, k, T, later)[..., : v.shape[-1]]
    else:
        score = torch.bmm(q, k.mT) if later is None else torch.baddbmm(later, q, k.mT)
        o = torch.bmm(cast(upcast(score).softmax(-1), q.dtype), v)  # (B, H*T, V)
    return o.view(len(o), H, T, -1)


def begins(k: Tensor, v: Tensor) -> bool:
    """Whether each row of v is the beginning of k's row, in the same memory."""
    place = k.data_ptr() == v.data_ptr() and k.stride() == v.stride()
    return place and k.shape[-1] >= v.shape[-1]


@functools.lru_cache(1)  # all layers have the same
def mask(start, T: int, S: int, H: int, dtype, device) -> Tensor:
    """(H*T, S): 0 where a query may look, -inf elsewhere."""
    query = start + torch.arange(T, device=device)[:, None]
    later = torch.arange(S, device=device) > query
    return torch.where(later, -math.inf, 0.0).to(dtype).repeat(H, 1)


def attend_in_pieces(q: Tensor, k: Tensor, T: int, later: Tensor | None) -> Tensor:
    """softmax(q k^T + later) k for a long k.

    The fused kernel gives every head to a thread. So the old tokens are cut into a piece for each
    thread, which it takes for heads; the new tokens, which need the mask, are the rest. Each part
    has a softmax of its own, and counts by its share of the whole denominator.
    """
    pieces, S = torch.get_num_threads(), k.shape[1]
    old = (S - T) // pieces * pieces
    q, k, rest = q[:, None], k[:, :old].unflatten(1, (pieces, -1)), k[:, None, old:]
    later = None if later is None else later[:, old:]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, log = fused(q.expand(-1, pieces, -1, -1), k, k, scale=1.0)  # o (B, pieces, H*T, W)
    o_rest, log_rest = fused(q, rest, rest, attn_mask=later, scale=1.0)
    share = torch.cat((log, log_rest), 1).softmax(1)[..., None]
    return (share * torch.cat((o, o_rest), 1)).sum(1).to(q.dtype)


def visit(x: Tensor, chosen: Tensor, gain: Tensor, gate_up, down, swiglu) -> Tensor:
    """routed_ffn for few tokens (n), each of which reads the weights of its experts.

    In a graph by loops. Else x W^T is a sum of rows of W^T, each times a number of x. That is what
    `embedding_bag` computes, for all tokens and experts in one call per projection, at the speed of
    memory.
    """
    graph = torch.compiler.is_compiling()
    (n, K), D = chosen.shape, x.shape[1]
    if not graph and (n > FEW or not hasattr(gate_up, "_turned")):
        return NotImplemented

    chosen, gain = chosen.reshape(-1), gain.reshape(-1)  # (n * K,)
    if graph:
        chosen, gain = among_experts(chosen, gain, len(down))

    def times(x: Tensor, w: Tensor) -> Tensor:  # (n * K, in) -> (n * K, out)
        if graph:
            return (w[chosen] * x.unsqueeze(-2)).sum(-1)
        rows, bags = places(len(w), x.shape[1], FEW)
        index, bags = rows.index_select(0, chosen).view(-1), bags[: n * K]
        # mode 0 sums; F.embedding_bag takes half as long again.
        return torch.embedding_bag(w._turned, index, bags, False, 0, False, x.reshape(-1))[0]

    x = x.view(n, 1, D).expand(n, K, D).reshape(n * K, D)
    try:
        gate, up = times(x, gate_up).chunk(2, -1)  # (n * K, F)
    except IndexError:  # a choice is none of the experts: by_expert knows that
        return NotImplemented
    y = times(swiglu(gate, up, gain), down)  # (n * K, D)
    return y.view(n, K, D).sum(1)


@functools.cache
def places(E: int, width: int, few: int) -> tuple[Tensor, Tensor]:
    """Of E experts' turned weights, (E * width, out): which rows are an expert's (E, width); and
    where each of many bags of `width` rows begins."""
    return torch.arange(E * width).view(E, width), torch.arange(0, few * E * width, width)


# ---- Copies of weights, while a text is written --------------------------------------------------


STACKED = ("gate_up_proj", "down_proj")  # the weights of model.Experts; no others are copied so
LINEAR = nn.Linear.forward  # which may be patched later: then it is called, without copies


class LaidOut(nn.Linear):
    """nn.Linear as it is within `with laid_out(model)`: see product."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, for few rows of x by the copy of the weight, in a graph by loops."""
    if as_loops(x):
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > ROWS:
            return F.linear(x, weight, bias)
        # These read the weight once for all rows. x is written to memory before them, else they
        # would compute it anew for every row of the weight.
        from torch._inductor.inductor_prims import force_stride_order

        rows = upcast(rows)
        rows = force_stride_order(rows, rows.stride())
        y = torch.cat([(weight * row).sum(-1)[None] for row in rows.split(1)]).to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    copy = getattr(weight, "_laid_out", None)
    if copy is not None:
        return torch.ops.mkldnn._linear_pointwise.default(x, copy, bias, "none", [], "")
    return F.linear(x, weight, bias)


def head_logits(h: Tensor, weight: Tensor) -> Tensor:
    if not writing():
        return NotImplemented
    return upcast(product(h, weight))


def copies(w: Tensor) -> bool:
    """Whether oneDNN's layout pays for this matrix: that reads it at the speed of memory, and up to
    five rows of x take the time of one. Smaller ones the BLAS multiplies as fast."""
    known = w.dtype == torch.float32 or (
        w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return AVX512 and known and w.numel() >= LARGE


@contextmanager
def laid_out(model: nn.Module, compiled: bool = False, tokens: int = PAYS) -> Iterator[None]:
    """Within `with laid_out(model):` the twins for writing text are on.

    tokens: how many will be written. From PAYS on, large matrices and the experts have copies,
    on a CPU, in another order (a graph needs none): those of nn.Linear and of the experts, of no
    other modules. Unless compiled, every module has its parts as plain attributes meanwhile. The
    weights must not change there, and a model writes one text (of any number of rows) at a time;
    nothing of this is left behind.
    """
    copied = tokens >= PAYS and not compiled
    global open_texts
    linears, weights, modules = [], [], list(model.modules())
    open_texts += 1
    try:
        for module in modules:
            own = {n: w for n, w in module._parameters.items() if w is not None and w.is_cpu}
            plain = type(module) is nn.Linear and nn.Linear.forward is LINEAR and "weight" in own
            stacked = [own[name] for name in STACKED if name in own and own[name].ndim == 3]
            if plain and (compiled or (copied and copies(own["weight"]))):
                module.__class__ = LaidOut
                linears.append(module)
                if copied:
                    w = own["weight"].detach().contiguous()
                    w = torch.ops.mkldnn._reorder_linear_weight(w, ROWS)
                    module.weight._laid_out = w
                    weights.append(module.weight)
            elif copied and len(stacked) == 2 and sum(w.numel() for w in stacked) <= MOST:
                for w in stacked:
                    w._turned = w.detach().mT.flatten(0, 1)  # (E*in, out)
                    weights.append(w)
            if not compiled:  # what nn.Module.__getattr__ would look for, 300 times a token
                module.__dict__ |= module._modules | module._parameters
        yield
    finally:
        open_texts -= 1
        for module in modules:
            for name in module._modules | module._parameters:
                module.__dict__.pop(name, None)
        for module in linears:
            module.__class__ = nn.Linear
        for w in weights:
            w.__dict__.pop("_laid_out", None)
            w.__dict__.pop("_turned", None)


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
