"""The speed of a run, and the time that remains."""

import time
from datetime import timedelta


class Clock:
    def __init__(self):
        self.restart(0)
        self.first = None  # time and tokens at which `begin` was called

    def restart(self, tokens: int):
        """Starts a new measurement, with `tokens` tokens read so far, after something that should
        not count, such as a save or an evaluation."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def begin(self):
        """The time left is computed from all that follows the last measurement or restart."""
        self.first = self.since, self.tokens_before

    def passed(self) -> float:
        """Seconds since the last measurement or restart."""
        return time.perf_counter() - self.since

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        return (tokens - before) / (self.since - since)

    def time_left(self, tokens: int, more: int) -> str:
        """The time for `more` tokens after these, as text, at the mean speed since `begin`, saves
        and evaluations included. Empty before it."""
        if not self.first:
            return ""
        began, before = self.first
        seconds = more * (time.perf_counter() - began) / (tokens - before)
        seconds = min(round(seconds), 10**13)  # more is too much for timedelta
        return f", {timedelta(seconds=seconds)} left"


def rough(seconds: float) -> str:
    """A time with two digits, such as "2.8 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)):
        if seconds >= size or unit == "seconds":
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
