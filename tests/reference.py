"""The whole of DeepSeek-V3 in plain NumPy: the equations of its report, one after the other.

Section 2 of the technical report (arXiv 2412.19437), in its order: attention (Eq. 1-11), experts
(12-16) and their balance loss (17-20), prediction of further tokens (21-23). Section 4.3 adds YaRN.
One vector at a time, with loops over tokens, heads and experts, in float64: nothing is batched,
cached or fast. model.py shares no code with this file, and the tests compare their results.

A sequence is a list of vectors, one per token. `weights` maps the names of a released checkpoint to
arrays, and `config` has the keys of its config.json. Letters are the report's:
    h_t         a token's normed hidden state    c^Q, c^KV   latents: of queries, of keys and values
    q, k, v     query, key, value of a head      ^C, ^R      part without position, rotated part
    u_t         attention's output               s, b, g     score, bias, gate value of an expert
"""

import math

import numpy as np


def below(weights, name):
    """The weights of the part `name`, by their names within it."""
    return {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x) + eps)


def feed_forward(weights, x):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), where silu(z) = z / (1 + e^-z)."""
    gate, up = weights["gate_proj.weight"] @ x, weights["up_proj.weight"] @ x
    return weights["down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)


def frequency(config, pair, width):
    """The angle by which RoPE turns a pair of numbers per position: theta^(-2 pair / width). YaRN
    divides it by its factor if the pair is slow, keeps it if fast, and interpolates in between."""
    theta, yarn = config["rope_theta"], config.get("rope_scaling")
    plain = theta ** (-2 * pair / width)
    if not yarn:
        return plain

    def pair_with(rotations):  # the pair that makes so many rotations in the original length
        length = yarn["original_max_position_embeddings"]
        return width * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    last_fast = max(math.floor(pair_with(yarn.get("beta_fast", 32))), 0)
    first_slow = min(math.ceil(pair_with(yarn.get("beta_slow", 1))), width - 1)
    slow = min(max((pair - last_fast) / (first_slow - last_fast or 0.001), 0), 1)
    return plain * (1 - slow) + plain / yarn["factor"] * slow


def yarn_mscale(factor, mscale):
    """With mscale 1 this is the report's sqrt(t) = 0.1 ln s + 1, where s is YaRN's factor."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def rope(config, x, position):
    """RoPE: every pair of numbers of x, turned by position * frequency."""
    width, yarn, amplitude = len(x), config.get("rope_scaling"), 1.0
    if yarn:
        factor, m, m_all = yarn["factor"], yarn.get("mscale"), yarn.get("mscale_all_dim")
        amplitude = yarn_mscale(factor, 1)
        if m and m_all:  # as in V3, where both are 1 and the amplitude is 1
            amplitude = yarn_mscale(factor, m) / yarn_mscale(factor, m_all)
    turned = np.empty(width)
    for pair in range(width // 2):
        i, j = (2 * pair, 2 * pair + 1) if config["rope_interleave"] else (pair, pair + width // 2)
        angle = position * frequency(config, pair, width)
        turned[i] = amplitude * (x[i] * math.cos(angle) - x[j] * math.sin(angle))
        turned[j] = amplitude * (x[i] * math.sin(angle) + x[j] * math.cos(angle))
    return turned


def attention(weights, config, hidden):
    """Multi-head Latent Attention, Eq. 1-11: the h_t of a sequence -> its u_t."""
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    content, width = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    scale, yarn = (content + width) ** -0.5, config.get("rope_scaling")
    if yarn and yarn.get("mscale_all_dim"):
        scale *= yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2

    def project(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)

    queries, keys, values = [], [], []  # queries[t][i]: of token t and head i
    for t, h in enumerate(hidden):
        if config["q_lora_rank"] is None:
            q = project("q_proj", h)
        else:
            c_q = rms_norm(project("q_a_proj", h), weights["q_a_layernorm.weight"], 1e-6)  # Eq. 6
            q = project("q_b_proj", c_q)  # Eq. 7, 8
        c_kv, k_r = np.split(project("kv_a_proj_with_mqa", h), [rank])  # Eq. 1, 3
        c_kv = rms_norm(c_kv, weights["kv_a_layernorm.weight"], 1e-6)
        k_r = rope(config, k_r, t)  # Eq. 3: one rotated key, which all heads share
        q, kv = np.split(q, heads), np.split(project("kv_b_proj", c_kv), heads)  # kv: Eq. 2, 5
        queries.append([np.append(x[:content], rope(config, x[content:], t)) for x in q])  # Eq. 9
        keys.append([np.append(x[:content], k_r) for x in kv])  # Eq. 4
        values.append([x[content:] for x in kv])  # Eq. 5

    outputs = []
    for t in range(len(hidden)):
        o = []
        for i in range(heads):  # Eq. 10: softmax over the tokens up to t, which weights the values
            e = [math.exp(scale * (queries[t][i] @ keys[j][i])) for j in range(t + 1)]
            o.append(sum(e[j] / sum(e) * values[j][i] for j in range(t + 1)))
        outputs.append(project("o_proj", np.concatenate(o)))  # Eq. 11
    return outputs


def route(config, s, b):
    """Scores and biases of a token -> {chosen expert: gate value}, Eq. 13-16. The experts come from
    the topk_group best groups (nodes), by the sum of a group's two largest s + b."""
    groups = np.split(np.arange(len(s)), config["n_group"])
    groups.sort(key=lambda group: -sum(sorted(s[i] + b[i] for i in group)[-2:]))
    allowed = np.concatenate(groups[: config["topk_group"]])
    by_choice = sorted(allowed, key=lambda i: -(s[i] + b[i]))
    chosen = by_choice[: config["num_experts_per_tok"]]  # Eq. 14, 16
    total = sum(s[i] for i in chosen) if config["norm_topk_prob"] else 1
    return {i: s[i] / total * config["routed_scaling_factor"] for i in chosen}  # Eq. 13


def experts(weights, config, x):
    """DeepSeekMoE, Eq. 12 without the residual: the chosen experts and the shared one."""
    s = 1 / (1 + np.exp(-(weights["gate.weight"] @ x)))  # Eq. 15
    y = np.zeros_like(x)
    for i, g in route(config, s, weights["gate.e_score_correction_bias"]).items():
        y = y + g * feed_forward(below(weights, f"experts.{i}"), x)
    if config["n_shared_experts"]:
        y = y + feed_forward(below(weights, "shared_experts"), x)
    return y


def balance(scores, chosen_per_token):
    """sum f_i P_i of a sequence, Eq. 17 without alpha. scores: T lists of E scores, without b."""
    T, E, K = len(scores), len(scores[0]), chosen_per_token
    best = [sorted(range(E), key=lambda i: -s[i])[:K] for s in scores]
    f = [E / (K * T) * sum(i in chosen for chosen in best) for i in range(E)]  # Eq. 18
    P = [sum(s[i] / sum(s) for s in scores) / T for i in range(E)]  # Eq. 19, 20
    return sum(f[i] * P[i] for i in range(E))


def block(weights, config, xs, dense):
    """A layer: x + attention(norm(x)), then x + FFN(norm(x))."""
    eps = config["rms_norm_eps"]
    hidden = [rms_norm(x, weights["input_layernorm.weight"], eps) for x in xs]
    us = attention(below(weights, "self_attn"), config, hidden)
    xs = [x + u for x, u in zip(xs, us, strict=True)]
    hidden = [rms_norm(x, weights["post_attention_layernorm.weight"], eps) for x in xs]
    mlp = below(weights, "mlp")
    ys = [feed_forward(mlp, h) if dense else experts(mlp, config, h) for h in hidden]
    return [x + y for x, y in zip(xs, ys, strict=True)]


def forward(weights, config, tokens):
    """T tokens -> logits (T, V), and of MTP module k (T - k, V), whose row i predicts token
    i + 1 + k."""
    eps, layers = config["rms_norm_eps"], config["num_hidden_layers"]
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)
    xs = [embedding[t] for t in tokens]
    for i in range(layers):
        dense = i < config["first_k_dense_replace"]
        xs = block(below(weights, f"model.layers.{i}"), config, xs, dense)
    hs = [rms_norm(x, weights["model.norm.weight"], eps) for x in xs]
    logits, further = np.array([head @ h for h in hs]), []
    for k in range(1, config["num_nextn_predict_layers"] + 1):
        module, xs = below(weights, f"model.layers.{layers + k - 1}"), []
        for i in range(len(tokens) - k):
            e = rms_norm(embedding[tokens[i + k]], module["enorm.weight"], eps)
            h = rms_norm(hs[i], module["hnorm.weight"], eps)
            xs.append(module["eh_proj.weight"] @ np.concatenate((e, h)))  # Eq. 21
        xs = block(module, config, xs, dense=False)  # Eq. 22
        hs = [rms_norm(x, module["shared_head.norm.weight"], eps) for x in xs]
        further.append(np.array([head @ h for h in hs]))  # Eq. 23
    return logits, further
