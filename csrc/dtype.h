#pragma once

namespace fastm3ae {

// The dtypes of tensors whose type a kernel chooses when it is called.
enum class DType { kUInt8, kFloat16, kBFloat16, kFloat32, kFloat64 };

}  // namespace fastm3ae
