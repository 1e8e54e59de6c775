"""check_cache: right networks pass, and what reads otherwise in pieces is found and named."""

import pytest
import torch
import torch.nn.functional as F
from test_model import VARIANTS, tiny
from torch import nn

from bench import check_cache
from model import MOST_NEW

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


def test_a_state_that_cannot_go_back_is_found_in_the_model_or_in_a_module():
    wrong = found(mixed(Summed()))
    assert len(wrong) == 4 and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "from position 0 on" in wrong[0] and "prompt of 20: wrong from position 20" in wrong[2]
    wrong = found(mixed(Summed(), "mtp.1.block.self_attn", num_nextn_predict_layers=2))
    assert len(wrong) == 4 and all(x.startswith(f"MTP module 2, {REJECTED}") for x in wrong)


def test_a_token_shift_is_found():
    """It looks at a token outside of the piece."""
    model = tiny()
    model.layers[2].self_attn.register_forward_pre_hook(
        lambda module, args: (args[0] + F.pad(args[0], (0, 0, 1, -1)), *args[1:])
    )
    wrong = found(model)
    assert len(wrong) == 12 and f"{ONE}: wrong from position 1 on" in wrong[0]
    assert f"{ONE} behind a prompt of 20: wrong from position 20 on" in wrong[2]


# ---- What decoding reads and keeps ---------------------------------------------------------------
