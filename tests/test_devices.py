"""Several devices: real processes over gloo."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport
from lightning_lte.replicas import average_gradients
from tests.modules import IN, RANK, Module, Net, Recorder, Slices, clone, loader, make_data, make_net, sgd, trainer
from tests.processes import run

COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "gather_object", "scatter", "all_to_all", "barrier",
    "send", "recv",
)  # fmt: skip


def count_collectives(replicas: str) -> list[tuple[int, int, Counter[str]]]:
    counts: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))

    def look(t: Trainer, _: Any) -> tuple[int, int, Counter[str]]:
        return t.global_step, t.strategy.explorer.clock.merges, Counter(counts)  # type: ignore[attr-defined]

    recorder = Recorder(look)
    s = LTEStrategy(4, 3, rank=RANK, replicas=replicas)  # type: ignore[arg-type]
    t = trainer(s, devices=2, max_epochs=1, callbacks=[recorder], gradient_clip_val=0.1)
    t.fit(Module(), loader(16 * 2 * 7, 16))
    return recorder.seen


@pytest.mark.parametrize("replicas", ["merge", "freeze"])
def test_between_merges_no_collective_runs(replicas: str) -> None:
    for seen in run(count_collectives, 2, replicas, group=False):
        assert [merges for _, merges, _ in seen] == [0, 0, 1, 1, 1, 2, 2]
        totals = [sum(counts.values()) for _, _, counts in seen]
        steps = [after - before for before, after in pairwise(totals)]
        assert steps[0] == steps[2] == steps[3] == steps[5] == 0, seen
        assert steps[1] > 0 and steps[4] > 0


def test_averaging_gradients_at_every_step_is_asked_for_explicitly() -> None:
    for seen in run(count_collectives, 2, "step", group=False):
        totals = [sum(counts.values()) for _, _, counts in seen]
        assert all(after > before for before, after in pairwise(totals))


def weights_after_merges(heads: int, execution: str) -> list[dict[str, Tensor]]:
    recorder = Recorder(lambda t, m: clone(m.state_dict()) if t.global_step % 3 == 0 else None)
    s = LTEStrategy(heads, 3, rank=RANK, execution=execution)  # type: ignore[arg-type]
    module = Module(optimizer=sgd)
    if dist.is_initialized() and dist.get_rank() == 1:
        torch.nn.init.zeros_(module.net.first.weight)  # rank 0's weights count
    t = trainer(s, devices=2, max_epochs=1, callbacks=[recorder])
    t.fit(module, loader(16 * 2 * 7, 16, shuffle=True))
    return [*(seen for seen in recorder.seen if seen is not None), clone(module.state_dict())]


@pytest.mark.parametrize(("heads", "execution"), [(2, "auto"), (4, "auto"), (4, "sequential")])
def test_weights_are_bit_equal_on_all_devices_after_every_merge(heads: int, execution: str) -> None:
    first, second = run(weights_after_merges, 2, heads, execution, group=False)
    assert len(first) == 3
    for own, other in zip(first, second, strict=True):
        for name, value in own.items():
            assert torch.equal(value, other[name]), name
    assert not torch.equal(first[0]["net.first.weight"], first[1]["net.first.weight"])


class Followed(Module):
    """With a backbone and a teacher that want no gradient, and are in the optimizer all the same."""

    def __init__(self, follow: str | None, wide: int = 0) -> None:
        super().__init__(optimizer=sgd)
        self.follow = follow
        self.backbone = torch.nn.Linear(IN, wide, bias=False).double().requires_grad_(False)
        torch.nn.init.ones_(self.backbone.weight)
        self.teacher = copy.deepcopy(self.net.norm).requires_grad_(False)

    def on_train_batch_start(self, *_: Any) -> None:
        with torch.no_grad():
            for own, student in zip(self.teacher.parameters(), self.net.norm.parameters(), strict=True):
                if self.follow == "data":
                    own.data = 0.9 * own.data + 0.1 * student.data
                elif self.follow == "in place":
                    own.mul_(0.9).add_(student, alpha=0.1)


def merged_beside_a_backbone(wide: int) -> tuple[list[int], bool]:
    module = Followed(None, wide)
    before = clone(module.backbone.state_dict())
    recorder = Recorder(lambda t, m: t.strategy.last_record and t.strategy.last_record.bytes_sent)
    trainer(LTEStrategy(4, 3, rank=RANK), devices=2, max_steps=7, callbacks=[recorder]).fit(module, loader(320))
    return recorder.seen[3:], all(torch.equal(v, before[k]) for k, v in module.backbone.state_dict().items())


def test_merges_send_nothing_of_what_is_frozen() -> None:
    """A backbone that is not trained, of a module whose parameters are given to the optimizer one and all."""
    without, backbone = (run(merged_beside_a_backbone, 2, wide, group=False) for wide in (0, 1000))
    assert backbone == without and all(alike for _, alike in backbone)


WIDE = 20000


def saved_beside_a_backbone(path: str, devices: int, kind: Any) -> None:
    t = trainer(LTEStrategy(4, 3, rank=RANK, checkpoint=kind), devices=devices, max_steps=4)
    t.fit(Followed("data", WIDE), loader(320))
    t.save_checkpoint(path)


@pytest.mark.parametrize("kind", ["gathered", "sharded"])
@pytest.mark.parametrize("devices", [1, 2])
def test_checkpoints_have_what_is_frozen_once(devices: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    if devices == 1:
        saved_beside_a_backbone(str(path), devices, kind)
    else:
        run(saved_beside_a_backbone, devices, str(path), devices, kind, group=False)
    module = Followed("data", WIDE)
    backbone = module.backbone.weight.nbytes
    files = [own for own in path.rglob("*") if own.is_file()] or [path]
    assert backbone < sum(own.stat().st_size for own in files) < 2 * backbone
    torch.nn.init.zeros_(module.backbone.weight)
    trainer(LTEStrategy(4, 3, rank=RANK), max_steps=6).fit(module, loader(320), ckpt_path=str(path))
    assert module.backbone.weight.eq(1).all()


def followed(folder: str, follow: str, overlap: int, kind: Any, resume: str | None = None) -> list[tuple[Any, Any]]:
    module = Followed(follow)
    recorder = Recorder(lambda t, m: (clone(m.state_dict()), t.strategy.explorer.moving))
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    s = LTEStrategy(2, 4, rank=RANK, overlap=overlap, checkpoint=kind)
    t = trainer(s, devices=2, max_steps=13, callbacks=[recorder, keep], enable_checkpointing=True)
    t.fit(module, Slices(2, dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])), ckpt_path=resume)
    return recorder.seen


@pytest.mark.parametrize("at", [2, 5, 7])
@pytest.mark.parametrize(
    ("follow", "overlap", "kind"),
    [("in place", 0, "gathered"), ("data", 0, "gathered"), ("data", 2, "gathered"), ("data", 0, "sharded")],
)
def test_what_is_frozen_and_written_is_averaged(follow: str, overlap: int, kind: str, at: int, tmp_path: Path) -> None:
    whole = run(followed, 2, str(tmp_path / "whole"), follow, overlap, kind, group=False)
    # Those told of it in the first merge know when that is done, which is when it lands.
    known = [step for step, (_, moving) in enumerate(whole[0], 1) if moving]
    assert known[0] == 4 + overlap and set(whole[0][-1][1]) == {"teacher.weight", "teacher.bias"}
    if not overlap:  # else they have followed their students since it started
        pairs = [(a["teacher.weight"], b["teacher.weight"]) for (a, _), (b, _) in zip(*whole, strict=True)]
        # In the first step, and in that after a merge, it follows students that are alike.
        assert [step for step, pair in enumerate(pairs, 1) if torch.equal(*pair)] == [1, 4, 5, 8, 9, 12, 13]
    path = str(tmp_path / "whole" / f"step={at}.ckpt")
    resumed = run(followed, 2, str(tmp_path / "rest"), follow, overlap, kind, path, group=False)
    for own, other in zip(whole, resumed, strict=True):
        for name, value in own[-1][0].items():
            assert torch.equal(value, other[-1][0][name]), name


def full_rank_beside_ddp() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trained = []
    for s in (LTEStrategy(4, 3, rank=RANK, full_rank_steps=100), "ddp"):
        module = Module(optimizer=sgd)
        t = trainer(s, devices=2, max_epochs=1, gradient_clip_val=0.1, accumulate_grad_batches=2)
        t.fit(module, loader(16 * 2 * 7, 16))
        trained.append(clone(module.state_dict()))
    return trained[0], trained[1]


def test_before_heads_begin_training_is_data_parallel() -> None:
    for own, ddp in run(full_rank_beside_ddp, 2, group=False):
        torch.testing.assert_close(own, ddp, rtol=1e-12, atol=1e-13)


class Fail(Callback):
    def __init__(self, error: BaseException, only: int | None) -> None:
        self.error, self.only = error, only

    def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
        if t.global_step == 4 and self.only in (None, t.global_rank):
            raise self.error


def interrupted(only: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    import warnings

    import lightning_lte.strategy as module_under_test

    module_under_test._AGREE_TIMEOUT_S = 2.0
    at_merge: dict[str, Tensor] = {}

    def look(t: Trainer, m: Any) -> None:
        if t.global_step == 3:
            at_merge.update(clone(m.state_dict()))

    module = Module(optimizer=sgd)
    t = trainer(
        LTEStrategy(2, 3, rank=RANK), devices=2, max_epochs=1, callbacks=[Recorder(look), Fail(OSError(), only)]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            t.fit(module, loader(16 * 2 * 7, 16))
        except BaseException as error:
            said = [type(error).__name__]
    return at_merge, clone(module.state_dict()), said + [str(w.message) for w in caught]


def test_devices_that_are_interrupted_together_merge() -> None:
    first, second = run(interrupted, 2, None, group=False)
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name
    assert not torch.equal(first[0]["net.first.weight"], first[1]["net.first.weight"])


def test_a_device_that_is_left_alone_keeps_the_last_merge_and_says_so() -> None:
    """Rank 1 fails; rank 0 then finds the others gone at its next collective, and nobody waits for ever."""
    first, second = run(interrupted, 2, 1, group=False, timeout_s=100)
    for at_merge, after, said in (first, second):
        assert torch.equal(at_merge["net.first.weight"], after["net.first.weight"])
        assert any("could not meet for a last merge" in words for words in said), said


def test_a_head_count_that_the_devices_do_not_divide_is_refused() -> None:
    run(_refused, 2, group=False)


def _refused() -> None:
    module = Module()
    before = clone(module.state_dict())
    with pytest.raises(ValueError, match=r"received heads=3 on 2 devices\. Give heads=4, or heads=None"):
        trainer(LTEStrategy(3, rank=RANK), devices=2, max_epochs=1).fit(module, loader())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


SCRIPT = """
    import atexit
    import os
    import sys
    import torch
    import torch.distributed as dist
    from lightning_lte import LTEStrategy
    from tests.modules import RANK, Module, clone, loader, sgd, trainer

    if __name__ == "__main__":
        torch.set_num_threads(1)
        # One write, since what two processes print may mix.
        lives = {True: b"\\ngroup is alive\\n", False: b"\\ngroup is gone\\n"}
        atexit.register(lambda: os.write(1, lives[dist.is_initialized()]))
        out, start = sys.argv[1:]
        choices = {} if start == "torchrun" else {"start_method": start}
        t = trainer(LTEStrategy(4, 3, rank=RANK, **choices), devices=2, max_epochs=1)
        module = Module(optimizer=sgd)
        t.fit(module, loader(16 * 2 * 7, 16))
        if t.global_rank == 0:
            torch.save(clone(module.state_dict()), f"{out}/{start}.pt")
"""


@pytest.mark.parametrize("start", ["popen", "spawn", "fork", "torchrun"])
def test_every_launcher_gives_the_same_weights(tmp_path: Path, start: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(__file__).parents[1]
    command = [sys.executable]
    if start == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path), start], env=env, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # One that outlives Python can abort the process.
    assert "group is gone" in done.stdout and "group is alive" not in done.stdout
    expected = run(_expected, 2, group=False)[0]
    for name, value in torch.load(tmp_path / f"{start}.pt", weights_only=True).items():
        assert torch.equal(value, expected[name]), name


def _expected() -> dict[str, Tensor]:
    module = Module(optimizer=sgd)
    trainer(LTEStrategy(4, 3, rank=RANK), devices=2, max_epochs=1).fit(module, loader(16 * 2 * 7, 16))
    return clone(module.state_dict())


def test_evaluation_runs_on_two_devices() -> None:
    results = run(_evaluate, 2, group=False)
    assert results[0] == results[1]


def _evaluate() -> float:
    return float(trainer(LTEStrategy(4, rank=RANK), devices=2).validate(Module(), loader())[0]["val_loss"])


class Odd(Module):
    """On one device the loss of the first batch is no mean over samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * len(batch[0]) if self.trainer.global_rank == 1 else loss


def _decide() -> tuple[str, str]:
    s = LTEStrategy(4, 3, rank=RANK)
    seen = Recorder(lambda t, _: t.strategy.explorer.execution)
    trainer(s, devices=2, max_steps=4, callbacks=[seen]).fit(Odd(), loader(160, 16))
    return seen.seen[0], s.report().notes[-1]


def test_devices_agree_on_the_execution_though_their_batches_differ() -> None:
    (first, why_first), (second, why_second) = run(_decide, 2, group=False)
    assert first == second == "sequential"
    assert "failed on another device" in why_first and "is not the mean" in why_second


def test_one_device_sends_nothing() -> None:
    transport = Transport()
    tensor = torch.ones(3)
    transport.sum_([tensor])
    assert transport.bytes_sent == 0 and torch.equal(tensor, torch.ones(3))


def _without_values(kind: str) -> str:
    module = Module()
    with torch.inference_mode(kind == "inference"):
        module.net.extra = torch.nn.LazyLinear(3) if kind == "lazy" else torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="received") as error:
        trainer(LTEStrategy(2, 3, rank=RANK), devices=2, max_steps=1).fit(module, loader())
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "received"), [("lazy", "received lazy parameters"), ("inference", "received parameters made in inference")]
)
def test_weights_without_values_are_refused_before_they_are_sent(kind: str, received: str) -> None:
    assert all(received in words for words in run(_without_values, 2, kind, group=False))


def _unused(replicas: str) -> Tensor:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.ones(3))

    module = Module(make_net(Unused), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
    trainer(LTEStrategy(2, 3, rank=RANK, replicas=replicas), devices=2, max_steps=4).fit(module, loader(320))  # type: ignore[arg-type]
    return module.net.unused.detach()


@pytest.mark.parametrize("replicas", ["merge", "step"])
def test_what_takes_no_part_on_any_device_is_passed_over_by_optimizers(replicas: str) -> None:
    for unused in run(_unused, 2, replicas, group=False):
        assert unused.tolist() == [1, 1, 1]


def _averaged_rows() -> tuple[Tensor, Tensor, bool]:
    """The gradient of an embedding of which each device looks up other rows, and one that both do."""
    rank = dist.get_rank()
    dense, sparse = (torch.nn.Embedding(4, 2, sparse=own, _weight=torch.ones(4, 2)) for own in (False, True))
    for embedding in (dense, sparse):
        (embedding(torch.tensor([3 * rank, 1])) * (rank + 1)).sum().backward()
        average_gradients([embedding.weight], Transport(2, rank))
    assert dense.weight.grad is not None and sparse.weight.grad is not None
    return dense.weight.grad, sparse.weight.grad.to_dense(), sparse.weight.grad.is_sparse


def test_sparse_gradients_are_averaged_as_dense_ones() -> None:
    for dense, sparse, stays_sparse in run(_averaged_rows, 2):
        assert stays_sparse
        assert torch.equal(sparse, dense)
        assert dense.tolist() == [[0.5] * 2, [1.5] * 2, [0] * 2, [1] * 2]


def _newton() -> dict[str, Tensor]:
    module = Module(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3 + 2 * dist.get_rank()))
    trainer(LTEStrategy(2, 2, rank=RANK), devices=2, max_steps=4).fit(module, loader(320))
    return clone(module.state_dict())


def test_closures_may_run_more_often_on_one_device_than_on_another() -> None:
    first, second = run(_newton, 2, group=False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _scaled_alone(own: bool) -> str:
    """Each device with a gradient scaler: of the module's own, or that of 16-mixed."""
    scaler = torch.amp.GradScaler("cpu")
    module = Module()
    if own:
        module.scaler = scaler  # type: ignore[assignment]
    plugins = [] if own else [MixedPrecision("16-mixed", "cpu", scaler)]
    t = trainer(LTEStrategy(2, 3, rank=RANK, replicas="step"), devices=2, max_steps=1, plugins=plugins)
    with pytest.raises(ValueError, match="A GradScaler leaves out the step of a device") as refused:
        t.fit(module, loader(320))
    return str(refused.value)


@pytest.mark.parametrize(("own", "received"), [(False, "precision='16-mixed'"), (True, "scaler")])
def test_gradients_that_each_device_scales_by_itself_are_not_averaged(own: bool, received: str) -> None:
    for words in run(_scaled_alone, 2, own, group=False):
        assert f"received replicas='step' with {received} on 2 devices" in words


def _scaled_before_heads_begin() -> tuple[list[float], dict[str, Tensor]]:
    """An infinite gradient on the second device alone."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    explorer = Explorer(net, optimizer, LTEConfig(2, 3, rank=RANK, full_rank_steps=9), transport)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(4):
        x, y = make_data(8, seed=2 * step + transport.rank)
        with explorer.heads():
            loss = cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        if step == 1 and transport.rank == 1:
            net.first.weight.grad[0, 0] = torch.inf
        explorer.after_backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        explorer.step()
        scales.append(scaler.get_scale())
    weights = clone(net.state_dict())
    explorer.close()
    return scales, weights


def test_scalers_stay_equal_before_heads_begin() -> None:
    (scales, weights), (other_scales, other_weights) = run(_scaled_before_heads_begin, 2)
    assert scales == other_scales and scales[1] < scales[0]
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]) and value.isfinite().all()


class _Normed(Net):
    """A net whose running statistics, bare parameter and counter devices have to themselves between merges."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = torch.nn.BatchNorm1d(IN)
        self.gain = torch.nn.Parameter(torch.ones(IN))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum().detach()
        return super().forward(self.statistics(x) * self.gain)


def _average_weights() -> dict[str, Tensor]:
    averaging = WeightAveraging(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    t = trainer(LTEStrategy(2, 3, rank=RANK), devices=2, max_steps=7, callbacks=[averaging])
    module = Module(make_net(_Normed))
    t.fit(module, Slices(2, t.global_rank))
    average: Any = averaging._average_model
    ends = {
        name: torch.stack([value, average.module.state_dict()[name]]) for name, value in module.state_dict().items()
    }
    return clone(ends)


def test_weights_that_a_callback_averages_on_each_device_are_the_first_ones_in_the_end() -> None:
    first, second = run(_average_weights, 2, group=False)
    differed = set()
    for name, (end, average) in first.items():
        assert torch.equal(end, average) and torch.equal(end, second[name][0]), name
        if not torch.equal(average, second[name][1]):
            differed.add(name)
    assert "net.gain" in differed and not any(name.endswith(("first.weight", "second.weight")) for name in differed)
