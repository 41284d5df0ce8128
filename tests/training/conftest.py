"""Small images and a small network, made once for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_helpers import make_images, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of two classes."""
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of the network."""
    return tiny_config(tmp_path_factory.mktemp("config"))
