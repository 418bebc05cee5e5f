#include "masked_pixel_loss.h"

#include <algorithm>
#include <future>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "clones.h"
#include "masked_pixel_loss_formula.h"

namespace fastm3ae {
namespace {

constexpr int64_t kChannels = 3;
// Predictions whose squared differences are added up on their own.
constexpr int64_t kPredsPerSum = 16;
// Below this a second thread costs more than it saves.
constexpr int64_t kMinPixelsPerThread = 1 << 17;

// What each pixel of the image is to the loss: itself, or a level of 8 bits looked up among the 256 normalised ones.
template <typename T, typename Pixel>
struct Pixels {
  Pixels(const float*, const float*) {}
  T operator()(int64_t, Pixel pixel) const { return pixel; }
};

template <typename T>
struct Pixels<T, uint8_t> {
  T normalized[kChannels][256];

  Pixels(const float* mean, const float* std) {
    for (int64_t c = 0; c < kChannels; ++c) {
      const Normalization normalize(mean[c], std[c]);
      for (int level = 0; level < 256; ++level) normalized[c][level] = normalize(uint8_t(level));
    }
  }
  T operator()(int64_t channel, uint8_t level) const { return normalized[channel][level]; }
};

template <typename T, typename Pixel>
FASTM3AE_CLONES void read_patch(const Pixel* image, const Pixels<T, Pixel>& pixels, int64_t height, int64_t width,
                                int64_t patch_size, T* patch) {
  for (int64_t y = 0; y < patch_size; ++y) {
    const Pixel* red = image + y * width;
    const Pixel* green = red + height * width;
    const Pixel* blue = green + height * width;
    for (int64_t x = 0; x < patch_size; ++x) {
      patch[0] = pixels(0, red[x]);
      patch[1] = pixels(1, green[x]);
      patch[2] = pixels(2, blue[x]);
      patch += kChannels;
    }
  }
}

template <typename T>
FASTM3AE_CLONES void normalize_patch(T* patch, int64_t num_values) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < num_values; ++i) sum += patch[i];
  const T mean = sum / num_values;
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < num_values; ++i) squares += (patch[i] - mean) * (patch[i] - mean);
  const T scale = inverse_std(squares, num_values);
  for (int64_t i = 0; i < num_values; ++i) patch[i] = (patch[i] - mean) * scale;
}

template <typename T>
FASTM3AE_CLONES T squared_error(const T* pred, const T* target, int64_t num_values) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < num_values; ++i) sum += (pred[i] - target[i]) * (pred[i] - target[i]);
  return sum;
}

template <typename T>
FASTM3AE_CLONES void subtract(const T* pred, const T* target, int64_t num_values, T* out) {
  for (int64_t i = 0; i < num_values; ++i) out[i] = pred[i] - target[i];
}

// Whether a prediction is of a hidden patch, and of which: its number in its image.
bool is_hidden(const PixelLossShape& shape, int64_t pred, int64_t* patch) {
  if (shape.is_hidden) {
    *patch = pred % shape.num_preds;
    return shape.is_hidden[pred];
  }
  *patch = shape.hidden_index[pred];
  if (*patch < 0 || *patch >= shape.num_patches())
    throw std::out_of_range("hidden must be patches from 0 to " + std::to_string(shape.num_patches() - 1) + ", got " +
                            std::to_string(*patch));
  return true;
}

}  // namespace

template <typename T, typename Pixel>
void masked_pixel_loss_cpu(const PixelLossShape& shape, const T* pred, const Pixel* image, const float* mean,
                           const float* std, int num_threads, T* loss, T* difference, T* grad_scale) {
  const int64_t num_values = shape.num_values(), num_preds = shape.batch_size * shape.num_preds;
  const int64_t num_sums = (num_preds + kPredsPerSum - 1) / kPredsPerSum;
  const Pixels<T, Pixel> pixels(mean, std);

  // The sums are added up in order at the end: which thread made them cannot change the result.
  std::vector<double> sums(num_sums);
  std::vector<int64_t> counts(num_sums);
  const auto run = [&](int64_t first, int64_t last) {
    std::vector<T> target(num_values);
    for (int64_t i = first * kPredsPerSum; i < std::min(last * kPredsPerSum, num_preds); ++i) {
      T* out = difference ? difference + i * num_values : nullptr;
      int64_t patch;
      if (!is_hidden(shape, i, &patch)) {
        if (out) std::fill_n(out, num_values, T(0));
        continue;
      }
      const Pixel* corner = image + i / shape.num_preds * kChannels * shape.height * shape.width +
                            first_pixel(shape, patch / shape.columns(), patch % shape.columns());
      read_patch(corner, pixels, shape.height, shape.width, shape.patch_size, target.data());
      if (shape.normalize_target) normalize_patch(target.data(), num_values);
      sums[i / kPredsPerSum] += squared_error(pred + i * num_values, target.data(), num_values);
      counts[i / kPredsPerSum] += 1;
      if (out) subtract(pred + i * num_values, target.data(), num_values, out);
    }
  };

  const int64_t num_workers = std::min<int64_t>(num_threads, 1 + num_preds * num_values / kMinPixelsPerThread);
  std::vector<std::future<void>> workers;
  for (int64_t i = 1; i < num_workers; ++i)
    workers.push_back(std::async(std::launch::async, run, num_sums * i / num_workers, num_sums * (i + 1) / num_workers));
  run(0, num_sums / num_workers);
  for (auto& worker : workers) worker.get();

  const double squares = std::accumulate(sums.begin(), sums.end(), 0.0);
  const int64_t num_hidden = std::accumulate(counts.begin(), counts.end(), int64_t(0));
  finish(squares, num_hidden, num_values, loss, grad_scale);
}

template void masked_pixel_loss_cpu(const PixelLossShape&, const float*, const float*, const float*, const float*, int,
                                    float*, float*, float*);
template void masked_pixel_loss_cpu(const PixelLossShape&, const float*, const uint8_t*, const float*, const float*,
                                    int, float*, float*, float*);
template void masked_pixel_loss_cpu(const PixelLossShape&, const double*, const double*, const float*, const float*,
                                    int, double*, double*, double*);

}  // namespace fastm3ae
