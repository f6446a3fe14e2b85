// What the forward and the backward kernel of the attention core share.
//   S = scale q k^T (+ bias),   P = exp(S) / rows' sums,   o = P v
// One (image, head) of N tokens; its dims in `qkv` and `heads` are multiples of 8 and never more than W. A warp owns
// tiles of 16 tokens, whose fragments stay in registers, and meets the other tokens in shared memory, slot by slot.
// Exponents are of base 2; `top` (at most 2^8 away from the largest exponent of a query) and `inverse` = 1 / sum are
// kept apart, as a logarithm of the sum would be rounded at the size of top.
#pragma once

#include "cuda/launch.h"
#include "cuda/mma.h"

namespace uvc::UVC_BUILD {

constexpr double kLog2E = 1.4426950408889634;

// What a launch works on: heads `first` to `first + count` of the table, every image.
template <class T>
struct Call {
  const T* qkv;
  T* heads;
  const T* grad_heads;
  T* grad_qkv;
  Wide<T>*top, *inverse;
  const int32_t* table;
  int64_t rows, qkv_stride, heads_stride;  // rows = images * tokens
  int32_t tokens, first, count;
  Wide<T> scale, exponent;  // exponent = scale / log(2)
};

// What is added to the scores, or nothing: [biases, heads, tokens, stride], zeros behind the last token. That of image i
// is i % biases, that of row r of the table order[r], or the only one where heads is 1.
template <class T>
struct Added {
  const T* bias = nullptr;
  const int32_t* order = nullptr;
  int32_t biases = 1, heads = 1, stride = 0;
};

// One head of one image. What is kept of it are a few numbers; its pointers are sums of them and of the call's.
template <class T>
struct Head {
  const Call<T>& call;
  int64_t token, line;  // first row in qkv and heads, first place in the statistics
  int q_column, k_column, v_column, out_column, qk_width, v_width;

  __device__ Head(const Call<T>& of, int pair) : call(of) {
    const int row = call.first + pair % call.count;
    const int32_t* fields = call.table + 6 * row;
    token = static_cast<int64_t>(pair / call.count) * call.tokens, line = row * call.rows + token;
    q_column = fields[0], k_column = fields[1], v_column = fields[2], out_column = fields[3];
    qk_width = fields[4], v_width = fields[5];
  }
  __device__ int64_t in_qkv(int column) const { return token * call.qkv_stride + column; }
  __device__ int64_t in_heads() const { return token * call.heads_stride + out_column; }
  __device__ const T* q() const { return call.qkv + in_qkv(q_column); }
  __device__ const T* k() const { return call.qkv + in_qkv(k_column); }
  __device__ const T* v() const { return call.qkv + in_qkv(v_column); }
  __device__ const T* grad_out() const { return call.grad_heads + in_heads(); }
  __device__ T* out() const { return call.heads + in_heads(); }
  __device__ T* grad_q() const { return call.grad_qkv + in_qkv(q_column); }
  __device__ T* grad_k() const { return call.grad_qkv + in_qkv(k_column); }
  __device__ T* grad_v() const { return call.grad_qkv + in_qkv(v_column); }
  __device__ Wide<T>* top() const { return call.top + line; }
  __device__ Wide<T>* inverse() const { return call.inverse + line; }
};

// Calls work(steps of 16 q/k dims, steps of 16 v dims), as constants for heads that use all W dims.
template <class T, int W, class F>
__device__ inline void with_steps(const Head<T>& head, F&& work) {
  const int qk_steps = (head.qk_width + 15) / 16, v_steps = (head.v_width + 15) / 16;
  if constexpr (is_half<T>) {
    if (qk_steps == W / 16 && v_steps == W / 16) return work(Constant<W / 16>{}, Constant<W / 16>{});
  }
  work(qk_steps, v_steps);
}

// Tokens in a slot of the ring in shared memory, which holds two matrices: 16 KB for heads of 64 dims of 16 bits.
template <class T>
constexpr int kSlotTokens = 128 / sizeof(T);
// What the ring may take: every GPU from compute capability 8.0 on has it for a block.
constexpr int64_t kRingBytes = 96 * 1024;
static_assert(2 * 128 * 2 * (128 + 8) <= kRingBytes, "two slots of the widest heads, with statistics, fit");

// Brings tokens first.. of one matrix, zeros behind token N and behind its width, into a tile of a slot.
template <class T, int W>
__device__ inline void bring(const Tile<T, true>& tile, int tokens, const T* matrix, int64_t stride, int first, int N,
                             int width) {
  constexpr int PIECE = Tile<T, true>::PIECE, PIECES = W / PIECE;
  const int used = (width + 15) / 16 * 16 / PIECE;
  for (int i = static_cast<int>(threadIdx.x); i < tokens * PIECES; i += static_cast<int>(blockDim.x)) {
    const int row = i / PIECES, piece = i % PIECES, token = first + row;
    if (piece >= used) continue;
    const bool there = token < N && piece * PIECE < width;
    copy16(tile.piece(row, piece), there ? matrix + token * stride + piece * PIECE : matrix, there);
  }
}

// 16 dims of 16 tokens of one matrix in device memory, as a fragment.
template <class T>
__device__ inline A16<T> fetch(const T* matrix, int64_t stride, int first, int N, int width, int dim) {
  A16<T> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = first + lane_index() / 4 + 8 * (i % 2), at = dim + 2 * (lane_index() % 4) + 8 * (i / 2);
    out.at[i] = token < N && at < width ? load<Pair<T>>(matrix + token * stride + at) : Pair<T>{};
  }
  return out;
}
// The bias of one head of one image; no number of it is kept where there is none.
template <class T, bool BIASED>
struct Bias {
  const T* rows = nullptr;
  int N = 0, stride = 0;
  Wide<T> scale = 0;

  __device__ Bias(const Call<T>& call, const Added<T>& added, int pair) {
    if constexpr (BIASED) {
      N = call.tokens, stride = added.stride, scale = call.scale;
      const int head = added.heads > 1 ? added.order[call.first + pair % call.count] : 0;
      const int64_t place = static_cast<int64_t>(pair / call.count % added.biases) * added.heads + head;
      rows = added.bias + place * N * stride;
    }
  }
  // Of 16 queries (rows) and 16 keys (columns), zeros behind the last.
  __device__ A16<T> of(int query, int key) const { return fetch(rows, stride, query, N, stride, key); }
  // Of 16 keys (rows) and 16 queries (columns).
  __device__ A16<T> turned(int query, int key) const {
    A16<T> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = query + 2 * (lane_index() % 4) + 8 * (i / 2), at = key + lane_index() / 4 + 8 * (i % 2);
      const T* from = rows + static_cast<int64_t>(token) * stride + at;
      out.at[i].low = token < N && at < stride ? *from : T{};
      out.at[i].high = token + 1 < N && at < stride ? from[stride] : T{};
    }
    return out;
  }
  // Makes products of q and k whole scores, with scale and bias; their exponents are then kLog2E as large.
  __device__ void add(Sums<T> (&s)[2], const A16<T>& tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Wide<T>* const pair = s[i / 2].at + 2 * (i % 2);
      pair[0] = multiply_add(pair[0], scale, widen(tile.at[i].low));
      pair[1] = multiply_add(pair[1], scale, widen(tile.at[i].high));
    }
  }
};
// All dims of 16 tokens; the fragments are held in registers, or fetched where they are used when they are too many.
template <class T, int W, bool HELD>
struct Tokens {
  A16<T> held[HELD ? W / 16 : 1];
  const T* matrix;
  int64_t stride;
  int first, N, width;

  __device__ Tokens(const T* of, int64_t stride, int first, int N, int width)
      : matrix(of), stride(stride), first(first), N(N), width(width) {
    if constexpr (HELD) {
#pragma unroll
      for (int k = 0; k < W / 16; ++k) held[k] = fetch(of, stride, first, N, width, 16 * k);
    }
  }
  __device__ A16<T> operator[](int k) const {
    if constexpr (HELD) return held[k];
    return fetch(matrix, stride, first, N, width, 16 * k);
  }
};

__device__ inline float negative(float v) { return -v; }
__device__ inline double negative(double v) { return -v; }
template <class T>
__device__ inline T negative(T v) {
  return {static_cast<uint16_t>(v.bits ^ 0x8000u)};
}
template <class T>
__device__ inline void negate(A16<T>& a) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.at[i] = {negative(a.at[i].low), negative(a.at[i].high)};
}

// Turns pairs around among four lanes: lane t gives its at[i] to lane i and gets at[t] of each.
template <class T>
__device__ inline void exchange(Pair<T> (&at)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane_index() & bit;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = bit == 1 ? 2 * j : j;
      const Pair<T> found = pair_across(upper ? at[i] : at[i + bit], bit);
      at[i] = upper ? found : at[i], at[i + bit] = upper ? at[i + bit] : found;
    }
  }
}

// Writes 16 tokens of one matrix from sums, times a factor for the lane's upper row and one for its lower row.
template <class T, int W>
__device__ inline void put(T* matrix, int64_t stride, int first, int N, int width, const Sums<T> (&sums)[W / 16][2],
                           Wide<T> upper, Wide<T> lower) {
  const int lane = lane_index(), token = first + lane / 4;
  if constexpr (is_half<T>) {
    // 16 bytes at a time: of four times 8 dims each lane gets all of one
#pragma unroll
    for (int n = 0; n < W / 8; n += 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<Pair<T>, 4> row;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto& s = sums[(n + i) / 2][i % 2].at;
          const Wide<T> factor = half ? lower : upper;
          row.at[i] = pack<T>(s[2 * half] * factor, s[2 * half + 1] * factor);
        }
        exchange<T>(row.at);
        const int dim = 8 * (n + lane % 4);
        if (dim < width && token + 8 * half < N) store(matrix + (token + 8 * half) * stride + dim, row);
      }
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < W / 8; ++n) {
    const auto& s = sums[n / 2][n % 2].at;
    const int dim = 8 * n + 2 * (lane % 4);
    if (dim >= width) continue;
    if (token < N) store(matrix + token * stride + dim, pack<T>(s[0] * upper, s[1] * upper));
    if (token + 8 < N) store(matrix + (token + 8) * stride + dim, pack<T>(s[2] * lower, s[3] * lower));
  }
}

// do o, summed over the dims, of the lane's two rows among 16 queries. TOGETHER fragments are on their way at once.
template <class T, int W, int TOGETHER>
__device__ inline void products_of_rows(Wide<T> (&sums)[2], const Head<T>& head, int first, int N) {
  const int lane = lane_index();
  sums[0] = sums[1] = 0;
#pragma unroll TOGETHER
  for (int k = 0; k < W / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + lane / 4 + 8 * (i % 2), dim = 16 * k + 2 * (lane % 4) + 8 * (i / 2);
      if (token >= N || dim >= head.v_width) continue;
      const int64_t place = token * head.call.heads_stride + dim;
      const auto grad = load<Pair<T>>(head.grad_out() + place), out = load<Pair<T>>(head.out() + place);
      sums[i % 2] += widen(grad.low) * widen(out.low) + widen(grad.high) * widen(out.high);
    }
  }
  sums[0] = sum_of_lanes<4>(sums[0]), sums[1] = sum_of_lanes<4>(sums[1]);
}

// What the backward pass has to know of a query besides q and do; all is 0 behind token N, so that P is.
template <class A>
struct alignas(4 * sizeof(A) < 16 ? 4 * sizeof(A) : 16) Statistics {
  A top, inverse, product, nothing;
};

// Writes those of 16 queries from `first` on.
template <class T, int W, int TOGETHER>
__device__ inline void gather_statistics(Statistics<Wide<T>>* to, const Head<T>& head, int first, int N) {
  Wide<T> products[2];
  products_of_rows<T, W, TOGETHER>(products, head, first, N);
  const int lane = lane_index();
  if (lane % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half, token = first + row;
    const bool there = token < N;
    store(to + row, Statistics<Wide<T>>{there ? head.top()[token] : 0, there ? head.inverse()[token] : 0, products[half], 0});
  }
}

// The ring: up to four slots of so many tokens, as many as it may have bytes for; `room` is in tokens. Where it holds all
// tokens its last slot is as short as they are.
struct Ring {
  int slots, room;
  int64_t bytes;

  Ring(int64_t tokens, int64_t slot_tokens, int64_t token_bytes) {
    const int64_t needed = (tokens + slot_tokens - 1) / slot_tokens, fit = kRingBytes / (slot_tokens * token_bytes);
    slots = static_cast<int>(std::min(needed, std::clamp<int64_t>(fit, 2, 4)));
    room = static_cast<int>(needed == slots ? (tokens + 15) / 16 * 16 : slots * slot_tokens);
    bytes = room * token_bytes;
  }
};

// Checks what the ops are given and calls work.template operator()<T, W, BIASED>(call, added, pairs of image and head) per
// width W, with a bias or without.
template <class F>
void for_widths(const char* op, const Tensor& qkv, const Tensor& table, const std::vector<int64_t>& counts, int64_t tokens,
                double scale, const Tensor& heads, const Tensor& top, const Tensor& inverse, const MaybeTensor& bias,
                const MaybeTensor& order, F&& work) {
  const std::string name(op);
  const int64_t rows = qkv.dim() == 2 ? qkv.size(0) : -1, h = top.dim() == 2 ? top.size(0) : -1;
  check(rows >= 0 && heads.dim() == 2 && heads.size(0) == rows, name + ": qkv and heads must be matrices of M rows");
  check(tokens > 0 && tokens <= (1 << 20) && rows % tokens == 0, name + ": M must be a multiple of the tokens");
  check(h >= 0 && top.size(1) == rows && inverse.dim() == 2 && inverse.size(0) == h && inverse.size(1) == rows,
        name + ": top and inverse must be [heads, M]");
  check(table.scalar_type() == ScalarType::Int && table.numel() == 6 * h, name + ": table must be int32 [heads, 6]");
  check(counts.size() == 4 && counts[0] + counts[1] + counts[2] + counts[3] == h,
        name + ": counts must be the heads up to 16, 32, 64 and 128 dims wide, and add up to the table's");
  check(heads.scalar_type() == qkv.scalar_type() && top.scalar_type() == inverse.scalar_type() &&
            top.scalar_type() == (qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        name + ": heads must have the dtype of qkv, statistics must be float32 (float64 for float64)");
  for (const Tensor* t : {&qkv, &heads, &top, &inverse, &table})
    check(t->is_contiguous() && t->get_device_index() == qkv.get_device_index(),
          name + ": tensors must be contiguous and on one device");
  check(qkv.size(1) % 8 == 0 && heads.size(1) % 8 == 0 && aligned(qkv.mutable_data_ptr()) &&
            aligned(heads.mutable_data_ptr()),
        name + ": rows must start at multiples of 16 bytes and have a multiple of 8 columns");
  const int64_t images = rows / tokens, padded = (tokens + 7) / 8 * 8;
  check(bias.has_value() == order.has_value(), name + ": a bias comes with its order");
  if (bias) {
    check(bias->dim() == 4 && bias->size(0) > 0 && images % bias->size(0) == 0 &&
              (bias->size(1) == 1 || bias->size(1) == h) && bias->size(2) == tokens && bias->size(3) == padded,
          name + ": bias must be [a divisor of the images, heads or 1, tokens, tokens up to a multiple of 8]");
    check(bias->scalar_type() == qkv.scalar_type() && order->scalar_type() == ScalarType::Int && order->numel() == h,
          name + ": bias must have the dtype of qkv, order must be int32 [heads]");
    for (const Tensor* t : {&*bias, &*order})
      check(t->is_contiguous() && t->get_device_index() == qkv.get_device_index(),
            name + ": tensors must be contiguous and on one device");
    check(aligned(bias->mutable_data_ptr()), name + ": bias must start at a multiple of 16 bytes");
  }
  for_type(qkv, op, [&]<class T>() {
    Call<T> call{data<T>(qkv), data<T>(heads), nullptr, nullptr, data<Wide<T>>(top), data<Wide<T>>(inverse),
                 data<int32_t>(table), rows, qkv.size(1), heads.size(1), static_cast<int32_t>(tokens), 0, 0,
                 static_cast<Wide<T>>(scale), static_cast<Wide<T>>(scale * kLog2E)};
    Added<T> added;
    if (bias)
      added = {data<T>(*bias), data<int32_t>(*order), static_cast<int32_t>(bias->size(0)),
               static_cast<int32_t>(bias->size(1)), static_cast<int32_t>(padded)};
    const auto next = [&]<int W>(int64_t count) {
      call.count = static_cast<int32_t>(count);
      check(images * count <= INT32_MAX, name + ": too many images for one launch");
      const int64_t pairs = images * count;
      if (pairs > 0 && bias) work.template operator()<T, W, true>(call, added, pairs);
      if (pairs > 0 && !bias) work.template operator()<T, W, false>(call, added, pairs);
      call.first += call.count;
    };
    // Narrow heads lose little in a kernel for wider ones, as work goes by the dims of each head: registers.
    if constexpr (is_half<T>) {
      next.template operator()<32>(counts[0] + counts[1]);
      next.template operator()<64>(counts[2]);
    } else {
      next.template operator()<64>(counts[0] + counts[1] + counts[2]);
    }
    next.template operator()<128>(counts[3]);
  });
}

}  // namespace uvc::UVC_BUILD
