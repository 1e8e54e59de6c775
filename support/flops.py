"""FLOPs of a training step, and FLOP/s of a card. Their ratio is nanoGPT's mfu."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from support.settings import info, short

# FLOP/s of dense bf16 products, with sums in float32, by NVIDIA's data sheets for the A100 (2021),
# H100 (2022; SXM and PCIe) and H200 (2023) and its papers on the architectures of the RTX 3090
# (2020) and 4090 (2022). Most state twice as many, with sparsity. The H800 is an H100 with slower
# links.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12}
PEAK_FLOPS |= {"RTX 3090": 71e12, "RTX 4090": 165e12}
OTHERS = ("NVL", "Laptop", " Ti", " D")  # in the names of cards that are slower or faster
GROUPED, ATTENTION = "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu"


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of bf16 products; None if unknown."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if any(word in card for word in OTHERS):
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


class Products(TorchDispatchMode):
    """Counts the FLOPs of all matrix products within `with Products() as products:`, by torch's
    formulas. Causal attention counts half: the part below the diagonal."""

    def __init__(self):
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name == GROUPED:  # torch has no formula for it, and no fake in float32
            x, weight = args[:2]
            self.flops += 2 * x.numel() * weight.shape[-1]
            return x.new_empty(len(x), weight.shape[-1])
        out = func(*args, **kwargs)
        if name == ATTENTION:
            q, k, v, _, causal = (*args, 0.0, False)[:5]
            pairs = q[..., 0].numel() * k.shape[-2] / (2 if causal else 1)
            self.flops += 2 * pairs * sum(getattr(x, "width", x.shape[-1]) for x in (k, v))
        elif name == "constant_pad_nd":  # padding for a kernel that needs equal widths: no FLOPs
            out.width = args[0].shape[-1]
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out


def flops_per_token(model: nn.Module, T: int) -> float | None:
    """FLOPs per token of a training step with windows of T tokens, MTP modules included. Counts a
    forward pass of the network on fake tensors, which have shapes but no values; a backward pass
    takes twice as much. None, and a message, if an edited network cannot run so, because it needs a
    tensor's value."""
    with FakeTensorMode():  # with gradients: without them, few tokens take a path that needs values
        fakes = {}  # deepcopy's memo: {id of a parameter or buffer: its fake}
        for x in (*model.parameters(), *model.buffers()):
            empty = torch.empty(x.shape, dtype=x.dtype)
            fakes[id(x)] = empty.float() if x.is_floating_point() else empty
        tokens = torch.zeros(1, T, dtype=torch.long)
        try:
            with Products() as products:
                copy.deepcopy(model, fakes)(tokens, tokens)
        except Exception as error:  # every network fails in its own way
            info(f"FLOPs are not counted, as a tensor's value is needed: {short(error)}")
            return None
    return 3 * products.flops / T
