"""Which parameters train now, and as what: all of them always, or some of them for a while.

A schedule says what the groups of an optimizer make of every parameter; `turns` freezes, thaws and forgets accordingly, between two
steps. What a schedule remembers is in the groups, as plain numbers, so that a checkpoint has it.
"""
