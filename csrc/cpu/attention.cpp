// Attention over kept heads and dims. B images, N tokens, D width, A = heads * head dim, M = B*N.
// Packed rows: kept q dims, kept k dims, kept v dims; `qkv` [2Q + V, M] and `heads` [V.., M] are channel-major, so every
// matrix product is one call on strided views and each (image, head) is a block of contiguous rows. `stats`
// [heads, 2, M] keeps each query's largest score and 1 / sum of exp(score - largest).
//
// With positions: `turn` [2, I, G, K, length] holds for every dim the cosine, and the sine, negative for the first dim of a
// pair, by image (I = B or 1) and head (G = all heads or 1); `partner` [K] is the dim that each is turned with. `bias`
// [P, G, N, N] is added to the scores: that of image i is i % P, G = kept heads or 1.
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

// What positions do, as the loops read it.
struct Given {
  MaybeTensor bias, turn, partner;
};
template <class T>
struct Positions {
  using A = Accumulator<T>;
  int64_t length, images = 1, heads = 1, dims = 1, biases = 1, bias_heads = 1;
  std::vector<int32_t> row, other;  // of every kept q/k dim
  Tensor table, bias, grad;         // rows of `length`
  bool turns = false, adds = false;

  Positions(const Shape& s, const Tensor& like, const Given& given, bool by_key, bool wants_grad)
      : length((s.N + kTableUnit - 1) / kTableUnit * kTableUnit), table(like), bias(like), grad(like) {
    if (given.turn) read_turn(s, *given.turn, given.partner);
    if (given.bias) read_bias(s, *given.bias, by_key, wants_grad);
  }

  void read_turn(const Shape& s, const Tensor& turn, const MaybeTensor& partner) {
    check(turn.dim() == 5 && turn.size(0) == 2 && turn.size(4) == length && turn.size(3) > 0 &&
              s.A % turn.size(3) == 0 && partner,
          "attention: turn must be [2, images, heads, dims of a head, tokens up to a multiple of 16], with partner");
    table = as<A>(turn), images = turn.size(1), heads = turn.size(2), dims = turn.size(3), turns = true;
    check((images == 1 || images == s.B) && (heads == 1 || heads == s.A / dims),
          "attention: turn must be of one image or all, and of one head or all");
    const Indices with = indices(*partner, dims, "attention: partner must be int64 positions of dims on the CPU");
    check(with.count == dims, "attention: partner must have one entry for each dim of a head");
    row.resize(s.qk.count), other.resize(s.qk.count);
    Index place(dims);
    for (int64_t h = 0; h < s.heads; ++h) {
      std::fill(place.begin(), place.end(), -1);
      for (int64_t i = s.qk_cut[h]; i < s.qk_cut[h + 1]; ++i) place[s.qk[i] % dims] = i - s.qk_cut[h];
      for (int64_t i = s.qk_cut[h]; i < s.qk_cut[h + 1]; ++i) {
        const int64_t dim = s.qk[i] % dims, head = heads == 1 ? 0 : s.qk[i] / dims;
        row[i] = head * dims + dim, other[i] = place[with[dim]];
        check(other[i] >= 0, "attention: a q/k dim is kept without the one that it is turned with");
      }
    }
  }

  void read_bias(const Shape& s, const Tensor& given, bool by_key, bool wants_grad) {
    check(given.dim() == 4 && given.size(2) == s.N && given.size(3) == s.N, "attention: bias must be [P, heads, N, N]");
    biases = given.size(0), bias_heads = given.size(1), adds = true;
    check(biases > 0 && s.B % biases == 0 && (bias_heads == s.heads || (bias_heads == 1 && !wants_grad)),
          "attention: bias must be of a divisor of the images, and of all kept heads (without gradient: or of one)");
    const Tensor values = as<A>(given);
    const int64_t N = s.N, all = biases * bias_heads;
    bias = empty_of<A>(given, {all * N + kRowsBehind, length});
    std::memset(data<A>(bias) + all * N * length, 0, kRowsBehind * length * sizeof(A));
    parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const A* from = data<A>(values) + m * N * N;
        A* to = data<A>(bias) + m * N * length;
        for (int64_t i = 0; i < N; ++i) std::memset(to + i * length + N, 0, (length - N) * sizeof(A));
        if (!by_key) {
          for (int64_t i = 0; i < N; ++i) std::memcpy(to + i * length, from + i * N, N * sizeof(A));
        } else {  // transposed, in pieces that stay in the nearest cache
          for (int64_t first = 0; first < N; first += kTableUnit)
            for (int64_t j = 0; j < N; ++j)
              for (int64_t i = first; i < std::min(N, first + kTableUnit); ++i) to[j * length + i] = from[i * N + j];
        }
      }
    });
    if (wants_grad) {
      grad = empty_of<A>(given, {all * N, length});
      std::memset(data<A>(grad), 0, grad.numel() * sizeof(A));
    }
  }

  void set(Head<T>& head, const Shape& s, int64_t image, int64_t h) const {
    if (turns) {
      const A* cosine = data<A>(table) + (images == 1 ? 0 : image) * heads * dims * length;
      const int64_t first = s.qk_cut[h];
      head.turn = {row.data() + first, other.data() + first, cosine, cosine + images * heads * dims * length, length};
    }
    if (adds) {
      const int64_t at = (image % biases * bias_heads + (bias_heads == 1 ? 0 : h)) * s.N * length;
      head.bias = {data<A>(bias) + at, nullptr, length};
    }
  }
  // The same, for a backward pass that adds the bias's gradient up.
  void set_with_grad(Head<T>& head, const Shape& s, int64_t image, int64_t h) const {
    set(head, s, image, h);
    head.bias.grad = data<A>(grad) + (head.bias.values - data<A>(bias));
  }
  Tensor gradient(const Shape& s, const Tensor& like) const {
    Tensor wide = empty_of<A>(like, {biases, bias_heads, s.N, s.N});
    for_rows(biases * bias_heads * s.N, s.N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memcpy(data<A>(wide) + i * s.N, data<A>(grad) + i * length, s.N * sizeof(A));
    });
    return cast(wide, like.scalar_type());
  }
};

constexpr std::align_val_t kLine{64};
struct Aligned {
  void operator()(void* p) const { ::operator delete[](p, kLine); }
};

// Runs work(image, head, scratch) for all pairs of these images, in parallel; images that lie a multiple of `step` apart
// (0: none do) one after the other.
template <class T, class F>
void for_heads(const Shape& s, Range images, int64_t step, F&& work) {
  int64_t wide_qk = 0, wide_v = 0;
  for (int64_t h = 0; h < s.heads; ++h) {
    wide_qk = std::max(wide_qk, s.qk_cut[h + 1] - s.qk_cut[h]);
    wide_v = std::max(wide_v, s.v_cut[h + 1] - s.v_cut[h]);
  }
  Head<T> widest{};
  widest.tokens = s.N, widest.qk_dims = wide_qk, widest.v_dims = wide_v;
  const int64_t size = loops<T>().attention_scratch(widest);
  const int64_t apart = step == 0 ? images.size() : step;
  parallel_for(0, std::min(apart, images.size()) * s.heads, 1, [&](int64_t begin, int64_t end) {
    // On a cache line, else every load of a whole register touches two.
    std::unique_ptr<Accumulator<T>[], Aligned> scratch(new (kLine) Accumulator<T>[size]);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t image = images.begin + i / s.heads; image < images.end; image += apart)
        work(image, i % s.heads, scratch.get());
  });
}

constexpr const char* kTypes =
    "attention: weights and biases must share one dtype, that of x or float32 beside bfloat16 and float16";
constexpr const char* kBiasShape = "attention: qkv_bias must be [3A]";

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Outputs forward(Tensor x, Tensor qkv_weight, const MaybeTensor& qkv_bias, Tensor proj_weight,
                const MaybeTensor& proj_bias, const Tensor& qk, const Tensor& qk_offsets, const Tensor& v,
                const Tensor& v_offsets, double scale, bool recompute, const Given& given) {
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
    const Positions<T> positions(s, x, given, true, false);
    for_shares(s.B, 1, [&](Share share) {
      const Range images = share.of(s.B, 1), tokens{images.begin * s.N, images.end * s.N};
      project(qkv, wqkv, x, s, tokens);
      for_heads<T>(s, images, 0, [&](int64_t image, int64_t h, Accumulator<T>* scratch) {
        Head<T> head = head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads),
                               data<Accumulator<T>>(stats));
        positions.set(head, s, image, h);
        loops<T>().attention_forward(head, scratch);
      });
      // out [M, Dout] = heads^T Wproj[:, kept]^T
      multiply_into(rows_of(out, tokens, s.Dout), columns_of(heads, s.V(), tokens, s.M, true),
                    matrix(wproj, s.Dout, s.V(), true));
      add_bias<T>(out, out_bias, tokens, s.Dout);
    });
    return std::make_tuple(cast(out, type), recompute ? empty(x, {0, s.M}) : qkv, heads, stats);
  });
}

Outputs attention(Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias, Tensor proj_weight, MaybeTensor proj_bias, Tensor qk,
                  Tensor qk_offsets, Tensor v, Tensor v_offsets, double scale, bool recompute) {
  return forward(x, qkv_weight, qkv_bias, proj_weight, proj_bias, qk, qk_offsets, v, v_offsets, scale, recompute, {});
}

Outputs attention_with_positions(Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias, Tensor proj_weight,
                                 MaybeTensor proj_bias, MaybeTensor bias, Tensor qk, Tensor qk_offsets, Tensor v,
                                 Tensor v_offsets, MaybeTensor turn, MaybeTensor partner, double scale,
                                 bool recompute) {
  return forward(x, qkv_weight, qkv_bias, proj_weight, proj_bias, qk, qk_offsets, v, v_offsets, scale, recompute,
                 {bias, turn, partner});
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients backward(Tensor grad, Tensor x, Tensor qkv_weight, const MaybeTensor& qkv_bias, Tensor proj_weight,
                   const Tensor& qk, const Tensor& qk_offsets, const Tensor& v, const Tensor& v_offsets, double scale,
                   Tensor qkv, const Tensor& heads, const Tensor& stats, int64_t needs, const Given& given) {
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
    Tensor grad_proj = none(), grad_proj_bias = none(), grad_bias = none();
    const bool adds_up = needs & kNeedScoreBias, inner = needs & (kNeedX | kNeedWeight1 | kNeedBias1) || adds_up;
    Tensor wide, grad_qkv;
    if (inner) {
      const bool again = qkv.size(0) != s.S();
      if (again) qkv = empty(x, {s.S(), s.M});
      Tensor grad_heads = empty(x, {s.V(), s.M});
      grad_qkv = empty(x, {s.S(), s.M});
      if (needs & kNeedX) wide = empty(x, {s.B, s.N, s.D});
      const Tensor wqkv = pack_qkv<T>(qkv_weight, s), wproj = pack_proj<T>(proj_weight, s);
      const auto bias = pack_bias<T>(qkv_bias, s.rows, 3 * s.A, kBiasShape);
      const Positions<T> positions(s, x, given, false, adds_up);
      // What images add to one gradient is added in their order, so these are not shared out.
      const int64_t unit = adds_up ? std::max<int64_t>(s.B, 1) : 1;
      for_shares(s.B, unit, [&](Share share) {
        const Range images = share.of(s.B, unit), tokens{images.begin * s.N, images.end * s.N};
        if (again) project(qkv, wqkv, x, s, tokens);
        // dheads [V, M] = Wproj[:, kept]^T grad^T
        multiply_into(columns_of(grad_heads, s.V(), tokens, s.M), matrix(wproj, s.Dout, s.V(), true),
                      rows_of(grad, tokens, s.Dout, true));
        for_heads<T>(s, images, adds_up ? positions.biases : 0, [&](int64_t image, int64_t h, A* scratch) {
          Head<T> head = head_of(s, image, h, scale, data<T>(qkv), bias.data(), data<T>(heads), data<A>(stats));
          head.grad_out = data<T>(grad_heads) + (head.out - data<T>(heads));
          head.grad_q = data<T>(grad_qkv) + (head.q - data<T>(qkv));
          head.grad_k = data<T>(grad_qkv) + (head.k - data<T>(qkv));
          head.grad_v = data<T>(grad_qkv) + (head.v - data<T>(qkv));
          adds_up ? positions.set_with_grad(head, s, image, h) : positions.set(head, s, image, h);
          loops<T>().attention_backward(head, scratch);
        });
        // dx [M, D] = dqkv^T Wqkv[kept]
        if (needs & kNeedX)
          multiply_into(rows_of(wide, tokens, s.D), columns_of(grad_qkv, s.S(), tokens, s.M, true), wqkv);
      });
      if (needs & kNeedX) grad_x = cast(wide, type);
      if (adds_up) grad_bias = positions.gradient(s, *given.bias);
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
    return std::make_tuple(grad_x, grad_qkv_weight, grad_qkv_bias, grad_proj, grad_proj_bias, grad_bias);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad, Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias, Tensor proj_weight, Tensor qk, Tensor qk_offsets,
    Tensor v, Tensor v_offsets, double scale, Tensor qkv, Tensor heads, Tensor stats, int64_t needs) {
  const Gradients found = backward(grad, x, qkv_weight, qkv_bias, proj_weight, qk, qk_offsets, v, v_offsets, scale, qkv,
                                   heads, stats, needs, {});
  return {std::get<0>(found), std::get<1>(found), std::get<2>(found), std::get<3>(found), std::get<4>(found)};
}

Gradients attention_with_positions_backward(Tensor grad, Tensor x, Tensor qkv_weight, MaybeTensor qkv_bias,
                                            Tensor proj_weight, MaybeTensor bias, Tensor qk, Tensor qk_offsets,
                                            Tensor v, Tensor v_offsets, MaybeTensor turn, MaybeTensor partner,
                                            double scale, Tensor qkv, Tensor heads, Tensor stats, int64_t needs) {
  return backward(grad, x, qkv_weight, qkv_bias, proj_weight, qk, qk_offsets, v, v_offsets, scale, qkv, heads, stats,
                  needs, {bias, turn, partner});
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_with_positions", TORCH_BOX(&attention_with_positions));
  m.impl("attention_with_positions_backward", TORCH_BOX(&attention_with_positions_backward));
}

}  // namespace
}  // namespace uvc
