"""What are FP8's tiles for, and does FP8 train as well? python experiments/fp8_loss.py

The report finds the relative gap of the loss to bf16 below 0.25 % (section 3.3, Appendix B.1), and
that a model with gradients quantised in 128x128 blocks diverged (B.2). First, without training: the
error of one product x W^T, averaged over the tokens, when the tokens' magnitudes lie further and
further apart: what a scale of one's own protects. Then trainings without FP8, with FP8 as in the
report (fp8.py), and with two coarser kinds, from the same weights on the same data.
"""

import run
import torch
from torch import Tensor

import fp8

tilewise, backward = fp8.quantize, fp8._FP8Linear.backward


def one_scale(x: Tensor, block: tuple[int, int], pow2: bool = False) -> fp8.Quantized:
    """fp8.quantize with one scale for all of x in place of the report's tiles."""
    q, s = tilewise(x, block, pow2)
    if x.numel():
        _, scale = tilewise(x.float().abs().amax().view(1, 1), fp8.TILE, pow2)
        q = (x.float() / scale).clamp(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3).contiguous()
        s = scale.expand_as(s).contiguous()
    return q, s


def backward_in_blocks(ctx, dy: Tensor):
    """Gradients share a scale per 128x128 block, on which training diverged in the report. They are
    rounded that way first; the tiles then change nothing."""
    parts = [fp8.quantize(x, fp8.BLOCK, pow2=True) for x in dy.split(ctx.rows)]
    return backward(ctx, torch.cat([fp8.dequantize(*x, fp8.BLOCK) for x in parts]).to(dy.dtype))


LOW = {"fp8": True}
ARMS = {
    "tiles": run.Arm(LOW),
    "one scale": run.Arm(LOW, {"fp8.quantize": one_scale}),
    "gradients in blocks": run.Arm(
        LOW, {"fp8._FP8Linear.backward": staticmethod(backward_in_blocks)}
    ),
}

# ---- One product ---------------------------------------------------------------------------------

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


def draw_errors(figure, results):
    ax = figure.subplots()
    for name, xs in results.items():
        y = [run.interval([x[f"error_{s}"] for x in xs])[0] for s in SPREADS]
        ax.semilogy(SPREADS, y, "o-", color=run.colour_of(results, name), label=name)
    ax.set(xlabel="decades over which the tokens' magnitudes spread", ylabel="error of a token")
    ax.set(xticks=SPREADS)
    ax.legend(frameon=False, fontsize=8)


ERRORS = run.Experiment(
    "fp8_error", lambda base: dict.fromkeys(KINDS, run.Arm()),
    {f"error_{s}": f"error, {s} decades" for s in SPREADS}, draw_errors,
    base="bf16", against="error_8", compute=product_error,
)  # fmt: skip

# ---- Trainings -----------------------------------------------------------------------------------


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    run.curves(left, results, "loss", "nats per token")
    run.dots(right, results, "against", "nats against base")


COLUMNS = {"val_loss": "nats per token", "seconds": "seconds"}
EXPERIMENT = run.Experiment(
    "fp8_loss", lambda base: ARMS, COLUMNS, draw, base="no FP8", against="val_loss"
)

if __name__ == "__main__":
    run.command(ERRORS, EXPERIMENT)
