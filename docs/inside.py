"""A page on which one clicks through a text, token by token: python docs/inside.py RUN

    python docs/inside.py weights/small --out=docs/inside.html

The network of a run, or of a Hugging Face directory, writes a text. The page shows, for every
token, where each head looks, which experts the token visits, what is cached of it, what the network
predicts after each layer, what the MTP modules draft, and which calls of the model wrote the text.
It is one file, which a browser opens without a server. docs/inside_template.html draws it.

Everything is read from a run of model.py: by hooks on blocks and gates, and by asking
`causal_attention` for its probabilities. So the page shows edited networks, too. A layer without
such a part lacks its row.

Shapes: T tokens of the text, H heads, W width of a query, E experts, K experts per token, D hidden
size, V vocabulary.
"""

import base64
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as essay
import sample
from load import load_model
from model import Cache, DeepSeekV3
from support.files import write_whole
from support.settings import Refusal, info, parse_args, run_command, with_home
from support.sizes import cache_numbers
from support.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("inside_template.html")
MAX_TOKENS = 300  # of weights/small, whose page then has 0.7 MB; it grows by layers, heads, T^2


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
def look(model: DeepSeekV3, text: Tensor) -> dict:
    """What the network computes of a text (1, T). Lists have an entry for each block, those of the
    MTP modules last; None where a block has no such part.

    attention    probabilities (H, T, T), row t those of the query at t
    states       the block's output (T, D)
    routing      the gate, its scores (T, E), the chosen experts and their gate values (T, K)
    cache        what a layer of the main model caches (T, C+R)
    logits       of the main model and of each MTP depth, (T - k, V)
    """
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    parts = ("attention", "states", "routing")
    found, hooks, now = {x: [None] * len(blocks) for x in parts}, [], [0]
    attend = essay.causal_attention

    def watched(q, k, v, scale, *rest, **more):
        if q.shape[2] == (S := k.shape[2]):
            # With the unit matrix as values it returns its probabilities, edited or not.
            rows = torch.eye(S).to(v).expand(*k.shape[:2], S, S)
            found["attention"][now[0]] = attend(q, k, rows, scale, *rest, **more)[0].float()
        return attend(q, k, v, scale, *rest, **more)

    def keep_routing(gate, given, result):
        found["routing"][now[0]] = gate, *(x[0] for x in result)

    def keep_state(block, given, result):
        x = result[0] if isinstance(result, tuple) else result
        found["states"][now[0]] = x[0] if x.shape[:-1] == text.shape else None

    for i, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, i=i: now.__setitem__(0, i)))
        hooks.append(block.register_forward_hook(keep_state))
    hooks += [gate.register_forward_hook(keep_routing) for gate in model.gates()]
    with mock.patch.object(essay, "causal_attention", watched):
        logits, further = model(text, return_mtp=True)
    for hook in hooks:
        hook.remove()
    cache = Cache(model.config, model.layers, 1, text.shape[1], model.embed_tokens.weight)
    model.trunk(text, cache)
    shape = text.shape[1]
    rows = [x[0] if isinstance(x, Tensor) and x.shape[1] == shape else None for x in cache.kept]
    return found | {"cache": rows, "logits": [x[0] for x in (logits, *further)]}


def page_data(model: DeepSeekV3, tokenizer: Tokenizer, text: Tensor, rounds: list) -> dict:
    """What the template draws. Probabilities of attention and cached numbers are bytes in `blob`,
    at the offsets in `attention` and `cache`; a cached number x is 128 + 127 x / scale."""
    found, blob, offset = look(model, text), [], [0]
    config, ids = model.config, text[0].tolist()

    def put(x: Tensor) -> int:
        blob.append(x.round().clamp(0, 255).byte().cpu().numpy().tobytes())
        offset[0] += len(blob[-1])
        return offset[0] - len(blob[-1])

    def triangle(p: Tensor) -> list[int]:  # H, then the offset of row 0; row t has H (t + 1) bytes
        rows = [(255 * p[:, t, : t + 1]).flatten() for t in range(p.shape[1])]
        return [len(p), put(torch.cat(rows))]

    def word(i: int) -> str:
        return tokenizer.decode([i], errors="replace")

    def likeliest(logits: Tensor, n: int) -> list:
        p = logits.softmax(-1).topk(n)
        pairs = zip(p.indices.tolist(), p.values.tolist(), strict=True)
        return [[[word(i), round(x, 3)] for i, x in zip(*row, strict=True)] for row in pairs]

    def visits(gate, s: Tensor, chosen: Tensor, gain: Tensor) -> dict:
        alone = s.topk(chosen.shape[-1]).indices.tolist()  # without bias and groups
        rows = zip(chosen.tolist(), gain.tolist(), alone, strict=True)
        rows = [[sorted(zip(c, g, strict=True)), sorted({*a} - {*c})] for c, g, a in rows]
        rows = [[[[e, round(g, 3)] for e, g in at], lost] for at, lost in rows]
        bias = [round(b, 3) for b in gate.e_score_correction_bias.tolist()]
        return {"E": s.shape[-1], "G": config.n_group, "visits": rows, "bias": bias}

    main, *further = found["logits"]
    nll = -main.log_softmax(-1)[:-1].gather(1, text[0, 1:, None])[:, 0]
    states = found["states"][: len(model.layers)]
    lens = [x if x is None else model.logits(model.norm(x)).float() for x in states]

    def cached(x: Tensor | None) -> list | None:  # width, offset, scales of latent and rotated key
        if x is None:
            return None
        parts = x.float().split(
            [min(C := config.kv_lora_rank, x.shape[1]), max(0, x.shape[1] - C)], 1
        )
        scales = [part.abs().amax().item() if part.numel() else 1.0 for part in parts]
        scaled = torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)], 1)
        return [x.shape[1], put(128 + 127 * scaled), *(round(scale, 3) for scale in scales)]

    data = {
        "tokens": [word(i) for i in ids],
        "prompt": rounds[0][0] if rounds else len(ids),
        "rounds": [[n, kept, *map(word, rejected)] for n, kept, *rejected in rounds],
        "surprise": [None, *(round(x, 2) for x in nll.tolist())],
        "names": [f"layer {i}" for i in range(len(model.layers))]
        + [f"MTP {k}" for k in range(1, len(model.mtp) + 1)],
        "next": likeliest(main, 5),
        "mtp": [likeliest(x, 3) for x in further],
        "lens": [x if x is None else likeliest(x, 1) for x in lens],
        "experts": [x and visits(*x) for x in found["routing"]],
        "attention": [x if x is None else triangle(x) for x in found["attention"]],
        "cache": [cached(x) for x in found["cache"]],
        "latent": config.kv_lora_rank,
        "usual": cache_numbers(model)[2],  # numbers that multi-head attention would cache
    }
    return data | {"blob": base64.b64encode(zlib.compress(b"".join(blob), 9)).decode()}


def main(argv: list[str]):
    about = "A page on which one clicks through a text: python docs/inside.py RUN [--key=value]"
    _, values = parse_args(about, argv, InsideConfig, positional="run")
    config = InsideConfig(**values | with_home(values, "run", "out"))
    model, tokenizer = load_model(config.run, dtype=torch.float32)  # as sample.py on a CPU
    if tokenizer is None:
        raise Refusal(f"{config.run} has no tokenizer: copy the release's file there.")
    if not (ids := tokenizer.encode(config.prompt)):
        raise Refusal("the prompt is empty: give --prompt=TEXT.")
    if (size := len(ids) + config.max_new_tokens) > MAX_TOKENS:
        raise Refusal(
            f"the text may have {size} tokens, but a page shows at most {MAX_TOKENS}: give a "
            "shorter --prompt or a lower --max_new_tokens."
        )
    text, rounds = write(model, torch.tensor([ids]), config)
    data = page_data(model, tokenizer, text, rounds) | {"run": config.run}
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = TEMPLATE.read_text("utf-8").replace("/*DATA*/", line)
    write_whole(Path(config.out), lambda file: file.write(page.encode()))
    info(f"{config.out}, {len(page.encode()) / 1000:.0f} kB: open it in a browser")


if __name__ == "__main__":
    run_command(main)
