"""The oracle itself, against the paper's statements, so that what is tested with it stands on firm ground."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tests.oracle import Oracle

N, R, IN, OUT, SCALE, LR = 3, 2, 6, 5, 1.5, 0.05


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(IN, OUT)).double()
    with torch.no_grad():
        for seed, param in enumerate(net.parameters()):
            param.copy_(random(*param.shape, seed=seed + 10))
    return net


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def slices(step: int, same: bool = False) -> list[tuple[Tensor, Tensor]]:
    def data(n: int) -> tuple[Tensor, Tensor]:
        seed = 100 * step + (0 if same else n)
        return random(4, IN, seed=seed), random(4, OUT, seed=seed + 50)

    return [data(n) for n in range(N)]


def test_merging_at_every_step_is_the_papers_multi_head_lora() -> None:
    """f(x) = W x + (s/N) sum_n B_n A_n x, trained directly.

    A worker's gradient comes through s, the direct model's through s/N: hence N times its learning rate.
    """
    A0 = random(N, R, IN)
    oracle = Oracle(layer(), {"0": A0}, scale=SCALE, period=1, optimizer=sgd, replicas="freeze")
    W, b = layer()[0].weight.detach(), layer()[0].bias.detach()
    A, B = A0.clone().requires_grad_(), torch.zeros(N, OUT, R, dtype=torch.float64, requires_grad=True)
    direct = torch.optim.SGD([A, B], lr=LR * N)
    for step in range(5):
        batch = slices(step, same=True)
        oracle.step(batch, mse_loss)
        x, y = batch[0]
        direct.zero_grad()
        mse_loss(x @ (W + SCALE / N * (B @ A).sum(0)).mT + b, y).backward()
        direct.step()
        expected = W + SCALE / N * (B @ A).sum(0).detach()
        torch.testing.assert_close(oracle.merged[0].weight.detach(), expected)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_right_after_a_merge_every_worker_is_at_the_base_weight(after_merge: Literal["keep", "reset"]) -> None:
    oracle = Oracle(layer(), {"0": random(N, R, IN)}, scale=SCALE, period=2, optimizer=sgd, after_merge=after_merge)
    for step in range(4):
        oracle.step(slices(step), mse_loss)
        at_base = [torch.allclose(oracle.worker_weight(n, "0"), oracle.merged[0].weight) for n in range(N)]  # type: ignore[index]
        assert at_base == [step % 2 == 1] * N
    assert (oracle.steps, oracle.merges) == (4, 2)


def test_keep_telescopes() -> None:
    oracle = Oracle(layer(), {"0": random(N, R, IN)}, scale=SCALE, period=2, optimizer=sgd)
    for step in range(5):
        oracle.step(slices(step), mse_loss)
    oracle.finish()
    products = [worker.layers["0"].B @ worker.layers["0"].A for worker in oracle.workers]
    expected = layer()[0].weight + SCALE / N * sum(products)
    torch.testing.assert_close(oracle.merged[0].weight, expected)  # type: ignore[index, union-attr]
    assert oracle.merges == 3


def test_replicas_follow_their_policy() -> None:
    first = layer()[0].bias
    biases = {}
    for policy in ("merge", "step", "freeze"):
        oracle = Oracle(
            layer(), {"0": random(N, R, IN)}, scale=SCALE, period=3, optimizer=sgd, replicas=policy, clip=0.5
        )
        for step in range(2):
            oracle.step(slices(step), mse_loss)
        biases[policy] = [worker.model[0].bias for worker in oracle.workers]  # type: ignore[index]
        assert torch.equal(oracle.merged[0].bias, first)  # type: ignore[index]
    assert all(torch.equal(b, first) for b in biases["freeze"])
    assert all(torch.equal(b, biases["step"][0]) for b in biases["step"]) and not torch.equal(biases["step"][0], first)
    assert not torch.allclose(biases["merge"][0], biases["merge"][1])


def test_accumulated_slices_count_as_one_step_on_all_of_them() -> None:
    whole = Oracle(layer(), {"0": random(N, R, IN)}, scale=SCALE, period=1, optimizer=sgd)
    halves = Oracle(layer(), {"0": random(N, R, IN)}, scale=SCALE, period=1, optimizer=sgd, accumulate=2)
    for step in range(3):
        batch = slices(step)
        whole.step(batch, mse_loss)
        halves.step([(x[:2], y[:2]) for x, y in batch], mse_loss)
        halves.step([(x[2:], y[2:]) for x, y in batch], mse_loss)
    assert whole.steps == halves.steps == 3
    torch.testing.assert_close(halves.merged.state_dict(), whole.merged.state_dict())
