"""Does a bias balance the experts better than an auxiliary loss? python experiments/balance.py

The report (section 2.1.2, and arXiv 2408.15664) moves a bias against each expert's load, which no
gradient sees. A bias moves by gamma a step, and scores differ by some tenths: a run of a few
hundred steps needs a larger gamma than the report's 0.001, which had 14.3T tokens. `max_vio` is
(largest load - mean) / mean over a layer's experts, averaged over the layers.
"""

import run
import tables
from token_classes import expert_visits

ARMS = {  # the base has gamma 0.01 and, as in the report, alpha 0.0001
    "bias 0.003": run.Arm({"gamma": 0.003}),
    "bias 0.03": run.Arm({"gamma": 0.03}),
    "loss 0.001": run.Arm({"gamma": 0.0, "alpha": 0.001}),
    "loss 0.01": run.Arm({"gamma": 0.0, "alpha": 0.01}),
    "nothing": run.Arm({"gamma": 0.0, "alpha": 0.0}),
}
COLUMNS = {
    "val_bpb": "bits/byte",
    "max_vio_batch": "MaxVio, batch",
    "max_vio_global": "MaxVio, validation",
}


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    tables.curves(left, results, "max_vio", "MaxVio of a batch")
    left.set(ylim=(0, None))
    tables.dots(right, results, "against", "bits/byte against base")


EXPERIMENT = run.Experiment(
    "balance", lambda base: ARMS, COLUMNS, draw, expert_visits, base="bias 0.01"
)

if __name__ == "__main__":
    run.command(EXPERIMENT)
