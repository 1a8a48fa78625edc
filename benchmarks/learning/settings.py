"""What a run of the study is made of: nested dictionaries as they stand in a table's file, filled up and checked."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from benchmarks.learning.tasks import TASKS

Settings = dict[str, Any]

# The study's own: what the package takes by default may change while results are kept.
LTE: Settings = {
    "heads": 8,
    "merge_every": 10,
    "rank": 16,  # or a fraction of the model's width: "1/4"
    "scale": 2.0,  # s; or "width", sqrt(in / r) for each weight
    "after_merge": "keep",
    "reset_a": "keep",
    "reset_moments": 0.0,
    "refresh": 0,
    "freeze_a": False,
    "weight_decay": "factors",  # what that of the optimizer pulls towards zero
    "target_modules": None,
    "exclude_modules": [],
    "rank_pattern": {},
    "split": {},
    "replicas": "merge",
    "norms": "replica",
    "init": "orthogonal",
    "execution": "auto",
    "full_rank_steps": 0,
    "overlap": 0,
    "stagger": 1,
    "outer": None,  # arguments of torch.optim.SGD: {lr: 0.7, momentum: 0.9, nesterov: true}
}
METHODS: dict[str, Settings] = {
    "full": {},
    "lte": LTE,
    # ReLoRA (arXiv 2307.05695): one pair of factors, trained data-parallel, merged and drawn anew now and then.
    "relora": {
        **LTE,
        "heads": 1,
        "merge_every": 100,
        "after_merge": "reset",
        "reset_a": "redraw",
        "reset_moments": 0.9,
        "init": "kaiming",
        "restart_warmup": 10,  # steps of linear warm-up after each merge
    },
    # Full-rank replicas that meet now and then: without `outer`, post-local SGD; with it, DiLoCo.
    "local": {"heads": 8, "merge_every": 10, "full_rank_steps": 0, "outer": None},
    # GaLore (arXiv 2403.03507), by galore-torch.
    "galore": {"rank": 16, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
}
DEFAULTS: Settings = {
    "task": {"name": "vit"},
    "method": {"name": "full"},
    "lr": 3e-3,
    "weight_decay": 0.05,
    "betas": [0.9, 0.999],
    "batch": 256,  # of all heads together
    "epochs": 3.0,
    "warmup": 50,  # steps
    "clip": None,  # the gradient's largest norm, for each head
    "evaluations": 3,  # evenly spaced, the last one at the end
    "ranks": False,  # whether effective ranks are measured at evaluations, see training.py
    "devices": 8,  # for bytes sent by methods that have no heads
    "extra": {},  # of candidates.py
}


def resolved(settings: Mapping[str, Any]) -> Settings:
    """Settings with all defaults filled in.

    Raises:
        ValueError: a name that is not known, with those that are.
    """
    found = _filled("settings", DEFAULTS, {k: v for k, v in settings.items() if k not in ("task", "method")})
    for key, kinds in (("task", {name: task.options for name, task in TASKS.items()}), ("method", METHODS)):
        own = {**DEFAULTS[key], **settings.get(key, {})}
        name = own.pop("name")
        if name not in kinds:
            raise ValueError(f"{key}.name must be one of {sorted(kinds)}; received {name!r}.")
        found[key] = {"name": name, **_filled(f"{key} {name}", kinds[name], own)}
    rank = found["method"].get("rank")
    if isinstance(rank, str):
        found["method"]["rank"] = max(1, int(Fraction(rank) * found["task"]["dim"]))
    if found["extra"] and found["method"]["name"] not in ("lte", "relora"):
        raise ValueError(
            f"extra is for methods with heads; received {found['extra']} for {found['method']['name']}. Give it in the"
            " `set` of grids with heads, not in `base`."
        )
    found["epochs"] = float(found["epochs"])
    return found


def digest(settings: Mapping[str, Any]) -> str:
    """A name for settings. What equals its default is left out, so that results outlast settings that are new."""
    full = resolved(settings)
    kinds = {"task": TASKS[full["task"]["name"]].options, "method": METHODS[full["method"]["name"]]}
    told: Settings = {k: v for k, v in full.items() if k not in kinds and v != DEFAULTS[k]}
    for key, defaults in kinds.items():
        told[key] = {k: v for k, v in full[key].items() if k == "name" or v != defaults[k]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def changed(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Which of the settings that both have differ, by their dotted names."""
    flat, other = flattened(settings), flattened(others)
    return [key for key in flat if key in other and flat[key] != other[key]]


def flattened(settings: Mapping[str, Any]) -> Settings:
    """One level of dotted names: {"method": {"rank": 8}} as {"method.rank": 8}."""
    flat: Settings = {}
    for key, value in settings.items():
        if key in ("task", "method", "extra"):
            flat.update({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            flat[key] = value
    return flat


def with_changes(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    """A copy of settings in which dotted names have new values."""
    new = copy.deepcopy(dict(settings))
    for name, value in changes.items():
        outer, dot, inner = name.partition(".")
        if dot:
            new.setdefault(outer, {})[inner] = value
        elif outer in ("task", "method", "extra") and isinstance(value, Mapping):
            new[outer] = {**new.get(outer, {}), **value}
        elif outer in ("task", "method"):
            # Another task or method has options of its own.
            new[outer] = {"name": value}
        else:
            new[outer] = value
    return new


def _filled(where: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise ValueError(f"{where} has {sorted(defaults)}; received {unknown}.")
    return copy.deepcopy({**defaults, **given})
