"""Muon, an optimiser for matrices, and the choice of the parameters that it optimises."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum: Muon as in Moonlight (arXiv 2502.16982).

    A parameter is a matrix (out, in) or a stack of matrices (E, out, in). The update of each matrix
    is orthogonalised on its own, in `dtype`, and scaled to about the size of AdamW's updates.
    (W_gate and W_up are one matrix in an expert, but two in an MLP.) Matrices of the same shape are
    updated together. torch.optim.Muon gives the same results, one matrix at a time.
    """

    def __init__(self, params, defaults: dict, dtype: torch.dtype):
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, of_shape = group["lr"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    of_shape[p.shape[-2:]].append(p)
            for shape, params in of_shape.items():
                stacks = [self.averaged(p, group["momentum"]).reshape(-1, *shape) for p in params]
                updates = orthogonal(torch.cat(stacks), self.dtype).split([*map(len, stacks)])
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-lr * 0.2 * math.sqrt(max(shape)))

    def averaged(self, p: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # A resumed run may have another dtype than its checkpoint.
        average = self.state[p]["momentum_buffer"].to(p.dtype).lerp_(p.grad, 1 - momentum)
        self.state[p]["momentum_buffer"] = average
        return p.grad.lerp(average, momentum)


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (n, a, b) with all singular values near 1: five steps of the Newton-Schulz iteration of
    Jordan et al. (2024), with their coefficients, in this dtype."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        y = torch.baddbmm(y, gram, y, beta=3.4445)
    return y.mT if tall else y


def muon_takes(model: nn.Module) -> set[nn.Parameter]:
    """The matrices and stacks of matrices in the layers of a DeepSeekV3. As in Moonlight, embedding
    and head are left out. So are the gates and all parameters that do not map hidden states to
    hidden states: those of any nn.Embedding or convolution."""
    kinds = nn.Embedding | nn.modules.conv._ConvNd
    apart = [*model.gates(), *(x for x in model.modules() if isinstance(x, kinds))]
    not_these = {p for module in apart for p in module.parameters()}
    in_layers = (p for part in (model.layers, model.mtp) for p in part.parameters())
    return {p for p in in_layers if p.ndim in (2, 3)} - not_these
