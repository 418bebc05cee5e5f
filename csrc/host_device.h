#pragma once

// Marks a function that both the C++ code and the CUDA kernels run; inline, also within the clones of clones.h.
#if defined(__CUDACC__)
#define FASTM3AE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTM3AE_HOST_DEVICE inline __attribute__((always_inline))
#endif
