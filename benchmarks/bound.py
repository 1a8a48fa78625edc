"""What a training step takes by arithmetic: multiply-adds at full rank and through heads.

Per weight (out m, in n) and token, forward and backward: 3 m n at full rank; through heads 2 m n + 3 r (m + n), and
2 r (m + n) more where anchors take part. For a layer whose input wants no gradient, the first one, it is 2 m n, and
m n + 3 r (m + n) - r n, and r (m + n) more for anchors. The rest of the model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_lte.injection import Injection


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
    """What a step asks of each factored weight.

    Args:
        injection: heads in the model.
        model: it.
        forward: runs the model once, with gradients, and without heads.
    """
    found: list[Use] = []
    handles = []
    for weight, factors in injection.factors.items():
        m = factors.matrices

        def note(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, weight: Tensor = weight, f=factors, m=m) -> None:
            # Each weight meets every place of the output once.
            tokens = y.numel() // (m.out_features * m.count)
            found.append(Use(m.out_features, m.in_features, f.rank, tokens * m.count, args[0].requires_grad))

        handles.append(injection.roles[weight].owner.module.register_forward_hook(note))
    forward()
    for handle in handles:
        handle.remove()
    return tuple(found)


def multiply_adds(step: Callable[[], object]) -> int:
    """What a step takes as it runs, by torch's counter. Attention is counted as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) // 2
