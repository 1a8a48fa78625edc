"""What a device holds of weights and factors that the devices of a group share out among them, row by row.

Such tensors are DTensors, as `fully_shard` makes them of a module's parameters. A device keeps its own rows of W, of a
head's factors and anchors, and with them of their moments; whole ones exist while they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from lightning_lte.heads import Factors, Pair
from lightning_lte.product import PairAndAnchors


def is_shared_out(tensor: Tensor) -> bool:
    """Whether devices have a part of a tensor each."""
    return isinstance(tensor, DTensor)


def users_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before `fully_shard` changed it."""
    made: Any = getattr(fsdp, "FSDPModule", ())
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, made))


def local(tensor: Tensor) -> Tensor:
    """This device's part of a tensor, or the tensor itself where it is not shared out; writes to it are writes to the
    tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. A collective of its group where it is shared out: every device of it has to call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


@torch.no_grad()
def put_(tensor: Tensor, value: Tensor) -> None:
    """Write all of a tensor; each device takes its part of the value, which all of them have."""
    local(tensor).copy_(_part(value, tensor.device_mesh, _dim(tensor)) if isinstance(tensor, DTensor) else value)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value, which all devices of a group have, shared out as a tensor of its shape is; else the value itself."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    return _shared_out(value, tensor.device_mesh, _dim(tensor))


def with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor that is shared out as another is, and of which this device has a part; the part itself where it is not
    shared out."""
    if not isinstance(tensor, DTensor):
        return part
    placements, shape, stride = tensor.placements, tensor.shape, tensor.stride()
    return DTensor.from_local(part, tensor.device_mesh, placements, run_check=False, shape=shape, stride=stride)


class SharedFactors(Factors):
    """Factors of a weight that the devices of a group share out among them, as `fully_shard` does.

    The devices of the group have the same heads, and samples of their own; the gradient of a head is the mean of
    theirs. A, B and the anchors are shared out by rows: a device keeps rank / k rows of A, out / k rows of B, and its
    rows of W, rounded up. A forward gathers the factors, as FSDP does W, and its backward hands each device the mean
    gradient of its rows. Linear layers gather them once more for their backward, as FSDP does W, in place of keeping
    them from one to the other; other layers keep them.

    Args:
        place: the module that W is a parameter of, and its name there; in a forward it shows the whole W.
        **kwargs: see `Factors`.
    """

    def __init__(self, *args: Any, place: tuple[nn.Module, str], **kwargs: Any) -> None:
        self._place = place
        super().__init__(*args, **kwargs)

    def _own(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def base(self) -> Tensor:
        module, key = self._place
        weight: Tensor = getattr(module, key)
        if is_shared_out(weight):
            raise RuntimeError(
                f"With shard=k a layer has its whole weight only while the block around it, a member of an"
                f" nn.ModuleList or nn.Sequential, runs its forward, or a step of the LightningModule runs;"
                f" {self.name} was called otherwise. Call the block itself, or train without `shard`."
            )
        return weight.detach()

    def apply(self, base: Tensor, x: Tensor, head: int | Tensor | None = None, part: int | None = None) -> Tensor:
        # Made once more for a backward; the base is not, which would have to be kept for that.
        none = base.new_zeros(()).expand(base.shape)
        run = super().apply
        y: Tensor = checkpoint(run, none, x, head, part, use_reentrant=False, preserve_rng_state=False)
        return base + y

    def _again(self, head: int | Tensor | None, part: int | None) -> Callable[[], PairAndAnchors]:
        return lambda: self._acting(head, part)

    def _chosen(self, heads: int | slice | Tensor | tuple[slice | Tensor, int] | None) -> PairAndAnchors:
        A, B, *anchors = (tensor if heads is None else tensor[heads] for tensor in self.gather())
        if not self.weight.requires_grad:
            A, B = A.detach(), B.detach()
        return (A, B, *anchors) if anchors else (A, B, None, None)  # type: ignore[return-value]

    def gather(self) -> list[Tensor]:
        """Whole A, B and, with `keep`, both anchors, in one exchange. A collective of the group."""
        tensors = [t for t in (self.A, self.B, self.anchor_A, self.anchor_B) if isinstance(t, DTensor)]
        group = tensors[0].device_mesh.get_group()
        parts = [t.to_local() if t.requires_grad else local(t) for t in tensors]
        rows = tuple(t.shape[-2] for t in tensors)
        gathered: Sequence[Tensor] = _Gathered.apply(group, rows, *parts)
        return list(gathered)

    @torch.no_grad()
    def effective(self, head: int) -> Tensor:
        A, B = self.current(head)
        with self._in_full_precision():
            return whole(self.weight) + self.scale * self.matrices.as_weight(B @ A, self.weight.shape)

    @torch.no_grad()
    def sum_of_products(self, pairs: Sequence[Pair]) -> Tensor:
        """This device's rows of s * sum over heads and pairs of B A in W's shape, for whole factors."""
        assert isinstance(self.weight, DTensor)
        first, count = _rows_of(self.weight)
        if self.matrices.lead or self.matrices.transposed:
            # Rows of W are not those of B then: the whole product exists for a moment, as W does in a forward.
            return super().sum_of_products(pairs).narrow(0, first, count)
        return self._product([(A, B.narrow(-2, first, count)) for A, B in pairs]).reshape(self.shard.shape)

    @torch.no_grad()
    def finite(self) -> Tensor:
        A, B = self.gather()[:2]
        return self._finite(A, B)

    def _shared(self, value: Tensor) -> Tensor:
        assert isinstance(self.weight, DTensor)
        return _shared_out(value.to(self.weight.dtype), self.weight.device_mesh, value.dim() - 2)


class _Gathered(torch.autograd.Function):
    """Tensors (*, rows, columns) from what each device of a group has of their rows, in one exchange.

    Backward, each device receives its rows of the mean over devices of the gradients, in one exchange as well.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, rows: tuple[int, ...], *parts: Tensor) -> tuple[Tensor, ...]:
        size = dist.get_world_size(group)
        ctx.group, ctx.rows, ctx.own = group, rows, [part.shape[-2] for part in parts]
        padded = [_padded(part, -(-count // size)) for part, count in zip(parts, rows, strict=True)]
        flat = torch.cat([part.reshape(-1) for part in padded])
        gathered = flat.new_empty(size, flat.numel())
        dist.all_gather_single(gathered.view(-1), flat, group=group)
        columns = gathered.split([part.numel() for part in padded], dim=1)
        stacks = [c.reshape(size, *part.shape) for c, part in zip(columns, padded, strict=True)]
        # Rows of the devices below each other, less the padding in the end.
        return tuple(
            s.movedim(0, -3).flatten(-3, -2).narrow(-2, 0, count) for s, count in zip(stacks, rows, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        size = dist.get_world_size(ctx.group)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        stacks = []
        for i in wanted:
            chunk = -(-ctx.rows[i] // size)
            stacks.append(_padded(gradients[i], chunk * size).unflatten(-2, (size, chunk)).movedim(-3, 0))
        flat = torch.cat([s.reshape(size, -1) for s in stacks], dim=1) / size
        mine = flat.new_empty(flat.shape[1])
        dist.reduce_scatter_single(mine, flat.view(-1), group=ctx.group)
        found: list[Tensor | None] = [None] * len(gradients)
        for i, s, part in zip(wanted, stacks, mine.split([s[0].numel() for s in stacks]), strict=True):
            found[i] = part.view(s.shape[1:]).narrow(-2, 0, ctx.own[i])
        return None, None, *found


def _padded(part: Tensor, rows: int) -> Tensor:
    return nn.functional.pad(part, (0, 0, 0, rows - part.shape[-2]))


def _shared_out(value: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    part = _part(value, mesh, dim).to(mesh.device_type, copy=True).contiguous()
    stride = torch.empty(value.shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=value.shape, stride=stride)


def _part(value: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    first, count = _range(value.shape[dim], mesh)
    return value.narrow(dim, first, count)


def _rows_of(tensor: DTensor) -> tuple[int, int]:
    """The first of this device's rows of a weight, and how many they are."""
    return _range(tensor.shape[0], tensor.device_mesh)


def _range(length: int, mesh: DeviceMesh) -> tuple[int, int]:
    # As torch.chunk and DTensor do: the last devices may have fewer, or none.
    chunk = -(-length // mesh.size())
    first = min(length, mesh.get_local_rank() * chunk)
    return first, min(chunk, length - first)


def _dim(tensor: DTensor) -> int:
    [placement] = tensor.placements
    assert isinstance(placement, Shard)
    return placement.dim
