"""Measure side by side, and check an edit: python bench.py COMMAND [--key=value].

    sizes [CONFIG ...]   parameters, cache, FLOPs and bytes; nothing is allocated
    train [CONFIG]       a training step beside transformers' and the speed of bare products
    decode               decoding beside transformers', of one text and by length of the context
    fp8                  FP8 products and layers beside bf16
    check [RUN]          after an edit of model.py: does it compute what you meant?
    plot RUN [RUN ...]   measures nothing: a picture of the losses and expert loads of runs

`python bench.py COMMAND --help` lists a command's keys. A machine's speed drifts, so whatever is
compared takes turns (A B A B ...), and ratios are computed within a round. Tables show the median
of all rounds, with [least..most]. Close other programs: they slow both sides unequally.
"""

import copy
import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

import fp8
import sample
import train
from huggingface import (
    FP8_WEIGHTS,
    checkpoint_views,
    from_pretrained,
    load_model,
    save_pretrained,
)
from model import MOST_NEW, Cache, DeepSeekV3, ModelConfig
from support import graphs, processes
from support.flops import flops_per_token, peak_flops
from support.plot import PlotOptions, plot
from support.processes import Machine, fast_dtype
from support.settings import Refusal, info, parse_args, read_config_file, run_command
from support.sizes import cache_numbers, parameter_counts

# The 20.8M-parameter model on which we and transformers' DeepseekV3ForCausalLM are compared.
REFERENCE = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, q_lora_rank=128,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    intermediate_size=1024, moe_intermediate_size=256, first_k_dense_replace=1,
    n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, n_group=1, topk_group=1,
    max_position_embeddings=40000, num_nextn_predict_layers=0, initializer_range=0.02,
)  # fmt: skip


@dataclass
class Options:
    """For commands without options."""


@dataclass
class Timed:
    rounds: int = 7  # measured rounds, in each of which everything compared runs once
    device: str = "auto"  # auto, cpu or cuda


# ---- Timing and tables ---------------------------------------------------------------------------

Rounds = list[float]  # one number per round


def interleaved(functions: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, Rounds]:
    """Seconds of every function in each round. They take turns, after one unmeasured call each."""
    seconds = {name: [] for name in functions}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for turn in range(rounds + 1):
        for name, function in functions.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: Rounds, fast: Rounds, factor: float = 1.0) -> Rounds:
    """How many times as long `slow` took, multiplied by factor, in each round."""
    return [factor * a / b for a, b in zip(slow, fast, strict=True)]


def cell(x: Any) -> str:
    if isinstance(x, list):
        return f"{cell(statistics.median(x))} [{cell(min(x))}..{cell(max(x))}]"
    if x is None or isinstance(x, bool | str):
        return {None: "-", True: "yes", False: "no"}.get(x, x)
    return f"{x:,.0f}" if isinstance(x, int) or abs(x) >= 1000 else f"{x:.3g}"


@dataclass
class Table:
    title: str
    rows: list[dict[str, Any]]  # by column; missing columns are shown as -

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = [columns, *([cell(row.get(name)) for name in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*text, strict=True)]
        first, *rest = ["  ".join(map(str.rjust, row, widths)) for row in text]
        return "\n".join(["", self.title, first, "-" * len(first), *rest])


def speed_table(title: str, seconds: dict[str, Rounds], tokens: int) -> Table:
    """Tokens per second, and the speed relative to the fastest variant of transformers."""
    median = {name: statistics.median(s) for name, s in seconds.items()}
    best = min((name for name in median if name.startswith("transformers")), key=median.get)
    rows = []
    for name, s in seconds.items():
        speed, times = tokens / median[name], ratio(seconds[best], s)
        rows.append({"": name, "seconds": s, "tokens/s": speed, f"x {best}": times})
    return Table(title, rows)


def processor() -> str:
    """The name of the CPU on Linux; "" elsewhere."""
    about = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    return name[1] if name else ""


def print_tables(tables: Iterator[Table]):
    """Prints a line about the machine, then each table as soon as it is measured."""
    facts = {"cpu": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    facts |= {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for table in tables:
        print(table, flush=True)


# ---- sizes ---------------------------------------------------------------------------------------


def open_config(file: str | Path) -> tuple[DeepSeekV3, dict[str, Any]]:
    """The network of a configuration, on the meta device, and the other settings."""
    values = read_config_file(str(file), ModelConfig, train.TrainConfig)
    model_values, settings = train.split_configs(values)
    with torch.device("meta"):
        return DeepSeekV3(ModelConfig(**model_values)), settings


def size_row(file: str | Path) -> dict[str, Any]:
    model, settings = open_config(file)
    count, (latent, _, heads) = parameter_counts(model), cache_numbers(model.bfloat16())
    T, in_fp8 = settings.get("block_size", 4096), 0
    flops = flops_per_token(model, T)
    for name, x in checkpoint_views(model):
        in_fp8 += 2 * x.numel()
        if FP8_WEIGHTS.search(name):  # a byte each, and an fp32 scale per 128x128 block
            in_fp8 += 4 * math.prod(-(-n // 128) for n in x.shape) - x.numel()
    return {
        "": Path(file).stem, "parameters": count["total"], "active": count["active"],
        "MTP adds": count["mtp"], "cached numbers": latent, "bf16 bytes": 2 * latent,
        "MHA bytes": 2 * heads, "times": heads / latent if latent else None, "window": T,
        "GFLOP/trained token": flops and flops / 1e9,
        "bf16 GB": 2e-9 * (count["total"] + count["mtp"]), "FP8 GB": in_fp8 / 1e9,
    }  # fmt: skip


def sizes(options: Options, files: list[str]) -> Iterator[Table]:
    """Parameters, cache, FLOPs and bytes of config/*.py, or of the files named."""
    rows = [size_row(file) for file in files or sorted(Path("config").glob("[!_]*.py"))]
    yield Table("cache per token, all layers; FLOPs and GB with MTP", rows)


# ---- train ---------------------------------------------------------------------------------------


@dataclass
class TrainOptions(Timed):
    compile: bool = False  # in bfloat16 the step compiled; beside transformers: both ways
    recompute: bool = False  # CONFIG's step with activation checkpointing
    fp8: bool = False  # CONFIG's step with FP8 products


def training_step(model: nn.Module, config: train.TrainConfig, machine: Machine) -> Callable:
    """A function that makes one optimiser step of our model or of transformers', on new tokens at
    each call."""
    ours, rng, size = isinstance(model, DeepSeekV3), np.random.default_rng(1), config.block_size + 1
    trainer = processes.wrap(model.train(), config, machine) if ours else model.train()
    if config.compile and not ours:
        for layer in model.model.layers:
            layer.compile()
    optimizers = train.make_optimizers(model, config)

    def step():
        windows = rng.integers(model.config.vocab_size, size=(config.batch_size, size))
        if ours:
            parts = np.split(windows, config.grad_accum)
            weight_of = train.loss_weights(model, config, step=0)
            with fp8.quantized_once(model, processes.compiles(config, machine.device)):
                train.backward(trainer, parts, weight_of, machine)
            model.update_bias(config.gamma)
        else:
            x, _ = train.to_device(windows, machine.device)
            with machine.autocast():
                loss = model(input_ids=x, labels=x, use_cache=False).loss
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    return step


def models_in(
    directory: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """Our model, and DeepseekV3ForCausalLM with the two implementations of experts that may be
    fastest."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = {"ours": from_pretrained(directory, dtype, str(device))}
    load = partial(transformers.DeepseekV3ForCausalLM.from_pretrained, dtype=dtype)
    for kind in ("grouped_mm", "eager"):
        models[f"transformers {kind}"] = load(directory, experts_implementation=kind).to(device)
    return models


FORMATS = ("float32", "bfloat16")  # of the products


def reference_table(options: TrainOptions) -> Table:
    """A training step of our model and of transformers', in both formats."""
    base, steps = train.TrainConfig(batch_size=8, block_size=256, device=options.device), {}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(DeepSeekV3(ModelConfig(**REFERENCE)), folder)
        for dtype, compiled in itertools.product(FORMATS, (False, True)[: 1 + options.compile]):
            if compiled and dtype == "float32":  # each step would compile its own choice of experts
                continue
            config = replace(base, dtype=dtype, compile=compiled)
            machine = processes.start(config)
            for name, model in models_in(folder, machine.device).items():
                name = f"{name} {dtype}{' compiled' * compiled}"
                steps[name] = training_step(model, config, machine)
    auto, reason = fast_dtype(machine.device)
    title = f"training step, 20.8M parameters, 8 x 256 tokens, AdamW; auto is {auto}: {reason}"
    return speed_table(title, interleaved(steps, options.rounds), 8 * 256)


def config_row(file: str, dtype: str, options: TrainOptions) -> dict[str, Any]:
    """A configuration's training step, beside square products of the same dtype, which run as fast
    as the machine can multiply."""
    model, settings = open_config(file)
    compiled = options.compile and dtype == "bfloat16"
    settings |= {name: True for name in ("recompute", "fp8") if getattr(options, name)}
    settings |= {"compile": compiled, "device": options.device, "dtype": dtype}
    config = train.TrainConfig(**settings)
    flops = flops_per_token(model, config.block_size)
    machine = processes.start(config)
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the other format may have used more
    model = DeepSeekV3(model.config).to(machine.device)
    if config.fp8:
        fp8.use_fp8(model)
    n = 8192 if machine.device.type == "cuda" else 2048
    tokens = config.batch_size * config.block_size
    flops, bare = flops and tokens * flops, 2 * n**3
    a = torch.randn(n, n, device=machine.device).to(machine.dtype)
    step = training_step(model, config, machine)
    t = interleaved({"product": lambda: a @ a, "step": step}, options.rounds)
    seconds, memory = statistics.median(t["step"]), torch.cuda.max_memory_allocated()
    peak = peak_flops(machine.device)
    return {
        "": Path(file).stem, "dtype": dtype, "auto": machine.dtype == fast_dtype(machine.device)[0],
        "tokens": tokens, "seconds": t["step"], "tokens/s": tokens / seconds,
        "GFLOP/s": flops and flops / seconds / 1e9,
        "of bare products": flops and ratio(t["product"], t["step"], flops / bare),
        "MFU": flops / seconds / peak if flops and peak else None, "peak GB": memory / 1e9 or None,
    }  # fmt: skip


def train_(options: TrainOptions, files: list[str]) -> Iterator[Table]:
    """A training step of CONFIG (default: config/small.py) beside bare products; without a CONFIG
    also the reference model beside transformers'."""
    file = files[0] if files else "config/small.py"
    if not files:
        import transformers  # noqa: F401, fails now rather than after minutes
    gpu = processes.usable_device(options.device).type == "cuda"
    formats = FORMATS[1:] if gpu and files else FORMATS  # a large network in float32 takes minutes
    rows = [config_row(file, dtype, options) for dtype in formats]  # first, for their peak memory
    yield Table(f"a step{' compiled' * options.compile}, by the model's own FLOPs", rows)
    if not files:
        yield reference_table(options)


# ---- decode --------------------------------------------------------------------------------------


@dataclass
class DecodeOptions(Timed):
    prompt: int = 64  # tokens of the prompt
    new_tokens: int = 128  # tokens decoded after it; 1 measures the prompt alone
    compile: bool = True  # compiled decoding, too, which first compiles for minutes


@torch.inference_mode()
def decode(options: DecodeOptions, files: list[str]) -> Iterator[Table]:
    """Greedy decoding, and the cost of a long context. (Drafts: experiments/speculation.py.)"""
    device = processes.usable_device(options.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(DeepSeekV3(ModelConfig(**REFERENCE)), folder)
        models, low = (models_in(folder, device, getattr(torch, dtype)) for dtype in FORMATS)
    both = models | {f"{name} bf16": model for name, model in low.items()}
    yield plain_table(options, both)
    yield context_table(options, models)


def plain_table(options: DecodeOptions, models: dict[str, nn.Module]) -> Table:
    """The speed of greedy decoding of one text."""
    new, model, texts = options.new_tokens, models["ours"], {}
    device = model.embed_tokens.weight.device
    prompt = torch.randint(model.config.vocab_size, (1, options.prompt)).to(device)

    def ours(name: str, model: DeepSeekV3, compile: bool):
        settings = dict(temperature=0, speculative=0, compile=compile)
        texts[name] = sample.generate(model, prompt, new, **settings)

    def transformers(name: str, hf: nn.Module):
        greedy = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        texts[name] = hf.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)

    functions = {}
    for name, m in models.items():
        if name.startswith("transformers"):
            functions[name] = partial(transformers, name, m)
            continue
        functions[name] = partial(ours, name, m, False)
        if options.compile:
            functions[f"{name} compiled"] = partial(ours, f"{name} compiled", m, True)
    title = f"greedy decoding, batch 1, prompt {options.prompt}, {new} new tokens"
    table = speed_table(title, interleaved(functions, options.rounds), new)
    for row in table.rows:
        row["same text"] = torch.equal(texts[row[""]], texts["ours"])
    return table


def our_step_at(model: DeepSeekV3, S: int) -> Callable:
    """A function that decodes one token after S tokens, with random numbers in the cache."""
    cache = Cache(model.config, model.layers, 1, S + 1, model.embed_tokens.weight)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.embed_tokens.weight.device)
    for x in torch.utils._pytree.tree_leaves(cache.kept):
        x.normal_() if x.is_floating_point() else x.random_(0, 100)

    def step():
        cache.length = S
        model.logits(model.trunk(token, cache)).argmax()

    return step


def their_step_at(hf: nn.Module, S: int) -> Callable:
    from transformers import DynamicCache

    cache, c = DynamicCache(config=hf.config), hf.config
    for layer in range(c.num_hidden_layers):
        widths = c.kv_lora_rank, c.qk_rope_head_dim
        cache.update(*(torch.randn(1, 1, S, n, device=hf.device) for n in widths), layer)
    token = torch.zeros(1, 1, dtype=torch.long, device=hf.device)

    def step():
        hf(token, None, None, cache, use_cache=True).logits.argmax()
        cache.crop(-1)

    return step


def context_table(options: DecodeOptions, models: dict[str, nn.Module]) -> Table:
    """One decoding step at several lengths of the context, beside transformers' faster variant."""
    rows = []
    for S in (1024, 2048, 4096, 8192, 16384, 32768):
        functions = {name: (our_step_at if name == "ours" else their_step_at)(model, S)
                     for name, model in models.items()}  # fmt: skip
        t = interleaved(functions, options.rounds)
        ms = {name: 1000 * statistics.median(values) for name, values in t.items()}
        best = min((name for name in ms if name != "ours"), key=ms.get)
        row = {"cached tokens": S, "step ms": ms["ours"], "theirs ms": ms[best], "theirs": best}
        rows.append(row | {"times ours": ratio(t[best], t["ours"])})
    return Table("one decoding step", rows)


# ---- fp8 -----------------------------------------------------------------------------------------

# In and out features: DeepSeek-V3's dense FFN, o, q_b, expert, kv_b and kv_a projection.
SHAPES = [(7168, 18432), (16384, 7168), (1536, 24576), (7168, 2048), (512, 32768), (7168, 576)]


def fp8_(options: Timed, files: list[str]) -> Iterator[Table]:
    """FP8 products and layers beside bf16, slow shapes included."""
    device = processes.start(train.TrainConfig(device=options.device)).device
    shapes, tokens, how = SHAPES, 8192, "compiled"
    if not fp8.has_blockwise_fp8(device):
        shapes, tokens, how = SHAPES[-1:], 256, "EMULATION, which says nothing of FP8's speed"
    rows = [fp8_row(*shape, tokens, device, options.rounds) for shape in shapes]
    title = "a layer: forward and backward, FP8Linear's weight in fp32 and quantised each time"
    yield Table(f"FP8 beside bf16, {how}; {title}", rows)


def fp8_row(K: int, N: int, M: int, device: torch.device, rounds: int) -> dict[str, Any]:
    torch.compiler.reset()
    x = torch.randn(M, K, device=device).bfloat16().requires_grad_()
    dy = torch.randn(M, N, device=device).bfloat16()
    plain = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
    layer = fp8.FP8Linear(K, N, device=device)
    if fp8.has_blockwise_fp8(device):  # compiling fuses the quantiser
        plain, layer = torch.compile(plain), torch.compile(layer)
    a, w = x.detach(), plain.weight.detach()
    qa, qw = fp8.to_fp8(a, fp8.TILE), fp8.to_fp8(w, fp8.BLOCK)

    def both(module: nn.Module):
        x.grad = module.weight.grad = None
        module(x).backward(dy)

    t = interleaved({
        "bf16": lambda: a @ w.T,
        "fp8": lambda: fp8.multiply(qa, qw, torch.bfloat16),
        "bf16 layer": lambda: both(plain), "fp8 layer": lambda: both(layer),
    }, rounds)  # fmt: skip
    s = {name: statistics.median(values) for name, values in t.items()}
    tera = 2e-12 * M * N * K
    return {
        "in -> out": f"{K} -> {N}", "tokens": M, "bf16 TFLOP/s": tera / s["bf16"],
        "FP8 TFLOP/s": tera / s["fp8"], "FP8 speed-up": ratio(t["bf16"], t["fp8"]),
        "bf16 layer ms": 1000 * s["bf16 layer"], "FP8 layer ms": 1000 * s["fp8 layer"],
        "layer speed-up": ratio(t["bf16 layer"], t["fp8 layer"]),
    }  # fmt: skip


# ---- check ---------------------------------------------------------------------------------------
#
# Does a network compute what its author meant? An edit may train without an error and be wrong: it
# decodes a different network from the one it trained, it loses a part of its gradient, its loss is
# not the one that is compared. Each check computes the same thing in two ways and compares:
#
#     decoding     a text that is read in pieces, behind a cache, and the same text read whole
#     bfloat16     the same in low precision, beside what rounding does to the whole text
#     causality    a text, and the same text with other tokens at its end
#     positions    a text at positions 0, 1, ..., and the same text further on
#     gradients    of a training step: plain, recomputed, in two micro-batches, compiled
#     losses       as evaluations report them, and as the cross-entropies of logits
#     loads        every gate's choices are counted
#     drafts       a text that is written with drafts, and one that is written without
#
# All but the second compute in float64, on a copy of the network. There rounding leaves 12 digits
# or more, and a mistake few. All weights of the copy are moved at random, so that what was
# initialised as 0, or so small that it hardly counts, counts too. FP8 rounds more than that: call
# these functions without use_fp8.
# docs/HACKING.md has a table of what each check finds, and of what to look for then.

SAME = 1e-8  # a difference that is smaller, relative to what is compared, is rounding


@dataclass
class Answer:
    """What one check found. `print` shows it."""

    what: str  # was compared, with numbers
    wrong: list[str] = field(default_factory=list)  # a sentence for each difference
    note: bool = False  # a fact, which is neither right nor wrong

    def __str__(self) -> str:
        verdict = "WRONG" if self.wrong else "note " if self.note else "right"
        return "\n      ".join((f"{verdict} {self.what}", *self.wrong))


@torch.no_grad()
def shaken(model: DeepSeekV3) -> DeepSeekV3:
    """A copy in float64 with all weights moved at random, matrices by so much that attention's
    scores and the gates' differ by about 1: at an initial 0.006 a wrong score hardly shows."""
    model = copy.deepcopy(getattr(model, "_orig_mod", model))
    model.to(sample.drawing_device(model.embed_tokens.weight.device), torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        shake = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        size = p.shape[-1] ** -0.5 if p.ndim > 1 else model.config.initializer_range
        p.add_(shake.to(p.device), alpha=size)
    return model


def random_tokens(model: DeepSeekV3, texts: int, length: int) -> Tensor:
    """Texts at random, (texts, length) at most. Special tokens are an end of the vocabulary and
    would be rare; here every eighth token is one."""
    shape = texts, min(length, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    special = torch.randint(2, shape, generator=generator) * (model.config.vocab_size - 1)
    rare = torch.randint(8, shape, generator=generator) == 0
    return torch.where(rare, special, tokens).to(model.embed_tokens.weight.device)


def reader(k: int) -> str:
    return f"MTP module {k}" if k else "main model"


SEVERAL = "several tokens at a time"
WAYS = {  # the pieces in which a text is read: tokens in each, how many of them are forgotten again
    "one token at a time": [(1, 0)],
    SEVERAL: [(n, 0) for n in range(2, MOST_NEW + 1)],
    "drafts rejected": [(MOST_NEW, n) for n in (0, *range(MOST_NEW, 0, -1))],
}


@torch.inference_mode()
def decoding(model: DeepSeekV3, length: int | None = None) -> Answer:
    """Reads a random text in pieces, as decoding does, and compares the logits with whole forwards.

    A piece is one token, or several, or drafts of which some are rejected: a smaller `cache.length`
    forgets them. Pieces begin the text, or follow a prompt. Positions are numbers, or tensors as in
    a graph. The main model reads by itself, and so does every MTP module. The text has `length`
    tokens: by default 256, or twice the longest window if that is more.
    """
    model = shaken(model)
    window = longest_window(model)
    # Two texts, and two more from which the drafts come that are rejected.
    tokens = random_tokens(model, 4, length or max(256, 2 * window))
    whole, inputs = whole_texts(model, tokens)
    ways = [*itertools.product(WAYS, (0, tokens.shape[1] // 2), (False, True))]
    size, largest, wrong = whole[0].std().item(), 0.0, []
    for (k, logits), (way, prompt, as_tensor) in itertools.product(enumerate(whole), ways):
        found = read_in_pieces(model, k, inputs[k], tokens, way, prompt, as_tensor)
        off = (found - logits).abs().amax((0, 2)).nan_to_num(math.inf)  # by position
        largest = max(largest, off.max().item())
        first = (off > SAME * size).nonzero()[:1].tolist()
        if first:
            where = f" behind a prompt of {prompt}" if prompt else ""
            graph = ", positions as tensors" if as_tensor else ""
            says = f"wrong from position {first[0][0]} on, by up to {off.max():.2g}"
            wrong.append(f"{reader(k)}, {way}{where}{graph}: {says}")
    count = len(whole) * len(ways)
    text = f"a text of {tokens.shape[1]} tokens"
    if window > 1:
        text += f" (some layers keep {window} places)"
    right = f"decoding: {count - len(wrong)} of {count} ways to read {text} in pieces are right"
    return Answer(f"{right}; logits differ by {largest:.1g}, their spread is {size:.1g}", wrong)


def longest_window(model: DeepSeekV3) -> int:
    """The places, (B, places, ...), of the longest ring that a layer keeps, or the second dimension
    of a state, if that is longer; 0 without either. Neither grows with the text."""
    like, most = model.embed_tokens.weight, model.config.max_position_embeddings
    kept, of_twice = (
        graphs.tensors([x.new_cache(1, size, like.to("meta")) for x in (*model.layers, *model.mtp)])
        for size in (most, 2 * most)
    )
    pairs = zip(kept, of_twice, strict=True)
    return max((x.shape[1] for x, y in pairs if x.shape == y.shape and x.ndim > 1), default=0)


def whole_texts(model: DeepSeekV3, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """By depth: the logits of the first half of the texts (B, length - k, V), and what the main
    model, then every module takes of all texts: tokens, hidden states."""
    logits, mtp_logits = model(tokens[: len(tokens) // 2], return_mtp=True)
    inputs = [tokens, model.trunk(tokens)]
    for k in range(1, len(mtp_logits)):
        inputs.append(model.predict_next(k - 1, inputs[k][:, :-1], tokens[:, k:]))
    return [logits, *mtp_logits], inputs


def read_in_pieces(
    model: DeepSeekV3, k: int, inputs: Tensor, tokens: Tensor, way: str, prompt: int, tensor: bool
) -> Tensor:
    """Logits of the main model, k = 0, or of MTP module k, on a cache: (B, length - k, V).

    inputs: the tokens (2B, length), or the hidden states that the module takes (2B, .., D). The
    first B rows are the texts, from the others come drafts.
    """
    B, length, logits = len(tokens) // 2, tokens.shape[1] - k, []
    layers = model.mtp if k else model.layers
    cache = Cache(model.config, layers, B, length, model.embed_tokens.weight)
    for start, kept, read in pieces(way, prompt, length):
        takes, later = (
            torch.cat((x[:B, start : start + kept], x[B:, start + kept : start + read]), 1)
            for x in (inputs, tokens[:, k:])
        )
        cache.length = torch.tensor(start, device=tokens.device) if tensor and start else start
        h = model.predict_next(k - 1, takes, later, cache) if k else model.trunk(takes, cache)
        logits.append(model.logits(h, k)[:, :kept])
    return torch.cat(logits, 1)


def pieces(way: str, prompt: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The pieces of a text: where each starts, how many tokens are kept, how many are read."""
    most, start = max(forgotten for _, forgotten in WAYS[way]), 0
    for n, forgotten in itertools.chain([(prompt + most, most)], itertools.cycle(WAYS[way])):
        kept = min(n - forgotten, length - start)
        read = min(n, length - start)
        if read:
            yield start, kept, read
        start += kept
        if start == length:
            return


@torch.inference_mode()
def bfloat16(model: DeepSeekV3, length: int = 1024) -> Answer:
    """Rounding alone moves the distribution of the next token, by a small KL divergence. Behind a
    cache it should move it no further: what is kept in bfloat16 has three digits, which is too few
    for a sum that grows with the text. Weights as they are, and real sizes of everything."""
    exact, low = (copy.deepcopy(getattr(model, "_orig_mod", model)).eval() for _ in range(2))
    exact.to(sample.drawing_device(model.embed_tokens.weight.device), torch.float64)
    low.to(torch.bfloat16)
    tokens, says, wrong = random_tokens(low, 2, length), [], []
    right, _ = whole_texts(exact, tokens.to(exact.embed_tokens.weight.device))
    whole, inputs = whole_texts(low, tokens)
    for k, logits in enumerate(right):
        cached = read_in_pieces(low, k, inputs[k], tokens, SEVERAL, 0, False)
        of_whole, of_cached = (divergence(logits, x) for x in (whole[k], cached))
        says.append(f"{of_whole:.1e} and {of_cached:.1e} in the {reader(k)}")
        if not of_cached <= 3 * of_whole + 1e-9:
            wrong.append(f"{reader(k)}: {of_cached / of_whole:.0f} times as far behind the cache")
    what = f"bfloat16: KL from float64 of {tokens.shape[1]} tokens, read whole and in pieces"
    return Answer(f"{what}: {', '.join(says)}", wrong)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of logits (B, T, V) in nats, the median of the tokens. (Rounding lets some choose
    another expert, and theirs is a hundred times as large.)"""
    p, q = (x.to(p.device).double().log_softmax(-1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).median().item()


@torch.inference_mode()
def causality(model: DeepSeekV3, length: int = 256) -> Answer:
    """Whether a logit depends on a later token, also in training mode, where experts may choose
    their tokens, say, and the loss would be that of a network that has read the answer."""
    model, wrong = shaken(model), []
    texts = random_tokens(model, 4, length)
    end = texts.shape[1] // 2 - 1  # no multiple of any usual length of blocks
    texts[2:, :end] = texts[:2, :end]
    for training in (False, True):
        model.train(training)
        one, other = (logits_of(model, x) for x in texts.split(2))
        for k, (x, y) in enumerate(zip(one, other, strict=True)):
            off = (x - y).abs().amax((0, 2)).nan_to_num(math.inf)[: end - k]  # by position
            first = (off > SAME * x.std()).nonzero()[:1].tolist()
            if first:
                mode = "in training" if training else "in evaluation"
                sees = f"position {k + first[0][0]} sees tokens from position {end} on"
                wrong.append(f"{reader(k)}, {mode}: {sees}; logits differ by up to {off.max():.2g}")
    model.eval()
    together, alone = (logits_of(model, x) for x in (texts[:2], texts[:1]))
    for k, (x, y) in enumerate(zip(together, alone, strict=True)):
        if not (off := (x[:1] - y).abs().max()) <= SAME * x.std():
            wrong.append(
                f"{reader(k)}: a text sees others of its batch; logits differ by {off:.2g}"
            )
    text = "causality: no logit may depend on a later token, nor in training, nor on another text"
    return Answer(text, wrong)


@torch.inference_mode()
def positions(model: DeepSeekV3, by: int = 7) -> Answer:
    """Whether logits change where `rope` is asked for positions further on. Scores of rotated
    queries and keys depend on distances alone. A network may depend on the positions themselves, if
    that is meant, so this is a note."""
    model = shaken(model)
    tokens, rope = random_tokens(model, 2, 64), model.rope
    one = logits_of(model, tokens)
    model.rope = lambda x, start, *more: rope(x, start + by, *more)
    other = logits_of(model, tokens)
    off = max(((x - y).abs().max() / x.std()).item() for x, y in zip(one, other, strict=True))
    says = f"positions: logits change by {off:.1g} of their spread if those of rope move by {by}"
    return Answer(f"{says}: they are {'' if off < SAME else 'not '}relative", note=not off < SAME)


def logits_of(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    """By depth, (B, T - k, V), with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        logits, mtp_logits = model(tokens, return_mtp=True)
    return [logits, *mtp_logits]


def gradients(model: DeepSeekV3, config: train.TrainConfig, compiled: bool = False) -> Answer:
    """Those of the first step of a run with these settings. A block that is computed again must
    get what it got before; and a loss is a mean over the step's targets, in one micro-batch or in
    two. (If a step draws random numbers, such as dropout's, micro-batches and graphs draw others.)
    """
    model, rng, largest = shaken(model), np.random.default_rng(4), 0.0
    windows = rng.integers(model.config.vocab_size, size=(4, min(config.block_size, 128) + 1))
    plain = step_gradients(model, config, windows)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    idle = [x for x in sorted(learns) if x not in plain or not plain[x].any()]
    wrong = [f"{name} gets no gradient" for name in idle]
    least = SAME * math.sqrt(sum(g.square().sum().item() for g in plain.values()))

    def differences(**settings) -> dict[str, float]:  # by parameter, in its gradient's norm
        found = step_gradients(model, config, windows, **settings)
        off = {name: (found[name] - g).norm().item() / max(g.norm().item(), least)
               for name, g in plain.items() if name in found}  # fmt: skip
        return off | dict.fromkeys(plain.keys() ^ found.keys(), math.inf)

    ways = {"recomputed": dict(recompute=True)}
    if max(differences(seed=4).values()) > 100 * SAME:
        compared = "recomputed alone, as the step draws random numbers"
    else:
        ways |= {"in two micro-batches": dict(grad_accum=2)}
        ways |= {"compiled": dict(compile=True)} if compiled else {}
        compared = ", ".join(ways)
    for way, settings in ways.items():
        try:
            off = differences(**settings)
        except CheckpointError:  # the second time sizes differ, such as the rows of an expert
            wrong.append(f"{way}: a block does not compute what it has computed before")
            continue
        different = sorted((name for name, x in off.items() if not x <= 100 * SAME), key=off.get)
        largest = max(largest, *off.values())
        if different:
            worst = f"that of {different[-1]} by {off[different[-1]]:.2g} of its norm"
            wrong.append(f"{way}: {len(different)} of {len(plain)} differ, {worst}")
    text = f"{compared}: they differ by up to {largest:.1g} of their norm"
    return Answer(f"gradients of {len(plain)} parameters, {text}", wrong)


def step_gradients(
    model: DeepSeekV3, config: train.TrainConfig, windows: np.ndarray, seed: int = 3, **settings
) -> dict[str, Tensor]:
    """By parameter, as `backward` of train.py leaves them; without those that get none."""
    usual = dict(recompute=False, grad_accum=1, compile=False, fp8=False)
    model, config = copy.deepcopy(model).train(), replace(config, **usual | settings)
    machine = processes.Machine(model.embed_tokens.weight.device, torch.float64)
    trainer, parts = processes.wrap(model, config, machine), np.split(windows, config.grad_accum)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train.backward(trainer, parts, train.loss_weights(model, config, step=0), machine)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def losses(model: DeepSeekV3) -> Answer:
    """What evaluations report, and choose best.pt by, beside the cross-entropies of the logits, and
    beside `loss` in training mode, unless that draws random numbers. Then all losses in float32,
    with scores so large that their exponentials overflow."""
    model, wrong = shaken(model), []
    text = random_tokens(model, 4, 129)
    x, y = text[:, :-1], text[:, 1:]
    returned = model(x, y)
    main, *mtp = (
        F.cross_entropy(logits.flatten(0, 1), y[:, k:].flatten()).item()
        for k, logits in enumerate(logits_of(model, x))
    )
    for name, right in {"loss": main, "mtp_loss": sum(mtp) / max(1, len(mtp))}.items():
        if not math.isclose(found := returned[name].item(), right, rel_tol=SAME):
            wrong.append(f"{name} is {found:.6g}, but the logits' cross-entropy is {right:.6g}")
    model.train()
    with torch.random.fork_rng():
        one, other = ((torch.manual_seed(i), model(x, y)["loss"].item())[1] for i in (1, 2))
    loss = returned["loss"].item()
    if math.isclose(one, other, rel_tol=SAME) and not math.isclose(one, loss, rel_tol=SAME):
        wrong.append(f"in training mode loss is {one:.6g}, in evaluations {loss:.6g}")
    for p in model.parameters():
        p *= 1000 if p.ndim > 1 else 1
    for name, loss in model.float()(x, y).items():
        if not loss.isfinite():
            wrong.append(f"{name} is {loss.item()} where matrices are 1,000 times as large")
    return Answer(f"losses: the logits' cross-entropy is {main:.6g}", wrong)


@torch.no_grad()
def loads(model: DeepSeekV3) -> Answer:
    """Whether each gate's choices are counted. Its bias moves by its load alone."""
    model, text = shaken(model).train(), random_tokens(model, 4, 129)
    model(text[:, :-1], text[:, 1:])
    names = {module: name for name, module in model.named_modules()}
    wrong = [
        f"nothing that {names[gate]} chooses is counted: a block counts its first gate alone"
        for gate in model.gates()
        if not gate.load.any()
    ]
    return Answer(f"loads: each of {len(model.gates())} gates must count its own choices", wrong)


def drafts(model: DeepSeekV3, new: int = 32) -> Answer:
    """Greedy texts. Drafts are right or wrong: they must not change what is written."""
    model = shaken(model)
    prompt, wrong = random_tokens(model, 2, 8), []
    plain = sample.generate(model, prompt, new, temperature=0, speculative=0)
    for count in range(1, sample.MOST_DRAFTS + 1):
        text = sample.generate(model, prompt, new, temperature=0, speculative=count)
        off = (text != plain).any(0).nonzero()[:1, 0].tolist()
        if off:
            wrong.append(f"with {count} in a round the text is another from token {off[0]} on")
    written = f"{plain.shape[1] - prompt.shape[1]} tokens"
    return Answer(f"drafts: greedy texts of {written} must be the same with them", wrong)


def answers(
    model: DeepSeekV3, config: train.TrainConfig, length: int | None = None, compiled: bool = False
) -> Iterator[Answer]:
    """All of them, in the order of this file."""
    exact = decoding(model, length)
    yield exact
    skipped = Answer("bfloat16: not compared, as decoding is wrong in float64 already", note=True)
    yield skipped if exact.wrong else bfloat16(model)
    yield causality(model)
    yield positions(model)
    yield gradients(model, config, compiled)
    yield losses(model)
    yield loads(model)
    yield drafts(model)


@dataclass
class CheckOptions:
    length: int | None = None  # tokens of the text; none: 256, or twice the longest window
    compile: bool = False  # gradients compiled on a CPU, too, which takes minutes
    device: str = "auto"  # auto, cpu or cuda


def check(options: CheckOptions, files: list[str]) -> bool:
    """Checks the network of model.py with the weights and settings of out/small, or of the RUN or
    Hugging Face directory (with the default settings). Exit code 1 where something is wrong."""
    run, device = Path(files[0] if files else "out/small"), processes.usable_device(options.device)
    model, _ = load_model(run, device)
    source = "init_from" if (run / "config.json").exists() else "out"
    values, *_ = train.read_settings(["--eval_only", f"--{source}={run}"])
    config = train.TrainConfig(**train.split_configs(values)[1])
    compiled = options.compile or (device.type == "cuda" and processes.compiles(config, device))
    right = True
    for answer in answers(model, config, options.length, compiled):
        print(answer, flush=True)
        right = right and not answer.wrong
    return right


# ---- The command ---------------------------------------------------------------------------------

COMMANDS = {  # function, options, files in the usage, most files
    "sizes": (sizes, Options, "[CONFIG ...]", 999),
    "train": (train_, TrainOptions, "[CONFIG]", 1),
    "decode": (decode, DecodeOptions, "", 0),
    "fp8": (fp8_, Timed, "", 0),
    "check": (check, CheckOptions, "[RUN]", 1),
    "plot": (plot, PlotOptions, "RUN [RUN ...]", 999),
}


def main(argv: list[str]):
    command, *argv = argv or [""]
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in COMMANDS:
        info(f"usage: python bench.py {'|'.join(COMMANDS)} [--key=value ...]; see --help")
        sys.exit(2)
    function, kind, usage, most = COMMANDS[command]
    files = [arg for arg in argv if not arg.startswith("-")][:most]
    # parse_args accepts no files, so it refuses those beyond `most`.
    keys = [arg for arg in argv if arg not in files]
    classes = kind.__mro__[-2::-1]  # a parent's fields first
    usage = f"%(prog)s {command} {usage}{' ' * bool(usage)}[--key=value ...]"
    options = kind(**parse_args(function.__doc__, keys, *classes, usage=usage)[1])
    for name, value in vars(options).items():
        if type(value) is int and value < 1:  # not isinstance: a bool is an int
            raise Refusal(f"{name} is {value}, but must be at least 1.")
    if command == "check":
        if not check(options, files):
            sys.exit(1)
        return
    if command == "plot":
        return print(plot(options, files))
    print_tables(function(options, files))


if __name__ == "__main__":
    run_command(main)
