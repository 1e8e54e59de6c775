"""Write text with a trained model: python sample.py out/small --prompt="def main(".

Decoding is speculative: the MTP module, or the text itself where it repeats, drafts a few tokens,
one forward of the model checks them all, and what is kept follows exactly the distribution of plain
sampling (Leviathan et al., arXiv 2211.17192). Text goes to stdout, everything else to stderr.

Shapes: B rows (sequences decoded together), T prompt length, G drafts in a round, V vocabulary,
D hidden, W slots of an MTP module's cache that a round fills.
"""

import codecs
import contextlib
import copy
import math
import statistics
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import fp8
import ops
from config import info, parse_args, run_command
from huggingface import Tokenizer, load_model
from model import Cache, DeepSeekV3
from ops import fast_dtype, span

MOST_DRAFTS = 4
MATCH = 3  # tokens that prompt lookup finds again
AUTO_DRAFTS = 2  # of the modules in a round, with --draft=auto
PLAIN_ROUNDS = 4  # whose time --draft=auto measures before it drafts
GREEN = "32"
PALETTE = (160, 34, 172, 33, 134, 37, 99, 204)  # neither bright nor dark: legible on any ground


@dataclass
class SampleConfig:
    ckpt: str = "out/small"  # a run (best.pt, else ckpt.pt), a file, or a Hugging Face directory
    prompt: str = ""  # the text to go on from; without it what is piped in, or a new document
    num_samples: int = 1  # texts from the same prompt, decoded together
    max_new_tokens: int = 256  # where a text ends at the latest
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = 200  # sample among the k likeliest tokens; none: among all
    top_p: float | None = None  # among the fewest tokens that have this much probability
    seed: int = 1337  # with a fixed --draft it fixes the text; auto follows the clock
    draft: Literal["auto", 0, 1, 2, 3, 4] = "auto"  # drafts in a round; auto: 2 while they pay
    lookup: bool = True  # draft from the text itself where it repeats
    compile: bool = False  # several times faster, after up to a minute for each number of drafts
    show: Literal["", "drafts", "experts"] = ""  # accepted drafts in green; experts in colours
    interactive: bool = False  # ask for one prompt after another
    score: str = ""  # a text file: print its nats per token and bits per byte
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # bfloat16 where a GPU has it


@dataclass
class Stats:
    """What happened during `generate`, all rows together."""

    seconds: float = 0.0  # without the prompt and without compilation
    tokens: int = 0  # new ones
    rounds: int = 0  # forwards of the main model after the prompt's
    lookups: int = 0  # those whose drafts were looked up
    # By position: drafts with room in the text, and those of them that are in it. (Of several rows
    # one that keeps more drafts than another has the rest rejected, too: rows advance together.)
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    note: str = ""  # what its reader should know


# ---- Sampling ------------------------------------------------------------------------------------


def drawing_device(device: torch.device) -> torch.device:
    """Where tokens are drawn, in float64: on the model's device, or, as Apple's GPUs lack float64,
    on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def uniform(B: int, G: int, device: torch.device, generator=None) -> Tensor:
    """What a round with G drafts draws with: (B, 2G+1) uniform in [0, 1), in float64."""
    where = drawing_device(device)
    return torch.rand(B, 2 * G + 1, dtype=torch.float64, device=where, generator=generator)


def probabilities(logits: Tensor, temperature, top_k=None, top_p=None) -> Tensor:
    """Temperature, then top-k, then top-p: logits (..., V) -> probabilities (..., V) in float64.

    Tokens that tie with the k-th likeliest all stay, as in transformers.
    """
    logits = logits.double() / temperature
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
    """From each of the distributions p (B, T, V) the token where its sum passes u (B, T) in [0, 1).

    A rounded sum over a large vocabulary misses the distribution, in float32 by up to 1e-3; a
    GPU's, added up in parallel, may even rise where p is 0, or fall. So probabilities become whole
    numbers of 2^-52, which float64 adds without rounding, in any order. Then every token has its
    probability up to 2^-52, and none if that is 0.
    """
    p = p.double()
    total = (p / p.sum(-1, keepdim=True) * 2.0**52).floor().cumsum(-1)  # (B, T, V)
    token = torch.searchsorted(total, u[..., None] * total[..., -1:], right=True).squeeze(-1)
    return token.clamp(max=p.shape[-1] - 1)  # it is past the end only where p is not finite


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
    p, q = p[rows, kept], F.pad(q, (0, 0, 0, 1))[rows, kept]  # (B, V): without a draft q is 0
    rest = (p - q).clamp(min=0)
    # Where p and q differ by rounding only, nothing may be left of p - q.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)
    return kept, draw(rest[:, None], u[:, -1:])


# ---- A round: draft, verify, accept --------------------------------------------------------------


class Text:
    """B rows of text and what it takes to continue them. All have n tokens: rows advance together.

    The prompt, tokens (B, T), goes through the model, the rest through `net`: the model's
    ops.Decoder or the model, of which only trunk, predict_next and logits are called.
    """

    def __init__(self, model, tokens: Tensor, new: int, depth: int, compile: bool, filters: tuple):
        (B, T), config, like = tokens.shape, model.config, model.norm.weight
        temperature, top_k, top_p = filters
        # Logits divided by less would be infinite.
        self.greedy, self.depth, self.net = temperature < 1e-6, depth, model
        # A tensor, so that a graph serves every temperature.
        where = drawing_device(tokens.device)
        self.filters = torch.tensor(temperature, dtype=torch.float64, device=where), top_k, top_p
        self.recorded = set()  # the kinds of rounds that CUDA has recorded with this text's tensors
        # Room for a last round that goes too far. A graph serves one size: compiled there are few.
        size = T + new + MOST_DRAFTS + depth + 1
        size = max(256, 1 << (size - 1).bit_length()) if compile else size
        self.tokens = F.pad(tokens, (0, size - T))  # (B, size)
        # Of all tokens; the newest one's place is written again in every round.
        self.cache = Cache(config, len(model.layers), B, size, like)
        h = model.trunk(tokens, self.cache)
        # For the MTP modules: the main model's hidden states, and in how many slots of their cache
        # these and the tokens are true, not drafts.
        self.hidden = F.pad(h, (0, 0, 0, size - T)) if depth else None  # (B, size, D)
        self.mtp_cache, self.filled = Cache(config, depth, B, size, like), 0
        # So many are filled at once, behind a long text, that attention's scores take 256 MB.
        self.most = max(MOST_DRAFTS + depth, 2**26 // (B * size * config.num_attention_heads))
        self.catch_up(T - 1 - depth, T)  # those of the prompt together, with no text before them
        self.net = decoder_or_model(model, tokens, h, self.cache, compile)
        self.compile = compile and self.net is not model
        self.kind = str(config), like.dtype, like.device, B, size, depth, self.greedy, top_k, top_p

    def catch_up(self, end: int, most: int):
        """The MTP modules fill their slots up to `end`, at most so many at once: drafting's first
        half, with no draft."""
        while self.depth and self.filled < end:
            start, self.filled = self.filled, min(self.filled + most, end)
            self.draft(self.filled + 1, 0, self.filled - start)

    def draft(self, n: int | Tensor, G: int, W: int, u: Tensor | None = None) -> Tensor | None:
        """The MTP modules fill slots n-1-W .. n-2 and write drafts of tokens n .. n+G-1. Returns
        the distributions q these come from (B, G, V), nothing if greedy.

        Slot i of module k (from 0) takes h_i of depth k and token i+k+1 and predicts token i+k+2.
        So slot n-2 of module 0 gives token n, that of module 1 token n+1, and so on; deeper drafts
        come from further slots of the last module, fed with its own output.
        """
        start, q = n - 1 - W, []
        h = self.hidden[:, span(start, W)]
        for j in range(max(G, self.depth)):
            k = min(j, self.depth - 1)
            if j > k:
                start, W, h = n - 2 + j - k, 1, h[:, -1:]
            self.mtp_cache.length = start
            h = self.net.predict_next(k, h, self.tokens[:, span(start + k + 1, W)], self.mtp_cache)
            if j < G:
                logits = self.net.logits(h[:, -1:]).to(u.device)  # (B, 1, V)
                if not self.greedy:
                    q.append(probabilities(logits, *self.filters))
                token = draw(q[j], u[:, j : j + 1]) if q else logits.argmax(-1)
                self.tokens[:, span(n + j, 1)] = token.to(h.device)
        return torch.cat(q, 1) if q else None

    def round(self, n: int | Tensor, G: int, W: int, u: Tensor) -> Tensor:
        """Drafts, one forward of the model, and tokens n .. n+G are written.

        W is 0 where the modules draft nothing, u (B, 2G+1) uniform in [0, 1). Returns how many
        drafts each row keeps, then its tokens, of which kept + 1 are true: (B, 1 + G+1).
        """
        q = self.draft(n, G, W, u) if W else None
        fresh = self.tokens[:, span(n - 1, G + 1)]  # (B, G+1): the newest token and the drafts
        self.cache.length = n - 1  # so rejected drafts are forgotten
        h = self.net.trunk(fresh, self.cache)
        if self.depth:
            self.hidden[:, span(n - 1, G + 1)] = h
        logits = self.net.logits(h).to(u.device)  # (B, G+1, V)
        drafts = fresh[:, 1:].to(u.device)  # (B, G)
        p = None if self.greedy else probabilities(logits, *self.filters)
        if q is None:  # looked up or greedy: kept where the model says the same
            out = logits.argmax(-1) if self.greedy else draw(p, u[:, G:])  # (B, G+1)
            kept = (out[:, :-1] == drafts).long().cumprod(1).sum(1)  # (B,)
        else:
            kept, token = accept(p, q, drafts, u[:, G:])
            out = F.pad(drafts, (0, 1)).scatter(1, kept[:, None], token)
        self.tokens[:, span(n, G + 1)] = out.to(h.device)
        return torch.cat((kept[:, None], out), 1)

    def play(self, n: int, G: int, u: Tensor, looked_up: bool) -> tuple[list, float]:
        """A round, eager or as a graph: its outcome and the seconds without compilation."""
        graph = self.compile and n > G + self.depth
        # The slots still to fill; in a graph, where W is fixed, the most that a round can leave.
        W = G + self.depth if graph else min(n - 1 - self.filled, self.most)
        W = 0 if looked_up or G == 0 else W
        position = torch.tensor(n, device=self.tokens.device) if graph else n
        round = compiled(self, position, G, W, u) if graph else Text.round
        began = time.perf_counter()
        if W:
            self.catch_up(n - 1 - W, self.most)
            self.filled = max(0, n - self.depth)  # after the round
        outcome = round(self, position, G, W, u).tolist()
        return outcome, time.perf_counter() - began


GRAPHS = {}  # compiled rounds; they serve every text of their size and every model of their kind


def compiled(text: Text, n: Tensor, G: int, W: int, u: Tensor) -> Callable:
    """Text.round as one graph for every n: compiled here if it is the first of its kind.

    A CUDA graph is that round recorded with the addresses of one text's tensors. Before it replays
    one, torch compares the addresses; where they are others, it records another, without compiling
    (mark_static_address, cudagraph_trees.py). So a text's first round of a kind is run here once
    more than needed, where no clock counts the recording. Recordings stay as long as the process.
    """
    key, on_cpu = (*text.kind, G, W), text.tokens.device.type == "cpu"
    graph, runs = GRAPHS.get(key), 0
    if graph is None:
        # Without guards, as checking a few hundred tensors would take as long as the step. And as
        # torch.compile keeps graphs with the code of a function, each has its own copy of that.
        graph = types.FunctionType(Text.round.__code__.replace(), globals())
        if on_cpu:
            options = dict(cpp_wrapper=True, size_asserts=False, alignment_asserts=False)
        else:
            options = {"triton.cudagraphs": True}
            # CUDA graphs are skipped where an input is written to, unless its address is fixed.
            parts = (text, text.cache, text.mtp_cache, text.net, *text.net.layers, *text.net.mtp)
            for x in torch.utils._pytree.tree_leaves([vars(part) for part in parts]):
                if isinstance(x, Tensor):
                    torch._dynamo.mark_static_address(x)
        options |= {"guard_filter_fn": lambda guards: [False] * len(guards)}
        graph = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
        info("compiling a round of decoding, which may take a minute")
        runs = 3  # a GPU records in the second
    elif not on_cpu and (G, W) not in text.recorded:
        runs = 1
    began, tokens = time.perf_counter(), text.tokens.clone() if runs else None
    try:
        for _ in range(runs):
            graph(text, n, G, W, u)
            text.tokens.copy_(tokens)  # the outcome stands where drafts were looked up
    except torch._dynamo.exc.ShortenTraceback as error:
        reason = str(error)[:200]
        raise ValueError(f"--compile cannot be used here ({reason}); leave it out") from None
    text.recorded.add((G, W))
    if key not in GRAPHS:
        GRAPHS[key] = graph
        info(f"compiled in {time.perf_counter() - began:.0f} s")
    return graph


# ---- Whole texts ---------------------------------------------------------------------------------


def look_up(row: str, G: int) -> list[int]:
    """The G tokens that followed a row's last MATCH ones where they stood before; none if those are
    new. Each token is a character of the row, since nothing is searched faster than text."""
    start = row.rfind(row[-MATCH:], 0, -1) + MATCH
    # What is copied may go on into its own copy.
    return [ord(x) for x in (row[start : start + G] * G)[:G]] if start >= MATCH else []


class Pace:
    """Whether to draft. With --draft=auto, drafts of either kind rest while they are behind plain
    rounds by more than a token or two and half a percent of the text."""

    def __init__(self, auto: bool):
        self.auto, self.plain = auto, []  # seconds of plain rounds
        self.drafted = {False: [], True: []}  # of rounds with the modules' drafts, with lookup
        self.won = {False: 1.5, True: 0.5}  # tokens, by the modules' drafts and by lookup

    def allows(self, looked_up: bool) -> bool:
        known = len(self.plain) >= PLAIN_ROUNDS
        return not self.auto or (known and self.won[looked_up] >= 0)

    def learn(self, G: int, looked_up: bool, seconds: float, tokens: int):
        """A round with G drafts took so long and gave so many tokens per row."""
        times = self.drafted[looked_up] if G else self.plain
        times.append(seconds)
        if G and self.plain:
            cost = statistics.median(times[-16:]) / statistics.median(self.plain[-16:])
            self.won[looked_up] += tokens - cost
        self.won = {kind: won + tokens / 200 for kind, won in self.won.items()}


DECODERS = weakref.WeakKeyDictionary()  # model -> {compiled: (what it was made of, Decoder)}
# Fused optimisers change weights without raising their _version.
register_optimizer_step_post_hook(lambda *_: DECODERS.clear())
COPIED_TO_FLOAT64 = 2**28  # parameters of a model that compare_forms may copy: 2 GB
COMPARED = weakref.WeakKeyDictionary()  # edited model -> the edits with which its forms agreed


def decoder_or_model(model: DeepSeekV3, tokens: Tensor, h: Tensor, cache: Cache, compiled: bool):
    """The model's ops.Decoder, kept or made anew, or the model itself, with a notice, where the
    Decoder is not a copy of it. The cache holds the tokens (B, T), h (B, T, D) are their hidden
    states. Raises ValueError where weights are damaged or the edited model cannot decode."""
    logits = model.logits(h[:, -1:])
    if not logits.isfinite().all():
        raise ValueError("the logits after the prompt are not finite: the weights are damaged")
    if not ops.enabled:  # in tests
        return model
    edit = ops.not_as_copied(model)
    if edit or ops.edited_forward(model):
        state = ops.state_of(model)
        if COMPARED.get(model) != state:
            if not any(isinstance(m, fp8.FP8Linear) for m in model.modules()):  # rounds too much
                compare_forms(model)
            COMPARED[model] = state
            if edit:
                info(f"{edit} is not what ops.Decoder copies, so model.py decodes, slower")
    if edit:
        DECODERS.pop(model, None)
        return model
    if tokens.shape[1] < 8:  # too few to show much: compare on a made-up text
        tokens = torch.arange(16, device=tokens.device)[None] % model.config.vocab_size
        cache = Cache(model.config, len(model.layers), 1, 16, model.norm.weight)
        logits = model.logits(model.trunk(tokens, cache)[:, -1:])
    made_of = [str(model.config), *map(id, (*model.layers, *model.mtp, *model.modules()))]
    for p in model.parameters():  # tensors of inference mode do not count their versions
        made_of += [p.data_ptr(), None if p.is_inference() else p._version]
    rounding = 1e-3 if torch.finfo(model.norm.weight.dtype).bits >= 32 else 0.2
    kept = DECODERS.setdefault(model, {})
    for _ in range(2):
        if compiled not in kept or kept[compiled][0] != made_of:
            kept.pop(compiled, None)  # before there are two
            kept[compiled] = made_of, ops.Decoder(model, compiled)
        decoder = kept[compiled][1]
        cache.length = tokens.shape[1] - 1
        difference = decoder.logits(decoder.trunk(tokens[:, -1:], cache)) - logits
        if difference.norm() <= rounding * logits.norm():
            return decoder
        kept.clear()  # an edit through p.data has changed the weights, but not their versions
    ops.tell("the logits of ops.Decoder are not model.py's, whose formulas decode instead, slower")
    return model


def compare_forms(model: DeepSeekV3):
    """Raises ValueError if model.py computes other logits with a cache than without one.

    They differ if only one of `attend_expanded` (training, prompts) and `attend_absorbed` (all that
    follows) was edited, or if a layer reads tokens that are not in the cache.
    """
    low = torch.finfo(model.norm.weight.dtype).bits < 32
    error = None
    if sum(p.numel() for p in model.parameters()) <= COPIED_TO_FLOAT64:
        # A copy in float64, where hardly anything is rounded, so that no token goes to other
        # experts. Its matrices are drawn large: in a young network a wrong formula hardly shows.
        with torch.inference_mode(False), torch.no_grad():
            exact = copy.deepcopy(model).eval().to("cpu", torch.float64)
            generator = torch.Generator().manual_seed(0)
            for p in exact.parameters():
                if p.ndim > 1:
                    p.normal_(0, 2 * p.shape[-1] ** -0.5, generator=generator)
        with contextlib.suppress(RuntimeError):  # a patch may know only the model's own dtype
            error, rounding = errors_of_forms(exact).max().item(), 1e-4
    try:
        if error is None:
            error, rounding = errors_of_forms(model).median().item(), 0.2 if low else 1e-3
    except RuntimeError as cause:
        raise ValueError(
            f"model.py cannot read a text in pieces, as decoding does ({cause})"
        ) from None
    if not error < rounding:
        raise ValueError(
            f"with a cache model.py computes other logits than without ({error:.2g} of their "
            "size): edit attend_expanded and attend_absorbed alike; and no layer may look at "
            "tokens that the cache does not hold, or draw random numbers"
        )


def errors_of_forms(model: DeepSeekV3) -> Tensor:
    """A made-up text is read twice: whole, and with a cache: a prompt, single tokens, two drafts
    that are rejected, several tokens at once. Errors of the logits of all but the prompt."""
    like, config = model.norm.weight, model.config
    T = min(256, config.max_position_embeddings)
    if T == 1:  # nothing follows a prompt
        return like.new_zeros(1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, T), generator=generator).to(like.device)
    cache = Cache(config, len(model.layers), 2, T + 2, like)
    prompt, singles = T // 2, min(8, T - T // 2)
    pieces = tokens.split([prompt, *[1] * singles, T - prompt - singles], 1)
    with torch.autocast(like.device.type, enabled=False):
        expected = model(tokens)[:, prompt:]  # (2, T - prompt, V)
        read, last = [], pieces[-1]
        for piece in pieces[:-1]:
            read.append(model.logits(model.trunk(piece, cache)))
        model.trunk(tokens[:, :2], cache)
        cache.length -= 2
        if last.shape[1]:
            read.append(model.logits(model.trunk(last, cache)))
    difference = torch.cat(read, 1)[:, prompt:] - expected
    tiny = torch.finfo(like.dtype).tiny
    return difference.norm(dim=-1) / expected.norm(dim=-1).clamp(min=tiny)


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

    speculative: drafts per round, 0 to 4, or "auto": 2, or 4 looked up, where that pays. lookup:
    draft from the text itself where its last tokens stood before. compile: rounds become graphs. A
    row that reaches eos_token_id (one or several) is padded with it. At max_position_embeddings
    decoding stops with a note, so `new` may be smaller. generator: one of drawing_device(the
    tokens' device). on_token(row, ids, drafted) sees new tokens as they come, the first `drafted`
    of them accepted drafts. stats is filled in.
    """
    check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, speculative)
    (B, T), auto, stats = tokens.shape, speculative == "auto", stats or Stats()
    end = min(T + max_new_tokens, model.config.max_position_embeddings)
    copied, drafts = (MOST_DRAFTS, AUTO_DRAFTS) if auto else [int(speculative)] * 2
    # Compiled on a CPU drafts gain little and every number of them compiles for up to a minute.
    if not model.mtp or (auto and compile and tokens.device.type == "cpu"):
        drafts = 0
    depth = len(model.mtp) if drafts else 0
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    rows = ["".join(map(chr, ids)) for ids in tokens.tolist()]  # a character for every token
    live = list(range(B))  # the rows that go on

    text = Text(model, tokens, end - T, depth, compile, (temperature, top_k, top_p))
    n, pace = T, Pace(auto)
    while live and n < end:
        may = lookup and pace.allows(looked_up=True)
        found = [look_up(rows[b], copied) if may else [] for b in live]
        looked_up = all(found)
        if looked_up:
            text.tokens[live, n : n + copied] = torch.tensor(found, device=tokens.device)
        draft = n > 1 and pace.allows(looked_up=False)  # one token fills no slot
        G = copied if looked_up else drafts if draft else 0
        u = uniform(B, G, tokens.device, generator)
        outcome, seconds = text.play(n, G, u, looked_up)
        # All advance by the least number of tokens that any has. A row that keeps more drafts
        # writes a draft in the place where another has its replacement.
        advance = min(1 + min(outcome[b][0] for b in live), end - n)
        for b in live:
            kept, *ids = outcome[b]
            stops = [i for i in range(advance) if ids[i] in eos]
            ids = ids[: stops[0] + 1 if stops else advance]
            rows[b] += "".join(map(chr, ids))
            used = min(kept, len(ids))
            on_token(b, ids, used)
            stats.tokens += len(ids)
            for j in range(min(G, end - n)):
                stats.drafted[j] += 1
                stats.accepted[j] += used > j
        live = [b for b in live if ord(rows[b][-1]) not in eos]
        pace.learn(G, looked_up, seconds, advance)
        n += advance
        stats.seconds += seconds
        stats.rounds += 1
        stats.lookups += looked_up
    length, trained = max(map(len, rows)), model.trained_length
    if length > trained:
        stats.note = f"the text goes beyond the {trained} tokens the model was trained on"
    if length == end < T + max_new_tokens:
        stats.note = f"stopped at the context limit of {end} tokens (max_position_embeddings)"
    padded = [[*map(ord, row), *eos[:1] * (end - len(row))] for row in rows]
    return torch.tensor(padded, device=tokens.device)


def check_request(model, tokens, max_new_tokens, temperature, top_k, top_p, speculative):
    """Raises ValueError, with one sentence, for a call of `generate` that cannot be served."""
    (B, T), V, limit = tokens.shape, model.config.vocab_size, model.config.max_position_embeddings
    low, high = (tokens.min().item(), tokens.max().item()) if B * T else (0, 0)
    drafts = speculative == "auto" or speculative in range(MOST_DRAFTS + 1)
    for ok, sentence in (
        (B * T > 0, "there is nothing to continue: the prompt is empty, or num_samples is 0"),
        (limit >= T, f"the prompt has {T} tokens, but the context ends at {limit}; shorten it"),
        (0 <= low <= high < V, f"token ids go from {low} to {high}, but must be 0 to {V - 1}"),
        (max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}, but must be 0 or more"),
        (0 <= temperature < math.inf, f"temperature is {temperature}, but must be 0 or more"),
        (top_k is None or top_k >= 1, f"top_k is {top_k}, but must be at least 1, or none"),
        (top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, but must be in (0, 1], or none"),
        (drafts, f"the draft length is {speculative!r}, but must be 0 to {MOST_DRAFTS}, or auto"),
    ):
        if not ok:
            raise ValueError(sentence)


@torch.inference_mode()
def score(model: DeepSeekV3, ids: list[int], window: int) -> float:
    """Total nats of ids[1:]. Windows overlap by half, and a window counts where it has most
    context: every token but the first ones sees window/2 (at least 1) to window tokens before."""
    x, nats, done = torch.tensor(ids, device=model.norm.weight.device), 0.0, 1
    while done < len(ids):
        start = max(0, done - max(1, window // 2))
        piece = x[start : start + window + 1]
        loss = F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="none")
        nats += loss[done - start - 1 :].sum().item()
        done = start + len(piece)
    return nats


# ---- Display -------------------------------------------------------------------------------------


def shown(tokens: list[int], styles: Iterable[str], tokenizer: Tokenizer, decoder) -> str:
    """The tokens in their styles, each character once the decoder has got all its bytes."""
    text = ""
    for token, style in zip(tokens, styles, strict=True):
        content = b"" if token in tokenizer.eos else tokenizer.to_bytes(token)
        text += painted(decoder.decode(content), style)
    return text


def painted(text: str, style: str) -> str:
    return f"\033[{style}m{text}\033[0m" if text and style else text


def style_of(expert: int) -> str:
    """Eight colours, then the same underlined, reversed, both."""
    return f"38;5;{PALETTE[expert % 8]}" + ("", ";4", ";7", ";4;7")[expert // 8 % 4]


def top_experts(model: DeepSeekV3, ids: list[int]) -> list[int]:
    """For each token the expert with the largest gate value in the last MoE layer."""
    with torch.inference_mode():
        model.trunk(torch.tensor([ids], device=model.norm.weight.device))
    if not model.routing:
        raise ValueError("this model has no routed experts to show")
    s, chosen = model.scores[-1], model.routing[-1]  # (1, T, E), (1, T, K)
    return chosen.gather(-1, s.gather(-1, chosen).argmax(-1, keepdim=True)).flatten().tolist()


def print_stats(model: DeepSeekV3, stats: Stats, rows: int):
    if stats.rounds:
        info(f"{stats.tokens} tokens, {stats.tokens / stats.seconds:.1f} tokens/s after the prompt")
    if any(stats.drafted):
        of = (f"{a}/{d}" for a, d in zip(stats.accepted, stats.drafted, strict=True) if d)
        per_forward = f"{stats.tokens / stats.rounds / rows:.2f} tokens per forward and text"
        info(f"{per_forward}; drafts that are in the text, by position: {', '.join(of)}")
    size = model.norm.weight.element_size()
    ours, mha = (n * size for n in model.config.cache_numbers())
    info(f"cache: {ours:,} bytes per token; multi-head attention would hold {mha:,}")
    if stats.note:
        info(f"note: {stats.note}")


# ---- The command ---------------------------------------------------------------------------------


def usable_device(name: str) -> torch.device:
    """The device of that name, `auto` CUDA if there is one, else the CPU. Raises ValueError."""
    if name == "auto":  # mps has to be named: PyTorch's results there have been wrong too often
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # meta has none
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: try cpu ({error!s:.150})") from None
    return torch.device(name)


def complete(model: DeepSeekV3, tokenizer: Tokenizer, prompt: str, config: SampleConfig):
    """Writes num_samples continuations of the prompt to stdout, the first as it comes.

    After Ctrl-C it still shows what there is of them, then raises KeyboardInterrupt.
    """
    device, stats = model.norm.weight.device, Stats()
    prompt.encode()  # raises ValueError where it is no text
    ids = tokenizer.encode(prompt) or tokenizer.eos[:1]
    by_expert, green = config.show == "experts", GREEN if config.show == "drafts" else ""
    rows = [list(ids) for _ in range(config.num_samples)]
    texts = [prompt] * len(rows)  # what is not yet printed
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]

    def on_token(row: int, new: list[int], drafted: int):
        rows[row] += new
        if not by_expert:  # experts are known when the text is complete
            styles = [green] * drafted + [""] * (len(new) - drafted)
            texts[row] += shown(new, styles, tokenizer, decoders[row])
            if row == 0:
                text, texts[0] = texts[0], ""
                print(text, end="", flush=True)

    interrupted = False
    try:
        generate(
            model, torch.tensor([ids], device=device).repeat(len(rows), 1), config.max_new_tokens,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            speculative=config.draft, lookup=config.lookup, compile=config.compile,
            eos_token_id=tokenizer.eos, on_token=on_token, stats=stats,
            generator=torch.Generator(drawing_device(device)).manual_seed(config.seed),
        )  # fmt: skip
    except KeyboardInterrupt:  # what there is of the text is shown
        interrupted = True
    for b, row in enumerate(rows):
        if by_expert:
            styles = map(style_of, top_experts(model, row))
            texts[b] = shown(row, styles, tokenizer, decoders[b])
        texts[b] += decoders[b].decode(b"", final=True)
    print(f"\n{'-' * 80}\n".join(texts))
    if by_expert:
        numbers = (painted(str(e), style_of(e)) for e in range(model.config.n_routed_experts))
        info(f"experts of the last layer: {' '.join(numbers)}")
    if green:
        info(f"{painted('green', GREEN)}: drafts that were accepted")
    print_stats(model, stats, config.num_samples)
    if interrupted:
        raise KeyboardInterrupt


def chat(model: DeepSeekV3, tokenizer: Tokenizer, config: SampleConfig):
    """One prompt after another, each the beginning of a new text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, gives input() line editing and a history
    info("a prompt per line, \\n for a line break; Ctrl-C ends a text, an empty line or Ctrl-D all")
    with contextlib.suppress(EOFError):
        while line := input("> " if sys.stdout.isatty() else ""):
            try:
                complete(model, tokenizer, line.replace("\\n", "\n"), config)
            except KeyboardInterrupt:
                info("text interrupted")
            except ValueError as error:
                info(f"error: {error}")
            config.seed += 1


def print_score(model: DeepSeekV3, tokenizer: Tokenizer, path: str):
    document = Path(path).read_bytes()
    ids = tokenizer.encode(document.decode())
    if tokenizer.bos is None:  # else the ids begin with it
        ids = [*tokenizer.eos[:1], *ids]
    if len(ids) < 2:
        raise ValueError(f"{path} is empty; nothing to score")
    window, count = min(model.trained_length, 2048), len(ids) - 1
    nats = score(model, ids, window)
    bits = nats / math.log(2) / len(document)
    print(f"{path}: {count:,} tokens, {nats / count:.4f} nats/token, {bits:.4f} bits/byte")
    context = f"{max(1, window // 2)} to {window} tokens, at the beginning all that there are"
    info(f"context: {context if count > window else f'all tokens before, up to {count}'}")


def main(argv: list[str]):
    text = "Write text with a trained model: python sample.py out/small [--key=value]"
    ckpt, values = parse_args(text, argv, SampleConfig, positional="ckpt")
    config = SampleConfig(**values)
    device, dtype = usable_device(config.device), config.dtype
    if dtype == "auto":  # a CPU decodes single tokens no faster in bfloat16
        fast = device.type == "cuda" and fast_dtype(device)[0] == torch.bfloat16
        dtype = "bfloat16" if fast else "float32"
    model, tokenizer, path = load_model(ckpt or config.ckpt, device, getattr(torch, dtype))
    if tokenizer is None:
        raise ValueError(f"no tokenizer of {path} can be read, so there is no text to write")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if config.score:
        print_score(model, tokenizer, config.score)
    elif config.interactive:
        chat(model, tokenizer, config)
    else:
        if "prompt" not in values and sys.stdin and not sys.stdin.isatty():
            info("reading the prompt from standard input to its end (--prompt=TEXT does not wait)")
            config.prompt = sys.stdin.buffer.read().decode()
        complete(model, tokenizer, config.prompt, config)


if __name__ == "__main__":
    run_command(main)
