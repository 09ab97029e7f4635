"""CSQ layers, their conversion from and to float layers, and the packed layers that they become."""

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
from csq_kernels.nn.pack import PackedSummary, pack_, set_precision_, unpack_
from csq_kernels.nn.packed import (
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose2d,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
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
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "PackedSummary",
    "Plan",
    "pack_",
    "param_groups",
    "prepare_",
    "set_precision_",
    "unpack_",
]
