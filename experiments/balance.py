"""Does a bias balance the experts better than an auxiliary loss? python experiments/balance.py

The report (section 2.1.2, and arXiv 2408.15664) moves a bias against each expert's load, without a
gradient. A bias moves by gamma per step, and scores differ by a few tenths. So a run of a few
hundred steps needs a larger gamma than the report's 0.001, for 14.3T tokens. The loss balances
every sequence, or only every batch (section 4.5.3), here of 8 sequences. `max_vio` is (largest
load - mean) / mean over a layer's experts, averaged over the layers.
"""

import report
import run
from token_classes import expert_visits, visits_by_domain
from torch import Tensor

import model

sequence_wise = model.balance_loss  # before anything stands in for it


def batch_wise(s: Tensor, K: int) -> Tensor:
    """The same loss for a batch that counts as one sequence (section 4.5.3)."""
    return sequence_wise(s.flatten(0, 1).unsqueeze(0), K)


WITHOUT_BIAS, AS_ONE = {"gamma": 0.0}, {"model.balance_loss": batch_wise}
ARMS = {  # the base has gamma 0.01 and, as in the report, alpha 0.0001
    "bias alone": run.Arm({"alpha": 0.0}),
    "bias 0.003": run.Arm({"gamma": 0.003}),
    "bias 0.03": run.Arm({"gamma": 0.03}),
    "loss 0.001": run.Arm(WITHOUT_BIAS | {"alpha": 0.001}),
    "loss 0.01": run.Arm(WITHOUT_BIAS | {"alpha": 0.01}),
    "batch loss 0.003": run.Arm(WITHOUT_BIAS | {"alpha": 0.003}, AS_ONE),
    "batch loss 0.01": run.Arm(WITHOUT_BIAS | {"alpha": 0.01}, AS_ONE),
    "nothing": run.Arm(WITHOUT_BIAS | {"alpha": 0.0}),
}


COLUMNS = {
    "test_bpb": "bits/byte",
    "max_vio_batch": "MaxVio, batch",
    "max_vio_global": "MaxVio, validation",
}


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    shown = ("(base)", "loss 0.01", "nothing")  # of the nine arms
    few = {name: xs if name.endswith(shown) else [] for name, xs in results.items()}
    report.curves(left, few, "max_vio", "MaxVio of a batch")
    left.set(ylim=(0, None))
    report.dots(right, results, "against", "bits/byte against base")


def measure(trained: run.Trained) -> dict:
    """For specialisation.py, which uses these trainings."""
    return expert_visits(trained) | visits_by_domain(trained)


EXPERIMENT = run.Experiment("balance", lambda base: ARMS, COLUMNS, draw, measure, base="bias 0.01")

if __name__ == "__main__":
    run.command(EXPERIMENT)
