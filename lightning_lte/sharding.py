"""Sharing out a module among the devices of a group with FSDP2, and putting it together again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state, fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lte.float32 import HALF
from lightning_lte.layers import headed_class
from lightning_lte.report import listed
from lightning_lte.shards import is_shared_out, like, whole
from lightning_lte.transport import Transport
from lightning_lte.trial import has_hooks

# With torch 2.9 `fully_shard` counts a write to a weight where there was none. What lies between was not tried.
OLDEST_TORCH = "2.14"

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Sharding:
    """A module that the devices of a group share out among them; `undo` puts it together again.

    Parameters become DTensors of which each device keeps 1/k of the rows, rounded up. They are whole while the block
    that they belong to computes. Blocks are the members of `nn.ModuleList` and `nn.Sequential` that have modules with
    parameters inside; what is in none of them belongs to the module itself.

    Args:
        module: the user's. It may be larger than a device: it is moved there, and shared out, block by block.
        transport: see `Transport.sharing`.
        device: where it computes.
        steps: names of methods of the module that use parameters as its forward does.

    Raises:
        RuntimeError, ValueError: see `check`; the module is as it was then.
    """

    def __init__(
        self, module: nn.Module, transport: Transport, device: torch.device, steps: Sequence[str] = ()
    ) -> None:
        assert transport.within is not None
        self.module = module
        self.blocks = blocks(module)
        check(module, self.blocks)
        mesh = DeviceMesh.from_group(transport.within.group, device.type, mesh_dim_names=("shard",))  # type: ignore[arg-type]
        everyone = Transport(transport.devices, transport.device)
        self._before = {m: _Before(m) for m in module.modules()}
        for unit in (*self.blocks, module):
            # Rank 0's weights count, as in data-parallel training; FSDP takes each device's own rows of what it has.
            for tensor in _of_unit(unit, self.blocks):
                tensor.data = tensor.data.to(device)
            with torch.no_grad():
                everyone.broadcast_(_of_unit(unit, self.blocks))
            fsdp.fully_shard(unit, mesh=mesh)
        self._steps = [name for name in steps if callable(getattr(module, name, None))]
        for name in self._steps:
            fsdp.register_fsdp_forward_method(module, name)
            module.__dict__[name] = _resharding(module, module.__dict__[name])

    def state_dict(self) -> dict[str, Any]:
        """The module's own, with whole tensors on the CPU. A collective of the group."""
        state = self.module.state_dict()
        return {name: whole(v).cpu() if isinstance(v, Tensor) else v for name, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """The inverse of `state_dict`; all devices have the whole of it."""
        own = self.module.state_dict()
        parts = {name: like(own[name], v) if isinstance(own.get(name), Tensor) else v for name, v in state.items()}
        self.module.load_state_dict(parts, strict=strict)

    def undo(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Give the module whole parameters, on the CPU, and its own classes. A collective of the group.

        Args:
            optimizers: over its parameters; they hold the whole ones then.
        """
        for unit in (*self.blocks, self.module):
            unit.reshard()  # type: ignore[operator]
        made: dict[nn.Parameter, nn.Parameter] = {}
        for owner in self.module.modules():
            for key, param in owner._parameters.items():
                if param is None:
                    continue
                if param not in made:
                    made[param] = nn.Parameter(whole(param.detach()).cpu(), param.requires_grad)
                owner._parameters[key] = made[param]
        for m, before in self._before.items():
            before.restore(m)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [made.get(p, p) for p in group["params"]]
            for param in [p for p in optimizer.state if isinstance(p, nn.Parameter) and p in made]:
                state = optimizer.state.pop(param)
                optimizer.state[made[param]] = {
                    key: whole(v).cpu() if isinstance(v, Tensor) else v for key, v in state.items()
                }


def blocks(module: nn.Module) -> list[nn.Module]:
    """The modules that are shared out by themselves, inner ones first."""
    found: dict[nn.Module, None] = {}
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            for child in parent.children():
                inside = any(True for m in child.children() for _ in m.parameters())
                runs = type(child).forward is not nn.Module.forward
                if inside and runs and headed_class(child) is None:
                    found[child] = None
    return list(reversed(found))


def check(module: nn.Module, units: list[nn.Module]) -> None:
    """Refuse what can't be shared out.

    Raises:
        RuntimeError: torch is too old.
        ValueError: parameters that can't be shared out, with their names.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise RuntimeError(
            f"shard=k needs torch {OLDEST_TORCH} or newer, whose fully_shard counts no writes to weights where there"
            f" are none; received torch {torch.__version__}. Update torch, or give shard=1."
        )
    made = {n: p for n, p in module.named_parameters() if not (is_lazy(p) or p.is_meta)}
    odd: dict[str, list[str]] = {
        "lazy or on the meta device": [n for n, _ in module.named_parameters() if n not in made],
        "without dimensions (make them torch.zeros(1))": [n for n, p in made.items() if not p.dim()],
        "not contiguous": [n for n, p in made.items() if not p.is_contiguous()],
        "in half precision": [n for n, p in made.items() if p.dtype in HALF],
        "with hooks": [n for n, p in made.items() if has_hooks(p)],
        "used in several blocks": _tied(module, units),
        "shared out already": [n for n, p in made.items() if is_shared_out(p)],
    }
    problems = [f"{why}: {listed(names)}" for why, names in odd.items() if names]
    if problems:
        raise ValueError(
            "With shard=k, devices share out every parameter by its rows, block by block; received parameters that"
            f" can't be: {'; '.join(problems)}. Change these, or train without `shard`."
        )


def _tied(module: nn.Module, units: list[nn.Module]) -> list[str]:
    names = {p: n for n, p in module.named_parameters()}
    where: dict[nn.Parameter, set[int]] = {}
    for i, unit in enumerate((*units, module)):
        for m in _own_modules(unit, units):
            for p in m._parameters.values():
                if p is not None:
                    where.setdefault(p, set()).add(i)
    return [names[p] for p, found in where.items() if len(found) > 1]


def _own_modules(unit: nn.Module, units: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules in a block, less those in blocks inside it."""
    yield unit
    for child in unit.children():
        if all(child is not other for other in units):
            yield from _own_modules(child, units)


def _of_unit(unit: nn.Module, units: list[nn.Module]) -> list[Tensor]:
    tensors: dict[Tensor, None] = {}
    for m in _own_modules(unit, units):
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                tensors[t] = None
    return list(tensors)


def _resharding(module: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step after which the module shows what devices share out, also where no backward follows."""

    @wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if not torch.is_grad_enabled():
            module.reshard()
        return output

    return run


class _Before:
    """What FSDP changes of a module, as it was: FSDP itself takes nothing back."""

    def __init__(self, module: nn.Module) -> None:
        self._class = type(module)
        self._names = set(module.__dict__)
        self._hooks = {name: list(module.__dict__.get(name, ())) for name in _HOOKS}

    def restore(self, module: nn.Module) -> None:
        module.__class__ = self._class
        for name in module.__dict__.keys() - self._names:
            del module.__dict__[name]
        for name, keys in self._hooks.items():
            hooks = module.__dict__.get(name, {})
            for key in [key for key in hooks if key not in keys]:
                del hooks[key]
        _states.pop(module, None)


_states: weakref.WeakKeyDictionary[nn.Module, Any] = _composable_state._module_state_mapping
