"""CSQ layers and their conversion from and to float layers."""

from csq_kernels.nn.activation import ActivationQuantizer
from csq_kernels.nn.layer import Config, CSQLayer
from csq_kernels.nn.layers import (
    CSQConv1d,
    CSQConv2d,
    CSQConv3d,
    CSQConvTranspose2d,
    CSQEmbedding,
    CSQLinear,
)
from csq_kernels.nn.prepare import Plan, param_groups, prepare_

__all__ = [
    "ActivationQuantizer",
    "CSQConv1d",
    "CSQConv2d",
    "CSQConv3d",
    "CSQConvTranspose2d",
    "CSQEmbedding",
    "CSQLayer",
    "CSQLinear",
    "Config",
    "Plan",
    "param_groups",
    "prepare_",
]
