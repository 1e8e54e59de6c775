"""The worked changes of docs/HACKING.md apply, train, and decode what whole forwards compute."""

import functools
import itertools
import math
import re
import runpy
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import ROOT, TINY_NETWORK

import check
import sample
from model import DeepSeekV3, ModelConfig, balance_loss
from train import TrainConfig, lr_at

SIZES = TINY_NETWORK | {"num_hidden_layers": 2, "initializer_range": 0.1}
CONFIG = TrainConfig(block_size=16)
LENGTH = 40  # tokens that are decoded in pieces, more than any of these networks looks back

HACKING = (ROOT / "docs/HACKING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?s)\n## \d+\. ([^\n]*)\n(.*?)(?=\n## |\Z)", HACKING))
LINES = re.findall(r"(?m)^\| ([^|]+) \| `(\w+\.py)`, [^|]+ \| `([^|]+)` \| `([^|]+)` \|$", HACKING)
assert len(LINES) == 6  # all rows of the table


@dataclass
class Changed:
    """What a change makes of a copy of the source."""

    files: dict[str, SimpleNamespace]  # what those that it changes define
    folder: Path
    new: SimpleNamespace | None = None  # model.py
    model: Any = None  # trained for a step
    x: Any = None  # tokens (B, T)
    y: Any = None  # the next tokens
    wrong: list[str] | None = None  # what `check.py` says


CHECKS = {}  # by title: a function of what was changed, sizes of the network, values in model.py


def change(title: str, values: dict[str, Any] | None = None, **sizes):
    """Marks what is special about a worked change."""
    return lambda test: CHECKS.update({title: (test, sizes, values or {})})


def applied(title: str, folder: Path) -> list[str]:
    """Applies a section's diff, which stands in it or in the file that it names, to copies of the
    source in the folder; returns the files' names."""
    section = SECTIONS[title]
    shown = re.search(r"(?s)```diff\n(.*?)```", section)
    named = re.search(r"git apply (docs/changes/\w+\.diff)", section)
    diff = shown[1] if shown else (ROOT / named[1]).read_text(encoding="utf-8")
    files = re.findall(r"(?m)^\+\+\+ b/(.*)$", diff)
    for file in files:
        shutil.copy(ROOT / file, folder / file)
    done = subprocess.run(["git", "apply"], input=diff, text=True, cwd=folder, capture_output=True)
    if done.returncode == 1:  # a broken diff has 128
        pytest.skip(f"a file was edited where this change of docs/HACKING.md is: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return files


def opened(files: list[str], folder: Path) -> Changed:
    names = {x: SimpleNamespace(**runpy.run_path(str(folder / x))) for x in files}
    return Changed(names, folder)


def learns_and_decodes(c: Changed, monkeypatch, sizes: dict, values: dict):
    """A step by gradient descent lowers the loss. Keeps what check.py finds wrong."""
    c.new = c.files["model.py"]
    c.new.DeepSeekV3.forward.__globals__.update(values)
    # In float64, where the sums of another CPU make no difference.
    torch.manual_seed(0)
    c.model = model = c.new.DeepSeekV3(c.new.ModelConfig(**SIZES | sizes)).double()
    tokens = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(1))
    c.x, c.y = tokens[:, :-1], tokens[:, 1:]
    before = sum(model.train()(c.x, c.y).values())
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    model.update_bias(0.01)
    with torch.no_grad():
        assert sum(model(c.x, c.y).values()) < before
    for reader in (sample, check):
        monkeypatch.setattr(reader, "Cache", c.new.Cache)
    if "train.py" in c.files:
        monkeypatch.setattr(check, "train", c.files["train.py"])
    few = functools.partial(check.chance_of_drawn, rounds=60)  # no change alters how one draws
    monkeypatch.setattr(check, "chance_of_drawn", few)
    found = check.answers(model.eval(), CONFIG, LENGTH)
    c.wrong = [sentence for answer in found for sentence in answer.wrong]


@pytest.mark.parametrize("title", SECTIONS)
def test_worked_changes(title, v3, tmp_path, monkeypatch):
    test, sizes, values = CHECKS.get(title, (lambda c: None, {}, {}))
    c = opened(applied(title, tmp_path), tmp_path)
    if "model.py" in c.files:
        learns_and_decodes(c, monkeypatch, sizes, values)
        assert not c.wrong
    test(c)


@pytest.mark.parametrize("title, file, old, new", LINES, ids=[x[0][:20] for x in LINES])
def test_changes_of_a_line(title, file, old, new, v3, tmp_path, monkeypatch):
    source = (ROOT / file).read_text(encoding="utf-8")
    for a, b in zip(old.split("`<br>`"), new.split("`<br>`"), strict=True):
        if source.count(a) != 1:
            pytest.skip(f"{file} was edited where this change of docs/HACKING.md changes it: {a}")
        source = source.replace(a, b)
    (tmp_path / file).write_text(source, encoding="utf-8")
    c = opened([file], tmp_path)
    if file == "model.py":
        learns_and_decodes(c, monkeypatch, {}, {})
        of_batch = [x for x in c.wrong if x.startswith("in two micro-batches: ")]
        assert c.wrong == of_batch and len(of_batch) == ("balance_loss" in title)
    if "softmax" in title:
        s, _, _ = c.model.gates()[0](torch.randn(5, 48).double())
        assert torch.allclose(s.sum(-1), torch.ones(5).double())
    if "loop" in title:
        assert len(c.model.layers) == 3 and c.model.layers[1] is c.model.layers[2]
    if "balance_loss" in title:
        s = torch.rand(2, 6, 8)
        assert c.new.balance_loss(s, 2) == balance_loss(s.flatten(0, 1)[None], 2)
        assert c.new.balance_loss(s, 2) != balance_loss(s, 2)
    if file == "train.py":
        config = TrainConfig(steps=1000, lr=1.0, decay_start=0.0, decay_end=1.0, warmup=0.0)
        lr = c.files[file].lr_at
        assert lr(config, 0) == lr_at(config, 0) == 1.0
        assert lr(config, 250) == pytest.approx(0.1 + 0.9 * (1 - 0.5)) != lr_at(config, 250)


# ---- What else is checked of each ----------------------------------------------------------------


def mistaken(c: Changed, *edits: tuple[str, str]) -> DeepSeekV3:
    """The changed network with further edits (old, new), and the same weights."""
    source = (c.folder / "model.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (c.folder / "mistaken.py").write_text(source, encoding="utf-8")
    model = opened(["mistaken.py"], c.folder).files["mistaken.py"].DeepSeekV3(c.model.config)
    model.double().load_state_dict(c.model.state_dict())
    return model.eval()


@change("Experts that compute nothing", n_group=2, topk_group=1)
def a_token_after_the_other(c: Changed):
    """By its formula; the bias balances all experts; and a counter that is too short is found."""
    moe, x = c.model.layers[1].mlp, torch.randn(1, 20, 48).double()
    y, (_, chosen) = moe(x)
    _, _, gain = moe.gate(x)
    E, right = len(moe.experts.down_proj), moe.shared_experts(x)
    for t, (i, g) in itertools.product(range(20), enumerate(gain[0].T)):
        expert = chosen[0, t, i].item()
        if expert >= E:
            right[0, t] += g[t] * x[0, t]
        else:
            gate, up = (moe.experts.gate_up_proj[expert] @ x[0, t]).chunk(2)
            right[0, t] += g[t] * moe.experts.down_proj[expert] @ c.new.swiglu(gate, up)
    assert torch.allclose(y, right, atol=1e-12) and (chosen >= E).any() and (chosen < E).any()
    assert len(moe.gate.load) == len(moe.gate.e_score_correction_bias) == E + 4
    load = 'self.register_buffer("load", torch.zeros(E, '
    model = mistaken(c, (load, load.replace("E", "E - ZERO_EXPERTS")))
    assert all(": ends with an error" in str(x) for x in check.answers(model, CONFIG, LENGTH))


@change("Document masks", document_token=511, num_nextn_predict_layers=2)
def sees_no_other_document(c: Changed):
    """A document has the same logits behind another one as alone."""
    tokens = c.x[:1].masked_fill(c.x[:1] == 511, 0)
    tokens[:, 9] = 511
    with torch.no_grad():
        together, alone = c.model(tokens), c.model(tokens[:, 9:])
        assert torch.allclose(together[:, 9:], alone, atol=1e-12)
        c.model.config.document_token = None
        assert not torch.allclose(c.model(tokens)[:, 9:], alone, atol=1e-3)


@change("The last tokens: a short convolution")
def looks_back_by_three(c: Changed):
    conv = c.model.layers[0].conv
    with torch.no_grad():
        conv.conv.weight.normal_()
    x = torch.randn(1, 9, 48).double().requires_grad_()
    conv(x)[0, 6].sum().backward()
    assert x.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [3, 4, 5, 6]


@change("Latents that two layers share")
def one_cache_for_two_layers(c: Changed):
    """The second layer of a pair has none. Mistakes that are found: it sees the newest latents
    alone; or it takes them from an attribute, in which a block that is recomputed finds others."""
    kept = c.new.Cache(c.model.config, c.model.layers, 1, 9, c.model.lm_head.weight).kept
    assert [x is None for x in kept] == [False, True]
    model = mistaken(c, ("                kv = past.kept[:, : past.end]\n", ""))
    assert check.decoding(model, LENGTH).wrong
    own, ends = (
        "        if not self.shares:\n            latent,",
        "return self.o_proj(o.flatten(2)), kv",
    )
    model = mistaken(
        c,
        (
            "x, kv = self.run_block(block, x, rope, kv, past)",
            "x, _ = self.run_block(block, x, rope, None, past)",
        ),
        (own, "        kv = MLA.left if self.shares else None\n" + own),
        (ends, "MLA.left = kv\n        " + ends),
    )
    assert not check.decoding(model, LENGTH).wrong
    (wrong,) = check.gradients(model, CONFIG).wrong
    assert wrong.startswith("recomputed: ")


@change("Forgetting attention")
def keeps_sums_in_float32(c: Changed):
    """By its formula, a token after the other; and the check finds sums kept in bfloat16."""
    part, x = c.model.layers[0].self_attn, torch.randn(1, 20, 48).double()
    q, kv, f = (
        proj(x)[0].unflatten(-1, (2, -1)) for proj in (part.q_proj, part.kv_proj, part.f_proj)
    )
    o = torch.zeros(20, 2, 16).double()
    for t, head in itertools.product(range(20), range(2)):
        f_t, (k, v) = f[: t + 1, head, 0].sigmoid(), kv[: t + 1, head].split([24, 16], -1)
        fall = torch.stack([f_t[s + 1 :].log().sum() for s in range(t + 1)])
        o[t, head] = (k @ q[t, head] / 24**0.5 + fall).softmax(0) @ v
    assert torch.allclose(part(x, None)[0], part.o_proj(o.flatten(1)), atol=1e-12)
    # The same in the weights' dtype, for which L has to be rounded.
    source = (c.folder / "model.py").read_text(encoding="utf-8")
    source = source.replace("upcast(like).new_zeros", "like.new_zeros")
    source = source.replace("= L\n", "= L.to(h.dtype)\n")
    (c.folder / "model.py").write_text(source, encoding="utf-8")
    model = opened(["model.py"], c.folder).files["model.py"].DeepSeekV3(c.model.config)
    model.load_state_dict(c.model.state_dict())
    assert check.bfloat16(model).wrong


@change("Hyper-connections: two streams")
def keeps_the_sum_of_the_streams(c: Changed):
    """What layers add aside; and two streams that are alike, with r = w / 2 = 1/2, are V3's."""
    streams = c.model.layers[0].of_attn
    x = torch.randn(1, 5, 2, 48).double()
    _, mixed, _ = streams(x)
    assert torch.allclose(mixed.sum(2), x.sum(2)) and not torch.allclose(mixed, x, atol=0.01)
    old = DeepSeekV3(ModelConfig(**SIZES)).double()
    c.model.load_state_dict(old.state_dict(), strict=False)
    for part in c.model.modules():
        if isinstance(part, c.new.Streams):
            torch.nn.init.zeros_(part.proj.weight)
            torch.nn.init.zeros_(part.proj.bias)
    assert torch.allclose(c.model(c.x), old(c.x), atol=1e-12)


@change("A window with its ring", values={"WINDOW": 6})
def looks_back_by_five(c: Changed):
    """A ring that is too short is found, and zeros of places that were never written."""
    local, full = (block.self_attn for block in c.model.layers)
    assert (local.window, full.window) == (6, None)
    h = torch.randn(1, 20, 48).double().requires_grad_()
    for part, seen in ((local, range(7, 13)), (full, range(13))):
        rope = c.model.rope(h, torch.arange(20))
        (g,) = torch.autograd.grad(part(h, rope)[0, 12].sum(), h)
        assert g[0].abs().sum(-1).nonzero().flatten().tolist() == [*seen]
    assert local.new_cache(1, 99, h).shape[1] == 6 + check.MAX_ROUND_TOKENS
    window = "WINDOW = 64", "WINDOW = 6"
    places = "size = self.window + MAX_ROUND_TOKENS"
    wrong = check.decoding(mistaken(c, window, (places, places + " - 2")), LENGTH).wrong
    assert "main model, drafts rejected" in wrong[-1] and "one token at a time" not in str(wrong)
    wrong = check.decoding(mistaken(c, window, (" | (key < 0)", "")), LENGTH).wrong
    assert "main model, one token at a time: wrong from position 1 on" in wrong[0]


@change("Sparse attention", values={"INDEX_TOPK": 6})
def follows_attention(c: Changed):
    """The indexer alone learns from its loss, until it chooses what attention looks at."""
    c.model.zero_grad()
    loss = c.model.train()(c.x, c.y)["index_loss"]
    loss.backward()
    learn = {name for name, p in c.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learn == {name for name, _ in c.model.named_parameters() if ".indexer." in name}
    index = [p for name, p in c.model.named_parameters() if name in learn]
    optimizer = torch.optim.Adam(index, lr=0.01)
    for _ in range(30):
        now = c.model(c.x, c.y)["index_loss"]
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
    assert now < 0.7 * loss
    with torch.autocast("cpu", torch.bfloat16):  # a divergence, whose sums stay in float32
        assert c.model.float()(c.x, c.y)["index_loss"] > 0


@change("An average of the weights")
def goes_on_from_its_state(c: Changed):
    model = torch.nn.Linear(2, 2)
    average = c.files["train.py"].Average(model, decay=0.9)
    torch.nn.init.zeros_(model.weight)
    was = average.state_dict()["weight"].clone()
    average.update()
    assert torch.allclose(average.state_dict()["weight"], 0.9 * was)
    other = c.files["train.py"].Average(model)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.weights["weight"], average.weights["weight"])


@change("A term of the loss")
def has_a_weight(c: Changed):
    weights = c.files["train.py"].loss_weights(TrainConfig(), 0)
    losses = c.model.train()(c.x, c.y)
    assert weights["z_loss"] == 1e-4 and losses.keys() <= weights.keys()


@change("A new key: an attention sink", attention_sink=True)
def as_an_older_token(c: Changed):
    """Whose value is 0 and whose score is the sink's."""
    q, k, v = (torch.randn(2, 3, 5, n, dtype=torch.double) for n in (4, 4, 6))
    sink = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.double)
    score = (q @ k.mT * 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    p = torch.cat((sink.view(3, 1, 1).expand(2, 3, 5, 1), score), -1).softmax(-1)
    o = c.new.causal_attention(q, k, v, 0.5, sink=sink)
    assert torch.allclose(o, p[..., 1:] @ v, atol=1e-12)
    # It grows: without the key the network is today's, and with a low sink nearly.
    old = DeepSeekV3(ModelConfig(**SIZES)).double().eval()
    missing, _ = c.model.load_state_dict(old.state_dict(), strict=False)
    assert {name.rpartition(".")[2] for name in missing} == {"sink"} and len(missing) == 3
    grown, plain = c.model(c.x), old(c.x)
    c.model.load_state_dict({name: torch.full((2,), -99.0) for name in missing}, strict=False)
    assert torch.allclose(c.model(c.x), plain, atol=1e-12)
    assert not torch.allclose(grown, plain, atol=1e-5)


@change("A hybrid with linear attention", num_hidden_layers=4)
def token_by_token(c: Changed):
    linear, *_, mla = (block.self_attn for block in c.model.layers)
    assert type(linear) is c.new.LinearAttention and type(mla) is c.new.MLA
    h, o = torch.randn(1, 20, 48).double(), []
    x = linear.qkva_proj(h).view(20, 2, 49)  # of two heads, a token after the other
    S = torch.zeros(2, 16, 16).double()
    for q, k, v, a in zip(*x.split([16, 16, 16, 1], -1), strict=True):
        S = a[..., None].sigmoid() * S + k[..., None] * v[:, None]
        o.append((q[..., None] * S).sum(1).flatten())
    assert torch.allclose(linear(h, None), linear.o_proj(torch.stack(o)), atol=1e-12)
    c.new.LinearAttention.new_cache.__globals__["MAX_ROUND_TOKENS"] = 7
    wrong = check.decoding(c.model, 24).wrong  # of one state less
    assert len(wrong) > 1 and all("main model, drafts rejected" in way for way in wrong)
