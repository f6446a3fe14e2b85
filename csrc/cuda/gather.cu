// Kept rows, columns or entries of many matrices, cast on the way, in one launch.
//   dim 0: out[i, :] = source[index[i], :]      dim 1: out[:, j] = source[:, index[j]]      index -1 gives zeros
// A vector is a matrix of one row. With the inverse indices the same kernel spreads packed gradients over full ones.
#include "cuda/pieces.h"

namespace uvc::UVC_BUILD {
namespace {

template <class S, class D>
__global__ void __launch_bounds__(kTileThreads) gather_kernel(const __grid_constant__ Pieces pieces) {
  const Piece& piece = pieces.mine();
  const S* source = static_cast<const S*>(piece.first);
  const int32_t* index = static_cast<const int32_t*>(piece.second);
  D* out = static_cast<D*>(piece.out);
  const bool read_eights = piece.dim == 0 && in_eights<S>(source, piece.stride);
  const bool write_eights = in_eights<D>(out, piece.columns);
  for_eights(piece, [&](int row, int column, int count) {
    Vector<D, 8> values;
    if (piece.dim == 0) {
      const int64_t from = index[row];
      const int64_t place = from * piece.stride + column;
      if (from >= 0 && read_eights && count == 8) {
        const Vector<S, 8> read = load<Vector<S, 8>>(source + place);
#pragma unroll
        for (int i = 0; i < 8; ++i) values.at[i] = narrow<D>(static_cast<Wide<D>>(widen(read.at[i])));
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          values.at[i] = narrow<D>(from >= 0 && i < count ? static_cast<Wide<D>>(widen(source[place + i])) : 0);
      }
    } else {
      const int64_t place = row * piece.stride;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int32_t from = i < count ? index[column + i] : -1;
        values.at[i] = narrow<D>(from >= 0 ? static_cast<Wide<D>>(widen(source[place + from])) : 0);
      }
    }
    D* place = out + static_cast<int64_t>(row) * piece.columns + column;
    if (write_eights && count == 8) {
      store(place, values);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) place[i] = values.at[i];
    }
  });
}

template <class S, class D>
void run(const Device& device, const std::vector<Tensor>& sources, const std::vector<Tensor>& indices,
         const std::vector<int64_t>& dims, const std::vector<Tensor>& outs) {
  Batches batches([&](const Pieces& pieces, int64_t blocks) {
    device.launch("cuda_gather", &gather_kernel<S, D>, blocks, kTileThreads, 0, pieces);
  });
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor &source = sources[i], &out = outs[i];
    if (source.scalar_type() != scalar_type<S> || out.scalar_type() != scalar_type<D>) continue;
    const bool vector = source.dim() == 1;
    const int64_t rows = vector ? 1 : out.size(0), columns = vector ? out.size(0) : out.size(1);
    batches.add({data<S>(source), data<int32_t>(indices[i]), data<D>(out), vector ? 0 : source.size(1),
                 static_cast<int32_t>(rows), static_cast<int32_t>(columns), vector ? 1 : static_cast<int32_t>(dims[i]), 0},
                tiles_of(rows, columns));
  }
  batches.flush();
}

void gather(std::vector<Tensor> sources, std::vector<Tensor> indices, std::vector<int64_t> dims,
            std::vector<Tensor> outs) {
  const size_t n = sources.size();
  check(indices.size() == n && dims.size() == n && outs.size() == n, "cuda_gather: lists must be equally long");
  const Device device(sources[0]);
  for (size_t i = 0; i < n; ++i) {
    const Tensor &source = sources[i], &index = indices[i], &out = outs[i];
    const std::string at = "cuda_gather: matrix " + std::to_string(i);
    check((source.dim() == 1 || source.dim() == 2) && out.dim() == source.dim() && dims[i] >= 0 &&
              dims[i] < source.dim(),
          at + ": source and out must be vectors or matrices, dim one of theirs");
    check(source.is_contiguous() && index.is_contiguous() && out.is_contiguous(), at + " must be contiguous");
    check(index.scalar_type() == ScalarType::Int && index.dim() == 1 && out.size(dims[i]) == index.size(0) &&
              (source.dim() == 1 || out.size(1 - dims[i]) == source.size(1 - dims[i])),
          at + ": out must have the shape of source with one row or column per int32 index");
    for (int64_t d = 0; d < source.dim(); ++d)
      check(source.size(d) <= INT32_MAX && out.size(d) <= INT32_MAX, at + " has more than 2^31 rows or columns");
    const bool from_wide = source.scalar_type() == ScalarType::Double, to_wide = out.scalar_type() == ScalarType::Double;
    check(from_wide == to_wide, at + ": float64 is not cast");
  }
  run<float, float>(device, sources, indices, dims, outs);
  run<float, Bf16>(device, sources, indices, dims, outs);
  run<float, Fp16>(device, sources, indices, dims, outs);
  run<Bf16, float>(device, sources, indices, dims, outs);
  run<Fp16, float>(device, sources, indices, dims, outs);
  run<Bf16, Bf16>(device, sources, indices, dims, outs);
  run<Fp16, Fp16>(device, sources, indices, dims, outs);
  run<Bf16, Fp16>(device, sources, indices, dims, outs);
  run<Fp16, Bf16>(device, sources, indices, dims, outs);
  run<double, double>(device, sources, indices, dims, outs);
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) { m.impl("cuda_gather", TORCH_BOX(&gather)); }

}  // namespace
}  // namespace uvc::UVC_BUILD
