"""What the commands advise for a text: its tokenizer, and the length of a run (measured in
docs/notes/LOG.md)."""

import math
import runpy
import shlex
from pathlib import Path

from support.plot import column, read_log
from support.settings import info
from support.tokenizer import Tokenizer, sample_texts, train_tokenizer
from support.tokens import FEW_TOKENS, Dataset

# In a trial 4 and 6 epochs of a small text gave about the same validation loss, and 10 a much
# higher one. Up to 4 cost little in Muennighoff et al. (arXiv 2305.16264), too.
FEW_EPOCHS, MANY_EPOCHS = 5, 8
BY_HEART = 1.5  # validation loss over training loss; config/small.py ends with 1.28


def fitting_vocabulary(texts: list[str]) -> int:
    """How many tokens a tokenizer trained on these texts should have: the power of two nearest to
    5 times the square root of their bytes, 512 at least and 4,096, as config/small.py, at most."""
    size = sum(len(text.encode()) for text in texts)
    return min(4096, max(512, 2 ** round(math.log2(5 * math.sqrt(size)))))


def tell_if_unfit(tokenizer: Tokenizer, name: str, texts: list[str]) -> None:
    """Says where a given tokenizer makes twice the tokens of one that is trained on the text."""
    sample = sample_texts(texts, 100_000)
    own = train_tokenizer(sample, fitting_vocabulary(sample))
    given, fitting = (sum(map(len, x.encode_batch(sample))) for x in (tokenizer, own))
    if given > 2 * fitting:
        told = f"{name} cuts this text into {given / fitting:.1f} times the tokens"
        info(f"{told} of a tokenizer trained on it: leave out --tokenizer for a new network")


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
    info(f"text: {length:,} tokens; the run reads {read:,}, which makes {shown} epochs")
    if epochs > MANY_EPOCHS and new:
        fewer = max(1, round(steps * FEW_EPOCHS / epochs))
        told = f"in more than {MANY_EPOCHS} epochs the model learns its text by heart"
        info(f"{told}; give --steps={fewer} for {FEW_EPOCHS}")


def tell_if_evaluations_read_more(measured: int, read: int) -> None:
    """Says where all evaluations together read more tokens than the training."""
    if measured > max(read, 10**7):  # fewer take no time worth a line
        told = f"the evaluations read {measured:,} tokens, more than the training"
        info(f"{told}; give --eval_tokens={FEW_TOKENS}, or a larger --eval_every")


def tell_if_by_heart(run: str) -> None:
    """Says where the validation loss of a run ends far above its training loss."""
    (_, seen), (_, unseen) = (column(read_log(run), key) for key in ("loss", "val_loss"))
    if seen.size and unseen.size and unseen[-1] > BY_HEART * seen[-1]:
        losses = f"at {unseen[-1]:.3g}, far above the training loss, {seen[-1]:.3g}"
        told = f"the validation loss ends {losses}: part of the text is learnt by heart"
        info(f"{told}; more text helps, or fewer --steps")
