"""What a call carries: an adapter pool's route, its rows' ids, the prefixes of a running forward.

None of it lies on the model or in a thread. One context variable holds all of it, so each thread
and each asyncio task has its own, and ``contextvars.copy_context().run(function)`` takes it along
into another. A :class:`Carried` is one kind of thing of one owner, and holds a stack of it: the
innermost counts. A block that has ended leaves a mark on what it carried, so that a task or thread
that inherited it gets an error and not what the block no longer vouches for.

A backward that computes a forward again (gradient checkpointing) may do so on a thread of
autograd's, which sees what the thread that called it carried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Frame(Generic[T]):
    """One value, from where it is entered to where it is left."""

    def __init__(self, value: T) -> None:
        self.value: T | None = value
        self.closed = False
        self.entered: tuple[Frames, Token[Frames]] | None = None  # by Carried.enter


Frames = Mapping[str, tuple[Frame, ...]]
_CARRIED: ContextVar[Frames] = ContextVar("peft_kernels_carried")
_NUMBER = itertools.count(1)


class _Now:
    """Reads the context variable where torch.compile traces it.

    Dynamo doesn't trace ``ContextVar.get``, but reads a property whose getter is a builtin anew, as
    a guard, each time that the compiled code is called. Where nothing is carried the builtin
    returns its argument, which is the object itself.
    """

    carried = property(_CARRIED.get)


_NOW = _Now()
_NOTHING: Frames = {}


def carried() -> Frames:
    """All that the running call carries; it is never written to, only replaced."""
    found: Any = _NOW.carried
    if found is not _NOW:
        return found
    if torch.compiler.is_compiling():
        return _NOTHING
    return of_backward_s_caller(_CARRIED, _NOTHING)


def is_carrying() -> bool:
    """Whether the running call carries anything.

    Code that is compiled where this was asked is run again only where as much is carried.
    """
    return sum(len(frames) for frames in carried().values()) > 0


def of_backward_s_caller(variable: ContextVar[T], default: T) -> T:
    """In a backward, a context variable as it is in the thread that called it."""
    if torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls("context"):
        return default
    return torch._C._get_obj_in_tls("context").get(variable, default)


@contextmanager
def carrying(frames: Frames) -> Iterator[None]:
    """Within it, the call carries what :func:`carried` returned elsewhere."""
    token = _CARRIED.set(frames)
    try:
        yield
    finally:
        _CARRIED.reset(token)


class Carried(Generic[T]):
    """A stack of values in the running call, the innermost last.

    A copy or an unpickled one has a stack of its own, and nothing of it outlives the calls.

    Args:
        what: it is, for errors: "the route of the pool".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._key = f"{next(_NUMBER)}: {what}"

    def __deepcopy__(self, memo: object) -> Carried[T]:
        return type(self)(self.what)

    def __reduce__(self) -> tuple:
        return type(self), (self.what,)

    def frames(self) -> tuple[Frame[T], ...]:
        """What was entered and not left, the innermost last."""
        return carried().get(self._key, ())

    def top(self) -> Frame[T] | None:
        frames = carried().get(self._key)
        return frames[-1] if frames else None

    def get(self) -> T | None:
        """The innermost value, or None; a RuntimeError if the block that entered it has ended."""
        frame = self.top()
        if frame is None:
            return None
        if frame.closed:
            raise RuntimeError(
                f"{self.what} has ended where it was entered, and can't go on in a thread or task "
                "that inherited it: keep it open until they are done, or enter one in each"
            )
        return frame.value

    def push(self, value: T) -> None:
        """Carries a value until the call ends that :func:`keep_apart` looks after."""
        _CARRIED.set({**carried(), self._key: (*self.frames(), Frame(value))})

    @contextmanager
    def restored(self, frames: tuple[Frame[T], ...]) -> Iterator[None]:
        """Within it, this is what :meth:`frames` returned elsewhere."""
        with carrying({**carried(), self._key: frames}):
            yield

    def enter(self, value: T) -> Frame[T]:
        """Carries a value until :meth:`leave`."""
        frame = Frame(value)
        state = {**carried(), self._key: (*self.frames(), frame)}
        frame.entered = state, _CARRIED.set(state)
        return frame

    def leave(self, frame: Frame[T]) -> None:
        """Ends what :meth:`enter` began.

        Raises:
            RuntimeError: another thread or task entered it, or another value was entered inside it
                and not left. It has ended nevertheless.
        """
        assert frame.entered is not None
        (state, token), now = frame.entered, _CARRIED.get(_NOTHING)
        frame.value, frame.closed, frame.entered = None, True, None
        try:
            _CARRIED.reset(token)
        except ValueError:
            raise RuntimeError(
                f"{self.what} must be left in the thread and task that entered it; this is another"
            ) from None
        if now is state:
            return
        frames = now.get(self._key, ())
        left = tuple(one for one in frames if one is not frame)
        rest = {key: kept for key, kept in now.items() if key != self._key}
        _CARRIED.set({**rest, self._key: left} if left else rest)
        if not frames or frames[-1] is not frame:
            raise RuntimeError(
                f"{self.what} must be left after those that were entered inside it; one is still "
                "open, as where two generators that hold one each take turns"
            )

    @contextmanager
    def within(self, value: T) -> Iterator[None]:
        """Carries a value within the block."""
        frame = self.enter(value)
        try:
            yield
        finally:
            self.leave(frame)


# ---- around the methods of a module --------------------------------------------------------------

_AROUND = "_peft_kernels_around"
_REPLICATE = "_replicate_for_data_parallel"
Around = Callable[..., Any]  # (module, proceed, *args, **kwargs)


def wrap(module: nn.Module, method: str, around: Around) -> None:
    """Has ``around(module, proceed, ...)`` run in place of a method of one module.

    ``proceed(...)`` is the method itself, with what was wrapped around it before. Functions of a
    module or partials of them can be copied and pickled with the model.
    """
    chains = module.__dict__.setdefault(_AROUND, {})
    module.__dict__[_REPLICATE] = partial(_replica, module)
    if method not in chains:
        chains[method] = (module.__dict__.get(method), [])
        module.__dict__[method] = partial(_run, module, method)
    chains[method][1].append(around)


def unwrap(module: nn.Module, method: str, around: Around) -> None:
    """Undoes :func:`wrap`, if it was done."""
    chains = module.__dict__.get(_AROUND, {})
    former, arounds = chains.get(method, (None, []))
    if around not in arounds:
        return
    arounds.remove(around)
    if arounds:
        return
    del chains[method], module.__dict__[method]
    if former is not None:
        module.__dict__[method] = former
    if not chains:
        del module.__dict__[_AROUND], module.__dict__[_REPLICATE]


def _replica(module: Any) -> nn.Module:
    """A replica, as nn.DataParallel makes them: its methods aren't this module's.

    It has the module's hooks, and what they push ends with its calls too.
    """
    replica = type(module)._replicate_for_data_parallel(module)
    chains = replica.__dict__.pop(_AROUND)
    for name in (_REPLICATE, *chains):
        del replica.__dict__[name]
    if _apart in chains.get("_call_impl", (None, []))[1]:
        call = partial(type(replica)._call_impl, replica)
        replica.__dict__["_call_impl"] = partial(_apart, replica, call)
    return replica


def _run(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    # Nothing is around it any more where torch.compile keeps the method as it was.
    former, arounds = module.__dict__.get(_AROUND, {}).get(method, (None, []))
    proceed = former or partial(getattr(type(module), method), module)
    for around in arounds:
        proceed = partial(around, module, proceed)
    return proceed(*args, **kwargs)


def keep_apart(module: nn.Module) -> None:
    """Has whatever hooks push while the module is called end with the call, however that ends.

    Hooks alone can't: those after the forward don't run when one before it raises something that
    isn't an Exception, and can't tell whose push was the last when one before them raises.
    """
    wrap(module, "_call_impl", _apart)
    if (compiled := module.__dict__.get(_COMPILED)) is not None:
        module.__dict__[_COMPILED] = partial(_apart, module, compiled)


def stop_keeping_apart(module: nn.Module) -> None:
    """Undoes :func:`keep_apart`."""
    unwrap(module, "_call_impl", _apart)
    compiled = module.__dict__.get(_COMPILED)
    if isinstance(compiled, partial) and compiled.func is _apart:
        module.__dict__[_COMPILED] = compiled.args[1]


# What torch calls in place of _call_impl in a module after its compile(), and leaves out of copies.
_COMPILED = "_compiled_call_impl"


def _apart(module: nn.Module, proceed: Callable, *args: Any, **kwargs: Any) -> Any:
    with carrying(carried()):
        return proceed(*args, **kwargs)
