"""freeze_a (LoRA-FA): B alone is trained, with A as it was drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from lightning_lte import Explorer, LTEConfig, Transport
from lightning_lte.merge import Merge
from lightning_lte.payload import is_dense, sizes
from lightning_lte.running_statistics import RunningStatistics
from tests.modules import FACTORED, RANK, Kinds, adamw, clone, make_data, make_net, train_step
from tests.processes import run
from tests.test_exactness import HEADS, NORMS, OUTER, Norms, first_A, on_devices, train_both
from tests.test_heads import factors
from tests.test_merge import HEADS as MERGED_HEADS
from tests.test_merge import config, made, merge_all, weights

KINDS = ["embedding", "conv", "groups", "up", "sequence", "block.self_attn.in_proj_weight", "attention.out_proj"]
KINDS += [f"attention.{part}_proj_weight" for part in "qkv"]
KINDS += ["block.self_attn.out_proj", "block.linear1", "block.linear2"]


def frozen(**choices: Any) -> LTEConfig:
    return LTEConfig(HEADS, **{"merge_every": 3, "rank": RANK, "freeze_a": True, "execution": "batched", **choices})


# ---- against the oracle


@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_training_equals_the_oracle(execution: Any, after_merge: Any) -> None:
    train_both(frozen(execution=execution, after_merge=after_merge), adamw)


@pytest.mark.parametrize("execution", ["batched", "sequential"])
def test_layers_of_every_kind_equal_the_oracle(execution: Any) -> None:
    chosen = frozen(execution=execution, split={"linear1": 2})
    train_both(chosen, adamw, kind=Kinds, factored=KINDS, width=2 * 6 * 6 + 5, steps=7)


@pytest.mark.parametrize(
    ("choices", "clip"),
    [
        ({"norms": "vector-scalar"}, None),
        ({"overlap": 2}, None),
        ({"merge_every": 6, "stagger": 3, "overlap": 4, "outer_optimizer": OUTER[0]}, None),
        ({"replicas": "freeze"}, 0.05),
    ],
    ids=str,
)
def test_other_choices_beside_it_equal_the_oracle(choices: dict[str, Any], clip: float | None) -> None:
    if "norms" in choices:
        train_both(frozen(**choices), adamw, kind=Norms, factored=[*FACTORED, *NORMS])
    else:
        train_both(frozen(**choices), adamw, clip=clip)


# ---- what is trained, and what is kept for backward


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
def test_only_b_is_in_the_optimizer_and_a_stays_as_it_was_drawn(after_merge: Any, execution: Any) -> None:
    model = make_net()
    opt = adamw(model.parameters())
    explorer = Explorer(model, opt, frozen(after_merge=after_merge, execution=execution))
    starts = first_A(explorer)
    for step in range(8):
        train_step(explorer, model, opt, make_data(16, seed=step))
    held = explorer.substitution.held(opt)
    assert {name for name in held if "first.weight" in name or "second" in name} == {f"{n}.weight.B" for n in FACTORED}
    for f in explorer.injection.factors.values():
        assert torch.equal(f.A, starts[f.name]) and f.A.grad is None and f.B.any()
        assert f.anchor_A is None and (f.anchor_B is None) == (after_merge == "reset")
        assert all(p is not f.A for own in opt.param_groups for p in own["params"])


def test_a_redrawn_a_is_new_at_each_merge_and_heads_go_on_from_w() -> None:
    model = make_net()
    opt = adamw(model.parameters())
    explorer = Explorer(model, opt, frozen(after_merge="reset", reset_a="redraw"))
    seen = [first_A(explorer)]
    for step in range(9):
        train_step(explorer, model, opt, make_data(16, seed=step))
        if step % 3 == 2:
            seen.append(first_A(explorer))
            for f in explorer.injection.factors.values():
                assert torch.equal(f.A, f.draw(explorer.merges).to(f.A)) and not f.A.requires_grad
                assert torch.equal(f.effective(0), f.weight)
    assert all(not torch.equal(a[name], b[name]) for a, b in pairwise(seen) for name in FACTORED)


class Straight(nn.Module):
    """Linear layers one after the other, between functions that keep nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(20, 20) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = [x]
        for layer in (self.first, self.second, self.third):
            x = layer(x) + 1.0
            self.inputs.append(x)
        return x


@pytest.mark.parametrize("execution", ["batched", "sequential"])
@pytest.mark.parametrize("after_merge", ["keep", "reset"])
@pytest.mark.parametrize("freeze_a", [True, False])
def test_the_inputs_of_linear_layers_are_kept_for_backward_only_if_a_is_trained(
    freeze_a: bool, after_merge: Any, execution: Any
) -> None:
    model = make_net(Straight)
    opt = adamw(model.parameters())
    explorer = Explorer(model, opt, frozen(freeze_a=freeze_a, after_merge=after_merge, execution=execution))

    def step() -> set[int]:
        kept: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        x = torch.randn(HEADS * 5, 20, dtype=torch.float64)
        head = explorer.head(2) if execution == "sequential" else explorer.heads()
        with head, saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model(x)
        y.sum().backward()
        explorer.after_backward()
        opt.step()
        explorer.step()
        return kept & {x.untyped_storage().data_ptr() for x in model.inputs[:-1]}

    for _ in range(2):
        step()  # while weights are on trial their whole gradients are computed
    assert len(step()) == (0 if freeze_a else 3)


def test_half_as_wide_a_product_is_the_same_one() -> None:
    f = factors(count=3, freeze_a=True)
    with torch.no_grad():
        f.B.copy_(torch.randn_like(f.B))
    f.settle()
    A, B = f.current()
    assert A.shape == f.A.shape and B.shape == f.B.shape and not B.any()
    with torch.no_grad():
        f.B += 1.0
    assert f.anchor_B is not None
    for head in range(3):
        torch.testing.assert_close(
            f.effective(head), f.weight + f.scale * (f.B[head] @ f.A[head] - f.anchor_B[head] @ f.A[head])
        )


# ---- between devices


def learn(injection: Any, seed: int) -> None:
    with torch.no_grad():
        for f in injection.factors.values():
            for i in range(f.count):
                generator = torch.Generator().manual_seed(1000 * seed + 10 * (f.first + i) + len(f.name))
                f.B[i] += torch.randn(f.B[i].shape, generator=generator)


def merges(choices: dict[str, Any], rounds: int, travelling: bool = False) -> list[dict[str, Any]]:
    """After every merge: W, what W will be once all that rounding took is merged, and the bytes."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    transport, chosen = Transport(world, rank), config(freeze_a=True, **choices)
    injection = made(chosen, torch.float32, transport)
    seen = []
    for number in range(rounds):
        learn(injection, seed=number)
        sent = transport.bytes_sent
        if travelling:
            statistics = RunningStatistics(injection.module)
            merge = Merge(
                list(injection.factors.values()), injection.replicas, statistics, transport, chosen,
                step=number + 1, merges=number,
            )  # fmt: skip
            merge.start({})
            learn(injection, seed=100 + number)
            merge.exchange()
            learn(injection, seed=200 + number)
            merge.land({})
        else:
            merge_all(injection, chosen, transport, step=number + 1, merges=number)
        sent = transport.bytes_sent - sent
        due = {}
        for f in injection.factors.values():
            left = f.summed_delta(torch.ones(f.count, dtype=torch.bool))
            transport.sum_([left])
            due[f.name] = f.weight.detach() + left / MERGED_HEADS
        seen.append({"W": weights(injection), "due": due, "bytes": sent})
    return seen


@pytest.mark.parametrize(
    ("choices", "travelling"),
    [
        ({"payload": "dense"}, False),
        ({"payload": "dense"}, True),
        ({"payload": "factors"}, False),
        ({"payload": "factors"}, True),
        ({"payload": "factors", "after_merge": "reset"}, False),
        ({"payload": "factors", "after_merge": "reset", "reset_a": "redraw"}, False),
    ],
    ids=str,
)
def test_every_payload_merges_what_one_device_merges(choices: dict[str, Any], travelling: bool) -> None:
    exact = merges(choices, 4, travelling)
    for own in run(merges, 2, choices, 4, travelling):
        for seen, expected in zip(own, exact, strict=True):
            for name, W in seen["W"].items():
                torch.testing.assert_close(W, expected["W"][name], rtol=1e-5, atol=1e-5)


def test_factors_of_weights_in_half_precision_are_not_sent_otherwise_than_was_asked_for() -> None:
    net = make_net().bfloat16()
    with pytest.raises(ValueError, match=r"received payload='factors' and wire='int8'.* Give payload='dense', or"):
        Explorer(net, adamw(net.parameters()), frozen(payload="factors", wire="int8"))
    assert all(type(layer).__module__.startswith("torch.nn") for layer in net.children())
    for choices in ({"payload": "auto"}, {"payload": "factors", "wire": "float32"}):
        chosen = frozen(**{"wire": "int8", **choices})
        Explorer(net, adamw(net.parameters()), chosen).finish()


@pytest.mark.parametrize("wire", ["int8", "bfloat16"])
def test_what_rounding_takes_comes_with_the_next_merge(wire: str) -> None:
    exact = merges({}, 8)
    results = run(merges, 2, {"wire": wire, "payload": "factors"}, 8)
    for own, other, expected in zip(*results, exact, strict=True):
        for name, W in own["W"].items():
            assert torch.equal(W, other["W"][name])
            torch.testing.assert_close(own["due"][name], expected["W"][name], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(W, expected["W"][name], rtol=0.1, atol=0.1)


def test_a_travels_once_and_b_alone_after_that() -> None:
    """float32, 2 devices: each sends its own factors to the other."""
    sent = {}
    for reset_a in ("keep", "redraw"):
        choices = {"payload": "factors", "after_merge": "reset", "reset_a": reset_a}
        sent[reset_a] = [seen["bytes"] for seen in run(merges, 2, choices, 3)[0]]
    injection = made(config(freeze_a=True), torch.float32)
    of_A = sum(f.A.nbytes for f in injection.factors.values()) // 2
    assert sent["keep"][1] == sent["keep"][2] == sent["keep"][0] - of_A
    assert sent["redraw"] == [sent["keep"][0]] * 3


def test_the_choice_of_the_payload_counts_b_alone() -> None:
    by_freeze = {}
    for freeze_a in (False, True):
        f = factors(count=2, out_features=24, in_features=24, dtype=torch.float32, freeze_a=freeze_a)
        by_freeze[freeze_a] = sizes(f)[1], sizes(f, "int8")[1]
        # 2 b (w - 1) / w bytes of dense deltas are fewer from this many devices on.
        turn = 2 * 24 * 24 * 4 // by_freeze[freeze_a][0]
        assert is_dense(f, turn) and not is_dense(f, turn - 1)
    assert by_freeze[True][0] * 4 == by_freeze[False][0] and by_freeze[True][1] * 4 == by_freeze[False][1]


def test_in_half_precision_fewer_bits_are_those_of_dense_deltas() -> None:
    f = factors(dtype=torch.bfloat16, freeze_a=True)
    assert is_dense(f, 2, "int8", "factors") and not is_dense(f, 2, "float32", "factors")


@pytest.mark.parametrize(
    ("after_merge", "more"),
    [
        ("keep", {}),
        ("reset", {}),
        ("keep", {"payload": "factors"}),
        ("reset", {"payload": "factors"}),
        ("keep", {"payload": "factors", "wire": "int8"}),
    ],
    ids=str,
)
def test_heads_give_the_same_weights_wherever_they_sit(after_merge: str, more: dict[str, Any]) -> None:
    args = (4, after_merge, "merge", None, "batched", {"freeze_a": True, **more})
    states = run(on_devices, 2, *args)
    alone = on_devices(*args)
    for name, value in alone.items():
        assert torch.equal(states[0][name], states[1][name])
        tolerance = {"rtol": 0.05, "atol": 2e-3} if "wire" in more else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(states[0][name], value, **tolerance)


def with_a_bad_head(bad: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Merge twice; before the first time one head is not finite."""
    transport = Transport(dist.get_world_size(), dist.get_rank())
    chosen = config(freeze_a=True, payload="factors")
    injection = made(chosen, torch.float64, transport)
    starts = {f.name: f.A.detach().clone() for f in injection.factors.values()}
    for number in range(2):
        learn(injection, seed=number)
        if number == 0 and bad is not None:
            for f in injection.factors.values():
                if f.first <= bad < f.first + f.count:
                    f.B.data[bad - f.first] = torch.inf
        merge_all(injection, chosen, transport, step=number + 1, merges=number)
    return weights(injection), starts, {f.name: f.A.detach().clone() for f in injection.factors.values()}


def test_a_bad_head_starts_again_with_the_a_that_all_devices_know() -> None:
    results = run(with_a_bad_head, 2, 3)
    for name, W in results[0][0].items():
        assert W.isfinite().all() and torch.equal(W, results[1][0][name])
    for _, starts, ends in results:
        assert all(torch.equal(ends[name], A) for name, A in starts.items())


def stopped_apart() -> dict[str, Tensor]:
    """One device has been stopped when it knew all A, and the other before."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = make_net()
    opt = adamw(model.parameters())
    explorer = Explorer(model, opt, frozen(payload="factors"), Transport(world, rank))
    for step in range(4):
        x, y = (t.chunk(world)[rank] for t in make_data(4 * HEADS, seed=step))
        train_step(explorer, model, opt, (x, y))
    factors = list(explorer.injection.factors.values())
    assert all(f.all_A is not None and len(f.all_A) == HEADS for f in factors)
    if rank == 0:
        for f in factors:
            f.all_A = None
    explorer.merge(everything=True)
    return clone(model.state_dict())


def test_a_last_merge_does_not_ask_who_knows_what() -> None:
    first, second = run(stopped_apart, 2)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


def grown() -> dict[str, Tensor]:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = make_net()
    opt = adamw(model.parameters())
    chosen = frozen(payload="factors", grow_heads={5: 2 * HEADS})
    explorer = Explorer(model, opt, chosen, Transport(world, rank))
    for step in range(10):
        x, y = (t.chunk(world)[rank] for t in make_data(4 * HEADS, seed=step))
        train_step(explorer, model, opt, (x, y))
    assert explorer.config.heads == 2 * HEADS
    for f in explorer.injection.factors.values():
        assert not f.A.requires_grad and (world == 1 or (f.all_A is not None and len(f.all_A) == 2 * HEADS))
    explorer.finish()
    return clone(model.state_dict())


def test_heads_that_come_later_make_theirs_known() -> None:
    expected = grown()
    for state in run(grown, 2):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11)


def test_a_plain_loop_goes_on_exactly() -> None:
    ends = []
    for stop in (None, 4):
        model = make_net()
        opt = adamw(model.parameters())
        explorer = Explorer(model, opt, frozen())
        for step in range(9):
            if step == stop:
                state, plain = explorer.state_dict(), clone(model.state_dict())
                assert state is not None and set(state["factors"]["first"]) == {"A", "B", "anchor_B"}
                model = make_net()
                model.load_state_dict(plain)
                opt = adamw(model.parameters())
                # Another seed: A comes from the checkpoint.
                explorer = Explorer(model, opt, frozen(seed=5))
                explorer.load_state_dict(state)
            train_step(explorer, model, opt, make_data(16, seed=step))
        explorer.finish()
        ends.append(clone(model.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=0)


def test_gradients_of_local_heads_are_of_their_own_losses() -> None:
    """n heads share the mean of their losses, and B's gradient alone is put right."""
    model, alone = make_net(), make_net()
    explorer = Explorer(model, adamw(model.parameters()), frozen())
    single = Explorer(alone, adamw(alone.parameters()), LTEConfig(1, 3, rank=RANK, freeze_a=True))
    x, y = make_data(4 * HEADS)
    with explorer.heads():
        cross_entropy(model(x), y).backward()
    with single.heads():
        cross_entropy(alone(x[:4]), y[:4]).backward()
    pairs = zip(explorer.injection.factors.values(), single.injection.factors.values(), strict=True)
    for f, own in pairs:
        assert f.B.grad is not None and own.B.grad is not None
        torch.testing.assert_close(f.B.grad[0], own.B.grad[0])


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_it_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match=r"freeze_a must be true or false; received .* Give freeze_a=True"):
        LTEConfig(4, freeze_a=value)
