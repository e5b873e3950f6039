"""The hub out of reach: said at once, or what was downloaded before is used."""

from __future__ import annotations

import os
import socket
import time

import pytest
from huggingface_hub import constants

from madpo.trainer.config import hub
from madpo.trainer.config.hub import check_on_hub, is_reachable


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """An address where nothing listens, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub._accepts_connections.cache_clear()
    return address


def test_what_is_not_here_is_refused_at_once_with_the_command_that_fetches_it(nowhere):
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{nowhere} cannot be reached; .*hf download org/model\), or name"):
        check_on_hub("model.model_name_or_path", "org/model", "model")
    with pytest.raises(ValueError, match="hf download --repo-type dataset org/pairs"):
        check_on_hub("data.dataset_name", "org/pairs", "dataset")
    assert time.monotonic() - start < hub.PATIENCE


def test_what_was_downloaded_is_used_and_that_is_said_once(tmp_path, capsys):
    (tmp_path / "models--org--model").mkdir()
    for _ in range(2):
        check_on_hub("model.model_name_or_path", "org/model", "model")
    assert capsys.readouterr().err.count("what was downloaded before is used") == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.is_offline_mode()


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_on_hub("model.model_name_or_path", "org/model", "model")


def test_a_hub_or_a_proxy_that_answers_is_left_to_the_libraries(nowhere, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", address)
        assert is_reachable()
        monkeypatch.delenv("http_proxy")
        hub._accepts_connections.cache_clear()
        assert not is_reachable()
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert is_reachable()
    check_on_hub("model.model_name_or_path", "org/model", "model")
