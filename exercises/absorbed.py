"""Exercise 2. Attention on the cached latents: why the cache can be so small.

q . (W^UK c) = (W^UK^T q) . c                 sum_j p_j (W^UV c_j) = W^UV (sum_j p_j c_j)

In decoding, keys and values of all old tokens would have to be made anew for every token. Instead
W^UK goes over to the query and W^UV to the output. Then attention needs only what the cache holds:
for every token the C numbers of its latent and the R numbers of its turned key. The result is that
of exercise `mla`. Keys and values of the old tokens are never made: multiplications are counted.

The last T of the S cached tokens are those of the queries: query i is token S - T + i.
"""

import torch
from torch import Tensor

# First count, for V3 (N = 128, R = 64, V = 128, C = 512), the multiplications of one head:
EXPANDED = None  # for one query and one key that is there: the score, and its share of the output
ABSORBED = None  # the same on the cached latents
MAKING = None  # to make the key (N) and the value (V) of one cached token from its latent


def attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, kv: Tensor) -> Tensor:
    """q_nope (B, T, H, N), q_pe (B, T, H, R), kv (B, S, C+R) with S >= T -> (B, T, H, V).

    Use self.scale and self.kv_b_proj.weight, (H*(N+V), C): for every head first its N rows of W^UK,
    then its V rows of W^UV. self.config.kv_lora_rank is C.
    """
    raise NotImplementedError
