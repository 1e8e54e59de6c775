"""Turn text into token files: python prepare_data.py [SOURCE] [--key=value].

    text -> documents -> train / validation / test -> byte-level BPE -> data/<name>/
        train.bin, val.bin      token ids after a header of 1024 bytes
        test.bin                whole documents for final results, never for choosing settings
        tokenizer.tiktoken      one line per token: base64 of its bytes, rank
        meta.json               split pattern, special tokens, hash

Every document begins with <|endoftext|>. With --tokenizer=DIR, a released model, the folder has
copies of the release's tokenizer files instead of tokenizer.tiktoken, and every document ends with
the release's own end token. support/tokenizer.py has the tokenizers, support/tokens.py the token
files.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from support import advice
from support.files import new_folder
from support.settings import Refusal, info, parse_args, run_command, short, with_home
from support.tokenizer import END_OF_TEXT, open_tokenizer, train_tokenizer, write_tokenizer
from support.tokens import load_dataset, read_tokens, write_tokens

# GPT-2 tokens in shards of 100M on Hugging Face: repository and number of shards.
SHARDS = {"fineweb": ("kjj0/fineweb10B-gpt2", 103), "finewebedu": ("kjj0/finewebedu10B-gpt2", 99)}
# Folders and files of a Python installation that are tests, generated, or near-copies.
NOT_CORPUS = re.compile(
    r"(^|/)((site|dist)-packages|__pycache__|tests?|idle_test|idlelib|lib2to3|turtledemo|ensurepip"
    r"|encodings|pydoc_data|_sysconfigdata[^/]*)(/|$)"
)
OTHER_KEY = "; is the text under another --text_key=KEY?"


@dataclass
class DataConfig:
    source: str = "stdlib"  # a name, or a file, folder or glob of text, .jsonl[.gz], .parquet
    name: str = ""  # name of the new folder ("": named after the source)
    out: str = "data"  # parent of the new folder
    tokenizer: str = ""  # "": train one; gpt2, cl100k_base, o200k_base; or a folder, run or release
    vocab_size: int = 0  # tokens of a newly trained tokenizer (0: 512 to 4096, by the text's size)
    val_fraction: float = 0.05  # share of the bytes kept for validation (not of downloads)
    test_fraction: float = 0.05  # share of the bytes kept for test.bin (0: none; not of downloads)
    text_key: str = "text"  # key (.jsonl) or column (.parquet) that holds the text
    shards: int = 1  # training shards of fineweb and finewebedu (100M tokens, 200 MB each)
    overwrite: bool = False  # rename an existing folder to NAME.old-1, and so on

    def __post_init__(self):
        self.name = self.name or Path(self.source).resolve().name.strip(".").split(".")[0]
        if not re.fullmatch(r"\w[\w .-]*", self.name):  # no path that leaves `out`
            raise Refusal(f"name={self.name!r}: expected a plain folder name; give --name=NAME")
        if not 0 < self.val_fraction <= 0.5:
            raise Refusal(f"val_fraction={self.val_fraction}: expected above 0, at most 0.5")
        if not 0 <= self.test_fraction <= 0.4:
            raise Refusal(f"test_fraction={self.test_fraction}: expected 0 to 0.4")
        if not self.tokenizer and self.vocab_size and self.vocab_size < 257:
            raise Refusal(f"vocab_size={self.vocab_size}: expected 257 (256 bytes and 1) or more")
        if self.source in SHARDS:
            most = SHARDS[self.source][1]
            if not 1 <= self.shards <= most:
                raise Refusal(f"shards={self.shards}: expected 1 to {most}")
            if self.tokenizer not in ("", "gpt2"):
                raise Refusal(
                    f"{self.source} consists of gpt2's tokens, but tokenizer={self.tokenizer!r}; "
                    "leave --tokenizer out, or give a source of text"
                )


# ---- Text ----------------------------------------------------------------------------------------


def download(repo: str, file: str) -> Path:
    """Downloads a file of a Hugging Face dataset, unless it is in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset")).resolve()
    except Exception as error:  # of the network, the server or the disk
        raise Refusal(f"{file} of {repo} cannot be downloaded ({short(error)})") from None


def as_text(value: object, where: str, text_key: str) -> str | None:
    """The value, which must be text or null."""
    if value is None or isinstance(value, str):
        return value
    raise Refusal(f"{where} has {value!r:.60} as {text_key!r}, expected text or null{OTHER_KEY}")


def parse_record(line: str, where: str, text_key: str) -> str | None:
    """The text of a line of .jsonl."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # int() reads no 5,000 digits
        message = getattr(error, "msg", error)  # str(error) adds a line number, which is always 1
        raise Refusal(f"{where} is not JSON ({message}); correct or delete it") from None
    if not isinstance(record, dict) or text_key not in record:
        message = f"{where} is {line.strip():.100}, expected an object with {text_key!r}"
        raise Refusal(message + OTHER_KEY)
    text = as_text(record[text_key], where, text_key)
    # JSON may contain half of a surrogate pair, UTF-8 may not.
    return text and text.encode("utf-8", "replace").decode()


def read_file(path: Path, text_key: str) -> Iterator[str | None]:
    """The documents of one file; None for a record whose text is null. Plain text is split at
    <|endoftext|>."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        if (columns := file.schema_arrow.names).count(text_key) != 1:
            raise Refusal(
                f"it has columns {columns!r:.100}, expected exactly one {text_key!r}{OTHER_KEY}"
            )
        for batch in file.iter_batches(columns=[text_key]):
            for value in batch.column(text_key).to_pylist():
                yield as_text(value, "a record", text_key)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_record(line, f"line {number}", text_key)
    else:
        with path.open(encoding="utf-8-sig") as file:  # Windows may put a byte order mark first
            start = file.read(2**16)  # a binary file fails here, before it is read whole
            yield from (start + file.read()).split(END_OF_TEXT)


def walk(root: Path) -> Iterator[Path]:
    """The files and folders below a folder, except hidden ones. Links are not followed. Raises
    OSError if a folder cannot be read."""

    def fail(error: OSError):
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder) / name for name in (*folders, *names) if not name.startswith("."))


def find_files(source: str) -> list[Path]:
    """The files of a folder, the files that match a glob, or a single file; each only once, and
    none that is hidden."""
    root = Path(source).expanduser()
    if root.is_file():
        return [root]
    paths = walk(root) if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    found = {}
    for path in sorted(paths):
        if path.is_file():
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_paths(source: str, text_key: str) -> dict[str, str]:
    """{name: text} for the documents of a file, a folder or a glob."""
    paths = find_files(source)
    if not paths:
        names = f"files, a folder, stdlib, tinystories, {', '.join(SHARDS)}"
        raise Refusal(f"no text at {source!r}: expected {names}")
    top = os.path.commonpath([path.parent for path in paths])
    documents = {}
    for path in tqdm(paths, desc="reading", unit=" files", disable=None, leave=False):
        try:
            records = list(read_file(path, text_key))
        except UnicodeDecodeError as error:
            # Unlike a binary file in a folder of texts, these have to be text.
            if {"jsonl", "parquet"} & {*path.name.lower().split(".")}:
                raise Refusal(f"{path} cannot be read: {error}; convert it to UTF-8") from None
            info(f"skipped {path}: not UTF-8 text")
            continue
        except (ValueError, EOFError, OSError, zlib.error) as error:
            if type(error) is ValueError:  # a bug in an edited reader
                raise
            raise Refusal(f"{path} cannot be read: {short(error, 300)}") from None
        texts = [text for text in records if text is not None]
        if nulls := len(records) - len(texts):
            info(f"skipped {nulls} empty records of {path}: their {text_key!r} is null")
        name = path.relative_to(top).as_posix()
        documents |= {f"{name}:{i}": text for i, text in enumerate(texts) if text.strip()}
    return documents


def read_stdlib() -> dict[str, str]:
    """{name: text} for Python's own library, without duplicates and very short or long files."""
    root, names = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        if not NOT_CORPUS.search(name := path.relative_to(root).as_posix()):
            names.setdefault(path.read_text(encoding="utf-8", errors="replace"), name)
    return {name: text for text, name in names.items() if 200 <= len(text) <= 400_000}


# ---- Split ---------------------------------------------------------------------------------------


def split_documents(
    documents: dict[str, str], val_fraction: float, test_fraction: float = 0.0
) -> tuple[list[str], list[str], list[str]]:
    """(training texts, validation texts, test texts), the last two with about these shares of the
    bytes.

    Documents are visited in the order of the sha256 of their names. If most of a document is lines
    that other documents have, too, it stays in training: its loss would measure memorisation.
    Validation takes whole documents up to its target, but none that would exceed the target by more
    than a tenth. If it then has less than half of its target, as with a single file, the end of the
    largest document is cut off at a newline and added.
    The test text takes the next documents, but none larger than a tenth of its target, so that a
    few documents do not decide its loss. With fewer than five documents there is no test text.
    """
    size = {name: len(text.encode()) for name, text in documents.items()}
    val_target = val_fraction * sum(size.values())
    test_target = test_fraction * sum(size.values())
    seen = Counter(line for text in documents.values() for line in set(text.splitlines()))
    train, val, test = dict(documents), {}, {}
    val_bytes = test_bytes = 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        copied = sum(len(line) for line in train[name].splitlines() if seen[line] > 1)
        if copied > len(train[name]) / 2:
            continue
        if val_bytes < val_target and val_bytes + size[name] <= 1.1 * val_target:
            val[name] = train.pop(name)
            val_bytes += size[name]
        elif test_bytes < test_target and size[name] <= 0.1 * test_target:
            test[name] = train.pop(name)
            test_bytes += size[name]
    if len(test) < 5:
        train, test = train | test, {}
    if val_bytes < val_target / 2:
        name = max(train, key=size.__getitem__)
        text, share = train[name], min(0.5, (val_target - val_bytes) / size[name])
        end = len(text) - round(share * len(text))
        end = text.rfind("\n", end // 2, end) + 1 or end  # no newline near: within a line
        train[name], val[name + ":end"] = text[:end], text[end:]
    return list(train.values()), list(val.values()), list(test.values())


# ---- The folder ----------------------------------------------------------------------------------


def read_parts(config: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """The texts for training, validation and test. Raises Refusal if there is too little text."""
    if config.source == "tinystories":  # with a validation file of its own
        files = [f"TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")]
        paths = [download("roneneldan/TinyStories", file) for file in files]
        train, val = (list(read_file(path, config.text_key)) for path in paths)
        test = []
    else:
        stdlib = config.source == "stdlib"
        documents = read_stdlib() if stdlib else read_paths(config.source, config.text_key)
        if (size := sum(map(len, documents.values()))) < 100:
            raise Refusal(f"{config.source} holds {size} characters, expected 100 or more")
        train, val, test = split_documents(documents, config.val_fraction, config.test_fraction)
        if not any(val):
            raise Refusal(
                f"{config.source} leaves no validation text: raise --val_fraction or add text"
            )
    return train, val, test


def make_tokens(config: DataConfig, folder: Path) -> None:
    """Make token files and their tokenizer in the folder."""
    tokenizer = open_tokenizer(config.tokenizer) if config.tokenizer else None
    train, val, test = read_parts(config)
    if not tokenizer:
        tokenizer = train_tokenizer(train, config.vocab_size or advice.fitting_vocabulary(train))
    write_tokenizer(tokenizer, folder)
    write_tokens(folder, "train", train, tokenizer)
    write_tokens(folder, "val", val, tokenizer)
    if test:
        write_tokens(folder, "test", test, tokenizer)


def link_shards(config: DataConfig, folder: Path) -> None:
    """Link downloaded token files into the folder, and write their tokenizer."""
    tokenizer = open_tokenizer("gpt2")
    for number in range(config.shards + 1):
        split, name = ("train", f"train_{number:06d}.bin") if number else ("val", "val.bin")
        path = download(SHARDS[config.source][0], f"{config.source}_{split}_{number:06d}.bin")
        (folder / name).symlink_to(path)
        if read_tokens(path, n_vocab := tokenizer.n_vocab).max() >= n_vocab:
            raise Refusal(f"{path} holds ids beyond gpt2's {n_vocab} tokens; delete it")
    write_tokenizer(tokenizer, folder)


def prepare(config: DataConfig) -> Path:
    """Make the folder <out>/<name>, complete or not at all, and return its path."""
    folder = Path(config.out) / config.name
    with new_folder(folder, config.overwrite) as new:
        make = link_shards if config.source in SHARDS else make_tokens
        make(config, new)
    info(f"{folder} is ready")
    return folder


def main(argv: list[str]) -> None:
    description = "Turn text into token files and a tokenizer in data/<name>/."
    _, values = parse_args(description, argv, DataConfig, positional="source")
    values |= with_home(values, "out", "tokenizer")  # find_files expands the source
    config = DataConfig(**values)
    folder = prepare(config)
    print(folder)
    data = load_dataset(folder)
    info(f"next: {advice.next_command(folder, data, config.tokenizer, config.source)}")


if __name__ == "__main__":
    run_command(main)
