"""The microbenchmark behind `lowrank bench`. Installed as lowrank_sys.bench.

`cases` knows the ops; `kernels`, `optimizers`, `train`, `quality`, `plan` and `floors` are the subcommands; `timing`,
`machine`, `report`, `compare` and `plot` serve them.
"""
