"""Does FP8 train as well as bf16? python experiments/fp8_loss.py [CONFIG] [--key=value]

The report finds the relative gap of the loss below 0.25 % (Appendix B.1). For every seed the model
of CONFIG (default: config/small.py) is trained four times, from the same weights on the same data:
without FP8, with FP8 as in the report (fp8.py), and with two coarser kinds that the report warns
of. The table has the gaps, paired by seed, and their means with a 95 % confidence interval.
"""

import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import fp8
import train
from bench import Table, print_tables
from config import info, parse_args, run_command

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
GAPS = ("gap %", "worst gap of 2nd half %", "validation gap %")


@dataclass
class Options:
    seeds: int = 3  # runs of each kind
    steps: int = 0  # optimiser steps of a run (0: the config's)
    dtype: str = "auto"  # of the runs
    device: str = "auto"  # auto, cpu or cuda
    json: str = ""  # also write the table to this file


# ---- Coarser FP8, for contrast -------------------------------------------------------------------

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
    """Gradients share a scale per 128x128 block, on which training diverged in the report
    (Appendix B.2). They are rounded that way first; the tiles then change nothing."""
    parts = [fp8.quantize(x, fp8.BLOCK, pow2=True) for x in dy.split(ctx.rows)]
    return backward(ctx, torch.cat([fp8.dequantize(*x, fp8.BLOCK) for x in parts]).to(dy.dtype))


KINDS = {
    "tiles": contextlib.nullcontext(),
    "one scale per tensor": mock.patch.object(fp8, "quantize", one_scale),
    "gradients in 128x128": mock.patch.object(
        fp8._FP8Linear, "backward", staticmethod(backward_in_blocks)
    ),
}


# ---- Trainings and gaps --------------------------------------------------------------------------


def smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, begun at the first value."""
    return list(itertools.accumulate(values, lambda mean, x: decay * mean + (1 - decay) * x))


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval by Student's t."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, None
    t = STUDENT_T[n - 2] if n - 2 < len(STUDENT_T) else 2.2
    return mean, t * statistics.stdev(values) / math.sqrt(n)


def losses(config: str, options: Options, seed: int, low: bool) -> tuple[list[float], float]:
    """Trains once: the smoothed loss of every step, and the last validation loss (nats)."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        argv = [config, f"--out={out}", f"--seed={seed}", f"--fp8={low}", "--log_every=1"]
        argv += [f"--dtype={options.dtype}", f"--device={options.device}"]
        train.main([*argv, f"--steps={options.steps}"] if options.steps else argv)
        log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    validation = [line["val_loss"] for line in log if "val_loss" in line]
    return smooth([line["loss"] for line in log if "loss" in line]), validation[-1]


def loss_gaps(config: str, options: Options) -> Table:
    """(FP8 - base) / base of the loss in %: at the end, at its worst, of the validation loss."""
    rows, gaps = [], {kind: [] for kind in KINDS}
    for seed in range(options.seeds):
        base, base_val = losses(config, options, seed, low=False)
        for kind, coarser in KINDS.items():
            with coarser:
                loss, val = losses(config, options, seed, low=True)
            gap = [100 * (b / a - 1) for a, b in zip(base, loss, strict=True)]
            worst = max(gap[len(gap) // 2 :], key=abs)
            gaps[kind].append([gap[-1], worst, 100 * (val / base_val - 1)])
            rows.append({"FP8 with": kind, "seed": str(seed), "base loss": base[-1]})
            rows[-1] |= dict(zip(GAPS, gaps[kind][-1], strict=True))
            info(str(rows[-1]))
    for kind, values in gaps.items():
        pairs = [interval(list(column)) for column in zip(*values, strict=True)]
        for name, figures in zip(("mean", "+- (95 %)"), zip(*pairs, strict=True), strict=True):
            rows.append({"FP8 with": kind, "seed": name} | dict(zip(GAPS, figures, strict=True)))
    what = f"relative gap of FP8's loss (average with 0.9) to that of dtype {options.dtype}"
    return Table(f"{what}, {Path(config).stem}", rows)


def main(argv: list[str]):
    config, values = parse_args(__doc__, argv, Options, positional="config")
    options, config = Options(**values), config or "config/small.py"
    print_tables("fp8_loss", iter([loss_gaps(config, options)]), options)


if __name__ == "__main__":
    run_command(main)
