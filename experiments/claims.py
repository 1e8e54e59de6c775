"""What DeepSeek's papers claim, what is trained to ask it, and the rule that gives the verdict.

A verdict is never typed. `verdict` makes the word from numbers, and verdicts.py takes these from
the results and writes the tables of the pages. What is claimed, the margins and the seeds were
committed before the trainings that they then asked for. Of the first set of runs, 600 steps on
Python's library, three of eight seeds were known when the first of these claims was written down,
and all eight of most arms when the rule and the margins got their form of today.
"""

from dataclasses import dataclass

# ---- The rule ------------------------------------------------------------------------------------

# How small an interval has to be for "equal", as a part of the base's loss, and why.
MARGINS = {
    "fp8": (0.0025, "the report's own bound for what FP8 may cost (section 3.3)"),
    "loss": (0.0022, "the smallest difference in loss that the report itself counts as one, 2.258 "
                     "against 2.253 (section 4.5.3)"),
}  # fmt: skip

WORDS = {
    "shown": "the corrected p-value is below 0.05, the 95 % interval excludes zero, that of the "
    "arm's own pairs does so too, and none of these ends where each arm has its own best learning "
    "rate.",
    "contradicts": "the opposite is shown, at this size.",
    "better than claimed": "the claim is that nothing is lost, and a gain is shown.",
    "equal": "the whole 95 % interval lies within the margin that stands beside it.",
    "suggestive": "the 95 % interval excludes zero, but one of the conditions of *shown* fails, or "
    "the arms also differ in something else that may be the reason (MaxVio by more than 0.25). *Of "
    "the opposite*: so far it speaks against the claim.",
    "cannot tell": "none of these. An effect as large as the paper's could have been overlooked.",
    "seen in a model": "*shown*, but by a simulation or on random numbers, not in a training.",
    "lower here": "a bound of the paper was measured and not reached.",
    "not yet run": "the arm has no run.",
}


def verdict(
    kind: str,
    mean: float | None,
    half: float | None = None,
    p: float | None = None,
    alone: float | None = None,
    margin: float | None = None,
    tuned: tuple[float, float] | None = None,
    unlike: bool = False,
    simulated: bool = False,
) -> str:
    """The word for one comparison. Numbers above zero are on the claim's side.

    kind       "better": one arm is said to be better than another; "equal": as good, or no worse
    mean       the difference, `half` its 95 % interval's half; None without a run of both
    p          corrected by Holm's method within the table
    alone      half of the interval from the pairs of these two arms alone
    margin     the largest difference that still counts as none, in the units of mean
    tuned      difference and half interval where each arm has its own best learning rate, if known
    unlike     the arms also differ in something else that may be the reason
    simulated  it is no training
    """
    if mean is None:
        return "not yet run"
    if half is None or p is None:
        return "cannot tell"
    if kind == "equal" and abs(mean) + half < margin:
        return "equal"
    sure = p < 0.05 and abs(mean) > half and (alone is None or abs(mean) > alone)
    lasts = tuned is None or (tuned[0] * mean > 0 and abs(tuned[0]) > tuned[1])
    if sure and lasts and not unlike:
        if mean < 0:
            return "contradicts"
        if kind == "equal":
            return "better than claimed"
        return "seen in a model" if simulated else "shown"
    if abs(mean) > half and (mean < 0 or kind == "better"):
        return "suggestive" if mean > 0 else "suggestive of the opposite"
    return "cannot tell"


def bound(low: float, mean: float | None, half: float | None) -> str:
    """The word for a figure of which a paper says that it is at least `low`."""
    if mean is None:
        return "not yet run"
    if half is None or abs(mean - low) <= half:
        return "cannot tell"
    return "shown" if mean > low else "lower here"


# ---- The claims ----------------------------------------------------------------------------------


@dataclass
class Claim:
    """`one` is said to be better than `other`, or as good: arms of an experiment."""

    text: str
    experiment: str
    one: str
    other: str = ""  # none: the measure itself, a gain, is said to be above zero
    compared: str = ""  # what was compared, in words; with {one[KEY]} and {other[KEY]}, their means
    kind: str = "better"
    measure: str = "test_bpb"
    unit: str = "bits/byte"
    less: bool = True  # of the measure is better
    margin: str = ""  # of MARGINS, for kind "equal"
    low: float = 0.0  # for kind "bound": the paper's
    rates: tuple[str, ...] = ()  # how the arms with other learning rates are called, one and other
    alike: str = ""  # a figure in which the arms must agree within 0.25
    simulated: bool = False
    headline: bool = False  # asked again on another text, and shown in the README


CLAIMS = [
    Claim(
        "A bias keeps the experts equally busy (section 2.1.2)", "balance", "base", "nothing",
        "MaxVio on validation text {one[max_vio_global]:.2f}, with nothing that balances "
        "{other[max_vio_global]:.2f}",
        measure="max_vio_global", unit="MaxVio",
    ),
    Claim(
        "The bias costs less loss than a sequence-wise balance loss (4.5.3)",
        "balance", "base", "loss 0.01",
        "a sequence-wise loss in place of the bias (MaxVio of a batch {other[max_vio_batch]:.2f} "
        "and {one[max_vio_batch]:.2f})",
        headline=True,
    ),
    Claim(
        "A batch-wise loss is as good as the bias (4.5.3)",
        "balance", "batch loss 0.01", "base",
        "the batch-wise loss (MaxVio {one[max_vio_batch]:.2f}) in place of the bias "
        "({other[max_vio_batch]:.2f})",
        kind="equal", margin="loss",
    ),
    Claim(
        "Experts specialise more with the bias than with the loss (4.5.3)",
        "specialisation", "base", "loss 0.01",
        "information that expert and domain of the text share: bias {one[domain_bits]:.3f} bits, "
        "loss {other[domain_bits]:.3f}",
        measure="domain_bits", unit="bits", less=False,
    ),
    Claim(
        "MTP leaves the bits per byte as they are (Table 4; benchmarks improve)",
        "mtp", "base", "off", "without MTP, at equal steps (no benchmark was asked)",
        kind="equal", margin="loss", rates=("MLA", "off"), headline=True,
    ),
    Claim(
        "MTP pays at equal seconds (no paper claims it)",
        "mtp", "base", "off longer", "without MTP, 1.38 times as many steps",
    ),
    Claim(
        "85 to 90 % of second tokens are accepted (5.4.3, of generated text)",
        "mtp", "base", compared="own text, greedily {one[greedy_1]:.0%}, of which "
        "{one[greedy_repeated]:.0%} repeats itself; on unseen code {one[given_greedy]:.0%}, and "
        "{one[given_0.8]:.0%} at temperature 0.8",
        kind="bound", measure="0.8_1", unit="at temperature 0.8", low=0.85,
    ),
    Claim(
        "MLA is better than multi-head attention, with a smaller cache (V2, Table 9)",
        "attention", "base", "MHA",
        "multi-head attention, with a cache {ratio:.1f} times as large",
        rates=("MLA", "MHA"),
    ),
    Claim(
        "Grouped queries are worse than multi-head attention (V2, Table 8)",
        "attention", "MHA", "GQA 2", "two key-value heads in place of four",
        rates=("MHA", "GQA 2"), headline=True,
    ),
    Claim(
        "Experts beat a dense network (2401.06066, Table 1: 0.3B against 0.2B active)",
        "experts", "base", "dense", "a dense network of the same active parameters, equal tokens",
        rates=("MLA", "dense"), headline=True,
    ),
    Claim(
        "Experts pay at equal seconds (no paper claims it)",
        "experts", "base", "dense longer", "the dense network, 1.25 times as many steps",
    ),
    Claim(
        "Many small experts beat few large ones (2401.06066, Table 1)",
        "experts", "base", "4 large",
        "one of four large experts, less evenly used (MaxVio {other[max_vio_global]:.2f}, base "
        "{one[max_vio_global]:.2f})",
        alike="max_vio_global",
    ),
    Claim(
        "A shared expert helps (2401.06066, section 4.4: most benchmarks)",
        "experts", "base", "no shared",
        "without it, five visited experts, routed_scaling_factor 1", rates=("MLA", "no shared"),
    ),
    Claim(
        "A shared expert helps with routed_scaling_factor 2.5, which V3 has",
        "experts", "shared x2.5", "no shared x2.5", "without it, both with 2.5",
    ),
    Claim(
        "A limit on nodes loses nothing (V2, section 2.2.2, of M >= 3)",
        "node_limit", "base", "4 groups", "no limit in place of M = 2 of four groups",
        kind="equal", margin="loss",
    ),
    Claim(
        "YaRN and a phase of long windows extend the context (4.3)",
        "long_context", "last tenth long", "base",
        "beyond the trained length: neither, {other[beyond]:.2f} nats (YaRN alone "
        "{other[beyond_yarn]:.2f}); both, {one[beyond]:.2f}",
        measure="beyond", unit="nats", headline=True,
    ),
    Claim(
        "The longer context is used (4.3)", "long_context", "last tenth long",
        compared="one network, windows of 256 against 1,024 tokens",
        measure="context_gain", unit="nats",
    ),
    Claim(
        "A scale for every 128 numbers protects FP8 products (3.3)",
        "fp8_error", "tiles", "one scale",
        "error where tokens' sizes spread over 8 decades: {one[error_8]:.3f}, with one scale "
        "{other[error_8]:.3f} (a scale for each token would do as well here)",
        measure="error_8", unit="error", simulated=True,
    ),
    Claim(
        "The loss of FP8 training is within 0.25 % of bf16's (3.3)",
        "fp8_loss", "tiles", "base", "FP8 with tiles against bf16", kind="equal", margin="fp8",
    ),
    Claim(
        "Gradients in 128x128 blocks harm the training (Appendix B.2: it diverged)",
        "fp8_loss", "tiles", "gradients in blocks", "blocks in place of tiles",
    ),
    Claim(
        "Promotion every 128 products mitigates Hopper's short sums (3.3.2, 3.5.2)",
        "fp8_accumulation", "every 128", "never",
        "error of sums of 4,096 products by a model of them: {one[uniform_4096]:.4f}, without "
        "promotion {other[uniform_4096]:.3f} (the report: nearly 0.02)",
        measure="uniform_4096", unit="error", simulated=True,
    ),
]  # fmt: skip


# ---- What is trained -----------------------------------------------------------------------------

# Seeds of every arm by experiment; the others have three.
SEEDS = {
    "base": {"base": 8},
    "balance": {"loss 0.001": 8, "loss 0.01": 8, "batch loss 0.01": 8},
    "mtp": {"off": 8, "base": 8},
    "attention": {"MHA": 8, "GQA 2": 8},
    "experts": {"dense": 8, "no shared": 8, "4 large": 8},
    "node_limit": {"4 groups": 8},
    "fp8_loss": {"tiles": 12, "gradients in blocks": 12},
    "specialisation": {"loss 0.001": 8, "loss 0.01": 8, "batch loss 0.01": 8},
}

# Learning rates times 0.67 and 1.5: seed 0 of both. If one of them is better than the base's rate
# on the validation text, it gets seeds 1 and 2, and the better of the two by three seeds counts.
RATES = (0.67, 1.5)

# The headline claims are asked once more on English prose (prose.py; three seeds), and one of them,
# the dense network, with 2,400 steps (one seed).
PROSE = {"results": "experiments/results/prose", "data": "prose"}
LONGER = {"results": "experiments/results/2400", "steps": 2400}
