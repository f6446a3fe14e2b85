// MLP over kept neurons, with or without a gate. M tokens of all images, D width, F' kept neurons. The hidden layer is
// channel-major, [F', M] or with a gate [2F', M], the gate's rows last; it is saved before bias and activation, which
// the backward pass recomputes.
#include "cpu/host.h"

namespace uvc {
namespace {

struct Shape {
  int64_t M, D, F, Dout;
  bool gated;
  Index kept;

  Shape(const Tensor& x, const Tensor& fc1, const Tensor& fc2, const MaybeTensor& gate, const Tensor& neurons) {
    check(x.dim() >= 1 && fc1.dim() == 2 && fc2.dim() == 2, "mlp: x needs a last dim, the weights are 2-d");
    D = fc1.size(1), F = fc1.size(0), Dout = fc2.size(0), gated = gate.has_value();
    check(x.size(x.dim() - 1) == D && fc2.size(1) == F, "mlp: fc1_weight must be [F, D] and fc2_weight [Dout, F]");
    check(!gated || (gate->dim() == 2 && gate->size(0) == F && gate->size(1) == D), "mlp: gate_weight must be [F, D]");
    M = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
    kept = positions(indices(neurons, F, "mlp: neurons must be int64 positions in 0..F on the CPU"));
  }
  int64_t n() const { return kept.size(); }
  int64_t hidden_rows() const { return gated ? 2 * n() : n(); }
};

// The weights, contiguous, with the checks of their dtypes.
struct Weights {
  Tensor fc1, fc2;
  MaybeTensor fc1_bias, gate, gate_bias;

  Weights(const Tensor& x, const Tensor& fc1_weight, const MaybeTensor& bias, const Tensor& fc2_weight,
          const MaybeTensor& fc2_bias, const MaybeTensor& gate_weight, const MaybeTensor& gate_bias)
      : fc1(as_contiguous(fc1_weight)), fc2(as_contiguous(fc2_weight)), fc1_bias(bias), gate_bias(gate_bias) {
    check_parameters(x, fc1, {bias, fc2, fc2_bias, gate_weight, gate_bias},
                     "mlp: weights and biases must share one dtype, that of x or float32 beside bfloat16 and float16");
    if (gate_weight) gate = as_contiguous(*gate_weight);
  }
};

// The kept rows of fc1 and then of the gate: [F' or 2F', D].
template <class T>
Tensor pack_in(const Weights& w, const Shape& s) {
  Tensor packed = empty_of<T>(w.fc1, {s.hidden_rows(), s.D});
  take_rows(packed, w.fc1, s.kept.data(), s.n(), s.D);
  if (s.gated) take_rows(rows_of(packed, {s.n(), 2 * s.n()}, s.D), *w.gate, s.kept.data(), s.n(), s.D);
  return packed;
}

// The kept columns of fc2: [Dout, F'].
template <class T>
Tensor pack_out(const Weights& w, const Shape& s) {
  Tensor packed = empty_of<T>(w.fc2, {s.Dout, s.n()});
  take_columns(packed, w.fc2, s.kept.data(), s.Dout, s.n(), s.F);
  return packed;
}

template <class T>
struct Biases {
  std::vector<Accumulator<T>> up, gate;
  Biases(const Weights& w, const Shape& s)
      : up(pack_bias<T>(w.fc1_bias, s.kept, s.F, "mlp: fc1_bias must be [F]")),
        gate(pack_bias<T>(w.gate_bias, s.kept, s.F, "mlp: gate_bias must be [F]")) {}
};

// hidden = (W1[kept], Wgate[kept]) x^T for a range of tokens
void project(const Tensor& hidden, const Tensor& packed, const Tensor& x, const Shape& s, Range tokens) {
  multiply_into(columns_of(hidden, s.hidden_rows(), tokens, s.M), packed, rows_of(x, tokens, s.D, true));
}

std::tuple<Tensor, Tensor> mlp(Tensor x, Tensor fc1_weight, MaybeTensor fc1_bias, Tensor fc2_weight,
                               MaybeTensor fc2_bias, MaybeTensor gate_weight, MaybeTensor gate_bias, Tensor neurons,
                               int64_t activation, bool recompute) {
  const Shape s(x, fc1_weight, fc2_weight, gate_weight, neurons);
  const Weights w(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias);
  const ScalarType type = x.scalar_type();
  return for_type(x, "mlp", [&]<class T>() {
    x = as<T>(x);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
    shape.push_back(s.Dout);
    Tensor out = torch::stable::new_empty(x, shape), active = empty(x, {s.n(), s.M});
    Tensor hidden = empty(x, {s.hidden_rows(), s.M});
    const Tensor w_in = pack_in<T>(w, s), w_out = pack_out<T>(w, s);
    const Biases<T> bias(w, s);
    const MaybeTensor out_bias = wide_bias<T>(fc2_bias, s.Dout);
    const Activation act = static_cast<Activation>(activation);
    for_shares(s.M, 16, [&](Share share) {
      const Range tokens = share.of(s.M);
      project(hidden, w_in, x, s, tokens);
      for_rows(s.n(), tokens.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T *u = data<T>(hidden) + i * s.M + tokens.begin, *gate = u + s.n() * s.M;
          T* y = data<T>(active) + i * s.M + tokens.begin;
          if (s.gated)
            loops<T>().activate_gated(act, gate, bias.gate[i], u, bias.up[i], y, tokens.size());
          else
            loops<T>().activate(act, u, bias.up[i], y, tokens.size());
        }
      });
      // out [M, Dout] = act^T W2[:, kept]^T
      multiply_into(rows_of(out, tokens, s.Dout), columns_of(active, s.n(), tokens, s.M, true),
                    matrix(w_out, s.Dout, s.n(), true));
      add_bias<T>(out, out_bias, tokens, s.Dout);
    });
    return std::make_tuple(cast(out, type), recompute ? empty(x, {0, s.M}) : hidden);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    Tensor grad, Tensor x, Tensor fc1_weight, MaybeTensor fc1_bias, Tensor fc2_weight, MaybeTensor gate_weight,
    MaybeTensor gate_bias, Tensor neurons, int64_t activation, Tensor hidden, int64_t needs) {
  const Shape s(x, fc1_weight, fc2_weight, gate_weight, neurons);
  const Weights w(x, fc1_weight, fc1_bias, fc2_weight, std::nullopt, gate_weight, gate_bias);
  check(grad.numel() == s.M * s.Dout, "mlp_backward: grad must have the shape of the output");
  const ScalarType type = x.scalar_type();
  return for_type(x, "mlp_backward", [&]<class T>() {
    using A = Accumulator<T>;
    x = as<T>(x), grad = as<T>(grad);
    const int64_t n = s.n();
    auto none = [&] { return torch::stable::new_empty(x, {0}, type); };
    Tensor grad_x = none(), grad_fc1 = none(), grad_fc1_bias = none(), grad_fc2 = none(), grad_fc2_bias = none();
    Tensor grad_gate = none(), grad_gate_bias = none();
    const int64_t width = padded(n);
    const bool inner = needs & ~kNeedBias2, inputs = needs & (kNeedWeight1 | kNeedGateWeight);
    const Index where = inverse(s.kept, s.F);
    Tensor grad_hidden, active, w_in, packed_in, packed_out, wide, out_sums;
    if (inner) {
      const bool again = hidden.size(0) != s.hidden_rows();
      if (again || needs & kNeedX) w_in = pack_in<T>(w, s);
      if (again) {
        hidden = empty(x, {s.hidden_rows(), s.M});
        for_shares(s.M, 16, [&](Share share) { project(hidden, w_in, x, s, share.of(s.M)); });
      }
      grad_hidden = empty(x, {s.hidden_rows(), s.M}), active = padded_rows<T>(x, n, s.M);
      if (inputs) packed_in = empty(x, {s.hidden_rows(), s.D});
      if (needs & kNeedWeight1) grad_fc1 = empty(w.fc1, {s.F, s.D});
      if (s.gated && needs & kNeedGateWeight) grad_gate = empty(w.fc1, {s.F, s.D});
      const Tensor w_out = pack_out<T>(w, s);
      const Biases<T> bias(w, s);
      const Activation act = static_cast<Activation>(activation);
      std::vector<A> sums(n), gate_sums(n);
      // What sums over all tokens, and stands in a neuron's own row: each share has its neurons.
      for_shares(n, 16, [&](Share share) {
        const Range rows = share.of(n), gates{n + rows.begin, n + rows.end}, all = share.of(s.F);
        // dact [F', M] = W2[:, kept]^T grad^T, then in place the gradient of the hidden layer; the gate's stands below
        multiply_into(rows_of(grad_hidden, rows, s.M), columns_of(w_out, s.Dout, rows, n, true),
                      matrix(grad, s.M, s.Dout, true));
        for_rows(rows.size(), s.M, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = rows.begin + begin; i < rows.begin + end; ++i) {
            const T *u = data<T>(hidden) + i * s.M, *gate = u + n * s.M;
            T *y = data<T>(active) + i * s.M, *g = data<T>(grad_hidden) + i * s.M;
            if (s.gated)
              loops<T>().activate_gated_backward(act, gate, bias.gate[i], u, bias.up[i], y, g, g + n * s.M, s.M,
                                                 &gate_sums[i], &sums[i]);
            else
              sums[i] = loops<T>().activate_backward(act, u, bias.up[i], y, g, s.M);
          }
        });
        // (dW1[kept], dWgate[kept]) [F' or 2F', D] = dhidden x
        if (needs & kNeedWeight1) {
          multiply_into(rows_of(packed_in, rows, s.D), rows_of(grad_hidden, rows, s.M), matrix(x, s.M, s.D));
          put_rows(grad_fc1, packed_in, s.kept, rows, where, all, s.D);
        }
        if (s.gated && needs & kNeedGateWeight) {
          multiply_into(rows_of(packed_in, gates, s.D), rows_of(grad_hidden, gates, s.M), matrix(x, s.M, s.D));
          put_rows(grad_gate, rows_of(packed_in, {n, 2 * n}, s.D), s.kept, rows, where, all, s.D);
        }
      });
      if (needs & kNeedBias1) grad_fc1_bias = unpack_bias(w.fc1, sums, s.kept, s.F);
      if (s.gated && needs & kNeedGateBias) grad_gate_bias = unpack_bias(w.fc1, gate_sums, s.kept, s.F);
    }
    if (needs & kNeedWeight2) packed_out = empty(x, {s.Dout, width}), grad_fc2 = empty(w.fc2, {s.Dout, s.F});
    if (needs & kNeedX) wide = torch::stable::empty_like(x);
    if (needs & kNeedBias2) out_sums = empty_of<A>(grad, {s.Dout});
    for_shares(std::min(s.M, s.Dout), 16, [&](Share share) {
      const Range tokens = share.of(s.M), outs = share.of(s.Dout);
      if (needs & kNeedWeight2) {
        // dW2[:, kept] [Dout, F'] = grad^T act^T
        multiply_into(rows_of(packed_out, outs, width), columns_of(grad, s.M, outs, s.Dout, true),
                      matrix(active, width, s.M, true));
        take_columns(rows_of(grad_fc2, outs, s.F), rows_of(packed_out, outs, width), where.data(), outs.size(), s.F,
                     width);
      }
      if (needs & kNeedBias2) column_sums<T>(out_sums, grad, s.M, outs, s.Dout);
      // dx [M, D] = dhidden^T (W1[kept], Wgate[kept])
      if (needs & kNeedX)
        multiply_into(rows_of(wide, tokens, s.D), columns_of(grad_hidden, s.hidden_rows(), tokens, s.M, true), w_in);
    });
    if (needs & kNeedX) grad_x = cast(wide, type);
    if (needs & kNeedBias2) grad_fc2_bias = cast(out_sums, w.fc2.scalar_type());
    return std::make_tuple(grad_x, grad_fc1, grad_fc1_bias, grad_fc2, grad_fc2_bias, grad_gate, grad_gate_bias);
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace
}  // namespace uvc
