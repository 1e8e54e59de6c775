"""Decoding: the Decoder is the model, speculation changes nothing but the speed, and the command
does what it says.

In float64 rounding never decides between two tokens: greedy texts must be exactly those of whole
forwards. Distributions are compared by chi-square tests with fixed seeds.
"""

import copy
import io
import itertools
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch._inductor.inductor_prims  # before torch.compiler.is_compiling is patched
from test_model import VARIANTS, tiny, tokens_of

import model as plain
import ops
import prepare_data
import sample
from config import run_command
from huggingface import load_model
from model import Cache, DeepSeekV3
from sample import MOST_DRAFTS, Stats, accept, generate, probabilities

COLOUR = re.compile(r"\033\[[\d;]*m")
LIMIT = 48  # max_position_embeddings
WORDS = [[3, 4, 5, 6], [7, 3, 8], [9, 10, 11, 12, 13], [14, 4, 9, 2]]


def small(**changes) -> DeepSeekV3:
    return tiny(**(dict(max_position_embeddings=LIMIT) | changes))


@pytest.fixture(scope="module")
def student() -> DeepSeekV3:
    """One MoE layer that has learned most of a language of four words in random order."""
    few = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    model = small(
        **few, vocab_size=24, hidden_size=32, num_hidden_layers=1, first_k_dense_replace=0,
        max_position_embeddings=400, num_nextn_predict_layers=2,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        picks = torch.randint(len(WORDS), (16, 16), generator=generator).tolist()
        rows = torch.tensor([[t for w in row for t in WORDS[w]][:33] for row in picks])
        main, mtp, _ = model(rows[:, :-1], rows[:, 1:])
        (main + 0.3 * mtp).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert main.item() < 0.8
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=[1, 2], ids=["one MTP module", "two MTP modules"])
def trained(request, student) -> DeepSeekV3:
    """The student with all or the first of its MTP modules."""
    model = copy.deepcopy(student)
    model.mtp = model.mtp[: request.param]
    model.config.num_nextn_predict_layers = request.param
    return model


def forgetful(model) -> DeepSeekV3:
    """Attention all but switched off: a token depends on the one before, so greedy text loops."""
    for layer in model.requires_grad_(False).layers:
        layer.self_attn.o_proj.weight.mul_(1e-3)
    return model


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


# ---- The Decoder ---------------------------------------------------------------------------------

# In TINY the absorbed projections are cheaper multiplied out; with a wide latent they stay apart.
DECODED = VARIANTS | dict(wide_latent=dict(kv_lora_rank=13, q_lora_rank=None))
del DECODED["attention_bias"]  # decoded by model.py
WAYS = {
    "all experts": DECODED,
    "packed": ("base", "no_shared_expert", "two_mtp_modules"),
    "chosen experts": ("base", "no_shared_expert", "two_mtp_modules"),
    "compiled": ("base", "wide_latent", "half_split_rope", "no_shared_expert", "two_mtp_modules"),
    "long": ("base", "wide_latent", "wide_values", "two_mtp_modules"),
}


@torch.no_grad()
def in_pieces(model, decoder, tokens, as_tensor: bool) -> list:
    """Logits of the main model and of every MTP module on caches: 5 tokens through the model, then
    1, 2, 4 and 1 at once through its Decoder."""
    B, depth, like, logits, at = len(tokens), len(model.mtp), model.norm.weight, [], 0
    cache, mtp_cache = (Cache(model.config, n, B, 16, like) for n in (len(model.layers), depth))
    for net, n in ((model, 5), *((decoder, n) for n in (1, 2, 4, 1))):
        start = torch.tensor(at) if as_tensor and net is decoder else at
        cache.length = start
        h = [net.trunk(tokens[:, at : at + n], cache)]
        for k in range(depth):
            mtp_cache.length = start
            later = tokens[:, at + k + 1 : at + k + 1 + n]
            h.append(net.predict_next(k, h[-1], later, mtp_cache))
        logits.append([net.logits(x) for x in h])
        at += n
    return [torch.cat(pieces, 1) for pieces in zip(*logits, strict=True)]


@pytest.mark.parametrize("way, name", [(way, name) for way in WAYS for name in WAYS[way]])
def test_decoder_equals_the_model(way, name, monkeypatch):
    """Its logits are those of whole forwards without caches: of one and of several tokens at an
    offset, of one row and of three; with all experts as one product and with the chosen ones, by
    oneDNN's products, the formulas of compiled graphs (run eagerly), and with a cache cut in three.
    """
    if way not in ("all experts", "packed"):
        monkeypatch.setattr(ops, "SMALL", 0)
    onednn = way in ("packed", "chosen experts")  # in float32
    if onednn:
        monkeypatch.setattr(ops, "LARGE", 1)
    if way == "long":
        monkeypatch.setattr(ops, "LONG", 8)
        monkeypatch.setattr(ops, "RECENT", 4)
    kinds = [(torch.float64, 1e-10, 3)]
    if name == "base" or onednn:
        kinds += [(torch.float64, 1e-10, 1), (torch.float32, 1e-5, 1), (torch.float32, 1e-5, 3)]
    for dtype, tolerance, B in kinds:
        model = small(dtype=dtype, **DECODED[name])
        decoder, depth = ops.Decoder(model, 30, way == "compiled"), len(model.mtp)
        assert decoder.head.is_mkldnn == (onednn and dtype == torch.float32 and ops.AVX512)
        tokens = tokens_of(model, B, 13 + depth)
        with torch.no_grad():
            main, mtp = model(tokens, return_mtp=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 3)
            patch.setattr(torch.compiler, "is_compiling", lambda: way == "compiled")
            ours = in_pieces(model, decoder, tokens, as_tensor=way == "compiled")
        assert len(ours) == 1 + depth and all(y.dtype == dtype for y in ours)
        for y, expected in zip(ours, [main, *mtp], strict=True):
            assert (y - expected[:, :13]).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("rows", [3, 20])
def test_products_in_a_graph(rows, dtype, tolerance, monkeypatch):
    """Few rows are loops, many the BLAS's; oneDNN's layout cannot be an input of a graph."""
    monkeypatch.setattr(ops, "LARGE", 1)
    x, w, operations = torch.randn(rows, 24, dtype=dtype), torch.randn(33, 24, dtype=dtype), []

    def backend(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    product = torch.compile(ops.product, fullgraph=True, dynamic=False, backend=backend)
    y, expected = product(x, ops.side_by_side(w, compiled=True)), x.double() @ w.double().T
    assert (y - expected).norm() < tolerance * expected.norm()
    assert not any("mkldnn" in name for name in operations)
    assert ("sum" in operations) == (rows == 3 and ops.AVX512)


def test_decoder_follows_the_weights():
    model = small().requires_grad_(False)
    for sign in (1, -1):
        model.layers[0].self_attn.o_proj.weight.mul_(sign)
        same_text(model, greedy(model, tokens_of(model, 1, 9), 12), 9)


ROTATE, GATE, MLA = plain.rotate, plain.Gate.forward, plain.MLA.forward


def squared(gate, x):
    s, chosen, weight = GATE(gate, x)
    return s, chosen, weight**2


def of_sequences(gate, x):
    return squared(gate, x.view(*x.shape[:2], 16))  # (B, T, D), as promised to a gate


CHANGES = {
    "rotation": (plain, "rotate", lambda x, rope, pairs: ROTATE(x, (rope[0], -rope[1]), pairs)),
    "attention": (plain.MLA, "forward", lambda self, *inputs: 2 * MLA(self, *inputs)),
    "gate": (plain.Gate, "forward", squared),
    "gate of sequences": (plain.Gate, "forward", of_sequences),
    "twins off": (ops, "enabled", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_formula_decodes_as_changed(name, monkeypatch, capsys):
    """Whoever edits model.py gets its text, with one line of notice where the Decoder cannot follow
    (it calls the model's own gate); nothing is compiled then. Nor with the twins turned off."""
    model = small()
    text = greedy(model, tokens_of(model, 2, 9), 12)
    monkeypatch.setattr(*CHANGES[name])
    changed = greedy(model, text[:, :9], 12)
    assert torch.equal(text, changed) == (name == "twins off")
    for drafts in (0, 2):
        same_text(model, changed, 9, speculative=drafts, compile="gate" not in name)
        notice = capsys.readouterr().err
        assert notice.count("\n") == notice.count("model.py") <= 1
        assert notice or name not in ("rotation", "attention")
        assert not notice or name not in ("gate", "twins off")


# ---- Greedy texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_text_is_that_of_whole_forwards(name):
    """To the end of the context, with a note of that and of the trained length."""
    model = small(**VARIANTS[name])
    model.trained_length = LIMIT - 8
    text = greedy(model, tokens_of(model, 2, 26), 99)
    assert text.shape[1] == LIMIT
    assert same_text(model, text[:, : LIMIT - 8], 30, speculative=2).note == ""
    stats = same_text(model, text[:, : LIMIT - 7], 30, speculative=3, lookup=False)
    assert f"beyond the {LIMIT - 8} tokens" in stats.note
    for T, drafts in ((26, "auto"), (LIMIT - 3, 4), (LIMIT, 4)):
        stats = same_text(model, text, T, speculative=drafts, new=30)
        assert f"context limit of {LIMIT}" in stats.note


CASES = ((1, 1, 8), (1, 6, 1), (2, 6, 2), (3, 9, 20), (4, 1, 12), (1, 20, 0), (1, 5, 60))


@pytest.fixture(scope="module")
def texts(student) -> list:
    return [(T, greedy(student, tokens_of(student, B, T), new)) for B, T, new in CASES]


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("drafts", [*range(MOST_DRAFTS + 1), "auto"])
def test_every_draft_length_is_lossless(trained, texts, drafts, lookup):
    for T, text in texts:
        stats = same_text(trained, text, T, speculative=drafts, lookup=lookup)
        assert stats.tokens == text[:, T:].numel()
    assert bool(stats.lookups) <= lookup
    if drafts == 0:
        assert stats.rounds == 60 and stats.lookups == sum(stats.drafted) == 0
    if drafts in (1, 2, 3) and not lookup:
        assert 0.4 < sum(stats.accepted) / sum(stats.drafted) < 1, stats
        # Every forward gives a token more than it keeps drafts; the last one may go too far.
        assert stats.rounds + sum(stats.accepted) in range(60, 60 + drafts + 1)


@pytest.mark.parametrize("kind", ["trained", "looping"])
@pytest.mark.parametrize("drafts", [0, 3, "auto"])
def test_end_of_text_pads_its_row_and_leaves_the_others_alone(student, drafts, kind):
    """Where drafts are made, and where the rows that go on look theirs up."""
    model = student
    if kind == "looping":
        model = forgetful(small(num_nextn_predict_layers=0, max_position_embeddings=400))
    tokens = tokens_of(model, 4, 6)
    free = greedy(model, tokens, 24)[:, 6:].tolist()
    for eos in (free[0][0], free[1][1], free[1][9], [free[2][5], free[3][7]], [23]):
        ends = [eos] if isinstance(eos, int) else eos
        out = generate(model, tokens, 24, temperature=0, speculative=drafts, eos_token_id=eos)
        for row, text in zip(out[:, 6:].tolist(), free, strict=True):
            cut = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
            assert row == text[:cut] + ends[:1] * (24 - cut)


def test_long_prompts_go_in_chunks(monkeypatch):
    model = small(max_position_embeddings=600, num_nextn_predict_layers=2)
    seen, trunk = [], model.trunk
    monkeypatch.setattr(
        model, "trunk", lambda x, *c: seen.append(len(c) * x.shape[1]) or trunk(x, *c)
    )
    text = greedy(model, tokens_of(model, 1, 530), 4)
    seen.clear()
    same_text(model, text, 530, speculative=2, lookup=False)
    assert seen == [512, 18, 16]  # and the text on which the Decoder is compared


def test_rows_advance_in_lockstep(trained):
    """All by the least number of kept drafts; those that have kept more wait."""
    got, text = [[], [], []], greedy(trained, tokens_of(trained, 3, 8), 40)
    stats = same_text(
        trained, text, 8, speculative=3, lookup=False,
        on_token=lambda row, ids, drafted: got[row].append((len(ids), drafted)),
    )  # fmt: skip
    assert [sum(n for n, _ in row) for row in got] == [40] * 3 and stats.tokens == 120
    rounds = list(zip(*got, strict=True))
    assert len(rounds) == stats.rounds < 39
    assert all(len({n for n, _ in rows}) == 1 for rows in rounds)
    assert 0 < sum(drafted for rows in rounds for _, drafted in rows) < sum(stats.accepted)


def test_looping_text_is_looked_up(capsys):
    """Fewer forwards give the same text, where there is no MTP module too."""
    model = forgetful(small(num_nextn_predict_layers=0, max_position_embeddings=400))
    text = greedy(model, tokens_of(model, 1, 6), 80)
    for lookup in (False, True):
        stats = same_text(model, text, 6, speculative=3, lookup=lookup)
        assert stats.rounds < 40 and stats.lookups > 8 if lookup else stats.rounds == 80
    assert sum(stats.accepted) > 0.9 * sum(stats.drafted) and capsys.readouterr().err == ""


def test_looked_up_is_what_followed_last():
    """Over its own end too."""
    assert sample.Row([1, 2, 3, 5, 1, 2, 3, 4, 1, 2, 3]).look_up(4) == [4, 1, 2, 3]
    assert sample.Row([8, 9, 9, 9, 9]).look_up(3) == [9, 9, 9]
    assert sample.Row([1, 2, 3]).look_up(4) == sample.Row([1, 2, 3, 4, 5, 6]).look_up(4) == []


@torch.inference_mode()
def test_mtp_modules_catch_up(trained):
    """After any rounds, drafted, rejected or plain, their caches are those after a prompt."""
    u, depth, greedily = torch.zeros(1, 9), len(trained.mtp), (0, None, None)
    text, n = sample.Text(trained, tokens_of(trained, 1, 9), 99, depth, False, greedily), 9
    for G in (4, 0, 0, 0, 0, 0, 0, 3, 2, 4):
        ((kept, *_),), _ = text.play(n, G, u, False)
        fresh = sample.Text(trained, text.tokens[:, :n], 99, depth, False, greedily)
        fresh.play(n, 4, u, False)
        for ours, theirs in zip(text.mtp_cache.kv, fresh.mtp_cache.kv, strict=True):
            assert G == 0 or torch.allclose(ours[:, : n - depth], theirs[:, : n - depth])
        n += kept + 1


# ---- Compiled rounds -----------------------------------------------------------------------------


COMPILE = torch.compile
SAMPLED = dict(temperature=0.8, top_k=5, speculative=1)


def operations(function, *, options, **settings):
    """torch.compile, but graphs run operation by operation: no C++ compiler, no half a minute."""
    options = {"guard_filter_fn": options["guard_filter_fn"]}
    return COMPILE(function, backend="eager", options=options, **settings)


@pytest.mark.parametrize("trained, way", [(2, "operations"), (1, "C++")], indirect=["trained"])
def test_compiled_rounds_give_the_same_texts_with_one_graph_each(trained, way, monkeypatch):
    """Greedy and sampled, drafted and looked up; one graph serves every position and later texts.
    In C++ one of them is enough."""
    if way == "operations":
        monkeypatch.setattr(torch, "compile", operations)
    elif not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    sample.GRAPHS.clear()  # of other tests
    counted = torch._dynamo.utils.counters["stats"]

    def check(graphs: int, T=5, model=trained, **options) -> Stats:
        before, runs, texts = counted["unique_graphs"], {}, []
        for compile in (False, True):
            runs[compile], generator = Stats(), torch.Generator().manual_seed(3)
            options |= dict(compile=compile, generator=generator, stats=runs[compile])
            texts.append(generate(model, tokens_of(model, 1, T), 40, **options))
        assert torch.equal(*texts), options
        assert counted["unique_graphs"] - before == graphs
        assert runs[False].accepted == runs[True].accepted
        return runs[True]

    if way == "C++":
        assert sum(check(1, **SAMPLED, lookup=False).accepted) > 5
        return
    assert check(2, **SAMPLED).lookups > 5  # drafted, and looked up
    assert 5 < sum(check(0, T=31, **SAMPLED | dict(temperature=1.2)).accepted) < 39
    assert sum(check(1, temperature=0, speculative=1, lookup=False).accepted) > 5
    check(0, T=1, temperature=0, speculative=1, lookup=False)
    other = copy.deepcopy(trained)  # a graph holds no weights
    for weight in (other.layers[0].self_attn.o_proj.weight, other.mtp[0].norm.weight):
        weight.neg_()
    check(0, model=other, temperature=0, speculative=1, lookup=False)
    # Without drafts there are no hidden states to keep, so this is a graph of its own.
    check(1, temperature=0, speculative=0)


@pytest.mark.parametrize("trained", [1], indirect=True)
def test_compilation_does_not_count_as_decoding(trained, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))

    def compiled(play, **options):
        for _ in range(1000):
            next(clock)
        return play

    monkeypatch.setattr(torch, "compile", compiled)
    sample.GRAPHS.clear()  # of other tests
    stats = Stats()
    generate(trained, tokens_of(trained, 1, 5), 40, compile=True, lookup=False, stats=stats)
    assert stats.seconds == stats.rounds  # a round begins and ends
    assert sum(stats.drafted) == 0  # compiled on a CPU, auto makes no drafts


# ---- Automatic draft length ----------------------------------------------------------------------


ROUNDS = itertools.count()


def write_text(pace, cost, kept, found=lambda at: False, new=500) -> tuple[float, list[int]]:
    """Seconds for `new` tokens, a plain one a second, and the drafts of every round. cost(G) is a
    round's seconds, kept(at, G, looked_up) the drafts it keeps."""
    seconds, at, drafts = 0.0, 0, []
    while at < new:
        looked_up = pace.may_look_up() and found(at)
        G = MOST_DRAFTS if looked_up else pace.drafts()
        tokens = min(1 + kept(at, G, looked_up), new - at)
        pace.learn(G, looked_up, cost(G), tokens)
        seconds, at, drafts = seconds + cost(G), at + tokens, [*drafts, G]
    return seconds, drafts


@pytest.mark.parametrize(
    "kept",
    [
        lambda at, G, looked_up: 0,
        lambda at, G, looked_up: G if at < 100 else 0,
        lambda at, G, looked_up: 0 if looked_up else min(G, next(ROUNDS) % 2),
    ],
    ids=["none", "none any more", "every other first one"],
)
@pytest.mark.parametrize("new", [100, 256, 1000])
def test_auto_is_hardly_slower_than_plain(kept, new):
    """Wherever drafts, looked up ones too, are not kept: by six plain rounds or 3 %."""
    pace = sample.Pace("auto", MOST_DRAFTS)
    seconds, drafts = write_text(pace, lambda G: 1 + 0.4 * G, kept, lambda at: at % 3 == 0, new)
    assert sum(drafts) > 0 and seconds < max(new + 6, 1.03 * new + 0.5)


@pytest.mark.parametrize("extra, right, best", [(0.5, 1, 1), (0.3, 2, 2), (0.1, 4, 4), (1.1, 4, 0)])
def test_auto_finds_the_fastest_length(extra, right, best):
    """Where the first `right` drafts are right, and a draft costs `extra` plain rounds."""
    pace = sample.Pace("auto", MOST_DRAFTS)
    _, drafts = write_text(pace, lambda G: 1 + extra * G, lambda at, G, _: min(G, right))
    assert drafts[-9:].count(best) >= 8


def test_auto_looks_up_where_that_pays():
    pace = sample.Pace("auto", 0)
    found, kept = lambda at: at % 2 == 0, lambda at, G, looked_up: 3 * looked_up
    seconds, _ = write_text(pace, lambda G: 1 + 0.2 * G, kept, found)
    assert seconds < 0.6 * 500
    pace = sample.Pace(3, 3)  # a fixed number is kept, whatever it costs
    assert set(write_text(pace, lambda G: 9, lambda *_: 0)[1]) == {3}


@pytest.mark.parametrize("sign", [1, -1])
def test_auto_follows_what_its_rounds_gave(student, sign, monkeypatch):
    """By a clock on which all rounds take as long, drafts that are never right are only tried."""
    clock, model, stats = itertools.count(), copy.deepcopy(student), Stats()
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    for mtp in model.mtp:
        mtp.norm.weight.mul_(sign)
    generate(model, tokens_of(model, 1, 5), 60, temperature=0, lookup=False, stats=stats)
    assert (stats.drafted == [16, 12, 8, 4]) == (sign < 0)


# ---- Sampling ------------------------------------------------------------------------------------


def test_filters_in_the_order_temperature_top_k_top_p():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64))

    def check(expected, *filters, **named):
        p = probabilities(logits, *filters, **named)
        assert torch.allclose(p, torch.tensor(expected, dtype=torch.float64))

    check([0.4, 0.3, 0.2, 0.06, 0.04], 1.0)
    check([4 / 9, 3 / 9, 2 / 9, 0, 0], 1.0, top_k=3)
    check([4 / 7, 3 / 7, 0, 0, 0], 1.0, top_p=0.5)  # the fewest with at least half
    # After top-k the two best have 7/9 = 0.78 >= 0.75; without it they would have 0.7.
    check([4 / 7, 3 / 7, 0, 0, 0], 1.0, top_k=3, top_p=0.75)
    check([1, 0, 0, 0, 0], 0.5, top_p=0.5)  # squares: 16 9 4 ... of 29.52; the best has 0.54
    check([1, 0, 0, 0, 0], 1.0, top_p=1e-9)


def p_value(counts, expected) -> float:
    """Of a chi-square test: counts (experiments, outcomes) against their expectations."""
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi2 = ((counts - expected) ** 2 / expected)[possible].sum().double()
    df = int((possible.sum(1) - 1).clamp(min=0).sum())
    return torch.special.gammaincc(torch.tensor(df / 2).double(), chi2 / 2).item()


def acceptance_test(rule, kind: str, N=1_000_000, V=3) -> float:
    """p-value of a million rounds of two drafts: whatever q is, what comes out is distributed as p,
    and the first draft stays with probability sum_x min(p, q). p and q depend on what is drafted
    before."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, V * V, V, generator=generator, dtype=torch.float64)
    if kind == "filtered":
        logits[:3, :, 0], logits[3:, :, 1] = -math.inf, -math.inf
    p, q = logits.softmax(-1).split([3, 2])
    if kind == "looked up":
        q = torch.eye(V, dtype=p.dtype)[p[:2].argmin(-1)]
    if kind == "q is p":
        q = p[:2]
    none = torch.zeros(N, dtype=torch.long)
    one = torch.multinomial(q[0, 0].expand(N, V), 1, True, generator=generator)[:, 0]
    two = torch.multinomial(q[1, one], 1, True, generator=generator)[:, 0]
    before = torch.stack((none, one, V * one + two), 1)  # (N, 3)
    level, u = torch.arange(3), torch.rand(N, 3, generator=generator, dtype=p.dtype)
    drafts = torch.stack((one, two), 1)
    kept, token = rule(p[level, before], q[level[:2], before[:, :2]], drafts, u)
    out = torch.cat((drafts, token), 1).scatter(1, kept[:, None], token)  # (N, 3), kept + 1 true
    counts = torch.zeros(3, V**3)
    for i in range(3):
        counts[i] = torch.bincount((before * V + out)[kept >= i, i], minlength=V**3)
    counts = counts.view(-1, V)
    stay = torch.minimum(p[0, 0], q[0, 0]).sum()
    kept_or_not = torch.bincount((kept > 0).long(), minlength=V)[None]
    expected = counts.sum(-1, keepdim=True) * p.view(-1, V)
    expected = torch.cat((expected, N * torch.stack((1 - stay, stay, 0 * stay))[None]))
    return p_value(torch.cat((counts, kept_or_not)), expected)


RULES = {
    "drawn again from p": lambda p, q, drafts, u: (
        kept := accept(p, q, drafts, u)[0],
        torch.multinomial(p[torch.arange(len(p)), kept], 1),
    ),
    "one percent more": lambda p, q, drafts, u: accept(1.01 * p, q, drafts, u),
}


@pytest.mark.parametrize("kind", ["drawn", "filtered", "looked up", "q is p", *RULES])
def test_what_is_accepted_has_the_exact_distribution(kind):
    """And wrong rules are caught."""
    p = acceptance_test(RULES.get(kind, accept), kind)
    assert p < 1e-6 if kind in RULES else p > 1e-3


SETTINGS = [
    (dict(temperature=1.5, top_k=2), dict(speculative=0)),
    (dict(temperature=1.0), dict(speculative=2, lookup=False)),
    (dict(temperature=1.5, top_k=3, top_p=0.9), dict(speculative=2, lookup=True)),
]


@pytest.mark.parametrize("setting, options", SETTINGS, ids=["plain", "MTP", "MTP and lookup"])
def test_texts_have_the_exact_distribution(setting, options, B=12, V=3, new=4, calls=200):
    """Whole texts, a few rows in lockstep at a time, against the distribution of all there are."""
    model = small(vocab_size=V, num_hidden_layers=1, max_position_embeddings=99)
    prompt, stats = tokens_of(model, 1, 12).expand(B, -1), Stats()
    texts = torch.tensor(list(itertools.product(range(V), repeat=new)))
    with torch.no_grad():
        logits = model(torch.cat((prompt[:1].expand(len(texts), -1), texts), 1))
    p = probabilities(logits[:, 11:-1], **setting)
    exact = p.gather(2, texts[..., None]).prod(1).flatten()
    assert abs(exact.sum() - 1) < 1e-9
    generator, counts = torch.Generator().manual_seed(7), torch.zeros(len(texts))
    options = options | setting | dict(generator=generator, stats=stats)
    for _ in range(calls):
        out = generate(model, prompt, new, **options)[:, 12:]
        number = (out * V ** torch.arange(new - 1, -1, -1)).sum(1)
        counts += torch.bincount(number, minlength=len(texts))
    assert p_value(counts[None], calls * B * exact[None]) > 1e-3
    assert sum(stats.accepted) < sum(stats.drafted) or options["speculative"] == 0
    assert (stats.lookups > 0) == options.get("lookup", False)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(tokens=torch.zeros(1, 0, dtype=torch.long)), "empty"),
        (dict(tokens=torch.zeros(1, LIMIT + 1, dtype=torch.long)), "context"),
        (dict(tokens=torch.tensor([[31]])), "31"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(temperature=math.nan), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(speculative="fast"), "fast"),
        (dict(), "not finite"),  # damaged weights
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(change, word):
    model, request = small(), dict(tokens=torch.tensor([[1]]), max_new_tokens=3) | change
    if word == "not finite":
        model.requires_grad_(False).norm.weight[3] = math.nan
    with pytest.raises(ValueError, match=word) as caught:
        generate(model, **request)
    assert "\n" not in str(caught.value)


# ---- The command ---------------------------------------------------------------------------------

TEXT = "def cosine(x):\n    return 'naïve café 😀'\n\n\nclass Größe:\n    pass\n" * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder as train.py leaves it."""
    folder, source = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("text") / "text.txt"
    source.write_text(TEXT)
    config = prepare_data.DataConfig(str(source), "run", str(folder), vocab_size=300)
    folder = prepare_data.prepare(config)
    vocab_size = prepare_data.load_tokenizer(folder).n_vocab
    model = forgetful(small(vocab_size=vocab_size, max_position_embeddings=64))
    saved = {"format": "nanov3", "model_config": asdict(model.config), "train_config": {}}
    torch.save(saved | {"model": model.state_dict(), "step": 1}, folder / "ckpt.pt")
    return folder


@pytest.fixture
def command(run, capsys):
    """Runs the command on that run: stdout and stderr."""

    def call(*options):
        sample.main([str(run), *options])
        return capsys.readouterr()

    return call


def test_text_goes_to_stdout_and_the_rest_to_stderr(command, monkeypatch):
    for source in ("--seed=2", "--prompt=Größe 😀"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Größe 😀".encode())))
        out, err = command("--max_new_tokens=20", "--num_samples=2", source)
        first, second = out.split("\n" + "-" * 80 + "\n")
        assert all(text.startswith("Größe 😀") for text in (first, second)) and first != second
        assert not COLOUR.search(out)
        for word in ("tokens/s", "multi-head attention would hold", " 180 bytes per token"):
            assert word in err


def test_draft_lengths_and_seeds(command):
    options = ("--prompt=class", "--temperature=0")
    plain, three, auto = (command(*options, f"--draft={draft}") for draft in ("0", "3", "auto"))
    assert plain.out == three.out == auto.out
    assert "context limit" in plain.err  # 256 tokens do not fit into 64
    assert "by position" in three.err and "by position" not in plain.err
    # A seed and a draft length fix a sampled text, here of a new document.
    texts = [command("--prompt=", "--draft=2", f"--seed={seed}").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("show", ["drafts", "experts"])
def test_colours_change_nothing_but_the_colour_and_have_a_legend(command, show):
    options = ("--prompt=class", "--temperature=0", "--draft=4", "--num_samples=2")
    off, on = command(*options), command(*options, f"--show={show}")
    assert COLOUR.sub("", on.out) == off.out != on.out
    legend = next(line for line in on.err.splitlines() if "\033" in line)
    colours, explained = (set(re.findall(r"\033\[[\d;]+m", text)) for text in (on.out, legend))
    assert colours <= explained and len(colours) >= (3 if show == "experts" else 2)


def test_text_appears_only_in_whole_characters(run, capsys, monkeypatch):
    """Bytes come one token at a time, and the end-of-text token is not written."""
    seen = []

    def bytes_of_text(model, tokens, new, *, on_token, eos_token_id, **options):
        for byte in [*"é😀".encode(), 0xF0, eos_token_id[0]]:
            seen.append(capsys.readouterr().out)
            on_token(0, [byte], 0)

    model, tokenizer, path = load_model(run)
    tokenizer = replace(tokenizer, texts={token: bytes([token]) for token in range(256)})
    monkeypatch.setattr(sample, "load_model", lambda *args: (model, tokenizer, path))
    monkeypatch.setattr(sample, "generate", bytes_of_text)
    sample.main([str(run), "--prompt=class"])
    assert seen == ["", "class", "é", "", "", "", "😀", ""]
    assert capsys.readouterr().out == "\ufffd\n"


def test_interactive(command, monkeypatch):
    """Every line is a new text; what fails does not end it, an empty line does."""
    lines = ["one", "x!" * 200, r"two\nlines", "", "three"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    done = command("--interactive", "--max_new_tokens=4")
    assert done.out.startswith("one") and "\ntwo\nlines" in done.out and "three" not in done.out
    assert done.err.count("error: ") == 1 and "context" in done.err


def test_an_interrupted_text_is_shown_as_far_as_it_came(command, monkeypatch):
    calls, trunk = itertools.count(), ops.Decoder.trunk

    def interrupted(*inputs):
        if next(calls) > 9:
            raise KeyboardInterrupt
        return trunk(*inputs)

    monkeypatch.setattr(ops.Decoder, "trunk", interrupted)
    done = command("--prompt=class", "--draft=0", "--num_samples=2")
    assert "tokens/s" in done.err
    first, second = done.out.split("-" * 80 + "\n")
    assert first.startswith("class") and second.startswith("class") and len(first) > 7


@pytest.mark.parametrize("bos", [None, 7])
def test_score_gives_half_a_window_before_every_token(run, tmp_path, capsys, monkeypatch, bos):
    """The text follows the end-of-text token, or the tokenizer's own beginning of a text."""
    model, tokenizer, path = load_model(run, dtype=torch.float64)
    ids = [tokenizer.eos[0] if bos is None else bos, *tokenizer.encode(TEXT[:400])]
    if bos is not None:
        tokenizer = replace(tokenizer, bos=bos, encode=lambda text: ids)
        monkeypatch.setattr(sample, "load_model", lambda *args: (model, tokenizer, path))
    for window in (8, 9, len(ids) - 1, 500):
        expected, done = 0.0, 1
        while done < len(ids):
            start = max(0, done - window // 2)
            with torch.no_grad():
                p = model(torch.tensor([ids[start : start + window]]))[0].log_softmax(-1)
            for i in range(done, min(start + window, len(ids) - 1) + 1):
                assert i - start >= min(i, window // 2)
                expected -= p[i - start - 1, ids[i]].item()
                done = i + 1
        assert abs(sample.score(model, ids, window) - expected) < 1e-8
    (tmp_path / "text").write_text(TEXT[:400])
    sample.main([str(run), f"--score={tmp_path / 'text'}", "--dtype=float64"])
    count, total = len(ids) - 1, sample.score(model, ids, 64)
    bits = total / math.log(2) / len(TEXT[:400].encode())
    expected = f"{count} tokens, {total / count:.4f} nats/token, {bits:.4f} bits/byte"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["nowhere", "--prompt=x"], 1, "nowhere"),
        ([], 2, "checkpoint"),
        (["{run}", "--top_k=x"], 2, "top_k"),
        (["{run}", "--draft=9"], 2, "draft"),
        (["{run}", "--prompt=x", "--device=warp"], 1, "warp"),
        (["{run}", "--dtype=int3"], 2, "int3"),
        (["{run}", "--score=nowhere"], 1, "nowhere"),
        (["{run}", "--prompt=x", "--num_samples=0"], 1, "num_samples"),
        (["{run}"], 1, "utf-8"),
    ],
)
def test_what_cannot_be_done_is_refused(run, args, code, words, monkeypatch, capsys):
    """In one sentence; bytes that are no text too, on standard input."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *(a.replace("{run}", str(run)) for a in args)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    with pytest.raises(SystemExit) as caught:
        run_command(sample.main)
    captured = capsys.readouterr()
    assert caught.value.code == code and words in captured.err and captured.out == ""
    assert "Traceback" not in captured.err
