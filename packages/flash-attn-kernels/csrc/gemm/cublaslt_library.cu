#include "cublaslt_library.h"

#include <dlfcn.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

namespace flash_attn::gemm {

namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
constexpr int kDevices = 64;

// What the process has loaded already comes first: it is what torch was built for.
void* open_library() {
  for (const int flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY | RTLD_LOCAL}) {
    for (const char* name : kNames) {
      if (void* library = dlopen(name, flags)) return library;
    }
  }
  return nullptr;
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

bool find_all(void* library, LtFunctions& lt) {
  return find(library, "cublasLtCreate", lt.create) && find(library, "cublasLtGetVersion", lt.version) &&
         find(library, "cublasLtGetStatusString", lt.status_string) &&
         find(library, "cublasLtMatmulDescCreate", lt.description_create) &&
         find(library, "cublasLtMatmulDescDestroy", lt.description_destroy) &&
         find(library, "cublasLtMatmulDescSetAttribute", lt.description_set) &&
         find(library, "cublasLtMatrixLayoutCreate", lt.layout_create) &&
         find(library, "cublasLtMatmulPreferenceCreate", lt.preference_create) &&
         find(library, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy) &&
         find(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set) &&
         find(library, "cublasLtMatmulAlgoGetHeuristic", lt.candidates) && find(library, "cublasLtMatmul", lt.matmul);
}

}  // namespace

const LtFunctions* find_cublaslt() {
  static LtFunctions functions{};
  static const bool found = [] {
    void* library = open_library();
    return library != nullptr && find_all(library, functions);
  }();
  return found ? &functions : nullptr;
}

const LtFunctions& cublaslt() {
  if (const LtFunctions* functions = find_cublaslt()) return *functions;
  std::string looked_for;
  for (const char* name : kNames) looked_for += (looked_for.empty() ? "" : ", ") + std::string(name);
  throw std::runtime_error("cuBLASLt was not found: looked for " + looked_for +
                           ", first among what this process has loaded, then by name");
}

LtHandle cublaslt_handle(int device) {
  static std::array<std::once_flag, kDevices> made;
  static std::array<LtHandle, kDevices> handles;
  if (device < 0 || device >= kDevices)
    throw std::runtime_error("gemm: no handle for device " + std::to_string(device));
  std::call_once(made[device], [device] { check_cublaslt(cublaslt().create(&handles[device]), "cublasLtCreate"); });
  return handles[device];
}

void check_cublaslt(LtStatus status, const char* call) {
  if (status == kLtSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cublaslt().status_string(status));
}

}  // namespace flash_attn::gemm
