// The extension module and the schema of every op; the kernels register themselves next to their code.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/loops.h"
#include "cuda/emulation.h"

// A backward op returns an empty tensor for each gradient that `needs` (one bit each, in order) does not ask for.
STABLE_TORCH_LIBRARY(uvc_kernels, m) {
  m.def(
      "attention(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, Tensor qk, "
      "Tensor qk_offsets, Tensor v, Tensor v_offsets, float scale, bool recompute=False) "
      "-> (Tensor out, Tensor qkv, Tensor heads, Tensor stats)");
  m.def(
      "attention_backward(Tensor grad, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor qk, "
      "Tensor qk_offsets, Tensor v, Tensor v_offsets, float scale, Tensor qkv, Tensor heads, Tensor stats, int needs) "
      "-> (Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias)");
  m.def(
      "attention_with_positions(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, "
      "Tensor? bias, Tensor qk, Tensor qk_offsets, Tensor v, Tensor v_offsets, Tensor? turn, Tensor? partner, "
      "float scale, bool recompute=False) -> (Tensor out, Tensor qkv, Tensor heads, Tensor stats)");
  m.def(
      "attention_with_positions_backward(Tensor grad, Tensor x, Tensor qkv_weight, Tensor? qkv_bias, "
      "Tensor proj_weight, Tensor? bias, Tensor qk, Tensor qk_offsets, Tensor v, Tensor v_offsets, Tensor? turn, "
      "Tensor? partner, float scale, Tensor qkv, Tensor heads, Tensor stats, int needs) "
      "-> (Tensor x, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor bias)");
  m.def(
      "mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? gate_weight, "
      "Tensor? gate_bias, Tensor neurons, int activation, bool recompute=False) -> (Tensor out, Tensor hidden)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? gate_weight, Tensor? gate_bias, Tensor neurons, int activation, Tensor hidden, int needs) "
      "-> (Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor gate_weight, "
      "Tensor gate_bias)");
  m.def(
      "gather(Tensor[] sources, Tensor[] indices, Tensor[] inverses, int[] dims, ScalarType? dtype) -> Tensor[]");
  m.def("group_scores(Tensor[] a, Tensor[] b, int[] dims) -> Tensor");
  m.def("prox_shrink(Tensor(a!)[] weights, Tensor factors, int[] dims) -> ()");

  // The pieces of the providers cuda (on a GPU) and cuda-host (the same sources on the CPU); see kernels/packed.
  m.def("cuda_gather(Tensor[] sources, Tensor[] indices, int[] dims, Tensor(a!)[] outs) -> ()");
  m.def(
      "cuda_attention_core(Tensor qkv, Tensor table, int[] counts, int tokens, float scale, Tensor(a!) heads, "
      "Tensor(b!) top, Tensor(c!) inverse, Tensor? bias=None, Tensor? order=None) -> ()");
  m.def(
      "cuda_attention_core_backward(Tensor qkv, Tensor heads, Tensor grad_heads, Tensor top, Tensor inverse, "
      "Tensor table, int[] counts, int tokens, float scale, Tensor(a!) grad_qkv, Tensor? bias=None, Tensor? order=None) "
      "-> ()");
  m.def(
      "cuda_bias_gradient(Tensor qkv, Tensor heads, Tensor grad_heads, Tensor top, Tensor inverse, Tensor table, "
      "int[] counts, int tokens, float scale, Tensor bias, Tensor order, Tensor(a!) grad_bias) -> ()");
  m.def(
      "cuda_turn(Tensor(a!) qkv, Tensor table, int[] counts, int tokens, Tensor rows, Tensor whole_rows, "
      "Tensor partner, Tensor tables, bool back) -> ()");
  m.def("cuda_activate(Tensor u, Tensor? gate, int activation, Tensor(a!) a) -> ()");
  m.def(
      "cuda_activate_backward(Tensor u, Tensor? gate, Tensor grad_a, int activation, Tensor(a!) a, "
      "Tensor(b!) grad_u, Tensor(c!)? grad_gate) -> ()");
  m.def("cuda_column_sums(Tensor[] matrices, Tensor(a!)[] outs) -> ()");
  m.def("cuda_group_scores(Tensor[] a, Tensor[] b, int[] dims) -> Tensor");
  m.def("cuda_prox_shrink(Tensor(a!)[] weights, Tensor factors, int[] dims) -> ()");
}

static PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(uvc::instruction_set()); }
static PyObject* own_products(PyObject*, PyObject*) { return PyBool_FromLong(uvc::own_products()); }
// What the host build of the CUDA kernels did since the last call: loads of matrices, and the turns of shared memory that
// they took; of its last launch blocks, threads of each, and bytes of shared memory; how often a kernel was allowed more;
// the loads of the scheduler with most.
static PyObject* host_record(PyObject*, PyObject*) {
  const auto number = [](int64_t n) { return static_cast<long long>(n); };
  int64_t most = 0;
  for (auto& loads : uvc::host::scheduler_loads) most = std::max<int64_t>(most, loads.exchange(0));
  return Py_BuildValue("LLLLLLL", number(uvc::host::matrix_loads.exchange(0)), number(uvc::host::matrix_turns.exchange(0)),
                       number(uvc::host::last_launch[0]), number(uvc::host::last_launch[1]),
                       number(uvc::host::last_launch[2]), number(uvc::host::driver.calls.exchange(0)), number(most));
}

// `import uvc_kernels._C` only has to load this library: its static initialisers register the ops.
PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef functions[] = {
      {"instruction_set", instruction_set, METH_NOARGS, "The instruction set that the CPU loops chose."},
      {"own_products", own_products, METH_NOARGS, "Whether products of float32 are not the vendor's."},
      {"host_record", host_record, METH_NOARGS, "Matrix loads and turns of the host build, and its last launch."},
      {nullptr, nullptr, 0, nullptr}};
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C",    nullptr, -1, functions, nullptr, nullptr,
                                      nullptr,               nullptr};
  return PyModule_Create(&module);
}
