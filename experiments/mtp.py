"""Does predicting two tokens help, and are its drafts accepted? python experiments/mtp.py

The report trains one MTP module (section 2.2): benchmarks gain, the loss does not (its Table 4),
and 85 to 90 % of the second tokens are accepted (section 5.4.3). A step without a module is
shorter, so a run without one is also trained for about the same seconds. Acceptance is measured
twice: on unseen code, a given text that cannot repeat itself in circles, as the sum of min(p, q)
(arXiv 2211.17192) or, greedy, as equal choices; and on texts that the model writes, with 4 drafts a
round, beside the share of their 6-grams that they repeat, which makes drafting easy.
"""

import statistics
from pathlib import Path

import numpy as np
import report
import run
import torch
from speculation import repeats, unseen_prompts

import sample
from support.tokenizer import stored_tokenizer

ARMS = {
    "off": run.Arm({"num_nextn_predict_layers": 0}),
    # The base's seconds, both measured alone.
    "off longer": run.Arm({"num_nextn_predict_layers": 0}, longer=1.38),
    "depth 2": run.Arm({"num_nextn_predict_layers": 2}),
}


COLUMNS = {
    "test_bpb": "bits/byte", "given_greedy": "accepted on given text, greedy",
    "given_0.8": "at 0.8", "greedy_1": "on own text, greedy", "greedy_repeated": "6-grams repeated",
    "0.8_1": "own, at 0.8",
}  # fmt: skip
PROMPTS, NEW = 8, 96


def on_given_text(net, windows: torch.Tensor) -> dict:
    """How often the first draft of the MTP module is kept where the text is given (B, T)."""
    logits, mtp = net(windows, return_mtp=True)
    main, draft = logits[:, 1:], mtp[0]  # (B, T-1, V), both of the token two further
    p, q = ((x / 0.8).softmax(-1) for x in (main, draft))
    same = main.argmax(-1) == draft.argmax(-1)
    return {"given_greedy": same, "given_0.8": torch.minimum(p, q).sum(-1)}


def on_own_text(net, prompts: list[list[int]], temperature: float) -> dict:
    """By position, how often a draft is kept while the model writes, and how much it repeats."""
    stats, texts, name = sample.Stats(), [], f"{temperature:g}" if temperature else "greedy"
    device = net.embed_tokens.weight.device
    for i, prompt in enumerate(prompts):
        text = sample.generate(
            net, torch.tensor([prompt], device=device), NEW,
            temperature=temperature, speculative=4, stats=stats,
            generator=torch.Generator(device).manual_seed(i),
        )  # fmt: skip
        texts.append(text[0, len(prompt) :].tolist())
    shares = [a / max(1, d) for a, d in zip(stats.accepted, stats.drafted, strict=True)]
    values = {f"{name}_{j}": share for j, share in enumerate(shares, 1)}
    return values | {f"{name}_repeated": statistics.mean(map(repeats, texts))}


def acceptance(trained: run.Trained) -> dict:
    net, T = trained.net, trained.config.block_size
    if not len(net.mtp):
        return {}
    ids = np.asarray(trained.data.test.arrays[0][: 64 * T]).astype(np.int64)
    windows = torch.from_numpy(ids[: len(ids) // T * T]).view(-1, T).to(trained.machine.device)
    given = [on_given_text(net, x) for x in windows.split(4)]
    values = {k: torch.cat([x[k] for x in given]).float().mean().item() for k in given[0]}
    encode = stored_tokenizer(Path(trained.config.out)).encoding.encode_ordinary
    prompts = unseen_prompts(encode, PROMPTS, min(100, T))
    return values | on_own_text(net, prompts, 0.0) | on_own_text(net, prompts, 0.8)


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    report.dots(left, results, "against", "bits/byte against base")
    for name, xs in results.items():
        for key, style in ("greedy", "-"), ("0.8", ":"):
            if xs := [x for x in xs if f"{key}_1" in x]:
                label = key if key == "greedy" else f"temperature {key}"
                y = [statistics.mean(x[f"{key}_{j}"] for x in xs) for j in range(1, 5)]
                colour = report.colour_of(results, name)
                right.plot(range(1, 5), y, "o" + style, color=colour, label=f"{name}, {label}")
    right.set(xlabel="draft", ylabel="share accepted, own text", ylim=(0, 1), xticks=range(1, 5))
    right.legend(frameon=False, fontsize=8)


EXPERIMENT = run.Experiment("mtp", lambda base: ARMS, COLUMNS, draw, acceptance, base="one module")

if __name__ == "__main__":
    run.command(EXPERIMENT)
