"""The documents say what is there: links and commands. test_changes.py: HACKING.md's changes."""

import re
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from training import ROOT, TINY_NETWORK

from model import DeepSeekV3, ModelConfig

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


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
    """But those of docs/notes, which record what was done."""
    commands = 0
    diffs = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/changes/*.diff"))
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
            files += re.findall(r"git apply (docs/changes/\w+\.diff)", plain)
            if command[1].startswith("experiments/"):
                files += ["experiments/run.py", "bench.py"]
            source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
            for key in re.findall(r"--(\w+)", command[2]):
                known = source + text + diffs  # where a line of a diff begins with "+"
                assert re.search(rf"(?m)^\+?    {key}: ", known), line
            for config in re.findall(r"config/\w+\.py", command[2]):
                assert (ROOT / config).exists(), line
            commands += 1
    assert commands > 20


@pytest.fixture
def tiny(monkeypatch):
    """A model made of random numbers in place of those that are loaded."""
    model = DeepSeekV3(ModelConfig(**TINY_NETWORK)).eval()
    tokenizer = SimpleNamespace(encode=lambda text: [1, 2, 3], decode=str, eos=[0])
    tokenizer.to_bytes = lambda i: b"\n\t<"
    monkeypatch.setattr("huggingface.load_model", lambda *_: (model, tokenizer))
    return model


def names_of(text: str) -> dict:
    """What the first lines of Python in a document define."""
    exec(re.search(r"(?s)```python\n(.*?)```", text)[1], names := {})
    return names


def test_python_of_the_reference_runs(tiny):
    names = names_of((ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8"))
    assert names["logits"].shape == (1, 3, 512) and names["further"].shape == (1, 2, 512)


def test_the_plain_loop_of_hacking_samples(tiny):
    names = names_of((ROOT / "docs/HACKING.md").read_text(encoding="utf-8"))
    assert names["tokens"].shape == (1, 203) and names["cache"].length == 202
