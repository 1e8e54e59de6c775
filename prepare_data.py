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

import glob
import gzip
import hashlib
import json
import os
import re
import shlex
import sysconfig
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from support.settings import info, parse_args, run_command, with_home
from support.tokenizer import (
    END_OF_TEXT,
    RELEASE_FILES,
    backup_of,
    open_tokenizer,
    train_tokenizer,
    write_tokenizer,
)
from support.tokens import TOKENS_PER_FILE, load_dataset, read_tokens, write_tokens

# GPT-2 tokens in shards of 100M on Hugging Face: where they lie and how many there are.
SHARDS = {"fineweb": ("kjj0/fineweb10B-gpt2", 103), "finewebedu": ("kjj0/finewebedu10B-gpt2", 99)}
# Folders and files of an installation that are tests, generated, or near-copies of one another.
NOT_CORPUS = re.compile(
    r"(^|/)((site|dist)-packages|__pycache__|tests?|idle_test|idlelib|lib2to3|turtledemo|ensurepip"
    r"|encodings|pydoc_data|_sysconfigdata[^/]*)(/|$)"
)
OTHER_KEY = "; is the text under another --text_key=KEY?"


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
