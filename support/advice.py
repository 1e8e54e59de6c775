"""What the commands advise for a text: its vocabulary, and the length of a run (measured in
docs/notes/LOG.md)."""

import math
import runpy
import shlex
from pathlib import Path

from support.settings import info
from support.tokens import FEW_TOKENS, Dataset

# In a trial 4 and 6 epochs of a small text gave about the same validation loss, and 10 a much
# higher one. Up to 4 cost little in Muennighoff et al. (arXiv 2305.16264), too.
FEW_EPOCHS, MANY_EPOCHS = 5, 8


def fitting_vocabulary(texts: list[str]) -> int:
    """How many tokens a tokenizer trained on these texts should have: the power of two nearest to
    5 times the square root of their bytes, 512 at least and 4,096, as config/small.py, at most."""
    size = sum(len(text.encode()) for text in texts)
    return min(4096, max(512, 2 ** round(math.log2(5 * math.sqrt(size)))))


def next_command(folder: Path, data: Dataset, tokenizer: str) -> str:
    """How to train on the folder: the weights of the tokenizer's own folder, or a new network.

    A run reads a text FEW_EPOCHS times at most.
    A model of train.py's goes on as it was trained, at a tenth of its learning rate.
    """
    name = folder.name if folder.parent == Path("data") else str(folder)
    had = runpy.run_path(str(Path(__file__).parent.parent / "config/small.py"))
    home, most, taken = Path(tokenizer), had["steps"], ["batch_size", "block_size"]
    is_run = tokenizer and any((home / file).exists() for file in ("best.pt", "ckpt.pt"))
    if is_run:
        from support.checkpoints import load_checkpoint  # imports torch, which all else can spare

        had |= load_checkpoint(home, whole=False)["train_config"]
        taken += ["optimizer", "adamw_lr", "lr"]
        had["lr"] = f"{had['lr'] / 10:g}"
    steps = max(1, FEW_EPOCHS * len(data.train) // (had["batch_size"] * had["block_size"]))
    words = [f"--data={name}", f"--out=out/{folder.name}", f"--steps={min(steps, most)}"]
    if is_run or (tokenizer and (home / "config.json").exists()):
        words = [f"--init_from={home}", *words, *(f"--{key}={had[key]}" for key in taken)]
    else:
        words = words if steps < most else words[:2]  # the file has this many itself
        ours = data.vocab_size == had["vocab_size"]
        words = ["config/small.py", *words] + [f"--vocab_size={data.vocab_size}"] * (not ours)
    # A few evaluations of much more would read more than the training.
    words += [f"--eval_tokens={FEW_TOKENS}"] * (len(data.val) > 10 * FEW_TOKENS)
    return shlex.join(["python", "train.py", *words])


def tell_epochs(read: int, length: int, steps: int, new: bool) -> None:
    """How often a run of so many steps, which reads so many tokens, reads a text of this length."""
    epochs = read / length
    shown = f"{epochs:.1f}" if epochs >= 1 else f"{epochs:.2g}"
    info(f"text: {length:,} tokens; the run reads {read:,} ({shown} epochs)")
    if epochs > MANY_EPOCHS and new:
        fewer = max(1, round(steps * FEW_EPOCHS / epochs))
        told = f"in more than {MANY_EPOCHS} epochs the model learns its text by heart"
        info(f"{told}; give --steps={fewer} for {FEW_EPOCHS}")
