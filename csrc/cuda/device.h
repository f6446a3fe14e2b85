// One source, two builds. Under nvcc the kernels of this folder are CUDA. Compiled as plain C++ they run on the host:
// emulation.h then supplies the built-ins they use, so that their indexing and arithmetic are tested without a GPU.
// What is different on the two sides stands in this header and in mma.h; the kernels have no #if.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Both builds are linked into one library: nothing but the namespace keeps their inline functions apart.
#define UVC_BUILD gpu
#define UVC_DISPATCH_KEY CUDA
#else
#define UVC_BUILD host
#define UVC_DISPATCH_KEY CPU
#include "cuda/emulation.h"
#endif

namespace uvc::UVC_BUILD {

constexpr int WARP = 32;
// A number that a function may be given as a type, so that loops over it unroll without a test.
template <int N>
struct Constant {
  __host__ __device__ constexpr operator int() const { return N; }
};
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class T>
constexpr bool is_half = sizeof(T) == 2;
// What sums are kept in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float bits_to_float(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(Bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ inline float widen(Fp16 v) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  return float_of_half(v.bits);
#endif
}

template <class T>
__device__ inline T narrow(Wide<T> v) {
  if constexpr (!is_half<T>) {
    return v;
  } else {
    T out;
#ifdef __CUDACC__
    if constexpr (std::is_same_v<T, Bf16>)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
    out.bits = std::is_same_v<T, Bf16> ? bfloat_of_float(v) : half_of_float(v);
#endif
    return out;
  }
}

// Two neighbours of a row: one register for 16-bit types.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <class T>
__device__ inline Pair<T> pack(Wide<T> low, Wide<T> high) {
#ifdef __CUDACC__
  if constexpr (is_half<T>) {
    uint32_t word;
    if constexpr (std::is_same_v<T, Bf16>)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return reinterpret_cast<const Pair<T>&>(word);
  }
#endif
  return {narrow<T>(low), narrow<T>(high)};
}

// N elements that are read and written in one access where their address allows it.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T at[N];
};

template <class V>
__device__ inline V load(const void* from) {
#ifdef __CUDACC__
  return *static_cast<const V*>(from);
#else
  V value;
  std::memcpy(&value, __builtin_assume_aligned(from, alignof(V)), sizeof value);
  return value;
#endif
}
template <class V>
__device__ inline void store(void* to, const V& value) {
#ifdef __CUDACC__
  *static_cast<V*>(to) = value;
#else
  std::memcpy(__builtin_assume_aligned(to, alignof(V)), &value, sizeof value);
#endif
}
__host__ __device__ inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The shared memory that the launch asked for.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(256) unsigned char memory[];
  return memory;
#else
  return running->shared;
#endif
}

// Where something lies in it, in the bytes that addresses of shared memory count.
__device__ inline uint32_t shared_address(const void* place) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
#else
  return static_cast<uint32_t>(static_cast<const unsigned char*>(place) - running->shared);
#endif
}

// Starts a copy of 16 bytes into shared memory, of zeros unless `there`. It has arrived after copies_arrived(n), with
// n not less than the number of commit_copies() since, and for other threads after a barrier behind that.
__device__ inline void copy16(void* to, const void* from, bool there) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  running->copy16(to, from, there);
#endif
}
__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  running->commit_copies();
#endif
}
// Waits until at most `left` (0 to 3; more count as 3) of the newest groups are on their way.
__device__ inline void copies_arrived(int left) {
#ifdef __CUDACC__
  if (left <= 0)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (left == 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else if (left == 2)
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 3;" ::: "memory");
#else
  running->copies_arrived(left < 0 ? 0 : left > 3 ? 3 : left);
#endif
}

// a b + c, rounded once: nvcc makes that of a product and a sum, another compiler only where the processor has it.
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ inline double power_of_two(double x) { return exp2(x); }
// Two units in the last place, like exp2f, without its care for results below 2^-126.
__device__ inline float power_of_two(float x) {
#ifdef __CUDACC__
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#else
  return exp2f(x);
#endif
}

// The same number, but what follows from it is computed where it is used, not kept in registers from before.
__device__ inline int computed_again(int v) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / WARP; }

// A pair from the lane whose number differs in one bit.
template <class T>
__device__ inline Pair<T> pair_across(Pair<T> pair, int bit) {
#ifdef __CUDACC__
  const uint32_t word = __shfl_xor_sync(ALL_LANES, reinterpret_cast<const uint32_t&>(pair), bit);
  return reinterpret_cast<const Pair<T>&>(word);
#else
  return __shfl_xor_sync(ALL_LANES, pair, bit);
#endif
}

// The sum over `LANES` neighbouring lanes, in every one of them.
template <int LANES, class A>
__device__ inline A sum_of_lanes(A value) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}
template <int LANES, class A>
__device__ inline A max_of_lanes(A value) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) value = fmax(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

}  // namespace uvc::UVC_BUILD
