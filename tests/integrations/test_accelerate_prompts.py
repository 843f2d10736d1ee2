"""accelerate(): PEFT's prompts, against the same models as PEFT runs them."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft_prompted import (
    IDS,
    MASK,
    assert_as_peft,
    labels_of,
    make_gpt2,
    make_llama,
    methods,
    models,
    peft,
    prompted,
    run,
    ways_of,
)

import peft_kernels


@models
@methods
def test_as_peft(make, method):
    model = prompted(make, method)
    assert_as_peft(model, ways_of(make, method))
    assert_as_peft(model, ways_of(make, method), **labels_of(model, method))
    with torch.no_grad():
        assert_as_peft(model, ways_of(make, method), attention_mask=None)
    if "token_type_ids" in model.get_base_model().forward.__code__.co_varnames:
        assert_as_peft(model, ways_of(make, method), token_type_ids=IDS % 2)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@methods
def test_generates_as_peft(make, method):
    model = prompted(make, method)
    arguments = {"attention_mask": MASK.flip(1), "max_new_tokens": 5, "do_sample": False}
    arguments["pad_token_id"] = 0
    expected = model.generate(input_ids=IDS, **arguments)
    peft_kernels.accelerate(model)
    assert torch.equal(model.generate(input_ids=IDS, **arguments), expected)


def test_the_report_says_what_serves_what():
    report = peft_kernels.accelerate(prompted(make_llama, "lstm", torch.float32))
    kinds = {layer.name: (layer.kind, layer.backend) for layer in report.layers}
    assert kinds == {
        "": ("peft_model.PeftModelForCausalLM", "cpu"),
        "prompt_encoder.default": ("p_tuning.PromptEncoder", "torch"),
    }
    assert report.summary() == (
        "1 of 2 layers of PEFT's run on peft_kernels (cpu); "
        "1 on PyTorch's operations, and no kernel"
    )
    assert "(model)" in str(report)
    report = peft_kernels.accelerate(prompted(make_llama, "prefix"))
    assert "1 keep PEFT's: no projection (1)" in report.summary()


@pytest.mark.parametrize("method", ["mlp", "lstm", "prefix_mlp"])
def test_an_encoder_runs_again_once_something_changed(method, monkeypatch):
    model = prompted(make_llama, method)
    peft_kernels.accelerate(model)
    encoder = model.prompt_encoder["default"]
    runs = []
    theirs = type(encoder).__bases__[0]
    forward = theirs.forward

    def counted(self, rows):
        runs.append(rows.shape[0])
        return forward(self, rows)

    monkeypatch.setattr(theirs, "forward", counted)
    with torch.no_grad():
        first = run(model)[0][0]
        assert torch.equal(run(model)[0][0], first)
        assert runs == [1]
        encoder.embedding.weight.mul_(-1)
        changed = run(model)[0][0]
        assert not torch.allclose(changed, first) and runs == [1, 1]
    run(model.train())
    assert runs == [1, 1, 1]  # once, whatever the batch
    peft_kernels.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model.eval())[0][0], changed)


def test_other_arguments_are_pefts():
    model = prompted(make_llama, "prompt")
    embeddings = model.word_embeddings(IDS).detach()
    assert_as_peft(model, {"other arguments"}, input_ids=None, inputs_embeds=embeddings)
    assert_as_peft(model, {"other arguments"}, attention_mask=MASK.double())


@pytest.mark.parametrize("method", ["mlp", "prefix_mlp"])
def test_training_gives_the_same_losses(method):
    def losses(accelerated):
        model = prompted(make_gpt2, method)
        if accelerated:
            peft_kernels.accelerate(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(IDS, MASK, labels=IDS).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected, found = losses(False), losses(True)
    torch.testing.assert_close(found, expected)
    assert found[-1] < found[0]


@methods
def test_copies_and_files(method, tmp_path):
    model = prompted(make_llama, method, torch.float32)
    printed, keys = repr(model), list(model.state_dict())
    peft_kernels.accelerate(model)
    assert repr(model) == printed and list(model.state_dict()) == keys
    with torch.no_grad():
        expected = run(model)[0][0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert torch.equal(run(other)[0][0], expected)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(prompted(make_llama, "prompt").base_model.float(),
                                               tmp_path)  # fmt: skip
        peft_kernels.accelerate(again)
        torch.testing.assert_close(run(again.eval())[0][0], expected, rtol=1e-4, atol=1e-5)


# ---- strict=False ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix", "prefix_mlp"])
def test_left_padding_is_no_part_of_the_text(make, method):
    """A padded row is what it is alone; PEFT's isn't."""
    model = prompted(make, method)
    ids = IDS[:2].clone()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    alone = model(ids[1:, 2:]).logits[0]
    theirs = model(ids, attention_mask=mask).logits[1, -4:]
    peft_kernels.accelerate(model, strict=False)
    ours = model(ids, attention_mask=mask)
    torch.testing.assert_close(ours.logits[1, -4:], alone[-4:])
    torch.testing.assert_close(ours.logits[0], model(ids[:1]).logits[0])
    if make is make_gpt2 or method.startswith("prefix"):  # positions are learned, or turn no prefix
        assert not torch.allclose(theirs, alone[-4:], atol=1e-3)
    peft_kernels.accelerate(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, -4:], theirs)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_left_padded_rows_are_generated_as_alone(make):
    model = prompted(make, "prompt")
    ids = IDS[:2].clone()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids[1:, 2:], **arguments)[0, 4:]
    whole = model.generate(input_ids=ids[:1], **arguments)[0]
    peft_kernels.accelerate(model, strict=False)
    found = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    assert torch.equal(found[1, 6:], alone) and torch.equal(found[0], whole)


def test_labels_follow_the_prompt():
    model = prompted(make_llama, "prompt")
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    peft_kernels.accelerate(model, strict=False)
    found = model(IDS, attention_mask=mask, labels=labels).loss
    rows = [model(IDS[i : i + 1, 2 * (i == 1) :], labels=labels[i : i + 1, 2 * (i == 1) :]).loss
            for i in range(4)]  # fmt: skip
    counts = [6, 4, 6, 6]  # a text's first token is predicted from the prompt's last
    expected = sum(loss * count for loss, count in zip(rows, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(found, expected)


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_threads_generate_in_turns(method):
    """PEFT's model leaves the prompt out of one generation as another ends."""
    model = prompted(make_llama, method)
    peft_kernels.accelerate(model)
    arguments = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(i, length):
        return model.generate(input_ids=IDS[i : i + 1], max_new_tokens=length, **arguments)

    calls = [(i, length) for i in range(4) for length in (2, 5, 9)]
    alone = [generate(*call) for call in calls]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda call: generate(*call), calls))
    assert all(map(torch.equal, found, alone))
