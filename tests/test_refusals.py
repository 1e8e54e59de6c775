"""What ends a command: one table of (command, exit code, sentence). Nothing is written before.

More commands are more rows. Refusals that need damage or another process: tests/test_runs.py.
"""

import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from training import SHORT, TINY

import sample
import train
from support.settings import run_command

pytestmark = pytest.mark.usefixtures("workplace")
COMMANDS = {"train.py": train.main, "sample.py": sample.main}
NEW = f"train.py {TINY} {' '.join(SHORT)} --out=new"  # a new run
RUN = f"train.py {TINY} {' '.join(SHORT)} --out=run"  # in a folder that holds a run of one step
ON = f"{RUN} --steps=2 --resume"

REFUSALS = [
    # What the command says.
    ("train.py", 2, "name a config file, for example: python train.py config/small.py"),
    ("train.py --out=run", 2, "name a config file"),
    ("train.py --resume", 2, "name a config file"),
    ("train.py --eval_only", 2, "name a config file"),
    ("train.py --init_from=run", 2, "name a config file"),
    ("train.py nowhere.py", 1, "there is no config file nowhere.py"),
    ("train.py empty.py", 1, "has to set hidden_size, num_hidden_layers and"),
    ("train.py sizes.py", 1, "has to set hidden_size, num_hidden_layers and"),
    (f"{NEW} --stepps=1", 2, "unknown key stepps; did you mean steps?"),
    (f"{NEW} --steps=0", 1, "steps is 0, but must be at least 1"),
    (f"{NEW} --batch_start=-1", 1, "batch_start is -1, but must be at least 0"),
    (f"{NEW} --beta2=1", 1, "less than 1"),
    (f"{NEW} --optimizer=muon --parallel=fsdp", 1, "muon needs whole matrices"),
    (f"{NEW} --decay_start=0.9 --decay_end=0.1", 1, "decay_start is 0.9, but decay_end is 0.1"),
    (f"{NEW} --warmup=0.6", 1, "warmup is 0.6, but decay_start is 0.5: raise decay_start to 0.6"),
    (f"{NEW} --decay_end=0.99", 1, "decay_end is 0.99, but final_start is 0.9887"),
    # What does not fit together.
    (f"{NEW} --grad_accum=3", 1, "the 64 tokens of step 0 are no multiple of 3 micro-batches"),
    (f"{NEW} --block_size=257", 1, "windows of 257 tokens exceed max_position_embeddings, 256"),
    (f"{NEW} --block_size=7", 1, "block_size is 7, but must be at least 8"),
    (f"{NEW} --num_nextn_predict_layers=16", 1, "block_size is 16, but must be at least 17"),
    (f"{NEW} --long_block_size=8", 1, "long_block_size is 8, less than the 16 trained before"),
    (f"{NEW} --long_block_size=48 --long_start=0", 1, "micro-batches (processes x grad_accum) of"),
    # Data.
    (f"{NEW} --data=nowhere", 1, "make it with: python prepare_data.py SOURCE --name=nowhere"),
    (f"{NEW} --data=data/no", 1, "no data in data/no; make it with: python prepare_data.py SOURC"),
    (f"{NEW} --data=else/no", 1, "no data in else/no; make it with: python prepare_data.py SOURC"),
    (f"{NEW} --data=nowhere --out=new/a/b", 1, "no data in data/nowhere"),
    (f"{NEW} --vocab_size=511", 1, "vocab_size is 511, but"),
    (f"{NEW} --vocab_size=1024", 1, "set vocab_size to 512, as by --vocab_size;"),
    (f"{NEW} --block_size=900000 --max_position_embeddings=900000", 1, "do not fit in data/tiny"),
    # Folders.
    (f"{NEW} --out=/dev/null/run", 1, "/dev/null/run"),
    (f"{NEW} --resume", 1, "new has no ckpt.pt to go on from: begin without --resume"),
    (f"{NEW} --eval_only --out=", 1, "there is no out/tiny: name a run's folder"),
    (f"{NEW} --init_from=nowhere", 1, "there is no nowhere: name a run's folder"),
    (f"{NEW} --out=file", 1, "file is a file: give another --out"),
    (f"{NEW} --out=data/tiny", 1, "data/tiny holds token files, as a folder of data does"),
    (f"{NEW} --out=data/tiny --overwrite", 1, "data/tiny holds token files"),
    (f"{NEW} --out=photos --overwrite", 1, "photos holds files, but no run: give another --out."),
    (RUN, 1, "run holds a run: give --resume, --overwrite, or another --out."),
    (f"{RUN} --overwrite --data=nowhere", 1, "no data in data/nowhere"),
    (f"{RUN} --overwrite --init_from=run", 1, "run would be put aside: give another --out."),
    (f"{RUN} --overwrite --init_from=run/ckpt.pt", 1, "run/ckpt.pt would be put aside"),
    # Runs that go on.
    (f"{ON} --overwrite", 1, "--resume goes on with a run: leave out --init_from and --overwrite."),
    (f"{ON} --init_from=run", 1, "--resume goes on with a run: leave out"),
    (f"{ON} --hidden_size=64", 1, "run/ckpt.pt cannot get hidden_size 64"),
    (f"{ON} --optimizer=muon", 1, "run/ckpt.pt cannot be resumed: it has no state of Muon 1; use"),
    (f"{ON} --beta1=1", 1, "must be less than 1"),
    (f"{ON} --long_block_size=8", 1, "long_block_size is 8, less than the 16 trained before"),
    (f"{NEW} --init_from=run --moe_intermediate_size=9", 1, "run cannot get moe_intermediate_size"),
    # Texts.
    ("sample.py run --num_samples=100000000", 1, "is 100000000, but must be at most 10000"),
]


def everything() -> dict[str, bytes]:
    """What is in this folder, the data aside."""
    files = (path for path in Path().rglob("*") if path.is_file() and path.parts[0] != "data")
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize(("command", "code", "sentence"), REFUSALS)
def test_a_command_that_cannot_be_followed_ends_with_one_sentence(
    command, code, sentence, shared, capsys
):
    shutil.copytree(shared("--steps=1"), "run")
    Path("photos").mkdir()
    for name in ("file", "photos/me.png", "empty.py"):
        Path(name).touch()
    Path("sizes.py").write_text("hidden_size = 64\n")
    before, (script, *argv) = everything(), command.split()
    capsys.readouterr()
    with mock.patch.object(sys, "argv", [script, *argv]), pytest.raises(SystemExit) as end:
        run_command(COMMANDS[script])
    said = capsys.readouterr().err
    assert end.value.code == code and sentence in said.splitlines()[-1], said
    assert said.count("error:") == (code == 1 or "unknown" in sentence) and "Traceback" not in said
    assert everything() == before
