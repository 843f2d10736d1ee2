"""AdapterPool: several threads at once, autograd's among them, and CUDA streams."""

import itertools
import threading
import time

import pytest
import torch
from small_adapters import NEW, OLD, assert_all_free, load, make_pool, replace, routed
from torch.utils.checkpoint import checkpoint

from peft_kernels.pool.adapter_pool import PoolFullError
from peft_kernels.pool.streams import StreamOrder

# ---- threads ---------------------------------------------------------------------------------


def in_threads(*functions) -> None:
    """Runs functions at once; raises what one of them raised."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("capacity", [8, 16])
def test_replacing_beside_forwards_never_mixes_two_versions(capacity):
    """Every output is that of one version, in all four layers, down to the last bit."""
    model, pool = make_pool(capacity)
    load(pool, "a", OLD)
    x = torch.randn(2, 8)
    allowed = [routed(pool, model, ["a"], x)]
    replace(pool, "a", NEW)
    allowed.append(routed(pool, model, ["a"], x))
    seen, refused, done = set(), 0, threading.Event()

    def forwards():
        try:
            deadline, count = time.monotonic() + 60, 0
            while count < 400 or (len(seen) < 2 and time.monotonic() < deadline):
                y = routed(pool, model, ["a"], x)
                which = [i for i, version in enumerate(allowed) if torch.equal(y, version)]
                assert which, "a mixture"
                seen.update(which)
                count += 1
                time.sleep(1e-4)  # in a full pool only what nothing uses can be replaced
        finally:
            done.set()

    def replaces():
        nonlocal refused
        for i in itertools.count():
            if done.is_set():
                break
            try:
                replace(pool, "a", (OLD, NEW)[i % 2])
            except PoolFullError:
                refused += 1

    in_threads(forwards, replaces)
    assert seen == {0, 1}
    assert not refused or capacity == 8
    pool.unload("a")
    assert_all_free(pool)


def test_threads_have_their_own_routes_beside_loads_and_unloads():
    model, pool = make_pool(128)
    load(pool, "a", OLD)
    load(pool, "b", NEW)
    x = torch.randn(2, 8)
    expected = {name: routed(pool, model, [name], x) for name in ("a", "b", None)}

    def forwards(name):
        for _ in range(100):
            assert torch.equal(routed(pool, model, [name], x), expected[name])

    def loads(name):
        for _ in range(50):
            load(pool, name, OLD)
            pool.unload(name)

    in_threads(*(lambda n=n: forwards(n) for n in expected), *(lambda n=n: loads(n) for n in "cd"))
    assert pool.names() == ["a", "b"]


def test_checkpointed_forwards_are_computed_again_inside_the_route():
    model, pool = make_pool()
    load(pool, "a", OLD)
    load(pool, "b", NEW)
    x = torch.randn(4, 8)

    def gradient(run, backward_inside=True):
        leaf = x.clone().requires_grad_()
        with pool.route(["a", None, "b", "b"]):
            y = run(leaf).square().sum()
            if backward_inside:
                y.backward()
        if not backward_inside:
            y.backward()
        return leaf.grad

    expected = gradient(model)
    for reentrant in (False, True):

        def run(leaf, reentrant=reentrant):
            return checkpoint(model, leaf, use_reentrant=reentrant)

        assert torch.equal(gradient(run), expected)
        with pytest.raises(RuntimeError, match=r"call backward\(\) inside the route"):
            gradient(run, backward_inside=False)
    outside = checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
    outside.sum().backward()


class Stream:
    """A CUDA stream that only notes what waits for what."""

    def __init__(self) -> None:
        self.work: list = []

    def record_event(self):
        return tuple(self.work)

    def wait_event(self, event) -> None:
        self.work += event


def test_on_a_gpu_writes_wait_for_reads_and_reads_for_writes(monkeypatch):
    """The order alone, on streams that are made up; with nothing to wait for, nothing waits."""
    streams = {name: Stream() for name in ("serving", "other", "loading")}
    current = streams["serving"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    order, devices = StreamOrder(), [torch.device("cuda", 0), torch.device("cpu")]
    for name in ("serving", "other"):
        current = streams[name]
        reading = order.begin_read(devices)
        current.work.append(f"read on {name}")
        order.end_read(reading)
    current = streams["loading"]
    order.begin_write(devices)
    current.work.append("written")
    order.end_write(devices)
    assert current.work == ["read on serving", "read on other", "written"]
    current = streams["serving"]
    assert current.work == ["read on serving"]
    order.begin_read(devices)
    assert current.work[-1] == "written"
