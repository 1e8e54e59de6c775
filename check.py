"""After an edit: does the network still compute what it should? python check.py RUN

An edited network may train without an error and still be wrong: it decodes something other than it
was trained to compute, it loses a part of its gradient, or it cannot be resumed. Each check
computes one thing in two ways and compares the results:

    decoding     logits of a text that is read in pieces with a cache, and of the whole text
    bfloat16     the rounding error of the logits with a cache, and without one
    causality    logits of a text, and of the same text with another end
    gradients    of a plain training step, and recomputed, in two micro-batches, or compiled
    losses       that the model returns, and the cross-entropies of its logits
    drafts       a greedy text written with and without drafts, and by generate_plain; drawn tokens
    step         what a run saves, whole and resumed, and the losses of its log and its best.pt

All checks but bfloat16 use a copy of the network in float64, in which right results agree to about
14 digits. All weights of the copy are perturbed, because a parameter that starts at 0 would hide a
mistake. docs/HACKING.md, "What is checked", says what to look for if a check fails.

Shapes: B texts, T tokens of a text, k depth (0: the main model, k: MTP module k), V vocabulary.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

import sample
import train
from load import load_model
from model import MAX_ROUND_TOKENS, Cache, DeepSeekV3, check_ranges
from support import processes, settings
from support.checkpoints import RandomNumbers, load_checkpoint
from support.settings import Refusal, and_more, run_command
from support.sizes import longest_window
from support.tokens import Tokens
from train import TrainConfig

SAME = 1e-8  # a smaller relative difference is rounding


@dataclass
class Answer:
    """The result of a check, ready to be printed."""

    summary: str  # what was compared, with numbers
    wrong: list[str] = field(default_factory=list)  # a sentence for each mistake
    notes: list[str] = field(default_factory=list)  # facts that may be intended

    def __str__(self) -> str:
        verdict = "WRONG" if self.wrong else "note " if self.notes else "right"
        return "\n      ".join((f"{verdict} {self.summary}", *self.wrong, *self.notes))


@torch.no_grad()
def perturbed(model: DeepSeekV3) -> DeepSeekV3:
    """A copy in float64 with noise added to all weights: to matrices so much that the scores of
    attention and gates differ by about 1. At an initial 0.006 a wrong score would hardly show."""
    model = copy.deepcopy(model)
    model.to(torch.float64).eval()
    model.update_bias(0.0)  # resets the counted loads
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        std = p.shape[-1] ** -0.5 if p.ndim > 1 else model.config.initializer_range
        p.add_(noise.to(p.device), alpha=std)
    return model


def random_tokens(model: DeepSeekV3, texts: int, length: int) -> Tensor:
    """Random texts (texts, length), no longer than the network allows. Special tokens are the first
    or last ids of a vocabulary, so about every eighth token is one of these two."""
    shape, V = (texts, min(length, model.config.max_position_embeddings)), model.config.vocab_size
    generator = torch.Generator().manual_seed(2)
    tokens, other = (torch.randint(n, shape, generator=generator) for n in (V, 16))
    tokens = tokens.masked_fill(other == 0, 0).masked_fill(other == 1, V - 1)
    return tokens.to(model.embed_tokens.weight.device)


def logits_of(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    """The logits of each depth, (B, T - k, V), with the same random numbers in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        logits, mtp_logits = model(tokens, return_mtp=True)
    return [logits, *mtp_logits]


def name_of(k: int) -> str:
    return f"MTP module {k}" if k else "main model"


def differing(found: list[Tensor], right: list[Tensor]) -> Iterator[tuple[str, int, str]]:
    """The depths whose logits (B, T - k, V) differ: name, position of the first token after which
    they do, and by how much."""
    for k, (x, y) in enumerate(zip(found, right, strict=True)):
        off = ((x - y).abs().amax((0, 2)) / y.std()).nan_to_num(math.inf)  # (T - k,)
        if positions := (off > SAME).nonzero().flatten().tolist():
            yield name_of(k), positions[0] + k, f"by up to {off.max():.2g} standard deviations"


# ---- Decoding ------------------------------------------------------------------------------------

SEVERAL = "several tokens at a time"
# The pieces in which a text is read, over and over: how many tokens, and how many of these are
# drafts that are rejected.
PATTERNS = {
    "one token at a time": [(1, 0)],
    SEVERAL: [(n, 0) for n in range(2, MAX_ROUND_TOKENS + 1)],
    "drafts rejected": [(MAX_ROUND_TOKENS, n) for n in (0, *range(MAX_ROUND_TOKENS, 0, -1))],
}


@torch.inference_mode()
def decoding(model: DeepSeekV3, length: int | None = None) -> Answer:
    """Reads random texts in pieces, as sampling does, and compares the logits with those of the
    whole texts. A piece is one token, several tokens, or drafts of which some are rejected, which
    lowering `cache.length` forgets. Pieces begin the text or follow a prompt. A text has `length`
    tokens, by default 256, or twice the longest window if that is more."""
    model, wrong = perturbed(model), []
    # Two texts, and two others whose tokens are the rejected drafts.
    tokens = random_tokens(model, 4, length or max(256, 2 * longest_window(model)))
    whole, inputs = whole_texts(model, tokens)
    ways = [*itertools.product(PATTERNS, (0, tokens.shape[1] // 2))]
    for pattern, prompt in ways:
        found = [read_in_pieces(model, k, inputs[k], tokens, pattern, prompt)
                 for k in range(len(whole))]  # fmt: skip
        after = f" after a prompt of {prompt}" if prompt else ""
        for part, position, size in differing(found, whole):
            wrong.append(f"{part}, {pattern}{after}: wrong from position {position} on, {size}")
    count, length = len(whole) * len(ways), tokens.shape[1]
    what = f"decoding: {count - len(wrong)} of {count} ways to read {length} tokens in pieces give"
    return Answer(f"{what} the logits of the whole text", wrong)


def whole_texts(model: DeepSeekV3, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For each depth, the logits of the first half of the texts, (B, T - k, V), and the inputs for
    all texts: the tokens for the main model, hidden states for an MTP module."""
    logits, inputs = logits_of(model, tokens[: len(tokens) // 2]), [tokens, model.trunk(tokens)]
    for k in range(1, len(logits) - 1):
        inputs.append(model.predict_next(k, inputs[k][:, :-1], tokens[:, k:]))
    return logits, inputs


def read_in_pieces(
    model: DeepSeekV3, k: int, inputs: Tensor, tokens: Tensor, pattern: str, prompt: int = 0
) -> Tensor:
    """The logits of depth k, read with a cache: (B, T - k, V). The first B rows of inputs and
    tokens (2B, ...) are the texts, the others supply the rejected drafts."""
    B, length, logits, start = len(tokens) // 2, tokens.shape[1] - k, [], 0
    layers = model.mtp if k else model.layers
    cache = Cache(model.config, layers, B, length, model.embed_tokens.weight)
    most = max(rejected for _, rejected in PATTERNS[pattern])
    first = [(prompt + most, most)] if prompt + most else []
    pieces = itertools.chain(first, itertools.cycle(PATTERNS[pattern]))
    while start < length:
        n, rejected = next(pieces)
        read, kept = min(n, length - start), min(n - rejected, length - start)
        piece, later = (
            torch.cat((x[:B, start : start + kept], x[B:, start + kept : start + read]), 1)
            for x in (inputs, tokens[:, k:])
        )
        cache.length = start  # forgets the rejected drafts
        h = model.predict_next(k, piece, later, cache) if k else model.trunk(piece, cache)
        logits.append(model.logits(h, k)[:, :kept])
        start += kept
    return torch.cat(logits, 1)


@torch.inference_mode()
def bfloat16(model: DeepSeekV3, length: int = 1024) -> Answer:
    """Compares how far bfloat16 moves the distribution of the next token, as a KL divergence,
    without a cache and with one. A cache moves it further if it holds something that needs more
    digits than bfloat16's two or three, such as a sum that grows with the text. Weights are those
    of the run, not perturbed."""
    exact, low = (copy.deepcopy(model).eval().to(x) for x in (torch.float64, torch.bfloat16))
    tokens, numbers, wrong = random_tokens(low, 2, length), [], []
    right, _ = whole_texts(exact, tokens.to(exact.embed_tokens.weight.device))
    whole, inputs = whole_texts(low, tokens)
    for k, logits in enumerate(right):
        plain = divergence(logits, whole[k])
        cached = divergence(logits, read_in_pieces(low, k, inputs[k], tokens, SEVERAL))
        numbers.append(f"{plain:.1e} and {cached:.1e} in the {name_of(k)}")
        if not cached <= 3 * plain + 1e-9:
            wrong.append(f"{name_of(k)}: {cached / plain:.0f} times as large with a cache")
    what = f"bfloat16: KL divergence from float64 for {tokens.shape[1]} tokens, without and with a"
    return Answer(f"{what} cache: {', '.join(numbers)}", wrong)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of logits (B, T, V) in nats, the median over tokens: where rounding makes a token
    choose another expert, it is a hundred times as large."""
    p, q = (x.to(p.device).double().log_softmax(-1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).median().item()


def drafts(model: DeepSeekV3, new: int = 32) -> Answer:
    """Compares greedy texts with those of the plain loop. Drafts must not change them. Then draws
    tokens after drafts with the weights of the run, whose drafts are often accepted."""
    own, model = copy.deepcopy(model).double().eval(), perturbed(model)
    prompt, wrong = random_tokens(model, 2, 8), []
    new = min(new, model.config.max_position_embeddings - prompt.shape[1])
    plain = sample.generate_plain(model, prompt, new, temperature=0)
    for n in range(sample.MAX_DRAFTS + 1):
        text = sample.generate(model, prompt, new, temperature=0, speculative=n)
        if differs := (text != plain).any(0).nonzero().flatten().tolist():
            wrong.append(f"with {n} drafts per round the text differs from token {differs[0]} on")
    if model.mtp and (chance := chance_of_drawn(own, prompt[:1])) < 1e-5:
        wrong.append(f"drawn after a draft, tokens are not the model's (by chance: {chance:.0e})")
    return Answer("drafts: greedy texts must be generate_plain's, drawn tokens the model's", wrong)


@torch.inference_mode()
def chance_of_drawn(model: DeepSeekV3, prompt: Tensor, rounds: int = 600) -> float:
    """The probability that so many tokens, each drawn in a round with two drafts after the same
    text, would differ so much or more from the model's distribution p, at most: the bound of
    Dvoretzky, Kiefer, Wolfowitz and Massart. The tokens are ordered by q, the first draft's
    distribution, because wrong rules mostly write too many or too few of the draft's favourites."""
    text = sample.Text(model, prompt, prompt.shape[1] + 16, 2, sample.Filters(1.0))
    generator, n = torch.Generator(prompt.device).manual_seed(4), prompt.shape[1] + 1
    text.run(n - 1, sample.uniform(1, 0, prompt.device, generator))
    logits = logits_of(model, text.tokens[:, :n])[:2]
    p, q = (sample.probabilities(x[0, -1], *text.filters) for x in logits)  # (V,) each
    order = q.argsort(descending=True)
    before = torch.zeros_like(p).scatter(0, order, p[order].cumsum(0) - p[order])
    u = torch.rand(rounds, dtype=p.dtype, device=p.device, generator=generator)
    drawn = torch.stack([text.run(n, sample.uniform(1, 2, prompt.device, generator))[0, 1]
                         for _ in range(rounds)])  # fmt: skip
    at = (before[drawn] + u * p[drawn]).sort().values  # uniform if the tokens are the model's
    before = torch.arange(rounds, device=p.device) / rounds  # share of the tokens before each
    off = torch.maximum(at - before, before + 1 / rounds - at).max().item()
    return 2 * math.exp(-2 * rounds * off**2)


# ---- Training ------------------------------------------------------------------------------------


@torch.inference_mode()
def causality(model: DeepSeekV3, length: int = 256) -> Answer:
    """Compares two texts with the same beginning and different ends. The logits of the beginning
    must be equal, also in training mode: a network that sees the answer has a meaningless loss.
    Then compares the logits of a batch with those of each text alone. Notes logits that change when
    `rope` turns queries and keys as if all tokens came later, which leaves V3's scores as they are.
    """
    model, wrong, notes = perturbed(model), [], []
    texts = random_tokens(model, 4, length)
    end = texts.shape[1] // 2 - 1  # no multiple of a usual block length
    texts[2:, :end] = texts[:2, :end]
    for mode in ("evaluation", "training"):
        model.train(mode == "training")
        one, other = ([x[:, : end - k] for k, x in enumerate(logits_of(model, half))]
                      for half in texts.split(2))  # fmt: skip
        for part, at, size in differing(other, one):
            sees = f"position {at} sees tokens from position {end} on; logits differ {size}"
            wrong.append(f"{part}, in {mode}: {sees}")
    batch, *each = (logits_of(model.eval(), x) for x in (texts, *texts.split(1)))
    for part, _, size in differing([torch.cat(x) for x in zip(*each, strict=True)], batch):
        wrong.append(f"{part}: a text sees the others of its batch; logits differ {size}")
    rope = model.rope
    model.rope = lambda x, positions, *cache: rope(x, positions + 5, *cache)
    for part, _, size in differing(logits_of(model, texts), batch):
        notes.append(f"{part}: rotated by positions that are 5 larger, logits differ {size}")
    what = "causality: logits must not depend on later tokens, nor on other texts of the batch"
    return Answer(what, wrong, notes)


def gradients(model: DeepSeekV3, config: TrainConfig, compiled=False, step: int = 0) -> Answer:
    """Compares the gradients of a training step with those of the same step recomputed, in two
    micro-batches and, if `compiled`, compiled. A loss must be a mean over the targets, however they
    are divided, and in eval mode it must be the same. If the step draws random numbers, as dropout
    does, only recomputing draws the same ones, and nothing else is compared."""
    model = perturbed(model)
    text = random_tokens(model, 4, min(config.block_size, 128) + 1)
    answer, plain = reach(model, config, text, step), one_step(model, config, text, step)
    least = SAME * math.sqrt(sum(g.square().sum().item() for g in plain.gradients.values()))
    ways = {"recomputed": dict(recompute=True)}
    if not plain.random:
        with torch.no_grad():
            evaluated = model(text[:, :-1], text[:, 1:])["loss"].item()
        if not math.isclose(trained := plain.losses["loss"].item(), evaluated, rel_tol=SAME):
            both = f"{trained:.6g} in training mode, {evaluated:.6g} in eval mode"
            answer.notes.append(f"loss is {both}")
        ways |= {"in two micro-batches": dict(grad_accum=2)}
        ways |= {"compiled": dict(compile=True)} if compiled else {}
    for way, changes in ways.items():
        try:
            found = one_step(model, config, text, step, **changes).gradients
            sentence = differences(plain.gradients, found, 100 * SAME, least)
        except RuntimeError:  # shapes differ, such as the number of an expert's rows
            if way != "recomputed":
                raise
            sentence = "a block does not compute what it computed before"
        answer.wrong += [f"{way}: {sentence}"] if sentence else []
    answer.summary += f"; gradients must be the same {', '.join(ways)}"
    return answer


def reach(model: DeepSeekV3, config: TrainConfig, text: Tensor, step: int) -> Answer:
    """Counts the parameters that get a gradient from each loss. It is wrong if a parameter gets
    none, or if a gate's choices are not counted, so that `update_bias` cannot balance it. Notes
    name parameters that an auxiliary loss alone trains, and losses that train no layer of the main
    model, such as that of a head on detached hidden states."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    gates = {name for name, module in model.named_modules() if module in model.gates()}
    reached = {loss: set() for loss in train.loss_weights(config, step)}
    for later in range(32):  # a layer that is skipped in this step may learn in a later one
        for loss, names in reached.items():
            found = one_step(model, config, text, step + later, only=loss)
            names |= {name for name, g in found.gradients.items() if g.any()}
            gates -= found.counted
        by_any = set().union(*reached.values())
        if learning <= by_any and not gates:
            break
    by_text = reached.get("loss", set()) | reached.get("mtp_loss", set())
    wrong, notes = [f"{name} gets no gradient" for name in sorted(learning - by_any)], []
    wrong += [f"{x}'s choices are not counted: a block counts one gate" for x in sorted(gates)]
    for loss, names in reached.items():
        if only := sorted(names - by_text):
            notes.append(f"{loss} alone trains {and_more(only)}")
        if found.losses.get(loss) and not any(name.startswith("layers.") for name in names):
            notes.append(f"{loss} trains no layer of the main model: is its input detached?")
    counts = ", ".join(f"{loss} reaches {len(names)}" for loss, names in reached.items())
    return Answer(f"gradients: of {len(learning)} parameters {counts}", wrong, notes)


def one_step(model, config: TrainConfig, text: Tensor, step: int, only="", **changes):
    """What `backward` of train.py computes in this step: gradients and losses by name, the gates
    that counted their choices, and whether random numbers were drawn. only: the one loss whose
    gradients to compute. changes: other settings of the run."""
    plain = dict(recompute=False, grad_accum=1, compile=False, fp8=False)
    model, config = copy.deepcopy(model).train(), replace(config, **plain | changes)
    train.at_step(model, config, step)
    weights = train.loss_weights(config, step)
    weights = {loss: w if only in ("", loss) else 0.0 for loss, w in weights.items()}
    machine = processes.Machine(text.device, torch.float64, compiled=config.compile)
    trainer, windows = processes.wrap(model, config, machine), text.cpu().numpy()
    numbers = RandomNumbers(machine)
    with torch.random.fork_rng():
        torch.manual_seed(step)
        before = numbers.state_dict()["by_rank"][0]
        losses = train.backward(trainer, np.split(windows, config.grad_accum), weights, machine)
        random = not all(map(torch.equal, before, numbers.state_dict()["by_rank"][0]))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gates = {gate for gate in model.gates() if gate.load.any()}
    counted = {name for name, module in model.named_modules() if module in gates}
    return SimpleNamespace(gradients=gradients, losses=losses, counted=counted, random=random)


def differences(right: dict, found: dict, same: float = SAME, least: float = 1e-300) -> str:
    """A sentence if tensors of the same name differ by more than `same`, as a share of the norm of
    the right one (of `least`, if that is more); "" if not."""
    off = dict.fromkeys(right.keys() ^ found.keys(), math.inf)  # one of the two is missing
    for name in sorted(right.keys() & found.keys()):
        x, y = right[name].double(), found[name].double()
        off[name] = (y - x).norm().item() / max(x.norm().item(), least)
    wrong = {name: x for name, x in off.items() if not x <= same}  # NaN, too
    if not wrong:
        return ""
    most = max(wrong, key=wrong.get)
    return f"{len(wrong)} of {len(off)} differ, above all {most}, by {off[most]:.2g} of its norm"


@torch.no_grad()
def losses(model: DeepSeekV3) -> Answer:
    """Compares `loss` and `mtp_loss` with cross-entropies of the logits. Evaluations report both,
    and `loss` decides which weights become best.pt."""
    model, wrong = perturbed(model), []
    text = random_tokens(model, 4, 129)
    x, y = text[:, :-1], text[:, 1:]
    returned = model(x, y)
    main, *mtp = (F.cross_entropy(z.mT, y[:, k:]).item() for k, z in enumerate(logits_of(model, x)))
    for name, right in {"loss": main, "mtp_loss": sum(mtp) / max(1, len(mtp))}.items():
        if not math.isclose(found := returned[name].item(), right, rel_tol=SAME):
            wrong.append(f"{name} is {found:.6g}, but the logits' cross-entropy is {right:.6g}")
    return Answer(f"losses: must be cross-entropies of the logits, here {main:.6g}", wrong)


def step(model: DeepSeekV3, config: TrainConfig, run=None, steps=4, tokenizer=None) -> Answer:
    """Trains some steps by `train` of train.py with the run's settings, then repeats the second
    half with new objects, resumed from a checkpoint. Both must save the same states, and log the
    same validation losses: in the middle, where the resumed one begins, and at the end. The weights
    in best.pt must have the loss that the log gives them. Notes numbers of low precision in the
    checkpoint, and in that of `run`, because these steps are in float64."""
    what = "step: a resumed run must save what a whole one saves, and best.pt what was evaluated"
    model, stored = perturbed(model), {}
    if run and (run / "ckpt.pt").exists():
        stored = load_checkpoint(run / "ckpt.pt", whole=False)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        whole, resumed, best = train_twice(model, config, Path(folder), steps, tokenizer)
        sentence = differences(flat(whole), flat(resumed))
        notes = low_precision(flat(stored)) or low_precision(flat(whole))
    wrong = [f"resumed: {sentence}"] if sentence else []
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    learning -= {name for state in whole.values() for name in state.get("names", ())}
    wrong += [f"{name} is in no optimiser" for name in sorted(learning)]
    if not all(math.isclose(x, best["evaluated again"], rel_tol=SAME) for x in best.values()):
        numbers = ", ".join(f"{x:.6g} {where}" for where, x in best.items())
        wrong.append(f"best.pt does not hold the evaluated weights: its loss is {numbers}")
    return Answer(what, wrong, notes)


def train_twice(model: DeepSeekV3, config: TrainConfig, folder: Path, steps, tokenizer) -> tuple:
    """What a run of so many steps saves, and its resumed second half: states by name, with the
    validation losses of the log. Then the loss of best.pt, as logged, as stored, and as evaluated
    again."""
    whole, resumed, half = folder / "whole", folder / "resumed", steps // 2
    config = replace(
        config, steps=steps, batch_size=2, block_size=min(64, config.block_size),
        long_block_size=0, grad_accum=1, log_every=steps, eval_every=half, save_every=half,
        dtype="float64", fp8=False, compile=False, recompute=False, parallel="ddp",
        overwrite=False, init_from="", eval_only=False,
    )  # fmt: skip
    tokens = random_tokens(model, 2, 257).cpu().numpy()
    text, val, V = Tokens([tokens.flatten()]), Tokens([tokens[0]]), model.config.vocab_size
    data = SimpleNamespace(train=text, val=val, vocab_size=V, val_bytes_per_token=1.0)
    data.tokenizer = tokenizer
    machine = processes.Machine(model.embed_tokens.weight.device, torch.float64)

    def copy_first(*args):  # before the first step after the half, which asks for its windows
        if (whole / "ckpt.pt").exists() and not resumed.exists():
            resumed.mkdir()
            shutil.copy(whole / "ckpt.pt", resumed)
        return Tokens.windows(text, *args)

    text.windows = copy_first

    def trained(network: DeepSeekV3, out: Path) -> dict:
        now = replace(config, out=str(out), resume=out == resumed)
        with contextlib.redirect_stderr(io.StringIO()):
            train.train(network, data, now, machine)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        losses = {f"val_loss {x['step']}": x["val_loss"] for x in lines if "val_loss" in x}
        saved = load_checkpoint(out / "ckpt.pt").items()
        return {key: x for key, x in saved if isinstance(x, dict)} | {"log": losses}

    def opened(stored: dict) -> DeepSeekV3:  # as load_model opens a checkpoint
        network = copy.deepcopy(model)
        vars(network.config).update(stored["model_config"])
        network.trained_length = stored["trained_length"]
        network.load_state_dict(stored["model"])
        return network

    one = trained(copy.deepcopy(model), whole)
    other = trained(opened(load_checkpoint(resumed)), resumed)
    best = load_checkpoint(whole / "best.pt")
    with torch.no_grad():
        total = train.add_up(opened(best), tokens[0], config.block_size, config, machine)
    logged = one["log"][f"val_loss {best['step']}"]
    losses = {"in the log": logged, "in the file": best["val_loss"]}
    return one, other, losses | {"evaluated again": total["losses"][0]}


def flat(checkpoint: dict) -> dict[str, Tensor]:
    """The tensors and numbers in the states of a checkpoint, by the keys that lead to each."""
    states = {key: x for key, x in checkpoint.items() if isinstance(x, dict) and "_conf" not in key}
    leaves, _ = tree_flatten_with_path(states)
    return {keystr(path): x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
            for path, x in leaves if isinstance(x, Tensor | int | float)}  # fmt: skip


def low_precision(tensors: dict[str, Tensor]) -> list[str]:
    """A sentence if there are floating-point numbers of less than 32 bits."""
    if not (low := [k for k, x in tensors.items() if x.is_floating_point() and x.itemsize < 4]):
        return []
    dtype = tensors[low[0]].dtype
    lost = f"updates of less than about 1/{2 / torch.finfo(dtype).eps:.0f} of a number are lost"
    return [f"{and_more(low)} in ckpt.pt: {str(dtype)[6:]}, in which {lost}"]


# ---- The command ---------------------------------------------------------------------------------


def in_a_run(check: Callable, model: DeepSeekV3, config: TrainConfig) -> Answer:
    """Calls check(network, step) with the network as `at_step` of train.py sets it for the first
    step of a run, and for the middle. Returns the first answer, unless the second finds more."""
    found = []
    for step in (0, config.steps // 2):
        network = copy.deepcopy(model)
        train.at_step(network, config, step)
        found.append(check(network, step))
    found[1].summary += f" (in step {step} of {config.steps})"
    return max(found, key=lambda answer: (len(answer.wrong), len(answer.notes)))


def answered(name: str, check: Callable[[], Answer]) -> Answer:
    """The check's answer. An error of the edited code is an answer, too, with its trace."""
    try:
        return check()
    except Exception:
        return Answer(f"{name}: ends with an error", traceback.format_exc().splitlines())


def answers(model, config, length=None, compiled=False, run=None, steps=4, tokenizer=None):
    """Yields the answers of all checks of a network, with the settings `config` of train.py. run:
    its folder, whose ckpt.pt is looked into; tokenizer: the run's, for edits that read it."""
    yield (exact := answered("decoding", lambda: decoding(model, length)))
    checks = {
        "bfloat16": lambda: bfloat16(model),
        "causality": lambda: in_a_run(lambda x, _: causality(x), model, config),
        "gradients": lambda: in_a_run(
            lambda x, at: gradients(x, config, compiled and not at, at), model, config
        ),
        "losses": lambda: in_a_run(lambda x, _: losses(x), model, config),
        "drafts": lambda: drafts(model),
        "step": lambda: step(model, config, run, steps, tokenizer),
    }
    for name, check in checks.items():
        if name != "bfloat16" or not exact.wrong:  # else it shows nothing new
            yield answered(name, check)


@dataclass
class CheckConfig:
    length: int | None = None  # tokens of a text to decode; none: 256, or twice the longest window
    steps: int = 4  # of the two runs that `step` compares; more if something happens every N steps
    compile: bool = False  # compare compiled gradients on a CPU, too, which takes minutes
    device: str = "auto"  # auto, cpu or cuda


def main(argv: list[str]):
    """Checks the network of model.py with the weights and settings of a RUN, by default out/small,
    or of a Hugging Face directory with default settings. Exit code 1 if something is wrong."""
    about = "After an edit of model.py, check the network of a run: python check.py [RUN]"
    path, values = settings.parse_args(about, argv, CheckConfig, positional="run")
    config = CheckConfig(**values)
    check_ranges(config, at_least_one={"length"})
    if config.steps < 2 or config.steps % 2:
        raise Refusal(f"steps is {config.steps}, but has two halves: give an even number, from 2.")
    run, device = Path(path or "out/small"), processes.usable_device(config.device)
    model, tokenizer = load_model(run, device)
    training = TrainConfig()
    if not (run / "config.json").exists():
        stored = load_checkpoint(run, whole=False)["train_config"]
        training = replace(training, **{k: x for k, x in stored.items() if hasattr(training, k)})
    compiled = config.compile or (device.type == "cuda" and processes.compiles(training, device))
    right = True
    for answer in answers(model, training, config.length, compiled, run, config.steps, tokenizer):
        print(answer, flush=True)
        right = right and not answer.wrong
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
