"""Whether the Hugging Face hub can be reached: asked once, before libraries ask it again and again."""

from __future__ import annotations

import functools
import os
import socket
import sys
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from madpo.trainer.errors import UserError

PATIENCE = 5.0
"""Seconds in which the hub, or the proxy before it, accepts a connection."""

Kind = Literal["model", "dataset"]


def check_on_hub(key: str, name: str, kind: Kind) -> None:
    """Raise UserError if the hub's `name` is not on this machine and the hub is out of reach.

    If it is here, libraries are told to ask for nothing: offline they try for a minute each time.
    """
    if is_cached(name, kind):
        if not is_reachable():
            _go_offline()
        return
    if is_reachable():
        return
    chosen = "HF_HUB_OFFLINE is set" if _is_offline() else f"{_endpoint()} cannot be reached"
    raise UserError(
        f"{key}: {name} is neither here nor in the hub's cache, and {chosen}; fetch it where it can be had "
        f"({download(name, kind)}), or name a folder"
    )


def download(name: str, kind: Kind) -> str:
    """The command that fetches the hub's `name`."""
    return f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{name}"


def is_cached(name: str, kind: Kind) -> bool:
    """Whether an earlier download of the hub's `name` is on this machine."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir()


def is_reachable() -> bool:
    """Whether the hub, or the proxy before it, accepts connections; False where HF_HUB_OFFLINE is set."""
    return not _is_offline() and _accepts_connections(_endpoint())


@functools.cache
def _accepts_connections(endpoint: str) -> bool:
    hub = urlsplit(endpoint)
    proxy = None if proxy_bypass(hub.hostname or "") else getproxies().get(hub.scheme)
    place = urlsplit(proxy) if proxy else hub
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), PATIENCE).close()
    except (OSError, ValueError):
        return False
    return True


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _go_offline() -> None:
    """Keep this process and those that it starts from asking the hub, and say so once."""
    from huggingface_hub import constants

    if _is_offline():
        return
    print(f"{_endpoint()} cannot be reached; what was downloaded before is used", file=sys.stderr, flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if (config := sys.modules.get("datasets.config")) is not None:
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True  # type: ignore[attr-defined]
