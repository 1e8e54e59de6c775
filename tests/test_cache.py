"""check_cache: right networks pass, and what reads otherwise in pieces is found and named."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_model import VARIANTS, tiny, tokens_of
from torch import nn

import bench
import model as plain
from model import MOST_NEW
from sample import Stats, check_cache, generate, print_stats
from support import ops

ONE, SEVERAL, REJECTED = "one token at a time", "several tokens at a time", "drafts rejected"


def found(model, length=40) -> list[str]:
    return check_cache(model, length).wrong


@pytest.mark.parametrize("name", ["base", "no_mtp", "two_mtp_modules", "all_dense", "yarn"])
def test_the_network_is_right(name):
    model = tiny(torch.float32, **VARIANTS[name]).train()
    model.layers[0].register_forward_hook(  # in training alone
        lambda module, args, out: (F.dropout(out[0], 0.5, module.training), out[1])
    )
    before = {key: x.clone() for key, x in model.state_dict().items()}
    check = check_cache(model, 40)
    assert not check.wrong and check.largest < 1e-11 and check.size > 1
    assert str(check).startswith(f"{check.ways} of {check.ways} ways") and check.ways >= 12
    assert model.training and all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


# ---- Networks that are wrong in pieces -----------------------------------------------------------


class Smeared(nn.Module):
    """In attention's place the mean of the newest `window` inputs, which lie in a ring."""

    def __init__(self, window: int, ring: int):
        super().__init__()
        self.window, self.ring, self.gain = window, ring, nn.Parameter(torch.ones(()))

    def new_cache(self, batch, size, like):
        return like.new_zeros(batch, self.ring, 16)

    def forward(self, h, rope, past=None):
        T, before = h.shape[1], self.window - 1
        x = F.pad(h, (0, 0, before, 0))  # (B, before + T, D)
        if past is not None:
            ring, start = past
            at = start + torch.arange(-before, T)
            x[:, :before] = ring[:, at[:before] % self.ring] * (at[:before, None] >= 0)
            ring[:, at[before:][-self.ring :] % self.ring] = h[:, -self.ring :]
        return self.gain * x.unfold(1, self.window, 1).mean(-1)


class Summed(nn.Module):
    """In attention's place all inputs' sum: a state, which cannot go back."""

    def new_cache(self, batch, size, like):
        return (like.new_zeros(batch, 1, 16),)  # may be several tensors

    def forward(self, h, rope, past=None):
        total = h.cumsum(1)
        if past is not None:
            (before,), _ = past
            total = total + before
            before[:] = total[:, -1:]
        return total / 10


def mixed(attention: nn.Module, place="layers.1.self_attn", **changes):
    model = tiny(**changes)
    model.set_submodule(place, attention)
    return model


def test_a_ring_that_is_too_short_is_found():
    """It needs the window's older tokens, and as many as may be forgotten."""
    assert not found(mixed(Smeared(12, 11 + MOST_NEW)))
    wrong = found(mixed(Smeared(12, 10 + MOST_NEW)))
    assert wrong and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "behind a prompt of 20: wrong from position 20 on, by up to " in wrong[-2]
    wrong = found(mixed(Smeared(12, 10)))
    assert all(way in str(wrong) for way in (ONE, SEVERAL, REJECTED))
    assert f"main model, {ONE}: wrong from position 11 on" in wrong[0]


def test_a_layer_that_starts_with_nothing_is_looked_at():
    model = mixed(Smeared(12, 10))
    nn.init.zeros_(model.layers[1].self_attn.gain)
    assert found(model)


def test_a_state_that_cannot_go_back_is_found_in_the_model_or_in_a_module():
    wrong = found(mixed(Summed()))
    assert len(wrong) == 4 and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "from position 0 on" in wrong[0] and "prompt of 20: wrong from position 20" in wrong[2]
    wrong = found(mixed(Summed(), "mtp.1.block.self_attn", num_nextn_predict_layers=2))
    assert len(wrong) == 4 and all(x.startswith(f"MTP module 2, {REJECTED}") for x in wrong)


def test_nan_is_wrong():
    model = tiny()
    model.layers[0].self_attn.register_forward_hook(
        lambda module, args, out: out * (torch.nan if len(args) > 2 and args[2] else 1)
    )
    assert any(x.startswith("main model") and "by up to inf" in x for x in found(model))


def test_a_token_shift_is_found():
    """It looks at a token outside of the piece."""
    model = tiny()
    model.layers[2].self_attn.register_forward_pre_hook(
        lambda module, args: (args[0] + F.pad(args[0], (0, 0, 1, -1)), *args[1:])
    )
    wrong = found(model)
    assert len(wrong) == 12 and f"{ONE}: wrong from position 1 on" in wrong[0]
    assert f"{ONE} behind a prompt of 20: wrong from position 20 on" in wrong[2]


def test_special_tokens_are_in_the_text():
    """They are rare in texts at random: here one of 4,096, which the embedding counts in a piece
    and forgets behind it."""
    model = tiny(vocab_size=4096)
    model.embed_tokens.register_forward_hook(
        lambda module, args, out: out + (args[0] == 4095).cumsum(1)[..., None]
    )
    assert len(found(model)) == check_cache(model, 40).ways


def written_once(past, new):
    """What drafts have left behind stays."""
    (kv, start), rows = past, ops.span(past[1], new.shape[1])
    kv[:, rows] = torch.where(kv[:, rows] == 0, new, kv[:, rows])
    return kv[:, : start + new.shape[1]] if isinstance(start, int) else kv


def wrong_in_graphs(past, new):
    (kv, start), T = past, new.shape[1]
    place = start if isinstance(start, int) else 0
    kv[:, place : place + T] = new
    return kv[:, : start + T] if isinstance(start, int) else kv


def test_the_cache_may_be_looked_at_as_a_whole(monkeypatch):
    """Its empty rest, too: `start` says which tokens a query may look at."""

    def remember(past, new):
        kv, start = past
        kv[:, ops.span(start, new.shape[1])] = new
        return kv

    model = tiny(num_nextn_predict_layers=2)
    tokens = tokens_of(model, 2, 6)
    expected = generate(model, tokens, 20, temperature=0)
    monkeypatch.setattr(plain, "remember", remember)
    assert not found(model) and torch.equal(generate(model, tokens, 20, temperature=0), expected)


@pytest.mark.parametrize(
    ("remember", "number", "told"),
    [(written_once, 4, f"main model, {REJECTED}"), (wrong_in_graphs, 6, "positions as tensors")],
)
def test_rows_that_are_written_wrongly_are_found(remember, number, told, monkeypatch):
    monkeypatch.setattr(plain, "remember", remember)
    wrong = found(tiny(num_nextn_predict_layers=0))
    assert len(wrong) == number and all(told in x for x in wrong)


# ---- What decoding reads and keeps ---------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_decoding_reads_and_forgets_no_more_than_is_checked(drafts, depth, monkeypatch):
    """In graphs, too: positions as tensors, a round may be played twice. Without drafts and graphs
    every token is read once, so that a state which cannot go back would do."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = tiny(num_nextn_predict_layers=depth, vocab_size=5)  # it repeats itself: copied drafts
    ends, read, forgotten = {}, {0}, {0}

    def watched(name: str):
        function = getattr(model, name)

        def watch(*args):  # the last two are tokens and a cache
            (tokens, cache), reader = args[-2:], (name, args[0] if len(args) > 2 else 0)
            start = int(cache.length)
            if (before := ends.get((reader, cache))) is not None:
                read.add(tokens.shape[1])
                forgotten.add(before - start)
            ends[reader, cache] = start + tokens.shape[1]
            return function(*args)

        setattr(model, name, watch)

    watched("trunk")
    watched("predict_next")
    for compile, T in itertools.product((False, True), (1, 12)):
        tokens = tokens_of(model, 2, T)
        generate(model, tokens, 16, temperature=0, speculative=drafts, compile=compile)
        if not (compile or drafts):
            assert (read, forgotten) == ({0, 1}, {0})
    assert drafts < max(read) <= MOST_NEW and drafts <= max(forgotten) <= MOST_NEW


def test_norms_need_no_weight_and_a_cache_may_be_several_tensors(capsys):
    """An edit may have others: nothing else asks a norm where a network is and in which dtype."""
    model = mixed(Summed())
    model.norm = nn.LayerNorm(16, elementwise_affine=False)
    assert generate(model, tokens_of(model, 1, 5), 3).shape == (1, 8)
    print_stats(model, Stats(), 1)
    assert "per text" in capsys.readouterr().err
    kept, step = bench.our_step_at(model, 7)
    step()
    assert len(kept) == 3 and all(isinstance(x, torch.Tensor) for x in kept)


def test_the_line_about_the_cache_counts_what_the_layers_keep(capsys):
    """Here one of three has latents of 15 numbers per token, in float64. The others do not grow: a
    ring, as soon as it is full, and a state."""
    ring = Smeared(1, 20)
    ring.new_cache = lambda batch, size, like: like.new_zeros(batch, min(size, 20), 16)
    model = mixed(ring)
    model.layers[2].self_attn = Summed()
    print_stats(model, Stats(), 1)
    per_text = 8 * (20 * 16 + 16)
    assert f"cache: 120 bytes per token and {per_text:,} per text;" in capsys.readouterr().err
