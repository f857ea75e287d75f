// torch.ops takes a call apart by its schema, argument by argument: code that has left the caches by the time a model
// comes to its next norm, and then takes longer to fetch than a small layer to compute. What nearly all calls pass is
// read here at once, and goes to the dispatcher as it is.

#include "python_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "ops.h"

namespace normops {
namespace {

// read(object, value) is false for an object of any other type: a subclass of a tensor may have a say in the call, a
// nested tensor is taken apart in Python, and a SymInt is traced.
bool read(PyObject* object, at::Tensor& value) {
  if (!THPVariable_CheckExact(object)) return false;
  value = THPVariable_Unpack(object);
  return !value.is_nested();
}

bool read(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

bool read(PyObject* object, double& value) {
  if (!PyFloat_CheckExact(object)) return false;
  value = PyFloat_AS_DOUBLE(object);
  return true;
}

bool read(PyObject* object, c10::SymInt& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow;
  const int64_t number = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0 || number < 0) return false;
  value = number;
  return true;
}

bool read(PyObject* object, std::string_view& value) {
  if (!PyUnicode_CheckExact(object)) return false;
  Py_ssize_t size;
  const char* const data = PyUnicode_AsUTF8AndSize(object, &size);
  if (data == nullptr) {
    PyErr_Clear();
    return false;
  }
  value = {data, size_t(size)};
  return true;
}

using Shape = c10::SmallVector<c10::SymInt, 4>;
bool read(PyObject* object, Shape& value) {
  if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
  value.resize(PySequence_Fast_GET_SIZE(object));
  for (size_t i = 0; i < value.size(); ++i) {
    if (!read(PySequence_Fast_GET_ITEM(object, i), value[i])) return false;
  }
  return true;
}

template <typename T>
bool read(PyObject* object, std::optional<T>& value) {
  return object == Py_None || read(object, value.emplace());
}

template <typename Argument, typename Value = std::remove_cv_t<std::remove_reference_t<Argument>>>
using Held = std::conditional_t<std::is_same_v<Value, c10::SymIntArrayRef>, Shape, Value>;

template <typename... Values, size_t... I>
bool read_all(PyObject* const* given, std::tuple<Values...>& values, std::index_sequence<I...>) {
  return !at::impl::torch_function_mode_enabled() && (read(given[I], std::get<I>(values)) && ...);
}

PyObject* wrap(at::Tensor result) { return THPVariable_Wrap(std::move(result)); }
PyObject* wrap(Tensors2 results) {
  using pybind11::object;
  const auto first = pybind11::reinterpret_steal<object>(wrap(std::move(std::get<0>(results))));
  const auto second = pybind11::reinterpret_steal<object>(wrap(std::move(std::get<1>(results))));
  return first && second ? PyTuple_Pack(2, first.ptr(), second.ptr()) : nullptr;
}

// An operator that is given by name, and called with the first of some values.
template <typename Signature>
class Operator;
template <typename Result, typename... Arguments>
class Operator<Result(Arguments...)> {
 public:
  using Values = std::tuple<Held<Arguments>...>;
  using Indices = std::index_sequence_for<Arguments...>;
  static constexpr size_t kArguments = sizeof...(Arguments);

  explicit Operator(const char* name, const char* overload = "")
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Result(Arguments...)>()) {}

  template <typename Tuple>
  PyObject* operator()(Tuple& values) const {
    HANDLE_TH_ERRORS
    return wrap(run(values, Indices{}));
    END_HANDLE_TH_ERRORS
  }

 private:
  template <typename Tuple, size_t... I>
  Result run(Tuple& values, std::index_sequence<I...>) const {
    const pybind11::gil_scoped_release others_run;
    return handle_.call(std::get<I>(values)...);
  }

  c10::TypedOperatorHandle<Result(Arguments...)> handle_;
};

// Whether an extra is as it is by default.
template <typename T>
bool is_absent(const std::optional<T>& value) {
  return !value;
}
bool is_absent(bool value) { return !value; }
bool is_absent(double offset) { return offset == 0; }

// The extras begin with an activation and its slope.
template <typename Tuple, size_t... I>
bool are_absent(const Tuple& values, std::index_sequence<I...>) {
  constexpr size_t first = std::tuple_size_v<Tuple> - sizeof...(I);
  return ((I == 1 || is_absent(std::get<first + I>(values))) && ...) &&
         std::get<first + 1>(values) == Activation{}.negative_slope;
}

// run(values), if they can be read.
template <typename Signature, typename Run>
PyObject* with_values(PyObject* const* given, Py_ssize_t count, const Run& run) {
  using Given = Operator<Signature>;
  typename Given::Values values;
  if (count != Given::kArguments || !read_all(given, values, typename Given::Indices{})) Py_RETURN_NOTIMPLEMENTED;
  return run(values);
}

template <typename Plain, typename Fused>
PyObject* call(const Operator<Plain>& plain, const Operator<Fused>& fused, PyObject* const* given, Py_ssize_t count) {
  using Extras = std::make_index_sequence<Operator<Fused>::kArguments - Operator<Plain>::kArguments>;
  return with_values<Fused>(given, count,
                            [&](auto& values) { return are_absent(values, Extras{}) ? plain(values) : fused(values); });
}

template <typename F>
PyMethodDef method(const char* name, F* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// Of the operators whose extras are another overload; and of those that have but one.
#define NORMOPS_CALL(name, Plain, Fused)                                \
  method(                                                               \
      #name, +[](PyObject*, PyObject* const* given, Py_ssize_t count) { \
        static const Operator<Plain> plain("normops::" #name);          \
        static const Operator<Fused> fused("normops::" #name, "fused"); \
        return call(plain, fused, given, count);                        \
      })
#define NORMOPS_CALL_ONLY(name)                                             \
  method(                                                                   \
      #name, +[](PyObject*, PyObject* const* given, Py_ssize_t count) {     \
        static const Operator<decltype(ops::name)> only("normops::" #name); \
        return with_values<decltype(ops::name)>(given, count, only);        \
      })

using T = const at::Tensor&;
using P = const OptionalTensor&;
using Shapes = c10::SymIntArrayRef;
using MaybeEps = std::optional<double>;

using Batch = at::Tensor(T, P, P, P, P, bool, double, double);
using FusedBatch = at::Tensor(T, P, P, P, P, bool, double, double, OptionalName, double, P, bool, P);

}  // namespace

PyMethodDef python_calls[] = {
    NORMOPS_CALL(layer_norm, at::Tensor(T, Shapes, P, P, double), decltype(ops::fused_layer_norm)),
    NORMOPS_CALL(rms_norm, at::Tensor(T, Shapes, P, MaybeEps), decltype(ops::fused_rms_norm)),
    NORMOPS_CALL(batch_norm, Batch, FusedBatch),
    NORMOPS_CALL(instance_norm, Batch, FusedBatch),
    NORMOPS_CALL(group_norm, at::Tensor(T, c10::SymInt, P, P, double), decltype(ops::fused_group_norm)),
    NORMOPS_CALL(channel_layer_norm, at::Tensor(T, P, P, double), decltype(ops::fused_channel_layer_norm)),
    NORMOPS_CALL(channel_rms_norm, at::Tensor(T, P, MaybeEps),
                 at::Tensor(T, P, MaybeEps, OptionalName, double, P, double, bool, P)),
    NORMOPS_CALL_ONLY(add_layer_norm),
    NORMOPS_CALL_ONLY(add_rms_norm),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace normops
