from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lte import Every, LTEStrategy
from lightning_lte.config import LTEConfig, matches

BAD: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"heads": 0}, ValueError),
    ({"heads": -1}, ValueError),
    ({"heads": 2.0}, TypeError),
    ({"heads": True}, TypeError),
    ({"heads": None}, TypeError),
    ({"rank": 0}, ValueError),
    ({"rank": "16"}, TypeError),
    ({"merge_every": 0}, ValueError),
    ({"merge_every": 2.5}, TypeError),
    ({"merge_every": None}, TypeError),
    ({"alpha": 0}, ValueError),
    ({"alpha": -1.0}, ValueError),
    ({"alpha": float("nan")}, ValueError),
    ({"alpha": float("inf")}, ValueError),
    ({"alpha": "32"}, TypeError),
    ({"alpha": True}, TypeError),
    ({"after_merge": "restart"}, ValueError),
    ({"after_merge": None}, ValueError),
    ({"reset_a": "drop"}, ValueError),
    ({"reset_moments": -0.1}, ValueError),
    ({"reset_moments": 1.1}, ValueError),
    ({"reset_moments": float("nan")}, ValueError),
    ({"reset_moments": True}, ValueError),
    ({"reset_moments": "all"}, ValueError),
    ({"target_modules": []}, ValueError),
    ({"target_modules": [1]}, TypeError),
    ({"target_modules": 5}, TypeError),
    ({"target_modules": ["fc("]}, ValueError),
    ({"exclude_modules": ["*fc"]}, ValueError),
    ({"exclude_modules": [None]}, TypeError),
    ({"rank_pattern": ["fc1"]}, TypeError),
    ({"rank_pattern": {"fc1": 0}}, ValueError),
    ({"rank_pattern": {"fc1": 1.5}}, TypeError),
    ({"rank_pattern": {"fc[": 2}}, ValueError),
    ({"rank_pattern": {3: 2}}, TypeError),
    ({"alpha_pattern": {"fc1": 0}}, ValueError),
    ({"alpha_pattern": {"fc1": None}}, TypeError),
    ({"alpha_pattern": 3}, TypeError),
    ({"replicas": "average"}, ValueError),
    ({"init": "zeros"}, ValueError),
    ({"execution": "parallel"}, ValueError),
    ({"bad_heads": "skip"}, ValueError),
    ({"seed": 1.0}, TypeError),
    ({"seed": True}, TypeError),
    ({"wire": "fp8"}, ValueError),
    ({"payload": "both"}, ValueError),
    ({"norms": "vector"}, ValueError),
    ({"embeddings": "average"}, ValueError),
    ({"split": "fused"}, TypeError),
    ({"loss_reduction": "none"}, ValueError),
    ({"overlap": -1}, ValueError),
    ({"overlap": 1.5}, TypeError),
    ({"overlap": 11}, ValueError),
    ({"stagger": 0}, ValueError),
    ({"stagger": 11}, ValueError),
    ({"verify_every": 0}, ValueError),
    ({"outer_optimizer": 0.7}, TypeError),
    ({"outer_optimizer": len}, TypeError),
    ({"outer_optimizer": list}, TypeError),
    ({"grow_heads": [16]}, TypeError),
    ({"grow_heads": {"100": 16}}, TypeError),
    ({"grow_heads": {100: 16.0}}, TypeError),
    ({"grow_heads": {100: True}}, TypeError),
    ({"grow_heads": {0: 16}}, ValueError),
    ({"grow_heads": {100: 8}}, ValueError),
    ({"grow_heads": {100: 12}}, ValueError),
    ({"grow_heads": {100: 32, 200: 16}}, ValueError),
]


def innermost(value: Any) -> list[Any]:
    """What a message may show of a value: itself, or what in it is wrong."""
    parts = [value]
    if isinstance(value, dict):
        parts += [*value, *value.values()]
    if isinstance(value, list):
        parts += value
    return [text for part in parts for text in (repr(part), str(part))] + (["an empty list"] if value == [] else [])


@pytest.mark.parametrize(("bad", "kind"), BAD, ids=str)
def test_a_value_that_cannot_be_is_refused_with_rule_value_and_remedy(
    bad: dict[str, Any], kind: type[Exception]
) -> None:
    [(argument, value)] = bad.items()
    with pytest.raises(kind) as caught:
        LTEConfig(**{"heads": 8, **bad})
    message = str(caught.value)
    assert re.search(rf"{argument}.* must ", message), message
    assert any(f"received {shown}" in message for shown in innermost(value)), message
    assert re.search(r"\. (Give|Leave|Escape) ", message), message


@pytest.mark.parametrize("name", ["overlap", "stagger"])
def test_what_is_to_be_done_within_a_period_is_held_to_that_of_a_schedule(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at most a period.*merge_every=Every\(5\). Give {name}=5"):
        LTEConfig(8, Every(5), **{name: 6})
    LTEConfig(8, Every(5), **{name: 5})


@pytest.mark.parametrize("bad", [{"reset_a": "redraw"}, {"reset_moments": 0.5}], ids=str)
def test_what_a_reset_does_is_refused_where_nothing_is_reset(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"never resets; received .* Give after_merge='reset'"):
        LTEConfig(heads=8, **bad)
    LTEConfig(heads=8, after_merge="reset", **bad)


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        ({"overlap": 2}, "Give after_merge='keep' or overlap=0"),
        ({"payload": "factors", "wire": "int8"}, "Give payload='dense', or wire='float32'"),
    ],
    ids=str,
)
def test_what_needs_anchors_is_refused_where_there_are_none(bad: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=f"received .* {remedy}"):
        LTEConfig(heads=8, after_merge="reset", **bad)
    LTEConfig(heads=8, **bad)


@pytest.mark.parametrize("argument", ["wire", "base"])
@pytest.mark.parametrize(("short", "long"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_dtypes_may_be_named_as_lightning_does(argument: str, short: str, long: str) -> None:
    given: dict[str, Any] = {argument: short}
    assert getattr(LTEConfig(heads=8, **given), argument) == long
    assert getattr(LTEStrategy(heads=8, **given).config, argument) == long
    with pytest.raises(ValueError, match=f"{argument} must be one of 'float32', .* received 'fp16'"):
        LTEConfig(heads=8, **{**given, argument: "fp16"})


@given(st.integers(1, 64), st.integers(1, 64))
def test_devices_divide_the_heads_or_the_next_number_that_does_is_named(heads: int, devices: int) -> None:
    config = LTEConfig(heads=heads)
    if heads % devices == 0:
        assert config.local_heads(devices) * devices == heads
        return
    with pytest.raises(ValueError, match=rf"multiple .* received heads={heads} on {devices} devices") as caught:
        config.local_heads(devices)
    named = int(re.findall(r"Give heads=(\d+)", str(caught.value))[0])
    assert named > heads and named - heads < devices
    assert LTEConfig(heads=named).local_heads(devices) == named // devices


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fc1", "fc1", True),
        ("fc1", "blocks.0.mlp.fc1", True),
        ("fc1", "blocks.0.mlp.fc12", False),
        ("fc1", "blocks.0.mlp.xfc1", False),
        ("fc1", "fc1.linear", False),
        ("mlp.fc1", "blocks.0.mlp.fc1", True),
        (r"blocks\.[01]\..*", "blocks.1.mlp.fc1", True),
        (r"blocks\.[01]\..*", "blocks.2.mlp.fc1", False),
        (r"blocks\.[01]\..*", "blocks.10.mlp.fc1", False),
        ("fc1|fc2", "mlp.fc2", True),
        ("fc1|fc2", "mlp.fc22", False),
        (r"(a|b)\.\1", "x.a.a", True),
        (r"(a|b)\.\1", "x.a.b", False),
        ("(?i)FC1", "mlp.fc1", True),
        (".*", "anything.at.all", True),
    ],
)
def test_a_pattern_matches_a_whole_name_or_its_end_from_a_dot_on(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def wants(config: LTEConfig, name: str) -> bool:
    return config.targets(name) and not config.excludes(name)


def test_patterns_choose_rank_scale_and_layers() -> None:
    config = LTEConfig(
        heads=4,
        rank=16,
        alpha=64,
        rank_pattern={"fc1": 8, "fc.": 2},
        alpha_pattern={r"blocks\.0\.fc2": 6},
        target_modules="fc[12]",
        exclude_modules=r"blocks\.1\..*",
    )
    assert [config.rank_of(name) for name in ("blocks.0.fc1", "blocks.0.fc2", "head")] == [8, 2, 16]
    assert [config.scale_of(name) for name in ("blocks.0.fc1", "blocks.0.fc2", "head")] == [8, 3, 4]
    assert [wants(config, name) for name in ("blocks.0.fc1", "blocks.1.fc1", "head")] == [True, False, False]


@given(st.integers(1, 512))
def test_without_alpha_the_scale_is_2_whatever_the_rank(rank: int) -> None:
    assert LTEConfig(heads=1, rank=rank).scale_of("any") == 2


def test_everything_is_wanted_unless_the_user_says_otherwise() -> None:
    assert wants(LTEConfig(heads=1), "any.name")


def test_the_seed_is_that_of_seed_everything_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert LTEStrategy(1).config.seed == 17
    assert LTEStrategy(1, seed=3).config.seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert LTEStrategy(1).config.seed == 0


def test_a_config_does_not_change_with_what_it_was_made_from() -> None:
    ranks, targets = {"fc1": 8}, ["fc1"]
    config = LTEConfig(heads=1, rank_pattern=ranks, target_modules=targets)
    ranks["fc1"] = 1
    targets.append("fc2")
    assert config.rank_of("fc1") == 8 and not wants(config, "fc2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
