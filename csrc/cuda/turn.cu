// Rotary positions: packed q and k turned in place, or their gradients turned back.
//   q_i <- q_i cos_i + q_j sin_i,   back: q_i <- q_i cos_i + q_j sin_j,   j the dim that i is turned with
// A lane owns both dims of a pair, for eight tokens of q and of k, and goes through a few images where these share their
// tables: it holds what it reads of these and has read both numbers before it writes one.
#include "cuda/launch.h"

namespace uvc::UVC_BUILD {
namespace {

constexpr int kTurnWarps = 4, kTurnTokens = 8, kTurnImages = 4;

template <class T, class U>
struct Turn {
  T* qkv;
  const U* tables;  // [2, table_images, table_heads, dims, length]
  const int32_t *table, *rows, *whole_rows;
  const int64_t* partner;
  int64_t stride, length;
  int32_t tokens, heads, images, at_once, dims, table_images, table_heads;
  bool back;

  // Eight tokens from `begin` on of the cosines (0) or sines (1) of one dim.
  __device__ Vector<U, kTurnTokens> of(int which, int image, int head, int dim, int begin) const {
    const int64_t line = static_cast<int64_t>(which * table_images + (table_images > 1 ? image : 0)) * table_heads;
    return load<Vector<U, kTurnTokens>>(tables + ((line + (table_heads > 1 ? head : 0)) * dims + dim) * length + begin);
  }
};

template <class T, class U>
__global__ void __launch_bounds__(kTurnWarps * WARP) turn_kernel(const Turn<T, U> call, int groups) {
  using A = Wide<T>;
  const int N = call.tokens, begin = kTurnTokens * (static_cast<int>(blockIdx.x) % groups * kTurnWarps + warp_index());
  if (begin >= N) return;
  const int rest = static_cast<int>(blockIdx.x) / groups, image = rest / call.heads * call.at_once;
  const int32_t* fields = call.table + 6 * (rest % call.heads);
  const int q = fields[0], k = fields[1], width = fields[4];
  const int images = call.images - image < call.at_once ? call.images - image : call.at_once;
  for (int column = lane_index(); column < width; column += WARP) {
    // which row of the weight, and so which dim of which head, a packed column is
    const int source = call.rows[q + column];
    if (source < 0) continue;
    const int head = source / call.dims, own = source % call.dims, with = static_cast<int>(call.partner[own]);
    int other = call.whole_rows[head * call.dims + with] - q;
    if (other < 0 || other >= width) other = column;
    if (other < column) continue;
    const auto cosine = call.of(0, image, head, own, begin), other_cosine = call.of(0, image, head, with, begin);
    const auto sine = call.of(1, image, head, call.back ? with : own, begin);
    const auto other_sine = call.of(1, image, head, call.back ? own : with, begin);
#pragma unroll 1
    for (int i = 0; i < 2 * images; ++i) {
      const int64_t row = static_cast<int64_t>(image + i / 2) * N + begin;
      T* const at = call.qkv + row * call.stride + (i % 2 ? k : q);
#pragma unroll
      for (int t = 0; t < kTurnTokens; ++t) {
        if (begin + t >= N) break;
        T &mine = at[t * call.stride + column], &its = at[t * call.stride + other];
        const A a = widen(mine), b = widen(its);
        // a dim that is its own partner is written last
        its = narrow<T>(b * static_cast<A>(widen(other_cosine.at[t])) + a * static_cast<A>(widen(other_sine.at[t])));
        mine = narrow<T>(a * static_cast<A>(widen(cosine.at[t])) + b * static_cast<A>(widen(sine.at[t])));
      }
    }
  }
}

void turn(Tensor qkv, Tensor table, std::vector<int64_t> counts, int64_t tokens, Tensor rows, Tensor whole_rows,
          Tensor partner, Tensor tables, bool back) {
  const std::string name("cuda_turn");
  const int64_t h = table.dim() == 2 ? table.size(0) : -1, length = (tokens + 15) / 16 * 16;
  check(qkv.dim() == 2 && tokens > 0 && tokens <= (1 << 20) && qkv.size(0) % tokens == 0,
        name + ": qkv must be a matrix whose rows are a multiple of the tokens");
  const int64_t images = qkv.size(0) / tokens;
  check(table.scalar_type() == ScalarType::Int && h >= 0 && table.size(1) == 6 && counts.size() == 4 &&
            counts[0] + counts[1] + counts[2] + counts[3] == h,
        name + ": table must be int32 [heads, 6], counts its heads of each width");
  check(whole_rows.scalar_type() == ScalarType::Int && whole_rows.dim() == 3 && whole_rows.size(0) == 3 &&
            rows.scalar_type() == ScalarType::Int && rows.numel() == qkv.size(1),
        name + ": rows and whole_rows must be int32, [columns of qkv] and [3, H, K]");
  const int64_t all_heads = whole_rows.size(1), dims = whole_rows.size(2);
  check(partner.scalar_type() == ScalarType::Long && partner.numel() == dims, name + ": partner must be int64 [K]");
  check(tables.dim() == 5 && tables.size(0) == 2 && (tables.size(1) == 1 || tables.size(1) == images) &&
            (tables.size(2) == 1 || tables.size(2) == all_heads) && tables.size(3) == dims && tables.size(4) == length,
        name + ": tables must be [2, images or 1, H or 1, K, tokens up to a multiple of 16]");
  for (const Tensor* t : {&qkv, &table, &rows, &whole_rows, &partner, &tables})
    check(t->is_contiguous() && t->get_device_index() == qkv.get_device_index(),
          name + ": tensors must be contiguous and on one device");
  check(aligned(tables.mutable_data_ptr()), name + ": tables must start at a multiple of 16 bytes");
  check(images <= INT32_MAX && qkv.size(1) <= INT32_MAX, name + ": qkv has more than 2^31 images or columns");
  const Device device(qkv);
  for_type(qkv, "cuda_turn", [&]<class T>() {
    for_type(tables, "cuda_turn", [&]<class U>() {
      const int64_t at_once = tables.size(1) == 1 ? kTurnImages : 1, shares = (images + at_once - 1) / at_once;
      const int64_t groups = (tokens + kTurnTokens * kTurnWarps - 1) / (kTurnTokens * kTurnWarps);
      const auto number = [](int64_t n) { return static_cast<int32_t>(n); };
      const Turn<T, U> call{data<T>(qkv), data<U>(tables), data<int32_t>(table), data<int32_t>(rows),
                            data<int32_t>(whole_rows), data<int64_t>(partner), qkv.size(1), length, number(tokens),
                            number(h), number(images), number(at_once), number(dims), number(tables.size(1)),
                            number(tables.size(2)), back};
      device.launch("cuda_turn", &turn_kernel<T, U>, groups * h * shares, kTurnWarps * WARP, 0, call, number(groups));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) { m.impl("cuda_turn", TORCH_BOX(&turn)); }

}  // namespace
}  // namespace uvc::UVC_BUILD
