// Python module saelens_certify._native: the parts of the core that need no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "build_info/build_info.h"
#include "stats/exact_sum.h"
#include "stats/wealth.h"

namespace py = pybind11;
namespace sc = saelens_certify;

namespace {

using Values = py::array_t<double, py::array::c_style | py::array::forcecast>;

sc::Rounding rounding_named(const std::string& name) {
  if (name == "nearest") return sc::Rounding::kNearest;
  if (name == "down") return sc::Rounding::kDown;
  if (name == "up") return sc::Rounding::kUp;
  throw std::invalid_argument("rounding = '" + name + "': choose 'nearest', 'down' or 'up'");
}

void check_finite(const Values& values) {
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values.data()[i])) {
      throw std::invalid_argument("value " + std::to_string(i) + " is not finite");
    }
  }
}

double exact_sum(const Values& values, const std::string& rounding) {
  check_finite(values);
  return sc::exact_sum(values.data(), values.size(), rounding_named(rounding));
}

double exact_mean(const Values& values, const std::string& rounding) {
  if (values.size() == 0) throw std::invalid_argument("no values to average");
  check_finite(values);
  return sc::exact_mean(values.data(), values.size(), rounding_named(rounding));
}

// Refuses what could over- or underflow inside a product; NaN fails every comparison.
void check_between(const char* name, const double* numbers, py::ssize_t n, double low,
                   double high) {
  for (py::ssize_t i = 0; i < n; ++i) {
    if (!(numbers[i] >= low && numbers[i] <= high)) {
      throw std::invalid_argument(std::string(name) + " " + std::to_string(i) + " is outside [" +
                                  std::to_string(low) + ", " + std::to_string(high) + "]");
    }
  }
}

std::pair<py::array_t<double>, py::array_t<int64_t>> wealth(const Values& values,
                                                            const std::optional<Values>& limits,
                                                            double mean, const Values& caps) {
  if (limits && limits->size() != values.size()) {
    throw std::invalid_argument(std::to_string(limits->size()) + " limits for " +
                                std::to_string(values.size()) + " values");
  }
  check_between("value", values.data(), values.size(), 0.0, 1.0);
  check_between("mean", &mean, 1, std::ldexp(1.0, -40), 1.0);
  check_between("cap", caps.data(), caps.size(), 0.0, 0.98);
  const double* limit = limits ? limits->data() : nullptr;
  if (limits) check_between("limit", limit, limits->size(), 0.0, INFINITY);
  py::array_t<double> mantissas(caps.size());
  py::array_t<int64_t> exponents(caps.size());
  double* mantissa = mantissas.mutable_data();
  int64_t* exponent = exponents.mutable_data();
  {
    py::gil_scoped_release release;
    sc::wealth(values.data(), limit, values.size(), mean, caps.data(), caps.size(), mantissa,
               exponent);
  }
  return {mantissas, exponents};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Torch-free core of saelens_certify: exact sums, wealth of bets, build information.";
  m.def(
      "build_info",
      [] {
        auto info = sc::build_info();
        info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." +
                           std::to_string(PYBIND11_VERSION_MINOR) + "." +
                           std::to_string(PYBIND11_VERSION_MICRO);
        return info;
      },
      "Compiler, C++ standard, pybind11 version, instruction sets detected and active.");
  m.def("exact_sum", &exact_sum, py::arg("values"), py::arg("rounding") = "nearest",
        "Sum of float64 numbers, exact up to one final rounding (nearest, down or up).");
  m.def("exact_mean", &exact_mean, py::arg("values"), py::arg("rounding") = "nearest",
        "Mean of float64 numbers; with down (up) never above (below) the exact mean.");
  m.def("wealth", &wealth, py::arg("values"), py::arg("limits"), py::arg("mean"), py::arg("caps"),
        "Products over values in [0, 1] of (1 - s) + s value / mean with s = min(limit mean, cap), "
        "for each cap: mantissas in [0.5, 1) and binary exponents.");
}
