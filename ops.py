"""Fast twins of formulas that stand in model.py: same names, same arguments, same results.

model.py marks a formula with `@fast_twin`; then the function of that name in this file is called
in its place, as long as `enabled` is true. With `ops.enabled = False` the network computes from its
plain formulas alone, and tests/test_model.py runs both ways. To change a formula, edit model.py and
take the mark away.

Each twin says what it saves of a training step of config/small.py (two CPU cores, docs/LOG.md; one
that saves less than 3 % is not here). Letters are those of model.py.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

enabled = True


def fast_twin(formula: Callable) -> Callable:
    """The function of the same name in this file; with `enabled` off, or where that returns
    NotImplemented, the formula itself."""
    twin = globals()[formula.__name__]

    @functools.wraps(formula)
    def choose(*args):
        y = twin(*args) if enabled else NotImplemented
        return formula(*args) if y is NotImplemented else y

    return choose


def upcast(x: Tensor) -> Tensor:
    """x in the precision of gate, norms, softmax and loss: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---- Attention -----------------------------------------------------------------------------------

SHORT = 512  # the longest window whose scores are written out


class _ShortAttention(torch.autograd.Function):
    """The formula with its scores (B*H, T, T) kept for the backward pass, in bf16 throughout."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # autocast off inside
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        n, T, _ = q.shape
        later = q.new_full((T, T), -math.inf).triu_(1)
        p = torch.baddbmm(later.expand(n, T, T), q, k.mT, alpha=scale).softmax(-1)
        o = torch.bmm(p, v)
        ctx.save_for_backward(q, k, v, p, o)
        ctx.scale = scale
        return o

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, do: Tensor):
        q, k, v, p, o = ctx.saved_tensors
        mean = (do * o).sum(-1, keepdim=True)  # (n, T, 1): sum_j p_j dp_j
        ds = torch.bmm(do, v.mT).sub_(mean).mul_(p).mul_(ctx.scale)  # (n, T, T)
        return torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p.mT, do), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The fused kernel; on a CPU, in bf16 and for short windows a third of its time is enough."""
    V = v.shape[-1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= SHORT:
        o = _ShortAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), scale)
        return o.unflatten(0, q.shape[:2])
    width = max(q.shape[-1], V)  # the fused kernels want heads of one width
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :V]


# ---- Experts -------------------------------------------------------------------------------------


def sort_by_expert(chosen: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert's rows rounded up to a multiple of 64 in bf16 on a CPU: there oneDNN compiles a
    kernel for every new number of rows. The extra ones repeat the expert's last row."""
    K, expert = chosen.shape[1], chosen.flatten()  # (rows,)
    on_cpu = chosen.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    pad = 64 if on_cpu else 1
    counts = torch.zeros(E, dtype=torch.long, device=expert.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    order = expert.argsort(stable=True)
    number = torch.arange(len(order), device=order.device)
    slots = torch.empty_like(order)
    if pad == 1:
        slots[order] = number
        return order // K, slots.view_as(chosen), counts
    padded = (counts + pad - 1) // pad * pad
    start, start_padded = counts.cumsum(0) - counts, padded.cumsum(0) - padded  # (E,)
    slots[order] = number + (start_padded - start)[expert[order]]
    e = torch.arange(E).repeat_interleave(padded)  # the expert of every padded row
    within = torch.arange(len(e)) - start_padded[e]
    rows = order[start[e] + within.minimum(counts[e] - 1)] // K
    return rows, slots.view_as(chosen), padded


class _Dispatch(torch.autograd.Function):
    """x[rows], whose backward is a gather too: every row of x went to the K rows in `slots`."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x[rows]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (slots,) = ctx.saved_tensors
        return dy[slots].sum(1, dtype=dy.dtype), None, None


class _Combine(torch.autograd.Function):
    """The transpose of _Dispatch: sums, for every token, the K rows it was sent to."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return y[slots].sum(1, dtype=y.dtype)

    @staticmethod
    def backward(ctx, dx: Tensor):
        (rows,) = ctx.saved_tensors
        return dx[rows], None, None


def dispatch(x: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    return _Dispatch.apply(x, rows, slots)


def combine(y: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    return _Combine.apply(y, rows, slots)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One call for all experts, where PyTorch has it and it is right and fast: not on Blackwell,
    where an expert without rows can get a wrong gradient (pytorch #172439), and not on Ampere,
    where every call waits for the GPU."""
    dtype = compute_dtype(x)
    aligned = all(n * dtype.itemsize % 16 == 0 for n in weight.shape[1:])
    if x.is_cuda:
        card = torch.cuda.get_device_capability(x.device)
        known = card == (9, 0) and dtype == torch.bfloat16
    else:
        known = dtype in (torch.bfloat16, torch.float32)
    if not (aligned and known):
        return NotImplemented
    return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=counts.cumsum(0).int())


# ---- Output head ---------------------------------------------------------------------------------

CHUNK = 2**27  # logits at once on a GPU: 0.5 GB
CPU_ROWS = 256  # few enough for a CPU's caches, enough to pay for a pass over dw


class _HeadLoss(torch.autograd.Function):
    """The gradient of a chunk of rows is formed as soon as its logits are there, so the largest
    tensor is (chunk, vocabulary), and backward only scales what forward has computed."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n, need = (targets >= 0).sum().clamp(min=1), any(ctx.needs_input_grad)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight) if need else None
        w = weight.to(h.dtype)
        loss = upcast(h.new_zeros(()))
        chunk = CPU_ROWS if h.device.type == "cpu" else CHUNK // len(w)
        chunk = max(1, min(chunk, len(h)))
        # Two buffers for all chunks: on a CPU fresh ones would cost a third of the time.
        low = h.new_empty(chunk, len(w))
        high = torch.empty_like(low, dtype=loss.dtype)
        for x, y, dx in zip(*(t.split(chunk) for t in (h, targets, dh)), strict=True):
            target, used = y.clamp(min=0)[:, None], (y >= 0)[:, None]
            low, high = low[: len(x)], high[: len(x)]  # (chunk, vocabulary)
            z = high.copy_(torch.mm(x, w.T, out=low))
            top, z_target = z.amax(-1, keepdim=True), z.gather(1, target)
            p = torch.softmax(z, -1, out=high)
            log_sum = top - p.amax(-1, keepdim=True).log()  # max p = exp(max z) / sum exp(z)
            loss += ((log_sum - z_target) * used).sum()
            if need:  # d loss / d z = softmax(z) - onehot(target)
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0)).mul_(used)
                dz = low.copy_(p)
                torch.mm(dz, w, out=dx)
                dw += dz.T @ x
        if need:
            ctx.save_for_backward(dh, dw, n)
        return loss / n

    @staticmethod
    def backward(ctx, grad: Tensor):
        dh, dw, n = ctx.saved_tensors
        scale = grad / n
        return dh * scale, dw * scale, None


def head_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Never holds all the logits; two thirds of the time of the formula."""
    if not torch.is_grad_enabled():
        weight = weight.detach()  # evaluation forms no gradient
    return _HeadLoss.apply(h.to(compute_dtype(h)), weight, targets)
