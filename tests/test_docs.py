"""The documents say what is there: links, lines, commands, and changes that apply and train.

`python tests/test_docs.py` writes the line numbers anew: of every link [`name`](file.py#L12) in the
documents, which is the line, or the lines, where the file defines that name; and of every diff.
With --check it only tells where they are old. No test does, since every moved line makes them old.
"""

import ast
import functools
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import drafts

import fp8
import sample
from model import DeepSeekV3, ModelConfig, balance_loss
from support import checkpoints, processes
from support.settings import read_config_file
from support.tokens import Tokens
from train import TrainConfig, lr_at, split_configs

ROOT = Path(__file__).parent.parent
TINY, _ = split_configs(read_config_file(str(ROOT / "config/tiny.py"), ModelConfig, TrainConfig))
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
LINES = re.compile(r"\[([^\]]*)\]\(([^)\s#]+\.py)#L(\d+)(?:-L(\d+))?\)")
PATCHED = re.compile(r"--- a/(.+)\n\+\+\+ .*\n((?:(?!--- )[-+@ ].*\n|\n)+)")  # a file and its hunks
HUNK = re.compile(r"@@ -.+? @@(.*)\n((?:[-+ ].*\n|\n)+)")


@functools.cache
def definitions(file: Path) -> dict[str, tuple[int, int]]:
    """First and last line of everything a file defines: NAME, Class.method."""
    found = {}
    for outer in ast.parse(file.read_text(encoding="utf-8")).body:
        for node in (outer, *getattr(outer, "body", ())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                name = node.name if node is outer else f"{outer.name}.{node.name}"
                found[name] = node.lineno, node.end_lineno
    return found


def numbered(document: Path) -> str:
    """The document's text, the line numbers of its links and diffs as they should be."""

    def right(link: re.Match) -> str:
        label, file, _, last = link.groups()
        name = re.search(r"`([\w.]+)`$", label)[1]  # the last word of the label
        begin, end = definitions(document.parent / file)[name]
        return f"[{label}]({file}#L{begin}{f'-L{end}' if last else ''})"

    text = LINES.sub(right, document.read_text(encoding="utf-8"))
    text = re.sub(r"(?m)^@@ -0,0 \+\d+,", "@@ -0,0 +1,", text)  # of a new file
    return re.sub(r"(?s)(?<=```diff\n).*?(?=```)", lambda m: PATCHED.sub(with_hunks, m[0]), text)


def with_hunks(patched: re.Match) -> str:
    """What a diff does to one file, each hunk with its first line and number of lines: in the
    source, and after the change. `git apply` also takes hunks that are elsewhere. A hunk whose
    lines are not in the source keeps its numbers."""
    source = (ROOT / patched[1]).read_text(encoding="utf-8").splitlines()
    at, grown = 0, 0  # where the last hunk ended; how many lines were added so far

    def right(hunk: re.Match) -> str:
        nonlocal at, grown
        old, new = sides(hunk[2])
        places = (i for i in range(at, len(source)) if source[i : i + len(old)] == old)
        begin, before = next(places, None), grown
        grown += len(new) - len(old)
        if begin is None:
            return hunk[0]
        at = begin + len(old)
        numbers = f"-{begin + 1},{len(old)} +{begin + 1 + before},{len(new)}"
        return f"@@ {numbers} @@{hunk[1]}\n{hunk[2]}"

    return patched[0].removesuffix(patched[2]) + HUNK.sub(right, patched[2])


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_name_what_the_source_defines(document):
    numbered(document)  # raises KeyError for another name


def test_code_names_documents_that_exist():
    named = 0
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("exercises/*.txt")]:
        for path in re.findall(r"docs/[\w/]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{file.name} names {path}"
            named += 1
    assert named > 3


def test_commands_name_files_and_keys_that_exist():
    commands = 0
    for document in DOCUMENTS:
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
    for module in "huggingface", "drafts":
        monkeypatch.setattr(f"{module}.load_model", lambda *_: (model, tokenizer, tmp_path))
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


def test_picture_of_drafts(tiny, tmp_path):
    """Greedy text of a model that loves one token, so that all drafts stay."""
    for weight in (tiny.lm_head.weight, tiny.mtp[0].norm.weight):
        torch.nn.init.zeros_(weight)
    options = "--temperature=0", "--max_new_tokens=9", "--speculative=3"
    drafts.main([f"--out={tmp_path}/x.svg", *options])
    caption, *text = (x for x in ElementTree.parse(tmp_path / "x.svg").iter() if x.get("class"))
    kinds = "".join(x.get("class") for x in text if x.text == "    <")
    assert re.fullmatch("m?(dddm)+d*", kinds) and len(kinds) == 9
    assert caption.text.startswith(f"{kinds.count('d')} of 9 tokens")


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


CHECKS = {}  # by title: a function of what was changed, whether a twin steps aside, sizes


def change(title: str, slower: bool = False, **sizes):
    """Marks what is special about a worked change."""
    return lambda check: CHECKS.update({title: (check, slower, sizes)})


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
                told = f"{file} has these lines no more, mend them in this diff of docs/HACKING.md:"
                pytest.fail(f"{told}\n{before}", pytrace=False)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return {file: SimpleNamespace(**runpy.run_path(str(folder / file))) for file in files}


@pytest.mark.parametrize("title", CHANGES)
def test_worked_changes(title, tmp_path, monkeypatch, capsys):
    """Those of the network: a step by gradient descent lowers the loss; decoding gives what whole
    forwards give."""
    check, slower, sizes = CHECKS[title]
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
        monkeypatch.setattr(sample, "Cache", c.new.Cache)
        with torch.inference_mode():
            text = sample.generate(model.eval(), c.x[:1, :4], 4, temperature=0, speculative=2)
            assert torch.equal(text[0, 4:], model(text)[0, 3:-1].argmax(-1))
        assert not sample.check_cache(model, 24).wrong
        assert ("it runs without its fast twin" in capsys.readouterr().err) == slower
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


@change("Squared ReLU in place of SiLU", slower=True)
def squared_relu(c: Changed):
    assert c.new.swiglu(torch.tensor(-3.0), torch.tensor(2.0)) == 0
    c.patch.setattr(fp8, "formulas", c.new)
    with pytest.raises(ValueError, match="swiglu"):
        fp8.use_fp8(c.model)


@change("A soft cap on the scores of attention", slower=True)
def scores_of_20_at_most(c: Changed):
    q, v = torch.tensor([[0.0], [1e3]])[None, None], torch.tensor([[1.0], [2.0]])[None, None]
    last = c.new.causal_attention(q, q, v, 1.0)[0, 0, 1, 0]  # scores 0 and 20
    assert last == pytest.approx(2 - 1 / (1 + math.exp(20)), abs=1e-9)


@change("Sparse attention", slower=True)
def the_best_four(c: Changed):
    """A short text looks at all its tokens, a longer one at the best four."""
    whole = sample.DeepSeekV3(c.model.config).double().eval()
    whole.load_state_dict(c.model.state_dict(), strict=False)
    indexer, seen = c.model.layers[0].self_attn.indexer, []
    c.patch.setitem(c.new.Indexer.forward.__globals__, "INDEX_TOPK", 64)
    assert torch.allclose(c.model(c.x), whole(c.x), atol=1e-12)
    c.patch.setitem(c.new.Indexer.forward.__globals__, "INDEX_TOPK", 4)
    assert not torch.allclose(c.model(c.x), whole(c.x), atol=1e-3)
    indexer.register_forward_hook(lambda _, given, among: seen.append(among.tril().sum(-1)))
    with torch.inference_mode():
        text = sample.generate(c.model, c.x[:1, :8], 8, temperature=0)
        assert torch.equal(text[0, 8:], c.model(text)[0, 7:-1].argmax(-1))
    assert torch.equal(seen[-1][0], torch.arange(1, 17).clamp(max=4))


@change("A new key: an attention sink", slower=True, attention_sink=True)
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
    wrong = sample.check_cache(c.model, 24).wrong  # of one state less
    assert len(wrong) == 4 and all("main model, drafts rejected" in way for way in wrong)


def random_data() -> SimpleNamespace:
    ids = np.random.default_rng(0).integers(0, 512, 2000).astype(np.uint16)
    text = Tokens([ids])
    return SimpleNamespace(train=text, val=text, vocab_size=512, val_bytes_per_token=3.0)


@change("An average of the weights")
def goes_on(c: Changed):
    """The average is what its formula says, and the same after an interruption."""
    train, weights = c.files["train.py"], []
    config = train.TrainConfig(steps=4, batch_size=2, block_size=16, warmup=0.0)
    config.device, config.decay_start, config.decay_end = "cpu", 1.0, 1.0

    def run(name: str, steps: int, resume: bool = False):
        torch.manual_seed(0)
        net = DeepSeekV3(ModelConfig(**TINY))
        again = replace(config, out=str(c.folder / name), steps=steps, resume=resume)
        hook = register_optimizer_step_post_hook(
            lambda *_: weights.append(net.lm_head.weight.detach().clone())
        )
        first = net.lm_head.weight.detach().clone()
        train.train(net, random_data(), again, processes.start(again))
        hook.remove()
        return first, checkpoints.load_checkpoint(c.folder / name / "ckpt.pt")

    first, straight = run("straight", 4)
    for w in weights:
        first.lerp_(w, 1e-3)
    torch.testing.assert_close(straight["average"]["lm_head.weight"], first)
    run("cut", 2)
    _, kept = run("cut", 4, resume=True)
    for name, x in straight["average"].items():
        assert torch.equal(kept["average"][name], x)
        assert not torch.equal(kept["model"][name], x)


@change("A term of the loss")
def is_learnt_and_logged(c: Changed):
    weights = c.files["train.py"].loss_weights(c.model, TrainConfig(), 0)
    machine = processes.Machine(torch.device("cpu"), torch.float32)
    c.model.train().zero_grad()
    tokens = torch.cat((c.x, c.y[:, -1:]), 1).numpy()
    losses = c.files["train.py"].backward(c.model, [tokens], weights, machine)
    old = DeepSeekV3(c.model.config).double().train()
    old.load_state_dict(c.model.state_dict())
    plain, z = old(c.x, c.y), old(c.x).logsumexp(-1).square().mean()
    assert losses == pytest.approx({k: x.item() for k, x in (plain | {"z_loss": z}).items()})
    (sum(weights[name] * loss for name, loss in plain.items()) + 1e-4 * z).backward()
    for p, q in zip(c.model.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    # The log has it, and a number for which HACKING has a line.
    line = re.search(r"(?m)^    (means\[.*)$", HACKING)[1]
    source, call = (c.folder / "train.py").read_text(), "            run.advance("
    assert source.count(call) == 1
    (c.folder / "train.py").write_text(source.replace(call, f"            {line}\n{call}"))
    edited = SimpleNamespace(**runpy.run_path(str(c.folder / "train.py")))
    config = TrainConfig(steps=2, batch_size=2, block_size=16, out=str(c.folder / "run"))
    config.device, config.log_every, config.gamma = "cpu", 1, 0.5
    net = c.new.DeepSeekV3(c.new.ModelConfig(**TINY))
    edited.train(net, random_data(), config, processes.start(config))
    lines = [json.loads(line) for line in (c.folder / "run/log.jsonl").read_text().splitlines()]
    assert [30 < line["z_loss"] < 50 for line in lines if "loss" in line] == [True, True]
    first, second = (line["bias"] for line in lines if "loss" in line)
    assert 0 < first <= 3 * 0.5 and 0 < second <= 3 * 1.0  # a sum over three gates


def test_every_change_is_there():
    assert HACKING.count("```diff") == len(CHANGES) and CHANGES.keys() == CHECKS.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(diff in HACKING for diff in re.findall(r"(?s)```diff\n(.*?)```", readme))


# Which files may import which: one way, so that each is read without those below it.
STAGES = "model", "fp8", "huggingface", "sample", "train", "bench"
MAY_IMPORT = {f"{name}.py": {*STAGES[:i]} for i, name in enumerate(STAGES)}
MAY_IMPORT["train.py"] |= {"prepare_data"}  # it makes missing data


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")], ids=str)
def test_imports_run_one_way(file):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.partition(".")[0] for name in names}
    ours = {*STAGES, "prepare_data", "experiments", "exercises"}
    assert imported & ours <= MAY_IMPORT.get(file.name, set())


if __name__ == "__main__":
    old = [x for x in DOCUMENTS if x.read_text(encoding="utf-8") != numbered(x)]
    if "--check" in sys.argv:
        sys.exit(f"old line numbers in {', '.join(x.name for x in old)}" if old else 0)
    for document in old:
        document.write_text(numbered(document), encoding="utf-8")
