"""What you edit is what runs: edited formulas of model.py train and decode as edited, although the
unedited ones have fast copies in ops.py and fp8.py. What cannot decode rightly is refused."""

import functools
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import MethodType, ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_model import TINY, in_bf16, tokens_of, value_and_gradients
from torch import nn

import fp8
import model as plain
import sample
from huggingface import model_code
from support import ops

SOURCE = (Path(__file__).parent.parent / "model.py").read_text(encoding="utf-8")
CONFIG = TINY | dict(max_position_embeddings=200)

# Pairs of an old text and a new one. These change training and decoding alike.
CAP = "0.1 * ({} / 0.1).tanh()"
SCORE, SCORE_ABSORBED = "upcast(q @ k.mT) * scale", "kv)) * self.scale  # (B, H, T, S)"
WINDOW = "later = torch.ones(T, S, dtype=torch.bool, device=kv.device).triu(S - T + 1)"
EDITS = {
    "soft cap on the scores": [
        (SCORE, CAP.format(SCORE)),
        (SCORE_ABSORBED, "kv)) * self.scale\n        score = " + CAP.format("score")),
    ],
    "window of 40 tokens": [
        ("device=q.device).triu(1)", "device=q.device); later = later.triu(1) | later.tril(-40)"),
        (WINDOW, WINDOW + "; later |= torch.ones_like(later).tril(S - T - 40)"),
    ],
    "half the softmax scale": [
        ("for x in (q, k, v)), self.scale)", "for x in (q, k, v)), self.scale / 2)"),
        (SCORE_ABSORBED, "kv)) * self.scale / 2"),
    ],
    "squared ReLU": [("y = F.silu(gate) * up", "y = F.relu(gate).square() * up")],
    "combine times 0.5": [("sum(1, dtype=y.dtype)", "sum(1, dtype=y.dtype) * 0.5")],
    "FFN times 0.7": [("return x + y, routing", "return x + 0.7 * y, routing")],
    "no gate values": [("y if gain is None else y * gain[:, None].to(y.dtype)", "y")],
    "norms without weights": [("self.weight * rms_norm(", "1.0 * rms_norm(")],
    "another rotation": [("a * cos - b * sin", "a * cos + 2 * b * sin")],
    "a softmax gate": [("upcast(self.weight)).sigmoid()", "upcast(self.weight)).softmax(-1)")],
}
TOKENS = "dispatch(x.flatten(0, 1), rows, slots)"
IN_TRAINING = {
    # Twins may take nothing for granted that is edited.
    "fewer experts in the sum": [("combine(y, rows, slots)", "combine(y, rows, slots[:, :-1])")],
    "rows in another order": [
        (TOKENS, "dispatch(x.flatten(0, 1), rows.flip(0), slots).flip(0) / 2"),
    ],
    "other scores": [
        ("compute_dtype, edited, fast_twin, upcast", "compute_dtype, edited, fast_twin"),
        ("Rope = tuple[", "def upcast(x):\n    return x.clamp(-2, 2)\n\n\nRope = tuple["),
    ],
    "a decorated loss": [
        ("@fast_twin\ndef head_loss(", "@fast_twin\n@halved\ndef head_loss("),
        (
            "Rope = tuple[",
            "import functools\n\n\ndef halved(f):\n    @functools.wraps(f)\n    def half(*args):\n"
            "        return f(*args) / 2\n\n    return half\n\n\nRope = tuple[",
        ),
    ],
    "label smoothing": [('reduction="sum")', 'reduction="sum", label_smoothing=0.1)')],
    "MTP's embedding doubled": [("self.enorm(embedding), self", "2 * self.enorm(embedding), self")],
}
# In one form of attention alone, or with a look at tokens that no cache holds.
BROKEN = {
    "QK norm": [
        ("o = causal_attention(", "q = rms_norm(q, 1e-6)\n        o = causal_attention("),
    ],
    "scale of decoding": [(SCORE_ABSORBED, "kv)) * self.scale * 1.01")],
    "window of 99 tokens": [
        ("device=q.device).triu(1)", "device=q.device); later = later.triu(1) | later.tril(-99)"),
    ],
    "a gate that looks back": [
        ("F.linear(upcast(x), upcast", "F.linear(upcast(x + F.pad(x, (0, 0, 1, -1))), upcast"),
    ],
    "logits in forward alone": [
        ("logits = [self.logits(h) for h", "logits = [3 * self.logits(h) for h"),
    ],
    "a state that drafts spoil": [
        (
            "        y = self.mlp(",
            "        start = past[1] if past else 0\n"
            "        before = self.last if start else torch.zeros_like(x[:, :1])\n"
            "        self.last = x[:, -1:]\n"
            "        x = x + torch.cat((before, x[:, :-1]), 1)\n"
            "        y = self.mlp(",
        ),
    ],
    "token shift": [
        (
            "        y = self.mlp(",
            "        x = x + F.pad(x, (0, 0, 1, -1))\n        y = self.mlp(",
        ),
    ],
}


def edited(folder: Path, changes: list[tuple[str, str]]) -> ModuleType:
    """model.py with these changes, as a module of its own."""
    text = SOURCE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return module_of(folder, text)


def module_of(folder: Path, text: str) -> ModuleType:
    file = folder / f"edit_{len(list(folder.iterdir()))}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_a_checkpoint_knows_whether_formulas_have_changed_and_overlooks_comments(tmp_path):
    code = [model_code(edited(tmp_path, changes)) for changes in ([], *EDITS.values())]
    assert len(set(code)) == len(code) and code[0] == model_code()
    text = "# a comment\n\n" + SOURCE.replace('"""x / sqrt(', '"""The norm: x / sqrt(')
    text = text.replace("  # (B, T, D)", "  # [batch, time, width]")
    assert text.count("[batch") > 3 and model_code(module_of(tmp_path, text)) == code[0]


def test_that_mark_is_of_model_py_alone(tmp_path):
    """Not of what another Python or torch has written into its classes."""
    seen = []

    def listen(codes):
        seen.extend(codes)
        return ops.fingerprint_of(codes)

    with mock.patch("huggingface.fingerprint_of", listen):
        assert model_code() == model_code()
    assert len(seen) > 40 and {code.co_filename for code in seen} == {plain.__file__}


def network(module: ModuleType, dtype=torch.float64, **changes) -> nn.Module:
    """The same random weights whatever the module."""
    torch.manual_seed(0)
    model = module.DeepSeekV3(module.ModelConfig(**CONFIG | changes)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1.5 * p.shape[-1] ** -0.5) if p.ndim > 1 else p.normal_(1, 0.2)
    return model.eval()


def losses_and_gradients(model: nn.Module) -> torch.Tensor:
    tokens = tokens_of(model, 2, 60)
    model.zero_grad()
    losses = torch.stack(model.train()(tokens, tokens))
    losses.sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat((losses.detach(), *(x.flatten() for x in grads)))


def is_the_models_text(model: nn.Module, T: int = 20, new: int = 60, **options) -> bool:
    text = sample.generate(model, tokens_of(model, 1, T), new, temperature=0, **options)
    with torch.no_grad():
        return torch.equal(text[0, T:], model(text)[0, T - 1 : -1].argmax(-1))


@pytest.fixture(autouse=True)
def said_anew():
    """Every test hears the notices that are given once."""
    ops.tell.cache_clear()


# ---- Fingerprints --------------------------------------------------------------------------------


def test_every_copy_is_of_todays_formula():
    """If this fails you have edited a formula: edit its copy alike and run `python ops.py`."""
    assert ops.edited(vars(plain), ops.FINGERPRINTS) == []


def test_a_fingerprint_is_of_the_code_alone(tmp_path):
    text = 'def f(x):\n    "doc"\n    # why\n    if x:\n        y = {"a": f"{x} b"}\n    return y\n'
    same = '@mark\ndef f( x ):\n  if x:\n    y = {"a":  # c\n  f"{x} b"}\n\n  return y\n'
    edits = [('"a"', '"b"'), ("    return", "        return"), ("{x}", "{y}"), (" b", "b")]
    found = [
        ops.fingerprint(module_of(tmp_path, "mark = lambda f: f\n" + source).f)
        for source in (text, same, *(text.replace(*edit) for edit in edits))
    ]
    assert found[0] == found[1] == "c24a9e27"  # under every Python from 3.10 on
    assert len(set(found[:5])) == 4
    assert ops.fingerprint(len) == ops.fingerprint(None) == "unknown"


# ---- Files of model.py that were edited ----------------------------------------------------------


@pytest.mark.parametrize("name", EDITS | IN_TRAINING)
def test_an_edit_trains_as_the_formulas_say(name, tmp_path, monkeypatch, capsys):
    model = network(edited(tmp_path, (EDITS | IN_TRAINING)[name]))
    notice = capsys.readouterr().err
    assert notice.count("\n") == notice.count("the formula runs instead") <= 1
    ours, unedited = losses_and_gradients(model), losses_and_gradients(network(plain))
    monkeypatch.setattr(ops, "enabled", False)
    assert (ours - losses_and_gradients(model)).norm() < 1e-10 * ours.norm()
    assert (ours - unedited).norm() > 0.01 * unedited.norm()


ATTENTION = "        x = x + self.self_attn("
CALL = "            x = self.run_block(block,"
DROPPED = {
    "in its block": (ATTENTION, f"        if DROP():\n            return x, None\n{ATTENTION}"),
    "in the trunk": (CALL, f"            if DROP():\n                continue\n{CALL}"),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("place", DROPPED)
def test_layers_may_be_dropped_at_random(place, recompute, tmp_path):
    """Whatever ran before it, a layer's choices are counted in its own row."""
    module, seen = edited(tmp_path, [DROPPED[place]]), {}
    module.DROP = lambda: torch.rand(()) < 0.4
    model = network(module).train()
    model.recompute = recompute

    for gate in model.gates():
        gate.register_forward_hook(lambda gate, args, out: seen.update({gate: out[1]}))
    expected, ran = torch.zeros_like(model.expert_counts), set()
    for seed in range(9):
        tokens = tokens_of(model, 2, 20, seed=seed)
        seen.clear()
        loss = sum(model(tokens, tokens))
        for row, gate in zip(expected, model.gates(), strict=True):
            row += seen[gate].flatten().bincount(minlength=8) if gate in seen else 0
        loss.backward()
        ran.add(len(seen))
    assert torch.equal(model.expert_counts, expected) and len(ran) > 1


@pytest.mark.parametrize("name", ["squared ReLU", "combine times 0.5", "no gate values"])
def test_edited_experts_train_in_bf16_as_the_formulas_say(name, tmp_path, monkeypatch):
    """There twins pad the experts' rows. 2 %: three bf16 roundings in a row."""
    moe = network(edited(tmp_path, EDITS[name]), torch.float32).layers[1].mlp
    args = lambda x: moe(x)[0], (torch.randn(1, 50, 16),), list(moe.experts.parameters())
    ours = in_bf16(value_and_gradients, *args)
    monkeypatch.setattr(ops, "enabled", False)
    for a, b in zip(ours, value_and_gradients(*args), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_decodes_as_the_formulas_say(name, tmp_path, capsys):
    """One token at a time, and several with drafts. One notice for many texts."""
    model = network(edited(tmp_path, EDITS[name]))
    assert not torch.equal(model(tokens := tokens_of(model, 1, 80)), network(plain)(tokens))
    capsys.readouterr()
    for drafts in (0, 3):
        assert is_the_models_text(model, speculative=drafts)
    notice = capsys.readouterr().err
    assert notice.count("\n") == notice.count("so model.py decodes, slower") == 1


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_two_forms_that_differ_do_not_decode(name, large, tmp_path, monkeypatch):
    """A model too large to be copied in float64 is compared as it is, by its median error."""
    model = network(edited(tmp_path, BROKEN[name]))
    monkeypatch.setattr(sample, "COPIED_TO_FLOAT64", 0 if large else 2**28)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"other logits than without .* alike; and no layer"):
            sample.generate(model, tokens_of(model, 1, 20), 5)


def test_two_forms_of_a_young_network_do_not_decode_either(tmp_path):
    """Its scores are so small that a cap on them changes no logit by more than 1e-6."""
    model = edited(tmp_path, EDITS["soft cap on the scores"][:1])
    cap = module_of(tmp_path, Path(model.__file__).read_text().replace("0.1", "20"))
    young = cap.DeepSeekV3(cap.ModelConfig(**CONFIG)).eval()
    with pytest.raises(ValueError, match="alike; and no layer"):
        sample.generate(young, tokens_of(young, 1, 20), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_of_forms(dtype, tmp_path):
    """A routed bf16 network's logits differ by far more than 1e-4; its float64 copy's do not."""
    model = network(edited(tmp_path, EDITS["FFN times 0.7"]), dtype)
    out = sample.generate(model, tokens_of(model, 1, 20), 5, temperature=0)
    assert out.shape == (1, 25) and model.norm.weight.dtype == dtype


@pytest.mark.parametrize(
    "old, new, formula",
    [
        (*EDITS["squared ReLU"][0], "swiglu"),
        ("return self.down_proj(swiglu(", "return 2 * self.down_proj(swiglu(", "MLP"),
        ("return grouped_linear(swiglu(", "return 2 * grouped_linear(swiglu(", "Experts"),
        ("y = F.silu(gate) * up", "y = F.silu(gate) * up  # no edit", None),
    ],
)
def test_fp8_refuses_formulas_that_it_does_not_copy(old, new, formula, tmp_path):
    model = network(edited(tmp_path, [(old, new)]), torch.float32)
    if formula:
        with pytest.raises(ValueError, match=rf"model\.{formula} is not the one that fp8\.py"):
            model.use_fp8()
    else:
        model.use_fp8()
    assert any(isinstance(m, fp8.FP8Linear) for m in model.modules()) == (formula is None)


@pytest.mark.parametrize("name", ["a softmax gate", "label smoothing"])
def test_an_export_of_an_edited_network_says_so(name, tmp_path, capsys):
    (tmp_path / "code").mkdir()
    module = edited(tmp_path / "code", (EDITS | IN_TRAINING)[name])
    capsys.readouterr()
    network(module).save_pretrained(tmp_path / "hf")
    said = capsys.readouterr().err
    assert ("model.Gate is not DeepSeek-V3's" in said) == (name == "a softmax gate") == bool(said)


# ---- Patches at run time, before a text or after one ---------------------------------------------


class Halved(plain.RMSNorm):
    def forward(self, x):
        return super().forward(x) / 2


def put_in_a_class(model, monkeypatch):
    model.layers[1].input_layernorm.__class__ = Halved


def patch_a_class(model, monkeypatch):
    forward = plain.MoE.forward

    def tripled(moe, x):
        y, routing = forward(moe, x)
        return 3 * y, routing

    monkeypatch.setattr(plain.MoE, "forward", tripled)


def patch_a_function(model, monkeypatch):
    rotate = plain.rotate
    monkeypatch.setattr(plain, "rotate", lambda x, rope, pairs: rotate(x, rope[::-1], pairs))


def patch_an_instance(model, monkeypatch):
    mlp = model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), mlp)


def patch_the_model(model, monkeypatch):
    trunk = model.trunk
    model.trunk = lambda tokens, cache=None: trunk(tokens, cache).flip(-1)


def put_in_a_hook(model, monkeypatch):
    model.layers[2].mlp.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))


def give_a_bias(model, monkeypatch):
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, len(model.lm_head.weight)).double())


def wrap_a_function(model, monkeypatch):
    rotate = plain.rotate

    @functools.wraps(rotate)
    def half_turned(x, rope, interleave):
        return rotate(x, (rope[0], rope[1] / 2), interleave)

    monkeypatch.setattr(plain, "rotate", half_turned)


def wrap_a_twin(model, monkeypatch):
    linear = plain.grouped_linear

    @functools.wraps(linear)
    def doubled(*args):
        return 2 * linear(*args)

    monkeypatch.setattr(plain, "grouped_linear", doubled)


def exchange_code(model, monkeypatch):
    def swiglu(gate, up, gain=None):
        y = gate.relu() * up
        return y if gain is None else y * gain[:, None]

    monkeypatch.setattr(plain.swiglu, "__code__", swiglu.__code__)


def change_the_eps_of_a_norm(model, monkeypatch):
    model.layers[1].input_layernorm.eps = 0.3


def change_the_config_of_a_layer(model, monkeypatch):
    attention = model.layers[1].self_attn
    attention.config = replace(attention.config, rope_interleave=False)


def renormalise_the_embedding(model, monkeypatch):
    model.embed_tokens.max_norm = 0.5


def put_in_a_layer(model, monkeypatch):
    model.layers.append(model.layers[2])


def take_another_gate(model, monkeypatch):
    gate = plain.Gate.forward

    def squared(self, x):
        s, chosen, weight = gate(self, x)
        return s, chosen, weight**2

    monkeypatch.setattr(plain.Gate, "forward", squared)


def change_weights_unseen(model, monkeypatch):
    model.lm_head.weight.data.neg_()


@pytest.mark.parametrize("after", [False, True], ids=["at once", "after a text"])
@pytest.mark.parametrize(
    "patch, copied",
    [
        (put_in_a_class, False),
        (patch_a_class, False),
        (patch_a_function, False),
        (patch_an_instance, False),
        (patch_the_model, False),
        (put_in_a_hook, False),
        (give_a_bias, False),
        (wrap_a_function, False),
        (wrap_a_twin, False),
        (exchange_code, False),
        (change_the_eps_of_a_norm, False),
        (change_the_config_of_a_layer, False),
        (renormalise_the_embedding, False),
        (take_another_gate, False),
        (put_in_a_layer, True),
        (change_weights_unseen, True),
    ],
)
def test_a_patch_decodes_as_patched(patch, copied, after, monkeypatch, capsys):
    model = network(plain)
    before = model(tokens_of(model, 1, 20))
    if after:
        assert is_the_models_text(model) and capsys.readouterr().err == ""
    patch(model, monkeypatch)
    assert not torch.equal(model(tokens_of(model, 1, 20)), before)
    for _ in range(2):
        assert is_the_models_text(model)
    said = capsys.readouterr().err
    assert said.count("so model.py decodes, slower") == (not copied)
    assert said.count("\n") == said.count(" copies")


def test_a_second_patch_is_compared_too(monkeypatch):
    """The first is harmless; the second, of the same method, needs tokens that no cache holds."""
    model, forward = network(plain), plain.Block.forward

    def scaled(self, x, *args):
        x, routing = forward(self, x, *args)
        return 0.9 * x, routing

    monkeypatch.setattr(plain.Block, "forward", scaled)
    assert is_the_models_text(model)

    def shifted(self, x, *args):
        return forward(self, x + F.pad(x, (0, 0, 1, -1)), *args)

    monkeypatch.setattr(plain.Block, "forward", shifted)
    with pytest.raises(ValueError, match="no layer may look at tokens"):
        sample.generate(model, tokens_of(model, 1, 20), 5)


def test_a_patch_that_knows_only_float32_is_compared_in_float32():
    model = network(plain, torch.float32)
    mlp, weight = model.layers[0].mlp, torch.eye(16)
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) @ weight * 2
    assert is_the_models_text(model, new=20)


@pytest.mark.parametrize("context", [1, 2, 9])
def test_an_edited_network_decodes_in_a_context_of_few_tokens(context, tmp_path):
    model = edited(tmp_path, EDITS["FFN times 0.7"])
    model = network(model, max_position_embeddings=context)
    text = sample.generate(model, tokens_of(model, 1, 1), 9, temperature=0)
    assert text.shape == (1, context)


def test_an_fp8_network_decodes_by_its_own_products(capsys):
    model = network(plain, torch.float32)
    model.use_fp8()
    sample.generate(model, tokens_of(model, 1, 20), 5, temperature=0)
    assert "the class FP8" in capsys.readouterr().err


def test_fp8_leaves_an_mlp_alone_whose_projection_is_of_another_class():
    """FP8MLP would multiply by its weight and pass over what else it does."""
    model = network(plain, torch.float32)
    mlp = model.layers[0].mlp
    mlp.down_proj.__class__ = type("Adapted", (nn.Linear,), {})
    model.use_fp8()
    assert type(mlp) is plain.MLP and type(mlp.gate_proj) is fp8.FP8Linear


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.full((2, 1, 1), 0.3)])
def test_attention_takes_a_learnt_scale_as_its_formula_does(scale):
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    assert torch.equal(
        plain.causal_attention(q, k, v, scale), plain.causal_attention.formula(q, k, v, scale)
    )


def test_a_mark_without_a_twin_is_refused():
    with pytest.raises(ValueError, match="no twin of rms_norm"):
        ops.fast_twin(plain.rms_norm)


def test_twins_take_named_arguments_as_their_formulas_do():
    h, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([1, 2, -1, 0])
    assert torch.allclose(plain.head_loss(h, w, targets=y), plain.head_loss(h, w, y))


def test_dropout_is_recomputed_with_the_same_numbers():
    model = network(plain)
    for block in model.layers:
        block.register_forward_hook(lambda module, args, out: (F.dropout(out[0], 0.5), out[1]))
    torch.manual_seed(3)
    expected = losses_and_gradients(model)
    model.recompute = True
    torch.manual_seed(3)
    assert torch.equal(losses_and_gradients(model), expected)


def test_a_replaced_partner_of_a_twin_is_followed(monkeypatch):
    """dispatch's fast gradient needs the slots of sort_by_expert; another's may leave rows out."""
    x = torch.randn(5, 3, requires_grad=True)
    rows, slots, _ = plain.sort_by_expert(torch.tensor([[0, 1]] * 5), 2)
    slots = slots.flip(0)  # not where the rows are
    monkeypatch.setattr(plain, "sort_by_expert", None)
    plain.dispatch(x, rows, slots)[0].sum().backward()  # of the first row alone
    assert x.grad.abs().sum(1).tolist() == [3, 0, 0, 0, 0]


def test_extra_rows_get_no_gradient():
    """Rows that a twin adds are no token's, whatever the experts do with them."""
    chosen = torch.tensor([[2, 0], [0, 1], [2, 1]])

    def gradient() -> torch.Tensor:
        rows, slots, _ = plain.sort_by_expert(chosen, 3)
        y = torch.ones(len(rows), 4, requires_grad=True)
        plain.combine(y, rows, slots).sum().backward()
        return y.grad.sum(1)

    expected = torch.zeros(3, 64)
    expected[:, :2] = 4
    assert torch.equal(in_bf16(gradient), expected.flatten()) and gradient().tolist() == [4] * 6
