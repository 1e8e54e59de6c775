"""The report's equations beside the lines that compute them: docs/annotated.html.

    pip install latex2mathml && python docs/annotate.py

It also writes the line numbers in the links of README.md and of docs/ anew. The text of such a
link is the name of a definition, [`MLA.forward`](model.py#L1), or else its title is: [the two
calls](model.py#L1 "MLA.forward"). In docs/inside.html and its template the number is seen, too:
<a href="model.py#L1">MLA, model.py:1</a>.

Lines are found by the function that they stand in and, where it is not the whole function, by a
piece of the first and of the last line. So they follow edits. Where such a piece is not there any
more, this stops and names it. The page needs no network, no script and no mouse.
"""

import ast
import html
import re
import sys
from pathlib import Path
from textwrap import dedent

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
WITH_LINKS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
WITH_LINKS += [ROOT / "docs/inside_template.html", ROOT / "docs/inside.html"]

# A section: "##" and its title, sentences, letters ("?", an equation's letter | what it means), and
# rows. A row: "@" and the equation's source, a "$" in front of each equation, a note, and ">" with
# file and function, perhaps | a piece of the first line | a piece of the last line. Equations are
# LaTeX, in which \h is a vector h.
SECTIONS = r"""
## RMSNorm
Attention and feed-forward networks begin by giving their input a known size. The norm divides a
vector by the root of its mean square, and multiplies each number by a learnt weight g.

@ arXiv 1910.07467
$ y = g \odot \frac{x}{\sqrt{\operatorname{mean}(x^2) + \epsilon}}
Computed in float32, whatever the dtype of x. ε is 1e-6.
> model.py RMSNorm.forward

## Positions: RoPE and YaRN
Queries and keys are cut into pairs of numbers. A pair is turned by an angle that grows with the
position. So the product of a query and a key depends on the distance of their tokens.
? \theta | the base, rope_theta: 10000 in V3
? \omega_i, \omega'_i | how far pair i turns from one position to the next, without and with YaRN
? s | YaRN's factor: how many times as long the context becomes, 40 in V3
? \rho_i | 1 for pairs that turn fast, 0 for slow ones

@ arXiv 2104.09864
$ \omega_i = \theta^{-2i/R}
The first pairs turn fast, the last ones slowly.
> model.py rope_table | i = torch.arange | frequency =

@ Section 4.3; YaRN, arXiv 2309.00071
$ \omega'_i = \rho_i \omega_i + (1 - \rho_i) \frac{\omega_i}{s}
For a context s times as long. Pairs that turn less than once in the trained length get s times
slower, those that turn more than 32 times stay, and ρ runs from 0 to 1 in between. (In the code
slow is 1 - ρ.) The report calls these two numbers α = 1 and β = 32.
> model.py yarn_frequencies | def index_of | return frequency * (1 - slow)

@ YaRN's temperature
$ \sqrt{t} = 0.1 \ln s + 1 \text{, where } s > 1
YaRN also makes the softmax sharper. Its paper multiplies queries and keys by this number, through
cos and sin, and calls it √(1/t): its t divides. The report applies YaRN to the position's key only.
The released code multiplies all scores by the square instead (the scale below), so cos and sin have
the amplitude 1.
> model.py yarn_mscale

@ RoPE
$ a' = a \cos(p\,\omega_i) - b \sin(p\,\omega_i)
$ b' = a \sin(p\,\omega_i) + b \cos(p\,\omega_i)
The pair (a, b) of number i is turned by the angle that belongs to position p.
> model.py rotate

## Multi-head Latent Attention
Usual attention keeps keys and values of all heads for every token of the text. MLA keeps one latent
of C numbers, from which all of them can be made, and one key of R numbers for the position. In V3
that is 576 numbers in each layer, where the heads' keys and values have 32,768.
? \h_t | the layer's input at token t, after its norm: D numbers
? \c_t^{KV}, \c_t^Q | the latent of keys and values, C numbers, and that of the queries
? \k_{t,i}^C, \v_{t,i}^C | the content of head i's key, N numbers, and its value, V numbers
? \k_t^R | the key's position: R numbers, the same for all heads
? \q_{t,i}^C, \q_{t,i}^R | content and position of head i's query: N and R numbers
? W^{DKV}, W^{KR} | kv_a_proj_with_mqa: its first C rows and its last R rows
? W^{UK}, W^{UV} | kv_b_proj: N rows and V rows of every head
? W^{DQ}, W^{UQ}, W^{QR} | q_a_proj; N rows and R rows of every head of q_b_proj
? W^O, \o_{t,i}, \u_t | o_proj, what head i has gathered, attention's output
? n_h, d_h, d_h^R | the heads H; numbers of content N and of position R in a head

@ Eq. 6-9
$ \c_t^Q = W^{DQ} \h_t
$ [\q_{t,1}^C; \q_{t,2}^C; \dots; \q_{t,n_h}^C] = \q_t^C = W^{UQ} \c_t^Q
$ [\q_{t,1}^R; \q_{t,2}^R; \dots; \q_{t,n_h}^R] = \q_t^R = \operatorname{RoPE}(W^{QR} \c_t^Q)
$ \q_{t,i} = [\q_{t,i}^C; \q_{t,i}^R]
Queries come from a latent, too. That saves memory in training (section 2.1.1), not in the cache.
Both latents are normalised (section 4.2).
> model.py MLA.forward | if config.q_lora_rank is None | q_nope, q_pe =

@ Eq. 1, 3
$ \c_t^{KV} = W^{DKV} \h_t
$ \k_t^R = \operatorname{RoPE}(W^{KR} \h_t)
One matrix computes both. Only these two are cached.
> model.py MLA.forward | latent, k_pe = | k_pe = rotate

@ The cache
Writes both at the positions of these tokens.
> model.py MLA.forward | if past is not None | past.kept[

@ Eq. 2, 4, 5
$ [\k_{t,1}^C; \k_{t,2}^C; \dots; \k_{t,n_h}^C] = \k_t^C = W^{UK} \c_t^{KV}
$ \k_{t,i} = [\k_{t,i}^C; \k_t^R]
$ [\v_{t,1}^C; \v_{t,2}^C; \dots; \v_{t,n_h}^C] = \v_t^C = W^{UV} \c_t^{KV}
In training, and for a prompt, keys and values are made from the latents.
> model.py MLA.attend_expanded

@ Eq. 10
$ \o_{t,i} = \sum_{j=1}^{t} \operatorname{softmax}_j (\q_{t,i}^T \k_{j,i} / \sqrt{d_h + d_h^R}) \,
  \v_{j,i}^C
No query looks ahead: the sum ends at t. Training, prompts and decoding call this one function.
> model.py causal_attention

@ The scale of Eq. 10
$ t / \sqrt{d_h + d_h^R}
With YaRN the scores are multiplied by t, the square of its √t. Without, t is 1.
> model.py MLA.scale

@ DeepSeek-V2 (arXiv 2405.04434), section 2.1.2
$ \q \cdot (W^{UK} \c_j^{KV}) = ((W^{UK})^T \q) \cdot \c_j^{KV}
$ \sum_j p_j (W^{UV} \c_j^{KV}) = W^{UV} \sum_j p_j \c_j^{KV}
In decoding, the query is multiplied by W^UK and the output by W^UV. Attention then runs on the
cached latents, and no key or value is ever made. p is the softmax of Eq. 10.
> model.py MLA.attend_absorbed

@ Eq. 11
$ \u_t = W^O [\o_{t,1}; \o_{t,2}; \dots; \o_{t,n_h}]
> model.py MLA.forward | return self.o_proj | return self.o_proj

## DeepSeekMoE: the gate
In place of one wide feed-forward network a layer has many narrow ones, the experts, and each token
visits K of them. So the network can have many parameters and few FLOPs a token. The gate says which
experts a token visits, and how much each counts.
? \u_t | the experts' input, the norm of the residual. (In Eq. 11 u_t is attention's output.)
? \e_i | the vector of expert i, row i of the gate's weight
? s_{i,t}, g_{i,t} | the score of expert i for token t, between 0 and 1; how much it counts
? b_i | the bias of expert i, e_score_correction_bias
? N_r, K_r | routed experts E, experts that a token visits K
? \gamma | the size of a step of the bias

@ Eq. 15
$ s_{i,t} = \operatorname{sigmoid}(\u_t^T \e_i)
> model.py Gate.forward | config, G = | sigmoid()

@ Eq. 14, 16
$ g'_{i,t} = s_{i,t} \text{ if } s_{i,t} + b_i \in \text{best}_t \text{, else } 0
$ \text{best}_t = \operatorname{Topk}(\{s_{j,t} + b_j \mid 1 \le j \le N_r\}, K_r)
The bias b chooses and does nothing else. Node limit (section 2.1.2): only experts of the best
groups can be chosen. A group's score is the sum of its two largest s + b, as in the released code.
> model.py Gate.forward | choice = s.detach() | chosen =

@ Eq. 13
$ g_{i,t} = \frac{g'_{i,t}}{\sum_{j=1}^{N_r} g'_{j,t}}
Then times routed_scaling_factor, which the report does not mention. (It may be one of the scaling
factors of DeepSeek-V2's section 3.1.2.)
> model.py Gate.forward | gain = s.gather | return

@ Section 2.1.2; arXiv 2408.15664, Algorithm 1
$ b_i \leftarrow b_i + \gamma \operatorname{sign}(\text{mean load} - \text{load}_i)
After every step: the bias of a busy expert falls, that of an idle one rises.
> model.py DeepSeekV3.update_bias

## DeepSeekMoE: the experts
Every token also visits the shared expert.

@ Eq. 12
$ \h'_t = \u_t + \sum_{i=1}^{N_s} \operatorname{FFN}_i^{(s)}(\u_t)
  + \sum_{i=1}^{N_r} g_{i,t} \operatorname{FFN}_i^{(r)}(\u_t)
The gate chooses, shared (s) and routed (r) experts compute. The report writes u_t three times. The
first is the residual x_t, which the block adds. The other two are its norm, the experts' input.
> model.py MoE.forward

@ The routed sum of Eq. 12
Each expert computes the rows of those tokens that have chosen it. None is dropped. The gate value
multiplies the input of W_down: that gives the same as multiplying its output.
> model.py Experts.forward

@ SwiGLU, arXiv 2002.05202
$ \operatorname{FFN}(\u) = W_{\text{down}}
  (\operatorname{silu}(W_{\text{gate}} \u) \odot W_{\text{up}} \u)
> model.py MLP.forward

## The balance loss of a sequence
The bias balances whole batches. A loss with a tiny weight keeps single sequences from extremes. It
looks at the scores without the bias.
? f_i, P_i | the share of the choices that expert i has, times E; its share of the scores
? \alpha | the weight of this loss, by which train.py multiplies

@ Eq. 19, 20
$ s'_{i,t} = \frac{s_{i,t}}{\sum_{j=1}^{N_r} s_{j,t}}
$ P_i = \frac{1}{T} \sum_{t=1}^{T} s'_{i,t}
> model.py balance_loss | P = | P =

@ Eq. 18
$ f_i = \frac{N_r}{K_r T} \sum_{t=1}^{T} 1 (s_{i,t} \in \operatorname{Topk}
  (\{s_{j,t} \mid 1 \le j \le N_r\}, K_r))
The 1 counts the tokens for which the condition holds. Counting has no gradient.
> model.py balance_loss | best = | f =

@ Eq. 17
$ L_{\text{Bal}} = \alpha \sum_{i=1}^{N_r} f_i P_i
> model.py balance_loss | return | return

## Multi-Token Prediction
Module k takes the state of the depth before and the token k places later, and predicts one token
further. It shares embedding and head with the model.
? \h_i^k | the state of depth k at token i; depth 0 is the model
? M_k, \operatorname{TRM}_k | the matrix from two vectors to one, eh_proj; the block
? P_i^k | the probabilities that depth k gives to the token at place i
? D, \lambda | how many modules there are (here only); the weight of their loss

@ Eq. 21, 22
$ \h'_i^k = M_k [\operatorname{RMSNorm}(\h_i^{k-1}); \operatorname{RMSNorm}
  (\operatorname{Emb}(t_{i+k}))]
$ \h_{1:T-k}^k = \operatorname{TRM}_k (\h'_{1:T-k}^k)
The released weights have the embedding first, and a norm after the block.
> model.py MTP.forward

@ The shift
Depth k has k positions fewer. Position i of depth k takes the token at i + k.
> model.py DeepSeekV3.forward | hidden = [self.trunk | hidden.append

@ Eq. 23-25
$ P_{i+k+1}^k = \operatorname{OutHead}(\h_i^k)
$ L_{\text{MTP}}^k = - \frac{1}{T} \sum_{i=2+k}^{T+1} \log P_i^k [t_i]
$ L_{\text{MTP}} = \frac{\lambda}{D} \sum_{k=1}^{D} L_{\text{MTP}}^k
The code takes the mean over the T - k targets that there are. train.py multiplies by λ.
> model.py DeepSeekV3.forward | main, *mtp = | "mtp_loss":

@ The loss of one depth
The head gives a score for every token. Targets below 0 do not count.
> model.py cross_entropy

## Drafts: speculative sampling
The MTP module drafts tokens, drawn from q. The model checks them in one call, with its own
distribution p at each place. The text is distributed as if the model had written it alone.

@ arXiv 2211.17192, Algorithm 1
$ \text{keep } x \text{ with probability } \min(1, p(x) / q(x))
u is uniform in [0, 1): u q(x) < p(x). All drafts after the first rejected one go, too.
> sample.py accept | p_x = | kept =

@ The token after the kept drafts
$ p'(x) = \operatorname{norm}(\max(0, p(x) - q(x)))
The rejected draft is replaced by a draw from p′. If all stay, one more token is drawn from p.
> sample.py accept | b = torch | return

## FP8: a scale for every tile
Numbers of 8 bits (E4M3) end at 448 and have 4 significant bits. Every 128 numbers of an activation,
and every 128 x 128 of a weight, have a scale of their own.

@ Section 3.3.2
$ s = \frac{\max |x|}{448} , \quad q = \text{E4M3}(\frac{x}{s}) , \quad x \approx s q
The maximum is that of the tile, taken anew each time. For scales that are powers of two (section
3.3.3), it rounds up.
> fp8.py quantize
"""
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #62646a; --page: #fff; --box: #f5f5f2;
  --line: #d9d9d4; --mark: #b5530a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a0a3a8; --page: #17181a;
  --box: #222427; --line: #3a3d42; --mark: #ffb070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1rem 1.2rem 6rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
header p, section > p { max-width: 46rem; margin: .3rem 0 .8rem; } summary { cursor: pointer; }
a { color: var(--mark); } nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
.row { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 1.2rem;
  border-top: 1px solid var(--line); padding: .7rem 0; align-items: start; }
.number { color: var(--soft); font-size: .85rem; margin: 0; } .note { margin: .3rem 0; }
.eq { margin: .45rem 0; overflow-x: auto; overflow-y: hidden; padding: .15rem 0; }
math { font-size: 1.15rem; } dt math { font-size: 1rem; }
mi.v { font-weight: bold; font-family: Georgia, "Times New Roman", "DejaVu Serif", serif; }
.code { background: var(--box); border-radius: .4rem; padding: .3rem .7rem .6rem; }
.code p { margin: 0; color: var(--soft); font-size: .8rem; } pre i { color: var(--soft); }
pre { margin: 0; font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre span { display: block; white-space: pre-wrap; overflow-wrap: anywhere; font-style: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .5rem 0; }
dd { margin: 0; }
@media (max-width: 56rem) { .row { grid-template-columns: minmax(0, 1fr); gap: .5rem; }
  body { padding: .6rem .8rem 5rem; } pre { font-size: .74rem; } math { font-size: 1rem; } }
@media (max-width: 30rem) { math { font-size: .9rem; } }
@media print { .row { break-inside: avoid; } }
"""


def mathml(text: str) -> str:
    """LaTeX, in which \\h is a vector h, as MathML. Few machines have a font of bold letters for
    mathematics, so that vectors are letters of a class."""
    text = re.sub(r"(\\?[a-z]+)'", r"{\1\\prime}", text)  # a prime of the letter's own size
    text = re.sub(r"\\([hckqvoue])(?![a-zA-Z])", r"\\mathbf{\1}", text)
    out = convert(text, display="block").replace('display="block"', 'displaystyle="true"')
    vector = r'<mi class="v" mathvariant="normal">{}</mi>'  # bold a is U+1D41A
    return re.sub(
        r"<mi>&#x(1D4\w\w);</mi>",
        lambda m: vector.format(chr(int(m[1], 16) - 0x1D41A + ord("a"))),
        out,
    )


def code(file: str, name: str, first: str = "", last: str = "") -> str:
    """The lines of a function below its docstring, or those from the first with `first` to the end
    of the statement with `last`, as HTML. Raises ValueError in one sentence."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next((x for x in node.body if getattr(x, "name", "") == part), None)
        if node is None:
            raise ValueError(f"{file} has no {name}: mend the SECTIONS of docs/annotate.py")
    begin, stop = node.body[ast.get_docstring(node) is not None].lineno, node.end_lineno
    lines = text.splitlines()
    if first:
        start = next((i for i in range(begin, stop + 1) if first in lines[i - 1]), stop + 1)
        stop = next((i for i in range(start, stop + 1) if last in lines[i - 1]), None)
        if stop is None:
            message = f"{file}: {name} has no line with {first!r}, or {last!r} behind it"
            raise ValueError(f"{message}: mend the SECTIONS of docs/annotate.py")
        begin = start
        for part in ast.walk(node):
            if isinstance(part, ast.stmt) and not hasattr(part, "body") and part.lineno <= stop:
                stop = max(stop, part.end_lineno)
    shown = html.escape(dedent("\n".join(lines[begin - 1 : stop])), quote=False).splitlines()
    marked = (re.sub(r"(#.*)$", r"<i>\1</i>", line) or " " for line in shown)
    shown = "".join(f"<span>{line}</span>" for line in marked)
    return f'<div class="code"><p>{file}, <code>{name}</code></p><pre>{shown}</pre></div>'


def row(text: str) -> str:
    """One row of SECTIONS as HTML."""
    left = right = note = ""
    for line in text.replace("\n  ", " ").splitlines():  # an equation may have several lines
        kind, rest = line[:1], line[1:].strip()
        if kind == "@":
            left += f'<p class="number">{html.escape(rest)}</p>'
        elif kind == "$":
            left += f'<p class="eq">{mathml(rest)}</p>'
        elif kind == ">":
            place, *pieces = (part.strip() for part in rest.split("|"))
            right = code(*place.split(), *pieces)
        else:
            note += line + " "
    return f'<div class="row"><div>{left}<p class="note">{html.escape(note)}</p></div>{right}</div>'


def page() -> str:
    """The whole page. Raises ValueError where a line of code is not there any more."""
    links = sections = ""
    for i, section in enumerate(SECTIONS.strip().removeprefix("## ").split("\n## ")):
        title, text = section.split("\n", 1)
        about, *rows = re.split(r"\n+(?=@)", text.strip())
        about, *letters = about.split("\n? ")
        links += f'<a href="#{i}">{title}</a>'
        sections += f'<section id="{i}"><h2>{title}</h2><p>{html.escape(about)}</p>'
        if letters:
            meanings = (line.split(" | ") for line in letters)
            pairs = (f"<dt>{mathml(x)}</dt><dd>{html.escape(words)}</dd>" for x, words in meanings)
            sections += f"<details><summary>Letters</summary><dl>{''.join(pairs)}</dl></details>"
        sections += "".join(map(row, rows)) + "</section>"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DeepSeek-V3: the report's equations beside the code</title>
<style>{STYLE}</style></head><body>
<header><h1>DeepSeek-V3: the report's equations beside the code</h1>
<p>At the left, on a phone above, the equations of the
<a href="https://arxiv.org/abs/2412.19437">technical report</a>, with its numbers, or of the paper
that is named. At the right, or below, the lines of this repository that compute them. The letters
for shapes stand at the top of model.py. Written by <code>python docs/annotate.py</code>.</p>
<nav>{links}</nav></header>
{sections}
</body></html>
"""


def definitions(path: Path) -> dict[str, int]:
    """The lines of a file's functions, classes and methods, by name: Gate.forward."""
    lines = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef):
                    lines[f"{node.name}.{part.name}"] = part.lineno
    return lines


def with_lines(document: Path) -> str:
    """The text of a page, in which every link to a line of code leads to the definition that its
    text or its title names. Raises ValueError in one sentence."""

    def line(path: str, name: str) -> int:
        lines = definitions(document.parent / path)
        if name not in lines:
            raise ValueError(f"{document.name}: {path} has no {name}, which a link names")
        return lines[name]

    def link(found: re.Match) -> str:
        text, path, title = found.groups()
        place = f"{path}#L{line(path, title or text.strip('`'))}"
        return f'[{text}]({place} "{title}")' if title else f"[{text}]({place})"

    def link_in_html(found: re.Match) -> str:
        path, name = found.groups()
        return f'"{path}#L{line(path, name)}">{name}, {Path(path).name}:{line(path, name)}<'

    text = document.read_text(encoding="utf-8")
    text = re.sub(r'\[([^]]+)\]\(([\w./]+\.py)#L\d+(?:\s+"([^"]+)")?\)', link, text)
    return re.sub(r'"([\w./]+\.py)#L\d+">([\w.]+), [\w.]+:\d+<', link_in_html, text)


if __name__ == "__main__":
    try:
        text = page()
        for document in WITH_LINKS:
            document.write_text(with_lines(document), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"error: {error}")
    (ROOT / "docs/annotated.html").write_text(text, encoding="utf-8")
    print(f"wrote docs/annotated.html, {len(text.encode()) / 1000:.0f} kB", file=sys.stderr)
