// Gather decoding of one row; part of row_kernels.inl. A variant says how many elements its
// registers hold (SAELENS_CERTIFY_GATHER_WIDTH) and has a vector instruction for the fused
// multiply-add; the baseline leaves both to the compiler.

#if SAELENS_CERTIFY_GATHER_WIDTH == 8
typedef f32x8 gather_vector;
#else
typedef f32x16 gather_vector;
#endif
constexpr int64_t kGatherWidth = sizeof(gather_vector) / sizeof(float);
// Registers that hold sums; the rest are for weights and factors.
constexpr int kGatherVectors = 8;
// Rows are fetched into the cache this many slots before their turn.
constexpr int32_t kPrefetchSlots = 8;

SC_INLINE gather_vector fused_multiply_add(gather_vector a, gather_vector b, gather_vector c) {
#ifdef SAELENS_CERTIFY_FMA
  return (gather_vector)SAELENS_CERTIFY_FMA(a, b, c);
#else
  gather_vector sum;
  for (int64_t j = 0; j < kGatherWidth; ++j) sum[j] = __builtin_fmaf(a[j], b[j], c[j]);
  return sum;
#endif
}

template <typename W>
SC_INLINE gather_vector gather_load(const typename W::type* from) {
  if constexpr (kGatherWidth == 8) {
    return W::eight(from);
  } else {
    return W::sixteen(from);
  }
}

// Some columns of the sum over slots: one register for each vector of them, over all slots.
template <typename W, int kVectors>
SC_INLINE void gather_columns(const float* values, const int32_t* indices, int32_t count,
                              const typename W::type* w, int64_t stride, const float* bias,
                              float* out) {
  constexpr int64_t kBytes = kGatherWidth * sizeof(typename W::type);
  gather_vector sum[kVectors] = {};
  for (int32_t slot = 0; slot < count; ++slot) {
    const typename W::type* row = w + int64_t(indices[slot]) * stride;
    const int32_t later = slot + kPrefetchSlots < count ? slot + kPrefetchSlots : slot;
    const char* next = reinterpret_cast<const char*>(w + int64_t(indices[later]) * stride);
    const gather_vector value = splat<gather_vector>(values[slot]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (v * kBytes % 64 == 0) __builtin_prefetch(next + v * kBytes);
      sum[v] = fused_multiply_add(value, gather_load<W>(row + v * kGatherWidth), sum[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    if (bias != nullptr) sum[v] += load<gather_vector>(bias + v * kGatherWidth);
    std::memcpy(out + v * kGatherWidth, &sum[v], sizeof(sum[v]));
  }
}

template <typename W>
SC_INLINE void gather_as(const float* values, const int32_t* indices, int32_t count,
                         const typename W::type* w, int64_t n, const float* bias, float* out) {
  constexpr int64_t kBlock = kGatherVectors * kGatherWidth;
  int64_t at = 0;
  for (; at + kBlock <= n; at += kBlock) {
    const float* part = bias == nullptr ? nullptr : bias + at;
    gather_columns<W, kGatherVectors>(values, indices, count, w + at, n, part, out + at);
  }
  for (; at + kGatherWidth <= n; at += kGatherWidth) {
    const float* part = bias == nullptr ? nullptr : bias + at;
    gather_columns<W, 1>(values, indices, count, w + at, n, part, out + at);
  }
  for (; at < n; ++at) {
    float sum = 0.0f;
    for (int32_t slot = 0; slot < count; ++slot) {
      sum = __builtin_fmaf(values[slot], W::one(w + int64_t(indices[slot]) * n + at), sum);
    }
    out[at] = bias == nullptr ? sum : sum + bias[at];
  }
}

void gather(const float* values, const int32_t* indices, int32_t count, const void* w, Real type,
            int64_t n, const float* bias, float* out) {
  switch (type) {
    case Real::kBFloat16:
      return gather_as<BFloat16>(values, indices, count, static_cast<const uint16_t*>(w), n, bias,
                                 out);
    case Real::kFloat16:
      return gather_as<Float16>(values, indices, count, static_cast<const uint16_t*>(w), n, bias,
                                out);
    default:
      return gather_as<Float32>(values, indices, count, static_cast<const float*>(w), n, bias, out);
  }
}
