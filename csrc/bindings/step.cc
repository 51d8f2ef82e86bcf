#include "bindings/checks.h"
#include "cpu/adam.h"
#include "cpu/isa.h"
#include "cpu/noise.h"

namespace lipfast {
namespace {

void AdamStep(const py::array& values, const py::array& gradient, const py::array& m, const py::array& v, int64_t step,
              double lr, double beta1, double beta2, double eps, double weight_decay, int threads) {
  float* value_data = Flat<float>(values, -1, "values");
  const int64_t n = values.size();
  const float* gradient_data = Flat<float>(gradient, n, "gradient");
  float* m_data = Flat<float>(m, n, "m");
  float* v_data = Flat<float>(v, n, "v");
  Check(step >= 1, "step: expected at least 1, got " + std::to_string(step));
  const AdamSettings settings = {lr, beta1, beta2, eps, weight_decay};
  py::gil_scoped_release release;
  Kernels<StepKernels>().adam(settings, step, value_data, gradient_data, m_data, v_data, n, threads);
}

void SgdStep(const py::array& values, const py::array& gradient, const py::array& momentum_buffer, int64_t step,
             double lr, double momentum, double dampening, double weight_decay, bool nesterov, int threads) {
  float* value_data = Flat<float>(values, -1, "values");
  const int64_t n = values.size();
  const float* gradient_data = Flat<float>(gradient, n, "gradient");
  float* buffer_data = Flat<float>(momentum_buffer, momentum != 0 ? n : -1, "momentum_buffer");
  Check(step >= 1, "step: expected at least 1, got " + std::to_string(step));
  const SgdSettings settings = {lr, momentum, dampening, weight_decay, nesterov};
  py::gil_scoped_release release;
  Kernels<StepKernels>().sgd(settings, step, value_data, gradient_data, buffer_data, n, threads);
}

void AddNoise(const py::array& base, double scale, int64_t seed, int64_t step, const py::array& to, int threads) {
  const float* base_data = Flat<float>(base, -1, "base");
  const int64_t n = base.size();
  float* to_data = Flat<float>(to, n, "to");
  Check(seed >= 0, "seed: expected 0 or more, got " + std::to_string(seed));
  Check(step >= 0, "step: expected 0 or more, got " + std::to_string(step));
  py::gil_scoped_release release;
  Kernels<NoiseKernels>().add_noise(base_data, n, static_cast<float>(scale), static_cast<uint64_t>(seed),
                                    static_cast<uint64_t>(step), to_data, threads);
}

}  // namespace

void BindStep(py::module_& m) {
  m.def("adam_step", &AdamStep, py::arg("values"), py::arg("gradient"), py::arg("m"), py::arg("v"), py::arg("step"),
        py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("threads"));
  m.def("sgd_step", &SgdStep, py::arg("values"), py::arg("gradient"), py::arg("momentum_buffer"), py::arg("step"),
        py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("threads"));
  m.def("add_noise", &AddNoise, py::arg("base"), py::arg("scale"), py::arg("seed"), py::arg("step"), py::arg("to"),
        py::arg("threads"));
}

}  // namespace lipfast
