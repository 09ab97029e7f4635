"""The packed layers: static, importable, picklable subclasses of the ``nn`` layers, with bit-planes for a weight.

They compute with ``W = step * z``, equation (7), from the planes of ``bitplanes.py`` and are done with training: their
one parameter is the bias. Everything else of the float layer works as before.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csq_kernels import bitplanes, functional
from csq_kernels._ops import MAX_BITS
from csq_kernels.nn.in_place import replace_
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.reference import along_channel, always_exact

OWN = ("planes", "scale", "_extra_state")
_STATE_VERSION = 1


def exponents(mask: int) -> tuple[int, ...]:
    """The members of a set of exponents, bit ``b`` of ``mask`` for ``b``."""
    return tuple(bit for bit in range(mask.bit_length()) if mask >> bit & 1)


class PackedLayer(nn.Module):
    """Mixin in front of an ``nn`` layer: its weight is equation (7) from packed planes instead of a parameter.

    Buffers, with ``k`` planes:

    - ``planes`` uint8, in the order that the kernels of its device read; ``(k, ceil(weights / 8))`` in a state dict.
    - ``scale`` ``()`` or ``(C,)``, and ``step = scale / (2^n_bits - 1)``, not in a state dict: float32, whatever the
      model is cast to.

    ``coefficients`` are those of the planes, ``active`` the exponents of the paper bits. ``precision`` is ``"exact"``,
    ``"high"`` or ``"int8"``, see ``functional.bitserial_linear``, and may be set at any time.

    A layer made by its constructor has no planes and a weight of 0, until a state is loaded; ``from_codes`` fills it.
    """

    float_class: type[nn.Module]
    channel_axis = 0

    planes: Tensor
    scale: Tensor
    step: Tensor
    _like: Tensor
    coefficients: tuple[int, ...]
    weight_shape: tuple[int, ...]
    n_bits: int
    active: tuple[int, ...]
    precision: str
    bias: nn.Parameter | None
    input_quantizer: nn.Module | None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "float_class"):
            cls.__signature__ = inspect.signature(cls.float_class)  # type: ignore[attr-defined]

    def __init__(self, *args, **kwargs):
        # The float layer's constructor would register a weight, which is a property here.
        self.__dict__.update(self.float_class(*args, **kwargs).__dict__)
        weight = self._parameters.pop("weight")
        assert weight is not None
        planes = torch.empty((0, bitplanes.plane_bytes(weight.numel())), dtype=torch.uint8, device=weight.device)
        scale = torch.ones((), dtype=torch.float32, device=weight.device)
        self.become_packed_(weight.shape, planes, scale, (), MAX_BITS, (), weight.dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        n_bits: int,
        bias: Tensor | None = None,
        precision: str = "exact",
        active: Collection[int] | None = None,
        **options,
    ):
        """Return a layer with the weight ``scale * codes / (2^n_bits - 1)``, equation (7).

        Args:
            codes: integers of the weight's shape.
            scale: float32, ``()`` or one for each output channel.
            n_bits: 1 to 16.
            bias: one for each output channel.
            precision: as in ``functional.bitserial_linear``.
            active: exponents that the digits of the codes use; default: as many adjacent ones as they need.
            options: of the float layer, such as ``stride``.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.

        Example:
            >>> layer = PackedLinear.from_codes(torch.tensor([[3, -1], [0, 2]]), torch.tensor(1.5), n_bits=2)
            >>> layer(torch.ones(1, 2))
            tensor([[1., 1.]])
        """
        sizes = cls._sizes(tuple(codes.shape), options)
        float_layer = cls.float_class(**sizes, **cls._bias_option(bias), **options, device="meta")
        expected = {name: tuple(parameter.shape) for name, parameter in float_layer.named_parameters()}
        for name, tensor in (("weight", codes), ("bias", bias)):
            if tensor is not None and tensor.shape != expected[name]:
                raise ValueError(f"expected {name} of shape {expected[name]}, got {tuple(tensor.shape)}")
        del float_layer._parameters["weight"]
        layer = cast(PackedLayer, float_layer)
        layer.__class__ = cls
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        dtype = torch.get_default_dtype() if bias is None else bias.dtype
        layer.adopt_codes_(codes, scale, n_bits, active, dtype, precision)
        return layer

    @staticmethod
    def _sizes(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
        """The sizes that the float layer's constructor wants for a weight of this shape."""
        raise NotImplementedError

    @staticmethod
    def _bias_option(bias: Tensor | None) -> dict[str, bool]:
        return {"bias": bias is not None}

    def adopt_codes_(
        self,
        codes: Tensor,
        scale: Tensor,
        n_bits: int,
        active: Collection[int] | None,
        dtype: torch.dtype,
        precision: str = "exact",
    ) -> None:
        """Take ``codes`` for the weight of the float layer whose class was just changed and whose weight is gone."""
        if not 1 <= n_bits <= MAX_BITS:
            raise ValueError(f"expected n_bits from 1 to {MAX_BITS}, got {n_bits}")
        if codes.is_floating_point() or codes.is_complex():
            raise TypeError(f"expected codes of an integer dtype, got {codes.dtype}")
        if active is None:
            largest = int(codes.to(torch.int64).abs().max()) if codes.numel() else 0
            active = range(largest.bit_length())
        if any(not 0 <= bit < n_bits for bit in active):
            raise ValueError(f"expected digits at exponents from 0 to {n_bits - 1}, got {sorted(active)}")
        planes, coefficients = bitplanes.encode(codes, active)
        used = tuple(sorted(set(active)))
        self.become_packed_(codes.shape, planes, scale, coefficients, n_bits, used, dtype, precision)

    def become_packed_(
        self,
        weight_shape: Sequence[int],
        planes: Tensor,
        scale: Tensor,
        coefficients: tuple[int, ...],
        n_bits: int,
        active: tuple[int, ...],
        dtype: torch.dtype,
        precision: str = "exact",
    ) -> None:
        """As ``adopt_codes_``, from canonical planes; ``dtype`` is that of the weight which they replace."""
        self.weight_shape, self.n_bits, self.active = tuple(weight_shape), n_bits, active
        self.coefficients, self.precision = coefficients, precision
        check_scale(scale, self.weight_shape[self.channel_axis])
        self._modules.setdefault("input_quantizer", None)
        self.register_buffer("planes", self._tile(planes))
        self.register_buffer("scale", scale.detach().to(planes.device, torch.float32, copy=True))
        self.register_buffer("step", self._step(), persistent=False)
        # It follows every cast, and so tells what dtype the weight would have.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=planes.device), persistent=False)

    def become_like_(self, tied: Sequence["PackedLayer"], dtype: torch.dtype) -> None:
        """As ``adopt_codes_``, with the codes that the layers ``tied`` hold; shares the tensors of the first of them,
        and the planes of one that reads the same order.
        """
        leader = tied[0]
        scheme = (leader.coefficients, leader.n_bits, leader.active)
        planes = leader.canonical_planes()
        self.become_packed_(leader.weight_shape, planes, leader.scale, *scheme, dtype, leader.precision)
        self.scale, self.step = leader.scale, leader.step
        self.planes = next((layer.planes for layer in tied if layer._order() == self._order()), self.planes)

    def strip_(self) -> None:
        """Remove what this class added; the caller then gives the module another class."""
        for name in ("planes", "scale", "step", "_like"):
            del self._buffers[name]
        self._non_persistent_buffers_set -= {"step", "_like"}
        del self._modules["input_quantizer"]
        for name in ("weight_shape", "n_bits", "active", "coefficients", "precision"):
            del self.__dict__[name]

    def _step(self) -> Tensor:
        return self.scale / (2.0**self.n_bits - 1)

    def _order(self) -> tuple[str, tuple[int, ...]] | None:
        """The op in whose order the planes are, and the weight's shape for it; ``None``: they stay canonical."""
        return None

    def _tile(self, planes: Tensor) -> Tensor:
        order = self._order()
        return functional.tile(order[0], planes, self.coefficients, order[1]) if order else planes

    def canonical_planes(self) -> Tensor:
        """The planes as ``bitplanes.py`` describes them, uint8 ``(k, ceil(weights / 8))``."""
        order = self._order()
        return functional.untile(order[0], self.planes, self.coefficients, order[1]) if order else self.planes

    @property
    def paper_bits(self) -> int:
        """Active exponents, which papers count."""
        return len(self.active)

    @property
    def stored_bits(self) -> int:
        """Planes, which the file holds."""
        return len(self.coefficients)

    @property
    def dtype(self) -> torch.dtype:
        """Of ``weight``: what the float layer has, or was cast to since."""
        return self._like.dtype

    @torch.no_grad()
    def integer_codes(self) -> Tensor:
        """``z`` of equation (7), int32 of the weight's shape."""
        return bitplanes.decode(self.canonical_planes(), self.coefficients, self.weight_shape)

    def _float_weight(self) -> Tensor:
        return functional.bitserial_weight(
            self.planes, self.step, self.coefficients, self.weight_shape, self.channel_axis
        )

    @property
    def weight(self) -> Tensor:
        """The weight of equation (7), computed in float32 at each access; not a parameter."""
        return self._float_weight().to(self.dtype)

    def _quantized(self, input: Tensor) -> Tensor:
        return input if self.input_quantizer is None else self.input_quantizer(input)

    def _float_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Move the planes and put them in the order of their new device; casts leave them, scale and step alone.

        The tensor objects stay where PyTorch lets them, so that tied layers go on sharing.
        """
        own = {id(self._buffers[name]) for name in ("planes", "scale", "step")}
        device = fn(self._like).device.type
        moves = device != self.planes.device.type
        if moves:
            self._set("planes", self.canonical_planes())

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in own:
                return moved
            moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            return replace_(tensor, moved)

        super()._apply(move, recurse)
        if moves:
            self._set("planes", self._tile(self.planes))
        return self

    def _set(self, name: str, values: Tensor) -> None:
        held = self._buffers[name]
        assert held is not None
        self._buffers[name] = replace_(held, values)

    def get_extra_state(self) -> Tensor:
        active = sum(1 << bit for bit in self.active)
        return torch.tensor([_STATE_VERSION, self.n_bits, active, *bitplanes.to_masks(self.coefficients)])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing left to do: ``_load_from_state_dict`` reads it first, because it decides the shapes."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "planes"] = self.canonical_planes()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        found = [prefix + name for name in OWN if prefix + name in state_dict]
        complete = len(found) == len(OWN)
        if complete:
            try:
                self._make_room(*(state_dict[name] for name in found))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
                return
        else:
            # None of them means anything without the others.
            for name in found:
                del state_dict[name]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if complete:
            self._set("planes", self._tile(self.planes))
            self._set("step", self._step())

    def _make_room(self, planes: Tensor, scale: Tensor, state: Any) -> None:
        """Take over what ``state`` says and give the buffers the shapes of what is about to be loaded."""
        if not isinstance(state, Tensor) or state.shape != (5,) or state.is_floating_point():
            raise ValueError("expected _extra_state as an integer tensor (version, n_bits, active, stored, negative)")
        version, n_bits, active, *masks = state.tolist()
        if version != _STATE_VERSION:
            raise ValueError(f"expected _extra_state of version {_STATE_VERSION}, got {version}")
        coefficients = check_scheme(n_bits, active, *masks)
        shape = (len(coefficients), self._plane_bytes())
        if planes.shape != shape or planes.dtype != torch.uint8:
            raise ValueError(f"expected planes as uint8 of shape {shape}, got {planes.dtype} {tuple(planes.shape)}")
        check_scale(scale, self.weight_shape[self.channel_axis])
        self.n_bits, self.active, self.coefficients = n_bits, exponents(active), coefficients
        self._set("planes", self.planes.new_empty(shape))
        self._set("scale", self.scale.new_empty(scale.shape))

    def _plane_bytes(self) -> int:
        return bitplanes.plane_bytes(torch.Size(self.weight_shape).numel())

    def extra_repr(self) -> str:
        bits = f"paper_bits={self.paper_bits}, stored_bits={self.stored_bits}"
        return f"{super().extra_repr()}, {bits}, precision={self.precision!r}"


def check_scale(scale: Tensor, channels: int) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless this is a scale of equation (7) that float32 holds exactly."""
    if scale.shape not in ((), (channels,)):
        raise ValueError(f"expected scale of shape () or ({channels},), got {tuple(scale.shape)}")
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"expected scale of dtype float32, got {scale.dtype}")
    if not scale.is_meta and not bool(torch.isfinite(scale).all()):
        raise ValueError("expected scale to be finite, got infinities or NaN")


def check_scheme(n_bits: int, active: int, stored: int, negative: int) -> tuple[int, ...]:
    """The coefficients of a packed layer; ``ValueError`` unless the sets of exponents belong together."""
    if not 1 <= n_bits <= MAX_BITS or not 0 <= active < 1 << n_bits:
        raise ValueError(f"expected n_bits from 1 to {MAX_BITS} and active exponents below it, got {n_bits, active}")
    coefficients = bitplanes.from_masks(stored, negative)
    possible, _ = bitplanes.to_masks(bitplanes.widest(exponents(active)))
    if stored & ~possible:
        raise ValueError(f"expected coefficients that the exponents {exponents(active)} need, got {coefficients}")
    return coefficients


class PackedLinear(PackedLayer, nn.Linear):
    """``nn.Linear`` on packed planes, see ``functional.bitserial_linear``."""

    float_class = nn.Linear

    @staticmethod
    def _sizes(shape, options):
        if len(shape) != 2:
            raise ValueError(f"expected codes of 2 axes, got shape {shape}")
        return {"out_features": shape[0], "in_features": shape[1]}

    def _order(self):
        return "bitserial_linear", self.weight_shape

    def forward(self, input: Tensor) -> Tensor:
        return functional.bitserial_linear(
            self._quantized(input),
            self.planes,
            self.step,
            self._float_bias(),
            coefficients=self.coefficients,
            weight_shape=self.weight_shape,
            precision=self.precision,
        )


def _conv_sizes(shape: tuple[int, ...], options: dict[str, Any], axes: int, transposed: bool = False) -> dict[str, Any]:
    if len(shape) != axes + 2:
        raise ValueError(f"expected codes of {axes + 2} axes, got shape {shape}")
    first, second = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    return {first: shape[0], second: shape[1] * options.get("groups", 1), "kernel_size": shape[2:]}


class _PackedPlanarConv(PackedLayer):
    """Conv1d and Conv2d, the first as rows of height 1."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def _planar(self, sizes: Sequence[int], fill: int) -> tuple[int, ...]:
        """``sizes`` of one or two axes as those of two."""
        return tuple(sizes) if len(sizes) == 2 else (fill, *sizes)

    def _planar_shape(self) -> tuple[int, ...]:
        return (*self.weight_shape[:2], *self._planar(self.weight_shape[2:], 1))

    def _order(self):
        if always_exact(self.weight_shape, self.groups):
            return None
        return "bitserial_conv2d", self._planar_shape()

    def _float_weight(self) -> Tensor:
        weight = functional.bitserial_weight(self.planes, self.step, self.coefficients, self._planar_shape())
        return weight.view(self.weight_shape)

    def forward(self, input: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        input, padding = pad(self, self._quantized(input))
        batched = input if input.ndim == axes + 2 else input.unsqueeze(0)
        output = functional.bitserial_conv2d(
            batched if axes == 2 else batched.unsqueeze(-2),
            self.planes,
            self.step,
            self._float_bias(),
            coefficients=self.coefficients,
            weight_shape=self._planar_shape(),
            stride=self._planar(self.stride, 1),
            padding=self._planar(padding, 0),
            dilation=self._planar(self.dilation, 1),
            groups=self.groups,
            precision=self.precision,
        )
        output = output if axes == 2 else output.squeeze(-2)
        return output if input.ndim == axes + 2 else output.squeeze(0)


def pad(conv, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``input`` with what zeros on both sides alike cannot express already around it, and the zeros that remain."""
    none = (0,) * len(conv.kernel_size)
    if conv.padding_mode != "zeros":
        return F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), none
    if conv.padding == "valid":
        return input, none
    if conv.padding != "same":
        return input, conv.padding
    # (left, right) of each axis, last axis first.
    sides = conv._reversed_padding_repeated_twice
    left, right = tuple(sides[-2::-2]), tuple(sides[-1::-2])
    return (input, left) if left == right else (F.pad(input, sides), none)


class PackedConv1d(_PackedPlanarConv, nn.Conv1d):
    """``nn.Conv1d`` on packed planes, see ``functional.bitserial_conv2d``."""

    float_class = nn.Conv1d

    @staticmethod
    def _sizes(shape, options):
        return _conv_sizes(shape, options, 1)


class PackedConv2d(_PackedPlanarConv, nn.Conv2d):
    """``nn.Conv2d`` on packed planes, see ``functional.bitserial_conv2d``."""

    float_class = nn.Conv2d

    @staticmethod
    def _sizes(shape, options):
        return _conv_sizes(shape, options, 2)


class _PackedDecodedConv(PackedLayer):
    """Convolutions without a kernel on planes: each call decodes the weight, and ``precision`` is always exact."""

    def _exactly(self, input: Tensor, convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """``convolve(input, weight, bias)`` in the dtype of the input, or in float32 if that is narrower."""
        input = self._quantized(input)
        if not input.is_floating_point():
            raise TypeError(f"expected input of a floating-point dtype, got {input.dtype}")
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return convolve(input.to(dtype), self._float_weight().to(dtype), bias).to(input.dtype)


class PackedConv3d(_PackedDecodedConv, nn.Conv3d):
    """``nn.Conv3d`` with its weight stored as packed planes and decoded at each call; its precision is always exact."""

    float_class = nn.Conv3d

    @staticmethod
    def _sizes(shape, options):
        return _conv_sizes(shape, options, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self._exactly(input, self._conv_forward)


class PackedConvTranspose2d(_PackedDecodedConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with its weight stored as packed planes and decoded at each call; always exact."""

    float_class = nn.ConvTranspose2d
    channel_axis = 1

    @staticmethod
    def _sizes(shape, options):
        return _conv_sizes(shape, options, 2, transposed=True)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, padding, dilation = list(self.stride), list(cast(tuple[int, ...], self.padding)), list(self.dilation)
        kernel = list(self.kernel_size)
        output_padding = self._output_padding(input, output_size, stride, padding, kernel, 2, dilation)

        def convolve(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, self.groups, dilation)

        return self._exactly(input, convolve)


class PackedEmbedding(PackedLayer, nn.Embedding):
    """``nn.Embedding`` on packed planes: reads the bytes of the rows it is asked for, never the table."""

    float_class = nn.Embedding

    @staticmethod
    def _sizes(shape, options):
        if len(shape) != 2:
            raise ValueError(f"expected codes of 2 axes, got shape {shape}")
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}

    @staticmethod
    def _bias_option(bias):
        if bias is not None:
            raise ValueError("expected bias None for an embedding, got a tensor")
        return {}

    def forward(self, input: Tensor) -> Tensor:
        rows, width = self.weight_shape
        index = input.reshape(-1)
        # Before anything else: it also refuses an index that is out of range.
        step = self.step.expand(rows).index_select(0, index)
        codes = torch.zeros((index.shape[0], width), dtype=torch.int32, device=self.planes.device)
        if self.coefficients and rows * width:
            first_bit = index.long() * width
            reach = torch.arange(bitplanes.plane_bytes(width) + 1, device=self.planes.device)
            # Of the byte after the last none of the bits is kept.
            place = (first_bit[:, None] // 8 + reach).clamp(max=self.planes.shape[1] - 1)
            read = self.planes[:, place].to(torch.int32)  # [k, rows, bytes + 1]
            aligned = (read[..., :-1] | read[..., 1:] << 8) >> (first_bit % 8)[:, None].to(torch.int32)
            shifts = torch.arange(8, dtype=torch.int32, device=self.planes.device)
            bits = ((aligned[..., None] >> shifts) & 1).flatten(2)[..., :width]
            for plane, coefficient in enumerate(self.coefficients):
                codes += bits[plane] * coefficient
        weight = codes.to(step.dtype) * along_channel(step, 2, 0)
        return weight.to(self.dtype).view(*input.shape, width)


PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    cls.float_class: cls
    for cls in (PackedLinear, PackedConv1d, PackedConv2d, PackedConv3d, PackedConvTranspose2d, PackedEmbedding)
}


def packed_class(layer: nn.Module) -> type[PackedLayer] | None:
    """The packed sister of a float, CSQ or packed layer, ``None`` if it has none."""
    if isinstance(layer, (CSQLayer, PackedLayer)):
        return PACKED_CLASSES[layer.float_class]
    return PACKED_CLASSES.get(type(layer))
