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

# Tensors are packed into flat buckets, so that many small ones cost one call; the cap bounds the extra memory.
BUCKET_BYTES = 64 * 2**20

# Seconds beyond its own timeout that an answer of the store is waited for: where its host is stopped, none ever comes.
_STORE_GRACE_S = 2.0

_T = TypeVar("_T")

# Questions put to `Transport.agree`, numbered alike on all devices: an answer to an earlier one must not count.
_questions = itertools.count()


class Transport:
    """Sends merges between the devices of a process group.

    Args:
        world_size: number of devices; 1 needs no process group.
        rank: number of this device.

    Attributes:
        bytes_sent: bytes this device has sent since the start, by the count of a ring: an all-reduce of b bytes sends
            2 b (w - 1) / w, an all-gather of b bytes per device sends b (w - 1).
        timeout_s: seconds that devices wait for each other where they meet: that of the process group.
        lost: whether a meeting has failed. The devices that failed can't meet again.
    """

    timeout_s = 1800.0
    lost = False

    def __init__(self, world_size: int = 1, rank: int = 0) -> None:
        self.world_size, self.rank = world_size, rank
        self.bytes_sent = 0

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all devices, bit-equal on all of them."""
        if self.world_size == 1:
            return
        for bucket in buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            self.bytes_sent += 2 * flat.nbytes * (self.world_size - 1) // self.world_size
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def stack(self, tensor: Tensor) -> Tensor:
        """Concatenate along dimension 0 the tensors of all devices, in the order of ranks; all have one shape."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        self.bytes_sent += tensor.nbytes * (self.world_size - 1)
        return torch.cat(parts)

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Give every device the values of rank 0."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            contiguous = tensor.contiguous()
            dist.broadcast(contiguous, src=0)
            tensor.copy_(contiguous)

    def gather(self, value: Any) -> list[Any] | None:
        """Collect a picklable value of each device on rank 0; the others receive None."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Say in errors what the devices could not meet for, and who was missing.

        Args:
            what: "merge 3, after step 30", the same on all devices.

        Raises:
            RuntimeError: a device did not come before the time was out, or is gone; from torch's own error. NCCL ends
                the process by itself when the time is out, so there the same is written before.
        """
        if self.world_size == 1:
            yield
            return
        key = f"lte/at/{self.rank}"
        # The store does not answer this, so it costs microseconds.
        dist.distributed_c10d._get_default_store().set(key, what)
        start = time.monotonic()
        timer = None
        if dist.get_backend() == "nccl":
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
            keys = [f"lte/at/{rank}" for rank in range(self.world_size)]
            return [store.get(key).decode() if store.check([key]) else None for key in keys]

        heard = _within(_STORE_GRACE_S, ask)
        if heard is None:
            where = "Rank 0's process, which all ask for each other, does not answer: it hangs or is gone."
        else:
            late = [f"rank {rank} ({at or 'nowhere yet'})" for rank, at in enumerate(heard) if at != what]
            where = f"Last heard of elsewhere: {'; '.join(late)}." if late else "All had come to it."
        return (
            f"At {what}, all devices have to meet within {self.timeout_s:g} s; rank {self.rank} gave up after"
            f" {time.monotonic() - start:.1f} s, as another hangs, is late or is gone. {where} Look into its output,"
            " and go on from the last checkpoint. If devices may be that late, give a longer"
            " LTEStrategy(timeout=timedelta(seconds=...))."
        )

    def agree(self, value: str, timeout_s: float) -> bool:
        """Whether all devices arrive here with the same value before the time is out."""
        answers = self._exchange(value, timeout_s)
        return answers is not None and all(answer == value for answer in answers)

    def union(self, values: Mapping[str, str], timeout_s: float) -> dict[str, str]:
        """What any device has; all devices receive the same, in the same order.

        Raises:
            TimeoutError: a device does not arrive in time.
        """
        answers = self._exchange(json.dumps(dict(values)), timeout_s)
        if answers is None:
            raise TimeoutError(f"Rank {self.rank} waited {timeout_s:g} s for the other devices in vain.")
        together: dict[str, str] = {}
        for answer in answers:
            together = {**json.loads(answer), **together}
        return dict(sorted(together.items()))

    def _exchange(self, value: str, timeout_s: float) -> list[str] | None:
        """The values of all devices, in the order of ranks; None if one does not arrive before the time is out.

        It goes through the store and not through a collective: it may be asked when some devices are gone.
        """
        if self.world_size == 1:
            return [value]
        store = dist.distributed_c10d._get_default_store()
        question = next(_questions)
        keys = [f"lte/agree/{question}/{rank}" for rank in range(self.world_size)]

        def ask() -> list[str]:
            store.set(keys[self.rank], value)
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
    dealt: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        key = (tensor.dtype, tensor.device)
        bucket = filling.get(key)
        if bucket is None or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            bucket = filling[key] = []
            dealt.append(bucket)
        bucket.append(tensor)
    return dealt
