// The sum over the rows of each column of a few matrices, in one launch and in a fixed order: gradients of biases.
#include "cuda/pieces.h"

namespace uvc::UVC_BUILD {
namespace {

// A block sums 16 columns, which are 32 bytes of 16-bit numbers: two neighbours take a row, 8 columns each.
// Often there are fewer blocks than multiprocessors, so that each has as many threads as it can, and reads under way.
constexpr int kSumColumns = 16;
template <class T>
constexpr int kSumThreads = 2048 / sizeof(T);

template <class T>
__global__ void __launch_bounds__(kSumThreads<T>, 1) sums_kernel(const __grid_constant__ Pieces pieces) {
  const Piece& piece = pieces.mine();
  const int first = (static_cast<int>(blockIdx.x) - piece.block) * kSumColumns, thread = static_cast<int>(threadIdx.x);
  const int column = first + 8 * (thread % 2), left = piece.columns - column;
  const T* from = static_cast<const T*>(piece.first) + column;
  Wide<T> sums[8] = {};
  constexpr int kRows = kSumThreads<T> / 2, kAtOnce = 4;
  if (left > 0 && in_eights<T>(from, piece.columns)) {
    for (int row = thread / 2; row < piece.rows; row += kAtOnce * kRows) {
      Vector<T, 8> values[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = row + j * kRows;
        values[j] = i < piece.rows ? load<Vector<T, 8>>(from + static_cast<int64_t>(i) * piece.columns) : Vector<T, 8>{};
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[c] += widen(values[j].at[c]);
      }
    }
  } else {
    for (int row = thread / 2; row < piece.rows; row += kRows) {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (c < left) sums[c] += widen(from[static_cast<int64_t>(row) * piece.columns + c]);
    }
  }
  auto* of_warps = reinterpret_cast<Wide<T>*>(shared_memory());  // [warps, columns]
#pragma unroll
  for (int c = 0; c < 8; ++c) {
#pragma unroll
    for (int step = 2; step < WARP; step *= 2) sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], step);
    if (lane_index() < 2) of_warps[kSumColumns * warp_index() + 8 * lane_index() + c] = sums[c];
  }
  __syncthreads();
  if (thread >= kSumColumns) return;
  Wide<T> sum = 0;
  for (int warp = 0; warp < kSumThreads<T> / WARP; ++warp) sum += of_warps[kSumColumns * warp + thread];
  if (first + thread < piece.columns) static_cast<T*>(piece.out)[first + thread] = narrow<T>(sum);
}

void column_sums(std::vector<Tensor> matrices, std::vector<Tensor> outs) {
  check(!matrices.empty() && matrices.size() == outs.size(),
        "cuda_column_sums: lists must be equally long and not empty");
  const Device device(matrices[0]);
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor &matrix = matrices[i], &out = outs[i];
    check(matrix.scalar_type() == matrices[0].scalar_type() && out.scalar_type() == matrices[0].scalar_type() &&
              matrix.is_contiguous() && out.is_contiguous() && matrix.dim() == 2 && out.dim() == 1 &&
              matrix.size(1) == out.size(0),
          "cuda_column_sums: matrices must be contiguous and of one dtype, with a sum in that dtype for each column");
    check(matrix.size(0) <= INT32_MAX && matrix.size(1) <= INT32_MAX,
          "cuda_column_sums: a matrix has more than 2^31 rows or columns");
  }
  for_type(matrices[0], "cuda_column_sums", [&]<class T>() {
    Batches batches([&](const Pieces& pieces, int64_t blocks) {
      device.launch("cuda_column_sums", &sums_kernel<T>, blocks, kSumThreads<T>,
                    kSumThreads<T> / WARP * kSumColumns * sizeof(Wide<T>), pieces);
    });
    for (size_t i = 0; i < matrices.size(); ++i) {
      const int64_t columns = matrices[i].size(1);
      batches.add({data<T>(matrices[i]), nullptr, data<T>(outs[i]), 0, static_cast<int32_t>(matrices[i].size(0)),
                   static_cast<int32_t>(columns), 1, 0},
                  (columns + kSumColumns - 1) / kSumColumns);
    }
    batches.flush();
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) {
  m.impl("cuda_column_sums", TORCH_BOX(&column_sums));
}

}  // namespace
}  // namespace uvc::UVC_BUILD
