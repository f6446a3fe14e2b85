// Sum of a*b over each row (dim 0) or column (dim 1) of many matrices: one threaded pass over all of them.
#include "cpu/host.h"

namespace uvc {
namespace {

// A piece of work: some rows of one matrix (dim 0), or some columns of one (dim 1).
struct Piece {
  size_t tensor;
  int64_t begin, end, out;
};

Tensor group_scores(std::vector<Tensor> a, std::vector<Tensor> b, std::vector<int64_t> dims) {
  check(!a.empty() && a.size() == b.size() && a.size() == dims.size(), "group_scores: lists must be equally long");
  std::vector<Piece> pieces;
  int64_t total = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    check(a[i].scalar_type() == a[0].scalar_type() && b[i].scalar_type() == a[0].scalar_type() &&
              a[i].numel() == b[i].numel() && (a[i].dim() == 1 || a[i].dim() == 2) && dims[i] >= 0 &&
              dims[i] < a[i].dim(),
          "group_scores: pairs must share dtype and shape, and dims must exist");
    a[i] = as_contiguous(a[i]), b[i] = as_contiguous(b[i]);
    const int64_t groups = a[i].size(dims[i]), size = groups == 0 ? 0 : a[i].numel() / groups;
    // Whole rows where there are many columns: what is read in pieces of 1 KB is read at half the speed.
    const int64_t step = dims[i] == 1 ? 2048 : std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
    for (int64_t at = 0; at < groups; at += step)
      pieces.push_back({i, at, std::min(groups, at + step), total + at});
    total += groups;
  }
  const bool wide = a[0].scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(a[0], {total}, wide ? ScalarType::Double : ScalarType::Float);
  for_type(a[0], "group_scores", [&]<class T>() {
    using A = Accumulator<T>;
    const auto& loop = loops<T>();
    parallel_for(0, pieces.size(), 4, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const Piece& piece = pieces[p];
        const Tensor& t = a[piece.tensor];
        const T *x = data<T>(t), *y = data<T>(b[piece.tensor]);
        A* score = data<A>(out) + piece.out;
        const int64_t n = piece.end - piece.begin, columns = t.dim() == 1 ? 1 : t.size(1);
        if (dims[piece.tensor] == 0 && columns > 1) {
          for (int64_t r = 0; r < n; ++r)
            score[r] = loop.dot(x + (piece.begin + r) * columns, y + (piece.begin + r) * columns, columns);
          continue;
        }
        // a vector is a matrix of one row, whose columns are scored
        const int64_t rows = dims[piece.tensor] == 0 ? (columns == 0 ? 0 : 1) : t.size(0);
        const int64_t stride = dims[piece.tensor] == 0 ? 0 : columns;
        std::fill(score, score + n, A(0));
        for (int64_t r = 0; r < rows; ++r)
          loop.add_product(x + r * stride + piece.begin, y + r * stride + piece.begin, score, n);
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) { m.impl("group_scores", TORCH_BOX(&group_scores)); }

}  // namespace
}  // namespace uvc
