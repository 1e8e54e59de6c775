"""model.py against independent references, on tiny models.

Everything runs twice: with the plain formulas of model.py and with their fast twins of ops.py.
Unless a line says otherwise both sides compute in float64, whose rounding is 1e-16. Through a few
layers of sums of about ten terms of size 1 to 100 it grows to about 1e-13: ATOL is 100 times that,
while the smallest mistake that these tests are after (an epsilon) moves the results by 1e-4.
"""

import math
from dataclasses import asdict

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

import fp8
import model as plain
import ops
from huggingface import checkpoint_views
from model import (
    MLA,
    Cache,
    DeepSeekV3,
    Gate,
    ModelConfig,
    MoE,
    RMSNorm,
    balance_loss,
    rope_table,
)

ATOL = 1e-11
# No two sizes are equal, so that exchanged dimensions do not go unnoticed, and rms_norm_eps is
# large enough to be told from the latent norms' 1e-6.
TINY = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=7,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=20,
    moe_intermediate_size=9,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-3,
    num_nextn_predict_layers=1,
)
YARN = dict(
    type="yarn",
    factor=8,
    original_max_position_embeddings=64,
    beta_fast=32,
    beta_slow=1,
    mscale=0.7,
    mscale_all_dim=1.3,
)
YARN_PLAIN = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
VARIANTS = {
    "base": {},
    "no_groups": dict(n_group=1, topk_group=1),
    "one_group_kept": dict(n_group=2, topk_group=1),
    "no_query_latent": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN, qk_rope_head_dim=8),
    "yarn_without_mscale": dict(rope_scaling=YARN_PLAIN, qk_rope_head_dim=8),
    "yarn_beyond_the_last_pair": dict(
        rope_scaling=YARN | dict(original_max_position_embeddings=512),
        qk_rope_head_dim=8,
        rope_theta=100.0,
    ),
    "yarn_step": dict(rope_scaling=YARN | dict(beta_fast=1), qk_rope_head_dim=8),
    "half_split_rope": dict(rope_interleave=False, rope_theta=50000.0),
    "attention_bias": dict(attention_bias=True),
    "no_norm_topk_prob": dict(norm_topk_prob=False),
    "tied_embeddings": dict(tie_word_embeddings=True),
    "no_shared_expert": dict(n_shared_experts=0),
    "two_shared_experts": dict(n_shared_experts=2),
    "all_dense": dict(first_k_dense_replace=9),
    "all_moe": dict(first_k_dense_replace=0),
    "no_mtp": dict(num_nextn_predict_layers=0),
    "two_mtp_modules": dict(num_nextn_predict_layers=2),
    "wide_values": dict(v_head_dim=13),
}
ATTENTION_VARIANTS = (
    "base", "no_query_latent", "yarn", "half_split_rope", "attention_bias", "wide_values"
)  # fmt: skip


@pytest.fixture(params=[True, False], ids=["twins", "plain"], autouse=True)
def both_ways(request, monkeypatch):
    monkeypatch.setattr(ops, "enabled", request.param)


def tiny(dtype=torch.float64, bias=0.0, **changes) -> DeepSeekV3:
    """A model in which everything matters: no norm is 1, no bias 0; `bias` is the gates' mean."""
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig(**(TINY | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim >= 2:
                x.normal_(std=1.5 * x.shape[-1] ** -0.5)
            else:
                x.normal_(0 if name.endswith("bias") else 1, 0.2)
        for gate in model.gates():
            gate.e_score_correction_bias.normal_(bias, 0.3)
    return model


def calm() -> DeepSeekV3:
    """A float32 model to be run in low precision: every token goes to every expert, so rounding
    flips no choice, and the matrices are halved, so the layers hardly amplify it."""
    model = tiny(torch.float32, n_group=1, topk_group=1, num_experts_per_tok=8)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim >= 2 and "embed" not in name:
                x *= 0.5
    return model


def tokens_of(model, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def close(a, b, atol=ATOL):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


def released(model) -> dict:
    return {name: x.detach().double().numpy() for name, x in checkpoint_views(model)}


# ---- The whole network ---------------------------------------------------------------------------


def check_against_reference(model):
    tokens = tokens_of(model, 2, 9)
    w, c = released(model), asdict(model.config)
    with torch.no_grad():
        logits, mtp = model(tokens, return_mtp=True)
        close(model(tokens), logits, atol=0)
    close(model(tokens).detach(), logits)  # twins may differ where gradients are wanted
    assert len(mtp) == model.config.num_nextn_predict_layers
    for b, row in enumerate(tokens.tolist()):
        expected, expected_mtp = reference.forward(w, c, row)
        close(logits[b], expected)
        for ours, theirs in zip(mtp, expected_mtp, strict=True):
            close(ours[b], theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_mtp_logits_equal_the_reference(variant):
    check_against_reference(tiny(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["base", "one_group_kept", "no_norm_topk_prob"])
def test_logits_equal_the_reference_with_strongly_negative_biases(variant):
    check_against_reference(tiny(bias=-5.0, **VARIANTS[variant]))


def test_yarn_has_the_published_values_for_deepseek_v3():
    scaling = YARN | dict(factor=40, original_max_position_embeddings=4096, mscale=1.0)
    config = ModelConfig(rope_scaling=scaling | dict(mscale_all_dim=1.0), num_hidden_layers=1)
    with torch.device("meta"):
        assert MLA(config).scale == pytest.approx(0.13523, abs=1e-5)
    cos, _ = rope_table(config, torch.ones(1, dtype=torch.long), torch.float64)
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ratio = cos[0].acos() / plain  # the ramp runs from pair 10 to pair 23
    close(ratio[:11], torch.ones(11).double(), atol=1e-6)
    close(ratio[23:], torch.full((9,), 1 / 40).double(), atol=1e-3)
    assert 1 > ratio[11] > ratio[22] > 1 / 40 + 1e-3


# ---- Attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
@torch.no_grad()
def test_attention_alone_equals_its_equations(variant):
    model = tiny(**VARIANTS[variant])
    h = torch.randn(2, 8, 16, dtype=torch.float64)
    rope = rope_table(model.config, torch.arange(8), torch.float64)
    out = model.layers[1].self_attn(h, rope)
    name, c = "model.layers.1.self_attn", asdict(model.config)
    for b in range(2):
        expected, _ = reference.mla(released(model), name, c, list(h[b].numpy()))
        close(out[b], np.array(expected))


def cached_logits(model, tokens, chunks, cache=None):
    """The model's logits when its tokens come in chunks through a cache (the absorbed path)."""
    if cache is None:
        cache = Cache(model.config, len(model.layers), *tokens.shape, like=model.norm.weight)
    parts = tokens.split(chunks, 1)
    return torch.cat([model.logits(model.trunk(part, cache)) for part in parts], 1)


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [3, 1, 4, 2], [1, 9]], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
@torch.no_grad()
def test_absorbed_attention_equals_expanded_at_every_position(variant, batch, chunks):
    model = tiny(**VARIANTS[variant])
    tokens = tokens_of(model, batch, 10)
    close(cached_logits(model, tokens, chunks), model(tokens))


@torch.no_grad()
def test_forgotten_tokens_are_overwritten_and_never_seen():
    model = tiny()
    tokens, other = tokens_of(model, 2, 12), tokens_of(model, 2, 12, seed=2)
    cache = Cache(model.config, 3, 2, 12, like=model.norm.weight)
    model.trunk(tokens, cache)
    cache.length = 5
    mixed = torch.cat((tokens[:, :5], other[:, 5:]), 1)
    logits = [model.logits(model.trunk(other[:, i : i + 2], cache)) for i in (5, 7)]
    close(torch.cat(logits, 1), model(mixed)[:, 5:9])
    assert cache.length == 9


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 1, 4]], ids=str)
@torch.no_grad()
def test_mtp_modules_with_caches_equal_the_whole_forward(chunks):
    model = tiny(num_nextn_predict_layers=2)
    tokens = tokens_of(model, 2, 10)
    _, mtp = model(tokens, return_mtp=True)
    caches = [Cache(model.config, 2, 2, 8, like=model.norm.weight) for _ in range(2)]
    h, start = model.trunk(tokens), 0
    for n in chunks:
        x = h[:, start : start + n]
        for k, cache in enumerate(caches):
            x = model.predict_next(k, x, tokens[:, start + k + 1 : start + n + k + 1], cache)
            close(model.logits(x), mtp[k][:, start : start + n])
        start += n


@torch.no_grad()
def test_cache_holds_the_latent_and_the_rope_key_and_nothing_else():
    """Exactly C + R numbers per token and layer, with the values that the equations give."""
    model = tiny(num_hidden_layers=1)
    tokens = tokens_of(model, 2, 8)
    cache = Cache(model.config, 1, 2, 8, like=model.norm.weight)
    cached_logits(model, tokens, [3, 1, 4], cache)
    tensors = [x for x in (*vars(cache).values(), *cache.kv) if isinstance(x, torch.Tensor)]
    assert [x.numel() for x in tensors] == [1 * 2 * 8 * (7 + 4)]
    h = model.layers[0].input_layernorm(model.embed_tokens(tokens))
    for b in range(2):
        _, kv = reference.mla(
            released(model), "model.layers.0.self_attn", asdict(model.config), list(h[b].numpy())
        )
        close(cache.kv[0][b], np.array(kv))


@torch.no_grad()
def test_cache_refuses_to_overflow_and_stays_usable():
    model = tiny()
    tokens = tokens_of(model, 2, 8)
    cache = Cache(model.config, 3, 2, 8, like=model.norm.weight)
    model.trunk(tokens[:, :6], cache)
    with pytest.raises(ValueError, match=r"^6 \+ 3 tokens exceed the cache of 8\.$"):
        model.trunk(tokens[:, :3], cache)
    close(model.logits(model.trunk(tokens[:, 6:], cache)), model(tokens)[:, 6:])


def test_cache_numbers_of_deepseek_v3():
    assert ModelConfig().cache_numbers() == (35_136, 61 * 128 * (128 + 128))
    assert ModelConfig(**TINY).cache_numbers() == (3 * (7 + 4), 3 * 3 * (6 + 5))


@torch.no_grad()
def test_positions_survive_bf16():
    """bf16 has 8 bits, so positions above 256 would collapse, were the angles computed in it."""
    model = tiny(qk_nope_head_dim=1)
    h = torch.randn(1, 700, 16).bfloat16()
    mla = model.layers[0].self_attn
    expected = mla(h.double(), model.rope(h.double(), 0))
    model.bfloat16()
    out = mla(h, model.rope(h, 0)).double()
    assert (out - expected)[:, 300:].norm() < 0.03 * expected[:, 300:].norm()


# ---- No look into the future ---------------------------------------------------------------------


@torch.no_grad()
def test_changing_a_token_changes_no_earlier_output():
    """Main logits at i depend on tokens <= i; row i of mtp_k on tokens <= i + k, and on that one.

    Row j of the batch has token j changed.
    """
    model, T = tiny(num_nextn_predict_layers=2), 10
    tokens = tokens_of(model, 1, T)
    changed = tokens.repeat(T, 1)
    changed[range(T), range(T)] = (changed[range(T), range(T)] + 1) % 31
    logits, mtp = model(tokens, return_mtp=True)
    changed_logits, changed_mtp = model(changed, return_mtp=True)
    pairs = zip([logits, *mtp], [changed_logits, *changed_mtp], strict=True)
    for k, (before, after) in enumerate(pairs):
        for j in range(T):
            first = max(0, j - k)  # the first row that may depend on token j
            close(after[j, :first], before[0, :first])
            if first < T - k:
                assert (after[j, first] - before[0, first]).abs().max() > 1e-3


@torch.no_grad()
def test_every_prefix_gives_the_same_outputs_as_the_whole():
    model, T = tiny(num_nextn_predict_layers=2), 10
    tokens = tokens_of(model, 2, T)
    whole, whole_mtp = model(tokens, return_mtp=True)
    for n in range(1, T + 1):
        logits, mtp = model(tokens[:, :n], return_mtp=True)
        close(logits, whole[:, :n])
        assert len(mtp) == min(2, n - 1)
        for k, x in enumerate(mtp, start=1):
            close(x, whole_mtp[k - 1][:, : n - k])


# ---- Router --------------------------------------------------------------------------------------


def gate_with_scores(scores, bias, **changes):
    """A gate and an input whose scores are the given ones, (T, E): W = 1 and x = logit(s)."""
    s = torch.tensor(scores, dtype=torch.float64)
    E = s.shape[-1]
    config = ModelConfig(**(TINY | dict(hidden_size=E, n_routed_experts=E) | changes))
    gate = Gate(config).double()
    with torch.no_grad():
        gate.weight.copy_(torch.eye(E))
        gate.e_score_correction_bias.copy_(torch.tensor(bias))
    return gate, s.logit()[None]


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("bias", ["zero", "random", "negative", "two groups negative"])
@pytest.mark.parametrize("norm", [True, False])
def test_router_equals_a_loop(groups, bias, norm):
    torch.manual_seed(0)
    scores = torch.rand(50, 8).double()
    b = {
        "zero": torch.zeros(8),
        "random": torch.randn(8) / 2,
        "negative": torch.randn(8) / 2 - 5,
        "two groups negative": torch.randn(8) / 2 - torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]),
    }[bias]
    changes = dict(n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm)
    gate, x = gate_with_scores(scores.tolist(), b.tolist(), **changes)
    s, chosen, weight = gate(x)
    close(s[0], scores)
    for t in range(50):
        expected = reference.route(asdict(gate.config), scores[t].tolist(), b.double().tolist())
        ours = dict(zip(chosen[0, t].tolist(), weight[0, t].tolist(), strict=True))
        assert ours.keys() == expected.keys()
        assert ours == pytest.approx(expected, abs=ATOL)


def test_masked_groups_lose_even_against_negative_biases():
    """s + b is negative everywhere: a mask of 0 instead of -inf would let masked experts win."""
    gate, x = gate_with_scores(
        [[0.5] * 8], [-2.0] * 4 + [-3.0] * 4, n_group=2, topk_group=1, num_experts_per_tok=4
    )
    _, chosen, _ = gate(x)
    assert sorted(chosen.flatten().tolist()) == [0, 1, 2, 3]


def test_groups_are_ranked_by_their_two_best():
    """Group 0 has the best expert, group 1 the best pair, group 2 the best sum."""
    scores = [0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5]
    gate, x = gate_with_scores([scores], [0.0] * 12, n_group=3, topk_group=1, num_experts_per_tok=2)
    _, chosen, _ = gate(x)
    assert sorted(chosen.flatten().tolist()) == [4, 5]


def test_bias_chooses_but_does_not_weigh():
    """Experts 1 and 3 are chosen for their bias; their weights are s / sum s times the factor."""
    config = dict(n_group=1, topk_group=1, num_experts_per_tok=2)
    gate, x = gate_with_scores([[0.8, 0.2, 0.7, 0.6]], [0.0, 9.0, 0.0, 5.0], **config)
    _, chosen, weight = gate(x)
    ours = dict(zip(chosen.flatten().tolist(), weight.flatten().tolist(), strict=True))
    assert ours == pytest.approx({1: 2.5 * 0.2 / 0.8, 3: 2.5 * 0.6 / 0.8}, abs=ATOL)


def test_bias_is_no_parameter_and_gets_no_gradient():
    model = tiny().train()
    assert not any("correction_bias" in name for name, _ in model.named_parameters())
    tokens = tokens_of(model, 2, 8)
    sum(model(tokens, tokens)).backward()
    for gate in model.gates():
        assert gate.weight.grad.abs().max() > 0
        assert not gate.e_score_correction_bias.requires_grad
        assert gate.e_score_correction_bias.grad is None


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float64),
        lambda model: model.bfloat16().to(torch.float64).float(),
    ],
    ids=["bfloat16", "half", "double", "to bf16", "to cpu", "there and back"],
)
def test_bias_stays_float32_and_unrounded_in_every_cast(cast):
    model = tiny(torch.float32)
    before = [gate.e_score_correction_bias.clone() for gate in model.gates()]
    model = cast(model)
    for gate, value in zip(model.gates(), before, strict=True):
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, value)
        assert torch.equal(gate.state_dict()["e_score_correction_bias"], value)


def test_model_made_on_the_meta_device_materialises_whole():
    """Bias in float32, embedding and head one matrix, counts zero, as without the detour."""
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig(**TINY, tie_word_embeddings=True))
    model = model.bfloat16().materialize("cpu")
    assert {gate.e_score_correction_bias.dtype for gate in model.gates()} == {torch.float32}
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.expert_counts.shape == (3, 8) and not model.expert_counts.any()


@torch.no_grad()
def test_gate_computes_in_float32_under_autocast_and_in_a_bf16_model():
    gate, x = tiny(torch.float32).gates()[0], torch.randn(2, 5, 16)
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gate(x), expected, strict=True))
    gate.bfloat16()
    s, _, weight = gate(x.bfloat16())
    assert s.dtype == weight.dtype == torch.float32
    exact = F.linear(x.bfloat16().double(), gate.weight.double()).sigmoid()
    close(s.double(), exact, atol=1e-6)  # float32; bf16 would be off by 1e-3


# ---- Balancing without an auxiliary loss ---------------------------------------------------------


def biases(model):
    return torch.stack([gate.e_score_correction_bias.clone() for gate in model.gates()])


def record_gates(model):
    """Experts chosen by each gate, call by call, caught at the gate itself."""
    seen = [[] for _ in model.gates()]
    for gate, calls in zip(model.gates(), seen, strict=True):
        gate.register_forward_hook(lambda module, args, out, calls=calls: calls.append(out[1]))
    return seen


def count(calls, E=8):
    """How often each expert was chosen, by a loop."""
    number = [0] * E
    for chosen in calls:
        for e in chosen.flatten().tolist():
            number[e] += 1
    return torch.tensor(number)


def test_gates_counts_and_routing_are_in_one_order_with_mtp_last():
    model = tiny(num_nextn_predict_layers=2).train()
    names = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    assert names == [
        "layers.1.mlp.gate",
        "layers.2.mlp.gate",
        "mtp.0.block.mlp.gate",
        "mtp.1.block.mlp.gate",
    ]
    assert [dict(model.named_modules())[name] for name in names] == model.gates()
    seen = record_gates(model)
    tokens = tokens_of(model, 2, 8)
    model(tokens, tokens)
    assert [chosen.shape[1] for chosen in model.routing] == [8, 8, 7, 6]
    for calls, chosen, counts in zip(seen, model.routing, model.expert_counts, strict=True):
        assert torch.equal(calls[0], chosen)
        assert torch.equal(count(calls), counts)
    assert model.config.moe_layers == 4


def test_bias_update_follows_the_sign_of_the_load_over_all_micro_batches():
    """b += gamma for fewer tokens than the mean, -= gamma for more, 0 at the mean; every gate, the
    MTP module's included, from the counts of all micro-batches, which then start anew."""
    model, gamma = tiny().train(), 0.125
    seen, before = record_gates(model), biases(model)
    for seed in range(3):
        tokens = tokens_of(model, 2, 8, seed=seed)
        sum(model(tokens, tokens)).backward()
    assert torch.equal(biases(model), before)  # training calls alone leave them
    counts = torch.stack([count(calls) for calls in seen])
    assert torch.equal(model.expert_counts, counts)
    assert counts.sum(1).tolist() == [3 * 2 * 8 * 3] * 2 + [3 * 2 * 7 * 3]
    model.update_bias(gamma)
    for row, old, new in zip(counts.tolist(), before, biases(model), strict=True):
        mean = sum(row) / 8
        for e in range(8):
            step = gamma if row[e] < mean else -gamma if row[e] > mean else 0
            assert new[e].item() == (old[e] + step).item()
    assert model.expert_counts.abs().sum() == 0
    now = biases(model)
    model.update_bias(gamma)  # nothing counted, nothing moved
    assert torch.equal(biases(model), now)


def test_bias_of_an_evenly_loaded_expert_stays():
    """The mean is that of the expert's own layer, however many tokens the others saw."""
    model = tiny()
    before = biases(model)
    model.expert_counts[:] = torch.tensor([4, 4, 4, 4, 4, 4, 0, 8])
    model.expert_counts *= torch.tensor([[1], [10], [100]])
    model.update_bias(0.5)
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 0.5, -0.5])
    assert torch.equal(biases(model), before + expected)


def test_evaluation_counts_nothing_and_moves_no_bias():
    model = tiny()
    before, tokens = biases(model), tokens_of(model, 2, 8)
    model(tokens)
    model(tokens, tokens)
    model(tokens, return_mtp=True)
    assert model.expert_counts.abs().sum() == 0
    model.update_bias(0.5)
    assert torch.equal(biases(model), before)
    model.train()(tokens, tokens)
    counts = model.expert_counts.clone()
    model.eval()(tokens, tokens)  # an evaluation between two micro-batches
    assert torch.equal(model.expert_counts, counts)


def test_recomputing_activations_changes_neither_gradients_nor_counts():
    model = tiny(num_nextn_predict_layers=2).train()
    tokens, targets = tokens_of(model, 2, 8), tokens_of(model, 2, 8, seed=2)
    results = []
    for model.recompute in (False, True):
        model.zero_grad()
        model.expert_counts.zero_()
        calls = record_gates(model)
        losses = model(tokens, targets)
        sum(losses).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append((torch.stack(losses), gradients, model.expert_counts.clone()))
    assert len(calls[0]) == 2  # it did recompute: every gate ran again in backward
    assert not any("routing" in vars(gate) for gate in model.gates())  # it would hold the graph
    (losses, gradients, counts), (losses2, gradients2, counts2) = results
    close(losses, losses2)
    for a, b in zip(gradients, gradients2, strict=True):
        close(a, b)
    assert torch.equal(counts, counts2)


@torch.no_grad()
def test_repeated_updates_bring_a_skewed_router_into_balance():
    """MaxVio = max load / mean load - 1 starts near its largest value, E / K - 1, everywhere."""
    model = tiny(n_group=1, topk_group=1).train()
    for gate in model.gates():
        gate.e_score_correction_bias.copy_(torch.tensor([2, 2, 2, 0, 0, 0, 0, 0]))

    def max_vio(counts):
        return (counts.max(1).values / counts.float().mean(1) - 1).max().item()

    tokens = tokens_of(model, 8, 32)
    history = []
    for step in range(100):
        model(tokens, tokens)
        history.append(max_vio(model.expert_counts))
        model.update_bias(0.05 if step < 70 else 0.005)
    assert history[0] > 1.6 and history[-1] < 0.25, history


# ---- Balance loss --------------------------------------------------------------------------------


def test_balance_loss_is_one_when_even():
    """Token t prefers experts t, t+1, t+2: over E tokens every expert is chosen K times."""
    s = torch.stack([torch.tensor([0.9, 0.8, 0.7, 0.1, 0.1, 0.1]).roll(t) for t in range(6)])
    close(balance_loss(s.double()[None].repeat(2, 1, 1), 3), 1.0)


def test_balance_loss_equals_equations_17_to_20():
    s = torch.rand(3, 7, 6).double()
    expected = sum(reference.balance(row.tolist(), 2) for row in s) / 3
    close(balance_loss(s, 2), expected)
    # By hand, T = 2, E = 3, K = 1: f = (3, 0, 0), P = ((.5 + .6) / 2, ...).
    s = torch.tensor([[[0.5, 0.25, 0.25], [0.6, 0.2, 0.2]]], dtype=torch.float64)
    close(balance_loss(s, 1), 3 * 0.55)


def test_balance_loss_is_taken_per_sequence():
    """Each sequence uses its own half of the experts: even over the batch (1), not within it."""
    one, two = [0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]
    s = torch.tensor([[one] * 5, [two] * 5], dtype=torch.float64)
    close(balance_loss(s, 2), 2 * 0.9)  # f = (2, 2, 0, 0), P = s / 2
    assert balance_loss(s.flatten(0, 1)[None], 2).item() == pytest.approx(1)


def test_balance_loss_takes_the_scores_without_bias():
    model = tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    tokens = tokens_of(model, 2, 8)
    before, routing = model(tokens, tokens)[2], model.routing[0]
    model.gates()[0].e_score_correction_bias.copy_(torch.tensor([9.0, 9, 9, 0, 0, 0, 0, 0]))
    assert torch.equal(model(tokens, tokens)[2], before)
    assert not torch.equal(model.routing[0], routing)


def test_training_call_returns_the_mean_balance_loss_of_all_moe_layers():
    model = tiny(num_nextn_predict_layers=2)
    scores = []
    for gate in model.gates():
        gate.register_forward_hook(lambda module, args, out: scores.append(out[0]))
    tokens = tokens_of(model, 2, 8)
    balance = model(tokens, tokens)[2]
    expected = [sum(reference.balance(row.tolist(), 3) for row in s) / 2 for s in scores]
    assert len(expected) == 4
    close(balance, sum(expected) / 4)


def test_balance_loss_has_a_gradient_that_reaches_every_gate():
    model = tiny().train()
    tokens = tokens_of(model, 2, 8)
    model(tokens, tokens)[2].backward()
    assert all(gate.weight.grad.abs().max() > 1e-4 for gate in model.gates())
    s = torch.rand(2, 5, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: balance_loss(s, 2), s)


# ---- Targets of the main head and of the MTP heads -----------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("ignored", [[], [(0, 0), (0, 5), (1, 3), (1, 7)]], ids=["all", "some"])
@torch.no_grad()
def test_losses_are_cross_entropies_of_hand_built_targets(depth, ignored):
    """text[i] is input i, text[i+1] its target; row i of mtp_k is compared with text[i+1+k]."""
    model = tiny(num_nextn_predict_layers=depth)
    text = tokens_of(model, 2, 9)
    tokens, targets = text[:, :-1], text[:, 1:].clone()
    for b, i in ignored:
        targets[b, i] = -1
    logits, mtp = model(tokens, return_mtp=True)
    means = []
    for k, z in enumerate([logits, *mtp]):
        losses = [
            z[b, i].exp().sum().log() - z[b, i, text[b, i + 1 + k]]
            for b in range(2)
            for i in range(8 - k)
            if (b, i + k) not in ignored
        ]
        means.append(sum(losses) / len(losses))
    main, mtp_loss, _ = model(tokens, targets)
    close(main, means[0])
    close(mtp_loss, sum(means[1:]) / depth if depth else 0.0)


def test_main_head_learns_the_next_token_and_mtp_head_k_the_one_k_later():
    """Trained on counting (t, t+1, t+2, ...), the heads must say t+1, t+2 and t+3: labels that are
    shifted twice would teach them otherwise."""
    torch.manual_seed(0)
    config = TINY | dict(num_nextn_predict_layers=2, num_hidden_layers=1, initializer_range=0.1)
    model = DeepSeekV3(ModelConfig(**config)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    text = (torch.arange(31)[:, None] + torch.arange(7)) % 31
    for _ in range(60):
        main, mtp, _ = model(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        (main + mtp).backward()
        optimizer.step()
    logits, (mtp_1, mtp_2) = model.eval()(text[:, :-1], return_mtp=True)
    assert torch.equal(logits.argmax(-1), (text[:, :-1] + 1) % 31)
    assert torch.equal(mtp_1.argmax(-1), (text[:, :-2] + 2) % 31)
    assert torch.equal(mtp_2.argmax(-1), (text[:, :-3] + 3) % 31)


# ---- Twins ---------------------------------------------------------------------------------------


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


CHOSEN = torch.tensor([[2, 0], [0, 5], [2, 5], [0, 2], [5, 2]])  # experts 1, 3 and 4 are empty
ROWS, SLOTS, COUNTS = plain.sort_by_expert.__wrapped__(CHOSEN, 6)
TARGETS = torch.tensor([3, -1, 0, 10, 10, -1, 7])
TWINS = {
    "causal_attention": lambda: (
        numbers(2, 3, 6, 5),
        numbers(2, 3, 6, 5),
        numbers(2, 3, 6, 4),
        0.3,
    ),
    "dispatch": lambda: (numbers(5, 3), ROWS, SLOTS),
    "combine": lambda: (numbers(10, 3), ROWS, SLOTS),
    "head_loss": lambda: (numbers(7, 6), numbers(11, 6), TARGETS),
    "head_loss of nothing": lambda: (numbers(3, 6), numbers(11, 6), torch.full((3,), -1)),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_twins_have_the_values_and_gradients_of_their_formulas(name, chunk, monkeypatch):
    """Gradients against the formula's own and against finite differences."""
    if chunk < 100 and "head_loss" not in name:
        pytest.skip("only the head loss works in chunks")
    monkeypatch.setattr(ops, "CPU_ROWS", chunk)
    torch.manual_seed(0)
    args, name = TWINS[name](), name.split()[0]
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for function in (getattr(ops, name), getattr(plain, name).__wrapped__):
        y = function(*args)
        direction = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)
        results.append((y, *torch.autograd.grad((y * direction).sum(), leaves)))
    for twin, formula in zip(*results, strict=True):
        close(twin, formula)
    assert torch.autograd.gradcheck(getattr(ops, name), args)
    with torch.no_grad():
        close(getattr(ops, name)(*args), results[1][0])


def test_every_marked_formula_is_compared():
    functions = [x for x in vars(plain).values() if getattr(x, "__module__", "") == "model"]
    marked = {x.__name__ for x in functions if hasattr(x, "__wrapped__")} & vars(ops).keys()
    assert marked == {name.split()[0] for name in TWINS} | {"sort_by_expert", "grouped_linear"}


@pytest.mark.parametrize("width", [8, 6])
def test_grouped_products_equal_the_loop(width):
    """In float32, width 8 in one call, width 6 is not aligned; empty experts get zero gradients."""
    torch.manual_seed(0)
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((10, width), (6, 4, width)))
    assert (ops.grouped_linear(x, w, COUNTS) is NotImplemented) == (width == 6)
    results = []
    for function in (plain.grouped_linear, plain.grouped_linear.__wrapped__):
        y = function(x, w, COUNTS)
        results.append((y, *torch.autograd.grad(y.cos().sum(), (x, w))))
    for twin, formula in zip(*results, strict=True):
        close(twin, formula, atol=1e-5)
    assert results[0][2][COUNTS == 0].eq(0).all() and (COUNTS == 0).any()


def run_attention(low: bool) -> torch.Tensor:
    torch.manual_seed(0)
    attention = tiny().float().layers[0].self_attn
    h, g = torch.randn(2, 11, 16), torch.randn(2, 11, 16)
    rope = rope_table(attention.config, torch.arange(11), torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = attention(h, rope)
    gradients = torch.autograd.grad(y, attention.parameters(), g)
    return torch.cat([x.flatten() for x in (y, *gradients)])


@pytest.mark.parametrize("short", [512, 10])
def test_attention_in_bf16_is_close_for_short_and_long_windows(short, monkeypatch):
    """Short windows on a CPU write their scores out, in bf16: 8 bits, a few roundings."""
    exact = run_attention(low=False)
    monkeypatch.setattr(ops, "SHORT", short)
    assert (run_attention(low=True) - exact).norm() < 0.02 * exact.norm()


def test_head_loss_under_autocast_is_close_and_its_weight_gradient_is_float32():
    """bf16 keeps 8 bits: 0.4 % per product, and less in a mean over 200 rows."""
    model = tiny(torch.float32)
    h, targets = torch.randn(200, 16, requires_grad=True), tokens_of(model, 200)
    inputs = (h, model.lm_head.weight)
    loss = plain.head_loss(*inputs, targets)
    dh, dw = torch.autograd.grad(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss16 = plain.head_loss(*inputs, targets)
    dh16, dw16 = torch.autograd.grad(loss16, inputs)
    assert loss16.dtype == dw16.dtype == dh16.dtype == torch.float32
    z = h.bfloat16() @ model.lm_head.weight.bfloat16().T  # from here on all is float32
    close(loss16, F.cross_entropy(z.float(), targets), atol=1e-5)
    assert loss16.item() == pytest.approx(loss.item(), rel=1e-2)
    assert (dh16 - dh).norm() < 0.02 * dh.norm()
    assert (dw16 - dw).norm() < 0.02 * dw.norm()


# ---- Experts -------------------------------------------------------------------------------------


class Chosen(torch.nn.Module):
    """In the place of the gate: given experts and weights."""

    def __init__(self, chosen, weight, E=8):
        super().__init__()
        self.out = torch.zeros(1, len(chosen), E), chosen[None], weight[None]

    def forward(self, x):
        return self.out


def routed(tokens, K=3, empty=(), dtype=torch.float64):
    """A mixture of experts and its input: x, chosen (K different, none of `empty`), weight."""
    torch.manual_seed(0)
    moe = MoE(ModelConfig(**(TINY | dict(n_shared_experts=0)))).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    preference = torch.rand(tokens, 8)
    preference[:, list(empty)] = -1
    chosen = preference.topk(K).indices
    weight = torch.rand(tokens, K, dtype=dtype, requires_grad=True)
    return moe, x, chosen, weight


def run_moe(moe, x, chosen, weight):
    moe.gate = Chosen(chosen, weight)
    return moe(x[None])[0]


def loop_over_experts(moe, x, chosen, weight):
    """Eq. 12's routed sum, expert by expert, slot by slot."""
    experts, y = moe.experts, torch.zeros_like(x)
    F_ = experts.down_proj.shape[-1]
    for e in range(len(experts.down_proj)):
        gate, up = experts.gate_up_proj[e, :F_], experts.gate_up_proj[e, F_:]
        for k in range(chosen.shape[1]):
            rows = (chosen[:, k] == e).nonzero().flatten()
            out = (F.silu(x[rows] @ gate.T) * (x[rows] @ up.T)) @ experts.down_proj[e].T
            y = y.index_add(0, rows, weight[rows, k, None] * out)
    return y


def outputs_and_gradients(function, moe, x, chosen, weight):
    y = function(moe, x, chosen, weight)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    leaves = (x, weight, moe.experts.gate_up_proj, moe.experts.down_proj)
    return y, *torch.autograd.grad((y * direction).sum(), leaves)


@pytest.mark.parametrize(
    "tokens, K, empty",
    [(40, 3, ()), (40, 3, (0, 3, 7)), (33, 1, range(1, 8)), (1, 3, ()), (9, 8, ())],
)
def test_experts_equal_a_loop_over_experts(tokens, K, empty):
    """With empty experts, one token, all tokens on one expert (none dropped), all experts."""
    inputs = routed(tokens, K, empty)
    ours = outputs_and_gradients(run_moe, *inputs)
    theirs = outputs_and_gradients(loop_over_experts, *inputs)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    with torch.no_grad():
        close(run_moe(*inputs), theirs[0])
    assert ours[0].abs().sum(1).min() > 0  # no token came out empty


@pytest.mark.parametrize("tokens, empty", [(130, ()), (70, (0, 3, 7)), (1, ())])
def test_experts_in_bf16_are_close_to_the_loop(tokens, empty):
    """Three bf16 roundings in a row: about 1 % of the norm; a row gone astray would be 100 %."""
    inputs = routed(tokens, empty=empty, dtype=torch.float32)
    theirs = outputs_and_gradients(loop_over_experts, *inputs)
    moe, x, chosen, weight = inputs
    with torch.autocast("cpu", torch.bfloat16):
        y = run_moe(moe, x.bfloat16(), chosen, weight)
        ours = outputs_and_gradients(lambda *_: y.float(), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()
    y = run_moe(moe.bfloat16(), x.bfloat16(), chosen, weight).float()
    assert (y - theirs[0]).norm(dim=1).max() < 0.03 * theirs[0].norm(dim=1).max()


def test_padding_repeats_the_experts_last_row():
    """What FP8 scales and weight gradients see of the padding is a row that is there anyway."""
    with torch.autocast("cpu", torch.bfloat16):
        rows, slots, counts = ops.sort_by_expert(CHOSEN, 6)
    assert counts.tolist() == [64, 0, 64, 0, 0, 64]
    for e, part in zip((0, 2, 5), rows.split(64), strict=True):
        tokens = [t for t, experts in enumerate(CHOSEN.tolist()) if e in experts]
        assert part.tolist() == tokens + [tokens[-1]] * (64 - len(tokens))
    assert torch.equal(rows[slots], torch.arange(5)[:, None].expand(5, 2))
    expert_of_slot = torch.tensor([0, 2, 5]).repeat_interleave(64)
    assert torch.equal(expert_of_slot[slots], CHOSEN)


# ---- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["attention_bias", "tied_embeddings"])
def test_every_parameters_gradient_equals_finite_differences(variant):
    """The slope of the training loss along a random direction in each parameter. A central
    difference of step d errs by d^2 + 1e-15 / d, here about 1e-10; no choice of experts flips."""
    model = tiny(
        num_nextn_predict_layers=2, **VARIANTS[variant] | dict(num_hidden_layers=2)
    ).train()
    tokens, targets = tokens_of(model, 2, 8), tokens_of(model, 2, 8, seed=2)
    sum(model(tokens, targets)).backward()
    d = 1e-5
    for name, p in model.named_parameters():
        direction = torch.randn_like(p) / p.numel() ** 0.5
        with torch.no_grad():
            p.add_(d * direction)
            up = sum(model(tokens, targets))
            p.sub_(2 * d * direction)
            down = sum(model(tokens, targets))
            p.add_(d * direction)
        slope = (p.grad * direction).sum()
        assert abs((up - down) / (2 * d) - slope) < 1e-6 * max(1, abs(slope)), name


# ---- Norm, dtypes, initialisation, sizes ---------------------------------------------------------


def test_rms_norm_computes_in_float32_and_rounds_before_its_weight():
    norm, x = RMSNorm(64, 1e-3), torch.randn(4, 64).bfloat16()
    torch.nn.init.normal_(norm.weight)
    norm.bfloat16()
    y = x.double()
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight * y)
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(64, 1e-3)(torch.randn(4, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
@torch.no_grad()
def test_logits_and_losses_are_float32_or_the_models_float64(dtype, expected):
    model = tiny(dtype)
    tokens = tokens_of(model, 2, 8)
    logits, mtp = model(tokens, return_mtp=True)
    assert {x.dtype for x in (logits, *mtp, *model(tokens, tokens))} == {expected}
    assert logits.shape == (2, 8, 31) and mtp[0].shape == (2, 7, 31)
    assert cached_logits(model, tokens, [5, 3]).dtype == expected


def test_model_under_bf16_autocast_is_close_and_its_gradients_are_float32():
    """8 bits through 4 layers: 1 to 2 % whatever the seed."""
    model = calm().train()
    tokens = tokens_of(model, 2, 8)
    exact = torch.stack(model(tokens, tokens))
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack(model(tokens, tokens))
    losses.sum().backward()
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decoding_under_bf16_autocast_is_close_to_float32(cache_dtype):
    model = calm()
    tokens = tokens_of(model, 2, 10)
    exact = model(tokens)
    cache = Cache(model.config, 3, 2, 10, like=exact.to(cache_dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = cached_logits(model, tokens, [5, 1, 4], cache)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_initial_matrices_have_the_stated_std_norms_are_one_and_biases_zero():
    """The mean square of n >= 1000 normals is within 5 sigma = 5 sqrt(2 / n) of its expectation."""
    sizes = dict(hidden_size=64, n_routed_experts=16, kv_lora_rank=32, q_lora_rank=48)
    model = DeepSeekV3(ModelConfig(**(TINY | sizes), attention_bias=True))
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            assert (x == 0).all(), name
        elif x.ndim == 1:
            assert (x == 1).all(), name
        else:
            spread = x.double().square().mean() / 0.006**2
            assert abs(spread - 1) < 5 * math.sqrt(2 / x.numel()), name
    assert biases(model).abs().max() == 0
    assert DeepSeekV3(ModelConfig(initializer_range=0.02, **TINY)).norm.weight.eq(1).all()
    assert DeepSeekV3(ModelConfig(initializer_range=0.5, **TINY)).lm_head.weight.std() > 0.4


@pytest.mark.parametrize(
    "variant", ["base", "no_query_latent", "attention_bias", "tied_embeddings"]
)
def test_parameter_counts_equal_hand_counts(variant):
    model = tiny(**VARIANTS[variant])
    D, H, Q, C, N, R, V, vocabulary = 16, 3, 10, 7, 6, 4, 5, 31
    query = D * Q + Q + Q * H * (N + R)
    attention = query + D * (C + R) + C + C * H * (N + V) + H * V * D
    if variant == "no_query_latent":
        attention += D * H * (N + R) - query
    if variant == "attention_bias":
        attention += Q + (C + R) + D
    expert = 3 * D * 9
    dense, moe = 3 * D * 20, 8 * D + 8 + 8 * expert + expert  # gate, bias, routed, shared
    embeddings = vocabulary * D * (1 if variant == "tied_embeddings" else 2)
    layer = attention + 2 * D
    total = embeddings + 3 * layer + dense + 2 * moe + D
    assert model.parameter_counts() == {
        "total": total,
        "active": total - 2 * (8 - 3) * expert,
        "mtp": layer + moe + 2 * D * D + 3 * D,
    }


def test_parameter_counts_of_the_released_models():
    moonlight = ModelConfig(
        vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16,
        q_lora_rank=None, intermediate_size=11264, moe_intermediate_size=1408,
        first_k_dense_replace=1, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
        n_group=1, topk_group=1, num_nextn_predict_layers=0,
    )  # fmt: skip
    with torch.device("meta"):
        v3, moonlight = DeepSeekV3(ModelConfig()), DeepSeekV3(moonlight)
    assert v3.parameter_counts() == {
        "total": 671_026_419_200,
        "active": 37_552_297_472,
        "mtp": 11_610_068_224,
    }
    expected = {"total": 15_960_110_208, "active": 2_914_776_192, "mtp": 0}
    assert moonlight.parameter_counts() == expected


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(q_lora_rank=0), "q_lora_rank is 0"),
        (dict(n_shared_experts=-1), "n_shared_experts is -1"),
        (dict(qk_rope_head_dim=5), "qk_rope_head_dim is 5"),
        (dict(n_group=3), "n_routed_experts 8 is not a multiple of n_group 3"),
        (dict(topk_group=5), "topk_group 5 is larger than n_group 4"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok 5 exceeds the 4 of 2 groups"),
        (dict(n_group=8, topk_group=8), "n_group 8 leaves one expert a group"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "type 'linear'"),
        (dict(rope_scaling=YARN | {"beta": 1}), "['beta']"),
        (dict(rope_scaling=YARN | {"factor": "8"}), "['factor'] of the wrong type"),
        (dict(rope_scaling={"type": "yarn", "beta_fast": 32}), "lacks the yarn 'factor'"),
        (dict(hidden_size=16.5), "hidden_size is 16.5, but must be of type int."),
        (dict(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6', but must be of type float."),
        (dict(q_lora_rank="none"), "q_lora_rank is 'none', but must be of type int | None."),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_impossible_configurations_are_refused_with_one_sentence(changes, words):
    with pytest.raises(ValueError) as error:
        ModelConfig(**(TINY | changes))
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- FP8 -----------------------------------------------------------------------------------------


def test_use_fp8_switches_projections_mlps_and_experts_and_nothing_else():
    model = tiny(torch.float32, attention_bias=True)
    keys = list(model.state_dict())
    model.use_fp8()
    assert list(model.state_dict()) == keys
    kinds = {name: type(module) for name, module in model.named_modules()}
    expected = {}
    for block, dense in (("layers.0", 1), ("layers.1", 0), ("layers.2", 0), ("mtp.0.block", 0)):
        for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            expected[f"{block}.self_attn.{part}"] = fp8.FP8Linear
        mlp = f"{block}.mlp" if dense else f"{block}.mlp.shared_experts"
        expected[mlp] = fp8.FP8MLP
        for part in ("gate_proj", "up_proj", "down_proj"):
            expected[f"{mlp}.{part}"] = fp8.FP8Linear
        if not dense:
            expected[f"{block}.mlp.experts"] = fp8.FP8Experts
    assert {n: kind for n, kind in kinds.items() if kind.__module__ == "fp8"} == expected


def test_padding_does_not_change_fp8(monkeypatch):
    """The emulation's padded rows leave all scales, losses and gradients as they are without."""
    model = calm().train()
    model.use_fp8()
    tokens, results = tokens_of(model, 4, 50), []
    for sort in (ops.sort_by_expert, plain.sort_by_expert.__wrapped__):
        monkeypatch.setattr(plain, "sort_by_expert", sort)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(model(tokens, tokens))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((loss.detach(), gradients))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_fp8_runs_forward_and_backward_close_to_full_precision():
    """4 bits (E4M3) in every product: 10 to 17 % of the logits' norm over seeds, where gate and up
    exchanged, or forgotten gate values, make 46 % and more."""
    model = calm().train()
    tokens = tokens_of(model, 2, 8)
    logits, exact = model(tokens).detach(), torch.stack(model(tokens, tokens)).detach()
    model.use_fp8()
    difference = (model(tokens) - logits).norm() / logits.norm()
    assert 0.02 < difference < 0.3
    losses = torch.stack(model(tokens, tokens))
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0)
    losses.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
