"""docs/inside.py: what stands in the page is what the network computes."""

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from networks import tiny, tokens_of
from training import ROOT

from model import Cache, rope_table, rotate
from support.settings import Refusal
from support.tokenizer import stored_tokenizer

sys.path.insert(0, str(ROOT / "docs"))
import inside

TOKENIZER = stored_tokenizer(ROOT / "weights/small")
GREEDY = inside.InsideConfig(max_new_tokens=40, temperature=0)
NETWORKS = [{}, {"q_lora_rank": None, "n_group": 1, "topk_group": 1}]
NETWORKS += [{"num_nextn_predict_layers": 0, "first_k_dense_replace": 9}]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"


def read(page: str) -> dict:
    return json.loads(re.search(r"const d = (\{.*\})\n", page)[1])


def unpacked(data: dict) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(data["blob"])), np.uint8).astype(int)


def probabilities(mla, h: torch.Tensor) -> torch.Tensor:
    """Attention's (H, T, T) for its input h (1, T, D), from latents: scores and softmax alone."""
    c, T = mla.config, h.shape[1]
    H, N, R = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    q = mla.q_proj(h) if c.q_lora_rank is None else mla.q_b_proj(mla.q_a_layernorm(mla.q_a_proj(h)))
    latent, k_pe = mla.kv_a_proj_with_mqa(h).split([c.kv_lora_rank, R], -1)
    rope = rope_table(c, torch.arange(T), h.dtype)
    q_nope, q_pe = q.view(1, T, H, N + R).split([N, R], -1)
    q_pe, k_pe = (rotate(x, rope, c.rope_interleave)[0] for x in (q_pe, k_pe[:, :, None]))
    W_UK = mla.kv_b_proj.weight.view(H, -1, c.kv_lora_rank)[:, :N]
    score = torch.einsum("thn,hnc,sc->hts", q_nope[0], W_UK, mla.kv_a_layernorm(latent)[0])
    score = score + torch.einsum("thr,sr->hts", q_pe, k_pe[:, 0])
    ahead = torch.ones(T, T).triu(1).bool()
    return (mla.scale * score).masked_fill(ahead, -torch.inf).softmax(-1)


@pytest.mark.parametrize("changes", NETWORKS)
@torch.inference_mode()
def test_the_page_has_the_networks_numbers(changes):
    model = tiny(**changes)
    for gate in model.gates():
        gate.e_score_correction_bias += torch.linspace(0.1, 0, model.config.n_routed_experts)
    text, rounds = inside.write(model, tokens_of(model, 1, 12), GREEDY)
    data, T, c = inside.page_data(model, TOKENIZER, text, rounds), text.shape[1], model.config
    inputs = {}  # of every part, in one forward pass
    for part in model.modules():
        part.register_forward_pre_hook(lambda part, given: inputs.__setitem__(part, given[0]))
    found, (logits, further) = unpacked(data), model(text, return_mtp=True)

    blocks = [*model.layers, *(module.block for module in model.mtp)]
    for block, (H, at) in zip(blocks, data["attention"], strict=True):
        p = probabilities(block.self_attn, inputs[block.self_attn])
        rows = [255 * p[:, t, : t + 1].flatten() for t in range(p.shape[1])]
        shown = found[at : at + H * len(rows) * (len(rows) + 1) // 2]
        assert np.abs(shown - torch.cat(rows).numpy()).max() < 0.51
    for x, shown in zip((logits, *further), (data["next"], *data["mtp"]), strict=True):
        for row, words in zip(x[0].softmax(-1), shown, strict=True):
            values, ids = (x.tolist()[: len(words)] for x in row.sort(descending=True))
            assert [x for _, x in words] == pytest.approx(values, abs=6e-4)
            assert words[0][0] == TOKENIZER.decode(ids[:1], errors="replace")
    after = [*(inputs[block] for block in model.layers[1:]), inputs[model.norm]]
    for x, shown in zip(after, data["lens"], strict=True):
        likely = model.lm_head(model.norm(x))[0].softmax(-1).max(-1).values.tolist()
        assert likely == pytest.approx([row[0][1] for row in shown], abs=6e-4)
    surprise = F.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
    assert surprise.tolist() == pytest.approx(data["surprise"][1:], abs=0.006)

    routed = [x for x in data["experts"] if x]
    for gate, shown in zip(model.gates(), routed, strict=True):
        bias = gate.e_score_correction_bias.tolist()
        for u, (visits, lost) in zip(inputs[gate][0], shown["visits"], strict=True):
            s = (gate.weight @ u).sigmoid().tolist()
            gain = reference.route(vars(c), s, bias)
            assert dict(visits) == pytest.approx(gain, abs=6e-4)
            best = sorted(range(len(s)), key=lambda i: -s[i])[: c.num_experts_per_tok]
            assert lost == sorted({*best} - {*gain})
    assert any(lost for x in routed for _, lost in x["visits"]) == bool(routed)

    cache = Cache(c, model.layers, 1, T, logits)
    model.trunk(text, cache)
    for kept, (width, at, *scales) in zip(cache.kept, data["cache"], strict=True):
        scale = np.repeat(scales, [c.kv_lora_rank, c.qk_rope_head_dim])
        bytes = found[at : at + T * width].reshape(T, width)
        assert np.abs((bytes - 128) / 127 * scale - kept[0].numpy()).max() < 0.006 * max(scales)

    known = [n + i for n, kept, *_ in rounds for i in range(kept + 1) if n + i < T]
    assert known == [*range(12, T)]  # every token was written by one round
    for n, kept, *rejected in rounds[1:] if further else []:
        draft = further[0][0, n - 2].argmax().item()  # of token n, from those before it
        assert (rejected == [draft]) == (draft != text[0, n]) and kept == (not rejected)


@torch.inference_mode()
def test_an_edited_attention_is_shown_as_it_computes(monkeypatch):
    def window(q, k, v, scale, positions=None):  # of three tokens
        ahead = torch.arange(k.shape[2])[:, None] - torch.arange(k.shape[2])
        score = (scale * q @ k.mT).masked_fill((ahead < 0) | (ahead > 2), -torch.inf)
        return score.softmax(-1) @ v

    monkeypatch.setattr("model.causal_attention", window)
    for p in inside.look(model := tiny(), tokens_of(model, 1, 12))["attention"]:
        assert p.sum(-1).numpy() == pytest.approx(1) and not p.tril(-3).any()


def test_the_committed_page_is_that_of_the_weights(tmp_path):
    inside.main([str(ROOT / "weights/small"), f"--out={tmp_path / 'page.html'}"])
    pages = [(tmp_path / "page.html").read_text("utf-8"), (ROOT / "docs/inside.html").read_text()]
    now, then = map(read, pages)
    assert (now["tokens"], now["rounds"]) == (then["tokens"], then["rounds"])
    assert np.abs(unpacked(now) - unpacked(then)).max() <= 1
    numbers = [np.array(re.findall(r"\d+\.\d+", json.dumps(x["next"])), float) for x in (now, then)]
    assert np.abs(numbers[0] - numbers[1]).max() < 0.0011
    H, at = then["attention"][4]  # the head of the tour's part 4 and of README's picture
    assert unpacked(then)[at + H * 24 * 25 // 2 + 14] / 255 == pytest.approx(0.92, abs=0.005)
    template = (ROOT / "docs/inside_template.html").read_text("utf-8")
    for piece in template.split("/*DATA*/"):  # else: python docs/inside.py --out=docs/inside.html
        assert piece in pages[1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["weights/small", "--prompt="], "the prompt is empty: give --prompt=TEXT."),
        (["weights/small", "--max_new_tokens=300"], "but a page shows at most 300: give a shorter"),
        (["weights/none"], "there is no weights/none"),
    ],
)
def test_what_no_page_can_show_is_refused(options, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Refusal, match=re.escape(sentence)):
        inside.main(options)


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_a_browser_shows_the_token_of_the_address(tmp_path):
    address = f"file://{ROOT}/docs/inside.html#token=12&layer=6"
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=100)
    data, page = read((ROOT / "docs/inside.html").read_text("utf-8")), done.stdout
    assert page.count("<span class=") >= len(data["tokens"])
    (told,) = re.findall(r'<p id="told"[^>]*>(.*?)</p>', page)
    assert told.startswith("Token 12, ") and f"surprise {data['surprise'][12]:.2f} nats" in told
