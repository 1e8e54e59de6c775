"""What does latent attention give up for its small cache? python experiments/attention.py

Multi-head attention, and two and one key-value heads for all queries, with as many parameters as
MLA (within 2 %, by the width of their heads); multi-head attention also with norms on keys and
values, as MLA has one on its latent. The report of V2 (arXiv 2405.04434) finds MLA better than
multi-head attention (Table 9), and multi-head attention better than grouped queries (Table 8); it
does not compare MLA with grouped queries. attention_step.py measures the cost of a decoding step.
"""

import report
import run
import torch
from torch import Tensor, nn

import model


class MultiHeadAttention(model.MLA):
    """Every head has its own keys and values; rotary positions in the last R numbers of a head."""

    kv_heads: int | None = None  # none: as many as queries

    def __init__(self, config: model.ModelConfig):
        nn.Module.__init__(self)
        self.config, D, H = config, config.hidden_size, config.num_attention_heads
        W, G = config.qk_nope_head_dim + config.qk_rope_head_dim, self.kv_heads or H
        self.q_proj, self.o_proj = model.linear(config, D, H * W), model.linear(config, H * W, D)
        self.k_proj, self.v_proj = (model.linear(config, D, G * W) for _ in "kv")

    def forward(self, h: Tensor, rope: model.Rope, past=None) -> Tensor:
        c, (B, T, _) = self.config, h.shape
        W = c.qk_nope_head_dim + c.qk_rope_head_dim
        q, (k, v) = self.q_proj(h).view(B, T, -1, W), self.keys_and_values(h)
        q, k = (self.rotated(x, rope) for x in (q, k))  # (B, T, heads, W)
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        o = model.causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), W**-0.5)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def keys_and_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        W = self.config.qk_nope_head_dim + self.config.qk_rope_head_dim
        k, v = (f(h).unflatten(-1, (-1, W)) for f in (self.k_proj, self.v_proj))
        return k, v  # (B, T, heads, W)

    def rotated(self, x: Tensor, rope: model.Rope) -> Tensor:
        still, turned = x.tensor_split([self.config.qk_nope_head_dim], -1)
        return torch.cat((still, model.rotate(turned, rope, self.config.rope_interleave)), -1)


class NormedMultiHeadAttention(MultiHeadAttention):
    """Every head's key and value is normalised, as MLA normalises its latent."""

    def __init__(self, config: model.ModelConfig):
        super().__init__(config)
        W = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.k_norm, self.v_norm = (model.RMSNorm(W, 1e-6) for _ in "kv")

    def keys_and_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().keys_and_values(h)
        return self.k_norm(k), self.v_norm(v)


class GroupedQueryAttention(MultiHeadAttention):
    kv_heads = 2


class MultiQueryAttention(MultiHeadAttention):
    kv_heads = 1


FORMS = {
    "MHA": MultiHeadAttention,
    "MHA normed": NormedMultiHeadAttention,
    "GQA 2": GroupedQueryAttention,
    "MQA": MultiQueryAttention,
}


def arms(base: dict) -> dict[str, run.Arm]:
    """Head widths with which all have MLA's number of parameters."""
    D, H, L, C = (
        base[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    N, R, V = (base[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    total = D * L + L * H * (N + R) + D * (C + R) + C * H * (N + V) + H * V * D
    found = {}
    for name, form in FORMS.items():
        width = round(total / D / 2 / (H + (form.kv_heads or H)))
        settings = {"qk_nope_head_dim": width - R, "v_head_dim": width}
        found[name] = run.Arm(settings, {"model.MLA": form})
    return found


def cache_size(trained: run.Trained) -> dict:
    layer, c = trained.net.layers[0].self_attn, trained.net.config
    numbers = c.kv_lora_rank + c.qk_rope_head_dim
    if isinstance(layer, MultiHeadAttention):
        numbers = 2 * layer.k_proj.out_features
    return {"cache_bytes": 4 * numbers * c.num_hidden_layers}


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    report.dots(left, results, "against", "bits/byte against base")
    report.dots(right, results, "cache_bytes", "cache, bytes per token (float32)")
    right.set(xlim=(0, None))


COLUMNS = {"test_bpb": "bits/byte", "cache_bytes": "cache, bytes per token"}
PAIRS = (("GQA 2", "MHA"), ("MQA", "MHA"), ("MHA normed", "MHA"))
EXPERIMENT = run.Experiment("attention", arms, COLUMNS, draw, cache_size, base="MLA", pairs=PAIRS)

if __name__ == "__main__":
    run.command(EXPERIMENT)
