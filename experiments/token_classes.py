"""Which experts are visited by each kind of Python token, and by each of three kinds of text."""

import importlib
import itertools
import keyword
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import run
import torch

from support.tokenizer import stored_tokenizer

CLASSES = ["keyword", "name", "number", "string", "comment", "docstring", "operator", "space"]
KINDS = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment"}
KINDS |= {tokenize.OP: "operator"}
DOMAINS = ["source", "English", "tables"]
LINE_BEGINS = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def classes_of_text(text: str) -> list[int]:
    """The class of every character of a Python file. Raises SyntaxError, TokenError."""
    lines = text.splitlines(keepends=True)
    start_of = [0, *itertools.accumulate(map(len, lines))]
    found, first = [CLASSES.index("space")] * len(text), True  # first: of its statement
    for kind, word, begin, end, _ in tokenize.generate_tokens(iter([*lines, ""]).__next__):
        name = KINDS.get(kind, "string" if "STRING" in tokenize.tok_name[kind] else "")
        if kind == tokenize.NAME:
            name = "keyword" if keyword.iskeyword(word) else "name"
        if name:
            name = "docstring" if name == "string" and first else name
            start, end = (start_of[row - 1] + column for row, column in (begin, end))
            found[start:end] = [CLASSES.index(name)] * (end - start)
        if kind not in (tokenize.NL, tokenize.COMMENT):
            first = kind in LINE_BEGINS
    return found


def classes_of(ids: np.ndarray, folder: Path) -> np.ndarray:
    """The class of every token, that of its first character that is no space; -1 in documents that
    are no Python, and for <|endoftext|>."""
    encoding = stored_tokenizer(folder).encoding
    classes, ends = np.full(len(ids), -1), np.flatnonzero(ids == encoding.eot_token)
    for begin, end in zip([0, *(ends + 1)], [*ends, len(ids)], strict=True):
        pieces = encoding.decode_tokens_bytes(ids[begin:end].tolist())
        try:
            text = b"".join(pieces).decode()
            of_char = classes_of_text(text)
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue
        of_byte = np.repeat(of_char, [len(c.encode()) for c in text]) if text else []
        at = 0
        for i, piece in enumerate(pieces, begin):
            blank = len(piece) - len(piece.lstrip())
            classes[i] = of_byte[at + (blank if blank < len(piece) else 0)]
            at += len(piece)
    return classes


def information(visits: np.ndarray) -> float:
    """Mutual information, in bits, of the rows and columns of a table of counts."""
    p = visits / max(1, visits.sum())
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / independent[seen])).sum())


def visits(trained: run.Trained, ids: np.ndarray, kinds: np.ndarray, count: int) -> np.ndarray:
    """How often tokens of each kind visit each expert (layers, count, E). ids and kinds (tokens,);
    kinds are numbers from 0 to count - 1, and tokens of kind -1 are not counted."""
    net, T = trained.net, trained.config.block_size
    found = np.zeros((len(net.gates()) - len(net.mtp), count, net.config.n_routed_experts), int)
    whole = len(ids) // T * T
    windows = (torch.from_numpy(x[:whole]).view(-1, T).split(16) for x in (ids, kinds))
    for x, kind in zip(*windows, strict=True):
        net(x.to(trained.machine.device))  # which notes the chosen experts
        known = kind >= 0
        for table, chosen in zip(found, net.chosen, strict=True):  # (B, T, K)
            np.add.at(table, (kind[known].numpy()[:, None], chosen.cpu()[known].numpy()), 1)
    return found


def expert_visits(trained: run.Trained) -> dict:
    """The visits of validation tokens by class, and the mutual information of class and expert, in
    bits, of each layer and as the mean."""
    T, ids = trained.config.block_size, np.asarray(trained.data.val.arrays[0]).astype(np.int64)
    ids = ids[: len(ids) // T * T]
    found = visits(trained, ids, classes_of(ids, Path(trained.config.out)), len(CLASSES))
    bits = [information(table) for table in found]
    return {"visits": found.tolist(), "bits": bits, "mean_bits": sum(bits) / max(1, len(bits))}


def domain_texts(trained: run.Trained, tokens: int) -> list[np.ndarray]:
    """As many ids of each domain, none of which was trained on: source (the validation text),
    English (Python's reference documentation), tables (its 8-bit character sets, a row for every
    character; a few lines of code stand before each)."""
    encode = stored_tokenizer(trained.folder).encoding.encode_ordinary
    english = importlib.import_module("pydoc_data.topics").topics
    encodings = sorted(Path(sysconfig.get_path("stdlib"), "encodings").glob("cp*.py"))
    sets = [path.read_text(encoding="utf-8").partition("decoding_table")[2] for path in encodings]
    texts = "\n".join(english[name] for name in sorted(english)), "\n".join(sets)
    ids = [np.asarray(trained.data.val.arrays[0]), *map(np.array, map(encode, texts))]
    return [x[:tokens].astype(np.int64) for x in ids]


def visits_by_domain(trained: run.Trained, tokens: int = 1 << 14) -> dict:
    """The visits of tokens by domain, and the mutual information of domain and expert, in bits, as
    the mean of the layers."""
    found = sum(
        visits(trained, ids, np.full(len(ids), domain), len(DOMAINS))
        for domain, ids in enumerate(domain_texts(trained, tokens))
    )
    bits = [information(table) for table in found]
    return {"domain_visits": found.tolist(), "domain_bits": sum(bits) / max(1, len(bits))}
