"""The wrapper of GPUs on a CPU, its kernels interpreted: steps replayed as captured.

A captured graph is what was launched, on the tensors it was launched on: launches are recorded and
run again after another step was written.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

from vllm_layers import DTYPES, K, check, fill, filled, linear, random_adapter, step, wrapper

import peft_kernels
from peft_kernels.integrations.vllm.punica_gpu import PunicaWrapperPEFTKernelsGPU
from peft_kernels.triton.common import launch

RANKS = [8, 16, 3]
IDS = [0, -1, 2, 1, 1, -1, 2, 0, 0, 2, 1, 0, -1, 0, 2, 1, 1, 0]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def interpreted():
    with peft_kernels.backend("triton"):
        yield


def made_linear(widths=(24, 8), dtype=torch.float32, ranks=RANKS, most=16):
    layer = linear(len(ranks), most, K, widths, dtype)
    return layer, *filled(layer, widths, dtype, ranks, kind=PunicaWrapperPEFTKernelsGPU)


def add(made, layer, y, x, **options):
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    made.add_lora_linear(y, x, *stacks, options.pop("scale", 1.0), layer.output_slices, **options)


# ---- linear layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [7, 18])
def test_linear_layers_and_packed_ones(rows, dtype):
    layer, made, adapters = made_linear(dtype=dtype)
    ids = IDS[:rows]
    step(made, ids, [0])
    x, y = torch.randn(rows, K).to(dtype), torch.randn(rows, 32).to(dtype)
    before = y.clone()
    add(made, layer, y, x)
    check(y, before, x, adapters, ids, "y")
    without = torch.tensor(ids) < 0
    assert torch.equal(y[without], before[without])


# ---- steps -------------------------------------------------------------------------------------


def buffers(made, layer):
    held = layer.lora_b_stacked[0].peft_kernels.whole
    routes = [t for r in (made._tokens, made._prompts) for t in (r.ids, r.order, r.starts, r.count)]
    return [*routes, *(tensor for field in held[:5] for tensor in field)]


def test_buffers_stay_where_they_are():
    layer, made, _ = made_linear()
    before = [tensor.data_ptr() for tensor in buffers(made, layer)]
    for ids in (IDS, [], [-1] * 4, IDS[:5]):
        step(made, ids, ids)
    fill(layer, [random_adapter(5, K, (24, 8), torch.float32)])
    layer.reset_lora(1)
    assert [tensor.data_ptr() for tensor in buffers(made, layer)] == before


class Recorded:
    """What is launched, and once more."""

    def __init__(self, monkeypatch):
        self.launches, self.really = [], launch.run
        monkeypatch.setattr(launch, "run", self.run)

    def run(self, *launched):
        self.launches.append(launched)
        self.really(*launched)

    def replay(self):
        for launched in self.launches:
            self.really(*launched)


@pytest.mark.parametrize("padded", [12, 24])
def test_a_captured_graph_serves_other_steps_of_its_size(padded, monkeypatch):
    layer, made, _ = made_linear()
    step(made, [0] * padded, [0])
    x, y = torch.randn(padded, K), torch.zeros(padded, 32)
    graph = Recorded(monkeypatch)
    add(made, layer, y, x)
    assert graph.launches
    for ids in (IDS[:padded], [2, 1, -1, 0], [-1] * 3, []):
        adapters = [random_adapter(r, K, (24, 8), torch.float32) for r in RANKS[::-1]]
        fill(layer, adapters)
        step(made, ids, ids[:1])
        before = y.copy_(torch.randn(padded, 32)).clone()
        x.copy_(torch.randn(padded, K))
        graph.replay()
        own = [*ids, *[-1] * (padded - len(ids))]
        check(y, before, x, adapters, own, "y")
        without = torch.tensor(own) < 0
        assert torch.equal(y[without], before[without])


def test_nothing_is_launched_where_no_row_has_an_adapter(monkeypatch):
    layer, made, _ = made_linear()
    step(made, [-1, -1], [-1])
    graph = Recorded(monkeypatch)
    add(made, layer, torch.zeros(4, 32), torch.zeros(4, K))
    made.add_shrink(torch.zeros(2, 4, 16), torch.zeros(4, K), layer.lora_a_stacked, 1.0)
    assert not graph.launches


class Model(torch.nn.Module):
    def __init__(self, layer, made):
        super().__init__()
        self.layer, self.made = layer, made

    def forward(self, x):
        y = x @ torch.ones(K, 32)
        add(self.made, self.layer, y, x)
        s = torch.zeros(2, len(x), 16)
        self.made.add_shrink(s, x, self.layer.lora_a_stacked, 1.0)
        return y, s


def test_a_compiled_graph_without_guards_serves_other_steps():
    """vLLM drops every guard, so that nothing of the first step may stay in the graph."""
    layer, made, _ = made_linear()
    model = Model(layer, made)
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(
        model, fullgraph=True, dynamic=True, backend="aot_eager", options=options
    )
    with torch.no_grad():
        for ids, rows in (([-1] * 6, 6), (IDS[:5], 8), (IDS, 18), ([], 3), ([2], 4)):
            step(made, ids, ids[:1])
            fill(layer, [random_adapter(r, K, (24, 8), torch.float32) for r in RANKS[::-1]])
            x = torch.randn(rows, K)
            for found, wanted in zip(compiled(x), model(x), strict=True):
                assert torch.equal(found, wanted)


class ReadOnHost(TorchDispatchMode):
    """The tensors whose values Python, or a shape, waits for."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = "_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "masked_select"
        if func.overloadpacket.__name__ in names:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


def test_only_what_is_on_the_host_is_read_there():
    layer, made, _ = made_linear()
    with ReadOnHost() as mode:
        step(made, IDS, IDS)
        fill(layer, [random_adapter(5, K, (24, 8), torch.float32)])
        add(made, layer, torch.zeros(18, 32), torch.zeros(18, K))
    on_device = {tensor.data_ptr() for tensor in buffers(made, layer)}
    on_device -= {made._tokens.count.data_ptr(), made._prompts.count.data_ptr()}
    assert mode.read and not on_device & {tensor.data_ptr() for tensor in mode.read}


def test_a_slot_is_read_as_it_is_loaded_whatever_became_of_the_buffers():
    """vLLM's deepest sleep gives GPU memory away, and loads adapters anew on waking."""
    layer, made, _ = made_linear()
    whole = layer.lora_b_stacked[0].peft_kernels.whole
    for tensor in (tensor for field in whole[2:5] for tensor in field):
        tensor.fill_(7)
    for routes in (made._tokens, made._prompts):
        routes.ids.fill_(1), routes.order.zero_(), routes.starts.zero_()
    adapters = [random_adapter(r, K, (24, 8), torch.float32) for r in RANKS]
    fill(layer, adapters)
    step(made, IDS[:3], [0])
    x, y = torch.randn(18, K), torch.zeros(18, 32)
    add(made, layer, y, x)
    check(y, torch.zeros_like(y), x, adapters, [*IDS[:3], *[-1] * 15], "y")


# ---- experts -----------------------------------------------------------------------------------


def test_experts_are_vllms_own(monkeypatch):
    from vllm.lora.layers import FusedMoEWithLoRA
    from vllm.lora.punica_wrapper import punica_gpu

    called = []

    class Own:
        def __init__(self, *args, **kwargs):
            called.append(args)

        def __getattr__(self, name):
            return lambda *args, **kwargs: called.append((name, args))

    monkeypatch.setattr(punica_gpu, "PunicaWrapperGPU", Own)
    made = wrapper(kind=PunicaWrapperPEFTKernelsGPU)
    step(made, [-1], [-1])
    assert not called
    for _ in range(2):
        made.adopt(FusedMoEWithLoRA.__new__(FusedMoEWithLoRA))
    step(made, [-1], [-1])
    made.add_lora_w13(1)
    made.add_lora_w2(2)
    assert [name for name, _ in called[1:]] == ["update_metadata", "add_lora_w13", "add_lora_w2"]


def test_the_wrapper_has_all_that_vllm_calls_on_a_gpu():
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    public = {n for n in vars(PunicaWrapperGPU) if not n.startswith("_")}
    ours = PunicaWrapperPEFTKernelsGPU
    assert not {n for n in public if getattr(ours, n, None) is getattr(PunicaWrapperBase, n, None)}
