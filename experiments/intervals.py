"""How sure is the difference between two arms? Used by tables.py.

Every arm is trained with the same seeds, and a seed shifts all arms alike: they begin with the same
weights and see the same data. So a result is taken as arm + seed + residual. The deviation of the
residuals is pooled over many arms, for bits/byte those of all tables: three seeds of one arm say
little about it (2 degrees of freedom, so a factor 4.3 in the interval where a dozen have 2.2). Arms
whose networks have other shapes than the base's vary more, so they have a deviation of their own
(tables.py). If one arm of six varies three times as much as the rest of its class, its interval of
95 % holds the truth in 71 % (simulated). So the interval from its pairs alone counts, too.

Many questions are asked, so one in twenty would have an answer by chance. Holm's correction (1979)
raises the p-values: if nothing differs, one of them is below 0.05 in at most 5 % of all cases.
"""

import functools
import math

import numpy as np

Spread = tuple[float, int]  # a standard deviation or error, and its degrees of freedom


@functools.cache
def student(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's t distribution: values t >= 0, and how probable a larger |t| is at each.

    With t = sqrt(freedom) tan(angle) its density is proportional to cos(angle)^(freedom - 1).
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    with np.errstate(over="ignore"):
        return math.sqrt(freedom) * np.tan(angle), 1 - below / below[-1]


def p_value(t: float, freedom: int) -> float:
    """How probable a difference of at least |t| standard errors is by chance."""
    values, larger = student(freedom)
    return float(np.interp(abs(t), values, larger))


def quantile(larger: float, freedom: int) -> float:
    """The t beyond which |t| lies with this probability: 0.05 for an interval of 95 %."""
    values, probabilities = student(freedom)
    return float(np.interp(-larger, -probabilities, values))


def own_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval, from the deviation of these values alone."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, None
    return mean, quantile(0.05, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def residual_deviation(values: dict[tuple[str, int], float]) -> Spread:
    """Standard deviation and degrees of freedom of what is left of {(arm, seed): value} after the
    best fit of a number for every arm and one for every seed; (0, 0) where nothing is left."""
    if not values:
        return 0.0, 0
    arms, seeds = (sorted(set(x)) for x in zip(*values, strict=True))
    design = np.array([[*(arm == a for a in arms), *(seed == s for s in seeds)]
                       for arm, seed in values], float)  # fmt: skip
    y = np.array(list(values.values()))
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - int(rank)
    if freedom < 1:
        return 0.0, 0
    return math.sqrt(((y - design @ fit) ** 2).sum() / freedom), freedom


def holm(p: dict[str, float], claims: int = 0) -> dict[str, float]:
    """The p-values, corrected for there being several: the smallest times their number, the next
    times one less, and so on, none below the one before it. claims: their number, where some of
    them are not known yet."""
    corrected, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        least = min(1.0, max(least, (max(claims, len(p)) - i) * p[name]))
        corrected[name] = least
    return corrected


def standard_error(one: Spread, other: Spread, pairs: int) -> Spread:
    """Of the mean difference of so many pairs, and its degrees of freedom: two arms of one class,
    or of two (Welch, Satterthwaite). (0, 0) where nothing is known."""
    if one == other:
        return one[0] * math.sqrt(2 / pairs), one[1]
    if not (one[1] and other[1]):
        return 0.0, 0
    a, b = one[0] ** 2, other[0] ** 2
    return math.sqrt((a + b) / pairs), int((a + b) ** 2 / (a * a / one[1] + b * b / other[1]))


def seen_with(error: float, freedom: int, tests: int) -> float:
    """The difference that would be found in about 80 % of all cases or more, as one of so many
    tests. Holm's correction wants the smallest p-value below 0.05 / tests; the others may be
    larger, so they are found more often."""
    return (quantile(0.05 / tests, freedom) + quantile(0.4, freedom)) * error  # 20 % on one side


def p_of_equality(mean: float, error: float, freedom: int, margin: float) -> float:
    """How probable such a mean is where the true difference is as large as the margin: twice the
    larger of the two one-sided p-values, so it is below 0.05 exactly where the 95 % interval lies
    within the margin."""
    room = (margin - abs(mean)) / error
    return p_value(room, freedom) if room > 0 else 1.0


def equal_with(error: float, freedom: int, margin: float, tests: int = 1) -> float:
    """How probable it is that an equality is found, as one of so many tests, at the strictest step
    of Holm's correction, if there is no difference."""
    room = margin / error - quantile(0.05 / tests, freedom)  # for the mean, in standard errors
    return 1 - p_value(room, freedom) if room > 0 else 0.0


def over_documents(nats: np.ndarray, size: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The middle 95 % of the bits per byte of as many documents, drawn with replacement
    (bootstrap), from nats and bytes of each (documents,). The nats may also be differences of two
    models' nats on the same documents. Of 40 documents it is a little too narrow, about 92 %."""
    drawn = np.random.default_rng(0).integers(0, len(size), (draws, len(size)))
    means = nats[drawn].sum(1) / size[drawn].sum(1) / math.log(2)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
