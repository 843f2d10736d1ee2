"""P-tuning in transformers' models: templates of soft slots, anchors, input and mask."""

import copy

import pytest
import torch
import torch.nn.functional as F
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

from peft_kernels.integrations.transformers.soft_prompts import add_prompt
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


def make_model(kind):
    if kind == "causal":
        return make("llama")
    config = transformers.BertConfig(**SIZES, intermediate_size=24)
    return transformers.BertForMaskedLM(config).double().eval()


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_labels_of_a_template_s_batch(kind):
    model, rows = make_model(kind), [[4, 6, 11], [12], [5, 6, 7, 8]]
    template = Template.parse("[P P] {x} [P] ab [MASK]", Letters(), model=kind)
    add_prompt(model, PTuning(template, 16, dtype=torch.float64))
    batch = template.encode(rows)
    labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
    places = torch.full((3, labels.shape[1] + 3), -100)
    for row, slots in enumerate(batch.positions):
        of_text = [i for i in range(places.shape[1]) if i not in slots.tolist()]
        places[row, of_text] = labels[row]
    logits = model(template=batch).logits
    said, wanted = (logits[:, :-1], places[:, 1:]) if kind == "causal" else (logits, places)
    expected = F.cross_entropy(said.flatten(0, 1), wanted.flatten())
    for given in (labels, places):
        assert_close(model(template=batch, labels=given).loss, expected)
    for shape in ([3], [3, 4], [3, 2, 4]):
        with pytest.raises(ValueError, match=r"labels must be \[3, .*F\.cross_entropy\(prompt\.sc"):
            model(template=batch, labels=torch.ones(shape, dtype=torch.long))


def test_labels_of_other_shapes_are_named_without_a_template_too():
    model = make_model("masked")
    add_prompt(model, PTuning(Template([Slots(L), Input("x")], model="causal"), 16).double())
    with pytest.raises(ValueError, match=r"labels must be \[2, 5\], one for each token.*got \[2\]"):
        model(tokens(2, 5), labels=torch.ones(2, dtype=torch.long))


def test_as_many_classes_as_tokens_are_classes():
    """Scores [B, C] of a classifier of several labels, on a text of C tokens."""
    config = transformers.BertConfig(
        **SIZES, intermediate_size=24, num_labels=5, problem_type="multi_label_classification"
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    add_prompt(model, PTuning(Template([Slots(L), Input("x")], model="causal"), 16).double())
    classes = torch.randint(0, 2, (2, 5)).double()
    out = model(tokens(2, 5), labels=classes)
    assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, classes))


@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_templates(kind, side, encoder):
    model = make_model(kind)
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
