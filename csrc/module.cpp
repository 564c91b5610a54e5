// `import lowrank_sys._C` (or `_cuda`) registers the ops of its sources; the module itself is empty.
#include <Python.h>

#define LR_JOIN_(a, b) a##b
#define LR_JOIN(a, b) LR_JOIN_(a, b)
#define LR_TEXT_(a) #a
#define LR_TEXT(a) LR_TEXT_(a)

PyMODINIT_FUNC LR_JOIN(PyInit_, LR_MODULE)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, LR_TEXT(LR_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
