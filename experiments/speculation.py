"""Does speculation pay? python experiments/speculation.py [CKPT] [--key=value]

Decodes the same prompts, pieces of code the model has not seen, with every number of drafts, and
measures the tokens per round and the speed relative to plain decoding. Greedy text of a small model
repeats itself, which makes drafting easy. So the share of repeated 6-grams is listed, and sampled
text is measured, too.
"""

import random
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample
from bench import Options, Table, Timed, interleaved, print_tables, ratio
from load import load_model
from model import DeepSeekV3
from support.processes import usable_device
from support.settings import Refusal, parse_args, run_command


@dataclass
class SpeculationOptions(Timed):
    prompts: int = 8  # pieces of unseen code
    new_tokens: int = 128  # decoded after each
    compile: bool = True  # compiled decoding, too, which first compiles for minutes


def unseen_prompts(encode: Callable[[str], list[int]], count: int, length: int) -> list[list[int]]:
    """Pieces of the standard library's tests, which prepare_data.py leaves out of the corpus."""
    files = sorted(Path(sysconfig.get_path("stdlib"), "test").glob("test_*.py"))
    rng, prompts = random.Random(0), []
    for file in rng.sample(files, len(files)):
        if len(prompts) == count:
            break
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        ids = encode("".join(lines[rng.randrange(len(lines)) :][:100])) if lines else []
        if len(ids) >= length:
            prompts.append(ids[:length])
    return prompts or [encode("class Parser:\n    def __init__(self, text):\n")]


def repeats(ids: list[int], n: int = 6) -> float:
    """The share of n-grams that stand in the text before: much of it makes drafting easy."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / max(1, len(grams))


def speculation(
    model: DeepSeekV3, prompts: list[list[int]], options, compile: bool, temperature: float
) -> Table:
    """Every number of drafts."""
    device, new, stats, texts = model.embed_tokens.weight.device, options.new_tokens, {}, {}
    kinds = [str(G) for G in range(5)]
    seconds = {kind: [] for kind in kinds}

    def run(kind: str):
        stats[kind], texts[kind] = sample.Stats(), []
        for i, prompt in enumerate(prompts):
            text = sample.generate(
                model, torch.tensor([prompt], device=device), new, temperature=temperature,
                speculative=int(kind), compile=compile,
                generator=torch.Generator(device).manual_seed(i), stats=stats[kind],
            )  # fmt: skip
            texts[kind].append(text[0, len(prompt) :].tolist())
        seconds[kind].append(stats[kind].seconds)

    interleaved({kind: partial(run, kind) for kind in kinds}, options.rounds)
    rows = []
    for kind, s in stats.items():
        times = seconds[kind][1:]
        shares = [a / d for a, d in zip(s.accepted, s.drafted, strict=True) if d]
        row = {
            "drafts": kind, "tokens/s": (s.tokens - len(prompts)) / statistics.median(times),
            "speed-up": ratio(seconds["0"][1:], times), "tokens/forward": s.tokens / s.rounds,
            "accepted by position": " ".join(f"{x:.2f}" for x in shares),
            "6-grams repeated": statistics.mean(map(repeats, texts[kind])),
        }  # fmt: skip
        if temperature == 0:
            same = [a == b for a, b in zip(texts[kind], texts["0"], strict=True)]
            row["same texts"] = f"{sum(same)}/{len(same)}"
        rows.append(row)
    title = (
        f"{'compiled' if compile else 'eager'}, temperature {temperature:g}, {len(prompts)} "
        f"prompts one after another, {new} new tokens each"
    )
    return Table(title, rows)


def tables(ckpt: str, options: SpeculationOptions) -> Iterator[Table]:
    device = usable_device(options.device)
    model, tokenizer = load_model(ckpt, device, torch.float32)
    if not len(model.mtp) or tokenizer is None:
        raise Refusal(f"{ckpt} has no MTP module or no tokenizer: name another checkpoint.")
    prompts = unseen_prompts(tokenizer.encode, options.prompts, 100)
    with torch.inference_mode():
        for compile in (False, True)[: 1 + options.compile]:
            for temperature in (0.0, 0.8):
                yield speculation(model, prompts, options, compile, temperature)


def main(argv: list[str]):
    ckpt, values = parse_args(__doc__, argv, Options, Timed, SpeculationOptions, positional="ckpt")
    options = SpeculationOptions(**values)
    ckpt = ckpt or "out/small"
    print_tables(tables(ckpt, options))


if __name__ == "__main__":
    run_command(main)
