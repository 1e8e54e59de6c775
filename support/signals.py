"""Stops a training run after Ctrl-C, pre-emption (SIGTERM) or a closed terminal (SIGHUP)."""

import os
import signal
import sys
from contextlib import suppress

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last one
NUMBERS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stop:
    """Lets a training run finish its step or evaluation after one of these signals. The run then
    saves a checkpoint and stops."""

    def __init__(self, machine):
        self.machine, self.heard = machine, False
        handlers = {number: signal.getsignal(number) for number in NUMBERS}
        # Ignored signals, as under nohup, stay ignored. None: a handler not set by Python.
        kept = (signal.SIG_IGN, None)
        self.before = {x: handler for x, handler in handlers.items() if handler not in kept}
        for number in self.before:
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.heard = True
        if self.machine.rank == 0:
            with suppress(OSError):  # the terminal may be closed
                os.write(sys.stderr.fileno(), b"\nstopping after this step or evaluation\n")
        if "RANK" not in os.environ:  # under torchrun a scheduler's signal may arrive twice
            self.end()

    def end(self):
        """Restores the previous handlers: a second Ctrl-C ends the run at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process has received a signal, so that all stop together."""
        return self.machine.any(self.heard)
