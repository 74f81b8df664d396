#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace saelens_certify {

Isa detected_isa() {
#if SAELENS_CERTIFY_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("SAELENS_CERTIFY_ISA");
    const std::string name = wanted == nullptr ? "" : wanted;
    if (name.empty()) return detected_isa();
    for (const Isa limit : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
      if (name == isa_name(limit)) return std::min(limit, detected_isa());
    }
    throw std::runtime_error("SAELENS_CERTIFY_ISA=" + name +
                             " is unknown: choose scalar, avx2 or avx512, or leave it unset");
  }();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace saelens_certify
