"""What DeepSeek's papers claim, what is trained to ask it, and the rule that gives the verdict.

python experiments/claims.py writes the tables of claims in docs/RESULTS.md and README.md from the
results that are there. A verdict is never typed: `verdict` makes the word from numbers. CLAIMS,
MARGINS and SEEDS were committed before the trainings that they ask for. (Of the first set of runs,
of 600 steps on Python's library, three seeds were known when CLAIMS was first written as prose.)
"""

from dataclasses import dataclass

# ---- The rule ------------------------------------------------------------------------------------

# How small an interval has to be for "equal", in parts of the base's loss, and why.
MARGINS = {
    "fp8": (0.0025, "the report's own bound for what FP8 may cost (section 3.3)"),
    "loss": (0.0022, "the smallest difference that the report itself counts, 2.258 against 2.253 "
                     "(section 4.5.3)"),
}  # fmt: skip


def verdict(
    kind: str,
    mean: float | None,
    half: float | None = None,
    p: float | None = None,
    alone: float | None = None,
    margin: float | None = None,
    tuned: tuple[float, float] | None = None,
    unlike: bool = False,
) -> str:
    """The word for one comparison. Numbers that are above zero are on the claim's side.

    kind    "better": one arm is said to be better than another; "equal": as good, or no worse
    mean    the difference, of `half` the 95 % interval; None without a run of both
    p       corrected by Holm's method within its table
    alone   half of the interval from the pairs of these two arms alone: the pooled deviation alone
            carries no verdict
    margin  the largest difference that still counts as none, in the units of mean
    tuned   difference and half interval where each arm has its own best learning rate, if known
    unlike  the arms also differ in something else that may be the reason
    """
    if mean is None:
        return "not yet run"
    if half is None or p is None:
        return "cannot tell"
    if kind == "equal" and abs(mean) + half < margin:
        return "equal"
    sure = p < 0.05 and abs(mean) > half and (alone is None or abs(mean) > alone)
    lasting = tuned is None or (tuned[0] * mean > 0 and abs(tuned[0]) > tuned[1])
    if sure and lasting and not unlike:
        if mean < 0:
            return "contradicts"
        return "shown" if kind == "better" else "better than claimed"
    if abs(mean) > half:
        return "suggestive" if mean > 0 and kind == "better" else "suggestive of the opposite"
    return "cannot tell"


def bound(low: float, mean: float, half: float) -> str:
    """The word for a figure that a paper says is at least `low`."""
    if mean + half < low:
        return "lower here"
    return "reached" if mean - half >= low else "cannot tell"


# ---- Claims --------------------------------------------------------------------------------------


@dataclass
class Claim:
    """`one` is said to be better than `other`, or as good: arms of an experiment."""

    text: str
    experiment: str
    one: str
    other: str
    kind: str = "better"
    measure: str = "test_bpb"
    less: bool = True  # of the measure is better
    margin: str = ""
    rates: bool = False  # both arms are also trained with two other learning rates
    alike: str = (
        ""  # a figure in which the arms must agree within 0.25, or the verdict is less sure
    )
    headline: bool = False  # one of the five that are asked again on another text


CLAIMS = [
    Claim(
        "A bias keeps the experts equally busy (section 2.1.2)",
        "balance", "base", "nothing", measure="max_vio_global",
    ),
    Claim(
        "The bias costs less loss than a sequence-wise balance loss (4.5.3)",
        "balance", "base", "loss 0.01", headline=True,
    ),
    Claim(
        "A batch-wise loss is as good as the bias (4.5.3)",
        "balance", "batch loss 0.01", "base", kind="equal", margin="loss",
    ),
    Claim(
        "Experts specialise more with the bias than with the loss (4.5.3)",
        "specialisation", "base", "loss 0.01", measure="domain_bits", less=False,
    ),
    Claim(
        "MTP leaves the bits per byte as they are (Table 4)",
        "mtp", "base", "off", kind="equal", margin="loss", rates=True, headline=True,
    ),
    Claim(
        "MLA is better than multi-head attention (V2, Table 9)",
        "attention", "base", "MHA", rates=True,
    ),
    Claim(
        "Grouped queries are worse than multi-head attention (V2, Table 8)",
        "attention", "MHA", "GQA 2", rates=True, headline=True,
    ),
    Claim(
        "Small experts beat a dense network at equal tokens (2401.06066, Table 1)",
        "experts", "base", "dense", rates=True, headline=True,
    ),
    Claim(
        "The same at equal seconds (claimed by none of the papers)",
        "experts", "base", "dense longer",
    ),
    Claim(
        "Many small experts beat few large ones (2401.06066, Table 1)",
        "experts", "base", "4 large", alike="max_vio_global",
    ),
    Claim("A shared expert helps (2401.06066)", "experts", "base", "no shared", rates=True),
    Claim(
        "The same with routed_scaling_factor 2.5, as V3 has it",
        "experts", "shared x2.5", "no shared x2.5",
    ),
    Claim(
        "A limit on nodes costs nothing (V2, section 2.2.2: M >= 3)",
        "node_limit", "base", "4 groups", kind="equal", margin="loss",
    ),
    Claim(
        "YaRN and a phase of long windows extend the context (4.3)",
        "long_context", "last tenth long", "base", measure="beyond", headline=True,
    ),
    Claim(
        "The longer context is used (4.3)",
        "long_context", "last tenth long", "the same in short windows", measure="context_gain",
    ),
    Claim(
        "The loss of FP8 training is within 0.25 % of bf16's (3.3)",
        "fp8_loss", "tiles", "base", kind="equal", margin="fp8",
    ),
    Claim(
        "Gradients in 128x128 blocks harm the training (Appendix B.2)",
        "fp8_loss", "tiles", "gradients in blocks",
    ),
]  # fmt: skip


# ---- What is trained -----------------------------------------------------------------------------

# Seeds of every arm by experiment; the others have three. Learning rates x 0.67 and x 1.5 have
# three: seed 0 of both first, then the better one by the validation text, then the other.
SEEDS = {
    "base": {"base": 8},
    "balance": {"loss 0.001": 8, "loss 0.01": 8, "batch loss 0.01": 8},
    "mtp": {"off": 8},
    "attention": {"MHA": 8, "GQA 2": 8},
    "experts": {"dense": 8, "no shared": 8, "4 large": 8},
    "node_limit": {"4 groups": 8},
    "fp8_loss": {"tiles": 12, "gradients in blocks": 12},
}

# The headline claims once more on English prose (three seeds, experiments/results/prose), and one
# of them, the dense network, with 2,400 steps (one seed, experiments/results/2400).
TEXTS = {"stdlib": "experiments/results", "prose": "experiments/results/prose"}
