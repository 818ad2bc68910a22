// Errors of the CUDA runtime as exceptions. (torch's own macro needs a symbol that CPU-only torch lacks.)
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define FLASH_ATTN_CUDA_CHECK(expression)                                                             \
  do {                                                                                                \
    const cudaError_t status_ = (expression);                                                         \
    if (status_ != cudaSuccess) {                                                                     \
      throw std::runtime_error(std::string(#expression) + " failed: " + cudaGetErrorString(status_)); \
    }                                                                                                 \
  } while (0)
