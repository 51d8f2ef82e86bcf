#include "cpu/winograd.h"

#include "bindings/checks.h"

namespace lipfast {
namespace {

std::string Size(const LaneMap& m) {
  return "(" + std::to_string(m.batch) + ", " + std::to_string(m.channels) + ", " + std::to_string(m.height) + ", " +
         std::to_string(m.width) + ") in blocks of " + std::to_string(m.block_h) + " x " + std::to_string(m.block_w);
}

// Input and output of one layer: equal but for the channels.
void CheckPair(const LaneMap& x, const LaneMap& y, int64_t kernel) {
  const int64_t least = kernel / 2;
  Check(x.halo >= least,
        "winograd: the input's halo must be at least " + std::to_string(least) + ", got " + std::to_string(x.halo));
  Check(x.batch == y.batch && x.height == y.height && x.width == y.width && x.block_h == y.block_h &&
            x.block_w == y.block_w,
        "winograd: the maps differ in more than channels: " + Size(x) + " and " + Size(y));
}

// Of stride 1.
const WinogradKernels& CheckedKernels(int64_t kernel, int tile) {
  Check(kernel == 3 || kernel == 5, "winograd: kernel is 3 or 5, got " + std::to_string(kernel));
  const bool known = tile == 2 || (tile == 4 && kernel == 3);
  Check(known, std::string("winograd: tile is ") + (kernel == 3 ? "2 or 4" : "2") + ", got " + std::to_string(tile));
  return WinogradKernelsOf(kernel, 1);
}

float* Scratch(const py::array& array, int64_t floats) {
  float* data = Flat<float>(array, -1, "scratch");
  Check(array.size() >= floats && reinterpret_cast<uintptr_t>(data) % 64 == 0,
        "scratch: expected " + std::to_string(floats) + " floats, 64-byte aligned, got " + Describe(array));
  return data;
}

void TransformWeights(const py::array& w, int64_t out, int64_t in, int64_t kernel, bool transposed, int tile,
                      const py::array& u, int threads) {
  const WinogradKernels& kernels = CheckedKernels(kernel, tile);
  const float* from = Flat<float>(w, out * in * kernel * kernel, "w");
  float* to = Flat<float>(u, WinogradWeightFloats(out, in, tile, kernel), "u");
  py::gil_scoped_release release;
  kernels.transform_weights(from, out, in, transposed, tile, to, threads);
}

void Forward(const py::array& x, int64_t x_halo, const py::array& u, const py::object& bias, const py::array& y,
             int64_t y_halo, int64_t height, int64_t width, int64_t kernel, int tile, const py::array& scratch,
             int threads) {
  const WinogradKernels& kernels = CheckedKernels(kernel, tile);
  const LaneMap from = AsLaneMap(x, height, width, x_halo, "x"), to = AsLaneMap(y, height, width, y_halo, "y");
  CheckPair(from, to, kernel);
  const float* weights = Flat<float>(u, WinogradWeightFloats(to.channels, from.channels, tile, kernel), "u");
  const float* offsets = bias.is_none() ? nullptr : Flat<float>(py::cast<py::array>(bias), to.channels, "bias");
  float* memory = Scratch(scratch, kernels.forward_scratch(from, to, tile, threads));
  py::gil_scoped_release release;
  kernels.forward(from, weights, offsets, to, {}, tile, memory, threads);
}

int64_t ForwardScratch(const py::array& x, int64_t x_halo, const py::array& y, int64_t y_halo, int64_t height,
                       int64_t width, int64_t kernel, int tile, int threads) {
  return CheckedKernels(kernel, tile)
      .forward_scratch(AsLaneMap(x, height, width, x_halo, "x"), AsLaneMap(y, height, width, y_halo, "y"), tile,
                       threads);
}

void WeightGradient(const py::array& x, int64_t x_halo, const py::array& dy, int64_t dy_halo, const py::array& dw,
                    int64_t height, int64_t width, int64_t kernel, int tile, const py::array& scratch, int threads) {
  const WinogradKernels& kernels = CheckedKernels(kernel, tile);
  const LaneMap in = AsLaneMap(x, height, width, x_halo, "x"), out = AsLaneMap(dy, height, width, dy_halo, "dy");
  CheckPair(in, out, kernel);
  float* gradient = Flat<float>(dw, out.channels * in.channels * kernel * kernel, "dw");
  float* memory = Scratch(scratch, kernels.weight_gradient_scratch(in, out, tile, threads));
  py::gil_scoped_release release;
  kernels.weight_gradient(in, out, gradient, tile, memory, threads);
}

int64_t WeightGradientScratch(const py::array& x, int64_t x_halo, const py::array& dy, int64_t dy_halo, int64_t height,
                              int64_t width, int64_t kernel, int tile, int threads) {
  return CheckedKernels(kernel, tile)
      .weight_gradient_scratch(AsLaneMap(x, height, width, x_halo, "x"), AsLaneMap(dy, height, width, dy_halo, "dy"),
                               tile, threads);
}

}  // namespace

void BindWinograd(py::module_& m) {
  m.def("winograd_tile", &WinogradTile, py::arg("block_h"), py::arg("block_w"), py::arg("kernel"), py::arg("stride"));
  m.def("winograd_weight_floats", &WinogradWeightFloats, py::arg("out_channels"), py::arg("in_channels"),
        py::arg("tile"), py::arg("kernel"));
  m.def("winograd_transform_weights", &TransformWeights, py::arg("w"), py::arg("out_channels"), py::arg("in_channels"),
        py::arg("kernel"), py::arg("transposed"), py::arg("tile"), py::arg("u"), py::arg("threads"));
  m.def("winograd_forward", &Forward, py::arg("x"), py::arg("x_halo"), py::arg("u"), py::arg("bias").none(true),
        py::arg("y"), py::arg("y_halo"), py::arg("height"), py::arg("width"), py::arg("kernel"), py::arg("tile"),
        py::arg("scratch"), py::arg("threads"));
  m.def("winograd_forward_scratch", &ForwardScratch, py::arg("x"), py::arg("x_halo"), py::arg("y"), py::arg("y_halo"),
        py::arg("height"), py::arg("width"), py::arg("kernel"), py::arg("tile"), py::arg("threads"));
  m.def("winograd_weight_gradient", &WeightGradient, py::arg("x"), py::arg("x_halo"), py::arg("dy"), py::arg("dy_halo"),
        py::arg("dw"), py::arg("height"), py::arg("width"), py::arg("kernel"), py::arg("tile"), py::arg("scratch"),
        py::arg("threads"));
  m.def("winograd_weight_gradient_scratch", &WeightGradientScratch, py::arg("x"), py::arg("x_halo"), py::arg("dy"),
        py::arg("dy_halo"), py::arg("height"), py::arg("width"), py::arg("kernel"), py::arg("tile"),
        py::arg("threads"));
}

}  // namespace lipfast
