from __future__ import annotations

import copy
import importlib.util
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional

from lightning_lte import Explorer, LTEConfig, LTEStrategy, Transport
from lightning_lte import rounded as module_rounded
from lightning_lte.rounded import Rounded, rounded, stochastically_rounded, unrounded
from tests.modules import (
    RANK,
    Module,
    Net,
    clone,
    loader,
    make_data,
    make_net,
    sgd,
    train_step,
    trainer,
)
from tests.oracle import Oracle
from tests.processes import run
from tests.test_checkpoint import assert_equal, train

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="nf4 needs bitsandbytes: pip install '.[quantized]'"
)
KINDS: list[Any] = ["bfloat16", "int8", pytest.param("nf4", marks=needs_bitsandbytes)]
COPIES = ["cpu", "sharded", "error-feedback"]
HEADS = 4
# Appendix E of the paper on QLoRA (arXiv 2305.14314).
# fmt: off
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on


def literally_rounded(x: Tensor, kind: str) -> Tensor:
    """What the numbers of a matrix are rounded to, one by one."""
    if kind == "bfloat16":
        return x.to(torch.bfloat16).to(x.dtype)
    rows = x.float()
    if kind == "int8":
        new = []
        for row in rows:
            step = row.abs().max() / 127
            new.append(torch.stack([step * torch.round(number / step) for number in row]) if step > 0 else row)
        return torch.stack(new).to(x.dtype)
    flat, blocks = rows.flatten(), []
    for block in flat.split(64):
        largest = block.abs().max()
        nearest = [(LEVELS - number / largest).abs().argmin() for number in block]
        blocks.append(torch.stack([LEVELS[i] * largest for i in nearest]) if largest > 0 else block)
    return torch.cat(blocks).view_as(x).to(x.dtype)


def matrix(rows: int = 12, columns: int = 20, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Loop:
    """A plain loop over batches of their own."""

    def __init__(self, kind: Any, copy: Any = "cpu", transport: Transport | None = None, **choices: Any) -> None:
        self.net = make_net()
        self.opt = sgd(self.net.parameters())
        choices = {"heads": HEADS, "merge_every": 3, "execution": "batched", "rank": RANK, **choices}
        self.explorer = Explorer(self.net, self.opt, LTEConfig(base=kind, base_copy=copy, **choices), transport)
        self.done = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            train_step(self.explorer, self.net, self.opt, make_data(16, seed=self.done))
            self.done += 1

    def exact(self) -> dict[str, Tensor]:
        return {f.name: f.exact() for f in self.explorer.injection.factors.values()}


# ---- rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(13, 17), (16, 16), (8, 64), (4, 96)], ids=str)
def test_numbers_are_rounded_as_is_said(kind: Any, shape: tuple[int, int]) -> None:
    x = matrix(*shape)
    x[3] = 0
    found = unrounded(rounded(x, kind), kind, x.shape, x.dtype)
    torch.testing.assert_close(found, literally_rounded(x, kind), rtol=1e-6, atol=1e-7)
    zeros = torch.zeros(4, 6)
    assert torch.equal(unrounded(rounded(zeros, kind), kind, zeros.shape, zeros.dtype), zeros)


@pytest.mark.parametrize(
    ("kind", "bytes_per_number"), [(KINDS[0], 2.0), (KINDS[1], 1.0), pytest.param("nf4", 0.5, marks=needs_bitsandbytes)]
)
def test_a_rounded_matrix_takes_the_bytes_of_its_numbers_and_scales(kind: Any, bytes_per_number: float) -> None:
    x = matrix(64, 256, dtype=torch.float32)
    scales = {"bfloat16": 0, "int8": 64 * 4, "nf4": 64 * 256 // 64 * 4}[kind]
    assert sum(part.nbytes for part in rounded(x, kind)) == x.numel() * bytes_per_number + scales


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_forwards_read_is_laid_out_alike_whatever_strides_the_weight_has(kind: Any) -> None:
    """Or a run whose shared rows were put together since would differ in rounding from one that is resumed."""
    own = Rounded(nn.Parameter(torch.randn(6, 4).mT), kind, "sharded", Transport())
    assert all(part.is_contiguous() for part in own._parts)


def test_what_is_rounded_by_chance_is_right_in_the_mean() -> None:
    x = matrix(1, 2).float()
    rows = torch.cat([x, torch.tensor([[1.0, 1.0 / 127 / 4]])]).repeat(4000, 1)
    found = unrounded(stochastically_rounded(rows), "int8", rows.shape, rows.dtype)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((found - rows).abs() <= step * 1.001).all()
    means = found.view(4000, 2, 2).mean(0)
    torch.testing.assert_close(means, rows[:2], rtol=0, atol=5 * float(step.max()) / 4000**0.5)
    again = unrounded(stochastically_rounded(rows), "int8", rows.shape, rows.dtype)
    assert torch.equal(found, again)


# ---- forwards


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_forward_is_that_of_the_rounded_weight_and_keeps_nothing_of_its_size(
    kind: Any, dtype: torch.dtype, autocast: bool
) -> None:
    weight = nn.Parameter(matrix(dtype=torch.float32))
    low = Rounded(weight, kind, "cpu", Transport())
    x, bias = matrix(6, 20, seed=1, dtype=dtype).view(2, 3, 20), matrix(1, 12, seed=2, dtype=dtype)[0]
    saved: list[Tensor] = []
    results = []
    for which in ("product", "linear"):
        own_x, own_bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if which == "product":
                with hooks:
                    y = low.product(own_x, own_bias)
            else:
                y = functional.linear(own_x, low.read(dtype), own_bias)
        y.square().sum().backward()
        results.append((y.detach(), own_x.grad, own_bias.grad))
    tolerance: dict[str, Any] = {"rtol": 2e-2, "atol": 5e-2} if autocast or dtype == torch.bfloat16 else {}
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, **tolerance)
    assert not [t for t in saved if t.numel() >= weight.numel()]


@pytest.mark.parametrize("heads", [1, 2])
def test_many_gradients_come_in_one_batch(heads: int) -> None:
    loop = Loop("bfloat16", heads=heads)
    loop.steps(5)
    x, _ = make_data(4, seed=9)
    each: list[Tensor] = []
    for vectorize in (True, False):
        with loop.explorer.heads():
            each.append(torch.autograd.functional.jacobian(loop.net, x, vectorize=vectorize))
    torch.testing.assert_close(*each)


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_and_forward_mode_derivatives_see_what_forwards_do(kind: Any, freeze_a: bool) -> None:
    loop = Loop(kind, heads=1, freeze_a=freeze_a)
    loop.steps(5)
    x, _ = make_data(4, seed=9)
    with loop.explorer.heads():
        expected = torch.autograd.functional.jacobian(loop.net, x[0])
        torch.testing.assert_close(torch.func.vmap(loop.net)(x), loop.net(x))
        torch.testing.assert_close(torch.func.jacrev(loop.net)(x[0]), expected)
        torch.testing.assert_close(torch.func.jacfwd(loop.net)(x[0]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_compiles_into_one_graph(kind: Any) -> None:
    loop = Loop(kind, execution="batched")
    loop.steps(3)
    x = make_data(16)[0]
    compiled = torch.compile(loop.net, backend="aot_eager", fullgraph=True)
    with loop.explorer.heads():
        torch.testing.assert_close(compiled(x), loop.net(x))
    loop.explorer.merge()
    with loop.explorer.heads(), torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), loop.net(x))


# ---- training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy", COPIES[:2])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"after_merge": "reset"},
        {"execution": "sequential"},
        {"outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)},
    ],
    ids=str,
)
def test_training_is_that_of_the_oracle_whose_weight_is_rounded_after_each_merge(
    kind: Any, copy: Any, choices: dict[str, Any]
) -> None:
    loop = Loop(kind, copy, **choices)
    factors = list(loop.explorer.injection.factors.values())
    oracle = Oracle(
        make_net(),
        {f.name: f.A.detach().clone() for f in factors},
        scale=2.0,
        period=3,
        optimizer=sgd,
        after_merge=choices.get("after_merge", "keep"),
        outer=choices.get("outer_optimizer"),
        rounded=lambda weight: literally_rounded(weight, kind),
    )
    for step in range(11):
        loop.steps(1)
        x, y = make_data(16, seed=step)
        oracle.step(list(zip(x.chunk(HEADS), y.chunk(HEADS), strict=True)), functional.cross_entropy)
        for f in factors:
            torch.testing.assert_close(f.exact(), oracle.merged.get_submodule(f.name).weight.detach())
            assert (f.rounded is not None) == (step >= 1)
            for head in range(HEADS):
                torch.testing.assert_close(f.effective(head), oracle.worker_weight(head, f.name), rtol=1e-6, atol=1e-7)
    loop.explorer.finish()
    for name, value in oracle.finish().state_dict().items():
        torch.testing.assert_close(loop.net.state_dict()[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_loses_nothing_in_the_mean(kind: Any) -> None:
    """Deltas far smaller than a step of the rounded weight, and than one of its error, still add up."""
    start = matrix(8, 64, dtype=torch.float32)
    low = Rounded(nn.Parameter(start.clone()), kind, "error-feedback", Transport())
    delta = torch.full_like(start, 1e-5)
    for _ in range(400):
        low.write(low.exact() + delta)
    moved = low.exact() - start
    assert float(moved.mean()) == pytest.approx(400e-5, rel=0.1)
    lost = rounded(start, kind)
    for _ in range(400):
        lost = rounded(unrounded(lost, kind, start.shape, start.dtype) + delta, kind)
    assert float((unrounded(lost, kind, start.shape, start.dtype) - start).mean()) < 100e-5


def _sharded(copy: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    transport = Transport(dist.get_world_size(), dist.get_rank())
    loop = Loop("int8", copy, transport, verify_every=1, heads=3)
    loop.steps(8)
    sizes = sum(f.rounded._rows.numel() for f in loop.explorer.injection.factors.values() if f.rounded)
    state = clone(loop.explorer.module_state())
    loop.explorer.finish()
    return state, clone(loop.net.state_dict()), sizes


def test_sharded_rows_are_the_weight() -> None:
    """As with the whole on the CPU, on 3 devices, which don't divide the rows."""
    whole, sharded = run(_sharded, 3, "cpu"), run(_sharded, 3, "sharded")
    for (expected, expected_end, _), (_, end, rows) in zip(whole, sharded, strict=True):
        for name, value in expected_end.items():
            assert torch.equal(end[name], value)
        assert rows == sum(-(-len(w) // 3) * w.shape[1] for n, w in expected.items() if n in FACTORED_WEIGHTS)
    for name, value in whole[0][0].items():
        assert torch.equal(sharded[0][0][name], value)


FACTORED_WEIGHTS = ("first.weight", "second.weight")


def _left_alone() -> tuple[dict[str, Tensor], list[str]]:
    loop = Loop("int8", "sharded", Transport(dist.get_world_size(), dist.get_rank()))
    loop.steps(4)
    shown = clone(loop.net.state_dict())
    with pytest.warns(UserWarning, match="stay rounded to int8: first, second") as caught:
        loop.explorer.close()
    for name in FACTORED_WEIGHTS:
        assert torch.equal(loop.net.state_dict()[name], shown[name])
    return shown, [str(w.message) for w in caught]


def test_where_devices_cannot_meet_weights_stay_rounded_and_that_is_said() -> None:
    assert len(run(_left_alone, 2)) == 2


# ---- the user's module


@pytest.mark.parametrize("copy", COPIES)
def test_the_module_is_an_ordinary_one(copy: Any) -> None:
    loop = Loop("int8", copy)
    loop.steps(4)
    exact = loop.exact()
    shown = dict(loop.net.named_parameters())
    assert all(f.weight is shown[f"{f.name}.weight"] for f in loop.explorer.injection.factors.values())
    twin, other = copy_of(loop.net), pickle.loads(pickle.dumps(loop.net))
    for net in (loop.net, twin, other):
        state = net.state_dict()
        for name, weight in exact.items():
            own = state[f"{name}.weight"]
            assert type(own) in (Tensor, nn.Parameter) and own.dtype == torch.float64
            torch.testing.assert_close(own.detach(), weight, **({} if copy != "sharded" else ROUGH))
    x = make_data(5)[0]
    torch.testing.assert_close(twin(x), loop.net(x))
    for name, weight in exact.items():
        parameter = shown[f"{name}.weight"]
        assert torch.equal(parameter, weight) if copy == "cpu" else parameter.isnan().all()
        # One number, whatever the shape.
        assert copy == "cpu" or parameter.untyped_storage().nbytes() == parameter.itemsize
    loop.explorer.finish()
    for name, parameter in loop.net.named_parameters():
        assert parameter is shown[name] and parameter.isfinite().all() and parameter.is_contiguous()
    assert not any(isinstance(m, nn.Linear) and type(m) is not nn.Linear for m in loop.net.modules())


ROUGH = {"rtol": 0.0, "atol": 0.02}


def copy_of(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def test_evaluation_sees_the_weight_itself_where_it_is_whole() -> None:
    x = make_data(5)[0]
    for kept in COPIES:
        loop = Loop("int8", kept)
        loop.steps(4)
        plain = make_net()
        state = {n: v.clone() for n, v in loop.net.state_dict().items()}
        rounded_weights = {f.name: f.base() for f in loop.explorer.injection.factors.values()}
        for name, weight in loop.exact().items():
            state[f"{name}.weight"] = rounded_weights[name] if kept == "sharded" else weight
        plain.load_state_dict(state)
        torch.testing.assert_close(loop.net.eval()(x), plain.eval()(x))


def test_a_weight_that_is_written_elsewhere_is_trained_directly_from_its_exact_value() -> None:
    loop = Loop("int8", "cpu")
    loop.steps(4)
    with torch.no_grad():
        loop.net.first.weight.mul_(0.5)
    expected = loop.net.first.weight.detach().clone()
    with pytest.warns(UserWarning, match="Trained without heads, as replicas: first"):
        loop.explorer.after_backward()
    assert set(loop.exact()) == {"second"}
    # What its heads had learned since the last merge is added.
    torch.testing.assert_close(loop.net.first.weight.detach(), expected, rtol=0, atol=0.5)
    loop.steps(3)
    loop.explorer.finish()


def test_heads_go_on_from_weights_that_are_loaded() -> None:
    loop = Loop("int8", "cpu")
    loop.steps(4)
    with torch.no_grad():
        for parameter in loop.net.parameters():
            parameter.mul_(0.5)
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        loop.explorer.after_backward()
    for f in loop.explorer.injection.factors.values():
        expected = literally_rounded(f.weight.detach(), "int8")
        torch.testing.assert_close(f.base(), expected, rtol=1e-6, atol=1e-7)


def _loaded_while_training(copy: str) -> None:
    several = dist.is_initialized()
    transport = Transport(dist.get_world_size(), dist.get_rank()) if several else None
    loop = Loop("int8", copy, transport)
    loop.steps(4)
    parameters = dict(loop.net.named_parameters())
    other = {name: value.detach() * 0.5 + 0.1 for name, value in make_net().state_dict().items()}
    loop.net.load_state_dict(other)
    with pytest.warns(UserWarning, match="All weights were written from outside"):
        loop.explorer.act()
    assert all(parameters[name] is p for name, p in loop.net.named_parameters())
    factors = list(loop.explorer.injection.factors.values())
    for f in factors:
        loaded = other[f"{f.name}.weight"]
        near: dict[str, Any] = {"rtol": 0, "atol": 1e-4} if copy == "error-feedback" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(f.exact(), loaded, **near)
        for head in range(f.count):
            torch.testing.assert_close(
                f.effective(head), literally_rounded(loaded, "int8").double(), rtol=1e-6, atol=1e-7
            )
    loop.steps(3)
    loop.explorer.finish()
    assert all(p.isfinite().all() for p in loop.net.parameters())


@pytest.mark.parametrize("copy", COPIES)
def test_heads_go_on_from_a_state_dict_that_is_loaded_while_they_train(copy: str) -> None:
    _loaded_while_training(copy)


def test_so_they_do_where_devices_share_the_rows() -> None:
    run(_loaded_while_training, 2, "sharded")


@pytest.mark.parametrize("copy", COPIES[1:])
def test_loading_takes_only_what_is_given_and_fits(copy: str) -> None:
    loop = Loop("int8", copy)
    loop.steps(4)
    before, weight = loop.exact(), loop.net.first.weight
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"):
        loop.net.load_state_dict({"first.weight": torch.zeros(2, 2)}, strict=False)
    result = loop.net.load_state_dict({"second.weight": before["second"] * 2}, strict=False)
    assert "first.weight" in result.missing_keys and not result.unexpected_keys
    assert loop.net.first.weight is weight and weight.isnan().all()
    after = loop.exact()
    assert torch.equal(after["first"], before["first"])
    torch.testing.assert_close(after["second"], before["second"] * 2, rtol=0, atol=1e-3)
    new = torch.ones_like(before["first"])
    loop.net.load_state_dict({"first.weight": new}, strict=False, assign=True)
    assert loop.net.first.weight.data_ptr() == new.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy", COPIES)
def test_a_run_resumes_exactly_in_the_middle_of_a_period(kind: Any, copy: Any, tmp_path: Path) -> None:
    choices = {"base": kind, "base_copy": copy}
    whole = train(str(tmp_path / "whole"), 3, **choices)
    train(str(tmp_path / "part"), 1, **choices)
    [first] = (tmp_path / "part").glob("epoch=0*")
    saved = torch.load(first, weights_only=True)
    assert bool(saved["lte"]["bases"]["net.first"]) == (copy == "error-feedback")
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert_equal(whole, train(str(tmp_path / "rest"), 3, resume=str(first), **choices))


def _resume_on_two(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    choices: dict[str, Any] = {"devices": 2, "base": "int8", "base_copy": "sharded"}
    whole = train(f"{folder}/whole", 3, **choices)
    train(f"{folder}/part", 1, **choices)
    [first] = Path(folder, "part").glob("epoch=0*")
    return whole, train(f"{folder}/rest", 3, resume=str(first), **choices)


def test_a_run_with_sharded_rows_resumes_exactly(tmp_path: Path) -> None:
    for whole, resumed in run(_resume_on_two, 2, str(tmp_path), group=False, timeout_s=120):
        assert_equal(whole, resumed)


def _resume_from_both(folder: str, copy: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    def fit(form: Any, resume: str | None = None) -> dict[str, Tensor]:
        strategy = LTEStrategy(2, 3, rank=RANK, base="int8", base_copy=copy, checkpoint=form)  # type: ignore[arg-type]
        keep = ModelCheckpoint(folder, filename=form, every_n_train_steps=4, save_top_k=-1)
        callbacks = [] if resume else [keep]
        t = trainer(strategy, devices=2, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        module = Module()
        t.fit(module, loader(8 * 16), ckpt_path=resume)
        return clone(module.state_dict())

    return [(fit(form), fit(form, f"{folder}/{form}.ckpt")) for form in ("gathered", "sharded")]


@pytest.mark.parametrize("copy", COPIES)
def test_both_forms_of_checkpoints_keep_what_is_needed(copy: str, tmp_path: Path) -> None:
    """After 4 steps, which are an epoch, with a merge every 3."""
    for ends in run(_resume_from_both, 2, str(tmp_path), copy, group=False, timeout_s=120):
        for whole, resumed in ends:
            assert_equal(whole, resumed)
    assert (tmp_path / "sharded.ckpt").is_dir()


def test_a_run_goes_on_in_another_precision(tmp_path: Path) -> None:
    train(str(tmp_path / "part"), 1, base="int8", base_copy="error-feedback")
    [first] = (tmp_path / "part").glob("epoch=0*")
    for choices in ({}, {"base": "bfloat16", "base_copy": "error-feedback"}, {"base": "int8"}):
        after = train(str(tmp_path / str(choices)), 2, resume=str(first), **choices)["after"]
        assert all(value.isfinite().all() for value in after.values())


# ---- what is refused, and what is said


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"base": "fp16"}, "base must be one of"),
        ({"base": "int8", "base_copy": "gpu"}, "base_copy must be one of"),
        ({"base_copy": "sharded"}, "received base_copy='sharded'. Give base='nf4'"),
        ({"base": "int8", "base_copy": "sharded", "overlap": 2}, "received overlap=2"),
        ({"base": "int8", "shard": 2}, "received shard=2 with base='int8'"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LTEConfig(2, **choices)


@pytest.mark.parametrize("choices", [{"heads": 1}, {"heads": 1, "freeze_a": True}, {"execution": "batched"}], ids=str)
def test_a_cuda_graph_of_a_forward_is_refused(choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges round anew, to another place in memory, of which replays know nothing."""
    loop = Loop("int8", **choices)
    loop.steps(3)
    monkeypatch.setattr("lightning_lte.rounded.is_captured", lambda device: True)
    with loop.explorer.heads(), pytest.raises(RuntimeError, match=r"CUDA graph.*'int8'.*Give base='float32'"):
        loop.net(make_data(4)[0])


def test_kernels_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_rounded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"base='nf4'.*pip install 'lightning-lte\[quantized\]'"):
        LTEConfig(2, base="nf4")
    LTEConfig(2, base="int8")


def test_a_module_without_linear_layers_is_refused_and_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    opt = sgd(net.parameters())
    with pytest.raises(ValueError, match="base='int8' is for factored weights of linear layers"):
        Explorer(net, opt, LTEConfig(2, rank=2, base="int8"))
    assert all(type(m) is nn.Conv2d for m in net if not isinstance(m, nn.ReLU))
    half = Net().bfloat16()
    with pytest.raises(ValueError, match="not int8: it is in bfloat16"):
        Explorer(half, sgd(half.parameters()), LTEConfig(2, rank=2, base="int8"))


def test_the_report_says_what_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Conv1d(16, 16, 3), nn.TransformerEncoderLayer(16, 2, 32))
    explorer = Explorer(net, sgd(net.parameters()), LTEConfig(2, rank=2, base="int8"))
    reasons = {entry.name: entry.reason for entry in explorer.report.entries}
    assert reasons["0.weight"] == "rank 2, scale 2, int8"
    assert reasons["1.weight"].endswith("not int8: Conv1d is no linear layer")
    assert reasons["2.linear1.weight"].endswith("nn.TransformerEncoderLayer uses it without calling its layer")
    assert reasons["2.self_attn.out_proj.weight"].endswith("not int8: MultiheadAttention is no linear layer")


def test_callbacks_that_average_weights_are_refused_where_these_are_nowhere_whole() -> None:
    for kept, refused in (("cpu", False), ("error-feedback", True)):
        strategy = LTEStrategy(heads=2, rank=RANK, base="int8", base_copy=kept, execution="batched")
        run_ = trainer(strategy, max_epochs=1, callbacks=[WeightAveraging()])
        if refused:
            with pytest.raises(ValueError, match="received WeightAveraging and base_copy='error-feedback'"):
                run_.fit(Module(), loader())
        else:
            run_.fit(Module(), loader())


def test_sharded_rows_are_gathered_when_training_ends_and_not_when_heads_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered, gather = [], Explorer.gather_bases

    def watched(explorer: Explorer) -> None:
        gathered.append(explorer.clock.step)
        gather(explorer)

    monkeypatch.setattr(Explorer, "gather_bases", watched)
    strategy = LTEStrategy(2, 3, rank=RANK, grow_heads={4: 4}, base="int8", base_copy="sharded")
    trainer(strategy, max_steps=7).fit(Module(make_net()), loader(7 * 16))
    assert set(gathered) == {7}
