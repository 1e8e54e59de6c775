"""Exercise 11. The rotary table, with YaRN: what was trained on short texts reads long ones.

frequency_i = theta^(-2i/R),  i = 0 .. R/2 - 1          angle of position t = t * frequency_i

Training has read texts of L tokens. A longer text has angles that training never showed. With YaRN
the fast pairs, which make 32 turns and more in L tokens, keep their frequency: they have seen all
their angles. The slow ones, which make one turn or less, get frequency / factor. So a text of
factor x L tokens ends at an angle they know. In between, the two are mixed: ramp_i is the share of
the second. It rises from 0 to 1 in a straight line with i, not with the number of turns.

First find i(n), the i that makes n turns in L tokens; it need not be whole. The line begins at low:
i(32), rounded down and at least 0. It ends at high: i(1), rounded up and at most R - 1. (The
released code has this limit, though the last pair is R/2 - 1.) YaRN also sharpens attention: that
is part of `MLA.scale`. (arXiv 2309.00071; section 4.3.)
"""

import math

import torch
from torch import Tensor

# First count. V3: R = 64, theta = 10,000, trained on L = 4,096 tokens before YaRN (factor 40).
KEPT = None  # how many of the 32 pairs keep their frequency?
DIVIDED = None  # how many get the 40th part of it?
# Why not divide every frequency by 40? Then by which angle, in radians, would even the fastest pair
# turn from one token to the next?
NEIGHBOURS = None
SLOWEST_LONG = None  # how many turns does the last pair make in a text of 40 L tokens, with YaRN?


def rope_table(config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (T,) int64 -> cos and sin of the angles, (T, R/2) each, computed in dtype.

    config.qk_rope_head_dim is R, config.rope_theta is theta. config.rope_scaling is None (without
    YaRN) or a dict: ["factor"], and ["original_max_position_embeddings"], which is L. If high is
    low, take 0.001 for their difference.
    """
    raise NotImplementedError
