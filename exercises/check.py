"""Exercises that check themselves: write a function of the network, and see what it does in it.

    python exercises/check.py                   the exercises, and which of them are done
    python exercises/check.py gate              checks exercises/gate.py
    python exercises/check.py gate --hint       how it can be written
    python exercises/check.py gate --solution   the lines that answer

A function is compared with that of model.py as it is now, in float64 on made-up inputs. Where it
gives what a known mistake gives, the mistake is named. Then it takes its place in the trained
network.
In a notebook: from exercises.check import check; check("gate", forward=my_function)
"""

import argparse
import copy
import inspect
import math
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import fp8
import sample
from exercises.known import EXERCISES, Exercise
from huggingface import load_model
from support.settings import Refusal, run_command

Outcome = tuple[list[Tensor], list[Tensor]] | str  # values and gradients; or why there are none
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights/small"
TEXT = WEIGHTS / "text.txt"


# ---- Comparing functions -------------------------------------------------------------------------


def place(exercise: Exercise, answer: str) -> tuple[object, str]:
    """The module or class where an answer stands, and its name there."""
    *owner, name = answer.split(".")
    return getattr(exercise.module, owner[0]) if owner else exercise.module, name


def formula(exercise: Exercise, answer: str) -> Callable:
    """The function itself, not its fast twin and not its decorator."""
    return inspect.unwrap(getattr(*place(exercise, answer)))


def answers(exercise: Exercise, names: dict | None = None) -> SimpleNamespace:
    """The right functions under the names that the reader's have; from `names`, if given."""
    found = {}
    for mine, theirs in exercise.answers.items():
        function = names[theirs.split(".")[-1]] if names else formula(exercise, theirs)
        found[mine] = partial(loss_of_mtp, function) if mine == "mtp_loss" else function
    return SimpleNamespace(**found)


def loss_of_mtp(forward: Callable, model, tokens: Tensor, targets: Tensor) -> Tensor:
    """model.py computes the MTP loss inside forward, beside others."""
    return forward(model, tokens, targets)["mtp_loss"]


def with_mistake(exercise: Exercise, old: str, new: str) -> SimpleNamespace | None:
    """The right functions with this text replaced; None where model.py has other text now."""
    text = ""
    for name in (*exercise.helpers, *exercise.answers.values()):
        source = textwrap.dedent(inspect.getsource(formula(exercise, name)))
        text += source[source.index("def ") :] + "\n\n"  # without decorators
    if text.count(old) != 1:
        return None
    namespace = dict(vars(exercise.module))
    exec(text.replace(old, new), namespace)
    return answers(exercise, namespace)


def run_case(call: Callable, leaves: tuple) -> Outcome:
    """Values, and the gradients of a weighted sum of them by the leaves."""
    try:
        result = call()
        values = [result] if isinstance(result, Tensor) else list(result)
        gradients, graphs = [], [x for x in values if x.requires_grad]
        if leaves and not graphs:
            return "has no gradient"
        if leaves:
            total = sum((x * torch.linspace(1, 2, x.numel()).view_as(x)).sum() for x in graphs)
            found = torch.autograd.grad(total, leaves, allow_unused=True)
            pairs = zip(found, leaves, strict=True)
            gradients = [torch.zeros_like(x) if g is None else g for g, x in pairs]
        return [x.detach() for x in values], gradients
    except NotImplementedError:
        return "not written yet"
    except Exception as error:  # of the reader's code: any
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f"line {x.lineno}: " for x in frames if Path(x.filename).stem in EXERCISES]
        return f"{''.join(lines[-1:])}{type(error).__name__}: {textwrap.shorten(str(error), 90)}"


def outcomes(exercise: Exercise, functions: SimpleNamespace) -> dict[str, Outcome]:
    return {name: run_case(call, leaves) for name, call, leaves in exercise.cases(functions)}


def difference(mine: Outcome, right: Outcome) -> str:
    """What is wrong with an outcome, in words; "" if nothing."""
    if isinstance(mine, str) or isinstance(right, str):
        return "" if mine == right else mine if isinstance(mine, str) else "it gives a result"
    for kind, xs, ys in zip(("value", "gradient"), mine, right, strict=True):
        if len(xs) != len(ys):
            return f"{len(xs)} results, expected {len(ys)}"
        for i, (x, y) in enumerate(zip(xs, ys, strict=True), 1):
            which = f"{kind} {i} of {len(ys)}" if len(ys) > 1 else f"the {kind}"
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                told, due = (f"{z.dtype} {tuple(z.shape)}".replace("torch.", "") for z in (x, y))
                return f"{which} is {told}, expected {due}"
            error, largest = (x - y).double().abs(), max([0, *y.double().abs().flatten().tolist()])
            if not torch.equal(x.isnan(), y.isnan()) or (error > 1e-6 * largest).any():
                worst = "has NaN" if x.isnan().any() else f"is off by up to {error.max():.2g}"
                return f"{which} {worst}; the largest number is {largest:.2g}"
    return ""


@cache
def known(name: str) -> tuple[dict[str, Outcome], list[tuple[str, dict[str, Outcome]]]]:
    """What the right functions give, and what each known mistake gives."""
    exercise, mistaken = EXERCISES[name], []
    for old, new, sentence in exercise.mistakes:
        if functions := with_mistake(exercise, old, new):
            mistaken.append((sentence, outcomes(exercise, functions)))
    return outcomes(exercise, answers(exercise)), mistaken


def alike(mine: Outcome, theirs: Outcome, right: Outcome) -> bool:
    """Whether a mistake gives this. Where its values are wrong, gradients do not matter."""
    if isinstance(mine, str) or isinstance(theirs, str):
        return mine == theirs
    a, b, c = ((values, []) for values, _ in (mine, theirs, right))
    return not (difference(a, b) if difference(b, c) else difference(mine, theirs))


def judge(name: str, functions: SimpleNamespace) -> tuple[dict[str, str], list[str]]:
    """What is wrong with each case ("" if nothing), and which known mistakes give the same results
    in most of the wrong cases."""
    mine, (right, mistaken) = outcomes(EXERCISES[name], functions), known(name)
    wrong = {case: difference(mine[case], right[case]) for case in right}
    cases, found = [case for case in right if wrong[case]], []
    for sentence, theirs in mistaken:
        same = sum(alike(mine[case], theirs[case], right[case]) for case in cases)
        if 2 * same > len(cases):
            found.append((same, sentence))
    most = max(found, default=(0, ""))[0]
    where = "" if most == len(cases) else f", in {most} of {len(cases)} cases"
    return wrong, [sentence + where for same, sentence in found if same == most]


# ---- In the trained network ----------------------------------------------------------------------


@cache
def trained():
    """The trained network in float32, its tokenizer, and a text in windows of 256 tokens: of each
    the tokens (1, T) and the next tokens (1, T)."""
    model, tokenizer, _ = load_model(WEIGHTS, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(TEXT.read_text(encoding="utf-8"))])
    pieces = [ids[:, i : i + 257] for i in range(0, ids.shape[1] - 1, 256)]
    return model, tokenizer, [(piece[:, :-1], piece[:, 1:]) for piece in pieces]


@contextmanager
def installed(exercise: Exercise, functions: SimpleNamespace):
    """The functions in the place of the network's own."""
    before = []
    for mine, theirs in exercise.answers.items():
        if mine == "mtp_loss":
            continue  # which the network does not call
        where, name = place(exercise, theirs)
        before.append((where, name, vars(where)[name]))
        setattr(where, name, getattr(functions, mine))
    try:
        yield
    finally:
        for where, name, function in before:
            setattr(where, name, function)


def mean(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean over the text's tokens of a loss of (tokens, next tokens)."""
    windows = trained()[2]
    total = sum(loss(x, y).item() * x.shape[1] for x, y in windows)
    return total / sum(x.shape[1] for x, _ in windows)


def bits_per_byte(nats: float) -> float:
    """From nats per token of the text."""
    tokens = sum(x.shape[1] for x, _ in trained()[2])
    return nats * tokens / math.log(2) / TEXT.stat().st_size


def greedy(next_logits: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The likeliest text. next_logits: all ids (1, T), the new ones (1, t) -> (1, vocabulary)."""
    tokenizer = trained()[1]
    ids = new = torch.tensor([tokenizer.encode("def main(")])
    for _ in range(24):
        new = next_logits(ids, new).argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), 1)
    return tokenizer.decode(ids[0].tolist())


def reading(functions) -> tuple[float, str, str]:
    model = trained()[0]
    nats = mean(lambda x, y: model(x, y)["loss"])
    text = greedy(lambda ids, new: model(ids)[:, -1])
    return bits_per_byte(nats), f"bits/byte of {TEXT.name}", text


def decoding(functions) -> tuple[float, str, str]:
    """Texts are read through the cache: 64 tokens at once, then 32 at a time, which looks at it."""
    model = trained()[0]

    def empty(size):
        return sample.Cache(model.config, model.layers, 1, size, model.norm.weight)

    def loss(x, y):
        cache, pieces = empty(256), (x[:, :64], *x[:, 64:].split(32, 1))
        hidden = torch.cat([model.trunk(piece, cache) for piece in pieces if piece.numel()], 1)
        return torch.nn.functional.cross_entropy(model.logits(hidden)[0], y[0])

    cache, nats = empty(64), mean(loss)
    text = greedy(lambda ids, new: model.logits(model.trunk(new, cache))[:, -1])
    return bits_per_byte(nats), f"bits/byte of {TEXT.name}, read through the cache", text


def balancing(functions) -> tuple[float, str, str]:
    """The biases of the first layer with experts are learnt anew, from 0, on one text."""
    net, inputs, windows = copy.deepcopy(trained()[0]), [], trained()[2]
    gate = net.gates()[0]
    hook = gate.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    for x, _ in windows:
        net.trunk(x)
    hook.remove()
    u, told = torch.cat(inputs)[None], []
    gate.e_score_correction_bias.zero_()
    for _ in range(200):
        counts = torch.bincount(gate(u)[1].flatten(), minlength=net.config.n_routed_experts)
        told.append((counts.max() / counts.float().mean() - 1).item())
        net.expert_counts.zero_()
        net.expert_counts[0] = counts
        functions.update_bias(net, 0.003)
    first, last = 1 + told[0], 1 + told[-1]
    text = f"the busiest expert had {first:.2f} times its share, then {last:.2f} times"
    return told[-1], "MaxVio after 200 updates", text


def balance(functions) -> tuple[float, str, str]:
    model = trained()[0]
    return mean(lambda x, y: model(x, y)["balance_loss"]), "balance loss (1 is even)", ""


def looking_ahead(functions) -> tuple[float, str, str]:
    loss = partial(functions.mtp_loss, trained()[0])
    return mean(loss), "nats, the loss of the MTP module", ""


def drafting(functions) -> tuple[float, str, str]:
    (model, tokenizer, _), stats = trained(), sample.Stats()
    ids = torch.tensor([tokenizer.encode("def main(")])
    options = {"lookup": False, "generator": torch.Generator().manual_seed(1), "stats": stats}
    text = tokenizer.decode(sample.generate(model, ids, 80, **options)[0].tolist())
    return stats.tokens / stats.rounds, "tokens for each call of the model", text


def rounding(functions) -> tuple[float, str, str]:
    """Every matrix of attention and experts goes through FP8 and back."""
    net = copy.deepcopy(trained()[0])
    for name, weight in net.named_parameters():
        if "_proj" in name and weight.ndim > 1 and "eh_proj" not in name:
            q, s = functions.quantize(weight.data, fp8.BLOCK)
            weight.data = fp8.dequantize(q, s, fp8.BLOCK)
    return bits_per_byte(mean(lambda x, y: net(x, y)["loss"])), "bits/byte with weights in FP8", ""


EFFECTS = {
    "rope": reading, "mla": reading, "absorbed": decoding, "gate": reading, "bias": balancing,
    "balance": balance, "experts": reading, "mtp": looking_ahead, "accept": drafting,
    "tiles": rounding,
}  # fmt: skip


@torch.inference_mode()
def effect(name: str, functions: SimpleNamespace) -> str:
    """What the functions give in the trained network, beside what the right ones give."""
    exercise = EXERCISES[name]
    if not (WEIGHTS / "best.pt").exists():
        return "In the trained network: weights/small/best.pt is not there."
    with installed(exercise, answers(exercise)):
        right, _, _ = EFFECTS[name](answers(exercise))
    try:
        with installed(exercise, functions):
            mine, unit, text = EFFECTS[name](functions)
    except Exception as error:  # of the reader's code: any
        return f"In the trained network it fails: {type(error).__name__}: {error!s:.90}"
    same = f"{mine:.3f}" == f"{right:.3f}"
    due = "as it should be" if same else f"where the right answer gives {right:.3f}"
    told = f"In the trained network: {mine:.3f} {unit}, {due}."
    return told + "\n" + textwrap.indent(text.strip(), "    ") if text else told


# ---- The command ---------------------------------------------------------------------------------


def the_readers(name: str) -> SimpleNamespace:
    """The functions in exercises/NAME.py. Raises Refusal in one sentence."""
    file = ROOT / f"exercises/{name}.py"
    try:
        names = runpy.run_path(str(file))
        return SimpleNamespace(**{key: names[key] for key in EXERCISES[name].answers})
    except KeyError as error:
        raise Refusal(f"{file} has no function {error}: it begins with def {error}(...") from None
    except Exception as error:
        told = textwrap.shorten(f"{type(error).__name__}: {error}", 100)
        raise Refusal(f"{file} cannot be run ({told}): mend it and try again.") from None


def check(name: str, **functions: Callable) -> bool:
    """Checks exercises/NAME.py, or functions given by name: prints, and returns if all is right."""
    mine = the_readers(name)
    vars(mine).update(functions)
    wrong, mistakes = judge(name, mine)
    print(f"{name}: {EXERCISES[name].title}")
    for case, told in wrong.items():
        print(f"  {'ok ' if not told else '-- '} {case}{f': {told}' if told else ''}")
    for sentence in mistakes:
        print(f"  This is what comes out if {sentence}.")
    if "not written yet" in wrong.values():
        names = " and ".join(EXERCISES[name].answers)
        print(f"Write {names} in exercises/{name}.py; --hint says how, --solution where it stands.")
    else:
        print(effect(name, mine))
    return not any(wrong.values())


def overview() -> None:
    for name, exercise in EXERCISES.items():
        try:
            wrong = list(judge(name, the_readers(name))[0].values())
            done = f"{sum(map(bool, wrong))} of {len(wrong)} cases differ" if any(wrong) else "done"
            done = "not written yet" if "not written yet" in wrong else done
        except Refusal as error:
            done = str(error)
        print(f"{name:9} {exercise.title:46} {done}")
    print("\npython exercises/check.py NAME checks one; its text and its blank: exercises/NAME.py")


def solution(name: str) -> None:
    """The lines that answer, with their numbers."""
    exercise = EXERCISES[name]
    for theirs in exercise.answers.values():
        lines, first = inspect.getsourcelines(formula(exercise, theirs))
        print(f"{Path(exercise.module.__file__).name}:{first}, {theirs}")
        print("".join(f"{i:5}  {line}" for i, line in enumerate(lines, first)))


def main(argv: list[str]) -> bool:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("name", nargs="?", choices=[*EXERCISES], metavar="NAME")
    parser.add_argument("--hint", action="store_true")
    parser.add_argument("--solution", action="store_true")
    asked = parser.parse_args(argv)
    if (asked.hint or asked.solution) and not asked.name:
        parser.error("name an exercise, as in: python exercises/check.py gate --hint")
    if not asked.name:
        overview()
    elif asked.hint:
        print(EXERCISES[asked.name].hint)
    elif asked.solution:
        solution(asked.name)
    else:
        return check(asked.name)
    return True


if __name__ == "__main__":
    run_command(lambda argv: main(argv) or sys.exit(1))
