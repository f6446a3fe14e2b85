// The vectorised inner loops of the CPU kernels, built once per instruction set and chosen at run time.
// Everything is channel-major: a row is one channel (q/k dim, v dim, neuron), its entries are the tokens. So lanes
// run over tokens, and ragged heads cost nothing.
#pragma once

#include <cstdint>

namespace uvc {

struct Bf16 {
  uint16_t bits;
};
// IEEE half precision: storage only, the arithmetic on it is float's.
struct F16 {
  uint16_t bits;
};

// Accumulators and statistics: float for float and bfloat16, double for double.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

enum class Activation : int64_t { kGelu, kGeluTanh, kRelu, kSilu, kQuickGelu };

// Tables that the loops read have rows of a multiple of kTableUnit entries, whole registers of every instruction set, and
// kRowsBehind rows more than are used.
constexpr int64_t kTableUnit = 16, kRowsBehind = 8;

// Rotary positions of q and k: channel d becomes x[d] * cosine[row[d]] + x[other[d]] * sine[row[d]]. row: null where nothing
// is turned; other: the channel that d is turned with; rows of both tables have `length` entries, one for each token.
template <class A>
struct Turn {
  const int32_t *row, *other;
  const A *cosine, *sine;
  int64_t length;
};

// What is added to the scores, or null: rows of `length` entries, one for each key (forward) or each query (backward), whose
// entries are the queries or the keys. grad: the gradient is added to it, by query; or null.
template <class A>
struct ScoreBias {
  const A* values;
  A* grad;
  int64_t length;
};

// One head of one image. q, k, v, out point at (first channel, first token); a step of `stride` is one channel.
template <class T>
struct Head {
  int64_t tokens, stride, qk_dims, v_dims;
  Accumulator<T> scale;
  const T *q, *k, *v;
  const Accumulator<T> *q_bias, *k_bias, *v_bias;  // one value per channel
  T* out;                                          // forward only
  Accumulator<T>*top, *inverse;  // [tokens] each: largest score, and 1 / sum of exp(score - largest)
  const T* grad_out;                               // backward only, like the next three
  T *grad_q, *grad_k, *grad_v;
  Turn<Accumulator<T>> turn;
  ScoreBias<Accumulator<T>> bias;
};

// out [rows, columns] = a [rows, depth] b [depth, columns]. Columns of out stand next to one another, and so do the columns, or
// the rows, of b.
template <class A>
struct Product {
  int64_t rows, depth, columns;
  const A* a;
  int64_t a_row, a_column;  // how far apart rows, and columns, stand
  const A* b;
  int64_t b_row, b_column;
  A* out;
  int64_t out_row;
};
constexpr int64_t kProductColumns = 48;  // a multiple of the columns that `multiply` takes at a time

template <class T>
struct Loops {
  using A = Accumulator<T>;
  // Entries of scratch that one call of attention_forward / attention_backward needs.
  int64_t (*attention_scratch)(const Head<T>& head);
  void (*attention_forward)(const Head<T>& head, A* scratch);
  void (*attention_backward)(const Head<T>& head, A* scratch);
  // y[i] = act(u[i] + bias)
  void (*activate)(Activation act, const T* u, A bias, T* y, int64_t n);
  // y[i] = act(u[i] + bias);  g[i] <- g[i] * act'(u[i] + bias);  returns the sum of the new g
  A (*activate_backward)(Activation act, const T* u, A bias, T* y, T* g, int64_t n);
  // y[i] = act(gate[i] + gate_bias) * (u[i] + bias)
  void (*activate_gated)(Activation act, const T* gate, A gate_bias, const T* u, A bias, T* y, int64_t n);
  // y as above; grad_gate[i] and g[i] <- the gradients of gate and u, from g, that of y; their sums
  void (*activate_gated_backward)(Activation act, const T* gate, A gate_bias, const T* u, A bias, T* y, T* g,
                                  T* grad_gate, int64_t n, A* gate_sum, A* sum);
  A (*sum)(const T* p, int64_t n);
  A (*dot)(const T* a, const T* b, int64_t n);
  // total[i] += a[i] * b[i]
  void (*add_product)(const T* a, const T* b, A* total, int64_t n);
  // total[i] = sum over the rows r of a[r * stride + i], for n columns i
  void (*sum_columns)(const T* a, int64_t rows, int64_t stride, A* total, int64_t n);
  // p[r * n + i] <- p[r * n + i] + q[i] for every row r
  void (*add_to_rows)(T* p, const A* q, int64_t rows, int64_t n);
  // p[i] <- p[i] * q[i], zero where q[i] is zero
  void (*multiply_row)(T* p, const A* q, int64_t n);
  // The product, for some rows and some columns of out.
  void (*multiply)(const Product<A>& product, int64_t row, int64_t row_end, int64_t column, int64_t column_end);
};

// Copies that choose and cast. An index of -1 gives zeros.
template <class Out, class In>
struct Copies {
  // out[i] = in[i]
  void (*row)(const In* in, Out* out, int64_t n);
  // out[r * n + j] = in[r * width + index[j]] for `rows` rows r and n columns j
  void (*columns)(const In* in, int64_t width, const int32_t* index, Out* out, int64_t n, int64_t rows);
  // The same where n columns are chosen in their order: bit i % 64 of chosen[i / 64] is set if column i is.
  void (*compress)(const In* in, int64_t width, const uint64_t* chosen, Out* out, int64_t n, int64_t rows);
  // The way back: column i of `width` is the next one of n if it is chosen, else zero.
  void (*expand)(const In* in, int64_t n, const uint64_t* chosen, Out* out, int64_t width, int64_t rows);
};

// The loops for the best instruction set of this machine. UVC_CPU_ISA=avx512|avx2|baseline (avx512: without its products
// of bfloat16 pairs) lowers the choice; it is read once, at the first call.
template <class T>
const Loops<T>& loops();
template <class Out, class In>
const Copies<Out, In>& copies();
// Its name, as UVC_CPU_ISA has it; avx512_bf16: with the products of bfloat16 pairs.
const char* instruction_set();
// Whether products of float32 are ours, not the vendor's. UVC_CPU_PRODUCTS=own|vendor decides, read once; else they are
// where they are known to be faster, on AMD's processors with AVX-512.
bool own_products();

}  // namespace uvc
