"""Write text with a trained model: python sample.py out/small --prompt="def ".

Decoding is speculative: the MTP module, or the text itself where it repeats, drafts a few tokens,
one forward of the model checks them all, and what is kept follows exactly the distribution of plain
sampling (Leviathan et al., arXiv 2211.17192). Text goes to stdout, everything else to stderr.

    --score=FILE measures a text instead of writing one

Shapes: B rows (sequences decoded together), T prompt length, G drafts in a round, V vocabulary,
D hidden, W slots that an MTP module catches up with.
"""

import codecs
import contextlib
import math
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from config import info, parse_args, run_command
from huggingface import Tokenizer, load_model
from model import Cache, DeepSeekV3, ModelConfig

MOST_DRAFTS = 4
CHUNK = 512  # prompt tokens that go through the model at once, at most
CPU_OPTIONS = dict(
    cpp_wrapper=True, size_asserts=False, alignment_asserts=False, scalar_asserts=False
)
MATCH = 3  # tokens that must have stood earlier in the text for prompt lookup


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
    draft: str = "auto"  # tokens drafted in a round: 0 to 4, or what is fastest
    lookup: bool = True  # draft from earlier in the text where it repeats itself
    compile: bool = False  # compile decoding: several times faster, after a minute the first time
    show: str = ""  # drafts: colour accepted drafts; experts: colour by the last layer's top expert
    interactive: bool = False  # ask for one prompt after another
    score: str = ""  # a text file: print its nats per token and bits per byte
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # float32, bfloat16, float64; auto is bfloat16 on GPUs that have it


# ---- Sampling ------------------------------------------------------------------------------------


def probabilities(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
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


def draw(p: Tensor, u: Tensor) -> Tensor:
    """From each of the distributions p (B, V) the token where its sum passes u (B, 1): (B, 1)."""
    total = p.cumsum(-1)
    token = torch.searchsorted(total, u * total[:, -1:], right=True)
    return token.clamp(max=p.shape[1] - 1)


def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling: how many drafts stay (B,), and the token after them (B, 1).

    Draft x, drawn from q, stays with probability min(1, p(x) / q(x)). The first that does not is
    replaced by a draw from norm(max(0, p - q)); if all stay, one more token is drawn from p. Then
    every token is distributed as p, whatever q is. p (B, G+1, V), q (B, G, V), drafts (B, G), u
    (B, G+1) uniform in [0, 1).
    """
    p_x = p[:, :-1].gather(2, drafts[..., None]).squeeze(2)  # (B, G)
    q_x = q.gather(2, drafts[..., None]).squeeze(2)  # (B, G)
    kept = (u[:, :-1] * q_x < p_x).long().cumprod(1).sum(1)  # (B,)
    rows = torch.arange(len(p), device=p.device)
    q = F.pad(q, (0, 0, 0, 1))  # no draft, no q: after the last one all of p is left
    rest = (p[rows, kept] - q[rows, kept]).clamp(min=0)  # (B, V)
    # Where p and q differ by rounding only, nothing may be left of p - q.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p[rows, kept])
    return kept, draw(rest, u[:, -1:])


# ---- One round -----------------------------------------------------------------------------------


@dataclass
class Text:
    """What the rounds work on. All rows have the same length n: they advance in lockstep."""

    tokens: Tensor  # (B, size)
    cache: Cache  # of the main layers; holds all tokens but the newest
    hidden: Tensor | None = None  # (B, size, D), the main model's, where MTP modules draft
    mtp_cache: Cache | None = None
    filled: int = 0  # its slots made of true tokens and hidden states


@dataclass(frozen=True)
class Sampling:
    temperature: Tensor | None  # none: greedy
    top_k: int | None
    top_p: float | None

    def choose(self, logits: Tensor, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """logits (B, V) -> distribution (B, V), none if greedy, and a token of it (B, 1)."""
        if self.temperature is None:
            return None, logits.argmax(-1, keepdim=True)
        p = probabilities(logits, self.temperature, self.top_k, self.top_p)
        return p, draw(p, u)


def span(start: int | Tensor, length: int) -> slice | Tensor:
    """Positions from start on: as a slice, or as a tensor in a graph that serves every start."""
    if isinstance(start, int):
        return slice(start, start + length)
    return start + torch.arange(length, device=start.device)


def draft(net, text: Text, n: int | Tensor, G: int, sampling: Sampling, u: Tensor) -> list:
    """Drafts tokens n .. n+G-1 with the MTP modules; returns their distributions q, G of (B, V).

    Slot i of module k (0-based) takes h_i of depth k and token i+k+1, and predicts token i+k+2. So
    slot n-2 of module 0 gives token n, that of module 1 token n+1, and so on; deeper drafts come
    from further slots of the last module, fed with its own output. First the modules catch up with
    the last W slots up to n-2, which replaces what was made of rejected drafts.
    """
    depth, h, q = len(text.mtp_cache.kv), None, []
    if isinstance(n, int):
        start, W = text.filled, n - 1 - text.filled
    else:  # the most that a round can leave behind
        W = G + depth
        start = (n - 1 - W).clamp(min=0)
    h = text.hidden[:, span(start, W)]
    for j in range(max(G, depth)):
        k = min(j, depth - 1)
        text.mtp_cache.length = start if j < depth else n - 1 + j - depth
        tokens = span(start + k + 1, W) if j < depth else span(n + j - 1, 1)
        h = net.predict_next(k, h, text.tokens[:, tokens], text.mtp_cache)
        last = h[:, span(n - 2 - start, 1)] if j < depth else h  # (B, 1, D)
        if j < G:
            p, token = sampling.choose(net.logits(last)[:, 0], u[:, j : j + 1])
            text.tokens[:, span(n + j, 1)] = token
            q.append(p)
        if j >= depth - 1:
            h = last
    return q


def play_round(
    net, text: Text, n: int | Tensor, G: int, sampling: Sampling, u: Tensor, looked_up: bool
) -> Tensor:
    """Drafts G tokens (unless they are looked up), checks them, and writes tokens n .. n+G.

    u (B, 2G+1) is uniform in [0, 1). Returns how many drafts each row keeps, then its tokens, of
    which kept + 1 are true: (B, 1 + G+1).
    """
    q = [] if looked_up or G == 0 else draft(net, text, n, G, sampling, u)
    fresh = text.tokens[:, span(n - 1, G + 1)]  # (B, G+1): the newest token and the drafts
    text.cache.length = n - 1
    h = net.trunk(fresh, text.cache)
    if text.hidden is not None:
        text.hidden[:, span(n - 1, G + 1)] = h
    logits, drafts = net.logits(h), fresh[:, 1:]  # (B, G+1, V), (B, G)
    if sampling.temperature is None:
        out = logits.argmax(-1)  # (B, G+1)
        kept = (out[:, :-1] == drafts).long().cumprod(1).sum(1)  # (B,)
    elif G == 0:
        _, out = sampling.choose(logits[:, 0], u)
        kept = torch.zeros_like(out[:, 0])
    else:
        p = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        # What is looked up is certain: its q is 1.
        q = torch.stack(q, 1) if q else F.one_hot(drafts, p.shape[-1]).to(p.dtype)
        kept, token = accept(p, q, drafts, u[:, G:])
        place = torch.arange(G + 1, device=kept.device)
        out = torch.where(place == kept[:, None], token, F.pad(drafts, (0, 1)))
    text.tokens[:, span(n, G + 1)] = out
    return torch.cat((kept[:, None], out), 1)


# ---- The texts, the pace, the compiler -----------------------------------------------------------


@dataclass
class Stats:
    """What happened during `generate`, all rows together."""

    prefill_seconds: float = 0.0
    compile_seconds: float = 0.0
    seconds: float = 0.0  # without the prompt and without compilation
    rounds: int = 0  # forwards of the main model after the prompt
    tokens: int = 0  # new tokens
    row_rounds: int = 0  # rounds x rows that were not finished
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)  # by position
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    lengths: list[int] = field(default_factory=lambda: [0] * (MOST_DRAFTS + 1))  # rounds of each
    lookups: int = 0  # rounds whose drafts were looked up
    cache_bytes: int = 0
    cache_slots: int = 0  # rows x positions
    note: str = ""  # why it ended early or decoded by the plain formulas


class Rows:
    """The texts as the host sees them: streamed, ended, searched for what stood there before."""

    def __init__(self, texts: list[list[int]], end: int, eos: list[int], on_token, stats: Stats):
        self.texts, self.end, self.eos, self.stats = texts, end, eos, stats
        self.on_token = on_token or (lambda row, ids, drafted: None)
        self.n, self.live = len(texts[0]), [True] * len(texts)
        self.follows = [{} for _ in texts]  # MATCH tokens -> where the text last went on from them
        for b in range(len(texts)):
            self.index(b, 0)

    def index(self, b: int, start: int):
        ids = self.texts[b]
        for i in range(max(MATCH, start), len(ids)):
            self.follows[b][tuple(ids[i - MATCH : i])] = i

    def look_up(self, G: int) -> list[list[int]] | None:
        """Prompt lookup: what followed when the last MATCH tokens stood there before, G tokens for
        every row; none if an unfinished row finds nothing."""
        found = []
        for ids, follows, live in zip(self.texts, self.follows, self.live, strict=True):
            start = follows.get(tuple(ids[-MATCH:]))
            if live and start is None:
                return None
            copy = ids[start:] if live else [0]
            for i in range(G):  # it may run into what it has just copied
                copy.append(copy[i])
            found.append(copy[:G])
        return found

    def take(self, result: list[list[int]], G: int) -> int:
        """Adds what a round gave, per row the number of drafts it keeps and then its tokens.

        Returns by how many tokens all rows advance, the least of them: a row that keeps more drafts
        emits one in the place where another has its replacement.
        """
        live, stats = [b for b, on in enumerate(self.live) if on], self.stats
        advance = 1 + min(result[b][0] for b in live)
        for b in live:
            kept, *ids = result[b]
            ids = ids[: min(advance, self.end - self.n)]
            stop = next((i for i, token in enumerate(ids) if token in self.eos), None)
            ids = ids if stop is None else ids[: stop + 1]
            self.live[b] = stop is None and self.n + len(ids) < self.end
            self.texts[b] += ids
            self.index(b, self.n)
            self.on_token(b, ids, min(kept, len(ids)))
            stats.tokens += len(ids)
            stats.row_rounds += 1
            for j in range(G):
                stats.drafted[j] += 1
                stats.accepted[j] += kept > j
        self.n += advance
        return advance

    def padded(self) -> list[list[int]]:
        return [ids + self.eos[:1] * (self.end - len(ids)) for ids in self.texts]


class Pace:
    """speculative="auto": a short trial of 0, 1, 2, ... drafts while one more pays, then the best.

    Drafts are measured against plain rounds all the time, in tokens: what they cost more than they
    gave. If that passes a hundredth of the text, they are given up, so auto costs little at most.
    The choice never sees the tokens it is made for, so the distribution stays what it is.
    """

    TRIAL = 6  # rounds

    def __init__(self, most: int, new: int):
        self.most, self.allowance, self.plain = most, new / 100, 0.0
        self.G, self.best, self.trying = 0, (0.0, 0), True
        self.lost = {False: 0.0, True: 0.0}  # by MTP's, by looked up drafts
        self.seconds, self.tokens = [], 0.0

    def may_look_up(self) -> bool:
        return self.plain > 0 and self.lost[True] <= self.allowance

    def learn(self, G: int, looked_up: bool, seconds: float, tokens: float):
        """A round of G drafts took so long and gave so many tokens per row."""
        if G:
            self.lost[looked_up] += seconds / self.plain - tokens
        if looked_up:
            return
        if self.lost[False] > self.allowance:
            self.G, self.trying = 0, False
        if self.trying:
            self.seconds.append(seconds)
            self.tokens += tokens
            if len(self.seconds) == self.TRIAL:
                self.judge()

    def judge(self):
        typical = statistics.median(self.seconds)
        self.plain = self.plain or typical
        rate = self.tokens / self.TRIAL / typical
        self.trying = rate > self.best[0] and self.most > self.G
        self.best = max(self.best, (rate, self.G))
        self.G = self.G + 1 if self.trying else self.best[1]
        self.seconds, self.tokens = [], 0.0


@contextlib.contextmanager
def clock(what: str) -> Iterator[None]:
    """Shows on stderr how long it takes."""
    began, done = time.perf_counter(), threading.Event()

    def show():
        while not done.wait(1):
            print(f"\r{what}: {time.perf_counter() - began:.0f} s", end="", file=sys.stderr)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if time.perf_counter() - began > 1:
            info("")


def play_compiled(net, text: Text, n: int, G: int, sampling: Sampling, u: Tensor, looked_up: bool):
    """play_round as one graph for every n. The first call of its kind compiles."""
    B, size, device = *text.tokens.shape, text.tokens.device
    key = (B, size, G, looked_up, sampling.temperature is None, sampling.top_k, sampling.top_p)
    at = torch.tensor(n, device=device)
    if key not in net.graphs:
        # Without guards, as checking a few hundred tensors would take as long as the step. And as
        # torch.compile keeps graphs with the code of a function, each has its own copy of that.
        code = play_round.__code__.replace(co_name=f"round_{len(net.graphs)}")
        options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        options |= CPU_OPTIONS if device.type == "cpu" else {"triton.cudagraphs": True}
        play = types.FunctionType(code, play_round.__globals__)
        play = torch.compile(play, fullgraph=True, dynamic=False, options=options)
        with clock(f"compiling a round of {G} drafts"):
            for _ in range(3):  # the same result each time; a GPU records the graph in the second
                play(net, text, at, G, sampling, u, looked_up)
        net.graphs[key] = play
    lag = n - 1 - text.filled
    if G and not looked_up and lag > G + len(net.mtp):
        draft(net, text, n, 0, sampling, u)
    return net.graphs[key](net, text, at, G, sampling, u, looked_up)


# ---- generate ------------------------------------------------------------------------------------


def agree(model: DeepSeekV3, fast, tokens: Tensor, cache: Cache, logits: Tensor) -> bool:
    """Whether the Decoder gives the logits (B, V) that model.py's formulas gave after the prompt.

    A prompt of a few tokens would hide much: then the two meet on a made-up text.
    """
    if tokens.shape[1] < 8:
        tokens = torch.arange(16, device=tokens.device)[None] % model.config.vocab_size
        cache = Cache(model.config, len(model.layers), 1, 16, model.norm.weight)
        logits = model.logits(model.trunk(tokens, cache)[:, -1])
    cache.length = tokens.shape[1] - 1
    difference = fast.logits(fast.trunk(tokens[:, -1:], cache))[:, 0] - logits
    half = torch.finfo(model.norm.weight.dtype).bits < 32
    return bool(difference.norm() <= (0.1 if half else 1e-3) * logits.norm())


@torch.inference_mode()
def prefill(model: DeepSeekV3, text: Text, T: int) -> Tensor:
    """The prompt, in chunks whose scores fit in a quarter of a gigabyte: logits (B, V)."""
    heads, B = model.config.num_attention_heads, len(text.tokens)
    chunk = max(1, min(CHUNK, 2**26 // (B * T * heads)))
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        h = model.trunk(text.tokens[:, start:end], text.cache)  # (B, chunk, D)
        last = h[:, -1]
        if text.hidden is not None:
            text.hidden[:, start:end] = h
            for k in range(len(model.mtp)):
                text.mtp_cache.length = start
                later = text.tokens[:, start + k + 1 : end + k + 1]
                h = model.predict_next(k, h, later, text.mtp_cache)
            text.filled = max(0, T - len(model.mtp))
    return model.logits(last)


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
    lookup: bool = True,
    compile: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, list[int], int], None] | None = None,
    stats: Stats | None = None,
) -> Tensor:
    """Continues the rows of tokens (B, T) by max_new_tokens each: (B, T + new), prompt included.

    speculative: drafts per round, 0 to 4, or "auto", the fastest. lookup: draft from the text
    itself where its last tokens stood before. compile: every kind of round becomes one graph, in
    half a minute the first time, seconds later. A row that reaches eos_token_id (one or several) is
    padded with it. At max_position_embeddings decoding stops with a note, so `new` may be smaller.
    on_token(row, ids, drafted) sees new tokens as they come, the first `drafted` of them accepted
    drafts. stats is filled in. Raises ValueError.
    """
    (B, T), config, device, stats = tokens.shape, model.config, tokens.device, stats or Stats()
    check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, speculative)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    new = min(max_new_tokens, config.max_position_embeddings - T)
    if new < max_new_tokens:
        stats.note = f"stopped at the context limit of {T + new} tokens (max_position_embeddings)"
    if new < 1:
        return tokens.clone()
    most, mtp = MOST_DRAFTS if speculative == "auto" else int(speculative), len(model.mtp)
    if most and not mtp and not lookup:
        info("this model has no MTP module to draft with: sampling plainly")
    pace = Pace(most if mtp else 0, new) if speculative == "auto" else None

    # Room for a last round that goes too far. A graph serves one size, so compiled there are few.
    size = T + new + MOST_DRAFTS + mtp + 1
    size = max(256, 1 << (size - 1).bit_length()) if compile else size
    like, high = model.embed_tokens.weight, model.logits(model.norm.weight[None]).dtype
    text = Text(tokens.new_zeros(B, size), Cache(config, len(model.layers), B, size, like))
    text.tokens[:, :T] = tokens
    if most and mtp:
        text.hidden = like.new_zeros(B, size, config.hidden_size)
        text.mtp_cache = Cache(config, mtp, B, size, like)
    stats.cache_bytes, stats.cache_slots = sum(kv.nbytes for kv in text.cache.kv), B * size
    heat = torch.tensor(temperature, dtype=high, device=device) if temperature else None
    sampling = Sampling(heat, top_k, top_p)

    def uniform(count: int) -> Tensor:
        return torch.rand(B, count, dtype=high, device=device, generator=generator)

    began = time.perf_counter()
    logits = prefill(model, text, T)  # (B, V)
    if not logits.isfinite().all():
        raise ValueError("the logits after the prompt are not finite: the weights are damaged")
    net = ops.decoder(model)
    if net is None or not agree(model, net, tokens, text.cache, logits):
        net, compile = model, False
        if ops.enabled:
            info("ops.Decoder does not know this model's formulas: decoding by those of model.py")
    rows = Rows(tokens.tolist(), T + new, eos, on_token, stats)
    _, token = sampling.choose(logits, uniform(1))
    text.tokens[:, T : T + 1] = token
    rows.take([[0, *row] for row in token.tolist()], 0)
    stats.prefill_seconds = time.perf_counter() - began

    while any(rows.live):
        n, began = rows.n, time.perf_counter()
        G = (pace.G if pace else most) if mtp else 0
        found = rows.look_up(most) if lookup and (not pace or pace.may_look_up()) else None
        if found:
            G, text.tokens[:, n : n + most] = most, torch.tensor(found, device=device)
        play = play_compiled if compile else play_round
        result = play(net, text, n, G, sampling, uniform(2 * G + 1), bool(found))
        if G and not found:
            text.filled = max(0, n - mtp)
        gave = rows.take(result.tolist(), G)
        seconds = time.perf_counter() - began
        stats.seconds += seconds
        stats.rounds += 1
        stats.lengths[G] += 1
        stats.lookups += bool(found)
        if pace:
            pace.learn(G, bool(found), seconds, gave)
    return torch.tensor(rows.padded(), device=device)


def check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, speculative):
    """Raises ValueError, with one sentence, for a call of `generate` that cannot be served."""
    V, limit, T = model.config.vocab_size, model.config.max_position_embeddings, tokens.shape[1]
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty; begin with the end-of-text token")
    low, high = tokens.min().item(), tokens.max().item()
    for ok, sentence in (
        (limit >= T, f"the prompt has {T} tokens, but the context ends at {limit}; shorten it"),
        (0 <= low <= high < V, f"token ids go from {low} to {high}, but must be 0 to {V - 1}"),
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

# Of middle brightness: legible on black and on white.
PALETTE = (160, 34, 172, 33, 134, 37, 99, 204)


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


def style_of(expert: int) -> str:
    """Eight colours, then the same underlined, reversed, both."""
    return f"38;5;{PALETTE[expert % 8]}" + ("", ";4", ";7", ";4;7")[expert // 8 % 4]


def top_experts(model: DeepSeekV3, ids: list[int]) -> list[int]:
    """For each token the expert with the largest gate value in the last MoE layer."""
    gates = [layer.mlp.gate for layer in model.layers if hasattr(layer.mlp, "gate")]
    if not gates:
        raise ValueError("this model has no routed experts to show")
    seen = []
    hook = gates[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        model(torch.tensor([ids], device=model.norm.weight.device))
    hook.remove()
    _, chosen, gain = seen[0]  # (1, T, K) each
    return chosen.gather(-1, gain.argmax(-1, keepdim=True)).flatten().tolist()


def legend(show: str, experts: list[int]):
    if not sys.stdout.isatty():
        info(f"--show={show}: no colours, as the output is not a terminal")
    elif show == "drafts":
        info("\033[32mgreen\033[0m: drafts that were accepted")
    else:
        names = (f"\033[{style_of(e)}m{e}\033[0m" for e in sorted(set(experts)))
        info("experts of the last layer: " + " ".join(names))


def report(config: ModelConfig, stats: Stats, rows: int):
    """What the run measured, on stderr."""
    tokens = stats.tokens - rows  # the prompt's forward gave the first ones
    if stats.seconds:
        prompt = f"{stats.prefill_seconds:.2f} s to the first token"
        info(f"{stats.tokens} tokens, {tokens / stats.seconds:.1f} tokens/s, {prompt}")
    if any(stats.drafted):
        shares = [f"{a / d:.0%}" for a, d in zip(stats.accepted, stats.drafted, strict=True) if d]
        used = ", ".join(f"{g}: {r}" for g, r in enumerate(stats.lengths) if r)
        info(
            f"drafts accepted, by position: {' '.join(shares)}; "
            f"{tokens / max(1, stats.row_rounds):.2f} tokens per forward; "
            f"rounds by draft length: {used}; looked up: {stats.lookups}"
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


def read_text(path: str) -> str:
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise FileNotFoundError(f"cannot read {path}: {error.strerror}") from None


def usable_device(name: str) -> torch.device:
    """The device of that name, `auto` the fastest here. Raises ValueError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); try cpu") from None
    return torch.device(name)


def find_device(config: SampleConfig) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype to compute in: bfloat16 on GPUs that have it, else float32."""
    device = usable_device(config.device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if config.dtype != "auto" and config.dtype not in dtypes:
        raise ValueError(f"dtype is {config.dtype!r}, but must be auto, {', '.join(dtypes)}")
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, dtypes.get(config.dtype, torch.bfloat16 if fast else torch.float32)


def complete(model: DeepSeekV3, tokenizer: Tokenizer, prompt: str, config: SampleConfig):
    """Writes num_samples continuations of the prompt to stdout, the first as it comes."""
    device, N = model.norm.weight.device, config.num_samples
    ids = tokenizer.encode(prompt) or tokenizer.eos[:1]
    if not ids:
        raise ValueError("the prompt is empty and this tokenizer has no end-of-text token")
    colour, delayed = sys.stdout.isatty(), config.show == "experts"  # known when all is written
    writers = [Writer(tokenizer, b == 0, colour and config.show != "") for b in range(N)]
    texts = [[] for _ in range(N)]

    def on_token(row: int, new: list[int], drafted: int):
        if not texts[row] and not delayed:
            writers[row].write(prompt)
        texts[row] += new
        if not delayed:
            writers[row].add(new, ["32"] * drafted + [""] * (len(new) - drafted))

    stats, interrupted, experts = Stats(), False, []
    generator = torch.Generator(device).manual_seed(config.seed)
    try:
        generate(
            model, torch.tensor([ids] * N, device=device), config.max_new_tokens,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            speculative="auto" if config.draft == "auto" else int(config.draft),
            lookup=config.lookup, compile=config.compile, eos_token_id=tokenizer.eos,
            generator=generator, on_token=on_token, stats=stats,
        )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
    for b, writer in enumerate(writers):
        if b:
            writer.text = f"{'-' * 80}\n{writer.text}"
        if delayed:
            chosen = top_experts(model, ids + texts[b])
            writer.add(ids + texts[b], [style_of(e) for e in chosen])
            experts += chosen
        writer.close()
    if config.show:
        legend(config.show, experts)
    report(model.config, stats, N)
    if interrupted:
        raise KeyboardInterrupt


def chat(model: DeepSeekV3, tokenizer: Tokenizer, config: SampleConfig):
    """One prompt after another, each the beginning of a new text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() line editing and a history
    info("a prompt per line, \\n for a line break; an empty line or Ctrl-D ends")
    with contextlib.suppress(EOFError):
        while line := input("> " if sys.stdout.isatty() else ""):
            try:
                complete(model, tokenizer, line.replace("\\n", "\n"), config)
            except KeyboardInterrupt:
                info("interrupted")
            except ValueError as error:
                info(f"error: {error}")
            config.seed += 1


def print_score(model: DeepSeekV3, tokenizer: Tokenizer, path: str):
    document = read_text(path)
    ids = tokenizer.encode(document)
    if tokenizer.bos is None:  # else the ids begin with it
        ids = [*tokenizer.eos[:1], *ids]
    if len(ids) < 2:
        raise ValueError(f"{path} is empty; nothing to score")
    window = min(model.config.max_position_embeddings, 2048)
    nats, count, size = score(model, ids, window), len(ids) - 1, len(document.encode())
    print(
        f"{path}: {count:,} tokens, {nats / count:.4f} nats/token, "
        f"{nats / math.log(2) / size:.4f} bits/byte, "
        f"context {window // 2} to {window - 1} tokens except at the beginning"
    )


def main(argv: list[str]):
    text = "Write text with a trained model: python sample.py out/small [--key=value]"
    ckpt, values = parse_args(text, argv, SampleConfig, positional="ckpt")
    config = SampleConfig(**values)
    ckpt = ckpt or config.ckpt
    if not ckpt:
        info("usage: name a checkpoint, for example: python sample.py out/small")
        sys.exit(2)
    for name, allowed in (
        ("show", ("", "drafts", "experts")),
        ("draft", ("auto", *map(str, range(MOST_DRAFTS + 1)))),
    ):
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"{name} is {value!r}, but must be {' or '.join(allowed).strip()}")
    if config.num_samples < 1:
        raise ValueError(f"num_samples is {config.num_samples}, but must be at least 1")
    others = sorted({"prompt", "prompt_file", "interactive", "show"} & values.keys())
    if config.score and others:
        raise ValueError(f"--score measures a text and writes none: leave out --{others[0]}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    piped = not ("prompt" in values or sys.stdin is None or sys.stdin.isatty())
    prompt = config.prompt
    if not (config.score or config.interactive) and (config.prompt_file or piped or prompt == "-"):
        prompt = read_text(config.prompt_file or "-")
    if not prompt.isprintable() and any(0xD800 <= ord(c) <= 0xDFFF for c in prompt):
        raise ValueError("the prompt is not UTF-8 text; give it with --prompt_file")
    device, dtype = find_device(config)
    model, tokenizer, path = load_model(ckpt, device, dtype)
    if tokenizer is None:
        raise ValueError(f"no tokenizer of {path} can be read, so there is no text to write")
    if config.score:
        print_score(model, tokenizer, config.score)
    elif config.interactive:
        chat(model, tokenizer, config)
    else:
        complete(model, tokenizer, prompt, config)


if __name__ == "__main__":
    run_command(main)
