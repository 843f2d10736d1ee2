"""vLLM as it is started: the guide's script, tensor parallelism, and the HTTP server under load."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")

from installed import install_metadata
from vllm_models import PROMPTS, SETTINGS, TOKENS, rotations, text_of, write_folders

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/vllm.md").read_text()
SERVES = "peft_kernels serves LoRA requests on its CPU kernels."

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def expected(folder):
    return write_folders(folder)


@pytest.fixture(scope="module")
def environment(folder):
    """The package as installed, and vLLM's settings."""
    path = [str(ROOT), str(ROOT / "tests/support"), str(install_metadata(folder / "installed"))]
    return os.environ | SETTINGS | {"PYTHONPATH": os.pathsep.join(path)}


def run_script(code: str, folder: Path, environment: dict[str, str]) -> str:
    (folder / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert SERVES in done.stdout + done.stderr
    return done.stdout


def test_the_script_of_the_guide(folder, expected, environment):
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    texts = [text_of(expected[name][0]) for name in ("french", "legal", None)]
    lines = [line.strip() for line in run_script(code, folder, environment).splitlines()]
    assert [line for line in lines if line in texts] == texts


PARALLEL = """
import json
from pathlib import Path
from vllm_models import options, rotations, serve

if __name__ == "__main__":
    from vllm import LLM

    llm = LLM("models/small", tensor_parallel_size=2, fully_sharded_loras=SHARDED, **options(4))
    print("found", json.dumps([serve(llm, Path("."), names) for names in rotations()]))
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_tensor_parallelism(folder, expected, environment, sharded):
    """Two processes, each with half of the heads; sharded, with a part of each adapter's A too."""
    two = environment | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    out = run_script(PARALLEL.replace("SHARDED", str(sharded)), folder, two)
    (line,) = (line for line in out.splitlines() if line.startswith("found "))
    assert json.loads(line.removeprefix("found ")) == [
        [expected[name][i] for i, name in enumerate(names)] for names in rotations()
    ]


# ---- HTTP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(folder, expected, environment):
    """The guide's command, on a free port, where adapters may be loaded and unloaded."""
    (command,) = re.findall(r"^python (-m vllm\..*)$", GUIDE, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, *shlex.split(command), "--dtype", "float32", f"--port={port}"],
            cwd=folder,
            env=environment | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "server.log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def post(url: str, path: str, **body) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def complete(url: str, name: str, prompt: int) -> tuple[int, str]:
    status, body = post(
        url, "completions", model=name, prompt=PROMPTS[prompt], max_tokens=TOKENS, temperature=0
    )
    return status, json.loads(body)["choices"][0]["text"].strip() if status == 200 else body


def test_adapters_come_and_go_under_load(url, folder, expected):
    """One name has another folder each time, while others are asked for a thousand times."""
    base = "models/small"

    def is_right(i: int) -> bool:
        name, prompt = ("french", base)[i % 2], i % len(PROMPTS)
        tokens = expected[None if name == base else name][prompt]
        return complete(url, name, prompt) == (200, text_of(tokens))

    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(is_right, i) for i in range(1000)]
        rounds = 0
        while not all(answer.done() for answer in answers):
            name = ("legal", "r32-head", "r8-all", "r16")[rounds % 4]
            adapter = {"lora_name": "changing", "lora_path": f"adapters/{name}"}
            loaded = post(url, "load_lora_adapter", **adapter)
            assert loaded[0] == 200, loaded
            for prompt in (0, 5):
                assert complete(url, "changing", prompt) == (200, text_of(expected[name][prompt]))
            assert post(url, "unload_lora_adapter", lora_name="changing")[0] == 200
            assert complete(url, "changing", 0)[0] == 404
            rounds += 1
    assert sum(not answer.result() for answer in answers) == 0
    assert rounds > 8
    assert SERVES in (folder / "server.log").read_text()


def test_a_folder_that_is_none_is_a_clear_error(url):
    status, body = post(url, "load_lora_adapter", lora_name="no", lora_path="adapters/no")
    assert status == 404 and "No adapter found for adapters/no" in body
