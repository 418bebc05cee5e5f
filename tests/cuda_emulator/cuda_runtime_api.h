#pragma once

// As much of CUDA as csrc/*.cu uses, on the threads of a CPU: one thread of the system per thread of a block, one block
// after the other. test_cuda_emulator.py writes "kernel<<<grid, block, shared, stream>>>(" as "launch(kernel, grid, ...".

#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

struct Index {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_emulator {

constexpr int kLanes = 32;

struct Warp {
  std::barrier<> barrier{kLanes};
  alignas(16) unsigned char values[kLanes][16];
};

inline thread_local Index thread_index, block_index;
inline thread_local Warp* warp;
inline thread_local std::barrier<>* block;

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned threads, int, cudaStream_t,
            std::common_type_t<Parameters>... arguments) {
  for (unsigned b = 0; b < grid; ++b) {
    std::barrier<> barrier(threads);
    const auto warps = std::make_unique<Warp[]>(threads / kLanes);
    std::vector<std::jthread> running;
    for (unsigned t = 0; t < threads; ++t)
      running.emplace_back([&, t] {
        thread_index = {t};
        block_index = {b};
        warp = &warps[t / kLanes];
        block = &barrier;
        kernel(arguments...);
      });
  }
}

}  // namespace cuda_emulator

#define threadIdx cuda_emulator::thread_index
#define blockIdx cuda_emulator::block_index

inline void __syncthreads() { cuda_emulator::block->arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  cuda_emulator::Warp& warp = *cuda_emulator::warp;
  const unsigned lane = threadIdx.x % cuda_emulator::kLanes;
  *reinterpret_cast<T*>(warp.values[lane]) = value;
  warp.barrier.arrive_and_wait();
  const T other = *reinterpret_cast<const T*>(warp.values[lane ^ lanes]);
  warp.barrier.arrive_and_wait();
  return other;
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
