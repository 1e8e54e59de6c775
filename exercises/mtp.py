"""Exercise 6. Multi-Token Prediction: what each depth sees, and what it predicts.

h^k = module k of (h^{k-1}, embeddings of the tokens k later),  h^0 from the model   Eq. 21, 22
p^k = softmax(W_head h^k)  predicts the token k + 1 later                            Eq. 23
loss = mean over the depths k = 1, 2, ... of the cross-entropy of p^k                Eq. 24, 25

Position i of depth k sees the tokens up to i + k and predicts token i + k + 1. So depth k has k
positions fewer than the model. For position i, targets[:, i] is the next token, and
targets[:, i + k] the token k + 1 later. (Eq. 24 divides by T. The code averages over the targets.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# First predict. A window has 10 tokens and 10 targets, counted from 0. Target i is token i + 1.
POSITIONS = None  # at how many positions does depth 2 predict?
LAST_SEEN = None  # the newest token that depth 2 sees at position 3
PREDICTED = None  # the token that it predicts there


def mtp_loss(model, tokens: Tensor, targets: Tensor) -> Tensor:
    """tokens (B, T), targets (B, T): the next tokens, -1 where there is none -> a scalar, in nats.

    model.trunk(tokens) gives h^0 (B, T, D). model.predict_next(k, h, later) runs module k on
    h = h^{k-1} and the tokens k later, both cut to the module's T - k positions. model.mtp is the
    list of modules; T exceeds their number. model.logits(h) is W_head h. A depth's loss is the mean
    over the targets that are not -1.
    """
    raise NotImplementedError
