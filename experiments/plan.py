"""The planned runs: which are there, and training of those that are not. python experiments/plan.py

docs/notes/PLAN.md says what they are to show and by which rule; it was committed before any of them
was trained. Here is their order. Every run uses one core:

    OMP_NUM_THREADS=1 nice -n 19 python experiments/plan.py &     # once for every core
    python experiments/plan.py --list        # trains nothing, makes the data if they are missing

A process takes the first run that is missing and that no other process is at. What was interrupted
goes on from its last checkpoint. Results are written as soon as a run ends, so the command can be
stopped at any time and started again on another day.
"""

import contextlib
import fcntl
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import attention
import balance
import experts
import fp8_loss
import mtp
import run
import tables

from support.settings import info, parse_args, run_command

EXPERIMENTS = {
    x.EXPERIMENT.name: x.EXPERIMENT for x in (attention, balance, experts, fp8_loss, mtp)
}
# Networks whose learning rate is chosen, and whose arm each is. MLA is the base.
CHOSEN = {"MLA": "attention", "no shared": "experts", "MHA": "attention", "GQA 2": "attention",
          "off": "mtp", "dense": "experts"}  # fmt: skip
SMALLER, SMALLEST = (0.67, 0.45), 0.3  # SMALLEST only where the least of these is the best
CHOOSING_SEEDS = range(3)
# The base's network, trained in another way: at the base's rate.
LIKE_BASE = {"loss 0.01": "balance", "tiles": "fp8_loss"}
FRESH = range(8, 16)
# Small differences, and an equality, need more runs.
MORE = {"MLA": range(8, 24), "loss 0.01": range(8, 24), "no shared": range(8, 24)}
MORE |= {"tiles": range(8, 20)}
CONFIRMATION = "experiments/results/confirmation"  # a set of its own: old seeds are not added to it


@dataclass(frozen=True)
class Run:
    experiment: str
    arm: str
    seed: int
    results: str = run.Options.results
    steps: int = run.Options.steps

    @property
    def options(self) -> run.Options:
        return run.Options(results=self.results, steps=self.steps)

    def missing(self) -> tuple[list, Path]:
        return run.missing(*self.arguments())

    def train(self):
        run.run_arm(*self.arguments())

    def arguments(self) -> tuple:
        experiment, options = EXPERIMENTS[self.experiment], self.options
        arms = {"base": run.Arm()} | experiment.arms(options.base())
        return experiment, self.arm, arms[self.arm], self.seed, options


# ---- The learning rates --------------------------------------------------------------------------


def arm_at(network: str, times: float) -> str:
    """The name of the arm that trains this network at so many times the base's rate."""
    if times == 1:
        return "base" if network == "MLA" else network
    return f"{network} lr x{times}"


def validation(network: str, times: float) -> float | None:
    """Its bits per byte of the validation text, the mean over CHOOSING_SEEDS; none if one lacks."""
    arm = arm_at(network, times)
    options = run.Options()
    lines = tables.read_results(options, "base" if arm == "base" else CHOSEN[network])
    usual = tables.usual_origin(tables.read_results(options, "base"))
    found = {x["seed"]: x["val_bpb"] for x in lines
             if x["arm"] == arm and tables.origin(x) == usual}  # fmt: skip
    if not {*CHOOSING_SEEDS} <= found.keys():
        return None
    return statistics.mean(found[seed] for seed in CHOOSING_SEEDS)


def rates_of(network: str) -> tuple[float, ...]:
    """Those that are tried: SMALLEST too, where the smallest of the others is known to be best."""
    rates = 1.0, *SMALLER
    values = [validation(network, x) for x in rates]
    smallest_wins = None not in values and min(values) == values[-1]
    return (*rates, SMALLEST) if smallest_wins else rates


def best_rate(network: str) -> float | None:
    """The rate with the least loss on the validation text; none while a run lacks."""
    values = {x: validation(network, x) for x in rates_of(network)}
    return None if None in values.values() else min(values, key=values.__getitem__)


# ---- The runs ------------------------------------------------------------------------------------


def choosing() -> Iterator[Run]:
    for late in False, True:  # the rate that only some need comes after those that all need
        for network, experiment in CHOSEN.items():
            for times in rates_of(network)[1:]:
                for seed in CHOOSING_SEEDS if (times == SMALLEST) == late else ():
                    yield Run(experiment, arm_at(network, times), seed)


def confirming(network: str, seed: int) -> Run | None:
    """None while the learning rate is not known."""
    rate = best_rate("MLA" if network in LIKE_BASE else network)
    experiment = (CHOSEN | LIKE_BASE)[network]
    return Run(experiment, arm_at(network, rate), seed, CONFIRMATION) if rate else None


def seeds_of(network: str) -> range:
    return MORE.get(network, FRESH)


def fresh_runs(network: str) -> list[dict]:
    """Its results on the fresh seeds that are there."""
    if not (one := confirming(network, 0)):
        return []
    lines = tables.read_results(one.options, "base" if one.arm == "base" else one.experiment)
    usual = tables.usual_origin(lines)
    newest = {x["seed"]: x for x in lines if x["arm"] == one.arm
              and x["seed"] in seeds_of(network) and tables.origin(x) == usual}  # fmt: skip
    return [newest[seed] for seed in sorted(newest)]


def clock() -> Run:
    """The dense network for the seconds that the base takes for 2,400 steps."""
    return Run("experts", "dense longer", 0, "experiments/results/2400", 2400)


def planned() -> Iterator[Run | None]:
    """In order; None for those whose learning rate is not known yet. All arms with one seed come
    before the next seed, so that whatever is there is pairs."""
    yield from choosing()
    yield clock()
    networks = ["MLA", "loss 0.01", *(x for x in CHOSEN if x != "MLA")]
    for seed in range(8, 24):
        for network in networks:
            if seed in seeds_of(network):
                yield confirming(network, seed)
    for seed in seeds_of("tiles"):
        yield confirming("tiles", seed)


# ---- The command ---------------------------------------------------------------------------------


@dataclass
class PlanOptions:
    list: bool = False  # no training: which runs are there


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[bool]:
    """Whether this process alone is at the run that trains in this folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.plan", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def train_next() -> bool:
    """Trains the first run that is missing and free; false if there was none."""
    for one in filter(None, planned()):
        todo, folder = one.missing()
        if todo:
            with taken(folder) as mine:
                if mine and one.missing()[0]:  # another process may have ended it just now
                    one.train()
                    return True
    return False


def listing() -> str:
    runs = [*planned()]
    rates = {network: best_rate(network) for network in CHOSEN}
    lines = [f"{network}: {rate or 'not known yet'}" for network, rate in rates.items()]
    lines = ["learning rate, times the base's", *(f"  {x}" for x in lines), "runs"]
    arms = list(dict.fromkeys((x.results, x.experiment, x.arm, x.steps) for x in runs if x))
    for results, experiment, arm, steps in arms:
        mine = [x for x in runs if x and (x.results, x.experiment, x.arm, x.steps)
                == (results, experiment, arm, steps)]  # fmt: skip
        there = [str(x.seed) for x in mine if not x.missing()[0]]
        lines += [f"  {Path(results).name}/{experiment}: {arm}, {steps} steps: {len(there)} of "
                  f"{len(mine)}, seeds {','.join(there) or 'none'}"]  # fmt: skip
    there = sum(not x.missing()[0] for x in runs if x)
    return "\n".join([*lines, f"{there} of {len(runs)} runs are there"])


def main(argv: list[str]):
    _, values = parse_args(__doc__, argv, PlanOptions)
    if PlanOptions(**values).list:
        print(listing())
        return
    while any(one is None or one.missing()[0] for one in planned()):
        if not train_next():
            info("every run that can be trained now has a process at it: waiting")
            time.sleep(20)
    print(listing())


if __name__ == "__main__":
    run_command(main)
