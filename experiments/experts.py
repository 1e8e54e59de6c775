"""Many small experts and a shared one, few large ones, or none? python experiments/experts.py

DeepSeekMoE (arXiv 2401.06066) cuts experts into small ones, of which a token visits several, and
lets all tokens share one. In every arm a token visits FFNs of the same total width, so the arms
have the same active parameters, except for the gate. The four large experts have 18 % more
parameters in total than the sixteen small ones and the shared one. The dense network is also
trained for the base's seconds, because its steps, without routing, are faster. The MTP module's
block changes with the others. The weight of the shared expert relative to the routed ones depends
on routed_scaling_factor: 1 here, 2.5 in V3. So the pair with and without it is trained with both.
"""

import report
import run

import model


class Dense(model.MLP):
    """In place of the experts a single one, without a gate."""

    def __init__(self, config: model.ModelConfig):
        super().__init__(config, config.moe_intermediate_size)


def arms(base: dict) -> dict[str, run.Arm]:
    K, F = base["num_experts_per_tok"], base["moe_intermediate_size"]
    width = (K + base["n_shared_experts"]) * F  # what a token visits
    large = {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": width}
    # Of a single expert's gate value, s / s = 1, nothing would be learnt: it counts as it is.
    large |= {"n_shared_experts": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    dense = {"n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": width}
    dense |= {"n_shared_experts": 0, "n_group": 1, "topk_group": 1}
    alone = {"n_shared_experts": 0, "num_experts_per_tok": width // F}
    scaled = {"routed_scaling_factor": 2.5}  # V3's: what is routed counts for more
    return {
        "no shared": run.Arm(alone),
        "4 large": run.Arm(large),
        "dense": run.Arm(dense, {"model.MoE": Dense}),
        # The base's seconds, both measured alone.
        "dense longer": run.Arm(dense, {"model.MoE": Dense}, longer=1.25),
        "shared x2.5": run.Arm(scaled),
        "no shared x2.5": run.Arm(alone | scaled),
    }


COLUMNS = {"test_bpb": "bits/byte", "parameters": "parameters"}
COLUMNS |= {"max_vio_global": "MaxVio, validation"}


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    report.dots(left, results, "against", "bits/byte against base")
    report.curves(right, results, "loss", "nats per token, training")


PAIRS = (("no shared x2.5", "shared x2.5"),)
EXPERIMENT = run.Experiment("experts", arms, COLUMNS, draw, base="16 small, 1 shared", pairs=PAIRS)

if __name__ == "__main__":
    run.command(EXPERIMENT)
