"""A model that vLLM compiles as it does on a GPU, on the wrapper of GPUs: its greedy tokens.

On a CPU, where vLLM compiles no model with LoRA of its own accord; the kernels are the CPU's.
"""

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")

from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform
from vllm_models import ADAPTERS, PROMPTS, SETTINGS, options, rotations, serve, write_folders

from peft_kernels.integrations.vllm.plugin import GPU_WRAPPER

SLOTS = 4

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def expected(folder):
    return write_folders(folder)


def compiling(check_and_update_config):
    """The platform's settings, and the whole model as one graph that has no guards."""

    def run(cls, config):
        check_and_update_config(config)
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        config.compilation_config.backend = "eager"

    return classmethod(run)


@pytest.fixture(scope="module")
def llm(folder, expected):
    with pytest.MonkeyPatch.context() as patch:
        # The plugin, which vLLM finds where the package is installed, would take the CPU's wrapper.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PEFT_KERNELS_VLLM": "0"}
        for name, value in {**own, **SETTINGS}.items():
            patch.setenv(name, value)
        patch.setattr(CpuPlatform, "get_punica_wrapper", classmethod(lambda cls: GPU_WRAPPER))
        settings = compiling(CpuPlatform.check_and_update_config)
        patch.setattr(CpuPlatform, "check_and_update_config", settings)
        from vllm import LLM

        made = LLM(str(folder / "models/small"), **options(SLOTS))
        yield made
        made.llm_engine.engine_core.shutdown()


def test_the_model_is_one_graph(llm):
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_graph_calls_the_ops_of_the_wrapper(llm, folder, monkeypatch):
    from peft_kernels.integrations.vllm import traced

    called = []
    run = traced._run
    monkeypatch.setattr(traced, "_run", lambda *args: called.append(args) or run(*args))
    serve(llm, folder, [None] * len(PROMPTS))
    assert not called
    serve(llm, folder, [next(iter(ADAPTERS))] * len(PROMPTS))
    assert called


@pytest.mark.parametrize("names", rotations()[::3], ids=str)
def test_adapters_mixed_with_each_other_and_with_the_base(llm, folder, expected, names):
    """There are more of them than slots, so that slots are used again."""
    found = serve(llm, folder, names)
    assert found == [expected[name][i] for i, name in enumerate(names)]


def test_base_rows_beside_full_slots(llm, folder, expected):
    full = list(ADAPTERS)[:SLOTS]
    serve(llm, folder, full, PROMPTS[:SLOTS])
    names = [None, *full, None]
    found = serve(llm, folder, names, PROMPTS[: len(names)])
    assert found == [expected[name][i] for i, name in enumerate(names)]
