"""Byte-level BPE: our tokenizer, trained on the text. (A release's: release_tokenizer.py.)

A prepared folder or a run has its tokenizer beside the data or weights: meta.json, and either
tokenizer.tiktoken, with one line per token (base64 of its bytes, rank), or copies of a release's
files.
"""

import base64
import hashlib
import heapq
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import regex
import tiktoken
from tqdm import tqdm

from support.files import read_json
from support.settings import Refusal, short

END_OF_TEXT = "<|endoftext|>"
AGAIN = "make it with python prepare_data.py SOURCE (--overwrite if the folder exists)"


@dataclass(eq=False)  # so that functools.cache takes one
class Tokenizer:
    """Encodes texts, decodes ids, and names the ids that begin and end a text."""

    encode_batch: Callable[[list[str]], list[list[int]]]
    texts: dict[int, bytes]
    special: dict[int, str]  # names of special tokens, which stand for no bytes of a text
    eos: list[int]  # a release may have several
    bos: int | None = None  # the id that begins every text, if any
    encoding: tiktoken.Encoding | None = None  # None for a tokenizer.json
    files: list[Path] = field(default_factory=list)  # a release's, the vocabulary first

    @property
    def n_vocab(self) -> int:
        return 1 + max([*self.texts, *self.special])

    @property
    def marks(self) -> tuple[list[int], list[int]]:
        """The ids before and after every document of a token file."""
        if not self.files:
            return self.eos, []
        return [] if self.bos is None else [self.bos], self.eos[:1]

    def has_tokens_of(self, other: "Tokenizer") -> bool:
        """Compares tokens, not the tokenizers' files, which transformers may have rewritten."""
        return (self.texts, self.special) == (other.texts, other.special)

    def encode(self, text: str) -> list[int]:
        """The ids, with bos in front if the tokenizer has one and the text does not name it."""
        # In pieces: on a million blanks tiktoken would panic.
        ids = [i for piece in self.encode_batch([*cut(text, PIECE)]) for i in piece]
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def to_bytes(self, token: int) -> bytes:
        return self.texts.get(token) or self.special.get(token, "").encode()  # "": padding

    def decode(self, ids: list[int], errors: str = "replace") -> str:
        return b"".join(map(self.to_bytes, ids)).decode(errors=errors)


def encoding_from(
    ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]
) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "nanoV3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def tokenizer_of(encoding: tiktoken.Encoding) -> Tokenizer:
    texts = {i: text for text, i in encoding._mergeable_ranks.items()}
    special = {i: name for name, i in encoding._special_tokens.items()}
    eos = [i for i, name in special.items() if name == END_OF_TEXT]
    return Tokenizer(encoding.encode_ordinary_batch, texts, special, eos, encoding=encoding)


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """{token: rank} in a file like tiktoken's, whose own loader caches and so misses changes."""
    lines = [line.split() for line in content.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if len({*ranks.values()}) < len(lines):  # as in half a download; tiktoken would panic
        raise Refusal("a token or a rank occurs twice")
    return ranks


# ---- Our tokenizer -------------------------------------------------------------------------------

# DeepSeek-V3's tokenizer splits text in three stages: first numbers; then runs of Chinese and
# Japanese; then the remaining text, and those runs again, into words, marks and blanks. PATTERN
# gives the same pieces in one expression, with two differences:
# * The last of several blanks before a number is a piece of its own here, and part of the blanks
#   there. (Changing this would change the tokenizer of the default corpus.)
# * U+3040, U+3097 and U+3098, which are not assigned, may stay with their neighbours here.
# regex, tiktoken and Hugging Face's tokenizers all accept PATTERN. They agree on negated classes,
# but not on unions and differences. So letters and marks are written as everything except control
# characters, numbers, punctuation, symbols and separators.
_CJK = r"\u4e00-\u9fa5\u3040-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"  # of the second stage
_CJK_SIGNS = r"\u309b\u309c\u30a0\u30fb"  # also of the second; the third splits them off as marks
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
        # Blanks. The last of several goes to the next piece, except before the second stage's.
        rf"\s+(?![^\s{_CJK}{_CJK_SIGNS}])|\s+",
        # Anything else, such as control characters: no text may be lost.
        rf"[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}]+(?!{_LETTER})",
    )
)
# In no pattern, ours or a release's, does a piece continue after such a line end.
LINE_END = re.compile(r"\n(?=[^\s/])")
BPE_SAMPLE = 100_000_000  # characters: a new tokenizer is trained on about this many at most
PIECE = 100_000  # characters: longer documents are sampled and encoded piece by piece


def cut(text: str, length: int) -> Iterator[str]:
    """The text in pieces of at most `length` characters, which end at a LINE_END if possible.

    PATTERN then splits the pieces exactly as it splits the whole text.
    """
    start = 0
    while len(text) - start > length:
        line_ends = (found.end() for found in LINE_END.finditer(text, start, start + length))
        end = max(line_ends, default=start + length)
        yield text[start:end]
        start = end
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str) -> dict[bytes, int]:
    """Byte-level BPE: {token: rank}, with at most vocab_size tokens. The first 256 are the bytes.

    Each step turns the most common concatenation of two neighbours into a token; ties go to the
    first in byte order. It counts concatenations, not pairs, because tiktoken joins any two
    neighbours whose concatenation has a rank: training then makes the same merges as encoding.
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
    bar = tqdm(desc="tokenizer", total=vocab_size - 256, disable=None, leave=False)
    while heap and heap[0][0] < 0 and len(ranks) < vocab_size:  # at 0 every word is one token
        count, token = heapq.heappop(heap)
        if -count != total[token]:  # stale: later merges used some of its occurrences
            heapq.heappush(heap, (-total[token], token))
            continue
        ranks.setdefault(token, len(ranks))
        bar.update(len(ranks) - 256 - bar.n)
        grown = set()
        for word in where.pop(token):
            old, new = parts[word], []
            for right in old:  # from left to right, like the encoder
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
    bar.close()
    return ranks


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    k = 1 + sum(map(len, texts)) // BPE_SAMPLE  # of more than that every k-th piece is enough
    pieces = (piece for text in texts for piece in cut(text, PIECE))
    ranks = train_bpe(islice(pieces, 0, None, k), vocab_size - 1, PATTERN)
    return tokenizer_of(encoding_from(ranks, PATTERN, {END_OF_TEXT: len(ranks)}))


# ---- The tokenizer of a prepared folder or a run -------------------------------------------------


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the vocabulary (or all of a release's files) and meta.json, for stored_tokenizer."""
    if tokenizer.files:
        for path in tokenizer.files:
            shutil.copyfile(path, folder / path.name)
        meta = {
            "files": [path.name for path in tokenizer.files],
            "tokenizer_sha256": hashlib.sha256(tokenizer.files[0].read_bytes()).hexdigest(),
            "special_tokens": {name: i for i, name in tokenizer.special.items()},
            "eos": tokenizer.eos,
            "bos": tokenizer.bos,
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


def tokenizer_files(folder: Path, meta: dict[str, Any] | None = None) -> list[Path]:
    """The tokenizer's files in a prepared folder or a run: the vocabulary first, meta.json last."""
    meta = meta or read_json(folder / "meta.json")
    names = [*meta.get("files", ["tokenizer.tiktoken"]), "meta.json"]
    return [folder / Path(name).name for name in names]  # none outside: exports copy them


def stored_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a prepared folder or a run, ours or a release's. Raises Refusal."""
    folder = Path(folder)
    try:
        meta = read_json(folder / "meta.json")
        *files, _ = tokenizer_files(folder, meta)
        content = files[0].read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["tokenizer_sha256"]:
            raise Refusal(f"the sha256 of {files[0].name} is not that in meta.json")
        if "files" in meta:
            from support.release_tokenizer import read_vocabulary

            tokenizer = read_vocabulary(files[0], meta["special_tokens"])
            return replace(tokenizer, files=files, eos=meta["eos"], bos=meta["bos"])
        ranks = parse_ranks(content)
        return tokenizer_of(encoding_from(ranks, meta["pattern"], meta["special_tokens"]))
    except (OSError, ValueError, KeyError) as error:  # a file is missing, or cut short
        raise Refusal(
            f"{folder} has no complete tokenizer ({short(error, 500)}); {AGAIN}; for weights, copy "
            "their run's tokenizer and meta.json, or their release's tokenizer.json or "
            "tiktoken.model"
        ) from None


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises Refusal if it has no end token."""
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            return tokenizer_of(tiktoken.get_encoding(name))  # downloaded once
        except Exception as error:  # such as a network error
            raise Refusal(f"the tokenizer {name} cannot be downloaded ({short(error)})") from None
    if not Path(name).exists():
        raise Refusal(
            f"there is no tokenizer {name}: name gpt2, cl100k_base, o200k_base or a folder that "
            "has one"
        )
    if (Path(name) / "meta.json").exists():  # prepared, or a run
        tokenizer = stored_tokenizer(name)
    else:
        from support.release_tokenizer import hf_tokenizer

        tokenizer = hf_tokenizer(Path(name)) or stored_tokenizer(name)  # which says what is missing
    if not tokenizer.eos:
        raise Refusal(
            f"{name} names no end token to separate documents; give it eos_token_id in config.json "
            "or eos_token in tokenizer_config.json"
        )
    return tokenizer
