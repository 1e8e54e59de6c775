"""Answers to the exercises as different people would write them: right ones, and wrong ones that
look right. test_exercises.py tries them all.

LINES has, by exercise, those that differ from the answer in exercises/solutions.py in one place,
"old text => new text". Below a wrong one are the words that the checker must say. Answers that are
written in another way altogether are functions.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from exercises import check, solutions
from exercises.known import EXERCISES
from exercises.network import with_keys_and_values
from sample import draw
from support.ops import upcast

LINES = r"""
# rope
(x32 / (mean + eps).sqrt()) => (x32 * torch.rsqrt(mean + eps))
(x32 / (mean + eps).sqrt()) => (x32 * torch.exp(-0.5 * torch.log(mean + eps)))
(x32 / (mean + eps).sqrt()) => F.rms_norm(x32, x.shape[-1:], eps=eps)
(mean + eps).sqrt() => mean.add_(eps).sqrt_()
x32.square().mean(-1, keepdim=True) => x32.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1]
x32.square().mean(-1, keepdim=True) => (x32[..., None, :] @ x32[..., None])[..., 0] / x.shape[-1]
x32.square().mean(-1, keepdim=True) => x.double().square().mean(-1, keepdim=True)
mean = x32.square() => mean = x.float().square()
    comes from float32
(x32 / (mean + eps).sqrt()).to(x.dtype) => x32 / (mean + eps).sqrt()
    is float32, expected bfloat16; the numbers are right
return weight * y => return weight * F.layer_norm(x32, x.shape[-1:], eps=eps).to(x.dtype)
    that is LayerNorm
(x32 / (mean + eps).sqrt()) => x32.div_((mean + eps).sqrt())
    it changes x
(x32 / (mean + eps).sqrt()) => torch.stack([z / (z.square().mean() + eps).sqrt() for z in x32])
    vectors differ
return weight * y => weight * y
    is there a `return`?
return weight * y => return (weight * y).detach().float().numpy()
    is of type ndarray
return weight * y => return (weight * y,)
    is of type tuple
(x32 / (mean + eps).sqrt()) => F.rms_norm(x, x.shape[-1:], epsilon=eps)
    unexpected keyword
a, b = x32.unflatten => a, b = x32.float().unflatten
    comes from float32
.flatten(-2).to(x.dtype) => .flatten(-2)
    is float64, expected bfloat16; the numbers are right
.flatten(-2).to(x.dtype) => .flatten(-2).to(x.dtype).transpose(1, 2)
    is (2, 3, 5, 6), expected (2, 5, 3, 6)
a, b = x32.unflatten => a, b = x32.detach().unflatten
    has no gradient

# yarn
theta ** (-2 * i / R) => 1 / theta ** (torch.arange(0, R, 2, dtype=dtype) / R)
theta ** (-2 * i / R) => torch.exp2(-2 * i / R * math.log2(theta))
theta ** (-2 * i / R) => torch.logspace(0, 2 / R - 1, R // 2, base=theta, dtype=dtype)
theta ** (-2 * i / R) => torch.tensor([theta ** (-2 * j / R) for j in range(R // 2)], dtype=dtype)
frequency * (1 - ramp) + frequency / factor * ramp => frequency * (1 + ramp * (1 / factor - 1))
frequency * (1 - ramp) + frequency / factor * ramp => frequency.lerp(frequency / factor, ramp)
.clamp(0, 1) => .relu().minimum(torch.ones(()))
positions.to(dtype)[:, None] * frequency => torch.outer(positions.to(dtype), frequency)
positions.to(dtype)[:, None] * frequency => positions[:, None] * frequency
angle.cos(), angle.sin() => torch.sin(angle + math.pi / 2), angle.sin()
angle.cos(), angle.sin() => (turn := torch.polar(torch.ones_like(angle), angle)).real, turn.imag
angle.cos(), angle.sin() => angle.cos().float(), angle.sin().float()
    is float32, expected float64
positions.to(dtype)[:, None] * frequency => (positions[:, None] * frequency).float().to(dtype)
    comes from float32
positions.to(dtype)[:, None] * frequency => positions.to(dtype)[:, None] * frequency.repeat(2)
    is (9, 16), expected (9, 8)
return angle.cos(), angle.sin() => return torch.stack((angle.cos(), angle.sin()))
    it returns Tensor, expected cos (T, R/2) and sin (T, R/2)
positions.to(dtype)[:, None] => torch.arange(len(positions))[:, None]
    counted from the first
((i - low) / max(high - low, 0.001)) => (1 - (length * frequency / (2 * math.pi) - 1) / 31)
    positions differ

# mla
k_pe.expand(B, T, H, -1) => k_pe.repeat(1, 1, H, 1)
torch.einsum("bihd,bjhd->bhij", q, k) => q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
q, k) * self.scale => q * self.scale, k)
score.masked_fill(later, -math.inf) => score + torch.full((T, T), -1e9).triu(1)
score.masked_fill(later, -math.inf) => torch.where(later, torch.finfo(score.dtype).min, score)
score = score.masked_fill(later, -math.inf) => score.masked_fill_(later, -math.inf)
score.softmax(-1) => score.log_softmax(-1).exp()
score.softmax(-1) => score.exp() / score.exp().sum(-1, keepdim=True)
torch.einsum("bhij,bjhd->bihd", p, v) => (p @ v.transpose(1, 2)).transpose(1, 2)
"bhij,bjhd->bihd" => "bhij,bjhd->bhid"
    is (2, 3, 5, 5), expected (2, 5, 3, 5)
p, v) => p, v).flatten(2)
    is (2, 5, 15), expected (2, 5, 3, 5)
p, v) => p, v).transpose(1, 2).reshape(B, T, H, V)
    the right numbers, in another order
score.softmax(-1) => score.float().softmax(-1).to(v.dtype)
    comes from float32
p, v) => p, v).double()
    is float64, expected float32
score.masked_fill(later, -math.inf) => score - 5 * later
    tokens differ
later = i > i[:, None] => later = i >= i[:, None]
    with NaN
k_pe = k_pe.expand => k_pe = k_pe.detach().expand
    the gradient by k_pe is wrong
p, v) => p, v).detach()
    has no gradient
* self.scale => * self.scale**0.5
    tokens differ

# absorbed
torch.einsum("bthn,hnc->bthc", q_nope, W_UK) => (q_nope.unsqueeze(-2) @ W_UK).squeeze(-2)
torch.einsum("bthn,hnc->bthc", q_nope, W_UK) => (q_nope[..., None] * W_UK).sum(-2)
torch.einsum("bthc,bsc->bhts", q, kv) => q.transpose(1, 2) @ kv[:, None].mT
query = S - T + => query = (S - T if start is None else start) +
score.masked_fill(later, -math.inf) => score + torch.full((T, S), -math.inf).triu(S - T + 1)
score.masked_fill(later, -math.inf) => torch.where(later, -1e30, score)
p, kv[..., :C]) => p, kv)[..., :C]
torch.einsum("bthc,hvc->bthv", latent, W_UV) => (latent.unsqueeze(-2) @ W_UV.mT).squeeze(-2)
"bthc,hvc->bthv", latent, W_UV => "bhsv,bhts->bthv", kv[:, None, :, :C] @ W_UV.mT, p
    keys or values of the old tokens are made anew
return torch.einsum("bthc,hvc->bthv", latent, W_UV) => return latent
    is (2, 1, 3, 7), expected (2, 1, 3, 5)
score.softmax(-1) => score.float().softmax(-1).to(kv.dtype)
    comes from float32
(self, q_nope, q_pe, kv, start=None) => (self, q_nope, kv)
    TypeError

# gate
(upcast(x) @ upcast(self.weight).T) => F.linear(upcast(x), upcast(self.weight))
.sigmoid() => .neg().exp().add(1).reciprocal()
s.detach() + b => s + b
if G > 1: => if True:
groups.topk(2).values.sum(-1) => groups.sort(-1).values[..., -2:].sum(-1)
torch.zeros_like(score).scatter(-1, best, 1.0) > 0 => F.one_hot(best, G).sum(-2).bool()
torch.zeros_like(score).scatter(-1, best, 1.0) > 0 => score >= score.gather(-1, best[..., -1:])
groups.masked_fill(~stays[..., None], -math.inf) => torch.where(stays[..., None], groups, -1e9)
choice.topk(K).indices => choice.sort(-1, descending=True).indices[..., :K]
choice.topk(K).indices => choice.argsort(-1)[..., -K:]
gain / gain.sum(-1, keepdim=True) => F.normalize(gain, p=1, dim=-1, eps=0)
gain / gain.sum(-1, keepdim=True) => gain / (gain.sum(-1, True) + 1e-20)
return s, chosen, gain => return chosen, gain
    it returns Tensor and Tensor, expected
return s, chosen, gain => return s, chosen.int(), gain
    chosen experts (B, T, K) is int32, expected int64; the numbers are right
return s, chosen, gain => return s, chosen.double(), gain
    chosen experts (B, T, K) is float64, expected int64
return s, chosen, gain => return s, chosen + 1, gain
    of 40 tokens differ
return s, chosen, gain => return s, chosen, gain.flip(-1)
    gate values (B, T, K): 40 of 40 tokens differ
return s, chosen, gain => return s, chosen, torch.cat((2 * gain[:, :3], gain[:, 3:]), 1)
    gate values (B, T, K): 6 of 40 tokens differ
return s, chosen, gain => return s, chosen, gain / (1 + 1e-3)
    gate values (B, T, K)
.sigmoid() => .float().sigmoid().to(x.dtype)
    comes from float32
s.detach() + b => s.detach() + b.add_(1e-9)
    it changes self.e_score_correction_bias
groups.topk(2).values.sum(-1) => groups.mean(-1)
    the sum, or mean, of all its experts
groups.topk(2).values.sum(-1) => groups.amin(-1)
    chosen experts (B, T, K)

# bias
load = counts.float() => load = counts.double()
mean = load.mean() => mean = sum(load.tolist()) / len(load)
(mean - load).sign() => (counts.sum() - len(counts) * counts).sign()
(mean - load).sign() => torch.where(load < mean, 1.0, torch.where(load > mean, -1.0, 0.0))
(mean - load).sign() => ((load < mean).int() - (load > mean).int())
gate.e_score_correction_bias += gamma => gate.e_score_correction_bias.data += gamma
self.expert_counts.zero_() => self.expert_counts[:] = 0
self.expert_counts.zero_() => self.expert_counts = torch.zeros_like(self.expert_counts)
(mean - load).sign() => ((mean - load) * ((mean - load).abs() > 0.01 * mean)).sign()
    differ
zip(self.gates(), self.expert_counts, strict=True) => [(self.gates()[0], self.expert_counts[0])]
    differ
(mean - load).sign() => torch.tanh(mean - load)
    differ
mean = load.mean() => mean = counts.mean()
    RuntimeError
self.expert_counts.zero_() => self.expert_counts = torch.zeros(self.expert_counts.shape)
    expert_counts (layers, E) is float32, expected int64

# balance
(s / s.sum(-1, keepdim=True)) => F.normalize(s, p=1, dim=-1)
(s / s.sum(-1, keepdim=True)) => s.log().softmax(-1)
(s / s.sum(-1, keepdim=True)) => (s.log() - s.sum(-1, keepdim=True).log()).exp()
s.topk(K).indices => s.argsort(-1, descending=True)[..., :K]
torch.stack([torch.bincount(ids, minlength=E) for ids in best]) => F.one_hot(best, E).sum(1)
counts.to(P.dtype) * E / (K * T) => (s >= s.topk(K).values[..., -1:]).to(s.dtype).mean(1) * E / K
counts.to(P.dtype) * E / (K * T) => (s.argsort(-1).argsort(-1) >= E - K).double().mean(1) * E / K
(f * P).sum(-1).mean() => torch.tensordot(f, P) / len(s)
(f * P).sum(-1).mean() => (f * P).sum(-1)
    is (3,), expected ()
(f * P).sum(-1).mean() => (f * P).sum(-1).mean().item()
    loss is of type float, expected a tensor
(f * P).sum(-1).mean() => (f * P.detach()).sum(-1).mean()
    loss has no gradient
(f * P).sum(-1).mean() => (f * P).sum(-1).mean().float()
    loss is float32, expected float64; the numbers are right
s.sum(-1, keepdim=True) => s.sum(-1, keepdim=True).detach()
    the gradient by s is wrong

# experts
for i in range(len(down)): => for i in chosen.unique():
(chosen == i).nonzero(as_tuple=True) => torch.where(chosen == i)
(rows @ gate_up[i].T).chunk(2, -1) => F.linear(rows, gate_up[i]).tensor_split(2, -1)
swiglu(a, b, g) @ => (a / (1 + torch.exp(-a)) * b * g[:, None]) @
swiglu(a, b, g) @ down[i].T => F.linear(F.silu(a) * b, down[i]) * g[:, None]
y = y.index_add(0, token, rows) => y.index_add_(0, token, rows)
y = y.index_add(0, token, rows) => y[token] = y[token] + rows
(chosen == i).nonzero(as_tuple=True) => (chosen == i).nonzero()[: 8 * chosen.numel() // len(down)].T
    tokens differ
(chosen == i).nonzero(as_tuple=True) => (chosen == i).nonzero()[:1024].T
    tokens differ
swiglu(a, b, g) @ down[i].T => (swiglu(a, b, g) @ down[i].T).float().to(x.dtype)
    comes from float32

# mtp
h[:, :-1], tokens[:, k:] => h[:, : T - k], tokens[:, k:T]
h[:, :-1], tokens[:, k:] => h.narrow(1, 0, T - k), tokens.narrow(1, k, T - k)
range(1, min(len(model.mtp), T - 1) + 1) => [k for k in (1, 2, 3) if k <= len(model.mtp) and k < T]
targets[:, k:] => targets[:, -h.shape[1] :]
sum(losses) / len(losses) => torch.stack(losses).mean()
sum(losses) / len(losses) => sum(loss / len(losses) for loss in losses)
return sum(losses) / len(losses) => return model(tokens, targets)["mtp_loss"]
    model(...) has the answer inside
min(len(model.mtp), T - 1) + 1 => len(model.mtp) + 1
    Error
model.trunk(tokens), [] => model.trunk(tokens).detach(), []
    the gradient by embed_tokens.weight is wrong
sum(losses) / len(losses) => 0.6 * losses[0] + 0.4 * losses[-1]
    it is off

# accept
p[:, :G].gather(2, drafts[..., None]) => torch.take_along_dim(p[:, :G], drafts[..., None], 2)
u[:, :G] * q_x < p_x => u[:, :G] < torch.clamp(p_x / q_x, max=1)
u[:, :G] * q_x < p_x => (u[:, :G].log() < p_x.log() - q_x.log()) & (p_x > 0)
stays.long().cumprod(1).sum(1) => ((~stays).cumsum(1) == 0).sum(1)
stays.long().cumprod(1).sum(1) => F.pad(~stays, (0, 1), value=True).int().argmax(1)
stays.long().cumprod(1).sum(1) => stays.long().cummin(1).values.sum(1)
(p_after - q_after).clamp(min=0) => p_after - torch.minimum(p_after, q_after)
(empty, p_after, rest) => (empty, p_after, rest / rest.sum(1, keepdim=True))
u[:, G:]) => u[:, G:])[:, 0]
    token after them (B, 1) is (200,), expected (200, 1)
return kept, => return kept.int(),
    is int32, expected int64; the numbers are right
rest = (p_after - q_after) => rest = (p[:, :G].sub_(q)[rows, kept.clamp(max=G - 1)])
    it changes p
stays.long().cumprod(1).sum(1) => torch.where(stays[:, -1], G, stays.long().cumprod(1).sum(1))
    texts differ

# tiles
tiles.abs() => torch.maximum(tiles, -tiles)
.amax((-3, -1), keepdim=True) => .amax(-1, True).amax(-3, True)
(tiles / s).to => (tiles * (1 / s)).to
(tiles / s).to => (tiles.double() / s.double()).float().to
s.log2().ceil() => (torch.frexp(s).exponent - (torch.frexp(s).mantissa == 0.5).int())
torch.where(largest == 0, 1.0, s) => s.masked_fill(largest == 0, 1.0)
s.squeeze(-1).squeeze(-2) => s[..., 0, :, 0]
q.flatten(-4, -3).flatten(-2)[ => q.reshape(*x.shape[:-2], M + -M % bm, K + -K % bk)[
(M, K) = block, x.shape[-2:] => (_, M, K) = block, x.shape
    Error
1.0, s) => 1.0, s).amax(-2, keepdim=True).expand_as(s)
    numbers differ
return q, => return q.float(),
    is float32, expected float8_e4m3fn
(torch.float8_e4m3fn) => (torch.float8_e5m2)
    is float8_e5m2, expected float8_e4m3fn
s.squeeze(-1).squeeze(-2) => s.squeeze(-1)
    expected (4, 2)
(tiles / s).to => ((tiles / s).view(torch.int32) >> 20 << 20).view(torch.float32).to
    numbers differ
"""


RIGHT = {exercise: {} for exercise in EXERCISES}  # by line or name: what has the functions
WRONG = {exercise: {} for exercise in EXERCISES}  # the same, and the words

for section in LINES.strip().split("\n\n"):
    heading, *lines = section.splitlines()
    exercise = heading.removeprefix("# ")
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(" "):
            continue
        functions = check.with_mistake(exercise, *line.split(" => "))
        if below.startswith(" "):
            WRONG[exercise][line] = functions, below.strip()
        else:
            RIGHT[exercise][line] = functions


def answer(exercise: str, says: str = ""):
    """Marks a function as an answer, a wrong one if the checker has to say something."""

    def mark(function):
        name = [*EXERCISES[exercise].functions][-1]  # of two functions the last
        functions = SimpleNamespace(**vars(solutions) | {name: function})
        if says:
            WRONG[exercise][function.__name__] = functions, says
        else:
            RIGHT[exercise][function.__name__] = functions
        return function

    return mark


# ---- rope, of which these are rotate -------------------------------------------------------------


@answer("rope")
def as_complex_numbers(x, rope, interleave):
    h = upcast(x)
    pairs = h.unflatten(-1, (-1, 2)) if interleave else h.unflatten(-1, (2, -1)).mT
    turn = torch.complex(*(upcast(table).to(h.dtype) for table in rope))[:, None]
    y = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (y if interleave else y.mT).flatten(-2).to(x.dtype)


# ---- mla -----------------------------------------------------------------------------------------


def keys_and_values(self, q_nope, latent):
    B, T, H, N = q_nope.shape
    return self.kv_b_proj(latent).view(B, T, H, -1).split([N, self.config.v_head_dim], -1)


@answer("mla")
def by_a_fused_kernel(self, q_nope, q_pe, latent, k_pe):
    k, v = keys_and_values(self, q_nope, latent)
    q = torch.cat((q_nope, q_pe), -1).transpose(1, 2)
    k = torch.cat((k, k_pe.expand(-1, -1, k.shape[2], -1)), -1).transpose(1, 2)
    v = v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale).transpose(1, 2)


# ---- absorbed ------------------------------------------------------------------------------------


@answer("absorbed")
def by_a_fused_kernel_on_latents(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W_UK, W_UV = self.kv_b_proj.weight.view(H, -1, C).split([N, self.config.v_head_dim], 1)
    q = torch.cat((torch.einsum("bthn,hnc->bhtc", q_nope, W_UK), q_pe.transpose(1, 2)), -1)
    k = kv[:, None].expand(-1, H, -1, -1)
    mask = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    o = F.scaled_dot_product_attention(q, k, k[..., :C], attn_mask=mask, scale=self.scale)
    return torch.einsum("bhtc,hvc->bthv", o, W_UV)


answer("absorbed", "keys or values of the old tokens are made anew")(with_keys_and_values)


# ---- gate ----------------------------------------------------------------------------------------


def finish(self, s, chosen):
    gain = s.gather(-1, chosen)
    if self.config.norm_topk_prob:
        gain = gain / gain.sum(-1, keepdim=True)
    return s, chosen, gain * self.config.routed_scaling_factor


@answer("gate")
def gate_with_lists(self, x):
    c, s = self.config, torch.sigmoid(F.linear(upcast(x), upcast(self.weight)))
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


# ---- bias ----------------------------------------------------------------------------------------


@answer("bias")
@torch.no_grad()
def all_layers_at_once(self, gamma):
    load = self.expert_counts.double()
    step = gamma * torch.sign(load.mean(1, keepdim=True) - load)
    for i, gate in enumerate(self.gates()):
        gate.e_score_correction_bias.add_(step[i])
    self.expert_counts.zero_()


# ---- balance -------------------------------------------------------------------------------------


@answer("balance")
def sequence_by_sequence(s, K):
    total = 0
    for x in s:
        T, E = x.shape
        chosen = x.topk(K).indices.flatten().tolist()
        share = x / x.sum(-1, keepdim=True)
        for e in range(E):
            total = total + chosen.count(e) * E / (K * T) * share[:, e].mean()
    return total / len(s)


# ---- experts -------------------------------------------------------------------------------------


def rows_by_expert(x, chosen, gain, gate_up, down):
    """The token of every row, and what its expert makes of it."""
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(down)).tolist()
    token, g = order // chosen.shape[1], gain.flatten()[order].split(counts)
    out = []
    for rows, W, V, weight in zip(x[token].split(counts), gate_up, down, g, strict=True):
        a, b = F.linear(rows, W).chunk(2, -1)
        out.append(F.linear(F.silu(a) * b, V) * weight[:, None])
    return token, torch.cat(out)


@answer("experts")
def sorted_rows(x, chosen, gain, gate_up, down, swiglu):
    return torch.zeros_like(x).index_add(0, *rows_by_expert(x, chosen, gain, gate_up, down))


@answer("experts", "differ")
def sorted_rows_not_added_up(x, chosen, gain, gate_up, down, swiglu):
    """y[token] += adds one of several equal tokens only."""
    token, rows = rows_by_expert(x, chosen, gain, gate_up, down)
    y = x * 0
    y[token] += rows
    return y


@answer("experts", "experts compute tokens that did not choose them")
def all_tokens(x, chosen, gain, gate_up, down, swiglu):
    weight = torch.zeros(len(x), len(down), dtype=x.dtype).scatter(1, chosen, gain)
    a, b = torch.einsum("td,efd->tef", x, gate_up).chunk(2, -1)
    y = torch.einsum("tef,edf->ted", F.silu(a) * b, down)  # (tokens, E, D)
    return torch.einsum("ted,te->td", y, weight)


# ---- mtp -----------------------------------------------------------------------------------------


def depths(model, tokens):
    return range(1, min(len(model.mtp), tokens.shape[1] - 1) + 1)


@answer("mtp")
def by_cross_entropy(model, tokens, targets):
    h, total = model.trunk(tokens), 0
    for k in depths(model, tokens):
        h = model.predict_next(k - 1, h[:, :-1], tokens[:, k:])
        logits = model.logits(h).transpose(1, 2)
        total = total + F.cross_entropy(logits, targets[:, k:], ignore_index=-1)
    return total / k


# ---- accept --------------------------------------------------------------------------------------


@answer("accept")
def text_by_text(p, q, drafts, u):
    kept, tokens = [], []
    for b in range(len(p)):
        n, G = 0, drafts.shape[1]
        while n < G and u[b, n] * q[b, n, drafts[b, n]] < p[b, n, drafts[b, n]]:
            n += 1
        left = p[b, n] if n == G else (p[b, n] - q[b, n]).clamp(min=0)
        kept.append(n)
        tokens.append(draw((left if left.sum() else p[b, n])[None, None], u[b : b + 1, G:]))
    return torch.tensor(kept), torch.cat(tokens)


# ---- tiles ---------------------------------------------------------------------------------------


def scale_of(largest, pow2):
    s = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126))
    return torch.exp2(torch.ceil(torch.log2(s))) if pow2 else s


@answer("tiles")
def tile_by_tile(x, block, pow2=False):
    (bm, bk), (M, K) = block, x.shape[-2:]
    flat = x.float().reshape(-1, M, K)
    q = torch.empty(flat.shape, dtype=torch.float8_e4m3fn)
    s = torch.empty(len(flat), -(-M // bm), -(-K // bk))
    for n in range(len(flat)):
        for i in range(0, M, bm):
            for j in range(0, K, bk):
                tile = flat[n, i : i + bm, j : j + bk]
                scale = scale_of(tile.abs().max(), pow2)
                s[n, i // bm, j // bk] = scale
                q[n, i : i + bm, j : j + bk] = (tile / scale).to(torch.float8_e4m3fn)
    return q.view(x.shape), s.view(*x.shape[:-2], *s.shape[1:])
