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

// qkv [S, M] = Wqkv[kept] x^T for a range of tokens, without the bias, which is added where a head is loaded
void project(const Tensor& qkv, const Tensor& packed, const Tensor& x, const Shape& s, Range tokens) {
  multiply_into(columns_of(qkv, s.S(), tokens, s.M), packed, rows_of(x, tokens, s.D, true));
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

// Runs work(image, head, scratch) for all pairs of these images, in parallel.
template <class T, class F>
void for_heads(const Shape& s, Range images, F&& work) {
  int64_t wide_qk = 0, wide_v = 0;
  for (int64_t h = 0; h < s.heads; ++h) {
    wide_qk = std::max(wide_qk, s.qk_cut[h + 1] - s.qk_cut[h]);
    wide_v = std::max(wide_v, s.v_cut[h + 1] - s.v_cut[h]);
  }
  Head<T> widest{};
  widest.tokens = s.N, widest.qk_dims = wide_qk, widest.v_dims = wide_v;
  const int64_t size = loops<T>().attention_scratch(widest);
  parallel_for(images.begin * s.heads, images.end * s.heads, 1, [&](int64_t begin, int64_t end) {
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
    Tensor stats = empty_of<Accumulator<T>>(x, {s.heads, 2, s.M}), qkv = empty(x, {s.S(), s.M});
    const Tensor wqkv = pack_qkv<T>(qkv_weight, s), wproj = pack_proj<T>(proj_weight, s);
    const auto bias = pack_bias<T>(qkv_bias, s.rows, 3 * s.A, kBiasShape);
    const MaybeTensor out_bias = wide_bias<T>(proj_bias, s.Dout);
    for_shares(s.B, 1, [&](Share share) {
      const Range images = share.of(s.B, 1), tokens{images.begin * s.N, images.end * s.N};
      project(qkv, wqkv, x, s, tokens);
      for_heads<T>(s, images, [&](int64_t image, int64_t h, Accumulator<T>* scratch) {
        loops<T>().attention_forward(head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads),
                                             data<Accumulator<T>>(stats)), scratch);
      });
      // out [M, Dout] = heads^T Wproj[:, kept]^T
      multiply_into(rows_of(out, tokens, s.Dout), columns_of(heads, s.V(), tokens, s.M, true),
                    matrix(wproj, s.Dout, s.V(), true));
      add_bias<T>(out, out_bias, tokens, s.Dout);
    });
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
    const bool inner = needs & (kNeedX | kNeedWeight1 | kNeedBias1);
    Tensor wide, grad_qkv;
    if (inner) {
      const bool again = qkv.size(0) != s.S();
      if (again) qkv = empty(x, {s.S(), s.M});
      Tensor grad_heads = empty(x, {s.V(), s.M});
      grad_qkv = empty(x, {s.S(), s.M});
      if (needs & kNeedX) wide = empty(x, {s.B, s.N, s.D});
      const Tensor wqkv = pack_qkv<T>(qkv_weight, s), wproj = pack_proj<T>(proj_weight, s);
      const auto bias = pack_bias<T>(qkv_bias, s.rows, 3 * s.A, kBiasShape);
      for_shares(s.B, 1, [&](Share share) {
        const Range images = share.of(s.B, 1), tokens{images.begin * s.N, images.end * s.N};
        if (again) project(qkv, wqkv, x, s, tokens);
        // dheads [V, M] = Wproj[:, kept]^T grad^T
        multiply_into(columns_of(grad_heads, s.V(), tokens, s.M), matrix(wproj, s.Dout, s.V(), true),
                      rows_of(grad, tokens, s.Dout, true));
        for_heads<T>(s, images, [&](int64_t image, int64_t h, A* scratch) {
          Head<T> head = head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads), data<A>(stats));
          head.grad_out = data<T>(grad_heads) + (head.out - data<T>(heads));
          head.grad_q = data<T>(grad_qkv) + (head.q - data<T>(qkv));
          head.grad_k = data<T>(grad_qkv) + (head.k - data<T>(qkv));
          head.grad_v = data<T>(grad_qkv) + (head.v - data<T>(qkv));
          loops<T>().attention_backward(head, scratch);
        });
        // dx [M, D] = dqkv^T Wqkv[kept]
        if (needs & kNeedX)
          multiply_into(rows_of(wide, tokens, s.D), columns_of(grad_qkv, s.S(), tokens, s.M, true), wqkv);
      });
      if (needs & kNeedX) grad_x = cast(wide, type);
    }

    // What sums over all tokens: each share has its channels.
    const int64_t V = padded(s.V());
    const Index where = inverse(s.rows, 3 * s.A), columns = inverse(s.columns, s.A);
    std::vector<A> sums(s.S());
    Tensor packed_qkv, packed_proj, out_sums;
    if (needs & kNeedWeight1) packed_qkv = empty(x, {s.S(), s.D}), grad_qkv_weight = empty(qkv_weight, {3 * s.A, s.D});
    if (needs & kNeedWeight2) packed_proj = empty(x, {s.Dout, V}), grad_proj = empty(proj_weight, {s.Dout, s.A});
    if (needs & kNeedBias2) out_sums = empty_of<A>(grad, {s.Dout});
    for_shares(std::min(s.S(), s.Dout), 16, [&](Share share) {
      const Range rows = share.of(s.S()), outs = share.of(s.Dout);
      if (needs & kNeedWeight2) {
        // dWproj[:, kept] [Dout, V] = grad^T heads^T
        multiply_into(rows_of(packed_proj, outs, V), columns_of(grad, s.M, outs, s.Dout, true),
                      matrix(heads, V, s.M, true));
        take_columns(rows_of(grad_proj, outs, s.A), rows_of(packed_proj, outs, V), columns.data(), outs.size(), s.A, V);
      }
      if (needs & kNeedBias2) column_sums<T>(out_sums, grad, s.M, outs, s.Dout);
      if (needs & kNeedWeight1) {
        // dWqkv[kept] [S, D] = dqkv x
        multiply_into(rows_of(packed_qkv, rows, s.D), rows_of(grad_qkv, rows, s.M), matrix(x, s.M, s.D));
        put_rows(grad_qkv_weight, packed_qkv, s.rows, rows, where, share.of(3 * s.A), s.D);
      }
      if (needs & kNeedBias1)
        for_rows(rows.size(), s.M, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = rows.begin + begin; i < rows.begin + end; ++i)
            sums[i] = loops<T>().sum(data<T>(grad_qkv) + i * s.M, s.M);
        });
    });
    if (needs & kNeedBias1) grad_qkv_bias = unpack_bias(qkv_weight, sums, s.rows, 3 * s.A);
    if (needs & kNeedBias2) grad_proj_bias = cast(out_sums, proj_weight.scalar_type());
    return std::make_tuple(grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj, grad_proj_bias);
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
}  // namespace uvc
