// The Python module: loading it registers the operators; it reports how it was built and what runs here.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <atomic>
#include <mutex>
#include <set>

#include "accelerate.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "python_calls.h"

namespace py = pybind11;

namespace {

// How many threads take part when the engines share out `items` pieces of work that fill a thread each.
int threads_used(int64_t items) {
  std::mutex mutex;
  std::set<int> threads;
  normops::cpu::parallel(items, normops::cpu::kElementsPerThread, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    threads.insert(at::get_thread_num());
  });
  return int(threads.size());
}

struct Acceleration {};

py::dict build_info() {
  py::dict info;
  info["version"] = NORMOPS_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = NORMOPS_INSTRUCTION_SETS;
  info["openmp"] = normops::cpu::kOpenMP;
#ifdef NORMOPS_CUDA
  info["cuda"] = NORMOPS_CUDA;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

// Without py::mod_gil_not_used(), as nothing has been tried without Python's lock: a free-threaded Python turns its
// lock on when it imports this, and warns.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of normops; importing it registers torch.ops.normops.";
  m.def("build_info", &build_info, "What the library was built with.");
  m.def("instruction_set", [] { return normops::cpu::kernels().name; }, "The CPU kernels in use.");
  m.def("accelerate", &normops::switch_acceleration, py::arg("on"),
        "Puts the engines behind torch's operators, or torch's back, once, however often it is asked for.");
  // A class of Python's would leave the engines in place for ever if Ctrl-C came while they are put there: Python takes
  // the signal after the call, but still in __enter__. From a function of C++ it goes straight into the block.
  py::class_<Acceleration>(m, "Acceleration", "The block of normops.accelerate().")
      .def(py::init<>())
      .def("__enter__", [](Acceleration&) { normops::accelerate(true); })
      .def("__exit__", [](Acceleration&, const py::args&) { normops::accelerate(false); });
  if (PyModule_AddFunctions(m.ptr(), normops::python_calls) != 0) throw py::error_already_set();
  m.def("threads_used", &threads_used, py::arg("items"), "Threads that share `items` full pieces of work.");
}
