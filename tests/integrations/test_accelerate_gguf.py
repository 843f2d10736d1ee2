"""LoRA of PEFT's over a GGUF file's codes: trained on the kernel, merged only where it can be."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.nn import QuantizedLinear

peft = pytest.importorskip("peft")
from gguf_files import make_model, smollm2, transformers, write_gguf  # noqa: E402  peft may be missing

KERNEL = "lora_linear"
BATCH = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
STEPS = 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(model, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def dequantised(model):
    """The same model of nn.Linear."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent, own = name.rsplit(".", 1) if "." in name else ("", name)
            setattr(plain.get_submodule(parent), own, module.dequantized())
    return plain


def losses(model, ids=BATCH, steps=STEPS, lr=1e-2):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.fixture
def model(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q4_0")
    return peft_kernels.load_gguf(make_model(), path)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["names", "all-linear"])
def test_ten_steps_are_those_of_the_weights_dequantised(model, targets):
    expected = losses(with_lora(dequantised(model), target_modules=targets))
    tuned = with_lora(model, target_modules=targets)
    frozen = [p for p in tuned.parameters() if not p.requires_grad]
    before = [p.clone() for p in frozen]
    report = peft_kernels.accelerate(tuned)
    found = losses(tuned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected[-1] < expected[0] - 0.5
    assert report.counts() == {KERNEL: 2 * 7 * STEPS} and not report.missing()
    assert all(torch.equal(*pair) for pair in zip(before, frozen, strict=True))


@pytest.mark.long
def test_fifty_steps_of_smollm2():
    path = smollm2()
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = peft_kernels.load_gguf(transformers.AutoModelForCausalLM.from_config(config), path)
    plain = with_lora(dequantised(model), r=16, target_modules="all-linear")
    tuned = with_lora(model, r=16, target_modules="all-linear")
    report = peft_kernels.accelerate(tuned)
    ids = torch.arange(1000, 1016)[None]
    found, expected = (losses(one, ids, 50, 2e-4) for one in (tuned, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected[-1] < 0.2 * expected[0]
    assert report.counts() == {KERNEL: 50 * 30 * 7}


def test_with_embeddings_in_codes(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(tied=True), "Q4_0")
    floats = peft_kernels.load_gguf(make_model(tied=True), path)
    codes = peft_kernels.load_gguf(make_model(tied=True), path, embeddings="codes")
    expected, tuned = losses(with_lora(dequantised(floats))), with_lora(codes)
    peft_kernels.accelerate(tuned)
    tuned.enable_input_require_grads()
    tuned.gradient_checkpointing_enable()
    torch.testing.assert_close(losses(tuned.train()), expected, rtol=0, atol=1e-3)


def test_without_accelerate_it_is_pefts_own_layer(model):
    expected = losses(with_lora(dequantised(model)))
    torch.testing.assert_close(losses(with_lora(model)), expected, rtol=0, atol=1e-3)


def test_a_saved_adapter_loads_over_the_codes_and_over_floats(model, tmp_path):
    plain, bare = dequantised(model), copy.deepcopy(model)
    tuned = with_lora(model, init_lora_weights=False)
    tuned.save_pretrained(tmp_path / "adapter")
    peft_kernels.accelerate(tuned)
    with torch.no_grad():
        expected = tuned.eval()(BATCH).logits
        for base in (plain, bare):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            torch.testing.assert_close(loaded(BATCH).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused_and_changes_nothing(model, safe):
    tuned = with_lora(model, init_lora_weights=False).eval()
    peft_kernels.accelerate(tuned)
    with torch.no_grad():
        expected = tuned(BATCH).logits
        with pytest.raises(TypeError, match=r"can't be written.*dequantized"):
            tuned.merge_adapter(safe_merge=safe)
        assert torch.equal(tuned(BATCH).logits, expected)


def test_unload_gives_the_model_back(model):
    with torch.no_grad():
        expected = model(BATCH).logits
        tuned = with_lora(model, init_lora_weights=False)
        peft_kernels.accelerate(tuned)
        assert not torch.equal(tuned(BATCH).logits, expected)
        with tuned.disable_adapter():
            assert torch.equal(tuned(BATCH).logits, expected)
        back = tuned.unload()
        assert torch.equal(back(BATCH).logits, expected)
    assert type(back.model.layers[0].mlp.up_proj) is QuantizedLinear


def test_dora_over_the_file(model):
    plain = dequantised(model)
    found = with_lora(model, use_dora=True, init_lora_weights=False)
    expected = with_lora(plain, use_dora=True, init_lora_weights=False)
    report = peft_kernels.accelerate(found)
    with torch.no_grad():
        torch.testing.assert_close(
            found(BATCH).logits, expected(BATCH).logits, rtol=1e-4, atol=1e-4
        )
    assert set(report.counts()) == {"dora_linear"}


def test_our_own_codes_under_peft():
    torch.manual_seed(0)
    net = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 4))
    tuned = with_lora(net, target_modules=["0", "2"], init_lora_weights=False)
    report = peft_kernels.accelerate(tuned)
    x = torch.randn(5, 64)
    y = tuned(x)
    assert report.counts() == {KERNEL: 2}
    peft_kernels.restore(tuned)
    torch.testing.assert_close(y, tuned(x), rtol=1e-5, atol=1e-5)
