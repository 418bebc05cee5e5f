#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace fastm3ae {

// loss = 1 / |hidden| * sum over hidden patches of mean_P (pred - target)^2, and its gradient with respect to pred.
//
// target is the patch's pixels in (row, column, channel) order; with normalize_target (pixel - mean) / sqrt(var + 1e-6)
// with the patch's own mean and unbiased variance. Only hidden patches are read. All tensors are contiguous:
//
//   pred        (B, num_preds, P)    P = patch_size * patch_size * 3
//   image       (B, 3, height, width), normalised, or levels of 8 bits that are normalised as they are read
//   mean, std   (3)                  float32, of the channels' levels over 255; nullptr for a normalised image
//   loss        ()                   0 when nothing is hidden
//   difference  (B, num_preds, P)    pred - target, 0 at visible patches; nullptr: do not compute it
//   grad_scale  ()                   2 / (P |hidden|): the gradient is grad_scale * difference
//
// The difference is kept instead of the gradient because it has the magnitude of pred, so that it neither underflows
// nor overflows in pred's own dtype.
struct PixelLossShape {
  int64_t batch_size, height, width, patch_size, num_preds;
  // Either (B, num_preds): which of the N = num_preds patches are hidden; or nullptr and
  const bool* is_hidden;
  // (B, num_preds): the patch that each prediction is for.
  const int64_t* hidden_index;
  bool normalize_target;

  FASTM3AE_HOST_DEVICE int64_t columns() const { return width / patch_size; }
  FASTM3AE_HOST_DEVICE int64_t num_patches() const { return height / patch_size * columns(); }
  FASTM3AE_HOST_DEVICE int64_t num_values() const { return patch_size * patch_size * 3; }
};

// The result does not depend on num_threads, to the last bit. Throws std::out_of_range at a patch that does not exist.
template <typename T, typename Pixel>
void masked_pixel_loss_cpu(const PixelLossShape& shape, const T* pred, const Pixel* image, const float* mean,
                           const float* std, int num_threads, T* loss, T* difference, T* grad_scale);

// Predictions that one block of threads works on.
constexpr int kPixelLossPredsPerBlock = 8;

// Queued on the stream. The image is float32 or uint8 and pred float32, bfloat16 or float16, or both are float64, as are
// then loss, grad_scale and partial: room for (B, ceil(num_preds / kPixelLossPredsPerBlock), 2). A difference has pred's
// dtype. At a patch that does not exist the result is NaN.
void masked_pixel_loss_cuda(const PixelLossShape& shape, DType pred_dtype, DType image_dtype, const void* pred,
                            const void* image, const float* mean, const float* std, int device, void* stream,
                            void* partial, void* loss, void* difference, void* grad_scale);

}  // namespace fastm3ae
