#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastm3ae {

constexpr int64_t kIgnoredLabel = -100;

// loss = log(sum over v of exp(x_v)) - x_label for each row x of logits, and its gradient softmax(x) - one_hot(label).
//
//   logits      (num_tokens, vocab_size)  overwritten with the gradient if needs_grad
//   labels      (num_tokens)              kIgnoredLabel: no loss, no gradient, not correct; another one that is not in
//                                         the vocabulary gives a loss and a gradient of NaN
//   loss        (num_tokens)
//   is_correct  (num_tokens)              whether the label is the first of the largest logits; not at a loss of NaN
//
// The result does not depend on num_threads, to the last bit.
template <typename T>
void masked_token_loss_cpu(T* logits, const int64_t* labels, int64_t num_tokens, int64_t vocab_size, bool needs_grad,
                           int num_threads, T* loss, bool* is_correct);

// As above with float32, bfloat16 or float16 logits and a float32 loss, queued on the stream. The rows of logits have
// num_columns >= vocab_size columns, a multiple of 8, and begin at a multiple of 16 bytes. The logits behind the
// vocabulary are -infinity, so that their gradient is 0.
void masked_token_loss_cuda(DType dtype, void* logits, const int64_t* labels, int64_t num_tokens, int64_t vocab_size,
                            int64_t num_columns, bool needs_grad, int device, void* stream, float* loss,
                            bool* is_correct);

}  // namespace fastm3ae
