// Row kernels for the instruction set that the compiler targets anyway.
#include <cmath>
#include <cstring>

#include "ops/cpu/row_kernels.h"

#define SAELENS_CERTIFY_VARIANT baseline
#define SAELENS_CERTIFY_GATHER_WIDTH 0
#include "ops/cpu/row_kernels.inl"

namespace saelens_certify {
const RowKernels kBaselineKernels = baseline::kKernels;
}  // namespace saelens_certify
