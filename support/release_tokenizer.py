"""Tokenizers of releases: read from their files, and ours written in their format.

A released model has a tokenizer.json (DeepSeek-V3's splits text in three stages, which a
tiktoken.Encoding cannot) or a tiktoken.model (Moonlight, Kimi). Several config files list its
special tokens. A prepared folder or a run has copies of the tokenizer's files, which an export
copies again; meta.json has everything else.
"""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import tiktoken

from support.files import read_json
from support.settings import Refusal, short
from support.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    encoding_from,
    parse_ranks,
    tokenizer_of,
    write_tokenizer,
)

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
