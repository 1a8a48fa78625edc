"""What the user chose, checked before anything else happens."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np

from lightning_lte.growth import check_growth
from lightning_lte.optimizers import MakeOptimizer, check_outer_optimizer
from lightning_lte.rounded import Base, BaseCopy, check_kernels
from lightning_lte.schedule import Every, MergeSchedule, as_schedule
from lightning_lte.wire import PayloadKind, ShortDtype, Wire

AfterMerge = Literal["keep", "reset"]
ResetA = Literal["keep", "redraw"]
ReplicaPolicy = Literal["merge", "step", "freeze"]
Init = Literal["orthogonal", "kaiming", "xavier"]
Execution = Literal["auto", "batched", "sequential"]
LossReduction = Literal["mean", "sum"]
Norms = Literal["replica", "vector-scalar"]
Embeddings = Literal["factors", "replica"]
WeightDecay = Literal["factors", "weights"]
BadHeads = Literal["restart", "stop"]
Split = Mapping[str, int] | Literal["qkv"]
Preset = Literal["paper"]

# Where the paper's own settings (arXiv 2402.16828) differ from the defaults below. It has alpha from 4096 to 8192, so
# that s is 64 to 256; of ranks 8 to 128 with 32 heads, 64 was the best. All else it does is what the defaults do.
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "paper": {"rank": 64, "alpha": 4096.0, "split": "qkv", "embeddings": "replica"}
}
_LONG_NAMES: Mapping[ShortDtype, str] = {"fp32": "float32", "bf16": "bfloat16"}
# The least that a whole number may be, and an example.
_COUNTS: Mapping[str, tuple[int, int]] = {
    "heads": (1, 8),
    "rank": (1, 16),
    "refresh": (0, 1),
    "full_rank_steps": (0, 1000),
    "overlap": (0, 2),
    "stagger": (1, 4),
    "verify_every": (1, 100),
    "shard": (1, 2),
}
_CHOICES: Mapping[str, Any] = {
    "after_merge": AfterMerge,
    "reset_a": ResetA,
    "weight_decay": WeightDecay,
    "replicas": ReplicaPolicy,
    "norms": Norms,
    "embeddings": Embeddings,
    "init": Init,
    "execution": Execution,
    "loss_reduction": LossReduction,
    "wire": Wire,
    "payload": PayloadKind,
    "base": Base,
    "base_copy": BaseCopy,
    "bad_heads": BadHeads,
}

# What fused projections of q, k and v are called that stack them in this order: in timm and torchvision, GPTs that use
# nn.Linear, vit-pytorch, ModernBERT. Others interleave them by attention heads, and thirds of theirs mean nothing.
_FUSED_QKV = "qkv|to_qkv|Wqkv|c_attn"


@dataclass(frozen=True)
class LTEConfig:
    """All choices of a run. Symbols are those of the paper (arXiv 2402.16828).

    Attributes:
        heads: N, the number of heads over all devices, at the start.
        merge_every: T, optimizer steps between two merges; or a schedule, or a function (step, last_merge) -> bool.
        rank: r, the inner width of the factors of every weight without an entry in `rank_pattern`.
        alpha: the numerator of the scale s = alpha / r. None means s = 2 for every weight whatever its rank: with
            it, an ordinary full-rank learning rate works.
        after_merge: "keep" lets factors and moments live on (appendix A.2 and the released code, slightly better);
            "reset" sets B to zero (Algorithm 1).
        reset_a: with "reset", whether A is kept or drawn anew at each merge.
        freeze_a: train B alone, with A as it was drawn (LoRA-FA, arXiv 2308.03303). The layer's input need not be kept
            for the backward of linear layers. Where factors travel at merges, those of a square weight are a quarter as
            much with "keep" (half with `refresh`, as A travels), half with "reset", and no less with
            `reset_a="redraw"`. It is not the paper's algorithm: a head's deltas stay within the r rows of its A, for
            ever with "keep", until the next merge with `reset_a="redraw"`.
        reset_moments: with "reset", the fraction of the factors' optimizer moments that is set to zero at each merge,
            the smallest first: 0 keeps all, 1 zeroes all. The paper found that resetting hurts.
        refresh: how many of the r vectors of each head, a row of A with its column of B, start anew at each merge, in
            turn: the row is drawn anew, the column and the moments of both become zero. What they have learned is in W,
            and the others live on; in layers of a lower rank one at least. So heads of a low rank reach all directions
            of W in time. It is not the paper's.
        weight_decay: what the optimizers' weight decay pulls towards zero, of factored weights: the "factors" of their
            heads, as in the paper's formulation, or the "weights" themselves, at merges, as users mean it; see
            `Decay`. "weights" needs optimizers that decay apart from the gradient, as AdamW does.
        target_modules: patterns of module names; only these are factored. None means every layer that can be.
        exclude_modules: patterns of module names that are never factored.
        rank_pattern: pattern of module names -> rank.
        alpha_pattern: pattern of module names -> alpha.
        split: pattern of module names -> number of parts. A weight that several projections share (a fused qkv) is
            split along its outputs, and each part has factors of its own, as in the paper; by default it is one matrix.
            "qkv" splits in three all linear layers with three times as many outputs as inputs whose name says that they
            are such a projection: qkv, to_qkv, Wqkv or c_attn.
        replicas: what becomes of trainable parameters that are not factored: "merge" averages them at merges,
            "step" averages their gradients at every step, "freeze" leaves them as they are.
        norms: weight and bias of layer, RMS, group and instance norms: "replica" as any other parameter, or
            "vector-scalar" factors of rank 1, B (size, 1) and A (1, 1), the paper's form for vectors. It found both,
            and leaving them out, comparable; replicas have fewer numbers and the same meaning at every size.
        embeddings: "factors" as any other layer, or a "replica", averaged at merges as in the paper.
        init: how A starts: "orthogonal" (semi-orthogonal, scaled by sqrt(in / r) as the released code does),
            "kaiming" or "xavier" (normal).
        seed: heads are drawn from (seed, module name, head number). A checkpoint's counts for the run that goes on from
            it.
        execution: how several local heads share a device: "batched", "sequential", or "auto", which takes batched
            where it is proved right on the first batch.
        loss_reduction: how the user's loss depends on the number of samples: their "mean", or their "sum". With a sum,
            a step on the slices of all local heads returns n times what a head returns, and is divided by n.
        outer_optimizer: makes the optimizer that takes the mean delta of a merge for the negative gradient of a base
            weight, from a list of parameters: `functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)`
            is DiLoCo's. None is the paper's plain sum. Replicas are averaged.
        wire: in how many bits merges send what belongs to factored weights: "float32" (or more, if they are in
            float64), "bfloat16", or "int8" with a scale per row; sums are taken in float32. What rounding loses stays
            in the head that lost it, or is added the next time, but for bfloat16 sums. Replicas travel in float32.
            Here and in `base`, "fp32" and "bf16" are taken for the long names.
        payload: what a merge sends for a weight: the "dense" mean delta, the "factors" of all heads, or "auto",
            whichever is fewer bytes.
        base: what the heads' forwards read of base weights of linear layers, once the first steps have shown which can
            be factored: "float32" is W itself (in its own dtype), "bfloat16", "int8" with a scale per row, or "nf4" in
            blocks of 64 numbers. Merges add in W's own dtype, and round anew. Other weights stay as they are.
        base_copy: where W itself is kept meanwhile: on the "cpu", in the user's own parameter; "sharded", the rows
            dealt out over the devices; or nowhere, with "error-feedback": what rounding took is kept in int8. See
            `Rounded`.
        full_rank_steps: optimizer steps of ordinary training before heads begin, with gradients averaged over devices
            at every step. Replicas keep their optimizer state then.
        grow_heads: optimizer step -> N from that step on, each a multiple of the one before; `heads` is N at the start.
            Between that step and the next, what is not merged is merged, and each head becomes equally many. (To
            wait for the next merge that is due would spare a merge, and grow late, or never, under some schedules.)
        overlap: steps that training goes on while a merge travels. 0 waits for it.
        stagger: into how many groups weights are dealt, which merge in turn, so that the most that is sent at once is
            1/stagger.
        verify_every: after every so many merges, prove with a checksum that base weights are bit-equal on all devices.
            None never does.
        bad_heads: what becomes of heads that are not finite at a merge, in their factors, replicas or optimizer
            moments: "restart" leaves them out of it and lets them start again from the merged weights; "stop" ends
            training with an error that names them, and no weight is changed.
        shard: k, devices that share out one head's work: W, replicas, factors, anchors and moments by rows, with FSDP2.
            1 gives each device the whole model.

    A pattern is a regular expression that must match a name as a whole or its end from a dot on: "fc1" matches
    "blocks.0.mlp.fc1". Names are those of modules, and of parameters where one module has several weights
    ("attention.in_proj_weight"). "fc1|fc2" matches both, and "blocks\\.[01]\\..*" matches all in the first two blocks.

    Raises:
        TypeError, ValueError: a value that can't be, with the rule, the value and the remedy.
        ModuleNotFoundError: `base="nf4"` without bitsandbytes.
    """

    heads: int
    merge_every: int | MergeSchedule | Callable[[int, int], bool] = 10
    rank: int = 16
    alpha: float | None = None
    after_merge: AfterMerge = "keep"
    reset_a: ResetA = "keep"
    freeze_a: bool = False
    reset_moments: float = 0.0
    refresh: int = 0
    weight_decay: WeightDecay = "factors"
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    split: Split = field(default_factory=dict)
    replicas: ReplicaPolicy = "merge"
    norms: Norms = "replica"
    embeddings: Embeddings = "factors"
    init: Init = "orthogonal"
    seed: int = 0
    execution: Execution = "auto"
    loss_reduction: LossReduction = "mean"
    outer_optimizer: MakeOptimizer | None = None
    wire: Wire = "float32"
    payload: PayloadKind = "auto"
    base: Base = "float32"
    base_copy: BaseCopy = "cpu"
    full_rank_steps: int = 0
    grow_heads: Mapping[int, int] = field(default_factory=dict)
    overlap: int = 0
    stagger: int = 1
    verify_every: int | None = None
    bad_heads: BadHeads = "restart"
    shard: int = 1

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "merge_every", "alpha", "reset_moments", "seed"):
            self._set(name, _plain(getattr(self, name)))
        for name in ("wire", "base"):
            value = getattr(self, name)
            if isinstance(value, str):
                self._set(name, _LONG_NAMES.get(cast(ShortDtype, value), value))
        self._check_values()
        self._check_patterns()
        self._check_resets()
        self._check_merges()
        self._check_base()
        self._check_shard()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    def _check_values(self) -> None:
        """Each by itself."""
        for name, (least, example) in _COUNTS.items():
            if name != "verify_every" or self.verify_every is not None:
                _check_count(name, getattr(self, name), f"{name}={example}", least)
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), get_args(choices))
        self._set("grow_heads", check_growth(self.heads, self.grow_heads))
        as_schedule(self.merge_every)
        if self.alpha is not None:
            _check_positive("alpha", self.alpha)
        if not isinstance(self.freeze_a, bool):
            raise TypeError(f"freeze_a must be true or false; received {self.freeze_a!r}. Give freeze_a=True.")
        _check_fraction("reset_moments", self.reset_moments)
        if self.outer_optimizer is not None:
            check_outer_optimizer(self.outer_optimizer)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be a whole number; received {self.seed!r}. Give seed=0, for instance.")

    def _check_patterns(self) -> None:
        if self.target_modules is not None:
            self._set("target_modules", _patterns("target_modules", self.target_modules))
            if not self.target_modules:
                raise ValueError(
                    "target_modules must name at least one module; received an empty list."
                    " Leave it out to factor every layer that can be."
                )
        excluded = () if self.exclude_modules is None else self.exclude_modules
        self._set("exclude_modules", _patterns("exclude_modules", excluded))
        for name in ("rank_pattern", "alpha_pattern", "split"):
            pattern = getattr(self, name)
            pattern = {} if pattern is None else pattern
            if name == "split" and pattern == "qkv":
                continue
            if not isinstance(pattern, Mapping):
                raise TypeError(
                    f"{name} must map patterns of module names to values; received {pattern!r}."
                    f" Give a dict such as {name}={{'fc1': 8}}."
                )
            _patterns(name, list(pattern))
            pattern = {key: _plain(value) for key, value in pattern.items()}
            for key, value in pattern.items():
                if name != "alpha_pattern":
                    example = "rank_pattern={'fc1': 8}" if name == "rank_pattern" else "split={'qkv': 3}"
                    _check_count(f"{name}[{key!r}]", value, example)
                else:
                    _check_positive(f"{name}[{key!r}]", value)
            self._set(name, pattern)

    def _check_resets(self) -> None:
        if self.after_merge == "keep" and (self.reset_a != "keep" or self.reset_moments):
            raise ValueError(
                "reset_a and reset_moments say what a reset does, and after_merge='keep' never resets; received"
                f" reset_a={self.reset_a!r}, reset_moments={self.reset_moments!r}. Give after_merge='reset' as well."
            )
        if self.refresh and self.reset_a == "redraw":
            raise ValueError(
                "refresh draws some vectors of A anew at each merge, and reset_a='redraw' all of them; received"
                f" refresh={self.refresh} with reset_a='redraw'. Leave one of them out."
            )
        rank = max((self.rank, *self.rank_pattern.values()))
        if self.refresh and self.refresh >= rank:
            raise ValueError(
                "refresh must be below the rank, as it is there for some vectors to live on while others start anew;"
                f" received refresh={self.refresh} with rank={rank}. Give a higher rank or a lower refresh, or"
                " after_merge='reset' and reset_a='redraw' for all vectors."
            )

    def _check_merges(self) -> None:
        """What travels, and when."""
        forgetting = "after_merge='reset'" if self.after_merge == "reset" else "refresh" if self.refresh else None
        if self.payload == "factors" and self.wire != "float32" and forgetting:
            raise ValueError(
                f"With {forgetting} factors are sent in full precision alone, as it forgets what rounding"
                f" took from them; received payload='factors' and wire={self.wire!r}. Give payload='dense', or"
                " wire='float32'."
            )
        if self.overlap and self.after_merge == "reset":
            raise ValueError(
                "Heads that train while a merge travels need anchors, which after_merge='reset' has none of; received"
                f" overlap={self.overlap}. Give after_merge='keep' or overlap=0."
            )
        if self.overlap and self.refresh:
            raise ValueError(
                "Vectors that start anew when a merge lands would lose what they have learned since it started;"
                f" received refresh={self.refresh} with overlap={self.overlap}. Give refresh=0 or overlap=0."
            )
        schedule = as_schedule(self.merge_every)
        for name in ("overlap", "stagger"):
            if isinstance(schedule, Every) and getattr(self, name) > schedule.period:
                raise ValueError(
                    f"{name} must be at most a period, so that a merge is done when the next one is due; received"
                    f" {getattr(self, name)} with merge_every={self.merge_every}."
                    f" Give {name}={schedule.period}, or a longer period."
                )

    def _check_base(self) -> None:
        if self.base == "float32" and self.base_copy != "cpu":
            raise ValueError(
                "base_copy says where weights are kept that forwards read in low precision, and with base='float32'"
                f" they read the weights themselves; received base_copy={self.base_copy!r}. Give base='nf4', for"
                " instance, as well."
            )
        if self.overlap and self.base_copy == "sharded":
            raise ValueError(
                "Where the rows of weights are sharded, devices have to meet when a merge lands; received"
                f" overlap={self.overlap}, which is there to wait for nobody. Give base_copy='cpu' or overlap=0."
            )
        check_kernels(self.base)

    def _check_shard(self) -> None:
        plain = {
            "payload": ("auto", "dense"),
            "wire": ("float32", "bfloat16"),
            "base": ("float32",),
            "reset_moments": (0,),
            "refresh": (0,),
            "outer_optimizer": (None,),
            "full_rank_steps": (0,),
            "overlap": (0,),
            "grow_heads": ({},),
            "freeze_a": (False,),
        }
        others = [name for name, values in plain.items() if getattr(self, name) not in values]
        if self.shard > 1 and others:
            received = ", ".join(f"{name}={getattr(self, name)!r}" for name in others)
            raise ValueError(
                f"Devices that share out a head can't do all that others can; received shard={self.shard} with"
                f" {received}. Leave {'these' if len(others) > 1 else 'it'} out, or give shard=1."
            )

    def local_heads(self, world_size: int) -> int:
        """Heads per device, n = N / world_size.

        Args:
            world_size: devices, or with `shard` groups of them.

        Raises:
            ValueError: the devices don't divide the heads, or devices that share out a head have several.
        """
        if self.shard > 1 and self.heads != world_size:
            raise ValueError(
                f"With shard=k a group of k devices has one head; received heads={self.heads} for {world_size} groups"
                f" of {self.shard} devices. Give heads={world_size}, or heads=None."
            )
        if self.heads % world_size:
            above = -(-self.heads // world_size) * world_size
            raise ValueError(
                f"heads must be a multiple of the number of devices; received heads={self.heads} on {world_size}"
                f" devices. Give heads={above}, or heads=None for one per device."
            )
        return self.heads // world_size

    @property
    def decays_weights(self) -> bool:
        """Whether weight decay pulls W, and not the factors."""
        return self.weight_decay == "weights"

    def heads_at(self, step: int) -> int:
        """N after so many optimizer steps."""
        return max((n for s, n in self.grow_heads.items() if s <= step), default=self.heads)

    @property
    def most_heads(self) -> int:
        """N in the end."""
        return max(self.grow_heads.values(), default=self.heads)

    def rank_of(self, *names: str) -> int:
        """The rank r of the factors of a weight, by the names of its module and its own."""
        return next((r for p, r in self.rank_pattern.items() if matches(p, *names)), self.rank)

    def scale_of(self, *names: str) -> float:
        """The scale s = alpha / r of a weight."""
        alpha = next((a for p, a in self.alpha_pattern.items() if matches(p, *names)), self.alpha)
        return 2.0 if alpha is None else alpha / self.rank_of(*names)

    def parts_of(self, *names: str, shape: Sequence[int]) -> int:
        """Into how many parts a weight of this shape is split."""
        if isinstance(self.split, str):
            stacked = len(shape) == 2 and shape[0] == 3 * shape[1]
            return 3 if stacked and matches(_FUSED_QKV, *names) else 1
        return next((n for p, n in self.split.items() if matches(p, *names)), 1)

    def excludes(self, *names: str) -> bool:
        """Whether the user takes a weight out."""
        return any(matches(p, *names) for p in self.exclude_modules)

    def targets(self, *names: str) -> bool:
        """Whether the user's targets name a weight; they name all if there are none."""
        return self.target_modules is None or any(matches(p, *names) for p in self.target_modules)


def preset_settings(preset: Preset | None) -> dict[str, Any]:
    """The settings of a preset by name, or none.

    Raises:
        ValueError: there is no such preset.
    """
    if preset is None:
        return {}
    _check_choice("preset", preset, get_args(Preset))
    return dict(PRESETS[preset])


def matches(pattern: str, *names: str) -> bool:
    """Whether a pattern matches one of the names as a whole, or its end from a dot on."""
    # The pattern stays a regular expression of its own, so that its flags and back references mean what they say.
    expression = re.compile(pattern)
    return any(
        expression.fullmatch(name, start)
        for name in names
        for start in (0, *(i + 1 for i, character in enumerate(name) if character == "."))
    )


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{name} must hold patterns of module names as strings; received {pattern!r}."
                " Give a name such as 'fc1', or several in a list."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{name} must hold regular expressions; received {pattern!r} ({error})."
                " Escape special characters with a backslash."
            ) from error
    return patterns


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _check_count(name: str, value: Any, example: str, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; received {value!r}. Give {example}, for instance.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; received {value}. Give {example}, for instance.")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; received {value!r}. Leave it out for a scale of 2.")
    if not 0 < value < math.inf or (isinstance(value, int) and value > sys.float_info.max):
        raise ValueError(f"{name} must be finite and above 0; received {value}. Leave it out for a scale of 2.")


def _check_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction from 0 to 1; received {value!r}. Give 0 to keep all, 1 for none.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        some = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {some}; received {value!r}. Give {name}={choices[0]!r}, for instance.")
