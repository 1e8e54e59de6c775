"""Does FP8 train as well as higher precision? python experiments/fp8_loss.py

The report finds the relative gap of the loss to bf16 below 0.25 % (section 3.3, Appendix B.1), and
that a model with gradients quantised in 128x128 blocks diverged (B.2). Trained without FP8, with
FP8 as in the report (fp8.py), and with two coarser kinds, from the same weights on the same data.
What single products lose is measured by fp8_error.py.
"""

import run
import torch
from fp8_error import one_scale
from torch import Tensor

import fp8

backward = fp8._FP8Linear.backward


def backward_in_blocks(ctx, dy: Tensor):
    """Gradients share a scale per 128x128 block, on which training diverged in the report. They are
    rounded that way first; the tiles then change nothing."""
    rows = [len(dy)] if ctx.rows is None else ctx.rows.tolist()  # of each expert
    parts = [fp8.quantize(x, fp8.BLOCK, pow2=True) for x in dy.split(rows)]
    return backward(ctx, torch.cat([fp8.dequantize(*x, fp8.BLOCK) for x in parts]).to(dy.dtype))


LOW = {"fp8": True}
ARMS = {
    "tiles": run.Arm(LOW),
    "one scale": run.Arm(LOW, {"fp8.quantize": one_scale}),
    "gradients in blocks": run.Arm(
        LOW, {"fp8._FP8Linear.backward": staticmethod(backward_in_blocks)}
    ),
}


COLUMNS = {"test_bpb": "bits/byte", "val_loss": "nats per token, validation"}
PAIRS = (("gradients in blocks", "tiles"),)
EXPERIMENT = run.Experiment("fp8_loss", lambda base: ARMS, COLUMNS, base="no FP8", pairs=PAIRS)

if __name__ == "__main__":
    run.command(EXPERIMENT)
