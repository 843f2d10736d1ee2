"""The emulation itself: what it computes, and that it sees the mistakes it is there to see."""

import ctypes
import shutil
import subprocess

import pytest
import torch
from decode_driver import CSRC

THREADS, BLOCKS = 64, 3
# Each kernel writes out[thread of the grid].
KERNELS = r"""
#include "device.cuh"
using namespace peft_kernels::cuda;

namespace {

float* out;  // [BLOCKS * THREADS], and an input behind it

void turned_around(int t) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[t] = float(t);
  __syncthreads();
  store(out + blockIdx.x * blockDim.x + t, shared[blockDim.x - 1 - t]);
}

void sums(int t) {
  float down = float(t);
  for (int lanes = 16; lanes; lanes /= 2) down += __shfl_down_sync(0xffffffff, down, lanes);
  const float first = __shfl_sync(0xffffffff, down, 0);
  const float both = sum_over_lanes(float(t));
  store(out + blockIdx.x * blockDim.x + t, first == both ? both : -1.0f);
}

void neighbours_blocks(int t) {
  GridBarrier barrier;
  store(out + blockIdx.x * blockDim.x + t, float(blockIdx.x));
  barrier.arrive();
  barrier.wait();
  const float seen = load(out + (blockIdx.x + 1) % gridDim.x * blockDim.x + t);
  barrier.arrive();
  barrier.wait();
  store(out + blockIdx.x * blockDim.x + t, seen);
}

template <bool WAITS>
void copied(int t) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  copy(shared + t, out + gridDim.x * blockDim.x + t);
  commit_copies();
  commit_copies();
  if (WAITS) wait_for_copies<1>();
  store(out + blockIdx.x * blockDim.x + t, shared[t]);
}

void returns_early(int t) {
  if (t == 5) return;
  __syncthreads();
}
void stays_away(int) {
  GridBarrier barrier;
  if (blockIdx.x == 1) return;
  barrier.arrive();
  barrier.wait();
}
void divided_warp(int t) { __shfl_xor_sync(t % 2 ? 0xffffffffu : 0x55555555u, 1.0f, 2); }
void missing_lane(int t) { if (t % 32 != 3) __syncwarp(); }
void outside(int t) { store(out + 4096 + t, 1.0f); }
void misaligned(int t) { load(reinterpret_cast<Pack<float, 4>*>(out + t)); }

}  // namespace

extern "C" int run(int which, int seed, float* data, int floats, char* error) {
  void (*const kernels[])(int) = {turned_around, sums,          neighbours_blocks, copied<true>,
                                  copied<false>, returns_early, stays_away,        divided_warp,
                                  missing_lane,  outside,       misaligned};
  out = data;
  simt::buffers.clear();
  simt::buffers.push_back({reinterpret_cast<char*>(data), floats * 4});
  try {
    simt::launch(3, 64, 256, {uint64_t(seed)}, [&] { kernels[which](threadIdx.x); });
  } catch (const std::exception& problem) {
    std::strncpy(error, problem.what(), 511);
    return 1;
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(which, seed): the kernel's output, or the error it ended with."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("simt")
    (folder / "kernels.cpp").write_text(KERNELS)
    command = ["g++", "-std=c++20", "-O1", f"-I{CSRC / 'cuda'}", "-shared", "-fPIC", "kernels.cpp"]
    subprocess.run([*command, "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))

    def call(which, seed=0):
        data = torch.arange(float(BLOCKS * THREADS + THREADS))
        error = ctypes.create_string_buffer(512)
        pointer = ctypes.c_void_p(data.data_ptr())
        failed = library.run(which, seed, pointer, data.numel(), error)
        return error.value.decode() if failed else data[: BLOCKS * THREADS].view(BLOCKS, THREADS)

    return call


@pytest.mark.parametrize("seed", range(9))
def test_computes_what_a_gpu_would(run, seed):
    threads = torch.arange(float(THREADS))
    assert torch.equal(run(0, seed), threads.flip(0).expand(BLOCKS, -1))
    sums = threads.view(2, 32).sum(1).repeat_interleave(32)
    assert torch.equal(run(1, seed), sums.expand(BLOCKS, -1))
    blocks = torch.tensor([1.0, 2.0, 0.0])
    assert torch.equal(run(2, seed), blocks[:, None].expand(-1, THREADS))
    assert torch.equal(run(3, seed), (threads + BLOCKS * THREADS).expand(BLOCKS, -1))


def test_a_copy_that_nobody_waited_for_has_not_come(run):
    assert run(4).isnan().all()


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (5, "deadlock: .*63 threads at __syncthreads, 0 at a warp's, 1 returned"),
        (6, "deadlock: .*2 blocks at the grid's barrier"),
        (7, "different masks|deadlock: "),
        (8, "deadlock: .*62 at a warp's, 2 returned"),
        (9, "outside every buffer"),
        (10, "misaligned"),
    ],
)
def test_sees_mistakes(run, which, message):
    for seed in range(9):
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(run(which, seed))
