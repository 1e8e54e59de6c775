"""The documents say what is there: links, commands, and changes that apply and train."""

import functools
import math
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))


import bench
import sample
from model import DeepSeekV3, ModelConfig, balance_loss
from support.settings import read_config_file
from train import TrainConfig, lr_at, split_configs

ROOT = Path(__file__).parent.parent
TINY, _ = split_configs(read_config_file(str(ROOT / "config/tiny.py"), ModelConfig, TrainConfig))
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
PATCHED = re.compile(r"--- a/(.+)\n\+\+\+ .*\n((?:(?!--- )[-+@ ].*\n|\n)+)")  # a file and its hunks
HUNK = re.compile(r"@@ -.+? @@(.*)\n((?:[-+ ].*\n|\n)+)")


def sides(hunk: str) -> tuple[list[str], list[str]]:
    """The lines of a hunk before and after the change."""
    lines = hunk.splitlines()
    return tuple([x[1:] for x in lines if x[:1] != left_out] for left_out in "+-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in LINK.findall(re.sub(r"(?s)```.*?```", "", text)):
        path, _, fragment = unquote(target).partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            heads = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert fragment in slugs, target


def test_commands_name_files_and_keys_that_exist():
    """But those of docs/notes, which tell what was done."""
    commands = 0
    for document in (x for x in DOCUMENTS if x.parent.name != "notes"):
        text = document.read_text(encoding="utf-8")
        plain = re.sub(r"(?s)```.*?```", "", text).replace("\\\n", " ")
        for line in re.findall(r"(?m)^    .*$|`[^`]+`", plain):
            line = line.replace("\n", " ")
            command = re.search(r"(?:python|torchrun) .*?([\w/]+\.py)\b([^#`|]*)", line)
            if not command or command[1].endswith(("X.py", "NAME.py")):  # any script
                continue
            files = [command[1]]  # whose keys may follow
            files += ["model.py"] * (command[1] == "train.py")
            files += ["support/plot.py"] * (command[1] == "bench.py")
            if command[1].startswith("experiments/"):
                files += ["experiments/run.py", "bench.py"]
            source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
            for key in re.findall(r"--(\w+)", command[2]):
                assert re.search(rf"(?m)^\+?    {key}: ", source + text), line  # "+": of a diff
            for config in re.findall(r"config/\w+\.py", command[2]):
                assert (ROOT / config).exists() or f"+++ b/{config}" in text, line
            commands += 1
    assert commands > 20


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model made of random numbers in place of those that are loaded."""
    model = DeepSeekV3(ModelConfig(**TINY)).eval()
    tokenizer = SimpleNamespace(encode=lambda text: [1, 2, 3], decode=str, eos=[0])
    tokenizer.to_bytes = lambda i: b"\n\t<"
    monkeypatch.setattr("huggingface.load_model", lambda *_: (model, tokenizer, tmp_path))
    return model


def names_of(text: str) -> dict:
    """What the first lines of Python in a document define."""
    exec(re.search(r"(?s)```python\n(.*?)```", text)[1], names := {})
    return names


def test_python_of_the_readme_runs(tiny):
    names = names_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert names["logits"].shape == (1, 3, 512) and names["further"].shape == (1, 2, 512)


def test_the_plain_loop_of_hacking_samples(tiny):
    names = names_of(HACKING)
    assert names["tokens"].shape == (1, 203) and names["cache"].length == 202


# ---- The worked changes --------------------------------------------------------------------------

HACKING = (ROOT / "docs/HACKING.md").read_text(encoding="utf-8")
CHANGES = dict(re.findall(r"(?s)\n## \d+\. ([^\n]*)\n.*?```diff\n(.*?)```", HACKING))


@dataclass
class Changed:
    """What a worked change makes of a copy of the source."""

    files: dict[str, SimpleNamespace]  # what those that it changes define
    folder: Path
    patch: pytest.MonkeyPatch
    new: SimpleNamespace | None = None  # model.py
    model: Any = None  # trained for a step
    x: Any = None  # tokens (B, T)
    y: Any = None  # the next tokens


CHECKS = {}  # by title: a function of what was changed, sizes of its network


def change(title: str, **sizes):
    """Marks what is special about a worked change."""
    return lambda check: CHECKS.update({title: (check, sizes)})


def applied(diff: str, folder: Path) -> dict[str, SimpleNamespace]:
    files = re.findall(r"(?m)^\+\+\+ b/(.*)$", diff)
    (folder / "config").mkdir()
    for file in files:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, folder / file)
    for file, hunks in PATCHED.findall(diff):
        source = (ROOT / file).read_text(encoding="utf-8")
        for _, hunk in HUNK.findall(hunks):
            before = "\n".join(sides(hunk)[0])
            if f"{before}\n" not in source:
                told = f"{file} was edited where this diff of docs/HACKING.md changes it"
                pytest.skip(f"{told}: {before.splitlines()[0].strip()}")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return {file: SimpleNamespace(**runpy.run_path(str(folder / file))) for file in files}


@pytest.mark.parametrize("title", CHANGES)
def test_worked_changes(title, v3, tmp_path, monkeypatch):
    """Those of the network: a step by gradient descent lowers the loss; decoding gives what whole
    forwards give."""
    check, sizes = CHECKS[title]
    c = Changed(applied(CHANGES[title], tmp_path), tmp_path, monkeypatch)
    if "model.py" in c.files:
        c.new, sizes = c.files["model.py"], {"initializer_range": 0.1} | sizes
        # In float64, where the sums of another CPU make no difference.
        c.model = model = c.new.DeepSeekV3(c.new.ModelConfig(**TINY | sizes)).double()
        tokens = torch.randint(512, (2, 24), generator=torch.Generator().manual_seed(1))
        c.x, c.y = tokens[:, :-1], tokens[:, 1:]
        before = sum(model.train()(c.x, c.y).values())
        before.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        model.update_bias(0.01)
        assert sum(model(c.x, c.y).values()) < before
        for reader in (sample, bench):
            monkeypatch.setattr(reader, "Cache", c.new.Cache)
        with torch.inference_mode():
            text = sample.generate(model.eval(), c.x[:1, :4], 4, temperature=0, speculative=2)
            assert torch.equal(text[0, 4:], model(text)[0, 3:-1].argmax(-1))
        assert not bench.check_cache(model, 24).wrong
    check(c)


@change("A softmax gate")
def sums_to_one(c: Changed):
    s, _, _ = c.model.gates()[0](torch.randn(5, 48).double())
    assert torch.allclose(s.sum(-1), torch.ones(5).double())


@change("An auxiliary balance loss in place of the bias")
def of_the_batch(c: Changed):
    s = torch.rand(2, 6, 8)
    assert c.new.balance_loss(s, 2) == balance_loss(s.flatten(0, 1)[None], 2)
    assert c.new.balance_loss(s, 2) != balance_loss(s, 2)


def small_with(c: Changed, **more):
    (file,) = c.files
    paths = ROOT / "config/small.py", c.folder / file
    small, mine = (read_config_file(str(path), ModelConfig, TrainConfig) for path in paths)
    assert mine == small | more


change("Your own data")(functools.partial(small_with, data="mine", vocab_size=2048))
change("Two MTP modules")(functools.partial(small_with, num_nextn_predict_layers=2))


@change("Another schedule")
def a_cosine(c: Changed):
    config = TrainConfig(steps=1000, lr=1.0, decay_start=0.0, decay_end=1.0, warmup=0.0)
    other = c.files["train.py"].lr_at
    assert other(config, 0) == lr_at(config, 0) == 1.0
    assert other(config, 250) == pytest.approx(0.1 + 0.9 * (1 - 0.5)) != lr_at(config, 250)


@change("Ordinary multi-head attention")
def of_queries_keys_and_values(c: Changed):
    assert "layers.0.self_attn.qkv_proj.weight" in c.model.state_dict()


@change("Squared ReLU in place of SiLU")
def squared_relu(c: Changed):
    assert c.new.swiglu(torch.tensor(-3.0), torch.tensor(2.0)) == 0


@change("A soft cap on the scores of attention")
def scores_of_20_at_most(c: Changed):
    q, v = torch.tensor([[0.0], [1e3]])[None, None], torch.tensor([[1.0], [2.0]])[None, None]
    last = c.new.causal_attention(q, q, v, 1.0)[0, 0, 1, 0]  # scores 0 and 20
    assert last == pytest.approx(2 - 1 / (1 + math.exp(20)), abs=1e-9)


@change("A new key: an attention sink", attention_sink=True)
def as_an_older_token(c: Changed):
    """Whose value is 0 and whose score is the sink's."""
    q, k, v = (torch.randn(2, 3, 5, n, dtype=torch.double) for n in (4, 4, 6))
    sink = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.double)
    score = (q @ k.mT * 0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    p = torch.cat((sink.view(3, 1, 1).expand(2, 3, 5, 1), score), -1).softmax(-1)
    found = c.new.causal_attention(q, k, v, 0.5, None, sink)
    assert torch.allclose(found, p[..., 1:] @ v, atol=1e-12)
    # It grows: without the key the network is today's, and with a low sink nearly.
    old = DeepSeekV3(ModelConfig(**TINY | {"initializer_range": 0.1})).double().eval()
    missing, _ = c.model.load_state_dict(old.state_dict(), strict=False)
    assert {name.rpartition(".")[2] for name in missing} == {"sink"} and len(missing) == 4
    grown, plain = c.model(c.x), old(c.x)
    c.model.load_state_dict({name: torch.full((2,), -99.0) for name in missing}, strict=False)
    assert torch.allclose(c.model(c.x), plain, atol=1e-12)
    assert not torch.allclose(grown, plain, atol=1e-5)


@change("A hybrid with linear attention", num_hidden_layers=4)
def token_by_token(c: Changed):
    linear, *_, mla = (block.self_attn for block in c.model.double().layers)
    assert type(linear) is c.new.LinearAttention and type(mla) is c.new.MLA
    h, o = torch.randn(1, 20, 48).double(), []
    x = linear.qkva_proj(h).view(20, 2, 49)  # of two heads, a token after the other
    S = torch.zeros(2, 16, 16).double()
    for q, k, v, a in zip(*x.split([16, 16, 16, 1], -1), strict=True):
        S = a[..., None].sigmoid() * S + k[..., None] * v[:, None]
        o.append((q[..., None] * S).sum(1).flatten())
    assert torch.allclose(linear(h, None), linear.o_proj(torch.stack(o)), atol=1e-12)
    graph, at = torch.compile(linear, fullgraph=True, backend="eager"), torch.tensor(15)
    with torch.no_grad():
        kept = linear.new_cache(1, 99, h)
        pieces = linear(h[:, :15], None, (kept, 0)), graph(h[:, 15:], None, (kept, at))
        assert torch.allclose(torch.cat(pieces, 1), linear(h, None), atol=1e-12)
    c.patch.setitem(c.new.LinearAttention.new_cache.__globals__, "MOST_NEW", 7)
    wrong = bench.check_cache(c.model, 24).wrong  # of one state less
    assert len(wrong) == 4 and all("main model, drafts rejected" in way for way in wrong)


for title in ("An average of the weights", "A term of the loss"):
    change(title)(lambda c: None)
change("Sparse attention")(lambda c: None)
