"""Heads that share a device in a plain loop: tried, and run in the way that is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lte import Explorer, LTEConfig
from lightning_lte.execution import combined, run, run_in_turn
from tests.modules import RANK, Net, after_backward, clone, make_data, make_net, sgd, train_step


class TimeFirst(Net):
    """A net that takes its samples along dimension 1 inside."""

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unsqueeze(0).repeat(4, 1, 1)
        return super().forward(steps).mean(0)


class Sparse(Net):
    """A net whose first layer gets a sparse tensor, of which there are no slices."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to_sparse())


class Gated(Net):
    """A net with a bare weight that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + nn.functional.linear(y, self.gate)


class Normed(Net):
    """With batch norm, which takes no statistics of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(super().forward(x))


class Unit(Net):
    """A weight is normalised in each forward, as prototypes are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.second.weight.copy_(nn.functional.normalize(self.second.weight))
        return super().forward(x)


def fit(net: nn.Module, sizes: list[int], **choices: Any) -> Explorer:
    opt = sgd(net.parameters())
    explorer = Explorer(net, opt, LTEConfig(4, 2, rank=RANK, **choices))
    for seed, size in enumerate(sizes):
        train_step(explorer, net, opt, make_data(size, seed))
    explorer.finish()
    return explorer


@pytest.mark.parametrize(("kind", "execution"), [(Net, "batched"), (TimeFirst, "sequential"), (Sparse, "sequential")])
def test_a_plain_loop_tries_the_module_first(kind: type[Net], execution: str) -> None:
    nets = make_net(kind), make_net(kind)
    assert fit(nets[0], [16, 16, 16]).execution == execution
    fit(nets[1], [16, 16, 16], execution="sequential")
    torch.testing.assert_close(clone(nets[0].state_dict()), clone(nets[1].state_dict()), rtol=1e-9, atol=1e-11)


def test_autocast_forgets_what_weights_were_filled_with_for_the_trial() -> None:
    losses = []
    for execution in ("auto", "batched"):
        net = make_net(Gated).float()
        explorer = Explorer(net, sgd(net.parameters()), LTEConfig(4, 2, rank=RANK, execution=execution))
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(explorer, lambda own, net=net: net(own[0].float()).square().mean(), make_data(16))
        assert explorer.execution == "batched"
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_batches_that_the_heads_do_not_divide_are_dealt_out_all_the_same() -> None:
    assert fit(make_net(), [7, 16, 3, 16]).execution == "batched"


class Masked(Net):
    """A net that takes an optional mask, and mixes samples where it has one, if it is told to."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.mixes = mixes

    def step(self, batch: dict[str, Any]) -> Tensor:
        x = batch["x"]
        if batch.get("mask") is not None:
            x = x * batch["mask"].unsqueeze(1)
            x = x - x.mean(0) if self.mixes else x
        return nn.functional.cross_entropy(self(x), batch["y"])


def masked(seed: int, mask: bool) -> dict[str, Any]:
    x, y = make_data(16, seed)
    return {"x": x, "y": y, **({"mask": (x[:, 0] > 0).to(x)} if mask else {})}


@pytest.mark.parametrize("order", [[False, True, False, True], [True, False, True, False]], ids=str)
@pytest.mark.parametrize("mixes", [False, True])
def test_batches_of_another_structure_are_tried_by_themselves(mixes: bool, order: list[bool]) -> None:
    nets = make_net(lambda: Masked(mixes)), make_net(lambda: Masked(mixes))
    explorers = []
    for net, execution in zip(nets, ("auto", "sequential"), strict=True):
        opt = sgd(net.parameters())
        explorer = Explorer(net, opt, LTEConfig(4, 3, rank=RANK, execution=execution))
        for seed, mask in enumerate(order):
            told = execution == "auto" and mixes and not order[0] and seed == 1
            with pytest.warns(match=r"take turns on batches with batch\['mask'\]: .* mix") if told else nullcontext():
                loss = run(explorer, net.step, masked(seed, mask))
            with explorer.backward():
                loss.backward()
            after_backward(explorer, opt)
        explorers.append(explorer)
        explorer.finish()
    torch.testing.assert_close(clone(nets[0].state_dict()), clone(nets[1].state_dict()), rtol=1e-9, atol=1e-11)
    assert explorers[0].execution == ("sequential" if mixes and order[0] else "batched")
    assert list(explorers[0].tried.values()) == ([True, not mixes] if explorers[0].execution == "batched" else [False])


def test_heads_that_grow_are_tried_on_each_structure_again() -> None:
    net = make_net(Masked)
    opt = sgd(net.parameters())
    explorer = Explorer(net, opt, LTEConfig(2, 1, rank=RANK, grow_heads={2: 4}))
    trials = [0] * 5
    for seed, mask in enumerate([False, True, False, True, False]):

        @contextmanager
        def trial(seed: int = seed) -> Iterator[None]:
            trials[seed] += 1
            yield

        loss = run(explorer, net.step, masked(seed, mask), trial=trial)
        with explorer.backward():
            loss.backward()
        after_backward(explorer, opt)
    assert explorer.execution == "batched" and trials == [1, 1, 1, 1, 0]
    explorer.close()


def test_all_heads_at_once_without_a_trial_are_refused() -> None:
    net = make_net()
    explorer = Explorer(net, sgd(net.parameters()), LTEConfig(4, 2, rank=RANK))
    with pytest.raises(RuntimeError, match=r"received execution='auto' and no trial\. Use `execution\.run"):
        explorer.heads()


def test_a_write_that_breaks_the_backward_of_an_earlier_head_is_explained() -> None:
    with pytest.raises(RuntimeError, match=r"Heads that take turns .* received such a write: .* on_train_batch_start"):
        fit(make_net(Unit), [16], execution="sequential")


@pytest.mark.parametrize("choices", [{}, {"full_rank_steps": 2}], ids=str)
def test_where_no_head_takes_turns_such_a_write_is_told_in_torchs_own_words(choices: dict[str, Any]) -> None:
    net = make_net()
    explorer = Explorer(net, sgd(net.parameters()), LTEConfig(4, 2, rank=RANK, execution="batched", **choices))
    x, y = make_data(16)
    with explorer.heads():
        loss = nn.functional.cross_entropy(net(x), y)
    with torch.no_grad():
        net.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"^one of the variables needed"), explorer.backward():
        loss.backward()


def test_parts_are_as_many_as_heads() -> None:
    net = make_net()
    explorer = Explorer(net, sgd(net.parameters()), LTEConfig(4, 2, rank=RANK))
    with pytest.raises(ValueError, match="each of the 4 local heads; received 3 parts"):
        run_in_turn(explorer, lambda batch: batch, [1, 2, 3])


@pytest.mark.parametrize(("execution", "size"), [("batched", 2), ("sequential", 2), ("sequential", 7)])
def test_outputs_have_a_row_for_each_sample_once(execution: Any, size: int) -> None:
    net = make_net()
    explorer = Explorer(net, sgd(net.parameters()), LTEConfig(4, 2, rank=RANK, execution=execution))
    x, y = make_data(size)

    def step(batch: Any) -> dict[str, Any]:
        out = net(batch["x"])
        batch["out"] = out  # the step may add to its batch
        return {"loss": nn.functional.cross_entropy(out, batch["y"]), "inputs": batch["x"], "three": torch.ones(3)}

    batches = {"x": make_data(8)[0], "y": make_data(8)[1]}, {"x": x, "y": y}
    run(explorer, step, batches[0], fill_up=True)
    output = run(explorer, step, batches[1], fill_up=True)
    assert torch.equal(output["inputs"], x)
    explorer.close()


@pytest.mark.parametrize("least", [Net, Normed])
def test_samples_that_are_repeated_are_each_heads_own_to_write_to(least: type[Net]) -> None:
    gradients = []
    for in_place in (False, True):
        net = make_net(least)
        explorer = Explorer(net, sgd(net.parameters()), LTEConfig(4, 2, rank=RANK, execution="sequential"))
        x, y = make_data(3)

        def step(batch: Any, in_place: bool = in_place, net: nn.Module = net) -> Tensor:
            own, labels = batch
            own = own.mul_(3) if in_place else own * 3
            return nn.functional.cross_entropy(net(own), labels)

        with explorer.backward():
            run(explorer, step, [x, y]).backward()
        explorer.after_backward()
        gradients.append([f.B.grad for f in explorer.injection.factors.values()])
        explorer.close()
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


def test_outputs_of_heads_become_one() -> None:
    outputs = [{"loss": torch.tensor(float(i)), "rows": torch.ones(i + 1), "note": i} for i in range(3)]
    together = combined(outputs)
    assert together["loss"] == 1 and together["rows"].shape == (6,) and together["note"] == [0, 1, 2]
    sequences = [torch.ones(2, 5), torch.ones(2, 7)]  # each padded to the longest of its slice
    assert combined([{"loss": torch.tensor(1.0), "logits": own} for own in sequences])["logits"] == sequences
    assert combined([None, None]) is None
    with pytest.raises(RuntimeError, match=r"received None for heads \[1\] of 2"):
        combined([torch.tensor(1.0), None])
