"""P-tuning in models of transformers: it learns in a pretrained one, and encodes as PEFT does."""

import importlib.util
import itertools
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_gpt2

from peft_kernels.nn import PTuning, Template, Verbalizer
from peft_kernels.nn._template import Anchor, Input, Mask, Slots

transformers = pytest.importorskip("transformers")


# -- a pretrained masked model: rxnmapper's ALBERT, which has read chemical reactions


def model_folder():
    """Where the wheel's model lies; its package is only looked for, as importing it needs RDKit."""
    spec = importlib.util.find_spec("rxnmapper")
    if spec is None or spec.origin is None:
        pytest.skip("rxnmapper isn't installed")
    return Path(spec.origin).parent / "models/transformers/albert_heads_8_uspto_all_1310k"


class Smiles:
    """The model's tokens: atoms and bonds of a molecule's SMILES, one by one."""

    padding_side = "right"

    def __init__(self, vocabulary):
        self.ids = {token: i for i, token in enumerate(vocabulary.read_text().split())}
        self.pad_token_id, self.mask_token_id = self.ids["[PAD]"], self.ids["[MASK]"]

    def encode(self, text, add_special_tokens=True):
        tokens = re.findall(r"\[[^\]]+\]|Br|Cl|>>|\S", text)
        ids = [self.ids.get(token, self.ids["[UNK]"]) for token in tokens]
        return [self.ids["[CLS]"], *ids, self.ids["[SEP]"]] if add_special_tokens else ids


def molecules():
    """Chains that end in an amine or an alcohol, and which: some to learn from, and others."""
    parts = itertools.product(range(1, 5), ("", "C(C)", "C(Cl)", "C(F)"), range(3))
    chains = sorted({"C" * left + branch + "C" * right for left, branch, right in parts})
    random.Random(0).shuffle(chains)

    def both(chains):
        texts = [chain + group for chain in chains for group in "NO"]
        return texts, torch.tensor([0, 1] * len(chains))

    return both(chains[:16]), both(chains[16:])


@pytest.mark.long
@pytest.mark.parametrize(("encoder", "rate"), [("lstm", 5e-3), ("mlp", 1e-3), (None, 2e-2)])
def test_learns_in_a_pretrained_masked_model(encoder, rate):
    folder = model_folder()
    tokenizer = Smiles(folder / "vocab.txt")
    transformers.logging.set_verbosity_error()  # it reports the other head's weights as unused
    model = transformers.AlbertForMaskedLM.from_pretrained(folder, local_files_only=True)
    model.eval().requires_grad_(False)
    embedding = model.get_input_embeddings()
    template = Template.parse("{x} >> [P P] [MASK] [P]", tokenizer)
    words = Verbalizer.parse({"amine": "N", "alcohol": "O"}, tokenizer)
    prompt = PTuning(template, embedding.embedding_dim, encoder=encoder, verbalizer=words)

    def scores(batch):
        inputs = prompt(batch, embedding)
        hidden = model.albert(
            inputs_embeds=inputs.embeddings, attention_mask=inputs.attention_mask
        ).last_hidden_state
        return prompt.scores(model.predictions(prompt.at_mask(hidden, batch)), batch)

    def accuracy(texts, classes):
        with torch.no_grad():
            return (scores(template.encode(texts)).argmax(1) == classes).double().mean().item()

    seen, unseen = molecules()
    before = accuracy(*unseen)
    optimizer = torch.optim.Adam(prompt.parameters(), lr=rate)
    batch = template.encode(seen[0])
    for _ in range(30):
        loss = F.cross_entropy(scores(batch), seen[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompt.eval()
    after = accuracy(*unseen)
    assert all(p.grad is None for p in model.parameters())
    assert before < 0.7 and after > 0.8


# -- a causal model


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_a_causal_model(side):
    model = make_gpt2().double().eval().requires_grad_(False)
    pieces = [Slots(2), Input("x"), Anchor((5, 6)), Slots(1), Mask()]
    template = Template(pieces, model="causal", padding_side=side)
    prompt = PTuning(template, 16, verbalizer=Verbalizer({"a": 7, "b": 8}), dtype=torch.float64)

    def scores(rows):
        batch = template.encode(rows)
        inputs = prompt(batch, model.get_input_embeddings())
        out = model(
            inputs_embeds=inputs.embeddings,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
        )
        return prompt.scores(out.logits, batch)

    rows = [[9, 3], [12, 4, 17, 2, 20], [11]]
    together = scores(rows)
    for b, row in enumerate(rows):
        torch.testing.assert_close(together[b], scores([row])[0], rtol=1e-11, atol=1e-12)
    together.square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in prompt.parameters())


# -- PEFT's prompt encoders


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_encodes_as_peft(encoder):
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=5,
        num_virtual_tokens=4,
        token_dim=6,
        num_transformer_submodules=1,
    )
    theirs = peft.PromptEncoder(config)
    template = Template([Slots(4), Input("x")], model="causal")
    ours = PTuning(template, 6, encoder=encoder, hidden_size=5)
    names = {"embedding.weight": "slots"}
    state = {
        names.get(key, key.replace("_head", "")): value
        for key, value in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    expected = theirs(torch.arange(4).unsqueeze(0))
    torch.testing.assert_close(ours.prompts(), expected)
