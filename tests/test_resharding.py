"""A checkpoint of so many devices goes on on another number of them, in the middle of a period, too."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport, sharded
from tests.modules import (
    IN,
    RANK,
    WIDTH,
    Module,
    Net,
    Recorder,
    ScaledNet,
    Slices,
    adamw,
    after_backward,
    clone,
    make_data,
    make_net,
    trainer,
)
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


# ---- experts


class Experts(nn.Module):
    """Each device trains one of them at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.experts[chosen](torch.tanh(self.first(x)))


class ExpertsLoop:
    def __init__(self, transport: Transport) -> None:
        self.net, self.rank = make_net(Experts), transport.rank
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        self.explorer = Explorer(self.net, self.opt, LTEConfig(2, 4, rank=RANK, execution="batched"), transport)

    def steps(self, numbers: range) -> None:
        for step in numbers:
            x, _ = make_data(8, seed=2 * step + self.rank)
            with self.explorer.heads():
                # The first expert is of device 0 and the second of device 1, until all have the third.
                loss = self.net(x, self.rank if step < 7 else 2).square().mean()
            with self.explorer.backward():
                loss.backward()
            after_backward(self.explorer, self.opt)

    def go_on_from(self, weights: dict[str, Tensor], state: Any) -> None:
        self.net.load_state_dict(weights)
        self.explorer.load_state_dict(state)

    def moments(self) -> dict[str, Any]:
        states = self.explorer.substitution.states(self.opt)
        held = self.explorer.substitution.held(self.opt).items()
        return {name: copy.deepcopy(states[param]) for name, param in held if param in states}


def _experts(folder: str) -> list[Any]:
    """What an uninterrupted run ends with, those that go on from either form, and the checkpoint."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    loop = ExpertsLoop(transport)
    loop.steps(range(6))
    weights = clone(loop.net.state_dict())
    gathered = transport.gather(copy.deepcopy(loop.explorer.state_dict()))
    own = loop.explorer.local_state()
    sharded.save({"state_dict": weights}, own, loop.explorer.weight_names, f"{folder}/experts", transport)
    loop.steps(range(6, 12))
    state = [gathered[0] if gathered else None]
    dist.broadcast_object_list(state, src=0)
    ends = [loop.moments()]
    for saved in (state[0], sharded.load(f"{folder}/experts")["lte"]):
        other = ExpertsLoop(transport)
        other.go_on_from(weights, saved)
        other.steps(range(6, 12))
        ends.append(other.moments())
        torch.testing.assert_close(clone(other.net.state_dict()), clone(loop.net.state_dict()), rtol=0, atol=0)
    return [ends, weights, state[0]]


def test_moments_that_one_device_has_go_on(tmp_path: Path) -> None:
    """What had no gradient on the other, it goes on without, as before."""
    results = run(_experts, 2, str(tmp_path))
    for (straight, *others), _, _ in results:
        for end in others:
            torch.testing.assert_close(end, straight, rtol=0, atol=0)
    _, weights, state = results[0]
    for saved in (state, sharded.load(str(tmp_path / "experts"))["lte"]):
        alone = ExpertsLoop(Transport())
        alone.go_on_from(weights, saved)
        moments = alone.moments()
        assert not any(name.startswith("experts.2") for name in moments)
        for head in range(2):
            own = moments[f"experts.{head}.weight.B"]
            assert own["step"] == 6 and own["exp_avg"][head].any() and not own["exp_avg"][1 - head].any()
        alone.steps(range(6, 8))
