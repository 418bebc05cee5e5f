#include "masked_pixel_loss.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <vector>

#include "clones.h"

namespace fastm3ae {
namespace {

constexpr int64_t kChannels = 3;
// Below this a second thread costs more than it saves.
constexpr int64_t kMinPixelsPerThread = 1 << 17;

template <typename T>
FASTM3AE_CLONES void read_patch(const T* image, int64_t height, int64_t width, int64_t patch_size, T* patch) {
  for (int64_t y = 0; y < patch_size; ++y) {
    const T* red = image + y * width;
    const T* green = red + height * width;
    const T* blue = green + height * width;
    for (int64_t x = 0; x < patch_size; ++x) {
      patch[0] = red[x];
      patch[1] = green[x];
      patch[2] = blue[x];
      patch += kChannels;
    }
  }
}

template <typename T>
FASTM3AE_CLONES void normalize_patch(T* patch, int64_t num_pixels) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < num_pixels; ++i) sum += patch[i];
  const T mean = sum / num_pixels;
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < num_pixels; ++i) squares += (patch[i] - mean) * (patch[i] - mean);
  const T scale = 1 / std::sqrt(squares / (num_pixels - 1) + T(1e-6));
  for (int64_t i = 0; i < num_pixels; ++i) patch[i] = (patch[i] - mean) * scale;
}

template <typename T>
FASTM3AE_CLONES T squared_error(const T* pred, const T* target, int64_t num_pixels) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < num_pixels; ++i) sum += (pred[i] - target[i]) * (pred[i] - target[i]);
  return sum;
}

template <typename T>
FASTM3AE_CLONES void scaled_difference(const T* pred, const T* target, int64_t num_pixels, T scale, T* out) {
  for (int64_t i = 0; i < num_pixels; ++i) out[i] = (pred[i] - target[i]) * scale;
}

}  // namespace

template <typename T>
void masked_pixel_loss_cpu(const T* pred, const T* image, const bool* is_hidden, int64_t batch_size, int64_t height,
                           int64_t width, int64_t patch_size, bool normalize_target, int num_threads, T* loss,
                           T* grad_pred) {
  const int64_t rows = height / patch_size, columns = width / patch_size;
  const int64_t num_pixels = patch_size * patch_size * kChannels;
  const int64_t num_strips = batch_size * rows;  // a strip is one row of patches of one image
  const int64_t num_hidden = std::count(is_hidden, is_hidden + num_strips * columns, true);
  const T grad_scale = T(2) / (num_hidden * num_pixels);

  // One sum per strip, added up in order at the end: which thread made it cannot change the result.
  std::vector<double> strip_errors(num_strips);
  const auto run = [&](int64_t first, int64_t last) {
    std::vector<T> target(num_pixels);
    for (int64_t strip = first; strip < last; ++strip) {
      const T* strip_image = image + (strip / rows * kChannels * height + strip % rows * patch_size) * width;
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t patch = strip * columns + column;
        const T* patch_pred = pred + patch * num_pixels;
        if (!is_hidden[patch]) {
          if (grad_pred) std::fill_n(grad_pred + patch * num_pixels, num_pixels, T(0));
          continue;
        }
        read_patch(strip_image + column * patch_size, height, width, patch_size, target.data());
        if (normalize_target) normalize_patch(target.data(), num_pixels);
        strip_errors[strip] += squared_error(patch_pred, target.data(), num_pixels);
        if (grad_pred)
          scaled_difference(patch_pred, target.data(), num_pixels, grad_scale, grad_pred + patch * num_pixels);
      }
    }
  };

  const int64_t num_workers = std::min<int64_t>(num_threads, 1 + num_hidden * num_pixels / kMinPixelsPerThread);
  std::vector<std::future<void>> workers;
  for (int64_t i = 1; i < num_workers; ++i)
    workers.push_back(
        std::async(std::launch::async, run, num_strips * i / num_workers, num_strips * (i + 1) / num_workers));
  run(0, num_strips / num_workers);
  for (auto& worker : workers) worker.get();

  double sum = 0;
  for (const double error : strip_errors) sum += error;
  *loss = num_hidden ? T(sum / (double(num_hidden) * num_pixels)) : T(0);
}

template void masked_pixel_loss_cpu(const float*, const float*, const bool*, int64_t, int64_t, int64_t, int64_t, bool,
                                    int, float*, float*);
template void masked_pixel_loss_cpu(const double*, const double*, const bool*, int64_t, int64_t, int64_t, int64_t,
                                    bool, int, double*, double*);

}  // namespace fastm3ae
