"""Exercise 2. Attention on the cached latents: why the cache can be so small.

q . (W^UK c) = (W^UK^T q) . c                 sum_j p_j (W^UV c_j) = W^UV (sum_j p_j c_j)

Decoding as in exercise `mla` would compute keys and values of all earlier tokens again for every
new token. Instead, W^UK is applied to the query and W^UV to the output. Attention then needs only
the cache: for every token the C numbers of its latent and the R numbers of its rotated key. The
result is the same as in exercise `mla`, but keys and values of cached tokens are never computed:
check.py counts multiplications.

The queries belong to the last T of the S cached tokens: query i has positions[i].
"""

import torch
from torch import Tensor

# First count the multiplications of one head in V3 (N = 128, R = 64, V = 128, C = 512). How many
# are the score of one query with one cached token and the token's part of the output,
EXPANDED = None  # if the token's key and value have been computed?
ABSORBED = None  # if its latent and rotated key are used instead?
# And how many compute the key (N) and the value (V) of one cached token from its latent?
MAKING = None


def attend_absorbed(self, q_nope: Tensor, q_pe: Tensor, kv: Tensor, positions: Tensor) -> Tensor:
    """q_nope (B, T, H, N), q_pe (B, T, H, R), kv (B, S, C+R), positions (T,) -> (B, T, H, V).

    Use self.scale and self.kv_b_proj.weight, (H*(N+V), C): for every head first its N rows of W^UK,
    then its V rows of W^UV. self.config.kv_lora_rank is C.
    """
    raise NotImplementedError
