#include <algorithm>
#include <cmath>
#include <future>
#include <vector>

#include "clones.h"
#include "masked_token_loss.h"
#include "masked_token_loss_formula.h"

namespace fastm3ae {
namespace {

// Logits that are read twice while the first-level cache holds them.
constexpr int64_t kTile = 2048;
// Below this a second thread costs more than it saves.
constexpr int64_t kMinLogitsPerThread = 1 << 17;

template <typename T>
FASTM3AE_CLONES LogSumExp<T> row_log_sum_exp(const T* logits, int64_t vocab_size) {
  LogSumExp<T> row;
  for (int64_t first = 0; first < vocab_size; first += kTile)
    row.add(log_sum_exp(logits + first, std::min(kTile, vocab_size - first)));
  return row;
}

template <typename T>
FASTM3AE_CLONES void softmax(T* logits, int64_t vocab_size, T max, T scale) {
#pragma omp simd
  for (int64_t v = 0; v < vocab_size; ++v) logits[v] = token_gradient(logits[v], max, scale, false);
}

}  // namespace

template <typename T>
void masked_token_loss_cpu(T* logits, const int64_t* labels, int64_t num_tokens, int64_t vocab_size, bool needs_grad,
                           int num_threads, T* loss, bool* is_correct) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      T* x = logits + token * vocab_size;
      const int64_t label = labels[token];
      if (label == kIgnoredLabel) {
        loss[token] = 0;
        is_correct[token] = false;
        if (needs_grad) std::fill(x, x + vocab_size, T(0));
        continue;
      }
      const bool is_known = 0 <= label && label < vocab_size;
      const T label_logit = is_known ? x[label] : T(NAN);
      const LogSumExp<T> row = row_log_sum_exp(x, vocab_size);
      loss[token] = token_loss(row, label_logit);
      const bool is_nan = std::isnan(loss[token]);
      is_correct[token] = !is_nan && label_logit == row.max && std::find(x, x + label, row.max) == x + label;
      if (!needs_grad) continue;
      const T scale = is_nan ? loss[token] : 1 / row.sum;
      softmax(x, vocab_size, row.max, scale);
      if (is_known) x[label] = token_gradient(label_logit, row.max, scale, true);
    }
  };

  const int64_t num_workers =
      std::min<int64_t>({num_threads, num_tokens, 1 + num_tokens * vocab_size / kMinLogitsPerThread});
  std::vector<std::future<void>> workers;
  for (int64_t i = 1; i < num_workers; ++i)
    workers.push_back(
        std::async(std::launch::async, run, num_tokens * i / num_workers, num_tokens * (i + 1) / num_workers));
  run(0, num_tokens / std::max<int64_t>(num_workers, 1));
  for (auto& worker : workers) worker.get();
}

template void masked_token_loss_cpu(float*, const int64_t*, int64_t, int64_t, bool, int, float*, bool*);
template void masked_token_loss_cpu(double*, const int64_t*, int64_t, int64_t, bool, int, double*, bool*);

}  // namespace fastm3ae
