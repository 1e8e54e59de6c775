"""Exercises: right answers pass however they are written, wrong ones do not, known mistakes are
named, and the checker says what is wrong in the reader's words."""

import io
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import answers
import pytest
import torch

from exercises import check, network, solutions
from exercises.known import EXERCISES
from support.settings import Refusal

ROOT = Path(__file__).parent.parent


def judged(name: str, functions) -> tuple[list[str], list[str]]:
    """What is wrong, of each wrong case, and the mistakes that are named."""
    wrong, mistakes = check.judge(name, functions)
    return [words for words in wrong.values() if words], mistakes


def the_networks_own(name: str) -> SimpleNamespace:
    """model.py's functions, under the names that the reader's have."""
    if name == "mtp":  # a part of forward, which a made-up model refuses
        forward = type(network.trained()[0]).forward
        return SimpleNamespace(mtp_loss=lambda net, x, y: forward(net, x, y)["mtp_loss"])
    places = {k: network.place(EXERCISES[name], v) for k, v in EXERCISES[name].functions.items()}
    return SimpleNamespace(**{k: getattr(*place) for k, place in places.items()})


@pytest.mark.parametrize("name", EXERCISES)
def test_blanks_fail_politely(name, capsys):
    assert not check.check(name)
    out = capsys.readouterr().out
    assert "not written yet" in out and "--hint" in out and "Error" not in out


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_pass_however_they_are_written(name):
    assert judged(name, the_networks_own(name)) == ([], [])
    assert len(answers.RIGHT[name]) >= 7
    for answer, functions in answers.RIGHT[name].items():
        assert judged(name, functions) == ([], []), answer


@pytest.mark.parametrize("name", EXERCISES)
def test_wrong_answers_are_told_why(name):
    assert len(answers.WRONG[name]) >= 4
    for answer, (functions, says) in answers.WRONG[name].items():
        wrong, mistakes = judged(name, functions)
        assert wrong and says in " ".join(wrong + mistakes), (answer, wrong, mistakes)


@pytest.mark.parametrize("name", EXERCISES)
def test_known_mistakes_are_named_and_no_others(name):
    assert EXERCISES[name].hint.count("\n") >= 2 and len(EXERCISES[name].mistakes) >= 12
    for old, new, sentence in EXERCISES[name].mistakes:
        wrong, mistakes = judged(name, check.with_mistake(name, old, new))
        assert wrong and mistakes == [sentence], (sentence, wrong, mistakes)
        assert "Error" not in " ".join(wrong), "a mistake that runs"


def test_the_most_of_two_mistakes_is_named():
    def forward(self, x):  # gate values from s + b, and another mistake in one case
        s, chosen, gain = solutions.forward(self, x)
        gain = (s + self.e_score_correction_bias).gather(-1, chosen)
        if self.config.norm_topk_prob:
            gain = gain / gain.sum(-1, keepdim=True)
        scale = self.config.routed_scaling_factor
        return s, chosen, gain * (scale if scale > 1 else 3.0)

    wrong, (sentence,) = judged("gate", SimpleNamespace(forward=forward))
    assert sentence.startswith("gate values came from s + b") and ", in 6 of 7 cases" in sentence
    assert len(wrong) == 7


def test_rounding_is_never_a_mistake():
    """One token: its gradients by queries and keys are 0, and rounding is all that there is."""
    inexact = [x for x, says in answers.WRONG["mla"].values() if says == "comes from float32"]
    assert [judged("mla", functions)[1] for functions in inexact] == [[]]
    (case,) = (case for case in EXERCISES["mla"].cases() if case.name == "one token")
    gradient = check.run(case, solutions.attend_expanded).gradients["q_nope"]
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize(
    "garbage",
    [None, 3, "text", [], (), {}, float("nan"), torch.zeros(()), torch.zeros(2, dtype=torch.bool),
     (None,) * 3, (torch.zeros(2),) * 3, (torch.zeros(1, dtype=torch.long),) * 2],
    ids=str,
)  # fmt: skip
def test_whatever_an_answer_gives_the_checker_has_no_error(garbage, tiny):
    for name, exercise in EXERCISES.items():
        functions = SimpleNamespace(**{key: lambda *_, **__: garbage for key in exercise.functions})
        wrong, mistakes = judged(name, functions)
        assert wrong and not mistakes
        assert "Error" not in " ".join(wrong)
        assert not network.effect(name, functions, True)[1]


def test_functions_of_a_notebook_and_errors(monkeypatch, capsys):
    monkeypatch.setattr(check, "effect", lambda *_: ("", True))
    assert check.check("balance", balance_loss=solutions.balance_loss)
    assert not check.check("balance", balance_loss=lambda s, K: s.mean())
    assert not check.check("balance", balance_loss=lambda s: s)
    out = capsys.readouterr().out
    assert "ok  three sequences" in out and "TypeError" in out and "not written" not in out


def test_errors_name_the_line(tmp_path, monkeypatch):
    text = (ROOT / "exercises/balance.py").read_text(encoding="utf-8")
    (tmp_path / "exercises").mkdir()
    file = tmp_path / "exercises/balance.py"
    here = text.splitlines().index("    raise NotImplementedError")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    file.write_text(text.replace("raise NotImplementedError", "return s.spam"), encoding="utf-8")
    wrong, _ = judged("balance", check.the_readers("balance"))
    assert all(told.startswith(f"line {here + 1}: AttributeError") for told in wrong)
    file.write_text(text + "1/0\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):  # with its trace
        check.the_readers("balance")
    file.write_text("", encoding="utf-8")
    with pytest.raises(Refusal, match="has no function"):
        check.the_readers("balance")
    with pytest.raises(TypeError, match="no function balanceloss, but balance_loss"):
        check.check("balance", balanceloss=lambda s, K: s)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert check.main([]) and capsys.readouterr().out.count("not written yet") == len(EXERCISES)
    assert check.main(["gate", "--hint"]) and "topk" in capsys.readouterr().out
    assert check.main(["gate", "--solution"]) and "model.py:" in capsys.readouterr().out
    for words in (["--hint"], ["gates"]):
        with pytest.raises(SystemExit, match="2"):
            check.main(words)
    # From any folder; 1 where something is missing.
    command = [sys.executable, str(ROOT / "exercises/check.py"), "gate"]
    assert subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL).returncode == 1


# ---- In the trained network ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Less of the text, and shorter answers."""
    model, tokenizer, windows = network.trained()
    with pytest.MonkeyPatch.context() as patch:
        few = [(x[:, :72], y[:, :72]) for x, y in windows[:2]]
        patch.setattr(network, "trained", lambda: (model, tokenizer, few))
        patch.setattr(network, "LENGTH", 3)
        patch.setattr(network, "DRAWS", 1000)
        network.right.cache_clear()
        yield
    network.right.cache_clear()


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_in_the_network(name, tiny):
    own = {"the network's own": the_networks_own(name)}
    for answer, functions in (own | answers.RIGHT[name]).items():
        told, same = network.effect(name, functions)
        assert same and told.splitlines()[0].endswith("as it should be."), (answer, told)


@pytest.mark.parametrize("name", EXERCISES)
def test_mistakes_in_the_network(name, tiny):
    """Most change what it gives. Those that do not are told from right answers."""
    exercise, shown = EXERCISES[name], 0
    places = [network.place(exercise, theirs) for theirs in exercise.functions.values()]
    before = [vars(where)[key] for where, key in places]
    for old, new, _ in exercise.mistakes[::3]:
        told, same = network.effect(name, check.with_mistake(name, old, new), wrong=True)
        assert "as it should be" not in told
        assert same == ("does not show here" in told)
        shown += not same
    assert shown >= (1 if name == "tiles" else 2)
    assert [vars(where)[key] for where, key in places] == before  # put back


def test_what_changes_the_network_is_not_done(tiny, monkeypatch, capsys):
    """Right in every case, wrong in texts that are longer than those."""

    def attend_expanded(self, q_nope, q_pe, latent, k_pe):
        if q_nope.shape[1] > 64:
            latent = latent * 1.0001
        return solutions.attend_expanded(self, q_nope, q_pe, latent, k_pe)

    functions = SimpleNamespace(attend_expanded=attend_expanded)
    assert judged("mla", functions) == ([], [])
    assert not check.check("mla", attend_expanded=attend_expanded)
    assert "but the logits differ" in capsys.readouterr().out
    written = dict.fromkeys(EXERCISES, solutions) | {"mla": functions}
    monkeypatch.setattr(check, "the_readers", written.__getitem__)
    with redirect_stdout(io.StringIO()) as out:
        check.overview()
    assert out.getvalue().count(" done\n") == len(EXERCISES) - 1
    assert "differs in the trained network" in out.getvalue()


def test_a_function_that_fails_in_the_network(tiny):
    def wrong(s, K):
        raise RuntimeError("oh")

    told = network.effect("balance", SimpleNamespace(balance_loss=wrong))
    words, same = told
    assert not same and words.startswith("In the trained network it fails:\nTraceback")
    assert 'raise RuntimeError("oh")' in words


def test_multiplications_are_counted(tiny):
    few = network.multiplications(solutions.attend_absorbed, 1024)
    assert 10 * few < network.multiplications(network.with_keys_and_values, 1024)
