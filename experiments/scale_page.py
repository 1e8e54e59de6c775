"""The tables and figures of docs/SCALE.md, from the numbers that experiments/scale.py computes."""

import io
import json
import re
from pathlib import Path
from typing import Any

import schedules
import tables

from config import info

# The numbers of a part by their names: what they are, and the report's figure.
COST = {
    "gflop": ("GFLOP per token in training, without MTP", "250 (arXiv 2505.09343)"),
    "gflop_mtp": ("the same with MTP", ""),
    "tokens": ("tokens", "14.8T (section 1)"),
    "flops": ("FLOPs of the run, with MTP", ""),
    "tflops": ("TFLOP/s of a card in V3's run, from 180K hours per 1T tokens", ""),
    "bf16": ("share of its peak in bf16, 989 TFLOP/s", ""),
    "fp8": ("share of its peak in FP8, 1,979 TFLOP/s", ""),
    "hours": ("hours of one H800 at that speed", "2,664K (Table 1)"),
    "days": ("days on 2,048 cards", "less than two months (section 1)"),
    "dollars": ("dollars, at 2 an hour", "5.328M (Table 1)"),
    "active": ("dollars for a dense network with as many parameters as here are active", ""),
    "total": ("dollars for a dense network with as many parameters as here in all", ""),
    "small": ("FLOPs of config/small.py's run", ""),
    "small_seconds": ("seconds of one H800 at that speed", ""),
    "small_dollars": ("dollars, at 2 an hour", ""),
    "runs": ("such runs in the one above", ""),
}

LINKS = {
    "infiniband": ("µs of InfiniBand per trained token, all layers, forward and backward", ""),
    "peak": (
        "µs of its arithmetic at the peak of bf16 (of FP8: half)",
        "about as long as communication (section 3.2.1)",
    ),
    "card": ("µs of a card per trained token, in V3's run", ""),
    "free": ("experts reached by NVLink while InfiniBand reaches a node", "3.2 (section 3.2.2)"),
    "experts": ("so experts per token at no more cost", "13 (section 3.2.2)"),
}

MEMORY = {
    "held": ("parameters of two stages on a card, 1e9", "2x (Table 2)"),
    "weights": ("GB of weights, bf16", ""),
    "gradients": ("GB of gradients, fp32", "fp32 (section 3.3.3)"),
    "optimiser": ("GB of optimiser, ZeRO-1", "fp32 masters, bf16 moments (section 3.3.3)"),
    "activations": ("GB of activations, 17 micro-batches of 4,096 tokens", "PP + 1 (Table 2)"),
    "all": ("GB in all", ""),
    "ends": ("GB more on the ranks with embedding and head", ""),
    "whole_optimiser": ("GB of optimiser without ZeRO-1", ""),
    "whole_activations": ("GB of activations if all are kept in bf16", ""),
    "token": ("KB of cache per token", "70.272 (arXiv 2505.09343)"),
    "mla": ("GB of cache for 128K tokens", ""),
    "mha": ("the same in multi-head attention", ""),
    "served": ("GB of weights on a card that serves", ""),
    "mla_users": ("users with 128K tokens in the rest of its 80 GB", ""),
    "mha_users": ("the same in multi-head attention", ""),
}

PARTS = ("cost", "traffic", "links", "pipeline", "memory")
LABELS = {"cost": COST, "links": LINKS, "memory": MEMORY}
Part = dict[str, float] | list[dict[str, Any]]  # numbers by name, or a table's rows


def table(name: str, part: Part) -> str:
    """A part as Markdown; lists are for the figures alone."""
    if name in LABELS:
        part = [
            {"": text, "computed": part[key], "V3's report": report}
            for key, (text, report) in LABELS[name].items()
        ]
    rows = [{k: show(x) for k, x in row.items() if not isinstance(x, list)} for row in part]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(x: float | str) -> str:
    """Four digits of large numbers, three of others."""
    if isinstance(x, str):
        return x
    return f"{float(f'{x:.4g}'):,.0f}" if 1000 <= x < 1e13 else f"{x:.3g}"


def write(results: dict[str, Any], docs: Path):
    """The tables of SCALE.md, each between its two marks, and the figures."""
    page = docs / "SCALE.md"
    text = page.read_text(encoding="utf-8")
    for name in PARTS:
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = before + begin + table(name, results[name]) + after
    page.write_text(text, encoding="utf-8")
    save_figures(results, docs / "figures")


# ---- Figures -------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, PURPLE = "#2f81f7", "#db6d28", "#2da44e", "#a475f9"


def draw_cost(figure, results: dict):
    ax, found = figure.subplots(), results["cost"]
    bars = {
        "dense, as large in all": (found["total"], tables.INK),
        "dense, as large as is active": (found["active"], tables.INK),
        Path(results["config"]).stem: (found["dollars"], BLUE),
        "small": (found["small_dollars"], GREEN),
    }
    for y, (dollars, colour) in enumerate(bars.values()):
        ax.barh(y, dollars, 0.6, color=colour)
        ax.text(dollars * 1.5, y, f"${show(dollars)}", va="center")
    ax.set(xscale="log", xlim=(1e-5, 1e11), yticks=range(len(bars)), yticklabels=bars)
    ax.set(xlabel="dollars, at the speed and price of an H800 in V3's run")


def draw_traffic(figure, results: dict):
    """How many nodes tokens visit; what a visit costs, by the experts that it reaches."""
    left, right = figure.subplots(1, 2)
    for i, x in enumerate(results["traffic"]):
        colour, label = (BLUE, ORANGE, GREEN, PURPLE)[i], f"{x['scores']}, M = {x['nodes at most']}"
        places = [n + 0.2 * (i - 1.5) for n in range(1, len(x["share"]) + 1)]
        left.bar(places, x["share"], 0.2, color=colour, label=label)
        visit = x["µs NVLink"] / x["nodes"]
        right.plot(x["experts per visited node"], visit, "o", color=colour)
    left.set(xlabel="nodes that a token visits", ylabel="share of the tokens")
    left.legend(frameon=False, fontsize=8)
    one = results["traffic"][0]
    visit, reached = one["µs InfiniBand"] / one["nodes"], [0, results["links"]["free"], 5]
    each = visit / reached[1]
    right.plot(reached, [visit] * 3, color=tables.INK, label="InfiniBand")
    right.plot(reached, [each * x for x in reached], "--", color=tables.INK, label="NVLink")
    right.axvline(reached[1], ymax=0.64, color=tables.INK, linewidth=0.8, linestyle=":")
    right.set(xlabel="experts per visited node", ylabel="µs per visit", xlim=(0, 5), ylim=(0, None))
    right.legend(frameon=False, fontsize=8)


def draw_memory(figure, results: dict):
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    found, colours = results["memory"], (BLUE, GREEN, ORANGE, PURPLE)
    bars = {
        "all kept in bf16": ("optimiser", "whole_activations"),
        "without ZeRO-1": ("whole_optimiser", "activations"),
        "the report's": ("optimiser", "activations"),
    }
    for y, (optimiser, activations) in enumerate(bars.values()):
        begin = 0.0
        for key, colour in zip(
            ("weights", "gradients", optimiser, activations), colours, strict=True
        ):
            label = key if y == 2 else None
            left.barh(y, found[key], 0.6, left=begin, color=colour, label=label)
            begin += found[key]
    left.set(yticks=range(3), yticklabels=bars, xlabel="GB on a card in training (dotted: 80)")
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper left")
    names = {"mha": "multi-head", "mla": "MLA"}
    right.barh(list(names.values()), [found[x] for x in names], 0.6, color=[tables.INK, BLUE])
    for y, x in enumerate(names):
        right.text(max(found[x], 80) + 10, y, f"{found[x]:.3g}", va="center")
    right.set(xlabel="GB of cache for 128K tokens", xlim=(0, 640))
    for ax in (left, right):
        ax.axvline(80, color=tables.INK, linewidth=0.8, linestyle=":")


def draw_pipeline(figure, results: dict):
    schedules.draw(figure)


DRAWINGS = {
    "cost": (draw_cost, (8, 2.2)),
    "traffic": (draw_traffic, (8, 3)),
    "pipeline": (draw_pipeline, (8, 6)),
    "memory": (draw_memory, (8, 2.6)),
}


def save_figures(results: dict, folder: Path):
    """scale_NAME.svg, in the style of tables.save_figure and with the hash of what they show."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        info("no figures: they need matplotlib (pip install matplotlib)")
        return
    grey = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style = dict.fromkeys(grey, tables.INK) | {"axes.facecolor": "none", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"svg.fonttype": "none", "svg.hashsalt": "nanoV3"}
    with matplotlib.rc_context(style):
        for name, (draw, size) in DRAWINGS.items():
            figure = Figure(size, layout="constrained")
            draw(figure, results)
            shown = {"Date": None, "Description": f"results {tables.digest(json.dumps(results))}"}
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata=shown)
            text = re.sub(r"(\.\d\d)\d+", r"\1", file.getvalue())  # digits too fine to see
            (folder / f"scale_{name}.svg").write_text(text, encoding="utf-8")
