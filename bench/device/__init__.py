"""`lowrank bench device`: checks and measures a GPU from end to end. One module a phase: run(setting), and what it needs."""
