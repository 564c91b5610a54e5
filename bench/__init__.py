"""The microbenchmark behind `lowrank bench`. Installed as lowrank_sys.bench.

`cases` knows the ops; `kernels`, `optimizers`, `train`, `plan` and `floors` are the subcommands; `timing`, `machine` and `report`
serve them.
"""
