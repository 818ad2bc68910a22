// Compiles if csrc/gemm/cublaslt_abi.h agrees with NVIDIA's header.
#include <cublasLt.h>

#include "gemm/cublaslt_abi.h"

namespace ours = flash_attn::gemm;

static_assert(sizeof(ours::LtAlgorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(ours::LtCandidate) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(ours::LtCandidate, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(ours::LtCandidate, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(ours::LtCandidate, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
static_assert(sizeof(ours::LtStatus) == sizeof(cublasStatus_t) && ours::kLtSuccess == CUBLAS_STATUS_SUCCESS);
static_assert(ours::kLtComputeFloat == CUBLAS_COMPUTE_32F);
static_assert(ours::kLtFloat == CUDA_R_32F && ours::kLtHalf == CUDA_R_16F && ours::kLtBFloat16 == CUDA_R_16BF);
static_assert(ours::kLtAsIs == CUBLAS_OP_N && ours::kLtTransposed == CUBLAS_OP_T);
static_assert(ours::kLtTransposeA == CUBLASLT_MATMUL_DESC_TRANSA && ours::kLtTransposeB == CUBLASLT_MATMUL_DESC_TRANSB);
static_assert(ours::kLtEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(ours::kLtBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(ours::kLtAuxPointer == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
static_assert(ours::kLtAuxLeading == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
static_assert(ours::kLtMaxWorkspaceBytes == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(ours::kLtAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(ours::kLtAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(ours::kLtAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(ours::kLtAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(ours::kLtDefault == CUBLASLT_EPILOGUE_DEFAULT && ours::kLtBias == CUBLASLT_EPILOGUE_BIAS);
static_assert(ours::kLtReluBias == CUBLASLT_EPILOGUE_RELU_BIAS);
static_assert(ours::kLtReluAuxBias == CUBLASLT_EPILOGUE_RELU_AUX_BIAS);
static_assert(ours::kLtGeluBias == CUBLASLT_EPILOGUE_GELU_BIAS);
static_assert(ours::kLtGeluAuxBias == CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
static_assert(ours::kLtReluGradient == CUBLASLT_EPILOGUE_DRELU);
static_assert(ours::kLtReluBiasGradient == CUBLASLT_EPILOGUE_DRELU_BGRAD);
static_assert(ours::kLtGeluGradient == CUBLASLT_EPILOGUE_DGELU);
static_assert(ours::kLtGeluBiasGradient == CUBLASLT_EPILOGUE_DGELU_BGRAD);
static_assert(ours::kLtBiasGradientB == CUBLASLT_EPILOGUE_BGRADB);

// Each of our functions can be called as theirs: as many arguments, each of the size of theirs.
template <typename Ours, typename Theirs>
constexpr bool same_call = false;
template <typename R, typename... A, typename S, typename... B>
  requires(sizeof...(A) == sizeof...(B))
constexpr bool same_call<R (*)(A...), S (*)(B...)> = sizeof(R) == sizeof(S) && ((sizeof(A) == sizeof(B)) && ...);

static_assert(same_call<decltype(ours::LtFunctions::create), decltype(&cublasLtCreate)>);
static_assert(same_call<decltype(ours::LtFunctions::version), decltype(&cublasLtGetVersion)>);
static_assert(same_call<decltype(ours::LtFunctions::status_string), decltype(&cublasLtGetStatusString)>);
static_assert(same_call<decltype(ours::LtFunctions::description_create), decltype(&cublasLtMatmulDescCreate)>);
static_assert(same_call<decltype(ours::LtFunctions::description_destroy), decltype(&cublasLtMatmulDescDestroy)>);
static_assert(same_call<decltype(ours::LtFunctions::description_set), decltype(&cublasLtMatmulDescSetAttribute)>);
static_assert(same_call<decltype(ours::LtFunctions::layout_create), decltype(&cublasLtMatrixLayoutCreate)>);
static_assert(same_call<decltype(ours::LtFunctions::preference_create), decltype(&cublasLtMatmulPreferenceCreate)>);
static_assert(same_call<decltype(ours::LtFunctions::preference_destroy), decltype(&cublasLtMatmulPreferenceDestroy)>);
static_assert(same_call<decltype(ours::LtFunctions::preference_set), decltype(&cublasLtMatmulPreferenceSetAttribute)>);
static_assert(same_call<decltype(ours::LtFunctions::candidates), decltype(&cublasLtMatmulAlgoGetHeuristic)>);
static_assert(same_call<decltype(ours::LtFunctions::matmul), decltype(&cublasLtMatmul)>);
