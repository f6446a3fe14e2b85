// AdamW that passes over runs of rows at rest: pruned, zero in weights and averages. Of the others every bit is that of torch's
// fused AdamW, so products and sums are rounded apart but where torch fuses them, and subnormal numbers stay numbers.
#include "cpu/host.h"

#include <cmath>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace uvc {
namespace {

enum Row : uint8_t { kStepped = 0, kAtRest = 1, kRemoved = 2 };  // removed: to be looked at

struct Coefficients {
  float decay, lerp, beta2, square, root, eps, step;
};

// m <- m + (1 - beta1) (g - m),  v <- beta2 v + (1 - beta2) g g,  w <- (1 - lr decay) w - step m / (sqrt(v) / root + eps)
inline __attribute__((always_inline)) void update(float* __restrict w, const float* __restrict g,
                                                  float* __restrict m, float* __restrict v, int64_t n,
                                                  const Coefficients c) {
  for (int64_t i = 0; i < n; ++i) {
    const float first = std::fma(c.lerp, g[i] - m[i], m[i]);
    const float second = std::fma(c.square * g[i], g[i], v[i] * c.beta2);
    const float root = std::sqrt(second) / c.root + c.eps;
    w[i] = w[i] * c.decay + c.step * first / root;
    m[i] = first, v[i] = second;
  }
}
void update_plain(float* w, const float* g, float* m, float* v, int64_t n, const Coefficients& c) {
  update(w, g, m, v, n, c);
}
using Update = decltype(&update_plain);

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("avx2,fma"))) void update_avx2(float* w, const float* g, float* m, float* v, int64_t n,
                                                     const Coefficients& c) {
  update(w, g, m, v, n, c);
}
__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void update_avx512(
    float* w, const float* g, float* m, float* v, int64_t n, const Coefficients& c) {
  update(w, g, m, v, n, c);
}
Update chosen_update() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return update_plain;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  return wide ? update_avx512 : update_avx2;
}
#else
Update chosen_update() { return update_plain; }
#endif

bool all_zero(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p + i, sizeof bits);
    if (bits != 0) return false;
  }
  return true;
}

// Rows at rest between two others are passed over where they are this many floats together, two pages. A shorter gap is
// stepped as well, which leaves it as it is and costs less: the processor foresees streams, not gaps.
constexpr int64_t kGap = 2048;

struct Piece {
  size_t tensor;
  int64_t begin, end;
};

void adamw(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> rows, std::vector<double> steps, double lr, double beta1,
           double beta2, double weight_decay, double eps) {
  const size_t count = weights.size();
  check(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && rows.size() == count &&
            steps.size() == count,
        "adamw: lists must be equally long");
  std::vector<Piece> pieces;
  std::vector<Coefficients> coefficients;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& w = weights[i];
    for (const std::vector<Tensor>* list : {&weights, &grads, &exp_avgs, &exp_avg_sqs}) {
      const Tensor& t = (*list)[i];
      check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 2 && t.size(0) == w.size(0) &&
                t.size(1) == w.size(1),
            "adamw: weights, gradients and averages must be contiguous float32 matrices of one shape");
    }
    check(rows[i].scalar_type() == ScalarType::Byte && rows[i].is_contiguous() && rows[i].numel() == w.size(0),
          "adamw: rows must be uint8, one per row of the weight");
    // in double, as torch has them
    const double first = 1 - std::pow(beta1, steps[i]), second = 1 - std::pow(beta2, steps[i]);
    coefficients.push_back({float(1 - lr * weight_decay), float(1 - beta1), float(beta2), float(1 - beta2),
                            float(std::sqrt(second)), float(eps), float(-(lr / first))});
    const int64_t unit = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, w.size(1)));
    for (int64_t at = 0; at < w.size(0); at += unit) pieces.push_back({i, at, std::min(w.size(0), at + unit)});
  }
  static const Update step = chosen_update();
  // torch's own, which does not flush: its AdamW keeps subnormal numbers
  torch::stable::parallel_for(0, pieces.size(), 4, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const auto [i, begin, end] = pieces[p];
      const int64_t n = weights[i].size(1);
      uint8_t* row = data<uint8_t>(rows[i]);
      float *w = data<float>(weights[i]), *m = data<float>(exp_avgs[i]), *v = data<float>(exp_avg_sqs[i]);
      const float* g = data<float>(grads[i]);
      for (int64_t r = begin; r < end; ++r)
        if (row[r] == kRemoved && all_zero(w + r * n, n) && all_zero(m + r * n, n) && all_zero(v + r * n, n))
          row[r] = kAtRest;
      auto skip = [&, end = end](int64_t r) {
        while (r < end && row[r] == kAtRest) ++r;
        return r;
      };
      for (int64_t r = skip(begin); r < end;) {
        int64_t stop = r, next = r;
        do {
          for (stop = next; stop < end && row[stop] != kAtRest;) ++stop;
          next = skip(stop);
        } while (next < end && (next - stop) * n < kGap);
        step(w + r * n, g + r * n, m + r * n, v + r * n, (stop - r) * n, coefficients[i]);
        r = next;
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, CPU, m) { m.impl("adamw", TORCH_BOX(&adamw)); }

}  // namespace
}  // namespace uvc
