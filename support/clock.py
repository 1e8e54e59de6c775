"""How fast a run is, how long it will last, and whether other programs keep it waiting."""

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch

from support.settings import info


def seconds_waited() -> float:
    """How long this process's threads have waited for a core, in all. Only Linux tells; else 0."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread may end meanwhile
            total += int(path.read_text().split()[1])
    return total / 1e9


class Clock:
    def __init__(self):
        self.restart(0)
        self.began, self.waited_before = self.since, seconds_waited()
        self.steps = 0  # made by this process
        self.speed = 0.0  # tokens/s, smoothed
        self.evaluation = 0.0  # seconds that the last one took
        self.told_busy = False

    def restart(self, tokens: int):
        """Measuring begins here, after so many tokens. What has taken time until now, such as a
        save or an evaluation, does not count, nor do the steps since the last measurement."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement, or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        speed = (tokens - before) / (self.since - since)
        self.speed = 0.7 * self.speed + 0.3 * speed if self.speed else speed
        return speed

    def time_left(self, tokens: int, evaluations: int) -> str:
        """For so many tokens, at the smoothed speed, and evaluations. These are only counted until
        one has been timed. Nothing in the first ten steps, which may be slow."""
        seconds = tokens / self.speed + evaluations * self.evaluation
        left = timedelta(seconds=min(round(seconds), 10**13))  # it holds little more
        more = f" and {evaluations} evaluation(s)" if evaluations and not self.evaluation else ""
        return f", {left}{more} left" if self.steps >= 10 else ""

    def tell_if_busy(self):
        """Says once, from the tenth step on, that the machine has more work than cores."""
        seconds = time.perf_counter() - self.began
        waiting = (seconds_waited() - self.waited_before) / seconds  # threads, on average
        if waiting > 0.25 and self.steps >= 10 and not self.told_busy:
            self.told_busy = True
            told = f"the cores are busy: {waiting:.1f} of this run's threads wait for a core"
            more = ", or use one thread: OMP_NUM_THREADS=1" * (torch.get_num_threads() > 1)
            mend = f"stop other programs{more}"
            info(f"{told} on average; {mend}")
