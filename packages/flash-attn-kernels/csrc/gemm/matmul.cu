#include "matmul.h"

#include <algorithm>
#include <compare>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../api/cuda_check.h"
#include "cublaslt_library.h"

namespace flash_attn::gemm {

namespace {

// The largest alignment that cuBLASLt asks about.
int alignment(const void* pointer) {
  constexpr uintptr_t kMax = 256;
  const auto address = reinterpret_cast<uintptr_t>(pointer) | kMax;
  return static_cast<int>(address & -address);
}

// Everything that a choice of algorithms depends on.
struct Key {
  int64_t rows, columns, depth, a_leading, b_leading, aux_leading, max_workspace_bytes;
  bool a_transposed, b_transposed;
  int type, device;
  uint32_t epilogue;
  int a_alignment, b_alignment, out_alignment, bias_alignment, aux_alignment;
  auto operator<=>(const Key&) const = default;
};

Key key_of(const Product& p) {
  return {p.out.rows,
          p.out.columns,
          p.a.columns,
          p.a.leading,
          p.b.leading,
          p.aux_leading,
          p.max_workspace_bytes,
          p.a.transposed,
          p.b.transposed,
          p.type,
          p.device,
          p.epilogue,
          alignment(p.a.data),
          alignment(p.b.data),
          alignment(p.out.data),
          alignment(p.bias),
          alignment(p.aux)};
}

// cuBLASLt is column-major, where a row-major matrix is its transpose: it computes out' = b' a', so that our second
// factor is its first.
class Description {
 public:
  explicit Description(const Product& product) {
    const LtFunctions& lt = cublaslt();
    check_cublaslt(lt.description_create(&description_, kLtComputeFloat, kLtFloat), "cublasLtMatmulDescCreate");
    set(kLtTransposeA, static_cast<int32_t>(product.b.transposed ? kLtTransposed : kLtAsIs));
    set(kLtTransposeB, static_cast<int32_t>(product.a.transposed ? kLtTransposed : kLtAsIs));
    set(kLtEpilogue, static_cast<uint32_t>(product.epilogue));
    if (product.bias != nullptr) set(kLtBiasPointer, product.bias);
    if (product.aux != nullptr) {
      set(kLtAuxPointer, product.aux);
      set(kLtAuxLeading, product.aux_leading);
    }
  }
  ~Description() { cublaslt().description_destroy(description_); }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;
  LtDescription get() const { return description_; }

 private:
  template <typename Value>
  void set(LtDescriptionAttribute attribute, Value value) {
    const LtStatus status = cublaslt().description_set(description_, attribute, &value, sizeof value);
    if (status == kLtSuccess) return;
    cublaslt().description_destroy(description_);
    check_cublaslt(status, "cublasLtMatmulDescSetAttribute");
  }
  LtDescription description_ = nullptr;
};

class Preference {
 public:
  Preference() { check_cublaslt(cublaslt().preference_create(&preference_), "cublasLtMatmulPreferenceCreate"); }
  ~Preference() { cublaslt().preference_destroy(preference_); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  LtPreference get() const { return preference_; }
  template <typename Value>
  void set(LtPreferenceAttribute attribute, Value value) {
    check_cublaslt(cublaslt().preference_set(preference_, attribute, &value, sizeof value),
                   "cublasLtMatmulPreferenceSetAttribute");
  }

 private:
  LtPreference preference_ = nullptr;
};

// What is kept for a problem, for as long as the process lives.
struct Plan {
  LtLayout a, b, out;  // of our matrices
  std::vector<LtCandidate> candidates;
  int tuned = -1;  // index of the candidate that was fastest; -1 before there was a timing
};

LtLayout layout_of(const Matrix& matrix, int type) {
  const int64_t rows = matrix.transposed ? matrix.rows : matrix.columns;  // column-major
  const int64_t columns = matrix.transposed ? matrix.columns : matrix.rows;
  LtLayout layout = nullptr;
  check_cublaslt(cublaslt().layout_create(&layout, type, rows, columns, matrix.leading), "cublasLtMatrixLayoutCreate");
  return layout;
}

std::string shape_of(const Product& p) {
  return "(" + std::to_string(p.a.rows) + " x " + std::to_string(p.a.columns) + ") (" + std::to_string(p.b.rows) +
         " x " + std::to_string(p.b.columns) + "), epilogue " + std::to_string(p.epilogue);
}

Plan make_plan(const Product& product, const Description& description) {
  Plan plan{layout_of(product.a, product.type), layout_of(product.b, product.type),
            layout_of(product.out, product.type), std::vector<LtCandidate>(kCandidates)};
  Preference preference;
  preference.set(kLtMaxWorkspaceBytes, static_cast<uint64_t>(product.max_workspace_bytes));
  preference.set(kLtAlignmentA, static_cast<uint32_t>(alignment(product.b.data)));
  preference.set(kLtAlignmentB, static_cast<uint32_t>(alignment(product.a.data)));
  preference.set(kLtAlignmentC, static_cast<uint32_t>(alignment(product.out.data)));
  preference.set(kLtAlignmentD, static_cast<uint32_t>(alignment(product.out.data)));
  int found = 0;
  const LtStatus status =
      cublaslt().candidates(cublaslt_handle(product.device), description.get(), plan.b, plan.a, plan.out, plan.out,
                            preference.get(), kCandidates, plan.candidates.data(), &found);
  plan.candidates.resize(status == kLtSuccess ? found : 0);
  std::erase_if(plan.candidates, [](const LtCandidate& candidate) { return candidate.status != kLtSuccess; });
  if (plan.candidates.empty()) {
    throw std::runtime_error("cuBLASLt " + std::to_string(cublaslt().version()) + " has no algorithm for " +
                             shape_of(product) +
                             (status == kLtSuccess ? "" : std::string(": ") + cublaslt().status_string(status)));
  }
  return plan;
}

std::mutex plans_mutex;

// Guarded by plans_mutex, a plan's `tuned` included; what else is in a plan stays as it was made, where it was made.
Plan& plan_of(const Product& product, const Description& description) {
  static std::map<Key, Plan> plans;
  const Key key = key_of(product);
  auto found = plans.find(key);
  if (found == plans.end()) found = plans.emplace(key, make_plan(product, description)).first;
  return found->second;
}

LtStatus launch(const Product& product, const Description& description, const Plan& plan, const LtCandidate& candidate,
                void* workspace, cudaStream_t stream) {
  const float one = 1, zero = 0;
  return cublaslt().matmul(cublaslt_handle(product.device), description.get(), &one, product.b.data, plan.b,
                           product.a.data, plan.a, &zero, product.out.data, plan.out, product.out.data, plan.out,
                           &candidate.algorithm, workspace, candidate.workspace_bytes, stream);
}

class Event {
 public:
  Event() { FLASH_ATTN_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// The candidate with the shortest of a few runs, of those that run. The results are written again and again, alike.
int fastest(const Product& product, const Description& description, const Plan& plan, cudaStream_t stream,
            const std::function<void*(int64_t)>& workspace) {
  constexpr int kRuns = 4;  // the first warms up
  size_t bytes = 0;
  for (const LtCandidate& candidate : plan.candidates) bytes = std::max(bytes, candidate.workspace_bytes);
  void* scratch = bytes > 0 ? workspace(static_cast<int64_t>(bytes)) : nullptr;
  const Event start, stop;
  int best = 0;
  float best_ms = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < plan.candidates.size(); ++i) {
    for (int run = 0; run < kRuns; ++run) {
      FLASH_ATTN_CUDA_CHECK(cudaEventRecord(start.get(), stream));
      if (launch(product, description, plan, plan.candidates[i], scratch, stream) != kLtSuccess) break;
      FLASH_ATTN_CUDA_CHECK(cudaEventRecord(stop.get(), stream));
      FLASH_ATTN_CUDA_CHECK(cudaEventSynchronize(stop.get()));
      float ms = 0;
      FLASH_ATTN_CUDA_CHECK(cudaEventElapsedTime(&ms, start.get(), stop.get()));
      if (run > 0 && ms < best_ms) best = static_cast<int>(i), best_ms = ms;
    }
  }
  return best;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  FLASH_ATTN_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

int candidate_count(const Product& product) {
  const Description description(product);
  const std::lock_guard lock(plans_mutex);
  return static_cast<int>(plan_of(product, description).candidates.size());
}

void run(const Product& product, int64_t algorithm, cudaStream_t stream,
         const std::function<void*(int64_t bytes)>& workspace) {
  const Description description(product);
  Plan* plan = nullptr;
  {
    const std::lock_guard lock(plans_mutex);
    plan = &plan_of(product, description);
    if (algorithm == kTuned) {
      if (plan->tuned < 0 && !is_capturing(stream)) {
        plan->tuned = fastest(product, description, *plan, stream, workspace);
      }
      algorithm = std::max(plan->tuned, 0);
    }
  }
  if (algorithm < 0 || algorithm >= static_cast<int64_t>(plan->candidates.size())) {
    throw std::runtime_error("algorithm: got " + std::to_string(algorithm) + "; expected one below " +
                             std::to_string(plan->candidates.size()) +
                             ", which is how many cuBLASLt proposes here, or -1 for the fastest of them");
  }
  const LtCandidate& candidate = plan->candidates[algorithm];
  void* scratch = candidate.workspace_bytes > 0 ? workspace(static_cast<int64_t>(candidate.workspace_bytes)) : nullptr;
  check_cublaslt(launch(product, description, *plan, candidate, scratch, stream), "cublasLtMatmul");
}

}  // namespace flash_attn::gemm
