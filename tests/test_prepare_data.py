"""prepare_data.py: the tokenizer, the split, the files, the downloads, every refusal."""

import base64
import gzip
import hashlib
import json
import os
import random
import re
import runpy
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

WORDS = ["the", "cat", "sat", "mat", "and", "12345", "dogs,", "self.value", "==", "None:", "'x'"]
BYTES = {bytes([b]): b for b in range(256)}
ONLY_BYTES = pd.encoding_from(BYTES, pd.PATTERN, {pd.END_OF_TEXT: 256})


def prose(seed: int, lines: int) -> str:
    draw = random.Random(seed)
    return "".join(
        " ".join(draw.choice(WORDS) + str(draw.randrange(99)) for _ in range(8)) + "\n"
        for _ in range(lines)
    )


def make(tmp_path, source, **keys) -> Path:
    keys = {"name": "d", "out": str(tmp_path / "data"), "vocab_size": 300} | keys
    return pd.prepare(pd.DataConfig(source=str(source), **keys))


def ids_of(folder: Path, split: str) -> list[int]:
    return getattr(pd.load_dataset(folder), split).arrays[0].tolist()


def text_of(folder: Path, split: str) -> str:
    """The text of a prepared folder with its document marks, decoded from the ids."""
    return pd.load_tokenizer(folder).decode(ids_of(folder, split))


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
    words = [word for text in texts for word in regex.findall(pd.PATTERN, text)]
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
    assert pd.train_bpe(texts, 290, pd.PATTERN) == ranks
    encoding = pd.encoding_from(ranks, pd.PATTERN, {})
    assert [i for text in texts for i in encoding.encode_ordinary(text)] == ids


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_unicode_makes_the_round_trip(text):
    ids = ONLY_BYTES.encode_ordinary(text)
    assert ONLY_BYTES.decode_bytes(ids) == text.encode() and 256 not in ids


# ---- The default corpus and the split ----------------------------------------------------------


def test_default_corpus_its_round_trip_and_counts(tmp_path, monkeypatch):
    documents = pd.read_stdlib()
    assert len(set(documents.values())) == len(documents)
    assert "argparse.py" in documents and "json/decoder.py" in documents
    assert 5e6 < sum(len(text.encode()) for text in documents.values()) < 15e6
    left_out = {"test", "tests", "site-packages", "encodings"}
    assert not [name for name in documents if left_out & set(name.split("/"))]
    some = dict(list(documents.items())[::16])  # all of them take seconds
    monkeypatch.setattr(pd, "read_stdlib", lambda: some)
    folder = pd.prepare(pd.DataConfig(out=str(tmp_path)))
    data, encoding = pd.load_dataset(folder), pd.load_tokenizer(folder)
    assert data.vocab_size == encoding.eot_token + 1 == 4096 and 3 < data.val_bytes_per_token < 4
    train, val = pd.split_documents(some, 0.05)
    assert 0.045 < len("".join(val).encode()) / len("".join(train + val).encode()) < 0.055
    assert text_of(folder, "val") == "".join(pd.END_OF_TEXT + text for text in val)
    assert ids_of(folder, "train").count(4095) == len(train)


def test_split_takes_whole_documents_by_the_hash_of_their_names():
    """Except copies, and what would overshoot."""
    documents = {f"f{i}": prose(i, 20) for i in range(100)}
    train, val = pd.split_documents(documents, 0.1)
    assert sorted(train + val) == sorted(documents.values())
    assert 0.08 < sum(map(len, val)) / sum(map(len, train + val)) <= 0.11
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert val == [documents[name] for name in order[: len(val)]]
    assert pd.split_documents(dict(reversed(documents.items())), 0.1)[1] == val
    first, second, *others = order
    documents[first] = documents[others[7]][:-100] + "one line of its own\n"  # nearly a copy
    documents[second] = prose(99, 400)
    _, val = pd.split_documents(documents, 0.1)
    assert documents[first] not in val and documents[second] not in val and len(val) >= 3


@pytest.mark.parametrize("newline", ["\n", ""])
def test_split_cuts_the_end_off_a_single_file(newline):
    text = "title\n" + prose(1, 300).replace("\n", newline)
    (train,), (val,) = pd.split_documents({"a": text}, 0.1)
    assert train + val == text and abs(len(val) / len(text) - 0.1) < 0.01
    assert not newline or train.endswith("\n")


def test_tokenizer_never_sees_the_validation_text_and_may_serve_other_folders(tmp_path):
    for ending, seen in (150, True), (30, False):
        (tmp_path / "a.txt").write_text(prose(1, 200) * (1 if seen else 2) + "zyxwzyxw\n" * ending)
        folder = make(tmp_path, tmp_path / "a.txt", vocab_size=600, overwrite=True)
        assert "zyxwzyxw" in text_of(folder, "val") and ("zyxw" in text_of(folder, "train")) == seen
        tokens = pd.load_tokenizer(folder)._mergeable_ranks
        assert bool([token for token in tokens if b"zy" in token]) == seen
    other = make(tmp_path, tmp_path / "a.txt", tokenizer=str(folder), vocab_size=300, name="other")
    assert meta_of(other)["tokenizer_sha256"] == meta_of(folder)["tokenizer_sha256"]


# ---- Files -------------------------------------------------------------------------------------


def test_files_word_by_word(book):
    content, encoding = (book / "val.bin").read_bytes(), pd.load_tokenizer(book)
    words = np.frombuffer(content, "<i4", 256).tolist()
    assert words[:3] == [20240520, 1, (len(content) - 1024) // 2] and not any(words[3:])
    text = text_of(book, "val").removeprefix(pd.END_OF_TEXT)
    ids = np.frombuffer(content, "<u2", offset=1024).tolist()
    assert ids == [299, *encoding.encode_ordinary(text)]
    assert pd.load_dataset(book).val_bytes_per_token == len(text.encode()) / len(ids)
    lines = (book / "tokenizer.tiktoken").read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(299))
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert tokens == [encoding.decode_single_token_bytes(rank) for rank in range(299)]


def test_vocabularies_over_65536_are_stored_as_uint32(tmp_path, monkeypatch):
    large = pd.encoding_from(BYTES, ".", {pd.END_OF_TEXT: 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (tmp_path / "a.txt").write_text(prose(1, 50))
    folder = make(tmp_path, tmp_path / "a.txt", tokenizer="cl100k_base")
    assert np.fromfile(folder / "val.bin", "<i4", 2).tolist() == [20240801, 7]
    data = pd.load_dataset(folder)  # loads without the network
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
    train = pd.load_dataset(book).train
    assert len(train) == 16
    rows = train.windows(np.arange(13), 4)
    assert rows.dtype == np.int64 and rows.shape == (13, 4)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 20, 21, 22]
    assert (rows == rows[:, :1] + np.arange(4)).all()
    for starts, length in ([13], 4), ([-1], 4), ([0], 7):
        with pytest.raises(ValueError, match="no windows of"):
            train.windows(np.array(starts), length)


DAMAGES = [  # what the sentence says, and how the folder is damaged
    ("No such file", lambda d: (d / "val.bin").unlink()),
    ("holds id 300 of 300 tokens", lambda d: write_shard(d / "val.bin", [1] * 5000 + [300])),
    ("holds id 300 of 300 tokens", lambda d: write_shard(d / "train.bin", [300] + [1] * 5000)),
    ("no whole token file", lambda d: (d / "val.bin").write_bytes(b"")),
    ("no whole token file", lambda d: write_shard(d / "val.bin", [1], version=2)),
    ("no whole token file", lambda d: write_shard(d / "val.bin", [])),
    ("no whole token file", lambda d: os.truncate(d / "val.bin", 1500)),
    ("/meta.json'); make it", lambda d: (d / "meta.json").unlink()),
    ("no whole tokenizer", lambda d: os.truncate(d / "meta.json", 50)),
    ("('tokenizer_sha256')", lambda d: (d / "meta.json").write_text("{}")),
    ("sha256 is not", lambda d: os.truncate(d / "tokenizer.tiktoken", 1000)),
]


@pytest.mark.parametrize("sentence, damage", DAMAGES)
def test_damaged_folders_are_refused(book, sentence, damage):
    pd.load_dataset(book)
    damage(book)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)) as caught:
        pd.load_dataset(book)
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


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_collections_of_documents(tmp_path, kind):
    texts = [prose(i, 10) + pd.END_OF_TEXT for i in range(40)]  # in a document it is text
    path = tmp_path / f"docs.{kind}"
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").table({"body": [*texts, None]})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        lines = "\n".join(json.dumps({"body": text}) + "\n" for text in texts)  # and blank ones
        (gzip.open if kind.endswith("gz") else open)(path, "wt").write(lines)
    folder = make(tmp_path, path, text_key="body", val_fraction=0.1, name="")
    train, val = text_of(folder, "train"), text_of(folder, "val")
    assert sorted((train + val).split(pd.END_OF_TEXT)[1::2]) == sorted(t[:-13] for t in texts)
    assert folder.name == "docs" and 3 <= ids_of(folder, "val").count(299) <= 4
    with pytest.raises(ValueError, match="text_key"):
        make(tmp_path, path, overwrite=True, name="")
    assert text_of(folder, "val") == val  # the refused run took nothing away


def test_bad_json_lines_and_half_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in ('{"text": 5}', '["text"]', '{"text": "a"', '{"t": "a"}'):
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: .*--text_key=KEY"):
            pd.read_paths(str(path), "text")
    path.write_text(r'{"text": "a\ud800b"}')
    assert pd.read_paths(str(path), "text") == {"a.jsonl:0": "a?b"}
    for content in (gzip.compress(path.read_bytes() * 99)[:-9], b"not compressed"):
        (tmp_path / "b.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"EOFError|BadGzipFile"):
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
    gpt2 = pd.encoding_from(BYTES, ".", {pd.END_OF_TEXT: 50_256})
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
    assert text_of(folder, "val").split(pd.END_OF_TEXT)[-1] == "\n" + stories[-1]
    assert [ids_of(folder, split).count(299) for split in ("train", "val")] == [15, 5]


@pytest.mark.parametrize("source", pd.SHARDS)
def test_shards(hub, tmp_path, source):
    repo, _ = pd.SHARDS[source]
    for i, shard in enumerate(["val_000000", "train_000001", "train_000002"]):
        write_shard(hub / repo / f"{source}_{shard}.bin", [50_256, *range(65, 85 + i)])
    folder = make(tmp_path, source, name="", shards=2)
    data = pd.load_dataset(folder)
    assert len(data.train) == 22 + 23 and len(data.val) == 21 and data.vocab_size == 50_257
    assert data.val_bytes_per_token == 20 / 21
    write_shard(hub / repo / f"{source}_train_000002.bin", [1] * 5000 + [50_257] + [1] * 5000)
    with pytest.raises(ValueError, match="holds ids beyond gpt2's 50257 tokens"):
        make(tmp_path, source, name="", shards=2, overwrite=True)
    assert len(pd.load_dataset(folder).val) == 21  # the folder made before is kept


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


def test_commands_and_their_exit_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(prose(1, 100))
    Path("latin.txt").write_bytes("Müller ".encode("latin-1") * 50)
    Path("data/mine").mkdir(parents=True)
    Path("data/mine/thesis.txt").write_text("precious")
    for code, sentence, *words in [
        (0, "vocabulary 300", "a.txt", "--vocab_size=300"),
        (1, "data/a exists; replace it with --overwrite", "a.txt"),
        (1, "data/mine/thesis.txt would be lost", "a.txt", "--name=mine", "--overwrite"),
        (1, "a folder, stdlib, tinystories, fineweb, finewebedu", "tiny_stories"),
        (1, "latin.txt holds 0 characters", "latin.txt"),
        (1, "val_fraction=0.6: expected", "a.txt", "--val_fraction=0.6", "--name=b"),
        (1, "name='../x': expected", "a.txt", "--name=../x"),
        (1, "vocab_size=256: expected 257", "a.txt", "--name=b", "--vocab_size=256"),
        (1, "gpt3 has no whole tokenizer", "a.txt", "--name=b", "--tokenizer=gpt3"),
    ]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *words])
        with pytest.raises(SystemExit) if code else nullcontext() as done:
            runpy.run_path(pd.__file__, run_name="__main__")
        out, err = capsys.readouterr()
        assert sentence in err and out == ("" if code else "data/a\n"), (words, err)
        assert not code or done.value.code == code
    assert sorted(path.name for path in Path("data").iterdir()) == ["a", "mine"]
    assert Path("data/mine/thesis.txt").read_text() == "precious"
