"""Results in JSON files, and the tables and figures that are made from them alone.

`experiment` and `options` are run.py's. Tables have means with 95 % intervals over the seeds.
"against base" is the mean difference to the base runs of the same seeds, length, code and data; its
interval is that of intervals.py. verdicts.py asks more of differences that a claim is about.
"""

import hashlib
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intervals import Spread, own_interval, p_value, quantile, residual_deviation, standard_error

from support.settings import info

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


def origin(x: dict) -> tuple:
    """Length, code and data of a training: only results that have the same are compared."""
    return x.get("steps"), x.get("source"), x.get("corpus")


def usual_origin(lines: list[dict]) -> tuple | None:
    """That of most results; the newest of several."""
    origins = [origin(x) for x in lines]
    return max(reversed(origins), key=origins.count, default=None)


def collect(experiment, options, rates: bool = False) -> dict[str, list[dict]]:
    """By arm, the newest result of every seed; all of one length, code and corpus, those of which
    there are most (the newest of several). `against` is the difference to the base's same seed.
    Arms with other learning rates only if asked for: which are trained depends on the results."""
    own = read_results(options, experiment.results or experiment.name)
    bases = own if experiment.compute else read_results(options, "base")
    arms = experiment.arms(options.base())
    names = [name for name, arm in arms.items() if rates or not arm.rate]
    most = usual_origin(own if names else bases)
    # base.json has what every base run has; a line "base" of our own file, what we measure besides.
    bases = {x["seed"]: x for x in bases if x["arm"] == "base" and origin(x) == most}
    found = {("base", seed): x for seed, x in bases.items()}  # later lines replace earlier ones
    for x in own:
        if origin(x) == most:
            usual = bases.get(x["seed"], {}) if x["arm"] == "base" else {}
            found[x["arm"], x["seed"]] = usual | x
    # "base" gets the name that it has in this experiment.
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


@dataclass
class Difference:
    """Of an arm to the base, or to another arm, over the seeds that both have."""

    mean: float
    half: float | None  # half of the 95 % interval, from the pooled deviations
    alone: float | None = None  # the same, from the deviation of these pairs alone
    p: float | None = None  # that there is none; not corrected
    pairs: int = 0
    error: Spread = (0.0, 0)  # standard error of the mean, degrees of freedom


@dataclass
class Spreads:
    """How much a figure varies: the deviation of the residuals, by two classes of networks."""

    base: tuple  # what marks the class of the base
    like_base: Spread
    others: Spread

    def of(self, x: dict) -> Spread:
        return self.like_base if shape(x) == self.base else self.others


def shape(x: dict) -> tuple:
    """Two networks are of one class if a token passes as many parameters of attention and FFN in
    both, and they have as many MTP modules."""
    return x.get("active"), len(x.get("val_mtp_losses", []))


def spreads(key: str, options, results: dict[str, list[dict]]) -> Spreads:
    """Of bits/byte by class, of other figures without classes. The first arm is the base."""
    base = next((shape(xs[0]) for xs in results.values() if xs), ())
    runs = pooled(key, options, results)
    like = {k: x[key] for k, x in runs.items() if shape(x) == base or key not in TEXTS}
    others = {k: x[key] for k, x in runs.items() if k not in like}
    found = Spreads(base, residual_deviation(like), residual_deviation(others))
    return found if key in TEXTS else Spreads(base, found.like_base, found.like_base)


def compare(one: list[dict], other: list[dict], key: str, varies: Spreads) -> Difference | None:
    """How much larger the figure is in the first, in runs of the same seed."""
    if not (pairs := paired(one, other, key)):
        return None
    mean, alone = own_interval(changes(pairs, key))
    error, freedom = standard_error(*map(varies.of, pairs[0]), len(pairs))
    if not error:
        return Difference(mean, None, alone, pairs=len(pairs))
    half, p = quantile(0.05, freedom) * error, p_value(mean / error, freedom)
    return Difference(mean, half, alone, p, len(pairs), (error, freedom))


def differences(experiment, options, results: dict[str, list[dict]]) -> dict[str, Difference]:
    """Of every arm to the base, and of every pair of the experiment."""
    key, (base, *others) = experiment.against, results
    asked = {name: (name, base) for name in others}
    asked |= {f"{one} against {other}": (one, other) for one, other in experiment.pairs}
    varies = spreads(key, options, results)
    found = {}
    for name, arms in asked.items():
        one, other = (results.get(arm, []) for arm in arms)
        if not experiment.compute:
            found[name] = compare(one, other, key, varies)
        elif pairs := paired(one, other, key):  # no trainings: each arm varies in its own way
            found[name] = Difference(*own_interval(changes(pairs, key)), pairs=len(pairs))
    return {name: x for name, x in found.items() if x}


def paired(runs: list[dict], others: list[dict], key: str) -> list[tuple[dict, dict]]:
    """The results of the same seed, where both have this figure."""
    of_seed = {x["seed"]: x for x in others if key in x}
    return [(x, of_seed[x["seed"]]) for x in runs if key in x and x["seed"] in of_seed]


def changes(pairs: list[tuple[dict, dict]], key: str) -> list[float]:
    return [x[key] - y[key] for x, y in pairs]


TEXTS = "test_bpb", "val_bpb"  # bits per byte of the test text, and of the validation text


def pooled(key: str, options, results: dict[str, list[dict]]) -> dict[tuple[str, int], dict]:
    """{(arm, seed): result} of the trainings that tell how much a figure varies: for bits/byte,
    which all have, those of all experiments of one length, code and corpus; else those of this
    table."""
    if key not in TEXTS:
        return {(name, x["seed"]): x for name, xs in results.items() for x in xs if key in x}
    origins = {origin(x) for xs in results.values() for x in xs}  # one, or none
    found = {}
    for path in sorted(Path(options.results).glob("*.json")):
        for x in read_results(options, path.stem):
            if isinstance(x, dict) and key in x and origin(x) in origins:
                found[f"{path.stem} {x['arm']}", x["seed"]] = x
    return found


def number(x: float) -> str:
    if abs(x) >= 10:
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def signed(x: float) -> str:
    return ("+" if x > 0 else "") + number(x)


def cell(values: list[float]) -> str:
    if not values:
        return ""
    mean, half = own_interval(values)
    return number(mean) + (f" ± {number(half)}" if half else "")


def in_words(x: Difference) -> str:
    return signed(x.mean) + (f" ± {number(x.half)}" if x.half else "")


def table(experiment, options) -> str:
    """Markdown: a row for each arm; below it further comparisons, where the numbers come from and
    what is missing."""
    results, columns, key = collect(experiment, options), experiment.columns, experiment.against
    found = differences(experiment, options, results)
    base, runs = next(iter(results.values())), [x for xs in results.values() for x in xs]
    rows = [["arm", "seeds", *columns.values(), f"{columns[key]} against base"]]
    base = [x for x in base if key in x]
    for name, xs in results.items():
        if xs := [x for x in xs if key in x]:
            cells = {k: cell([x[k] for x in xs if k in x]) for k in columns}
            if name in found and not experiment.compute:
                # The arms may have other seeds than the base: so that rows can be compared.
                for k in {key, "test_bpb"} & {*columns}:
                    mean = statistics.mean(changes(paired(xs, base, k), k))
                    cells[k] = number(mean_of(base, k) + mean)
            against = in_words(found[name]) if name in found else ""
            rows.append([name, str(len(xs)), *cells.values(), against])
    lines = [f"| {' | '.join(row)} |" for row in rows] if runs else []
    lines[1:1] = ["|" + "---|" * len(rows[0])] if runs else []
    if runs:
        lines += [""]
        if pairs := [name for name in found if name not in results]:
            lines += [*(f"* {name}: {in_words(found[name])}." for name in pairs), ""]
        known = {k: sorted({str(x[k]) for x in runs if x.get(k)}) for k in FACTS}
        known = [f"{k} {' and '.join(v)}" for k, v in known.items() if v]
        length = [f"{runs[0]['steps']} steps a run"] if runs[0]["steps"] else []
        lines += [f"{', '.join(length + known)}."]
        own = [f"{k} ± {number(x.alone)}" for k, x in found.items() if x.alone and x.p is not None]
        lines += [f"Intervals from the pairs of one arm alone: {', '.join(own)}."] if own else []
    if missing := [name for name, xs in results.items() if not xs]:
        lines += ["", f"Not yet run: {', '.join(missing)}."]
    return "\n".join(lines).strip()


def mean_of(runs: list[dict], key: str) -> float:
    return statistics.mean(x[key] for x in runs if key in x)


FACTS = ("dtype", "threads", "machine", "torch", "python")
INK = "#7d8590"  # grey that can be read on white and on black
COLOURS = ["#7d8590", "#2f81f7", "#db6d28", "#2da44e", "#bf4b8a", "#a475f9", "#b08800", "#1b9e9e"]
COLOURS += ["#e5534b", "#57606a"]


def dots(ax, results: dict[str, list[dict]], key: str, label: str):
    """A line for each arm: its seeds as dots, its mean with the 95 % interval as a bar."""
    names = [name for name, xs in results.items() if any(key in x for x in xs)]
    for y, name in enumerate(reversed(names)):
        values, colour = [x[key] for x in results[name] if key in x], colour_of(results, name)
        mean, half = own_interval(values)
        if key == "against":
            half = results[name][0].get("half")
        ax.plot(values, [y + 0.2] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        ax.errorbar(mean, y - 0.1, xerr=half, fmt="|", color=colour, markersize=12, capsize=3)
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
        found = differences(experiment, options, results)
        experiment.draw(figure, {
            name: [x | {"half": found[name].half if name in found else None} for x in xs]
            for name, xs in results.items() if xs
        })  # fmt: skip
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
    write_part(Path(options.docs, "RESULTS.md"), experiment.name, section(experiment, options))


def write_part(page: Path, name: str, part: str):
    """Between the two marks of this name, where the page has them."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    if begin in text:
        before, after = text[: text.index(begin)], text[text.index(end) :]
        page.write_text(before + begin + part + after, encoding="utf-8")
