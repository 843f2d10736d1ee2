"""Settings every test shares; TRITON_INTERPRET must be set before anything imports Triton."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


# Minutes in one test, which would run alone at the end if their files were handed out last.
LONG = ("test_sanitized.py",)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
