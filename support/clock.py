"""How fast a run is, and how long it will last."""

import time
from datetime import timedelta


class Clock:
    def __init__(self):
        self.restart(0)
        self.steps = 0  # by this process
        self.speed = 0.0  # tokens/s, smoothed
        self.evaluation = 0.0  # seconds, of the last evaluation

    def restart(self, tokens: int):
        """Starts a new measurement, with `tokens` tokens read so far. Whatever took time until now,
        such as a save or an evaluation, does not count, nor do the steps before it."""
        self.since, self.tokens_before = time.perf_counter(), tokens

    def measure(self, tokens: int) -> float:
        """Tokens per second since the last measurement or restart."""
        since, before = self.since, self.tokens_before
        self.restart(tokens)
        speed = (tokens - before) / (self.since - since)
        self.speed = 0.7 * self.speed + 0.3 * speed if self.speed else speed
        return speed

    def time_left(self, tokens: int, evaluations: int) -> str:
        """As text, the time that remains for `tokens` tokens, at the smoothed speed, and for the
        evaluations. Before the first evaluation the text counts them instead. It is empty in the
        first ten steps, which may be slow."""
        seconds = tokens / self.speed + evaluations * self.evaluation
        left = timedelta(seconds=min(round(seconds), 10**13))  # near timedelta's limit
        more = f" and {evaluations} evaluation(s)" if evaluations and not self.evaluation else ""
        return f", {left}{more} left" if self.steps >= 10 else ""
