"""nn.PTuning: templates over token ids, encoders, verbalizers, and what is kept between calls."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from peft_kernels.nn import PTuning, Template, Verbalizer
from peft_kernels.nn._template import Anchor, Input, Mask, Slots

DIM = 6
TEXT = "[P P P] {x} [P] ? [MASK]"
ENCODERS = {
    "none": {"encoder": None},
    "mlp": {"encoder": "mlp", "hidden_size": 5},
    "lstm": {"encoder": "lstm", "hidden_size": 4, "mlp_size": 7},
}


class Words:
    """A tokenizer of Hugging Face's kind: a token for each word with the space before it."""

    mask_token_id, pad_token_id, padding_side = 3, 0, "right"

    def __init__(self, **attributes):
        self.ids = {}
        vars(self).update(attributes)

    def encode(self, text, add_special_tokens=True):
        words = re.findall(r" ?[^ ]+| ", text)
        ids = [self.ids.setdefault(word, 4 + len(self.ids)) for word in words]
        return [1, *ids, 2] if add_special_tokens else ids

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [self.encode(text, add_special_tokens) for text in texts]}

    def read(self, ids):
        words = {number: word for word, number in self.ids.items()}
        words |= {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<mask>"}
        return [words[i] for i in ids]


def rows(batch, tokenizer):
    """What the model will see: each row's tokens with "P" at the slots."""
    total = batch.input_ids.shape[1] + batch.positions.shape[1]
    found = []
    for ids, positions in zip(batch.input_ids.tolist(), batch.positions.tolist(), strict=True):
        words = iter(tokenizer.read(ids))
        found.append(["P" if i in positions else next(words) for i in range(total)])
    return found


# -- templates


def test_the_papers_template():
    tokenizer = Words()
    template = Template.parse(TEXT, tokenizer)
    question = Anchor(tuple(tokenizer.encode(" ?", add_special_tokens=False)))
    assert template.pieces == (Slots(3), Input("x", " "), Slots(1), question, Mask())
    assert (template.length, template.fixed, template.names) == (4, 8, ("x",))
    batch = template.encode(["great", "so so bad"])
    assert rows(batch, tokenizer) == [
        ["<s>", "P", "P", "P", " great", "P", " ?", "<mask>", "</s>", "<pad>", "<pad>"],
        ["<s>", "P", "P", "P", " so", " so", " bad", "P", " ?", "<mask>", "</s>"],
    ]
    assert batch.attention_mask.tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert batch.answer.tolist() == [7, 9]
    assert all(tensor.dtype == torch.int64 for tensor in batch)


def test_padding_on_the_left():
    tokenizer = Words(padding_side="left")
    batch = Template.parse("{x} [P*2] [MASK]", tokenizer).encode(["a b", "c"])
    assert rows(batch, tokenizer) == [
        ["<s>", "a", " b", "P", "P", "<mask>", "</s>"],
        ["<pad>", "<s>", "c", "P", "P", "<mask>", "</s>"],
    ]
    assert batch.attention_mask.tolist() == [[1] * 5, [0] + [1] * 4]
    assert batch.answer.tolist() == [5, 5]


@pytest.mark.parametrize("text", ["[P P] {x} so [P]", "[P P] {x} so [P] [MASK]"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_model_answers_at_the_last_token(text, side):
    tokenizer = Words(padding_side=side, mask_token_id=None)
    batch = Template.parse(text, tokenizer, model="causal").encode(["a", "b c"])
    short, long = ["<s>", "P", "P", " a", " so", "P"], ["<s>", "P", "P", " b", " c", " so", "P"]
    padded = ["<pad>", *short] if side == "left" else [*short, "<pad>"]
    assert rows(batch, tokenizer) == [padded, long]
    assert batch.answer.tolist() == [6 if side == "left" else 5, 6]


def test_token_ids_instead_of_texts():
    tokenizer = Words()
    template = Template.parse(TEXT, tokenizer)
    texts = template.encode(["great film", "bad"])
    ids = [tokenizer.encode(f" {text}", False) for text in ("great film", "bad")]
    for given in (ids, [torch.tensor(row) for row in ids], ["great film", ids[1]]):
        for found, expected in zip(template.encode(given), texts, strict=True):
            assert torch.equal(found, expected)
    pieces = Template(template.pieces, mask_id=3, specials=([1], [2]))
    for found, expected in zip(pieces.encode(ids), texts, strict=True):
        assert torch.equal(found, expected)


def test_the_input_is_cut_and_the_template_is_not():
    tokenizer = Words()
    template = Template.parse(TEXT, tokenizer)
    batch = template.encode(["a b c d e", "f"], max_length=10)
    assert rows(batch, tokenizer)[0] == ["<s>", *"PPP", " a", " b", "P", " ?", "<mask>", "</s>"]
    assert batch.answer.tolist() == [8, 7]
    with pytest.raises(ValueError, match=r"max_length must be at least 9.* 8 tokens; got 8"):
        template.encode(["a"], max_length=8)


def test_several_inputs_are_cut_from_the_longest():
    tokenizer = Words()
    template = Template.parse("{premise} [P] {claim} [MASK]", tokenizer, add_special_tokens=False)
    batch = template.encode(["a b c d", "a"], ["x y", "u v w z"], max_length=6)
    assert rows(batch, tokenizer) == [
        ["a", " b", "P", " x", " y", "<mask>"],
        ["a", "P", " u", " v", " w", "<mask>"],
    ]


def test_a_tokenizer_that_puts_its_own_space_gets_none():
    class Sentence(Words):
        def encode(self, text, add_special_tokens=True):
            return super().encode(" " + text, add_special_tokens)

    tokenizer = Sentence()
    batch = Template.parse("[P] {x} is [MASK]", tokenizer).encode(["it"])
    assert rows(batch, tokenizer)[0] == ["<s>", "P", " it", " is", "<mask>", "</s>"]


def test_no_space_is_put_where_none_is():
    tokenizer = Words()
    batch = Template.parse("[P]{x}: [MASK]", tokenizer).encode(["it"])
    assert rows(batch, tokenizer)[0] == ["<s>", "P", "it", ":", "<mask>", "</s>"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("[P P] it was [MASK]", {}, r"must have a place for the input, e\.g\. \{x\}; it has none"),
        ("[P P] {x}", {}, r"masked model must have one \[MASK\]; it has 0"),
        ("{x} [MASK] [MASK]", {}, r"masked model must have one \[MASK\]; it has 2"),
        ("{x} [MASK] [P]", {"model": "causal"}, "causal model must have its mask last"),
        ("{x} {x} [MASK]", {}, "must name each input once; got x, x"),
        ("{x y} {z} [MASK]", {}, r"must be made of .*; got '\{x y\}'"),
        ("{x} [P Q] [MASK]", {}, r"must be made of .*; got '\[P Q\]'"),
        ("{x} [P*0] [MASK]", {}, r"at least one slot in brackets; got '\[P\*0\]'"),
        ("{x} [MASK]", {"model": "seq2seq"}, "model must be one of masked, causal; got 'seq2seq'"),
    ],
)
def test_bad_templates(text, options, message):
    with pytest.raises(ValueError, match=message):
        Template.parse(text, Words(), **options)


def test_a_masked_model_needs_the_tokenizers_mask():
    with pytest.raises(ValueError, match="mask_id must be given for a masked model"):
        Template.parse(TEXT, Words(mask_token_id=None))


def test_bad_rows():
    template = Template.parse(TEXT, Words())
    for inputs, message in [
        ((), "inputs must be x; got 0 of them"),
        ((["a"], ["b"]), "inputs must be x; got 2 of them"),
        (([],), r"the same rows, at least one; got \[0\]"),
        (("a text",), "list of rows each; got a single text"),
        (([[0.5]],), r"x must be texts or lists of token ids; got \[0\.5\]"),
        (([torch.tensor(4)],), "x must be texts or lists of token ids"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            template.encode(*inputs)
    with pytest.raises(ValueError, match="x must be token ids: the template has no tokenizer"):
        Template(template.pieces, mask_id=3).encode(["a"])
    with pytest.raises(ValueError, match="must have a token in each row"):
        Template([Input("x")], model="causal").encode([[]])


# -- verbalizers


def test_scores_of_classes():
    logits = torch.randn(4, 9)
    ids = {"good": [5, 2], "bad": 7}
    mean, total = Verbalizer(ids), Verbalizer(ids, reduction="sum")
    assert mean.labels == ("good", "bad")
    expected = torch.stack([(logits[:, 5] + logits[:, 2]) / 2, logits[:, 7]], 1)
    torch.testing.assert_close(mean(logits), expected)
    joint = logits.softmax(-1)
    probabilities = torch.stack([joint[:, 5] + joint[:, 2], joint[:, 7]], 1)
    torch.testing.assert_close(
        total(logits).softmax(-1), probabilities / probabilities.sum(1, keepdim=True)
    )
    assert mean(logits.bfloat16()).dtype == torch.float32
    assert not mean.state_dict()


def test_verbalizers_are_read_from_words():
    tokenizer = Words()
    found = Verbalizer.parse({"+": [" good", " great"], "-": " bad"}, tokenizer)
    good, great, bad = (tokenizer.ids[word] for word in (" good", " great", " bad"))
    assert found.ids.tolist() == [[good, great], [bad, bad]]
    assert found.real.tolist() == [[True, True], [True, False]]
    with pytest.raises(ValueError, match="must be a single token each; 'so so' is"):
        Verbalizer.parse({"?": "so so"}, tokenizer)


def test_bad_verbalizers():
    for ids, message in [
        ({}, "ids must have at least one label; got none"),
        ({"a": []}, r"ids must be token ids for each label; 'a' has \[\]"),
        ({"a": -1}, r"'a' has \[-1\]"),
        ({"a": 5, "b": [2, 5]}, "token 5 is of 'a' and 'b'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Verbalizer(ids)
    with pytest.raises(ValueError, match="logits must be of more than 5 tokens; got 4"):
        Verbalizer({"a": 5})(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum; got 'max'"):
        Verbalizer({"a": 5}, reduction="max")


# -- the module


class Model(nn.Module):
    """A frozen masked model, small enough to train on: a bidirectional mean, and a head."""

    def __init__(self, vocabulary=30):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, DIM)
        self.inner = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, vocabulary)
        self.double().requires_grad_(False)

    def forward(self, inputs):
        real = inputs.attention_mask.double().unsqueeze(-1)
        places = torch.sin(inputs.position_ids.double()).unsqueeze(-1)
        hidden = torch.tanh(self.inner(inputs.embeddings) + places) * real
        return self.head(
            inputs.embeddings + 3 * hidden.sum(1, keepdim=True) / real.sum(1, keepdim=True)
        )


def a_template(text=TEXT, **options):
    return Template.parse(text, Words(), **options)


def a_prompt(encoder="lstm", text=TEXT, **options):
    options = {"dtype": torch.float64, "verbalizer": Verbalizer({"a": 5, "b": [6, 7]})} | options
    return PTuning(a_template(text), DIM, **ENCODERS[encoder], **options)


TEXTS = ["one", "two three four", "five six"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_slots_are_encoded_and_tokens_are_the_models(encoder):
    prompt, model, batch = a_prompt(encoder), Model(), a_template().encode(TEXTS)
    out = prompt(batch, model.embedding)
    h = prompt.slots
    if encoder == "lstm":
        h = prompt.lstm(h.unsqueeze(1))[0].squeeze(1)
        h = prompt.mlp[2](torch.relu(prompt.mlp[0](h)))
    if encoder == "mlp":
        h = torch.relu(prompt.mlp[2](torch.relu(prompt.mlp[0](h))))
        h = prompt.mlp[4](h)
    for b in range(3):
        torch.testing.assert_close(out.embeddings[b, batch.positions[b]], h)
        others = [j for j in range(out.embeddings.shape[1]) if j not in batch.positions[b]]
        assert torch.equal(out.embeddings[b, others], model.embedding(batch.input_ids[b]))
    table, looked_up = model.embedding.weight, model.embedding(batch.input_ids)
    for given in (table, looked_up):
        assert torch.equal(prompt(batch, given).embeddings, out.embeddings)
    labels = torch.randint(0, 9, batch.input_ids.shape)
    found = prompt(batch, table, labels=labels).labels
    assert (found.gather(1, batch.positions) == -100).all()
    assert (found >= 0).sum() == labels.numel()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_unpadded_rows(side):
    prompt, model = a_prompt(), Model()
    template = Template.parse(TEXT, Words(padding_side=side))
    together = template.encode(TEXTS)
    out = prompt(together, model.embedding)
    scores = prompt.scores(model(out), together)
    for b, text in enumerate(TEXTS):
        alone = template.encode([text])
        expected = prompt(alone, model.embedding)
        real = out.attention_mask[b] == 1
        assert torch.equal(out.embeddings[b, real], expected.embeddings[0])
        assert torch.equal(out.position_ids[b, real], expected.position_ids[0])
        torch.testing.assert_close(scores[b], prompt.scores(model(expected), alone)[0])


@pytest.mark.parametrize("text", [TEXT, "{x} [P] [MASK]"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_everything_trained_gets_a_gradient_and_nothing_frozen_does(encoder, text):
    prompt, model, batch = a_prompt(encoder, text), Model(), a_template(text).encode(TEXTS)
    loss = prompt.scores(model(prompt(batch, model.embedding)), batch).square().sum()
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    trained = {n: p for n, p in prompt.named_parameters() if p.requires_grad}
    assert len(trained) == {"none": 1, "mlp": 7, "lstm": 21}[encoder] - (
        4 if encoder == "lstm" and prompt.length == 1 else 0
    )
    for name, parameter in trained.items():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients(encoder):
    prompt, batch = a_prompt(encoder, "[P] {x} [P] [MASK]"), None
    batch = a_template("[P] {x} [P] [MASK]").encode(["one", "two three"])
    embeddings = torch.randn(*batch.input_ids.shape, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():  # away from the corners of the ReLUs
        prompt.slots.mul_(2)
    names = [name for name, _ in prompt.named_parameters()]

    def run(embeddings, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(prompt, given, (batch, embeddings)).embeddings

    assert torch.autograd.gradcheck(run, (embeddings, *prompt.parameters()))


def test_outputs_at_the_mask():
    prompt, batch = a_prompt(), a_template().encode(TEXTS)
    total = batch.input_ids.shape[1] + prompt.length
    logits = torch.randn(3, total, 30)
    picked = prompt.at_mask(logits, batch)
    assert torch.equal(picked, torch.stack([logits[b, batch.answer[b]] for b in range(3)]))
    assert torch.equal(prompt.scores(logits, batch), prompt.verbalizer(picked))
    assert torch.equal(prompt.scores(picked, batch), prompt.verbalizer(picked))


def test_the_encoders_of_the_paper_and_of_the_peers():
    def count(dim, **options):
        prompt = PTuning(a_template("[P*9] {x} [MASK]"), dim, device="meta", **options)
        return sum(p.numel() for p in prompt.parameters())

    dim, slots = 8, 9 * 8
    lstm = sum(p.numel() for p in nn.LSTM(8, 4, 2, bidirectional=True).parameters())
    assert count(dim) == slots + lstm + 2 * (dim * dim + dim)
    assert count(dim, encoder=None) == slots
    assert count(dim, encoder="mlp") == slots + 3 * (dim * dim + dim)
    wide = sum(p.numel() for p in nn.LSTM(8, 8, 2, bidirectional=True).parameters())
    assert count(dim, hidden_size=8, mlp_size=8) == slots + wide + (16 * 8 + 8) + (8 * 8 + 8)
    assert count(dim, hidden_size=8) == slots + wide + (16 * 16 + 16) + (16 * 8 + 8)


def test_starts_as_given():
    init = torch.randn(4, DIM)
    assert torch.equal(PTuning(a_template(), DIM, init=init).slots, init)
    assert PTuning(a_template("[P*200] {x} [MASK]"), 50).slots.std() > 0.9
    assert PTuning(a_template("[P*200] {x} [MASK]"), 50, encoder=None).slots.std() < 0.03


def counted(prompt):
    """Counts how often the encoder runs."""
    runs, encoded = [], prompt._encoded
    prompt._encoded = lambda: runs.append(1) or encoded()
    return runs


def test_the_output_is_kept_in_eval_until_a_parameter_changes():
    prompt = a_prompt().eval()
    runs = counted(prompt)
    with torch.no_grad():
        first = prompt.prompts()
        assert torch.equal(prompt.prompts(), first) and len(runs) == 1
        changes = [
            lambda: prompt.slots.add_(1),
            lambda: prompt.lstm.weight_ih_l0.mul_(2),
            lambda: prompt.mlp[2].bias.add_(1),
            lambda: prompt.load_state_dict(a_prompt().state_dict()),
            lambda: setattr(prompt, "slots", nn.Parameter(torch.ones_like(prompt.slots))),
        ]
        for count, change in enumerate(changes, 2):
            change()
            second = prompt.prompts()
            assert len(runs) == count
            assert not torch.equal(first, second)
            first = second
        prompt.slots.data.add_(1)
        prompt.train().eval()
        assert not torch.equal(prompt.prompts(), first)


def test_nothing_is_kept_where_it_would_be_wrong():
    prompt = a_prompt(dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(prompt.prompts(), prompt.prompts())  # training: dropout is drawn
    prompt.eval()
    with torch.no_grad():
        kept = prompt.prompts()
    asked = prompt.prompts()
    assert asked.requires_grad and not kept.requires_grad
    torch.testing.assert_close(asked, kept)
    prompt.requires_grad_(False)
    runs = counted(prompt)
    prompt.prompts()
    assert not runs  # nothing asks for a gradient, and nothing has changed
    with torch.autocast("cpu", torch.bfloat16):
        prompt.float().prompts()
    assert prompt.prompts().dtype == torch.float32


def test_what_inference_mode_has_kept_serves_others():
    prompt, embeddings = a_prompt().eval().requires_grad_(False), nn.Embedding(30, DIM).double()
    batch = a_template().encode(TEXTS)
    with torch.inference_mode():
        prompt.prompts()
    prompt(batch, embeddings).embeddings.sum().backward()
    assert embeddings.weight.grad is not None


def test_copies_and_files():
    prompt = a_prompt().eval()
    with torch.no_grad():
        expected = prompt.prompts()
    for other in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert other._kept._kept is None
        torch.testing.assert_close(other.prompts(), expected)
    assert all(name.startswith(("slots", "lstm.", "mlp.")) for name in prompt.state_dict())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_resumed_is_never_stopped(encoder, tmp_path):
    model, batch = Model(), a_template().encode(TEXTS)
    classes = torch.tensor([0, 1, 1])

    def started():
        prompt = a_prompt(encoder)
        return prompt, torch.optim.AdamW(prompt.parameters(), lr=0.02)

    def train(prompt, optimizer, steps):
        for _ in range(steps):
            scores = prompt.scores(model(prompt(batch, model.embedding)), batch)
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, classes).backward()
            optimizer.step()

    prompt, optimizer = started()
    train(prompt, optimizer, 3)
    torch.save([prompt.state_dict(), optimizer.state_dict()], tmp_path / "state")
    halfway = prompt.slots.detach().clone()
    train(prompt, optimizer, 3)
    resumed, its_optimizer = started()
    states = torch.load(tmp_path / "state")
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    train(resumed, its_optimizer, 3)
    assert not torch.equal(prompt.slots, halfway)
    for name, value in prompt.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_compiles():
    prompt, batch = a_prompt("mlp"), a_template().encode(TEXTS)
    table = torch.randn(30, DIM, dtype=torch.float64)
    compiled = torch.compile(prompt, fullgraph=True, backend="eager")
    for mode in (True, False):
        prompt.train(mode)
        with torch.no_grad():
            assert torch.equal(compiled(batch, table).embeddings, prompt(batch, table).embeddings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "gru"}, "encoder must be one of mlp, lstm; got 'gru'"),
        ({"encoder": None, "hidden_size": 4}, "hidden_size is of an encoder"),
        ({"encoder": "mlp", "mlp_size": 4}, "mlp_size is of an lstm encoder, and encoder is mlp"),
        ({"encoder": "mlp", "num_layers": 3}, "num_layers is of an lstm encoder"),
        ({"encoder": "mlp", "dropout": 0.1}, r"must be 0 with encoder mlp.*; got 0\.1"),
        ({"num_layers": 1, "dropout": 0.1}, r"num_layers 1; got 0\.1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1\.0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1; got 0"),
        ({"std": 0.0}, r"std must be above 0; got 0\.0"),
        ({"init": torch.zeros(3, DIM)}, r"init must have shape \(4, 6\); got \(3, 6\)"),
        ({"template": a_template("{x} [MASK]")}, r"at least one soft slot, e\.g\. \[P\]"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PTuning(**{"template": a_template(), "dim": DIM} | options)


def test_bad_batches():
    prompt, batch = a_prompt(verbalizer=None), a_template("[P] {x} [MASK]").encode(TEXTS)
    with pytest.raises(ValueError, match="batch must be of a template with 4 slots; got 1"):
        prompt(batch, torch.zeros(30, DIM))
    with pytest.raises(
        ValueError, match=r"outputs must be \[3, L \+ S, n\]; got shape \(2, 5, 7\)"
    ):
        prompt.at_mask(torch.zeros(2, 5, 7), batch)
    with pytest.raises(ValueError, match="verbalizer must be given to PTuning for scores"):
        prompt.scores(torch.zeros(3, 9), batch)
