// CUDA's built-ins for a host that runs kernels: every thread of a block is a coroutine on one thread of the running->
// A coroutine runs until it meets the others of its warp or block and then hands over to its neighbour. Blocks of odd
// number run their threads in falling order: a result that depends on the order, for want of a barrier, shows.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __host__
#define __grid_constant__
#define __device__
#define __launch_bounds__(...)

namespace uvc::host {

struct Index {
  unsigned x;
};
inline constinit thread_local Index threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

[[noreturn]] inline void stuck(const char* why) {
  std::fprintf(stderr, "uvc_kernels: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  std::abort();
}

// A stack, and where its owner stopped.
class Coroutine {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  // Runs `body` when it is switched to first; `body` never returns.
  void start(void (*body)()) {
    if (!stack_) stack_.reset(new char[kBytes]);
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack_.get() + kBytes) & ~uintptr_t{15});
    *--top = nullptr;                         // the return address of `body`, which keeps its stack aligned
    *--top = reinterpret_cast<void*>(body);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    at_ = top;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack_.get();
    at_.uc_stack.ss_size = kBytes;
    makecontext(&at_, body, 0);
#endif
  }
  void switch_to(Coroutine& next) {
#ifdef __x86_64__
    exchange(&at_, next.at_);
#else
    swapcontext(&at_, &next.at_);
#endif
  }

 private:
#ifdef __x86_64__
  // Saves what a call must keep on this stack, and goes on with what was saved on the other.
  __attribute__((naked, noinline)) static void exchange(void** from, void* to) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
        "mov %rsp, (%rdi)\n\t"
        "mov %rsi, %rsp\n\t"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n\t"
        "ret");
  }
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
  std::unique_ptr<char[]> stack_;
};

inline bool asked(const char* variable, const char* value) {
  const char* found = std::getenv(variable);
  return found != nullptr && std::strcmp(found, value) == 0;
}

// The GPU that is current, as tests ask for it.
inline int device() {
  const char* found = std::getenv("UVC_HOST_DEVICE");
  return found == nullptr ? 0 : std::atoi(found);
}

// The multiprocessors of a GPU: an H100's, or as many as tests ask for.
inline int processors() {
  const char* found = std::getenv("UVC_HOST_PROCESSORS");
  return found == nullptr ? 132 : std::atoi(found);
}

// How much shared memory each kernel may ask for on each GPU; a slow one lets other threads come in between.
class Driver {
 public:
  std::atomic<int64_t> calls{0};

  void allow(const void* kernel, int device, int64_t bytes) {
    ++calls;
    const bool slow = asked("UVC_HOST_DRIVER", "slow");
    const auto wait = [&] { std::this_thread::sleep_for(std::chrono::milliseconds(slow ? 100 : 0)); };
    wait();
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      most_[{kernel, device}] = bytes;
    }
    wait();
  }
  int64_t allowed(const void* kernel, int device) {
    const std::lock_guard<std::mutex> hold(mutex_);
    return most_[{kernel, device}];
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, int64_t> most_;
};
inline Driver driver;

// One block after the other.
class Machine {
 public:
  unsigned char* shared = nullptr;
  // What tests ask for: copies land when they are started, and blocks run from the last to the first; float32 is multiplied by the shuffles that a GPU runs.
  const bool early = asked("UVC_HOST_COPIES", "early"), shuffles = asked("UVC_HOST_PRODUCTS", "shuffles");

  template <class F>
  void run(unsigned block, unsigned blocks, int threads, size_t bytes, F&& kernel) {
    if (threads % 32 != 0) stuck("a block is not made of whole warps");
    // Memory of exactly this size, so that a sanitizer sees what lies outside; every float in it is NaN.
    std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
    shared = memory.get();
    blockIdx = {block}, gridDim = {blocks}, blockDim = {static_cast<unsigned>(threads)};
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    warps_.assign(threads / 32, {});
    alive_ = threads, step_ = block % 2 ? -1 : 1, barrier_ = {}, idle_ = 0;
    work_ = [](void* f) { (*static_cast<F*>(f))(); }, context_ = &kernel;
    for (int i = 0; i < threads; ++i) {
      fibers_[i]->done = false;
      fibers_[i]->coroutine.start(&Machine::body);
    }
    current_ = step_ > 0 ? 0 : threads - 1;
    threadIdx = {static_cast<unsigned>(current_)};
    main_.switch_to(fibers_[current_]->coroutine);
    shared = nullptr;
  }

  // Every lane of the warp hands over a pointer; the last to arrive runs `work` on all of them, then all go on.
  template <class F>
  void meet_warp(void* mine, F&& work) {
    Meeting& warp = warps_[current_ / 32];
    warp.lanes[current_ % 32] = mine;
    if (!arrive(warp, 32, [&] { work(warp.lanes); })) wait(warp, current_ / 32 * 32, 32);
  }
  void meet_block() {
    if (!arrive(barrier_, alive_, [] {})) wait(barrier_, 0, static_cast<int>(blockDim.x));
  }

  void copy16(void* to, const void* from, bool there) {
    const Copy copy{to, from, there};
    if (early)
      make(copy);
    else
      fibers_[current_]->copies.push_back(copy);
  }
  void commit_copies() { fibers_[current_]->copies.push_back({}); }
  // A copy is made as late as it may be, or at once where `early`: a GPU may do either.
  void copies_arrived(int left) {
    std::vector<Copy>& copies = fibers_[current_]->copies;
    size_t keep = copies.size();
    while (keep > 0 && left >= 0) left -= copies[--keep].to == nullptr;
    if (left < 0) ++keep;
    for (size_t i = 0; i < keep; ++i)
      if (copies[i].to != nullptr) make(copies[i]);
    copies.erase(copies.begin(), copies.begin() + keep);
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    bool there;
  };
  static void make(const Copy& copy) {
    if (copy.there)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  struct Fiber {
    Coroutine coroutine;
    std::vector<Copy> copies;
    bool done = true;
  };
  struct Meeting {
    int arrived = 0;
    int64_t count = 0;
    void* lanes[32];
  };

  template <class F>
  bool arrive(Meeting& meeting, int expected, F&& work) {
    if (++meeting.arrived < expected) return false;
    work();
    meeting.arrived = 0, ++meeting.count, idle_ = 0;
    return true;
  }
  void wait(Meeting& meeting, int first, int size) {
    for (const int64_t count = meeting.count; meeting.count == count;) hand_over(first, size);
  }
  // To the next thread among `size` from `first` on that has not ended.
  void hand_over(int first, int size) {
    if (++idle_ > 4096) stuck("a barrier is not reached by all threads");
    const int from = current_;
    do current_ = first + (current_ - first + step_ + size) % size;
    while (fibers_[current_]->done);
    if (current_ == from) stuck("a barrier is not reached by threads that have ended");
    threadIdx.x = static_cast<unsigned>(current_);
    fibers_[from]->coroutine.switch_to(fibers_[current_]->coroutine);
  }
  static void body();
  void end() {
    Fiber& self = *fibers_[current_];
    if (!self.copies.empty()) copies_arrived(0);
    self.done = true, idle_ = 0;
    if (--alive_ == 0) {
      self.coroutine.switch_to(main_);
    } else {
      // those that wait at the barrier may have waited for this thread only
      if (barrier_.arrived == alive_) barrier_.arrived = 0, ++barrier_.count;
      hand_over(0, static_cast<int>(blockDim.x));
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> warps_;
  Meeting barrier_;
  Coroutine main_;
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  int current_ = 0, alive_ = 0, step_ = 1, idle_ = 0;
};

// The machine of this thread, while it runs a block.
inline constinit thread_local Machine* running = nullptr;

inline void Machine::body() {
  running->work_(running->context_);
  running->end();
}

inline void __syncthreads() { running->meet_block(); }

template <class T>
inline T __shfl_sync(unsigned, T value, int source) {
  struct Call {
    T value, result;
    int source;
  } call{value, value, source};
  running->meet_warp(&call, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Call& to = *static_cast<Call*>(lanes[i]);
      to.result = static_cast<Call*>(lanes[to.source])->value;
    }
  });
  return call.result;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ with);
}
inline int __any_sync(unsigned, int condition) {
  int call = condition;
  running->meet_warp(&call, [](void** lanes) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= *static_cast<int*>(lanes[i]);
    for (int i = 0; i < 32; ++i) *static_cast<int*>(lanes[i]) = any;
  });
  return call;
}

// ldmatrix: lane 8 m + i names the place in shared memory of row i of matrix m [8, 8] of 16-bit elements; lane 4 g + t
// gets of every matrix the elements (g, 2 t) and (g, 2 t + 1) or, turned, (2 t, g) and (2 t + 1, g). A matrix takes one
// turn of shared memory where its rows, of 4 banks each, lie in different banks. Counted: loads, their turns, and the loads
// of each scheduler, which has every fourth warp of a block.
inline std::atomic<int64_t> matrix_loads{0}, matrix_turns{0}, scheduler_loads[4] = {};
// Of the last launch: blocks, threads of each, and bytes of shared memory.
inline std::atomic<int64_t> last_launch[3] = {};
inline int turns(void* const* lanes, int matrix, uint32_t (*place)(void*)) {
  int most = 0, rows[8] = {};
  for (int i = 0; i < 8; ++i) most = std::max(most, ++rows[place(lanes[8 * matrix + i]) / 16 % 8]);
  return most;
}
template <bool TURNED>
inline void load_matrices(uint32_t from, uint32_t* words) {
  struct Call {
    uint32_t from, *words;
  } call{from, words};
  if (from % 16 != 0) stuck("ldmatrix from a place that is no multiple of 16 bytes");
  running->meet_warp(&call, [](void** lanes) {
    const auto element = [&](int matrix, int row, int column) {
      uint16_t value;
      std::memcpy(&value, running->shared + static_cast<Call*>(lanes[8 * matrix + row])->from + 2 * column, 2);
      return static_cast<uint32_t>(value);
    };
    ++matrix_loads, ++scheduler_loads[threadIdx.x / 32 % 4];
    for (int m = 0; m < 4; ++m)
      matrix_turns += turns(lanes, m, [](void* lane) { return static_cast<Call*>(lane)->from; });
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < 4; ++m) {
        const uint32_t low = TURNED ? element(m, 2 * t, g) : element(m, g, 2 * t);
        const uint32_t high = TURNED ? element(m, 2 * t + 1, g) : element(m, g, 2 * t + 1);
        static_cast<Call*>(lanes[lane])->words[m] = high << 16 | low;
      }
    }
  });
}

inline uint16_t bfloat_of_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent from the bias of one type to that of the other, and makes subnormal numbers normal
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}
inline uint16_t half_of_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), rest = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;
  // below 2^-14 an addition aligns the last bit of a half with that of the sum and rounds there
  if (rest < 0x38800000u)
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u);
  return sign | static_cast<uint16_t>((rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13);
}

}  // namespace uvc::host
