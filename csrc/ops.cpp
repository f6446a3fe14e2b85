// The extension module and the schema of every op. Kernels register themselves next to their code.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// `import uvc_kernels._C` only has to load this library: its static initialisers register the ops.
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
