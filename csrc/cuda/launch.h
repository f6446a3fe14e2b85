// The host side of the kernels in this folder: checks, the type of the elements, and the launch itself, which is one of
// CUDA on the current stream or, in the host build, a parallel loop over the blocks.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.h"

#ifdef __CUDACC__
#include <dlfcn.h>
#endif

namespace uvc::UVC_BUILD {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, float>    ? ScalarType::Float
                                   : std::is_same_v<T, double> ? ScalarType::Double
                                   : std::is_same_v<T, Bf16>   ? ScalarType::BFloat16
                                                               : ScalarType::Half;

// Calls work.template operator()<T>() for the element type of `t`.
template <class F>
auto for_type(const Tensor& t, const char* op, F&& work) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return work.template operator()<float>();
    case ScalarType::BFloat16: return work.template operator()<Bf16>();
    case ScalarType::Half: return work.template operator()<Fp16>();
#ifndef __CUDACC__
    case ScalarType::Double: return work.template operator()<double>();
#endif
    default:
      throw std::runtime_error(std::string(op) + ": the kernel takes float32, bfloat16 and float16, on the host float64");
  }
}

// What every kernel may ask for without being allowed to.
constexpr int64_t kFreeSharedMemory = 48 * 1024;
// Lets a kernel have all the shared memory that a block of a device can have, once: a bound that followed each launch
// would be another thread's. Who comes second waits, as the kernel cannot be launched before.
template <class Allow>
void allow_once(const void* kernel, int device, Allow&& allow) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> hold(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  allow();
  allowed.insert({kernel, device});
}

#ifdef __CUDACC__

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Its functions for CUDA stand in a library that a CPU build of torch lacks; so they are looked up where it is loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Ask = int32_t (*)(int32_t, void**);
  static const Ask ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Ask>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(ask != nullptr, "uvc_kernels: this torch has no CUDA streams; install its CUDA build");
  void* stream = nullptr;
  check(ask(device, &stream) == 0, "uvc_kernels: torch does not name its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// The device of the tensors of an op, current while this lives.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  // Bytes of shared memory that one block may ask for.
  int64_t shared_memory() const {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_), "uvc_kernels");
    return bytes;
  }
  int64_t processors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), "uvc_kernels");
    return count;
  }
  template <class... P, class... A>
  void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, A... arguments) const {
    if (blocks == 0) return;
    check(blocks <= INT32_MAX, std::string(op) + ": " + std::to_string(blocks) + " blocks are too many for one launch");
    if (shared > kFreeSharedMemory)
      allow_once(reinterpret_cast<const void*>(kernel), index_, [&] {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_memory())), op);
      });
    kernel<<<static_cast<unsigned>(blocks), threads, shared, current_stream(index_)>>>(arguments...);
    check_cuda(cudaGetLastError(), op);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#else

class Device {
 public:
  explicit Device(const Tensor&) : index_(host::device()) {}
  // As on a GPU of compute capability 9.0.
  int64_t shared_memory() const { return 227 * 1024; }
  int64_t processors() const { return host::processors(); }
  template <class... P, class... A>
  void launch(const char* op, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, A... arguments) const {
    check(threads <= 1024 && shared <= shared_memory(), std::string(op) + ": a block is too large for any GPU");
    const auto* name = reinterpret_cast<const void*>(kernel);
    if (shared > kFreeSharedMemory) allow_once(name, index_, [&] { host::driver.allow(name, index_, shared_memory()); });
    check(shared <= std::max(kFreeSharedMemory, host::driver.allowed(name, index_)),
          std::string(op) + ": the driver refuses a launch with more shared memory than its kernel is allowed");
    host::last_launch[0] = blocks, host::last_launch[1] = threads, host::last_launch[2] = shared;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Machine machine;
      Machine* const before = std::exchange(running, &machine);
      // a GPU keeps no order among blocks
      for (int64_t i = begin; i < end; ++i)
        machine.run(static_cast<unsigned>(machine.early ? begin + end - 1 - i : i), static_cast<unsigned>(blocks),
                    threads, shared, [&] { kernel(arguments...); });
      running = before;
    });
  }

 private:
  int index_;
};

#endif

}  // namespace uvc::UVC_BUILD
