"""The report's equations beside the lines that compute them: docs/annotated.html.

    python docs/annotate.py

The lines are taken from model.py, sample.py and fp8.py as they are: by the function they stand in
and by a piece of the first and of the last line. If such a piece is not there any more, this stops
and names it. Equations are written in a small language like TeX's and become MathML, which browsers
typeset themselves. The page needs no network; its one script shows what letters mean. It has the
digits of the functions that it shows, by which a test sees that their code is another now.
"""

import ast
import functools
import html
import io
import itertools
import keyword
import re
import sys
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.digits import digits_of, source_of

ROOT = Path(__file__).resolve().parent.parent

# ---- What letters mean ---------------------------------------------------------------------------

SHAPES = {
    "B": "texts in the batch",
    "T": "tokens of a text",
    "D": "hidden size, d in the report",
    "H": "attention heads, n_h in the report",
    "C": "numbers in the key-value latent, d_c in the report",
    "R": "numbers of a query or key that carry position, d_h^R in the report",
    "N": "numbers of a query or key that carry content, d_h in the report",
    "V": "numbers of a value; in sampling, the vocabulary",
    "E": "routed experts, N_r in the report",
    "K": "experts that a token visits, K_r in the report",
    "F": "width of an expert",
    "G": "groups of experts (nodes); in sampling, drafts",
    "S": "cached positions",
    "rows": "the tokens that visit one expert",
    "tokens": "B x T: all tokens as one dimension",
    "vocabulary": "tokens that the tokenizer knows",
}
# In equations: what stands there, scripts included, in the small language.
LETTERS = {
    r"\h_t": "the layer's input at token t, after its norm: D numbers",
    r"\c_t^{KV}": "the latent of keys and values, C numbers. It is what the cache keeps",
    r"\c_j^{KV}": "the cached latent of token j, C numbers",
    r"\k_t^C": "the keys' content of all heads, made from the latent",
    r"\k_{t,i}^C": "the content of head i's key, N numbers",
    r"\k_t^R": "the key's position: R numbers, the same for all heads. The cache keeps it, too",
    r"\k_{t,i}": "the key of head i: content and position, N + R numbers",
    r"\k_{j,i}": "the key of head i at token j",
    r"\v_t^C": "the values of all heads, made from the latent",
    r"\v_{j,i}^C": "the value of head i at token j",
    r"\c_t^Q": "the latent of the queries",
    r"\q_t^C": "the queries' content of all heads",
    r"\q_t^R": "the queries' position, for all heads",
    r"\q_{t,i}^C": "the content of head i's query, N numbers",
    r"\q_{t,i}^R": "the position of head i's query, R numbers",
    r"\q_{t,i}": "the query of head i: content and position",
    r"\o_{t,i}": "what head i has gathered at token t",
    r"\u_t": "in Eq. 11 attention's output; in Eq. 12-15 the experts' input, after its norm",
    r"W^{DKV}": "the matrix down to the latent: kv_a_proj_with_mqa, its first C rows",
    r"W^{KR}": "the matrix of the key's position: kv_a_proj_with_mqa, its last R rows",
    r"W^{UK}": "the matrix up to the keys: in kv_b_proj, N rows of every head",
    r"W^{UV}": "the matrix up to the values: in kv_b_proj, V rows of every head",
    r"W^{DQ}": "the matrix down to the queries' latent: q_a_proj",
    r"W^{UQ}": "the matrix up to the queries' content: in q_b_proj, N rows of every head",
    r"W^{QR}": "the matrix up to the queries' position: in q_b_proj, R rows of every head",
    r"W^O": "the matrix of the output: o_proj",
    "d_h": "numbers of content in a head: N",
    "d_h^R": "numbers of position in a head: R",
    "s_{i,t}": "the score of expert i for token t, between 0 and 1",
    "s_{j,t}": "the score of expert j for token t",
    "s_{i,t}'": "the score as a share of all scores",
    r"\e_i": "the vector of expert i: row i of the gate's weight",
    "b_i": "the bias of expert i, which only chooses",
    "b_j": "the bias of expert j",
    "g_{i,t}": "the gate value: how much expert i counts",
    "g_{i,t}'": "the gate value before it is divided by the sum",
    "g_{j,t}'": "the gate value before it is divided by the sum",
    "N_r": "routed experts: E",
    "N_s": "shared experts",
    "K_r": "experts that a token visits: K",
    "f_i": "the share of the choices that expert i has, times E",
    "P_i": "the share of the scores that expert i has",
    r"\gamma": "the size of a step of the bias",
    r"\alpha": "the weight of the balance loss",
    r"\lambda": "the weight of the MTP loss",
    r"\h_i^{k-1}": "the state of depth k - 1 at token i; depth 0 is the model",
    r"\h_i^k": "the state of depth k at token i",
    r"\h_i'^k": "the input of block k at token i",
    "t_{i+k}": "the token k places later",
    "t_i": "the token at place i",
    "M_k": "the matrix from two vectors to one: eh_proj",
    "P_i^k": "the probabilities that depth k gives to the token at place i",
    r"\theta^{-2i/R}": "rope_theta, 10000, to the power that belongs to pair i",
    r"\theta_i": "how far pair number i turns from one position to the next",
    r"\theta_i'": "the same with YaRN",
    r"\rho_i": "0 for pairs that turn fast, 1 for slow ones",
    r"\q": "a query's content",
    r"\u": "the input of an expert",
    r"\h_t'": "the output of the layer at token t",
    "p_j": "the probability with which the query looks at token j",
    "n_h": "how many heads there are: H",
    'L_{"Bal"}': "the balance loss",
    'L_{"MTP"}^k': "the loss of depth k",
    'L_{"MTP"}': "the MTP loss, the mean over depths times its weight",
    "P_{i+k+1}^k": "the probabilities that depth k gives to the token at i + k + 1",
    'W_{"gate"}': "the first F rows of an expert's gate_up_proj",
    'W_{"up"}': "the last F rows of an expert's gate_up_proj",
    'W_{"down"}': "an expert's down_proj",
    r"\epsilon": "a small number, 1e-6",
}
NAMES = {
    "latent": "c^KV, (B, T, C)",
    "k_pe": "k^R, (B, T, 1, R) after it was turned",
    "q_pe": "q^R, (B, T, H, R)",
    "q_nope": "q^C, (B, T, H, N)",
    "k_nope": "k^C, (B, T, H, N)",
    "kv_a_proj_with_mqa": "W^DKV and W^KR in one matrix, (C+R, D)",
    "kv_b_proj": "W^UK and W^UV of every head in one matrix, (H*(N+V), C)",
    "q_a_proj": "W^DQ",
    "q_b_proj": "W^UQ and W^QR of every head in one matrix",
    "o_proj": "W^O",
    "kv_a_layernorm": "the RMSNorm of the latent",
    "q_a_layernorm": "the RMSNorm of the queries' latent",
    "W_UK": "W^UK, (H, N, C)",
    "W_UV": "W^UV, (H, V, C)",
    "later": "True where a key is later than the query",
    "score": "q . k times the scale",
    "e_score_correction_bias": "b, one number for each expert",
    "chosen": "the K experts of every token, (B, T, K)",
    "gain": "g, the gate values",
    "choice": "in the gate s + b, which decides; in routed_ffn which of a token's K choices it is",
    "eh_proj": "M_k",
    "routed_ffn": "the sum over the chosen experts of Eq. 12",
    "causal_attention": "Eq. 10",
    "remember": "writes into the cache",
    "per_head": "each head's vector times that head's matrix",
    "swiglu": "silu(gate) * up",
    "enorm": "the RMSNorm of the embedding",
    "hnorm": "the RMSNorm of the hidden state",
    "expert_counts": "how often every expert was chosen",
    "upcast": "float64 stays, all else becomes float32",
    "routed_scaling_factor": "multiplies the gate values; 2.5 in V3",
    "amax": "the largest size in each tile",
    "E4M3_MAX": "448, the largest number of E4M3",
    "p_x": "p(x): the model's probability of the draft",
    "q_x": "q(x): the probability with which the draft was drawn",
    "kept": "how many drafts stay",
    "amplitude": "YaRN's factor of cos and sin, 1 in V3",
}

# ---- The small language --------------------------------------------------------------------------

SYMBOLS = {
    r"\cdot": "·", r"\le": "≤", r"\in": "∈", r"\sum": "∑", r"\dots": "…", r"\times": "×",
    r"\gamma": "γ", r"\alpha": "α", r"\lambda": "λ", r"\theta": "θ", r"\epsilon": "ε",
    r"\rho": "ρ", r"\approx": "≈", r"\odot": "⊙", r"\to": "→", r"\ne": "≠",
    r"\;": "\u2003", r"\{": "{", r"\}": "}",
}  # fmt: skip
VECTORS = set("hckvqouexg")


def parse(text: str) -> list[str]:
    """Tokens: commands, words in quotes, numbers, single characters."""
    return re.findall(r"\\(?:[a-zA-Z]+|.)|\"[^\"]*\"|\d+(?:\.\d+)?|[^\s]", text)


def mathml(text: str) -> str:
    """An equation in the small language as MathML."""
    body, _ = sequence(parse(text), "")
    return f'<p class="eq"><math displaystyle="true">{body}</math></p>'


def sequence(tokens: list[str], end: str) -> tuple[str, list[str]]:
    out = ""
    while tokens and tokens[0] != end:
        item, tokens = scripted(tokens)
        out += item
    return out, tokens[1:] if end else tokens


def group(tokens: list[str]) -> tuple[str, str, list[str]]:
    """One argument: a group in braces or an atom; as MathML, as written, what follows."""
    if tokens[0] == "{":
        depth = [(token == "{") - (token == "}") for token in tokens]
        i = list(itertools.accumulate(depth)).index(0)
        inside = tokens[1:i]
        body, _ = sequence(inside, "")
        return f"<mrow>{body}</mrow>", "{" + "".join(inside) + "}", tokens[i + 1 :]
    body, rest = atom(tokens)
    return body, tokens[0], rest


def bracketed(tokens: list[str]) -> list[str]:
    """What stands between the bracket that comes first and the one that closes it."""
    depth = [(token == "(") - (token == ")") for token in tokens]
    return tokens[1 : list(itertools.accumulate(depth)).index(0)]


def scripted(tokens: list[str]) -> tuple[str, list[str]]:
    """An atom with its scripts, and what they mean."""
    base, written = tokens[0], tokens[0]
    body, tokens = atom(tokens)
    below = above = ""
    while tokens and tokens[0] in ("_", "^", "'"):
        kind, tokens = tokens[0], tokens[1:]
        if kind == "'":
            written, above = written + "'", "<mo>′</mo>"
            continue
        arg, as_written, tokens = group(tokens)
        written += kind + as_written
        if kind == "_":
            below = arg
        else:
            above = f"<mrow>{above}{arg}</mrow>" if above else arg
    big = base == r"\sum"
    if below and above:
        tag = "munderover" if big else "msubsup"
        body = f"<{tag}>{body}{below}{above}</{tag}>"
    elif below or above:
        tag = ("munder" if big else "msub") if below else ("mover" if big else "msup")
        body = f"<{tag}>{body}{below or above}</{tag}>"
    if meaning := LETTERS.get(written):
        body = f'<mrow data-t="{html.escape(meaning)}">{body}</mrow>'
    return body, tokens


def atom(tokens: list[str]) -> tuple[str, list[str]]:
    token, rest = tokens[0], tokens[1:]
    if token == "{":
        body, _, rest = group(tokens)
        return body, rest
    if token == r"\frac":
        above, _, rest = group(rest)
        below, _, rest = group(rest)
        return f"<mfrac>{above}{below}</mfrac>", rest
    if token == r"\sqrt":
        inside, _, rest = group(rest)
        return f"<msqrt>{inside}</msqrt>", rest
    if token == r"\cases":
        rows = ""
        for _ in range(2):
            left, _, rest = group(rest)
            right, _, rest = group(rest)
            rows += f"<mtr><mtd>{left}</mtd><mtd>{right}</mtd></mtr>"
        return f'<mrow class="cases"><mtable columnalign="left">{rows}</mtable></mrow>', rest
    if token == "(" and r"\frac" in (inside := bracketed(tokens)):
        # Most machines have no font whose brackets grow: the style draws them.
        body, _ = sequence(inside, "")
        return f'<mrow class="tall">{body}</mrow>', tokens[len(inside) + 2 :]
    if token in SYMBOLS:
        symbol = SYMBOLS[token]
        tag = "mi" if symbol.isalpha() else "mtext" if token == r"\;" else "mo"
        return f"<{tag}>{symbol}</{tag}>", rest
    if token.startswith("\\"):  # a vector
        assert token[1:] in VECTORS, token
        return f'<mi class="v" mathvariant="normal">{token[1:]}</mi>', rest
    if token.startswith('"'):
        text = html.escape(token[1:-1].replace(" ", "\N{NO-BREAK SPACE}"))
        return f"<mtext>{text}</mtext>", rest
    if token[0].isdigit():
        return f"<mn>{token}</mn>", rest
    if token.isalpha():
        return f"<mi>{token}</mi>", rest
    return f"<mo>{html.escape({'-': '−'}.get(token, token))}</mo>", rest


# ---- What the page shows -------------------------------------------------------------------------
#
# A section: "##" and its title, sentences, and rows. A row: "@" and the equations' source, a "$" in
# front of every equation, a note, and ">" with file, function, and a piece of the first and of the
# last line of code.

SECTIONS = r"""
## RMSNorm
Every block begins by giving its input a known size. The norm divides a vector by the root of the
mean of its squares, and multiplies each number by a weight g that is learnt.

@ arXiv 1910.07467
$ y = g \odot \frac{x}{\sqrt{"mean"(x^2) + \epsilon}}
Computed in float32, whatever the dtype of x.
> model.py rms_norm | x32 = | return

## Positions: RoPE and YaRN
Queries and keys are cut into pairs of numbers. A pair is turned by an angle that grows with the
position. So the product of a query and a key depends on the distance of their tokens.

@ arXiv 2104.09864
$ \theta_i = \theta^{-2i/R}
The first pairs turn fast, the last ones slowly.
> model.py rope_table | i = torch.arange | frequency =

@ Section 4.3; YaRN, arXiv 2309.00071
$ \theta_i' = (1 - \rho_i) \theta_i + \rho_i \frac{\theta_i}{s}
$ \sqrt{t} = 0.1 " ln " s + 1
For a context s times as long. Pairs that turn less than once in the trained length get s times
slower, those that turn more than 32 times stay, and ρ runs from 1 to 0 in between. The report
calls these two numbers α = 1 and β = 32. The square of √t multiplies the scores (see the scale
below).
> model.py rope_table | def index_of | frequency = frequency * (1 - ramp)

@
$ \sqrt{t} , " where " s > 1
> model.py yarn_mscale | return | return

@
$ a' = a " cos"(t \theta_i) - b " sin"(t \theta_i)
$ b' = a " sin"(t \theta_i) + b " cos"(t \theta_i)
The pair (a, b) of number i is turned by the angle that belongs to position t.
> model.py rotate | cos, sin = | return

## Multi-head Latent Attention
Usual attention keeps keys and values of all heads for every token of the text. MLA keeps one latent
of C numbers, from which all of them can be made, and one key of R numbers for the position. In V3
that is 576 numbers in each layer, where the heads' keys and values have 32,768.

@ Eq. 6-9
$ \c_t^Q = W^{DQ} \h_t
$ \q_t^C = W^{UQ} \c_t^Q
$ \q_t^R = "RoPE"(W^{QR} \c_t^Q)
$ \q_{t,i} = [\q_{t,i}^C ; \q_{t,i}^R]
Queries come from a latent, too. That saves memory in training, not in the cache. Both latents are
normalised (section 4.2).
> model.py MLA.forward | if config.q_lora_rank is None | q_nope, q_pe =

@ Eq. 1, 3
$ \c_t^{KV} = W^{DKV} \h_t
$ \k_t^R = "RoPE"(W^{KR} \h_t)
One matrix computes both. Only these two are cached.
> model.py MLA.forward | latent, k_pe = | q_pe, k_pe = pe

@
If there is a cache, it takes them at the positions of these tokens.
> model.py MLA.forward | start = 0 | kv = remember

@
It writes them behind what is there, and gives all that is there.
> model.py remember | kv, start | return

@ Eq. 2, 4, 5
$ \k_t^C = W^{UK} \c_t^{KV}
$ \k_{t,i} = [\k_{t,i}^C ; \k_t^R]
$ \v_t^C = W^{UV} \c_t^{KV}
In training, and for a prompt, keys and values are made from the latents.
> model.py MLA.attend_expanded | B, T, H, N | return

@ Eq. 10
$ \o_{t,i} = \sum_{j=1}^{t} "softmax"_j(\frac{\q_{t,i} \cdot \k_{j,i}}{\sqrt{d_h+d_h^R}})\v_{j,i}^C
T queries look at S keys, and none of them ahead: the sum ends at t.
> model.py causal_attention | T, S = | return

@
The scale of Eq. 10, times the square of YaRN's √t.
> model.py MLA.scale | config, yarn | return

@ Eq. 11
$ \u_t = W^O [\o_{t,1} ; \o_{t,2} ; \dots ; \o_{t,n_h}]
> model.py MLA.forward | return self.o_proj | return self.o_proj

@ DeepSeek-V2 (arXiv 2405.04434), section 2.1.2
$ \q \cdot (W^{UK} \c_j^{KV}) = ((W^{UK})^T \q) \cdot \c_j^{KV}
$ \sum_j p_j (W^{UV} \c_j^{KV}) = W^{UV} \sum_j p_j \c_j^{KV}
In decoding, W^UK moves over to the query and W^UV to the output. Attention then runs on the cached
latents, and no key or value is ever made.
> model.py MLA.attend_absorbed | H, N), C | return

## DeepSeekMoE: the gate
In place of one wide network behind the attention there are many narrow ones, the experts, and each
token visits K of them. The gate says which, and how much each one counts.

@ Eq. 15
$ s_{i,t} = "sigmoid"(\u_t \cdot \e_i)
> model.py Gate.forward | s = linear32 | sigmoid

@ Eq. 14, 16
$ g_{i,t}' = \cases{s_{i,t}}{"if "s_{i,t}+b_i \in "Topk"(\{s_{j,t}+b_j\}, K_r)}{0}{"otherwise"}
The bias b chooses and does nothing else. Node limit (section 2.1.2): only experts of the best
groups can be chosen. A group's score is the sum of its two largest s + b, as in the released code.
> model.py Gate.forward | choice = s.detach() | chosen =

@ Eq. 13
$ g_{i,t} = \frac{g_{i,t}'}{\sum_{j=1}^{N_r} g_{j,t}'}
Then times routed_scaling_factor, which the report does not mention.
> model.py Gate.forward | gain = s.gather | return

@ Section 2.1.2; arXiv 2408.15664, Algorithm 1
$ b_i ← b_i + \gamma " sign"("mean load" - "load"_i)
After every step: the bias of a busy expert falls, that of an idle one rises.
> model.py DeepSeekV3.update_bias | load = | self.expert_counts.zero_

## DeepSeekMoE: the experts
Every token also visits the shared expert.

@ Eq. 12
$ \h_t' = \u_t + \sum_{i=1}^{N_s} "FFN"_i^{(s)}(\u_t) + \sum_{i=1}^{N_r} g_{i,t}"FFN"_i^{(r)}(\u_t)
The gate chooses, routed and shared experts compute. The block adds the residual, the first term.
> model.py MoE.forward | s, chosen, gain | return

@
Each expert computes the rows of those tokens that have chosen it. None is dropped.
> model.py routed_ffn | y = torch.zeros | return

@ SwiGLU, arXiv 2002.05202
$ "FFN"(\u) = W_{"down"} ("silu"(W_{"gate"} \u) \odot W_{"up"} \u)
The gate value multiplies the input of W_down: that gives the same as multiplying its output.
> model.py swiglu | y = F.silu | return

## The balance loss of a sequence
The bias balances whole batches. A loss with a tiny weight keeps single sequences from extremes. It
looks at the scores without the bias.

@ Eq. 19, 20
$ s_{i,t}' = \frac{s_{i,t}}{\sum_{j=1}^{N_r} s_{j,t}}
$ P_i = \frac{1}{T} \sum_{t=1}^{T} s_{i,t}'
> model.py balance_loss | P = | P =

@ Eq. 18
$ f_i = \frac{N_r}{K_r T} \sum_{t=1}^{T} 1 (s_{i,t} \in "Topk"(\{s_{j,t}\} , K_r))
The 1 counts the tokens for which the condition holds. Counting has no gradient.
> model.py balance_loss | best = | f =

@ Eq. 17
$ L_{"Bal"} = \alpha \sum_{i=1}^{N_r} f_i P_i
train.py multiplies by α.
> model.py balance_loss | return | return

## Multi-Token Prediction
Module k takes the state of the depth before and the token k places later, and predicts one token
further. It shares embedding and head with the model.

@ Eq. 21, 22
$ \h_i'^k = M_k ["RMSNorm"(\h_i^{k-1}) ; "RMSNorm"("Emb"(t_{i+k}))]
$ \h_{1:T-k}^k = "TRM"_k (\h_{1:T-k}'^k)
The released weights have the embedding first, and a norm behind the block.
> model.py MTP.forward | u = self.eh_proj | return

@ The shift
Depth k has k positions fewer. Position i of depth k takes the token at i + k.
> model.py DeepSeekV3.forward | hidden = [self.trunk | hidden.append

@ Eq. 23-25
$ P_{i+k+1}^k = "OutHead"(\h_i^k)
$ L_{"MTP"}^k = - \frac{1}{T} \sum_{i=2+k}^{T+1} "log " P_i^k [t_i]
$ L_{"MTP"} = \frac{\lambda}{D} \sum_{k=1}^{D} L_{"MTP"}^k
D is the number of modules here. The code takes the mean over the T - k targets that there are, and
train.py multiplies by λ.
> model.py DeepSeekV3.forward | main, *mtp = | return {

@
The head: a score for every token.
> model.py head_logits | return | return

@
The cross-entropy of one depth, over the targets that there are.
> model.py head_loss | logits = | return

## Drafts: speculative sampling
The MTP module drafts tokens, drawn from q. The model checks them in one call, with its own
distribution p at each place. The text is distributed as if the model had written it alone.

@ arXiv 2211.17192, Algorithm 1
$ "keep " x " with probability min"(1 , \frac{p(x)}{q(x)})
u is uniform in [0, 1): u q(x) < p(x). All behind the first rejected draft goes.
> sample.py accept | p_x = | kept =

@
$ p'(x) = "norm"("max"(0 , p(x) - q(x)))
The rejected draft is replaced by a draw from p′. If all drafts stay, one more token is drawn from
p.
> sample.py accept | rows = | return

## FP8: a scale for every tile
Numbers of 8 bits (E4M3) end at 448 and have 4 significant bits. Every 128 numbers of an activation,
and every 128 x 128 of a weight, have a scale of their own.

@ Section 3.3.2
$ s = \frac{"max"|x|}{448}
$ q = "E4M3"(\frac{x}{s}) , \; x \approx s q
The maximum is that of the tile, taken anew each time.
> fp8.py quantize | tiles = _tiles | s = torch.where

@
Where scales shall be powers of two (section 3.3.3), they are rounded up.
> fp8.py quantize | if pow2 | return
"""


# ---- Code ----------------------------------------------------------------------------------------


@functools.cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    """Every function of a file: NAME, Class.NAME."""
    found = {}
    for outer in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        for node in (outer, *getattr(outer, "body", ())):
            if isinstance(node, ast.FunctionDef):
                found[node.name if node is outer else f"{outer.name}.{node.name}"] = node
    return found


def function_of(file: str, name: str) -> ast.FunctionDef:
    if name not in functions(file):
        raise ValueError(f"{file} has no {name}, which docs/annotate.py shows: mend its SECTIONS")
    return functions(file)[name]


def digits(file: str, name: str) -> str:
    """Of the function's code: its comments and the names of its local variables do not count."""
    return digits_of(source_of(function_of(file, name), decorators=False))


def lines_of(file: str, name: str, first: str, last: str) -> range:
    """The lines of a function, below its docstring, from the one with `first` to the end of the
    statement with `last`. Raises ValueError in one sentence."""
    text = (ROOT / file).read_text(encoding="utf-8").splitlines()
    function = function_of(file, name)
    begin, end = function.body[ast.get_docstring(function) is not None].lineno, function.end_lineno
    start = next((i for i in range(begin, end + 1) if first in text[i - 1]), end + 1)
    stop = next((i for i in range(start, end + 1) if last in text[i - 1]), None)
    if stop is None:
        told = f"{file}: {name} has no line with {first!r}, or {last!r} behind it"
        raise ValueError(f"{told}: mend docs/annotate.py's SECTIONS")
    for node in ast.walk(function):
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and node.lineno <= stop:
            stop = max(stop, node.end_lineno) if stop <= node.end_lineno else stop
    return range(start, stop + 1)


@functools.cache
def coloured(file: str) -> list[str]:
    """The file's lines as HTML: keywords, texts, comments and known names are marked."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, out = text.splitlines(), [""] * (text.count("\n") + 1)
    at = dict.fromkeys(range(1, len(lines) + 1), 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (row, column), (end_row, end_column) = token.start, token.end
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            continue
        if row > len(lines) or row != end_row:  # a text over several lines: never shown
            at[end_row] = end_column
            continue
        out[row - 1] += html.escape(lines[row - 1][at[row] : column]) + marked(token)
        at[row] = end_column
    return out


def marked(token: tokenize.TokenInfo) -> str:
    text = html.escape(token.string)
    if token.type == tokenize.COMMENT:
        letters = re.compile(r"\b(" + "|".join(SHAPES) + r")\b")
        return f"<i>{letters.sub(lambda m: tip(m[1], SHAPES[m[1]]), text)}</i>"
    if token.type == tokenize.STRING:
        return f"<q>{text}</q>"
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return f"<b>{text}</b>"
    letters = {x: SHAPES[x] for x in "BTDHCRNVEKGS"}  # not F, torch.nn.functional
    if token.type == tokenize.NAME and token.string in NAMES | letters:
        return tip(text, (NAMES | letters)[token.string])
    return text


def tip(text: str, meaning: str) -> str:
    return f'<span data-t="{html.escape(meaning)}">{text}</span>'


def code(file: str, name: str, first: str, last: str) -> str:
    lines = lines_of(file, name, first, last)
    shown = [coloured(file)[i - 1] for i in lines]
    deep = [len(x) - len(x.lstrip(" ")) for x in shown]
    least, rows = min(n for n, x in zip(deep, shown, strict=True) if x.strip()), ""
    for i, n, x in zip(lines, deep, shown, strict=True):
        rows += f'<span class="line" style="--i:{max(0, n - least)}"><s>{i}</s>{x[least:]}</span>'
    place = f"{file}, <code>{name}</code>, line {lines[0]}"
    kept = f'class="code" data-digits="{digits(file, name)}"'
    return f"<div {kept}><p>{place}</p><pre>{rows}</pre></div>"


# ---- The page ------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #62646a; --page: #fff; --box: #f5f5f2;
  --line: #d9d9d4; --key: #8a2be2; --text: #2b7a3d; --mark: #b5530a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a0a3a8; --page: #17181a;
  --box: #222427; --line: #3a3d42; --key: #c9a2ff; --text: #8fd19e; --mark: #ffb070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1rem 1.2rem 6rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
header p, section > p { max-width: 46rem; margin: .3rem 0 .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; } a { color: var(--mark); }
.row { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 1.2rem;
  border-top: 1px solid var(--line); padding: .7rem 0; align-items: start; }
.number { color: var(--soft); font-size: .85rem; margin: 0; } .note { margin: .3rem 0; }
.eq { margin: .45rem 0; overflow-x: auto; overflow-y: hidden; padding: .15rem 0; }
math { font-size: 1.15rem; }
mrow.tall { border: solid; border-width: 0 .07em; border-radius: .45em / 50%; padding: 0 .3em; }
mrow.cases { border-left: .07em solid; padding-left: .4em; }
mi.v { font-weight: bold; font-family: Georgia, "Times New Roman", "DejaVu Serif", serif; }
.code { background: var(--box); border-radius: .4rem; overflow: hidden; }
.code p { margin: 0; padding: .3rem .7rem; color: var(--soft); font-size: .8rem; }
pre { margin: 0; padding: 0 .7rem .6rem; --number: 2.6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
  monospace; }
.line { --in: calc(var(--number) + (var(--i) + 4) * 1ch); display: block; padding-left: var(--in);
  text-indent: calc(-1 * var(--in)); }
s { display: inline-block; width: var(--number); color: var(--soft); text-decoration: none;
  text-indent: 0; user-select: none; opacity: .7; }
pre b { color: var(--key); font-weight: normal; } pre i { color: var(--soft); font-style: normal; }
pre q { color: var(--text); } pre q::before, pre q::after { content: none; }
[data-t] { cursor: help; } span[data-t] { border-bottom: 1px dotted var(--soft); }
[data-t]:hover { color: var(--mark); }
#tip { position: fixed; z-index: 2; max-width: min(24rem, 90vw); padding: .4rem .6rem;
  background: var(--ink); color: var(--page); border-radius: .4rem; font-size: .85rem;
  pointer-events: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .5rem 0; }
dd { margin: 0; } summary { cursor: pointer; color: var(--mark); }
@media (max-width: 56rem) { .row { grid-template-columns: minmax(0, 1fr); gap: .5rem; }
  body { padding: .6rem .8rem 5rem; } pre { font-size: .74rem; --number: 2.1rem; }
  math { font-size: 1.05rem; } }
@media (max-width: 30rem) { math { font-size: .9rem; } }
@media print { .row { break-inside: avoid; } }
"""
SCRIPT = """
const tip = document.getElementById("tip");
document.addEventListener("pointerover", (event) => {
  const at = event.target.closest && event.target.closest("[data-t]");
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = at.dataset ? at.dataset.t : at.getAttribute("data-t");
  const box = at.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  const below = box.bottom + 6;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = (below + tip.offsetHeight > innerHeight ? above : below) + "px";
});
"""


def row(text: str) -> str:
    """One row of SECTIONS as HTML."""
    left = right = note = ""
    for line in text.splitlines():
        kind, rest = line[:1], line[1:].strip()
        if kind == "@" and rest:
            left += f'<p class="number">{html.escape(rest)}</p>'
        elif kind == "$":
            left += mathml(rest)
        elif kind == ">":
            place, first, last = (part.strip() for part in rest.split("|"))
            right = code(*place.split(), first, last)
        elif kind != "@":
            note += line + " "
    left += f'<p class="note">{html.escape(note)}</p>' if note else ""
    if not left:
        raise ValueError(
            f"a row has nothing at its left: mend docs/annotate.py's SECTIONS ({text})"
        )
    return f'<div class="row"><div>{left}</div>{right}</div>'


def page() -> str:
    """The whole page. Raises ValueError where a line of code is not there any more."""
    links = sections = ""
    for i, section in enumerate(SECTIONS.strip().removeprefix("## ").split("\n## ")):
        title, text = section.split("\n", 1)
        about, *rows = re.split(r"\n+(?=@)", text.strip())
        links += f'<a href="#{i}">{title}</a>'
        sections += f'<section id="{i}"><h2>{title}</h2><p>{html.escape(about)}</p>'
        sections += "".join(map(row, rows)) + "</section>"
    letters = "".join(f"<dt><code>{x}</code></dt><dd>{text}</dd>" for x, text in SHAPES.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DeepSeek-V3: the report's equations beside the code</title>
<style>{STYLE}</style></head><body>
<header><h1>DeepSeek-V3: the report's equations beside the code</h1>
<p>At the left, on a phone above, the equations of the
<a href="https://arxiv.org/abs/2412.19437">technical report</a>, with its numbers, or of the paper
that is named. At the right, or below, the lines of this repository that compute them. Rest the
mouse on a letter or a name, or tap it, to see what it means. Written by
<code>python docs/annotate.py</code>.</p>
<details><summary>Letters in shapes</summary><dl>{letters}</dl></details>
<nav>{links}</nav></header>
{sections}
<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>
"""


if __name__ == "__main__":
    try:
        text = page()
    except ValueError as error:
        sys.exit(f"error: {error}")
    (ROOT / "docs/annotated.html").write_text(text, encoding="utf-8")
    print(f"wrote docs/annotated.html, {len(text.encode()) / 1000:.0f} kB", file=sys.stderr)
