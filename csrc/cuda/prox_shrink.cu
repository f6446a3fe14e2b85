// Rows (dim 0) or columns (dim 1) of many matrices times their factors, in place and in one launch. What has factor 1
// is not written; factor 0 gives 0 whatever stood there.
#include "cuda/pieces.h"

namespace uvc::UVC_BUILD {
namespace {

template <class T>
__device__ inline T times(T value, Wide<T> factor) {
  return factor == 1 ? value : narrow<T>(factor == 0 ? 0 : widen(value) * factor);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) shrink_kernel(const __grid_constant__ Pieces pieces) {
  const Piece& piece = pieces.mine();
  const auto* factors = static_cast<const Wide<T>*>(piece.first);
  T* weights = static_cast<T*>(piece.out);
  const bool eights = in_eights<T>(weights, piece.columns);
  for_eights(piece, [&](int row, int column, int count) {
    Wide<T> factor[8];
    bool all_one = true;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      factor[i] = i < count ? factors[piece.dim == 0 ? row : column + i] : 1;
      all_one = all_one && factor[i] == 1;
    }
    if (all_one) return;
    T* place = weights + static_cast<int64_t>(row) * piece.columns + column;
    if (eights && count == 8) {
      auto values = load<Vector<T, 8>>(place);
#pragma unroll
      for (int i = 0; i < 8; ++i) values.at[i] = times(values.at[i], factor[i]);
      store(place, values);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count && factor[i] != 1) place[i] = times(place[i], factor[i]);
    }
  });
}

void prox_shrink(std::vector<Tensor> weights, Tensor factors, std::vector<int64_t> dims) {
  check(!weights.empty() && weights.size() == dims.size(),
        "cuda_prox_shrink: lists must be equally long and not empty");
  const Device device(weights[0]);
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check(w.scalar_type() == weights[0].scalar_type() && (w.dim() == 1 || w.dim() == 2) && dims[i] >= 0 &&
              dims[i] < w.dim() && w.is_contiguous(),
          "cuda_prox_shrink: weights must be contiguous vectors or matrices of one dtype, and dims must exist");
    for (int64_t d = 0; d < w.dim(); ++d)
      check(w.size(d) <= INT32_MAX, "cuda_prox_shrink: a weight has more than 2^31 rows or columns");
    total += w.size(dims[i]);
  }
  const bool wide = weights[0].scalar_type() == ScalarType::Double;
  check(factors.numel() == total && factors.is_contiguous() &&
            factors.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
        "cuda_prox_shrink: factors must be flat float32 (float64 for float64 weights), one per row or column");
  for_type(weights[0], "cuda_prox_shrink", [&]<class T>() {
    Batches batches([&](const Pieces& pieces, int64_t blocks) {
      device.launch("cuda_prox_shrink", &shrink_kernel<T>, blocks, kTileThreads, 0, pieces);
    });
    const Wide<T>* place = data<Wide<T>>(factors);
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& w = weights[i];
      const bool vector = w.dim() == 1;
      const int64_t rows = vector ? 1 : w.size(0), columns = vector ? w.size(0) : w.size(1);
      batches.add({place, nullptr, data<T>(w), 0, static_cast<int32_t>(rows), static_cast<int32_t>(columns),
                   vector ? 1 : static_cast<int32_t>(dims[i]), 0},
                  tiles_of(rows, columns));
      place += w.size(dims[i]);
    }
    batches.flush();
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) { m.impl("cuda_prox_shrink", TORCH_BOX(&prox_shrink)); }

}  // namespace
}  // namespace uvc::UVC_BUILD
