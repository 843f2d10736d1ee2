"""vLLM as it is started: the guide's script, tensor parallelism, and the HTTP server under load."""

import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")

import psutil
import torch
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


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(),
    reason="vLLM's AVX2 build fails by itself there: index out of range in self",
)
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
def server(folder, expected, environment):
    """The guide's command, on a free port, where adapters may be loaded and unloaded."""
    (command,) = re.findall(r"^python (-m vllm\..*)$", GUIDE, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command), "--dtype", "float32", f"--port={port}"],
            cwd=folder,
            env=environment | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "server.log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def url(server):
    return server[0]


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
    """One name has another folder each time, while others are asked a thousand times or more."""
    base = "models/small"
    stop = threading.Event()

    def is_right(i: int) -> bool:
        name, prompt = ("french", base)[i % 2], i % len(PROMPTS)
        tokens = expected[None if name == base else name][prompt]
        return complete(url, name, prompt) == (200, text_of(tokens))

    def wrong_of(first: int) -> int:
        """Of each eighth request, until all folders had their turns."""
        wrong = 0
        for i in itertools.count(first, 8):
            if i >= 1000 and stop.is_set():
                return wrong
            wrong += not is_right(i)

    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(wrong_of, first) for first in range(8)]
        try:
            for name in ("legal", "r32-head", "r8-all", "r16") * 3:
                adapter = {"lora_name": "changing", "lora_path": f"adapters/{name}"}
                loaded = post(url, "load_lora_adapter", **adapter)
                assert loaded[0] == 200, loaded
                for prompt in (0, 5):
                    right = 200, text_of(expected[name][prompt])
                    assert complete(url, "changing", prompt) == right
                assert post(url, "unload_lora_adapter", lora_name="changing")[0] == 200
                assert complete(url, "changing", 0)[0] == 404
        finally:
            stop.set()
    assert sum(other.result() for other in others) == 0
    assert SERVES in (folder / "server.log").read_text()


def resident(process: psutil.Process) -> float:
    """MB of the server and of the engine that it has started."""
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in family) / 1e6


def test_adapters_that_come_and_go_leave_no_memory_behind(server, expected):
    """An adapter of "legal" has a megabyte, so that one kept in each round would show."""
    url, process = server

    def rounds(first: int, count: int) -> None:
        """Each is loaded under a new name, replaced in place, asked for, and unloaded."""
        for i in range(first, first + count):
            name = f"guest-{i}"
            for asked in ("r16", "legal"):
                adapter = {"lora_name": name, "lora_path": f"adapters/{asked}"}
                replaces = asked == "legal"
                assert post(url, "load_lora_adapter", load_inplace=replaces, **adapter)[0] == 200
                assert complete(url, name, i % 8) == (200, text_of(expected[asked][i % 8]))
            assert post(url, "unload_lora_adapter", lora_name=name)[0] == 200

    def load() -> None:
        while not stop.is_set():
            complete(url, "french", 3)

    stop = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(load) for _ in range(2)]
        try:
            rounds(0, 25)
            before = resident(process)
            rounds(25, 100)
            grown = resident(process) - before
        finally:
            stop.set()
    assert not [other.exception() for other in others if other.exception()]
    assert grown < 30


def broken(folder: Path, what: str) -> Path:
    """A folder of "r16" with something wrong in it."""
    made = shutil.copytree(folder / "adapters/r16", folder / "broken" / what)
    weights, config = made / "adapter_model.safetensors", made / "adapter_config.json"
    if what == "no config":
        config.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "half of the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        changes = CHANGES[what]
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return made


CHANGES = {
    "a rank too large": {"r": 128},
    "another rank": {"r": 8},
    "DoRA": {"use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
}
BROKEN = {
    "no config": (404, "No adapter found for"),
    "no weights": (500, "doesn't contain tensors"),
    "half of the weights": (500, "file not fully covered"),
    "a rank too large": (500, "LoRA rank 128 is greater than max_lora_rank 64"),
    "another rank": (500, "LoRA 'bad' can't be served: lora_A and lora_B of"),
    "DoRA": (500, "does not yet support DoRA"),
    "modules to save": (500, "Unsupported modules_to_save: ['lm_head']"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_a_clear_error_and_the_others_are_served(url, folder, expected, what):
    made = broken(folder, what)
    found = post(url, "load_lora_adapter", lora_name="bad", lora_path=str(made))
    status, says = BROKEN[what]
    assert found[0] == status and says in found[1], found
    assert complete(url, "bad", 0)[0] == 404
    assert complete(url, "french", 3) == (200, text_of(expected["french"][3]))
    # What is mended can be loaded under the same name.
    adapter = {"lora_name": "bad", "lora_path": "adapters/r16"}
    assert post(url, "load_lora_adapter", **adapter)[0] == 200
    assert complete(url, "bad", 0) == (200, text_of(expected["r16"][0]))
    assert post(url, "unload_lora_adapter", lora_name="bad")[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("load", {"lora_name": "no", "lora_path": "adapters/no"}, 404, "No adapter found for"),
        ("load", {"lora_name": "", "lora_path": "adapters/r16"}, 400, "must be provided"),
        ("load", {"lora_name": "french", "lora_path": "adapters/r16"}, 400, "already been loaded"),
        ("load", {"lora_name": "models/small", "lora_path": "adapters/r16"}, 400, "base model"),
        ("unload", {"lora_name": "no"}, 404, "'no' cannot be found"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_or_unloaded_is_a_clear_error(url, path, body, status, says):
    found = post(url, f"{path}_lora_adapter", **body)
    assert found[0] == status and says in found[1], found
