"""Tests run on one thread: their tensors are tiny, and threads of two processes that share the
cores (DDP on a CPU) would wait for each other at every barrier."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
