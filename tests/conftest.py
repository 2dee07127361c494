"""What every test shares."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # tiny tensors are quicker without a pool, and results do not depend on the machine
