"""The documents say what is there: links and commands. test_changes.py: HACKING.md's changes."""

import re
import runpy
from collections import Counter
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from training import ROOT, TINY_NETWORK

from model import DeepSeekV3, ModelConfig

DOCUMENTS = [ROOT / "README.md", ROOT / "experiments/PLAN.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"(?:\]\(|href=\")(?!https?:)([^)\s\"]+)")
INSIDE = ROOT / "docs/inside.html"
# Chinese pages, which have the commands, outputs, links and numbers of the English ones
CHINESE = {x: ROOT / "docs" / x.name.replace("_zh", "") for x in DOCUMENTS if "_zh" in x.stem}
CHINESE[ROOT / "docs/README_zh.md"] = ROOT / "README.md"


def slugs(document) -> list[str]:
    """What links call the headings of a page."""
    heads = re.findall(r"(?m)^#+ (.*)$", document.read_text(encoding="utf-8"))
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("document", [*DOCUMENTS, INSIDE], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in LINK.findall(re.sub(r"(?s)```.*?```", "", text)):
        path, _, fragment = unquote(target).partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if fragment and file.suffix == ".md":
            assert fragment in slugs(file), target


def test_links_to_lines_lead_to_definitions(v3):
    annotate = runpy.run_path(str(ROOT / "docs/annotate.py"))
    pages, with_lines = annotate["WITH_LINKS"], annotate["with_lines"]
    old = [x.name for x in pages if with_lines(x) != x.read_text(encoding="utf-8")]
    assert not old, f"python docs/annotate.py writes the line numbers of {old} anew"


def test_readme_counts_the_lines_of_the_network_and_of_the_reference():
    lines = (ROOT / "tests/reference.py").read_text(encoding="utf-8").count("\n")
    readme = " ".join(DOCUMENTS[0].read_text(encoding="utf-8").split())
    assert f"[{lines} lines of NumPy](tests/reference.py)" in readme
    network = (ROOT / "model.py").read_text(encoding="utf-8").partition("\n\n\n# ---- The rows")[0]
    lines = network.count("\n") + 1
    assert f"network, {lines} lines of PyTorch with the equations" in readme


def destination(document, target: str) -> str:
    """Where a link leads; the same for a page and its translation."""
    path, _, fragment = unquote(target).partition("#")
    file = (document.parent / path).resolve() if path else document
    if "://" in target or file.suffix != ".md":
        return target.removeprefix("../").removeprefix("docs/")
    heading = f", heading {slugs(file).index(fragment)}" if fragment else ""
    return CHINESE.get(file, file).name + heading


def untranslated(document) -> list[tuple[str, dict[str, Counter]]]:
    """Each section's heading, and what is the same in English and Chinese."""
    sections, link = [], r"(?:\]\(|src=\")([^)\s\"]+)"
    for text in re.split(r"(?m)^## ", document.read_text(encoding="utf-8")):
        heading, blocks = text.split("\n")[0], re.findall(r"(?s)```.*?```", text)
        text = re.sub(r"(?s)```.*?```", "", text)
        blocks += re.findall(r"(?m)^    (.*?)(?: +# .*)?$", text)  # but a command's comment
        text = re.sub(r"(?m)^    .*$", "", text)
        links = [destination(document, x) for x in re.findall(link, text)]
        text = re.sub(link, "", text)
        code = {" ".join(x.split()) for x in re.findall(r"`([^`]+)`", text)}
        numbers = re.findall(r"(?<![A-Za-z\d])\d+(?:[.,]\d+)*(?:e-\d+)?", text)
        found = {"block": blocks, "link": links, "code": code, "number": numbers}
        sections.append((heading, {kind: Counter(x) for kind, x in found.items()}))
    return sections


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.name)
def test_chinese_pages_follow_the_english_ones(chinese):
    before, after = untranslated(CHINESE[chinese]), untranslated(chinese)
    assert len(before) == len(after), f"{chinese.name} has other sections than the English page"
    wrong = []
    for (_, old), (heading, new) in zip(before, after, strict=True):
        for kind in old:
            wrong += [f"{heading}: {kind} missing: {x}" for x in old[kind] - new[kind]]
            if kind != "code":  # Chinese may explain more
                wrong += [f"{heading}: {kind} not in English: {x}" for x in new[kind] - old[kind]]
    assert not wrong, "\n".join([f"update {chinese.name}, section by section", *wrong])


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.name)
def test_emphasis_is_seen_beside_chinese_punctuation(chinese):
    """A `**` between punctuation and a letter, as in `**x:**y`, is shown as asterisks."""
    text = re.sub(r"(?s)```.*?```|`[^`\n]+`", "``", chinese.read_text(encoding="utf-8"))
    for found in re.finditer(r"(\w?)(\*+)(?! )(.+?)\2(?=(\w?))", text):
        before, inside, after = found[1], found[3], found[4]
        assert not re.match(r"\w\W", before + inside), found[0]
        assert not re.match(r"\W\w", inside[-1] + after), found[0]


def test_commands_name_files_and_keys_that_exist():
    commands = 0
    diffs = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/changes/*.diff"))
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
    monkeypatch.setattr("load.load_model", lambda *_: (model, tokenizer))
    return model


def test_python_of_the_reference_runs(tiny):
    text = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    exec(re.search(r"(?s)```python\n(.*?)```", text)[1], names := {})
    assert names["logits"].shape == (1, 3, 512) and names["further"].shape == (1, 2, 512)
