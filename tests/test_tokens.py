"""support/tokens.py: the layout of token files, windows, a prepared folder, its damages."""

import os
import re

import numpy as np
import pytest
import tiktoken
from test_prepare_data import BYTES, make, prose, write_shard
from test_tokenizer import write_bytes_release

import support.tokenizer as tk
import support.tokens as tf
from support.release_tokenizer import hf_tokenizer
from support.settings import Refusal


def test_vocabularies_over_65536_are_stored_as_uint32(tmp_path, monkeypatch):
    large = tk.encoding_from(BYTES, "(?s:.)", {tk.END_OF_TEXT: 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (tmp_path / "a.txt").write_text(prose(1, 50))
    folder = make(tmp_path, tmp_path / "a.txt", tokenizer="cl100k_base")
    assert np.fromfile(folder / "val.bin", "<i4", 2).tolist() == [20240801, 7]
    data = tf.load_dataset(folder)  # loads without the network
    assert data.vocab_size == 70_001 and data.val.arrays[0].dtype == np.uint32
    assert data.val.arrays[0][0] == 70_000


def test_a_mark_that_a_text_has_does_not_come_twice(tmp_path):
    """As in a chat that is written as its release writes it."""
    write_bytes_release(tmp_path / "release", eos_token_id=257, bos_token_id=256)
    tokenizer = hf_tokenizer(tmp_path / "release")
    texts = ["a", "[BOS]a", "a[EOS]", "[BOS]a[EOS]", "[EOS]a"]
    files = list(tf.encode_all(texts, tokenizer, "val.bin"))
    assert files == [[256, 97, 257]] * 4 + [[256, 257, 97, 257]]


def test_a_text_too_long_for_a_token_file_is_refused(book, tmp_path, monkeypatch):
    count = len(tf.load_dataset(book).train)
    monkeypatch.setattr(tf, "MOST_TOKENS", count)
    make(tmp_path, tmp_path / "book.txt", name="just")
    monkeypatch.setattr(tf, "MOST_TOKENS", count - 1)
    with pytest.raises(Refusal, match=f"train text has more than {count - 1:,} tokens, the limit"):
        make(tmp_path, tmp_path / "book.txt", name="long")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"book", "just"}


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
    tf.open_folder(book, 300, 5)  # targets need a token more
    with pytest.raises(Refusal, match=f"windows of 6 tokens do not fit in {book}, where a file"):
        tf.open_folder(book, 300, 6)


def test_an_evaluation_may_read_the_start_of_the_text_alone(book):
    part, ids = tf.load_dataset(book, 50), tf.load_dataset(book).val.arrays[0][:50]
    assert part.val.arrays[0].tolist() == ids.tolist()
    text = tk.stored_tokenizer(book).encoding.decode(ids).removeprefix(tk.END_OF_TEXT)
    assert part.val_bytes_per_token == len(text.encode()) / 50


DAMAGES = {  # what the sentence says: how the folder is damaged
    "No such file": lambda d: (d / "val.bin").unlink(),
    "val.bin is not a complete token file": lambda d: os.truncate(d / "val.bin", 1500),
    "train.bin is not a complete token file": lambda d: (d / "train.bin").write_bytes(b""),
    "test.bin is not a complete token file": lambda d: write_shard(d / "test.bin", [1], version=2),
    "holds id 300 of 300 tokens": lambda d: write_shard(d / "val.bin", [1] * 5000 + [300]),
    "train.bin holds id 301": lambda d: write_shard(d / "train.bin", [301] + [1] * 5000),
    "/meta.json'); make it": lambda d: (d / "meta.json").unlink(),
    "meta.json is not JSON": lambda d: os.truncate(d / "meta.json", 50),
    "sha256 of tokenizer.tiktoken is not": lambda d: os.truncate(d / "tokenizer.tiktoken", 1000),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_folders_are_refused(book, sentence):
    """A file that is missing, cut short, or another program's."""
    DAMAGES[sentence](book)
    with pytest.raises((Refusal, FileNotFoundError), match=re.escape(sentence)) as caught:
        tf.load_dataset(book)
    assert str(book) in str(caught.value)
