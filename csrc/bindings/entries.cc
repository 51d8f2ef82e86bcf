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

// A number that a dict has until one of its entries is exchanged, and no other dict has; 0: none that can be relied on.
// Python 3.13 writes attributes into an object whose dict shares them, and leaves the dict's number as it was; 3.13.0
// calls no watcher of the dict, either. There, a network of 200 modules takes 0.07 ms longer.
uint64_t Version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // 3.12's headers call it obsolete
  if (PyDict_CheckExact(dict)) return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#endif
  return 0;  // what an OrderedDict's order is, is not in it
}

// Whether dicts hold the objects that they held. `record`: each dict, followed by its keys and values in order, values
// perhaps as weak references. `versions`: of each dict when it was found to hold them, 0 before, so that entries are
// looked at once. Going through a network of 200 modules in Python takes ten times as long, and half a megabyte of
// entries that the network's maps have driven out of the caches take another two.
bool SameEntries(const py::list& record, py::array_t<uint64_t> versions) {
  uint64_t* const first = versions.mutable_data();
  uint64_t* const last = first + versions.size();
  uint64_t* version = first;
  const Py_ssize_t count = PyList_GET_SIZE(record.ptr());
  Py_ssize_t at = 0;
  const auto next_is = [&](PyObject* object) {
    return at < count && Names(PyList_GET_ITEM(record.ptr(), at++), object);
  };
  while (at < count) {
    PyObject* const dict = PyList_GET_ITEM(record.ptr(), at++);
    if (!PyDict_Check(dict)) return false;  // an entry of the dict before it, which has lost it
    if (version == last) Refuse("same_entries: more dicts than the " + std::to_string(last - first) + " versions");
    const uint64_t now = Version(dict);
    if (now != 0 && *version == now) {
      at += 2 * PyDict_GET_SIZE(dict);
      ++version;
      continue;
    }
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
    *version++ = now;
  }
  return true;
}

}  // namespace

void BindEntries(py::module_& m) {
  m.def("same_entries", &SameEntries, py::arg("record"), py::arg("versions").noconvert(),
        "Whether dicts hold the objects that they held. record: each dict, followed by its keys and values in order, "
        "values perhaps as weak references. versions: a uint64 for each dict, 0 at first.");
}

}  // namespace lipfast
