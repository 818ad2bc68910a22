// The parts of the Hopper kernels that need no Hopper, from the very headers that the kernels include, for the CPU.
// The tests beside this file say what comes out.

#include "warp_on_host.h"

// The instruction stays unused under another name.
#define block_index block_index_in_ptx
#include "ptx/special_registers.cuh"
#undef block_index
namespace flash_attn::ptx {
inline int block_index() { return static_cast<int>(blockIdx.x); }
}  // namespace flash_attn::ptx

#include "attention/head_dims.h"
#include "attention/mask.cuh"
#include "attention/params.h"
#include "attention/sequence.cuh"
#include "attention/shared_tile.cuh"
#include "attention/sm80/backward_work.cuh"
#include "attention/sm90/backward_mask.cuh"
#include "attention/sm90/backward_shared.cuh"
#include "attention/sm90/backward_work.cuh"
#include "attention/sm90/config.h"
#include "attention/sm90/forward_shared.cuh"
#include "attention/sm90/forward_work.cuh"
#include "attention/sm90/pipeline.cuh"
#include "attention/sm90/store_rows.cuh"
#include "attention/sm90/tile_order.h"
#include "attention/sm90/warpgroup_gemm.cuh"
#include "attention/visible_range.cuh"
#include "requests.h"

// Stands for a 16-bit type: numbers stay the whole numbers that they are.
struct WholeNumber {};

namespace flash_attn::ptx {
template <>
inline uint32_t pack<WholeNumber>(float low, float high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}
}  // namespace flash_attn::ptx

namespace {

using namespace flash_attn;

using Rows = std::vector<std::vector<int>>;

// left, right (-1 is unbounded), top_left
Window next_window(Request& request) {
  const auto side = [](int value) { return value < 0 ? Window::kUnbounded : value; };
  Window window;
  window.left = side(request.next());
  window.right = side(request.next());
  window.top_left = request.next() != 0;
  return window;
}

RowLayout dense(int rows) { return {nullptr, nullptr, rows, rows}; }

// seqlen_q, seqlen_k, window
AttentionParams next_sequence(Request& request) {
  AttentionParams params{};
  params.shape.batch = 1;
  params.queries = dense(request.next());
  params.keys = dense(request.next());
  params.window = next_window(request);
  return params;
}

// sequence, first query, rows, columns
std::string visible_tiles(Request& request) {
  const AttentionParams params = next_sequence(request);
  const int query = request.next(), rows = request.next(), columns = request.next();
  const TileRange range = visible_key_tiles(Sequence(params, 0), params.window, query, rows, columns);
  return json(std::vector<int>{range.begin, range.clean_begin, range.clean_end, range.end});
}

// sequence, first key, columns, rows
std::string visible_queries(Request& request) {
  const AttentionParams params = next_sequence(request);
  const int key = request.next(), columns = request.next(), rows = request.next();
  const QueryTiles tiles = visible_query_tiles(Sequence(params, 0), params.window, key, columns, rows);
  return json(std::vector<int>{tiles.begin, tiles.end});
}

// sequence, first query, rows, first key, columns
std::string clean(Request& request) {
  const AttentionParams params = next_sequence(request);
  const int query = request.next(), rows = request.next(), key = request.next(), columns = request.next();
  return json(is_clean(Sequence(params, 0), params.window, query, rows, key, columns) ? 1 : 0);
}

// sequence, whether first keys may be inside, the row and column of the thread's first element: for each of its
// elements whether it is kept
std::string masked(Request& request) {
  constexpr int kColumnTiles = 6;
  const AttentionParams params = next_sequence(request);
  const bool begins = request.next() != 0;
  const int row = request.next(), column = request.next();
  float scores[1][kColumnTiles][4] = {};
  const Sequence sequence(params, 0);
  if (begins) {
    mask_scores<true>(scores, sequence, params.window, row, column);
  } else {
    mask_scores<false>(scores, sequence, params.window, row, column);
  }
  Rows kept;
  for (const auto& fragment : scores[0]) {
    kept.emplace_back();
    for (float score : fragment) kept.back().push_back(score == 0.f ? 1 : 0);
  }
  return json(kept);
}

template <typename Config>
std::string describe(Config) {
  using Shared = sm90::ForwardShared<Config>;
  alignas(1024) static uint8_t memory[1024];
  const Shared shared(memory);
  std::vector<int64_t> queries, keys, values;
  const auto offset = [&](uint32_t address) { return int64_t{address - ptx::shared_address(memory)}; };
  for (int stage = 0; stage < Config::kQueryStages; ++stage) queries.push_back(offset(shared.query_tile(stage)));
  for (int stage = 0; stage < Config::kStages; ++stage) {
    keys.push_back(offset(shared.key_tile(stage)));
    values.push_back(offset(shared.value_tile(stage)));
  }
  const std::vector<int64_t> barriers{offset(shared.requests.full(0)), offset(shared.works.full(0)),
                                      offset(shared.queries.full(0)), offset(shared.keys.full(0)),
                                      offset(shared.values.full(0))};
  return json({
      {"head_dim", json(Config::kHeadDim)},
      {"head_dim_v", json(Config::kHeadDimV)},
      {"rows", json(Config::kRows)},
      {"columns", json(Config::kColumns)},
      {"consumers", json(Config::kConsumers)},
      {"threads", json(Config::kThreads)},
      {"query_stages", json(Config::kQueryStages)},
      {"stages", json(Config::kStages)},
      {"launch_registers", json(Config::kLaunchRegisters)},
      {"producer_registers", json(Config::kProducerRegisters)},
      {"consumer_registers", json(Config::kConsumerRegisters)},
      {"query_tiles", json(queries)},
      {"key_tiles", json(keys)},
      {"value_tiles", json(values)},
      {"query_panel_bytes", json(Config::QueryTile::kPanelBytes)},
      {"key_panel_bytes", json(Config::KeyTile::kPanelBytes)},
      {"value_panel_bytes", json(Config::ValueTile::kPanelBytes)},
      {"storage", json(Config::kTileBytes)},
      {"barriers", json(barriers)},
      {"bytes", json(Shared::kBytes)},
  });
}

// head dim of q and k, of v, whether soft-capped
std::string config(Request& request) {
  const int head_dim = request.next(), head_dim_v = request.next();
  const bool softcap = request.next() != 0;
  return with_head_dims(head_dim, head_dim_v, [&]<typename Dims>(Dims) {
    return softcap ? describe(typename sm90::ForwardConfigOf<Dims, true>::Config{})
                   : describe(typename sm90::ForwardConfigOf<Dims, false>::Config{});
  });
}

// matrices, ranks, matrices of a section: matrix and rank at every position
std::string order(Request& request) {
  const int matrices = request.next(), ranks = request.next(), section = request.next();
  const sm90::TileOrder order{matrices, ranks, section};
  Rows tiles;
  for (int position = 0; position < order.tiles(); ++position) {
    const sm90::TileOrder::Tile tile = order.at(position);
    tiles.push_back({tile.matrix, tile.rank});
  }
  return json(tiles);
}

// blocks, rounds: of every block its position in each round, without a counter
std::string static_positions(Request& request) {
  const int blocks = request.next(), rounds = request.next();
  Rows positions(blocks);
  for (int block = 0; block < blocks; ++block) {
    for (int round = 0; round < rounds; ++round) {
      positions[block].push_back(sm90::static_position(block, blocks, round));
    }
  }
  return json(positions);
}

// batch, heads, heads of a group, head dim of q and k, of v, rows of q, of k, window, whether packed, rows of a tile,
// multiprocessors
std::string tile_order(Request& request) {
  static const int somewhere = 0;
  ForwardParams params{};
  params.shape.batch = request.next();
  params.shape.heads = request.next();
  params.shape.heads_per_kv_head = request.next();
  params.shape.head_dim = request.next();
  params.shape.head_dim_v = request.next();
  params.queries = dense(request.next());
  params.keys = dense(request.next());
  params.window = next_window(request);
  if (request.next() != 0) params.queries.cu_seqlens = params.keys.cu_seqlens = &somewhere;
  const int tile_rows = request.next(), multiprocessors = request.next();
  const sm90::TileOrder order = sm90::tile_order(params, tile_rows, multiprocessors);
  return json(std::vector<int>{order.matrices, order.ranks, order.section});
}

// batch, heads, rows of q, of k, window, cumulative lengths of q, of k (empty: dense): every tile in turn
std::string works(Request& request) {
  using Config = sm90::ForwardConfigOf<HeadDims<128, 128>, false>::Config;
  sm90::ForwardKernelParams params{};
  params.attention.shape = {request.next(), request.next(), 1, 128, 128};
  params.attention.queries = dense(request.next());
  params.attention.keys = dense(request.next());
  params.attention.window = next_window(request);
  const std::vector<int> cu_q = request.next_list(), cu_k = request.next_list();
  if (!cu_q.empty()) {
    params.attention.queries.cu_seqlens = cu_q.data();
    params.attention.keys.cu_seqlens = cu_k.data();
  }
  params.order = sm90::tile_order(params.attention, Config::kRows, 132);
  std::vector<Rows> lanes(kLanes);
  run_warp([&](int lane) {
    for (int position = 0; position < params.order.tiles(); ++position) {
      const sm90::ForwardWork work = sm90::work_at<Config>(params, position);
      lanes[lane].push_back({work.sequence.index, work.head, work.first_query, work.stored, work.sequence.first_q,
                             work.sequence.first_k, work.sequence.seqlen_q, work.sequence.seqlen_k, work.range.begin,
                             work.range.end});
    }
  });
  for (const Rows& lane : lanes) {
    if (lane != lanes[0]) throw std::runtime_error("lanes disagree");
  }
  return json(lanes[0]);
}

// head dim: the backward's tiles
std::string backward_config(Request& request) {
  const auto describe_it = [&]<typename Config>(Config) {
    using Shared = sm90::BackwardShared<Config>;
    alignas(1024) static uint8_t memory[1024];
    const Shared shared(memory);
    const auto offset = [&](uint32_t address) { return int64_t{address - ptx::shared_address(memory)}; };
    std::vector<int64_t> queries, scores, slices;
    for (int stage = 0; stage < Config::kStages; ++stage) {
      queries.push_back(offset(shared.query_tile(stage)));
      queries.push_back(offset(shared.dout_tile(stage)));
    }
    for (int stage = 0; stage < 2; ++stage) scores.push_back(offset(shared.ds_tile(stage)));
    for (int consumer = 0; consumer < Config::kConsumers; ++consumer)
      slices.push_back(offset(shared.dq_slice(consumer)));
    return json({
        {"head_dim", json(Config::kHeadDim)},
        {"rows", json(Config::kRows)},
        {"columns", json(Config::kColumns)},
        {"consumers", json(Config::kConsumers)},
        {"threads", json(Config::kThreads)},
        {"producer_registers", json(Config::kProducerRegisters)},
        {"consumer_registers", json(Config::kConsumerRegisters)},
        {"query_fragments", json(Config::kQueryFragments)},
        {"key_tiles", json(std::vector<int64_t>{offset(shared.key_tile()), offset(shared.value_tile())})},
        {"query_tiles", json(queries)},
        {"score_tiles", json(scores)},
        {"slices", json(slices)},
        {"slice_bytes", json(Config::kQuerySliceBytes)},
        {"vectors", json(std::vector<int64_t>{offset(shared.lse(0)), offset(shared.delta(0)), offset(shared.lse(1)),
                                              offset(shared.delta(1))})},
        {"storage", json(Shared::kTileBytes)},
        {"bytes", json(Shared::kBytes)},
    });
  };
  return request.next() == 64 ? describe_it(sm90::BackwardConfigOf<HeadDims<64, 64>>::Config{})
                              : describe_it(sm90::BackwardConfigOf<HeadDims<128, 128>>::Config{});
}

// A backward in tiles of 64 queries and 128 keys: batch, heads, heads of a group, splits of a group, heads that take
// turns, rows of q, of k, window, cumulative lengths of q, of k (empty: dense).
struct Backward {
  using Config = sm90::BackwardConfigOf<HeadDims<128, 128>>::Config;
  std::vector<int> cu_q, cu_k;
  BackwardParams params{};
  int works;

  explicit Backward(Request& request) {
    params.shape = {request.next(), request.next(), request.next(), 128, 128};
    params.group_splits = request.next();
    params.head_interleave = request.next();
    params.queries = dense(request.next());
    params.keys = dense(request.next());
    params.window = next_window(request);
    cu_q = request.next_list(), cu_k = request.next_list();
    if (!cu_q.empty()) {
      params.queries.cu_seqlens = cu_q.data();
      params.keys.cu_seqlens = cu_k.data();
    }
    params.query_slots = slot_count(params.queries, params.shape.batch, Config::kRows);
    params.key_slots = slot_count(params.keys, params.shape.batch, Config::kColumns);
    works = params.key_slots * (params.shape.heads / params.shape.heads_per_kv_head) * params.group_splits;
  }
  Backward(const Backward&) = delete;
};

// backward: every work in turn, with its visits (head, tile, scratch tile)
std::string backward_works(Request& request) {
  using Config = Backward::Config;
  const Backward backward(request);
  const auto& [cu_q, cu_k, params, works] = backward;
  std::vector<Rows> lanes(kLanes);
  run_warp([&](int lane) {
    for (int position = 0; position < works; ++position) {
      const sm90::BackwardWork<Config> work(params, position);
      std::vector<int> row{work.sequence.index, work.kv_head, work.split, work.first_key};
      sm90::Visit visit = work.first();
      for (int remaining = work.visits(); remaining > 0; --remaining, work.advance(visit)) {
        const int numbers[] = {visit.head, visit.tile, static_cast<int>(work.scratch_tile(params, visit))};
        row.insert(row.end(), std::begin(numbers), std::end(numbers));
      }
      lanes[lane].push_back(row);
    }
  });
  for (const Rows& lane : lanes) {
    if (lane != lanes[0]) throw std::runtime_error("lanes disagree");
  }
  return json(lanes[0]);
}

// backward: of every block of the deterministic sm80 kernel its visits (scratch tile, its turn to add to that)
std::string turns(Request& request) {
  using Config = Backward::Config;
  Backward backward(request);
  BackwardParams& params = backward.params;
  int somewhere = 0;
  params.dq_turn = &somewhere;
  std::vector<Rows> lanes(kLanes);
  run_warp([&](int lane) {
    for (int block = 0; block < backward.works; ++block) {
      blockIdx.x = block;
      const sm80::BackwardWork work(params, Config::kColumns);
      const Sequence sequence(params, work.index);
      const int first_query_slot = first_slot(params.queries, work.index, Config::kRows);
      const QueryTiles visible = visible_query_tiles(sequence, params.window, work.key_tile * Config::kColumns,
                                                     Config::kColumns, Config::kRows);
      std::vector<int> row;
      for (int head = work.first_head(params); head < work.end_head(params); ++head) {
        for (int tile = visible.begin; tile < visible.end; ++tile) {
          const int query = tile * Config::kRows;
          row.push_back(static_cast<int>(sm80::scratch_tile(params, first_query_slot, {head, tile})));
          row.push_back(work.turn(visible_key_tiles(sequence, params.window, query, Config::kRows, Config::kColumns)));
        }
      }
      lanes[lane].push_back(row);
    }
  });
  for (const Rows& lane : lanes) {
    if (lane != lanes[0]) throw std::runtime_error("lanes disagree");
  }
  return json(lanes[0]);
}

// sequence, whether first keys may be inside, the key and query of the thread's first element: for each of its elements
// whether it is kept
std::string masked_transposed(Request& request) {
  constexpr int kFragments = 6;
  const AttentionParams params = next_sequence(request);
  const bool begins = request.next() != 0;
  const int key = request.next(), query = request.next();
  float scores[kFragments][4] = {};
  const Sequence sequence(params, 0);
  if (begins) {
    sm90::mask_transposed<true>(scores, sequence, params.window, key, query);
  } else {
    sm90::mask_transposed<false>(scores, sequence, params.window, key, query);
  }
  Rows kept;
  for (const auto& fragment : scores) {
    kept.emplace_back();
    for (float score : fragment) kept.back().push_back(score == 0.f ? 1 : 0);
  }
  return json(kept);
}

template <typename Tile>
std::string chunks_of() {
  Rows addresses;
  for (int row = 0; row < Tile::kRows; ++row) {
    addresses.emplace_back();
    for (int chunk = 0; chunk < Tile::kPanels * kPanelChunks; ++chunk) {
      addresses.back().push_back(static_cast<int>(Tile{0}.chunk_address(row, chunk)));
    }
  }
  return json(addresses);
}

// rows, columns of a tile of 16-bit elements: the address of every 16-byte chunk of every row
std::string chunks(Request& request) {
  const int rows = request.next(), columns = request.next();
  if (rows == 64 && columns == 64) return chunks_of<SharedTile<64, 64>>();
  if (rows == 112 && columns == 96) return chunks_of<SharedTile<112, 96>>();
  if (rows == 80 && columns == 256) return chunks_of<SharedTile<80, 256>>();
  throw std::runtime_error("chunks: there is no such tile here");
}

// address, whether its rows are those of the transposed operand B; of a tile of 96 rows
std::string descriptor(Request& request) {
  const uint32_t address = static_cast<uint32_t>(request.next());
  const uint64_t bits =
      request.next() != 0 ? sm90::panel_descriptor<SharedTile<96, 128>>(address) : sm90::row_descriptor(address);
  return json(std::vector<int64_t>{static_cast<int64_t>(bits >> 32), static_cast<int64_t>(bits & 0xffffffffu)});
}

// Element e of accumulator fragment j is number 4 j + e: for every word of operand A its lower and upper number.
std::string packed(Request&) {
  constexpr int kSteps = 3;
  float d[2 * kSteps][4];
  for (int i = 0; i < 8 * kSteps; ++i) d[i / 4][i % 4] = static_cast<float>(i);
  uint32_t a[kSteps][4];
  sm90::pack<WholeNumber>(a, d);
  std::vector<Rows> steps;
  for (const auto& step : a) {
    steps.emplace_back();
    for (uint32_t word : step) steps.back().push_back({static_cast<int>(word & 0xffff), static_cast<int>(word >> 16)});
  }
  return json(steps);
}

// Word i of lane l is 4 l + i before: what the lanes have after.
std::string transposed(Request&) {
  Rows lanes(kLanes);
  run_warp([&](int lane) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = 4 * lane + i;
    sm90::transpose_quad(words, lane);
    lanes[lane].assign(words, words + 4);
  });
  return json(lanes);
}

// first row of the warp, rows used, stored, head dim; element (row, column) of the warp's 16 x 64 is 64 row + column:
// the matrix afterwards, 65535 where nothing was written
std::string stored(Request& request) {
  constexpr int kFragments = 8, kStride = 72, kRows = 48;
  const int first_row = request.next();
  const sm90::RowCounts rows{request.next(), request.next()};
  const int head_dim = request.next();
  alignas(16) static uint16_t matrix[kRows * kStride];
  std::fill_n(matrix, kRows * kStride, uint16_t{0xffff});
  run_warp([&](int lane) {
    float fragments[kFragments][4];
    for (int j = 0; j < kFragments; ++j) {
      for (int e = 0; e < 4; ++e) {
        fragments[j][e] = static_cast<float>(64 * (lane / 4 + 8 * (e / 2)) + 8 * j + 2 * (lane % 4) + e % 2);
      }
    }
    sm90::store_rows<WholeNumber>(fragments, matrix, kStride, first_row + lane / 4, rows, head_dim, lane);
  });
  Rows result(kRows);
  for (int row = 0; row < kRows; ++row) result[row].assign(matrix + row * kStride, matrix + (row + 1) * kStride);
  return json(result);
}

template <int kStages>
std::string cursor_of(int steps) {
  Rows places;
  sm90::Cursor<kStages> cursor;
  for (int step = 0; step < steps; ++step) {
    places.push_back({cursor.stage, cursor.parity});
    cursor.advance();
  }
  return json(places);
}

// stages, steps: stage and parity before each step
std::string cursor(Request& request) {
  const int stages = request.next(), steps = request.next();
  if (stages == 1) return cursor_of<1>(steps);
  if (stages == 2) return cursor_of<2>(steps);
  if (stages == 3) return cursor_of<3>(steps);
  throw std::runtime_error("cursor: so many stages are not here");
}

}  // namespace

int main() {
  return answer_all({
      {"backward_config", backward_config},
      {"backward_works", backward_works},
      {"chunks", chunks},
      {"clean", clean},
      {"config", config},
      {"cursor", cursor},
      {"descriptor", descriptor},
      {"masked", masked},
      {"masked_transposed", masked_transposed},
      {"order", order},
      {"packed", packed},
      {"static_positions", static_positions},
      {"stored", stored},
      {"tile_order", tile_order},
      {"transposed", transposed},
      {"turns", turns},
      {"visible_queries", visible_queries},
      {"visible_tiles", visible_tiles},
      {"works", works},
  });
}
