#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "dtype.h"
#include "masked_pixel_loss.h"
#include "masked_token_loss.h"
#include "resize_crop.h"

namespace py = pybind11;

namespace {

// Tensors arrive as the integers that torch.Tensor.data_ptr() returns; the callers in kernels/ have checked them.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

[[maybe_unused]] fastm3ae::DType dtype(const std::string& name) {
  using fastm3ae::DType;
  if (name == "uint8") return DType::kUInt8;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  throw std::invalid_argument("no kernel is compiled for " + name);
}

fastm3ae::PixelLossShape pixel_loss_shape(int64_t batch_size, int64_t height, int64_t width, int64_t patch_size,
                                          int64_t num_preds, uintptr_t is_hidden, uintptr_t hidden_index,
                                          bool normalize_target) {
  return {batch_size, height,    width, patch_size, num_preds, pointer<const bool>(is_hidden),
          pointer<const int64_t>(hidden_index), normalize_target};
}

template <typename T, typename Pixel>
void masked_pixel_loss_cpu(const fastm3ae::PixelLossShape& shape, uintptr_t pred, uintptr_t image, uintptr_t mean,
                           uintptr_t std, int num_threads, uintptr_t loss, uintptr_t difference, uintptr_t grad_scale) {
  fastm3ae::masked_pixel_loss_cpu(shape, pointer<const T>(pred), pointer<const Pixel>(image),
                                  pointer<const float>(mean), pointer<const float>(std), num_threads, pointer<T>(loss),
                                  pointer<T>(difference), pointer<T>(grad_scale));
}

template <typename Function>
void define_masked_pixel_loss_cpu(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::arg("shape"), py::kw_only(), py::arg("pred"), py::arg("image"), py::arg("mean"),
        py::arg("std"), py::arg("num_threads"), py::arg("loss"), py::arg("difference"), py::arg("grad_scale"),
        py::call_guard<py::gil_scoped_release>());
}

#ifdef FASTM3AE_CUDA_ARCHITECTURES
void masked_pixel_loss_cuda(const fastm3ae::PixelLossShape& shape, const std::string& pred_dtype,
                            const std::string& image_dtype, uintptr_t pred, uintptr_t image, uintptr_t mean,
                            uintptr_t std, int device, uintptr_t stream, uintptr_t partial, uintptr_t loss,
                            uintptr_t difference, uintptr_t grad_scale) {
  fastm3ae::masked_pixel_loss_cuda(shape, dtype(pred_dtype), dtype(image_dtype), pointer<void>(pred),
                                   pointer<void>(image), pointer<const float>(mean), pointer<const float>(std), device,
                                   pointer<void>(stream), pointer<void>(partial), pointer<void>(loss),
                                   pointer<void>(difference), pointer<void>(grad_scale));
}
#endif

template <typename T>
void masked_token_loss_cpu(uintptr_t logits, uintptr_t labels, int64_t num_tokens, int64_t vocab_size, bool needs_grad,
                           int num_threads, uintptr_t loss, uintptr_t is_correct) {
  fastm3ae::masked_token_loss_cpu(pointer<T>(logits), pointer<const int64_t>(labels), num_tokens, vocab_size,
                                  needs_grad, num_threads, pointer<T>(loss), pointer<bool>(is_correct));
}

template <typename Function>
void define_masked_token_loss_cpu(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::kw_only(), py::arg("logits"), py::arg("labels"), py::arg("num_tokens"),
        py::arg("vocab_size"), py::arg("needs_grad"), py::arg("num_threads"), py::arg("loss"), py::arg("is_correct"),
        py::call_guard<py::gil_scoped_release>());
}

#ifdef FASTM3AE_CUDA_ARCHITECTURES
void masked_token_loss_cuda(const std::string& logits_dtype, uintptr_t logits, uintptr_t labels, int64_t num_tokens,
                            int64_t vocab_size, int64_t num_columns, bool needs_grad, int device, uintptr_t stream,
                            uintptr_t loss, uintptr_t is_correct) {
  fastm3ae::masked_token_loss_cuda(dtype(logits_dtype), pointer<void>(logits), pointer<const int64_t>(labels),
                                   num_tokens, vocab_size, num_columns, needs_grad, device, pointer<void>(stream),
                                   pointer<float>(loss), pointer<bool>(is_correct));
}
#endif

void resize_crop_cpu(uintptr_t image, int64_t height, int64_t width, int64_t channels, int64_t new_height,
                     int64_t new_width, int64_t top, int64_t left, int64_t size, uintptr_t square) {
  fastm3ae::resize_crop_cpu(pointer<const uint8_t>(image), height, width, channels, new_height, new_width, top, left,
                            size, pointer<uint8_t>(square));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ and CUDA kernels of fastm3ae; kernels/*.py checks the tensors and calls them.";

  py::class_<fastm3ae::PixelLossShape>(m, "PixelLossShape")
      .def(py::init(&pixel_loss_shape), py::kw_only(), py::arg("batch_size"), py::arg("height"), py::arg("width"),
           py::arg("patch_size"), py::arg("num_preds"), py::arg("is_hidden"), py::arg("hidden_index"),
           py::arg("normalize_target"));
  define_masked_pixel_loss_cpu(m, "masked_pixel_loss_cpu_uint8", masked_pixel_loss_cpu<float, uint8_t>);
  define_masked_pixel_loss_cpu(m, "masked_pixel_loss_cpu_float32", masked_pixel_loss_cpu<float, float>);
  define_masked_pixel_loss_cpu(m, "masked_pixel_loss_cpu_float64", masked_pixel_loss_cpu<double, double>);
  define_masked_token_loss_cpu(m, "masked_token_loss_cpu_float32", masked_token_loss_cpu<float>);
  define_masked_token_loss_cpu(m, "masked_token_loss_cpu_float64", masked_token_loss_cpu<double>);
  m.def("resize_crop_cpu", resize_crop_cpu, py::kw_only(), py::arg("image"), py::arg("height"), py::arg("width"),
        py::arg("channels"), py::arg("new_height"), py::arg("new_width"), py::arg("top"), py::arg("left"),
        py::arg("size"), py::arg("square"), py::call_guard<py::gil_scoped_release>());

  // What is in this module: ("sm_80", "compute_90", ...), empty without CUDA, and the version of nvcc.
#ifdef FASTM3AE_CUDA_ARCHITECTURES
  m.attr("cuda_architectures") = py::make_tuple(FASTM3AE_CUDA_ARCHITECTURES);
  m.attr("cuda_version") = FASTM3AE_CUDA_VERSION;
  m.attr("masked_pixel_loss_preds_per_block") = fastm3ae::kPixelLossPredsPerBlock;
  m.def("masked_pixel_loss_cuda", masked_pixel_loss_cuda, py::arg("shape"), py::kw_only(), py::arg("pred_dtype"),
        py::arg("image_dtype"), py::arg("pred"), py::arg("image"), py::arg("mean"), py::arg("std"), py::arg("device"),
        py::arg("stream"), py::arg("partial"), py::arg("loss"), py::arg("difference"), py::arg("grad_scale"),
        py::call_guard<py::gil_scoped_release>());
  m.def("masked_token_loss_cuda", masked_token_loss_cuda, py::kw_only(), py::arg("logits_dtype"), py::arg("logits"),
        py::arg("labels"), py::arg("num_tokens"), py::arg("vocab_size"), py::arg("num_columns"), py::arg("needs_grad"),
        py::arg("device"), py::arg("stream"), py::arg("loss"), py::arg("is_correct"),
        py::call_guard<py::gil_scoped_release>());
#else
  m.attr("cuda_architectures") = py::tuple();
  m.attr("cuda_version") = py::none();
#endif
}
