"""What DeepSeek's papers claim, what is trained to ask it, and the rule that gives the verdict.

A verdict is never typed. `verdict` makes the word from numbers, and verdicts.py takes these from
the results and writes the tables of the pages. Most claims were found with seeds 0 to 7, when the
rule was not yet what it is: docs/notes/PLAN.md has its history, and the plan that asks eight of
them once more, on seeds that nobody had seen.
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
    "shown": "what the claim says is *sure*: (1) the p-value is below 0.05 after Holm's correction "
    "for all tests of its family, (2) the 95 % interval from the pairs of these two arms alone "
    "excludes zero, too, (3) nothing else is known that may be the reason (MaxVio differs by at "
    "most 0.25), and (4) so it is where each arm has its own best learning rate, if that is known.",
    "contradicts": "the opposite is sure.",
    "equal": "the claim is that nothing differs, and it is sure that the difference is smaller "
    "than the margin: the same conditions, with the margin in place of zero.",
    "differs: better": "the claim is that nothing differs, and a gain is sure.",
    "differs: worse": "the claim is that nothing differs, and a loss is sure.",
    "suggestive": "the 95 % interval excludes zero (or lies within the margin), but that is not "
    "sure.",
    "suggestive of the opposite": "the same against the claim.",
    "suggestive of a difference": "the same against a claim that nothing differs.",
    "cannot tell": "none of these.",
    "seen in a simulation": "*shown*, but by a simulation or on random numbers, not in a training.",
    "lower here": "a bound of the paper was measured and not reached.",
    "not yet run": "an arm has no run.",
}


def verdict(
    kind: str,
    mean: float | None,
    half: float | None = None,
    p: float | None = None,
    alone: float | None = None,
    *,
    margin: float = 0.0,
    p_equal: float | None = None,
    elsewhere: bool = True,
    tuned: tuple[float, float] | None = None,
    unlike: bool = False,
    simulated: bool = False,
) -> str:
    """The word for one comparison. Numbers above zero are on the claim's side.

    kind       "better": one arm is said to be better than another; "equal": as good
    mean       the difference, `half` its 95 % interval's half; None without a run of both
    p          that there is no difference, corrected by Holm's method
    alone      half of the interval from the pairs of these two arms alone
    margin     the largest difference that still counts as none, in the units of mean
    p_equal    that the difference is as large as the margin, corrected in the same way
    elsewhere  an equality holds on a second text, too, where it is asked
    tuned      difference and half interval where each arm has its own best learning rate, if known
    unlike     the arms also differ in something else that may be the reason
    simulated  it is no training
    """
    if mean is None:
        return "not yet run"
    if half is None or p is None:
        return "cannot tell"
    intervals = [(mean, half), (mean, half if alone is None else alone), tuned or (mean, half)]
    if kind == "equal":
        within = [elsewhere and abs(middle) + x < margin for middle, x in intervals]
        if p_equal is not None and p_equal < 0.05 and all(within) and not unlike:
            return "equal"
    differs = [abs(middle) > x and middle * mean > 0 for middle, x in intervals]
    if p < 0.05 and all(differs) and not unlike:
        if kind == "equal":
            return "differs: better" if mean > 0 else "differs: worse"
        if mean < 0:
            return "contradicts"
        return "seen in a simulation" if simulated else "shown"
    if kind == "equal" and (within[0] or differs[0]):
        return "suggestive" if within[0] else "suggestive of a difference"
    if differs[0]:
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
    other_measure: str = ""  # of other, if it is another figure
    unit: str = "bits/byte"
    less: bool = True  # of the measure is better
    short: str = ""  # a few words, for the page's summary
    margin: str = ""  # of MARGINS, for kind "equal"
    both_texts: bool = False  # an equality has to hold on the validation text, too
    low: float = 0.0  # for kind "bound": the paper's
    networks: tuple[str, ...] = ()  # one and other in plan.py: asked again, at their own rates
    alike: str = ""  # a figure in which the arms must agree within 0.25
    simulated: bool = False
    headline: bool = False  # asked again on another text, and shown in the README


CLAIMS = [
    Claim(
        "A bias keeps the experts equally busy (section 2.1.2)", "balance", "base", "nothing",
        "MaxVio on validation text {one[max_vio_global]:.2f}, with nothing that balances "
        "{other[max_vio_global]:.2f}",
        measure="max_vio_global", unit="MaxVio", short="the bias balances",
    ),
    Claim(
        "The bias costs less loss than a sequence-wise balance loss (4.5.3)",
        "balance", "base", "loss 0.01",
        "a sequence-wise loss in place of the bias (MaxVio of a batch {other[max_vio_batch]:.2f} "
        "and {one[max_vio_batch]:.2f})",
        networks=("MLA", "loss 0.01"), short="the bias costs less than a loss", headline=True,
    ),
    Claim(
        "A batch-wise loss is as good as the bias (4.5.3)",
        "balance", "batch loss 0.01", "base",
        "the batch-wise loss (MaxVio {one[max_vio_batch]:.2f}) in place of the bias "
        "({other[max_vio_batch]:.2f})",
        kind="equal", margin="loss", short="a batch-wise loss is as good as the bias",
    ),
    Claim(
        "Experts specialise more with the bias than with the loss (4.5.3)",
        "specialisation", "base", "loss 0.01",
        "information that expert and domain of the text share: bias {one[domain_bits]:.3f} bits, "
        "loss {other[domain_bits]:.3f}",
        measure="domain_bits", unit="bits", less=False, short="experts specialise with the bias",
    ),
    Claim(
        "MTP leaves the bits per byte as they are (Table 4; benchmarks improve)",
        "mtp", "base", "off", "without MTP, at equal steps (no benchmark was asked)",
        kind="equal", margin="loss", networks=("MLA", "off"),
        short="MTP leaves the loss as it is", headline=True,
    ),
    Claim(
        "MTP pays at equal seconds (no paper claims it)",
        "mtp", "base", "off longer", "without MTP, 1.38 times as many steps",
        short="MTP pays by the clock",
    ),
    Claim(
        "85 to 90 % of second tokens are accepted (5.4.3, of generated text)",
        "mtp", "base", compared="own text, greedily {one[greedy_1]:.0%}, of which "
        "{one[greedy_repeated]:.0%} repeats itself; on unseen code {one[given_greedy]:.0%}, and "
        "{one[given_0.8]:.0%} at temperature 0.8",
        kind="bound", measure="0.8_1", unit="at temperature 0.8", low=0.85,
        short="85 % of second tokens are accepted",
    ),
    Claim(
        "MLA is better than multi-head attention, with a smaller cache (V2, Table 9)",
        "attention", "base", "MHA",
        "multi-head attention, with a cache {ratio:.1f} times as large",
        networks=("MLA", "MHA"), short="MLA is better than multi-head attention",
    ),
    Claim(
        "MLA is better than grouped queries, with a smaller cache (V2, Tables 8 and 9)",
        "attention", "base", "GQA 2",
        "two key-value heads, with a cache {ratio:.1f} times as large",
        networks=("MLA", "GQA 2"), short="MLA is better than grouped queries", headline=True,
    ),
    Claim(
        "Grouped queries are worse than multi-head attention (V2, Table 8)",
        "attention", "MHA", "GQA 2", "two key-value heads in place of four",
        networks=("MHA", "GQA 2"), short="grouped queries are worse than multi-head attention",
        headline=True,
    ),
    Claim(
        "Experts beat a dense network (2401.06066, Table 1: 0.3B against 0.2B active)",
        "experts", "base", "dense", "a dense network of the same active parameters, equal tokens",
        networks=("MLA", "dense"), short="experts beat a dense network", headline=True,
    ),
    Claim(
        "Experts pay at equal seconds (no paper claims it)",
        "experts", "base", "dense longer", "the dense network, 1.25 times as many steps",
        short="experts pay by the clock",
    ),
    Claim(
        "Many small experts beat few large ones (2401.06066, Table 1)",
        "experts", "base", "4 large",
        "one of four large experts, less evenly used (MaxVio {other[max_vio_global]:.2f}, base "
        "{one[max_vio_global]:.2f})",
        alike="max_vio_global", short="many small experts beat few large ones",
    ),
    Claim(
        "A shared expert helps (2401.06066, section 4.4: most benchmarks)",
        "experts", "base", "no shared",
        "without it, five visited experts, routed_scaling_factor 1",
        networks=("MLA", "no shared"), short="a shared expert helps",
    ),
    Claim(
        "A shared expert helps with routed_scaling_factor 2.5, which V3 has",
        "experts", "shared x2.5", "no shared x2.5", "without it, both with 2.5",
        short="a shared expert helps with a factor of 2.5",
    ),
    Claim(
        "A limit on nodes loses nothing (V2, section 2.2.2, of M >= 3; here M = 2)",
        "node_limit", "base", "4 groups", "no limit in place of M = 2 of four groups",
        kind="equal", margin="loss", short="a limit of two nodes loses nothing",
    ),
    Claim(
        "A phase of long windows extends the context beyond YaRN alone (4.3)",
        "long_context", "last tenth long", "base",
        "beyond the trained length: neither, {other[beyond]:.2f} nats; YaRN alone "
        "{other[beyond_yarn]:.2f}; both, {one[beyond]:.2f}",
        measure="beyond", other_measure="beyond_yarn", unit="nats",
        short="a phase of long windows adds to YaRN", headline=True,
    ),
    Claim(
        "The longer context is used (4.3)", "long_context", "last tenth long",
        compared="one network, windows of 256 against 1,024 tokens",
        measure="context_gain", unit="nats", short="the longer context is used",
    ),
    Claim(
        "A scale for every 128 numbers protects FP8 products (3.3)",
        "fp8_error", "tiles", "one scale",
        "error where tokens' sizes spread over 8 decades: {one[error_8]:.3f}, with one scale "
        "{other[error_8]:.3f} (a scale for each token would do as well here)",
        measure="error_8", unit="error", simulated=True, short="tiles protect FP8 products",
    ),
    Claim(
        "The loss of FP8 training is within 0.25 % of bf16's (3.3)",
        "fp8_loss", "tiles", "base", "FP8 with tiles against bf16", kind="equal", margin="fp8",
        both_texts=True, networks=("tiles", "MLA"), short="FP8 costs less than 0.25 %",
    ),
    Claim(
        "Gradients in 128x128 blocks harm the training (Appendix B.2: it diverged)",
        "fp8_loss", "tiles", "gradients in blocks", "blocks in place of tiles",
        short="gradients in blocks harm",
    ),
    Claim(
        "Promotion every 128 products mitigates Hopper's short sums (3.3.2, 3.5.2)",
        "fp8_accumulation", "every 128", "never",
        "error of sums of 4,096 products by a model of them: {one[uniform_4096]:.4f}, without "
        "promotion {other[uniform_4096]:.3f} (the report: nearly 0.02)",
        measure="uniform_4096", unit="error", simulated=True,
        short="promotion mitigates short sums",
    ),
]  # fmt: skip


# ---- What is trained -----------------------------------------------------------------------------

# Of the first runs, seeds of every arm by experiment; the others have three. plan.py has what is
# asked on fresh seeds.
SEEDS = {
    "base": {"base": 8},
    "balance": {"loss 0.001": 8, "loss 0.01": 8, "batch loss 0.01": 8},
    "mtp": {"off": 8, "base": 8},
    "attention": {"MHA": 8, "GQA 2": 8},
    "experts": {"dense": 8, "no shared": 8, "4 large": 8},
    "node_limit": {"4 groups": 8},
    "fp8_loss": {"tiles": 2, "gradients in blocks": 12},
    "specialisation": {"loss 0.001": 8, "loss 0.01": 8, "batch loss 0.01": 8},
}

# The headline claims are asked once more on English prose (prose.py; three seeds), and two of them
# with 2,400 steps (one seed).
PROSE = {"results": "experiments/results/prose", "data": "prose"}
LONGER = {"results": "experiments/results/2400", "steps": 2400}
# Runs of an earlier code, before there was a test text: 69 of 600 steps, and 72 of 200.
EARLIER = {"results": "experiments/results/earlier"}
