// Runs every block algorithm with 1, 32 and 256 threads and compares the bits. Built once for each sanitizer.
#include "check.h"

int main() {
  lowrank::check_blockwise();
  lowrank::check_gaussian();
  lowrank::check_int4();
  lowrank::check_int8();
  lowrank::check_nf4();
  lowrank::check_norms();
  lowrank::check_residual();
  lowrank::check_scatter_add();
  lowrank::check_sparse();
  lowrank::check_steps();
  lowrank::check_store();
  std::printf(lowrank::failures ? "%d failures\n" : "ok\n", lowrank::failures);
  return lowrank::failures != 0;
}
