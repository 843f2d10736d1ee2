"""Whose rows the logits of a prompt are.

vLLM names the adapters of the rows whose tokens it samples. For ``prompt_logprobs`` it asks for the
logits of others too, slices of a step's hidden states, and says nothing of them: their place among
the hidden states does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor

# What asks for them, in vLLM's two runners: class, method, and which argument the states are.
_ASKING = {
    "vllm.v1.worker.gpu_model_runner": [("GPUModelRunner", "_get_prompt_logprobs_dict", 1)],
    "vllm.v1.worker.gpu.sample.prompt_logprob": [
        ("PromptLogprobsWorker", "compute_prompt_logprobs", 2),
        ("PromptLogprobsWorker", "compute_prompt_token_id_logprobs", 2),
    ],
}
_states: ContextVar[Tensor | None] = ContextVar("states", default=None)


def watch() -> None:
    """Has the runner that is imported tell of the hidden states of a step's prompts."""
    for module, methods in _ASKING.items():
        for owner, name, position in methods if module in sys.modules else ():
            kind = getattr(sys.modules[module], owner)
            method = getattr(kind, name)
            if not hasattr(method, "peft_kernels"):
                setattr(kind, name, _watched(method, position))


def _watched(method: Callable[..., Any], position: int) -> Callable[..., Any]:
    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs["hidden_states"]
        token = _states.set(given)
        try:
            return method(*args, **kwargs)
        finally:
            _states.reset(token)

    run.peft_kernels = True  # type: ignore[attr-defined]
    return run


def tokens_of(x: Tensor) -> slice | None:
    """The step's tokens that x's rows are; None where x is the rows that are sampled.

    Raises:
        ValueError: x is no slice of the hidden states.
    """
    states = _states.get()
    if states is None:
        return None
    size = states.stride(0) * states.element_size()
    first, rest = divmod(x.data_ptr() - states.data_ptr(), size)
    last = first + len(x)
    if rest or first < 0 or last > len(states) or x.stride() != states.stride():
        raise ValueError(
            "x must be a slice of the step's hidden states where prompt_logprobs are computed; "
            "this model makes something else of them, so that their LoRA can't be told"
        )
    return slice(first, last)
