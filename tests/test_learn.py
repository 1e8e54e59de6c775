"""What one learns from: the annotated page shows what the code does, the tour prints what it shows,
the notebook is the tour, the stored network has its loss.

`python tests/test_learn.py` writes into the tour what its blocks print, and makes the notebook.
"""

import code
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import huggingface
from exercises import network
from support.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent
ANNOTATE = runpy.run_path(str(ROOT / "docs/annotate.py"))
NOTEBOOK = runpy.run_path(str(ROOT / "docs/notebook.py"))


CODE = r'(?s)<div class="code" data-digits="(\w+)"><p>(\S+), <code>(\S+)</code>.*?</div>'


def test_the_annotated_page_shows_what_the_code_does(monkeypatch):
    """It may be older than a comment, the name of a local variable, or a line's number."""
    text = (ROOT / "docs/annotated.html").read_text(encoding="utf-8")
    shown = re.findall(CODE, text)
    assert len(shown) == len(re.findall("(?m)^> ", ANNOTATE["SECTIONS"])) > 30
    now = ANNOTATE["digits"]
    old = {name for digits, file, name in shown if digits != now(file, name)}
    assert not old, f"{', '.join(old)}: another code now, python docs/annotate.py writes the page"
    monkeypatch.setitem(ANNOTATE["page"].__globals__, "code", lambda *_: "")
    assert re.sub(CODE, "", text) == ANNOTATE["page"](), "python docs/annotate.py writes it anew"
    assert "src=" not in text and "@import" not in text and "url(" not in text  # needs no network
    told = " ".join(re.findall(r"Eq\. ([\d, -]*\d)", ANNOTATE["SECTIONS"]))
    spans = re.findall(r"(\d+)(?:-(\d+))?", told)
    covered = {n for first, last in spans for n in range(int(first), int(last or first) + 1)}
    assert covered == {*range(1, 26)}  # of the report's equations


def test_lines_of_the_page_end_with_their_statement(tmp_path, monkeypatch):
    text = 'def f():\n    """y = x"""\n    x = 1\n    y = (\n        x\n    )\n    return y\n'
    (tmp_path / "a.py").write_text(text)
    monkeypatch.setitem(ANNOTATE["page"].__globals__, "ROOT", tmp_path)
    assert [*ANNOTATE["lines_of"]("a.py", "f", "y =", "y =")] == [4, 5, 6]  # not the docstring


# ---- The tour ------------------------------------------------------------------------------------

TOUR = ROOT / "docs/TOUR.md"
BLOCK = NOTEBOOK["BLOCK"]


def run_tour() -> list[tuple[str, str]]:
    """What every block of the tour shows, and what it prints where it is pasted line by line into
    `python`, which also prints the value of an expression."""
    console, shown = code.InteractiveConsole({}), []
    for block, told in BLOCK.findall(TOUR.read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for line in [*block.splitlines(), ""]:
                more = console.push(line)
            assert not more, block
        shown.append((told, printed.getvalue()))
    return shown


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    yield
    torch.set_grad_enabled(True)


def test_the_tour_prints_what_it_shows(at_root):
    """Words and whole numbers as they stand; others but for the last digit: machines round."""
    number = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
    shown = run_tour()
    assert len(shown) == 10
    for told, printed in shown:
        assert number.sub("x", told) == number.sub("x", printed)
        for a, b in zip(number.findall(told), number.findall(printed), strict=True):
            digit = 10.0 ** Decimal(a).as_tuple().exponent  # what the last digit shown counts
            assert abs(float(a) - float(b)) < 1.1 * digit, printed


def test_the_notebook_is_the_tour(monkeypatch, at_root):
    text = (ROOT / "docs/tour.ipynb").read_text("utf-8")
    assert text == NOTEBOOK["notebook"](), "python docs/notebook.py makes it"
    cells = json.loads(text)["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) == 1 + 10
    monkeypatch.syspath_prepend("")
    for folder in (ROOT / "docs", ROOT):  # its first cell finds model.py
        monkeypatch.chdir(folder)
        exec("".join(cells[1]["source"]), {})
        assert os.path.samefile(os.getcwd(), ROOT)


# ---- The stored network --------------------------------------------------------------------------


def test_the_stored_network_opens_and_has_its_loss():
    about = (ROOT / "weights/small/README.md").read_text(encoding="utf-8")
    told = float(re.search(r"(\d\.\d{4}) bits per byte on text.txt", about)[1])
    with torch.no_grad():
        model, _, windows = network.trained()
        loss = network.bits_per_byte([model(x) for x, _ in windows])
    assert loss == pytest.approx(told, abs=1e-3)
    saved = load_checkpoint(ROOT / "weights/small")
    assert (ROOT / "weights/small/best.pt").stat().st_size < 10.1e6
    assert saved["model"]["norm.weight"].dtype == torch.bfloat16
    assert saved["model"]["layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert model.trained_length == 1024 and model.config.rope_scaling["factor"] == 4


def test_sampling_from_the_stored_network():
    """README's first command, with nothing prepared."""
    command = [sys.executable, "sample.py", "weights/small", "--prompt=def main("]
    run = subprocess.run([*command, "--max_new_tokens=8"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("def main(")


# ---- What came after -----------------------------------------------------------------------------


def refusal(**config) -> str:
    with pytest.raises(ValueError) as error:
        huggingface.config_from_json(config)
    return str(error.value)


def test_what_came_after_is_refused_as_told():
    page = (ROOT / "docs/AFTER.md").read_text(encoding="utf-8")
    families = re.findall(r"\| `(\w+)` \|", page)
    assert {"deepseek_v32", "deepseek_v4", "kimi_k25", "glm_moe_dsa"} < set(families)
    for family in set(families) - {"kimi_k2"}:
        assert f"is of the family {family}" in refusal(model_type=family)
    of_four_bits = {"quantization_config": {"quant_method": "compressed-tensors"}}
    assert refusal(model_type="kimi_k2", **of_four_bits) in page
    assert refusal(model_type="deepseek_v32") in page
    for family in ("deepseek_v3", "kimi_k2"):  # what opens
        huggingface.config_from_json({"model_type": family})


if __name__ == "__main__":  # writes what the blocks print into the tour
    os.chdir(ROOT)
    results = iter(run_tour())
    text = TOUR.read_text(encoding="utf-8")
    text = BLOCK.sub(lambda m: f"```python\n{m[1]}```\n\n```\n{next(results)[1]}```", text)
    TOUR.write_text(text, encoding="utf-8")
    (ROOT / "docs/tour.ipynb").write_text(NOTEBOOK["notebook"](), encoding="utf-8")
