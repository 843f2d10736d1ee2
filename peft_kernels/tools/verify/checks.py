"""What is looked at: value and gradients, their bits in a second run, graphs, another device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from peft_kernels import _library
from peft_kernels.tools.verify.cases import Case, cases_of, leaves_of
from peft_kernels.tools.verify.machine import Machine
from peft_kernels.tools.verify.rule import allowed_error, relative_error
from peft_kernels.tools.verify.subjects import Subject

RIGHT, WRONG, FAILED, SKIPPED = "right", "wrong", "failed", "skipped"
CHECKS = ("forward", "backward", "same bits", "graph", "second GPU")
Y = "y"


@dataclass(frozen=True)
class Finding:
    """What one check found; of several cases the worst.

    ``error`` and ``allowed`` are relative errors against float64 where they were what decided.
    ``why`` says what is wrong, what was raised, or why it was skipped.
    """

    verdict: str
    case: str = ""
    error: float | None = None
    allowed: float | None = None
    why: str = ""

    @property
    def share(self) -> float:
        """The error over what is allowed."""
        return self.error / self.allowed if self.error is not None and self.allowed else 0.0

    def is_bad(self) -> bool:
        return self.verdict in (WRONG, FAILED)


def skipped(why: str) -> Finding:
    return Finding(SKIPPED, why=why)


def failed(error: Exception, case: str) -> Finding:
    """What was raised, in one line."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return Finding(FAILED, case, why=said)


def worst(findings: list[Finding]) -> Finding:
    """A failure before a wrong result before a right one, and of these the largest error."""
    order = (SKIPPED, RIGHT, WRONG, FAILED)
    return max(findings, key=lambda found: (order.index(found.verdict), found.share))


# ---- a case and its results --------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """The value, and then the gradients or what was raised in their stead; on the CPU."""

    value: Tensor
    gradients: list[Tensor] | Exception

    def results(self) -> dict[str, Tensor]:
        gradients = [] if isinstance(self.gradients, Exception) else self.gradients
        return {Y: self.value} | {f"gradient {i}": t for i, t in enumerate(gradients, 1)}


def forward_of(case: Case, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The value where it was computed, and the leaves that its gradient goes to."""
    arguments, leaves = leaves_of(case, inputs)
    return case.call(**arguments), leaves


def gradients_of(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a weighted sum of y, by sixteenths that every dtype holds."""
    places = torch.arange(y.numel(), device=y.device).view(y.shape)
    weights = (places * (places + 7) % 33 - 16) / 16
    return list(torch.autograd.grad(y, leaves, weights.to(y.dtype)))


def compute(case: Case, inputs: dict[str, Any]) -> Computed:
    """Both directions; what the forward raises is raised."""
    y, leaves = forward_of(case, inputs)
    value = y.detach().cpu()
    try:
        return Computed(value, [gradient.cpu() for gradient in gradients_of(y, leaves)])
    except Exception as error:
        return Computed(value, error)


@dataclass(frozen=True)
class Wanted:
    """A case's results in float64, and what the eager path makes of the same values."""

    case: Case
    exact: dict[str, Tensor]
    eager: dict[str, Tensor]

    def judge(self, name: str, out: Tensor) -> Finding:
        """One result by the rule."""
        exact, eager = self.exact[name], self.eager[name]
        if out.shape != exact.shape or out.dtype is not eager.dtype:
            is_what, must = f"{tuple(out.shape)} {out.dtype}", f"{tuple(eager.shape)} {eager.dtype}"
            return Finding(WRONG, self.case.name, why=f"{name} is {is_what}, must be {must}")
        error, allowed = relative_error(out, exact), allowed_error(eager, exact, out.dtype)
        right = error <= allowed
        why = "" if right else f"{name} has error {error:.1e}, allowed {allowed:.1e}"
        return Finding(RIGHT if right else WRONG, self.case.name, error, allowed, why)

    def judge_all(self, found: dict[str, Tensor]) -> Finding:
        return worst([self.judge(name, out) for name, out in found.items()])


def wanted_of(case: Case, dtype: torch.dtype) -> Wanted:
    """By the reference, on the CPU."""
    with _library.backend("reference"):
        exact = compute(case, case.wide())
        eager = compute(case, case.plain(dtype))
    for computed in (exact, eager):
        if isinstance(computed.gradients, Exception):
            raise computed.gradients
    return Wanted(case, exact.results(), eager.results())


# ---- the checks ------------------------------------------------------------------------------


def check(
    subject: Subject, wanted: list[Wanted], machine: Machine, seed: int
) -> dict[str, Finding]:
    """Every check of a subject, by name."""
    if subject.skipped:
        return dict.fromkeys(CHECKS, skipped(subject.skipped))
    asked = [dataclasses.replace(one, case=subject.asked(one.case)) for one in wanted]
    with subject.force():
        found: dict[str, list[Finding]] = {name: [] for name in CHECKS[:3]}
        for one in asked:
            for name, finding in _both_directions(one, machine.device):
                found[name].append(finding)
        results = {name: worst(findings) for name, findings in found.items()}
        results["graph"] = _graph(subject, asked[0], machine, seed)
        results["second GPU"] = _second_device(asked[1], machine)
    return results


def _both_directions(wanted: Wanted, device: torch.device) -> Iterator[tuple[str, Finding]]:
    case = wanted.case
    try:
        inputs = case.on(device)
        first = compute(case, inputs)
    except Exception as error:
        yield "forward", failed(error, case.name)
        yield "backward", skipped("its forward failed")
        yield "same bits", skipped("its forward failed")
        return
    yield "forward", wanted.judge(Y, first.value)
    if isinstance(first.gradients, Exception):
        yield "backward", failed(first.gradients, case.name)
        yield "same bits", skipped("its backward failed")
        return
    results = first.results()
    yield "backward", wanted.judge_all({k: v for k, v in results.items() if k != Y})
    yield "same bits", _same_bits(case, inputs, results)


def _same_bits(case: Case, inputs: dict[str, Any], first: dict[str, Tensor]) -> Finding:
    try:
        second = compute(case, inputs).results()
    except Exception as error:
        return failed(error, case.name)
    other = [name for name, out in first.items() if not _alike(out, second.get(name))]
    if other:
        return Finding(WRONG, case.name, why=f"{', '.join(other)} differ in a second run")
    return Finding(RIGHT, case.name)


def _alike(one: Tensor, other: Tensor | None) -> bool:
    if other is None:
        return False
    # By bits: a NaN is like itself.
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _second_device(wanted: Wanted, machine: Machine) -> Finding:
    """Tensors on another device than the current one."""
    if machine.other is None:
        return skipped(machine.why_no_other)
    try:
        found = compute(wanted.case, wanted.case.on(machine.other))
        if isinstance(found.gradients, Exception):
            raise found.gradients
    except Exception as error:
        return failed(error, wanted.case.name)
    return wanted.judge_all(found.results())


def _graph(subject: Subject, wanted: Wanted, machine: Machine, seed: int) -> Finding:
    """Captured on some values, and replayed on others."""
    if machine.capture is None:
        return skipped(machine.why_no_capture)
    if subject.backend == "reference":
        return skipped("the reference needn't be captured")
    case = wanted.case
    try:
        drawn = subject.asked(cases_of(subject.op, subject.dtype, subject.kind, seed + 1)[0])
        inputs = drawn.on(machine.device)
        replay = machine.capture(_for_graph(case, inputs))
        _copy_into(inputs, case.on(machine.device))
        outputs = replay()
        found = Computed(outputs[0].detach().cpu(), [t.cpu() for t in outputs[1:]])
    except Exception as error:
        return failed(error, case.name)
    return wanted.judge_all(found.results())


def _for_graph(case: Case, inputs: dict[str, Any]) -> Callable[[], list[Tensor]]:
    arguments, leaves = leaves_of(case, inputs)

    def call() -> list[Tensor]:
        y = case.call(**arguments)
        return [y, *gradients_of(y, leaves)]

    return call


def _copy_into(inputs: dict[str, Any], others: dict[str, Any]) -> None:
    """The others' values into the tensors that a graph reads."""
    own, spec = tree_flatten(inputs)
    theirs, same = tree_flatten(others)
    assert spec == same
    for one, other in zip(own, theirs, strict=True):
        if isinstance(one, Tensor):
            with torch.no_grad():
                one.copy_(other)
