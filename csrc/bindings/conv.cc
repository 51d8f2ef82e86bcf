#include "cpu/conv.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "bindings/checks.h"

namespace lipfast {
namespace {

// Conv with what the checks of its calls need to know.
class BoundConv {
 public:
  BoundConv(const ConvShape& shape, const ConvGeometry& geometry, const py::object& mask, int kernel, bool exact)
      : shape_(shape), geometry_(geometry) {
    const int64_t in_group = shape.groups > 0 ? shape.in_channels / shape.groups : 0;
    Check(shape.groups >= 1 && shape.in_channels >= 1 && shape.out_channels >= 1 &&
              shape.in_channels % shape.groups == 0 && shape.out_channels % shape.groups == 0,
          "conv: " + std::to_string(shape.in_channels) + " -> " + std::to_string(shape.out_channels) +
              " channels do not split into " + std::to_string(shape.groups) + " groups");
    Check(shape.kernel_h >= 1 && shape.kernel_w >= 1 && shape.stride >= 1 && shape.dilation >= 1 && shape.pad_h >= 0 &&
              shape.pad_w >= 0,
          "conv: kernel, stride and dilation must be at least 1 and padding at least 0");
    Check(kernel >= 0 && kernel <= 3, "conv: kernel choice " + std::to_string(kernel) + " is not one of 0 .. 3");
    Check(shape.out_channels * in_group * shape.kernel_h * shape.kernel_w < int64_t{1} << 31,
          "conv: more than 2^31 weights");
    const uint8_t* bytes = nullptr;
    if (!mask.is_none()) {
      bytes = Flat<uint8_t>(py::cast<py::array>(mask), shape.out_channels * in_group * shape.kernel_h * shape.kernel_w,
                            "mask");
    }
    conv_ = std::make_unique<Conv>(shape, geometry, bytes, static_cast<ConvKernel>(kernel), exact);
  }

  const Conv& conv() const { return *conv_; }

  void Forward(const py::array& values, const py::object& bias, const py::array& x, int64_t x_halo, const py::array& y,
               int64_t y_halo, const py::array& scratch, int threads) const {
    const float* v = Flat<float>(values, conv_->kept(), "values");
    const float* b = bias.is_none() ? nullptr : Flat<float>(py::cast<py::array>(bias), shape_.out_channels, "bias");
    const LaneMap in = Input(x, x_halo, InputHalo(), "x"), out = Output(y, y_halo, 0, "y");
    CheckBatch(in, out);
    float* s = Flat<float>(scratch, conv_->scratch_floats(threads), "scratch");
    py::gil_scoped_release release;
    conv_->Forward(v, b, in, out, s, threads);
  }

  void InputGradient(const py::array& values, const py::array& dy, int64_t dy_halo, const py::array& dx,
                     int64_t dx_halo, const py::array& scratch, int threads) const {
    const float* v = Flat<float>(values, conv_->kept(), "values");
    const LaneMap out = Output(dy, dy_halo, conv_->gradient_halo(), "dy");
    const LaneMap in = Input(dx, dx_halo, 0, "dx");
    CheckBatch(in, out);
    float* s = Flat<float>(scratch, conv_->scratch_floats(threads), "scratch");
    py::gil_scoped_release release;
    conv_->InputGradient(v, out, in, s, threads);
  }

  void WeightGradient(const py::array& x, int64_t x_halo, const py::array& dy, int64_t dy_halo,
                      const py::array& dvalues, const py::object& dbias, const py::array& scratch, int threads) const {
    const LaneMap in = Input(x, x_halo, InputHalo(), "x"), out = Output(dy, dy_halo, 0, "dy");
    CheckBatch(in, out);
    float* dv = Flat<float>(dvalues, conv_->kept(), "dvalues");
    float* db = dbias.is_none() ? nullptr : Flat<float>(py::cast<py::array>(dbias), shape_.out_channels, "dbias");
    float* s = Flat<float>(scratch, conv_->scratch_floats(threads), "scratch");
    py::gil_scoped_release release;
    conv_->WeightGradient(in, out, dv, db, s, threads);
  }

  // How far a forward pass reads around a block of the input.
  int64_t InputHalo() const {
    const auto reach = [&](int64_t kernel, int64_t pad) {
      return std::max(pad, shape_.dilation * (kernel - 1) - pad - shape_.stride + 1);
    };
    return std::max(reach(shape_.kernel_h, shape_.pad_h), reach(shape_.kernel_w, shape_.pad_w));
  }

 private:
  LaneMap Input(const py::array& array, int64_t halo, int64_t needed, const char* name) const {
    const LaneMap map = AsLaneMap(array, geometry_.height, geometry_.width, halo, name);
    CheckMap(map, shape_.in_channels, geometry_.in_block_h, geometry_.in_block_w, needed, name, array);
    return map;
  }
  LaneMap Output(const py::array& array, int64_t halo, int64_t needed, const char* name) const {
    const LaneMap map = AsLaneMap(array, conv_->out_height(), conv_->out_width(), halo, name);
    CheckMap(map, shape_.out_channels, geometry_.out_block_h, geometry_.out_block_w, needed, name, array);
    return map;
  }
  static void CheckMap(const LaneMap& map, int64_t channels, int64_t block_h, int64_t block_w, int64_t halo,
                       const char* name, const py::array& array) {
    if (map.channels != channels || map.block_h != block_h || map.block_w != block_w || map.halo < halo) {
      Refuse(std::string(name) + ": expected " + std::to_string(channels) + " channels in blocks of " +
             std::to_string(block_h) + " x " + std::to_string(block_w) + " with a halo of at least " +
             std::to_string(halo) + ", got " + Describe(array) + " with halo " + std::to_string(map.halo));
    }
    if (map.channels * map.channel_stride >= int64_t{1} << 31) {
      Refuse(std::string(name) + ": one image of the map has more than 2^31 floats; use smaller pictures");
    }
  }
  static void CheckBatch(const LaneMap& a, const LaneMap& b) {
    if (a.batch == b.batch) return;
    Refuse("conv: input and output hold " + std::to_string(a.batch) + " and " + std::to_string(b.batch) + " pictures");
  }

  ConvShape shape_;
  ConvGeometry geometry_;
  std::unique_ptr<Conv> conv_;
};

}  // namespace

void BindConv(py::module_& m) {
  py::class_<BoundConv>(m, "Conv", "One convolution on lane maps; see csrc/cpu/conv.h.")
      .def(py::init([](int64_t out_channels, int64_t in_channels, int64_t groups, std::pair<int64_t, int64_t> kernel,
                       int64_t stride, int64_t dilation, std::pair<int64_t, int64_t> pad, int padding_mode,
                       std::tuple<int64_t, int64_t, int64_t> batch_height_width, std::pair<int64_t, int64_t> out_block,
                       const py::object& mask, int choice, bool exact) {
             Check(padding_mode >= 0 && padding_mode <= 3, "conv: padding mode " + std::to_string(padding_mode));
             const ConvShape shape = {
                 out_channels, in_channels, groups,    kernel.first, kernel.second,
                 stride,       dilation,    pad.first, pad.second,   static_cast<Padding>(padding_mode)};
             const ConvGeometry geometry = {std::get<0>(batch_height_width),
                                            std::get<1>(batch_height_width),
                                            std::get<2>(batch_height_width),
                                            stride * out_block.first,
                                            stride * out_block.second,
                                            out_block.first,
                                            out_block.second};
             return std::make_unique<BoundConv>(shape, geometry, mask, choice, exact);
           }),
           py::arg("out_channels"), py::arg("in_channels"), py::arg("groups"), py::arg("kernel"), py::arg("stride"),
           py::arg("dilation"), py::arg("pad"), py::arg("padding_mode"), py::arg("batch_height_width"),
           py::arg("out_block"), py::arg("mask"), py::arg("choice"), py::arg("exact"))
      .def_property_readonly("kept", [](const BoundConv& c) { return c.conv().kept(); })
      .def_property_readonly(
          "out_size", [](const BoundConv& c) { return py::make_tuple(c.conv().out_height(), c.conv().out_width()); })
      .def(
          "scratch_floats", [](const BoundConv& c, int threads) { return c.conv().scratch_floats(threads); },
          py::arg("threads"))
      .def_property_readonly("input_halo", &BoundConv::InputHalo)
      .def_property_readonly("gradient_halo", [](const BoundConv& c) { return c.conv().gradient_halo(); })
      .def_property_readonly(
          "kernels",
          [](const BoundConv& c) {
            return py::make_tuple(c.conv().forward_kernel(), c.conv().input_gradient_kernel(),
                                  c.conv().weight_gradient_kernel());
          },
          "What runs forward, input gradient and weight gradient.")
      .def("forward", &BoundConv::Forward, py::arg("values"), py::arg("bias"), py::arg("x"), py::arg("x_halo"),
           py::arg("y"), py::arg("y_halo"), py::arg("scratch"), py::arg("threads"))
      .def("input_gradient", &BoundConv::InputGradient, py::arg("values"), py::arg("dy"), py::arg("dy_halo"),
           py::arg("dx"), py::arg("dx_halo"), py::arg("scratch"), py::arg("threads"))
      .def("weight_gradient", &BoundConv::WeightGradient, py::arg("x"), py::arg("x_halo"), py::arg("dy"),
           py::arg("dy_halo"), py::arg("dvalues"), py::arg("dbias"), py::arg("scratch"), py::arg("threads"));
}

}  // namespace lipfast
