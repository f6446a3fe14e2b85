// What the CPU ops share on the host side: checks, views, matrix products, packing of kept rows and columns.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
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
#include <type_traits>
#include <vector>

#include "cpu/denormals.h"
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

// The macros that check error codes changed their names after torch 2.10, so the codes are compared here.

// A matrix over the memory of t, from entry `offset` on, whose rows stand `stride` entries apart; transposed when asked.
inline Tensor view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns, int64_t stride,
                   bool transposed = false) {
  const int64_t plain[2] = {rows, columns}, plain_strides[2] = {stride, 1};
  const int64_t turned[2] = {columns, rows}, turned_strides[2] = {1, stride};
  AtenTensorHandle handle = nullptr;
  check(aoti_torch__reinterpret_tensor(t.get(), 2, transposed ? turned : plain,
                                       transposed ? turned_strides : plain_strides, offset,
                                       &handle) == AOTI_TORCH_SUCCESS,
        "a matrix view could not be made");
  return Tensor(handle);
}
// The same over all of a contiguous tensor.
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns, bool transposed = false) {
  return view(t, 0, rows, columns, columns, transposed);
}

// A share of 0..n, of `size` entries.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Those rows, or those columns, of a contiguous matrix of `columns` columns (`rows` rows).
inline Tensor rows_of(const Tensor& t, Range r, int64_t columns, bool transposed = false) {
  return view(t, r.begin * columns, r.size(), columns, columns, transposed);
}
inline Tensor columns_of(const Tensor& t, int64_t rows, Range r, int64_t columns, bool transposed = false) {
  return view(t, r.begin, rows, r.size(), columns, transposed);
}

// ---- threads ----

// One of `count` shares of the work, and which part of 0..n is its own, in whole units.
struct Share {
  int64_t index, count;
  Range of(int64_t n, int64_t unit = 16) const {
    const int64_t each = ((n + unit - 1) / unit + count - 1) / count * unit;
    return {std::min(n, index * each), std::min(n, (index + 1) * each)};
  }
};

// While this lives the calling thread has a share, and cuts nothing further.
struct InShare {
  InShare() { here() = true; }
  ~InShare() { here() = false; }
  static bool& here() {
    static thread_local bool here = false;
    return here;
  }
};

// work(share) for as many shares as there are threads. All products and loops of a share run on its thread: one that
// sleeps is woken once, not for each of them (about 25 us), and ragged sizes are cut evenly. Where 0..n does not cut
// evenly there is one share, whose products and loops are themselves cut.
template <class F>
void for_shares(int64_t n, int64_t unit, F&& work) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || 4 * Share{0, threads}.of(n, unit).end * threads > 5 * n) return work(Share{0, 1});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const InShare in_share;
    for (int64_t i = begin; i < end; ++i) work(Share{i, threads});
  });
}

// ---- products ----

// out = a b in float32, each thread some columns, or where these are fewer than the threads some rows of them.
inline void multiply_own(const Tensor& out, const Tensor& a, const Tensor& b) {
  const Product<float> p{a.size(0),       a.size(1),   b.size(1),   data<float>(a), a.stride(0),      a.stride(1),
                         data<float>(b),  b.stride(0), b.stride(1), data<float>(out), out.stride(0)};
  const int64_t across = (p.columns + kProductColumns - 1) / kProductColumns;
  const int64_t threads = InShare::here() ? 1 : torch::stable::get_num_threads();
  const int64_t down = std::clamp<int64_t>((threads + across - 1) / across, 1, p.rows / 48 + 1);
  const int64_t height = (p.rows + down - 1) / down;
  parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / across * height, column = begin % across;
      const int64_t next = std::min(across, column + end - begin);
      loops<float>().multiply(p, row, std::min(p.rows, row + height), column * kProductColumns,
                              std::min(p.columns, next * kProductColumns));
      begin += next - column;
    }
  });
}
// out = a b, by the vendor's product unless ours is known to be faster. Not through torch's dispatcher, whose state is the
// calling thread's.
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.numel() == 0) return;
  if (out.scalar_type() == ScalarType::Float && own_products() && out.stride(1) == 1 &&
      (b.stride(0) == 1 || b.stride(1) == 1))
    return multiply_own(out, a, b);
  check(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()) == AOTI_TORCH_SUCCESS, "torch's matrix product failed");
}

// ---- types ----

// Calls work.template operator()<T>() for the element type of `t`.
template <class F>
auto for_storage(const Tensor& t, const char* op, F&& work) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return work.template operator()<float>();
    case ScalarType::Double: return work.template operator()<double>();
    case ScalarType::BFloat16: return work.template operator()<Bf16>();
    case ScalarType::Half: return work.template operator()<F16>();
    default: throw std::runtime_error(std::string(op) + ": the cpu kernel takes float32, float64, bfloat16, float16");
  }
}
// The same for the type that is computed in: float16 is stored, and float32 computes. No vendor has a fast product of
// float16 matrices on a CPU.
template <class F>
auto for_type(const Tensor& t, const char* op, F&& work) {
  return for_storage(t, op, [&]<class T>() {
    if constexpr (std::is_same_v<T, F16>) {
      return work.template operator()<float>();
    } else {
      return work.template operator()<T>();
    }
  });
}
template <class T>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;
template <>
constexpr ScalarType kType<Bf16> = ScalarType::BFloat16;

template <class T>
Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, kType<T>);
}

// All parameters of a layer share one dtype: that of x, or float32 when x comes from autocast.
inline void check_parameters(const Tensor& x, const Tensor& weight, std::initializer_list<MaybeTensor> others,
                             const char* message) {
  const ScalarType type = weight.scalar_type();
  check(type == x.scalar_type() || (type == ScalarType::Float && x.scalar_type() != ScalarType::Double), message);
  for (const MaybeTensor& other : others) check(!other || other->scalar_type() == type, message);
}

// ---- packing of kept rows and columns, and back ----

using Index = std::vector<int32_t>;

// Where each of `size` positions stands in `list`; -1 where it does not.
inline Index inverse(const Index& list, int64_t size) {
  Index where(size, -1);
  for (size_t i = 0; i < list.size(); ++i) where[list[i]] = static_cast<int32_t>(i);
  return where;
}
inline Index positions(Indices list) { return Index(list.begin, list.begin + list.count); }

// Splits rows of `columns` entries into pieces worth a thread.
template <class F>
void for_rows(int64_t rows, int64_t columns, int64_t unit, F&& work) {
  const int64_t units = (rows + unit - 1) / unit;
  const int64_t grain = std::max<int64_t>(1, 131072 / std::max<int64_t>(1, columns * unit));
  parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    work(begin * unit, std::min(rows, end * unit));
  });
}

// out[i, :] = in[index[i], :], zeros where index is -1; rows of `columns` entries.
inline void take_rows(const Tensor& out, const Tensor& in, const int32_t* index, int64_t rows, int64_t columns) {
  if (columns == 0) return;  // an empty tensor has no address, not even for nothing
  for_storage(out, "gather", [&]<class Out>() {
    for_storage(in, "gather", [&]<class In>() {
      const auto& copy = copies<Out, In>();
      for_rows(rows, columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          Out* to = data<Out>(out) + i * columns;
          if (index[i] < 0)
            std::memset(to, 0, columns * sizeof(Out));
          else
            copy.row(data<In>(in) + index[i] * columns, to, columns);
        }
      });
    });
  });
}

// out[index[i], :] = in[i, :] for the rows i of `from`, and zeros for those rows of out in `to` that no i names by
// `where`, the inverse of index.
inline void put_rows(const Tensor& out, const Tensor& in, const Index& index, Range from, const Index& where, Range to,
                     int64_t columns) {
  if (columns == 0) return;
  for_storage(out, "gather", [&]<class Out>() {
    for_storage(in, "gather", [&]<class In>() {
      const auto& copy = copies<Out, In>();
      for_rows(from.size(), columns, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = from.begin + begin; i < from.begin + end; ++i)
          copy.row(data<In>(in) + i * columns, data<Out>(out) + index[i] * columns, columns);
      });
      for (int64_t i = to.begin; i < to.end; ++i)
        if (where[i] < 0) std::memset(data<Out>(out) + i * columns, 0, columns * sizeof(Out));
    });
  });
}

// `n` rounded up to a width that products are fast at, as `align` of kernels/indices.py does.
inline int64_t padded(int64_t n) { return (n + 7) / 8 * 8; }
// Rows [padded(n), columns], of which those behind the first n are zero.
template <class T>
Tensor padded_rows(const Tensor& like, int64_t n, int64_t columns) {
  Tensor rows = empty(like, {padded(n), columns});
  if (columns > 0) std::memset(data<T>(rows) + n * columns, 0, (padded(n) - n) * columns * sizeof(T));
  return rows;
}

// out[:, j] = in[:, index[j]], zeros where index is -1; `rows` rows, `n` columns of out and `width` of in.
inline void take_columns(const Tensor& out, const Tensor& in, const int32_t* index, int64_t rows, int64_t n,
                         int64_t width) {
  // Nearly always the columns are chosen in their order, or spread again.
  std::vector<uint64_t> chosen((width + 63) / 64), spread((n + 63) / 64);
  bool ascend = true, next = true;
  int64_t last = -1, count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = index[j];
    ascend &= i > last;
    if (i < 0) continue;
    next &= i == count++;
    last = i;
    chosen[i / 64] |= uint64_t{1} << (i % 64);
    spread[j / 64] |= uint64_t{1} << (j % 64);
  }
  next &= count <= width;
  for_storage(out, "gather", [&]<class Out>() {
    for_storage(in, "gather", [&]<class In>() {
      const auto& copy = copies<Out, In>();
      for_rows(rows, std::max(n, width), 1, [&](int64_t begin, int64_t end) {
        const In* from = data<In>(in) + begin * width;
        Out* to = data<Out>(out) + begin * n;
        if (ascend)
          copy.compress(from, width, chosen.data(), to, n, end - begin);
        else if (next)
          copy.expand(from, width, spread.data(), to, n, end - begin);
        else
          copy.columns(from, width, index, to, n, end - begin);
      });
    });
  });
}

// The numbers of the contiguous tensor `t` in another dtype; `t` itself where it has that dtype.
inline Tensor cast(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return t;
  Tensor out = torch::stable::new_empty(t, t.sizes(), type);
  for_storage(out, "cast", [&]<class Out>() {
    for_storage(t, "cast", [&]<class In>() {
      for_rows(t.numel(), 1, 4096, [&](int64_t begin, int64_t end) {
        copies<Out, In>().row(data<In>(t) + begin, data<Out>(out) + begin, end - begin);
      });
    });
  });
  return out;
}
// A contiguous tensor of T.
template <class T>
Tensor as(const Tensor& t) {
  return cast(as_contiguous(t), kType<T>);
}

// ---- biases ----

// entry[i] = bias[list[i]] in the type of sums; zeros without a bias.
template <class T>
std::vector<Accumulator<T>> pack_bias(const MaybeTensor& bias, const Index& list, int64_t size, const char* message) {
  std::vector<Accumulator<T>> packed(list.size(), 0);
  if (!bias) return packed;
  check(bias->numel() == size, message);
  const Tensor wide = as<Accumulator<T>>(*bias);
  for (size_t i = 0; i < list.size(); ++i) packed[i] = data<Accumulator<T>>(wide)[list[i]];
  return packed;
}
// The gradient of such a bias, in the dtype of the weights: zero where nothing is kept.
template <class A>
Tensor unpack_bias(const Tensor& weight, const std::vector<A>& sums, const Index& list, int64_t size) {
  Tensor wide = torch::stable::new_zeros(weight, {size}, kType<A>);
  for (size_t i = 0; i < list.size(); ++i) data<A>(wide)[list[i]] = sums[i];
  return cast(wide, weight.scalar_type());
}

// out[r, :] += bias for the rows r of a range; nothing without a bias, which is in the type of sums.
template <class T>
void add_bias(const Tensor& out, const MaybeTensor& bias, Range rows, int64_t n) {
  if (!bias) return;
  for_rows(rows.size(), n, 1, [&](int64_t begin, int64_t end) {
    loops<T>().add_to_rows(data<T>(out) + (rows.begin + begin) * n, data<Accumulator<T>>(*bias), end - begin, n);
  });
}
template <class T>
MaybeTensor wide_bias(const MaybeTensor& bias, int64_t n) {
  if (!bias) return std::nullopt;
  check(bias->numel() == n, "the output bias must have one value per output");
  return as<Accumulator<T>>(*bias);
}

// The sums over the rows of g[rows, n], for a range of columns, in a fixed order.
template <class T>
void column_sums(const Tensor& sums, const Tensor& g, int64_t rows, Range columns, int64_t n) {
  parallel_for(0, (columns.size() + 63) / 64, std::max<int64_t>(1, 2048 / std::max<int64_t>(1, rows)),
               [&](int64_t begin, int64_t end) {
    const int64_t from = columns.begin + begin * 64, to = std::min(columns.end, columns.begin + end * 64);
    loops<T>().sum_columns(data<T>(g) + from, rows, n, data<Accumulator<T>>(sums) + from, to - from);
  });
}

// Which gradients a backward op is asked for: one bit per gradient, in the order of its outputs.
enum Need : int64_t {
  kNeedX = 1,
  kNeedWeight1 = 2,
  kNeedBias1 = 4,
  kNeedWeight2 = 8,
  kNeedBias2 = 16,
  kNeedScoreBias = 32,
  kNeedGateWeight = 32,
  kNeedGateBias = 64
};

}  // namespace uvc
