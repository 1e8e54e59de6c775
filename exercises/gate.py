"""Exercise 4. The gate: which experts a token visits, and how much each of them counts.

s_i = sigmoid(u . e_i)                                                               Eq. 15
chosen: the K experts with the largest s_i + b_i, in at most `topk_group` groups     Eq. 16
g_i = s_i / (sum of the s_j that are chosen)  times routed_scaling_factor            Eq. 13

The bias b only chooses: values and gradients come from s. With G > 1 groups of experts (the nodes
of a cluster) a group's score is the sum of its two largest s + b; the `topk_group` best groups stay
and the experts of the others cannot be chosen, whatever their biases are.
"""

import torch
from torch import Tensor

from model import upcast  # float64 stays, all else becomes float32

# First predict. Four experts, one group, K = 2, routed_scaling_factor = 2.5. A token's scores s are
# (0.8, 0.6, 0.5, 0.2), the biases b are (-0.5, 0, 0, 0.6). How large is the last one's gate value?
GATE_VALUE = None
# V3 has 256 experts in 8 groups, one group a node. Up to how many nodes would a token be sent to if
# its 8 experts could lie in any group, and to how many is it sent at most with topk_group = 4?
NODES_ANY, NODES_V3 = None, None


def gate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, D) -> s (B, T, E), chosen experts (B, T, K) int64, their gate values (B, T, K).

    self.weight (E, D) has the e_i, self.e_score_correction_bias (E,) is b. self.config has n_group
    (G), topk_group, num_experts_per_tok (K), norm_topk_prob (if False, do not divide) and
    routed_scaling_factor. The order of the K is free.
    """
    raise NotImplementedError
