"""Exercise 8. Tokens to experts and back.

y = sum over the K chosen experts i of g_i FFN_i(x)                                  Eq. 12
FFN_i(x) = W_down,i (silu(W_gate,i x) * W_up,i x)

A token visits K of E experts. So every expert takes the tokens that have chosen it, as the rows of
a matrix, and computes them in one product for each of its three matrices. The results go back to
their tokens, times the gate values, and are added up. No token is dropped, and no expert computes a
token that did not choose it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_ffn(
    x: Tensor, chosen: Tensor, gain: Tensor, gate_up: Tensor, down: Tensor, swiglu: Callable
) -> Tensor:
    """x (tokens, D), chosen experts (tokens, K) int64, their gate values gain (tokens, K) ->
    (tokens, D).

    gate_up (E, 2F, D): of every expert first W_gate (F, D), then W_up (F, D). down (E, D, F):
    W_down. swiglu(a, b, g) is silu(a) * b * g, for a and b (rows, F) and gate values g (rows,):
    W_down is linear, so its input may be multiplied as well as its output.
    """
    raise NotImplementedError
