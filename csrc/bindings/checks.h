// What every binding checks before a kernel sees a pointer. Arrays arrive as numpy
// views of torch tensors (tensor.detach().numpy() shares memory), so dtype, shape
// and strides are known here and the extension links neither torch nor numpy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/lanes.h"

namespace lipfast {

namespace py = pybind11;

// Throws ValueError(message). A message says where, what, and what came.
[[noreturn]] inline void Refuse(const std::string& message) { throw py::value_error(message); }

// The same unless ok. Making a message takes longer than any check: what runs often
// calls Refuse in an if.
inline void Check(bool ok, const std::string& message) {
  if (!ok) Refuse(message);
}

// "float32 (3, 4)", for messages.
std::string Describe(const py::array& array);

// An aligned, C-contiguous vector of n elements of type T (n < 0: any length).
template <class T>
T* Flat(const py::array& array, int64_t n, const char* name) {
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) || (n >= 0 && array.size() != n)) {
    Refuse(std::string(name) + ": expected contiguous " + py::str(py::dtype::of<T>()).cast<std::string>() +
           (n < 0 ? "" : " of " + std::to_string(n) + " elements") + ", got " + Describe(array));
  }
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// A float32 tensor (batch, channels, block_h + 2 halo, block_w + 2 halo, 16), whose
// vectors are contiguous and 64-byte aligned; other strides are free, so a range of
// channels of a larger map is a map. Holds pictures of height x width pixels.
LaneMap AsLaneMap(const py::array& array, int64_t height, int64_t width, int64_t halo, const char* name);

// A float32 tensor (batch, channels, height, width), any strides.
PlainMap AsPlainMap(const py::array& array, const char* name);

// A float32 tensor (pixels, channels), any strides, as the first pixels of one picture of height x width.
PlainMap AsPixels(const py::array& array, int64_t height, int64_t width, const char* name);

// Checks that a map's halo reaches as far as a padding asks, and that the picture
// is large enough for it.
Padding AsPadding(int mode, int64_t pad, const LaneMap& map);

// One registration function per bindings/*.cc, called by module.cc.
void BindCeiling(py::module_& m);
void BindConv(py::module_& m);
void BindEngine(py::module_& m);
void BindLanes(py::module_& m);
void BindWinograd(py::module_& m);
void BindSelect(py::module_& m);
void BindStep(py::module_& m);

}  // namespace lipfast
