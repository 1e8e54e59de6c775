"""Exercise 1. Multi-head Latent Attention: keys and values of all heads from one latent.

k_t^C = W^UK c_t^KV        v_t^C = W^UV c_t^KV        k_t,i = [k_t,i^C; k_t^R]        Eq. 2, 4, 5
o_t,i = sum over j <= t of softmax_j(q_t,i . k_j,i * scale) v_j,i^C                   Eq. 10

A token's latent c^KV is short; W^UK and W^UV turn it into every head's key and value. The part of
the key with the position, k^R, is computed from the layer's input, not from the latent (the papers
give no reason). All heads share k^R, so the cache holds R numbers for it, not H x R. The scale is
1 / sqrt(N + R), with YaRN times a factor: use `self.scale`.

Letters: B texts, T tokens, H heads, C numbers in a latent, V in a value. A query or key has N
numbers without position and R with it.
"""

import torch
from torch import Tensor

# First count: how many bytes does the cache hold per token, over all layers, in bfloat16 (2 bytes
# a number)? V3 has 61 layers, H = 128, N = 128, R = 64, V = 128, and C = 512.
CACHE_MHA = None  # with standard attention: N numbers for a key and V for a value, for every head
CACHE_GQA = None  # with 8 heads of keys and values (128 numbers each) for the 128 heads of queries
CACHE_MLA = None  # V3 itself: the latent c^KV and k^R
# In V3 a token's k^C and v^C are 32,768 numbers over all heads, a linear function of its latent.
# How many dimensions does the space have in which they can lie?
DIMENSIONS = None


def attend_expanded(self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor) -> Tensor:
    """q_nope (B, T, H, N), q_pe (B, T, H, R), latent (B, T, C), k_pe (B, T, 1, R) -> (B, T, H, V).

    q_pe and k_pe are already rotated (RoPE). Use self.scale and self.kv_b_proj, the linear layer
    from C to H*(N+V): head by head, first its N rows of W^UK, then its V rows of W^UV.
    self.config.v_head_dim is V.
    """
    raise NotImplementedError
