"""PEFT's adapter_names under accelerate(): they are of the call that has them, and of no other."""

import sys
import threading

import pytest
import torch
from peft_pairs import Pair, inputs_of

import peft_kernels
from peft_kernels.calls.carried import Frame, carrying
from peft_kernels.integrations.peft.lora_model import _CALLER

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = (None, ["other", "__base__", "default", "other"], ["default"] * 4, ["__base__"] * 4)


@pytest.fixture
def switching():
    """Threads take turns as often as they can."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(former)


def model_of(kind):
    pair = Pair(kind)
    pair.add()
    return pair.ours.eval()


def named(names):
    return {} if names is None else {"adapter_names": list(names)}


def in_threads(call, times):
    """What ``call(names)`` gives alone, and whatever else it gave beside the others."""
    alone = [call(names) for names in NAMES]
    others = []

    def repeat(i):
        for _ in range(times):
            try:
                if not torch.equal(call(NAMES[i]), alone[i]):
                    others.append(f"{NAMES[i]}: another's")
            except Exception as error:
                others.append(f"{NAMES[i]}: {error}")

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(NAMES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return alone, others


@pytest.mark.parametrize("kind", ["embedding", "bert", "llama", "t5"])
def test_threads_have_their_own(kind, switching):
    model, inputs = model_of(kind), inputs_of(kind)

    def call(names):
        with torch.no_grad():
            output = model(**inputs, **named(names))
        return output if isinstance(output, torch.Tensor) else output[0]

    alone, others = in_threads(call, times=12)
    assert others == [] and not any(torch.equal(alone[0], one) for one in alone[1:])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_threads_have_their_own_in_an_encoder_beside_beams(switching):
    model, inputs = model_of("t5"), {"input_ids": inputs_of("t5")["input_ids"]}
    settings = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False, "output_scores": True}

    def call(names):
        found = model.generate(**inputs, **settings, **named(names), return_dict_in_generate=True)
        return found.scores[0]

    _, others = in_threads(call, times=3)
    assert others == []


def test_compiled_calls_have_their_own():
    """PEFT hands names on by hooks, by which code that is compiled isn't guarded."""
    model, inputs = model_of("mlp"), inputs_of("mlp")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for names in (*NAMES, *NAMES):
            found, expected = (each(**inputs, **named(names)) for each in (compiled, model))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


REST = {}, {"another": ()}, {"another": (Frame("x"),)}, {"another": (Frame("x"),), _CALLER._key: ()}


@pytest.mark.parametrize("rest", REST, ids=len)
def test_compiled_calls_have_their_own_where_something_is_carried(rest):
    """As after generators that took turns, or inside another's block."""
    with carrying(rest):
        test_compiled_calls_have_their_own()


class _InTwoFrames(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        x = self.body(x)
        torch._dynamo.graph_break()
        return self.head(x)


@pytest.mark.parametrize("part", ["", "base_model.model", "base_model.model.head"])
def test_compiled_heads_have_their_own_names(part):
    """What compiled code has of a wrapper of PEFT's may have none of its LoRA layers in it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    model = peft.get_peft_model(_InTwoFrames(), config)
    model.add_adapter("other", config)
    for parameter in model.parameters():
        parameter.data.normal_()
    report, x = peft_kernels.accelerate(model.eval()), torch.randn(4, 8)
    with torch.no_grad():
        expected = [model(x, **named(names)) for names in NAMES]
        model.get_submodule(part).compile(backend="eager")
        for _ in range(2):
            for names, one in zip(NAMES, expected, strict=True):
                torch.testing.assert_close(model(x, **named(names)), one)
    assert [layer.name for layer in report.layers] == ["base_model.model.body"]
    peft_kernels.restore(model)
    assert type(model.base_model.model.head) is peft.utils.other.ModulesToSaveWrapper
