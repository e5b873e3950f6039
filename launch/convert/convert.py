"""Another trainer's config becomes ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madpo.launch.convert import hf
from madpo.launch.convert.axolotl import AXOLOTL
from madpo.launch.convert.draft import FILL_IN, Draft, Fate
from madpo.launch.convert.llama_factory import LLAMA_FACTORY
from madpo.launch.convert.openrlhf import OPENRLHF
from madpo.launch.convert.peer import TASKS, Peer
from madpo.launch.convert.read import Source, read
from madpo.launch.convert.trl import TRL
from madpo.trainer.errors import UserError

PEERS = {"trl": TRL, "llamafactory": LLAMA_FACTORY, "axolotl": AXOLOTL, "openrlhf": OPENRLHF}


def convert(path: Path, peer: str | None = None, task: str | None = None, gpus: int | None = None) -> Draft:
    """Translate the file. Raises UserError where it is not clear what the file is, or what it trains."""
    source = read(path)
    if isinstance(source.keys.get("model"), dict) and isinstance(source.keys.get("data"), dict):
        raise UserError(f"{path}: is a config of madpo; look at it with madpo config")
    chosen = _named(peer) if peer else _recognised(source, path)
    given, spelling = _with_known_names(source.keys, chosen)
    found, remark = (task, "") if task else _task(chosen, given, source.program, path)
    if found not in TASKS:
        raise UserError(f"--task {found}: choose from {', '.join(TASKS)}")
    draft = Draft(
        peer=chosen.name,
        task=found,
        given=given,
        defaults=chosen.defaults(found),
        gpus=gpus or source.gpus,
        folder=path.parent,
        spelling=spelling,
        by_hand=list(source.by_hand),
        remarks=[remark] if remark else [],
    )
    chosen.together(draft)
    for name in [*draft.defaults, *(name for name in given if given[name] is not None)]:
        if name in draft.seen or draft.value(name) is None:
            continue
        if name in chosen.rules:
            chosen.rules[name](draft, name)
        elif name in given:
            draft.settle(Fate.UNKNOWN, name)
    hf.zero_2_where_needed(draft)
    _close_gaps(draft, path)
    return draft


def _named(peer: str) -> Peer:
    if peer not in PEERS:
        raise UserError(f"--from {peer}: choose from {', '.join(PEERS)}")
    return PEERS[peer]


def _recognised(source: Source, path: Path) -> Peer:
    """The trainer that knows most of the keys; the first of PEERS if several know as many."""
    if source.program:
        return OPENRLHF if source.program.startswith("openrlhf") else TRL

    def known(peer: Peer) -> int:
        return sum(name in peer.rules or name in peer.aliases for name in source.keys)

    best = max(PEERS.values(), key=known)
    if known(best) == 0:
        raise UserError(f"{path}: has no key of another trainer; name it with --from {' or '.join(PEERS)}")
    return best


def _with_known_names(keys: Mapping[str, Any], peer: Peer) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's keys by the names that the rules know, and how the file spells them."""
    given, spelling = dict[str, Any](), dict[str, str]()
    for name, value in keys.items():
        known = peer.aliases.get(name, name)
        known = name if known in keys else known  # said twice: the rules' own name counts
        given[known] = value
        if known != name:
            spelling[known] = name
    return given, spelling


def _task(peer: Peer, given: Mapping[str, Any], program: str, path: Path) -> tuple[str, str]:
    """What the file trains, and a remark if that is a guess."""
    if found := peer.task_of(given, program):
        return found, ""
    places = [str(path), *(str(given.get(key, "")) for key in ("output_dir", "run_name", "hub_model_id"))]
    words = re.split(r"[^a-z]+", " ".join(places).lower())
    named = [task for task in ("orpo", "kto", "simpo", "cpo", "sft", "reward", "dpo") if task in words]
    if len(named) == 1:
        return named[0], f"task: {named[0]}, by the names in the file and its path; else give --task"
    if "beta" in given or "loss_type" in given:
        return "dpo", "task: dpo, as beta or loss_type is set; else give --task, as for orpo"
    raise UserError(f"--task: the file does not say what it trains; choose from {', '.join(TASKS)}")


def _close_gaps(draft: Draft, path: Path) -> None:
    """Fill in what a config needs and the file does not say."""
    gaps = {"model.model_name_or_path": FILL_IN, "output_dir": f"runs/{path.stem}"}
    if "data.datasets" not in draft.config:
        gaps["data.dataset_name"] = FILL_IN
    for key, value in gaps.items():
        if key not in draft.config:
            draft.take(key, value)
            draft.origins[key] = "the file does not say"
            if value == FILL_IN:
                draft.by_hand.append(f"{key}: the file does not say")
    parts = draft.config.get("data.datasets", [])
    held_out = "data.dataset_test_split" in draft.config or any("test_split" in part for part in parts)
    if "train.eval_steps" in draft.config and not held_out:
        del draft.config["train.eval_steps"]
        draft.by_hand.append("train.eval_steps: name held-out data in data.dataset_test_split, then set it")
        draft.settle(Fate.CHANGED, "eval_steps", why="not without held-out data; see below")
