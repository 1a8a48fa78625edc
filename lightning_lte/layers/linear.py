"""nn.Linear and its plain subclasses.

Factored, y_h = W x_h + s * (B_h A_h - B'_h A'_h) x_h + b_h for the slice x_h of head h. Thin layers are not factored:
they have a weight for each head, y_h = W_h x_h + b_h.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lightning_lte.layers.base import HeadedLayer, slices, state_of


class HeadedLinear(HeadedLayer):
    """A linear layer with heads."""

    def forward(self, input: Tensor) -> Tensor:
        state = state_of(self)
        switch, factors = state.switch, state.factors
        if switch.position is None or (factors is None and switch.position != "all"):
            return super().forward(input)
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if switch.position != "all":
            assert factors is not None
            base = functional.linear(input, factors.weight.detach(), bias)
            return factors.apply_one(base, input, switch.position)
        x = slices(self, input, switch.count)
        if "bias" in state.stacks:
            bias = None
        if factors is not None:
            y = factors.apply(functional.linear(x, factors.weight.detach(), bias), x)
        elif "weight" in state.stacks:
            y = x @ state.stacks["weight"].mT
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            y = functional.linear(x, self.weight, bias)  # type: ignore[arg-type]
        if "bias" in state.stacks:
            # Under autocast y has fewer bits than the bias, and must not be widened by it.
            y = y + state.stacks["bias"].unsqueeze(1).to(y.dtype)
        return y.reshape(*input.shape[:-1], -1)


def can_be_headed(layer: nn.Module) -> bool:
    """Whether a layer is nn.Linear or a plain subclass: one that computes as nn.Linear does."""
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and "forward" not in layer.__dict__
        and layer._parameters.get("weight") is not None
    )
