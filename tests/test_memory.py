"""Memory formats, activation checkpointing and offload: how activations are laid out and kept is the user's choice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, TensorDataset

from lightning_lte import Explorer, LTEConfig, LTEStrategy
from tests.modules import (
    CLASSES,
    RANK,
    Kinds,
    Module,
    Recorder,
    after_backward,
    clone,
    make_data,
    make_net,
    sgd,
    trainer,
)

HEADS = 4
WAYS: list[dict[str, Any]] = [
    {"heads": HEADS, "execution": "batched"},
    {"heads": HEADS, "execution": "sequential"},
    {"heads": HEADS, "execution": "batched", "freeze_a": True},
    {"heads": 1},
]
per_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(str(v) for v in way.values()))
LAST = torch.channels_last
_aten = torch.ops.aten
_PRODUCTS = [_aten.mm.default, _aten.addmm.default]

# ---- channels last


class Convolutions(nn.Module):
    """Keeps what its convolutions give."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.groups = nn.Conv2d(16, 32, 3, stride=2, groups=2, bias=False)
        self.circular = nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Linear(16, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        for layer in (self.first, self.groups, self.circular, self.up):
            x = layer(x)
            self.seen.append(x)
            x = torch.tanh(x)
        return self.out(x.mean((2, 3)))


def images(samples: int = 48) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(samples) % CLASSES), batch_size=16)


class Formatted(Module):
    format = LAST

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0].contiguous(memory_format=self.format)), batch[1])


class Plain(Formatted):
    format = torch.contiguous_format


@per_way
def test_convolutions_in_channels_last_stay_so(way: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for kind in (Formatted, Plain):

        def look(t: Any, m: Any, last: bool = kind is Formatted) -> list[bool]:
            weights = [p for p in m.parameters() if p.dim() == 4]
            laid_out = [t.is_contiguous(memory_format=LAST) and not t.is_contiguous() for t in (*m.net.seen, *weights)]
            assert len(laid_out) == 8
            return [own == last for own in laid_out]

        path = tmp_path / "three.ckpt"
        for steps, resume in ((4, None), (8, path)):
            module = kind(make_net(Convolutions).to(memory_format=kind.format), sgd)
            recorder = Recorder(look)
            t = trainer(LTEStrategy(merge_every=3, rank=RANK, **way), max_steps=steps, callbacks=[recorder])
            t.fit(module, images(160), ckpt_path=resume, weights_only=False)
            assert recorder.seen and all(all(own) for own in recorder.seen)
            t.save_checkpoint(path)
        ends.append(clone(module.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11)


# ---- what autograd keeps


def kept(forward: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, but those of tensors that are there anyway."""
    others = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())


def held(explorer: Explorer) -> list[Tensor]:
    """What is there of heads whatever a forward does."""
    return [*factors_of(explorer), *(r.copies for r in explorer.injection.replicas)]


def factors_of(explorer: Explorer) -> list[Tensor]:
    """Factors and anchors."""
    found = [t for f in explorer.injection.factors.values() for t in (f.A, f.B, f.anchor_A, f.anchor_B)]
    return [t for t in found if t is not None]


def past_the_first_steps(explorer: Explorer, optimizer: torch.optim.Optimizer, forward: Callable[[], Tensor]) -> None:
    """In these weights are watched, and whole whatever their base is, so that more is kept."""
    for _ in range(3):
        with explorer.heads():
            loss = forward().float().square().mean()
        with explorer.backward():
            loss.backward()
        after_backward(explorer, optimizer)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(16, 24, 3, padding=1),
    "2d": lambda: nn.Conv2d(16, 24, 3, padding=1),
    "groups": lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2),
    "circular": lambda: nn.Conv2d(16, 24, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(16, 24, 2, stride=2),
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2], WAYS[3]], ids=lambda way: " ".join(str(v) for v in way.values()))
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_keep_their_input_once(case: str, way: dict[str, Any], half: bool) -> None:
    """As the layer before keeps it, and beside it no more than what is of the size of the rank."""
    net = nn.Sequential(nn.Sigmoid(), CONVOLUTIONS[case](), nn.Flatten(), nn.LazyLinear(CLASSES))
    x = torch.randn(16, 16, *[12] * (net[1].weight.dim() - 2)).requires_grad_()  # type: ignore[union-attr, operator]
    net(x)

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            net[1](net[0](x))

    full = kept(forward, list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(merge_every=100, rank=1, **way))
    past_the_first_steps(explorer, optimizer, lambda: net(x))
    factors = [f for f in explorer.injection.factors.values() if f.weight is net[1].weight]
    copies = [r.copies for r in explorer.injection.replicas if r.param is net[1].weight]
    of_rank = sum(16 * 12 ** (x.dim() - 2) * f.rank * f.matrices.count * 4 for f in factors)
    # A frozen A is left to plain operations, which keep B - B'.
    differences = sum(f.B.nbytes for f in factors if f.freeze_a)
    with explorer.heads():
        own = kept(forward, [*net.parameters(), *held(explorer)])
    # Replicas are kept in the dtype of autocast.
    assert own <= full + of_rank + differences + half * sum(t.nbytes for t in copies)


@pytest.mark.parametrize(("heads", "size"), [(1, 12), (2, 12), (2, 48)])
def test_where_there_are_many_patches_no_copy_of_the_input_is_kept(heads: int, size: int) -> None:
    net = nn.Sequential(nn.Sigmoid(), nn.Conv2d(16, 24, 2, stride=2), nn.Flatten(), nn.LazyLinear(CLASSES))
    x = torch.randn(16, 16, size, size).requires_grad_()
    net(x)
    full = kept(lambda: net[1](net[0](x)), list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(heads, merge_every=100, rank=1, execution="batched"))
    past_the_first_steps(explorer, optimizer, lambda: net(x))
    with explorer.heads():
        own = kept(lambda: net[1](net[0](x)), [*net.parameters(), *held(explorer)])
    # Few of several heads have no effective weights, which spare what is of the size of the rank.
    assert own <= full + (16 * (size // 2) ** 2 * 4 if (heads, size) == (2, 12) else 0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
def test_a_convolutional_network_keeps_what_full_rank_does_and_what_is_of_the_size_of_the_rank(
    heads: int, half: bool
) -> None:
    # So many classes that the last layer has factors, too, and not a weight for each head, which autocast copies.
    net = timm.create_model("resnet18", num_classes=10, norm_layer=lambda width, **_: nn.GroupNorm(8, width))
    x = torch.randn(8, 3, 32, 32)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y: Tensor = net(x)
        return y

    full = kept(forward, [x, *net.parameters()])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    config = LTEConfig(heads, merge_every=100, rank=4, execution="batched")
    explorer = Explorer(net, optimizer, config)
    past_the_first_steps(explorer, optimizer, forward)
    of_rank = 0
    by_weight = explorer.injection.factors
    handles = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight in by_weight:

            def count(_: nn.Module, args: Any, y: Tensor) -> None:
                nonlocal of_rank
                of_rank += 4 * y.element_size() * len(y) * y[0, 0].numel()

            handles.append(layer.register_forward_hook(count))
    with explorer.heads():
        forward()
        for handle in handles:
            handle.remove()
        own = kept(forward, [x, *net.parameters(), *held(explorer)])
    assert len(handles) == 21 and of_rank < 0.1 * full
    assert own <= full + of_rank


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_linear_layers_keep_their_input_once(heads: int, base: Any, half: bool) -> None:
    """And beside it what is of the size of the rank, whatever forwards read of W."""
    net = nn.Sequential(nn.Sigmoid(), nn.Linear(40, 64), nn.Sigmoid(), nn.Linear(64, 40))
    x = torch.randn(16, 40).requires_grad_()

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            net(x)

    full = kept(forward, list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(heads, 100, rank=RANK, base=base, execution="batched"))
    past_the_first_steps(explorer, optimizer, lambda: net(x))
    factors = factors_of(explorer)
    assert len(factors) == 8 and all(
        (f.rounded is None) == (base == "float32") for f in explorer.injection.factors.values()
    )
    with explorer.heads():
        own = kept(forward, [*net.parameters(), *factors])
    assert own <= full + 2 * len(x) * RANK * 4


class Recurrent(nn.Module):
    """Uses each of its layers three times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(16, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.up, self.attention = nn.ConvTranspose1d(16, 16, 1), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            y = self.linear(self.up(self.conv(torch.tanh(x))).mT)
            x = self.attention(y, y, y, need_weights=False)[0].mT
        return x


@pytest.mark.parametrize("first_steps", [False, True])
@per_way
def test_under_autocast_a_weight_has_one_copy_for_all_its_uses(way: dict[str, Any], first_steps: bool) -> None:
    """By heads that take turns, too: all of their forwards come before one backward. (With more tokens than these there
    are none.)"""
    net, x = Recurrent(), torch.randn(4, 16, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(merge_every=100, rank=1, **way))
    if not first_steps:
        past_the_first_steps(explorer, optimizer, lambda: net(x))
    turns = range(HEADS) if explorer.execution == "sequential" else [None]
    in_half = [f.weight.numel() * 2 for f in explorer.injection.factors.values()]
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.bfloat16 and storage.nbytes() in in_half:  # no activation is of such a size
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    outputs = []
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        for turn in turns:
            with explorer.heads() if turn is None else explorer.head(turn):
                outputs.append(net(x))
    assert sorted(found.values()) == sorted(in_half)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_under_autocast_no_copy_of_a_weight_is_kept_where_there_are_many_tokens(heads: int) -> None:
    """Full rank keeps one of each: effective weights are made for the moment, in the forward and in the backward."""
    net = nn.Sequential(nn.Sigmoid(), nn.Linear(40, 64), nn.Sigmoid(), nn.Linear(64, 40))
    x = torch.randn(64, 8, 40).requires_grad_()

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            net(x)

    full = kept(forward, list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    explorer = Explorer(net, optimizer, LTEConfig(heads, 100, rank=RANK, execution="batched"))
    past_the_first_steps(explorer, optimizer, lambda: net(x))
    with explorer.heads():
        assert kept(forward, [*net.parameters(), *held(explorer)]) == full - 2 * 2 * 64 * 40


def test_a_graph_that_is_kept_does_not_keep_the_weight_of_before_a_merge() -> None:
    net, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 16)
    explorer = Explorer(net, torch.optim.SGD(net.parameters(), lr=0.01), LTEConfig(1, 100, rank=2))
    with explorer.heads(), torch.autocast("cpu", torch.bfloat16):
        before = net(x.requires_grad_())
        factors = explorer.injection.factors[net[0].weight]  # type: ignore[index]
        nn.init.ones_(factors.B)
        explorer.merge()
        torch.testing.assert_close(net(x), nn.functional.linear(x, net[0].weight, net[0].bias))  # type: ignore[arg-type]
        assert not torch.equal(before, net(x))


def same(way: dict[str, Any], make: Callable[[bool], Module], data: Any, steps: int = 5) -> None:
    """Training ends with the same weights, whether `make` is told to save memory or not."""
    ends = []
    for saving in (False, True):
        module = make(saving)
        trainer(LTEStrategy(merge_every=2, rank=RANK, **way), max_steps=steps).fit(module, data())
        ends.append(clone(module.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11)


def kinds() -> DataLoader:
    x, y = make_data(48, width=2 * 6 * 6 + 5)
    return DataLoader(TensorDataset(x, y), batch_size=16)


class OnCPU(Module):
    """Keeps all activations in a place of their own until backward."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with save_on_cpu(pin_memory=False):
            return super().training_step(batch, batch_idx)


@per_way
def test_activations_that_are_offloaded_give_the_same(way: dict[str, Any]) -> None:
    same(way, lambda saving: (OnCPU if saving else Module)(make_net(Kinds), sgd), kinds)


class Chosen(nn.Module):
    """Runs its inner part again in the backward, but for the results of some operations, which it keeps.

    Args:
        kept: which operations'; None for all of them.
        saving: whether it does so.
    """

    def __init__(self, kept: list[Any] | None, saving: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.conv = nn.Conv1d(4, 16, 3)
        self.second = nn.Conv1d(16, 16, 1)
        self.out = nn.Linear(16, CLASSES)
        self.kept, self.saving = kept, saving
        self.seen: set[Any] = set()

    def forward(self, x: Tensor) -> Tensor:
        if not self.saving:
            return self.out(self._inner(x))
        return self.out(checkpoint(self._inner, x, use_reentrant=False, context_fn=self._contexts))

    def _inner(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)).unflatten(1, (4, 6))
        return torch.tanh(self.second(torch.tanh(self.conv(y)))).mean(-1)

    def _contexts(self) -> Any:
        return create_selective_checkpoint_contexts(self._policy)

    def _policy(self, _: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        self.seen.add(operation)
        keeps = self.kept is None or operation in self.kept
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def flat() -> DataLoader:
    return DataLoader(TensorDataset(*make_data(48, width=12)), batch_size=16)


@per_way
@pytest.mark.parametrize(
    "kept", [[*_PRODUCTS, _aten.bmm.default, _aten.convolution.default], None], ids=["products", "all"]
)
def test_checkpointing_that_keeps_chosen_results_gives_the_same_and_sees_the_users_operations(
    way: dict[str, Any], kept: list[Any] | None
) -> None:
    made: list[Chosen] = []

    def make(saving: bool) -> Module:
        net = make_net(lambda: Chosen(kept, saving))
        made.append(net)
        return Module(net, sgd)

    same(way, make, flat)
    assert _aten.convolution.default in made[1].seen and not made[1].seen.isdisjoint(_PRODUCTS)


@per_way
def test_timms_checkpointing_gives_the_same(way: dict[str, Any]) -> None:
    def make(saving: bool) -> Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = timm.create_model(
                "vit_tiny_patch16_224",
                img_size=8,
                patch_size=4,
                embed_dim=24,
                depth=2,
                num_heads=2,
                num_classes=CLASSES,
            )
        net.set_grad_checkpointing(saving)
        return Module(net.double(), sgd)

    same(way, make, images)


# ---- what is left


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    "way",
    [*WAYS, {"heads": 2, "grow_heads": {2: HEADS}}, {"heads": HEADS, "full_rank_steps": 1, "execution": "batched"}],
    ids=lambda way: " ".join(str(v) for v in way.values()),
)
def test_nothing_of_the_heads_outlives_a_run(way: dict[str, Any], steps: int, fails: bool) -> None:
    """A process may train many times, and a module that is imported meanwhile takes torch's functions for keeps."""
    taken: list[Callable[..., Any]] = []

    class Failing(Module):
        def on_train_start(self) -> None:
            taken.extend([nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_, nn.Module.zero_grad])

        def on_train_batch_end(self, *_: Any) -> None:
            if fails and self.trainer.global_step == steps:
                raise RuntimeError("no more")

    def fit() -> list[weakref.ref[Any]]:
        module, strategy, seen = Failing(make_net(), sgd), LTEStrategy(merge_every=2, rank=RANK, **way), []
        look = Recorder(lambda t, _: seen.append(weakref.ref(t.strategy.explorer)))
        t = trainer(strategy, max_steps=steps, callbacks=[look])
        with pytest.raises(RuntimeError, match="no more") if fails else nullcontext():
            t.fit(module, DataLoader(TensorDataset(*make_data(64)), batch_size=16))
        return seen

    seen = fit()
    gc.collect()
    assert seen and all(ref() is None for ref in seen)
