"""Results in JSON files, and the tables and figures that are made from them alone.

`experiment` and `options` are run.py's. Tables have means with 95 % intervals over the seeds;
"against base" is the difference to the base run of the same seed, length, code and data.
"""

import hashlib
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from config import info

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


# ---- JSON files ----------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def read_results(options, name: str) -> list[dict]:
    path = Path(options.results, f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add_result(options, name: str, result: dict):
    """One more line, of six significant digits: more are noise. The file is read again first, since
    another experiment may be running beside this one."""
    path = Path(options.results, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.6g}"))
    lines = [json.dumps(x) for x in [*read_results(options, name), result]]
    part = path.with_suffix(f".{os.getpid()}.tmp")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    os.replace(part, path)


# ---- Tables and figures --------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, None
    t = STUDENT_T[n - 2] if n - 2 < len(STUDENT_T) else 2.2
    return mean, t * statistics.stdev(values) / math.sqrt(n)


def collect(experiment, options) -> dict[str, list[dict]]:
    """By arm, the newest result of every seed; all of one length, code and corpus, those of which
    there are most (the newest of several). `against` is the difference to the base's same seed."""

    def origin(x: dict) -> tuple:
        return x["steps"], x["source"], x["corpus"]

    own = read_results(options, experiment.results or experiment.name)
    bases = own if experiment.compute else read_results(options, "base")
    names = experiment.arms(options.base())
    origins = [origin(x) for x in (own if names else bases)]
    most = max(reversed(origins), key=origins.count, default=None)
    bases = {x["seed"]: x for x in bases if x["arm"] == "base" and origin(x) == most}
    found = {("base", seed): x for seed, x in bases.items()}
    for x in own:
        if origin(x) == most:
            measured = bases.get(x["seed"], {}) if x["arm"] == "base" else {}
            found[x["arm"], x["seed"]] = measured | x
    label = {"base": f"{experiment.base} (base)" if experiment.base else "base"}
    label |= {name: name for name in names}
    results = {name: [] for name in label.values()}
    for (name, _), x in sorted(found.items(), key=lambda item: item[0][1]):
        base = found.get(("base", x["seed"]), {})
        if name != "base" and experiment.against in base:
            x = x | {"against": x[experiment.against] - base[experiment.against]}
        if name in label:
            results[label[name]].append(x)
    return results


def number(x: float) -> str:
    if abs(x) >= 10:
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def cell(values: list[float], sign: bool = False) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    text = ("+" if sign and mean > 0 else "") + number(mean)
    return text if not half else f"{text} ± {number(half)}"


def table(experiment, options) -> str:
    """Markdown: a row for each arm; below it, where the numbers come from and what is missing."""
    results, columns = collect(experiment, options), experiment.columns
    columns = columns | {"against": f"{columns[experiment.against]} against base"}
    rows, runs = [["arm", "seeds", *columns.values()]], [x for xs in results.values() for x in xs]
    for name, xs in results.items():
        cells = [cell([x[k] for x in xs if k in x], k == "against") for k in columns]
        rows += [[name, str(len(xs)), *cells]] if xs else []
    lines = [f"| {' | '.join(row)} |" for row in rows] if runs else []
    lines[1:1] = ["|" + "---|" * len(rows[0])] if runs else []
    if runs:
        known = {k: sorted({str(x[k]) for x in runs if x.get(k)}) for k in FACTS}
        known = [f"{k} {' and '.join(v)}" for k, v in known.items() if v]
        length = [f"{runs[0]['steps']} steps a run"] if runs[0]["steps"] else []
        lines += ["", f"{', '.join(length + known)}."]
    if missing := [name for name, xs in results.items() if not xs]:
        lines += ["", f"Not yet run: {', '.join(missing)}."]
    return "\n".join(lines).strip()


FACTS = ("dtype", "threads", "torch", "python", "commit")
INK = "#7d8590"  # grey that can be read on white and on black
COLOURS = ["#7d8590", "#2f81f7", "#db6d28", "#2da44e", "#bf4b8a", "#a475f9", "#b08800", "#1b9e9e"]


def dots(ax, results: dict[str, list[dict]], key: str, label: str):
    """A line for each arm: its seeds as dots, its mean with the 95 % interval as a bar."""
    names = [name for name, xs in results.items() if any(key in x for x in xs)]
    for y, name in enumerate(reversed(names)):
        values, colour = [x[key] for x in results[name] if key in x], colour_of(results, name)
        mean, half = interval(values)
        ax.plot(values, [y] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        ax.errorbar(mean, y, xerr=half, fmt="|", color=colour, markersize=12, capsize=3)
    ax.set(xlabel=label, yticks=range(len(names)), ylim=(-0.6, len(names) - 0.4))
    ax.set_yticklabels(reversed(names))
    ax.locator_params(axis="x", nbins=5)
    if key == "against":
        ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")


def curves(ax, results: dict[str, list[dict]], key: str, label: str):
    """The mean over the seeds of a figure in the log, against the step."""
    for name, xs in results.items():
        if xs := [x["curve"] for x in xs if "curve" in x]:
            mean = [statistics.mean(values) for values in zip(*(x[key] for x in xs), strict=False)]
            ax.plot(xs[0]["step"][: len(mean)], mean, color=colour_of(results, name), label=name)
    ax.set(xlabel="step", ylabel=label)
    ax.legend(frameon=False, fontsize=8)


def colour_of(results: dict, name: str) -> str:
    return COLOURS[list(results).index(name) % len(COLOURS)]


def save_figure(experiment, options) -> Path | None:
    """docs/figures/NAME.svg, with the hash of what it shows; the same bytes for the same data."""
    results = collect(experiment, options)
    if not (experiment.draw and any(results.values())):
        return None
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        info("no figure: it needs matplotlib (pip install matplotlib); --plot draws it afterwards")
        return None
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    grey |= {"axes.edgecolor": INK, "axes.facecolor": "none", "font.size": 9}
    grey |= {"axes.spines.top": False, "axes.spines.right": False}
    grey |= {"svg.fonttype": "none", "svg.hashsalt": "nanoV3"}
    with matplotlib.rc_context(grey):
        figure = Figure((8, 3), layout="constrained")
        experiment.draw(figure, {name: xs for name, xs in results.items() if xs})
        path = Path(options.docs, "figures", f"{experiment.name}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = {"Date": None, "Description": f"results {digest(json.dumps(results))}"}
        figure.savefig(path, transparent=True, metadata=shown)
    return path


def section(experiment, options) -> str:
    """What docs/RESULTS.md shows between the two marks of this experiment."""
    text = table(experiment, options)
    if experiment.draw and any(collect(experiment, options).values()):
        text += f"\n\n![{experiment.name}](figures/{experiment.name}.svg)"
    return text


def write_section(experiment, options):
    page = Path(options.docs, "RESULTS.md")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = f"<!-- {experiment.name} -->\n", f"\n<!-- end of {experiment.name} -->"
    if begin in text:
        before, after = text[: text.index(begin)], text[text.index(end) :]
        page.write_text(before + begin + section(experiment, options) + after, encoding="utf-8")
