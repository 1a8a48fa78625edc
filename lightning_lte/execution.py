"""How local heads share a device: all in one forward, or in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lte.batch import Layout, copied, layout_of
from lightning_lte.explorer import Explorer
from lightning_lte.proof import reason_against_batched
from lightning_lte.rehearsal import groups_untouched
from lightning_lte.report import listed


def run(
    explorer: Explorer,
    step: Callable[[Any], Any],
    batch: Any,
    *,
    trial: Callable[[], AbstractContextManager[None]] = nullcontext,
    turns: Callable[[], AbstractContextManager[None]] = nullcontext,
    take_turns: Callable[[Explorer, Callable[[Any], Any], Sequence[Any]], Any] | None = None,
    fill_up: bool = False,
) -> Any:
    """Run a step on a batch through all local heads, in the way that is right for the module.

    With `execution="auto"` the first batch that the heads divide shows which way that is. If it is one forward, the
    first batch of another structure shows whether that holds for those that are made as it is; see `Layout`.

    Args:
        explorer: whose heads act.
        step: takes a batch and returns the loss, or a mapping that has it under "loss".
        batch: on the device.
        trial: a context for the trial.
        turns: a context while heads take turns.
        take_turns: runs the step once for each head, on its part of the batch; None means `run_in_turn`.
        fill_up: repeat samples of a batch that the heads don't divide, in place of taking turns.

    Returns:
        What the step returned, or what it returned for all heads; see `combined`.
    """
    explorer.act()
    if explorer.config.grow_heads and not explorer.layouts:
        # The first batch tells more than the last one of an epoch, and tells it before training.
        layout_of(batch, explorer.layouts)
    if explorer.count == 1 or explorer.full_rank:
        with explorer.heads():
            return step(batch)
    layout = layout_of(batch, explorer.layouts)
    samples = layout.size(batch)
    even = samples % explorer.count == 0
    # A loader may begin with a batch of odd size; on one device, the trial can wait for another.
    if explorer.execution == "auto" and (even or explorer.transport.world_size > 1):
        with trial():
            # Steps may write to their batch.
            decide(explorer, step, copied(batch), layout.split(copied(batch), explorer.count) if even else None)
        explorer.tried = {layout.structure: explorer.execution == "batched"}
    elif explorer.execution == "batched" and even and explorer.tried is not None:
        if layout.structure not in explorer.tried:
            with trial():
                explorer.tried[layout.structure] = _fits_too(
                    explorer, step, copied(batch), layout.split(copied(batch), explorer.count), layout
                )
    if explorer.execution == "batched" and (explorer.tried is None or explorer.tried.get(layout.structure)):
        rows = samples
        if fill_up and not even:
            batch = layout.filled_up(batch, explorer.count)
            rows = layout.size(batch)
        if rows % explorer.count == 0:
            with explorer.heads():
                return _per_head(_without_repeats(step(batch), rows, samples), explorer)
    # Batch norm takes no statistics of a single sample.
    least = 2 if any(isinstance(m, _BatchNorm) and m.training for m in explorer.module.modules()) else 1
    parts = layout.split(batch, explorer.count, least)
    rows = sum(map(layout.size, parts))
    with turns():
        return _without_repeats((take_turns or run_in_turn)(explorer, step, parts), rows, samples)


def decide(explorer: Explorer, step: Callable[[Any], Any], batch: Any, parts: Sequence[Any] | None) -> None:
    """Prove on a first batch that one forward may serve all local heads, or have them take turns from now on.

    Devices see different batches; where the proof fails on one of them, heads take turns on all.

    Args:
        explorer: with several local heads.
        step: the user's: takes a batch and returns the loss, or a mapping that has it under "loss".
        batch: a real one, on the device.
        parts: its slices, of one size, one for each local head; None if it has none.
    """
    left_out = explorer.injection.switch.left_out
    if parts is None:
        reason: str | None = f"the first batch can't be split evenly over {explorer.count} heads"
    else:
        reason = _try(explorer, step, batch, parts)
    verdict = "batched" if reason is None else "sequential"
    transport = explorer.transport
    with transport.meeting("the trial of the first batch"):
        verdicts = transport.union({str(transport.rank): verdict})
    if set(verdicts.values()) == {"batched"}:
        explorer.share_layers(left_out)
        explorer.go_batched("proved on the first batch")
    else:
        explorer.go_sequential(reason or "the proof on the first batch failed on another device")
    left_out.clear()


def _fits_too(explorer: Explorer, step: Callable[[Any], Any], batch: Any, parts: Sequence[Any], layout: Layout) -> bool:
    """Whether one forward may serve all local heads on batches of another structure, too.

    Devices don't ask each other, as only some of them may see such a batch: where one forward is right, so is a turn
    for each head.
    """
    left_out = explorer.injection.switch.left_out
    reason = _try(explorer, step, batch, parts)
    if reason is None and left_out:
        # Heads have learned in these layers, from batches that are made otherwise.
        names = [name for name, layer in explorer.module.named_modules() if layer in left_out]
        reason = f"the input of {listed(names)} is not the batch there"
    left_out.clear()
    if reason is not None:
        warnings.warn(
            f"The {explorer.count} heads of this device share one forward, but take turns on batches"
            f" {layout.difference(explorer.layouts[0])}: {reason.rstrip('.')}.",
            stacklevel=2,
        )
    return reason is None


def _try(explorer: Explorer, step: Callable[[Any], Any], batch: Any, parts: Sequence[Any]) -> str | None:
    factors = explorer.injection.factors.values()
    stacks = [r.stack for r in explorer.injection.replicas if r.stack is not None]
    with groups_untouched(explorer.optimizers):
        reason = reason_against_batched(
            explorer.module,
            lambda part: _loss(step(part)),
            batch,
            parts,
            heads=explorer.all_heads,
            head=explorer.head,
            factors=[t for f in factors for t in (f.A, f.B)],
            replicas=[(r.stack, r.param) for r in explorer.injection.replicas if r.stack is not None],
            stacks=[*stacks, *(t for f in factors for t in (f.A, f.B, f.anchor_A, f.anchor_B) if t is not None)],
            left_out=explorer.injection.switch.left_out,
            loss_reduction=explorer.config.loss_reduction,
        )
    # Autocast may go on with casts of what parameters were filled with for the time.
    torch.clear_autocast_cache()
    return reason


def run_in_turn(explorer: Explorer, step: Callable[[Any], Any], parts: Sequence[Any]) -> Any:
    """Run the user's step once for each local head, on its part of the batch; see `combined` for the result."""
    check_parts(explorer, parts)
    outputs = []
    for head, part in enumerate(parts):
        with explorer.turn(head):
            output = step(part)
        loss = _loss(output)
        if isinstance(loss, Tensor) and loss.requires_grad:
            explorer.follow_backward(loss, head)
        outputs.append(output)
    return combined(outputs)


def check_parts(explorer: Explorer, parts: Sequence[Any]) -> None:
    """Raise if a batch was not split into a part for each local head.

    Raises:
        ValueError: with the number of parts.
    """
    if len(parts) != explorer.count:
        raise ValueError(
            f"A batch is split into one part for each of the {explorer.count} local heads; received {len(parts)} parts."
            " Return as many from split_batch(batch, heads)."
        )


def combined(outputs: Sequence[Any]) -> Any:
    """One output from those of all local heads.

    The loss is their mean. Other tensors of a mapping are concatenated along dimension 0, or stacked if they are
    scalars; what else there is comes as a list, and so do tensors that fit neither way. An output that can't have a
    loss is left to whoever asks for it.

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
    return {**{key: _joined([output.get(key) for output in outputs]) for key in first}, "loss": loss}


def _joined(values: list[Any]) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        return values
    # Heads may pad what they have to the longest sample of their own.
    if len({None if value.is_nested else (value.dim(), value.shape[1:]) for value in values}) > 1:
        return values
    return torch.cat(values) if values[0].dim() else torch.stack(values)


def _without_repeats(output: Any, rows: int, samples: int) -> Any:
    """The output of a step on a batch whose samples were repeated, for these once: of tensors under its keys that have
    as many rows as it, those of the first `samples`."""
    if rows == samples or not isinstance(output, Mapping):
        return output
    of_rows = {k for k, v in output.items() if isinstance(v, Tensor) and v.dim() and len(v) == rows and k != "loss"}
    return {key: value[:samples] if key in of_rows else value for key, value in output.items()}


def _per_head(output: Any, explorer: Explorer) -> Any:
    """The output of a step on the slices of all local heads, with a loss that is a sum over samples turned into the
    mean of the heads' losses."""
    loss = _loss(output)
    if explorer.config.loss_reduction == "mean" or not isinstance(loss, Tensor):
        return output
    loss = loss / explorer.count
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def _loss(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output
