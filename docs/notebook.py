"""The tour as a notebook: python docs/notebook.py makes docs/tour.ipynb of docs/TOUR.md.

Nothing is run: the outputs are those that stand in the tour, and a test compares these with what
the blocks print.
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(?s)```python\n(.*?)```\n\n```\n(.*?)```")  # code and what it prints
# Jupyter runs a notebook in its own folder. It may also be opened without the repository.
AT_ROOT = """import os
import sys

places = [place for place in (".", "..", "nanoV3") if os.path.exists(f"{place}/weights/small")]
if not places:
    raise FileNotFoundError(
        "The tour needs the repository: open this notebook from a clone of it, "
        "or clone it into the folder nanoV3 and run this cell again."
    )
os.chdir(places[0])
sys.path.insert(0, os.getcwd())
"""


def notebook() -> str:
    """The notebook's text."""
    cells = []

    def add(kind: str, text: str, **more) -> None:
        lines = text.strip().splitlines(keepends=True)
        cell = {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines}
        cells.append(cell | more)

    start, *pieces = BLOCK.split((DOCS / "TOUR.md").read_text(encoding="utf-8"))
    add("markdown", start)
    add("code", AT_ROOT, execution_count=None, outputs=[])
    parts = zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True)
    for n, (block, printed, text) in enumerate(parts, 1):
        lines = printed.splitlines(keepends=True)
        output = {"output_type": "stream", "name": "stdout", "text": lines}
        add("code", block, execution_count=n, outputs=[output])
        add("markdown", text)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (DOCS / "tour.ipynb").write_text(notebook(), encoding="utf-8")
