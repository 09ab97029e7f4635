"""Memory for the results of kernels on the processor."""

from collections.abc import Sequence

from torch import Tensor

from csq_kernels import _native

HUGE_PAGE = 2 << 20  # bytes
HUGE_PAGES_FROM = 2 * HUGE_PAGE  # such a range holds at least one whole page


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """As ``like.new_empty(shape)``; a large one is fresh memory, whose first touch would cost more than the kernel."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= HUGE_PAGES_FROM and _native.module is not None:
        _native.module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def new_empty_aligned(like: Tensor, size: int) -> Tensor:
    """``size`` bytes that begin where a huge page can: what is streamed again and again misses no address translation.

    The rest of the first page is allocated but never touched.
    """
    if size < HUGE_PAGE // 2:
        return like.new_empty(size)
    storage = new_empty(like, (size + HUGE_PAGE,))
    start = -storage.data_ptr() % HUGE_PAGE
    return storage[start : start + size]
