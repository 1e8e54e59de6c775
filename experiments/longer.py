"""Does one more phase reach four times as far again? python experiments/longer.py

config/small.py trains windows of 256 tokens and, in its last tenth, of 1,024 with YaRN. Here its
run out/small goes on for 100 steps, half of whose tokens lie in windows of 4,096 (the report's
second extension, section 4.3, goes from 32K to 128K). All arms read the same windows of the test
text, of 4,096 tokens each; their loss is measured by position. The last arm measures the run as it
was, with YaRN stretched to 4,096 and no training. Beside it stands what a token costs in decoding
after a short and after a long text. (This shows positions. Whether the network finds a fact 4,000
tokens back is another question, and one that a network this small answers with no.)
"""

import contextlib
import statistics
import sys
from pathlib import Path

import numpy as np
import report
import run
import torch
from long_context import PARTS, nats_by_position

import sample
import train
from huggingface import load_model
from model import DeepSeekV3
from support.checkpoints import load_checkpoint
from support.tokens import load_dataset

CONFIG, RUN = "config/small.py", "out/small"
LENGTH = 4096  # tokens of a window
PHASE = ["--steps=100", "--lr=6e-4", "--block_size=1024", f"--long_block_size={LENGTH}"]
PHASE += ["--long_start=0", f"--max_position_embeddings={LENGTH}", "--eval_every=100"]


def arms(base: dict) -> dict[str, run.Arm]:
    return {"further phase": run.Arm(), "YaRN without training": run.Arm()}


def network(name: str, seed: int) -> DeepSeekV3:
    """The network of an arm. The further phase is trained where its folder does not exist."""
    out = Path(f"{RUN}-longer-{seed}")
    if name != "further phase":
        model, _, _ = load_model(RUN, "cpu", torch.float32)
        model.config.max_position_embeddings = LENGTH
        if name == "YaRN without training":
            yarn = model.config.rope_scaling
            factor = LENGTH / yarn["original_max_position_embeddings"]
            model.config.rope_scaling = yarn | {"factor": factor}
        return model.eval()
    if not (out / "best.pt").exists():
        command = [f"--init_from={RUN}", f"--out={out}", f"--seed={seed}", "--overwrite"]
        with contextlib.redirect_stdout(sys.stderr):  # its sample; the table goes to stdout
            train.main([CONFIG, *command, *PHASE])
    model, _, _ = load_model(out, "cpu", torch.float32)
    return model.eval()


def loss_by_position(model: DeepSeekV3, ids: np.ndarray) -> list[float]:
    return nats_by_position(model, ids, LENGTH)


def decoding_time(model: DeepSeekV3, prompt: np.ndarray) -> float:
    """Milliseconds of a token that is decoded after the prompt, reading the prompt excluded: the
    median of three texts."""
    text, times = torch.from_numpy(prompt)[None], []
    for _ in range(4):
        stats = sample.Stats()
        sample.generate(
            model, text, max(1, LENGTH // 128), temperature=0.0, speculative=0, lookup=False,
            stats=stats,
        )  # fmt: skip
        times.append(1000 * stats.seconds / stats.tokens)
    return statistics.median(times[1:])


def measure(name: str, seed: int) -> dict:
    model = network(name, seed)
    folder = train.data_folder(load_checkpoint(Path(RUN))["train_config"]["data"])
    data = load_dataset(folder)
    ids = data.test.arrays[0].astype(np.int64)
    losses = loss_by_position(model, ids)
    part = PARTS // 4
    return {
        "by_position": losses,
        "first": statistics.mean(losses[:part]),
        "last": statistics.mean(losses[-part:]),
        "ms_short": decoding_time(model, ids[: LENGTH // 64]),
        "ms_long": decoding_time(model, ids[: LENGTH - LENGTH // 64]),
    }


def draw(figure, results):
    ax = figure.subplots()
    for name, xs in results.items():
        y = [statistics.mean(part) for part in zip(*(x["by_position"] for x in xs), strict=True)]
        x = [LENGTH * (i + 0.5) / PARTS for i in range(PARTS)]
        ax.plot(x, y, "o-", markersize=3, color=report.colour_of(results, name), label=name)
    ax.set(xlabel="position in the window, tokens", ylabel="nats per token")
    ax.legend(frameon=False, fontsize=8)


COLUMNS = {
    "first": "nats, first quarter of 4,096 tokens",
    "last": "nats, last quarter",
    "ms_short": "ms a token after 64 tokens",
    "ms_long": "ms a token after 4,032",
}
EXPERIMENT = run.Experiment(
    "longer", arms, COLUMNS, draw, base="as trained, to 1,024", against="last", compute=measure
)

if __name__ == "__main__":
    run.command(EXPERIMENT)
