"""A local hub that huggingface_hub asks in this process."""

import pytest

from jsft.hf.random_model import write_random_model
from tests.hub.server import LocalHub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub; the client has an empty cache and no token."""
    from huggingface_hub import constants

    with LocalHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny Llama model directory."""
    return write_random_model(tmp_path_factory.mktemp("hub") / "tiny", "llama", hidden_size=64, intermediate_size=128)
