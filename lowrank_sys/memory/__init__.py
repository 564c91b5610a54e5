"""What training holds in memory: the ledger counts it while it is there, the planner says it before anything is.

`ledger` counts an optimizer's tensors by category, `live` every tensor that operators make, `planner` rehearses a run on fake
tensors, `process` measures what a process needs without tensors, `command` is `lowrank plan`.
"""
