"""Memory for the results of kernels on the processor."""

from collections.abc import Sequence

from torch import Tensor

from csq_kernels import _native

HUGE_PAGES_FROM = 4 << 20  # bytes; such a range holds at least one whole page of 2 MiB


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """As ``like.new_empty(shape)``; a large one is fresh memory, whose first touch would cost more than the kernel."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= HUGE_PAGES_FROM and _native.module is not None:
        _native.module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
