// The sum of a * b over each row (dim 0) or column (dim 1) of many matrices, in one launch and in a fixed order.
#include "cuda/pieces.h"

namespace uvc::UVC_BUILD {
namespace {

// A block scores 8 rows, a warp each, or 32 columns, whose rows are dealt to the warps.
template <class T>
__global__ void __launch_bounds__(kTileThreads) scores_kernel(const __grid_constant__ Pieces pieces) {
  const Piece& piece = pieces.mine();
  const T *a = static_cast<const T*>(piece.first), *b = static_cast<const T*>(piece.second);
  Wide<T>* out = static_cast<Wide<T>*>(piece.out);
  const int tile = static_cast<int>(blockIdx.x) - piece.block, lane = lane_index(), warp = warp_index();
  Wide<T> sum = 0;
  if (piece.dim == 0) {
    const int row = tile * kTileRows + warp;
    if (row >= piece.rows) return;
    const int64_t first = static_cast<int64_t>(row) * piece.columns;
    if (in_eights<T>(a, piece.columns) && in_eights<T>(b, piece.columns)) {
      for (int column = 8 * lane; column < piece.columns; column += 8 * WARP) {
        const auto x = load<Vector<T, 8>>(a + first + column), y = load<Vector<T, 8>>(b + first + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += widen(x.at[i]) * widen(y.at[i]);
      }
    } else {
      for (int column = lane; column < piece.columns; column += WARP)
        sum += widen(a[first + column]) * widen(b[first + column]);
    }
    sum = sum_of_lanes<WARP>(sum);
    if (lane == 0) out[row] = sum;
    return;
  }
  const int column = tile * WARP + lane;
  if (column < piece.columns) {
    for (int row = warp; row < piece.rows; row += kTileRows) {
      const int64_t at = static_cast<int64_t>(row) * piece.columns + column;
      sum += widen(a[at]) * widen(b[at]);
    }
  }
  auto* sums = reinterpret_cast<Wide<T>*>(shared_memory());  // [warps, lanes]
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && column < piece.columns) {
    for (int other = 1; other < kTileRows; ++other) sum += sums[other * WARP + lane];
    out[column] = sum;
  }
}

Tensor group_scores(std::vector<Tensor> a, std::vector<Tensor> b, std::vector<int64_t> dims) {
  check(!a.empty() && a.size() == b.size() && a.size() == dims.size(),
        "cuda_group_scores: lists must be equally long and not empty");
  const Device device(a[0]);
  int64_t total = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    check(a[i].scalar_type() == a[0].scalar_type() && b[i].scalar_type() == a[0].scalar_type() &&
              (a[i].dim() == 1 || a[i].dim() == 2) && a[i].dim() == b[i].dim() && dims[i] >= 0 && dims[i] < a[i].dim(),
          "cuda_group_scores: pairs must share dtype and shape, and dims must exist");
    for (int64_t d = 0; d < a[i].dim(); ++d)
      check(a[i].size(d) == b[i].size(d) && a[i].size(d) <= INT32_MAX,
            "cuda_group_scores: pairs must share their shape, of at most 2^31 rows and columns");
    a[i] = torch::stable::contiguous(a[i]), b[i] = torch::stable::contiguous(b[i]);
    total += a[i].size(dims[i]);
  }
  const bool wide = a[0].scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(a[0], {total}, wide ? ScalarType::Double : ScalarType::Float);
  for_type(a[0], "cuda_group_scores", [&]<class T>() {
    Batches batches([&](const Pieces& pieces, int64_t blocks) {
      device.launch("cuda_group_scores", &scores_kernel<T>, blocks, kTileThreads, kTileThreads * sizeof(Wide<T>), pieces);
    });
    Wide<T>* place = data<Wide<T>>(out);
    for (size_t i = 0; i < a.size(); ++i) {
      // the scores of a vector are those of the columns of a matrix with one row
      const bool vector = a[i].dim() == 1;
      const int64_t rows = vector ? 1 : a[i].size(0), columns = vector ? a[i].size(0) : a[i].size(1);
      const bool by_row = !vector && dims[i] == 0;
      batches.add({data<T>(a[i]), data<T>(b[i]), place, 0, static_cast<int32_t>(rows), static_cast<int32_t>(columns),
                   by_row ? 0 : 1, 0},
                  by_row ? (rows + kTileRows - 1) / kTileRows : (columns + WARP - 1) / WARP);
      place += a[i].size(dims[i]);
    }
    batches.flush();
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) {
  m.impl("cuda_group_scores", TORCH_BOX(&group_scores));
}

}  // namespace
}  // namespace uvc::UVC_BUILD
