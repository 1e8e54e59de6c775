#!/usr/bin/env bash
# For the authors, before a commit: format, pages that are made of other files, names in links, diffs
# in HACKING.md, and who imports whom. No test asks for any of it: a right edit may change it all.
cd "$(dirname "$0")/.." || exit
failed=0
check() { "$@" || { echo "failed: $*" >&2; failed=1; }; }

check ruff check .
check ruff format --check .
check python docs/annotate.py
check python docs/notebook.py
check git diff --stat --exit-code -- docs/annotated.html docs/tour.ipynb
told=$(python -m pytest -q -rs tests/test_docs.py tests/test_changes.py) || { echo "$told"; failed=1; }
if grep "was edited where this" <<<"$told"; then failed=1; fi
check python - <<'END'
import ast
import re
import sys
from pathlib import Path

wrong = []
# A stage imports those before it and support/; train.py also makes missing data.
stages = ["model", "load", "fp8", "huggingface", "sample", "train", "check", "bench"]
may = {f"{name}.py": {*stages[:i]} for i, name in enumerate(stages)}
may["train.py"].add("prepare_data")
may["load.py"].add("huggingface")  # where it opens such a directory
ours = {*stages, "prepare_data", "experiments", "exercises"}
for file in (*Path().glob("*.py"), *Path("support").glob("*.py")):
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found = {name.partition(".")[0] for name in names} & ours
        wrong += [f"{file} imports {name}" for name in found - may.get(file.name, set())]
# A link whose text is a name in back-ticks leads to the file that defines it.
for document in (Path("README.md"), *Path("docs").glob("**/*.md")):
    for name, path in re.findall(r"\[`([\w.]+)`\]\(([^)\s#]+\.py)\)", document.read_text("utf-8")):
        source = (document.parent / path).read_text("utf-8")
        for part in name.split(".") if not name.endswith(".py") else ():
            if not re.search(rf"(?m)^ *(def|class) {part}\b", source):
                wrong.append(f"{document}: {path} has no {name}")
sys.exit("\n".join(wrong) or 0)
END
exit $failed
