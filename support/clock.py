"""The speed of a run, and the time that remains."""

import time
from datetime import timedelta


class Clock:
    def __init__(self):
        self.restart(0)
        self.first = None  # time and tokens at the first measurement: what came before was start-up

    def restart(self, tokens: int):
        """Starts a new measurement, with `tokens` tokens read so far, after something that should
        not count, such as a save or an evaluation."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def passed(self) -> float:
        """Seconds since the last measurement or restart."""
        return time.perf_counter() - self.since

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        self.first = self.first or (self.since, tokens)
        return (tokens - before) / (self.since - since)

    def time_left(self, tokens: int) -> str:
        """The time for `tokens` more tokens, as text, at the mean speed since the first
        measurement, saves and evaluations included. Empty at the first."""
        began, before = self.first
        if self.tokens_before == before:
            return ""
        seconds = tokens * (self.since - began) / (self.tokens_before - before)
        seconds = min(round(seconds), 10**13)  # more is too much for timedelta
        return f", {timedelta(seconds=seconds)} left"
