"""The process group: DeepSpeed's, gloo without a GPU and NCCL with one."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import register_rendezvous_handler

from madpo.trainer.errors import LostPeerError, UserError, on_one_line


@dataclass(frozen=True)
class Shard:
    """This process among all ranks; every step is shared out over them."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(timeout_minutes: float, start_timeout_minutes: float | None = None) -> Shard:
    """Join the process group that the launcher's environment variables describe; without them, run alone.

    Ranks wait `start_timeout_minutes` for each other, and then `timeout_minutes` in every collective. Does
    nothing in a process that has joined already. Raises LostPeerError if some rank does not come.
    """
    import deepspeed

    if not torch.cuda.is_available():
        # The one op that would be compiled here serves inference only. Without this, every start
        # probes the compiler for all ops and builds that one under a lock that can go stale.
        deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        # A launcher may show each rank its own GPU alone.
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local if torch.cuda.device_count() > 1 else 0)
    minutes = start_timeout_minutes or timeout_minutes
    if not torch_dist.is_initialized():
        meet(minutes)
    try:
        timeout = timedelta(minutes=minutes)
        deepspeed.init_distributed(timeout=timeout, verbose=False, init_method=f"{MEETING_PLACE}://")
    except torch_dist.DistError as error:
        raise LostPeerError(
            f"launch.start_timeout_minutes: the ranks did not all come within {minutes:g} minutes "
            f"({on_one_line(error)})"
        ) from error
    _set_timeout(timedelta(minutes=timeout_minutes))
    return Shard(torch_dist.get_rank(), torch_dist.get_world_size())


def _set_timeout(timeout: timedelta) -> None:
    """Let collectives from now on fail after so long."""
    set_timeout = getattr(torch_dist, "set_timeout", None)  # new in torch 2.14, which warns of the other
    if set_timeout is not None:
        set_timeout(timeout)
    else:
        distributed_c10d._set_pg_timeout(timeout, torch_dist.group.WORLD)


_store: Store | None = None


def meet(minutes: float) -> Store:
    """The store through which the ranks of a start find each other, made at the first call.

    It listens on rank 0, or in torchrun. The store of one machine listens there alone; it asks nobody who
    they are. Raises UserError if the port is taken, and LostPeerError if nobody answers for `minutes`.
    """
    global _store
    if _store is not None:
        return _store
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    host, port = os.environ["MASTER_ADDR"], int(os.environ.setdefault("MASTER_PORT", "29500"))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_here = host in ("127.0.0.1", "localhost")
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = rank == 0 and not has_agent
    try:
        store = TCPStore(
            "127.0.0.1" if is_here else host,
            port,
            ranks,
            listens,
            timedelta(minutes=minutes),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_listening(port) if listens and is_here else None,
        )
    except torch_dist.DistError as error:
        if listens:
            raise UserError(
                f"MASTER_PORT: {socket.gethostname()} cannot listen on port {port}, perhaps as another run "
                f"does; give the launcher another port ({on_one_line(error)})"
            ) from error
        raise LostPeerError(
            f"rank {rank} on {socket.gethostname()} found nobody at {host}, port {port}, within {minutes:g} "
            "minutes (launch.start_timeout_minutes); has rank 0 started there, and can this host reach it?"
        ) from error
    # torchrun keeps its store for the next start of the ranks.
    _store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return _store


def _listening(port: int) -> int | None:
    """A socket that listens on this machine's own address, which the store will close.

    None for a port that is in use: it is this process's own from before, whose store torch shares; or torch
    says so.
    """
    with suppress(OSError), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        return sock.detach()
    return None


def _ranks_that_meet(_url: str, timeout: timedelta, **_options: Any) -> Iterator[tuple[Any, int, int]]:
    """Yields the store, this rank and the number of ranks, for torch."""
    yield meet(timeout.total_seconds() / 60), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


MEETING_PLACE = "madpo"
"""What torch calls `meet` by."""

register_rendezvous_handler(MEETING_PLACE, _ranks_that_meet)


def device() -> torch.device:
    """This rank's GPU, or the CPU if there is none."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def from_main(value: Any) -> Any:
    """Broadcast rank 0's value to all ranks."""
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any, group: Any = None) -> list[Any]:
    """The values of all ranks, in their order, on all ranks; over a group of their own, if they have one."""
    values = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(values, value, group=group)
    return values


def raise_if_any(problem: str | UserError | None) -> None:
    """Raise UserError on all ranks if any rank has a problem, so that none waits for the others.

    A problem that is an error is raised as one of its kind.
    """
    for rank, found in enumerate(gathered(problem)):
        if found:
            kind = type(found) if isinstance(found, UserError) else UserError
            raise kind(str(found) if rank == 0 else f"rank {rank}: {found}")


LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|time(d )?out|broken pipe|socket|peer|nccl(Remote|System)Error",
    re.IGNORECASE,
)
"""What gloo and NCCL say when another rank is gone or does not answer."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    if isinstance(error, torch_dist.DistError):
        return True
    is_of_gloo = isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "NCCL" in str(error))
    return is_of_gloo and LOST_PEER.search(str(error)) is not None


def barrier() -> None:
    torch_dist.barrier()


def leave() -> None:
    """Leave the process group, if there is one; `init` may then join another."""
    global _store
    _store = None
    if torch_dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's would leave DeepSpeed with groups that are gone


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with held_port() as port:
        return port


@contextmanager
def held_port() -> Iterator[int]:
    """A port that no other process is given while inside.

    torch's store may listen on it all the same: on Linux a port may be bound twice by sockets that allow it,
    as long as only one of them listens.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
