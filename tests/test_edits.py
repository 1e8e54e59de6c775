"""What you edit is what runs: an edited formula of model.py trains and decodes as edited, although
the unedited one has a fast twin in ops.py or a copy in fp8.py."""

import ast
import functools
import importlib.util
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_model import TINY, in_bf16, tokens_of, value_and_gradients
from torch import nn

import fp8
import huggingface
import model as plain
import sample
import train
from support import graphs, ops, processes
from support.checkpoints import code_of, load_checkpoint
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
    "routed_ffn decorated below its mark": "{mark}@halved\n{old}",
    "rms_norm decorated above its mark": "@halved\n{mark}{old}",
}
HALVED = """
import functools

def halved(f):
    @functools.wraps(f)
    def half(*args):
        return f(*args) / 2

    return half


"""


def twins_lost(edit: str) -> list[str]:
    name, *words = edit.split()
    twins = {"head_logits": ["head_logits", "head_loss"], "Block.forward": []}
    return [] if "above" in words else twins.get(name, [name])


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
    if "{old}" in new:
        new = new.format(mark=mark, old=old)
    else:
        unedited = old.replace(f"def {node.name}(", "def unedited(", 1)
        new = f"{unedited}\n\n{mark}{new}"
    return "".join((HALVED, *lines[:begin], new, *lines[node.end_lineno :]))


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


def test_the_digits_are_those_of_todays_formulas(tmp_path, capsys):
    """If this fails you have edited a formula. A comment, a docstring or blanks are no edit."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0].value.value = "Other words."
    text = ast.unparse(tree)  # without comments, in another layout
    assert text.count("Other words.") > 30 and "#" not in text
    for source in (SOURCE, text):
        module = module_of(tmp_path, source)
        assert capsys.readouterr().err == ""
    marked = [f.__name__ for f in vars(module).values() if callable(f) and f in ops.FORMULAS]
    assert len(marked) == SOURCE.count("\n@fast_twin(") >= 6


CODE = """
def f(x, gain=1):
    "doc"
    total, u = 0, x
    for i, y in enumerate(x):
        total = total + (gain * y if (found := i) else 2)

    def inner(u):
        nonlocal total
        total += u
        return total

    parts = [inner(y) for y in y]
    key = lambda z: z.name
    try:
        import math as m
    except ImportError as error:
        print("a", error)
    return f"{total} b", sorted(parts, key=key), m, u, found, any((last := y) for y in u), last
"""
WITHOUT_EFFECT = {
    "layout": ("gain * y if (found := i) else 2)", "gain*y if (found:=i)\n  else (2))"),
    "comments": ('    "doc"\n', "    # why\n\n"),
    "type hints": ("def f(x, gain=1):", "def f(x: list, gain: int = 1) -> tuple:"),
    "a type hint of a local": ("    parts = ", "    parts: list[x] = "),
    "a decorator": ("def f(", "@mark\ndef f("),
    "all its locals": (r"\b(total|i|found|inner|parts|z|m|error|last)\b", r"its_\1"),
    "a variable of a loop": (r"\by(?= in enum| if|\])", "w"),
    "a variable of a comprehension": ("inner(y) for y in", "inner(w) for w in"),
    "one that an inner function has as a parameter": (r"\bu(?=, found| = 0|\), last)", "w"),
    "one that is called as a keyword": (r"\bkey(?= = lambda|\), m)", "by"),
}
WITH_EFFECT = {
    "a text": ('"a"', '"b"'),
    "a blank in a text": (" b", "b"),
    "a number": ("else 2", "else 3"),
    "a parameter's name": ("gain", "weight"),
    "the parameter of an inner function": (r"\bu\b", "w"),
    "a default": ("gain=1", "gain=2"),
    "an attribute": ("z.name", "z.title"),
    "another local": ("total += u", "total += gain"),
    "a local for another": ("m, u, found", "u, m, found"),
    "an outer local": ("nonlocal total\n        total +=", "nonlocal found\n        found +="),
    "a keyword": (r"sorted\(parts, key=", "sorted(parts, by="),
    "a global": ("enumerate", "zip"),
    "indentation": ("    parts = ", "        parts = "),
}


def test_a_fingerprint_is_of_what_has_an_effect(tmp_path):
    def digits(*edit: str) -> str:
        text = CODE
        if edit:
            text = re.sub(*edit, CODE) if "\\" in edit[0] else CODE.replace(*edit)
            assert text != CODE
        return ops.fingerprint(module_of(tmp_path, "mark = lambda f: f\n" + text).f)

    found = digits()
    assert found == "5f279c0b"  # under every Python from 3.10 on
    same = {name: digits(*edit) for name, edit in WITHOUT_EFFECT.items()}
    assert same == dict.fromkeys(WITHOUT_EFFECT, found)
    others = {name: digits(*edit) for name, edit in WITH_EFFECT.items()}
    assert len({found, *others.values()}) == 1 + len(others), others


@pytest.mark.parametrize(("new", "told"), [("its_total", False), ("gain", True)])
def test_a_checkpoint_of_another_model_py_is_opened_with_a_line(
    new, told, tmp_path, monkeypatch, capsys
):
    """And without one where an edit has no effect, or where the file is from before."""
    weights = ROOT / "weights/small"
    file = shutil.copytree(weights, tmp_path / "run") / "ckpt.pt"
    code = code_of(module_of(tmp_path, SOURCE + CODE).ModelConfig)
    torch.save(load_checkpoint(weights) | {"code": code}, file)
    module = module_of(tmp_path, SOURCE + re.sub(r"\btotal\b", new, CODE))
    monkeypatch.setattr(huggingface, "ModelConfig", module.ModelConfig)
    monkeypatch.setattr(huggingface, "DeepSeekV3", module.DeepSeekV3)
    capsys.readouterr()
    for path, says in ((file, told), (weights, False)):
        huggingface.load_model(path)
        assert ("was saved with another model.py" in capsys.readouterr().err) == says


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


@pytest.mark.parametrize("edit", ["swiglu of a squared ReLU", "routed_ffn times 0.5"])
def test_edited_experts_train_in_bf16_as_the_formulas_say(edit, tmp_path, monkeypatch):
    """There the twin pads the experts' rows. 2 %: three bf16 roundings in a row."""
    moe = network(module_of(tmp_path, rewritten(edit)), torch.float32).layers[1].mlp
    args = lambda x: moe(x)[0], (torch.randn(1, 50, 16),), list(moe.experts.parameters())
    ours = in_bf16(value_and_gradients, *args)
    monkeypatch.setattr(ops, "enabled", False)
    for a, b in zip(ours, value_and_gradients(*args), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_may_be_dropped_at_random(recompute, tmp_path):
    """Whatever ran before it, a layer's choices are counted in its own row. Where activations are
    computed again, the same random numbers are drawn."""
    new = """
        def forward(self, x, rope, past=None):
            return (x, None) if DROP() else self.unedited(F.dropout(x, 0.1), rope, past)
        """
    module, seen = module_of(tmp_path, rewritten("Block.forward", new)), {}
    module.DROP = lambda: torch.rand(()) < 0.4
    model = network(module).train()
    model.recompute = recompute

    for gate in model.gates():
        gate.register_forward_hook(lambda gate, args, out: seen.update({gate: out[1]}))
    expected, ran = torch.zeros_like(model.expert_counts), set()
    for seed in range(9):
        tokens = tokens_of(model, 2, 20, seed=seed)
        seen.clear()
        loss = sum(model(tokens, tokens).values())
        for row, gate in zip(expected, model.gates(), strict=True):
            row += seen[gate].flatten().bincount(minlength=8) if gate in seen else 0
        loss.backward()
        ran.add(len(seen))
    assert torch.equal(model.expert_counts, expected) and len(ran) > 1


def test_the_loss_of_the_head_uses_a_head_that_is_replaced(monkeypatch):
    """Eager, and in a graph that was compiled before."""
    h, weight, targets = torch.randn(9, 16), torch.randn(31, 16), torch.arange(9)
    ways = [lambda *args: plain.head_loss(*args), torch.compile(plain.head_loss, backend="eager")]
    before = [loss(h, weight, targets) for loss in ways]
    unedited = plain.head_logits
    monkeypatch.setattr(plain, "head_logits", lambda *args: 3 * (unedited(*args) / 3).tanh())
    expected = nn.functional.cross_entropy(plain.head_logits(h, weight), targets)
    for loss, other in zip(ways, before, strict=True):
        assert loss(h, weight, targets) == pytest.approx(expected) != pytest.approx(other)
    monkeypatch.undo()
    assert [loss(h, weight, targets) for loss in ways] == before


def test_a_formula_may_have_another_name(tmp_path, capsys):
    mark = "from support.ops import fast_twin\n\n\n@fast_twin('3f2465eb')\n"
    module = module_of(tmp_path, f"{mark}def layer_norm(x):\n    return 2 * x\n")
    assert module.layer_norm(3) == 6
    assert "layer_norm is edited (its digits are " in capsys.readouterr().err


def test_a_gate_has_one_row_however_many_layers_use_it():
    """The last block serves as the MTP module's, too, and the first MoE layer has its FFN."""
    model, calls = network(plain).train(), []
    model.mtp[0].block, model.layers[1].mlp = model.layers[2], model.layers[2].mlp
    (gate,) = model.gates()
    gate.register_forward_hook(lambda gate, args, out: calls.append(out[1]))
    tokens = tokens_of(model, 2, 20)
    model(tokens, tokens)
    assert len(calls) == 3 and model.count_rows() == [0, 0, 0]
    load = sum(x.flatten().bincount(minlength=8) for x in calls)
    assert torch.equal(model.expert_counts[0], load) and not model.expert_counts[1:].any()
    load = load.double()
    assert train.max_vio(model.expert_counts).item() == pytest.approx(load.max() / load.mean() - 1)
    model.update_bias(0.5)
    signs = (load.mean() - load).sign()
    assert torch.equal(gate.e_score_correction_bias, 0.5 * signs.float()) and signs.any()


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


def test_an_fp8_network_decodes_by_its_own_products(monkeypatch):
    """Also a text so long that plain matrices would be copied."""
    monkeypatch.setattr(ops, "LARGE", 1)
    model, forward, calls = network(plain, torch.float32), fp8.FP8Linear.forward, []
    fp8.use_fp8(model)
    monkeypatch.setattr(fp8.FP8Linear, "forward", lambda *x: calls.append(x) or forward(*x))
    sample.generate(model, tokens_of(model, 1, 20), ops.PAYS + 8, temperature=0, speculative=0)
    assert len(calls) > ops.PAYS * len(model.layers)


def test_fp8_leaves_a_gate_alone_whatever_it_contains():
    model = network(plain, torch.float32)
    gate = model.gates()[0]
    gate.hidden = nn.Sequential(nn.Linear(16, 16))
    fp8.use_fp8(model)
    assert type(gate.hidden[0]) is nn.Linear


@pytest.mark.parametrize("change", ["a class of its own", "a bias"])
def test_fp8_leaves_an_mlp_alone_whose_projection_does_more(change):
    """FP8MLP would multiply by its weight and pass over what else it does."""
    model = network(plain, torch.float32)
    mlp = model.layers[0].mlp
    if change == "a bias":
        mlp.down_proj.bias = nn.Parameter(torch.ones(16))
    else:
        mlp.down_proj.__class__ = type("Adapted", (nn.Linear,), {})
    fp8.use_fp8(model)
    assert type(mlp) is plain.MLP and type(mlp.gate_proj) is fp8.FP8Linear


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


SETTINGS = """
import functools
from collections import deque
from fractions import Fraction
from types import ModuleType, SimpleNamespace

class Cap:
    kind = "soft"
    widths = (1, 2)

    def __init__(self):
        self.value = 20

    def at(self):
        return self.value

class Fixed:
    __slots__ = "value", "unset"

class Kept:
    @functools.cached_property
    def cap(self):
        return 20

def times(factor):
    return lambda x: factor * x

table, names, function = {"cap": [20]}, {"a"}, {"cap": lambda: 20}
loops, part, number = range(3), slice(3), Fraction(1, 3)
queue, fixed, kept = deque([1]), Fixed(), Kept
fixed.value = 20
cap, method, settings, scaled = Cap(), Cap().at, SimpleNamespace(cap=20), times(20)
package = ModuleType("package")
package.inner = ModuleType("package.inner")
package.inner.cap = 20

@functools.lru_cache
def cached():
    return 20

def root():
    several = table, names, function, cap, method, settings, scaled, package.inner.cap
    return several, cached, Cap, loops, part, number, queue, fixed, kept
"""


@pytest.mark.parametrize(
    "change",
    [
        "table['cap'][0] = 30",
        "names.add('b')",
        "loops = range(9)",
        "part = slice(9)",
        "number = Fraction(2, 3)",
        "number = 2j",
        "queue.append(2)",
        "fixed.value = 30",
        "fixed.unset = 30",
        "Kept.cap.func.__code__ = (lambda self: 30).__code__",
        "function['cap'] = lambda: 30",
        "cap.value = 30",
        "method.__self__.value = 30",
        "settings.cap = 30",
        "scaled = times(30)",  # in a closure: the code is the same
        "package.inner.cap = 30",
        "cached.__wrapped__.__code__ = (lambda: 30).__code__",
        "Cap.kind = 'hard'",
        "Cap.widths = (1, 3)",
        "Cap.at = functools.partial(Cap.at, 1)",
    ],
)
def test_a_graph_depends_on_what_its_code_is_set_to(change):
    namespace = {"__name__": "edited"}
    exec(SETTINGS, namespace)
    root = namespace["root"]
    before = graphs.what_runs(root)
    exec(SETTINGS, namespace)  # as a file that is read again
    assert graphs.what_runs(root) == graphs.what_runs(namespace["root"]) == before
    exec(change, namespace)
    assert graphs.what_runs(root) == graphs.what_runs(namespace["root"]) != before


def test_a_patch_of_nn_linear_reaches_matrices_that_would_be_copied(monkeypatch):
    monkeypatch.setattr(ops, "LARGE", 1)
    model, forward, calls = network(plain, torch.float32), nn.Linear.forward, []
    monkeypatch.setattr(nn.Linear, "forward", lambda *args: calls.append(args) or forward(*args))
    sample.generate(model, tokens_of(model, 1, 20), ops.PAYS + 8, temperature=0, speculative=0)
    assert len(calls) > ops.PAYS * len(model.layers)


# ---- What a twin must not change -----------------------------------------------------------------


def test_a_text_written_under_autocast_is_the_text_without_it(monkeypatch):
    monkeypatch.setattr(ops, "LARGE", 1)
    model = network(plain, torch.float32)
    args = model, tokens_of(model, 1, 20), ops.PAYS + 8
    text = sample.generate(*args, temperature=0)
    assert torch.equal(in_bf16(functools.partial(sample.generate, temperature=0), *args), text)


def test_an_evaluation_computes_as_training_does_to_the_last_bit():
    """The twins for writing text, which round otherwise, are off outside of it."""
    model = network(plain, torch.float32)
    tokens = tokens_of(model, 2, 60)
    sample.generate(model, tokens, 5)
    expected = model(tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


# ---- What cannot be compiled ---------------------------------------------------------------------


def branches_by_data(x):
    return x if x.sum() > 0 else -x


def does_not_fit(x):
    return x.view(3)


def test_what_cannot_be_compiled_is_refused_with_its_line_and_a_bug_keeps_its_trace():
    def compiled(function):
        with processes.compiling():
            torch.compile(function, fullgraph=True, backend="eager")(torch.ones(4))

    with pytest.raises(Refusal, match=r"--compile cannot be used here .*branching.*") as got:
        compiled(branches_by_data)
    line = branches_by_data.__code__.co_firstlineno + 1
    assert f" at {__file__}:{line}, in branches_by_data); leave it out" in str(got.value)
    with pytest.raises(RuntimeError, match=r"shape '.3.' is invalid") as got:
        compiled(does_not_fit)
    assert not isinstance(got.value, Refusal) and "in does_not_fit" in str(got.value)
    with pytest.raises(ValueError, match="mine"), processes.compiling():
        raise ValueError("mine")
