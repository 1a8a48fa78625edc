"""What users of `Trainer(strategy=LTEStrategy(...))` can count on, on one device."""

from __future__ import annotations

import copy
import datetime
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, WeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from lightning_lte import Every, LTECallback, LTEStrategy, MergeSchedule
from lightning_lte.advice import PAGE
from lightning_lte.report import excluding
from tests.modules import RANK, Module, Net, Recorder, clone, loader, make_data, make_net, sgd, trainer


def strategy(heads: int | None = 4, merge_every: Any = 3, **choices: Any) -> LTEStrategy:
    return LTEStrategy(heads, merge_every, rank=RANK, **choices)


def assert_untouched(module: Module, before: dict[str, Tensor] | None = None) -> None:
    """Nothing of ours is left in the module: classes, attributes, keys."""
    for layer in module.modules():
        assert type(layer).__module__.startswith(("torch.", "tests.", "lightning.")), type(layer)
        assert "_lte" not in layer.__dict__
        assert "Headed" not in "".join(c.__name__ for c in type(layer).__mro__)
    assert list(module.state_dict()) == list(Module().state_dict())
    for name, value in (before or {}).items():
        assert torch.equal(module.state_dict()[name], value), name


# ---- the module stays the user's


def test_after_fit_nothing_is_left_but_other_weights() -> None:
    module = Module()
    before, layers = clone(module.state_dict()), list(module.modules())
    t = trainer(strategy(), max_epochs=1)
    t.fit(module, loader())
    assert_untouched(module)
    assert list(module.modules()) == layers
    assert not torch.equal(module.net.first.weight, before["net.first.weight"])
    held = {p for group in t.optimizers[0].param_groups for p in group["params"]}
    assert held == set(module.parameters())
    assert "clip_grad_by_norm" not in t.precision_plugin.__dict__
    # The same module and trainer go on in an ordinary way.
    trainer("auto", max_epochs=1).fit(module, loader())
    trainer(strategy(), max_epochs=1).fit(module, loader())


def test_during_fit_the_module_shows_its_own_keys_parameters_and_classes() -> None:
    seen: list[Any] = []

    def look(_: Trainer, module: Module) -> None:
        twin = copy.deepcopy(module.net)
        loaded = pickle.loads(pickle.dumps(module.net))
        for other in (twin, loaded):
            assert type(other.first) is nn.Linear and "_lte" not in other.first.__dict__
            assert list(other.state_dict()) == list(make_net().state_dict())
        assert isinstance(module.net.first, nn.Linear) and type(module.net.first).__name__ == "Linear"
        assert [n for n, _ in module.named_parameters()] == [n for n, _ in Module().named_parameters()]
        assert all(p.requires_grad for p in module.parameters())
        seen.append(module)

    trainer(strategy(), max_epochs=1, callbacks=[Recorder(look)]).fit(Module(), loader())
    assert seen


def test_heads_act_inside_training_step_alone() -> None:
    class Sampler(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            x, _ = make_data(5)
            assert self.training
            with torch.no_grad():
                plain = make_net()
                plain.load_state_dict(self.net.state_dict())
                torch.testing.assert_close(self.net(x), plain(x), rtol=0, atol=0)
                acting = self.trainer.strategy.explorer.injection.factors
                assert any((f.effective(0) - f.weight).abs().max() > 0 for f in acting.values())

    # Five rows, which no four heads divide, and learned deltas that must not show.
    trainer(strategy(merge_every=100), max_epochs=1).fit(Sampler(), loader())


def test_groups_and_schedulers_carry_over() -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            opt = torch.optim.AdamW(
                [
                    {"params": [self.net.first.weight, self.net.first.bias], "lr": 0.1, "weight_decay": 0.3},
                    {
                        "params": [
                            *self.net.norm.parameters(),
                            *self.net.second.parameters(),
                            *self.net.out.parameters(),
                        ]
                    },
                ],
                lr=0.01,
            )
            scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Inside(Callback):
        def on_before_optimizer_step(self, t: Any, m: Any, optimizer: Any) -> None:
            factors = {f.name: f for f in t.strategy.explorer.injection.factors.values()}
            assert optimizer.param_groups[0]["params"][0] is factors["net.first"].A
            assert any(p is factors["net.second"].B for p in optimizer.param_groups[1]["params"])

    def look(t: Trainer, module: Module) -> list[Any]:
        groups = t.optimizers[0].param_groups
        assert {p for group in groups for p in group["params"]} == set(module.parameters())
        return [(g["lr"], g["weight_decay"]) for g in groups]

    recorder = Recorder(look)
    trainer(strategy(), max_epochs=1, callbacks=[recorder, Inside()]).fit(Scheduled(), loader())
    assert recorder.seen == [
        [(pytest.approx(0.1 * 0.5**k), 0.3), (pytest.approx(0.01 * 0.5**k), 0.01)] for k in (1, 2, 3)
    ] or recorder.seen == [
        [(pytest.approx(0.1 * 0.5**k), 0.3), (pytest.approx(0.01 * 0.5**k), 0.01)] for k in (0, 1, 2)
    ]


def test_the_report_gives_every_parameter_a_role_and_a_reason() -> None:
    s = strategy()
    with pytest.raises(RuntimeError, match="fit"):
        s.report()
    module = Module()
    trainer(s, max_steps=1).fit(module, loader())
    entries = {e.name: e for e in s.report().entries}
    assert list(entries) == [n for n, _ in module.named_parameters()]
    assert entries["net.first.weight"].role == "factored"
    assert entries["net.out.weight"].role == "replica" and "thin" in entries["net.out.weight"].reason
    assert all(e.reason for e in entries.values())
    assert "batched" in str(s.report())


def test_who_merges_outside_of_fit_is_told_where_to() -> None:
    with pytest.raises(RuntimeError, match=r"received a call of merge\(\) outside of it\. Call it in a hook"):
        strategy().merge()


def test_one_device_has_no_process_group_no_launcher_and_no_shuffled_loader() -> None:
    seen: list[Tensor] = []

    class Watcher(Callback):
        def on_train_batch_start(self, t: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            assert not dist.is_initialized()
            seen.append(batch[0])

    s = strategy(None)
    t = trainer(s, max_epochs=1, callbacks=[Watcher()])
    assert t.strategy.launcher is None
    t.fit(Module(), loader())
    assert torch.equal(torch.cat(seen), make_data(48)[0])
    assert s.config.heads == 1


def test_notebooks_are_ordinary_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    connector = "lightning.pytorch.trainer.connectors.accelerator_connector._IS_INTERACTIVE"
    monkeypatch.setattr(connector, True)
    trainer(strategy(), max_steps=1).fit(Module(), loader())
    with pytest.raises(Exception, match="interactive"):
        trainer(strategy(), devices=2)


def test_the_name_lte_is_registered() -> None:
    t = trainer("lte", max_steps=1)
    assert isinstance(t.strategy, LTEStrategy)
    t.fit(
        Module(nn.Linear(100, 50, dtype=torch.float64)), DataLoader([(torch.randn(100).double(), 1)] * 4, batch_size=2)
    )
    assert t.strategy.report().entries[0].role == "factored"


# ---- the end of training


class Interrupt(Callback):
    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
        if t.global_step == self.step:
            raise self.error


class Slow(Callback):
    """Uses up `max_time` at a step."""

    def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
        if t.global_step == 4:
            for callback in t.callbacks:
                if hasattr(callback, "_duration"):
                    callback._duration = 0.0


def ends(how: str) -> tuple[dict[str, Any], type[BaseException] | None]:
    return {
        "max_steps": ({"max_steps": 4}, None),
        "max_epochs": ({"max_epochs": 1, "limit_train_batches": 4}, None),
        "max_time": ({"max_time": datetime.timedelta(hours=1), "callbacks": [Slow()]}, None),
        "early stopping": (
            {
                "max_epochs": 9,
                "limit_train_batches": 2,
                "callbacks": [EarlyStopping("loss", patience=1, min_delta=1e9)],
            },
            None,
        ),
        "KeyboardInterrupt": ({"max_epochs": 1, "callbacks": [Interrupt(KeyboardInterrupt(), 4)]}, SystemExit),
        "exception": ({"max_epochs": 1, "callbacks": [Interrupt(OSError("disk full"), 4)]}, OSError),
    }[how]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "how", ["max_steps", "max_epochs", "max_time", "early stopping", "KeyboardInterrupt", "exception"]
)
def test_however_training_ends_all_that_was_learned_is_merged(how: str) -> None:
    arguments, error = ends(how)
    deltas: list[dict[str, Tensor]] = []

    class Last(Callback):
        """Keeps what the merge has to add to W, as of the last step."""

        def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
            factors = t.strategy.explorer.injection.factors.values()  # type: ignore[attr-defined]
            deltas.append({f.name: torch.stack([f.effective(h) for h in range(4)]).mean(0) for f in factors})

    module = Module(optimizer=sgd)
    t = trainer(strategy(merge_every=100), **{**arguments, "callbacks": [Last(), *arguments.get("callbacks", [])]})
    if error is None:
        t.fit(module, loader(160))
    else:
        with pytest.raises(error):
            t.fit(module, loader(160))
    assert len(deltas) == 4
    for name, expected in deltas[-1].items():
        torch.testing.assert_close(module.get_submodule(name).weight.detach(), expected, rtol=1e-10, atol=1e-12)
    assert_untouched(module)


def test_the_last_merge_does_not_need_the_callback() -> None:
    class Remover(Callback):
        def on_train_start(self, t: Trainer, module: Any) -> None:
            t.callbacks[:] = []  # as Lightning's tuners do

    module = Module()
    before = clone(module.state_dict())
    trainer(strategy(merge_every=100), max_steps=2, callbacks=[Remover()]).fit(module, loader())
    assert not torch.equal(module.net.first.weight, before["net.first.weight"])


def test_a_schedule_object_decides_when() -> None:
    class AtPowersOfTwo(MergeSchedule):
        def due(self, step: int, last_merge: int) -> bool:
            return step & (step - 1) == 0

    merges = Recorder(lambda t, _: t.strategy.explorer.clock.merges)
    trainer(strategy(merge_every=AtPowersOfTwo()), max_steps=9, callbacks=[merges]).fit(Module(), loader(160))
    assert merges.seen == [1, 2, 2, 3, 3, 3, 3, 4, 4]
    merges = Recorder(lambda t, _: t.strategy.explorer.clock.merges)
    trainer(strategy(merge_every=Every(2)), max_steps=5, callbacks=[merges]).fit(Module(), loader(160))
    assert merges.seen == [0, 1, 1, 2, 2]


def test_accumulated_batches_count_as_one_step() -> None:
    merges = Recorder(lambda t, _: t.strategy.explorer.clock.merges)
    trainer(strategy(merge_every=2), max_epochs=1, accumulate_grad_batches=2, callbacks=[merges]).fit(
        Module(), loader(160)
    )
    assert merges.seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_a_head_that_is_not_finite_is_left_out_and_the_user_is_told() -> None:
    class Breaker(Callback):
        def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
            if t.global_step == 2:
                with torch.no_grad():
                    next(iter(t.strategy.explorer.injection.factors.values())).A[1, 0, 0] = float("nan")  # type: ignore[attr-defined]

    module = Module()
    with pytest.warns(UserWarning, match="heads 1 were not finite"):
        trainer(strategy(), max_steps=5, callbacks=[Breaker()]).fit(module, loader(160))
    assert all(p.isfinite().all() for p in module.parameters())


# ---- batches


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
@pytest.mark.parametrize("last", [8, 6, 2])
def test_the_smaller_last_batch_is_neither_lost_nor_in_the_way(execution: str, last: int) -> None:
    module = Module()
    steps = Recorder(lambda t, _: t.global_step)
    t = trainer(strategy(execution=execution), max_epochs=2, callbacks=[steps], limit_val_batches=0)
    t.fit(module, loader(32 + last, 16))
    assert steps.seen == [1, 2, 3, 4, 5, 6]
    sizes = module.batch_sizes[-4:] if last < 8 or execution == "sequential" else module.batch_sizes[-1:]
    assert sum(sizes) == max(last, 4)


def test_a_dataset_smaller_than_a_batch_trains() -> None:
    trainer(strategy(), max_epochs=2).fit(Module(), loader(10, 16))


def test_a_batch_that_the_heads_do_not_divide_is_refused() -> None:
    module = Module()
    before = clone(module.state_dict())
    with pytest.raises(
        ValueError, match=r"4 heads; received a batch size of 6\. Give a multiple of 4, such as batch_size=8"
    ):
        trainer(strategy(), max_epochs=1).fit(module, loader(48, 6))
    assert_untouched(module, before)


def test_a_loader_whose_batches_differ_in_size_is_dealt_out_as_it_comes() -> None:
    sizes = [[0, 1, 2, 3, 4, 5], list(range(8)), list(range(8, 12)), [1, 2, 3]]
    s, module = strategy(), Module()
    trainer(s, max_epochs=1).fit(module, DataLoader(loader(48).dataset, batch_sampler=sizes))
    assert s.explorer is None and "proved on the first batch" in s.report().notes[-1]
    # In turn; a forward for all, after a trial that leaves no trace; another; in turn, and one sample twice.
    assert module.batch_sizes == [2, 2, 1, 1, 8, 4, 1, 1, 1, 1]


class Tokens(Sampler):
    """Batches of 8 samples, or of fewer, whose size is said to be that of other things."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        yield from (list(range(start, start + 8)) for start in range(0, 48, 8))

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("batch_size", [3, 30, 1001])
def test_a_batch_sampler_may_count_other_things_than_samples(batch_size: int) -> None:
    s, module = strategy(), Module()
    trainer(s, max_epochs=1).fit(module, DataLoader(loader(48).dataset, batch_sampler=Tokens(batch_size)))
    assert "proved on the first batch" in s.report().notes[-1] and module.batch_sizes[-6:] == [8] * 6


def test_a_batch_sampler_that_counts_samples_is_believed() -> None:
    sampler = BatchSampler(SequentialSampler(range(48)), 6, drop_last=False)
    with pytest.raises(ValueError, match="received a batch size of 6"):
        trainer(strategy(), max_epochs=1).fit(Module(), DataLoader(loader(48).dataset, batch_sampler=sampler))


class Several(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [super(Several, self).training_step(own, batch_idx) for own in batch.values()]
        return torch.stack(losses).mean()


@pytest.mark.parametrize("sizes", [(8, 16), (2, 8)])  # two samples are as many as tensors in a batch
def test_loaders_of_different_batch_sizes_are_refused(sizes: tuple[int, int]) -> None:
    module = Several()
    before = clone(module.state_dict())
    words = rf"several loaders must have one size; received batch sizes \[{sizes[0]}, {sizes[1]}\].*split_batch"
    with pytest.raises(ValueError, match=words):
        trainer(strategy(heads=2), max_steps=1).fit(module, {str(n): loader(48, n) for n in sizes})
    assert_untouched(module, before)


def test_loaders_of_one_batch_size_are_dealt_out_together() -> None:
    """As are those that have no more than that."""
    for loaders in ({"a": loader(48, 8), "b": loader(16, 8)}, {"a": loader(48, 8), "b": loader(8, 16)}):
        s, module = strategy(), Several()
        trainer(s, max_steps=1).fit(module, loaders)
        assert "proved on the first batch" in s.report().notes[-1] and module.batch_sizes[-2:] == [8, 8]


def test_the_report_is_printed_where_the_heads_divide_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(LTEStrategy, "_say", lambda self, text: said.append(text))
    batches = [[0, 1, 2, 3, 4, 5], list(range(6, 12))]
    trainer(strategy(), max_epochs=2).fit(Module(), DataLoader(loader(48).dataset, batch_sampler=batches))
    assert len(said) == 1 and "LTE trains through 4 heads" in said[0]


# ---- bad input


class OneArgument(Module):
    def split_batch(self, batch: Any) -> Any:
        return batch


class Flag(Module):
    def __init__(self) -> None:
        super().__init__()
        self.split_batch = True


@pytest.mark.parametrize(
    ("module", "received"), [(OneArgument, r"split_batch\(batch.*\).*"), (Flag, "split_batch = True")]
)
def test_a_split_batch_for_something_else_is_refused(module: type[Module], received: str) -> None:
    own = module()
    before = clone(own.state_dict())
    with pytest.raises(TypeError, match=rf"`split_batch\(self, batch, heads\)`.*{received}\. .*another name"):
        trainer(strategy(), max_steps=1).fit(own, loader())
    assert_untouched(own, before)
    trainer(strategy(heads=1), max_steps=1).fit(own, loader())  # where nobody asks for it


class FromTheLoader(Module):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        (x, y), _, _ = next(dataloader_iter)
        return torch.nn.functional.cross_entropy(self.net(x), y)


def test_a_step_that_takes_batches_from_the_loader_has_one_head_per_device() -> None:
    module = FromTheLoader()
    with pytest.raises(
        TypeError, match=r"received training_step\(dataloader_iter.*\. Take `batch`.*one head per device"
    ):
        trainer(LTEStrategy(2, 3, rank=RANK), max_steps=2).fit(module, loader())
    assert type(module.net.first) is torch.nn.Linear
    trainer(LTEStrategy(1, 3, rank=RANK), max_steps=2).fit(module, loader())


@pytest.mark.parametrize(
    ("choices", "error", "words"),
    [
        ({"heads": 0}, ValueError, ["heads must be at least 1", "received 0"]),
        ({"heads": 2.5}, TypeError, ["heads must be a whole number", "2.5"]),
        ({"merge_every": 0}, ValueError, ["merge_every must be at least 1", "received 0"]),
        ({"merge_every": "10"}, TypeError, ["merge_every", "'10'"]),
        ({"rank": 0}, ValueError, ["rank must be at least 1", "received 0"]),
        ({"rank": True}, TypeError, ["rank must be a whole number", "True"]),
        ({"after_merge": "forget"}, ValueError, ["after_merge", "'keep', 'reset'", "'forget'"]),
        ({"replicas": "none"}, ValueError, ["replicas", "'none'"]),
        ({"target_modules": ["("]}, ValueError, ["target_modules", "'('"]),
        ({"alpha": -1}, ValueError, ["alpha", "-1"]),
    ],
)
def test_values_that_cannot_be_are_refused_at_once(
    choices: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        LTEStrategy(**choices)
    for word in words:
        assert word in str(raised.value)


class Blind(Module):
    def configure_optimizers(self) -> Any:
        return sgd(make_net().parameters())


class Frozen(Module):
    def configure_optimizers(self) -> Any:
        opt = sgd(self.parameters())
        self.requires_grad_(False)
        return opt


class Without(Module):
    def configure_optimizers(self) -> Any:
        return None


class NewtonLike(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class RowWise(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


@pytest.mark.parametrize(
    ("module", "choices", "words"),
    [
        (Module, {"target_modules": ["nope", "first", "norm"]}, ["'nope' matches no", "'norm' matches only LayerNorm"]),
        (Module, {"exclude_modules": ["typo"]}, ["exclude_modules 'typo' matches no module"]),
        (Module, {"rank_pattern": {"typo": 4}}, ["rank_pattern 'typo' matches no module"]),
        (Module, {"target_modules": ["out"]}, ["one weight that can be factored", "no smaller: net.out.weight"]),
        (Blind, {}, ["held by an optimizer"]),
        (Frozen, {}, ["requires a gradient"]),
        (Without, {}, ["held by an optimizer"]),
        (NewtonLike, {}, ["received LBFGS"]),
        (RowWise, {}, ["received Adafactor"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_module_is_touched(
    module: type[Module], choices: dict[str, Any], words: list[str]
) -> None:
    own = module()
    before = clone(own.state_dict())
    with pytest.raises(ValueError) as raised:
        trainer(strategy(**choices), max_epochs=1).fit(own, loader())
    for word in words:
        assert word in str(raised.value)
    assert_untouched(own, before)


def test_mps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(strategy(), max_epochs=1)
    t.strategy.parallel_devices = [torch.device("mps")]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="MPS"):
        t.fit(Module(), loader())


def test_a_trainer_of_the_other_package_is_told_what_is_wrong() -> None:
    other = pytest.importorskip("pytorch_lightning")
    with pytest.raises(Exception, match=r"takes `from lightning_lte\.pytorch_lightning import LTEStrategy`"):
        other.Trainer(strategy=strategy(), accelerator="cpu", devices=1)


def test_arguments_of_the_ddp_wrapper_are_said_to_be_without_effect() -> None:
    with pytest.warns(UserWarning, match="find_unused_parameters"):
        LTEStrategy(4, find_unused_parameters=True)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        opt.step()


@pytest.mark.parametrize(("heads", "execution"), [(1, "auto"), (4, "batched")])
def test_manual_optimization_trains(heads: int, execution: str) -> None:
    merges = Recorder(lambda t, _: t.strategy.explorer.clock.merges)
    module = Manual()
    trainer(strategy(heads, execution=execution), max_epochs=1, callbacks=[merges]).fit(module, loader(16 * 4 + 6, 16))
    assert merges.seen == [0, 0, 1, 1, 1]
    automatic = Module()
    if heads == 1:
        trainer(strategy(1), max_epochs=1).fit(automatic, loader(16 * 4 + 6, 16))
        torch.testing.assert_close(clone(module.state_dict()), clone(automatic.state_dict()), rtol=0, atol=0)


# ---- silent wrong answers


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(16, 16, bias=False)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.third(torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))))


def test_tied_weights_are_replicas() -> None:
    s = strategy()
    trainer(s, max_steps=4).fit(Module(Tied().double()), loader(160))
    entry = next(e for e in s.report().entries if e.name == "net.second.weight")
    assert entry.role == "replica" and "tied" in entry.reason


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same(execution: str, reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = checkpoint(lambda t: torch.tanh(self.second(torch.tanh(self.norm(t)))), x, use_reentrant=reentrant)
            return self.out(y)

    class Same(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))

    states = []
    for kind in (Checkpointed, Same):
        module = Module(make_net(kind), sgd)
        trainer(strategy(execution=execution), max_steps=7).fit(module, loader(160))
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=1e-10, atol=1e-12)


# ---- other parts of Lightning


def test_weight_averaging_sees_merged_weights() -> None:
    callback = WeightAveraging()
    module = Module()
    trainer(strategy(), max_epochs=2, callbacks=[callback], num_sanity_val_steps=0).fit(module, loader(160), loader())
    assert_untouched(module)


def test_the_learning_rate_finder_runs_and_puts_everything_back(tmp_path: Path) -> None:
    class Tunable(Module):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module = Tunable()
    before = clone(module.state_dict())
    t = trainer(strategy(), max_steps=20, default_root_dir=tmp_path, logger=False)
    found = Tuner(t).lr_find(module, loader(160), num_training=8)
    assert found is not None and len(found.results["lr"]) == 8
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name
    t.fit(module, loader(160))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true", "16-true"])
def test_precisions_train(precision: Any) -> None:
    class Cast(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.net(x.to(self.net.out.weight.dtype)).float(), y)

    module = Cast(Net(), sgd)
    before = clone(module.state_dict())
    t = trainer(strategy(merge_every=2), max_steps=4, precision=precision)
    t.fit(module, loader(160))
    assert not torch.equal(before["net.first.weight"], module.net.first.weight.to(before["net.first.weight"].dtype))
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_step_that_returns_nothing_is_skipped() -> None:
    class Sometimes(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    for execution in ("batched", "sequential"):
        trainer(strategy(execution=execution), max_epochs=1).fit(Sometimes(), loader(160))


def test_an_output_of_several_heads_is_one() -> None:
    class Outputs(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.net(batch[0])
            return {"loss": cross_entropy(logits, batch[1]), "logits": logits.detach(), "mean": logits.mean().detach()}

    seen: list[Any] = []

    class Watcher(Callback):
        def on_train_batch_end(self, t: Any, m: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs)

    trainer(strategy(execution="sequential"), max_steps=1, callbacks=[Watcher()]).fit(Outputs(), loader())
    assert seen[0]["logits"].shape == (16, 3) and seen[0]["mean"].shape == (4,) and seen[0]["loss"].dim() == 0


def test_importing_the_package_is_enough_in_a_fresh_process() -> None:
    code = (
        "import lightning_lte; from lightning.pytorch import Trainer;"
        "print(type(Trainer(strategy='lte', accelerator='cpu', devices=1, logger=False).strategy).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("LTEStrategy")


# ---- what was found by attacking the package


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"merge_evry": 1}, "received merge_evry=1. Did you mean merge_every?"),
        ({"bucket_cap": 1}, "Did you mean bucket_cap_mb?"),
        ({"wholly_unknown": 1}, "Leave it out"),
    ],
)
def test_unknown_arguments_are_refused_and_the_closest_is_named(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        LTEStrategy(4, **choices)


@pytest.mark.filterwarnings("error")
def test_defaults_of_the_ddp_wrapper_are_not_warned_of() -> None:
    """As command lines fill them in."""
    LTEStrategy(4, find_unused_parameters=False, bucket_cap_mb=None, static_graph=False, process_group_backend="gloo")


def test_iterators_are_taken_as_what_they_hold() -> None:
    names = ("first", "second")
    s = LTEStrategy(4, exclude_modules=(n for n in names[:1]), target_modules=map(str, names))  # type: ignore[arg-type]
    assert s.config.exclude_modules == ("first",) and s.config.target_modules == names


def test_numbers_of_numpy_are_numbers() -> None:
    s = LTEStrategy(np.int64(8), np.int32(5), rank=np.int64(4), alpha=np.float32(8))  # type: ignore[arg-type]
    assert (s.config.heads, s.config.merge_every, s.config.rank, s.config.alpha) == (8, 5, 4, 8.0)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.batch_norm(self.first(x))))))


@pytest.mark.parametrize("last", [1, 2, 4, 6])
def test_batch_norm_bears_a_small_last_batch(last: int) -> None:
    trainer(strategy(), max_epochs=1).fit(Module(make_net(Normed)), loader(16 * 2 + last))


@pytest.mark.parametrize("execution", ["auto", "batched", "sequential"])
@pytest.mark.parametrize("output", [{"logits": 1}, {}])
def test_an_output_without_a_loss_is_refused_as_ever(execution: str, output: dict[str, Any]) -> None:
    class Without(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    with pytest.raises(Exception, match="'loss' key needs to be present"):
        trainer(strategy(execution=execution), max_steps=1).fit(Without(), loader())


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    class Vector(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    with pytest.raises(RuntimeError, match="must be a scalar; received shapes"):
        trainer(strategy(execution="sequential"), max_steps=1).fit(Vector(), loader())


def test_what_heads_log_in_turn_is_logged_once_and_for_all_of_them() -> None:
    class Logging(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, _ = batch
            self.log("mean", x.mean())
            self.log("largest", x.max(), reduce_fx="max")
            self.log_dict({"rows": float(len(x))}, on_step=True, on_epoch=True, batch_size=len(x))
            return super().training_step(batch, batch_idx)

    seen = Recorder(lambda t, _: dict(t.callback_metrics))
    t = trainer(strategy(execution="sequential"), max_epochs=1, callbacks=[seen])
    t.fit(Logging(), loader(16))
    x, _ = make_data(16)
    assert float(seen.seen[0]["mean"]) == pytest.approx(float(x.mean()))
    assert float(seen.seen[0]["largest"]) == pytest.approx(float(x.max()))
    assert float(seen.seen[0]["rows_step"]) == 4


def test_heads_that_take_turns_log_inside_an_except_block_as_ever() -> None:
    try:
        raise KeyError
    except KeyError:
        t = trainer(strategy(execution="sequential"), max_steps=1)
        t.fit(Module(), loader(16))
    assert "loss" in t.callback_metrics


def test_an_interruption_in_the_turn_of_a_head_leaves_the_users_own_parameters() -> None:
    class Interrupted(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            explorer = self.trainer.strategy.explorer
            if self.trainer.global_step == 2:

                def interrupt(head: int | None) -> None:
                    del explorer.select
                    raise OSError

                explorer.select = interrupt  # on the way back
            return super().training_step(batch, batch_idx)

    module = Interrupted()
    own = dict(module.named_parameters())
    with pytest.raises(OSError):
        trainer(strategy(execution="sequential"), max_steps=4).fit(module, loader(160))
    assert all(p is own[name] for name, p in module.named_parameters())


@pytest.mark.parametrize("where", ["strategy", "callback"])
def test_errors_while_training_ends_with_an_error_leave_a_clean_module(where: str) -> None:
    class Bad(Callback):
        def on_train_batch_end(self, t: Any, m: Any, *args: Any) -> None:
            if where == "strategy":
                next(iter(t.strategy.explorer.injection.factors.values())).name = 3  # so that the last merge fails
            raise OSError("first")

        def on_exception(self, *args: Any) -> None:
            if where == "callback":
                raise KeyError("second")

    module = Module()
    with pytest.raises((OSError, KeyError)), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*val_dataloader.*")
        # This small net on small batches is told of at the start.
        warnings.filterwarnings("ignore", f".*{re.escape(PAGE)}.*")
        trainer(strategy(), max_epochs=1, callbacks=[Bad()]).fit(module, loader())
    assert_untouched(module)


def test_the_callback_minds_evaluation_with_other_strategies_no_more() -> None:
    trainer("auto", callbacks=[LTECallback()]).validate(Module(), loader())


def test_two_callbacks_are_one() -> None:
    t = trainer(strategy(), max_steps=1, callbacks=[LTECallback(), LTECallback()])
    t.fit(Module(), loader())
    assert sum(isinstance(c, LTECallback) for c in t.callbacks) == 1


def test_empty_inputs_of_a_layer_are_let_through() -> None:
    class Empty(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert self.first(x[:, :0].new_zeros(len(x), 0, 10)).shape == (len(x), 0, 16)
            return super().forward(x)

    for execution in ("batched", "sequential"):
        trainer(strategy(execution=execution), max_steps=1).fit(Module(make_net(Empty)), loader())


def test_remedies_work_for_names_of_any_kind() -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("weird name[0]", nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            odd = self._modules["weird name[0]"]
            assert odd is not None
            if self.training:
                self.calls = getattr(self, "calls", 0) + 1
                if self.calls > 5:
                    odd.weight.data *= 0.9  # type: ignore[operator, union-attr]
            return self.out(odd(torch.tanh(self.first(x))))

    s = strategy(1, 2)
    trainer(s, max_steps=9).fit(Module(make_net(Odd)), loader(160))
    assert s.report().entry("net.weird name[0].weight").role == "replica"
    assert (
        excluding(["net.weird name[0]", "net.first"]) == r"exclude_modules=['net.first', 'net\\.weird\\ name\\[0\\]']"
    )
    choices = eval(f"dict({excluding(['net.weird name[0]'])})")
    s = strategy(1, 2, **choices)
    trainer(s, max_steps=9).fit(Module(make_net(Odd)), loader(160))
    assert s.report().entry("net.weird name[0].weight").reason == "named by exclude_modules"
