// Includes the loops once per instruction set, and picks one. Standard headers stand before the first `pragma`, so
// that no shared inline function is ever compiled for an instruction set that the machine may lack.
#include "cpu/loops.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define UVC_X86 1
#include <immintrin.h>
#else
#define UVC_X86 0
#endif

// 32 registers (AVX-512, NEON) hold a 6 x 4 tile of accumulators, 16 registers a 6 x 2 tile.
#if UVC_X86
// Its loops serve bfloat16 alone; what has nothing to do with bfloat16 is the same in the next one.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#define UVC_ISA avx512_bf16
#define UVC_VECTOR_BYTES 64
#define UVC_TILE 4
#define UVC_PAIRS 1
#include "cpu/loops.inc"
#undef UVC_ISA
#undef UVC_VECTOR_BYTES
#undef UVC_TILE
#undef UVC_PAIRS
#pragma GCC pop_options
#define UVC_PAIRS 0

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define UVC_ISA avx512
#define UVC_VECTOR_BYTES 64
#define UVC_TILE 4
#include "cpu/loops.inc"
#undef UVC_ISA
#undef UVC_VECTOR_BYTES
#undef UVC_TILE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define UVC_ISA avx2
#define UVC_VECTOR_BYTES 32
#define UVC_TILE 2
#include "cpu/loops.inc"
#undef UVC_ISA
#undef UVC_VECTOR_BYTES
#undef UVC_TILE
#pragma GCC pop_options
#endif

#ifndef UVC_PAIRS
#define UVC_PAIRS 0
#endif
#define UVC_ISA baseline
#define UVC_VECTOR_BYTES 16
#if defined(__aarch64__)
#define UVC_TILE 4
#else
#define UVC_TILE 2
#endif
#include "cpu/loops.inc"

namespace uvc {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

Isa best_isa() {
  Isa best = Isa::kBaseline;
#if UVC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::kAvx512;
  if (best == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::kAvx512Bf16;
#endif
  const char* given = std::getenv("UVC_CPU_ISA");
  const std::string wish = given == nullptr ? "" : given;
  if (wish == "baseline") best = Isa::kBaseline;
  if (wish == "avx2") best = std::min(best, Isa::kAvx2);
  if (wish == "avx512") best = std::min(best, Isa::kAvx512);
  return best;
}

Isa chosen_isa() {
  static const Isa isa = best_isa();
  return isa;
}

bool choose_own_products() {
  const char* given = std::getenv("UVC_CPU_PRODUCTS");
  const std::string wish = given == nullptr ? "" : given;
  if (wish == "own" || wish == "vendor") return wish == "own";
#if UVC_X86
  return __builtin_cpu_is("amd") && chosen_isa() >= Isa::kAvx512;
#else
  return false;
#endif
}

}  // namespace

bool own_products() {
  static const bool own = choose_own_products();
  return own;
}

const char* instruction_set() {
  switch (chosen_isa()) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

template <class T>
const Loops<T>& loops() {
#if UVC_X86
  if constexpr (std::is_same_v<T, Bf16>)
    if (chosen_isa() == Isa::kAvx512Bf16) return avx512_bf16::table<T>;
  if (chosen_isa() >= Isa::kAvx512) return avx512::table<T>;
  if (chosen_isa() == Isa::kAvx2) return avx2::table<T>;
#endif
  return baseline::table<T>;
}

template <class Out, class In>
const Copies<Out, In>& copies() {
#if UVC_X86
  if (chosen_isa() >= Isa::kAvx512) return avx512::copy_table<Out, In>;
  if (chosen_isa() == Isa::kAvx2) return avx2::copy_table<Out, In>;
#endif
  return baseline::copy_table<Out, In>;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();
template const Loops<Bf16>& loops<Bf16>();
#define UVC_COPIES_FROM(In)                                \
  template const Copies<float, In>& copies<float, In>();   \
  template const Copies<double, In>& copies<double, In>(); \
  template const Copies<Bf16, In>& copies<Bf16, In>();     \
  template const Copies<F16, In>& copies<F16, In>();
UVC_COPIES_FROM(float)
UVC_COPIES_FROM(double)
UVC_COPIES_FROM(Bf16)
UVC_COPIES_FROM(F16)
#undef UVC_COPIES_FROM

}  // namespace uvc
