"""Do experts specialise, and does a balance loss hinder them? python experiments/specialisation.py

The report (section 4.5.3) sees experts specialise more where a bias balances them than where a loss
forces every sequence to be even; it compares domains of the Pile. The measure is the mutual
information, in bits, between the expert that a token visits and either the token's class (by
Python's own tokeniser, on validation text) or the domain of its text (token_classes.py). It is 0 if
all classes visit the experts alike. The runs are those of balance.py, so nothing is trained twice.
"""

import balance
import numpy as np
import run
from token_classes import CLASSES

COLUMNS = {
    "mean_bits": "bits of class and expert, mean of layers",
    "domain_bits": "bits of domain and expert",
    "max_vio_batch": "MaxVio, batch",
    "max_vio_global": "MaxVio, validation",
    "test_bpb": "bits/byte",
}


def draw(figure, results):
    """How much more often than all tokens those of a class visit an expert, in every layer."""
    results = {name: xs for name, xs in results.items() if "visits" in xs[0]}
    shown = [name for name in results if name == "loss 0.01" or name.endswith("(base)")]
    if not shown:
        return
    visits = [np.array(results[name][0]["visits"], float) for name in shown]  # of the first seed
    figure.set_size_inches(8, 0.6 + 2.2 * len(shown))
    axes = figure.subplots(len(shown), len(visits[0]), squeeze=False)
    for name, row, layers in zip(shown, axes, visits, strict=True):
        for i, (ax, table) in enumerate(zip(row, layers, strict=True)):
            share = table / np.maximum(1, table.sum(1, keepdims=True))  # of a class's visits
            usual = table.sum(0) / max(1, table.sum())
            ratio = np.log2(np.maximum(share, 1e-9) / np.maximum(usual, 1e-9)).clip(-3, 3)
            ratio = ratio[:, np.argsort(ratio.argmax(0), kind="stable")]  # experts by their class
            image = ax.imshow(ratio, "RdBu_r", aspect="auto", vmin=-3, vmax=3)
            ax.set(xticks=[], xlabel=f"experts of MoE layer {i + 1}", ylabel="" if i else name)
            ax.set_yticks(range(len(CLASSES)), CLASSES if i == 0 else [""] * len(CLASSES))
    figure.colorbar(image, ax=axes, label="log2 of visits by all tokens' visits", shrink=0.8)


EXPERIMENT = run.Experiment(
    "specialisation", lambda base: balance.ARMS, COLUMNS, draw, balance.measure,
    base="bias 0.01", against="domain_bits", results="balance",
)  # fmt: skip

if __name__ == "__main__":
    run.command(EXPERIMENT)
