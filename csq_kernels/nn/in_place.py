"""Other data for a tensor object that others refer to."""

import torch
from torch import Tensor


def replace_(held: Tensor, values: Tensor) -> Tensor:
    """The tensor ``held`` with other data if PyTorch can do that, else ``values``."""
    if held is values or not torch._has_compatible_shallow_copy_type(held, values):
        return values
    held.data = values
    return held
