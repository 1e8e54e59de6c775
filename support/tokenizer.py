"""Byte-level BPE: our tokenizer, trained on the text, and a release's, read from its files.

A prepared folder or a run has its tokenizer beside the data or weights: meta.json, and either
tokenizer.tiktoken, with one line per token (base64 of its bytes, rank), or copies of a release's
files.
"""

import base64
import functools
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


@dataclass
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


# ---- A release's tokenizer -----------------------------------------------------------------------
#
# A released model has a tokenizer.json (DeepSeek-V3's splits text in three stages, which a
# tiktoken.Encoding cannot) or a tiktoken.model (Moonlight, Kimi). Several config files list its
# special tokens. A prepared folder or a run has copies of the tokenizer's files, which an export
# copies again; meta.json has everything else.

# The files of a release's tokenizer, as globs; one of the first two holds the vocabulary.
RELEASE_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json")
RELEASE_FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
RELEASE_FILES += ("tokenization_*.py",)  # copied for transformers, never run here
# Moonlight and Kimi split text by this pattern (&& is intersection), which only their code states.
_PRE, _END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_U = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_L = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KIMI_PATTERN = rf"[\p{{Han}}]+|{_PRE}{_U}*{_L}+{_END}|{_PRE}{_U}+{_L}*{_END}|{_REST}"
# In a tokenizer.json, invisible bytes are written as characters from 256 on, as GPT-2 does.
_HIDDEN = [byte for byte in range(256) if byte == 32 or not chr(byte).isprintable()]
STAND_INS = {byte: 256 + i for i, byte in enumerate(_HIDDEN)}


def read_vocabulary(path: Path, special_tokens: dict[str, int]) -> Tokenizer:
    """The tokenizer in a tiktoken.model, with these special tokens, or in a tokenizer.json, which
    lists its own. As in transformers, a special token's name in a text encodes to the token."""
    if path.name == "tokenizer.json":
        return read_tokenizer_json(path)
    encoding = encoding_from(parse_ranks(path.read_bytes()), KIMI_PATTERN, special_tokens)
    encode = functools.partial(encoding.encode_batch, allowed_special="all")
    return replace(tokenizer_of(encoding), encode_batch=encode)


def read_tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        parsed = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no more specific type
        raise Refusal(f"{path.name} is damaged or unknown ({short(error, 300)})") from None
    parsed.no_truncation()  # a file may enable either; both would change a text's ids
    parsed.no_padding()
    special = {i: token.content for i, token in parsed.get_added_tokens_decoder().items()}
    byte_of = {char: byte for byte, char in STAND_INS.items()}
    vocab = {i: x for x, i in parsed.get_vocab(with_added_tokens=False).items() if i not in special}
    texts = {i: x.translate(byte_of).encode("latin-1") for i, x in vocab.items()}

    def encode_batch(batch: list[str]) -> list[list[int]]:
        return [found.ids for found in parsed.encode_batch(batch, add_special_tokens=False)]

    # The token that the file itself puts before a text: transformers 5 stores add_bos_token so.
    first, bare = (parsed.encode("a", add_special_tokens=x).ids[:1] for x in (True, False))
    bos = first[0] if first != bare and first[0] in special else None
    return Tokenizer(encode_batch, texts, special, eos=[], bos=bos)


def read_release(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if any. The config files give the tokens that
    begin and end a text, by number or by name."""
    config = {}  # a later file overrides an earlier one, except with null
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= {k: x for k, x in read_json(folder / name).items() if x is not None}
    names = [path.name for name in RELEASE_FILES for path in sorted(folder.glob(name))]
    if not names or names[0] not in RELEASE_FILES[:2]:
        return None

    files = [folder / name for name in names]
    added = {x["content"]: int(i) for i, x in config.get("added_tokens_decoder", {}).items()}
    tokenizer = read_vocabulary(files[0], added)
    number = {name: i for i, name in tokenizer.special.items()}

    def named(key: str) -> int | None:
        name = config.get(key)  # a string, or an object with the string as "content"
        return number.get(name["content"] if isinstance(name, dict) else name)

    eos = config.get("eos_token_id", [])
    eos = eos if isinstance(eos, list) else [eos]
    if not eos and (end := named("eos_token")) is not None:
        eos = [end]
    bos = tokenizer.bos
    if config.get("add_bos_token"):
        bos = config.get("bos_token_id", named("bos_token"))
    return replace(tokenizer, eos=eos, bos=bos, files=files)


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if any. Raises Refusal."""
    try:
        return read_release(folder)
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(
            f"the tokenizer of {folder} cannot be read, or is no byte-level BPE "
            f"({short(error, 500)})"
        ) from None


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
    prepared = (Path(name) / "meta.json").exists()  # or a run; else a Hugging Face directory
    tokenizer = (None if prepared else hf_tokenizer(Path(name))) or stored_tokenizer(name)
    if not tokenizer.eos:
        raise Refusal(
            f"{name} names no end token to separate documents; give it eos_token_id in config.json "
            "or eos_token in tokenizer_config.json"
        )
    return tokenizer


# ---- The tokenizer of an export ------------------------------------------------------------------


def ranks_and_merges(encoding: tiktoken.Encoding) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """{token: rank}, with STAND_INS, and the merges that other formats list.

    tiktoken joins any two neighbours whose concatenation has a rank, lowest rank first. So each way
    to split a token in two becomes a merge, in rank order.
    """
    ranks = encoding._mergeable_ranks.items()  # lowest first, as in stored_tokenizer
    ranks = {token.decode("latin-1").translate(STAND_INS): rank for token, rank in ranks}
    splits = ((text[:i], text[i:]) for text in ranks for i in range(1, len(text)))
    return ranks, [(left, right) for left, right in splits if left in ranks and right in ranks]


def tokenizer_json(encoding: tiktoken.Encoding) -> str:
    """The tokenizer in the format of Hugging Face's tokenizers. It gives the same ids, except that
    <|endoftext|> in a text becomes the token, as users of transformers expect."""
    import tokenizers

    vocab, merges = ranks_and_merges(encoding)
    vocab |= encoding._special_tokens
    model = tokenizers.models.BPE(vocab, merges, ignore_merges=True)  # a word may be a token
    steps, made = tokenizers.pre_tokenizers, tokenizers.Tokenizer(model)
    split = steps.Split(tokenizers.Regex(encoding._pat_str), "isolated")
    to_chars = steps.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = steps.Sequence([split, to_chars])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(encoding._special_tokens))
    return made.to_str()


def export_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a release's own files, or our tokenizer in transformers' format and in ours, so that
    prepare_data.py accepts an export, too."""
    if tokenizer.files:
        for path in tokenizer.files:
            shutil.copyfile(path, directory / path.name)
        return
    write_tokenizer(tokenizer, directory)
    names = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2))
    (directory / "tokenizer.json").write_text(tokenizer_json(tokenizer.encoding), encoding="utf-8")
