"""Exercise 7. Rows to experts and back.

y = sum over the K chosen experts i of g_i FFN_i(u) + FFN_shared(u)                  Eq. 12
FFN(u) = W_down (silu(W_gate u) * W_up u)

A token visits K of E experts. So tokens are copied to K rows each, the rows are ordered by expert,
every expert computes its rows in one product, and the results go back to their tokens, where they
are added up. No token is dropped. (A loop over the experts is a right answer.)
"""

import torch.nn.functional as F  # F.silu, F.linear
from torch import Tensor


def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x (B, T, D) -> y (B, T, D), and (scores, chosen experts) of the gate.

    self.gate(x) gives scores s (B, T, E), chosen experts (B, T, K) and gate values (B, T, K).
    self.experts.gate_up_proj (E, 2F, D): for every expert first W_gate (F, D), then W_up (F, D);
    self.experts.down_proj (E, D, F): W_down. self.shared_experts: a module, or None if there is no
    shared expert.
    """
    raise NotImplementedError
