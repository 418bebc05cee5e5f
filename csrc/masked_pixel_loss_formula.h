#pragma once

// The arithmetic of the masked pixel loss, the same for the CPU and for CUDA.

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "masked_pixel_loss.h"

namespace fastm3ae {

// Offset of a patch's first pixel in channel 0 of its image.
FASTM3AE_HOST_DEVICE int64_t first_pixel(const PixelLossShape& shape, int64_t patch_row, int64_t patch_column) {
  return patch_row * shape.patch_size * shape.width + patch_column * shape.patch_size;
}

// 1 / sqrt(var + 1e-6), from the sum of the squares of pixel - mean.
template <typename T>
FASTM3AE_HOST_DEVICE T inverse_std(T squares, int64_t num_values) {
  return T(1) / std::sqrt(squares / T(num_values - 1) + T(1e-6));
}

// 2 / (P |hidden|), and the mean of the squared differences; both of nothing where nothing is hidden.
template <typename T>
FASTM3AE_HOST_DEVICE void finish(double squares, int64_t num_hidden, int64_t num_values, T* loss,
                                 T* grad_scale) {
  const double count = double(num_hidden > 0 ? num_hidden : 1) * num_values;
  *loss = T(squares / count);
  *grad_scale = T(2 / count);
}

// x / divisor, correctly rounded, given 1 / divisor: the two corrections cost half of what a division does on a GPU.
FASTM3AE_HOST_DEVICE float divide(float x, float divisor, float reciprocal) {
  float quotient = x * reciprocal;
  quotient = std::fma(std::fma(-quotient, divisor, x), reciprocal, quotient);
  return std::fma(std::fma(-quotient, divisor, x), reciprocal, quotient);
}

// (level / 255 - mean) / std of one channel, every operation rounded, as torchvision's ToTensor and Normalize round.
struct Normalization {
  float mean, std, reciprocal;

  FASTM3AE_HOST_DEVICE Normalization(float mean, float std) : mean(mean), std(std), reciprocal(1 / std) {}

  FASTM3AE_HOST_DEVICE float operator()(uint8_t level) const {
    return divide(divide(float(level), 255, 1.0f / 255) - mean, std, reciprocal);
  }
};

}  // namespace fastm3ae
