"""Exercises: right answers pass however they are written, wrong ones do not and are named."""

import textwrap
from types import SimpleNamespace

import pytest

import model as v3
from exercises import check, network, solutions
from exercises.known import EXERCISES

pytestmark = pytest.mark.usefixtures("v3")  # the answers are V3's

# exercise | old text => new text in its answer in solutions.py | where that is wrong: the words
ANSWERS = r"""
rope | x32 = upcast(x) => x32 = x.float()
rope | upcast(x).unflatten => x.float().unflatten
rope | (x32 / (mean + self.eps).sqrt()).to(x.dtype) => F.rms_norm(x32, x.shape[-1:], eps=self.eps).to(x.dtype)
rope | y = (x32 / (mean + self.eps).sqrt()).to(x.dtype) => return (self.weight * (x32 * torch.rsqrt(mean + self.eps))).to(x.dtype) | rounded after the weight
bias | load = gate.load.float() => load = gate.load / gate.load.sum()
bias | mean = load.mean() => load = load / load.sum(); mean = 1 / len(load)
bias | gamma * (mean - load).sign() => gamma * (mean - load).sign(); gate.e_score_correction_bias.clamp_(-1, 1) | held between -1 and 1
bias | load = gate.load.float() => gate.load.zero_(); load = gate.load.float() | before the load is set to 0
bias | gate.load.zero_() => gate.load = torch.zeros_like(gate.load) | kept its counts
mtp | len(model.mtp) + 1) => min(len(model.mtp), tokens.shape[1] - 1) + 1)
mtp | F.cross_entropy(logits.flatten(0, 1), due.flatten(), ignore_index=-1) => F.cross_entropy(logits[due >= 0], due[due >= 0])
mla | p = score.softmax(-1) => p, v = score.float().softmax(-1), v.float()
mla | q, k) * self.scale => q * self.scale, k) * self.scale | scaled twice
mla | k, v = kv.view(B, T, H, N + V).split([N, V], -1) => k, v = kv.view(B, H, T, N + V).transpose(1, 2).split([N, V], -1) | .view took the place of a transpose
mla | p, v) => p, v).transpose(1, 2).reshape(B, T, H, V) | .view took the place of a transpose in the result
absorbed | (q, q_pe), -1) => (q, q_pe), -1) * self.scale | scaled twice
absorbed | "bthc,hvc->bthv", latent, W_UV => "bhts,bshv->bthv", p, torch.einsum("bsc,hvc->bshv", kv[..., :C], W_UV) | multiplications
gate | (upcast(x) @ upcast(self.weight).T) => (x.float() @ self.weight.float().T)
gate | return s, chosen, gain => return s, chosen, gain * config.routed_scaling_factor | scaled twice
gate | return s, chosen, gain => return s, chosen, gain / (1 + 1e-3) | gate values (B, T, K)
experts | (chosen == i).nonzero(as_tuple=True) => (chosen == i).nonzero()[:1024].T | numbers differ
training | weights[name] * loss for name, loss in losses.items() => losses[name] * x for name, x in weights.items()
experts | (rows @ self.gate_up_proj[i].T) => (x @ self.gate_up_proj[i].T)[token] | multiplications
training | optimizer.zero_grad() => optimizer.zero_grad; model.train() | gradients of the previous step
training | return {name: loss.detach() for name, loss in losses.items()} => return None | losses by name
accept | torch.where(empty, p_after, rest) => torch.where(empty, torch.ones_like(rest), rest) | token after them
yarn | (high - low or 0.001) => (high - low) | NaN
"""  # noqa: E501


def judged(name: str, functions) -> tuple[list[str], list[str]]:
    wrong, mistakes = check.judge(name, functions)  # of each case; those that are named
    return [words for words in wrong.values() if words], mistakes


@pytest.mark.parametrize("line", ANSWERS.strip().splitlines())
def test_answers_are_judged_rightly(line):
    name, change, *says = line.split(" | ")
    functions = check.with_mistake(name, *change.split(" => "))
    wrong, mistakes = judged(name, functions)
    if says:
        assert says[0] in " ".join(wrong[:1] + mistakes), (wrong, mistakes)
        return
    assert (wrong, mistakes) == ([], [])
    if "float()" in change or name == "training":  # float32 in a network of float64; its weights
        assert "give the same" in network.effect(name, functions)


@pytest.mark.parametrize("name", EXERCISES)
def test_blanks_fail_with_a_sentence_and_solutions_pass(name, capsys):
    assert not check.check(name)
    out = capsys.readouterr().out
    assert "not answered yet" in out and "not written yet" in out and "Error" not in out
    assert not any(line in out for line in EXERCISES[name].why.splitlines())
    answers = {question.name: question.answer for question in EXERCISES[name].questions}
    assert check.check(name, vars(solutions) | answers)
    out = capsys.readouterr().out
    assert "The network's own functions give the same." in out
    reasons = [EXERCISES[name].why, *(question.why for question in EXERCISES[name].questions)]
    assert all(" ".join(why.split()) in " ".join(out.split()) for why in reasons)
    if name == "mla":  # a new network may need another first line or seed
        text = out.partition("the first line:\n")[2].partition("    The network's own")[0]
        compile(textwrap.dedent(text), "its text", "exec")
    if name == "balance":
        assert not check.check(name, vars(solutions) | answers | {"EVEN": 9})
    if name == "mla":
        assert "numbers, not bytes" in check.wrong_answer(EXERCISES[name].questions[2], 35_136)
    if name == "bias":
        assert check.wrong_answer(EXERCISES[name].questions[3], "Stays") == ""


def test_the_demonstration_is_no_proof(capsys):
    """A wrong function may give the same in the network, or a better number."""

    def printed(name: str, old: str, new: str) -> str:
        answers = {question.name: question.answer for question in EXERCISES[name].questions}
        wrong = vars(solutions) | vars(check.with_mistake(name, old, new))
        assert not check.check(name, wrong | answers)
        return capsys.readouterr().out

    out = printed("accept", "cumprod(1).sum(1)", "sum(1)")
    assert "give the same, so the mistake does not show here" in out
    out = printed("bias", "(mean - load).sign()", "(mean - load) / mean")
    assert "in parts of the mean" in out and "The cases above decide" in out
    out = printed("accept", "stays.long().cumprod(1).sum(1)", "stays.long().sum(1) * 0")
    assert "The cases above decide" in out and "detached" not in out  # counts have no gradient
    out = printed("gate", "gain = s.gather", "gain = (s + b).gather")
    assert "float64" not in out  # which the reader has not written
    assert "mend the first wrong case" not in out
    out = printed("gate", "return s, chosen, gain", "return s / 2, chosen, gain / 3")
    assert "mend the first wrong case" in out and "It behaves as if" not in out


def test_every_token_of_the_text_is_written_with_the_readers_function():
    """Through a cache attend_expanded would only read the prompt, and a wrong one write well."""
    calls = []

    def counted(*args):
        calls.append(args)
        return solutions.attend_expanded(*args)

    network.effect("mla", SimpleNamespace(attend_expanded=counted))
    assert len(calls) >= 60 * len(network.trained()[0].layers)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_mistake_shows_in_the_network(name):
    def shown(functions):
        return network.effect(name, functions)

    mistaken = (check.with_mistake(name, *change) for *change, _ in EXERCISES[name].mistakes)
    assert any("The network's own functions give:" in shown(x) for x in mistaken)
    for part in EXERCISES[name].parts[:1]:  # a wrong part moves the curve
        old, new, _ = EXERCISES[part].mistakes[0]
        functions = vars(check.with_mistake(part, old, new))
        functions |= {"train_step": solutions.train_step}
        assert "The network's own functions give:" in shown(SimpleNamespace(**functions))


@pytest.mark.parametrize("name", EXERCISES)
def test_known_mistakes_are_named_and_no_others(name):
    exercise = EXERCISES[name]
    assert len(exercise.hints) == 3 and exercise.mistakes
    for old, new, sentence in exercise.mistakes:
        wrong, mistakes = judged(name, check.with_mistake(name, old, new))
        assert wrong and mistakes == [sentence], (sentence, wrong, mistakes)
        assert "Error" not in " ".join(wrong), "a mistake that runs"
    for question in exercise.questions:
        assert all("that is" in check.wrong_answer(question, x) for x in question.slips)
        assert check.wrong_answer(question, -1).startswith("not -1: ")


@pytest.mark.parametrize("name", [x for x in EXERCISES if x != "training"])
def test_the_networks_own_functions_are_right(name):
    places = EXERCISES[name].functions.items()
    own = {mine: getattr(owner, theirs) for mine, (owner, theirs) in places}
    own["mtp_loss"] = lambda model, x, y: v3.DeepSeekV3.forward(model, x, y)["mtp_loss"]
    assert judged(name, SimpleNamespace(**own)) == ([], [])
