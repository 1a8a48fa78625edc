"""Which optimizers can train heads, and step base weights at merges.

What they are asked, twins of them answer. Some draw random numbers as they step, which the user's own go on without.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_lte.rehearsal import streams_untouched

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

# What torch's optimizers count for a parameter as a whole. For one without dimensions, shapes don't tell these apart.
COUNTS = ("step", "mu_product", "eta", "mu")

# Shape of what twins of optimizers are tried on.
_TRIED = (2, 4, 4)


def check_optimizers(optimizers: Sequence[Optimizer], count: int) -> None:
    """Refuse optimizers whose update is not per element: they would mix the heads of a device, or need matrices.

    Args:
        optimizers: the user's.
        count: n, local heads.

    Raises:
        TypeError: an optimizer that isn't one.
        ValueError: an optimizer that mixes elements.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"LTE trains with torch optimizers; received {optimizer!r}. Return a torch.optim.Optimizer."
            )
        name = type(optimizer).__name__
        if any(type(own).__name__ == "Muon" for own in (optimizer, *wrapped_optimizers(optimizer))):
            raise ValueError(
                "The factors of heads are not the matrices that Muon was made for, which orthogonalises the update of a"
                " whole weight; received Muon. Choose an optimizer that updates each element by itself, such as AdamW."
            )
        if count > 1 and (isinstance(optimizer, LBFGS) or not acts_per_element(optimizer)):
            raise ValueError(
                f"With {count} heads on a device the optimizer must update each element by itself, as SGD, Adam, AdamW"
                f" and Adagrad do; received {name}, which mixes them. Choose another optimizer, or one head per device."
            )


def check_stacks(optimizers: Iterable[Optimizer], factored: Collection[nn.Parameter]) -> None:
    """Refuse optimizers that step matrices and fail on a stack of them, as which the factors of heads are trained.

    A twin tries it, with the settings of each group that has factored weights, as GaLore's have a rank. One that can't
    be copied, or fails on a matrix, too, gets the benefit of the doubt.

    Args:
        optimizers: the user's, with the user's own parameters.
        factored: weights that heads train in place of the optimizer.

    Raises:
        ValueError: with rule, value and remedy.
    """
    stacks, gradients = _drawn(2, 2, *_TRIED).unbind()
    for optimizer in optimizers:
        for settings in _kinds(optimizer, lambda group: any(p in factored for p in group["params"])):
            shape: tuple[int, ...] = _TRIED[1:]
            try:
                _trained(optimizer, settings, stacks[0, 0], [gradients[0, 0]] * 2)
                shape = _TRIED
                _trained(optimizer, settings, stacks[0], [gradients[0]] * 2)
            except Exception as error:
                if shape == _TRIED:
                    kind = type(optimizer)  # with its module: more than torch's are called AdamW
                    raise ValueError(
                        "The factors of heads are trained in stacks of matrices, (heads, rows, columns), and an"
                        f" optimizer must take those; received {kind.__module__}.{kind.__name__}, which steps a"
                        f" parameter of shape {_TRIED[1:]} and fails on one of shape {_TRIED} ({type(error).__name__}:"
                        f" {error}). Choose an optimizer that updates each element by itself, such as"
                        " torch.optim.AdamW."
                    ) from error


def check_modes(optimizers: Iterable[Optimizer], by_heads: Collection[nn.Parameter]) -> None:
    """Refuse optimizers that train at one point and evaluate at another, as schedule-free ones do, where heads train.

    Their `train` and `eval` move the parameters from one to the other. Weights change by merges alone, and what heads
    have in their place is not to be seen between batches.

    Args:
        optimizers: the user's, with the user's own parameters.
        by_heads: those that heads train in place of the optimizer.

    Raises:
        ValueError: with rule, value and remedy.
    """
    for optimizer in optimizers:
        modes = [own for own in (optimizer, *wrapped_optimizers(optimizer)) if _has_modes(own)]
        count = sum(p in by_heads for group in optimizer.param_groups for p in group["params"])
        if modes and count:
            raise ValueError(
                "The train() and eval() of an optimizer move what it trains between the point of training and that of"
                " evaluation, and can't move weights that heads train, so that evaluation would see another point than"
                f" is meant; received {type(modes[0]).__name__}, which has both, and of whose parameters heads train"
                f" {count}. Choose an optimizer with one point, such as AdamW with a learning-rate schedule."
            )


def _has_modes(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def check_outer_optimizer(make: Any) -> None:
    """Raise if `make` makes no optimizer.

    Raises:
        TypeError: with rule, value and remedy.
    """
    remedy = "Give a class such as torch.optim.SGD, or functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9)."
    if not callable(make) or isinstance(make, Optimizer):
        raise TypeError(
            f"outer_optimizer must make an optimizer from a list of parameters; received {make!r}. {remedy}"
        )
    try:
        made = make([nn.Parameter(torch.zeros(1, 1))])
    except Exception as error:
        raise TypeError(
            f"outer_optimizer must make an optimizer from a list of parameters; received {make!r}, which raised"
            f" {type(error).__name__}: {error}. {remedy}"
        ) from error
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"outer_optimizer must make a torch.optim.Optimizer; received {make!r}, which made"
            f" {type(made).__name__}. {remedy}"
        )


def wrapped_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Those that an optimizer holds in attributes, as SAM and Lookahead do."""
    return [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]


def acts_per_element(optimizer: Optimizer) -> bool:
    """Whether two matrices stacked in one parameter are updated as they are in two optimizers.

    Twins of the optimizer, with the settings of each of its groups, are tried on random numbers, and so are those that
    it holds. One that can't be copied gets the benefit of the doubt.
    """
    if not all(acts_per_element(own) for own in wrapped_optimizers(optimizer)):
        return False
    start, *gradients = _drawn(13, *_TRIED).unbind()
    for number, gradient in enumerate(gradients):
        # One matrix is pulled the same way at each step and the other to and fro, with a force that comes and goes: so
        # norms over both show, means of signs, and step sizes that grow as long as all goes one way.
        gradient[0] = gradients[0][0] * (1 + number)
        gradient[1] *= 100 ** (1 + number % 4)
    for group in _kinds(optimizer):
        # A learning rate that is warmed up is zero at the start, at which nothing shows; at a small one step sizes that
        # an optimizer finds by itself stay what they are at first.
        settings = {**group, **({"lr": 1.0} if group.get("lr") is not None else {})}
        try:
            stacked = _trained(optimizer, settings, start, gradients) - start
            single = [_trained(optimizer, settings, start[i], [g[i] for g in gradients]) - start[i] for i in range(2)]
        except Exception:
            continue
        # Each matrix by its own size: steps may be tiny at first.
        for own, alone in zip(stacked, single, strict=True):
            if not torch.allclose(own, alone, rtol=1e-6, atol=1e-6 * float(alone.abs().max())):
                return False
    return True


def magnitude_names(optimizer: Optimizer) -> set[str] | None:
    """Names of what an optimizer keeps for each element that says how large its gradients are, or its steps: second
    moments and the like, which are never negative.

    A twin shows it on random numbers, so that the answer is the same whatever an optimizer holds; None for one that
    can't be copied.
    """
    return _kept(optimizer, _drawn(4, *_TRIED), lambda v, _: v.shape == _TRIED and bool((v >= 0).all()))


def moment_names(optimizer: Optimizer) -> set[str] | None:
    """Names of what an optimizer keeps of gradients, and which is zero as long as they are: first and second moments.

    Not so step sizes (Rprop's) and copies of what is trained, which would ruin it if they were set to zero. None for an
    optimizer that can't be copied.
    """
    found: set[str] = set()
    for shape in (_TRIED, (4,)):  # Adafactor keeps others of vectors, and some add an eps to zeros
        gradients = torch.zeros(2, *shape, dtype=torch.float64, device="cpu")
        kept = _kept(
            optimizer, gradients, lambda v, _: v.dim() > 0 and v.is_floating_point() and bool((v.abs() < 1e-6).all())
        )
        if kept is None:
            return None
        found |= kept
    return found


def check_writes(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that keep copies of what they train, where merges write to it: a step would undo that.

    Raises:
        ValueError: with the names of the copies.
    """
    for optimizer in optimizers:
        gradients = torch.zeros(2, *_TRIED, dtype=torch.float64, device="cpu")
        copies = _kept(optimizer, gradients, lambda v, p: v.shape == p.shape and torch.allclose(v.to(p), p, 1e-2, 1e-3))
        if copies:
            raise ValueError(
                "With after_merge='reset', and with refresh, merges write to factors, and an optimizer must not write"
                f" back what it has kept of them; received {type(optimizer).__name__}, which keeps copies of what it"
                f" trains: {', '.join(sorted(copies))}. Give after_merge='keep' and refresh=0, or another optimizer."
            )


@streams_untouched()
def _kept(optimizer: Optimizer, gradients: Tensor, wanted: Callable[[Tensor, Tensor], bool]) -> set[str] | None:
    """Names of tensors in a twin's state after steps on these gradients, those that are wanted, given also what was
    trained; None where none can be made."""
    start = _drawn(*gradients.shape[1:], seed=1)
    found: set[str] = set()
    for group in optimizer.param_groups:
        param = nn.Parameter(start.clone())
        try:
            twin = _twin(optimizer, _on_cpu(group), param)
            for gradient in gradients:
                param.grad = gradient.clone()
                twin.step()
        except Exception:
            return None
        kept = twin.state[param].items()
        found |= {key for key, value in kept if isinstance(value, Tensor) and wanted(value, param.detach())}
    return found


def decays_apart(optimizer: Optimizer) -> bool | str:
    """Whether weight decay takes lr * weight_decay of a parameter off at each step, whatever its gradient.

    Twins with the settings of each group that has a weight decay, with one and without, take two steps on the same
    random numbers. After each the decay is undone as `Decay` does it; then both have moved alike, or the one with decay
    by so much more as is undone, if it comes before the update as in AdamW.

    Returns:
        Or why it could not be tried.
    """
    start, *gradients = _drawn(3, 4, 4).unbind()
    lr, taken = 0.1, 0.01
    for group in optimizer.param_groups:
        if "weight_decay" not in group:
            continue
        settings = {**_on_cpu(group), "lr": lr}
        try:
            plain = _trained(optimizer, {**settings, "weight_decay": 0.0}, start, gradients) - start
            decayed = _trained(optimizer, {**settings, "weight_decay": taken / lr}, start, gradients, taken) - start
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        # Some compute in float32, whatever they are given.
        if not any(torch.allclose(decayed * factor, plain, rtol=1e-4, atol=1e-5) for factor in (1, 1 - taken)):
            return False
    return True


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers to try twins on, whatever the user's default dtype and device are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _on_cpu(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a group for a twin on the CPU: with settings that are tensors there, and without kernels for GPUs,
    which keep the same."""
    kernels = {key: False for key in ("fused", "capturable") if group.get(key)}
    return {**group, **{key: _moved(value) for key, value in group.items() if key != "params"}, **kernels}


def _kinds(
    optimizer: Optimizer, wanted: Callable[[Mapping[str, Any]], bool] = lambda group: True
) -> list[dict[str, Any]]:
    """`_on_cpu` of groups, of those alone that differ in more than parameters and learning rates: they may be many."""
    kinds: dict[str, dict[str, Any]] = {}
    for group in filter(wanted, optimizer.param_groups):
        settings = _on_cpu(group)
        other = {k: v for k, v in settings.items() if k not in ("params", "param_names", "lr", "initial_lr")}
        kinds.setdefault(repr((settings.get("lr") is None, other)), settings)
    return list(kinds.values())


def _moved(setting: Any) -> Any:
    if isinstance(setting, Tensor):
        return setting.detach().cpu()
    return tuple(map(_moved, setting)) if type(setting) is tuple else setting  # betas, for instance


@streams_untouched()
def _trained(
    like: Optimizer, group: Mapping[str, Any], start: torch.Tensor, gradients: list[Any], taken: float = 0.0
) -> torch.Tensor:
    """Where a twin takes a parameter, if after each step it is given back the share that decay has taken off."""
    param = nn.Parameter(start.clone())
    twin = _twin(like, group, param)
    for gradient in gradients:
        param.grad = gradient.clone()
        twin.step()
        param.data /= 1 - taken
    return param.detach()


def _twin(like: Optimizer, group: Mapping[str, Any], param: nn.Parameter) -> Optimizer:
    """An optimizer of the same class and settings over one parameter, with nothing of the user's in it."""
    # Copied rather than constructed: arguments of constructors are not all kept in `defaults`. The users' parameters
    # are not copied, but exchanged for the one given.
    held = [p for own in like.param_groups for p in own["params"]]
    memo: dict[int, Any] = {id(p): param for p in held}
    # What it keeps for all parameters, under names, may be there from the start.
    of_all = {key: copy.deepcopy(value, memo) for key, value in like.state.items() if not isinstance(key, Tensor)}
    memo[id(like.state)] = defaultdict(dict, of_all)
    twin: Optimizer = copy.deepcopy(like, memo)
    # Optimizers leave out what they hold beside groups and states when they are copied. Hooks, and a `step` that a
    # scheduler has wrapped, are to stay out: they would be called.
    for name, value in vars(like).items():
        if name not in vars(twin) and not name.startswith("_optimizer_") and not callable(value):
            setattr(twin, name, copy.deepcopy(value, memo))
    settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    twin.param_groups[:] = [{**copy.deepcopy(settings), "params": [param]}]
    state = first_state(like, group, param)
    if state:
        twin.state[param] = state
    return twin


def place_counts(optimizer: Optimizer, param: nn.Parameter, state: dict[str, Any]) -> None:
    """Fused and capturable optimizers keep what they count on the parameter's device."""
    group = next((g for g in optimizer.param_groups if any(p is param for p in g["params"])), {})
    if group.get("fused") or group.get("capturable"):
        for key in COUNTS:
            if isinstance(state.get(key), Tensor):
                state[key] = state[key].to(device=param.device, dtype=torch.float32 if key == "step" else None)


def laid_out(value: Tensor, param: Tensor) -> Tensor:
    """A gradient or a moment in the strides of its parameter, as one in channels last has its own.

    Fused optimizers go through all of them number by number as they lie in memory: on a GPU they refuse what lies
    otherwise, and on a CPU they take the wrong numbers together, without a word.
    """
    if value.shape != param.shape or value.layout != torch.strided or value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype).copy_(value)


@streams_untouched()
def first_state(like: Optimizer, group: Mapping[str, Any], param: nn.Parameter) -> dict[str, Any]:
    """What an optimizer knows of a parameter when it is constructed, as Adagrad does; most make it later.

    Args:
        like: an optimizer of the same class.
        group: settings of the parameter's group.
        param: it.
    """
    settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    constructor: Any = type(like)
    try:
        twin: Optimizer = constructor([{**settings, "params": [param]}], **like.defaults)
    except Exception:
        return {}  # made from other arguments than its settings; torch's own Adagrad is not
    return dict(twin.state[param]) if param in twin.state else {}
