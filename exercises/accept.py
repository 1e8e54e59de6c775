"""Exercise 9. Speculative sampling: cheap drafts, and a text with the model's own distribution.

draft x, drawn from q, stays if u < min(1, p(x) / q(x))           arXiv 2211.17192, Algorithm 1
the first that does not stay is replaced by a draw from norm(max(0, p - q))
if all stay, one more token is drawn from p

p is the model's distribution at each position, q the one that the draft was drawn from. Where q has
too much, drafts are rejected in that measure; where it has too little, max(0, p - q) makes up for
it. So every token is distributed as p, whatever q is. All after a rejected draft is thrown away.
"""

import torch
from torch import Tensor

from sample import draw

# First predict. Of three tokens the model has p = (0.2, 0.5, 0.3), the draft q = (0.5, 0.3, 0.2).
STAYS = None  # the draft is token 0: with which probability does it stay?
RATE = None  # with which probability does a draft from q stay, whichever it is?
TOKENS = None  # one draft a round: how many new tokens does a round give on average?


def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p (B, G+1, V), q (B, G, V), drafts (B, G) int64, u (B, G+1) uniform in [0, 1) ->
    how many drafts stay (B,) int64, and the token after them (B, 1) int64.

    u[:, :G] decide about the drafts, u[:, G] draws the token. draw(w (B, 1, V), u (B, 1)) draws
    (B, 1) from weights, which need not sum to one. If nothing is left of p - q, draw from p.
    """
    raise NotImplementedError
