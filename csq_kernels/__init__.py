"""Fused kernels for CSQ, bit-level mixed-precision quantization (arXiv 2212.02770), on PyTorch.

Importing the package touches no GPU and no network.
"""

from importlib.metadata import PackageNotFoundError, version

from csq_kernels import _interpreter, functional, optim  # noqa: F401
from csq_kernels._native import info
from csq_kernels.budget import Budget
from csq_kernels.nn import (
    Config,
    CSQConv1d,
    CSQConv2d,
    CSQConv3d,
    CSQConvTranspose2d,
    CSQEmbedding,
    CSQLinear,
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose2d,
    PackedEmbedding,
    PackedLinear,
    PackedSummary,
    Plan,
    pack_,
    param_groups,
    prepare_,
    set_precision_,
    unpack_,
)
from csq_kernels.packed import PackedFile, PackedFileError, load_packed, save_packed
from csq_kernels.report import Report, report
from csq_kernels.search import Search, finalize_
from csq_kernels.workload import Workload, workload

try:
    __version__ = version("csq_kernels")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "Budget",
    "CSQConv1d",
    "CSQConv2d",
    "CSQConv3d",
    "CSQConvTranspose2d",
    "CSQEmbedding",
    "CSQLinear",
    "Config",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose2d",
    "PackedEmbedding",
    "PackedFile",
    "PackedFileError",
    "PackedLinear",
    "PackedSummary",
    "Plan",
    "Report",
    "Search",
    "Workload",
    "finalize_",
    "functional",
    "info",
    "load_packed",
    "optim",
    "pack_",
    "param_groups",
    "prepare_",
    "report",
    "save_packed",
    "set_precision_",
    "unpack_",
    "workload",
]
