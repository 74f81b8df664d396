// The emulated library's operators: the schemas of the real ones, under a name of their own.
#include <torch/csrc/stable/library.h>

#include "ops/schemas.h"

STABLE_TORCH_LIBRARY(saelens_certify_emulated, m) {
  namespace schemas = saelens_certify::schemas;
  m.def(schemas::kTopkEncode);
  m.def(schemas::kThresholdEncode);
  m.def(schemas::kRestrict);
  m.def(schemas::kPoolCount);
  m.def(schemas::kCountOutside);
  m.def(schemas::kDecode);
  m.def(schemas::kDecodeStats);
  m.def(schemas::kDecodePermuted);
  m.def(schemas::kDecodePermutedStats);
  m.def(schemas::kTokenStats);
  m.def(schemas::kPairStats);
  m.def(schemas::kHeadStats);
  m.def(schemas::kHeadPairStats);
}
