// The backward pass of the attention core, in one launch and without atomics: whoever owns a row of a gradient writes it.
//   dP = do v^T,   dS = P * (dP - rowsum(do * o)),   dv = P^T do,   dk = scale dS^T q,   dq = scale dS k
// Where a whole head fits into shared memory (240 tokens of 64 dims), one block does it: a warp per 32 keys makes dv and
// dS, which then waits in shared memory for dk and dq. Otherwise blocks own the dk and dv of some keys or the dq of some
// queries, and compute S and dP for themselves while the other tokens stream by.
#include "cuda/attention.h"

namespace uvc::UVC_BUILD {
namespace {

constexpr int kWholeWarps = 8, kStreamWarps = 4;
// Tiles of 16 tokens that a warp of a whole head owns: two share every fragment from shared memory, which is what such
// a block waits for.
constexpr int kOwned = 2;
// Wider heads and wider types do not fit.
template <class T, int W>
constexpr bool kCanBeWhole = is_half<T> && W <= 64;

// P and dS of R times 16 keys (rows) and 16 queries (columns), from S and dP.
template <class T, int R>
__device__ inline void weigh(Sums<T> (&s)[R][2], Sums<T> (&dp)[R][2], const Statistics<Wide<T>>* of, Wide<T> exponent) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto query = load<Statistics<Wide<T>>>(of + 8 * (i / 2) + 2 * (lane_index() % 4) + i % 2);
#pragma unroll
    for (int j = 0; j < 2 * R; ++j) {
      const int at = i % 2 + 2 * (j % 2);
      Wide<T>&p = s[j / 2][i / 2].at[at], &d = dp[j / 2][i / 2].at[at];
      p = power_of_two(multiply_add(p, exponent, -query.top)) * query.inverse;
      d = p * (d - query.product);
    }
  }
}

// sums += a b for R times 16 tokens a and the transpose of 16 rows of a tile.
template <class T, int W, bool HELD, int R, class Steps>
__device__ inline void times_rows(Sums<T> (&sums)[R][2], const Tokens<T, W, HELD> (&a)[R], const Tile<T, true>& tile,
                                  int row, Steps steps) {
  const auto step = [&](int k) {
    const B16<T> b = tile.right_turned(row, 16 * k);
#pragma unroll
    for (int r = 0; r < R; ++r) multiply(sums[r], a[r][k], b);
  };
  if constexpr (HELD) {
#pragma unroll
    for (int k = 0; k < W / 16; ++k) {
      if (k >= steps) break;
      step(k);
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < steps; ++k) step(k);
  }
}
// sums += a b for R fragments a and 16 rows of a tile.
template <class T, int W, int R, class Steps>
__device__ inline void add_rows(Sums<T> (&sums)[R][W / 16][2], const A16<T> (&a)[R], const Tile<T, true>& tile, int row,
                                Steps steps) {
#pragma unroll
  for (int n = 0; n < W / 16; ++n) {
    if (n >= steps) break;
    const B16<T> b = tile.right(row, 16 * n);
#pragma unroll
    for (int r = 0; r < R; ++r) multiply(sums[r][n], a[r], b);
  }
}
// The sums of R tiles as left factors.
template <class T, int R>
struct Factors {
  A16<T> at[R];

  __device__ explicit Factors(const Sums<T> (&s)[R][2]) {
#pragma unroll
    for (int r = 0; r < R; ++r) at[r] = as_factor<T>(s[r]);
  }
};

// Shared memory of a block that does a whole head: q, do, k; dS with the keys as rows; statistics.
template <class T, int W>
struct Whole {
  int room, pitch;
  int64_t slopes, statistics, bytes;

  __host__ __device__ explicit Whole(int tokens) {
    room = (tokens + 15) / 16 * 16;
    // The last warp owns more than there are. An odd number of pieces of 16 bytes: eight rows of dS lie in different banks.
    const int owned = (tokens + 16 * kOwned - 1) / (16 * kOwned) * 16 * kOwned;
    pitch = owned + 8;
    slopes = 3 * static_cast<int64_t>(sizeof(T)) * W * room;
    statistics = slopes + static_cast<int64_t>(sizeof(T)) * pitch * owned;
    bytes = statistics + static_cast<int64_t>(sizeof(Statistics<Wide<T>>)) * room;
  }
};

template <class T, int W, bool BIASED>
__global__ void __launch_bounds__(kWholeWarps * WARP, 1) whole_kernel(const Call<T> call, const Added<T> added) {
  constexpr int TOKENS = kSlotTokens<T>;
  const Head<T> head(call, static_cast<int>(blockIdx.x));
  const Bias<T, BIASED> bias(call, added, static_cast<int>(blockIdx.x));
  const int N = call.tokens, first = 16 * kOwned * warp_index();
  const Whole<T, W> layout(N);
  unsigned char* const memory = shared_memory();
  T* const rows = reinterpret_cast<T*>(memory);
  const Tile<T, true> queries{rows, W}, grads{rows + layout.room * W, W}, keys{rows + 2 * layout.room * W, W};
  const Tile<T, false> slopes{reinterpret_cast<T*>(memory + layout.slopes), layout.pitch};
  auto* const statistics = reinterpret_cast<Statistics<Wide<T>>*>(memory + layout.statistics);

  const int parts = (N + TOKENS - 1) / TOKENS;
  for (int part = 0; part < parts; ++part) {
    const int begin = part * TOKENS, tokens = layout.room - begin < TOKENS ? layout.room - begin : TOKENS;
    bring<T, W>({queries.piece(begin, 0), W}, tokens, head.q(), call.qkv_stride, begin, N, head.qk_width);
    bring<T, W>({grads.piece(begin, 0), W}, tokens, head.grad_out(), call.heads_stride, begin, N, head.v_width);
    commit_copies();
  }
  bring<T, W>(keys, layout.room, head.k(), call.qkv_stride, 0, N, head.qk_width);
  commit_copies();

  for (int row = 16 * warp_index(); row < layout.room; row += static_cast<int>(blockDim.x) / 2)
    gather_statistics<T, W, W / 16>(statistics + row, head, row, N);
  const int lane = lane_index();
  const auto meet_queries = [&](auto qk_steps, auto v_steps) {
    const Tokens<T, W, true> k[kOwned] = {{head.k(), call.qkv_stride, first, N, head.qk_width},
                                          {head.k(), call.qkv_stride, first + 16, N, head.qk_width}};
    const Tokens<T, W, true> v[kOwned] = {{head.v(), call.qkv_stride, first, N, head.v_width},
                                          {head.v(), call.qkv_stride, first + 16, N, head.v_width}};
    Sums<T> grad_v[kOwned][W / 16][2];
    for (int part = 0; part < parts; ++part) {
      copies_arrived(parts - part);
      __syncthreads();
      const int end = (part + 1) * TOKENS < N ? (part + 1) * TOKENS : N;
#pragma unroll 1
      for (int row = part * TOKENS; row < end; row += 16) {
        Sums<T> s[kOwned][2], dp[kOwned][2];
        A16<T> of_keys[kOwned];  // on its way while scores are multiplied
        if constexpr (BIASED) {
#pragma unroll
          for (int r = 0; r < kOwned; ++r) of_keys[r] = bias.turned(row, first + 16 * r);
        }
        times_rows(s, k, queries, row, qk_steps);
        if constexpr (BIASED) {
#pragma unroll
          for (int r = 0; r < kOwned; ++r) bias.add(s[r], of_keys[r]);
        }
        times_rows(dp, v, grads, row, v_steps);
        weigh<T>(s, dp, statistics + row, BIASED ? Wide<T>(kLog2E) : call.exponent);
        add_rows<T, W>(grad_v, Factors<T, kOwned>(s).at, grads, row, v_steps);
        if (first + 16 * kOwned > N) {
          // a key behind the last has some P, but no weight in dq
#pragma unroll
          for (int i = 0; i < 8 * kOwned; ++i)
            if (first + i / 8 * 16 + lane / 4 + 8 * (i / 2 % 2) >= N) dp[i / 8][i / 4 % 2].at[i % 4] = 0;
        }
        const Factors<T, kOwned> slope(dp);
        T* const corner = slopes.at(first + lane / 4, 2 * (lane % 4)) + row;
#pragma unroll
        for (int i = 0; i < 4 * kOwned; ++i)
          store(corner + (i / 4 * 16 + i % 2 * 8) * layout.pitch + i / 2 % 2 * 8, slope.at[i / 4].at[i % 4]);
      }
    }
    // read again rather than kept in registers all the way
    const Head<T> same(call, static_cast<int>(blockIdx.x));
#pragma unroll
    for (int r = 0; r < kOwned; ++r)
      put<T, W>(same.grad_v(), call.qkv_stride, first + 16 * r, N, same.v_width, grad_v[r], 1, 1);
  };
  with_steps<T, W>(head, meet_queries);
  copies_arrived(0);
  __syncthreads();

  const Head<T> same(call, static_cast<int>(blockIdx.x));
  const auto meet_slopes = [&](auto qk_steps, auto) {
    Sums<T> grad_k[kOwned][W / 16][2], grad_q[kOwned][W / 16][2];
#pragma unroll 1
    for (int row = 0; row < N; row += 16) {
      add_rows<T, W>(grad_k, {slopes.left(first, row), slopes.left(first + 16, row)}, queries, row, qk_steps);
      add_rows<T, W>(grad_q, {slopes.left_turned(row, first), slopes.left_turned(row, first + 16)}, keys, row, qk_steps);
    }
#pragma unroll
    for (int r = 0; r < kOwned; ++r) {
      put<T, W>(same.grad_k(), call.qkv_stride, first + 16 * r, N, same.qk_width, grad_k[r], call.scale, call.scale);
      put<T, W>(same.grad_q(), call.qkv_stride, first + 16 * r, N, same.qk_width, grad_q[r], call.scale, call.scale);
    }
  };
  with_steps<T, W>(same, meet_slopes);
}

// Runs work(slot's first tile, its second tile, first token, number of its tokens, place in the ring) for all tokens of
// two matrices, which stream through shared memory; more(part's first token, place) may bring what belongs to them.
template <class T, int W, class More, class Work>
__device__ inline void stream(const Call<T>& call, T* memory, int slots, int room, const T* a, int64_t a_stride,
                              int a_width, const T* b, int64_t b_stride, int b_width, More&& more, Work&& work) {
  constexpr int TOKENS = kSlotTokens<T>;
  const int N = call.tokens, parts = (N + TOKENS - 1) / TOKENS;
  const auto tile = [&](int part, int which) {
    return Tile<T, true>{memory + (which * room + part % slots * TOKENS) * W, W};
  };
  const auto bring_part = [&](int part) {
    if (part < parts) {
      const int begin = part * TOKENS, tokens = N - begin < TOKENS ? (N - begin + 15) / 16 * 16 : TOKENS;
      bring<T, W>(tile(part, 0), tokens, a, a_stride, begin, N, a_width);
      bring<T, W>(tile(part, 1), tokens, b, b_stride, begin, N, b_width);
      more(begin, tokens, part % slots * TOKENS);
    }
    commit_copies();
  };
  // a ring that holds everything is filled at once; else one slot is free for what comes next
  const int ahead = parts <= slots ? slots : slots - 1;
  for (int part = 0; part < ahead; ++part) bring_part(part);
  for (int part = 0; part < parts; ++part) {
    copies_arrived(ahead - 1);
    __syncthreads();
    // behind the barrier nobody reads the slot before this one, which is the free one
    bring_part(part + ahead);
#pragma unroll 1
    for (int row = 0; row < TOKENS && part * TOKENS + row < N; row += 16)
      work(tile(part, 0), tile(part, 1), row, N - part * TOKENS - row, part % slots * TOKENS);
  }
}

// Of blocks that stream: dq, and dk with dv; for the widest heads these are two, or their sums leave the registers.
template <int W>
constexpr int kKinds = W <= 64 ? 2 : 3;
// Whether registers hold the fragments of 16 tokens of two matrices.
template <class T, int W>
constexpr bool kHeld = W * sizeof(T) <= 256;

template <class T, int W, bool BIASED>
__global__ void __launch_bounds__(kStreamWarps * WARP, is_half<T> && W <= 64 ? 3 : 1)
    stream_kernel(const Call<T> call, int groups, int slots, int room, const Added<T> added) {
  using A = Wide<T>;
  const int parts = kKinds<W> * groups, block = static_cast<int>(blockIdx.x), kind = block % parts % kKinds<W>;
  const auto first_of = [&](int block) {
    return 16 * (block % parts / kKinds<W> * (static_cast<int>(blockDim.x) / WARP) + warp_index());
  };
  const Head<T> head(call, block / parts);
  const Bias<T, BIASED> bias(call, added, block / parts);
  const int N = call.tokens, first = first_of(block);
  T* const memory = reinterpret_cast<T*>(shared_memory());
  const int qk_steps = (head.qk_width + 15) / 16, v_steps = (head.v_width + 15) / 16;
  // dk and dv, or one of them
  const auto own_keys = [&]<bool K, bool V>() {
    const Tokens<T, W, kHeld<T, W>> k[1] = {{head.k(), call.qkv_stride, first, N, head.qk_width}};
    const Tokens<T, W, kHeld<T, W>> v[1] = {{head.v(), call.qkv_stride, first, N, head.v_width}};
    Sums<T> grad_k[1][W / 16][2], grad_v[1][W / 16][2];
    auto* const statistics = reinterpret_cast<Statistics<A>*>(memory + 2 * room * W);
    stream<T, W>(
        call, memory, slots, room, head.q(), call.qkv_stride, head.qk_width, head.grad_out(), call.heads_stride,
        head.v_width,
        [&](int begin, int tokens, int place) {
          for (int row = 16 * warp_index(); row < tokens; row += static_cast<int>(blockDim.x) / 2)
            gather_statistics<T, W, 1>(statistics + place + row, head, begin + row, N);
        },
        [&](const Tile<T, true>& queries, const Tile<T, true>& grads, int row, int left, int place) {
          Sums<T> s[1][2], dp[1][2];
          times_rows(s, k, queries, row, qk_steps);
          if constexpr (BIASED) bias.add(s[0], bias.turned(N - left, first));
          if constexpr (K) times_rows(dp, v, grads, row, v_steps);
          weigh<T>(s, dp, statistics + place + row, BIASED ? Wide<T>(kLog2E) : call.exponent);
          if constexpr (V) add_rows<T, W>(grad_v, {as_factor<T>(s[0])}, grads, row, v_steps);
          if constexpr (K) add_rows<T, W>(grad_k, {as_factor<T>(dp[0])}, queries, row, qk_steps);
        });
    const int again = computed_again(block), from = first_of(again);
    const Head<T> same(call, again / parts);
    if constexpr (K) put<T, W>(same.grad_k(), call.qkv_stride, from, N, same.qk_width, grad_k[0], call.scale, call.scale);
    if constexpr (V) put<T, W>(same.grad_v(), call.qkv_stride, from, N, same.v_width, grad_v[0], 1, 1);
  };
  if constexpr (kKinds<W> == 2) {
    if (kind == 1) return own_keys.template operator()<true, true>();
  } else {
    if (kind == 1) return own_keys.template operator()<true, false>();
    if (kind == 2) return own_keys.template operator()<false, true>();
  }
  const Tokens<T, W, kHeld<T, W>> q[1] = {{head.q(), call.qkv_stride, first, N, head.qk_width}};
  const Tokens<T, W, kHeld<T, W>> grad[1] = {{head.grad_out(), call.heads_stride, first, N, head.v_width}};
  A top[2], inverse[2], product[2];
  products_of_rows<T, W, 1>(product, head, first, N);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first + lane_index() / 4 + 8 * half;
    top[half] = token < N ? head.top()[token] : 0, inverse[half] = token < N ? head.inverse()[token] : 0;
  }
  Sums<T> grad_q[1][W / 16][2];
  stream<T, W>(
      call, memory, slots, room, head.k(), call.qkv_stride, head.qk_width, head.v(), call.qkv_stride, head.v_width,
      [](int, int, int) {},
      [&](const Tile<T, true>& keys, const Tile<T, true>& values, int row, int left, int) {
        Sums<T> s[1][2], dp[1][2];
        times_rows(s, q, keys, row, qk_steps);
        if constexpr (BIASED) bias.add(s[0], bias.of(first, N - left));
        times_rows(dp, grad, values, row, v_steps);
        const A exponent = BIASED ? A(kLog2E) : call.exponent;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2, key = 8 * (i / 4) + 2 * (lane_index() % 4) + i % 2;
          A& d = dp[0][i / 4].at[i % 4];
          const A p = power_of_two(multiply_add(s[0][i / 4].at[i % 4], exponent, -top[half])) * inverse[half];
          // a key behind the last has some P, but no weight in dq
          d = key < left ? p * (d - product[half]) : 0;
        }
        add_rows<T, W>(grad_q, {as_factor<T>(dp[0])}, keys, row, qk_steps);
      });
  const int again = computed_again(block), from = first_of(again);
  const Head<T> same(call, again / parts);
  put<T, W>(same.grad_q(), call.qkv_stride, from, N, same.qk_width, grad_q[0], call.scale, call.scale);
}

void attention_core_backward(Tensor qkv, Tensor heads, Tensor grad_heads, Tensor top, Tensor inverse, Tensor table,
                             std::vector<int64_t> counts, int64_t tokens, double scale, Tensor grad_qkv, MaybeTensor bias,
                             MaybeTensor order) {
  const char* op = "cuda_attention_core_backward";
  for (const auto& [grad, of] : {std::pair(grad_heads, heads), std::pair(grad_qkv, qkv)})
    check(grad.is_contiguous() && grad.scalar_type() == of.scalar_type() && grad.numel() == of.numel() &&
              grad.dim() == 2 && grad.get_device_index() == of.get_device_index() && aligned(grad.mutable_data_ptr()),
          std::string(op) + ": gradients must be contiguous, start at 16 bytes, and be like what they belong to");
  const Device device(qkv);
  const auto run = [&]<class T, int W, bool BIASED>(Call<T> call, const Added<T>& added, int64_t pairs) {
    call.grad_heads = data<T>(grad_heads), call.grad_qkv = data<T>(grad_qkv);
    const int64_t tiles = (tokens + 15) / 16;
    if constexpr (kCanBeWhole<T, W>) {
      const Whole<T, W> layout(static_cast<int>(tokens));
      const int64_t warps = (tiles + kOwned - 1) / kOwned;
      if (warps <= kWholeWarps && layout.bytes <= device.shared_memory()) {
        device.launch(op, &whole_kernel<T, W, BIASED>, pairs, static_cast<int>(warps) * WARP, layout.bytes, call, added);
        return;
      }
    }
    const int64_t groups = (tiles + kStreamWarps - 1) / kStreamWarps;
    const Ring ring(tokens, kSlotTokens<T>, 2 * W * sizeof(T) + sizeof(Statistics<Wide<T>>));
    device.launch(op, &stream_kernel<T, W, BIASED>, pairs * kKinds<W> * groups,
                  static_cast<int>((tiles + groups - 1) / groups) * WARP, ring.bytes, call, static_cast<int>(groups),
                  ring.slots, ring.room, added);
  };
  for_widths(op, qkv, table, counts, tokens, scale, heads, top, inverse, bias, order, run);
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) {
  m.impl("cuda_attention_core_backward", TORCH_BOX(&attention_core_backward));
}

}  // namespace
}  // namespace uvc::UVC_BUILD
