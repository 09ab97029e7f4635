"""The packed products of the two GPU backends: what their kernels compute, and what PyTorch on decoded weights.

A backend brings two functions. ``decode(planes, step, coefficients, weight_shape, channel_axis, dtype)`` makes the
weight, or its codes where ``step`` is None, of canonical planes or tiles. ``multiply(input, tiles, step, bias,
coefficients, weight_shape, precision, output)`` is its kernel for rows of input.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from csq_kernels import reference
from csq_kernels.backends import gpu_planes
from csq_kernels.backends.layout import DTYPES

Decode = Callable[[Tensor, Tensor | None, Sequence[int], Sequence[int], int, torch.dtype], Tensor]
Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None, Sequence[int], Sequence[int], str, Tensor], None]


def expands(batch: int, dtype: torch.dtype, most: int) -> bool:
    """Whether a product of so many input rows makes the weight's floats once: from where more than ``most`` passes over
    the planes cost more than that and a product of floats. In float32 a pass takes four times as long.
    """
    return batch > gpu_planes.PASS_ROWS * most // (4 if dtype == torch.float32 else 1)


def linear(
    decode: Decode,
    multiply: Multiply,
    passes: int,
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
) -> Tensor:
    """``input @ W.T + bias``, by ``multiply`` for up to ``passes``; float64 is served by ``reference``."""
    rows, columns = weight_shape
    if input.dtype not in DTYPES:
        canonical = planes if planes.ndim == 2 else gpu_planes.untile(planes, coefficients, weight_shape)
        return reference.bitserial_linear(input, canonical, step, bias, coefficients, weight_shape, precision)
    output = input.new_empty((*input.shape[:-1], rows))
    if output.numel() == 0:
        return output
    if columns == 0 or not coefficients:
        return output.zero_() if bias is None else output.copy_(bias)
    with torch.cuda.device_of(input):
        tiles = planes if planes.ndim > 2 else gpu_planes.tile(planes, coefficients, weight_shape)
        flat = input.reshape(-1, columns).contiguous()
        if precision != "int8" and expands(flat.shape[0], input.dtype, passes):

            def codes(dtype: torch.dtype) -> Tensor:
                return decode(tiles, None, coefficients, weight_shape, 0, dtype)

            _expanded(flat, codes, step, bias, coefficients, output.view(-1, rows))
            return output
        multiply(flat, tiles, step, bias, coefficients, weight_shape, precision, output)
    return output


def _expanded(
    input: Tensor,
    codes: Callable[[torch.dtype], Tensor],
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    output: Tensor,
) -> None:
    """The product with the codes in the dtype of ``input``, if they are exact there, summed in float32; step, bias.

    The latter two in one pass over the product, with one rounding.
    """
    if input.dtype == torch.float32 or not gpu_planes.exact_in(input.dtype, coefficients):
        product = input.float() @ codes(torch.float32).T
    else:
        product = torch.mm(input, codes(input.dtype).T, out_dtype=torch.float32)
    if bias is None:
        torch.mul(product, step, out=output)
    else:
        torch.addcmul(bias, product, step, out=output)


def conv2d(
    decode: Decode,
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
) -> Tensor:
    """The convolution with the codes, integers, times a power of two where halves might overflow."""
    if input.dtype not in DTYPES:
        options = (stride, padding, dilation, groups)
        return reference.bitserial_conv2d(input, planes, step, bias, coefficients, weight_shape, *options, precision)
    values, sample_step = input, None
    if precision == "int8" and not reference.always_exact(weight_shape, groups):
        values, sample_step = reference.quantize(input.float().flatten(1), reference.ELEMENT_LIMIT[precision])
        values, sample_step = values.view(input.shape), sample_step.view(-1, 1, 1, 1)
    elif not gpu_planes.exact_in(input.dtype, coefficients):
        values = input.float()
    exponent = gpu_planes.largest_code(coefficients).bit_length() if values.dtype != torch.float32 else 0
    weight = decode(planes, None, coefficients, weight_shape, 0, values.dtype) * 2.0**-exponent
    product = torch.nn.functional.conv2d(values, weight, None, stride, padding, dilation, groups).float()
    product *= reference.along_channel(step * 2.0**exponent, 3, 0)
    if sample_step is not None:
        product *= sample_step
    if bias is not None:
        product += bias[:, None, None]
    return product.to(input.dtype)
