"""Users are told once, at the start, of settings that are known to go badly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lte import LTEConfig, LTEStrategy, advice
from lightning_lte.injection import inject
from tests.modules import Module, Net, loader, make_data, make_net, trainer
from tests.processes import run

SIZE, SAMPLES = "at least the width of the widest layer", "at least 2 samples in a step"


def said(
    strategy: Any, batch_size: int = 32, module: Module | None = None, data: Any = None, **kwargs: Any
) -> list[str]:
    """What a short run warns of, by us."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = trainer(strategy, **{"max_epochs": 2, **kwargs})
        t.fit(
            Module() if module is None else module,
            loader(2 * batch_size * t.world_size, batch_size) if data is None else data,
        )
    assert all(w.category is UserWarning for w in caught if advice.PAGE in str(w.message))
    return [str(w.message) for w in caught if advice.PAGE in str(w.message)]


def test_the_page_is_there() -> None:
    assert (Path(__file__).parents[1] / advice.PAGE).is_file()


def test_ranks_that_fall_short_of_the_widest_layer_are_told_of_once() -> None:
    """`second` is 16 x 16; `first` is 16 x 10 and no wider than 10."""
    [words] = said(LTEStrategy(4, 3, rank=3))
    assert SIZE in words and "received heads=4 of rank 3, and net.second has 16 inputs and 16 outputs" in words


@pytest.mark.parametrize(
    "choices",
    [
        {"rank": 4},
        {"heads": 8, "rank": 2},
        {"rank": 3, "target_modules": "first"},
        {"rank": 3, "rank_pattern": {"second": 4}},
    ],
    ids=str,
)
def test_ranks_that_suffice_are_not_told_of(choices: dict[str, Any]) -> None:
    assert said(LTEStrategy(**{"heads": 4, **choices}), batch_size=64) == []


def test_a_preset_whose_sizes_suffice_is_not_told_of() -> None:
    module = Module(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5))
    assert said(LTEStrategy(8, preset="paper", rank=2), batch_size=64, module=module) == []


def test_the_rank_that_counts_is_the_layers_own() -> None:
    [words] = said(LTEStrategy(4, rank=5, rank_pattern={"first": 2}))
    assert "heads=4 of rank 2, and net.first has 10 inputs and 16 outputs" in words


def test_parts_groups_and_vectors_are_as_wide_as_they_are() -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(12, 36), "conv": nn.Conv1d(8, 8, 3, groups=2), "norm": nn.LayerNorm(40)})
    config = LTEConfig(4, rank=3, split={"qkv": 3}, rank_pattern={"conv": 1}, norms="vector-scalar")
    factors = inject(net, list(net.parameters()), config).factors.values()
    assert {f.name for f in factors} == {"qkv", "conv", "norm", "norm.bias"}
    assert advice.of_size(factors, 4) is None
    words = advice.of_size(factors, 3)
    assert words is not None and "qkv has 12 inputs and 12 outputs" in words


def test_the_defaults_on_one_device_are_told_of() -> None:
    """One head of rank 16, which is a single LoRA that merges."""
    module = Module(nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3)).double())
    [words] = said("lte", module=module)
    assert "received heads=1 of rank 16, and net.2 has 64 inputs and 64 outputs" in words
    assert "Give more heads, a higher rank, or refresh=1" in words
    assert said(LTEStrategy(refresh=1), module=module, batch_size=64) == []


def test_small_slices_are_told_of_once() -> None:
    [words] = said(LTEStrategy(4, 3, rank=4), batch_size=4)
    assert SAMPLES in words and "received 1, as 4 samples go to 4 heads of this device" in words


def test_a_head_alone_on_its_device_has_the_whole_batch() -> None:
    assert [SAMPLES in words for words in said(LTEStrategy(1, 3, rank=4), batch_size=1)] == [False, True]
    assert [SAMPLES in words for words in said(LTEStrategy(1, 3, rank=4), batch_size=2)] == [False]


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
def test_slices_of_two_samples_are_not_told_of(execution: Any) -> None:
    assert said(LTEStrategy(4, 3, rank=4, execution=execution), batch_size=8) == []


def test_accumulated_batches_count_together() -> None:
    strategy = dict(heads=4, merge_every=3, rank=4)
    assert said(LTEStrategy(**strategy), batch_size=4, accumulate_grad_batches=2) == []
    assert len(said(LTEStrategy(**strategy), batch_size=4, accumulate_grad_batches=1)) == 1


def test_loaders_without_a_batch_size_count_what_comes() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from (make_data(4, seed=seed) for seed in range(3))

    [words] = said(LTEStrategy(4, 3, rank=4), data=DataLoader(Stream(), batch_size=None))
    assert "received 1, as 4 samples go to 4 heads" in words


class Sealed:
    """A batch that only its own module can open."""

    def __init__(self, seed: int) -> None:
        self.inside = make_data(4, seed=seed)


def test_a_batch_that_cannot_be_counted_trains_as_ever() -> None:
    class Opening(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch.inside, batch_idx)

    module = Opening()
    data = DataLoader([Sealed(seed) for seed in range(3)], batch_size=None)  # type: ignore[arg-type]
    assert [SIZE in words for words in said(LTEStrategy(1, 3, rank=4), module=module, data=data)] == [True]
    assert not torch.equal(module.net.first.weight, make_net().first.weight)


def test_heads_that_begin_later_are_told_of_then() -> None:
    assert len(said(LTEStrategy(4, 3, rank=4, full_rank_steps=2), batch_size=4, max_steps=2)) == 0
    assert len(said(LTEStrategy(4, 3, rank=4, full_rank_steps=2), batch_size=4, max_steps=4)) == 1


def test_heads_that_grow_are_told_of_by_their_number() -> None:
    told = [words for words in said(LTEStrategy(2, 1, rank=2, grow_heads={2: 4}), max_steps=4) if SIZE in words]
    assert all(f"received heads={heads} of rank 2" in words for heads, words in zip((2, 4), told, strict=True))


def _on_two_devices() -> list[str]:
    return said(LTEStrategy(4, 3, rank=3), batch_size=2, devices=2)


def test_one_device_tells_for_all() -> None:
    first, second = run(_on_two_devices, 2, group=False)
    assert [SIZE in first[0], SAMPLES in first[1]] == [True, True] and len(first) == 2
    assert "received 1, as 2 samples go to 2 heads of this device" in first[1]
    assert second == []


def test_warnings_as_errors_leave_a_clean_module() -> None:
    module = Module()
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=SIZE):
        warnings.filterwarnings("error", f".*{SIZE}.*")
        trainer(LTEStrategy(4, 3, rank=3), max_steps=1).fit(module, loader())
    assert {type(m) for m in module.net.modules()} == {type(m) for m in make_net(Net).modules()}
