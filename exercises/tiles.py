"""Exercise 10. FP8 with a scale for every tile.

s = max |x| over the tile / 448       q = x / s in E4M3       x is about q s         section 3.3.2

E4M3 has 4 significant bits. Its largest number is 448, and its smallest number above 0 is 2^-9. So
each tile, 1 x 128 numbers for activations or 128 x 128 for weights, has its own scale, which maps
the tile's largest number to 448.
"""

import torch  # torch.float8_e4m3fn is E4M3
from torch import Tensor

# First predict. One number of a tensor is 896,000, another is 1, and the tensor has one scale.
BECOMES = None  # what is q s for the number 1?
# In a matrix of 1,024 x 1,024 one number is 896,000 and all others are about 1. How many of these
# become 0 if every 1 x 128 tile has a scale? (And how many with a single scale?)
LOST = None
BYTES_ROW = None  # bytes per number of activations, including its share of the scale (4 bytes)
BYTES_BLOCK = None  # bytes per number of a weight, likewise


def quantize(x: Tensor, block: tuple[int, int], pow2: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., M, K) -> q (..., M, K) in E4M3 and s (..., ceil(M/bm), ceil(K/bk)) in float32.

    block is (bm, bk): (1, 128) or (128, 128). Tiles at the edges are smaller. The scale of a tile
    of zeros is 1. pow2: every scale is rounded up to a power of two. Leading dimensions are
    separate matrices. The smallest scale is 2^-126.
    """
    raise NotImplementedError
