// Registers cuda_kernels_error: why this library's CUDA kernels don't run on a GPU, "" where they
// do. Found with an empty kernel, compiled for the same chips as the others.
#include <string>

#include "launch.h"

extern "C" __global__ void peft_kernels_probe() {}

namespace peft_kernels {
namespace {

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string about_driver() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "there is no NVIDIA driver";
  return "the driver is for CUDA " + version(driver) + ", they are linked to " + version(runtime);
}

std::string cuda_kernels_error(int64_t device) {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaSetDevice(static_cast<int>(device));
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, peft_kernels_probe);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // else the next launch would report it
  return std::string(cudaGetErrorString(status)) + " (" + about_driver() + ")";
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, library) {
  library.def("cuda_kernels_error(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_kernels_error", TORCH_BOX(&peft_kernels::cuda_kernels_error));
}
