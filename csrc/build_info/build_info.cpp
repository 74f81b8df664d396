#include "build_info/build_info.h"

#include <stdexcept>

#include "common/isa.h"

namespace saelens_certify {

namespace {

// Whoever asks what is wrong must get an answer.
std::string active_isa_name() {
  try {
    return isa_name(active_isa());
  } catch (const std::runtime_error&) {
    return "none";
  }
}

}  // namespace

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " + std::to_string(__clang_major__) + "." +
                               std::to_string(__clang_minor__) + "." +
                               std::to_string(__clang_patchlevel__);
#elif defined(__GNUC__)
  const std::string compiler = "gcc " + std::to_string(__GNUC__) + "." +
                               std::to_string(__GNUC_MINOR__) + "." +
                               std::to_string(__GNUC_PATCHLEVEL__);
#else
  const std::string compiler = "unknown";
#endif
  return {{"compiler", compiler},
          {"cpp_standard", std::to_string(__cplusplus)},
          {"isa_detected", isa_name(detected_isa())},
          {"isa_active", active_isa_name()}};
}

}  // namespace saelens_certify
