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

import base64
import difflib
import glob
import gzip
import hashlib
import heapq
import http.client
import importlib.util
import json
import os
import platform
import re
import shutil
import sysconfig
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from config import info, parse_args, run_command

END_OF_TEXT = "<|endoftext|>"
# The three splitting stages of DeepSeek-V3's tokenizer written as one expression: numbers by three
# digits, Chinese and Japanese, a mark with a word, words, marks, line ends, blanks. The last
# alternative takes what no other does (control characters), or text would be lost.
PATTERN = (
    r"\p{N}{1,3}|[\u4e00-\u9fa5\u3040-\u30ff]+|[!-/:-@\[-`{-~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|."
)
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, ids
HEADER_BYTES = 1024
PIECE = 1 << 18  # characters tokenised at a time
BPE_SAMPLE = 100_000_000  # characters that a new tokenizer is trained on, at most

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
HUGGING_FACE = "https://huggingface.co/datasets"
STORIES = "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
SHARDS = {  # GPT-2 tokens in files of 100M: where they lie and how many there are
    "fineweb": ("kjj0/fineweb10B-gpt2/resolve/main/fineweb", 103),
    "finewebedu": ("kjj0/finewebedu10B-gpt2/resolve/main/finewebedu", 99),
}
SOURCES = ["stdlib", "pysite", "tinyshakespeare", "tinystories", *SHARDS]
# Folders and files of an installation that are tests, generated, or near-copies of one another.
NOT_CORPUS = re.compile(
    r"(^|/)((site|dist)-packages|__pycache__|tests?|idle_test|idlelib|lib2to3|turtledemo|ensurepip"
    r"|encodings|pydoc_data|_sysconfigdata[^/]*)(/|$)"
)
OURS = re.compile(r"meta\.json|tokenizer\.tiktoken|(train(_\d+)?|val)\.bin")  # what we may replace
AGAIN = "make it with python prepare_data.py SOURCE (--overwrite if the folder is there)"

Document = tuple[str, str]  # name, text


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


# ---- Reading documents --------------------------------------------------------------------------


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
            with tqdm(initial=have, total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read1(1 << 16):
                    bar.update(file.write(block))
            file.flush()
            os.fsync(file.fileno())
            if total is not None and bar.n != total:
                raise OSError(f"the connection broke after {bar.n:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if have and isinstance(error, urllib.error.HTTPError) and error.code == 416:
            part.unlink()  # nothing lies beyond what we have: not a part of this file
            return download(url, path, timeout)
        raise OSError(
            f"could not download {url} ({error}); run the command again to go on from {part}, "
            f"or put the file at {path} yourself"
        ) from None
    os.replace(part, path)
    return path


def read_file(path: Path, name: str, text_key: str = "text") -> Iterator[Document]:
    """The documents of one file; text is cut into documents at <|endoftext|>.

    Raises UnicodeDecodeError for text that is not UTF-8, ValueError for a bad line or column.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:  # JSON can spell half a surrogate pair, which UTF-8 cannot
                    text = json.loads(line)[text_key].encode("utf-8", "replace").decode()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(
                        f"{path} line {number} is not a JSON object with text under {text_key!r}: "
                        f"{line.strip()[:60]!r}; name the key with --text_key=KEY"
                    ) from None
                yield f"{name}:{number}", text
    elif path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError(f"{path} needs pyarrow: run pip install pyarrow") from None
        table = ParquetFile(path)
        if text_key not in (columns := table.schema_arrow.names):
            raise ValueError(
                f"{path} has no column {text_key!r} but {', '.join(columns)}; "
                f"name the one that holds the text with --text_key=COLUMN"
            )
        rows = (row for batch in table.iter_batches(columns=[text_key]) for row in batch.column(0))
        for number, row in enumerate(rows):
            yield f"{name}:{number}", row.as_py() or ""
    else:
        for number, text in enumerate(path.read_text(encoding="utf-8").split(END_OF_TEXT)):
            yield f"{name}:{number}", text


def read_installed(source: str) -> list[Document]:
    """stdlib: the standard library that runs this script; pysite: with it four large packages."""
    roots = {"": Path(sysconfig.get_paths()["stdlib"])}
    for package in ("torch", "numpy", "sympy", "networkx") if source == "pysite" else ():
        if spec := importlib.util.find_spec(package):
            roots[package + "/"] = Path(spec.origin).parent
        else:
            info(f"{package} is not installed: left out of pysite")
    names = {}  # text: name, so that of equal files the first stays
    for prefix, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            if NOT_CORPUS.search(name := path.relative_to(root).as_posix()):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if 200 <= len(text) <= 400_000:
                names.setdefault(text, prefix + name)
    if (size := sum(map(len, names))) < 3_000_000:
        raise ValueError(
            f"this Python carries {size:,} characters of source, expected 3,000,000 or more; "
            f"use a file or folder of your own, or one of {', '.join(SOURCES[2:])}"
        )
    return [(name, text) for text, name in names.items()]


def read_paths(source: str, text_key: str) -> tuple[list[Document], int]:
    """The documents of a file, a folder (hidden files aside) or a glob; and the number of files."""
    root = Path(source).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if "/." not in f"/{p.relative_to(root).as_posix()}"]
    else:
        found = [root] if root.exists() else map(Path, glob.glob(str(root), recursive=True))
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        close = difflib.get_close_matches(source, SOURCES, 1, 0.5)
        raise FileNotFoundError(
            f"no text at {source!r}: expected a file, a folder or a glob of files, or one of "
            f"{', '.join(SOURCES)}" + (f"; did you mean {close[0]}?" if close else "")
        )
    top = os.path.commonpath([path.parent for path in paths])
    documents, unreadable = [], 0
    for path in tqdm(paths, desc="reading", unit=" files", disable=None, leave=False):
        try:
            documents += list(read_file(path, path.relative_to(top).as_posix(), text_key))
        except UnicodeDecodeError as error:
            if len(paths) == 1:
                where = f"{path} is not UTF-8 text (byte {error.start})"
                raise ValueError(f"{where}; convert it, for example with iconv -t UTF-8") from None
            unreadable += 1
        except EOFError:
            raise ValueError(f"{path} is truncated; fetch or compress it again") from None
    if unreadable:
        info(f"skipped {unreadable} of {len(paths)} files: not UTF-8 text")
    return documents, len(paths) - unreadable


def split_documents(documents: list[Document], fraction: float) -> tuple[list[str], list[str]]:
    """(training texts, validation texts), the latter about `fraction` of the bytes.

    Whole documents go to validation in the order of the sha256 of their names, except those that
    overshoot the target by a tenth and those most of whose text is lines that stand in other
    documents too: they would measure memory. Where that leaves less than half of the target (a
    single file does), the end of the largest document is cut off at a newline.
    """
    size = {name: len(text.encode()) for name, text in documents}
    target, held = fraction * sum(size.values()), 0
    seen = Counter(line for _, text in documents for line in set(text.splitlines()))
    train, val = dict(documents), {}
    for name, text in sorted(documents, key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        if held < target and held + size[name] <= 1.1 * target:
            copied = sum(len(line) for line in text.splitlines() if seen[line] > 1)
            if copied <= len(text) / 2:
                val[name] = train.pop(name)
                held += size[name]
    if held < target / 2:
        name = max(train, key=size.__getitem__)
        text, share = train[name], min(0.5, (target - held) / size[name])
        end = len(text) - round(share * len(text))
        end = text.rfind("\n", 0, end) + 1 or end
        train[name], val[name + ":end"] = text[:end], text[end:]
    return list(train.values()), list(val.values())


# ---- The tokenizer ------------------------------------------------------------------------------


def pieces(text: str) -> Iterator[str]:
    """Cut a long text before a letter that begins a line: there every pattern here has a border."""
    line, start = re.compile(r"\n(?=[A-Za-z])"), 0
    while match := line.search(text, start + PIECE):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def count_words(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each match of the pattern stands in the texts, or in every k-th piece of many."""
    todo = [piece for text in texts for piece in pieces(text)]
    todo = todo[:: 1 + sum(map(len, todo)) // BPE_SAMPLE]
    counts, split = Counter(), regex.compile(pattern)
    for piece in tqdm(todo, desc="words", disable=None, leave=False):
        counts.update(split.findall(piece))
    return counts


def train_bpe(
    words: Iterable[str] | Mapping[str, int], vocab_size: int, pattern: str
) -> dict[bytes, int]:
    """Byte-level BPE: {token: rank}, at most vocab_size of them, the first 256 the single bytes.

    words: texts, or counts of words already split. Again and again the commonest concatenation of
    two neighbours becomes a token, of equally common ones the first in byte order. tiktoken joins
    any two neighbours whose concatenation has a rank, so concatenations are counted here, not
    pairs: training then sees the very merges that encoding makes.
    """
    counts = words if isinstance(words, Mapping) else count_words(words, pattern)
    parts = [[bytes([byte]) for byte in word.encode()] for word in counts]
    frequency = list(counts.values())
    total, where = Counter(), defaultdict(set)  # concatenation: occurrences, words that hold it
    for word, tokens in enumerate(parts):
        for left, right in pairwise(tokens):
            total[left + right] += frequency[word]
            where[left + right].add(word)
    heap = [(-count, token) for token, count in total.items()]
    heapq.heapify(heap)
    ranks = {bytes([byte]): byte for byte in range(256)}
    with tqdm(total=vocab_size, desc="merges", disable=None, leave=False) as bar:
        while heap and len(ranks) < vocab_size:
            count, token = heapq.heappop(heap)
            if -count != total[token]:  # it was pushed before other merges took some of it
                if total[token] > 0:
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
            bar.update(len(ranks) - bar.n)
    return ranks


def encoding_from(
    ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int], name: str = "nanoV3"
) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def make_tokenizer(tokenizer: str, vocab_size: int, texts: list[str]) -> tiktoken.Encoding:
    """A new tokenizer trained on the texts (""), one of tiktoken's, or that of a folder."""
    if tokenizer in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            return tiktoken.get_encoding(tokenizer)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise OSError(
                f"tiktoken could not download its encoding {tokenizer} ({type(error).__name__}); "
                f"try again with a network, or leave out --tokenizer to train one on the text"
            ) from None
    if tokenizer and not Path(tokenizer).is_dir():
        raise FileNotFoundError(
            f"no tokenizer {tokenizer!r}: expected gpt2, cl100k_base, o200k_base or a prepared "
            f"or Hugging Face folder; leave out --tokenizer to train one on the text"
        )
    if tokenizer:
        folder = Path(tokenizer)
        prepared = (folder / "meta.json").exists()
        if prepared:
            return load_tokenizer(folder)
        from huggingface import hf_encoding  # loads torch, which nothing else here needs

        return hf_encoding(folder)
    ranks = train_bpe(texts, vocab_size - 1, PATTERN)
    if len(ranks) + 1 < vocab_size:
        info(f"the text yields only {len(ranks) + 1} tokens: that is the vocabulary")
    return encoding_from(ranks, PATTERN, {END_OF_TEXT: len(ranks)})


# ---- Writing ------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> dict[str, Any]:
    """Write tokenizer.tiktoken; returns what meta.json has to say about the tokenizer."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)
    write_file(folder / "tokenizer.tiktoken", content)
    return {
        "vocab_size": encoding.n_vocab,
        "eot": encoding.eot_token,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
    }


def write_tokens(path: Path, texts: list[str], encoding: tiktoken.Encoding, sha256: str) -> int:
    """Encode the texts into a token file; returns the number of tokens."""
    magic = 20240520 if encoding.n_vocab <= 1 << 16 else 20240801
    version, dtype = FORMATS[magic]
    todo = [(number == 0, piece) for text in texts for number, piece in enumerate(pieces(text))]
    count, threads = 0, os.cpu_count() or 1
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))  # zeros, which no reader accepts, until all is written
        for i in tqdm(range(0, len(todo), 128), desc=path.name, disable=None, leave=False):
            firsts, batch = zip(*todo[i : i + 128], strict=True)
            encoded = encoding.encode_ordinary_batch(list(batch), num_threads=threads)
            for first, ids in zip(firsts, encoded, strict=True):
                ids = np.array([encoding.eot_token] * first + ids, dtype)
                file.write(ids.tobytes())
                count += len(ids)
        if count >= 1 << 31:
            raise ValueError(f"{count:,} tokens exceed a file's 2^31; give a smaller source")
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:5] = magic, version, count, encoding.n_vocab, encoding.eot_token
        n_bytes = sum(len(text.encode()) for text in texts)
        header[5] = np.float32(n_bytes / count).view(np.int32)
        header[6] = len(texts)
        header[8:16] = np.frombuffer(bytes.fromhex(sha256), "<i4")
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return count


def prepare_text(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Make tokenizer and token files in folder; returns the contents of meta.json."""
    downloads, held_out = Path(config.out) / "downloads", []
    if config.source in ("stdlib", "pysite"):
        documents = read_installed(config.source)
        files = len(documents)
    elif config.source == "tinyshakespeare":
        path = download(SHAKESPEARE, downloads / "tinyshakespeare.txt")
        documents, files = read_paths(str(path), "")
    elif config.source == "tinystories":  # brings its own validation file
        urls = [f"{HUGGING_FACE}/{STORIES}-{part}.txt" for part in ("valid", "train")]
        paths = [download(url, downloads / url.split("/")[-1]) for url in urls]
        held_out, documents = (list(read_file(path, path.name)) for path in paths)
        files = 2
    else:
        documents, files = read_paths(config.source, config.text_key)
    documents, held_out = ([d for d in part if d[1].strip()] for part in (documents, held_out))
    if (size := sum(len(text) for _, text in documents)) < 100:
        raise ValueError(f"{config.source} holds {size} characters of text, expected 100 or more")
    if held_out:
        train, val = ([text for _, text in part] for part in (documents, held_out))
    else:
        train, val = split_documents(documents, config.val_fraction)
    corpus = hashlib.sha256()
    for _, text in documents + held_out:
        corpus.update(text.encode() + b"\0")
    info(f"{config.source}: {files:,} files, sha256 {corpus.hexdigest()}")
    encoding = make_tokenizer(config.tokenizer, config.vocab_size, train)
    meta = write_tokenizer(encoding, folder) | {"files": files}
    meta |= {"corpus_sha256": corpus.hexdigest(), "documents": {}, "bytes": {}, "tokens": {}}
    for split, texts in {"train": train, "val": val}.items():
        path = folder / f"{split}.bin"
        meta["tokens"][split] = write_tokens(path, texts, encoding, meta["tokenizer_sha256"])
        meta["bytes"][split] = sum(len(text.encode()) for text in texts)
        meta["documents"][split] = len(texts)
    return meta


def prepare_shards(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Fetch token files that others have made into folder; returns the contents of meta.json."""
    address, available = SHARDS[config.source]
    if not 1 <= config.shards <= available:
        raise ValueError(f"shards={config.shards}: {config.source} has 1 to {available}")
    encoding = make_tokenizer("gpt2", 0, [])
    lengths = np.zeros(1 << 16, np.int64)  # bytes of text that each token stands for
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    n_bytes, n_tokens, corpus = Counter(), Counter(), hashlib.sha256()
    shards = ["val_000000", *(f"train_{i:06d}" for i in range(1, config.shards + 1))]
    for shard in shards:
        url = f"{HUGGING_FACE}/{address}_{shard}.bin"
        path = download(url, Path(config.out) / "downloads" / url.split("/")[-1])
        split = shard.split("_")[0]
        name = folder / ("val.bin" if split == "val" else f"{shard}.bin")
        try:
            os.link(path, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, name)
        tokens, _ = read_tokens(name)
        n_tokens[split] += len(tokens)
        n_bytes[split] += int(np.bincount(tokens, minlength=1 << 16) @ lengths)
        corpus.update(tokens)
    meta = {"files": len(shards), "corpus_sha256": corpus.hexdigest()}
    meta |= {"bytes": dict(n_bytes), "tokens": dict(n_tokens)}
    return meta | write_tokenizer(encoding, folder)


def folder_of(config: DataConfig) -> Path:
    """<out>/<name>, the name being that of the source where none is given. Raises ValueError."""
    path = Path(config.source).expanduser().resolve()
    name = config.name or path.name.strip(".").split(".")[0]
    if not re.fullmatch(r"\w[\w .-]*", name) or name == "downloads":
        raise ValueError(f"name={name!r}: expected a plain folder name; give --name=NAME")
    return Path(config.out) / name


def prepare(config: DataConfig) -> Path:
    """Make the folder <out>/<name> and return its path; it appears complete or not at all.

    Raises ValueError or OSError with one sentence where source, setting or folder do not serve.
    """
    began = time.perf_counter()
    folder = folder_of(config)
    if not 257 <= config.vocab_size < 1 << 24:
        raise ValueError(f"vocab_size={config.vocab_size}: expected 257 (bytes and one) or more")
    if not 0 < config.val_fraction <= 0.5:
        raise ValueError(f"val_fraction={config.val_fraction}: expected more than 0, at most 0.5")
    if folder.exists():
        if foreign := [path for path in folder.iterdir() if not OURS.fullmatch(path.name)]:
            raise FileExistsError(f"{foreign[0]} is not prepared data; give another --name=NAME")
        if not config.overwrite:
            raise FileExistsError(f"{folder} exists; replace it with --overwrite or give --name")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        make = prepare_shards if config.source in SHARDS else prepare_text
        meta = {"name": folder.name, "source": config.source} | make(config, temporary)
        meta["python"] = platform.python_version()
        write_file(temporary / "meta.json", json.dumps(meta, indent=1).encode())
        load_dataset(temporary)  # read back and checked before it gets its name
        old = temporary.with_suffix(".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split, n_tokens in meta["tokens"].items():
        n_bytes = meta["bytes"][split]
        ratio = f"{n_bytes / n_tokens:.3f} bytes/token"
        info(f"{split}: {n_bytes:,} bytes, {n_tokens:,} tokens, {ratio}")
    info(f"{folder}: vocabulary {meta['vocab_size']:,}, {time.perf_counter() - began:.1f} s")
    return folder


# ---- Reading prepared data ----------------------------------------------------------------------


def read_tokens(path: Path | str) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids of a token file, mapped, not read: (N,) uint16 or uint32; and what its header says.

    The header's keys: vocab_size, eot, bytes_per_token, documents, tokenizer_sha256 (hex), all
    zero in files of others. Raises FileNotFoundError or ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no token file {path}; {AGAIN}")
    with open(path, "rb") as file:
        words = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    magic, version, count = map(int, words[:3])
    if magic not in FORMATS:
        raise ValueError(
            f"{path} begins with {magic}, expected the magic number 20240520 or 20240801 of a "
            f"token file (nanoGPT's .bin files have none); {AGAIN}"
        )
    expected, dtype = FORMATS[magic]
    if version != expected:
        raise ValueError(f"{path} has version {version}, expected {expected}; {AGAIN}")
    found = (path.stat().st_size - HEADER_BYTES) / dtype.itemsize
    if found != count or count < 1:
        state = "is truncated" if found < count else "has too many or no tokens"
        raise ValueError(
            f"{path} {state}: its header promises {count:,}, it holds {found:,.10g}; {AGAIN}"
        )
    return np.memmap(path, dtype, "r", HEADER_BYTES, (count,)), {
        "vocab_size": int(words[3]),
        "eot": int(words[4]),
        "bytes_per_token": float(words[5:6].view("<f4")[0]),
        "documents": int(words[6]),
        "tokenizer_sha256": words[8:16].tobytes().hex(),
    }


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The contents of meta.json. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"no prepared data in {folder} (no meta.json); {AGAIN}")
    try:
        meta = json.loads(path.read_bytes())
        missing = {"pattern", "special_tokens", "tokenizer_sha256", "bytes", "tokens"} - set(meta)
    except (ValueError, TypeError):
        raise ValueError(f"{path} is not valid JSON; {AGAIN}") from None
    if missing:
        raise ValueError(f"{path} lacks the key {min(missing)}; {AGAIN}")
    return meta


def load_tokenizer(folder: Path | str) -> tiktoken.Encoding:
    """The tokenizer stored in a prepared folder or a run. Raises FileNotFoundError, ValueError."""
    meta, path = read_meta(folder), Path(folder) / "tokenizer.tiktoken"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer {path}; {AGAIN}")
    content = path.read_bytes()
    sha256, expected = hashlib.sha256(content).hexdigest(), meta["tokenizer_sha256"]
    if sha256 != expected:
        raise ValueError(f"{path} has sha256 {sha256}, meta.json says {expected}; {AGAIN}")
    try:  # parsed here, as tiktoken.load caches by path and would miss a change
        rows = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        raise ValueError(f"{path} has a bad line ({error}); {AGAIN}") from None
    single_bytes = {bytes([byte]) for byte in range(256)}
    if sorted(ranks.values()) != list(range(len(rows))) or not single_bytes <= set(ranks):
        raise ValueError(f"{path} has not all tokens of its {len(rows)} ranks; {AGAIN}")
    return encoding_from(ranks, meta["pattern"], meta["special_tokens"], Path(folder).name)


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
            raise ValueError(
                f"no windows of {length} tokens at {starts.min()} to {starts.max()} in {len(self)} "
                f"tokens (shortest file {shortest}); choose a shorter block or more data"
            )
        rows = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self.ends, starts, side="right")
        for row, start, shard in zip(rows, starts, shards, strict=True):
            array = self.arrays[shard]
            first = min(start - self.ends[shard], -length) + len(array)
            row[:] = array[first : first + length]
        return rows


@dataclass
class Dataset:
    """A prepared folder, checked; len(dataset.train) is its number of tokens."""

    train: Tokens
    val: Tokens
    meta: dict[str, Any]  # the contents of meta.json
    vocab_size: int
    eot: int
    tokenizer_sha256: str
    val_bytes_per_token: float  # bytes of text per token of val, <|endoftext|> being one of them

    def windows(self, split: str, starts: np.ndarray, length: int) -> np.ndarray:
        return {"train": self.train, "val": self.val}[split].windows(starts, length)


def load_dataset(folder: Path | str) -> Dataset:
    """Open data/<name>: train.bin or train_*.bin, val.bin, and the tokenizer.

    Raises FileNotFoundError or ValueError where a file is missing or damaged, was made with
    another tokenizer than the one beside it, or holds ids that the vocabulary does not.
    """
    encoding, meta = load_tokenizer(folder), read_meta(folder)
    sha256, vocab_size, splits = meta["tokenizer_sha256"], encoding.n_vocab, {}
    shards = sorted(Path(folder).glob("train_*.bin")) or [Path(folder) / "train.bin"]
    for split, paths in ("train", shards), ("val", [Path(folder) / "val.bin"]):
        arrays = []
        for path in paths:
            tokens, header = read_tokens(path)
            made_with = header["tokenizer_sha256"]
            if made_with not in (sha256, "0" * 64):
                raise ValueError(
                    f"{path} was made with the tokenizer of sha256 {made_with[:16]}, beside it "
                    f"lies {sha256[:16]}; {AGAIN}"
                )
            if (highest := int(tokens.max())) >= vocab_size:
                raise ValueError(f"{path} holds id {highest} of {vocab_size} tokens; {AGAIN}")
            arrays.append(tokens)
        splits[split] = Tokens(arrays)
    ratio = header["bytes_per_token"] or meta["bytes"]["val"] / meta["tokens"]["val"]
    return Dataset(
        **splits,
        meta=meta,
        vocab_size=vocab_size,
        eot=encoding.eot_token,
        tokenizer_sha256=sha256,
        val_bytes_per_token=ratio,
    )


# ---- The command ----


def main(argv: list[str]) -> None:
    description = "Turn text into token files and a tokenizer in data/<name>/."
    source, values = parse_args(description, argv, DataConfig, positional="source")
    if source is not None:
        values["source"] = source
    print(prepare(DataConfig(**values)))


if __name__ == "__main__":
    run_command(main)
