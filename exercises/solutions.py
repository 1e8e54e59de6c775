"""A plain answer to every exercise, step by step. Do not read on before you have tried.

check.py compares with these functions, and hints.txt changes single lines of them into known
mistakes. What the network computes stands in model.py, sample.py and fp8.py; a test compares.
"""

import math

import torch
import torch.nn.functional as F

from model import upcast
from sample import draw


def rms_norm(self, x):
    x32 = upcast(x)
    mean = x32.square().mean(-1, keepdim=True)
    y = (x32 / (mean + self.eps).sqrt()).to(x.dtype)
    return self.weight * y


def rotate(x, rope, interleave):
    cos, sin = rope[0][:, None], rope[1][:, None]  # (T, 1, R/2)
    pair = -1 if interleave else -2
    a, b = upcast(x).unflatten(-1, (-1, 2) if interleave else (2, -1)).unbind(pair)
    first, second = a * cos - b * sin, a * sin + b * cos
    return torch.stack((first, second), pair).flatten(-2).to(x.dtype)


def rope_table(config, positions, dtype):
    R, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    i = torch.arange(R // 2, dtype=dtype, device=positions.device)
    frequency = theta ** (-2 * i / R)
    if yarn:
        length, factor = yarn["original_max_position_embeddings"], yarn["factor"]
        low = R * math.log(length / (2 * math.pi * 32)) / (2 * math.log(theta))
        high = R * math.log(length / (2 * math.pi * 1)) / (2 * math.log(theta))
        low, high = max(math.floor(low), 0), min(math.ceil(high), R - 1)
        ramp = ((i - low) / (high - low or 0.001)).clamp(0, 1)
        frequency = frequency * (1 - ramp) + frequency / factor * ramp
    angle = positions.to(dtype)[:, None] * frequency
    return angle.cos(), angle.sin()


def attend_expanded(self, q_nope, q_pe, latent, k_pe):
    (B, T, H, N), V = q_nope.shape, self.config.v_head_dim
    kv = self.kv_b_proj(latent)  # (B, T, H*(N+V))
    k, v = kv.view(B, T, H, N + V).split([N, V], -1)
    k_pe = k_pe.expand(B, T, H, -1)
    q, k = torch.cat((q_nope, q_pe), -1), torch.cat((k, k_pe), -1)  # (B, T, H, N+R)
    score = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
    i = torch.arange(T, device=q.device)
    later = i > i[:, None]  # (T, T): key j is after query i
    score = score.masked_fill(later, -math.inf)
    p = score.softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def attend_absorbed(self, q_nope, q_pe, kv, positions):
    (_, _, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W = self.kv_b_proj.weight.view(H, -1, C)
    W_UK, W_UV = W[:, :N], W[:, N:]
    q = torch.einsum("bthn,hnc->bthc", q_nope, W_UK)
    q = torch.cat((q, q_pe), -1)  # (B, T, H, C+R)
    score = torch.einsum("bthc,bsc->bhts", q, kv) * self.scale
    later = torch.arange(S, device=kv.device) > positions[:, None]  # (T, S)
    score = score.masked_fill(later, -math.inf)
    p = score.softmax(-1)
    latent = torch.einsum("bhts,bsc->bthc", p, kv[..., :C])
    return torch.einsum("bthc,hvc->bthv", latent, W_UV)


def gate(self, x):
    config, b = self.config, self.e_score_correction_bias
    E, G, K = config.n_routed_experts, config.n_group, config.num_experts_per_tok
    s = (upcast(x) @ upcast(self.weight).T).sigmoid()
    choice = s.detach() + b
    if G > 1:
        groups = choice.unflatten(-1, (G, E // G))
        score = groups.topk(2).values.sum(-1)
        best = score.topk(config.topk_group).indices  # (B, T, topk_group)
        stays = torch.zeros_like(score).scatter(-1, best, 1.0) > 0  # (B, T, G)
        choice = groups.masked_fill(~stays[..., None], -math.inf).flatten(-2)
    chosen = choice.topk(K).indices
    gain = s.gather(-1, chosen)
    if config.norm_topk_prob:
        gain = gain / gain.sum(-1, keepdim=True)
    gain = gain * config.routed_scaling_factor
    return s, chosen, gain


@torch.no_grad()
def update_bias(self, gamma):
    for gate in self.gates():
        load = gate.load.float()
        mean = load.mean()
        gate.e_score_correction_bias += gamma * (mean - load).sign()
        gate.load.zero_()


def balance_loss(s, K):
    _, T, E = s.shape
    P = (s / s.sum(-1, keepdim=True)).mean(1)  # (B, E)
    best = s.topk(K).indices.flatten(1)  # (B, T*K)
    counts = torch.stack([torch.bincount(ids, minlength=E) for ids in best])
    f = counts.to(P.dtype) * E / (K * T)
    return (f * P).sum(-1).mean()


def experts(self, x, chosen, gain):
    y = torch.zeros_like(x)
    for i in range(len(self.down_proj)):
        token, choice = (chosen == i).nonzero(as_tuple=True)
        rows, g = x[token], gain[token, choice]
        a, b = (rows @ self.gate_up_proj[i].T).chunk(2, -1)
        rows = (F.silu(a) * b) @ self.down_proj[i].T
        y = y.index_add(0, token, g[:, None] * rows)
    return y


def mtp_loss(model, tokens, targets):
    h, losses = model.trunk(tokens), []
    for k in range(1, len(model.mtp) + 1):
        h = model.predict_next(k, h[:, :-1], tokens[:, k:])
        logits, due = model.logits(h), targets[:, k:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), due.flatten(), ignore_index=-1))
    return sum(losses) / len(losses)


def accept(p, q, drafts, u):
    G, rows = drafts.shape[1], torch.arange(len(p))
    p_x = p[:, :G].gather(2, drafts[..., None]).squeeze(2)
    q_x = q.gather(2, drafts[..., None]).squeeze(2)
    stays = u[:, :G] * q_x < p_x
    kept = stays.long().cumprod(1).sum(1)
    p_after = p[rows, kept]
    q_after = F.pad(q, (0, 0, 0, 1))[rows, kept]  # 0 if all stay
    rest = (p_after - q_after).clamp(min=0)
    empty = rest.sum(1, keepdim=True) == 0
    rest = torch.where(empty, p_after, rest)
    return kept, draw(rest[:, None], u[:, G:])


def quantize(x, block, pow2=False):
    (bm, bk), (M, K) = block, x.shape[-2:]
    tiles = F.pad(x.float(), (0, -K % bk, 0, -M % bm))
    tiles = tiles.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bm))  # (..., M/bm, bm, K/bk, bk)
    largest = tiles.abs().amax((-3, -1), keepdim=True)
    s = (largest / 448).clamp(min=2.0**-126)
    s = torch.where(largest == 0, 1.0, s)
    if pow2:
        s = torch.exp2(s.log2().ceil())
    q = (tiles / s).to(torch.float8_e4m3fn)
    q = q.flatten(-4, -3).flatten(-2)[..., :M, :K]
    return q, s.squeeze(-1).squeeze(-2)


def train_step(model, optimizer, tokens, targets, weights, gamma):
    optimizer.zero_grad()
    losses = model(tokens, targets)
    total = sum(weights[name] * loss for name, loss in losses.items())
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.update_bias(gamma)
    return {name: loss.detach() for name, loss in losses.items()}
