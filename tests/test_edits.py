"""What you edit is what runs: an edited formula of model.py trains and decodes as edited, although
the unedited one has a fast twin in ops.py or a copy in fp8.py."""

import ast
import functools
import importlib.util
import re
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_model import TINY, in_bf16, tokens_of, value_and_gradients
from torch import nn

import fp8
import huggingface
import model as plain
import sample
import train
from support import graphs, ops, processes
from support.checkpoints import code_of, load_checkpoint
from support.digits import digits_of, file_source
from support.settings import Refusal

SOURCE = (Path(__file__).parent.parent / "model.py").read_text(encoding="utf-8")
CONFIG = TINY | dict(max_position_embeddings=200)

# By function (or Class.method) of model.py: what stands in its place, under its mark, and may call
# it as `unedited`. With each edit, the twins that are not used any more.
EDITS = {
    "soft cap on the scores": (
        "causal_attention",
        """
        def causal_attention(q, k, v, scale, start=None):
            T, S = q.shape[2], k.shape[2]
            query = (S - T if start is None else start) + torch.arange(T)[:, None]
            score = 0.1 * (upcast(q @ k.mT) * scale / 0.1).tanh()
            return score.masked_fill(torch.arange(S) > query, -math.inf).softmax(-1) @ v
        """,
        ["causal_attention"],
    ),
    "window of 40 tokens": (
        "causal_attention",
        """
        def causal_attention(q, k, v, scale, start=None):
            T, S = q.shape[2], k.shape[2]
            ahead = torch.arange(S) - torch.arange(T)[:, None] - (S - T if start is None else start)
            score = upcast(q @ k.mT) * scale
            return score.masked_fill((ahead > 0) | (ahead <= -40), -math.inf).softmax(-1) @ v
        """,
        ["causal_attention"],
    ),
    "half the softmax scale": (
        "causal_attention",
        """
        def causal_attention(q, k, v, scale, start=None):
            return unedited(q, k, v, scale / 2, start)
        """,
        ["causal_attention"],
    ),
    "a soft cap on the logits": (
        "head_logits",
        """
        def head_logits(h, weight):
            return 3 * (unedited(h, weight) / 3).tanh()
        """,
        ["head_logits", "head_loss"],
    ),
    "squared ReLU": (
        "swiglu",
        """
        def swiglu(gate, up, gain=None):
            y = F.relu(gate).square() * up
            return y if gain is None else y * cast(gain, y.dtype)[:, None]
        """,
        ["swiglu"],
    ),
    "experts times 0.5": (
        "routed_ffn",
        """
        def routed_ffn(x, chosen, gain, gate_up, down, swiglu):
            return 0.5 * unedited(x, chosen, gain, gate_up, down, swiglu)
        """,
        ["routed_ffn"],
    ),
    "one expert left out": (
        "routed_ffn",
        """
        def routed_ffn(x, chosen, gain, gate_up, down, swiglu):
            return unedited(x, chosen, gain * (chosen > 0), gate_up, down, swiglu)
        """,
        ["routed_ffn"],
    ),
    "a block times 0.7": (
        "Block.forward",
        """
        def forward(self, x, rope, past=None):
            y, routing = self.unedited(x, rope, past)
            return 0.7 * y, routing
        """,
        [],
    ),
    "no gate values": (
        "swiglu",
        """
        def swiglu(gate, up, gain=None):
            return unedited(gate, up)
        """,
        ["swiglu"],
    ),
    "norms without signs": (
        "rms_norm",
        """
        def rms_norm(x, weight, eps):
            return unedited(x, weight, eps).abs()
        """,
        ["rms_norm"],
    ),
    "norms without weights": (
        "RMSNorm.forward",
        """
        def forward(self, x):
            return rms_norm(x, torch.ones_like(self.weight), self.eps)
        """,
        [],
    ),
    "another rotation": (
        "rotate",
        """
        def rotate(x, rope, interleave):
            return unedited(x, (rope[0], 2 * rope[1]), interleave)
        """,
        ["rotate"],
    ),
    "gate values by a softmax": (
        "Gate.forward",
        """
        def forward(self, x):
            s, chosen, gain = self.unedited(x)
            return s, chosen, gain.softmax(-1)
        """,
        [],
    ),
    "label smoothing": (
        "head_loss",
        """
        def head_loss(h, weight, targets):
            return F.cross_entropy(head_logits(h, weight), targets, label_smoothing=0.1)
        """,
        ["head_loss"],
    ),
    "MTP's embedding reversed": (
        "MTP.forward",
        """
        def forward(self, h, embedding, rope, past=None):
            return self.unedited(h, embedding.flip(-1), rope, past)
        """,
        [],
    ),
    "a decorated twin": ("routed_ffn", "below its mark", ["routed_ffn"]),
    "a twin decorated": ("rms_norm", "above its mark", []),
}
HALVED = """
def halved(f):
    @functools.wraps(f)
    def half(*args):
        return f(*args) / 2

    return half


"""


def rewritten(name: str, new: str, source: str = SOURCE) -> str:
    """model.py with `new` in place of a function or method, whatever the text of that is today."""
    nodes = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    outer, _, method = name.partition(".")
    node, lines = nodes[outer], source.splitlines(keepends=True)
    indent = " " * 4 if method else ""
    if method:
        node = next(x for x in node.body if getattr(x, "name", "") == method)
    begin = min([node.lineno, *(x.lineno for x in node.decorator_list)])
    marks = lines[begin - 1 : node.lineno - 1]
    old = "".join(lines[node.lineno - 1 : node.end_lineno])
    if new == "below its mark":
        text = "".join(marks) + "@halved\n" + old
    elif new == "above its mark":
        text = "@halved\n" + "".join(marks) + old
    else:
        unedited = old.replace(f"def {node.name}(", "def unedited(", 1)
        text = unedited + "\n\n" + "".join(marks) + textwrap.indent(textwrap.dedent(new), indent)
    text = "".join(lines[: begin - 1]) + text
    text += "".join(lines[node.end_lineno :])
    first = "\n@dataclass\nclass ModelConfig"
    assert text.count(first) == 1
    return text.replace(first, f"\nimport functools\n\n{HALVED}{first.lstrip()}")


def edited(folder: Path, name: str) -> ModuleType:
    """model.py with this edit, as a module of its own."""
    return module_of(folder, rewritten(*EDITS[name][:2]))


def module_of(folder: Path, text: str) -> ModuleType:
    file = folder / f"edit_{len(list(folder.iterdir()))}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


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
    losses = torch.stack([*model.train()(tokens, tokens).values()])
    losses.sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat((losses.detach(), *(x.flatten() for x in grads)))


def is_the_models_text(model: nn.Module, T: int = 20, new: int = 60, **options) -> bool:
    text = sample.generate(model, tokens_of(model, 1, T), new, temperature=0, **options)
    with torch.no_grad():
        return torch.equal(text[0, T:], model(text)[0, T - 1 : -1].argmax(-1))


# ---- The mark ------------------------------------------------------------------------------------


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
    "a decorator": ("def f(", "@mark\ndef f("),
    "all its locals": (r"\b(total|i|found|inner|parts|z|m|error|last)\b", r"its_\1"),
    "a variable of a loop": (r"\by(?= in enum| if|\])", "w"),
    "a variable of a comprehension": ("inner(y) for y in", "inner(w) for w in"),
    "one that an inner function has as a parameter": (r"\bu(?=, found| = 0|\), last)", "w"),
    "one that is called as a keyword": ("key = lambda z: z.name", "by = lambda z: z.name"),
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
    "a keyword": ("sorted(parts, key=", "sorted(parts, by="),
    "a global": ("enumerate", "zip"),
    "indentation": ("    parts = ", "        parts = "),
}


def test_a_fingerprint_is_of_what_has_an_effect(tmp_path):
    def digits(text: str) -> str:
        return ops.fingerprint(module_of(tmp_path, "mark = lambda f: f\n" + text).f)

    def changed(old: str, new: str) -> str:
        text = re.sub(old, new, CODE) if "\\" in old else CODE.replace(old, new)
        assert text != CODE
        return digits(text.replace("key=key", "key=by") if "by = " in new else text)

    found = digits(CODE)
    assert found == "5f279c0b"  # under every Python from 3.10 on
    assert {name: changed(*edit) for name, edit in WITHOUT_EFFECT.items()} == dict.fromkeys(
        WITHOUT_EFFECT, found
    )
    others = {name: changed(*edit) for name, edit in WITH_EFFECT.items()}
    assert len({found, *others.values()}) == 1 + len(others), others


def test_digits_of_a_file_count_its_names_but_not_its_locals(tmp_path):
    file = tmp_path / "a.py"

    def digits(*edit: str) -> str:
        file.write_text(CODE.replace(*edit) if edit else CODE)
        return digits_of(file_source(file))

    assert digits() == digits("parts", "pieces") == digits('"doc"', '"other"')
    assert len({digits(), digits("f(x", "g(x"), digits("\ndef", "\n@staticmethod\ndef")}) == 3


# ---- Files of model.py that were edited ----------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_as_the_formulas_say(name, tmp_path, monkeypatch, capsys):
    model = network(edited(tmp_path, name))
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("it runs without its fast twin") == len(EDITS[name][2])
    assert all(twin in said for twin in EDITS[name][2])
    ours, unedited = losses_and_gradients(model), losses_and_gradients(network(plain))
    monkeypatch.setattr(ops, "enabled", False)
    assert (ours - losses_and_gradients(model)).norm() < 1e-10 * ours.norm()
    assert (ours - unedited).norm() > 0.01 * unedited.norm()


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_decodes_as_the_formulas_say(name, tmp_path):
    """One token at a time, and several with drafts."""
    model = network(edited(tmp_path, name))
    same = torch.equal(model(tokens := tokens_of(model, 1, 80)), network(plain)(tokens))
    assert same == (name in ("label smoothing", "MTP's embedding reversed"))
    for drafts in (0, 3):
        assert is_the_models_text(model, speculative=drafts)


@pytest.mark.parametrize("name", ["squared ReLU", "experts times 0.5", "no gate values"])
def test_edited_experts_train_in_bf16_as_the_formulas_say(name, tmp_path, monkeypatch):
    """There the twin pads the experts' rows. 2 %: three bf16 roundings in a row."""
    moe = network(edited(tmp_path, name), torch.float32).layers[1].mlp
    args = lambda x: moe(x)[0], (torch.randn(1, 50, 16),), list(moe.experts.parameters())
    ours = in_bf16(value_and_gradients, *args)
    monkeypatch.setattr(ops, "enabled", False)
    for a, b in zip(ours, value_and_gradients(*args), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("name", ["squared ReLU", "a block times 0.7"])
def test_an_edit_around_the_experts_leaves_their_products_padded(name, tmp_path, monkeypatch):
    """For every new number of rows oneDNN would compile, which makes bf16 training 2.7 times as
    slow."""
    rows, linear = [], ops.grouped_linear
    monkeypatch.setattr(ops, "grouped_linear", lambda x, *a: rows.append(len(x)) or linear(x, *a))
    moe = network(edited(tmp_path, name), torch.float32).layers[1].mlp
    in_bf16(moe, torch.randn(1, 50, 16))
    assert len(rows) == 2 and not any(n % ops.MULTIPLE for n in rows)


DROPPED = {
    "in its block": (
        "Block.forward",
        """
        def forward(self, x, rope, past=None):
            return (x, None) if DROP() else self.unedited(x, rope, past)
        """,
    ),
    "in the trunk": (
        "DeepSeekV3.run_block",
        """
        def run_block(self, block, past, *inputs):
            dropped = isinstance(block, Block) and DROP()
            return inputs[0] if dropped else self.unedited(block, past, *inputs)
        """,
    ),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("place", DROPPED)
def test_layers_may_be_dropped_at_random(place, recompute, tmp_path):
    """Whatever ran before it, a layer's choices are counted in its own row."""
    module, seen = module_of(tmp_path, rewritten(*DROPPED[place])), {}
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


@pytest.mark.parametrize("shared_in", ["the file", "Python"])
def test_a_gate_has_one_row_however_many_layers_use_it(shared_in, tmp_path):
    """The last block serves as the MTP module's, too, and the first MoE layer has the last one's
    FFN: what remains is one gate."""
    sharing = "{m}.mtp[0].block, {m}.layers[1].mlp = {m}.layers[2], {m}.layers[2].mlp"
    new = (
        f"def __init__(self, config):\n    self.unedited(config)\n    {sharing.format(m='self')}\n"
    )
    source = rewritten("DeepSeekV3.__init__", new)
    model = network(module_of(tmp_path, source if shared_in == "the file" else SOURCE)).train()
    if shared_in == "Python":
        exec(sharing.format(m="model"))
    (gate,), expected = model.gates(), torch.zeros(8, dtype=torch.long)
    assert len(model.mtp) == 1 and len(model.layers) == 3
    calls = []
    gate.register_forward_hook(lambda gate, args, out: calls.append(out[1]))
    tokens = tokens_of(model, 2, 20)
    sum(model(tokens, tokens).values()).backward()
    assert len(calls) == 3 and model.count_rows() == [0, 0, 0]
    expected = sum(x.flatten().bincount(minlength=8) for x in calls)
    assert torch.equal(model.expert_counts[0], expected) and not model.expert_counts[1:].any()
    load = expected.double()
    assert train.max_vio(model.expert_counts).item() == pytest.approx(load.max() / load.mean() - 1)
    model.update_bias(0.5)
    signs = (load.mean() - load).sign()
    assert torch.equal(gate.e_score_correction_bias, 0.5 * signs.float()) and signs.any()
    assert not model.expert_counts.any()


EXTRA = """

class Extra:
    size: int = 10

    def grown(self, x, by=1):
        y = by * x  # scaled
        return y + self.size
"""
EDITED = {
    "nothing": ("", "", False),
    "a comment": ("scaled", "larger", False),
    "a local name": (r"\by\b", "z", False),
    "a formula": (r"by \*", "by +", True),
    "a default": ("by=1", "by=2", True),
    "a field": ("= 10", "= 20", True),
    "a method": ("def grown", "def shrunk", True),
}


@pytest.mark.parametrize("what", EDITED)
def test_a_checkpoint_of_another_model_py_is_opened_with_a_line(
    what, tmp_path, monkeypatch, capsys
):
    """And without one where an edit has no effect, or where the file is from before."""
    old, new, told = EDITED[what]
    weights = Path(__file__).parent.parent / "weights/small"
    file = shutil.copytree(weights, tmp_path / "run") / "ckpt.pt"
    code = code_of(module_of(tmp_path, SOURCE + EXTRA).ModelConfig)
    torch.save(load_checkpoint(weights) | {"code": code}, file)
    extra = re.sub(old, new, EXTRA) if old else EXTRA
    assert (extra == EXTRA) == (what == "nothing")
    module = module_of(tmp_path, SOURCE + extra)
    monkeypatch.setattr(huggingface, "ModelConfig", module.ModelConfig)
    monkeypatch.setattr(huggingface, "DeepSeekV3", module.DeepSeekV3)
    capsys.readouterr()
    for path, says in ((file, told), (weights, False)):
        huggingface.load_model(path)
        assert ("was saved with another model.py" in capsys.readouterr().err) == says


# ---- FP8 -----------------------------------------------------------------------------------------


DOUBLED = "def forward(self, {0}):\n    return 2 * self.unedited({0})\n"


@pytest.mark.parametrize(
    "formula, new",
    [
        EDITS["squared ReLU"][:2],
        ("MLP.forward", DOUBLED.format("x")),
        ("Experts.forward", DOUBLED.format("x, chosen, gain")),
        EDITS["experts times 0.5"][:2],
        (None, None),
    ],
    ids=lambda x: x if x in (None, "swiglu", "routed_ffn") else "",
)
def test_fp8_is_refused_where_its_formulas_are_edited(formula, new, tmp_path, monkeypatch):
    module = module_of(tmp_path, rewritten(formula, new) if formula else SOURCE + "\n# no edit\n")
    model = network(module, torch.float32)
    monkeypatch.setattr(fp8, "formulas", module)
    if formula:
        with pytest.raises(Refusal, match=rf"model\.{formula} is not the one that fp8\.py"):
            fp8.use_fp8(model)
    else:
        fp8.use_fp8(model)
    assert any(isinstance(m, fp8.FP8Linear) for m in model.modules()) == (formula is None)


def test_an_fp8_network_decodes_by_its_own_products():
    model = network(plain, torch.float32)
    fp8.use_fp8(model)
    kinds = list(map(type, model.modules()))
    text = sample.generate(model, tokens_of(model, 1, 20), 5, temperature=0)
    assert text.shape == (1, 25) and list(map(type, model.modules())) == kinds


def adapt(projection: nn.Linear):
    projection.__class__ = type("Adapted", (nn.Linear,), {})


def shift(projection: nn.Linear):
    projection.bias = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("change", [adapt, shift])
def test_fp8_leaves_an_mlp_alone_whose_projection_does_more(change):
    """FP8MLP would multiply by its weight and pass over what else it does."""
    model = network(plain, torch.float32)
    mlp = model.layers[0].mlp
    change(mlp.down_proj)
    fp8.use_fp8(model)
    assert type(mlp) is plain.MLP and type(mlp.gate_proj) is fp8.FP8Linear


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


def patch_an_instance(model, monkeypatch):
    mlp = model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), mlp)


def adapt_a_projection(model, monkeypatch):
    projection = model.layers[1].self_attn.o_proj
    projection.forward = lambda x: 2 * F.linear(x, projection.weight)


def patch_the_model(model, monkeypatch):
    trunk = model.trunk
    model.trunk = lambda tokens, cache=None: trunk(tokens, cache).flip(-1)


def put_in_a_hook(model, monkeypatch):
    model.layers[2].mlp.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))


def give_a_bias(model, monkeypatch):
    bias = torch.linspace(-3, 3, 16).double()
    model.layers[0].self_attn.o_proj.bias = nn.Parameter(bias)


def wrap_a_twin(model, monkeypatch):
    rotate = plain.rotate

    @functools.wraps(rotate)
    def half_turned(x, rope, interleave):
        return rotate(x, (rope[0], rope[1] / 2), interleave)

    monkeypatch.setattr(plain, "rotate", half_turned)


def change_the_eps_of_a_norm(model, monkeypatch):
    model.layers[1].input_layernorm.eps = 0.3


def change_the_config_of_a_layer(model, monkeypatch):
    attention = model.layers[1].self_attn
    attention.config = replace(attention.config, rope_interleave=False)


def renormalise_the_embedding(model, monkeypatch):
    model.embed_tokens.max_norm = 0.5


class Convolved(nn.Module):
    """A module that nobody foresaw: a weight of three dimensions, and a bias."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.mix = mlp, nn.Conv1d(16, 16, 1).double()

    def forward(self, x):
        return self.mlp(self.mix(x.mT).mT)


def put_in_a_convolution(model, monkeypatch):
    model.layers[0].mlp = Convolved(model.layers[0].mlp)


def put_in_a_layer(model, monkeypatch):
    model.layers.append(model.layers[2])


def change_weights_unseen(model, monkeypatch):
    model.lm_head.weight.data.neg_()


def use_another_number(model, monkeypatch):
    """In a closure, whose code stays what it is."""

    def times(factor):
        return lambda *given: factor * norm(*given)

    norm = plain.rms_norm
    monkeypatch.setattr(plain, "rms_norm", times(1.5))
    assert is_the_models_text(model, **COMPILED)
    monkeypatch.setattr(plain, "rms_norm", times(3.0))


def change_an_object(model, monkeypatch):
    """Which no module has: a function knows it."""
    settings, norm = SimpleNamespace(factor=1.5), plain.rms_norm
    monkeypatch.setattr(plain, "rms_norm", lambda *args: settings.factor * norm(*args))
    assert is_the_models_text(model, **COMPILED)
    settings.factor = 3.0


PATCHES = [
    put_in_a_class,
    patch_a_class,
    patch_an_instance,
    adapt_a_projection,
    patch_the_model,
    put_in_a_hook,
    give_a_bias,
    wrap_a_twin,
    change_the_eps_of_a_norm,
    change_the_config_of_a_layer,
    renormalise_the_embedding,
    put_in_a_convolution,
    put_in_a_layer,
    change_weights_unseen,
]
COMPILED = dict(compile=True, speculative=0, new=20)
FAST_GRAPHS = {}  # of all patches: that of the unpatched network is made once


@pytest.mark.parametrize("after", [False, True], ids=["at once", "after a text"])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_decodes_as_patched(patch, after, monkeypatch):
    model = network(plain)
    before = model(tokens_of(model, 1, 20))
    if after:
        assert is_the_models_text(model)
    patch(model, monkeypatch)
    assert not torch.equal(model(tokens_of(model, 1, 20)), before)
    for _ in range(2):
        assert is_the_models_text(model)


@pytest.fixture
def compiled(monkeypatch):
    """Graphs that run operation by operation, which need no C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(graphs, "GRAPHS", FAST_GRAPHS)


@pytest.mark.parametrize("patch", [*PATCHES, use_another_number, change_an_object])
def test_a_patch_decodes_as_patched_in_a_graph(patch, compiled, monkeypatch):
    """A text before it leaves a graph behind; where only weights change it serves the next text."""
    model = network(plain)
    assert is_the_models_text(model, **COMPILED)
    patch(model, monkeypatch)
    known = len(graphs.GRAPHS)
    assert is_the_models_text(model, **COMPILED) and is_the_models_text(model, **COMPILED)
    assert len(graphs.GRAPHS) == known + (patch is not change_weights_unseen)


SETTINGS = """
import functools
from types import ModuleType, SimpleNamespace

class Cap:
    kind = "soft"
    widths = (1, 2)

    def __init__(self):
        self.value = 20

    def at(self):
        return self.value

table, names, function = {"cap": [20]}, {"a"}, {"cap": lambda: 20}
cap, method, settings = Cap(), Cap().at, SimpleNamespace(cap=20)
package = ModuleType("package")
package.inner = ModuleType("package.inner")
package.inner.cap = 20

@functools.lru_cache
def cached():
    return 20

def root():
    return table, names, function, cap, method, settings, package.inner.cap, cached, Cap
"""


@pytest.mark.parametrize(
    "change",
    [
        "table['cap'][0] = 30",
        "names.add('b')",
        "function['cap'] = lambda: 30",
        "cap.value = 30",
        "method.__self__.value = 30",
        "settings.cap = 30",
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
    before = graphs.what_runs(namespace["root"])
    assert graphs.what_runs(namespace["root"]) == before
    exec(change, namespace)
    assert graphs.what_runs(namespace["root"]) != before


def test_a_reloaded_file_decodes_as_edited_in_a_graph(compiled, tmp_path, monkeypatch):
    """Also by a network from before the reload. A file that is the same makes no graph."""
    edit, known = rewritten(*EDITS["squared ReLU"][:2]), len(graphs.GRAPHS)
    module = module_of(tmp_path, SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    old = network(module)
    for text, more in ((SOURCE, 1), (SOURCE, 1), (edit, 2)):
        Path(module.__file__).write_text(text, encoding="utf-8")
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.reload(module)
        assert is_the_models_text(network(module), **COMPILED)
        assert len(graphs.GRAPHS) == known + more
    assert is_the_models_text(old, **COMPILED)


def test_a_patch_of_nn_linear_reaches_matrices_that_would_be_copied(monkeypatch):
    monkeypatch.setattr(ops, "LARGE", 1)
    model, forward, calls = network(plain, torch.float32), nn.Linear.forward, []

    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    sample.generate(model, tokens_of(model, 1, 20), ops.PAYS + 8, temperature=0, speculative=0)
    assert len(calls) > ops.PAYS * len(model.layers)


def test_a_text_written_under_autocast_is_the_text_without_it(monkeypatch):
    monkeypatch.setattr(ops, "LARGE", 1)
    model = network(plain, torch.float32)
    prompt = tokens_of(model, 1, 20)
    text = sample.generate(model, prompt, ops.PAYS + 8, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample.generate(model, prompt, ops.PAYS + 8, temperature=0), text)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.full((2, 1, 1), 0.3)])
def test_attention_takes_a_learnt_scale_as_its_formula_does(scale):
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    formula = ops.FORMULAS[plain.causal_attention]
    assert torch.equal(plain.causal_attention(q, k, v, scale), formula(q, k, v, scale))


def test_an_evaluation_computes_as_training_does_to_the_last_bit():
    """The twins for writing text, which round otherwise, are off outside of it."""
    model = network(plain, torch.float32)
    tokens = tokens_of(model, 2, 60)
    sample.generate(model, tokens, 5)
    expected = model(tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


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
