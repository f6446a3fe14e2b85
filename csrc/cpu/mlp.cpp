// MLP over kept neurons. M tokens of all images, D width, F' kept neurons; the hidden layer is channel-major [F', M]
// and saved before bias and activation, which the backward pass recomputes.
#include "cpu/host.h"

namespace uvc {
namespace {

struct Shape {
  int64_t M, D, F, Dout;
  Indices kept;

  Shape(const Tensor& x, const Tensor& fc1, const Tensor& fc2, const Tensor& neurons) {
    check(x.dim() >= 1 && fc1.dim() == 2 && fc2.dim() == 2, "mlp: x needs a last dim, the weights are 2-d");
    D = fc1.size(1), F = fc1.size(0), Dout = fc2.size(0);
    check(x.size(x.dim() - 1) == D && fc2.size(1) == F, "mlp: fc1_weight must be [F, D] and fc2_weight [Dout, F]");
    check(x.scalar_type() == fc1.scalar_type() && x.scalar_type() == fc2.scalar_type(),
          "mlp: x and the weights must have one dtype");
    M = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
    kept = indices(neurons, F, "mlp: neurons must be int64 positions in 0..F on the CPU");
  }
};

template <class T>
Tensor pack_fc1(const Tensor& weight, const Shape& s) {
  Tensor packed = empty(weight, {s.kept.count, s.D});
  pack_rows(data<T>(packed), data<T>(weight), s.kept, 0, s.D);
  return packed;
}

template <class T>
Tensor pack_fc2(const Tensor& weight, const Shape& s) {
  Tensor packed = empty(weight, {s.Dout, s.kept.count});
  pack_columns(data<T>(packed), data<T>(weight), s.Dout, s.kept, s.F);
  return packed;
}

template <class T>
std::vector<Accumulator<T>> pack_bias(const MaybeTensor& bias, const Shape& s) {
  std::vector<Accumulator<T>> packed(s.kept.count, 0);
  if (!bias) return packed;
  check(bias->numel() == s.F, "mlp: fc1_bias must be [F]");
  const Tensor source = as_contiguous(*bias);
  for (int64_t i = 0; i < s.kept.count; ++i) packed[i] = widen(data<T>(source)[s.kept[i]]);
  return packed;
}

std::tuple<Tensor, Tensor> mlp(Tensor x, Tensor fc1_weight, MaybeTensor fc1_bias, Tensor fc2_weight,
                               MaybeTensor fc2_bias, Tensor neurons, int64_t activation) {
  const Shape s(x, fc1_weight, fc2_weight, neurons);
  x = as_contiguous(x), fc1_weight = as_contiguous(fc1_weight), fc2_weight = as_contiguous(fc2_weight);
  return for_type(x, "mlp", [&]<class T>() {
    const int64_t n = s.kept.count;
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
    shape.push_back(s.Dout);
    Tensor out = torch::stable::new_empty(x, shape), hidden = empty(x, {n, s.M}), active = empty(x, {n, s.M});
    // hidden [F', M] = W1[kept] x^T
    multiply_into(hidden, pack_fc1<T>(fc1_weight, s), matrix(x, s.M, s.D, true));
    const auto bias = pack_bias<T>(fc1_bias, s);
    torch::stable::parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        loops<T>().activate(static_cast<Activation>(activation), data<T>(hidden) + i * s.M, bias[i],
                            data<T>(active) + i * s.M, s.M);
    });
    // out [M, Dout] = act^T W2[:, kept]^T
    multiply_into(matrix(out, s.M, s.Dout), matrix(active, n, s.M, true),
                  matrix(pack_fc2<T>(fc2_weight, s), s.Dout, n, true));
    add_bias<T>(out, fc2_bias, s.M, s.Dout);
    return std::make_tuple(out, hidden);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(Tensor grad, Tensor x, Tensor fc1_weight,
                                                                MaybeTensor fc1_bias, Tensor fc2_weight,
                                                                Tensor neurons, int64_t activation, Tensor hidden,
                                                                int64_t needs) {
  const Shape s(x, fc1_weight, fc2_weight, neurons);
  x = as_contiguous(x), fc1_weight = as_contiguous(fc1_weight), fc2_weight = as_contiguous(fc2_weight);
  grad = as_contiguous(grad);
  check(grad.numel() == s.M * s.Dout, "mlp_backward: grad must have the shape of the output");
  return for_type(x, "mlp_backward", [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t n = s.kept.count;
    Tensor grad_x = empty(x, {0}), grad_fc1 = empty(x, {0}), grad_fc1_bias = empty(x, {0}), grad_fc2 = empty(x, {0});
    Tensor grad_fc2_bias = needs & kNeedBias2 ? column_sums<T>(grad, s.M, s.Dout) : empty(x, {0});
    if (needs & (kNeedX | kNeedWeight1 | kNeedBias1 | kNeedWeight2)) {
      // dact [F', M] = W2[:, kept]^T grad^T, then times the slope in place
      Tensor grad_hidden = empty(x, {n, s.M}), active = empty(x, {n, s.M});
      multiply_into(grad_hidden, matrix(pack_fc2<T>(fc2_weight, s), s.Dout, n, true),
                    matrix(grad, s.M, s.Dout, true));
      const auto bias = pack_bias<T>(fc1_bias, s);
      std::vector<A> sums(n);
      torch::stable::parallel_for(0, n, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          sums[i] = loops<T>().activate_backward(static_cast<Activation>(activation), data<T>(hidden) + i * s.M,
                                                 bias[i], data<T>(active) + i * s.M, data<T>(grad_hidden) + i * s.M,
                                                 s.M);
      });
      if (needs & kNeedBias1) {
        grad_fc1_bias = zeros(x, {s.F});
        for (int64_t i = 0; i < n; ++i) narrow(sums[i], data<T>(grad_fc1_bias)[s.kept[i]]);
      }
      if (needs & kNeedWeight2) {
        // dW2[:, kept] [Dout, F'] = grad^T act^T
        Tensor packed = empty(x, {s.Dout, n});
        multiply_into(packed, matrix(grad, s.M, s.Dout, true), matrix(active, n, s.M, true));
        grad_fc2 = zeros(x, {s.Dout, s.F});
        unpack_columns(data<T>(grad_fc2), data<T>(packed), s.Dout, s.kept, s.F);
      }
      if (needs & kNeedWeight1) {
        // dW1[kept] [F', D] = dhidden x
        Tensor packed = empty(x, {n, s.D});
        multiply_into(packed, grad_hidden, matrix(x, s.M, s.D));
        grad_fc1 = zeros(x, {s.F, s.D});
        unpack_rows(data<T>(grad_fc1), data<T>(packed), s.kept, 0, s.D);
      }
      if (needs & kNeedX) {
        // dx [M, D] = dhidden^T W1[kept]
        grad_x = torch::stable::empty_like(x);
        multiply_into(matrix(grad_x, s.M, s.D), matrix(grad_hidden, n, s.M, true), pack_fc1<T>(fc1_weight, s));
      }
    }
    return std::make_tuple(grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias);
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace
}  // namespace uvc
