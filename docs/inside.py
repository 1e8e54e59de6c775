"""A page on which one clicks through a text, token by token: python docs/inside.py RUN

    python docs/inside.py weights/small --out=docs/inside.html

The network of a run, or of a Hugging Face directory, writes a text. The page shows, for every
token, where each head looks, which experts the token visits, what is cached of it, what the network
predicts after each layer, what the MTP modules draft, and which calls of the model wrote the text.
It is one file, which a browser opens without a server. docs/inside_template.html draws it.

Everything is read from a run of model.py: by hooks on blocks and gates, and by asking
`causal_attention` for its probabilities. So the page shows edited networks, too. A layer without
such a part lacks its row.

Shapes: T tokens of the text, H heads, E experts, K experts per token, D hidden size, V vocabulary.
"""

import base64
import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as essay
import sample
from load import load_model
from model import Cache, DeepSeekV3, Gate
from support.files import write_whole
from support.settings import Refusal, info, parse_args, run_command, with_home
from support.sizes import cache_numbers
from support.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("inside_template.html")
MAX_TOKENS = 300  # of weights/small, whose page then has 0.9 MB; it grows by layers, heads, T^2


@dataclass
class InsideConfig:
    run: str = "weights/small"  # a run (best.pt, else ckpt.pt), a file, or a Hugging Face directory
    prompt: str = "for name in sorted(os.listdir(path)):\n    if name"  # text to continue
    max_new_tokens: int = 72  # at most; a page shows 300 tokens, the prompt's included
    temperature: float = 0.5  # 0: always the likeliest token
    seed: int = 7  # the same seed and options give the same text
    out: str = "inside.html"  # the page


@torch.inference_mode()
def write(model: DeepSeekV3, tokens: Tensor, config: InsideConfig) -> tuple[Tensor, list]:
    """Continues tokens (1, T), with a draft per round if the model has MTP modules. Returns the
    text, and of each round the number of tokens before it, of drafts that stay, and the first
    rejected draft, if any."""
    verify, rounds = sample.Text.verify, []

    def recorded(text, n, q, u, *rest):
        drafts = text.tokens[0, n : n + q.shape[1]].tolist()
        kept, out = verify(text, n, q, u, *rest)
        rounds.append([n, kept.item(), *drafts[kept.item() :][:1]])
        return kept, out

    generator = torch.Generator().manual_seed(config.seed)
    options = dict(temperature=config.temperature, generator=generator)
    with mock.patch.object(sample.Text, "verify", recorded):
        text = sample.generate(model, tokens, config.max_new_tokens, **options)
    return text, rounds


@torch.inference_mode()
def look(model: DeepSeekV3, text: Tensor) -> list[dict]:
    """What each block computes of a text (1, T); those of the MTP modules come last. A block that
    has no such part lacks its entry.

    attention    probabilities (H, T, T), row t those of the query at t
    gate         the gate, its input (1, T, D) and what it returns of that
    state        the block's output (T, D)
    cache        what a layer of the main model caches (T, C+R)
    logits       of the last layer and of each MTP module, (T - k, V)
    """
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    found, hooks, now = [{} for _ in blocks], [], []  # now: the entries of the blocks so far
    attend, T = essay.causal_attention, text.shape[1]

    def watched(q, k, v, scale, *rest, **more):
        if q.shape[2] == (S := k.shape[2]):
            # With the unit matrix as values it returns its probabilities, edited or not.
            rows = torch.eye(S).to(v).expand(*k.shape[:2], S, S)
            now[-1]["attention"] = attend(q, k, rows, scale, *rest, **more)[0].float()
        return attend(q, k, v, scale, *rest, **more)

    def keep_gate(gate, given, result):
        now[-1]["gate"] = gate, given[0], result

    def keep_state(block, given, result):
        x = tree_leaves(result)[0]
        if x.ndim == 3:  # not several streams
            now[-1]["state"] = x[0]

    for block, x in zip(blocks, found, strict=True):
        hooks.append(block.register_forward_pre_hook(lambda *_, x=x: now.append(x)))
        hooks.append(block.register_forward_hook(keep_state))
    hooks += [gate.register_forward_hook(keep_gate) for gate in model.gates()]
    with mock.patch.object(essay, "causal_attention", watched):
        logits, further = model(text, return_mtp=True)
    for hook in hooks:
        hook.remove()
    for x, of_block in zip((logits, *further), found[len(model.layers) - 1 :], strict=False):
        of_block["logits"] = x[0]
    cache = Cache(model.config, model.layers, 1, T, model.embed_tokens.weight)
    model.trunk(text, cache)
    for x, of_block in zip(cache.kept, found, strict=False):
        if isinstance(x, Tensor) and x.shape[1] == T:
            of_block["cache"] = x[0].flatten(1)
    return found


def visits(groups: int, gate: Gate, u: Tensor, result: tuple[Tensor, ...]) -> dict:
    """Which experts each token visits: by expert the gate value, and 1 if only the bias chose it.
    `lost` are the experts that the score alone would choose, without bias and groups."""
    s, chosen, gain = (x[0] for x in result)
    bias, rows, lost = gate.e_score_correction_bias, [], []
    without = functional_call(gate, {"e_score_correction_bias": torch.zeros_like(bias)}, (u,))[1][0]
    best = s.topk(chosen.shape[-1]).indices
    for c, g, *others in zip(*(x.tolist() for x in (chosen, gain, without, best)), strict=True):
        unbiased, by_score = map(set, others)
        pairs = sorted(zip(c, g, strict=True))
        rows.append({e: [round(g, 3), int(e not in unbiased)] for e, g in pairs})
        lost.append(sorted(by_score.difference(c)))
    bias = [round(b, 3) for b in bias.tolist()]
    return {"groups": groups, "bias": bias, "visits": rows, "lost": lost}


@torch.inference_mode()
def page_data(model: DeepSeekV3, tokenizer: Tokenizer, text: Tensor, rounds: list) -> dict:
    """What the template draws. Attention's probabilities (in bytes, 255 for 1) and cached numbers
    (in int16, 100 for 1) are packed in one array each. A block's `heads` are H and where its rows
    begin, of H (t + 1) bytes for token t; its `cache` the width and where its rows begin."""
    found, ids, T, last = look(model, text), text[0].tolist(), text.shape[1], len(model.layers) - 1
    probabilities, cached, blocks = bytearray(), bytearray(), []

    def likeliest(logits: Tensor, n: int) -> list:
        p = logits.softmax(-1).topk(n)
        pairs = zip(p.indices.tolist(), p.values.tolist(), strict=True)
        return [[[word(i), round(x, 3)] for i, x in zip(*row, strict=True)] for row in pairs]

    def word(i: int) -> str:
        return tokenizer.decode([i], errors="replace")

    for i, x in enumerate(found):
        k = max(0, i - last)  # of the MTP module
        block = {"name": f"MTP {k}" if k else f"layer {i}", "length": T - k}
        if "attention" in x:
            rows = [row[:, : t + 1].flatten() for t, row in enumerate(x["attention"].unbind(1))]
            block["heads"] = [len(x["attention"]), len(probabilities)]
            probabilities += (255 * torch.cat(rows)).round().byte().numpy().tobytes()
        if "gate" in x:
            block["experts"] = visits(model.config.n_group, *x["gate"])
        if "cache" in x:
            block["cache"] = [x["cache"].shape[1], len(cached) // 2]
            numbers = (100 * x["cache"].float()).round().clamp(-32767, 32767)
            cached += numbers.short().numpy().tobytes()
        if "logits" in x:
            block["words"] = likeliest(x["logits"], 5)
        elif "state" in x:
            block["words"] = likeliest(model.logits(model.norm(x["state"])).float(), 1)
        blocks.append(block)

    nll = -found[last]["logits"].log_softmax(-1)[:-1].gather(1, text[0, 1:, None])[:, 0]
    return {
        "tokens": [word(i) for i in ids],
        "prompt": rounds[0][0] if rounds else T,
        "rounds": [[n, kept, *map(word, rejected)] for n, kept, *rejected in rounds],
        "surprise": [None, *(round(x, 2) for x in nll.tolist())],
        "blocks": blocks,
        "probabilities": packed(probabilities),
        "cached": packed(cached),
        "latent": model.config.kv_lora_rank,
        "usual": cache_numbers(model)[2],  # numbers that multi-head attention would cache
    }


def packed(x: bytearray) -> str:
    return base64.b64encode(zlib.compress(x, 9)).decode()


def main(argv: list[str]):
    about = "A page on which one clicks through a text: python docs/inside.py RUN [--key=value]"
    _, values = parse_args(about, argv, InsideConfig, positional="run")
    config = InsideConfig(**values | with_home(values, "run", "out"))
    model, tokenizer = load_model(config.run, dtype=torch.float32)  # as sample.py on a CPU
    if tokenizer is None:
        raise Refusal(f"{config.run} has no tokenizer: copy the release's file there.")
    ids = tokenizer.encode(config.prompt)
    if (size := len(ids) + config.max_new_tokens) > MAX_TOKENS:
        raise Refusal(
            f"the text may have {size} tokens, but a page shows at most {MAX_TOKENS}: give a "
            "shorter --prompt or a lower --max_new_tokens."
        )
    text, rounds = write(model, torch.tensor([ids]), config)
    data = page_data(model, tokenizer, text, rounds) | {"run": config.run}
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    folder = os.path.relpath(TEMPLATE.parent, Path(config.out).parent)  # of the links
    page = TEMPLATE.read_text("utf-8").replace('href="./', f'href="{folder}/')
    page = page.replace("/*DATA*/", line).encode()
    write_whole(Path(config.out), lambda file: file.write(page))
    info(f"{config.out}, {len(page) / 1000:.0f} kB: open it in a browser")


if __name__ == "__main__":
    run_command(main)
