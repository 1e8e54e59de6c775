"""Turn text into token files: python prepare_data.py [SOURCE] [--key=value].

    text -> documents -> train / validation / test -> byte-level BPE -> data/<name>/
        train.bin, val.bin      token ids behind a header of 1024 bytes
        test.bin                whole documents that no choice is made on, if there are many
        tokenizer.tiktoken      one line per token: base64 of its bytes, rank
        meta.json               split pattern, special tokens, hash

Token files have the layout of llm.c and modded-nanogpt: 256 little-endian int32, of which the
first three are magic number, version and number of tokens, then the ids. Over 2^30 training tokens
are train_000001.bin and so on. Every document begins with <|endoftext|>. With --tokenizer=DIR, a
released model, copies of its tokenizer's files take the place of tokenizer.tiktoken, and every
document ends with the release's own end token.
"""

import base64
import glob
import gzip
import hashlib
import heapq
import json
import os
import re
import shlex
import shutil
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from support.settings import info, parse_args, run_command, with_home

END_OF_TEXT = "<|endoftext|>"
# GPT-2 tokens in shards of 100M on Hugging Face: where they lie and how many there are.
SHARDS = {"fineweb": ("kjj0/fineweb10B-gpt2", 103), "finewebedu": ("kjj0/finewebedu10B-gpt2", 99)}
# Folders and files of an installation that are tests, generated, or near-copies of one another.
NOT_CORPUS = re.compile(
    r"(^|/)((site|dist)-packages|__pycache__|tests?|idle_test|idlelib|lib2to3|turtledemo|ensurepip"
    r"|encodings|pydoc_data|_sysconfigdata[^/]*)(/|$)"
)
OTHER_KEY = "; is the text under another --text_key=KEY?"
AGAIN = "make it with python prepare_data.py SOURCE (--overwrite if the folder is there)"


@dataclass
class DataConfig:
    source: str = "stdlib"  # a name, or a file, folder or glob of text, .jsonl[.gz], .parquet
    name: str = ""  # name of the folder made ("": named after the source)
    out: str = "data"  # the folder that it is made in
    tokenizer: str = ""  # "": train one; gpt2, cl100k_base, o200k_base; or a folder, run or release
    vocab_size: int = 4096  # tokens of a newly trained tokenizer, <|endoftext|> included
    val_fraction: float = 0.05  # share of the bytes that is kept for validation
    test_fraction: float = 0.05  # share of the bytes, in whole documents, for test.bin (0: none)
    text_key: str = "text"  # key (.jsonl) or column (.parquet) that holds the text
    shards: int = 1  # training shards of fineweb and finewebedu (100M tokens, 200 MB each)
    overwrite: bool = False  # replace a folder made before


# ---- Text ----------------------------------------------------------------------------------------


def download(repo: str, file: str) -> Path:
    """A file of a dataset on Hugging Face, fetched once into the cache of huggingface_hub."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, repo_type="dataset")).resolve()


def as_text(value: object, where: str, text_key: str) -> str | None:
    """The value of a record, which must be text or null."""
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{where} has {value!r:.60} as {text_key!r}, expected text or null{OTHER_KEY}")


def parse_record(line: str, where: str, text_key: str) -> str | None:
    """The text of a line of .jsonl."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", error)  # a JSONDecodeError counts lines, but has seen only one
        raise ValueError(f"{where} is no JSON ({why!s:.100}); correct or delete it") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {line.strip():.60}, expected an object with {text_key!r}")
    if text_key not in record:
        raise ValueError(f"{where} has keys {list(record)!r:.100}, not {text_key!r}{OTHER_KEY}")
    text = as_text(record[text_key], where, text_key)
    # JSON can spell half a surrogate pair, which UTF-8 cannot.
    return text and text.encode("utf-8", "replace").decode()


def read_file(path: Path, text_key: str) -> Iterator[str | None]:
    """The documents of one file, None for a record whose text is null.

    Plain text is cut into documents at <|endoftext|>.
    """
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        if text_key not in (columns := file.schema_arrow.names):
            raise ValueError(f"it has columns {columns!r:.100}, not {text_key!r}{OTHER_KEY}")
        for batch in file.iter_batches(columns=[text_key]):
            for value in batch.column(text_key).to_pylist():
                yield as_text(value, "a record", text_key)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_record(line, f"line {number}", text_key)
    else:
        with path.open(encoding="utf-8-sig") as file:  # Windows puts a mark before the text
            start = file.read(2**16)  # a binary file fails here, before all of it is read
            yield from (start + file.read()).split(END_OF_TEXT)


def refuse(error: OSError) -> NoReturn:
    """Names a file or folder that the system does not let us read."""
    raise OSError(f"{error.filename} cannot be read ({error.strerror}); allow it or leave it out")


def walk(root: Path) -> Iterator[Path]:
    """The files of a folder, hidden ones aside; one met twice, through a link, is read once."""
    seen = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(folder).resolve()
        if here in seen:  # a link may even lead to a folder above itself
            folders.clear()
            continue
        seen.add(here)
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def find_files(source: str) -> list[Path]:
    """The files of a folder, those that match a glob, or the one named."""
    root = Path(source).expanduser()
    if root.is_dir():
        paths = walk(root)
    else:
        pattern = glob.escape(str(root)) if root.exists() else str(root)
        paths = map(Path, glob.glob(pattern, recursive=True))
    return sorted(path for path in paths if path.is_file())


def read_paths(source: str, text_key: str) -> dict[str, str]:
    """{name: text}, the documents of a file, a folder or a glob."""
    paths = find_files(source)
    if not paths:
        names = f"files, a folder, stdlib, tinystories, {', '.join(SHARDS)}"
        raise FileNotFoundError(f"no text at {source!r}: expected {names}")
    top = os.path.commonpath([path.parent for path in paths])
    documents = {}
    for path in tqdm(paths, desc="reading", unit=" files", disable=None, leave=False):
        try:
            records = list(read_file(path, text_key))
        except UnicodeDecodeError:
            info(f"skipped {path}: not UTF-8 text")
            continue
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            why = error if type(error) is ValueError else f"{error!r:.200}"
            raise ValueError(f"{path} cannot be read: {why}") from None
        except OSError as error:
            why = error.strerror or error  # pyarrow's has no more than a message
            raise OSError(f"{path} cannot be read ({why}); allow it or leave it out") from None
        texts = [text for text in records if text is not None]
        if nulls := len(records) - len(texts):
            info(f"left out {nulls} empty records of {path}: their {text_key!r} is null")
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


# ---- Split ---------------------------------------------------------------------------------------


def split_documents(
    documents: dict[str, str], val_fraction: float, test_fraction: float = 0.0
) -> tuple[list[str], list[str], list[str]]:
    """(training texts, validation texts, test texts), the last two of about these shares of bytes.

    Documents are taken in the order of the sha256 of their names. Those mostly made of lines that
    other documents have too stay in training: they would measure memorising.
    Validation takes whole documents up to its target, except one that would overshoot it by over a
    tenth. If that is less than half of the target, the end of the largest document is cut off at a
    newline; so it is with a single file.
    The test takes the documents that follow, except those of over a tenth of its target, so that
    its loss is not decided by a few. A source of few documents has no test.
    """
    size = {name: len(text.encode()) for name, text in documents.items()}
    val_target = val_fraction * sum(size.values())
    test_target = test_fraction * sum(size.values())
    seen = Counter(line for text in documents.values() for line in set(text.splitlines()))
    train, val, test = dict(documents), {}, {}
    val_bytes = test_bytes = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        copied = sum(len(line) for line in train[name].splitlines() if seen[line] > 1)
        if copied > len(train[name]) / 2:
            continue
        if val_bytes < val_target and val_bytes + size[name] <= 1.1 * val_target:
            val[name] = train.pop(name)
            val_bytes += size[name]
        elif test_bytes < test_target and size[name] <= 0.1 * test_target:
            test[name] = train.pop(name)
            test_bytes += size[name]
    if val_bytes < val_target / 2:
        name = max(train, key=size.__getitem__)
        text, share = train[name], min(0.5, (val_target - val_bytes) / size[name])
        end = len(text) - round(share * len(text))
        end = text.rfind("\n", end // 2, end) + 1 or end  # none near: in the line
        train[name], val[name + ":end"] = text[:end], text[end:]
    return list(train.values()), list(val.values()), list(test.values())


# ---- Our tokenizer -------------------------------------------------------------------------------

# DeepSeek-V3's tokenizer splits text in three stages: numbers; then runs of Chinese and Japanese;
# then all that is left, and those runs once more, into words, marks and blanks. PATTERN gives the
# same pieces in one expression, except that
# * of several blanks before a number, the last is a piece of its own here, but part of the blanks
#   there (changing it would change the tokenizer of the default corpus);
# * U+3040, U+3097 and U+3098, which are no characters, may stay with their neighbours here.
# regex, tiktoken and Hugging Face's tokenizers all read it. They agree on negated classes, but not
# on unions and differences. So letters and marks are what is no control, number, punctuation,
# symbol or separator.
_CJK = r"\u4e00-\u9fa5\u3040-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"  # of the second stage
_CJK_SIGNS = r"\u309b\u309c\u30a0\u30fb"  # these, too; the third stage cuts them off as marks
_LETTER = rf"[^\p{{C}}\p{{N}}\p{{P}}\p{{S}}\p{{Z}}{_CJK}]"
_SIGN = rf"[^\p{{C}}\p{{L}}\p{{M}}\p{{N}}\p{{Z}}{_CJK_SIGNS}]"
PATTERN = "|".join(
    (
        r"\p{N}{1,3}",  # numbers, by three digits
        rf"[{_CJK}]+|[{_CJK_SIGNS}]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # a sign of ASCII and a word: .join
        rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}]?{_LETTER}+",  # a word, often with the blank before it
        rf" ?{_SIGN}+[\r\n]*",
        r"\s*[\r\n]+",
        # Blanks: the last of several is left to what follows, if that is not of the second stage.
        rf"\s+(?![^\s{_CJK}{_CJK_SIGNS}])|\s+",
        # What no other takes, control characters for one, or text would be lost.
        rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}]+(?!{_LETTER})",
    )
)
# None of the patterns, ours or a release's, has a piece that goes on after such a line end.
LINE_END = re.compile(r"\n(?=[^\s/])")
BPE_SAMPLE = 100_000_000  # characters that a new tokenizer is trained on, at most about
PIECE = 100_000  # characters; longer documents are sampled and encoded piece by piece


def cut(text: str, length: int) -> Iterator[str]:
    """The text in pieces of at most `length` characters, each up to the end of a line if it can.

    The next line begins without a blank, so that PATTERN splits the pieces as it does the whole.
    """
    start = 0
    while len(text) - start > length:
        line_ends = (found.end() for found in LINE_END.finditer(text, start, start + length))
        end = max(line_ends, default=start + length)
        yield text[start:end]
        start = end
    yield text[start:]


def sample_texts(texts: list[str], limit: int) -> list[str]:
    """All texts, or pieces of about `limit` characters together, spread evenly over them."""
    total = sum(map(len, texts))
    if total <= limit:
        return texts
    sample, passed, taken = [], 0, 0  # passed and taken count characters
    for text in texts:
        for piece in cut(text, PIECE):
            if taken * total <= passed * limit:  # what is taken so far is no more than its share
                sample.append(piece)
                taken += len(piece)
            passed += len(piece)
    return sample


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


@dataclass
class Tokenizer:
    """Texts to ids, an id to bytes, and the ids that begin and end a text: ours or a release's."""

    encode_batch: Callable[[list[str]], list[list[int]]]
    texts: dict[int, bytes]
    special: dict[int, str]  # names of the other tokens: marks in a text, which have no bytes of it
    eos: list[int]  # a release may have several
    bos: int | None = None  # where every text begins with it
    encoding: tiktoken.Encoding | None = None  # not of a tokenizer.json
    files: list[Path] = field(default_factory=list)  # of a release, its vocabulary first
    rows: int = 0  # of the release's embedding, where they are known

    @property
    def n_vocab(self) -> int:
        return 1 + max([*self.texts, *self.special])

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """The ids before and after every document of a token file."""
        if not self.files:
            return self.eos, []
        return [] if self.bos is None else [self.bos], self.eos[:1]

    def encode(self, text: str) -> list[int]:
        """The ids begin with bos, if there is one."""
        (ids,) = self.encode_batch([text])
        return ids if self.bos is None else [self.bos, *ids]

    def to_bytes(self, token: int) -> bytes:
        return self.texts.get(token) or self.special.get(token, "").encode()  # "": padding

    def decode(self, ids: list[int], errors: str = "replace") -> str:
        return b"".join(map(self.to_bytes, ids)).decode(errors=errors)


def tokenizer_of(encoding: tiktoken.Encoding) -> Tokenizer:
    texts = {i: text for text, i in encoding._mergeable_ranks.items()}
    special = {i: name for name, i in encoding._special_tokens.items()}
    eos = [i for i, name in special.items() if name == END_OF_TEXT]
    return Tokenizer(encoding.encode_ordinary_batch, texts, special, eos, encoding=encoding)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    ranks = train_bpe(sample_texts(texts, BPE_SAMPLE), vocab_size - 1, PATTERN)
    return tokenizer_of(encoding_from(ranks, PATTERN, {END_OF_TEXT: len(ranks)}))


# ---- A release's tokenizer -----------------------------------------------------------------------
#
# A released model has a tokenizer.json (DeepSeek-V3's splits text in three stages, which no
# tiktoken.Encoding can) or a tiktoken.model (Moonlight, Kimi). What else is to be known of it is
# spread over its config files. A prepared folder or a run has copies of the tokenizer's files, so
# that an export can give them back, and in meta.json all that we need besides the vocabulary.

# The files of its tokenizer, as globs; one of the first two holds the vocabulary.
RELEASE_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json")
RELEASE_FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
RELEASE_FILES += ("tokenization_*.py",)  # transformers may run it, we do not
# How Moonlight and Kimi split text (&& is intersection): their release has it in code, not in data.
_PRE, _END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_U = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_L = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KIMI_PATTERN = rf"[\p{{Han}}]+|{_PRE}{_U}*{_L}+{_END}|{_PRE}{_U}+{_L}*{_END}|{_REST}"
# GPT-2's stand-ins, from 256 on, for the bytes in tokenizer.json that cannot be seen.
_HIDDEN = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
STAND_INS = {byte: 256 + i for i, byte in enumerate(_HIDDEN)}


def read_vocabulary(path: Path, special_tokens: dict[str, int]) -> Tokenizer:
    """The tokenizer in a tiktoken.model, with these special tokens, or in a tokenizer.json, which
    has its own. As in transformers, the name of a special token in a text is that token."""
    if path.name == "tokenizer.json":
        return read_tokenizer_json(path)
    encoding = encoding_from(parse_ranks(path.read_bytes()), KIMI_PATTERN, special_tokens)
    tokenizer = tokenizer_of(encoding)
    tokenizer.encode_batch = lambda texts: encoding.encode_batch(texts, allowed_special="all")
    return tokenizer


def read_tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    parsed = tokenizers.Tokenizer.from_file(str(path))
    parsed.no_truncation()  # a file may ask for either; both would change the ids of a text
    parsed.no_padding()
    special = {i: token.content for i, token in parsed.get_added_tokens_decoder().items()}
    byte_of = {char: byte for byte, char in STAND_INS.items()}
    vocab = {i: x for x, i in parsed.get_vocab(with_added_tokens=False).items() if i not in special}
    texts = {i: x.translate(byte_of).encode("latin-1") for i, x in vocab.items()}

    def encode_batch(batch: list[str]) -> list[list[int]]:
        return [found.ids for found in parsed.encode_batch(batch, add_special_tokens=False)]

    return Tokenizer(encode_batch, texts, special, eos=[])


def read_release(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if any; its config files tell what begins and
    ends texts, by number or by name."""
    told = {}  # a later file has the last word, but null is none
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            stated = json.loads((folder / name).read_bytes())
            told |= {key: value for key, value in stated.items() if value is not None}
    eos, bos = told.get("eos_token_id", []), told.get("bos_token_id")
    eos = eos if isinstance(eos, list) else [eos]
    for i in (*eos, bos):
        if not isinstance(i, int | None):
            raise ValueError(f"eos_token_id or bos_token_id is {i!r:.100}, expected a number")
    files = [path for name in RELEASE_FILES for path in sorted(folder.glob(name))]
    if not files or files[0].name not in RELEASE_FILES[:2]:
        return None

    added = {x["content"]: int(i) for i, x in told.get("added_tokens_decoder", {}).items()}
    tokenizer = read_vocabulary(files[0], added)
    tokenizer.files, tokenizer.rows = files, told.get("vocab_size", 0)
    number = {name: i for i, name in tokenizer.special.items()}

    def named(key: str) -> int | None:
        name = told.get(key)  # a text, or an object that has it as "content"
        return number.get(name["content"] if isinstance(name, dict) else name)

    end = named("eos_token")
    tokenizer.eos = eos or ([] if end is None else [end])
    if told.get("add_bos_token"):
        tokenizer.bos = named("bos_token") if bos is None else bos
    return tokenizer


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if any. Raises ValueError."""
    try:
        return read_release(folder)
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"the tokenizer of {folder} cannot be read ({error!r:.200})") from None


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the vocabulary and meta.json, which stored_tokenizer reads; of a release, all files."""
    if tokenizer.files:
        for path in tokenizer.files:
            shutil.copyfile(path, folder / path.name)
        meta = {
            "files": [path.name for path in tokenizer.files],
            "tokenizer_sha256": hashlib.sha256(tokenizer.files[0].read_bytes()).hexdigest(),
            "special_tokens": {name: i for i, name in tokenizer.special.items()},
            "eos": tokenizer.eos,
            "bos": tokenizer.bos,
            "rows": tokenizer.rows,
        }
    else:
        ranks = sorted(tokenizer.texts.items())
        content = b"".join(b"%s %d\n" % (base64.b64encode(text), rank) for rank, text in ranks)
        (folder / "tokenizer.tiktoken").write_bytes(content)
        meta = {
            "pattern": tokenizer.encoding._pat_str,
            "special_tokens": tokenizer.encoding._special_tokens,
            "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
        }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that are the tokenizer of a prepared folder or a run."""
    names = json.loads((folder / "meta.json").read_bytes()).get("files", ["tokenizer.tiktoken"])
    return [folder / name for name in (*names, "meta.json")]


def stored_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a prepared folder or a run, ours or a release's. Raises ValueError."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        files = [folder / name for name in meta.get("files", ["tokenizer.tiktoken"])]
        content = files[0].read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
            raise ValueError(f"the sha256 of {files[0].name} is not that in meta.json")
        if "files" not in meta:
            ranks = parse_ranks(content)
            return tokenizer_of(encoding_from(ranks, meta["pattern"], meta["special_tokens"]))
        tokenizer = read_vocabulary(files[0], meta["special_tokens"])
        tokenizer.eos, tokenizer.bos = meta["eos"], meta["bos"]
        tokenizer.files, tokenizer.rows = files, meta["rows"]
        return tokenizer
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if not folder.exists() and (old := backup_of(folder)).exists():
            aside = f"{folder} is missing, but a run that was stopped had put it aside"
            raise ValueError(f"{aside}: rename {old} to {folder}") from None
        told = f"{folder} has no whole tokenizer ({error!s:.200}); {AGAIN}"
        raise ValueError(f"{told}; for weights, copy their run's tokenizer and meta.json") from None


def load_tokenizer(folder: Path | str) -> tiktoken.Encoding | None:
    """The tokenizer as a tiktoken.Encoding; None for one in a tokenizer.json. Raises ValueError."""
    return stored_tokenizer(folder).encoding


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises ValueError if its marks cannot be written."""
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        return tokenizer_of(tiktoken.get_encoding(name))  # downloaded once
    prepared = (Path(name) / "meta.json").exists()  # or a run; else a Hugging Face directory
    tokenizer = (None if prepared else hf_tokenizer(Path(name))) or stored_tokenizer(name)
    if not tokenizer.eos:
        where = "eos_token_id in config.json or eos_token in tokenizer_config.json"
        raise ValueError(f"{name} names no end token, which separates documents; give it {where}")
    before, after = tokenizer.marks
    for i in (*before, *after):
        if i not in tokenizer.texts and i not in tokenizer.special:
            wrong = f"{name} has bos_token_id or eos_token_id {i}, which its vocabulary lacks"
            raise ValueError(f"{wrong}; correct it in its config.json or generation_config.json")
    return tokenizer


# ---- Token files ---------------------------------------------------------------------------------

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
    """The ids of the texts between the tokenizer's marks, piece by piece."""
    pieces, total = cut_all(texts, *tokenizer.marks), sum(map(len, texts))
    with tqdm(desc=name, total=total, unit_scale=True, disable=None, leave=False) as progress:
        while batch := list(islice(pieces, 256)):  # which are encoded in parallel
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (before, piece, after), ids in zip(batch, encoded, strict=True):
                yield [*before, *ids, *after]
                progress.update(len(piece))


def write_tokens(folder: Path, split: str, texts: list[str], tokenizer: Tokenizer) -> None:
    """Encode the texts into the token file <split>.bin.

    More than TOKENS_PER_FILE tokens are shared out evenly over <split>_000001.bin and so on. All
    are first written to one file. Then its last part is copied out and cut off, and so on.
    """
    kind = UINT16 if tokenizer.n_vocab <= 1 << 16 else UINT32
    dtype, path, count = DTYPES[kind], folder / f"{split}.bin", 0
    with open(path, "wb+") as file:
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


# ---- The folder ----------------------------------------------------------------------------------
#
# data/<name> must be whole whenever a run is stopped, and a folder cannot be exchanged in one step:
#
#     1. data/<name>~new-xxxxxxxx/<name> is made, complete and on the disk;
#     2. data/<name> becomes data/<name>~replaced-by-prepare_data, if it is there (--overwrite);
#     3. what is new becomes data/<name>;
#     4. the folder of step 2 is deleted.
#
# An exception between 2 and 3 takes 2 back. After a kill the next run looks at data/<name>. If it
# is there, it is whole, because steps 2 and 3 are single renames. If it is not, the folder of step
# 2 is whole and is moved back. No --name can end like these.

# What a prepared folder may hold, and --overwrite may delete.
OUR_FILES = ("meta.json", "tokenizer.tiktoken", "train.bin", "train_[0-9]*.bin", "val.bin")
OUR_FILES += ("test.bin", *RELEASE_FILES)


def backup_of(folder: Path | str) -> Path:
    """Where a folder lies while another one takes its place."""
    return Path(f"{Path(folder)}~replaced-by-prepare_data")


def named_as(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises FileExistsError where the folder is not ours to make or replace."""
    here = sorted(folder.iterdir()) if os.path.lexists(folder) else []
    foreign = [path for path in here if not named_as(path, OUR_FILES)]
    if all(named_as(path, RELEASE_FILES) for path in here):  # a release itself, not our copies
        foreign = here
    if foreign:
        raise FileExistsError(f"{foreign[0]} would be lost; choose another --name")
    if here and not overwrite:
        raise FileExistsError(f"{folder} exists; replace it with --overwrite, or name another")


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if path.is_dir():
        with suppress(OSError):  # Windows opens no folders, some network drives flush none
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    elif not path.is_symlink():  # that is a download, in the care of another program
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def remove_prepared(folder: Path) -> None:
    """Delete our files, then the folder. With other files in it it stays; OSError is raised."""
    with suppress(FileNotFoundError):  # another run may be deleting it, too
        if folder.is_symlink():
            folder.unlink()
            return
        for path in list(folder.iterdir()):
            if named_as(path, OUR_FILES):
                path.unlink(missing_ok=True)
        folder.rmdir()


def move_into_place(new: Path, folder: Path) -> None:
    """Steps 2 to 4 above."""
    old = backup_of(folder)
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException:  # Ctrl-C, too
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    flush(folder.parent)
    remove_prepared(old)


def recover(folder: Path) -> None:
    """Take step 2 back, or do step 4, where a run was stopped after one of them."""
    old = backup_of(folder)
    if not old.exists():
        return
    whole = folder if folder.exists() else old
    try:
        load_dataset(whole)
    except (OSError, ValueError) as error:
        left = f"{old} is left of a run that was stopped"
        raise ValueError(f"{left}, and {whole} is damaged ({error}); move {whole} away") from None
    if whole == folder:
        remove_prepared(old)
        info(f"{folder} is whole; deleted {old}, which it had replaced when a run was stopped")
    else:
        os.replace(old, folder)
        info(f"{folder} is back from {old}: the run that was to replace it was stopped")


def prepare_text(config: DataConfig, folder: Path) -> None:
    """Make token files and their tokenizer in folder."""
    tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.source == "tinystories":  # it brings its own validation file
        files = [f"TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")]
        paths = [download("roneneldan/TinyStories", file) for file in files]
        train, val = (list(read_file(path, config.text_key)) for path in paths)
        test = []
    else:
        stdlib = config.source == "stdlib"
        documents = read_stdlib() if stdlib else read_paths(config.source, config.text_key)
        if (size := sum(map(len, documents.values()))) < 100:
            raise ValueError(f"{config.source} holds {size} characters, expected 100 or more")
        train, val, test = split_documents(documents, config.val_fraction, config.test_fraction)
    for split, texts in ("training", train), ("validation", val):
        if not any(texts):
            has = f"{config.source} has no text for {split}"
            raise ValueError(f"{has} (val_fraction={config.val_fraction}); give more")
    # A token has at least a byte, so this is known before hours are spent on the training text.
    for split, texts, option in ("validation", val, "val"), ("test", test, "test"):
        if (most := sum(len(text.encode()) + 1 for text in texts)) > TOKENS_PER_FILE:
            has = f"{most:,} bytes of {split} text, expected at most {TOKENS_PER_FILE:,}"
            raise ValueError(f"{config.source} has {has}; give a lower --{option}_fraction")
    tokenizer = tokenizer or train_tokenizer(train, config.vocab_size)
    write_tokenizer(tokenizer, folder)
    write_tokens(folder, "train", train, tokenizer)
    write_tokens(folder, "val", val, tokenizer)
    if test:
        write_tokens(folder, "test", test, tokenizer)


def prepare_shards(config: DataConfig, folder: Path) -> None:
    """Link token files that others have made into folder, and write their tokenizer."""
    tokenizer = open_tokenizer("gpt2")
    for number in range(config.shards + 1):
        split, name = ("train", f"train_{number:06d}.bin") if number else ("val", "val.bin")
        path = download(SHARDS[config.source][0], f"{config.source}_{split}_{number:06d}.bin")
        (folder / name).symlink_to(path)
        if read_tokens(path, n_vocab := tokenizer.n_vocab).max() >= n_vocab:
            raise ValueError(f"{path} holds ids beyond gpt2's {n_vocab} tokens; delete it")
    write_tokenizer(tokenizer, folder)


def prepare(config: DataConfig) -> Path:
    """Make the folder <out>/<name> and return its path; it appears complete or not at all."""
    name = config.name or Path(config.source).resolve().name.strip(".").split(".")[0]
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise ValueError(f"name={name!r}: expected a plain folder name; give --name=NAME")
    if not 0 < config.val_fraction <= 0.5:
        raise ValueError(f"val_fraction={config.val_fraction}: expected more than 0, at most 0.5")
    if not 0 <= config.test_fraction <= 0.4:
        raise ValueError(f"test_fraction={config.test_fraction}: expected 0 to 0.4")
    if not config.tokenizer and config.vocab_size < 257:
        raise ValueError(f"vocab_size={config.vocab_size}: expected 257 (256 bytes and 1) or more")
    if config.source in SHARDS:
        most = SHARDS[config.source][1]
        if not 1 <= config.shards <= most:
            raise ValueError(f"shards={config.shards}: expected 1 to {most}, all that there are")
        if config.tokenizer not in ("", "gpt2"):
            given = f"{config.source} is made of gpt2's tokens, but tokenizer={config.tokenizer!r}"
            raise ValueError(f"{given}; leave --tokenizer out, or give a source of text")
    folder = Path(config.out) / name
    recover(folder)
    for left in sorted(folder.parent.glob(f"{name}~new-*")):
        info(f"{left} is from a run that was stopped, unless one makes {folder} now: delete it")
    check_free(folder, config.overwrite)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}~new-") as scratch:
        new = Path(scratch) / name
        new.mkdir()
        make = prepare_shards if config.source in SHARDS else prepare_text
        make(config, new)
        load_dataset(new)  # checked by reading; Windows moves no folder whose files stay mapped
        for path in (*new.iterdir(), new):
            flush(path)
        check_free(folder, config.overwrite)  # again: another program may have made it meanwhile
        move_into_place(new, folder)
    data = load_dataset(folder)
    info(f"{folder} is ready, with a vocabulary of {data.vocab_size:,} tokens")
    return folder


# ---- Reading -------------------------------------------------------------------------------------


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
            begin_of_file = self.ends[shard] - len(array)
            first = min(start - begin_of_file, len(array) - length)
            row[:] = array[first : first + length]
        return rows


@dataclass
class Dataset:
    """A prepared folder; len(dataset.train) is its number of tokens."""

    train: Tokens
    val: Tokens
    vocab_size: int
    val_bytes_per_token: float  # <|endoftext|> is one of the tokens and has no bytes
    test: Tokens | None = None  # for the last word alone: experiments/unseen.py
    rows: int = 0  # of the embedding in the release whose tokenizer this is (0: not known)


def load_dataset(folder: Path | str) -> Dataset:
    """Raises FileNotFoundError or ValueError where a file of the folder is missing or damaged."""
    folder, tokenizer = Path(folder), stored_tokenizer(folder)
    n_vocab = tokenizer.n_vocab
    shards = sorted(folder.glob("train_*.bin")) or [folder / "train.bin"]
    train = Tokens([read_tokens(path, n_vocab) for path in shards])
    val = read_tokens(folder / "val.bin", n_vocab)
    counts = np.bincount(val, minlength=n_vocab)
    n_bytes = sum(len(text) * int(counts[i]) for i, text in tokenizer.texts.items())
    if len(val) < 2 or n_bytes == 0:  # a loss needs a token to predict, bits per byte a byte
        has = f"{folder / 'val.bin'} has {len(val)} tokens with {n_bytes} bytes of text"
        raise ValueError(f"{has}, too little to measure a loss; {AGAIN}")
    test = folder / "test.bin"
    test = Tokens([read_tokens(test, n_vocab)]) if test.exists() else None
    return Dataset(train, Tokens([val]), n_vocab, n_bytes / len(val), test, tokenizer.rows)


def next_command(config: DataConfig, folder: Path, vocab_size: int) -> str:
    """How to train on the folder: the weights of the tokenizer's own folder, or a new network."""
    data = folder.name if folder.parent == Path("data") else str(folder)
    words = [f"--data={data}", f"--out=out/{folder.name}"]
    weights = ("best.pt", "ckpt.pt", "config.json")
    if any((Path(config.tokenizer or "data") / name).exists() for name in weights):
        words = [f"--init_from={config.tokenizer}", *words]
    else:
        words = ["config/small.py", *words] + [f"--vocab_size={vocab_size}"] * (vocab_size != 4096)
    return shlex.join(["python", "train.py", *words])


def main(argv: list[str]) -> None:
    description = "Turn text into token files and a tokenizer in data/<name>/."
    source, values = parse_args(description, argv, DataConfig, positional="source")
    if source and "source" in values:
        raise ValueError(f"two sources: {source} and --source={values['source']}; give one")
    values |= with_home(values, "out", "tokenizer")  # find_files does so for the source
    config = DataConfig(**values | ({"source": source} if source else {}))
    folder = prepare(config)
    print(folder)
    command = next_command(config, folder, load_dataset(folder).vocab_size)
    info(f"next: {command}")
    if "--init_from" in command:
        info('docs/TUTORIAL.md, "Fine-tune", tells which --steps and --lr fit')


if __name__ == "__main__":
    run_command(main)
