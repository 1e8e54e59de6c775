"""Train a DeepSeek-V3: python train.py config/small.py [--key=value].

    data/<name>/ + config/*.py -> out/<name>/
        ckpt.pt      everything a run needs to go on: weights, optimiser, step, configuration
        best.pt      the weights with the lowest validation loss (once YaRN is on, of later steps)
        log.jsonl    one JSON object per logged step or evaluation
        tokenizer.tiktoken (or a release's files), meta.json    what sample.py needs besides
        .lock        held by the train.py that writes there

The loss is L_main + lambda * mean_k L_MTP^k + alpha * sum_layers L_Bal (report, sections 2.1.2 and
2.2), the schedules are those of section 4.2 in fractions of the run. One optimiser step sees
batch_size windows of block_size tokens (in the last phase also fewer, longer ones), drawn from
(seed, step) alone and then cut up over ranks and micro-batches, so any number of processes, and a
resumed run, see the same data.

On several GPUs or nodes: torchrun --nproc_per_node=N train.py config/x.py (docs/REFERENCE.md).

Shapes: B windows, T tokens of a window, E routed experts, K experts per token.
"""

import ast
import functools
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import fp8
import prepare_data
import sample
from huggingface import load_model
from model import DeepSeekV3, ModelConfig, expert_counts
from support import processes
from support.processes import Machine, is_first, join_processes, on_all, on_first, wrap
from support.runs import checkpoint_file, load_checkpoint, write_atomically
from support.settings import info, parse_args, read_config_file, run_command, with_home
from support.tokenizer import Tokenizer, stored_tokenizer, tokenizer_files, tokenizer_identity
from support.tokens import Dataset, load_dataset

PHASES = ("warmup", "decay_start", "decay_end", "final_start")  # of the learning rate, in order


@dataclass
class TrainConfig:
    """Everything about a run that is not the network's shape."""

    data: str = "stdlib"  # folder under data/ made by prepare_data.py, or its path
    out: str = ""  # the run's folder (empty: out/<name of the config file>)
    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # windows per step, over all ranks and micro-batches
    block_size: int = 256  # tokens per window
    long_block_size: int = 0  # tokens per window in every second step from long_start on (0: none)
    long_start: float = 0.9  # fraction of the run from which YaRN stretches RoPE to that length
    grad_accum: int = 1  # micro-batches per step and rank
    batch_start: int = 0  # windows in the first step, growing in multiples of it (0: constant)
    batch_ramp: float = 0.032  # fraction of the run in which it grows (469B of 14.8T tokens)
    # optimiser and schedule; "fraction" is of the run, the report's values are the defaults
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices, learns more per step
    lr: float = 2.2e-4  # peak learning rate
    adamw_lr: float = 1.0  # AdamW's rate beside Muon, as a multiple of lr
    warmup: float = 0.0085  # fraction with rising learning rate
    decay_start: float = 0.676  # fraction at which the cosine begins
    decay_end: float = 0.966  # fraction at which it has reached min_lr
    min_lr: float = 0.1  # learning rate after the cosine, as a share of lr
    final_start: float = 0.9887  # fraction at which the last, lowest learning rate begins
    final_lr: float = 0.0332  # that rate, as a share of lr
    weight_decay: float = 0.1  # of matrices; norms and biases are excluded
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest gradient norm (0: no limit)
    mtp_weight: float = 0.3  # lambda, weight of the MTP loss
    mtp_weight_late: float = 0.1  # lambda from mtp_switch on
    mtp_switch: float = 0.676  # fraction
    gamma: float = 0.001  # step of the routing bias
    gamma_stop: float = 0.966  # fraction from which the bias stands still
    alpha: float = 0.0001  # weight of the sequence-wise balance loss
    seed: int = 1337
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of the products
    fp8: bool = False  # FP8 products (fp8.py)
    compile: bool = False  # torch.compile the blocks
    recompute: bool = False  # activation checkpointing: less memory, a third more work
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards weights and optimiser, and recomputes
    deterministic: bool = False  # sums in a fixed order: a run resumes bit for bit on CUDA too
    # the run
    eval_every: int = 250  # steps between evaluations
    eval_batch: int = 16  # windows per evaluation batch and rank
    save_every: int = 250  # steps between checkpoints
    log_every: int = 10  # steps between lines in log.jsonl
    resume: bool = False  # go on from the run's ckpt.pt
    overwrite: bool = False  # replace an existing run
    init_from: str = ""  # start from the weights of a run, checkpoint or Hugging Face directory
    eval_only: bool = False  # evaluate the run's (or init_from's) weights and stop

    def __post_init__(self):
        counts = {"steps", "batch_size", "block_size", "grad_accum", "eval_batch"}
        counts |= {"eval_every", "save_every", "log_every"}
        for name, value in vars(self).items():
            least = 1 if name in counts else 0
            if not isinstance(value, str) and (math.isnan(value) or value < least):
                raise ValueError(f"{name} is {value}, but must be at least {least}.")
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must be less than 1.")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("muon needs whole matrices, but fsdp cuts them up; choose adamw.")

    def check_order(self):
        """Raises ValueError where a phase of the learning rate begins before the one it follows."""
        # A cosine that ends at 1 lasts to the end of the run, without a last phase.
        phases = PHASES if self.decay_end < 1 else PHASES[:-1]
        for first, then in itertools.pairwise(phases):
            x, y = getattr(self, first), getattr(self, then)
            if x > y:
                wrong = f"{first} is {x}, but {then} is {y}"
                raise ValueError(f"{wrong}: raise {then} to {x} at least, or lower {first}.")


# ---- Schedules (section 4.2) ---------------------------------------------------------------------


def lr_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, cosine to min_lr, min_lr, final_lr. `step` counts from 0."""
    x = step / config.steps
    if x < config.warmup:
        return config.lr * (step + 1) / (config.warmup * config.steps + 1)
    if x < config.decay_start:
        return config.lr
    if x < config.decay_end:
        along = (x - config.decay_start) / (config.decay_end - config.decay_start)
        cosine = 0.5 * (1 + math.cos(math.pi * along))
        return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)
    return config.lr * (config.min_lr if x < config.final_start else config.final_lr)


def mtp_weight_at(config: TrainConfig, step: int) -> float:
    """lambda, the weight of the MTP loss."""
    late = step >= config.mtp_switch * config.steps
    return config.mtp_weight_late if late else config.mtp_weight


def gamma_at(config: TrainConfig, step: int) -> float:
    """The step of the routing bias."""
    return config.gamma if step < config.gamma_stop * config.steps else 0.0


def extended(config: TrainConfig, step: int) -> bool:
    """Whether the run has reached its last phase, in which every second step has long windows."""
    return config.long_block_size > 0 and step >= config.long_start * config.steps


def block_at(config: TrainConfig, step: int) -> int:
    """Tokens per window. Short and long windows take turns, so that neither is forgotten."""
    return config.long_block_size if extended(config, step) and step % 2 else config.block_size


def extend_context(model: DeepSeekV3, config: TrainConfig):
    """YaRN from the length trained so far to long_block_size (section 4.3), with the softmax
    temperature of the released configuration unless the model has another."""
    yarn = model.config.rope_scaling or {
        "type": "yarn",
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": model.trained_length,
    }
    factor = config.long_block_size / yarn["original_max_position_embeddings"]
    model.config.rope_scaling = yarn | {"factor": factor}
    model.trained_length = config.long_block_size


def batch_at(config: TrainConfig, step: int) -> int:
    """Windows in this step: multiples of batch_start, growing evenly to batch_size."""
    start = config.batch_start
    if not start:
        return config.batch_size
    stages = config.batch_size // start
    ramp = max(1, config.batch_ramp * config.steps)  # in steps
    stage = int(stages * step / ramp)  # from 0 on
    return min(start * (1 + stage), config.batch_size)


# ---- Optimiser -----------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: Muon as in Moonlight (arXiv 2502.16982).

    A parameter is a matrix (out, in) or a stack of matrices (E, out, in). Each matrix is made
    orthogonal by itself, in `dtype`, and scaled to about the size of AdamW's updates. Matrices of
    one shape are computed together. torch.optim.Muon gives the same results one by one.
    """

    def __init__(self, params, defaults: dict, dtype: torch.dtype):
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, of_shape = group["lr"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    of_shape[p.shape[-2:]].append(p)
            for shape, params in of_shape.items():
                stacks = [self.averaged(p, group["momentum"]).reshape(-1, *shape) for p in params]
                updates = orthogonal(torch.cat(stacks), self.dtype).split([*map(len, stacks)])
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(shape)))

    def averaged(self, p: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (n, a, b) with all singular values brought near 1, by five steps of the Newton-Schulz
    iteration of Jordan et al. (2024) with their coefficients, in this dtype."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        y = torch.baddbmm(y, gram, y, beta=3.4445)
    return y.mT if tall else y


NOT_FOR_MUON = ("embed_tokens.weight", "lm_head.weight", "gate.weight")


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, as in the report; or Muon for the matrices of attention, FFN, experts and
    eh_proj, as in Moonlight (arXiv 2502.16982), and AdamW for the rest, at adamw_lr times lr."""
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.ndim <= 1:
            vectors.append(p)
        elif config.optimizer == "adamw" or name.endswith(NOT_FOR_MUON):
            others.append(p)
        else:
            matrices.append(p)
    decay, scale = config.weight_decay, config.adamw_lr if matrices else 1.0
    groups = [
        {"params": others, "weight_decay": decay, "lr_scale": scale},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": scale},
    ]
    adamw = torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), fused=True)
    if not matrices:
        return [adamw]
    defaults = {"lr": config.lr, "lr_scale": 1.0, "weight_decay": decay, "momentum": 0.95}
    return [adamw, Muon(matrices, defaults, getattr(torch, config.dtype))]


# ---- Data ----------------------------------------------------------------------------------------


def check_tokenizer(source: Path, tokenizer: Tokenizer | None, data: Path):
    """Raises ValueError unless the weights in `source` have the tokenizer of the data.

    If the weights have a meta.json, its entries are compared. A Hugging Face directory without one
    must have the same tokens, and must give a sample text the same ids.
    """
    folder = source if source.is_dir() else source.parent
    if identity := tokenizer_identity(folder):
        same = identity == tokenizer_identity(data)
    elif tokenizer:
        other = stored_tokenizer(data)
        same = (tokenizer.texts, tokenizer.special) == (other.texts, other.special)
        same = same and tokenizer.encode_batch([__doc__]) == other.encode_batch([__doc__])
    else:  # the directory has none
        same = True
    if not same:
        differ = f"{source} has another tokenizer than {data}"
        raise ValueError(f"{differ}; prepare the data with --tokenizer={folder}.")


def read_data(config: TrainConfig, folder: Path, vocab_size: int) -> Dataset:
    """The prepared data. Raises OSError or ValueError where this run cannot use them."""
    if not folder.exists():
        make = f"python prepare_data.py SOURCE --name={folder.name} --vocab_size={vocab_size}"
        make += f" --out={folder.parent}" if folder.parent != Path("data") else ""
        raise FileNotFoundError(f"no data in {folder}; make it with: {make}.")
    data = load_dataset(folder)
    # The embedding may have more rows than there are tokens: fewer than 128 more, or exactly as
    # many as in the release that the tokenizer is from.
    padding = vocab_size - data.vocab_size
    if padding < 0 or (padding >= 128 and vocab_size != data.rows):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the vocabulary of {folder} has {data.vocab_size} "
            f"tokens: for a new network write vocab_size = {data.vocab_size} into the config file; "
            "for given weights prepare the data with --tokenizer=DIR, where the weights are."
        )
    longest = max(config.block_size, config.long_block_size)
    shortest = min(map(len, data.train.arrays))
    if longest >= shortest:  # a window needs the token after it, too
        short = f"windows of {longest} tokens do not fit in {folder}, a file of {shortest}"
        raise ValueError(f"{short}: lower --block_size and --long_block_size, or add text.")
    return data


def data_folder(name: str) -> Path:
    """The folder of prepared data: a path, or a name in data/."""
    path = Path(name)
    is_path = len(path.parts) > 1 or (path / "meta.json").exists()
    return path if is_path else Path("data") / name


def open_data(config: TrainConfig, vocab_size: int):
    """The prepared data and its folder; those of our own config files are made if missing.

    Process 0 makes them. Every process reads its own disk's, which have to be the same.
    """
    folder = data_folder(config.data)

    def make():
        ours = (config.data, vocab_size) in (("stdlib", 4096), ("tiny", 512))
        if ours and not folder.exists():
            source = prepare_data.DataConfig("stdlib", config.data, vocab_size=vocab_size)
            with suppress(FileExistsError):  # another train.py has made it meanwhile
                prepare_data.prepare(source)

    on_first(make)
    data = on_all(lambda: read_data(config, folder, vocab_size))
    sizes = [*map(len, data.train.arrays), *map(len, data.val.arrays)]
    own = sizes, tokenizer_identity(folder)
    first = on_first(lambda: own)

    def compare():
        if own != first:
            raise ValueError(f"{folder} differs from that of process 0: copy it from there.")

    on_all(compare)
    return data, folder


@functools.lru_cache(2)
def epoch_starts(seed: int, epoch: int, length: int, T: int) -> np.ndarray:
    """Where the windows of one pass through `length` tokens begin: side by side, shuffled."""
    rng, count = np.random.default_rng((seed, epoch)), (length - 1) // T
    offset = rng.integers(0, length - count * T)  # other borders in every pass
    return offset + T * rng.permutation(count)


def train_windows(data: Dataset, config: TrainConfig, step: int) -> np.ndarray:
    """The step's windows (B, T + 1). They depend on seed and step alone.

    An epoch is a shuffled list of windows that lie side by side. Windows are numbered through all
    epochs, and a step takes the next numbers. So every token comes once per epoch while batch and
    window keep their size. Where two window sizes take turns, each skips the other's numbers.
    """
    T, length = block_at(config, step), len(data.train)
    first = step * config.batch_size * config.block_size // T  # windows before this step
    numbers = first + np.arange(batch_at(config, step) * config.block_size // T)
    count = (length - 1) // T  # windows of an epoch
    starts = [epoch_starts(config.seed, i // count, length, T)[i % count] for i in numbers]
    return data.train.windows(np.array(starts), T + 1)


def micro_batches(windows: np.ndarray, config: TrainConfig, machine: Machine) -> list[np.ndarray]:
    """This process's share of a step's windows, in grad_accum parts."""
    parts = np.split(windows, machine.world * config.grad_accum)
    first = machine.rank * config.grad_accum
    return parts[first : first + config.grad_accum]


def to_device(windows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows (B, T + 1) -> tokens (B, T) and the next tokens (B, T)."""
    x, cuda = torch.from_numpy(windows), device.type == "cuda"
    if cuda:  # pinned, or the copy would wait for all work before it
        x = x.pin_memory()
    x = x.to(device, non_blocking=cuda)  # on Apple's GPUs it may read what is freed by then
    return x[:, :-1], x[:, 1:]


def max_vio(counts: Tensor) -> Tensor:
    """(max - mean) / mean of the loads (layers, E), averaged over layers (2408.15664, Eq. 4)."""
    load = counts.float()
    return (load.amax(1) / load.mean(1) - 1).mean().nan_to_num()  # 0 where nothing is routed


# ---- Evaluation ----------------------------------------------------------------------------------


def validation_windows(tokens, T: int, config: TrainConfig, machine: Machine) -> Iterator:
    """This process's share of these tokens, in batches (B, T + 1) of windows side by side, so that
    every token is predicted once. All processes get the same number of batches: where the text has
    ended they hold -1."""
    B = math.ceil(config.eval_batch * config.block_size / T)
    batches = range(0, math.ceil((len(tokens) - 1) / T), B * machine.world)
    for first in tqdm(batches, "evaluate", leave=False, disable=machine.rank > 0 or None):
        windows = np.full((B, T + 1), -1)
        for i, row in enumerate(windows, first + machine.rank * B):
            piece = tokens[i * T : (i + 1) * T + 1]
            row[: len(piece)] = piece
        yield windows


def add_up(model: DeepSeekV3, tokens, T: int, config: TrainConfig, machine: Machine) -> dict:
    """Sums over all windows of these tokens, and over all processes: nats and predicted tokens by
    depth (0: the main model, k: MTP module k), visits to every expert, visits to groups."""
    E, G = model.config.n_routed_experts, model.config.n_group
    sums = torch.zeros(2, 1 + len(model.mtp), dtype=torch.double)  # nats, tokens
    visits = torch.zeros(model.config.moe_layers, E, dtype=torch.long, device=machine.device)
    groups = torch.zeros((), dtype=torch.long, device=machine.device)
    for windows in validation_windows(tokens, T, config, machine):
        x, y = to_device(windows, machine.device)
        with machine.autocast():
            main, _, _ = model(x.clamp(min=0), y)
        loss = torch.stack((main, *model.mtp_losses)).cpu()
        n = torch.stack([(y[:, k:] >= 0).sum() for k in range(len(loss))]).cpu()
        sums[:, : len(n)] += torch.stack((loss * n, n))  # one token has no MTP loss
        for layer, chosen in enumerate(model.routing):
            # MTP module k (from 1) has T - k rows, for the last T - k targets. -1 marks padding.
            used = chosen[(y >= 0)[:, -chosen.shape[1] :]]  # (tokens, K)
            visits[layer] += expert_counts(used, E)
            groups += nn.functional.one_hot(used // (E // G), G).amax(1).sum()
    nats, n = machine.sum(sums)
    return {"nats": nats, "tokens": n, "visits": machine.sum(visits), "groups": machine.sum(groups)}


def mean_losses(sums: dict) -> list[float]:
    """By depth, in nats per token."""
    return (sums["nats"] / sums["tokens"].clamp(min=1)).tolist()


@torch.no_grad()
def evaluate(model: DeepSeekV3, data, config: TrainConfig, machine: Machine) -> dict:
    """What the log has of an evaluation of the whole validation text: losses and the use of the
    experts in windows of block_size and, once the model knows them, the loss in long ones."""
    text = data.val.arrays[0]
    model.eval()
    with fp8.quantized_once(model), torch.compiler.set_stance("force_eager"):  # for so few calls
        total = add_up(model, text, config.block_size, config, machine)
        long = None
        if config.long_block_size == model.trained_length:
            long = add_up(model, text, config.long_block_size, config, machine)
    main, *mtp = mean_losses(total)
    share = total["visits"] / total["visits"].sum(1, keepdim=True).clamp(min=1)
    visits, groups = total["visits"].sum().item(), total["groups"].item()  # 0 without experts
    per_bit = math.log(2) * data.val_bytes_per_token
    result = {
        "val_loss": main,
        "val_bpb": main / per_bit,
        # A depth may be easier than the main model: it lacks the window's first, hardest positions.
        "val_mtp_loss": sum(mtp) / max(1, len(mtp)),
        "val_mtp_losses": mtp,
        "max_vio_global": max_vio(total["visits"]).item(),
        # A token makes num_experts_per_tok visits to experts.
        "nodes_per_token": model.config.num_experts_per_tok * groups / max(1, visits),
        "experts_per_node": visits / max(1, groups),
        "expert_load": [[round(v, 5) for v in row] for row in share.tolist()],
    }
    if long:
        result["val_bpb_long"] = mean_losses(long)[0] / per_bit
    return result


# ---- The folder of a run -------------------------------------------------------------------------


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Makes the run's folder, and keeps every other train.py from writing there meanwhile.

    Process 0 holds a lock on a file in it. The system takes that back however the process ends. If
    the run ends before it has written anything, the folders made here are removed.
    """
    path = out / ".lock"
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    file = on_all(lambda: lock(path) if is_first() else None)
    try:
        yield
    finally:
        if file:
            with suppress(OSError):  # another process is there by now; Windows removes no open file
                if new and [*out.iterdir()] == [path]:
                    path.unlink()
                    for folder in new:
                        folder.rmdir()
            file.close()


def lock(path: Path) -> BinaryIO:
    """Opens the file and locks it until it is closed. Deletes what killed writers have left beside
    it. Raises ValueError where another process has the lock. Reading a run needs none."""
    folder = path.parent
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give another --out.")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(
                f"another train.py is writing to {folder}: wait for its end, or give another --out."
            ) from None
        except OSError as error:
            info(f"{folder} cannot be locked ({error}): let only one train.py write there")
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its last writer has removed it since it was opened
    for name in ("ckpt.pt", "best.pt", "log.jsonl"):
        for part in folder.glob(f"{name}*.tmp"):
            part.unlink(missing_ok=True)
    return file


def cut_log(path: Path, step: int) -> int:
    """Deletes a log's damaged lines and those of later steps. Returns the last step of which it
    still has an evaluation (0: none)."""
    kept, evaluated, damaged = [], 0, 0
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue  # the last one, half written
        try:
            entry = json.loads(line)
            if entry["step"] > step:
                continue
        except (ValueError, TypeError, KeyError):  # no JSON, no object, no step
            damaged += 1
            continue
        kept.append(line)
        if "val_loss" in entry:
            evaluated = max(evaluated, entry["step"])
    if damaged:
        info(f"{path}: left out {damaged} damaged line(s)")
    if b"".join(kept) != content:
        write_atomically(path, lambda file: file.writelines(kept))
    return evaluated


def to_json(values: dict) -> str:
    """NaN and infinity, for which JSON has no name, become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None))


# ---- The run -------------------------------------------------------------------------------------


def seconds_waited() -> float:
    """How long this process's threads have waited for a core, in all. Only Linux tells; else 0."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread may end meanwhile
            total += int(path.read_text().split()[1])
    return total / 1e9


class Clock:
    """How fast the run is, how long it will last, and whether other programs keep it waiting."""

    def __init__(self):
        self.began, self.waited_before = time.perf_counter(), seconds_waited()
        self.steps = 0  # made by this process
        self.since, self.tokens_before = self.began, 0  # when measuring began; the tokens then
        self.speed = 0.0  # tokens/s, smoothed
        self.told_busy = False

    def restart(self, tokens: int):
        """What has taken time until now, such as an evaluation, does not count."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement, or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        speed = (tokens - before) / (self.since - since)
        self.speed = 0.7 * self.speed + 0.3 * speed if self.speed else speed
        return speed

    def time_left(self, tokens: int) -> str:
        """For so many tokens, at the smoothed speed. Nothing in the first ten steps, which may be
        slow."""
        left = timedelta(seconds=round(tokens / self.speed))
        return f", {left} left" if self.steps >= 10 else ""

    def tell_if_busy(self):
        """Says once that the machine has more work than cores, and what helps."""
        seconds = time.perf_counter() - self.began
        if self.told_busy or (self.steps < 10 and seconds < 10):
            return
        threads = torch.get_num_threads()
        waiting = (seconds_waited() - self.waited_before) / seconds
        if waiting > 0.25:
            self.told_busy = True
            if threads == 1:
                share = min(1, waiting)  # a helper thread may wait beside it
                told = f"the core is busy: this run waits for it {share:.0%} of the time"
                info(f"{told}; stop other programs")
                return
            info(
                f"the cores are busy: on average {waiting:.1f} of this run's {threads} threads "
                f"wait for one, and the others for them; stop other programs, or set "
                f"OMP_NUM_THREADS={threads - 1}"
            )


class Stop:
    """Ctrl-C or pre-emption: the run stops after the step, when all is saved."""

    def __init__(self):
        self.heard = 0.0  # when this process got a signal (0: never)

    @contextmanager
    def listen(self, way_on: Callable[[], str]) -> Iterator[None]:
        """way_on() tells where a run that is cut short can go on."""
        handlers = {x: signal.signal(x, self.on_signal) for x in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except (KeyboardInterrupt, torch._dynamo.exc.ShortenTraceback):
            if not self.heard:
                raise
            # A second signal, or a compiler that has heard the first one too, and failed.
            info(f"stopped at once; {way_on()}")
            raise KeyboardInterrupt from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        """torchrun sends it twice. A signal more than a second after the first aborts at once."""
        if self.heard and time.monotonic() > self.heard + 1:
            raise KeyboardInterrupt
        if not self.heard and is_first():
            os.write(2, b"\nstopping after the next step\n")
        self.heard = self.heard or time.monotonic()

    def agreed(self, machine: Machine) -> bool:
        """Whether any process has heard a signal, so that all stop together."""
        return bool(machine.sum(torch.tensor(float(self.heard > 0))))  # a sum on the CPU


class Run:
    """How far the run has come, and its folder: what is logged, saved and restored there."""

    def __init__(self, model, optimizers, data, config: TrainConfig, machine: Machine):
        # It gathers what FSDP has cut up. To import it takes a second: --help need not wait for it.
        import torch.distributed.checkpoint.state_dict as dcp

        self.dcp, self.whole = dcp, dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        self.model, self.data = model, data
        self.model_and_optimizers = model, optimizers  # what dcp's functions take
        self.config, self.machine, self.out = config, machine, Path(config.out)
        self.clock = Clock()
        self.step = self.tokens = 0
        self.saved_step = 0  # the step of ckpt.pt (0: there is none)
        self.evaluated_step = 0  # of the last evaluation that a resumed run finds in its log
        self.at_start: dict | None = None  # the evaluation of weights that the run starts from
        self.best_length, self.best_loss = 0, math.inf  # of best.pt: tokens trained for, loss
        # Sums over the steps since the last line of the log: loss, MTP loss, balance loss, MaxVio,
        # steps left out, all steps. They stay on the device, so that no step has to wait for them.
        self.sums = torch.zeros(6, device=machine.device, dtype=model.norm.weight.dtype)
        self.bad_in_a_row = 0  # gradients that were not finite
        self.stopped = False  # by a signal

    @property
    def last(self) -> bool:
        """Whether the last step has been made."""
        return self.step >= self.config.steps

    @property
    def lost(self) -> bool:
        """Whether bad gradients end the run. Up to four are left out, if a good one follows."""
        return self.bad_in_a_row >= 5 or (self.last and self.bad_in_a_row > 0)

    # -- Beginning --

    def restore(self, saved: dict):
        """Goes back to a checkpoint, which process 0 has read; it tells the others what they need,
        as their decisions have to be the same and their disks may be others."""
        self.saved_step = saved.get("step", 0)  # which a second Ctrl-C may have to tell meanwhile
        found = on_first(lambda: self.read_folder(saved))
        self.step, self.tokens = found["step"], found["tokens"]
        self.evaluated_step = found["evaluated"]
        self.best_length, self.best_loss = found["best"]
        self.saved_step = self.step
        self.clock.restart(self.tokens)
        self.sums += found["sums"].to(self.sums)
        self.restore_moments(saved.get("optimizer", {}))
        saved.clear()  # closes the file, which would take up its disk space after its replacement
        info(f"resume: from step {self.step} of {self.config.steps}, in {self.out}/ckpt.pt")
        if self.last:
            info("nothing is left to train: give more --steps")

    def restore_moments(self, stored: dict):
        """Every parameter's moments, cut up as it is; the optimisers' settings stay this run's."""
        # An optimiser may keep the very tensors that it is given: these are copies of the disk's.
        moments = {name: {k: x.clone() for k, x in m.items()} for name, m in stored.items()}
        groups = self.dcp.get_optimizer_state_dict(*self.model_and_optimizers)["param_groups"]
        state = {"state": moments, "param_groups": groups} if is_first() else {}
        several = self.machine.world > 1
        options = self.dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
        self.dcp.set_optimizer_state_dict(*self.model_and_optimizers, state, options=options)

    def read_folder(self, saved: dict) -> dict:
        """What process 0 finds in the run's folder: step, tokens, sums, best loss, last evaluation.

        Lines of the log that are later than the checkpoint are deleted: the run writes them again.
        """
        kind, moments = self.config.optimizer, saved.get("optimizer")
        if saved["train_config"].get("optimizer") != kind or not isinstance(moments, dict):
            raise ValueError(f"no state of {kind} in {self.out}: use --init_from instead.")
        best, evaluated = self.read_best(), cut_log(self.out / "log.jsonl", saved["step"])
        return {
            "step": saved["step"],
            "tokens": saved["tokens"],
            "sums": saved.get("sums", torch.zeros(6)),  # an older version's may lack them
            "best": best or (0, math.inf),
            "evaluated": evaluated if best else 0,  # else it is made again, and writes best.pt
        }

    def read_best(self) -> tuple[int, float] | None:
        """Trained length and loss of best.pt, which may be newer than the checkpoint; None if there
        is no whole one. (0, inf) if its loss is of another text, or of windows of another size:
        then the next loss takes its place."""
        path = self.out / "best.pt"
        if not path.exists():
            return None
        try:
            file = load_checkpoint(path)
        except ValueError as error:
            info(f"{error}: an evaluation writes it anew")
            return None
        then, now = settings_in(file), asdict(self.config)
        length = len(self.data.val)
        same_text = data_folder(then["data"]).resolve() == data_folder(now["data"]).resolve()
        same_text = same_text and file.get("val_length", length) == length
        of_a_part = "val_tokens" in file and "val_loss_part" not in file  # by an older version
        same_text = same_text and not of_a_part
        if not (same_text and then["block_size"] == now["block_size"]):
            info(f"{path} has the loss of another text or windows: the next evaluation replaces it")
            return 0, math.inf
        return file.get("trained_length", then["block_size"]), file["val_loss"]

    def begin(self, files):
        """A new run takes the folder over: only now that compiler and memory have sufficed."""

        def replace():
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
            for file in files:
                (self.out / file.name).unlink(missing_ok=True)  # it may be read-only
                shutil.copyfile(file, self.out / file.name)

        on_first(replace)
        if self.at_start:
            self.write_line(0, 0, self.at_start)

    # -- After every step --

    def advance(self, tokens: int, finite: bool):
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        self.clock.steps += 1

    def log_step(self, losses: Tensor, vio: Tensor, finite: bool, lr: float, norm: Tensor):
        """When it is time, a line with the means of losses and MaxVio since the last line."""
        self.sums[:4] += torch.stack((*losses, vio))
        self.sums[4] += not finite
        self.sums[5] += 1
        if self.last or self.lost or self.step % self.config.log_every == 0:
            *sums, skipped, steps = self.sums.tolist()
            self.sums.zero_()
            names = ("loss", "mtp_loss", "balance_loss", "max_vio")
            line = {name: x / steps for name, x in zip(names, sums, strict=True)}
            speed = self.clock.measure(self.tokens)
            line |= {"lr": lr, "grad_norm": float(norm), "tokens_per_s": round(speed, 1)}
            steps_left = self.config.steps - self.step
            tokens_left = steps_left * self.config.batch_size * self.config.block_size
            skips = f", {skipped:.0f} skipped: gradient not finite" if skipped else ""
            self.show(line, self.clock.time_left(tokens_left) + skips)
            self.write_line(self.step, self.tokens, line)
        self.clock.tell_if_busy()

    def show(self, values: dict, more: str = ""):
        numbers = ", ".join(f"{k} {v:.5g}" for k, v in values.items() if isinstance(v, float))
        info(f"step {self.step}/{self.config.steps}: {numbers}{more}")

    def write_line(self, step: int, tokens: int, values: dict):
        """A line of log.jsonl."""
        line = to_json({"step": step, "tokens": tokens} | values) + "\n"

        def append():
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(line)

        on_first(append)

    def way_on(self) -> str:
        """Where a run that stops here can go on."""
        if not self.saved_step:
            return "nothing is saved: begin again" + " with --overwrite" * holds_run(self.out)
        return f"go on from step {self.saved_step}, in {self.out}/ckpt.pt, with --resume"

    def give_up(self):
        """Raises ValueError: the gradients of the last steps were not finite."""
        n, step = self.bad_in_a_row, self.step
        if n > 1 or not self.saved_step:
            bad = f"{n} gradient(s) up to step {step} are not finite"
            raise ValueError(f"{bad}; {self.way_on()} and a lower --lr.")
        # A run to the same last step would end like this again; one with more steps leaves it out.
        bad = f"the gradient of step {step}, the last one, is not finite"
        raise ValueError(f"{bad}; {self.way_on()} and --steps={step + 1}.")

    def save(self, name: str, **more):
        """Every rank calls it, since sharded tensors are gathered; the first one writes."""
        state = {
            "model_config": asdict(self.model.config),
            "train_config": asdict(self.config),
            "model": self.dcp.get_model_state_dict(self.model, options=self.whole),
            "trained_length": self.model.trained_length,
            "val_length": len(self.data.val),  # best.pt's loss is compared on the same text only
            "step": self.step,
            "tokens": self.tokens,
            "sums": self.sums,
        }
        path = self.out / name
        on_first(lambda: write_atomically(path, lambda file: torch.save(state | more, file)))

    def checkpoint(self):
        """ckpt.pt, when it is time, and before an evaluation, in which the run may be killed."""
        times = self.config.save_every, self.config.eval_every
        due = self.last or self.stopped or any(self.step % n == 0 for n in times)
        if due and not self.bad_in_a_row:  # a bad gradient's weights may be spoilt: keep the older
            args = self.model_and_optimizers
            moments = self.dcp.get_optimizer_state_dict(*args, options=self.whole)
            self.save("ckpt.pt", optimizer=moments.get("state", {}))  # other ranks get none
            self.saved_step = self.step

    def evaluate(self):
        """When it is time, the validation loss, and best.pt if it is the lowest so far."""
        due = self.last or self.step % self.config.eval_every == 0
        if due and not self.stopped and self.evaluated_step != self.step:
            result = self.measure()
            if self.better(result["val_loss"]):
                self.best_length, self.best_loss = self.model.trained_length, result["val_loss"]
                self.save("best.pt", **{k: v for k, v in result.items() if k.startswith("val")})
            # After best.pt: a resumed run takes an evaluation that is in the log for finished.
            self.write_line(self.step, self.tokens, result)
            self.clock.restart(self.tokens)

    def evaluate_start(self):
        """Measures the weights that a new run starts from. `begin` writes the line into the log."""
        self.at_start = self.measure()
        self.clock.restart(self.tokens)

    def measure(self) -> dict:
        result = evaluate(self.model, self.data, self.config, self.machine)
        self.model.train()
        self.show(result)
        return result

    def better(self, loss: float) -> bool:
        """Whether these weights replace best.pt. Their loss must be finite. Weights trained for
        longer windows always win; at the same length the lower loss wins."""
        longer = self.model.trained_length > self.best_length
        as_long = self.model.trained_length == self.best_length
        return math.isfinite(loss) and (longer or (as_long and loss < self.best_loss))


# ---- Training ------------------------------------------------------------------------------------


def backward(model: DeepSeekV3, trainer: nn.Module, batches, weights, machine: Machine) -> Tensor:
    """Gradients of L_main + lambda L_MTP + alpha sum_layers L_Bal, averaged over the micro-batches
    (B, T + 1); weights are lambda and alpha. Returns the three losses before their weights (3,)."""
    mtp_weight, alpha = weights
    losses = 0.0
    for i, batch in enumerate(batches, 1):
        last = i == len(batches)  # only then gradients are averaged over the processes
        trainer.require_backward_grad_sync = last  # DDP's
        if hasattr(trainer, "set_requires_gradient_sync"):  # FSDP's
            trainer.set_requires_gradient_sync(last)
        x, y = to_device(batch, machine.device)
        with machine.autocast():
            main, mtp, balance = trainer(x, y)
        loss = main + mtp_weight * mtp + alpha * model.config.moe_layers * balance
        (loss / len(batches)).backward()
        losses += torch.stack((main, mtp, balance)).detach() / len(batches)
    return losses


def clip_gradients(model: DeepSeekV3, config: TrainConfig) -> Tensor:
    """The norm of all gradients together, before they are scaled down to config.clip at most."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's is cut up


# In a trial (docs/notes/LOG.md) 4 and 6 epochs of a small text gave about the same validation loss,
# and 10 a much higher one. Up to 4 cost little in Muennighoff et al. (arXiv 2305.16264), too.
FEW_EPOCHS, MANY_EPOCHS = 5, 8


def tell_plan(model: DeepSeekV3, data, config: TrainConfig, machine: Machine, resumed: bool):
    """What is to be trained, where, and on how much text."""
    total, active, mtp = (f"{n / 1e6:.2f}M" for n in model.parameter_counts().values())
    info(f"model: {total} parameters, {active} active per token, MTP {mtp} more")
    where = f"{machine.world} x {machine.device} in {config.dtype} ({machine.why})"
    info(f"run: {config.steps} steps on {where}")
    length = len(data.train)
    read = sum(batch_at(config, step) for step in range(config.steps)) * config.block_size
    epochs = read / length
    shown = f"{epochs:.1f}" if epochs >= 1 else f"{epochs:.2g}"
    info(f"text: {length:,} tokens; the run reads {read:,}, which makes {shown} epochs")
    if epochs > MANY_EPOCHS and not resumed:
        steps = max(1, round(config.steps * FEW_EPOCHS / epochs))
        told = f"in more than {MANY_EPOCHS} epochs the model learns its text by heart"
        info(f"{told}; give --steps={steps} for {FEW_EPOCHS}")
    c = model.config
    if c.moe_layers and c.num_experts_per_tok == 1 and c.norm_topk_prob:
        told = "one expert per token, whose gate value norm_topk_prob makes 1"
        info(f"{told}: the main loss teaches the gate nothing; give --norm_topk_prob=False")


def train(model: DeepSeekV3, data, config: TrainConfig, machine: Machine, saved=None, files=()):
    """Runs `config.steps` optimiser steps. `saved` is the checkpoint to go on from, which process 0
    has read; it is emptied. `files` are copied into the folder of a new run. After a signal the run
    saves a checkpoint and raises KeyboardInterrupt."""
    tell_plan(model, data, config, machine, resumed=saved is not None)
    model.trained_length = max(model.trained_length, config.block_size)
    trainer = wrap(model.train(), config, machine)
    optimizers = make_optimizers(model, config)
    run, stop = Run(model, optimizers, data, config, machine), Stop()

    with stop.listen(run.way_on):
        if saved is not None:
            run.restore(saved)
            run.evaluate()  # where the run ended between saving that step and evaluating it
        elif config.init_from:
            run.evaluate_start()

        while not (run.last or run.stopped):
            step = run.step
            if extended(config, step):
                extend_context(model, config)
            windows = train_windows(data, config, step)
            batches = micro_batches(windows, config, machine)

            with fp8.quantized_once(model):
                weights = mtp_weight_at(config, step), config.alpha
                losses = backward(model, trainer, batches, weights, machine)

            norm = clip_gradients(model, config)
            finite = bool(norm.isfinite())  # here the host waits for the GPU, once a step

            lr = lr_at(config, step)
            if finite:  # else the step is left out
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr * group["lr_scale"]
                    optimizer.step()
            model.zero_grad(set_to_none=True)

            vio = max_vio(machine.sum(model.expert_counts))
            model.update_bias(gamma_at(config, step) if finite else 0.0)

            if step == 0:  # a whole step has fitted into memory: only now an old run is replaced
                run.begin(files)
            run.advance(windows[:, 1:].size, finite)
            run.log_step(machine.sum(losses) / machine.world, vio, finite, lr, norm)
            if run.lost:
                on_first(run.give_up)
            run.stopped = stop.agreed(machine)
            run.checkpoint()
            run.evaluate()
    if run.stopped:
        bad = ", whose gradient was not finite" if run.bad_in_a_row else ""
        info(f"stopped at step {run.step}{bad}; {run.way_on()}.")
        raise KeyboardInterrupt  # so that no script takes the run for finished


# ---- The command ---------------------------------------------------------------------------------

RUN_FILES = ("ckpt.pt", "best.pt", "log.jsonl", "plot.png")  # the last is bench.py's
# They have no weights, so they may change, as in the last phase.
CONTEXT_KEYS = {"rope_scaling", "max_position_embeddings"}

# A setting may be given in several places. Each of these overrules those above it (see `settle`):
#   the default in TrainConfig or ModelConfig
#   the config file
#   the checkpoint that is resumed or evaluated, so that a run keeps its settings though the file
#       has changed since
#   the command line
# A checkpoint has no say in the settings of the command, which differ from one to the next:
OF_THE_COMMAND = {"resume", "overwrite", "init_from", "eval_only", "device", "out"}


def split_configs(values: dict) -> tuple[dict, dict]:
    """The keys of ModelConfig, and the others."""
    model = {k: v for k, v in values.items() if k in ModelConfig.__dataclass_fields__}
    return model, {k: v for k, v in values.items() if k not in model}


def read_command(argv: list[str]) -> tuple[TrainConfig, dict, dict]:
    """What the command is to do (OF_THE_COMMAND), and the settings in the config file and on the
    command line."""
    about = "Train a DeepSeek-V3: python train.py config/small.py [--key=value]"
    file, given = parse_args(about, argv, TrainConfig, ModelConfig, positional="config")
    given |= with_home(given, "out", "data", "init_from")
    if given.get("out") == "":  # the default
        del given["out"]
    in_file = {}
    if file:
        in_file = read_config_file(file, ModelConfig, TrainConfig)
        in_file["out"] = in_file.get("out") or f"out/{Path(file).stem}"
        if says := ast.get_docstring(ast.parse(Path(file).read_bytes())):
            first, _, _ = says.partition("\n\n")
            info(f"{file}: {' '.join(first.split())}")
    here = in_file | given
    command = TrainConfig(**{k: v for k, v in here.items() if k in OF_THE_COMMAND})
    if command.eval_only and not given.get("init_from") and holds_run(Path(command.out)):
        command.init_from = ""  # the file's: what the run began with
    if command.eval_only:  # there must be weights
        enough = command.out or command.init_from
    else:  # there must be a network, and a folder for the run
        enough = file or (command.out and (command.resume or command.init_from))
    if not enough:
        info("usage: name a config file, for example: python train.py config/small.py")
        sys.exit(2)
    if command.resume and (given.get("init_from") or given.get("overwrite")):
        raise ValueError("--resume goes on with a run: leave out --init_from and --overwrite.")
    if command.init_from and not command.eval_only:
        out, source = Path(command.out).resolve(), Path(command.init_from).resolve()
        if out in (source, source.parent):
            raise ValueError(f"{command.init_from} would be overwritten: give another --out.")
    return command, in_file, given


def holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in RUN_FILES)


def source_of(command: TrainConfig) -> Path | None:
    """Where the command's weights are; None for a new network."""
    if command.resume:
        return Path(command.out) / "ckpt.pt"
    if command.init_from:
        return Path(command.init_from)
    return Path(command.out) if command.eval_only else None  # a folder's best.pt is preferred


def check_out(command: TrainConfig):
    """Raises ValueError where a run is in the way, or none is there to go on with."""
    out, saved = command.out, (Path(command.out) / "ckpt.pt").exists()
    if command.resume and not saved:
        instead = "give --overwrite instead" if holds_run(Path(out)) else "begin without --resume"
        raise ValueError(f"{out} has no ckpt.pt to go on from: {instead}.")
    new_run = not (command.resume or command.eval_only)
    if new_run and holds_run(Path(out)) and not command.overwrite:
        resume = "--resume, " if saved else ""
        raise ValueError(f"{out} holds a run: give {resume}--overwrite, or another --out.")


def settings_in(saved: dict) -> dict:
    """The settings that a checkpoint decides: all but OF_THE_COMMAND. One that did not exist when
    it was saved has its default, which is how the run behaved."""
    default = asdict(TrainConfig()) | asdict(ModelConfig())
    values = default | saved["train_config"] | saved["model_config"]
    return {key: values[key] for key in default if key not in OF_THE_COMMAND}


def settle(in_file: dict, saved: dict | None, given: dict) -> tuple[TrainConfig, dict]:
    """Merges the config file, a checkpoint (`saved`, which is resumed or evaluated) and the command
    line. Returns the training settings, and the network's keys that were given."""
    stored = settings_in(saved) if saved else {}
    network, settings = split_configs(in_file | stored | given)
    config = TrainConfig(**settings)
    if saved is None or given.keys() & set(PHASES):  # an older run may have what was allowed then
        config.check_order()
    if stored:
        tell_changes(in_file, stored, given)
    elif network and not config.init_from:
        absent = [key for key in ModelConfig.__dataclass_fields__ if key not in network]
        told = f"keys of the network that are not set, and so as in V3: {', '.join(absent)}"
        info(textwrap.fill(told, 99, subsequent_indent="    "))
    tell_unused(config, given)
    return config, network


def tell_changes(in_file: dict, stored: dict, given: dict):
    """Says where a checkpoint's setting has been overruled, and where it overrules the file's."""
    for key, value in stored.items():
        if key in given:
            if given[key] != value:
                info(f"{key} is now {given[key]} (was {value})")
        elif in_file.get(key, value) != value and key != "rope_scaling":  # the run has set that
            info(f"{key} stays {value} (the config file has {in_file[key]})")


def tell_unused(config: TrainConfig, given: dict):
    """Names options of the command line that do nothing without another one."""
    needs = {
        "adamw_lr": (config.optimizer == "muon", "--optimizer=muon"),
        "long_start": (config.long_block_size, "--long_block_size"),
        "batch_ramp": (config.batch_start, "--batch_start"),
        "parallel": (dist.is_initialized(), "torchrun, and more than one process"),
    }
    for key, (used, other) in needs.items():
        if key in given and not used:
            info(f"--{key} has no effect here: it needs {other}")


def tell_start(source: Path, model: DeepSeekV3, config: TrainConfig):
    """Names the weights that a run starts from. Warns if lr is not below the rate that they were
    trained with."""
    count = f"{model.parameter_counts()['total'] / 1e6:.2f}M parameters"
    if (source / "config.json").exists():
        info(f"start: from {source}, a Hugging Face directory, {count}")
        return
    file = checkpoint_file(source)
    saved = load_checkpoint(file)
    info(f"start: from {file}, step {saved['step']}, {count}")
    before = settings_in(saved)["lr"]
    if config.lr >= before:
        info(
            f"lr is {config.lr:g}, and {file} was trained with {before:g} at most: it may forget "
            f"what it has learnt; try a tenth, --lr={before / 10:g}"
        )


def load_for_all(source: Path, place: torch.device | str, dtype: torch.dtype):
    """The network of these weights, and their tokenizer (None on other processes than 0). Process 0
    reads them and sends the weights to the others."""
    read = on_all(lambda: load_model(source, place, dtype) if is_first() else None)
    model, tokenizer, _ = read or (None, None, None)
    if dist.is_initialized():
        shape, length = on_first(lambda: (model.config, model.trained_length))
        if not model:
            with torch.device("meta"):
                model = DeepSeekV3(shape)
            model.to(dtype).materialize(place)
            model.trained_length = length
        for x in model.state_dict().values():
            dist.broadcast(x, 0)
    return model, tokenizer


def open_network(config: TrainConfig, network: dict, source: Path | None, machine: Machine):
    """The network, new or from weights, and the tokenizer of these weights (on process 0)."""
    sharded = machine.world > 1 and config.parallel == "fsdp" and not config.eval_only
    place = "cpu" if sharded else machine.device  # FSDP moves the model block by block
    dtype = torch.float64 if config.dtype == "float64" else torch.float32  # of weights, optimiser
    if not source:
        if not network:
            raise ValueError("the config file has no sizes of the network: take config/small.py's.")
        model = DeepSeekV3(ModelConfig(**network)).to(place, dtype)
        model.trained_length = 0
        return model, None
    model, tokenizer = load_for_all(source, place, dtype)
    for key, value in network.items():
        have = getattr(model.config, key)
        if key not in CONTEXT_KEYS and value != have:
            raise ValueError(f"{key} is {value} here, but {have} in {source}: it cannot change.")
        if key == "max_position_embeddings" and value < model.trained_length:
            info(f"{key} is {value}, but {source} was trained for {model.trained_length} tokens")
        setattr(model.config, key, value)  # all layers share the object
    model.config.__post_init__()  # checks the new values
    return model, tokenizer


def check_settings(config: TrainConfig, model: DeepSeekV3, machine: Machine, first: int):
    """Raises ValueError where windows do not fit the network or cannot be shared out (from the step
    `first` on), and where --compile would only cost time."""
    long, limit = config.long_block_size, model.config.max_position_embeddings
    longest = max(config.block_size, long)
    if longest > limit:
        raise ValueError(f"windows of {longest} tokens exceed max_position_embeddings, {limit}.")
    # MTP module k needs k + 1 tokens before it has a target. And windows below 8 tokens make the
    # batches of an evaluation so small that the Python around them takes most of the time.
    least = max(8, 1 + model.config.num_nextn_predict_layers)
    if config.block_size < least:
        raise ValueError(f"block_size is {config.block_size}, but must be at least {least} here.")
    if config.eval_only:  # compiles nothing and has no steps
        return
    if config.compile and machine.device.type == "cpu" and machine.dtype != torch.bfloat16:
        slow = "compiles for minutes on a CPU and gains nothing"
        raise ValueError(f"--compile in {config.dtype} {slow}: give --compile=False.")
    trained = max(model.trained_length, config.block_size)
    if 0 < long < trained:
        less = f"long_block_size is {long}, less than the {trained} trained before"
        raise ValueError(f"{less}: give --long_block_size=0, or {trained} at least.")
    parts = machine.world * config.grad_accum
    for step in range(first, config.steps):
        tokens, T = batch_at(config, step) * config.block_size, block_at(config, step)
        if tokens % (T * parts):
            uneven = f"the {tokens} tokens of step {step} are no multiple of {parts} micro-batches"
            raise ValueError(f"{uneven} (processes x grad_accum) of windows of {T} tokens.")


def run(argv: list[str]):
    join_processes()  # before all else, so that process 0 can decide for all
    command, in_file, given = on_first(lambda: read_command(argv))
    out, source = Path(command.out), source_of(command)
    # A run that is being trained may be read all the while.
    with nullcontext() if command.eval_only else only_writer(out):
        on_first(lambda: check_out(command))
        saved = None  # what is resumed or evaluated; process 0 alone has its contents
        if command.resume or (command.eval_only and not command.init_from):
            saved = on_all(lambda: load_checkpoint(source) if is_first() else {})
        config, network = on_first(lambda: settle(in_file, saved, given))
        machine = processes.start(config)
        torch.manual_seed(config.seed)
        model, tokenizer = on_all(lambda: open_network(config, network, source, machine))
        first = on_first(lambda: saved["step"] if command.resume else 0)
        on_all(lambda: check_settings(config, model, machine, first))
        data, folder = open_data(config, model.config.vocab_size)
        if source:
            on_first(lambda: check_tokenizer(source, tokenizer, folder))
        if config.fp8:
            on_all(lambda: fp8.use_fp8(model))
        if config.eval_only:
            result = evaluate(model, data, config, machine)
            del result["expert_load"]
            if is_first():
                print(to_json(result))
            return
        if config.init_from and not config.resume:  # a config file may name init_from
            on_first(lambda: tell_start(source, model, config))
        train(model, data, config, machine, saved, tokenizer_files(folder))
        torch.use_deterministic_algorithms(False)  # sampling has no use for it
        if is_first() and (out / "best.pt").exists():  # else no loss was finite
            tokens = data.val.arrays[0][1:9].tolist()
            prompt = stored_tokenizer(folder).decode(tokens, errors="ignore")
            show_result(config, prompt.strip())


def show_result(config: TrainConfig, prompt: str):
    """The last lines of a run: its validation loss, a short sample, how to get more."""
    best = load_checkpoint(Path(config.out) / "best.pt")
    had = asdict(config) | best["train_config"]  # which a resumed run may have changed since
    text = f"{best['val_bpb']:.4f} bits/byte in windows of {had['block_size']} tokens"
    if "val_bpb_long" in best:
        text += f", {best['val_bpb_long']:.4f} in windows of {had['long_block_size']}"
    info(f"\nbest validation loss: {best['val_loss']:.4f} nats/token, {text}. A sample:\n")
    options = ("--max_new_tokens=120", "--seed=1", f"--device={config.device}")
    try:
        sample.main([f"--ckpt={config.out}", f"--prompt={prompt}", *options])
    except (ValueError, RuntimeError) as error:  # the run itself has ended well
        info(f"no sample: {error!s:.200}")
    start = shlex.quote(prompt[:20].partition("\n")[0])
    info(f"\nMore: python sample.py {shlex.quote(config.out)} --prompt={start}")


def main(argv: list[str]):
    try:
        run(argv)
    except RuntimeError as error:
        why = str(error)
        if "out of memory" in why or "can't allocate memory" in why:
            told = "out of memory: raise --grad_accum or give --recompute; in an evaluation,"
            raise ValueError(f"{told} lower --eval_batch; else take a smaller network.") from None
        if isinstance(error, torch._dynamo.exc.ShortenTraceback):  # no C++ compiler, no Triton
            raise ValueError(f"--compile cannot be used here ({why:.200}); leave it out") from error
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
