"""What does a decoding step of each attention cost? python experiments/attention_step.py

Nothing is trained. Measured are the scores, softmax and sum of one layer's attention for the newest
token, with 256 to 32,768 cached tokens, the heads of attention.py's arms on base.py, and random
numbers, each form by its plain formula. The arms take turns; "seeds" are turns. Close other
programs.
"""

import statistics
import time

import attention
import report
import run
import torch

LENGTHS = (256, 1024, 4096, 16384, 32768)
CACHES = ("MHA", "GQA 2", "MQA")


@torch.inference_mode()
def step_times(name: str, seed: int) -> dict:
    """Milliseconds, the median of 9: scores, softmax and sum for the newest token's H = 4 heads."""
    H, times = 4, {}
    for S in LENGTHS:
        if name == "base":  # absorbed: all heads read one row of C + R = 48 numbers
            q, k = torch.randn(1, H, 48), torch.randn(1, S, 48)
            v = k[..., :32]
        else:
            G, W = {"MHA": (4, 22), "GQA 2": (2, 29), "MQA": (1, 35)}[name]
            q, k, v = torch.randn(G, H // G, W), torch.randn(G, S, W), torch.randn(G, S, W)
        took = []
        for _ in range(9):
            began = time.perf_counter()
            (q @ k.mT).softmax(-1) @ v
            took.append(time.perf_counter() - began)
        times[f"ms_{S}"] = 1000 * sorted(took)[4]
    return times


def draw(figure, results):
    ax = figure.subplots()
    for name, xs in results.items():
        y = [statistics.mean(x[f"ms_{S}"] for x in xs) for S in LENGTHS]
        ax.loglog(LENGTHS, y, "o-", color=report.colour_of(results, name), label=name, base=2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="cached tokens", ylabel="ms, one layer's attention")
    ax.legend(frameon=False, fontsize=8)


def arms(base: dict) -> dict[str, run.Arm]:
    """Those of attention.py whose caches differ."""
    return {name: arm for name, arm in attention.arms(base).items() if name in CACHES}


EXPERIMENT = run.Experiment(
    "attention_step", arms, {f"ms_{S}": f"ms, {S:,} tokens" for S in LENGTHS}, draw,
    base="MLA", against="ms_32768", compute=step_times,
)  # fmt: skip

if __name__ == "__main__":
    run.command(EXPERIMENT)
