"""How local heads share a device: all in one forward, or in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lte.batch import Layout
from lightning_lte.explorer import Explorer
from lightning_lte.proof import reason_against_batched

# Seconds that devices wait for each other's first batch.
_FIRST_BATCH_TIMEOUT_S = 1800.0


def run(explorer: Explorer, step: Callable[[Any], Any], batch: Any) -> Any:
    """Run a step on a batch through all local heads, in the way that is right for the module; for plain loops.

    With `execution="auto"` the first batch that the heads divide shows which way that is.

    Args:
        explorer: whose heads act.
        step: takes a batch and returns the loss, or a mapping that has it under "loss".
        batch: on the device.

    Returns:
        What the step returned, or what it returned for all heads; see `combined`.
    """
    if explorer.count == 1:
        with explorer.heads():
            return step(batch)
    layout = explorer.layout = explorer.layout or Layout(batch)
    parts = layout.split(batch, explorer.count)
    even = layout.size(batch) % explorer.count == 0
    if explorer.execution == "auto" and (even or explorer.transport.world_size > 1):
        decide(explorer, step, batch, parts if even else None)
    if explorer.execution == "batched" and even:
        with explorer.heads():
            return step(batch)
    return run_in_turn(explorer, step, parts)


def decide(explorer: Explorer, step: Callable[[Any], Any], batch: Any, parts: Sequence[Any] | None) -> None:
    """Prove on a first batch that one forward may serve all local heads, or have them take turns from now on.

    Devices see different batches; where the proof fails on one of them, heads take turns on all.

    Args:
        explorer: with several local heads.
        step: the user's: takes a batch and returns the loss, or a mapping that has it under "loss".
        batch: a real one, on the device.
        parts: its slices, of one size, one for each local head; None if it has none.
    """
    if parts is None:
        reason: str | None = f"the first batch can't be split evenly over {explorer.count} heads"
    else:
        reason = reason_against_batched(
            explorer.module,
            lambda part: _loss(step(part)),
            batch,
            parts,
            explorer.all_heads,
            explorer.head,
            explorer.per_head,
        )
    verdict = "batched" if reason is None else "sequential"
    agreed = explorer.transport.agree(verdict, _FIRST_BATCH_TIMEOUT_S)
    if reason is None and agreed:
        explorer.go_batched("proved on the first batch")
    else:
        explorer.go_sequential(reason or "the proof on the first batch failed on another device")


def run_in_turn(explorer: Explorer, step: Callable[[Any], Any], parts: Sequence[Any]) -> Any:
    """Run the user's step once for each local head, on its part of the batch; see `combined` for the result."""
    if len(parts) != explorer.count:
        raise ValueError(
            f"A batch is split into one part for each of the {explorer.count} local heads; received {len(parts)} parts."
            " Return as many from split_batch(batch, heads)."
        )
    outputs = []
    for head, part in enumerate(parts):
        with explorer.head(head):
            output = step(part)
        loss = _loss(output)
        if isinstance(loss, Tensor) and loss.requires_grad:
            explorer.follow_backward(loss, head)
        outputs.append(output)
    return combined(outputs)


def combined(outputs: Sequence[Any]) -> Any:
    """One output from those of all local heads.

    The loss is their mean. Other tensors of a mapping are concatenated along dimension 0, or stacked if they are
    scalars; what else there is comes as a list. An output that can't have a loss is left to whoever asks for it.

    Raises:
        RuntimeError: some heads have a loss and some have none, or it is not a scalar.
    """
    first = outputs[0]
    if isinstance(first, Mapping) and "loss" not in first:
        return first
    losses = [_loss(output) for output in outputs]
    if all(loss is None for loss in losses):
        return first
    if any(loss is None for loss in losses):
        raise RuntimeError(
            "training_step must return a loss for every head of a device or for none; received None for heads"
            f" {[head for head, loss in enumerate(losses) if loss is None]} of {len(losses)}. Return a loss of zero for"
            " slices to be skipped, or use one head per device."
        )
    if not all(isinstance(loss, Tensor) for loss in losses):
        return first
    shapes = {tuple(loss.shape) for loss in losses}
    if any(loss.numel() != 1 for loss in losses):
        raise RuntimeError(
            f"The loss that training_step returns must be a scalar; received shapes {sorted(shapes)}. Take its mean."
        )
    loss = torch.stack([own.reshape(()) for own in losses]).mean()
    if not isinstance(first, Mapping):
        return loss
    together: dict[str, Any] = {}
    for key in first:
        together[key] = values = [output.get(key) for output in outputs]
        if all(isinstance(value, Tensor) for value in values):
            together[key] = torch.cat(values) if values[0].dim() else torch.stack(values)
    return {**together, "loss": loss}


def _loss(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output
