"""Measure side by side, on the machine at hand: python bench.py COMMAND [--key=value].

    sizes [CONFIG ...]   parameters, cache, FLOPs and bytes; nothing is allocated
    train [CONFIG]       a training step: ours, transformers', and the speed of bare products
    decode               plain decoding, ours and transformers'; long contexts; --ckpt=out/small
                         adds speculation
    fp8                  FP8 products and layers beside bf16; --curves=config/small.py: the losses
    plot RUN             loss curves and expert loads of a run as PNG

Tables go to stdout and, with --json=FILE, into a file. A machine's speed drifts, so the things
compared take turns (A B A B ...), and a ratio is that of two neighbours: what is printed is the
median over the rounds, with [least..most]. Close other programs; they slow both sides unequally.
"""

import contextlib
import importlib
import inspect
import itertools
import json
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fp8
import sample
import train
from config import info, parse_args, run_command, unknown_key
from huggingface import FP8_WEIGHTS
from model import Cache, DeepSeekV3, ModelConfig

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
    json: str = ""  # also write the tables to this file
    rounds: int = 7  # measured turns of everything that is compared
    threads: int = 0  # CPU threads (0: torch's choice)
    device: str = "auto"  # auto, cpu or cuda


# ---- Timing and tables ---------------------------------------------------------------------------


class Spread(NamedTuple):
    """One figure per round, summed up."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in each round. They take turns, after one unmeasured call each."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            began = time.perf_counter()
            function()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(slow: list[float], fast: list[float], factor: float = 1.0) -> Spread:
    """How many times longer `slow` took (times factor), round by round."""
    return Spread.of([factor * a / b for a, b in zip(slow, fast, strict=True)])


def cell(x: Any) -> str:
    if isinstance(x, Spread):
        return f"{cell(x.median)} [{cell(x.least)}..{cell(x.most)}]"
    if x is None or isinstance(x, (bool, str)):
        return {None: "-", True: "yes", False: "no"}.get(x, x)
    return f"{x:,.0f}" if isinstance(x, int) or abs(x) >= 1000 else f"{x:.3g}"


@dataclass
class Table:
    title: str
    rows: list[dict[str, Any]]  # by column; a column that a row lacks is shown as -

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = [columns, *([cell(row.get(name)) for name in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*text, strict=True)]
        first, *rest = ["  ".join(map(str.rjust, row, widths)) for row in text]
        return "\n".join(["", self.title, first, "-" * len(first), *rest])


def speed_tables(title: str, seconds: dict[str, list[float]], tokens: int) -> list[Table]:
    """Tokens per second, and how many times faster each of our rows is than each of theirs."""
    rows = [
        {"": name, "seconds": Spread.of(s), "tokens/s": tokens / statistics.median(s)}
        for name, s in seconds.items()
    ]
    ours, theirs = ([n for n in seconds if n.startswith("ours") is own] for own in (True, False))
    times = [{"": a} | {b: ratio(seconds[b], seconds[a]) for b in theirs} for a in ours]
    return [Table(title, rows), Table("times as fast as", times)]


def machine_facts() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    return {"cpu": cpu, "card": card, "torch": torch.__version__, "threads": threads}


def optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ValueError(f"this measurement needs {name}: pip install {name}") from None


# ---- sizes ---------------------------------------------------------------------------------------


@dataclass
class SizesOptions(Options):
    block_size: int = 4096  # tokens per window, for attention's FLOPs, where the config has none


def size_row(file: str | Path, block_size: int = 4096) -> dict[str, Any]:
    """Counts of one configuration, the model made of shapes only."""
    model_values, train_values = train.split_configs(train.read_config_file(str(file)))
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig(**model_values))
    count, (latent, heads) = model.parameter_counts(), model.config.cache_numbers()
    bf16 = in_fp8 = 0
    for name, x in model.checkpoint_views():
        size = x.numel() * (4 if name.endswith("correction_bias") else 2)
        bf16 += size
        if FP8_WEIGHTS.search(name):  # a byte each, and an fp32 scale per 128x128 block
            size = x.numel() + 4 * math.prod(-(-n // 128) for n in x.shape)
        in_fp8 += size
    T = train_values.get("block_size", block_size)
    flops = train.flops_per_token(model, T) / 1e9
    return {
        "": Path(file).stem, "parameters": count["total"], "active": count["active"],
        "MTP adds": count["mtp"], "cached numbers": latent, "bf16 bytes": 2 * latent,
        "MHA bytes": 2 * heads, "times": heads / latent, "window": T,
        "GFLOP/trained token": flops, "bf16 GB": bf16 / 1e9, "FP8 GB": in_fp8 / 1e9,
    }  # fmt: skip


def sizes(options: SizesOptions, files: list[str]) -> Iterator[Table]:
    """Parameters, cache, FLOPs and bytes of config/*.py, or of the files named."""
    files = files or sorted(map(str, Path("config").glob("*.py")))
    title = "sizes; cache per token, all layers; FLOPs and weights (GB) with MTP"
    yield Table(title, [size_row(file, options.block_size) for file in files])


# ---- train ---------------------------------------------------------------------------------------


@dataclass
class TrainOptions(Options):
    batch_size: int = 0  # windows per step (0: 8 for the reference, else the config's)
    compile: bool = False  # also time our step compiled (on CUDA it always is)
    fp8: bool = False  # the config's step with FP8 products
    recompute: bool = False  # the config's step with activation checkpointing
    profile: bool = False  # where the time of our step goes


def random_windows(config: train.TrainConfig, vocab_size: int) -> Iterator[np.ndarray]:
    """Ever new tokens (batch_size, block_size + 1), so that routing changes as in training."""
    rng = np.random.default_rng(1)
    while True:
        yield rng.integers(vocab_size, size=(config.batch_size, config.block_size + 1))


def our_step(model: DeepSeekV3, config: train.TrainConfig, machine: train.Machine) -> Callable:
    """One optimiser step as train.py makes it (clip 0: without clipping)."""
    if config.fp8:
        model.use_fp8()
    trainer = train.wrap(model.train(), config, machine)
    optimizers = train.make_optimizers(model, config)
    windows = random_windows(config, model.config.vocab_size)

    def step():
        parts = np.split(next(windows), config.grad_accum)
        weights = config.mtp_weight, config.alpha
        with fp8.quantized_once(model):
            train.backward(model, trainer, parts, weights, machine)
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        model.update_bias(config.gamma)

    return step


def their_step(model: nn.Module, config: train.TrainConfig, machine: train.Machine) -> Callable:
    """The same for transformers' model: forward, backward, the same AdamW."""
    (optimizer,) = train.make_optimizers(model.train(), config)
    windows = random_windows(config, model.config.vocab_size)

    def step():
        x, _ = train.to_device(next(windows), machine.device)
        with machine.autocast():
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_model(directory: str, device, experts: str = "grouped_mm", **keys) -> nn.Module:
    transformers = optional("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keys = {"dtype": torch.float32} | keys
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, experts_implementation=experts, **keys
    )
    return model.to(device).eval()


def products(device: torch.device, dtype: torch.dtype) -> tuple[float, Callable]:
    """FLOPs of, and a function that makes, five square products: as fast as a machine gets."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 5 * 2 * n**3, lambda: [a @ b for _ in range(5)]


def reference_tables(options: TrainOptions) -> Iterator[Table]:
    B = options.batch_size or 8
    config = train.TrainConfig(batch_size=B, block_size=256, clip=0.0, device=options.device)
    dtypes = {"bf16": "bfloat16", "fp32": "float32"}
    machines = {k: train.start_machine(replace(config, dtype=d)) for k, d in dtypes.items()}
    device = machines["fp32"].device
    torch.manual_seed(0)
    model, steps = DeepSeekV3(ModelConfig(**REFERENCE)).to(device), {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hf, windows = transformers_model(folder, device), next(random_windows(config, 4096))
        x, y = train.to_device(windows, device)
        y = torch.cat((y[:, :-1], y[:, -1:] * 0 - 1), 1)  # transformers predicts only what is in x
        with torch.no_grad():
            nats = {"ours": model(x, y)[0].item(), "theirs": hf(input_ids=x, labels=x).loss.item()}
        for name, machine in machines.items():
            copy = DeepSeekV3.from_pretrained(folder, torch.float32, str(device))
            steps[f"ours {name}"] = our_step(copy, config, machine)
            for experts in ("grouped_mm", "eager"):
                hf = transformers_model(folder, device, experts)
                steps[f"transformers {name} {experts}"] = their_step(hf, config, machine)
    nats["difference"] = nats["ours"] - nats["theirs"]
    yield Table("loss of the same weights before training, fp32, nats", [nats])
    millions = model.parameter_counts()["total"] / 1e6
    title = f"training step, {millions:.1f}M parameters, {B} x 256 tokens, AdamW"
    yield from speed_tables(title, interleaved(steps, options.rounds), B * 256)


def config_step(file: str, options: TrainOptions, compiled: bool) -> dict[str, Any]:
    """A configuration's own step beside bare products of its dtype."""
    model_values, values = train.split_configs(train.read_config_file(file))
    values |= {"device": options.device, "fp8": options.fp8, "recompute": options.recompute}
    values |= {"batch_size": options.batch_size} if options.batch_size else {}
    config = train.TrainConfig(**values | {"compile": compiled})
    machine = train.start_machine(config)
    cuda = machine.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with machine.device:
        model = DeepSeekV3(ModelConfig(**model_values))
    step = our_step(model, config, machine)
    product_flops, product = products(machine.device, machine.dtype)
    tokens = config.batch_size * config.block_size
    flops = tokens * train.flops_per_token(model, config.block_size)
    t = interleaved({"products": product, "step": step}, options.rounds)
    if options.profile:
        print(profile(step, machine.device))
    median, peak = statistics.median(t["step"]), train.peak_flops(machine.device)
    return {
        "": Path(file).stem, "compile": compiled, "fp8": config.fp8,
        "dtype": str(machine.dtype).removeprefix("torch."), "tokens": tokens,
        "seconds": Spread.of(t["step"]), "tokens/s": tokens / median,
        "GFLOP/s": flops / median / 1e9,
        "of bare products": ratio(t["products"], t["step"], flops / product_flops),
        "MFU": flops / median / peak if peak else None,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
    }  # fmt: skip


def train_(options: TrainOptions, files: list[str]) -> Iterator[Table]:
    """A training step: the reference model beside transformers', and config/small.py (or the file
    named) beside the products that the machine can make."""
    device = train.start_machine(train.TrainConfig(device=options.device)).device
    if not files:
        yield from reference_tables(options)
    bare = {d: products(device, d) for d in (torch.bfloat16, torch.float32)}
    t = interleaved({d: function for d, (_, function) in bare.items()}, options.rounds)
    speed = {str(d): flops / statistics.median(t[d]) / 1e9 for d, (flops, _) in bare.items()}
    yield Table("bare products, GFLOP/s", [speed])
    variants = [False, True] if options.compile or device.type == "cuda" else [False]
    rows = [config_step((files or ["config/small.py"])[0], options, c) for c in variants]
    yield Table("train.py's step, by the model's own FLOPs", rows)


def profile(step: Callable, device: torch.device) -> str:
    """The 25 operations in which three steps spend most time."""
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
        synchronize()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50)


# ---- decode --------------------------------------------------------------------------------------


@dataclass
class DecodeOptions(Options):
    ckpt: str = ""  # a run with MTP: measure speculation on it, and nothing else
    new_tokens: int = 128  # decoded after each prompt
    compile: bool = True  # compiled decoding as well; the first time it compiles for minutes
    dtype: str = "float32"  # of the speculation table
    temperature: float = 0.0  # of the speculation table; 0 takes the likeliest token
    contexts: str = "1024,2048,4096,8192,16384,32768"  # cached tokens of the context table
    their_longest: int = 32768  # transformers' step is timed up to this context
    prompts: str = "import |def main(|class Parser:|    def __init__(self"  # of --ckpt, cut at |


def decode(options: DecodeOptions, files: list[str]) -> Iterator[Table]:
    """Decoding at batch 1 in fp32: the reference model, ours and transformers', then the cost of a
    long context; with --ckpt, speculation on that checkpoint."""
    device, _ = sample.find_device(sample.SampleConfig(device=options.device))
    if options.ckpt:
        for compile in (False, True)[: 1 + options.compile]:
            yield speculation(options, device, compile)
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        DeepSeekV3(ModelConfig(**REFERENCE)).save_pretrained(folder)
        model = DeepSeekV3.from_pretrained(folder, torch.float32, str(device))
        hf = {kind: transformers_model(folder, device, kind) for kind in ("grouped_mm", "eager")}
    yield from plain_tables(options, model, hf)
    yield context_table(options, model, hf["eager"])


@torch.inference_mode()
def plain_tables(options: DecodeOptions, model: DeepSeekV3, hf: dict[str, Any]) -> list[Table]:
    prompt = torch.randint(4096, (1, 64)).to(model.norm.weight.device)
    new, text = options.new_tokens, {}
    greedy = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)

    def ours(name: str, compile: bool):
        settings = dict(temperature=0, speculative=0, compile=compile)
        text[name] = sample.generate(model, prompt, new, **settings)

    def theirs(name: str):
        text[name] = hf[name].generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)

    functions = {f"transformers {name}": lambda name=name: theirs(name) for name in hf}
    functions["ours"] = lambda: ours("ours", False)
    if options.compile:
        functions["ours compiled"] = lambda: ours("ours compiled", True)
    seconds = interleaved(functions, options.rounds)
    title = f"greedy decoding, fp32, prompt 64, {new} new tokens, prompt included in the time"
    same = {name: torch.equal(tokens, text["ours"]) for name, tokens in text.items()}
    return [*speed_tables(title, seconds, new), Table("the same tokens", [same])]


def our_step_at(model: DeepSeekV3, S: int, main: Callable) -> tuple[list[Tensor], Callable]:
    """A cache of S random latents, and a function that decodes one token after them."""
    cache = Cache(model.config, len(model.layers), 1, S + 1, model.embed_tokens.weight)
    for kv in cache.kv:
        kv.normal_()
    token, length = cache.length[None], cache.length + S

    def step():
        cache.truncate(length, S)
        main(model, sample.shape_of(model), token, cache)[1].argmax()

    return [kv[:, :S].contiguous() for kv in cache.kv], step


def their_step_at(hf: nn.Module, S: int) -> Callable:
    cache, c = optional("transformers").DynamicCache(config=hf.config), hf.config
    widths = c.kv_lora_rank, c.qk_rope_head_dim
    for i in range(c.num_hidden_layers):
        latents = (torch.randn(1, 1, S, n, device=hf.device) for n in widths)
        cache.update(*latents, i)
    token = torch.zeros(1, 1, dtype=torch.long, device=hf.device)
    # The argument's name has changed between versions.
    key = "cache" if "cache" in inspect.signature(hf.forward).parameters else "past_key_values"

    def step():
        hf(input_ids=token, use_cache=True, **{key: cache}).logits.argmax()
        cache.crop(-1)

    return step


@torch.inference_mode()
def context_table(options: DecodeOptions, model: DeepSeekV3, hf: nn.Module) -> Table:
    """Each length beside an empty context: the difference is attention."""
    main = sample.main_step
    rows, empty, their_empty = [], our_step_at(model, 1, main)[1], their_step_at(hf, 1)
    if options.compile:
        fast = sample.torch_compile(main, hf.device)
        fast_empty = our_step_at(model, 2, fast)[1]  # torch.compile has another graph for size 1
    for S in map(int, options.contexts.split(",")):
        kv, step = our_step_at(model, S, main)
        functions = {"empty": empty, "ours": step, "read": lambda kv=kv: [x.sum() for x in kv]}
        if options.compile:
            functions |= {"fast empty": fast_empty, "fast": our_step_at(model, S, fast)[1]}
        if options.their_longest >= S:
            functions |= {"their empty": their_empty, "theirs": their_step_at(hf, S)}
        t = interleaved(functions, options.rounds)
        ms = {name: 1000 * statistics.median(values) for name, values in t.items()}
        grown = [a - b for a, b in zip(t["ours"], t["empty"], strict=True)]
        row = {
            "context": S, "cache MB": sum(x.nbytes for x in kv) / 1e6, "step ms": ms["ours"],
            "attention ms": 1000 * statistics.median(grown), "reading ms": ms["read"],
            "attention/reading": ratio(grown, t["read"]),
        }  # fmt: skip
        if options.compile:
            grown = [a - b for a, b in zip(t["fast"], t["fast empty"], strict=True)]
            row |= {"compiled ms": ms["fast"]}
            row |= {"compiled attention/reading": ratio(grown, t["read"])}
        if "theirs" in t:
            row |= {"transformers ms": ms["theirs"], "of it": ms["theirs"] - ms["their empty"]}
            row |= {"its step/ours": ratio(t["theirs"], t["ours"])}
        rows.append(row)
    title = "one decoding step, fp32; attention (transformers': of it): what the step takes beyond "
    return Table(title + "that at context 1; reading: summing the cache once", rows)


def theorem(shares: list[float], draft: float, verify: float = 1.0) -> float:
    """The speed-up over plain decoding that speculation allows: tokens per round over its cost.

    shares[j] is how often the first j+1 drafts all stay; costs are in forwards of one token: draft
    that of one draft, verify that of checking them all. Where shares are powers of one alpha and
    verify is 1 this is (1 - alpha^(g+1)) / ((1 - alpha) (g c + 1)), Theorem 3.8 of Leviathan et al.
    """
    return (1 + sum(shares)) / (len(shares) * draft + verify)


def forward_costs(
    model: DeepSeekV3, text: Tensor, rounds: int, main_step: Callable, mtp_step: Callable
) -> dict[Any, float]:
    """Median seconds of a draft ("draft") and of the forward of 1 to 5 tokens (1, ..., 5) in the
    second half of text (1, S), at places that take turns as well."""
    S, like, shape = text.shape[1], model.embed_tokens.weight, sample.shape_of(model)
    main, mtp = (Cache(model.config, n, 1, S, like) for n in (len(model.layers), 1))
    h = model.trunk(text, main)
    model.predict_next(0, h[:, :-1], text[:, 1:], mtp)
    places = [(s, main.length * 0 + s) for s in range(S // 2, S - sample.MOST_DRAFTS - 1, 4)]

    def draft():
        for s, length in places:
            mtp.truncate(length, s)
            # contiguous as in generate: other strides would be another graph
            one, token = h[:, s : s + 1].clone(), text[:, s + 1 : s + 2].clone()
            mtp_step(model, shape, 0, one, token, mtp, text[:, :1] * 0)[1].argmax(-1)

    def verify(T: int):
        for s, length in places:
            main.truncate(length, s)
            main_step(model, shape, text[:, s : s + T].clone(), main)[1].argmax(-1)

    functions = {T: lambda T=T: verify(T) for T in range(1, sample.MOST_DRAFTS + 2)}
    seconds = interleaved({"draft": draft, **functions}, rounds)
    return {name: statistics.median(t) / len(places) for name, t in seconds.items()}


@torch.inference_mode()
def speculation(options: DecodeOptions, device: torch.device, compile: bool) -> Table:
    """Every draft length on the same prompts, and how near it comes to what the theorem allows."""
    model, tokenizer, _ = sample.load_model(options.ckpt, device, getattr(torch, options.dtype))
    if not len(model.mtp) or tokenizer is None:
        raise ValueError(f"{options.ckpt} has no MTP module or no tokenizer; name another --ckpt.")
    prompts = [
        torch.tensor([tokenizer.encode(text)], device=device) for text in options.prompts.split("|")
    ]
    stats, texts = {}, {}

    def run(g: int | str):
        stats[g], texts[g] = sample.Stats(), []
        for i, prompt in enumerate(prompts):
            generator = torch.Generator(device).manual_seed(i)
            texts[g] += sample.generate(
                model, prompt, options.new_tokens, temperature=options.temperature, speculative=g,
                compile=compile, generator=generator, stats=stats[g],
            ).tolist()  # fmt: skip

    lengths = [*range(sample.MOST_DRAFTS + 1), "auto"]
    seconds = interleaved({g: lambda g=g: run(g) for g in lengths}, options.rounds)
    steps = sample.main_step, sample.mtp_step
    steps = [sample.torch_compile(f, device) for f in steps] if compile else steps
    cost = forward_costs(model, torch.tensor(texts[0][:1], device=device), options.rounds, *steps)
    rows = []
    for g in lengths:
        s, gained = stats[g], ratio(seconds[0], seconds[g])
        shares = [a / d for a, d in zip(s.accepted, s.drafted, strict=True) if d]
        row = {
            "drafts": str(g), "tokens/s": s.tokens / statistics.median(seconds[g]),
            "speed-up": gained, "accepted by position": " ".join(f"{x:.2f}" for x in shares),
            "tokens/forward": (s.tokens - len(prompts)) / max(1, s.row_rounds),
        }  # fmt: skip
        if g != "auto":
            draft, verify = cost["draft"] / cost[1], cost[g + 1] / cost[1]
            allowed = theorem(shares, draft, verify)
            row |= {"draft cost": draft, "verify cost": verify, "allowed": allowed}
            row |= {"share": gained.median / allowed}
        if options.temperature == 0:
            row |= {"same texts": sum(a == b for a, b in zip(texts[g], texts[0], strict=True))}
        rows.append(row)
    title = (
        f"speculation on {Path(options.ckpt).name}, {len(prompts)} prompts one after another, "
        f"{options.new_tokens} new tokens, temperature {options.temperature:g}, {options.dtype}, "
        f"{'compiled' if compile else 'eager'};\ncosts in forwards of one token; "
        "allowed: by Theorem 3.8 of Leviathan et al. at these costs"
    )
    return Table(title, rows)


# ---- fp8 -----------------------------------------------------------------------------------------

# In and out features: DeepSeek-V3's dense FFN, o, q_b, expert, kv_b, kv_a projection, and a toy.
SHAPES = [(7168, 18432), (16384, 7168), (1536, 24576), (7168, 2048), (512, 32768), (7168, 576)]
SHAPES += [(1024, 4096)]


@dataclass
class FP8Options(Options):
    compile: bool = True  # on CUDA: compile layers and quantiser, which fuses the latter
    curves: str = ""  # a config file: train it in FP8 and without, and compare the losses
    seeds: int = 3  # runs of each kind
    steps: int = 0  # optimiser steps of a run (0: the config's)
    dtype: str = "auto"  # of the runs


def fp8_(options: FP8Options, files: list[str]) -> Iterator[Table]:
    """FP8 products, layers and quantiser beside bf16; with --curves, losses instead of speed."""
    if options.curves:
        yield loss_gaps(options)
        return
    device = train.start_machine(train.TrainConfig(device=options.device)).device
    shapes, tokens, compiled = [(256, 512), (512, 200)], [256], False
    if fp8.has_blockwise_fp8(device):
        shapes, tokens, compiled = SHAPES, [4096, 8192, 16384], options.compile
    yield fp8_table(shapes, tokens, device, options.rounds, compiled)


def fp8_table(shapes, tokens: list[int], device, rounds: int, compiled: bool) -> Table:
    """One row for each (in, out) and number of tokens, slow ones included."""
    rows = [fp8_row(*s, M, device, rounds, compiled) for s in shapes for M in tokens]
    how = "compiled" if compiled else "eager"
    if not fp8.has_blockwise_fp8(torch.device(device)):
        how = "EMULATION, which says nothing of FP8's speed"
    title = f"FP8: {how}; layer: forward + backward of nn.Linear in bf16 and of FP8Linear with its"
    return Table(title + " weight in fp32, quantised each time; GB/s read and written", rows)


def fp8_row(K: int, N: int, M: int, device, rounds: int, compiled: bool) -> dict[str, Any]:
    torch.compiler.reset()
    x = torch.randn(M, K, device=device).bfloat16().requires_grad_()
    dy = torch.randn(M, N, device=device).bfloat16()
    plain = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
    layer, quantize = fp8.FP8Linear(K, N, device=device), fp8.quantize
    if compiled:
        plain, layer, quantize = map(torch.compile, (plain, layer, quantize))
    a, w = x.detach(), plain.weight.detach()
    qa, qw = fp8.quantize(a, fp8.TILE, pow2=True), fp8.quantize(w, fp8.BLOCK, pow2=True)

    def both(module: nn.Module):
        x.grad = module.weight.grad = None
        module(x).backward(dy)

    functions = {
        "bf16": lambda: a @ w.T,
        "fp8": lambda: fp8.scaled_mm(qa, qw, fp8.BLOCK, torch.bfloat16),
        "bf16 layer": lambda: both(plain),
        "fp8 layer": lambda: both(layer),
        "quantiser": lambda: quantize(a, fp8.TILE, pow2=True),
        "copy": lambda: a.clone(),
    }
    t = interleaved(functions, rounds)
    s = {name: statistics.median(values) for name, values in t.items()}
    tera, moved = 2e-12 * M * N * K, a.nbytes + qa[0].nbytes + qa[1].nbytes
    return {
        "in -> out": f"{K} -> {N}", "tokens": M, "bf16 TFLOP/s": tera / s["bf16"],
        "FP8 TFLOP/s": tera / s["fp8"], "FP8 speed-up": ratio(t["bf16"], t["fp8"]),
        "bf16 layer ms": 1000 * s["bf16 layer"], "FP8 layer ms": 1000 * s["fp8 layer"],
        "layer speed-up": ratio(t["bf16 layer"], t["fp8 layer"]),
        "quantiser GB/s": moved / s["quantiser"] / 1e9, "copy GB/s": 2 * a.nbytes / s["copy"] / 1e9,
    }  # fmt: skip


@contextlib.contextmanager
def one_scale_per_tensor() -> Iterator[None]:
    """Within the block FP8 has the usual contrast to the report's tiles: one scale for all of x."""
    tilewise = fp8.quantize

    def quantize(x: Tensor, block: tuple[int, int], pow2: bool = False) -> fp8.Quantized:
        q, s = tilewise(x, block, pow2)
        if x.numel():
            _, scale = tilewise(x.float().abs().amax().view(1, 1), fp8.TILE, pow2)
            q = (x.float() / scale).clamp(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3).contiguous()
            s = scale.expand_as(s).contiguous()
        return q, s

    fp8.quantize = quantize
    try:
        yield
    finally:
        fp8.quantize = tilewise


@contextlib.contextmanager
def gradients_in_blocks() -> Iterator[None]:
    """Within the block gradients share a scale per 128x128 block, on which training diverged in
    the report (Appendix B.2). They are rounded that way first; the tiles then change nothing."""
    backward = fp8._FP8Linear.backward

    def blocked(ctx, dy: Tensor):
        parts = [fp8.quantize(x, fp8.BLOCK, pow2=True) for x in dy.split(ctx.rows)]
        dy = torch.cat([fp8.dequantize(*part, fp8.BLOCK) for part in parts]).to(dy.dtype)
        return backward(ctx, dy)

    fp8._FP8Linear.backward = staticmethod(blocked)
    try:
        yield
    finally:
        fp8._FP8Linear.backward = staticmethod(backward)


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, begun at the first value."""
    return list(itertools.accumulate(values, lambda mean, x: keep * mean + (1 - keep) * x))


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t."""
    t = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, None
    return mean, (t[n - 2] if n - 2 < len(t) else 2.2) * statistics.stdev(values) / math.sqrt(n)


def run_losses(options: FP8Options, out: Path, seed: int, low: bool) -> tuple[list[float], float]:
    """Trains once: the smoothed loss of every step, and the last validation loss (nats)."""
    argv = [options.curves, f"--out={out}", f"--seed={seed}", f"--fp8={low}", "--log_every=1"]
    argv += [f"--dtype={options.dtype}", f"--device={options.device}"]
    with contextlib.redirect_stdout(sys.stderr):  # the sample at the end of a run
        train.main([*argv, f"--steps={options.steps}"] if options.steps else argv)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    values = [line["val_loss"] for line in log if "val_loss" in line]
    return smooth([line["loss"] for line in log if "loss" in line]), values[-1]


def loss_gaps(options: FP8Options) -> Table:
    """(FP8 - base) / base of the loss, paired by seed: same weights at first, same data."""
    kinds = {"tiles": contextlib.nullcontext, "one scale per tensor": one_scale_per_tensor}
    kinds["gradients in 128x128"] = gradients_in_blocks
    columns = ("gap %", "worst gap of 2nd half %", "validation gap %")
    rows, gaps = [], {kind: [] for kind in kinds}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            base, base_val = run_losses(options, Path(folder) / "base", seed, False)
            for kind, context in kinds.items():
                with context():
                    loss, val = run_losses(options, Path(folder) / kind.split()[0], seed, True)
                gap = [100 * (b / a - 1) for a, b in zip(base, loss, strict=True)]
                worst = max(gap[len(gap) // 2 :], key=abs)
                gaps[kind].append([gap[-1], worst, 100 * (val / base_val - 1)])
                rows.append({"FP8 with": kind, "seed": str(seed), "base loss": base[-1]})
                rows[-1] |= dict(zip(columns, gaps[kind][-1], strict=True))
                info(", ".join(f"{key} {cell(value)}" for key, value in rows[-1].items()))
    for kind, values in gaps.items():
        pairs = [interval(list(column)) for column in zip(*values, strict=True)]
        for name, figures in zip(("mean", "+- (95 %)"), zip(*pairs, strict=True), strict=True):
            row = {"FP8 with": kind, "seed": name}
            rows.append(row | dict(zip(columns, figures, strict=True)))
    title = f"relative gap of FP8's loss (average with 0.9) to that of dtype {options.dtype}"
    return Table(f"{title}, {Path(options.curves).stem}", rows)


# ---- plot ----------------------------------------------------------------------------------------


def plot(options: Options, files: list[str]) -> Iterator[Table]:
    """Draws RUN/loss.png and RUN/expert_load.png from RUN/log.jsonl."""
    if not files:
        raise ValueError("name the run's folder: python bench.py plot out/small")
    folder, Figure = Path(files[0]), optional("matplotlib.figure").Figure
    if not (folder / "log.jsonl").is_file():
        raise FileNotFoundError(f"no log.jsonl in {folder}; name the folder of a run.")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    figure = Figure((9, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for axes, keys in (upper, ("loss", "mtp_loss", "val_loss")), (lower, ("max_vio",)):
        for key in keys:
            points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
            marker = "o-" if key == "val_loss" else "-"
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker, label=key)
        axes.grid(alpha=0.3)
        axes.legend()
    upper.set_ylabel("nats per token")
    lower.set_xlabel("step")
    figure.savefig(folder / "loss.png", dpi=120)
    written = ["loss.png"]
    if loads := [line for line in log if line.get("expert_load")]:
        load = torch.tensor(loads[-1]["expert_load"])  # (layers, E) shares
        figure = Figure((9, 1.5 + 0.35 * len(load)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(load * load.shape[1], aspect="auto", vmin=0, vmax=2, cmap="RdBu_r")
        axes.set(
            xlabel="expert",
            ylabel="MoE layer",
            yticks=range(len(load)),
            title=f"load at step {loads[-1]['step']}",
        )
        figure.colorbar(image, label="1 = even share")
        figure.savefig(folder / "expert_load.png", dpi=120)
        written.append("expert_load.png")
    yield Table("written", [{"file": str(folder / name)} for name in written])


# ---- The command ---------------------------------------------------------------------------------

COMMANDS = {  # function, options, what files are named, how many at most
    "sizes": (sizes, SizesOptions, "config", 999),
    "train": (train_, TrainOptions, "config", 1),
    "decode": (decode, DecodeOptions, "", 0),
    "fp8": (fp8_, FP8Options, "", 0),
    "plot": (plot, Options, "run", 1),
}


def main(argv: list[str]):
    command, *argv = argv or [""]
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in COMMANDS:
        what = unknown_key(command, COMMANDS).replace("key", "command") if command else ""
        info(f"usage: python bench.py {'|'.join(COMMANDS)} [--key=value]; {what or 'see --help'}")
        sys.exit(2)
    function, kind, positional, most = COMMANDS[command]
    files = [arg for arg in argv if not arg.startswith("-")]
    keys = [arg for arg in argv if arg.startswith("-")] + files[most : most + 1]
    # The extra file, if any, is refused by parse_args where no positional argument is known.
    _, values = parse_args(
        function.__doc__, keys, Options, kind, positional=positional if len(files) <= most else ""
    )
    options = kind(**values)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts, tables = machine_facts(), []
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
    for table in function(options, files):
        print(table, flush=True)
        tables.append(asdict(table))
        if options.json:
            result = {"command": command, **facts, "options": asdict(options), "tables": tables}
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
