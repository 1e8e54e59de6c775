"""Decoding: speculation changes nothing but the speed, and the command does what it says."""

import base64
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import prepare_data
import sample
from model import Cache, DeepSeekV3, ModelConfig
from sample import MOST_DRAFTS, DraftLength, Stats, generate, probabilities

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
WORDS = [[3, 4, 5, 6], [7, 3, 8], [9, 10, 11, 12, 13], [14, 4, 9, 2]]


def tiny_config(**changes) -> ModelConfig:
    small = dict(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        intermediate_size=48, moe_intermediate_size=16, first_k_dense_replace=1,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return ModelConfig(**(small | changes))


def random_model(seed=0, **changes) -> DeepSeekV3:
    torch.manual_seed(seed)
    return DeepSeekV3(tiny_config(**changes)).eval()


@pytest.fixture(scope="module", params=[1, 2], ids=["depth 1", "depth 2"])
def trained(request) -> DeepSeekV3:
    """A model that has learned most of a language of four words in random order."""
    torch.manual_seed(1)
    model = DeepSeekV3(tiny_config(initializer_range=0.05, num_nextn_predict_layers=request.param))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(120):
        picks = torch.randint(len(WORDS), (16, 16), generator=generator).tolist()
        rows = torch.tensor([[t for w in row for t in WORDS[w]][:33] for row in picks])
        main, mtp, _ = model(rows[:, :-1], rows[:, 1:])
        (main + 0.3 * mtp).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert main.item() < 0.8
    return model.eval()


def prompts(batch: int, length: int, vocab: int, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=generator)


def full_forward_greedy(model, tokens, new):
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens


# ---- Greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_greedy_is_the_argmax_of_the_full_forward(dtype):
    model = random_model().to(dtype)
    for length in (1, 7):
        tokens = prompts(2, length, 24)
        with torch.no_grad():
            expected = full_forward_greedy(model, tokens, 20)
        out = generate(model, tokens, 20, temperature=0, speculative=0)
        assert out.dtype == torch.long and torch.equal(out, expected)


def check_lossless(model):
    """Greedy decoding with every draft length equals plain greedy decoding; returns the stats of
    draft length 2 on one row."""
    V, limit = model.config.vocab_size, model.config.max_position_embeddings
    cases = [
        (prompts(1, 5, V), 24, {}),
        (prompts(1, 1, V), 8, {}),
        (prompts(3, 1, V, seed=2), 12, {}),
        (prompts(3, 9, V, seed=3), 20, {"lengths": [9, 1, 4]}),
        (prompts(2, limit - 3, V, seed=4), 10, {}),  # runs into the context limit
        (prompts(2, limit, V, seed=4), 10, {}),
        (prompts(3, limit - 9, V, seed=5), 20, {"lengths": [2, limit - 9, 1]}),
        (prompts(1, 6, V), 1, {}),
        (prompts(2, 6, V), 2, {}),
    ]
    for tokens, new, more in cases:
        plain = generate(model, tokens, new, temperature=0, speculative=0, **more)
        new_part = plain[:, tokens.shape[1] :].flatten().tolist()
        for eos in (None, *([new_part[len(new_part) // 2]] if new_part else [])):
            plain = generate(
                model, tokens, new, temperature=0, speculative=0, eos_token_id=eos, **more
            )
            for drafts in (1, 2, 3, 4) if eos is None else (3, "auto"):
                out = generate(
                    model, tokens, new, temperature=0, speculative=drafts, eos_token_id=eos, **more
                )
                assert torch.equal(out, plain), (drafts, eos, more, out, plain)
    stats = Stats()
    generate(model, prompts(1, 5, V), 50, temperature=0, speculative=2, stats=stats)
    return stats


@pytest.mark.parametrize("dtype, depth", [(torch.float64, 3), (torch.float32, 1)])
def test_speculation_is_lossless_on_a_random_model(dtype, depth):
    model = random_model(num_nextn_predict_layers=depth).to(dtype)
    with torch.no_grad():
        model.lm_head.weight *= 4
    check_lossless(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_speculation_is_lossless_on_a_trained_model(trained, dtype):
    stats = check_lossless(_as(trained, dtype))
    assert 0.5 < sum(stats.accepted) / sum(stats.drafted) < 1, stats


def _as(model, dtype):
    copy = DeepSeekV3(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_ragged_prompts_give_what_each_prompt_gives_alone(trained):
    tokens, lengths = prompts(4, 8, 24), [8, 1, 3, 6]
    for drafts in (0, 3):
        out = generate(trained, tokens, 20, temperature=0, speculative=drafts, lengths=lengths)
        for row, n in zip(range(4), lengths, strict=True):
            alone = generate(trained, tokens[row : row + 1, :n], 20, temperature=0, speculative=0)
            assert torch.equal(out[row, : n + 20], alone[0])
            assert (out[row, n + 20 :] == 0).all()


def test_prompt_in_chunks_equals_prompt_at_once(trained, monkeypatch):
    tokens, lengths = prompts(3, 40, 24), [40, 3, 17]
    expected = [
        generate(trained, tokens, 20, temperature=0, speculative=g, lengths=lengths) for g in (0, 2)
    ]
    monkeypatch.setattr(sample, "CHUNK", 7)
    seen, trunk = [], trained.trunk
    monkeypatch.setattr(trained, "trunk", lambda x, c: seen.append(x.shape[1]) or trunk(x, c))
    for g, out in zip((0, 2), expected, strict=True):
        assert torch.equal(
            out, generate(trained, tokens, 20, temperature=0, speculative=g, lengths=lengths)
        )
    assert seen[:6] == [7, 7, 7, 7, 7, 5]


def test_end_of_text_pads_the_row_and_leaves_the_others_alone(trained):
    tokens = prompts(3, 5, 24)
    free = generate(trained, tokens, 20, temperature=0, speculative=0)
    eos = free[0, 9].item()
    out = generate(trained, tokens, 20, temperature=0, speculative=2, eos_token_id=eos)
    for row, plain in zip(out[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        cut = plain.index(eos) if eos in plain else len(plain)
        assert row == plain[:cut] + [eos] * (20 - cut)


# ---- Cost ----------------------------------------------------------------------------------------


def test_no_accepted_token_is_computed_twice(trained, monkeypatch):
    rows, slots = [], []
    trunk, predict = trained.trunk, trained.predict_next
    monkeypatch.setattr(
        trained, "trunk", lambda x, c: rows.append((c.longest, x.shape[1])) or trunk(x, c)
    )
    monkeypatch.setattr(
        trained, "predict_next",
        lambda k, h, x, c: slots.append((k, c.longest, x.shape[1])) or predict(k, h, x, c),
    )  # fmt: skip
    T, new, depth = 6, 40, len(trained.mtp)
    for drafts in range(MOST_DRAFTS + 1):
        rows.clear(), slots.clear()
        stats = Stats()
        tokens = prompts(1, T, 24)
        generate(trained, tokens, new, temperature=0, speculative=drafts, stats=stats)
        rejected = sum(stats.drafted) - sum(stats.accepted)
        assert sum(n for _, n in rows) == T + new - 1 + rejected  # the last token needs no forward
        if drafts == 0:
            assert not slots
        if drafts and depth == 1:  # catching up begins exactly where it ended
            caught_up = [(at, n) for _, at, n in slots[1:]][:: max(1, drafts)]
            ends = [at + n for at, n in caught_up[: len(caught_up) // 2]]
            starts = [at for at, _ in caught_up[1 : len(ends) + 1]]
            assert ends == starts


def test_cache_holds_c_plus_r_numbers_and_nothing_else(trained, monkeypatch):
    made = []

    class Counted(Cache):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(sample, "Cache", Counted)
    stats, config = Stats(), trained.config
    generate(trained, prompts(2, 5, 24), 10, speculative=0, stats=stats)
    numbers = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert [sum(kv.numel() for kv in c.kv) for c in made] == [2 * 15 * numbers]
    assert stats.cache_bytes == stats.cache_slots * numbers * 4
    assert config.cache_numbers()[0] == numbers
    generate(trained, prompts(2, 5, 24), 10, speculative=3)
    assert sum(kv.numel() for kv in made[1].kv) == 2 * 18 * numbers
    assert len(made[2].kv) == len(trained.mtp)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_compiled_decoding_is_the_same_and_compiled_once():
    """One graph serves every cache length and every model of the same shape, and no other model."""
    model, twin, other = random_model(0), random_model(1), random_model(0, rms_norm_eps=0.5)
    torch._dynamo.reset()
    tokens, run = prompts(1, 5, 24), partial(generate, temperature=0)
    text = run(model, tokens, 30, speculative=0)
    assert not torch.equal(text, run(twin, tokens, 30))
    assert torch.equal(run(model, tokens, 30, speculative=0, compile=True), text)
    with torch._dynamo.config.patch(error_on_recompile=True):
        short = run(model, tokens, 8, speculative=0, compile=True)
        assert torch.equal(short, text[:, : short.shape[1]])
        assert torch.equal(
            run(twin, tokens, 30, speculative=0, compile=True), run(twin, tokens, 30)
        )
    for m, batch, drafts in ((other, 1, 0), (model, 2, 2)):
        tokens = prompts(batch, 5, 24)
        run = partial(generate, m, tokens, 20, temperature=0, speculative=drafts)
        assert torch.equal(run(compile=True), run())


def test_compilation_spares_long_lags_and_is_no_measure_of_drafts(trained, monkeypatch):
    shapes, learnt, stats = set(), [], torch._dynamo.utils.counters["stats"]

    def compile(step, device):
        def call(*inputs):
            shape = (step.__name__, *(x.shape for x in inputs if isinstance(x, torch.Tensor)))
            stats["unique_graphs"] += shape not in shapes
            shapes.add(shape)
            return step(*inputs)

        return call

    learn = sample.DraftLength.learn

    def noted_learn(self, *round):
        learnt.append(len(shapes))
        learn(self, *round)

    monkeypatch.setattr(sample, "torch_compile", compile)
    monkeypatch.setattr(sample.DraftLength, "learn", noted_learn)
    run = Stats()
    generate(trained, prompts(1, 5, 24), 300, temperature=0, compile=True, stats=run)
    drafts = {shape[1][1] for shape in shapes if shape[0] == "mtp_step"}
    assert max(drafts) <= sample.MOST_DRAFTS + len(trained.mtp) and len(shapes) > 2
    assert len(learnt) < run.rounds  # rounds with a new shape are left out


def test_plain_decoding_never_touches_the_mtp_modules(trained, monkeypatch):
    monkeypatch.setattr(trained, "predict_next", None)
    monkeypatch.setattr(sample, "Drafter", None)
    generate(trained, prompts(2, 5, 24), 10, temperature=0, speculative=0)


def test_a_model_without_mtp_samples_plainly_and_says_so(capsys):
    model = random_model(num_nextn_predict_layers=0)
    plain = generate(model, prompts(1, 4, 24), 10, temperature=0, speculative=0)
    assert torch.equal(plain, generate(model, prompts(1, 4, 24), 10, temperature=0))
    assert capsys.readouterr().err == ""
    assert torch.equal(plain, generate(model, prompts(1, 4, 24), 10, temperature=0, speculative=2))
    assert capsys.readouterr().err.count("no MTP module") == 1


# ---- Automatic draft length ----------------------------------------------------------------------


class FakeTime:
    """A clock that main and MTP forwards move by what they cost."""

    def __init__(self, monkeypatch, model, main: float, per_row: float, draft: float):
        self.now = 0.0
        monkeypatch.setattr(sample.time, "perf_counter", lambda: self.now)
        trunk, predict = model.trunk, model.predict_next

        def slow_trunk(x, cache):
            self.now += main + per_row * x.shape[1]
            return trunk(x, cache)

        def slow_predict(*args):
            self.now += draft
            return predict(*args)

        monkeypatch.setattr(model, "trunk", slow_trunk)
        monkeypatch.setattr(model, "predict_next", slow_predict)


def test_auto_falls_back_to_plain_when_drafts_never_match(monkeypatch):
    model = random_model(max_position_embeddings=1000)
    monkeypatch.setattr(model.mtp[0].norm, "weight", torch.nn.Parameter(torch.zeros(32)))
    with torch.no_grad():  # all draft logits equal: the draft is always token 0, never the argmax
        model.lm_head.weight[0] = 0
    plain = generate(model, prompts(1, 4, 24), 400, temperature=0, speculative=0)
    FakeTime(monkeypatch, model, 1.0, 0.05, 0.2)
    stats = Stats()
    out = generate(model, prompts(1, 4, 24), 400, temperature=0, stats=stats)
    assert torch.equal(out, plain)
    assert stats.accepted[0] < 0.2 * stats.drafted[0]
    assert stats.seconds < 1.03 * 1.05 * 399  # plain decoding would take 1.05 a token


def test_auto_finds_the_fastest_length(trained, monkeypatch):
    trained = _as(trained, torch.float32)
    trained.config.max_position_embeddings = 700
    for per_row, draft in ((0.02, 0.1), (0.4, 0.3)) if len(trained.mtp) == 1 else ((0, 0.01),):
        seconds = {}
        for drafts in (0, 1, 2, 3, 4, "auto"):
            with monkeypatch.context() as patch:
                FakeTime(patch, trained, 1.0, per_row, draft)
                stats = Stats()
                generate(
                    trained, prompts(1, 5, 24), 300, temperature=1.0, speculative=drafts,
                    generator=torch.Generator().manual_seed(3), stats=stats,
                )  # fmt: skip
                seconds[drafts] = stats.seconds
        fastest = min(v for k, v in seconds.items() if k != "auto")
        assert seconds["auto"] < 1.12 * fastest, (per_row, draft, seconds, stats)


def test_auto_keeps_looking():
    """Acceptance that sets in late is found."""
    pace = DraftLength()
    used = []
    for round in range(1200):
        g = pace.choose()
        used.append(g)
        pace.learn(g, 1 + 0.2 * g, [0 if round < 300 else g])
    assert used[50:300].count(0) > 0.9 * 250
    assert used[-200:].count(MOST_DRAFTS) > 0.9 * 200


# ---- Sampling ------------------------------------------------------------------------------------


def test_filters_in_the_order_temperature_top_k_top_p():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64))
    same = probabilities(logits, 1.0)
    assert torch.allclose(same, logits.exp())
    p = probabilities(logits, 1.0, top_k=3)
    assert torch.allclose(p, torch.tensor([4 / 9, 3 / 9, 2 / 9, 0, 0], dtype=torch.float64))
    p = probabilities(logits, 1.0, top_p=0.5)  # the fewest with at least half
    assert torch.allclose(p, torch.tensor([4 / 7, 3 / 7, 0, 0, 0], dtype=torch.float64))
    # After top-k the two best have 7/9 = 0.78 >= 0.75; without it they would have 0.7.
    p = probabilities(logits, 1.0, top_k=3, top_p=0.75)
    assert torch.allclose(p, torch.tensor([4 / 7, 3 / 7, 0, 0, 0], dtype=torch.float64))
    # At temperature 1/2 squares: 16 9 4 ... of 29.52; the best has 0.54.
    p = probabilities(logits, 0.5, top_p=0.5)
    assert p.tolist() == [1, 0, 0, 0, 0]
    assert probabilities(logits, 1.0, top_p=1e-9).tolist() == [1, 0, 0, 0, 0]


SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.7, top_k=3),
    dict(temperature=1.5, top_k=3, top_p=0.9),
]


MILLION = 1_000_000  # samples, with which a bias of 1 % in acceptance gives p-values under 1e-12


def sequence_test(model, setting, drafts, N=160_000, new=4) -> float:
    """The p-value of N sampled continuations against the exactly enumerated distribution."""
    V, prompt = model.config.vocab_size, torch.tensor([[1, 3]])
    tails = torch.tensor(list(itertools.product(range(V), repeat=new)))
    with torch.no_grad():
        p = probabilities(model(torch.cat((prompt.expand(len(tails), -1), tails), 1)), **setting)
    exact = p[:, 1:-1].gather(2, tails[..., None]).double().prod(1).flatten()
    assert abs(exact.sum() - 1) < 1e-5
    generator, counts = torch.Generator().manual_seed(7), torch.zeros(len(tails))
    weights, batch = V ** torch.arange(new - 1, -1, -1), 20_000
    for _ in range(N // batch):
        out = generate(
            model, prompt.expand(batch, -1), new, speculative=drafts, generator=generator, **setting
        )
        counts += torch.bincount((out[:, 2:] * weights).sum(1), minlength=len(tails))
    possible = exact > 0
    assert counts[~possible].sum() == 0
    expected = exact[possible] * N
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum().item()
    df = int(possible.sum()) - 1
    # Wilson and Hilferty: the cube root of chi2 / df is nearly normal.
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.fixture(scope="module")
def small_vocabulary() -> DeepSeekV3:
    return random_model(
        5, vocab_size=4, hidden_size=16, num_hidden_layers=1, first_k_dense_replace=1,
        initializer_range=0.35,
    )  # fmt: skip


@pytest.mark.parametrize("setting, N", zip(SETTINGS, (MILLION, 160_000, 160_000), strict=True))
def test_speculative_sampling_has_the_exact_distribution(small_vocabulary, setting, N):
    assert sequence_test(small_vocabulary, setting, drafts=2, N=N) > 1e-3


def wrong_by_resampling_from_p(p, q, drafts, generator):
    kept, _ = ACCEPT(p, q, drafts, generator)
    rows = torch.arange(len(p))
    return kept, sample.draw(p[rows, kept], generator)


def wrong_by_one_percent(p, q, drafts, generator):
    return ACCEPT(p * 1.01, q, drafts, generator)


ACCEPT = sample.accept


@pytest.mark.parametrize(
    "wrong, N", [(wrong_by_resampling_from_p, 160_000), (wrong_by_one_percent, MILLION)]
)
def test_a_broken_acceptance_rule_is_caught(small_vocabulary, monkeypatch, wrong, N):
    monkeypatch.setattr(sample, "accept", wrong)
    assert sequence_test(small_vocabulary, SETTINGS[0], drafts=2, N=N) < 1e-6


def test_plain_sampling_has_the_exact_distribution(small_vocabulary):
    assert sequence_test(small_vocabulary, SETTINGS[2], drafts=0, N=60_000) > 1e-3


def test_accepted_share_is_one_minus_the_distance_of_p_and_q():
    """Leviathan et al.: a draft stays with probability sum_x min(p, q)."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 1, 6, generator=generator).softmax(-1) ** 2
    p, q = p / p.sum(), q / q.sum()
    N = 200_000
    drafts = sample.draw(q.expand(N, -1), generator)
    kept, token = ACCEPT(p.expand(N, 2, -1), q.expand(N, 1, -1), drafts, generator)
    assert abs(kept.float().mean() - torch.minimum(p, q).sum()) < 5 / math.sqrt(N)
    first = torch.where(kept == 1, drafts[:, 0], token[:, 0])
    share = torch.bincount(first, minlength=6) / N
    assert (share - p[0]).abs().max() < 5 * math.sqrt(0.25 / N)


def test_a_seed_and_a_draft_length_fix_the_text(trained):
    runs = [
        generate(
            trained, prompts(1, 5, 24), 30, speculative=2, temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_tokens_are_streamed_as_they_come(trained):
    got = {0: [], 1: []}
    stats, drafted = Stats(), 0

    def on_token(row, ids, from_drafts):
        nonlocal drafted
        got[row] += ids
        drafted += from_drafts

    out = generate(
        trained, prompts(2, 5, 24), 30, temperature=0, speculative=2, on_token=on_token, stats=stats
    )
    assert [got[0], got[1]] == out[:, 5:].tolist()
    assert 0 < drafted <= sum(stats.accepted)
    assert stats.tokens == 60


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(tokens=torch.zeros(1, 0, dtype=torch.long)), "empty"),
        (dict(tokens=torch.zeros(1, 65, dtype=torch.long)), "context"),
        (dict(tokens=torch.tensor([[24]])), "24"),
        (dict(tokens=torch.tensor([[-1]])), "-1"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(top_k=0), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(speculative=5), "speculative"),
        (dict(speculative="fast"), "fast"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(lengths=[0]), "lengths"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(change, word):
    request = dict(tokens=torch.tensor([[1]]), max_new_tokens=3) | change
    with pytest.raises(ValueError, match=word) as caught:
        generate(random_model(), **request)
    assert "\n" not in str(caught.value)


# ---- Checkpoints ---------------------------------------------------------------------------------

TEXT = "def cosine(x):\n    return 'naïve café 😀'\n\n\nclass Größe:\n    pass\n" * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder as train.py leaves it."""
    folder = tmp_path_factory.mktemp("out") / "run"
    folder.mkdir()
    ranks = prepare_data.train_bpe([TEXT], 299, prepare_data.PATTERN)
    special = {prepare_data.END_OF_TEXT: len(ranks)}
    encoding = prepare_data.encoding_from(ranks, prepare_data.PATTERN, special)
    meta = prepare_data.write_tokenizer(encoding, folder)
    meta |= {"bytes": {}, "tokens": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    model = random_model(vocab_size=encoding.n_vocab, hidden_size=64, max_position_embeddings=128)
    torch.save(checkpoint_of(model), folder / "ckpt.pt")
    return folder


def checkpoint_of(model) -> dict:
    config = dict(model.config.__dict__)
    return dict(
        format="nanov3", model_config=config, train_config={}, model=model.state_dict(), step=1
    )


def test_best_is_preferred_and_files_open_as_well(run, tmp_path):
    assert sample.load_checkpoint(run)["step"] == 1
    saved = sample.load_checkpoint(run / "ckpt.pt")
    torch.save(saved | {"step": 2}, tmp_path / "ckpt.pt")
    torch.save(saved | {"step": 3}, tmp_path / "best.pt")
    assert sample.load_checkpoint(tmp_path)["step"] == 3
    assert sample.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2


class Evil:
    def __reduce__(self):
        return os.mkdir, ("should_not_exist",)


def test_files_that_are_no_checkpoints_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(error, *words):
        with pytest.raises(error) as caught:
            sample.load_model(tmp_path)
        text = str(caught.value)
        assert "\n" not in text and str(tmp_path) in text
        assert all(word in text for word in words), text

    refused(FileNotFoundError, "best.pt")
    path, saved = tmp_path / "ckpt.pt", torch.load(run / "ckpt.pt", weights_only=True)
    content = (run / "ckpt.pt").read_bytes()
    for part in (0, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:part])
        refused(ValueError, "truncated")
    path.write_text("hello, this is text " * 20)
    refused(ValueError, "no checkpoint")
    torch.save(saved | {"extra": Evil()}, path)
    refused(ValueError, "code")
    assert not Path("should_not_exist").exists()
    torch.save({"model_args": {}, "iter_num": 1}, path)
    refused(ValueError, "model_args")
    torch.save([1, 2], path)
    refused(ValueError, "list")
    torch.save(saved | {"model_config": saved["model_config"] | {"wings": 2}}, path)
    refused(ValueError, "wings")
    torch.save(saved | {"model_config": saved["model_config"] | {"vocab_size": 77}}, path)
    refused(ValueError, "do not match")
    torch.save(saved, path)
    with pytest.raises(FileNotFoundError):
        sample.load_model(tmp_path)  # its tokenizer is missing


# ---- Hugging Face --------------------------------------------------------------------------------


def odd_texts() -> list[str]:
    files = [Path(os.__file__), Path(json.__file__), ROOT / "sample.py"]
    return [
        TEXT, "", " ", "a" * 50, " " * 37 + "x", "\t\t \n\r\n \n\n  \u3000\u2003x",
        "aa aaa aaaa aaaaa aaaaaa", "1234567 12,345.678", "don't DON'T it's",
        "中文字 ひらがな 한국어",
        "e\u0301\u0301 \u200d👨\u200d👩\u200d👧 \x00\x01\x1c\x85\u2028", "==== ---- ____ ######",
        *(path.read_text() for path in files),
    ]  # fmt: skip


def test_exported_tokenizer_gives_the_same_ids(run):
    tokenizers = pytest.importorskip("tokenizers")
    encodings = [prepare_data.load_tokenizer(run)]
    runs = ["".join(c * n for c in " a=\n") for n in range(1, 40)]
    ranks = prepare_data.train_bpe([*odd_texts(), *runs], 1500, prepare_data.PATTERN)
    encodings.append(prepare_data.encoding_from(ranks, prepare_data.PATTERN, {"<|x|>": 1500}))
    for encoding in encodings:
        theirs = tokenizers.Tokenizer.from_str(json.dumps(sample.tokenizer_json(encoding)))
        for text in [*odd_texts(), *runs]:
            ids = encoding.encode_ordinary(text)
            assert theirs.encode(text).ids == ids, text[:50]
            assert theirs.decode(ids) == text


def test_export_opens_in_transformers_with_the_same_output(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    target = tmp_path / "hf"
    sample.main([f"--ckpt={run}", f"--export={target}"])
    model, tokenizer, _ = sample.load_model(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    ids = tokenizer.encode(TEXT[:40])
    assert their_tokenizer(TEXT[:40])["input_ids"] == ids
    assert their_tokenizer.decode(ids) == TEXT[:40]
    assert their_tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 299
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=30)
    out = generate(model, torch.tensor([ids]), 30, temperature=0, eos_token_id=299)
    assert out[0, : expected.shape[1]].tolist() == expected[0].tolist()
    # and here
    again, hf_tokenizer, _ = sample.load_model(target)
    assert len(again.mtp) == 1 and hf_tokenizer.eos == [299]
    assert hf_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert b"".join(map(hf_tokenizer.to_bytes, ids)).decode() == TEXT[:40]
    assert torch.equal(
        generate(again, torch.tensor([ids]), 30, temperature=0, eos_token_id=299), out
    )
    sample.main([f"--ckpt={run}", f"--export={target}", "--quantize"])
    assert "quantization_config" in json.loads((target / "config.json").read_text())
    assert sample.load_model(target)[1].encode(TEXT) == tokenizer.encode(TEXT)
    config = json.loads((target / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    assert sample.load_model(target)[1].encode(TEXT) == [299, *tokenizer.encode(TEXT)]


def test_kimi_tokenizer_opens(tmp_path):
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    added = {"300": {"content": "[EOS]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 300}))
    tokenizer = sample.hf_tokenizer(tmp_path)
    assert tokenizer.encode("né中") == list("né中".encode()) and tokenizer.eos == [300]
    assert tokenizer.to_bytes(300) == b"<|endoftext|>" and tokenizer.to_bytes(299) == b""


def test_text_is_prepared_with_the_tokenizer_of_an_exported_model(run, tmp_path):
    target, source = tmp_path / "hf", tmp_path / "text.txt"
    source.write_text(TEXT * 50)
    sample.main([f"--ckpt={run}", f"--export={target}"])
    config = prepare_data.DataConfig(str(source), "mine", str(tmp_path), tokenizer=str(target))
    data = prepare_data.load_dataset(prepare_data.prepare(config))
    encoding = prepare_data.load_tokenizer(run)
    first, *ids = data.train.arrays[0].tolist()
    assert (
        first == encoding.eot_token == 299 and ids[:100] == encoding.encode_ordinary(TEXT * 2)[:100]
    )


def test_a_tokenizer_of_several_stages_cannot_prepare_text(tmp_path):
    stages = [{"type": "Split", "pattern": {"Regex": "a"}}] * 2
    spec = {"pre_tokenizer": {"pretokenizers": stages}, "model": {"type": "BPE"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="one splitting expression"):
        prepare_data.hf_encoding(tmp_path)


# ---- The command ---------------------------------------------------------------------------------


def command(*args, stdin: bytes | None = b"", **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "sample.py", *map(str, args)],
        input=stdin, capture_output=True, timeout=60, env=environment, **more,
    )  # fmt: skip


def test_the_command_writes_text_to_stdout_and_the_rest_to_stderr(run):
    done = command(f"--ckpt={run}", "--max_new_tokens=20", "--num_samples=2", stdin=b"def cos")
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert out.startswith("def cos") and out.count("def cos") >= 2 and "-" * 80 in out
    assert "\033" not in out
    for word in ("tokens/s", "multi-head attention would hold", "bytes per token"):
        assert word in err


def test_commands_in_process(run, tmp_path, capsys, monkeypatch):
    ckpt = f"--ckpt={run}"
    out = {}
    for draft in ("0", "3", "auto"):
        sample.main([ckpt, "--prompt=class", "--temperature=0", f"--draft={draft}"])
        out[draft] = capsys.readouterr()
    assert out["0"].out == out["3"].out == out["auto"].out
    assert "context limit" in out["0"].err  # 256 tokens do not fit into 128
    assert "by position" in out["3"].err and "by position" not in out["0"].err
    sample.main([ckpt, "--prompt=", "--max_new_tokens=5"])  # begins a document
    (tmp_path / "prompt").write_text("Größe 😀")
    sample.main([ckpt, f"--prompt_file={tmp_path / 'prompt'}", "--max_new_tokens=5"])
    assert "Größe 😀" in capsys.readouterr().out
    # colours on a terminal only
    for show in ("drafts", "experts"):
        sample.main([ckpt, "--prompt=class", "--max_new_tokens=9", f"--show={show}", "--draft=2"])
        plain = capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            sample.main(
                [ckpt, "--prompt=class", "--max_new_tokens=9", f"--show={show}", "--draft=2"]
            )
        colour = capsys.readouterr().out
        assert "\033" not in plain
        assert show == "drafts" or "\033[38;5;" in colour
        assert sample.codecs and _strip(colour) == plain


def _strip(text: str) -> str:
    import re

    return re.sub(r"\033\[[\d;]*m", "", text)


def test_score_counts_every_token_once_with_at_least_half_a_window(run, tmp_path, capsys):
    model, tokenizer, _ = sample.load_model(run, dtype=torch.float64)
    ids = [299, *tokenizer.encode(TEXT[:400])]
    for window in (8, 9, len(ids) - 1, 500):
        expected = 0.0
        done = 1
        with torch.no_grad():
            while done < len(ids):
                start = max(0, done - window // 2)
                logits = model(torch.tensor([ids[start : start + window]]))[0]
                for i in range(done, min(start + window, len(ids) - 1) + 1):
                    assert i - start >= min(i, window // 2)
                    expected -= logits[i - start - 1].log_softmax(-1)[ids[i]].item()
                    done = i + 1
        assert abs(sample.score(model, ids, window) - expected) < 1e-8
    (tmp_path / "text").write_text(TEXT[:400])
    sample.main([f"--ckpt={run}", f"--score={tmp_path / 'text'}"])
    out = capsys.readouterr().out
    nats, bits = float(out.split()[3]), float(out.split()[5])
    total = sample.score(model, ids, 128)
    assert abs(nats - total / (len(ids) - 1)) < 1e-3
    assert abs(bits - total / math.log(2) / len(TEXT[:400].encode())) < 1e-3


def test_text_appears_only_in_whole_characters(run, capsys):
    _, tokenizer, _ = sample.load_model(run)
    tokenizer.to_bytes = lambda token: bytes([token])
    writer = sample.Writer(tokenizer, True, False)
    seen = []
    for byte in "é😀".encode():
        writer.add([byte], [""])
        seen.append(capsys.readouterr().out)
    assert seen == ["", "é", "", "", "", "😀"]
    writer.add([0xF0], [""])
    writer.close()
    assert capsys.readouterr().out == "\ufffd\n"


def test_interactive_and_interrupt(run, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    sample.main([f"--ckpt={run}", "--interactive", "--max_new_tokens=4"])
    out = capsys.readouterr().out
    assert out.startswith("one") and "\ntwo" in out

    model, tokenizer, _ = sample.load_model(run)
    rounds, trunk = [], model.trunk

    def interrupt(*args):
        rounds.append(1)
        if len(rounds) > 5:
            raise KeyboardInterrupt
        return trunk(*args)

    model.trunk = interrupt
    with pytest.raises(KeyboardInterrupt):
        sample.complete(model, tokenizer, "class", sample.SampleConfig(draft="0", num_samples=2))
    captured = capsys.readouterr()
    assert captured.out.startswith("class") and len(captured.out.split("-" * 80)[0]) > 7
    assert "tokens/s" in captured.err


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["--ckpt=nowhere"], 1, "nowhere"),
        ([], 2, "--ckpt"),
        (["--ckpt={run}", "--temprature=1"], 2, "temperature"),
        (["--ckpt={run}", "--top_k=x"], 2, "top_k"),
        (["--ckpt={run}", "--draft=9"], 1, "draft"),
        (["--ckpt={run}", "--show=me"], 1, "show"),
        (["--ckpt={run}", "--device=warp"], 1, "warp"),
        (["--ckpt={run}", "--dtype=int3"], 1, "int3"),
        (["--ckpt={run}", "--prompt_file=nowhere"], 1, "nowhere"),
        (["--ckpt={run}", "--prompt=" + "x!" * 200], 1, "context"),
        (["--ckpt={run}", "--prompt=\udcff"], 1, "UTF-8"),
        (["--ckpt={run}", "--num_samples=0"], 1, "num_samples"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(
    run, args, code, words, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["sample.py", *(a.replace("{run}", str(run)) for a in args)])
    with pytest.raises(SystemExit) as caught:
        prepare_data.run_command(sample.main)
    captured = capsys.readouterr()
    assert caught.value.code == code and words in captured.err and captured.out == ""
    assert "Traceback" not in captured.err


def test_bytes_that_are_no_text_are_refused(run):
    done = command(f"--ckpt={run}", stdin=b"\xff\xfe")
    assert done.returncode == 1 and b"UTF-8" in done.stderr and done.stdout == b""
