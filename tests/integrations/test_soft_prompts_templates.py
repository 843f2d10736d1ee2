"""P-tuning in transformers' models: templates of soft slots, anchors, input and mask."""

import copy

import pytest
import torch
from prefix_models import (
    SIZES,
    assert_close,
    gradients,
    tokens,
    transformers,
)
from prompt_models import (
    L,
    S,
    make,
    padded,
    runs_of_prompt,
)

from peft_kernels.integrations.soft_prompts import add_prompt
from peft_kernels.nn import PTuning, Template, Verbalizer
from peft_kernels.nn._template import Anchor, Input, Mask, Slots


class Letters:
    """One token a letter, as an object that encodes."""

    mask_token_id, pad_token_id, padding_side = 3, 0, "right"

    def encode(self, text, add_special_tokens=True):
        ids = [5 + ord(c) % 26 for c in text if c != " "]
        return [1, *ids, 2] if add_special_tokens else ids


def by_hand(model, template, prompt, rows):
    """Scores of each row by itself, its embeddings put together piece by piece."""
    scores = []
    for row in rows:
        vectors, answer = [], None
        slots = iter(prompt.prompts()[0])
        layout = [*template.before, *template.pieces, *template.after]
        for piece in layout:
            if isinstance(piece, Slots):
                vectors += [next(slots) for _ in range(piece.count)]
                continue
            ids = [piece] if isinstance(piece, int) else []
            ids = list(piece.ids) if isinstance(piece, Anchor) else ids
            ids = list(row) if isinstance(piece, Input) else ids
            if isinstance(piece, Mask):
                ids, answer = [template.mask_id], len(vectors)
            vectors += list(model.get_input_embeddings().weight[torch.tensor(ids)])
        logits = model(inputs_embeds=torch.stack(vectors)[None]).logits
        at = len(vectors) - 1 if answer is None else answer
        scores.append(prompt.verbalizer(logits[0, at]))
    return torch.stack(scores)


@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_templates(kind, side, encoder):
    if kind == "masked":
        config = transformers.BertConfig(**SIZES, intermediate_size=24)
        model = transformers.BertForMaskedLM(config).double().eval()
    else:
        model = make("llama")
    reader = Letters()
    reader.padding_side = side
    template = Template.parse("[P P] {x} [P] ab [MASK]", reader, model=kind)
    prompt = PTuning(
        template,
        16,
        encoder=encoder,
        verbalizer=Verbalizer({"yes": [7, 9], "no": 8}),
        dtype=torch.float64,
    )
    rows = [[4, 6, 11], [12], [5, 6, 7, 8]]
    wanted = by_hand(model, template, prompt, rows)
    add_prompt(model, prompt)
    batch = template.encode(rows)
    found = prompt.scores(model(template=batch).logits, batch)
    assert_close(found, wanted)
    found.square().sum().backward()
    grads = gradients(model)
    assert grads and all(name.startswith("soft_prompt.") for name in grads)
    with pytest.raises(ValueError, match="input_ids must not be given besides"):
        model(tokens(3, S), template=batch)


def test_p_tuning_without_a_template_is_a_front_prompt():
    template = Template([Slots(L), Input("x")], model="causal")
    prompt = PTuning(template, 16, encoder="lstm", dtype=torch.float64)
    one = make("llama")
    other = copy.deepcopy(one)
    add_prompt(one, prompt)
    add_prompt(other, copy.deepcopy(prompt), as_prefix=False)
    runs = runs_of_prompt(one)
    inputs = padded("left")
    losses = [model(**inputs).loss for model in (one, other)]
    assert runs == [(1, L - 1)]
    for loss in losses:
        loss.backward()
    assert_close(*losses)
    assert_close(gradients(one), gradients(other))
