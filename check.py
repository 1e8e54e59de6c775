"""Does a network compute what its author meant? python bench.py check RUN, after every edit.

An edit may train without an error and be wrong: it decodes another network than the one that was
trained, it loses a part of its gradient, its loss is not the one that is compared. Each check here
computes the same thing in two ways and compares:

    decoding     a text that is read in pieces, behind a cache, and the same text read whole
    bfloat16     the same in low precision, beside what rounding does to the whole text
    causality    a text, and the same text with other tokens at its end
    gradients    of a training step: plain, recomputed, in two micro-batches, compiled
    losses       as evaluations report them, and as the cross-entropies of logits
    drafts       a text that is written with drafts, and one that is written without

All but the second compute in float64, on a copy of the network. There rounding leaves 12 digits or
more, and a mistake few. All weights of the copy are shaken a little, so that what was initialised
as 0 counts, too. FP8 rounds more than that, so call these functions without use_fp8.

docs/HACKING.md has a table of what is found, and what to look for then.
"""

import copy
import itertools
import math
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
from support import graphs, processes
from support.checkpoints import load_checkpoint

SAME = 1e-8  # a difference that is smaller, relative to what is compared, is rounding


@dataclass
class Answer:
    """What one check found. `print` shows it."""

    what: str  # was compared, with numbers
    wrong: list[str] = field(default_factory=list)  # a sentence for each difference

    def __str__(self) -> str:
        return "\n      ".join((f"{'WRONG' if self.wrong else 'right'} {self.what}", *self.wrong))


@torch.no_grad()
def shaken(model: DeepSeekV3) -> DeepSeekV3:
    """A copy in float64 in which no weight is exactly what it was."""
    model = copy.deepcopy(getattr(model, "_orig_mod", model))
    model.to(sample.drawing_device(model.embed_tokens.weight.device), torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        shake = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.add_(shake.to(p.device), alpha=model.config.initializer_range)
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


# ---- Decoding ------------------------------------------------------------------------------------

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
    model, window = shaken(model), longest_window(model)
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
    """The places, (B, places, ...), of the longest ring or state that a layer keeps; 0 if all that
    layers keep grows with the text."""
    like, most = model.embed_tokens.weight.to("meta"), model.config.max_position_embeddings
    layers = *model.layers, *model.mtp
    kept, of_twice = (
        [x.shape for x in graphs.tensors([layer.new_cache(1, tokens, like) for layer in layers])]
        for tokens in (most, 2 * most)
    )
    return max((x[1] for x, y in zip(kept, of_twice, strict=True) if x == y), default=0)


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
    return Answer("causality: no logit may depend on a later token, nor in training", wrong)


def logits_of(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    """By depth, (B, T - k, V), with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        logits, mtp_logits = model(tokens, return_mtp=True)
    return [logits, *mtp_logits]


# ---- Training ------------------------------------------------------------------------------------


def gradients(model: DeepSeekV3, config: train.TrainConfig, compiled: bool = False) -> Answer:
    """Those of the first step of a run with these settings. A block that is computed again must
    get what it got before; and a loss is a mean over the step's targets, in one micro-batch or in
    two."""
    ways = {"recomputed": dict(recompute=True), "in two micro-batches": dict(grad_accum=2)}
    ways |= {"compiled": dict(compile=True)} if compiled else {}
    model, rng, largest = shaken(model), np.random.default_rng(4), 0.0
    windows = rng.integers(model.config.vocab_size, size=(4, min(config.block_size, 128) + 1))
    plain = step_gradients(model, config, windows)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} gets no gradient" for name in sorted(learns - plain.keys())]
    least = SAME * math.sqrt(sum(g.square().sum().item() for g in plain.values()))
    for way, settings in ways.items():
        try:
            found = step_gradients(model, config, windows, **settings)
        except CheckpointError:  # the second time sizes differ, such as the rows of an expert
            wrong.append(f"{way}: a block does not compute what it has computed before")
            continue
        off = {name: (found[name] - g).norm().item() / max(g.norm().item(), least)
               for name, g in plain.items() if name in found}  # fmt: skip
        off |= dict.fromkeys(plain.keys() ^ found.keys(), math.inf)
        different = sorted((name for name, x in off.items() if not x <= 100 * SAME), key=off.get)
        largest = max(largest, *off.values())
        if different:
            worst = f"that of {different[-1]} by {off[different[-1]]:.2g} of its norm"
            wrong.append(f"{way}: {len(different)} of {len(plain)} differ, {worst}")
    text = f"{', '.join(ways)}: they differ by up to {largest:.1g} of their norm"
    return Answer(f"gradients of {len(plain)} parameters, {text}", wrong)


def step_gradients(
    model: DeepSeekV3, config: train.TrainConfig, windows: np.ndarray, **settings
) -> dict[str, Tensor]:
    """By parameter, as `backward` of train.py leaves them; without those that get none."""
    usual = dict(recompute=False, grad_accum=1, compile=False, fp8=False)
    model, config = copy.deepcopy(model).train(), replace(config, **usual | settings)
    machine = processes.Machine(model.embed_tokens.weight.device, torch.float64)
    trainer, parts = processes.wrap(model, config, machine), np.split(windows, config.grad_accum)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        train.backward(trainer, parts, train.loss_weights(model, config, step=0), machine)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def losses(model: DeepSeekV3) -> Answer:
    """What evaluations report, and choose best.pt by, beside the cross-entropies of the logits."""
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
    return Answer(f"losses: the logits' cross-entropy is {main:.6g}, and so is `loss`", wrong)


# ---- Text ----------------------------------------------------------------------------------------


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
    yield decoding(model, length)
    yield bfloat16(model)
    yield causality(model)
    yield gradients(model, config, compiled)
    yield losses(model)
    yield drafts(model)


# ---- The command ---------------------------------------------------------------------------------


@dataclass
class CheckOptions:
    length: int | None = None  # tokens of the text; none: 256, or twice the longest window
    compile: bool = False  # gradients compiled on a CPU, too, which takes minutes
    device: str = "auto"  # auto, cpu or cuda


def settings_of(run: Path) -> train.TrainConfig:
    """Those that a run was trained with; of a Hugging Face directory the defaults."""
    if (run / "config.json").exists():
        return train.TrainConfig()
    saved, known = load_checkpoint(run, whole=False)["train_config"], train.TrainConfig
    return known(**{k: x for k, x in saved.items() if k in known.__dataclass_fields__})


def check(options: CheckOptions, files: list[str]) -> bool:
    """Checks the network of model.py with the weights and settings of out/small, or of the RUN or
    Hugging Face directory named. Exit code 1 where something is wrong."""
    run, device = Path(files[0] if files else "out/small"), processes.usable_device(options.device)
    model, _ = load_model(run, device)
    config = settings_of(run)
    compiled = processes.compiles(replace(config, compile=options.compile or "auto"), device)
    right = True
    for answer in answers(model, config, options.length, compiled):
        print(answer, flush=True)
        right = right and not answer.wrong
    return right
