// Subnormal numbers count as zero while a kernel computes: those that it reads and those that would come out.
//
// Most are born in the kernels' own arithmetic, and not in one place: the softmax's weights of padding and of keys far
// below the largest, the tails of GELU, gradients times either. Intel cores pay about 150 cycles for each one that is
// multiplied. Not letting them be born would cost a comparison in every loop, and leave those that come in, so the
// processor's mode does it, as in vendor libraries. A result changes by less than the smallest normal number times the
// number of terms of its sum.
//
// The mode belongs to a thread, and a new thread inherits it: so it is set inside each piece of work (`parallel_for`)
// and never while torch may start threads, which would keep it. The vendor's products run in the caller's own mode; of what
// the kernels hand them nothing is subnormal.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace uvc {

// The mode of the calling thread for as long as this lives, also when an exception ends it.
class FlushDenormals {
 public:
  FlushDenormals() : before_(get()) { set(before_ | kFlush); }
  ~FlushDenormals() {
    // Not `before_` as it was: flags of exceptions that were raised meanwhile stay raised.
    set((get() & ~kFlush) | (before_ & kFlush));
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = uint32_t;
  static constexpr Mode kFlush = 0x8000 | 0x0040;  // of results (FTZ), of operands (DAZ)
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = Mode(1) << 24;  // FZ: of operands and results
  static Mode get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = uint32_t;
  static constexpr Mode kFlush = 0;
  static Mode get() { return 0; }
  static void set(Mode) {}
#endif
  const Mode before_;
};

// work(begin, end) over pieces of begin..end, on torch's threads, with subnormal numbers flushed on each.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& work) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    const FlushDenormals flush;
    work(from, to);
  });
}

}  // namespace uvc
