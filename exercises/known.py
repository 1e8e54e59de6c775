"""What check.py knows of every exercise: the answer, made-up inputs, hints, and known mistakes.

The answers are model.py's own functions (and those of sample.py and fp8.py). A known mistake is a
change of the answer's source. Many of them are mistakes that tests/mutations.py plants, too, to see
whether the tests notice. They stand in hints.txt with the hints.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

import fp8
import model as v3
import sample

Case = tuple[str, Callable, tuple]  # its name, what to call, the leaves to differentiate by

TINY = {
    "vocab_size": 32, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 5, "intermediate_size": 8, "moe_intermediate_size": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}}


@dataclass
class Exercise:
    title: str
    module: ModuleType  # where the answer stands
    answers: dict[str, str]  # the reader's function: the answer's name there, NAME or Class.NAME
    cases: Callable[[SimpleNamespace], Iterator[Case]]  # of the functions to try
    helpers: tuple[str, ...] = ()  # functions there that mistakes may change, too
    hint: str = ""
    mistakes: list[tuple[str, str, str]] = field(default_factory=list)  # old text, new text, words


def config(**changes) -> v3.ModelConfig:
    return v3.ModelConfig(**TINY | changes)


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    """Normal random numbers in float64, a leaf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * size
    return x.requires_grad_()


def filled(module: nn.Module) -> nn.Module:
    """The module in float64 with random parameters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


# ---- Made-up inputs ------------------------------------------------------------------------------


def rope_cases(f) -> Iterator[Case]:
    x, small, zeros = random(2, 3, 8), random(4, 8, size=1e-3), torch.zeros(2, 8).double()
    low = random(64, 32, size=30.0).detach().bfloat16()
    norm = partial(f.rms_norm, eps=1e-6)
    yield "rms_norm: usual numbers", partial(norm, x), (x,)
    yield "rms_norm: numbers of size 0.001 (eps counts)", partial(norm, small), (small,)
    yield "rms_norm: a row of zeros", partial(norm, zeros), ()
    yield "rms_norm: bfloat16 comes back, float32 inside", partial(norm, low), ()
    q, rope = (
        random(2, 5, 3, 6),
        v3.rope_table(config(qk_rope_head_dim=6), torch.arange(5), x.dtype),
    )
    first = [table[:1] for table in rope]
    yield "rotate: pairs are neighbours", partial(f.rotate, q, rope, True), (q,)
    yield "rotate: pairs are halves (interleave=False)", partial(f.rotate, q, rope, False), (q,)
    yield "rotate: position 0 changes nothing", partial(f.rotate, q[:, :1], first, True), (q,)
    yield "rotate: bfloat16 comes back", partial(f.rotate, q.detach().bfloat16(), rope, True), ()


def mla_cases(f) -> Iterator[Case]:
    for name, T, changes in (
        ("five tokens, three heads", 5, {}),
        ("one token", 1, {}),
        ("YaRN: a factor in self.scale", 4, YARN),
        ("values wider than keys", 4, {"v_head_dim": 9}),
    ):
        mla = filled(v3.MLA(config(**changes)))  # N = 4, R = 2, C = 6
        q = random(2, T, 3, 4), random(2, T, 3, 2, seed=1)
        x = *q, random(2, T, 6, seed=2), random(2, T, 1, 2, seed=3)
        yield name, partial(f.attend_expanded, mla, *x), (*x, mla.kv_b_proj.weight)


def absorbed_cases(f) -> Iterator[Case]:
    for name, T, S, changes in (
        ("one new token, six in the cache", 1, 7, {}),
        ("three new tokens, four in the cache", 3, 7, {}),
        ("nothing in the cache before", 4, 4, {}),
        ("YaRN: a factor in self.scale", 2, 5, YARN),
    ):
        mla = filled(v3.MLA(config(**changes)))
        x = random(2, T, 3, 4), random(2, T, 3, 2, seed=1), random(2, S, 8, seed=2)
        yield name, partial(f.attend_absorbed, mla, *x), (*x, mla.kv_b_proj.weight)


def gate_cases(f) -> Iterator[Case]:
    def by_expert(gate, x):  # since the order of the chosen is free
        s, chosen, gain = f.forward(gate, x)
        return s, torch.zeros_like(s).scatter(-1, chosen, gain)

    groups = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    for name, spread, shift, changes in (
        ("one group, no bias", 0.0, 0, {}),
        ("one group, a bias that decides", 0.5, 0, {}),
        ("four groups, of which two stay", 0.5, 0, groups),
        ("four groups, all biases far below 0", 0.5, -3, groups),
        ("norm_topk_prob is False", 0.5, 0, {"norm_topk_prob": False}),
        ("routed_scaling_factor is 1", 0.5, 0, {"routed_scaling_factor": 1.0}),
    ):
        gate, x = filled(v3.Gate(config(**changes))), random(2, 20, 12, seed=5)
        bias = random(gate.config.n_routed_experts, seed=4).detach() * spread + shift
        gate.e_score_correction_bias = bias
        yield name, partial(by_expert, gate, x), (x, gate.weight)


def bias_cases(f) -> Iterator[Case]:
    def moved(counts, gamma):
        net = v3.DeepSeekV3(config())  # one layer with experts, and that of the MTP module
        for gate in net.gates():
            gate.e_score_correction_bias.fill_(0.25)
        net.expert_counts.copy_(torch.tensor(counts))
        f.update_bias(net, gamma)
        return *(gate.e_score_correction_bias for gate in net.gates()), net.expert_counts

    uneven, even = [5, 1, 3, 3, 0, 6], [2, 2, 2, 2, 2, 2]
    totals = [[50, 10, 30, 30, 0, 60], [1, 0, 0, 0, 1, 4]]
    yield "uneven loads", partial(moved, [uneven, even], 0.01), ()
    yield "all as busy as the mean: nothing moves", partial(moved, [even, even], 0.01), ()
    yield "layers with different totals", partial(moved, totals, 0.01), ()
    yield "gamma is 0", partial(moved, [uneven, uneven], 0.0), ()


def balance_cases(f) -> Iterator[Case]:
    s = random(3, 6, 8).detach().sigmoid().requires_grad_()
    same = torch.tensor([0.9, 0.8, 0.1, 0.1]).double().repeat(2, 5, 1).requires_grad_()
    yield "three sequences, two experts a token", partial(f.balance_loss, s, 2), (s,)
    yield "one expert a token", partial(f.balance_loss, s, 1), (s,)
    yield "all experts: the loss is 1", partial(f.balance_loss, s, 8), (s,)
    yield "every token takes the same two", partial(f.balance_loss, same, 2), (same,)


def expert_cases(f) -> Iterator[Case]:
    experts, ids = filled(v3.Experts(config())), torch.arange(14)
    weights = experts.gate_up_proj, experts.down_proj
    for name, chosen in (
        ("14 tokens, two of six experts each", torch.stack((ids * 5 % 6, (ids * 5 + 1) % 6), 1)),
        ("one token: four experts have no row", torch.tensor([[4, 1]])),
        ("every token takes the same two", torch.tensor([[5, 0]]).expand(14, 2)),
        ("one expert each", (ids % 6)[:, None]),
    ):
        x, gain = random(len(chosen), 12, seed=6), random(*chosen.shape, seed=7)
        call = partial(f.routed_ffn, x, chosen, gain, *weights, v3.swiglu)
        yield name, call, (x, gain, *weights)


def mtp_cases(f) -> Iterator[Case]:
    for name, T, depth, unknown in (
        ("one module", 8, 1, []),
        ("two modules", 8, 2, []),
        ("targets that are not there (-1)", 8, 2, [2, 3, 7]),
        ("a text too short for the second module", 2, 2, []),
    ):
        net = filled(v3.DeepSeekV3(config(num_nextn_predict_layers=depth))).eval()
        tokens = torch.arange(2 * T).reshape(2, T) * 7 % 32
        targets = tokens.roll(-1, 1)
        targets[:, unknown] = -1
        leaves = net.embed_tokens.weight, net.lm_head.weight, net.mtp[0].eh_proj.weight
        yield name, partial(f.mtp_loss, net, tokens, targets), leaves


def accept_cases(f) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(7)
    for name, G in (("one draft, 200 texts", 1), ("three drafts, 200 texts", 3)):
        p, q = random(200, G + 1, 6, seed=8).softmax(-1), random(200, G, 6, seed=9).softmax(-1)
        drafts = torch.rand(200, G, 6, generator=generator).argmax(-1)
        u = torch.rand(200, G + 1, dtype=torch.float64, generator=generator)
        yield name, partial(f.accept, p.detach(), q.detach(), drafts, u), ()
    for name, p, q, drafts, u in (
        ("the drafts come from p itself: all stay", [0.5, 0.5, 0.2], [0.5, 0.5], [0, 1], 0.99),
        ("the model rules the first draft out, u is 0", [0, 1, 0.5], [0.5, 0.5], [0, 1], 0),
        ("the first draft goes, the second would stay", [0.9, 0.9, 0.5], [0.2, 0.5], [1, 0], 0.6),
    ):  # of a vocabulary of two, the probability of token 0
        p, q = (torch.tensor([[[x, 1 - x] for x in z]]).double() for z in (p, q))
        u = torch.tensor([[u, u, 0.5]]).double()
        yield name, partial(f.accept, p, q, torch.tensor([drafts]), u), ()


def tile_cases(f) -> Iterator[Case]:
    def decoded(x, block, pow2):
        q, s = f.quantize(x.detach().float(), block, pow2)
        return q.float(), s.log2()  # so that the smallest scales count as well

    row, square, sizes = (1, 128), (128, 128), 10.0 ** torch.arange(-9, 10, 3)[:, None]
    for name, x, block, pow2 in (
        ("rows of 128", random(4, 256), row, False),
        ("rows that do not divide by 128", random(3, 200), row, False),
        ("blocks of 128 x 128, smaller at the edges", random(150, 200), square, False),
        ("a tile of zeros", torch.zeros(2, 128), row, False),
        ("rows of sizes from 1e-9 to 1e9", sizes * random(7, 128), row, False),
        ("powers of two", random(4, 256), row, True),
        ("two matrices", random(2, 130, 130), square, False),
    ):
        yield name, partial(decoded, x, block, pow2), ()


# ---- The exercises -------------------------------------------------------------------------------


def with_texts(exercises: dict[str, Exercise]) -> dict[str, Exercise]:
    """Adds hints and mistakes: every section of hints.txt has both."""
    text = (Path(__file__).parent / "hints.txt").read_text(encoding="utf-8")
    for section in text.strip().split("\n\n")[1:]:
        heading, *lines = section.splitlines()
        exercise = exercises[heading.removeprefix("# ")]
        for line, words in zip(lines, [*lines[1:], ""], strict=True):
            if " => " in line:
                exercise.mistakes.append((*line.split(" => "), words.strip()))
            elif not exercise.mistakes:
                exercise.hint += line.strip() + "\n"
    return exercises


def names(*answers: str) -> dict[str, str]:
    return {name.split(".")[-1]: name for name in answers}


EXERCISES = with_texts({
    "rope": Exercise("RMSNorm and RoPE", v3, names("rms_norm", "rotate"), rope_cases),
    "mla": Exercise("Attention with keys and values from latents", v3,
                    names("MLA.attend_expanded"), mla_cases, ("causal_attention",)),
    "absorbed": Exercise("Attention on the cached latents", v3,
                         names("MLA.attend_absorbed"), absorbed_cases, ("causal_attention",)),
    "gate": Exercise("The gate: bias, groups, gate values", v3, names("Gate.forward"), gate_cases),
    "bias": Exercise("The update of the bias", v3, names("DeepSeekV3.update_bias"), bias_cases),
    "balance": Exercise("The balance loss of a sequence", v3, names("balance_loss"), balance_cases),
    "experts": Exercise("Tokens to experts and back", v3, names("routed_ffn"), expert_cases),
    "mtp": Exercise("MTP: shift and loss", v3, {"mtp_loss": "DeepSeekV3.forward"}, mtp_cases),
    "accept": Exercise("Speculative sampling", sample, names("accept"), accept_cases),
    "tiles": Exercise("FP8 with a scale for every tile", fp8, names("quantize"), tile_cases,
                      ("_tiles",)),
})  # fmt: skip
