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


def expert_visits(trained: run.Trained) -> dict:
    """How often validation tokens of each class visit each expert (layers, classes, E), and what a
    visit tells of the token's class in bits, in each layer and as the mean."""
    net, T, c = trained.net, trained.config.block_size, trained.net.config
    ids = np.asarray(trained.data.val.arrays[0]).astype(np.int64)
    ids = ids[: len(ids) // T * T]
    classes = classes_of(ids, Path(trained.config.out)).reshape(-1, T)
    visits = np.zeros((net.moe_layers - len(net.mtp), len(CLASSES), c.n_routed_experts), int)
    for x, kind in zip(
        np.split(ids.reshape(-1, T), range(16, len(classes), 16)),
        np.split(classes, range(16, len(classes), 16)),
        strict=True,
    ):
        net(torch.from_numpy(x).to(trained.machine.device))  # which notes its routing
        for layer, chosen in enumerate(net.chosen):  # (B, T, K)
            known = kind >= 0
            np.add.at(visits[layer], (kind[known][:, None], chosen.cpu().numpy()[known]), 1)
    bits = [information(table) for table in visits]
    return {"visits": visits.tolist(), "bits": bits, "mean_bits": sum(bits) / max(1, len(bits))}


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
    """How often tokens of each domain visit each expert (layers, domains, E), and what a visit
    tells of the domain in bits, as the mean over the layers."""
    net, T, c = trained.net, trained.config.block_size, trained.net.config
    visits = np.zeros((net.moe_layers - len(net.mtp), len(DOMAINS), c.n_routed_experts), int)
    for domain, ids in enumerate(domain_texts(trained, tokens)):
        rows = torch.from_numpy(ids[: len(ids) // T * T]).view(-1, T)
        for x in rows.split(16):
            net(x.to(trained.machine.device))
            for layer, chosen in enumerate(net.chosen):  # (B, T, K)
                visits[layer, domain] += np.bincount(
                    chosen.flatten().cpu().numpy(), minlength=c.n_routed_experts
                )
    bits = [information(table) for table in visits]
    return {"domain_visits": visits.tolist(), "domain_bits": sum(bits) / max(1, len(bits))}
