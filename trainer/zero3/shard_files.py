"""What DeepSpeed writes its shards with: hashed on the way, on the disk when done, in a thread if wanted."""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from madpo.trainer.errors import CheckpointError, on_one_line, system_error
from madpo.trainer.files import Entry


def load_shard(path: Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Load a file of DeepSpeed's without running code from it.

    It may hold tensors, plain values and the few classes that DeepSpeed writes. Raises CheckpointError if it
    holds anything else.
    """
    with torch.serialization.safe_globals(_safe_classes()):
        try:
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = on_one_line(error).removeprefix("Weights only load failed. ")[:200]
            raise CheckpointError(
                f"{path}: it holds more than weights, and is not loaded: {reason}"
            ) from None


def _safe_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address  # below stage 3

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


class ShardFiles(TorchCheckpointEngine):
    """DeepSpeed's way to files.

    With `in_background`, `save` only copies the tensors into host memory, which is kept for the next time;
    a thread writes. What is written is in `entries`. An error, such as a full disk, does not leave `save`,
    since the other ranks would wait for this one: it is kept in `error` as text.
    """

    def __init__(self, in_background: bool) -> None:
        super().__init__()
        self.entries: dict[str, Entry] = {}  # file name -> entry, of the checkpoint under way
        self.error: str | None = None
        self._in_background = in_background
        self._buffers: dict[tuple[str, int], Tensor] = {}
        self._jobs: queue.Queue[tuple[Any, Path]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Forget the checkpoint before."""
        self.entries, self.error = {}, None

    def save(self, state_dict: Any, path: str) -> None:
        target = Path(path)
        if not self._in_background:
            self._write(state_dict, target)
            return
        kind = "optimizer" if "optim" in target.name else "model"
        self._jobs.put((self._copied(state_dict, kind, itertools.count()), target))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)
            self._thread.start()

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_shard(Path(path), map_location)

    def preserves_storage_sharing(self) -> Any:
        """Whether DeepSpeed has to copy tensors that share memory with others; copies of ours share none."""
        return not self._in_background

    @property
    def is_writing(self) -> bool:
        return self._jobs.unfinished_tasks > 0

    def wait(self) -> None:
        """Wait until nothing is left to write."""
        self._jobs.join()

    def _copied(self, tree: Any, kind: str, numbers: Iterator[int]) -> Any:
        """The tree with its tensors in host memory; the n-th tensor of a kind is always copied to the place
        that it was copied to before."""
        if isinstance(tree, Tensor):
            place = kind, next(numbers)
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != tree.shape or buffer.dtype != tree.dtype:
                buffer = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
                self._buffers[place] = buffer
            return buffer.copy_(tree.detach(), non_blocking=True)
        if isinstance(tree, dict):
            return type(tree)((key, self._copied(value, kind, numbers)) for key, value in tree.items())
        if type(tree) in (list, tuple):
            return type(tree)(self._copied(value, kind, numbers) for value in tree)
        return tree

    def _write_all(self) -> None:
        while True:
            tree, path = self._jobs.get()
            self._write(tree, path)
            self._jobs.task_done()

    def _write(self, tree: Any, path: Path) -> None:
        if self.error is not None:
            return
        try:
            with _hashed(path) as file:
                torch.save(tree, cast(IO[bytes], file))  # it only writes
            self.entries[path.name] = file.entry
        except Exception as error:  # whatever it is, the other ranks must hear of it
            cause = system_error(error)  # which torch's own error hides
            self.error = f"{path}: {on_one_line(error) if cause is None else cause.strerror}"


class _Hashed:
    """A file for torch.save that counts and hashes on the way, so that nothing is read again.

    Given a path, torch.save holds the interpreter while it writes a tensor, and training would wait.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, xxhash.xxh3_128(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def entry(self) -> Entry:
        return Entry(self._size, self._hash.hexdigest())


@contextmanager
def _hashed(path: Path) -> Iterator[_Hashed]:
    """Open a new file, which is on the disk at the end."""
    with path.open("wb") as file:
        yield _Hashed(file)
        file.flush()
        os.fsync(file.fileno())
