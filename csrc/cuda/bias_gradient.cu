// The gradient of a bias of the scores: of every tile the sum over the images that share it, always in one order.
//   dbias[p] = sum over images i = p, p + P, .. of dS,   dS as in attention_backward.cu
// A warp owns 32 queries and 32 keys of one head's bias and goes through these images; what it multiplies it reads from
// device memory itself, so that no warp waits for another. It runs only where the bias is trained.
#include "cuda/attention.h"

namespace uvc::UVC_BUILD {
namespace {

constexpr int kGradientWarps = 4, kSide = 2;  // tiles of 16 along each side of what a warp owns

// The sums of products of 32 rows and 32 columns over `width` dims.
template <class T>
__device__ inline void multiply_tokens(Sums<T> (&sums)[kSide][kSide][2], const T* a, int64_t a_stride, int first,
                                       const T* b, int64_t b_stride, int start, int N, int width) {
#pragma unroll 1
  for (int dim = 0; dim < width; dim += 16) {
    A16<T> rows[kSide];
#pragma unroll
    for (int r = 0; r < kSide; ++r) rows[r] = fetch(a, a_stride, first + 16 * r, N, width, dim);
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      const A16<T> tokens = fetch(b, b_stride, start + 16 * c, N, width, dim);
      const B16<T> columns = {{{tokens.at[0], tokens.at[2]}, {tokens.at[1], tokens.at[3]}}};
#pragma unroll
      for (int r = 0; r < kSide; ++r) multiply(sums[r][c], rows[r], columns);
    }
  }
}

template <class T, class G>
__global__ void __launch_bounds__(kGradientWarps * WARP, 1)
    bias_gradient_kernel(const Call<T> call, const Added<T> added, G* grad_bias, int all_heads, int images) {
  using A = Wide<T>;
  const int N = call.tokens, lane = lane_index(), across = (N + 16 * kSide - 1) / (16 * kSide), tiles = across * across;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kGradientWarps + warp_index();
  const int tile = static_cast<int>(mine % tiles), pair = static_cast<int>(mine / tiles);
  if (pair >= added.biases * call.count) return;
  const int first = tile / across * 16 * kSide, start = tile % across * 16 * kSide;
  A total[kSide][kSide][8] = {};
#pragma unroll 1
  for (int image = pair / call.count; image < images; image += added.biases) {
    const int of_image = image * call.count + pair % call.count;
    const Head<T> head(call, of_image);
    const Bias<T, true> bias(call, added, of_image);
    Sums<T> s[kSide][kSide][2], dp[kSide][kSide][2];
    multiply_tokens(s, head.q(), call.qkv_stride, first, head.k(), call.qkv_stride, start, N, head.qk_width);
    multiply_tokens(dp, head.grad_out(), call.heads_stride, first, head.v(), call.qkv_stride, start, N, head.v_width);
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
      A product[2], top[2], inverse[2];
      products_of_rows<T, 128, 1>(product, head, first + 16 * r, N);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first + 16 * r + 8 * half + lane / 4;
        top[half] = token < N ? head.top()[token] : 0, inverse[half] = token < N ? head.inverse()[token] : 0;
      }
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        bias.add(s[r][c], bias.of(first + 16 * r, start + 16 * c));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2;
          const A p = power_of_two(multiply_add(s[r][c][i / 4].at[i % 4], A(kLog2E), -top[half])) * inverse[half];
          total[r][c][i] += p * (dp[r][c][i / 4].at[i % 4] - product[half]);
        }
      }
    }
  }
  const int64_t place = static_cast<int64_t>(pair / call.count) * all_heads + added.order[call.first + pair % call.count];
#pragma unroll
  for (int i = 0; i < 8 * kSide * kSide; ++i) {
    const int r = i / (8 * kSide), c = i / 8 % kSide, in = i % 8;
    const int token = first + 16 * r + lane / 4 + 8 * (in / 2 % 2);
    const int key = start + 16 * c + 2 * (lane % 4) + 8 * (in / 4) + in % 2;
    if (token < N && key < N)
      grad_bias[(place * N + token) * N + key] = narrow<G>(static_cast<Wide<G>>(total[r][c][in]));
  }
}

void bias_gradient(Tensor qkv, Tensor heads, Tensor grad_heads, Tensor top, Tensor inverse, Tensor table,
                   std::vector<int64_t> counts, int64_t tokens, double scale, Tensor bias, Tensor order, Tensor grad_bias) {
  const char* op = "cuda_bias_gradient";
  check(grad_heads.is_contiguous() && grad_heads.scalar_type() == heads.scalar_type() &&
            grad_heads.numel() == heads.numel() && grad_heads.get_device_index() == heads.get_device_index() &&
            aligned(grad_heads.mutable_data_ptr()),
        std::string(op) + ": the gradient of heads must be contiguous, start at 16 bytes, and be like heads");
  check(grad_bias.is_contiguous() && grad_bias.dim() == 4 && grad_bias.size(0) == bias.size(0) &&
            grad_bias.size(1) == order.numel() && grad_bias.size(2) == tokens && grad_bias.size(3) == tokens &&
            grad_bias.get_device_index() == bias.get_device_index(),
        std::string(op) + ": the gradient of the bias must be contiguous, [biases, heads, tokens, tokens]");
  const Device device(qkv);
  const auto run = [&]<class T, int, bool BIASED>(Call<T> call, const Added<T>& added, int64_t pairs) {
    call.grad_heads = data<T>(grad_heads);
    const int64_t across = (tokens + 16 * kSide - 1) / (16 * kSide), warps = added.biases * call.count * across * across;
    for_type(grad_bias, op, [&]<class G>() {
      device.launch(op, &bias_gradient_kernel<T, G>, (warps + kGradientWarps - 1) / kGradientWarps, kGradientWarps * WARP, 0,
                    call, added, data<G>(grad_bias), static_cast<int>(grad_bias.size(1)), static_cast<int>(pairs / call.count));
    });
  };
  for_widths(op, qkv, table, counts, tokens, scale, heads, top, inverse, bias, order, run);
}

STABLE_TORCH_LIBRARY_IMPL(uvc_kernels, UVC_DISPATCH_KEY, m) {
  m.impl("cuda_bias_gradient", TORCH_BOX(&bias_gradient));
}

}  // namespace
}  // namespace uvc::UVC_BUILD
