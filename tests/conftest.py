"""Settings every test shares; TRITON_INTERPRET must be set before anything imports Triton."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items):
    """Files with long tests go first: handed out last, one would run alone at the end."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_anew():
    """Dynamo skips frames that another test's error went through, and guards no hooks."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
