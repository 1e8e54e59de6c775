"""Write text with a trained model: python sample.py out/small --prompt="def main(".

Decoding is speculative. Each round drafts a few tokens and checks all of them in one forward pass
of the model. The first rejected draft is replaced; those after it are dropped. The MTP modules make
the drafts. The text has exactly the distribution of plain sampling (Leviathan et al., arXiv
2211.17192). The text goes to stdout, everything else to stderr.

`generate_plain` writes one token at a time, without drafts: begin there, and with a sampler of your
own, too. `generate` is the loop over rounds; a round is Text.draft, then Text.verify, which calls
`accept`. With --compile, support/graphs.py compiles a round.

Shapes: B texts decoded together, T tokens of the prompt, n tokens of a text so far, G drafts in a
round, V vocabulary, D hidden size.
"""

import codecs
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from load import load_model
from model import Cache, DeepSeekV3
from support import graphs
from support.processes import fast_dtype, usable_device
from support.settings import Refusal, info, parse_args, run_command, with_home
from support.tokenizer import Tokenizer

MAX_DRAFTS = 4  # so a round reads at most 4 + 4 positions at once (MAX_ROUND_TOKENS in model.py)
MIN_TEMPERATURE = 1e-6  # lower temperatures count as 0
GREEN, PLAIN = "\033[32m", "\033[0m"


@dataclass
class SampleConfig:
    ckpt: str = "out/small"  # a run (best.pt, else ckpt.pt), a file, or a Hugging Face directory
    prompt: str = ""  # text to continue; default: standard input if piped, else a new document
    num_samples: int = 1  # texts from the same prompt, decoded together
    max_new_tokens: int = 256  # at most, for each text
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = 200  # sample from the k likeliest tokens; none: from all
    top_p: float | None = None  # sample from the fewest tokens with this much probability in sum
    seed: int = 1337  # the same seed and options give the same text
    speculative: int | None = None  # drafts per round, 0 to 4; none: 1, or 0 with --compile
    compile: bool = False  # several times faster, after half a minute or more of compiling
    show: Literal["", "drafts"] = ""  # drafts: print accepted drafts in green
    device: str = "auto"  # auto, cpu, cuda or cuda:N; auto: cuda where there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: float32 on a CPU


@dataclass
class Stats:
    """Counts over one call of `generate`, summed over all texts."""

    seconds: float = 0.0  # excluding the prompt and compilation
    tokens: int = 0  # new tokens
    rounds: int = 0  # forward passes of the main model, including the prompt's
    # Drafts and accepted drafts by position in the round. Drafts beyond the end of a text are not
    # counted. All texts advance only as far as the slowest: a draft beyond that point counts as
    # rejected, even if its own text would have kept it.
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    note: str = ""  # why the text stopped, or that it is longer than the model was trained for

    def count(self, new: int, accepted: int, drafted: int):
        """Adds a round of one text: `new` tokens, and `accepted` of `drafted` drafts."""
        self.tokens += new
        for position in range(drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < accepted


# ---- Sampling ------------------------------------------------------------------------------------


def uniform(B: int, G: int, device: torch.device, generator=None) -> Tensor:
    """The random numbers of a round with G drafts: (B, 2G+1) in float64, uniform in [0, 1). G draw
    the drafts, G decide which drafts stay, and one draws the token after them."""
    return torch.rand(B, 2 * G + 1, dtype=torch.float64, device=device, generator=generator)


class Filters(NamedTuple):
    temperature: float | Tensor  # a tensor (unless 0), so that compiled code serves all of them
    top_k: int | None = None
    top_p: float | None = None


def probabilities(logits: Tensor, temperature, top_k=None, top_p=None) -> Tensor:
    """Temperature, then top-k, then top-p: logits (..., V) -> probabilities (..., V) in float64.

    At temperature 0 the likeliest token has probability 1. Tokens that tie with the k-th likeliest
    all stay, as in transformers.
    """
    if not isinstance(temperature, Tensor) and temperature < MIN_TEMPERATURE:
        likeliest = logits.argmax(-1, keepdim=True)  # (..., 1)
        return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, likeliest, 1.0)
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
    """Draws one token (B, m) from each of the distributions p (B, m, V), which need not sum to 1.

    The tokens divide [0, 1) into intervals as long as their probabilities. The token drawn is the
    one whose interval contains u (B, m).

    A plain cumulative sum would not be safe. In float32 and over a large vocabulary it is off by up
    to 1e-3. On a GPU, which adds in parallel, it may fall from one token to the next, or rise at a
    token of probability 0, which could then be drawn. So probabilities are rounded down to
    multiples of 2^-52, which float64 adds exactly, in any order. Every token then has its
    probability to within 2^-52, and a token of probability 0 is never drawn.
    """
    p = p.double()
    total = (p / p.sum(-1, keepdim=True) * 2.0**52).floor().cumsum(-1)  # (B, m, V)
    token = torch.searchsorted(total, u[..., None] * total[..., -1:], right=True).squeeze(-1)
    return token.clamp(max=p.shape[-1] - 1)  # beyond the last token only if p is not finite


def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling: how many drafts stay (B,), and the token after them (B, 1).

    Draft x, drawn from q, stays with probability min(1, p(x) / q(x)). The first rejected draft is
    replaced by a draw from norm(max(0, p - q)); if all stay, one more token is drawn from p. Every
    token is then distributed as p, whatever q is. p (B, G+1, V) are the model's distributions,
    q (B, G, V) those of the drafts (B, G); u (B, G+1) is uniform in [0, 1).
    """
    if not drafts.shape[1]:  # then the rule below is a draw from p
        return drafts.new_zeros(len(p)), draw(p, u)
    p_x = p[:, :-1].gather(2, drafts[..., None]).squeeze(2)  # (B, G)
    q_x = q.gather(2, drafts[..., None]).squeeze(2)  # (B, G)
    stays = (u[:, :-1] * q_x < p_x).long()  # (B, G)
    kept = stays.cumprod(1).sum(1)  # (B,), drafts before the first rejected one
    b = torch.arange(len(p), device=p.device)  # (B,)
    p_after = p[b, kept]  # (B, V)
    q_after = F.pad(q, (0, 0, 0, 1))[b, kept]  # (B, V), zeros if all drafts stay
    rest = (p_after - q_after).clamp(min=0)
    # Where p and q differ only by rounding, p - q may be 0 or less everywhere.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p_after)
    return kept, draw(rest[:, None], u[:, -1:])


# ---- A round: draft, then verify -----------------------------------------------------------------


class Text:
    """B texts of n tokens each, with the caches and hidden states needed to continue them.

    `__init__` reads the whole prompt, and the first round draws one token from the result. From
    then on the model has read all tokens but the newest, token n-1, and each round reads that one
    together with its drafts. Rejected drafts leave entries in `cache`, `hidden` and `mtp_cache`
    beyond the end of the text. They are overwritten before they are read.

    Compiled code has one graph for all rounds, in which n is a tensor.
    """

    def __init__(self, model: DeepSeekV3, tokens: Tensor, size: int, G: int, filters: Filters):
        """Reads the prompt, tokens (B, T). There is room for `size` tokens; G drafts per round."""
        (B, T), config, like = tokens.shape, model.config, model.embed_tokens.weight
        self.model, self.prompt, self.filters = model, T, filters
        self.drafts = G if len(model.mtp) else 0
        self.depth = min(G, len(model.mtp))  # the MTP modules that draft
        self.graph = None  # a compiled round (support/graphs.py)
        if filters.temperature >= MIN_TEMPERATURE:
            temperature = torch.tensor(filters.temperature, dtype=torch.float64, device=like.device)
            self.filters = filters._replace(temperature=temperature)
        self.tokens = F.pad(tokens, (0, size - T))  # (B, size)
        self.cache = Cache(config, model.layers, B, size, like)
        self.mtp_cache = Cache(config, model.mtp[: self.depth], B, size, like)
        hidden = model.trunk(tokens, self.cache)  # (B, T, D), or wider in an edited network
        self.newest = hidden[:, -1:]  # the hidden state of the last token (B, 1, D)
        self.hidden = hidden.new_zeros(B, size if self.depth else 0, hidden.shape[-1])
        if self.depth:  # only the modules read hidden states
            self.hidden[:, :T] = hidden
        if T > 1:
            # The last positions of deeper modules lack their tokens; the next `draft` reads them
            # again.
            hidden = hidden[:, :-1]
            for k in range(1, self.depth + 1):
                hidden = self.read_mtp(k, hidden, 0)

    def span(self, start: int | Tensor, length: int) -> Tensor:
        """The positions start .. start + length - 1."""
        return start + torch.arange(length, device=self.tokens.device)

    def read_mtp(self, k: int, hidden: Tensor, start: int | Tensor) -> Tensor:
        """MTP module k reads the positions from `start` on: their hidden states at depth k - 1,
        h^{k-1} (B, positions, D), become those at depth k.

        At position i the module reads h^{k-1}_i and token i+k. Its output predicts token i+k+1.
        """
        tokens = self.tokens[:, self.span(start + k, hidden.shape[1])]
        self.mtp_cache.length = start
        return self.model.predict_next(k, hidden, tokens, self.mtp_cache)

    def draft(self, n: int | Tensor, u: Tensor) -> Tensor:
        """Writes the drafts, tokens n .. n+G-1, and returns their distributions q (B, G, V).

        With one module and one draft, as in V3: the model's state at n-2 and token n-1 make the
        module's state at n-2, which predicts token n. The module has a cache, so it first has to
        read what the last round added: at most two positions, n-3 and n-2. In every round it reads
        both. Reading a correct position again changes nothing, and the shape stays the same.

        With more modules, module 2 drafts token n+1 from the state of module 1, and so on. For
        further drafts the last module continues from its own output, one position further each
        time. With two modules and three drafts:

            module   reads positions   hidden states        tokens            drafts token
            1        n-6 .. n-2        of the model         n-5 .. n-1        n
            2        n-6 .. n-2        of module 1          n-4 .. n          n+1
            2        n-1               its own at n-2       n+1               n+2

        These G + depth positions are the G + 1 that the last round may have added, and depth - 1
        before them, where a deeper module may have read a draft that was then rejected.
        """
        if not self.drafts:
            return self.no_drafts(u)
        last = self.drafts + self.depth  # positions that the modules read
        last = min(last, n - 1) if isinstance(n, int) else last  # a short text has fewer
        start, q = n - 1 - last, []
        hidden = self.hidden[:, self.span(start, last)]  # (B, last, D)
        for step in range(self.drafts):
            k = min(step + 1, self.depth)
            if step + 1 > k:  # the last module continues from its own newest state
                start, hidden = n - 1 + step - k, hidden[:, -1:]
            hidden = self.read_mtp(k, hidden, start)
            q.append(probabilities(self.model.logits(hidden[:, -1:], k), *self.filters))
            self.tokens[:, self.span(n + step, 1)] = draw(q[step], u[:, step : step + 1])
        return torch.cat(q, 1)

    def no_drafts(self, u: Tensor) -> Tensor:
        """The distributions of no drafts, (B, 0, V)."""
        return u.new_zeros(len(u), 0, self.model.config.vocab_size)

    def verify(
        self, n: int | Tensor, q: Tensor, u: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Checks the drafts, tokens n .. n+G-1, in one forward pass of the model, and writes tokens
        n .. n+G.

        q (B, G, V): the distributions of the drafts. hidden (B, G+1, D): the result of the forward
        pass, if already known. Returns how many drafts each text keeps (B,), -1 if numbers are not
        finite, and its tokens (B, G+1), of which the first kept + 1 count.
        """
        G = q.shape[1]
        read = self.tokens[:, self.span(n - 1, G + 1)]  # (B, G+1): the newest token and the drafts
        if hidden is None:
            self.cache.length = n - 1
            hidden = self.model.trunk(read, self.cache)
            if self.depth:
                self.hidden[:, self.span(n - 1, G + 1)] = hidden
        logits = self.model.logits(hidden)  # (B, G+1, V)
        drafts = read[:, 1:]  # (B, G)
        p = probabilities(logits, *self.filters)  # (B, G+1, V)
        kept, token = accept(p, q, drafts, u[:, -(G + 1) :])  # no number that drew a draft
        # The new token takes the place after the kept drafts; what follows it does not count.
        out = torch.cat((drafts, token), 1).scatter(1, kept[:, None], token)  # (B, G+1)
        self.tokens[:, self.span(n, G + 1)] = out
        # False for a NaN, an inf, or -inf for all tokens. A single -inf only rules a token out.
        finite = logits.amax(-1).sum().abs() + p.sum() < math.inf
        return torch.where(finite, kept, -1), out

    def round(self, n: int | Tensor, u: Tensor) -> Tensor:
        """`draft`, then `verify`. Returns kept and tokens as one tensor (B, 1+G+1), so that the
        host waits for a GPU once. Run twice, a round gives the same result."""
        kept, out = self.verify(n, self.draft(n, u), u)
        return torch.cat((kept[:, None], out), 1)

    def run(self, n: int, u: Tensor) -> Tensor:
        """`round`, except after the prompt: there the model has read the whole text, so there are
        no drafts."""
        if n > self.prompt:
            return self.round(n, u)
        kept, out = self.verify(n, self.no_drafts(u), u, self.newest)
        return torch.cat((kept[:, None], out), 1)


# ---- Whole texts ---------------------------------------------------------------------------------


@torch.inference_mode()
def generate_plain(
    model: DeepSeekV3, tokens: Tensor, new: int, temperature: float = 1.0, generator=None
) -> Tensor:
    """Continues B texts by `new` tokens, one at a time: tokens (B, T) -> (B, T + new). The texts
    are those of `generate` without drafts, filters and an end-of-text token."""
    B, T = tokens.shape
    cache = Cache(model.config, model.layers, B, T + new, model.embed_tokens.weight)
    read = tokens  # first the prompt, then each new token
    for _ in range(new):
        u = uniform(B, 0, tokens.device, generator)
        logits = model.logits(model.trunk(read, cache)[:, -1:])  # (B, 1, V)
        read = draw(probabilities(logits, temperature), u)  # (B, 1)
        tokens = torch.cat((tokens, read), 1)
    return tokens


@torch.inference_mode()
def generate(
    model: DeepSeekV3,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    speculative: int | None = None,
    compile: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, list[int], int], None] = lambda b, ids, accepted: None,
    stats: Stats | None = None,
) -> Tensor:
    """Continues B texts, tokens (B, T). Returns (B, T + max_new_tokens), the prompt included, or
    fewer columns if they reach max_position_embeddings; then stats.note says so.

    speculative: drafts per round, 0 to 4, by the MTP modules if the model has any. None: 1, or 0 if
        compiled, where a draft costs as much time as it saves.
    compile: run compiled rounds.
    eos_token_id: one or several; a text that reaches one is padded with the first of them.
    generator: on the device of tokens; the same state gives the same texts.
    on_token(b, ids, accepted): called with new tokens of text b; the first `accepted` were drafts.
    stats: a Stats to fill in.
    """
    if speculative is None:
        speculative = 0 if compile else 1
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    filters = Filters(temperature, top_k, top_p)
    check_request(model, tokens, max_new_tokens, filters, speculative)
    tokens, stats = tokens.long(), stats or Stats()
    B, T = tokens.shape
    end = min(T + max_new_tokens, model.config.max_position_embeddings)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
    size = end + MAX_DRAFTS  # the last round may write beyond the end
    with torch.autocast(tokens.device.type, enabled=False):
        text = Text(model, tokens, graphs.room(size) if compile else size, speculative, filters)
        written = tokens.tolist()  # the ids of each text
        live, n = list(range(B)), T  # the texts that have not reached eos; tokens of each of them
        while live and n < end:
            u = uniform(B, text.drafts if n > T else 0, tokens.device, generator)
            run = graphs.compiled_round(text, n, u) if compile else text.run
            began = time.perf_counter()
            outcome = run(n, u).tolist()  # for each text: the drafts that it keeps, its tokens
            stats.seconds += time.perf_counter() - began
            stats.rounds += 1
            if outcome[0][0] < 0:
                raise Refusal(
                    "logits or probabilities are not finite: the weights are damaged, or an edit "
                    "broke the model"
                )
            # All texts advance together: by the drafts that every one keeps, and by one token more,
            # which is the token drawn after these or, in a text that keeps more, its next draft.
            advance = min(1 + min(outcome[b][0] for b in live), end - n)
            for b in live:
                kept, *ids = outcome[b]
                G, ids = len(ids) - 1, up_to_eos(ids[:advance], eos)
                accepted = min(kept, len(ids))
                written[b] += ids
                on_token(b, ids, accepted)
                room = len(ids) if ids[-1] in eos else end - n  # tokens before the end of the text
                stats.count(len(ids), accepted, min(G, room))
            live = [b for b in live if written[b][-1] not in eos]
            n += advance
    stats.note = note(max(map(len, written)), end, T + max_new_tokens, model)
    padded = [ids + eos[:1] * (end - len(ids)) for ids in written]
    return torch.tensor(padded, device=tokens.device)


def note(length: int, end: int, wanted: int, model: DeepSeekV3) -> str:
    """A note about a text of `length` tokens, or an empty string."""
    if length == end < wanted:
        return f"stopped at the context limit of {end} tokens (max_position_embeddings)"
    if length > model.trained_length > 0:
        return f"the text goes beyond the {model.trained_length} tokens the model was trained on"
    return ""


def up_to_eos(ids: list[int], eos: list[int]) -> list[int]:
    """The ids up to and including the first that ends a text."""
    for i, token in enumerate(ids):
        if token in eos:
            return ids[: i + 1]
    return ids


def check_request(model, tokens, max_new_tokens, filters: Filters, speculative):
    """Raises Refusal if `generate` cannot use these arguments."""
    (B, T), V, limit = tokens.shape, model.config.vocab_size, model.config.max_position_embeddings
    low, high = (tokens.min().item(), tokens.max().item()) if B * T else (0, 0)
    temperature, top_k, top_p = filters
    possible = speculative in range(MAX_DRAFTS + 1)
    for ok, sentence in (
        (B * T > 0, "nothing to continue: the prompt is empty, or num_samples is 0"),
        (limit >= T, f"the prompt has {T} tokens, but the context ends at {limit}; shorten it"),
        (0 <= low <= high < V, f"token ids go from {low} to {high}, but must be 0 to {V - 1}"),
        (max_new_tokens >= 0, f"max_new_tokens is {max_new_tokens}, but must be 0 or more"),
        (0 <= temperature < math.inf, f"temperature is {temperature}, but must be 0 or more"),
        (top_k is None or top_k >= 1, f"top_k is {top_k}, but must be at least 1, or none"),
        (top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, but must be in (0, 1], or none"),
        (possible, f"the number of drafts is {speculative!r}, but must be 0 to {MAX_DRAFTS}"),
    ):
        if not ok:
            raise Refusal(sentence)


# ---- The command ---------------------------------------------------------------------------------


def complete(model: DeepSeekV3, tokenizer: Tokenizer, prompt: str, config: SampleConfig):
    """Writes num_samples continuations of the prompt to stdout, the first one token by token."""
    device, stats, colour = model.embed_tokens.weight.device, Stats(), config.show == "drafts"
    ids = tokenizer.encode(prompt) or tokenizer.eos[:1]
    texts = [prompt] * config.num_samples  # what has not been printed of each
    # A character is printed once all of its bytes have been decoded.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in texts]

    def on_token(b: int, new: list[int], accepted: int):
        for i, token in enumerate(new):
            content = b"" if token in tokenizer.eos else tokenizer.to_bytes(token)
            piece = decoders[b].decode(content)
            texts[b] += f"{GREEN}{piece}{PLAIN}" if colour and piece and i < accepted else piece
        if b == 0:
            text, texts[0] = texts[0], ""
            print(text, end="", flush=True)

    generate(
        model, torch.tensor([ids], device=device).repeat(len(texts), 1), config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        speculative=config.speculative, compile=config.compile,
        eos_token_id=tokenizer.eos, on_token=on_token, stats=stats,
        generator=torch.Generator(device).manual_seed(config.seed),
    )  # fmt: skip
    for b, decoder in enumerate(decoders):
        texts[b] += decoder.decode(b"", final=True)
    print(f"\n{'-' * 80}\n".join(texts), flush=True)
    if colour and any(stats.drafted):
        info(f"{GREEN}green{PLAIN}: drafts that the model accepted; it chose the rest itself")
    print_stats(stats, config.num_samples)


def print_stats(stats: Stats, num_samples: int):
    if stats.rounds > 1:
        # Without each text's first token, which came from the prompt's forward pass.
        speed = (stats.tokens - num_samples) / stats.seconds
        info(f"{stats.tokens} tokens, {speed:.1f} tokens/s after the prompt")
    if stats.rounds and any(stats.drafted):
        pairs = zip(stats.accepted, stats.drafted, strict=True)
        rates = ", ".join(f"{a} of {d}" for a, d in pairs if d)
        per_call = stats.tokens / stats.rounds / num_samples
        info(f"{per_call:.2f} tokens per model call; accepted drafts, by position: {rates}")
        if stats.drafted[0] >= 20 and stats.accepted[0] < stats.drafted[0] / 10:
            info("few drafts were accepted: if model.py was edited, run python check.py RUN")
    if stats.note:
        info(f"note: {stats.note}")


def main(argv: list[str]):
    text = "Write text with a trained model: python sample.py out/small [--key=value]"
    _, values = parse_args(text, argv, SampleConfig, positional="ckpt")
    config = SampleConfig(**values | with_home(values, "ckpt"))
    device, dtype = usable_device(config.device), config.dtype
    if dtype == "auto":  # a small model decodes no faster in bfloat16 on a CPU
        fast = device.type == "cuda" and fast_dtype(device)[0] == torch.bfloat16
        dtype = "bfloat16" if fast else "float32"
    model, tokenizer = load_model(config.ckpt, device, getattr(torch, dtype))
    if tokenizer is None:
        raise Refusal(
            f"{config.ckpt} has neither tokenizer.json nor tiktoken.model, so tokens "
            "cannot become text: copy the release's file there."
        )
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout lacks it, and is UTF-8
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if "prompt" not in values and sys.stdin and not sys.stdin.isatty():
        info("reading the prompt from standard input (not with --prompt=TEXT)")
        try:
            config.prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise Refusal(f"standard input is not UTF-8 text ({error})") from None
    complete(model, tokenizer, config.prompt, config)


if __name__ == "__main__":
    run_command(main)
