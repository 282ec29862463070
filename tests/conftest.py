"""Tests run side by side, so each keeps to one thread; sums then don't depend on the machine either."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Undo what a training run inside a test sets."""
    torch.set_num_threads(1)
    return
