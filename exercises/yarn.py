"""Exercise 11. The rotary table, with YaRN: what was trained on short texts reads long ones.

frequency_i = theta^(-2i/R),  i = 0 .. R/2 - 1          angle of position t = t * frequency_i
i(n) = R ln(L / (2 pi n)) / (2 ln theta)                the pair that makes n turns in L tokens
low = floor(i(32)), at least 0      high = ceil(i(1)), at most R - 1
ramp_i = (i - low) / (high - low), between 0 and 1
frequency_i = (1 - ramp_i) * frequency_i + ramp_i * frequency_i / factor      with YaRN

A text `factor` times as long as L has angles that training never showed. The fast pairs, which make
32 turns and more, have seen all their angles: they stay. The slow ones, which make less than one,
are slowed down, so that the long text ends at an angle they know. In between, the two are blended.
(arXiv 2309.00071; section 4.3. YaRN also sharpens attention: that is part of `MLA.scale`.)
"""

import math

import torch
from torch import Tensor

# First count. V3: R = 64, theta = 10,000, trained on L = 4,096 tokens before YaRN (factor 40).
FASTEST = None  # how many turns does pair 0 make in L tokens?
SLOWEST = None  # and the last pair, i = 31?
SLOWEST_LONG = None  # and the last pair in a text of 40 L tokens, with YaRN?


def rope_table(config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (T,) int64 -> cos and sin of the angles, (T, R/2) each, computed in dtype.

    config.qk_rope_head_dim is R, config.rope_theta is theta. config.rope_scaling is None (without
    YaRN) or a dict: ["factor"], and ["original_max_position_embeddings"], which is L. If high is
    low, take 0.001 for their difference.
    """
    raise NotImplementedError
