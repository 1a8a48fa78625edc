"""What the package uses of torch and of Lightning that is no interface of theirs: a new version may do without it.

A test that fails here names what went missing, or what it takes now.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
import torchmetrics
from torch import nn

from lightning_lte.sharding import _HOOKS
from tests.test_imports import MODULES


def takes(function: Any, *names: str) -> bool:
    """Whether these are what a function takes, in this order."""
    found = list(inspect.signature(function).parameters)
    assert found == list(names), f"it takes {found}, and not {list(names)}"
    return True


def of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def functorch(x: torch.Tensor) -> torch.Tensor:
    """Ask for all of torch.func's that is asked for, inside and outside of a transform."""
    inside = torch._C._functorch
    assert inside.is_functorch_wrapped_tensor(x) and inside.is_batchedtensor(x)
    assert not inside.is_legacy_batchedtensor(x) and inside.get_unwrapped(x).shape == (2, 3)
    assert torch._C._are_functorch_transforms_active()
    with of("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack")():
        assert not torch._C._are_functorch_transforms_active()
    return x


def transformed() -> bool:
    assert not torch._C._are_functorch_transforms_active()
    return bool(torch.func.vmap(functorch)(torch.ones(2, 3)).shape == (2, 3))


def chosen_kernel() -> bool:
    pair, none = [1, 1], [0, 0]
    x = torch.ones(1, 1, 3, 3)
    return type(torch._C._select_conv_backend(x, x, None, pair, none, pair, False, none, 1)) is kernels()


def kernels() -> Any:
    return torch._C._ConvBackend  # type: ignore[attr-defined]


def dispatched() -> bool:
    """Whether modes are on a stack that can be looked at, and see operations with their schemas."""
    modes, seen = of("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack"), []

    class Mode(of("torch.utils._python_dispatch", "TorchDispatchMode")):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema)
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        assert modes() == [mode] and torch._C._len_torch_dispatch_stack() == 1
        torch.ones(2).add_(1)
    assert modes() == [] and torch._C._len_torch_dispatch_stack() == 0
    assert [schema.name for schema in seen] == ["aten::ones", "aten::add_"]
    assert [schema.is_mutable for schema in seen] == [False, True]
    itself = seen[1].arguments[0]
    return bool(itself.name == "self" and itself.alias_info.is_write)


def mode_of_checkpoints(name: str) -> bool:
    return issubclass(of("torch.utils.checkpoint", name), of("torch.utils._python_dispatch", "TorchDispatchMode"))


def counts_writes() -> bool:
    x = torch.ones(2)
    before = x._version
    x.add_(1)
    return x._version == before + 1


def autocasts() -> bool:
    with torch.autocast("cpu"):
        assert torch._C._is_any_autocast_enabled()
    return not torch._C._is_any_autocast_enabled()


def profiles() -> bool:
    with torch.profiler.profile():
        assert torch.autograd._profiler_enabled()
    return not torch.autograd._profiler_enabled()


def divides() -> bool:
    x = [torch.ones(2), torch.ones(3)]
    torch._foreach_div_(x, 2.0)
    return all(bool((t == 0.5).all()) for t in x)


def hooked(name: str, register: str) -> bool:
    param = nn.Parameter(torch.ones(2))
    assert not getattr(param, name)
    handle = getattr(param, register)(lambda _: None)
    return list(getattr(param, name)) == [handle.id]


def sides() -> bool:
    return list(nn.Conv2d(1, 1, 3, padding=(1, 2))._reversed_padding_repeated_twice) == [2, 2, 1, 1]


def registries() -> bool:
    own = vars(nn.BatchNorm1d(1))
    assert list(own["_parameters"]) == ["weight", "bias"] and own["_modules"] == {}
    return list(own["_buffers"]) == ["running_mean", "running_var", "num_batches_tracked"]


SAVING = {
    "_save_to_state_dict": ("destination", "prefix", "keep_vars"),
    "_load_from_state_dict": (
        *("state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"),
    ),
}

TORCH: dict[str, Callable[[], bool]] = {
    "torch._C._functorch": transformed,
    "torch._C._are_functorch_transforms_active": transformed,
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": lambda: isinstance(
        of("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack")(), AbstractContextManager
    ),
    "torch._C._select_conv_backend": chosen_kernel,
    "torch._C._ConvBackend": lambda: all(
        hasattr(kernels(), name) for name in ("Slow3d", "SlowDilated3d", "SlowTranspose3d")
    ),
    "torch._C._get_mkldnn_enabled": lambda: torch._C._get_mkldnn_enabled() in (False, True),
    "torch._C._is_any_autocast_enabled": autocasts,
    "torch._C._len_torch_dispatch_stack": dispatched,
    "torch.utils._python_dispatch.TorchDispatchMode": dispatched,
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": dispatched,
    "OpOverload._schema": dispatched,
    "torch.utils._pytree.tree_map": lambda: (
        of("torch.utils._pytree", "tree_map")(abs, ([-1], {"a": -2})) == ([1], {"a": 2})
    ),
    "torch.utils.checkpoint._CachedTorchDispatchMode": partial(mode_of_checkpoints, "_CachedTorchDispatchMode"),
    "torch.utils.checkpoint._CachingTorchDispatchMode": partial(mode_of_checkpoints, "_CachingTorchDispatchMode"),
    "torch.autograd.forward_ad._current_level": lambda: torch.autograd.forward_ad._current_level == -1,
    "torch.autograd._profiler_enabled": profiles,
    "torch._foreach_div_": divides,
    "torch.ops.aten._unsafe_view": lambda: torch.ops.aten._unsafe_view(torch.ones(6), (2, 3)).shape == (2, 3),
    "torch.ops.aten._standard_gamma": lambda: (
        str(torch.ops.aten._standard_gamma.default._schema.arguments[1].name) == "generator"
    ),
    "torch.ops.aten._sample_dirichlet": lambda: (
        str(torch.ops.aten._sample_dirichlet.default._schema.arguments[1].name) == "generator"
    ),
    "torch.distributed._composable_state._module_state_mapping": lambda: isinstance(
        of("torch.distributed._composable_state", "_module_state_mapping"), WeakKeyDictionary
    ),
    "torch.distributed.distributed_c10d._get_default_store": lambda: takes(
        of("torch.distributed.distributed_c10d", "_get_default_store")
    ),
    "nn.modules.batchnorm._BatchNorm": lambda: issubclass(
        nn.BatchNorm1d, of("torch.nn.modules.batchnorm", "_BatchNorm")
    ),
    "InstanceNorm1d._get_no_batch_dim": lambda: nn.InstanceNorm1d(1)._get_no_batch_dim() == 2,
    "Conv2d._reversed_padding_repeated_twice": sides,
    "Conv2d._conv_forward": lambda: takes(nn.Conv2d(1, 1, 3)._conv_forward, "input", "weight", "bias"),
    "ConvTranspose2d._output_padding": lambda: takes(
        nn.ConvTranspose2d(1, 1, 3)._output_padding,
        *("input", "output_size", "stride", "padding", "kernel_size", "num_spatial_dims", "dilation"),
    ),
    "Module._parameters": registries,
    "Module._buffers": registries,
    "Module._modules": registries,
    **{
        f"Module.{name}": partial(lambda n, t: takes(getattr(nn.Module(), n), *t), name, t)
        for name, t in SAVING.items()
    },
    **{f"Module.{name}": partial(lambda n: vars(nn.Module())[n] == {}, name) for name in _HOOKS},
    "Tensor._version": counts_writes,
    "Tensor._values": lambda: torch.eye(2).to_sparse()._values().tolist() == [1, 1],
    "Parameter._backward_hooks": partial(hooked, "_backward_hooks", "register_hook"),
    "Parameter._post_accumulate_grad_hooks": partial(
        hooked, "_post_accumulate_grad_hooks", "register_post_accumulate_grad_hook"
    ),
    "Optimizer._optimizer_state_dict_post_hooks": lambda: (
        not torch.optim.SGD([nn.Parameter(torch.ones(1))])._optimizer_state_dict_post_hooks
    ),
    "torchmetrics.Metric._forward_cache": lambda: torchmetrics.MeanMetric()._forward_cache is None,
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_has(name: str) -> None:
    assert TORCH[name](), f"{name} is not what the package takes it for"


def connector(trainer: Any) -> Any:
    return trainer._signal_connector


def a_step(package: Any) -> Any:
    return package.core.optimizer.LightningOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))]))


def asks_by_the_clock(package: Any, trainer: Any) -> bool:
    assert trainer._val_check_time_interval is None
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    by_the_clock = package.Trainer(val_check_interval="00:00:01:00", check_val_every_n_epoch=None, **quiet)
    return bool(by_the_clock._val_check_time_interval == 60)


def strategy(package: Any) -> Any:
    return package.strategies.DDPStrategy(broadcast_buffers=False)


# Of its package and a trainer of it.
LIGHTNING: dict[str, Callable[[Any, Any], bool]] = {
    "Trainer._signal_connector": lambda _, t: connector(t).received_sigterm is False,
    "_SignalConnector._slurm_sigusr_handler_fn": lambda _, t: takes(
        connector(t)._slurm_sigusr_handler_fn, "signum", "_"
    ),
    "_SignalConnector._sigterm_notifier_fn": lambda _, t: takes(connector(t)._sigterm_notifier_fn, "signum", "_"),
    "Trainer._accelerator_connector.use_distributed_sampler": lambda _, t: (
        t._accelerator_connector.use_distributed_sampler is True
    ),
    "Trainer._accelerator_connector.cluster_environment": lambda _, t: hasattr(
        t._accelerator_connector, "cluster_environment"
    ),
    "Trainer._val_check_time_interval": asks_by_the_clock,
    "_FitLoop._data_fetcher": lambda _, t: t.fit_loop._data_fetcher is None,
    "_FitLoop.restarted_mid_epoch": lambda _, t: t.fit_loop.restarted_mid_epoch is False,
    "_TrainingEpochLoop.restarted_on_train_batch_end": lambda _, t: (
        t.fit_loop.epoch_loop.restarted_on_train_batch_end is False
    ),
    "_TrainingEpochLoop._batches_that_stepped": lambda _, t: t.fit_loop.epoch_loop._batches_that_stepped == 0,
    "_TrainingEpochLoop._should_check_val_fx": lambda _, t: takes(
        t.fit_loop.epoch_loop._should_check_val_fx, "data_fetcher"
    ),
    "_TrainingEpochLoop._broadcast_sigterm_tensor": lambda _, t: takes(t.fit_loop.epoch_loop._broadcast_sigterm_tensor),
    "_TrainingEpochLoop.on_advance_end": lambda _, t: takes(t.fit_loop.epoch_loop.on_advance_end, "data_fetcher"),
    "Strategy._lightning_optimizers": lambda _, t: t.strategy._lightning_optimizers == [],
    "Strategy._checkpoint_io": lambda package, _: strategy(package)._checkpoint_io is None,
    "DDPStrategy._ddp_kwargs": lambda package, _: strategy(package)._ddp_kwargs == {"broadcast_buffers": False},
    "DDPStrategy._timeout": lambda package, _: strategy(package)._timeout.total_seconds() > 0,
    "DDPStrategy._configure_launcher": lambda package, _: takes(strategy(package)._configure_launcher),
    "LightningOptimizer._optimizer": lambda package, _: isinstance(a_step(package)._optimizer, torch.optim.SGD),
    "LightningOptimizer._on_before_step": lambda package, _: takes(a_step(package)._on_before_step),
    "LightningOptimizer._on_after_step": lambda package, _: takes(a_step(package)._on_after_step),
}


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning_has(name: str, package: str) -> None:
    module = pytest.importorskip(package)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    assert LIGHTNING[name](module, module.Trainer(**quiet)), f"{name} is not what the package takes it for"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_all_private_names_that_the_package_uses_are_above() -> None:
    """What it defines itself can't be told from another's of the same name, and is left out."""
    trees = [ast.parse(path.read_text()) for path in MODULES.values()]
    own, used = {"_replace"}, set[str]()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch", "lightning.")):
            used |= {alias.name for alias in node.names if alias.asname is None}
    named = {part for name in (*TORCH, *LIGHTNING) for part in name.split(".")}
    missing = {name for name in used if _is_private(name)} - own - named
    assert not missing, f"not in this file: {sorted(missing)}"
