"""DeepSeek-V3 in float64 numpy, from the equations of the report and the released layout.

One vector at a time, plain loops over tokens, heads and experts. It shares no code with model.py,
and is the ground truth of the tests. `w` maps the names of the released checkpoint to arrays, `c`
holds the keys of config.json. A sequence is a list of vectors.
"""

import math

import numpy as np


def rms(x, g, eps):
    return g * x / np.sqrt(np.mean(x * x) + eps)


def swiglu(w, name, x):
    gate, up = w[f"{name}.gate_proj.weight"] @ x, w[f"{name}.up_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)


def mscale(s, m):
    return 1.0 if s <= 1 else 0.1 * m * math.log(s) + 1


def rope(c, x, position):
    """The vector x turned pair by pair: pair i by position * theta^(-2i/r), slowed by YaRN."""
    r, theta, yarn = len(x), c["rope_theta"], c.get("rope_scaling")
    y, amplitude = np.empty(r), 1.0
    for i in range(r // 2):
        inv = theta ** (-2 * i / r)
        if yarn:
            s, o = yarn["factor"], yarn["original_max_position_embeddings"]
            pair = [
                r * math.log(o / (2 * math.pi * yarn.get(beta, usual))) / (2 * math.log(theta))
                for beta, usual in (("beta_fast", 32), ("beta_slow", 1))
            ]
            low, high = max(math.floor(pair[0]), 0), min(math.ceil(pair[1]), r - 1)
            ramp = min(max((i - low) / (high - low or 0.001), 0), 1)
            inv = inv * (1 - ramp) + inv / s * ramp
            m, m_all = yarn.get("mscale"), yarn.get("mscale_all_dim")
            amplitude = mscale(s, m) / mscale(s, m_all) if m and m_all else mscale(s, 1)
        j, k = (2 * i, 2 * i + 1) if c["rope_interleave"] else (i, i + r // 2)
        cos, sin = math.cos(position * inv), math.sin(position * inv)
        y[j] = amplitude * (x[j] * cos - x[k] * sin)
        y[k] = amplitude * (x[j] * sin + x[k] * cos)
    return y


def mla(w, name, c, hs):
    """Eq. 1-11 over the sequence hs."""
    H, C = c["num_attention_heads"], c["kv_lora_rank"]
    n, r = c["qk_nope_head_dim"], c["qk_rope_head_dim"]

    def linear(part, x):
        return w[f"{name}.{part}.weight"] @ x + w.get(f"{name}.{part}.bias", 0)

    scale, yarn = (n + r) ** -0.5, c.get("rope_scaling")
    if yarn and yarn.get("mscale_all_dim"):
        scale *= mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    queries, keys, values = [], [], []
    for t, h in enumerate(hs):
        if c["q_lora_rank"] is None:
            q = linear("q_proj", h)
        else:
            q = rms(linear("q_a_proj", h), w[f"{name}.q_a_layernorm.weight"], 1e-6)
            q = linear("q_b_proj", q)
        kv = linear("kv_a_proj_with_mqa", h)
        latent = rms(kv[:C], w[f"{name}.kv_a_layernorm.weight"], 1e-6)
        k_pe = rope(c, kv[C:], t)
        kv = linear("kv_b_proj", latent)
        queries.append([np.concatenate((x[:n], rope(c, x[n:], t))) for x in np.split(q, H)])
        keys.append([np.concatenate((x[:n], k_pe)) for x in np.split(kv, H)])
        values.append([x[n:] for x in np.split(kv, H)])
    out = []
    for t in range(len(hs)):
        o = []
        for i in range(H):
            e = [math.exp(scale * (queries[t][i] @ keys[j][i])) for j in range(t + 1)]
            o.append(sum(e[j] / sum(e) * values[j][i] for j in range(t + 1)))
        out.append(linear("o_proj", np.concatenate(o)))
    return out


def route(c, s, b):
    """Eq. 13-16 with limited groups: scores s and biases b of one token -> {expert: weight}."""
    groups = np.split(np.arange(len(s)), c["n_group"])
    groups.sort(key=lambda group: -sum(sorted(s[e] + b[e] for e in group)[-2:]))
    allowed = np.concatenate(groups[: c["topk_group"]])
    chosen = sorted(allowed, key=lambda e: -(s[e] + b[e]))[: c["num_experts_per_tok"]]
    total = sum(s[e] for e in chosen) if c["norm_topk_prob"] else 1
    return {e: s[e] / total * c["routed_scaling_factor"] for e in chosen}


def moe(w, name, c, x):
    """Eq. 12 without the residual."""
    s = 1 / (1 + np.exp(-(w[f"{name}.gate.weight"] @ x)))
    y = np.zeros_like(x)
    for e, weight in route(c, s, w[f"{name}.gate.e_score_correction_bias"]).items():
        y = y + weight * swiglu(w, f"{name}.experts.{e}", x)
    return y + swiglu(w, f"{name}.shared_experts", x) if c["n_shared_experts"] else y


def block(w, layer, c, xs):
    name, eps = f"model.layers.{layer}", c["rms_norm_eps"]
    hs = [rms(x, w[f"{name}.input_layernorm.weight"], eps) for x in xs]
    us = mla(w, f"{name}.self_attn", c, hs)
    xs = [x + u for x, u in zip(xs, us, strict=True)]
    dense = layer < c["first_k_dense_replace"] and layer < c["num_hidden_layers"]
    out = []
    for x in xs:
        y = rms(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        out.append(x + (swiglu(w, f"{name}.mlp", y) if dense else moe(w, f"{name}.mlp", c, y)))
    return out


def forward(w, c, tokens):
    """tokens (a list) -> logits (T, V), and per MTP module (T-k, V): row i predicts i+1+k."""
    embed, eps, L = w["model.embed_tokens.weight"], c["rms_norm_eps"], c["num_hidden_layers"]
    head = w.get("lm_head.weight", embed)
    xs = [embed[t] for t in tokens]
    for layer in range(L):
        xs = block(w, layer, c, xs)
    hs = [rms(x, w["model.norm.weight"], eps) for x in xs]
    logits, mtp = np.array([head @ h for h in hs]), []
    for k in range(1, c["num_nextn_predict_layers"] + 1):
        name = f"model.layers.{L + k - 1}"
        us = []
        for i in range(len(tokens) - k):
            e = rms(embed[tokens[i + k]], w[f"{name}.enorm.weight"], eps)
            h = rms(hs[i], w[f"{name}.hnorm.weight"], eps)
            us.append(w[f"{name}.eh_proj.weight"] @ np.concatenate((e, h)))
        hs = [rms(x, w[f"{name}.shared_head.norm.weight"], eps) for x in block(w, L + k - 1, c, us)]
        mtp.append(np.array([head @ h for h in hs]))
    return logits, mtp


def balance(s, K):
    """Eq. 17-20 without alpha for one sequence: s, T lists of E scores."""
    T, E = len(s), len(s[0])
    best = [sorted(range(E), key=lambda e: -row[e])[:K] for row in s]
    f = [E / (K * T) * sum(i in experts for experts in best) for i in range(E)]
    P = [sum(row[i] / sum(row) for row in s) / T for i in range(E)]
    return sum(f[i] * P[i] for i in range(E))
