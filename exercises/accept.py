"""Exercise 9. Speculative sampling: cheap drafts, and a text with the model's own distribution.

draft x, drawn from q, stays if u < min(1, p(x) / q(x))           arXiv 2211.17192, Algorithm 1
the first rejected draft is replaced by a draw from norm(max(0, p - q))
if all stay, one more token is drawn from p

p is the model's distribution at each position, q the distribution of the draft. Tokens with q > p
are rejected in proportion to the excess; tokens with q < p are made up for by max(0, p - q). So
every token is distributed as p, whatever q is. All drafts after a rejected one are discarded.
"""

import torch
from torch import Tensor

from sample import draw

# First predict. Of three tokens the model has p = (0.2, 0.5, 0.3), the draft q = (0.5, 0.3, 0.2).
STAYS = None  # the draft is token 0: with what probability does it stay?
RATE = None  # with what probability does a draft from q stay, averaged over all drafts?
TOKENS = None  # with one draft per round, how many new tokens does a round give on average?


def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p (B, G+1, V), q (B, G, V), drafts (B, G) int64, u (B, G+1) uniform in [0, 1) ->
    how many drafts stay (B,) int64, and the token after them (B, 1) int64.

    u[:, :G] decide about the drafts, u[:, G] draws the token. draw(w (B, 1, V), u (B, 1)) draws
    (B, 1) from weights, which need not sum to one. If max(0, p - q) is 0 everywhere, draw from p.
    """
    raise NotImplementedError
