"""What one learns from: the annotated page is made of the code as it is."""

import re
import runpy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

ROOT = Path(__file__).parent.parent
ANNOTATE = runpy.run_path(str(ROOT / "docs/annotate.py"))


def test_the_annotated_page_is_not_older_than_the_code():
    text = (ROOT / "docs/annotated.html").read_text(encoding="utf-8")
    assert text == ANNOTATE["page"](), "python docs/annotate.py writes it anew"
    assert len(text.encode()) < 300_000
    assert "src=" not in text and "@import" not in text and "url(" not in text
    told = ", ".join(re.findall(r"Eq\. (\d[\d-]*(?:, \d[\d-]*)*)", ANNOTATE["SECTIONS"])).split(
        ", "
    )
    covered = [range(int(x.split("-")[0]), int(x.split("-")[-1]) + 1) for x in told]
    assert {number for numbers in covered for number in numbers} == {*range(1, 26)}


def test_what_the_page_needs_is_looked_for():
    with pytest.raises(ValueError, match="has no line with 'spam'"):
        ANNOTATE["lines_of"]("model.py", "rms_norm", "spam", "return")
    with pytest.raises(ValueError, match="has no eggs"):
        ANNOTATE["lines_of"]("model.py", "eggs", "x", "return")
    # Below the docstring, to the end of a statement of several lines.
    lines = ANNOTATE["lines_of"]("model.py", "DeepSeekV3.forward", "main, *mtp", "main, *mtp")
    assert len(lines) == 4
