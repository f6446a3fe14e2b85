// The forward pass of the attention core. A block has the keys and values of one (image, head) in shared memory: all of
// them up to 256 tokens of 64 dims, else slot by slot. Its warps own 32 queries each; where all keys fit, they take more of
// them round after round until the head is done, so that its keys are brought once.
#include "cuda/attention.h"

namespace uvc::UVC_BUILD {
namespace {

// Four warps with 168 registers each leave room for three blocks on a multiprocessor.
constexpr int kWarps = 4;
// Tiles of 16 queries per warp: two share every fragment of keys and values, where registers allow it.
template <class T, int W>
constexpr int kTiles = is_half<T> && W <= 64 ? 2 : 1;
// Whether one block may do all of a head. Where it is narrow there is little to bring, and a wide one rarely fits; both would
// pay with registers, from which addresses then have to be computed again and again.
template <class T, int W>
constexpr bool kAlone = is_half<T> && W == 64;
// How far (as a power of two) an exponent may pass the reference before everything is scaled down again.
constexpr int kSlack = 8;

template <class T, int W, int R>
struct Queries {
  A16<T> q[R][W / 16];
  Sums<T> out[R][W / 16][2];
  Wide<T> top[R][2], total[R][2];  // of the lane's rows; the total is of the lane's own columns
};

// 16 keys from `row` of the slot on, of which `left` exist.
template <class T, int W, int R, bool BIASED, class Steps>
__device__ inline void attend(Queries<T, W, R>& my, const Tile<T, true>& keys, const Tile<T, true>& values, int row,
                              int left, Steps qk_steps, Steps v_steps, Wide<T> size, const Bias<T, BIASED>& bias,
                              int query) {
  using A = Wide<T>;
  Sums<T> s[R][2];
  // on its way while scores are multiplied, where registers allow it
  A16<T> added[R];
  if constexpr (BIASED && is_half<T>) {
#pragma unroll
    for (int r = 0; r < R; ++r) added[r] = bias.of(computed_again(query) + 16 * r, bias.N - left);
  }
#pragma unroll
  for (int k = 0; k < W / 16; ++k) {
    if (k >= qk_steps) break;
    const B16<T> b = keys.right_turned(row, 16 * k);
#pragma unroll
    for (int r = 0; r < R; ++r) multiply(s[r], my.q[r][k], b);
  }
  if constexpr (BIASED) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      bias.add(s[r], is_half<T> ? added[r] : bias.of(computed_again(query) + 16 * r, bias.N - left));
  }
  if (left < 16) {
    const int mine = left - 2 * (lane_index() % 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (8 * (i / 4) + i % 2 < mine) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) s[r][i / 4].at[i % 2] = s[r][i / 4].at[2 + i % 2] = -INFINITY;
    }
  }
  A most[R][2];
  bool grown = false;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const A *a = s[r][0].at + 2 * half, *b = s[r][1].at + 2 * half;
      most[r][half] = size * fmax(fmax(a[0], a[1]), fmax(b[0], b[1]));
      grown = grown || most[r][half] > my.top[r][half] + kSlack;
    }
  }
  // rare after the first keys: P stays below 2^8, and nothing has to be scaled
  if (__any_sync(ALL_LANES, grown)) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const A top = fmax(my.top[r][half], max_of_lanes<4>(most[r][half]));
        const A fade = power_of_two(my.top[r][half] - top);
        my.top[r][half] = top, my.total[r][half] *= fade;
#pragma unroll
        for (int n = 0; n < W / 8; ++n) {
          my.out[r][n / 2][n % 2].at[2 * half] *= fade;
          my.out[r][n / 2][n % 2].at[2 * half + 1] *= fade;
        }
      }
    }
  }
  A16<T> p[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      A& x = s[r][i / 4].at[i % 4];
      x = power_of_two(multiply_add(x, size, -my.top[r][i / 2 % 2]));
      my.total[r][i / 2 % 2] += x;
    }
    p[r] = as_factor<T>(s[r]);
  }
#pragma unroll
  for (int n = 0; n < W / 16; ++n) {
    if (n >= v_steps) break;
    const B16<T> b = values.right(row, 16 * n);
#pragma unroll
    for (int r = 0; r < R; ++r) multiply(my.out[r][n], p[r], b);
  }
}

template <class T, int W, bool BIASED>
__global__ void __launch_bounds__(kWarps * WARP, is_half<T> ? 3 : 1)
    forward_kernel(const Call<T> call, int groups, int rounds, int slots, int room, const Added<T> added) {
  using A = Wide<T>;
  constexpr int R = kTiles<T, W>, TOKENS = kSlotTokens<T>;
  const Head<T> head(call, static_cast<int>(blockIdx.x) / groups);
  const Bias<T, BIASED> bias(call, added, static_cast<int>(blockIdx.x) / groups);
  const int N = call.tokens, block = static_cast<int>(blockIdx.x);
  // A scheduler has the same warps of every block: which of them goes without queries in the end must not be the same, too.
  const auto first_of = [&](int block, int round) {
    const int warps = static_cast<int>(blockDim.x) / WARP, warp = (warp_index() + block / groups) % warps;
    return 16 * R * ((block % groups + round * groups) * warps + warp);
  };
  T* const ring = reinterpret_cast<T*>(shared_memory());
  const int parts = (N + TOKENS - 1) / TOKENS;
  const auto tile = [&](int part, int which) {
    return Tile<T, true>{ring + (which * room + part % slots * TOKENS) * W, W};
  };
  const auto bring_part = [&](int part) {
    if (part < parts) {
      const int tokens = N - part * TOKENS < TOKENS ? (N - part * TOKENS + 15) / 16 * 16 : TOKENS;
      bring<T, W>(tile(part, 0), tokens, head.k(), call.qkv_stride, part * TOKENS, N, head.qk_width);
      bring<T, W>(tile(part, 1), tokens, head.v(), call.qkv_stride, part * TOKENS, N, head.v_width);
    }
    commit_copies();
  };
  // A ring that holds everything is filled at once; else one slot is free for what comes next.
  const int ahead = parts <= slots ? slots : slots - 1;
  for (int part = 0; part < ahead; ++part) bring_part(part);

  // the greatest score has the greatest exponent once the sign of the scale is that of q; not 0, as 0 * inf is NaN
  const A size = BIASED ? A(kLog2E) : fmax(call.exponent < 0 ? -call.exponent : call.exponent, A(1e-30));
#pragma unroll 1
  for (int round = 0; round < (kAlone<T, W> ? rounds : 1); ++round) {
    const int first = first_of(block, round);
    Queries<T, W, R> my;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int k = 0; k < W / 16; ++k) {
        my.q[r][k] = fetch(head.q(), call.qkv_stride, first + 16 * r, N, head.qk_width, 16 * k);
        if (!BIASED && call.exponent < 0) negate(my.q[r][k]);
      }
      for (int half = 0; half < 2; ++half) my.top[r][half] = A(-1e30), my.total[r][half] = 0;
    }
    const auto meet_keys = [&](auto qk_steps, auto v_steps) {
      for (int part = 0; part < parts; ++part) {
        if (round == 0) {
          copies_arrived(ahead - 1);
          __syncthreads();
          // behind the barrier nobody reads the slot before this one, which is the free one
          bring_part(part + ahead);
        }
        if (first >= N) continue;
        const Tile<T, true> keys = tile(part, 0), values = tile(part, 1);
#pragma unroll 1
        for (int row = 0; row < TOKENS && part * TOKENS + row < N; row += 16)
          attend(my, keys, values, row, N - part * TOKENS - row, qk_steps, v_steps, size, bias, first);
      }
    };
    with_steps<T, W>(head, meet_keys);
    // read again rather than kept in registers all the way
    const int again = computed_again(block), from = first_of(again, round);
    const Head<T> same(call, again / groups);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      A inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        inverse[half] = 1 / sum_of_lanes<4>(my.total[r][half]);
        const int token = from + 16 * r + 8 * half + lane_index() / 4;
        if (lane_index() % 4 == 0 && token < N) {
          same.top()[token] = my.top[r][half];
          same.inverse()[token] = inverse[half];
        }
      }
      put<T, W>(same.out(), call.heads_stride, from + 16 * r, N, same.v_width, my.out[r], inverse[0], inverse[1]);
    }
  }
}

void attention_core(Tensor qkv, Tensor table, std::vector<int64_t> counts, int64_t tokens, double scale, Tensor heads,
                    Tensor top, Tensor inverse, MaybeTensor bias, MaybeTensor order) {
  const char* op = "cuda_attention_core";
  const Device device(qkv);
  const auto run = [&]<class T, int W, bool BIASED>(Call<T> call, const Added<T>& added, int64_t pairs) {
    const int64_t units = (tokens + 16 * kTiles<T, W> - 1) / (16 * kTiles<T, W>), shares = (units + kWarps - 1) / kWarps;
    const Ring ring(tokens, kSlotTokens<T>, 2 * W * sizeof(T));
    // One block for all shares of a head, unless few heads would keep some multiprocessor busy longer, by a sixteenth.
    const auto each = [&](int64_t blocks) { return (blocks + device.processors() - 1) / device.processors(); };
    const bool alone = kAlone<T, W> && ring.room >= tokens && 16 * shares * each(pairs) <= 17 * each(shares * pairs);
    const int64_t groups = alone ? 1 : shares;
    device.launch(op, &forward_kernel<T, W, BIASED>, pairs * groups, static_cast<int>((units + shares - 1) / shares) * WARP,
                  ring.bytes, call, static_cast<int>(groups), static_cast<int>(shares / groups), ring.slots, ring.room,
                  added);
  };
  for_widths(op, qkv, table, counts, tokens, scale, heads, top, inverse, bias, order, run);
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) {
  m.impl("cuda_attention_core", TORCH_BOX(&attention_core));
}

}  // namespace
}  // namespace uvc::UVC_BUILD
