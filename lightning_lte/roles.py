"""Deciding what each parameter of the user's module becomes, before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lte.config import LTEConfig, matches
from lightning_lte.float32 import HALF
from lightning_lte.heads import Matrices
from lightning_lte.layers import headed_class
from lightning_lte.layers.base import made_class
from lightning_lte.layers.embedding import HeadedEmbedding
from lightning_lte.report import listed
from lightning_lte.shards import local, users_class
from lightning_lte.trial import HOOKED, has_hooks

REMOVE_HOOKS = (
    "Remove the hooks: they would see no gradients of weights that heads train. wandb.watch registers some for"
    " log='gradients' and log='all'; give log=None."
)

_BASES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Owner:
    """Where a parameter sits, and which layer computes with it.

    Attributes:
        module: the parameter is module.`key`.
        module_name: in the user's module.
        key: see `module`.
        layer: the layer that computes with it: `module` itself, but for children that their parent uses without
            calling them, such as the output projection of nn.MultiheadAttention.
        layer_name: in the user's module.
        layer_key: the parameter's name within `layer`.
    """

    module: nn.Module
    module_name: str
    key: str
    layer: nn.Module
    layer_name: str
    layer_key: str

    @property
    def weight_name(self) -> str:
        """What the parameter is called where heads are meant: its layer's name, if it is that layer's `weight`."""
        return self.module_name if self.key == "weight" else f"{self.module_name}.{self.key}".lstrip(".")

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a pattern may match."""
        return self.module_name, f"{self.module_name}.{self.key}".lstrip("."), self.layer_name


@dataclass(frozen=True)
class Role:
    """What a parameter becomes.

    Attributes:
        name: in the user's module.
        param: the user's.
        owners: the places where it sits; more than one if it is tied.
        kind: "factored", "replica", "frozen" or "untouched"; see `Entry.role`.
        reason: why.
        matrices: how it is seen for factors, where it is factored.
        rank: of the factors.
        rounds: whether forwards read it in low precision, see `LTEConfig.base`.
    """

    name: str
    param: nn.Parameter
    owners: tuple[Owner, ...]
    kind: str
    reason: str
    matrices: Matrices | None = None
    rank: int = 0
    rounds: bool = False

    @property
    def owner(self) -> Owner:
        """The first place, and the only one of a factored weight."""
        return self.owners[0]


def decide(module: nn.Module, trained: Collection[nn.Parameter], config: LTEConfig) -> list[Role]:
    """The role of every parameter, in the module's order.

    Args:
        module: the user's.
        trained: the parameters that optimizers hold; only these are factored or become replicas.
        config: the user's choices.

    Raises:
        ValueError: parameters without a shape or without storage, a pattern that matches nothing, nothing to train,
            nothing to factor, nothing to read in low precision where the user asks for it, frozen factors of half
            precision that the user asks to send in fewer bits.
    """
    owners = _owners(module)
    check_made({_name(found[0]): param for param, found in owners.items()})
    _check_patterns(module, owners, config)
    trained = set(trained)
    if not any(p.requires_grad and p in trained for p in owners):
        raise ValueError(
            "LTE needs parameters to train; none of the module's parameters requires a gradient and is held by an"
            " optimizer. Return an optimizer over self.parameters() from configure_optimizers."
        )
    twins = _twins(owners)
    # In eval mode these use the weights of their linear layers without calling them.
    kinds = (nn.TransformerEncoderLayer,)
    fast = {child for layer in module.modules() if isinstance(layer, kinds) for child in layer.children()}
    roles = [_role(param, owners[param], trained, config, twins.get(param, ()), fast) for param in owners]
    if not any(role.kind == "factored" for role in roles):
        by_reason: dict[str, list[str]] = defaultdict(list)
        for role in roles:
            by_reason[role.reason].append(role.name)
        seen = "\n".join(f"  {reason}: {listed(names)}" for reason, names in by_reason.items())
        remedy = "Lower `rank`, or change target_modules or exclude_modules."
        learning = [role for role in roles if role.kind != "untouched" and role.param.requires_grad]
        untied = [role for role in learning if len(role.owners) == 1]
        if untied and all(role.reason == HOOKED for role in untied):
            remedy = REMOVE_HOOKS
        raise ValueError(
            f"LTE needs at least one weight that can be factored; found none among {len(roles)} parameters. {remedy}"
            f" The reasons were:\n{seen}"
        )
    if config.base != "float32" and not any(role.rounds for role in roles):
        seen = "\n".join(f"  {role.name}: {role.reason}" for role in roles if role.kind == "factored")
        raise ValueError(
            f"base={config.base!r} is for factored weights of linear layers in float32; found none. Give"
            f" base='float32', or a Trainer whose precision leaves weights as they are. What can be factored:\n{seen}"
        )
    half = [r.name for r in roles if r.kind == "factored" and r.param.dtype in HALF]
    if half and config.freeze_a and config.payload == "factors" and config.wire != "float32":
        raise ValueError(
            "Of weights in half precision frozen factors are sent in full precision alone, as some of what rounding"
            f" takes from them would be lost; received payload='factors' and wire={config.wire!r}, with {listed(half)}"
            " in half precision. Give payload='dense', or wire='float32'."
        )
    return roles


_Owners = dict[nn.Parameter, tuple[Owner, ...]]


def _owners(module: nn.Module) -> _Owners:
    users: dict[nn.Module, tuple[nn.Module, str, str]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            # One that is not known, too, uses the projection inside it without calling it.
            for child_name, child in layer.named_modules():
                if child is not layer:
                    users[child] = (layer, name, child_name)
    found: dict[nn.Parameter, list[Owner]] = defaultdict(list)
    for name, owner in module.named_modules():
        for key, param in owner._parameters.items():
            if param is not None:
                layer, layer_name, child = users.get(owner, (owner, name, ""))
                found[param].append(Owner(owner, name, key, layer, layer_name, f"{child}.{key}".lstrip(".")))
    return {param: tuple(own) for param, own in found.items()}


def _name(owner: Owner) -> str:
    return f"{owner.module_name}.{owner.key}" if owner.module_name else owner.key


def _role(
    param: nn.Parameter,
    owners: tuple[Owner, ...],
    trained: Collection[nn.Parameter],
    config: LTEConfig,
    twins: Sequence[str],
    fast: Collection[nn.Module],
) -> Role:
    owner, name = owners[0], _name(owners[0])

    def role(kind: str, reason: str, matrices: Matrices | None = None, rank: int = 0) -> Role:
        if kind == "replica" and config.replicas == "freeze":
            kind = "frozen"
        return Role(name, param, owners, kind, reason, matrices, rank)

    if param not in trained:
        return role("untouched", "requires no gradient" if not param.requires_grad else "no optimizer holds it")
    if not param.requires_grad:
        return role("replica", "requires no gradient now; trained in place if that changes")
    if len(owners) > 1:
        return role("replica", "tied: shared by " + " and ".join(o.module_name or "the module" for o in owners))
    if twins:
        return role("replica", "tied: shares its storage with " + " and ".join(twins))
    if has_hooks(param):
        return role("replica", HOOKED)
    if is_of_own_class(param):
        return role("replica", f"a {type(param).__name__}, whose class may mean what factors would not keep to")
    matrices = _matrices(owner, config)
    if isinstance(matrices, str):
        return role("replica", matrices)
    if not param.is_floating_point():
        return role("replica", f"dtype {param.dtype}")
    if config.excludes(*owner.names):
        return role("replica", "named by exclude_modules")
    if not config.targets(*owner.names):
        return role("replica", "not named by target_modules")
    scale = f"scale {config.scale_of(*owner.names):g}"
    headed = headed_class(owner.layer)
    if headed is not None and headed.of_vectors:
        return role("factored", f"vector and scalar, {scale}", matrices, 1)
    rank = config.rank_of(*owner.names)
    if matrices.thin(rank):
        return role("replica", f"thin: factors of rank {rank} would be no smaller")
    reason = f"rank {rank}, {scale}" + (f", in {matrices.count} parts" if matrices.lead else "")
    if config.base == "float32":
        return role("factored", reason, matrices, rank)
    unrounded = _unrounded(param, owner, fast)
    precision = config.base if unrounded is None else f"not {config.base}: {unrounded}"
    return replace(role("factored", f"{reason}, {precision}", matrices, rank), rounds=unrounded is None)


def is_of_own_class(param: nn.Parameter) -> bool:
    """Whether a parameter is of a class that somebody has made of `nn.Parameter`.

    Optimizers may know the class: geoopt's keep a `ManifoldParameter` on its manifold. What is trained in its place, be
    it factors or a copy for each head, would be of no such class.
    """
    return type(param) is not nn.Parameter and issubclass(type(param), nn.Parameter)


def _unrounded(param: nn.Parameter, owner: Owner, fast: Collection[nn.Module]) -> str | None:
    """Why forwards can't read a factored weight in low precision, or None."""
    headed = headed_class(owner.layer)
    if headed is None or not headed.multiplies:
        return f"{type(owner.layer).__name__} is no linear layer"
    if owner.layer in fast:
        return "nn.TransformerEncoderLayer uses it without calling its layer"
    if param.dtype not in (torch.float32, torch.float64):
        return f"it is in {str(param.dtype).removeprefix('torch.')}"
    return None


def _matrices(owner: Owner, config: LTEConfig) -> Matrices | str:
    headed = headed_class(owner.layer)
    parts = config.parts_of(*owner.names, shape=owner.module._parameters[owner.key].shape)  # type: ignore[union-attr]
    if headed is not None:
        try:
            made_class(headed, type(owner.layer))
        except TypeError as error:
            return f"{type(owner.layer).__name__} can't be extended ({error})"
    if headed is HeadedEmbedding and config.embeddings == "replica":
        return "an embedding"
    if headed is not None and not (headed.of_vectors and config.norms == "replica"):
        matrices = headed.matrices(owner.layer, owner.layer_key, parts)
        if isinstance(matrices, Matrices) or owner.layer_key != "bias":
            return matrices
    if owner.key == "bias":
        return "a bias"
    kind = users_class(owner.layer)
    base = next((base for base in _BASES if isinstance(owner.layer, base)), None)
    if base is None or headed is not None:
        return f"{kind.__name__} is not a layer that can be factored"
    return f"{kind.__name__} computes otherwise than nn.{base.__name__}"


def _twins(owners: _Owners) -> dict[nn.Parameter, list[str]]:
    """Parameters that are others and yet begin at one address, as nn.Parameter(other) makes them."""
    by_address: dict[int, list[nn.Parameter]] = defaultdict(list)
    for param in owners:
        if local(param).layout == torch.strided and local(param).numel():
            by_address[local(param).data_ptr()].append(param)
    return {
        param: [_name(owners[other][0]) for other in group if other is not param]
        for group in by_address.values()
        if len(group) > 1
        for param in group
    }


def check_made(params: Mapping[str, nn.Parameter]) -> None:
    """Raise if parameters, by name, have no values that can be trained.

    Raises:
        ValueError: with rule, value and remedy.
    """
    lazy = [name for name, p in params.items() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"Heads need the shapes of weights; received lazy parameters without one: {listed(lazy)}. Run one"
            " forward on a sample before `fit`, for instance at the end of __init__ or in configure_model."
        )
    inference = [name for name, p in params.items() if not is_lazy(p) and p.is_inference()]
    if inference:
        raise ValueError(
            f"Weights must take part in autograd; received parameters made in inference mode: {listed(inference)}. Make"
            " the module outside torch.inference_mode()."
        )
    meta = [name for name, p in params.items() if p.is_meta]
    if meta:
        raise ValueError(
            f"Heads train weights that have values; received parameters on the meta device: {listed(meta)}."
            " Materialise them (`module.to_empty(device=...)` and an initialisation) in configure_model."
        )


def _check_patterns(module: nn.Module, owners: _Owners, config: LTEConfig) -> None:
    modules = {name: m for name, m in module.named_modules() if name}
    firsts = [found[0] for found in owners.values()]
    factorable = [owner for owner in firsts if isinstance(_matrices(owner, config), Matrices)]
    problems = []
    for argument in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "split"):
        if config.split == "qkv" and argument == "split":
            continue  # a model without such layers has nothing to split
        for pattern in getattr(config, argument) or ():
            found = [name for name in modules if matches(pattern, name)]
            named = [owner for owner in firsts if matches(pattern, *owner.names)]
            if not found and not named:
                problems.append(f"  {argument} {pattern!r} matches no module")
            elif argument != "exclude_modules" and not any(matches(pattern, *owner.names) for owner in factorable):
                kinds = sorted({type(modules[name]).__name__ for name in found} or {_name(owner) for owner in named})
                problems.append(f"  {argument} {pattern!r} matches only {', '.join(kinds)}, which can't be factored")
    if problems:
        some = [owner.weight_name for owner in factorable]
        raise ValueError(
            "Every pattern must match a layer that can be factored; these don't:\n"
            + "\n".join(problems)
            + f"\nLayers that can be: {listed(some) or 'none'}."
            " A pattern is a regular expression for the whole name or its end from a dot on."
        )
