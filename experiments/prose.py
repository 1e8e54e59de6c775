"""A second text for the claims, English prose: python experiments/prose.py HTML_FOLDER TEXT_FOLDER

The Linux kernel's documentation (GPL-2), as Debian's package linux-doc-6.12 (6.12.107-1) has it in
/usr/share/doc/linux-doc-6.12/html. A document is an English page's paragraphs of at least eight
words that end like a sentence: no code, no tables, no lists of functions. Then

    python prepare_data.py TEXT_FOLDER --name=prose --val_fraction=0.025 --test_fraction=0.025

makes the data.
"""

import html
import re
import sys
from pathlib import Path


def paragraphs(page: str) -> list[str]:
    """The sentences of a page of HTML, without its markup."""
    body = page.partition('role="main">')[2]
    found = (re.sub(r"<[^>]+>", "", x) for x in re.findall(r"<p>(.*?)</p>", body, re.DOTALL))
    texts = [" ".join(html.unescape(x).split()) for x in found]
    return [x for x in texts if len(x.split()) >= 8 and x.endswith((".", ":", "!", "?"))]


def main(source: str, target: str):
    seen = set()
    for path in sorted(Path(source).rglob("*.html")):
        name = path.relative_to(source)
        if name.parts[0] == "translations":
            continue
        kept = [x for x in paragraphs(path.read_text(encoding="utf-8")) if x not in seen]
        seen.update(kept)  # a licence, say, stands on many pages
        if sum(map(len, kept)) >= 500:
            file = Path(target, "-".join(name.with_suffix(".txt").parts))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
