"""Real processes that talk to each other over gloo, on one machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported torch forks the workers: importing it anew in each would take longer than the tests.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "lightning_lte"])


def run(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60, group: bool = True) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes and return what it returned, in the order of ranks.

    Args:
        fn: a function at the top level of a module; with `group`, `torch.distributed` tells it its rank.
        world_size: number of processes.
        args: picklable, the same for every process.
        timeout_s: seconds until all processes are killed.
        group: whether to set up the process group. Without it the environment is that of torchrun, from which
            Lightning and `init_process_group("gloo")` do so by themselves.

    Raises:
        RuntimeError: a process raised; with its traceback.
        TimeoutError: a process was not done in time.
    """
    # The store lives here on a port of the system's choice, so that no two tests can want the same.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        arguments = (sender, fn, rank, world_size, store.port, group, timeout_s, args)
        process = _context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
            ready = wait(list(waiting), deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"{fn.__name__}: ranks {sorted(waiting.values())} not done after {timeout_s} s")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    done, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise RuntimeError(f"{fn.__name__}: rank {rank} died without a word") from None
                if not done:
                    raise RuntimeError(f"{fn.__name__}: rank {rank} raised\n{result}")
                results[rank] = result
    finally:
        for process in processes:
            process.join(5 if len(results) == world_size else 0)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _work(
    pipe: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    group: bool,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the parent's; rank 0 must not open another
    )
    os.environ.pop("PL_GLOBAL_SEED", None)  # of the test that started the server
    torch.set_num_threads(1)
    try:
        if group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        result = True, fn(*args)
    except BaseException:
        result = False, traceback.format_exc()
    # Plain pickle: torch's own would share memory with a process that is about to end.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
