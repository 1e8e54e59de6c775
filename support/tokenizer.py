"""Byte-level BPE: our tokenizer, trained on the text, and a release's, read from its files.

A prepared folder or a run has the tokenizer beside its data or weights: tokenizer.tiktoken, a line
per token (base64 of its bytes, rank), or copies of a release's files; and meta.json.
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
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import tiktoken
from tqdm import tqdm

from support.files import lies_in, naming, read_json
from support.settings import Refusal, short

END_OF_TEXT = "<|endoftext|>"
AGAIN = "make it with python prepare_data.py SOURCE (--overwrite if the folder is there)"


def without_panic(encode: Callable) -> Callable:
    """The same function, where a panic of tiktoken's is a Refusal. A panic, such as that of a
    pattern that tries too many ways to split a text, is no Exception."""

    def refusing(texts: list[str]) -> list[list[int]]:
        try:
            return encode(texts)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            told = "the tokenizer's pattern cannot split this text"
            raise Refusal(f"{told} ({short(error, 100)}); take another tokenizer") from None

    return refusing


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

    def __post_init__(self):
        self.encode_batch = without_panic(self.encode_batch)

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
        """The ids begin with bos, if there is one; the text may have it already, as a chat has."""
        (ids,) = self.encode_batch([text])
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
    """{token: rank} of a file like tiktoken's, whose own loader would miss changes: it caches."""
    rows = [line.split() for line in content.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    if len({*ranks.values()}) < len(rows):  # tiktoken would panic
        raise Refusal("a token or a rank occurs twice")
    return ranks


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
    bar = tqdm(desc="tokenizer", total=vocab_size - 256, disable=None, leave=False)
    while heap and heap[0][0] < 0 and len(ranks) < vocab_size:  # at 0 all words are one token
        count, token = heapq.heappop(heap)
        if -count != total[token]:  # it was pushed before other merges took some of it
            heapq.heappush(heap, (-total[token], token))
            continue
        ranks.setdefault(token, len(ranks))
        bar.update(len(ranks) - 256 - bar.n)
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
    bar.close()
    return ranks


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
    encode = functools.partial(encoding.encode_batch, allowed_special="all")
    return replace(tokenizer_of(encoding), encode_batch=encode)


def read_tokenizer_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        parsed = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise Refusal(f"{path.name} is damaged, or unknown ({short(error, 300)})") from None
    parsed.no_truncation()  # a file may ask for either; both would change the ids of a text
    parsed.no_padding()
    special = {i: token.content for i, token in parsed.get_added_tokens_decoder().items()}
    byte_of = {char: byte for byte, char in STAND_INS.items()}
    vocab = {i: x for x, i in parsed.get_vocab(with_added_tokens=False).items() if i not in special}
    try:
        texts = {i: x.translate(byte_of).encode("latin-1") for i, x in vocab.items()}
    except UnicodeEncodeError:  # SentencePiece's kind
        raise Refusal(f"{path.name} is not byte-level, which is not supported") from None

    def encode_batch(batch: list[str]) -> list[list[int]]:
        return [found.ids for found in parsed.encode_batch(batch, add_special_tokens=False)]

    # What the file itself puts before a text: transformers 5 writes add_bos_token nowhere else.
    first, bare = (parsed.encode("a", add_special_tokens=x).ids[:1] for x in (True, False))
    bos = first[0] if first != bare and first[0] in special else None
    return Tokenizer(encode_batch, texts, special, eos=[], bos=bos)


def own_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files of these names in a folder. Raises Refusal for a name that is none of a
    tokenizer's files, and for a link to another folder: what is copied may be given to others."""
    paths = [folder / name for name in names]
    for path, name in zip(paths, names, strict=True):
        if "/" in name or not any(fnmatchcase(name, known) for known in OUR_FILES + RELEASE_FILES):
            raise Refusal(f"{name!r:.100} is no file of a tokenizer")
        if not lies_in(path, folder):
            raise Refusal(f"{path} is a link to {path.resolve()}; put a copy in its place")
    return paths


def read_release(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if any; its config files tell what begins and
    ends texts, by number or by name."""
    told = {}  # a later file has the last word, but null is none
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            told |= {k: value for k, value in read_json(folder / name).items() if value is not None}
    names = [path.name for name in RELEASE_FILES for path in sorted(folder.glob(name))]
    if not names or names[0] not in RELEASE_FILES[:2]:
        return None

    files = own_files(folder, names)
    added = {x["content"]: int(i) for i, x in told.get("added_tokens_decoder", {}).items()}
    tokenizer = read_vocabulary(files[0], added)
    number = {name: i for i, name in tokenizer.special.items()}

    def named(key: str) -> int | None:
        name = told.get(key)  # a text, or an object that has it as "content"
        return number.get(name["content"] if isinstance(name, dict) else name)

    eos = told.get("eos_token_id", [])
    eos = eos if isinstance(eos, list) else [eos]
    if not eos and (end := named("eos_token")) is not None:
        eos = [end]
    bos = tokenizer.bos
    if told.get("add_bos_token"):
        bos = told.get("bos_token_id", named("bos_token"))
    return replace(tokenizer, eos=eos, bos=bos, files=files, rows=told.get("vocab_size", 0))


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, if any. Raises Refusal."""
    try:
        return read_release(folder)
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(f"the tokenizer of {folder} cannot be read ({short(error, 500)})") from None


# ---- The tokenizer of a prepared folder or a run -------------------------------------------------

OUR_FILES = ("tokenizer.tiktoken", "meta.json")


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the vocabulary and meta.json, which stored_tokenizer reads; of a release, all files."""
    if tokenizer.files:
        for path in tokenizer.files:
            with naming(folder / path.name):
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
        with naming(folder / "tokenizer.tiktoken"):
            (folder / "tokenizer.tiktoken").write_bytes(content)
        meta = {
            "pattern": tokenizer.encoding._pat_str,
            "special_tokens": tokenizer.encoding._special_tokens,
            "tokenizer_sha256": hashlib.sha256(content).hexdigest(),
        }
    with naming(folder / "meta.json"):
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def tokenizer_files(folder: Path, meta: dict[str, Any] | None = None) -> list[Path]:
    """The files that are the tokenizer of a prepared folder or a run: vocabulary first, meta.json
    last. Raises Refusal."""
    meta = meta or read_json(folder / "meta.json")
    return own_files(folder, [*meta.get("files", OUR_FILES[:1]), "meta.json"])


def tokenizer_identity(folder: Path) -> dict[str, Any] | None:
    """The entries of meta.json that tell tokenizers apart; None if the folder has no meta.json."""
    if not (folder / "meta.json").exists():
        return None
    meta = read_json(folder / "meta.json")
    return {key: meta.get(key) for key in ("tokenizer_sha256", "pattern", "special_tokens")}


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
            told = {key: meta[key] for key in ("eos", "bos", "rows")}
            return replace(read_vocabulary(files[0], meta["special_tokens"]), files=files, **told)
        ranks = parse_ranks(content)
        return tokenizer_of(encoding_from(ranks, meta["pattern"], meta["special_tokens"]))
    except (OSError, ValueError, KeyError) as error:  # a file is missing, or cut short
        told = f"{folder} has no whole tokenizer ({short(error, 500)}); {AGAIN}"
        ours, theirs = "tokenizer and meta.json", "tokenizer.json or tiktoken.model"
        copy = f"for weights, copy their run's {ours}, or their release's {theirs}"
        raise Refusal(f"{told}; {copy}") from None


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises Refusal if its marks cannot be written."""
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        try:
            return tokenizer_of(tiktoken.get_encoding(name))  # downloaded once
        except Exception as error:  # of the network, say
            raise Refusal(f"the tokenizer {name} cannot be fetched ({short(error)})") from None
    if not Path(name).exists():
        known = "gpt2, cl100k_base, o200k_base, or a folder that has one"
        raise Refusal(f"there is no tokenizer {name}: name {known}")
    prepared = (Path(name) / "meta.json").exists()  # or a run; else a Hugging Face directory
    tokenizer = (None if prepared else hf_tokenizer(Path(name))) or stored_tokenizer(name)
    if not tokenizer.eos:
        where = "eos_token_id in config.json or eos_token in tokenizer_config.json"
        raise Refusal(f"{name} names no end token, which separates documents; give it {where}")
    before, after = tokenizer.marks
    for i in (*before, *after):
        if i not in tokenizer.texts and i not in tokenizer.special:
            wrong = f"{name} has bos_token_id or eos_token_id {i}, which its vocabulary lacks"
            raise Refusal(f"{wrong}; correct it in its config.json or generation_config.json")
    return tokenizer


def check_tokenizer(source: Path, tokenizer: Tokenizer | None, data: Path):
    """Raises Refusal unless the weights in `source` have the tokenizer of the data.

    Of our tokenizers the entries of meta.json are compared. Of a release's tokenizer the tokens are
    compared, and the ids of a sample text (this source file), since transformers may have written
    tokenizer.json anew.
    """
    folder = source if source.is_dir() else source.parent
    identity = tokenizer_identity(folder)
    if identity and identity["pattern"]:
        same = identity == tokenizer_identity(data)
    elif tokenizer:
        other, sample = stored_tokenizer(data), [Path(__file__).read_text(encoding="utf-8")]
        same = (tokenizer.texts, tokenizer.special) == (other.texts, other.special)
        same = same and tokenizer.encode_batch(sample) == other.encode_batch(sample)
    else:  # the directory has none
        same = True
    if not same:
        differ = f"{source} has another tokenizer than {data}"
        raise Refusal(f"{differ}; prepare the data with --tokenizer={folder}.")


# ---- The tokenizer of an export ------------------------------------------------------------------


def tokenizer_json(encoding: tiktoken.Encoding) -> str:
    """The tokenizer in the format of Hugging Face's tokenizers, giving the same ids (but for
    <|endoftext|> in a text, which is the token there, as transformers' users expect).

    tiktoken joins any two neighbours whose concatenation has a rank, lowest rank first; there each
    pair is listed by itself. So every way to split a token in two becomes a merge, in rank order.
    """
    import tokenizers

    ranks = encoding._mergeable_ranks.items()  # the lowest first, as stored_tokenizer has them
    vocab = {token.decode("latin-1").translate(STAND_INS): rank for token, rank in ranks}
    splits = ((text[:i], text[i:]) for text in vocab for i in range(1, len(text)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
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
    """Write what transformers opens: a release's own files, or ours in its format and as they are,
    so that prepare_data.py takes an export, too."""
    if tokenizer.files:
        for path in tokenizer.files:
            shutil.copyfile(path, directory / path.name)
        return
    write_tokenizer(tokenizer, directory)
    names = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2))
    (directory / "tokenizer.json").write_text(tokenizer_json(tokenizer.encoding), encoding="utf-8")
