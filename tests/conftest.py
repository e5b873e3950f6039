"""One thread per process, because ranks are forked and OpenMP's pool does not survive a fork.

With MADPO_TEST_GPU=1 (`make test-gpu`) the kernels run on the GPU; otherwise under Triton's interpreter.
The kernel tests see this file too, so beside pytest it imports what they need at most: torch, Triton, numpy.
"""

import os
import tempfile

from patience import patient

ON_GPU = os.environ.get("MADPO_TEST_GPU") == "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("PYTEST_TIMEOUT", str(patient(300)))  # of one test
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:  # compiled extensions lie behind one lock per folder
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{tempfile.gettempdir()}/madpo-extensions-{os.getuid()}-{WORKER}"
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import interpreter

    interpreter.install()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not ON_GPU:
    # The first backward pass decides whether autograd has threads of its own; no rank can be forked from a
    # process with them. A CUDA build of torch starts them, GPU or not, if a fake tensor was made before.
    torch.zeros((), requires_grad=True).backward()


def pytest_configure(config: pytest.Config) -> None:
    if ON_GPU and not torch.cuda.is_available():
        pytest.exit("no GPU that this torch can use: nothing was tested", returncode=0)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens."""
    from harness import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, and an operation without a deterministic order is an error.

    On a GPU it is a warning: the twins use some, our ops are run twice and compared bit for bit.
    """
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)
