"""The handshake of the ranks, before data is read and a model is loaded: do they mean one run?

Every rank says through the store what it is; rank 0 judges, and all of them end with its words, or go on.
What would otherwise show after half an hour as a collective that hangs, or after the first failure as half a
checkpoint, shows in seconds as one line that names the hosts at fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as torch_dist
from torch._C._distributed_c10d import PrefixStore, Store

from madpo.trainer.config.schema import Config, LaunchConfig
from madpo.trainer.counted import counted
from madpo.trainer.dist import meet
from madpo.trainer.errors import Exit, LostPeerError, UserError, error_of, on_one_line
from madpo.trainer.files import make_folder, write_atomically
from madpo.trainer.masking import masked

SECONDS_TO_SEE = 30.0
"""How long a folder on shared storage may take to show what another host has written there."""
SECONDS_TO_READ = 60.0
"""How long rank 0 waits for the others to come and read its verdict, if it cannot go on."""
CLOCKS = 5.0
"""Seconds by which clocks may differ before it is said: how old a file is, is told by them."""
SHOWN = 3
"""So many hosts are named in a message."""


Prepare = Callable[[Config], None]
"""What rank 0 does in the run folder before the others go on; it may raise UserError."""


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself."""

    rank: int
    host: str
    process: int
    problem: str = ""  # why it cannot go on
    status: int = 0  # of that problem
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)  # section -> hash
    unseen: list[str] = field(default_factory=list)  # keys of folders that are not those of rank 0
    gpus: int = 0  # that it sees
    visible: str = ""  # CUDA_VISIBLE_DEVICES
    time: float = 0.0  # by its clock, when it said this


class Verdict(NamedTuple):
    """What rank 0 says of all ranks."""

    status: int = 0
    text: str = ""  # of an error; "": all is well
    notes: tuple[str, ...] = ()  # for the user, if it is


def shake_hands(
    config: Config | UserError, name: str, chosen_ranks: bool, say: Callable[[str], None], prepare: Prepare
) -> Start:
    """Find out whether all ranks mean one run; on all ranks.

    `name` is a name for this start, of which that of rank 0 counts. `config` is an error on a rank that could
    not read it. `chosen_ranks`: the user has said how many ranks there are to be on this machine. Raises
    UserError for what the ranks differ in or `prepare` raises, after rank 0 has told it by `say`, and
    LostPeerError if some do not come within `launch.start_timeout_minutes`.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        verdict = _prepared(_verdict([_facts(0, config, None)], config, chosen_ranks), config, prepare)
        if verdict.text:
            raise error_of(verdict.status, verdict.text)
        return Start(name, ())
    settings = LaunchConfig() if isinstance(config, UserError) else config.launch
    minutes = settings.start_timeout_minutes
    table = _Table(meet(minutes), rank, ranks, minutes)
    if rank == 0:
        verdict = _as_main(table, config, name, chosen_ranks, say, prepare)
    else:
        if (told := table.read("name")) is not None:
            name = told
            table.take_place(_facts(rank, config, name))
        verdict = Verdict(*table.read("verdict"))
        table.say_read()
    if verdict.text:
        raise error_of(verdict.status, verdict.text, is_agreed=True)
    return Start(name, tuple(verdict.notes))


def _as_main(
    table: _Table,
    config: Config | UserError,
    name: str,
    chosen_ranks: bool,
    say: Callable[[str], None],
    prepare: Prepare,
) -> Verdict:
    """What rank 0 does: hear the others, judge, and tell the user and them."""
    missing: Sequence[int] = ()
    with _tokens(config, name) as problem:
        config = problem or config
        began = time.time()
        table.post("name", name if isinstance(config, Config) else None)  # None: nobody needs to answer
        if isinstance(config, UserError):  # which the others need not find out for themselves
            verdict = _verdict([], config, chosen_ranks)
        else:
            own, (others, missing) = _facts(0, config, None), table.places()
            verdict = _of_all([own, *others], missing, config, chosen_ranks, began)
    verdict = _prepared(verdict, config, prepare)
    if verdict.text:
        say(verdict.text)  # before the others end, on which a launcher would end this rank
    table.post("verdict", verdict)
    if verdict.text:
        table.wait_for_readers(len(missing))
    return verdict


def _prepared(verdict: Verdict, config: Config | UserError, prepare: Prepare) -> Verdict:
    """The verdict, after rank 0 has prepared the run folder if all is well; another one if that fails."""
    try:
        if not verdict.text and isinstance(config, Config):
            prepare(config)
    except UserError as error:
        return Verdict(error.status, str(error))
    return verdict


class Start(NamedTuple):
    """What all ranks know after the handshake."""

    name: str
    notes: tuple[str, ...]


class _Table:
    """What the ranks lay into the store for each other."""

    def __init__(self, store: Store, rank: int, ranks: int, minutes: float) -> None:
        self._store = PrefixStore("handshake", store)
        self._rank, self.ranks, self.minutes = rank, ranks, minutes

    def post(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """What rank 0 posts. It may wait for other ranks for as long as this one does for it."""
        with self._answered():
            self._store.wait([key], timedelta(minutes=2 * self.minutes))
            return json.loads(self._store.get(key))

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Context manager: raises LostPeerError for a store that does not answer."""
        try:
            yield
        except torch_dist.DistError as error:
            raise LostPeerError(
                f"rank {self._rank} on {socket.gethostname()}: rank 0 has not answered ({on_one_line(error)})"
            ) from error

    def take_place(self, facts: Facts) -> None:
        """Say what this rank is, if no other process has said it. Raises UserError if one has."""
        said = json.dumps(asdict(facts))
        with self._answered():
            there = self._store.compare_set(self._place(self._rank), "", said)
        if there != said.encode():
            other = json.loads(there)
            raise UserError(
                f"MASTER_PORT: rank {self._rank} of the start at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} is process {other['process']} on {other['host']} already, and "
                f"now process {facts.process} on {facts.host}: two runs meet at one port; give this one "
                "another port"
            )

    def places(self) -> tuple[list[Facts], list[int]]:
        """What the other ranks have said, and which ones have said nothing in time."""
        keys = {rank: self._place(rank) for rank in range(1, self.ranks)}
        with suppress(torch_dist.DistError):
            self._store.wait(list(keys.values()), timedelta(minutes=self.minutes))
        missing = [rank for rank, key in keys.items() if not self._store.check([key])]
        come = [self._store.get(key) for rank, key in keys.items() if rank not in missing]
        return [Facts(**json.loads(said)) for said in come], missing

    def say_read(self) -> None:
        with self._answered():
            self._store.add("readers", 1)

    def wait_for_readers(self, missing: int) -> None:
        """Wait for all but `missing` ranks to read the verdict, as the store may end with this process."""
        until = time.monotonic() + min(SECONDS_TO_READ, 60 * self.minutes)
        while self._store.add("readers", 0) < self.ranks - 1 - missing and time.monotonic() < until:
            time.sleep(0.05)

    @staticmethod
    def _place(rank: int) -> str:
        return f"rank {rank}"


FOLDERS: dict[str, Callable[[Config], str]] = {
    "output_dir": lambda config: config.output_dir,
    "data.cache_dir": lambda config: config.data.cache_dir,
}
"""Keys of the folders that all ranks must share."""


def _token(config: Config, key: str, name: str) -> Path:
    return Path(FOLDERS[key](config)).expanduser() / f".start-{name}"


@contextmanager
def _tokens(config: Config | UserError, name: str) -> Iterator[UserError | None]:
    """Context manager: while inside, the shared folders hold this start's name. Yields why they cannot."""
    tokens: list[Path] = []
    problem = None
    if isinstance(config, Config):
        try:
            for key in FOLDERS:
                token = _token(config, key, name)
                make_folder(key, token.parent)
                tokens.append(token)
                write_atomically(token, "")
        except UserError as error:
            problem = error
        except OSError as error:
            problem = UserError(f"{error.filename or config.output_dir} cannot be written ({error.strerror})")
    try:
        yield problem
    finally:
        for token in tokens:
            with suppress(OSError):
                token.unlink(missing_ok=True)


def _facts(rank: int, config: Config | UserError, name: str | None) -> Facts:
    """What this rank is; `name` is that of the start, whose tokens it looks for."""
    own = rank, socket.gethostname(), os.getpid()
    if isinstance(config, UserError):
        return Facts(*own, str(config), config.status, time=time.time())
    import torch

    names = "madpo", "torch", "deepspeed", "transformers"
    return Facts(
        *own,
        versions={"Python": platform.python_version()} | {name: version(name) for name in names},
        config={
            section: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
            for section, values in masked(config.model_dump(mode="json", by_alias=True)).items()
        },
        unseen=[key for key in FOLDERS if name is not None and not _is_seen(_token(config, key, name))],
        gpus=torch.cuda.device_count(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        time=time.time(),
    )


def _is_seen(token: Path) -> bool:
    until = time.monotonic() + SECONDS_TO_SEE
    while not token.exists():
        if time.monotonic() > until or not token.parent.is_dir():
            return False
        with suppress(OSError):  # reading the folder makes a client of NFS ask the server anew
            os.listdir(token.parent)
        time.sleep(0.2)
    return True


def _of_all(
    facts: Sequence[Facts], missing: Sequence[int], config: Config, chosen_ranks: bool, began: float
) -> Verdict:
    """Rank 0's verdict on the ranks that have come since it `began`, by its clock; `missing` have not."""
    if missing:
        text = (
            f"launch.start_timeout_minutes: {_ranks(missing)} of {len(facts) + len(missing):,} did not "
            f"come within {config.launch.start_timeout_minutes:g} minutes; those that came are on "
            f"{_named(_hosts(facts))}"
        )
        return Verdict(Exit.LOST_PEER, text)
    verdict = _verdict(facts, config, chosen_ranks)
    return verdict._replace(notes=tuple(clock_notes(facts, began, time.time())))


def clock_notes(facts: Sequence[Facts], began: float, ended: float) -> Iterator[str]:
    """Which hosts' clocks are wrong by what rank 0's has shown at the beginning and at the end."""
    for host in _hosts(facts):
        times = [fact.time for fact in facts if fact.host == host]
        ahead, behind = min(times) - ended, began - max(times)
        if max(ahead, behind) > CLOCKS:
            where = "ahead of" if ahead > behind else "behind"
            yield (
                f"the clock of {host} is {max(ahead, behind):.0f} s or more {where} that of {facts[0].host}: "
                "madpo status may take its ranks for silent"
            )


def _verdict(facts: Sequence[Facts], config: Config | UserError, chosen_ranks: bool) -> Verdict:
    if isinstance(config, UserError):
        return Verdict(config.status, str(config))
    return Verdict(*fault(facts, config, chosen_ranks))


def fault(facts: Sequence[Facts], config: Config, chosen_ranks: bool) -> tuple[int, str]:
    """What the ranks differ in, or are too many for, as exit status and text; (0, "") if in nothing."""
    main = facts[0]
    for fact in facts:
        if fact.problem:
            alike = [other for other in facts if other.problem == fact.problem]
            return fact.status, f"{_who(alike)}: {fact.problem}" if len(alike) < len(facts) else fact.problem
    for name in main.versions:
        if others := [fact for fact in facts if fact.versions[name] != main.versions[name]]:
            return Exit.USAGE, (
                f"{_who(others)}: {name} {others[0].versions[name]}, and on {main.host} (rank 0) "
                f"{main.versions[name]}; use one environment on all hosts"
            )
    if others := [fact for fact in facts if fact.config != main.config]:
        there = others[0].config
        sections = [name for name in main.config | there if main.config.get(name) != there.get(name)]
        return Exit.USAGE, (
            f"{_who(others)}: another config than on {main.host} (rank 0), in {', '.join(sections)}; give "
            "all hosts one file. Or two runs meet at one port: give one of them another port"
        )
    for key in FOLDERS:
        if others := [fact for fact in facts if key in fact.unseen]:
            return Exit.USAGE, (
                f"{key}: {_who(others)}: {FOLDERS[key](config)} is not the folder of that name on "
                f"{main.host} (rank 0); use a folder on storage that all hosts share"
            )
    by_host = {host: [fact for fact in facts if fact.host == host] for host in _hosts(facts)}
    rich = max(facts, key=lambda fact: fact.gpus)
    for host, here in by_host.items():
        if rich.gpus and not any(fact.gpus for fact in here):
            return Exit.USAGE, f"{host}: no GPU, and {rich.host} has {rich.gpus}; leave it out"
        if text := _gpu_fault(host, here, chosen_ranks):
            return Exit.USAGE, text
    if text := config.train.idle(len(facts)):
        return Exit.USAGE, text
    return 0, ""


def _gpu_fault(host: str, ranks: Sequence[Facts], chosen_ranks: bool) -> str | None:
    """What is wrong with the ranks of one host and its GPUs; None if nothing is."""
    gpus = {fact.gpus for fact in ranks}
    if gpus == {0}:
        return None
    own = len({fact.visible for fact in ranks})
    there = max(gpus) if own == 1 else sum(fact.gpus for fact in ranks)  # the launcher gives each its own
    if 0 in gpus or len(ranks) > there:
        return f"{host}: {counted(len(ranks), 'rank')} for {counted(there, 'GPU')}; start as many as GPUs"
    if len(ranks) < there and not chosen_ranks:
        return (
            f"{host}: {counted(len(ranks), 'rank')} for {counted(there, 'GPU')}: {there - len(ranks)} would "
            "be idle; start a rank for each GPU, or hide the others (CUDA_VISIBLE_DEVICES)"
        )
    return None


def _hosts(facts: Sequence[Facts]) -> list[str]:
    """The hosts of ranks, in the order of ranks."""
    return list(dict.fromkeys(fact.host for fact in facts))


def _named(hosts: Sequence[str]) -> str:
    """Hosts, as text for the user."""
    more = f" and {len(hosts) - SHOWN:,} more" if len(hosts) > SHOWN else ""
    return ", ".join(hosts[:SHOWN]) + more


def _who(facts: Sequence[Facts]) -> str:
    """Ranks and their hosts, as text for the user."""
    return f"{_named(_hosts(facts))} ({_ranks([fact.rank for fact in facts])})"


def _ranks(ranks: Sequence[int]) -> str:
    """Numbers of ranks, as text for the user: "rank 3", "ranks 0-7, 12"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][-1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    shown = ", ".join(parts[: 2 * SHOWN]) + (", ..." if len(parts) > 2 * SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
