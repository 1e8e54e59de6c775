"""After an edit: does the network compute what was meant? python check.py RUN

An edit may train without an error and be wrong: it decodes a different network from the one it
trained, it loses a part of its gradient, it cannot be resumed. Each check computes the same thing
in two ways and compares:

    decoding     a text that is read in pieces, behind a cache, and the same text read whole
    bfloat16     the same in low precision, beside what rounding does to the whole text
    causality    a text, and the same text with other tokens at its end
    gradients    of a training step: plain, recomputed, in two micro-batches, compiled
    losses       as evaluations report them, and as the cross-entropies of logits
    loads        every gate's choices are counted
    drafts       a text that is written with drafts, and one that is written without
    step         a training that is resumed, and one that was never interrupted

All but the second compute in float64, on a copy of the network. There rounding leaves 12 digits or
more, and a mistake few. All weights of the copy are moved at random, so that what was initialised
as 0, or so small that it hardly counts, counts too. FP8 rounds more than that: call these functions
without use_fp8 (tests/test_fp8.py judges fp8.py). PyTorch copies no tensor with a graph: if the
network keeps one, such as an activation of the last training step, load it anew. docs/HACKING.md
has a table of what each check finds, and of what to look for then.

What a network computes may depend on the step, by at_step of train.py. Causality, gradients and
losses are checked as in the first step and as in the middle of the run, all else as after loading.

Shapes: B texts, T tokens of a text, k depth (0: the main model, k: MTP module k), V vocabulary.
"""

import contextlib
import copy
import io
import itertools
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path
from torch.utils.checkpoint import CheckpointError

import sample
import train
from huggingface import load_model
from model import MAX_ROUND_TOKENS, Cache, DeepSeekV3
from support import graphs, processes, settings
from support.checkpoints import load_checkpoint
from support.settings import Refusal, run_command
from support.tokens import Tokens

SAME = 1e-8  # a difference that is smaller, relative to what is compared, is rounding


@dataclass
class Answer:
    """What one check found. `print` shows it."""

    what: str  # was compared, with numbers
    wrong: list[str] = field(default_factory=list)  # a sentence for each difference
    notes: list[str] = field(default_factory=list)  # facts, which may be intended

    def __str__(self) -> str:
        verdict = "WRONG" if self.wrong else "note " if self.notes else "right"
        return "\n      ".join((f"{verdict} {self.what}", *self.wrong, *self.notes))


@torch.no_grad()
def perturbed(model: DeepSeekV3) -> DeepSeekV3:
    """A copy in float64 with all weights moved at random, matrices by so much that attention's
    scores and the gates' differ by about 1: at an initial 0.006 a wrong score hardly shows."""
    model = copy.deepcopy(model)
    model.to(sample.drawing_device(model.embed_tokens.weight.device), torch.float64).eval()
    model.update_bias(0.0)  # forgets what was counted
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        shake = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        size = p.shape[-1] ** -0.5 if p.ndim > 1 else model.config.initializer_range
        p.add_(shake.to(p.device), alpha=size)
    return model


def random_tokens(model: DeepSeekV3, texts: int, length: int) -> Tensor:
    """Texts at random, (texts, length) at most. Special tokens, at an end of the vocabulary,
    would be rare; here about every eighth token is the first or the last id."""
    shape = texts, min(length, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    special = torch.randint(2, shape, generator=generator) * (model.config.vocab_size - 1)
    rare = torch.randint(8, shape, generator=generator) == 0
    return torch.where(rare, special, tokens).to(model.embed_tokens.weight.device)


def reader(k: int) -> str:
    return f"MTP module {k}" if k else "main model"


def where_they_differ(found: Tensor, right: Tensor) -> tuple[list[int], float]:
    """Logits (B, T, V): the first position where they differ, if any; and by how much they do."""
    off = (found - right).abs().amax((0, 2)).nan_to_num(math.inf)  # by position
    return (~(off <= SAME * right.std())).nonzero()[:1, 0].tolist(), off.max().item()


SEVERAL = "several tokens at a time"
WAYS = {  # the pieces in which a text is read: tokens in each, how many of them are forgotten again
    "one token at a time": [(1, 0)],
    SEVERAL: [(n, 0) for n in range(2, MAX_ROUND_TOKENS + 1)],
    "drafts rejected": [(MAX_ROUND_TOKENS, n) for n in (0, *range(MAX_ROUND_TOKENS, 0, -1))],
}


@torch.inference_mode()
def decoding(model: DeepSeekV3, length: int | None = None) -> Answer:
    """Reads a random text in pieces, as decoding does, and compares the logits with whole forwards.

    A piece is one token, or several, or drafts of which some are rejected: a smaller `cache.length`
    forgets them. Pieces begin the text, or follow a prompt. Positions are numbers, or tensors as in
    a graph. The main model reads by itself, and so does every MTP module. The text has `length`
    tokens: by default 256, or twice the longest window if that is more.
    """
    model = perturbed(model)
    window = longest_window(model)
    # Two texts, and two more from which the drafts come that are rejected.
    tokens = random_tokens(model, 4, length or max(256, 2 * window))
    whole, inputs = whole_texts(model, tokens)
    ways = [*itertools.product(WAYS, (0, tokens.shape[1] // 2), (False, True))]
    size, largest, wrong = whole[0].std().item(), 0.0, []
    for (k, logits), (way, prompt, as_tensor) in itertools.product(enumerate(whole), ways):
        found = read_in_pieces(model, k, inputs[k], tokens, way, prompt, as_tensor)
        first, off = where_they_differ(found, logits)
        largest = max(largest, off)
        if first:
            where = f" behind a prompt of {prompt}" if prompt else ""
            graph = ", positions as tensors" if as_tensor else ""
            says = f"wrong from position {first[0]} on, by up to {off:.2g}"
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
    logits, inputs = logits_of(model, tokens[: len(tokens) // 2]), [tokens, model.trunk(tokens)]
    for k in range(1, len(logits) - 1):
        inputs.append(model.predict_next(k - 1, inputs[k][:, :-1], tokens[:, k:]))
    return logits, inputs


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
    exact, low = (copy.deepcopy(model).eval() for _ in range(2))
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
    model, wrong = perturbed(model), []
    texts = random_tokens(model, 4, length)
    end = texts.shape[1] // 2 - 1  # no multiple of any usual length of blocks
    texts[2:, :end] = texts[:2, :end]
    for training in (False, True):
        model.train(training)
        one, other = (logits_of(model, x) for x in texts.split(2))
        for k, (x, y) in enumerate(zip(one, other, strict=True)):
            first, off = where_they_differ(y[:, : end - k], x[:, : end - k])
            if first:
                mode = "in training" if training else "in evaluation"
                sees = f"position {k + first[0]} sees tokens from position {end} on"
                wrong.append(f"{reader(k)}, {mode}: {sees}; logits differ by up to {off:.2g}")
    model.eval()
    together, *alone = (logits_of(model, x) for x in (texts, *texts.split(1)))
    for k, (x, *y) in enumerate(zip(together, *alone, strict=True)):
        first, off = where_they_differ(torch.cat(y), x)
        if first:
            says = f"a text sees others of its batch; logits differ by {off:.2g}"
            wrong.append(f"{reader(k)}: {says}")
    text = "causality: no logit may depend on a later token, nor in training, nor on another text"
    return Answer(text, wrong)


def logits_of(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    """By depth, (B, T - k, V), with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        logits, mtp_logits = model(tokens, return_mtp=True)
    return [logits, *mtp_logits]


@torch.no_grad()
def draws(model: DeepSeekV3, text: Tensor) -> bool:
    """Whether a step takes random numbers, whatever it does with them."""
    states = torch.get_rng_state, *([torch.cuda.get_rng_state] if text.is_cuda else [])
    with torch.random.fork_rng():
        before = [state() for state in states]
        copy.deepcopy(model).train()(text[:, :-1], text[:, 1:])
        return not all(torch.equal(x, state()) for x, state in zip(before, states, strict=True))


def gradients(
    model: DeepSeekV3, config: train.TrainConfig, compiled: bool = False, step: int = 0
) -> Answer:
    """Those of a step of a run with these settings. A block that is computed again must get what it
    got before; and a loss is a mean over the step's targets, in one micro-batch or in two. (If a
    step draws random numbers, such as dropout's, micro-batches and graphs draw others.)"""
    model, largest, notes = perturbed(model), 0.0, []
    text = random_tokens(model, 4, min(config.block_size, 128) + 1)
    random = draws(model, text)

    def found(later: int = 0, **options) -> dict[str, Tensor]:
        return step_gradients(model, config, text, step + later, **options)

    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    plain, used, by_text = found(), set(), set()
    for later in range(32):  # a layer that is skipped in this step learns in another
        used |= {name for name, g in (found(later) if later else plain).items() if g.any()}
        by_text |= {name for name, g in found(later, of=TEXT).items() if g.any()}
        if learns <= used:
            break
    wrong = [f"{name} gets no gradient" for name in sorted(learns - used)]
    if aside := sorted(learns & used - by_text):
        others = ", ".join(sorted(train.loss_weights(config, step).keys() - TEXT))
        notes.append(f"{others} alone trains {aside[0]}, one of {len(aside)} such parameters")
    least = SAME * math.sqrt(sum(g.square().sum().item() for g in plain.values()))
    ways = {"recomputed": dict(recompute=True)}
    if not random:
        ways |= {"in two micro-batches": dict(grad_accum=2)}
        ways |= {"compiled": dict(compile=True)} if compiled else {}
    for way, changes in ways.items():
        try:
            off = differences(plain, found(**changes), least)
        except CheckpointError:  # the second time sizes differ, such as the rows of an expert
            wrong.append(f"{way}: a block does not compute what it has computed before")
            continue
        different = sorted((name for name, x in off.items() if not x <= 100 * SAME), key=off.get)
        largest = max(largest, *off.values())
        if different:
            worst = f"that of {different[-1]} by {off[different[-1]]:.2g} of its norm"
            wrong.append(f"{way}: {len(different)} of {len(plain)} differ, {worst}")
    compared = "recomputed alone, as the step draws random numbers" if random else ", ".join(ways)
    says = f"gradients of {len(plain)} parameters, {compared}: they differ by up to {largest:.1g}"
    return Answer(f"{says} of their norm", wrong, notes)


def differences(
    right: dict[str, Tensor], found: dict[str, Tensor], least: float = 1e-300
) -> dict[str, float]:
    """By name, of the norm of what is right; infinite for what one of the two lacks."""
    off = {name: (found[name] - x).norm().item() / max(x.norm().item(), least)
           for name, x in right.items() if name in found}  # fmt: skip
    return off | dict.fromkeys(right.keys() ^ found.keys(), math.inf)


TEXT = {"loss", "mtp_loss"}  # cross-entropies of the text


def step_gradients(
    model: DeepSeekV3, config: train.TrainConfig, text: Tensor, step: int, of=None, **settings
) -> dict[str, Tensor]:
    """By parameter, as `backward` of train.py leaves them; without those that get none. of: the
    names of the losses whose gradients these are (None: all)."""
    usual = dict(recompute=False, grad_accum=1, compile=False, fp8=False)
    model, config = copy.deepcopy(model).train(), replace(config, **usual | settings)
    train.at_step(model, config, step)
    weight_of = train.loss_weights(config, step)
    weight_of = {name: w * (of is None or name in of) for name, w in weight_of.items()}
    machine = processes.Machine(text.device, torch.float64, compiled=config.compile)
    trainer, parts = processes.wrap(model, config, machine), text.cpu().numpy()
    with torch.random.fork_rng():
        torch.manual_seed(step)
        train.backward(trainer, np.split(parts, config.grad_accum), weight_of, machine)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def losses(model: DeepSeekV3) -> Answer:
    """What evaluations report, and choose best.pt by, beside the cross-entropies of the logits."""
    model, wrong = perturbed(model), []
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
    return Answer(f"losses: the logits' cross-entropy is {main:.6g}", wrong)


@torch.no_grad()
def loads(model: DeepSeekV3) -> Answer:
    """Whether each gate's choices are counted. Its bias moves by its load alone."""
    model, text = perturbed(model).train(), random_tokens(model, 4, 129)
    with torch.random.fork_rng():
        for seed in range(32):  # a layer that is skipped in this call counts in another
            torch.manual_seed(seed)
            model(text[:, :-1], text[:, 1:])
            if all(gate.load.any() for gate in model.gates()):
                break
    names = {module: name for name, module in model.named_modules()}
    wrong = [
        f"nothing that {names[gate]} chooses is counted: a block counts its first gate alone"
        for gate in model.gates()
        if not gate.load.any()
    ]
    return Answer(f"loads: each of {len(model.gates())} gates must count its own choices", wrong)


def drafts(model: DeepSeekV3, new: int = 32) -> Answer:
    """Greedy texts. Drafts are right or wrong: they must not change what is written."""
    model = perturbed(model)
    prompt, wrong = random_tokens(model, 2, 8), []
    plain = sample.generate(model, prompt, new, temperature=0, speculative=0)
    for count in range(1, sample.MAX_DRAFTS + 1):
        text = sample.generate(model, prompt, new, temperature=0, speculative=count)
        off = (text != plain).any(0).nonzero()[:1, 0].tolist()
        if off:
            wrong.append(f"with {count} in a round the text is another from token {off[0]} on")
    written = f"{plain.shape[1] - prompt.shape[1]} tokens"
    return Answer(f"drafts: greedy texts of {written} must be the same with them", wrong)


# ---- A run of four steps -------------------------------------------------------------------------


class Copied(Tokens):
    """Tokens to train on, and a copy of the run's first checkpoint, from before the next step."""

    def __init__(self, tokens: np.ndarray, run: Path, copy: Path):
        super().__init__([tokens])
        self.run, self.copy = run, copy

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        if (self.run / "ckpt.pt").exists() and not self.copy.exists():
            self.copy.mkdir()
            shutil.copy(self.run / "ckpt.pt", self.copy)
        return super().windows(starts, length)


def step(model: DeepSeekV3, config: train.TrainConfig) -> Answer:
    """What train() of train.py saves after four steps, with the run's optimisers and states, and
    what it saves if the last two are made again from the checkpoint before them, with other
    objects."""
    what, initial = (
        "step: four at once, and the last two resumed from a checkpoint",
        perturbed(model),
    )
    try:
        whole, resumed = saved_after_four(initial, config)
    except Refusal as error:
        return Answer(what, [str(error)])
    learns = {name for name, p in initial.named_parameters() if p.requires_grad}
    taken = {name for state in whole.values() for name in state.get("names", ())}  # by optimisers
    wrong = resume_differences(whole, resumed)
    wrong += [f"{name} is in no optimiser" for name in sorted(learns - taken)]
    return Answer(what, wrong)


def resume_differences(whole: dict, resumed: dict) -> list[str]:
    """A sentence for each state that differs: its entry that differs most."""
    worst = {}  # by state: how much an entry differs, and its name
    for name, x in differences(flat(whole), flat(resumed)).items():
        if not x <= SAME:
            state = name.split(":")[0]
            worst[state] = max(worst.get(state, (x, name)), (x, name))
    return [f"resumed, {name} differs by {x:.2g} of its norm" for x, name in worst.values()]


def saved_after_four(model: DeepSeekV3, config: train.TrainConfig) -> tuple[dict, dict]:
    """The states that a run has saved after four steps, and those of one that was resumed."""
    tokens = random_tokens(model, 2, 257).cpu().numpy()
    machine = processes.Machine(model.embed_tokens.weight.device, torch.float64)
    short = dict(steps=4, batch_size=2, batch_start=0, block_size=min(64, config.block_size))
    short |= dict(long_block_size=0, log_every=4, eval_every=4, eval_batch=2, save_every=2)
    plain = dict(dtype="float64", fp8=False, compile=False, recompute=False, parallel="ddp")
    plain |= dict(grad_accum=1, overwrite=False, init_from="", eval_only=False)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
        data = SimpleNamespace(  # a Dataset
            train=Copied(tokens.flatten(), whole, resumed),
            val=Tokens([tokens[0]]),
            vocab_size=model.config.vocab_size,
            val_bytes_per_token=1.0,
        )

        def saved(out: Path, network: DeepSeekV3) -> dict:
            now = replace(config, out=str(out), resume=out == resumed, **short | plain)
            with contextlib.redirect_stderr(io.StringIO()):
                train.train(network, data, now, machine)
            stored = load_checkpoint(out / "ckpt.pt")
            return {key: x for key, x in stored.items() if isinstance(x, dict)}

        first = saved(whole, copy.deepcopy(model))
        other, stored = copy.deepcopy(model), load_checkpoint(resumed)  # as load_model does
        vars(other.config).update(stored["model_config"])
        other.trained_length = stored["trained_length"]
        return first, saved(resumed, other)


def flat(saved: dict) -> dict[str, Tensor]:
    """The tensors and numbers in a checkpoint, settings aside, by the keys that lead to each."""
    found, _ = tree_flatten_with_path({k: x for k, x in saved.items() if "_config" not in k})
    return {": ".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path):
            torch.as_tensor(x, dtype=torch.float64)
            for path, x in found if isinstance(x, Tensor | int | float)}  # fmt: skip


def in_a_run(
    check: Callable[[DeepSeekV3, int], Answer], model: DeepSeekV3, config: train.TrainConfig
) -> Answer:
    """check(network, step) as in the first step of a run; if nothing is wrong, also as in the
    middle, whose answer is returned if it finds more."""

    def at(now: int) -> Answer:
        network = copy.deepcopy(model)
        train.at_step(network, config, now)
        return check(network, now)

    if (first := at(0)).wrong:
        return first
    later = at(config.steps // 2)
    later.what += f" (in step {config.steps // 2} of {config.steps})"
    return later if later.wrong or len(later.notes) > len(first.notes) else first


def answers(
    model: DeepSeekV3, config: train.TrainConfig, length: int | None = None, compiled: bool = False
) -> Iterator[Answer]:
    """All of them, in the order of this file."""
    exact = decoding(model, length)
    yield exact
    skipped = Answer("bfloat16: not compared", notes=["decoding is wrong in float64 already"])
    yield skipped if exact.wrong else bfloat16(model)
    yield in_a_run(lambda at, now: causality(at), model, config)
    yield in_a_run(lambda at, now: gradients(at, config, compiled and not now, now), model, config)
    yield in_a_run(lambda at, now: losses(at), model, config)
    yield loads(model)
    yield drafts(model)
    yield step(model, config)


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
