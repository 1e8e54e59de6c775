"""Exercise 3. RMSNorm and RoPE, and why position has a small key of its own.

RMSNorm       y = weight * x / sqrt(mean(x^2) + eps)     the mean is over the last dimension
RoPE          pair number i of the token at position t is turned by the angle t theta^(-2i/R):
              (a, b) -> (a cos - b sin, a sin + b cos)

RoPE turns queries and keys, so that their product depends on the distance of the two tokens, not on
where they stand: (R_t q) . (R_j k) = q . (R_{j-t} k). Were the key from the latent turned, k = W^UK
c, this would be q . (R_{j-t} W^UK c). A rotation stands between q and W^UK, another one for every
distance, so no single matrix can go over to the query (exercise `absorbed`). So V3 leaves that key
as it is, and R more numbers, one small key for all heads, carry the position. (Part 5
of docs/TOUR.md tries it without.)
"""

import torch
from torch import Tensor

from model import upcast  # float64 stays, all else becomes float32

# First count. Were the keys from the latents turned in V3, too (H = 128, N = 128, C = 512, R = 64):
MATRICES = None  # how many different R_{j-t} W^UK would a head's query need in 4,096 tokens?
# Instead one could cache all heads' turned keys, beside the latents for the values. How many
# numbers a token and layer would that be, and how many does V3 cache?
TURNED, SEPARATE = None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype. All before the weight is computed in
    float32 at least (upcast), and rounded to x's dtype; then the weight multiplies."""
    raise NotImplementedError


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """x (B, T, H, R) -> (B, T, H, R) in x's dtype. rope: cos and sin of the angles, (T, R/2) each.

    interleave: pair i is (x[2i], x[2i+1]), neighbours; else it is (x[i], x[i + R/2]).
    """
    raise NotImplementedError
