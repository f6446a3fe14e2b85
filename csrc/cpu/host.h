// What the CPU ops share on the host side: checks, views, vendor matrix products, packing of kept rows and columns.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/loops.h"

namespace uvc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A plain list of int64 that outlives nothing: indices are read on the host.
struct Indices {
  const int64_t* begin;
  int64_t count;
  int64_t operator[](int64_t i) const { return begin[i]; }
};

inline Indices indices(const Tensor& t, int64_t limit, const char* message) {
  check(t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_cpu() && t.is_contiguous(), message);
  Indices list{data<int64_t>(t), t.size(0)};
  for (int64_t i = 0; i < list.count; ++i) check(list[i] >= 0 && list[i] < limit, message);
  return list;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()});
}
inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_zeros(like, {shape.begin(), shape.size()});
}

// The macros that check error codes changed their names after torch 2.10, so the codes are compared here.

// A matrix operand: rows x columns over a contiguous tensor, transposed when asked.
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns, bool transposed = false) {
  const int64_t plain[2] = {rows, columns}, plain_strides[2] = {columns, 1};
  const int64_t turned[2] = {columns, rows}, turned_strides[2] = {1, columns};
  AtenTensorHandle handle = nullptr;
  check(aoti_torch__reinterpret_tensor(t.get(), 2, transposed ? turned : plain,
                                       transposed ? turned_strides : plain_strides, 0, &handle) == AOTI_TORCH_SUCCESS,
        "a matrix view could not be made");
  return Tensor(handle);
}

// out = a b, by the vendor's matrix product.
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(a), from(b), from(out)};
  check(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "torch's matrix product failed");
  Tensor same = torch::stable::detail::to<Tensor>(stack[0]);
}

// packed[i, :] = full[rows[i], :]
template <class T>
void pack_rows(T* packed, const T* full, Indices rows, int64_t first, int64_t columns) {
  for (int64_t i = 0; i < rows.count; ++i)
    std::memcpy(packed + i * columns, full + (first + rows[i]) * columns, columns * sizeof(T));
}
template <class T>
void unpack_rows(T* full, const T* packed, Indices rows, int64_t first, int64_t columns) {
  for (int64_t i = 0; i < rows.count; ++i)
    std::memcpy(full + (first + rows[i]) * columns, packed + i * columns, columns * sizeof(T));
}
// packed[r, i] = full[r, columns[i]]
template <class T>
void pack_columns(T* packed, const T* full, int64_t rows, Indices columns, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, packed += columns.count, full += width)
    for (int64_t i = 0; i < columns.count; ++i) packed[i] = full[columns[i]];
}
template <class T>
void unpack_columns(T* full, const T* packed, int64_t rows, Indices columns, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, packed += columns.count, full += width)
    for (int64_t i = 0; i < columns.count; ++i) full[columns[i]] = packed[i];
}

inline float widen(Bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, Bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  out.bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// out[rows, n] += bias[n]; nothing without a bias.
template <class T>
void add_bias(const Tensor& out, const MaybeTensor& bias, int64_t rows, int64_t n) {
  if (!bias) return;
  check(bias->numel() == n, "the output bias must have one value per output");
  const Tensor source = as_contiguous(*bias);
  std::vector<Accumulator<T>> wide(n);
  for (int64_t i = 0; i < n; ++i) wide[i] = widen(data<T>(source)[i]);
  const auto& loop = loops<T>();
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    loop.add_to_rows(data<T>(out) + begin * n, wide.data(), end - begin, n);
  });
}

// The sum over the rows of g[rows, n], in a fixed order.
template <class T>
Tensor column_sums(const Tensor& g, int64_t rows, int64_t n) {
  Tensor out = empty(g, {n});
  std::vector<Accumulator<T>> total(n, 0);
  const auto& loop = loops<T>();
  torch::stable::parallel_for(0, (n + 63) / 64, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * 64, to = end * 64 < n ? end * 64 : n;
    loop.sum_columns(data<T>(g) + from, rows, n, total.data() + from, to - from);
  });
  for (int64_t i = 0; i < n; ++i) narrow(total[i], data<T>(out)[i]);
  return out;
}

// Calls work.template operator()<T>() for the type of `t`.
template <class F>
auto for_type(const Tensor& t, const char* op, F&& work) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return work.template operator()<float>();
    case ScalarType::Double: return work.template operator()<double>();
    case ScalarType::BFloat16: return work.template operator()<Bf16>();
    default: throw std::runtime_error(std::string(op) + ": the cpu kernel takes float32, float64 and bfloat16");
  }
}

// Which gradients a backward op is asked for: one bit per gradient, in the order of its outputs.
enum Need : int64_t { kNeedX = 1, kNeedWeight1 = 2, kNeedBias1 = 4, kNeedWeight2 = 8, kNeedBias2 = 16 };

}  // namespace uvc
