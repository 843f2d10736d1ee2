"""P-tuning: soft slots in a template, made by a small encoder (Liu et al. 2021)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.modules.checks import check_choice, check_kind, check_share, check_size
from peft_kernels.modules.replaced import check_all_stored, check_stored
from peft_kernels.nn._drawn import Drawn
from peft_kernels.nn._kept import KeepingModule
from peft_kernels.nn._prompt_init import Embedding, embed
from peft_kernels.nn._template import Template, TemplateBatch, Verbalizer
from peft_kernels.ops.prompt_lookup import PromptedInputs, prompt_lookup

ENCODERS = ("mlp", "lstm")


class PTuning(Drawn, KeepingModule):
    """Trained slots among a template's tokens and the input's, in a masked or causal model.

    Liu et al. 2021, "GPT Understands, Too", sections 3.1 and 3.2. The slots' vectors h are made
    from L trained ones by an encoder, whose output is what stands in the template:

        None      h = slots                                       [L, dim]
        "mlp"     h = W_2 relu(W_1 relu(W_0 slots))               dim -> hidden -> hidden -> dim
        "lstm"    h = W_1 relu(W_0 biLSTM(slots))                 dim -> 2 hidden -> mlp -> dim

    biases left out. The paper's encoder is "lstm" with ``hidden_size = dim // 2``, the default, so
    that all features are dim; ``hidden_size=dim, mlp_size=dim`` is that of its few-shot SuperGLUE
    models. PEFT's P_TUNING is "mlp" or "lstm" with ``hidden_size`` its encoder_hidden_size,
    ``num_layers`` its encoder_num_layers and ``dropout`` its encoder_dropout, which it leaves
    unused in an MLP. In eval mode, where nothing asks for gradients, the encoder's output is kept
    until a parameter changes.

    Anchors and inputs get their embeddings from the model, and train only if those do.

        template = Template.parse("[P P P] {x} [P] ? [MASK]", tokenizer)
        prompt = PTuning(template, 768, verbalizer=Verbalizer.parse(words, tokenizer))
        batch = template.encode(texts, max_length=512)
        inputs = prompt(batch, model.get_input_embeddings())
        logits = model(inputs_embeds=inputs.embeddings, attention_mask=inputs.attention_mask).logits
        loss = F.cross_entropy(prompt.scores(logits, batch), classes)

    P-tuning v2 (Liu et al. 2022) is another method: prompts in every layer, that is
    :class:`peft_kernels.nn.PrefixTuning` without its reparametrisation.

    Parameters:
        slots: ``[L, dim]``.
        lstm.*: as ``nn.LSTM(dim, hidden_size, num_layers, bidirectional=True)``; None without. Of a
            single slot there is nothing that recurs: the ``weight_hh`` then are frozen.
        mlp.0, mlp.2, and of "mlp" mlp.4: the linear layers; None without an encoder.

    Args:
        template: the template, with at least one slot; only its number of slots is kept.
        dim: features of the model's embeddings.
        encoder: None, "mlp" or "lstm".
        hidden_size: of the encoder: dim // 2 of an LSTM and dim of an MLP if None.
        mlp_size: features between the linear layers of "lstm"; 2 * hidden_size if None.
        num_layers: of the LSTM.
        dropout: between the LSTM's layers, in [0, 1).
        verbalizer: what :meth:`scores` reads the classes with.
        init: what the slots start as, ``[L, dim]``; drawn from a normal distribution if None.
        std: of that. If None 1 with an encoder, as the paper's and PEFT's are, else 0.02.
        device, dtype: of the parameters. Over float16 or bfloat16 embeddings they may be float32.

    Raises:
        ValueError: no slot, a value out of range, an unknown name, an argument of an encoder that
            isn't there, an ``init`` of another shape.
        TypeError: a size that isn't an int.
    """

    lstm: nn.LSTM | None
    mlp: nn.Sequential | None

    @torch.inference_mode(False)
    def __init__(
        self,
        template: Template,
        dim: int,
        *,
        encoder: str | None = "lstm",
        hidden_size: int | None = None,
        mlp_size: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.0,
        verbalizer: Verbalizer | None = None,
        init: Tensor | None = None,
        std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_kind("template", template, Template)
        if template.length == 0:
            raise ValueError("template must have at least one soft slot, e.g. [P]; it has none")
        check_size("dim", dim)
        if encoder is not None:
            check_choice("encoder", encoder, ENCODERS)
        _check_arguments(encoder, hidden_size, mlp_size, num_layers, dropout)
        self.length, self.dim, self.encoder = template.length, dim, encoder
        self.std = (0.02 if encoder is None else 1.0) if std is None else float(std)
        if not self.std > 0:
            raise ValueError(f"std must be above 0; got {std}")
        if init is not None and init.shape != (self.length, dim):
            raise ValueError(f"init must have shape {(self.length, dim)}; got {tuple(init.shape)}")
        self.init = None if init is None else init.detach().clone()
        self.verbalizer = verbalizer
        factory: Any = {"device": device, "dtype": dtype}
        self.slots = nn.Parameter(torch.empty(self.length, dim, **factory))
        self.lstm, self.mlp = None, None
        if encoder == "lstm":
            size = max(dim // 2, 1) if hidden_size is None else hidden_size
            self.lstm = nn.LSTM(
                dim, size, num_layers, dropout=dropout, bidirectional=True, **factory
            )
            self.mlp = _mlp([2 * size, mlp_size or 2 * size, dim], factory)
        elif encoder == "mlp":
            size = hidden_size or dim
            self.mlp = _mlp([dim, size, size, dim], factory)
        if self.lstm is not None and self.length == 1:
            for name, weight in self.lstm.named_parameters():
                weight.requires_grad_("weight_hh" not in name)
        self.reset_slots()

    def reset_slots(self) -> None:
        """Draws the slots anew, or puts ``init`` back; an encoder stays as it is."""
        check_stored(self, own=["slots"])
        with torch.no_grad():
            if self.init is None:
                self.slots.normal_(std=self.std)
            else:
                self.slots.copy_(self.init)

    def _draw(self) -> None:
        check_all_stored(self)
        encoders: list[Any] = [self.lstm, *(() if self.mlp is None else self.mlp)]
        for encoder in encoders:
            if isinstance(encoder, nn.LSTM | nn.Linear):
                encoder.reset_parameters()
        self.reset_slots()

    def prompts(self) -> Tensor:
        """``[1, L, dim]``: the slots' vectors as the model sees them."""
        if self.training or self.trains():
            return self._encoded()
        return self._kept.get(self._encoded, list(self.parameters()))

    def _encoded(self) -> Tensor:
        h = self.slots
        if self.lstm is not None:
            h, _ = self.lstm(h)
        return (h if self.mlp is None else self.mlp(h)).unsqueeze(0)

    def forward(
        self, batch: TemplateBatch, embeddings: Embedding, *, labels: Tensor | None = None
    ) -> PromptedInputs:
        """The inputs of the model; see :func:`peft_kernels.ops.prompt_lookup`.

        Args:
            batch: from the template's ``encode``, on the parameters' device.
            embeddings: the model's ``nn.Embedding``, which is called, or its weight ``[V, dim]``;
                or the embeddings ``[B, S, dim]`` of ``batch.input_ids``.
            labels: ``[B, S]``, of each of ``batch.input_ids``; the slots' are -100.

        Raises:
            ValueError: a batch of a template with other slots; else as the op.
        """
        if batch.positions.shape[1] != self.length:
            raise ValueError(
                f"batch must be of a template with {self.length} slots; "
                f"got {batch.positions.shape[1]}"
            )
        given = isinstance(embeddings, Tensor) and embeddings.dim() == 3
        return prompt_lookup(
            embeddings if given else embed(embeddings, batch.input_ids),  # type: ignore[arg-type]
            self.prompts(),
            position=batch.positions,
            attention_mask=batch.attention_mask,
            labels=labels,
        )

    def at_mask(self, outputs: Tensor, batch: TemplateBatch) -> Tensor:
        """``[B, L + S, n] -> [B, n]``: the outputs at the mask, or of a causal model at the end.

        Taking the hidden states' there leaves the model's head B rows rather than all.

        Raises:
            ValueError: outputs of another shape.
        """
        if outputs.dim() != 3 or outputs.shape[0] != batch.answer.shape[0]:
            raise ValueError(
                f"outputs must be [{batch.answer.shape[0]}, L + S, n]; "
                f"got shape {tuple(outputs.shape)}"
            )
        rows = torch.arange(outputs.shape[0], device=outputs.device)
        return outputs[rows, batch.answer]

    def scores(self, logits: Tensor, batch: TemplateBatch) -> Tensor:
        """``[B, C]``: the classes' scores, of logits ``[B, L + S, V]`` or, at the mask, ``[B, V]``.

        Raises:
            ValueError: there is no verbalizer; logits of another shape.
        """
        if self.verbalizer is None:
            raise ValueError("verbalizer must be given to PTuning for scores; it has none")
        return self.verbalizer(logits if logits.dim() == 2 else self.at_mask(logits, batch))

    def extra_repr(self) -> str:
        return f"length={self.length}, dim={self.dim}, encoder={self.encoder}"


def _mlp(sizes: list[int], factory: dict[str, Any]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following, **factory), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _check_arguments(
    encoder: str | None,
    hidden_size: int | None,
    mlp_size: int | None,
    num_layers: int,
    dropout: float,
) -> None:
    if hidden_size is not None:
        check_size("hidden_size", hidden_size)
        if encoder is None:
            raise ValueError("hidden_size is of an encoder, and encoder is None")
    if mlp_size is not None:
        check_size("mlp_size", mlp_size)
        if encoder != "lstm":
            raise ValueError(f"mlp_size is of an lstm encoder, and encoder is {encoder}")
    check_size("num_layers", num_layers)
    if num_layers != 2 and encoder != "lstm":
        raise ValueError(f"num_layers is of an lstm encoder, and encoder is {encoder}")
    check_share("dropout", dropout)
    if dropout > 0 and (encoder != "lstm" or num_layers == 1):
        raise ValueError(
            f"dropout is between the layers of an lstm encoder: it must be 0 with encoder "
            f"{encoder} and num_layers {num_layers}; got {dropout}"
        )
