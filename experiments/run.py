"""The runner that all experiments share: python experiments/NAME.py [--key=value]. The keys are the
fields of `Options`.

An experiment names its arms: changes to the base configuration (experiments/base.py), or classes
and functions that replace others while the arm is trained. Arms of one seed begin with the same
weights wherever their shapes agree, and see the same data. A result is one line in
experiments/results/NAME.json, written as soon as its run ends. Results that exist, of the same
code, settings and data, are not computed again. The base arm belongs to all experiments: `python
experiments/run.py` trains it alone. Tables, which report.py also writes into docs/RESULTS.md, have
means with 95 % intervals over the seeds; "against base" is the difference to the base run of the
same seed.
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import add_result, digest, read_results, show
from unseen import bits_per_byte, nats_by_document

import bench
import train
from fp8 import use_fp8
from load import load_model
from model import DeepSeekV3, ModelConfig
from support import processes
from support.settings import Refusal, info, parse_args, read_config_file, run_command
from support.sizes import parameter_counts
from support.tokenizer import tokenizer_files
from support.tokens import Dataset, Tokens

ROOT = Path(train.__file__).parent
TINY = str(ROOT / "config/tiny.py")
# A run of two seconds with every phase of a training.
SMALL = {"out": "", "steps": 10, "batch_size": 4, "block_size": 16, "long_block_size": 32}
SMALL |= {"long_start": 0.8, "eval_every": 10, "log_every": 1, "device": "cpu"}


@dataclass
class Options:
    seeds: str = "0,1,2"  # train every arm once with each
    steps: int = 600  # optimiser steps of a run; results of other lengths are kept apart
    arms: str = ""  # only these arms, separated by commas
    rate: float = 1.0  # times the learning rate; arms "NAME lr x0.67" are in no table
    plot: bool = False  # no training: table and figure of the existing results
    quick: bool = False  # a tiny network for 20 steps with seeds 0 and 1, as a test, in out/quick
    config: str = "experiments/base.py"  # the base configuration
    data: str = ""  # another text than the base's; give --results=FOLDER, too
    results: str = "experiments/results"  # folder of the JSON files
    docs: str = "docs"  # folder of RESULTS.md and figures/

    def base(self) -> dict[str, Any]:
        """The settings of the base arm: the file's, with length, dtype and logging."""
        settings = read_config_file(self.config, ModelConfig, train.TrainConfig)
        settings = {"dtype": "float32"} | settings  # never auto: results differ by dtype
        settings |= {"data": self.data} if self.data else {}
        return settings | {"steps": self.steps, "log_every": max(1, self.steps // 60)}


@dataclass(eq=False)  # so that functools.cache takes it
class Arm:
    """Changed settings of the base configuration, and replacements for names of the code while this
    arm is trained, such as {"model.MLA": MultiHeadAttention}."""

    settings: dict[str, Any] = field(default_factory=dict)
    replace: dict[str, Any] = field(default_factory=dict)
    longer: float = 1.0  # times as many steps as the base

    @contextlib.contextmanager
    def in_place(self):
        """A context in which the replacements are active."""
        with contextlib.ExitStack() as stack:
            for target, stand_in in self.replace.items():
                stack.enter_context(mock.patch(target, stand_in))
            yield


BASE = Arm()


@dataclass
class Trained:
    """A finished run: the model and the arguments of `train.train`."""

    net: DeepSeekV3
    data: Dataset
    folder: Path  # of the data
    config: train.TrainConfig
    machine: processes.Machine


@dataclass
class Experiment:
    name: str
    arms: Callable[[dict], dict[str, Arm]]  # from the base configuration's settings
    columns: dict[str, str]  # of the table: key of a result -> heading
    draw: Callable[[Any, dict], None] | None = None  # (matplotlib figure, results by arm)
    measure: Callable[[Trained], dict] | None = None  # figures beyond those of every run
    base: str = ""  # this experiment's name for the base arm
    against: str = "test_bpb"  # a column has the difference to the base in this figure
    results: str = ""  # the experiment that trains these arms, if not this one
    compute: Callable[[str, int], dict] | None = None  # (arm, seed): replaces the training
    pairs: tuple[tuple[str, str], ...] = ()  # arms to compare, besides each with the base


# ---- Training ------------------------------------------------------------------------------------


def new_network(settings: dict, seed: int) -> DeepSeekV3:
    torch.manual_seed(seed)
    return DeepSeekV3(ModelConfig(**train.split_configs(settings)[0]))


def begin_alike(net: DeepSeekV3, base: DeepSeekV3) -> DeepSeekV3:
    """net with the initial weights of base wherever name and shape agree."""
    own, other = net.state_dict(), base.state_dict()
    same = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    net.load_state_dict(own | same)
    return net


def train_arm(arm: Arm, options: Options, seed: int, folder: Path, first: DeepSeekV3) -> Trained:
    """Trains in the folder, from the weights of first, the base's network. Resumes an interrupted
    run in it, or opens a finished one."""
    base = options.base()
    settings = base | arm.settings | {"steps": round(base["steps"] * arm.longer)}
    settings |= {"seed": seed, "out": str(folder), "compile": False}  # a long run alone is compiled
    settings |= {"eval_every": settings["steps"], "save_every": max(1, settings["steps"] // 4)}
    config = train.TrainConfig(**train.split_configs(settings)[1])
    file = folder / "ckpt.pt"
    config.resume, config.overwrite = file.exists(), not file.exists()
    machine = processes.start(config)
    if config.resume:
        net, _ = load_model(file, machine.device)
    else:
        net = begin_alike(new_network(settings, seed), first).to(machine.device)
    data, source = train.open_data(config, net.config.vocab_size)
    if options.quick:
        data.val, data.test = (Tokens([x.arrays[0][:4096]]) for x in (data.val, data.test))
    if config.fp8:
        use_fp8(net)
    train.train(net, data, config, machine, tokenizer_files(source))
    return Trained(net.eval(), data, source, config, machine)


def figures_of(run: Trained) -> dict[str, Any]:
    """The figures of every run: last evaluation, loss on the test text, and curves of the log."""
    log = [json.loads(x) for x in (Path(run.config.out) / "log.jsonl").read_text().splitlines()]
    steps, last = [x for x in log if "loss" in x], [x for x in log if "val_loss" in x][-1]
    before = [0, *(x["tokens"] for x in steps)]
    tokens = [x["tokens"] - n for x, n in zip(steps, before, strict=False)]
    half = [x["max_vio"] for x in steps if 2 * x["step"] > run.config.steps]
    count = parameter_counts(run.net)
    del last["step"], last["expert_load"]
    nats, size = nats_by_document(
        run.net, run.data, run.folder, run.config.block_size, run.config, run.machine
    )
    return last | {
        "test_bpb": bits_per_byte(nats, size),
        "test_nats": nats.tolist(), "test_bytes": size.astype(int).tolist(),  # of every document
        "max_vio_batch": statistics.mean(half),  # of the batches in the log's second half
        "seconds": sum(n / x["tokens_per_s"] for n, x in zip(tokens, steps, strict=True)),
        "parameters": count["total"], "active": count["active"],
        "curve": {key: [x[key] for x in steps] for key in ("step", "loss", "max_vio")},
    }  # fmt: skip


# ---- Results -------------------------------------------------------------------------------------


def code_hash(*functions: Callable) -> str:
    """A hash of their code, docstrings included, without comments and layout."""
    return digest(*(ast.dump(ast.parse(inspect.getsource(x))) for x in functions))


@functools.cache
def code_id(dtype: str = "float64", arm: Arm = BASE, file: str = TINY) -> str:
    """Identifies the code by its results: the losses of a few training steps in this dtype, of the
    file's network with the arm's changes, on random tokens, to eight digits. In bfloat16 another
    kind of machine may round differently: its results are a set of their own."""
    info(f"training a few steps in {dtype}, to see whether code and machine round as in the tables")
    settings = read_config_file(file, ModelConfig, train.TrainConfig)
    settings |= {"optimizer": "muon", "alpha": 0.01} | arm.settings | SMALL | {"dtype": dtype}
    rng, vocab_size = np.random.default_rng(0), settings["vocab_size"]
    tokens = Tokens([rng.integers(0, vocab_size, 2000).astype(np.uint16)])
    data = SimpleNamespace(train=tokens, val=tokens, vocab_size=vocab_size, val_bytes_per_token=3.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads sum in another order
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, arm.in_place():
        config = train.TrainConfig(**train.split_configs(settings | {"out": folder})[1])
        net = new_network(settings, 0).to(torch.float64 if dtype == "float64" else torch.float32)
        if config.fp8:
            use_fp8(net)
        train.train(net, data, config, processes.start(config))
        log = [json.loads(x) for x in (Path(folder) / "log.jsonl").read_text().splitlines()]
    torch.set_num_threads(threads)
    keys = ("loss", "mtp_loss", "balance_loss", "max_vio", "val_loss", "val_bpb_long")
    return digest(*(f"{x[key]:.8g}" for x in log for key in keys if key in x))


def change_hash(arm: Arm, measure: Callable | None, options: Options) -> str:
    """A hash of the arm's settings, of how the code trains with them and with the replacements, and
    of the code of measure (not of the functions that it calls)."""
    code = ""  # the base's is in its source
    if arm.settings or arm.replace:
        code = code_id(options.base()["dtype"], arm, options.config)
    changed = sorted(arm.settings.items()), arm.longer, sorted(arm.replace)
    return digest(*changed, code_hash(*([measure] if measure else [])), code)


def source_of(options: Options) -> str:
    """A hash of the base's settings, and of how the code trains on this machine."""
    base = options.base()
    settings = sorted((k, v) for k, v in base.items() if "_every" not in k)
    return digest(code_id(), code_id(base["dtype"]), settings)


def missing(experiment: Experiment, name: str, arm: Arm, seed: int, options: Options):
    """The missing results of an arm and seed, as [(file, measure, identity)], and the folder in
    which it trains."""
    base = options.base()
    data = train.TrainConfig(data=base["data"], block_size=base["block_size"])
    _, data = train.open_data(data, base["vocab_size"])
    corpus = digest(*(hashlib.sha256(x.read_bytes()).digest() for x in sorted(data.glob("*.bin"))))
    common = {"seed": seed, "steps": options.steps, "dtype": base["dtype"]}
    common |= {"source": source_of(options), "corpus": corpus}
    # The base is in two files: base.json has the figures of every run, ours those of measure.
    parts = [(experiment.name, experiment.measure)]
    if name == "base":
        parts = [("base", None), *(parts if experiment.measure else [])]
    found = []
    for file, measure in parts:
        identity = {"arm": name, **common, "change": change_hash(arm, measure, options)}
        if not any(identity.items() <= x.items() for x in read_results(options.results, file)):
            found.append((file, measure, identity))
    where = "base" if name == "base" else f"{experiment.name}-{name.replace(' ', '-')}"
    folder = Path("out/quick" if options.quick else "out/experiments")
    return found, folder / f"{where}-{seed}-{digest(common, change_hash(arm, None, options))[:8]}"


def run_arm(experiment: Experiment, name: str, arm: Arm, seed: int, options: Options):
    """Computes the missing results of an arm and seed."""
    todo, folder = missing(experiment, name, arm, seed, options)
    if not todo:
        return
    info(f"\n{experiment.name}: {name}, seed {seed}, {options.steps} steps, in {folder}")
    first = new_network(options.base(), seed)  # before parts of it are replaced
    with arm.in_place():
        run = train_arm(arm, options, seed, folder, first)
        for file, measure, identity in todo:
            values = {} if name == "base" and file != "base" else figures_of(run)
            with torch.no_grad():
                values |= measure(run) if measure else {}
            add_result(options.results, file, identity | facts() | values)
    if name != "base":  # other experiments measure the base, too
        shutil.rmtree(folder)


def compute_arm(experiment: Experiment, name: str, seed: int, options: Options):
    """The same without a training. The identity does not include the code that `compute` calls."""
    identity = {"arm": name, "seed": seed, "steps": 0, "source": "", "corpus": ""}
    identity["change"] = code_hash(experiment.compute)
    done = read_results(options.results, experiment.name)
    if not any(identity.items() <= x.items() for x in done):
        values = experiment.compute(name, seed)
        add_result(options.results, experiment.name, identity | facts() | values)


def facts() -> dict[str, Any]:
    """Facts that a result may depend on, besides its identity."""
    return {
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
        "threads": torch.get_num_threads(), "machine": bench.processor() or platform.machine(),
    }  # fmt: skip


def commit() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


# ---- The command ---------------------------------------------------------------------------------


def main(argv: list[str], experiment: Experiment):
    about = inspect.getdoc(inspect.getmodule(experiment.arms)) or __doc__
    _, values = parse_args(about, argv, Options)
    options = Options(**values)
    if options.quick:
        quick = {"steps": 20, "seeds": "0,1", "config": "config/tiny.py"}
        quick |= {"results": "out/quick", "docs": "out/quick"}
        options = Options(**quick | values)
    arms = {"base": BASE} | experiment.arms(options.base())
    chosen = options.arms.split(",") if options.arms else list(arms)
    if unknown := [name for name in chosen if name not in arms]:
        raise Refusal(f"there is no arm {unknown[0]!r}; choose from {', '.join(arms)}.")
    trainer = replace(experiment, name=experiment.results or experiment.name)
    # All arms with one seed, then with the next, so that pairs come early.
    seeds = options.seeds.split(",")
    if odd := [seed for seed in seeds if not seed.strip().isdecimal()]:
        raise Refusal(f"seeds is {options.seeds!r}, but {odd[0]!r} is no number: give --seeds=0,1")
    if options.rate != 1:
        changed = {"lr": options.rate * options.base()["lr"]}
        arms = {f"{name} lr x{options.rate:g}": replace(arm, settings=arm.settings | changed)
                for name, arm in arms.items() if name in chosen}  # fmt: skip
        chosen = list(arms)
    turns = [(int(seed), name) for seed in seeds for name in chosen]
    for seed, name in turns if not options.plot else []:
        if experiment.compute:
            compute_arm(experiment, name, seed, options)
        else:
            run_arm(trainer, name, arms[name], seed, options)
    show(experiment, options, "" if experiment.compute else source_of(options))


def command(experiment: Experiment):
    run_command(lambda argv: main(argv, experiment))


if __name__ == "__main__":
    command(Experiment("base", lambda base: {}, {"test_bpb": "bits/byte", "val_bpb": "validation"}))
