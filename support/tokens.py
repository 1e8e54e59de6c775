"""Token files, and a prepared folder as a Dataset.

Token files have the layout of llm.c and modded-nanogpt: a header of 256 little-endian int32 (magic
number, version, number of tokens, zeros), then the ids. A download has several files of training
tokens: train_000001.bin and so on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.settings import Refusal, info
from support.tokenizer import AGAIN, PIECE, Tokenizer, cut, stored_tokenizer

MOST_TOKENS = 1 << 30  # in a file that we write; its header has their number as an int32
HEADER_BYTES = 1024
UINT16, UINT32 = (20240520, 1), (20240801, 7)  # magic number and version
DTYPES = {UINT16: np.dtype("<u2"), UINT32: np.dtype("<u4")}


def cut_all(texts: list[str], before: list[int], after: list[int]) -> Iterator[list]:
    """The texts in pieces, each as [ids before it, piece, ids after it]."""
    for text in texts:
        pieces = [[[], piece, []] for piece in cut(text, PIECE)]
        pieces[0][0], pieces[-1][2] = before, after
        yield from pieces


def encode_all(texts: list[str], tokenizer: Tokenizer, name: str) -> Iterator[list[int]]:
    """The ids of the texts, with the tokenizer's marks around each, piece by piece. Marks that a
    text already has, such as a chat in a release's format, are not repeated."""
    pieces, total = cut_all(texts, *tokenizer.marks), sum(map(len, texts))
    with tqdm(desc=name, total=total, unit_scale=True, disable=None, leave=False) as progress:
        while batch := list(islice(pieces, 256)):  # encoded in parallel
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (before, piece, after), ids in zip(batch, encoded, strict=True):
                before = [] if ids[: len(before)] == before else before
                after = [] if ids[len(ids) - len(after) :] == after else after
                yield [*before, *ids, *after]
                progress.update(len(piece))


def write_tokens(folder: Path, split: str, texts: list[str], tokenizer: Tokenizer) -> None:
    """Encode the texts into the token file <split>.bin. Raises Refusal beyond MOST_TOKENS."""
    kind = UINT16 if tokenizer.n_vocab <= 1 << 16 else UINT32
    dtype, path, count = DTYPES[kind], folder / f"{split}.bin", 0
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))  # zeros: no reader accepts an incomplete file
        for ids in encode_all(texts, tokenizer, path.name):
            file.write(np.array(ids, dtype).tobytes())
            count += len(ids)
            if count > MOST_TOKENS:
                raise Refusal(
                    f"the {split} text has more than {MOST_TOKENS:,} tokens, the limit of a token "
                    "file: give a shorter SOURCE."
                )
        file.seek(0)
        file.write(np.array([*kind, count], "<i4").tobytes())
    length = sum(len(text.encode()) for text in texts)
    info(f"{split}: {len(texts):,} documents, {length:,} bytes, {count:,} tokens")


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a token file, (N,) uint16 or uint32, as a memory map."""
    *kind, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    dtype = DTYPES.get(tuple(kind))
    if dtype is None or path.stat().st_size != HEADER_BYTES + count * dtype.itemsize or count < 1:
        raise Refusal(f"{path} is not a complete token file; {AGAIN}")
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    # Only both ends are checked: files may have 20 GB, and prepare_data.py checked downloads whole.
    if (highest := max(tokens[:1024].max(), tokens[-1024:].max())) >= vocab_size:
        raise Refusal(f"{path} holds id {highest} of {vocab_size} tokens; {AGAIN}")
    return tokens


class Tokens:
    """One split: token files read as a single one, except that no window spans two files."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` ids from each of N starts, (N, length) int64, 0 <= start <= len - length.

        A window that would extend beyond its file is moved back to the file's end.
        """
        windows = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")
        for window, start, shard in zip(windows, starts, shards, strict=True):
            array = self.arrays[shard]
            begin_of_file = self.ends[shard] - len(array)
            first = min(start - begin_of_file, len(array) - length)
            window[:] = array[first : first + length]
        return windows


# Folders in data/ that train.py prepares for config/*.py if missing, and their vocabulary sizes.
DEFAULT_VOCAB_SIZES = {"stdlib": 4096, "tiny": 512}
FEW_TOKENS = 100_000  # of validation text, enough to compare runs; stdlib has about as many


@dataclass
class Dataset:
    """A prepared folder; len(dataset.train) is the number of its training tokens."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    val_bytes_per_token: float  # <|endoftext|> counts as a token without bytes
    # For final results (experiments/unseen.py); no setting is chosen by it.
    test: Tokens | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.n_vocab


def load_dataset(folder: Path | str, val_tokens: int = 0) -> Dataset:
    """Opens a folder, with the first `val_tokens` tokens of the validation text (0: all). Raises
    OSError or Refusal if a file is missing or damaged."""
    folder, tokenizer = Path(folder), stored_tokenizer(folder)
    n_vocab = tokenizer.n_vocab

    def read(split: str) -> list[np.ndarray]:
        paths = sorted(folder.glob(f"{split}_*.bin")) or [folder / f"{split}.bin"]
        return [read_tokens(path, n_vocab) for path in paths]

    train, val = Tokens(read("train")), np.concatenate(read("val"))[: val_tokens or None]
    counts = np.bincount(val, minlength=n_vocab)
    n_bytes = sum(len(text) * int(counts[i]) for i, text in tokenizer.texts.items())
    test = Tokens(read("test")) if any(folder.glob("test*.bin")) else None
    return Dataset(train, Tokens([val]), tokenizer, n_bytes / len(val), test)


def data_folder(name: str) -> Path:
    """The folder of prepared data: a path, or a name in data/."""
    path = Path(name)
    is_path = len(path.parts) > 1 or (path / "meta.json").exists()
    return path if is_path else Path("data") / name


def open_folder(
    folder: Path,
    vocab_size: int,
    longest: int,
    val_tokens: int = 0,
    weights: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Opens a prepared folder for a network with this vocabulary and windows of up to `longest`
    tokens. val_tokens: as in load_dataset. weights, tokenizer: the path of the initial weights and
    their tokenizer, if they have one, which the data must have, too. Raises OSError or Refusal if
    the data do not fit."""
    home = weights.parent if weights and weights.is_file() else weights
    if not folder.exists():
        own = f"--tokenizer={home}" if tokenizer else f"--vocab_size={vocab_size}"
        raise Refusal(
            f"no data in {folder}: name a prepared folder with --data, or make one with "
            f"python prepare_data.py SOURCE --name={folder.name} {own}."
        )
    data = load_dataset(folder, val_tokens)
    if data.val_bytes_per_token == 0:  # only <|endoftext|>
        raise Refusal(
            f"the first {len(data.val)} validation tokens of {folder} hold no text: "
            "give more --eval_tokens."
        )
    # The embedding may have more rows than the tokenizer has tokens: a new one up to 127 more.
    padding = vocab_size - data.vocab_size
    if padding < 0 or (padding >= 128 and not tokenizer):
        raise Refusal(
            f"vocab_size is {vocab_size}, but the vocabulary of {folder} has {data.vocab_size} "
            f"tokens: for a new network give --vocab_size={data.vocab_size}; for existing weights "
            "prepare the data with --tokenizer=DIR, the folder of the weights."
        )
    shortest = min(map(len, data.train.arrays))
    if longest >= shortest:  # targets need one token more
        raise Refusal(
            f"windows of {longest} tokens do not fit in {folder}, where a file has {shortest}: "
            "lower --block_size and --long_block_size, or add text."
        )
    if tokenizer and not tokenizer.has_tokens_of(data.tokenizer):
        raise Refusal(
            f"{weights} and {folder} have different tokenizers; "
            f"prepare the data with --tokenizer={home}."
        )
    return data
