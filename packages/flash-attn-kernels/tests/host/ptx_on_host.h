// The instructions of Hopper kernels on the CPU, for a block of block_on_host.h. Numbers are not computed.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <utility>

#include "block_on_host.h"

// Instructions do nothing. Those that matter are functions below, which take the place of their namesakes.
#define asm \
  if constexpr (false) asm
#define mbarrier_init mbarrier_init_in_ptx
#define mbarrier_arrive mbarrier_arrive_in_ptx
#define mbarrier_arrive_expecting mbarrier_arrive_expecting_in_ptx
#define mbarrier_wait mbarrier_wait_in_ptx
#define fence_async_proxy fence_async_proxy_in_ptx
#define tma_load tma_load_in_ptx
#define bulk_load bulk_load_in_ptx
#define bulk_add bulk_add_in_ptx
#define bulk_wait_read bulk_wait_read_in_ptx
#define bulk_wait bulk_wait_in_ptx
#define named_barrier_wait named_barrier_wait_in_ptx
#define named_barrier_arrive named_barrier_arrive_in_ptx
#define wgmma_commit wgmma_commit_in_ptx
#define wgmma_wait wgmma_wait_in_ptx
#define Wgmma WgmmaInPtx
#define stmatrix_x4_transposed stmatrix_x4_transposed_in_ptx
#define store_shared_16 store_shared_16_in_ptx
#define shared_address shared_address_in_ptx
#define block_index block_index_in_ptx

using std::max;
using std::min;
#define __launch_bounds__(...)
inline size_t __cvta_generic_to_shared(const void*) { return 0; }
inline unsigned __ballot_sync(unsigned, bool) { throw std::runtime_error("packed sequences take more than one lane"); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<uint32_t>(value)); }
inline float __fdividef(float x, float y) { return x / y; }
#define __logf logf  // the C library declares the former, and has only the latter
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int) {
  return value;
}
int __shfl_sync(unsigned, int value, int source);
void __syncwarp();
void __syncthreads();
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }

#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/special_registers.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#undef mbarrier_init
#undef mbarrier_arrive
#undef mbarrier_arrive_expecting
#undef mbarrier_wait
#undef fence_async_proxy
#undef tma_load
#undef bulk_load
#undef bulk_add
#undef bulk_wait_read
#undef bulk_wait
#undef named_barrier_wait
#undef named_barrier_arrive
#undef wgmma_commit
#undef wgmma_wait
#undef Wgmma
#undef stmatrix_x4_transposed
#undef store_shared_16
#undef shared_address
#undef block_index

namespace flash_attn::ptx {

inline int block_index() { return static_cast<int>(blockIdx.x); }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_bytes);
}

inline void mbarrier_init(uint32_t barrier, int arrivals) { block->barriers[barrier] = {arrivals, arrivals, 0, 0}; }

inline void mbarrier_arrive(uint32_t barrier) {
  block->step();
  Barrier& it = block->barriers.at(barrier);
  --it.missing;
  block->complete(it);
  block->step();  // what others do now may be too early
}

inline void mbarrier_arrive_expecting(uint32_t barrier, int bytes) {
  block->step();
  Barrier& it = block->barriers.at(barrier);
  it.bytes += bytes, --it.missing;
  block->complete(it);
}

inline void mbarrier_wait(uint32_t barrier, int parity, SpinSite) {
  block->wait("parity " + std::to_string(parity) + " at " + std::to_string(barrier),
              [=] { return block->barriers.at(barrier).phase % 2 != parity; });
}

inline void fence_async_proxy() {
  for (auto& [address, part] : block->parts) part.unfenced &= ~(1u << block->warp());
}

// Everything that a warp stored must be fenced before it tells anybody.
inline void meet(int barrier, int threads, bool waits) {
  block->step();
  for (const auto& [address, part] : block->parts) {
    demand((part.unfenced >> block->warp() & 1) == 0, "no fence behind stores to " + std::to_string(address));
  }
  NamedBarrier& it = block->named[barrier];
  const int generation = it.generation;
  it.arrived += 32;
  demand(it.arrived <= threads, "too many at named barrier " + std::to_string(barrier));
  if (it.arrived == threads) it.arrived = 0, ++it.generation;
  if (waits)
    block->wait("named barrier " + std::to_string(barrier),
                [=] { return block->named[barrier].generation != generation; });
}
inline void named_barrier_wait(int barrier, int threads) { meet(barrier, threads, true); }
inline void named_barrier_arrive(int barrier, int threads) { meet(barrier, threads, false); }

inline void start_copy(uint32_t shared, uint32_t barrier, int bytes, Content content) {
  block->step();
  Part& part = block->part(shared);
  demand(part.readers.empty(), "a copy to " + std::to_string(shared) + " that is still read");
  part.content = std::move(content);
  part.cleared.clear();
  ++part.arriving;
  block->copies.push_back({shared, barrier, bytes});
}

// The map says in its first word how many bytes a box has.
inline void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int, int row, int head, int batch,
                     CachePolicy) {
  start_copy(shared, barrier, static_cast<int>(map.opaque[0]), {row, head, batch});
}

inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  demand(shared % 16 == 0 && reinterpret_cast<uintptr_t>(global) % 16 == 0 && bytes % 16 == 0, "an unaligned copy");
  start_copy(shared, barrier, bytes, {static_cast<int>(*static_cast<const float*>(global))});
}

// The accumulator of dQ, and the slices that were added.
inline float* accumulator;
inline int64_t accumulator_floats;
inline std::vector<int> additions;

inline void bulk_add(float* global, uint32_t shared, int bytes, CachePolicy) {
  block->step();
  const int64_t first = global - accumulator;
  demand(first >= 0 && first + bytes / 4 <= accumulator_floats && first % 4 == 0,
         "an addition outside the accumulator");
  Part& part = block->part(shared);
  demand(!part.content.empty(), "a slice is added twice");
  demand(part.unfenced == 0, "a slice is added before it is visible");
  additions.push_back(static_cast<int>(first * 4 / bytes));
  part.content.clear();
  part.readers.insert(kCopyEngine + block->warp());
}
inline void bulk_wait_read() {
  block->step();
  for (auto& [address, part] : block->parts) part.readers.erase(kCopyEngine + block->warp());
}
inline void bulk_wait() { block->step(); }

inline void read(uint64_t descriptor) {
  const uint32_t address = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  Part& part = block->part(address);
  demand(part.arriving == 0, "a product reads " + std::to_string(address) + " before it has arrived");
  const uint32_t storing = part.is_common ? ~0u : 0xfu << block->warpgroup() * kGroupWarps;
  demand((part.unfenced & storing) == 0, "a product reads " + std::to_string(address) + " before it is visible");
  if (part.used) {
    const int used = part.used(part.content);
    const auto cleared = part.cleared.find(block->warpgroup());
    demand(used >= part.rows || (cleared != part.cleared.end() && cleared->second == used),
           "a product reads rows behind a sequence");
  }
  block->reads[block->warp()].insert(block->begin(address));
  part.readers.insert(block->warpgroup());
}

template <int N>
struct Wgmma {
  template <typename Element, bool kTransposed, bool kAccumulate>
  static void ss(float (&)[N / 8][4], uint64_t a, uint64_t b) {
    read(a), read(b);
  }
  template <typename Element, bool kTransposed, bool kAccumulate>
  static void rs(float (&)[N / 8][4], const uint32_t (&)[4], uint64_t b) {
    read(b);
  }
};

inline void wgmma_commit() {
  const int warp = block->warp();
  Group& group = block->groups[block->warpgroup()];
  const size_t number = block->commits[warp]++;
  if (number == group.committed.size()) {
    group.committed.push_back(block->reads[warp]);
    block->on_product(block->reads[warp]);
  }
  demand(group.committed[number] == block->reads[warp], "warps of a warpgroup compute different products");
  block->reads[warp].clear();
}

template <int kPending>
void wgmma_wait() {
  const int warp = block->warp(), first = block->warpgroup() * kGroupWarps, end = block->commits[warp] - kPending;
  Group& group = block->groups[block->warpgroup()];
  // Products are those of all four warps.
  block->wait("products", [=] {
    const auto warps = block->commits.begin() + first;
    return std::all_of(warps, warps + kGroupWarps, [=](int commits) { return commits >= end; });
  });
  group.retired = std::max(group.retired, end);
  Reads still;
  for (size_t number = group.retired; number < group.committed.size(); ++number) {
    still.insert(group.committed[number].begin(), group.committed[number].end());
  }
  for (int other = first; other < first + kGroupWarps; ++other) {
    still.insert(block->reads[other].begin(), block->reads[other].end());
  }
  for (auto& [address, part] : block->parts) {
    if (!still.contains(address)) part.readers.erase(block->warpgroup());
  }
}

inline void stmatrix_x4_transposed(uint32_t address, const uint32_t (&)[4]) {
  block->step();
  Part& part = block->part(address);
  demand(part.readers.empty(), "a store to " + std::to_string(address) + " that a product reads");
  part.unfenced |= 1u << block->warp();
}

inline uint32_t first_slice = ~0u;  // of dQ: behind the tiles

inline void store_shared_16(uint32_t address, const uint32_t (&)[4]) {
  if (block->lot() % 8 == 0) block->step();
  Part& part = block->part(address);
  if (address >= first_slice) {
    demand(part.readers.empty(), "a store to a slice that is still added");
    part.content = {block->warpgroup()};
  } else {  // the rows behind a sequence: zeros, by both warpgroups, over zeros perhaps
    demand(part.arriving == 0 && !part.content.empty(), "rows are cleared that have not arrived");
    const int row = static_cast<int>(address - block->begin(address)) % (part.rows * 128) / 128;
    int& cleared = part.cleared.try_emplace(block->warpgroup(), row).first->second;
    cleared = std::min(cleared, row);
  }
  part.unfenced |= 1u << block->warp();
}

}  // namespace flash_attn::ptx

inline int __shfl_sync(unsigned, int value, int source) { return block->exchange(value, source); }
inline void __syncwarp() { block->exchange(0, 0); }
inline void __syncthreads() {
  __syncwarp();
  if (block->lane() == 0) flash_attn::ptx::meet(0, block->threads(), true);
  __syncwarp();
}
