"""Write text with a trained model: python sample.py --ckpt=out/small --prompt="def ".

Decoding is speculative where the model has an MTP module: the module drafts a few tokens, one
forward of the model checks them all, and what is kept follows exactly the distribution of plain
sampling (Leviathan et al., arXiv 2211.17192). Text goes to stdout, everything else to stderr.

    --score=FILE measures a text instead of writing one

Shapes: B rows (sequences decoded together), T prompt length, G drafts in a round, V vocabulary,
W slots that an MTP module catches up with, D hidden, S cached positions.
"""

import codecs
import math
import os
import select
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import info, parse_args, run_command
from huggingface import Tokenizer, load_model
from model import Cache, DeepSeekV3, ModelConfig

MOST_DRAFTS = 4
CHUNK = 512  # prompt tokens that go through the model at once, at most
RECENT = 256  # hidden states kept for the MTP modules, which may lag behind by that many tokens


@dataclass
class SampleConfig:
    ckpt: str = ""  # a run's folder (best.pt, else ckpt.pt), a file, or a Hugging Face directory
    prompt: str = ""  # the text to go on from; - reads standard input; nothing: a new document
    prompt_file: str = ""  # a file with the prompt
    num_samples: int = 1  # texts from the same prompt, decoded together
    max_new_tokens: int = 256
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = 200  # sample among the k likeliest tokens; none: among all
    top_p: float | None = None  # among the fewest tokens that have this much probability
    seed: int = 1337  # with a fixed --draft it fixes the text; auto follows the clock
    draft: str = "auto"  # tokens drafted by the MTP module in a round: 0 to 4, or what is fastest
    compile: bool = False  # compile decoding: several times faster, after minutes the first time
    show: str = ""  # drafts: colour accepted drafts; experts: colour by the last layer's top expert
    interactive: bool = False  # ask for one prompt after another
    score: str = ""  # a text file: print its nats per token and bits per byte
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # float32, bfloat16, float64; auto is bfloat16 on GPUs that have it


# ---- Sampling ------------------------------------------------------------------------------------


def probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Temperature, then top-k, then top-p: logits (..., V) -> probabilities (..., V)."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = p.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(before >= top_p, 0))
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token from each of the distributions p (B, V): (B, 1)."""
    return torch.multinomial(p, 1, generator=generator)


def accept(
    p: Tensor, q: Tensor, drafts: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Speculative sampling: how many drafts stay (B,), and the token after them (B, 1).

    Draft x, drawn from q, stays with probability min(1, p(x) / q(x)). The first that does not is
    replaced by a draw from norm(max(0, p - q)); if all stay, one more token is drawn from p. Then
    every token is distributed as p, whatever q is. p (B, G+1, V), q (B, G, V), drafts (B, G).
    """
    p_x = p[:, :-1].gather(2, drafts[..., None]).squeeze(2)  # (B, G)
    q_x = q.gather(2, drafts[..., None]).squeeze(2)  # (B, G)
    u = torch.rand(p_x.shape, dtype=p.dtype, device=p.device, generator=generator)
    kept = (u * q_x < p_x).long().cumprod(1).sum(1)  # (B,)
    rows = torch.arange(len(p), device=p.device)
    q = F.pad(q, (0, 0, 0, 1))  # no draft, no q: after the last one all of p is left
    rest = (p[rows, kept] - q[rows, kept]).clamp(min=0)  # (B, V)
    # Where p and q differ by rounding only, nothing may be left of p - q.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p[rows, kept])
    return kept, draw(rest, generator)


@dataclass
class Stats:
    """What happened during `generate`, all rows together."""

    prefill_seconds: float = 0.0
    seconds: float = 0.0  # without the prompt
    rounds: int = 0  # forwards of the main model after the prompt
    tokens: int = 0  # new tokens
    row_rounds: int = 0  # rounds x rows that were not finished
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)  # by position
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    lengths: list[int] = field(default_factory=lambda: [0] * (MOST_DRAFTS + 1))  # rounds of each
    cache_bytes: int = 0
    cache_slots: int = 0  # rows x positions
    note: str = ""  # why it ended early or sampled plainly


class DraftLength:
    """speculative="auto": draft as many tokens as has been fastest so far.

    A round with g drafts takes seconds[g], the median of recent ones, and gives 1 + sum_{j<=g}
    hits[j] / tries[j] tokens, the shares of j-th drafts that stayed. Lengths are tried from 0 up
    while one more pays; then the best is used, and its neighbours are tried again now and then, at
    intervals that double while nothing changes. The choice never sees the tokens it is made for,
    so the distribution of the output does not depend on it.
    """

    TRIALS = 3  # rounds in a trial

    def __init__(self):
        self.seconds = [deque(maxlen=9) for _ in range(MOST_DRAFTS + 1)]
        self.hits, self.tries = [0.5] * MOST_DRAFTS, [0.5] * MOST_DRAFTS
        self.best, self.rounds, self.interval, self.next_trial = 0, 0, 16, 32
        self.trial: list[int] = []

    def rate(self, g: int) -> float:
        """Tokens per second and row; longer drafts must win by more than noise."""
        tokens = 1 + sum(hit / tries for hit, tries in zip(self.hits[:g], self.tries, strict=False))
        return tokens / statistics.median(self.seconds[g]) * 0.99**g

    def choose(self) -> int:
        self.rounds += 1
        if self.trial:
            return self.trial.pop()
        for g, seconds in enumerate(self.seconds):
            if len(seconds) < self.TRIALS:
                return g
            if g and self.rate(g) < self.rate(g - 1):
                break
        before, known = self.best, [g for g, s in enumerate(self.seconds) if s]
        self.best = max(known, key=self.rate)
        if self.best != before:
            self.interval = 16
        if self.rounds >= self.next_trial:
            self.interval *= 2
            self.next_trial = self.rounds + self.interval
            near = [g for g in (self.best - 1, self.best + 1) if 0 <= g <= MOST_DRAFTS]
            self.trial = [near[self.rounds % len(near)]] * self.TRIALS
        return self.best

    def learn(self, g: int, seconds: float, kept: list[int]):
        """A round of g drafts after which each row kept so many."""
        self.seconds[g].append(seconds)
        for j in range(g):
            self.hits[j] = 0.95 * self.hits[j] + sum(k > j for k in kept) / len(kept)
            self.tries[j] = 0.95 * self.tries[j] + 1


def shape_of(model: DeepSeekV3) -> str:
    weight, kinds = model.norm.weight, sorted({type(m).__name__ for m in model.modules()})
    return f"{model.config} {kinds} {weight.dtype} {weight.device}"


# What a decoding step calls. When compiled, `shape` is all that tells one model from another: the
# usual guards on a few hundred modules would take a fifth of a small model's step.


def main_step(model: DeepSeekV3, shape: str, tokens: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """tokens (B, T) after those in the cache -> hidden states (B, T, D), logits (B, T, V)."""
    _ = len(shape)  # torch.compile heeds only what is read
    h = model.trunk(tokens, cache)
    return h, model.logits(h)


def mtp_step(
    model: DeepSeekV3, shape: str, k: int, h: Tensor, tokens: Tensor, cache: Cache, at: Tensor
) -> tuple[Tensor, Tensor]:
    """h (B, W, D) of depth k, tokens (B, W) -> the next h; logits (B, V) of slots `at` (B, 1)."""
    _ = len(shape)
    h = model.predict_next(k, h, tokens, cache)
    rows = torch.arange(len(h), device=h.device)[:, None]
    return h, model.logits(h[rows, at]).squeeze(1)


def torch_compile(step: Callable, device: torch.device) -> Callable:
    """`step` with a graph for each number of rows and tokens, and one for all cache lengths."""
    torch._dynamo.config.specialize_float = True  # else every eps becomes an input of the graph
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options = {"guard_filter_fn": skip, "cpp_wrapper": device.type == "cpu"}
    fast = torch.compile(step, dynamic=True, recompile_limit=64, options=options)

    def call(*inputs):
        for x in inputs:
            if isinstance(x, Tensor):
                torch._dynamo.mark_static(x)
        try:
            return fast(*inputs)
        except torch._inductor.exc.InductorError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--compile cannot be used here ({reason}); leave it out") from None

    return call


class Drafter:
    """The MTP modules, their cache, and the main model's hidden states they have not seen yet.

    Slot i of module k (0-based) takes h_i of depth k and token i+k+1, and predicts token i+k+2. So
    with n tokens known and h_0 .. h_{n-2} of the main model, slot n-2 of module 0 gives the draft
    of token n, slot n-2 of module 1 that of token n+1, and so on; deeper drafts come from further
    slots of the last module, with its own output in the place of a hidden state that nobody has
    computed. Afterwards only the slots made of true tokens and hidden states stay in the cache.
    """

    def __init__(self, model: DeepSeekV3, sequence: Tensor, size: int, step: Callable):
        self.model, self.sequence, self.depth = model, sequence, len(model.mtp)
        self.step = step  # mtp_step of the model
        B, like = len(sequence), model.embed_tokens.weight
        self.cache = Cache(model.config, self.depth, B, size, like)
        self.recent = min(RECENT, size)
        self.hidden = like.new_zeros(B, self.recent + 1, like.shape[1])  # h_i lies at i % recent
        self.rows = torch.arange(B, device=like.device)[:, None]
        self.filled = [0] * B  # self.cache.length, known to the host

    def remember(self, h: Tensor, positions: Tensor, known: Tensor | None = None):
        """Keeps h (B, T, D) at positions (B, T), those below `known` (B,) if that is given."""
        place = positions % self.recent
        if known is not None:  # the rest goes to a spare place
            place = place.where(positions < known[:, None], self.recent)
        self.hidden[self.rows, place] = h.to(self.hidden.dtype)

    def keep(self, filled: list[int]):
        self.filled = filled
        self.cache.truncate(torch.tensor(filled, device=self.rows.device), max(filled))

    def prefill(self, h: Tensor, start: int):
        """The slots of a chunk of the prompt; those at its end that know no next token, too."""
        for k in range(self.depth):
            self.cache.truncate(torch.full_like(self.rows[:, 0], start), start)
            tokens = self.sequence[:, start + k + 1 : start + k + 1 + h.shape[1]]
            h = self.model.predict_next(k, h, tokens, self.cache)

    def lag(self, known: list[int]) -> int:
        return max(n - 1 - f for n, f in zip(known, self.filled, strict=True))

    def draft(self, G: int, n: Tensor, known: list[int], choose: Callable[[Tensor], tuple]):
        """Drafts tokens n .. n+G-1 into the sequence; G = 0 only catches up.

        choose(logits (B, V)) -> q (B, V), tokens (B, 1). Returns q (B, G, V) or, if greedy, None.
        """
        W = self.lag(known)
        self.keep([min(f, k - 2) for f, k in zip(self.filled, known, strict=True)])
        start, longest = self.cache.length, self.cache.longest
        slots = start[:, None] + torch.arange(W, device=n.device)  # (B, W), up to slot n-2 or more
        last = (n - 2 - start)[:, None]  # (B, 1), where slot n-2 is
        h = self.hidden[self.rows, slots % self.recent]  # (B, W, D)
        q = []
        for j in range(max(G, self.depth)):
            k = min(j, self.depth - 1)
            if j < self.depth:
                self.cache.truncate(start, longest)
                tokens = self.sequence[self.rows, slots + k + 1]  # (B, W)
            else:
                if j == self.depth:
                    self.cache.truncate(n - 1, max(known) - 1)
                    h = h[self.rows, last]  # (B, 1, D)
                    last = torch.zeros_like(last)
                tokens = self.sequence[self.rows, (n + j - 1)[:, None]]  # (B, 1)
            # A long lag is rare and every length of it would be a graph: it is not compiled.
            few = h.shape[1] <= MOST_DRAFTS + self.depth
            step = self.step if few else partial(mtp_step, self.model, shape_of(self.model))
            h, logits = step(k, h, tokens, self.cache, last)
            if j < G:
                p, token = choose(logits)
                self.sequence[self.rows, (n + j)[:, None]] = token
                q.append(p)
        self.keep([max(0, k - self.depth) for k in known])  # slots of true tokens only
        return torch.stack(q, 1) if q and q[0] is not None else None


@torch.inference_mode()
def generate(
    model: DeepSeekV3,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    speculative: int | str = "auto",
    compile: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    lengths: Sequence[int] | None = None,
    on_token: Callable[[int, list[int], int], None] | None = None,
    stats: Stats | None = None,
) -> Tensor:
    """Continues the rows of tokens (B, T) by max_new_tokens each: (B, T + new), prompt included.

    speculative: drafts per round, 0 to 4, or "auto", the fastest. compile: torch.compile the steps
    after the prompt: half a minute per draft length the first time, seconds later. lengths: where
    prompts differ in length, how many tokens of each row are prompt; the row goes on right behind
    them. A row that reaches eos_token_id (one or several) is padded with it. At
    max_position_embeddings decoding stops with a note, so `new` may be smaller. on_token(row, ids,
    drafted) sees new tokens as they come, the first `drafted` of them accepted drafts. stats is
    filled in. Raises ValueError.
    """
    B, T = tokens.shape
    device, limit, stats = tokens.device, model.config.max_position_embeddings, stats or Stats()
    prompt = [int(n) for n in lengths] if lengths is not None else [T] * B
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    check_request(model, tokens, prompt, max_new_tokens, temperature, top_k, top_p, speculative)
    new = min(max_new_tokens, limit - T)
    if new < max_new_tokens:
        stats.note = f"stopped at the context limit of {limit} tokens (max_position_embeddings)"
    if speculative and not len(model.mtp):
        if speculative != "auto":
            info("this model has no MTP module to draft with: sampling plainly")
        speculative = 0
    if new < 1:
        return tokens.clone()

    most = MOST_DRAFTS if speculative == "auto" else int(speculative)
    greedy, pace = temperature == 0, DraftLength() if speculative == "auto" else None
    end = [n + new for n in prompt]
    # Behind the end there is room for drafts, and for ids that only unused slots see.
    sequence = tokens.new_zeros(B, T + new + most + 1 + len(model.mtp))
    sequence[:, :T] = tokens
    cache = Cache(model.config, len(model.layers), B, T + new + most, model.embed_tokens.weight)
    steps = (torch_compile(f, device) if compile else f for f in (main_step, mtp_step))
    main, mtp = (partial(step, model, shape_of(model)) for step in steps)
    drafter = Drafter(model, sequence, T + new + most, mtp) if most else None
    stats.cache_bytes, stats.cache_slots = sum(kv.nbytes for kv in cache.kv), B * cache.size
    rows = torch.arange(B, device=device)[:, None]

    def choose(logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """(B, V) -> distribution (B, V), None if greedy, and a token of it (B, 1)."""
        if greedy:
            return None, logits.argmax(-1, keepdim=True)
        p = probabilities(logits, temperature, top_k, top_p)
        return p, draw(p, generator)

    # The prompt, in chunks whose attention scores fit in a quarter of a gigabyte.
    began = time.perf_counter()
    chunk = max(1, min(CHUNK, RECENT, 2**26 // (B * T * model.config.num_attention_heads)))
    n = torch.tensor(prompt, device=device)
    h_last = None
    for start in range(0, T, chunk):
        h = model.trunk(sequence[:, start : min(start + chunk, T)], cache)  # (B, chunk, D)
        at = n[:, None] - 1 - start  # (B, 1), where the row's last token is, if it is in here
        here = h[rows, at.clamp(0, h.shape[1] - 1)]  # (B, 1, D)
        h_last = here if h_last is None else torch.where((at >= 0)[..., None], here, h_last)
        if drafter:
            drafter.remember(h, start + torch.arange(h.shape[1], device=device).expand(B, -1), n)
            drafter.prefill(h, start)
    cache.truncate(n, max(prompt))
    if drafter:
        drafter.keep([max(0, k - drafter.depth) for k in prompt])
    _, token = choose(model.logits(h_last).squeeze(1))

    # From here on row b has known[b] tokens, all but the newest of them in the cache. A finished
    # row idles at two tokens: it costs little attention there, and its drafts always find room.
    known, live = list(prompt), [True] * B
    texts = [tokens[b, :k].tolist() for b, k in enumerate(prompt)]

    def take(new_tokens: list[list[int]], kept: list[int]):
        """Adds to the rows what a round gave them, up to their end."""
        for b, ids in enumerate(new_tokens):
            if not live[b]:
                continue
            ids = ids[: min(kept[b] + 1, end[b] - known[b])]
            if stops := [i for i, token in enumerate(ids) if token in eos] if eos else ():
                ids = ids[: stops[0] + 1]
            texts[b] += ids
            known[b] += len(ids)
            stats.tokens += len(ids)
            if stops or known[b] == end[b]:
                live[b], known[b] = False, 2
            if on_token:
                on_token(b, ids, min(kept[b], len(ids)))

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] if compile else 0

    sequence[rows, n[:, None]] = token
    take(token.tolist(), [0] * B)
    stats.prefill_seconds = time.perf_counter() - began

    while any(live):
        began, compiled = time.perf_counter(), graphs()
        G = pace.choose() if pace else most
        G = min(G, max(e - k for e, k, on in zip(end, known, live, strict=True) if on) - 1)
        n = torch.tensor(known, device=device)
        if drafter and (G or drafter.lag(known) >= RECENT - MOST_DRAFTS):
            q = drafter.draft(G, n, known, choose)
        places = n[:, None] - 1 + torch.arange(G + 1, device=device)  # (B, G+1)
        fresh = sequence[rows, places]  # (B, G+1): the newest token and the drafts
        cache.truncate(n - 1, max(known) - 1)
        h, logits = main(fresh, cache)  # (B, G+1, D), (B, G+1, V)
        drafts = fresh[:, 1:]
        if drafter:
            drafter.remember(h, places)
        if G == 0:
            kept, (_, token) = torch.zeros_like(n), choose(logits[:, 0])
        elif greedy:
            best = logits.argmax(-1)  # (B, G+1)
            kept = (best[:, :-1] == drafts).long().cumprod(1).sum(1)  # (B,)
            token = best[rows, kept[:, None]]  # (B, 1)
        else:
            p = probabilities(logits, temperature, top_k, top_p)
            kept, token = accept(p, q, drafts, generator)
        sequence[rows, (n + kept)[:, None]] = token

        result = torch.cat((kept[:, None], sequence[rows, places + 1]), 1).tolist()
        kept = [row[0] for row in result]
        alive = [k for k, on in zip(kept, live, strict=True) if on]
        take([row[1:] for row in result], kept)
        seconds = time.perf_counter() - began
        stats.seconds += seconds
        stats.rounds += 1
        stats.row_rounds += len(alive)
        stats.lengths[G] += 1
        for j in range(G):
            stats.drafted[j] += len(alive)
            stats.accepted[j] += sum(k > j for k in alive)
        if pace and graphs() == compiled:  # a round that waited for the compiler says nothing
            pace.learn(G, seconds, alive)

    pad = eos[0] if eos else 0
    out = [text + [pad] * (T + new - len(text)) for text in texts]
    return torch.tensor(out, device=device)


def check_request(model, tokens, prompt, max_new_tokens, temperature, top_k, top_p, speculative):
    """Raises ValueError, with one sentence, for a call of `generate` that cannot be served."""
    V, limit, T = model.config.vocab_size, model.config.max_position_embeddings, tokens.shape[1]
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty; begin with the end-of-text token")
    low, high = tokens.min().item(), tokens.max().item()
    length_ok = len(prompt) == len(tokens) and all(1 <= n <= T for n in prompt)
    for ok, sentence in (
        (length_ok, f"lengths are {prompt}, but must be {len(tokens)} numbers from 1 to {T}"),
        (limit >= T, f"the prompt has {T} tokens, but the context ends at {limit}; shorten it"),
        (low >= 0, f"token id {low} is negative; ids go from 0 to {V - 1}"),
        (high < V, f"token id {high} is outside the vocabulary of {V}"),
        (max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}, but must be 0 or more"),
        (0 <= temperature < math.inf, f"temperature is {temperature}, but must be 0 or more"),
        (top_k is None or top_k >= 1, f"top_k is {top_k}, but must be at least 1, or none"),
        (top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, but must be in (0, 1], or none"),
        (
            speculative == "auto" or speculative in range(MOST_DRAFTS + 1),
            f"speculative (--draft) is {speculative!r}, but must be 0 to {MOST_DRAFTS}, or auto",
        ),
    ):
        if not ok:
            raise ValueError(sentence)


@torch.inference_mode()
def score(model: DeepSeekV3, ids: list[int], window: int) -> float:
    """Total nats of ids[1:]. Windows overlap by half, and a window counts where it has most
    context: every token but the first ones sees window/2 to window - 1 tokens before it."""
    x, nats, done = torch.tensor(ids, device=model.norm.weight.device), 0.0, 1
    while done < len(ids):
        start = max(0, done - window // 2)
        piece = x[start : start + window + 1]
        loss = F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="none")
        nats += loss[done - start - 1 :].sum().item()
        done = start + len(piece)
    return nats


# ---- Display -------------------------------------------------------------------------------------


class Writer:
    """Writes one row's tokens as text, character by character once all their bytes are there."""

    def __init__(self, tokenizer: Tokenizer, live: bool, colour: bool):
        self.tokenizer, self.live, self.colour = tokenizer, live, colour
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""  # what waits for its turn

    def write(self, text: str, ansi: str = ""):
        self.text += f"\033[{ansi}m{text}\033[0m" if text and ansi and self.colour else text
        if self.live:
            sys.stdout.write(self.text)
            sys.stdout.flush()
            self.text = ""

    def add(self, ids: list[int], styles: Sequence[str]):
        for token, style in zip(ids, styles, strict=True):
            if token not in self.tokenizer.eos:
                self.write(self.decoder.decode(self.tokenizer.to_bytes(token)), style)

    def close(self):
        self.live = True
        self.write(self.decoder.decode(b"", final=True) + "\n")


def top_experts(model: DeepSeekV3, ids: list[int]) -> list[int]:
    """For each token the expert with the largest weight in the last MoE layer."""
    main = [layer.mlp.gate for layer in model.layers if hasattr(layer.mlp, "gate")]
    if not main:
        raise ValueError("this model has no routed experts to show")
    seen = []
    hook = main[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        model(torch.tensor([ids], device=model.norm.weight.device))
    hook.remove()
    _, chosen, weight = seen[0]  # (1, T, K) each
    return chosen.gather(-1, weight.argmax(-1, keepdim=True)).flatten().tolist()


def report(config: ModelConfig, stats: Stats, max_rows: int):
    """What the run measured, on stderr."""
    if stats.seconds:
        prompt = f"{stats.prefill_seconds:.2f} s to the first token"
        rate = (stats.tokens - max_rows) / stats.seconds  # the prompt's forward gave the first ones
        info(f"{stats.tokens} tokens, {rate:.1f} tokens/s, {prompt}")
    if any(stats.drafted):
        shares = [f"{a / d:.0%}" for a, d in zip(stats.accepted, stats.drafted, strict=True) if d]
        tokens = (stats.tokens - max_rows) / max(1, stats.row_rounds)
        used = ", ".join(f"{g}: {r}" for g, r in enumerate(stats.lengths) if r)
        info(
            f"drafts accepted, by position: {' '.join(shares)}; {tokens:.2f} tokens per forward; "
            f"rounds by draft length: {used}"
        )
    ours, mha = config.cache_numbers()
    size = stats.cache_bytes // max(1, stats.cache_slots)
    info(
        f"cache: {size:,} bytes per token; multi-head attention would hold "
        f"{size * mha // ours:,} ({mha / ours:.1f} times as much)"
    )
    if stats.note:
        info(f"note: {stats.note}")


# ---- The command ---------------------------------------------------------------------------------


def read_text(path: str, what: str) -> str:
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise FileNotFoundError(f"cannot read {what} {path}: {error.strerror}") from None


def read_prompt(config: SampleConfig, given: bool) -> str:
    """--prompt, --prompt_file, or what is piped in."""
    if config.prompt_file:
        return read_text(config.prompt_file, "the prompt file")
    if config.prompt == "-" or not (given or sys.stdin is None or sys.stdin.isatty()):
        if config.prompt != "-" and os.name == "posix":  # a pipe may be open with nobody writing
            try:
                ready, _, _ = select.select([sys.stdin], [], [], 1.0)
            except (OSError, ValueError):
                ready = []
            if not ready:
                return ""
        try:
            return sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text (byte {error.start})") from None
    try:  # Python carries bytes that are no text through as lone surrogates
        config.prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not UTF-8 text (character {error.start}); give it with --prompt_file"
        ) from None
    return config.prompt


def usable_device(name: str) -> torch.device:
    """The device of that name, `auto` the fastest here. Raises ValueError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try cpu") from None
    return torch.device(name)


def find_device(config: SampleConfig) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the dtype to compute in (None: as stored; on a CPU always float32)."""
    device = usable_device(config.device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if config.dtype != "auto" and config.dtype not in dtypes:
        raise ValueError(f"dtype is {config.dtype!r}, but must be auto, {', '.join(dtypes)}")
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    default = torch.bfloat16 if fast else torch.float32
    return device, dtypes.get(config.dtype, default)


def complete(model: DeepSeekV3, tokenizer: Tokenizer, prompt: str, config: SampleConfig):
    """Writes num_samples continuations of the prompt to stdout, the first as it comes."""
    device, N = model.norm.weight.device, config.num_samples
    ids = tokenizer.encode(prompt) or tokenizer.eos[:1]
    if not ids:
        raise ValueError("the prompt is empty and this tokenizer has no end-of-text token")
    colour = sys.stdout.isatty() and config.show != ""
    delayed = config.show == "experts"  # experts are looked up when the text is complete
    writers = [Writer(tokenizer, b == 0, colour) for b in range(N)]
    texts = [[] for _ in range(N)]

    def on_token(row: int, new: list[int], drafted: int):
        if not texts[row] and not delayed:
            writers[row].write(prompt)
        texts[row] += new
        if not delayed:
            writers[row].add(new, ["32"] * drafted + [""] * (len(new) - drafted))

    stats, interrupted = Stats(), False
    generator = torch.Generator(device).manual_seed(config.seed)
    try:
        generate(
            model, torch.tensor([ids] * N, device=device), config.max_new_tokens,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            speculative="auto" if config.draft == "auto" else int(config.draft),
            compile=config.compile, eos_token_id=tokenizer.eos, generator=generator,
            on_token=on_token, stats=stats,
        )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
    for b, writer in enumerate(writers):
        if b:
            writer.text = f"{'-' * 80}\n{writer.text}"
        if delayed:
            experts = top_experts(model, ids + texts[b])
            writer.add(ids + texts[b], [f"38;5;{17 + 29 * e % 214}" for e in experts])
        writer.close()
    report(model.config, stats, N)
    if interrupted:
        raise KeyboardInterrupt


def chat(model: DeepSeekV3, tokenizer: Tokenizer, config: SampleConfig):
    """One prompt after another, each the beginning of a new text."""
    info("a prompt per line, \\n for a line break; an empty line or Ctrl-D ends")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        try:
            complete(model, tokenizer, line.replace("\\n", "\n"), config)
        except KeyboardInterrupt:
            info("interrupted")
        except ValueError as error:
            info(f"error: {error}")
        config.seed += 1


def main(argv: list[str]):
    text = "Write text with a trained model: python sample.py --ckpt=out/small [--key=value]"
    _, values = parse_args(text, argv, SampleConfig)
    config = SampleConfig(**values)
    if not config.ckpt:
        info("usage: name a checkpoint, for example: python sample.py --ckpt=out/small")
        sys.exit(2)
    if config.show not in ("", "drafts", "experts"):
        raise ValueError(f"show is {config.show!r}, but must be drafts or experts")
    if config.draft not in ("auto", *map(str, range(MOST_DRAFTS + 1))):
        raise ValueError(f"draft is {config.draft!r}, but must be auto or 0 to {MOST_DRAFTS}")
    if config.num_samples < 1:
        raise ValueError(f"num_samples is {config.num_samples}, but must be at least 1")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    prompt = ""
    if not (config.score or config.interactive):
        prompt = read_prompt(config, "prompt" in values)
    device, dtype = find_device(config)
    model, tokenizer, path = load_model(config.ckpt, device, dtype)
    if tokenizer is None:
        raise ValueError(f"no tokenizer of {path} can be read, so there is no text to write")
    if config.score:
        document = read_text(config.score, "the text")
        ids = [*tokenizer.eos[:1], *tokenizer.encode(document)]
        if len(ids) < 2:
            raise ValueError(f"{config.score} is empty; nothing to score")
        window = min(model.config.max_position_embeddings, 2048)
        nats, count, size = score(model, ids, window), len(ids) - 1, len(document.encode())
        print(
            f"{config.score}: {count:,} tokens, {nats / count:.4f} nats/token, "
            f"{nats / math.log(2) / size:.4f} bits/byte, "
            f"context {window // 2} to {window - 1} tokens except at the beginning"
        )
    elif config.interactive:
        chat(model, tokenizer, config)
    else:
        complete(model, tokenizer, prompt, config)


if __name__ == "__main__":
    run_command(main)
