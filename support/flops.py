"""FLOPs of a training step, and FLOP/s of a card. Their ratio is nanoGPT's mfu, and an estimate of
a run's time."""

import copy
import re
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from support.clock import rough
from support.processes import Machine
from support.settings import info, short

# TFLOP/s of dense products in bf16, with sums in float32, from NVIDIA's data sheets, most of which
# state twice as many, with sparsity. RTX cards do 512 FLOPs per multiprocessor and cycle, counted at
# the boost clock, as in NVIDIA's papers on Ampere, Ada and Blackwell. T4 and V100 lack bf16: theirs
# are of products in float32.
TERA = {
    "H100": 989, "H100 PCIe": 756, "H200": 989, "H800": 989, "A100": 312, "A100-SXM4": 312,
    "A100-PCIE": 312, "A10": 125, "L4": 121, "L40S": 362, "T4": 8.1, "V100-SXM2": 15.7,
    "V100-PCIE": 14,
    "RTX 3060": 25, "RTX 3070": 41, "RTX 3080": 60, "RTX 3090": 71,
    "RTX 4060": 30, "RTX 4070": 58, "RTX 4080": 97, "RTX 4090": 165,
    "RTX 5070": 62, "RTX 5070 Ti": 88, "RTX 5080": 113, "RTX 5090": 209.5,
}  # fmt: skip
PEAK_FLOPS = {name: tera * 1e12 for name, tera in TERA.items()}
SHARE = 0.25  # of the speed of bare products: what a run reaches, or half or twice that
GROUPED, ATTENTION = "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu"


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of products; None if unknown, as for a card with a longer name: a Ti, D or Laptop."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = re.fullmatch(r"(?:NVIDIA|Tesla)(?: GeForce)? (.+?)(?:-\w+GB)?(?: \d+GB.*)?", card)
    return PEAK_FLOPS.get(found[1]) if found else None


def log_time(active: int, tokens: int, machine: Machine):
    """Prints an estimate of the time for so many tokens, if it is a minute or more: 6 FLOPs per
    token and active parameter, at a SHARE of the speed of bare products. (The embedding's
    parameters, which multiply nothing, stand in for an MTP module's head.)"""
    cores = torch.get_num_threads() if machine.device.type == "cpu" else 1
    speed = machine.speed * cores * machine.world
    seconds = 6 * active * tokens / (SHARE * speed)
    if seconds < 60:
        return
    how = f", estimated from products at {speed / 1e9:,.0f} GFLOP/s"
    if machine.device.type == "cpu":
        how = " if nothing else uses the CPU (if something does, set OMP_NUM_THREADS=1)"
    info(f"time: roughly {rough(seconds)}{how}")


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
