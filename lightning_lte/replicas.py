"""Everything trainable that is not factored."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lte.heads import finite_rows, of_good
from lightning_lte.optimizers import laid_out
from lightning_lte.roles import Owner
from lightning_lte.shards import local, with_part
from lightning_lte.transport import Transport


class Replica:
    """A trainable parameter that is not factored: each head, or each device, trains its own.

    Attributes:
        name: in the user's module.
        param: the user's own. With one head per device, or for a parameter that the local heads share, it is trained
            in place; else it holds the mean as of the last merge.
        stack: (n, *shape), one for each local head, or None while it is trained in place.
        shared: whether it has to stay so.
        still: whether it has wanted no gradient from the start and nobody has written to it: devices have it in common,
            and merges have nothing to do with it.
    """

    def __init__(self, name: str, param: nn.Parameter, owners: list[Owner], shared: bool, still: bool = False) -> None:
        self.name, self.param, self.owners, self.shared, self.still = name, param, owners, shared, still
        self.stack: nn.Parameter | None = None
        # What the module shows in the turn of a head: parameters of their own on the storage of the stack, since user
        # code may expect leaves of autograd's graph.
        self._turns: list[nn.Parameter] = []
        # Where these lie, and that of the stack; and the head whose turn it is.
        self._places: list[int] = []
        self._turn: int | None = None

    def split(self, count: int) -> None:
        """Give each local head its own, starting from the user's parameter."""
        self._hold(self.param.detach().unsqueeze(0).repeat(count, *[1] * self.param.dim()))

    def grow(self, factor: int) -> None:
        """Put `factor` heads in the place of each, which all go on with what that head had.

        Gradients that came in turns have to be collected before.
        """
        assert self.stack is not None
        self._hold(self.stack.detach().repeat_interleave(factor, dim=0))

    def _hold(self, copies: Tensor) -> None:
        self.stack, self.still = nn.Parameter(copies), False
        self._turns = [nn.Parameter(own) for own in self.stack.detach()]
        self._places, self._turn = [own.data_ptr() for own in self._turns], None
        for own in self._turns:
            _learn_with(self.stack, own)

    def join(self) -> None:
        """Have all local heads train the user's parameter itself from now on, with the mean of their gradients.

        Those that came in turns have to be collected before.
        """
        assert self.stack is not None
        if self.stack.grad is not None:
            mean = self.stack.grad.mean(0)
            for hook in (self.param._backward_hooks or {}).values():
                changed = hook(mean)  # of the user's, who has registered it since
                mean = mean if changed is None else changed
            self.param.grad = laid_out(mean, self.param) if self.param.grad is None else self.param.grad + mean
        self.stack = None

    def show(self, head: int | None) -> None:
        """Let the module see one head's own in place of the user's parameter; None undoes it."""
        assert self.stack is not None
        before, self._turn = self._turn, head
        if before is not None and self._turns[before].data_ptr() != self._places[before]:
            # In its turn the head has put another tensor in (`param.data = ...`).
            self.stack.data[before].copy_(self._turns[before].data)
            self._turns[before].data = self.stack.data[before]
        if self._places[0] != self.stack.data_ptr():
            # An optimizer has done so.
            for own, row in zip(self._turns, self.stack.detach(), strict=True):
                own.data = row
            self._places = [own.data_ptr() for own in self._turns]
        for owner in self.owners:
            if owner.key not in owner.module._parameters:
                continue  # pruned, or parametrized since
            shown = owner.module._parameters[owner.key]
            # Whoever freezes the module, or a part of it, in a head's turn means all heads.
            if shown is not self.param and shown is not None:
                self.param.requires_grad_(shown.requires_grad)
            own = self.param if head is None else self._turns[head]
            own.requires_grad_(self.param.requires_grad)
            owner.module._parameters[owner.key] = own

    @torch.no_grad()
    def collect_gradients(self, scale: int) -> None:
        """Add the gradients that came in turns, times `scale`, to that of the stack."""
        if self.stack is None or all(own.grad is None for own in self._turns):
            return
        gradients = [torch.zeros_like(own) if own.grad is None else own.grad * scale for own in self._turns]
        together = torch.stack(gradients)
        self.stack.grad = together if self.stack.grad is None else self.stack.grad + together
        for own in self._turns:
            own.grad = None

    @property
    def count(self) -> int:
        """n for a stack, else 1."""
        return 1 if self.stack is None else len(self.stack)

    @property
    def shown(self) -> list[nn.Parameter]:
        """What the module may show: the user's own, and in turns those of heads."""
        return [self.param, *(self._turns if self.stack is not None else ())]

    @property
    def trained(self) -> nn.Parameter:
        """What the optimizer holds."""
        return self.param if self.stack is None else self.stack

    @property
    def copies(self) -> Tensor:
        """The local copies, (k, *shape): k = n for a stack, else 1; of what devices share out, this one's part."""
        return local(self.param).detach().unsqueeze(0) if self.stack is None else self.stack.detach()


def _learn_with(stack: nn.Parameter, own: nn.Parameter) -> None:
    """Have a row of a stack get gradients only while the stack does: toggled optimizers freeze what they hold.

    Args:
        stack: what an optimizer holds.
        own: what the module shows in the turn of a head, whose `requires_grad` is as the module's.
    """
    fresh = False
    # Python's garbage collector does not see what the second hook holds. What leads from there back to the tensor, as
    # the stack does through its own hook and the heads, would stay for good.
    weak_stack = weakref.ref(stack)

    def silenced(gradient: Tensor | None) -> Tensor | None:
        nonlocal fresh
        fresh = own.grad is None
        return gradient if gradient is None or stack.requires_grad else torch.zeros_like(gradient)

    def dropped(shown: Tensor) -> None:
        learning = weak_stack()
        if fresh and learning is not None and not learning.requires_grad:
            shown.grad = None

    own.register_hook(silenced)
    own.register_post_accumulate_grad_hook(dropped)


class Replicas:
    """All replicas of a module.

    Args:
        count: n, local heads.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._replicas: list[Replica] = []
        # While a merge lasts: replica, its sum over heads, and its copies as they were.
        self._taken: list[tuple[Replica, Tensor, Tensor | None]] = []
        # What was there before the first head wrote to it in its turn and the others were given the same.
        self._handed_on: dict[Replica, Tensor] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def add(self, replica: Replica) -> None:
        self._replicas.append(replica)

    def of(self, params: Iterable[nn.Parameter]) -> Replicas:
        """Those of some of the user's parameters."""
        chosen, some = set(params), Replicas(self.count)
        some._replicas = [replica for replica in self._replicas if replica.param in chosen]
        return some

    def besides(self, others: Replicas) -> Replicas:
        """All but those of `others`."""
        params = {replica.param for replica in others}
        return self.of(replica.param for replica in self._replicas if replica.param not in params)

    def select(self, head: int | None) -> None:
        """Let the module see one head's replicas in place of its own parameters; None undoes it."""
        for replica in self._replicas:
            if replica.stack is not None:
                replica.show(head)

    def rows(self, head: int) -> dict[Replica, Tensor]:
        """Copies of what a local head has of its own, for `hand_on`."""
        return {r: r.copies[head].clone() for r in self._replicas if r.stack is not None}

    @torch.no_grad()
    def hand_on(self, head: int, before: Mapping[Replica, Tensor]) -> None:
        """Give what the user's step has written to a head's own replicas in its turn to the heads after it, if they
        have what the head had before: what sets a parameter by the first data does so once, and notes that for all.

        Where the next head writes all the same, each means its own, and those after it get back what they had.

        Args:
            head: number of the local head.
            before: its `rows` as its turn began.
        """
        if head == 0:
            self._handed_on = {}
        for replica, row in before.items():
            # Past autograd's eyes, which needs them for the backward of earlier heads.
            copies = replica.copies.data
            if torch.equal(copies[head], row):
                continue
            given = self._handed_on.get(replica)
            for other in copies[head + 1 :]:
                if torch.equal(other, row):
                    other.copy_(copies[head] if given is None else given)
            self._handed_on[replica] = row if given is None else given

    def collect_gradients(self, scale: int) -> None:
        """Hand on what backward left at the replicas of heads that took turns, times `scale`."""
        for replica in self._replicas:
            replica.collect_gradients(scale)

    @torch.no_grad()
    def finite(self) -> list[Tensor]:
        """For each that is trained, (n,) bool: whether a local head's copy is finite."""
        return [finite_rows(r.copies).expand(self.count) for r in self._replicas if r.param.requires_grad]

    @torch.no_grad()
    def take(self, transport: Transport, good: Tensor, apart: bool) -> None:
        """Sum every replica over the good local heads, accumulated in float32 or better.

        Args:
            transport: to the other devices.
            good: (n,) bool.
            apart: whether replicas change before `land`, so that a copy of them is needed.
        """
        self._taken = []
        for replica in self._replicas:
            if not (replica.param.is_floating_point() or replica.param.is_complex()):
                continue
            if replica.stack is None and (transport.world_size == 1 or replica.still):
                continue  # its own mean
            wide = torch.promote_types(replica.param.dtype, torch.float32)
            if not replica.param.requires_grad:
                # Where it is equal everywhere, the mean must not change a bit of it.
                wide = torch.promote_types(wide, torch.float64)
            if replica.stack is None:
                # Local heads share it, so it counts once for each of them.
                total = local(replica.param).to(wide) * good.sum()
                total = total.where(good.any(), 0)
            else:
                total = of_good(replica.stack, good).to(wide).sum(0)
            self._taken.append((replica, total, replica.copies.clone() if apart else None))

    def exchange(self, transport: Transport) -> None:
        """Sum over all devices. A collective: every device has to call it."""
        transport.sum_([total for _, total, _ in self._taken])

    @torch.no_grad()
    def land(self, good_total: int) -> None:
        """Replace every replica by the mean over the good heads of all devices; what it has learned since then stays.

        Args:
            good_total: how many heads are good.
        """
        for replica, total, before in self._taken:
            mean = (total / good_total).to(replica.param.dtype)
            if before is None:
                copies = mean.expand_as(replica.copies)
            else:
                # One that was not finite starts from the mean.
                copies = mean + (replica.copies - before).nan_to_num(0, 0, 0)
            if replica.stack is None:
                local(replica.param).copy_(copies[0])
            else:
                replica.param.copy_(mean)
                replica.stack.copy_(copies)
        self._taken = []

    def taken_state(self) -> dict[str, dict[str, Tensor]]:
        """What a merge has exchanged and not landed: sums over all heads, and the local copies as they were."""
        return {
            "totals": {replica.name: total.cpu() for replica, total, _ in self._taken},
            "before": {replica.name: before.cpu() for replica, _, before in self._taken if before is not None},
        }

    def load_taken_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `taken_state`."""
        self._taken = []
        for replica in self._replicas:
            if replica.name in state["totals"]:
                device = replica.param.device
                total, before = state["totals"][replica.name], state["before"][replica.name]
                self._taken.append((replica, total.to(device, copy=True), before.to(device, copy=True)))


@torch.no_grad()
def average_gradients(params: Sequence[nn.Parameter], transport: Transport) -> None:
    """Replace gradients by their mean over devices, as data-parallel training does. A collective: every device has to
    call it."""
    if not params:
        return
    # Every device must send the same tensors, also for a parameter that took no part on one of them, and for the rows
    # of an embedding that its own samples have.
    sparse = [p.grad is not None and p.grad.is_sparse for p in params]
    owned = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    gradients = [g.to_dense() if of_rows else local(g) for g, of_rows in zip(owned, sparse, strict=True)]
    had = torch.ones(len(params), dtype=torch.float32, device=params[0].device)
    absent = [i for i, p in enumerate(params) if p.grad is None]
    for i in absent:
        had[i].zero_()
    transport.sum_([*gradients, had])
    # One that took no part on any of them has none: optimizers pass it over. The values are read, which waits for the
    # device, only where one took no part on this one, as in data-parallel training.
    nowhere = {i for i, devices in enumerate(had.tolist()) if not devices} if absent else ()
    for i, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
        mean = gradient / transport.world_size
        param.grad = None if i in nowhere else mean.to_sparse(1) if sparse[i] else with_part(param, mean)
