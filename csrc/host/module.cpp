// lowrank_sys._host: the block algorithms of csrc/core on 1, 32 or 256 real threads, for tests.
#include "bind/bind.h"

PYBIND11_MODULE(_host, module) {
  module.doc() = "The block algorithms of csrc/core on 1, 32 or 256 real threads.";
  lowrank::bind_blockwise(module);
  lowrank::bind_gaussian(module);
  lowrank::bind_int4(module);
  lowrank::bind_int8(module);
  lowrank::bind_nf4(module);
  lowrank::bind_norms(module);
  lowrank::bind_philox(module);
  lowrank::bind_residual(module);
  lowrank::bind_scatter_add(module);
  lowrank::bind_sparse(module);
  lowrank::bind_steps(module);
  lowrank::bind_store(module);
}
