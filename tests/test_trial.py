"""Watching weights through the first steps: checksums, transforms of torch.func, and what it takes in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, LTEStrategy, trial
from lightning_lte.trial import checksum
from tests.allocations import peak
from tests.another_device import Elsewhere, another_device
from tests.modules import CLASSES, IN, RANK, Module, Net, backward, clone, loader, make_net, sgd, trainer

# Its weights are so large that all else is small beside one of them.
WIDTH = 1024
WEIGHT = 4 * WIDTH**2


def literal_checksum(weight: Tensor) -> int:
    """The sum of all bits, 32 at a time, times what mixes their row and twice what mixes their column."""
    rows = weight.reshape(len(weight), -1).contiguous().view(torch.int32).tolist()

    def signed(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    def mixed(place: int) -> int:
        number = signed(place * 0x9E3779B97F4A7C15)
        number = signed((number ^ number >> 29) * 0xBF58476D1CE4E5B9)
        return number ^ number >> 32 | 1

    return signed(
        sum((mixed(i) + 2 * mixed(j)) * value for i, row in enumerate(rows, 1) for j, value in enumerate(row, 1))
    )


@pytest.mark.parametrize("piece", [1, 10, 25, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checksum_is_the_same_in_pieces(piece: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PIECE", piece)
    torch.manual_seed(0)
    convolution = torch.randn(6, 3, 2, 2, dtype=dtype)
    last = convolution.to(memory_format=torch.channels_last)
    for weight in (torch.randn(7, dtype=dtype), torch.randn(9, 4, dtype=dtype).T, convolution, last):
        assert int(checksum(weight)) == literal_checksum(weight)
    assert int(checksum(last)) == int(checksum(convolution))
    assert int(checksum(torch.zeros(0, 3, dtype=dtype))) == 0
    scalar = torch.tensor(2.0, dtype=dtype)
    assert int(checksum(scalar)) == literal_checksum(scalar.reshape(1, 1))


def test_a_checksum_tells_places_apart_within_pieces_and_across(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PIECE", 8)  # two rows
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    rows = [[1, 0, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5], [5, 1, 2, 3, 4, 0]]
    other = weight.clone()
    other[3, 2] *= -1
    changed = [*(weight[order] for order in rows), weight[:, [0, 2, 1, 3]], other]
    assert len({int(checksum(w)) for w in [weight, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_checksum_tells_signs_apart(dtype: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, dtype=dtype)
    for rows in (slice(None), slice(3, 4), slice(2, 4)):
        other = weight.clone()
        other[rows] *= -1
        assert int(checksum(other)) != int(checksum(weight))
    other = weight.clone()
    other[3, 3] *= -1
    assert int(checksum(other)) != int(checksum(weight))


def test_a_checksum_takes_a_small_piece_of_memory(tmp_path: Path) -> None:
    weight = torch.randn(WIDTH, WIDTH)
    assert peak(lambda: checksum(weight), tmp_path) < WEIGHT / 2


def test_a_checksum_takes_a_piece_of_memory_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PIECE_ELSEWHERE", WIDTH**2 // 16)
    here = torch.randn(WIDTH, WIDTH)
    with another_device():
        weight = Elsewhere(here)
        assert peak(lambda: checksum(weight), tmp_path) < WEIGHT / 2
        assert checksum(weight).tolist() == int(checksum(here))


def test_first_steps_and_merges_take_no_more_than_one_weight_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    explorer = Explorer(net, optimizer, LTEConfig(1, 100, rank=4))
    x = torch.randn(2, WIDTH)

    def backward(loss: Tensor) -> None:
        with explorer.backward():
            loss.backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        explorer.step()

    for watched in (True, True, False):
        with explorer.heads():
            loss = net(x).square().mean()
        # The whole gradient of one weight, while it is watched.
        assert peak(lambda loss=loss: backward(loss), tmp_path) < (1.5 if watched else 0.5) * WEIGHT
        assert peak(explorer.after_backward, tmp_path) < WEIGHT / 2
        assert peak(step, tmp_path) < WEIGHT / 2
    # The sum of deltas, and their mean.
    assert WEIGHT < peak(explorer.merge, tmp_path) < 2.5 * WEIGHT


def by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda own: net(own).sum(0), x, create_graph=True)  # type: ignore[no-any-return, no-untyped-call]


def by_jacrev(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacrev(lambda own: net(own).sum(0))(x)


def by_jacrev_of_each(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(net))(x)


def by_jacfwd(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda own: net(own).sum(0))(x)


def by_jvp(net: nn.Module, x: Tensor) -> Tensor:
    columns = torch.eye(IN, dtype=x.dtype)
    return torch.stack([torch.func.jvp(net, (x,), (column.expand_as(x),))[1] for column in columns])


def by_vjp(net: nn.Module, x: Tensor) -> Tensor:
    y, pulled_back = torch.func.vjp(net, x)
    return torch.stack([pulled_back(row.expand_as(y))[0] for row in torch.eye(CLASSES, dtype=x.dtype)])


class Bare(Net):
    """Without its norm, whose derivatives through torch.func.jvp are wrong in torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # type: ignore[assignment]


def penalised(jacobian: Callable[..., Tensor], net: nn.Module, **choices: Any) -> tuple[dict[str, Tensor], LTEStrategy]:
    """Train with a penalty on the Jacobian of a net, as contractive autoencoders do."""

    class Penalised(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.01 * jacobian(self.net, batch[0]).square().sum()

    module, strategy = Penalised(net, sgd), LTEStrategy(1, 3, rank=RANK, **choices)
    trainer(strategy, max_steps=7).fit(module, loader(160))
    return clone(module.state_dict()), strategy


@pytest.mark.parametrize("jacobian", [by_jacrev, by_jacrev_of_each, by_jacfwd, by_jvp, by_vjp])
def test_a_use_of_its_layer_in_a_transform_is_none_elsewhere(jacobian: Callable[..., Tensor]) -> None:
    expected, _ = penalised(by_autograd, make_net(Bare))
    found, strategy = penalised(jacobian, make_net(Bare))
    for name in ("net.first.weight", "net.second.weight"):
        assert strategy.report().entry(name).role == "factored"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Tied(Bare):
    """Uses a weight as a tensor, too: in the forward, or in nothing but its Jacobian."""

    def __init__(self) -> None:
        super().__init__()
        self.jacobian_alone = False

    def forward(self, x: Tensor) -> Tensor:
        if self.jacobian_alone and not torch._C._are_functorch_transforms_active():
            return super().forward(x)
        return super().forward(x) * (1 + (x @ self.first.weight.T).mean())


@pytest.mark.parametrize("jacobian_alone", [False, True])
@pytest.mark.parametrize("jacobian", [by_jacrev, by_jacrev_of_each, by_jacfwd])
def test_a_use_elsewhere_is_found_beside_transforms_and_no_gradient_is_lost(
    jacobian: Callable[..., Tensor], jacobian_alone: bool
) -> None:
    """As exact as if the user had excluded it, from the first step on."""
    net = make_net(Tied)
    net.jacobian_alone = jacobian_alone
    start = clone(net.state_dict())
    found, strategy = penalised(jacobian, net)
    entry = strategy.report().entry("net.first.weight")
    assert (entry.role, entry.reason) == ("replica", trial.USED)
    assert strategy.report().entry("net.second.weight").role == "factored"
    net.load_state_dict(start)
    expected, _ = penalised(jacobian, net, exclude_modules=["net.first"])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_padding_row_of_an_embedding_that_is_used_elsewhere_gets_no_gradient(heads: int) -> None:
    class Reversing(nn.Module):
        """Turns indices into vectors, and vectors into indices, but for that of the padding."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 16)

        def forward(self, index: Tensor) -> Tensor:
            return self.linear(self.embedding(index)).mean(1) @ self.embedding.weight[1:].mT

    index, target = torch.tensor([[0, 1, 2], [3, 0, 0]]), torch.tensor([1, 2])
    plain, net = make_net(Reversing), make_net(Reversing)
    cross_entropy(plain(index), target).backward()
    backward(Explorer(net, sgd(net.parameters()), LTEConfig(heads, rank=2, execution="batched")), net, index, target)
    assert plain.embedding.weight.grad[0].count_nonzero() == 0
    torch.testing.assert_close(net.embedding.weight.grad, plain.embedding.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("by_func", [False, True])
def test_who_asks_for_its_gradients_in_a_batch_asks_for_its_gradient(by_func: bool) -> None:
    class Weighed(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y, weight = self.net(batch[0]), self.net.second.weight

            def gradient(cotangent: Tensor, batched: bool = False) -> Tensor:
                return torch.autograd.grad(y.sum(0), weight, cotangent, True, is_grads_batched=batched)[0]

            rows = torch.eye(CLASSES, dtype=y.dtype)
            of_weight = torch.func.vmap(gradient)(rows) if by_func else gradient(rows, batched=True)
            return cross_entropy(y, batch[1]) * of_weight.norm()

    states = []
    for choices in ({}, {"exclude_modules": ["net.second"]}):
        module, strategy = Weighed(optimizer=sgd), LTEStrategy(1, 3, rank=RANK, **choices)
        trainer(strategy, max_steps=4).fit(module, loader(160))
        if not choices:
            assert strategy.report().entry("net.second.weight").reason == trial.ASKED_FOR
        states.append(clone(module.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=1e-12, atol=1e-14)
