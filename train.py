"""Train a DeepSeek-V3: python train.py config/small.py [--key=value].

    data/<name>/ + config/*.py -> out/<name>/
        ckpt.pt      everything a run needs to go on: weights, optimiser, step, random state
        best.pt      the weights with the lowest validation loss
        log.jsonl    one JSON object per logged step or evaluation
        tokenizer.tiktoken, meta.json    what sample.py needs besides

The loss is L_main + lambda * mean_k L_MTP^k + alpha * sum_layers L_Bal (report, sections 2.1.2 and
2.2), the schedules are those of section 4.2 in fractions of the run. One optimiser step sees
batch_size windows of block_size tokens, drawn from (seed, step) alone and then cut up over ranks
and micro-batches, so any number of processes, and a resumed run, see the same data.

On several GPUs or nodes: torchrun --nproc_per_node=N train.py config/x.py (README).

Shapes: B windows, T block_size, E routed experts.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fp8
import prepare_data
import sample
from config import info, parse_args, read_config_file, run_command
from huggingface import load_checkpoint, load_model
from model import DeepSeekV3, ModelConfig, expert_counts


@dataclass
class TrainConfig:
    """Everything about a run that is not the network's shape."""

    data: str = "stdlib"  # folder under data/ made by prepare_data.py, or its path
    out: str = ""  # the run's folder (default: out/<name of the config file>)
    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # windows per step, over all ranks and micro-batches
    block_size: int = 256  # tokens per window
    grad_accum: int = 1  # micro-batches per step and rank
    batch_start: int = 0  # windows in the first step, growing in multiples of it (0: constant)
    batch_ramp: float = 0.032  # fraction of the run in which it grows (469B of 14.8T tokens)
    # optimiser and schedule; "fraction" is of the run, the report's values are the defaults
    optimizer: str = "adamw"  # or muon, for the matrices: learns more per step (docs/LOG.md)
    lr: float = 2.2e-4  # peak learning rate
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
    dtype: str = "auto"  # of the products: auto, float32, bfloat16; float64 computes all in it
    fp8: bool = False  # FP8 products (fp8.py)
    compile: bool = False  # torch.compile the blocks
    recompute: bool = False  # activation checkpointing: less memory, a third more work
    parallel: str = "ddp"  # with several processes: ddp, or fsdp to shard weights and optimiser
    # the run
    eval_every: int = 250  # steps between evaluations of the whole validation file
    eval_batch: int = 16  # windows per evaluation batch and rank
    save_every: int = 250  # steps between checkpoints
    log_every: int = 10  # steps between lines in log.jsonl
    logger: str = ""  # also log to tensorboard or wandb
    resume: bool = False  # go on from the run's ckpt.pt
    overwrite: bool = False  # replace an existing run
    init_from: str = ""  # start from the weights of a run, checkpoint or Hugging Face directory
    eval_only: bool = False  # evaluate the run's (or init_from's) weights and stop

    def __post_init__(self):
        positive = ("steps", "batch_size", "block_size", "grad_accum", "eval_batch")
        for name in (*positive, "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name, choices in (
            ("dtype", ("auto", "float32", "bfloat16", "float64")),
            ("optimizer", ("adamw", "muon")),
            ("parallel", ("ddp", "fsdp")),
            ("logger", ("", "tensorboard", "wandb")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from {choices}.")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("muon needs whole matrices, but fsdp cuts them up; choose adamw.")
        if self.batch_start and self.batch_size % self.batch_start:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of batch_start "
                f"{self.batch_start}, in whose multiples the batch grows."
            )


# ---- Schedules (section 4.2) ---------------------------------------------------------------------


def lr_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, cosine to min_lr, min_lr, final_lr. `step` counts from 0."""
    x = step / config.steps
    if x < config.warmup:
        return config.lr * (step + 1) / max(1, config.warmup * config.steps + 1)
    if x < config.decay_start:
        return config.lr
    if x < config.decay_end:
        along = (x - config.decay_start) / (config.decay_end - config.decay_start)
        return config.lr * (
            config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * along))
        )
    return config.lr * (config.min_lr if x < config.final_start else config.final_lr)


def batch_at(config: TrainConfig, step: int) -> int:
    """Windows in this step: multiples of batch_start, growing evenly to batch_size."""
    if not config.batch_start:
        return config.batch_size
    stages = config.batch_size // config.batch_start
    stage = 1 + int(stages * step / max(1, config.batch_ramp * config.steps))
    return config.batch_start * min(stage, stages)


# ---- Processes -----------------------------------------------------------------------------------


@dataclass
class Machine:
    """Where this process runs and what it computes in."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def master(self) -> torch.dtype:
        """The dtype of weights and optimiser."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def autocast(self):
        low = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    def sum(self, x: Tensor) -> Tensor:
        """x added up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


def start_machine(config: TrainConfig) -> Machine:
    """Choose device and dtype; under torchrun also join the other processes."""
    local, rank, world = (int(os.environ.get(k, d)) for k, d in _TORCHRUN)
    name = config.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local}"
    elif name == "auto" and world > 1:  # an mps device is for one process
        name = "cpu"
    device = sample.usable_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    elif device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    else:  # slow in software, four times faster than float32 where the CPU has it
        has = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        dtype = torch.bfloat16 if has else torch.float32
    if world > 1:  # gloo beside nccl: flags that stay on the CPU never wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return Machine(device, dtype, rank, world)


_TORCHRUN = (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1))


def wrap(model: DeepSeekV3, config: TrainConfig, machine: Machine) -> nn.Module:
    """The module whose call trains: compiled, and averaging gradients over the processes."""
    model.recompute = config.recompute
    blocks = [*model.layers, *model.mtp]
    if config.compile:
        for block in blocks:
            block.compile()
    if machine.world > 1 and config.parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(machine.device.type, (machine.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if machine.world > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        # Expert counts differ between ranks until update_bias; DDP must not overwrite them.
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # its successor is torch 2.13's
        return DistributedDataParallel(model, ids, broadcast_buffers=False)
    return model


def sync_gradients(trainer: nn.Module, on: bool):
    """Context of one micro-batch: gradients are averaged over the processes only in the last."""
    if hasattr(trainer, "set_requires_gradient_sync"):  # FSDP
        trainer.set_requires_gradient_sync(on)
    elif not on and isinstance(trainer, DistributedDataParallel):
        return trainer.no_sync()
    return contextlib.nullcontext()


# ---- Optimiser -----------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: Muon as in Moonlight (arXiv 2502.16982).

    Parameters are matrices (out, in) or stacks of them (E, out, in), every matrix orthogonalised by
    itself and scaled to the usual size of AdamW's updates. Results are those of torch.optim.Muon,
    which takes hundreds of experts one after another; here matrices of one shape are one batch.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, same = group["lr"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same[p.shape[-2:]].append(p)
            for shape, params in same.items():
                updates = [self.nesterov(p, group["momentum"]).view(-1, *shape) for p in params]
                sizes = [len(x) for x in updates]
                for p, x in zip(params, orthogonal(torch.cat(updates)).split(sizes), strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(x.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(shape)))

    def nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The update before it is made orthogonal, in bf16 (float64 stays)."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(state["momentum_buffer"], momentum)
        return update if update.dtype == torch.float64 else update.bfloat16()


def orthogonal(x: Tensor) -> Tensor:
    """x (n, a, b) with all singular values brought near 1, by five steps of the Newton-Schulz
    iteration of Jordan et al. (2024) with their coefficients."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, as in the report; or Muon for the matrices of attention, FFN, experts and
    eh_proj, as in Moonlight (arXiv 2502.16982), and AdamW for the rest, with one learning rate."""
    parameters = dict(model.named_parameters())
    other = re.compile(r"embed_tokens|lm_head|gate\.weight")
    matrices = {}
    if config.optimizer == "muon":
        matrices = {n: p for n, p in parameters.items() if p.ndim > 1 and not other.search(n)}
    rest = [p for n, p in parameters.items() if n not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices.values(), config.lr, config.weight_decay)]


def whole(x: Any) -> Any:
    """A state dict's value in full on the CPU of rank 0 (all ranks gather a sharded tensor)."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    if isinstance(x, list):
        return [whole(value) for value in x]
    if isinstance(x, Tensor):
        full = x.full_tensor() if hasattr(x, "full_tensor") else x
        writes = not dist.is_initialized() or dist.get_rank() == 0
        return full.detach().cpu() if writes else None
    return x


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict):
    """The inverse of whole(optimizer.state_dict()): cut up again as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if max(state["state"], default=0) >= len(parameters):
        raise ValueError("the checkpoint's optimiser is of an older version; use --init_from.")
    for index, values in state["state"].items():
        p = parameters[index]
        if hasattr(p, "full_tensor"):
            for key, value in values.items():
                if value.shape == p.shape:
                    values[key] = dist.tensor.distribute_tensor(
                        value.to(p.device), p.device_mesh, p.placements
                    )
    # The settings are those of this run, not of the saved one.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


# ---- Data and evaluation -------------------------------------------------------------------------


def train_windows(data: prepare_data.Dataset, config: TrainConfig, step: int) -> np.ndarray:
    """The step's windows (B, T + 1), from (seed, step) alone."""
    rng = np.random.default_rng((config.seed, step))
    T = config.block_size
    starts = rng.integers(0, len(data.train) - T, size=batch_at(config, step))
    return data.train.windows(starts, T + 1)


def to_device(windows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows (B, T + 1) -> tokens (B, T) and the next tokens (B, T)."""
    x = torch.from_numpy(windows)
    if device.type == "cuda":
        x = x.pin_memory()
    x = x.to(device, non_blocking=True)
    return x[:, :-1], x[:, 1:]


def max_vio(counts: Tensor) -> Tensor:
    """(max - mean) / mean of the loads (layers, E), averaged over the layers (LF Eq. 4)."""
    if not len(counts):
        return counts.new_zeros((), dtype=torch.float32)
    load = counts.float()
    return (load.amax(1) / load.mean(1).clamp(min=1e-9) - 1).mean()


@torch.no_grad()
def evaluate(
    model: DeepSeekV3, data: prepare_data.Dataset, config: TrainConfig, machine: Machine
) -> dict[str, Any]:
    """Loss over the whole validation file, every token predicted once, in windows side by side."""
    model.eval()
    T, step, c = config.block_size, config.eval_batch * machine.world, model.config
    starts = np.arange(0, len(data.val) - 1, T)
    padding = -len(starts) % step  # every rank runs the same number of batches
    groups = c.n_group
    double = torch.float32 if machine.device.type == "mps" else torch.float64  # mps has no float64
    loss = torch.zeros(4, dtype=double, device=machine.device)  # summed nats and tokens: main, MTP
    nodes = torch.zeros(2, dtype=double, device=machine.device)  # groups touched, tokens x layers
    counts = torch.zeros(c.moe_layers, c.n_routed_experts, dtype=torch.long, device=machine.device)
    starts = np.concatenate((starts, np.full(padding, len(data.val) - 1)))
    bar = tqdm(
        range(machine.rank * config.eval_batch, len(starts), step),
        desc="evaluate", unit="batch", leave=False, disable=True if machine.rank else None,
    )  # fmt: skip
    for first in bar:
        rows = np.full((config.eval_batch, T + 1), -1, dtype=np.int64)
        for row, start in zip(rows, starts[first : first + config.eval_batch], strict=True):
            tokens = data.val.arrays[0][start : start + T + 1]
            row[: len(tokens)] = tokens
        x = torch.from_numpy(rows).to(machine.device)
        with machine.autocast():
            main, mtp, _ = model(x[:, :-1].clamp(min=0), x[:, 1:])
        real = x[:, 1:] >= 0  # (B, T) rows with something to predict
        n, n_mtp = real.sum(), real[:, 1:].sum()
        loss += torch.stack((main * n, n, mtp * n_mtp, n_mtp))
        for layer, chosen in enumerate(model.routing):
            # MTP module k (from 1) has k rows fewer, and predicts the targets of the last ones.
            used = chosen[real[:, -chosen.shape[1] :]]  # (tokens, K)
            counts[layer] += expert_counts(used, c.n_routed_experts)
            touched = torch.zeros(len(used), groups, device=used.device, dtype=torch.bool)
            touched.scatter_(1, used // (c.n_routed_experts // groups), True)
            nodes += torch.stack((touched.sum(), nodes.new_tensor(len(used))))
    for x in (loss, counts, nodes):
        machine.sum(x)
    model.train()
    nats, n, mtp, n_mtp = loss.tolist()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    result = {
        "val_loss": nats / n,
        "val_bpb": nats / n / math.log(2) / data.val_bytes_per_token,
        "val_mtp_loss": mtp / max(1, n_mtp),
        "max_vio_global": max_vio(counts).item(),
    }
    if len(counts):
        result["nodes_per_token"] = (nodes[0] / nodes[1]).item()
        result["experts_per_node"] = c.num_experts_per_tok / result["nodes_per_token"]
        result["expert_load"] = [[round(v, 5) for v in row] for row in share.tolist()]
    return result


# ---- The run's folder ----------------------------------------------------------------------------


def save_atomically(state: dict[str, Any], path: Path):
    """A file that is either the old one or the new one, whatever happens in between."""
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch raises its own on top
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        met = (error, error.__context__)
        reason = next((e.strerror for e in met if isinstance(e, OSError) and e.errno), error)
        kept = f"the earlier {path} is intact" if path.exists() else "nothing was saved before"
        raise OSError(
            f"cannot write {path} ({str(reason).splitlines()[0]}); {kept}, free some space and "
            f"continue with --resume."
        ) from None


def write_log(path: Path, line: dict[str, Any]):
    """Appends a JSON object, in which NaN and infinity have no name: they become null."""
    nan = {k: None for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
    line = line | nan
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def cut_log(path: Path, step: int):
    """Forgets the lines after `step`: the resumed run will write them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
        part = path.with_name(path.name + ".tmp")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, path)


def open_logger(kind: str, out: Path, config: dict[str, Any]):
    """A function (step, values) that also logs to tensorboard or wandb."""
    if not kind:
        return lambda step, values: None
    try:
        if kind == "wandb":
            import wandb

            run = wandb.init(project="nanoV3", name=out.name, dir=out, config=config)
            return lambda step, values: run.log(values, step=step)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"--logger={kind} needs its package: pip install {kind}") from None
    writer = SummaryWriter(str(out))

    def log(step: int, values: dict[str, float]):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log


# ---- Size and speed ------------------------------------------------------------------------------

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12}  # dense bf16


def flops_per_token(model: DeepSeekV3, T: int) -> float:
    """Forward and backward: 6 per active weight that multiplies, and the causal half of attention.

    The MTP modules and their use of the output head are included.
    """
    c, count = model.config, model.parameter_counts()
    head = c.vocab_size * c.hidden_size
    E, K = c.n_routed_experts, c.num_experts_per_tok
    idle = 3 * c.hidden_size * c.moe_intermediate_size * (E - K)
    mtp = count["mtp"] + len(model.mtp) * (head - idle)
    weights = count["active"] - (0 if c.tie_word_embeddings else head) + mtp
    per_pair = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return 6 * weights + 6 * (c.num_hidden_layers + len(model.mtp)) * per_pair * T / 2


def describe(model: DeepSeekV3, config: TrainConfig, machine: Machine, data) -> str:
    count, T = model.parameter_counts(), config.block_size
    tokens = sum(batch_at(config, step) for step in range(config.steps)) * T
    state = 16 * (count["total"] + count["mtp"]) / 1e9  # weight, gradient, two moments, fp32
    return (
        f"model: {count['total'] / 1e6:.2f}M parameters, {count['active'] / 1e6:.2f}M active per "
        f"token (embedding and head counted), MTP {count['mtp'] / 1e6:.2f}M more; "
        f"{flops_per_token(model, T) / 1e6:.1f} MFLOP per trained token\n"
        f"run: {config.steps} steps, {tokens / 1e6:.2f}M tokens "
        f"({tokens / len(data.train):.2f} passes over {len(data.train) / 1e6:.2f}M) on "
        f"{machine.world} x {machine.device} in {str(machine.dtype).removeprefix('torch.')}"
        f"{' + FP8' if config.fp8 else ''}; weights, gradients and optimiser take {state:.2f} GB"
    )


# ---- Training ------------------------------------------------------------------------------------


def backward(
    model: DeepSeekV3,
    trainer: nn.Module,
    batches: list[np.ndarray],
    weights: tuple[float, float],
    machine: Machine,
) -> Tensor:
    """Gradients of L_main + lambda L_MTP + alpha sum_layers L_Bal, averaged over the micro-batches
    (B, T + 1); weights are lambda and alpha. Returns the three losses before their weights (3,)."""
    (mtp_weight, alpha), losses = weights, 0.0
    for i, batch in enumerate(batches):
        x, y = to_device(batch, machine.device)
        with sync_gradients(trainer, on=i == len(batches) - 1):
            with machine.autocast():
                main, mtp, balance = trainer(x, y)
            loss = main + mtp_weight * mtp + alpha * model.config.moe_layers * balance
            (loss / len(batches)).backward()
        losses += torch.stack((main, mtp, balance)).detach() / len(batches)
    return losses


def train(
    model: DeepSeekV3,
    data: prepare_data.Dataset,
    config: TrainConfig,
    machine: Machine,
    saved: dict | None,
) -> bool:
    """Runs `config.steps` optimiser steps, from `saved` (a checkpoint) if given. False: stopped."""
    out, main_rank, device = Path(config.out), machine.rank == 0, machine.device
    say = info if main_rank else lambda text: None
    step, best = (saved["step"], saved["best"]) if saved else (0, math.inf)
    if saved and saved["train_config"].get("tokenizer_sha256") != data.tokenizer_sha256:
        raise ValueError(f"{out} was trained with another tokenizer than {config.data} has.")

    if step >= config.steps:
        say(f"the run is finished at step {step}: give a larger --steps to go on.")
    say(describe(model, config, machine, data))
    trainer = wrap(model, config, machine)
    optimizers = make_optimizers(model, config)
    if saved:
        for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
            load_optimizer(optimizer, state)
        if machine.rank < len(saved["rng"]):
            torch.set_rng_state(saved["rng"][machine.rank])
    log_path, tokens = out / "log.jsonl", saved["tokens"] if saved else 0
    settings = asdict(config) | {"tokenizer_sha256": data.tokenizer_sha256}
    if main_rank:
        out.mkdir(parents=True, exist_ok=True)
        cut_log(log_path, step)
        for name in ("tokenizer.tiktoken", "meta.json") if not saved else ():
            shutil.copyfile(data_folder(config) / name, out / name)
    extra_log = open_logger(config.logger if main_rank else "", out, settings)

    def log(values: dict[str, Any]):
        if main_rank:
            write_log(log_path, values)
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            extra_log(values["step"], numbers)

    def note(text: str):
        if main_rank:
            bar.write(text, file=sys.stderr)

    def save(name: str, **more):
        """Every rank calls it, since sharded tensors are gathered; the first one writes."""
        weights = whole(model.state_dict())
        if main_rank:
            state = {
                "format": "nanov3",
                "model_config": asdict(model.config),
                "train_config": settings,
                "model": weights,
                "step": step,
                "tokens": tokens,
                "best": best,
            }
            save_atomically(state | more, out / name)

    def save_everything():
        rng = [torch.get_rng_state()] * machine.world
        if machine.world > 1:
            dist.all_gather_object(rng, torch.get_rng_state())
        save("ckpt.pt", optimizer=[whole(x.state_dict()) for x in optimizers], rng=rng)

    def run_evaluation():
        nonlocal best
        result = evaluate(model, data, config, machine)
        log({"step": step, "tokens": tokens, **result})
        note(
            f"step {step}: validation {result['val_loss']:.4f} nats/token = "
            f"{result['val_bpb']:.4f} bits/byte, MTP {result['val_mtp_loss']:.4f}, "
            f"MaxVio {result['max_vio_global']:.3f}"
        )
        if result["val_loss"] < best:
            best = result["val_loss"]
            save("best.pt", **{k: v for k, v in result.items() if k.startswith("val")})

    stop = 0.0  # when a signal asked to

    def ask_to_stop(number, frame):
        nonlocal stop
        if stop and time.monotonic() > stop + 1:  # torchrun passes on what all have got already
            raise KeyboardInterrupt
        stop = stop or time.monotonic()

    handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    bad_in_a_row, skipped = torch.zeros(2, device=device)
    bar = tqdm(  # on a terminal; elsewhere log lines are printed instead
        total=config.steps, initial=step, unit="step", dynamic_ncols=True,
        disable=None if main_rank else True,
    )  # fmt: skip
    flops = flops_per_token(model, config.block_size)
    peak = peak_flops(device) * machine.world
    model.train()
    if not saved:  # from now on whatever happens leaves something to resume
        save_everything()
    clock, clock_tokens = time.perf_counter(), tokens
    try:
        while step < config.steps:
            size = batch_at(config, step)
            windows = train_windows(data, config, step)
            mine = np.split(windows, machine.world * config.grad_accum)
            mine = mine[machine.rank * config.grad_accum : (machine.rank + 1) * config.grad_accum]
            late = step >= config.mtp_switch * config.steps
            weights = config.mtp_weight_late if late else config.mtp_weight, config.alpha
            with fp8.quantized_once(model):
                losses = backward(model, trainer, mine, weights, machine)

            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            bad = (~norm.isfinite()).float()
            bad_in_a_row, skipped = (bad_in_a_row + 1) * bad, skipped + bad
            lr = lr_at(config, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # Fused AdamW skips the step where found_inf is 1 without asking the host.
                optimizer.found_inf = bad
                if not isinstance(optimizer, Muon) or not bad:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.zero_grad(set_to_none=True)
            machine.sum(model.expert_counts)
            vio = max_vio(model.expert_counts)
            gamma = config.gamma if step < config.gamma_stop * config.steps else 0.0
            model.update_bias(gamma * (1 - bad))
            step_tokens = size * config.block_size
            step, tokens = step + 1, tokens + step_tokens
            bar.update()

            last = step == config.steps
            if step % config.log_every == 0 or last:
                machine.sum(losses)
                main, mtp, balance = (losses / machine.world).tolist()
                now = time.perf_counter()
                speed = (tokens - clock_tokens) / (now - clock)
                clock, clock_tokens = now, tokens
                line = {
                    "step": step,
                    "tokens": tokens,
                    "loss": main,
                    "mtp_loss": mtp,
                    "balance_loss": balance,
                    "lr": lr,
                    "grad_norm": float(norm),
                    "tokens_per_s": round(speed, 1),
                    "max_vio": vio.item(),
                }
                if peak:
                    line["mfu"] = round(speed * flops / peak, 4)
                log(line)
                text = f"loss {main:.3f} mtp {mtp:.3f} MaxVio {line['max_vio']:.2f} "
                text += f"{speed:,.0f} tok/s" + (f" MFU {line['mfu']:.1%}" if peak else "")
                bar.set_postfix_str(text)
                if bar.disable:
                    left = timedelta(seconds=round((config.steps - step) * step_tokens / speed))
                    say(f"step {step}/{config.steps}: {text}, {left} left")
                if count := int(skipped):
                    note(f"step {step}: {count} skipped since the last line, gradient not finite")
                    skipped.zero_()
                if (row := int(bad_in_a_row)) >= 5 or (row and last):
                    raise ValueError(
                        f"loss {main} and gradient norm {float(norm)} at step {step}, {row} steps "
                        f"in a row: stopped; the last good checkpoint in {out} is kept, lower lr "
                        f"({config.lr}) and --resume."
                    )
            if last or step % config.eval_every == 0:
                run_evaluation()
                clock, clock_tokens = time.perf_counter(), tokens
            flag = torch.tensor(int(stop > 0))
            machine.sum(flag)  # on the CPU: all ranks leave at the same step
            # Where the gradient has just failed the weights may be spoilt: keep the older file.
            if (last or flag or step % config.save_every == 0) and not bad_in_a_row:
                save_everything()
            if flag and not last:
                bar.close()
                say(f"stopped at step {step}; go on from {out / 'ckpt.pt'} with --resume.")
                break
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return step == config.steps


def peak_flops(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), 0.0)


def data_folder(config: TrainConfig) -> Path:
    path = Path(config.data)
    return path if path.is_dir() and (path / "meta.json").exists() else Path("data") / config.data


def open_data(
    config: TrainConfig, model_config: ModelConfig, machine: Machine
) -> prepare_data.Dataset:
    """The prepared data; what can be made offline is made if missing."""
    folder = data_folder(config)
    sources = {"stdlib": "stdlib", "tiny": "stdlib", "pysite": "pysite"}
    if not folder.exists() and config.data in sources and machine.rank == 0:
        prepare_data.prepare(
            prepare_data.DataConfig(
                source=sources[config.data],
                name=config.data,
                vocab_size=model_config.vocab_size,
            )
        )
    if machine.world > 1:
        dist.barrier()
    if not folder.exists():
        what = f"SOURCE --name={config.data} --vocab_size={model_config.vocab_size}"
        if config.data in prepare_data.SHARDS:  # tokens already
            what = f"{config.data} --shards={prepare_data.SHARDS[config.data][1]}"
        raise FileNotFoundError(f"no data in {folder}; make it with: python prepare_data.py {what}")
    data = prepare_data.load_dataset(folder)
    room = model_config.vocab_size - data.vocab_size
    if not 0 <= room < 128:  # padding to a multiple of 128 is fine
        raise ValueError(
            f"the model's vocab_size is {model_config.vocab_size}, that of {folder} is "
            f"{data.vocab_size}; prepare the data again with --vocab_size="
            f"{model_config.vocab_size} --overwrite, or give --vocab_size={data.vocab_size} here."
        )
    for split in ("train", "val"):
        if len(getattr(data, split)) < config.block_size + 1:
            raise ValueError(
                f"{folder}/{split} has {len(getattr(data, split))} tokens, but block_size "
                f"{config.block_size} needs one more than itself; lower --block_size."
            )
    return data


# ---- The command ---------------------------------------------------------------------------------


def split_configs(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    model_keys = {field.name for field in fields(ModelConfig)}
    model = {k: v for k, v in values.items() if k in model_keys}
    return model, {k: v for k, v in values.items() if k not in model_keys}


def check_same_network(saved: dict[str, Any], asked: dict[str, Any], where: str):
    for key, value in asked.items():
        if saved[key] != value:
            raise ValueError(
                f"{key} is {value} here, but {saved[key]} in {where}: a run's network cannot "
                f"change; start a new run with another --out."
            )


RUN_FILES = ("ckpt.pt", "best.pt", "log.jsonl")


def main(argv: list[str]):
    """The command. Where another process has died or raised, this one ends with a sentence."""
    try:
        run(argv)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ValueError(
                "out of memory: lower --batch_size, raise --grad_accum, or give --recompute."
            ) from None
        # A process that another one has left gets an error; gloo's has no class of its own.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
        raise ConnectionError(
            f"rank {os.environ.get('RANK')} lost another process ({reason}): see what that one "
            f"said, then continue from the last checkpoint with --resume."
        ) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def run(argv: list[str]):
    file, values = parse_args(
        "Train a DeepSeek-V3: python train.py config/small.py [--key=value]",
        argv, TrainConfig, ModelConfig, positional="config",
    )  # fmt: skip
    if file:
        given = read_config_file(file, ModelConfig, TrainConfig)
        if values.get("resume") or (values.get("eval_only") and not values.get("init_from")):
            given = {k: v for k, v in given.items() if k == "out"}  # the checkpoint has the rest
        values = {"out": f"out/{Path(file).stem}", **given, **values}
    model_values, train_values = split_configs(values)
    config = TrainConfig(**train_values)
    if not (file or config.eval_only or (config.out and (config.resume or config.init_from))):
        info("usage: name a config file, for example: python train.py config/small.py")
        sys.exit(2)
    out = Path(config.out)
    say = info if os.environ.get("RANK", "0") == "0" else lambda text: None
    saved = None
    if config.resume or (config.eval_only and not config.init_from):
        name = "ckpt.pt" if config.resume or not (out / "best.pt").exists() else "best.pt"
        saved = load_checkpoint(out / name)
        if config.resume and "optimizer" not in saved:
            raise ValueError(f"{out / name} is no checkpoint to resume: only weights, as best.pt.")
        check_same_network(saved["model_config"], model_values, str(out))
        kind = saved["train_config"].get("optimizer")
        if config.resume and train_values.get("optimizer", kind) != kind:
            raise ValueError(f"{out} was trained with optimizer {kind!r} and can only go on so.")
        model_config = ModelConfig(**saved["model_config"])
        old = {k: v for k, v in saved["train_config"].items() if k in config.__dataclass_fields__}
        transient = ("resume", "overwrite", "init_from", "eval_only", "device", "out")
        old |= {k: getattr(config, k) for k in transient}
        for key, value in train_values.items():
            if key not in transient and old[key] != value:
                say(f"{key} is now {value} (was {old[key]})")
        config = replace(TrainConfig(**old), **train_values)
    elif not (config.eval_only or config.overwrite) and any((out / x).exists() for x in RUN_FILES):
        raise ValueError(
            f"{out} holds a run already: continue it with --resume, replace it with --overwrite, "
            f"or choose another --out."
        )
    machine = start_machine(config)
    if config.batch_size % (parts := machine.world * config.grad_accum) or (
        config.batch_start % parts
    ):
        raise ValueError(
            f"batch_size {config.batch_size} (batch_start {config.batch_start}) cannot be divided "
            f"evenly among {machine.world} processes x grad_accum {config.grad_accum}."
        )

    torch.manual_seed(config.seed)
    tokenizer = None
    if saved:
        model = DeepSeekV3(model_config).to(machine.master)
        model.load_state_dict(saved["model"])
    elif config.init_from:
        model, tokenizer, _ = load_model(config.init_from, dtype=machine.master)
        check_same_network(asdict(model.config), model_values, config.init_from)
    else:
        model = DeepSeekV3(ModelConfig(**model_values))
    depth = model.config.num_nextn_predict_layers
    if config.block_size <= depth:
        raise ValueError(f"block_size {config.block_size} must exceed the MTP depth {depth}.")

    data = open_data(config, model.config, machine)
    if tokenizer:
        ours = prepare_data.load_tokenizer(data_folder(config))
        if tokenizer.encode(__doc__) != ours.encode_ordinary(__doc__):
            raise ValueError(
                f"{config.init_from} has another tokenizer than {config.data}; prepare the data "
                f"with --tokenizer={config.init_from}."
            )
    sharded = machine.world > 1 and config.parallel == "fsdp" and not config.eval_only
    model.to("cpu" if sharded else machine.device, machine.master)  # FSDP moves it block by block
    if config.fp8:
        model.use_fp8()
    if config.eval_only:
        result = evaluate(model, data, config, machine)
        if machine.rank == 0:
            print(json.dumps({k: v for k, v in result.items() if k != "expert_load"}))
        return
    if not saved and machine.rank == 0:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
    finished = train(model, data, config, machine, saved)
    if finished and machine.rank == 0:
        show_result(config)


def show_result(config: TrainConfig):
    """The last lines of a run: its validation loss, a short sample, how to get more."""
    out = Path(config.out)
    if not (out / "best.pt").exists():  # no evaluation was finite
        return
    best = load_checkpoint(out / "best.pt")
    info(
        f"\nbest validation loss: {best['val_loss']:.4f} nats/token, {best['val_bpb']:.4f} "
        f"bits/byte (step {best['step']}). A sample:\n"
    )
    options = ("--max_new_tokens=120", "--prompt=def ", "--seed=1", f"--device={config.device}")
    sample.main([f"--ckpt={out}", *options])
    info(f"\nMore: python sample.py --ckpt={out} --prompt='import '")


if __name__ == "__main__":
    run_command(main)
