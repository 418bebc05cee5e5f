#pragma once

#include <cstdint>

namespace fastm3ae {

// square[c, y, x] = the level at (top + y, left + x) of the image resized to (new_height, new_width).
//
// The resize is bicubic, its kernel widened by the factor of a reduction. It runs along the rows and then along the
// columns, each time with weights rounded to 2^-22, in 32-bit integers, and the result rounded to 8 bits. Only what the
// square needs is computed. Both tensors are contiguous:
//
//   image   (height, width, channels)
//   square  (channels, size, size)     top + size <= new_height, left + size <= new_width
void resize_crop_cpu(const uint8_t* image, int64_t height, int64_t width, int64_t channels, int64_t new_height,
                     int64_t new_width, int64_t top, int64_t left, int64_t size, uint8_t* square);

}  // namespace fastm3ae
