"""The tune cache: its file, shared by processes, and the look-up of the nearest bucket."""

import errno
import json
import multiprocessing
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tune_caches import own_cache

from peft_kernels import triton
from peft_kernels.tools.tune import SHAPES
from peft_kernels.triton.lora_linear import plan_cache, plans

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
KEY = plan_cache.device_key(CPU)


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """The file of an empty tune cache of the test's own."""
    yield from own_cache(tmp_path / "cache")


def problem(direction="fwd", m=8192, n=4096, k=4096, r=16, dropout=False):
    return plans.Problem(direction, BF16, F32, m, n, k, r, dropout)


def write_cache(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def measured(*problems, plan="ii"):
    plan_cache.save({KEY: {problem.bucket(): plan for problem in problems}})


# ---- the file --------------------------------------------------------------------------------


def test_another_device_or_version_is_not_used(cache):
    case = problem()
    write_cache(cache, json.dumps({"NVIDIA X | torch 1 | triton 1": {case.bucket(): "ii"}}))
    assert plans.choose(CPU, case) == "library"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"b": []}}'])
def test_a_broken_file_warns_once_and_is_set_aside(cache, content):
    write_cache(cache, content)
    with pytest.warns(UserWarning, match=r"plans\.json is not a tune cache"):
        assert plans.choose(CPU, problem()) == "library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.choose(CPU, problem(m=1))
        measured(problem())
    assert json.loads(cache.read_text()) == {KEY: {problem().bucket(): "ii"}}
    assert cache.with_name("plans.json.broken").read_text() == content


def test_the_key_is_another_where_a_kernel_is(tmp_path):
    """So after an update nothing that the kernels before it took is believed."""
    assert KEY.endswith(f"kernels {plan_cache.sources_hash(Path(triton.__file__).parent)}")
    (tmp_path / "lora_linear").mkdir()
    file, hashes = tmp_path / "lora_linear" / "kernels.py", set()
    for content in ("", "BLOCK = 1", "BLOCK = 2"):
        file.write_text(content)
        hashes.add(plan_cache.sources_hash(tmp_path))
        assert plan_cache.sources_hash(tmp_path) in hashes
    file.rename(tmp_path / "tiles.py")
    assert plan_cache.sources_hash(tmp_path) not in hashes and len(hashes) == 3


def test_dora_has_buckets_of_its_own():
    """Its forward has a gain in every tile; its backward is LoRA's."""
    plain, gain = problem(), replace(problem(), gain=True)
    measured(plain)
    assert plans.choose(CPU, plain) == "ii" and plans.choose(CPU, gain) == "library"
    measured(gain, plan="i")
    assert plans.choose(CPU, plain) == "ii" and plans.choose(CPU, gain) == "i"


def test_a_plan_of_another_version_is_not_used_and_stays(cache):
    write_cache(cache, json.dumps({KEY: {problem().bucket(): "fastest"}}))
    assert plans.choose(CPU, problem()) == "library"
    assert plans.choose(CPU, problem(n=2048)) == "library"
    measured(problem("bwd"))
    assert json.loads(cache.read_text())[KEY][problem().bucket()] == "fastest"


def test_the_file_is_read_once(cache):
    write_cache(cache, "{}")
    plans.choose(CPU, problem())
    cache.unlink()
    cache.parent.rmdir()
    plans.choose(CPU, problem(m=1))
    assert plan_cache.load() == {}


def test_a_changed_file_is_read_again_when_asked(cache):
    assert plan_cache.load() == {}
    write_cache(cache, json.dumps({"a": {"b": "i"}}))
    assert plan_cache.load() == {}
    plan_cache.load_again()
    assert plan_cache.load() == {"a": {"b": "i"}}
    write_cache(cache, json.dumps({"a": {"b": "ii"}}))
    plan_cache.load_again()
    assert plan_cache.load() == {"a": {"b": "ii"}}


def test_an_unchanged_file_is_not_read_again(cache, monkeypatch):
    measured(problem())
    monkeypatch.setattr(plan_cache, "_read", None)
    plan_cache.load_again()
    assert plan_cache.load() == {KEY: {problem().bucket(): "ii"}}


def test_what_another_process_wrote_meanwhile_stays(cache):
    assert plan_cache.load() == {}
    write_cache(cache, json.dumps({KEY: {"theirs": "i"}, "another GPU": {"a": "library"}}))
    measured(problem())
    expected = {KEY: {"theirs": "i", problem().bucket(): "ii"}, "another GPU": {"a": "library"}}
    assert plan_cache.load() == json.loads(cache.read_text()) == expected


def test_what_cant_be_written_is_known_all_the_same(cache):
    write_cache(cache, "{}")
    cache.unlink()
    cache.mkdir()
    with pytest.warns(UserWarning, match="is not a tune cache"), pytest.raises(OSError):
        measured(problem())
    assert plan_cache.load() == {KEY: {problem().bucket(): "ii"}}


def test_a_disk_that_is_full_is_left_as_it_was(cache, monkeypatch):
    measured(problem())
    before = cache.read_text()

    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plan_cache.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        measured(problem(m=1))
    assert {path.name for path in cache.parent.iterdir()} == {cache.name, f"{cache.name}.lock"}
    assert cache.read_text() == before


def test_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PEFT_KERNELS_CACHE")
    monkeypatch.setattr(plan_cache.Path, "home", no_home)
    assert plan_cache.cache_file().name == "plans.json"


ROUNDS, WRITERS = 20, 4


def _save_many(writer, start):
    plan_cache.load()  # before the others have written
    start.wait()
    for number in range(ROUNDS):
        plan_cache.save({f"GPU {writer}": {str(number): "i"}, "both": {f"{writer} {number}": "ii"}})


def in_processes(cache):
    forked = multiprocessing.get_context("fork")  # with torch loaded
    start = forked.Barrier(WRITERS)
    writers = [forked.Process(target=_save_many, args=(w, start)) for w in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not any(writer.exitcode for writer in writers)
    return json.loads(cache.read_text())


def test_processes_that_write_at_once_lose_nothing(cache):
    found = in_processes(cache)
    numbers = {str(number): "i" for number in range(ROUNDS)}
    assert all(found[f"GPU {writer}"] == numbers for writer in range(WRITERS))
    assert len(found["both"]) == ROUNDS * WRITERS
    assert {path.name for path in cache.parent.iterdir()} == {"plans.json", "plans.json.lock"}


def test_without_locks_the_file_is_whole(cache, monkeypatch):
    monkeypatch.setattr(plan_cache, "fcntl", None)
    assert in_processes(cache)


# ---- the nearest bucket ----------------------------------------------------------------------

# n, k of q and o, k and v, gate and up, down
LLAMA_3_70B = ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("n", "k"), LLAMA_3_70B)
def test_a_layer_of_llama_3_70b_has_a_measured_plan(direction, n, k):
    measured(*(problem(direction, *shape) for shape in SHAPES), plan="library")
    for m in (1, 2, 3, 7, 33, 128, 300, 1000, 1024, 4096, 16384):
        for r in (8, 16, 64):
            bucket = problem(direction, m, n, k, r).bucket()
            assert plan_cache.nearest(CPU, bucket, plans.PLANS).plan == "library", bucket


def test_the_nearest_of_several():
    case = problem(m=512)
    measured(problem(m=1024), plan="library")
    assert plans.choose(CPU, case) == "library"
    measured(problem(m=512, n=2048), plan="ii")
    plans.forget_cache()
    assert plans.choose(CPU, case) == "ii"
    measured(case, plan="library")
    plans.forget_cache()
    assert plans.choose(CPU, case) == "library"


@pytest.mark.parametrize(
    "far",
    [
        problem(m=2048),  # rows by more than two
        problem(n=131072),
        problem(n=1024, k=1024, r=32),  # 2 + 2 + 1
        problem("bwd"),
        problem(dropout=True),
        replace(problem(), adapter_dtype=BF16),
        replace(problem(), dtype=torch.float16),
        replace(problem(), codes="int8/row"),
    ],
)
def test_what_is_far_or_of_another_kind_is_not_taken(far):
    measured(far)
    assert plan_cache.nearest(CPU, problem().bucket(), plans.PLANS) is None


def test_codes_are_matched_by_their_kind():
    case = replace(problem(m=32), codes="4-bit/64/nested")
    measured(replace(case, m=64, n=8192), plan="scratch")
    assert plans.choose(CPU, case) == "scratch"
    assert plans.choose(CPU, replace(case, codes="4-bit/64")) == "fused"


def test_a_near_plan_that_cant_serve_is_passed_over():
    case = problem(r=128)
    measured(problem(r=64), plan="ii")
    assert plans.choose(CPU, case) == "library"
    measured(problem(r=32), plan="i")
    plans.forget_cache()
    assert plans.choose(CPU, case) == "i"
