"""Devices that share out one head's work: groups of real processes over gloo, with FSDP2, against the literal oracle.

A group of k devices is one of the oracle's workers: its batch is those of the k devices together.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils.data import DistributedSampler

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport, product
from lightning_lte.sharding import Sharding, blocks, check
from lightning_lte.shards import local, whole
from tests.modules import (
    CLASSES,
    IN,
    RANK,
    Kinds,
    Module,
    Net,
    Recorder,
    adamw,
    after_backward,
    clone,
    loader,
    make_data,
    make_net,
    needs_fully_shard,
    sgd,
    train_step,
    trainer,
)
from tests.oracle import Oracle
from tests.processes import run

pytestmark = needs_fully_shard

CPU = torch.device("cpu")
# The bias of keys has no gradient but rounding, which Adam makes steps of.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}
PER_DEVICE = 4
SHAPES = [pytest.param(2, 2, id="2x2"), pytest.param(1, 2, id="1x2")]


class Blocks(nn.Module):
    """A small transformer-like net: blocks that are shared out by themselves, and sizes that two doesn't divide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 11)
        self.enter = nn.Linear(IN, 11)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(11), nn.Linear(11, 15), nn.Tanh(), nn.Linear(15, 11)) for _ in range(2)
        )
        self.gain = nn.Parameter(torch.ones(11))
        self.norm = nn.LayerNorm(11)
        self.out = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x) + self.table((x[:, 0].abs() * 6).long().clamp(0, 12))
        for block in self.blocks:
            y = y + self.gain * block(y)
        return self.out(self.norm(y))


class Checkpointed(Blocks):
    """The forwards of blocks, and FSDP's hooks with them, run again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        for block in self.blocks:
            y = y + self.gain * torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
        return self.out(self.norm(y))


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "net": (Net, IN),
    "blocks": (Blocks, IN),
    "checkpointed": (Checkpointed, IN),
    "kinds": (Kinds, 2 * 6 * 6 + 5),
}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False, weight_decay=0.1),
}


def groups_of(k: int) -> Transport:
    return Transport.sharing(k, dist.get_world_size(), dist.get_rank())


def shared_out(k: int, kind: str = "net", optimizer: str = "sgd", **choices: Any) -> tuple[Sharding, Explorer, Any]:
    """A net that groups of k devices share out, with one head for each group, and its optimizer."""
    transport = groups_of(k)
    model = make_net(KINDS[kind][0])
    if dist.get_rank() > 0:
        for p in model.parameters():
            nn.init.zeros_(p)  # rank 0's weights count
    sharding = Sharding(model, transport, CPU)
    opt = OPTIMIZERS[optimizer](model.parameters())
    config = LTEConfig(transport.world_size, rank=RANK, shard=k, **choices)
    return sharding, Explorer(model, opt, config, transport), opt


def trains_as_the_oracle(
    k: int, kind: str, optimizer: str, clip: float | None, choices: dict[str, Any]
) -> list[Tensor]:
    groups, rank = dist.get_world_size() // k, dist.get_rank()
    make, width = KINDS[kind]
    plain = make_net(make)
    sharding, explorer, opt = shared_out(k, kind, optimizer, **choices)
    # All heads on one device start with the same factors as those of groups do.
    alone = copy.deepcopy(plain)
    config = LTEConfig(groups, rank=RANK, execution="batched", **choices)
    starts = Explorer(alone, sgd(alone.parameters()), config).injection.factors.values()
    oracle = Oracle(
        plain,
        {f.name: f.A.detach().clone() for f in starts},
        scale=2.0,
        period=config.merge_every,  # type: ignore[arg-type]
        after_merge=config.after_merge,
        replicas=config.replicas,
        optimizer=OPTIMIZERS[optimizer],
        clip=clip,
        decay=0.01 * 0.1 if config.weight_decay == "weights" else 0.0,
    )
    model, merged_weights = explorer.module, []
    factored = [entry.name for entry in explorer.report.entries if entry.role == "factored"]
    for step in range(8):
        x, y = make_data(PER_DEVICE * k * groups, seed=step, width=width)
        batches = list(zip(x.chunk(k * groups), y.chunk(k * groups), strict=True))
        with explorer.heads():
            loss = cross_entropy(model(batches[rank][0]), batches[rank][1])
        with explorer.backward():
            loss.backward()
        record = after_backward(explorer, opt, clip)
        before = copy.deepcopy(oracle.merged)
        oracle.step(list(zip(x.chunk(groups), y.chunk(groups), strict=True)), cross_entropy)
        for f in explorer.injection.factors.values():
            torch.testing.assert_close(f.effective(0), oracle.worker_weight(rank // k, f.name), **TOLERANCE)
        for replica in explorer.injection.replicas:
            expected = oracle.workers[rank // k].replicas[replica.name].detach()
            torch.testing.assert_close(whole(replica.param.detach()), expected, **TOLERANCE)
        if record is not None:
            changes = [oracle.merged.get_parameter(n) - before.get_parameter(n) for n in factored]
            if not oracle.decay:  # it is the norm of what heads have learned alone
                norm = float(torch.cat([c.flatten() for c in changes]).norm())
                assert record.delta_norm == pytest.approx(norm, rel=1e-9)
            merged_weights += [local(p.detach()).clone() for p in model.parameters()]
            for name, value in sharding.state_dict().items():
                torch.testing.assert_close(value, oracle.merged.state_dict()[name], **TOLERANCE)
    assert oracle.merges == explorer.merges >= 2
    explorer.finish()
    sharding.undo([opt])
    assert not any(isinstance(m, torch.distributed.fsdp.FSDPModule) for m in model.modules())
    for name, value in oracle.finish().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, **TOLERANCE)
    return merged_weights


def assert_equal_across_groups(seen: list[list[Tensor]], k: int) -> None:
    for rank, own in enumerate(seen):
        for value, first in zip(own, seen[rank % k], strict=True):
            assert torch.equal(value, first)


@pytest.mark.parametrize(("groups", "k"), SHAPES)
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize(("kind", "optimizer"), [("net", "sgd"), ("blocks", "adamw"), ("kinds", "adamw")])
def test_groups_train_as_the_oracle(groups: int, k: int, kind: str, optimizer: str, after_merge: str) -> None:
    choices = {"merge_every": 3, "after_merge": after_merge}
    seen = run(trains_as_the_oracle, groups * k, k, kind, optimizer, None, choices)
    assert_equal_across_groups(seen, k)


def trains_in_plain_operations(k: int, after_merge: str) -> list[Tensor]:
    """As with autocast, which is not exact enough to tell."""
    with patch.object(product, "applies", lambda *_: False):
        return trains_as_the_oracle(k, "blocks", "adamw", None, {"merge_every": 3, "after_merge": after_merge})


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_plain_operations_train_as_the_oracle(after_merge: str) -> None:
    assert_equal_across_groups(run(trains_in_plain_operations, 2, 2, after_merge), 2)


@pytest.mark.parametrize(
    ("kind", "optimizer", "clip", "choices"),
    [
        pytest.param("blocks", "sgd", 0.05, {"merge_every": 1}, id="clipped"),
        pytest.param("net", "adamw", 0.05, {"merge_every": 3, "replicas": "step"}, id="step-clipped"),
        pytest.param("net", "adamw", None, {"merge_every": 3, "replicas": "freeze"}, id="freeze"),
        pytest.param("checkpointed", "sgd", None, {"merge_every": 3, "exclude_modules": "table"}, id="checkpointed"),
        pytest.param("blocks", "fused", None, {"merge_every": 3, "norms": "vector-scalar"}, id="vector-scalar-fused"),
        pytest.param("net", "adagrad", None, {"merge_every": 3}, id="adagrad"),
        pytest.param("net", "loop", None, {"merge_every": 3}, id="no-foreach"),
        pytest.param("kinds", "sgd", None, {"merge_every": 3, "split": {"linear1": 2}}, id="split"),
        pytest.param("net", "loop", None, {"merge_every": 3, "weight_decay": "weights"}, id="weight-decay"),
    ],
)
def test_choices_equal_the_oracle(kind: str, optimizer: str, clip: float | None, choices: dict[str, Any]) -> None:
    assert_equal_across_groups(run(trains_as_the_oracle, 4, 2, kind, optimizer, clip, choices), 2)


# ---- through Lightning


class Shared(Module):
    """A module whose step uses parameters in blocks, outside of them, and of its own."""

    def __init__(self, optimizer: Callable[..., Any] = sgd) -> None:
        super().__init__(make_net(Blocks), optimizer)
        self.shift = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]) + self.shift, batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]) + self.shift, batch[1]), sync_dist=True)


def plain_model() -> Module:
    """What the oracle's workers train: the module, as a function of x."""

    class Plain(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.shift

    return Plain()


BATCHES, DEVICES = 10, 4


def fits_as_the_oracle(folder: str, optimizer: str, clip: float | None, accumulate: int) -> dict[str, Any]:
    module = Shared(OPTIMIZERS[optimizer])
    plain = plain_model()
    strategy = LTEStrategy(merge_every=3, rank=RANK, shard=2)
    look = Recorder(lambda t, m: {n: (type(p).__name__, p.requires_grad) for n, p in m.named_parameters()})
    t = trainer(
        strategy,
        devices=DEVICES,
        max_epochs=1,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
        val_check_interval=4,
        logger=CSVLogger(folder),
        callbacks=[look],
    )
    t.fit(module, loader(BATCHES * DEVICES * PER_DEVICE, PER_DEVICE), loader(16, 2))
    alone = Explorer(plain, sgd(plain.parameters()), LTEConfig(2, rank=RANK, execution="batched"))
    starts = {f.name: f.A.detach().clone() for f in alone.injection.factors.values()}
    alone.close()
    oracle = Oracle(
        plain,
        starts,
        scale=2.0,
        period=3,
        optimizer=OPTIMIZERS[optimizer],
        clip=clip,
        accumulate=accumulate,
    )
    x, y = make_data(BATCHES * DEVICES * PER_DEVICE)
    # Lightning's sampler deals out the samples.
    dealt = [torch.tensor(list(DistributedSampler(x, DEVICES, d))).split(PER_DEVICE) for d in range(DEVICES)]  # type: ignore[arg-type]
    for a, b, c, d in zip(*dealt, strict=True):
        first, second = torch.cat([a, b]), torch.cat([c, d])
        oracle.step([(x[first], y[first]), (x[second], y[second])], cross_entropy)
    for name, value in oracle.finish().state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, **TOLERANCE)
    assert all(seen == {n: ("DTensor", True) for n, _ in module.named_parameters()} for seen in look.seen)
    assert type(module) is Shared and "training_step" not in vars(module)
    assert all(type(p) is nn.Parameter for p in module.parameters())
    for m in module.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks and "_is_fsdp_managed_module" not in vars(m)
    scores = t.validate(module, loader(16, 2), verbose=False)[0]
    return {"val_loss": scores["val_loss"], "weights": clone(module.state_dict())}


@pytest.mark.parametrize(
    ("optimizer", "clip", "accumulate"), [("sgd", 0.05, 1), ("adamw", None, 2), ("adamw", 0.05, 1)]
)
def test_fit_equals_the_oracle(tmp_path: Path, optimizer: str, clip: float | None, accumulate: int) -> None:
    seen = run(fits_as_the_oracle, DEVICES, str(tmp_path), optimizer, clip, accumulate, group=False)
    module = plain_model()
    module.load_state_dict(seen[0]["weights"])
    [(x, y)] = loader(16, 16)
    expected = float(cross_entropy(module(x), y))
    for own in seen:
        assert own["val_loss"] == pytest.approx(expected, rel=1e-9)
        for name, value in own["weights"].items():
            assert torch.equal(value, seen[0]["weights"][name])


class Dropping(Shared):
    """Draws from the random stream of each device."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(nn.functional.dropout(self(batch[0]), 0.2) + self.shift, batch[1])


def resumes(folder: str, after_merge: str) -> dict[str, Any]:
    strategy = partial(LTEStrategy, merge_every=3, rank=RANK, shard=2, after_merge=after_merge)
    options: dict[str, Any] = {"devices": DEVICES, "max_epochs": 2, "enable_checkpointing": True}
    data = loader(4 * DEVICES * PER_DEVICE, PER_DEVICE)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    seed_everything(1, verbose=False)
    straight = Dropping(adamw)
    at = Recorder(lambda t, m: t.strategy.lightning_module_state_dict() if t.global_step == 4 else None)
    t = trainer(strategy(), callbacks=[keep, at], **options)
    t.fit(straight, data)
    t.save_checkpoint(f"{folder}/end.ckpt")
    path = f"{folder}/step=4.ckpt"
    saved = torch.load(path, weights_only=True)
    torch.manual_seed(2)  # another stream, with samples dealt out as before
    resumed = Dropping(adamw)
    trainer(strategy(), callbacks=[keep], **options).fit(resumed, data, ckpt_path=path)
    # The plain state_dict goes into a plain module.
    seen: list[Any] = [whole_seen for whole_seen in at.seen if whole_seen]
    Dropping.load_from_checkpoint(path, weights_only=True)
    return {
        "straight": clone(straight.state_dict()),
        "resumed": clone(resumed.state_dict()),
        "saved": saved["state_dict"],
        "at": seen[0],
        "types": {type(v).__name__ for v in saved["state_dict"].values()},
        "end": torch.load(f"{folder}/end.ckpt", weights_only=True),
    }


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_a_run_that_is_resumed_in_the_middle_of_a_period_is_the_same_to_the_bit(
    tmp_path: Path, after_merge: str
) -> None:
    seen = run(resumes, DEVICES, str(tmp_path), after_merge, group=False, timeout_s=100)
    for own in seen:
        assert own["types"] == {"Tensor"} and own["saved"].keys() == Shared().state_dict().keys()
        for name, value in own["straight"].items():
            assert torch.equal(value, own["resumed"][name]), name
            assert torch.equal(value, own["end"]["state_dict"][name]), name
            assert torch.equal(seen[0]["at"][name], own["saved"][name]), name
        assert own["end"]["lte"]["devices"] == 2 and len(own["end"]["lte"]["generators"]) == DEVICES


def goes_on_alone(path: str) -> None:
    """Two devices that have a head each go on with what groups of two have saved."""
    saved = torch.load(path, weights_only=True)["lte"]
    found: list[bool] = []

    class Look(Callback):
        def on_train_start(self, t: Any, m: Any) -> None:
            for f in t.strategy.explorer.injection.factors.values():
                found.extend(torch.equal(f.A[0], saved["factors"][f.name]["A"][[t.global_rank]][0]) for _ in "A")
                found.append(torch.equal(f.B[0].detach(), saved["factors"][f.name]["B"][t.global_rank]))

    t = trainer(LTEStrategy(merge_every=3, rank=RANK), devices=2, max_steps=6, callbacks=[Look()])
    t.fit(Dropping(adamw), loader(64, 8), ckpt_path=path)
    assert found and all(found) and t.global_step == 6


def test_devices_with_a_head_each_go_on_from_groups(tmp_path: Path) -> None:
    run(resumes, DEVICES, str(tmp_path), "keep", group=False, timeout_s=100)
    run(goes_on_alone, 2, str(tmp_path / "step=4.ckpt"), group=False)


# ---- what each device holds


def holds(k: int) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """(numbers here, numbers altogether) of all that is kept between steps."""
    _, explorer, opt = shared_out(k, "blocks", "adamw", merge_every=3)
    x, y = make_data(PER_DEVICE)
    train_step(explorer, explorer.module, opt, (x, y))
    kept: dict[str, Tensor] = dict(explorer.module.named_parameters())
    for f in explorer.injection.factors.values():
        assert f.anchor_A is not None and f.anchor_B is not None
        kept |= {f"{f.name}.A": f.A, f"{f.name}.B": f.B, f"{f.name}.A'": f.anchor_A, f"{f.name}.B'": f.anchor_B}
    for name, param in explorer.substitution.held(opt).items():
        kept |= {f"{name}.{key}": v for key, v in explorer.substitution.states(opt)[param].items() if key != "step"}
    gradients = {n for n, p in explorer.module.named_parameters() if p.grad is not None}
    return {n: (local(v).untyped_storage().nbytes() // v.element_size(), v.numel()) for n, v in kept.items()}, gradients


@pytest.mark.parametrize("k", [2, 4])
def test_a_device_keeps_one_kth_of_the_rows_of_all_there_is(k: int) -> None:
    for sizes, gradients in run(holds, k, k):
        assert len(sizes) > 60 and not gradients
        for name, (here, altogether) in sizes.items():
            # Rows are rounded up; the fewest that are shared out are the 3 of A.
            assert here <= -(-altogether // k) + 15, name
        assert sum(here for here, _ in sizes.values()) < 1.3 / k * sum(n for _, n in sizes.values())


def keeps_for_a_backward(autocast: bool) -> list[tuple[int, ...]]:
    """Shapes of what a forward of blocks keeps."""
    _, explorer, _ = shared_out(2, "blocks", merge_every=3)
    seen: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(PER_DEVICE, 11, dtype=torch.float64)
    with explorer.heads(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with saved_tensors_hooks(pack, lambda t: t):
            explorer.module.blocks[0](x)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_no_whole_factors_are_kept_from_a_forward_to_its_backward(autocast: bool) -> None:
    # Those of linear layers from 11 to 15 and back, also stacked with differences from anchors.
    whole_factors = {(r, n) for r in (RANK, 2 * RANK) for n in (11, 15)}
    for seen in run(keeps_for_a_backward, 2, autocast):
        assert seen
        assert not {shape[-2:] for shape in seen} & (whole_factors | {(n, r) for r, n in whole_factors})


# ---- heads that are not finite, and merges in other ways


def poisoned(what: str) -> tuple[tuple[int, ...], list[Tensor]]:
    """One device of the second group finds what it holds of its head not finite."""
    sharding, explorer, opt = shared_out(2, "blocks", "adamw", merge_every=3)
    restarted: tuple[int, ...] = ()
    for step in range(6):
        x, y = make_data(4 * PER_DEVICE, seed=step)
        train_step(explorer, explorer.module, opt, (x.chunk(4)[dist.get_rank()], y.chunk(4)[dist.get_rank()]))
        if explorer.last_record is not None and step == 2:
            restarted = explorer.last_record.restarted
        if step == 1 and dist.get_rank() == 3:
            f = next(iter(explorer.injection.factors.values()))
            held = {"factor": f.B, "moment": explorer.substitution.states(opt)[f.B]["exp_avg_sq"]}
            held["replica"] = next(iter(explorer.injection.replicas)).param
            local(held[what].detach())[..., 0] = torch.nan
    # The next merge finds nothing more.
    assert explorer.last_record is not None and explorer.last_record.restarted == ()
    explorer.finish()
    sharding.undo([opt])
    return restarted, [p.detach().clone() for p in explorer.module.parameters()]


@pytest.mark.parametrize("what", ["factor", "moment", "replica"])
def test_a_head_that_is_bad_on_one_device_is_so_on_all_of_its_group(what: str) -> None:
    first, *others = run(poisoned, 4, what)
    assert first[0] == (1,) and all(p.isfinite().all() for p in first[1])
    for restarted, weights in others:
        assert restarted == first[0]
        assert all(torch.equal(a, b) for a, b in zip(weights, first[1], strict=True))


def merges_otherwise(choices: dict[str, Any]) -> list[Tensor]:
    sharding, explorer, opt = shared_out(2, "blocks", "adamw", merge_every=3, **choices)
    for step in range(7):
        x, y = make_data(4 * PER_DEVICE, seed=step)
        train_step(explorer, explorer.module, opt, (x.chunk(4)[dist.get_rank()], y.chunk(4)[dist.get_rank()]))
    explorer.finish()
    sharding.undo([opt])
    return [p.detach().clone() for p in explorer.module.parameters()]


def test_merges_in_groups_and_in_fewer_bits() -> None:
    plain = run(merges_otherwise, 4, {"verify_every": 1})[0]
    for choices in ({"wire": "bfloat16", "verify_every": 1}, {"stagger": 3, "verify_every": 1}):
        first, *others = run(merges_otherwise, 4, choices)
        for own in others:
            assert all(torch.equal(a, b) for a, b in zip(own, first, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
        for a, b in zip(plain, first, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)


# ---- what is refused


@pytest.mark.parametrize(
    "choices",
    [
        {"overlap": 1},
        {"full_rank_steps": 2},
        {"outer_optimizer": torch.optim.SGD},
        {"wire": "int8"},
        {"payload": "factors"},
        {"grow_heads": {5: 4}},
        {"freeze_a": True},
        {"after_merge": "reset", "reset_moments": 0.5},
    ],
)
def test_what_does_not_go_with_it_is_refused(choices: dict[str, Any]) -> None:
    LTEConfig(2, 3, **choices)
    with pytest.raises(ValueError, match=rf"received shard=2 with .*{list(choices)[-1]}="):
        LTEConfig(2, 3, shard=2, **choices)


def test_a_shard_is_a_count() -> None:
    with pytest.raises(ValueError, match="shard must be at least 1; received 0"):
        LTEConfig(2, 3, shard=0)
    with pytest.raises(ValueError, match=r"shard must divide the number of devices; received shard=2 on 1 devices"):
        trainer(LTEStrategy(shard=2)).fit(Shared(), loader())


class Odd(Blocks):
    def __init__(self, what: str) -> None:
        super().__init__()
        if what == "scalar":
            self.temperature = nn.Parameter(torch.tensor(1.0))
        elif what == "tied":
            self.blocks[1][1].weight = self.blocks[0][1].weight
        elif what == "hook":
            self.gain.register_hook(lambda gradient: gradient)
        elif what == "half":
            self.half = nn.Linear(3, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("scalar", r"without dimensions \(make them torch.zeros\(1\)\): temperature"),
        ("tied", r"used in several blocks: blocks.0.1.weight"),
        ("hook", "with hooks: gain"),
        ("half", "in half precision: half.weight, half.bias"),
    ],
)
def test_parameters_that_cannot_be_shared_out_are_named(what: str, words: str) -> None:
    model = Odd(what)
    with pytest.raises(ValueError, match=words):
        check(model, blocks(model))


def test_blocks_are_members_with_layers_inside() -> None:
    model = Blocks()
    assert blocks(model) == [model.blocks[1], model.blocks[0]]
    nested = nn.Sequential(nn.Sequential(Blocks(), nn.Linear(3, 3)), nn.ModuleList([nn.Linear(3, 3)]))
    inner = nested[0][0]
    assert blocks(nested) == [inner.blocks[1], inner.blocks[0], inner, nested[0]]


class Elsewhere(Blocks):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "past its block":
            x = x + self.blocks[0][1](nn.functional.pad(x, (0, 1)))[:, :IN]
        y = super().forward(x)
        return y + self.enter.weight.sum() if self.what == "as a tensor" else y


def refused(what: str) -> str:
    if what in ("manual", "heads", "precision", "sharded"):
        module = Shared()
        module.automatic_optimization = what != "manual"
        files: Any = "sharded" if what == "sharded" else "gathered"
        strategy = LTEStrategy(2 if what == "heads" else None, shard=2, checkpoint=files)
        options = {"precision": "bf16-true"} if what == "precision" else {}
        with pytest.raises(ValueError) as error:
            trainer(strategy, devices=2, max_steps=1, **options).fit(module, loader())
        assert type(module) is Shared and type(module.shift) is nn.Parameter
        return str(error.value)
    module = Module(make_net(lambda: Elsewhere(what)), sgd)
    with pytest.raises(RuntimeError) as error_there:
        trainer(LTEStrategy(shard=2, rank=RANK), devices=2, max_steps=1).fit(module, loader())
    assert all(type(p) is nn.Parameter for p in module.parameters())
    return str(error_there.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("manual", "received shard=2 and a module in manual optimization"),
        ("heads", "received heads=2 for 1 groups of 2 devices. Give heads=1, or heads=None"),
        ("sharded", "received shard=2 with checkpoint='sharded'. Give checkpoint='gathered'"),
        ("precision", "received precision='bf16-true'"),
        ("as a tensor", "net.enter (it is used outside its layer, too). Give exclude_modules=['net.enter']"),
        ("past its block", "net.blocks.0.1 was called otherwise. Call the block itself"),
    ],
)
def test_what_cannot_be_done_is_refused_on_all_devices(what: str, words: str) -> None:
    for said in run(refused, 2, what, group=False):
        assert words in said, said


class Fail(Callback):
    def __init__(self, only: int | None) -> None:
        self.only = only

    def on_train_batch_end(self, t: Any, *args: Any) -> None:
        if t.global_step == 4 and self.only in (None, t.global_rank):
            raise OSError("the disk is full")


def interrupted(only: int | None) -> tuple[str, list[str], list[str], dict[str, Tensor]]:
    import lightning_lte.strategy as module_under_test

    module_under_test._AGREE_TIMEOUT_S = 2.0
    module, said = Shared(), "nothing"
    t = trainer(LTEStrategy(merge_every=3, rank=RANK, shard=2), devices=2, max_steps=8, callbacks=[Fail(only)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            t.fit(module, loader(320))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
    kinds = sorted({type(p).__name__ for p in module.parameters()})
    weights = clone(module.state_dict()) if kinds == ["Parameter"] else {}
    return said, [str(w.message) for w in caught], kinds, weights


def test_groups_that_are_interrupted_together_give_a_whole_module_back() -> None:
    first, second = run(interrupted, 2, None, group=False)
    assert "disk is full" in first[0] and first[2] == second[2] == ["Parameter"]
    assert all(torch.equal(value, second[3][name]) for name, value in first[3].items())


def test_a_device_that_is_left_alone_says_that_it_has_a_part_only() -> None:
    for said, warned, kinds, _ in run(interrupted, 2, 1, group=False, timeout_s=120):
        assert said != "nothing" and kinds == ["DTensor"]
        assert any("each has its part of the weights alone" in words for words in warned), warned


def uncounted() -> bool:
    """Whether heads that moved on the second device alone, of which the first has no part, are noticed."""
    explorer = shared_out(2)[1]
    if dist.get_rank() == 1:
        f = next(iter(explorer.injection.factors.values()))
        with torch.no_grad():
            local(f.B).add_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explorer._moved_uncounted()


def test_what_a_head_learned_uncounted_is_noticed_by_all_devices_that_share_it_out() -> None:
    assert run(uncounted, 2) == [True, True]


def normalises() -> Tensor:
    transport = groups_of(2)
    model = nn.Sequential(nn.BatchNorm1d(IN), nn.Linear(IN, 12), nn.Linear(12, CLASSES)).double()
    Sharding(model, transport, CPU)
    opt = sgd(model.parameters())
    explorer = Explorer(model, opt, LTEConfig(2, 1, rank=RANK, shard=2), transport)
    x, y = make_data(4 * PER_DEVICE)
    train_step(explorer, model, opt, (x.chunk(4)[dist.get_rank()], y.chunk(4)[dist.get_rank()]))
    return model[0].running_mean.clone()


def test_running_statistics_are_those_of_all_devices() -> None:
    x, _ = make_data(4 * PER_DEVICE)
    for seen in run(normalises, 4):
        torch.testing.assert_close(seen, 0.1 * x.mean(0), rtol=1e-6, atol=1e-7)


def test_older_versions_of_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(RuntimeError, match=r"needs torch 2\.14 or newer.*received torch 2\.9\.1"):
        check(nn.Linear(2, 2), [])
