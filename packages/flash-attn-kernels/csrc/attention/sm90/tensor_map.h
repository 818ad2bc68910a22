// Tensor maps: how the copy engine sees a tensor.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../api/cuda_check.h"
#include "../params.h"
#include "../shared_tile.cuh"

namespace flash_attn::sm90 {

struct TensorExtents {
  int head_dim, rows, heads, batch;
};

// The driver's function, found at run time: linking the driver library would tie the build to a machine with a GPU.
inline auto encode_function() {
  static const auto function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found;
    FLASH_ATTN_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found));
    if (address == nullptr)
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(address);
  }();
  return function;
}

// Boxes are `box_rows` rows of one panel, swizzled as in shared_tile.cuh. Rows are aligned to 16 bytes.
inline CUtensorMap tensor_map(const TensorView& view, const TensorExtents& extents, int box_rows, bool bfloat16) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(extents.head_dim), static_cast<cuuint64_t>(extents.rows),
                               static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  // The stride of a single element is arbitrary and may not be aligned.
  const auto bytes = [](int size, int64_t stride) { return static_cast<cuuint64_t>(size > 1 ? stride * 2 : 16); };
  const cuuint64_t strides[3] = {bytes(extents.rows, view.row_stride), bytes(extents.heads, view.head_stride),
                                 bytes(extents.batch, view.batch_stride)};
  const cuuint32_t box[4] = {kPanelElements, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode_function()(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, view.data, sizes, strides,
      box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace flash_attn::sm90
