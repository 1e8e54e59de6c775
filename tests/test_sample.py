"""Sampling has the exact distributions, and the command does what it says. Texts and drafts:
test_network.py.
"""

import contextlib
import errno
import io
import itertools
import math
import re
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from networks import student, tiny

import prepare_data
import sample
from load import load_model
from model import DeepSeekV3
from sample import accept, draw, generate, generate_plain, probabilities
from support.settings import Refusal
from support.tokenizer import stored_tokenizer, tokenizer_files

COLOUR = re.compile(r"\033\[[\d;]*m")
LIMIT = 48  # max_position_embeddings


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
    logits = torch.tensor([0.0, 2.0, 2.0, 2.0, -math.inf])
    check([0, 1 / 3, 1 / 3, 1 / 3, 0], 1.0, top_k=2)  # tokens that tie stay together
    logits = torch.tensor([0.0, 0.0, -math.inf, -math.inf, -math.inf])
    check([1, 0, 0, 0, 0], 1.0, top_p=0.5)  # half is half


def intervals(p) -> torch.Tensor:
    """What part of [0, 1) draw gives to every token of the distributions p (B, T, V)."""
    with mock.patch.object(torch, "searchsorted", wraps=torch.searchsorted) as search:
        draw(p, torch.zeros(p.shape[:2], dtype=torch.float64))
    total = search.call_args.args[0]
    return total.diff(dim=-1, prepend=torch.zeros_like(total[..., :1])) / total[..., -1:]


def test_a_large_vocabulary_is_drawn_exactly(V=129_280):
    """Every token has as much of [0, 1) as its probability by math.exp and whole numbers, at the
    place where it should be; so has every token of a residual distribution."""
    logits = 4 * torch.randn(V)
    p = probabilities(logits, 0.8)[None, None]
    weights = [int(math.exp(x / 0.8) * 2**80) for x in logits.tolist()]
    sums = [0, *itertools.accumulate(weights)]
    exact = torch.tensor([weight / sums[-1] for weight in weights], dtype=torch.float64)
    assert (intervals(p)[0, 0] - exact).abs().sum() / 2 < 1e-10  # total variation
    for i in (exact > 1e-6).nonzero().flatten().tolist()[::400]:
        u = [(sums[i] + weights[i] * share // 100) / sums[-1] for share in (2, 98)]
        assert draw(p.expand(1, 2, V), torch.tensor([u], dtype=torch.float64)).tolist() == [[i, i]]
    q = probabilities(logits + 1e-3 * torch.randn(V), 0.8)[None, None]
    draft, u = (q / p).argmax(-1), torch.tensor([[1 - 2**-53, 0.5]], dtype=torch.float64)
    with mock.patch.object(sample, "draw", wraps=draw) as after:
        kept, _ = accept(p.expand(1, 2, V), q, draft, u)
    exact = (p - q).clamp(min=0)[0, 0]
    exact /= math.fsum(exact.tolist())
    rest = after.call_args.args[0]
    assert kept == 0 and (intervals(rest)[0, 0] - exact).abs().sum() / 2 < 1e-10


def test_where_rounding_leaves_nothing_of_p_minus_q_p_is_drawn_from():
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    p = q - torch.tensor([0, 0, 2**-55], dtype=torch.float64)
    u = torch.tensor([[1 - 2**-53, 0.6]], dtype=torch.float64)
    kept, after = accept(p.expand(1, 2, 3), q.expand(1, 1, 3), torch.tensor([[2]]), u)
    assert kept.tolist() == [0] and after.tolist() == [[1]]
    never, zero = torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 2).double()
    assert draw(never, zero[:, :1]).tolist() == [[1]]
    kept, after = accept(never.expand(1, 2, 2), 1 - never, torch.tensor([[0]]), zero)
    assert kept.tolist() == [0] and after.tolist() == [[1]]


@pytest.mark.parametrize("kind", ["drawn", "filtered", "looked up", "q is p"])
def test_what_is_accepted_has_the_exact_distribution(kind, V=3, n=300):
    """Of two drafts, whatever q is: what comes out is distributed as p, also after each of the
    tokens before, and drafts stay with probability sum_x min(p, q). Summed over all pairs of drafts
    and a grid of n x n random numbers, so to 1/n."""
    logits = torch.randn(5, V, dtype=torch.float64)
    if kind == "filtered":
        logits[:3, 0], logits[3:, 1] = -math.inf, -math.inf
    p, q = logits.softmax(-1).split([3, 2])
    if kind == "looked up":
        q = torch.eye(V, dtype=p.dtype)[p[:2].argmin(-1)]
    if kind == "q is p":
        q = p[:2]
    grid = (torch.arange(n, dtype=p.dtype) + 0.5) / n
    u = F.pad(torch.cartesian_prod(grid, grid), (0, 1), value=0.3)  # (n*n, 3)
    found = torch.zeros(3, V, V, dtype=p.dtype)  # of token i: the draft before it, its own id
    for drafts in itertools.product(range(V), repeat=2):
        with mock.patch.object(sample, "draw", wraps=draw) as drawn:
            given = torch.tensor([drafts]).expand(len(u), 2)
            kept, _ = accept(p.expand(len(u), 3, V), q.expand(len(u), 2, V), given, u)
        (after, last), weight = drawn.call_args.args, q[[0, 1], drafts].prod() / len(u)
        assert torch.equal(last, u[:, 2:])
        for k in range(3):  # so many are kept, and one token is drawn after them
            here, before = kept == k, (0, *drafts)
            found[range(k), before[:k], drafts[:k]] += weight * here.sum()
            found[k, before[k]] += weight * F.normalize(after[here, 0], 1, -1).sum(0)
    close = partial(torch.testing.assert_close, rtol=0, atol=1 / n)
    close(found, found.sum(-1, keepdim=True) * p[:, None])
    close(found.sum((1, 2)), F.pad(torch.minimum(p[:2], q).sum(1).cumprod(0), (1, 0), value=1.0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(tokens=torch.zeros(1, 0, dtype=torch.long)), "the prompt is empty"),
        (dict(tokens=torch.zeros(1, LIMIT + 1, dtype=torch.long)), "the context ends at 48"),
        (dict(tokens=torch.tensor([[31]])), "token ids go from 31 to 31"),
        (dict(tokens=torch.tensor([[-1]])), "token ids go from -1 to -1"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(top_k=0), "top_k is 0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(speculative=5), "the number of drafts is 5"),
    ],
)
def test_impossible_requests_are_refused(change, word):
    model = tiny(max_position_embeddings=LIMIT)
    with pytest.raises(Refusal, match=word):
        generate(model, **dict(tokens=torch.tensor([[1]]), max_new_tokens=3) | change)


def test_an_edit_may_rule_tokens_out_but_not_all(monkeypatch):
    """With -inf; where nothing is left, or weights are damaged, nothing is drawn."""
    plain, model, prompt = DeepSeekV3.logits, tiny(), torch.tensor([[1, 2, 3]])
    for ruled_out, left in ((slice(5, None), True), (slice(None), False)):
        columns = torch.zeros(31).index_fill(0, torch.arange(31)[ruled_out], -math.inf)
        monkeypatch.setattr(DeepSeekV3, "logits", lambda *args, c=columns: plain(*args) + c)
        with contextlib.nullcontext() if left else pytest.raises(Refusal, match="not finite"):
            assert generate(model, prompt, 20)[0, 3:].max() < 5


# ---- The command ---------------------------------------------------------------------------------

TEXT = "def cosine(x):\n    return 'naïve café 😀'\n\n\nclass Größe:\n    pass\n" * 20


def make_run(tmp_path_factory, make_model, text: str = TEXT) -> Path:
    """A run's folder as train.py leaves it, with the model for its vocabulary."""
    source = tmp_path_factory.mktemp("out") / "text.txt"
    source.write_text(text)
    config = prepare_data.DataConfig(str(source), "run", str(source.parent), vocab_size=300)
    folder = prepare_data.prepare(config)
    model = make_model(vocab_size=stored_tokenizer(folder).encoding.n_vocab)
    saved = {"model_config": asdict(model.config), "model": model.state_dict()}
    torch.save(saved, folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory, partial(student, 1, max_position_embeddings=64))


@pytest.fixture
def command(run, capsys):
    """Runs the command on that run, on a CPU: texts are compared. Returns stdout and stderr."""

    def call(*options):
        sample.main([str(run), "--device=cpu", *options])
        return capsys.readouterr()

    return call


def test_files_that_are_no_checkpoints_are_refused(run, tmp_path):
    path, saved = tmp_path / "ckpt.pt", torch.load(run / "ckpt.pt", weights_only=True)
    config = saved["model_config"]
    stored = f"embed_tokens.weight is ({config['vocab_size']}, 16)"
    path.write_bytes(b"hello " * 50)
    for file in tokenizer_files(run):
        shutil.copy(file, tmp_path)
    for bad, sentence in (
        (None, f"{path} is damaged, or no checkpoint"),
        ({"model_args": {}}, "is damaged, or no checkpoint"),  # another program's
        (saved | {"model_config": config | {"wings": 2}}, "has wings, unknown to this model.py"),
        (saved | {"model_config": config | {"vocab_size": 77}}, "has weights for 77 tokens"),
        (saved | {"model_config": config | {"hidden_size": 20}}, stored),
        ({key: x for key, x in saved.items() if key != "model"}, "do not match: 'model'"),
    ):
        if bad:
            torch.save(bad, path)
        with pytest.raises(Refusal, match=re.escape(sentence)):
            load_model(tmp_path)
    torch.save(saved, path)
    load_model(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(Refusal, match=r"has no complete tokenizer .*meta\.json"):
        load_model(tmp_path)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(run, monkeypatch):
    def refuse(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(PermissionError):
        load_model(run)


def test_text_goes_to_stdout_and_the_rest_to_stderr(command, monkeypatch):
    for source in ("--seed=2", "--prompt=Größe 😀"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Größe 😀".encode())))
        out, err = command("--max_new_tokens=20", "--num_samples=2", source)
        first, second = out.split("\n" + "-" * 80 + "\n")
        assert all(text.startswith("Größe 😀") for text in (first, second)) and first != second
        assert not COLOUR.search(out)
        assert "tokens/s" in err
    assert command("--prompt=Gr", "--max_new_tokens=0", "--num_samples=2").out.count("Gr") == 2
    monkeypatch.setattr(sample, "generate", lambda *_, on_token, **__: on_token(0, [240], 0))
    assert command("--prompt=Gr").out == "Gr\ufffd\n"  # half a character is not lost


def test_a_seed_fixes_the_text(command):
    texts = [command("--prompt=", f"--seed={seed}").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_drafts_and_colours_change_nothing_but_the_speed_and_the_colour(command):
    options = ("--prompt=def", "--temperature=1e-39", "--num_samples=2")  # as good as 0
    off = command(*options, "--speculative=0")
    on = command(*options, "--speculative=3", "--show=drafts")
    assert COLOUR.sub("", on.out) == off.out != on.out
    assert "context limit" in off.err  # 256 tokens do not fit into 64
    assert "\033[32mgreen\033[0m: drafts that" in on.err and "green" not in off.err
    assert re.search(r"by position: \d+ of \d+, \d+ of \d+, \d+ of \d+\n", on.err)
    assert "by position" not in off.err


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_the_plain_loop_writes_the_text_of_generate(temperature):
    model, tokens = tiny(), torch.randint(31, (2, 6))
    texts = [
        write(
            model, tokens, 20, temperature=temperature, generator=torch.Generator().manual_seed(1)
        )
        for write in (generate_plain, partial(generate, speculative=0))
    ]
    assert torch.equal(*texts)
