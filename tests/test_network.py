"""Is this network right, whatever it is? Gradients are slopes, drafts change nothing but the speed,
what is patched runs, a resumed run and two processes give what one run gives. What check.py
compares (a cache, later tokens, gradients, losses, loads) is tested by it, in test_check.py.

All of this must hold after every right edit. Is it still DeepSeek-V3? test_deepseek.py.
In float64 rounding never decides between two tokens: greedy texts must be exactly those of whole
forwards.
"""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import (
    SIZES,
    YARN,
    biases,
    close,
    departure,
    in_bf16,
    student,
    tiny,
    tokens_of,
)
from torch import nn
from training import ROOT, assert_same_run, finish, load, run

import model as plain
import sample
from model import Cache, ModelConfig, causal_attention
from sample import MAX_DRAFTS, Stats, accept, draw, generate, probabilities
from support import graphs
from support.flops import flops_per_token
from support.settings import sentence_of
from support.sizes import cache_numbers, parameter_counts

LIMIT = 48  # max_position_embeddings


# ---- Forward and backward ------------------------------------------------------------------------


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


@pytest.mark.parametrize("start", [0, 3])
def test_heads_may_share_keys(start):
    """As an edit to grouped queries needs: heads 0 and 1 the first key, 2 and 3 the second."""
    q, k, v = (
        torch.randn(2, h, n, 6).double() for h, n in ((4, 5), (2, start + 5), (2, start + 5))
    )
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    seen = torch.ones_like(scores).tril(start) > 0
    expected = scores.where(seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    positions = torch.arange(start, start + 5) if start else None
    torch.testing.assert_close(causal_attention(q, k, v, 0.3, positions), expected)


@pytest.mark.parametrize("targets", [[3, -1, 0, 10, 10, -100, 7], [-1] * 3], ids=["some", "none"])
def test_targets_below_0_are_left_out(targets):
    logits, targets = torch.randn(len(targets), 11).double(), torch.tensor(targets)
    chosen = -logits.log_softmax(-1)[targets >= 0, targets[targets >= 0]]
    close(plain.cross_entropy(logits, targets), chosen.sum() / max(1, len(chosen)))


def test_model_under_bf16_autocast_is_close_and_its_results_are_float32():
    """8 bits through 4 layers: 1 to 2 % whatever the seed. Every token goes to every expert, so
    rounding flips no choice, and the matrices are halved, so the layers hardly amplify it."""
    model = tiny(torch.float32, n_group=1, topk_group=1, num_experts_per_tok=8).train()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x *= 0.5 if x.ndim >= 2 and "embed" not in name else 1
    tokens = tokens_of(model, 2, 8)
    exact, exact_losses = model(tokens), torch.stack([*model(tokens, tokens).values()])
    losses = torch.stack([*in_bf16(model, tokens, tokens).values()])
    assert (in_bf16(model, tokens) - exact).norm() < 0.05 * exact.norm()
    losses.sum().backward()
    torch.testing.assert_close(losses, exact_losses, rtol=0.05, atol=0)
    assert {p.grad.dtype for p in model.parameters()} == {losses.dtype} == {torch.float32}
    logits, mtp = model.bfloat16()(tokens, return_mtp=True)
    assert {x.dtype for x in (logits, *mtp, *model(tokens, tokens).values())} == {torch.float32}


# ---- Counts, biases, configurations --------------------------------------------------------------


def test_biases_move_by_the_sign_of_mean_minus_load_in_training():
    """Up for fewer tokens than the mean of the expert's own layer, down for more, whether few or
    many. Loads add up over micro-batches, and not in an evaluation; the MTP modules' layers have
    theirs. Then they start anew. No other call moves a bias."""
    model = tiny(num_nextn_predict_layers=2)
    places = ("layers.1", "layers.2", "mtp.0.block", "mtp.1.block")
    assert model.gates() == [model.get_submodule(f"{place}.mlp.gate") for place in places]
    before = biases(model)
    for _ in range(2):
        counts = torch.zeros(4, 8)
        for seed in range(3):
            tokens = tokens_of(model, 2, 8, seed=seed)
            model.train()(tokens, tokens)
            counts += torch.stack([x.flatten().bincount(minlength=8) for x in model.chosen])
            others = tokens_of(model, 2, 8, seed=9)
            model.eval()(others, others)  # an evaluation between two micro-batches
        assert torch.equal(biases(model), before)
        model.update_bias(0.125)
        before = before + 0.125 * (counts.mean(1, True) - counts).sign()
        assert torch.equal(biases(model), before)
    for gate in model.gates():
        gate.load.fill_(7)  # all have the mean
    model.update_bias(0.125)
    assert torch.equal(biases(model), before)


def test_nothing_that_is_kept_of_a_step_holds_its_graph():
    """Activations would live until the next step."""
    model = tiny(num_nextn_predict_layers=2).train()
    model(tokens_of(model, 2, 8), tokens_of(model, 2, 8))
    kept = torch.utils._pytree.tree_leaves([vars(module) for module in model.modules()])
    kept = [x for x in kept if isinstance(x, torch.Tensor)]
    assert len(kept) > 6 and not any(x.grad_fn for x in kept)


def test_bias_is_no_parameter_and_stays_float32_and_unrounded_in_every_cast():
    model = tiny(torch.float32)
    assert not any("correction_bias" in name for name, _ in model.named_parameters())
    before = biases(model)
    for cast in (model.bfloat16, model.half, model.double, model.float):
        cast()
        assert biases(model).dtype == torch.float32 and torch.equal(biases(model), before)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(q_lora_rank=0), "q_lora_rank is 0"),
        (dict(qk_rope_head_dim=5), "qk_rope_head_dim is 5"),
        (dict(topk_group=5), "topk_group 5"),
        (dict(num_experts_per_tok=5), "num_experts_per_tok 5"),
        (dict(n_group=8, topk_group=8), "n_group 8"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "linear"),
        (dict(rope_scaling=YARN | {"beta": 1}), "'beta'"),
        (dict(rope_scaling={"type": "yarn", "beta_fast": 32}), "'factor'"),
        (dict(rope_scaling=YARN | {"factor": math.nan}), "nan for 'factor'"),
        (dict(rope_scaling=YARN | {"beta_fast": -1}), "-1 for 'beta_fast'"),
        (dict(rope_scaling=[4]), "rope_scaling is [4]"),
        (dict(rope_theta=1), "rope_theta is 1"),
        (dict(initializer_range=-0.1), "initializer_range is -0.1"),
    ],
)
def test_impossible_configurations_are_refused_with_one_sentence(changes, words):
    with pytest.raises(ValueError) as error:
        ModelConfig(**(SIZES | changes))
    sentence = sentence_of(error.value)
    assert words in sentence and "\n" not in sentence


ALONE = f"""
import torch
from model import Cache, DeepSeekV3, ModelConfig

torch.manual_seed(0)
model, tokens = DeepSeekV3(ModelConfig(**{SIZES})), torch.arange(20).view(2, 10)
before = sum(model(tokens[:, :-1], tokens[:, 1:]).values())
before.backward()
torch.optim.SGD(model.parameters(), 0.1).step()
model.update_bias(0.01)
assert sum(model(tokens[:, :-1], tokens[:, 1:]).values()) < before
with torch.inference_mode():
    model.eval()
    cache = Cache(model.config, model.layers, 2, 10, model.norm.weight)
    hidden = torch.cat([model.trunk(x, cache) for x in tokens.split((6, 3, 1), 1)], 1)
    torch.testing.assert_close(model.logits(hidden), model(tokens), atol=1e-4, rtol=1e-4)
"""


def test_model_py_needs_nothing_but_torch(tmp_path):
    """A copy in another project builds a network, trains a step, and decodes with a cache."""
    shutil.copy(ROOT / "model.py", tmp_path)
    (tmp_path / "use.py").write_text(ALONE)
    python = [sys.executable, "-E", "use.py"]  # -E: without PYTHONPATH
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def outline_of(model, i):
    """The model with its layer i alone."""
    model = copy.copy(model)
    model._modules = {**model._modules, "layers": nn.ModuleList([model.layers[i]])}
    return model


@torch.no_grad()
def test_numbers_are_of_what_runs():
    """Of a layer that runs two and three times. (By hand: test_deepseek.py.)"""
    model = tiny(moe_intermediate_size=8, num_nextn_predict_layers=0, v_head_dim=14)
    flops, kept = [flops_per_token(model, 64)], [cache_numbers(model)]
    for _ in range(2):
        model.layers.append(model.layers[1])
        flops.append(flops_per_token(model, 64))
        kept.append(cache_numbers(model))
    block = model.layers[1].parameters()
    matrices = sum(x.numel() * (3 / 8 if x.ndim == 3 else 1) for x in block if x.ndim > 1)
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0])
    assert flops[1] - flops[0] > 6 * matrices
    first, layer = (cache_numbers(outline_of(model, i)) for i in (0, 1))  # may be a ring
    for i in range(3):
        assert kept[2][i] - kept[1][i] == kept[1][i] - kept[0][i] == layer[i]
    model.layers[0].new_cache = lambda *_: None  # a layer may keep nothing
    assert cache_numbers(model)[:2] == (kept[2][0] - first[0], kept[2][1] - first[1])
    counts = parameter_counts(model)
    model.table = nn.Embedding(9, 4)  # of a table a token uses a row
    more = {key: x - counts[key] for key, x in parameter_counts(model).items()}
    assert more == {"total": 36, "active": 4, "mtp": 0}


# ---- Greedy texts and drafts ---------------------------------------------------------------------


@torch.no_grad()
def greedy(model, tokens, new):
    """The text by whole forwards, without caches."""
    for _ in range(min(new, model.config.max_position_embeddings - tokens.shape[1])):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


def same_text(model, expected, T, **options) -> Stats:
    """Asserts that generate continues the first T tokens as expected."""
    stats, new = Stats(), options.pop("new", expected.shape[1] - T)
    out = generate(model, expected[:, :T], new, temperature=0, stats=stats, **options)
    assert out.dtype == torch.long and torch.equal(out, expected), options
    return stats


def test_greedy_text_is_that_of_whole_forwards():
    """To the end of the context, with a note of that and of the trained length."""
    model = tiny(max_position_embeddings=LIMIT)
    model.trained_length = LIMIT - 8
    text = greedy(model, tokens_of(model, 2, 26), 99)
    assert text.shape[1] == LIMIT
    assert same_text(model, text[:, : LIMIT - 8], 30, speculative=2).note == ""
    stats = same_text(model, text[:, : LIMIT - 7], 30, speculative=3)
    assert f"beyond the {LIMIT - 8} tokens" in stats.note
    for T, options in ((26, {}), (LIMIT - 3, dict(speculative=4)), (LIMIT, dict(speculative=4))):
        stats = same_text(model, text, T, new=30, **options)
        assert f"context limit of {LIMIT}" in stats.note
    stats = same_text(model, text, LIMIT - 4, speculative=2)  # it ends where the limit is
    assert f"beyond the {LIMIT - 8} tokens" in stats.note


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_every_draft_length_is_lossless(depth, capsys):
    model = student(depth)
    cases = ((1, 1, 8), (1, 6, 1), (2, 6, 2), (3, 9, 20), (4, 1, 12), (1, 20, 0), (1, 4, 60))
    for B, T, new in cases:
        text = greedy(model, tokens_of(model, B, T), new)
        if new == 60:  # one draft is the default
            counts = same_text(model, text, T).drafted
            assert [x > 0 for x in counts] == [depth > 0, False, False, False]
        for G in range(MAX_DRAFTS + 1):
            stats = same_text(model, text, T, speculative=G)
            assert stats.tokens == B * new
            if new == 2:  # the second round has room for one draft
                assert stats.drafted == [B * (min(depth, G) > 0), 0, 0, 0]
                assert stats.rounds == 2
            if new == 60:
                # Every forward gives a token besides its drafts; the last may have no room for it.
                assert stats.rounds + sum(stats.accepted) in (60, 61)
                if depth > 0 and G in (1, 2, 3) and not departure():  # the student is V3's
                    assert 0.4 < sum(stats.accepted) / sum(stats.drafted) < 1
    assert capsys.readouterr().err == ""


def test_a_round_may_have_fewer_drafts_than_asked_for(monkeypatch, T=4, new=60):
    draft, had = sample.Text.draft, []

    def shorter(text, n, u):
        q = draft(text, n, u)[:, : len(had) % 4]
        had.append(min(q.shape[1], T + new - n))  # no more than there is room for
        return q

    monkeypatch.setattr(sample.Text, "draft", shorter)
    model = student(1)
    stats = same_text(model, greedy(model, tokens_of(model, 1, T), new), T, speculative=4)
    assert stats.drafted == [sum(i < G for G in had) for i in range(MAX_DRAFTS)]
    assert sum(stats.accepted) > 0 and stats.rounds == 1 + len(had)


@pytest.mark.parametrize("drafts", [0, 2, 3])
def test_end_of_text_pads_its_row_and_leaves_the_others_alone(drafts):
    model = student(2)
    tokens = tokens_of(model, 4, 6)
    free = greedy(model, tokens, 24)[:, 6:].tolist()
    for eos in (free[0][0], free[1][1], free[1][9], [free[2][5], free[3][7]], [23]):
        ends = [eos] if isinstance(eos, int) else eos
        options, stats, new = dict(speculative=drafts, eos_token_id=eos), Stats(), 0
        out = generate(model, tokens, 24, temperature=0, stats=stats, **options)
        for row, text in zip(out[:, 6:].tolist(), free, strict=True):
            cut = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
            assert row == text[:cut] + ends[:1] * (24 - cut)
            new += cut
        assert stats.tokens == new  # without what pads them


def in_turn(model, k: int, hidden: list, tokens) -> torch.Tensor:
    """What module k makes of hidden states, one piece after the other: the first is of the model,
    and may have another width than its own."""
    cache = Cache(model.config, model.mtp, 1, tokens.shape[1], model.norm.weight)
    out, at = [], 0
    for h in hidden:
        cache.length, n = at, h.shape[1]
        out.append(model.predict_next(k, h, tokens[:, at : at + n], cache))
        at += n
    return torch.cat(out, 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.inference_mode()
def test_a_round_is_its_rule_by_whole_forwards_whatever_was_drafted_before(depth, n=12, G=4):
    """Module k reads the text k tokens later; the last one goes on with its own output. Every draft
    and every decision has a random number of its own. In rounds before, some were rejected."""
    model = tiny(num_nextn_predict_layers=depth)
    prompt, seen = tokens_of(model, 1, n), set()
    text = sample.Text(model, prompt, 300, G, sample.Filters(1.0))
    for keep in (0, 4, 1, 3, 2) * 5:
        u = torch.rand(1, 2 * G + 1, dtype=torch.float64)
        u[:, G:-1] = torch.where(torch.arange(G) < keep, 0.0, 0.9 + 0.1 * u[:, G:-1])
        q, tokens = text.draft(n, u), text.tokens[:, : n + G].clone()
        hidden = [model.trunk(tokens[:, :n])[:, :-1]]  # of positions 0 .. n-2
        for step in range(G):
            k = min(step + 1, depth)
            out = in_turn(model, k, hidden, tokens[:, k : n + step])
            expected = probabilities(model.logits(out)[:, -1:], 1.0)
            assert torch.allclose(q[:, step : step + 1], expected, atol=1e-12)
            assert torch.equal(tokens[:, n + step, None], draw(expected, u[:, step : step + 1]))
            hidden = [*hidden, out[:, -1:]] if k == depth else [out]
        p = probabilities(model(tokens)[:, n - 1 :], 1.0)
        (kept,), ((after,),) = (x.tolist() for x in accept(p, q, tokens[:, n:], u[:, G:]))
        (found,), (ids,) = (x.tolist() for x in text.verify(n, q, u))
        assert found == kept and ids[: kept + 1] == [*tokens[0, n : n + kept].tolist(), after]
        seen.add(kept)
        n += kept + 1
    assert seen == {*range(G + 1)}


@torch.inference_mode()
def test_a_token_reads_the_rows_in_use_whatever_room_there_is(monkeypatch):
    """And a cache that is full is left as it was."""
    model, read = tiny(), []
    attend = plain.causal_attention

    def counted(q, k, *rest):
        read.append(k.shape[2])
        return attend(q, k, *rest)

    monkeypatch.setattr(plain, "causal_attention", counted)
    generate(model, tokens_of(model, 1, 5), 30, speculative=1)
    assert max(read) <= 5 + 30 + 1  # the last round's draft
    cache = Cache(model.config, model.layers, 1, 8, model.norm.weight)
    model.trunk(tokens_of(model, 1, 6), cache)
    with pytest.raises(ValueError, match="6 \\+ 3 tokens exceed the cache of 8"):
        model.trunk(tokens_of(model, 1, 3), cache)
    assert cache.length == 6


# ---- Patches and compiled rounds -----------------------------------------------------------------


def reversed_up(self, x):
    return self.down_proj(plain.swiglu(self.gate_proj(x), self.up_proj(x).flip(-1)))


PATCHES = {  # of a model; patch is monkeypatch.setattr
    "a class's method": lambda model, patch: patch(plain.MLP, "forward", reversed_up),
    "a module's method": lambda model, patch: patch(
        model.layers[0].mlp, "forward", reversed_up.__get__(model.layers[0].mlp)
    ),
    "a hook": lambda model, patch: model.norm.register_forward_hook(lambda *x: -x[-1]),
    "an attribute": lambda model, patch: patch(model.layers[1].input_layernorm, "eps", 30),
    "weights, unseen by torch": lambda model, patch: model.lm_head.weight.data.neg_(),
}


def is_the_models_text(model: nn.Module, T: int = 20, new: int = 40, **options) -> bool:
    text = generate(model, tokens_of(model, 1, T), new, temperature=0, **options)
    with torch.no_grad():
        return torch.equal(text[0, T:], model(text)[0, T - 1 : -1].argmax(-1))


@pytest.fixture
def eager_graphs(monkeypatch):
    """Graphs run operation by operation, which needs no C++ and takes no minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *x, **y: compile(*x, **y | {"backend": "eager"}))


@pytest.mark.parametrize("apply", PATCHES.values(), ids=PATCHES)
def test_a_patch_at_run_time_is_what_writes_the_next_text(apply, eager_graphs, monkeypatch):
    """Also after texts by the unpatched network, one of which has left a graph behind."""
    compiled = dict(compile=True, speculative=0, new=20)
    model = tiny(max_position_embeddings=200)
    before = model(tokens_of(model, 1, 20))
    assert is_the_models_text(model) and is_the_models_text(model, **compiled)
    apply(model, monkeypatch.setattr)
    assert not torch.equal(model(tokens_of(model, 1, 20)), before)
    assert is_the_models_text(model)
    assert is_the_models_text(model, **compiled) and is_the_models_text(model, **compiled)


class Inheriting(plain.MLP):
    """All its methods are those of its base."""


def test_another_method_of_a_base_class_asks_for_another_graph(monkeypatch):
    """But not one of nn.Module, two of which torch replaces when it first compiles."""
    mlp = Inheriting(tiny().config, 8)
    before = graphs.methods(mlp)
    monkeypatch.setattr(nn.Module, "__dir__", lambda self: [])
    assert graphs.methods(mlp) == before
    monkeypatch.setattr(plain.MLP, "forward", lambda self, x: x)
    assert graphs.methods(mlp) != before


def texts(model, T=5, **options) -> Stats:
    """Asserts that the compiled text is the eager one; returns what it took."""
    runs, found = (Stats(), Stats()), []
    for compile, stats in zip((False, True), runs, strict=True):
        generator = torch.Generator().manual_seed(3)
        options |= dict(compile=compile, stats=stats, generator=generator)
        found.append(generate(model, tokens_of(model, 1, T), 40, **options))
    assert torch.equal(*found) and runs[0].accepted == runs[1].accepted, options
    return runs[1]


def test_a_graph_decodes_512_texts(eager_graphs, monkeypatch):
    """More would be sorted by expert, and the number of an expert's tokens is no fixed size."""
    model, sorts = student(0, vocab_size=5), plain.grouped_linear

    def eager_only(x, weight, counts):
        assert not torch.compiler.is_compiling()
        return sorts(x, weight, counts)

    monkeypatch.setattr(plain, "grouped_linear", eager_only)
    for part in model.modules():
        if isinstance(part, plain.Experts):
            part.product = eager_only
    prompts = tokens_of(model, 1, 5).expand(512, -1)
    texts = [generate(model, prompts, 2, compile=x, temperature=0) for x in (False, True)]
    assert torch.equal(*texts)


SAMPLED = dict(temperature=0.8, top_k=5, speculative=1)


def test_compiled_text_is_the_eager_one(eager_graphs):
    """Greedy and sampled; by default without drafts. A later text compiles nothing, whatever its
    prompt and whatever has become of the weights."""
    model, plain = student(2, vocab_size=5), Stats()
    assert sum(texts(model, **SAMPLED).accepted) > 5
    texts(model, **SAMPLED | dict(speculative=4))  # whose first rounds are eager
    greedily = dict(temperature=0, speculative=1)
    assert sum(texts(model, **greedily).accepted) > 5
    assert texts(model, **greedily | dict(speculative=0)).rounds == 40
    generate(model, tokens_of(model, 1, 5), 40, temperature=0, compile=True, stats=plain)
    assert plain.rounds == 40
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    for weight in (model.layers[0].self_attn.o_proj.weight, model.mtp[0].norm.weight):
        weight.neg_()
    texts(model, **greedily)
    assert counted["unique_graphs"] == before


def test_products_of_few_rows_as_sums_keep_float64():
    x, w = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 50), (2, 50, 20)))
    assert (graphs.bmm(x, w) - x @ w).abs().max() < 1e-13
    assert (graphs.mm(x[0], w[0]) - x[0] @ w[0]).abs().max() < 1e-13


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_graph_in_cpp_gives_the_same_text():
    graphs.compiled.cache_clear()  # the other tests' graphs run operation by operation
    assert sum(texts(student(1, vocab_size=5), **SAMPLED).accepted) > 5


# ---- Runs ----------------------------------------------------------------------------------------

CASES = {
    "bfloat16": ["--dtype=bfloat16"],
    "accumulation, tied": ["--dtype=float32", "--grad_accum=2", "--log_every=3"],
    "muon": ["--dtype=float32", "--optimizer=muon"],
    "long": ["--dtype=float32", "--long_block_size=32", "--long_start=0.5", "--log_every=3"],
}
CASES["accumulation, tied"] += ["--tie_word_embeddings"]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(options, shared, faults, capsys):
    # In the fifth step, between two lines of the log where these come every third step.
    faults.signal(signal.SIGTERM, step=4)
    with pytest.raises(KeyboardInterrupt):
        run(*options)
    said = capsys.readouterr().err
    assert "stopped at step 5" in said and "--resume" in said
    assert load("run")["step"] == 5
    with open("run/log.jsonl", "a") as file:  # what came after the checkpoint, and half a line
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    run(*options, "--resume")
    assert_same_run(shared(*options), Path("run"))


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "parallel, accumulate, optimizer",
    [("ddp", 2, "adamw"), ("fsdp", 2, "adamw"), ("ddp", 1, "muon")],
)
def test_two_processes_equal_one(parallel, accumulate, optimizer, start, shared):
    """All that is logged and saved, with MTP, and experts that a batch leaves without tokens."""
    options = ("--n_routed_experts=64", f"--optimizer={optimizer}")
    parts = (f"--parallel={parallel}", f"--grad_accum={accumulate}")
    finish(start(*options, *parts, world=2, out="together"))
    assert_same_run(shared(*options), Path("together"), 1e-9)
