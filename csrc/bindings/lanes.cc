#include "bindings/checks.h"
#include "cpu/arena.h"
#include "cpu/isa.h"

namespace lipfast {
namespace {

void CheckSameSize(const LaneMap& lanes, const PlainMap& plain) {
  if (lanes.batch == plain.batch && lanes.channels == plain.channels && lanes.height == plain.height &&
      lanes.width == plain.width) {
    return;
  }
  Refuse("the lane map and the tensor differ in size: (" + std::to_string(lanes.batch) + ", " +
         std::to_string(lanes.channels) + ", " + std::to_string(lanes.height) + ", " + std::to_string(lanes.width) +
         ") and (" + std::to_string(plain.batch) + ", " + std::to_string(plain.channels) + ", " +
         std::to_string(plain.height) + ", " + std::to_string(plain.width) + ")");
}

void LanesFromPlain(const py::array& plain, const py::array& lanes, int64_t halo, int threads) {
  const PlainMap from = AsPlainMap(plain, "from");
  const LaneMap to = AsLaneMap(lanes, from.height, from.width, halo, "to");
  CheckSameSize(to, from);
  py::gil_scoped_release release;
  Kernels<LaneKernels>().from_plain(from, to, threads);
}

void LanesToPlain(const py::array& lanes, const py::array& plain, int64_t halo, int threads) {
  const PlainMap to = AsPlainMap(plain, "to");
  const LaneMap from = AsLaneMap(lanes, to.height, to.width, halo, "from");
  CheckSameSize(from, to);
  py::gil_scoped_release release;
  Kernels<LaneKernels>().to_plain(from, to, threads);
}

void FillHalo(const py::array& lanes, int64_t height, int64_t width, int64_t halo, int mode, int64_t pad, int threads) {
  const LaneMap map = AsLaneMap(lanes, height, width, halo, "map");
  const Padding padding = AsPadding(mode, pad, map);
  py::gil_scoped_release release;
  Kernels<LaneKernels>().fill_halo(map, padding, pad, threads);
}

void CopyPixels(const py::array& from, int64_t from_halo, const py::array& to, int64_t to_halo, int64_t height,
                int64_t width, int threads) {
  const LaneMap source = AsLaneMap(from, height, width, from_halo, "from");
  const LaneMap target = AsLaneMap(to, height, width, to_halo, "to");
  if (source.batch != target.batch || source.channels != target.channels) {
    Refuse("maps of " + Describe(from) + " and " + Describe(to) + " differ in size");
  }
  py::gil_scoped_release release;
  Kernels<LaneKernels>().reblock(source, target, threads);
}

}  // namespace

void BindLanes(py::module_& m) {
  m.def("lanes_from_plain", &LanesFromPlain, py::arg("plain"), py::arg("lanes"), py::arg("halo"), py::arg("threads"));
  m.def("lanes_to_plain", &LanesToPlain, py::arg("lanes"), py::arg("plain"), py::arg("halo"), py::arg("threads"));
  m.def("fill_halo", &FillHalo, py::arg("lanes"), py::arg("height"), py::arg("width"), py::arg("halo"), py::arg("mode"),
        py::arg("pad"), py::arg("threads"));
  m.def("copy_pixels", &CopyPixels, py::arg("source"), py::arg("source_halo"), py::arg("to"), py::arg("to_halo"),
        py::arg("height"), py::arg("width"), py::arg("threads"));
  py::class_<ReusedArena>(m, "Arena", py::buffer_protocol(), "Memory in large pages; torch.frombuffer reads it.")
      .def(py::init<int64_t, bool>(), py::arg("bytes"), py::arg("zeroed"))
      .def_buffer([](ReusedArena& arena) {
        return py::buffer_info(arena.data(), sizeof(float), py::format_descriptor<float>::format(), 1,
                               {arena.bytes() / static_cast<int64_t>(sizeof(float))}, {sizeof(float)});
      });
}

}  // namespace lipfast
