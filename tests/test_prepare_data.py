"""prepare_data.py: the tokenizer, the split, the files, the downloads, every refusal."""

import base64
import gzip
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data as pd

SCRIPT = Path(pd.__file__)
WORDS = ["the", "cat", "sat", "mat", "and", "12345", "dogs,", "self.value", "==", "None:", "'x'"]


def prose(seed: int, lines: int) -> str:
    draw = random.Random(seed)
    return "".join(
        " ".join(draw.choice(WORDS) + str(draw.randrange(99)) for _ in range(8)) + "\n"
        for _ in range(lines)
    )


def make(tmp_path, source, **keys) -> Path:
    keys = {"name": "d", "out": str(tmp_path / "data"), "vocab_size": 300} | keys
    return pd.prepare(pd.DataConfig(source=str(source), **keys))


def command(*words, cwd=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


def text_of(folder: Path, split: str) -> str:
    """The text of a prepared folder with its document marks, decoded from the ids."""
    return pd.load_tokenizer(folder).decode(pd.read_tokens(folder / f"{split}.bin")[0].tolist())


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """A small prepared folder; tests that damage it copy it first."""
    tmp_path = tmp_path_factory.mktemp("book")
    (tmp_path / "book.txt").write_text(prose(1, 200))
    return make(tmp_path, tmp_path / "book.txt")


@pytest.fixture
def broken(book, tmp_path) -> Path:
    """A copy to damage."""
    for path in book.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    out = tmp_path_factory.mktemp("stdlib")
    began = time.perf_counter()
    folder = pd.prepare(pd.DataConfig(out=str(out)))
    return folder, time.perf_counter() - began


# ---- Byte pair encoding ------------------------------------------------------------------------


def naive_bpe(words: dict[str, int], vocab_size: int) -> dict[bytes, int]:
    """Counts everything anew before each merge."""
    parts = [([bytes([b]) for b in word.encode()], count) for word, count in words.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        total = Counter()
        for tokens, count in parts:
            for i in range(len(tokens) - 1):
                total[tokens[i] + tokens[i + 1]] += count
        if not total:
            break
        token = min(total, key=lambda joined: (-total[joined], joined))
        assert token not in ranks
        ranks[token] = len(ranks)
        for tokens, _ in parts:
            i = 0
            while i + 1 < len(tokens):
                if tokens[i] + tokens[i + 1] == token:
                    tokens[i : i + 2] = [token]
                i += 1
    return ranks


def naive_encode(word: str, ranks: dict[bytes, int]) -> list[int]:
    """Applies every merge in the order in which it was learnt, each from left to right."""
    tokens = [bytes([b]) for b in word.encode()]
    for token in sorted(ranks, key=ranks.get)[256:]:
        i = 0
        while i + 1 < len(tokens):
            if tokens[i] + tokens[i + 1] == token:
                tokens[i : i + 2] = [token]
            i += 1
    return [ranks[token] for token in tokens]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abä", min_size=1, max_size=9), st.integers(1, 5), max_size=12))
def test_bpe_has_the_ranks_of_a_naive_trainer_and_tiktoken_merges_in_their_order(words):
    ranks = pd.train_bpe(words, 290, pd.PATTERN)
    assert ranks == naive_bpe(words, 290)
    assert sorted(ranks.values()) == list(range(len(ranks)))
    encoding = pd.encoding_from(ranks, r"(?s).+", {})
    for word in words:
        assert encoding.encode_ordinary(word) == naive_encode(word, ranks)


def test_bpe_on_text_counts_what_the_pattern_finds():
    text = prose(3, 60)
    counts = Counter(regex.findall(pd.PATTERN, text))
    assert pd.train_bpe([text], 400, pd.PATTERN) == naive_bpe(counts, 400)
    halves = pd.train_bpe(
        [text[: text.index("\n") + 1], text[text.index("\n") + 1 :]], 400, pd.PATTERN
    )
    assert halves == naive_bpe(counts, 400)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_unicode_makes_the_round_trip(text):
    encoding = pd.encoding_from(
        {bytes([b]): b for b in range(256)}, pd.PATTERN, {pd.END_OF_TEXT: 256}
    )
    ids = encoding.encode_ordinary(text)
    assert encoding.decode_bytes(ids) == text.encode()
    assert 256 not in ids


def test_pieces_of_a_long_text_are_tokenised_as_the_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(pd, "PIECE", 100)
    text = prose(5, 40).replace("mat", "\n\n/ mat.\n/x\n\n  y")
    parts = list(pd.pieces(text))
    assert len(parts) > 10 and "".join(parts) == text
    encoding = pd.encoding_from(pd.train_bpe([text], 400, pd.PATTERN), pd.PATTERN, {})
    ids = [id for part in parts for id in encoding.encode_ordinary(part)]
    assert ids == encoding.encode_ordinary(text)
    (tmp_path / "book.txt").write_text(text)
    folder = make(tmp_path, tmp_path / "book.txt")
    assert text_of(folder, "train").count(pd.END_OF_TEXT) == 1  # once a document, not a piece


# ---- The default corpus ------------------------------------------------------------------------


def test_default_preparation(stdlib):
    folder, seconds = stdlib
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["vocab_size"] == 4096 and meta["eot"] == 4095
    assert 5e6 < sum(meta["bytes"].values()) < 15e6
    assert 0.045 < meta["bytes"]["val"] / sum(meta["bytes"].values()) < 0.055
    assert 3.4 < meta["bytes"]["val"] / meta["tokens"]["val"] < 4
    assert seconds < 60  # 6 s on an idle core
    names, texts = zip(*pd.read_installed("stdlib"), strict=True)
    assert len(set(texts)) == len(texts)
    assert "argparse.py" in names and "json/decoder.py" in names
    left_out = {"test", "tests", "site-packages", "encodings"}
    assert not [name for name in names if left_out & set(name.split("/"))]
    assert len(names) == meta["files"] == sum(meta["documents"].values())


def test_default_corpus_round_trip_and_counts(stdlib):
    folder, _ = stdlib
    documents = pd.read_installed("stdlib")
    train, val = pd.split_documents(documents, 0.05)
    assert text_of(folder, "val") == "".join(pd.END_OF_TEXT + text for text in val)
    tokens, header = pd.read_tokens(folder / "train.bin")
    assert (np.asarray(tokens) == 4095).sum() == header["documents"] == len(train)
    encoding = pd.load_tokenizer(folder)
    for _, text in documents[::40]:
        assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode()
    words = random.Random(0).sample(sorted(set(regex.findall(pd.PATTERN, val[0] + val[1]))), 40)
    for word in words:
        assert encoding.encode_ordinary(word) == naive_encode(word, encoding._mergeable_ranks)


# ---- The split ---------------------------------------------------------------------------------


def test_split_takes_whole_documents_by_the_hash_of_their_names():
    documents = [(f"f{i}", prose(i, 20)) for i in range(100)]
    train, val = pd.split_documents(documents, 0.1)
    assert sorted(train + val) == sorted(text for _, text in documents)
    assert 0.08 < sum(map(len, val)) / sum(map(len, train + val)) <= 0.11
    order = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).hexdigest())
    assert set(val) == {text for _, text in order[: len(val)]}
    backwards = pd.split_documents(documents[::-1], 0.1)
    assert set(backwards[1]) == set(val)


def test_split_leaves_out_copies_and_what_would_overshoot():
    documents = [(f"f{i}", prose(i, 20)) for i in range(50)]
    order = sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest())
    first, second = order[0][0], order[1][0]
    texts = dict(documents)
    texts[first] = texts[order[9][0]][:-100] + "one line of its own\n"  # nearly a copy
    texts[second] = prose(99, 400)
    _, val = pd.split_documents(list(texts.items()), 0.1)
    assert texts[first] not in val and texts[second] not in val and len(val) >= 3


@pytest.mark.parametrize("newline", ["\n", ""])
def test_split_cuts_the_end_off_a_single_file(newline):
    text = prose(1, 300).replace("\n", newline)
    (train,), (val,) = pd.split_documents([("a", text)], 0.1)
    assert train + val == text and abs(len(val) / len(text) - 0.1) < 0.01
    assert not newline or train.endswith("\n")


def test_tokenizer_never_sees_the_validation_text(tmp_path):
    text = prose(1, 200)
    (tmp_path / "a.txt").write_text(text + "zyxwzyxw\n" * 150)
    folder = make(tmp_path, tmp_path / "a.txt", vocab_size=600)
    assert text_of(folder, "val").endswith("zyxwzyxw\n")
    assert b"zyxw" in pd.load_tokenizer(folder)._mergeable_ranks  # some of it is in training
    (tmp_path / "a.txt").write_text(text * 2 + "zyxwzyxw\n" * 30)
    folder = make(tmp_path, tmp_path / "a.txt", vocab_size=600, overwrite=True)
    assert "zyxwzyxw" in text_of(folder, "val") and "zyxw" not in text_of(folder, "train")
    assert not [token for token in pd.load_tokenizer(folder)._mergeable_ranks if b"zy" in token]


# ---- Files -------------------------------------------------------------------------------------


def test_header_word_by_word(book):
    content = (book / "val.bin").read_bytes()
    words = struct.unpack("<256i", content[:1024])
    text = text_of(book, "val").removeprefix(pd.END_OF_TEXT)
    count = (len(content) - 1024) // 2
    assert words[:5] == (20240520, 1, count, 300, 299)
    assert struct.unpack("<f", content[20:24])[0] == pytest.approx(len(text.encode()) / count)
    assert words[6] == 1 and words[7] == 0 and not any(words[16:])
    assert content[32:64] == hashlib.sha256((book / "tokenizer.tiktoken").read_bytes()).digest()
    ids = np.frombuffer(content, "<u2", offset=1024)
    assert ids[0] == 299
    encoding = pd.load_tokenizer(book)
    assert ids[1:].tolist() == encoding.encode_ordinary(text)
    assert encoding.encode_ordinary(pd.END_OF_TEXT) != [299]


def test_tokenizer_file_is_base64_rank_lines(book):
    lines = (book / "tokenizer.tiktoken").read_text().splitlines()
    assert len(lines) == 299
    for number, line in enumerate(lines):
        token, rank = line.split(" ")
        assert int(rank) == number
        assert base64.b64decode(token) == pd.load_tokenizer(book).decode_single_token_bytes(number)


def test_vocabularies_over_65536_are_stored_as_uint32(tmp_path, monkeypatch):
    large = pd.encoding_from({bytes([b]): b for b in range(256)}, ".", {pd.END_OF_TEXT: 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (tmp_path / "a.txt").write_text(prose(1, 50))
    folder = make(tmp_path, tmp_path / "a.txt", tokenizer="cl100k_base")
    assert struct.unpack("<5i", (folder / "val.bin").read_bytes()[:20])[:2] == (20240801, 7)
    tokens, header = pd.read_tokens(folder / "val.bin")
    assert tokens.dtype == np.uint32 and tokens[0] == 70_000 and header["vocab_size"] == 70_001
    assert pd.load_dataset(folder).vocab_size == 70_001  # loads without the network


def write_shard(path: Path, ids: list[int]) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def test_shards_of_others_open_and_windows_never_span_two(broken):
    (broken / "train.bin").unlink()
    write_shard(broken / "train_000001.bin", list(range(0, 10)))
    write_shard(broken / "train_000002.bin", list(range(20, 26)))
    _, header = pd.read_tokens(broken / "train_000001.bin")
    assert header["vocab_size"] == header["documents"] == header["bytes_per_token"] == 0
    data = pd.load_dataset(broken)
    assert len(data.train) == 16
    rows = data.windows("train", np.arange(13), 4)
    assert rows.dtype == np.int64 and rows.shape == (13, 4)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 20, 21, 22]
    assert (rows == rows[:, :1] + np.arange(4)).all()
    for starts, length in ([13], 4), ([-1], 4), ([0], 7):
        with pytest.raises(ValueError, match="no windows of"):
            data.windows("train", np.array(starts), length)


def test_dataset_agrees_with_meta(book):
    data, meta = pd.load_dataset(book), json.loads((book / "meta.json").read_text())
    assert len(data.train) == meta["tokens"]["train"] and len(data.val) == meta["tokens"]["val"]
    assert data.vocab_size == 300 and data.eot == 299
    assert data.val_bytes_per_token == pytest.approx(meta["bytes"]["val"] / meta["tokens"]["val"])
    text = prose(1, 200)
    assert meta["corpus_sha256"] == hashlib.sha256(text.encode() + b"\0").hexdigest()


def patch_word(path: Path, index: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4 * index, value)
    path.write_bytes(content)


def patch_meta(folder: Path, **values) -> None:
    meta = json.loads((folder / "meta.json").read_text()) | values
    (folder / "meta.json").write_text(json.dumps(meta))


def rewrite_tokenizer(folder: Path, change) -> None:
    """Change its lines and let meta.json agree."""
    path = folder / "tokenizer.tiktoken"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    patch_meta(folder, tokenizer_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


DAMAGES = {
    "no token file": lambda d: (d / "val.bin").unlink(),
    "begins with 65537, expected the magic number": lambda d: (d / "val.bin").write_bytes(
        b"\1\0" * 999
    ),
    "begins with 0": lambda d: (d / "val.bin").write_bytes(b""),
    "has version 2, expected 1": lambda d: patch_word(d / "val.bin", 1, 2),
    "is truncated": lambda d: os.truncate(d / "val.bin", (d / "val.bin").stat().st_size - 1),
    "is truncated: its header promises 500,000": lambda d: patch_word(d / "val.bin", 2, 500_000),
    "too many or no tokens": lambda d: patch_word(d / "val.bin", 2, 5),
    "promises 0": lambda d: (patch_word(d / "val.bin", 2, 0), os.truncate(d / "val.bin", 1024)),
    "was made with the tokenizer": lambda d: patch_word(d / "train.bin", 9, 1),
    "holds id 299 of 299 tokens": lambda d: patch_meta(d, special_tokens={"<|endoftext|>": 298}),
    "no prepared data in": lambda d: (d / "meta.json").unlink(),
    "is not valid JSON": lambda d: os.truncate(d / "meta.json", 50),
    "lacks the key pattern": lambda d: (d / "meta.json").write_text(
        '{"bytes": 1, "special_tokens": 1}'
    ),
    "no tokenizer ": lambda d: (d / "tokenizer.tiktoken").unlink(),
    "has sha256": lambda d: os.truncate(d / "tokenizer.tiktoken", 1000),
    "has a bad line": lambda d: rewrite_tokenizer(d, lambda lines: [*lines[:-1], b"!!! 298"]),
    "has not all tokens": lambda d: rewrite_tokenizer(d, lambda lines: lines[:-2] + lines[-1:]),
    "not all tokens of its 298": lambda d: rewrite_tokenizer(
        d,
        lambda lines: (
            lines[:65] + [line.split()[0] + b" %d" % (65 + i) for i, line in enumerate(lines[66:])]
        ),
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_folders_are_refused(broken, sentence):
    pd.load_dataset(broken)
    DAMAGES[sentence](broken)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        pd.load_dataset(broken)
    assert sentence in str(caught.value) and "prepare_data.py" in str(caught.value)
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


def test_retrained_tokenizer_is_read_anew(broken):
    assert pd.load_tokenizer(broken).n_vocab == 300
    rewrite_tokenizer(broken, lambda lines: lines[:280])
    patch_meta(broken, special_tokens={"<|endoftext|>": 280})
    assert pd.load_tokenizer(broken).n_vocab == 281


# ---- Sources -----------------------------------------------------------------------------------


def test_folder_skips_what_is_hidden_or_no_text(tmp_path, capsys):
    source = tmp_path / "source"
    for name in ("b.txt", "sub/a.md", ".git/config", "sub/.hidden"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name * 40 + "\n" + prose(len(name), 30))
    (source / "c.png").write_bytes(b"\x89PNG\xff\xfe")
    documents, files = pd.read_paths(str(source), "text")
    assert [name for name, _ in documents] == ["b.txt:0", "sub/a.md:0"] and files == 2
    assert "skipped 1 of 3 files" in capsys.readouterr().err
    assert pd.read_paths(str(source / "**/*.md"), "text")[0][0][0] == "a.md:0"
    assert pd.read_paths(str(source / "[bc].*"), "text")[1] == 1


def test_text_is_cut_at_end_of_text_and_newlines_are_translated(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo<|endoftext|>three")
    documents, _ = pd.read_paths(str(tmp_path / "a.txt"), "text")
    assert [text for _, text in documents] == ["one\ntwo", "three"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_collections_of_documents(tmp_path, kind):
    texts = [prose(i, 10) for i in range(40)]
    path = tmp_path / f"docs.{kind}"
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").table({"body": [*texts, None]})
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        lines = "\n".join(json.dumps({"body": text}) + "\n" for text in texts)  # and blank ones
        (gzip.open if kind.endswith("gz") else open)(path, "wt").write(lines)
    folder = make(tmp_path, path, text_key="body", val_fraction=0.1, name="")
    assert folder.name == "docs"
    train, val = (text_of(folder, s).split(pd.END_OF_TEXT)[1:] for s in ("train", "val"))
    assert sorted(train + val) == sorted(texts) and 3 <= len(val) <= 5
    with pytest.raises(ValueError, match="text_key"):
        make(tmp_path, path, overwrite=True, name="")
    assert text_of(folder, "val")  # the refused run took nothing away


def test_bad_json_lines_and_half_surrogates(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in ('{"text": 5}', '["text"]', '{"text": "a"'):
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2 is not a JSON object with text"):
            pd.read_paths(str(path), "text")
    path.write_text(r'{"text": "a\ud800b"}')
    assert pd.read_paths(str(path), "text")[0] == [("a.jsonl:1", "a?b")]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes() * 99)[:-9])
    with pytest.raises(ValueError, match="is truncated"):
        pd.read_paths(str(tmp_path / "b.jsonl.gz"), "text")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        pd.read_paths(str(tmp_path / "a.parquet"), "text")


def test_tokenizer_of_another_folder_and_of_tiktoken(tmp_path, book, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(7, 50))
    folder = make(tmp_path, tmp_path / "a.txt", tokenizer=str(book))
    assert (folder / "tokenizer.tiktoken").read_bytes() == (
        book / "tokenizer.tiktoken"
    ).read_bytes()

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="could not download its encoding gpt2"):
        make(tmp_path, tmp_path / "a.txt", tokenizer="gpt2", name="e")
    with pytest.raises(FileNotFoundError, match="no tokenizer 'gpt3'"):
        make(tmp_path, tmp_path / "a.txt", tokenizer="gpt3", name="e")


def test_too_little_source_on_this_python(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"carries 0 characters.*tinyshakespeare"):
        pd.read_installed("stdlib")


# ---- Nothing half-made -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_keeps_the_old_folder_and_leaves_no_new_one(tmp_path, monkeypatch, error):
    (tmp_path / "a.txt").write_text(prose(1, 100))
    folder = make(tmp_path, tmp_path / "a.txt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "a.txt").write_text(prose(2, 100))

    def fail(path):
        assert (Path(path) / "meta.json").exists()
        raise error

    monkeypatch.setattr(pd, "load_dataset", fail)
    for name in ("d", "new"):
        with pytest.raises((KeyboardInterrupt, OSError)):
            make(tmp_path, tmp_path / "a.txt", overwrite=True, name=name)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["d"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_killed_preparation_is_not_accepted(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 100))
    stop = (  # killed before the last file
        "import os, prepare_data as pd; write = pd.write_file\n"
        "def stop(path, content):\n"
        "    if path.name == 'meta.json': os.kill(os.getpid(), 9)\n"
        "    write(path, content)\n"
        "pd.write_file = stop\n"
        "pd.prepare(pd.DataConfig(source='a.txt', name='d', vocab_size=300))"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", stop], cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "data").iterdir()
    assert (left / "train.bin").exists()
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        pd.load_dataset(left)
    assert pd.load_dataset(make(tmp_path, tmp_path / "a.txt")).vocab_size == 300


# ---- Downloads, from a server on this machine ---------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """Serves server.files; server.mode: good, deaf (to Range), cut (breaks off midway), stall."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = server.files.get(self.path)
            server.requests.append(self.headers["Range"])
            if content is None:
                return self.send_error(404)
            start, total = 0, len(content)
            if self.headers["Range"] and server.mode != "deaf":
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= total:
                    return self.send_error(416)
                self.send_response(206)
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            whole = server.mode in ("good", "deaf")
            self.wfile.write(content[start : total if whole else start + 1000])
            if server.mode == "stall":
                self.wfile.flush()
                server.released.wait(10)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.mode, server.requests = {}, "good", []
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["cut", "stall"])
@pytest.mark.parametrize("then", ["good", "deaf"])
def test_download_goes_on_where_it_broke_off(server, tmp_path, mode, then):
    server.files["/f"], path = bytes(range(256)) * 20, tmp_path / "deep" / "f"
    server.mode = mode
    began = time.perf_counter()
    with pytest.raises(OSError, match="run the command again to go on"):
        pd.download(server.url + "/f", path, timeout=0.3)
    assert time.perf_counter() - began < 5
    assert not path.exists() and path.with_name("f.part").stat().st_size == 1000
    server.mode = then
    pd.download(server.url + "/f", path, timeout=0.3)
    assert path.read_bytes() == server.files["/f"] and not path.with_name("f.part").exists()
    assert server.requests == [None, "bytes=1000-"]
    pd.download(server.url + "/f", path)
    assert len(server.requests) == 2  # kept


def test_download_drops_a_part_that_is_too_long_and_names_what_fails(server, tmp_path):
    server.files["/f"] = b"abc"
    (tmp_path / "f.part").write_bytes(b"something else")
    assert pd.download(server.url + "/f", tmp_path / "f").read_bytes() == b"abc"
    with pytest.raises(OSError, match="404") as caught:
        pd.download(server.url + "/nowhere", tmp_path / "g")
    assert str(tmp_path / "g") in str(caught.value) and server.url in str(caught.value)
    with pytest.raises(OSError, match="could not download"):
        pd.download("http://127.0.0.1:9/f", tmp_path / "g", timeout=0.3)


def test_named_downloads(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "HUGGING_FACE", server.url)
    monkeypatch.setattr(pd, "SHAKESPEARE", server.url + "/s.txt")
    server.files["/s.txt"] = prose(1, 100).encode()
    folder = make(tmp_path, "tinyshakespeare", name="")
    assert folder.name == "tinyshakespeare" and len(pd.load_dataset(folder).val) > 50
    stories = [prose(i, 5) for i in range(20)]
    for part, texts in ("train", stories[:15]), ("valid", stories[15:]):
        server.files[f"/{pd.STORIES}-{part}.txt"] = "<|endoftext|>\n".join(texts).encode()
    folder = make(tmp_path, "tinystories", name="")
    assert text_of(folder, "val").split(pd.END_OF_TEXT)[-1] == "\n" + stories[-1]
    assert text_of(folder, "train").count(pd.END_OF_TEXT) == 15
    assert text_of(folder, "val").count(pd.END_OF_TEXT) == 5
    small = pd.encoding_from({bytes([b]): b for b in range(256)}, ".", {pd.END_OF_TEXT: 50_256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    for i, shard in enumerate(["val_000000", "train_000001", "train_000002"]):
        write_shard(tmp_path / "shard", [50_256, *range(65, 85 + i)])
        server.files[f"/{pd.SHARDS['fineweb'][0]}_{shard}.bin"] = (tmp_path / "shard").read_bytes()
    data = pd.load_dataset(make(tmp_path, "fineweb", name="", shards=2))
    assert len(data.train) == 22 + 23 and len(data.val) == 21 and data.vocab_size == 50_257
    assert data.val_bytes_per_token == pytest.approx(20 / 21)


# ---- The command line --------------------------------------------------------------------------


def test_commands_and_their_exit_codes(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 100))
    (tmp_path / "latin.txt").write_bytes("Müller ".encode("latin-1") * 50)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/thesis.txt").write_text("precious")
    done = command("a.txt", "--vocab_size=300", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == str(Path("data/a"))
    for word in ("1 files", "bytes/token", "sha256", "tokens", " s\n"):
        assert word in done.stderr
    for code, sentence, *words in [
        (1, "data/a exists; replace it with --overwrite", "a.txt"),
        (1, "is not prepared data", "a.txt", "--name=mine", "--overwrite"),
        (1, "did you mean tinyshakespeare?", "tiny_shakespeare"),
        (1, "latin.txt is not UTF-8 text (byte 1)", "latin.txt"),
        (1, "empty.txt holds 0 characters", "empty.txt"),
        (2, "unknown key vocabsize; did you mean vocab_size?", "a.txt", "--vocabsize=300"),
        (2, "vocab_size must be a whole number, not 'many'", "a.txt", "--vocab_size=many"),
        (2, "unexpected argument 'b.txt'", "a.txt", "b.txt"),
    ]:
        done = command(*words, cwd=tmp_path)
        assert done.returncode == code and sentence in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr and done.stdout == ""
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a", "mine"]
    assert (tmp_path / "data/mine/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "keys",
    [
        {"vocab_size": 256},
        {"val_fraction": 0.0},
        {"val_fraction": 0.6},
        {"name": "../x"},
        {"name": "downloads"},
        {"source": "fineweb", "shards": 104},
    ],
)
def test_settings_out_of_range(tmp_path, keys, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(1, 100))
    with pytest.raises(ValueError, match=f"{list(keys)[-1]}=.*(expected|1 to 103)"):
        make(tmp_path, **({"source": tmp_path / "a.txt"} | keys))


@dataclass
class Config:
    steps: int = 1000  # optimiser steps, 100% of them
    lr: float = 3e-4
    fp8: bool = False  # use # eight bits
    name: str = "x"
    limit: int | None = 5
    scaling: dict | None = None
    draft: int | str = "auto"
    table: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("steps=1_000", 1000),
        ("steps=1e6", 10**6),
        ("steps=-1", -1),
        ("lr=1", 1.0),
        ("lr=1e-3", 1e-3),
        ("fp8", True),
        ("fp8=false", False),
        ("fp8=0", False),
        ("name=12", "12"),
        ("name='q'", "'q'"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("limit=none", None),
        ("limit=7", 7),
        ("draft=3", 3),
        ("draft=auto", "auto"),
        ("scaling={'factor': 4}", {"factor": 4}),
        ("table={'a': 1}", {"a": 1}),
    ],
)
def test_values_take_the_type_of_their_field(word, value):
    positional, values = pd.parse_args("", ["here", f"--{word}"], Config, positional="source")
    key = word.split("=")[0]
    assert positional == "here" and values == {key: value} and type(values[key]) is type(value)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("steps=1.5", "must be a whole number, not '1.5'"),
        ("steps=True", "must be a whole number, not 'True'"),
        ("fp8=maybe", "must be true or false, not 'maybe'"),
        ("lr=fast", "must be a number"),
        ("limit=x", "must be a whole number or none"),
        ("scaling=[1]", "must be a dict"),
        ("step=1", "unknown key step; did you mean steps?"),
        ("qqq", "unknown key qqq; see --help"),
    ],
)
def test_wrong_keys_and_values_exit_with_2_and_a_sentence(word, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        pd.parse_args("", [f"--{word}"], Config)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_help_and_absent_values(capsys):
    assert pd.parse_args("", [], Config) == (None, {})
    assert pd.parse_args("", ["--fp8", "here"], Config, positional="p") == ("here", {"fp8": True})
    assert pd.parse_args("", ["--steps", "5"], Config) == (None, {"steps": 5})
    with pytest.raises(SystemExit) as caught:
        pd.parse_args("What it does.", ["--help"], pd.DataConfig, Config)
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "What it does." in text
    assert "optimiser steps, 100% of them (default: 1000)" in text
    for key in [*pd.DataConfig.__dataclass_fields__, *Config.__dataclass_fields__]:
        assert f"--{key}" in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no"), 1, "error: no"),
        (OSError("no"), 1, "error: no"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_command_turns_refusals_into_exit_codes(error, code, message, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        pd.run_command(main)
    assert caught.value.code == code and capsys.readouterr().err == message + "\n"
    with pytest.raises(TypeError):  # a bug keeps its trace
        pd.run_command(lambda argv: len(5))
