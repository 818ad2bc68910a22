// The Hopper kernels themselves on the CPU, without their numbers: what they compute, wait for and store. The tests
// beside this file say what comes out.

#include "requests.h"

#include "ptx_on_host.h"

#include "attention/sm90/backward.cuh"
#include "attention/sm90/forward.cuh"

namespace {

using namespace flash_attn;

// batch, heads, heads of a group, rows of q, of k, sides of the window (-1: unbounded), used rows of q, of k (empty:
// all)
struct Call {
  ProblemShape shape;
  RowLayout queries, keys;
  Window window;
  std::vector<int> used_q, used_k;

  Call(Request& request, int head_dim) {
    shape = {request.next(), request.next(), request.next(), head_dim, head_dim};
    const int rows_q = request.next(), rows_k = request.next();
    const auto side = [](int value) { return value < 0 ? Window::kUnbounded : value; };
    window.left = side(request.next()), window.right = side(request.next()), window.top_left = false;
    used_q = request.next_list(), used_k = request.next_list();
    queries = {nullptr, used_q.empty() ? nullptr : used_q.data(), rows_q, INT_MAX};
    keys = {nullptr, used_k.empty() ? nullptr : used_k.data(), rows_k, INT_MAX};
  }
  Call(const Call&) = delete;

  void fill(AttentionParams& params) const {
    params.shape = shape, params.queries = queries, params.keys = keys, params.window = window;
    params.softmax_scale = params.softmax_scale_log2 = 1.f;
  }
  int kv_heads() const { return shape.heads / shape.heads_per_kv_head; }
};

CUtensorMap map_of(int box_rows) {
  CUtensorMap map{};
  map.opaque[0] = box_rows * kRowBytes;
  return map;
}

// A tile whose rows past the end of a sequence have to be cleared, unless they are past the end of the tensor.
Part tile_of(const RowLayout& layout, int rows) {
  Part part;
  part.rows = rows;
  part.used = [&layout, rows](const Content& content) {
    const int first = content.at(0), index = content.at(2);
    return layout.seqused == nullptr ? rows : layout.seqused[index] - first;
  };
  return part;
}

// A (batch, row, head, dim) tensor of results.
TensorView view_of(void* data, int rows, int heads, int head_dim) {
  const int64_t row_stride = int64_t{heads} * head_dim;
  return {data, rows * row_stride, row_stride, head_dim};
}

void append(std::vector<int>& numbers, const Content& content) {
  numbers.insert(numbers.end(), content.begin(), content.end());
}

template <typename Config>
std::string run_backward(Request& request) {
  const Call call(request, Config::kHeadDim);
  BackwardParams params{};
  call.fill(params);
  params.group_splits = request.next(), params.head_interleave = request.next();
  const int blocks = request.next();
  const unsigned seed = static_cast<unsigned>(request.next());
  params.query_slots = slot_count(params.queries, params.shape.batch, Config::kRows);
  params.key_slots = slot_count(params.keys, params.shape.batch, Config::kColumns);

  const int64_t tiles = int64_t{params.query_slots} * params.shape.heads;
  std::vector<float4> vectors(tiles * Config::kRows / 4), accumulator(tiles * Config::kRows * Config::kHeadDim / 4);
  for (int64_t tile = 0; tile < tiles; ++tile) vectors[tile * Config::kRows / 4].x = static_cast<float>(tile);
  params.lse_log2 = params.delta = &vectors.data()->x;
  params.dq_accumulator = ptx::accumulator = &accumulator.data()->x;
  ptx::accumulator_floats = static_cast<int64_t>(accumulator.size()) * 4;
  const int rows_k = params.keys.rows, kv_heads = call.kv_heads();
  const int64_t elements = int64_t{params.shape.batch} * rows_k * kv_heads * Config::kHeadDim;
  Guarded<uint16_t> dk(elements), dv(elements);
  Guarded<float> dk_parts(elements * params.group_splits), dv_parts(elements * params.group_splits);
  params.dk = view_of(dk.data(), rows_k, kv_heads, Config::kHeadDim);
  params.dv = view_of(dv.data(), rows_k, kv_heads, Config::kHeadDim);
  if (params.group_splits > 1) params.dk_partial = dk_parts.data(), params.dv_partial = dv_parts.data();
  int counter = 0;
  const CUtensorMap queries = map_of(Config::kRows), keys = map_of(Config::kColumns);
  const sm90::BackwardKernelParams kernel_params{
      {queries, keys, keys, queries}, params, params.key_slots * kv_heads * params.group_splits, &counter};

  std::vector<std::vector<int>> scores;
  ptx::additions.clear();
  using Shared = sm90::BackwardShared<Config>;
  static_assert(Shared::kBytes <= kSharedBytes);
  gridDim = dim3(blocks);
  for (int number = 0; number < blocks; ++number) {
    blockIdx.x = number;
    Block this_block(seed + number, std::vector<int>(Config::kThreads / 32, 1));
    block = &this_block;
    const Shared shared(sm90::shared_bytes);
    for (const uint32_t tile : {shared.key_tile(), shared.value_tile()}) {
      this_block.parts[tile] = tile_of(params.keys, Config::kColumns);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      for (const uint32_t tile : {shared.query_tile(stage), shared.dout_tile(stage)}) {
        this_block.parts[tile] = tile_of(params.queries, Config::kRows);
      }
      this_block.parts[shared.ds_tile(stage)].is_common = true;
      this_block.parts[shared.lse(stage)] = this_block.parts[shared.delta(stage)] = {};
    }
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer) {
      this_block.parts[shared.dq_slice(consumer)].is_common = true;
    }
    ptx::first_slice = shared.dq_slice(0);
    this_block.on_product = [&](const Reads& reads) {
      const auto add = [&](int kind, uint32_t keys, uint32_t queries, uint32_t vector) {
        if (!reads.contains(keys) || !reads.contains(queries)) return;
        std::vector<int> numbers{kind, this_block.warpgroup() - 1};
        for (const uint32_t part : {keys, queries, vector}) append(numbers, this_block.parts.at(part).content);
        scores.push_back(numbers);
      };
      for (int stage = 0; stage < Config::kStages; ++stage) {
        add(0, shared.key_tile(), shared.query_tile(stage), shared.lse(stage));
        add(1, shared.value_tile(), shared.dout_tile(stage), shared.delta(stage));
      }
    };
    this_block.run([&] { sm90::backward_kernel<__nv_bfloat16, Config>(kernel_params); });
  }
  dk.check(), dv.check(), dk_parts.check(), dv_parts.check();
  return json({{"scores", json(scores)}, {"additions", json(ptx::additions)}});
}

// head dim, call, splits of a group, heads that take turns, blocks, seed: every tile of scores (0) and of their
// gradient (1) that a consumer computes, with the places of its keys and queries (row, head, sequence) and the number
// of its scratch tile; and the slices of dQ that are added to
std::string backward(Request& request) {
  return request.next() == 64 ? run_backward<sm90::BackwardConfigOf<HeadDims<64, 64>>::Config>(request)
                              : run_backward<sm90::BackwardConfigOf<HeadDims<128, 128>>::Config>(request);
}

template <typename Config>
std::string run_forward(Request& request) {
  const Call call(request, Config::kHeadDim);
  ForwardParams params{};
  call.fill(params);
  const bool counts = request.next() != 0;
  const int multiprocessors = request.next();
  const unsigned seed = static_cast<unsigned>(request.next());
  const ProblemShape& shape = params.shape;
  const int rows_q = params.queries.rows;
  Guarded<uint16_t> out(int64_t{shape.batch} * rows_q * shape.heads * Config::kHeadDimV);
  Guarded<float> lse(int64_t{shape.batch} * rows_q * shape.heads);
  params.out = view_of(out.data(), rows_q, shape.heads, Config::kHeadDimV);
  params.lse = lse.data();
  params.lse_batch_stride = int64_t{shape.heads} * rows_q, params.lse_head_stride = rows_q;
  int counter = 0;
  const CUtensorMap queries = map_of(Config::kRows), keys = map_of(Config::kColumns);
  const sm90::ForwardKernelParams kernel_params{{queries, keys, keys},
                                                params,
                                                sm90::tile_order(params, Config::kRows, multiprocessors),
                                                counts ? &counter : nullptr};
  const int blocks = std::min(multiprocessors, kernel_params.order.tiles());

  std::vector<std::vector<int>> scores, outputs;
  using Shared = sm90::ForwardShared<Config>;
  static_assert(Shared::kBytes <= kSharedBytes);
  ptx::first_slice = ~0u;
  gridDim = dim3(blocks);
  for (int number = 0; number < blocks; ++number) {
    blockIdx.x = number;
    std::vector<int> lanes(Config::kThreads / 32, 1);
    lanes[1] = Config::kConsumers;  // each describes the range of one consumer
    Block this_block(seed + number, lanes);
    block = &this_block;
    const Shared shared(sm90::shared_bytes);
    for (int stage = 0; stage < Config::kQueryStages; ++stage) this_block.parts[shared.query_tile(stage)] = {};
    for (int stage = 0; stage < Config::kStages; ++stage) {
      this_block.parts[shared.key_tile(stage)] = {};  // scores of other keys are masked
      this_block.parts[shared.value_tile(stage)] = tile_of(params.keys, Config::kColumns);
    }
    this_block.on_product = [&](const Reads& reads) {
      std::vector<int> numbers{this_block.warpgroup() - 1};
      for (const uint32_t part : reads) append(numbers, this_block.parts.at(part).content);  // queries come first
      (reads.size() == 2 ? scores : outputs).push_back(numbers);
    };
    this_block.run([&] { sm90::forward_kernel<__nv_bfloat16, Config, false>(kernel_params); });
  }
  out.check(), lse.check();
  return json({{"scores", json(scores)},
               {"outputs", json(outputs)},
               {"tile", json(std::vector<int>{Config::kConsumerRows, Config::kColumns})}});
}

// head dim, call, whether a counter hands out tiles, multiprocessors, seed: for every product of a consumer the places
// (row, head, sequence) of the tiles of queries and keys, or of values; and the rows and keys of a consumer's tile
std::string forward(Request& request) {
  const int head_dim = request.next();
  return with_head_dims(head_dim, head_dim, [&]<typename Dims>(Dims) {
    return run_forward<typename sm90::ForwardConfigOf<Dims, false>::Config>(request);
  });
}

}  // namespace

int main() { return answer_all({{"backward", backward}, {"forward", forward}}); }
