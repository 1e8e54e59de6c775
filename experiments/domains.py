"""Why does a sequence-wise balance loss cost? python experiments/domains.py [TEXTS] [--runs=1]

docs/notes/PLAN-2.md says what is asked, of which runs, and by which tests; it was committed before
any of them. With TEXTS, the folder that prose.py has made, the three corpora are made. Without it
the runs that are missing are trained, one after the other, on one core. Results are written as soon
as a run ends, so the command can be stopped at any time and started again on another day. Figures
are shown when all runs are there, and none before.
"""

from dataclasses import dataclass
from pathlib import Path

import balance
import numpy as np
import report
import run

from prepare_data import read_paths, read_stdlib, split_documents
from support.files import new_folder
from support.settings import Refusal, info, parse_args, run_command
from support.tokenizer import train_tokenizer, write_tokenizer
from support.tokens import UINT16, encode_all, header

CORPORA = {  # and the ways in which experts are balanced on each
    "code": ("bias", "sequence"),
    "apart": ("bias", "sequence", "batch"),
    "mixed": ("bias", "sequence"),
}
DATA, RESULTS = Path("data/domains"), "experiments/results/domains"
T, STEPS = 256, 450  # tokens of a window, steps of 8 windows
WINDOWS = 8 * STEPS  # of a training text
SEEDS, CHOOSING = range(24, 40), 100
WEIGHTS = {"sequence": (0.005, 0.01, 0.02), "batch": (0.01, 0.02, 0.04)}
MARGIN = 0.0026  # bits per byte

# ---- The corpora ---------------------------------------------------------------------------------


def arranged(corpus: str, code: np.ndarray, prose: np.ndarray, most: int) -> np.ndarray:
    """At most so many windows side by side, and one token more, which is only a target."""
    n = min(len(code) // T, len(prose) // T, most // 2)
    if corpus == "code":
        return code[: most * T + 1]
    both = np.stack([x[: n * T].reshape(n, T) for x in (code, prose)], 1)  # (n, 2, T)
    if corpus == "mixed":  # the first halves of both, then the second ones, prose first
        halves = both.reshape(n, 2, 2, T // 2)
        both = np.stack((halves[:, 0, 0], halves[:, 1, 0], halves[:, 1, 1], halves[:, 0, 1]), 1)
    return np.append(both.reshape(-1), both.flat[0])


def make_corpora(texts: str):
    code = split_documents(read_stdlib(), 0.025, 0.025)
    prose = split_documents(read_paths(texts, "text"), 0.0125, 0.0125)
    size, alike = sum(map(len, code[0])), []
    for text in prose[0]:
        alike += [text] if sum(map(len, alike)) < size else []
    tokenizer = train_tokenizer([*code[0], *alike], run.Options().base()["vocab_size"])
    ids = [[np.array([i for x in encode_all(part, tokenizer, "tokens") for i in x], "<u2")
            for part in both] for both in zip(code, prose, strict=True)]  # fmt: skip
    DATA.mkdir(parents=True, exist_ok=True)
    for corpus in CORPORA:
        with new_folder(DATA / corpus, False) as folder:
            write_tokenizer(tokenizer, folder)
            for split, both in zip(("train", "val", "test"), ids, strict=True):
                tokens = arranged(corpus, *both, WINDOWS)
                content = header(UINT16, len(tokens)) + tokens.tobytes()
                (folder / f"{split}.bin").write_bytes(content)
                info(f"{corpus}, {split}: {len(tokens):,} tokens")


# ---- The runs ------------------------------------------------------------------------------------


def arms(base: dict) -> dict[str, run.Arm]:
    network = {"num_nextn_predict_layers": 0, "lr": 0.67 * base["lr"]}
    found = {"bias": run.Arm(network | {"alpha": 0.0})}
    for kind, weights in WEIGHTS.items():
        stand_in = {"model.balance_loss": balance.batch_wise} if kind == "batch" else {}
        found |= {f"{kind} {x}": run.Arm(network | {"gamma": 0.0, "alpha": x}, stand_in)
                  for x in weights}  # fmt: skip
    return found


def options_of(corpus: str, quick: bool) -> run.Options:
    length = {"steps": 6, "quick": True} if quick else {"steps": STEPS}
    home = "out/quick/domains" if quick else RESULTS
    return run.Options(data=str(DATA / corpus), results=home, **length)


def results_of(corpus: str, quick: bool) -> dict[tuple[str, int], dict]:
    lines = report.read_results(options_of(corpus, quick).results, corpus)
    return {(x["arm"], x["seed"]): x for x in lines}


def chosen(corpus: str, kind: str, quick: bool) -> str | None:
    """The arm of this kind that is about as even as the bias; none while a run is missing."""
    even = {arm: x["max_vio_batch"] for (arm, seed), x in results_of(corpus, quick).items()
            if seed == CHOOSING}  # fmt: skip
    names = [f"{kind} {x}" for x in WEIGHTS[kind]] if kind in WEIGHTS else [kind]
    if not {"bias", *names} <= even.keys():
        return None
    return min(names, key=lambda arm: abs(even[arm] - even["bias"]))


def planned(quick: bool) -> list[tuple[str, str, int]]:
    """Corpus, arm and seed of every run, in order; the arms of later ones follow from earlier."""
    first = [(corpus, arm, CHOOSING) for corpus, kinds in CORPORA.items()
             for arm in arms(run.Options().base()) if arm.split()[0] in kinds]  # fmt: skip
    later = [(corpus, chosen(corpus, kind, quick)) for corpus, kinds in CORPORA.items()
             for kind in kinds]  # fmt: skip
    seeds = SEEDS[:2] if quick else SEEDS
    known = all(arm for _, arm in later)
    return first + [(*x, seed) for seed in seeds for x in later if known]


def missing(quick: bool) -> list[tuple[str, str, int]]:
    there = {(corpus, *key) for corpus in CORPORA for key in results_of(corpus, quick)}
    return [x for x in planned(quick) if x not in there]


# ---- The figures ---------------------------------------------------------------------------------


def differences(key: str, quick: bool) -> dict[tuple[str, str], list[float]]:
    """By corpus and kind of loss: its loss less that of the bias, of every seed."""
    found = {}
    for corpus, kinds in CORPORA.items():
        runs, seeds = results_of(corpus, quick), SEEDS[:2] if quick else SEEDS
        for kind in kinds[1:]:
            arm = chosen(corpus, kind, quick)
            found[corpus, kind] = [runs[arm, s][key] - runs["bias", s][key] for s in seeds]
    return found


def asked(key: str, quick: bool) -> dict[str, list[float]]:
    """The plan's three questions, with a difference for every seed."""
    d, found = differences(key, quick), {}
    for one, other in ("apart", "code"), ("mixed", "apart"):
        pairs = zip(d[one, "sequence"], d[other, "sequence"], strict=True)
        found[f"the gap on *{one}* less that on *{other}*"] = [a - b for a, b in pairs]
    return found | {"*batch* less *bias* on *apart*": d["apart", "batch"]}


def p_value(name: str, values: list[float]) -> float:
    """Of a difference, or of an equality within the margin."""
    (mean, half), n = report.own_interval(values), len(values)
    error = half / report.quantile(n - 1), n - 1
    x = report.Difference(mean, half, half, n, error)
    return x.p_equal(MARGIN) if "batch" in name else x.p


def tables(quick: bool) -> str:
    """Markdown: every arm, the gaps, and the tests; bits per byte, test text before validation."""

    def told(values: list[float]) -> str:
        return "{:+.4f} ± {:.4f}".format(*report.own_interval(values))

    questions = [asked(key, quick) for key in report.TEXTS]
    p = {name: p_value(name, values) for name, values in questions[0].items()}
    words, corrected = report.p_in_words, report.holm(p)
    tests = [[name, told(values), words(p[name]), words(corrected[name]), told(questions[1][name])]
             for name, values in questions[0].items()]  # fmt: skip
    gaps, arms_of = [differences(key, quick) for key in report.TEXTS], []
    for corpus, kinds in CORPORA.items():
        for kind in kinds:
            arm = chosen(corpus, kind, quick)
            runs = [x for (name, seed), x in results_of(corpus, quick).items()
                    if name == arm and seed != CHOOSING]  # fmt: skip
            keys = "max_vio_batch", "max_vio_global", "test_bpb"
            means = [f"{np.mean([x[key] for x in runs]):.3f}" for key in keys]
            less = [told(gap[corpus, kind]) if kind != "bias" else "" for gap in gaps]
            arms_of.append([corpus, arm, str(len(runs)), *means, *less])
    heads = ["corpus", "arm", "seeds", "MaxVio, batch", "MaxVio, validation", "bits/byte"]
    heads += ["less that of the bias"]
    heads_of_tests = ["asked", "test text", "p", "of three tests (Holm)", "validation text"]
    arms_told = report.markdown([*heads, "the same, validation text"], arms_of)
    return f"{arms_told}\n\n{report.markdown(heads_of_tests, tests)}"


def tell(quick: bool):
    for corpus in CORPORA:
        runs = results_of(corpus, quick).values()
        if len({(x["steps"], x["corpus"], x["commit"]) for x in runs}) > 1:
            several = f"{options_of(corpus, quick).results}/{corpus}.json has results of several"
            raise Refusal(f"{several} lengths, texts or commits: keep those of one.")
    docs = Path("out/quick" if quick else "docs")
    text = tables(quick)
    print(text)
    report.write_part(docs / "RESULTS.md", "domains", f"{text}\n\n![domains](figures/domains.svg)")
    path = docs / "figures/domains.svg"
    report.save_figure(path, (6, 2.2), lambda figure: draw(figure, quick))


def draw(figure, quick: bool):
    """The differences to the bias with their intervals: full dots for the test text, hollow ones
    for the validation text."""
    ax = figure.subplots()
    for key, fill, shift in zip(report.TEXTS, ("full", "none"), (0.1, -0.1), strict=True):
        rows = differences(key, quick)
        for y, values in enumerate(rows.values()):
            mean, half = report.own_interval(values)
            ax.errorbar(mean, y + shift, xerr=half, fmt="o", fillstyle=fill, color="#2f81f7")
    ax.axvline(0, color=report.INK, linewidth=0.8)
    names = [f"{kind}, {corpus}" for corpus, kind in rows]
    ax.set(xlabel="loss less that of the bias, bits/byte", yticks=range(len(rows)))
    ax.set(yticklabels=names)
    ax.invert_yaxis()


@dataclass
class DomainsOptions:
    runs: int = 0  # train so many of those that are missing (0: all)
    part: int = 0  # of two cores one trains --of=2 --part=0, the other --of=2 --part=1
    of: int = 1
    quick: bool = False  # a few steps, two seeds, into out/quick: does all work?


def main(argv: list[str]):
    texts, values = parse_args(__doc__, argv, DomainsOptions, positional="texts")
    options = DomainsOptions(**values)
    if texts:
        return make_corpora(texts)
    done, quick = 0, options.quick
    if missing(quick) and not DATA.exists():
        raise Refusal(f"there is no {DATA}: make it with python experiments/domains.py TEXTS.")
    while mine := {*planned(quick)[options.part :: options.of]} & {*missing(quick)}:
        if options.runs and done == options.runs:
            break
        corpus, arm, seed = min(mine, key=planned(quick).index)
        given = options_of(corpus, quick)
        arm_of = arms(given.base())
        run.run_arm(run.Experiment(corpus, arms, {}), arm, arm_of[arm], seed, given)
        done += 1
    if todo := missing(quick):
        info(f"{len(todo)} runs are missing, or more: no result is shown before the last one")
    else:
        tell(quick)


if __name__ == "__main__":
    run_command(main)
