"""Exercise 8. The update of the bias: balance without a loss.

After every step each MoE layer compares the loads of its experts, how often each was chosen. An
expert with a load above the layer's mean must become a little less likely, one below the mean a
little more likely. The gate adds the bias to the score when it chooses (exercise `gate`). Each step
changes a bias by gamma, however far the load is from the mean. Write this as one formula for b_i.
(Section 2.1.2; arXiv 2408.15664.) What happens to an expert whose load is exactly the mean?

A balance loss would also move the weights, away from what predicts the next token best. The bias
has no gradient and leaves the weights to the loss of the text.
"""

import torch

# First predict. Two experts of a layer begin with equal biases. The load of the first is above the
# mean in every step, that of the second below it, and gamma is 0.001. After how many steps is the
# second one's bias 0.05 above the first one's?
STEPS = None
# Four experts have loads of 12, 2, 1 and 1. By how much does one step, with the same gamma, change
# the mean of their biases?
DRIFT = None
# 0.2 is added to all biases of a layer. How many tokens are routed to other experts?
CHANGED = None
# In the trained network all biases (-0.11 to 0.44) are set to 0, and nothing else changes. What
# happens to the loss of a text: "rises", "stays" (within 1%) or "falls"?
LOSS_WITHOUT_BIAS = None


@torch.no_grad()
def update_bias(self, gamma: float) -> None:
    """Moves the bias of every gate of the model, then sets its load to 0.

    self.gates(): the gates of all MoE layers. A gate's load (E,) int64 is how often each expert was
    chosen since the last call; its bias is e_score_correction_bias (E,). Change both in place.
    """
    raise NotImplementedError
