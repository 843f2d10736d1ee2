"""What a call carries: values by thread, task and call, and what is wrapped around methods."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from peft_kernels.calls import carried
from peft_kernels.calls.carried import Carried, keep_apart, stop_keeping_apart, unwrap, wrap


@pytest.fixture
def route():
    return Carried("the route")


def in_thread(function):
    """What a function returns or raises in a thread of its own."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


# ---- values --------------------------------------------------------------------------------------


def test_the_innermost_counts_and_ends_with_its_block(route):
    other = Carried("another")
    assert route.get() is None
    with route.within("a"), other.within("x"):
        with pytest.raises(KeyError), route.within("b"):
            assert (route.get(), other.get()) == ("b", "x")
            raise KeyError
        assert (route.get(), other.get()) == ("a", "x")
    assert route.get() is None and other.get() is None


def test_a_thread_has_its_own_and_a_copied_context_takes_it_along(route):
    with route.within("a"):
        context = contextvars.copy_context()
        assert in_thread(route.get) is None
        assert in_thread(lambda: context.run(route.get)) == "a"
    error = in_thread(lambda: context.run(route.get))
    assert isinstance(error, RuntimeError) and "the route has ended where it was" in str(error)


def test_each_task_has_its_own(route):
    async def one(name):
        with route.within(name):
            await asyncio.sleep(0)
            return route.get()

    async def several():
        return await asyncio.gather(*map(one, "abc")), route.get()

    assert asyncio.run(several()) == (["a", "b", "c"], None)


def test_a_task_that_goes_on_after_the_block_has_an_error(route):
    async def late(opened):
        await opened.wait()
        return route.get()

    async def several():
        done = asyncio.Event()
        with route.within("a"):
            task = asyncio.create_task(late(done))
            await asyncio.sleep(0)
        done.set()
        with pytest.raises(RuntimeError, match="ended where it was entered"):
            await task

    asyncio.run(several())


def test_left_in_another_task_is_an_error_and_ends_it(route):
    async def leave(block):
        with pytest.raises(RuntimeError, match="in the thread and task that entered it"):
            block.__exit__(None, None, None)

    async def several():
        block = route.within("a")
        block.__enter__()
        await asyncio.create_task(leave(block))
        with pytest.raises(RuntimeError, match="has ended"):
            route.get()

    asyncio.run(several())


def test_generators_that_take_turns_have_an_error(route):
    def stream(name):
        with route.within(name):
            yield route.get()
        yield "left"

    first, second = stream("a"), stream("b")
    assert (next(first), next(second)) == ("a", "b")
    with pytest.raises(RuntimeError, match="after those that were entered inside it"):
        next(first)
    assert route.get() == "b"
    assert next(second) == "left"
    assert route.get() is None


def test_kinds_may_end_in_any_order(route):
    other = Carried("another")
    outer, inner = route.enter("a"), other.enter("x")
    route.leave(outer)
    assert (route.get(), other.get()) == (None, "x")
    other.leave(inner)
    assert (route.get(), other.get()) == (None, None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_its_own(route, copied):
    with route.within("a"):
        other = copied(route)
        assert other.get() is None and other.what == "the route"


def test_nothing_is_left_of_what_ended(route):
    value = nn.Identity()
    gone = weakref.ref(value)
    with route.within(value):
        context = contextvars.copy_context()
    del value
    gc.collect()
    assert gone() is None
    assert context is not None


# ---- calls of a module ---------------------------------------------------------------------------


class Pushing(nn.Module):
    """Pushes what it is called with before its forward, and may fail there."""

    def __init__(self, route, fails=None):
        super().__init__()
        self.route, self.fails, self.inner = route, fails, None
        self.register_forward_pre_hook(lambda module, args: route.push(args[0]))
        self.register_forward_pre_hook(self.fail)
        keep_apart(self)

    def fail(self, module, args):
        if self.fails is not None:
            raise self.fails

    def forward(self, x):
        inner = None if self.inner is None else self.inner()
        return self.route.get(), inner


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_hooks_push_ends_with_the_call_however_it_ends(route, error):
    module, failing = Pushing(route), Pushing(route, error())

    def inner():
        with pytest.raises(error):
            failing("inner")
        return route.get()

    module.inner = inner
    with route.within("around"):
        assert module("a") == ("a", "a")
        assert route.get() == "around"
    assert route.get() is None


def test_a_call_inside_another_leaves_it_its_own(route):
    module, other = Pushing(route), Pushing(route)
    module.inner = lambda: other("b")
    assert module("a") == ("a", ("b", None))


def test_wrapped_methods_nest_are_copied_and_are_given_back():
    module = nn.Linear(2, 2)
    plain = set(module.__dict__)
    wrap(module, "extra_repr", shout)
    wrap(module, "extra_repr", bracket)
    assert module.extra_repr() == "<IN_FEATURES=2, OUT_FEATURES=2, BIAS=TRUE>"
    other = copy.deepcopy(module)
    other.in_features = 3
    assert pickle.loads(pickle.dumps(other)).extra_repr().startswith("<IN_FEATURES=3")
    unwrap(module, "extra_repr", shout)
    assert module.extra_repr() == "<in_features=2, out_features=2, bias=True>"
    unwrap(module, "extra_repr", shout)
    unwrap(module, "extra_repr", bracket)
    assert set(module.__dict__) == plain
    keep_apart(module)
    stop_keeping_apart(module)
    assert set(module.__dict__) == plain


def test_a_replica_of_data_parallel_s_runs_its_own_methods():
    module = nn.Linear(2, 2)
    wrap(module, "_get_name", shout)
    assert module._get_name() == "LINEAR"
    assert module._replicate_for_data_parallel()._get_name() == "Linear"


def test_a_method_of_the_instance_s_own_comes_back():
    module = nn.Linear(2, 2)
    module.extra_repr = own = lambda: "mine"
    wrap(module, "extra_repr", shout)
    assert module.extra_repr() == "MINE"
    unwrap(module, "extra_repr", shout)
    assert module.extra_repr is own


def shout(module, proceed):
    return proceed().upper()


def bracket(module, proceed):
    return f"<{proceed()}>"


# ---- torch's own threads and tracing -------------------------------------------------------------


def test_a_backward_s_own_threads_see_the_caller_s(route, monkeypatch):
    """As autograd does for a GPU, whose nodes run on a thread of its own."""

    def device_thread(context):
        torch._C._stash_obj_in_tls("context", context)
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 3)
        try:
            with route.within("inner"):
                inner = route.get()
            with carried.carrying({}):
                nothing = route.get()
            return route.get(), inner, nothing
        finally:
            monkeypatch.undo()
            torch._C._remove_obj_from_tls("context")

    with route.within("a"):
        context = contextvars.copy_context()
        assert in_thread(lambda: device_thread(context)) == ("a", "inner", None)
        assert in_thread(route.get) is None


def test_compiled_code_reads_it_anew_at_each_call(route):
    from torch._dynamo.testing import CompileCounterWithBackend

    def add(x):
        value = route.get()
        return x if value is None else x + value

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(add, fullgraph=True, backend=counter)

    def serve():
        x = torch.zeros(2)
        for value in (1.0, 2.0, 3.0):
            assert compiled(x).tolist() == [0, 0]
            with route.within(torch.full((2,), value)):
                assert compiled(x).tolist() == [value] * 2
                assert in_thread(lambda: compiled(x).tolist()) == [0, 0]

    contextvars.Context().run(serve)
    assert counter.frame_count == 2
