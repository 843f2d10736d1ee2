"""accelerate() on models of diffusers with PEFT's LoRA and in a pipeline, beside PEFT alone."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
KERNEL = "lora_linear"


def make_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )


def make_sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


def make_flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def inputs_of(make) -> dict:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    inputs = {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.tensor([3.0, 7])}
    if make is make_unet:
        inputs["sample"] = inputs.pop("hidden_states")
        return inputs
    inputs["pooled_projections"] = torch.randn(2, 16, generator=draw)
    if make is make_flux:
        inputs["hidden_states"] = x.reshape(2, 64, 4)
        inputs |= {"img_ids": torch.rand(64, 3, generator=draw), "txt_ids": torch.zeros(5, 3)}
    return inputs


models = pytest.mark.parametrize("make", [make_unet, make_sd3, make_flux])
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def config(targets=(*ATTENTION,), **options):
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return peft.LoraConfig(target_modules=list(targets), **{**settings, **options})


def adapted(make, **options) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    model.add_adapter(config(**options), "style")
    return model


def pair(make, **options) -> tuple[nn.Module, nn.Module, "peft_kernels.Report"]:
    """A model as it is, its copy on kernels, and the report of that."""
    theirs = adapted(make, **options)
    ours = copy.deepcopy(theirs)
    return theirs, ours, peft_kernels.accelerate(ours)


def run(model, make, **call) -> tuple[torch.Tensor, dict]:
    """The output, and the gradients of all that is trained."""
    model.zero_grad()
    output = model(**inputs_of(make), **call, return_dict=False)[0]
    if output.requires_grad:
        output.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def check_equal(theirs, ours, make, **call) -> torch.Tensor:
    expected, found = run(theirs, make, **call), run(ours, make, **call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return found[0]


@models
def test_forward_and_gradients(make):
    theirs, ours, report = pair(make)
    assert {layer.backend for layer in report.layers} == {"cpu"}
    theirs.train(), ours.train()
    check_equal(theirs, ours, make)
    assert report.counts() == {KERNEL: len(report.layers)}
    with_adapter = run(ours, make)[0]
    ours.disable_adapters()
    assert not torch.allclose(run(ours, make)[0], with_adapter, atol=1e-3)


@models
def test_gradient_checkpointing(make):
    theirs, ours, report = pair(make)
    for model in (theirs, ours):
        model.train().enable_gradient_checkpointing()
    check_equal(theirs, ours, make)
    assert set(report.counts()) == {KERNEL} and report.counts()[KERNEL] > len(report.layers)


@models
def test_adapters_come_and_go(make):
    theirs, ours, report = pair(make)
    both = theirs, ours

    def agree(ways: set[str], **call) -> None:
        peft_kernels.accelerate(ours)
        before = report.counts()
        check_equal(theirs, ours, make, **call)
        counts = report.counts()
        assert {way for way in counts if counts[way] > before.get(way, 0)} == ways

    for model in both:
        torch.manual_seed(4)
        model.add_adapter(config(["to_q", "to_k"], r=3, lora_alpha=6), "detail")
    for names, weights in (("detail", 1.0), (["style", "detail"], [0.7, 0.4])):
        for model in both:
            model.set_adapters(names, weights)
        agree({KERNEL} | ({"no active adapter"} if names == "detail" else set()))
    call = "cross_attention_kwargs" if make is make_unet else "joint_attention_kwargs"
    agree({KERNEL}, **{call: {"scale": 0.3}})
    for model in both:
        model.disable_adapters()
    agree({"disabled"})
    for model in both:
        model.enable_adapters()
        model.fuse_lora(lora_scale=0.5)
    agree({"merged"})
    for model in both:
        model.unfuse_lora()
    agree({KERNEL})
    for model in both:
        model.delete_adapters("detail")
    agree({KERNEL})


def test_adapters_that_come_later_are_missing():
    _, unet, report = pair(make_unet)
    unet.add_adapter(config(["ff.net.2"]), "more")
    assert report.missing() and all(name.endswith("ff.net.2") for name in report.missing())
    assert peft_kernels.accelerate(unet).missing() == []


def test_convolutions_stay_pefts():
    theirs, ours, report = pair(make_unet, targets=[*ATTENTION, "conv1", "conv_shortcut"])
    kept = [layer for layer in report.layers if layer.reason]
    assert kept and {layer.reason for layer in kept} == {"lora.Conv2d"}
    assert f"{len(kept)} keep PEFT's: lora.Conv2d ({len(kept)})" in report.summary()
    check_equal(theirs, ours, make_unet)
    assert report.counts() == {KERNEL: len(report.layers) - len(kept)}


@models
def test_saved_and_loaded(make, tmp_path):
    theirs, ours, _ = pair(make)
    keys = list(theirs.state_dict())
    assert list(ours.state_dict()) == keys
    ours.save_lora_adapter(tmp_path, "style")
    torch.manual_seed(0)
    again = make().eval()
    again.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
    report = peft_kernels.accelerate(again)
    with torch.no_grad():
        check_equal(theirs, again, make)
    assert report.counts() == {KERNEL: len(report.layers)}


def test_hotswap(tmp_path):
    theirs, ours, report = pair(make_unet)
    torch.manual_seed(8)
    other = make_unet()
    other.add_adapter(config(r=2), "style")
    other.save_lora_adapter(tmp_path, "style")
    before = check_equal(theirs, ours, make_unet)
    for model in (theirs, ours):
        model.load_lora_adapter(
            tmp_path, prefix=None, adapter_name="style", use_safetensors=True, hotswap=True
        )
    assert not torch.allclose(check_equal(theirs, ours, make_unet), before, atol=1e-3)
    assert set(report.counts()) == {KERNEL}


def test_hooks_of_diffusers_run():
    """Layers that are kept in another dtype, and cast at their call, are PEFT's."""
    theirs, ours, report = pair(make_unet)
    for model in (theirs, ours):
        model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    with torch.no_grad():
        check_equal(theirs, ours, make_unet)
    assert report.counts() == {"base_layer: another forward": len(report.layers)}


# ---- a pipeline ----------------------------------------------------------------------------------


def make_pipeline():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=make_unet().eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def image_of(pipe, **call) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    text = torch.randn(2, 5, 16, generator=draw)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(6),
        output_type="pt",
        **call,
    ).images


def test_images_are_equal(tmp_path):
    theirs, ours = make_pipeline(), make_pipeline()
    layers = peft.get_peft_model_state_dict(adapted(make_unet), adapter_name="style")
    theirs.save_lora_weights(tmp_path, unet_lora_layers=layers)
    bare = image_of(theirs)
    for pipe in (theirs, ours):
        pipe.load_lora_weights(tmp_path, adapter_name="style", use_safetensors=True)
    report = peft_kernels.accelerate(ours.unet)
    expected = image_of(theirs)
    assert not torch.allclose(expected, bare, atol=1e-3)
    torch.testing.assert_close(image_of(ours), expected, rtol=1e-4, atol=1e-4)
    assert report.counts() == {KERNEL: 3 * len(report.layers)}
    for pipe in (theirs, ours):
        pipe.set_adapters("style", 0.5)
    torch.testing.assert_close(image_of(ours), image_of(theirs), rtol=1e-4, atol=1e-4)
    for pipe in (theirs, ours):
        pipe.fuse_lora(components=["unet"])
    torch.testing.assert_close(image_of(ours), image_of(theirs), rtol=1e-4, atol=1e-4)
    for pipe in (theirs, ours):
        pipe.unfuse_lora(components=["unet"])
        pipe.unload_lora_weights()
    torch.testing.assert_close(image_of(ours), bare, rtol=1e-4, atol=1e-4)


def test_a_training_step_is_equal():
    """The loss of the noise that the model finds, and what AdamW makes of it in some steps."""
    results = []
    for accelerates in (False, True):
        unet = adapted(make_unet, lora_dropout=0.0).train()
        report = peft_kernels.accelerate(unet) if accelerates else None
        trains = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trains, lr=1e-2, eps=1e-4)
        scheduler, draw = diffusers.DDPMScheduler(), torch.Generator().manual_seed(3)
        losses = []
        for _ in range(5):
            image, noise = torch.randn(2, 2, 4, 8, 8, generator=draw)
            steps, text = torch.tensor([10, 700]), torch.randn(2, 5, 16, generator=draw)
            noisy = scheduler.add_noise(image, noise, steps)
            found = unet(noisy, steps, encoder_hidden_states=text).sample
            loss = nn.functional.mse_loss(found, noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append((losses, [p.detach() for p in trains]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert report.counts() == {KERNEL: 5 * len(report.layers)}


@pytest.mark.parametrize("function", [peft_kernels.accelerate, peft_kernels.restore])
def test_a_pipeline_is_no_model(function):
    wanted = "model must be a Module, such as .vae or .unet of this StableDiffusionPipeline"
    with pytest.raises(TypeError, match=wanted):
        function(make_pipeline())
