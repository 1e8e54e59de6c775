"""DeepSeek-V3 in one file: Multi-head Latent Attention, DeepSeekMoE and Multi-Token Prediction.

Read it top to bottom; the classes come in the order of section 2 of the DeepSeek-V3 technical
report (arXiv 2412.19437), whose equation numbers and symbols stand beside the formulas. Where the
report is silent (order of concatenation, which norm, epsilon), the released weights decide:
`from_pretrained` opens them and gives their logits.

Shapes: B batch, T time, D hidden, H heads, C kv_lora_rank, R rope dim, N nope dim, V v_head_dim,
E routed experts, K experts per token, F expert width, G expert groups, S cached positions,
L layers. In `logits` V is the vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8

_MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
_YARN_KEYS = (
    *("type", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
)


@dataclass
class ModelConfig:
    """The keys of DeepSeek's config.json that shape the network; the defaults are DeepSeek-V3's."""

    vocab_size: int = 129280
    hidden_size: int = 7168  # D
    num_hidden_layers: int = 61  # without the MTP modules
    num_attention_heads: int = 128  # H
    q_lora_rank: int | None = 1536  # width of the query latent; none = one direct projection
    kv_lora_rank: int = 512  # C, width of the joint key-value latent
    qk_nope_head_dim: int = 128  # N, the part of a query or key head that carries content
    qk_rope_head_dim: int = 64  # R, the part that carries position
    v_head_dim: int = 128  # V
    intermediate_size: int = 18432  # width of the dense layers' MLP
    moe_intermediate_size: int = 2048  # F, width of one expert
    first_k_dense_replace: int = 3  # this many first layers have a dense MLP instead of experts
    n_routed_experts: int = 256  # E
    num_experts_per_tok: int = 8  # K
    n_shared_experts: int = 1  # stored as one MLP of this many expert widths
    n_group: int = 8  # G, groups of experts (nodes, in the report)
    topk_group: int = 4  # a token's experts lie in at most this many groups
    norm_topk_prob: bool = True  # the K gate values sum to one before scaling
    routed_scaling_factor: float = 2.5  # multiplies the gate values
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163840  # context limit of sampling; no effect on the network
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # YaRN parameters, as in DeepSeek's config.json
    rope_interleave: bool = True  # pairs are neighbours (x0, x1), ...; false: (x0, x_{R/2}), ...
    attention_bias: bool = False  # biases of q_a_proj, kv_a_proj_with_mqa and o_proj
    tie_word_embeddings: bool = False  # one matrix for embedding and output head
    num_nextn_predict_layers: int = 1  # depth of multi-token prediction
    initializer_range: float = 0.006  # standard deviation of every initial matrix

    def __post_init__(self):
        def require(ok: bool, sentence: str):
            if not ok:
                raise ValueError(sentence)

        E, K, G, M = self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            kind = field.type | int if field.type is float else field.type
            text = getattr(field.type, "__name__", field.type)
            require(isinstance(value, kind), f"{name} is {value!r}, but must be of type {text}.")
            if field.type in (int, int | None) and value is not None:
                least = 0 if name in _MAY_BE_ZERO else 1
                require(value >= least, f"{name} is {value}, but must be at least {least}.")
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim is {self.qk_rope_head_dim}, but RoPE rotates pairs: make it even.",
        )
        require(E % G == 0, f"n_routed_experts {E} is not a multiple of n_group {G}.")
        require(M <= G, f"topk_group {M} is larger than n_group {G}.")
        require(
            K <= M * (E // G),
            f"num_experts_per_tok {K} exceeds the {M * (E // G)} experts of topk_group {M} groups.",
        )
        require(
            G == 1 or E // G >= 2,
            f"n_group {G} leaves one expert a group, but a group is scored by its best two.",
        )
        scaling = self.rope_scaling or {}
        kind, known = rope_type(scaling), ("default", "yarn")
        require(kind in known, f"rope_scaling has type {kind!r}, but must be one of {known}.")
        strange = sorted(scaling.keys() - _YARN_KEYS)
        require(not strange, f"rope_scaling has {strange}, but may have only {_YARN_KEYS}.")
        require(
            kind == "default" or scaling.get("factor"),
            "rope_scaling of type 'yarn' lacks 'factor': give the stretch of the context.",
        )

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts, those of the MTP modules included."""
        main = max(0, self.num_hidden_layers - self.first_k_dense_replace)
        return main + self.num_nextn_predict_layers

    def cache_numbers(self) -> tuple[int, int]:
        """Numbers cached per token, all main layers: ours (c + r each), multi-head attention's."""
        per_head = self.qk_nope_head_dim + self.v_head_dim
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        layers = self.num_hidden_layers
        return layers * latent, layers * self.num_attention_heads * per_head


def wide(x: Tensor) -> Tensor:
    """x in the precision of gate, norms, softmax and loss: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Normalize(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) over the last dimension; the backward pass works from y.

    dx = (dy - y mean(dy y)) / sqrt(mean(x^2) + eps): a third of the passes over memory that
    autograd would make of the same formula, and a third of its saved tensors.
    """

    @staticmethod
    def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x32 = wide(x)
        inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return (x32 * inverse).to(x.dtype), inverse

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        y, inverse = _Normalize.normalize(x, eps)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        y, dx = wide(y), wide(dy)
        dx = torch.addcmul(dx, y, (dx * y).mean(-1, keepdim=True), value=-1).mul_(inverse)
        return dx.to(dy.dtype), None


class RMSNorm(nn.Module):
    """g * x / sqrt(mean(x^2) + eps), in float32, rounded to x's dtype before g multiplies it.

    Under autocast the result is in autocast's dtype: rounded once, not at every product.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            y = _Normalize.apply(x, self.eps)
        else:  # in decoding the machinery around the formula would take longer than the formula
            y, _ = _Normalize.normalize(x, self.eps)
        return (self.weight * y).to(compute_dtype(x))


class Linear(nn.Linear):
    """nn.Linear; for the few rows of a decoding step torch.compile gets the sum written out.

    A library's product of one row reads the weight at a third of the memory's speed; the sum
    becomes a loop at full speed, fused with what stands around it.
    """

    FEW = 8  # rows

    def forward(self, x: Tensor) -> Tensor:
        decoding = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if not (decoding and x.numel() <= Linear.FEW * self.in_features):
            return super().forward(x)
        y = (x.unsqueeze(-2) * self.weight).sum(-1)
        return y if self.bias is None else y + self.bias


# ---- Rotary position embedding (RoPE), with YaRN for long contexts -------------------------------


def rope_type(scaling: dict | None) -> str:
    scaling = scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/R), both (..., T, R/2), for positions (..., T).

    YaRN (arXiv 2309.00071; report section 4.3) divides the slow angles by `factor`, keeps the fast
    ones and blends linearly in between, at every length.
    """
    R, theta = config.qk_rope_head_dim, config.rope_theta
    i = torch.arange(R // 2, device=positions.device, dtype=dtype)
    frequency = theta ** (-2 * i / R)
    amplitude = 1.0
    if rope_type(config.rope_scaling) == "yarn":
        yarn = config.rope_scaling
        factor = yarn["factor"]
        original = yarn.get("original_max_position_embeddings") or config.max_position_embeddings

        def index_of(rotations: float) -> float:  # the pair that turns this often in `original`
            return R * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

        low, high = index_of(yarn.get("beta_fast") or 32), index_of(yarn.get("beta_slow") or 1)
        if yarn.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        ramp = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
        frequency = frequency * (1 - ramp) + frequency / factor * ramp
        m, m_all = yarn.get("mscale"), yarn.get("mscale_all_dim")
        amplitude = yarn_mscale(factor, 1.0)
        if m and m_all:
            amplitude = yarn_mscale(factor, m) / yarn_mscale(factor, m_all)
        if yarn.get("attention_factor") is not None:
            amplitude = yarn["attention_factor"]
    angle = positions.to(dtype)[..., None] * frequency  # (..., T, R/2)
    return amplitude * angle.cos(), amplitude * angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """RoPE: every pair of x (B, T, H, R) turned by its position's angle."""
    cos, sin = (table.unsqueeze(-2) for table in rope)  # (..., T, 1, R/2)
    pair = -1 if interleave else -2
    a, b = wide(x).unflatten(-1, (-1, 2) if interleave else (2, -1)).unbind(pair)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), pair).flatten(-2).to(x.dtype)


# ---- Multi-head Latent Attention (section 2.1.1) -------------------------------------------------


class Cache:
    """What decoding keeps: c_t^KV and k_t^R, C + R numbers per token and layer, and nothing else.

    Every layer's kv (B, S, C+R) is allocated once; row b holds `length[b]` tokens, so rows may
    differ, and shortening `length` forgets the newest tokens: so rejected drafts are undone.
    """

    def __init__(self, config: ModelConfig, layers: int, batch: int, size: int, like: Tensor):
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv = [like.new_zeros(batch, size, width) for _ in range(layers)]
        self.size = size
        self.length = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.longest = 0  # max(length), known to the host without waiting for the device

    def truncate(self, length: Tensor, longest: int):
        self.length, self.longest = length, longest

    def claim(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Positions (B, T) for T new tokens, and which cached positions they see (B, T, S)."""
        if self.longest + T > self.size:
            raise ValueError(f"{self.longest} + {T} tokens exceed the cache of {self.size}.")
        positions = self.length[:, None] + torch.arange(T, device=self.length.device)
        self.truncate(self.length + T, self.longest + T)
        if len(positions) == 1 and T == 1:
            return positions, None
        seen = torch.arange(self.longest, device=positions.device) <= positions[..., None]
        return positions, seen


@dataclass
class Past:
    """One layer's view of the cache during one call of the model."""

    kv: Tensor  # (B, S, C+R), this layer's rows, the new tokens' slots included
    positions: Tensor  # (B, T) slots of the new tokens
    seen: Tensor | None  # (B, T, S) causal mask, None when every slot is seen

    def store(self, new: Tensor):
        """Writes the new tokens' c_t^KV and k_t^R (B, T, C+R) into their slots."""
        if len(new) == 1:  # the last ones: indexing would take longer than all the rest
            self.kv[:, -new.shape[1] :] = new
        else:
            rows = torch.arange(len(new), device=new.device)[:, None]
            self.kv[rows, self.positions] = new.to(self.kv.dtype)


class _ShortAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, causal, with the scores (n, T, T) written out and kept for backward.

    On a CPU, in bf16 and for short windows this takes a third of the time of the fused kernel, and
    T numbers more of memory for every query. Autocast is off inside: it would make p float32.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k (n, T, N+R), v (n, T, V) -> (n, T, V)."""
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


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Every head's x (B, T, H, in) times its own matrix (H, in, out): (B, T, H, out)."""
    y = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight)  # (H, B*T, out)
    return y.transpose(0, 1).unflatten(0, x.shape[:2])


class MLA(nn.Module):
    """Multi-head Latent Attention, Eq. 1-11.

    c_t^Q  = W^DQ h_t        q_t^C = W^UQ c_t^Q     q_t^R = RoPE(W^QR c_t^Q)         Eq. 6-9
    c_t^KV = W^DKV h_t       k_t^C = W^UK c_t^KV    k_t^R = RoPE(W^KR h_t)           Eq. 1-4
                             v_t^C = W^UV c_t^KV                                     Eq. 5
    o_t,i  = sum_j softmax_j(q_t,i . k_j,i / sqrt(N + R)) v_j,i                      Eq. 10
    u_t    = W^O [o_t,1; ...; o_t,H]                                                 Eq. 11
    Both latents are normalised before they are projected up (section 4.2).
    """

    SHORT = 512  # longest window that a CPU gives to _ShortAttention

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        bias = config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * (N + R), bias=False)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, bias=bias)  # W^DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # the latents' eps is fixed
            self.q_b_proj = Linear(config.q_lora_rank, H * (N + R), bias=False)  # W^UQ, W^QR
        self.kv_a_proj_with_mqa = Linear(D, C + R, bias=bias)  # W^DKV, W^KR
        self.kv_a_layernorm = RMSNorm(C, 1e-6)
        self.kv_b_proj = Linear(C, H * (N + V), bias=False)  # per head: W^UK, W^UV
        self.o_proj = Linear(H * V, D, bias=bias)
        self.scale = (N + R) ** -0.5
        yarn = config.rope_scaling or {}
        if rope_type(yarn) == "yarn" and yarn.get("mscale_all_dim"):
            self.scale *= yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], past: Past | None = None) -> Tensor:
        config, (B, T, _) = self.config, h.shape
        N, R, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        if config.q_lora_rank is None:
            q = self.q_proj(h)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h)))
        q_nope, q_pe = q.view(B, T, -1, N + R).split([N, R], dim=-1)  # (B, T, H, N), (B, T, H, R)
        latent, k_pe = self.kv_a_proj_with_mqa(h).split([C, R], dim=-1)  # (B, T, C), (B, T, R)
        latent = self.kv_a_layernorm(latent)
        q_pe = rotate(q_pe, rope, config.rope_interleave)
        k_pe = rotate(k_pe.unsqueeze(2), rope, config.rope_interleave)  # (B, T, 1, R): all heads'
        if past is None:
            o = self.attend_expanded(q_nope, q_pe, latent, k_pe)
        else:
            o = self.attend_absorbed(q_nope, q_pe, latent, k_pe.squeeze(2), past)
        return self.o_proj(o.flatten(2))

    def attend_expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor) -> Tensor:
        """Training: keys and values are made from the latents, then ordinary causal attention."""
        B, T, H, N = q_nope.shape
        V = self.config.v_head_dim
        k_nope, v = self.kv_b_proj(latent).view(B, T, H, N + V).split([N, V], dim=-1)
        q = torch.cat((q_nope, q_pe), -1)  # (B, T, H, N+R)
        k = torch.cat((k_nope, k_pe.expand(-1, -1, H, -1)), -1)  # (B, T, H, N+R)
        low = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if low and T <= self.SHORT:
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            o = _ShortAttention.apply(q, k, v, self.scale)
            return o.unflatten(0, (B, H)).transpose(1, 2)  # (B, T, H, V)
        width = max(q.shape[-1], V)  # the fused attention kernels want heads of one width
        q, k, v = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return o[..., :V].transpose(1, 2)  # (B, T, H, V)

    def attend_absorbed(
        self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, past: Past
    ) -> Tensor:
        """Decoding: W^UK moves over to the query and W^UV to the output, so that attention runs on
        the cached latents: q . (W^UK c) = (W^UK^T q) . c and sum p (W^UV c) = W^UV (sum p c)."""
        _, T, H, N = q_nope.shape
        C, kv = latent.shape[-1], past.kv
        past.store(torch.cat((latent, k_pe), -1))
        W = self.kv_b_proj.weight.unflatten(0, (H, -1))  # (H, N+V, C)
        W_UK, W_UV = W[:, :N], W[:, N:]  # (H, N, C), (H, V, C)
        q = per_head(q_nope, W_UK)  # (B, T, H, C)
        q = (torch.cat((q, q_pe), -1) * self.scale).to(kv.dtype)  # (B, T, H, C+R)
        score = torch.bmm(q.flatten(1, 2), kv.mT)  # (B, T*H, S)
        if past.seen is not None:
            seen = past.seen.repeat_interleave(H, 1)
            score = score.masked_fill(~seen, -math.inf)
        p = wide(score).softmax(-1).to(kv.dtype)
        o = torch.bmm(p, kv[..., :C]).unflatten(1, (T, H))  # (B, T, H, C)
        return per_head(o, W_UV.mT)  # (B, T, H, V)


# ---- DeepSeekMoE (section 2.1.2) -----------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up * gain, keeping the inputs only: fewer passes over less memory."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, gain: Tensor | None) -> Tensor:
        """gate, up (rows, F), gain (rows, 1) or none -> (rows, F)."""
        ctx.save_for_backward(gate, up, gain)
        y = F.silu(gate).mul_(up)
        return y if gain is None else y.mul_(gain)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up, gain = ctx.saved_tensors
        silu, d_gain = F.silu(gate), None
        if gain is not None:
            d_gain = (silu * up).mul_(dy).sum(-1, keepdim=True, dtype=gain.dtype)
            dy = (dy * gain).to(dy.dtype)
        return torch.ops.aten.silu_backward(dy * up, gate), silu.mul_(dy), d_gain


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), the dense layers' and the shared experts' FFN."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate_proj = Linear(dim, width, bias=False)
        self.up_proj = Linear(dim, width, bias=False)
        self.down_proj = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if isinstance(self.down_proj, fp8.FP8Linear):  # keeps gate and up in FP8 for backward
            return fp8.swiglu_linear(gate, up, self.down_proj.weight)
        return self.down_proj(_SwiGLU.apply(gate, up, None))


class Gate(nn.Module):
    """Which K experts a token visits and how much each counts, Eq. 13-16.

    s = sigmoid(u . e_i). The K experts are those with the largest s + b, within the topk_group
    groups whose two best s + b sum highest. The bias b chooses and does nothing else: the weights
    come from s alone, and no gradient reaches b. `DeepSeekV3.update_bias` moves it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):
        """A cast of the model (model.bfloat16()) leaves the bias in float32."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        new = self.e_score_correction_bias
        new = new.float() if bias.is_meta else bias.to(self.weight.device)
        self.e_score_correction_bias = new
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> scores s (B, T, E), chosen experts (B, T, K), their weights (B, T, K)."""
        config, G = self.config, self.config.n_group
        with torch.autocast(x.device.type, enabled=False):
            s = F.linear(wide(x), wide(self.weight)).sigmoid()  # (B, T, E), Eq. 15
        choice = s.detach() + self.e_score_correction_bias  # (B, T, E)
        if G > 1:
            groups = choice.unflatten(-1, (G, -1))  # (B, T, G, E/G)
            best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
            dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = groups.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)
        chosen = choice.topk(config.num_experts_per_tok, sorted=False).indices  # Eq. 14, 16
        weight = s.gather(-1, chosen)
        if config.norm_topk_prob:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)  # Eq. 13
        return s, chosen, weight * config.routed_scaling_factor


def balance_loss(s: Tensor, K: int) -> Tensor:
    """The complementary sequence-wise balance loss, Eq. 17-20, without its weight alpha.

    s (B, T, E) are the gate's scores. 1 when the K best scores spread evenly over the experts.
    """
    B, T, E = s.shape
    P = (s / s.sum(-1, keepdim=True)).mean(1)  # (B, E), Eq. 19-20
    best = s.detach().topk(K).indices.flatten(1)  # (B, T*K), by s without the bias
    f = P.new_zeros(B, E).scatter_add_(1, best, torch.ones_like(best, dtype=P.dtype)) * E / (K * T)
    return (f * P).sum(-1).mean()


def expert_counts(chosen: Tensor, E: int) -> Tensor:
    """How many of the chosen experts (any shape, ids below E) are each expert: (E,) int64."""
    flat = chosen.flatten()
    return torch.zeros(E, dtype=torch.long, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def sort_by_expert(chosen: Tensor, E: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots are rows sorted by expert, each expert's rounded up to a multiple of `pad`.

    chosen (tokens, K) -> the token in each slot (slots,), 0 in padding; the slot of each token's
    K experts (tokens, K); how many slots each expert has (E,).
    """
    expert = chosen.flatten()  # (tokens*K,)
    counts = expert_counts(expert, E)
    padded = (counts + pad - 1) // pad * pad
    total = len(expert) if pad == 1 else int(padded.sum())
    order = expert.argsort(stable=True)
    number = torch.arange(len(order), device=order.device)
    gap = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)  # padding before each expert
    slots = torch.empty_like(order)
    slots[order] = number + gap[expert[order]]
    rows = order.new_zeros(total)
    rows[slots] = number // chosen.shape[1]
    return rows, slots.view_as(chosen), padded


class _GroupedLinear(torch.autograd.Function):
    """One matrix product per expert, written straight into the shared output and gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[1])
        for w, x_e, y_e in zip(weight, x.split(counts), y.split(counts), strict=True):
            if len(x_e):
                torch.mm(x_e, w.T, out=y_e)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        parts = zip(weight, dw, *(z.split(ctx.counts) for z in (x, dx, dy)), strict=True)
        for w, dw_e, x_e, dx_e, dy_e in parts:
            if len(x_e):
                torch.mm(dy_e, w, out=dx_e)
                torch.mm(dy_e.T, x_e, out=dw_e)
        return dx, dw, None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each row of x (rows, in), sorted by expert, times its expert's weight (E, out, in).

    counts (E,) are the rows of each expert. Returns (rows, out).
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and all(n % 8 == 0 for n in weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).int())
    return _GroupedLinear.apply(x, weight, counts.tolist())


class _Gather(torch.autograd.Function):
    """x[rows], whose backward is a gather too: every row of x went to the K slots in `slots`."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x[rows]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (slots,) = ctx.saved_tensors
        return dy[slots].sum(1), None, None


class _Combine(torch.autograd.Function):
    """The transpose of _Gather: sums, for every token, the K slots it was sent to."""

    @staticmethod
    def forward(ctx, y: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return y[slots].sum(1)

    @staticmethod
    def backward(ctx, dx: Tensor):
        (rows,) = ctx.saved_tensors
        return dx[rows], None, None


class Experts(nn.Module):
    """The routed experts' sum in Eq. 12, without dropping tokens: rows sorted by expert, one
    product per expert and projection."""

    FEW = 32  # tokens, at most, that are a decoding step; more are a chunk of a prompt

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, F_, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))  # gate first
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.fp8 = False

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """x (tokens, D), chosen and weight (tokens, K) -> (tokens, D)."""
        dtype = compute_dtype(x)
        if len(x) <= Experts.FEW and not (self.fp8 or torch.is_grad_enabled()):
            if torch.compiler.is_compiling():
                return self.forward_compiled(x, chosen, weight)
            if x.device.type == "cpu":
                return self.forward_few(x.to(dtype), chosen, weight)
        # In bf16 on a CPU oneDNN compiles a kernel for every new matrix shape, so there each
        # expert's rows are padded to a multiple of 64.
        pad = 64 if x.device.type == "cpu" and dtype == torch.bfloat16 and not self.fp8 else 1
        rows, slots, counts = sort_by_expert(chosen, len(self.down_proj), pad)
        # Eq. 12's gate value multiplies the hidden units instead of the output: the same sum, in
        # fewer numbers, and padding rows come out as zero.
        gain = weight.new_zeros(len(rows)).scatter(0, slots.flatten(), weight.flatten())
        x = _Gather.apply(x.to(dtype), rows, slots)  # (slots, D)
        if self.fp8:
            sizes = counts.tolist()
            gate, up = fp8.grouped_linear(x, self.gate_up_proj, sizes).chunk(2, dim=-1)
            y = fp8.swiglu_linear(gate, up, self.down_proj, sizes, gain)
        else:
            gate, up = grouped_linear(x, self.gate_up_proj.to(dtype), counts).chunk(2, dim=-1)
            hidden = _SwiGLU.apply(gate, up, gain[:, None])  # (slots, F)
            y = grouped_linear(hidden, self.down_proj.to(dtype), counts)  # (slots, D)
        return _Combine.apply(y, rows, slots)

    def forward_compiled(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The same for a few tokens under torch.compile, which fuses the choice of the weights,
        the products and the sums into loops that read each visited expert where it lies."""
        x = x[:, None, None]  # (tokens, 1, 1, D)
        gate, up = (self.gate_up_proj[chosen] * x).sum(-1).chunk(2, dim=-1)  # (tokens, K, F)
        hidden = (F.silu(gate) * up * weight[..., None]).unsqueeze(-2)  # (tokens, K, 1, F)
        return (self.down_proj[chosen] * hidden).sum((1, 3)).to(x.dtype)

    def forward_few(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The same for the few tokens of a decoding step: sorted by the host, which is faster than
        starting an operation for every step of it, and touching the chosen experts only."""
        experts = chosen.flatten().tolist()
        order = sorted(range(len(experts)), key=experts.__getitem__)  # slot -> token * K + choice
        counts = Counter(sorted(experts))  # visited expert -> its slots
        alone = len(x) == 1  # then every slot has the same x, and their sum is the result
        index = torch.tensor(order)

        def product(parts: Iterable[Tensor], weight: Tensor) -> Tensor:
            return torch.cat(
                [F.linear(x_e, weight[e].to(x.dtype)) for x_e, e in zip(parts, counts, strict=True)]
            )

        sizes = list(counts.values())
        parts = [x] * len(sizes) if alone else x[index // chosen.shape[1]].split(sizes)
        gate, up = product(parts, self.gate_up_proj).chunk(2, dim=-1)  # (slots, F) each
        hidden = (F.silu(gate) * up * weight.flatten()[index, None]).to(x.dtype)
        y = product(hidden.split(sizes), self.down_proj)  # (slots, D)
        if alone:
            return y.sum(0, keepdim=True)
        return torch.empty_like(y).index_copy_(0, index, y).view(*chosen.shape, -1).sum(1)


class MoE(nn.Module):
    """h' = sum_{i in top K} g_i FFN_i(u) + FFN_shared(u), Eq. 12 (Block adds the residual u)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, width)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s, chosen, weight = self.gate(x)
        y = self.experts(x.flatten(0, 1), chosen.flatten(0, 1), weight.flatten(0, 1)).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, (s, chosen)


class Block(nn.Module):
    """x + MLA(norm(x)), then x + FFN(norm(x)); also returns the gate's (scores, chosen) if any."""

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(D, config.intermediate_size) if dense else MoE(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: Past | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, past)
        y, routing = self.mlp(self.post_attention_layernorm(x)), None
        if isinstance(self.mlp, MoE):
            y, routing = y
        return x + y, routing


# ---- Multi-Token Prediction (section 2.2) --------------------------------------------------------


class MTP(nn.Module):
    """Module k predicts one token further than module k-1, Eq. 21-22.

    h'_i^k = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})],  h^k = TRM_k(h'^k)
    The report writes the hidden state first; the released weights have the embedding first, and
    h^0 is the main model's hidden state after its final norm. What is handed on as h^k is
    normalised too.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(D, eps)
        self.hnorm = RMSNorm(D, eps)
        self.eh_proj = Linear(2 * D, D, bias=False)  # M_k
        self.block = Block(config, dense=False)  # TRM_k
        self.norm = RMSNorm(D, eps)  # before the shared output head

    def forward(self, h: Tensor, embedding: Tensor, rope, past: Past | None = None):
        """h = h^{k-1} (B, T, D), embedding of the tokens k later (B, T, D) -> h^k, routing."""
        u = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h)), -1))  # (B, T, D)
        x, routing = self.block(u, rope, past)
        return self.norm(x), routing


# ---- Output head and loss ------------------------------------------------------------------------


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(h W^T) without ever holding all the logits.

    The gradient of a chunk of rows is formed as soon as its logits are there, so the largest
    tensor is (chunk, vocabulary), and backward only scales what forward has computed.
    """

    CHUNK = 2**27  # logits at once: 0.5 GB
    CPU_ROWS = 256  # few enough for its caches, enough to pay for a pass over dw

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h (rows, D), weight (vocabulary, D), targets (rows,) with -1 ignored -> scalar."""
        n, need = (targets >= 0).sum().clamp(min=1), any(ctx.needs_input_grad)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight) if need else None
        w = weight.to(h.dtype)
        loss = wide(h.new_zeros(()))
        chunk = _HeadLoss.CPU_ROWS if h.device.type == "cpu" else _HeadLoss.CHUNK // len(w)
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


# ---- The model -----------------------------------------------------------------------------------


class DeepSeekV3(nn.Module):
    """The whole network. It computes in the dtype of its parameters unless autocast is on.

    After every call `routing` holds the chosen experts (B, T, K) of each MoE layer, in order.
    In training mode `expert_counts` (MoE layers, E) adds them up until `update_bias` uses them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, dense=i < config.first_k_dense_replace)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        counts = torch.zeros(config.moe_layers, config.n_routed_experts, dtype=torch.long)
        self.register_buffer("expert_counts", counts, persistent=False)
        self.routing: list[Tensor] = []
        self.recompute = False  # activation checkpointing: forget a block's activations, redo them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every matrix normal with std initializer_range (section 4.2), norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=self.config.initializer_range)
            elif name.endswith("bias"):
                parameter.zero_()

    def materialize(self, device: str | torch.device) -> "DeepSeekV3":
        """Memory, with undefined weights, for a model built on the meta device."""
        self.to_empty(device=device)
        self.expert_counts.zero_()
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # to_empty has untied them
        return self

    def use_fp8(self):
        """Section 3.3.1: what runs in FP8. High precision stays in embedding, head, gate, norms,
        attention core and eh_proj."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.fp8 = True
            elif isinstance(module, (MLA, MLP)):
                for child in module.children():
                    if isinstance(child, nn.Linear):
                        child.__class__ = fp8.FP8Linear

    # -- forward

    def logits(self, h: Tensor) -> Tensor:
        return wide(self.lm_head(h))

    def run_block(self, block: nn.Module, *args):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def trunk(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) -> hidden states after the final norm (B, T, D).

        With a cache, the tokens continue its rows.
        """
        x = self.embed_tokens(tokens)
        rope, past = self._context(x, cache)
        self.routing, self._scores = [], []
        for i, block in enumerate(self.layers):
            x, routing = self.run_block(block, x, rope, past(i))
            self._note(routing)
        return self.norm(x)

    def predict_next(self, k: int, h: Tensor, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """MTP module k (0-based): h (B, T, D) of depth k, tokens (B, T) k + 1 later -> next h."""
        embedding = self.embed_tokens(tokens)
        rope, past = self._context(embedding, cache)
        h, routing = self.run_block(self.mtp[k], h, embedding, rope, past(k))
        if cache is None:  # decoding reads neither scores nor choices of the MTP modules
            self._note(routing)
        return h

    def _context(self, x: Tensor, cache: Cache | None):
        """The RoPE table of x's positions, and a function: layer -> its Past."""
        if cache is None:
            positions = torch.arange(x.shape[1], device=x.device)
            return rope_table(self.config, positions, wide(x[:0]).dtype), lambda layer: None
        positions, seen = cache.claim(x.shape[1])
        S = cache.longest
        rope = rope_table(self.config, positions, wide(x[:0]).dtype)
        return rope, lambda layer: Past(cache.kv[layer][:, :S], positions, seen)

    def _note(self, routing: tuple[Tensor, Tensor] | None):
        if routing is not None:
            self._scores.append(routing[0])
            self.routing.append(routing[1])

    def forward(self, tokens: Tensor, targets: Tensor | None = None, return_mtp: bool = False):
        """tokens (B, T) int64. In training, `targets` (B, T) are the next tokens, -1 ignored.

        Without targets: logits (B, T, V), float32 (float64 for a float64 model); with return_mtp
        also a list whose k-th entry (k from 1) is (B, T-k, V): its row i predicts token i+1+k.
        With targets: main cross-entropy, mean MTP cross-entropy (Eq. 24-25) and mean balance loss
        (Eq. 17) of the MoE layers, all before their weights.
        """
        h = self.trunk(tokens)
        hidden = [h]
        if targets is not None or return_mtp:
            for k in range(min(len(self.mtp), tokens.shape[1] - 1)):
                hidden.append(self.predict_next(k, hidden[-1][:, :-1], tokens[:, k + 1 :]))
        if self.training:
            E = self.config.n_routed_experts
            for counts, chosen in zip(self.expert_counts, self.routing, strict=False):
                counts += expert_counts(chosen, E)
        scores, self._scores = self._scores, []  # they hold the graph, so do not keep them
        if targets is None:
            logits = [self.logits(x) for x in hidden]
            return (logits[0], logits[1:]) if return_mtp else logits[0]
        main, *mtp = (self.head_loss(x, targets[:, k:]) for k, x in enumerate(hidden))
        K, zero = self.config.num_experts_per_tok, main.new_zeros(())
        balance = [balance_loss(s, K) for s in scores]
        return main, sum(mtp, zero) / max(1, len(mtp)), sum(balance, zero) / max(1, len(balance))

    def head_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the shared output head: h (B, T, D), targets (B, T)."""
        weight = self.lm_head.weight
        if not torch.is_grad_enabled():
            weight = weight.detach()  # so that evaluation forms no gradient
        return _HeadLoss.apply(h.to(compute_dtype(h)).flatten(0, 1), weight, targets.flatten())

    # -- auxiliary-loss-free balancing (section 2.1.2; arXiv 2408.15664, Algorithm 1)

    def gates(self) -> list[Gate]:
        """The gates of the MoE layers in order, those of the MTP modules last."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    @torch.no_grad()
    def update_bias(self, gamma: float):
        """b_i += gamma * sign(mean load - load of i), from the counts since the last call."""
        load = self.expert_counts.float()
        step = gamma * (load.mean(1, keepdim=True) - load).sign()
        for gate, change in zip(self.gates(), step, strict=True):
            gate.e_score_correction_bias += change
        self.expert_counts.zero_()

    # -- size

    def parameter_counts(self) -> dict[str, int]:
        """`total` and `active` (what one token uses: all but (E-K)/E of the routed experts) of the
        main model, embedding, head and correction biases counted; `mtp`, what the modules add."""
        E, K = self.config.n_routed_experts, self.config.num_experts_per_tok
        count = {"total": 0, "active": 0, "mtp": 0}
        biases = ((n, b) for n, b in self.named_buffers() if n.endswith("correction_bias"))
        for name, x in [*self.named_parameters(), *biases]:
            if name.startswith("mtp."):
                count["mtp"] += x.numel()
            else:
                count["total"] += x.numel()
                count["active"] += x.numel() * K // E if ".experts." in name else x.numel()
        return count

    # -- files (huggingface.py)

    @classmethod
    def from_pretrained(cls, directory, dtype=None, device="cpu") -> "DeepSeekV3":
        """huggingface.from_pretrained: a checkpoint of the DeepSeek-V3 family."""
        import huggingface

        return huggingface.from_pretrained(directory, dtype, device)

    def save_pretrained(self, directory, **options):
        """huggingface.save_pretrained: config.json and safetensors, as transformers opens them."""
        import huggingface

        huggingface.save_pretrained(self, directory, **options)
