"""What the results say, from their JSON files alone: python experiments/report.py

It writes the table of the eight claims of experiments/PLAN.md into docs/RESULTS.md, and their
figure. run.py takes an experiment's table and figure from here.

A difference is the mean over pairs of runs with the same seed, which begin with the same weights
and see the same data. Its 95 % interval is Student's. The model of a result is arm + seed +
residual. The deviation of the residuals is pooled over all arms that were trained alike, in two
classes: networks of the base's shapes, and the others, which vary more. Because many claims were
tested, Holm's method (1979) raises the p-values of the planned ones: if nothing differs, one of
them is below 0.05 in at most 5 % of all cases.
"""

import functools
import hashlib
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.files import write_whole
from support.settings import info

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results"
TEXTS = "test_bpb", "val_bpb"  # bits per byte of the test text, and of the validation text
Spread = tuple[float, int]  # a standard deviation or error, and its degrees of freedom

# ---- Statistics ----------------------------------------------------------------------------------


@functools.cache
def student(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's t distribution: values t >= 0, and how probable a larger |t| is at each.

    With t = sqrt(freedom) tan(angle) its density is proportional to cos(angle)^(freedom - 1).
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    with np.errstate(over="ignore"):
        return math.sqrt(freedom) * np.tan(angle), 1 - below / below[-1]


def p_value(t: float, freedom: int) -> float:
    """The probability of a difference of at least |t| standard errors by chance."""
    return float(np.interp(abs(t), *student(freedom)))


def quantile(freedom: int) -> float:
    """The t beyond which |t| lies with probability 0.05."""
    values, larger = student(freedom)
    return float(np.interp(-0.05, -larger, values))


def own_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval, from the deviation of these values alone."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, None
    return mean, quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def residual_deviation(values: dict[tuple[str, int], float]) -> Spread:
    """Standard deviation and degrees of freedom of the residuals of {(arm, seed): value} after a
    least-squares fit of one number for every arm and one for every seed; (0, 0) if no freedom
    remains."""
    if not values:
        return 0.0, 0
    arms, seeds = (sorted(set(x)) for x in zip(*values, strict=True))
    design = np.array([[*(arm == a for a in arms), *(seed == s for s in seeds)]
                       for arm, seed in values], float)  # fmt: skip
    y = np.array(list(values.values()))
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - int(rank)
    return (math.sqrt(((y - design @ fit) ** 2).sum() / freedom), freedom) if freedom else (0.0, 0)


def standard_error(one: Spread, other: Spread, pairs: int) -> Spread:
    """The standard error of the mean difference of so many pairs, and its degrees of freedom, for
    two arms of one class or of two (Welch, Satterthwaite). (0, 0) if a deviation is unknown."""
    if one == other:
        return one[0] * math.sqrt(2 / pairs), one[1]
    if not (one[1] and other[1]):
        return 0.0, 0
    a, b = one[0] ** 2, other[0] ** 2
    return math.sqrt((a + b) / pairs), int((a + b) ** 2 / (a * a / one[1] + b * b / other[1]))


def holm(p: dict[Any, float]) -> dict[Any, float]:
    """The p-values, corrected for multiple tests: the smallest is multiplied by their number, the
    next by one less, and so on, and none may be below the one before it."""
    corrected, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        least = corrected[name] = min(1.0, max(least, (len(p) - i) * p[name]))
    return corrected


# ---- Results -------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def read_results(folder: Path | str, name: str) -> list[dict]:
    path = Path(folder, f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add_result(folder: Path | str, name: str, result: dict):
    """Adds a line to the results, with six significant digits: more are noise. The file is read
    again first, since another experiment may have written to it."""
    path = Path(folder, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.6g}"))
    lines = [json.dumps(x) for x in [*read_results(folder, name), result]]
    content = "[\n" + ",\n".join(lines) + "\n]\n"
    write_whole(path, lambda file: file.write(content.encode()))


def origin(x: dict) -> tuple:
    """Length, code and data of a training: only results that share them are compared."""
    return x.get("steps"), x.get("source"), x.get("corpus")


def compare_sources(name: str, lines: list[dict], current: str = ""):
    """Prints a message if the results have several sources (run.py's source_of), or another source
    than the current code."""
    count = Counter(x["source"] for x in lines)
    if len(count.keys() | ({current} - {""})) > 1:
        recorded = ", ".join(f"{source} ({n})" for source, n in count.items())
        current = f"; the current code on this machine has {current}" if current else ""
        info(f"{name}: the results have source {recorded}{current}")


def usual(lines: list[dict]) -> list[dict]:
    """The largest set of results with the same length, code and corpus; of equally large sets, the
    newest."""
    origins = [origin(x) for x in lines]
    most = max(reversed(origins), key=origins.count, default=None)
    return [x for x in lines if origin(x) == most]


def collect(experiment, options) -> dict[str, list[dict]]:
    """The newest result of every seed, by arm of an experiment (run.py's). The base's come first,
    under the experiment's name for it. `against` is the difference to the base."""
    own = usual(read_results(options.results, experiment.results or experiment.name))
    # base.json has the figures of every run; lines "base" of our own file add those of measure.
    bases = [] if experiment.compute else read_results(options.results, "base")
    bases = [x for x in bases if origin(x) == origin(own[0])] if own else usual(bases)
    found = {("base", x["seed"]): x for x in bases}  # later lines replace earlier ones
    for x in own:
        known = found.get(("base", x["seed"]), {}) if x["arm"] == "base" else {}
        found[x["arm"], x["seed"]] = known | x
    label = {"base": f"{experiment.base} (base)" if experiment.base else "base"}
    label |= {name: name for name in experiment.arms(options.base())}
    results, key = {name: [] for name in label.values()}, experiment.against
    for (name, seed), x in sorted(found.items(), key=lambda item: item[0][1]):
        base = found.get(("base", seed), {})
        if name != "base" and key in base and key in x:
            x = x | {"against": x[key] - base[key]}
        if name in label:
            results[label[name]].append(x)
    return results


@dataclass
class Difference:
    """The difference of an arm to the base, or to another arm, over the seeds that both have."""

    mean: float
    half: float | None  # half of the 95 % interval, from the pooled deviations
    alone: float | None  # the same, from the deviation of these pairs alone
    pairs: int
    error: Spread = (0.0, 0)  # standard error of the mean, degrees of freedom

    @property
    def p(self) -> float:
        """The probability of such a mean, or a larger one, if nothing differs."""
        return p_value(self.mean / self.error[0], self.error[1])

    def p_equal(self, margin: float) -> float:
        """The probability of such a mean if the true difference is as large as the margin: twice
        the larger of two one-sided p-values, so it is below 0.05 exactly if the 95 % interval lies
        within the margin."""
        room = (margin - abs(self.mean)) / self.error[0]
        return p_value(room, self.error[1]) if room > 0 else 1.0


def shape(x: dict) -> tuple:
    """The class of a network: its active parameters and its number of MTP modules."""
    return x.get("active"), len(x.get("val_mtp_losses", []))


def spreads(key: str, folder: Path | str, results: dict[str, list[dict]]):
    """The deviation of a figure, as a function of a result. For bits/byte, which all runs have, it
    is pooled in two classes over all runs in the folder that were trained alike; for another
    figure, over these results."""
    first = {(name, x["seed"]): x for name, xs in results.items() for x in xs if key in x}
    if key not in TEXTS:
        every = residual_deviation({k: x[key] for k, x in first.items()})
        return lambda x: every
    base = next((shape(x) for x in first.values()), ())
    origins, classes = {origin(x) for x in first.values()}, ({}, {})
    for path in sorted(Path(folder).glob("*.json")):
        for x in read_results(folder, path.stem):
            if isinstance(x, dict) and key in x and origin(x) in origins:
                classes[shape(x) != base][f"{path.stem} {x['arm']}", x["seed"]] = x[key]
    like, others = map(residual_deviation, classes)
    return lambda x: like if shape(x) == base else others


def compare(one: list[dict], other: list[dict], key: str, varies=None) -> Difference | None:
    """How much larger the figure is in `one`, over runs of the same seed. varies: see spreads;
    without it the interval comes from these pairs alone."""
    of_seed = {x["seed"]: x for x in other if key in x}
    pairs = [(x, of_seed[x["seed"]]) for x in one if key in x and x["seed"] in of_seed]
    if not pairs:
        return None
    mean, alone = own_interval([x[key] - y[key] for x, y in pairs])
    if not varies:
        return Difference(mean, alone, alone, len(pairs))
    error = standard_error(varies(pairs[0][0]), varies(pairs[0][1]), len(pairs))
    half = quantile(error[1]) * error[0] if error[0] else None
    return Difference(mean, half, alone, len(pairs), error)


def differences(experiment, options, results: dict[str, list[dict]]) -> dict[str, Difference]:
    """The differences of every arm to the base, and of the experiment's pairs."""
    key, (base, *others) = experiment.against, results
    compared = {name: (name, base) for name in others}
    compared |= {f"{one} against {other}": (one, other) for one, other in experiment.pairs}
    varies = None if experiment.compute else spreads(key, options.results, results)
    found = {name: compare(*(results.get(arm, []) for arm in arms), key, varies)
             for name, arms in compared.items()}  # fmt: skip
    return {name: x for name, x in found.items() if x}


# ---- An experiment's table and figure ------------------------------------------------------------


def number(x: float) -> str:
    if abs(x) >= 10:
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def with_half(text: str, half: float | None) -> str:
    return text + (f" ± {number(half)}" if half else "")


def signed(x: Difference) -> str:
    return with_half(("+" if x.mean > 0 else "") + number(x.mean), x.half)


def cell(values: list[float]) -> str:
    mean, half = own_interval(values) if values else (0.0, None)
    return with_half(number(mean), half) if values else ""


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def table(experiment, options) -> str:
    """A Markdown table with a row for each arm, and further comparisons below it."""
    results, columns, key = collect(experiment, options), experiment.columns, experiment.against
    found, rows = differences(experiment, options, results), []
    base = [x for x in next(iter(results.values())) if key in x]
    for name, xs in results.items():
        if xs := [x for x in xs if key in x]:
            cells = {k: cell([x[k] for x in xs if k in x]) for k in columns}
            if name in found and not experiment.compute:
                # Makes rows comparable, even if arms have other seeds than the base.
                for k in {key, "test_bpb"} & {*columns}:
                    mean = statistics.mean(x[k] for x in base if k in x)
                    cells[k] = number(mean + compare(xs, base, k).mean)
            against = signed(found[name]) if name in found else ""
            rows.append([name, str(len(xs)), *cells.values(), against])
    text = markdown(["arm", "seeds", *columns.values(), f"{columns[key]} against base"], rows)
    pairs = [f"* {name}: {signed(x)}." for name, x in found.items() if name not in results]
    return "\n".join([text, *[""][: len(pairs)], *pairs])


INK = "#6e7781"  # a grey with a contrast of 4.5 : 1 to white, and 4.2 : 1 to the dark GitHub
COLOURS = ["#6e7781", "#2f81f7", "#db6d28", "#2da44e", "#bf4b8a", "#a475f9", "#b08800", "#1b9e9e"]
COLOURS += ["#e5534b", "#57606a"]
# matplotlib's settings. In an .svg text stays text, and the same data give the same file.
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= {"axes.edgecolor": INK, "axes.facecolor": "none", "font.size": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "nanoV3"}


def dots(ax, results: dict[str, list[dict]], key: str, label: str):
    """A line for each arm: its seeds as dots, its mean with the 95 % interval as a bar."""
    names = [name for name, xs in results.items() if any(key in x for x in xs)]
    for y, name in enumerate(reversed(names)):
        values, colour = [x[key] for x in results[name] if key in x], colour_of(results, name)
        mean, half = own_interval(values)
        half = results[name][0].get("half") if key == "against" else half
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


def save_figure(path: Path, size: tuple[float, float], draw):
    """Calls `draw` with a matplotlib figure and saves it: the same bytes for the same data."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        info("no figure: it needs matplotlib (pip install matplotlib)")
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    info(f"figure: {path}")


def show(experiment, options, source: str):
    """Prints an experiment's table, writes it into the page, and draws the figure. source: the
    current code's."""
    text, name, results = table(experiment, options), experiment.name, collect(experiment, options)
    print(text)
    file = experiment.results or name
    compare_sources(f"{file}.json", read_results(options.results, file), source)
    if experiment.draw and any(results.values()):
        found = differences(experiment, options, results)
        half = {arm: found[arm].half if arm in found else None for arm in results}
        shown = {arm: [x | {"half": half[arm]} for x in xs] for arm, xs in results.items() if xs}
        path = Path(options.docs, "figures", f"{name}.svg")
        save_figure(path, (8, 3), lambda figure: experiment.draw(figure, shown))
        text += f"\n\n![{name}](figures/{name}.svg)"
    write_part(Path(options.docs, "RESULTS.md"), name, text)


def write_part(page: Path, name: str, part: str):
    """Replaces the part of the page between the two marks of this name, if it has them."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    if begin in text:
        before, after = text[: text.index(begin)], text[text.index(end) :]
        page.write_text(before + begin + part + after, encoding="utf-8")


# ---- The eight planned claims --------------------------------------------------------------------

# Networks of the plan: (file, arm). Each has the learning rate that was best on validation text.
FRESH = {
    "MLA": ("attention", "MLA lr x0.67"), "no shared": ("experts", "no shared"),
    "MHA": ("attention", "MHA"), "GQA 2": ("attention", "GQA 2"), "off": ("mtp", "off lr x0.67"),
    "dense": ("experts", "dense lr x0.67"), "loss 0.01": ("balance", "loss 0.01 lr x0.67"),
    "tiles": ("fp8_loss", "tiles lr x0.67"),
}  # fmt: skip
# The same on English prose, at the base's rate; two of them were not trained there.
PROSE = {name: (file, arm.removesuffix(" lr x0.67")) for name, (file, arm) in FRESH.items()}
PROSE |= {"MLA": ("base", "base")}


@dataclass
class Claim:
    """Network `one` has a lower loss than `other` or, with a margin, an equal loss."""

    text: str
    one: str
    other: str
    step: str = ""  # how much longer one's training step takes than other's, if measured
    margin: float = 0.0  # as a part of the base's loss


CLAIMS = [
    Claim("A bias costs less than a sequence-wise loss", "MLA", "loss 0.01"),
    Claim("MLA is better than multi-head attention", "MLA", "MHA", "+1 %"),
    Claim("MLA is better than grouped queries", "MLA", "GQA 2"),
    Claim("Grouped queries are worse than multi-head", "MHA", "GQA 2"),
    Claim("Experts beat a dense network", "MLA", "dense", "+25 %"),
    Claim("MTP leaves the loss as it is", "MLA", "off", "+38 %", 0.0022),
    Claim("A shared expert helps", "MLA", "no shared"),
    Claim("FP8 costs at most 0.25 %", "tiles", "MLA", "emulated", 0.0025),
]
PLACES = {"test text": ("confirmation", FRESH, "test_bpb")}
PLACES |= {"validation text": ("confirmation", FRESH, "val_bpb")}
PLACES |= {"prose": ("prose", PROSE, "test_bpb")}


@dataclass
class Answers:
    """The differences of all claims on one text, by claim; claims without runs are left out."""

    found: dict[str, Difference]
    base: float  # the mean loss of the base, bits/byte


def ask(place: str) -> Answers:
    folder, networks, key = PLACES[place]
    folder = RESULTS / folder
    runs = {name: [x for x in read_results(folder, file) if x["arm"] == arm]
            for name, (file, arm) in networks.items()}  # fmt: skip
    varies = spreads(key, folder, runs)
    found = {x.text: compare(runs[x.other], runs[x.one], key, varies) for x in CLAIMS}
    found = {text: x for text, x in found.items() if x}
    return Answers(found, statistics.mean(x[key] for x in runs["MLA"]))


def tests() -> dict[tuple[str, str], tuple[float, float]]:
    """p, and p corrected for all ten tests of the plan, by claim and kind of test. As planned,
    differences are tested on the test text, and FP8's equality on both texts, where the larger p
    counts."""
    first, second, p = ask("test text"), ask("validation text"), {}
    for x in CLAIMS:
        p[x.text, "a difference"] = first.found[x.text].p
        if x.margin:
            texts = [first, second] if x.one == "tiles" else [first]
            p[x.text, "an equality"] = max(
                a.found[x.text].p_equal(x.margin * a.base) for a in texts
            )
    corrected = holm(p)
    return {test: (p[test], corrected[test]) for test in p}


def p_in_words(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else number(p)


def table_of_claims() -> str:
    """Differences in bits per byte; a positive one supports the claim."""
    answers, p, rows = {place: ask(place) for place in PLACES}, tests(), []
    for x in CLAIMS:
        found = [answers[place].found.get(x.text) for place in PLACES]
        test, validation, prose = (f"{y.mean:+.4f} ± {y.half:.4f}" if y else "" for y in found)
        words = map(p_in_words, p[x.text, "a difference"])
        pairs, alone = str(found[0].pairs), f"± {found[0].alone:.4f}"
        rows.append([x.text, pairs, test, alone, *words, validation, prose])
        if x.margin:
            within = (
                f"... within {100 * x.margin:.2f} %: {x.margin * answers['test text'].base:.4f}"
            )
            words = map(p_in_words, p[x.text, "an equality"])
            rows.append([within, pairs, "", "", *words, "", ""])
    heads = ["the claim", "seeds", "test text", "its pairs alone", "p", "of ten tests (Holm)"]
    return markdown([*heads, "validation text", "prose, 3 seeds"], rows)


MARKS = {"test text": ("o", "full"), "validation text": ("o", "none"), "prose": ("D", "none")}


def draw_claims(figure):
    """A row for each claim, with a mark and an interval for each text, in percent of the base's
    loss. Blue supports the claim, orange contradicts it, grey does neither. An interval supports a
    difference if it lies above 0, an equality if it lies within the margin."""
    ax, answers = figure.subplots(), {place: ask(place) for place in PLACES}
    for row, claim in enumerate(CLAIMS):
        y = -row
        ax.text(-0.55, y + 0.26, claim.text)
        ax.text(1.4, y + 0.26, claim.step or "-", ha="right")
        for i, (place, (marker, fill)) in enumerate(MARKS.items()):
            if x := answers[place].found.get(claim.text):
                mean, half = (100 * value / answers[place].base for value in (x.mean, x.half))
                low, high, margin = mean - half, mean + half, 100 * claim.margin
                agrees = -margin <= low and high <= margin if margin else low > 0
                differs = not agrees and (low > 0 or high < 0)
                colour = COLOURS[1] if agrees else COLOURS[2] if differs else INK
                ax.errorbar(mean, y + 0.06 - 0.2 * i, xerr=half, fmt=marker, fillstyle=fill,
                            color=colour, markersize=5, elinewidth=1.2)  # fmt: skip
        ax.plot([0, 0], [y - 0.45, y + 0.17], color=INK, linewidth=0.9)
        edge = 100 * claim.margin  # the band within which two networks count as equal
        ax.fill_between([-edge, edge], y - 0.45, y + 0.17, color=COLOURS[1], alpha=0.2, linewidth=0)
    ax.set(xlim=(-0.6, 1.42), ylim=(0.5 - len(CLAIMS), 1.05), yticks=[])
    ax.set(xlabel="less loss on the claim's side, % of the loss", xticks=[-0.5, 0, 0.5, 1])
    ax.spines["left"].set_visible(False)
    ax.text(1.4, 0.62, "its steps take longer by", ha="right", fontsize=8)
    for place, (marker, fill) in MARKS.items():
        ax.plot([], [], marker, fillstyle=fill, color=INK, markersize=5, label=place)
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=3, handletextpad=0.1,
              columnspacing=0.9, borderaxespad=0)  # fmt: skip


def main():
    for folder in {folder for folder, _, _ in PLACES.values()}:
        files = (RESULTS / folder).glob("*.json")
        compare_sources(folder, [x for file in files for x in read_results(file.parent, file.stem)])
    write_part(ROOT / "docs/RESULTS.md", "claims", table_of_claims())
    print(table_of_claims())
    save_figure(ROOT / "docs/figures/claims.svg", (3.9, 5.2), draw_claims)


if __name__ == "__main__":
    main()
