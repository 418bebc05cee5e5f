#pragma once

#include <cstdint>

namespace fastm3ae {

// loss = 1 / |hidden| * sum over hidden patches of mean_P (pred - target)^2, and its gradient with respect to pred.
//
// target is the patch's pixels in (row, column, channel) order; with normalize_target (pixel - mean) / sqrt(var + 1e-6)
// with the patch's own mean and unbiased variance. Only hidden patches are read. All tensors are contiguous:
//
//   pred       (B, N, P)     N = height / patch_size * width / patch_size, P = patch_size * patch_size * 3
//   image      (B, 3, height, width)
//   is_hidden  (B, N)
//   loss       ()            0 when nothing is hidden
//   grad_pred  (B, N, P)     0 at visible patches; nullptr: do not compute it
//
// The result does not depend on num_threads, to the last bit.
template <typename T>
void masked_pixel_loss_cpu(const T* pred, const T* image, const bool* is_hidden, int64_t batch_size, int64_t height,
                           int64_t width, int64_t patch_size, bool normalize_target, int num_threads, T* loss,
                           T* grad_pred);

}  // namespace fastm3ae
