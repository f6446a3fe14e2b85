// Attention over kept heads and dims. B images, N tokens, D width, A = heads * head dim, M = B*N.
// Packed rows: kept q dims, kept k dims, kept v dims; `qkv` [2Q + V, M] and `heads` [V.., M] are channel-major, so every
// matrix product is one vendor call on strided views and each (image, head) is a block of contiguous rows. `stats`
// [heads, 2, M] keeps each query's largest score and 1 / sum of exp(score - largest).
#include "cpu/host.h"

#include <new>

namespace uvc {
namespace {

struct Shape {
  int64_t B, N, D, A, M, Dout, heads;
  Indices qk, v, qk_cut, v_cut;
  Index rows, columns;  // what is kept of qkv_weight and of proj_weight, in packed order

  Shape(const Tensor& x, const Tensor& qkv_weight, const Tensor& proj_weight, const Tensor& qk_list,
        const Tensor& qk_offsets, const Tensor& v_list, const Tensor& v_offsets) {
    check(x.dim() == 3 && qkv_weight.dim() == 2 && proj_weight.dim() == 2, "attention: x is 3-d, weights are 2-d");
    B = x.size(0), N = x.size(1), D = x.size(2), A = proj_weight.size(1), M = B * N, Dout = proj_weight.size(0);
    check(qkv_weight.size(0) == 3 * A && qkv_weight.size(1) == D, "attention: qkv_weight must be [3A, D]");
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
    for (int64_t i = 0; i < qk.count; ++i) rows.push_back(qk[i]);
    for (int64_t i = 0; i < qk.count; ++i) rows.push_back(A + qk[i]);
    for (int64_t i = 0; i < v.count; ++i) rows.push_back(2 * A + v[i]);
    columns = positions(v);
  }
  int64_t S() const { return rows.size(); }
  int64_t V() const { return columns.size(); }
};

template <class T>
Tensor pack_qkv(const Tensor& weight, const Shape& s) {
  Tensor packed = empty_of<T>(weight, {s.S(), s.D});
  take_rows(packed, weight, s.rows.data(), s.S(), s.D);
  return packed;
}

// [Dout, V]
template <class T>
Tensor pack_proj(const Tensor& weight, const Shape& s) {
  Tensor packed = empty_of<T>(weight, {s.Dout, s.V()});
  take_columns(packed, weight, s.columns.data(), s.Dout, s.V(), s.A);
  return packed;
}

// qkv [S, M] = Wqkv[kept] x^T, without the bias, which is added where a head is loaded
template <class T>
Tensor project(const Tensor& x, const Tensor& qkv_weight, const Shape& s) {
  Tensor qkv = empty(x, {s.S(), s.M});
  multiply_into(qkv, pack_qkv<T>(qkv_weight, s), matrix(x, s.M, s.D, true));
  return qkv;
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

constexpr std::align_val_t kLine{64};
struct Aligned {
  void operator()(void* p) const { ::operator delete[](p, kLine); }
};

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
  parallel_for(0, s.B * s.heads, 1, [&](int64_t begin, int64_t end) {
    // On a cache line, else every load of a whole register touches two.
    std::unique_ptr<Accumulator<T>[], Aligned> scratch(new (kLine) Accumulator<T>[size]);
    for (int64_t i = begin; i < end; ++i) work(i / s.heads, i % s.heads, scratch.get());
  });
}

constexpr const char* kTypes =
    "attention: weights and biases must share one dtype, that of x or float32 beside bfloat16 and float16";
constexpr const char* kBiasShape = "attention: qkv_bias must be [3A]";

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias,
                                                     Tensor proj_weight, MaybeTensor proj_bias, Tensor qk,
                                                     Tensor qk_offsets, Tensor v, Tensor v_offsets, double scale,
                                                     bool recompute) {
  const Shape s(x, qkv_weight, proj_weight, qk, qk_offsets, v, v_offsets);
  check_parameters(x, qkv_weight, {qkv_bias, proj_weight, proj_bias}, kTypes);
  qkv_weight = as_contiguous(qkv_weight), proj_weight = as_contiguous(proj_weight);
  const ScalarType type = x.scalar_type();
  return for_type(x, "attention", [&]<class T>() {
    x = as<T>(x);
    Tensor out = empty(x, {s.B, s.N, s.Dout}), heads = padded_rows<T>(x, s.V(), s.M);
    Tensor stats = empty_of<Accumulator<T>>(x, {s.heads, 2, s.M});
    Tensor qkv = project<T>(x, qkv_weight, s);
    const auto bias = pack_bias<T>(qkv_bias, s.rows, 3 * s.A, kBiasShape);
    for_heads<T>(s, [&](int64_t image, int64_t h, Accumulator<T>* scratch) {
      loops<T>().attention_forward(head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads),
                                           data<Accumulator<T>>(stats)), scratch);
    });
    // out [M, Dout] = heads^T Wproj[:, kept]^T
    multiply_into(matrix(out, s.M, s.Dout), matrix(heads, s.V(), s.M, true),
                  matrix(pack_proj<T>(proj_weight, s), s.Dout, s.V(), true));
    add_bias<T>(out, proj_bias, s.M, s.Dout);
    return std::make_tuple(cast(out, type), recompute ? empty(x, {0, s.M}) : qkv, heads, stats);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad, Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias, Tensor proj_weight, Tensor qk, Tensor qk_offsets,
    Tensor v, Tensor v_offsets, double scale, Tensor qkv, Tensor heads, Tensor stats, int64_t needs) {
  const Shape s(x, qkv_weight, proj_weight, qk, qk_offsets, v, v_offsets);
  check_parameters(x, qkv_weight, {qkv_bias, proj_weight}, kTypes);
  check(grad.numel() == s.M * s.Dout, "attention_backward: grad must be [B, N, Dout]");
  qkv_weight = as_contiguous(qkv_weight), proj_weight = as_contiguous(proj_weight);
  const ScalarType type = x.scalar_type();
  return for_type(x, "attention_backward", [&]<class T>() {
    using A = Accumulator<T>;
    x = as<T>(x), grad = as<T>(grad);
    auto none = [&] { return torch::stable::new_empty(x, {0}, type); };
    Tensor grad_x = none(), grad_qkv_weight = none(), grad_qkv_bias = none();
    Tensor grad_proj = none(), grad_proj_bias = none();
    if (needs & kNeedBias2) grad_proj_bias = column_sums<T>(proj_weight, grad, s.M, s.Dout);
    if (needs & kNeedWeight2) {
      // dWproj[:, kept] [Dout, V] = grad^T heads^T
      Tensor packed = empty(x, {s.Dout, padded(s.V())});
      multiply_into(packed, matrix(grad, s.M, s.Dout, true), matrix(heads, padded(s.V()), s.M, true));
      grad_proj = empty(proj_weight, {s.Dout, s.A});
      const Index where = inverse(s.columns, s.A);
      take_columns(grad_proj, packed, where.data(), s.Dout, s.A, padded(s.V()));
    }
    if (needs & (kNeedX | kNeedWeight1 | kNeedBias1)) {
      if (qkv.size(0) != s.S()) qkv = project<T>(x, qkv_weight, s);
      // dheads [V, M] = Wproj[:, kept]^T grad^T
      Tensor grad_heads = empty(x, {s.V(), s.M}), grad_qkv = empty(x, {s.S(), s.M});
      multiply_into(grad_heads, matrix(pack_proj<T>(proj_weight, s), s.Dout, s.V(), true),
                    matrix(grad, s.M, s.Dout, true));
      const auto bias = pack_bias<T>(qkv_bias, s.rows, 3 * s.A, kBiasShape);
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
        Tensor wide = empty(x, {s.B, s.N, s.D});
        multiply_into(matrix(wide, s.M, s.D), matrix(grad_qkv, s.S(), s.M, true), pack_qkv<T>(qkv_weight, s));
        grad_x = cast(wide, type);
      }
      if (needs & kNeedWeight1) {
        // dWqkv[kept] [S, D] = dqkv x
        Tensor packed = empty(x, {s.S(), s.D});
        multiply_into(packed, grad_qkv, matrix(x, s.M, s.D));
        grad_qkv_weight = empty(qkv_weight, {3 * s.A, s.D});
        take_rows(grad_qkv_weight, packed, inverse(s.rows, 3 * s.A).data(), 3 * s.A, s.D);
      }
      if (needs & kNeedBias1) {
        std::vector<A> sums(s.S());
        for_rows(s.S(), s.M, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) sums[i] = loops<T>().sum(data<T>(grad_qkv) + i * s.M, s.M);
        });
        grad_qkv_bias = unpack_bias(qkv_weight, sums, s.rows, 3 * s.A);
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
