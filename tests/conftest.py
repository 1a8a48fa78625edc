"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import settings

# The models are tiny: threads would cost more than they bring.
torch.set_num_threads(1)

settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("quick")
