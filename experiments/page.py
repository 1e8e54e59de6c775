"""A text as one HTML page that shows its experts: python experiments/page.py out/small

The text is code that the model has not seen or, with --prompt="def main(", what it writes itself.
Each token has the colour of its first expert, in the layer that a slider chooses. Hovering, or a
tap, shows all of its experts with their weights, and the MTP module's draft: a solid line below a
token marks where the draft, made one token earlier, was what the model itself then took to be
likeliest (it would have been accepted), a dotted line where it was not. The page needs no other
file.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sample
from huggingface import load_model
from model import DeepSeekV3
from support.settings import Refusal, info, parse_args, run_command
from support.tokenizer import Tokenizer

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Experts of every token</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60em; margin: 1em auto 8em; padding: 0 1em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.9 ui-monospace, monospace; }
pre span { border-bottom: 2px solid transparent; border-radius: 2px; }
pre span:hover { outline: 1px solid; }
.yes { border-bottom: 2px solid; } .no { border-bottom: 2px dotted #888; }
#tip { position: fixed; bottom: 0; left: 0; right: 0; padding: .6em 1em; min-height: 3.2em;
  background: Canvas; border-top: 1px solid #888; white-space: pre-wrap; }
</style>
<h1>Experts of every token</h1>
<p>Each token has the colour of its first expert (the one with the largest weight).
<label>MoE layer <input id="layer" type="range" min="1" value="1"> <output id="shown"></output>
</label><br><span id="legend"></span></p>
<p><span class="yes">Solid line</span>: the draft of the MTP module, made one token earlier, was the
model's own choice at this place. <span class="no">Dotted line</span>: it was not.
<span id="origin"></span></p>
<div id="texts"></div><div id="tip">Point at a token, or tap it.</div>
<script type="application/json" id="data">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("layer"), tip = document.getElementById("tip"), spans = [];
const colour = e => `hsl(${(e * 360 / data.experts) | 0} 70% ${e % 2 ? 45 : 60}% / .45)`;
function paint() {
  for (const [span, token] of spans)
    span.style.background = colour(token.experts[slider.value - 1][0][0]);
  document.getElementById("shown").textContent = slider.value;
}
function show(token) {
  const list = token.experts[slider.value - 1].map(([e, w]) => `${e}: ${w.toFixed(2)}`).join(", ");
  tip.textContent = `${JSON.stringify(token.text)}   experts ${list}`;
  if (token.draft !== null) tip.textContent += `\\ndraft ${JSON.stringify(token.draft)}, ` +
    `the model's choice ${JSON.stringify(token.choice)}`;
}
for (const text of data.texts) {
  const pre = document.createElement("pre");
  for (const token of text) {
    const span = document.createElement("span");
    span.textContent = token.text;
    if (token.draft !== null) span.className = token.draft === token.choice ? "yes" : "no";
    span.onmouseenter = span.onclick = () => show(token);
    spans.push([span, token]);
    pre.append(span);
  }
  document.getElementById("texts").append(pre);
}
for (let e = 0; e < data.experts; e++) {
  const span = document.createElement("span");
  span.textContent = ` ${e} `;
  span.style.background = colour(e);
  document.getElementById("legend").append(span);
}
document.getElementById("origin").textContent = data.origin;
slider.max = data.layers;
slider.oninput = paint;
paint();
</script>
</html>
"""


@dataclass
class Options:
    out: str = "experts.html"  # the page
    text: str = "model.py"  # a file that the model has not seen
    start: str = "class Gate"  # where in it the page begins
    prompt: str = ""  # in place of that file: what the model writes after this, as sample.py does
    seed: int = 1337  # of what it writes
    length: int = 512  # tokens of the page


@torch.no_grad()
def describe(model: DeepSeekV3, ids: list[int], text_of) -> list[dict]:
    """Every token's text, its experts with their weights in each layer, draft and choice."""
    seen, gates = [], model.gates()[: model.config.moe_layers - len(model.mtp)]
    hooks = [gate.register_forward_hook(lambda *x: seen.append(x[-1])) for gate in gates]
    x = torch.tensor([ids], device=model.embed_tokens.weight.device)
    logits, mtp = model(x, return_mtp=True)
    for hook in hooks:
        hook.remove()
    layers = []
    for _, chosen, weight in seen:  # (1, T, K) each
        weight, order = weight[0].sort(descending=True)
        layers.append(torch.stack((chosen[0].gather(1, order), weight), -1).tolist())  # (T, K, 2)
    choice = logits[0].argmax(-1).tolist()  # [i] of token i + 1
    draft = mtp[0][0].argmax(-1).tolist() if mtp else []  # [i] of token i + 2
    tokens = []
    for i, token in enumerate(ids):
        experts = [[[int(e), round(w, 3)] for e, w in layer[i]] for layer in layers]
        drafted = 2 <= i < len(draft) + 2
        tokens.append({
            "text": text_of(token), "experts": experts,
            "draft": text_of(draft[i - 2]) if drafted else None,
            "choice": text_of(choice[i - 1]) if i else None,
        })  # fmt: skip
    return tokens


def written(model: DeepSeekV3, tokenizer: Tokenizer, options: Options) -> list[int]:
    """The prompt and what the model writes after it, with sample.py's defaults."""
    prompt, usual = tokenizer.encode(options.prompt), sample.SampleConfig()
    text = sample.generate(
        model, torch.tensor([prompt]), max(0, options.length - len(prompt)),
        temperature=usual.temperature, top_k=usual.top_k, top_p=usual.top_p,
        speculative=usual.speculative, eos_token_id=tokenizer.eos,
        generator=torch.Generator().manual_seed(options.seed),
    )  # fmt: skip
    return prompt + sample.up_to_eos(text[0, len(prompt) :].tolist(), tokenizer.eos)


def page(model: DeepSeekV3, texts: list[list[int]], text_of, prompt: str = "") -> str:
    """The page. prompt: what the model has written the texts after; "": they are given."""
    origin = "The text is given; the model did not write it."
    if prompt:
        origin = f"The model has written all that follows {prompt!r}."
    data = {
        "experts": model.config.n_routed_experts,
        "layers": model.config.moe_layers - len(model.mtp),
        "origin": origin,
        "texts": [describe(model, ids, text_of) for ids in texts],
    }
    # In a script element "</" would end it.
    return PAGE.replace("DATA", json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))


def main(argv: list[str]):
    ckpt, values = parse_args(__doc__, argv, Options, positional="ckpt")
    options = Options(**values)
    model, tokenizer, _ = load_model(ckpt or "out/small", "cpu", torch.float32)
    if tokenizer is None or model.config.first_k_dense_replace >= model.config.num_hidden_layers:
        raise Refusal(f"{ckpt} has no tokenizer or no experts: name another checkpoint.")
    if options.prompt:
        ids = written(model, tokenizer, options)
    else:
        _, start, text = Path(options.text).read_text("utf-8").partition(options.start)
        if not start:
            raise Refusal(f"{options.text} has no {options.start!r}: give another --start.")
        ids = tokenizer.encode(start + text)[: options.length]

    def text_of(token: int) -> str:
        return tokenizer.to_bytes(token).decode(errors="replace")

    content = page(model, [ids], text_of, options.prompt)
    Path(options.out).write_text(content, encoding="utf-8")
    info(f"{options.out}: {len(content) / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main)
