"""Exercises: blanks fail politely, the network's own functions pass, mistakes are recognised."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from exercises import check
from exercises.known import EXERCISES
from sample import draw
from support.settings import Refusal

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
    assert not any("Error" in words for words in wrong.values()), "a mistake that runs"


def test_the_most_of_two_mistakes_is_named():
    gate = check.answers(EXERCISES["gate"])

    def forward(self, x):  # gate values from s + b, and another mistake in one case
        s, chosen, gain = gate.forward(self, x)
        gain = (s + self.e_score_correction_bias).gather(-1, chosen)
        if self.config.norm_topk_prob:
            gain = gain / (gain.sum(-1, keepdim=True) + 1e-20)
        scale = self.config.routed_scaling_factor
        return s, chosen, gain * (scale if scale > 1 else 3.0)

    wrong, told = check.judge("gate", SimpleNamespace(forward=forward))
    assert sum(map(bool, wrong.values())) == 5
    (sentence,) = told
    assert sentence.startswith("gate values came from s + b") and ", in 4 of 5" in sentence


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


def test_errors_name_the_line(tmp_path, monkeypatch):
    text = (ROOT / "exercises/balance.py").read_text(encoding="utf-8")
    (tmp_path / "exercises").mkdir()
    file, here = (
        tmp_path / "exercises/balance.py",
        text.splitlines().index("    raise NotImplementedError"),
    )
    monkeypatch.setattr(check, "ROOT", tmp_path)
    file.write_text(text.replace("raise NotImplementedError", "return s.spam"), encoding="utf-8")
    wrong, _ = check.judge("balance", check.the_readers("balance"))
    assert all(told.startswith(f"line {here + 1}: AttributeError") for told in wrong.values())
    for changed, sentence in ((text + "1/0\n", "cannot be run"), ("", "has no function")):
        file.write_text(changed, encoding="utf-8")
        with pytest.raises(Refusal, match=sentence):
            check.the_readers("balance")


def test_the_command(capsys):
    assert check.main([]) and capsys.readouterr().out.count("not written yet") == 10
    assert check.main(["gate", "--hint"]) and "topk" in capsys.readouterr().out
    assert check.main(["gate", "--solution"]) and "model.py:" in capsys.readouterr().out
    for words in (["--hint"], ["gates"]):
        with pytest.raises(SystemExit, match="2"):
            check.main(words)
    # From any folder; 1 where something is missing.
    command = [sys.executable, str(ROOT / "exercises/check.py"), "gate"]
    assert subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL).returncode == 1


# ---- Other right answers: slow loops, written from the exercises' texts alone --------------------


def by_token(x, chosen, gain, gate_up, down, swiglu):
    rows = []
    for x_t, experts, g in zip(x, chosen, gain, strict=True):
        y = 0
        for i, weight in zip(experts, g, strict=True):
            a, b = (gate_up[i] @ x_t).chunk(2)
            y = y + weight * (down[i] @ (torch.nn.functional.silu(a) * b))
        rows.append(y)
    return torch.stack(rows)


def by_text(p, q, drafts, u):
    kept, tokens = [], []
    for b in range(len(p)):
        n, G = 0, drafts.shape[1]
        while n < G and u[b, n] * q[b, n, drafts[b, n]] < p[b, n, drafts[b, n]]:
            n += 1
        left = p[b, n] if n == G else (p[b, n] - q[b, n]).clamp(min=0)
        kept.append(n)
        tokens.append(draw((left if left.sum() else p[b, n])[None, None], u[b : b + 1, G:]))
    return torch.tensor(kept), torch.cat(tokens)


def by_sequence(s, K):
    losses = []
    for x in s:
        T, E = x.shape
        f = torch.nn.functional.one_hot(x.topk(K).indices, E).sum((0, 1)) * E / (K * T)
        losses.append((f * (x / x.sum(-1, keepdim=True)).mean(0)).sum())
    return sum(losses) / len(losses)


def in_two_products(self, q_nope, q_pe, kv, start=None):
    (_, T, H, N), S, C = q_nope.shape, kv.shape[1], self.config.kv_lora_rank
    W = self.kv_b_proj.weight.view(H, -1, C)
    score = torch.einsum("bthn,hnc,bsc->bhts", q_nope, W[:, :N], kv[..., :C])
    score = (score + torch.einsum("bthr,bsr->bhts", q_pe, kv[..., C:])) * self.scale
    seen = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    p = score.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bsc,hvc->bthv", p, kv[..., :C], W[:, N:])


@pytest.mark.parametrize(
    "name, functions",
    [
        ("experts", {"routed_ffn": by_token}),
        ("accept", {"accept": by_text}),
        ("balance", {"balance_loss": by_sequence}),
        ("absorbed", {"attend_absorbed": in_two_products}),
    ],
)
def test_other_right_answers_pass(name, functions):
    wrong, mistakes = check.judge(name, SimpleNamespace(**functions))
    assert not any(wrong.values()) and not mistakes


# ---- In the trained network ----------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Two windows of the text are enough here."""
    model, tokenizer, windows = check.trained()
    monkeypatch.setattr(check, "trained", lambda: (model, tokenizer, windows[:2]))


@pytest.mark.parametrize("name", EXERCISES)
def test_the_network_with_its_own_functions_is_itself(name, short):
    assert "as it should be" in check.effect(name, check.answers(EXERCISES[name]))


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("mla", "there were no scale"),
        ("absorbed", "W^UV stood before W^UK"),
        ("bias", "busier"),
        ("experts", "only the first choice"),
        ("mtp", "targets are not shifted"),
        ("accept", "u is not used"),
    ],
)
def test_mistakes_show_in_the_network(name, sentence, short):
    exercise = EXERCISES[name]
    (mistake,) = (m for m in exercise.mistakes if sentence in m[2])
    places = [check.place(exercise, answer) for answer in exercise.answers.values()]
    before = [vars(where)[name] for where, name in places]
    told = check.effect(name, check.with_mistake(exercise, *mistake[:2]))
    assert "where the right answer gives" in told
    assert [vars(where)[name] for where, name in places] == before  # put back


def test_a_function_that_fails_in_the_network(short):
    def wrong(s, K):
        raise RuntimeError("oh")

    told = check.effect("balance", SimpleNamespace(balance_loss=wrong))
    assert told == "In the trained network it fails: RuntimeError: oh"
