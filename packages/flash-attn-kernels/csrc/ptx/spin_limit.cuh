// An end to waits that would never end, for bringing kernels up.
//
// With FLASH_ATTN_BOUNDED_SPINS defined, a wait that has been tried kSpinLimit times writes a report, the first one
// wins, and from then on every wait of the launch ends at once: the kernel finishes with wrong results instead of
// hanging, and the host finds the report. Otherwise all of this compiles to nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../api/cuda_check.h"

namespace flash_attn::ptx {

enum class SpinRole : int { kProducer, kConsumer };
enum class SpinBarrier : int {
  kRequestFull,
  kRequestEmpty,
  kWorkFull,
  kWorkEmpty,
  kQueryFull,
  kQueryEmpty,
  kKeyFull,
  kKeyEmpty,
  kValueFull,
  kValueEmpty
};

struct SpinSite {
  SpinRole role;
  SpinBarrier barrier;
  int stage;
};

struct SpinReport {
  int written, block, thread, role, barrier, stage, parity;
};

#ifdef FLASH_ATTN_BOUNDED_SPINS

static __device__ SpinReport spin_report;

class SpinLimit {
 public:
  __device__ __forceinline__ SpinLimit(SpinSite site, int parity) : site_(site), parity_(parity) {}

  __device__ __forceinline__ bool is_reached() {
    if (++tries_ < kSpinLimit && *static_cast<volatile int*>(&spin_report.written) == 0) return false;
    if (atomicExch(&spin_report.written, 1) == 0) {
      spin_report.block = blockIdx.x;
      spin_report.thread = threadIdx.x;
      spin_report.role = static_cast<int>(site_.role);
      spin_report.barrier = static_cast<int>(site_.barrier);
      spin_report.stage = site_.stage;
      spin_report.parity = parity_;
    }
    return true;
  }

 private:
  static constexpr int kSpinLimit = 1 << 22;  // each try suspends the thread for a while: seconds
  SpinSite site_;
  int parity_, tries_ = 0;
};

// After a launch: waits for it and says which wait ended it, if one did.
inline void throw_if_spins_ended(cudaStream_t stream) {
  constexpr const char* kRoles[] = {"producer", "consumer"};
  constexpr const char* kBarriers[] = {"request full", "request empty", "work full", "work empty", "query full",
                                       "query empty",  "key full",      "key empty", "value full", "value empty"};
  SpinReport report;
  FLASH_ATTN_CUDA_CHECK(cudaStreamSynchronize(stream));
  FLASH_ATTN_CUDA_CHECK(cudaMemcpyFromSymbol(&report, spin_report, sizeof(report)));
  if (report.written == 0) return;
  const SpinReport cleared{};
  FLASH_ATTN_CUDA_CHECK(cudaMemcpyToSymbol(spin_report, &cleared, sizeof(cleared)));
  throw std::runtime_error("a wait did not end: block " + std::to_string(report.block) + ", thread " +
                           std::to_string(report.thread) + ", role " + kRoles[report.role] + ", barrier " +
                           kBarriers[report.barrier] + ", stage " + std::to_string(report.stage) + ", parity " +
                           std::to_string(report.parity));
}

#else

class SpinLimit {
 public:
  __device__ __forceinline__ SpinLimit(SpinSite, int) {}
  __device__ __forceinline__ bool is_reached() const { return false; }
};

#endif

}  // namespace flash_attn::ptx
