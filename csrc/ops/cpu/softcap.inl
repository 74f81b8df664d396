// Soft-capped logits, cap * tanh(logit / cap); part of row_kernels.inl. Float64 throughout, so
// that the differences of capped logits are as good as those of plain ones, whatever the cap.

typedef int64_t i64x8 __attribute__((vector_size(64)));

// |error| <= 1e-12 cap: with t = exp(-2 |x| / cap), tanh = (1 - t) / (1 + t); the Taylor polynomial
// of degree 10 has a relative error below (ln 2 / 2)^11 / 11! * 1.5 = 4e-13, and |x| / cap is
// rounded to 53 bits. -inf gives -cap, +inf gives cap, NaN stays NaN.
SC_INLINE f64x8 soft_capped(f64x8 x, double cap) {
  const f64x8 down = (x < 0.0 ? x : -x) * (2.0 / cap);
  const f64x8 low = splat<f64x8>(-64.0);
  const f64x8 kept = down < low ? low : down;
  // Adding 1.5 * 2^52 rounds to the nearest integer, which the low mantissa bits then hold.
  const f64x8 shifted = kept * 1.4426950408889634 + 6755399441055744.0;
  const f64x8 power = shifted - 6755399441055744.0;
  const f64x8 r = kept - power * 0.69314718055994531;
  f64x8 p = r * (1.0 / 3628800.0) + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const i64x8 exponent = ((i64x8)shifted - 0x4338000000000000 + 1023) << 52;
  const f64x8 t = p * (f64x8)exponent;
  const f64x8 capped = cap * ((1.0 - t) / (1.0 + t));
  return x < 0.0 ? -capped : capped;
}

void softcap(const float* logits, int64_t n, double cap, double* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const f64x8 x = __builtin_convertvector(load<f32x8>(logits + i), f64x8);
    const f64x8 capped = soft_capped(x, cap);
    std::memcpy(out + i, &capped, sizeof(capped));
  }
  if (i == n) return;
  f32x8 rest = {};
  std::memcpy(&rest, logits + i, (n - i) * sizeof(float));
  const f64x8 capped = soft_capped(__builtin_convertvector(rest, f64x8), cap);
  std::memcpy(out + i, &capped, (n - i) * sizeof(double));
}
