"""Exercise 4. The gate: which experts a token visits, and the weight of each.

s_i = sigmoid(u . e_i)                                                               Eq. 15
chosen: the K experts with the largest s_i + b_i, in at most `topk_group` groups     Eq. 16
g_i = s_i / (sum of s_j over the chosen j)  times routed_scaling_factor              Eq. 13

The bias b only affects the choice: gate values and gradients come from s. With G > 1 groups of
experts (the nodes of a cluster) a group's score is the sum of its two largest s + b. Only experts
of the `topk_group` best groups can be chosen, even if every s + b in them is negative.
"""

import torch
from torch import Tensor

from model import upcast  # float64 stays, all else becomes float32

# First predict. Four experts, one group, K = 2, routed_scaling_factor = 2.5. A token's scores s are
# (0.8, 0.6, 0.5, 0.2), the biases b (-0.5, 0, 0, 0.6). How large is the last expert's gate value?
GATE_VALUE = None
# V3 has 256 experts in 8 groups, one group per node. To how many nodes, at most, would a token be
# sent if its 8 experts could be in any group? And to how many with topk_group = 4?
NODES_ANY, NODES_V3 = None, None


def gate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, T, D) -> s (B, T, E), chosen experts (B, T, K) int64, their gate values (B, T, K).

    self.weight (E, D) has the e_i, self.e_score_correction_bias (E,) is b. self.config has n_group
    (G), topk_group, num_experts_per_tok (K), norm_topk_prob (if False, do not divide) and
    routed_scaling_factor. The K experts may be in any order.
    """
    raise NotImplementedError
