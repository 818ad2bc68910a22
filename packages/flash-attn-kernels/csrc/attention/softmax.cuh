// Online softmax over tiles of scores: running maximum and sum per row, in base 2.
#pragma once

#include <cmath>

#include "../ptx/convert.cuh"

namespace flash_attn {

// A thread's fragments hold 2 rows (g and g + 8) of each of kRowTiles 16-row tiles; the four threads of a quad share
// a row. Row sums stay per-thread partial until finalize().
template <int kRowTiles>
struct OnlineSoftmax {
  static constexpr int kRows = 2 * kRowTiles;
  float maximum[kRows];  // of the raw scores, before the scale
  float sum[kRows];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      maximum[r] = -INFINITY;
      sum[r] = 0.f;
    }
  }

  // Turns the scores of row r into unnormalised probabilities exp2(scale_log2 * (score - maximum)) and returns the
  // factor that brings what was summed before to the new maximum. kMasked: some rows may have seen no key yet.
  template <bool kMasked, int kColumnTiles>
  __device__ __forceinline__ float advance_row(int r, float (&scores)[kRowTiles][kColumnTiles][4], float scale_log2) {
    const int i = r / 2, half = r % 2;
    float tile_maximum = scores[i][0][2 * half];
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      tile_maximum = fmaxf(tile_maximum, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
    }
    tile_maximum = fmaxf(tile_maximum, __shfl_xor_sync(0xffffffffu, tile_maximum, 1));
    tile_maximum = fmaxf(tile_maximum, __shfl_xor_sync(0xffffffffu, tile_maximum, 2));
    const float new_maximum = fmaxf(maximum[r], tile_maximum);
    // With no visible key so far, shifting by 0 keeps exp2(-inf - 0) = 0 instead of (-inf) - (-inf) = NaN.
    const float shift = (kMasked && new_maximum == -INFINITY) ? 0.f : new_maximum * scale_log2;
    const float correction = ptx::exp2(fmaf(maximum[r], scale_log2, -shift));
    maximum[r] = new_maximum;
    float tile_sum = 0.f;
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[i][j][2 * half + e];
        score = ptx::exp2(fmaf(score, scale_log2, -shift));
        tile_sum += score;
      }
    }
    sum[r] = fmaf(sum[r], correction, tile_sum);
    return correction;
  }

  template <int kOutTiles>
  __device__ __forceinline__ static void rescale_row(int r, float (&accumulator)[kRowTiles][kOutTiles][4],
                                                     float correction) {
    const int i = r / 2, half = r % 2;
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      accumulator[i][j][2 * half] *= correction;
      accumulator[i][j][2 * half + 1] *= correction;
    }
  }

  // Both for all rows.
  template <bool kMasked, int kColumnTiles, int kOutTiles>
  __device__ __forceinline__ void update(float (&scores)[kRowTiles][kColumnTiles][4],
                                         float (&accumulator)[kRowTiles][kOutTiles][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rescale_row(r, accumulator, advance_row<kMasked>(r, scores, scale_log2));
    }
  }

  // Normalises the accumulator times `out_scale` and leaves the natural log-sum-exp of each row in `sum`. Rows from
  // `row_count` on do not exist: they get output 0 and log-sum-exp -inf, as rows do that see nothing. `first_row` is
  // the thread's first row; `scale` turns scores into natural logarithms; the sink, unless -inf, is one more of them.
  template <int kOutTiles>
  __device__ __forceinline__ void finalize(float (&accumulator)[kRowTiles][kOutTiles][4], float scale, float out_scale,
                                           float sink, int first_row, int row_count) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = r / 2, half = r % 2;
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
      float shift = sum[r] == 0.f ? -INFINITY : maximum[r] * scale;
      float normaliser = 1.f;
      if (sink != -INFINITY) {
        const float with_sink = fmaxf(shift, sink);
        normaliser = ptx::exp2((shift - with_sink) * 1.4426950408889634f);
        sum[r] = sum[r] * normaliser + ptx::exp2((sink - with_sink) * 1.4426950408889634f);
        shift = with_sink;
      }
      const bool empty = sum[r] == 0.f || first_row + 16 * i + 8 * half >= row_count;
      normaliser = empty ? 0.f : __fdividef(normaliser * out_scale, sum[r]);
      sum[r] = empty ? -INFINITY : shift + __logf(sum[r]);
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j) {
        accumulator[i][j][2 * half] *= normaliser;
        accumulator[i][j][2 * half + 1] *= normaliser;
      }
    }
  }
};

}  // namespace flash_attn
