"""What are the fp32 sums of FP8 products for? python experiments/fp8_accumulation.py

Nothing is trained. Hopper's tensor cores keep some 14 bits of a sum. A model of that (add_group)
adds up products of K numbers, K from 128 to 16,384. The report promotes partial sums to fp32 after
every 128 numbers (section 3.3.2), which partially mitigates the error (3.5.2). Here they are
promoted never, or after every 512, 128 or 32.
"""

import statistics

import report
import run
import torch
from fp8_error import one_scale
from torch import Tensor

import fp8

BITS = 14  # significant bits that a sum in the tensor core keeps
GROUP = 32  # products that it adds at a time
LENGTHS = [128 << i for i in range(8)]  # K: 128, 256, ... 16384
INTERVALS = {"never": LENGTHS[-1], "every 512": 512, "every 128": 128, "every 32": 32}
# Uniform numbers in 0 .. 1, whose sum grows with K, and normal ones, whose sum grows with its root.
NUMBERS = {"uniform": torch.rand, "normal": torch.randn}


def last_bit(x: Tensor) -> Tensor:
    """What the last of BITS significant bits of x is worth: 2^(e - 13) for 2^e <= |x| < 2^(e+1)."""
    _, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - BITS)


def add_group(total: Tensor, products: Tensor) -> Tensor:
    """total (M, N) plus 32 products (M, N, 32), by a model of Hopper's accumulation.

    1. The largest of the 33 magnitudes, the total's included, has BITS significant bits.
    2. All 33 are aligned to it: what they have below its last bit is cut off, towards zero.
    3. Their sum is exact, and is then itself cut to BITS significant bits, towards zero.

    From the report's words (sections 3.3.2 and 3.5.2): products are shifted right by the largest
    exponent, only the highest 14 bits are added, the rest is cut off, and sums are registered with
    14 bits. It does not say whether the total is aligned together with the products; here it is.
    """
    addends = torch.cat((total.unsqueeze(-1), products), -1)  # (M, N, 33)
    unit = last_bit(addends.abs().amax(-1, keepdim=True))
    total = ((addends / unit).trunc() * unit).sum(-1)  # exact in fp32: 33 times 14 bits are 20
    return (total / last_bit(total)).trunc() * last_bit(total)


def sum_error(name: str, seed: int) -> dict:
    """Largest error of an element of a product, by the largest exact element (both are positive
    in the uniform case, so nearly the largest relative error). The factors are E4M3 numbers."""
    rng, errors = torch.Generator().manual_seed(seed), {}
    for kind, draw_numbers in NUMBERS.items():
        a, b = (draw_numbers(48, LENGTHS[-1], generator=rng) for _ in "ab")
        a, b = (one_scale(x, fp8.TILE)[0].float() for x in (a, b))
        total, promoted = torch.zeros(48, 48), torch.zeros(48, 48)
        exact = torch.zeros(48, 48, dtype=torch.float64)
        for k in range(0, LENGTHS[-1], GROUP):
            products = a[:, None, k : k + GROUP] * b[None, :, k : k + GROUP]  # exact: 8 bits
            exact += products.double().sum(-1)
            if name == "base":  # all of it in fp32
                total += products.sum(-1)
            else:
                total = add_group(total, products)
                if (k + GROUP) % INTERVALS[name] == 0:
                    promoted, total = promoted + total, torch.zeros_like(total)
            if k + GROUP in LENGTHS:
                error = (promoted + total - exact).abs().max() / exact.abs().max()
                errors[f"{kind}_{k + GROUP}"] = error.item()
    return errors


def draw(figure, results):
    for ax, kind in zip(figure.subplots(1, 2, sharey=True), NUMBERS, strict=True):
        for name, xs in results.items():
            y = [statistics.mean([x[f"{kind}_{K}"] for x in xs]) for K in LENGTHS]
            ax.loglog(LENGTHS, y, "o-", color=report.colour_of(results, name), markersize=3)
            ax.lines[-1].set_label(name)
        ax.set(xlabel=f"K, {kind} numbers", xticks=LENGTHS[::2], xticklabels=LENGTHS[::2])
        ax.minorticks_off()
        ax.plot(4096, 0.02, "*", color=report.INK, markersize=9, label="report: nearly 2 %")
    figure.axes[0].set(ylabel="largest error")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


COLUMNS = {f"uniform_{K}": f"uniform, K = {K:,}" for K in (128, 1024, 4096, 16384)}
COLUMNS |= {"normal_4096": "normal, K = 4,096"}
EXPERIMENT = run.Experiment(
    "fp8_accumulation", lambda base: dict.fromkeys(INTERVALS, run.Arm()), COLUMNS, draw,
    base="fp32", against="uniform_4096", compute=sum_error,
)  # fmt: skip

if __name__ == "__main__":
    run.command(EXPERIMENT)
