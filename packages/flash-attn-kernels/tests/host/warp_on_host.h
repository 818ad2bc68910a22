// What device code uses and plain C++ lacks, for headers of kernels that are compiled for the CPU: there `__device__`
// and its kin are empty. Contexts that take turns play the lanes of a warp.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

using std::max;
using std::min;

constexpr int kLanes = 32;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// Lanes run in turn, each until it meets the others or ends.
class WarpOnHost {
 public:
  explicit WarpOnHost(std::function<void(int)> function) : function_(std::move(function)), lanes_(kLanes) {
    WarpOnHost* const outer = std::exchange(current, this);
    for (int lane = 0; lane < kLanes; ++lane) {
      getcontext(&lanes_[lane].context);
      lanes_[lane].stack.resize(kStackBytes);
      lanes_[lane].context.uc_stack.ss_sp = lanes_[lane].stack.data();
      lanes_[lane].context.uc_stack.ss_size = kStackBytes;
      lanes_[lane].context.uc_link = &caller_;
      makecontext(&lanes_[lane].context, &run_lane, 0);
    }
    while (running_ > 0) {
      for (lane_ = 0; lane_ < kLanes; ++lane_) {
        threadIdx = uint3{static_cast<unsigned>(lane_), 0, 0};
        if (!lanes_[lane_].ended) swapcontext(&caller_, &lanes_[lane_].context);
      }
    }
    current = outer;
  }

  // What all lanes have sent in their calls of the same number.
  static const uint32_t* exchange(uint32_t value) {
    Lane& lane = current->lanes_[current->lane_];
    uint32_t* sent = current->sent_[lane.exchanges++ % 2];  // the other one may still be read
    sent[current->lane_] = value;
    swapcontext(&lane.context, &current->caller_);
    return sent;
  }

 private:
  static constexpr int kStackBytes = 64 * 1024;
  struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    int exchanges = 0;
    bool ended = false;
  };

  static void run_lane() {
    current->function_(current->lane_);
    current->lanes_[current->lane_].ended = true;
    --current->running_;
  }

  inline static WarpOnHost* current = nullptr;
  std::function<void(int)> function_;
  std::vector<Lane> lanes_;
  ucontext_t caller_;
  uint32_t sent_[2][kLanes];
  int lane_ = 0, running_ = kLanes;
};

// Calls function(lane) for all lanes at once.
template <typename Function>
void run_warp(const Function& function) {
  WarpOnHost warp(function);
}

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int lane_mask) {
  const int lane = static_cast<int>(threadIdx.x);
  return WarpOnHost::exchange(value)[lane ^ lane_mask];
}

inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, int distance) {
  const int lane = static_cast<int>(threadIdx.x);
  return WarpOnHost::exchange(value)[lane < distance ? lane : lane - distance];
}

inline uint32_t __shfl_sync(uint32_t, uint32_t value, int source) { return WarpOnHost::exchange(value)[source]; }

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const uint32_t* const predicates = WarpOnHost::exchange(predicate ? 1 : 0);
  uint32_t ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane) ballot |= predicates[lane] << lane;
  return ballot;
}

inline int __popc(uint32_t value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<uint32_t>(value)); }
inline int __ffs(uint32_t value) { return value == 0 ? 0 : std::countr_zero(value) + 1; }

// Named by kernels, not called here.
#define __launch_bounds__(...)
void __syncthreads();
void __syncwarp();
void __threadfence();
int atomicAdd(int* address, int value);

// Shared memory is anywhere: only differences of addresses mean something.
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
