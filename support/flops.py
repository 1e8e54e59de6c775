"""FLOPs of a training step, and FLOP/s of a card. Their ratio is nanoGPT's mfu, and an estimate of
a run's time."""

import re

import torch
from torch import nn

from support.clock import rough
from support.processes import Machine
from support.settings import info

# TFLOP/s of dense products in bf16, with sums in float32, from NVIDIA's data sheets, most of
# which state twice as many, with sparsity. RTX cards do 512 FLOPs per multiprocessor and cycle,
# counted at the boost clock, as in NVIDIA's papers on Ampere, Ada and Blackwell. T4 and V100 lack
# bf16: theirs are of products in float32.
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
        how = " if nothing else uses the CPU"
        how += " (if something does, set OMP_NUM_THREADS=1)" if cores > 1 else ""
    info(f"time: roughly {rough(seconds)}{how}")


def flops_per_token(model: nn.Module, T: int) -> float:
    """FLOPs per token of a training step with windows of T tokens, MTP modules included.

    Forward and backward passes together take 6 for each weight that multiplies, which are all but
    those of embeddings and norms, and K of E experts. Attention takes 6 (N + R + V) for each head
    and each pair of tokens, of which causal attention has half. An edit that computes something
    else with these weights, such as sparse attention, is not noticed.
    """
    config = model.config
    visited = config.num_experts_per_tok / config.n_routed_experts
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    # In a window module k reads k tokens less than the layers, and has the shared head, too.
    parts = [(layer, T) for layer in model.layers] + [(model.lm_head, T)]
    for k, module in enumerate(model.mtp, 1):
        parts += [(module, T - k), (model.lm_head, T - k)]
    flops = 0.0
    for part, tokens in parts:
        for name, x in part.named_parameters():
            if x.ndim > 1 and (part is model.lm_head or id(x) not in tables):
                flops += 6 * x.numel() * (visited if ".experts." in name else 1) * tokens
        if part is not model.lm_head:
            flops += 6 * config.num_attention_heads * per_head * tokens**2 / 2
    return flops / T
