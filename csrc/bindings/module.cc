// All bindings are one unit for the compiler: pybind11's headers take it longer than
// any of these files.
#include <pybind11/pybind11.h>

#include "bindings/ceiling.cc"
#include "bindings/checks.cc"
#include "bindings/conv.cc"
#include "bindings/engine.cc"
#include "bindings/entries.cc"
#include "bindings/lanes.cc"
#include "bindings/select.cc"
#include "bindings/step.cc"
#include "bindings/winograd.cc"
#include "cpu/isa.h"

namespace lipfast {
namespace {

Isa IsaFromName(const std::string& name) {
  for (Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (name == IsaName(isa)) return isa;
  }
  throw py::value_error("instruction set '" + name + "' is unknown; use avx512, avx2 or plain");
}

py::list AvailableIsas() {
  py::list names;
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kPlain}) {
    if (IsaAvailable(isa)) names.append(IsaName(isa));
  }
  return names;
}

}  // namespace
}  // namespace lipfast

PYBIND11_MODULE(_C, m) {
  using namespace lipfast;
  m.doc() = "lipfast's CPU kernels. Call them through lipfast.ops, which checks and documents.";
  m.def("isa", [] { return IsaName(ActiveIsa()); }, "Name of the instruction set in use.");
  m.def("set_isa", [](const std::string& name) { SetIsa(IsaFromName(name)); }, py::arg("name"));
  m.def("available_isas", &AvailableIsas, "Instruction sets that build and CPU have, fastest first.");
  BindCeiling(m);
  BindConv(m);
  BindEngine(m);
  BindEntries(m);
  BindLanes(m);
  BindWinograd(m);
  BindSelect(m);
  BindStep(m);
}
