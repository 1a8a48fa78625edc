"""Running the user's step to see what it does, without leaving a trace and without chance."""

from __future__ import annotations

import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lte.buffers import put_back_
from lightning_lte.writes import written

# Containers with more items are data, and taken to be constant.
_MOST_ITEMS = 10_000
# A step of a large network has hundreds of dropouts.
_MOST_DRAWS = 10_000

Restore = Callable[[], Any]


@contextmanager
def untouched(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Undo what a block does to a module's parameters, buffers, attributes and modes and to the random streams.

    Attributes are followed into containers, arrays, generators and the user's own objects. What can't be put back:
    iterators, files, queues and whatever else threads share, and what is outside the process.

    Yields a function that does so at once, for a block that runs several times from the same start.
    """
    memo: set[int] = set()
    modes = [(m, m.training) for m in module.modules()]
    kept = [_kept_module(m, memo) for m in module.modules()]
    streams = _kept_streams()

    with _CopyOnWrite(module.parameters()) as parameters:

        @torch.no_grad()
        def again() -> None:
            # All of them, whatever one of the user's own containers raises.
            with ExitStack() as stack:
                for restore in streams:
                    stack.callback(restore)
                stack.callback(parameters.restore)
                for restore in reversed(kept):
                    stack.callback(restore)

        try:
            yield again
        finally:
            for m, training in modes:
                m.training = training
            again()


@contextmanager
def streams_untouched() -> Iterator[None]:
    """Undo what a block draws."""
    streams = _kept_streams()
    try:
        yield
    finally:
        for restore in streams:
            restore()


def _kept_streams() -> list[Restore]:
    # Of all devices: weights may be on the CPU while their copies in low precision are elsewhere.
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [
        partial(torch.cuda.set_rng_state_all, devices),
        partial(np.random.set_state, np.random.get_state()),
        partial(random.setstate, random.getstate()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]


def groups_untouched(optimizers: Iterable[Optimizer]) -> AbstractContextManager[None]:
    """Undo what a block does to param groups: to their settings, and to which parameters are in them."""
    return _undone([own.param_groups for own in optimizers], set())


def schedulers_untouched(schedulers: Iterable[Any], optimizers: Iterable[Optimizer]) -> AbstractContextManager[None]:
    """Undo what a block does to schedulers, and not what it does to the optimizers that they know."""
    return _undone(schedulers, set(map(id, optimizers)))


@contextmanager
def _undone(values: Iterable[Any], memo: set[int]) -> Iterator[None]:
    """Put values back as they are now, but for what `memo` has the ids of."""
    kept = [_kept(value, memo) for value in values]
    try:
        yield
    finally:
        for restore in kept:
            restore()


class _CopyOnWrite(TorchDispatchMode):
    """Keeps a copy of each parameter that is about to be written to, past autograd's eyes (`weight.data`), too."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        # Several may lie in one storage, as the weights of cuDNN's recurrent networks do.
        self._in_place: dict[int, list[Tensor]] = {}
        self._data: list[tuple[nn.Parameter, Tensor]] = []
        for param in params:
            address = _address(param) if param.numel() else None
            if address is not None:
                data = param.data
                self._data.append((param, data))
                self._in_place.setdefault(address, []).append(data)
        self._copies: dict[int, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for address in map(_address, written(func, args, kwargs)):
            if address in self._in_place and address not in self._copies:
                self._copies[address] = [data.clone() for data in self._in_place[address]]
        return func(*args, **kwargs)

    def restore(self) -> None:
        for param, data in self._data:
            if not param.is_set_to(data):  # after `weight.data = ...`
                param.data = data
        copies, self._copies = self._copies, {}
        for address, together in copies.items():
            for data, copy in zip(self._in_place[address], together, strict=True):
                data.copy_(copy)
        self._copies = {}


def not_compiled() -> AbstractContextManager[Any]:
    """A context in which torch.compile does nothing: it refuses the modes below, and would make graphs for one use."""
    return torch.compiler.set_stance("force_eager")


class DrawsWithoutEnd(RuntimeError):
    """A step draws again and again, and always the same."""


class Determined(TorchDispatchMode):
    """Replaces every random draw of torch's by a constant that does not depend on how many samples there are.

    Dropout drops nothing, noise is constant, and permutations turn everything round. So a module can run in train mode
    and compute the same for a batch as for its slices.

    Raises:
        DrawsWithoutEnd: from the operation that draws, of which there were too many for a step that will end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._draws += 1
            if self._draws > _MOST_DRAWS:
                raise DrawsWithoutEnd(
                    f"the step drew random numbers more than {_MOST_DRAWS} times, as one does that draws until what it"
                    " has drawn is of use: while it is tried, it draws the same each time"
                )
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        names = [argument.name for argument in func._schema.arguments]
        for where, argument in enumerate(names):
            # Recurrent networks have layers; that of cuDNN's draws by itself.
            if argument == "dropout_p" or (argument == "dropout" and "num_layers" in names):
                args, kwargs = _with(args, kwargs, where, argument, 0.0)
            elif argument == "training" and name.startswith("rrelu"):
                args, kwargs = _with(args, kwargs, where, argument, False)
        result = func(*args, **kwargs)
        if name == "randperm" or name.startswith("randperm."):
            return result.copy_(torch.arange(len(result) - 1, -1, -1, device=result.device))
        if name.partition(".")[0] in ("sort", "topk"):
            # The order of equal numbers is anyone's: draws that are sorted to be a permutation turn everything round.
            return _with_equals_turned_round(result, names, args, kwargs)
        constant = _CONSTANTS.get(name)
        if constant is None or not isinstance(result, Tensor):
            return result
        if name in ("randint", "random_", "randint_like"):
            bounds = [value for value in args if isinstance(value, int) and not isinstance(value, bool)]
            constant = bounds[0] if len(bounds) > 1 else 0
        elif name == "uniform_" and len(args) == 3:
            constant = (args[1] + args[2]) / 2
        elif name == "normal_" and len(args) == 3:
            constant = args[1] + args[2] / 2
        elif name == "_sample_dirichlet":
            constant = 1 / max(1, result.shape[-1])
        return result.fill_(constant)


def _with(args: Any, kwargs: dict[str, Any], where: int, name: str, value: Any) -> tuple[Any, dict[str, Any]]:
    """Arguments of an operation with another value of one of them."""
    if where < len(args):
        return (*args[:where], value, *args[where + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _with_equals_turned_round(result: Any, names: list[str], args: Any, kwargs: Any) -> Any:
    """The values and indices of a sort, with the order of those turned round that are equal all along its dimension."""
    given, (_, indices) = args[0], result
    where = names.index("dim")
    dim = kwargs.get("dim", args[where] if where < len(args) else -1)
    if given.dim() and given.numel():
        equal = given.amax(dim, keepdim=True) == given.amin(dim, keepdim=True)
        indices.copy_(torch.where(equal, given.shape[dim] - 1 - indices, indices))
    return result


_CONSTANTS: dict[str, float] = {
    "bernoulli": 1,
    "bernoulli_": 1,
    "rand": 0.5,
    "rand_like": 0.5,
    "randn": 0.5,
    "randn_like": 0.5,
    "normal": 0.5,
    "normal_": 0.5,
    "uniform_": 0.5,
    "exponential_": 0.5,
    "log_normal_": 0.5,
    "cauchy_": 0.5,
    "geometric_": 1,
    "poisson": 1,
    "binomial": 1,
    "_standard_gamma": 1,
    "_sample_dirichlet": 1,
    "multinomial": 0,
    "randint": 0,
    "randint_like": 0,
    "random_": 0,
}


@contextmanager
def without_zeros(tensors: Iterable[Tensor], copies: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Fill tensors that are all zero with small numbers: layers that start at zero would hide what comes before them.

    Each is written past autograd's eyes, and zero again when the block ends.

    Args:
        tensors: to fill.
        copies: pairs (stack, tensor): what has copies of a tensor that is filled, and has to go on having them.
    """
    generator = torch.Generator().manual_seed(0)
    zero = [t for t in tensors if t.is_floating_point() and t.numel() and not bool(t.detach().any())]
    for tensor in zero:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
        tensor.data.copy_(0.02 * noise)
    for stack, tensor in copies:
        if any(tensor is filled for filled in zero) and not bool(stack.detach().any()):
            stack.data.copy_(tensor.data.expand_as(stack))
            zero.append(stack)
    try:
        yield
    finally:
        for tensor in zero:
            tensor.data.zero_()


@contextmanager
def alike(stacks: Iterable[Tensor]) -> Iterator[None]:
    """Give all heads what the first one has, (n, ...), until the block ends, past autograd's eyes."""
    kept = [(stack, stack.detach().clone()) for stack in stacks]
    for stack, _ in kept:
        stack.data.copy_(stack.data[:1].clone().expand_as(stack))
    try:
        yield
    finally:
        for stack, own in kept:
            stack.data.copy_(own)


# Hooks are put back as attributes are: a forward that registers them the first time notes that in an attribute.
HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict))
# PyTorch's registries but for hooks: parameters and modules. Buffers are kept by themselves.
REGISTRIES = frozenset(vars(nn.Module())) - HOOKS
_CONSTANT_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "torch", "builtins", "lightning_lte")
# What other threads wait on and fill meanwhile, which to put back would be to take from them.
_PACKAGES_OF_THREADS = ("threading", "_thread", "queue", "multiprocessing", "concurrent", "asyncio", "logging")


def _kept_module(module: nn.Module, memo: set[int]) -> Restore:
    if id(module) in memo:
        return partial(_same, module)
    memo.add(id(module))
    attributes = {key: _kept(value, memo) for key, value in module.__dict__.items() if key not in REGISTRIES}
    buffers = _kept(module._buffers, memo)
    # Those of scripted modules can't be exchanged.
    own_registries: list[Any] = [own for own in (module._parameters, module._modules) if isinstance(own, dict)]
    registries = [(own, dict(own)) for own in own_registries]
    settings = [_kept_settings(p) for p in module._parameters.values() if p is not None]

    def restore() -> nn.Module:
        for put_back in settings:
            put_back()
        for own, kept in registries:
            own.clear()
            own.update(kept)
        for key in module.__dict__.keys() - attributes.keys() - REGISTRIES:
            del module.__dict__[key]
        module.__dict__.update({key: own() for key, own in attributes.items()})
        buffers()
        return module

    return restore


def _kept_settings(param: nn.Parameter) -> Restore:
    """Of a parameter, all but its values: whether it wants a gradient, and its hooks."""
    wants_gradient = param.requires_grad
    hooks = {name: dict(getattr(param, name) or {}) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")}

    def restore() -> None:
        param.requires_grad_(wants_gradient)
        for name, kept in hooks.items():
            own = getattr(param, name)
            if own is not None:
                own.clear()
                own.update(kept)

    return restore


def _address(tensor: Tensor) -> int | None:
    """Where its values lie; None where that is nowhere, or in other tensors, as of sparse ones and of classes that wrap
    others."""
    try:
        return None if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def _same(value: Any) -> Any:
    return value


def _kept(value: Any, memo: set[int]) -> Restore:
    """A function that returns `value` as it is now: what can be changed is put back in place, so that whoever else
    holds it sees that, too."""
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter) or value.is_inference() or value.is_meta:
            return partial(_same, value)
        return partial(_refill_tensor, value, value.shape, _once(value.detach()).clone())
    if isinstance(value, nn.Module):
        inner = [_kept_module(m, memo) for m in value.modules()]
        return partial(_after, inner, value)
    if isinstance(value, dict | list | deque | set | np.ndarray):
        if id(value) in memo or _is_constant(value):
            return partial(_same, value)
        memo.add(id(value))
        if isinstance(value, dict):
            return partial(_refill_dict, value, {k: _kept(v, memo) for k, v in value.items()})
        if isinstance(value, np.ndarray):
            return partial(_refill_array, value, value.copy())
        if isinstance(value, set):
            return partial(_refill_set, value, set(value))
        return partial(_refill_list, value, [_kept(v, memo) for v in value])
    if isinstance(value, tuple) and not _is_constant(value):
        return partial(_after, [_kept(v, memo) for v in tuple.__iter__(value)], value)
    if isinstance(value, torch.Generator):
        return partial(_call_and_return, value, value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(_call_and_return, value, value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(_call_and_return, value, value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(
            _call_and_return, value, partial(setattr, value.bit_generator, "state"), value.bit_generator.state
        )
    if (_is_users(value) or isinstance(value, LRScheduler)) and id(value) not in memo:
        memo.add(id(value))
        restores: list[Restore] = [partial(_refill_slot, s, value, _kept_slot(s, value, memo)) for s in _slots(value)]
        if hasattr(value, "__dict__"):
            attributes = {k: _kept(v, memo) for k, v in vars(value).items()}
            restores.append(partial(_refill_dict, vars(value), attributes))
        return partial(_after, restores, value)
    return partial(_same, value)


def _is_constant(container: Any) -> bool:
    if isinstance(container, np.ndarray):
        return not container.flags.writeable or (container.ndim > 0 and len(container) > _MOST_ITEMS)
    # Classes of the user's own may have another length, or none.
    kind: Any = next(kind for kind in (dict, list, deque, set, tuple) if isinstance(container, kind))
    return bool(kind.__len__(container) > _MOST_ITEMS)


def _is_users(value: Any) -> bool:
    package, *bases = (kind.__module__.partition(".")[0] for kind in type(value).__mro__)
    if package in _CONSTANT_PACKAGES or not {package, *bases}.isdisjoint(_PACKAGES_OF_THREADS):
        return False
    return not isinstance(value, type | types.ModuleType | types.FunctionType)


def _slots(value: Any) -> list[Any]:
    """The descriptors of what an object keeps in `__slots__` and not in its `__dict__`."""
    classes = [vars(cls) for cls in type(value).__mro__ if "__slots__" in vars(cls)]
    return [d for cls in classes for d in cls.values() if isinstance(d, types.MemberDescriptorType)]


def _kept_slot(slot: Any, value: Any, memo: set[int]) -> Restore | None:
    """As `_kept`, or None for a slot with nothing in it."""
    try:
        return _kept(slot.__get__(value), memo)
    except AttributeError:
        return None


def _after(restores: list[Restore], value: Any) -> Any:
    for restore in restores:
        restore()
    return value


def _call_and_return(value: Any, call: Callable[[Any], Any], state: Any) -> Any:
    call(state)
    return value


def _refill_slot(slot: Any, value: Any, own: Restore | None) -> None:
    # Past the `__setattr__` of classes that are frozen.
    if own is not None:
        slot.__set__(value, own())
    else:
        with suppress(AttributeError):  # still empty
            slot.__delete__(value)


@torch.no_grad()
def _refill_tensor(value: Tensor, shape: torch.Size, saved: Tensor) -> Tensor:
    if value.shape != shape:
        value.resize_(shape)
    put_back_(_once(value), saved)
    return value


def _once(tensor: Tensor) -> Tensor:
    """A tensor without the repetitions of one that was expanded, which torch refuses to write to."""
    if tensor.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _refill_array(value: Any, saved: Any) -> Any:
    value[...] = saved
    return value


def _refill_dict(value: dict[Any, Any], items: dict[Any, Restore]) -> dict[Any, Any]:
    new = {k: restore() for k, restore in items.items()}
    # As a dict, whatever the subclass does when it is filled. One that is ordered keeps a list of its keys besides.
    kind: type[dict[Any, Any]] = OrderedDict if isinstance(value, OrderedDict) else dict
    now = kind.items(value)
    if len(now) == len(new) and all(a is b and c is d for (a, c), (b, d) in zip(now, new.items(), strict=True)):
        return value  # and another thread may be looking something up in it
    kind.clear(value)
    for key, own in new.items():
        kind.__setitem__(value, key, own)
    return value


def _refill_list(value: Any, items: list[Restore]) -> Any:
    new = [restore() for restore in items]
    value.clear()
    value.extend(new)
    return value


def _refill_set(value: set[Any], items: set[Any]) -> set[Any]:
    value.clear()
    value.update(items)
    return value
