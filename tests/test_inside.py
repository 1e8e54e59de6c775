"""docs/inside.py: what stands in the page is what the network computes."""

import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from networks import tiny, tokens_of
from training import ROOT

from model import Cache, MoE, causal_attention
from support.settings import Refusal
from support.tokenizer import stored_tokenizer

sys.path.insert(0, str(ROOT / "docs"))
import inside

PAGE = ROOT / "docs/inside.html"
TOKENIZER = stored_tokenizer(ROOT / "weights/small")
GREEDY = inside.InsideConfig(max_new_tokens=40, temperature=0)
NETWORKS = [{}, {"q_lora_rank": None, "n_group": 1, "topk_group": 1}]
NETWORKS += [{"num_nextn_predict_layers": 0, "first_k_dense_replace": 9}]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.usefixtures("v3")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"


def read(page: Path) -> dict:
    return json.loads(re.search(r"const d = (\{.*\})\n", page.read_text("utf-8"))[1])


def unpacked(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind).astype(float)


@pytest.mark.parametrize("changes", NETWORKS)
@torch.inference_mode()
def test_the_page_has_the_networks_numbers(changes, monkeypatch):
    model, attention = tiny(**changes), []
    text, rounds = inside.write(model, tokens_of(model, 1, 12), GREEDY)
    data, T, c = inside.page_data(model, TOKENIZER, text, rounds), text.shape[1], model.config
    inputs = {}  # of every part, in one forward pass
    for part in model.modules():
        part.register_forward_pre_hook(lambda part, given: inputs.__setitem__(part, given[0]))

    def attend(q, k, v, scale):
        ahead = torch.ones(k.shape[2], k.shape[2]).triu(1).bool()
        score = (scale * q @ k.mT).masked_fill(ahead, -torch.inf)
        attention.append(score.softmax(-1)[0])
        return causal_attention(q, k, v, scale)

    monkeypatch.setattr("model.causal_attention", attend)
    logits, further = model(text, return_mtp=True)
    monkeypatch.undo()
    bytes, numbers = unpacked(data["probabilities"], np.uint8), unpacked(data["cached"], np.int16)

    # The logits after each block: of layer i from what layer i + 1 reads.
    after = [model.lm_head(model.norm(inputs[block])) for block in model.layers[1:]]
    after += [logits, *further]
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    for block, p, x, shown in zip(blocks, attention, after, data["blocks"], strict=True):
        for row, words in zip(x[0].softmax(-1), shown["words"], strict=True):
            values, ids = (x.tolist()[: len(words)] for x in row.sort(descending=True))
            assert [x for _, x in words] == pytest.approx(values, abs=6e-4)
            assert words[0][0] == TOKENIZER.decode(ids[:1], errors="replace")

        rows = torch.cat([p[:, t, : t + 1].flatten() for t in range(p.shape[1])])
        H, start = shown["heads"]
        assert len(p) == H and p.shape[1] == shown["length"]
        assert np.abs(bytes[start : start + len(rows)] - 255 * rows.numpy()).max() < 0.51

        if not isinstance(block.mlp, MoE):
            assert "experts" not in shown
            continue
        gate, experts = block.mlp.gate, shown["experts"]
        bias, K = gate.e_score_correction_bias.tolist(), c.num_experts_per_tok
        rows = zip(inputs[gate][0], experts["visits"], experts["lost"], strict=True)
        for u, visits, lost in rows:
            s = (gate.weight @ u).sigmoid().tolist()
            gain, unbiased = (reference.route(vars(c), s, b) for b in (bias, [0] * len(bias)))
            assert {e: x for e, (x, _) in visits.items()} == pytest.approx(gain, abs=6e-4)
            assert {e for e, (_, raised) in visits.items() if raised} == {*gain} - {*unbiased}
            assert lost == sorted({*sorted(range(len(s)), key=lambda i: -s[i])[:K]} - {*gain})
        assert any(raised for x in experts["visits"] for _, raised in x.values())

    surprise = F.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
    assert surprise.tolist() == pytest.approx(data["surprise"][1:], abs=0.006)
    cache = Cache(c, model.layers, 1, T, logits)
    model.trunk(text, cache)
    for kept, shown in zip(cache.kept, data["blocks"], strict=False):
        width, start = shown["cache"]
        kept = kept[0].flatten().numpy()
        assert width * T == len(kept)
        assert np.abs(numbers[start : start + len(kept)] / 100 - kept).max() < 0.006

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
    for x in inside.look(model := tiny(), tokens_of(model, 1, 12)):
        p = x["attention"]
        assert p.sum(-1).numpy() == pytest.approx(1) and not p.tril(-3).any()


def test_the_committed_page_is_that_of_the_weights(tmp_path):
    """python docs/inside.py --out=docs/inside.html makes it."""
    inside.main([str(ROOT / "weights/small"), f"--out={tmp_path / 'page.html'}"])
    now, then = read(tmp_path / "page.html"), read(PAGE)
    assert (now["tokens"], now["rounds"]) == (then["tokens"], then["rounds"])
    for part, kind in (("probabilities", np.uint8), ("cached", np.int16)):
        assert np.abs(unpacked(now[part], kind) - unpacked(then[part], kind)).max() <= 1
    words = [re.findall(r"\d+\.\d+", str([x["words"] for x in d["blocks"]])) for d in (now, then)]
    assert np.abs(np.diff(np.array(words, float), axis=0)).max() < 0.0011
    H, start = then["blocks"][4]["heads"]  # the head of the tour's part 4 and of README's picture
    p = unpacked(then["probabilities"], np.uint8)[start + H * 24 * 25 // 2 + 14] / 255
    assert p == pytest.approx(0.92, abs=0.005)
    for piece in inside.TEMPLATE.read_text("utf-8").split("/*DATA*/"):
        assert piece in PAGE.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["weights/small", "--prompt="], "nothing to continue: the prompt is empty"),
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
    address = f"file://{PAGE}#token=12&layer=6"
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=100)
    data, page = read(PAGE), done.stdout
    assert page.count("<span class=") >= len(data["tokens"])
    (told,) = re.findall(r'<p id="told"[^>]*>(.*?)</p>', page)
    assert (
        told.startswith("Token 12, ") and f"a surprise of {data['surprise'][12]:.2f} nats" in told
    )
    assert "Head 0 of layer 6 looks " in told
