"""Turn text into token files: python prepare_data.py [SOURCE] [--key=value].

    text -> documents -> train / validation -> byte-level BPE -> data/<name>/
        train.bin (or several train_*.bin), val.bin    token ids behind a header of 1024 bytes
        tokenizer.tiktoken                             one line per token: base64 of its bytes, rank
        meta.json                                      split pattern, special tokens, hash

Token files have the layout of llm.c and modded-nanogpt, so their shards open here and ours open
there: 256 little-endian int32, of which the first three are magic number, version and number of
tokens, then the ids. Every document begins with <|endoftext|>.
"""

import base64
import glob
import gzip
import hashlib
import heapq
import json
import os
import re
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from config import info, parse_args, run_command

END_OF_TEXT = "<|endoftext|>"
# As the three splitting stages of DeepSeek-V3's tokenizer, in one expression: numbers by three
# digits, Chinese and Japanese, a mark with a word, words, marks, line ends, blanks. The last
# alternative takes what no other does (control characters), or text would be lost.
PATTERN = (
    r"\p{N}{1,3}|[\u4e00-\u9fa5\u3040-\u30ff]+|[!-/:-@\[-`{-~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|."
)
BPE_SAMPLE = 100_000_000  # characters that a new tokenizer is trained on, at most about
HEADER_BYTES = 1024
UINT16, UINT32 = (20240520, 1), (20240801, 7)  # magic number and version for ids of either type
DTYPES = {UINT16: np.dtype("<u2"), UINT32: np.dtype("<u4")}
# GPT-2 tokens in shards of 100M on Hugging Face: where they lie and how many there are.
SHARDS = {"fineweb": ("kjj0/fineweb10B-gpt2", 103), "finewebedu": ("kjj0/finewebedu10B-gpt2", 99)}
# Folders and files of an installation that are tests, generated, or near-copies of one another.
NOT_CORPUS = re.compile(
    r"(^|/)((site|dist)-packages|__pycache__|tests?|idle_test|idlelib|lib2to3|turtledemo|ensurepip"
    r"|encodings|pydoc_data|_sysconfigdata[^/]*)(/|$)"
)
OURS = r"meta\.json|tokenizer\.tiktoken|(train(_\d+)?|val)\.bin"  # what we may replace
AGAIN = "make it with python prepare_data.py SOURCE (--overwrite if the folder is there)"


@dataclass
class DataConfig:
    source: str = "stdlib"  # a name, or a file, folder or glob of text, .jsonl[.gz], .parquet
    name: str = ""  # name of the folder made ("": named after the source)
    out: str = "data"  # the folder that it is made in
    tokenizer: str = ""  # "": train one; gpt2, cl100k_base, o200k_base; or a folder that has one
    vocab_size: int = 4096  # tokens of a newly trained tokenizer, <|endoftext|> included
    val_fraction: float = 0.05  # share of the bytes that is kept for validation
    text_key: str = "text"  # key (.jsonl) or column (.parquet) that holds the text
    shards: int = 1  # training shards of fineweb and finewebedu (100M tokens, 200 MB each)
    overwrite: bool = False  # replace a folder made before


# ---- Text ---------------------------------------------------------------------------------------


def download(repo: str, file: str) -> Path:
    """A file of a dataset on Hugging Face, fetched once into the cache of huggingface_hub."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, repo_type="dataset")).resolve()


def read_file(path: Path, text_key: str) -> Iterator[str]:
    """The documents of one file; plain text is cut into documents at <|endoftext|>."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(path).iter_batches():
            yield from batch.column(text_key).drop_null().to_pylist()
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():  # JSON can spell half a surrogate pair, which UTF-8 cannot
                    yield json.loads(line)[text_key].encode("utf-8", "replace").decode()
    else:
        yield from path.read_text(encoding="utf-8").split(END_OF_TEXT)


def read_paths(source: str, text_key: str) -> dict[str, str]:
    """{name: text}, the documents of a file, a folder (hidden files aside) or a glob."""
    root = Path(source).expanduser()
    pattern = glob.escape(str(root)) if root.exists() else str(root)
    pattern += "/**/*" if root.is_dir() else ""
    paths = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
    if not paths:
        names = f"files, a folder, stdlib, tinystories, {', '.join(SHARDS)}"
        raise FileNotFoundError(f"no text at {source!r}: expected {names}")
    top = os.path.commonpath([path.parent for path in paths])
    documents = {}
    for path in tqdm(paths, desc="reading", unit=" files", disable=None, leave=False):
        try:
            texts = list(read_file(path, text_key))
        except UnicodeDecodeError:
            info(f"skipped {path}: not UTF-8 text")
            continue
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile) as e:
            why = f"{e!r:.200}; is the text under another --text_key=KEY?"
            raise ValueError(f"{path} cannot be read: {why}") from None
        name = path.relative_to(top).as_posix()
        documents |= {f"{name}:{i}": text for i, text in enumerate(texts) if text.strip()}
    return documents


def read_stdlib() -> dict[str, str]:
    """{name: text}: the running Python's library, without equal, very short or very long files."""
    root, names = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        if not NOT_CORPUS.search(name := path.relative_to(root).as_posix()):
            names.setdefault(path.read_text(encoding="utf-8", errors="replace"), name)
    return {name: text for text, name in names.items() if 200 <= len(text) <= 400_000}


def split_documents(documents: dict[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """(training texts, validation texts), the latter about `fraction` of the bytes.

    Whole documents go to validation in the order of the sha256 of their names, except those that
    overshoot the target by over a tenth and those mostly made of lines that other documents have
    too: they would measure memorising. Where that leaves less than half of the target (a
    single file does), the end of the largest document is cut off at a newline.
    """
    size = {name: len(text.encode()) for name, text in documents.items()}
    target, held = fraction * sum(size.values()), 0
    seen = Counter(line for text in documents.values() for line in set(text.splitlines()))
    train, val = dict(documents), {}
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        copied = sum(len(line) for line in train[name].splitlines() if seen[line] > 1)
        own = copied <= len(train[name]) / 2
        if own and held < target and held + size[name] <= 1.1 * target:
            val[name] = train.pop(name)
            held += size[name]
    if held < target / 2:
        name = max(train, key=size.__getitem__)
        text, share = train[name], min(0.5, (target - held) / size[name])
        end = len(text) - round(share * len(text))
        end = text.rfind("\n", end // 2, end) + 1 or end  # none near: in the line
        train[name], val[name + ":end"] = text[:end], text[end:]
    return list(train.values()), list(val.values())


# ---- The tokenizer ------------------------------------------------------------------------------


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str) -> dict[bytes, int]:
    """Byte-level BPE: {token: rank}, at most vocab_size of them, the first 256 the single bytes.

    Again and again the commonest concatenation of two neighbours becomes a token, of equally
    common ones the first in byte order. tiktoken joins any two neighbours whose concatenation has
    a rank, so concatenations are counted here, not pairs: training then sees the very merges that
    encoding makes.
    """
    counts = Counter()
    for text in tqdm(texts, desc="words", disable=None, leave=False):
        counts.update(match[0] for match in regex.finditer(pattern, text))
    parts = [[bytes([byte]) for byte in word.encode()] for word in counts]
    frequency = list(counts.values())
    total, where = Counter(), defaultdict(set)  # concatenation: occurrences, words that hold it
    for word, tokens in enumerate(parts):
        for left, right in pairwise(tokens):
            total[left + right] += frequency[word]
            where[left + right].add(word)
    heap = sorted((-count, token) for token, count in total.items())
    ranks = {bytes([byte]): byte for byte in range(256)}
    while heap and heap[0][0] < 0 and len(ranks) < vocab_size:  # at 0 all words are one token
        count, token = heapq.heappop(heap)
        if -count != total[token]:  # it was pushed before other merges took some of it
            heapq.heappush(heap, (-total[token], token))
            continue
        ranks.setdefault(token, len(ranks))
        grown = set()
        for word in where.pop(token):
            old, new = parts[word], []
            for right in old:  # from left to right, as an encoder does
                if new and new[-1] + right == token:
                    new[-1] = token
                else:
                    new.append(right)
            for left, right in pairwise(old):
                total[left + right] -= frequency[word]
            for left, right in pairwise(new):
                total[left + right] += frequency[word]
                if token in (left, right):
                    where[left + right].add(word)
                    grown.add(left + right)
            parts[word] = new
        for joined in grown:
            heapq.heappush(heap, (-total[joined], joined))
    return ranks


def encoding_from(
    ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]
) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "nanoV3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """{token: rank} of a file like tiktoken's, whose own loader would miss changes: it caches."""
    rows = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def load_tokenizer(folder: Path | str) -> tiktoken.Encoding:
    """The tokenizer stored in a prepared folder or a run. Raises ValueError."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_bytes())
        content = (Path(folder) / "tokenizer.tiktoken").read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
            raise ValueError("its sha256 is not that in meta.json")
        return encoding_from(parse_ranks(content), meta["pattern"], meta["special_tokens"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} has no whole tokenizer ({error!s:.200}); {AGAIN}") from None


# ---- Token files --------------------------------------------------------------------------------


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write tokenizer.tiktoken and meta.json, which load_tokenizer reads."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)
    (folder / "tokenizer.tiktoken").write_bytes(content)
    meta = {
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def write_tokens(path: Path, texts: list[str], encoding: tiktoken.Encoding) -> None:
    """Encode the texts into a token file, each with <|endoftext|> before it."""
    kind, count = UINT16 if encoding.n_vocab <= 1 << 16 else UINT32, 0
    begin = np.array(encoding.eot_token, DTYPES[kind]).tobytes()
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))  # zeros, which no reader accepts, until all is written
        for i in tqdm(range(0, len(texts), 256), desc=path.name, disable=None, leave=False):
            for ids in encoding.encode_ordinary_batch(texts[i : i + 256]):
                file.write(begin + np.array(ids, DTYPES[kind]).tobytes())
                count += 1 + len(ids)
        file.seek(0)
        file.write(np.array([*kind, count], "<i4").tobytes())


def prepare_text(config: DataConfig, folder: Path) -> tiktoken.Encoding:
    """Make token files in folder; returns their tokenizer."""
    if config.source == "tinystories":  # it brings its own validation file
        files = [f"TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")]
        paths = [download("roneneldan/TinyStories", file) for file in files]
        train, val = (list(read_file(path, config.text_key)) for path in paths)
    else:
        stdlib = config.source == "stdlib"
        documents = read_stdlib() if stdlib else read_paths(config.source, config.text_key)
        if (size := sum(map(len, documents.values()))) < 100:
            raise ValueError(f"{config.source} holds {size} characters, expected 100 or more")
        train, val = split_documents(documents, config.val_fraction)
    if config.tokenizer in ("gpt2", "cl100k_base", "o200k_base"):
        encoding = tiktoken.get_encoding(config.tokenizer)  # downloaded once
    elif config.tokenizer:
        encoding = load_tokenizer(config.tokenizer)
    else:
        sample = train[:: 1 + sum(map(len, train)) // BPE_SAMPLE]
        ranks = train_bpe(sample, config.vocab_size - 1, PATTERN)
        encoding = encoding_from(ranks, PATTERN, {END_OF_TEXT: len(ranks)})
    write_tokens(folder / "train.bin", train, encoding)
    write_tokens(folder / "val.bin", val, encoding)
    return encoding


def prepare_shards(config: DataConfig, folder: Path) -> tiktoken.Encoding:
    """Link token files that others have made into folder; returns their tokenizer."""
    encoding = tiktoken.get_encoding("gpt2")
    for number in range(config.shards + 1):
        split, name = ("train", f"train_{number:06d}.bin") if number else ("val", "val.bin")
        path = download(SHARDS[config.source][0], f"{config.source}_{split}_{number:06d}.bin")
        (folder / name).symlink_to(path)
        if read_tokens(path, encoding.n_vocab).max() >= encoding.n_vocab:
            raise ValueError(f"{path} holds ids beyond gpt2's {encoding.n_vocab} tokens; delete it")
    return encoding


def prepare(config: DataConfig) -> Path:
    """Make the folder <out>/<name> and return its path; it appears complete or not at all."""
    name = config.name or Path(config.source).resolve().name.strip(".").split(".")[0]
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise ValueError(f"name={name!r}: expected a plain folder name; give --name=NAME")
    if not 0 < config.val_fraction <= 0.5:
        raise ValueError(f"val_fraction={config.val_fraction}: expected more than 0, at most 0.5")
    if not config.tokenizer and config.vocab_size < 257:
        raise ValueError(f"vocab_size={config.vocab_size}: expected 257 (256 bytes and 1) or more")
    folder = Path(config.out) / name
    here = list(folder.iterdir()) if folder.exists() else []
    if foreign := [path for path in here if not re.fullmatch(OURS, path.name)]:
        raise FileExistsError(f"{foreign[0]} would be lost; choose another --name")
    if here and not config.overwrite:
        raise FileExistsError(f"{folder} exists; replace it with --overwrite, or name another")

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        make = prepare_shards if config.source in SHARDS else prepare_text
        write_tokenizer(make(config, new), new)
        load_dataset(new)  # checked by reading; Windows moves no folder whose files stay mapped
        if folder.exists():
            os.replace(folder, new.with_name("old"))
        os.replace(new, folder)
    data = load_dataset(folder)
    info(f"{folder}: {len(data.train) + len(data.val):,} tokens, vocabulary {data.vocab_size:,}")
    return folder


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a token file, mapped, not read: (N,) uint16 or uint32."""
    *kind, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    dtype = DTYPES.get(tuple(kind))
    if dtype is None or path.stat().st_size != HEADER_BYTES + count * dtype.itemsize or count < 1:
        raise ValueError(f"{path} is no whole token file; {AGAIN}")
    tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
    # The ends only, as the files of a run can be 20 GB: preparing has seen all.
    if (highest := max(tokens[:1024].max(), tokens[-1024:].max())) >= vocab_size:
        raise ValueError(f"{path} holds id {highest} of {vocab_size} tokens; {AGAIN}")
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
            raise ValueError(f"no windows of {length} tokens in a file of {shortest}; shorten them")
        rows = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")
        for row, start, shard in zip(rows, starts, shards, strict=True):
            array = self.arrays[shard]
            first = min(start - self.ends[shard], -length) + len(array)
            row[:] = array[first : first + length]
        return rows


@dataclass
class Dataset:
    """A prepared folder; len(dataset.train) is its number of tokens."""

    train: Tokens
    val: Tokens
    vocab_size: int
    val_bytes_per_token: float  # <|endoftext|> is one of the tokens and has no bytes


def load_dataset(folder: Path | str) -> Dataset:
    """Raises FileNotFoundError or ValueError where a file of the folder is missing or damaged."""
    folder, encoding = Path(folder), load_tokenizer(folder)
    shards = sorted(folder.glob("train_*.bin")) or [folder / "train.bin"]
    train = Tokens([read_tokens(path, encoding.n_vocab) for path in shards])
    val = read_tokens(folder / "val.bin", encoding.n_vocab)
    counts = np.bincount(val, minlength=encoding.n_vocab)
    n_bytes = sum(len(token) * int(counts[i]) for token, i in encoding._mergeable_ranks.items())
    return Dataset(train, Tokens([val]), encoding.n_vocab, n_bytes / len(val))


def main(argv: list[str]) -> None:
    description = "Turn text into token files and a tokenizer in data/<name>/."
    source, values = parse_args(description, argv, DataConfig, positional="source")
    print(prepare(DataConfig(**values | ({"source": source} if source else {}))))


if __name__ == "__main__":
    run_command(main)
