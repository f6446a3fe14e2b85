// Many matrices in one launch: what a block has to know of them travels as an argument of the kernel, so that a launch
// needs no copy to the device and can be captured in a graph.
#pragma once

#include "cuda/launch.h"

namespace uvc::UVC_BUILD {

// Matrices per launch: some 10 KB of the 32 KB that arguments may take; 24 layers with 8 matrices each fit.
constexpr int kPieces = 192;

// One matrix: what is read, what is written, what belongs to its rows or columns, and the first block that works on it.
struct Piece {
  const void *first, *second;
  void* out;
  int64_t stride;
  int32_t rows, columns, dim, block;
};

struct Pieces {
  Piece at[kPieces];
  int32_t count;

  // The piece of this block.
  __device__ const Piece& mine() const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (at[middle].block <= static_cast<int>(blockIdx.x))
        low = middle;
      else
        high = middle - 1;
    }
    return at[low];
  }
};

// Collects pieces and launches them, as few launches as there are full lists.
template <class Launch>
class Batches {
 public:
  explicit Batches(Launch launch) : launch_(launch) { pieces_.count = 0; }
  void add(Piece piece, int64_t blocks) {
    if (blocks == 0) return;
    if (pieces_.count == kPieces) flush();
    piece.block = static_cast<int32_t>(blocks_);
    pieces_.at[pieces_.count++] = piece;
    blocks_ += blocks;
  }
  void flush() {
    if (pieces_.count > 0) launch_(pieces_, blocks_);
    pieces_.count = 0, blocks_ = 0;
  }

 private:
  Launch launch_;
  Pieces pieces_;
  int64_t blocks_ = 0;
};

// A block of 8 warps works on 8 rows and 512 columns, a lane on 8 neighbours of a row at a time.
constexpr int kTileRows = 8, kTileColumns = 512, kTileThreads = 256;

inline int64_t tiles_of(int64_t rows, int64_t columns) {
  return (rows + kTileRows - 1) / kTileRows * ((columns + kTileColumns - 1) / kTileColumns);
}

// Calls work(row, first column, number of columns up to 8) for what this thread has to do in its tile.
template <class F>
__device__ inline void for_eights(const Piece& piece, F&& work) {
  const int tile = static_cast<int>(blockIdx.x) - piece.block, across = (piece.columns + kTileColumns - 1) / kTileColumns;
  const int row = tile / across * kTileRows + warp_index();
  if (row >= piece.rows) return;
#pragma unroll
  for (int i = 0; i < kTileColumns; i += 8 * WARP) {
    const int column = tile % across * kTileColumns + i + 8 * lane_index(), left = piece.columns - column;
    if (left > 0) work(row, column, left < 8 ? left : 8);
  }
}

// Whether rows of this many elements can be read and written eight at a time.
template <class T>
__device__ inline bool in_eights(const void* rows, int64_t stride) {
  return aligned(rows) && stride % 8 == 0;
}

}  // namespace uvc::UVC_BUILD
