"""The product of an input with one weight and the factors of its heads, and its gradient.

Autograd would find the same gradient from plain operations, and do more than is needed: it computes gradients for
anchors, too, which nobody asks for, and adds up copies of factors. Per weight (out m, in n) and token, in multiply-adds
forward and backward, the product below takes 2 m n + 5 r (m + n), or 3 r (m + n) without anchors; plain operations take
r (m + n) more with anchors. With many tokens per head it is cheaper to make each head's effective weight first, and
throw it away again: 2 m n + 2 r (m + n) and, for all tokens of a head together, 4 r m n, or half of it without anchors.

With few tokens per head, reading and writing factors takes as long as multiplying by them. So their differences from
anchors are written once, next to nothing else, and gradients come out in the size that optimizers are to see.

In half precision, under autocast too, each gradient is one product, and so is rounded once. Differences are taken in
the dtype of the factors. Of a W in half precision no effective weight is made: the sum would be rounded to W itself.
Under autocast W is in float32 and rounded anyway, and so can be the sum, as a full-rank W is that has learned the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from torch.utils.weak import TensorWeakRef

from lightning_lte.float32 import HALF
from lightning_lte.thin import times, times_thin, transposed_times_thin

# A, B and their anchors.
PairAndAnchors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# What makes W in a dtype, where nobody holds it whole.
Reader = Callable[[torch.dtype], Tensor]

_T = TypeVar("_T", Tensor, Tensor | None)

_NOTHING = nullcontext()

# What looks on while a forward keeps results for torch.utils.checkpoint, and while it runs again.
_SELECTIVE = _CachingTorchDispatchMode, _CachedTorchDispatchMode
# Autocast leaves float64 as it is.
_CASTABLE = {torch.float32, *HALF}

# On a CPU, what is made of the factors is made for a few heads at a time, so that it is still in a core's cache when it
# is read. Most cores have 1 MiB or more to themselves.
CACHE = 2**20
# On other devices they are made for as many heads as bytes allow: effective weights of all heads of a large layer would
# take more memory than its activations.
_ROOM = 2**28


def product(
    x: Tensor,
    weight: Tensor | Reader,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    anchor_A: Tensor | None,
    anchor_B: Tensor | None,
    scale: float,
    gradient_scale: int = 1,
    again: Callable[[], PairAndAnchors] | None = None,
    shared_cast: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """y_h = W x_h + s * (B_h A_h - B'_h A'_h) x_h + b_h: (n, rows, out). Straight after a merge exactly W x_h + b_h.

    Args:
        x: (n, rows, in), or (batch, ..., in) with the samples of the n heads below each other, which y then has, too.
        weight: W, (out, in). It gets a gradient if it wants one. Or what makes it, once more for a backward.
        bias: (out,), or (n, out) with one for each head, or None.
        A: (n, rank, in), or (n, p, rank, in) for p equal parts of W's rows with factors of their own.
        B: (n, out, rank), or (n, p, out / p, rank).
        anchor_A, anchor_B: as A and B; None for none. They get no gradient.
        scale: s.
        gradient_scale: what the gradients of A and B are multiplied by; see `scaled_gradient`.
        again: gives A, B and the anchors once more, for a backward, in place of keeping them until then.
        shared_cast: `cast` of the weight, in a copy that others may have, too; None for one of its own.
    """
    x, bias = cast(x), cast(bias)
    folded = False  # who doesn't hold W whole has no room for effective weights beside it
    if isinstance(weight, Tensor):
        rows = x.numel() // (x.shape[-1] * A.shape[0])
        if x.is_cpu and x.dtype != weight.dtype:
            rows //= 2  # products take half the time in half precision, and to make effective weights takes as long
        folded = folds(rows, weight.shape[0], weight.shape[1], weight.dtype, anchor_B is not None)
        weight = weight if folded else cast(weight if shared_cast is None else shared_cast(weight))
    with without_autocast(x.device.type):
        y: Tensor = _Product.apply(x, weight, bias, A, B, anchor_A, anchor_B, scale, gradient_scale, again, folded)
    return y


def applies(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `product`, or another function with a gradient of its own, may be used here, or plain operations must be.

    It is for plain tensors of one dtype, or of those that autocast makes one of; see `are_plain`, too.
    """
    tensors = [x, *(t for t in others if t is not None)]
    if not are_plain(*tensors):
        return False
    dtypes = {t.dtype for t in tensors}
    if autocasts(x.device.type):
        return dtypes <= _CASTABLE and torch.get_autocast_dtype(x.device.type) in HALF
    return len(dtypes) == 1 and x.is_floating_point()


def are_plain(*tensors: Tensor) -> bool:
    """Whether nothing looks into the operations on these tensors, so that a function may take their place.

    torch.compile, transforms of torch.func, forward-mode derivatives and classes of tensors do, and so does activation
    checkpointing that is told which operations' results to keep: it knows none that write in place.
    """
    return (
        not torch.compiler.is_compiling()
        and not (torch._C._len_torch_dispatch_stack() and _checkpoints_selectively())
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def _checkpoints_selectively() -> bool:
    return any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack())


def cast(tensor: _T) -> _T:
    """What autocast makes of a factor of a product, or of a bias; the tensor itself where there is no autocast."""
    if tensor is None or not autocasts(tensor.device.type) or tensor.dtype not in _CASTABLE:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


class SharedCast:
    """`cast` of a tensor and of views of it, in one copy of each for all who keep it.

    Autocast itself has such copies of parameters, for as long as it lasts, where it may have some: Lightning says no. A
    tensor that is detached has none: each use would make one of its own, and keep it for its backward.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, tuple[Any, TensorWeakRef]] = {}

    def __call__(self, tensor: Tensor, version: int) -> Tensor:
        """What to multiply by in place of the tensor; itself where nothing is to be cast, or operations do it.

        Args:
            tensor: to cast.
            version: changes when its values do.
        """
        if not autocasts(tensor.device.type) or not are_plain(tensor):
            return tensor
        if is_captured(tensor.device):
            return tensor  # replays would read the copy of now, whatever is written to W since
        dtype, inference = torch.get_autocast_dtype(tensor.device.type), torch.is_inference_mode_enabled()
        view = tensor.storage_offset(), tensor.shape, tensor.stride()
        made_of = tensor.data_ptr(), version, tensor.requires_grad, dtype, inference
        before, kept = self._copies.get(view, (None, None))
        copy = kept() if kept is not None and made_of == before else None
        if copy is None:
            copy = cast(tensor)
            self._copies[view] = made_of, TensorWeakRef(copy)
        return copy


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is made of what runs now. Its replays read memory, and know nothing of what Python has put
    in another place since."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def autocasts(device_type: str) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    # The second question is an error for devices that have none, such as meta; the first takes longer than it.
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else _NOTHING


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for many at once: torch.func.vmap, or `is_grads_batched` of torch.autograd.grad."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def pairs(
    A: Tensor, B: Tensor, anchor_A: Tensor | None, anchor_B: Tensor | None, whole: Literal["A", "B"] = "A"
) -> list[tuple[Tensor, Tensor]]:
    """Matrices whose products add up to B A - B' A': (A, B - B') and (A - A', B'), or (A - A', B) and (A', B - B').
    Where there are no anchors it is (A, B), and where B alone has one (A, B - B').

    Differences are taken before products: straight after a merge the sum is exactly zero, and small deltas don't drown
    in the rounding of B A.

    Args:
        A, B, anchor_A, anchor_B: of the heads, or of some of them.
        whole: which of A and B is in the first pair as it is.
    """
    if anchor_B is None:
        return [(A, B)]
    if anchor_A is None:
        return [(A, B - anchor_B)]
    if whole == "A":
        return [(A, B - anchor_B), (A - anchor_A, anchor_B)]
    return [(A - anchor_A, B), (anchor_A, B - anchor_B)]


def as_one(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The pair whose product is the sum of theirs, with ranks below each other."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)


def stacked(A: Tensor, B: Tensor, anchor_A: Tensor | None, anchor_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """`pairs` as one: [A - A'; A'] and [B, B - B'] where both have anchors."""
    return as_one(pairs(A, B, anchor_A, anchor_B, whole="B"))


def scaled_gradient(tensor: Tensor, factor: int) -> Tensor:
    """A tensor as it is, whose gradient is multiplied by `factor`.

    n local heads share the mean of their losses, so each head's gradient comes out n times smaller than that of its own
    loss. It is put right here, before optimizers, clipping or gradient scalers see it.

    A tensor that wants no gradient may be given, too. Inside a transform of torch.func nobody can tell: a slice of a
    parameter says there that it wants none, and gets one all the same.
    """
    if factor == 1:
        return tensor
    kind = _ScaledGradient if torch.compiler.is_compiling() else _ScaledGradientWithTangent
    scaled: Tensor = kind.apply(tensor, factor)
    return scaled


class _ScaledGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, factor: int) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.factor = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        return None if gradient is None else gradient * ctx.factor, None  # None from functions that stop gradients


class _ScaledGradientWithTangent(_ScaledGradient):
    """For forward-mode derivatives, of which torch.compile knows nothing."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def backward_of(
    gradients: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
) -> Callable[[Any, Tensor | None], tuple[Tensor | None, ...]]:
    """The backward of a function: its gradients from one that came back, without autocast; none from functions that
    stop gradients, if its forward says `set_materialize_grads(False)`."""

    @wraps(gradients)
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(gradient.device.type):
            return gradients(ctx, gradient)

    return backward


def keep(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    factors: PairAndAnchors,
    inner: Tensor | None,
    again: Callable[[], PairAndAnchors] | None,
) -> None:
    """Keep what a backward reads: the factors themselves, or what gives them once more. See `kept_by`."""
    ctx.again = again
    ctx.save_for_backward(x, weight, *(factors if again is None else [None] * 4), inner)
    ctx.set_materialize_grads(False)


def kept_by(ctx: Any) -> tuple[Any, Any, PairAndAnchors, Any]:
    """The input, the weight, the factors and A x, as a forward gave them to `keep`."""
    x, weight, A, B, anchor_A, anchor_B, inner = ctx.saved_tensors
    return x, weight, (A, B, anchor_A, anchor_B) if ctx.again is None else ctx.again(), inner


class _Product(torch.autograd.Function):
    """It takes tensors in the shapes that users have, as each view of them would be a step of autograd's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | Reader,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        anchor_A: Tensor | None,
        anchor_B: Tensor | None,
        scale: float,
        gradient_scale: int,
        again: Callable[[], PairAndAnchors] | None,
        folded: bool,
    ) -> Tensor:
        ctx.read = None if isinstance(base, Tensor) else base
        weight = base if isinstance(base, Tensor) else base(x.dtype)
        ctx.scale, ctx.gradient_scale = scale, gradient_scale
        factors = (A, B, anchor_A, anchor_B)
        # Not functional.linear, which gives a view: what a function of ours returns as one, users can't write to.
        whole = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows, y = _of_heads(x, A.shape[0]), _of_heads(whole, A.shape[0])
        ctx.folds = folded
        ctx.per_head = bias is not None and bias.dim() == 2
        added = bias.unsqueeze(1) if ctx.per_head else bias  # type: ignore[union-attr]
        inner: Tensor | None = None
        if ctx.folds:
            for piece, effective in _effective(weight, factors, scale, x.dtype):
                if added is None:
                    torch.bmm(piece.of_heads(rows), effective.mT, out=piece.of_outputs(y))
                else:
                    own = piece.of_outputs(added) if ctx.per_head else piece.of_weight(added)
                    torch.baddbmm(own, piece.of_heads(rows), effective.mT, out=piece.of_outputs(y))
        else:
            if added is not None:
                y.copy_(added)
            by_A = _Gathered(rows, A)  # x A^T
            for piece in _pieces(factors, A.shape[-2] * (B.shape[-2] + A.shape[-1])):
                own, total = piece.of_heads(rows), piece.of_outputs(y)
                for number, (first, second) in enumerate(piece.pairs(x.dtype, whole="A")):
                    through = torch.bmm(own, first.mT)
                    total.baddbmm_(through, second.mT, beta=0 if added is None and number == 0 else 1, alpha=scale)
                    if number == 0:
                        by_A.put(piece, through)
            inner = by_A.whole
            # The largest comes last, so that in half precision it is rounded once.
            flat = whole.view(-1, whole.shape[-1])
            torch.addmm(flat, rows.reshape(-1, rows.shape[-1]), weight.mT, out=flat)
        # As a plain layer, whose W may be written to meanwhile if its input wants no gradient.
        kept = weight if ctx.needs_input_grad[0] and ctx.read is None else None
        keep(ctx, x, kept, factors, inner, again)
        return whole

    @staticmethod
    @backward_of
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors, inner = kept_by(ctx)
        A, B, anchor_A, anchor_B = factors
        for_x, for_weight, for_bias, for_A, for_B = ctx.needs_input_grad[:5]
        if for_x and ctx.read is not None:
            weight = ctx.read(x.dtype)
        size, half = ctx.scale * ctx.gradient_scale, x.dtype in HALF
        shape, x = x.shape, _of_heads(x, A.shape[0])
        gradient = _of_heads(gradient.contiguous(), A.shape[0])  # once, and not in every product
        own, wide = gradient, x
        if A.dim() == 4:  # (n, p, rows, out / p), and x for each of the parts
            own = gradient.reshape(*gradient.shape[:2], A.shape[1], -1).transpose(1, 2)
            wide = x.unsqueeze(1)
        of_x = of_weight = of_bias = of_A = of_B = None
        if for_bias:
            of_bias = gradient.sum(1 if ctx.per_head else (0, 1))
        learning: Tensor | None = None  # gradient B, (n, [p,] rows, rank)
        if torch.is_grad_enabled() or is_batched(gradient):
            # A derivative of this one has to see where all comes from, and is scaled once more.
            A, B = (scaled_gradient(t, ctx.gradient_scale) for t in (A, B))
            inner = None
            if for_x:
                first, second = (t.to(x.dtype) for t in stacked(A, B, anchor_A, anchor_B))
                delta = own @ second @ first
                of_x = torch.matmul(gradient, weight.to(x.dtype)) + ctx.scale * (
                    delta if A.dim() == 3 else delta.sum(1)
                )
        elif for_x and ctx.folds:
            of_x = x.new_empty(x.shape)
            for piece, effective in _effective(weight, factors, ctx.scale, x.dtype):
                own_x = piece.of_heads(of_x)
                own_x.baddbmm_(piece.of_outputs(gradient), effective, beta=min(piece.part, 1))
        elif for_x:
            of_x = x.new_empty(x.shape)
            by_B = _Gathered(x, A)
            for piece in _pieces(factors, A.shape[-2] * (B.shape[-2] + A.shape[-1])):
                own_x, own_gradient = piece.of_heads(of_x), piece.of_outputs(gradient)
                for number, (first, second) in enumerate(piece.pairs(x.dtype, whole="B")):
                    through = times_thin(own_gradient, second)
                    own_x.baddbmm_(through, first, beta=min(piece.part + number, 1), alpha=ctx.scale)
                    if number == 0:
                        by_B.put(piece, through)
            learning = by_B.whole
            # Last, as in the forward.
            flat = of_x.view(-1, of_x.shape[-1])
            torch.addmm(flat, gradient.view(-1, gradient.shape[-1]), weight, out=flat)
        if for_A:
            learning = times_thin(own, B.to(x.dtype)) if learning is None else learning
            of_A = times((learning if half else learning * size).mT, wide)
        if for_B:
            inner = times(wide, A.mT.to(x.dtype)) if inner is None else inner
            of_B = transposed_times_thin(own, inner if half else inner * size)
        if half:
            # In the dtype of the factors: float16 has room for the gradients of a scaled loss, and for no more.
            of_A, of_B = (None if t is None else t.to(A.dtype).mul_(size) for t in (of_A, of_B))
        if for_weight:
            # The largest of them comes last: only the first steps want it, and let it go at once.
            of_weight = gradient.reshape(-1, gradient.shape[-1]).mT @ x.flatten(0, 1)
        return None if of_x is None else of_x.view(shape), of_weight, of_bias, of_A, of_B, *[None] * 6


def _of_heads(x: Tensor, count: int) -> Tensor:
    """(n, rows, features), of samples below each other."""
    return (
        x if x.dim() == 3 and x.shape[0] == count else x.reshape(count, math.prod(x.shape[:-1]) // count, x.shape[-1])
    )


class _Piece:
    """Some of the heads, and one part of W's rows: what is worked on at a time.

    Args:
        heads: which; None for all of them, with all of W's rows. To choose all takes as long as a small product.
        part: of W's rows.
        out: where these rows are.
        factors: of these heads and this part, (heads, rank, in) and (heads, out, rank), and so the anchors.
    """

    __slots__ = ("factors", "heads", "out", "part")

    def __init__(self, heads: slice | None, part: int, out: slice, factors: PairAndAnchors) -> None:
        self.heads, self.part, self.out, self.factors = heads, part, out, factors

    def of_heads(self, rows: Tensor) -> Tensor:
        """(heads, rows, .) of (n, rows, .)."""
        return rows if self.heads is None else rows[self.heads]

    def of_outputs(self, y: Tensor) -> Tensor:
        """(heads, rows, out) of (n, rows, all of W's rows)."""
        return y if self.heads is None else y[self.heads, :, self.out]

    def of_weight(self, weight: Tensor) -> Tensor:
        """(out, ...) of (all of W's rows, ...)."""
        return weight if self.heads is None else weight[self.out]

    def pairs(self, dtype: torch.dtype, whole: Literal["A", "B"]) -> list[tuple[Tensor, Tensor]]:
        """`pairs` of its factors in a dtype. A forward wants A whole and a backward B, so that the first pair is the
        one whose product gradients are made of, too: A x, or B^T times what comes back."""
        found = pairs(*self.factors, whole=whole)
        return found if found[0][0].dtype == dtype else [(first.to(dtype), second.to(dtype)) for first, second in found]


class _Gathered:
    """What is made piece by piece, put together.

    Args:
        rows: (n, rows, .).
        A: (n, [p,] rank, in).

    Attributes:
        whole: (n, [p,] rows, rank); None as long as nothing was put in.
    """

    def __init__(self, rows: Tensor, A: Tensor) -> None:
        self._rows, self._A = rows, A
        self.whole: Tensor | None = None

    def put(self, piece: _Piece, made: Tensor) -> None:
        """Put what was made for a piece, (heads, rows, rank), into its place."""
        if piece.heads is None:
            self.whole = made
            return
        if self.whole is None:
            self.whole = made.new_empty(*self._A.shape[:-2], self._rows.shape[1], self._A.shape[-2])
        self.whole[piece.heads if self._A.dim() == 3 else (piece.heads, piece.part)] = made


def folds(rows: int, out_features: int, in_features: int, dtype: torch.dtype, anchored: bool) -> bool:
    """Whether a head has so many rows that its effective weight pays: 4/3 m n / (m + n) with anchors, 2 m n / (m + n)
    without, by the count of multiply-adds. On a CPU both took the same time there, too. It never does where W, whose
    `dtype` it is, is in half precision, as it would be rounded to nothing but W."""
    if dtype in HALF:
        return False
    return (3 if anchored else 2) * rows * (out_features + in_features) >= 4 * out_features * in_features


def _effective(
    weight: Tensor, factors: PairAndAnchors, scale: float, dtype: torch.dtype
) -> Iterator[tuple[_Piece, Tensor]]:
    """For each piece its rows of W + s * (B A - B' A') for each of its heads, (heads, out, in), in a dtype."""
    A, B, *_ = factors
    for piece in _pieces(factors, B.shape[-2] * A.shape[-1]):
        yield piece, with_delta(piece.of_weight(weight), *stacked(*piece.factors), scale, dtype)


def with_delta(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """weight + s * B A, (n, out, in), for (n, rank, in) and (n, out, rank).

    Args:
        weight: (out, in), or (n, out, in), in float32 or better.
        A, B: in the same dtype.
        scale: s.
        dtype: of the sum. Where it has fewer bits, the product has no more, and the sum is rounded from float32.
    """
    if dtype == weight.dtype:
        return torch.baddbmm(weight, B, A, alpha=scale)
    delta = torch.bmm(B.to(dtype), A.to(dtype))
    return torch.add(weight, delta, alpha=scale, out=delta)


def _pieces(factors: PairAndAnchors, numbers: int) -> Iterator[_Piece]:
    """What is worked on at a time.

    Args:
        factors: (n, rank, in) and (n, out, rank), or (n, p, rank, in) and (n, p, out / p, rank), and so the anchors.
        numbers: how many are made for one part of a head.
    """
    A, B, *_ = factors
    count, parts, size = A.shape[0], 1 if A.dim() == 3 else A.shape[1], B.shape[-2]
    of_one = numbers * A.element_size()
    if A.is_cpu:
        together = max(1, CACHE // of_one) * torch.get_num_threads()
    else:
        together = max(1, _ROOM // of_one)
    if A.dim() == 3 and count <= together:
        yield _Piece(None, 0, slice(size), factors)
        return
    for first in range(0, count, together):
        heads = slice(first, first + together)
        for part in range(parts):
            chosen = tuple(None if t is None else t[heads] if A.dim() == 3 else t[heads, part] for t in factors)
            yield _Piece(heads, part, slice(part * size, (part + 1) * size), chosen)  # type: ignore[arg-type]
