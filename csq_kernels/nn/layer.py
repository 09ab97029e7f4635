"""What every CSQ layer shares: its parameters, its stages, and conversion from and to the float layer it subclasses."""

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from csq_kernels import functional, reference
from csq_kernels._ops import MAX_BITS
from csq_kernels.nn.activation import ActivationQuantizer
from csq_kernels.nn.encode import MARGIN, best_scale, encode, full_scale
from csq_kernels.nn.in_place import replace_
from csq_kernels.nn.leaf import PARAMETERS, LeafWeight, is_sharded

GRANULARITIES = ("layer", "channel")
# float: while the parent's constructor runs. search: soft gates. finetune: fixed gates, soft bits. hard: integer codes.
STAGES = ("float", "search", "finetune", "hard")
# beta * u of a gate at the start, at beta = 1: sig(1) = 0.73. Not 0: gates on the threshold all flip at the first step.
INITIAL_GATE_LOGIT = 1.0
# The logit of a bit that training moves no more.
_DECIDED = 6.0
BUFFERS = ("temperature", "codes")
# Of the weights of convolutions over images and volumes, besides the contiguous one.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_STATE_VERSION = 1


@dataclass(frozen=True)
class Config:
    """How layers are quantized; the keyword options of every CSQ layer, and per-layer ``rules`` for ``prepare_``.

    Args:
        n_bits: bits a weight may use, 1 to 16: ``n`` of equation (3).
        initial_bits: start with only the top ``initial_bits`` gates open and grow; default all open.
        gate_granularity: ``"layer"`` or ``"channel"`` (one gate per bit and output channel).
        scale_granularity: ``"layer"`` or ``"channel"``.
        act_bits: bits of the layer's input, 2 to 8, or ``None`` to leave it float. Embeddings ignore it.
        act_quantizer: ``"lsq"`` or ``"pact"``.
        min_bits: paper bits that the layer keeps at least; 0 lets the search remove it.
        rules: ``{pattern: options}``; ``pattern`` is a glob over layer names, or a regular expression after ``re:``;
            ``options`` is a dict of the options above, or ``None`` to leave the layer float. The first match wins; an
            unmatched rule is an error.

    Raises:
        ValueError: an option is out of range.
    """

    n_bits: int = 8
    initial_bits: int | None = None
    gate_granularity: str = "layer"
    scale_granularity: str = "channel"
    act_bits: int | None = None
    act_quantizer: str = "lsq"
    min_bits: int = 1
    rules: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self):
        if not 1 <= self.n_bits <= MAX_BITS:
            raise ValueError(f"expected n_bits from 1 to {MAX_BITS}, got {self.n_bits}")
        if self.initial_bits is not None and not 1 <= self.initial_bits <= self.n_bits:
            raise ValueError(f"expected initial_bits from 1 to {self.n_bits}, got {self.initial_bits}")
        if not 0 <= self.min_bits <= self.n_bits:
            raise ValueError(f"expected min_bits from 0 to {self.n_bits}, got {self.min_bits}")
        for name in ("gate_granularity", "scale_granularity"):
            if getattr(self, name) not in GRANULARITIES:
                raise ValueError(f"expected {name} as one of {', '.join(GRANULARITIES)}, got {getattr(self, name)!r}")
        if self.act_bits is not None:
            ActivationQuantizer(self.act_bits, self.act_quantizer)


OPTIONS = tuple(f.name for f in fields(Config) if f.name != "rules")


def _is_channels_last(weight: Tensor) -> bool:
    """By the strides, as convolutions see it: where an axis has one element, both formats are contiguous."""
    if weight.ndim not in _CHANNELS_LAST:
        return False
    last, first = (
        torch.empty(weight.shape, memory_format=memory_format, device="meta").stride()
        for memory_format in (_CHANNELS_LAST[weight.ndim], torch.contiguous_format)
    )
    return weight.stride() == last != first


class CSQLayer(LeafWeight):
    """Mixin in front of an ``nn`` layer: its weight is equation (3) instead of a parameter.

    Parameters and buffers, with ``k`` stored planes (``n_bits`` during the search, fewer once the scheme is fixed):

    - ``bit_logits`` ``(2, k, *weight_shape)``, positive then negative; ``(2, 0, *weight_shape)`` once hard.
    - ``gate_logits`` ``(k,)`` or ``(k, C)``; float32 where the layer is narrower.
    - ``scale`` ``()`` or ``(C,)``; float32 where the layer is narrower.
    - ``temperature`` ``()``, a buffer; ``codes``, the integers of equation (7), a buffer that exists once hard.

    ``bits`` names the exponent of each stored plane, and ``stage`` is one of ``search``, ``finetune``, ``hard``.

    For the single-pass step of ``csq_kernels.optim``, ``weight`` becomes the only parameter and the others state beside
    it: buffers of the same names, so that checkpoints fit both modes.
    """

    float_class: type[nn.Module]
    channel_axis = 0
    quantizes_input = True
    stage = "float"
    # Whether the weight is channels last, as the float one was: convolutions answer in the format of input or weight.
    channels_last = False
    # In the finetune stage gradients are those of a temperature no higher than this one. The search sets it.
    gradient_temperature_limit: float | None = None

    bit_logits: nn.Parameter
    gate_logits: nn.Parameter
    scale: nn.Parameter
    temperature: Tensor
    codes: Tensor | None
    bits: tuple[int, ...]
    n_bits: int
    initial_bits: int | None
    gate_granularity: str
    scale_granularity: str
    min_bits: int

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        parent = inspect.signature(cls.float_class.__init__).parameters.values()
        options = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
            for f in fields(Config)
            if f.name in OPTIONS
        ]
        signature = inspect.Signature([p for p in parent if p.name != "self"] + options)
        cls.__signature__ = signature  # type: ignore[attr-defined]

    def __init__(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)
        self._adopt(Config(**options))

    @classmethod
    def from_float(cls, layer: nn.Module, **options):
        """Return a CSQ copy of a float layer, with its weights, hooks, device, dtype and ``requires_grad``.

        Raises:
            TypeError: ``layer`` is not exactly of the class this one replaces.
        """
        if type(layer) is not cls.float_class:
            raise TypeError(f"expected layer of type {cls.float_class.__name__}, got {type(layer).__name__}")
        converted = copy.deepcopy(layer)
        converted.__class__ = cls
        assert isinstance(converted, CSQLayer)
        converted._adopt(Config(**options))
        return converted

    def to_float(self) -> nn.Module:
        """Return a float copy whose ``weight`` parameter holds this layer's present weight, soft or hard."""
        weight = self.weight.detach().clone()
        restored = copy.deepcopy(self)
        trainable = restored.scale.requires_grad
        restored.strip_()
        del restored._modules["input_quantizer"]
        restored.__class__ = self.float_class  # type: ignore[assignment]
        restored.register_parameter("weight", nn.Parameter(weight, requires_grad=trainable))
        return restored

    def strip_(self) -> None:
        """Remove what this class added but for the input quantizer; the caller then gives it another class."""
        self.make_weight_computed_()
        for name in PARAMETERS:
            del self._parameters[name]
        for name in BUFFERS:
            del self._buffers[name]
        for name in ("bits", "stage", "channels_last", "gradient_temperature_limit", "_made_of", *OPTIONS):
            self.__dict__.pop(name, None)

    @staticmethod
    def check_convertible(layer: nn.Module) -> None:
        """Raise ``ValueError`` if an option of the float ``layer`` cannot work with a computed weight."""

    def _adopt(self, config: Config, tied_to: "CSQLayer | None" = None) -> None:
        """Turn the float layer whose class was just changed into a CSQ layer; ``tied_to`` shares its parameters."""
        self.check_convertible(self)
        for name in OPTIONS:
            setattr(self, name, getattr(config, name))
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.bits = tuple(range(self.n_bits))
        self.stage = "search"
        self.channels_last = _is_channels_last(weight)
        self.register_module("input_quantizer", None)
        if config.act_bits is not None and self.quantizes_input:
            self.input_quantizer = ActivationQuantizer(config.act_bits, config.act_quantizer, device=weight.device)
            self.input_quantizer.train(self.training)
        if tied_to is not None:
            self.bit_logits, self.gate_logits, self.scale = tied_to.bit_logits, tied_to.gate_logits, tied_to.scale
            self.register_buffer("temperature", tied_to.temperature.clone())
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.register_buffer("temperature", torch.ones((), dtype=dtype, device=weight.device))
            encoded = self._encode(weight.detach(), self.temperature)
            for name, values in encoded.items():
                self.register_parameter(name, nn.Parameter(values, requires_grad=weight.requires_grad))
        self.register_buffer("codes", None)

    def shared_options(self) -> dict[str, Any]:
        """The options that layers with the same parameters must have in common."""
        names = ("n_bits", "initial_bits", "gate_granularity", "scale_granularity", "min_bits")
        return {name: getattr(self, name) for name in names}

    def _gate_shape(self, planes: int, channels: int) -> tuple[int, ...]:
        return (planes, channels) if self.gate_granularity == "channel" else (planes,)

    def _encode(self, weight: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        """Logits and scale with every plane stored, for which equation (3) gives ``weight`` at ``temperature``."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        initial = self.n_bits if self.initial_bits is None else self.initial_bits
        open_planes = torch.arange(self.n_bits, device=weight.device) >= self.n_bits - initial
        gate_logits = torch.where(open_planes, INITIAL_GATE_LOGIT, -INITIAL_GATE_LOGIT).to(dtype) / temperature
        if self.gate_granularity == "channel":
            gate_logits = gate_logits[:, None].expand(self._gate_shape(self.n_bits, weight.shape[self.channel_axis]))
        gates = torch.sigmoid(temperature * gate_logits)
        encoded = self._encode_onto(weight, tuple(range(self.n_bits)), gates, temperature, full_scale)
        return encoded | {"gate_logits": gate_logits.contiguous()}

    def _encode_onto(
        self,
        weight: Tensor,
        bits: Sequence[int],
        gates: Tensor,
        temperature: Tensor,
        choose_scale: Callable[..., Tensor],
    ) -> dict[str, Tensor]:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        per_channel = self.scale_granularity == "channel"
        scale = choose_scale(wide, bits, gates, self.n_bits, self.channel_axis, per_channel)
        own = (self.own_scale(scale), bits, self.own_gates(gates))
        logits = encode(wide[self.own_rows()], *own, temperature, self.n_bits, self.channel_axis)
        return {"bit_logits": logits.to(weight.dtype), "scale": scale}

    @property
    def weight(self) -> Tensor:
        """The weight of equation (3), or of (7) once hard: computed at each access, differentiable, not a parameter.

        In the single-pass mode it is a parameter, computed again when a tensor that makes it was changed by hand.
        """
        leaf = self._parameters.get("weight")
        if leaf is not None:
            if not torch.compiler.is_compiling() and self.is_stale() and not self.is_gathered():
                self.refresh_weight_()
            return leaf
        if self.stage == "float":
            raise AttributeError("weight")
        if self.codes is not None:
            return self._in_format(self.hard_weight())
        return self._in_format(self._reconstruct(self.bit_logits, self.gate_logits, self.scale))

    def _in_format(self, weight: Tensor) -> Tensor:
        return weight.clone(memory_format=_CHANNELS_LAST[weight.ndim]) if self.channels_last else weight

    def _reconstruct(self, bit_logits: Tensor, gate_logits: Tensor, scale: Tensor) -> Tensor:
        return functional.reconstruct(
            bit_logits,
            gate_logits,
            scale,
            self.temperature,
            bits=self.bits,
            n_bits=self.n_bits,
            channel_axis=self.channel_axis,
            hard_gates=self.stage == "finetune",
            gradient_temperature=self.gradient_temperature,
        )

    def decay_term(self) -> Tensor:
        """``()``, half the squared weight: times a ``weight_decay``, what it adds to the loss. It moves bits alone."""
        logits, gates, scale = self.bit_logits, self.gate_logits.detach(), self.scale.detach()
        return self._reconstruct(logits, gates, scale).square().sum() / 2

    @property
    def gradient_temperature(self) -> Tensor:
        """``()``, the temperature at which gradients (4), (5), (6) are taken."""
        if self.gradient_temperature_limit is None or self.stage != "finetune":
            return self.temperature
        return self.temperature.clamp(max=self.gradient_temperature_limit)

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> None:
        """Encode a float weight into logits and scale, in place, back in the search stage with every plane stored.

        Raises:
            ValueError: ``weight`` has another shape than the layer's weight.
        """
        shape = self.bit_logits.shape[2:]
        if weight.shape != shape:
            raise ValueError(f"expected weight of shape {tuple(shape)}, got {tuple(weight.shape)}")
        weight = weight.detach().to(self.bit_logits.device, self.dtype)
        self._restage("search", tuple(range(self.n_bits)))
        for name, values in self._encode(weight, self.temperature).items():
            getattr(self, name).copy_(values)

    def reset_parameters(self) -> None:
        """Draw new weights as the float layer does, and encode them."""
        if self.stage == "float":
            return super().reset_parameters()
        leaf = self._parameters.get("weight")
        weight = torch.empty(self.bit_logits.shape[2:], dtype=self.dtype, device=self.bit_logits.device)
        self._parameters["weight"] = nn.Parameter(weight)
        stage, self.stage = self.stage, "float"
        try:
            super().reset_parameters()
        finally:
            self.stage = stage
            drawn = self._parameters.pop("weight")
            if leaf is not None:
                self._parameters["weight"] = leaf
        assert drawn is not None
        self.temperature.fill_(1.0)
        return self.set_weight_(drawn)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        return super().forward(input, *args, **kwargs)

    def active_bits(self) -> tuple[int, ...]:
        """Exponents in use, increasing: gates ``u > 0`` (of any channel), or what the codes use once hard."""
        if self.stage == "hard":
            return self.bits
        open_gates = self.gate_logits.detach() > 0
        if open_gates.ndim == 2:
            open_gates = open_gates.any(1)
        return tuple(bit for bit, is_open in zip(self.bits, open_gates.tolist(), strict=True) if is_open)

    @torch.no_grad()
    def integer_codes(self) -> Tensor:
        """``z`` of equation (7), integers of the weight's shape."""
        if self.codes is not None:
            return self.codes
        codes = reference.integer_codes(self.bit_logits, self.gate_logits, self.bits, self.channel_axis)
        return codes.to(self._code_dtype())

    def hard_weight(self) -> Tensor:
        """The weight of equation (7), whatever the stage; differentiable in the scale."""
        weight = reference.hard_weight(self.integer_codes(), self.scale, self.n_bits, self.channel_axis)
        return weight.to(self.dtype)

    @torch.no_grad()
    def fix_scheme_(self, active: Collection[int], temperature: float = 1.0, *, drop_planes: bool = False) -> None:
        """Enter the finetune stage: exactly the bits ``active`` stay, the temperature is rewound, the soft weight is
        kept.

        The present soft weight is encoded again onto the active planes, with the scale that rounds best on them.

        Args:
            active: exponents that stay, among ``bits``.
            temperature: the temperature to go on from.
            drop_planes: free the other planes. The parameters then change shape: an optimizer must forget their state.

        Raises:
            ValueError: ``active`` names a bit that is not stored.
            RuntimeError: the layer is not in the search stage.
        """
        if self.stage != "search":
            raise RuntimeError(f"expected a layer in the search stage, got one in the {self.stage} stage")
        bits = tuple(sorted(set(active)))
        if not set(bits) <= set(self.bits):
            raise ValueError(f"expected active bits among {self.bits}, got {bits}")
        weight = self.whole_weight()
        stays = torch.tensor([bit in bits for bit in self.bits], dtype=torch.bool, device=weight.device)
        open_gates = stays
        if self.gate_logits.ndim == 2:
            wanted = self.gate_logits > 0
            # A plane that no channel has open was opened by the repair, for all of them.
            open_gates = (wanted | ~wanted.any(1, keepdim=True)) & stays[:, None]
        gates = open_gates[stays].to(self.scale.dtype)
        rewound = torch.full_like(self.temperature, temperature)
        encoded = self._encode_onto(weight, bits, gates, rewound, best_scale)
        self.temperature.copy_(rewound)
        self.scale.copy_(encoded["scale"])
        if drop_planes:
            self._restage("finetune", bits)
            open_gates, stays = open_gates[stays], stays[stays]
        self.stage = "finetune"
        self.own_bit_logits()[:, stays] = encoded["bit_logits"].to(self.bit_logits.dtype)
        self.gate_logits.copy_(torch.where(open_gates, INITIAL_GATE_LOGIT, -INITIAL_GATE_LOGIT))
        self.gate_logits.requires_grad_(False)
        self.gate_logits.grad = None
        if self.weight_is_leaf:
            self.refresh_weight_()

    @torch.no_grad()
    def decide_upper_planes_(self, temperature: float) -> None:
        """Make the digits of all planes but the lowest integers for good, in the finetune stage, at ``temperature``.

        The lowest takes the remainder as a soft digit, as when the scheme was fixed. From there on a weight moves by
        single steps: a digit of an upper plane that changed would move it by several.
        """
        weight = self._computed_weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        gates = (self.own_gates(self.gate_logits) > 0).to(self.scale.dtype)
        margins = [MARGIN * temperature] + [_DECIDED * temperature] * (len(self.bits) - 1)
        scale = self.own_scale(self.scale)
        logits = encode(
            wide, scale, self.bits, gates, self.temperature, self.n_bits, self.channel_axis, margins[: len(self.bits)]
        )
        self.own_bit_logits().copy_(logits)
        if self.weight_is_leaf:
            self.refresh_weight_()

    @torch.no_grad()
    def close_gates_(self, active: Collection[int]) -> None:
        """Close the gates of the stored bits that are not among ``active``, and open those that are."""
        wanted = torch.tensor([bit in active for bit in self.bits], dtype=torch.bool, device=self.gate_logits.device)
        wanted = wanted.view(-1, *[1] * (self.gate_logits.ndim - 1))
        is_open = self.gate_logits > 0
        any_open = is_open.flatten(1).any(1).view_as(wanted) if is_open.ndim == 2 else is_open
        change = torch.where(wanted, ~any_open, any_open)
        value = torch.where(wanted, INITIAL_GATE_LOGIT, -INITIAL_GATE_LOGIT).to(self.gate_logits.dtype)
        self.gate_logits.copy_(torch.where(change, value, self.gate_logits))

    @torch.no_grad()
    def harden_(self) -> None:
        """Enter the hard stage: integer codes and a scale remain; unused planes and all logits are freed."""
        if self.stage == "hard":
            return
        self.make_weight_computed_()
        codes = self.integer_codes()
        active = []
        for plane, bit in enumerate(self.bits):
            used = (self.bit_logits[0, plane] > 0) != (self.bit_logits[1, plane] > 0)
            open_gate = reference.along_channel(self.gate_logits[plane] > 0, used.ndim, self.channel_axis)
            if bool((used & open_gate).any()):
                active.append(bit)
        self._restage("hard", tuple(active))
        self.codes = codes

    @torch.no_grad()
    def follow_(self, leader: "CSQLayer") -> None:
        """Take over stage, planes, temperature and codes from the layer whose parameters this one shares."""
        if self.weight_is_leaf and not leader.weight_is_leaf:
            del self._parameters["weight"]
            self._make_parameters()
        if is_sharded(leader.bit_logits):
            self._buffers["bit_logits"] = leader.bit_logits
            self.stage, self.bits = leader.stage, leader.bits
        else:
            self._restage(leader.stage, leader.bits)
        self.temperature.copy_(leader.temperature)
        if leader.stage == "hard":
            self.codes = leader.codes

    def _code_dtype(self) -> torch.dtype:
        return torch.int16 if self.n_bits < 16 else torch.int32

    @torch.no_grad()
    def _restage(self, stage: str, bits: tuple[int, ...]) -> None:
        """Give the parameters the shapes of ``stage`` with planes ``bits``; their values are left to the caller."""
        weight_shape = self.bit_logits.shape[2:]
        planes = 0 if stage == "hard" else len(bits)
        channels = weight_shape[self.channel_axis]
        shapes = {"bit_logits": (2, planes, *weight_shape), "gate_logits": self._gate_shape(planes, channels)}
        for name, shape in shapes.items():
            parameter = getattr(self, name)
            if is_sharded(parameter):
                own = self.own_bit_logits()
                self._set_bit_logits(own.new_empty((2, planes, *own.shape[2:])))
            elif parameter.shape != shape:
                # The Parameter object stays, so that references to it (tied layers, param groups) stay true. Autograd
                # remembers the old shape while a graph of an earlier step lives, unless the dtype changes in between.
                parameter.grad = None
                empty = parameter.data.new_empty(shape)
                other = torch.float64 if parameter.dtype == torch.float32 else torch.float32
                parameter.data = parameter.data.new_empty(0, dtype=other)
                parameter.data = empty
        self.gate_logits.requires_grad_(self.scale.requires_grad and stage == "search")
        self.codes = None
        if stage == "hard":
            self.codes = torch.empty(weight_shape, dtype=self._code_dtype(), device=self.bit_logits.device)
        self.stage, self.bits = stage, bits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Move everything as PyTorch moves parameters, as far as its meaning allows.

        Planes stay in order, whatever the memory format of images; gates, scale and temperature never get narrower than
        float32, as at construction; codes stay integers. The state of the single-pass mode stays the same objects.
        """
        own = {name: tensor for name in (*PARAMETERS, *BUFFERS) if (tensor := getattr(self, name)) is not None}
        grads = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
        names = {id(tensor): name for held in (own, grads) for name, tensor in held.items()}

        def move(tensor: Tensor) -> Tensor:
            name = names.get(id(tensor))
            if name is None:
                return fn(tensor)
            with torch.no_grad():
                moved = _moved(name, tensor, fn)
                return replace_(tensor, moved) if self._buffers.get(name) is tensor and name in PARAMETERS else moved

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_is_leaf:
            # It follows from the rest, and a checkpoint fits both modes.
            del destination[prefix + "weight"]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([_STATE_VERSION, STAGES.index(self.stage), self.n_bits, *self.bits])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing left to do: ``_load_from_state_dict`` reads it first, because it decides the shapes."""

    def _read_extra_state(self, state: Any) -> tuple[str, tuple[int, ...]]:
        if not isinstance(state, Tensor) or state.ndim != 1 or state.numel() < 3 or state.is_floating_point():
            raise ValueError("expected _extra_state as an integer tensor (version, stage, n_bits, *bits)")
        version, stage, n_bits, *bits = state.tolist()
        if version != _STATE_VERSION:
            raise ValueError(f"expected _extra_state of version {_STATE_VERSION}, got {version}")
        if not 1 <= stage < len(STAGES) or any(not 0 <= bit < n_bits for bit in bits) or sorted(set(bits)) != bits:
            raise ValueError(f"expected _extra_state with a stage and increasing bits, got {state.tolist()}")
        if n_bits != self.n_bits:
            raise ValueError(f"expected n_bits {self.n_bits}, got a checkpoint with n_bits {n_bits}")
        return STAGES[stage], tuple(bits)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        shape = self.bit_logits.shape[2:]
        if prefix + "weight" in state_dict and prefix + "bit_logits" not in state_dict:
            weight = state_dict.pop(prefix + "weight")
            if weight.shape != shape:
                error_msgs.append(f"expected {prefix}weight of shape {tuple(shape)}, got {tuple(weight.shape)}")
                return
            self._restage("search", tuple(range(self.n_bits)))
            encoded = self._encode(weight.detach().to(self.bit_logits.device, self.dtype), self.temperature)
            for name, values in encoded.items():
                state_dict[prefix + name] = values
            state_dict[prefix + "temperature"] = self.temperature.clone()
            state_dict[prefix + "_extra_state"] = self.get_extra_state()
        elif prefix + "_extra_state" in state_dict:
            try:
                stage, bits = self._read_extra_state(state_dict[prefix + "_extra_state"])
            except ValueError as error:
                error_msgs.append(f"{prefix}_extra_state: {error}")
                return
            if stage == "hard":
                self.make_weight_computed_()
            if (stage, bits) != (self.stage, self.bits):
                self._restage(stage, bits)
        leaf = self._parameters.pop("weight", None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if leaf is not None:
            self._parameters["weight"] = leaf
            self.refresh_weight_()

    def extra_repr(self) -> str:
        bits = ",".join(map(str, self.bits)) or "none"
        return f"{super().extra_repr()}, n_bits={self.n_bits}, stage={self.stage}, bits={bits}"


def _moved(name: str, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn`` of a tensor of a CSQ layer, of that name, within what ``CSQLayer._apply`` allows."""
    if name == "bit_logits":
        # One axis is an image to nobody.
        return fn(tensor).contiguous() if is_sharded(tensor) else fn(tensor.reshape(-1)).view(tensor.shape)
    moved = fn(tensor)
    dtype = tensor.dtype if name == "codes" else torch.promote_types(moved.dtype, torch.float32)
    return moved if moved.dtype == dtype else tensor.to(moved.device, dtype)
