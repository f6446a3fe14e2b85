// The MLP between its two matrix products, element by element:
//   a = act(u), with a gate a = act(gate) * u;   backward: a again, and the gradients of u and of the gate.
#include "cuda/launch.h"

namespace uvc::UVC_BUILD {
namespace {

// The order is that of the cpu kernels.
enum class Activation : int64_t { kGelu, kGeluTanh, kRelu, kSilu, kQuickGelu };

constexpr int kThreads = 256, kEach = 8;

template <class A>
struct Slope {
  A value, slope;
};

// The normal distribution's P(z < x) and density.
__device__ inline Slope<double> normal(double x) {
  return {0.5 * erfc(-x * 0.70710678118654752), 0.39894228040143268 * exp(-0.5 * x * x)};
}
template <bool FAST>
__device__ inline Slope<float> normal(float x) {
  if constexpr (!FAST) return {0.5f * erfcf(-x * 0.70710678f), 0.39894228f * expf(-0.5f * x * x)};
  // For results of 16 bits: one exponential serves both; the polynomial (Abramowitz and Stegun 7.1.26) errs by 1e-7.
  const float e = power_of_two(x * x * -0.72134752f), size = fabsf(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * size);
  const float tail =
      0.5f * e * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return {x < 0 ? tail : 1.0f - tail, 0.39894228f * e};
}

template <class T>
__device__ inline Slope<Wide<T>> activation(Activation kind, Wide<T> x) {
  using A = Wide<T>;
  // x s(c x): c = 1 is silu
  const auto swish = [](A x, A c) -> Slope<A> {
    const A s = 1 / (1 + exp(-c * x));
    return {x * s, s + c * x * s * (1 - s)};
  };
  switch (kind) {
    case Activation::kGelu: {
      Slope<A> n;
      if constexpr (std::is_same_v<T, double>)
        n = normal(x);
      else
        n = normal<is_half<T>>(x);
      return {x * n.value, n.value + x * n.slope};
    }
    case Activation::kGeluTanh: {
      const A c = static_cast<A>(0.79788456080286536), cube = static_cast<A>(0.044715);
      const A t = tanh(c * (x + cube * x * x * x));
      return {x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) * c * (1 + 3 * cube * x * x) / 2};
    }
    case Activation::kRelu: return {x < 0 ? 0 : x, static_cast<A>(x > 0)};
    case Activation::kSilu: return swish(x, 1);
    default: return swish(x, static_cast<A>(1.702));
  }
}

// Calls work(first, count up to 8) over all n elements.
template <class F>
__device__ inline void for_all(int64_t n, F&& work) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
  if (first < n) work(first, n - first < kEach ? static_cast<int>(n - first) : kEach);
}
template <class T>
__device__ inline Vector<T, kEach> read(const T* from, int count) {
  if (count == kEach) return load<Vector<T, kEach>>(from);
  Vector<T, kEach> out;
#pragma unroll
  for (int i = 0; i < kEach; ++i) out.at[i] = i < count ? from[i] : T{};
  return out;
}
template <class T>
__device__ inline void write(T* to, const Vector<T, kEach>& values, int count) {
  if (count == kEach) return store(to, values);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (i < count) to[i] = values.at[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const T* u, const T* gate, Activation kind, T* a, int64_t n) {
  for_all(n, [&](int64_t first, int count) {
    const auto values = read(u + first, count), gates = gate ? read(gate + first, count) : values;
    Vector<T, kEach> out;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const Wide<T> active = activation<T>(kind, widen(gates.at[i])).value;
      out.at[i] = narrow<T>(gate ? active * widen(values.at[i]) : active);
    }
    write(a + first, out, count);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) activate_backward_kernel(const T* u, const T* gate, const T* grad_a,
                                                                      Activation kind, T* a, T* grad_u, T* grad_gate,
                                                                      int64_t n) {
  for_all(n, [&](int64_t first, int count) {
    const auto values = read(u + first, count), gates = gate ? read(gate + first, count) : values;
    const auto grads = read(grad_a + first, count);
    Vector<T, kEach> active, to_u, to_gate;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const auto [value, slope] = activation<T>(kind, widen(gates.at[i]));
      const Wide<T> x = widen(values.at[i]), grad = widen(grads.at[i]);
      active.at[i] = narrow<T>(gate ? value * x : value);
      to_u.at[i] = narrow<T>(grad * (gate ? value : slope));
      to_gate.at[i] = narrow<T>(grad * x * slope);
    }
    write(a + first, active, count);
    write(grad_u + first, to_u, count);
    if (gate) write(grad_gate + first, to_gate, count);
  });
}

// Null without a tensor; each must be like `u`, so that eight elements lie alike in all of them.
template <class T>
T* like(const Tensor& u, const MaybeTensor& t) {
  if (!t) return nullptr;
  check(t->scalar_type() == u.scalar_type() && t->numel() == u.numel() && t->is_contiguous(),
        "cuda_activate: all tensors must be contiguous, of one dtype and shape");
  check(aligned(t->mutable_data_ptr()), "cuda_activate: tensors must start at a multiple of 16 bytes");
  return data<T>(*t);
}

Activation known(int64_t kind) {
  check(kind >= 0 && kind <= static_cast<int64_t>(Activation::kQuickGelu),
        "cuda_activate: unknown activation " + std::to_string(kind));
  return static_cast<Activation>(kind);
}

int64_t blocks_for(int64_t n) { return (n + kThreads * kEach - 1) / (kThreads * kEach); }

void activate(Tensor u, MaybeTensor gate, int64_t kind, Tensor a) {
  const Device device(u);
  for_type(u, "cuda_activate", [&]<class T>() {
    const int64_t n = u.numel();
    device.launch("cuda_activate", &activate_kernel<T>, blocks_for(n), kThreads, 0, like<T>(u, u), like<T>(u, gate),
                  known(kind), like<T>(u, a), n);
  });
}

void activate_backward(Tensor u, MaybeTensor gate, Tensor grad_a, int64_t kind, Tensor a, Tensor grad_u,
                       MaybeTensor grad_gate) {
  check(gate.has_value() == grad_gate.has_value(), "cuda_activate_backward: grad_gate goes with gate");
  const Device device(u);
  for_type(u, "cuda_activate_backward", [&]<class T>() {
    const int64_t n = u.numel();
    device.launch("cuda_activate_backward", &activate_backward_kernel<T>, blocks_for(n), kThreads, 0, like<T>(u, u),
                  like<T>(u, gate), like<T>(u, grad_a), known(kind), like<T>(u, a), like<T>(u, grad_u),
                  like<T>(u, grad_gate), n);
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) {
  m.impl("cuda_activate", TORCH_BOX(&activate));
  m.impl("cuda_activate_backward", TORCH_BOX(&activate_backward));
}

}  // namespace
}  // namespace uvc::UVC_BUILD
