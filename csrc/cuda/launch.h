// What every launcher needs around its kernel: the dispatch key, the stream, the device and the
// errors, on a GPU and in the emulation on the CPU (csrc/simt).
#pragma once
#include <cuda_runtime.h>

#include "../common.h"

namespace peft_kernels {

// PK_NAME: of an op that is dispatched by device, the name of its CUDA kernels.
#if defined(__CUDACC__)
#define PK_KEY CUDA
#define PK_NAME(op) op "_cuda"
using torch::stable::accelerator::DeviceGuard;
inline cudaStream_t current_stream(int device) {
  const auto stream = torch::stable::accelerator::getCurrentStream(device);
  return static_cast<cudaStream_t>(stream.nativeHandle());
}
#else  // the emulation
#define PK_KEY CPU
#define PK_NAME(op) op
using simt::DeviceGuard;
inline cudaStream_t current_stream(int) { return nullptr; }
#endif

inline void check_cuda(cudaError_t status, const char* op, const char* call) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", call, ": ", cudaGetErrorString(status));
}

// Makes a device the current one of torch and of this library's own CUDA runtime, which is linked
// into it and which torch's guard doesn't know.
class CurrentDevice {
 public:
  CurrentDevice(int device, const char* op) : guard_(device) {
    check_cuda(cudaSetDevice(device), op, "cudaSetDevice");
  }

 private:
  DeviceGuard guard_;
};

}  // namespace peft_kernels
