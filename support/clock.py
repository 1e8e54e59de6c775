"""The speed of a run, and the time that remains."""

import time
from datetime import timedelta


class Clock:
    def __init__(self):
        self.restart(0)
        self.steps = 0  # of this process, not of the run before a resume
        self.speed = 0.0  # tokens/s, smoothed
        self.evaluation = 0.0  # seconds, of the last evaluation

    def restart(self, tokens: int):
        """Starts a new measurement, with `tokens` tokens read so far, after something that should
        not count, such as a save or an evaluation."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        speed = (tokens - before) / (self.since - since)
        self.speed = 0.7 * self.speed + 0.3 * speed if self.speed else speed
        return speed

    def time_left(self, tokens: int, evaluations: int) -> str:
        """The remaining time as text, for `tokens` tokens at the smoothed speed and for the
        evaluations. Before the first evaluation the text counts them instead. Empty in the first
        ten steps, which may be slow."""
        seconds = tokens / self.speed + evaluations * self.evaluation
        left = timedelta(seconds=min(round(seconds), 10**13))  # near timedelta's limit
        more = f" and {evaluations} evaluation(s)" if evaluations and not self.evaluation else ""
        return f", {left}{more} left" if self.steps >= 10 else ""
