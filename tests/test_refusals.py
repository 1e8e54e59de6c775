"""What ends a command: one table of (command, exit code, sentence). Nothing is written before.

More commands are more rows. Refusals that need damage or another process are in the tests of
the file that refuses, such as tests/test_runs.py.
"""

import importlib
import io
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from training import SHORT, TINY_FILE

from support.settings import run_command

pytestmark = pytest.mark.usefixtures("workplace")
NEW = f"train.py {TINY_FILE} {' '.join(SHORT)} --out=new"  # a new run
# In a folder that holds a run of one step.
RUN = f"train.py {TINY_FILE} {' '.join(SHORT)} --out=run"
ON = f"{RUN} --steps=2 --resume"
OTHER = "and data/other have different tokenizers; prepare the data with --tokenizer=run."

REFUSALS = [
    # prepare_data.py
    ("prepare_data.py a.txt b.txt", 2, "--key=value, and put a pattern such as '*.txt' in quotes"),
    ("prepare_data.py a.txt --source=b.txt", 2, "source is given twice, a.txt and --source; give"),
    ("prepare_data.py tiny_stories", 1, "a folder, stdlib, tinystories, fineweb, finewebedu"),
    ("prepare_data.py a.txt --name=tiny", 1, "data/tiny exists; choose another name, or give --ov"),
    ("prepare_data.py a.txt --val_fraction=0.6", 1, "val_fraction=0.6: expected above 0"),
    ("prepare_data.py a.txt --val_fraction=0", 1, "val_fraction=0.0: expected above 0"),
    ("prepare_data.py a.txt --tokenizer=gpt-2", 1, "there is no tokenizer gpt-2: name gpt2,"),
    ("prepare_data.py a.txt --tokenizer=release", 1, "or their release's tokenizer.json or tikto"),
    # train.py: what the command says.
    ("train.py", 2, "name a config file, for example: python train.py config/small.py"),
    (f"{NEW} --stepps=1", 2, "unknown key stepps; did you mean steps?"),
    (
        f"{NEW} --seed=12345678901234567890",
        2,
        "seed is '12345678901234567890', expected a number below",
    ),
    (f"{NEW} --optimizer=muon --parallel=fsdp", 1, "muon needs whole matrices"),
    (f"{NEW} --eval_every=0", 1, "eval_every is 0, but must be at least 1."),
    (f"{NEW} --warmup=0.7", 1, "warmup is 0.7, but decay_start is 0.676: raise decay_start to at"),
    (f"{NEW} --min_lr=6e-5", 1, "min_lr is 6e-05, but is a share of lr, not a learning rate as in"),
    (f"{NEW} --n_group=3", 1, "n_routed_experts 8 is not a multiple of n_group 3."),
    (f"""{NEW} --rope_scaling="{{'factor': '4'}}" """, 1, "has '4' for 'factor', expected a num"),
    # What does not fit together.
    (f"{NEW} --grad_accum=3", 1, "the 64 tokens of a step are no multiple of 3 micro-batches"),
    (f"{NEW} --block_size=257", 1, "windows of 257 tokens exceed max_position_embeddings, 256"),
    (f"{NEW} --num_nextn_predict_layers=16", 1, "block_size is 16, but must be at least 17"),
    # Data.
    (
        f"{NEW} --data=nowhere --out=new/a/b",
        1,
        "no data in data/nowhere: name a prepared folder with --data, or make one with python pre",
    ),
    (f"{NEW} --data=finewebedu", 1, "python prepare_data.py finewebedu --shards=1 (0.1B tokens, 0"),
    (f"{NEW} --vocab_size=1024", 1, "for a new network give --vocab_size=512;"),
    (f"{NEW} --block_size=900000 --max_position_embeddings=900000", 1, "do not fit in data/tiny"),
    (f"{NEW} --eval_tokens=1", 1, "first 1 validation tokens of data/tiny hold no text: give"),
    (f"{NEW} --data=other --init_from=run/ckpt.pt", 1, OTHER),
    (f"{RUN} --data=other --eval_only", 1, OTHER),
    (f"{ON} --data=other", 1, OTHER),
    # Folders.
    (f"{NEW} --eval_only --out=", 1, "there is no out/tiny: name a run's folder"),
    (f"{NEW} --out=a.txt", 1, "a.txt is a file: give another --out."),
    (f"{NEW} --out=photos --overwrite", 1, "photos holds files, but no run: give another --out."),
    (f"{NEW} --out=early", 1, "early holds a run: give --overwrite, or another --out."),
    (f"{NEW} --out=early --resume", 1, "early has no ckpt.pt to resume from: wait for its first, "),
    (f"{NEW} --out=gone --resume", 1, "gone has no ckpt.pt to resume from: leave out --resume, or"),
    ("prepare_data.py a.txt --val_fraction=1e-9 --name=new", 1, "a.txt leaves no validation text"),
    (f"{NEW} --out=alone", 1, "alone holds files, but no run: give another --out."),
    (RUN, 1, "run holds a run: give --resume, --overwrite, or another --out."),
    (f"{RUN} --overwrite --init_from=run", 1, "--overwrite would rename run: give another --out."),
    (f"{RUN} --overwrite --init_from=run/ckpt.pt", 1, "--overwrite would rename run/ckpt.pt: give"),
    (f"{NEW} --init_from=run --hidden_size=64", 1, "run cannot get hidden_size 64: embed_tokens.w"),
    # Runs that go on.
    (f"{ON} --overwrite", 1, "--resume continues a run: leave out --init_from and --overwrite."),
    (f"{ON} --hidden_size=64 --kv_lora_rank=3", 1, "cannot get hidden_size 64 and 1 more: embed_t"),
    (f"{ON} --optimizer=muon", 1, "run/ckpt.pt cannot be resumed: it has no state of Muon 1; use"),
    # sample.py
    (
        "sample.py run 'a text'",
        2,
        "write an option as --key=value, a prompt as --prompt='def main('",
    ),
    (f"sample.py {TINY_FILE} --prompt=x", 1, "tiny.py is damaged, or no checkpoint of train.py (F"),
    ("sample.py nowhere --prompt=x", 1, "there is no nowhere: name a run's folder (such as weig"),
    ("sample.py run --prompt=x --num_samples=0", 1, "num_samples is 0"),
    ("sample.py run", 1, "standard input is not UTF-8 text"),
    # huggingface.py
    ("huggingface.py run photos", 1, "photos exists; choose another name, or give --overwrite"),
    ("huggingface.py release new", 1, "release has Hugging Face's layout, but SRC must be a run"),
    # bench.py
    ("bench.py", 2, "[--key=value ...]; see --help"),
    ("bench.py sizs", 2, "unknown command sizs; did you mean sizes?"),
    ("bench.py decode --rounds=0", 1, "rounds is 0, but must be at least 1"),
]


FILES = {
    "photos/me.png": b"",
    "a.txt": b"some lines\n" * 50,
    "early/.lock": b"",
    "early/log.jsonl": b"{}",  # before the first checkpoint
    "alone/log.jsonl": b"",  # a run that has just begun has a .lock, too
    "release/config.json": b"{}",
    "release/model.safetensors": b"",
}


def everything() -> dict[str, bytes]:
    """What is in this folder; of the data, whose folder is a link, the name."""
    files = (path for path in Path().rglob("*") if not path.is_dir() or path.is_symlink())
    return {str(path): b"" if path.is_symlink() else path.read_bytes() for path in files}


@pytest.mark.parametrize(("command", "code", "sentence"), REFUSALS)
def test_a_command_that_cannot_be_followed_ends_with_one_sentence(
    command, code, sentence, shared, capsys, monkeypatch
):
    shutil.copytree(shared("--steps=1"), "run")
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    # The tokens of data/tiny, but the end of a text has another name.
    meta = shutil.copytree("data/tiny", "data/other") + "/meta.json"
    Path(meta).write_text(Path(meta).read_text().replace("<|endoftext|>", "<|end|>"))
    before, argv = everything(), shlex.split(command)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))  # no text
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(importlib.import_module(argv[0].removesuffix(".py")).main)
    out, said = capsys.readouterr()
    assert end.value.code == code and sentence in said.splitlines()[-1] and not out, said
    assert said.count("error:") == 1 or (code == 2 and not said.count("error:"))
    assert "Traceback" not in said and everything() == before
