"""What a function gives in the trained network, beside what the right one gives.

Every exercise has a part here: something to look at, and numbers that must agree. The network
computes in float64. In float32 a token whose experts are nearly tied could visit others where a
right function only rounds in another way.
"""

import copy
import math
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fp8
import sample
from exercises import solutions
from exercises.known import EXERCISES, Exercise
from huggingface import load_model

WEIGHTS = Path(__file__).resolve().parent.parent / "weights/small"
TEXT = WEIGHTS / "text.txt"
WINDOW = 256
PROMPT, LENGTH = "def main(", 24
DRAWS = 20_000


@dataclass
class Effect:
    headline: str
    numbers: dict[str, Tensor]  # which must be those of the right function
    text: str = ""  # more to look at
    within: float = 1e-6  # what may differ, in parts of the largest number


class Multiplications(TorchDispatchMode):
    """Counts them: those of products of matrices, and each number of other products."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in flop_registry:  # a multiplication and an addition are two operations
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif packet in (torch.ops.aten.mul, torch.ops.aten.mul_):
            self.total += out.numel()
        return out


@cache
def trained():
    """The trained network in float64, its tokenizer, and a text in windows of 256 tokens: of each
    the tokens (1, T) and the next tokens (1, T)."""
    model, tokenizer, _ = load_model(WEIGHTS, dtype=torch.float64)
    ids = torch.tensor([tokenizer.encode(TEXT.read_text(encoding="utf-8"))])
    pieces = [ids[:, i : i + WINDOW + 1] for i in range(0, ids.shape[1] - 1, WINDOW)]
    return model, tokenizer, [(piece[:, :-1], piece[:, 1:]) for piece in pieces]


def encoded(text: str) -> Tensor:
    return torch.tensor([trained()[1].encode(text)])


def bits_per_byte(logits: list[Tensor]) -> float:
    """The loss of the text's first windows, of which these are the logits."""
    _, tokenizer, windows = trained()
    pairs = list(zip(logits, windows, strict=False))
    nats = sum(F.cross_entropy(z[0], y[0], reduction="sum").item() for z, (_, y) in pairs)
    size = sum(len(tokenizer.to_bytes(i)) for _, (_, y) in pairs for i in y[0].tolist())
    return nats / math.log(2) / size


def reads(logits: list[Tensor], next_logits, how: str = "") -> Effect:
    """For windows with these logits; next_logits: all ids (1, T), the new ones (1, t) -> (1,
    vocabulary), of which the likeliest makes a text."""
    ids = new = encoded(PROMPT)
    for _ in range(LENGTH):
        new = next_logits(ids, new).argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), 1)
    begins = f"the first {sum(z.shape[1] for z in logits)} tokens of {TEXT.name}"
    headline = f"{bits_per_byte(logits):.3f} bits/byte of {begins}{how}"
    return Effect(headline, {"logits": torch.cat(logits, 1)}, trained()[1].decode(ids[0].tolist()))


# ---- A part for every exercise -------------------------------------------------------------------


def reading(functions) -> Effect:
    model, _, windows = trained()
    return reads([model(x) for x, _ in windows[:2]], lambda ids, new: model(ids)[:, -1])


def long_reading(functions) -> Effect:
    """Windows of 1,024 tokens, four times as long as those before YaRN."""
    model, _, windows = trained()
    pieces = [x for x, _ in windows[:4]]
    whole = torch.cat(pieces, 1)
    logits = list(model(whole).split([x.shape[1] for x in pieces], 1))
    last = bits_per_byte(logits)
    name = f"bits/byte of {TEXT.name} in a window of {whole.shape[1]:,} tokens"
    return Effect(f"{last:.3f} {name}", {"logits": torch.cat(logits, 1)})


def decoding(functions) -> Effect:
    """Texts are read through the cache: 64 tokens at once, then 64 at a time, which looks at it."""
    model, _, windows = trained()

    def empty(size):
        return sample.Cache(model.config, model.layers, 1, size, model.embed_tokens.weight)

    logits = []
    for x, _ in windows[:1]:
        cache = empty(WINDOW)
        hidden = [model.trunk(piece, cache) for piece in x.split(64, 1)]
        logits.append(model.logits(torch.cat(hidden, 1)))
    cache = empty(64)

    def next_logits(ids, new):
        return model.logits(model.trunk(new, cache))[:, -1]

    told = reads(logits, next_logits, ", read through the cache")
    counts = [f"{multiplications(functions.attend_absorbed, S):,} after {S:,}" for S in (64, 1024)]
    made = multiplications(with_keys_and_values, 1024)
    told.text += f"\n\nMultiplications for a new token in a layer: {' tokens, '.join(counts)}."
    told.text += f"\nWith all keys and values made anew: {made:,} after 1,024."
    return told


def with_keys_and_values(self, q_nope, q_pe, kv, start=None) -> Tensor:
    """attend_absorbed for one new token, without its trick."""
    C, N = self.config.kv_lora_rank, q_nope.shape[-1]
    keys_and_values = self.kv_b_proj(kv[..., :C]).unflatten(-1, (q_nope.shape[2], -1))
    k, v = keys_and_values[..., :N], keys_and_values[..., N:]
    score = torch.einsum("bthn,bshn->bhts", q_nope, k)
    score = score + torch.einsum("bthr,bsr->bhts", q_pe, kv[..., C:])
    return torch.einsum("bhts,bshv->bthv", (score * self.scale).softmax(-1), v)


def multiplications(attend, S: int) -> int:
    """Of `attend` for one token behind S others, in a layer of the trained network."""
    mla = trained()[0].layers[5].self_attn
    H, C = mla.config.num_attention_heads, mla.config.kv_lora_rank
    N, R = mla.config.qk_nope_head_dim, mla.config.qk_rope_head_dim
    shapes = (1, 1, H, N), (1, 1, H, R), (1, S + 1, C + R)
    with Multiplications() as count:
        attend(mla, *(torch.ones(shape, dtype=torch.float64) for shape in shapes))
    return count.total


def balancing(functions) -> Effect:
    """The biases of the first layer with experts are learnt anew, from 0, on one text."""
    net, inputs, windows = copy.deepcopy(trained()[0]), [], trained()[2]
    gate, E = net.gates()[0], net.config.n_routed_experts
    hook = gate.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    for x, _ in windows[:6]:
        net.trunk(x)
    hook.remove()
    u, shares = torch.cat(inputs)[None], []
    gate.e_score_correction_bias.zero_()
    for _ in range(200):
        counts = torch.bincount(gate(u)[1].flatten(), minlength=E)
        shares.append((counts.max() / counts.double().mean()).item())
        net.expert_counts.zero_()
        net.expert_counts[0] = counts
        functions.update_bias(net, 0.003)
    told = f"the busiest expert had {shares[0]:.2f} times its share, after 200 updates"
    biases = torch.stack([gate.e_score_correction_bias for gate in net.gates()])
    return Effect(f"{told} {shares[-1]:.2f} times", {"biases": biases})


def balance(functions) -> Effect:
    model, _, windows = trained()
    loss = torch.stack([model(x, y)["balance_loss"] for x, y in windows[:2]])
    return Effect(f"balance loss {loss.mean():.3f} (1 is even)", {"losses": loss})


def looking_ahead(functions) -> Effect:
    model, _, windows = trained()
    loss = torch.stack([functions.mtp_loss(model, x, y) for x, y in windows[:2]])
    return Effect(f"the loss of the MTP module is {loss.mean():.3f} nats", {"losses": loss})


def drafting(functions) -> Effect:
    """What comes out of many drafts of one token, beside the distribution that it must have."""
    (model, tokenizer, _), rows = trained(), DRAWS
    ids = encoded("for name in sorted(os.listdir(path)):\n    if name")
    h = model.trunk(ids)
    ahead = model.predict_next(0, h[:, :-1], ids[:, 1:])
    p, q = (model.logits(x)[0, -1].softmax(-1) for x in (h, ahead))
    # A vocabulary of six tokens; drafts at temperature 1/2, so that a wrong rule shows clearly.
    tokens = (p + q).topk(6).indices
    p, q = p[tokens] / p[tokens].sum(), q[tokens] ** 2 / (q[tokens] ** 2).sum()
    u = torch.rand(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drafts = sample.draw(q.expand(rows, 1, -1), u[:, :1])
    kept, after = functions.accept(p.repeat(rows, 2, 1), q.repeat(rows, 1, 1), drafts, u[:, 1:])
    first = torch.where(kept[:, None] > 0, drafts, after)
    share = torch.bincount(first.flatten(), minlength=6) / rows
    lines = ["what comes next     model    drafts     yours"]
    for i, *numbers in zip(tokens.tolist(), p, q, share, strict=True):
        lines.append(f"{tokenizer.decode([i])!r:16}" + "".join(f"{x:9.1%} " for x in numbers))
    stats, generator = sample.Stats(), torch.Generator().manual_seed(1)
    options = {"lookup": False, "generator": generator, "stats": stats}
    text = sample.generate(model, encoded(PROMPT), 2 * LENGTH, **options)
    off, calls = (share - p).abs().sum() / 2, stats.tokens / stats.rounds
    headline = f"{off:.1%} of the tokens are others than the model wants, {calls:.2f} tokens a call"
    numbers = {"drawn tokens": first, "written tokens": text}
    return Effect(headline, numbers, "\n".join(lines) + f"\n\n{tokenizer.decode(text[0].tolist())}")


def rounding(functions) -> Effect:
    """The hidden states of a text, with a number such as large networks have in the first token:
    some are 100,000 times as large as most others (arXiv 2402.17762)."""
    model, _, windows = trained()
    x = model.trunk(windows[0][0])[0].float()  # (T, D)
    x[0, 5] = 1e5 * x.abs().median()

    def errors(q, s) -> tuple[Tensor, str]:
        y = fp8.dequantize(q, s, fp8.TILE)[1:]
        off, zeros = (y - x[1:]).norm(dim=-1) / x[1:].norm(dim=-1), (y == 0).double().mean()
        return off, f"are off by {off.mean():.1%}, {zeros:.1%} of the numbers become 0"

    scale = (x.abs().max() / fp8.E4M3_MAX).expand(len(x), 1)
    mine, told = errors(*functions.quantize(x, fp8.TILE))
    _, single = errors((x / scale).to(fp8.E4M3), scale)
    headline = f"hidden states beside one very large number {told}"
    return Effect(headline, {"errors": mine}, f"With one scale for all they {single}.", within=0.01)


EFFECTS = {
    "rope": reading, "yarn": long_reading, "mla": reading, "absorbed": decoding, "gate": reading,
    "bias": balancing, "balance": balance, "experts": reading, "mtp": looking_ahead,
    "accept": drafting, "tiles": rounding,
}  # fmt: skip


# ---- In the place of the network's own -----------------------------------------------------------


def place(exercise: Exercise, theirs: str) -> tuple[object, str]:
    """The module or class where the network's function stands, and its name there."""
    *owner, name = theirs.split(".")
    return getattr(exercise.module, owner[0]) if owner else exercise.module, name


@contextmanager
def installed(exercise: Exercise, functions) -> Iterator[None]:
    """The functions in the place of the network's own."""
    before = []
    for mine, theirs in exercise.functions.items():
        where, name = place(exercise, theirs)
        if mine == name:  # the network has no mtp_loss: it is a part of forward
            before.append((where, name, vars(where)[name]))
            setattr(where, name, getattr(functions, mine))
    try:
        yield
    finally:
        for where, name, function in before:
            setattr(where, name, function)


@cache
@torch.no_grad()
def right(name: str) -> Effect:
    with installed(EXERCISES[name], solutions):
        return EFFECTS[name](solutions)


@torch.no_grad()
def effect(name: str, functions: SimpleNamespace, wrong: bool = False) -> tuple[str, bool]:
    """What the functions give in the trained network, in words; and whether that is right. wrong:
    whether something else is known to be wrong with them."""
    if not (WEIGHTS / "best.pt").exists():
        return "In the trained network: weights/small/best.pt is not there.", True
    due = right(name)
    try:
        with installed(EXERCISES[name], functions):
            mine = EFFECTS[name](functions)
        off = {key: distance(mine.numbers[key], x) for key, x in due.numbers.items()}
    except Exception as error:  # of the reader's code: any
        trace = (
            f" {type(error).__name__}: {error!s:.90}" if wrong else f"\n{traceback.format_exc()}"
        )
        return f"In the trained network it fails:{trace}", False
    differ = [key for key, (x, largest) in off.items() if not x <= due.within * largest]
    told = "In the trained network: " + mine.headline
    if differ and mine.headline == due.headline:
        told += f"; but the {differ[0]} differ, by up to {off[differ[0]][0]:.3g}."
    elif differ:
        told += f".\nThe right answer: {due.headline}."
    elif wrong:
        told += ", as with the right answer: what differs above does not show here."
    else:
        told += ", as it should be."
    if mine.text:
        told += "\n" + textwrap.indent(mine.text.strip(), "    ")
    return told, not differ


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The largest difference, nan for NaN, and the largest number of y."""
    return (x.double() - y.double()).abs().max().item(), y.double().abs().max().item()
