"""MultiLoRALinear and the router: the layer by itself. With a pool: test_pool.py."""

import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels.calls import router
from peft_kernels.calls.router import Router, Selection
from peft_kernels.calls.rows import Entries
from peft_kernels.nn import LoRALinear, MultiLoRALinear
from peft_kernels.ops.multi_lora_linear import sort_by_adapter

SLOTS, PAGES, MAX_PAGES = 5, 6, 2
CPU = torch.device("cpu")


def make_layer(linear=None, **options) -> MultiLoRALinear:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7) if linear is None else linear
    settings = {"slots": SLOTS, "pages": PAGES, "max_pages": MAX_PAGES, "router": Router()}
    layer = MultiLoRALinear.from_linear(linear, **(settings | options))
    for buffer in (layer.pages_a, layer.pages_b):
        buffer.fill_(torch.nan)
    return layer


def write(layer, slot, pages, r, scale=2.0):
    """Random A and B, as float64."""
    generator = torch.Generator().manual_seed(slot)
    a = torch.randn(r, layer.in_features, generator=generator)
    b = torch.randn(layer.out_features, r, generator=generator)
    layer.write(slot, pages, a, b, scale)
    return a.double(), b.double()


def use(layer, ids, **options):
    selection = Selection(ids, SLOTS, buffers=layer.router.buffers, **options)
    return layer.router.use(selection, [layer.weight.device])


def conv1d(k: int, n: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)


# ---- construction ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_base_is_kept_and_frozen(bias):
    linear = nn.Linear(12, 7, bias=bias).eval()
    layer = make_layer(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not any(p.requires_grad for p in layer.parameters()) and not layer.training
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (12, 7)


def test_the_state_dict_is_the_base_s():
    linear = nn.Linear(12, 7)
    layer = make_layer(linear)
    write(layer, 0, (1,), 3)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    other = nn.Linear(12, 7)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight) and torch.equal(linear.bias, other.bias)


def test_conv1d_is_taken_as_it_is_stored():
    base = conv1d(12, 7)
    layer = make_layer(base)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.weight is base.weight and layer.fan_in_fan_out
    a, b = write(layer, 3, (2,), 4)
    with use(layer, [3, -1]):
        y = layer(x)
    exact = base(x).double()[0] + 2 * x[0].double() @ a.T @ b.T
    torch.testing.assert_close(y[0].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "adapter", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, None, torch.float64),
    ],
)
def test_dtypes(base, adapter, expected):
    layer = make_layer(nn.Linear(12, 7, dtype=base), adapter_dtype=adapter)
    assert layer.pages_a.dtype is layer.pages_b.dtype is expected
    a, b = write(layer, 1, (3, 0), 11)
    x = torch.randn(4, 12, dtype=base)
    with use(layer, [1]):
        y = layer(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = exact + 2 * x.double() @ a.T @ b.T
    assert y.dtype is base
    error = ((y.double() - exact).norm() / exact.norm()).item()
    assert error < (1e-5 if base.itemsize > 2 else 2e-2)


@pytest.mark.parametrize(
    ("linear", "options", "named"),
    [
        (lambda: nn.LayerNorm(4), {}, "linear must be"),
        (lambda: LoRALinear(4, 4, 2, alpha=4), {}, "is a LoRALinear already"),
        (lambda: make_layer(), {}, "serves an AdapterPool already"),
        (lambda: nn.Linear(4, 4), {"adapter_dtype": torch.bfloat16}, "adapter_dtype must be"),
    ],
)
def test_what_cannot_be_taken(linear, options, named):
    base = linear()
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(TypeError, match=named):
        make_layer(base, **options)
    assert flags == [p.requires_grad for p in base.parameters()]


def test_it_is_made_of_a_layer():
    with pytest.raises(TypeError, match="from_linear"):
        MultiLoRALinear(4, 4)


def test_extra_repr():
    assert "in_features=12, out_features=7, bias=True, slots=5, pages=6, max_rank=16" in repr(
        make_layer()
    )


# ---- adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "r"), [((4,), 1), ((0,), 8), ((5, 2), 9), ((0, 1), 16)])
def test_what_is_written_is_read(pages, r):
    layer = make_layer()
    a, b = write(layer, 2, pages, r)
    read_a, read_b = layer.read(pages, r)
    assert torch.equal(read_a.double(), a) and torch.equal(read_b.double(), b)
    assert layer.pages_a.isfinite().all(1).sum() == r == layer.ranks[2]
    assert layer.scales[2] == 2.0 and tuple(layer.table[2, : len(pages)]) == pages


def test_each_row_has_its_own_and_only_ranks_of_it():
    layer = make_layer()
    made = {0: write(layer, 0, (1, 4), 9, 0.5), 3: write(layer, 3, (0,), 2, -3.0)}
    layer.clear(1)
    x = torch.randn(4, 2, 12)
    outside = layer(x)
    for ids, tokens in (([0, -1, 3, 1], None), ([0, 0, -1, -1, 3, 3, 1, 1], 2)):
        with use(layer, ids, entries=Entries(4, tokens)):
            y = layer(x)
        exact = x.double() @ layer.weight.double().T + layer.bias.double()
        for row, slot, scale in ((0, 0, 0.5), (2, 3, -3.0)):
            a, b = made[slot]
            exact[row] += scale * x[row].double() @ a.T @ b.T
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(y[1], outside[1]) and torch.equal(y[3], outside[3])
    assert torch.equal(layer(x), outside)


def test_loading_beside_a_graph_does_not_spoil_it():
    """No false alarm of autograd's; the rows of the graph's own adapter are not touched."""
    layer = make_layer()
    write(layer, 0, (1,), 4)
    x = torch.randn(3, 12, requires_grad=True)
    with use(layer, [0]):
        y = layer(x)
    write(layer, 1, (2,), 4)
    y.sum().backward()
    assert x.grad.any()


# ---- training --------------------------------------------------------------------------------


def test_parameters_are_views_of_the_pages():
    layer = make_layer()
    a, b = write(layer, 2, (3, 4), 11)
    layer.bind(2, 3, 11)
    one = layer.bound[2]
    assert torch.equal(one.lora_a.double(), a) and torch.equal(one.lora_b.double(), b.T)
    with torch.no_grad():
        one.lora_a.zero_()
    assert not layer.pages_a[24:35].any()
    layer.unbind(2)
    assert not layer.bound
    with torch.no_grad():
        one.lora_a.fill_(5.0)
    assert not layer.pages_a[24:35].any()
    assert layer.unbind(2) is None


def test_gradients_for_those_that_want_them_and_have_rows():
    layer = make_layer()
    for slot, page in ((0, 0), (1, 1), (2, 2), (3, 3)):
        write(layer, slot, (page,), slot + 2)
        layer.bind(slot, page, slot + 2)
    layer.bound[1].lora_a.requires_grad_(False)
    layer.bound[2].lora_a.requires_grad_(False)
    layer.bound[2].lora_b.requires_grad_(False)
    x = torch.randn(4, 12)
    with use(layer, [0, 1, 2, 0], trained=(0, 1, 2)):
        layer(x).square().sum().backward()
    wanted = {slot: (one.lora_a.grad, one.lora_b.grad) for slot, one in layer.bound.items()}
    present = {slot: tuple(grad is not None for grad in pair) for slot, pair in wanted.items()}
    assert present == {0: (True, True), 1: (False, True), 2: (False, False), 3: (False, False)}
    assert layer.weight.grad is None
    assert layer._trained((2,)) is None and layer._trained((4,)) is None
    assert len(layer._trained((0, 1, 2)).a) == 2

    a, b = (t.detach().double().requires_grad_() for t in layer.bound[0][:2])
    rows = x[[0, 3]].double()
    y = F.linear(rows, layer.weight.double(), layer.bias.double()) + 2 * rows @ a.T @ b
    y.square().sum().backward()
    torch.testing.assert_close(wanted[0][0].double(), a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wanted[0][1].double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cast_takes_pages_and_parameters_along(dtype):
    layer = make_layer()
    a, _ = write(layer, 2, (3,), 5, scale=1 / 3)
    layer.bind(2, 3, 5)
    one = layer.bound[2]
    x = torch.randn(2, 12)
    with use(layer, [2], trained=(2,)):
        layer(x).sum().backward()
    assert layer.to(dtype) is layer and layer.pages_a.dtype is layer.weight.dtype is dtype
    assert layer.scales.dtype is torch.float32 and layer.scales[2] == torch.tensor(1 / 3)
    assert (
        layer.bound[2].lora_a is one.lora_a and one.lora_a.dtype is one.lora_a.grad.dtype is dtype
    )
    torch.testing.assert_close(one.lora_a.double(), a, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        one.lora_b.zero_()
    with use(layer, [2], trained=(2,)):
        y = layer(x.to(dtype))
    torch.testing.assert_close(y, F.linear(x.to(dtype), layer.weight, layer.bias))
    y.sum().backward()


# ---- the router ------------------------------------------------------------------------------


def test_a_selection_is_its_thread_s():
    layer = make_layer()
    write(layer, 0, (0,), 3)
    x = torch.randn(2, 12)
    outside, results = layer(x), {}

    def run(name, context):
        with context:
            results[name] = layer(x)

    with use(layer, [0]):
        inside = layer(x)
        for name, context in (("plain", nullcontext()), ("routed", use(layer, [0, -1]))):
            thread = threading.Thread(target=run, args=(name, context))
            thread.start()
            thread.join()
        assert torch.equal(layer(x), inside)
    assert torch.equal(results["plain"], outside) and not torch.equal(inside, outside)
    torch.testing.assert_close(results["routed"], torch.stack((inside[0], outside[1])))


def test_an_inner_selection_ends_where_the_outer_goes_on():
    layer = make_layer()
    write(layer, 0, (0,), 3)
    x = torch.randn(2, 12)
    outside = layer(x)
    with use(layer, [0]):
        inside = layer(x)
        with pytest.raises(RuntimeError, match="mine"), use(layer, [-1]):
            assert torch.equal(layer(x), outside)
            raise RuntimeError("mine")
        assert torch.equal(layer(x), inside)
    assert torch.equal(layer(x), outside)


@pytest.fixture
def sorting(monkeypatch):
    """Has the router do on the CPU what it does for GPUs."""
    monkeypatch.setattr(router, "_reads_sorted", lambda device: True)


def routing_of(layer):
    return layer.router.current().on(CPU).routing


@torch.no_grad()
def test_buffers_keep_their_address_and_are_filled_anew(sorting):
    layer = make_layer()
    write(layer, 4, (0,), 3)
    x = torch.randn(2, 12)
    addresses = set()
    for ids in ([4, -1], [-1, 4], [0, 1]):
        with use(layer, ids):
            routing = routing_of(layer)
            addresses.add(tuple(t.data_ptr() for t in routing))
            order, starts = sort_by_adapter(torch.tensor(ids), SLOTS)
            assert routing.ids.tolist() == ids
            assert torch.equal(routing.order, order) and torch.equal(routing.starts, starts)
            layer(x)
    assert len(addresses) == 1
    with use(layer, [4]):
        assert routing_of(layer).ids.data_ptr() not in {address[0] for address in addresses}


def test_an_inner_selection_gives_the_buffers_back(sorting):
    layer = make_layer()
    with torch.no_grad(), use(layer, [4, -1]):
        outer = routing_of(layer)
        with use(layer, [1, 2]):
            assert outer.ids.tolist() == [1, 2]
        assert outer.ids.tolist() == [4, -1]
        with torch.enable_grad(), use(layer, [3, 3]):
            # What a captured graph reads is right in this route too, and autograd has its own.
            assert outer.ids.tolist() == [3, 3]
            assert routing_of(layer).ids.data_ptr() != outer.ids.data_ptr()
        assert outer.ids.tolist() == [4, -1]


def test_a_capture_reads_the_buffer_in_a_route_that_was_entered_with_gradients(
    sorting, monkeypatch
):
    layer = make_layer()
    with use(layer, [4, -1]):
        with monkeypatch.context() as capture, torch.no_grad():
            capture.setattr(router.Selection, "_make", None)  # would be part of the graph
            captured = routing_of(layer)
        assert captured.ids.tolist() == [4, -1]
    with use(layer, [1, 2]):
        assert captured.ids.tolist() == [1, 2]


def test_a_route_s_plan_is_for_as_many_rows_as_it_has_names():
    class OnAGPU(torch.Tensor):
        is_cuda = True

    layer = make_layer()
    with use(layer, [4, -1, 1]):
        plan = layer.router.current().plan
    assert plan(torch.randn(3, 12)) == "auto"  # a CPU has one plan
    assert plan(torch.randn(3, 12).as_subclass(OnAGPU)) == "decode"
    assert plan(torch.randn(3, 1, 12).as_subclass(OnAGPU)) == "decode"
    assert plan(torch.randn(3, 2, 12).as_subclass(OnAGPU)) == "auto"


def test_threads_have_their_own_buffers(sorting):
    layer, pointers = make_layer(), []

    def run():
        with torch.no_grad(), use(layer, [1, 2]):
            pointers.append(routing_of(layer).ids.data_ptr())
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pointers)) == 2


def test_rows_outside_of_any_route_have_a_sorted_routing_too(sorting):
    layer = make_layer()
    routing = router.unrouted_routing(layer.unrouted)
    order, starts = sort_by_adapter(torch.tensor([-1]), SLOTS)
    assert torch.equal(routing.order, order) and torch.equal(routing.starts, starts)
    assert routing.ids.tolist() == [-1]


def test_a_backward_s_own_threads_find_the_caller_s_selection(monkeypatch):
    """As autograd does for a GPU, whose nodes run on a thread of its own."""
    import contextvars

    layer, found = make_layer(), []
    layer(torch.randn(2, 12))

    def device_thread(context):
        torch._C._stash_obj_in_tls("context", context)
        try:
            found.append(layer.router.current())
        except RuntimeError as error:
            found.append(str(error))
        torch._C._remove_obj_from_tls("context")

    def find():
        with monkeypatch.context() as patch:
            patch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
            thread = threading.Thread(target=device_thread, args=(contextvars.copy_context(),))
            thread.start()
            thread.join()
        return found[-1]

    assert find() is None
    with use(layer, [3]):
        selection = layer.router.current()
        assert find() is selection
    assert "call backward() inside the route" in find()


def test_inference_mode_leaves_nothing_that_autograd_refuses():
    linear = nn.Linear(12, 7)
    with torch.inference_mode():
        layer = make_layer(linear)
        write(layer, 0, (0,), 3)
        layer.bind(0, 0, 3)
        with use(layer, [0], trained=(0,), dropout={0: (0.5, 1)}):
            layer(torch.randn(2, 12))
    x = torch.randn(2, 12, requires_grad=True)
    with use(layer, [0], trained=(0,), dropout={0: (0.5, 1)}):
        layer(x).sum().backward()
    assert x.grad.any() and layer.bound[0].lora_a.grad.any()


def test_compiles_whole_and_once_for_all_ids():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = make_layer()
    write(layer, 0, (0,), 3)
    write(layer, 1, (1,), 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(4, 12)
    with torch.no_grad():
        for ids in ([0, 1, -1, 0], [1, 1, 1, 1], [-1, -1, -1, -1]):
            with use(layer, ids):
                torch.testing.assert_close(compiled(x), layer(x))
        assert counter.frame_count == 1
        torch.testing.assert_close(compiled(x), layer(x))
    layer.bind(0, 0, 3)
    with use(layer, [0, -1, 0, 1], trained=(0,), dropout={1: (0.5, 1)}):
        compiled(x).square().sum().backward()
        gradient, layer.bound[0].lora_a.grad = layer.bound[0].lora_a.grad, None
        torch.manual_seed(0)
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.bound[0].lora_a.grad, gradient)
