"""What heads ask of a project and of its trainer, all of it checked before the user's model is touched."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lte.config import LTEConfig
from lightning_lte.schedule import as_schedule

_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}


def check_arguments(given: Mapping[str, Any], own: Callable[..., Any], of_ddp: Callable[..., Any]) -> list[str]:
    """Raise for arguments of a strategy that nobody knows; return the names of those that do nothing here.

    Args:
        given: all but those that `own` names.
        own: the initialiser of the strategy.
        of_ddp: that of Lightning's `DDPStrategy`.

    Raises:
        TypeError: with the closest argument there is.
    """
    ddps = inspect.signature(of_ddp).parameters
    wrappers = inspect.signature(DistributedDataParallel.__init__).parameters
    known = {*inspect.signature(own).parameters, *ddps, *wrappers} - {"self", "kwargs", "module"}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {close[0]}?" if close else "Leave it out."
            raise TypeError(
                "LTEStrategy takes the arguments that its documentation lists, and those of DDPStrategy; received"
                f" {name}={given[name]!r}. {hint}"
            )
    # Command lines fill in the defaults of all arguments they know.
    idle = {n: p.default for n, p in wrappers.items() if n not in ("self", "module", "broadcast_buffers")}
    idle |= {n: ddps[n].default for n in ddps if n.startswith("ddp_comm") or n == "model_averaging_period"}
    return sorted(n for n, v in given.items() if n in idle and v is not None and v != idle[n])


def check_sharing(shard: int, devices: int, checkpoint: str, precision: Any) -> None:
    """Refuse what devices that share out a head can't do.

    Raises:
        ValueError: with rule, value and remedy.
    """
    if devices % shard:
        raise ValueError(
            f"shard must divide the number of devices; received shard={shard} on {devices} devices. Give a divisor of"
            " it, or 1 for the whole model on each device."
        )
    if shard > 1 and checkpoint != "gathered":
        raise ValueError(
            f"With shard=k checkpoints are gathered; received shard={shard} with checkpoint={checkpoint!r}. Give"
            " checkpoint='gathered', or shard=1."
        )
    if shard > 1 and str(precision) not in ("32-true", "64-true", "bf16-mixed"):
        raise ValueError(
            "With shard=k weights are in float32 or float64, and gradients are not scaled; received"
            f" precision={precision!r}. Give precision='bf16-mixed' or '32-true', or shard=1."
        )


def check_validation(trainer: Any, config: LTEConfig, devices: int) -> None:
    """Refuse merges before validations that devices don't begin together.

    Raises:
        ValueError: validation comes by the clock, and there are several devices.
    """
    by_the_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    if by_the_clock and devices > 1 and as_schedule(config.merge_every).before_validation:
        raise ValueError(
            "To merge before validations, all devices must validate after the same step; received"
            f" merge_every={config.merge_every!r} with a val_check_interval in time, which each of the {devices}"
            " devices measures by itself. Give val_check_interval as a number of batches."
        )


def check_optimization(module: Any, config: LTEConfig, devices: int, precision_plugin: Any) -> None:
    """Refuse ways to optimize that several devices can't follow together.

    Raises:
        ValueError: `replicas="step"` with a GradScaler on each of several devices, which skips steps of its own; or
            `shard` in manual optimization.
    """
    scalers = _scalers_of(module)
    if getattr(precision_plugin, "scaler", None) is not None:
        scalers.insert(0, f"precision={precision_plugin.precision!r}")
    if scalers and devices > 1 and config.replicas == "step":
        raise ValueError(
            "A GradScaler leaves out the step of a device whose factors overflow, and changes the scale of this device"
            " alone, so replicas whose gradients are averaged would not stay equal; received replicas='step' with"
            f" {', '.join(scalers)} on {devices} devices. Give precision='bf16-mixed', which needs no GradScaler, or"
            " replicas='merge'."
        )
    if config.shard > 1 and not module.automatic_optimization:
        raise ValueError(
            "Devices that share out a head run its backward when its forward is over; received"
            f" shard={config.shard} and a module in manual optimization. Give shard=1, or let Lightning optimize."
        )


def check_callbacks(callbacks: Iterable[Any], config: LTEConfig, devices: int) -> None:
    """Refuse callbacks that average weights which are nowhere in full, or prune what differs between devices.

    Raises:
        ValueError: with rule, value and remedy.
    """
    kinds = {base.__name__ for callback in callbacks for base in type(callback).__mro__}
    if config.base_copy != "cpu" and kinds & _AVERAGING:
        raise ValueError(
            "To average weights, a callback has to read them, and with low-precision bases they can be read only where"
            f" the CPU has a copy; received {', '.join(sorted(kinds & _AVERAGING))} and"
            f" base_copy={config.base_copy!r}. Give base_copy='cpu'."
        )
    if "ModelPruning" in kinds and devices > 1 and config.replicas == "merge":
        raise ValueError(
            "A weight that is pruned loses its heads, and each device would take its masks from a replica of its own,"
            f" which differs between merges; received ModelPruning on {devices} devices with replicas='merge'. Give"
            " replicas='step', which keeps replicas equal on all devices, or prune after training."
        )


def check_training_step(module: Any, config: LTEConfig, count: int) -> None:
    """Refuse a `training_step` that heads of one device can't share.

    Args:
        module: the LightningModule.
        config: of the run.
        count: n, local heads, where they are most.

    Raises:
        TypeError, ValueError: with rule, value and remedy.
    """
    if count == 1:
        return
    if not module.automatic_optimization:
        _check_manual_optimization(module, config, count)
    _check_split_batch(module)
    signature = inspect.signature(module.training_step)
    if "dataloader_iter" in signature.parameters:
        raise TypeError(
            "Local heads share a device by splitting each batch, so training_step must be given it; received"
            f" training_step{signature}. Take `batch` in place of `dataloader_iter`, or use one head per device."
        )


def _check_manual_optimization(module: nn.Module, config: LTEConfig, count: int) -> None:
    if config.execution == "batched" and config.loss_reduction == "sum":
        raise ValueError(
            "In manual optimization the step runs backward by itself, where a loss that is a sum over the samples of"
            f" all local heads can't be told; received execution='batched' and loss_reduction='sum' with {count} heads"
            " on a device. Give execution='sequential', or take the mean."
        )
    scalers = _scalers_of(module)
    if config.execution != "batched" and scalers:
        raise ValueError(
            "Heads that take turns in manual optimization can't share a GradScaler, which is told once for each step"
            f" what the gradients are; received {', '.join(scalers)} with {count} heads on a device. Let"
            " Trainer(precision='16-mixed') scale, or use one head per device."
        )


def _scalers_of(module: nn.Module) -> list[str]:
    """Names of the attributes in which a module keeps gradient scalers of its own."""
    return [name for name, value in vars(module).items() if isinstance(value, torch.amp.GradScaler)]


def _check_split_batch(module: nn.Module) -> None:
    """Refuse a `split_batch` of the module's own that is for something else."""
    split_batch: Any = getattr(module, "split_batch", None)
    if split_batch is None:
        return
    received = f"split_batch = {split_batch!r}"
    with suppress(TypeError):
        try:
            signature = inspect.signature(split_batch)
        except ValueError:
            return  # a callable that can't be asked, as some of C
        received = f"split_batch{signature}"
        signature.bind("batch", 2)
        return
    raise TypeError(
        "Where heads share a device, `split_batch(self, batch, heads)` in the LightningModule returns a batch for each"
        f" of them; received {received}. If it is for something else, give it another name, or use one head per device."
    )
