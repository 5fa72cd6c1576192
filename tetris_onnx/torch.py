"""Fine-tune a pruned model in PyTorch: the weights that a plan drops stay zero through training.

A plan found on an exported model (``tetris-onnx optimize --save-plan``) says which blocks to drop. `apply_masks` sets
the weights in them to zero in the module that the model was exported from, and keeps them there whatever the optimizer
does: each masked weight becomes ``weight * mask`` (a parametrization), whose gradient is zero where the mask is. The
mask is in the layer's own order, so nothing has to be reordered. After training, `remove_masks` leaves plain weights;
export the module as before, and ``tetris-onnx optimize --plan`` makes the same blocks of the new export.

    plan = tetris_onnx.Plan.load("plan.npz")
    apply_masks(module, plan)
    ...                                      # any training loop; DataParallel and DistributedDataParallel as usual
    remove_masks(module)
    torch.onnx.export(module, ...)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tetris_onnx.algorithms.blocks import original_mask
from tetris_onnx.errors import TetrisError
from tetris_onnx.plan import LayerPlan, Plan

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class MaskError(TetrisError, ValueError):
    """A plan that does not fit the module."""


class Mask(nn.Module):
    """The parametrization ``weight -> weight * mask``."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        # Not saved: a checkpoint of the masked module holds the weights only, and the plan is a file of its own.
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` with zeros where it is pruned."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store for an assigned ``weight``."""
        return weight * self.mask


def apply_masks(module: nn.Module, plan: Plan, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Keep the weights of ``module`` that ``plan`` drops at zero from now on. Returns {plan's layer: submodule}.

    Layers are matched by ``names`` (the plan's layer name -> the submodule's dotted name) where given, else by the name
    that PyTorch's exporter makes of the submodule's, else by shape: where the plan and the module have equally many
    layers of a shape, in order. Apply the masks after loading a checkpoint, before making the optimizer and wrapping
    the module in DataParallel or DistributedDataParallel.

    Raises `MaskError` for a layer that matches no submodule or several, and for a module that has masks already; the
    module is then unchanged.
    """
    layers: dict[str, nn.Module] = {name: child for name, child in module.named_modules() if isinstance(child, _LAYERS)}
    masked = [name for name, child in layers.items() if parametrize.is_parametrized(child, "weight")]
    if masked:
        raise MaskError(f"the weight of {masked[0]!r} is parametrized already: call remove_masks first")
    matches = _match(layers, plan, names or {})
    for layer in plan:
        child = layers[matches[layer.layer]]
        weight = _weight(child)
        mask = torch.from_numpy(original_mask(layer.keep, layer.block_size, layer.out_perm, layer.in_perm))
        shape = (*mask.shape, *[1] * (weight.dim() - 2))
        parametrize.register_parametrization(
            child, "weight", Mask(mask.reshape(shape).to(device=weight.device, dtype=weight.dtype))
        )
    return matches


def remove_masks(module: nn.Module) -> None:
    """Make the masked weights of ``module`` plain parameters again, with zeros where they are pruned."""
    for child in module.modules():
        if isinstance(child, _LAYERS) and parametrize.is_parametrized(child, "weight"):
            chain = child.parametrizations["weight"]  # type: ignore[index,union-attr,unused-ignore]
            if any(isinstance(step, Mask) for step in chain):
                parametrize.remove_parametrizations(child, "weight", leave_parametrized=True)


def _match(layers: dict[str, nn.Module], plan: Plan, names: Mapping[str, str]) -> dict[str, str]:
    unknown = [name for name in names if plan.get(name) is None]
    if unknown:
        raise MaskError(f"the plan has no layer {unknown[0]!r}; it has {_listing([p.layer for p in plan])}")
    matches: dict[str, str] = {}
    for layer in plan:
        wanted = names.get(layer.layer)
        if wanted is not None:
            if wanted not in layers:
                raise MaskError(f"the module has no convolution or linear layer {wanted!r}; it has {_listing(layers)}")
            if not _fits(layers[wanted], layer):
                raise MaskError(f"{_describe(layer)}, but the weight of {wanted!r} is {_shape(layers[wanted])}")
        else:
            wanted = _by_name(layer, layers)
        if wanted is not None:
            matches[layer.layer] = wanted
    for layer in plan:
        if layer.layer not in matches:
            matches[layer.layer] = _by_order(layer, layers, plan, matches)
    twice = [name for name in matches.values() if list(matches.values()).count(name) > 1]
    if twice:
        raise MaskError(
            f"two layers of the plan match {twice[0]!r}: say which is which with names={{layer: submodule}}"
        )
    return matches


def _by_name(layer: LayerPlan, layers: dict[str, nn.Module]) -> str | None:
    """The submodule that the layer's name tells: itself, or the scopes of PyTorch's exporter."""
    scopes = [part for part in layer.layer.removesuffix("_output_0").split("/") if part]
    path: list[str] = []
    for scope in scopes:
        # Within a Sequential the exporter repeats its name: /features/features.2/Conv_output_0
        if path and scope.startswith(f"{path[-1]}."):
            path.pop()
        path.append(scope)
    candidates = [layer.layer, ".".join(path), ".".join(path[:-1])]
    return next((name for name in candidates if name in layers and _fits(layers[name], layer)), None)


def _by_order(layer: LayerPlan, layers: dict[str, nn.Module], plan: Plan, matches: dict[str, str]) -> str:
    """The submodule at the same place among those of the same shape."""
    taken = set(matches.values())
    alike = [p.layer for p in plan if p.shape == layer.shape]
    fitting = [name for name, child in layers.items() if _fits(child, layer)]
    if len(alike) == len(fitting) and (name := fitting[alike.index(layer.layer)]) not in taken:
        return name
    free = [name for name in fitting if name not in taken]
    if not free:
        raise MaskError(f"{_describe(layer)}, but the module has no such layer left: is it the one that was exported?")
    raise MaskError(f"{_describe(layer)}, which may be {_listing(free)}: say which with names={{layer: submodule}}")


def _fits(child: nn.Module, layer: LayerPlan) -> bool:
    return _shape(child)[:2] == layer.shape


def _shape(child: nn.Module) -> tuple[int, ...]:
    return tuple(_weight(child).shape)


def _weight(child: nn.Module) -> Tensor:
    weight = child.weight
    assert isinstance(weight, Tensor)
    return weight


def _describe(layer: LayerPlan) -> str:
    return f"layer {layer.layer!r} of the plan has {layer.shape[0]} x {layer.shape[1]} channels"


def _listing(names: Mapping[str, nn.Module] | list[str]) -> str:
    some = [repr(name) for name in list(names)[:4]]
    return ", ".join(some) + (", ..." if len(names) > 4 else "")
