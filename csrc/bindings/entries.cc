#include "bindings/checks.h"

namespace lipfast {
namespace {

// Whether `known` is the object, or a weak reference to it.
bool Names(PyObject* known, PyObject* object) {
  if (known == object) return true;
  if (!PyWeakref_CheckRef(known)) return false;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  PyWeakref_GetRef(known, &found);
  Py_XDECREF(found);
  return found == object;
#else
  return PyWeakref_GetObject(known) == object && object != Py_None;  // which it gives once its object is gone
#endif
}

// Whether dicts hold the objects that they held. `record`: each dict, followed by its keys and values in order, values
// perhaps as weak references. Going through a network of 200 modules in Python takes ten times as long.
bool SameEntries(const py::list& record) {
  const Py_ssize_t count = PyList_GET_SIZE(record.ptr());
  Py_ssize_t at = 0;
  const auto next_is = [&](PyObject* object) {
    return at < count && Names(PyList_GET_ITEM(record.ptr(), at++), object);
  };
  while (at < count) {
    PyObject* const dict = PyList_GET_ITEM(record.ptr(), at++);
    if (!PyDict_Check(dict)) return false;  // an entry of the dict before it, which has lost it
    if (PyDict_CheckExact(dict)) {
      PyObject *key, *value;
      for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);) {
        if (!next_is(key) || !next_is(value)) return false;
      }
    } else if (PyDict_GET_SIZE(dict) > 0) {  // an OrderedDict has an order of its own
      for (const py::handle& key : py::list(py::reinterpret_borrow<py::object>(dict))) {
        if (!next_is(key.ptr()) || !next_is(PyDict_GetItem(dict, key.ptr()))) return false;
      }
    }
  }
  return true;
}

}  // namespace

void BindEntries(py::module_& m) {
  m.def("same_entries", &SameEntries, py::arg("record"),
        "Whether dicts hold the objects that they held. record: each dict, followed by its keys and values in order, "
        "values perhaps as weak references.");
}

}  // namespace lipfast
