"""``prepare_`` swaps the layers of a model in place and says what it did; ``param_groups`` serves optimizers."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from csq_kernels.nn.layer import OPTIONS, Config, CSQLayer
from csq_kernels.nn.layers import CSQ_CLASSES
from csq_kernels.step import NARROW, momentum_scale_shape


@dataclass
class Plan:
    """What ``prepare_`` did. ``print(plan)`` shows it.

    Attributes:
        swapped: ``{layer name: weights}``.
        skipped: ``{layer name: reason}``, for every layer with a weight of two or more axes that stayed float.
        tied: ``{layer name: name of the layer whose parameters it shares}``.
        bytes_float: training state of the swapped weights as floats: weight, gradient, momentum.
        bytes_csq: the same for their logits with ``torch.optim``, and the weight and its gradient.
        bytes_single_pass: with ``csq_kernels.optim``: weight and gradient, logits and momentum.
        bytes_narrow: that with ``narrow=True``.
    """

    swapped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    bytes_float: int = 0
    bytes_csq: int = 0
    bytes_single_pass: int = 0
    bytes_narrow: int = 0

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} layers swapped, {sum(self.swapped.values()):,} weights"]
        lines += [f"  {name}: {weights:,} weights" for name, weights in self.swapped.items()]
        lines += [f"  {name}: tied to {leader}" for name, leader in self.tied.items()]
        lines += [f"  {name}: stays float ({reason})" for name, reason in self.skipped.items()]
        states = {
            "csq_kernels.optim": self.bytes_single_pass,
            "narrow": self.bytes_narrow,
            "torch.optim": self.bytes_csq,
            "float": self.bytes_float,
        }
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in states.items())
        lines += [f"training state with SGD and momentum, without activations: {sizes}"]
        return "\n".join(lines)

    def _add(self, name: str, weight: Tensor, n_bits: int) -> None:
        logits = torch.empty((2, n_bits, *weight.shape), dtype=weight.dtype, device="meta")
        momentum = logits.numel() * torch.promote_types(logits.dtype, torch.float32).itemsize
        own = torch.bfloat16 if logits.dtype == torch.float32 else logits.dtype
        narrow = logits.numel() * (own.itemsize + NARROW.itemsize) + 4 * math.prod(momentum_scale_shape(logits))
        pair = 2 * weight.nbytes
        self.swapped[name] = weight.numel()
        self.bytes_float += pair + weight.nbytes
        self.bytes_csq += pair + 3 * logits.nbytes
        self.bytes_single_pass += pair + logits.nbytes + momentum
        self.bytes_narrow += pair + narrow


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def rule_for(config: Config, name: str) -> tuple[str | None, Config | None]:
    """Return the pattern that decides for ``name``, and its configuration: ``None`` for a layer that stays float."""
    for pattern, options in config.rules.items():
        if _matches(pattern, name):
            return pattern, None if options is None else dataclasses.replace(config, **options, rules={})
    return None, config


def _check_rules(model: nn.Module, config: Config) -> None:
    names = [name for name, module in model.named_modules() if type(module) in CSQ_CLASSES]
    for pattern, options in config.rules.items():
        unknown = sorted(set(options or ()) - set(OPTIONS))
        if unknown:
            raise ValueError(f"expected rule {pattern!r} with options of Config, got {', '.join(unknown)}")
        try:
            matched = any(_matches(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"expected rule {pattern!r} to be a regular expression, got {error}") from None
        if not matched:
            raise ValueError(
                f"expected rule {pattern!r} to match a layer, got none of {', '.join(names) or 'no layers'}"
            )


def _check_ties(model: nn.Module, chosen: list[tuple[str, nn.Module, Config]]) -> None:
    """A weight that a swapped and a float layer share would silently fall apart in two."""
    swapped = {id(module._parameters["weight"]): name for name, module, _ in chosen}
    modules = {id(module) for _, module, _ in chosen}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) in swapped and id(module) not in modules:
                raise ValueError(
                    f"expected tied layers {swapped[id(parameter)]} and {name} to be both swapped or both left float, "
                    f"got {name} left float"
                )


def _check_unwrapped(model: nn.Module) -> None:
    """A wrapper has noted the parameters that it found, and would go on synchronizing those."""
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
                raise ValueError(
                    f"expected a model to prepare before it is wrapped, got {kind.__name__} at {name or 'its root'}"
                )


def prepare_(
    model: nn.Module, config: Config | None = None, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> Plan:
    """Turn the Linear, Conv1d/2d/3d, ConvTranspose2d and Embedding layers of ``model`` into CSQ layers, in place.

    Layers keep their identity: hooks, references, ``requires_grad``, training mode and tied weights survive. Do it
    after loading float weights and before building the optimizer or wrapping in DDP.

    Args:
        model: any module.
        config: how; default ``Config()``.
        filter_fn: ``filter_fn(module, name)`` returns False for layers that stay float.

    Returns:
        The plan: what was swapped, skipped and tied, with a memory estimate.

    Raises:
        ValueError: a rule matches no layer, an option is unknown, or nothing is left to swap.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = prepare_(model, Config(n_bits=4, rules={"2": None}))
        >>> sorted(plan.swapped), plan.skipped
        (['0'], {'2': "rule '2'"})
    """
    config = Config() if config is None else config
    _check_unwrapped(model)
    _check_rules(model, config)
    chosen: list[tuple[str, nn.Module, Config]] = []
    plan = Plan()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, CSQLayer):
            plan.skipped[name] = "already a CSQ layer"
        elif type(module) in CSQ_CLASSES:
            pattern, layer_config = rule_for(config, name)
            if weight is None:
                plan.skipped[name] = "its weight is not a parameter"
            elif layer_config is None:
                plan.skipped[name] = f"rule {pattern!r}"
            elif filter_fn is not None and not filter_fn(module, name):
                plan.skipped[name] = "filter_fn"
            else:
                chosen.append((name, module, layer_config))
        elif weight is not None and weight.ndim > 1:
            plan.skipped[name] = f"{type(module).__name__} is not supported"
    if not chosen:
        raise ValueError(f"expected model with a layer to swap, got none; skipped: {plan.skipped or 'nothing'}")
    for _, module, _ in chosen:
        CSQ_CLASSES[type(module)].check_convertible(module)
    _check_ties(model, chosen)

    leaders: dict[int, tuple[str, CSQLayer]] = {}
    for name, module, layer_config in chosen:
        weight = module._parameters["weight"]
        assert weight is not None
        leader = leaders.get(id(weight))
        module.__class__ = CSQ_CLASSES[type(module)]
        assert isinstance(module, CSQLayer)
        if leader is None:
            module._adopt(layer_config)
            leaders[id(weight)] = (name, module)
            plan._add(name, weight, layer_config.n_bits)
        else:
            # The leader's planes serve both, so its options do too.
            module._adopt(dataclasses.replace(layer_config, **leader[1].shared_options()), tied_to=leader[1])
            plan.tied[name] = leader[0]
    return plan


def csq_layers(model: nn.Module) -> dict[str, CSQLayer]:
    """``{name: layer}`` of the CSQ layers of a model, without those that share another's parameters."""
    seen: set[int] = set()
    layers: dict[str, CSQLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, CSQLayer) and id(module.bit_logits) not in seen:
            seen.add(id(module.bit_logits))
            layers[name] = module
    return layers


def followers(model: nn.Module, leader: CSQLayer) -> list[CSQLayer]:
    """The CSQ layers of ``model`` that share the parameters of ``leader``."""
    return [
        module
        for module in model.modules()
        if isinstance(module, CSQLayer) and module is not leader and module.bit_logits is leader.bit_logits
    ]


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    logit_lr: float | None = None,
    gate_lr: float | None = None,
    scale_lr: float | None = None,
) -> list[dict]:
    """Parameter groups for a torch optimizer: no decay on logits, gates, scales, biases and norms.

    Decay would pull logits to 0, the undecided point. For that of the weight they make, add ``weight_decay *
    layer.decay_term()`` of each layer to the loss; ``csq_kernels.optim.SGD`` does as much by itself. A learning rate
    that is not given is ``lr``; with Adam, 10 times that for logits and 20 times for gates is a good start, because
    they move on a scale of 1. Empty groups are left out; each group carries its ``name``.

    Example:
        >>> from torch import nn, optim
        >>> model = nn.Sequential(nn.Linear(4, 2)); _ = prepare_(model)
        >>> optimizer = optim.SGD(param_groups(model, lr=0.1, weight_decay=1e-4, gate_lr=0.05), lr=0.1)
        >>> [group["name"] for group in optimizer.param_groups]
        ['no_decay', 'bit_logits', 'gate_logits', 'scale']
    """
    rates = {"decay": lr, "no_decay": lr, "bit_logits": logit_lr, "gate_logits": gate_lr, "scale": scale_lr}
    groups: dict[str, list[Tensor]] = {name: [] for name in rates}
    trained: set[int] = set()
    for layer in csq_layers(model).values():
        for name, tensor in layer.trained_tensors().items():
            groups[name].append(tensor)
            trained.add(id(tensor))
    for parameter in model.parameters():
        if id(parameter) not in trained:
            groups["decay" if parameter.ndim > 1 else "no_decay"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr if rates[name] is None else rates[name],
            "weight_decay": weight_decay if name == "decay" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]
