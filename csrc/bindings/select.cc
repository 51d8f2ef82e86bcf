#include <memory>

#include "bindings/checks.h"
#include "cpu/prune.h"

namespace lipfast {
namespace {

const uint8_t* Bools(const py::handle& array, int64_t n, const char* name) {
  return reinterpret_cast<const uint8_t*>(Flat<bool>(array.cast<py::array>(), n, name));
}

// A pruning round between its two phases; holds on to the arrays it points into.
struct Round {
  py::list scores, alive;
  std::vector<int64_t> sizes;
  std::unique_ptr<Pruning> pruning;
};

Round Begin(const py::list& scores, const py::list& alive, int64_t count, int threads) {
  Check(scores.size() == alive.size(),
        "got " + std::to_string(scores.size()) + " score arrays but " + std::to_string(alive.size()) + " masks");
  Round round = {scores, alive, {}, nullptr};
  std::vector<WeightPart> parts;
  for (size_t i = 0; i < scores.size(); ++i) {
    const auto score = scores[i].cast<py::array>();
    const float* data = Flat<float>(score, -1, "score");
    parts.push_back({data, Bools(alive[i], score.size(), "alive"), score.size()});
    round.sizes.push_back(score.size());
  }
  py::gil_scoped_release release;
  round.pruning.reset(new Pruning(std::move(parts), count, threads));
  return round;
}

// The i-th array's data, null where the list is None.
template <class T>
T* Optional(const py::object& arrays, size_t i, int64_t n, const char* name) {
  return arrays.is_none() ? nullptr : Flat<T>(arrays.cast<py::list>()[i].cast<py::array>(), n, name);
}

void CheckLength(const py::object& arrays, size_t n, const char* name) {
  Check(arrays.is_none() || arrays.cast<py::list>().size() == n,
        std::string(name) + ": expected one array for each of " + std::to_string(n) + " parts");
}

void Write(const Round& round, const py::object& masks, const py::object& bits, const py::object& start,
           const py::object& dense, const py::object& values, int threads) {
  Check(round.pruning->valid(), "there is no cut to write: too few living weights, or NaN");
  Check(!start.is_none() || (dense.is_none() && values.is_none()), "dense and values need start");
  const size_t n = round.sizes.size();
  CheckLength(masks, n, "masks");
  CheckLength(bits, n, "bits");
  CheckLength(start, n, "start");
  CheckLength(dense, n, "dense");
  std::vector<PrunedPart> parts;
  for (size_t i = 0; i < n; ++i) {
    const int64_t size = round.sizes[i];
    parts.push_back({Optional<float>(start, i, size, "start"),
                     reinterpret_cast<uint8_t*>(Optional<bool>(masks, i, size, "mask")),
                     Optional<uint8_t>(bits, i, (size + 7) / 8, "bits"), Optional<float>(dense, i, size, "dense")});
  }
  float* packed =
      values.is_none() ? nullptr : Flat<float>(values.cast<py::array>(), round.pruning->survivors(), "values");
  py::gil_scoped_release release;
  round.pruning->Write(parts, packed, threads);
}

int64_t CountMask(const py::array& mask, int threads) {
  const uint8_t* data = Bools(mask, -1, "mask");
  py::gil_scoped_release release;
  return CountOnes(data, mask.size(), threads);
}

void GatherKept(const py::array& dense, const py::array& mask, const py::array& values, int threads) {
  const int64_t n = dense.size();
  const float* from = Flat<float>(dense, -1, "dense");
  const uint8_t* alive = Bools(mask, n, "mask");
  float* to = Flat<float>(values, CountOnes(alive, n, threads), "values");
  py::gil_scoped_release release;
  Gather(from, alive, n, to, threads);
}

void ScatterKept(const py::array& values, const py::array& mask, const py::array& dense, int threads) {
  const int64_t n = dense.size();
  float* to = Flat<float>(dense, -1, "dense");
  const uint8_t* alive = Bools(mask, n, "mask");
  const float* from = Flat<float>(values, CountOnes(alive, n, threads), "values");
  py::gil_scoped_release release;
  Scatter(from, alive, n, to, threads);
}

}  // namespace

void BindSelect(py::module_& m) {
  py::class_<Round>(m, "Pruning", "A pruning round: its cut, found when made, and what it writes.")
      .def(py::init(&Begin), py::arg("scores"), py::arg("alive"), py::arg("count"), py::arg("threads"))
      .def_property_readonly("living", [](const Round& round) { return round.pruning->living(); })
      .def_property_readonly("nan_part", [](const Round& round) { return round.pruning->nan_part(); })
      .def("write", &Write, py::arg("masks"), py::arg("bits"), py::arg("start"), py::arg("dense"), py::arg("values"),
           py::arg("threads"));
  m.def("count_ones", &CountMask, py::arg("mask"), py::arg("threads"));
  m.def("gather_kept", &GatherKept, py::arg("dense"), py::arg("mask"), py::arg("values"), py::arg("threads"));
  m.def("scatter_kept", &ScatterKept, py::arg("values"), py::arg("mask"), py::arg("dense"), py::arg("threads"));
}

}  // namespace lipfast
