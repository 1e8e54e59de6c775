"""Right networks, of which no line of `check.py` complains: so whatever it compares is right in all
variants of V3. And edits that train without an error and are wrong, each named by its line. Sums
that are kept in bfloat16, and a balance loss of the whole batch: test_changes.py."""

import functools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from networks import SIZES, VARIANTS, student, tiny, tokens_of
from torch import nn

import check
import model
from check import causality, decoding, drafts, gradients, losses
from model import MAX_ROUND_TOKENS, DeepSeekV3, Gate, ModelConfig
from support.tokenizer import Tokenizer
from train import TrainConfig

train = check.train

CONFIG = TrainConfig(block_size=16)


def changed(part: nn.Module, change):
    """Changes what a block returns first: its hidden states. An edit may return more than V3."""

    def hook(module, args, out):
        return (change(module, out[0]), *out[1:]) if isinstance(out, tuple) else change(module, out)

    part.register_forward_hook(hook)


def drop_out(module, x):
    return F.dropout(x, 0.5, module.training)


class Wide(DeepSeekV3):
    """A module reads more than the head does, as in EAGLE-3."""

    def trunk(self, tokens, cache=None):
        h = super().trunk(tokens, cache)
        return torch.cat((h, h.roll(1, -1)), -1)  # (B, T, 2D)

    def predict_next(self, k, h, tokens, cache=None):
        return super().predict_next(k, h[..., -16:], tokens, cache)

    def logits(self, h, k=0):
        return super().logits(h[..., :16], k)


@pytest.mark.parametrize("name", [*VARIANTS, "dropout", "wide"])
def test_nothing_is_wrong_with_this_network(name, monkeypatch):
    """Nor is it another one afterwards. All variants draw drafts by the same rule."""
    if name != "base":
        few = functools.partial(check.chance_of_drawn, rounds=60)
        monkeypatch.setattr(check, "chance_of_drawn", few)
    model = tiny(torch.float32, max_position_embeddings=64, **VARIANTS.get(name, {})).train()
    if name == "wide":
        model.__class__ = Wide
    compared = "recomputed, in two micro-batches"
    if name == "dropout":  # in training alone
        changed(model.layers[0], drop_out)
        compared = "recomputed"
    before = {key: x.clone() for key, x in model.state_dict().items()}
    found = [*check.answers(model, CONFIG, 24)]
    assert len(found) == 7 and not [str(answer) for answer in found if answer.wrong or answer.notes]
    n = 6 * (1 + len(model.mtp))
    assert f"decoding: {n} of {n} ways to read 24 tokens" in str(found[0])
    assert found[3].summary.endswith(f"gradients must be the same {compared}")
    assert model.training and all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_the_command_checks_a_run_with_its_settings(workplace, shared, capsys, monkeypatch):
    run, asked = shared("--alpha=0.02"), []
    monkeypatch.setattr(check, "answers", lambda *x: asked.append(x) or [check.Answer("this")])
    check.main([str(run), "--length=30"])
    ((model, config, length, compiled, folder, steps, tokenizer),) = asked
    assert isinstance(model, DeepSeekV3) and config.alpha == 0.02 and folder == run
    assert length == 30 and not compiled and steps == 4 and tokenizer.n_vocab == 512
    monkeypatch.setattr(check, "answers", lambda *x: [check.Answer("a", ["b"]), check.Answer("c")])
    with pytest.raises(SystemExit) as error:
        check.main([str(run)])
    assert error.value.code == 1
    assert capsys.readouterr().out == "right this\nWRONG a\n      b\nright c\n"


# ---- Decoding ------------------------------------------------------------------------------------

ONE, SEVERAL, REJECTED = "one token at a time", "several tokens at a time", "drafts rejected"


def ways_found(model, length=40) -> list[str]:
    return decoding(model, length).wrong


class Smeared(nn.Module):
    """In attention's place the mean of the newest `window` inputs, which lie in a ring."""

    def __init__(self, window: int, ring: int):
        super().__init__()
        self.window, self.ring, self.gain = window, ring, nn.Parameter(torch.ones(()))

    def new_cache(self, batch, size, like):
        return like.new_zeros(batch, self.ring, 16)

    def forward(self, h, rope, past=None):
        T, before = h.shape[1], self.window - 1
        x = F.pad(h, (0, 0, before, 0))  # (B, before + T, D)
        if past is not None:
            ring, at = past.kept, past.positions[0] + torch.arange(-before, T)
            x[:, :before] = ring[:, at[:before] % self.ring] * (at[:before, None] >= 0)
            ring[:, at[before:][-self.ring :] % self.ring] = h[:, -self.ring :]
        return self.gain * x.unfold(1, self.window, 1).mean(-1)


class Summed(nn.Module):
    """In attention's place all inputs' sum: a state, which cannot go back."""

    def new_cache(self, batch, size, like):
        return (like.new_zeros(batch, 16, 1),)  # may be several tensors

    def forward(self, h, rope, past=None):
        total = h.cumsum(1)
        if past is not None:
            (before,) = past.kept
            total = total + before.mT
            before[:] = total[:, -1:].mT
        return total / 10


def mixed(attention: nn.Module, place="layers.1.self_attn", **changes):
    model = tiny(**changes)
    model.set_submodule(place, attention)
    return model


def test_a_ring_that_is_too_short_is_found():
    """It needs the window's older tokens, and as many as may be forgotten."""
    assert not ways_found(mixed(Smeared(12, 11 + MAX_ROUND_TOKENS)))
    wrong = ways_found(mixed(Smeared(12, 10 + MAX_ROUND_TOKENS)))
    assert wrong and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "after a prompt of 20: wrong from position 20 on, by up to " in wrong[-1]
    wrong = ways_found(mixed(Smeared(12, 10)))
    assert all(way in str(wrong) for way in (ONE, SEVERAL, REJECTED))
    assert f"main model, {ONE}: wrong from position 11 on" in wrong[0]


def test_a_state_that_cannot_go_back_is_found_in_the_model_or_in_a_module():
    wrong = ways_found(mixed(Summed()))
    assert len(wrong) == 2 and all(f"main model, {REJECTED}" in x for x in wrong)
    assert "from position 0 on" in wrong[0] and "prompt of 20: wrong from position 20" in wrong[1]
    wrong = ways_found(mixed(Summed(), "mtp.1.block.self_attn", num_nextn_predict_layers=2))
    assert len(wrong) == 2 and all(x.startswith(f"MTP module 2, {REJECTED}") for x in wrong)


def test_scores_that_are_capped_in_decoding_alone_are_found_in_a_new_network(monkeypatch):
    """At initial weights of 0.006 scores are so small that a cap of 50 would not show."""
    plain = model.causal_attention

    def capped(q, k, v, scale, positions=None):
        if positions is None:
            return plain(q, k, v, scale)
        score = 50 * torch.tanh(q @ k.mT * (scale / 50))
        later = torch.arange(k.shape[2]) > positions[:, None]
        return score.masked_fill(later, -torch.inf).softmax(-1) @ v

    monkeypatch.setattr(model, "causal_attention", capped)
    assert decoding(DeepSeekV3(ModelConfig(**SIZES | {"initializer_range": 0.006})), 24).wrong


def test_a_text_is_longer_than_twice_the_longest_window():
    model = mixed(Smeared(150, 149 + MAX_ROUND_TOKENS), max_position_embeddings=400)
    assert check.longest_window(model) == 149 + MAX_ROUND_TOKENS
    assert check.longest_window(tiny()) == 0
    with mock.patch.object(check, "PATTERNS", {SEVERAL: [(8, 0)]}):
        assert "read 314 tokens in" in decoding(model).summary
        assert "read 256 tokens in" in decoding(tiny()).summary


# ---- A look ahead --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in evaluation", "in training"])
def test_a_layer_that_looks_ahead_is_found(mode):
    """In training alone, too, where decoding is right. (A module knows the next token.)"""

    def mix(module, x):
        sees = module.training if mode == "in training" else True
        return x + sees * 1e-3 * x.roll(-1, 1)

    model = tiny()
    changed(model.layers[1], mix)
    wrong = causality(model, 40).wrong
    assert f"main model, {mode}: position 18 sees tokens from position 19 on" in wrong[0]
    assert len(wrong) == (1 if mode == "in training" else 2)
    assert bool(ways_found(model)) == (mode == "in evaluation")
    if mode == "in evaluation":
        assert "from position 0 on" in ways_found(model)[0]


@pytest.mark.parametrize("of_batch", [lambda x: x.mean(0), lambda x: x.cumsum(0) - x])
def test_texts_that_see_the_others_of_their_batch_are_found(of_batch):
    """Also if the first text sees itself alone."""
    model = tiny(num_nextn_predict_layers=0)
    changed(model.layers[1], lambda module, x: x - of_batch(x))
    (wrong,) = causality(model, 40).wrong
    assert wrong.startswith("main model: a text sees the others of its batch; logits differ by ")


@pytest.mark.parametrize("variant", ["yarn", "half_split_rope"])
def test_scores_that_need_absolute_positions_are_noted(variant, monkeypatch):
    """Queries are rotated, and keys are not. Everywhere alike, so nothing else is wrong."""
    rotate = model.rotate
    monkeypatch.setattr(
        model, "rotate", lambda x, *rest: x if x.shape[2] == 1 else rotate(x, *rest)
    )
    network = tiny(**VARIANTS[variant])
    answer = causality(network, 40)
    assert not answer.wrong and not ways_found(network)
    assert [note.partition(":")[0] for note in answer.notes] == ["main model", "MTP module 1"]
    assert "main model: rotated by positions that are 5 larger, logits differ by" in answer.notes[0]


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [4, 0])
def test_what_layers_hand_on_by_the_side_is_found(dense):
    """The second layer of each pair reads what the first has left. Recomputed, it finds what the
    next pair has left; and its tokens choose other experts."""
    model, left = tiny(num_hidden_layers=4, first_k_dense_replace=dense), {}

    def leave(module, args, out):
        left["x"] = out

    for i, layer in enumerate(model.layers):
        look = lambda module, args, out: out * left["x"].sigmoid()  # noqa: E731
        layer.self_attn.register_forward_hook(look if i % 2 else leave)
    (wrong,) = gradients(model, CONFIG).wrong
    assert wrong.startswith("recomputed: ")
    assert (" differ, " if dense else "a block does not compute") in wrong


def test_a_parameter_without_gradient_is_found():
    model = tiny()
    model.layers[1].unused = nn.Parameter(torch.ones(2))
    assert gradients(model, CONFIG).wrong == ["layers.1.unused gets no gradient"]
    changed(model.layers[1], lambda module, x: x + module.unused.sum().round())  # gradient 0
    assert gradients(model, CONFIG).wrong == ["layers.1.unused gets no gradient"]


@pytest.mark.parametrize("p", [0.2, 0.8])
def test_layers_that_are_skipped_at_random_are_right(p):
    """Though two steps may skip the same layers, and one may skip all."""
    model = tiny()
    for part in (*model.layers, *model.mtp):
        part.forward = functools.partial(skipping, part.forward, part, p)
    found = [gradients(model, CONFIG), losses(model)]
    assert not [x for answer in found for x in (*answer.wrong, *answer.notes)]
    assert found[0].summary.endswith("must be the same recomputed")


def skipping(forward, part, p, x, *rest):
    y, routing = forward(x, *rest)
    return x + (torch.rand(()) >= p) / (1 - p) * (y - x) if part.training else y, routing


def test_a_part_that_computes_in_training_alone_is_named():
    model = tiny()
    changed(model.layers[1], lambda module, x: x * (1 + module.training))
    answer = gradients(model, CONFIG)
    (note,) = answer.notes
    assert not answer.wrong and note.startswith("loss is ") and note.endswith(" in eval mode")


def test_a_gate_that_the_text_does_not_train_is_named(monkeypatch):
    choose = Gate.forward

    def cut_off(self, x):
        scores, chosen, gain = choose(self, x)
        return scores, chosen, gain.detach()

    model = tiny()
    assert not gradients(model, CONFIG).notes
    monkeypatch.setattr(Gate, "forward", cut_off)
    (note,) = gradients(model, CONFIG).notes
    assert note == "balance_loss alone trains layers.1.mlp.gate.weight and 2 more"


@pytest.mark.parametrize("head", ["head", "lm_head"])
def test_a_loss_that_trains_no_layer_is_named(head, monkeypatch):
    """It reads detached hidden states, by a head of its own, or by the text's."""

    class Auxiliary(DeepSeekV3):
        def forward(self, tokens, targets=None, return_mtp=False):
            h = self.trunk(tokens).detach()
            found = super().forward(tokens, targets, return_mtp)
            aux = getattr(self, head)(h).square().mean()
            return found if targets is None else found | {"aux_loss": aux}

    model, weights = tiny(), train.loss_weights
    weigh = lambda config, step: weights(config, step) | {"aux_loss": 0.1}  # noqa: E731
    monkeypatch.setattr(train, "loss_weights", weigh)
    model.__class__ = Auxiliary
    if head == "head":
        model.head = nn.Linear(16, 1, bias=False).double()
    answer = gradients(model, CONFIG)
    assert "aux_loss reaches 1;" in answer.summary
    *alone, no_layer = answer.notes
    assert no_layer == "aux_loss trains no layer of the main model: is its input detached?"
    assert alone == ["aux_loss alone trains head.weight"] * (head == "head")


def test_a_second_gate_in_a_block_is_found():
    model = tiny()
    model.layers[1].self_attn.gate = Gate(model.config).double()
    uncounted = "layers.1.mlp.gate's choices are not counted: a block counts one gate"
    assert uncounted in gradients(model, CONFIG).wrong


def test_a_block_that_compiles_to_another_is_found():
    model = tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)

    class Other(type(model.layers[0])):
        def forward(self, x, *args):
            x, routing = super().forward(x, *args)
            return (x * 1.01 if torch.compiler.is_compiling() else x), routing

    compile = functools.partial(torch.compile, backend="eager")
    with mock.patch.object(torch, "compile", compile):
        answer = gradients(model, CONFIG, True)
        assert "micro-batches, compiled" in str(answer) and not answer.wrong
        model.layers[0].__class__ = Other
        (wrong,) = gradients(model, CONFIG, True).wrong
    assert wrong.startswith("compiled: ")


def test_a_loss_that_is_not_the_cross_entropy_is_found():
    def hardest(logits, targets):
        each = F.cross_entropy(logits, targets, reduction="none")
        return each.topk(len(each) * 6 // 10).values.mean()

    model = tiny()
    model.cross_entropy = hardest
    loss, mtp_loss = losses(model).wrong
    assert loss.startswith("loss is ") and mtp_loss.startswith("mtp_loss is ")
    assert ", but the logits' cross-entropy is " in loss


# ---- A run ---------------------------------------------------------------------------------------


def test_what_a_step_sets_is_checked_at_first_and_in_the_middle_of_a_run(monkeypatch):
    """Else the network is as it is after the run."""
    seen, model, twice = {}, tiny(), [0, 500]
    model.now = None
    monkeypatch.setattr(train, "at_step", lambda model, config, step: setattr(model, "now", step))
    names = "decoding bfloat16 causality gradients losses drafts step"
    for name in names.split():

        def look(model, *_, name=name):
            seen.setdefault(name, []).append(model.now)
            return check.Answer("")

        monkeypatch.setattr(check, name, look)
    assert len([*check.answers(model, CONFIG)]) == len(seen) == 7
    assert [name for name in seen if seen[name] == twice] == ["causality", "gradients", "losses"]
    assert model.now is None and sum(x == [None] for x in seen.values()) == 4


@pytest.mark.parametrize("step", [0, 500])
def test_a_look_ahead_in_a_part_of_the_run_is_found(step, monkeypatch):
    def at_step(model, config, now):
        model.layers[1].ahead = now == step

    monkeypatch.setattr(train, "at_step", at_step)
    model = tiny()
    changed(model.layers[1], lambda module, x: x + module.ahead * x.roll(-1, 1))
    answer = check.in_a_run(lambda network, now: causality(network, 40), model, CONFIG)
    assert "main model, in evaluation: position 18 sees" in answer.wrong[0]
    assert answer.summary.endswith("of the batch" + " (in step 500 of 1000)" * (step > 0))
    found = [check.Answer("", ["mistake"]), check.Answer("", [], ["one note", "and another"])]
    assert check.in_a_run(lambda network, now: found[now > 0], model, CONFIG) is found[0]


class Unsaved(torch.optim.SGD):
    """Half of its state is no state."""

    def step(self):
        self.steps = getattr(self, "steps", 0) + 1
        for group in self.param_groups:
            group["lr"] *= 1 / self.steps
        super().step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimisers_of_train_py_are_right(optimizer):
    """Also of a network whose gates have counted before."""
    model = tiny().train()
    model(tokens_of(model, 2, 8))
    answer = check.step(model, TrainConfig(block_size=16, optimizer=optimizer))
    assert not answer.wrong and not answer.notes


def test_optimisers_that_are_wrong_are_found(monkeypatch):
    """One that forgets, and one that lacks a parameter."""
    model = tiny()
    monkeypatch.setattr(train, "make_optimizers", lambda model, _: [Unsaved(model.parameters(), 1)])
    wrong = check.step(model, CONFIG).wrong
    assert len(wrong) == 1 and wrong[0].startswith("resumed: ") and "['Unsaved 0']" in wrong[0]
    few = lambda model, _: [torch.optim.SGD([*model.parameters()][1:], 0.1)]  # noqa: E731
    monkeypatch.setattr(train, "make_optimizers", few)
    assert check.step(model, CONFIG).wrong == ["embed_tokens.weight is in no optimiser"]


def test_nan_in_a_saved_state_is_a_difference():
    saved = {"weight": torch.tensor([1.0, math.nan])}
    assert check.differences(saved, saved) == "1 of 1 differ, above all weight, by nan of its norm"


class Coarse(torch.optim.SGD):
    dtype = torch.bfloat16

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["mean"] = p.grad.to(self.dtype)
        super().step()


def test_a_moment_in_16_bits_is_named(monkeypatch, tmp_path):
    """In the four steps, or in the checkpoint of a run whose products had 16 bits."""
    make = lambda model, _: [Coarse(model.parameters(), 0.1)]  # noqa: E731
    monkeypatch.setattr(train, "make_optimizers", make)
    (note,) = check.step(tiny(), CONFIG).notes
    assert note.startswith("['Coarse 0']['state']['embed_tokens.weight']['mean'] and ")
    assert note.endswith("bfloat16, in which updates of less than about 1/256 of a number are lost")
    monkeypatch.setattr(Coarse, "dtype", torch.float64)
    assert not check.step(tiny(), CONFIG, tmp_path).notes
    state = {"state": {"x": {"mean": torch.zeros(2, dtype=torch.float16)}}}
    torch.save({"model_config": {}, "Coarse 0": state}, tmp_path / "ckpt.pt")
    (note,) = check.step(tiny(), CONFIG, tmp_path).notes
    assert "['mean'] in ckpt.pt: float16, in which updates of less than about 1/2048" in note


def test_other_weights_in_best_pt_than_were_evaluated_are_found(monkeypatch):
    """As if a schedule-free optimiser were set to evaluation for the evaluation alone."""
    evaluate = train.evaluate

    def of_other_weights(model, *rest):
        weight = model.lm_head.weight.detach().clone()
        model.lm_head.weight.data.mul_(0.9)
        found = evaluate(model, *rest)
        model.lm_head.weight.data.copy_(weight)
        return found

    monkeypatch.setattr(train, "evaluate", of_other_weights)
    (wrong,) = check.step(tiny(), CONFIG).wrong
    assert wrong.startswith("best.pt does not hold the evaluated weights: its loss is ")


# ---- Drafts --------------------------------------------------------------------------------------


def test_drafts_that_change_the_text_are_found(monkeypatch):
    def accept_all(p, q, x, u):
        return x.new_full((len(p),), x.shape[1]), p[:, -1:].argmax(-1)

    model = tiny()
    assert not drafts(model).wrong
    monkeypatch.setattr(check.sample, "accept", accept_all)
    wrong = drafts(model).wrong
    assert len(wrong) == 5 and "with 4 drafts per round the text differs from token " in wrong[3]
    assert wrong[4] == "drawn after a draft, tokens are not the model's (by chance: 0e+00)"

    def write_the_unlikeliest(p, q, x, u):
        return x.new_zeros(len(p)), p[:, :1].argmin(-1)

    monkeypatch.setattr(check.sample, "accept", write_the_unlikeliest)  # in every round
    assert [int(line.split()[1]) for line in drafts(model).wrong[:-1]] == [0, 1, 2, 3, 4]


def test_a_draft_that_is_dropped_after_it_was_drawn_changes_the_distribution(monkeypatch):
    """Dropped before, or for what an earlier draft was, it does not: a round may have fewer."""
    draft = check.sample.Text.draft

    def confident(text, n, u, drop=None):
        q = draft(text, n, u)  # (B, G, V)
        if not q.shape[1]:
            return q
        sure = q[:, 0].gather(1, text.tokens[:, n, None]) > q[:, 0].amax(-1) / 2
        return q if sure.all() else q[:, : 0 if drop == "first" else 1]

    model = student(1)
    monkeypatch.setattr(check.sample.Text, "draft", confident)
    assert not drafts(model).wrong
    dropping = functools.partialmethod(confident, drop="first")
    monkeypatch.setattr(check.sample.Text, "draft", dropping)
    (wrong,) = drafts(model).wrong
    assert wrong.startswith("drawn after a draft, tokens are not the model's (by chance: ")


@pytest.mark.parametrize("everywhere", [True, False])
def test_another_rule_of_sampling_is_right_if_the_plain_loop_has_it_too(everywhere, monkeypatch):
    """Min-p (arXiv 2407.01082): in `probabilities` it is right, after drafts alone it is wrong."""
    probabilities, accept = check.sample.probabilities, check.sample.accept

    def cut(p):
        return p.masked_fill(p < 0.2 * p.amax(-1, keepdim=True), 0)

    if everywhere:
        normed = lambda p: p / p.sum(-1, keepdim=True)  # noqa: E731
        monkeypatch.setattr(
            check.sample, "probabilities", lambda *rest: normed(cut(probabilities(*rest)))
        )
    else:
        monkeypatch.setattr(check.sample, "accept", lambda p, *rest: accept(cut(p), *rest))
    wrong = drafts(student(1)).wrong
    assert [line[:18] for line in wrong] == ([] if everywhere else ["drawn after a draf"])


def test_an_error_in_a_check_is_its_answer_and_the_others_still_run(monkeypatch):
    def broken(data, config, step):
        return data.tokenizer.nothing

    monkeypatch.setattr(train, "train_windows", broken)
    found = [*check.answers(tiny(), CONFIG, 16, tokenizer=Tokenizer(None, {}, {}, [0]))]
    assert [bool(answer.wrong) for answer in found] == 6 * [False] + [True]
    assert found[-1].wrong[-1] == "AttributeError: 'Tokenizer' object has no attribute 'nothing'"
    assert any("test_check.py" in line for line in found[-1].wrong)


def test_what_happens_every_few_steps_needs_as_many(monkeypatch):
    """An optimiser that changes something every third step, by a counter that it does not save."""

    class Refreshing(torch.optim.SGD):
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps % 3 == 0:
                self.param_groups[0]["params"][0].data.mul_(1.01)
            return super().step()

    monkeypatch.setattr(
        train, "make_optimizers", lambda model, _: [Refreshing(model.parameters(), 0.1)]
    )
    assert not check.step(tiny(), CONFIG, steps=2).wrong
    assert check.step(tiny(), CONFIG, steps=8).wrong[0].startswith("resumed: ")


def test_weights_that_only_evaluations_see_are_compared_after_a_resume(monkeypatch):
    """An average of the weights that is in no state: checkpoints agree, their losses do not."""
    evaluate, average = train.evaluate, {}

    def of_the_average(model, *rest):
        weight = model.lm_head.weight
        mean = average.setdefault(id(model), weight.detach().clone())
        mean.lerp_(weight.detach(), 0.5)
        now, weight.data = weight.data, mean.clone()
        found = evaluate(model, *rest)
        weight.data = now
        return found

    monkeypatch.setattr(train, "evaluate", of_the_average)
    assert any("val_loss" in x for x in check.step(tiny(), CONFIG).wrong)
