// The Python module: loading it registers the operators; it reports how it was built and what runs here. These few
// functions are written for Python's own interface: pybind11's headers would take longer to compile than an engine.

#include <Python.h>
#include <torch/headeronly/version.h>

#include <exception>
#include <mutex>
#include <set>

#include "accelerate.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace normops::python {
namespace {

// What f returns; what it throws is raised.
template <typename F>
PyObject* returned(const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// How many threads take part when the engines share out `items` pieces of work that fill a thread each.
int64_t count_threads(int64_t items) {
  std::mutex mutex;
  std::set<int> threads;
  cpu::parallel(items, cpu::kElementsPerThread, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(at::get_thread_num());
  });
  return static_cast<int64_t>(threads.size());
}

PyObject* build_info(PyObject*, PyObject*) {
#ifdef NORMOPS_CUDA
  const char* const cuda = NORMOPS_CUDA;
#else
  const char* const cuda = nullptr;  // which becomes None
#endif
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:i,s:z}", "version", NORMOPS_VERSION, "torch", TORCH_VERSION, "compiler",
                       __VERSION__, "instruction_sets", NORMOPS_INSTRUCTION_SETS, "openmp", cpu::kOpenMP, "cuda", cuda);
}

PyObject* instruction_set(PyObject*, PyObject*) {
  return returned([] { return PyUnicode_FromString(cpu::kernels().name); });
}

PyObject* threads_used(PyObject*, PyObject* items) {
  const int64_t count = PyLong_AsLongLong(items);
  if (count == -1 && PyErr_Occurred()) return nullptr;
  return returned([&] { return PyLong_FromLongLong(count_threads(count)); });
}

template <auto* set>
PyObject* set_acceleration(bool on) {
  return returned([&] {
    set(on);
    Py_RETURN_NONE;
  });
}

PyObject* accelerate(PyObject*, PyObject* on) {
  const int truth = PyObject_IsTrue(on);
  return truth < 0 ? nullptr : set_acceleration<switch_acceleration>(truth != 0);
}

// A class of Python's would leave the engines in place for ever if Ctrl-C came while they are put there: Python takes
// the signal after the call, but still in __enter__. From a function of C++ it goes straight into the block.
PyObject* enter(PyObject*, PyObject*) { return set_acceleration<normops::accelerate>(true); }
PyObject* exit(PyObject*, PyObject*) { return set_acceleration<normops::accelerate>(false); }

PyMethodDef block_methods[] = {
    {"__enter__", enter, METH_NOARGS, nullptr}, {"__exit__", exit, METH_VARARGS, nullptr}, {}};
char block_doc[] = "The block of normops.accelerate().";
PyType_Slot block_slots[] = {{Py_tp_methods, block_methods}, {Py_tp_doc, block_doc}, {}};
PyType_Spec block = {"normops._C.Acceleration", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                     block_slots};

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "What the library was built with."},
    {"instruction_set", instruction_set, METH_NOARGS, "The CPU kernels in use."},
    {"accelerate", accelerate, METH_O,
     "Puts the engines behind torch's operators, or torch's back, once, however often it is asked for."},
    {"threads_used", threads_used, METH_O, "Threads that share so many full pieces of work."},
    {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C",
                          "Compiled kernels of normops; importing it registers torch.ops.normops.",
                          /*m_size=*/-1,  // as the operators are registered once in a process
                          functions};

}  // namespace
}  // namespace normops::python

// Nothing has been tried without Python's lock, so nothing declares that it works: a free-threaded Python turns its
// lock on when it imports this, and warns.
PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&normops::python::definition);
  PyObject* const block = module ? PyType_FromSpec(&normops::python::block) : nullptr;
  const bool complete = block && PyModule_AddObjectRef(module, "Acceleration", block) == 0;
  Py_XDECREF(block);
  if (complete) return module;
  Py_XDECREF(module);
  return nullptr;
}
