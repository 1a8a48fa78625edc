"""Gradients of local heads that share a device: their size, and their norms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from lightning_lte.shards import local
from lightning_lte.transport import Transport


def scale_gradient(param: nn.Parameter, factor: Callable[[], int]) -> None:
    """Multiply every gradient that reaches `param` by what `factor` returns then; see `product.scaled_gradient`."""

    def scaled(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient * factor()  # None from functions that stop gradients

    param.register_hook(scaled)


@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[nn.Parameter],
    per_head: Collection[nn.Parameter],
    max_norm: float,
    count: int,
    transport: Transport,
    *,
    acting: int | None,
    synchronised: bool,
) -> Tensor:
    """Clip the gradients of each local head by that head's own norm, as separate workers would.

    Args:
        params: what an optimizer holds.
        per_head: those of them whose dimension 0 is the heads; the others are shared by all local heads. A shared
            parameter counts in every head's norm and is scaled by the mean of the heads' coefficients, or by that of
            the head that acts alone.
        max_norm: largest 2-norm of a head's gradient.
        count: n, local heads.
        transport: to the other devices.
        acting: the local head whose turn it is: all gradients are its own then, and other heads' rows are zero. None
            where they are those of all heads.
        synchronised: whether shared gradients are equal on all devices and have to stay so, which takes the mean of
            the coefficients over all devices.

    Returns:
        (n,), each head's norm before.
    """
    params = list(params)
    if not params:
        return torch.zeros(count)
    own: list[Tensor] = []
    shared: list[Tensor] = []
    for param in params:
        if param.grad is not None:
            (own if param in per_head else shared).append(local(param.grad))
    # A device on which nothing has a gradient takes part in the sums below, too.
    wide = torch.promote_types(torch.float32, params[0].dtype.to_real())
    of_each = [torch.zeros(count, dtype=wide, device=params[0].device)]
    of_each += [torch.linalg.vector_norm(gradient.reshape(count, -1), dim=1).to(of_each[0]) for gradient in own]
    of_each += [torch.linalg.vector_norm(gradient).to(of_each[0]).expand(count) for gradient in shared]
    # One operation for all, and not two for each: a GPU has them faster than the host can ask for them.
    squared = torch.stack(of_each).square().sum(0)
    transport.sum_within_([squared])
    norms = squared.sqrt()
    # As torch.nn.utils.clip_grad_norm_ does, the small number included.
    coefficients = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in own:
        gradient.mul_(coefficients.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
    common = coefficients.mean() if acting is None else coefficients[acting].clone()
    if synchronised:
        transport.sum_([common])
        common /= transport.world_size
    for gradient in shared:
        gradient.mul_(common.to(gradient.dtype))
    return norms
