"""model.py against independent references, on tiny models.

What has a fast twin in ops.py runs twice (`both_ways`): with the twins, and with the plain formulas
of model.py alone. Unless a line says otherwise both sides compute in float64, whose rounding is
1e-16. Through a few layers of sums of about ten terms of size 1 to 100 it grows to about 1e-13:
ATOL is 100 times that, while the smallest mistake that these tests are after (an epsilon) moves the
results by 1e-4.
"""

import functools
import math
from dataclasses import asdict

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

import fp8
import model as plain
from huggingface import checkpoint_views
from model import Cache, DeepSeekV3, Gate, ModelConfig, RMSNorm
from support import ops
from support.settings import Refusal

ATOL = 1e-11
# No two widths are equal, nor rms_norm_eps and the latent norms' 1e-6: exchanged ones show.
TINY = dict(
    vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=3,
    q_lora_rank=10, kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    intermediate_size=20, moe_intermediate_size=9, first_k_dense_replace=1, n_shared_experts=1,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    rms_norm_eps=1e-3, num_nextn_predict_layers=1,
)  # fmt: skip
YARN_PLAIN = dict(type="yarn", factor=8, original_max_position_embeddings=64)
YARN = YARN_PLAIN | dict(beta_fast=32, beta_slow=1, mscale=0.7, mscale_all_dim=1.3)
FAR = YARN | dict(original_max_position_embeddings=512)
VARIANTS = {
    "base": {},
    "no_query_latent": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN),
    "yarn_without_mscale": dict(rope_scaling=YARN_PLAIN),
    "yarn_beyond_the_last_pair": dict(rope_scaling=FAR, rope_theta=100.0),
    "half_split_rope": dict(rope_interleave=False, rope_theta=50000.0),
    "attention_bias": dict(attention_bias=True),
    "tied_embeddings": dict(tie_word_embeddings=True),
    "no_shared_expert": dict(n_shared_experts=0),
    "all_dense": dict(first_k_dense_replace=9),
    "all_moe": dict(first_k_dense_replace=0),
    "no_mtp": dict(num_nextn_predict_layers=0),
    "two_mtp_modules": dict(num_nextn_predict_layers=2),
    "wide_values": dict(v_head_dim=13),
}


@pytest.fixture(params=["twins", "a GPU's twins", "plain"])
def twins(request, monkeypatch):
    """A GPU's: what would be compiled there is not."""
    monkeypatch.setattr(ops, "enabled", request.param != "plain")
    if request.param == "a GPU's twins":
        monkeypatch.setattr(ops, "on_gpu", lambda x: True)
        monkeypatch.setattr(ops, "compiled", lambda function: function)


both_ways = pytest.mark.usefixtures("twins")


def tiny(dtype=torch.float64, **changes) -> DeepSeekV3:
    """A model in which everything matters: no norm is 1, no bias 0."""
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig(**(TINY | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim >= 2:
                x.normal_(std=1.5 * x.shape[-1] ** -0.5)
            else:
                x.normal_(0 if name.endswith("bias") else 1, 0.2)
        for gate in model.gates():
            gate.e_score_correction_bias.normal_(0, 0.3)
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


close = functools.partial(torch.testing.assert_close, rtol=0, atol=ATOL)


@functools.cache
def referenced(variant):
    """A model, tokens, the reference's logits and, a row of the list each, those of its MTP."""
    model = tiny(**VARIANTS[variant])
    tokens, c = tokens_of(model, 2, 9), asdict(model.config)
    w = {name: x.detach().double().numpy() for name, x in checkpoint_views(model)}
    logits, mtp = zip(*(reference.forward(w, c, row) for row in tokens.tolist()), strict=True)
    stacked = [torch.tensor(np.stack(x)) for x in (logits, *zip(*mtp, strict=True))]
    return model, tokens, stacked[0], stacked[1:]


def in_bf16(function, *args):
    with torch.autocast("cpu", torch.bfloat16):
        return function(*args)


def value_and_gradients(function, args, leaves):
    y = function(*args)
    direction = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)


# ---- The whole network ---------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_mtp_logits_equal_the_reference(variant):
    """Of short texts too: no output sees later tokens, and modules without any are left out."""
    model, tokens, logits, mtp = referenced(variant)
    for n in (9, 2, 1):
        with torch.no_grad():
            ours, ours_mtp = model(tokens[:, :n], return_mtp=True)
        assert {x.dtype for x in (ours, *ours_mtp)} == {torch.float64}
        close(ours, logits[:, :n])
        close(ours_mtp, [x[:, : n - k] for k, x in enumerate(mtp, 1) if n > k])
    close(model(tokens).detach(), logits)  # twins may differ where gradients are wanted


@torch.no_grad()
def in_pieces(model, tokens, chunks, as_tensor: bool = False) -> list:
    """Logits of the main model and of every MTP module on caches, of so many tokens at once; after
    the first, positions may be tensors, as in a graph."""
    B, depth, like, logits, at = len(tokens), len(model.mtp), model.norm.weight, [], 0
    cache, mtp_cache = (Cache(model.config, x, B, 16, like) for x in (model.layers, model.mtp))
    for n in chunks:
        start = torch.tensor(at) if as_tensor and at else at
        cache.length = start
        h = [model.trunk(tokens[:, at : at + n], cache)]
        for k in range(depth):
            mtp_cache.length = start
            later = tokens[:, at + k + 1 : at + k + 1 + n]
            h.append(model.predict_next(k, h[-1], later, mtp_cache))
        logits.append([model.logits(x) for x in h])
        at += n
    return [torch.cat(pieces, 1) for pieces in zip(*logits, strict=True)]


@both_ways
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_in_chunks_through_caches_equal_the_reference(variant, as_tensor):
    """Absorbed attention after the first token, in the main model and in the MTP modules."""
    model, tokens, logits, mtp = referenced(variant)
    ours = in_pieces(model, tokens, (1, 3, 1, 2), as_tensor)
    close(ours, [x[:, :7] for x in (logits, *mtp)])


# ---- Positions and cache -------------------------------------------------------------------------


@torch.no_grad()
def test_positions_survive_bf16():
    """bf16 has 8 bits, so positions above 256 would collapse, were the angles computed in it."""
    model = tiny(qk_nope_head_dim=1)
    h, mla = torch.randn(1, 60, 16).bfloat16(), model.layers[0].self_attn
    expected = mla(h.double(), model.rope(h.double(), 600))
    model.bfloat16()
    assert (mla(h, model.rope(h, 600)).double() - expected).norm() < 0.03 * expected.norm()


def cached_logits(model, tokens, chunks, cache):
    parts = tokens.split(chunks, 1)
    return torch.cat([model.logits(model.trunk(part, cache)) for part in parts], 1)


@torch.no_grad()
def test_cache_holds_c_and_r_numbers_a_token_and_nothing_else():
    """C + R numbers per token and layer, new ones in place of forgotten; overflow is refused."""
    model = tiny()
    tokens, other = tokens_of(model, 2, 9), tokens_of(model, 2, 9, seed=2)
    cache = Cache(model.config, model.layers, 2, 9, like=model.norm.weight)
    model.trunk(tokens, cache)
    cache.length = 5
    with pytest.raises(ValueError, match=r"^5 \+ 6 tokens exceed the cache of 9\.$"):
        model.trunk(other[:, :6], cache)
    mixed = torch.cat((tokens[:, :5], other[:, 5:]), 1)
    close(cached_logits(model, mixed[:, 5:], [2, 2], cache), model(mixed)[:, 5:])
    tensors = [x for x in (*vars(cache).values(), *cache.kept) if isinstance(x, torch.Tensor)]
    assert cache.length == 9 and [x.shape for x in tensors] == [(2, 9, 7 + 8)] * 3


# ---- Router --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 4)], ids=str)
def test_router_equals_a_loop(groups, norm):
    """Scores above and below one another in all ways, with biases of zero, of both signs, all
    negative (a mask of 0 in place of -inf would let masked experts win), and in half of the groups.
    The loop takes the weights from the scores alone, and ranks groups by their two best."""
    sizes = dict(hidden_size=8, n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm)
    gate = Gate(ModelConfig(**(TINY | sizes))).double().requires_grad_(False)
    gate.weight.copy_(torch.eye(8))  # so that the scores are s for the input logit(s)
    scores, mixed = torch.rand(50, 8).double(), torch.randn(8) / 2
    for bias in (0 * mixed, mixed, mixed - 5, mixed - torch.tensor([5] * 4 + [0] * 4)):
        gate.e_score_correction_bias.copy_(bias)
        s, chosen, weight = gate(scores.logit())
        close(s, scores)
        rows = zip(scores.tolist(), chosen.tolist(), weight.tolist(), strict=True)
        for row, experts, gains in rows:
            expected = reference.route(asdict(gate.config), row, bias.double().tolist())
            assert dict(zip(experts, gains, strict=True)) == pytest.approx(expected, abs=ATOL)


def biases(model):
    return torch.stack([gate.e_score_correction_bias.clone() for gate in model.gates()])


def test_bias_is_no_parameter_and_stays_float32_and_unrounded_in_every_cast():
    model = tiny(torch.float32)
    assert not any("correction_bias" in name for name, _ in model.named_parameters())
    before = biases(model)
    for cast in (model.bfloat16, model.half, model.double, model.float):
        cast()
        assert biases(model).dtype == torch.float32 and torch.equal(biases(model), before)


@torch.no_grad()
def test_gate_computes_in_float32_under_autocast_and_in_a_bf16_model():
    gate, x = tiny(torch.float32).gates()[0], torch.randn(2, 5, 16)
    close(in_bf16(gate, x), gate(x), atol=0)
    gate.bfloat16()
    s, _, weight = gate(x.bfloat16())
    assert s.dtype == weight.dtype == torch.float32
    exact = F.linear(x.bfloat16().double(), gate.weight.double()).sigmoid()
    close(s.double(), exact, atol=1e-6)  # float32; bf16 would be off by 1e-3


# ---- Balancing without an auxiliary loss ---------------------------------------------------------


def test_counts_add_up_over_micro_batches_in_training_only():
    """Gates, counts and routing are in one order, the MTP modules last. No call moves a bias."""
    model = tiny(num_nextn_predict_layers=2)
    places = ("layers.1", "layers.2", "mtp.0.block", "mtp.1.block")
    assert model.gates() == [model.get_submodule(f"{place}.mlp.gate") for place in places]
    chosen, counts, before = [], torch.zeros(4, 8, dtype=torch.long), biases(model)
    for gate in model.gates():
        gate.register_forward_hook(lambda gate, args, out: chosen.append(out[1]))
    for seed in range(2):
        tokens = tokens_of(model, 2, 8, seed=seed)
        chosen.clear()
        model.train()(tokens, tokens)
        close(chosen, model.routing, atol=0)
        counts += torch.stack([x.flatten().bincount(minlength=8) for x in chosen])
        model.eval()(tokens, tokens)  # an evaluation between two micro-batches
    assert torch.equal(model.expert_counts, counts)
    assert torch.equal(biases(model), before)
    # What is kept of a call holds no graph: activations would live until the next one.
    model.train()(tokens, tokens)
    kept = [*model.mtp_losses, *model.routing, model.expert_counts]
    assert len(kept) == 2 + 4 + 1 and model.scores == []
    assert not any(x.requires_grad or x.grad_fn for x in kept)


def test_bias_moves_by_the_sign_of_mean_minus_load():
    """Up for fewer tokens than the mean of the expert's own layer, down for more, not at it,
    however many or few; every gate's, the MTP module's included. Then counts start anew."""
    model = tiny()
    before = biases(model)
    model.expert_counts[:] = torch.tensor([4, 4, 4, 4, 3, 5, 0, 8])
    model.expert_counts *= torch.tensor([[1], [10], [100]])
    model.update_bias(0.125)
    signs = torch.tensor([0, 0, 0, 0, 1, -1, 1, -1])
    assert torch.equal(biases(model), before + 0.125 * signs)
    assert not model.expert_counts.any()


@both_ways
def test_recomputing_activations_changes_neither_gradients_nor_counts():
    model = tiny(num_nextn_predict_layers=2).train()
    tokens, targets = tokens_of(model, 2, 8), tokens_of(model, 2, 8, seed=2)
    results, calls = [], []
    model.gates()[0].register_forward_hook(lambda *_: calls.append(model.recompute))
    for model.recompute in (False, True):
        losses = [*model(tokens, targets).values()]
        gradients = torch.autograd.grad(sum(losses), list(model.parameters()))
        results.append([*(x.detach() for x in losses), *gradients, model.expert_counts.clone()])
        model.expert_counts.zero_()
    assert calls == [False, True, True]  # it did recompute: the gate ran again in backward
    assert model.scores == [] and len(model.routing) == 4  # scores would hold the graph
    close(*results)


# ---- Losses --------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("ignored", [[], [(0, 0), (0, 5), (1, 3), (1, 7)]], ids=["all", "some"])
@torch.no_grad()
def test_losses_are_cross_entropies_of_hand_built_targets(depth, ignored):
    """text[i] is input i, text[i+1] its target; row i of mtp_k is compared with text[i+1+k]. The
    balance loss is the mean of all MoE layers, of scores without biases."""
    model, scores = tiny(num_nextn_predict_layers=depth), []
    text = tokens_of(model, 2, 9)
    tokens, targets = text[:, :-1], text[:, 1:].clone()
    for b, i in ignored:
        targets[b, i] = -1
    logits, mtp = model(tokens, return_mtp=True)
    means = []
    for k, z in enumerate([logits, *mtp]):
        places = [(b, i) for b in (0, 1) for i in range(8 - k) if (b, i + k) not in ignored]
        losses = [z[b, i].logsumexp(0) - z[b, i, text[b, i + 1 + k]] for b, i in places]
        means.append(sum(losses) / len(losses))
    for gate in model.gates():
        gate.register_forward_hook(lambda g, x, _: scores.append((x[0] @ g.weight.T).sigmoid()))
    losses = model(tokens, targets)
    close(losses["loss"], means[0])
    close(losses["mtp_loss"], sum(means[1:], logits.new_zeros(())) / max(1, depth))
    balance = [sum(reference.balance(row.tolist(), 3) for row in s) / 2 for s in scores]
    assert len(balance) == 2 + depth
    expected = pytest.approx(sum(balance) / len(balance), abs=ATOL)
    assert losses["balance_loss"].item() == expected


@both_ways
def test_every_parameters_gradient_equals_finite_differences():
    """The slope of the training loss along a random direction in each parameter. A central
    difference of step d errs by d^2 + 1e-15 / d, here about 1e-10; no choice of experts flips."""
    changes = dict(attention_bias=True, tie_word_embeddings=True, num_nextn_predict_layers=2)
    model = tiny(num_hidden_layers=1, **changes).train()  # one dense, two with experts
    tokens, targets = tokens_of(model, 2, 8), tokens_of(model, 2, 8, seed=2)
    loss, d = lambda: sum(model(tokens, targets).values()), 1e-5
    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        direction, ends = torch.randn_like(p) / p.numel() ** 0.5, []
        with torch.no_grad():
            for step in (d, -2 * d):
                p += step * direction
                ends.append(loss())
            p += d * direction
        slope = (ends[0] - ends[1]) / (2 * d)
        assert abs((gradient * direction).sum() - slope) < 1e-6 * max(1, abs(slope)), name


# ---- Twins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[3, -1, 0, 10, 10, -100, 7], [-1] * 3], ids=["some", "none"])
def test_head_loss_in_chunks_has_the_value_and_gradients_of_its_formula(targets, monkeypatch):
    h, w = (torch.randn(n, 6).double().requires_grad_() for n in (len(targets), 11))
    args, leaves = (h, w, torch.tensor(targets)), (h, w)
    expected = value_and_gradients(ops.FORMULAS[plain.head_loss], args, leaves)
    for rows in (2, 3, 100):
        monkeypatch.setattr(ops, "CPU_ROWS", rows)
        close(value_and_gradients(ops.head_loss, args, leaves), expected)


def by_a_loop(x, w, counts):
    parts = zip(x.split(counts.tolist()), w, strict=True)
    return torch.cat([x_e @ w_e.T for x_e, w_e in parts])


@pytest.mark.parametrize("width", [8, 6])
def test_grouped_products_equal_the_loop(width):
    """Width 8 is one call; 6 is not aligned; empty experts get zero gradients."""
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((10, width), (6, 8, width)))
    counts = torch.tensor([3, 0, 4, 0, 0, 3])
    ours, theirs = (
        value_and_gradients(f, (x, w, counts), (x, w)) for f in (ops.grouped_linear, by_a_loop)
    )
    close(ours, theirs, atol=1e-5)
    assert ours[2][counts == 0].eq(0).all()
    low = in_bf16(ops.grouped_linear, x, w, counts)
    assert (low - theirs[0]).norm() < 0.01 * theirs[0].norm()


@pytest.mark.parametrize("null", [False, True])
def test_experts_equal_the_loop_over_experts(null):
    """Value and every gradient, also where an expert has no token, where a choice is none of the
    experts, and of few tokens when no gradient can be asked for."""
    moe, x = tiny().layers[1].mlp, torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    _, chosen, gain = moe.gate(x)
    chosen = 2 * chosen - 1 if null else chosen % 7  # -1 to 13; or none goes to the last expert
    gain = gain.detach().requires_grad_()
    weights = moe.experts.gate_up_proj, moe.experts.down_proj
    args, leaves = (x, chosen, gain, *weights, plain.swiglu), (x, gain, *weights)
    expected = value_and_gradients(ops.FORMULAS[plain.routed_ffn], args, leaves)
    close(value_and_gradients(plain.routed_ffn, args, leaves), expected)
    with torch.inference_mode(), ops.laid_out(moe):
        for n in (1, 32, 33):
            few = (z[:n] for z in args[:3])
            close(plain.routed_ffn(*few, *args[3:]), expected[0][:n])


@both_ways
def test_twins_take_what_their_formulas_take():
    """As an edit may hand it over: a weight for each head's norm, or one for all; pairs that are no
    neighbours in memory; factors of two dtypes; queries that look at all, or have learnt scales;
    named arguments."""
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    rope = torch.rand(2, 5, 4, dtype=torch.float64).unbind()
    for function, *args in (
        (plain.rms_norm, x, torch.randn(3, 16).double(), 1e-3),
        (plain.rms_norm, x, torch.randn(1).double(), 1e-3),
        (plain.rotate, x[..., ::2], rope, True),
        (plain.swiglu, x.float(), x),
        (plain.causal_attention, x, x, x, 0.3, 4),
        (plain.causal_attention, x, x, x, torch.tensor(0.3)),
        (plain.causal_attention, x, x, x, torch.full((5, 1, 1), 0.3)),
    ):
        y, expected = function(*args), ops.FORMULAS[function](*args)
        assert y.dtype == expected.dtype
        close(y, expected, atol=1e-5 if function is plain.swiglu else ATOL)
    low = plain.causal_attention(x.float(), x.float(), x.bfloat16(), 0.3)
    assert low.dtype == torch.bfloat16
    h, targets = x[0, 0], torch.tensor([2, -1, 0])
    close(plain.head_loss(h, x[1, 0], targets=targets), plain.head_loss(h, x[1, 0], targets))


@pytest.mark.parametrize("in_a_graph", [False, True])
@torch.no_grad()
def test_attention_takes_what_its_formula_takes_while_a_text_is_written(in_a_graph, monkeypatch):
    """As an edit may hand it over: values of all heads, fewer texts, queries that are not the
    newest tokens, keys and values that share their memory in other ways; of long texts, too."""
    monkeypatch.setattr(ops, "open_texts", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: in_a_graph)
    q, kv = torch.randn(2, 4, 2, 12).double(), torch.randn(2, 1, 9, 12).double()
    one, k, v = q[:, :, :1], kv[..., :8], kv[..., ::2]
    for long in (2**14, 8):
        monkeypatch.setattr(ops, "LONG", long)
        for args in (
            (q, kv, torch.randn(2, 4, 9, 5).double()),
            (q, kv[:1], kv[:1, ..., :7]),
            (q[:1], kv, kv),
            (q, kv, v),
            (q[..., :8], k, kv),
            (one, kv, kv[..., :7]),
            *((x, kv, kv, start) for x in (q, one) for start in (3, torch.tensor(3))),
            *((x, kv, kv, 9 - x.shape[2]) for x in (q, one)),
        ):
            args = *args[:3], 0.3, *args[3:]
            y, expected = plain.causal_attention(*args), ops.FORMULAS[plain.causal_attention](*args)
            assert y.dtype == expected.dtype
            close(y, expected)


# ---- Experts -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("tokens, favour", [(130, 0), (70, 9), (1, 0)])
def test_experts_under_bf16_autocast_are_close_and_drop_no_token(tokens, favour):
    """Also with all tokens on the first three experts, and one token. Three bf16 roundings in a row
    make about 1 % of the norm; a row gone astray would be 100 %."""
    moe, x = tiny(torch.float32).layers[1].mlp, torch.randn(tokens, 16, requires_grad=True)
    moe.gate.config = ModelConfig(**(TINY | dict(n_group=1, topk_group=1)))
    moe.gate.e_score_correction_bias[:3] += favour
    args = lambda x: moe(x)[0], (x[None],), [x, *moe.parameters()]
    low, exact = in_bf16(value_and_gradients, *args), value_and_gradients(*args)
    for a, b in zip(low[1:], exact[1:], strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()
    deviation = (low[0] - exact[0]).norm(dim=-1)
    assert deviation.max() < 0.03 * exact[0].norm(dim=-1).max()


# ---- Norm, dtypes --------------------------------------------------------------------------------


def test_rms_norm_computes_in_float32_and_rounds_before_its_weight():
    norm, x = RMSNorm(64, 1e-3), torch.randn(4, 64).bfloat16()
    nn.init.normal_(norm.weight)
    norm.bfloat16()
    y = x.double()
    y = (y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight * y)
    assert in_bf16(RMSNorm(64, 1e-3), torch.randn(4, 64)).dtype == torch.bfloat16


@both_ways
def test_model_under_bf16_autocast_is_close_and_its_results_are_float32():
    """8 bits through 4 layers: 1 to 2 % whatever the seed. Caches in float32 and in bf16."""
    model = calm().train()
    tokens = tokens_of(model, 2, 8)
    exact, exact_losses = model(tokens).detach(), torch.stack([*model(tokens, tokens).values()])
    losses = torch.stack([*in_bf16(model, tokens, tokens).values()])
    for like in (exact, exact.bfloat16()):
        cache = Cache(model.config, model.layers, 2, 8, like)
        with torch.inference_mode():
            logits = in_bf16(cached_logits, model, tokens, [3, 1, 4], cache)
        assert logits.dtype == torch.float32
        assert (logits - exact).norm() < 0.05 * exact.norm()
    losses.sum().backward()
    torch.testing.assert_close(losses, exact_losses, rtol=0.05, atol=0)
    assert {p.grad.dtype for p in model.parameters()} == {losses.dtype} == {torch.float32}
    logits, mtp = model.bfloat16()(tokens, return_mtp=True)
    assert {x.dtype for x in (logits, *mtp, *model(tokens, tokens).values())} == {torch.float32}


# ---- Initialisation, sizes, refusals -------------------------------------------------------------


def test_what_the_report_initialises_is_initialised():
    """Linear layers, embedding, gates and experts have the stated deviation, biases are 0, norms 1.
    The mean square of n normals is within 5 sigma = 5 sqrt(2 / n) of its expectation."""
    sizes = dict(hidden_size=64, kv_lora_rank=32, q_lora_rank=48)
    model = DeepSeekV3(ModelConfig(**TINY | sizes, attention_bias=True, initializer_range=0.5))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            spread = p.double().square().mean() / 0.5**2
            assert abs(spread - 1) < 5 * math.sqrt(2 / p.numel()), name
    assert not biases(model).any()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(q_lora_rank=0), "q_lora_rank is 0"),
        (dict(qk_rope_head_dim=5), "qk_rope_head_dim is 5"),
        (dict(n_group=3), "n_group 3"),
        (dict(topk_group=5), "topk_group 5"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok 5"),
        (dict(n_group=8, topk_group=8), "n_group 8"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "linear"),
        (dict(rope_scaling=YARN | {"beta": 1}), "'beta'"),
        (dict(rope_scaling={"type": "yarn", "beta_fast": 32}), "'factor'"),
        (dict(rope_scaling=YARN | {"factor": [8]}), "['factor'] of the wrong type"),
        (dict(rope_scaling=YARN | {"factor": math.nan}), "'factor'"),
        (dict(rope_theta=1), "rope_theta is 1"),
        (dict(hidden_size=16.5), "hidden_size is 16.5"),
        (dict(initializer_range=-0.1), "initializer_range is -0.1"),
    ],
)
def test_impossible_configurations_are_refused_with_one_sentence(changes, words):
    with pytest.raises(Refusal) as error:
        ModelConfig(**(TINY | changes))
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- FP8 -----------------------------------------------------------------------------------------


def test_use_fp8_switches_projections_mlps_and_experts_and_nothing_else():
    model = tiny(torch.float32, attention_bias=True)
    keys = list(model.state_dict())
    kinds = {name: type(module) for name, module in model.named_modules()}
    fp8.use_fp8(model)
    assert list(model.state_dict()) == keys
    swap = {nn.Linear: fp8.FP8Linear, plain.MLP: fp8.FP8MLP, plain.Experts: fp8.FP8Experts}
    for name, module in model.named_modules():
        inside = ".self_attn." in name or ".mlp" in name
        assert type(module) is swap.get(kinds[name] if inside else None, kinds[name]), name


def test_fp8_is_close_to_full_precision_and_padding_does_not_change_it(monkeypatch):
    """4 bits (E4M3) in every product: 10 to 17 % of the logits' norm over seeds, where gate and up
    exchanged, or forgotten gate values, make 46 % and more. Padded rows change no number."""
    model = calm().train()
    tokens = tokens_of(model, 2, 8)

    def logits_losses_gradients():
        logits, losses = in_bf16(model, tokens).detach(), in_bf16(model, tokens, tokens).values()
        return [logits, *losses, *torch.autograd.grad(sum(losses), list(model.parameters()))]

    def errors(results, expected):
        return [(a - b).norm() / b.norm() for a, b in zip(results, expected, strict=True)]

    exact = logits_losses_gradients()
    fp8.use_fp8(model)
    results = logits_losses_gradients()
    logits, *losses = errors(results, exact)[:4]
    assert 0.02 < logits < 0.3 and max(losses) < 0.1
    assert all(x.isfinite().all() and x.norm() > 0 for x in results)

    def twice(*args, multiple):
        return ops.by_expert(*args, multiple=2 * multiple)

    monkeypatch.setattr(fp8, "by_expert", twice)
    assert max(errors(logits_losses_gradients(), results)) < 1e-5
