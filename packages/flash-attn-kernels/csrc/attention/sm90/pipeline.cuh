// A ring of stages that a producer fills and consumers empty.
#pragma once

#include <cstdint>

#include "../../ptx/mbarrier.cuh"

namespace flash_attn::sm90 {

// Where a role is in a ring. Kept across tiles: barriers count their phases from the start of the kernel.
template <int kStages>
struct Cursor {
  int stage = 0;
  int parity = 0;

  // Without a branch, so that the cursor stays in registers that the whole warp shares.
  __device__ __forceinline__ void advance() {
    const bool wraps = stage + 1 == kStages;
    stage = wraps ? 0 : stage + 1;
    parity ^= wraps ? 1 : 0;
  }
};

// In shared memory.
template <int kStages>
struct PipelineBarriers {
  uint64_t full[kStages], empty[kStages];
};

template <int kStages, ptx::SpinBarrier kFull, ptx::SpinBarrier kEmpty>
struct Pipeline {
  uint32_t barriers;  // shared-memory address of PipelineBarriers

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }

  // A stage is full once its producer has arrived and its bytes have, and empty once so many consumers have arrived.
  __device__ __forceinline__ void init(int consumers) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), consumers);
    }
  }
  __device__ __forceinline__ void wait_full(const Cursor<kStages>& cursor) const {
    ptx::mbarrier_wait(full(cursor.stage), cursor.parity, {ptx::SpinRole::kConsumer, kFull, cursor.stage});
  }
  __device__ __forceinline__ void wait_empty(const Cursor<kStages>& cursor) const {
    ptx::mbarrier_wait(empty(cursor.stage), cursor.parity ^ 1, {ptx::SpinRole::kProducer, kEmpty, cursor.stage});
  }
  __device__ __forceinline__ void release(const Cursor<kStages>& cursor) const {
    ptx::mbarrier_arrive(empty(cursor.stage));
  }
};

}  // namespace flash_attn::sm90
