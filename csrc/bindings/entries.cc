#include "bindings/checks.h"

namespace lipfast {
namespace {

// Whether dicts hold the objects that they held. `record`: each dict, followed by its keys and values in order. Python
// itself takes a hundred microseconds for it in a network of 200 modules.
bool SameEntries(const py::list& record) {
  const Py_ssize_t count = PyList_GET_SIZE(record.ptr());
  const auto is = [&](Py_ssize_t at, PyObject* object) {
    return at < count && PyList_GET_ITEM(record.ptr(), at) == object;
  };
  for (Py_ssize_t at = 0; at < count;) {
    PyObject* const dict = PyList_GET_ITEM(record.ptr(), at++);
    if (!PyDict_Check(dict)) return false;  // an entry of the dict before it, which has lost it
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value); at += 2) {
      if (!is(at, key) || !is(at + 1, value)) return false;
    }
  }
  return true;
}

}  // namespace

void BindEntries(py::module_& m) {
  m.def("same_entries", &SameEntries, py::arg("record"),
        "Whether dicts hold the objects that they held. record: each dict, followed by its keys and values in order.");
}

}  // namespace lipfast
