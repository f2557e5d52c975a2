"""Hub files: the cache first, and every way to fail is a ConnectionError."""

import pytest

from spikegpt_lora import load_task
from spikegpt_lora.utils import hub


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(hub, "require_reachable", lambda url: None)


def test_a_download_that_breaks_off_is_a_connection_error(reachable, monkeypatch):
    def cut(**kwargs):
        raise RuntimeError("peer closed connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cut)
    with pytest.raises(ConnectionError, match="the download broke off: RuntimeError: peer closed connection"):
        hub.fetch(["train.jsonl"], "nobody/nothing", "dataset")


def test_a_task_whose_download_breaks_off_is_not_found(reachable, monkeypatch):
    monkeypatch.delenv("SPIKEGPT_LORA_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **kwargs: 1 / 0)
    with pytest.raises(FileNotFoundError, match="broke off: ZeroDivisionError"):
        load_task("subj")


def test_offline_is_said():
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        hub.fetch(["x"], "nobody/nothing")
