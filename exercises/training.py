"""Exercise 12. All together: your gate, your experts and your attention train a network.

L = L_main + lambda L_MTP + alpha (sum over the layers of L_Bal)                Eq. 17, 24-25
gradients of L, clipped to a norm of at most 1; a step of the optimiser; the update of the bias

check.py builds the network of config/tiny.py with your functions from the exercises `gate`,
`experts` and `mla`, and trains it for 30 steps with your step, on the bytes of a text. Then it
trains the original network from the same random numbers, so that you can compare the two curves.
"""

import torch
from torch import Tensor

# First predict. config/tiny.py: a vocabulary of 512, steps of 8 windows of 64 tokens.
FIRST_LOSS = None  # nats, before training, when every token is about as likely as any other
TOKENS = None  # how many tokens do 30 steps read?
# The gradient of L has the norm 5. All weights of the losses are doubled. By what factor does this
# change the gradient that the optimiser receives?
DOUBLED = None


def train_step(
    model, optimizer, tokens: Tensor, targets: Tensor, weights: dict[str, float], gamma: float
) -> dict[str, Tensor]:
    """One step, from tokens (B, T) and targets (B, T). Returns the losses by name.

    model(tokens, targets) gives the losses by name: "loss" (main), "mtp_loss", "balance_loss".
    weights has the weight of each in L, by the same names. Gradients of the previous step may still
    be stored. torch.nn.utils.clip_grad_norm_(parameters, 1.0) clips gradients. Update the bias
    last: model.update_bias(gamma).
    """
    raise NotImplementedError
