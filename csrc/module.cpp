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

// A block of normops.accelerate(), which may be entered more than once. Ctrl-C may come before Python knows that a
// block has begun (3.14 looks for signals after __enter__), and then it calls no __exit__: it only lets go of the
// block.
class Acceleration {
 public:
  Acceleration() = default;
  Acceleration(const Acceleration&) = delete;
  Acceleration& operator=(const Acceleration&) = delete;
  ~Acceleration() {
    while (entered_ > 0) exit();
  }
  void enter() {
    normops::accelerate(true);
    ++entered_;
  }
  void exit() {
    TORCH_CHECK(entered_ > 0, "normops: expected the end of a block of accelerate() that was entered, got one more");
    --entered_;
    normops::accelerate(false);
  }

 private:
  int64_t entered_ = 0;
};

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
  // Not a class of Python's: Ctrl-C could come when the engines are in place, and __enter__ has yet to note it.
  py::class_<Acceleration>(m, "Acceleration", "The block of normops.accelerate().")
      .def(py::init<>())
      .def("__enter__", &Acceleration::enter)
      .def("__exit__", [](Acceleration& block, const py::args&) { block.exit(); });
  if (PyModule_AddFunctions(m.ptr(), normops::python_calls) != 0) throw py::error_already_set();
  m.def("threads_used", &threads_used, py::arg("items"), "Threads that share `items` full pieces of work.");
}
