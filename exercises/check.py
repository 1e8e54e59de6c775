"""Exercises that check themselves: write a function of the network, and see what it does in it.

    python exercises/check.py                   the exercises, and which of them are done
    python exercises/check.py mla               checks exercises/mla.py
    python exercises/check.py mla --hint        an idea; --hint=2: the shapes; --hint=3: nearly all
    python exercises/check.py mla --solution    the lines of the network that answer

An exercise begins with questions: predict or count before you write. Then your function is compared
with a plain answer on made-up inputs. If it gives what a known mistake gives, the mistake is named;
if it is right, its reason is printed. Finally it runs in the trained network, beside the network's
own function. (In the exercise `training` it trains a small network.)
In a notebook: from exercises.check import check; check("gate", globals())
"""

import argparse
import inspect
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from exercises import solutions
from exercises.known import EXERCISES, Case, Question
from exercises.network import effect
from support.settings import Refusal, run_command

ROUNDED = 1e-5  # what rounding in float32 may change, in parts of a case's largest number
UNWRITTEN = "not written yet"


# ---- One call ------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a function gives in a case, or the problem that leaves nothing to compare."""

    problem: str = ""
    returned: tuple = ()
    numbers: dict[str, Tensor] = field(default_factory=dict)  # what is compared, by name
    flops: int = 0  # of products of matrices, where a case limits them


def run(case: Case, function: Callable, right: Outcome | None = None) -> Outcome:
    """Calls the function. Without `right`, the function is the answer itself."""
    try:
        with FlopCounterMode(display=False) if case.too_many else nullcontext() as counter:
            returned = function(*case.args)
        returned = case.changes(returned)
        if not (isinstance(returned, tuple) and len(case.results) > 1):
            returned = (returned,)
        if problem := unlike(returned, right, case) if right else "":
            return Outcome(problem)
        values = case.compared(*returned)
        numbers = dict(zip(case.results, values, strict=True)) | gradients(values, case)
    except NotImplementedError:
        return Outcome(UNWRITTEN)
    except Exception as error:  # of the reader's code: any
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        return Outcome(f"{where}{type(error).__name__}: {textwrap.shorten(str(error), 90)}")
    flops = counter.get_total_flops() if counter else 0
    return Outcome("", returned, {name: x.detach() for name, x in numbers.items()}, flops)


def unlike(returned: tuple, right: Outcome, case: Case) -> str:
    """The message about a wrong type or shape; "" if numbers can be compared."""
    if len(returned) != len(case.results) or not all(isinstance(x, Tensor) for x in returned):
        kinds = " and ".join(type(x).__name__ for x in returned)
        forgotten = ": is there a `return`?" if returned == (None,) else ""
        return f"it returns {kinds}, expected tensors: {' and '.join(case.results)}{forgotten}"
    for name, x, y in zip(case.results, returned, right.returned, strict=True):
        if x.shape != y.shape:
            return f"{name} is {tuple(x.shape)}, expected {tuple(y.shape)}"
        computed = y.dtype == torch.float64 and x.dtype == torch.float32  # is exact enough
        if x.dtype != y.dtype and not computed:
            return f"{name} is {x.dtype}, expected {y.dtype}".replace("torch.", "")
    return ""


def gradients(values: tuple[Tensor, ...], case: Case) -> dict[str, Tensor]:
    """The gradients of a weighted sum of the values; 0 where there is none."""
    names = inspect.signature(getattr(solutions, case.function)).parameters
    leaves = dict(zip(names, case.args, strict=True))
    for module in [x for x in case.args if isinstance(x, nn.Module)]:
        leaves |= dict(module.named_parameters())
    leaves = {k: x for k, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    total = sum((x * torch.linspace(1, 2, x.numel()).view_as(x)).sum() for x in values)
    found = [None] * len(leaves)
    if leaves and total.requires_grad:
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {
        f"the gradient by {name}": torch.zeros_like(x) if g is None else g for (name, x), g in pairs
    }


# ---- Right, wrong, and wrong in a known way ------------------------------------------------------


def rounding(right: Outcome) -> float:
    """How far rounding may move a number, relative to the largest one of the case: a gradient that
    is 0 may be the sum of numbers of that size, and has their rounding errors."""
    numbers = [x for x in right.numbers.values() if x.is_floating_point()]
    return ROUNDED * max((x.abs().max().item() for x in numbers), default=0.0)


def difference(mine: Outcome, expected: Outcome, tolerance: float) -> str:
    """The first difference between two outcomes, in words; "" if there is none."""
    if mine.problem or expected.problem:
        return "" if mine.problem == expected.problem else mine.problem or "it runs"
    for name, y in expected.numbers.items():
        x, limit = mine.numbers[name].double(), tolerance if y.is_floating_point() else 0
        y = y.double()
        bad = ~(((x - y).abs() <= limit) | (x == y) | (x.isnan() & y.isnan()))
        if bad.any():
            found = f"{name}: {bad.sum()} of {bad.numel()} numbers differ"
            if (x.isnan() & ~y.isnan()).any():
                return f"{found}, with NaN"
            if not limit:  # ids and counts, of which the size of a difference says nothing
                return found
            if not bad.ndim:
                return f"{name} is {x:.4g}, expected {y:.4g}"
            detached = name.startswith("the gradient") and not x.any()
            none = ": yours are 0. Is something detached?" if detached else ""
            largest = f"the largest right number is {y.abs().max():.3g}"
            return f"{found}, by up to {(x - y).abs().max():.3g} ({largest}){none}"
    return ""


def with_mistake(name: str, old: str, new: str) -> SimpleNamespace:
    """The right functions of an exercise, with this text replaced in one of them."""
    functions = [getattr(solutions, function) for function in EXERCISES[name].functions]
    text = "\n\n".join(map(inspect.getsource, functions))
    if text.count(old) != 1:
        raise ValueError(f"hints.txt, {name}: {old!r} stands {text.count(old)} times in the answer")
    namespace = dict(vars(solutions))
    exec(text.replace(old, new), namespace)
    return SimpleNamespace(
        **{function: namespace[function] for function in EXERCISES[name].functions}
    )


@cache
def right_outcomes(name: str) -> list[Outcome]:
    return [run(case, getattr(solutions, case.function)) for case in EXERCISES[name].cases()]


def outcomes(name: str, functions: SimpleNamespace) -> list[Outcome]:
    pairs = zip(EXERCISES[name].cases(), right_outcomes(name), strict=True)
    return [run(case, getattr(functions, case.function), right) for case, right in pairs]


@cache
def mistaken_outcomes(name: str) -> list[tuple[str, list[Outcome]]]:
    """Each known mistake, and what it gives in each case."""
    mistakes = EXERCISES[name].mistakes
    return [(words, outcomes(name, with_mistake(name, *change))) for *change, words in mistakes]


def judge(name: str, functions: SimpleNamespace) -> tuple[dict[str, str], list[str]]:
    """What is wrong in each case ("" if nothing); and the known mistakes that give the same, in all
    cases or at least in most of the wrong ones."""
    mine, right, wrong = outcomes(name, functions), right_outcomes(name), {}
    for case, x, y in zip(EXERCISES[name].cases(), mine, right, strict=True):
        many = case.too_many if x.flops > 3 * y.flops else ""
        wrong[case.name] = difference(x, y, rounding(y)) or many
    if UNWRITTEN in wrong.values():
        return wrong, []
    total, found = sum(map(bool, wrong.values())), []
    for sentence, theirs in mistaken_outcomes(name) if total else ():
        each = zip(wrong.values(), mine, right, theirs, strict=True)
        others = [words for words, x, y, z in each if difference(x, z, rounding(y))]
        if all(others) and 2 * len(others) < total:
            found.append((total - len(others), sentence))
    most = max(found, default=(0, ""))[0]
    where = "" if most == total else f" (in {most} of the {total} wrong cases)"
    return wrong, [sentence + where for same, sentence in found if same == most]


# ---- The command ---------------------------------------------------------------------------------


def the_readers(name: str) -> dict[str, object]:
    """The names that exercises/NAME.py defines, and those in the files of its parts."""
    names = {}
    for part in (*EXERCISES[name].parts, name):
        names |= runpy.run_path(str(Path(__file__).parent / f"{part}.py"))
    return names


def functions_of(name: str, names: dict) -> SimpleNamespace:
    for function in EXERCISES[name].functions:
        if not callable(names.get(function)):
            raise Refusal(f"exercises/{name}.py has no function {function}: write def {function}(")
    return SimpleNamespace(**{function: names[function] for function in EXERCISES[name].functions})


def formatted(answer: float | str) -> str:
    if isinstance(answer, float) and not answer.is_integer():
        return f"{answer:,.7g}"
    return repr(answer) if isinstance(answer, str) else f"{answer:,.0f}"


def wrong_answer(question: Question, answer: object) -> str:
    """What is wrong with the answer to a question; "" if nothing."""

    def near(x: float | str) -> bool:
        if isinstance(x, str) or isinstance(answer, str):
            return x == str(answer).strip().lower()
        return abs(answer - x) <= question.within * abs(x)

    if answer is None:
        return "not answered yet"
    if not isinstance(answer, int | float | str):
        return f"it is of type {type(answer).__name__}, expected a number or a word"
    if near(question.answer):
        return ""
    slip = [f"that is {words}" for x, words in question.slips.items() if near(x)]
    return f"not {formatted(answer)}: {slip[0] if slip else question.hint or question.why}"


def verdict(name: str, names: dict) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What is wrong with each answer, what in each case, and the known mistakes."""
    answers = {x.name: wrong_answer(x, names.get(x.name)) for x in EXERCISES[name].questions}
    return answers, *judge(name, functions_of(name, names))


def show(line: str) -> None:
    print(textwrap.fill(line, 100, subsequent_indent="     ", break_on_hyphens=False))


def check(name: str, names: dict | None = None) -> bool:
    """Checks exercises/NAME.py, where `names` (a notebook's globals()) does not define the same:
    prints, and returns whether all is right."""
    exercise, names = EXERCISES[name], the_readers(name) | (names or {})
    answers, cases, mistakes = verdict(name, names)
    problems, failed = answers | cases, any(cases.values())
    reasons = {x.name: f" = {formatted(names[x.name])}: {x.why}" for x in exercise.questions
               if not answers[x.name]}  # fmt: skip
    print(f"{name}: {exercise.title}")
    for what, problem in problems.items():
        show(f"  -- {what}: {problem}" if problem else f"  ok {what}{reasons.get(what, '')}")
    for sentence in mistakes:
        show(f"  It behaves as if {sentence}.")
    if sum(map(bool, cases.values())) > 1 and not mistakes and UNWRITTEN not in cases.values():
        print(
            "  No known mistake explains all of this: mend the first wrong case, then check again."
        )
    if not failed:
        print(textwrap.indent(exercise.why, "  "))
    if UNWRITTEN in problems.values():
        blanks = " and ".join(exercise.functions)
        print(f"Answer the questions, then write {blanks} in exercises/{name}.py; --hint helps.")
        return False
    functions, missing = functions_of(name, names), []
    for part in exercise.parts:
        theirs = functions_of(part, names)
        if any(judge(part, theirs)[0].values()):
            missing.append(part)
            print(f"Exercise {part} is not done yet: the network's own function takes its place.")
        else:
            vars(functions).update(vars(theirs))
    try:
        shown = effect(name, functions, failed)
    except Exception as error:
        if not failed:
            raise
        shown = f"it stops with {type(error).__name__}: {error}"
    where = "In training" if name == "training" else "In the trained network"
    print(f"{where}:\n{textwrap.indent(shown, '    ')}")
    return not any(problems.values()) and not missing


def overview() -> None:
    for number, (name, exercise) in enumerate(EXERCISES.items(), 1):
        try:
            answers, cases, _ = verdict(name, the_readers(name))
            found = answers | cases
            wrong = [f"{what}: {problem}" for what, problem in found.items() if problem]
            state = UNWRITTEN if UNWRITTEN in found.values() else (wrong or ["done"])[0]
        except Exception as error:  # of the reader's file: any
            state = f"{type(error).__name__}: {error}"
        print(f"{number:2} {name:9} {exercise.title:46} {textwrap.shorten(state, 100)}")
    print("\nexercises/NAME.py has the text, and room for your answer;")
    print("python exercises/check.py NAME checks it.")


def solution(name: str) -> None:
    """The lines of the network that answer, with their numbers."""
    for owner, function in EXERCISES[name].functions.values():
        lines, first = inspect.getsourcelines(inspect.unwrap(getattr(owner, function)))
        print(f"{Path(inspect.getsourcefile(owner)).name}:{first}")
        print("".join(f"{i:5}  {line}" for i, line in enumerate(lines, first)))


def main(argv: list[str]) -> bool:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("name", nargs="?", choices=[*EXERCISES], metavar="NAME")
    parser.add_argument("--hint", type=int, nargs="?", const=1, choices=(1, 2, 3))
    parser.add_argument("--solution", action="store_true")
    args = parser.parse_args(argv)
    if (args.hint or args.solution) and not args.name:
        parser.error("name an exercise, as in: python exercises/check.py mla --hint")
    torch.set_num_threads(1)  # is as fast for so little, and waits for no other program
    if not args.name:
        overview()
    elif args.hint:
        print(EXERCISES[args.name].hints[args.hint - 1])
        if args.hint < 3:
            print(f"\nMore: python exercises/check.py {args.name} --hint={args.hint + 1}")
    elif args.solution:
        solution(args.name)
    else:
        return check(args.name)
    return True


if __name__ == "__main__":
    run_command(lambda argv: main(argv) or sys.exit(1))
