#include <pybind11/pybind11.h>

#include "masked_pixel_loss.h"
#include "resize_crop.h"

namespace py = pybind11;

namespace {

// Tensors arrive as the integers that torch.Tensor.data_ptr() returns; the callers in kernels/ have checked them.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void masked_pixel_loss_cpu(uintptr_t pred, uintptr_t image, uintptr_t is_hidden, int64_t batch_size, int64_t height,
                           int64_t width, int64_t patch_size, bool normalize_target, int num_threads, uintptr_t loss,
                           uintptr_t grad_pred) {
  fastm3ae::masked_pixel_loss_cpu(pointer<const T>(pred), pointer<const T>(image), pointer<const bool>(is_hidden),
                                  batch_size, height, width, patch_size, normalize_target, num_threads,
                                  pointer<T>(loss), pointer<T>(grad_pred));
}

template <typename Function>
void define(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::kw_only(), py::arg("pred"), py::arg("image"), py::arg("is_hidden"), py::arg("batch_size"),
        py::arg("height"), py::arg("width"), py::arg("patch_size"), py::arg("normalize_target"),
        py::arg("num_threads"), py::arg("loss"), py::arg("grad_pred"), py::call_guard<py::gil_scoped_release>());
}

void resize_crop_cpu(uintptr_t image, int64_t height, int64_t width, int64_t channels, int64_t new_height,
                     int64_t new_width, int64_t top, int64_t left, int64_t size, uintptr_t square) {
  fastm3ae::resize_crop_cpu(pointer<const uint8_t>(image), height, width, channels, new_height, new_width, top, left,
                            size, pointer<uint8_t>(square));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of fastm3ae; kernels/*.py checks the tensors and calls them.";
  define(m, "masked_pixel_loss_cpu_float32", masked_pixel_loss_cpu<float>);
  define(m, "masked_pixel_loss_cpu_float64", masked_pixel_loss_cpu<double>);
  m.def("resize_crop_cpu", resize_crop_cpu, py::kw_only(), py::arg("image"), py::arg("height"), py::arg("width"),
        py::arg("channels"), py::arg("new_height"), py::arg("new_width"), py::arg("top"), py::arg("left"),
        py::arg("size"), py::arg("square"), py::call_guard<py::gil_scoped_release>());
}
