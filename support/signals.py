"""Ctrl-C, pre-emption (SIGTERM), a closed terminal (SIGHUP): a command ends in good order."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Windows lacks the last.
NUMBERS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


@contextmanager
def interruptible() -> Iterator[None]:
    """Within `with interruptible():` SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does,
    so that unfinished files are removed."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # else no handler may be set
    ours = [x for x in NUMBERS if in_main and signal.getsignal(x) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class Stop:
    """A training that gets one of these signals finishes its step or evaluation and stops. A
    checkpoint is saved after the step."""

    def __init__(self, machine):
        self.machine, self.heard = machine, False
        handlers = {number: signal.getsignal(number) for number in NUMBERS}
        # What is ignored, as under nohup, stays so, and what Python has not set up (None).
        left = (signal.SIG_IGN, None)
        self.before = {x: handler for x, handler in handlers.items() if handler not in left}
        for number in self.before:
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.heard = True
        if self.machine.rank == 0:
            with suppress(OSError):  # of a terminal that is closed
                os.write(sys.stderr.fileno(), b"\nstopping after this step or evaluation\n")
        if "RANK" not in os.environ:  # else a scheduler and torchrun may both send this one signal
            self.end()

    def end(self):
        """The handlers from before are back: a second Ctrl-C ends the run at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process has heard a signal, so that all stop together."""
        return self.machine.any(self.heard)
