"""What a run takes on cards that nobody has tried: python experiments/cards.py

Memory is counted. Two micro-batches run on fake tensors, which have shapes but no values, and every
tensor counts from its creation to its end; of a compiled graph only the results do. CUDA itself
takes 0.5 to 1 GB more.

Time is computed. A micro-batch multiplies at 0.5 to 0.6 of the card's peak, moves all other bytes
at 0.85 of its bandwidth, one after the other, and waits 10 us for each product of an expert that
the host starts by itself, as on all cards but H100 and B200. The shares and the 10 us are
assumptions. Compiled code moves the bytes that Inductor's scheduler counted (in
docs/MEASUREMENTS.md); uncompiled code those of every operation that is no product. Uncompiled code
takes at least as long as its host, which starts an operation every 10 us. docs/GPU.md has some of
the rows.
"""

import io
import weakref
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from unittest import mock

import run
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import bench
import model as essay
import train
from support import processes
from support.clock import rough
from support.flops import PEAK_FLOPS, flops_per_token
from support.settings import parse_args, run_command
from support.sizes import parameter_counts

SHARES = (0.6, 0.5)  # of a card's peak, in products
GROUPED = "_grouped_mm"  # of torch's operations
OF_BANDWIDTH, PER_START = 0.85, 10e-6
# GB per second, by NVIDIA's data sheets.
BANDWIDTH = {
    "RTX 3060": 360, "RTX 3090": 936, "RTX 4060": 272, "RTX 4070": 504, "RTX 4090": 1008,
    "RTX 5090": 1792, "T4": 320, "H100": 3350,
}  # fmt: skip
# What others measured for a grouped product in bf16 on an H100, FLOP/s (docs/MEASUREMENTS.md).
GROUPED_FLOPS = (242e12, 180e12)
# Bytes that compiled code moves besides those of products and weights: per token, and per token and
# word of the vocabulary (both losses).
MOVED = {"one_gpu": (1.15e6, 32), "base_1b": (4.87e6, 0)}


@dataclass
class Case:
    """One row: a card, and a command."""

    card: str
    file: str = "one_gpu"
    options: dict = field(default_factory=dict)  # of train.py
    compiled: bool = True
    dtype: str = "bfloat16"
    cards: int = 1


STORIES = {"vocab_size": 4096, "block_size": 512, "steps": 6000}
NIGHTS = {"recompute": True, "grad_accum": 128}
CASES = [
    *(Case(card, "small", compiled=False) for card in ("RTX 4090", "RTX 3060", "H100")),
    *(Case(card) for card in ("RTX 5090", "RTX 4090", "RTX 3090", "RTX 4070", "RTX 3060")),
    Case("RTX 4060", options={"grad_accum": 32}),
    Case("RTX 4090", compiled=False, options={"grad_accum": 32}),
    Case("RTX 3060", compiled=False, options={"grad_accum": 32}),
    Case("T4", compiled=False, dtype="float32"),
    Case("T4", compiled=False, dtype="float32", options={"grad_accum": 32}),
    *(Case(card, options=STORIES | {"grad_accum": 4}) for card in ("RTX 4090", "RTX 3060")),
    Case("RTX 4090", options=STORIES),
    *(Case(card, "base_1b", NIGHTS) for card in ("RTX 4090", "RTX 3090")),
    Case("H100", "base_1b"),
    Case("H100", "base_1b_8gpu", cards=8),
]


class Tensors(TorchDispatchMode):
    """Counts within `with Tensors() as tensors:` the bytes of all tensors, now and at the peak, the
    operations, and the bytes that operations other than products read and write."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.moved = self.operations = 0
        self.known, self.in_graph = weakref.WeakSet(), False

    @classmethod
    def ignore_compile_internals(cls) -> bool:  # else dynamo would trace this counter, too
        return True

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == GROUPED:  # has no fake in float32
            x, y = args[:2]
            groups = [len(args[2])] if y.ndim == 2 else []
            out = x.new_empty(*groups, x.shape[-2], y.shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
            if not (self.in_graph or func.is_view or func.overloadpacket in flop_registry):
                leaves = tree_leaves((args, kwargs, out))
                self.moved += sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        if not self.in_graph:
            self.operations += not (func.is_view or func.namespace == "prim")
            self.follow(out)
        return out

    def follow(self, tensors):
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.grow(storage.nbytes())
                weakref.finalize(storage, self.grow, -storage.nbytes())

    def grow(self, n: int):
        self.now += n
        self.peak = max(self.peak, self.now)

    def compile(self, graph: torch.fx.GraphModule, inputs):
        """A backend of torch.compile that partitions a graph as Inductor does, and runs it."""
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        def counted(graph, inputs):
            def call(*args):
                self.in_graph = True
                try:
                    out = graph(*args)
                finally:
                    self.in_graph = False
                self.follow(out)
                return out

            return make_boxed_func(call)

        return aot_autograd(
            fw_compiler=counted,
            inference_compiler=counted,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )(graph, inputs)


def open_case(case: Case) -> tuple[nn.Module, train.TrainConfig]:
    """The network, on the meta device, and the settings of its run."""
    network, settings = bench.open_config(run.ROOT / f"config/{case.file}.py")
    shape, others = train.split_configs(case.options)
    with torch.device("meta"):
        network = essay.DeepSeekV3(replace(network.config, **shape))
    return network, train.TrainConfig(**(settings | others))


def count(case: Case, evaluation: bool = False) -> Tensors:
    """Runs two micro-batches: of a training after its first step, or of an evaluation, of which the
    optimiser's moments are in memory, too. Bytes and operations are those of one micro-batch, with
    its share of the optimisers' operations."""
    meta, config = open_case(case)
    windows = config.batch_size // (config.grad_accum * case.cards)
    if evaluation:
        machine = processes.Machine(torch.device("cpu"), torch.bfloat16, world=case.cards)
        batches = train.validation_windows(range(2), config.block_size, config, machine)
        windows = len(next(batches))
    torch.compiler.reset()
    # Rows of experts are padded on a CPU only.
    unit = mock.patch.object(essay, "row_unit", lambda x: 1)
    with FakeTensorMode(allow_non_fake_inputs=True), unit, Tensors() as tensors:
        network = essay.DeepSeekV3(meta.config).train(not evaluation)
        network.recompute = config.recompute
        if case.compiled:
            torch._dynamo.config.recompile_limit = 64
            for part in (*network.layers, *network.mtp, network.norm):
                part.compile(backend=tensors.compile, dynamic=False)
            loss = network.cross_entropy
            network.cross_entropy = torch.compile(loss, backend=tensors.compile, dynamic=False)
        moments = [torch.empty_like(p) for p in network.parameters() for _ in range(2)]
        tensors.peak, tensors.moved = tensors.now, 0
        low = case.dtype == "bfloat16"
        for _ in range(2):
            x = torch.zeros(windows, config.block_size + 1, dtype=torch.long)
            with (
                torch.set_grad_enabled(not evaluation),
                torch.autocast("cpu", torch.bfloat16, low, cache_enabled=False),
            ):
                losses = network(x[:, :-1], x[:, 1:])
            if not evaluation:
                sum(losses.values()).backward()
            del losses
        tensors.moved /= 2
        tensors.operations /= 2
        del moments
        if not (evaluation or case.compiled):
            peak, operations = tensors.peak, tensors.operations
            with redirect_stderr(io.StringIO()):  # the message about Muon's matrices
                optimizers = train.make_optimizers(network, replace(config, dtype=case.dtype))
            for optimizer in optimizers:
                optimizer.step()
            of_step = tensors.operations - operations
            tensors.peak, tensors.operations = peak, operations + of_step / config.grad_accum
    return tensors


def hours(case: Case, counted: Tensors) -> tuple[float, float]:
    """The least and the most hours of the run, evaluations not included."""
    network, config = open_case(case)
    c, again = network.config, 4 / 3 if config.recompute else 1.0
    tokens = config.batch_size * config.block_size // (config.grad_accum * case.cards)
    counts, layers = parameter_counts(network), len(network.gates())
    weights = counts["total"] + counts["mtp"]
    moved = counted.moved
    if case.compiled:
        per_token, per_word = MOVED[case.file.removesuffix("_8gpu")]
        moved = again * (tokens * (per_token + per_word * c.vocab_size) + 6 * weights)  # 6: a cast
        moved += 12 * weights  # a gradient added to the one of earlier micro-batches
    moved += 28 * weights / config.grad_accum  # AdamW, once a step
    flops = again * tokens * flops_per_token(network, config.block_size)
    experts = 18 * c.hidden_size * c.moe_intermediate_size * c.num_experts_per_tok * layers
    experts *= again * tokens
    starts = 0 if case.card == "H100" else again * 6 * c.n_routed_experts * layers
    host = 0 if case.compiled else PER_START * (counted.operations + starts)
    times = []
    for share, grouped in zip(SHARES, GROUPED_FLOPS, strict=True):
        peak = PEAK_FLOPS[case.card]
        if case.card == "H100":
            products = (flops - experts) / (share * peak) + experts / grouped
        else:
            products = flops / (share * peak) + starts * PER_START
        seconds = products + moved / (OF_BANDWIDTH * BANDWIDTH[case.card] * 1e9)
        times.append(max(seconds, host) * config.grad_accum * config.steps / 3600)
    return tuple(times)


def expected_loss(active: float, tokens: float) -> tuple[float, float]:
    """Nats per token of a dense network of so many parameters, by the fits of Hoffmann et al.
    (arXiv 2203.15556) and Besiroglu et al. (2404.10102), on other text with another tokenizer."""
    fits = (1.69, 406.4, 0.34, 410.7, 0.28), (1.8172, 482.01, 0.3478, 2085.43, 0.3658)
    return tuple(E + A / active**alpha + B / tokens**beta for E, A, alpha, B, beta in fits)


def row(case: Case) -> dict[str, str]:
    network, config = open_case(case)
    tensors, evaluation = count(case), count(case, evaluation=True)
    low, high = hours(case, tensors)
    of_peak = config.steps * config.batch_size * config.block_size / case.cards
    of_peak *= flops_per_token(network, config.block_size) / PEAK_FLOPS[case.card] / 3600
    return {
        "": f"{case.cards} x {case.card}" if case.cards > 1 else case.card,
        "config": case.file,
        "options": " ".join(f"--{k}={v}" for k, v in case.options.items()),
        "compiled": case.compiled, "dtype": case.dtype,
        "GB": f"{tensors.peak / 1e9:.1f}", "evaluation GB": f"{evaluation.peak / 1e9:.1f}",
        "time": f"{rough(3600 * low)} to {rough(3600 * high)}",
        "mfu": f"{of_peak / high:.2f} to {of_peak / low:.2f}",
    }  # fmt: skip


def main(argv: list[str]):
    parse_args(__doc__, argv, bench.Options)
    cases = tqdm(CASES, disable=None, leave=False)  # compiled ones take a minute
    print(bench.Table("memory and time by card, computed", [row(case) for case in cases]))
    network, config = open_case(Case("RTX 4090"))
    tokens = config.steps * config.batch_size * config.block_size
    losses = expected_loss(parameter_counts(network)["active"], tokens)
    print("\none_gpu.py's validation loss by two fits: " + ", ".join(f"{x:.2f}" for x in losses))


if __name__ == "__main__":
    run_command(main)
