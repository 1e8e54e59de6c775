"""What check.py knows about every exercise: questions, made-up inputs, hints, mistakes.

Most inputs are in float64, but answers may compute in float32: differences below 1e-5 of the
largest number are taken for rounding. Numbers are generic, so that a wrong function cannot be right
by chance: a power of two, for one, would hide where a function rounds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import fp8
import model as v3
import sample
import train

TINY = {
    "vocab_size": 32, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "q_lora_rank": 5, "kv_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
    "v_head_dim": 5, "intermediate_size": 8, "moe_intermediate_size": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}}


@dataclass
class Case:
    """One call of a function, and what is compared."""

    name: str
    function: str
    args: tuple  # gradients by tensors and by parameters of modules among them are compared
    results: tuple[str, ...]  # their names, with the layout
    # What is compared, from the results: the order of the chosen is free, say.
    compared: Callable = lambda *results: results
    # The results, from what is returned: a function may change its arguments instead.
    changes: Callable = lambda returned: returned
    too_many: str = ""  # the message if products of matrices take three times the FLOPs of ours


@dataclass
class Question:
    """A constant that the reader fills in before the function is written."""

    name: str
    answer: float | str
    why: str  # printed after a right answer, and after a wrong one if there is no hint
    slips: dict[float | str, str] = field(default_factory=dict)  # wrong answers, and what they are
    within: float = 0.01  # part of the answer by which a number may be off
    hint: str = ""  # printed after a wrong answer instead of `why`, where that would give it away


@dataclass
class Exercise:
    title: str
    functions: dict[str, tuple[object, str]]  # the reader's: module or class of ours, name in it
    cases: Callable[[], Iterator[Case]]
    parts: tuple[str, ...] = ()  # exercises whose functions this one puts together
    questions: tuple[Question, ...] = ()
    hints: list[str] = field(default_factory=list)  # an idea, the shapes, nearly the code
    why: str = ""  # what the function is good for, printed after a right answer
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


def rope_cases() -> Iterator[Case]:
    for name, x in (
        ("usual numbers", random(2, 3, 8)),
        ("numbers of size 0.001 (eps counts)", random(4, 8, size=1e-3)),
        ("a row of zeros", torch.zeros(2, 8).double()),
        ("bfloat16 comes back, float32 inside", random(16, 32, size=30.0).detach().bfloat16()),
    ):
        norm, weight = v3.RMSNorm(x.shape[-1], 1e-6), random(x.shape[-1], seed=3).detach()
        norm.weight = nn.Parameter(weight.to(x.dtype), requires_grad=x.dtype == torch.float64)
        yield Case(f"rms_norm: {name}", "rms_norm", (norm, x), ("y (..., D)",))
    q, angle = random(2, 5, 3, 6), random(5, 3, seed=1, size=2.0).detach()
    table = angle.cos(), angle.sin()
    for name, x, rope, interleave in (
        ("pairs are neighbours", q, table, True),
        ("pairs are halves (interleave=False)", q, table, False),
        ("as many tokens as heads", q[:, :3], [x[:3] for x in table], True),
        ("bfloat16 comes back, float32 inside", q.detach().bfloat16(), table, True),
    ):
        yield Case(f"rotate: {name}", "rotate", (x, rope, interleave), ("y (B, T, H, R)",))


def yarn_cases() -> Iterator[Case]:
    for name, positions, dtype, changes in (
        ("no YaRN", torch.arange(9), torch.float64, {"rope_scaling": None}),
        ("YaRN, factor 4", torch.arange(9), torch.float64, {}),
        ("positions from 1000 on", torch.arange(1000, 1009), torch.float64, {}),
        ("factor 40, theta 500,000", torch.arange(9), torch.float64, {"rope_theta": 5e5}),
        ("a window of 6 tokens: high is low", torch.arange(9), torch.float64, {"L": 6}),
        ("theta 10: high is R - 1", torch.arange(9), torch.float64, {"rope_theta": 10.0, "L": 600}),
        ("float32", torch.arange(9), torch.float32, {}),
    ):
        yarn = YARN["rope_scaling"] | {"original_max_position_embeddings": changes.pop("L", 256)}
        yarn["factor"] = 40.0 if "40" in name else 4.0
        fields = {"qk_rope_head_dim": 16, "rope_scaling": yarn} | changes
        results = ("cos (T, R/2)", "sin (T, R/2)")
        yield Case(name, "rope_table", (config(**fields), positions, dtype), results)


def mla_cases() -> Iterator[Case]:
    for name, T, changes in (
        ("five tokens, three heads", 5, {}),
        ("one token", 1, {}),
        ("as many tokens as heads, values as wide as keys", 3, {"v_head_dim": 4}),
        ("YaRN: a factor in self.scale", 4, YARN),
    ):
        mla = filled(v3.MLA(config(**changes)))  # N = 4, R = 2, C = 7
        q = random(2, T, 3, 4), random(2, T, 3, 2, seed=1)
        x = *q, random(2, T, 7, seed=2), random(2, T, 1, 2, seed=3)
        yield Case(name, "attend_expanded", (mla, *x), ("o (B, T, H, V)",))


def absorbed_cases() -> Iterator[Case]:
    wide = {"num_attention_heads": 4, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 8}
    counted = "too many multiplications: keys or values of old tokens are made anew"
    for name, T, S, changes in (
        ("one new token, six in the cache", 1, 7, {}),
        ("three new tokens, four in the cache", 3, 7, {}),
        ("nothing in the cache before", 4, 4, {}),
        ("YaRN: a factor in self.scale", 2, 5, YARN),
        ("latents as wide as keys", 2, 5, {"kv_lora_rank": 4}),
        ("200 in the cache: multiplications are counted", 1, 201, wide),
    ):
        mla = filled(v3.MLA(config(**changes)))
        H, N, R, C = (getattr(mla.config, key) for key in (
            "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"
        ))  # fmt: skip
        x = random(2, T, H, N), random(2, T, H, R, seed=1), random(2, S, C + R, seed=2)
        args, too_many = (mla, *x, torch.arange(S - T, S)), counted if S > 100 else ""
        yield Case(name, "attend_absorbed", args, ("o (B, T, H, V)",), too_many=too_many)


def gate_cases() -> Iterator[Case]:
    def sorted_by_expert(s, chosen, gain):  # since the order of the chosen is free
        order = chosen.argsort(-1)
        return s, chosen.gather(-1, order), gain.gather(-1, order)

    groups = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    for name, spread, shift, changes in (
        ("one group, no bias", 0.0, 0, {}),
        ("one group, a bias that decides", 0.5, 0, {}),
        ("four groups, of which two stay", 0.5, 0, groups),
        ("four groups, all biases far below 0", 0.5, -3, groups),
        ("four groups, one stays", 0.5, 0, groups | {"topk_group": 1}),
        ("norm_topk_prob is False", 0.5, 0, {"norm_topk_prob": False}),
        ("bfloat16: scores in float32", 0.5, 0, groups),
    ):
        gate, x = filled(v3.Gate(config(**changes))), random(2, 20, 12, seed=5)
        bias = random(gate.config.n_routed_experts, seed=4).detach() * spread + shift
        gate.e_score_correction_bias = bias.float()  # as in every gate
        if "bfloat16" in name:  # without gradients, which would depend on the order of a sum
            gate, x = gate.bfloat16().requires_grad_(False), x.detach().bfloat16()
        results = ("scores (B, T, E)", "chosen experts (B, T, K)", "gate values (B, T, K)")
        yield Case(name, "gate", (gate, x), results, compared=sorted_by_expert)


def bias_cases() -> Iterator[Case]:
    # Where a load is the mean, loads add up to a power of two: fractions of it are exact then.
    uneven, even, odd = [9, 1, 4, 3, 0, 7, 4, 4], [4] * 8, [9, 4, 4, 3, 3, 3, 2, 1]
    near = [1024, 1025, 1023, 1024, 1024, 1026, 1023, 1023]
    for name, counts in (
        ("uneven loads", [uneven, even]),
        ("all as busy as the mean: nothing moves", [even, even]),
        ("layers with different totals", [[16 * n for n in uneven], uneven[::-1]]),
        ("a mean that is no whole number", [odd, [0, 0, 1, 1, 5, 7, 2, 1]]),
        ("loads close to the mean", [near, uneven]),
    ):
        # One layer with experts, and that of the MTP module.
        net = v3.DeepSeekV3(config(n_routed_experts=8))
        biases = [gate.e_score_correction_bias for gate in net.gates()]
        for i, bias in enumerate(biases):
            bias.copy_(random(8, seed=i, size=1.5).detach())
        loads = [gate.load for gate in net.gates()]
        for load, numbers in zip(loads, counts, strict=True):
            load.copy_(torch.tensor(numbers))

        def after(_, biases=biases, loads=loads):
            return *biases, *loads

        results = [f"{what} of layer {i} (E,)" for what in ("bias", "load") for i in (1, 2)]
        yield Case(name, "update_bias", (net, 0.013), results, changes=after)


def balance_cases() -> Iterator[Case]:
    three = random(3, 8, 6).detach().sigmoid().requires_grad_()
    same = torch.tensor([0.9, 0.8, 0.1, 0.1]).double().repeat(2, 4, 1).requires_grad_()
    for name, s, K in (
        ("three sequences, two experts a token", three, 2),
        ("one expert a token", three, 1),
        ("all experts: the loss is 1", three, 6),
        ("one sequence", three[:1].detach().requires_grad_(), 2),
        ("every token takes the same two", same, 2),
    ):
        yield Case(name, "balance_loss", (s, K), ("loss",))


def expert_cases() -> Iterator[Case]:
    ids, many = torch.arange(14), {"n_routed_experts": 16}
    counted = "too many multiplications: experts compute tokens that did not choose them"
    for name, chosen, changes, too_many in (
        ("14 tokens, two of six experts each", two(ids, 6), {}, ""),
        ("one token: four experts have none", torch.tensor([[4, 1]]), {}, ""),
        ("every token takes the same two", torch.tensor([[5, 0]]).expand(14, 2), {}, ""),
        ("three of six", torch.stack((ids % 6, (ids + 3) % 6, (ids + 1) % 6), 1), {}, ""),
        ("1,100 tokens to one of 16 experts", torch.full((1100, 1), 9), many, ""),
        ("600 tokens: work is counted", two(torch.arange(600), 16), many, counted),
    ):
        experts = filled(v3.Experts(config(**changes)))
        x, gain = random(len(chosen), 12, seed=6), random(*chosen.shape, seed=7)
        args = experts, x, chosen.contiguous(), gain
        yield Case(name, "experts", args, ("y (tokens, D)",), too_many=too_many)


def two(ids: Tensor, E: int) -> Tensor:
    """Two different experts for each token."""
    return torch.stack((ids * 5 % E, (ids * 5 + 1) % E), 1)


def mtp_cases() -> Iterator[Case]:
    def refuse(*_, **__):
        raise RuntimeError("model(...) has the answer inside: use model.trunk and the modules")

    for name, T, depth, unknown in (
        ("one module", 8, 1, []),
        ("two modules", 8, 2, []),
        ("missing targets (-1)", 8, 2, [2, 3, 7]),
    ):
        fields = {"num_hidden_layers": 1, "num_nextn_predict_layers": depth}
        net = filled(v3.DeepSeekV3(config(**fields))).eval()
        net.forward = refuse
        tokens = torch.arange(2 * T).reshape(2, T) * 7 % 32
        targets = tokens.roll(-1, 1)
        targets[:, unknown] = -1
        yield Case(name, "mtp_loss", (net, tokens, targets), ("loss",))


def accept_cases() -> Iterator[Case]:
    results = ("drafts that stay (B,)", "token after them (B, 1)")
    generator = torch.Generator().manual_seed(7)
    for name, G in (("one draft, 200 texts", 1), ("three drafts, 200 texts", 3)):
        p, q = random(200, G + 1, 6, seed=8).softmax(-1), random(200, G, 6, seed=9).softmax(-1)
        drafts = torch.rand(200, G, 6, generator=generator).argmax(-1)
        u = torch.rand(200, G + 1, dtype=torch.float64, generator=generator)
        yield Case(name, "accept", (p.detach(), q.detach(), drafts, u), results)
    less = 1 - 1e-9
    for name, p, q, drafts, u in (
        ("the drafts come from p itself: all stay", [0.3, 0.6, 0.2], [0.3, 0.6], [0, 1], 0.99),
        ("the model rules the first draft out, u is 0", [0, 1, 0.3], [0.4, 0.7], [0, 1], 0),
        ("the first draft goes, the second would stay", [0.9, 0.9, 0.3], [0.2, 0.4], [1, 0], 0.6),
        ("drafts of which q is sure", [0.3, 0.6, 0.4], [1.0, 1.0], [0, 0], 0.5),
        ("nothing is left of p - q", [0.7, 0.7, 0.7], [0.7, 0.7], [0, 1], less),
    ):  # of a vocabulary of two, the probability of token 0
        p, q = (torch.tensor([[[x, 1 - x] for x in z]]).double() for z in (p, q))
        if u == less:  # rounding can do that, in larger steps in float32
            p = p * (1 - 1e-6)
        u = torch.tensor([[u, u, 0.6]]).double()
        yield Case(name, "accept", (p, q, torch.tensor([drafts]), u), results)


def tile_cases() -> Iterator[Case]:
    row, square, sizes = (1, 128), (128, 128), 10.0 ** torch.tensor([-42, -36, -20, -14, -9, 0, 30])
    for name, x, block, pow2 in (
        ("rows of 128", random(4, 256), row, False),
        ("rows that do not divide by 128", random(3, 200), row, False),
        ("blocks of 128 x 128, smaller at the edges", random(150, 200), square, False),
        ("a tile of zeros", torch.zeros(2, 128), row, False),
        ("rows of sizes from 1e-42 to 1e30", sizes[:, None] * random(7, 128), row, False),
        ("powers of two", random(4, 256), row, True),
        ("two matrices", random(2, 130, 130), square, False),
    ):
        x = x.detach().float()
        if pow2:
            x[0, 7] = 896.0  # whose scale is a power of two already

        def compared(q, s, x=x, block=block):
            """Where x / s lies between two numbers of E4M3, either may be taken."""
            scale, q = fp8.dequantize(torch.ones_like(q), s, block), q.float()
            exact = x.double() / scale
            step = torch.exp2(exact.abs().clamp(min=2.0**-6).log2().floor() - 3)
            off = (q - exact).abs() / step
            return torch.where(off < 0.5001, exact, q), s.double().log2()

        results = ("q (..., M, K)", "s (..., M/bm, K/bk), as log2")
        yield Case(name, "quantize", (x, block, pow2), results, compared=compared)


def training_cases() -> Iterator[Case]:
    """SGD, whose step is in proportion to the gradients: Adam's would hide factors."""
    tokens = torch.arange(14).reshape(2, 7) * 5 % 32
    usual = {"loss": 1.0, "mtp_loss": 0.37, "balance_loss": 0.23}
    for name, old, weights in (
        ("a first step", 0.0, usual),
        ("gradients of an earlier step remain", 0.7, usual),
        ("large gradients", 0.0, {key: 300 * x for key, x in usual.items()}),
    ):
        net = filled(v3.DeepSeekV3(config())).train()
        for parameter in net.parameters():
            parameter.data *= 0.1 if parameter.ndim > 1 else 1
            parameter.grad = torch.full_like(parameter, old) if old else None
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)

        def after(losses, net=net):
            if not (isinstance(losses, dict) and "loss" in losses):
                raise TypeError("train_step must return the losses by name")
            layer, head = net.layers[1].mlp, net.lm_head.weight
            bias, deep = layer.gate.e_score_correction_bias, net.mtp[0].eh_proj.weight
            return tuple(x.detach() for x in (head, layer.gate.weight, deep, bias))

        results = ("lm_head.weight", "the gate's weight", "the MTP module's eh_proj", "bias")
        args = net, optimizer, tokens, tokens.roll(-1, 1), weights, 0.013
        yield Case(name, "train_step", args, results, changes=after)


# ---- Questions -----------------------------------------------------------------------------------

D, F, L, H, C, N, R, V = 7168, 2048, 61, 128, 512, 128, 64, 128  # V3's sizes, as in the exercises

QUESTIONS = {
    "gate": (
        Question("GATE_VALUE", 2.5 * 0.2 / 0.8, "s + b chooses the second expert and the last, "
                 "whose s are 0.6 and 0.2",
                 {2.5 * 0.8 / 1.4: "the value from s + b: the bias only chooses",
                  0.25: "without the 2.5"},
                 hint="s + b chooses; then take the scores s of the chosen"),
        Question("NODES_ANY", 8, "each expert may be on a node of its own"),
        Question("NODES_V3", 4, "groups are nodes: at most topk_group of them stay"),
    ),
    "bias": (
        Question("STEPS", 25, "in a step the first bias falls by gamma, and the second rises by it",
                 {50: "the steps that one of them needs alone"}),
        Question("DRIFT", 0.0005, "one bias falls by gamma and three rise by it: (3 - 1) gamma / 4",
                 {0: "the change if as many rose as fell", 0.002: "the change of their sum"},
                 hint="count the biases that fall and those that rise, each by gamma"),
        Question("CHANGED", 0, "all s + b grow by the same amount, and so do the groups' scores: "
                 "their order remains",
                 hint="compare two experts' s + b before and after, then the scores of two groups"),
        Question("LOSS_WITHOUT_BIAS", "stays", "a part of the bias that all experts of a layer "
                 "share changes no choice. Without the rest some tokens get the expert next in "
                 "rank, which is nearly as good"),
    ),
    "experts": (
        Question("FLOPS", 2 * 3 * D * F * 9, "three matrices of D x F numbers for each expert",
                 {3 * D * F * 9: "multiplications only", 6 * D * F * 8: "without the shared one"}),
        Question("TIMES", 257 / 9, "experts that are computed, over those that are needed",
                 {32: "256 / 8: the shared expert is computed in both",
                  256 / 9: "256 / 9: the shared expert is computed in both"}, 0.0025),
    ),
    "mla": (
        Question("CACHE_MHA", 2 * L * H * (N + V), "layers x heads x (key and value) x 2 bytes",
                 {L * H * (N + V): "numbers, not bytes", 2 * H * (N + V): "for one layer only"}),
        Question("CACHE_GQA", 2 * L * 8 * (N + V), "as before, but only 8 heads are cached",
                 {L * 8 * (N + V): "numbers, not bytes"}),
        Question("CACHE_MLA", 2 * L * (C + R), "one latent and one k^R a layer, for all heads",
                 {L * (C + R): "numbers, not bytes", 2 * L * C: "without k^R",
                  2 * L * (C + H * R): "with a k^R for every head"}),
        Question("DIMENSIONS", C, "one matrix makes all of them from the C numbers of the latent, "
                 "so its rank is at most C",
                 {H * (N + V): "how many numbers there are",
                  C + R: "the number with k^R, which is not among them"},
                 hint="one matrix makes all of them from the latent: what is its rank?"),
    ),
    "absorbed": (
        Question("EXPANDED", N + R + V, "q . k takes N + R; then p times the value's V numbers",
                 {N + R: "the score only", N + V: "without the part with position"}),
        Question("ABSORBED", C + R + C, "the query is as wide as the cache; p times the latent",
                 {C + R: "the score only", 2 * (C + R): "with k^R, which is no part of a value"}),
        Question("MAKING", C * (N + V), "a product of the latent and the head's W^UK and W^UV"),
    ),
    "rope": (
        Question("MATRICES", 4096, "one for each distance between query and key, from 0 on",
                 {4096**2: "one for each pair: pairs at the same distance share a rotation",
                  4095: "without distance 0: a token looks at itself, too"}, 1e-5),
        Question("TURNED", H * N + C, "every head's own key of N numbers, and the latent"),
        Question("SEPARATE", C + R, "the latent, and one small key for all heads"),
    ),
    "mtp": (
        Question("POSITIONS", 8, "depth k has k positions fewer", {9: "the number of depth 1"}),
        Question("LAST_SEEN", 5, "position i of depth k knows the tokens up to i + k"),
        Question("PREDICTED", 6, "the one after the newest that it knows"),
    ),
    "accept": (
        Question("STAYS", 0.4, "min(1, p / q) of token 0", {0.2: "p: q has a part in it"}),
        Question("RATE", 0.7, "the sum over the tokens of q times min(1, p / q), or min(p, q)"),
        Question("TOKENS", 1.7, "one comes in any case; a draft that stays is one more"),
    ),
    "balance": (
        Question("EVEN", 1, "then all f_i are 1, and the P_i add up to 1"),
        Question("SAME_TWO", 4, "f is E / K for two experts, and P is 1/2 for them"),
        Question("GRADIENT", 2, "f has no gradient, so the gradient of the loss by P_i is f_i"),
        Question("TWO_SEQUENCES", 2, "each sequence has its own f and P; then comes the mean",
                 {1: "the loss of the batch as one sequence, in which all four are equally busy"}),
    ),
    "tiles": (
        Question("BECOMES", 0, "s is 2,000, and 1 / s, less than half of 2^-9, is rounded down"),
        Question("LOST", 127, "those that share a tile, and so the scale, with the large number",
                 {1024**2 - 1: "with one scale for all", 128**2 - 1: "with blocks of 128 x 128",
                  128: "with the large number itself", 1023: "a whole row: it has eight tiles"},
                 1e-4),
        Question("BYTES_ROW", 1 + 4 / 128, "a byte, and 4 bytes for every 128 numbers"),
        Question("BYTES_BLOCK", 1 + 4 / 128**2, "a byte, and 4 for every 128 x 128", {}, 1e-4),
    ),
    "yarn": (
        Question("KEPT", 11, "those from 0 to low, which is i(32), rounded down",
                 {10: "low itself: pair 0 counts, too"}),
        Question("DIVIDED", 9, "those from high to the last; high is i(1), rounded up",
                 {8: "without pair high itself"}),
        Question("NEIGHBOURS", 1 / 40, "1 radian, divided by 40. Neighbours would be hard to tell "
                 "apart, so YaRN leaves this pair as it is",
                 {1: "the angle with YaRN, which leaves pair 0 as it is"},
                 hint="the fastest pair has frequency 1: divide it, too"),
        Question("SLOWEST_LONG", 4096 / (2 * math.pi * 10_000 ** (62 / 64)),
                 "40 times the tokens at 1/40 of the frequency: as in L without YaRN"),
    ),
    "training": (
        Question("FIRST_LOSS", math.log(512), "-ln of the probability 1 / 512", {9: "in bits"}),
        Question("TOKENS", 30 * 8 * 64, "steps x windows x tokens"),
        Question("DOUBLED", 1, "clipping scales a norm of 5 and one of 10 down to 1",
                 {2: "without the clipping: both norms are above 1"},
                 hint="clipped to a norm of 1, what is left of a norm of 5, and what of 10?"),
    ),
}  # fmt: skip


# ---- The exercises -------------------------------------------------------------------------------


def with_texts(exercises: dict[str, Exercise]) -> dict[str, Exercise]:
    """Adds questions, hints, reasons and mistakes: every section of hints.txt has three hints, the
    reason, then the mistakes."""
    text = (Path(__file__).parent / "hints.txt").read_text(encoding="utf-8")
    for section in text.strip().split("\n\n")[1:]:
        heading, *lines = section.splitlines()
        exercise = exercises[heading.removeprefix("# ")]
        for line, words in zip(lines, [*lines[1:], ""], strict=True):
            if " => " in line:
                exercise.mistakes.append((*line.split(" => "), words.strip()))
            elif line.startswith(("  1. ", "  2. ", "  3. ", "  ok ")):
                exercise.hints.append(line[5:])
            elif not exercise.mistakes:
                exercise.hints[-1] += "\n" + line[5:]
    for name, exercise in exercises.items():
        exercise.questions = QUESTIONS[name]
        exercise.why = exercise.hints.pop()
    return exercises


EXERCISES = with_texts({
    "mla": Exercise("Attention with keys and values from latents",
                    {"attend_expanded": (v3.MLA, "attend_expanded")}, mla_cases),
    "absorbed": Exercise("Attention on the cached latents",
                         {"attend_absorbed": (v3.MLA, "attend_absorbed")}, absorbed_cases),
    "rope": Exercise("RMSNorm, RoPE and the key of its own",
                     {"rms_norm": (v3.RMSNorm, "forward"), "rotate": (v3, "rotate")}, rope_cases),
    "gate": Exercise("The gate: bias, groups, gate values", {"gate": (v3.Gate, "forward")},
                     gate_cases),
    "experts": Exercise("Tokens to experts and back", {"experts": (v3.Experts, "forward")},
                        expert_cases),
    "mtp": Exercise("MTP: shift and loss", {"mtp_loss": (v3.DeepSeekV3, "forward")}, mtp_cases),
    "balance": Exercise("The balance loss of a sequence", {"balance_loss": (v3, "balance_loss")},
                        balance_cases),
    "bias": Exercise("The update of the bias", {"update_bias": (v3.DeepSeekV3, "update_bias")},
                     bias_cases),
    "accept": Exercise("Speculative sampling", {"accept": (sample, "accept")}, accept_cases),
    "tiles": Exercise("FP8 with a scale for every tile", {"quantize": (fp8, "quantize")},
                      tile_cases),
    "yarn": Exercise("The rotary table, with YaRN", {"rope_table": (v3, "rope_table")}, yarn_cases),
    "training": Exercise("All together: a training step, a curve", {"train_step": (train, "train")},
                         training_cases, parts=("gate", "experts", "mla")),
})  # fmt: skip
