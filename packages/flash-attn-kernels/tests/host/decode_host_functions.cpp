// The parts of inference attention that need no GPU, from the very headers that the kernels include, for the CPU. The
// tests beside this file say what comes out.

#include "device_math_on_host.h"
#include "warp_on_host.h"

#include "attention/decode/append.cuh"
#include "attention/decode/decode.cuh"
#include "attention/decode/grid.h"
#include "requests.h"

namespace {

using namespace flash_attn;
using namespace flash_attn::decode;

using Rows = std::vector<std::vector<int>>;

// What a request says of a call of attention: heads, heads of a group, rows of q, rows that an entry of the cache has
// room for, window (-1 is unbounded), lengths, leftpad (empty: none), cumulative lengths of q (empty: dense),
// num_splits, whether batch-invariant, multiprocessors; rows that are appended in the same call, their cumulative
// lengths.
struct Call {
  std::vector<int> lengths, leftpad, cu_seqlens, cu_added;
  DecodeParams params{};
  int num_splits, multiprocessors;
  bool batch_invariant;

  explicit Call(Request& request) {
    params.shape.heads = request.next();
    params.shape.heads_per_kv_head = request.next();
    params.queries.rows = params.queries.capacity = request.next();
    params.cache.capacity = params.cache.page_size = request.next();
    params.cache.pages = INT_MAX;
    const auto side = [](int value) { return value < 0 ? Window::kUnbounded : value; };
    params.window.left = side(request.next());
    params.window.right = side(request.next());
    lengths = request.next_list(), leftpad = request.next_list(), cu_seqlens = request.next_list();
    params.shape.batch = static_cast<int>(lengths.size());
    params.cache.lengths = lengths.data();
    if (!leftpad.empty()) params.cache.leftpad = leftpad.data();
    if (!cu_seqlens.empty()) params.queries.cu_seqlens = cu_seqlens.data();
    num_splits = request.next();
    batch_invariant = request.next() != 0;
    multiprocessors = request.next();
    params.added.rows = params.added.capacity = request.next();
    cu_added = request.next_list();
    if (!cu_added.empty()) params.added.cu_seqlens = cu_added.data();
  }
  Call(const Call&) = delete;

  template <typename Config>
  DecodeGrid grid() {
    return decode_grid<Config>(params, num_splits, batch_invariant, multiprocessors);
  }
};

std::string json_of(const DecodeGrid& grid) { return json(std::vector<int64_t>{grid.blocks, grid.items, grid.slots}); }

template <typename Config>
std::vector<Piece> pieces_of(const DecodeParams& params, int block) {
  std::vector<Piece> lanes[kLanes];
  run_warp([&](int lane) {
    DecodePlan<Config> plan(params, block);
    for (Piece piece; plan.next(piece);) lanes[lane].push_back(piece);
  });
  const auto same = [](const Piece& a, const Piece& b) {
    return a.index == b.index && a.item == b.item && a.part == b.part && a.tile_begin == b.tile_begin &&
           a.tile_end == b.tile_end && a.slot(a.part) == b.slot(b.part);
  };
  for (const auto& lane : lanes) {
    if (!std::ranges::equal(lane, lanes[0], same)) throw std::runtime_error("lanes disagree");
  }
  return lanes[0];
}

template <typename Config>
std::string plan_of(Call& call) {
  const DecodeGrid grid = call.grid<Config>();
  std::vector<std::vector<Rows>> blocks;
  for (int block = 0; grid.items > 0 && block < grid.blocks; ++block) {
    blocks.emplace_back();
    for (const Piece& piece : pieces_of<Config>(call.params, block)) {
      std::vector<int> slots;
      for (int part = 0; piece.parts > 1 && part < piece.parts; ++part) slots.push_back(piece.slot(part));
      blocks.back().push_back({{piece.index, piece.kv_head, piece.row_tile, piece.item, piece.tile_begin,
                                piece.tile_end, piece.part, piece.parts},
                               slots});
    }
  }
  return json({{"grid", json_of(grid)}, {"blocks", json(blocks)}});
}

template <typename Function>
std::string with_columns(int columns, const Function& function) {
  if (columns == 64) return function(DecodeConfig<64, 4, 4, 2>{});
  if (columns == 32) return function(DecodeConfig<256, 2, 2, 1>{});
  throw std::runtime_error("there are no tiles of so many keys here");
}

// keys of a tile, call: blocks, items and slots
std::string grid(Request& request) {
  const int columns = request.next();
  Call call(request);
  return with_columns(columns, [&]<typename Config>(Config) { return json_of(call.grid<Config>()); });
}

// keys of a tile, call: the pieces of every block
std::string plan(Request& request) {
  const int columns = request.next();
  Call call(request);
  return with_columns(columns, [&]<typename Config>(Config) { return plan_of<Config>(call); });
}

// call: of every sequence how many keys it has and the key on whose diagonal its first query lies, for the decode
// kernel and for those for training, which take long queries
std::string alignments(Request& request) {
  const Call call(request);
  const DecodeParams& decode = call.params;
  std::vector<int> lengths;
  for (int index = 0; index < decode.shape.batch; ++index) {
    lengths.push_back(length_of(decode.cache, decode.added, decode.shape.batch, index));
  }
  AttentionParams params{};
  params.shape = decode.shape;
  params.queries = decode.queries;
  params.keys = {nullptr, lengths.data(), decode.cache.page_size, decode.cache.capacity};
  Rows rows;
  for (int index = 0; index < decode.shape.batch; ++index) {
    const DecodeSequence few(decode, index, 16, 64);
    const Sequence many(params, index);
    rows.push_back({few.last_key + 1, few.shift, many.seqlen_k, many.shift});
  }
  return json(rows);
}

// Numbers in [-4, 4) that the tests compute likewise.
float number_at(int64_t seed, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t mixed = (seed * 8191 + a * 7919 + b * 104729 + c * 1299709 + d * 15485863) % 100003;
  return static_cast<float>(mixed * mixed % 8192) / 1024.f - 4.f;
}

// What attend() leaves in the buffer: score and value of a key are number_at(), but scores of query `broken` are no
// numbers.
template <typename Config>
void attend_on_host(const DecodeParams& params, const Piece& piece, const DecodeSequence& sequence,
                    const MergeBuffer<Config>& buffer, int broken) {
  for (int i = 0; i < Config::kWarps * Config::kRows; ++i) {
    const int warp = i / Config::kRows;
    const ItemRow row(params, sequence, piece.kv_head, piece.row_tile * Config::kRows + i % Config::kRows);
    const int diagonal = row.query + sequence.shift;
    const auto score = [&](int key) {
      return row.query == broken ? NAN : kLog2e * number_at(1, piece.index, row.head, row.query, key);
    };
    std::vector<int> visible;
    float maximum = -INFINITY;
    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      for (int key = tile * Config::kColumns + warp * Config::kWarpKeys, end = key + Config::kWarpKeys; key < end;
           ++key) {
        if (key < sequence.first_key || key > sequence.last_key) continue;
        if (key < diagonal - params.window.left || key > diagonal + params.window.right) continue;
        visible.push_back(key);
        maximum = std::fmax(maximum, score(key));
      }
    }
    float* const out = buffer.out + i * Config::kHeadDimV;
    std::fill_n(out, Config::kHeadDimV, 0.f);
    buffer.maximum[i] = maximum, buffer.sum[i] = 0.f;
    for (const int key : visible) {
      const float weight = std::exp2(score(key) - (maximum == -INFINITY ? 0.f : maximum));
      buffer.sum[i] += weight;
      for (int column = 0; column < params.shape.head_dim_v; ++column) {
        out[column] += weight * number_at(2, piece.index, piece.kv_head, key, column);
      }
    }
  }
}

template <typename Config, typename Function>
void for_each_thread(const Function& function) {
  for (unsigned thread = 0; thread < Config::kThreads; ++thread) {
    threadIdx.x = thread;
    function();
  }
}

// call, head dim of v, sinks in thousandths (empty: none), the query whose scores are no numbers (-1: none), blocks in
// the order in which they run, as far as that is not their own: the output and the bits of the log-sum-exp
std::string merged(Request& request) {
  using Config = DecodeConfig<64, 4, 4, 2>;
  Call call(request);
  DecodeParams& params = call.params;
  const DecodeGrid grid = call.grid<Config>();
  params.shape.head_dim_v = request.next();
  std::vector<float> sinks;
  for (const int sink : request.next_list()) sinks.push_back(static_cast<float>(sink) / 1000.f);
  if (!sinks.empty()) params.learnable_sink = sinks.data();
  const int broken = request.next();
  const int step = request.next();  // from one block to the next: coprime to their number

  const int heads = params.shape.heads, rows = params.queries.rows;
  const int matrices = params.queries.cu_seqlens == nullptr ? params.shape.batch : 1;
  const int row_stride = heads * params.shape.head_dim_v + 8;  // 8 that nobody may write
  std::vector<uint4> out(matrices * rows * row_stride / 8, uint4{~0u, ~0u, ~0u, ~0u});
  params.out = {out.data(), matrices == 1 ? 0 : int64_t{rows} * row_stride, row_stride, params.shape.head_dim_v};
  std::vector<float> lse(matrices * heads * rows, NAN);
  params.lse = lse.data();
  params.lse_batch_stride = matrices == 1 ? 0 : int64_t{heads} * rows, params.lse_head_stride = rows;
  std::vector<float4> out_partial(grid.slots * Config::kRows * Config::kHeadDimV / 4, float4{NAN, NAN, NAN, NAN});
  std::vector<float> lse_partial(grid.slots * Config::kRows, NAN);
  params.out_partial = reinterpret_cast<float*>(out_partial.data()), params.lse_partial = lse_partial.data();
  std::vector<int> finished(grid.items);
  std::vector<float4> shared(Config::kMergeBytes / 16);
  const MergeBuffer<Config> buffer(reinterpret_cast<uint8_t*>(shared.data()));
  std::vector<float> part_lse(Config::kRows * Config::kMostParts, NAN);

  for (int64_t number = 0; number < grid.blocks; ++number) {
    const int block = static_cast<int>(number * step % grid.blocks);
    for (const Piece& piece : pieces_of<Config>(params, block)) {
      const DecodeSequence sequence(params, piece.index, Config::kRows, Config::kColumns);
      attend_on_host<Config>(params, piece, sequence, buffer, broken);
      for_each_thread<Config>([&] { merge_warps<__half>(params, piece, sequence, buffer); });
      if (piece.parts > 1 && finished.at(piece.item)++ == piece.parts - 1) {
        for_each_thread<Config>([&] { load_part_lse<Config>(params, piece, sequence, part_lse.data()); });
        for_each_thread<Config>([&] { merge_parts<__half, Config>(params, piece, sequence, part_lse.data()); });
      }
    }
  }
  std::vector<int> lse_bits, out_bits;
  for (const float value : lse) lse_bits.push_back(std::bit_cast<int>(value));
  const uint16_t* const elements = reinterpret_cast<const uint16_t*>(out.data());
  out_bits.assign(elements, elements + out.size() * 8);
  return json({{"out", json(out_bits)}, {"lse", json(lse_bits)}});
}

// 16-bit numbers of a tensor in their memory, and its strides: elements, first one, batch, row, head.
struct Memory {
  std::vector<uint16_t> elements;
  TensorView view;

  explicit Memory(Request& request) {
    for (const int element : request.next_list()) elements.push_back(static_cast<uint16_t>(element));
    const int first = request.next();
    view.data = elements.data() + first;
    view.batch_stride = request.next(), view.row_stride = request.next(), view.head_stride = request.next();
  }
  Memory(const Memory&) = delete;
  std::string text() const { return json(std::vector<int>(elements.begin(), elements.end())); }
};

// Integers of which none means that there is no such argument.
const int* data_or_null(const std::vector<int>& list) { return list.empty() ? nullptr : list.data(); }

// Cosines or sines: those of 16 bits as numbers, those of 32 as their bits.
std::vector<uint8_t> table(const std::vector<int>& numbers, NumberType type) {
  const size_t size = type == NumberType::kFloat ? 4 : 2;  // the lower bytes come first
  std::vector<uint8_t> bytes;
  for (const int& number : numbers) {
    const uint8_t* const first = reinterpret_cast<const uint8_t*>(&number);
    bytes.insert(bytes.end(), first, first + size);
  }
  return bytes;
}

// whether bfloat16, kv heads, heads, head dims, rows of k, of q, capacity, page size, pages, rows and stride of the
// page table; lengths, entries, page table, cumulative lengths of k, of q (empty: none); rotary type, rows, dim,
// interleaved, q per position, tables; memory of k, v, q, q_out, k_cache, v_cache, and integers to set to 0: that of
// the last four afterwards
std::string append(Request& request) {
  AppendParams params{};
  const bool is_bfloat16 = request.next() != 0;
  params.kv_heads = request.next(), params.heads = request.next();
  params.head_dim = request.next(), params.head_dim_v = request.next();
  params.added.rows = request.next(), params.queries.rows = request.next();
  params.cache.capacity = request.next(), params.cache.page_size = request.next();
  params.cache.pages = request.next(), params.cache.page_entries = request.next();
  params.cache.page_table_stride = request.next();
  const std::vector<int> lengths = request.next_list(), entries = request.next_list(), pages = request.next_list();
  const std::vector<int> cu_added = request.next_list(), cu_queries = request.next_list();
  params.batch = static_cast<int>(lengths.size());
  params.cache.lengths = lengths.data();
  params.cache.entries = data_or_null(entries), params.cache.page_table = data_or_null(pages);
  params.added.cu_seqlens = data_or_null(cu_added), params.queries.cu_seqlens = data_or_null(cu_queries);
  params.rotary_type = static_cast<NumberType>(request.next());
  params.rotary_rows = request.next(), params.rotary_dim = request.next();
  params.interleaved = request.next() != 0, params.q_per_position = request.next() != 0;
  const std::vector<uint8_t> cos = table(request.next_list(), params.rotary_type);
  const std::vector<uint8_t> sin = table(request.next_list(), params.rotary_type);
  if (params.rotary_dim > 0) params.cos = cos.data(), params.sin = sin.data();
  Memory k(request), v(request), q(request), q_out(request), k_cache(request), v_cache(request);
  params.k = k.view, params.v = v.view, params.q = q.view, params.q_out = q_out.view;
  params.cache.k = k_cache.view, params.cache.v = v_cache.view;

  std::vector<int> zeroed = request.next_list();
  params.zeroed = zeroed.data(), params.zeroed_count = static_cast<int>(zeroed.size()) - 1;  // not the last one

  blockDim = dim3(kAppendThreads);
  const int64_t blocks = append_blocks(params);
  gridDim = dim3(static_cast<unsigned>(blocks));
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < kAppendThreads; ++threadIdx.x) {
      is_bfloat16 ? append_kernel<__nv_bfloat16>(params) : append_kernel<__half>(params);
    }
  }
  return json(
      {{"q_out", q_out.text()}, {"k_cache", k_cache.text()}, {"v_cache", v_cache.text()}, {"zeroed", json(zeroed)}});
}

}  // namespace

int main() {
  return answer_all({
      {"alignments", alignments},
      {"append", append},
      {"grid", grid},
      {"merged", merged},
      {"plan", plan},
  });
}
