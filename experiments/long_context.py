"""Do a few steps of long windows reach further? python experiments/long_context.py

The report trains with windows of 4K tokens, then turns on YaRN and trains 1000 steps each with
windows of 32K and 128K (section 4.3). Here every second step of the last tenth or fifth of the run
has windows four times as long, and as many tokens as other steps. The loss is measured by position,
in windows of that length side by side over the test text. The base has never seen such positions,
so it is also measured with YaRN turned on afterwards, without any training. Whether a network uses
the longer context is tested by its losses in short and in long windows.
"""

import statistics
from dataclasses import replace

import numpy as np
import report
import run
import torch
from torch.nn.functional import cross_entropy
from unseen import nats_by_document

import model

FACTOR, PARTS = 4, 16  # windows are so many times as long; positions are averaged in so many parts


def arms(base: dict) -> dict[str, run.Arm]:
    long = {"long_block_size": FACTOR * base["block_size"]}
    return {
        "last tenth long": run.Arm(long | {"long_start": 0.9}),
        "last fifth long": run.Arm(long | {"long_start": 0.8}),
    }


def yarn(block_size: int) -> dict:
    return {
        "type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": block_size,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip


def loss_by_position(net: model.DeepSeekV3, trained: run.Trained) -> list[float]:
    """Nats per token in each of PARTS equal parts of the long windows, side by side."""
    ids, T = trained.data.test.arrays[0], FACTOR * trained.config.block_size
    n = (len(ids) - 1) // T
    ids = torch.from_numpy(ids[: n * T + 1].astype(np.int64)).to(trained.machine.device)
    x, y = ids[:-1].view(n, T), ids[1:].view(n, T)
    losses = []
    for a, b in zip(x.split(4), y.split(4), strict=True):
        losses.append(cross_entropy(net(a).flatten(0, 1), b.flatten(), reduction="none"))
    return torch.cat(losses).view(n, PARTS, -1).mean((0, 2)).tolist()


def measure(trained: run.Trained) -> dict:
    net, found = trained.net, {"by_position": loss_by_position(trained.net, trained)}
    if net.config.rope_scaling is None:
        other = replace(net.config, rope_scaling=yarn(trained.config.block_size))
        other = model.DeepSeekV3(other).to(trained.machine.device).eval()
        other.load_state_dict(net.state_dict())
        found["by_position_yarn"] = loss_by_position(other, trained)
    quarter = PARTS // FACTOR
    for key, losses in list(found.items()):
        name = key.replace("by_position", "")
        found[f"within{name}"] = sum(losses[:quarter]) / quarter
        found[f"beyond{name}"] = sum(losses[-quarter:]) / quarter
    return found | gain_of_context(trained)


def gain_of_context(trained: run.Trained) -> dict:
    """Nats per token of the whole test text, of one network in short and in long windows (the last
    window of either may be shorter), and what the long ones gain."""
    given = trained.net, trained.data, trained.folder
    short, long = (
        nats_by_document(*given, T, trained.config, trained.machine)[0].sum()
        / (len(trained.data.test.arrays[0]) - 1)
        for T in (trained.config.block_size, FACTOR * trained.config.block_size)
    )
    return {"nats_short": short, "nats_long": long, "context_gain": short - long}


COLUMNS = {
    "test_bpb": "bits/byte, short windows",
    "within": "nats, first quarter of long windows",
    "beyond": "nats, last quarter",
    "beyond_yarn": "last quarter, YaRN without training",
    "context_gain": "all windows: nats gained over windows of a quarter",
}


def draw(figure, results):
    ax = figure.subplots()
    for name, xs in results.items():
        for key, style in ("by_position", "-"), ("by_position_yarn", ":"):
            if curves := [x[key] for x in xs if key in x]:
                y = [statistics.mean(list(values)) for values in zip(*curves, strict=True)]
                label = name + (", YaRN without training" if style == ":" else "")
                x = [FACTOR * (i + 0.5) / PARTS for i in range(PARTS)]
                ax.plot(x, y, style, color=report.colour_of(results, name), label=label)
    ax.set(xlabel="position, in lengths of the trained windows", ylabel="nats per token")
    ax.legend(frameon=False, fontsize=8)


EXPERIMENT = run.Experiment("long_context", arms, COLUMNS, draw, measure, against="beyond")

if __name__ == "__main__":
    run.command(EXPERIMENT)
