#include "bindings/checks.h"

namespace lipfast {
namespace {

int64_t StrideInFloats(const py::array& array, int axis) {
  return array.strides(axis) / static_cast<int64_t>(sizeof(float));
}

float* FloatData(const py::array& array, int axes, const char* name) {
  if (!py::isinstance<py::array_t<float>>(array) || array.ndim() != axes) {
    Refuse(std::string(name) + ": expected float32 with " + std::to_string(axes) + " axes, got " + Describe(array));
  }
  for (int axis = 0; axis < axes; ++axis) {
    if (array.strides(axis) < 0 || array.strides(axis) % static_cast<int64_t>(sizeof(float)) != 0) {
      Refuse(std::string(name) + ": stride " + std::to_string(array.strides(axis)) + " bytes of axis " +
             std::to_string(axis) + " is negative or splits a float; pass a contiguous tensor");
    }
  }
  return static_cast<float*>(const_cast<void*>(array.data()));
}

}  // namespace

std::string Describe(const py::array& array) {
  std::string shape;
  for (int axis = 0; axis < array.ndim(); ++axis) shape += (axis ? ", " : "") + std::to_string(array.shape(axis));
  return py::str(array.dtype()).cast<std::string>() + " (" + shape + ")";
}

LaneMap AsLaneMap(const py::array& array, int64_t height, int64_t width, int64_t halo, const char* name) {
  float* data = FloatData(array, 5, name);
  const auto refuse = [name](const std::string& message) { Refuse(std::string(name) + ": " + message); };
  if (array.shape(4) != kGrid * kGrid || StrideInFloats(array, 4) != 1 || StrideInFloats(array, 3) != kGrid * kGrid) {
    refuse("a lane map ends in contiguous vectors of 16, got " + Describe(array));
  }
  const LaneMap map = {data,
                       array.shape(0),
                       array.shape(1),
                       height,
                       width,
                       array.shape(2) - 2 * halo,
                       array.shape(3) - 2 * halo,
                       halo,
                       StrideInFloats(array, 0),
                       StrideInFloats(array, 1),
                       StrideInFloats(array, 2)};
  if (height < 1 || width < 1 || halo < 0 || map.block_h < 1 || map.block_w < 1 || kGrid * map.block_h < height ||
      kGrid * map.block_w < width) {
    refuse(Describe(array) + " with halo " + std::to_string(halo) + " cannot hold " + std::to_string(height) + " x " +
           std::to_string(width) + " pixels");
  }
  if (reinterpret_cast<uintptr_t>(data) % 64 != 0 || map.row_stride % 16 != 0 || map.channel_stride % 16 != 0 ||
      map.batch_stride % 16 != 0) {
    refuse("vectors must be 64-byte aligned");
  }
  LaneMap inside = map;
  inside.data = map.At(0, 0, halo, halo);
  return inside;
}

PlainMap AsPlainMap(const py::array& array, const char* name) {
  float* data = FloatData(array, 4, name);
  return {data,
          array.shape(0),
          array.shape(1),
          array.shape(2),
          array.shape(3),
          StrideInFloats(array, 0),
          StrideInFloats(array, 1),
          StrideInFloats(array, 2),
          StrideInFloats(array, 3)};
}

PlainMap AsPixels(const py::array& array, int64_t height, int64_t width, const char* name) {
  float* data = FloatData(array, 2, name);
  const int64_t pixel = StrideInFloats(array, 0), pixels = array.shape(0);
  if (pixels > height * width) {
    Refuse(std::string(name) + ": " + Describe(array) + " has more pixels than " + std::to_string(height) + " x " +
           std::to_string(width));
  }
  return {data, 1, array.shape(1), height, width, 0, StrideInFloats(array, 1), width * pixel, pixel, pixels};
}

Padding AsPadding(int mode, int64_t pad, const LaneMap& map) {
  if (mode < 0 || mode > 3) Refuse("padding mode " + std::to_string(mode) + " is not one of 0 .. 3");
  if (pad < 0 || pad > map.halo) {
    Refuse("padding of " + std::to_string(pad) + " pixels does not fit in a halo of " + std::to_string(map.halo));
  }
  const auto padding = static_cast<Padding>(mode);
  const int64_t side = map.height < map.width ? map.height : map.width;
  const int64_t most = padding == Padding::kReflect ? side - 1 : padding == Padding::kCircular ? side : pad;
  if (pad > most) {
    Refuse("padding of " + std::to_string(pad) + " pixels is more than a picture of " + std::to_string(map.height) +
           " x " + std::to_string(map.width) + " allows");
  }
  return padding;
}

}  // namespace lipfast
