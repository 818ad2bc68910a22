// A thread block on the CPU: what its warps wait for, and who reads and writes which part of its shared memory.
//
// One context plays each warp, as its first lane. Which of them goes on, and when a copy arrives, is drawn by lot. What
// would be a race or a deadlock ends the program with a message.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// Dynamic shared memory, as the kernels name it.
constexpr int kSharedBytes = 227 * 1024;
namespace flash_attn::sm90 {
alignas(1024) uint8_t shared_bytes[kSharedBytes];
}
using flash_attn::sm90::shared_bytes;

constexpr int kGroupWarps = 4;

inline void demand(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what + ", by warp " + std::to_string(threadIdx.x / 32));
}

// What lies in a part of shared memory: where it came from, while it is on its way and who still reads it.
using Content = std::vector<int>;
struct Part {
  Content content;
  int arriving = 0;        // copies on their way
  std::set<int> readers;   // warpgroups whose products read it; kCopyEngine
  uint32_t unfenced = 0;   // warps that stored to it since their last fence, a bit for each
  bool is_common = false;  // what one warpgroup stores others read; rows of other parts each clears for itself
  int rows = 0;            // of a tile
  std::function<int(const Content&)> used;  // how many of them a sequence has; the others must be cleared
  std::map<int, int> cleared;               // the first row that a warpgroup has cleared
};
constexpr int kCopyEngine = 100;

// In shared memory, for arrivals and bytes.
struct Barrier {
  int count = 0, missing = 0, bytes = 0, phase = 0;
};

struct NamedBarrier {
  int arrived = 0, generation = 0;
};

struct Copy {
  uint32_t shared, barrier;
  int bytes;
};

// Reads of shared memory by the products of a group.
using Reads = std::set<uint32_t>;

struct Group {
  std::vector<Reads> committed;
  int retired = 0;
};

class Block {
 public:
  std::mt19937 lot;
  std::map<uint32_t, Part> parts;  // by the address that they begin at
  std::map<uint32_t, Barrier> barriers;
  std::map<int, NamedBarrier> named;
  std::vector<Copy> copies;
  std::vector<Group> groups;  // of products, of each warpgroup
  std::vector<Reads> reads;   // by products that are not committed, of each warp
  std::vector<int> commits;
  std::function<void(const Reads&)> on_product;  // called once for a warpgroup

  // `lanes`: of each warp, those that do something.
  Block(unsigned seed, const std::vector<int>& lanes)
      : lot(seed),
        groups(lanes.size() / kGroupWarps),
        reads(lanes.size()),
        commits(lanes.size()),
        lanes_(lanes),
        meetings_(lanes.size()) {
    for (size_t warp = 0; warp < lanes.size(); ++warp) {
      for (int lane = 0; lane < lanes[warp]; ++lane)
        contexts_.push_back({.thread = static_cast<int>(32 * warp + lane)});
    }
    running_ = static_cast<int>(contexts_.size());
  }
  Block(const Block&) = delete;

  void run(const std::function<void()>& kernel) {
    kernel_ = kernel;
    for (Context& context : contexts_) {
      getcontext(&context.state);
      context.stack.resize(1 << 18);
      context.state.uc_stack.ss_sp = context.stack.data();
      context.state.uc_stack.ss_size = context.stack.size();
      context.state.uc_link = &scheduler_;
      makecontext(&context.state, &Block::start, 0);
    }
    int idle = 0;
    while (running_ > 0) {
      if (!copies.empty() && lot() % 4 == 0) arrive_one(), idle = 0;
      current_ = &contexts_[lot() % contexts_.size()];
      if (current_->ended) continue;
      threadIdx = uint3{static_cast<unsigned>(current_->thread), 0, 0};
      progress_ = false;
      swapcontext(&scheduler_, &current_->state);
      if (error_) std::rethrow_exception(error_);
      idle = progress_ || !copies.empty() ? 0 : idle + 1;
      if (idle > 3000) throw std::runtime_error("nobody goes on" + waits());
    }
    demand(copies.empty(), "copies are on their way when the block ends");
  }

  int warp() const { return current_->thread / 32; }
  int lane() const { return current_->thread % 32; }
  int warpgroup() const { return warp() / kGroupWarps; }
  int threads() const { return static_cast<int>(32 * lanes_.size()); }

  // Lets others run, perhaps.
  void step() {
    progress_ = true;
    if (lot() % 3 == 0) swapcontext(&current_->state, &scheduler_);
  }
  void wait(const std::string& what, const std::function<bool()>& is_over) {
    step();
    current_->waits_for = what;
    while (!is_over()) swapcontext(&current_->state, &scheduler_);
    progress_ = true;
  }

  Part& part(uint32_t address) {
    const auto next = parts.upper_bound(address);
    demand(next != parts.begin(), "no part of shared memory begins before " + std::to_string(address));
    return std::prev(next)->second;
  }
  uint32_t begin(uint32_t address) { return std::prev(parts.upper_bound(address))->first; }

  // The lanes of a warp meet: what lane `source` has sent.
  int exchange(int value, int source) {
    Meeting& meeting = meetings_[warp()];
    meeting.sent[lane()] = value;
    for (int round = 0; round < 2; ++round) {  // nobody sends again before all have read
      if (round == 1) value = meeting.sent[source];
      const int generation = meeting.generation;
      if (++meeting.arrived == lanes_[warp()]) meeting.arrived = 0, ++meeting.generation;
      wait("its warp", [&meeting, generation] { return meeting.generation != generation; });
    }
    return value;
  }

  void complete(Barrier& barrier) {
    demand(barrier.missing >= 0, "more arrivals than a barrier expects");
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.count, ++barrier.phase;
  }

 private:
  struct Context {
    int thread;
    ucontext_t state{};
    std::vector<char> stack{};
    bool ended = false;
    std::string waits_for{};
  };
  struct Meeting {
    int arrived = 0, generation = 0, sent[32] = {};
  };

  std::string waits() const {
    std::string text;
    for (const Context& context : contexts_) {
      if (!context.ended) text += "; thread " + std::to_string(context.thread) + " waits for " + context.waits_for;
    }
    return text;
  }

  void arrive_one() {
    const size_t number = lot() % copies.size();
    const Copy copy = copies[number];
    copies.erase(copies.begin() + number);
    --part(copy.shared).arriving;
    Barrier& barrier = barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    complete(barrier);
  }

  static void start();

  std::function<void()> kernel_;
  std::vector<int> lanes_;
  std::vector<Meeting> meetings_;
  std::vector<Context> contexts_;
  Context* current_ = nullptr;
  ucontext_t scheduler_{};
  std::exception_ptr error_;
  int running_;
  bool progress_ = false;
};

inline Block* block = nullptr;

inline void Block::start() {
  try {
    block->kernel_();
  } catch (...) {
    block->error_ = std::current_exception();
  }
  block->current_->ended = true;
  block->progress_ = true;
  --block->running_;
}

// Results between guards, which nobody may write to.
template <typename Value>
class Guarded {
 public:
  explicit Guarded(size_t size) : values_(size + 2 * kGuard, kMark) {}
  Value* data() { return values_.data() + kGuard; }
  void check() const {
    for (size_t i = 0; i < kGuard; ++i) {
      demand(values_[i] == kMark && values_[values_.size() - 1 - i] == kMark, "a result outside its tensor");
    }
  }

 private:
  static constexpr size_t kGuard = 65536;
  static constexpr Value kMark = 77;
  std::vector<Value> values_;
};
