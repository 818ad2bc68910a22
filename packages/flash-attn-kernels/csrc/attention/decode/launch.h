// The launchers of inference attention.
#pragma once

#include "../launch.h"
#include "config.h"
#include "params.h"

namespace flash_attn::decode {

// With the configuration that with_decode_config() chooses.
template <typename Element, int kHeadDim>
void launch_decode(const DecodeParams& params, int64_t blocks, const LaunchTarget& target);

enum class NumberType : int { kHalf, kBFloat16, kFloat };

// New rows of keys and values for the cache, and queries that are rotated on the way.
struct AppendParams {
  int batch;
  RowLayout added, queries;  // rows of k and v, and of q
  int kv_heads, heads;       // heads is 0 without queries
  int head_dim, head_dim_v;
  TensorView k, v, q, q_out;
  CacheLayout cache;  // lengths are those before
  const void* cos;    // (rows, rotary_dim / 2), null without rotation
  const void* sin;
  NumberType rotary_type;
  int rotary_rows, rotary_dim;
  bool interleaved;     // element 2 i turns with 2 i + 1, not i with i + rotary_dim / 2
  bool q_per_position;  // query i is turned as the key at its position, not all as the first
};

template <typename Element>
void launch_append(const AppendParams& params, const LaunchTarget& target);

}  // namespace flash_attn::decode
