// Rows (dim 0) or columns (dim 1) of many matrices times their factors, in place; what has factor 1 is not touched.
#include "cpu/host.h"

namespace uvc {
namespace {

struct Piece {
  size_t tensor;
  int64_t begin, end, factor;  // rows of the matrix; where the factors of the matrix (dim 1) or the rows (dim 0) start
};

void prox_shrink(std::vector<Tensor> weights, Tensor factors, std::vector<int64_t> dims) {
  check(!weights.empty() && weights.size() == dims.size(), "prox_shrink: lists must be equally long");
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check(w.scalar_type() == weights[0].scalar_type() && (w.dim() == 1 || w.dim() == 2) && dims[i] >= 0 &&
              dims[i] < w.dim() && w.is_contiguous(),
          "prox_shrink: weights must be contiguous vectors or matrices of one dtype, and dims must exist");
    const int64_t rows = w.size(0), columns = w.dim() == 1 ? 1 : w.size(1);
    const int64_t step = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
    for (int64_t at = 0; at < rows; at += step)
      pieces.push_back({i, at, std::min(rows, at + step), dims[i] == 0 ? total + at : total});
    total += w.size(dims[i]);
  }
  const bool wide = weights[0].scalar_type() == ScalarType::Double;
  check(factors.numel() == total && factors.is_contiguous() &&
            factors.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
        "prox_shrink: factors must be flat float32 (float64 for float64 weights), one per row or column");
  for_type(weights[0], "prox_shrink", [&]<class T>() {
    using A = Accumulator<T>;
    const auto& loop = loops<T>();
    parallel_for(0, pieces.size(), 4, [&](int64_t first, int64_t last) {
      std::vector<A> repeated;
      for (int64_t p = first; p < last; ++p) {
        const Piece& piece = pieces[p];
        const Tensor& w = weights[piece.tensor];
        const int64_t columns = w.dim() == 1 ? 1 : w.size(1), n = piece.end - piece.begin;
        T* row = data<T>(w) + piece.begin * columns;
        const A* factor = data<A>(factors) + piece.factor;
        if (w.dim() == 1) {
          loop.multiply_row(row, factor, n);
          continue;
        }
        const bool by_row = dims[piece.tensor] == 0;
        if (!by_row && std::all_of(factor, factor + columns, [](A f) { return f == A(1); })) continue;
        for (int64_t r = 0; r < n; ++r, row += columns) {
          if (!by_row) {
            loop.multiply_row(row, factor, columns);
          } else if (factor[r] != A(1)) {
            repeated.assign(columns, factor[r]);
            loop.multiply_row(row, repeated.data(), columns);
          }
        }
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) { m.impl("prox_shrink", TORCH_BOX(&prox_shrink)); }

}  // namespace
}  // namespace uvc
