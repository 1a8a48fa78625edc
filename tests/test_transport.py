from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lte import transport
from lightning_lte.transport import Transport, buckets
from lightning_lte.wire import decode, encode, encoded_bytes
from tests.processes import run

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def here() -> Transport:
    return Transport(dist.get_world_size(), dist.get_rank())


def of_sizes(*sizes: int, dtype: torch.dtype = torch.uint8) -> list[Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((6, 6, 6), [[6], [6], [6]]),
        ((5, 5, 5), [[5, 5], [5]]),
        ((25,), [[25]]),
        ((4, 25, 4), [[4], [25], [4]]),
        ((25, 4, 4), [[25], [4, 4]]),
        ((10, 1), [[10], [1]]),
        ((0, 10, 0), [[0, 10, 0]]),
        ((), []),
    ],
)
def test_buckets_close_before_they_overflow(
    sizes: tuple[int, ...], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "BUCKET_BYTES", 10)
    assert [[t.nbytes for t in bucket] for bucket in buckets(of_sizes(*sizes))] == expected


def test_what_backends_send_and_receive_is_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that looks at memory alone would give the numbers of a transposed tensor in another order."""

    def all_gather(parts: list[Tensor], tensor: Tensor, group: Any = None) -> None:
        for part in parts:
            part.as_strided((part.numel(),), (1,)).copy_(tensor.as_strided((tensor.numel(),), (1,)))

    monkeypatch.setattr(transport.dist, "all_gather", all_gather)
    transposed = torch.arange(12.0).view(3, 4).mT
    assert torch.equal(Transport(2).stack(transposed), torch.cat([transposed] * 2))


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(DTYPES)), max_size=12))
def test_every_tensor_is_in_one_bucket_of_its_dtype(wanted: list[tuple[int, torch.dtype]]) -> None:
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "BUCKET_BYTES", 40)
        dealt = buckets(tensors)
    assert sorted(id(t) for bucket in dealt for t in bucket) == sorted(map(id, tensors))
    for bucket in dealt:
        assert bucket and len({t.dtype for t in bucket}) == 1
        assert len(bucket) == 1 or sum(t.nbytes for t in bucket) <= 40


def test_alone_everything_is_the_identity_and_nothing_is_sent() -> None:
    alone, tensor = Transport(), torch.arange(3.0)
    alone.sum_([tensor])
    alone.broadcast_([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert alone.stack(tensor) is tensor and alone.gather("x") == ["x"]
    assert alone.agree("x", timeout_s=0) and alone.bytes_sent == 0


def uneven() -> list[Tensor]:
    """Tensors of several dtypes and layouts, different on every device."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    shapes: list[tuple[int, ...]] = [(6,), (), (2, 3), (0, 4), (25,), (3, 1, 2)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for dtype in DTYPES for shape in shapes]
    tensors.append(torch.randn(4, 5, generator=generator).mT)
    tensors.append(nn.Parameter(torch.randn(7, generator=generator)))
    return tensors


def sums(cap: int) -> tuple[list[Tensor], list[Tensor]]:
    transport.BUCKET_BYTES = cap
    tensors = uneven()
    before = [t.detach().clone() for t in tensors]
    here().sum_(tensors)
    return before, [t.detach() for t in tensors]


@pytest.mark.parametrize("cap", [10, 64, 2**20])
def test_every_tensor_is_summed_and_the_sums_are_bit_equal_on_all_devices(cap: int) -> None:
    results = run(sums, 3, cap)
    for i in range(len(results[0][0])):
        expected = sum(before[i].double() for before, _ in results)
        for _, after in results:
            assert torch.equal(after[i], results[0][1][i])
            assert after[i].dtype == results[0][0][i].dtype
            torch.testing.assert_close(
                after[i].double(),
                expected,
                rtol=4 * torch.finfo(after[i].dtype).eps,
                atol=0.02 if after[i].dtype == torch.bfloat16 else 1e-6,
            )


def exchanges() -> dict[str, Any]:
    t, rank = here(), dist.get_rank()
    stacked = t.stack(torch.arange(4).view(2, 2).mT + 10 * rank)
    flags = t.stack(torch.tensor([rank], dtype=torch.uint8))
    given = [nn.Parameter(torch.full((2,), float(rank))), torch.full((2, 3), rank).mT, torch.tensor(rank)]
    before = t.bytes_sent
    t.broadcast_(given)
    return {
        "bytes": t.bytes_sent - before,
        "stacked": stacked.tolist(),
        "flags": flags.tolist(),
        "broadcast": [g.detach().tolist() for g in given],
        "gathered": t.gather({"rank": rank}),
    }


def test_stack_broadcast_and_gather_follow_the_order_of_ranks() -> None:
    first, second = run(exchanges, 2)
    assert first["stacked"] == second["stacked"] == [[0, 2], [1, 3], [10, 12], [11, 13]]
    assert first["flags"] == second["flags"] == [0, 1]
    assert first["broadcast"] == second["broadcast"] == [[0, 0], [[0, 0]] * 3, 0]
    assert first["bytes"] == second["bytes"] == (2 * 4 + 6 * 8 + 8) // 2
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}] and second["gathered"] is None


def of_every_kind() -> list[Tensor]:
    rank = dist.get_rank()
    entry = torch.sparse_coo_tensor([[rank]], [rank + 1.0], (2,))  # each has another one
    given = [entry, torch.tensor([rank == 0]), torch.tensor([rank], dtype=torch.uint16), torch.tensor(1j * rank)]
    given += [
        torch.tensor([float(rank)]).to(torch.float8_e4m3fn),
        torch.zeros(2, 0),
        torch.eye(2).to_sparse_csr() * rank,
    ]
    here().broadcast_(given)
    return [g.to_dense().tolist() if g.layout != torch.strided else g.tolist() for g in given]


def test_tensors_of_every_kind_are_broadcast() -> None:
    first, second = run(of_every_kind, 2)
    assert first == second == [[1.0, 0.0], [True], [0], 0j, [0.0], [[], []], [[0.0, 0.0], [0.0, 0.0]]]


def on_the_cpu_with_nccl() -> Tensor:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    dist.get_backend, dist.broadcast = lambda *_: "nccl", refuse
    sent = torch.tensor([float(dist.get_rank())])
    here().broadcast_([sent])
    return sent


def test_tensors_that_stay_on_the_cpu_are_broadcast_where_the_backend_sends_those_of_gpus_alone() -> None:
    """Such as buffers that a forward registers."""
    assert [float(own) for own in run(on_the_cpu_with_nccl, 2)] == [0, 0]


def in_groups() -> list[int]:
    rank = dist.get_rank()
    across = Transport.sharing(2, 4, rank)
    tensor = torch.tensor([rank])
    across.broadcast_([tensor])
    seen = tensor.tolist()
    assert across.within is not None
    across.within.broadcast_([tensor])
    return seen + tensor.tolist()


def test_each_group_broadcasts_from_its_own_first_device() -> None:
    assert run(in_groups, 4) == [[0, 0], [1, 0], [0, 0], [1, 0]]


def traffic() -> list[int]:
    t = here()
    counts = []
    t.sum_([torch.zeros(6), torch.zeros(6)])
    counts.append(t.bytes_sent)
    t.stack(torch.zeros(5))
    counts.append(t.bytes_sent - counts[0])
    return counts


def test_bytes_are_counted_as_a_ring_sends_them() -> None:
    for summed, stacked in run(traffic, 3):
        assert (summed, stacked) == (2 * 48 * 2 // 3, 20 * 2)


def traffic_of_a_kernel() -> int:
    t = here()
    t.sum_([torch.zeros(8, 16, 1, 1)], "int8")
    return t.bytes_sent


def test_a_kernel_has_one_scale_for_each_output() -> None:
    assert run(traffic_of_a_kernel, 2) == [8 * 16 + 4 * 8] * 2


def questions() -> list[bool]:
    t, rank = here(), dist.get_rank()
    same = t.agree("3:30", timeout_s=20)
    again = t.agree("3:30", timeout_s=20)
    other = t.agree(f"4:{rank}", timeout_s=20)
    after = t.agree("5:50", timeout_s=20)
    return [same, again, other, after]


def test_devices_agree_on_equal_values_alone() -> None:
    assert run(questions, 2) == [[True, True, False, True]] * 2


def one_is_gone() -> tuple[bool, bool, float]:
    t, rank = here(), dist.get_rank()
    before = t.agree("same", timeout_s=20)
    start = time.monotonic()
    after = t.agree("same", timeout_s=0.5) if rank == 0 else False
    return before, after, time.monotonic() - start


def test_a_device_that_does_not_answer_ends_the_wait_and_old_answers_do_not_count() -> None:
    (before, after, waited), _ = run(one_is_gone, 2)
    assert before and not after and 0.4 < waited < 10


def one_ends() -> tuple[str, float]:
    """One device asks what the others have, and the other whether all are to end."""
    t, rank = here(), dist.get_rank()
    start = time.monotonic()
    try:
        found = str(t.union({"here": "there"})) if rank == 0 else str(t.agree("the end", timeout_s=20))
    except TimeoutError as error:
        found = f"TimeoutError: {error}"
    return found, time.monotonic() - start


def test_devices_that_ask_different_questions_know_at_once() -> None:
    (found, waited), (other, _) = run(one_ends, 2)
    assert (
        found.startswith("TimeoutError: Rank 0 asked the other devices, of which one has come to its end")
        and waited < 10
        and other == "False"
    )


# ---- fewer bits


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=5), st.sampled_from(["bfloat16", "int8"]))
def test_what_is_decoded_is_what_was_encoded_to_rounding(shapes: list[tuple[int, int]], wire: Any) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    code = encode(tensors, wire)
    assert len(code) == sum(encoded_bytes(shape, wire) for shape in shapes)
    for tensor, back in zip(tensors, decode(code, [t.shape for t in tensors], wire), strict=True):
        largest = tensor.abs().amax(1, keepdim=True) if tensor.numel() else tensor
        bound = largest / 254 * 1.001 if wire == "int8" else tensor.abs() / 256
        assert back.shape == tensor.shape and bool(((back - tensor).abs() <= bound + 1e-30).all())
        # What can be written exactly stays as it is, but for the last bit of a scale.
        torch.testing.assert_close(decode(encode([back], wire), [back.shape], wire)[0], back, rtol=3e-7, atol=0)


def test_zeros_stay_zeros() -> None:
    for wire in ("bfloat16", "int8"):
        assert not decode(encode([torch.zeros(3, 4)], wire), [torch.Size((3, 4))], wire)[0].any()


def rounded_sums(wire: Any, cap: int, rounds: int) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    transport.BUCKET_BYTES = cap
    t, rank = here(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    shapes: list[tuple[int, ...]] = [(6,), (), (2, 3), (0, 4), (25,), (3, 1, 2), (7, 30), (1, 5)]
    errors = [torch.zeros(shape) for shape in shapes]
    results = []
    for _ in range(rounds):
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        before = [x.clone() for x in tensors]
        t.sum_(tensors, wire, errors)
        results.append((before, tensors, [e.clone() for e in errors]))
    return results


@pytest.mark.parametrize("cap", [10, 300, 2**20])
@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_rounded_sums_are_bit_equal_and_what_they_lose_is_not_lost(wire: str, cap: int) -> None:
    """Sums plus errors that are left over are the exact sums: nothing gets lost, it only comes later."""
    devices = run(rounded_sums, 3, wire, cap, 4)
    exact: list[Any] = [0] * 8
    seen: list[Any] = [0] * 8
    for per_round in zip(*devices, strict=True):
        for i in range(8):
            exact[i] = exact[i] + sum(before[i] for before, _, _ in per_round)
            seen[i] = seen[i] + per_round[0][1][i]
            assert all(torch.equal(after[i], per_round[0][1][i]) for _, after, _ in per_round)
            left = sum(errors[i] for _, _, errors in per_round)
            torch.testing.assert_close(seen[i] + left, exact[i], rtol=1e-5, atol=1e-5)


def stacks(wire: Any) -> list[Tensor]:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    shapes: list[tuple[int, ...]] = [(1, 3, 4), (1, 5), (1, 2, 2)]
    own = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*own, *here().stack_all(own, wire)]


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("cap", [10, 2**20])
def test_many_tensors_are_stacked_in_few_calls(wire: str, cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(stacks, 3, wire)
    for i in range(3):
        expected = torch.cat([device[i] for device in results])
        bound = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 200}[wire] * expected.abs().max()
        for device in results:
            assert torch.equal(device[3 + i], results[0][3 + i])
            assert bool(((device[3 + i] - expected).abs() <= bound).all())
