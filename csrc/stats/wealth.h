// Wealth of bets on values in [0, 1]: products of a million factors, without overflow. Torch-free.
#pragma once

#include <cstdint>

namespace saelens_certify {

// Bet j stakes the share s = min(limits[i] * mean, caps[j]) of its wealth on value i and holds
// (1 - s) + s * (values[i] / mean) times as much afterwards. The products over all values are
// mantissas[j] * 2^exponents[j], mantissas in [0.5, 1).
//
// The order of operations is part of the contract (the NumPy form follows it to the bit): 16
// factors from left to right, the mantissas of 256 such products from left to right, and so on.
//
// values [n] in [0, 1]; limits [n] nonnegative, infinite for "as the cap says", null if all are;
// mean in [2^-40, 1]; caps [n_caps] in (0, 0.98]: no product of 16 factors can over- or underflow.
void wealth(const double* values, const double* limits, int64_t n, double mean, const double* caps,
            int64_t n_caps, double* mantissas, int64_t* exponents);

}  // namespace saelens_certify
