// As much of the CUDA runtime as the launchers in csrc/cuda call, over the emulation: with it they
// compile as C++, and their ops run on the CPU, for tests.
#pragma once
#include "simt.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct dim3 {
  unsigned x;
  explicit dim3(unsigned size) : x(size) {}
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// A chip of three multiprocessors, each with room for one block.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? 3 : 99 << 10;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const P& p = *static_cast<P*>(arguments[0]);
  simt::launch(grid.x, block.x, int64_t(shared), {}, [&] { kernel(p); });
  return cudaSuccess;
}
template <class P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments,
                                        size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

namespace simt {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace simt
