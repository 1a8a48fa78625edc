from __future__ import annotations

import copy
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lte.config import LTEConfig
from lightning_lte.heads import Factors, Matrices
from lightning_lte.injection import inject
from lightning_lte.layers import headed_class, norm
from lightning_lte.layers.base import HeadedLayer, LayerState, enter, leave, original_class, state_of
from lightning_lte.layers.convolution import Geometry, convolve, side_by_side
from lightning_lte.switch import Switch
from lightning_lte.trial import Trial

COUNT = 3


class Named(nn.Linear):
    """A plain subclass, as code bases have them."""


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factors_of(layer: nn.Module, key: str = "weight", rank: int = 2, keep: bool = True, parts: int = 1) -> Factors:
    """Factors and anchors with values of their own."""
    kind, weight = headed_class(layer), layer.get_parameter(key)
    assert kind is not None
    matrices = kind.matrices(layer, key, parts)
    assert isinstance(matrices, Matrices)
    f = Factors(
        key, weight, rank=rank, scale=1.5, count=COUNT, first=0, seed=0, init="orthogonal", keep=keep, matrices=matrices
    )
    with torch.no_grad():
        f.B.copy_(random(*f.B.shape, seed=1))
        if f.anchor_B is not None:
            f.anchor_B.copy_(random(*f.B.shape, seed=2))
        if getattr(layer, "padding_idx", None) is not None:
            # It starts at zero and gets no gradient.
            for tensor in (f.B, f.anchor_B):
                if tensor is not None:
                    tensor[:, layer.padding_idx] = 0  # type: ignore[index]
    return f


def stack(*shape: int, seed: int) -> nn.Parameter:
    return nn.Parameter(random(COUNT, *shape, seed=seed))


def headed(layer: nn.Module, state: LayerState) -> None:
    kind = headed_class(layer)
    assert kind is not None
    enter(layer, kind, state)


def assert_each_head_computes_as_a_layer_of_its_own(
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    own: tuple[str, ...] = (),
    keep: bool = True,
    parts: int = 1,
    **arguments: Any,
) -> None:
    """The literal meaning of a layer with heads: n plain layers, each with its effective weights, on its own slice.

    Args:
        layer: plain.
        inputs: the layer's, with the batch outermost.
        own: parameters of which each head has a replica; the weights among the others are factored where that is
            possible.
        keep: whether there are anchors.
        parts: of a fused projection.
        arguments: more of the layer's. Tensors whose dimension 0 is the batch are sliced, all else is the same for
            all heads.
    """
    layer.double()
    switch, kind = Switch(COUNT), headed_class(layer)
    assert kind is not None
    state = LayerState(switch)
    for seed, (key, param) in enumerate(layer.named_parameters()):
        with torch.no_grad():
            param.copy_(random(*param.shape, seed=10 + seed))
        if key in own:
            state.stacks[key] = stack(*param.shape, seed=20 + seed)
        elif isinstance(kind.matrices(layer, key, parts), Matrices):
            state.factors[key] = factors_of(layer, key, keep=keep, parts=parts)
    twins = []
    for head in range(COUNT):
        twin = copy.deepcopy(layer)
        for key, param in twin.named_parameters():
            if key in state.factors:
                param.data = state.factors[key].effective(head)
            elif key in own:
                param.data = state.stacks[key][head].detach().clone()
        twins.append(twin)
    batch = inputs[0].shape[0]

    def of_head(head: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        pieces = tuple(leaf(x.chunk(COUNT)[head]) for x in inputs)
        return pieces, {
            name: value.chunk(COUNT)[head] if isinstance(value, Tensor) and len(value) == batch else value
            for name, value in arguments.items()
        }

    plain = layer(*inputs, **arguments)
    headed(layer, state)
    together_inputs = tuple(leaf(x) for x in inputs)
    with switch.at("all"):
        together = outputs(layer(*together_inputs, **arguments))
    weights = random(*together[0].shape, seed=5)
    (together[0] * weights).sum().backward()
    expected, gradients = [], []
    for head in range(COUNT):
        pieces, own_arguments = of_head(head)
        output = outputs(twins[head](*pieces, **own_arguments))
        (output[0] * weights.chunk(COUNT)[head]).sum().backward()
        expected.append(output)
        gradients.append([x.grad for x in pieces])
        # Replicas of one head alone are put into the module by whoever runs it.
        if not own:
            with switch.at(head), torch.no_grad():
                alone = outputs(layer(*pieces, **own_arguments))
            for found, wanted in zip(alone, output, strict=True):
                assert_close(found, wanted)
    for i, found in enumerate(together):
        rows = [output[i] for output in expected]
        assert_close(found, None if rows[0] is None else torch.cat(rows))
    for i, x in enumerate(together_inputs):
        if x.is_floating_point():
            assert_close(x.grad, torch.cat([g[i] for g in gradients]))

    # Gradients of factors by the chain rule from those of the twins' weights: dB = s g A^T, dA = s B^T g.
    for key, f in state.factors.items():
        assert layer.get_parameter(key).grad is None
        A, B = f.A.detach().clone().requires_grad_(), f.B.detach().clone().requires_grad_()
        for head, twin in enumerate(twins):
            W = f.scale * f.matrices.as_weight(B[head] @ A[head], f.weight.shape)
            W.backward(twin.get_parameter(key).grad)
        assert_close(f.A.grad, A.grad)
        assert_close(f.B.grad, B.grad)
    for key, replica in state.stacks.items():
        assert_close(replica.grad, torch.stack([twin.get_parameter(key).grad for twin in twins]))
    for found, wanted in zip(outputs(layer(*inputs, **arguments)), outputs(plain), strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_(x.is_floating_point())


def outputs(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def assert_close(found: Tensor | None, wanted: Tensor | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None:
        torch.testing.assert_close(found, wanted)


OWN = [(), ("bias",), ("weight", "bias"), ("weight",)]


@pytest.mark.parametrize("own", OWN, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@given(rows=st.integers(1, 3), inner=st.lists(st.integers(1, 3), max_size=2), keep=st.booleans())
def test_linear(own: tuple[str, ...], bias: bool, rows: int, inner: list[int], keep: bool) -> None:
    layer = nn.Linear(6, 5, bias=bias)
    own = tuple(name for name in own if bias or name != "bias")
    x = random(COUNT * rows, *inner, 6, seed=5)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (x,), own=own, keep=keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_fused_projection_in_parts(parts: int, keep: bool) -> None:
    layer = nn.Linear(6, 6 * parts)
    x = random(COUNT * 2, 4, 6, seed=5)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (x,), own=("bias",), keep=keep, parts=parts)


@pytest.mark.parametrize("own", OWN, ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_conv1d_of_gpt2(own: tuple[str, ...], keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Conv1D(nn.Module):
        """As transformers has it, which need not be here."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(6, 5)), nn.Parameter(torch.empty(5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    library = types.ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", library)
    assert_each_head_computes_as_a_layer_of_its_own(Conv1D(), (random(COUNT * 2, 4, 6),), own=own, keep=keep)


@pytest.mark.parametrize("own", OWN, ids=str)
def test_linear_of_pytorch_geometric(own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(nn.Module):
        """As PyTorch Geometric has it, which need not be here: no subclass of nn.Linear."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(5, 6)), nn.Parameter(torch.empty(5))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self.bias)

    library = types.ModuleType("torch_geometric.nn.dense.linear")
    library.Linear = Linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_geometric.nn.dense.linear", library)
    x = random(COUNT * 2, 4, 6)
    assert_each_head_computes_as_a_layer_of_its_own(Linear(), (x,), own=own)
    layer = Linear().double()
    headed(layer, LayerState(Switch(COUNT)))
    torch.testing.assert_close(layer(x=x), layer(x), rtol=0, atol=0, equal_nan=True)


CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3}, (9,)),
    "1d of stride, padding and dilation": (
        nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 3, "dilation": 2}, (9,)
    ),
    "1d with groups": (nn.Conv1d, {"kernel_size": 3, "groups": 2}, (9,)),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2)}, (6, 5)),
    "2d of kernel 1": (nn.Conv2d, {"kernel_size": 1}, (4, 3)),
    "2d with groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}, (5, 4)),
    "2d of the same size": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}, (5, 4)),
    "2d reflecting": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 4)),
    "2d around": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "groups": 2}, (5, 4)),
    "2d replicating": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2}, (5, 4)),
    "3d": (nn.Conv3d, {"kernel_size": 2, "stride": 2, "padding": 1}, (3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (5,)),
    "transposed 2d": (nn.ConvTranspose2d, {"kernel_size": (3, 2), "stride": 2, "output_padding": 1}, (4, 3)),
    "transposed 2d with groups": (
        nn.ConvTranspose2d, {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": 1}, (4, 3)
    ),
    "transposed 3d": (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2}, (2, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("own", OWN, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str, own: tuple[str, ...], bias: bool, keep: bool) -> None:
    kind, choices, size = CONVOLUTIONS[case]
    layer = kind(4, 6, bias=bias, **choices)
    own = tuple(name for name in own if bias or name != "bias")
    x = random(COUNT * 2, 4, *size, seed=5)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (x,), own=own, keep=keep)


class Groups(TorchDispatchMode):
    """Notes of how many groups convolutions and their gradients are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            names = [argument.name for argument in func._schema.arguments]
            self.seen.append(args[names.index("groups")])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_on_a_cpu_depthwise_convolutions_have_no_more_groups_through_heads(kind: Any) -> None:
    """torch's gradient of the weights of many groups takes many times as long there."""
    layer = kind(4, 4, 3, groups=4)
    headed(layer, LayerState(Switch(COUNT), stacks={"weight": stack(*layer.weight.shape, seed=1)}))
    layer.double()
    groups = Groups()
    with groups, state_of(layer).switch.at("all"):
        layer(random(2 * COUNT, 4, 5, 5).requires_grad_()).sum().backward()
    assert groups.seen == 2 * COUNT * [4]


def test_a_transposed_convolution_of_a_given_size() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    x = random(COUNT * 2, 4, 3, 3, seed=5)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (x,), output_size=[8, 7])


def test_a_convolution_in_parts() -> None:
    x = random(COUNT * 2, 4, 5, 4, seed=5)
    assert_each_head_computes_as_a_layer_of_its_own(nn.Conv2d(4, 6, 3), (x,), parts=3)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("own", [(), ("weight",)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_embeddings(shape: tuple[int, ...], padding_idx: int | None, own: tuple[str, ...], keep: bool) -> None:
    layer = nn.Embedding(7, 5, padding_idx=padding_idx)
    index = torch.randint(0, 7, (COUNT * 2, *shape), generator=torch.Generator().manual_seed(0))
    index[:: COUNT + 1] = 3
    assert_each_head_computes_as_a_layer_of_its_own(layer, (index,), own=own, keep=keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("position", ["all", 1])
def test_embeddings_have_all_derivatives(position: Any, padding_idx: int | None, keep: bool) -> None:
    layer, switch = nn.Embedding(7, 5, padding_idx=padding_idx).double(), Switch(COUNT)
    f = factors_of(layer, keep=keep)
    headed(layer, LayerState(switch, {"weight": f}))
    index = torch.randint(0, 7, (COUNT * 2, 3), generator=torch.Generator().manual_seed(0))
    f.trial = Trial(layer.weight)
    trained = (layer.weight, f.A, f.B)

    def value(*_: Tensor) -> Tensor:
        return layer(index).tanh()

    with switch.at(position):
        # What is looked up as padding has a value, and no gradient: the loss leaves it out.
        seen = (index != (-1 if padding_idx is None else padding_idx)).unsqueeze(-1)
        assert torch.autograd.gradcheck(lambda *own: value(*own) * seen, trained, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda *own: value(*own) * seen, trained)
        y = layer(index)
        found = torch.autograd.grad(y, trained, torch.ones_like(y))
        with torch.autograd.forward_ad.dual_level():  # plain operations
            plain = layer(index)
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(found, torch.autograd.grad(plain, trained, torch.ones_like(y)))


@pytest.mark.parametrize("keep", [True, False])
def test_embeddings_make_nothing_of_the_size_of_factors_but_a_gradient(keep: bool) -> None:
    layer, switch = nn.Embedding(500, 40), Switch(COUNT)
    f = factors_of(layer, keep=keep)
    headed(layer, LayerState(switch, {"weight": f}))
    made: list[str] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = func(*args, **(kwargs or {}))
            if isinstance(y, Tensor) and y.numel() >= f.B[0].numel() and not func.is_view and "view" not in str(func):
                made.append(str(func))
            return y

    with switch.at("all"), Made():
        layer(torch.arange(2 * COUNT)).sum().backward()
    assert made == ["aten.embedding_dense_backward.default"] and f.B.grad is not None


@pytest.mark.parametrize("choice", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_cannot_be_factored_say_why(choice: dict[str, Any]) -> None:
    layer = nn.Embedding(7, 5, **choice)
    kind = headed_class(layer)
    assert kind is not None and isinstance(kind.matrices(layer, "weight", 1), str)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bias": {"bias": False},
    "other keys and values": {"kdim": 5, "vdim": 3},
    "bias of keys and values": {"add_bias_kv": True},
    "zeros attended to": {"add_zero_attn": True},
    "all": {"kdim": 5, "vdim": 3, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "no weights": {"need_weights": False},
    "weights of each": {"average_attn_weights": False},
    "bool": {"attn_mask": torch.ones(4, 6, dtype=torch.bool).triu(2)},
    "float": {"attn_mask": random(4, 6, seed=1), "need_weights": False},
    "one for each sample": {"attn_mask": random(COUNT * 2, 2, 4, 6, seed=1)},
    "padding": {"key_padding_mask": torch.arange(6) > torch.arange(COUNT * 2).unsqueeze(1) % 5},
    "both": {
        "attn_mask": torch.ones(4, 6, dtype=torch.bool).triu(2),
        "key_padding_mask": torch.arange(6) > torch.arange(COUNT * 2).unsqueeze(1) % 5,
        "need_weights": False,
    },
    "causal": {"attn_mask": torch.ones(4, 6, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(("own", "keep"), [("none", True), ("none", False), ("biases", True), ("all", True)])
def test_attention(kind: str, mask: str, own: str, keep: bool) -> None:
    choices = ATTENTIONS[kind]
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **choices)
    names = [name for name, _ in layer.named_parameters()]
    replicas = tuple(n for n in names if own == "all" or (own == "biases" and "weight" not in n))
    query = random(COUNT * 2, 4, 8, seed=1)
    key = random(COUNT * 2, 6, choices.get("kdim", 8), seed=2)
    value = random(COUNT * 2, 6, choices.get("vdim", 8), seed=3)
    if mask == "one for each sample":
        # torch wants the samples and the attention's heads folded, and the samples outermost.
        layer.register_forward_pre_hook(_fold, with_kwargs=True)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (query, key, value), own=replicas, keep=keep, **MASKS[mask])


def _fold(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attn_mask": kwargs["attn_mask"].flatten(0, 1)}


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_one_head_takes_every_layout(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64)
    x = random(4, 3, 8)
    batch, length = (4, 3) if batch_first else (3, 4)
    inputs = [(x, (torch.arange(length) > 1).expand(batch, -1)), (x[0], torch.arange(3) > 1)]
    plain = copy.deepcopy(layer)
    switch = Switch(COUNT)
    factors = {key: factors_of(layer, key) for key in ("in_proj_weight", "out_proj.weight")}
    headed(layer, LayerState(switch, factors))
    for key, f in factors.items():
        plain.get_parameter(key).data = f.effective(1)
    with switch.at(1):
        found = [layer(x, x, x, key_padding_mask=mask) for x, mask in inputs]
    torch.testing.assert_close(found, [plain(x, x, x, key_padding_mask=mask) for x, mask in inputs])


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer of two dimensions": (lambda: nn.LayerNorm((2, 3)), (5, 2, 3)),
    "layer of timm": (lambda: timm.layers.LayerNorm(4), (5, 4)),
    "layer without bias": (lambda: nn.LayerNorm(4, bias=False), (4,)),
    "root mean square": (lambda: nn.RMSNorm(4), (5, 4)),
    "root mean square of two dimensions": (lambda: nn.RMSNorm((2, 3), eps=0.1), (5, 2, 3)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
}


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("own", OWN[1:], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_norms(case: str, own: tuple[str, ...], at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_takes_long_in_calls", lambda *_: at_once)
    make, shape = NORMS[case]
    layer = make()
    own = tuple(name for name in own if getattr(layer, name, None) is not None)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (random(COUNT * 2, *shape, seed=6),), own=own)


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("own", [("weight", "bias"), ("bias",)], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_norms_keep_no_more_than_their_input_and_have_all_derivatives(
    case: str, own: tuple[str, ...], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_takes_long_in_calls", lambda *_: at_once)
    make, shape = NORMS[case]
    layer = make().double()
    stacks = {key: stack(*p.shape, seed=i) for i, (key, p) in enumerate(layer.named_parameters()) if key in own}
    switch = Switch(COUNT)
    headed(layer, LayerState(switch, stacks=stacks))
    x = random(COUNT * 2, *shape, seed=6).requires_grad_()
    trained = [x, *stacks.values()]
    kept: list[Tensor] = []
    with switch.at("all"):
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
        # What is kept in slices, too: each tensor's memory once.
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        assert sizes.pop(x.untyped_storage().data_ptr()) == x.nbytes
        assert sum(sizes.values()) < x.nbytes + sum(own.nbytes for own in stacks.values())
        found = torch.autograd.grad(y, trained, torch.ones_like(y))
        with torch.autograd.forward_ad.dual_level():  # plain operations
            expected = torch.autograd.grad(layer(x), trained, torch.ones_like(y))
        torch.testing.assert_close(found, expected)

        def written(x: Tensor, *_: Tensor) -> Tensor:
            return layer(x).add_(1).tanh_()

        assert torch.autograd.gradgradcheck(written, trained)
        many = torch.stack([torch.ones_like(y), torch.arange(float(y.numel())).view_as(y).double()])
        batched = torch.autograd.grad(layer(x), trained, many, is_grads_batched=True)
        for each, one in zip(batched, torch.autograd.grad(layer(x), trained, many[1]), strict=True):
            torch.testing.assert_close(each[1], one)
        _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        _, pulled = torch.func.vjp(layer, x)
        torch.testing.assert_close((pulled(many[1])[0]).sum(), (tangent * many[1]).sum())


@pytest.mark.parametrize("case", NORMS)
def test_under_autocast_a_norm_with_heads_has_no_more_bits_than_the_plain_one(case: str) -> None:
    make, shape = NORMS[case]
    layer = make()
    x = random(COUNT * 2, *shape, seed=6).bfloat16()
    switch = Switch(COUNT)
    stacks = {key: nn.Parameter(random(COUNT, *p.shape).float()) for key, p in layer.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        headed(layer, LayerState(switch, stacks=stacks))
        with switch.at("all"):
            y = layer(x)
    assert y.dtype == plain.dtype == torch.bfloat16


def test_the_backward_of_a_norm_computes_under_the_autocast_of_its_forward() -> None:
    layer, switch = nn.LayerNorm(64), Switch(COUNT)
    stacks = {key: nn.Parameter(torch.randn(COUNT, 64)) for key in ("weight", "bias")}
    headed(layer, LayerState(switch, stacks=stacks))
    x = torch.randn(COUNT * 2, 64, dtype=torch.bfloat16, requires_grad=True)
    with switch.at("all"), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with torch.autograd.forward_ad.dual_level():
            expected = layer(x)
    assert y.dtype == expected.dtype
    trained = [x, *stacks.values()]
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), trained), torch.autograd.grad(expected.sum(), trained), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("position", ["all", 0, 2])
def test_gradients_reach_the_factors_of_the_heads_that_act_and_never_the_base_weight(
    position: int | Literal["all"],
) -> None:
    layer = nn.Linear(6, 5, dtype=torch.float64)
    switch, f = Switch(COUNT), factors_of(layer)
    headed(layer, LayerState(switch, {"weight": f}))
    x = random(COUNT * 2, 6, seed=5).requires_grad_()
    with switch.at(position):
        layer(x).square().sum().backward()
    assert layer.weight.grad is None and f.A.grad is not None and f.B.grad is not None and x.grad is not None

    A, B = f.A.detach().clone().requires_grad_(), f.B.detach().clone().requires_grad_()
    copied = x.detach().clone().requires_grad_()
    for head in range(COUNT):
        if position in ("all", head):
            own = copied.chunk(COUNT)[head] if position == "all" else copied
            W = layer.weight.detach() + f.scale * (B[head] @ A[head] - f.anchor_B[head] @ f.anchor_A[head])
            functional.linear(own, W, layer.bias.detach()).square().sum().backward()
    for found, expected in ((f.A, A), (f.B, B), (x, copied)):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LayerNorm(6)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("position", [None, "all", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_give_the_dtype_of_the_plain_layer(
    layer: nn.Module, position: Any, dtype: torch.dtype
) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(COUNT * 2, 6, dtype=dtype)
    plain = layer(x).dtype
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x).dtype
    switch = Switch(COUNT)
    stacks = {n: nn.Parameter(p.detach().expand(COUNT, *p.shape).clone()) for n, p in layer.named_parameters()}
    if isinstance(layer, nn.Linear):
        headed(layer, LayerState(switch, {"weight": factors_of(layer)}, {"bias": stacks["bias"]}))
    else:
        headed(layer, LayerState(switch, stacks=stacks))
    with switch.at(position):
        assert layer(x).dtype == plain
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == mixed


@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_a_batch_that_cannot_be_dealt_out_is_refused_with_rule_value_and_remedy(shape: tuple[int, ...]) -> None:
    layer, switch = nn.Linear(6, 6), Switch(COUNT)
    headed(layer, LayerState(switch, {"weight": factors_of(layer)}))
    with switch.at("all"), pytest.raises(ValueError, match=r"evenly over the 3 .*received shape .*sequential"):
        layer(torch.zeros(shape))


def test_a_causal_mask_that_is_not_given_is_refused_as_without_heads() -> None:
    layer, switch, x = nn.MultiheadAttention(8, 2, batch_first=True), Switch(COUNT), torch.zeros(COUNT, 4, 8)
    with pytest.raises(RuntimeError, match="is_causal"):
        layer(x, x, x, is_causal=True)
    headed(layer, LayerState(switch, {"in_proj_weight": factors_of(layer, "in_proj_weight")}))
    with switch.at("all"), pytest.raises(RuntimeError, match=r"received attn_mask=None\. Give the mask"):
        layer(x, x, x, is_causal=True)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["sparse_coo", "jagged", "nested"])
def test_a_linear_layer_takes_sparse_and_nested_inputs_while_one_head_acts(kind: str, parts: int) -> None:
    def given(rows: Tensor) -> Tensor:
        if kind == "sparse_coo":
            return rows.to_sparse()
        pieces = list(rows.split([2, 3]))
        return torch.nested.nested_tensor(pieces, layout=torch.jagged if kind == "jagged" else torch.strided)

    layer, switch = nn.Linear(6, 6).double(), Switch(COUNT)
    f = factors_of(layer, parts=parts)
    headed(layer, LayerState(switch, {"weight": f}))
    x, results = random(5, 6, seed=1), []
    for rows in (x, given(x)):
        f.A.grad = f.B.grad = None
        with switch.at(1):
            y = layer(rows)
        y = torch.cat(y.unbind()) if y.is_nested else y
        y.square().sum().backward()
        results.append((y, f.A.grad, f.B.grad))
    torch.testing.assert_close(*results)
    with switch.at("all"), pytest.raises(ValueError, match=r"evenly over the 3 .*received a .* one.*sequential"):
        layer(given(x))


@pytest.fixture(params=[nn.Linear, Named, nn.LayerNorm], ids=lambda kind: kind.__name__)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return request.param(6, 6) if issubclass(request.param, nn.Linear) else request.param(6)


def state_for(layer: nn.Module) -> LayerState:
    return LayerState(Switch(COUNT), {"weight": factors_of(layer)} if isinstance(layer, nn.Linear) else {})


def test_a_layer_with_heads_looks_like_the_users_own(layer: nn.Module) -> None:
    kind, text, keys = type(layer), repr(layer), list(layer.state_dict())
    params, modules = list(layer.parameters()), list(layer.modules())
    headed(layer, state_for(layer))
    assert isinstance(layer, kind) and original_class(layer) is kind
    assert type(layer).__name__ == kind.__name__ and repr(layer) == text
    assert list(layer.state_dict()) == keys and list(layer.modules()) == modules
    assert all(a is b for a, b in zip(layer.parameters(), params, strict=True))


def test_leaving_is_the_inverse_of_entering(layer: nn.Module) -> None:
    kind, attributes = type(layer), dict(layer.__dict__)
    headed(layer, state_for(layer))
    assert isinstance(layer, HeadedLayer) and headed_class(layer) is None
    leave(layer)
    assert type(layer) is kind and layer.__dict__ == attributes


def copied_by_torch_save(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": copied_by_torch_save,
    **{
        f"pickle {n}": lambda layer, n=n: pickle.loads(pickle.dumps(layer, n))
        for n in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_of_the_users_class_and_has_no_heads(layer: nn.Module, how: str) -> None:
    kind, x = type(layer), torch.randn(3, 6)
    expected = layer(x)
    layer.note = "kept"  # type: ignore[assignment]
    headed(layer, state_for(layer))
    copied = COPIES[how](layer)
    assert type(copied) is kind and copied.note == "kept"
    assert copied.__dict__.keys() == layer.__dict__.keys() - {"_lte"}
    assert torch.equal(copied(x), expected)
    assert isinstance(layer, HeadedLayer) and state_of(layer)


def test_a_pickle_does_not_need_this_package(layer: nn.Module) -> None:
    headed(layer, state_for(layer))
    assert b"lightning_lte" not in pickle.dumps(layer)


def note_call(module: nn.Module, *_: Any) -> None:
    module.hook_calls = getattr(module, "hook_calls", 0) + 1  # type: ignore[assignment, operator]


def test_hooks_are_kept(layer: nn.Module) -> None:
    layer.register_forward_hook(note_call)
    layer(torch.zeros(3, 6))
    headed(layer, state_for(layer))
    layer(torch.zeros(3, 6))
    copied = copy.deepcopy(layer)
    copied(torch.zeros(3, 6))
    leave(layer)
    layer(torch.zeros(3, 6))
    assert (layer.hook_calls, copied.hook_calls) == (3, 3)


def with_own_forward() -> nn.Linear:
    layer = nn.Linear(6, 6)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Doubling(6, 6),
        with_own_forward(),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.utils.spectral_norm(nn.Linear(6, 6)),
        nn.Bilinear(6, 6, 6),
        nn.LayerNorm(6, elementwise_affine=False),
    ],
)
def test_a_layer_that_computes_otherwise_is_not_known(layer: nn.Module) -> None:
    assert headed_class(layer) is None


def test_the_switch_goes_back_after_an_error() -> None:
    switch = Switch(COUNT)
    with switch.at("all"):
        with pytest.raises(KeyError), switch.at(1):
            assert switch.position == 1
            raise KeyError
        assert switch.position == "all"
    assert switch.position is None


@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.InstanceNorm2d])
def test_an_instance_norm_without_batch_is_normalised_by_channel(kind: Any) -> None:
    layer = kind(6, affine=True).double()
    x = torch.randn(*[6] * (2 if kind is nn.InstanceNorm1d else 3), dtype=torch.float64)
    expected = layer(x)
    module = nn.Sequential(layer, nn.Linear(6, 40).double())
    injection = inject(module, list(module.parameters()), LTEConfig(1, rank=2, norms="vector-scalar"))
    with injection.switch.at(0):
        torch.testing.assert_close(layer(x), expected)
    injection.eject()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("per_head_bias", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(2, 6, 3, stride=3), (10,)),  # one place is left over
        (nn.Conv2d(3, 8, (2, 4), stride=(2, 4)), (6, 8)),
        (nn.Conv2d(3, 8, 2, stride=2, padding="valid", bias=False), (5, 6)),
        (nn.Conv3d(1, 7, 2, stride=2), (4, 2, 4)),
    ],
)
def test_patches_that_do_not_overlap_are_convolved_as_any_others(
    layer: Any, size: tuple[int, ...], keep: bool, per_head_bias: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    layer = copy.deepcopy(layer).double()
    f = factors_of(layer, keep=keep)
    biases = random(COUNT, layer.out_channels, seed=3)
    own_bias = per_head_bias and layer.bias is not None
    state = LayerState(Switch(COUNT), {"weight": f}, {"bias": nn.Parameter(biases)} if own_bias else {})
    x = random(2 * COUNT, layer.in_channels, *size).requires_grad_()
    plain = copy.deepcopy(layer)
    enter(layer, headed_class(layer), state)  # type: ignore[arg-type]
    with state.switch.at("all"):
        y = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(x)
    expected = torch.cat(
        [
            plain._conv_forward(part, f.effective(head), biases[head] if own_bias else plain.bias)
            for head, part in enumerate(x.chunk(COUNT))
        ]
    )
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))


FORMATTED: dict[str, nn.Module] = {
    "1x1": nn.Conv2d(4, 8, 1),
    "patches": nn.Conv2d(4, 8, 2, stride=2, bias=False),
    "patches with a place left over": nn.Conv2d(4, 8, 3, stride=3),
    "3x3": nn.Conv2d(4, 8, 3, padding=1),
    "3d": nn.Conv3d(4, 8, 3, padding=1),
    "3d patches": nn.Conv3d(4, 8, 2, stride=2),
    "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "transposed": nn.ConvTranspose2d(4, 8, 2, stride=2),
}


@pytest.mark.parametrize("own", [(), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("case", FORMATTED)
def test_outputs_and_gradients_of_inputs_have_the_memory_format_of_the_plain_layer(
    case: str, own: tuple[str, ...]
) -> None:
    for of_weight, of_input in ((True, True), (True, False), (False, False)):
        dims = FORMATTED[case].weight.dim()  # type: ignore[union-attr, operator]
        last: Any = torch.channels_last if dims == 4 else torch.channels_last_3d
        layer: Any = copy.deepcopy(FORMATTED[case])
        layer = layer.to(memory_format=last) if of_weight else layer
        x = random(2 * COUNT, 4, *[8] * (dims - 2)).float()
        x = (x.contiguous(memory_format=last) if of_input else x).requires_grad_()
        if not of_input and layer.weight.is_contiguous():
            continue  # a kernel of size 1 is in both formats
        state = LayerState(Switch(COUNT))
        if own:
            state.stacks = {
                name: nn.Parameter(random(COUNT, *param.shape).float())
                for name, param in layer.named_parameters()
                if name in own
            }
        else:
            state.factors = {"weight": factors_of(layer)}
        formats = []
        for _ in range(2):
            seen: list[Tensor] = []
            before = x * 1.0  # gradients of leaves are laid out anew
            before.register_hook(seen.append)
            with state.switch.at("all"):
                y = layer(before)
            y.square().sum().backward()
            formats.append([(t.is_contiguous(), t.is_contiguous(memory_format=last)) for t in (y, *seen)])
            if not isinstance(layer, HeadedLayer):
                headed(layer, state)
        assert formats[1] == formats[0]


GEOMETRIES: list[tuple[Geometry, tuple[int, ...], tuple[int, ...], int]] = [
    (Geometry((2,), (1,), (1,), False, (0,), 1), (4, 2, 7), (3, 2, 3), 1),
    (Geometry((1, 2), (1, 0), (1, 2), False, (0, 0), 2), (4, 2, 4, 5), (8, 1, 2, 2), 2),
    (Geometry((1,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 1), (2, 1, 3, 2, 2), (4, 1, 2, 2, 1), 2),
    (Geometry((2, 2), (1, 1), (1, 1), True, (1, 0), 1), (4, 2, 3, 2), (4, 3, 2, 2), 2),
]


@pytest.mark.parametrize("learns", ["all", "input", "weight", "input and bias"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_convolutions_have_all_the_derivatives_of_torchs_own(case: int, last: bool, learns: str) -> None:
    geometry, size, kernel, count = GEOMETRIES[case]
    x, weight = random(*size), random(*kernel, seed=1)
    if last and len(size) > 3:
        x = x.contiguous(memory_format=torch.channels_last if len(size) == 4 else torch.channels_last_3d)
    out = count * kernel[1] * geometry.groups if geometry.transposed else kernel[0]
    inputs = [
        leaf(x).requires_grad_(learns != "weight"),
        leaf(weight).requires_grad_(learns in ("all", "weight")),
        leaf(random(out, seed=2)).requires_grad_(learns in ("all", "input and bias")),
    ]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(geometry, x, weight, bias, count)

    found = ours(*inputs)
    expected = geometry.of_heads(count).convolve(side_by_side(inputs[0], count), inputs[1], inputs[2])
    assert type(found.grad_fn).__name__ == "_ConvolutionBackward" and not found._is_view()
    torch.testing.assert_close(found, expected)
    wanted = [t for t in inputs if t.requires_grad]
    seed = random(*found.shape, seed=3)
    for own, other in zip(*(torch.autograd.grad(y, wanted, seed) for y in (found, expected)), strict=True):
        torch.testing.assert_close(own, other)
    assert torch.autograd.gradcheck(ours, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("attribute", ["stride", "padding", "dilation"])
def test_attributes_that_users_set_to_one_number(attribute: str) -> None:
    layer: Any = nn.Conv2d(4, 6, 3)
    setattr(layer, attribute, 2)
    assert_each_head_computes_as_a_layer_of_its_own(layer, (random(2 * COUNT, 4, 9, 8, seed=5),))


@pytest.mark.parametrize(
    ("layer", "operation", "memory_format", "calls"),
    [
        (nn.LayerNorm(3), torch.ops.aten.native_layer_norm.default, torch.contiguous_format, COUNT),
        (nn.GroupNorm(2, 4), torch.ops.aten.native_group_norm.default, torch.contiguous_format, 1),
        (nn.GroupNorm(2, 4), torch.ops.aten.native_group_norm.default, torch.channels_last, COUNT),
    ],
    ids=["layer", "group", "group, channels last"],
)
def test_on_a_cpu_large_norms_of_heads_are_torchs_own_operation(
    layer: Any, operation: Any, memory_format: torch.memory_format, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is scaled apart, and normalised once more in the backward, takes up to eight times as long there. All heads
    are one sample of a norm of channels, but where these come last."""
    monkeypatch.setattr(norm, "_takes_long_in_calls", lambda *_: False)
    switch = Switch(COUNT)
    stacks = {key: nn.Parameter(torch.randn(COUNT, *p.shape)) for key, p in layer.named_parameters()}
    headed(layer, LayerState(switch, stacks=stacks))
    scaled: list[bool] = []

    class Scaled(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is operation:
                scaled.append(sum(isinstance(t, Tensor) for t in args) == 3)  # x, weight and bias
            return func(*args, **(kwargs or {}))

    with switch.at("all"), Scaled():
        y = layer(torch.randn(2 * COUNT, 4, 3, 3).contiguous(memory_format=memory_format).requires_grad_())
        y.square().sum().backward()
    assert scaled == calls * [True] and y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("heads", "samples", "normalised"), [(32, 32, 1), (4, 2048, 4), (2, 2, 2)])
def test_small_layer_norms_of_many_heads_are_normalised_at_once(heads: int, samples: int, normalised: int) -> None:
    """On a CPU the calls for each head take longer than the arithmetic of a few samples."""
    layer, switch = nn.LayerNorm(16), Switch(heads)
    stacks = {key: nn.Parameter(torch.randn(heads, 16)) for key in ("weight", "bias")}
    headed(layer, LayerState(switch, stacks=stacks))
    calls: list[Any] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with switch.at("all"), Calls():
        layer(torch.randn(samples, 16, requires_grad=True)).square().sum().backward()
    assert calls.count(torch.ops.aten.native_layer_norm.default) == normalised


# torch's own instance norm takes none.
@pytest.mark.parametrize("case", [case for case in NORMS if case != "instance"])
def test_norms_of_no_samples(case: str) -> None:
    make, shape = NORMS[case]
    layer, switch = make(), Switch(COUNT)
    stacks = {key: nn.Parameter(torch.randn(COUNT, *p.shape)) for key, p in layer.named_parameters()}
    headed(layer, LayerState(switch, stacks=stacks))
    x = torch.randn(0, *shape, requires_grad=True)
    with switch.at("all"):
        layer(x).sum().backward()
    assert x.grad is not None
    assert all(own.grad is not None and not own.grad.any() for own in stacks.values())


def test_small_layer_norms_take_inputs_in_any_strides() -> None:
    x = random(2 * COUNT, 5, 4, seed=6).permute(0, 2, 1)
    assert_each_head_computes_as_a_layer_of_its_own(nn.LayerNorm(5), (x,), own=("weight", "bias"))
