"""The runner that all experiments share: python experiments/NAME.py [--key=value].

    --seeds=0,1,2        every arm is trained once with each        --arms=a,b   only these
    --steps=600          the length of every run, a part of what identifies its result
    --plot               no training: table and figure of the results that are there
    --quick              a tiny network for a few steps, to see that all works (into out/quick)

An experiment names its arms: changes to the base configuration (config/small.py at a third of its
length), or classes and functions that stand in for others while the arm is trained. Arms of one
seed begin with the same weights wherever their shapes agree, and see the same data. A result is one
line in experiments/results/NAME.json, written as soon as its run ends; what is there already, from
the same code, settings and data, is not trained again. The base arm belongs to all experiments:
`python experiments/run.py` trains it alone. Tables have means with 95 % intervals over the seeds,
"against base" is the difference to the base run of the same seed; they, docs/RESULTS.md and
docs/figures/NAME.svg are made from the JSON files and nothing else.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
import train
from config import info, parse_args, read_config_file, run_command
from huggingface import load_checkpoint
from model import DeepSeekV3, ModelConfig

ROOT = Path(train.__file__).parent
SOURCES = ("model.py", "ops.py", "train.py")  # with the config file: what determines a training
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


@dataclass
class Options:
    seeds: str = "0,1,2"  # every arm is trained once with each
    steps: int = 600  # optimiser steps of a run
    arms: str = ""  # only these, separated by commas
    plot: bool = False  # no training: table and figure of the results that are there
    quick: bool = False  # a tiny network for 20 steps with seeds 0 and 1: shows that all works
    config: str = "config/small.py"  # the base configuration
    results: str = "experiments/results"  # folder of the JSON files
    docs: str = "docs"  # folder of RESULTS.md and figures/


@dataclass
class Arm:
    """What is changed: settings of the base configuration, and what stands in for names of the
    code while this arm trains, such as {"model.MLA": MultiHeadAttention}."""

    settings: dict[str, Any] = field(default_factory=dict)
    replace: dict[str, Any] = field(default_factory=dict)
    longer: float = 1.0  # times as many steps as the base


@dataclass
class Trained:
    """A run that has ended: the model, and what `train.train` was called with."""

    net: DeepSeekV3
    data: prepare_data.Dataset
    config: train.TrainConfig
    machine: train.Machine


@dataclass
class Experiment:
    name: str
    arms: Callable[[dict], dict[str, Arm]]  # from the base configuration's settings
    columns: dict[str, str]  # of the table: key of a result -> heading
    draw: Callable[[Any, dict], None] | None = None  # (matplotlib figure, results by arm)
    measure: Callable[[Trained], dict] | None = None  # more than every run's figures
    base: str = ""  # what the base arm is called here
    against: str = "val_bpb"  # whose difference to the base has a column
    results: str = ""  # the experiment that trains these arms, if it is another one
    compute: Callable[[str, int], dict] | None = None  # (arm, seed): in place of a training


# ---- Training ------------------------------------------------------------------------------------


def base_settings(options: Options) -> dict[str, Any]:
    """The base configuration: the file's, of another length, evaluated at the end."""
    settings = read_config_file(options.config, ModelConfig, train.TrainConfig)
    return settings | {"steps": options.steps, "log_every": max(1, options.steps // 60)}


def first_weights(settings: dict, base: dict, seed: int) -> DeepSeekV3:
    """The arm's network, with the base's first weights wherever name and shape are the same."""

    def network(settings: dict) -> DeepSeekV3:
        torch.manual_seed(seed)
        return DeepSeekV3(ModelConfig(**train.split_configs(settings)[0]))

    net, other = network(settings), network(base).state_dict()
    own = net.state_dict()
    same = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    net.load_state_dict(own | same)
    return net


def train_arm(arm: Arm, options: Options, seed: int, folder: Path) -> Trained:
    """Trains in the folder; goes on where a run there was interrupted, or opens a finished one."""
    base = base_settings(options)
    settings = base | arm.settings | {"steps": round(base["steps"] * arm.longer)}
    settings |= {"seed": seed, "out": str(folder)}
    settings |= {"eval_every": settings["steps"], "save_every": max(1, settings["steps"] // 4)}
    config = train.TrainConfig(**train.split_configs(settings)[1])
    machine, saved = train.start_machine(config), None
    net = first_weights(settings, base, seed).to(machine.device)
    data, source = train.open_data(config, net.config.vocab_size, machine)
    if options.quick:
        data.val = prepare_data.Tokens([data.val.arrays[0][:4096]])
    if (folder / "ckpt.pt").exists():
        saved = load_checkpoint(folder / "ckpt.pt")
        net.load_state_dict(saved["model"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.tiktoken", "meta.json"):  # so sample.py opens the folder
        shutil.copyfile(source / name, folder / name)
    if config.fp8:
        net.use_fp8()
    if not train.train(net, data, config, machine, saved):
        raise KeyboardInterrupt
    return Trained(net.eval(), data, config, machine)


def figures_of(run: Trained) -> dict[str, Any]:
    """What every run has: the last evaluation, and curves of the log."""
    log = [json.loads(x) for x in (Path(run.config.out) / "log.jsonl").read_text().splitlines()]
    steps, last = [x for x in log if "loss" in x], [x for x in log if "val_loss" in x][-1]
    before = [0, *(x["tokens"] for x in steps)]
    tokens = [x["tokens"] - n for x, n in zip(steps, before, strict=False)]
    half = [x["max_vio"] for x in steps if 2 * x["step"] > run.config.steps]
    count = run.net.parameter_counts()
    del last["step"], last["expert_load"]
    return last | {
        "dtype": str(run.machine.dtype)[6:],
        "max_vio_batch": statistics.mean(half),  # of the batches in the log's second half
        "seconds": sum(n / x["tokens_per_s"] for n, x in zip(tokens, steps, strict=True)),
        "parameters": count["total"], "active": count["active"],
        "curve": {key: [x[key] for x in steps] for key in ("step", "loss", "max_vio")},
    }  # fmt: skip


# ---- Results -------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def source_hash(*files: str) -> str:
    """Of the code without its comments and layout."""
    return digest(*(ast.dump(ast.parse((ROOT / x).read_text(encoding="utf-8"))) for x in files))


def change_hash(arm: Arm, measure: Callable | None) -> str:
    """What makes this arm's result: its settings, and the code of what it replaces and measures."""
    code = [arm.replace[name] for name in sorted(arm.replace)] + ([measure] if measure else [])
    code = [getattr(x, "__func__", x) for x in code]  # of a staticmethod
    code = [y for x in code for y in getattr(x, "__mro__", [x]) if y.__module__ == x.__module__]
    code = [inspect.getsource(x) for x in code]
    code += [source_hash("fp8.py")] if arm.settings.get("fp8") else []
    return digest(sorted(arm.settings.items()), arm.longer, sorted(arm.replace), *code)


def read_results(options: Options, name: str) -> list[dict]:
    path = Path(options.results, f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def rounded(x: Any) -> Any:
    """With six significant digits: more are noise."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def add_result(options: Options, name: str, result: dict):
    """One more line. Read again first, since another experiment may be running beside this one."""
    path = Path(options.results, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(rounded(x)) for x in [*read_results(options, name), result]]
    part = path.with_suffix(f".{os.getpid()}.tmp")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    os.replace(part, path)


def run_arm(experiment: Experiment, name: str, arm: Arm, seed: int, options: Options):
    """Makes the results of an arm and seed that are not there yet."""
    base, machine = base_settings(options), train.start_machine(train.TrainConfig())
    data = train.TrainConfig(data=base["data"], block_size=base["block_size"])
    _, data = train.open_data(data, base["vocab_size"], machine)
    corpus = digest(
        *(hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(data.glob("*.bin")))
    )
    source = source_hash(*SOURCES, options.config)
    common = {"seed": seed, "steps": options.steps, "source": source, "corpus": corpus}
    # The base is in two files: what every run has in base.json, what is measured besides in ours.
    parts = [(experiment.name, experiment.measure)]
    if name == "base":
        parts = [("base", None), *(parts if experiment.measure else [])]
    missing = []
    for file, measure in parts:
        identity = {"arm": name, **common, "change": change_hash(arm, measure)}
        if not any(identity.items() <= x.items() for x in read_results(options, file)):
            missing.append((file, measure, identity))
    if not missing:
        return
    where = "base" if name == "base" else f"{experiment.name}-{name.replace(' ', '-')}"
    folder = Path("out/quick" if options.quick else "out/experiments")
    folder /= f"{where}-{seed}-{digest(common, change_hash(arm, None))[:8]}"
    info(f"\n{experiment.name}: {name}, seed {seed}, {options.steps} steps, in {folder}")
    with contextlib.ExitStack() as stack:
        for target, stand_in in arm.replace.items():
            stack.enter_context(mock.patch(target, stand_in))
        run = train_arm(arm, options, seed, folder)
        for file, measure, identity in missing:
            values = {} if name == "base" and file != "base" else figures_of(run)
            with torch.no_grad():
                values |= measure(run) if measure else {}
            add_result(options, file, identity | facts() | values)
    if name != "base":  # the base will be measured by other experiments too
        shutil.rmtree(folder)


def compute_arm(experiment: Experiment, name: str, seed: int, options: Options):
    """The same for what is computed without a training."""
    identity = {"arm": name, "seed": seed, "steps": 0, "source": "", "corpus": ""}
    identity["change"] = digest(inspect.getsource(inspect.getmodule(experiment.compute)))
    if not any(identity.items() <= x.items() for x in read_results(options, experiment.name)):
        values = experiment.compute(name, seed)
        add_result(options, experiment.name, identity | facts() | values)


def facts() -> dict[str, Any]:
    """What a result depends on besides its identity."""
    return {
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def commit() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


# ---- Tables and figures --------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, None
    t = STUDENT_T[n - 2] if n - 2 < len(STUDENT_T) else 2.2
    return mean, t * statistics.stdev(values) / math.sqrt(n)


def collect(experiment: Experiment, options: Options) -> dict[str, list[dict]]:
    """The newest result of every arm and seed, for the number of steps of which there are most.

    `against` is the difference to the base run of the same seed, length, code and data.
    """

    def origin(x: dict) -> tuple:
        return x["seed"], x["steps"], x["source"], x["corpus"]

    own = read_results(options, experiment.results or experiment.name)
    bases = read_results(options, "base") if not experiment.compute else own
    bases = {origin(x): x for x in bases if x["arm"] == "base"}
    lengths = [x["steps"] for x in own if x["arm"] != "base"] or [n for _, n, *_ in bases]
    steps = max(set(lengths), key=lambda n: (lengths.count(n), n), default=options.steps)
    found = {("base", x["seed"]): x for x in bases.values()}
    found |= {
        (x["arm"], x["seed"]): bases.get(origin(x), {}) | x for x in own if x["arm"] == "base"
    }
    found |= {(x["arm"], x["seed"]): x for x in own if x["arm"] != "base"}
    label = {"base": f"{experiment.base} (base)" if experiment.base else "base"}
    label |= {name: name for name in experiment.arms(base_settings(options))}
    results = {name: [] for name in label.values()}
    for (name, _), x in sorted(found.items(), key=lambda item: item[0][1]):
        base = bases.get(origin(x), {})
        if name != "base" and experiment.against in base:
            x = x | {"against": x[experiment.against] - base[experiment.against]}
        if name in label and x["steps"] == steps:
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


def table(experiment: Experiment, options: Options) -> str:
    """Markdown: a row for each arm; below it, where the numbers come from and what is missing."""
    results, columns = collect(experiment, options), experiment.columns
    if columns.get("against") is None:
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


def save_figure(experiment: Experiment, options: Options) -> Path | None:
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
    grey |= {
        "axes.edgecolor": INK,
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "nanoV3",
    }
    grey |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.rc_context(grey):
        figure = Figure((8, 3), layout="constrained")
        experiment.draw(figure, {name: xs for name, xs in results.items() if xs})
        path = Path(options.docs, "figures", f"{experiment.name}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = {"Date": None, "Description": f"results {digest(json.dumps(results))}"}
        figure.savefig(path, transparent=True, metadata=shown)
    return path


def write_table(experiment: Experiment, options: Options):
    """Into docs/RESULTS.md, between the two marks of this experiment."""
    page = Path(options.docs, "RESULTS.md")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    marks = f"<!-- {experiment.name} -->\n", f"\n<!-- end of {experiment.name} -->"
    if marks[0] in text:
        before, rest = text.split(marks[0])
        after = rest.split(marks[1])[1]
        page.write_text(f"{before}{marks[0]}{table(experiment, options)}{marks[1]}{after}", "utf-8")


# ---- The command ---------------------------------------------------------------------------------


def main(argv: list[str], *experiments: Experiment):
    doc = inspect.getdoc(inspect.getmodule(experiments[0].arms)) or __doc__
    _, values = parse_args(doc, argv, Options)
    options = Options(**values)
    if options.quick:
        quick = {"steps": 20, "seeds": "0,1", "config": "config/tiny.py"}
        quick |= {"results": "out/quick", "docs": "out/quick"}
        options = Options(**quick | values)
    arms = [{"base": Arm()} | x.arms(base_settings(options)) for x in experiments]
    chosen, known = options.arms.split(",") if options.arms else [], {y for x in arms for y in x}
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"there is no arm {unknown[0]!r}; choose from {', '.join(sorted(known))}.")
    for experiment, named in zip(experiments, arms, strict=True):
        trainer = replace(experiment, name=experiment.results or experiment.name)
        turns = [(int(seed), name) for seed in options.seeds.split(",") for name in named]
        for seed, name in turns:  # all arms with one seed, then with the next: pairs come soon
            if options.plot or name not in (chosen or named):
                continue
            if experiment.compute:
                compute_arm(experiment, name, seed, options)
            else:
                run_arm(trainer, name, named[name], seed, options)
        print(table(experiment, options), end="\n\n")
        write_table(experiment, options)
        if path := save_figure(experiment, options):
            info(f"figure: {path}")


def command(*experiments: Experiment):
    run_command(lambda argv: main(argv, *experiments))


if __name__ == "__main__":
    command(Experiment("base", lambda base: {}, {"val_bpb": "bits/byte", "seconds": "seconds"}))
