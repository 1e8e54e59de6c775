"""Exercises that check themselves: write a function of the network, and see what it does in it.

    python exercises/check.py                   the exercises, and which of them are done
    python exercises/check.py mla               checks exercises/mla.py
    python exercises/check.py mla --hint        an idea; --hint=2: the shapes; --hint=3: nearly all
    python exercises/check.py mla --solution    the lines of the network that answer

An exercise begins with questions: predict or count, before you write. Then a function is compared
with a plain one on made-up inputs. Where it gives what a known mistake gives, the mistake is named.
Then it is used with the trained network, and the numbers that come out must be the network's own.
(In `training` a small network is trained.)
In a notebook: from exercises.check import check; check("gate", gate=my_function, GATE_VALUE=0.5)
"""

import argparse
import inspect
import io
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from exercises import solutions
from exercises.known import EXERCISES, Case, Exercise, Question
from exercises.network import Multiplications, effect, place
from support.settings import Refusal, run_command

ROOT = Path(__file__).resolve().parent.parent
ROUNDED = 1e-5  # what rounding in float32 may change, in parts of a case's largest number
CLEAR = 10  # a mistake is named if it changes that many times as much


# ---- One call ------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a function gives in a case; or why there is nothing to compare."""

    problem: str = ""
    returned: tuple = ()
    values: list[Tensor] = field(default_factory=list)  # of `returned`, what is compared
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of a weighted sum of the values
    multiplications: int = 0


def run(case: Case, function: Callable, right: Outcome | None = None) -> Outcome:
    """Calls the function. Without `right`, the function is the answer itself."""
    names = list(inspect.signature(getattr(solutions, case.function)).parameters)
    args = [as_given(x, case.dtype) for x in case.args]
    given = dict(zip(names, args, strict=False))
    try:
        count = Multiplications()
        with count if case.too_many else nullcontext():  # it slows a call down
            returned = function(*args)
        returned = case.changes(returned) if case.changes else as_tuple(returned, case)
        if problem := unlike(returned, right, case) if right else "":
            return Outcome(problem)
        values = list(case.compared(*returned))
        gradients = differentiate(values, given, case.learnt)
    except NotImplementedError:
        return Outcome("not written yet")
    except Exception as error:  # of the reader's code: any
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        return Outcome(f"{where}{type(error).__name__}: {textwrap.shorten(str(error), 90)}")
    return Outcome("", returned, [x.detach() for x in values], gradients, count.total)


def as_tuple(returned: object, case: Case) -> tuple:
    several = len(case.results) > 1 and isinstance(returned, tuple)
    return returned if several else (returned,)


def as_given(x: object, dtype: torch.dtype | None) -> object:
    """An argument in the case's dtype."""
    if dtype and isinstance(x, nn.Module):
        return x.to(dtype)
    if dtype and isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(dtype).requires_grad_(x.requires_grad)
    return x


def unlike(returned: tuple, right: Outcome, case: Case) -> str:
    """What is wrong with the kind of the results, before numbers are compared."""
    if len(returned) != len(case.results) or not all(isinstance(x, Tensor) for x in returned):
        kinds = " and ".join(type(x).__name__ for x in returned)
        forgotten = ": is there a `return`?" if returned == (None,) else ""
        return f"it returns {kinds}, expected tensors: {' and '.join(case.results)}{forgotten}"
    for name, x, y in zip(case.results, returned, right.returned, strict=True):
        if x.shape != y.shape:
            return f"{name} is {tuple(x.shape)}, expected {tuple(y.shape)}"
        computed = y.dtype == torch.float64 and x.dtype == torch.float32  # is exact enough
        if x.dtype != y.dtype and not computed:
            near = (x.double() - y.double()).abs().max() <= 0.01 * y.double().abs().max()
            told = f"{name} is {x.dtype}, expected {y.dtype}".replace("torch.", "")
            return f"{told}; the numbers are right" if near else told
    return ""


def differentiate(values: list[Tensor], given: dict, learnt: dict) -> dict[str, Tensor]:
    """The gradients of a weighted sum of the values; 0 where there is none."""
    leaves = {k: x for k, x in given.items() if isinstance(x, Tensor) and x.requires_grad} | learnt
    total = sum((x * torch.linspace(1, 2, x.numel()).view_as(x)).sum() for x in values)
    if not leaves or not total.requires_grad:
        return {name: torch.zeros_like(x) for name, x in leaves.items()}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in pairs}


# ---- Comparing two outcomes ----------------------------------------------------------------------


def tolerance(right: Outcome, y: Tensor) -> float:
    """How far rounding may move y. Numbers are added up to y that are as large as the largest of
    the case. So a sum that is 0, a gradient for one, may be off by parts of these."""
    if not y.is_floating_point():
        return 0.0
    every = [x for x in (*right.values, *right.gradients.values()) if x.is_floating_point()]
    return ROUNDED * max(x.abs().max().item() for x in every)


def apart(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    """Which numbers differ by more."""
    return ~(((x.double() - y.double()).abs() <= tolerance) | (x == y) | (x.isnan() & y.isnan()))


def difference(mine: Outcome, right: Outcome, case: Case) -> str:
    """What is wrong with an outcome, in words; "" if nothing."""
    if mine.problem:
        return mine.problem
    for name, x, y in zip(case.results, mine.values, right.values, strict=True):
        if told := differing(x, y, tolerance(right, y)):
            return f"{name}: {told}"
    for name, y in right.gradients.items():
        if told := differing(mine.gradients[name], y, tolerance(right, y)):
            none = "" if mine.gradients[name].any() else ", since there is none: is it detached?"
            return f"the gradient by {name}: {told}{none}"
    times = mine.multiplications / max(1, right.multiplications)
    if case.too_many and times > 3:
        return f"{times:.0f} times the multiplications that are needed: {case.too_many}"
    return ""


def differing(x: Tensor, y: Tensor, tolerance: float) -> str:
    """In how many numbers a result is wrong, and by how much; "" if in none."""
    bad = apart(x, y, tolerance)
    if not bad.any():
        return ""
    told = f"{bad.sum()} of {bad.numel()} numbers differ" if bad.ndim else "it is off"
    if (x.isnan() & ~y.isnan()).any():
        return f"{told}, with NaN"
    off = (x.double() - y.double()).abs().max()
    return f"{told}, by up to {off:.3g} (the largest is {y.double().abs().max():.3g})"


# ---- Known mistakes ------------------------------------------------------------------------------


def with_mistake(name: str, old: str, new: str) -> SimpleNamespace:
    """The right functions of an exercise, with this text replaced in one of them."""
    functions = [getattr(solutions, function) for function in EXERCISES[name].functions]
    text = "\n\n".join(map(inspect.getsource, functions))
    if text.count(old) != 1:
        raise ValueError(f"hints.txt, {name}: {old!r} stands {text.count(old)} times in the answer")
    namespace = dict(vars(solutions))
    exec(text.replace(old, new), namespace)
    return SimpleNamespace(**namespace)


@cache
def right_outcomes(name: str) -> list[Outcome]:
    cases = EXERCISES[name].cases()
    return [run(case, getattr(solutions, case.function)) for case in cases]


@cache
def mistaken_outcomes(name: str) -> list[tuple[str, list[Outcome]]]:
    """What each known mistake gives, in each case."""
    return [
        (sentence, outcomes(name, with_mistake(name, old, new), counted=False))
        for old, new, sentence in EXERCISES[name].mistakes
    ]


def outcomes(name: str, functions: SimpleNamespace, counted: bool = True) -> list[Outcome]:
    """counted: with multiplications, where a case has a limit."""
    pairs = zip(EXERCISES[name].cases(), right_outcomes(name), strict=True)
    found = []
    for case, right in pairs:
        if not counted:
            case.too_many = ""
        found.append(run(case, getattr(functions, case.function), right))
    return found


def alike(mine: Outcome, theirs: Outcome, right: Outcome) -> bool:
    """Whether mine is what a mistake gives, and that is clearly wrong. Where the mistake's values
    are wrong, gradients do not matter."""
    if mine.problem or theirs.problem:
        return mine.problem == theirs.problem

    def differ(x: list[Tensor], y: list[Tensor], times: float) -> bool:
        limits = [times * tolerance(right, b) for b in y]
        return any(apart(a, b, t).any() for a, b, t in zip(x, y, limits, strict=True))

    if differ(theirs.values, right.values, CLEAR):
        return not differ(mine.values, theirs.values, 1)
    a, b, c = (list(z.gradients.values()) for z in (mine, theirs, right))
    return differ(b, c, CLEAR) and not differ(a, b, 1) and not differ(mine.values, theirs.values, 1)


def judge(name: str, functions: SimpleNamespace) -> tuple[dict[str, str], list[str]]:
    """What is wrong with each case ("" if nothing); and which known mistakes give the same results
    in most of the wrong cases, and change no other."""
    right = right_outcomes(name)
    mine, cases = outcomes(name, functions), list(EXERCISES[name].cases())
    told = [difference(*x) for x in zip(mine, right, cases, strict=True)]
    wrong, found = [i for i, words in enumerate(told) if words], []
    unwritten = "not written yet" in told
    for sentence, theirs in mistaken_outcomes(name) if wrong and not unwritten else ():
        same = sum(alike(mine[i], theirs[i], right[i]) for i in wrong)
        rest = [i for i in range(len(cases)) if i not in wrong]
        elsewhere = any(difference(theirs[i], right[i], cases[i]) for i in rest)
        if 2 * same > len(wrong) and not elsewhere:
            found.append((same, sentence))
    most = max(found, default=(0, ""))[0]
    where = "" if most == len(wrong) else f", in {most} of {len(wrong)} cases"
    sentences = [sentence + where for same, sentence in found if same == most]
    return {case.name: words for case, words in zip(cases, told, strict=True)}, sentences


# ---- The command ---------------------------------------------------------------------------------


def the_readers(name: str) -> dict[str, object]:
    """The functions and the answers to the questions in exercises/NAME.py. Raises Refusal if one is
    missing; an error in the file keeps its trace."""
    file = ROOT / f"exercises/{name}.py"
    names = runpy.run_path(str(file))
    for function in EXERCISES[name].functions:
        if not callable(names.get(function)):
            raise Refusal(f"{file} has no function {function}: it begins with def {function}(...")
    for question in EXERCISES[name].questions:
        if question.name not in names:
            raise Refusal(f"{file} has no {question.name}: write {question.name} = your answer")
    return names


def answered(question: Question, said: object) -> str:
    """What is wrong with the answer to a question; "" if nothing."""

    def near(x: float | str) -> bool:
        if isinstance(x, str) or isinstance(said, str):
            return x == said
        return abs(said - x) <= question.within * abs(x)

    if said is None:
        return ": not answered yet"
    if not isinstance(said, int | float | str):
        return f" is of type {type(said).__name__}, expected a number or a word"
    if near(question.answer):
        return ""
    slip = [f"that is {words}" for x, words in question.slips.items() if near(x)]
    shown = f"{said:,}" if isinstance(said, int | float) else repr(said)
    return f" is not {shown}: {slip[0] if slip else question.why}"


def check(name: str, **given: object) -> bool:
    """Checks exercises/NAME.py, or functions and answers given by name: prints, and returns if all
    is right. Where something is given, only the questions that are answered are looked at."""
    exercise = EXERCISES[name]
    questions = [x for x in exercise.questions if not given or x.name in given]
    functions = {x for part in (name, *exercise.parts) for x in EXERCISES[part].functions}
    if strange := given.keys() - functions - {x.name for x in questions}:
        due = " and ".join([*exercise.functions, *(x.name for x in exercise.questions)])
        raise TypeError(f"exercise {name} has no {min(strange)}, but {due}")
    names = given if exercise.functions.keys() <= given.keys() else the_readers(name) | given
    mine = SimpleNamespace(**{function: names[function] for function in exercise.functions})
    answers = {x.name: answered(x, names[x.name]) for x in questions}
    wrong, mistakes = judge(name, mine)
    print(f"{name}: {exercise.title}")
    for what, told in (
        answers | {case: told and f": {told}" for case, told in wrong.items()}
    ).items():
        print(f"  {'-- ' if told else 'ok '} {what}{told}")
    for sentence in mistakes:
        print(f"  It gives what would come out if {sentence}.")
    if "not written yet" in wrong.values():
        first = "Answer the questions, then write" if any(answers.values()) else "Now write"
        blanks = " and ".join(exercise.functions)
        print(f"{first} {blanks} in exercises/{name}.py; --hint gives an idea.")
        return False
    missing = put_together(exercise, mine, given)
    told, same = effect(name, mine, any(wrong.values()))
    print(told)
    if missing:
        print(f"The network's own stands in for exercise {' and '.join(missing)}: do that first.")
    return same and not any((missing, *wrong.values(), *answers.values()))


def put_together(exercise: Exercise, mine: SimpleNamespace, given: dict) -> list[str]:
    """Adds the functions of the exercise's parts to its own; returns those that are not right."""
    missing = []
    for part in exercise.parts:
        names = given if EXERCISES[part].functions.keys() <= given.keys() else the_readers(part)
        functions = {key: names[key] for key in EXERCISES[part].functions}
        if any(judge(part, SimpleNamespace(**functions))[0].values()):
            missing.append(part)
        else:
            vars(mine).update(functions)
    return missing


def overview() -> None:
    for number, (name, exercise) in enumerate(EXERCISES.items(), 1):
        try:
            with redirect_stdout(io.StringIO()) as out:
                done = "done" if check(name) else "differs in the trained network"
            if wrong := re.findall("  --  (.*)", out.getvalue()):
                done = "not written yet" if "not written yet" in wrong[-1] else wrong[0]
        except Exception as error:  # of the reader's file: any
            done = f"{type(error).__name__}: {error}"
        print(f"{number:2} {name:9} {exercise.title:46} {textwrap.shorten(done, 100)}")
    print("\npython exercises/check.py NAME checks one; its text and its blank: exercises/NAME.py")


def solution(name: str) -> None:
    """The lines of the network that answer, with their numbers."""
    exercise = EXERCISES[name]
    for theirs in exercise.functions.values():
        function = inspect.unwrap(getattr(*place(exercise, theirs)))  # without decorators
        lines, first = inspect.getsourcelines(function)
        print(f"{Path(inspect.getsourcefile(function)).name}:{first}, {theirs}")
        print("".join(f"{i:5}  {line}" for i, line in enumerate(lines, first)))


def main(argv: list[str]) -> bool:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("name", nargs="?", choices=[*EXERCISES], metavar="NAME")
    parser.add_argument("--hint", type=int, nargs="?", const=1, choices=(1, 2, 3))
    parser.add_argument("--solution", action="store_true")
    asked = parser.parse_args(argv)
    if (asked.hint or asked.solution) and not asked.name:
        parser.error("name an exercise, as in: python exercises/check.py mla --hint")
    torch.set_num_threads(1)  # is as fast for so little, and waits for no other program
    if not asked.name:
        overview()
    elif asked.hint:
        print(EXERCISES[asked.name].hints[asked.hint - 1])
        if asked.hint < 3:
            print(f"\nMore: python exercises/check.py {asked.name} --hint={asked.hint + 1}")
    elif asked.solution:
        solution(asked.name)
    else:
        return check(asked.name)
    return True


if __name__ == "__main__":
    run_command(lambda argv: main(argv) or sys.exit(1))
