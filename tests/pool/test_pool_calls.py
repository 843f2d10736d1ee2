"""AdapterPool: a route belongs to the call, in threads, asyncio tasks and compiled code."""

import asyncio
import contextvars
import functools
import threading

import pytest
import torch
from small_adapters import NEW, OLD, assert_all_free, load, make_pool, replace, routed
from torch.utils.checkpoint import checkpoint

from peft_kernels.calls import router

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def served():
    """A model, its pool with two adapters, and what each gives."""
    model, pool = make_pool()
    load(pool, "a", OLD)
    load(pool, "b", NEW)
    alone = {name: routed(pool, model, [name], X) for name in ("a", "b", None)}
    assert not torch.equal(alone["a"], alone["b"])
    with torch.no_grad():
        yield model, pool, alone


@pytest.mark.parametrize("is_routed", [True, False])
@pytest.mark.parametrize(
    "graph",
    [
        lambda model: torch.jit.trace(model, X, check_trace=False),
        lambda model: torch.export.export(model, (X,), strict=False),
        lambda model: torch.export.export(model, (X,), strict=True),
    ],
    ids=["jit", "export", "strict"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_pool_isn_t_put_into_a_graph(served, graph, is_routed):
    model, pool, _ = served
    with pytest.raises(Exception, match="can't be put into a graph by "):
        if is_routed:
            with pool.route(["a", "b"]):
                graph(model)
        else:
            graph(model)


def in_thread(function):
    """What a function gives or raises in a thread of its own."""
    found = []

    def run():
        try:
            with torch.no_grad():
                found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# ---- tasks ---------------------------------------------------------------------------------------


def test_tasks_that_take_turns_have_their_own_routes(served):
    model, pool, alone = served

    async def serve(name, pause):
        with pool.route([name]):
            await asyncio.sleep(pause)
            return model(X)

    async def several():
        found = await asyncio.gather(serve("a", 0.02), serve("b", 0.01), serve(None, 0.03))
        return [*found, model(X)]

    for found, name in zip(asyncio.run(several()), ("a", "b", None, None), strict=True):
        assert torch.equal(found, alone[name])


def test_a_thread_of_asyncio_s_and_a_task_inside_the_route_have_it(served):
    model, pool, alone = served

    async def in_task():
        return model(X)

    async def several():
        with pool.route(["a"]):
            task = asyncio.create_task(in_task())
            return await asyncio.to_thread(torch.no_grad()(model), X), await task

    for found in asyncio.run(several()):
        assert torch.equal(found, alone["a"])


def test_a_task_that_goes_on_after_the_route_has_an_error(served):
    model, pool, _ = served

    async def late(ended):
        await ended.wait()
        with pytest.raises(RuntimeError, match="a pool's route has ended where it was entered"):
            model(X)
        with pool.route(["b"]):
            return model(X)

    async def several():
        ended = asyncio.Event()
        with pool.route(["a"]):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    assert torch.equal(asyncio.run(several()), served[2]["b"])


def test_a_route_that_another_task_leaves_is_an_error_and_holds_nothing(served):
    _, pool, _ = served
    route = pool.route(["a"])

    async def enter():
        route.__enter__()

    async def leave():
        with pytest.raises(RuntimeError, match="left in the thread and task that entered it"):
            route.__exit__(None, None, None)

    async def both():
        await asyncio.create_task(enter())
        await asyncio.create_task(leave())

    asyncio.run(both())
    for name in ("a", "b"):
        pool.unload(name)
    assert_all_free(pool)


# ---- threads -------------------------------------------------------------------------------------


def test_a_thread_has_no_route_unless_it_is_handed_one(served):
    model, pool, alone = served
    with pool.route(["a"]):
        context = contextvars.copy_context()
        bound = pool.bind(model, ["b"])
        assert torch.equal(in_thread(lambda: model(X)), alone[None])
        assert torch.equal(in_thread(lambda: context.run(model, X)), alone["a"])
        assert torch.equal(in_thread(lambda: bound(X)), alone["b"])
        assert torch.equal(bound(X), alone["b"])
        assert torch.equal(model(X), alone["a"])
    error = in_thread(lambda: context.run(model, X))
    assert isinstance(error, RuntimeError) and "has ended where it was entered" in str(error)
    assert torch.equal(in_thread(lambda: bound(X)), alone["b"])


def test_a_forward_without_a_route_may_be_an_error():
    model, pool = make_pool(unrouted="error")
    load(pool, "a", OLD)
    plain, base = make_pool()
    with pytest.raises(RuntimeError, match=r"unrouted='error'.*pool\.bind"):
        model(X)
    assert isinstance(in_thread(lambda: model(X)), RuntimeError)
    torch.testing.assert_close(routed(pool, model, [None], X), plain(X))
    assert torch.equal(in_thread(lambda: pool.bind(model, ["a"])(X)), routed(pool, model, ["a"], X))
    with pytest.raises(Exception, match="unrouted='error'"):
        torch.compile(model, backend="eager")(X)
    assert base is not None
    pool.detach()
    torch.testing.assert_close(model(X), plain(X))
    with pytest.raises(ValueError, match="unrouted must be 'base' or 'error'; got 'raise'"):
        make_pool(unrouted="raise")


# ---- bind ----------------------------------------------------------------------------------------


def test_what_is_bound_holds_its_versions_as_long_as_it_lives(served):
    model, pool, alone = served
    bound = pool.bind(model, ["a", None])
    replace(pool, "a", NEW)
    pool.unload("b")
    mixed = torch.stack([alone["a"][0], alone[None][1]])
    torch.testing.assert_close(bound(X), mixed)
    torch.testing.assert_close(in_thread(functools.partial(bound, X)), mixed)
    pool.unload("a")
    assert pool.memory().used > 0
    del bound
    assert_all_free(pool)


def test_what_is_bound_is_checked_then_and_there(served):
    model, pool, _ = served
    with pytest.raises(ValueError, match="no adapter 'x'"):
        pool.bind(model, ["x"])
    with pytest.raises(TypeError, match="ids must be a sequence"):
        pool.bind(model, "a")

    def stream():
        yield model(X)

    with pytest.raises(TypeError, match="must not be a generator's"):
        pool.bind(stream, ["a"])
    bound = pool.bind(model, ["a"])
    pool.detach()
    with pytest.raises(RuntimeError, match="the pool is detached"):
        bound(X)


def test_a_bound_coroutine_function_has_its_route_in_its_task(served):
    model, pool, alone = served

    async def serve(x):
        await asyncio.sleep(0)
        return model(x)

    async def several():
        return await asyncio.gather(*(pool.bind(serve, [name])(X) for name in "ab"))

    for found, name in zip(asyncio.run(several()), "ab", strict=True):
        assert torch.equal(found, alone[name])


def test_detach_waits_for_no_bound_call_that_runs(served):
    _, pool, _ = served
    bound = pool.bind(pool.detach, ["a"])
    with pytest.raises(RuntimeError, match="outside of any route"):
        bound()


# ---- graphs and compiled code --------------------------------------------------------------------


@pytest.fixture
def sorting(monkeypatch):
    """Has the router do on the CPU what it does for GPUs."""
    monkeypatch.setattr(router, "_reads_sorted", lambda device: True)


def ids_of(pool):
    return pool._router.current().on(torch.device("cpu")).routing.ids


def test_the_buffer_of_graphs_is_filled_for_whoever_reads_it(served, sorting):
    """Tasks of one thread share it; a thread that inherited the route has no part in it."""
    _, pool, _ = served

    async def serve(name):
        with pool.route([name, None]):
            await asyncio.sleep(0)
            return ids_of(pool).data_ptr(), ids_of(pool).tolist()

    async def several():
        return await asyncio.gather(*map(serve, "ab"))

    (first, own), (second, other) = asyncio.run(several())
    assert first == second and own != other
    with pool.route(["a", None]):
        context = contextvars.copy_context()
        address = ids_of(pool).data_ptr()
        with pool.route(["b", None]):
            assert ids_of(pool).data_ptr() == address
            outside = in_thread(lambda: context.run(ids_of, pool))
            assert outside.tolist() == own and outside.data_ptr() != address


@pytest.mark.parametrize("sorts", [False, True])
def test_compiled_code_reads_the_route_of_its_task(served, sorts, monkeypatch):
    monkeypatch.setattr(router, "_reads_sorted", lambda device: sorts)
    model, pool, alone = served
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), alone[None])

    async def serve(name):
        with pool.route([name]):
            await asyncio.sleep(0)
            return compiled(X)

    async def several():
        return await asyncio.gather(*map(serve, "abba"))

    for found, name in zip(asyncio.run(several()), "abba", strict=True):
        torch.testing.assert_close(found, alone[name])
    with pool.route(["a"]):
        context = contextvars.copy_context()
        torch.testing.assert_close(in_thread(lambda: compiled(X)), alone[None])
        torch.testing.assert_close(in_thread(lambda: context.run(compiled, X)), alone["a"])


def test_checkpointing_finds_that_a_forward_was_routed_in_this_task(served):
    model, pool, _ = served

    async def step(name, inside):
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            with pool.route([name]):
                loss = checkpoint(model, x, use_reentrant=False).sum()
                await asyncio.sleep(0)
                if inside:
                    loss.backward()
            if not inside:
                with pytest.raises(RuntimeError, match=r"call backward\(\) inside the route"):
                    loss.backward()
        return x.grad

    async def several():
        return await asyncio.gather(step("a", True), step("b", False), step("a", True))

    first, none, third = asyncio.run(several())
    assert none is None and torch.equal(first, third)


# A reentrant checkpoint keeps nothing of its forward to compare with.
@pytest.mark.parametrize(
    ("reentrant", "other_serves"), [(False, False), (False, True), (True, False)]
)
def test_checkpointing_finds_that_the_route_is_another_one(served, reentrant, other_serves):
    model, pool, _ = served
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        with pool.route(["a"]):
            loss = checkpoint(model, x, use_reentrant=reentrant).sum()
        with pool.route(["b"]):
            if other_serves:
                model(X)
            with pytest.raises(RuntimeError, match=r"call backward\(\) inside the route"):
                loss.backward()
        with pool.route(["a"]):
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        expected = X.clone().requires_grad_()
        with pool.route(["a"]):
            model(expected).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_a_route_that_is_entered_in_a_backward_serves_what_runs_there(served):
    model, pool, alone = served
    seen = []

    def hook(gradient):
        with pool.route(["b"]):
            seen.append(model(X))

    with torch.enable_grad(), pool.route(["a"]):
        out = model(X.clone().requires_grad_())
        out.register_hook(hook)
        out.sum().backward()
    assert torch.equal(seen[0].detach(), alone["b"])


def test_bound_functions_keep_their_names(served):
    _, pool, _ = served
    assert pool.bind(functools.partial(print), ["a"]) is not None
    assert pool.bind(in_thread, ["a"]).__name__ == "in_thread"


def test_a_default_device_is_not_the_pool_s(served, tmp_path):
    model, pool, alone = served
    with torch.device("meta"):
        with pool.route(["a"]):
            out = model(X)
        pool.save("a", tmp_path)
        pool.load("again", tmp_path)
        pool.create("new", 2, alpha=4)
    assert torch.equal(out, alone["a"])
    assert torch.equal(routed(pool, model, ["again"], X), alone["a"])
    assert torch.equal(routed(pool, model, ["new"], X), alone[None])
