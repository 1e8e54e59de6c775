"""Exercise 9. Multi-Token Prediction: what each depth sees, and what it has to predict.

h^k = module k of (h^{k-1}, embeddings of the tokens k later),  h^0 from the model   Eq. 21, 22
p^k = softmax(W_head h^k)  predicts the token k + 1 later                            Eq. 23
loss = mean over the depths k = 1, 2, ... of the cross-entropy of p^k                Eq. 24, 25

Position i of depth k knows the tokens up to i + k and predicts token i + k + 1. So depth k has k
positions fewer than the model. The next token of position i is targets[:, i], and the token k + 1
later is targets[:, i + k]. (Eq. 24 divides by T. The code takes the mean over the targets.)
"""

import torch
from torch import Tensor

from model import head_loss


def mtp_loss(model, tokens: Tensor, targets: Tensor) -> Tensor:
    """tokens (B, T), targets (B, T): the next tokens, -1 where there is none -> a scalar, in nats.

    model.trunk(tokens) gives h^0 (B, T, D). model.predict_next(k - 1, h, later) runs module k on
    h = h^{k-1} and the tokens k later, both cut to the T - k positions that it has. model.mtp is
    the list of modules. head_loss(h, model.lm_head.weight, targets) takes h (positions, D) and
    targets (positions,) and gives the mean cross-entropy of those that are not -1.
    """
    raise NotImplementedError
