"""DeepSeek-V3 in one file: Multi-head Latent Attention, DeepSeekMoE and Multi-Token Prediction.

What the network computes, for tokens t_1 .. t_T (equations are numbered as in the DeepSeek-V3
technical report, arXiv 2412.19437, section 2):

    x   = embedding of t
    in each layer, with h = RMSNorm(x) and, after the first line, u = RMSNorm(x):
        x += W^O attention(queries from one latent of h, keys and values from another)    Eq. 1-11
        x += shared FFN(u) + sum over the K chosen experts of gate value * FFN(u)        Eq. 12-16
    h^0 = RMSNorm(x),  p = softmax(W_head h^0)         predicts the next token
    h_i^k = RMSNorm(block(M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})]))              Eq. 21-22
    p^k = softmax(W_head h^k)                          predicts the token k + 1 later       Eq. 23
    L   = L_main + lambda mean_k L_MTP^k + alpha sum L_Bal       the loss in train.py, Eq. 17, 24-25
    b  += gamma sign(mean load - load)      one b per expert, used only to choose; no gradient

Read it from here to the end of `DeepSeekV3`: configuration, rotary positions, attention, experts,
MTP, cache, model. Two sections follow it, which you need not read: how the rows of the experts are
sorted and multiplied, and what a ModelConfig may hold.

The same code serves training, prompts and decoding. Where a plain formula would be too slow or too
large, the docstring has the formula, and the code is a faster form of it. tests/reference.py has
all formulas as plain loops, and tests compare the two.

The file is meant to be edited, and imports PyTorch alone: a copy works in any project. A few
helpers allow more than V3 needs: layers that cache something else, a head per MTP depth.

Where the report is silent (which norm, epsilon) or the released model differs (order of
concatenation in MTP), the released weights and their code decide; huggingface.py opens them.

Depth 0 is the main model, depth k is MTP module k, and k = 1, 2, ... as in the report. Python's
lists begin at 0, so module k is `mtp[k - 1]`.

Shapes: B batch, T time, D hidden size, H heads, C kv_lora_rank, R rope dim, N nope dim,
V v_head_dim, E routed experts, K experts per token, F expert width (in code, F is
torch.nn.functional), G groups of experts, S cached positions. As a dimension `tokens` is B * T, and
`rows` are token-expert pairs, sorted by expert. Logits are (..., vocabulary).
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Rope = tuple[Tensor, Tensor]  # cos and sin, (T, R/2) each
Routing = tuple[Tensor, Tensor] | None  # scores (B, T, E), chosen experts (B, T, K); None if dense


@dataclass
class ModelConfig:
    """The keys of DeepSeek's config.json that shape the network; defaults: V3, without YaRN."""

    vocab_size: int = 129280  # tokens of the vocabulary: rows of embedding and head
    hidden_size: int = 7168  # D, width of the hidden states
    num_hidden_layers: int = 61  # layers of the main model, without the MTP modules
    num_attention_heads: int = 128  # H, attention heads
    q_lora_rank: int | None = 1536  # width of the query latent; none = one direct projection
    kv_lora_rank: int = 512  # C, width of the joint key-value latent
    qk_nope_head_dim: int = 128  # N, width of the part of a query or key that carries content
    qk_rope_head_dim: int = 64  # R, width of the part that carries position
    v_head_dim: int = 128  # V, width of a value head
    intermediate_size: int = 18432  # width of the dense layers' MLP
    moe_intermediate_size: int = 2048  # F, width of one expert
    first_k_dense_replace: int = 3  # this many first layers have a dense MLP instead of experts
    n_routed_experts: int = 256  # E, routed experts in a layer
    num_experts_per_tok: int = 8  # K, routed experts that a token visits
    n_shared_experts: int = 1  # shared experts, one MLP of this many expert widths
    n_group: int = 8  # G, groups of experts (nodes, in the report)
    topk_group: int = 4  # a token's experts lie in at most this many groups
    norm_topk_prob: bool = True  # the K gate values sum to one before scaling
    routed_scaling_factor: float = 2.5  # multiplies the gate values
    rms_norm_eps: float = 1e-6  # added to the mean square before its root
    max_position_embeddings: int = 163840  # longest window or text, in tokens
    rope_theta: float = 10000.0  # base of the wavelengths of rotary positions
    rope_scaling: dict | None = None  # YaRN parameters, as in DeepSeek's config.json
    rope_interleave: bool = True  # pairs are neighbours (x0, x1), ...; false: (x0, x_{R/2}), ...
    attention_bias: bool = False  # biases of q_a_proj, kv_a_proj_with_mqa and o_proj
    tie_word_embeddings: bool = False  # one matrix for embedding and output head
    num_nextn_predict_layers: int = 1  # MTP modules: how many tokens beyond the next are predicted
    initializer_range: float = 0.006  # standard deviation of every initial matrix

    def __post_init__(self):
        check_config(self)  # at the end of the file


# ---- Precision, projections, norm ----------------------------------------------------------------


def upcast(x: Tensor) -> Tensor:
    """x in the precision of gate, norms, rotation and loss: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(config: ModelConfig, inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A projection as it is initialised in section 4.2: normal with initializer_range; biases 0.
    Nothing is initialised later: a plain nn.Linear or another module keeps PyTorch's values."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=config.initializer_range)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), the mean over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised in float32 and rounded to x's dtype, then multiplied by the weight and cast to
        the dtype of the matrix product that follows."""
        x32 = upcast(x)
        y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return (self.weight * y).to(compute_dtype(x))


# ---- Rotary position embedding (RoPE), with YaRN for long contexts -------------------------------


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, or 1 if factor <= 1: sqrt(t) in section 4.3. YaRN multiplies
    queries and keys by it, and so scores by its square. V3 has this square in `MLA.scale`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_frequencies(config: ModelConfig, frequency: Tensor) -> Tensor:
    """YaRN's frequencies (R/2,) of pairs that had these (arXiv 2309.00071; report, section 4.3).

    Beyond the trained length, slow pairs would reach angles that are new to the model. YaRN divides
    the frequencies of slow pairs by `factor`, keeps those of fast pairs and interpolates linearly
    in between, whatever the length of the text.
    """
    R, yarn = config.qk_rope_head_dim, config.rope_scaling
    original = yarn["original_max_position_embeddings"]

    def index_of(rotations: float) -> float:  # the i that turns `rotations` times in `original`
        turns = math.log(original / (2 * math.pi * rotations))
        return R * turns / (2 * math.log(config.rope_theta))

    low, high = index_of(yarn.get("beta_fast") or 32), index_of(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)  # R - 1 as in V3's code, though i < R/2
    i = torch.arange(R // 2, device=frequency.device, dtype=frequency.dtype)
    slow = ((i - low) / (high - low or 0.001)).clamp(0, 1)  # 0 for fast pairs, 1 for slow
    return frequency * (1 - slow) + frequency / yarn["factor"] * slow


def yarn_amplitude(yarn: dict) -> float:
    """By which YaRN multiplies cos and sin: 1 in V3, where mscale and mscale_all_dim are equal.

    attention_factor, if given; else yarn_mscale(factor, mscale) / yarn_mscale(factor,
    mscale_all_dim), if both are given; else yarn_mscale(factor, 1).
    """
    factor, m, m_all = yarn["factor"], yarn.get("mscale"), yarn.get("mscale_all_dim")
    if yarn.get("attention_factor") is not None:
        return yarn["attention_factor"]
    if m and m_all:
        return yarn_mscale(factor, m) / yarn_mscale(factor, m_all)
    return yarn_mscale(factor, 1.0)


def rope_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin, both (T, R/2), of the angles position * theta^(-2i/R), by which pair i of a
    query's or key's numbers turns. With YaRN, frequencies and amplitude are YaRN's."""
    R, amplitude = config.qk_rope_head_dim, 1.0
    i = torch.arange(R // 2, device=positions.device, dtype=dtype)
    frequency = config.rope_theta ** (-2 * i / R)
    if config.rope_scaling:
        frequency = yarn_frequencies(config, frequency)
        amplitude = yarn_amplitude(config.rope_scaling)
    angle = positions.to(dtype)[:, None] * frequency  # (T, R/2)
    return amplitude * angle.cos(), amplitude * angle.sin()


def rotate(x: Tensor, rope: Rope, interleave: bool) -> Tensor:
    """RoPE: every pair of x (B, T, H, R) rotated by its position's angle, so that a query at t and
    a key at s have the product q . R_t^T R_s k = q . R_{s-t} k. A pair is two neighbours, or,
    without interleave, a number of the first half and its counterpart in the second."""
    cos, sin = (table[:, None] for table in rope)  # (T, 1, R/2)
    pair = -1 if interleave else -2  # a pair is along this dimension of (R/2, 2) or (2, R/2)
    a, b = upcast(x).unflatten(-1, (-1, 2) if interleave else (2, -1)).unbind(pair)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), pair).flatten(-2).to(x.dtype)


# ---- Multi-head Latent Attention (section 2.1.1) -------------------------------------------------


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None
) -> Tensor:
    """Causal attention, softmax(scale q k^T) v, Eq. 10: (B, H, T, V).

    The queries q (B, H, T, W) belong to `positions` (T,), by default 0 .. T - 1, the keys k (B, h,
    S, W) and values v (B, h, S, V) to 0 .. S - 1. A query attends to all positions up to its own. h
    is H, or less if several heads share a key. There are two forms, PyTorch's kernel and plain
    products. Both accumulate in float32 at least; plain products round scores and probabilities to
    q's dtype, as V3's own code does.
    """
    (B, H, T, W), (h, S), V = q.shape, k.shape[1:3], v.shape[-1]
    # On a CPU, plain products in bfloat16 are three times as fast for short texts.
    short_on_cpu = T <= 512 and q.dtype == torch.bfloat16 and not q.is_cuda
    if positions is None and not short_on_cpu:
        # PyTorch's kernel, which never holds all scores. It wants q, k and v of one width.
        if V < W:
            v = F.pad(v, (0, W - V))
        if W < V:
            q, k = F.pad(q, (0, V - W)), F.pad(k, (0, V - W))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=h != H)
        return o[..., :V]
    # Plain products, also for the few queries of decoding. The H/h heads that share a key become
    # queries of one head.
    key = torch.arange(S, device=q.device)
    query = key if positions is None else positions
    later = key > query[:, None]  # (T, S), True where a key is ahead
    mask = torch.where(later, -math.inf, 0.0).to(q.dtype).repeat(H // h, 1)  # (H/h*T, S)
    q, k, v = q.reshape(B * h, -1, W), k.flatten(0, 1), v.flatten(0, 1)  # (B*h, H/h*T, W) ...
    p = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)  # (B*h, H/h*T, S)
    return (p @ v).view(B, H, T, V)


class MLA(nn.Module):
    """Multi-head Latent Attention, Eq. 1-11.

    c_t^Q  = W^DQ h_t        q_t^C = W^UQ c_t^Q     q_t^R = RoPE(W^QR c_t^Q)         Eq. 6-9
    c_t^KV = W^DKV h_t       k_t^C = W^UK c_t^KV    k_t^R = RoPE(W^KR h_t)           Eq. 1-4
                             v_t^C = W^UV c_t^KV                                     Eq. 5
    o_t,i  = sum_j softmax_j(q_t,i . k_j,i / sqrt(N + R)) v_j,i                      Eq. 10
    output = W^O [o_t,1; ...; o_t,H]                                                 Eq. 11
    h_t is the layer's normalised input. Both latents are normalised before they are projected up
    (section 4.2). The report calls the output u_t; here u is what the experts get, the norm of the
    output and the residual together.

    Why latents: decoding keeps c_t^KV and k_t^R of every token, in V3 512 + 64 = 576 numbers per
    layer; k_t^C and v_t^C of 128 heads would be 128 * (128 + 128) = 32,768. The queries' latent
    saves memory in training.
    Why position has a key of its own: part 5 of docs/TOUR.md (DeepSeek-V2, arXiv 2405.04434,
    section 2.1.3).
    Why two forms, in multiplications for one head of V3: `attend_expanded` spends C (N + V) =
    131,072 on the key and value of a token, then N + R + V = 320 on each pair of query and key.
    `attend_absorbed` spends 131,072 on a query, then C + R + C = 1,088 on each pair. A prompt has
    as many queries as keys, so the 131,072 cancel and 320 wins. In decoding few queries meet many
    keys, so it is cheaper to spend 131,072 on each query than on each key.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        bias = config.attention_bias
        # The released names: `lora` is for low rank, `a` projects down to the latent, `b` up from
        # it; `nope` has no positional encoding, `pe` has one; `with_mqa` says that this projection
        # also makes the key that all heads share, as in multi-query attention.
        if config.q_lora_rank is None:
            self.q_proj = linear(config, D, H * (N + R))
        else:
            self.q_a_proj = linear(config, D, config.q_lora_rank, bias)  # W^DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # eps as in V3's code
            self.q_b_proj = linear(config, config.q_lora_rank, H * (N + R))  # W^UQ, W^QR
        self.kv_a_proj_with_mqa = linear(config, D, C + R, bias)  # W^DKV, W^KR
        self.kv_a_layernorm = RMSNorm(C, 1e-6)
        # Per head W^UK and W^UV. Decoding reads the weight itself, so a bias or a forward hook
        # here would have no effect there.
        self.kv_b_proj = linear(config, C, H * (N + V))
        self.o_proj = linear(config, H * V, D, bias)

    @property
    def scale(self) -> float:
        """1 / sqrt(N + R) of Eq. 10, times yarn_mscale(factor, mscale_all_dim)^2 (1 without YaRN).
        As in V3's code, it scales the whole score, although the report applies YaRN to k_t^R alone
        (section 4.3)."""
        config, yarn = self.config, self.config.rope_scaling or {}
        mscale = yarn_mscale(yarn.get("factor", 1), yarn.get("mscale_all_dim") or 0)
        return (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * mscale**2

    def new_cache(self, batch: int, size: int, like: Tensor) -> Tensor:
        """c_t^KV and k_t^R are kept, C + R numbers per token, and nothing else of the text."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return like.new_zeros(batch, size, width)

    def forward(self, h: Tensor, rope: Rope, past: "Past | None" = None) -> Tensor:
        """h (B, T, D) -> (B, T, D). past: this layer's cache, and the positions of h in it."""
        config, (B, T, _) = self.config, h.shape
        N, R, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        if config.q_lora_rank is None:
            q = self.q_proj(h)  # (B, T, H*(N+R))
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h)))  # (B, T, H*(N+R))
        q_nope, q_pe = q.view(B, T, -1, N + R).split([N, R], dim=-1)  # (B, T, H, N), (B, T, H, R)
        latent, k_pe = self.kv_a_proj_with_mqa(h).split([C, R], dim=-1)  # (B, T, C), (B, T, R)
        latent = self.kv_a_layernorm(latent)
        q_pe = rotate(q_pe, rope, config.rope_interleave)
        k_pe = rotate(k_pe.unsqueeze(2), rope, config.rope_interleave)  # (B, T, 1, R)
        if past is not None:  # a prompt, too, fills the cache, with (B, T, C+R)
            past.kept[:, past.positions] = torch.cat((latent, k_pe.squeeze(2)), -1).to(past.kept)
        if past is None or past.end == T:  # training, or a prompt: there are no earlier tokens
            o = self.attend_expanded(q_nope, q_pe, latent, k_pe)
        else:
            o = self.attend_absorbed(q_nope, q_pe, past.kept[:, : past.end], past.positions)
        return self.o_proj(o.flatten(2))

    def attend_expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor) -> Tensor:
        """Training and prompts: keys and values from the latents, then usual causal attention."""
        (B, T, H, N), V = q_nope.shape, self.config.v_head_dim
        k_nope, v = self.kv_b_proj(latent).view(B, T, H, N + V).split([N, V], dim=-1)
        q = torch.cat((q_nope, q_pe), -1)  # (B, T, H, N+R)
        k = torch.cat((k_nope, k_pe.expand(-1, -1, H, -1)), -1)  # (B, T, H, N+R)
        o = causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), self.scale)
        return o.transpose(1, 2)  # (B, T, H, V)

    def attend_absorbed(
        self, q_nope: Tensor, q_pe: Tensor, kv: Tensor, positions: Tensor
    ) -> Tensor:
        """Decoding: W^UK moves over to the query and W^UV to the output, so that attention runs on
        the cached latents kv (B, S, C+R), one key and one value for all heads:
        q . (W^UK c) = (W^UK^T q) . c and sum p (W^UV c) = W^UV (sum p c)."""
        H, N, C = *q_nope.shape[2:], self.config.kv_lora_rank
        W = self.kv_b_proj.weight.view(H, -1, C)
        W_UK, W_UV = W[:, :N], W[:, N:]  # (H, N, C), (H, V, C)
        q_c = torch.einsum("bthn,hnc->bthc", q_nope, W_UK)  # (B, T, H, C)
        q = torch.cat((q_c, q_pe), -1).transpose(1, 2)  # (B, H, T, C+R)
        k, v = kv[:, None], kv[:, None, :, :C]  # (B, 1, S, C+R), (B, 1, S, C)
        o = causal_attention(q, k, v, self.scale, positions)  # (B, H, T, C)
        return torch.einsum("bhtc,hvc->bthv", o, W_UV)  # (B, T, H, V)


# ---- DeepSeekMoE (section 2.1.2) -----------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each (..., F)."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x), SwiGLU (arXiv 2002.05202): the first factor decides how
    much of each number of the second passes. The FFN of the dense layers and the shared experts."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.gate_proj = linear(config, config.hidden_size, width)
        self.up_proj = linear(config, config.hidden_size, width)
        self.down_proj = linear(config, width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Gate(nn.Module):
    """Which K experts a token visits and how much each counts, Eq. 13-16.

    s_i = sigmoid(u . e_i). Unlike the scores of a softmax, these do not compete, and their size
    does not depend on E. They were found better (arXiv 2408.15664, section 4.1).
    Experts are chosen by s_i + b_i, where the bias b balances their loads. First the node limit: a
    group's score is the sum of its two largest s + b, and only the best topk_group groups stay.
    (Two as in the released code. The report adds up the K / topk_group largest, two in V3.) Among
    the experts of these groups, those with the K largest s + b are chosen.
    The bias has no other effect: gate values come from s alone. No gradient reaches b;
    `DeepSeekV3.update_bias` moves it.
    Why routed_scaling_factor: gate values that sum to one make the output a weighted mean of K
    experts. If their outputs are unrelated, it is about 1/sqrt(K) as large as the output of one. A
    factor of about sqrt(K) undoes this; Moonlight (arXiv 2502.16982) derives its factor this
    way. V3's 2.5 is a little less than sqrt(8) = 2.83.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        E, D = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, D))  # e_i
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.register_buffer("e_score_correction_bias", torch.zeros(E, dtype=torch.float32))  # b
        # How often each expert was chosen in training since the last update of b.
        self.register_buffer("load", torch.zeros(E, dtype=torch.long), persistent=False)

    def _apply(self, fn, recurse=True):
        """`model.bfloat16()` and `model.to(...)` call this method, and no other, on every module.
        It keeps the bias in float32: bfloat16 would round steps of gamma = 0.001 away."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        now = self.e_score_correction_bias
        if now.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(now.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> scores s (B, T, E), chosen experts (B, T, K), their gate values."""
        config, G = self.config, self.config.n_group
        with torch.autocast(x.device.type, enabled=False):  # in float32
            s = F.linear(upcast(x), upcast(self.weight)).sigmoid()  # (B, T, E), Eq. 15
        choice = s.detach() + self.e_score_correction_bias  # (B, T, E)
        if G > 1:
            groups = choice.unflatten(-1, (G, -1))  # (B, T, G, E/G)
            best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices  # which groups
            allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            choice = groups.masked_fill(~allowed.unsqueeze(-1), -math.inf).flatten(-2)
        chosen = choice.topk(config.num_experts_per_tok, sorted=False).indices  # Eq. 14, 16
        gain = s.gather(-1, chosen)  # (B, T, K)
        if config.norm_topk_prob:
            gain = gain / (gain.sum(-1, keepdim=True) + 1e-20)  # Eq. 13
        return s, chosen, gain * config.routed_scaling_factor


def gates_in(module: nn.Module) -> list[Gate]:
    """The gates among its parts, in order (subclasses of Gate, too)."""
    return [part for part in module.modules() if isinstance(part, Gate)]


def balance_loss(s: Tensor, K: int) -> Tensor:
    """The complementary sequence-wise balance loss, Eq. 17-20, without its weight alpha.

    s (B, T, E) are the gate's scores. The loss is 1 if the K best scores spread evenly over the
    experts. Its gradient does not help to predict the text, and costs quality if alpha is large
    (arXiv 2408.15664). So alpha is tiny: it only prevents extreme loads within a sequence, and the
    bias does the balancing.
    """
    B, T, E = s.shape
    P = (s / (s.sum(-1, keepdim=True) + 1e-20)).mean(1)  # (B, E), Eq. 19-20
    best = s.detach().topk(K).indices.flatten(1)  # (B, T*K), by s without the bias
    # (B, E), Eq. 18: every expert's share of the choices, times E.
    f = P.new_zeros(B, E).scatter_add_(1, best, torch.ones_like(best, dtype=P.dtype)) * E / (K * T)
    return (f * P).sum(-1).mean()


class Experts(nn.Module):
    """The routed experts' FFNs, stacked in one parameter per projection.

    y = sum_{i in top K} g_i W_down,i (silu(W_gate,i x) * W_up,i x), Eq. 12. As a plain loop:

        for t in range(tokens):
            for i, g in zip(chosen[t], gain[t]):
                gate, up = (gate_up_proj[i] @ x[t]).chunk(2)
                y[t] += down_proj[i] @ (swiglu(gate, up) * g)

    (W_down is linear, so g may multiply its input, which is narrower than its output: F numbers in
    place of D.) `forward` has the same sum by expert, whose tokens are multiplied in one product.
    No token is dropped.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        # W_gate and W_up of each expert as one matrix, W_gate first.
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        for stack in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(stack, std=config.initializer_range)
        # The product for all experts at once, and the number of which each expert's rows are a
        # multiple (None: row_unit). fp8.py replaces both.
        self.product, self.unit = grouped_linear, None

    def forward(self, x: Tensor, chosen: Tensor, gain: Tensor) -> Tensor:
        """x (tokens, D), chosen experts, their gate values (tokens, K) -> (tokens, D)."""
        x, E = x.to(compute_dtype(x)), len(self.down_proj)
        gain = gain.to(x.dtype)
        if self.product is grouped_linear and reads_by_row(chosen, E):
            return self.by_row(x, chosen, gain)
        token, place, gain, counts = sorted_by_expert(chosen, gain, E, self.unit or row_unit(x))
        rows = Dispatch.apply(x, token, place)  # (rows, D)
        gate, up = self.product(rows, self.gate_up_proj, counts).chunk(2, -1)
        y = self.product(swiglu(gate, up) * gain, self.down_proj, counts)  # (rows, D)
        return Combine.apply(y, token, place)

    def by_row(self, x: Tensor, expert: Tensor, gain: Tensor) -> Tensor:
        """The same for the few tokens of decoding: each row reads its expert's weights."""
        tokens, K = expert.shape
        x, expert = x.repeat_interleave(K, 0), expert.flatten()  # (tokens * K, D)
        gate, up = linear_by_row(x, self.gate_up_proj, expert).chunk(2, -1)
        y = linear_by_row(swiglu(gate, up) * gain.view(-1, 1), self.down_proj, expert)
        return y.view(tokens, K, -1).sum(1)


class MoE(nn.Module):
    """h' = sum_{i in top K} g_i FFN_i(u) + FFN_shared(u), Eq. 12 (Block adds the residual).

    Why experts: many parameters for few FLOPs. A token of V3 uses 37 of 671 billion parameters, and
    costs what a dense network of 37 billion costs. Why many small ones: K of E can be combined in
    more ways (arXiv 2401.06066, section 3.1). Why a shared one: it learns what every token needs,
    so that the routed experts need not repeat it and can specialise (section 3.2 there).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config, width) if width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D), and the routing, which DeepSeekV3 records."""
        s, chosen, gain = self.gate(x)
        y = self.experts(*(z.flatten(0, 1) for z in (x, chosen, gain))).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, (s, chosen)


class Block(nn.Module):
    """x + MLA(norm(x)), then x + FFN(norm(x)): a dense MLP in the first layers, else MoE.

    Why dense: the loads of the first layer's experts were especially slow to become even (arXiv
    2401.06066, section 5.1.2).
    """

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(config, config.intermediate_size) if dense else MoE(config)

    def new_cache(self, batch: int, size: int, like: Tensor) -> Tensor:
        return self.self_attn.new_cache(batch, size, like)

    def forward(self, x: Tensor, rope: Rope, past: "Past | None" = None) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> (B, T, D), and the routing of its MoE."""
        x = x + self.self_attn(self.input_layernorm(x), rope, past)
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if isinstance(y, tuple) else (y, None)  # a dense MLP returns y alone
        return x + y, routing


# ---- Multi-Token Prediction (section 2.2) --------------------------------------------------------


class MTP(nn.Module):
    """Depth k predicts one token further than depth k - 1, Eq. 21-22.

    h'_i^k = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})],  h^k = RMSNorm(TRM_k(h'^k))
    The report writes the hidden state first and no norm after TRM_k; the released weights have the
    embedding first, and h^0 is the main model's hidden state after its final norm.

    In decoding the module drafts tokens (sample.py). In training it may help the model: a position
    learns from more than one token, and its state may plan ahead (section 2.2). In arXiv
    2404.19737, which has heads in place of modules, large models improved and small ones got worse.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(D, eps)
        self.hnorm = RMSNorm(D, eps)
        self.eh_proj = linear(config, 2 * D, D)  # M_k
        self.block = Block(config, dense=False)  # TRM_k
        self.norm = RMSNorm(D, eps)  # before the shared output head

    def new_cache(self, batch: int, size: int, like: Tensor) -> Tensor:
        return self.block.new_cache(batch, size, like)

    def forward(
        self, h: Tensor, embedding: Tensor, rope: Rope, past: "Past | None" = None
    ) -> tuple[Tensor, Routing]:
        """h = h^{k-1} (B, T, D), embedding of the tokens k later (B, T, D) -> h^k (B, T, D), and
        the routing of the block."""
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h)), -1))  # h', (B, T, D)
        x, routing = self.block(x, rope, past)
        return self.norm(x), routing


# ---- The cache of decoding -----------------------------------------------------------------------

MAX_ROUND_TOKENS = 8  # of one text, that decoding reads, or takes back as rejected, at once
MAX_COMPILED_TOKENS = 512  # tokens of all texts together that compiled decoding reads at once


class Past(NamedTuple):
    """What a layer gets in decoding: its cache, and where the new tokens go."""

    kept: Tensor  # made by the layer's `new_cache`
    positions: Tensor  # (T,) of the new tokens
    end: int  # the rows of `kept` that may be in use; those after a query's position are masked


class Cache:
    """What decoding keeps of B texts: kept[i] is the cache of layer i, made by its `new_cache`.

    There is room for `size` tokens of each text, of which the first `length` have been read. To
    forget rejected drafts (sample.py), decoding lowers `length`, by MAX_ROUND_TOKENS at most: MLA
    writes over the forgotten tokens. An edited layer must allow this, too (check.py checks it).

    A round of decoding may be compiled, once for all positions (support/graphs.py). So positions
    are tensors, and no shape may depend on them or on the choice of experts. In compiled code
    `length` is a tensor, too, and layers read all `size` rows.
    """

    def __init__(
        self, config: ModelConfig, layers: nn.ModuleList, batch: int, size: int, like: Tensor
    ):
        """layers: a model's `layers`, or its `mtp`; like: a tensor of the dtype and device."""
        self.kept = [layer.new_cache(batch, size, like) for layer in layers]
        self.size, self.length = size, 0
        positions = torch.arange(size, device=like.device)  # all, so cos and sin are computed once
        self.rope = rope_table(config, positions, torch.promote_types(like.dtype, torch.float32))

    def advance(self, T: int) -> tuple[Tensor, int]:
        """Reserves places for T new tokens: their positions (T,), and the end of the rows in use.
        Raises ValueError if the cache is full."""
        start = self.length
        end = start + T if isinstance(start, int) else self.size
        if end > self.size:
            raise ValueError(f"{start} + {T} tokens exceed the cache of {self.size}.")
        self.length = start + T
        return start + torch.arange(T, device=self.rope[0].device), end


def every_position(x: Tensor) -> tuple[Tensor, int]:
    """What `advance` would return for a whole text x (B, T, D)."""
    return torch.arange(x.shape[1], device=x.device), x.shape[1]


# ---- The model -----------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets of -log softmax(logits)[target], in nats and in float32: logits
    (tokens, vocabulary), targets (tokens,). Targets below 0 are ignored; if all are, it is 0."""
    total = F.cross_entropy(upcast(logits), targets.clamp(min=-1), ignore_index=-1, reduction="sum")
    return total / (targets >= 0).sum().clamp(min=1)


class DeepSeekV3(nn.Module):
    """The whole network. It computes in the dtype of its parameters unless autocast is on.

    After a call, `chosen` lists what each MoE layer chose, (B, T, K) in the main model, then (B,
    T-k, K) in MTP module k, if modules were called. (Decoding leaves it as it is.) After a call
    with targets, `mtp_losses` lists the loss of each MTP depth. In training mode every gate's
    `load` adds up how often each expert was chosen, until `update_bias` uses that.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trained_length = 0  # tokens of the longest window trained on; train.py sets it
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.initializer_range)
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.first_k_dense_replace)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = linear(config, config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Of each MoE layer that has run in this call: its gate, scores and chosen experts.
        self.routed: list[tuple[Gate, Tensor, Tensor]] = []
        self.chosen: list[Tensor] = []
        self.mtp_losses: list[Tensor] = []
        self.recompute = False  # activation checkpointing: drop activations, compute them again

    # An attribute, so that support/processes.py can put a compiled one in its place.
    cross_entropy = staticmethod(cross_entropy)

    def run_block(self, block: nn.Module, *inputs) -> Tensor:
        """Calls block(*inputs), a Block or MTP module, whose last input is its Past or None, and
        records its routing, except in decoding. The gate does not record it, because `recompute`
        runs a block twice."""
        if self.recompute and torch.is_grad_enabled():
            x, routing = checkpoint(block, *inputs, use_reentrant=False)
        else:
            x, routing = block(*inputs)
        if routing is not None and inputs[-1] is None:
            self.routed.append((gates_in(block)[0], *routing))
        return x

    def rope(self, x: Tensor, positions: Tensor, cache: Cache | None = None) -> Rope:
        """The rotary table of x's positions (T,); from the cache, if any."""
        if cache:
            return tuple(table[positions] for table in cache.rope)
        return rope_table(self.config, positions, torch.promote_types(x.dtype, torch.float32))

    def trunk(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) -> h^0, the hidden states after the final norm (B, T, D).

        With a cache the tokens continue the B texts in it.
        """
        self.routed = []
        x = self.embed_tokens(tokens)  # (B, T, D)
        positions, end = cache.advance(tokens.shape[1]) if cache else every_position(x)
        rope = self.rope(x, positions, cache)
        for i, block in enumerate(self.layers):
            past = Past(cache.kept[i], positions, end) if cache else None
            x = self.run_block(block, x, rope, past)
        return self.norm(x)

    def predict_next(self, k: int, h: Tensor, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """MTP module k: h = h^{k-1} (B, T, D) and the tokens k later (B, T) -> h^k (B, T, D).

        All MTP modules have one cache: a kept[k - 1] each, but a single `length`, which every call
        advances. So before each call the caller sets `length` to where this module goes on
        (sample.py).
        """
        embedding = self.embed_tokens(tokens)  # (B, T, D)
        positions, end = cache.advance(tokens.shape[1]) if cache else every_position(h)
        past = Past(cache.kept[k - 1], positions, end) if cache else None
        rope = self.rope(h, positions, cache)
        return self.run_block(self.mtp[k - 1], h, embedding, rope, past)

    def logits(self, h: Tensor, k: int = 0) -> Tensor:
        """h^k (B, T, D) of depth k -> its logits (B, T, vocabulary), Eq. 23, in the dtype of h. All
        depths share the head; k is for edits. Losses and drafts both call this."""
        return self.lm_head(h)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, return_mtp: bool = False):
        """tokens (B, T) int64 -> logits (B, T, vocabulary), float32 (float64 in a float64 model).

        return_mtp: also a list with the logits of each depth k = 1, 2, ..., (B, T-k, vocabulary).
        Their row i predicts token i + 1 + k.
        targets (B, T): the next tokens, a number below 0 where there is none. With them it returns
        the losses by name in place of logits. train.py weights, sums and logs them.
        """
        hidden = [self.trunk(tokens)]  # h^0; then h^1, h^2, ...
        if targets is not None or return_mtp:
            for k in range(1, min(len(self.mtp), tokens.shape[1] - 1) + 1):
                hidden.append(self.predict_next(k, hidden[-1][:, :-1], tokens[:, k:]))
        routed, self.routed = self.routed, []  # else its scores would keep the activations alive
        self.chosen = [chosen for _, _, chosen in routed]
        if self.training:
            for gate, _, chosen in routed:
                gate.load += count_chosen(chosen, len(gate.load))
        if targets is None:
            logits = [upcast(self.logits(h, k)) for k, h in enumerate(hidden)]
            return (logits[0], logits[1:]) if return_mtp else logits[0]
        main, *mtp = (
            self.cross_entropy(self.logits(h, k).flatten(0, 1), targets[:, k:].flatten())
            for k, h in enumerate(hidden)
        )
        self.mtp_losses = [loss.detach() for loss in mtp]
        balance = [balance_loss(s, self.config.num_experts_per_tok) for _, s, _ in routed]
        zero = main.new_zeros(())
        return {
            "loss": main,  # cross-entropy of the next token, in nats
            "mtp_loss": sum(mtp, zero) / max(1, len(mtp)),  # mean over depths, Eq. 24-25, in nats
            "balance_loss": sum(balance, zero),  # sum over the MoE layers, Eq. 17
        }

    def gates(self) -> list[Gate]:
        """The gates of the MoE layers in order, those of the MTP modules last."""
        return gates_in(self)

    @torch.no_grad()
    def update_bias(self, gamma: float | Tensor):
        """b_i += gamma * sign(mean load - load of i), from the loads since the last call: the
        balancing without an auxiliary loss (section 2.1.2; arXiv 2408.15664, Algorithm 1). No
        gradient competes with that of the text; only the choice of experts changes."""
        for gate in self.gates():
            load = gate.load.float()
            gate.e_score_correction_bias += gamma * (load.mean() - load).sign()
            gate.load.zero_()


# ---- The rows of the experts: sorted, padded, multiplied -----------------------------------------


def count_chosen(chosen: Tensor, E: int) -> Tensor:
    """How often each of the E experts is among the chosen (any shape): (E,) int64."""
    ids = chosen.flatten()
    return ids.new_zeros(E).scatter_add_(0, ids, torch.ones_like(ids))


def sorted_by_expert(expert: Tensor, gain: Tensor, E: int, unit: int) -> tuple[Tensor, ...]:
    """Sorts the token-expert pairs, so that the tokens of an expert are rows side by side, in a
    multiple of `unit` rows. expert, gain (tokens, K) -> the token of each row (rows,), where
    padding has the number `tokens`; the rows of each token (tokens, K); the gate value of each row
    (rows, 1); the number of rows of each expert (E,)."""
    tokens, K = expert.shape
    expert, gain = expert.flatten(), gain.flatten()  # (pairs,): pair i belongs to token i // K
    counts = count_chosen(expert, E)
    if unit > 1:
        expert, gain, counts = padded(expert, gain, counts, unit)
    order = expert.argsort(stable=True)  # (rows,)
    place = torch.empty_like(order)  # the inverse of order
    place[order] = torch.arange(len(order), device=order.device)
    token = order.clamp(max=tokens * K) // K
    gain = gain.index_select(0, order)[:, None]
    return token, place[: tokens * K].view(tokens, K), gain, counts


def reads_by_row(expert: Tensor, E: int) -> bool:
    """Whether each row should read its expert's weights, as in decoding. Eager code does so for a
    few tokens on a CPU; on a GPU, linear_by_row would wait for the ids. Compiled code does so on
    every device: grouped_linear may cut the rows into pieces whose sizes depend on the choice of
    experts, and no shape in compiled code may."""
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return len(expert) <= MAX_COMPILED_TOKENS
    return 0 < expert.numel() <= E and expert.device.type == "cpu"


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x_e W_e^T for every expert e, in one call where PyTorch has one: x (rows, in), first the
    counts[0] rows of expert 0, then those of expert 1, ...; weight (E, out, in) -> (rows, out)."""
    weight = weight.to(x.dtype)
    # F.grouped_mm wants rows of a multiple of 16 bytes. It takes bfloat16 everywhere, and float32
    # on a CPU in eager code.
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    float32_too = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if aligned and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and float32_too)):
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    return torch.cat([x_e @ W.T for x_e, W in zip(x.split(counts.tolist()), weight, strict=True)])


def linear_by_row(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """W_{expert[i]} x_i for every row i: x (rows, in), weight (E, out, in), expert (rows,) ->
    (rows, out). Compiled code, which cannot know the choice of experts, indexes `weight` where
    eager code loops; the compiler fuses the index with the sum, so that no weight is copied."""
    if torch.compiler.is_compiling():
        return (weight[expert] * x[:, None]).sum(-1)
    pairs = zip(expert.tolist(), x, strict=True)
    return torch.stack([(weight[i] * row).sum(-1) for i, row in pairs])


class Dispatch(torch.autograd.Function):
    """Copies every token to its K rows: x (tokens, D) -> (rows, D), for `token` and `place` of
    `sorted_by_expert`. Rows of padding hold zeros.

    Its gradient is Combine, and the gradient of Combine is Dispatch. So both passes gather and
    never scatter, and a token's K rows are added in float32 and rounded once. The usual gradient of
    `x[token]` would add on a GPU in an order that changes from run to run, and round each time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        if len(token) > place.numel():  # some rows are padding: they copy a token of zeros
            x = F.pad(x, (0, 0, 0, 1))
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return Combine.apply(dy, *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """Adds up the K rows of every token: y (rows, D) -> (tokens, D)."""

    @staticmethod
    def forward(ctx, y: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token, place)
        return F.embedding_bag(place, y, mode="sum")  # y[place].sum(1), in float32

    @staticmethod
    def backward(ctx, dy: Tensor):
        return Dispatch.apply(dy, *ctx.saved_tensors), None, None


def row_unit(x: Tensor) -> int:
    """The number of which each expert's rows should be a multiple, for products of x (tokens, D).
    In bfloat16 on a CPU they run in oneDNN, which compiles a kernel for every new number of rows.
    Padding adds rows, so it is worth it only above MAX_ROUND_TOKENS tokens."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or len(x) <= MAX_ROUND_TOKENS:
        return 1
    return 64 if len(x) > 512 else 16  # fewer kernels, or less padding


def padded(
    expert: Tensor, gain: Tensor, counts: Tensor, unit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Appends token-expert pairs with gate value 0, so that each expert's number of rows is a
    multiple of `unit`. expert, gain (pairs,), counts (E,) -> the same, with the padding. How many
    pairs there are then depends on `pairs` alone, so the host need not know the counts. What the
    other experts do not need is added to the last one."""
    (pairs,), E = expert.shape, len(counts)
    total = -(-(pairs + E * (unit - 1)) // unit) * unit  # enough for any counts
    rows = -(-counts // unit) * unit  # (E,)
    rows[-1] += total - rows.sum()
    ids = torch.arange(E, device=expert.device)
    padding = ids.repeat_interleave(rows - counts, output_size=total - pairs)
    return torch.cat((expert, padding)), F.pad(gain, (0, total - pairs)), rows


# ---- What a ModelConfig may hold -----------------------------------------------------------------

MAY_BE_ZERO = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"}
YARN_KEYS = (
    "type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate",
)  # fmt: skip


class ConfigError(ValueError):
    """No network can have these values; the message names the one that is wrong."""


def require(holds: bool, sentence: str):
    if not holds:
        raise ConfigError(sentence)


def check_ranges(config, at_least_one: set[str]):
    """Raises ConfigError if a number of this dataclass is below 0 or, in one of these fields, below
    1. A field with a lower default, such as your own, may be as low as its default."""
    for field in fields(config):
        x, least = getattr(config, field.name), int(field.name in at_least_one)
        if isinstance(field.default, int | float):
            least = min(least, field.default)
        if isinstance(x, int | float):  # nan is refused, too
            require(x >= least, f"{field.name} is {x}, but must be at least {least}.")


def check_config(config: ModelConfig):
    """Raises ConfigError, with one sentence, unless a network can have these values."""
    sizes = {field.name for field in fields(config) if field.type in (int, int | None)}
    check_ranges(config, at_least_one=sizes - MAY_BE_ZERO)
    E, K, R = config.n_routed_experts, config.num_experts_per_tok, config.qk_rope_head_dim
    G, allowed, theta = config.n_group, config.topk_group, config.rope_theta
    require(R % 2 == 0, f"qk_rope_head_dim is {R}, but RoPE rotates pairs: make it even.")
    require(theta > 1, f"rope_theta is {theta}, but must be above 1.")
    require(E % G == 0, f"n_routed_experts {E} is not a multiple of n_group {G}.")
    require(G == 1 or E > G, f"n_group {G} leaves one expert per group, but a score needs two.")
    require(allowed <= G, f"topk_group {allowed} is larger than n_group {G}.")
    within = E // G * allowed  # the experts among which a token chooses
    require(within >= K, f"num_experts_per_tok {K} exceeds {allowed} groups' {within} experts.")
    yarn = config.rope_scaling or {}
    require(isinstance(yarn, dict), f"rope_scaling is {yarn!r}, but must be a dict or None.")
    kind = yarn.get("rope_type") or yarn.get("type") or "default"
    require(kind in ("default", "yarn"), f"rope_scaling has type {kind!r}: choose 'yarn'.")
    for key, x in yarn.items():
        require(key in YARN_KEYS, f"rope_scaling has {key!r}, but may have only {YARN_KEYS}.")
        fits = x is None or key in YARN_KEYS[:2] or (isinstance(x, int | float) and x >= 0)
        require(fits, f"rope_scaling has {x!r} for {key!r}, expected a number of at least 0.")
    config.rope_scaling = None
    if kind == "yarn":
        require(yarn.get("factor"), "rope_scaling lacks the yarn 'factor', above 0.")
        # A default for YaRN's original length is stored at once: max_position_embeddings may
        # change later (when a run is resumed or exported), and YaRN's angles must not.
        original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings
        config.rope_scaling = yarn | {"original_max_position_embeddings": original}
