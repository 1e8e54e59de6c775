"""What are the tiles of FP8 for? python experiments/fp8_error.py

Nothing is trained. Measured is the error of one product x W^T, averaged over the tokens, when the
tokens' magnitudes lie further and further apart. E4M3 spans 2^-9 .. 448, so a token that shares its
scale with others, in a tensor or a 128x128 block, is lost beneath the largest one; with one scale
for every 128 numbers of its own (report, section 3.3.2) it is not. (One scale for each token would
do as well here, since whole tokens differ. For gradients that is the report's hypothesis: outliers
that go with the token, appendix B.2.) fp8_accumulation.py measures the error of the sums.
"""

import statistics

import report
import run
import torch
from torch import Tensor

import fp8

tilewise = fp8.quantize


def one_scale(x: Tensor, block: tuple[int, int], pow2: bool = False) -> fp8.Quantized:
    """fp8.quantize with one scale for all of x in place of the report's tiles."""
    q, s = tilewise(x, block, pow2)
    if x.numel():
        _, scale = tilewise(x.float().abs().amax().view(1, 1), fp8.TILE, pow2)
        q = (x.float() / scale).clamp(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3).contiguous()
        s = scale.expand_as(s).contiguous()
    return fp8.Quantized(q, s)


SPREADS = (0, 2, 4, 6, 8)  # tokens' magnitudes lie evenly, by their logarithm, over so many decades
KINDS = {"tiles": (tilewise, fp8.TILE), "blocks": (tilewise, fp8.BLOCK)}
KINDS |= {"one scale": (one_scale, fp8.TILE)}


def product_error(name: str, seed: int) -> dict:
    """Mean over the tokens of the error's length by the length of the token's true result."""
    rng, errors = torch.Generator().manual_seed(seed), {}
    noise, w = (torch.randn(512, 512, generator=rng) for _ in "xw")
    place = torch.rand(512, 1, generator=rng) - 0.5
    for spread in SPREADS:
        x = noise * 10 ** (spread * place)
        exact = x.double() @ w.double().T
        if name == "base":
            y = x.bfloat16().double() @ w.bfloat16().double().T
        else:
            quantise, block = KINDS[name]
            low = fp8.dequantize(*quantise(x, block), block)
            y = low.double() @ fp8.dequantize(*tilewise(w, fp8.BLOCK), fp8.BLOCK).double().T
        error = (y - exact).norm(dim=1) / exact.norm(dim=1)
        errors[f"error_{spread}"] = error.mean().item()
    return errors


def draw(figure, results):
    ax = figure.subplots()
    for name, xs in results.items():
        y = [statistics.mean([x[f"error_{s}"] for x in xs]) for s in SPREADS]
        ax.semilogy(SPREADS, y, "o-", color=report.colour_of(results, name), label=name)
    ax.set(xlabel="decades over which the tokens' magnitudes spread", ylabel="error of a token")
    ax.set(xticks=SPREADS)
    ax.legend(frameon=False, fontsize=8)


EXPERIMENT = run.Experiment(
    "fp8_error", lambda base: dict.fromkeys(KINDS, run.Arm()),
    {f"error_{s}": f"error, {s} decades" for s in SPREADS}, draw,
    base="bf16", against="error_8", compute=product_error,
)  # fmt: skip

if __name__ == "__main__":
    run.command(EXPERIMENT)
