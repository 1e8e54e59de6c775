"""check_cache: right networks pass, and what reads otherwise in pieces is found and named."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_model import VARIANTS, tiny, tokens_of
from torch import nn

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


class Smeared(nn.Module):
    """In attention's place the mean of the newest `window` inputs, which lie in a ring."""

    def __init__(self, window: int, ring: int, like: nn.Module):
        super().__init__()
        self.window, self.ring, self.gain = window, ring, nn.Parameter(torch.ones(()))
        self.width = like.o_proj.out_features

    def new_cache(self, batch, size, like):
        return like.new_zeros(batch, self.ring, self.width)

    def forward(self, h, rope, past=None):
        T, before = h.shape[1], self.window - 1
        x = F.pad(h, (0, 0, before, 0))  # (B, before + T, D)
        if past is not None:
            ring, start = past
            at = start + torch.arange(-before, T)
            x[:, :before] = ring[:, at[:before] % self.ring] * (at[:before, None] >= 0)
            ring[:, at[before:][-self.ring :] % self.ring] = h[:, -self.ring :]
        return self.gain * x.unfold(1, self.window, 1).mean(-1)


def smeared(window: int, ring: int, **changes):
    model = tiny(**changes)
    layer = model.layers[1]
    layer.self_attn = Smeared(window, ring, layer.self_attn)
    return model


def test_a_ring_that_is_too_short_is_found():
    """It needs the window's older tokens, and as many as may be forgotten."""
    assert not found(smeared(12, 11 + MOST_NEW))
    wrong = found(smeared(12, 10 + MOST_NEW))
    assert wrong and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "behind a prompt of 20: wrong from position 20 on, by up to " in wrong[-2]
    wrong = found(smeared(12, 10))
    assert {way for way in (ONE, SEVERAL, REJECTED) if way in str(wrong)} == {
        ONE,
        SEVERAL,
        REJECTED,
    }
    assert f"main model, {ONE}: wrong from position 11 on" in wrong[0]


def test_the_line_about_the_cache_counts_what_the_layers_keep(capsys):
    """Here one of three has latents of 15 numbers per token, in float64; the others do not grow."""
    model = smeared(1, 2)
    model.layers[2].self_attn = Summed(1, 1, model.layers[2].self_attn)
    print_stats(model, Stats(), 1)
    assert "cache: 120 bytes per token and 384 per text;" in capsys.readouterr().err


def test_special_tokens_are_in_the_text():
    """They are rare in texts at random: here one of 4,096, which the embedding counts in a piece
    and forgets behind it."""
    model = tiny(vocab_size=4096)
    model.embed_tokens.register_forward_hook(
        lambda module, args, out: out + (args[0] == 4095).cumsum(1)[..., None]
    )
    assert len(found(model)) == check_cache(model, 40).ways


def test_a_layer_that_starts_with_nothing_is_looked_at():
    model = smeared(12, 10)
    nn.init.zeros_(model.layers[1].self_attn.gain)
    assert found(model)


class Summed(Smeared):
    """All inputs' sum: a state, which cannot go back."""

    def new_cache(self, batch, size, like):
        return (like.new_zeros(batch, 1, self.width),)  # may be several tensors

    def forward(self, h, rope, past=None):
        total = h.cumsum(1)
        if past is not None:
            (before,), _ = past
            total = total + before
            before[:] = total[:, -1:]
        return total / 10


def test_a_state_that_cannot_go_back_is_found():
    model = tiny()
    model.layers[1].self_attn = Summed(1, 1, model.layers[1].self_attn)
    wrong = found(model)
    assert len(wrong) == 4 and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "from position 0 on" in wrong[0] and "prompt of 20: wrong from position 20" in wrong[2]


def test_a_token_shift_is_found():
    """It looks at a token outside of the piece."""
    model = tiny()
    model.layers[2].self_attn.register_forward_pre_hook(
        lambda module, args: (args[0] + F.pad(args[0], (0, 0, 1, -1)), *args[1:])
    )
    wrong = found(model)
    assert len(wrong) == 12 and f"{ONE}: wrong from position 1 on" in wrong[0]
    assert f"{ONE} behind a prompt of 20: wrong from position 20 on" in wrong[2]


def test_drafts_that_stay_are_found(monkeypatch):
    """Rows of the cache that are written once and not again."""

    def remember(past, new):
        (kv, start), rows = past, ops.span(past[1], new.shape[1])
        kv[:, rows] = torch.where(kv[:, rows] == 0, new, kv[:, rows])
        return kv[:, : start + new.shape[1]] if isinstance(start, int) else kv

    monkeypatch.setattr(plain, "remember", remember)
    wrong = found(tiny(num_nextn_predict_layers=0))
    assert len(wrong) == 4 and all(f"main model, {REJECTED}" in x for x in wrong)


def test_what_is_wrong_in_graphs_alone_is_found(monkeypatch):
    def remember(past, new):
        (kv, start), T = past, new.shape[1]
        place = start if isinstance(start, int) else 0
        kv[:, place : place + T] = new
        return kv[:, : start + T] if isinstance(start, int) else kv

    monkeypatch.setattr(plain, "remember", remember)
    wrong = found(tiny(num_nextn_predict_layers=0))
    assert len(wrong) == 6 and all("positions as tensors: wrong" in x for x in wrong)


def test_a_module_is_told_from_the_model_and_nan_is_wrong():
    model = tiny(num_nextn_predict_layers=2)
    model.mtp[1].block.self_attn = Summed(1, 1, model.mtp[1].block.self_attn)
    wrong = found(model)
    assert len(wrong) == 4 and all(x.startswith(f"MTP module 2, {REJECTED}") for x in wrong)
    attention = model.layers[0].self_attn
    attention.register_forward_hook(
        lambda module, args, out: out * (torch.nan if len(args) > 2 and args[2] else 1)
    )
    assert any(x.startswith("main model") and "by up to inf" in x for x in found(model))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_decoding_reads_and_forgets_no_more_than_is_checked(depth, monkeypatch):
    """In graphs, too: positions as tensors, a round may be played twice."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = tiny(num_nextn_predict_layers=depth, vocab_size=5)  # it repeats itself: copied drafts
    ends, trunk, predict_next = {}, model.trunk, model.predict_next
    most = [0, 0]

    def told(reader, T, cache):
        start, before = int(cache.length), ends.get((reader, cache))
        if before is not None:
            most[:] = max(most[0], T), max(most[1], before - start)
        ends[reader, cache] = start + T

    def spied_trunk(tokens, cache=None):
        told("main", tokens.shape[1], cache)
        return trunk(tokens, cache)

    def spied_predict(k, h, tokens, cache=None):
        told(k, tokens.shape[1], cache)
        return predict_next(k, h, tokens, cache)

    model.trunk, model.predict_next = spied_trunk, spied_predict
    for drafts, compile, T in itertools.product((0, 1, 4), (False, True), (1, 12)):
        write = partial(generate, model, tokens_of(model, 2, T), 16, temperature=0)
        write(speculative=drafts, compile=compile)
    assert 5 <= most[0] <= MOST_NEW and 4 <= most[1] <= MOST_NEW, most
