"""A manifest that is read back as it was written, or refused with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commits import Commits

from madpo.trainer.checkpoints.folders import MANIFEST, name_of
from madpo.trainer.checkpoints.manifest import DamagedError, Manifest, fault_in, read
from madpo.trainer.files import Entry, hash_of_file
from madpo.trainer.state import TrainState

STATE = TrainState(step=7, consumed=56, num_tokens=700, memory={"mean": [0.1, 1e-300]})


def written(tmp_path: Path, **changes: Any) -> tuple[Path, Manifest]:
    folder = tmp_path / name_of(7)
    folder.mkdir()
    (folder / "shard.pt").write_bytes(b"weights" * 1000)
    files = {"shard.pt": Entry(7000, hash_of_file(folder / "shard.pt"))}
    values = {"files": files, **changes}
    manifest = Manifest(STATE, {"optim.lr": 1e-3, "seed": 42}, 2, 3, 1, {"torch": "2.13.0"}, **values)
    manifest.write(folder)
    return folder, manifest


def test_what_was_written_is_read(tmp_path, monkeypatch):
    commits = Commits().watch(monkeypatch)
    folder, manifest = written(tmp_path)
    assert commits.calls == [("replace", MANIFEST)] and not commits.unsynced
    assert read(folder) == manifest
    assert fault_in(folder, manifest.files, manifest.files) is None


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "has no manifest.json"),
    "empty": (lambda path: path.write_bytes(b""), "is no JSON"),
    "truncated": (lambda path: os.truncate(path, 100), "is no JSON"),
    "zeros": (lambda path: path.write_bytes(bytes(500)), "is no JSON"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is no JSON"),
    "deep": (lambda path: path.write_text("[" * 100_000), "is no JSON"),
    "a list": (lambda path: path.write_text("[]"), "is of no format known here"),
    "a later format": (edited(lambda whole: whole.update(format=99)), "is of no format known here"),
    "state edited": (edited(lambda whole: whole["content"]["state"].update(consumed=0)), "has changed since"),
    "a key more": (edited(lambda whole: whole["content"].update(more=1)), "has changed since"),
    "no content": (edited(lambda whole: whole.pop("content")), "has changed since"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "manifest.json is no file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "manifest.json is no file"),
    "a link to a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "json is a link"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_the_reason(tmp_path, name):
    folder, _ = written(tmp_path)
    damage, reason = DAMAGE[name]
    damage(folder / MANIFEST)
    with pytest.raises(DamagedError, match=reason):
        read(folder)


def test_one_that_was_put_under_another_step_is_refused(tmp_path):
    folder, _ = written(tmp_path)
    with pytest.raises(DamagedError, match="it is of step 7"):
        read(folder.rename(tmp_path / name_of(8)))


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "a/../../b"])
def test_files_outside_are_refused_although_the_checksum_is_right(tmp_path, name):
    folder, _ = written(tmp_path, files={name: Entry(1, "0")})
    with pytest.raises(DamagedError, match="which is outside"):
        read(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "shard.pt is missing"),
    "empty": (lambda path: path.write_bytes(b""), "shard.pt has 0 bytes, 7,000 were written"),
    "truncated": (lambda path: os.truncate(path, 6999), "shard.pt has 6,999 bytes, 7,000 were written"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "shard.pt has 7,001 bytes"),
    "zeros": (lambda path: path.write_bytes(bytes(7000)), "shard.pt has changed since it was written"),
    "one bit": (flip, "shard.pt has changed since it was written"),
    "a link": (lambda path: path.symlink_to(path.rename(path.with_name("x"))), "shard.pt is a link"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "shard.pt is no file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "shard.pt is no file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_changed_file_is_named(tmp_path, name):
    folder, manifest = written(tmp_path)
    damage, reason = FAULTS[name]
    damage(folder / "shard.pt")
    assert reason in str(fault_in(folder, manifest.files, manifest.files))
