"""prepare_data.py: the tokenizer, the split, the files, the downloads, every refusal."""

import base64
import gzip
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data as pd
import support.tokenizer as tk
import support.tokens as tf

ROOT = Path(pd.__file__).parent
WORDS = ["the", "cat", "sat", "mat", "and", "12345", "dogs,", "self.value", "==", "None:", "'x'"]
BYTES = {bytes([b]): b for b in range(256)}
ONLY_BYTES = tk.encoding_from(BYTES, tk.PATTERN, {tk.END_OF_TEXT: 256})


def prose(seed: int, lines: int) -> str:
    draw = random.Random(seed)
    return "".join(
        " ".join(draw.choice(WORDS) + str(draw.randrange(99)) for _ in range(8)) + "\n"
        for _ in range(lines)
    )


def make(tmp_path, source, **keys) -> Path:
    """A prepared folder, without a test unless one is asked for."""
    keys = {
        "name": "d",
        "out": str(tmp_path / "data"),
        "vocab_size": 300,
        "test_fraction": 0,
    } | keys
    return pd.prepare(pd.DataConfig(source=str(source), **keys))


def ids_of(folder: Path, split: str) -> list[int]:
    return getattr(tf.load_dataset(folder), split).arrays[0].tolist()


def text_of(folder: Path, split: str) -> str:
    """The text of a prepared folder with its document marks, decoded from the ids."""
    return tk.load_tokenizer(folder).decode(ids_of(folder, split))


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


@pytest.fixture
def book(tmp_path) -> Path:
    """A small prepared folder."""
    (tmp_path / "book.txt").write_text(prose(1, 200))
    return make(tmp_path, tmp_path / "book.txt", name="book")


# ---- Byte pair encoding ------------------------------------------------------------------------


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


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_makes_the_round_trip(text):
    ids = ONLY_BYTES.encode_ordinary(text)
    assert ONLY_BYTES.decode_bytes(ids) == text.encode() and 256 not in ids


# ---- How text is split into pieces -------------------------------------------------------------

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
    tokenizers = pytest.importorskip("tokenizers")
    steps = tokenizers.pre_tokenizers
    stages = [steps.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return lambda text: [piece for piece, _ in steps.Sequence(stages).pre_tokenize_str(text)]


def mixed_texts() -> list[str]:
    draw = random.Random(0)
    letters = [*MIXED, *" \n1a中" * 5]
    texts = ["".join(draw.choices(letters, k=draw.randrange(1, 14))) for _ in range(8000)]
    return [*texts, *list(pd.read_stdlib().values())[::40]]


def test_pattern_splits_as_deepseeks_three_stages():
    reference, blanks = splitter(*STAGES), regex.compile(r"\s\s+(?=\p{N})")
    for text in mixed_texts():
        text = blanks.sub(" ", text)  # of several before a number, the last stands apart here
        assert regex.findall(tk.PATTERN, text) == reference(text), text[:100]
    assert regex.findall(tk.PATTERN, "abc中文def") == ["abc", "中文", "def"]
    assert regex.findall(tk.PATTERN, "x   12") == ["x", "  ", " ", "12"]
    assert reference("x   12") == ["x", "   ", "12"]


def test_three_programs_read_the_pattern_alike():
    exported, texts = splitter(tk.PATTERN), mixed_texts()
    pieces = [[piece.encode() for piece in regex.findall(tk.PATTERN, text)] for text in texts]
    longer = {piece for found in pieces for piece in found if len(piece) > 1}
    ranks = BYTES | {piece: 256 + i for i, piece in enumerate(sorted(longer))}
    encoding = tk.encoding_from(ranks, tk.PATTERN, {})  # it has a token for every piece
    for text, found in zip(texts, pieces, strict=True):
        assert encoding.encode_ordinary(text) == [ranks[piece] for piece in found], text[:100]
        assert [piece.encode() for piece in exported(text)] == found, text[:100]


def test_no_character_is_lost():
    surrogates = range(0xD800, 0xE000)
    text = "a".join(chr(i) for i in range(sys.maxunicode + 1) if i not in surrogates)
    assert "".join(regex.findall(tk.PATTERN, text)) == text
    assert ONLY_BYTES.decode_bytes(ONLY_BYTES.encode_ordinary(text)) == text.encode()


def test_a_cut_is_as_late_as_it_can_be():
    assert list(tk.cut("a\nb\nc\n\n\nd\ne", 7)) == ["a\nb\n", "c\n\n\nd\ne"]
    assert list(tk.cut("", 7)) == [""] and list(tk.cut("a" * 9, 7)) == ["a" * 7, "aa"]


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


# ---- What a tokenizer is trained on ------------------------------------------------------------


def test_a_tokenizer_is_trained_on_every_training_document(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"word{chr(97 + i) * 3} " * 50 + "\n" + prose(i, 5))
    documents = pd.read_paths(str(tmp_path), "text")
    train, _, _ = pd.split_documents(documents, 0.1)
    folder = make(tmp_path, tmp_path, val_fraction=0.1)
    assert tk.load_tokenizer(folder)._mergeable_ranks == tk.train_bpe(train, 299, tk.PATTERN)


@pytest.mark.parametrize("long_first", [True, False])
def test_a_sample_is_bounded_and_spread_over_long_and_short_documents(long_first, monkeypatch):
    monkeypatch.setattr(tk, "PIECE", 100)
    lines = [f"line {i:05d}\n" for i in range(3000)]  # of 11 characters
    long, short = "".join(lines[:2000]), ["".join(lines[i : i + 2]) for i in range(2000, 3000, 2)]
    texts = [long, *short] if long_first else [*short, long]
    assert tk.sample_texts(texts, 33_000) == texts
    for limit in 3300, 20_000, 32_999:
        sample = tk.sample_texts(texts, limit)
        numbers = [int(line[5:]) for line in "".join(sample).splitlines()]
        assert all(line in lines for text in sample for line in text.splitlines(keepends=True))
        assert limit - 100 <= 11 * len(numbers) <= limit + 100 and len({*numbers}) == len(numbers)
        share = len(numbers) / 3000
        for begin in range(0, 3000, 500):  # its share of every part
            part = [i for i in numbers if begin <= i < begin + 500]
            assert abs(len(part) - 500 * share) <= 20
    assert {len(piece) for piece in tk.sample_texts(["x" * 1000], 500)} == {100}  # no line ends


def test_a_large_text_is_sampled_for_the_tokenizer_and_encoded_piece_by_piece(
    tmp_path, monkeypatch
):
    (tmp_path / "a.txt").write_text(text := prose(1, 400))
    whole = make(tmp_path, tmp_path / "a.txt", name="whole")
    monkeypatch.setattr(tk, "PIECE", 300)
    monkeypatch.setattr(tf, "PIECE", 300)
    pieces = make(tmp_path, tmp_path / "a.txt", name="pieces")
    for split in "train", "val":
        assert ids_of(pieces, split) == ids_of(whole, split)
    assert ids_of(pieces, "train").count(299) == 1  # one document
    monkeypatch.setattr(tk, "BPE_SAMPLE", 4000)
    (train,), _, _ = pd.split_documents({"a.txt:0": text}, 0.05)
    ranks = tk.load_tokenizer(make(tmp_path, tmp_path / "a.txt", name="sampled"))._mergeable_ranks
    assert ranks == tk.train_bpe(tk.sample_texts([train], 4000), 299, tk.PATTERN)
    assert ranks != tk.load_tokenizer(whole)._mergeable_ranks


# ---- The default corpus and the split ----------------------------------------------------------


def test_default_corpus_its_round_trip_and_counts(tmp_path, monkeypatch):
    documents = pd.read_stdlib()
    assert len(set(documents.values())) == len(documents)
    assert "argparse.py" in documents and "json/decoder.py" in documents
    assert 5e6 < sum(len(text.encode()) for text in documents.values()) < 15e6
    left_out = {"test", "tests", "site-packages", "encodings"}
    assert not [name for name in documents if left_out & set(name.split("/"))]
    size = [len("".join(part).encode()) for part in pd.split_documents(documents, 0.05, 0.05)]
    assert all(0.045 < held / sum(size) < 0.055 for held in size[1:])
    some = dict(list(documents.items())[::16])  # all of them take seconds
    monkeypatch.setattr(pd, "read_stdlib", lambda: some)
    folder = pd.prepare(pd.DataConfig(out=str(tmp_path)))
    data, encoding = tf.load_dataset(folder), tk.load_tokenizer(folder)
    assert data.vocab_size == encoding.eot_token + 1 == 4096 and 3 < data.val_bytes_per_token < 4
    train, val, _ = pd.split_documents(some, 0.05, 0.05)
    assert text_of(folder, "val") == "".join(tk.END_OF_TEXT + text for text in val)
    assert ids_of(folder, "train").count(4095) == len(train)


def test_split_takes_whole_documents_by_the_hash_of_their_names():
    """Except copies, and what would overshoot."""
    documents = {f"f{i}": prose(i, 20) for i in range(100)}
    train, val, test = pd.split_documents(documents, 0.1)
    assert test == [] and sorted(train + val) == sorted(documents.values())
    assert 0.08 < sum(map(len, val)) / sum(map(len, train + val)) <= 0.11
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert val == [documents[name] for name in order[: len(val)]]
    assert pd.split_documents(dict(reversed(documents.items())), 0.1)[1] == val
    first, second, *others = order
    documents[first] = documents[others[7]][:-100] + "one line of its own\n"  # nearly a copy
    documents[second] = prose(99, 400)
    _, val, _ = pd.split_documents(documents, 0.1)
    assert documents[first] not in val and documents[second] not in val and len(val) >= 3


def test_default_corpus_leaves_out_copies_tests_and_extremes(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    sizes = {"a": 199, "b": 200, "c": 400_000, "d": 400_001, "test/e": 300, "lib/f": 300}
    for name, size in sizes.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(name[-1] * size)
    (tmp_path / "lib/g.py").write_text("f" * 300)  # as lib/f.py
    assert list(pd.read_stdlib()) == ["b.py", "c.py", "lib/f.py"]


def by_hash(texts: list[str]) -> dict[str, str]:
    """{name: text}, with names in whose order split_documents sees the texts."""
    names = sorted(map(str, range(len(texts))), key=lambda x: hashlib.sha256(x.encode()).digest())
    return dict(zip(names, texts, strict=True))


def lines_of(letter: str, count: int) -> str:
    """Lines of 10 characters, none like another."""
    return "".join(f"{letter}{i:08d}\n" for i in range(count))


@pytest.mark.parametrize(
    "texts, taken",
    [  # of 1000 bytes, a tenth is the target; the texts taken, else the end of the largest
        ([lines_of("a", 11), lines_of("b", 89)], [0]),  # a tenth over the target is not too much
        ([lines_of("a", 10) + "a" * 11, lines_of("b", 87) + "b" * 9], []),  # a byte more is
        ([lines_of("a", 10), lines_of("b", 1), lines_of("c", 89)], [0]),  # it is reached
        ([lines_of("a", 5), lines_of("b", 95)], [0]),  # half of it is enough
        ([lines_of("a", 4) + "x" * 9, lines_of("b", 95) + "x"], [0, "end"]),  # a byte less is not
        # Of 180 bytes, the target here, 90 are in lines that another text has, too; then of 179.
        ([lines_of("a", 10) + "A" * 79 + "\n", lines_of("a", 10), lines_of("b", 152)], [0]),
        ([lines_of("a", 10) + "A" * 78 + "\n", lines_of("a", 10), lines_of("b", 152)], []),
        (["same here\n" * 10, lines_of("b", 90)], [0]),  # repeats itself, copies no other
    ],
)
def test_split_at_its_thresholds(texts, taken):
    train, val, _ = pd.split_documents(by_hash(texts), 0.1)
    whole = [texts[i] for i in taken if i != "end"]
    assert val[: len(whole)] == whole
    ends, largest = val[len(whole) :], max(texts, key=len)
    assert len(ends) == (taken in ([], [0, "end"])) and all(map(largest.endswith, ends))
    target = sum(map(len, texts)) / 10
    assert not ends or abs(sum(map(len, val)) - target) <= 10  # to the line
    assert sorted("".join(train + val)) == sorted("".join(texts))


@pytest.mark.parametrize("newline", ["\n", ""])
def test_split_cuts_the_end_off_a_single_file(newline):
    text = "title\n" + prose(1, 300).replace("\n", newline)
    (train,), (val,), test = pd.split_documents({"a": text}, 0.1, 0.1)
    assert test == []
    assert train + val == text and abs(len(val) / len(text) - 0.1) < 0.01
    assert not newline or train.endswith("\n")


def test_tokenizer_never_sees_the_validation_text_and_may_serve_other_folders(tmp_path):
    for ending, seen in (150, True), (30, False):
        (tmp_path / "a.txt").write_text(prose(1, 200) * (1 if seen else 2) + "zyxwzyxw\n" * ending)
        folder = make(tmp_path, tmp_path / "a.txt", vocab_size=600, overwrite=True)
        assert "zyxwzyxw" in text_of(folder, "val") and ("zyxw" in text_of(folder, "train")) == seen
        tokens = tk.load_tokenizer(folder)._mergeable_ranks
        assert bool([token for token in tokens if b"zy" in token]) == seen
    other = make(tmp_path, tmp_path / "a.txt", tokenizer=str(folder), vocab_size=300, name="other")
    assert meta_of(other)["tokenizer_sha256"] == meta_of(folder)["tokenizer_sha256"]


# ---- The test text -----------------------------------------------------------------------------


def lines_from(number: int, count: int = 10) -> str:
    """Lines of 10 characters, none like another or like those from another number."""
    return "".join(f"{number:03d}{i:06d}\n" for i in range(count))


def write_by_hash(folder: Path, texts: list[str]) -> Path:
    """A folder of files whose documents split_documents sees in the order of the texts."""
    folder.mkdir()
    names = [f"{i:03d}.txt" for i in range(len(texts))]
    names.sort(key=lambda name: hashlib.sha256(f"{name}:0".encode()).digest())
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_text(text)
    return folder


def test_test_documents_are_whole_and_follow_validation_by_the_hash_of_their_names():
    texts = [lines_from(i) for i in range(400)]  # of 100 bytes: 20 are a twentieth
    train, val, test = pd.split_documents(by_hash(texts), 0.1, 0.05)
    assert (val, test, train) == (texts[:40], texts[40:60], texts[60:])
    texts[45] = texts[45][:90]  # the 20 lack 10 bytes: one more
    assert pd.split_documents(by_hash(texts), 0.1, 0.05)[2] == texts[40:61]
    assert pd.split_documents(by_hash(texts), 0.1)[2] == []


def test_no_test_document_is_over_a_tenth_of_the_target_or_a_copy():
    """Of 20,000 bytes a tenth is for the test; a tenth of that is 200 bytes."""
    texts = [lines_from(i) for i in range(200)]
    large, larger = lines_from(500, 20), lines_from(501, 20) + "\n"  # of 200 and 201 bytes
    texts[20:24] = large, larger[:-1]  # in the place of as many bytes
    assert pd.split_documents(by_hash(texts), 0.1, 0.1)[2] == texts[20:38]
    texts[21], texts[-1] = larger, texts[-1][1:]
    train, _, test = pd.split_documents(by_hash(texts), 0.1, 0.1)
    assert test == [large, *texts[22:40]] and larger in train
    texts[22] = texts[120][:60] + texts[22][:40]  # six lines of ten that another text has, too
    assert pd.split_documents(by_hash(texts), 0.1, 0.1)[2] == [large, *texts[23:41]]


def test_the_test_text_is_written_and_no_tokenizer_sees_it(tmp_path):
    texts = [lines_from(i) for i in range(400)]
    texts[20:40] = [text[:-10] + "zyxwzyxw\n" for text in texts[20:40]]  # these are the test
    source = write_by_hash(tmp_path / "texts", texts)
    folder = make(tmp_path, source, test_fraction=0.05, vocab_size=600)
    train, val, test = pd.split_documents(pd.read_paths(str(source), "text"), 0.05, 0.05)
    for split, part in ("train", train), ("val", val), ("test", test):
        assert text_of(folder, split) == "".join(tk.END_OF_TEXT + text for text in part)
    assert "zyxw" in text_of(folder, "test") and "zyxw" not in text_of(folder, "train")
    ranks = tk.load_tokenizer(folder)._mergeable_ranks
    assert ranks == tk.train_bpe(train, 599, tk.PATTERN) and not [x for x in ranks if b"zy" in x]


def test_a_folder_has_a_test_where_its_latest_text_has_one(tmp_path):
    """A file of one document has none, and the test of a folder that is replaced does not stay."""
    texts = write_by_hash(tmp_path / "texts", [lines_from(i) for i in range(300)])
    (tmp_path / "one.txt").write_text(prose(1, 300))
    for source, fraction, has_test in (
        (tmp_path / "one.txt", 0.4, False),
        (texts, 0.05, True),
        (tmp_path / "one.txt", 0.4, False),
        (texts, 0.1, True),
        (texts, 0, False),
    ):
        folder = make(tmp_path, source, test_fraction=fraction, overwrite=True)
        assert (folder / "test.bin").exists() == has_test
        assert (tf.load_dataset(folder).test is not None) == has_test
    assert [path.name for path in folder.parent.iterdir()] == ["d"]


# ---- Files -------------------------------------------------------------------------------------


def test_files_word_by_word(book):
    content, encoding = (book / "val.bin").read_bytes(), tk.load_tokenizer(book)
    words = np.frombuffer(content, "<i4", 256).tolist()
    assert words[:3] == [20240520, 1, (len(content) - 1024) // 2] and not any(words[3:])
    text = text_of(book, "val").removeprefix(tk.END_OF_TEXT)
    ids = np.frombuffer(content, "<u2", offset=1024).tolist()
    assert ids == [299, *encoding.encode_ordinary(text)]
    assert tf.load_dataset(book).val_bytes_per_token == len(text.encode()) / len(ids)
    lines = (book / "tokenizer.tiktoken").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(299))
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert tokens == [encoding.decode_single_token_bytes(rank) for rank in range(299)]


def test_vocabularies_over_65536_are_stored_as_uint32(tmp_path, monkeypatch):
    large = tk.encoding_from(BYTES, ".", {tk.END_OF_TEXT: 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (tmp_path / "a.txt").write_text(prose(1, 50))
    folder = make(tmp_path, tmp_path / "a.txt", tokenizer="cl100k_base")
    assert np.fromfile(folder / "val.bin", "<i4", 2).tolist() == [20240801, 7]
    data = tf.load_dataset(folder)  # loads without the network
    assert data.vocab_size == 70_001 and data.val.arrays[0].dtype == np.uint32
    assert data.val.arrays[0][0] == 70_000


def write_shard(path: Path, ids: list[int], version: int = 1) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return path


def test_shards_of_others_open_and_windows_never_span_two(book):
    (book / "train.bin").unlink()
    write_shard(book / "train_000001.bin", list(range(0, 10)))
    write_shard(book / "train_000002.bin", list(range(20, 26)))
    train = tf.load_dataset(book).train
    assert len(train) == 16
    rows = train.windows(np.arange(13), 4)
    assert rows.dtype == np.int64 and rows.shape == (13, 4)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 20, 21, 22]
    assert (rows == rows[:, :1] + np.arange(4)).all()
    for starts, length in ([13], 4), ([-1], 4), ([0], 7):
        with pytest.raises(ValueError, match="no windows of"):
            train.windows(np.array(starts), length)


def test_many_tokens_are_cut_into_files_of_one_length(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(1, 200))
    assert np.iinfo("<i4").max > 1.9 * tf.TOKENS_PER_FILE  # what a header can count
    one = make(tmp_path, tmp_path / "a.txt", name="one", val_fraction=0.01)
    ids = ids_of(one, "train")
    for limit, files in (len(ids), 1), (len(ids) - 1, 2), (len(ids) // 11, 12):
        monkeypatch.setattr(tf, "TOKENS_PER_FILE", limit)
        cut = make(tmp_path, tmp_path / "a.txt", name=f"limit {limit}", val_fraction=0.01)
        names = [f"train_{i + 1:06d}.bin" for i in range(files)] if files > 1 else ["train.bin"]
        assert sorted(path.name for path in cut.glob("train*")) == names
        arrays = tf.load_dataset(cut).train.arrays
        lengths = [len(array) for array in arrays]
        assert max(lengths) <= limit and max(lengths) - min(lengths) <= 1
        assert np.concatenate(arrays).tolist() == ids and ids_of(cut, "val") == ids_of(one, "val")


def test_too_large_a_validation_or_test_text_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(text := lines_of("a", 100))
    (_,), (val,), _ = pd.split_documents({"a.txt:0": text}, 0.1)
    monkeypatch.setattr(tk, "train_bpe", lambda *args: pytest.fail("this takes hours"))
    monkeypatch.setattr(pd, "TOKENS_PER_FILE", len(val))  # and <|endoftext|>
    with pytest.raises(ValueError, match="101 bytes of validation text, expected at most 100;"):
        make(tmp_path, tmp_path / "a.txt", val_fraction=0.1)
    source = write_by_hash(tmp_path / "texts", [lines_from(i) for i in range(200)])
    monkeypatch.setattr(pd, "TOKENS_PER_FILE", 2019)  # of 20 documents and their marks a byte less
    said = "2,020 bytes of test text, expected at most 2,019; give a lower --test_fraction"
    with pytest.raises(ValueError, match=said):
        make(tmp_path, source, test_fraction=0.1)


DAMAGES = [  # what the sentence says, and how the folder is damaged
    ("No such file", lambda d: (d / "val.bin").unlink()),
    ("holds id 300 of 300 tokens", lambda d: write_shard(d / "val.bin", [1] * 5000 + [300])),
    ("id 300 of 300", lambda d: write_shard(d / "val.bin", [1] * 5000 + [300] + [1] * 1023)),
    ("id 300 of 300", lambda d: write_shard(d / "val.bin", [1] * 1023 + [300] + [1] * 5000)),
    ("holds id 300 of 300 tokens", lambda d: write_shard(d / "train.bin", [300] + [1] * 5000)),
    ("no whole token file", lambda d: (d / "val.bin").write_bytes(b"")),
    ("no whole token file", lambda d: write_shard(d / "val.bin", [1], version=2)),
    ("no whole token file", lambda d: write_shard(d / "val.bin", [])),
    ("no whole token file", lambda d: os.truncate(d / "val.bin", 1500)),
    ("1 tokens with 1 bytes of text", lambda d: write_shard(d / "val.bin", [65])),
    ("id 300 of 300", lambda d: write_shard(d / "test.bin", [1] * 5000 + [300])),
    ("no whole token file", lambda d: (d / "test.bin").write_bytes(b"")),
    ("no whole token file", lambda d: write_shard(d / "test.bin", [])),
    ("2 tokens with 0 bytes of text", lambda d: write_shard(d / "val.bin", [299, 299])),
    ("/meta.json'); make it", lambda d: (d / "meta.json").unlink()),
    ("no whole tokenizer", lambda d: os.truncate(d / "meta.json", 50)),
    ("('tokenizer_sha256')", lambda d: (d / "meta.json").write_text("{}")),
    ("sha256 of tokenizer.tiktoken is not", lambda d: os.truncate(d / "tokenizer.tiktoken", 1000)),
]


@pytest.mark.parametrize("sentence, damage", DAMAGES)
def test_damaged_folders_are_refused(book, sentence, damage):
    tf.load_dataset(book)
    damage(book)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
        tf.load_dataset(book)
    assert str(book) in str(caught.value)


# ---- Sources -----------------------------------------------------------------------------------


def test_folders_globs_and_files_of_text(tmp_path, capsys):
    source = tmp_path / "so[ur]ce"
    for name in ("b.txt", "sub/a.md", ".git/config", "sub/.hidden"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name * 40 + "\n" + prose(len(name), 30))
    (source / "c.png").write_bytes(b"\x89PNG\xff\xfe")
    assert list(pd.read_paths(str(source), "text")) == ["b.txt:0", "sub/a.md:0"]
    assert "c.png: not UTF-8 text" in capsys.readouterr().err
    assert list(pd.read_paths(str(tmp_path / "so*/**/*.md"), "text")) == ["a.md:0"]
    (source / "b.txt").write_bytes(b"one\r\ntwo<|endoftext|>three<|endoftext|>\n")
    documents = pd.read_paths(str(source / "b.txt"), "text")
    assert documents == {"b.txt:0": "one\ntwo", "b.txt:1": "three"}


def test_links_are_followed_but_no_folder_is_read_twice(tmp_path):
    for name in "texts/a.txt", "texts/sub/b.txt", "elsewhere/c.txt":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(prose(1, 3))
    for link, target in ("up", ".."), ("again", "sub"), ("sub/round", "."), ("sub/to_a", ".."):
        (tmp_path / "texts" / link).symlink_to(target)
    found = [path.resolve() for path in pd.find_files(str(tmp_path / "texts"))]
    expected = "elsewhere/c.txt", "texts/a.txt", "texts/sub/b.txt"
    assert sorted(found) == [tmp_path.resolve() / name for name in expected]


@pytest.mark.parametrize("closed, function", [("sub", "scandir"), ("sub/a.txt", "open")])
def test_what_the_system_does_not_let_us_read_is_named(tmp_path, monkeypatch, closed, function):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text(prose(1, 30))
    module, path = {"scandir": os, "open": io}[function], str(tmp_path / closed)
    real = getattr(module, function)

    def deny(what, *args, **keys):
        if str(what) == path:
            raise PermissionError(13, "Permission denied", path)
        return real(what, *args, **keys)

    monkeypatch.setattr(module, function, deny)
    said = f"{path} cannot be read (Permission denied); allow it or leave it out"
    with pytest.raises(OSError, match=re.escape(said)):
        make(tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_collections_of_documents(tmp_path, kind, capsys):
    texts = [prose(i, 10) + tk.END_OF_TEXT for i in range(40)]  # in a document it is text
    path = tmp_path / f"docs.{kind}"
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").table({"body": [*texts, None]})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        lines = (json.dumps({"body": text}) + "\n" for text in [*texts, None])
        lines = "\n".join(lines)  # and blank ones
        (gzip.open if kind.endswith("gz") else open)(path, "wt").write(lines)
    folder = make(tmp_path, path, text_key="body", val_fraction=0.1, name="")
    train, val = text_of(folder, "train"), text_of(folder, "val")
    assert sorted((train + val).split(tk.END_OF_TEXT)[1::2]) == sorted(t[:-13] for t in texts)
    assert f"left out 1 empty records of {path}: their 'body' is null" in capsys.readouterr().err
    assert folder.name == "docs" and 3 <= ids_of(folder, "val").count(299) <= 4
    with pytest.raises(ValueError, match="text_key"):
        make(tmp_path, path, overwrite=True, name="")
    assert text_of(folder, "val") == val  # the refused run took nothing away


def test_a_byte_order_mark_is_no_text(tmp_path):
    texts = {"a.txt": prose(1, 9), "b.jsonl": json.dumps({"text": prose(2, 9)})}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    found = pd.read_paths(str(tmp_path), "text")
    assert found == {"a.txt:0": prose(1, 9), "b.jsonl:0": prose(2, 9)}


def test_a_large_binary_file_is_not_read_whole(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(prose(1, 9))
    with open(tmp_path / "video", "wb") as file:
        file.write(b"\x80" * 9)
        file.truncate(2**40)  # which takes no space on the disk
    assert len(pd.read_paths(str(tmp_path), "text")) == 1
    assert "video: not UTF-8 text" in capsys.readouterr().err


def test_a_damaged_parquet_file_is_named(tmp_path):
    table = pytest.importorskip("pyarrow").table({"text": ["some words " * 99] * 9})
    pytest.importorskip("pyarrow.parquet").write_table(table, path := tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=r"a\.parquet cannot be read") as caught:
        pd.read_paths(str(path), "text")
    assert "None" not in str(caught.value)


def test_a_column_that_is_no_text_is_refused(tmp_path):
    table = pytest.importorskip("pyarrow").table({"n": [5, 6], "body": ["a", "b"]})
    pytest.importorskip("pyarrow.parquet").write_table(table, path := tmp_path / "a.parquet")
    for key, said in ("n", "a record has 5 as 'n', expected text"), ("x", "columns ['n', 'body']"):
        with pytest.raises(ValueError, match=re.escape("a.parquet cannot be read: ")) as caught:
            pd.read_paths(str(path), key)
        assert said in str(caught.value) and "--text_key=KEY?" in str(caught.value)


def test_bad_json_lines_and_half_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    for line, said in [
        ('{"text": 5}', "has 5 as 'text', expected text or null; is the text under another --text"),
        ('{"text": ["a"]}', "has ['a'] as 'text', expected text or null"),
        ('["text"]', """is ["text"], expected an object with 'text'"""),
        ('{"text": "a"', "is no JSON (Expecting ',' delimiter); correct or delete it"),
        ('{"t": "a"}', "has keys ['t'], not 'text'; is the text under another --text_key=KEY?"),
        ("[" * 100_000, "is no JSON ("),
    ]:
        path.write_text('{"text": "fine"}\n\n' + line + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: line 3 ") as caught:
            pd.read_paths(str(path), "text")
        assert said in str(caught.value)
    path.write_text(r'{"text": "a\ud800b"}')
    assert pd.read_paths(str(path), "text") == {"a.jsonl:0": "a?b"}
    whole = gzip.compress(random.Random(0).randbytes(999).hex().encode())
    for content, error in [
        (whole[:-9], "EOFError"),
        (b"not compressed", "BadGzipFile"),
        (whole[:10] + b"\xff" * 99 + whole[99:], "error"),
    ]:
        (tmp_path / "b.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"gz cannot be read: {error}\("):
            pd.read_paths(str(tmp_path / "b.jsonl.gz"), "text")


# ---- Downloads, from a hub that is a folder -----------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that a stand-in for huggingface_hub serves: hub/<owner>/<repository>/<file>."""

    def hf_hub_download(repo: str, file: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        return str(tmp_path / "hub" / repo / file)

    fake = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    gpt2 = tk.encoding_from(BYTES, ".", {tk.END_OF_TEXT: 50_256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2)
    for repo, _ in [("roneneldan/TinyStories", 0), *pd.SHARDS.values()]:
        (tmp_path / "hub" / repo).mkdir(parents=True)
    return tmp_path / "hub"


def test_tinystories(hub, tmp_path):
    stories = [prose(i, 5) for i in range(20)]
    for part, texts in ("train", stories[:15]), ("valid", stories[15:]):
        path = hub / "roneneldan/TinyStories" / f"TinyStoriesV2-GPT4-{part}.txt"
        path.write_text("<|endoftext|>\n".join(texts))
    folder = make(tmp_path, "tinystories", name="")
    assert text_of(folder, "val").split(tk.END_OF_TEXT)[-1] == "\n" + stories[-1]
    assert [ids_of(folder, split).count(299) for split in ("train", "val")] == [15, 5]


def test_a_part_without_text_is_refused(hub, tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 50))
    with pytest.raises(ValueError, match=r"no text for validation \(val_fraction=1e-06\)"):
        make(tmp_path, tmp_path / "a.txt", val_fraction=1e-6)
    for part, text in ("train", ""), ("valid", prose(2, 5)):
        path = hub / "roneneldan/TinyStories" / f"TinyStoriesV2-GPT4-{part}.txt"
        path.write_text(text)
    with pytest.raises(ValueError, match="tinystories has no text for training"):
        make(tmp_path, "tinystories")


@pytest.mark.parametrize("source", pd.SHARDS)
def test_shards(hub, tmp_path, source):
    repo, _ = pd.SHARDS[source]
    for i, shard in enumerate(["val_000000", "train_000001", "train_000002"]):
        write_shard(hub / repo / f"{source}_{shard}.bin", [50_256, *range(65, 85 + i)])
    folder = make(tmp_path, source, name="", shards=2)
    data = tf.load_dataset(folder)
    assert len(data.train) == 22 + 23 and len(data.val) == 21 and data.vocab_size == 50_257
    assert data.val_bytes_per_token == 20 / 21
    write_shard(hub / repo / f"{source}_train_000002.bin", [1] * 5000 + [50_257] + [1] * 5000)
    with pytest.raises(ValueError, match="holds ids beyond gpt2's 50257 tokens"):
        make(tmp_path, source, name="", shards=2, overwrite=True)
    assert len(tf.load_dataset(folder).val) == 21  # the folder made before is kept


# ---- Nothing half-made -------------------------------------------------------------------------


def test_an_interruption_keeps_the_old_folder_and_leaves_no_new_one(book, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(2, 100))
    before = {path.name: path.read_bytes() for path in book.iterdir()}

    def fail(folder):  # at the last moment: all files are there
        assert {path.name for path in folder.iterdir()} == before.keys()
        raise KeyboardInterrupt

    monkeypatch.setattr(pd, "load_dataset", fail)
    for name in ("book", "new"):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, tmp_path / "a.txt", overwrite=True, name=name)
    assert list((tmp_path / "data").iterdir()) == [book]
    assert {path.name: path.read_bytes() for path in book.iterdir()} == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


STOPPED = """
import os, sys
import prepare_data as pd

source, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])

def stop(event, args):  # before the system makes, renames or deletes something
    global steps
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        steps -= 1
        if steps < 0:
            os._exit(9)  # nothing is cleaned up, as after kill -9

sys.addaudithook(stop)
pd.prepare(pd.DataConfig(source, "book", out, vocab_size=300, overwrite=True))
"""


def test_killed_at_any_step_leaves_a_whole_folder_that_the_next_run_finds(book, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(prose(2, 50))
    old = contents(book)
    new = contents(make(tmp_path, tmp_path / "a.txt", name="new"))
    found = []
    for steps in range(30):
        out = tmp_path / f"data {steps}"
        shutil.copytree(book, out / "book")
        command = [sys.executable, "-c", STOPPED, tmp_path / "a.txt", out, str(steps)]
        if subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0:
            break
        left = [path.name for path in out.glob("book~new-*")]
        capsys.readouterr()
        with pytest.raises(FileExistsError, match="book exists; replace it with --overwrite"):
            make(tmp_path, tmp_path / "a.txt", name="book", out=str(out))
        said, now = capsys.readouterr().err, contents(out / "book")
        assert now in (old, new)
        assert sorted(path.name for path in out.iterdir()) == ["book", *left]
        assert all(f"{name} is from a run that was stopped" in said for name in left)
        found.append(["old", "new"][now == new] + " back" * ("is back from" in said))
        found[-1] += " deleted" * ("is whole; deleted" in said)
        make(tmp_path, tmp_path / "a.txt", name="book", out=str(out), overwrite=True)
        assert contents(out / "book") == new
    assert [*dict.fromkeys(found)] == ["old", "old back", "new deleted", "new"]
    assert found.count("new deleted") == 5  # four files and the folder that they were in


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_an_interruption_between_the_renames_restores_the_old_folder(
    book, tmp_path, monkeypatch, error
):
    (tmp_path / "a.txt").write_text(prose(2, 50))
    before, real, calls = contents(book), os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(error):
        make(tmp_path, tmp_path / "a.txt", name="book", overwrite=True)
    assert list((tmp_path / "data").iterdir()) == [book] and contents(book) == before
    assert calls == [tk.backup_of(book), book, book]


def test_all_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(2, 50))
    flushed, real = set(), os.replace
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino))

    def replace(source, target):
        files = {path.stat().st_ino: path.name for path in (*Path(source).iterdir(), Path(source))}
        assert files.keys() <= flushed, files
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    folder = make(tmp_path, tmp_path / "a.txt")
    assert folder.parent.stat().st_ino in flushed


def test_a_folder_made_meanwhile_is_replaced_only_on_request(book, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(2, 50))
    folder, real = tmp_path / "data" / "d", tk.write_tokenizer

    def meanwhile(encoding, new):
        shutil.copytree(book, folder, dirs_exist_ok=True)
        real(encoding, new)

    monkeypatch.setattr(pd, "write_tokenizer", meanwhile)
    with pytest.raises(FileExistsError, match="d exists; replace it with --overwrite"):
        make(tmp_path, tmp_path / "a.txt")
    assert contents(folder) == contents(book)
    make(tmp_path, tmp_path / "a.txt", overwrite=True)
    assert contents(folder) != contents(book)
    (book / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"thesis\.txt would be lost"):
        make(tmp_path, tmp_path / "a.txt", overwrite=True)
    assert contents(folder) == contents(book)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["book", "d"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tiktoken.model", "tokenization_a-b.py"])
def test_a_releases_own_folder_is_not_replaced(tmp_path, name):
    (tmp_path / "a.txt").write_text(prose(2, 50))
    (tmp_path / "data/d").mkdir(parents=True)
    (tmp_path / "data/d" / name).write_text("its only copy")
    with pytest.raises(FileExistsError, match=f"{name} would be lost"):
        make(tmp_path, tmp_path / "a.txt", overwrite=True)
    assert (tmp_path / "data/d" / name).read_text() == "its only copy"
    (tmp_path / "data/d/val.bin").write_text("")  # now it is one of the copies that we make
    assert name not in contents(make(tmp_path, tmp_path / "a.txt", overwrite=True))


def test_an_empty_folder_and_a_link_are_replaced(book, tmp_path):
    (tmp_path / "a.txt").write_text(prose(2, 50))
    (tmp_path / "data/d").mkdir()
    empty = make(tmp_path, tmp_path / "a.txt")
    (tmp_path / "data/link").symlink_to(book)
    link, before = make(tmp_path, tmp_path / "a.txt", name="link", overwrite=True), contents(book)
    assert contents(empty) == contents(link) != before and not link.is_symlink()
    assert contents(book) == before
    assert sorted(path.name for path in link.parent.iterdir()) == ["book", "d", "link"]


def test_a_folder_put_aside_is_found_again(book, tmp_path, monkeypatch, capsys):
    """Also by train.py, under data/ by its name or by its path."""
    import train

    monkeypatch.chdir(tmp_path)
    for data in "book", "data/book", str(book):
        os.replace(book, aside := tk.backup_of(book))
        with pytest.raises(ValueError, match=re.escape(f"aside: rename {aside} to {book}")):
            tf.load_dataset(book)
        config = train.TrainConfig(data=data, block_size=16)
        assert train.open_data(config, 300)[1].resolve() == book
        assert "book is back from" in capsys.readouterr().err
    for damaged in aside, book:
        if damaged == aside:
            os.replace(book, aside)
        else:
            shutil.copytree(aside, book)
        (damaged / "val.bin").rename(tmp_path / "val.bin")
        said = "book~replaced-by-prepare_data is left of a run that was stopped, and "
        said += f"{damaged.relative_to(tmp_path)} is"
        with pytest.raises(ValueError, match=re.escape(said)):
            make(Path(), tmp_path / "book.txt", name="book", overwrite=True)
        (tmp_path / "val.bin").rename(damaged / "val.bin")


def test_commands_and_their_exit_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(prose(1, 100))
    Path("latin.txt").write_bytes("Müller ".encode("latin-1") * 50)
    Path("data/mine").mkdir(parents=True)
    Path("data/mine/thesis.txt").write_text("precious")
    for code, sentence, *words in [
        (0, "vocabulary of 300 tokens", "a.txt", "--vocab_size=300"),
        (1, "data/a exists; replace it with --overwrite", "a.txt"),
        (1, "data/mine/thesis.txt would be lost", "a.txt", "--name=mine", "--overwrite"),
        (1, "a folder, stdlib, tinystories, fineweb, finewebedu", "tiny_stories"),
        (1, "latin.txt holds 0 characters", "latin.txt"),
        (1, "val_fraction=0.6: expected", "a.txt", "--val_fraction=0.6", "--name=b"),
        (1, "test_fraction=0.41: expected", "a.txt", "--test_fraction=0.41", "--name=b"),
        (1, "test_fraction=-0.1: expected", "a.txt", "--test_fraction=-0.1", "--name=b"),
        (1, "name='../x': expected", "a.txt", "--name=../x"),
        (1, "vocab_size=256: expected 257", "a.txt", "--name=b", "--vocab_size=256"),
        (1, "shards=104: expected 1 to 103", "fineweb", "--shards=104"),
        (1, "shards=0: expected 1 to 99", "finewebedu", "--shards=0"),
        (1, "fineweb is made of gpt2's tokens, but", "fineweb", "--tokenizer=data/a"),
        (1, "gpt3 has no whole tokenizer", "nowhere", "--name=b", "--tokenizer=gpt3"),
        (1, "two sources: a.txt and --source=b.txt", "a.txt", "--source=b.txt"),
        (2, "'b.txt' is one word too many; put a pattern", "a.txt", "b.txt"),
    ]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *words])
        with pytest.raises(SystemExit) if code else nullcontext() as done:
            runpy.run_path(pd.__file__, run_name="__main__")
        out, err = capsys.readouterr()
        assert sentence in err and out == ("" if code else "data/a\n"), (words, err)
        assert not code or done.value.code == code
    assert sorted(path.name for path in Path("data").iterdir()) == ["a", "mine"]
    assert Path("data/mine/thesis.txt").read_text() == "precious"


def test_the_end_says_what_was_made_and_what_comes_next(tmp_path, monkeypatch, capsys):
    """The command it names is one that train.py understands."""
    monkeypatch.chdir(tmp_path)
    texts = [prose(i, 40) for i in range(40)]
    Path("my texts").mkdir()
    for i, text in enumerate(texts):
        Path(f"my texts/{i}.txt").write_text(text)
    pd.main(["my texts", "--vocab_size=300", "--test_fraction=0.4"])
    printed = capsys.readouterr()
    folder = Path("data/my texts")
    assert printed.out == f"{folder}\n"
    found = re.findall(r"(\w+): ([\d,]+) documents, ([\d,]+) bytes, ([\d,]+) tokens", printed.err)
    counts = {name: [int(x.replace(",", "")) for x in rest] for name, *rest in found}
    parts = pd.split_documents(pd.read_paths("my texts", "text"), 0.05, 0.4)
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        tokens = len(ids_of(folder, name))
        assert counts[name] == [len(part), sum(map(len, part)), tokens]
    said = "next: python train.py config/small.py '--data=my texts' '--out=out/my texts' "
    assert said + "--vocab_size=300\n" in printed.err and "Fine-tune" not in printed.err
    (folder / "ckpt.pt").touch()
    pd.main(["my texts", "--name=more", f"--tokenizer={folder}"])
    assert '"Fine-tune", tells which --steps and --lr fit' in capsys.readouterr().err
    config, names = pd.DataConfig(), Path("data/mine")
    command = "python train.py config/small.py --data=mine --out=out/mine"
    assert pd.next_command(config, names, 4096) == command
    Path("release").mkdir()
    Path("release/config.json").touch()
    config = pd.DataConfig(tokenizer="release")
    command = "python train.py --init_from=release --data=mine --out=out/mine"
    assert pd.next_command(config, names, 129280) == command
    command = "python train.py --init_from=release --data=else/mine --out=out/mine"
    assert pd.next_command(config, Path("else/mine"), 129280) == command
