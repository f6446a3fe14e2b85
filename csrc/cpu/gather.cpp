// Rows (dim 0) or columns (dim 1) of many matrices, chosen by index and cast, in one call; -1 gives zeros.
#include "cpu/host.h"

namespace uvc {
namespace {

// `inverses` serves the gradient, which is the same op the other way round.
std::vector<Tensor> gather(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<Tensor> inverses,
                           std::vector<int64_t> dims, std::optional<ScalarType> dtype) {
  check(sources.size() == indices.size() && sources.size() == dims.size(), "gather: lists must be equally long");
  std::vector<Tensor> outs;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor &source = sources[i], &index = indices[i];
    check((source.dim() == 1 || source.dim() == 2) && dims[i] >= 0 && dims[i] < source.dim(),
          "gather: sources must be vectors or matrices, and dims must exist");
    check(index.dim() == 1 && index.scalar_type() == ScalarType::Int && index.is_contiguous() && index.is_cpu(),
          "gather: indices must be contiguous int32 vectors on the CPU");
    const int64_t n = index.size(0), size = source.size(dims[i]);
    const int32_t* list = data<int32_t>(index);
    check(std::all_of(list, list + n, [&](int32_t j) { return j >= -1 && j < size; }),
          "gather: indices must be positions of the source, or -1");
    const Tensor in = as_contiguous(source);
    const ScalarType type = dtype.value_or(source.scalar_type());
    // A vector is a matrix of one row whose columns are chosen.
    const bool by_column = source.dim() == 1 || dims[i] == 1;
    const int64_t rows = source.dim() == 1 ? 1 : source.size(0);
    std::vector<int64_t> shape{n};
    if (source.dim() == 2) shape = by_column ? std::vector<int64_t>{rows, n} : std::vector<int64_t>{n, source.size(1)};
    outs.push_back(torch::stable::new_empty(in, shape, type));
    if (by_column)
      take_columns(outs.back(), in, list, rows, n, size);
    else
      take_rows(outs.back(), in, list, n, source.size(1));
  }
  return outs;
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) { m.impl("gather", TORCH_BOX(&gather)); }

}  // namespace
}  // namespace uvc
