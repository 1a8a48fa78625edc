"""A checkpoint of so many devices goes on on another number of them, in the middle of a period, too."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lte import LTEStrategy
from tests.modules import RANK, Module, Net, Recorder, ScaledNet, Slices, adamw, clone, make_net, trainer
from tests.processes import run

HEADS = 4
PERIOD = 3
SAVED = 5  # steps: in the middle of the second period
LAST = 10
DEVICES = (1, 2, 4)
PAIRS = [(saved, then) for saved in DEVICES for then in DEVICES]


class Shared(ScaledNet):
    """Two parameters that the heads of a device share where they run in one forward, and a buffer of each device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.sum().detach()
        return super().forward(x * self.scale)


class Normed(ScaledNet):
    """Batch norm makes the heads of a device take turns, and has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(self.norm.normalized_shape[0])  # type: ignore[assignment]


KINDS: dict[str, type[Net]] = {"stacked": Net, "shared": Shared, "in turn": Normed, "on its way": Net}
SHARED = ("net.gain", "net.scale")


def fit(folder: str, kind: str, devices: int, resume: str | None = None, steps: int = LAST) -> dict[str, Any]:
    """Train, and say what was there when training began, what was said, and what came out."""
    rank = int(os.environ["RANK"]) if devices > 1 else 0
    start: list[Any] = []
    look = Recorder(lambda t, m: t.save_checkpoint(f"{folder}/{kind}-{devices}.ckpt") if saves(t) else None)
    look.on_train_start = lambda t, m: start.append((t.strategy.explorer.state_dict(), clone(m.state_dict())))  # type: ignore[method-assign]

    def saves(t: Any) -> bool:
        return resume is None and t.global_step == (SAVED - 1 if kind == "on its way" else SAVED)

    # A merge that starts after step 3 and lands after step 5 is on its way after step 4.
    overlap = 2 if kind == "on its way" else 0
    execution = "sequential" if kind == "in turn" else "batched"
    strategy = LTEStrategy(HEADS, PERIOD, rank=RANK, execution=execution, overlap=overlap)  # type: ignore[arg-type]
    t = trainer(strategy, devices=devices, max_steps=steps, callbacks=[look])
    module = Module(make_net(KINDS[kind]), adamw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(module, Slices(devices, rank), ckpt_path=resume)
    said = [str(w.message) for w in caught if "merged first" in str(w.message) or "buffers" in str(w.message)]
    return {"lte": start[0][0], "weights": start[0][1], "said": said, "end": clone(module.state_dict())}


def save_all(folder: str, devices: int) -> dict[str, Any]:
    return {kind: fit(folder, kind, devices) for kind in KINDS}


def resume_all(folder: str, devices: int) -> dict[Any, Any]:
    return {
        (kind, saved): fit(folder, kind, devices, f"{folder}/{kind}-{saved}.ckpt")
        for kind in KINDS
        for saved in DEVICES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("resharding"))


@pytest.fixture(scope="module")
def whole(folder: str) -> dict[int, list[dict[str, Any]]]:
    """The runs that were not interrupted, by number of devices: one result for each rank."""
    several = {w: run(save_all, w, folder, w, group=False, timeout_s=150) for w in DEVICES[1:]}
    return {1: [save_all(folder, 1)], **several}


@pytest.fixture(scope="module")
def resumed(folder: str, whole: Any) -> dict[int, list[dict[Any, Any]]]:
    several = {w: run(resume_all, w, folder, w, group=False, timeout_s=150) for w in DEVICES[1:]}
    return {1: [resume_all(folder, 1)], **several}


def saved_state(folder: str, kind: str, devices: int) -> dict[str, Any]:
    return torch.load(f"{folder}/{kind}-{devices}.ckpt", weights_only=True)  # type: ignore[no-any-return]


def by_head(rows: Tensor) -> Tensor:
    """(heads, ...): a row for each head of what has one for each head, or for each device."""
    return rows.repeat_interleave(HEADS // len(rows), dim=0)


def moments_by_head(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": by_head(next(iter(rows.values())))
        for optimizer in state["optimizers"]
        for name, fields in optimizer.items()
        for key, rows in fields.items()
    }


@pytest.mark.parametrize("kind", ["stacked", "shared", "in turn"])
@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_weights_factors_moments_and_clocks_go_on_as_they_were(
    folder: str, resumed: Any, kind: str, saved: int, then: int
) -> None:
    there = saved_state(folder, kind, saved)
    results = [rank[kind, saved] for rank in resumed[then]]
    here = results[0]["lte"]
    [clock] = here["clocks"]
    assert (
        there["lte"]["clocks"] == [clock]
        and clock.items() >= {"step": SAVED, "merges": 1, "last_merge": PERIOD}.items()
    )
    for name, factors in there["lte"]["factors"].items():
        for key, rows in factors.items():
            assert torch.equal(here["factors"][name][key], rows), (name, key)
    shared = SHARED if kind == "shared" and then < saved else ()
    moments_there, moments_here = moments_by_head(there["lte"]), moments_by_head(here)
    assert moments_there.keys() == moments_here.keys()
    for name, rows in moments_there.items():
        if name.partition("/")[0] not in shared:
            assert torch.equal(moments_here[name], rows), name
    for name, replica in there["lte"]["replicas"].items():
        if name not in shared:
            assert torch.equal(by_head(here["replicas"][name]["value"]), by_head(replica["value"])), name
    for result in results:
        for name in there["lte"]["weights"]:
            assert torch.equal(result["weights"][f"{name}.weight"], there["state_dict"][f"{name}.weight"]), name


@pytest.mark.parametrize("kind", ["stacked", "in turn", "on its way"])
@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_where_each_head_has_its_own_the_rest_of_the_run_is_the_same(
    folder: str, whole: Any, resumed: Any, kind: str, saved: int, then: int
) -> None:
    expected = whole[saved][0][kind]["end"]
    assert len(saved_state(folder, kind, saved)["lte"]["flights"]) == (kind == "on its way")
    for rank in resumed[then]:
        assert not rank[kind, saved]["said"]
        got = rank[kind, saved]["end"]
        assert saved != then or all(torch.equal(got[name], value) for name, value in expected.items())
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_replicas_that_heads_have_to_share_are_merged_first_and_rank_0_says_so(
    folder: str, resumed: Any, saved: int, then: int
) -> None:
    there = saved_state(folder, "shared", saved)["lte"]
    first, *others = [rank["shared", saved] for rank in resumed[then]]
    assert not any(other["said"] for other in others)
    if then >= saved:
        assert not first["said"]
        return
    for name in SHARED:
        before, here = (lte["replicas"][name]["value"] for lte in (there, first["lte"]))
        assert not torch.equal(before[0], before[1])  # they did differ
        torch.testing.assert_close(here, before.mean(0).expand_as(here), rtol=1e-14, atol=0)
        assert all(torch.equal(row, here[0]) for row in here)
        moments, own = (
            moments_by_head(lte)[f"{name}/exp_avg"].unflatten(0, (then, -1)) for lte in (there, first["lte"])
        )
        torch.testing.assert_close(own, moments.mean(1, keepdim=True).expand_as(own), rtol=1e-12, atol=0)
    [said] = first["said"]
    for words in ("2 replicas (net.gain, net.scale)", f"of {saved} devices", "merged first", "1 buffer (net.seen)"):
        assert words in said


@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_a_buffer_goes_on_from_the_device_that_held_the_first_head(
    folder: str, resumed: Any, saved: int, then: int
) -> None:
    if saved > 1:
        there = torch.stack([own["net.seen"] for own in saved_state(folder, "shared", saved)["lte"]["buffers"]])
    else:
        there = saved_state(folder, "shared", saved)["state_dict"]["net.seen"].unsqueeze(0)
    here = [rank["shared", saved]["weights"]["net.seen"] for rank in resumed[then]]
    assert torch.equal(torch.stack(here), by_head(there)[:: HEADS // then])


@pytest.mark.parametrize(("saved", "then"), PAIRS)
def test_running_statistics_follow_their_heads(folder: str, resumed: Any, saved: int, then: int) -> None:
    there = saved_state(folder, "in turn", saved)["lte"]
    here = resumed[then][0]["in turn", saved]["lte"]
    for name in ("net.norm.running_mean", "net.norm.running_var"):
        rows = [
            lte["statistics"][name]["value"] if lte["statistics"] else torch.stack([b[name] for b in lte["buffers"]])
            for lte in (there, here)
        ]
        assert len(rows[0]) == len(rows[1]) == HEADS and torch.equal(*rows), name
        assert not torch.equal(rows[0][0], rows[0][1])
