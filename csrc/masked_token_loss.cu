#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <stdexcept>

#include "cuda_call.h"
#include "masked_token_loss.h"
#include "masked_token_loss_formula.h"

// A block of threads works on one token. It reads the row twice, for the sum and for the gradient: the second time from
// the second-level cache, which holds the rows that are being worked on (100 KB each at 50,304 columns of 16 bits).
namespace fastm3ae {
namespace {

constexpr int kWarp = 32, kThreads = 512, kWarps = kThreads / kWarp, kBlocksPerMultiprocessor = 3;
// Columns that a thread reads at once.
constexpr int kRun = 8;

template <typename T>
struct alignas(16) Run {
  T values[kRun];
};

template <typename T>
__device__ void read(const T* from, float (&to)[kRun]) {
  const Run<T> run = *reinterpret_cast<const Run<T>*>(from);
#pragma unroll
  for (int i = 0; i < kRun; ++i) to[i] = float(run.values[i]);
}

template <typename T>
__device__ void write(const float (&from)[kRun], T* to) {
  Run<T> run;
#pragma unroll
  for (int i = 0; i < kRun; ++i) run.values[i] = T(from[i]);
  *reinterpret_cast<Run<T>*>(to) = run;
}

__device__ LogSumExp<float> add_over_warp(LogSumExp<float> part) {
#pragma unroll
  for (int lane = kWarp / 2; lane; lane /= 2) {
    LogSumExp<float> other;
    other.max = __shfl_xor_sync(~0u, part.max, lane);
    other.sum = __shfl_xor_sync(~0u, part.sum, lane);
    part.add(other);
  }
  return part;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    masked_token_loss_kernel(T* logits, const int64_t* labels, int vocab_size, int num_columns, bool needs_grad,
                             float* loss, bool* is_correct) {
  const int64_t token = blockIdx.x;
  T* x = logits + token * num_columns;
  if (labels[token] == kIgnoredLabel) {
    if (threadIdx.x == 0) {
      loss[token] = 0;
      is_correct[token] = false;
    }
    if (!needs_grad) return;
    for (int first = threadIdx.x * kRun; first < num_columns; first += kThreads * kRun) {
      const float zeros[kRun] = {};
      write(zeros, x + first);
    }
    return;
  }
  const int label = 0 <= labels[token] && labels[token] < vocab_size ? int(labels[token]) : -1;
  const float label_logit = label < 0 ? NAN : float(x[label]);

  LogSumExp<float> row;
  bool is_tied = false;  // with an earlier logit
#pragma unroll 2
  for (int first = threadIdx.x * kRun; first < num_columns; first += kThreads * kRun) {
    float run[kRun];
    read(x + first, run);
    row.add(log_sum_exp(run, kRun));
    bool is_equal = false;
#pragma unroll
    for (int i = 0; i < kRun; ++i) is_equal |= run[i] == label_logit;
    if (is_equal) {  // seldom, so the columns are not compared above
#pragma unroll
      for (int i = 0; i < kRun; ++i) is_tied |= run[i] == label_logit && first + i < label;
    }
  }

  __shared__ LogSumExp<float> warps[kWarps];
  row = add_over_warp(row);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = row;
  is_tied = __syncthreads_or(is_tied);
  // Each warp adds the same parts in the same order, so all threads have the same bits without another barrier.
  row = threadIdx.x % kWarp < kWarps ? warps[threadIdx.x % kWarp] : LogSumExp<float>();
  row = add_over_warp(row);

  const float row_loss = token_loss(row, label_logit);
  if (threadIdx.x == 0) {
    loss[token] = row_loss;
    is_correct[token] = label_logit == row.max && !is_tied && !isnan(row_loss);
  }
  if (!needs_grad) return;
  const float scale = isnan(row_loss) ? row_loss : 1 / row.sum;
#pragma unroll 2
  for (int first = threadIdx.x * kRun; first < num_columns; first += kThreads * kRun) {
    float run[kRun];
    read(x + first, run);
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = token_gradient(run[i], row.max, scale, first + i == label);
    write(run, x + first);
  }
}

template <typename T>
void launch(void* logits, const int64_t* labels, int64_t num_tokens, int64_t vocab_size, int64_t num_columns,
            bool needs_grad, cudaStream_t stream, float* loss, bool* is_correct) {
  masked_token_loss_kernel<<<unsigned(num_tokens), kThreads, 0, stream>>>(
      static_cast<T*>(logits), labels, int(vocab_size), int(num_columns), needs_grad, loss, is_correct);
  check(cudaGetLastError(), "masked_token_loss_kernel");
}

auto launch_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return launch<__half>;
    case DType::kBFloat16:
      return launch<__nv_bfloat16>;
    case DType::kFloat32:
      return launch<float>;
    default:
      throw std::invalid_argument("masked_token_loss: no kernel for this dtype of logits");
  }
}

}  // namespace

void masked_token_loss_cuda(DType dtype, void* logits, const int64_t* labels, int64_t num_tokens, int64_t vocab_size,
                            int64_t num_columns, bool needs_grad, int device, void* stream, float* loss,
                            bool* is_correct) {
  if (num_tokens == 0) return;
  if (num_tokens > INT32_MAX || num_columns > INT32_MAX / 2)
    throw std::invalid_argument("masked_token_loss: too many tokens or columns for one launch");
  const DeviceGuard guard(device);
  launch_of(dtype)(logits, labels, num_tokens, vocab_size, num_columns, needs_grad, static_cast<cudaStream_t>(stream),
                   loss, is_correct);
}

}  // namespace fastm3ae
