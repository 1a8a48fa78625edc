"""What travels between devices. The only module that talks to `torch.distributed`; the identity in one process."""

from __future__ import annotations

import atexit
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lte.wire import Wire, decode, encode

# Tensors are packed into flat buckets, so that many small ones cost one call; the cap bounds the extra memory.
BUCKET_BYTES = 64 * 2**20

# Seconds that devices wait for each other if nothing else was said.
_TIMEOUT_S = 1800.0
# Seconds beyond its own timeout that an answer of the store is waited for: where its host is stopped, none ever comes.
_STORE_GRACE_S = 2.0

_T = TypeVar("_T")

# Questions put to all devices, numbered alike on all of them: an answer to an earlier one must not count.
_questions = itertools.count()
# What they begin with, so that who asks something else meanwhile is known for it.
_AGREE, _UNION = "agree: ", "union: "


class Transport:
    """Sends merges between the devices of a process group.

    Args:
        world_size: number of devices; 1 needs no process group.
        rank: number of this device.
        group: process group; None for the one of all.
        timeout: for meetings, and the collectives of groups made from this; None for that of the backend.
        within: to the devices that share out one set of heads' work; None where a device has it for itself. What this
            transport sends then goes to the devices that have the same share of other heads.

    Attributes:
        devices, device: number of all devices, and of this one among them: those that meet.
        bytes_sent: bytes this device has sent since the start, by the count of a ring: an all-reduce of b bytes sends
            2 b (w - 1) / w, an all-gather of b bytes per device sends b (w - 1), and an exchange of b bytes between all
            sends b (w - 1) / w, as a broadcast does in the mean of the devices. Each device receives as much.
        timeout_s: seconds that devices wait for each other where they meet.
        lost: whether a meeting has failed. The devices that failed can't meet again.
    """

    def __init__(
        self,
        world_size: int = 1,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        within: Transport | None = None,
    ) -> None:
        self.world_size, self.rank, self.group, self.timeout = world_size, rank, group, timeout
        self.within = within
        size, index = (1, 0) if within is None else (within.world_size, within.rank)
        self.devices, self.device = world_size * size, rank * size + index
        self.timeout_s = _TIMEOUT_S if timeout is None else timeout.total_seconds()
        self.lost = False
        self.bytes_sent = 0

    @classmethod
    def sharing(cls, size: int, devices: int, device: int, timeout: timedelta | None = None) -> Transport:
        """A transport for groups of neighbouring devices that share out one set of heads' work: its `within` reaches
        the own group, and itself the devices with the same share in all groups. A collective of all devices.

        Args:
            size: k, devices in a group.
            devices: number of all devices, a multiple of k.
            device: number of this one.
            timeout: see above.
        """
        groups = [list(range(first, first + size)) for first in range(0, devices, size)]
        others = [list(range(index, devices, size)) for index in range(size)]
        inside: Any = dist.new_subgroups_by_enumeration(groups, timeout)[0]
        across: Any = dist.new_subgroups_by_enumeration(others, timeout)[0]
        within = cls(size, device % size, inside, timeout)
        return cls(devices // size, device // size, across, timeout, within)

    def beside(self) -> Transport:
        """A transport whose traffic does not wait for this one's. A collective: every device has to call it."""
        if self.world_size == 1:
            return Transport()
        group: Any = dist.new_group(timeout=self.timeout)
        return Transport(self.world_size, self.rank, group, self.timeout)

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor], wire: Wire = "float32", errors: Sequence[Tensor] | None = None) -> None:
        """Replace every tensor by its sum over all devices, bit-equal on all of them.

        Args:
            tensors: of the same shapes on all devices.
            wire: "float32" sends each in its own dtype. With fewer bits each device receives its share of the rows from
                all others, sums it in float32 in the order of ranks, and sends the sum to all.
            errors: float32, one for each tensor: what the last sums lost to rounding, which is added now; what is lost
                now is left there.
        """
        if self.world_size == 1:
            return
        if wire != "float32":
            for indices in _indices(tensors):
                self._sum_rounded([tensors[i] for i in indices], wire, errors and [errors[i] for i in indices])
            return
        for bucket in buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat, group=self.group)
            self.bytes_sent += self.bytes_of_sum(flat.nbytes)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def bytes_of_sum(self, count: int) -> int:
        """Bytes that a device sends for the sum of so many bytes."""
        return 2 * count * (self.world_size - 1) // self.world_size

    def _sum_rounded(self, tensors: Sequence[Tensor], wire: Wire, errors: Sequence[Tensor] | None) -> None:
        devices = range(self.world_size)
        # Rows of every tensor are dealt out to the devices.
        wide = [_rows(t).float() for t in tensors]
        lost = None if errors is None else [_rows(e) for e in errors]
        if lost is not None:
            wide = [x + e for x, e in zip(wide, lost, strict=True)]
        shares = [[x.tensor_split(self.world_size)[device] for x in wide] for device in devices]
        shapes = [[x.shape for x in share] for share in shares]
        codes = [encode(share, wire) for share in shares]
        received = self._exchange_bytes(codes)
        own = [wide[0].new_zeros(shape) for shape in shapes[self.rank]]
        for code in received:
            for total, part in zip(own, decode(code, shapes[self.rank], wire), strict=True):
                total += part
        summed = encode(own, wire)
        sizes = [len(code) for code in codes]
        sums = [decode(c, s, wire) for c, s in zip(self._gather_bytes(summed, sizes), shapes, strict=True)]
        if lost is not None:
            for device in devices:
                sent = decode(codes[device], shapes[device], wire)
                for e, x, rounded in zip(lost, shares[device], sent, strict=True):
                    e.tensor_split(self.world_size)[device].copy_(x - rounded)
            for e, total, rounded in zip(lost, own, sums[self.rank], strict=True):
                e.tensor_split(self.world_size)[self.rank].add_(total - rounded)
        for i, tensor in enumerate(tensors):
            tensor.copy_(torch.cat([share[i] for share in sums]).view_as(tensor))

    def _exchange_bytes(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Send one code to each device; returns what each has sent here, which are all as long as the own one."""
        length = max(map(len, codes))
        sent = torch.stack([_padded(code, length) for code in codes]).flatten()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        self.bytes_sent += length * (self.world_size - 1)
        return [part[: len(codes[self.rank])] for part in received.view(self.world_size, length)]

    def _gather_bytes(self, code: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The codes of all devices, whose sizes everyone knows."""
        length = max(sizes)
        parts = [torch.empty(length, dtype=torch.uint8, device=code.device) for _ in sizes]
        dist.all_gather(parts, _padded(code, length), group=self.group)
        self.bytes_sent += length * (self.world_size - 1)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def stack(self, tensor: Tensor) -> Tensor:
        """Concatenate along dimension 0 the tensors of all devices, in the order of ranks; all have one shape."""
        if self.world_size == 1:
            return tensor
        # Backends send memory as it lies, and need not look into strides.
        sent = tensor.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(parts, sent, group=self.group)
        self.bytes_sent += sent.nbytes * (self.world_size - 1)
        return torch.cat(parts)

    def any_within(self, flags: Tensor) -> Tensor:
        """(k,) bool: each flag, whether it is so on any of the devices that share out a head with this one, itself
        included. A collective of theirs."""
        if self.within is None:
            return flags
        return self.within.stack(flags.to(torch.uint8).unsqueeze(0)).bool().any(0)

    def sum_within_(self, tensors: Sequence[Tensor]) -> None:
        """`sum_` over the devices that share out a head with this one: a collective of theirs."""
        if self.within is not None:
            self.within.sum_(tensors)

    @torch.no_grad()
    def stack_all(self, tensors: Sequence[Tensor], wire: Wire = "float32") -> list[Tensor]:
        """`stack` for many tensors, in few calls.

        Args:
            tensors: of the same shapes on all devices.
            wire: "float32" sends each in its own dtype; otherwise all come back in float32, rounded, the own ones too.
        """
        if self.world_size == 1:
            return list(tensors)
        stacked: list[Tensor] = [tensors[0]] * len(tensors) if tensors else []
        for indices in _indices(tensors):
            bucket = [tensors[i].detach() for i in indices]
            shapes = [t.shape for t in bucket]
            if wire == "float32":
                flat = torch.cat([t.reshape(-1) for t in bucket])
                rows = self.stack(flat.unsqueeze(0))
                columns = rows.split([s.numel() for s in shapes], dim=1)
                parts = [part.reshape(-1, *s[1:]) for part, s in zip(columns, shapes, strict=True)]
            else:
                code = encode(bucket, wire)
                decoded = [decode(c, shapes, wire) for c in self._gather_bytes(code, [len(code)] * self.world_size)]
                parts = [torch.cat(own) for own in zip(*decoded, strict=True)]
            for i, part in zip(indices, parts, strict=True):
                stacked[i] = part
        return stacked

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Give every device the values of rank 0: of tensors of any layout and dtype, and wherever they are."""
        if self.world_size == 1:
            return
        of_gpus = "nccl" in dist.get_backend(self.group)
        for tensor in tensors:
            if tensor.layout == torch.strided and not tensor.is_nested and not (of_gpus and tensor.is_cpu):
                sent = tensor.contiguous()
                # As bytes, which all backends send.
                dist.broadcast(sent.view(-1).view(torch.uint8), src=self._first, group=self.group)
                tensor.copy_(sent)
            else:
                whole = [tensor.cpu()]  # that of the others gives way to the first one's
                dist.broadcast_object_list(whole, src=self._first, group=self.group)
                tensor.copy_(whole[0])
            self.bytes_sent += tensor.numel() * tensor.element_size() * (self.world_size - 1) // self.world_size

    def gather(self, value: Any) -> list[Any] | None:
        """Collect a picklable value of each device on rank 0; the others receive None."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=self._first, group=self.group)
        return gathered

    @property
    def _first(self) -> int:
        """What the process group of all calls this one's rank 0."""
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Say in errors what the devices could not meet for, and who was missing.

        Args:
            what: "merge 3, after step 30", the same on all devices.

        Raises:
            RuntimeError: a device did not come before the time was out, or is gone; from torch's own error. NCCL ends
                the process by itself when the time is out, so there the same is written before.
        """
        if self.devices == 1:
            yield
            return
        key = f"lte/at/{self.device}"
        # The store does not answer this, so it costs microseconds.
        dist.distributed_c10d._get_default_store().set(key, what)
        start = time.monotonic()
        timer = None
        if "nccl" in dist.get_backend():  # also "cpu:gloo,cuda:nccl"
            timer = threading.Timer(0.9 * self.timeout_s, lambda: print(self._missed(what, start), file=sys.stderr))
            timer.daemon = True
            timer.start()
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            if not _is_of_meeting(error):
                raise
            self.lost = True
            raise RuntimeError(self._missed(what, start)) from error
        finally:
            if timer is not None:
                timer.cancel()

    def _missed(self, what: str, start: float) -> str:
        store = dist.distributed_c10d._get_default_store()

        def ask() -> list[str | None]:
            keys = [f"lte/at/{rank}" for rank in range(self.devices)]
            return [store.get(key).decode() if store.check([key]) else None for key in keys]

        heard = _within(_STORE_GRACE_S, ask)
        if heard is None:
            where = "Rank 0's process, which all ask for each other, does not answer: it hangs or is gone."
        else:
            late = [f"rank {rank} ({at or 'nowhere yet'})" for rank, at in enumerate(heard) if at != what]
            where = f"Last heard of elsewhere: {'; '.join(late)}." if late else "All had come to it."
        return (
            f"At {what}, all devices have to meet within {self.timeout_s:g} s; rank {self.device} gave up after"
            f" {time.monotonic() - start:.1f} s, as another hangs, is late or is gone. {where} Look into its output,"
            " and go on from the last checkpoint. If devices may be that late, give a longer"
            " LTEStrategy(timeout=timedelta(seconds=...))."
        )

    def agree(self, value: str, timeout_s: float) -> bool:
        """Whether all devices arrive here with the same value before the time is out."""
        value = f"{_AGREE}{value}"
        answers = self._exchange(value, timeout_s)
        return answers is not None and all(answer == value for answer in answers)

    def union(self, values: Mapping[str, str]) -> dict[str, str]:
        """What any device has; all devices receive the same, in the same order.

        Raises:
            TimeoutError: a device does not arrive within `timeout_s`, or has come to its end.
        """
        answers = self._exchange(f"{_UNION}{json.dumps(dict(values))}", self.timeout_s)
        if answers is not None and not all(answer.startswith(_UNION) for answer in answers):
            raise TimeoutError(f"Rank {self.device} asked the other devices, of which one has come to its end.")
        if answers is None:
            raise TimeoutError(f"Rank {self.device} waited {self.timeout_s:g} s for the other devices in vain.")
        together: dict[str, str] = {}
        for answer in answers:
            together = {**json.loads(answer.removeprefix(_UNION)), **together}
        return dict(sorted(together.items()))

    def _exchange(self, value: str, timeout_s: float) -> list[str] | None:
        """The values of all devices, in the order of ranks; None if one does not arrive before the time is out.

        It goes through the store and not through a collective: it may be asked when some devices are gone.
        """
        if self.devices == 1:
            return [value]
        store = dist.distributed_c10d._get_default_store()
        question = next(_questions)
        keys = [f"lte/agree/{question}/{rank}" for rank in range(self.devices)]

        def ask() -> list[str]:
            store.set(keys[self.device], value)
            store.wait(keys, timedelta(seconds=timeout_s))
            return [store.get(key).decode() for key in keys]

        return _within(timeout_s + _STORE_GRACE_S, ask)


def _within(timeout_s: float, ask: Callable[[], _T]) -> _T | None:
    """What the store answers; None if the time is out, or the process that holds the store is gone or stopped."""
    answers: list[_T] = []

    def work() -> None:
        try:
            answers.append(ask())
        except RuntimeError:
            pass

    # A store whose process is stopped keeps whoever asks for ever, whatever timeout was given.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else None


def _is_of_meeting(error: BaseException) -> bool:
    """Whether an error comes from torch's communication, or is that of `Transport.union`."""
    if isinstance(error, TimeoutError | dist.DistError):
        return True
    if isinstance(error, torch.OutOfMemoryError):
        return False  # raised there, too: NCCL sends objects through the memory of GPUs
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    innermost = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    # Gloo raises plain RuntimeErrors.
    return innermost.startswith("torch.distributed") or "/gloo/" in str(error)


def destroy_at_exit() -> None:
    """Have the process group destroyed when Python ends, while all that its threads need is still there.

    Lightning does so for NCCL alone. A gloo group that is still alive when the interpreter goes down can abort the
    process ("terminate called without an active exception", pytorch/pytorch#190489), and with it a run that is done.
    """
    atexit.unregister(_destroy)
    atexit.register(_destroy)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Deal tensors into lists of one dtype and device, of at most `BUCKET_BYTES` unless one tensor alone is larger."""
    return [[tensors[i] for i in indices] for indices in _indices(tensors)]


def _indices(tensors: Sequence[Tensor]) -> list[list[int]]:
    dealt: list[list[int]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        key = (tensor.dtype, tensor.device)
        bucket, size = filling.get(key, ([], 0))
        if not bucket or size + tensor.nbytes > BUCKET_BYTES:
            bucket, size = [], 0
            dealt.append(bucket)
        bucket.append(i)
        filling[key] = (bucket, size + tensor.nbytes)
    return dealt


def _rows(tensor: Tensor) -> Tensor:
    """(rows, columns). A kernel's last dimension is often 1 or 3: a scale for so short a row would outweigh it."""
    return tensor.reshape(len(tensor), -1) if tensor.dim() > 1 and tensor.numel() else tensor.reshape(-1, 1)


def _padded(code: Tensor, length: int) -> Tensor:
    return torch.cat([code, code.new_zeros(length - len(code))])
