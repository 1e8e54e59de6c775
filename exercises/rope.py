"""Exercise 3. RMSNorm and RoPE, and why position has a small key of its own.

RMSNorm       y = weight * x / sqrt(mean(x^2) + eps)     the mean is over the last dimension
RoPE          pair i of the token at position t is rotated by the angle t theta^(-2i/R):
              (a, b) -> (a cos - b sin, a sin + b cos)

RoPE rotates queries and keys, so that their product depends on the distance between two tokens, not
on their positions: (R_t q) . (R_j k) = q . (R_{j-t} k). V3 does not rotate the keys from the
latents, k = W^UK c. R more numbers, one small key for all heads, carry the position. Part 5 of
docs/TOUR.md says why, with the scores that come out otherwise.
"""

import torch
from torch import Tensor

from model import upcast  # float64 stays, all else becomes float32

# First count. Suppose V3 rotated the keys from the latents (H = 128, N = 128, C = 512, R = 64):
MATRICES = None  # how many different R_{j-t} W^UK would a head's query need in 4,096 tokens?
# Alternatively, one could cache the rotated keys of all heads, and the latents for the values. How
# many numbers would that be per token and layer, and how many does V3 cache?
TURNED, SEPARATE = None, None


def rms_norm(self, x: Tensor) -> Tensor:
    """x (..., D) -> (..., D) in x's dtype. Use self.weight (D,) and self.eps. The normalised x is
    computed in float32 at least (upcast) and rounded to x's dtype before it is multiplied by the
    weight."""
    raise NotImplementedError


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """x (B, T, H, R) -> (B, T, H, R) in x's dtype. rope: cos and sin of the angles, (T, R/2) each.

    interleave: pair i is (x[2i], x[2i+1]), neighbours; else it is (x[i], x[i + R/2]).
    """
    raise NotImplementedError
