"""Prompt tuning: trained tokens in front of the text (Lester et al. 2021), alone or by task."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.modules.checks import check_choice, check_size
from peft_kernels.modules.replaced import check_all_stored
from peft_kernels.nn._drawn import Drawn
from peft_kernels.ops.prompt_lookup import POSITIONS, PromptedInputs, prompt_lookup

INITS = ("uniform", "normal")
COMBINATIONS = ("vote", "mean_probability", "mean_log_probability")


class Combined(NamedTuple):
    """What an ensemble answers."""

    prediction: Tensor  # [B] int64, the class
    scores: Tensor  # [B, C]


class PromptTuning(Drawn):
    """L trained soft tokens among a frozen model's token embeddings.

    ``y[b] = [prompts()[task_ids[b]]; embeddings[b]]``, Lester et al. 2021, "The Power of Scale for
    Parameter-Efficient Prompt Tuning", section 2; rows of several tasks go through in one batch,
    as in its Figure 2. The attention mask, the position ids and the labels come out lengthened.

    ``rank`` makes it the multitask prompt of Wang et al. 2023, section 3.2, where the prompt of a
    task is a shared one times a matrix of low rank, element by element:

        prompts()[t] = prompt * (task_cols[t] @ task_rows[t])

    ``ensemble`` is the paper's prompt ensembling, section 6: E prompts of one task, each with its
    copy of every row in one batch.

        embeddings, labels = prompt.expand(embeddings, labels)      # [B, ...] -> [B * E, ...]
        logits = ...                                                # the model on forward()'s rows
        prediction, scores = prompt.combine(logits, "vote")         # [B * E, C] -> [B], [B, C]

    Parameters, with P = tasks * ensemble (prompt e of task t is number ``t * ensemble + e``):
        prompt: ``[P, length, dim]``, or ``[1, length, dim]`` with a rank.
        task_cols, task_rows: ``[P, length, rank]`` and ``[P, rank, dim]``; None without a rank.

    Args:
        length: soft tokens, L.
        dim: features of the model's embeddings.
        tasks: how many tasks have a prompt.
        ensemble: prompts of each task, E.
        rank: of the tasks' own matrices; None gives every task a prompt that shares nothing.
        init: "uniform" in [-bound, bound]; "normal" of deviation ``std``; or a tensor: of
            ``prompt``'s shape, or ``[length, dim]`` for every task. Prompts of an ensemble that
            start alike stay alike, so an ensemble takes no ``[length, dim]`` unless it has a rank.
            :func:`vocabulary_prompt`, :func:`text_prompt` and :func:`label_prompt` make them.
        position: where the prompt stands: "front", before everything, padding too; "after_bos",
            after the first real token; or "after_padding", before the first real token.
        bound, std: of the draws. 0.5 is the paper's bound.
        factor_std: the deviation of ``task_cols`` and ``task_rows``.
        device, dtype: of the parameters. Over float16 or bfloat16 embeddings they may be float32.

    Raises:
        ValueError: a value out of range, an unknown name, an ``init`` of another shape.
        TypeError: a size that isn't an int.
    """

    task_cols: nn.Parameter | None
    task_rows: nn.Parameter | None

    @torch.inference_mode(False)
    def __init__(
        self,
        length: int,
        dim: int,
        *,
        tasks: int = 1,
        ensemble: int = 1,
        rank: int | None = None,
        init: str | Tensor = "uniform",
        position: str = "front",
        bound: float = 0.5,
        std: float = 0.02,
        factor_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"length": length, "dim": dim, "tasks": tasks, "ensemble": ensemble}
        for name, size in (sizes if rank is None else sizes | {"rank": rank}).items():
            check_size(name, size)
        for name, number in (("bound", bound), ("std", std), ("factor_std", factor_std)):
            if not number > 0:
                raise ValueError(f"{name} must be above 0; got {number}")
        check_choice("position", position, POSITIONS)
        if not isinstance(init, Tensor):
            check_choice("init", init, INITS)
        self.length, self.dim, self.tasks, self.ensemble, self.rank = (*sizes.values(), rank)
        self.init = init.detach().clone() if isinstance(init, Tensor) else init
        self.position, self.bound, self.std = position, float(bound), float(std)
        self.factor_std = float(factor_std)
        factory: Any = {"device": device, "dtype": dtype}
        count = tasks * ensemble
        own = count if rank is None else 1
        self.prompt = nn.Parameter(torch.empty(own, length, dim, **factory))
        self.task_cols, self.task_rows = None, None
        if rank is not None:
            self.task_cols = nn.Parameter(torch.empty(count, length, rank, **factory))
            self.task_rows = nn.Parameter(torch.empty(count, rank, dim, **factory))
        self._check_init()
        self.reset_parameters()

    def _check_init(self) -> None:
        if not isinstance(self.init, Tensor):
            return
        shape, whole = tuple(self.init.shape), tuple(self.prompt.shape)
        alike = self.ensemble > 1 and self.rank is None
        if shape != whole and (alike or shape != whole[1:]):
            wanted = f"{whole}" if alike else f"{whole} or {whole[1:]}"
            raise ValueError(f"init must have shape {wanted}; got {shape}")

    def reset_parameters(self) -> None:
        """Draws everything anew, or puts the tensor back that ``init`` was."""
        check_all_stored(self)
        with torch.no_grad():
            if isinstance(self.init, Tensor):
                self.prompt.copy_(self.init)
            elif self.init == "uniform":
                self.prompt.uniform_(-self.bound, self.bound)
            else:
                self.prompt.normal_(std=self.std)
            for factor in (self.task_cols, self.task_rows):
                if factor is not None:
                    factor.normal_(std=self.factor_std)

    _draw = reset_parameters

    def prompts(self) -> Tensor:
        """``[P, length, dim]``: the prompts as the model sees them."""
        if self.task_cols is None or self.task_rows is None:
            return self.prompt
        return self.prompt * (self.task_cols @ self.task_rows)

    def forward(
        self,
        embeddings: Tensor,
        task_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PromptedInputs:
        """The inputs of the model; see :func:`peft_kernels.ops.prompt_lookup`.

        Args:
            embeddings: ``[B, S, dim]``. Of an ensemble ``[B * E, S, dim]``, from :meth:`expand`,
                which makes the other arguments too.
            task_ids: ``[B]`` int32 or int64, the task of each row, -1 for a row without a prompt;
                may be None for a single task.
            attention_mask: ``[B, S]``, 0 for padding; all ones if None.
            labels: ``[B, S]``, of each token; the prompt's are -100.

        Raises:
            ValueError, TypeError: as the op; a batch that ``expand`` can't have made.
        """
        ids = task_ids if self.ensemble == 1 else self.members(embeddings, task_ids)
        return prompt_lookup(
            embeddings,
            self.prompts(),
            ids,
            position=self.position,
            attention_mask=attention_mask,
            labels=labels,
        )

    def members(self, embeddings: Tensor, task_ids: Tensor | None) -> Tensor:
        """``[B * E]``: the prompt of each of :meth:`expand`'s rows, in turn within its task.

        Raises:
            ValueError: rows that aren't a multiple of E, or ids of another shape or out of range,
                or none where there are several tasks.
        """
        rows = embeddings.shape[0]
        if rows % self.ensemble:
            raise ValueError(
                f"embeddings must have {self.ensemble} rows for each of the batch's, as expand() "
                f"makes them; got {rows} rows"
            )
        member = torch.arange(self.ensemble, device=embeddings.device)
        member = member.repeat(rows // self.ensemble)
        if task_ids is None:
            if self.tasks > 1:
                raise ValueError(f"task_ids must be given to choose among {self.tasks} tasks")
            return member
        if task_ids.shape != (rows,):
            raise ValueError(f"task_ids must have shape ({rows},); got {tuple(task_ids.shape)}")
        self._check_tasks(task_ids)
        return torch.where(task_ids < 0, task_ids, task_ids * self.ensemble + member)

    def _check_tasks(self, task_ids: Tensor) -> None:
        """On a CPU: a GPU isn't waited for."""
        if task_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        wrong = (task_ids < -1) | (task_ids >= self.tasks)
        if wrong.any():
            first = task_ids[wrong][0].item()
            raise ValueError(f"task_ids must be in [-1, {self.tasks}); got {first}")

    # -- ensembles

    def expand(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``[B, ...] -> [B * E, ...]`` of each: a row's E copies stand beside each other."""
        return tuple(tensor.repeat_interleave(self.ensemble, 0) for tensor in tensors)

    def combine(self, logits: Tensor, how: str = "vote") -> Combined:
        """One answer of an ensemble's E.

        Args:
            logits: ``[B * E, C]``, C classes, in the order of :meth:`expand`.
            how: "vote": the class that most prompts find likeliest, the paper's way, and of several
                the one with the highest mean probability, then the first; "mean_probability": the
                mean of the softmax; "mean_log_probability": the mean of its logarithm.

        Returns:
            Prediction ``[B]``, and scores ``[B, C]``, which are the share of the votes, the
            probability, or the mean log-probability (which isn't normalised), float32 or wider.

        Raises:
            ValueError: an unknown ``how``, logits of another shape.
        """
        check_choice("how", how, COMBINATIONS)
        if logits.dim() != 2 or logits.shape[0] % self.ensemble:
            raise ValueError(
                f"logits must be [B * {self.ensemble}, C]; got shape {tuple(logits.shape)}"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        members = logits.unflatten(0, (-1, self.ensemble))  # [B, E, C]
        if how == "mean_log_probability":
            scores = members.log_softmax(-1).mean(1)
            return Combined(scores.argmax(-1), scores)
        probability = members.softmax(-1).mean(1)
        if how == "mean_probability":
            return Combined(probability.argmax(-1), probability)
        choices = nn.functional.one_hot(members.argmax(-1), logits.shape[1]).sum(1)  # [B, C]
        tied = choices == choices.amax(-1, keepdim=True)
        prediction = probability.masked_fill(~tied, -1.0).argmax(-1)
        return Combined(prediction, choices.to(logits.dtype) / self.ensemble)

    def extra_repr(self) -> str:
        init = "tensor" if isinstance(self.init, Tensor) else self.init
        text = f"length={self.length}, dim={self.dim}, tasks={self.tasks}"
        text += f", ensemble={self.ensemble}" if self.ensemble > 1 else ""
        text += "" if self.rank is None else f", rank={self.rank}"
        return f"{text}, init={init}, position={self.position}"
