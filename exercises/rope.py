"""Exercise 1. RMSNorm, and RoPE: how a vector gets its size and its position.

RMSNorm       y = weight * x / sqrt(mean(x^2) + eps)     the mean is over the last dimension
RoPE          pair number i of the token at position t is turned by the angle t theta^(-2i/R):
              (a, b) -> (a cos - b sin, a sin + b cos)

RMSNorm gives a vector's numbers a mean square of about 1, eps keeps zeros from dividing by zero,
and then each of the D numbers has a weight, which is learnt. RoPE turns queries and keys, so that
their product depends on the distance of the two tokens, not on where they stand. (The angles are
computed already: `rope` has them.)
"""

import torch
from torch import Tensor

from support.ops import upcast  # float64 stays, all else becomes float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype. All before the weight is computed in
    upcast(x), and rounded to x's dtype."""
    raise NotImplementedError


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """x (B, T, H, R) -> (B, T, H, R) in x's dtype. rope: cos and sin of the angles, (T, R/2) each.

    interleave: pair i is (x[2i], x[2i+1]), neighbours; else it is (x[i], x[i + R/2]).
    """
    raise NotImplementedError
