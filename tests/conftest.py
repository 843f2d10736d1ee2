"""Settings every test shares, and the choice of a device.

``pytest --device cuda`` runs the tests that take the fixture ``device`` on a GPU, with compiled
Triton kernels, and no others. Without it they run on the CPU as all do, where Triton's kernels are
interpreted: TRITON_INTERPRET must be set before anything imports Triton.
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On a GPU the tests' small shapes don't belong in the cache of who runs them.
os.environ.setdefault("PEFT_KERNELS_TUNE", "0")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"])


def pytest_configure(config):
    if config.getoption("device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device(request):
    """Where the tests of tests/devices run."""
    chosen = torch.device(request.config.getoption("device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    return chosen


def pytest_collection_modifyitems(config, items):
    """Files with long tests go first: handed out last, one would run alone at the end."""
    if config.getoption("device") != "cpu":
        others = [item for item in items if "device" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "device" in item.fixturenames]
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


@pytest.fixture(autouse=True)
def nothing_carried_on():
    """What a call carries ends with it: a test that leaves some fails, and not those after it."""
    yield
    carried = sys.modules.get("peft_kernels.calls.carried")
    left = {} if carried is None else carried.carried()
    if left:
        carried._CARRIED.set({})
    assert not any(left.values()), f"still carried after the test: {left}"
