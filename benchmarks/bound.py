"""What a training step takes by arithmetic: multiply-adds at full rank and through heads.

Per weight (out m, in n) and token, forward and backward: 3 m n at full rank; through heads 2 m n + 3 r (m + n), and
2 r (m + n) more where anchors take part. For a layer whose input wants no gradient, the first one, it is 2 m n, and
m n + 3 r (m + n) - r n, and r (m + n) more for anchors. The rest of the model stays as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_lte.injection import Injection

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """What a step asks of one weight.

    Attributes:
        out_features, in_features: m and n.
        rank: r.
        tokens: in the whole batch, times how many such matrices the weight is.
        inner: whether the layer's input wants a gradient.
    """

    out_features: int
    in_features: int
    rank: int
    tokens: int
    inner: bool = True

    @property
    def full_rank(self) -> int:
        """Multiply-adds at full rank."""
        return (3 if self.inner else 2) * self.out_features * self.in_features * self.tokens

    def heads(self, anchors: bool) -> int:
        """Multiply-adds through heads."""
        m, n, r = self.out_features, self.in_features, self.rank
        base = (2 if self.inner else 1) * m * n
        pairs = 3 * r * (m + n) - (0 if self.inner else r * n)
        return self.tokens * (base + pairs + (anchors * (2 if self.inner else 1) * r * (m + n)))


@dataclass(frozen=True)
class Arithmetic:
    """A step of a model.

    Attributes:
        uses: of its factored weights.
        whole: multiply-adds of a full-rank step, all of it.
    """

    uses: tuple[Use, ...]
    whole: int

    def bound(self, anchors: bool) -> float:
        """Multiply-adds of a step through heads over those of a full-rank step."""
        rest = self.whole - sum(use.full_rank for use in self.uses)
        return (rest + sum(use.heads(anchors) for use in self.uses)) / self.whole


def uses(injection: Injection, model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Use, ...]:
    """What a step asks of each factored weight that is multiplied with, in the order of the forward.

    A product is known by the weight that it reads, whichever function of whichever module makes it.

    Args:
        injection: heads in the model, or in another of its kind.
        model: whose weights are read as they are. What learns in it without heads tells which inputs want a gradient.
        forward: runs the model once, without heads, and returns what a backward starts from.
    """
    weights = {role.name: weight for weight, role in injection.roles.items() if weight in injection.factors}
    read = [(name, model.get_parameter(name).detach()) for name in weights]
    with _Products(read) as forwards:
        y = forward()
    with _Products(forwards.read) as backwards:
        # Who asks for the gradient of a weight with heads is taken for a use that they can't train.
        learning = [p for p in model.parameters() if p.requires_grad and p not in injection.factors]
        torch.autograd.grad(y.sum(), learning, allow_unused=True)
    found = []
    for name, multiply_adds in forwards.multiply_adds.items():
        factors = injection.factors[weights[name]]
        m, n = factors.matrices.out_features, factors.matrices.in_features
        found.append(Use(m, n, factors.rank, multiply_adds // (m * n), backwards.multiply_adds[name] > 0))
    return tuple(found)


class _Products(TorchDispatchMode):
    """Counts the multiply-adds of products that read certain tensors.

    Args:
        read: these, each with its name.

    Attributes:
        read: these and what they were copied to, for the precision of autocast. As they are held, no other tensor comes
            to lie where they do.
        multiply_adds: by name, in the order of the first product.
    """

    def __init__(self, read: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.read = list(read)
        self.multiply_adds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        inputs = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for name, tensor in tuple(self.read):
            if tensor.untyped_storage().data_ptr() not in inputs:
                continue
            if func.overloadpacket is aten._to_copy:
                self.read.append((name, y))
            elif func.overloadpacket is aten.convolution_backward:
                # Of its gradients, only the input's reads the weight.
                if args[-1][0]:
                    self.multiply_adds[name] += _of_each_gradient(*args)
            elif func.overloadpacket in flop_registry:
                self.multiply_adds[name] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=y) // 2
        return y


def multiply_adds(step: Callable[[], object]) -> int:
    """What a step takes as it runs, by torch's counter. Attention is counted as plain products.

    But for gradients of grouped convolutions' weights, which torch (2.14) counts as if there were one group, and for
    recurrent layers in one operation, which it does not count.
    """

    def of_gradients(*args: Any, out_val: object) -> int:
        # Of the input and of the weight; the bias has no products.
        return 2 * sum(args[-1][:2]) * _of_each_gradient(*args)

    of_gradients._get_raw = True  # type: ignore[attr-defined]
    recurrent = {
        aten.mkldnn_rnn_layer: _of_recurrent(2),
        aten.mkldnn_rnn_layer_backward: _of_recurrent(4),
        aten._cudnn_rnn: _of_recurrent(2),
        aten._cudnn_rnn_backward: _of_recurrent(4),
    }
    counter = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: of_gradients, **recurrent})
    with sdpa_kernel(SDPBackend.MATH), counter:
        step()
    return int(counter.get_total_flops()) // 2


def _of_recurrent(each: int) -> Callable[..., int]:
    """Operations of recurrent layers, `each` for every token and number of their matrices."""

    def operations(x: Tensor, *args: Any, out_val: object, **_: object) -> int:
        # oneDNN's are given one by one, cuDNN's in a list; biases have one dimension, and states are no weights.
        weights = args[0] if isinstance(args[0], Sequence) else args[:2]
        return each * (x.numel() // x.shape[-1]) * sum(w.numel() for w in weights if w.dim() == 2)

    operations._get_raw = True  # type: ignore[attr-defined]
    return operations


def _of_each_gradient(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> int:
    """Multiply-adds of aten.convolution_backward for the gradient of its input, or of its weight.

    Both meet each element of the weight at every place, as the forward does.
    """
    transposed = options[4]
    places = x if transposed else grad
    return places.shape[0] * math.prod(places.shape[2:]) * weight.numel()
