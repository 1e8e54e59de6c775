"""What a function gives in the trained network, beside what the right one gives.

Every exercise has a part here: something to look at, and numbers that must agree. The network
computes in float64. In float32 a token whose experts are nearly tied could visit others where a
right function only rounds in another way.
"""

import copy
import dataclasses
import math
import runpy
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fp8
import model as v3
import sample
import train
from exercises import solutions
from exercises.known import EXERCISES, Exercise
from huggingface import load_model

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, TINY = ROOT / "weights/small", ROOT / "config/tiny.py"
TEXT = WEIGHTS / "text.txt"
WINDOW = 256
PROMPT, LENGTH = "def main(", 40
DRAWS = 20_000
STEPS = 30  # of training


@dataclass
class Effect:
    headline: str
    numbers: dict[str, Tensor]  # which must be those of the right function
    text: str = ""  # more to look at
    within: float = 1e-4  # what may differ, in parts of the largest number


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
    model, tokenizer = load_model(WEIGHTS, dtype=torch.float64)
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
    vocabulary), from which a text is drawn as sample.py does, always with the same random numbers.
    """
    usual, generator = sample.SampleConfig, torch.Generator().manual_seed(1)
    ids = new = encoded(PROMPT)
    for u in torch.rand(LENGTH, 1, 1, dtype=torch.float64, generator=generator):
        p = sample.probabilities(next_logits(ids, new), usual.temperature, usual.top_k)
        new = sample.draw(p[:, None], u)
        ids = torch.cat((ids, new), 1)
    begins = f"the first {sum(z.shape[1] for z in logits)} tokens of {TEXT.name}"
    headline = f"{bits_per_byte(logits):.3f} bits/byte of {begins}{how}"
    return Effect(headline, {"logits": torch.cat(logits, 1)}, trained()[1].decode(ids[0].tolist()))


# ---- A part for every exercise -------------------------------------------------------------------


def reading(functions) -> Effect:
    model, _, windows = trained()
    return reads([model(x) for x, _ in windows[:2]], lambda ids, new: model(ids)[:, -1])


def positions(functions) -> Effect:
    """Reading, and what absorption gives where the key from the latent is turned, too."""
    (model, _, windows), told, inputs = trained(), reading(functions), []
    mla, c = model.layers[5].self_attn, model.config
    H, N, C = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    hook = mla.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(windows[0][0])
    hook.remove()
    [h] = inputs
    q = mla.q_b_proj(mla.q_a_layernorm(mla.q_a_proj(h))).unflatten(-1, (H, -1))[..., :N]
    latent = mla.kv_a_layernorm(mla.kv_a_proj_with_mqa(h)[..., :C])
    W_UK = mla.kv_b_proj.weight.view(H, -1, C)[:, :N]
    k = torch.einsum("bsc,hnc->bshn", latent, W_UK)
    as_wide = dataclasses.replace(c, qk_rope_head_dim=N, rope_scaling=None)
    rope = v3.rope_table(as_wide, torch.arange(h.shape[1]), torch.float64)
    turned = [functions.rotate(x, rope, True).double() for x in (q, k)]
    absorbed = torch.einsum("bthn,hnc,bsc->bhts", q, W_UK, latent)  # one matrix for all distances
    distances = (0, 1, 8, 64)
    lines = [f"{'W^UK alone absorbed, off at distance':38}" + "".join(f"{d:8}" for d in distances)]
    for name, pair in ("left as it is", (q, k)), ("turned, too", turned):
        scores = torch.einsum("bthn,bshn->bhts", *pair)
        off = ((absorbed - scores).diagonal(-d, 2, 3).norm() for d in distances)
        all_of = (scores.diagonal(-d, 2, 3).norm() for d in distances)
        share = "".join(f"{x / y:8.1%}" for x, y in zip(off, all_of, strict=True))
        lines.append(f"{f'the key from the latent {name}:':38}{share}")
    told.text += "\n\n" + "\n".join(lines)
    told.numbers["turned scores"] = scores
    return told


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
        return v3.Cache(model.config, model.layers, 1, size, model.embed_tokens.weight)

    logits = []
    for x, _ in windows[:1]:
        cache = empty(WINDOW)
        hidden = [model.trunk(piece, cache) for piece in x.split(64, 1)]
        logits.append(model.logits(torch.cat(hidden, 1)))
    cache = empty(64)

    def next_logits(ids, new):
        return model.logits(model.trunk(new, cache))[:, -1]

    return reads(logits, next_logits, ", read through the cache")


def balancing(functions) -> Effect:
    """The biases of the first layer with experts are learnt anew, from 0, on one text."""
    net, inputs, windows = copy.deepcopy(trained()[0]), [], trained()[2]
    gate, E = net.gates()[0], net.config.n_routed_experts
    hook = gate.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    for x, _ in windows[:6]:
        net.trunk(x)
    hook.remove()
    u, shares = torch.cat(inputs)[None, :1501], []  # so that no load can be the mean itself
    gate.e_score_correction_bias.zero_()
    for _ in range(200):
        counts = torch.bincount(gate(u)[1].flatten(), minlength=E)
        shares.append((counts.max() / counts.double().mean()).item())
        gate.load.copy_(counts)
        functions.update_bias(net, 0.003)
    told = f"the busiest expert had {shares[0]:.2f} times its share, after 200 updates"
    biases = torch.stack([gate.e_score_correction_bias for gate in net.gates()])
    for gate in net.gates():
        gate.e_score_correction_bias.zero_()
    ours, without = (bits_per_byte([m(x) for x, _ in windows[:4]]) for m in (trained()[0], net))
    text = f"The biases as they were trained: {ours:.4f} bits/byte of a text. All 0: {without:.4f}."
    return Effect(f"{told} {shares[-1]:.2f} times", {"biases": biases}, text)


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
    stats, top_k = sample.Stats(), sample.SampleConfig.top_k
    options = {"generator": torch.Generator().manual_seed(1), "stats": stats, "lookup": False}
    text = sample.generate(model, encoded(PROMPT), 2 * LENGTH, top_k=top_k, **options)
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


CURVE = 1e-3  # nats


def training(functions) -> Effect:
    """The network of config/tiny.py learns with the reader's step, gate, experts and attention.

    How far may the curve be from that of the network as it is? Both are in float64, which has 53
    bits: a number is off by 1e-16 of itself. A function that computes in float32 is off by 6e-8, so
    a loss of 6 nats is off by 4e-7. Adam divides a gradient by its own size, so where it is near 0
    rounding moves a parameter as far as anything, and differences grow from step to step. With all
    three parts in float32 they grew to 5e-6 nats in 30 steps, with wrong parts to 0.03 and more.
    CURVE lies between. (What config/tiny.py leaves out, such as YaRN, does not show.)
    """
    parts = [name for name in EXERCISES["training"].parts if brings(functions, name)]
    with ExitStack() as stack:
        for name in parts:
            stack.enter_context(installed(EXERCISES[name], functions))
        losses = curve(functions.train_step)
    shown = [0, 1, 4, 9, 19, STEPS - 1]
    rows = [("step", *(f"{i + 1}" for i in shown)), ("loss", *(f"{losses[i]:.3f}" for i in shown))]
    lines = ["".join(f"{word:>8}" for word in row).strip() for row in rows]
    if parts:
        off = (losses - right("training").numbers["losses"]).abs().max()
        lines.append(f"With your {', '.join(parts)}: {off:.0e} nats from the network's own, "
                     f"{CURVE:.0e} are allowed.")  # fmt: skip
    told = f"the loss falls from {losses[0]:.3f} to {losses[-1]:.3f} nats in {STEPS} steps"
    return Effect(told, {"losses": losses}, "\n".join(lines), CURVE / losses.max().item())


def brings(functions, name: str) -> bool:
    return all(hasattr(functions, mine) for mine in EXERCISES[name].functions)


def curve(train_step) -> Tensor:
    """The loss in nats of each step, of config/tiny.py's network on the bytes of a text."""
    settings = runpy.run_path(str(TINY))
    network, run = (
        kind(**{x.name: settings[x.name] for x in dataclasses.fields(kind) if x.name in settings})
        for kind in (v3.ModelConfig, train.TrainConfig)
    )
    text, generator = torch.tensor([*TEXT.read_bytes()]), torch.Generator().manual_seed(run.seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(run.seed)
        net, losses = v3.DeepSeekV3(network).double().train(), []
        [optimizer] = train.make_optimizers(net, run)
        for step in range(STEPS):
            first = torch.randint(
                len(text) - run.block_size, (run.batch_size, 1), generator=generator
            )
            windows = text[first + torch.arange(run.block_size + 1)]  # (B, T + 1)
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(run, step)
            weights = train.loss_weights(net, run, step)
            del weights["mtp_loss_1"]  # of one module mtp_loss is all
            told = train_step(net, optimizer, windows[:, :-1], windows[:, 1:], weights, run.gamma)
            losses.append(told["loss"].detach())
    return torch.stack(losses).double()


EFFECTS = {
    "gate": reading, "bias": balancing, "experts": reading, "mla": reading, "absorbed": decoding,
    "rope": positions, "mtp": looking_ahead, "accept": drafting, "balance": balance,
    "tiles": rounding, "yarn": long_reading, "training": training,
}  # fmt: skip


# ---- In the place of the network's own -----------------------------------------------------------


def attention(expanded: Callable, absorbed: Callable) -> Callable:
    """MLA.forward with these two ways to attend."""

    def forward(self, h, rope, past=None):
        config, (B, T, _) = self.config, h.shape
        N, R, C = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(h)))
        q_nope, q_pe = q.view(B, T, -1, N + R).split([N, R], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(h).split([C, R], -1)
        latent = self.kv_a_layernorm(latent)
        q_pe, k_pe = (v3.rotate(x, rope, config.rope_interleave) for x in (q_pe, k_pe[:, :, None]))
        if past is None:
            o = expanded(self, q_nope, q_pe, latent, k_pe)
        else:
            kept, start = past
            kept[:, start : start + T] = torch.cat((latent, k_pe[:, :, 0]), -1)
            o = absorbed(self, q_nope, q_pe, kept[:, : start + T])
        return self.o_proj(o.to(h.dtype).flatten(2))

    return forward


def place(exercise: Exercise, theirs: str) -> tuple[object, str]:
    """The module or class where the network's function stands, and its name there."""
    *owner, name = theirs.split(".")
    return getattr(exercise.module, owner[0]) if owner else exercise.module, name


def in_place(exercise: Exercise, mine: str, function: Callable) -> tuple[object, str, Callable]:
    """Where a function is put, and what is put there."""
    where, name = place(exercise, exercise.functions[mine])
    if mine == "attend_expanded":
        return where, "forward", attention(function, solutions.attend_absorbed)
    if mine == "attend_absorbed":
        return where, "forward", attention(solutions.attend_expanded, function)

    def forward(*args):
        """In float64, as all in the network, where the function computes in float32."""
        if mine == "rms_norm":
            norm, x = args
            args = x, norm.weight, norm.eps
        out = function(*args)
        if exercise.module is not v3 or out is None:
            return out
        parts = out if isinstance(out, tuple) else (out,)
        parts = [x.double() if x.dtype == torch.float32 else x for x in parts]
        return tuple(parts) if isinstance(out, tuple) else parts[0]

    return where, name, forward


@contextmanager
def installed(exercise: Exercise, functions) -> Iterator[None]:
    """The functions in the place of the network's own."""
    before = []
    for mine in exercise.functions if exercise.installs else ():
        where, name, function = in_place(exercise, mine, getattr(functions, mine))
        before.append((where, name, vars(where)[name]))
        setattr(where, name, function)
    try:
        yield
    finally:
        for where, name, function in before:
            setattr(where, name, function)


@cache
@torch.no_grad()
def right(name: str) -> Effect:
    right = solutions
    if name == "training":  # with the network as it is
        right = SimpleNamespace(train_step=solutions.train_step)
    with installed(EXERCISES[name], right):
        return EFFECTS[name](right)


@torch.no_grad()
def effect(name: str, functions: SimpleNamespace, wrong: bool = False) -> tuple[str, bool]:
    """What the functions give in the trained network, in words; and whether that is right. wrong:
    whether something else is known to be wrong with them."""
    if not (WEIGHTS / "best.pt").exists():
        return "In the trained network: weights/small/best.pt is not there.", True
    due, where = right(name), "In training" if name == "training" else "In the trained network"
    try:
        with installed(EXERCISES[name], functions):
            mine = EFFECTS[name](functions)
        off = {key: distance(mine.numbers[key], x) for key, x in due.numbers.items()}
    except Exception as error:  # of the reader's code: any
        told = f"{type(error).__name__}: {error!s:.90}" if wrong else traceback.format_exc()
        return f"{where} it fails:\n{told}", False
    differ = [key for key, (x, largest) in off.items() if not x <= due.within * largest]
    told = f"{where}: {mine.headline}"
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
    if differ and mine.text != due.text:
        told += "\nThe right answer shows:\n" + textwrap.indent(due.text.strip(), "    ")
    return told, not differ


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The largest difference, nan for NaN, and the largest number of y."""
    return (x.double() - y.double()).abs().max().item(), y.double().abs().max().item()
