"""The loss on the test text, on which nothing was chosen: python experiments/unseen.py out/small

Settings are chosen by the validation loss, which is therefore a little too good. prepare_data.py
keeps whole documents of the corpus apart in test.bin, which no training and no evaluation reads.
Here a trained run is measured on them, in windows of its lengths, in bits per byte. A few dozen
files are a small sample of all code there is: the interval is the middle 95 % of the means over
files drawn again with replacement (bootstrap).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from intervals import over_documents
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from config import parse_args, run_command
from huggingface import load_checkpoint, load_model
from model import DeepSeekV3
from prepare_data import load_dataset, load_tokenizer


@dataclass
class UnseenOptions:
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # of the products; auto: as the run was trained
    batch: int = 16  # windows at a time


@torch.no_grad()
def nats_by_document(
    model: DeepSeekV3, data, folder: Path, T: int, batch: int, machine: train.Machine
) -> tuple[np.ndarray, np.ndarray]:
    """For each document of the test text of data, prepared in folder: the sum of its tokens' losses
    in nats, predicted in windows of T tokens side by side, and its bytes. Both (documents,)."""
    if data.test is None:
        raise ValueError(f"{folder} has no test.bin: make it anew with python prepare_data.py.")
    ids, encoding = np.asarray(data.test.arrays[0]).astype(np.int64), load_tokenizer(folder)
    document = np.cumsum(ids == encoding.eot_token) - 1  # of every token; each begins with eot
    length_of = np.zeros(encoding.n_vocab, int)  # in bytes, by id; <|endoftext|> has none
    for token, i in encoding._mergeable_ranks.items():
        length_of[i] = len(token)
    losses = np.zeros(len(ids))  # the first token is predicted by none
    starts = range(0, len(ids) - 1, T)
    for first in range(0, len(starts), batch):
        places = starts[first : first + batch]
        windows = np.full((len(places), T + 1), -1)
        for row, start in zip(windows, places, strict=True):
            piece = ids[start : start + T + 1]
            row[: len(piece)] = piece
        x, y = train.to_device(windows, machine.device)
        with machine.autocast():
            logits = model(x.clamp(min=0))
        loss = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-1)
        loss = loss.double().cpu().numpy()[y.flatten().cpu().numpy() >= 0]
        losses[1 + places[0] :][: len(loss)] = loss
    return np.bincount(document, losses), np.bincount(document, length_of[ids])


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    return float(nats.sum() / size.sum() / math.log(2))


def main(argv: list[str]):
    ckpt, values = parse_args(__doc__, argv, UnseenOptions, positional="ckpt")
    options = UnseenOptions(**values)
    run = Path(ckpt or "out/small")
    saved = load_checkpoint(run)["train_config"]
    dtype = saved.get("dtype", "auto") if options.dtype == "auto" else options.dtype
    machine = train.start_machine(train.TrainConfig(device=options.device, dtype=dtype))
    model, _, _ = load_model(run, machine.device)
    folder = train.data_folder(saved["data"])
    data = load_dataset(folder)
    for T in dict.fromkeys((saved["block_size"], model.trained_length)):
        nats, size = nats_by_document(model.eval(), data, folder, T, options.batch, machine)
        low, high = over_documents(nats, size)
        print(
            f"{bits_per_byte(nats, size):.4f} bits/byte in windows of {T} tokens, "
            f"{low:.3f} to {high:.3f} over {len(size)} files of {size.sum():,.0f} bytes"
        )


if __name__ == "__main__":
    run_command(main)
