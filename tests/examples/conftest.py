"""The real model, fetched once into the cache, for all tests of the examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcore_examples.fetch import fetch_model
from quantcore_examples.sentence_model import SentenceModel


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return fetch_model()


@pytest.fixture(scope="session")
def model(model_folder: Path) -> SentenceModel:
    """Return the float32 model on NumPy."""
    return SentenceModel.load(model_folder)
