#pragma once

// The arithmetic of the masked token loss, the same for the CPU and for CUDA.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "host_device.h"

namespace fastm3ae {

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// e^x for x <= 0; a NaN stays one.
FASTM3AE_HOST_DEVICE double exp_nonpositive(double x) { return std::exp(x); }

FASTM3AE_HOST_DEVICE float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  // Two instructions, where expf takes eight, and those would take as long as memory does.
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
#else
  // A loop over std::exp does not become vector instructions, one over this does: e^x = 2^n e^r, |r| <= log(2) / 2.
  const uint32_t is_large = x < -87.0f ? 0 : ~0u;  // not a branch, but a mask: x = 0 and 2^n = 0 where it is unset
  x = from_bits(to_bits(x) & is_large);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves no bits for a fraction: n in the low ones
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, the first product exact
  float series = 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  return (series * (r * r) + r + 1) * from_bits((to_bits(shifted) + 127) << 23 & is_large);
#endif
}

// The largest of no logits. Not -infinity, because the difference of two of those is NaN.
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();

// log(sum over v of exp(x_v)) = max + log(sum), over the logits x_v seen so far.
template <typename T>
struct LogSumExp {
  T max = kLowest<T>;
  T sum = 0;

  FASTM3AE_HOST_DEVICE void add(const LogSumExp& other) {
    const T larger = max > other.max ? max : other.max;
    sum = sum * exp_nonpositive(max - larger) + other.sum * exp_nonpositive(other.max - larger);
    max = larger;
  }
};

template <typename T>
FASTM3AE_HOST_DEVICE LogSumExp<T> log_sum_exp(const T* logits, int64_t num) {
  T max = kLowest<T>, sum = 0;
  // A NaN is never the larger one, but shows in the sum.
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < num; ++i) max = logits[i] > max ? logits[i] : max;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < num; ++i) sum += exp_nonpositive(logits[i] - max);
  LogSumExp<T> part;
  part.max = max;
  part.sum = sum;
  return part;
}

template <typename T>
FASTM3AE_HOST_DEVICE T token_loss(const LogSumExp<T>& row, T label_logit) {
  return row.max - label_logit + std::log(row.sum);
}

// d loss / d logit; scale is 1 / row.sum, or NaN where the loss is NaN.
template <typename T>
FASTM3AE_HOST_DEVICE T token_gradient(T logit, T max, T scale, bool is_label) {
  return exp_nonpositive(logit - max) * scale - T(is_label);
}

}  // namespace fastm3ae
