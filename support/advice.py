"""Advice for a text, from measurements in docs/MEASUREMENTS.md: size of the vocabulary, length of
the run."""

import math
import runpy
import shlex
from pathlib import Path

from support.settings import info
from support.tokens import FEW_TOKENS, Dataset

# In a trial on a small text, 4 and 6 epochs gave about the same validation loss, and 10 a much
# higher one. In Muennighoff et al. (arXiv 2305.16264), too, up to 4 epochs cost little.
FEW_EPOCHS, MANY_EPOCHS = 5, 8


def fitting_vocabulary(texts: list[str]) -> int:
    """The vocabulary size for a tokenizer trained on these texts: the power of two nearest to 5
    times the square root of their bytes, from 512 to 4,096 (the size in config/small.py)."""
    size = sum(len(text.encode()) for text in texts)
    return min(4096, max(512, 2 ** round(math.log2(5 * math.sqrt(size)))))


# Texts large enough for config/one_gpu.py, and its options for them (docs/GPU.md).
FOR_ONE_GPU = {
    "fineweb": {},
    "finewebedu": {},
    "tinystories": {"block_size": 512, "grad_accum": 4, "steps": 6000},
}


def next_command(folder: Path, data: Dataset, tokenizer: str, source: str = "") -> str:
    """The command that trains on the folder: from the weights beside the tokenizer, if any, else a
    new network, of config/one_gpu.py if the source has enough text. Or what to do if the text is
    too short for a window.

    The run reads the text at most FEW_EPOCHS times. Weights of a run keep its settings, at a tenth
    of its learning rate. A release's weights get a rate of 2e-5.
    """
    name = folder.name if folder.parent == Path("data") else str(folder)
    home, taken = Path(tokenizer), ["batch_size", "block_size", "lr"]
    is_run = tokenizer and any((home / file).exists() for file in ("best.pt", "ckpt.pt"))
    has_weights = is_run or (tokenizer and (home / "config.json").exists())
    large = source in FOR_ONE_GPU and not has_weights
    file, options = ("config/one_gpu.py", FOR_ONE_GPU[source]) if large else ("config/small.py", {})
    settings = runpy.run_path(str(Path(__file__).parent.parent / file)) | options
    most, eval_tokens = settings["steps"], settings.get("eval_tokens")
    if is_run:
        from support.checkpoints import load_checkpoint  # imports torch, not needed otherwise

        run = load_checkpoint(home, whole=False)["train_config"]
        settings |= run
        memory = {"grad_accum": 1, "recompute": False}  # what the run needed to fit, if anything
        taken += ["optimizer", "adamw_lr", *(k for k, x in memory.items() if run.get(k, x) != x)]
    settings["lr"] = f"{settings['lr'] / 10:g}" if is_run else "2e-5"
    window = settings["block_size"]
    if not has_weights:
        window = max(window, settings.get("long_block_size", 0))
    if len(data.train) <= window:
        return f"add text: it has {len(data.train):,} tokens, not more than a window ({window:,})"
    tokens_per_step = settings["batch_size"] * settings["block_size"]
    steps = max(1, FEW_EPOCHS * len(data.train) // tokens_per_step)
    words = [f"--data={name}", f"--out=out/{folder.name}", f"--steps={min(steps, most)}"]
    if has_weights:
        words = [f"--init_from={home}", *words, *(f"--{key}={settings[key]}" for key in taken)]
    else:
        words = [file, *words, *(f"--{key}={x}" for key, x in options.items() if key != "steps")]
        if not 0 <= settings["vocab_size"] - data.vocab_size < 128:  # else the network's is padded
            words.append(f"--vocab_size={data.vocab_size}")
    # Evaluations of a long validation text would read more tokens than the training does.
    if len(data.val) > 10 * FEW_TOKENS and not eval_tokens:
        words.append(f"--eval_tokens={FEW_TOKENS}")
    return shlex.join(["python", "train.py", *words])


def log_epochs(tokens: int, length: int, steps: int, new: bool) -> None:
    """Prints how many epochs of a text of `length` tokens a run reads in `steps` steps and `tokens`
    tokens, with a warning if a new run reads too many."""
    epochs = tokens / length
    shown = f"{epochs:.1f}" if epochs >= 1 else f"{epochs:.2g}"
    info(f"text: {length:,} tokens; the run reads {tokens:,} ({shown} epochs)")
    if epochs > MANY_EPOCHS and new:
        fewer = max(1, round(steps * FEW_EPOCHS / epochs))
        info(
            f"in more than {MANY_EPOCHS} epochs the model learns its text by heart; "
            f"give --steps={fewer} for {FEW_EPOCHS}"
        )
