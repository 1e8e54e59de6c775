"""Exercise 7. The balance loss, for each sequence separately.

f_i = E / (K T) * (how many of the T tokens have s_i among their K largest scores)  Eq. 18
P_i = mean over the T tokens of s_i / (sum over all experts of s_j)                 Eq. 19, 20
loss = sum_i f_i P_i,  then the mean over the sequences                             Eq. 17

The bias balances the experts over the whole batch. This loss, with a tiny weight, keeps one
sequence from sending all its tokens to the same experts. f is a count without a gradient; P has
one. The K largest are those by s, without the bias.
"""

import torch
from torch import Tensor

# First predict the loss of a sequence, with E = 8 and K = 2:
EVEN = None  # every expert is chosen equally often, whatever the scores are
SAME_TWO = None  # all tokens choose the same two experts, with s = 1; all other s are 0
# The busiest expert's f doubles, and nothing else changes. By what factor does the gradient of the
# loss by that expert's P grow?
GRADIENT = None
# E = 4, K = 2, and a batch of two sequences. In one all tokens choose experts 0 and 1, in the other
# experts 2 and 3, with s = 1; all other s are 0. So all experts are equally busy over the batch.
# What is the loss?
TWO_SEQUENCES = None


def balance_loss(s: Tensor, K: int) -> Tensor:
    """s (B, T, E), the scores of a gate -> the loss, a scalar, without its weight alpha."""
    raise NotImplementedError
