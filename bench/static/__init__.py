"""What compilation alone tells of a kernel, on any machine: resources, instructions, occupancy and rooflines.

The compile lane asserts it, `lowrank bench --static` prints it.
"""
