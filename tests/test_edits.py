"""What you edit is what runs: an edited formula of model.py trains and decodes as edited, although
the unedited one has a fast twin in ops.py or a copy in fp8.py."""

import ast
import functools
import importlib.util
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_model import TINY, tokens_of
from torch import nn

import fp8
import model as plain
import sample
from support import graphs, ops
from support.settings import Refusal

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "model.py").read_text(encoding="utf-8")
CONFIG = TINY | dict(max_position_embeddings=200)

# The first word is a function (or Class.method) of model.py. What stands here takes its place,
# below its mark, and may call it as `unedited`.
EDITS = {
    "causal_attention in a window of 40 tokens": """
        def causal_attention(q, k, v, scale, start=None):
            T, S = q.shape[2], k.shape[2]
            ahead = torch.arange(S) - torch.arange(T)[:, None] - (S - T if start is None else start)
            score = upcast(q @ k.mT) * scale
            return score.masked_fill((ahead > 0) | (ahead <= -40), -math.inf).softmax(-1) @ v
        """,
    "head_logits with a soft cap": """
        def head_logits(h, weight):
            return 3 * (unedited(h, weight) / 3).tanh()
        """,
    "swiglu of a squared ReLU": """
        def swiglu(gate, up, gain=None):
            y = F.relu(gate).square() * up
            return y if gain is None else y * cast(gain, y.dtype)[:, None]
        """,
    "routed_ffn times 0.5": """
        def routed_ffn(x, chosen, gain, gate_up, down, swiglu):
            return 0.5 * unedited(x, chosen, gain, gate_up, down, swiglu)
        """,
    "rms_norm without signs": """
        def rms_norm(x, weight, eps):
            return unedited(x, weight, eps).abs()
        """,
    "rotate to another ellipse": """
        def rotate(x, rope, interleave):
            return unedited(x, (rope[0], 2 * rope[1]), interleave)
        """,
    "head_loss with label smoothing": """
        def head_loss(h, weight, targets):
            return F.cross_entropy(head_logits(h, weight), targets, label_smoothing=0.1)
        """,
    "Block.forward times 0.7": """
        def forward(self, x, rope, past=None):
            y, routing = self.unedited(x, rope, past)
            return 0.7 * y, routing
        """,
}


def twins_lost(edit: str) -> list[str]:
    name, *_ = edit.split()
    return {"head_logits": ["head_logits", "head_loss"], "Block.forward": []}.get(name, [name])


def rewritten(edit: str, new: str = "") -> str:
    """model.py with `new`, or what EDITS has, in place of a function or method, whatever its text
    is today."""
    new = textwrap.dedent(new or EDITS[edit]).lstrip()
    outer, _, method = edit.split()[0].partition(".")
    (node,) = (x for x in ast.parse(SOURCE).body if getattr(x, "name", "") == outer)
    if method:
        (node,) = (x for x in node.body if getattr(x, "name", "") == method)
        new = textwrap.indent(new, "    ")
    lines = SOURCE.splitlines(keepends=True)
    begin = min(x.lineno for x in (node, *node.decorator_list)) - 1
    mark = "".join(lines[begin : node.lineno - 1])
    old = "".join(lines[node.lineno - 1 : node.end_lineno])
    unedited = old.replace(f"def {node.name}(", "def unedited(", 1)
    return "".join((*lines[:begin], f"{unedited}\n\n{mark}{new}", *lines[node.end_lineno :]))


def module_of(folder: Path, text: str) -> ModuleType:
    """The text as a module of its own."""
    file = folder / f"edit_{len(list(folder.iterdir()))}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def network(module: ModuleType, dtype=torch.float64) -> nn.Module:
    """The same random weights whatever the module."""
    torch.manual_seed(0)
    model = module.DeepSeekV3(module.ModelConfig(**CONFIG)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1.5 * p.shape[-1] ** -0.5) if p.ndim > 1 else p.normal_(1, 0.2)
    return model.eval()


def losses_and_gradients(model: nn.Module) -> torch.Tensor:
    tokens = tokens_of(model, 2, 60)
    model.zero_grad()
    losses = torch.stack([*model.train()(tokens, tokens).values()])
    losses.sum().backward()
    return torch.cat((losses.detach(), *(p.grad.flatten() for p in model.parameters())))


def is_the_models_text(model: nn.Module, T: int = 20, new: int = 60, **options) -> bool:
    text = sample.generate(model, tokens_of(model, 1, T), new, temperature=0, **options)
    with torch.no_grad():
        return torch.equal(text[0, T:], model(text)[0, T - 1 : -1].argmax(-1))


# ---- The digits ----------------------------------------------------------------------------------


# ---- Files of model.py that were edited ----------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_trains_as_the_formulas_say(edit, tmp_path, monkeypatch, capsys):
    model = network(module_of(tmp_path, rewritten(edit)))
    said, lost = capsys.readouterr().err, twins_lost(edit)
    assert said.count("\n") == said.count("it runs without its fast twin") == len(lost)
    assert all(twin in said for twin in lost)
    ours, unedited = losses_and_gradients(model), losses_and_gradients(network(plain))
    monkeypatch.setattr(ops, "enabled", False)
    assert (ours - losses_and_gradients(model)).norm() < 1e-10 * ours.norm()
    assert (ours - unedited).norm() > 0.01 * unedited.norm()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_decodes_as_the_formulas_say(edit, tmp_path):
    """One token at a time, and several with drafts."""
    model = network(module_of(tmp_path, rewritten(edit)))
    same = torch.equal(model(tokens := tokens_of(model, 1, 80)), network(plain)(tokens))
    assert same == edit.startswith("head_loss")
    for drafts in (0, 3):
        assert is_the_models_text(model, speculative=drafts)


# ---- FP8 -----------------------------------------------------------------------------------------


DOUBLED = "def forward(self, {0}):\n    return 2 * self.unedited({0})\n"


@pytest.mark.parametrize(
    ("edit", "new"),
    [
        ("swiglu of a squared ReLU", ""),
        ("routed_ffn times 0.5", ""),
        ("MLP.forward", DOUBLED.format("x")),
        ("Experts.forward", DOUBLED.format("x, chosen, gain")),
    ],
)
def test_fp8_is_refused_where_its_formulas_are_edited(edit, new, tmp_path, monkeypatch):
    module = module_of(tmp_path, rewritten(edit, new))
    monkeypatch.setattr(fp8, "formulas", module)
    with pytest.raises(Refusal, match=rf"model\.{edit.split()[0]} is not the one that fp8\.py"):
        fp8.use_fp8(network(module, torch.float32))


# ---- Patches at run time, before a text or after one ---------------------------------------------


class Halved(plain.RMSNorm):
    def forward(self, x):
        return super().forward(x) / 2


class Convolved(nn.Module):
    """A module that nobody foresaw: a weight of three dimensions, and a bias."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.mix = mlp, nn.Conv1d(16, 16, 1).double()

    def forward(self, x):
        return self.mlp(self.mix(x.mT).mT)


def doubled(forward):
    def double(self, x):
        y = forward(self, x)
        return (2 * y[0], y[1]) if isinstance(y, tuple) else 2 * y

    return double


def half_turned(rotate):
    @functools.wraps(rotate)
    def turn(x, rope, interleave):
        return rotate(x, (rope[0], rope[1] / 2), interleave)

    return turn


PATCHES = {  # as one types them at a prompt; patch is monkeypatch.setattr
    "another class": "norm.__class__ = Halved",
    "a class's method": "patch(plain.MoE, 'forward', doubled(plain.MoE.forward))",
    "a module's method": "mlp.forward = doubled(plain.MLP.forward).__get__(mlp)",
    "a projection's method": "o_proj.forward = lambda x: 2 * x @ o_proj.weight.T",
    "the model's method": "model.trunk = lambda *args, _f=model.trunk: _f(*args).flip(-1)",
    "a hook": "mlp.register_forward_hook(lambda module, args, out: 2 * out)",
    "a bias": "o_proj.bias = nn.Parameter(torch.linspace(-3, 3, 16).double())",
    "a wrapped twin": "patch(plain, 'rotate', half_turned(plain.rotate))",
    "an attribute": "norm.eps = 0.3",
    "a setting": "attention.config = plain.ModelConfig(**CONFIG, rope_interleave=False)",
    "a module": "model.layers[0].mlp = Convolved(mlp)",
    "a layer": "model.layers.append(model.layers[2])",
    "weights, unseen by torch": "model.lm_head.weight.data.neg_()",
}


@pytest.fixture
def apply(monkeypatch):
    def apply(patch: str, model: nn.Module):
        attention, norm = model.layers[1].self_attn, model.layers[1].input_layernorm
        names = dict(model=model, norm=norm, mlp=model.layers[0].mlp, patch=monkeypatch.setattr)
        names |= dict(attention=attention, o_proj=attention.o_proj)
        exec(PATCHES[patch], globals() | names)

    return apply


@pytest.mark.parametrize("after", [False, True], ids=["at once", "after a text"])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_decodes_as_patched(patch, after, apply):
    model = network(plain)
    before = model(tokens_of(model, 1, 20))
    if after:
        assert is_the_models_text(model)
    apply(patch, model)
    assert not torch.equal(model(tokens_of(model, 1, 20)), before)
    for _ in range(2):
        assert is_the_models_text(model)


COMPILED = dict(compile=True, speculative=0, new=20)
FAST_GRAPHS = {}  # of all patches: that of the unpatched network is made once


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_decodes_as_patched_in_a_graph(patch, apply, monkeypatch):
    """A text before it leaves a graph behind; where only weights change it serves the next text.
    Graphs run operation by operation here, which needs no C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(graphs, "GRAPHS", FAST_GRAPHS)
    model = network(plain)
    assert is_the_models_text(model, **COMPILED)
    apply(patch, model)
    known = len(graphs.GRAPHS)
    assert is_the_models_text(model, **COMPILED) and is_the_models_text(model, **COMPILED)
    assert len(graphs.GRAPHS) == known + (patch != "weights, unseen by torch")


# ---- What a twin must not change -----------------------------------------------------------------


# ---- What cannot be compiled ---------------------------------------------------------------------
