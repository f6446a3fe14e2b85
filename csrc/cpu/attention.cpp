// Attention over kept heads and dims. B images, N tokens, D width, A = heads * head dim, M = B*N.
// Packed rows: kept q dims, kept k dims, kept v dims; `qkv` [2Q + V, M] and `heads` [V, M] are channel-major, so every
// matrix product is one vendor call on strided views and each (image, head) is a block of contiguous rows. `stats`
// [heads, 2, M] keeps each query's largest score and 1 / sum of exp(score - largest).
#include "cpu/host.h"

namespace uvc {
namespace {

struct Shape {
  int64_t B, N, D, A, M, Dout, heads;
  Indices qk, v, qk_cut, v_cut;

  Shape(const Tensor& x, const Tensor& qkv_weight, const Tensor& proj_weight, const Tensor& qk_list,
        const Tensor& qk_offsets, const Tensor& v_list, const Tensor& v_offsets) {
    check(x.dim() == 3 && qkv_weight.dim() == 2 && proj_weight.dim() == 2, "attention: x is 3-d, weights are 2-d");
    B = x.size(0), N = x.size(1), D = x.size(2), A = proj_weight.size(1), M = B * N, Dout = proj_weight.size(0);
    check(qkv_weight.size(0) == 3 * A && qkv_weight.size(1) == D, "attention: qkv_weight must be [3A, D]");
    check(x.scalar_type() == qkv_weight.scalar_type() && x.scalar_type() == proj_weight.scalar_type(),
          "attention: x and the weights must have one dtype");
    qk = indices(qk_list, A, "attention: kept.qk must be int64 positions in 0..A on the CPU");
    v = indices(v_list, A, "attention: kept.v must be int64 positions in 0..A on the CPU");
    qk_cut = indices(qk_offsets, qk.count + 1, "attention: kept.qk_offsets must cut kept.qk");
    v_cut = indices(v_offsets, v.count + 1, "attention: kept.v_offsets must cut kept.v");
    heads = v_cut.count - 1;
    check(heads >= 0 && qk_cut.count == heads + 1 && qk_cut[heads] == qk.count && v_cut[heads] == v.count &&
              qk_cut[0] == 0 && v_cut[0] == 0,
          "attention: kept.qk_offsets and kept.v_offsets must run from 0 to the number of kept dims");
    for (int64_t h = 0; h < heads; ++h)
      check(qk_cut[h] <= qk_cut[h + 1] && v_cut[h] <= v_cut[h + 1], "attention: offsets of kept must not decrease");
  }
  int64_t rows() const { return 2 * qk.count + v.count; }
};

template <class T>
Tensor pack_qkv(const Tensor& weight, const Shape& s) {
  Tensor packed = empty(weight, {s.rows(), s.D});
  const T* full = data<T>(weight);
  T* out = data<T>(packed);
  pack_rows(out, full, s.qk, 0, s.D);
  pack_rows(out + s.qk.count * s.D, full, s.qk, s.A, s.D);
  pack_rows(out + 2 * s.qk.count * s.D, full, s.v, 2 * s.A, s.D);
  return packed;
}

template <class T>
Tensor pack_proj(const Tensor& weight, const Shape& s) {
  Tensor packed = empty(weight, {s.Dout, s.v.count});
  pack_columns(data<T>(packed), data<T>(weight), s.Dout, s.v, s.A);
  return packed;
}

template <class T>
std::vector<Accumulator<T>> pack_bias(const MaybeTensor& bias, const Shape& s) {
  std::vector<Accumulator<T>> packed(s.rows(), 0);
  if (!bias) return packed;
  check(bias->numel() == 3 * s.A, "attention: qkv_bias must be [3A]");
  const Tensor source = as_contiguous(*bias);
  const T* full = data<T>(source);
  const int64_t Q = s.qk.count;
  for (int64_t i = 0; i < Q; ++i) {
    packed[i] = widen(full[s.qk[i]]);
    packed[Q + i] = widen(full[s.A + s.qk[i]]);
  }
  for (int64_t i = 0; i < s.v.count; ++i) packed[2 * Q + i] = widen(full[2 * s.A + s.v[i]]);
  return packed;
}

template <class T>
Head<T> head_of(const Shape& s, int64_t image, int64_t h, double scale, const T* qkv, const Accumulator<T>* bias,
                T* out, Accumulator<T>* stats) {
  const int64_t q = s.qk_cut[h], k = s.qk.count + q, v = 2 * s.qk.count + s.v_cut[h], token = image * s.N;
  Head<T> head{};
  head.tokens = s.N, head.stride = s.M;
  head.qk_dims = s.qk_cut[h + 1] - q, head.v_dims = s.v_cut[h + 1] - s.v_cut[h];
  head.scale = static_cast<Accumulator<T>>(scale);
  head.q = qkv + q * s.M + token, head.k = qkv + k * s.M + token, head.v = qkv + v * s.M + token;
  head.q_bias = bias + q, head.k_bias = bias + k, head.v_bias = bias + v;
  head.out = out + s.v_cut[h] * s.M + token;
  head.top = stats + 2 * h * s.M + token, head.inverse = head.top + s.M;
  return head;
}

// Runs work(image, head, scratch) for all pairs, in parallel.
template <class T, class F>
void for_heads(const Shape& s, F&& work) {
  int64_t wide_qk = 0, wide_v = 0;
  for (int64_t h = 0; h < s.heads; ++h) {
    wide_qk = std::max(wide_qk, s.qk_cut[h + 1] - s.qk_cut[h]);
    wide_v = std::max(wide_v, s.v_cut[h + 1] - s.v_cut[h]);
  }
  Head<T> widest{};
  widest.tokens = s.N, widest.qk_dims = wide_qk, widest.v_dims = wide_v;
  const int64_t size = loops<T>().attention_scratch(widest);
  torch::stable::parallel_for(0, s.B * s.heads, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<Accumulator<T>[]> scratch(new Accumulator<T>[size]);
    for (int64_t i = begin; i < end; ++i) work(i / s.heads, i % s.heads, scratch.get());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias,
                                                     Tensor proj_weight, MaybeTensor proj_bias, Tensor qk,
                                                     Tensor qk_offsets, Tensor v, Tensor v_offsets, double scale) {
  const Shape s(x, qkv_weight, proj_weight, qk, qk_offsets, v, v_offsets);
  x = as_contiguous(x), qkv_weight = as_contiguous(qkv_weight), proj_weight = as_contiguous(proj_weight);
  return for_type(x, "attention", [&]<class T>() {
    const int64_t S = s.rows(), V = s.v.count;
    Tensor out = empty(x, {s.B, s.N, s.Dout}), qkv = empty(x, {S, s.M}), heads = empty(x, {V, s.M});
    Tensor stats = torch::stable::new_empty(
        x, {s.heads, 2, s.M}, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    // qkv [S, M] = Wqkv[kept] x^T; its bias is added where a head is loaded
    multiply_into(qkv, pack_qkv<T>(qkv_weight, s), matrix(x, s.M, s.D, true));
    const auto bias = pack_bias<T>(qkv_bias, s);
    for_heads<T>(s, [&](int64_t image, int64_t h, Accumulator<T>* scratch) {
      loops<T>().attention_forward(head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads),
                                           data<Accumulator<T>>(stats)), scratch);
    });
    // out [M, Dout] = heads^T Wproj[:, kept]^T
    multiply_into(matrix(out, s.M, s.Dout), matrix(heads, V, s.M, true),
                  matrix(pack_proj<T>(proj_weight, s), s.Dout, V, true));
    add_bias<T>(out, proj_bias, s.M, s.Dout);
    return std::make_tuple(out, qkv, heads, stats);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad, Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias, Tensor proj_weight, Tensor qk, Tensor qk_offsets,
    Tensor v, Tensor v_offsets, double scale, Tensor qkv, Tensor heads, Tensor stats, int64_t needs) {
  const Shape s(x, qkv_weight, proj_weight, qk, qk_offsets, v, v_offsets);
  x = as_contiguous(x), qkv_weight = as_contiguous(qkv_weight), proj_weight = as_contiguous(proj_weight);
  grad = as_contiguous(grad);
  check(grad.numel() == s.M * s.Dout, "attention_backward: grad must be [B, N, Dout]");
  return for_type(x, "attention_backward", [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t S = s.rows(), Q = s.qk.count, V = s.v.count;
    Tensor grad_x = empty(x, {0}), grad_qkv_weight = empty(x, {0}), grad_qkv_bias = empty(x, {0});
    Tensor grad_proj = empty(x, {0});
    Tensor grad_proj_bias = needs & kNeedBias2 ? column_sums<T>(grad, s.M, s.Dout) : empty(x, {0});
    if (needs & kNeedWeight2) {
      // dWproj[:, kept] [Dout, V] = grad^T heads^T
      Tensor packed = empty(x, {s.Dout, V});
      multiply_into(packed, matrix(grad, s.M, s.Dout, true), matrix(heads, V, s.M, true));
      grad_proj = zeros(x, {s.Dout, s.A});
      unpack_columns(data<T>(grad_proj), data<T>(packed), s.Dout, s.v, s.A);
    }
    if (needs & (kNeedX | kNeedWeight1 | kNeedBias1)) {
      // dheads [V, M] = Wproj[:, kept]^T grad^T
      Tensor grad_heads = empty(x, {V, s.M}), grad_qkv = empty(x, {S, s.M});
      multiply_into(grad_heads, matrix(pack_proj<T>(proj_weight, s), s.Dout, V, true),
                    matrix(grad, s.M, s.Dout, true));
      const auto bias = pack_bias<T>(qkv_bias, s);
      for_heads<T>(s, [&](int64_t image, int64_t h, A* scratch) {
        Head<T> head = head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads), data<A>(stats));
        head.grad_out = data<T>(grad_heads) + (head.out - data<T>(heads));
        head.grad_q = data<T>(grad_qkv) + (head.q - data<T>(qkv));
        head.grad_k = data<T>(grad_qkv) + (head.k - data<T>(qkv));
        head.grad_v = data<T>(grad_qkv) + (head.v - data<T>(qkv));
        loops<T>().attention_backward(head, scratch);
      });
      if (needs & kNeedX) {
        // dx [M, D] = dqkv^T Wqkv[kept]
        grad_x = empty(x, {s.B, s.N, s.D});
        multiply_into(matrix(grad_x, s.M, s.D), matrix(grad_qkv, S, s.M, true), pack_qkv<T>(qkv_weight, s));
      }
      if (needs & kNeedWeight1) {
        // dWqkv[kept] [S, D] = dqkv x
        Tensor packed = empty(x, {S, s.D});
        multiply_into(packed, grad_qkv, matrix(x, s.M, s.D));
        grad_qkv_weight = zeros(x, {3 * s.A, s.D});
        T* full = data<T>(grad_qkv_weight);
        const T* rows = data<T>(packed);
        unpack_rows(full, rows, s.qk, 0, s.D);
        unpack_rows(full, rows + Q * s.D, s.qk, s.A, s.D);
        unpack_rows(full, rows + 2 * Q * s.D, s.v, 2 * s.A, s.D);
      }
      if (needs & kNeedBias1) {
        grad_qkv_bias = zeros(x, {3 * s.A});
        T* full = data<T>(grad_qkv_bias);
        auto row_sum = [&](int64_t row, T& out) { narrow(loops<T>().sum(data<T>(grad_qkv) + row * s.M, s.M), out); };
        for (int64_t i = 0; i < Q; ++i) {
          row_sum(i, full[s.qk[i]]);
          row_sum(Q + i, full[s.A + s.qk[i]]);
        }
        for (int64_t i = 0; i < V; ++i) row_sum(2 * Q + i, full[2 * s.A + s.v[i]]);
      }
    }
    return std::make_tuple(grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj, grad_proj_bias);
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
}  // namespace uvc
