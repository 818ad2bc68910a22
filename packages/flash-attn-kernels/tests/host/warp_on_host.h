// What device code uses and plain C++ lacks, for headers of kernels that are compiled for the CPU: there `__device__`
// and its kin are empty. Threads play the lanes of a warp.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <thread>
#include <vector>

using std::max;
using std::min;

constexpr int kLanes = 32;

inline thread_local uint3 threadIdx;
inline std::barrier lanes_meet(kLanes);
inline uint32_t exchanged[kLanes];

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int lane_mask) {
  exchanged[threadIdx.x] = value;
  lanes_meet.arrive_and_wait();
  const uint32_t received = exchanged[threadIdx.x ^ static_cast<uint32_t>(lane_mask)];
  lanes_meet.arrive_and_wait();
  return received;
}

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  exchanged[threadIdx.x] = predicate ? 1 : 0;
  lanes_meet.arrive_and_wait();
  uint32_t ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane) ballot |= exchanged[lane] << lane;
  lanes_meet.arrive_and_wait();
  return ballot;
}

inline int __popc(uint32_t value) { return std::popcount(value); }

// Shared memory is anywhere: only differences of addresses mean something.
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Calls function(lane) for all lanes at once.
template <typename Function>
void run_warp(const Function& function) {
  std::vector<std::jthread> lanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes.emplace_back([&function, lane] {
      threadIdx = uint3{static_cast<unsigned>(lane), 0, 0};
      function(lane);
    });
  }
}
