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
from torch.distributed.distributed_c10d import _set_pg_timeout
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
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    minutes = start_timeout_minutes or timeout_minutes
    place = f"{LOOPBACK}://" if _is_on_one_machine() else None
    try:
        deepspeed.init_distributed(timeout=timedelta(minutes=minutes), verbose=False, init_method=place)
    except torch_dist.DistError as error:
        raise LostPeerError(
            f"launch.start_timeout_minutes: the ranks did not all come within {minutes:g} minutes "
            f"({on_one_line(error)})"
        ) from error
    _set_pg_timeout(timedelta(minutes=timeout_minutes), torch_dist.group.WORLD)
    return Shard(torch_dist.get_rank(), torch_dist.get_world_size())


def _is_on_one_machine() -> bool:
    """Whether the ranks meet at this machine's own address, and not at a store of torchrun's."""
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost") and not has_store


def _meet_on_loopback(_url: str, timeout: timedelta, **_options: Any) -> Iterator[tuple[Any, int, int]]:
    """Where the ranks of one machine meet: yields the store, this rank and the number of ranks, for torch.

    torch's own store would listen on all interfaces, and asks nobody who they are.
    """
    rank, ranks, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening = None
    if rank == 0:
        # A port that is in use is this process's own from before, whose store torch shares; or torch says so.
        with suppress(OSError), socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            sock.listen()
            listening = sock.detach()  # the store closes it
    store = torch_dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", port, ranks, rank == 0, timeout, multi_tenant=True, master_listen_fd=listening
    )
    yield store, rank, ranks


LOOPBACK = "madpo-loopback"
"""The name of that meeting place."""

register_rendezvous_handler(LOOPBACK, _meet_on_loopback)


def check_launcher() -> None:
    """Raise UserError if there are several processes and the environment does not say how they connect."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if "RANK" not in os.environ and int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{name} is {os.environ[name]} and RANK is not set: every process would train alone into "
                "the same folder; start torchrun on each node, as slurm/train.sbatch does"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("WORLD_SIZE is set and MASTER_ADDR is not; start ranks with torchrun or deepspeed")


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
