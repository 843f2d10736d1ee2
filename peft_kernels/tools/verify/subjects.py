"""What is verified: each op in each dtype, as it runs by itself and by each plan of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from peft_kernels._library import HAS_TRITON, backend_of
from peft_kernels.ops._lora_banks import PLANS as MULTI_LORA_PLANS
from peft_kernels.tools.verify.cases import DTYPES, KINDS, Case

AUTO = "auto"
Forced = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Subject:
    """An op in one dtype by one plan; ``plan`` is "auto" where the op chooses by itself.

    ``skipped`` says why it can't run here, or nothing.
    """

    op: str
    backend: str
    dtype: torch.dtype
    plan: str = AUTO
    kind: str = ""  # what the weight is in
    skipped: str = ""
    force: Forced = contextlib.nullcontext

    @property
    def label(self) -> str:
        """The plan, and what the weight is in."""
        return f"{self.kind} {self.plan}".strip()

    def asked(self, case: Case) -> Case:
        """The case by this plan, where the op takes it as an argument."""
        if self.op != "multi_lora_linear":
            return case
        return dataclasses.replace(case, call=functools.partial(case.call, plan=self.plan))


def subjects_of(op: str, device: torch.device) -> Iterator[Subject]:
    """All of an op's subjects on a device."""
    for dtype in DTYPES:
        backend = backend_of(op, device, dtype)
        yield Subject(op, backend, dtype)
        for plan, force in _plans(op, dtype, device):
            yield Subject(op, backend, dtype, plan, "", _why_not(backend), force)
        for kind in KINDS if op == "lora_linear" else ():
            yield Subject(op, backend, dtype, AUTO, kind)
            for plan, force in _plans("lora_linear_codes", dtype, device):
                yield Subject(op, backend, dtype, plan, kind, _why_not(backend), force)


def _why_not(backend: str) -> str:
    if backend == "triton":
        return ""
    return f"plans are of Triton's kernels, and the backend is '{backend}'"


def _plans(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Forced]]:
    """The plans that an op can be made to take, each with what forces it.

    Only bfloat16 has those of float32 adapters in terms, and some chips programs that stay.
    """
    if op == "multi_lora_linear":
        yield from ((plan, contextlib.nullcontext) for plan in MULTI_LORA_PLANS if plan != AUTO)
    names = {"lora_linear": "PLANS", "dora_linear": "PLANS", "lora_linear_codes": "CODES_PLANS"}
    if op in names and HAS_TRITON:
        from peft_kernels.triton.common import chips
        from peft_kernels.triton.lora_linear import persistent, plans

        found = getattr(plans, names[op])
        if found is plans.PLANS and dtype is torch.bfloat16:
            found += plans.TERM_PLANS
        if found[0] == plans.PLANS[0] and persistent.is_for(chips.arch_name(device), dtype):
            found += (plans.PERSISTENT,)
        for plan in found:
            yield plan, functools.partial(plans.force, plan)
