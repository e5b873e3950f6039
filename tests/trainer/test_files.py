"""What is written appears whole or not at all, and is on the disk before it has its name."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from madpo.trainer import files
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.locate import model_folder
from madpo.trainer.config.run_config import read_tree
from madpo.trainer.config.schema import from_tree
from madpo.trainer.contents import Contents
from madpo.trainer.errors import UserError
from madpo.trainer.files import (
    SAMPLE_BYTES,
    SAMPLES,
    check_path,
    discard_damaged,
    fault_in,
    fault_of_path,
    hash_of_file,
    is_untouched,
    read_object,
    sampled_content,
    seal,
    write_atomically,
    write_folder_atomically,
    write_named,
)
from madpo.trainer.reports.runs import load_runs


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Names as they are flushed and renamed, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        seen.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        seen.append(f"rename {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return seen


@pytest.mark.parametrize(
    "content", ["größer\n", "größer\n".encode(), "function"], ids=["text", "bytes", "function"]
)
def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, events, content):
    path = tmp_path / "state.json"
    path.write_text("old")
    write = (lambda partial: partial.write_text("größer\n", "utf-8")) if content == "function" else content
    write_atomically(path, write)
    partial = f"state.json.partial-{os.getpid()}"
    assert events == [f"flush {partial}", f"rename {partial} state.json", f"flush {tmp_path.name}"]
    assert path.read_bytes() == "größer\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["writing", "flushing", "renaming"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "latest"
    path.write_text("step-1")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def half(partial: Path) -> None:
        partial.write_text("st")
        if where == "writing":
            raise KeyboardInterrupt

    if where != "writing":
        monkeypatch.setattr(os, {"flushing": "fsync", "renaming": "replace"}[where], fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "step-1" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_an_older_one_when_all_of_it_is_on_the_disk(tmp_path, events):
    path = tmp_path / "model"
    for folder in (path, tmp_path / "model.partial"):  # the second was left by a killed process
        folder.mkdir()
        (folder / "stale").write_text("")

    def write(partial: Path) -> None:
        assert (path / "stale").exists() and not partial.exists()
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "weights").write_text("1")

    write_folder_atomically(path, write)
    swap = events.index("rename model model.old")
    assert {"flush weights", "flush inner", "flush model.partial"} == set(events[:swap])
    assert events[swap + 1 :] == ["rename model.partial model", f"flush {tmp_path.name}"]
    assert [file.name for file in path.rglob("*")] == ["inner", "weights"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    path.mkdir()

    def write(partial: Path) -> None:
        partial.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder_atomically(path, write)
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_change_places_are_both_left(tmp_path, monkeypatch):
    """As where a file of the old one is open on a network disk: hours of work are in the new one."""
    path, replace = tmp_path / "model", os.replace
    path.mkdir()
    (path / "old").write_text("")

    def write(partial: Path) -> None:
        partial.mkdir()
        (partial / "new").write_text("")
        (partial / "link").symlink_to(tmp_path / "nowhere")

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "model.partial":
            raise OSError("directory not empty")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="not empty"):
        write_folder_atomically(path, write)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "model.partial"]
    assert [file.name for file in path.iterdir()] == ["old"]
    assert sorted(file.name for file in (tmp_path / "model.partial").iterdir()) == ["link", "new"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "state.json"
    old, young = (tmp_path / f"state.json.partial-{pid}" for pid in (1, 2))
    for file in (old, young):
        file.write_text("ha")
    os.utime(old, (0, 0))
    write_atomically(path, "half")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.json", young.name]


def test_the_hash_is_of_the_bytes_alone_however_many_blocks_or_files(tmp_path, monkeypatch):
    monkeypatch.setattr("madpo.trainer.files.BLOCK", 7)
    content = bytes(range(256))
    (tmp_path / "whole").write_bytes(content)
    (tmp_path / "a").write_bytes(content[:100])
    (tmp_path / "b").write_bytes(content[100:])
    want = xxhash.xxh3_128_hexdigest(content)
    assert hash_of_file(tmp_path / "whole") == want
    assert hash_of_file(tmp_path / "a", tmp_path / "b") == want


def test_a_sealed_folder_tells_what_has_changed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "in" / "b").write_text("two")
    assert fault_in(folder) == "seal.json cannot be read (FileNotFoundError)" and not is_untouched(folder)
    seal(folder)
    assert fault_in(folder) is None and is_untouched(folder)
    before = os.stat(folder / "in" / "b")
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    (folder / "in" / "b").write_text("twO")
    os.utime(folder / "in" / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fault_in(folder) == "in/b has changed" and not is_untouched(folder)
    (folder / "in" / "b").unlink()
    assert fault_in(folder) == "in/b is missing"
    (folder / "in" / "b").write_text("two")
    (folder / "c").touch()
    assert fault_in(folder) == "c was added" and not is_untouched(folder)
    for content in ("[]", '{"a": "sum"}', "{"):
        (folder / "seal.json").write_text(content)
        assert "seal.json cannot be read" in str(fault_in(folder)) and not is_untouched(folder)


def test_a_sealed_folder_is_read_again_only_if_it_was_touched(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("one")
    seal(folder)
    read = []
    monkeypatch.setattr(files, "hash_of_file", lambda path: read.append(path) or hash_of_file(path))
    discard_damaged(folder, "reading anew")
    assert not read
    discard_damaged(folder, "reading anew", verify=True)
    assert read
    os.utime(folder / "a")  # as a copy does
    discard_damaged(folder, "reading anew")
    read.clear()
    discard_damaged(folder, "reading anew")  # sealed anew
    assert not read and folder.is_dir() and not capfd.readouterr().err
    (folder / "a").write_text("two")
    discard_damaged(folder, "reading anew")
    assert not folder.exists() and "a has changed; reading anew" in capfd.readouterr().err


def test_samples_know_contents_and_not_times(tmp_path):
    """Files that were replaced under their old name, size and time stamps, as by `cp -p`."""
    small, large = tmp_path / "small", tmp_path / "large"
    for file, size in ((small, 1000), (large, 3 * SAMPLES * SAMPLE_BYTES)):
        file.write_bytes(np.random.default_rng(0).bytes(size))
        before, facts = sampled_content([file]), file.stat()
        os.utime(file)
        assert sampled_content([file]) == before
        file.write_bytes(np.random.default_rng(1).bytes(size))
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert sampled_content([file]) != before


def test_a_recipe_reads_a_file_again_that_was_replaced_under_its_time_stamp(tmp_path):
    contents, file = Contents(tmp_path / "hashes.json"), tmp_path / "rows.jsonl"
    hashes = []
    for text in ("good", "warm"):
        file.write_text(text)
        os.utime(file, ns=(1, 1))
        hashes.append(contents(file, without=tmp_path / "none"))
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("name", ["x" * 5000 + ".jsonl", "a\0b", "loop", "pipe.yaml", "file/loop"])
def test_a_path_that_leads_nowhere_is_named_in_one_line(tmp_path, name):
    """Wherever a config or a command line names it; one that is not there is left to who looks for it."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    path = tmp_path / name
    for read in (check_path, strict_yaml.read, read_tree, lambda x: load_runs([x])):
        with pytest.raises(UserError, match=rf"^{re.escape(str(path)[:100])}.*(looked at|a pipe)") as refused:
            read(path)
        assert len(str(refused.value)) < 300
    for key, section in (("output_dir", {"output_dir": str(path)}), ("data.cache_dir", {})):
        tree = {"model": {"model_name_or_path": str(path)}, "data": {"dataset_name": "x"}, **section}
        tree["data"] |= {} if section else {"cache_dir": str(path)}
        with pytest.raises(UserError, match=rf"{key}: .*(looked at|a pipe)"):
            from_tree({"output_dir": "run", **tree}, "c.yaml")
    for key in ("model.model_name_or_path", "peft.base_model_name_or_path"):
        with pytest.raises(UserError, match=rf"^{key}: .*(looked at|a pipe)"):
            model_folder(key, str(path))
    with pytest.raises(UserError, match=r"(looked at|a pipe)"):
        write_named(path, "text")
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        write_named(tmp_path, "text")
    assert fault_of_path("~nobody-of-this-name/x") == "no user of that name has a home folder here"
    assert fault_of_path("~/none") is None
    assert fault_of_path(tmp_path / "none" / "x") is None and fault_of_path(tmp_path) is None


@pytest.mark.parametrize("text", ["[]", "{", "3", "\udcff", "[" * 100_000])
def test_a_file_that_holds_no_object_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    assert read_object(path) == {}
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"^/.*/run.json: .*; mend or remove it"):
        read_object(path)
