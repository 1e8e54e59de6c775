"""FLOPs that a training step takes, and that a card can do. Their ratio is nanoGPT's mfu."""

import torch
from torch import nn

# bf16 products, dense, operations a second, by NVIDIA's data sheets: of the A100 (2021), the H100
# (2022; SXM and PCIe) and the H200 (2023), which give twice as many with sparsity. The H800 is the
# H100 with slower links.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """Of bf16 products; None where it is not known."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "NVL" in card:  # slower than the cards of the table, by how much is not known here
        return None
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def flops_per_token(model: nn.Module, T: int) -> float:
    """In a training step with windows of T tokens. Forward and backward, MTP modules included: 6
    per weight that multiplies a token, and the causal half of attention."""
    c, depths = model.config, 1 + len(model.mtp)
    weights = depths * c.vocab_size * c.hidden_size  # the output head
    for name, x in model.named_parameters():
        if not name.startswith(("embed_tokens", "lm_head")):
            routed = ".experts." in name
            weights += x.numel() * (c.num_experts_per_tok / c.n_routed_experts if routed else 1)
    per_pair = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return 6 * weights + 6 * (c.num_hidden_layers + len(model.mtp)) * per_pair * T / 2
