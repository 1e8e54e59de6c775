"""What check.py knows of every exercise: the answer, made-up inputs, hints, and known mistakes.

The answers are model.py's own functions (and those of sample.py and fp8.py). A known mistake is a
change of the answer's source. Many of them are mistakes that tests/mutations.py plants, too, to see
whether the tests notice. They stand in hints.txt with the hints.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
YARN = {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}


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


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


# ---- Made-up inputs ------------------------------------------------------------------------------


def rope_cases(f) -> Iterator[Case]:
    x, small = random(2, 3, 8), random(4, 8, size=1e-3)
    yield "rms_norm: usual numbers", lambda: f.rms_norm(x, 1e-6), (x,)
    yield "rms_norm: numbers of size 0.001 (eps counts)", lambda: f.rms_norm(small, 1e-6), (small,)
    zeros = torch.zeros(2, 8, dtype=torch.float64)
    yield "rms_norm: a row of zeros", lambda: f.rms_norm(zeros, 1e-6), ()
    low = (random(64, 32, size=30.0)).detach().bfloat16()
    yield "rms_norm: bfloat16 comes back, float32 inside", lambda: f.rms_norm(low, 1e-6), ()
    q, positions = random(2, 5, 3, 6), torch.arange(5)
    rope = v3.rope_table(config(qk_rope_head_dim=6), positions, torch.float64)
    yield "rotate: pairs are neighbours", lambda: f.rotate(q, rope, True), (q,)
    yield "rotate: pairs are halves (interleave=False)", lambda: f.rotate(q, rope, False), (q,)
    here = tuple(table[:1] for table in rope)
    yield "rotate: position 0 changes nothing", lambda: f.rotate(q[:, :1], here, True), (q,)
    yield "rotate: bfloat16 comes back", lambda: f.rotate(q.detach().bfloat16(), rope, True), ()


def mla_cases(f) -> Iterator[Case]:
    for name, T, changes in (
        ("five tokens, three heads", 5, {}),
        ("one token", 1, {}),
        ("YaRN: a factor in self.scale", 4, {"rope_scaling": YARN}),
        ("values wider than keys", 4, {"v_head_dim": 9}),
    ):
        c = config(**changes)
        mla = filled(v3.MLA(c))
        H, N, R, C = 3, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        x = random(2, T, H, N), random(2, T, H, R, seed=1)
        x = *x, random(2, T, C, seed=2), random(2, T, 1, R, seed=3)
        leaves = *x, mla.kv_b_proj.weight
        yield name, lambda mla=mla, x=x: f.attend_expanded(mla, *x), leaves


def absorbed_cases(f) -> Iterator[Case]:
    for name, T, S, changes in (
        ("one new token, six in the cache", 1, 7, {}),
        ("three new tokens, four in the cache", 3, 7, {}),
        ("nothing in the cache before", 4, 4, {}),
        ("YaRN: a factor in self.scale", 2, 5, {"rope_scaling": YARN}),
    ):
        c = config(**changes)
        mla = filled(v3.MLA(c))
        width = c.kv_lora_rank + c.qk_rope_head_dim
        x = random(2, T, 3, c.qk_nope_head_dim), random(2, T, 3, c.qk_rope_head_dim, seed=1)
        x = *x, random(2, S, width, seed=2)
        leaves = *x, mla.kv_b_proj.weight
        yield name, lambda mla=mla, x=x: f.attend_absorbed(mla, *x), leaves


def gate_cases(f) -> Iterator[Case]:
    groups = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    for name, spread, shift, changes in (
        ("one group, no bias", 0.0, 0, {}),
        ("one group, a bias that decides", 0.5, 0, {}),
        ("four groups, of which two stay", 0.5, 0, groups),
        ("four groups, all biases far below 0", 0.5, -3, groups),
        ("norm_topk_prob is False", 0.5, 0, {"norm_topk_prob": False}),
        ("routed_scaling_factor is 1", 0.5, 0, {"routed_scaling_factor": 1.0}),
    ):
        gate = filled(v3.Gate(config(**changes)))
        E = gate.config.n_routed_experts
        gate.e_score_correction_bias = random(E, seed=4).detach() * spread + shift
        x = random(2, 20, 12, seed=5)

        def call(gate=gate, x=x):
            s, chosen, gain = f.forward(gate, x)
            # The order of the chosen is free: gate values by expert.
            return s, torch.zeros_like(s).scatter(-1, chosen, gain)

        yield name, call, (x, gate.weight)


def bias_cases(f) -> Iterator[Case]:
    for name, counts, gamma in (
        ("uneven loads", [[5, 1, 3, 3, 0, 6], [2, 2, 2, 2, 2, 2]], 0.01),
        ("all as busy as the mean: nothing moves", [[3] * 6, [4] * 6], 0.01),
        ("layers with different totals", [[50, 10, 30, 30, 0, 60], [1, 0, 0, 0, 1, 4]], 0.01),
        ("gamma is 0", [[5, 1, 3, 3, 0, 6], [2, 0, 2, 2, 2, 4]], 0.0),
    ):

        def call(counts=counts, gamma=gamma):
            net = v3.DeepSeekV3(config())  # one layer with experts, and that of the MTP module
            for gate in net.gates():
                gate.e_score_correction_bias.fill_(0.25)
            net.expert_counts.copy_(torch.tensor(counts))
            f.update_bias(net, gamma)
            return *(gate.e_score_correction_bias for gate in net.gates()), net.expert_counts

        yield name, call, ()


def balance_cases(f) -> Iterator[Case]:
    s = random(3, 6, 8).detach().sigmoid().requires_grad_()
    yield "three sequences, two experts a token", lambda: f.balance_loss(s, 2), (s,)
    yield "one expert a token", lambda: f.balance_loss(s, 1), (s,)
    yield "all experts: the loss is 1", lambda: f.balance_loss(s, 8), (s,)
    same = torch.tensor([0.9, 0.8, 0.1, 0.1], dtype=torch.float64).expand(2, 5, 4).clone()
    same.requires_grad_()
    yield "every token takes the same two", lambda: f.balance_loss(same, 2), (same,)


def expert_cases(f) -> Iterator[Case]:
    experts = filled(v3.Experts(config()))
    weights = experts.gate_up_proj, experts.down_proj
    ids = torch.arange(14)
    for name, chosen in (
        ("14 tokens, two of six experts each", torch.stack((ids * 5 % 6, (ids * 5 + 1) % 6), 1)),
        ("one token: four experts have no row", torch.tensor([[4, 1]])),
        ("every token takes the same two", torch.tensor([[5, 0]]).expand(14, 2)),
        ("one expert each", (ids % 6)[:, None]),
    ):
        x, gain = random(len(chosen), 12, seed=6), random(*chosen.shape, seed=7)

        def call(x=x, chosen=chosen, gain=gain):
            return f.routed_ffn(x, chosen, gain, *weights, v3.swiglu)

        yield name, call, (x, gain, *weights)


def mtp_cases(f) -> Iterator[Case]:
    for name, T, depth, unknown in (
        ("one module", 8, 1, []),
        ("two modules", 8, 2, []),
        ("targets that are not there (-1)", 8, 2, [2, 3, 7]),
        ("a text too short for the second module", 2, 2, []),
    ):
        net = v3.DeepSeekV3(config(num_nextn_predict_layers=depth))
        filled(net).eval()
        tokens = torch.arange(2 * T).reshape(2, T) * 7 % 32
        targets = tokens.roll(-1, 1)
        targets[:, unknown] = -1
        leaves = net.embed_tokens.weight, net.lm_head.weight, net.mtp[0].eh_proj.weight
        yield (
            name,
            lambda net=net, x=tokens, y=targets: f.mtp_loss(net, x, y),
            leaves if T > 2 or depth < 2 else leaves[:2],
        )


def accept_cases(f) -> Iterator[Case]:
    def distributions(*shape, seed):
        return random(*shape, seed=seed).detach().softmax(-1)

    generator = torch.Generator().manual_seed(7)
    for name, B, G in (("one draft, 200 texts", 200, 1), ("three drafts, 200 texts", 200, 3)):
        p, q = distributions(B, G + 1, 6, seed=8), distributions(B, G, 6, seed=9)
        u = torch.rand(B, G + 1, dtype=torch.float64, generator=generator)
        drafts = torch.rand(B, G, 6, generator=generator).argmax(-1)
        yield name, lambda p=p, q=q, d=drafts, u=u: f.accept(p, q, d, u), ()
    x = torch.tensor([[0, 1]])
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]], dtype=torch.float64)
    u = torch.tensor([[0.99, 0.99, 0.5]], dtype=torch.float64)
    yield "the drafts come from p itself: all stay", lambda: f.accept(p, p[:, :2], x, u), ()
    sure = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]], dtype=torch.float64)
    low = torch.zeros(1, 3, dtype=torch.float64)
    yield "the model rules the first draft out, u is 0", lambda: f.accept(sure, p, x, low), ()
    late = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]]], dtype=torch.float64)
    after = torch.tensor([[1, 0]])
    yield "the first draft goes, the second would stay", lambda: f.accept(late, p, after, u), ()


def tile_cases(f) -> Iterator[Case]:
    sizes = 10.0 ** torch.arange(-9, 10, 3)[:, None]
    for name, x, block, pow2 in (
        ("rows of 128", random(4, 256), (1, 128), False),
        ("rows that do not divide by 128", random(3, 200), (1, 128), False),
        ("blocks of 128 x 128, smaller at the edges", random(150, 200), (128, 128), False),
        ("a tile of zeros", torch.zeros(2, 128), (1, 128), False),
        ("rows of sizes from 1e-9 to 1e9", sizes * random(7, 128), (1, 128), False),
        ("powers of two", random(4, 256), (1, 128), True),
        ("two matrices", random(2, 130, 130), (128, 128), False),
    ):  # fmt: skip
        x = x.detach().float()

        def call(x=x, block=block, pow2=pow2):
            q, s = f.quantize(x, block, pow2)
            return q.float(), s.log2()  # so that the smallest scales count as well

        yield name, call, ()


# ---- The exercises -------------------------------------------------------------------------------


def with_texts(exercises: dict[str, Exercise]) -> dict[str, Exercise]:
    """Adds hints and mistakes: every section of hints.txt has both."""
    text = (Path(__file__).parent / "hints.txt").read_text(encoding="utf-8")
    for section in text.strip().split("\n\n")[1:]:
        heading, *lines = section.splitlines()
        exercise = exercises[heading.removeprefix("# ")]
        for line in lines:
            if " => " in line:
                exercise.mistakes.append((*line.split(" => "), ""))
            elif exercise.mistakes:
                old, new, words = exercise.mistakes.pop()
                exercise.mistakes.append((old, new, f"{words} {line.strip()}".strip()))
            else:
                exercise.hint += line.strip() + "\n"
    return exercises


EXERCISES = with_texts(
    {
        "rope": Exercise(
            "RMSNorm and RoPE", v3, {"rms_norm": "rms_norm", "rotate": "rotate"}, rope_cases
        ),
        "mla": Exercise(
            "Attention with keys and values from latents",
            v3,
            {"attend_expanded": "MLA.attend_expanded"},
            mla_cases,
            ("causal_attention",),
        ),
        "absorbed": Exercise(
            "Attention on the cached latents",
            v3,
            {"attend_absorbed": "MLA.attend_absorbed"},
            absorbed_cases,
            ("causal_attention",),
        ),
        "gate": Exercise(
            "The gate: bias, groups, gate values", v3, {"forward": "Gate.forward"}, gate_cases
        ),
        "bias": Exercise(
            "The update of the bias", v3, {"update_bias": "DeepSeekV3.update_bias"}, bias_cases
        ),
        "balance": Exercise(
            "The balance loss of a sequence", v3, {"balance_loss": "balance_loss"}, balance_cases
        ),
        "experts": Exercise(
            "Tokens to experts and back", v3, {"routed_ffn": "routed_ffn"}, expert_cases
        ),
        "mtp": Exercise("MTP: shift and loss", v3, {"mtp_loss": "DeepSeekV3.forward"}, mtp_cases),
        "accept": Exercise("Speculative sampling", sample, {"accept": "accept"}, accept_cases),
        "tiles": Exercise(
            "FP8 with a scale for every tile",
            fp8,
            {"quantize": "quantize"},
            tile_cases,
            ("_tiles",),
        ),
    }
)
