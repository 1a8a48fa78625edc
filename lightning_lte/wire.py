"""How numbers travel: in as many bits as they are computed with, or in fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Wire = Literal["float32", "bfloat16", "int8"]
# Users may give these for the long names.
ShortDtype = Literal["fp32", "bf16"]
# What a merge sends for a weight: its dense mean delta, the factors of all heads, or whichever is fewer bytes.
PayloadKind = Literal["auto", "dense", "factors"]

# Bytes of the scale that goes with each row of int8 numbers.
_SCALE_BYTES = 4


def encoded_bytes(shape: Sequence[int], wire: Wire) -> int:
    """Bytes of a tensor on the wire, whose rows run along its last dimension."""
    numbers = math.prod(shape)
    if wire == "float32":
        return 4 * numbers
    if wire == "bfloat16":
        return 2 * numbers
    return numbers + _SCALE_BYTES * (numbers // shape[-1] if shape and numbers else numbers)


def encode(tensors: Sequence[Tensor], wire: Wire) -> Tensor:
    """Tensors as bytes, one after the other.

    Args:
        tensors: floating point.
        wire: "float32" and "bfloat16" round to these; "int8" rounds each row, along the last dimension, to 255 steps
            from minus its largest magnitude to plus that, and sends this as float32.

    Returns:
        (bytes,) uint8; see `encoded_bytes`.
    """
    codes = [code for tensor in tensors for code in _encode(tensor.detach(), wire)]
    if codes:
        return torch.cat(codes)
    return torch.empty(0, dtype=torch.uint8, device=tensors[0].device if tensors else None)


def decode(data: Tensor, shapes: Sequence[torch.Size], wire: Wire) -> list[Tensor]:
    """The inverse of `encode`, in float32."""
    tensors, start = [], 0
    for shape in shapes:
        end = start + encoded_bytes(shape, wire)
        tensors.append(_decode(data[start:end], shape, wire))
        start = end
    return tensors


def _encode(tensor: Tensor, wire: Wire) -> list[Tensor]:
    if wire != "int8":
        dtype = torch.float32 if wire == "float32" else torch.bfloat16
        return [tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8)]
    rows = tensor.float().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    if not rows.numel():
        return []
    scale = rows.abs().amax(1) / 127
    steps = (rows / scale.where(scale > 0, 1).unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return [steps.reshape(-1).view(torch.uint8), scale.view(torch.uint8)]


def _decode(data: Tensor, shape: torch.Size, wire: Wire) -> Tensor:
    if wire != "int8":
        dtype = torch.float32 if wire == "float32" else torch.bfloat16
        # A copy begins at an address that suits the type.
        return data.clone().view(dtype).float().reshape(shape)
    numbers = shape.numel()
    if not numbers:
        return torch.zeros(shape, dtype=torch.float32, device=data.device)
    steps = data[:numbers].view(torch.int8).reshape(-1, shape[-1] if shape else 1)
    scale = data[numbers:].clone().view(torch.float32)
    return (steps * scale.unsqueeze(1)).reshape(shape)
