"""Exercise 1. RMSNorm, and RoPE: how a vector gets its size and its position.

RMSNorm       y = x / sqrt(mean(x^2) + eps)              the mean is over the last dimension
RoPE          pair number i of the token at position t is turned by the angle t theta^(-2i/R):
              (a, b) -> (a cos - b sin, a sin + b cos)

RMSNorm keeps a vector's direction and gives its numbers a mean square of about 1; eps keeps zeros
from dividing by zero. RoPE turns queries and keys, so that their product depends on the distance of
the two tokens, not on where they stand. (The angles are computed already: `rope` has them.)
"""

from torch import Tensor

from support.ops import upcast  # float64 stays, all else becomes float32


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x (..., D) -> (..., D) in x's dtype, computed in upcast(x)."""
    raise NotImplementedError


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """x (B, T, H, R) -> (B, T, H, R) in x's dtype. rope: cos and sin of the angles, (T, R/2) each.

    interleave: pair i is (x[2i], x[2i+1]), neighbours; else it is (x[i], x[i + R/2]).
    """
    raise NotImplementedError
