"""prepare_data.py: sources, the split, downloads, folders made whole or not at all."""

import codecs
import gzip
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken

import prepare_data as pd
import support.tokenizer as tk
import support.tokens as tf
from support import advice
from support.settings import Refusal

ROOT = Path(pd.__file__).parent
WORDS = ["the", "cat", "sat", "mat", "and", "12345", "dogs,", "self.value", "==", "None:", "'x'"]
BYTES = {bytes([b]): b for b in range(256)}


def prose(seed: int, lines: int) -> str:
    draw = random.Random(seed)
    return "".join(
        " ".join(draw.choice(WORDS) + str(draw.randrange(99)) for _ in range(8)) + "\n"
        for _ in range(lines)
    )


def lines_of(name: str, count: int = 10) -> str:
    """Lines of 10 characters, none like another or like those of another name."""
    return "".join(f"{name:>03}{i:06d}\n" for i in range(count))


def by_hash(texts: list[str]) -> dict[str, str]:
    """{name: text}, with names in whose order split_documents sees the texts."""
    names = [str(i) for i in range(len(texts))]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return dict(zip(names, texts, strict=True))


def make(tmp_path, source, **keys) -> Path:
    """A prepared folder, without a test unless one is asked for."""
    keys = {"name": "d", "vocab_size": 300, "test_fraction": 0} | keys
    keys = {"out": str(tmp_path / "data")} | keys
    return pd.prepare(pd.DataConfig(source=str(source), **keys))


def write_shard(path: Path, ids: list[int], version: int = 1) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return path


def ids_of(folder: Path, split: str) -> list[int]:
    return getattr(tf.load_dataset(folder), split).arrays[0].tolist()


def text_of(folder: Path, split: str) -> str:
    """The text of a prepared folder with its document marks, decoded from the ids."""
    return tk.stored_tokenizer(folder).encoding.decode(ids_of(folder, split))


# ---- The default corpus and the split ----------------------------------------------------------


def test_the_default_corpus_and_its_split():
    documents = pd.read_stdlib()
    assert len(set(documents.values())) == len(documents)
    assert "argparse.py" in documents and "json/decoder.py" in documents
    assert 5e6 < sum(len(text.encode()) for text in documents.values()) < 15e6
    left_out = {"test", "tests", "site-packages", "encodings"}
    assert not [name for name in documents if left_out & set(name.split("/"))]
    size = [len("".join(part).encode()) for part in pd.split_documents(documents, 0.05, 0.05)]
    assert all(0.045 < held / sum(size) < 0.055 for held in size[1:])


@pytest.mark.parametrize(
    "texts, taken",
    [  # of 1000 bytes, a tenth is the target; the texts taken, else the end of the largest
        ([lines_of("a", 11), lines_of("b", 89)], [0]),  # a tenth over the target is not too much
        ([lines_of("a", 10) + "a" * 11, lines_of("b", 88) + "b" * 9], []),  # a byte more is
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
    name = "caf\udce9"  # as Python has a file name that is no UTF-8
    (train,), (val,), test = pd.split_documents({name: text}, 0.1, 0.1)
    assert test == []
    assert train + val == text and abs(len(val) / len(text) - 0.1) < 0.01
    assert not newline or train.endswith("\n")


@pytest.mark.parametrize("small, tested", [(4, False), (5, True)])
def test_a_test_text_of_less_than_five_documents_is_left_to_training(small, tested):
    few = [lines_of(letter, 1) for letter in "bcdef"[:small]]
    texts = [lines_of("a", 10), *few, lines_of("z", 90 - small)]
    train, val, test = pd.split_documents(by_hash(texts), 0.1, 0.1)
    assert (val, test) == (texts[:1], few if tested else [])
    assert sorted(train + test) == sorted(texts[1:])


# ---- The test text -----------------------------------------------------------------------------


def test_the_tokenizer_is_trained_on_the_training_text_alone_and_all_three_are_written(
    tmp_path, monkeypatch
):
    texts = [lines_of(str(i)) for i in range(400)]
    texts[20:40] = [text[:-10] + "zyxwzyxw\n" for text in texts[20:40]]  # these are the test
    monkeypatch.setattr(pd, "read_stdlib", lambda: by_hash(texts))
    folder = make(tmp_path, "stdlib", test_fraction=0.05, vocab_size=600)
    train, val, test = pd.split_documents(by_hash(texts), 0.05, 0.05)
    for split, part in ("train", train), ("val", val), ("test", test):
        assert text_of(folder, split) == "".join(tk.END_OF_TEXT + text for text in part)
    data = tf.load_dataset(folder)
    assert ids_of(folder, "train").count(data.vocab_size - 1) == len(train)  # marks
    assert data.val_bytes_per_token == len("".join(val).encode()) / len(data.val)
    assert "zyxw" in text_of(folder, "test") and "zyxw" not in text_of(folder, "train")
    ranks = tk.stored_tokenizer(folder).encoding._mergeable_ranks
    assert ranks == tk.train_bpe(train, 599, tk.PATTERN) and not [x for x in ranks if b"zy" in x]


# ---- Sources -----------------------------------------------------------------------------------


def test_folders_and_globs(tmp_path, capsys):
    source = tmp_path / "so[ur]ce"
    for name in ("b.txt", "sub/a.md", ".git/config", "sub/.hidden"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name * 40 + "\n" + prose(len(name), 30))
    with open(source / "video", "wb") as file:  # 1 TB, which is not read and not on the disk
        file.write(b"\x89PNG\xff\xfe")
        file.truncate(2**40)
    assert list(pd.read_paths(str(source), "text")) == ["b.txt:0", "sub/a.md:0"]
    assert "video: not UTF-8 text" in capsys.readouterr().err
    assert list(pd.read_paths(str(tmp_path / "so*/**/*.md"), "text")) == ["a.md:0"]


DOCUMENTS = [  # a file, what is in it, and its documents
    ("a.txt", b"one\r\ntwo<|endoftext|>three<|endoftext|>\n", ["one\ntwo", "three"]),
    ("a.txt", codecs.BOM_UTF8 + b"one", ["one"]),
    ("a.jsonl", codecs.BOM_UTF8 + b'{"text": "one"}', ["one"]),
    ("a.jsonl", rb'{"text": "a\ud800b"}', ["a?b"]),  # half of a pair, which UTF-8 cannot spell
]


@pytest.mark.parametrize("name, content, texts", DOCUMENTS)
def test_documents_of_a_file(name, content, texts, tmp_path):
    (tmp_path / name).write_bytes(content)
    found = pd.read_paths(str(tmp_path), "text")
    assert found == {f"{name}:{i}": text for i, text in enumerate(texts)}


def write_parquet(path: Path, *columns: tuple[str, list]):
    """Texts as a stranger may have written them: not in UTF-8."""
    pa = pytest.importorskip("pyarrow")
    arrays = [pa.array(x).cast(pa.string(), safe=False) for _, x in columns]
    table = pa.table(arrays, names=[name for name, _ in columns])
    pytest.importorskip("pyarrow.parquet").write_table(table, path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_collections_of_documents(tmp_path, kind, capsys):
    texts = [prose(i, 10) + tk.END_OF_TEXT for i in range(40)]  # in a document it is text
    path = tmp_path / f"docs.{kind}"
    if kind == "parquet":
        write_parquet(path, ("body", [*texts, None]))
    else:
        lines = (json.dumps({"body": text}) + "\n" for text in [*texts, None])
        lines = "\n".join(lines)  # and blank ones
        (gzip.open if kind.endswith("gz") else open)(path, "wt").write(lines)
    folder = make(tmp_path, path, text_key="body", val_fraction=0.1, name="")
    train, val = text_of(folder, "train"), text_of(folder, "val")
    assert sorted((train + val).split(tk.END_OF_TEXT)[1::2]) == sorted(t[:-13] for t in texts)
    assert f"skipped 1 empty records of {path}: their 'body' is null" in capsys.readouterr().err
    assert folder.name == "docs" and 3 <= ids_of(folder, "val").count(299) <= 4


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("os.scandir", mock.Mock(side_effect=PermissionError(13, "no", "folder")))
    with pytest.raises(PermissionError):
        pd.find_files(str(tmp_path))


FINE = b'{"text": "fine"}\n\n'
UNREADABLE = [  # a file, what is in it, and what the sentence says besides the file's name
    ("a.jsonl", FINE + b'{"text": 5}', "line 3 has 5 as 'text', expected text or null; is the"),
    ("a.jsonl", FINE + b'["text"]', """line 3 is ["text"], expected an object with 'text'; is"""),
    ("a.jsonl", FINE + b'{"text": "a"', "line 3 is not JSON (Expecting ',' delimiter); correct or"),
    ("a.jsonl", FINE + b'{"t": "a"}', """line 3 is {"t": "a"}, expected an object with 'text'"""),
    ("a.jsonl", FINE + b"[" * 100_000, "line 3 is not JSON (maximum recursion"),
    ("a.JSONL", FINE + '{"text": "é"}'.encode("latin1"), "byte 0xe9"),
    ("a.JSONL.GZ", b"not compressed", "Not a gzipped file"),
    ("a.parquet", [("n", ["a"]), ("m", ["a"])], "['n', 'm'], expected exactly one 'text'; is the"),
    ("a.Parquet", [("text", ["a"])] * 2, "'text'], expected exactly one 'text'; is"),
    ("a.parquet", [("text", [b"fine", b"caf\xe9"])], "byte 0xe9"),
]


@pytest.mark.parametrize("name, content, said", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, content, said, tmp_path):
    path = tmp_path / name
    if isinstance(content, list):
        write_parquet(path, *content)
    else:
        path.write_bytes(content)
    with pytest.raises(Refusal, match=re.escape(f"{path} cannot be read")) as caught:
        pd.read_paths(str(path), "text")
    assert said in str(caught.value) and "(None)" not in str(caught.value)


# ---- Downloads, from a hub that is a folder -----------------------------------------------------


def test_shards(tmp_path, monkeypatch):
    def hf_hub_download(repo: str, file: str, repo_type: str) -> str:
        return str(tmp_path / repo_type / repo / file)

    fake = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    gpt2 = tk.encoding_from(BYTES, "(?s:.)", {tk.END_OF_TEXT: 50_256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2)
    hub = tmp_path / "dataset/kjj0/finewebedu10B-gpt2"
    hub.mkdir(parents=True)
    for i, shard in enumerate(["val_000000", "train_000001", "train_000002"]):
        write_shard(hub / f"finewebedu_{shard}.bin", [50_256, *range(65, 85 + i)])
    folder = make(tmp_path, "finewebedu", name="", shards=2)
    data = tf.load_dataset(folder)
    assert len(data.train) == 22 + 23 and len(data.val) == 21 and data.vocab_size == 50_257
    assert data.val_bytes_per_token == 20 / 21
    write_shard(hub / "finewebedu_train_000002.bin", [1] * 5000 + [50_257] + [1] * 5000)
    with pytest.raises(Refusal, match="holds ids beyond gpt2's 50257 tokens"):
        make(tmp_path, "finewebedu", name="", shards=2, overwrite=True)
    assert len(tf.load_dataset(folder).val) == 21  # the folder made before is kept


# ---- The command -------------------------------------------------------------------------------


def test_the_vocabulary_follows_the_size_of_the_text(tmp_path):
    sizes = {1_000: 512, 50_000: 1024, 100_000: 2048, 200_000: 2048, 700_000: 4096, 10**8: 4096}
    assert {n: advice.fitting_vocabulary(["x" * n]) for n in sizes} == sizes
    letters = random.Random(1).choices("abcdefghij ", k=60_000)
    (tmp_path / "a.txt").write_text("".join(letters))
    folder = make(tmp_path, tmp_path / "a.txt", vocab_size=0)
    assert tf.load_dataset(folder).vocab_size == 1024


def test_the_command_that_trains_on_a_folder(book, tmp_path):
    torch = pytest.importorskip("torch")
    data, words = tf.load_dataset(book), f"--data={book} --out=out/book"
    steps = 5 * len(data.train) // 2048
    command = advice.next_command(book, data, "")
    new = f"python train.py config/small.py {words} --steps={steps} --vocab_size=300"
    assert command == new
    assert advice.next_command(book, data, str(book)) == new  # no weights
    one = "python train.py config/one_gpu.py --data=data/x --out=out/x --steps="
    one = one.replace("data/x", str(book)).replace("out/x", "out/book")
    for source, tokens, vocab, options in (
        ("finewebedu", 10**8, 50257, "3051"),
        ("fineweb", 2 * 10**9, 50257, "7000"),
        ("tinystories", 5 * 10**8, 4096, "6000 --block_size=512 --grad_accum=4 --vocab_size=4096"),
    ):
        text = SimpleNamespace(train=range(tokens), val=range(10**7), vocab_size=vocab)
        assert advice.next_command(book, text, "", source) == one + options
    (release := tmp_path / "release").mkdir()
    (release / "config.json").touch()
    command = advice.next_command(
        book, data, str(release)
    )  # its rate does not depend on small.py's
    assert command.startswith(f"python train.py --init_from={release} {words} --steps={steps} ")
    assert command.endswith(" --lr=2e-5")
    run = dict(lr=6e-3, optimizer="muon", adamw_lr=2.0, batch_size=2, block_size=64, eval_tokens=0)
    run |= dict(grad_accum=2, recompute=True)
    torch.save({"model_config": {}, "train_config": run}, book / "best.pt")
    text = SimpleNamespace(train=data.train, val=range(10**7), vocab_size=300)
    command = advice.next_command(book, text, str(book), "tinystories")
    as_trained = "--batch_size=2 --block_size=64 --lr=0.0006 --optimizer=muon --adamw_lr=2.0"
    as_trained += (
        " --grad_accum=2 --recompute=True"  # else a step takes more memory than the run's did
    )
    steps *= 16  # its windows are a sixteenth of small.py's
    as_trained += " --eval_tokens=100000"  # not the run's
    assert command == f"python train.py --init_from={book} {words} --steps={steps} {as_trained}"


def test_the_tutorial_has_the_command_for_its_text():
    page = (ROOT / "docs/TUTORIAL.md").read_text(encoding="utf-8")
    tokens = re.search(r"train: .* ([\d,]+) tokens\nval: ", page)[1].replace(",", "")
    text = SimpleNamespace(train=range(int(tokens)), val=range(9), vocab_size=4096)
    command = advice.next_command(Path("data/nn"), text, "")
    assert re.search(r"data/nn\nnext: (.*)\n", page)[1] == command


def test_a_text_that_is_shorter_than_a_window_needs_more(tmp_path):
    """Of a new network a window of the YaRN phase, of given weights one of block_size."""
    (tmp_path / "config.json").touch()
    for weights, window in (("", 1024), (str(tmp_path), 256)):
        text = SimpleNamespace(train=range(window), val=range(9), vocab_size=512)
        said = advice.next_command(tmp_path, text, weights)
        assert said.startswith(f"add text: it has {window:,} tokens, not more than a window (")
        text.train = range(window + 1)
        assert advice.next_command(tmp_path, text, weights).startswith("python train.py ")
