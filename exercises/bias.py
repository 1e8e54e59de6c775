"""Exercise 6. The update of the bias: balance without a loss.

b_i += gamma * sign(mean load - load of expert i)          section 2.1.2; arXiv 2408.15664

After every step each layer with experts compares how often its experts were chosen. The bias of an
expert that was busier than the mean falls by gamma, that of an idler one rises by gamma. The gate
adds it to the score when it chooses (exercise 5). No gradient is needed.
"""

import torch


@torch.no_grad()
def update_bias(self, gamma: float) -> None:
    """Moves the bias of every gate of the model, then sets the counts to 0.

    self.expert_counts (layers with experts, E) int64: how often each expert was chosen since the
    last call. self.gates(): the gates of these layers, in the same order; a gate's bias is its
    e_score_correction_bias (E,), to be changed in place.
    """
    raise NotImplementedError
