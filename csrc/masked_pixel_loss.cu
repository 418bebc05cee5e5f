#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda_call.h"
#include "masked_pixel_loss.h"
#include "masked_pixel_loss_formula.h"

// A warp works on one prediction, so that the statistics of a patch are sums over lanes. The unit of its work is a run
// of eight pixels in a row of the patch: 8 values of each channel in the image, 24 values side by side in the
// prediction. Both are read in whole words, once, and stay in registers. Patches of another size, or tensors that do
// not begin at a multiple of 16 bytes, are read pixel by pixel, as often as they are needed.
namespace fastm3ae {
namespace {

constexpr int kWarp = 32, kWarps = kPixelLossPredsPerBlock, kThreads = kWarp * kWarps;
constexpr int kChannels = 3, kRun = 8, kValues = kRun * kChannels;
constexpr int kFinishThreads = 1024;

template <typename T, typename Pred, typename Pixel>
struct Arguments {
  PixelLossShape shape;
  const Pred* pred;
  const Pixel* image;
  const float *mean, *std;
  T* partial;
  Pred* difference;
};

template <typename T>
__device__ T sum_over_warp(T x) {
#pragma unroll
  for (int lane = kWarp / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

template <typename T, int kNum>
__device__ void read_words(const T* from, T (&to)[kNum]) {
  using Word = std::conditional_t<sizeof(to) % 16 == 0, uint4, uint2>;
#pragma unroll
  for (int i = 0; i < int(sizeof(to) / sizeof(Word)); ++i)
    reinterpret_cast<Word*>(to)[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
}

template <typename T, int kNum>
__device__ void write_words(const T (&from)[kNum], T* to) {
#pragma unroll
  for (int i = 0; i < int(sizeof(from) / sizeof(uint4)); ++i)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

// What a pixel of one channel is to the loss.
template <typename T, typename Pixel>
struct Channel {
  __device__ Channel(const float*, const float*, int) {}
  __device__ T operator()(Pixel pixel) const { return pixel; }
};

template <typename T>
struct Channel<T, uint8_t> : Normalization {
  __device__ Channel(const float* mean, const float* std, int channel) : Normalization(mean[channel], std[channel]) {}
};

// The sum of a patch's squared differences, the same in all lanes, with at most kUnits runs of eight pixels per lane.
template <int kUnits, typename T, typename Pred, typename Pixel>
__device__ T squares_of_runs(const Arguments<T, Pred, Pixel>& a, const Pixel* corner, const Pred* pred,
                             Pred* difference) {
  const int runs_per_row = a.shape.patch_size / kRun, num_runs = a.shape.patch_size * runs_per_row;
  const int lane = threadIdx.x % kWarp;
  const int64_t num_values = a.shape.num_values();

  // All reads are on their way before the first value is used.
  alignas(16) Pixel pixels[kUnits][kChannels][kRun];
  alignas(16) Pred preds[kUnits][kValues];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int run = u * kWarp + lane;
    if (run >= num_runs) continue;
    const Pixel* row = corner + run / runs_per_row * a.shape.width + run % runs_per_row * kRun;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) read_words(row + c * a.shape.height * a.shape.width, pixels[u][c]);
    read_words(pred + run * kValues, preds[u]);
  }

  T targets[kUnits][kValues];
  T sum = 0;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const Channel<T, Pixel> channel(a.mean, a.std, c);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u * kWarp + lane >= num_runs) continue;
#pragma unroll
      for (int x = 0; x < kRun; ++x) sum += targets[u][x * kChannels + c] = channel(pixels[u][c][x]);
    }
  }

  if (a.shape.normalize_target) {
    const T mean = sum_over_warp(sum) / T(num_values);
    T squares = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u * kWarp + lane >= num_runs) continue;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        targets[u][i] -= mean;
        squares += targets[u][i] * targets[u][i];
      }
    }
    const T scale = inverse_std(sum_over_warp(squares), num_values);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) targets[u][i] *= scale;
    }
  }

  T squares = 0;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int run = u * kWarp + lane;
    if (run >= num_runs) continue;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const T error = T(preds[u][i]) - targets[u][i];
      squares += error * error;
      preds[u][i] = Pred(error);
    }
    if (difference) write_words(preds[u], difference + run * kValues);
  }
  return sum_over_warp(squares);
}

// The same for any patch, pixel by pixel.
template <typename T, typename Pred, typename Pixel>
__device__ T squares_of_pixels(const Arguments<T, Pred, Pixel>& a, const Pixel* corner, const Pred* pred,
                               Pred* difference) {
  const unsigned patch_size = a.shape.patch_size, num_pixels = patch_size * patch_size;
  const unsigned num_values = num_pixels * kChannels, lane = threadIdx.x % kWarp;
  const auto for_each_value = [&](auto function) {
    for (int c = 0; c < kChannels; ++c) {
      const Channel<T, Pixel> channel(a.mean, a.std, c);
      const Pixel* plane = corner + c * a.shape.height * a.shape.width;
      for (unsigned i = lane; i < num_pixels; i += kWarp)
        function(i * kChannels + c, channel(plane[i / patch_size * a.shape.width + i % patch_size]));
    }
  };

  T mean = 0, scale = 1;
  if (a.shape.normalize_target) {
    T sum = 0, squares = 0;
    for_each_value([&](unsigned, T pixel) { sum += pixel; });
    mean = sum_over_warp(sum) / T(num_values);
    for_each_value([&](unsigned, T pixel) { squares += (pixel - mean) * (pixel - mean); });
    scale = inverse_std(sum_over_warp(squares), num_values);
  }
  T squares = 0;
  for_each_value([&](unsigned i, T pixel) {
    const T error = T(pred[i]) - (pixel - mean) * scale;
    squares += error * error;
    if (difference) difference[i] = Pred(error);
  });
  return sum_over_warp(squares);
}

template <typename Pred>
__device__ void fill(Pred* values, int64_t num_values, float value) {
  for (int64_t i = threadIdx.x % kWarp; i < num_values; i += kWarp) values[i] = Pred(value);
}

// partial[block] = the sum of the squared differences of its predictions, and how many of them are of hidden patches
template <int kUnits, typename T, typename Pred, typename Pixel>
__global__ void __launch_bounds__(kThreads) masked_pixel_loss_kernel(const Arguments<T, Pred, Pixel> a) {
  // Within an image 32 bits are enough; the launcher has checked it.
  const unsigned blocks_per_image = (unsigned(a.shape.num_preds) + kWarps - 1) / kWarps;
  const unsigned sample = blockIdx.x / blocks_per_image;
  const unsigned number = blockIdx.x % blocks_per_image * kWarps + threadIdx.x / kWarp;
  const int64_t pred = int64_t(sample) * a.shape.num_preds + number, num_values = a.shape.num_values();
  const Pred* pred_values = a.pred + pred * num_values;
  Pred* difference = a.difference ? a.difference + pred * num_values : nullptr;

  T squares = 0, count = 0;
  if (number < a.shape.num_preds) {
    const int64_t patch = a.shape.is_hidden ? number : a.shape.hidden_index[pred];
    if (a.shape.is_hidden && !a.shape.is_hidden[pred]) {
      if (difference) fill(difference, num_values, 0);
    } else if (patch < 0 || patch >= a.shape.num_patches()) {
      squares = NAN;
      if (difference) fill(difference, num_values, NAN);
    } else {
      const unsigned columns = a.shape.columns();
      const Pixel* corner = a.image + int64_t(sample) * kChannels * a.shape.height * a.shape.width +
                            first_pixel(a.shape, unsigned(patch) / columns, unsigned(patch) % columns);
      if constexpr (kUnits)
        squares = squares_of_runs<kUnits>(a, corner, pred_values, difference);
      else
        squares = squares_of_pixels(a, corner, pred_values, difference);
      count = 1;
    }
  }

  __shared__ T sums[2][kWarps];
  if (threadIdx.x % kWarp == 0) {
    sums[0][threadIdx.x / kWarp] = squares;
    sums[1][threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    T sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[threadIdx.x][warp];
    a.partial[int64_t(blockIdx.x) * 2 + threadIdx.x] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    masked_pixel_loss_finish_kernel(const T* partial, int64_t num_partial, int64_t num_values, T* loss, T* grad_scale) {
  double squares = 0, count = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < num_partial; i += kFinishThreads) {
    squares += partial[i * 2];
    count += partial[i * 2 + 1];
  }
  __shared__ double sums[2][kFinishThreads / kWarp];
  squares = sum_over_warp(squares);
  count = sum_over_warp(count);
  if (threadIdx.x % kWarp == 0) {
    sums[0][threadIdx.x / kWarp] = squares;
    sums[1][threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  squares = sum_over_warp(sums[0][threadIdx.x]);
  count = sum_over_warp(sums[1][threadIdx.x]);
  if (threadIdx.x == 0) finish(squares, int64_t(count), num_values, loss, grad_scale);
}

bool in_whole_words(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0; }

// T is what the loss is computed in.
template <typename T, typename Pred, typename Pixel>
void launch(const PixelLossShape& shape, const void* pred, const void* image, const float* mean, const float* std,
            cudaStream_t stream, void* partial, void* loss, void* difference, void* grad_scale) {
  const int64_t num_blocks = shape.batch_size * ((shape.num_preds + kWarps - 1) / kWarps);
  if (num_blocks > INT32_MAX || shape.num_preds > INT32_MAX || shape.height * shape.width > INT32_MAX)
    throw std::invalid_argument("masked_pixel_loss: an image or a batch is too large for one launch");

  if (num_blocks) {
    void (*kernel)(Arguments<T, Pred, Pixel>) = masked_pixel_loss_kernel<0, T, Pred, Pixel>;
    if constexpr (!std::is_same_v<T, double>) {
      const bool in_runs = shape.patch_size % kRun == 0 && in_whole_words(pred) && in_whole_words(image) &&
                           (!difference || in_whole_words(difference));
      const int64_t num_runs = shape.patch_size * shape.patch_size / kRun;
      if (in_runs && num_runs <= kWarp)
        kernel = masked_pixel_loss_kernel<1, T, Pred, Pixel>;
      else if (in_runs && num_runs <= 4 * kWarp)
        kernel = masked_pixel_loss_kernel<4, T, Pred, Pixel>;
    }
    kernel<<<unsigned(num_blocks), kThreads, 0, stream>>>({shape, static_cast<const Pred*>(pred),
                                                           static_cast<const Pixel*>(image), mean, std,
                                                           static_cast<T*>(partial), static_cast<Pred*>(difference)});
    check(cudaGetLastError(), "masked_pixel_loss_kernel");
  }
  masked_pixel_loss_finish_kernel<T><<<1, kFinishThreads, 0, stream>>>(static_cast<const T*>(partial), num_blocks,
                                                                    shape.num_values(), static_cast<T*>(loss),
                                                                    static_cast<T*>(grad_scale));
  check(cudaGetLastError(), "masked_pixel_loss_finish_kernel");
}

template <typename Pixel>
auto launch_of(DType pred_dtype) {
  switch (pred_dtype) {
    case DType::kFloat16:
      return launch<float, __half, Pixel>;
    case DType::kBFloat16:
      return launch<float, __nv_bfloat16, Pixel>;
    case DType::kFloat32:
      return launch<float, float, Pixel>;
    default:
      throw std::invalid_argument("masked_pixel_loss: no kernel for this dtype of pred");
  }
}

auto launch_of(DType pred_dtype, DType image_dtype) {
  if (pred_dtype == DType::kFloat64 && image_dtype == DType::kFloat64) return launch<double, double, double>;
  if (image_dtype == DType::kUInt8) return launch_of<uint8_t>(pred_dtype);
  if (image_dtype == DType::kFloat32) return launch_of<float>(pred_dtype);
  throw std::invalid_argument("masked_pixel_loss: no kernel for this dtype of image");
}

}  // namespace

void masked_pixel_loss_cuda(const PixelLossShape& shape, DType pred_dtype, DType image_dtype, const void* pred,
                            const void* image, const float* mean, const float* std, int device, void* stream,
                            void* partial, void* loss, void* difference, void* grad_scale) {
  const DeviceGuard guard(device);
  launch_of(pred_dtype, image_dtype)(shape, pred, image, mean, std, static_cast<cudaStream_t>(stream), partial, loss,
                                     difference, grad_scale);
}

}  // namespace fastm3ae
