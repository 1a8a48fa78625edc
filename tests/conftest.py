"""What all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The models are tiny: threads would cost more than they bring.
torch.set_num_threads(1)

settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def no_global_changes() -> Iterator[None]:
    """`seed_everything` leaves a seed in the environment, and the demo quietens a logger: later tests would see it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    logger.setLevel(level)
