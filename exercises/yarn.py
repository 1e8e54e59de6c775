"""Exercise 11. The rotary table, with YaRN: a network trained on short texts reads long ones.

frequency_i = theta^(-2i/R),  i = 0 .. R/2 - 1          angle of position t = t * frequency_i

A network trained on texts of L tokens has never seen some of a longer text's angles. Under YaRN the
fast pairs, which make 32 turns or more in L tokens, keep their frequency, since all their angles
occurred in training. The slow pairs, which make one turn or less, get frequency / factor, so a text
of factor x L tokens ends at an angle from training. Pairs in between mix the two frequencies:
ramp_i, the share of frequency / factor, rises linearly from 0 to 1 with i, not with the number of
turns.

First solve for i(n), the i of a pair with n turns in L tokens, not necessarily an integer. The ramp
begins at low, which is i(32), rounded down and at least 0. It ends at high, which is i(1), rounded
up and at most R - 1. (The released code has this limit, although the last pair is R/2 - 1.) YaRN
also sharpens attention, which is part of `MLA.scale`. (arXiv 2309.00071; section 4.3.)
"""

import math

import torch
from torch import Tensor

# First count. V3: R = 64, theta = 10,000, trained on L = 4,096 tokens before YaRN (factor 40).
KEPT = None  # how many of the 32 pairs keep their frequency?
DIVIDED = None  # how many have it divided by 40?
# Why not divide every frequency by 40? By what angle, in radians, would then even the fastest pair
# turn from one token to the next?
NEIGHBOURS = None
SLOWEST_LONG = None  # how many turns does the last pair make in a text of 40 L tokens, with YaRN?


def rope_table(config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (T,) int64 -> cos and sin of the angles, (T, R/2) each, computed in dtype.

    config.qk_rope_head_dim is R, config.rope_theta is theta. config.rope_scaling is None (without
    YaRN) or a dict: ["factor"], and ["original_max_position_embeddings"], which is L. If low and
    high are equal, use 0.001 as their difference.
    """
    raise NotImplementedError
