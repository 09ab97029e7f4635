"""The single-pass training step: optimizers that read ``dL/dW`` and write the logits and the next weight.

All bit gradients (4) are ``dL/dW`` times known factors, so they never exist in memory. In this mode a CSQ layer's
``weight`` is the leaf that autograd sees, and the logits are state beside it. Each ``step()``

1. sums (5) and (6) over ``dL/dW`` into the gradients of gates and scale;
2. lets the stock optimizer step these and all ordinary parameters;
3. lets an attached ``Search`` raise the temperature, so that the next weight is the one the next forward pass needs;
4. moves the logits by the same rule and makes the next weight, in one pass.

The results equal those of ``torch.optim`` on the logits themselves, up to rounding. What differs:

- ``clip_grad_norm_`` sees ``dL/dW``, one number a weight, in place of the bit gradients;
- ``step()`` uses up the gradients of gates and scales, which no longer belong to ``model.parameters()``;
- ``AveragedModel`` needs ``use_buffers=True``: the average is taken over the logits;
- a weight written by hand is not a set of bits: use ``layer.set_weight_``;
- ``SGD`` and ``Adam`` decay the weight that the bits make, as they do that of a float layer: ``weight_decay * W`` is
  added to ``dL/dW``, and moves the bits by (4). Gates and scales do not see it: behind a norm, where the size of a
  weight means nothing, it would close the top planes first. With logits as parameters, add
  ``weight_decay * layer.decay_term()`` of each layer to the loss for the same. It takes a copy of the gradients for as
  long as the step lasts.

Between processes only ``dL/dW`` travels, by ``DistributedDataParallel`` or ``fully_shard``. The former finds the logits
of rank 0 everywhere once the optimizer is built from the wrapped model. Under the latter each process holds and steps
the logits of its rows; the sums of all layers are added up in one ``all_reduce`` a step.
"""

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from csq_kernels import backends
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.leaf import PARAMETERS, is_sharded, local
from csq_kernels.nn.prepare import csq_layers, followers, param_groups
from csq_kernels.step import LOGIT_DTYPES, NARROW, Rule, StepLayer, Vectors, check_step, mix, momentum_scale_shape

# Which optimizer steps a layer; neither keeps the other alive.
_owners: "weakref.WeakKeyDictionary[CSQLayer, weakref.ref[SinglePassOptimizer]]" = weakref.WeakKeyDictionary()


def single_pass_(model: nn.Module) -> None:
    """Make ``weight`` the leaf of every CSQ layer that is not hard, and logits, gates and scale state beside it.

    The optimizers of this module do it too; call it yourself before ``DistributedDataParallel`` or ``fully_shard``, and
    build the optimizer after: they must find the parameters that will be trained.

    Raises:
        ValueError: the model has no such layer, or a torch optimizer already holds its logits.
        TypeError: logits of a dtype that cannot be stepped.

    Example:
        >>> from csq_kernels import prepare_
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> _ = prepare_(model)
        >>> single_pass_(model)
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight']
    """
    layers = {name: layer for name, layer in csq_layers(model).items() if layer.stage != "hard"}
    if not layers:
        raise ValueError("expected model with a CSQ layer that is not hard, got none: prepare_ makes them")
    for name, layer in layers.items():
        if is_sharded(layer.bit_logits) and not layer.weight_is_leaf:
            raise ValueError(f"expected single_pass_ before fully_shard, got {name} with sharded bit_logits")
        if layer.bit_logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"expected {name}.bit_logits of float32, bfloat16 or float64, got {layer.bit_logits.dtype}")
    _check_unowned({name: layer for name, layer in layers.items() if not layer.weight_is_leaf})
    for layer in layers.values():
        tied = followers(model, layer)
        layer.make_weight_leaf_()
        for follower in tied:
            follower.make_weight_leaf_(layer)
    # Every process steps the same state; sent again before each forward pass it would be 16 times the weight.
    state = [
        f"{name}.{tensor}".lstrip(".")
        for name, layer in model.named_modules()
        if isinstance(layer, CSQLayer)
        for tensor in (*PARAMETERS, "temperature")
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, state)


def _send_state(model: DistributedDataParallel) -> None:
    """Rank 0's logits, gates, scales and temperatures to all, as the wrapper has sent the weights."""
    group = model.process_group
    source = torch.distributed.get_global_rank(group, 0)
    for layer in csq_layers(model).values():
        for tensor in (layer.bit_logits, layer.gate_logits, layer.scale, layer.temperature):
            torch.distributed.broadcast(tensor.detach(), source, group)
        if layer.weight_is_leaf:
            layer.refresh_weight_()


def _check_unowned(layers: dict[str, CSQLayer]) -> None:
    """A torch optimizer that holds the logits would go on without ever seeing a gradient."""
    logits = {id(layer.bit_logits): name for name, layer in layers.items()}
    for optimizer in [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]:
        for group in getattr(optimizer, "param_groups", ()):  # not there yet in one that is being made
            for tensor in group["params"]:
                if id(tensor) in logits:
                    raise ValueError(
                        f"expected {logits[id(tensor)]}.bit_logits in no other optimizer, got it in a torch.optim."
                        f"{type(optimizer).__name__}: delete that one first"
                    )


def _decayed(step: StepLayer, group: dict[str, Any]) -> StepLayer:
    """The step with the decay of the weight in its gradient."""
    decay = group["weight_decay"]
    if decay == 0:
        return step
    # The rule turns the gradient around where the loss is to grow, but the weight is to shrink all the same.
    alpha = -decay if group["maximize"] else decay
    return replace(step, grad_weight=step.grad_weight.add(step.weight, alpha=alpha))


class SinglePassOptimizer(torch.optim.Optimizer):
    """What the optimizers here share; see the module."""

    # Whether ``weight_decay`` is also that of weights that bits make.
    decays_bits: ClassVar[bool] = True
    _momenta: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        stock: type[torch.optim.Optimizer],
        rates: dict[str, float | None],
        narrow: bool,
        seed: int,
    ):
        self._stock = stock([torch.zeros(())], **defaults)
        if not isinstance(model, DistributedDataParallel):
            single_pass_(model)
        elif any(layer.stage != "hard" and not layer.weight_is_leaf for layer in csq_layers(model).values()):
            raise ValueError(
                "expected a model that single_pass_ was called on before DistributedDataParallel, got another"
            )
        self._layers: dict[Tensor, CSQLayer] = {}
        for name, layer in csq_layers(model).items():
            if not layer.weight_is_leaf:
                continue
            owner = _owners.get(layer, lambda: None)()
            if owner is not None:
                raise ValueError(f"expected {name} in one optimizer, got it in another {type(owner).__name__} already")
            tied = followers(model, layer)
            if narrow and layer.bit_logits.dtype == torch.float32:
                layer.bit_logits.data = layer.bit_logits.data.to(torch.bfloat16)
                layer.refresh_weight_()
            layer.shard_()
            for follower in tied:
                follower.follow_(layer)
            self._layers[layer.leaf] = layer
        for layer in self._layers.values():
            _owners[layer] = weakref.ref(self)
        self._narrow, self._seed = narrow, seed
        # Called in every step between that of gates and scales and that of the logits.
        self.before_weights: Callable[[], None] | None = None
        if isinstance(model, DistributedDataParallel):
            _send_state(model)
        lr, weight_decay = defaults["lr"], defaults["weight_decay"]
        super().__init__(param_groups(model, lr, weight_decay, **rates), self._stock.defaults)
        for group in self.param_groups:
            if group["name"] == "bit_logits" and self.decays_bits:
                group["weight_decay"] = weight_decay

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter, gate, scale and logit whose gradient is there; the others keep their state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = [
            (weight, group, self._begin(weight, group, index))
            for group in self.param_groups
            for index, weight in enumerate(group["params"])
            if weight in self._layers and weight.grad is not None
        ]
        for _, _, step in steps:
            check_step(step)
        self._add_sums([(self._layers[weight], step) for weight, _, step in steps])
        self._step_stock()
        if self.before_weights is not None:
            self.before_weights()
        by_device: dict[str, list[StepLayer]] = {}
        for weight, group, step in steps:
            if step.weight.numel():
                by_device.setdefault(weight.device.type, []).append(_decayed(step, group))
        for device, layers in by_device.items():
            backends.step_function("step_update", device)(layers)
        self._finish({weight for weight, _, _ in steps})
        return loss

    @torch.no_grad()
    def init_state_(self) -> None:
        """Make, of zeros, all state that steps make: what ``torch.distributed.checkpoint`` loads into."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor in self._layers:
                    self._init_state(tensor, group)
        tensors = [t for group in self.param_groups for t in group["params"] if t not in self._layers]
        grads = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
        self._step_stock()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad

    def _init_state(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            for name in self._momenta if self._needs_momenta(group) else ():
                self._init_momentum(state, name, self._layers[weight].bit_logits)

    def _begin(self, weight: Tensor, group: dict[str, Any], index: int) -> StepLayer:
        assert weight.grad is not None
        layer = self._layers[weight]
        self._init_state(weight, group)
        state = self.state[weight]
        state["step"] += 1
        gates, scale = layer.own_gates(layer.gate_logits.detach()), layer.own_scale(layer.scale.detach())
        after = Vectors(gates, scale, layer.temperature)
        names = [name for name in self._momenta if name in state]
        return StepLayer(
            weight=local(weight.detach()),
            grad_weight=local(weight.grad).resolve_neg(),
            bit_logits=layer.own_bit_logits(),
            before=Vectors(gates.clone(), scale.clone(), layer.gradient_temperature.clone()),
            after=after,
            bits=layer.bits,
            n_bits=layer.n_bits,
            channel_axis=layer.channel_axis,
            hard_gates=layer.stage == "finetune",
            rule=self._rule(group, state["step"]),
            momenta=tuple(local(state[name]) for name in names),
            momentum_scales=tuple(state[name + "_scales"] for name in names if name + "_scales" in state),
            key=mix(self._seed, state["step"], index),
        )

    def _needs_momenta(self, group: dict[str, Any]) -> bool:
        return True

    def _init_momentum(self, state: dict[str, Any], name: str, logits: Tensor) -> None:
        if self._narrow:
            # Their blocks are those of the rows that this process holds: no DTensor can be made of them.
            own = local(logits.detach())
            state[name] = torch.zeros(own.shape, dtype=NARROW, device=own.device)
            state[name + "_scales"] = torch.zeros(momentum_scale_shape(own), device=own.device)
        else:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            state[name] = torch.zeros_like(logits.detach(), dtype=dtype)

    def _add_sums(self, steps: list[tuple[CSQLayer, StepLayer]]) -> None:
        """Add (5) and (6) to what the penalty has left in the gradients of gates and scale."""
        sums: list[tuple[Tensor, Tensor]] = []
        split: list[Tensor] = []
        for layer, step in steps:
            vectors = (layer.gate_logits, layer.scale)
            if not any(vector.requires_grad for vector in vectors):
                continue
            grads = backends.step_function("step_sums", step.weight.device.type)(step)
            if is_sharded(layer.leaf):
                whole = torch.zeros_like(layer.gate_logits), torch.zeros_like(layer.scale)
                layer.own_gates(whole[0]).copy_(grads[0])
                layer.own_scale(whole[1]).copy_(grads[1])
                grads = whole
                split += whole
            sums += [(vector, grad) for vector, grad in zip(vectors, grads, strict=True) if vector.requires_grad]
        if split:
            self._reduce(split, steps)
        for vector, grad in sums:
            vector.grad = grad if vector.grad is None else vector.grad + grad

    @staticmethod
    def _reduce(sums: list[Tensor], steps: list[tuple[CSQLayer, StepLayer]]) -> None:
        """Add up, in place, what the processes have summed over their rows."""
        leaf: Any = next(layer.leaf for layer, _ in steps if is_sharded(layer.leaf))
        axis = next(i for i, placement in enumerate(leaf.placements) if placement.is_shard())
        flat = torch.cat([tensor.reshape(-1) for tensor in sums])
        torch.distributed.all_reduce(flat, group=leaf.device_mesh.get_group(axis))
        for tensor, values in zip(sums, flat.split([tensor.numel() for tensor in sums]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def _step_stock(self) -> None:
        """Everything but the logits, by the optimizer whose name this one bears."""
        for weight, layer in self._layers.items():
            if not weight.requires_grad:
                layer.gate_logits.grad = layer.scale.grad = None
        self._stock.state = self.state
        self._stock.param_groups = [
            {**group, "params": [tensor for tensor in group["params"] if tensor not in self._layers]}
            for group in self.param_groups
        ]
        self._stock.step()

    def _finish(self, stepped: set[Tensor]) -> None:
        for weight, layer in self._layers.items():
            layer.gate_logits.grad = layer.scale.grad = None
            if weight in stepped:
                # Autograd should know, as of any change in place.
                torch.autograd.graph.increment_version((local(weight), layer.own_bit_logits()))
                layer.mark_fresh_()
            elif layer.is_stale():
                layer.refresh_weight_()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"expected no copy of {type(self).__name__}, which would lose its layers: build one for the copied model "
            "and load this one's state_dict()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``; the model's state is loaded before."""
        super().load_state_dict(state_dict)
        # PyTorch has cast every state to the dtype of its parameter, which undoes narrow momenta.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for index, tensor in zip(indices, tensors, strict=True):
            if tensor in self._layers and index in state_dict["state"]:
                self.state[tensor] = {
                    name: value.to(tensor.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][index].items()
                }


class SGD(SinglePassOptimizer):
    """``torch.optim.SGD`` for a prepared model, with the single-pass step of this module.

    Args:
        model: prepared by ``prepare_``; its CSQ layers enter the mode in which ``weight`` is the leaf.
        lr, momentum, dampening, nesterov, maximize, foreach, fused: as in ``torch.optim.SGD``.
        weight_decay: as in ``torch.optim.SGD``, of all weights: those of CSQ layers by way of their bits. Logits, gates
            and scales themselves, biases and norms are never decayed.
        logit_lr, gate_lr, scale_lr: learning rates of these; default ``lr``, with which logits hardly move: 500 times
            that did well in a residual network.
        narrow: keep logits in bfloat16 with stochastic rounding and momenta in 8 bits: 56 bytes of training state a
            weight of 8 bits instead of 136.
        seed: of the stochastic rounding; with equal seeds runs are equal.

    Raises:
        ValueError: the model is not prepared, or another optimizer holds one of its layers, or a rate is out of range.
        TypeError: logits are float16.

    Example:
        >>> from csq_kernels import prepare_
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare_(model)
        >>> optimizer = SGD(model, lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    _momenta = ("momentum_buffer",)

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        logit_lr: float | None = None,
        gate_lr: float | None = None,
        scale_lr: float | None = None,
        narrow: bool = False,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": False,
        }
        rates = {"logit_lr": logit_lr, "gate_lr": gate_lr, "scale_lr": scale_lr}
        super().__init__(model, defaults, torch.optim.SGD, rates, narrow, seed)

    def _needs_momenta(self, group: dict[str, Any]) -> bool:
        return group["momentum"] != 0

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        options = (group["momentum"], group["dampening"], group["nesterov"], group["maximize"])
        return Rule.sgd(step, float(group["lr"]), *options)


class Adam(SinglePassOptimizer):
    """``torch.optim.Adam`` for a prepared model, with the single-pass step of this module.

    Args:
        model: prepared by ``prepare_``; its CSQ layers enter the mode in which ``weight`` is the leaf.
        lr, betas, eps, maximize, foreach, fused: as in ``torch.optim.Adam``.
        weight_decay: as in ``SGD``: part of the gradient.
        logit_lr, gate_lr, scale_lr, narrow, seed: as in ``SGD``.

    Raises:
        ValueError, TypeError: as ``SGD``.

    Example:
        >>> from csq_kernels import prepare_
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare_(model)
        >>> optimizer = Adam(model, lr=1e-3, logit_lr=1e-2, gate_lr=2e-2, weight_decay=1e-4)
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    _momenta = ("exp_avg", "exp_avg_sq")
    _torch_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: Iterable[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        logit_lr: float | None = None,
        gate_lr: float | None = None,
        scale_lr: float | None = None,
        narrow: bool = False,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": False,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": False,
            "differentiable": False,
        }
        rates = {"logit_lr": logit_lr, "gate_lr": gate_lr, "scale_lr": scale_lr}
        super().__init__(model, defaults, self._torch_class, rates, narrow, seed)

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        return Rule.adam(step, float(group["lr"]), group["betas"], group["eps"], group["maximize"])


class AdamW(Adam):
    """``torch.optim.AdamW`` for a prepared model, with the single-pass step of this module.

    Args:
        weight_decay: as in ``torch.optim.AdamW``, of float layers alone: it shrinks what is stepped, which of a CSQ
            layer are bits. Logits, gates, scales, biases and norms are never decayed.
        model, lr, betas, eps, options: as in ``Adam``.

    Raises:
        ValueError, TypeError: as ``SGD``.

    Example:
        >>> from csq_kernels import prepare_
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare_(model)
        >>> optimizer = AdamW(model, lr=1e-3, logit_lr=1e-2, gate_lr=2e-2)
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
    """

    decays_bits = False
    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: Iterable[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ):
        super().__init__(model, lr, betas, eps, weight_decay, **options)
