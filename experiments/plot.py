"""A picture of runs, from their logs: python experiments/plot.py RUN [RUN ...] [--key=value]

Plots losses by step, any other key of the log, and the load of every expert. Needs matplotlib.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import COLOURS, STYLE

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.settings import Refusal, parse_args, run_command

Log = list[dict[str, Any]]  # the lines of log.jsonl


@dataclass
class PlotOptions:
    out: str = ""  # file, .svg or .png; empty: plot.png in the first RUN
    keys: str = ""  # more keys of the log, comma-separated, plotted below the losses


def read_log(run: str) -> Log:
    """The lines of a run's log, without a half-written last line."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise Refusal(
            f"{run} has no log.jsonl: name folders of runs, such as out/small, "
            "and the picture with --out=FILE."
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def column(log: Log, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines in which this key is present and not null."""
    points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def smooth(y: np.ndarray) -> np.ndarray:
    """The mean of each point and its neighbours, a twentieth of all points, half of them on either
    side. The first points, where the curve is steep, have fewer neighbours; the last have none on
    the right."""
    sides = (min(len(y) // 40, i // 4) for i in range(len(y)))
    return np.array([y[i - side : i + side + 1].mean() for i, side in enumerate(sides)])


def plot_validation(ax: Any, run: str, log: Log, colour: str) -> None:
    """A curve with markers, whose legend entry has the last loss."""
    evaluations = [line for line in log if line.get("val_loss") is not None]
    label = run
    if evaluations:
        step, nats, bits = (evaluations[-1][key] for key in ("step", "val_loss", "val_bpb"))
        label += f": val_loss at step {step} is {nats:.3f} nats per token, {bits:.3f} bits per byte"
    ax.plot(*column(evaluations, "val_loss"), "o-", color=colour, markersize=5, label=label)


def plot_losses(ax: Any, logs: dict[str, Log]) -> None:
    """One colour per run; pale curves are the log, strong ones are smoothed."""
    for i, (run, log) in enumerate(logs.items()):
        for key, style in ("loss", "-"), ("mtp_loss", "--"):
            x, y = column(log, key)
            if not y.any():  # a network without MTP modules logs 0
                continue
            ax.plot(x, y, style, color=f"C{i}", alpha=0.25)
            ax.plot(x, smooth(y), style, color=f"C{i}")
        plot_validation(ax, run, log, f"C{i}")
    title = "solid: loss; dashed: mtp_loss; points: val_loss"
    ax.set_title(title, fontsize=8)
    ax.set(xlabel="step", ylabel="nats per token")
    ax.grid(alpha=0.3)


def plot_key(ax: Any, key: str, logs: dict[str, Log]) -> None:
    """Any key of the log, a curve for each run. Raises Refusal if no log has the key."""
    curves = [column(log, key) for log in logs.values()]
    if not any(len(x) for x, _ in curves):
        raise Refusal(f"no log of {', '.join(logs)} has the key {key!r}: see a line of log.jsonl.")
    for i, curve in enumerate(curves):
        ax.plot(*curve, color=f"C{i}")
    ax.set(xlabel="step", ylabel=key)
    ax.grid(alpha=0.3)


def plot_load(ax: Any, run: str, evaluation: dict[str, Any]) -> None:
    """The load of every expert in an evaluation: one layer per line, MTP modules last."""
    share = np.array(evaluation["expert_load"])
    layers, experts = share.shape
    image = ax.imshow(
        share * experts, "RdBu_r", aspect="auto", vmin=0.6, vmax=1.4, interpolation="nearest",
        extent=(-0.5, experts - 0.5, layers + 0.5, 0.5),  # experts count from 0, layers from 1
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label="1 = even load", extend="both")
    with_mtp = bool(evaluation["val_mtp_losses"])
    ax.set(xlabel="expert", ylabel="MoE layers,\nthen MTP" if with_mtp else "MoE layers")
    title = f"{run}: load of the experts on the validation text at step {evaluation['step']}"
    ax.set_title(title, fontsize=8)


def plot(options: PlotOptions, runs: list[str]) -> Path:
    """Plots the losses of runs, and the load of their experts at the last evaluation. A run is a
    folder with a log.jsonl, which may still grow. The curves of several runs share their axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not runs:
        raise Refusal("name a run, as in: python experiments/plot.py out/small")
    logs, loads = {run: read_log(run) for run in runs}, {}
    for run, log in logs.items():
        for line in log:
            if line.get("expert_load"):  # empty for a network without experts
                loads[run] = line  # the last one stays
    path = Path(options.out or Path(runs[0]) / "plot.png")
    with rc_context(STYLE | {"axes.prop_cycle": f"cycler(color={COLOURS[1:]})"}):
        keys = [key for key in options.keys.split(",") if key]
        heights = [4, *([1.8] * (len(keys) + len(loads)))]  # inches
        figure = Figure((8, sum(heights)), layout="constrained")
        losses, *below = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        plot_losses(losses, logs)
        figure.legend(loc="outside upper center", fontsize=8, frameon=False)
        for ax, key in zip(below, keys, strict=False):
            plot_key(ax, key, logs)
        for ax, (run, evaluation) in zip(below[len(keys) :], loads.items(), strict=True):
            plot_load(ax, run, evaluation)
        svg = path.suffix == ".svg"  # a page's colour is behind it
        figure.savefig(path, dpi=120, transparent=svg, metadata={"Date": None} if svg else None)
    return path


def main(argv: list[str]):
    runs = [word for word in argv if not word.startswith("-")]
    keys = [word for word in argv if word.startswith("-")]
    usage = "%(prog)s RUN [RUN ...] [--key=value ...]"
    print(plot(PlotOptions(**parse_args(__doc__, keys, PlotOptions, usage=usage)[1]), runs))


if __name__ == "__main__":
    run_command(main)
