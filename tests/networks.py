"""Small networks of random weights, and the question whether the network is still DeepSeek-V3.

They compute in float64, whose rounding is 1e-16. Through a few layers of sums of about ten terms of
size 1 to 100 it grows to about 1e-13. ATOL is 100 times that, while the smallest mistake that the
tests are after (an epsilon) moves the results by 1e-4.
"""

import copy
import functools
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import reference
import torch

import check
from huggingface import checkpoint_views
from load import load_model
from model import DeepSeekV3, ModelConfig
from support.settings import as_field

ROOT = Path(__file__).parent.parent
ATOL = 1e-11
# No two widths are equal, nor rms_norm_eps and the latent norms' 1e-6: exchanged ones show.
SIZES = dict(
    vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
    q_lora_rank=10, kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    intermediate_size=20, moe_intermediate_size=9, first_k_dense_replace=1, n_shared_experts=1,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    rms_norm_eps=1e-3, num_nextn_predict_layers=1,
)  # fmt: skip
# Of the network's keys those that `pytest --set=KEY=VALUE` gives to all networks (conftest.py).
SET = dict(word.split("=", 1) for word in os.environ.get("SET_KEYS", "").split())
SIZES |= {key: as_field(key, x, get_type_hints(ModelConfig)[key]) for key, x in SET.items()}
YARN_PLAIN = dict(type="yarn", factor=8, original_max_position_embeddings=64)
YARN = YARN_PLAIN | dict(beta_fast=32, beta_slow=1, mscale=0.7, mscale_all_dim=1.3)
FAR, NEAR = (YARN | dict(original_max_position_embeddings=length) for length in (512, 1))
VARIANTS = {
    "base": {},
    "no_query_latent": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=YARN),
    "yarn_without_mscale": dict(rope_scaling=YARN_PLAIN),
    "yarn_beyond_the_last_pair": dict(rope_scaling=FAR, rope_theta=100.0),
    "yarn_before_the_first_pair": dict(rope_scaling=NEAR, rope_theta=100.0),
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
EVERYTHING = dict(rope_scaling=YARN, attention_bias=True, num_nextn_predict_layers=2)


def tiny(dtype=torch.float64, **changes) -> DeepSeekV3:
    """A model in which everything matters: no norm is 1, no bias 0."""
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig(**(SIZES | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim >= 2:
                x.normal_(std=1.5 * x.shape[-1] ** -0.5)
            else:
                x.normal_(0 if name.endswith("bias") else 1, 0.2)
        for gate in model.gates():
            gate.e_score_correction_bias.normal_(0, 0.3)
    return model


def tokens_of(model, *shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


close = functools.partial(torch.testing.assert_close, rtol=0, atol=ATOL)


@functools.cache
def referenced(variant):
    """A model, tokens, the reference's logits and, a row of the list each, those of its MTP."""
    model = tiny(**(EVERYTHING if variant == "everything" else VARIANTS[variant]))
    tokens, c = tokens_of(model, 2, 9), asdict(model.config)
    w = {name: x.detach().double().numpy() for name, x in checkpoint_views(model)}
    logits, mtp = zip(*(reference.forward(w, c, row) for row in tokens.tolist()), strict=True)
    stacked = [torch.tensor(np.stack(x)) for x in (logits, *zip(*mtp, strict=True))]
    return model, tokens, stacked[0], stacked[1:]


def in_bf16(function, *args):
    with torch.autocast("cpu", torch.bfloat16):
        return function(*args)


def biases(model):
    return torch.stack([gate.e_score_correction_bias.clone() for gate in model.gates()])


@torch.no_grad()
def student(depth: int, **changes) -> DeepSeekV3:
    """One MoE layer whose drafts are often right: MTP modules are copies of it, fed almost with the
    embedding alone."""
    changes |= dict(num_nextn_predict_layers=depth)
    model = tiny(num_hidden_layers=1, first_k_dense_replace=0, **changes)
    model.embed_tokens.weight /= model.embed_tokens.weight.square().mean(1, True).sqrt()
    for module in model.mtp:
        module.block.load_state_dict(model.layers[0].state_dict())
        module.norm.weight.copy_(model.norm.weight)
        module.enorm.weight.fill_(1)
        module.eh_proj.weight.mul_(0.03).add_(torch.eye(16, 32))
    return model.requires_grad_(False)


# ---- Is it still DeepSeek-V3? --------------------------------------------------------------------

NO_LONGER_V3 = "the network is no longer V3, as an edit may wish"


@torch.no_grad()
def check_losses(model: DeepSeekV3):
    """The cross-entropies by check.py. The balance loss is the sum over all MoE layers, by Eq.
    17-20 of scores without biases."""
    assert not (wrong := check.losses(model).wrong), wrong
    model, text, scores = copy.deepcopy(model), tokens_of(model, 2, 9), []
    for gate in model.gates():
        gate.register_forward_hook(lambda g, x, _: scores.append((x[0] @ g.weight.T).sigmoid()))
    losses = model(text[:, :-1], text[:, 1:])
    assert losses.keys() == {"loss", "mtp_loss", "balance_loss"}, "other losses"
    balance = [sum(reference.balance(row.tolist(), 3) for row in s) / 2 for s in scores]
    assert len(balance) == 2 + len(model.mtp)
    assert losses["balance_loss"].item() == pytest.approx(sum(balance), abs=ATOL)


@torch.no_grad()
def stored_bits_per_byte() -> tuple[float, float]:
    """The loss of weights/small on its text in windows of 256 tokens, and what its README tells."""
    folder = ROOT / "weights/small"
    model, tokenizer = load_model(folder)
    ids = torch.tensor(tokenizer.encode((folder / "text.txt").read_text(encoding="utf-8")))
    nats = 0.0
    for x, y in zip(ids[:-1].split(256), ids[1:].split(256), strict=True):
        nats += len(x) * model(x[None], y[None])["loss"].item()
    size = sum(len(tokenizer.to_bytes(i)) for i in ids[1:].tolist())
    about = (folder / "README.md").read_text(encoding="utf-8")
    told = re.search(r"(\d\.\d{4}) bits per byte on text.txt", about)
    return nats / math.log(2) / size, float(told[1])


def compare_with_v3():
    """Raises an error where this is another network: by the reference with all that V3 has, and by
    the weights that V3 was trained to."""
    model, tokens, logits, mtp = referenced("everything")
    with torch.no_grad():
        ours, ours_mtp = model(tokens, return_mtp=True)
    close(ours, logits)
    close(ours_mtp, mtp)
    check_losses(model)
    found, told = stored_bits_per_byte()
    assert found == pytest.approx(told, abs=1e-3), "weights/small has another loss"


@functools.cache
def departure() -> str:
    """What tells this network from DeepSeek-V3; "" if nothing does. Whatever goes wrong in the
    comparison tells: an edit may have renamed or removed what it asks for."""
    try:
        compare_with_v3()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return ""
