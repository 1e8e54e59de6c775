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
import torch
from networks import tiny, tokens_of
from training import ROOT

from model import Cache, rope_table, rotate
from support.settings import Refusal
from support.tokenizer import stored_tokenizer

sys.path.insert(0, str(ROOT / "docs"))
import inside

NETWORKS = [{}, {"q_lora_rank": None, "n_group": 1, "topk_group": 1}]
NETWORKS += [{"num_nextn_predict_layers": 0, "first_k_dense_replace": 9}]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"


def read(page: str) -> dict:
    return json.loads(re.search(r"const d = (\{.*\})\n", page)[1])


def unpacked(data: dict) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(data["blob"])), np.uint8).astype(int)


@pytest.mark.parametrize("changes", NETWORKS)
@torch.inference_mode()
def test_the_page_has_the_networks_numbers(changes):
    model, ids = tiny(**changes), tokens_of(tiny(**changes), 1, 12)
    text, rounds = inside.write(model, ids, inside.InsideConfig(max_new_tokens=9, temperature=1))
    tokenizer = stored_tokenizer(ROOT / "weights/small")
    data, T = inside.page_data(model, tokenizer, text, rounds), text.shape[1]
    found, (logits, further) = unpacked(data), model(text, return_mtp=True)
    for x, shown in zip((logits, *further), (data["next"], *data["mtp"]), strict=True):
        likely = x[0].softmax(-1).topk(1).values[:, 0]
        assert likely.tolist() == pytest.approx([row[0][1] for row in shown], abs=6e-4)
    assert [x[0] for x in data["lens"][-1]] == [row[0] for row in data["next"]]
    visits = [[[e for e, _ in v] for v, _ in x["visits"]] for x in data["experts"] if x]
    assert visits == [x[0].sort(-1).values.tolist() for x in model.chosen]
    cache, c = Cache(model.config, model.layers, 1, T, logits), model.config
    model.trunk(text, cache)
    for kept, (width, at, *scales) in zip(cache.kept, data["cache"], strict=True):
        scale = np.repeat(scales, [c.kv_lora_rank, c.qk_rope_head_dim])
        bytes = found[at : at + T * width].reshape(T, width)
        assert np.abs((bytes - 128) / 127 * scale - kept[0].numpy()).max() < 0.006 * max(scales)
    mla, h = model.layers[0].self_attn, model.layers[0].input_layernorm(model.embed_tokens(text))
    q = mla.q_proj(h) if c.q_lora_rank is None else mla.q_b_proj(mla.q_a_layernorm(mla.q_a_proj(h)))
    q_nope, q_pe = q.view(1, T, c.num_attention_heads, -1).split(
        [c.qk_nope_head_dim, c.qk_rope_head_dim], -1
    )
    q_pe = rotate(q_pe, rope_table(c, torch.arange(T), h.dtype), c.rope_interleave)
    W_UK = mla.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
    q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, W_UK[:, : c.qk_nope_head_dim]), q_pe), -1)
    p = (mla.scale * q[0, -1] @ cache.kept[0][0].T).softmax(-1)  # (H, T), of the last token
    H, at = data["attention"][0]
    row = found[at + H * T * (T - 1) // 2 :][: H * T].reshape(H, T)
    assert np.abs(row / 255 - p.numpy()).max() < 0.003
    known = [n + i for n, kept, *_ in data["rounds"] for i in range(kept + 1) if n + i < T]
    assert known == [*range(12, T)]  # every token was written by one round


def test_the_committed_page_is_that_of_the_weights(tmp_path):
    inside.main([str(ROOT / "weights/small"), f"--out={tmp_path / 'page.html'}"])
    pages = [(tmp_path / "page.html").read_text("utf-8"), (ROOT / "docs/inside.html").read_text()]
    now, then = map(read, pages)
    assert (now["tokens"], now["rounds"]) == (then["tokens"], then["rounds"])
    assert np.abs(unpacked(now) - unpacked(then)).max() <= 1
    numbers = [np.array(re.findall(r"\d+\.\d+", json.dumps(x["next"])), float) for x in (now, then)]
    assert np.abs(numbers[0] - numbers[1]).max() < 0.0011
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
