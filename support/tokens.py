"""Token files, and a prepared folder as a Dataset.

Token files have the layout of llm.c and modded-nanogpt: 256 little-endian int32, of which the
first three are magic number, version and number of tokens, then the ids. Over 2^30 training tokens
are train_000001.bin and so on.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.files import naming
from support.settings import Refusal, info
from support.tokenizer import AGAIN, PIECE, Tokenizer, cut, stored_tokenizer

TOKENS_PER_FILE = 1 << 30  # at most; the header counts them in an int32
HEADER_BYTES = 1024
UINT16, UINT32 = (20240520, 1), (20240801, 7)  # magic number and version for ids of either type
DTYPES = {UINT16: np.dtype("<u2"), UINT32: np.dtype("<u4")}


def header(kind: tuple[int, int], count: int) -> bytes:
    return np.array([*kind, count], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")


def cut_all(texts: list[str], before: list[int], after: list[int]) -> Iterator[list]:
    """The texts in pieces, each as [ids before it, piece, ids after it]."""
    for text in texts:
        pieces = [[[], piece, []] for piece in cut(text, PIECE)]
        pieces[0][0], pieces[-1][2] = before, after
        yield from pieces


def encode_all(texts: list[str], tokenizer: Tokenizer, name: str) -> Iterator[list[int]]:
    """The ids of the texts between the tokenizer's marks, piece by piece. A mark that a text has
    already, such as a chat that is written as a release writes it, does not come twice."""
    pieces, total = cut_all(texts, *tokenizer.marks), sum(map(len, texts))
    with tqdm(desc=name, total=total, unit_scale=True, disable=None, leave=False) as progress:
        while batch := list(islice(pieces, 256)):  # which are encoded in parallel
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (before, piece, after), ids in zip(batch, encoded, strict=True):
                before = [] if ids[: len(before)] == before else before
                after = [] if ids[len(ids) - len(after) :] == after else after
                yield [*before, *ids, *after]
                progress.update(len(piece))


def write_tokens(folder: Path, split: str, texts: list[str], tokenizer: Tokenizer) -> None:
    """Encode the texts into the token file <split>.bin.

    More than TOKENS_PER_FILE tokens are shared out evenly over <split>_000001.bin and so on. All
    are first written to one file. Then its last part is copied out and cut off, and so on.
    """
    kind = UINT16 if tokenizer.n_vocab <= 1 << 16 else UINT32
    dtype, path, count = DTYPES[kind], folder / f"{split}.bin", 0
    with naming(path), open(path, "wb+") as file:
        file.write(bytes(HEADER_BYTES))  # zeros, which no reader accepts, until all is written
        for ids in encode_all(texts, tokenizer, path.name):
            file.write(np.array(ids, dtype).tobytes())
            count += len(ids)
        files = -(-count // TOKENS_PER_FILE)  # rounded up
        for number in range(files, 1, -1):
            start = count * (number - 1) // files
            place = HEADER_BYTES + start * dtype.itemsize
            file.seek(place)
            with open(folder / f"{split}_{number:06d}.bin", "wb") as shard:
                shard.write(header(kind, count * number // files - start))
                shutil.copyfileobj(file, shard)
            file.truncate(place)
        file.seek(0)
        file.write(header(kind, count // files))
    if files > 1:
        path.rename(folder / f"{split}_000001.bin")
    length = sum(len(text.encode()) for text in texts)
    info(f"{split}: {len(texts):,} documents, {length:,} bytes, {count:,} tokens")


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a token file: (N,) uint16 or uint32, mapped."""
    *kind, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    dtype = DTYPES.get(tuple(kind))
    if dtype is None or path.stat().st_size != HEADER_BYTES + count * dtype.itemsize or count < 1:
        raise Refusal(f"{path} is no whole token file; {AGAIN}")
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    # The ends only, as the files of a run can be 20 GB: preparing has seen all.
    if (highest := max(tokens[:1024].max(), tokens[-1024:].max())) >= vocab_size:
        raise Refusal(f"{path} holds id {highest} of {vocab_size} tokens; {AGAIN}")
    return tokens


class Tokens:
    """One split: token files read as if they were one, except that no window spans two."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(N, length) int64: the ids from each of N starts on, 0 <= start <= len - length.

        A window that would run over the end of its file is moved back to end with it.
        """
        starts, shortest = np.asarray(starts), min(map(len, self.arrays))
        if length > shortest or starts.min() < 0 or starts.max() > len(self) - length:
            raise Refusal(f"no windows of {length} tokens in a file of {shortest}; shorten them")
        rows = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")
        for row, start, shard in zip(rows, starts, shards, strict=True):
            array = self.arrays[shard]
            begin_of_file = self.ends[shard] - len(array)
            first = min(start - begin_of_file, len(array) - length)
            row[:] = array[first : first + length]
        return rows


# Folders in data/ that train.py makes for config/*.py if they are missing: their vocabularies.
OURS = {"stdlib": 4096, "tiny": 512}
FEW_TOKENS = 100_000  # of a validation text are enough to compare runs; stdlib's has as many


@dataclass
class Dataset:
    """A prepared folder; len(dataset.train) is its number of tokens."""

    train: Tokens
    val: Tokens
    vocab_size: int
    val_bytes_per_token: float  # <|endoftext|> is one of the tokens and has no bytes
    # No setting is chosen by it; experiments/unseen.py measures final results on it.
    test: Tokens | None = None
    rows: int = 0  # of the embedding in the release whose tokenizer this is (0: not known)


def load_dataset(folder: Path | str, val_tokens: int = 0) -> Dataset:
    """The folder, with so many tokens of the validation text, from its start (0: all). Raises
    OSError or Refusal where a file is missing or damaged."""
    folder, tokenizer = Path(folder), stored_tokenizer(folder)
    n_vocab = tokenizer.n_vocab

    def read(split: str) -> list[np.ndarray]:
        paths = sorted(folder.glob(f"{split}_*.bin")) or [folder / f"{split}.bin"]
        return [read_tokens(path, n_vocab) for path in paths]

    train, val = Tokens(read("train")), np.concatenate(read("val"))[: val_tokens or None]
    counts = np.bincount(val, minlength=n_vocab)
    n_bytes = sum(len(text) * int(counts[i]) for i, text in tokenizer.texts.items())
    test = Tokens(read("test")) if any(folder.glob("test*.bin")) else None
    return Dataset(train, Tokens([val]), n_vocab, n_bytes / len(val), test, tokenizer.rows)


def data_folder(name: str) -> Path:
    """The folder of prepared data: a path, or a name in data/."""
    path = Path(name)
    is_path = len(path.parts) > 1 or (path / "meta.json").exists()
    return path if is_path else Path("data") / name


def open_folder(
    folder: Path, vocab_size: int, longest: int, weights: Path | None, val_tokens: int
) -> Dataset:
    """The prepared folder, for a network of this vocabulary and windows of up to `longest` tokens.
    `weights`: the file or folder of given weights, whose tokenizer the data must have. `val_tokens`
    is load_dataset's. Raises OSError or Refusal where they do not fit."""
    if not folder.exists():
        # With another vocabulary, OURS would be in the way of their own configurations.
        name = f"{folder.name}-{vocab_size}" if folder.name in OURS else folder.name
        make = f"python prepare_data.py SOURCE --name={name} "
        home = weights.parent if weights and weights.is_file() else weights
        make += f"--tokenizer={home}" if weights else f"--vocab_size={vocab_size}"
        make += f" --out={folder.parent}" if folder.parent != Path("data") else ""
        make += f", and give --data={folder.with_name(name)}" if name != folder.name else ""
        raise Refusal(f"no data in {folder}; make it with: {make}.")
    data = load_dataset(folder, val_tokens)
    if data.val_bytes_per_token == 0:  # the mark at its start is no text
        none = f"the first {len(data.val)} validation tokens of {folder} hold no text"
        raise Refusal(f"{none}: give more --eval_tokens.")
    # The embedding may have more rows than there are tokens: fewer than 128 more, or exactly as
    # many as in the release that the tokenizer is from.
    padding = vocab_size - data.vocab_size
    if padding < 0 or (padding >= 128 and vocab_size != data.rows):
        raise Refusal(
            f"vocab_size is {vocab_size}, but the vocabulary of {folder} has {data.vocab_size} "
            f"tokens: for a new network set vocab_size to {data.vocab_size}, as by --vocab_size; "
            "for given weights prepare the data with --tokenizer=DIR, where the weights are."
        )
    shortest = min(map(len, data.train.arrays))
    if longest >= shortest:  # a window needs the token after it, too
        short = f"windows of {longest} tokens do not fit in {folder}, a file of {shortest}"
        raise Refusal(f"{short}: lower --block_size and --long_block_size, or add text.")
    return data


def text_digest(data: Dataset) -> str:
    """Digits that tell one prepared text from another: of the training files' sizes, of the whole
    validation text, and of 8,192 tokens at 1,000 places of the training text (up to 8M: of all)."""
    digest = hashlib.sha256(repr([*map(len, data.train.arrays)]).encode())
    digest.update(np.ascontiguousarray(data.val.arrays[0]).data)
    length = min(8192, *map(len, data.train.arrays))
    places = min(1000, -(-len(data.train) // length))
    for start in np.linspace(0, len(data.train) - length, places).astype(int):
        digest.update(data.train.windows([start], length).data)
    return digest.hexdigest()
