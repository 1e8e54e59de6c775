"""What does it cost that a token may visit few nodes only? python experiments/node_limit.py

A token's experts lie in at most M of the groups (nodes, in the report), which bounds the traffic
between machines (section 2.1.2). The report has M = 4 of 8 nodes for 8 experts, so at least 2 per
visited node; up to 3.2 would cost no more time (section 3.2.2). It does not report the loss. For
M >= 3, DeepSeek-V2's report (section 2.2.2) calls it roughly equal to that without a limit. Here
there are 4 groups of 4 experts, and the base has M = 2.
"""

import report
import run

ARMS = {"1 group": run.Arm({"topk_group": 1}), "4 groups": run.Arm({"topk_group": 4})}
COLUMNS = {
    "test_bpb": "bits/byte",
    "nodes_per_token": "groups per token",
    "max_vio_global": "MaxVio, validation",
}


def draw(figure, results):
    left, right = figure.subplots(1, 2)
    report.dots(left, results, "against", "bits/byte against base")
    report.dots(right, results, "experts_per_node", "experts per visited group")


EXPERIMENT = run.Experiment("node_limit", lambda base: ARMS, COLUMNS, draw, base="2 groups")

if __name__ == "__main__":
    run.command(EXPERIMENT)
