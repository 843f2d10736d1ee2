"""What PEFT does to its LoRA models, done to an accelerated one beside the same model as PEFT's.

The kinds of models are those of PEFT's own suite: custom ones, decoders, encoders, and an encoder
with a decoder. Every case sees calls of kernels.
"""

import copy
import pickle

import pytest
import torch
from peft_pairs import GENERATES, MODELS, TRANSFORMERS, Pair, config, inputs_of, make_base, run

import peft_kernels

peft = pytest.importorskip("peft")
helpers = pytest.importorskip("peft.helpers")
hotswap = pytest.importorskip("peft.utils.hotswap")

pytestmark = pytest.mark.filterwarnings("ignore")
kinds = pytest.mark.parametrize("kind", MODELS)
NAMES = ["other", "__base__", "default", "other"]


@kinds
@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"r": 2, "rank_pattern": {".*": 5}}, {"alpha_pattern": {".*": 3}},
    {"lora_dropout": 0.5}, {"bias": "all"}, {"use_dora": True}, {"init_lora_weights": True},
], ids=lambda options: next(iter(options), "plain"))  # fmt: skip
def test_forward_and_backward(kind, options):
    pair = Pair(kind, **options)
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in pair]
    assert names[0] == names[1] and names[0]
    pair.agree()
    pair.each(lambda model: model.train("lora_dropout" not in options))  # masks aren't PEFT's
    pair.agree()


@kinds
@pytest.mark.parametrize("safe", [True, False])
class TestMerging:
    def test_merge_and_unmerge(self, kind, safe):
        pair = Pair(kind)
        before = pair.agree()
        pair.each(lambda model: model.merge_adapter(safe_merge=safe))
        torch.testing.assert_close(pair.agree(hits=False), before, rtol=1e-3, atol=1e-3)
        pair.each(lambda model: model.unmerge_adapter())
        torch.testing.assert_close(pair.agree(), before, rtol=1e-3, atol=1e-3)

    def test_merge_and_unload(self, kind, safe):
        pair = Pair(kind)
        before = pair.agree()
        merged = pair.each(lambda model: model.merge_and_unload(safe_merge=safe))
        theirs, ours = (run(model, kind)[0] for model in merged)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, before, rtol=1e-3, atol=1e-3)
        classes = {type(module).__module__.split(".")[0] for module in merged[1].modules()}
        assert not classes & {"peft", "peft_kernels"}

    def test_some_of_several(self, kind, safe):
        pair = Pair(kind)
        pair.add()
        pair.each(lambda model: model.base_model.set_adapter(["default", "other"]))
        before = pair.agree()
        merged = pair.each(
            lambda model: model.merge_and_unload(safe_merge=safe, adapter_names=["other"])
        )
        theirs, ours = (run(model, kind)[0] for model in merged)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, before)


@kinds
class TestAdapters:
    def test_disabled(self, kind):
        pair = Pair(kind)
        bare = run(make_base(kind), kind)[0]
        before = pair.agree()
        theirs, ours = pair
        with theirs.disable_adapter(), ours.disable_adapter():
            torch.testing.assert_close(pair.agree(hits=False), bare)
            with ours.disable_adapter(), theirs.disable_adapter():
                torch.testing.assert_close(pair.agree(hits=False), bare)
        assert torch.equal(pair.agree(), before)

    def test_unload(self, kind):
        pair = Pair(kind)
        pair.agree()
        for model in pair.each(lambda model: model.unload()):
            torch.testing.assert_close(run(model, kind)[0], run(make_base(kind), kind)[0])

    @pytest.mark.parametrize("deleted", ["default", "other"])
    def test_delete(self, kind, deleted):
        pair = Pair(kind)
        pair.add()
        pair.each(lambda model: model.delete_adapter(deleted))
        theirs, ours = (model.active_adapters for model in pair)
        assert theirs == ours and deleted not in ours
        pair.agree()
        assert not any(f".{deleted}." in name for name, _ in pair.ours.named_parameters())

    def test_set(self, kind):
        pair = Pair(kind)
        pair.add()
        outputs = []
        for name in ("default", "other", ["default", "other"]):
            pair.each(lambda model, name=name: model.base_model.set_adapter(name))
            theirs, ours = (
                {n: p.requires_grad for n, p in model.named_parameters()} for model in pair
            )
            assert theirs == ours
            outputs.append(pair.agree())
        assert not any(torch.allclose(outputs[i - 1], outputs[i]) for i in range(3))

    @pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties"])
    def test_weighted(self, kind, combination):
        pair = Pair(kind)
        targets, options = MODELS[kind][1], {"density": 0.5} if combination == "ties" else {}
        pair.each(lambda model: model.add_adapter("other", config(targets)))
        pair.each(
            lambda model: model.add_weighted_adapter(
                ["default", "other"], [0.7, 0.4], "both", combination, **options
            )
        )
        pair.each(lambda model: model.set_adapter("both"))
        pair.agree()

    @pytest.mark.parametrize("inference", [True, False])
    def test_requires_grad(self, kind, inference):
        pair = Pair(kind)
        pair.add("frozen", inference_mode=inference)
        for change in (
            lambda model: model.set_adapter("frozen", inference_mode=inference),
            lambda model: model.set_requires_grad("frozen", requires_grad=not inference),
            lambda model: model.base_model.set_adapter(["frozen", "default"]),
        ):
            pair.each(change)
            theirs, ours = (
                {n: p.requires_grad for n, p in model.named_parameters()} for model in pair
            )
            assert theirs == ours
            pair.agree()
        assert pair.ours.get_nb_trainable_parameters() == pair.theirs.get_nb_trainable_parameters()

    def test_scaled(self, kind):
        pair = Pair(kind)
        before = pair.agree()
        theirs, ours = pair
        with helpers.rescale_adapter_scale(theirs, 0.5), helpers.rescale_adapter_scale(ours, 0.5):
            assert not torch.allclose(pair.agree(), before)
        assert torch.equal(pair.agree(), before)

    def test_status_and_repr(self, kind):
        pair = Pair(kind)
        pair.agree()
        pair.add()
        assert repr(pair.ours) == repr(pair.theirs)
        assert pair.ours.get_model_status() == pair.theirs.get_model_status()
        assert pair.ours.get_layer_status() == pair.theirs.get_layer_status()


@kinds
def test_mixed_batch(kind):
    pair = Pair(kind)
    pair.add()
    with torch.no_grad():
        output = pair.agree(adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            theirs = pair.theirs
            if name != "__base__":
                theirs.set_adapter(name)
                alone = run(theirs, kind)[0]
            else:
                with theirs.disable_adapter():
                    alone = run(theirs, kind)[0]
            torch.testing.assert_close(output[row], alone[row], rtol=1e-4, atol=1e-4)
    for model in pair:
        with pytest.raises(ValueError, match="non-existing adapter"):
            run(model, kind, adapter_names=["none"] * len(NAMES))


@pytest.mark.parametrize("kind", GENERATES)
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("mixed", [True, False])
def test_generation(kind, beams, mixed):
    pair = Pair(kind)
    pair.add()
    call = {"adapter_names": NAMES} if mixed else {}
    call |= {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": inputs_of(kind)["input_ids"]}
    theirs, ours = pair.each(lambda model: model.generate(**inputs, **call))
    assert torch.equal(theirs, ours) and pair.hits() > 0


@kinds
def test_autocast(kind):
    """In bfloat16 by autocast the error is no more than 1.5 of that of PEFT's."""
    pair = Pair(kind)
    truth = run(copy.deepcopy(pair.theirs), kind)
    pair.hits()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (run(model, kind) for model in pair)
    assert pair.hits() > 0 and ours[0].dtype is theirs[0].dtype

    def error(result) -> float:
        pairs = [(result[0], truth[0]), *((result[1][n], g) for n, g in truth[1].items())]
        return sum(((a.double() - b).norm() / b.norm()).item() for a, b in pairs) / len(pairs)

    assert error(ours) <= 1.5 * error(theirs)


@kinds
@pytest.mark.parametrize("low_memory", [True, False])
def test_saved_and_loaded(kind, low_memory, tmp_path):
    """Files of either are read into either."""
    pair = Pair(kind)
    expected = pair.agree()
    for i, model in enumerate(pair):
        model.save_pretrained(tmp_path / str(i))
        loaded = peft.PeftModel.from_pretrained(
            make_base(kind), tmp_path / str(i), low_cpu_mem_usage=low_memory
        )
        report = peft_kernels.accelerate(loaded.eval())
        torch.testing.assert_close(run(loaded, kind)[0], expected, rtol=1e-4, atol=1e-4)
        assert report.counts()["lora_linear"] > 0
    pair.each(
        lambda model: model.load_adapter(tmp_path / "1", "again", low_cpu_mem_usage=low_memory)
    )
    pair.each(lambda model: model.set_adapter("again"))
    assert torch.equal(pair.agree(), expected)
    theirs, ours = (list(model.state_dict()) for model in pair)
    assert theirs == ours


@kinds
def test_injected_on_meta(kind):
    """Adapters made without memory, filled by a state dict."""
    pair = Pair(kind)
    expected = pair.agree()
    state = peft.get_peft_model_state_dict(pair.ours)
    empty = peft.get_peft_model(make_base(kind), config(MODELS[kind][1]), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in empty.parameters())
    report = peft_kernels.accelerate(empty.eval())
    peft.set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert torch.equal(run(empty, kind)[0], expected) and report.counts()["lora_linear"] > 0


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "embedding"])
def test_hotswapped(kind, tmp_path):
    """PEFT doesn't swap the adapters of embeddings."""
    pair = Pair(kind)
    before = pair.agree()
    base = make_base(kind)
    torch.manual_seed(9)
    peft.get_peft_model(base, config(MODELS[kind][1])).save_pretrained(tmp_path)
    pair.each(lambda model: hotswap.hotswap_adapter(model, tmp_path, adapter_name="default"))
    assert not torch.allclose(pair.agree(), before)


@kinds
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
def test_copied(kind, copied):
    pair = Pair(kind)
    pair.add()
    before = pair.agree()
    pair.ours = copied(pair.ours)
    pair.report = peft_kernels.accelerate(pair.ours)
    assert torch.equal(pair.agree(), before)
    pair.each(lambda model: model.set_adapter("other"))
    assert not torch.allclose(pair.agree(), before)


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(kind, reentrant):
    pair = Pair(kind)

    def prepare(model):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    pair.each(prepare)
    pair.agree(**({} if kind == "bert" else {"use_cache": False}))


@kinds
def test_modules_beside(kind):
    """modules_to_save train beside the adapters."""
    saved = {"mlp": "norm", "conv1d": "lin0", "embedding": "conv1d", "bert": "pooler"}.get(
        kind, "lm_head"
    )
    pair = Pair(kind, modules_to_save=[saved])
    pair.agree()
    names = {name for name, p in pair.ours.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in names)


@kinds
def test_restored(kind):
    pair = Pair(kind)
    pair.agree()
    peft_kernels.restore(pair.ours)
    theirs, ours = ([type(module) for module in model.modules()] for model in pair)
    assert theirs == ours and all(torch.equal(a, b) for a, b in zip(*(
        run(model, kind)[:1] for model in pair), strict=True))  # fmt: skip


def test_nothing_here_is_without_a_kernel():
    """The pairs' models are served on the CPU's kernels, not on the reference."""
    for kind in MODELS:
        backends = {layer.backend for layer in Pair(kind).report.layers}
        assert backends - {"torch"} == {"cpu"}
