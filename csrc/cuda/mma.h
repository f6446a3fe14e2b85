// Fragments of 16 x 16 and 16 x 8 tiles spread over a warp, tiles in shared memory, and the product of two fragments.
// Lane 4 g + t holds, as pairs of neighbours:
//   a [16, 16]: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8)      b [16, 8]: (2t, g) (2t + 8, g), pairs along rows
//   sums [16, 8]: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
#pragma once

#include "cuda/device.h"

namespace uvc::UVC_BUILD {

template <class T>
struct A16 {
  Pair<T> at[4];
};
// Two fragments b, side by side.
template <class T>
struct B16 {
  Pair<T> at[2][2];
};
template <class T>
struct Sums {
  Wide<T> at[4] = {0, 0, 0, 0};
};

// The sums of two neighbours [16, 16] as the left factor of the next product.
template <class T>
__device__ inline A16<T> as_factor(const Sums<T> (&s)[2]) {
  return {pack<T>(s[0].at[0], s[0].at[1]), pack<T>(s[0].at[2], s[0].at[3]), pack<T>(s[1].at[0], s[1].at[1]),
          pack<T>(s[1].at[2], s[1].at[3])};
}

// No tensor core multiplies float32: every lane fetches the rows and columns of its four sums from their holders.
template <class T>
__device__ inline void multiply_by_shuffles(Sums<T>& sums, const A16<T>& a, const Pair<T> (&b)[2]) {
  auto& d = sums.at;
  const int t = lane_index() % 4, quad = lane_index() - t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int from = 0; from < 4; ++from) {
      Pair<T> row[2], column[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Pair<T>&mine = a.at[2 * half + i], &other = b[half];
        row[i] = {__shfl_sync(ALL_LANES, mine.low, quad + from), __shfl_sync(ALL_LANES, mine.high, quad + from)};
        const int holder = 4 * (2 * t + i) + from;
        column[i] = {__shfl_sync(ALL_LANES, other.low, holder), __shfl_sync(ALL_LANES, other.high, holder)};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[i] += row[i / 2].low * column[i % 2].low;
        d[i] += row[i / 2].high * column[i % 2].high;
      }
    }
  }
}

#ifdef __CUDACC__
__device__ inline uint32_t word(const Pair<Bf16>& p) { return reinterpret_cast<const uint32_t&>(p); }
__device__ inline uint32_t word(const Pair<Fp16>& p) { return reinterpret_cast<const uint32_t&>(p); }

// sums += a b
template <class T>
__device__ inline void multiply(Sums<T>& sums, const A16<T>& a, const Pair<T> (&b)[2]) {
  auto& d = sums.at;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(word(a.at[0])), "r"(word(a.at[1])), "r"(word(a.at[2])), "r"(word(a.at[3])), "r"(word(b[0])),
          "r"(word(b[1])));
  } else if constexpr (std::is_same_v<T, Fp16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(word(a.at[0])), "r"(word(a.at[1])), "r"(word(a.at[2])), "r"(word(a.at[3])), "r"(word(b[0])),
          "r"(word(b[1])));
  } else {
    multiply_by_shuffles(sums, a, b);
  }
}
#else
template <class T>
inline void multiply(Sums<T>& sums, const A16<T>& a, const Pair<T> (&b)[2]) {
  if constexpr (!is_half<T>) {
    if (running->shuffles) return multiply_by_shuffles(sums, a, b);
  }
  struct Call {
    Sums<T>* sums;
    const A16<T>* a;
    const Pair<T>* b;
  } call{&sums, &a, b};
  running->meet_warp(&call, [](void** lanes) {
    Wide<T> rows[16][16], columns[16][8], out[16][8] = {};
    for (int lane = 0; lane < WARP; ++lane) {
      const Call& from = *static_cast<Call*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        Wide<T>* row = rows[g + 8 * (i % 2)] + 2 * t + 8 * (i / 2);
        row[0] = widen(from.a->at[i].low), row[1] = widen(from.a->at[i].high);
      }
      for (int i = 0; i < 2; ++i) {
        columns[2 * t + 8 * i][g] = widen(from.b[i].low), columns[2 * t + 8 * i + 1][g] = widen(from.b[i].high);
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) out[i][j] += rows[i][k] * columns[k][j];
    for (int lane = 0; lane < WARP; ++lane) {
      Sums<T>& to = *static_cast<Call*>(lanes[lane])->sums;
      for (int i = 0; i < 4; ++i) to.at[i] += out[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  });
}
#endif

template <class T>
__device__ inline void multiply(Sums<T> (&sums)[2], const A16<T>& a, const B16<T>& b) {
  multiply(sums[0], a, b.at[0]);
  multiply(sums[1], a, b.at[1]);
}

// Rows of `pitch` elements in shared memory, read in pieces of 16 bytes. With SWIZZLE the pieces of a row are permuted,
// so that the pieces of eight rows at one place lie in different banks; otherwise the pitch has to see to that.
template <class T, bool SWIZZLE>
struct Tile {
  static constexpr int PIECE = 16 / sizeof(T);
  static constexpr bool kMatrixLoads = is_half<T>;
  T* rows;
  int pitch;

  __device__ T* piece(int row, int index) const {
    if constexpr (SWIZZLE) index ^= fold(row);
    return rows + row * pitch + index * PIECE;
  }
  __device__ T* at(int row, int column) const { return piece(row, column / PIECE) + column % PIECE; }

  // a [16, 16] = the block at (row, column)
  __device__ A16<T> left(int row, int column) const {
    const int lane = lane_index();
    A16<T> out;
    if constexpr (kMatrixLoads) {
      load_matrices<false>(place(lane % 16, lane / 16, row, column), out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out.at[i] = load<Pair<T>>(at(row + lane / 4 + 8 * (i % 2), column + 2 * (lane % 4) + 8 * (i / 2)));
    }
    return out;
  }
  // a [16, 16] = the transpose of the block at (row, column)
  __device__ A16<T> left_turned(int row, int column) const {
    const int lane = lane_index();
    A16<T> out;
    if constexpr (kMatrixLoads) {
      load_matrices<true>(place(lane % 8 + lane / 16 * 8, lane / 8 % 2, row, column), out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = row + 2 * (lane % 4) + 8 * (i / 2), to = column + lane / 4 + 8 * (i % 2);
        out.at[i] = {*at(from, to), *at(from + 1, to)};
      }
    }
    return out;
  }
  // b [16, 16] = the block at (row, column)
  __device__ B16<T> right(int row, int column) const {
    const int lane = lane_index();
    B16<T> out;
    if constexpr (kMatrixLoads) {
      load_matrices<true>(place(lane % 16, lane / 16, row, column), out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = row + 2 * (lane % 4) + 8 * (i % 2), to = column + lane / 4 + 8 * (i / 2);
        out.at[i / 2][i % 2] = {*at(from, to), *at(from + 1, to)};
      }
    }
    return out;
  }
  // b [16, 16] = the transpose of the block at (row, column)
  __device__ B16<T> right_turned(int row, int column) const {
    const int lane = lane_index();
    B16<T> out;
    if constexpr (kMatrixLoads) {
      load_matrices<false>(place(lane % 8 + lane / 16 * 8, lane / 8 % 2, row, column), out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out.at[i / 2][i % 2] = load<Pair<T>>(at(row + lane / 4 + 8 * (i / 2), column + 2 * (lane % 4) + 8 * (i % 2)));
    }
    return out;
  }

 private:
  // What `piece` says of a lane's row and piece of the block at (row, column), both multiples of 16, in the order of
  // computation that leaves one addition per row and one exclusive or per column: tiles start at a multiple of a row.
  __device__ uint32_t place(int lane_row, int lane_piece, int row, int column) const {
    constexpr int SIZE = static_cast<int>(sizeof(T));
    const uint32_t start = shared_address(rows);
    if constexpr (SWIZZLE) lane_piece ^= fold(lane_row);
    const uint32_t corner = start + (lane_row * pitch + lane_piece * PIECE) * SIZE + row * pitch * SIZE;
    return SWIZZLE ? corner ^ (column * SIZE) : corner + column * SIZE;
  }
  __device__ int fold(int row) const {
    const int pieces = pitch / PIECE, spread = pieces < 8 ? pieces : 8;
    return row / (8 / spread) % spread;
  }
  // Lane 8 m + i gives the place of row i of matrix m [8, 8].
  template <bool TURNED, class F>
  __device__ static void load_matrices(uint32_t from, F& out) {
#ifdef __CUDACC__
    auto* word = reinterpret_cast<uint32_t*>(&out);
    if constexpr (TURNED)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "r"(from)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "r"(from)
                   : "memory");
#else
    uint32_t words[4];
    host::load_matrices<TURNED>(from, words);
    std::memcpy(&out, words, sizeof out);
#endif
  }
};

}  // namespace uvc::UVC_BUILD
