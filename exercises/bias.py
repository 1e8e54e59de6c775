"""Exercise 2. The update of the bias: balance without a loss.

b_i += gamma * sign(mean load - load of expert i)          section 2.1.2; arXiv 2408.15664

After every step each layer with experts compares how often its experts were chosen. The bias of an
expert that was busier than the mean falls by gamma, that of an idler one rises by gamma. The gate
adds it to the score when it chooses (exercise 1). A balance loss would also move the weights, away
from what predicts the next token. The bias has no gradient, so it adds nothing to that of the text.
"""

import torch

# First predict. In a layer one expert is always busier than the mean, another always idler, and
# gamma is 0.001. After how many steps is the idle one's bias 0.05 above the busy one's?
STEPS = None
# In the trained network all biases (about 0.1 to 0.2) are set to 0, and nothing else changes. What
# happens to the loss of a text: "rises", "stays" (within 1%) or "falls"?
LOSS_WITHOUT_BIAS = None


@torch.no_grad()
def update_bias(self, gamma: float) -> None:
    """Moves the bias of every gate of the model, then sets its load to 0.

    self.gates(): the gates of the layers with experts. A gate's load (E,) int64 is how often each
    expert was chosen since the last call; its bias is its e_score_correction_bias (E,). Both are to
    be changed in place.
    """
    raise NotImplementedError
