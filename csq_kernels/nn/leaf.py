"""The single-pass mode of a CSQ layer: ``weight`` is the leaf that autograd sees, and what makes it is state beside it.

Under ``fully_shard`` the weight is a DTensor, split along its first axis; the logits are then split alike along their
third one and never gathered, while gates, scale and temperature are the same everywhere.
"""

from typing import Any

import torch
from torch import Tensor, nn

PARAMETERS = ("bit_logits", "gate_logits", "scale")
# Weights that are reconstructed at a time where the logits have to be widened for it.
_WIDENED_WEIGHTS = 1 << 20


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; looked up by name, since importing its package takes longer than all of ours."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


class LeafWeight(nn.Module):
    """What ``CSQLayer`` can do for ``csq_kernels.optim``."""

    bit_logits: nn.Parameter
    gate_logits: nn.Parameter
    scale: nn.Parameter
    temperature: Tensor
    stage: str
    channel_axis: int
    # Versions of the tensors that made the leaf; None: nobody has to look.
    _made_of: tuple[int, ...] | None = None

    def _reconstruct(self, bit_logits: Tensor, gate_logits: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _in_format(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def weight_is_leaf(self) -> bool:
        """Whether the layer is in the single-pass mode, where ``weight`` is the parameter."""
        return self.stage != "float" and self._parameters.get("weight") is not None

    @property
    def leaf(self) -> nn.Parameter:
        """The parameter ``weight`` of the single-pass mode, as it is."""
        leaf = self._parameters["weight"]
        assert leaf is not None
        return leaf

    @property
    def dtype(self) -> torch.dtype:
        """Of ``weight``; in the single-pass mode the logits may be narrower."""
        return self.leaf.dtype if self.weight_is_leaf else self.bit_logits.dtype

    def trained_tensors(self) -> dict[str, Tensor]:
        """What an optimizer steps, by the name of its parameter group; ``bit_logits`` by way of the leaf if there is
        one.
        """
        logits = self.leaf if self.weight_is_leaf else self.bit_logits
        return {"bit_logits": logits, "gate_logits": self.gate_logits, "scale": self.scale}

    @torch.no_grad()
    def make_weight_leaf_(self, leader: "LeafWeight | None" = None) -> None:
        """Enter the single-pass mode: ``weight`` becomes the parameter, that of ``leader`` if it shares its planes.

        Raises:
            RuntimeError: the layer is hard.
        """
        if self.stage == "hard":
            raise RuntimeError("expected a layer in the search or finetune stage, got one in the hard stage")
        if self.weight_is_leaf:
            return
        if leader is None:
            weight = self._in_format(self._reconstruct(self.bit_logits, self.gate_logits, self.scale))
            leaf = nn.Parameter(weight, requires_grad=self.bit_logits.requires_grad)
        else:
            leaf = leader.leaf
        for name in PARAMETERS:
            self._buffers[name] = self._parameters.pop(name)
        self.bit_logits.requires_grad_(False)
        self.bit_logits.grad = None
        self._parameters["weight"] = leaf
        self._made_of = self._versions() if leader is None else None

    @torch.no_grad()
    def make_weight_computed_(self) -> None:
        """Leave the single-pass mode: logits, gates and scale are the parameters again.

        Raises:
            RuntimeError: the weight was written from outside, or the layer is sharded.
        """
        if not self.weight_is_leaf:
            return
        if is_sharded(self.leaf):
            raise RuntimeError(
                "expected a layer in one piece, got a sharded one: load its state into an unwrapped model"
            )
        self._check_weight()
        leaf = self.leaf
        if self.bit_logits.dtype != leaf.dtype:
            self.bit_logits.data = self.bit_logits.data.to(leaf.dtype)
        del self._parameters["weight"]
        self._make_parameters()
        self.bit_logits.requires_grad_(leaf.requires_grad)

    def _make_parameters(self) -> None:
        for name in PARAMETERS:
            tensor = self._buffers.pop(name)
            assert isinstance(tensor, nn.Parameter)
            self._parameters[name] = tensor

    def _check_weight(self) -> None:
        """Whoever wrote the weight from outside should hear that the bits know nothing of it."""
        if self.is_stale():
            self.refresh_weight_()
        difference = (self.leaf - self._computed_weight()).abs()
        distance = difference.max().item() if difference.numel() else 0.0
        if distance > 1e-3 * self.scale.abs().max().item():
            raise RuntimeError(
                f"expected the weight that bit_logits make, got one that differs by {distance:.3g}: "
                "set_weight_ encodes a weight, and AveragedModel needs use_buffers=True"
            )

    def shard_(self) -> None:
        """Split the logits as ``fully_shard`` has split the weight, if it has.

        Raises:
            ValueError: the weight is split along another axis than the first.
        """
        if not is_sharded(self.leaf) or is_sharded(self.bit_logits):
            return
        placements = self.leaf.placements  # type: ignore[attr-defined]
        if any(placement.is_shard() and placement.dim != 0 for placement in placements):
            raise ValueError(f"expected a weight sharded along axis 0, got {placements}")
        self._set_bit_logits(self.bit_logits.detach()[:, :, self.own_rows()].clone())

    def _set_bit_logits(self, own: Tensor) -> None:
        """Let these be the logits of the rows that this process holds."""
        from torch.distributed.tensor import DTensor, Shard

        leaf: Any = self.leaf
        placements = [Shard(2) if placement.is_shard() else placement for placement in leaf.placements]
        shape = torch.Size((*own.shape[:2], *leaf.shape))
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(own, leaf.device_mesh, placements, run_check=False, shape=shape, stride=stride)
        self._buffers["bit_logits"] = nn.Parameter(whole, requires_grad=False)

    def own_rows(self) -> slice:
        """The rows of the weight, along its first axis, that this process holds."""
        leaf: Any = self._parameters.get("weight")
        if leaf is None or not is_sharded(leaf):
            return slice(None)
        axis = next(i for i, placement in enumerate(leaf.placements) if placement.is_shard())
        # As torch.chunk cuts.
        rows = -(-leaf.shape[0] // leaf.device_mesh.size(axis))
        first = min(rows * leaf.device_mesh.get_local_rank(axis), leaf.shape[0])
        return slice(first, min(first + rows, leaf.shape[0]))

    def own_gates(self, gates: Tensor) -> Tensor:
        """The part of ``(k,)`` or ``(k, C)`` that belongs to ``own_rows``: a view."""
        return gates[:, self.own_rows()] if gates.ndim == 2 and self.channel_axis == 0 else gates

    def own_scale(self, scale: Tensor) -> Tensor:
        """The part of ``()`` or ``(C,)`` that belongs to ``own_rows``: a view."""
        return scale[self.own_rows()] if scale.ndim == 1 and self.channel_axis == 0 else scale

    def own_bit_logits(self) -> Tensor:
        """The logits of ``own_rows``."""
        return local(self.bit_logits.detach())

    @torch.no_grad()
    def whole_weight(self) -> Tensor:
        """The present weight; gathered if it is sharded."""
        layer: Any = self
        weight = layer.weight.detach()
        return weight.full_tensor() if is_sharded(weight) else weight

    def _computed_weight(self) -> Tensor:
        """Equation (3) for ``own_rows``, in the dtype of the leaf."""
        logits = self.own_bit_logits()
        gates, scale = self.own_gates(self.gate_logits.detach()), self.own_scale(self.scale.detach())
        if logits.dtype == self.dtype or logits.numel() == 0:
            return self._reconstruct(logits, gates, scale).to(self.dtype)
        rows = max(1, _WIDENED_WEIGHTS // max(1, logits[0, 0, 0].numel()))
        by_row = self.channel_axis == 0
        parts = []
        for first in range(0, logits.shape[2], rows):
            part = slice(first, first + rows)
            part_gates = gates[:, part] if by_row and gates.ndim == 2 else gates
            part_scale = scale[part] if by_row and scale.ndim == 1 else scale
            parts.append(self._reconstruct(logits[:, :, part].to(self.dtype), part_gates, part_scale))
        return torch.cat(parts)

    @torch.no_grad()
    def refresh_weight_(self) -> None:
        """Compute the leaf again from the tensors that make it."""
        local(self.leaf.detach()).copy_(self._computed_weight())
        self.mark_fresh_()

    def mark_fresh_(self) -> None:
        """Note that the leaf is what its tensors make of it."""
        self._made_of = self._versions()

    def is_stale(self) -> bool:
        """Whether a tensor that makes the leaf was changed since it was made."""
        return self.weight_is_leaf and self._made_of is not None and self._made_of != self._versions()

    def __getstate__(self) -> dict[str, Any]:
        """A copy counts versions of its own: it is told whether its leaf is fresh."""
        return self.__dict__ | {"_made_of": None if self._made_of is None else not self.is_stale()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._made_of is not None:
            self._made_of = self._versions() if self._made_of else ()

    def is_gathered(self) -> bool:
        """Whether ``fully_shard`` has put the whole weight in place of its shard, for a pass of its own."""
        return is_sharded(self.bit_logits) and not is_sharded(self.leaf)

    def _versions(self) -> tuple[int, ...] | None:
        made_of = (local(self.bit_logits.detach()), self.gate_logits, self.scale, self.temperature)
        return None if any(tensor.is_inference() for tensor in made_of) else tuple(t._version for t in made_of)
