"""Measure speed and size side by side: python bench.py COMMAND [--key=value].

    sizes [CONFIG ...]   parameters, cache, FLOPs and bytes; nothing is allocated
    train [CONFIG]       a training step beside transformers' and the speed of bare products
    decode               decoding beside transformers', of one text and by length of the context
    fp8                  FP8 products and layers beside bf16

`python bench.py COMMAND --help` lists a command's keys. A machine's speed drifts, so whatever is
compared takes turns (A B A B ...), and ratios are computed within a round. Tables show the median
of all rounds, with [least..most]. Close other programs: they slow both sides unequally.
"""

import itertools
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import fp8
import sample
import train
from huggingface import FP8_WEIGHTS, checkpoint_views, from_pretrained, save_pretrained
from model import Cache, DeepSeekV3, ModelConfig
from support import processes
from support.flops import flops_per_token, peak_flops
from support.processes import Machine, fast_dtype
from support.settings import Refusal, info, parse_args, read_config_file, run_command, unknown_key
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


def speed_table(title: str, seconds: dict[tuple[str, str], Rounds], tokens: int) -> Table:
    """Tokens per second, by program and form (number format, compiled or not). Like is compared
    with like: `x transformers` is the speed relative to transformers' fastest row of that form."""
    median, rows = {key: statistics.median(s) for key, s in seconds.items()}, []
    for (program, form), s in seconds.items():
        rivals = [key for key in seconds if key[0] != "ours" and key[1] == form]
        times = ratio(seconds[min(rivals, key=median.get)], s) if rivals else None
        row = {"": f"{program} {form}", "seconds": s, "tokens/s": tokens / median[program, form]}
        rows.append(row | {"x transformers": times})
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
        "GFLOP/trained token": flops / 1e9,
        "bf16 GB": 2e-9 * (count["total"] + count["mtp"]), "FP8 GB": in_fp8 / 1e9,
    }  # fmt: skip


def sizes(options: Options, files: list[str]) -> Iterator[Table]:
    """Parameters, cache, FLOPs and bytes of config/*.py, or of the files named."""
    ours = Path(__file__).parent.glob("config/[!_]*.py")
    rows = [size_row(file) for file in files or sorted(ours)]
    yield Table("cache per token, all layers; FLOPs and GB with MTP", rows)


# ---- train ---------------------------------------------------------------------------------------


@dataclass
class TrainOptions(Timed):
    compile: Literal["auto", True, False] = "auto"  # auto: if train.py would; only in bfloat16
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
            weight_of = train.loss_weights(config, step=0)
            with fp8.quantized_once(model, machine.compiled):
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
    directory: str, device: torch.device, dtype: torch.dtype, experts: Sequence[str]
) -> dict[str, nn.Module]:
    """Our model, and DeepseekV3ForCausalLM with each of these implementations of experts."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = {"ours": from_pretrained(directory, dtype, str(device))}
    load = partial(transformers.DeepseekV3ForCausalLM.from_pretrained, dtype=dtype)
    for kind in experts:
        models[f"transformers {kind}"] = load(directory, experts_implementation=kind).to(device)
    return models


FORMATS = ("float32", "bfloat16")  # of the products
# transformers' implementations of experts that were measured. It has five: deepgemm and sonicmoe
# need a GPU, and batched_mm copies an expert's weights for every row, too many in training.
TRAINING = ("grouped_mm", "eager")
DECODING = ("grouped_mm", "batched_mm", "eager")


def reference_table(options: TrainOptions) -> Table:
    """A training step of our model and of transformers', in both formats; in bfloat16 compiled,
    too, if that is asked for or train.py's default."""
    base, steps = train.TrainConfig(batch_size=8, block_size=256, device=options.device), {}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(DeepSeekV3(ModelConfig(**REFERENCE)), folder)
        low = replace(base, dtype=FORMATS[1], compile=options.compile)
        ways = [(dtype, False) for dtype in FORMATS]  # dtype, compiled
        # Not in float32, where each step would compile its own choice of experts.
        if processes.compiles(low, processes.usable_device(options.device)):
            ways += [(FORMATS[1], True)]
        for dtype, compiled in ways:
            config = replace(base, dtype=dtype, compile=compiled)
            machine = processes.start(config)
            models = models_in(folder, machine.device, torch.float32, TRAINING)
            for name, model in models.items():
                form = f"{dtype}{' compiled' * compiled}"
                steps[name, form] = training_step(model, config, machine)
    auto, reason = fast_dtype(machine.device)
    title = f"training step, 20.8M parameters, 8 x 256 tokens, AdamW; auto is {auto}: {reason}"
    return speed_table(title, interleaved(steps, options.rounds), 8 * 256)


def config_row(file: str, dtype: str, options: TrainOptions) -> dict[str, Any]:
    """A configuration's training step, beside square products of the same dtype, which run as fast
    as the machine can multiply."""
    model, settings = open_config(file)
    settings |= {name: True for name in ("recompute", "fp8") if getattr(options, name)}
    settings |= {"device": options.device, "dtype": dtype}
    settings["compile"] = options.compile if dtype == "bfloat16" else False
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
    flops, bare = tokens * flops, 2 * n**3
    a = torch.randn(n, n, device=machine.device).to(machine.dtype)
    step = training_step(model, config, machine)
    t = interleaved({"product": lambda: a @ a, "step": step}, options.rounds)
    seconds, memory = statistics.median(t["step"]), torch.cuda.max_memory_allocated()
    peak = peak_flops(machine.device)
    return {
        "": Path(file).stem, "dtype": dtype, "auto": machine.dtype == fast_dtype(machine.device)[0],
        "compiled": machine.compiled,
        "tokens": tokens, "seconds": t["step"], "tokens/s": tokens / seconds,
        "GFLOP/s": flops / seconds / 1e9,
        "of bare products": ratio(t["product"], t["step"], flops / bare),
        "MFU": flops / seconds / peak if peak else None, "peak GB": memory / 1e9 or None,
    }  # fmt: skip


def train_(options: TrainOptions, files: list[str]) -> Iterator[Table]:
    """A training step of CONFIG (default: config/small.py) beside bare products; without a CONFIG
    also the reference model beside transformers'."""
    file = files[0] if files else "config/small.py"
    if not files:
        import transformers  # noqa: F401, fails now rather than after minutes
    device = processes.usable_device(options.device)
    gpu = device.type == "cuda"
    # On a GPU, where a large network in the other format may take minutes, train.py's choice.
    formats = (str(fast_dtype(device)[0])[6:],) if gpu and files else FORMATS
    rows = [config_row(file, dtype, options) for dtype in formats]  # first, for their peak memory
    yield Table("a step, by the model's own FLOPs", rows)
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
        models = {
            dtype: models_in(folder, device, getattr(torch, dtype), DECODING) for dtype in FORMATS
        }
    yield plain_table(options, models)
    yield context_table(options, models["float32"])


def plain_table(options: DecodeOptions, models: dict[str, dict[str, nn.Module]]) -> Table:
    """The speed of greedy decoding of one text; models by format and program. Neither program
    compiles the prompt."""
    from transformers import CompileConfig

    device = models["float32"]["ours"].embed_tokens.weight.device
    prompt = torch.randint(REFERENCE["vocab_size"], (1, options.prompt)).to(device)
    new, texts, functions = options.new_tokens, {}, {}
    how = CompileConfig(fullgraph=True)
    how._compile_all_devices = True  # private; without it transformers compiles on GPUs only

    def ours(key: tuple[str, str], model: DeepSeekV3, compiled: bool):
        settings = dict(temperature=0, speculative=0, compile=compiled)
        texts[key] = sample.generate(model, prompt, new, **settings)

    def transformers(key: tuple[str, str], hf: nn.Module, compiled: bool):
        greedy = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        static = dict(cache_implementation="static", compile_config=how) if compiled else {}
        mask = torch.ones_like(prompt)
        texts[key] = hf.generate(prompt, attention_mask=mask, **greedy, **static)

    for dtype, programs in models.items():
        for compiled, program in itertools.product((False, True)[: 1 + options.compile], programs):
            if compiled and program == "transformers eager":
                continue  # its loop over experts does not fit into one graph
            key = program, f"{dtype}{' compiled' * compiled}"
            run = ours if program == "ours" else transformers
            functions[key] = partial(run, key, programs[program], compiled)
    title = f"greedy decoding, batch 1, prompt {options.prompt}, {new} new tokens"
    table = speed_table(title, interleaved(functions, options.rounds), new)
    for row, (program, form) in zip(table.rows, functions, strict=True):
        row["same text"] = torch.equal(texts[program, form], texts["ours", form.split()[0]])
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


# ---- The command ---------------------------------------------------------------------------------

COMMANDS = {  # function, options, files in the usage, most files
    "sizes": (sizes, Options, "[CONFIG ...]", 999),
    "train": (train_, TrainOptions, "[CONFIG]", 1),
    "decode": (decode, DecodeOptions, "", 0),
    "fp8": (fp8_, Timed, "", 0),
}


def main(argv: list[str]):
    command, *argv = argv or [""]
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in COMMANDS:
        unknown = unknown_key(command, COMMANDS, "command") if command else "see --help"
        info(f"usage: python bench.py {'|'.join(COMMANDS)} [--key=value ...]; {unknown}")
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
    print_tables(function(options, files))


if __name__ == "__main__":
    run_command(main)
