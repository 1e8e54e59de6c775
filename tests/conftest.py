"""Tests run on one thread: their tensors are tiny, and threads of two processes that share the
cores (DDP on a CPU) would wait for each other at every barrier. All draw the same numbers."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # whatever the shell has


@pytest.fixture(autouse=True)
def seed():
    import torch  # after the number of threads is known

    torch.manual_seed(0)
