"""A picture of accepted drafts: python experiments/drafts.py out/small [--key=value]

Writes a sample as SVG, coloured like the output of `sample.py --show=drafts` in a terminal.
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample
from load import load_model
from support.settings import info, parse_args, run_command


@dataclass
class DraftsOptions:
    out: str = "drafts.svg"  # the picture
    prompt: str = "def main("  # with the seed, the text that README's command writes
    max_new_tokens: int = 200
    speculative: int = 1  # tokens drafted in a round
    temperature: float = 0.8
    seed: int = 1337


def picture(pieces: list[tuple[str, str]], caption: str) -> str:
    """SVG of text that comes in pieces, each of a class: p prompt, d accepted draft, m the rest."""
    lines = [[]]
    for text, kind in pieces:
        first, *rest = text.expandtabs(4).split("\n")
        lines[-1].append((first, kind))
        lines += [[(part, kind)] for part in rest]
    rows = []
    for line in lines:
        spans = [f'<tspan class="{kind}">{escape(text)}</tspan>' for text, kind in line]
        rows.append(f'<text x="20" y="{56 + 19 * len(rows)}" xml:space="preserve">{"".join(spans)}')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{62 + 19 * len(lines)}">',
        "<style>text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328 }",
        ".d { fill: #1a7f37; font-weight: bold } .p, .c { fill: #6e7781 }</style>",
        '<rect x=".5" y=".5" width="899" height="99.9%" rx="8" fill="#fff" stroke="#d0d7de"/>',
        f'<text x="20" y="26" class="c">{escape(caption)}</text>',
        *(f"{row}</text>" for row in rows),
        "</svg>\n",
    ])  # fmt: skip


def main(argv: list[str]):
    ckpt, values = parse_args(__doc__, argv, DraftsOptions, positional="ckpt")
    options, forwards = DraftsOptions(**values), 0
    model, tokenizer = load_model(ckpt or "out/small", "cpu", torch.float32)
    pieces, decoder = [(options.prompt, "p")], codecs.getincrementaldecoder("utf-8")("replace")

    def on_token(row: int, ids: list[int], drafted: int):  # once a forward
        nonlocal forwards
        forwards += 1
        kinds = "d" * drafted + "m" * (len(ids) - drafted)
        for i, kind in zip(ids, kinds, strict=True):
            pieces.append((decoder.decode(tokenizer.to_bytes(i)), kind))

    sample.generate(
        model, torch.tensor([tokenizer.encode(options.prompt)]), options.max_new_tokens,
        temperature=options.temperature, top_k=200, speculative=options.speculative,
        generator=torch.Generator().manual_seed(options.seed), on_token=on_token,
    )  # fmt: skip
    green, tokens = sum(kind == "d" for _, kind in pieces), len(pieces) - 1
    caption = f"{green} of {tokens} tokens were drafted by the MTP module and accepted (green), "
    caption += f"{tokens / forwards:.2f} tokens per model call"
    Path(options.out).write_text(picture(pieces, caption), encoding="utf-8")
    info(f"{caption}; wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
