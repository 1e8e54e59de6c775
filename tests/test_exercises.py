"""Exercises: blanks fail politely, the network's own functions pass, mistakes are recognised."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from exercises import check
from exercises.known import EXERCISES

ROOT = Path(__file__).parent.parent
MISTAKES = [(name, *mistake) for name, e in EXERCISES.items() for mistake in e.mistakes]


@pytest.mark.parametrize("name", EXERCISES)
def test_blanks_fail_politely(name, capsys):
    assert not check.check(name)
    out = capsys.readouterr().out
    assert "not written yet" in out and "--hint" in out and "Error" not in out


@pytest.mark.parametrize("name", EXERCISES)
def test_the_networks_own_functions_pass(name):
    wrong, mistakes = check.judge(name, check.answers(EXERCISES[name]))
    assert len(wrong) >= 4 and not any(wrong.values()) and not mistakes


@pytest.mark.parametrize("name, old, new, sentence", MISTAKES, ids=[m[3] for m in MISTAKES])
def test_known_mistakes_are_recognised(name, old, new, sentence):
    functions = check.with_mistake(EXERCISES[name], old, new)
    assert functions is not None, f"the answer's source has no single {old!r}"
    wrong, told = check.judge(name, functions)
    assert any(wrong.values()) and told == [sentence]


def test_every_exercise_has_a_hint_and_four_mistakes():
    assert len(EXERCISES) == 10
    for name, exercise in EXERCISES.items():
        assert exercise.hint.count("\n") >= 2 and len(exercise.mistakes) >= 4, name


def test_functions_of_a_notebook_and_errors(monkeypatch, capsys):
    monkeypatch.setattr(check, "effect", lambda name, functions: "")
    assert check.check("balance", balance_loss=check.answers(EXERCISES["balance"]).balance_loss)
    assert not check.check("balance", balance_loss=lambda s, K: s.mean())
    assert not check.check("balance", balance_loss=lambda s, K: None)
    assert not check.check("balance", balance_loss=lambda s: s)
    out = capsys.readouterr().out
    assert "ok  three sequences" in out and "TypeError" in out and "not written" not in out


def test_the_command():
    def run(*words):
        command = [sys.executable, str(ROOT / "exercises/check.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    listed = run()
    assert listed.returncode == 0 and listed.stdout.count("not written yet") == 10
    assert run("gate").returncode == 1
    assert "topk" in run("gate", "--hint").stdout
    assert "model.py:" in run("gate", "--solution").stdout
    assert run("--hint").returncode == run("gates").returncode == 2
