"""Exercise 5. Tokens to experts and back.

y = sum over the K chosen experts i of g_i FFN_i(x)                                  Eq. 12
FFN_i(x) = W_down,i (silu(W_gate,i x) * W_up,i x)

A token visits K of E experts. Each expert gathers the tokens that chose it as the rows of a matrix,
which takes one product for each of its three matrices. The results are multiplied by the gate
values and added up, token by token. No token is dropped, and no expert computes a token that did
not choose it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# First count. A layer of V3: D = 7168, every expert is F = 2048 wide, a token visits 8 of 256 and
# the shared one. How many FLOPs do the experts' matrices take per token, forward? (A
# multiplication and an addition are two. Leave out the gate. You may write an expression.)
FLOPS = None
# How many times as many would it take if every token visited all 256 (and the shared one)?
TIMES = None


def experts(self, x: Tensor, chosen: Tensor, gain: Tensor) -> Tensor:
    """x (tokens, D), chosen experts (tokens, K) int64, their gate values gain (tokens, K) ->
    (tokens, D).

    self.gate_up_proj (E, 2F, D): of every expert first W_gate (F, D), then W_up (F, D).
    self.down_proj (E, D, F): W_down.
    """
    raise NotImplementedError
