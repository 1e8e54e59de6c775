"""Train a DeepSeek-V3: python train.py config/small.py [--key=value].

    data/<data>/ + config/<name>.py -> out/<name>/
        ckpt.pt      everything needed to resume: weights, optimiser, step, configuration
        best.pt      the weights with the lowest validation loss (in the YaRN phase: since it began)
        log.jsonl    one JSON object per logged step or evaluation
        tokenizer.tiktoken, meta.json    the tokenizer, for sample.py (or a release's files)
        model.py, train.py    copies of the code that made the weights
        .lock        held by the running train.py

The loss is L_main + lambda * mean_k L_MTP^k + alpha * sum_layers L_Bal (report, sections 2.1.2 and
2.2). The schedules are those of section 4.2, in fractions of the run. An optimiser step sees
batch_size windows of block_size tokens. From long_start on (the YaRN phase) every second step has
fewer, longer windows. Windows depend on seed and step alone and are then divided among processes
and micro-batches. So the data are the same for any number of processes, and after a resume.

On several GPUs or nodes: torchrun --nproc_per_node=N train.py config/x.py (docs/GPU.md).

support/runs.py writes the run's folder, support/checkpoints.py saves and restores, and
support/processes.py handles processes and devices.

Shapes: B windows, T tokens per window, E routed experts, K experts per token.
"""

import copy
import functools
import itertools
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fp8
import prepare_data
import sample
from load import load_model
from model import DeepSeekV3, ModelConfig, check_ranges, count_chosen
from support import checkpoints, processes, runs, settings
from support.checkpoints import Progress, RandomNumbers, checkpoint_file, load_checkpoint
from support.flops import flops_per_token, peak_flops
from support.muon import Muon, muon_takes
from support.processes import Machine
from support.settings import Refusal, info
from support.tokenizer import Tokenizer, tokenizer_files
from support.tokens import DEFAULT_VOCAB_SIZES, Dataset, Tokens, data_folder, open_folder


@dataclass
class TrainConfig:
    """Everything about a run that is not the network's shape."""

    data: str = "stdlib"  # folder under data/ made by prepare_data.py, or its path
    out: str = ""  # the run's folder (empty: out/<name of the config file>)
    steps: int = 1000  # optimiser steps
    batch_size: int = 16  # windows per step, over all processes and micro-batches
    block_size: int = 256  # tokens per window
    long_block_size: int = 0  # tokens per window in every second step from long_start on (0: none)
    long_start: float = 0.9  # fraction of the run at which the YaRN phase begins
    grad_accum: int = 1  # micro-batches per step and process
    # optimiser and schedule; the defaults are the report's
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices
    lr: float = 2.2e-4  # peak learning rate
    adamw_lr: float = 1.0  # beside Muon: AdamW's learning rate, as a multiple of lr
    warmup: float = 0.0085  # fraction of the run in which the learning rate rises
    decay_start: float = 0.676  # fraction of the run at which the cosine begins
    decay_end: float = 0.966  # fraction of the run at which the cosine reaches min_lr
    min_lr: float = 0.1  # learning rate after the cosine, as a share of lr
    final_start: float = 0.9887  # fraction of the run at which the last, lowest rate begins
    final_lr: float = 0.0332  # the last learning rate, as a share of lr
    weight_decay: float = 0.1  # times the learning rate; of matrices, not of norms and biases
    beta1: float = 0.9  # decay of AdamW's running mean of gradients
    beta2: float = 0.95  # decay of AdamW's running mean of squared gradients
    clip: float = 1.0  # largest gradient norm (0: no limit)
    mtp_weight: float = 0.3  # lambda, weight of the MTP loss
    mtp_weight_late: float = 0.1  # lambda from mtp_switch on
    mtp_switch: float = 0.676  # fraction of the run at which lambda changes
    gamma: float = 0.001  # how far a routing bias moves per step, up or down
    gamma_stop: float = 0.966  # fraction of the run after which routing biases stay fixed
    alpha: float = 0.0001  # weight of the sequence-wise balance loss
    seed: int = 1337  # of initial weights and of the order of windows
    # machine
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of matrix products
    fp8: bool = False  # matrix products in FP8 (fp8.py)
    compile: Literal["auto", True, False] = "auto"  # auto: in bfloat16, if steps are many or large
    recompute: bool = False  # activation checkpointing: less memory, a third more work
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards weights and optimiser; implies recompute
    deterministic: bool = False  # sums in a fixed order: resumes are bit for bit on CUDA, too
    # the run
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 0  # tokens of the validation text to evaluate, from its start (0: all)
    save_every: int = 250  # steps between checkpoints
    log_every: int = 10  # steps between lines in log.jsonl
    resume: bool = False  # continue from the run's ckpt.pt
    overwrite: bool = False  # start over; an existing run is renamed to NAME.old-1
    init_from: str = ""  # start from the weights of a run, checkpoint or Hugging Face directory
    eval_only: bool = False  # evaluate the run's (or init_from's) weights and stop

    def __post_init__(self):
        counts = {"steps", "batch_size", "block_size", "grad_accum"}
        counts |= {"eval_every", "save_every", "log_every"}
        check_ranges(self, at_least_one=counts)
        if 0 < self.min_lr < 0.001:  # such as nanoGPT's 6e-5
            raise Refusal(
                f"min_lr is {self.min_lr}, but is a share of lr, not a learning rate as in "
                "nanoGPT: give 0.1 for a tenth of lr."
            )
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise Refusal("muon needs whole matrices, but fsdp cuts them up; choose adamw.")
        # With decay_end = 1 the cosine lasts to the end of the run, and final_start has no effect.
        course = ["warmup", "decay_start", "decay_end"] + ["final_start"] * (self.decay_end < 1)
        for name in (*course, "final_start", "long_start", "mtp_switch", "gamma_stop"):
            if (x := getattr(self, name)) > 1:
                raise Refusal(f"{name} is {x}, but must be a fraction of the run: at most 1.")
        for name in ("beta1", "beta2"):
            if (x := getattr(self, name)) >= 1:
                raise Refusal(f"{name} is {x}, but a running mean needs less than 1.")
        for first, then in itertools.pairwise(course):
            x, y = getattr(self, first), getattr(self, then)
            if x > y:
                raise Refusal(
                    f"{first} is {x}, but {then} is {y}: "
                    f"raise {then} to at least {x}, or lower {first}."
                )


# ---- Schedules (section 4.2) ---------------------------------------------------------------------


def lr_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, cosine to min_lr, constant, then final_lr. `step` counts from 0."""
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
    """gamma, by which routing biases move in this step."""
    return config.gamma if step < config.gamma_stop * config.steps else 0.0


def in_yarn_phase(config: TrainConfig, step: int) -> bool:
    """Whether this step is in the YaRN phase, in which every second step has long windows."""
    return config.long_block_size > 0 and step >= config.long_start * config.steps


def block_at(config: TrainConfig, step: int) -> int:
    """Tokens per window. In the YaRN phase short and long windows alternate, so that the model
    forgets neither."""
    long = in_yarn_phase(config, step) and step % 2
    return config.long_block_size if long else config.block_size


def at_step(model: DeepSeekV3, config: TrainConfig, step: int):
    """Sets what changes in the network in the course of a run, before the step: YaRN, and the
    longest window trained on. A window that grows, say, belongs here, where check.py looks, too."""
    model.trained_length = max(model.trained_length, config.block_size)
    if in_yarn_phase(config, step):
        extend_context(model, config)


def extend_context(model: DeepSeekV3, config: TrainConfig):
    """Sets YaRN up to stretch positions to long_block_size (section 4.3), from the model's original
    length or, if it has no YaRN yet, from the length trained so far. mscale is V3's unless the
    model has its own. Later calls change nothing."""
    yarn = model.config.rope_scaling or {
        "type": "yarn",
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": model.trained_length,
    }
    factor = config.long_block_size / yarn["original_max_position_embeddings"]
    model.config.rope_scaling = yarn | {"factor": factor}
    model.trained_length = config.long_block_size


# ---- Optimiser -----------------------------------------------------------------------------------


def make_optimizers(model: DeepSeekV3, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, as in the report; or Muon for the matrices of the layers and AdamW
    for the rest, at adamw_lr times lr. A message counts the matrices that Muon takes."""
    of_muon = muon_takes(model) if config.optimizer == "muon" else set()
    matrices = [p for p in model.parameters() if p in of_muon]
    others = [p for p in model.parameters() if p.ndim > 1 and p not in of_muon]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    decay = config.weight_decay
    scale = config.adamw_lr if matrices else 1.0
    groups = [
        {"params": others, "weight_decay": decay, "lr_scale": scale},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": scale},
    ]
    adamw = torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), fused=True)
    if not matrices:
        return [adamw]
    count = sum(p.shape[:-2].numel() for p in matrices)  # a stack holds several
    info(f"muon: {count} matrices of the layers; AdamW: all other parameters")
    defaults = {"lr": config.lr, "lr_scale": 1.0, "weight_decay": decay, "momentum": 0.95}
    return [adamw, Muon(matrices, defaults, getattr(torch, config.dtype))]


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float):
    """Sets the learning rate of every group: lr, times the lr_scale that AdamW has beside Muon."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


# ---- Data ----------------------------------------------------------------------------------------


def prepare_missing(name: str, vocab_size: int):
    """Prepares the data of the files in config/ (those in DEFAULT_VOCAB_SIZES) from Python's
    standard library, unless the folder exists."""
    folder = data_folder(name)
    if folder.exists() or DEFAULT_VOCAB_SIZES.get(name) != vocab_size:
        return
    try:
        prepare_data.prepare(prepare_data.DataConfig("stdlib", name, vocab_size=vocab_size))
    except (Refusal, OSError):
        if not folder.exists():  # else another train.py has just prepared it
            raise


def open_data(
    config: TrainConfig,
    vocab_size: int,
    source: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> tuple[Dataset, Path]:
    """Opens the prepared data. Returns them and their folder. source, tokenizer: the path of the
    initial weights and their tokenizer, if they have one, which the data must have, too."""
    processes.once(lambda: prepare_missing(config.data, vocab_size))
    folder = data_folder(config.data)
    if config.data in prepare_data.SHARDS and not folder.exists():
        shards = math.ceil(config.steps * config.batch_size * config.block_size / 1e8)  # one epoch
        shards = min(shards, prepare_data.SHARDS[config.data][1])
        raise Refusal(
            f"no data in {folder}; make it with: python prepare_data.py {config.data} "
            f"--shards={shards} ({shards / 10:.1f}B tokens, {shards / 5:.1f} GB)."
        )
    longest = max(config.block_size, config.long_block_size)
    return open_folder(folder, vocab_size, longest, config.eval_tokens, source, tokenizer), folder


@functools.lru_cache(2)  # one entry for short windows, one for long ones
def epoch_starts(seed: int, epoch: int, length: int, T: int) -> np.ndarray:
    """Where the windows of one epoch over `length` tokens begin: adjacent windows, shuffled."""
    rng, count = np.random.default_rng((seed, epoch)), (length - 1) // T
    offset = rng.integers(0, length - count * T)  # every epoch cuts the text at other places
    return offset + T * rng.permutation(count)


def train_windows(data: Dataset, config: TrainConfig, step: int) -> np.ndarray:
    """The step's windows (B, T + 1). They depend on seed and step alone.

    Each epoch cuts the text into adjacent windows and shuffles them. Steps take the windows in
    turn, epoch after epoch. So an epoch reads every token once, except for less than a window at
    the ends of the text.
    The YaRN phase skips windows: short and long ones are two lists, cut from the same text, and
    each step moves on in both, though it reads from one.
    """
    T, length = block_at(config, step), len(data.train)
    batch = config.batch_size * config.block_size // T  # windows of a step
    numbers = step * batch + np.arange(batch)
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
    if cuda:  # pinned: otherwise the copy waits for the work queued on the GPU
        x = x.pin_memory()
    x = x.to(device, non_blocking=cuda)
    return x[:, :-1], x[:, 1:]


def max_vio(loads: Sequence[Tensor]) -> Tensor:
    """MaxVio (arXiv 2408.15664, Eq. 4): (max - mean) / mean of a layer's loads (E,), averaged over
    the layers that have any load; 0 if none has."""
    each = [load.amax() / load.float().mean() - 1 for load in loads]
    return torch.stack(each).nanmean().nan_to_num() if each else torch.zeros(())


# ---- Evaluation ----------------------------------------------------------------------------------


def validation_windows(tokens, T: int, config: TrainConfig, machine: Machine) -> Iterator:
    """This process's share of the tokens, in batches (B, T + 1) of adjacent windows, so that every
    token is predicted once. All processes get the same number of batches, padded with -1. A batch
    is as large as a micro-batch, so that an evaluation takes less memory than the training."""
    parts = machine.world * config.grad_accum
    B = max(1, config.batch_size * config.block_size // (T * parts))
    batches = range(0, math.ceil((len(tokens) - 1) / T), B * machine.world)
    no_bar = machine.rank > 0 or None  # None: no bar unless stderr is a terminal
    for first in tqdm(batches, "evaluate", leave=False, disable=no_bar):
        windows = np.full((B, T + 1), -1)
        for i, row in enumerate(windows, first + machine.rank * B):
            piece = tokens[i * T : (i + 1) * T + 1]
            row[: len(piece)] = piece
        yield windows


def add_up(model: DeepSeekV3, tokens, T: int, config: TrainConfig, machine: Machine) -> dict:
    """Runs the model on all windows of these tokens. Returns, over all processes:

    losses    nats per token by depth (0: the main model, k: MTP module k)
    visits    for each MoE layer, how often each expert was chosen (E,)
    groups    the number of groups in which a token's experts lie, summed over tokens and layers
    routed    the number of routed tokens, summed over layers
    """
    G, visits = model.config.n_group, []
    E = max((len(gate.load) for gate in model.gates()), default=1)
    sums = torch.zeros(2, 1, dtype=torch.double)  # nats, tokens; then by depth
    groups, routed = torch.zeros(2, dtype=torch.long, device=machine.device)
    for windows in validation_windows(tokens, T, config, machine):
        x, y = to_device(windows, machine.device)
        with machine.autocast():
            main = model(x.clamp(min=0), y)["loss"]
        loss = torch.stack((main, *model.mtp_losses)).cpu()
        n = torch.stack([(y[:, k:] >= 0).sum() for k in range(len(loss))]).cpu()
        sums = sums + torch.stack((loss * n, n))  # (2, depths)
        for layer, chosen in enumerate(model.chosen):
            if layer == len(visits):  # an edited model may run a block twice: two layers here
                visits.append(chosen.new_zeros(E))
            # MTP module k routes T - k positions, those of the last T - k targets. -1 is padding.
            used = chosen[(y >= 0)[:, -chosen.shape[1] :]]  # (tokens, K)
            visits[layer] += count_chosen(used, E)
            group = used * G // E  # the experts of a group have adjacent numbers
            groups += nn.functional.one_hot(group, G).amax(1).sum()
            routed += len(used)
    nats, n = machine.sum(sums)
    losses, visits = (nats / n.clamp(min=1)).tolist(), [machine.sum(x) for x in visits]
    counts = {"groups": machine.sum(groups).item(), "routed": machine.sum(routed).item()}
    return {"losses": losses, "visits": visits} | counts


@torch.no_grad()
def evaluate(model: DeepSeekV3, data, config: TrainConfig, machine: Machine) -> dict:
    """Evaluates the model on the validation text (open_data has cut it to eval_tokens). Returns the
    values for the log: losses and the use of the experts in windows of block_size and, in the YaRN
    phase, the loss in long windows."""
    text, training = data.val.arrays[0], model.training
    model.eval()
    with fp8.quantized_once(model, machine.compiled), machine.eager_on_cpu():
        total = add_up(model, text, config.block_size, config, machine)
        long = None
        if config.long_block_size > 0 and config.long_block_size == model.trained_length:
            long = add_up(model, text, config.long_block_size, config, machine)
    model.train(training)
    main, *mtp = total["losses"]
    groups, routed = total["groups"], total["routed"]  # 0 without experts
    visits = sum(x.sum().item() for x in total["visits"])
    shares = [(x / x.sum().clamp(min=1)).tolist() for x in total["visits"]]
    one_bpb = math.log(2) * data.val_bytes_per_token  # one bit per byte, in nats per token
    result = {
        "val_loss": main,
        "val_bpb": main / one_bpb,
        # May be below val_loss: MTP modules do not predict the window's first, hardest tokens.
        "val_mtp_loss": sum(mtp) / max(1, len(mtp)),
        "val_mtp_losses": mtp,
        "max_vio_global": max_vio(total["visits"]).item(),
        "nodes_per_token": groups / max(1, routed),
        "experts_per_node": visits / max(1, groups),
        "expert_load": [[round(v, 5) for v in row] for row in shares],
    }
    if long:
        result["val_bpb_long"] = long["losses"][0] / one_bpb
    return result


def try_evaluation(model: DeepSeekV3, data, config: TrainConfig, machine: Machine):
    """Evaluates a single batch and drops the result: lack of memory, or a mistake in an edit, ends
    the run before its first step, not at the first evaluation, hours later. Random numbers stay as
    they are."""
    length = 1 + config.batch_size * config.block_size // config.grad_accum
    first = copy.copy(data)
    first.val = Tokens([data.val.arrays[0][:length]])
    with torch.random.fork_rng([machine.device] if machine.device.type == "cuda" else []):
        evaluate(model, first, config, machine)


# ---- Training ------------------------------------------------------------------------------------


def loss_weights(config: TrainConfig, step: int) -> dict[str, float]:
    """The weight of each loss that the model returns, for the sum that training minimises, Eq. 17
    and 24: L_main + lambda mean_k L_MTP^k + alpha sum_layers L_Bal."""
    return {
        "loss": 1.0,
        "mtp_loss": mtp_weight_at(config, step),
        "balance_loss": config.alpha,
    }


def backward(
    trainer: nn.Module, batches: list[np.ndarray], weight_of: dict[str, float], machine: Machine
) -> dict[str, Tensor]:
    """Accumulates the gradients of the weighted losses over micro-batches (B, T + 1). Returns the
    mean of each loss by name, over all processes, before its weight."""
    means = defaultdict(float)
    for i, batch in enumerate(batches):
        processes.sync_gradients(trainer, now=i == len(batches) - 1)
        x, y = to_device(batch, machine.device)
        with machine.autocast():
            losses = trainer(x, y)
        total = sum(weight_of[name] * loss for name, loss in losses.items())
        (total / len(batches)).backward()
        for name, loss in losses.items():
            means[name] += loss.detach() / len(batches)
    sums = machine.sum(torch.stack([*means.values()]))
    return dict(zip(means, sums / machine.world, strict=True))


def clip_gradients(model: DeepSeekV3, config: TrainConfig) -> Tensor:
    """Scales the gradients down to a total norm of at most config.clip. Returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's norm is sharded


def train(model: DeepSeekV3, data, config: TrainConfig, machine: Machine, files=()):
    """Runs config.steps optimiser steps or, with config.resume, the remaining ones, in the folder
    config.out. A new run's folder gets copies of `files`. After a signal it saves a checkpoint and
    raises KeyboardInterrupt."""
    # The model, whose blocks are now compiled or sharded, if they are to be; or DDP around it.
    trainer = processes.wrap(model.train(), config, machine)
    optimizers = make_optimizers(model, config)
    progress = Progress()
    # All processes must have opened the same data.
    machine.check_alike(data=[*map(len, (*data.train.arrays, *data.val.arrays)), data.vocab_size])
    # What a checkpoint contains. Add anything that has state_dict and load_state_dict.
    states = {"model": model, "progress": progress, "random": RandomNumbers(machine)}
    states |= checkpoints.by_name(model, optimizers)

    peak = peak_flops(machine.device)  # None: unknown, and no mfu
    flops = peak and flops_per_token(model, config.block_size)
    mfu = peak and flops / (peak * machine.world)  # of one token per second

    # A resumed run's states are restored here. A signal sets run.stopped.
    with runs.open_run(states, config, machine, files, mfu) as run:
        remaining = (config.steps - progress.step) * config.batch_size * config.block_size
        run.log_plan(remaining, len(data.train))
        if not run.finished:
            try_evaluation(model, data, config, machine)
            run.clock.restart(progress.tokens)
        while True:
            if run.evaluation_due:  # every eval_every steps; the best weights become best.pt
                run.log_evaluation(evaluate(model, data, config, machine))
            if run.finished or run.stopped:
                break

            step = progress.step
            at_step(model, config, step)
            windows = train_windows(data, config, step)
            batches = micro_batches(windows, config, machine)
            # The YaRN phase would need graphs of its own, and is short. In FP8 all micro-batches of
            # a step read the same quantised weights.
            how = machine.eager_on_cpu() if in_yarn_phase(config, step) else nullcontext()
            with fp8.quantized_once(model, machine.compiled), how:
                means = backward(trainer, batches, loss_weights(config, step), machine)

            norm = clip_gradients(model, config)
            finite = bool(norm.isfinite())  # here the host waits for the GPU, once a step

            lr = lr_at(config, step)
            if finite:  # else the step is skipped
                set_lr(optimizers, lr)
                for optimizer in optimizers:
                    optimizer.step()
            # DDP's gradients are views of its buckets, which are kept.
            model.zero_grad(set_to_none=trainer is model)

            for gate in model.gates():
                machine.sum(gate.load)  # in place: update_bias needs all processes' counts
            means["max_vio"] = max_vio([gate.load for gate in model.gates()])
            model.update_bias(gamma_at(config, step) if finite else 0.0)  # also resets the loads
            # Counts the step (progress.step, progress.tokens), and logs if a line is due.
            run.advance(windows[:, 1:].size, finite, means, lr=lr, grad_norm=norm)
            if run.checkpoint_due:  # every save_every steps, and before an evaluation
                run.save()


# ---- The command ---------------------------------------------------------------------------------

ABOUT = "Train a DeepSeek-V3: python train.py config/small.py [--key=value]"
# These settings hold for one command. A checkpoint does not restore them.
PER_COMMAND = {"resume", "overwrite", "init_from", "eval_only", "device", "out"}


def split_configs(values: dict) -> tuple[dict, dict]:
    """Splits settings into those of ModelConfig and the rest."""
    model = {k: v for k, v in values.items() if k in ModelConfig.__dataclass_fields__}
    return model, {k: v for k, v in values.items() if k not in model}


def read_settings(argv: list[str]) -> tuple[dict, Path | None]:
    """Returns all settings by name, and the path of the weights to open (None: a new network).
    Later sources of settings override earlier ones: defaults, config file, checkpoint (if the run
    is resumed or evaluated), command line."""
    classes = (TrainConfig, ModelConfig)
    config_file, command_line = settings.parse_args(ABOUT, argv, *classes, positional="config")
    command_line |= settings.with_home(command_line, "out", "data", "init_from")  # expands ~
    in_file = settings.read_config_file(config_file, *classes) if config_file else {}
    values = vars(TrainConfig()) | in_file | command_line
    out = values["out"] or (f"out/{Path(config_file).stem}" if config_file else "")
    values["out"] = out
    if not out and not (values["eval_only"] and values["init_from"]):
        info("usage: name a config file, for example: python train.py config/small.py")
        sys.exit(2)
    weights, is_own = find_weights(values, command_line)
    if not is_own:
        return values, weights
    saved = load_checkpoint(weights, whole=False)
    stored = saved["model_config"] | saved["train_config"]
    # Without the settings of older code, which do not exist any more.
    known = ModelConfig.__dataclass_fields__ | TrainConfig.__dataclass_fields__
    stored = {k: x for k, x in stored.items() if k in known and k not in PER_COMMAND}
    network = ModelConfig.__dataclass_fields__  # load_model names those of them that change
    values = settings.merge(in_file, stored, command_line, network)
    return values | {"out": out}, weights


def find_weights(values: dict, command_line: dict) -> tuple[Path | None, bool]:
    """The path of the weights to open, and whether they are the run's own. Raises Refusal if the
    folder `out` does not suit the command.

        command                    weights                      own
        --resume                   OUT/ckpt.pt                  yes
        --eval_only                OUT/best.pt, else ckpt.pt    yes
        --eval_only --init_from    init_from                    no
        --init_from                init_from                    no
        none of these              None                         no
    """
    out, init_from = Path(values["out"]), values["init_from"]
    if values["resume"]:
        if command_line.get("init_from") or command_line.get("overwrite"):
            raise Refusal("--resume continues a run: leave out --init_from and --overwrite.")
        runs.check_folder(out, resume=True, overwrite=False)
        return out / "ckpt.pt", True
    if values["eval_only"]:  # writes nothing, so another process may be training the run
        # An init_from in the config file is where the run began: its own weights are newer.
        if not init_from or ("init_from" not in command_line and runs.holds_run(out)):
            return checkpoint_file(out), True
        return Path(init_from), False
    runs.check_folder(out, resume=False, overwrite=values["overwrite"])
    if not init_from:
        return None, False
    source = Path(init_from).resolve()
    if out.resolve() in (source, source.parent):
        raise Refusal(f"--overwrite would rename {init_from}: give another --out.")
    return Path(init_from), False


def open_network(config: TrainConfig, network: dict, source: Path | None, machine: Machine):
    """Returns the network, new or with the weights in `source`, and the weights' tokenizer."""
    sharded = machine.world > 1 and config.parallel == "fsdp" and not config.eval_only
    device = "cpu" if sharded else machine.device  # FSDP moves the model block by block
    dtype = torch.float64 if config.dtype == "float64" else torch.float32  # of the weights
    if not source:
        if not {"hidden_size", "num_hidden_layers"} <= network.keys():
            raise Refusal(
                "the config file has to set hidden_size, num_hidden_layers and the network's other "
                "sizes: begin with a copy of config/small.py."
            )
        return DeepSeekV3(ModelConfig(**network)).to(device, dtype), None
    if not (config.resume or config.eval_only):
        info(f"start: from {source}")
    # Unless a run is resumed, network and weights may differ: a new part, or one that is gone.
    return load_model(source, device, dtype, extend=not config.resume, settings=network)


def check_settings(config: TrainConfig, model: DeepSeekV3, machine: Machine):
    """Raises Refusal if windows do not fit the network, or cannot be divided evenly."""
    long, limit = config.long_block_size, model.config.max_position_embeddings
    longest = max(config.block_size, long)
    if longest > limit:
        raise Refusal(
            f"windows of {longest} tokens exceed max_position_embeddings, {limit}: lower "
            "--block_size and --long_block_size or, for a new network, raise that limit."
        )
    # MTP module k needs k + 1 tokens before it has a target.
    least = 1 + model.config.num_nextn_predict_layers
    if config.block_size < least:
        raise Refusal(
            f"block_size is {config.block_size}, but must be at least {least} with MTP modules."
        )
    if config.eval_only:  # has no steps
        return
    trained = max(model.trained_length, config.block_size)
    if 0 < long < trained:
        raise Refusal(
            f"long_block_size is {long}, but the model has been trained on windows of {trained}: "
            f"give --long_block_size=0, or at least {trained}."
        )
    parts, tokens = machine.world * config.grad_accum, config.batch_size * config.block_size
    for T in {config.block_size, long or config.block_size}:
        if tokens % (T * parts):
            raise Refusal(
                f"the {tokens} tokens of a step are no multiple of {parts} micro-batches "
                f"(processes x grad_accum) of windows of {T} tokens: change "
                "--batch_size, --block_size or --grad_accum."
            )


def command(argv: list[str]):
    """Settings, machine, network, data, training, and a sample at the end."""
    values, source = read_settings(argv)
    network, others = split_configs(values)
    config = TrainConfig(**others)
    machine = processes.start(config)  # replaces a dtype of "auto"
    torch.manual_seed(config.seed)

    model, tokenizer = open_network(config, network, source, machine)
    # Initial weights are the same in all processes. Random numbers in steps, such as those of a
    # dropout that you add, differ.
    torch.manual_seed(config.seed + 1 + machine.rank)
    check_settings(config, model, machine)
    # A Hugging Face directory may have no tokenizer; then the sizes of the vocabularies must agree.
    data, folder = open_data(config, model.config.vocab_size, source, tokenizer)
    if config.fp8:
        fp8.use_fp8(model)

    if config.eval_only:
        if machine.device.type == "cuda":  # on a CPU evaluations are never compiled
            processes.compile_network(model, config, machine)
        result = evaluate(model, data, config, machine)
        del result["expert_load"]
        if machine.rank == 0:
            print(runs.to_json(result))
        return
    train(model, data, config, machine, tokenizer_files(folder))
    torch.use_deterministic_algorithms(False)  # sampling does not need them
    if machine.rank == 0:
        show_result(config, data)


def show_result(config: TrainConfig, data: Dataset):
    """Prints the best validation loss, a short sample, and the commands that may come next."""
    file = Path(config.out) / "best.pt"
    if not file.exists():  # it was moved
        return
    best = load_checkpoint(file, whole=False)
    then = best["train_config"]  # a resumed run may have other settings now
    bits = f"{best['val_bpb']:.4f} bits/byte in windows of {then['block_size']} tokens"
    if "val_bpb_long" in best:
        bits += f", {best['val_bpb_long']:.4f} in windows of {then['long_block_size']}"
    info(f"\nbest validation loss: {best['val_loss']:.4f} nats/token, {bits}. A sample:\n")
    longest = max(config.block_size, config.long_block_size)
    tokens = data.val.arrays[0][1 : 1 + min(8, longest // 2)].tolist()  # after the end of a text
    prompt = data.tokenizer.decode(tokens, errors="ignore").strip()
    new = max(1, min(120, longest - len(tokens)))  # within the windows trained on
    options = (f"--max_new_tokens={new}", "--seed=1", f"--device={config.device}")
    sample.main([f"--ckpt={config.out}", f"--prompt={prompt}", *options])
    start = shlex.quote(prompt[:20].partition("\n")[0])
    info(f"\nMore: python sample.py {shlex.quote(config.out)} --prompt={start}")
    info(f"See inside: python docs/inside.py {shlex.quote(config.out)}")
    info(f"After an edit of model.py: python check.py {shlex.quote(config.out)}")


def main(argv: list[str]):
    command(argv)
    processes.end()


if __name__ == "__main__":
    settings.run_command(main)
