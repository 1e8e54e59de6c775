"""After an edit of model.py: does the network compute what was meant? python check.py RUN

An edit may train without an error and be wrong: it decodes a different network from the one it
trained, it loses a part of its gradient, its loss is not the one that is compared. Each check
computes the same thing in two ways and compares:

    decoding     a text that is read in pieces, behind a cache, and the same text read whole
    bfloat16     the same in low precision, beside what rounding does to the whole text
    causality    a text, and the same text with other tokens at its end
    positions    a text at positions 0, 1, ..., and the same text further on
    gradients    of a training step: plain, recomputed, in two micro-batches, compiled
    losses       as evaluations report them, and as the cross-entropies of logits
    loads        every gate's choices are counted
    drafts       a text that is written with drafts, and one that is written without

All but the second compute in float64, on a copy of the network. There rounding leaves 12 digits or
more, and a mistake few. All weights of the copy are moved at random, so that what was initialised
as 0, or so small that it hardly counts, counts too. FP8 rounds more than that: call these functions
without use_fp8. docs/HACKING.md has a table of what each check finds, and of what to look for then.

Shapes: B texts, T tokens of a text, k depth (0: the main model, k: MTP module k), V vocabulary.
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

import sample
import train
from huggingface import load_model
from model import MOST_NEW, Cache, DeepSeekV3
from support import graphs, processes, settings
from support.settings import run_command

SAME = 1e-8  # a difference that is smaller, relative to what is compared, is rounding


@dataclass
class Answer:
    """What one check found. `print` shows it."""

    what: str  # was compared, with numbers
    wrong: list[str] = field(default_factory=list)  # a sentence for each difference
    note: bool = False  # a fact, which is neither right nor wrong

    def __str__(self) -> str:
        verdict = "WRONG" if self.wrong else "note " if self.note else "right"
        return "\n      ".join((f"{verdict} {self.what}", *self.wrong))


@torch.no_grad()
def shaken(model: DeepSeekV3) -> DeepSeekV3:
    """A copy in float64 with all weights moved at random, matrices by so much that attention's
    scores and the gates' differ by about 1: at an initial 0.006 a wrong score hardly shows."""
    model = copy.deepcopy(getattr(model, "_orig_mod", model))
    model.to(sample.drawing_device(model.embed_tokens.weight.device), torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        shake = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        size = p.shape[-1] ** -0.5 if p.ndim > 1 else model.config.initializer_range
        p.add_(shake.to(p.device), alpha=size)
    return model


def random_tokens(model: DeepSeekV3, texts: int, length: int) -> Tensor:
    """Texts at random, (texts, length) at most. Special tokens are an end of the vocabulary and
    would be rare; here every eighth token is one."""
    shape = texts, min(length, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    special = torch.randint(2, shape, generator=generator) * (model.config.vocab_size - 1)
    rare = torch.randint(8, shape, generator=generator) == 0
    return torch.where(rare, special, tokens).to(model.embed_tokens.weight.device)


def reader(k: int) -> str:
    return f"MTP module {k}" if k else "main model"


SEVERAL = "several tokens at a time"
WAYS = {  # the pieces in which a text is read: tokens in each, how many of them are forgotten again
    "one token at a time": [(1, 0)],
    SEVERAL: [(n, 0) for n in range(2, MOST_NEW + 1)],
    "drafts rejected": [(MOST_NEW, n) for n in (0, *range(MOST_NEW, 0, -1))],
}


@torch.inference_mode()
def decoding(model: DeepSeekV3, length: int | None = None) -> Answer:
    """Reads a random text in pieces, as decoding does, and compares the logits with whole forwards.

    A piece is one token, or several, or drafts of which some are rejected: a smaller `cache.length`
    forgets them. Pieces begin the text, or follow a prompt. Positions are numbers, or tensors as in
    a graph. The main model reads by itself, and so does every MTP module. The text has `length`
    tokens: by default 256, or twice the longest window if that is more.
    """
    model = shaken(model)
    window = longest_window(model)
    # Two texts, and two more from which the drafts come that are rejected.
    tokens = random_tokens(model, 4, length or max(256, 2 * window))
    whole, inputs = whole_texts(model, tokens)
    ways = [*itertools.product(WAYS, (0, tokens.shape[1] // 2), (False, True))]
    size, largest, wrong = whole[0].std().item(), 0.0, []
    for (k, logits), (way, prompt, as_tensor) in itertools.product(enumerate(whole), ways):
        found = read_in_pieces(model, k, inputs[k], tokens, way, prompt, as_tensor)
        off = (found - logits).abs().amax((0, 2)).nan_to_num(math.inf)  # by position
        largest = max(largest, off.max().item())
        first = (off > SAME * size).nonzero()[:1].tolist()
        if first:
            where = f" behind a prompt of {prompt}" if prompt else ""
            graph = ", positions as tensors" if as_tensor else ""
            says = f"wrong from position {first[0][0]} on, by up to {off.max():.2g}"
            wrong.append(f"{reader(k)}, {way}{where}{graph}: {says}")
    count = len(whole) * len(ways)
    text = f"a text of {tokens.shape[1]} tokens"
    if window > 1:
        text += f" (some layers keep {window} places)"
    right = f"decoding: {count - len(wrong)} of {count} ways to read {text} in pieces are right"
    return Answer(f"{right}; logits differ by {largest:.1g}, their spread is {size:.1g}", wrong)


def longest_window(model: DeepSeekV3) -> int:
    """The places, (B, places, ...), of the longest ring that a layer keeps, or the second dimension
    of a state, if that is longer; 0 without either. Neither grows with the text."""
    like, most = model.embed_tokens.weight, model.config.max_position_embeddings
    kept, of_twice = (
        graphs.tensors([x.new_cache(1, size, like.to("meta")) for x in (*model.layers, *model.mtp)])
        for size in (most, 2 * most)
    )
    pairs = zip(kept, of_twice, strict=True)
    return max((x.shape[1] for x, y in pairs if x.shape == y.shape and x.ndim > 1), default=0)


def whole_texts(model: DeepSeekV3, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """By depth: the logits of the first half of the texts (B, length - k, V), and what the main
    model, then every module takes of all texts: tokens, hidden states."""
    logits, mtp_logits = model(tokens[: len(tokens) // 2], return_mtp=True)
    inputs = [tokens, model.trunk(tokens)]
    for k in range(1, len(mtp_logits)):
        inputs.append(model.predict_next(k - 1, inputs[k][:, :-1], tokens[:, k:]))
    return [logits, *mtp_logits], inputs


def read_in_pieces(
    model: DeepSeekV3, k: int, inputs: Tensor, tokens: Tensor, way: str, prompt: int, tensor: bool
) -> Tensor:
    """Logits of the main model, k = 0, or of MTP module k, on a cache: (B, length - k, V).

    inputs: the tokens (2B, length), or the hidden states that the module takes (2B, .., D). The
    first B rows are the texts, from the others come drafts.
    """
    B, length, logits = len(tokens) // 2, tokens.shape[1] - k, []
    layers = model.mtp if k else model.layers
    cache = Cache(model.config, layers, B, length, model.embed_tokens.weight)
    for start, kept, read in pieces(way, prompt, length):
        takes, later = (
            torch.cat((x[:B, start : start + kept], x[B:, start + kept : start + read]), 1)
            for x in (inputs, tokens[:, k:])
        )
        cache.length = torch.tensor(start, device=tokens.device) if tensor and start else start
        h = model.predict_next(k - 1, takes, later, cache) if k else model.trunk(takes, cache)
        logits.append(model.logits(h, k)[:, :kept])
    return torch.cat(logits, 1)


def pieces(way: str, prompt: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The pieces of a text: where each starts, how many tokens are kept, how many are read."""
    most, start = max(forgotten for _, forgotten in WAYS[way]), 0
    for n, forgotten in itertools.chain([(prompt + most, most)], itertools.cycle(WAYS[way])):
        kept = min(n - forgotten, length - start)
        read = min(n, length - start)
        if read:
            yield start, kept, read
        start += kept
        if start == length:
            return


@torch.inference_mode()
def bfloat16(model: DeepSeekV3, length: int = 1024) -> Answer:
    """Rounding alone moves the distribution of the next token, by a small KL divergence. Behind a
    cache it should move it no further: what is kept in bfloat16 has three digits, which is too few
    for a sum that grows with the text. Weights as they are, and real sizes of everything."""
    exact, low = (copy.deepcopy(getattr(model, "_orig_mod", model)).eval() for _ in range(2))
    exact.to(sample.drawing_device(model.embed_tokens.weight.device), torch.float64)
    low.to(torch.bfloat16)
    tokens, says, wrong = random_tokens(low, 2, length), [], []
    right, _ = whole_texts(exact, tokens.to(exact.embed_tokens.weight.device))
    whole, inputs = whole_texts(low, tokens)
    for k, logits in enumerate(right):
        cached = read_in_pieces(low, k, inputs[k], tokens, SEVERAL, 0, False)
        of_whole, of_cached = (divergence(logits, x) for x in (whole[k], cached))
        says.append(f"{of_whole:.1e} and {of_cached:.1e} in the {reader(k)}")
        if not of_cached <= 3 * of_whole + 1e-9:
            wrong.append(f"{reader(k)}: {of_cached / of_whole:.0f} times as far behind the cache")
    what = f"bfloat16: KL from float64 of {tokens.shape[1]} tokens, read whole and in pieces"
    return Answer(f"{what}: {', '.join(says)}", wrong)


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of logits (B, T, V) in nats, the median of the tokens. (Rounding lets some choose
    another expert, and theirs is a hundred times as large.)"""
    p, q = (x.to(p.device).double().log_softmax(-1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).median().item()


@torch.inference_mode()
def causality(model: DeepSeekV3, length: int = 256) -> Answer:
    """Whether a logit depends on a later token, also in training mode, where experts may choose
    their tokens, say, and the loss would be that of a network that has read the answer."""
    model, wrong = shaken(model), []
    texts = random_tokens(model, 4, length)
    end = texts.shape[1] // 2 - 1  # no multiple of any usual length of blocks
    texts[2:, :end] = texts[:2, :end]
    for training in (False, True):
        model.train(training)
        one, other = (logits_of(model, x) for x in texts.split(2))
        for k, (x, y) in enumerate(zip(one, other, strict=True)):
            off = (x - y).abs().amax((0, 2)).nan_to_num(math.inf)[: end - k]  # by position
            first = (off > SAME * x.std()).nonzero()[:1].tolist()
            if first:
                mode = "in training" if training else "in evaluation"
                sees = f"position {k + first[0][0]} sees tokens from position {end} on"
                wrong.append(f"{reader(k)}, {mode}: {sees}; logits differ by up to {off.max():.2g}")
    model.eval()
    together, alone = (logits_of(model, x) for x in (texts[:2], texts[:1]))
    for k, (x, y) in enumerate(zip(together, alone, strict=True)):
        if not (off := (x[:1] - y).abs().max()) <= SAME * x.std():
            wrong.append(
                f"{reader(k)}: a text sees others of its batch; logits differ by {off:.2g}"
            )
    text = "causality: no logit may depend on a later token, nor in training, nor on another text"
    return Answer(text, wrong)


@torch.inference_mode()
def positions(model: DeepSeekV3, by: int = 7) -> Answer:
    """Whether logits change where `rope` is asked for positions further on. Scores of rotated
    queries and keys depend on distances alone. A network may depend on the positions themselves, if
    that is meant, so this is a note."""
    model = shaken(model)
    tokens, rope = random_tokens(model, 2, 64), model.rope
    one = logits_of(model, tokens)
    model.rope = lambda x, start, *more: rope(x, start + by, *more)
    other = logits_of(model, tokens)
    off = max(((x - y).abs().max() / x.std()).item() for x, y in zip(one, other, strict=True))
    says = f"positions: logits change by {off:.1g} of their spread if those of rope move by {by}"
    return Answer(f"{says}: they are {'' if off < SAME else 'not '}relative", note=not off < SAME)


def logits_of(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    """By depth, (B, T - k, V), with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        logits, mtp_logits = model(tokens, return_mtp=True)
    return [logits, *mtp_logits]


def gradients(model: DeepSeekV3, config: train.TrainConfig, compiled: bool = False) -> Answer:
    """Those of the first step of a run with these settings. A block that is computed again must
    get what it got before; and a loss is a mean over the step's targets, in one micro-batch or in
    two. (If a step draws random numbers, such as dropout's, micro-batches and graphs draw others.)
    """
    model, rng, largest = shaken(model), np.random.default_rng(4), 0.0
    windows = rng.integers(model.config.vocab_size, size=(4, min(config.block_size, 128) + 1))
    plain = step_gradients(model, config, windows)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    idle = [x for x in sorted(learns) if x not in plain or not plain[x].any()]
    wrong = [f"{name} gets no gradient" for name in idle]
    least = SAME * math.sqrt(sum(g.square().sum().item() for g in plain.values()))

    def differences(**settings) -> dict[str, float]:  # by parameter, in its gradient's norm
        found = step_gradients(model, config, windows, **settings)
        off = {name: (found[name] - g).norm().item() / max(g.norm().item(), least)
               for name, g in plain.items() if name in found}  # fmt: skip
        return off | dict.fromkeys(plain.keys() ^ found.keys(), math.inf)

    ways = {"recomputed": dict(recompute=True)}
    if max(differences(seed=4).values()) > 100 * SAME:
        compared = "recomputed alone, as the step draws random numbers"
    else:
        ways |= {"in two micro-batches": dict(grad_accum=2)}
        ways |= {"compiled": dict(compile=True)} if compiled else {}
        compared = ", ".join(ways)
    for way, changes in ways.items():
        try:
            off = differences(**changes)
        except CheckpointError:  # the second time sizes differ, such as the rows of an expert
            wrong.append(f"{way}: a block does not compute what it has computed before")
            continue
        different = sorted((name for name, x in off.items() if not x <= 100 * SAME), key=off.get)
        largest = max(largest, *off.values())
        if different:
            worst = f"that of {different[-1]} by {off[different[-1]]:.2g} of its norm"
            wrong.append(f"{way}: {len(different)} of {len(plain)} differ, {worst}")
    text = f"{compared}: they differ by up to {largest:.1g} of their norm"
    return Answer(f"gradients of {len(plain)} parameters, {text}", wrong)


def step_gradients(
    model: DeepSeekV3, config: train.TrainConfig, windows: np.ndarray, seed: int = 3, **settings
) -> dict[str, Tensor]:
    """By parameter, as `backward` of train.py leaves them; without those that get none."""
    usual = dict(recompute=False, grad_accum=1, compile=False, fp8=False)
    model, config = copy.deepcopy(model).train(), replace(config, **usual | settings)
    machine = processes.Machine(model.embed_tokens.weight.device, torch.float64)
    trainer, parts = processes.wrap(model, config, machine), np.split(windows, config.grad_accum)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        train.backward(trainer, parts, train.loss_weights(config, step=0), machine)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def losses(model: DeepSeekV3) -> Answer:
    """What evaluations report, and choose best.pt by, beside the cross-entropies of the logits, and
    beside `loss` in training mode, unless that draws random numbers. Then all losses in float32,
    with scores so large that their exponentials overflow."""
    model, wrong = shaken(model), []
    text = random_tokens(model, 4, 129)
    x, y = text[:, :-1], text[:, 1:]
    returned = model(x, y)
    main, *mtp = (
        F.cross_entropy(logits.flatten(0, 1), y[:, k:].flatten()).item()
        for k, logits in enumerate(logits_of(model, x))
    )
    for name, right in {"loss": main, "mtp_loss": sum(mtp) / max(1, len(mtp))}.items():
        if not math.isclose(found := returned[name].item(), right, rel_tol=SAME):
            wrong.append(f"{name} is {found:.6g}, but the logits' cross-entropy is {right:.6g}")
    model.train()
    with torch.random.fork_rng():
        one, other = ((torch.manual_seed(i), model(x, y)["loss"].item())[1] for i in (1, 2))
    loss = returned["loss"].item()
    if math.isclose(one, other, rel_tol=SAME) and not math.isclose(one, loss, rel_tol=SAME):
        wrong.append(f"in training mode loss is {one:.6g}, in evaluations {loss:.6g}")
    for p in model.parameters():
        p *= 1000 if p.ndim > 1 else 1
    for name, loss in model.float()(x, y).items():
        if not loss.isfinite():
            wrong.append(f"{name} is {loss.item()} where matrices are 1,000 times as large")
    return Answer(f"losses: the logits' cross-entropy is {main:.6g}", wrong)


@torch.no_grad()
def loads(model: DeepSeekV3) -> Answer:
    """Whether each gate's choices are counted. Its bias moves by its load alone."""
    model, text = shaken(model).train(), random_tokens(model, 4, 129)
    model(text[:, :-1], text[:, 1:])
    names = {module: name for name, module in model.named_modules()}
    wrong = [
        f"nothing that {names[gate]} chooses is counted: a block counts its first gate alone"
        for gate in model.gates()
        if not gate.load.any()
    ]
    return Answer(f"loads: each of {len(model.gates())} gates must count its own choices", wrong)


def drafts(model: DeepSeekV3, new: int = 32) -> Answer:
    """Greedy texts. Drafts are right or wrong: they must not change what is written."""
    model = shaken(model)
    prompt, wrong = random_tokens(model, 2, 8), []
    plain = sample.generate(model, prompt, new, temperature=0, speculative=0)
    for count in range(1, sample.MOST_DRAFTS + 1):
        text = sample.generate(model, prompt, new, temperature=0, speculative=count)
        off = (text != plain).any(0).nonzero()[:1, 0].tolist()
        if off:
            wrong.append(f"with {count} in a round the text is another from token {off[0]} on")
    written = f"{plain.shape[1] - prompt.shape[1]} tokens"
    return Answer(f"drafts: greedy texts of {written} must be the same with them", wrong)


def answers(
    model: DeepSeekV3, config: train.TrainConfig, length: int | None = None, compiled: bool = False
) -> Iterator[Answer]:
    """All of them, in the order of this file."""
    exact = decoding(model, length)
    yield exact
    skipped = Answer("bfloat16: not compared, as decoding is wrong in float64 already", note=True)
    yield skipped if exact.wrong else bfloat16(model)
    yield causality(model)
    yield positions(model)
    yield gradients(model, config, compiled)
    yield losses(model)
    yield loads(model)
    yield drafts(model)


# ---- The command ---------------------------------------------------------------------------------

ABOUT = "After an edit of model.py, check the network of a run: python check.py [RUN] [--key=value]"


@dataclass
class CheckConfig:
    length: int | None = None  # tokens of the text; none: 256, or twice the longest window
    compile: bool = False  # gradients compiled on a CPU, too, which takes minutes
    device: str = "auto"  # auto, cpu or cuda


def main(argv: list[str]):
    """Checks the network of model.py with the weights and settings of out/small, or of the RUN or
    Hugging Face directory (with the default settings). Exit code 1 where something is wrong."""
    path, values = settings.parse_args(ABOUT, argv, CheckConfig, positional="run")
    config = CheckConfig(**values)
    settings.check_ranges(config, at_least_one={"length"})
    run, device = Path(path or "out/small"), processes.usable_device(config.device)
    model, _ = load_model(run, device)
    source = "init_from" if (run / "config.json").exists() else "out"
    of_run, *_ = train.read_settings(["--eval_only", f"--{source}={run}"])
    training = train.TrainConfig(**train.split_configs(of_run)[1])
    compiled = config.compile or (device.type == "cuda" and processes.compiles(training, device))
    right = True
    for answer in answers(model, training, config.length, compiled):
        print(answer, flush=True)
        right = right and not answer.wrong
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
