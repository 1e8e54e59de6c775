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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from config import info, parse_args, run_command
from huggingface import Tokenizer, load_model
from model import Cache, DeepSeekV3

MOST_DRAFTS = 4
MATCH = 3  # tokens that prompt lookup finds again
PALETTE = (160, 34, 172, 33, 134, 37, 99, 204)  # neither bright nor dark: legible on any ground


@dataclass
class SampleConfig:
    ckpt: str = ""  # a run's folder (best.pt, else ckpt.pt), a file, or a Hugging Face directory
    prompt: str = ""  # the text to go on from; nothing: what is piped in, or a new document
    prompt_file: str = ""  # a file with the prompt
    num_samples: int = 1  # texts from the same prompt, decoded together
    max_new_tokens: int = 256
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = 200  # sample among the k likeliest tokens; none: among all
    top_p: float | None = None  # among the fewest tokens that have this much probability
    seed: int = 1337  # with a fixed --draft it fixes the text; auto follows the clock
    draft: str = "auto"  # tokens drafted in a round: 0 to 4, or what is fastest
    lookup: bool = True  # draft from the text itself where it repeats
    compile: bool = False  # compile decoding: several times faster, after a minute the first time
    show: str = ""  # drafts: colour accepted drafts; experts: colour by the last layer's top expert
    interactive: bool = False  # ask for one prompt after another
    score: str = ""  # a text file: print its nats per token and bits per byte
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: str = "auto"  # float32, bfloat16, float64; auto is bfloat16 on GPUs that have it


@dataclass
class Stats:
    """What happened during `generate`, all rows together."""

    prefill_seconds: float = 0.0
    seconds: float = 0.0  # without the prompt and without compilation
    rounds: int = 0  # forwards of the main model after the prompt
    lookups: int = 0  # those whose drafts were looked up
    row_rounds: int = 0  # rounds x rows that were not finished
    tokens: int = 0  # new tokens
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)  # by position
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    lengths: list[int] = field(default_factory=lambda: [0] * (MOST_DRAFTS + 1))  # rounds of each
    note: str = ""  # why it ended early


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


# ---- Prefill and rounds --------------------------------------------------------------------------


def span(start: int | Tensor, length: int) -> slice | Tensor:
    """Positions from start on: a slice, or in a graph that serves every start a tensor."""
    if isinstance(start, int):
        return slice(start, start + length)
    return start + torch.arange(length, device=start.device)


class Text:
    """B rows of text and what it takes to continue them. All have n tokens: rows advance together.

    `net` is the model or its ops.Decoder: trunk, predict_next and logits are all that is called.
    """

    def __init__(self, model, tokens: Tensor, size: int, depth: int, temperature, top_k, top_p):
        (B, T), config, like = tokens.shape, model.config, model.embed_tokens.weight
        self.net, self.depth, self.filters = model, depth, (top_k, top_p)
        self.temperature = None  # greedy
        if temperature > 0:
            self.temperature = ops.upcast(like[:0]).new_tensor(temperature)
        self.tokens = F.pad(tokens, (0, size - T))  # (B, size)
        self.cache = Cache(config, len(model.layers), B, size, like)  # all tokens but the newest
        # For the MTP modules: the main model's hidden states, and in how many slots of their cache
        # these and the tokens are true, not drafts.
        self.hidden = like.new_zeros(B, size if depth else 0, like.shape[1])
        self.mtp_cache, self.filled = Cache(config, depth, B, size, like), 0

    def choose(self, logits: Tensor, u: Tensor) -> tuple[Tensor | None, Tensor]:
        """logits (B, V) -> their distribution (B, V), none if greedy, and a token of it (B, 1)."""
        if self.temperature is None:
            return None, logits.argmax(-1, keepdim=True)
        p = probabilities(logits, self.temperature, *self.filters)
        return p, draw(p, u)

    def prefill(self, T: int, chunk: int) -> Tensor:
        """The prompt through the model, `chunk` tokens at once: logits after it (B, V)."""
        for start in range(0, T, chunk):
            end = min(start + chunk, T)
            h = self.net.trunk(self.tokens[:, start:end], self.cache)  # (B, chunk, D)
            logits = self.net.logits(h[:, -1:])[:, 0] if end == T else None
            if self.depth:
                self.hidden[:, start:end] = h
            for k in range(self.depth):
                self.mtp_cache.length = start
                tokens = self.tokens[:, start + k + 1 : end + k + 1]
                h = self.net.predict_next(k, h, tokens, self.mtp_cache)
        self.filled = max(0, T - self.depth)
        return logits

    def draft(self, n: int | Tensor, G: int, u: Tensor) -> list[Tensor | None]:
        """Writes drafts of tokens n .. n+G-1; returns the distributions q they come from, (B, V).

        Slot i of MTP module k (0-based) takes h_i of depth k and token i+k+1, and predicts token
        i+k+2. So slot n-2 of module 0 gives token n, that of module 1 token n+1, and so on; deeper
        drafts come from further slots of the last module, fed with its own output. First the
        modules catch up: W slots up to n-2 replace what was made of rejected drafts.
        """
        start, W, q = self.filled, n - 1 - self.filled, []
        if isinstance(n, Tensor):  # one graph: as many slots as a round can leave behind
            W = G + self.depth
            start = (n - 1 - W).clamp(min=0)
        h = self.hidden[:, span(start, W)]
        for j in range(max(G, self.depth)):
            k = min(j, self.depth - 1)
            here = span(start + k + 1, W) if j == k else span(n - 1 + j, 1)
            self.mtp_cache.length = start if j == k else n - 1 + j - self.depth
            h = self.net.predict_next(k, h, self.tokens[:, here], self.mtp_cache)
            last = h[:, span(n - 2 - start, 1)] if j == k else h  # (B, 1, D)
            if j < G:
                p, token = self.choose(self.net.logits(last)[:, 0], u[:, j : j + 1])
                self.tokens[:, span(n + j, 1)] = token
                q.append(p)
            if j >= self.depth - 1:
                h = last
        return q

    def play(self, n: int | Tensor, G: int, u: Tensor, looked_up: bool) -> Tensor:
        """One round: drafts, one forward of the model, and tokens n .. n+G are written.

        u (B, 2G+1) is uniform in [0, 1). Returns how many drafts each row keeps, then its tokens,
        of which kept + 1 are true: (B, 1 + G+1).
        """
        q = [] if looked_up or G == 0 else self.draft(n, G, u)
        fresh = self.tokens[:, span(n - 1, G + 1)]  # (B, G+1): the newest token and the drafts
        self.cache.length = n - 1
        h = self.net.trunk(fresh, self.cache)
        if self.depth:
            self.hidden[:, span(n - 1, G + 1)] = h
        logits, drafts = self.net.logits(h), fresh[:, 1:]  # (B, G+1, V), (B, G)
        if self.temperature is None:
            out = logits.argmax(-1)  # (B, G+1)
            kept = (out[:, :-1] == drafts).long().cumprod(1).sum(1)  # (B,)
        elif G == 0:
            _, out = self.choose(logits[:, 0], u)
            kept = torch.zeros_like(out[:, 0])
        else:
            p = probabilities(logits, self.temperature, *self.filters)
            # What is looked up is certain: its q is 1.
            q = torch.stack(q, 1) if q else F.one_hot(drafts, p.shape[-1]).to(p.dtype)
            kept, token = accept(p, q, drafts, u[:, G:])
            after = torch.arange(G + 1, device=kept.device) == kept[:, None]
            out = torch.where(after, token, F.pad(drafts, (0, 1)))
        self.tokens[:, span(n, G + 1)] = out
        return torch.cat((kept[:, None], out), 1)


def look_up(ids: list[int], follows: dict[tuple, int], G: int) -> list[int] | None:
    """Prompt lookup: the G tokens that followed when the last MATCH ones stood there before."""
    if (start := follows.get(tuple(ids[-MATCH:]))) is None:
        return None
    found = ids[start : start + G]
    for i in range(G):  # it may run into what it has just copied
        found.append(found[i])
    return found[:G]


def agree(model: DeepSeekV3, fast, tokens: Tensor, cache: Cache, logits: Tensor) -> bool:
    """Whether ops.Decoder gives the logits that model.py's formulas gave after the prompt.

    A prompt of a few tokens would hide much: then the two meet on a made-up text.
    """
    if tokens.shape[1] < 8:
        tokens = torch.arange(16, device=tokens.device)[None] % model.config.vocab_size
        cache = Cache(model.config, len(model.layers), 1, 16, model.norm.weight)
        logits = model.logits(model.trunk(tokens, cache)[:, -1])
    cache.length = tokens.shape[1] - 1
    try:
        difference = fast.logits(fast.trunk(tokens[:, -1:], cache))[:, 0] - logits
    except (RuntimeError, TypeError, ValueError):  # a changed module may want other inputs
        return False
    rounding = 1e-3 if torch.finfo(model.norm.weight.dtype).bits >= 32 else 0.1
    return bool(difference.norm() <= rounding * logits.norm())


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
    on_token: Callable[[int, list[int], int], None] = lambda row, ids, drafted: None,
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
    check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, speculative)
    (B, T), limit, stats = tokens.shape, model.config.max_position_embeddings, stats or Stats()
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    new = min(max_new_tokens, limit - T)
    if new < max_new_tokens:
        stats.note = f"stopped at the context limit of {limit} tokens (max_position_embeddings)"
    most = MOST_DRAFTS if speculative == "auto" else int(speculative)
    depth, lookup = len(model.mtp) if most else 0, lookup and most > 0
    pace = Pace(most if depth else 0, new) if speculative == "auto" else None
    # Room for a last round that goes too far. A graph serves one size: compiled there are few.
    size = T + new + MOST_DRAFTS + depth + 1
    size = max(256, 1 << (size - 1).bit_length()) if compile else size
    text = Text(model, tokens, size, depth, temperature, top_k, top_p)

    def uniform(count: int) -> Tensor:
        like = ops.upcast(model.norm.weight[:0])
        return torch.rand(B, count, dtype=like.dtype, device=like.device, generator=generator)

    began = time.perf_counter()
    scores = B * T * model.config.num_attention_heads  # attention's, of one token: 1 GB at once
    logits = text.prefill(T, chunk=max(1, min(512, 2**26 // scores)))  # (B, V)
    if not logits.isfinite().all():
        raise ValueError("the logits after the prompt are not finite: the weights are damaged")
    fast = ops.decoder(model)
    if fast and agree(model, fast, tokens, text.cache, logits):
        text.net = fast
    elif ops.enabled:
        text.cache.length = T - 1  # where the Decoder may have left its own latents
        model.trunk(tokens[:, -1:], text.cache)
        info("ops.Decoder gives other logits than model.py, by whose formulas decoding goes on")
    compile = compile and text.net is fast
    _, token = text.choose(logits, uniform(1))
    text.tokens[:, T : T + 1], result = token, [[0, *row] for row in token.tolist()]
    stats.prefill_seconds = time.perf_counter() - began

    n, G, rows, follows = T, 0, tokens.tolist(), [{} for _ in range(B)]
    live = list(range(B)) if new > 0 else []
    while live:
        # Emit what came out: all rows advance by the least number of tokens. One that keeps more
        # drafts emits a draft in the place where another has its replacement.
        advance = 1 + min(result[b][0] for b in live)
        for b in list(live):
            kept, *ids = result[b]
            ids = ids[: min(advance, T + new - n)]
            stop = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
            rows[b] += ids[:stop]
            for i in range(n if n > T else MATCH, len(rows[b])):
                follows[b][tuple(rows[b][i - MATCH : i])] = i
            if ids[stop - 1] in eos or len(rows[b]) == T + new:
                live.remove(b)
            on_token(b, ids[:stop], min(kept, stop))
            stats.tokens += stop
            for j in range(G):
                stats.drafted[j] += 1
                stats.accepted[j] += kept > j
        n += advance
        if not live:
            break
        began = time.perf_counter()
        G, found = (pace.G if pace else most) if depth else 0, [None]
        if lookup and (pace is None or pace.may_look_up()):
            found = [
                look_up(rows[b], follows[b], most) if b in live else [0] * most for b in range(B)
            ]
        if looked_up := all(found):
            G, text.tokens[:, n : n + most] = most, torch.tensor(found, device=tokens.device)
        u = uniform(2 * G + 1)
        if compile:
            play, waited = compiled(text, n, G, u, looked_up)
            began += waited
            result = play(text, torch.tensor(n, device=tokens.device), G, u, looked_up).tolist()
        else:
            result = text.play(n, G, u, looked_up).tolist()
        if G and not looked_up:
            text.filled = max(0, n - depth)
        elif depth and (pace is None or pace.G) and n - text.filled > 256:
            text.draft(n, 0, u)  # after many lookups: the MTP modules must not fall far behind
            text.filled = max(0, n - depth)
        seconds = time.perf_counter() - began
        stats.seconds += seconds
        stats.rounds += 1
        stats.row_rounds += len(live)
        stats.lookups += looked_up
        stats.lengths[G] += 1
        if pace:
            pace.learn(G, looked_up, seconds, 1 + min(result[b][0] for b in live))
    pad = [row + eos[:1] * (T + new - len(row)) for row in rows]
    return torch.tensor(pad, device=tokens.device)


class Pace:
    """speculative="auto": plain rounds first, then one draft more while that pays, then the best.

    Speculation has an allowance, a fiftieth of the text, which falls by what drafts cost more than
    they gave and rises by what they gained, in tokens. When it is spent, decoding goes on plainly:
    so auto hardly loses anything. The choice never sees the tokens it is made for.
    """

    TRIAL = 6  # rounds

    def __init__(self, most: int, new: int):
        self.most, self.allowance, self.plain = most, new / 50, 0.0
        self.G, self.trial, self.rates = 0, [], []

    def may_look_up(self) -> bool:
        return self.plain > 0 and self.allowance > 0

    def learn(self, G: int, looked_up: bool, seconds: float, tokens: int):
        """A round took so long and gave so many tokens per row."""
        if G:
            self.allowance -= seconds / self.plain - tokens
        if self.allowance <= 0:
            self.G, self.trial = 0, None
        if looked_up or self.trial is None:
            return
        self.trial.append((seconds, tokens))
        if len(self.trial) == self.TRIAL:
            took, gave = zip(*self.trial, strict=True)
            self.plain = self.plain or statistics.median(took)
            self.rates.append(sum(gave) / self.TRIAL / statistics.median(took))
            best = self.rates.index(max(self.rates))
            more = best == G < self.most
            self.G, self.trial = (G + 1, []) if more else (best, None)


def compiled(text: Text, n: int, G: int, u: Tensor, looked_up: bool) -> tuple[Callable, float]:
    """Text.play as one graph for every n, and the seconds it took to compile if it is the first of
    its kind."""
    began, device, graphs = time.perf_counter(), u.device, text.net.graphs
    if G and not looked_up and n - 1 - text.filled > G + text.depth:
        text.draft(n, 0, u)  # after plain rounds the MTP modules have more to catch up with
    greedy = text.temperature is None
    key = (*text.tokens.shape, text.depth, G, looked_up, greedy, *text.filters)
    if key in graphs:
        return graphs[key], 0.0
    # Without guards, as checking a few hundred tensors would take as long as the step. And as
    # torch.compile keeps graphs with the code of a function, each has its own copy of that.
    play = types.FunctionType(Text.play.__code__.replace(), globals())
    options = {"triton.cudagraphs": True}
    if device.type == "cpu":
        options = dict(cpp_wrapper=True, size_asserts=False, alignment_asserts=False)
    options |= {"guard_filter_fn": lambda guards: [False] * len(guards)}
    play = torch.compile(play, fullgraph=True, dynamic=False, options=options)
    done = threading.Event()

    def show():
        while not done.wait(1):
            print(f"\rcompiling: {time.perf_counter() - began:.0f} s", end=" ", file=sys.stderr)

    clock = threading.Thread(target=show, daemon=True)
    clock.start()
    try:
        for _ in range(3):  # with the same result; a GPU records its graph in the second
            play(text, torch.tensor(n, device=device), G, u, looked_up)
    except torch._inductor.exc.InductorError as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"--compile cannot be used here ({reason}); leave it out") from None
    finally:
        done.set()
        clock.join()
        info("")
    graphs[key] = play
    return play, time.perf_counter() - began


def check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, speculative):
    """Raises ValueError, with one sentence, for a call of `generate` that cannot be served."""
    V, limit, T = model.config.vocab_size, model.config.max_position_embeddings, tokens.shape[1]
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty; begin with the end-of-text token")
    low, high = tokens.min().item(), tokens.max().item()
    drafts = speculative == "auto" or speculative in range(MOST_DRAFTS + 1)
    for ok, sentence in (
        (limit >= T, f"the prompt has {T} tokens, but the context ends at {limit}; shorten it"),
        (0 <= low <= high < V, f"token ids go from {low} to {high}, but must be 0 to {V - 1}"),
        (max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}, but must be 0 or more"),
        (0 <= temperature < math.inf, f"temperature is {temperature}, but must be 0 or more"),
        (top_k is None or top_k >= 1, f"top_k is {top_k}, but must be at least 1, or none"),
        (top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, but must be in (0, 1], or none"),
        (drafts, f"speculative is {speculative!r}, but must be 0 to {MOST_DRAFTS}, or 'auto'"),
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

    def write(self, text: str, style: str = ""):
        self.text += f"\033[{style}m{text}\033[0m" if text and style and self.colour else text
        if self.live:
            print(self.text, end="", flush=True)
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
    gates, seen = [x.mlp.gate for x in model.layers if hasattr(x.mlp, "gate")], []
    if not gates:
        raise ValueError("this model has no routed experts to show")
    hook = gates[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        model(torch.tensor([ids], device=model.norm.weight.device))
    hook.remove()
    _, chosen, gain = seen[0]  # (1, T, K) each
    return chosen.gather(-1, gain.argmax(-1, keepdim=True)).flatten().tolist()


def report(model: DeepSeekV3, stats: Stats, rows: int):
    """What the run measured, on stderr."""
    tokens = stats.tokens - rows  # the prompt's forward gave the first ones
    if stats.seconds:
        rate = f"{stats.tokens} tokens, {tokens / stats.seconds:.1f} tokens/s"
        info(f"{rate}, {stats.prefill_seconds:.2f} s to the first token")
    if any(stats.drafted):
        shares = [f"{a / d:.0%}" for a, d in zip(stats.accepted, stats.drafted, strict=True) if d]
        used = ", ".join(f"{g}: {r}" for g, r in enumerate(stats.lengths) if r)
        info(f"drafts accepted, by position: {' '.join(shares)}; rounds by draft length: {used}")
        looked_up = f"{stats.lookups} of {stats.rounds} rounds looked up"
        info(f"{tokens / stats.row_rounds:.2f} tokens per forward, {looked_up}")
    size = model.norm.weight.element_size()
    ours, mha = (n * size for n in model.config.cache_numbers())
    times = f"{mha:,} ({mha / ours:.1f} times as much)"
    info(f"cache: {ours:,} bytes per token; multi-head attention would hold {times}")
    if stats.note:
        info(f"note: {stats.note}")


# ---- The command ---------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """The text of a file, or of standard input where the path is -."""
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
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = ("bfloat16" if fast else "float32") if config.dtype == "auto" else config.dtype
    return device, getattr(torch, dtype)


def complete(model: DeepSeekV3, tokenizer: Tokenizer, prompt: str, config: SampleConfig):
    """Writes num_samples continuations of the prompt to stdout, the first as it comes."""
    device, N = model.norm.weight.device, config.num_samples
    ids = tokenizer.encode(prompt) or tokenizer.eos[:1]
    if not ids:
        raise ValueError("the prompt is empty and this tokenizer has no end-of-text token")
    by_expert = config.show == "experts"  # looked up when the text is complete
    colour = sys.stdout.isatty() and config.show != ""
    writers, texts = [Writer(tokenizer, b == 0, colour) for b in range(N)], [[] for _ in range(N)]

    def on_token(row: int, new: list[int], drafted: int):
        if not by_expert:
            writers[row].write("" if texts[row] else prompt)
            writers[row].add(new, ["32"] * drafted + [""] * (len(new) - drafted))
        texts[row] += new

    stats, experts, interrupted = Stats(), set(), False
    try:
        generate(
            model, torch.tensor([ids] * N, device=device), config.max_new_tokens,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            speculative="auto" if config.draft == "auto" else int(config.draft),
            lookup=config.lookup, compile=config.compile, eos_token_id=tokenizer.eos,
            generator=torch.Generator(device).manual_seed(config.seed), on_token=on_token,
            stats=stats,
        )  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
    for b, writer in enumerate(writers):
        writer.text = f"{'-' * 80}\n{writer.text}" if b else ""
        if by_expert:
            chosen = top_experts(model, ids + texts[b])
            writer.add(ids + texts[b], [style_of(e) for e in chosen])
            experts.update(chosen)
        writer.close()
    legend = " ".join(f"\033[{style_of(e)}m{e}\033[0m" for e in sorted(experts))
    legend = (
        f"experts of the last layer: {legend}" if by_expert else "\033[32mgreen\033[0m: drafted"
    )
    if config.show:
        info(legend if colour else "no colours, as the output is not a terminal")
    report(model, stats, N)
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
    nats, count = score(model, ids, window), len(ids) - 1
    bits = nats / math.log(2) / len(document.encode())
    print(
        f"{path}: {count:,} tokens, {nats / count:.4f} nats/token, {bits:.4f} bits/byte, ", end=""
    )
    print(f"context {window // 2} to {window - 1} tokens except at the beginning")


def main(argv: list[str]):
    text = "Write text with a trained model: python sample.py out/small [--key=value]"
    ckpt, values = parse_args(text, argv, SampleConfig, positional="ckpt")
    config = SampleConfig(**values)
    if not (ckpt := ckpt or config.ckpt):
        info("usage: name a checkpoint, for example: python sample.py out/small")
        sys.exit(2)
    for name, allowed in (
        ("show", ("", "drafts", "experts")),
        ("draft", ("auto", *map(str, range(MOST_DRAFTS + 1)))),
        ("dtype", ("auto", "float32", "bfloat16", "float64")),
    ):
        if (value := getattr(config, name)) not in allowed:
            raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}")
    if config.num_samples < 1:
        raise ValueError(f"num_samples is {config.num_samples}, but must be at least 1")
    others = sorted({"prompt", "prompt_file", "interactive", "show"} & values.keys())
    if config.score and others:
        raise ValueError(f"--score measures a text and writes none: leave out --{others[0]}")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    prompt, piped = config.prompt, not ("prompt" in values or sys.stdin.isatty())
    if not (config.score or config.interactive) and (config.prompt_file or piped or prompt == "-"):
        prompt = read_text(config.prompt_file or "-")
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
