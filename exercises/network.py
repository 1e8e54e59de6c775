"""What functions do in the trained network. Every exercise has something to look at; check.py shows
it beside what the network's own functions give, and judges nothing by it.

Networks compute in float64. In float32 a token whose experts are nearly tied could visit others
where a right function only rounds in another way, and a curve of training would soon be another.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fp8
import model as v3
import sample
import train
from exercises import solutions
from exercises.known import EXERCISES
from load import load_model
from support.settings import read_config_file

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "weights/small/text.txt"
READ = 1024  # tokens of it
DRAWS = 20_000
STEPS = 30  # of training


@cache
def trained():
    """The trained network, its tokenizer and the tokens of a text, (1, READ + 1)."""
    model, tokenizer = load_model(ROOT / "weights/small", dtype=torch.float64)
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: READ + 1]
    return model, tokenizer, torch.tensor([ids])


def bits_per_byte(model, window: int, piece: int) -> float:
    """The loss of the text in windows of so many tokens. Each is read through the cache, a piece at
    a time: the first is expanded, the others are absorbed."""
    _, tokenizer, ids = trained()
    nats = 0.0
    for x, y in zip(ids[:, :-1].split(window, 1), ids[:, 1:].split(window, 1), strict=True):
        cache = v3.Cache(model.config, model.layers, 1, window, model.embed_tokens.weight)
        hidden = [model.trunk(part, cache) for part in x.split(piece, 1)]
        logits = model.logits(torch.cat(hidden, 1))
        nats += F.cross_entropy(logits[0], y[0], reduction="sum").item()
    size = sum(len(tokenizer.to_bytes(i)) for i in ids[0, 1:].tolist())
    return nats / math.log(2) / size


# ---- Something to look at for every exercise -----------------------------------------------------


def written(model, text: Tensor, new: int, cached: bool) -> Tensor:
    """Text (1, T) -> (1, T + new). Without a cache the network reads the whole text for every token
    and expands its keys and values: a wrong `attend_expanded` has a part in every token."""
    cache = None
    if cached:
        size = text.shape[1] + new
        cache = v3.Cache(model.config, model.layers, 1, size, model.embed_tokens.weight)
    generator, read = torch.Generator().manual_seed(3), text
    for _ in range(new):
        p = sample.probabilities(model.logits(model.trunk(read, cache)[:, -1:]), 0.6)
        token = sample.draw(p, sample.uniform(1, 0, text.device, generator))
        text = torch.cat((text, token), 1)
        read = token if cached else text
    return text


def reading(functions, window: int = 256, piece: int = 256) -> str:
    """The loss of a text, and a text that the network writes. Its first line, temperature and seed
    were chosen: after many others so small a network soon repeats itself."""
    model, tokenizer, _ = trained()
    bits = bits_per_byte(model, window, piece)
    prompt = torch.tensor([tokenizer.encode("    def close(self):\n")])
    text = written(model, prompt, 60, cached=piece < window)
    pieces = "" if piece == window else f", {piece} tokens at a time"
    return (
        f"{bits:.3f} bits/byte of {TEXT.name} in windows of {window:,} tokens{pieces}\n"
        f"it continues the first line:\n{tokenizer.decode(text[0].tolist()).rstrip()}"
    )


def balancing(functions) -> str:
    """Learns the biases of the first layer with experts anew, from 0, on one text. Then measures
    the loss with the biases of all layers at 0."""
    (model, _, ids), inputs, shares = trained(), [], []
    net = copy.deepcopy(model)
    gate = net.gates()[0]
    hook = gate.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    net.trunk(ids)
    hook.remove()
    gate.e_score_correction_bias.zero_()
    for _ in range(200):
        gate.load.copy_(v3.count_chosen(gate(inputs[0])[1], len(gate.load)))
        shares.append(gate.load.max() / gate.load.double().mean())
        net.update_bias(0.003)
    for gate in net.gates():
        gate.e_score_correction_bias.zero_()
    own, without = (bits_per_byte(x, 256, 256) for x in (model, net))
    last = shares[-20:]
    return (
        f"the busiest expert of a layer has {shares[0]:.2f} times the mean load with biases of 0,\n"
        f"{min(last):.2f} to {max(last):.2f} times after 180 to 200 updates\n"
        f"{own:.3f} bits/byte of {TEXT.name} with the biases as trained, {without:.3f} with 0"
    )


def balance(functions) -> str:
    model, _, ids = trained()
    loss = model(ids[:, :256], ids[:, 1:257])["balance_loss"] / len(model.gates())
    return f"the balance loss is {loss:.3f}, as a mean over the layers (1: all equally busy)"


def looking_ahead(functions) -> str:
    model, _, ids = trained()
    loss = functions.mtp_loss(model, ids[:, :256], ids[:, 1:257])
    return f"the loss of the MTP module is {loss:.3f} nats"


def drafting(functions) -> str:
    """What comes out of many drafts of one token, beside the distribution that it must have."""
    model, tokenizer, _ = trained()
    text = "for name in sorted(os.listdir(path)):\n    if name"
    ids = torch.tensor([tokenizer.encode(text)])
    h = model.trunk(ids)
    ahead = model.predict_next(1, h[:, :-1], ids[:, 1:])
    p, q = (model.logits(x)[0, -1].softmax(-1) for x in (h, ahead))
    # A vocabulary of six tokens; drafts at temperature 1/2, so that a wrong rule shows clearly.
    tokens = (p + q).topk(6).indices
    p, q = p[tokens] / p[tokens].sum(), q[tokens] ** 2 / (q[tokens] ** 2).sum()
    u = torch.rand(DRAWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drafts = sample.draw(q.expand(DRAWS, 1, -1), u[:, :1])
    kept, after = sample.accept(p.repeat(DRAWS, 2, 1), q.repeat(DRAWS, 1, 1), drafts, u[:, 1:])
    first = torch.where(kept[:, None] > 0, drafts, after)
    share = torch.bincount(first.flatten(), minlength=6) / DRAWS
    lines = [f"the token after {text.splitlines()[-1].strip()!r}, drafted {DRAWS:,} times:"]
    lines += ["                    model    drafts   written"]
    for i, *numbers in zip(tokens.tolist(), p, q, share, strict=True):
        lines.append(f"{tokenizer.decode([i])!r:16}" + " ".join(f"{x:9.1%}" for x in numbers))
    return "\n".join(lines)


def rounding(functions) -> str:
    """The hidden states of a text, with a number such as large networks have in the first token:
    some are 100,000 times as large as most others (arXiv 2402.17762)."""
    model, _, ids = trained()
    x = model.trunk(ids[:, :256])[0].float()  # (T, D)
    x[0, 5] = 1e5 * x.abs().median()
    single = (x.abs().max() / fp8.E4M3_MAX).expand(len(x), 1)
    lines = ["hidden states of a text, in which one number was made very large:"]
    for name, (q, s) in {
        "tiles": fp8.quantize(x, fp8.TILE),
        "one scale for all": ((x / single).to(fp8.E4M3), single),
    }.items():
        y = fp8.dequantize(q, s, fp8.TILE)[1:]
        off, zeros = (y - x[1:]).norm() / x[1:].norm(), (y == 0).double().mean()
        lines.append(f"{name}: off by {off:.1%}, {zeros:.1%} of the numbers become 0")
    return "\n".join(lines)


def curve(functions) -> str:
    """The loss in nats, step by step, of config/tiny.py's network on the bytes of a text."""
    kinds = v3.ModelConfig, train.TrainConfig
    settings = train.split_configs(read_config_file(str(ROOT / "config/tiny.py"), *kinds))
    network, run = (kind(**values) for kind, values in zip(kinds, settings, strict=True))
    text, generator = torch.tensor([*TEXT.read_bytes()]), torch.Generator().manual_seed(run.seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(run.seed)
        net, losses = v3.DeepSeekV3(network).double().train(), []
        [optimizer] = train.make_optimizers(net, run)
        for step in range(STEPS):
            size = (run.batch_size, 1)
            first = torch.randint(len(text) - run.block_size, size, generator=generator)
            windows = text[first + torch.arange(run.block_size + 1)]  # (B, T + 1)
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(run, step)
            weights = train.loss_weights(run, step)
            weights = {name: weights[name] for name in ("loss", "mtp_loss", "balance_loss")}
            x, y = windows[:, :-1], windows[:, 1:]
            losses.append(functions.train_step(net, optimizer, x, y, weights, run.gamma)["loss"])
    shown = [0, 1, 4, 9, 19, STEPS - 1]
    rows = [("step", *(f"{i + 1}" for i in shown)), ("loss", *(f"{losses[i]:.3f}" for i in shown))]
    return "\n".join("".join(f"{word:>8}" for word in row) for row in rows)


EFFECTS = {
    "gate": reading, "experts": reading, "mla": reading, "rope": reading, "bias": balancing,
    "absorbed": partial(reading, piece=64), "yarn": partial(reading, window=READ, piece=READ),
    "mtp": looking_ahead, "accept": drafting, "balance": balance, "tiles": rounding,
    "training": curve,
}  # fmt: skip


# What a difference from the network's own functions says, if a case has failed.
DECIDE = "The cases above decide"
SHORT = f"{DECIDE}: in so short a text a difference below 0.005 bits/byte may be chance."
ABOUT = dict.fromkeys(("gate", "experts", "mla", "rope", "absorbed", "yarn"), SHORT)
ABOUT["bias"] = (
    f"{DECIDE}: steps of one size move the load to and fro, so steps that grow with the\n"
    "difference may balance better here. In training the loss was no lower with them\n"
    "(arXiv 2408.15664, Table 3)."
)

# ---- In the place of the network's own -----------------------------------------------------------

PLACES = {name: place for x in EXERCISES.values() for name, place in x.functions.items()}


@contextmanager
def installed(functions: SimpleNamespace) -> Iterator[None]:
    """A context in which the functions replace the network's own. EFFECTS itself calls mtp_loss and
    train_step, which replace nothing."""

    def in_float64(function):  # its results, where it computes in float32
        return lambda *args: tree_map_only(Tensor, upcast, function(*args))

    def upcast(x: Tensor) -> Tensor:
        return x.double() if x.dtype == torch.float32 else x

    with ExitStack() as stack:
        for name, function in vars(functions).items():
            if name not in ("mtp_loss", "train_step"):
                stack.enter_context(patch.object(*PLACES[name], in_float64(function)))
        yield


@cache
@torch.no_grad()
def own_effect(name: str) -> str:
    return EFFECTS[name](solutions)


@torch.no_grad()
def effect(name: str, functions: SimpleNamespace, failed: bool = False) -> str:
    """What the functions do in the network, and what its own do if that differs. failed: a case has
    shown that the functions are wrong."""
    with installed(functions):
        mine = EFFECTS[name](functions)
    if mine == (own := own_effect(name)):
        end = ", so the mistake does not show here." if failed else "."
        return f"{mine}\nThe network's own functions give the same{end}"
    better = f"{DECIDE}: a better number here does not make a function right."
    about = "\n" + ABOUT.get(name, better) if failed else ""
    return f"{mine}\nThe network's own functions give:\n{own}{about}"
