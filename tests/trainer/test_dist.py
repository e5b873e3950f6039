"""The port that ranks meet at, and what a lost rank looks like."""

from __future__ import annotations

import os
import socket

import psutil
import pytest
import torch.distributed as torch_dist
from harness import run_ranks
from torch._C._distributed_c10d import TCPStore

from madpo.trainer.dist import held_port, is_lost_peer


def test_a_held_port_is_for_the_store_and_for_nobody_else():
    with held_port() as port:
        store = TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("key", "value")
        assert store.get("key") == b"value"
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        del store
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))


LOST = {
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:18325": True,
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv operation": True,
    "NCCL error: remote process exited or there was a network error, ncclRemoteError": True,
    "CUDA out of memory. Tried to allocate 2 GiB": False,
    "[gloo] output tensors must have the size of the input": False,
    "Expected all tensors to be on the same device": False,
}


@pytest.mark.parametrize("text", LOST)
def test_what_collectives_say_of_a_lost_rank_is_told_from_other_errors(text):
    assert is_lost_peer(RuntimeError(text)) is LOST[text]
    assert is_lost_peer(torch_dist.DistNetworkError(text))
    assert not is_lost_peer(ValueError(text))


def listening(shard) -> list[str]:
    """The addresses that this rank listens on at the port where the ranks meet."""
    found = [x for x in psutil.Process().net_connections("tcp") if x.status == psutil.CONN_LISTEN]
    return [x.laddr.ip for x in found if x.laddr.port == int(os.environ["MASTER_PORT"])]


@pytest.mark.ranks
def test_ranks_of_one_machine_meet_where_no_other_machine_can_come():
    assert run_ranks(2, listening) == [["127.0.0.1"], []]
