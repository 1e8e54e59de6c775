"""Turn text into token files: python prepare_data.py [SOURCE] [--key=value].

    text -> documents -> train / validation -> byte-level BPE -> data/<name>/
        train.bin (or several train_*.bin), val.bin    token ids behind a header of 1024 bytes
        tokenizer.tiktoken                             one line per token: base64 of its bytes, rank
        meta.json                                      split pattern, special tokens, sizes, hashes

Token files have the layout of llm.c and modded-nanogpt, so their shards open here and ours open
there: 256 little-endian int32, then the ids.
    [0] magic, [1] version, [2] number of tokens N
        20240520, 1: ids are uint16;  20240801, 7: ids are uint32 (vocabularies over 65,536)
    words that are zero in their files and filled in ours:
    [3] vocabulary size, [4] id of <|endoftext|>, [5] bytes of text per token (bits of a float32),
    [6] number of documents, [8:16] sha256 of tokenizer.tiktoken
Every document begins with <|endoftext|>. The tokenizer file has the layout of tiktoken's own.

train.py and sample.py use the second half of this file: load_dataset, load_tokenizer, parse_args.
"""

import argparse
import ast
import base64
import binascii
import dataclasses
import difflib
import glob
import gzip
import hashlib
import heapq
import http.client
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import types
import typing
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
# The three splitting stages of DeepSeek-V3's tokenizer written as one expression: numbers by three
# digits, Chinese and Japanese, a mark with a word, words, marks, line ends, blanks. The last
# alternative takes what no other does (control characters), or text would be lost.
PATTERN = (
    r"\p{N}{1,3}|[一-龥\u3040-ゟ゠-ヿ]+|[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|."
)
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, ids
HEADER_BYTES = 1024
OURS = r"meta\.json|tokenizer\.tiktoken|(train(_\d+)?|val)\.bin"  # files of a prepared folder
PIECE = 1 << 18  # characters tokenised at a time
BPE_SAMPLE = 100_000_000  # characters that a new tokenizer is trained on, at most

HUGGING_FACE = "https://huggingface.co/datasets"
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
STORIES = "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
SHARDS = {  # GPT-2 tokens in files of 100M: where they lie, and how many there are
    "fineweb": ("kjj0/fineweb10B-gpt2/resolve/main/fineweb", 103),
    "finewebedu": ("kjj0/finewebedu10B-gpt2/resolve/main/finewebedu", 99),
}
SOURCES = ["stdlib", "pysite", "tinyshakespeare", "tinystories", *SHARDS]
NOT_CORPUS = set(
    "site-packages dist-packages __pycache__ test tests idle_test idlelib lib2to3 turtledemo "
    "ensurepip encodings pydoc_data".split()
)


@dataclass
class DataConfig:
    source: str = "stdlib"  # a name, or a file, folder or glob of text, .jsonl[.gz], .parquet
    name: str = ""  # name of the folder made ("": named after the source)
    out: str = "data"  # the folder that it is made in
    tokenizer: str = ""  # "": train one; gpt2, cl100k_base, o200k_base; or a prepared folder
    vocab_size: int = 4096  # tokens of a newly trained tokenizer, <|endoftext|> included
    val_fraction: float = 0.05  # share of the bytes that is kept for validation
    text_key: str = "text"  # key (.jsonl) or column (.parquet) that holds the text
    shards: int = 1  # training shards of fineweb and finewebedu (100M tokens, 200 MB each)
    overwrite: bool = False  # replace a folder made before


def say(text: str) -> None:
    """Everything but the product of a command goes to stderr."""
    print(text, file=sys.stderr, flush=True)


# ---- Reading documents: lists of (name, text) -------------------------------------------------


def download(url: str, path: Path, timeout: float = 30.0) -> Path:
    """Fetch url to path; bytes arrive in path.part, from where an interrupted download goes on.

    timeout: seconds without a byte after which the server counts as silent. Raises OSError.
    """
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "nanoV3"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply, open(part, "ab") as file:
            if reply.status != 206:  # the server sends the file from its beginning
                have = 0
                file.truncate(0)
            length = reply.headers["Content-Length"]
            total = have + int(length) if length else None
            bar = tqdm(initial=have, total=total, unit="B", unit_scale=True, desc=path.name)
            with bar:
                while block := reply.read1(1 << 16):
                    bar.update(file.write(block))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and part.stat().st_size != total:
            raise OSError(f"the connection broke after {part.stat().st_size:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416 and have:
            part.unlink()  # nothing lies beyond what we have: not a part of this file
            return download(url, path, timeout)
        raise OSError(
            f"could not download {url} ({error}); run the same command again to go on from "
            f"{part}, or put the file at {path} yourself"
        ) from None
    os.replace(part, path)
    return path


def read_file(path: Path, name: str, text_key: str = "text") -> Iterator[tuple[str, str]]:
    """The documents of one file. Text is cut into documents at <|endoftext|>.

    Raises UnicodeDecodeError for text that is not UTF-8, ValueError for a bad line or column.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[text_key]
                    # JSON can spell half a surrogate pair, which no encoding of text can.
                    yield f"{name}:{number}", text.encode("utf-8", "replace").decode()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(
                        f"{path} line {number} is not a JSON object with text under "
                        f"{text_key!r}: {line.strip()[:60]!r}; name the key with --text_key=KEY"
                    ) from None
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path} needs pyarrow: run pip install pyarrow") from None
        table = pyarrow.parquet.ParquetFile(path)
        if text_key not in table.schema_arrow.names:
            raise ValueError(
                f"{path} has no column {text_key!r} but {', '.join(table.schema_arrow.names)}; "
                f"name the one with text with --text_key=COLUMN"
            )
        rows = (row for batch in table.iter_batches(columns=[text_key]) for row in batch.column(0))
        for number, row in enumerate(rows):
            yield f"{name}:{number}", row.as_py() or ""
    else:
        text = path.read_text(encoding="utf-8")
        for number, document in enumerate(text.split(END_OF_TEXT)):
            yield (f"{name}:{number}" if number else name), document


def read_python(root: Path, prefix: str = "") -> list[tuple[str, str]]:
    """The Python sources under root, without tests, near-copies and stubs."""
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = prefix + path.relative_to(root).as_posix()
        if NOT_CORPUS & set(Path(name).parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if 200 <= len(text) <= 400_000:
            documents.append((name, text))
    return documents


def read_installed(source: str) -> list[tuple[str, str]]:
    """stdlib: the standard library that runs this script; pysite: with it four large packages."""
    documents = read_python(Path(sysconfig.get_paths()["stdlib"]))
    if source == "pysite":
        for package in ("torch", "numpy", "sympy", "networkx"):
            if spec := importlib.util.find_spec(package):
                documents += read_python(Path(spec.origin).parent, package + "/")
            else:
                say(f"{package} is not installed: left out of pysite")
    documents = list({text: (name, text) for name, text in reversed(documents)}.values())[::-1]
    if (size := sum(len(text) for _, text in documents)) < 3_000_000:
        raise ValueError(
            f"this Python carries only {size:,} characters of source, expected 3,000,000 or more; "
            f"use a file or folder of your own, or one of {', '.join(SOURCES[2:])}"
        )
    return documents


def read_paths(source: str, text_key: str) -> tuple[list[tuple[str, str]], int]:
    """The documents of a file, a folder (recursively, hidden files aside) or a glob; file count."""
    root = Path(source).expanduser()
    if root.is_dir():
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
        paths = [p for p in paths if not any(s[0] == "." for s in p.relative_to(root).parts)]
    else:
        paths = [root] if root.is_file() else []
        paths = paths or [Path(p) for p in sorted(glob.glob(str(root), recursive=True))]
        paths = [path for path in paths if path.is_file()]
        root = root.parent if len(paths) == 1 else Path(os.path.commonpath(paths or ["."]))
    if not paths:
        close = difflib.get_close_matches(source, SOURCES, 1, 0.5)
        raise FileNotFoundError(
            f"no text in {source!r}: expected a file, a folder or a glob of files, or one of "
            f"{', '.join(SOURCES)}" + (f"; did you mean {close[0]}?" if close else "")
        )
    documents, unreadable = [], 0
    for path in tqdm(paths, desc="reading", unit=" files", disable=None, leave=False):
        try:
            documents += read_file(path, path.relative_to(root).as_posix(), text_key)
        except UnicodeDecodeError as error:
            if len(paths) == 1:
                raise ValueError(
                    f"{path} is not UTF-8 text (byte {error.start}); convert it first, "
                    f"for example with iconv -t UTF-8"
                ) from None
            unreadable += 1
    if unreadable:
        say(f"skipped {unreadable} files that are not UTF-8 text")
    return documents, len(paths) - unreadable


# ---- Splitting off the validation text --------------------------------------------------------


def lines_of(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def split_documents(
    documents: list[tuple[str, str]], val_fraction: float
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Whole documents, in the order of the sha256 of their names, up to val_fraction of the bytes.

    A document most of whose lines also stand in others stays in training, as it would measure
    memory; so does one that overshoots the target by a tenth. Where this leaves less than half of
    the target (a single file does), the end of the largest document is cut off at a newline.
    """
    size = {name: len(text.encode()) for name, text in documents}
    target = val_fraction * sum(size.values())
    seen = Counter(hash(line) for _, text in documents for line in set(lines_of(text)))
    held_out, held_bytes = set(), 0
    for name, text in sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        if held_bytes >= target:
            break
        lines = lines_of(text)
        copied = sum(seen[hash(line)] > 1 for line in lines) > len(lines) / 2
        if not copied and held_bytes + size[name] <= 1.1 * target:
            held_out.add(name)
            held_bytes += size[name]
    train = [document for document in documents if document[0] not in held_out]
    val = [document for document in documents if document[0] in held_out]
    if held_bytes < target / 2:
        largest = max(range(len(train)), key=lambda i: size[train[i][0]])
        name, text = train[largest]
        share = min((target - held_bytes) / size[name], 0.5)
        cut = text.rfind("\n", 0, round(len(text) * (1 - share))) + 1 or round(
            len(text) * (1 - share)
        )
        train[largest] = (name, text[:cut])
        val.append((f"{name}:end", text[cut:]))
    return train, val


# ---- The tokenizer ----------------------------------------------------------------------------


def pieces(text: str) -> Iterator[str]:
    """Cut a long text before a letter that begins a line: there every pattern here has a border."""
    line, start = re.compile(r"\n(?=[A-Za-z])"), 0
    while match := line.search(text, start + PIECE):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def count_pretokens(texts: list[str], pattern: str) -> Counter[str]:
    """How often the pattern finds each word; of a corpus over BPE_SAMPLE in every k-th piece."""
    size = sum(map(len, texts))
    step = -(-size // BPE_SAMPLE) or 1
    counts, split = Counter(), regex.compile(pattern)
    with tqdm(
        total=size, unit="B", unit_scale=True, desc="words", disable=None, leave=False
    ) as bar:
        for number, piece in enumerate(piece for text in texts for piece in pieces(text)):
            if number % step == 0:
                counts.update(split.findall(piece))
            bar.update(len(piece))
    return counts


def train_bpe(words: Iterable[str] | Mapping[str, int], vocab_size: int, pattern: str):
    """Byte-level BPE: {bytes: rank} with at most vocab_size ranks, the first 256 single bytes.

    words: texts, or the counts of words already split. Again and again the commonest
    concatenation of two neighbours becomes a token; of equally common ones the smaller in byte
    order. Concatenations are counted, not pairs, since tiktoken joins any two neighbours whose
    concatenation has a rank: so training sees exactly the merges that encoding will make.
    """
    counts = words if isinstance(words, Mapping) else count_pretokens(list(words), pattern)
    ranks = {bytes([byte]): byte for byte in range(256)}
    parts = [[bytes([byte]) for byte in word.encode()] for word in counts]
    frequency = list(counts.values())
    total = Counter()  # occurrences of each concatenation
    where = defaultdict(set)  # words that (may) hold it
    for word, tokens in enumerate(parts):
        for left, right in zip(tokens, tokens[1:]):
            total[left + right] += frequency[word]
            where[left + right].add(word)
    heap = [(-count, token) for token, count in total.items()]
    heapq.heapify(heap)
    bar = tqdm(total=vocab_size, initial=256, desc="merges", disable=None, leave=False)
    with bar:
        while heap and len(ranks) < vocab_size:
            count, token = heapq.heappop(heap)
            if -count != total[token]:  # changed since it was pushed
                if total[token] > 0:
                    heapq.heappush(heap, (-total[token], token))
                continue
            ranks.setdefault(token, len(ranks))
            bar.update()
            grown = set()
            for word in where.pop(token):
                old, new, i = parts[word], [], 0
                while i < len(old):  # join from left to right, as an encoder does
                    if i + 1 < len(old) and old[i] + old[i + 1] == token:
                        new.append(token)
                        i += 2
                    else:
                        new.append(old[i])
                        i += 1
                for left, right in zip(old, old[1:]):
                    total[left + right] -= frequency[word]
                for left, right in zip(new, new[1:]):
                    total[left + right] += frequency[word]
                    if left == token or right == token:
                        where[left + right].add(word)
                        grown.add(left + right)
                parts[word] = new
            for joined in grown:
                heapq.heappush(heap, (-total[joined], joined))
    return ranks


def make_tokenizer(config: DataConfig, texts: list[str]) -> tiktoken.Encoding:
    """The tokenizer that config asks for; a new one is trained on the texts."""
    if config.tokenizer == "":
        ranks = train_bpe(texts, config.vocab_size - 1, PATTERN)
        if len(ranks) + 1 < config.vocab_size:
            say(f"the text has no more than {len(ranks) + 1} tokens: vocab_size is that")
        return encoding_from(ranks, PATTERN, {END_OF_TEXT: len(ranks)}, config.name)
    if config.tokenizer in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            return tiktoken.get_encoding(config.tokenizer)
        except Exception as error:  # whatever the network does to it
            reason = type(error).__name__
            raise OSError(
                f"tiktoken could not download its encoding {config.tokenizer!r} ({reason}); try "
                f"again with a network, or leave out --tokenizer to train one on the text"
            ) from None
    if not Path(config.tokenizer).is_dir():
        raise FileNotFoundError(
            f"no tokenizer {config.tokenizer!r}: expected gpt2, cl100k_base, o200k_base or a "
            f"folder made by prepare_data.py; leave out --tokenizer to train one on the text"
        )
    return load_tokenizer(config.tokenizer)


def encoding_from(
    ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int], name: str = "nanoV3"
) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def save_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> dict[str, Any]:
    """Write tokenizer.tiktoken; returns what meta.json has to say about the tokenizer."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)
    write_file(folder / "tokenizer.tiktoken", content)
    return dict(
        vocab_size=encoding.n_vocab,
        eot=encoding.eot_token,
        pattern=encoding._pat_str,
        special_tokens=encoding._special_tokens,
        tokenizer_sha256=hashlib.sha256(content).hexdigest(),
    )


# ---- Writing ----------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_tokens(
    path: Path, texts: list[str], encoding: tiktoken.Encoding, tokenizer_sha256: str
) -> tuple[int, int]:
    """Encode the texts into a token file; returns (bytes of text, tokens)."""
    magic = 20240520 if encoding.n_vocab <= 1 << 16 else 20240801
    version, dtype = FORMATS[magic]
    n_bytes, n_tokens = sum(len(text.encode()) for text in texts), 0
    todo = [(number == 0, piece) for text in texts for number, piece in enumerate(pieces(text))]
    bar = tqdm(total=len(todo), desc=f"encoding {path.name}", disable=None, leave=False)
    with open(path, "wb") as file, bar:
        file.write(bytes(HEADER_BYTES))  # zeros, which no reader accepts, until all is written
        for start in range(0, len(todo), 128):
            batch = todo[start : start + 128]
            encoded = encoding.encode_ordinary_batch(
                [piece for _, piece in batch], num_threads=os.cpu_count()
            )
            for (first, _), ids in zip(batch, encoded):
                ids = np.array([encoding.eot_token] * first + ids, dtype)
                file.write(ids.tobytes())
                n_tokens += len(ids)
            bar.update(len(batch))
        if n_tokens >= 1 << 31:
            raise ValueError(
                f"{n_tokens:,} tokens do not fit one file (2^31); use a smaller source"
            )
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:5] = magic, version, n_tokens, encoding.n_vocab, encoding.eot_token
        header[5] = np.float32(n_bytes / n_tokens).view(np.int32)
        header[6] = len(texts)
        header[8:16] = np.frombuffer(bytes.fromhex(tokenizer_sha256), "<i4")
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return n_bytes, n_tokens


def prepare_text(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Text into token files and a tokenizer in folder; returns the contents of meta.json."""
    downloads = Path(config.out) / "downloads"
    if config.source in ("stdlib", "pysite"):
        documents = read_installed(config.source)
        files = len(documents)
    elif config.source == "tinystories":
        urls = [f"{HUGGING_FACE}/{STORIES}-{part}.txt" for part in ("train", "valid")]
        paths = [download(url, downloads / url.split("/")[-1]) for url in urls]
        documents, files = [d for path in paths for d in read_file(path, path.name)], 2
    elif config.source == "tinyshakespeare":
        path = download(SHAKESPEARE, downloads / "tinyshakespeare.txt")
        documents, files = list(read_file(path, path.name)), 1
    else:
        documents, files = read_paths(config.source, config.text_key)
    documents = [(name, text) for name, text in documents if text.strip()]
    if not documents:
        raise ValueError(f"{config.source} holds no text; give a file or folder with some")
    if config.source == "tinystories":  # brings its own validation file
        val = [document for document in documents if document[0].startswith(paths[1].name)]
        train = documents[: len(documents) - len(val)]
    else:
        train, val = split_documents(documents, config.val_fraction)
    texts = {"train": [text for _, text in train], "val": [text for _, text in val]}
    corpus = hashlib.sha256()
    for _, text in documents:
        corpus.update(text.encode() + b"\0")
    say(f"{config.source}: {files} files, sha256 {corpus.hexdigest()}")
    encoding = make_tokenizer(config, texts["train"])
    tokenizer = save_tokenizer(encoding, folder)
    sizes = {
        split: write_tokens(
            folder / f"{split}.bin", texts[split], encoding, tokenizer["tokenizer_sha256"]
        )
        for split in texts
    }
    return dict(
        files=files,
        documents={split: len(texts[split]) for split in texts},
        bytes={split: sizes[split][0] for split in sizes},
        tokens={split: sizes[split][1] for split in sizes},
        corpus_sha256=corpus.hexdigest(),
        **tokenizer,
    )


def prepare_shards(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Token files that others have made: fetched, linked into folder, measured for meta.json."""
    address, available = SHARDS[config.source]
    if not 1 <= config.shards <= available:
        raise ValueError(f"shards={config.shards}: {config.source} has 1 to {available} of them")
    encoding = make_tokenizer(dataclasses.replace(config, tokenizer="gpt2"), [])
    lengths = np.zeros(encoding.n_vocab, np.int64)  # bytes of text that each token stands for
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    names = {"val.bin": "val_000000"}
    names |= {f"train_{i:06d}.bin": f"train_{i:06d}" for i in range(1, config.shards + 1)}
    n_bytes, n_tokens, corpus = Counter(), Counter(), hashlib.sha256()
    for name, shard in names.items():
        url = f"{HUGGING_FACE}/{address}_{shard}.bin"
        path = download(url, Path(config.out) / "downloads" / url.split("/")[-1])
        try:
            os.link(path, folder / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, folder / name)
        tokens, _ = read_tokens(folder / name)
        split = name[: name.index("_") if "_" in name else -4]
        n_tokens[split] += len(tokens)
        uses = np.bincount(tokens, minlength=len(lengths))
        n_bytes[split] += int(uses[: len(lengths)] @ lengths)
        corpus.update(tokens)
    sizes = dict(bytes=dict(n_bytes), tokens=dict(n_tokens), corpus_sha256=corpus.hexdigest())
    return dict(files=len(names), **sizes, **save_tokenizer(encoding, folder))


def prepare(config: DataConfig) -> Path:
    """Make the folder <out>/<name> and return its path; it appears complete or not at all.

    Raises FileExistsError if it is there already (without overwrite), ValueError or OSError, each
    with one sentence, for a source or a setting that cannot be used.
    """
    began = time.perf_counter()
    if not 257 <= config.vocab_size < 1 << 24:
        raise ValueError(
            f"vocab_size={config.vocab_size}: expected 257 (bytes and {END_OF_TEXT}) or more"
        )
    if not 0 < config.val_fraction <= 0.5:
        raise ValueError(f"val_fraction={config.val_fraction}: expected more than 0, at most 0.5")
    stem = Path(config.source).expanduser().resolve().name.strip(".").split(".")[0]
    stem = re.sub(r"\W+", "_", stem).strip("_") or Path(config.source).resolve().parent.name
    config = dataclasses.replace(config, name=config.name or stem)
    if not re.fullmatch(r"\w[\w.-]*", config.name) or config.name == "downloads":
        raise ValueError(f"name={config.name!r}: expected a plain folder name; give --name=NAME")
    folder = Path(config.out) / config.name
    if folder.exists():
        foreign = [p.name for p in folder.iterdir() if not re.fullmatch(OURS, p.name)]
        if foreign:
            raise FileExistsError(
                f"{folder} holds {foreign[0]}, not prepared data; give --name=NAME"
            )
        if not config.overwrite:
            raise FileExistsError(f"{folder} exists; add --overwrite to replace it, or --name=NAME")
    temporary = folder.with_name(f".{config.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        make = prepare_shards if config.source in SHARDS else prepare_text
        meta = dict(name=config.name, source=config.source, **make(config, temporary))
        meta["python"] = platform.python_version()
        write_file(temporary / "meta.json", json.dumps(meta, indent=1).encode())
        load_dataset(temporary)  # read back and checked before it gets its name
        if folder.exists():
            os.replace(folder, old := temporary.with_suffix(".old"))
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split in ("train", "val"):
        n_bytes, n_tokens = meta["bytes"][split], meta["tokens"][split]
        say(
            f"{split}: {n_bytes:,} bytes, {n_tokens:,} tokens, {n_bytes / n_tokens:.3f} bytes/token"
        )
    say(f"{folder}: vocabulary {meta['vocab_size']:,}, {time.perf_counter() - began:.1f} s")
    return folder


# ---- Reading prepared data --------------------------------------------------------------------


def read_tokens(path: Path | str) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids of a token file, mapped not read (N,), uint16 or uint32, and what its header says.

    The header as a dict: vocab_size, eot, documents (0 where not given), bytes_per_token (0.0),
    tokenizer_sha256 (64 zeros). Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    again = "make it again with python prepare_data.py SOURCE --overwrite"
    if not path.is_file():
        raise FileNotFoundError(f"no token file {path}; make it with python prepare_data.py SOURCE")
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES)[:HEADER_BYTES], np.uint8)
    words = header[: len(header) // 4 * 4].view("<i4")
    magic = int(words[0]) if len(words) else 0
    if magic not in FORMATS:
        raise ValueError(
            f"{path} begins with {magic}, not with the magic number 20240520 or 20240801 of a token "
            f"file (nanoGPT's .bin files have no header, an unfinished one has zeros); {again}"
        )
    version, dtype = FORMATS[magic]
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path} is cut off in its header ({len(header)} of 1024 bytes); {again}")
    if words[1] != version:
        raise ValueError(f"{path} has version {words[1]}, expected {version}; {again}")
    count = int(words[2])
    found = (path.stat().st_size - HEADER_BYTES) / dtype.itemsize
    if found != count or count < 1:
        kind = "is truncated" if found < count else "is longer than it says"
        raise ValueError(
            f"{path} {kind if count > 0 else 'is empty'}: its header promises {count:,} tokens, "
            f"the file has {found:,.10g}; {again}"
        )
    return np.memmap(path, dtype, "r", HEADER_BYTES, (count,)), dict(
        vocab_size=int(words[3]),
        eot=int(words[4]),
        bytes_per_token=float(words[5:6].view("<f4")[0]),
        documents=int(words[6]),
        tokenizer_sha256=words[8:16].tobytes().hex(),
    )


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The contents of meta.json. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / "meta.json"
    again = "make the folder with python prepare_data.py SOURCE (--overwrite if it is there)"
    if not path.is_file():
        raise FileNotFoundError(f"no prepared data in {folder} (no meta.json); {again}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta["pattern"], meta["special_tokens"], meta["tokenizer_sha256"], meta["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {again}") from None
    return meta


def load_tokenizer(folder: Path | str) -> tiktoken.Encoding:
    """The tokenizer stored in a prepared folder or a run. Raises FileNotFoundError or ValueError."""
    meta, path = read_meta(folder), Path(folder) / "tokenizer.tiktoken"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer {path}; prepare the data again with --overwrite")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != meta["tokenizer_sha256"]:
        raise ValueError(
            f"{path} has sha256 {found[:12]}..., meta.json beside it names "
            f"{meta['tokenizer_sha256'][:12]}...; prepare the data again with --overwrite"
        )
    try:  # not tiktoken.load, which caches by path and would miss a change
        rows = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{path} has a bad line ({error}); prepare the data again") from None
    missing = {bytes([byte]) for byte in range(256)} - set(ranks)
    if missing or sorted(ranks.values()) != list(range(len(rows))):
        raise ValueError(
            f"{path} lacks tokens: expected ranks 0 to {len(rows) - 1} once each and all 256 "
            f"single bytes; prepare the data again with --overwrite"
        )
    return encoding_from(ranks, meta["pattern"], meta["special_tokens"], Path(folder).name)


class Tokens:
    """One split: token files read as if they were one, except that no window spans two."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(N, length) int64: the ids from each of the N starts on, 0 <= start <= len - length.

        A window that would run over the end of its file is moved back to end with it.
        """
        if max(starts) > len(self) - length or min(starts) < 0:
            raise ValueError(
                f"no window of {length} tokens at {max(starts)}: there are {len(self)} tokens"
            )
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts):
            shard = int(np.searchsorted(self.ends, start, side="right"))
            array = self.arrays[shard]
            if len(array) < length:
                raise ValueError(f"a token file has {len(array)} tokens, a window {length}")
            first = int(start) - int(self.ends[shard]) + len(array)
            first = min(first, len(array) - length)
            row[:] = array[first : first + length]
        return rows


@dataclass
class Dataset:
    """A prepared folder, checked. len(dataset.train) is its number of tokens."""

    train: Tokens
    val: Tokens
    meta: dict[str, Any]  # the contents of meta.json
    vocab_size: int
    eot: int
    tokenizer_sha256: str
    val_bytes_per_token: float  # bytes of text per token of val, <|endoftext|> counted as a token

    def windows(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        return {"train": self.train, "val": self.val}[split].windows(starts, length)


def load_dataset(folder: Path | str) -> Dataset:
    """Open data/<name>: train.bin or train_*.bin, val.bin, meta.json.

    Raises FileNotFoundError or ValueError where a file is missing or damaged, was made with
    another tokenizer than the one beside it, or holds ids that the vocabulary does not.
    """
    folder = Path(folder)
    encoding, meta = load_tokenizer(folder), read_meta(folder)
    sha, splits = meta["tokenizer_sha256"], {}
    shards = sorted(folder.glob("train_*.bin")) or [folder / "train.bin"]
    for split, paths in ("train", shards), ("val", [folder / "val.bin"]):
        arrays = []
        for path in paths:
            tokens, header = read_tokens(path)
            if header["tokenizer_sha256"] not in (sha, "0" * 64):
                raise ValueError(
                    f"{path} was made with tokenizer {header['tokenizer_sha256'][:12]}..., the one "
                    f"beside it is {sha[:12]}...; prepare the data again with --overwrite"
                )
            if (highest := int(tokens.max())) >= encoding.n_vocab:
                raise ValueError(
                    f"{path} holds the id {highest}, but the vocabulary ends at "
                    f"{encoding.n_vocab - 1}; prepare the data again with --overwrite"
                )
            arrays.append(tokens)
        splits[split] = Tokens(arrays)
    ratio = header["bytes_per_token"] or meta["bytes"]["val"] / meta["tokens"]["val"]
    return Dataset(
        splits["train"], splits["val"], meta, encoding.n_vocab, encoding.eot_token, sha, ratio
    )


# ---- The command line, shared by all scripts --------------------------------------------------


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), 1)
    hint = f"did you mean {close[0]}?" if close else "--help lists all keys"
    return f"unknown key {name!r}; {hint}"


def kinds_of(annotation: Any) -> list[type]:
    """int | None -> [int, NoneType]; dict[str, int] -> [dict]."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    return [typing.get_origin(kind) or kind for kind in kinds]


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """The value as its field's type; 1e6 is an int, 1 a float. Raises ValueError."""
    kinds = kinds_of(annotation)
    for kind in kinds:  # True is an int to Python, not to us
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer():
        return int(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {
        type(None): "none",
        dict: "a dict such as {'key': 1}",
        list: "a list",
        tuple: "a tuple",
    }
    expected = " or ".join(words.get(kind, kind.__name__) for kind in kinds)
    raise ValueError(f"{name} must be {expected}, not {value!r}; --help shows the defaults")


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """A value from the command line: Python's literals, true, false, none, else text."""
    kinds, word = kinds_of(annotation), text.strip().lower()
    if bool in kinds and word in ("true", "false", "1", "0"):
        return word in ("true", "1")
    if type(None) in kinds and word in ("none", "null"):
        return None
    try:
        value = check_value(name, ast.literal_eval(text.strip()), annotation)
        return text if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return check_value(name, text, annotation)


def parse_args(
    description: str, argv: list[str], *config_classes: type, positional: str = ""
) -> tuple[str | None, dict[str, Any]]:
    """Read [POSITIONAL] [--key=value] with the dataclasses' fields as keys.

    Returns the positional argument (None if absent) and the values given, by field. Prints help,
    made of the fields' defaults and the comments on their lines, and exits with 0, or exits with 2
    and a sentence where a key is unknown or a value is not of its field's type.
    """
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if positional:
        parser.add_argument(positional, nargs="?", metavar=positional.upper())
    fields = {}
    for config_class in config_classes:
        group = parser.add_argument_group(config_class.__name__)
        source, hints = inspect.getsource(config_class), typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            if field.name in fields:
                continue
            fields[field.name] = hints[field.name]
            comment = re.search(rf"(?m)^    {field.name}: .*?  # (.*)$", source)
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            text = f"{comment[1] if comment else ''} (default: {default!r})".strip()
            group.add_argument(
                f"--{field.name}", dest=f"--{field.name}", metavar="", help=text.replace("%", "%%")
            )
    flags = {f"--{name}" for name, annotation in fields.items() if bool in kinds_of(annotation)}
    argv = [word + "=true" if word in flags else word for word in argv]
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            parser.error(unknown_key(word[2:].split("=")[0], fields))
        parser.error(f"unexpected argument {word!r}: keys are written --key=value")
    values = {}
    for key, text in vars(given).items():
        if key.startswith("--"):
            try:
                values[key[2:]] = parse_value(key, text, fields[key[2:]])
            except ValueError as error:
                parser.error(str(error))
    return getattr(given, positional or " ", None), values


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a script's main; refusals become one sentence and exit code 1, bugs keep their trace."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)


def main(argv: list[str]) -> None:
    description = "Turn text into token files and a tokenizer: data/<name>/."
    source, values = parse_args(description, argv, DataConfig, positional="source")
    if source is not None:
        values["source"] = source
    print(prepare(DataConfig(**values)))


if __name__ == "__main__":
    run_command(main)
