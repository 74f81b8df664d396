// Softmax sums of a block of logits; part of row_kernels.inl. With a cap the logits are soft-capped
// first; the largest stays the largest, so that the state's maximum is that of the plain logits.

// exp(x) for x <= 0, relative error below 2e-7; NaN stays NaN, below -87 gives 0. Products and
// sums are rounded separately, so that every instruction set gives the same bits.
SC_INLINE f32x16 exp_nonpositive(f32x16 x) {
  const f32x16 low = splat<f32x16>(-87.0f);
  const f32x16 kept = x < low ? low : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer, which the low mantissa bits then hold.
  const f32x16 shifted = kept * 1.44269504f + 12582912.0f;
  const f32x16 power = shifted - 12582912.0f;
  // ln 2 in two parts; the first has few enough bits for an exact product.
  const f32x16 r = (kept - power * 0.693359375f) - power * -2.12194440e-4f;
  f32x16 p = splat<f32x16>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const i32x16 exponent = ((i32x16)shifted - 0x4b400000 + 127) << 23;
  const f32x16 result = p * (f32x16)exponent;
  return x < low ? splat<f32x16>(0.0f) : result;
}

SC_INLINE float largest(const float* logits, int64_t n) {
  f32x16 top = splat<f32x16>(-__builtin_inff());
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 part = load<f32x16>(logits + i);
    top = part > top ? part : top;
  }
  float best = -__builtin_inff();
  for (int j = 0; j < 16; ++j) best = top[j] > best ? top[j] : best;
  for (; i < n; ++i) best = logits[i] > best ? logits[i] : best;
  return best;
}

// Raises the state's maximum to that of the block; returns what to subtract from (capped) logits.
SC_INLINE double raise_top(const float* logits, int64_t n, int64_t column, double cap,
                           SoftmaxRow* state, double* factor) {
  const auto level = [cap](float top) {
    double capped = top;
    if (cap > 0) softcap(&top, 1, cap, &capped);
    return capped;
  };
  const float best = largest(logits, n);
  *factor = 1.0;
  if (best > state->top) {
    int64_t at = 0;
    while (logits[at] != best) ++at;
    state->argmax = int32_t(column + at);
    *factor = state->sum == 0.0 ? 1.0 : __builtin_exp(level(state->top) - level(best));
    state->top = best;
    state->sum *= *factor;
  }
  // While every logit is -inf there is no maximum to subtract; exp(-inf) = 0 all the same.
  return cap == 0 && state->top == -__builtin_inff() ? 0.0 : level(state->top);
}

SC_INLINE double sum_lanes(const f32x16* lane) {
  double sum = 0.0;
  for (int v = 0; v < 4; ++v) {
    for (int j = 0; j < 16; ++j) sum += double(lane[v][j]);
  }
  return sum;
}

// The last, short part of a block, filled up.
SC_INLINE void copy_tail(const float* from, int64_t n, float filling, float* tail) {
  for (int64_t j = 0; j < 64; ++j) tail[j] = j < n ? from[j] : filling;
}

// 64 lanes of float32: at most 32 terms per lane and block, then float64.
SC_INLINE double sum_exp(const float* logits, int64_t n, float shift) {
  f32x16 lane[4] = {};
  float tail[64];
  for (int64_t i = 0; i < n; i += 64) {
    const float* part = logits + i;
    if (n - i < 64) {
      copy_tail(part, n - i, -__builtin_inff(), tail);
      part = tail;
    }
    for (int v = 0; v < 4; ++v) lane[v] += exp_nonpositive(load<f32x16>(part + 16 * v) - shift);
  }
  return sum_lanes(lane);
}

void softmax(const float* logits, int64_t n, int64_t column, double cap, SoftmaxRow* state) {
  double factor;
  const double top = raise_top(logits, n, column, cap, state, &factor);
  if (cap == 0) {
    state->sum += sum_exp(logits, n, float(top));
    return;
  }
  double capped[kSoftmaxBlock];
  float shifted[kSoftmaxBlock];
  softcap(logits, n, cap, capped);
  for (int64_t i = 0; i < n; ++i) shifted[i] = float(capped[i] - top);
  state->sum += sum_exp(shifted, n, 0.0f);
}

// Adds a block of two rows, whose maxima are subtracted here. `gap` holds the difference of what is
// left of each pair of logits; without it, that is computed.
SC_INLINE void add_pair(const float* base, const float* other, const float* gap, int64_t n,
                        float base_shift, float other_shift, SoftmaxPair* state) {
  f32x16 base_lane[4] = {}, other_lane[4] = {}, gap_lane[4] = {};
  float base_tail[64], other_tail[64], gap_tail[64];
  for (int64_t i = 0; i < n; i += 64) {
    const float *a = base + i, *b = other + i, *g = gap == nullptr ? nullptr : gap + i;
    if (n - i < 64) {
      copy_tail(a, n - i, -__builtin_inff(), base_tail);
      copy_tail(b, n - i, -__builtin_inff(), other_tail);
      a = base_tail;
      b = other_tail;
      if (g != nullptr) {
        copy_tail(g, n - i, 0.0f, gap_tail);
        g = gap_tail;
      }
    }
    for (int v = 0; v < 4; ++v) {
      const f32x16 p = load<f32x16>(a + 16 * v), q = load<f32x16>(b + 16 * v);
      const f32x16 below = p - base_shift, other_below = q - other_shift;
      const f32x16 weight = exp_nonpositive(below);
      base_lane[v] += weight;
      other_lane[v] += exp_nonpositive(other_below);
      if (g != nullptr) {
        gap_lane[v] += weight * load<f32x16>(g + 16 * v);
        continue;
      }
      // A token that the base masks contributes nothing; one that only the other masks makes the
      // divergence infinite, however small its weight.
      const f32x16 infinity = splat<f32x16>(__builtin_inff()), nothing = {};
      f32x16 term = weight == nothing ? nothing : weight * (below - other_below);
      term = q == -infinity ? infinity : term;
      gap_lane[v] += p == -infinity ? nothing : term;
    }
  }
  state->base.sum += sum_lanes(base_lane);
  state->other.sum += sum_lanes(other_lane);
  state->gap += sum_lanes(gap_lane);
}

void softmax_pair(const float* base, const float* other, int64_t n, int64_t column, double cap,
                  SoftmaxPair* state) {
  double factor, unused;
  const double base_top = raise_top(base, n, column, cap, &state->base, &factor);
  const double other_top = raise_top(other, n, column, cap, &state->other, &unused);
  // Differences are those of what lies below the maxima: where weights are large, these are small
  // and accurate, whatever logits the blocks so far held. When a maximum rises, all terms so far
  // move with it. Once infinite, the sum stays so, however far earlier tokens fall behind.
  const double offset = base_top - other_top;
  if (state->gap < __builtin_inf()) {
    state->gap = state->gap * factor + state->base.sum * (state->offset - offset);
  }
  state->offset = offset;
  if (cap == 0) {
    add_pair(base, other, nullptr, n, float(base_top), float(other_top), state);
    return;
  }
  double base_capped[kSoftmaxBlock], other_capped[kSoftmaxBlock];
  float base_shifted[kSoftmaxBlock], other_shifted[kSoftmaxBlock], gap[kSoftmaxBlock];
  softcap(base, n, cap, base_capped);
  softcap(other, n, cap, other_capped);
  for (int64_t i = 0; i < n; ++i) {
    base_shifted[i] = float(base_capped[i] - base_top);
    other_shifted[i] = float(other_capped[i] - other_top);
    gap[i] = float((base_capped[i] - base_top) - (other_capped[i] - other_top));
  }
  add_pair(base_shifted, other_shifted, gap, n, 0.0f, 0.0f, state);
}
