"""nn.LayerNorm with an affine part for each head: y_h = w_h * normalised(x_h) + b_h."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.layers.base import HeadedLayer, slices, state_of


class HeadedLayerNorm(HeadedLayer):
    """A layer norm whose weight and bias are replicas, one for each local head."""

    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        state = state_of(self)
        if state.switch.position != "all":
            return super().forward(input)
        count = state.switch.count
        x = functional.layer_norm(input, self.normalized_shape, None, None, self.eps).flatten(
            -len(self.normalized_shape)
        )
        y = slices(self, x, count)
        for name, combine in (("weight", Tensor.mul), ("bias", Tensor.add)):
            own: Tensor | None = getattr(self, name)
            if name in state.stacks:
                own = state.stacks[name].flatten(1).unsqueeze(1)
            elif own is not None:
                own = own.flatten()
            y = y if own is None else combine(y, own)
        return y.reshape(input.shape)


def can_be_headed(layer: nn.Module) -> bool:
    """Whether a layer is nn.LayerNorm or a plain subclass of it, with something to train."""
    return (
        isinstance(layer, nn.LayerNorm)
        and type(layer).forward is nn.LayerNorm.forward
        and "forward" not in layer.__dict__
        and layer._parameters.get("weight") is not None
    )
