"""Answers to the exercises as different people would write them: right ones, and wrong ones that
look right. test_exercises.py tries them all.

RIGHT and WRONG hold, by exercise, dictionaries of functions; a wrong one has the words that the
checker must say.
"""

import math

import torch
import torch.nn.functional as F

from model import head_logits, head_loss
from sample import draw
from support.ops import upcast

RIGHT, WRONG = {}, {}


def right(exercise: str, **functions):
    RIGHT.setdefault(exercise, []).append(functions)


def wrong(exercise: str, says: str, **functions):
    WRONG.setdefault(exercise, []).append((says, functions))


def answer(exercise: str, says: str = "", name: str = ""):
    """Marks a function as an answer, a wrong one if the checker has to say something."""

    def mark(function):
        named = {name or NAMES[exercise]: function}
        wrong(exercise, says, **named) if says else right(exercise, **named)
        return function

    return mark


NAMES = {
    "yarn": "rope_table", "mla": "attend_expanded", "absorbed": "attend_absorbed",
    "gate": "forward", "bias": "update_bias", "balance": "balance_loss", "experts": "routed_ffn",
    "mtp": "mtp_loss", "accept": "accept", "tiles": "quantize",
}  # fmt: skip


# ---- rope ----------------------------------------------------------------------------------------


def weighted(norm):
    def rms_norm(x, weight, eps):
        y = norm(x, eps)
        return weight * y if isinstance(y, torch.Tensor) else y

    return rms_norm


def norm_by_rsqrt(x, eps):
    h = upcast(x)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_of_torch(x, eps):
    h = upcast(x)
    return F.rms_norm(h, (h.shape[-1],), eps=eps).to(x.dtype)


def norm_by_vector_norm(x, eps):
    h = upcast(x)
    size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return (h / torch.sqrt(size**2 / h.shape[-1] + eps)).type_as(x)


def norm_by_einsum(x, eps):
    h = upcast(x)
    mean = torch.einsum("...d,...d->...", h, h) / h.size(-1)
    return (h * (mean + eps).pow(-0.5).unsqueeze(-1)).to(x.dtype)


def norm_by_logs(x, eps):
    h = upcast(x)
    mean = (h * h).sum(-1, keepdim=True) / h.shape[-1]
    return (h * torch.exp(-0.5 * torch.log(mean + eps))).to(x.dtype)


def norm_in_place(x, eps):
    h = upcast(x)
    root = h.square().mean(dim=-1, keepdim=True).add_(eps).sqrt_()
    return h.div(root).to(dtype=x.dtype)


def norm_by_product(x, eps):
    h = upcast(x)
    mean = (h.unsqueeze(-2) @ h.unsqueeze(-1)).squeeze(-1) / h.shape[-1]
    return (h / (mean + eps) ** 0.5).to(x.dtype)


def norm_of_double(x, eps):
    h = x.double()
    return (h / (h.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def rotate_in_a_buffer(x, rope, interleave):
    cos, sin = (table.unsqueeze(1) for table in rope)
    h, half = upcast(x), x.shape[-1] // 2
    out = torch.empty_like(h)
    first, second = (slice(0, None, 2), slice(1, None, 2))
    if not interleave:
        first, second = slice(0, half), slice(half, None)
    out[..., first] = h[..., first] * cos - h[..., second] * sin
    out[..., second] = h[..., first] * sin + h[..., second] * cos
    return out.to(x.dtype)


def rotate_as_complex(x, rope, interleave):
    h = upcast(x)
    pairs = h.unflatten(-1, (-1, 2)) if interleave else h.unflatten(-1, (2, -1)).mT
    turn = torch.complex(*(upcast(table).to(h.dtype) for table in rope))[:, None]
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (y if interleave else y.mT).flatten(-2).to(x.dtype)


def rotate_half(x, rope, interleave):
    cos, sin = rope
    if interleave:
        cos, sin = (t.repeat_interleave(2, -1)[:, None] for t in (cos, sin))
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
        a, b = x.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    return (upcast(x) * cos + upcast(other) * sin).to(x.dtype)


def rotate_by_matrices(x, rope, interleave):
    cos, sin = rope
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    h = upcast(x)
    pairs = h.unflatten(-1, (-1, 2)) if interleave else h.unflatten(-1, (2, -1)).mT
    y = torch.einsum("trij,bthrj->bthri", turn.to(h.dtype), pairs)
    return (y if interleave else y.mT).flatten(-2).to(x.dtype)


def rotate_by_views(x, rope, interleave):
    B, T, H, R = x.shape
    cos, sin = rope[0].view(1, T, 1, R // 2), rope[1].view(1, T, 1, R // 2)
    h = upcast(x)
    if interleave:
        h = h.view(B, T, H, R // 2, 2).transpose(-1, -2).reshape(B, T, H, R)
    a, b = h[..., : R // 2], h[..., R // 2 :]
    y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    if interleave:
        y = y.view(B, T, H, 2, R // 2).transpose(-1, -2).reshape(B, T, H, R)
    return y.to(x.dtype)


def rotate_by_angles(x, rope, interleave):
    """As numbers of a size and an angle."""
    h, angle = upcast(x), torch.atan2(rope[1], rope[0])[:, None]
    a, b = (h[..., ::2], h[..., 1::2]) if interleave else h.chunk(2, -1)
    y = torch.polar(torch.ones_like(a), angle.expand_as(a).to(a.dtype)) * torch.complex(a, b)
    parts = (y.real, y.imag)
    return (torch.stack(parts, -1).flatten(-2) if interleave else torch.cat(parts, -1)).to(x.dtype)


def rotate_in_loops(x, rope, interleave):
    h, y = upcast(x), torch.zeros_like(upcast(x))
    for i in range(x.shape[-1] // 2):
        j, k = (2 * i, 2 * i + 1) if interleave else (i, i + x.shape[-1] // 2)
        for t in range(x.shape[1]):
            c, s = rope[0][t, i], rope[1][t, i]
            y[:, t, :, j] = h[:, t, :, j] * c - h[:, t, :, k] * s
            y[:, t, :, k] = h[:, t, :, j] * s + h[:, t, :, k] * c
    return y.to(x.dtype)


def rotate_by_index(x, rope, interleave):
    R, h = x.shape[-1], upcast(x)
    i = torch.arange(R // 2)
    first, second = (2 * i, 2 * i + 1) if interleave else (i, i + R // 2)
    a, b, (cos, sin) = h[..., first], h[..., second], (t[:, None] for t in rope)
    y = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return y[..., torch.cat((first, second)).argsort()].to(x.dtype)


for norm, rotation in (
    (norm_by_rsqrt, rotate_in_a_buffer),
    (norm_of_torch, rotate_as_complex),
    (norm_by_vector_norm, rotate_half),
    (norm_by_einsum, rotate_by_matrices),
    (norm_by_logs, rotate_by_views),
    (norm_in_place, rotate_by_angles),
    (norm_by_product, rotate_in_loops),
    (norm_of_double, rotate_by_index),
):
    right("rope", rms_norm=weighted(norm), rotate=rotation)


def norm_in_float32(x, eps):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_without_cast(x, eps):
    h = upcast(x)
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def layer_norm(x, eps):
    return F.layer_norm(upcast(x), x.shape[-1:], eps=eps).to(x.dtype)


def norm_that_writes(x, eps):
    h = upcast(x)
    return h.mul_(torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_of_two_dimensions(x, eps):
    return torch.stack([row / (row.square().mean() + eps).sqrt() for row in x])


def rotate_in_float32(x, rope, interleave):
    return rotate_in_a_buffer(x.float(), [t.float() for t in rope], interleave).to(x.dtype)


def rotate_keeping_float32(x, rope, interleave):
    return upcast(rotate_in_a_buffer(upcast(x), rope, interleave))


def rotate_heads(x, rope, interleave):
    return rotate_in_a_buffer(x.transpose(1, 2), [t[: x.shape[2]] for t in rope], interleave)


def rotate_detached(x, rope, interleave):
    return rotate_in_a_buffer(torch.tensor(x.tolist(), dtype=x.dtype), rope, interleave)


good_norm, good_rotation = norm_by_rsqrt, rotate_half
for says, norm, rotation in (
    ("comes from float32", norm_in_float32, good_rotation),
    ("is float32, expected bfloat16; the numbers are right", norm_without_cast, good_rotation),
    ("that is LayerNorm", layer_norm, good_rotation),
    ("it changes x", norm_that_writes, good_rotation),
    ("vectors differ", norm_of_two_dimensions, good_rotation),
    ("comes from float32", good_norm, rotate_in_float32),
    ("the numbers are right", good_norm, rotate_keeping_float32),
    ("is (2, 3, 5, 6), expected (2, 5, 3, 6)", good_norm, rotate_heads),
    ("has no gradient", good_norm, rotate_detached),
    ("is there a `return`?", lambda x, eps: None, good_rotation),
    ("is of type ndarray", lambda x, eps: norm_by_rsqrt(x, eps).detach().float().numpy(),
     good_rotation),
    ("is of type tuple", lambda x, eps: (norm_by_rsqrt(x, eps),), good_rotation),
    ("unexpected keyword", lambda x, eps: F.rms_norm(x, x.shape[-1:], epsilon=eps), good_rotation),
):  # fmt: skip
    wrong("rope", says, rms_norm=weighted(norm), rotate=rotation)


# ---- yarn ----------------------------------------------------------------------------------------


def limits(R, theta, length):
    low, high = (
        R * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (32, 1)
    )
    return max(0, math.floor(low)), min(R - 1, math.ceil(high))


def numbers_of(config):
    yarn = config.rope_scaling
    length = yarn and yarn["original_max_position_embeddings"]
    return config.qk_rope_head_dim, config.rope_theta, yarn and yarn["factor"], length


@answer("yarn")
def table_in_loops(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    columns = []
    for i in range(R // 2):
        f = theta ** (-2 * i / R)
        if factor:
            low, high = limits(R, theta, length)
            ramp = min(1, max(0, (i - low) / max(0.001, high - low)))
            f = (1 - ramp) * f + ramp * f / factor
        columns.append(positions.to(dtype) * f)
    angle = torch.stack(columns, 1)
    return torch.cos(angle), torch.sin(angle)


@answer("yarn")
def table_by_outer(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    f = 1 / theta ** (torch.arange(0, R, 2, dtype=dtype) / R)
    if config.rope_scaling is not None:
        low, high = limits(R, theta, length)
        i = torch.arange(R // 2, dtype=dtype)
        keep = 1 - torch.clamp((i - low) / max(high - low, 0.001), 0, 1)
        f = f / factor * (1 - keep) + f * keep
    angle = torch.outer(positions.to(dtype), f)
    return angle.cos(), angle.sin()


@answer("yarn")
def table_by_lerp(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    f = torch.exp(-math.log(theta) * torch.arange(0, R, 2, dtype=dtype) / R)
    if factor:
        low, high = limits(R, theta, length)
        i = torch.arange(R // 2).to(dtype)
        f = torch.lerp(f, f / factor, ((i - low) / max(high - low, 0.001)).clip(0, 1))
    angle = torch.einsum("t,r->tr", positions.to(dtype), f)
    return angle.cos(), angle.sin()


@answer("yarn")
def table_of_complex(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    f = theta ** (-torch.arange(R // 2, dtype=dtype) * 2 / R)
    if factor:
        low, high = limits(R, theta, length)
        ramp = (torch.arange(R // 2, dtype=dtype) - low).div(max(high - low, 0.001)).clamp(0, 1)
        f = f * (1 + ramp * (1 / factor - 1))
    angle = positions[:, None] * f
    turn = torch.polar(torch.ones_like(angle), angle)
    return turn.real, turn.imag


@answer("yarn")
def table_by_where(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    i = torch.arange(R // 2, dtype=dtype)
    f = torch.pow(torch.tensor(theta, dtype=dtype), -2 * i / R)
    if factor:
        low, high = limits(R, theta, length)
        blend = f - (f - f / factor) * (i - low) / max(high - low, 0.001)
        f = torch.where(i <= low, f, torch.where(i >= high, f / factor, blend))
    angle = positions.to(dtype).unsqueeze(-1) * f
    return torch.cos(angle), torch.sin(angle)


@answer("yarn")
def table_by_minimum(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    i = torch.arange(R // 2, dtype=dtype)
    f = theta ** (-2 * i / R)
    if factor:
        low, high = limits(R, theta, length)
        ramp = torch.minimum(torch.ones(()), torch.relu((i - low) / max(high - low, 0.001)))
        f = torch.stack((f * (1 - ramp), f * ramp / factor)).sum(0)
    angle = positions.to(dtype).view(-1, 1) @ f.view(1, -1)
    return angle.cos(), angle.sin()


@answer("yarn")
def table_by_base_two(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    i = torch.arange(R // 2, dtype=dtype)
    f = torch.exp2(-2 * i / R * math.log2(theta))
    if factor:
        span = length / (2 * math.pi)
        low = max(0, math.floor(R / 2 * math.log(span / 32, theta)))
        high = min(R - 1, math.ceil(R / 2 * math.log(span, theta)))
        ramp = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
        f *= 1 - ramp + ramp / factor
    angle = positions.to(dtype)[:, None] * f[None]
    return torch.sin(angle + math.pi / 2), torch.sin(angle)


@answer("yarn")
def table_by_slices(config, positions, dtype):
    R, theta, factor, length = numbers_of(config)
    f = torch.logspace(0, -(R - 2) / R, R // 2, base=theta, dtype=torch.float64)
    if factor:
        low, high = limits(R, theta, length)
        for i in range(R // 2):
            if i >= high:
                f[i] /= factor
            elif i > low:
                f[i] *= 1 + (i - low) / (high - low) * (1 / factor - 1)
    angle = positions.to(dtype)[:, None] * f.to(dtype)
    return angle.cos(), angle.sin()


@answer("yarn", "is float32, expected float64")
def table_in_float32(config, positions, dtype):
    return table_by_outer(config, positions, torch.float32)


@answer("yarn", "comes from float32")
def table_through_float32(config, positions, dtype):
    return tuple(x.to(dtype) for x in table_by_outer(config, positions, torch.float32))


@answer("yarn", "is (9, 16), expected (9, 8)")
def table_of_twice_the_width(config, positions, dtype):
    return tuple(torch.cat((x, x), -1) for x in table_by_outer(config, positions, dtype))


@answer("yarn", "it returns Tensor, expected cos (T, R/2) and sin (T, R/2)")
def table_of_angles(config, positions, dtype):
    return torch.stack(table_by_outer(config, positions, dtype))


@answer("yarn", "counted from the first")
def table_of_a_length(config, positions, dtype):
    return table_by_outer(config, torch.arange(len(positions)), dtype)


@answer("yarn", "positions differ")
def table_with_natural_ramp(config, positions, dtype):
    """The ramp over the number of turns, as the paper's text reads, not over the pairs."""
    R, theta, factor, length = numbers_of(config)
    f = theta ** (-torch.arange(0, R, 2, dtype=dtype) / R)
    if factor:
        gamma = ((length * f / (2 * math.pi) - 1) / 31).clamp(0, 1)
        f = (1 - gamma) * f / factor + gamma * f
    angle = positions.to(dtype)[:, None] * f
    return angle.cos(), angle.sin()


# ---- mla -----------------------------------------------------------------------------------------


def keys_and_values(self, q_nope, latent):
    B, T, H, N = q_nope.shape
    return self.kv_b_proj(latent).view(B, T, H, -1).split([N, self.config.v_head_dim], -1)


@answer("mla")
def by_fused_kernel(self, q_nope, q_pe, latent, k_pe):
    k, v = keys_and_values(self, q_nope, latent)
    q = torch.cat((q_nope, q_pe), -1).transpose(1, 2)
    k = torch.cat((k, k_pe.expand(-1, -1, k.shape[2], -1)), -1).transpose(1, 2)
    v = v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale).transpose(1, 2)


@answer("mla")
def by_fused_kernel_and_mask(self, q_nope, q_pe, latent, k_pe):
    T = q_nope.shape[1]
    k, v = keys_and_values(self, q_nope, latent)
    q = torch.cat((q_nope, q_pe), -1).permute(0, 2, 1, 3)
    k = torch.cat((k, k_pe.expand_as(q_pe)), -1).permute(0, 2, 1, 3)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    o = F.scaled_dot_product_attention(
        q, k, v.permute(0, 2, 1, 3), attn_mask=seen, scale=self.scale
    )
    return o.permute(0, 2, 1, 3)


@answer("mla")
def by_two_einsums(self, q_nope, q_pe, latent, k_pe):
    T = q_nope.shape[1]
    k, v = keys_and_values(self, q_nope, latent)
    score = torch.einsum("bihn,bjhn->bhij", q_nope, k)
    score = score + torch.einsum("bihr,bjr->bhij", q_pe, k_pe.squeeze(2))
    score = (score * self.scale).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return torch.einsum("bhij,bjhv->bihv", F.softmax(score, dim=-1), v)


@answer("mla")
def with_scaled_queries(self, q_nope, q_pe, latent, k_pe):
    """The scale is on q, the mask is added, its value is finite."""
    T = q_nope.shape[1]
    k, v = keys_and_values(self, q_nope, latent)
    q = torch.cat((q_nope, q_pe), -1).transpose(1, 2) * self.scale
    k = torch.cat((k, k_pe.repeat(1, 1, k.shape[2], 1)), -1).transpose(1, 2)
    mask = torch.full((T, T), -1e9).triu(1)
    p = (q @ k.transpose(-2, -1) + mask).softmax(-1)
    return (p @ v.transpose(1, 2)).transpose(1, 2).contiguous()


@answer("mla")
def by_hand(self, q_nope, q_pe, latent, k_pe):
    """Softmax from exponentials, and a mask that multiplies them."""
    T = q_nope.shape[1]
    k, v = keys_and_values(self, q_nope, latent)
    score = torch.einsum("bihn,bjhn->bijh", q_nope, k) + torch.einsum("bihr,bjkr->bijh", q_pe, k_pe)
    e = torch.exp(score * self.scale) * torch.tril(torch.ones(T, T))[None, :, :, None]
    return torch.einsum("bijh,bjhv->bihv", e / e.sum(2, keepdim=True), v)


@answer("mla")
def query_after_query(self, q_nope, q_pe, latent, k_pe):
    k, v = keys_and_values(self, q_nope, latent)
    out = []
    for t in range(q_nope.shape[1]):
        score = (q_nope[:, t, None] * k[:, : t + 1]).sum(-1)
        score = score + (q_pe[:, t, None] * k_pe[:, : t + 1]).sum(-1)  # (B, t+1, H)
        p = torch.softmax(self.scale * score, 1)
        out.append((p[..., None] * v[:, : t + 1]).sum(1))
    return torch.stack(out, 1)


@answer("mla")
def head_by_head(self, q_nope, q_pe, latent, k_pe):
    (B, T, H, N), V = q_nope.shape, self.config.v_head_dim
    out = []
    for h in range(H):
        W = self.kv_b_proj.weight[h * (N + V) : (h + 1) * (N + V)]
        k, v = latent @ W[:N].T, latent @ W[N:].T
        score = q_nope[:, :, h] @ k.mT + q_pe[:, :, h] @ k_pe[:, :, 0].mT
        score = score * self.scale
        later = torch.arange(T)[None, :] > torch.arange(T)[:, None]
        score = torch.where(later, torch.finfo(score.dtype).min, score)
        out.append(score.softmax(-1) @ v)
    return torch.stack(out, 2)


@answer("mla")
def in_place(self, q_nope, q_pe, latent, k_pe):
    B, T, H, N = q_nope.shape
    k, v = keys_and_values(self, q_nope, latent)
    q = torch.cat((q_pe, q_nope), -1).permute(0, 2, 1, 3).flatten(0, 1)
    k = torch.cat((k_pe.expand(B, T, H, -1), k), -1).permute(0, 2, 3, 1).flatten(0, 1)
    score = torch.bmm(q, k).mul_(self.scale)
    score += torch.full((T, T), -torch.inf, dtype=score.dtype).triu_(1)
    o = torch.bmm(score.softmax(-1), v.transpose(1, 2).flatten(0, 1))
    return o.unflatten(0, (B, H)).transpose(1, 2)


@answer("mla")
def absorbed_all_the_same(self, q_nope, q_pe, latent, k_pe):
    """The way of exercise 4."""
    (_, T, H, N), C = q_nope.shape, latent.shape[-1]
    W = self.kv_b_proj.weight.view(H, -1, C)
    score = torch.einsum("bihn,hnc,bjc->bhij", q_nope, W[:, :N], latent)
    score = score + torch.einsum("bihr,bjkr->bhij", q_pe, k_pe)
    keep = torch.arange(T)[:, None] >= torch.arange(T)
    p = torch.where(keep, score * self.scale, -math.inf).log_softmax(-1).exp()
    return torch.einsum("bhij,bjc,hvc->bihv", p, latent, W[:, N:])


@answer("mla", "is (2, 3, 5, 5), expected (2, 5, 3, 5)")
def heads_first(self, *x):
    return by_fused_kernel(self, *x).transpose(1, 2)


@answer("mla", "is (2, 5, 15), expected (2, 5, 3, 5)")
def flat(self, *x):
    return by_fused_kernel(self, *x).flatten(2)


@answer("mla", "the right numbers, in another order")
def viewed_where_transposed(self, *x):
    o = by_fused_kernel(self, *x)
    return o.transpose(1, 2).reshape(o.shape)


@answer("mla", "comes from float32")
def by_float32(self, *x):
    o = by_fused_kernel(self, *x)
    return o.float().to(o.dtype)


@answer("mla", "is float64, expected float32")
def by_float64(self, *x):
    return by_fused_kernel(self, *x).double()


@answer("mla", "tokens differ")
def softly_masked(self, q_nope, q_pe, latent, k_pe):
    T = q_nope.shape[1]
    k, v = keys_and_values(self, q_nope, latent)
    score = torch.einsum("bihn,bjhn->bhij", q_nope, k)
    score = score + torch.einsum("bihr,bjr->bhij", q_pe, k_pe.squeeze(2))
    p = (score * self.scale + torch.ones(T, T).triu(1) * -5).softmax(-1)
    return torch.einsum("bhij,bjhv->bihv", p, v)


@answer("mla", "with NaN")
def diagonal_masked(self, q_nope, q_pe, latent, k_pe):
    T = q_nope.shape[1]
    k, v = keys_and_values(self, q_nope, latent)
    score = torch.einsum("bihn,bjhn->bhij", q_nope, k)
    score = score + torch.einsum("bihr,bjr->bhij", q_pe, k_pe.squeeze(2))
    score = (score * self.scale).masked_fill(torch.ones(T, T).triu(0).bool(), -math.inf)
    return torch.einsum("bhij,bjhv->bihv", score.softmax(-1), v)


@answer("mla", "the gradient by k_pe is wrong")
def key_without_gradient(self, q_nope, q_pe, latent, k_pe):
    return by_fused_kernel(self, q_nope, q_pe, latent, k_pe.detach())


@answer("mla", "has no gradient")
def without_gradient(self, *x):
    with torch.no_grad():
        return by_fused_kernel(self, *x)


@answer("mla", "tokens differ")
def scale_of_root(self, *x):
    class Other:
        kv_b_proj, config, scale = self.kv_b_proj, self.config, self.scale**0.5

    return by_fused_kernel(Other, *x)


# ---- absorbed ------------------------------------------------------------------------------------


def up_projections(self, H, N):
    W = self.kv_b_proj.weight.view(H, -1, self.config.kv_lora_rank)
    return W[:, :N], W[:, N:]


def seen_by(T, S):
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


@answer("absorbed")
def by_two_products(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    score = torch.einsum("bthn,hnc,bsc->bhts", q_nope, W_UK, kv[..., :C])
    score = (score + torch.einsum("bthr,bsr->bhts", q_pe, kv[..., C:])) * self.scale
    p = score.masked_fill(~seen_by(T, S), -torch.inf).softmax(-1)
    return torch.einsum("bhtc,hvc->bthv", p @ kv[:, None, :, :C], W_UV)


@answer("absorbed")
def by_fused_kernel_on_latents(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    q = torch.cat((torch.einsum("bthn,hnc->bhtc", q_nope, W_UK), q_pe.transpose(1, 2)), -1)
    k = kv[:, None].expand(-1, H, -1, -1)
    mask = seen_by(T, S)
    o = F.scaled_dot_product_attention(q, k, k[..., :C], attn_mask=mask, scale=self.scale)
    return torch.einsum("bhtc,hvc->bthv", o, W_UV)


@answer("absorbed")
def flat_heads(self, q_nope, q_pe, kv, start=None):
    """All heads' queries are rows of one matrix."""
    (B, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    q = torch.matmul(q_nope.unsqueeze(-2), W_UK).squeeze(-2)  # (B, T, H, C)
    q = torch.cat((q, q_pe), -1).reshape(B, T * H, -1) * self.scale
    score = q @ kv.mT + torch.where(seen_by(T, S), 0.0, -1e30).repeat_interleave(H, 0)
    o = (score.softmax(-1) @ kv[..., :C]).view(B, T, H, C)
    return torch.matmul(o.unsqueeze(-2), W_UV.mT).squeeze(-2)


@answer("absorbed")
def latents_of_a_head(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    out, rows = [], self.kv_b_proj.weight.chunk(H)
    for h, W in enumerate(rows):
        q = torch.cat((q_nope[:, :, h] @ W[:N], q_pe[:, :, h]), -1)  # (B, T, C+R)
        score = (q @ kv.transpose(1, 2)).mul(self.scale)
        score = score + torch.full((T, S), -math.inf).triu(S - T + 1)
        out.append(score.softmax(2) @ kv[:, :, :C] @ W[N:].T)
    return torch.stack(out, 2)


@answer("absorbed")
def query_by_query(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    out = []
    for t in range(T):
        past = kv[:, : S - T + t + 1]
        q = torch.cat((torch.einsum("bhn,hnc->bhc", q_nope[:, t], W_UK), q_pe[:, t]), -1)
        p = torch.softmax(self.scale * (q @ past.mT), -1)
        out.append(torch.einsum("bhc,hvc->bhv", p @ past[..., :C], W_UV))
    return torch.stack(out, 1)


@answer("absorbed")
def by_sums(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    q = torch.cat(((q_nope[..., None] * W_UK).sum(-2), q_pe), -1)  # (B, T, H, C+R)
    score = (q[:, :, :, None] * kv[:, None, None]).sum(-1) * self.scale  # (B, T, H, S)
    e = torch.exp(score - score.amax(-1, keepdim=True)) * seen_by(T, S)[:, None]
    p = e / e.sum(-1, keepdim=True)
    latent = (p[..., None] * kv[:, None, None, :, :C]).sum(-2)  # (B, T, H, C)
    return (latent[..., None, :] * W_UV).sum(-1)


@answer("absorbed")
def padded_values(self, q_nope, q_pe, kv, start=None):
    """W^UV with columns of zeros takes the whole entry of the cache."""
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    q = F.pad(torch.einsum("bthn,hnc->bthc", q_nope, W_UK), (0, kv.shape[-1] - C))
    q = q + F.pad(q_pe, (C, 0))
    score = torch.einsum("bthc,bsc->bths", q, kv) * self.scale
    score = score.masked_fill(~seen_by(T, S)[:, None], torch.finfo(score.dtype).min)
    o = torch.einsum("bths,bsc->bthc", score.softmax(-1), kv)
    return torch.einsum("bthc,hvc->bthv", o, F.pad(W_UV, (0, kv.shape[-1] - C)))


@answer("absorbed")
def with_a_given_start(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    start = S - T if start is None else start
    W = self.kv_b_proj.weight.unflatten(0, (H, -1)).transpose(0, 1)  # (N+V, H, C)
    q = torch.einsum("bthn,nhc->bhtc", q_nope, W[:N])
    score = torch.matmul(q, kv[:, None, :, :C].mT)
    score = score + torch.matmul(q_pe.transpose(1, 2), kv[:, None, :, C:].mT)
    keep = torch.ones(T, S, dtype=torch.bool).tril(start)
    p = torch.nn.functional.softmax(score.mul(self.scale).masked_fill(~keep, -math.inf), dim=3)
    return torch.einsum("bhtc,vhc->bthv", p @ kv[:, None, :, :C], W[N:])


@answer("absorbed", "keys or values of the old tokens are made anew")
def with_all_keys_and_values(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    both = self.kv_b_proj(kv[..., :C]).unflatten(-1, (H, -1))
    score = torch.einsum("bthn,bshn->bhts", q_nope, both[..., :N])
    score = (score + torch.einsum("bthr,bsr->bhts", q_pe, kv[..., C:])) * self.scale
    p = score.masked_fill(~seen_by(T, S), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", p, both[..., N:])


@answer("absorbed", "keys or values of the old tokens are made anew")
def with_all_values(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = up_projections(self, H, N)
    v = torch.einsum("bsc,hvc->bshv", kv[..., :C], W_UV)
    q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, W_UK), q_pe), -1)
    score = torch.einsum("bthc,bsc->bhts", q, kv) * self.scale
    p = score.masked_fill(~seen_by(T, S), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", p, v)


@answer("absorbed", "is (2, 1, 3, 7), expected (2, 1, 3, 5)")
def without_values(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, _ = up_projections(self, H, N)
    q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, W_UK), q_pe), -1)
    score = torch.einsum("bthc,bsc->bhts", q, kv) * self.scale
    p = score.masked_fill(~seen_by(T, S), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bsc->bthc", p, kv[..., :C])


@answer("absorbed", "comes from float32")
def in_float32(self, q_nope, q_pe, kv, start=None):
    o = by_two_products(self, q_nope, q_pe, kv)
    return o.float().to(o.dtype)


@answer("absorbed", "1/sqrt(C+R)")
def scale_of_the_cache(self, q_nope, q_pe, kv, start=None):
    class Other:
        kv_b_proj, config, scale = self.kv_b_proj, self.config, kv.shape[-1] ** -0.5

    return flat_heads(Other, q_nope, q_pe, kv)


@answer("absorbed", "TypeError")
def of_three_arguments(self, q_nope, kv):
    return q_nope


@answer("absorbed", "tokens differ")
def one_query_sees_all(self, q_nope, q_pe, kv, start=None):
    """Right for one new token, wrong for several."""
    return torch.cat([
        query_by_query(self, q_nope[:, t : t + 1], q_pe[:, t : t + 1], kv)
        for t in range(q_nope.shape[1])
    ], 1)  # fmt: skip


# ---- gate ----------------------------------------------------------------------------------------


def scores(self, x):
    return torch.sigmoid(F.linear(upcast(x), upcast(self.weight)))


def finish(self, s, chosen):
    gain = s.gather(-1, chosen)
    if self.config.norm_topk_prob:
        gain = gain / gain.sum(-1, keepdim=True)
    return s, chosen, gain * self.config.routed_scaling_factor


def allowed(self, choice, worth=lambda groups: groups.topk(2, -1).values.sum(-1)):
    """(B, T, E): whether an expert's group stays."""
    G = self.config.n_group
    groups = choice.unflatten(-1, (G, -1))
    best = worth(groups).topk(self.config.topk_group, -1).indices
    stays = F.one_hot(best, G).sum(-2).bool()
    return stays[..., None].expand_as(groups).flatten(-2)


@answer("gate")
def gate_by_where(self, x):
    s = scores(self, x)
    choice = s + self.e_score_correction_bias
    choice = torch.where(allowed(self, choice), choice, float("-inf"))
    return finish(self, s, choice.topk(self.config.num_experts_per_tok, dim=-1)[1])


@answer("gate")
def gate_by_sort(self, x):
    c, s = self.config, scores(self, x)
    choice = (s + self.e_score_correction_bias).detach()
    choice = choice.masked_fill(~allowed(self, choice), -1e9)
    chosen = choice.sort(-1, descending=True).indices[..., : c.num_experts_per_tok]
    return finish(self, s, chosen)


@answer("gate")
def gate_by_argsort_from_below(self, x):
    c, s = self.config, 1 / (1 + torch.exp(-(upcast(x) @ upcast(self.weight).t())))
    choice = s.data + self.e_score_correction_bias
    choice = torch.where(allowed(self, choice), choice, -torch.inf)
    return finish(self, s, choice.argsort(-1)[..., -c.num_experts_per_tok :])


@answer("gate")
def gate_with_loops(self, x):
    c, s = self.config, scores(self, x)
    choice, rows = (s + self.e_score_correction_bias).flatten(0, 1).tolist(), []
    for row in choice:
        size = len(row) // c.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]

        def worth(group, row=row):
            return sum(sorted(row[i] for i in group)[-2:])

        groups.sort(key=worth, reverse=True)
        members = [i for group in groups[: c.topk_group] for i in group]
        members.sort(key=row.__getitem__, reverse=True)
        rows.append(members[: c.num_experts_per_tok])
    return finish(self, s, torch.tensor(rows).view(*x.shape[:-1], -1))


@answer("gate")
def gate_on_groups_that_stay(self, x):
    """Gathers the groups that stay, and takes indices back."""
    c, s = self.config, scores(self, x)
    choice, size = s.detach() + self.e_score_correction_bias, c.n_routed_experts // c.n_group
    groups = choice.view(*choice.shape[:-1], c.n_group, size)
    best = groups.topk(2)[0].sum(-1).topk(c.topk_group)[1]  # (B, T, topk_group)
    members = groups.gather(-2, best[..., None].expand(*best.shape, size)).flatten(-2)
    at = members.topk(c.num_experts_per_tok)[1]
    chosen = best.gather(-1, at // size) * size + at % size
    return finish(self, s, chosen)


@answer("gate")
def gate_with_a_mask(self, x):
    """Gate values by a mask over all experts."""
    c, s = self.config, scores(self, x)
    choice = s + self.e_score_correction_bias
    chosen = choice.masked_fill(~allowed(self, choice), -math.inf).topk(c.num_experts_per_tok)[1]
    mask = torch.zeros_like(s).scatter_(-1, chosen, 1)
    gain = s * mask
    if c.norm_topk_prob:
        gain = F.normalize(gain, p=1, dim=-1, eps=0)
    return s, chosen, gain.gather(-1, chosen).mul(c.routed_scaling_factor)


@answer("gate")
def gate_one_by_one(self, x):
    """The best expert, then the best of the others, and so on."""
    c, s = self.config, scores(self, x)
    choice = s.detach() + self.e_score_correction_bias
    choice = torch.where(allowed(self, choice), choice, -math.inf)
    chosen = []
    for _ in range(c.num_experts_per_tok):
        best = choice.argmax(-1, keepdim=True)
        chosen.append(best)
        choice = choice.scatter(-1, best, -math.inf)
    return finish(self, s, torch.cat(chosen, -1))


@answer("gate")
def gate_with_threshold(self, x):
    """A group's score from its sorted experts; the worst of the groups that stay is the limit."""
    c, s = self.config, scores(self, x)
    choice = s.detach() + self.e_score_correction_bias
    groups = choice.unflatten(-1, (c.n_group, -1))
    worth = groups.sort(-1).values[..., -2:].sum(-1)
    least = worth.sort(-1).values[..., -c.topk_group, None]
    choice = (groups + torch.where(worth >= least, 0, -math.inf)[..., None]).flatten(-2)
    gain, chosen = s, choice.topk(c.num_experts_per_tok, sorted=True).indices
    gain = gain[torch.arange(len(x))[:, None, None], torch.arange(x.shape[1])[:, None], chosen]
    if c.norm_topk_prob:
        gain = gain / (gain.sum(-1, True) + 1e-20)
    return s, chosen, c.routed_scaling_factor * gain


@answer("gate", "it returns Tensor and Tensor, expected")
def gate_without_scores(self, x):
    return gate_by_where(self, x)[1:]


@answer("gate", "chosen experts (B, T, K) is int32, expected int64; the numbers are right")
def gate_of_int32(self, x):
    s, chosen, gain = gate_by_where(self, x)
    return s, chosen.int(), gain


@answer("gate", "chosen experts (B, T, K) is float64, expected int64")
def gate_of_floats(self, x):
    s, chosen, gain = gate_by_where(self, x)
    return s, chosen.double(), gain


@answer("gate", "of 40 tokens differ")
def gate_from_one(self, x):
    s, chosen, gain = gate_by_where(self, x)
    return s, chosen + 1, gain


@answer("gate", "gate values (B, T, K): 40 of 40 tokens differ")
def gate_with_sorted_values(self, x):
    s, chosen, gain = gate_by_where(self, x)
    return s, chosen, gain.flip(-1)


@answer("gate", "gate values (B, T, K)")
def gate_with_an_epsilon(self, x):
    s, chosen, gain = gate_by_where(self, x)
    return s, chosen, gain / (1 + 1e-3)


@answer("gate", "comes from float32")
def gate_in_float32(self, x):
    s = torch.sigmoid(F.linear(x.float(), self.weight.float())).to(x.dtype)
    choice = s.detach() + self.e_score_correction_bias
    choice = choice.masked_fill(~allowed(self, choice), -math.inf)
    return finish(self, s, choice.topk(self.config.num_experts_per_tok).indices)


@answer("gate", "it changes self.e_score_correction_bias")
def gate_that_moves_the_bias(self, x):
    s = scores(self, x)
    choice = self.e_score_correction_bias.add_(s.detach().mean((0, 1)) * 0)
    self.e_score_correction_bias += 1e-9
    choice = s.detach() + choice
    choice = choice.masked_fill(~allowed(self, choice), -math.inf)
    return finish(self, s, choice.topk(self.config.num_experts_per_tok).indices)


@answer("gate", "the sum, or mean, of all its experts")
def gate_by_means(self, x):
    s = scores(self, x)
    choice = s.detach() + self.e_score_correction_bias
    choice = choice.masked_fill(~allowed(self, choice, lambda g: g.mean(-1)), -math.inf)
    return finish(self, s, choice.topk(self.config.num_experts_per_tok).indices)


@answer("gate", "chosen experts (B, T, K)")
def gate_of_random_groups(self, x):
    s = scores(self, x)
    choice = s.detach() + self.e_score_correction_bias
    choice = choice.masked_fill(~allowed(self, choice, lambda g: g.amin(-1)), -math.inf)
    return finish(self, s, choice.topk(self.config.num_experts_per_tok).indices)


# ---- bias ----------------------------------------------------------------------------------------


def numbered(self):
    return enumerate(self.gates())


@answer("bias")
@torch.no_grad()
def bias_at_once(self, gamma):
    load = self.expert_counts.double()
    step = gamma * torch.sign(load.mean(1, keepdim=True) - load)
    for i, gate in numbered(self):
        gate.e_score_correction_bias.add_(step[i])
    self.expert_counts.zero_()


@answer("bias")
@torch.no_grad()
def bias_of_whole_numbers(self, gamma):
    for i, gate in numbered(self):
        counts = self.expert_counts[i]
        gate.e_score_correction_bias += gamma * (counts.sum() - len(counts) * counts).sign()
    self.expert_counts.fill_(0)


@answer("bias")
@torch.no_grad()
def bias_by_where(self, gamma):
    for gate, load in zip(self.gates(), self.expert_counts.float()):
        up, down = load < load.mean(), load > load.mean()
        gate.e_score_correction_bias += torch.where(up, gamma, torch.where(down, -gamma, 0.0))
    self.expert_counts *= 0


@answer("bias")
@torch.no_grad()
def bias_in_loops(self, gamma):
    for i, gate in numbered(self):
        counts = self.expert_counts[i].tolist()
        mean = sum(counts) / len(counts)
        for e, count in enumerate(counts):
            if count != mean:
                gate.e_score_correction_bias[e] += gamma if count < mean else -gamma
        self.expert_counts[i] = 0


@answer("bias")
@torch.no_grad()
def bias_by_masks(self, gamma):
    load = self.expert_counts.to(torch.float64)
    mean = load.sum(-1, keepdim=True) / load.shape[-1]
    for gate, idle, busy in zip(self.gates(), load < mean, load > mean, strict=True):
        gate.e_score_correction_bias[idle] += gamma
        gate.e_score_correction_bias[busy] -= gamma
    self.expert_counts[:] = 0


@answer("bias")
def bias_by_copy(self, gamma):
    for i, gate in numbered(self):
        load = self.expert_counts[i].float()
        new = gate.e_score_correction_bias + gamma * (load.mean() - load).sign()
        gate.e_score_correction_bias.copy_(new)
    self.expert_counts = torch.zeros_like(self.expert_counts)


@answer("bias")
@torch.no_grad()
def bias_by_shares(self, gamma):
    """Of an expert that is busier than the mean, the share is more than 1/E."""
    for i, gate in numbered(self):
        counts = self.expert_counts[i]
        over = (counts * counts.numel() > counts.sum()).int()
        under = (counts * counts.numel() < counts.sum()).int()
        gate.e_score_correction_bias.sub_(gamma * (over - under))
    self.expert_counts.sub_(self.expert_counts.clone())


@answer("bias")
@torch.no_grad()
def bias_by_foreach(self, gamma):
    load = self.expert_counts.float()
    steps = ((load.mean(1, True) - load).sign() * gamma).unbind()
    torch._foreach_add_([gate.e_score_correction_bias for gate in self.gates()], list(steps))
    torch.Tensor.zero_(self.expert_counts)


@answer("bias", "differ")
@torch.no_grad()
def bias_with_a_wide_dead_zone(self, gamma):
    for i, gate in numbered(self):
        load = self.expert_counts[i].float()
        off = load / load.mean() - 1
        step = torch.where(off.abs() < 0.01, 0.0, -off.sign())
        gate.e_score_correction_bias += gamma * step
    self.expert_counts.zero_()


@answer("bias", "differ")
@torch.no_grad()
def bias_of_one_layer(self, gamma):
    load = self.expert_counts[0].float()
    self.gates()[0].e_score_correction_bias += gamma * (load.mean() - load).sign()
    self.expert_counts.zero_()


@answer("bias", "differ")
@torch.no_grad()
def bias_of_integer_means(self, gamma):
    for i, gate in numbered(self):
        counts = self.expert_counts[i]
        mean = counts.sum() // len(counts)
        gate.e_score_correction_bias += gamma * (mean - counts).sign()
    self.expert_counts.zero_()


@answer("bias", "differ")
@torch.no_grad()
def bias_by_tanh(self, gamma):
    for i, gate in numbered(self):
        load = self.expert_counts[i].float()
        gate.e_score_correction_bias += gamma * torch.tanh(load.mean() - load)
    self.expert_counts.zero_()


@answer("bias", "another tensor")
@torch.no_grad()
def bias_replaced(self, gamma):
    for i, gate in numbered(self):
        load = self.expert_counts[i].float()
        step = gamma * (load.mean() - load).sign()
        gate.e_score_correction_bias = gate.e_score_correction_bias + step
    self.expert_counts.zero_()


@answer("bias", "RuntimeError")
@torch.no_grad()
def bias_of_integers(self, gamma):
    for i, gate in numbered(self):
        gate.e_score_correction_bias += (self.expert_counts[i].mean() - 1).sign()


@answer("bias", "expert_counts (layers, E) is float32, expected int64")
@torch.no_grad()
def bias_with_counts_of_floats(self, gamma):
    bias_at_once(self, gamma)
    self.expert_counts = torch.zeros(self.expert_counts.shape)


# ---- balance -------------------------------------------------------------------------------------


@answer("balance")
def balance_by_sequence(s, K):
    losses = []
    for x in s:
        T, E = x.shape
        f = F.one_hot(x.topk(K).indices, E).sum((0, 1)) * E / (K * T)
        losses.append((f * (x / x.sum(-1, keepdim=True)).mean(0)).sum())
    return sum(losses) / len(losses)


@answer("balance")
def balance_by_scatter(s, K):
    B, T, E = s.shape
    P = (s / s.sum(2, keepdim=True)).mean(1)
    f = torch.zeros_like(P).scatter_add_(
        1, s.topk(K)[1].reshape(B, -1), torch.ones(B, T * K, dtype=s.dtype)
    )
    return (f * P).sum() * E / (K * T) / B


@answer("balance")
def balance_by_mask(s, K):
    B, T, E = s.shape
    chosen = torch.zeros_like(s).scatter(-1, s.topk(K).indices, 1.0)
    return torch.einsum("be,be->", chosen.mean(1) * E / K, F.normalize(s, p=1, dim=-1).mean(1)) / B


@answer("balance")
def balance_by_rank(s, K):
    E = s.shape[-1]
    rank = s.argsort(-1, descending=True).argsort(-1)
    f = (rank < K).to(s).mean(-2) * (E / K)
    P = torch.mean(s / torch.sum(s, -1, True), -2)
    return torch.sum(f * P, -1).mean()


@answer("balance")
def balance_by_logs(s, K):
    B, T, E = s.shape
    share = (s.log() - s.sum(-1, keepdim=True).log()).exp()
    f = F.one_hot(s.topk(K).indices, E).to(s.dtype).sum((1, 2)) / T / K * E
    return torch.tensordot(f, share.mean(1)) / B


@answer("balance")
def balance_by_softmax(s, K):
    """s / sum(s) is a softmax of log s."""
    E, share = s.shape[-1], torch.log(s).softmax(-1)
    f = F.one_hot(s.detach().topk(K, sorted=False).indices, E).double().mean(1).sum(1) * E / K
    return (f.to(s.dtype) * share.mean(1)).sum(-1).mean(0)


@answer("balance")
def balance_by_bincount(s, K):
    B, T, E = s.shape
    ids = s.topk(K).indices + E * torch.arange(B)[:, None, None]
    f = torch.bincount(ids.flatten(), minlength=B * E).view(B, E).to(s.dtype)
    P = s.div(s.sum(-1, keepdim=True)).sum(1) / T
    return (E / (K * T) * f * P).sum(1).mean()


@answer("balance")
def balance_in_loops(s, K):
    B, T, E = s.shape
    total = 0
    for b in range(B):
        for e in range(E):
            f = sum(int(e in s[b, t].topk(K).indices) for t in range(T)) * E / (K * T)
            total = total + f * sum(s[b, t, e] / s[b, t].sum() for t in range(T)) / T
    return total / B


@answer("balance")
def balance_by_threshold(s, K):
    B, T, E = s.shape
    least = s.topk(K).values[..., -1:]
    chosen = (s >= least).to(s.dtype)
    return (chosen.sum(1) * (s / s.sum(-1, keepdim=True)).sum(1)).sum() * E / (K * T * T * B)


@answer("balance", "is (3,), expected ()")
def balance_of_each(s, K):
    return torch.stack([balance_by_sequence(x[None], K) for x in s])


@answer("balance", "loss is of type float, expected a tensor")
def balance_as_a_number(s, K):
    return balance_by_sequence(s, K).item()


@answer("balance", "loss has no gradient")
def balance_detached(s, K):
    return balance_by_sequence(s.detach(), K)


@answer("balance", "loss is float32, expected float64; the numbers are right")
def balance_of_float32(s, K):
    return balance_by_sequence(s.float(), K)


@answer("balance", "the batch were one sequence")
def balance_of_the_batch(s, K):
    return balance_by_scatter(s.reshape(1, -1, s.shape[-1]), K)


@answer("balance", "the gradient by s is wrong")
def balance_with_half_a_gradient(s, K):
    B, T, E = s.shape
    P = (s / s.sum(-1, keepdim=True).detach()).mean(1)
    f = F.one_hot(s.topk(K).indices, E).to(s.dtype).sum((1, 2)) * E / (K * T)
    return (f * P).sum(-1).mean()


# ---- experts -------------------------------------------------------------------------------------


def one_expert(x, W, V, g):
    a, b = F.linear(x, W).chunk(2, -1)
    return F.linear(F.silu(a) * b, V) * g[:, None]


@answer("experts")
def token_by_token(x, chosen, gain, gate_up, down, swiglu):
    rows = []
    for x_t, experts, g in zip(x, chosen, gain, strict=True):
        y = 0
        for i, weight in zip(experts, g, strict=True):
            a, b = (gate_up[i] @ x_t).chunk(2)
            y = y + weight * (down[i] @ (F.silu(a) * b))
        rows.append(y)
    return torch.stack(rows)


@answer("experts")
def sorted_rows(x, chosen, gain, gate_up, down, swiglu):
    K, E = chosen.shape[1], len(down)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=E).tolist()
    rows, g = x[order // K].split(counts), gain.flatten()[order].split(counts)
    y = torch.cat([one_expert(*z) for z in zip(rows, gate_up, down, g, strict=True)])
    return torch.zeros_like(x).index_add(0, order // K, y)


@answer("experts")
def unsorted_back(x, chosen, gain, gate_up, down, swiglu):
    """Results go back to (tokens, K, D) and are added up there."""
    (n, K), D = chosen.shape, x.shape[1]
    order = chosen.reshape(-1).argsort()
    ids = chosen.reshape(-1)[order]
    y = torch.cat([
        one_expert(x[order[ids == i] // K], W, V, gain.reshape(-1)[order[ids == i]])
        for i, (W, V) in enumerate(zip(gate_up, down, strict=True))
    ])  # fmt: skip
    return torch.zeros(n * K, D, dtype=x.dtype).index_put((order,), y).view(n, K, D).sum(1)


@answer("experts")
def gathered_weights(x, chosen, gain, gate_up, down, swiglu):
    """Every token takes its experts' matrices along."""
    if len(x) > 700:  # that would be much memory
        return sorted_rows(x, chosen, gain, gate_up, down, swiglu)
    a, b = torch.einsum("td,tkfd->tkf", x, gate_up[chosen]).chunk(2, -1)
    return torch.einsum("tkf,tkdf,tk->td", F.silu(a) * b, down[chosen], gain)


@answer("experts")
def masked_rows(x, chosen, gain, gate_up, down, swiglu):
    y = torch.zeros_like(x)
    for i in range(len(down)):
        mine = (chosen == i).any(1)
        if not mine.any():
            continue
        g = (gain * (chosen == i)).sum(1)[mine]
        a, b = (x[mine] @ gate_up[i].mT).tensor_split(2, -1)
        y[mine] = y[mine] + swiglu(a, b, g) @ down[i].mT
    return y


@answer("experts")
def choice_by_choice(x, chosen, gain, gate_up, down, swiglu):
    y = torch.zeros_like(x)
    for k in range(chosen.shape[1]):
        for i in chosen[:, k].unique():
            token = torch.where(chosen[:, k] == i)[0]
            y = y.index_add(0, token, one_expert(x[token], gate_up[i], down[i], gain[token, k]))
    return y


@answer("experts")
def padded_batch(x, chosen, gain, gate_up, down, swiglu):
    """As many rows for every expert as the busiest has."""
    (n, K), (E, D, _) = chosen.shape, down.shape
    ids = chosen.flatten()
    counts = torch.bincount(ids, minlength=E)
    most = int(counts.max())
    if most > 700:
        return sorted_rows(x, chosen, gain, gate_up, down, swiglu)
    order = ids.argsort(stable=True)
    place = torch.arange(n * K) - (counts.cumsum(0) - counts)[ids[order]]
    slot = ids[order] * most + place
    batch = torch.zeros(E * most, D, dtype=x.dtype).index_copy(0, slot, x[order // K])
    a, b = torch.bmm(batch.view(E, most, D), gate_up.mT).chunk(2, -1)
    out = torch.bmm(F.silu(a) * b, down.mT).flatten(0, 1)[slot]
    return torch.zeros_like(x).index_add(0, order // K, out * gain.flatten()[order, None])


@answer("experts")
def with_two_halves(x, chosen, gain, gate_up, down, swiglu):
    """W_gate and W_up apart, silu written out, in place."""
    width, y = down.shape[-1], x.new_zeros(x.shape)
    for i in range(gate_up.shape[0]):
        token, k = torch.nonzero(chosen == i, as_tuple=True)
        a, b = x[token] @ gate_up[i, :width].t(), x[token] @ gate_up[i, width:].t()
        out = (a / (1 + torch.exp(-a)) * b) @ down[i].t()
        y.index_add_(0, token, out * gain[token, k].unsqueeze(1))
    return y


def every_expert(x, gate_up, down):
    a, b = torch.einsum("td,efd->tef", x, gate_up).chunk(2, -1)
    return torch.einsum("tef,edf->ted", F.silu(a) * b, down)  # (tokens, E, D)


@answer("experts", "experts compute tokens that did not choose them")
def all_tokens(x, chosen, gain, gate_up, down, swiglu):
    weight = torch.zeros(len(x), len(down), dtype=x.dtype).scatter(1, chosen, gain)
    return torch.einsum("ted,te->td", every_expert(x, gate_up, down), weight)


@answer("experts", "experts compute tokens that did not choose them")
def all_tokens_in_a_loop(x, chosen, gain, gate_up, down, swiglu):
    y = torch.zeros_like(x)
    for i in range(len(down)):
        g = (gain * (chosen == i)).sum(1)
        y = y + one_expert(x, gate_up[i], down[i], g)
    return y


def limited(x, chosen, gain, gate_up, down, capacity):
    y = torch.zeros_like(x)
    for i in range(len(down)):
        token, k = (chosen == i).nonzero(as_tuple=True)
        token, k = token[:capacity], k[:capacity]
        y = y.index_add(0, token, one_expert(x[token], gate_up[i], down[i], gain[token, k]))
    return y


for factor in (1.0, 1.25, 2, 4, 8):

    def share(x, chosen, gain, gate_up, down, swiglu, factor=factor):
        capacity = math.ceil(factor * chosen.numel() / len(down))
        return limited(x, chosen, gain, gate_up, down, capacity)

    wrong("experts", "tokens differ", routed_ffn=share)

for capacity in (64, 256, 1024):

    def fixed(x, chosen, gain, gate_up, down, swiglu, capacity=capacity):
        return limited(x, chosen, gain, gate_up, down, capacity)

    wrong("experts", "tokens differ", routed_ffn=fixed)


@answer("experts", "comes from float32")
def experts_in_float32(x, chosen, gain, gate_up, down, swiglu):
    args = (z.float() for z in (gain, gate_up, down))
    return sorted_rows(x.float(), chosen, *args, swiglu).to(x.dtype)


@answer("experts", "differ")
def index_put_without_adding(x, chosen, gain, gate_up, down, swiglu):
    """y[token] += adds one of several equal tokens only; here a token's experts in one call."""
    K = chosen.shape[1]
    token = torch.arange(len(x)).repeat_interleave(K)
    y = x * 0
    pairs = [one_expert(x[t : t + 1], gate_up[e], down[e], g[None])
             for t, e, g in zip(token, chosen.flatten(), gain.flatten(), strict=True)]  # fmt: skip
    y[token] += torch.cat(pairs)
    return y


# ---- mtp -----------------------------------------------------------------------------------------


def depths(model, tokens):
    return range(1, min(len(model.mtp), tokens.shape[1] - 1) + 1)


@answer("mtp")
def mtp_by_slices(model, tokens, targets):
    T, h, losses = tokens.shape[1], model.trunk(tokens), []
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, : T - k], tokens[:, k:T])
        due = targets[:, k:T].reshape(-1)
        losses.append(head_loss(h.reshape(len(due), -1), model.lm_head.weight, due))
    return torch.stack(losses).mean()


@answer("mtp")
def mtp_by_cross_entropy(model, tokens, targets):
    h, total = model.trunk(tokens), 0
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        logits = model.logits(h).transpose(1, 2)
        total = total + F.cross_entropy(logits, targets[:, k:], ignore_index=-1)
    return total / k


@answer("mtp")
def mtp_by_log_softmax(model, tokens, targets):
    h, losses = model.trunk(tokens), []
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        due = targets[:, k:]
        logs = model.logits(h).log_softmax(-1)
        picked = logs.gather(-1, due.clamp(min=0)[..., None])[..., 0]
        losses.append(-picked[due >= 0].mean())
    return sum(losses) / len(losses)


@answer("mtp")
def mtp_recursive(model, tokens, targets):
    last = depths(model, tokens).stop - 1

    def rest(k, h):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        loss = head_loss(h.flatten(0, 1), model.lm_head.weight, targets[:, k:].flatten())
        return loss if k == last else loss + rest(k + 1, h)

    return rest(1, model.trunk(tokens)) / last


@answer("mtp")
def mtp_hidden_first(model, tokens, targets):
    hidden = [model.trunk(tokens)]
    for k in range(len(model.mtp)):
        if hidden[-1].shape[1] < 2:
            break
        hidden.append(model.predict_next(k, hidden[-1][:, :-1], tokens[:, k + 1 :]))
    losses = [
        head_loss(h.flatten(0, 1), model.lm_head.weight, targets[:, -h.shape[1] :].flatten())
        for h in hidden[1:]
    ]
    return torch.stack(losses).sum() / len(losses)


@answer("mtp")
def mtp_by_narrow(model, tokens, targets):
    h, losses = model.trunk(tokens), []
    for k, _ in enumerate(model.mtp, 1):
        n = tokens.shape[1] - k
        if n > 0:
            h = model.predict_next(k - 1, h.narrow(1, 0, n), tokens.narrow(1, k, n))
            z = head_logits(h.reshape(-1, h.shape[-1]), model.lm_head.weight)
            due = targets.narrow(1, k, n).reshape(-1)
            keep = due != -1
            losses.append((z.logsumexp(-1)[keep] - z[keep, due[keep]]).mean())
    return sum(losses) / len(losses)


@answer("mtp")
def mtp_by_masks(model, tokens, targets):
    h, losses = model.trunk(tokens), []
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        due = targets[:, k:].flatten()
        known = due >= 0
        losses.append(head_loss(h.flatten(0, 1)[known], model.lm_head.weight, due[known]))
    return sum(losses) / float(len(losses))


@answer("mtp")
def mtp_with_running_mean(model, tokens, targets):
    h, mean, shifted, due = model.trunk(tokens), 0.0, tokens, targets
    for k in depths(model, tokens):
        shifted, due = shifted[:, 1:], due[:, 1:]
        h = model.predict_next(k - 1, h[:, :-1], shifted)
        loss = head_loss(h.flatten(end_dim=1), model.lm_head.weight, due.flatten())
        mean = mean + (loss - mean) / k
    return mean


@answer("mtp", "model(...) has the answer inside")
def mtp_by_calling(model, tokens, targets):
    return model(tokens, targets)["mtp_loss"]


@answer("mtp", "Error")
def mtp_without_end(model, tokens, targets):
    """Goes on where no position is left."""
    h, losses = model.trunk(tokens), []
    for k in range(1, len(model.mtp) + 1):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        losses.append(head_loss(h.flatten(0, 1), model.lm_head.weight, targets[:, k:].flatten()))
    return sum(losses) / len(losses)


@answer("mtp", "the gradient by embed_tokens.weight is wrong")
def mtp_detached(model, tokens, targets):
    h, losses = model.trunk(tokens).detach(), []
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        losses.append(head_loss(h.flatten(0, 1), model.lm_head.weight, targets[:, k:].flatten()))
    return sum(losses) / len(losses)


@answer("mtp", "it is off")
def mtp_over_all_targets(model, tokens, targets):
    """The mean over all depths' targets, not over depths."""
    h, total, count = model.trunk(tokens), 0, 0
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        due, n = targets[:, k:].flatten(), (targets[:, k:] >= 0).sum()
        total = total + n * head_loss(h.flatten(0, 1), model.lm_head.weight, due)
        count = count + n
    return total / count


# ---- accept --------------------------------------------------------------------------------------


@answer("accept")
def accept_by_text(p, q, drafts, u):
    kept, tokens = [], []
    for b in range(len(p)):
        n, G = 0, drafts.shape[1]
        while n < G and u[b, n] * q[b, n, drafts[b, n]] < p[b, n, drafts[b, n]]:
            n += 1
        left = p[b, n] if n == G else (p[b, n] - q[b, n]).clamp(min=0)
        kept.append(n)
        tokens.append(draw((left if left.sum() else p[b, n])[None, None], u[b : b + 1, G:]))
    return torch.tensor(kept), torch.cat(tokens)


def chosen_rows(p, q, drafts):
    p_x = torch.take_along_dim(p[:, :-1], drafts.unsqueeze(-1), -1).squeeze(-1)
    return p_x, torch.take_along_dim(q, drafts.unsqueeze(-1), -1).squeeze(-1)


def after(p, q, kept, u):
    """A token behind the drafts that stay."""
    B, G, V = q.shape
    at = kept.view(B, 1, 1).expand(B, 1, V)
    p_n = p.gather(1, at)
    q_n = torch.cat((q, torch.zeros(B, 1, V, dtype=q.dtype)), 1).gather(1, at)
    rest = F.relu(p_n - q_n)
    return draw(torch.where(rest.sum(-1, keepdim=True) == 0, p_n, rest), u[:, G:])


@answer("accept")
def accept_by_ratio(p, q, drafts, u):
    p_x, q_x = chosen_rows(p, q, drafts)
    stays = u[:, :-1] < torch.clamp(p_x / q_x, max=1)
    kept = torch.cumprod(stays.int(), 1).sum(1)
    return kept, after(p, q, kept, u)


@answer("accept")
def accept_by_minimum(p, q, drafts, u):
    p_x, q_x = chosen_rows(p, q, drafts)
    goes = u[:, :-1] >= torch.minimum(torch.ones_like(p_x), p_x / q_x)
    kept = (goes.cumsum(1) == 0).sum(1)
    return kept, after(p, q, kept, u)


@answer("accept")
def accept_by_first(p, q, drafts, u):
    """Where the first that goes stands; behind the drafts stands one that goes always."""
    p_x, q_x = chosen_rows(p, q, drafts)
    goes = F.pad(u[:, :-1] * q_x >= p_x, (0, 1), value=True)
    kept = goes.int().argmax(1)
    return kept, after(p, q, kept, u)


@answer("accept")
def accept_by_logs(p, q, drafts, u):
    p_x, q_x = chosen_rows(p, q, drafts)
    stays = u[:, :-1].log() < p_x.log() - q_x.log()
    stays &= p_x > 0
    kept = stays.long().cummin(1).values.sum(1)
    return kept, after(p, q, kept, u)


@answer("accept")
def accept_in_rounds(p, q, drafts, u):
    B, G = drafts.shape
    rows, open_, kept = torch.arange(B), torch.ones(B, dtype=torch.bool), torch.zeros(B).long()
    for g in range(G):
        x = drafts[:, g]
        open_ = open_ & (u[:, g] * q[rows, g, x] < p[rows, g, x])
        kept = kept + open_
    return kept, after(p, q, kept, u)


@answer("accept")
def accept_with_masks(p, q, drafts, u):
    """What would be drawn at every position, then the one that counts."""
    B, G, V = q.shape
    hot = F.one_hot(drafts, V).to(p.dtype)
    stays = u[:, :G] * (q * hot).sum(-1) < (p[:, :G] * hot).sum(-1)
    kept = stays.to(torch.int64).cumprod(1).sum(1)
    rest = (p[:, :G] - q).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, :G])
    every = draw(torch.cat((rest, p[:, G:]), 1), u[:, G:].expand(B, G + 1))
    return kept, every.gather(1, kept[:, None])


@answer("accept")
def accept_with_normalised_rest(p, q, drafts, u):
    B, G, V = q.shape
    p_x, q_x = chosen_rows(p, q, drafts)
    kept = (u[:, :G] * q_x < p_x).long().cumprod(-1).sum(-1)
    tokens = []
    for b, n in enumerate(kept.tolist()):
        w = p[b, n]
        if n < G:
            w = w - torch.minimum(p[b, n], q[b, n])
            w = w / w.sum() if w.sum() > 0 else p[b, n]
        tokens.append(draw(w.view(1, 1, V), u[b, G:].view(1, 1)))
    return kept, torch.cat(tokens)


@answer("accept", "token after them (B, 1) is (200,), expected (200, 1)")
def accept_of_one_dimension(p, q, drafts, u):
    kept, token = accept_by_ratio(p, q, drafts, u)
    return kept, token[:, 0]


@answer("accept", "no p to fall back to")
def accept_without_p(p, q, drafts, u):
    p_x, q_x = chosen_rows(p, q, drafts)
    kept = (u[:, :-1] * q_x < p_x).long().cumprod(1).sum(1)
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0)[torch.arange(len(p)), kept]
    return kept, draw(rest[:, None], u[:, -1:])


@answer("accept", "is int32, expected int64; the numbers are right")
def accept_of_int32(p, q, drafts, u):
    kept, token = accept_by_ratio(p, q, drafts, u)
    return kept.int(), token


@answer("accept", "it changes p")
def accept_that_writes(p, q, drafts, u):
    p_x, q_x = chosen_rows(p, q, drafts)
    kept = (u[:, :-1] * q_x < p_x).long().cumprod(1).sum(1)
    p[:, :-1].sub_(q).clamp_(min=0)
    rest = p[torch.arange(len(p)), kept]
    return kept, draw(rest[:, None], u[:, -1:])


@answer("accept", "texts differ")
def accept_of_the_text_before(p, q, drafts, u):
    """Drafts after a rejected one judge on."""
    p_x, q_x = chosen_rows(p, q, drafts)
    stays = u[:, :-1] * q_x < p_x
    kept = torch.where(stays.all(1), drafts.shape[1], stays.long().argmin(1))
    kept = torch.where(stays[:, -1], drafts.shape[1], kept)
    return kept, after(p, q, kept, u)


# ---- tiles ---------------------------------------------------------------------------------------

E4M3 = torch.float8_e4m3fn


def scale_of(largest, pow2=False):
    s = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126))
    return torch.exp2(torch.ceil(torch.log2(s))) if pow2 else s


@answer("tiles")
def tiles_in_loops(x, block, pow2=False):
    (bm, bk), (M, K) = block, x.shape[-2:]
    flat = x.float().reshape(-1, M, K)
    q = torch.empty(flat.shape, dtype=E4M3)
    s = torch.empty(len(flat), -(-M // bm), -(-K // bk))
    for n in range(len(flat)):
        for i in range(0, M, bm):
            for j in range(0, K, bk):
                tile = flat[n, i : i + bm, j : j + bk]
                scale = scale_of(tile.abs().max(), pow2)
                s[n, i // bm, j // bk] = scale
                q[n, i : i + bm, j : j + bk] = (tile / scale).to(E4M3)
    return q.view(x.shape), s.view(*x.shape[:-2], *s.shape[1:])


@answer("tiles")
def tiles_by_repeat(x, block, pow2=False):
    (bm, bk), (M, K) = block, x.shape[-2:]
    parts = [[t.abs().amax((-2, -1)) for t in row.split(bk, -1)] for row in x.split(bm, -2)]
    s = scale_of(torch.stack([torch.stack(row, -1) for row in parts], -2).float(), pow2)
    each = s.repeat_interleave(bm, -2).repeat_interleave(bk, -1)[..., :M, :K]
    return (x.float() / each).to(E4M3), s


@answer("tiles")
def tiles_by_inverse(x, block, pow2=False):
    """x times 1 / s: where this lies between two numbers, the other may be taken."""
    (bm, bk), (M, K) = block, x.shape[-2:]
    padded = F.pad(x.float(), (0, -K % bk, 0, -M % bm))
    tiles = padded.reshape(*x.shape[:-2], -(-M // bm), bm, -(-K // bk), bk)
    s = scale_of(tiles.abs().amax(dim=(-3, -1)), pow2)
    q = tiles * (1 / s)[..., :, None, :, None].clamp(max=2.0**126)
    q = q.clamp(-448, 448).reshape(padded.shape)[..., :M, :K]
    return q.to(E4M3).contiguous(), s


@answer("tiles")
def tiles_by_pooling(x, block, pow2=False):
    (bm, bk), (M, K) = block, x.shape[-2:]
    flat = F.pad(x.float().abs().reshape(-1, 1, M, K), (0, -K % bk, 0, -M % bm))
    s = scale_of(F.max_pool2d(flat, block), pow2)
    each = F.interpolate(s, scale_factor=block, mode="nearest")[..., :M, :K]
    q = (x.float().reshape(-1, 1, M, K) / each).to(E4M3)
    return q.view(x.shape), s.view(*x.shape[:-2], *s.shape[2:])


@answer("tiles")
def tiles_by_max_and_min(x, block, pow2=False):
    (bm, bk), (M, K) = block, x.shape[-2:]
    padded = F.pad(x.float(), (0, -K % bk, 0, -M % bm))
    tiles = padded.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bm)).transpose(-3, -2)
    flat = tiles.flatten(-2)
    s = scale_of(torch.maximum(flat.amax(-1), -flat.amin(-1)), pow2)
    q = (flat / s[..., None]).to(E4M3).view(tiles.shape)
    return q.transpose(-3, -2).reshape(padded.shape)[..., :M, :K], s


@answer("tiles")
def tiles_by_bits(x, block, pow2=False):
    """Powers of two by the exponent's bits."""
    (bm, bk), (M, K) = block, x.shape[-2:]
    padded = F.pad(x.float(), (0, -K % bk, 0, -M % bm))
    tiles = padded.view(*x.shape[:-2], -(-M // bm), bm, -(-K // bk), bk)
    s = scale_of(tiles.abs().amax((-3, -1), True))
    if pow2:
        mantissa, exponent = torch.frexp(s)
        s = torch.ldexp(torch.ones_like(s), exponent - (mantissa == 0.5).int())
    return (tiles / s).view(padded.shape)[..., :M, :K].to(E4M3), s[..., 0, :, 0]


@answer("tiles")
def tiles_of_double(x, block, pow2=False):
    """Divided in float64, which rounds once less."""
    (bm, bk), (M, K) = block, x.shape[-2:]
    tiles = F.pad(x, (0, -K % bk, 0, -M % bm)).double()
    tiles = tiles.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bm))
    s = scale_of(tiles.abs().amax((-3, -1)).float(), pow2)
    q = (tiles / s.double()[..., :, None, :, None]).float().to(E4M3)
    return q.flatten(-4, -3).flatten(-2)[..., :M, :K], s


@answer("tiles")
def tiles_by_matrix(x, block, pow2=False):
    """Leading dimensions by recursion."""
    if x.ndim > 2:
        parts = [tiles_by_matrix(matrix, block, pow2) for matrix in x]
        return tuple(torch.stack(z) for z in zip(*parts, strict=True))
    rows = [list(row.split(block[1], 1)) for row in x.float().split(block[0], 0)]
    scales = [[scale_of(tile.abs().max(), pow2) for tile in row] for row in rows]
    q = torch.cat([
        torch.cat([(t / s).to(E4M3).float() for t, s in zip(*row, strict=True)], 1)
        for row in zip(rows, scales, strict=True)
    ])  # fmt: skip
    return q.to(E4M3), torch.tensor(scales)


@answer("tiles", "Error")
def tiles_of_three_dimensions(x, block, pow2=False):
    batch, M, K = x.shape
    return tiles_by_repeat(x, block, pow2)


@answer("tiles", "numbers differ")
def tiles_of_whole_rows(x, block, pow2=False):
    """A row's scale for all its tiles."""
    q, s = tiles_by_repeat(x, block, pow2)
    s = s.amax(-1, keepdim=True).expand(s.shape)
    each = s.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return (x.float() / each[..., : x.shape[-2], : x.shape[-1]]).to(E4M3), s


@answer("tiles", "is float32, expected float8_e4m3fn")
def tiles_of_float32(x, block, pow2=False):
    q, s = tiles_by_repeat(x, block, pow2)
    return q.float(), s


@answer("tiles", "is float8_e5m2, expected float8_e4m3fn")
def tiles_of_e5m2(x, block, pow2=False):
    q, s = tiles_by_repeat(x, block, pow2)
    return q.float().to(torch.float8_e5m2), s


@answer("tiles", "expected (4, 2)")
def tiles_with_kept_dimensions(x, block, pow2=False):
    q, s = tiles_by_repeat(x, block, pow2)
    return q, s[..., None]


@answer("tiles", "numbers differ")
def tiles_cut_off(x, block, pow2=False):
    """Rounded towards 0."""
    q, s = tiles_by_repeat(x, block, pow2)
    each = s.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    y = x.float() / each[..., : x.shape[-2], : x.shape[-1]]
    step = torch.exp2(y.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (torch.trunc(y / step) * step).to(E4M3), s
