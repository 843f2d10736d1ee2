"""Training from a traced graph: torch.jit.trace, torch.export, make_fx and aot_function."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable

import pytest
import torch
from functorch.compile import aot_function, nop
from test_transforms import OPS, each_op, everything, loss, make
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels import ops
from peft_kernels.ops import _dispatch
from peft_kernels.ops.multi_lora_linear import example_bank, example_ids, example_trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
F32 = torch.float32
# Adapters in a bank can't be trained from a graph; the rows' gradients are tested by themselves.
TRAINED_IN_GRAPHS = [name for name in OPS if name != "multi_lora_linear"]


class Model(nn.Module):
    """An op of x and of parameters."""

    def __init__(self, op: Callable[..., Tensor], parameters: tuple[Tensor, ...]):
        super().__init__()
        self.op = op
        self.weights = nn.ParameterList([tensor.detach().clone() for tensor in parameters])

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.weights)


def gradients(model: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the parameters, and then of x."""
    owner.zero_grad()
    x = x.detach().requires_grad_()
    model(x).sin().sum().backward()
    return [p.grad.clone() for p in owner.parameters()] + [x.grad]


def exported(model: nn.Module, x: Tensor, strict: bool) -> nn.Module:
    return torch.export.export(model, (x,), strict=strict).module()


def traced(model: nn.Module, x: Tensor) -> nn.Module:
    """Saved and loaded, as a graph without Python in it can be."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    return torch.jit.load(file)


GRAPHS = {
    "jit": traced,
    "export": lambda model, x: exported(model, x, strict=False),
    "strict": lambda model, x: exported(model, x, strict=True),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", TRAINED_IN_GRAPHS)
def test_a_graph_trains(name, graph):
    case = make(name, F32)
    model, x = Model(case.op, case.inputs[1:]), case.inputs[0]
    expected = gradients(model, model, x)
    copy = GRAPHS[graph](model, x)
    found = gradients(copy, copy, x)
    assert all(tensor.any() for tensor in found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_passes_gradients_through_a_bank(graph):
    bank, ids = example_bank(6, 5, (2, 9)), torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    model = Model(
        lambda x, weight: ops.multi_lora_linear(x, weight, bank, ids), (torch.randn(6, 5),)
    )
    x = torch.randn(4, 5)
    expected = gradients(model, model, x)
    copy = GRAPHS[graph](model, x)
    found = gradients(copy, copy, x)
    assert all(tensor.any() for tensor in found)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("graph", ["jit", "export"])
def test_what_a_graph_cant_train_is_refused(graph):
    bank, ids, x = example_bank(6, 5, (2, 3)), example_ids(4, 2), torch.randn(4, 5)
    trained = example_trained(bank, [0])

    def linear(x, weight, a, b):
        received = trained._replace(a=[a], b=[b])
        return ops.multi_lora_linear(x, weight, bank, ids, trained=received)

    def add(x, weight):
        return ops.multi_lora_add_(x @ weight.T, x, bank, ids)

    weight = torch.randn(6, 5)
    for op, parameters, says in (
        (linear, (weight, *trained.a, *trained.b), "trained gets no gradient"),
        (add, (weight,), "get no gradient through"),
    ):
        model = Model(op, parameters)
        with pytest.raises(ValueError, match=says):
            GRAPHS[graph](model, x)
        with torch.no_grad():
            torch.testing.assert_close(GRAPHS[graph](model, x)(x), model(x))


LAYERS = {
    "linear": lambda: peft_kernels.nn.LoRALinear(8, 6, 3, alpha=6),
    "adapter": lambda: peft_kernels.nn.BottleneckAdapter(8, 3),
    "fusion": lambda: peft_kernels.nn.AdapterFusion(
        [peft_kernels.nn.BottleneckAdapter(8, r) for r in (3, 4)]
    ),
    "invertible": lambda: peft_kernels.nn.InvertibleAdapter(8),
}


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 4, 5, 8)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_trace_takes_other_sizes(name, shape):
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    graph = traced(layer, torch.randn(shape))
    for lead in ((3, 5), (5, 2), (1, 1)):
        x = torch.randn(*shape[:-3], *lead, 8)
        torch.testing.assert_close(graph(x), layer(x))


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_keeps_what_was_carried(graph):
    model = peft_kernels.swap_linear(nn.Sequential(nn.Linear(8, 6)), ["0"], 3, alpha=6)
    nn.init.normal_(model[0].lora_b)
    x = torch.randn(2, 8)
    with peft_kernels.disabled(model):
        base = GRAPHS[graph](model, x)
    adapted = GRAPHS[graph](model, x)
    assert not torch.allclose(base(x), adapted(x))
    torch.testing.assert_close(adapted(x), model(x))
    with peft_kernels.disabled(model):
        torch.testing.assert_close(base(x), model(x))


@pytest.mark.parametrize("graph", ["export", "strict"])
def test_a_graph_of_layers_holds_the_op(graph):
    layer = peft_kernels.nn.LoRALinear.from_linear(nn.Linear(8, 6), r=3, alpha=6)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 5, 8)
    copy = GRAPHS[graph](layer, x)
    names = [node.target.__name__ for node in copy.graph.nodes if node.op == "call_function"]
    assert "lora_linear.default" in names
    layer(x).sin().sum().backward()
    expected = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    copy.zero_grad()
    copy(x).sin().sum().backward()
    found = {n: p.grad for n, p in copy.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() == {"lora_a", "lora_b"}
    torch.testing.assert_close(found, expected)


def test_a_trace_draws_its_dropout_again():
    model = Model(lambda x, *rest: ops.lora_linear(x, *rest, dropout_p=0.5),
                  make("lora_linear", F32).inputs[1:])  # fmt: skip
    x = make("lora_linear", F32).inputs[0]
    copy = torch.jit.trace(model, (x,), check_trace=False)
    torch.manual_seed(1)
    first, second = copy(x), copy(x)
    assert (first != second).any()
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), first)


class Recorded(TorchDispatchMode):
    """The arguments of each call of an op."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@each_op
def test_opcheck_of_the_op_in_graphs(name, monkeypatch):
    """Schema, shapes, autograd and AOT dispatch of the op with the arguments that it is given."""
    case, defined = make(name, F32), getattr(torch.ops.peft_kernels, name).default
    for module in (_dispatch, importlib.import_module(f"peft_kernels.ops.{name}")):
        monkeypatch.setattr(module, "is_special", lambda: True, raising=False)
    with torch.no_grad(), Recorded(defined) as recorded:
        case.op(*case.inputs)
    (inputs,) = recorded.calls
    for tensors in (inputs, with_gradients(inputs)):
        torch.library.opcheck(defined, tensors)


def with_gradients(inputs):
    floats = [isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0 for t in inputs]
    return tuple(
        t.detach().clone().requires_grad_() if is_float else t
        for t, is_float in zip(inputs, floats, strict=True)
    )


@each_op
def test_a_training_step_as_a_graph(name):
    case = make(name, F32)

    def step(*inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(loss(case.op)(*inputs), inputs)

    graph = make_fx(step)(*case.inputs)
    names = [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"]
    assert f"{name}_fwd.default" in names and f"{name}_bwd.default" in names
    torch.testing.assert_close(graph(*case.inputs), step(*case.inputs))


@pytest.mark.parametrize("name", TRAINED_IN_GRAPHS)
def test_a_functional_gradient_as_a_graph(name):
    case = make(name, F32)
    step = torch.func.grad(loss(case.op), everything(case))
    torch.testing.assert_close(make_fx(step)(*case.inputs)(*case.inputs), step(*case.inputs))


def test_a_functional_gradient_of_a_bank_as_a_graph_is_refused():
    case = make("multi_lora_linear", F32)
    with pytest.raises(ValueError, match="can't be recorded in a graph"):
        make_fx(torch.func.grad(loss(case.op)))(*case.inputs)


# aot_function wants every tensor as an argument, so these close over none.
CLOSED = {
    "lora_linear": lambda *tensors: ops.lora_linear(*tensors, dropout_p=0.5, seed=7),
    "dora_linear": lambda *tensors: ops.dora_linear(*tensors, dropout_p=0.5, seed=7),
    "adapter": make("adapter", F32).op,
    "adapter_fusion": make("adapter_fusion", F32).op,
    "prefix_attention": ops.prefix_attention,
    "prompt_lookup": lambda *tensors: ops.prompt_lookup(*tensors).embeddings,
}


@pytest.mark.parametrize("name", TRAINED_IN_GRAPHS)
def test_aot_function(name):
    inputs = list(make(name, F32).inputs)
    if name in ("prefix_attention", "prompt_lookup"):  # one prefix, or prompt, of the bank
        inputs[-2:] = [t[0] if t.shape[0] == 2 else t for t in inputs[-2:]]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    compiled = aot_function(loss(CLOSED[name]), fw_compiler=nop, bw_compiler=nop)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    expected = torch.autograd.grad(loss(CLOSED[name])(*inputs), inputs)
    torch.testing.assert_close(found, expected)
