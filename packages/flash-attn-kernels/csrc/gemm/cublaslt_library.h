// cuBLASLt, taken at run time from the library that torch uses.
#pragma once

#include "cublaslt_abi.h"

namespace flash_attn::gemm {

// The functions, or nullptr where no cuBLASLt is found.
const LtFunctions* find_cublaslt();

// The same, with an exception that says what was looked for.
const LtFunctions& cublaslt();

// The handle of a device, which is current; made on first use.
LtHandle cublaslt_handle(int device);

// Throws unless the call succeeded, with cuBLASLt's own words.
void check_cublaslt(LtStatus status, const char* call);

}  // namespace flash_attn::gemm
