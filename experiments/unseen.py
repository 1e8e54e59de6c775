"""The loss on the test text, by which no setting was chosen: python experiments/unseen.py out/small

Settings are chosen by the validation loss, which is therefore a little too low. prepare_data.py
keeps whole documents of the corpus apart in test.bin, which no training and no evaluation reads.
This measures a run on them, in windows of its lengths, in bits per byte. A few dozen files are a
small sample of code, so there is an interval: the middle 95 % of the means over files drawn with
replacement (bootstrap).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from load import load_model
from model import DeepSeekV3
from support import processes
from support.checkpoints import load_checkpoint
from support.processes import Machine
from support.settings import Refusal, parse_args, run_command
from support.tokenizer import stored_tokenizer
from support.tokens import load_dataset


@dataclass
class UnseenOptions:
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: as it was trained
    batch: int = 16  # windows at a time; fewer, if they are longer than the short ones


@torch.no_grad()
def nats_by_document(
    model: DeepSeekV3, data, folder: Path, T: int, config: train.TrainConfig, machine: Machine
) -> tuple[np.ndarray, np.ndarray]:
    """For each document of the test text of data, prepared in folder: the sum of its tokens' losses
    in nats, predicted in windows of T tokens side by side, and its bytes. Both (documents,)."""
    if data.test is None:
        raise Refusal(f"{folder} has no test.bin: make it again with python prepare_data.py.")
    ids, losses = data.test.arrays[0], [np.zeros(1)]  # the first token is predicted by none
    for windows in train.validation_windows(ids, T, config, machine):
        x, y = train.to_device(windows, machine.device)
        with machine.autocast():
            logits = model(x.clamp(min=0))
        loss = cross_entropy(logits[y >= 0].double(), y[y >= 0], reduction="none")
        losses.append(loss.cpu().numpy())
    tokenizer = stored_tokenizer(folder)
    size = np.array([len(tokenizer.texts.get(i, b"")) for i in ids.tolist()])  # special ones: 0
    document = documents_of(ids, *tokenizer.marks)
    return np.bincount(document, np.concatenate(losses)), np.bincount(document, size)


def documents_of(ids: np.ndarray, before: list[int], after: list[int]) -> np.ndarray:
    """The number of the document that each token belongs to (tokens,), from the tokenizer's marks
    before and after every document: ours begin with <|endoftext|>, a release's end with its own."""
    if after:
        ends = ids == after[-1]
        return np.cumsum(ends) - ends
    return np.cumsum(ids == before[0]) - 1


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    return float(nats.sum() / size.sum() / math.log(2))


def over_documents(nats: np.ndarray, size: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The middle 95 % of the bits per byte of as many documents, drawn with replacement
    (bootstrap), from nats and bytes of each (documents,). Of 40 documents it is a little too
    narrow, about 92 %."""
    drawn = np.random.default_rng(0).integers(0, len(size), (draws, len(size)))
    means = nats[drawn].sum(1) / size[drawn].sum(1) / math.log(2)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main(argv: list[str]):
    ckpt, values = parse_args(__doc__, argv, UnseenOptions, positional="ckpt")
    options = UnseenOptions(**values)
    run = Path(ckpt or "out/small")
    saved = load_checkpoint(run)["train_config"]
    dtype = saved.get("dtype", "auto") if options.dtype == "auto" else options.dtype
    config = train.TrainConfig(device=options.device, dtype=dtype, batch_size=options.batch)
    config.block_size = saved["block_size"]
    machine = processes.start(config)
    model, _ = load_model(run, machine.device)
    folder = train.data_folder(saved["data"])
    data = load_dataset(folder)
    for T in dict.fromkeys((saved["block_size"], model.trained_length)):
        nats, size = nats_by_document(model.eval(), data, folder, T, config, machine)
        low, high = over_documents(nats, size)
        print(
            f"{bits_per_byte(nats, size):.4f} bits/byte in windows of {T} tokens, "
            f"{low:.3f} to {high:.3f} over {len(size)} files of {size.sum():,.0f} bytes"
        )


if __name__ == "__main__":
    run_command(main)
