"""The Python of docs/guides/vllm.md, as a script of its own, with the package as installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("peft")

import peft
import tokenizers
import transformers
from installed import install_metadata

ROOT = Path(__file__).parents[2]
WORDS = ["<unk>", "one", "two", *(f"w{i}" for i in range(61))]

pytestmark = pytest.mark.filterwarnings("ignore")


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def text_of(model) -> str:
    out = model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=8, do_sample=False)
    return tokenizer().decode(out[0, 2:])


@pytest.mark.long
def test_the_script_of_the_guide(tmp_path):
    base().save_pretrained(tmp_path / "models/small")
    tokenizer().save_pretrained(tmp_path / "models/small")
    expected = []
    for name, rank in (("french", 8), ("legal", 48)):
        model = peft.get_peft_model(
            base(), peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapters" / name)
        expected.append(text_of(model.eval()))
    expected.append(text_of(base()))
    assert len(set(expected)) == 3
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/guides/vllm.md").read_text(), re.M | re.S
    )
    (tmp_path / "script.py").write_text(code)
    path = os.pathsep.join([str(ROOT), str(install_metadata(tmp_path / "installed"))])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    log = done.stdout + done.stderr
    assert "peft_kernels serves LoRA requests on its CPU kernels." in log
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert [line for line in printed if line in expected] == expected, log[-4000:]
