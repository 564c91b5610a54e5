"""The schedule of bases: one op for every kind of subspace, so that a compiled step meets no branch.

Its rules and its fake are lowrank_sys.subspace.refresh's, which knows the kinds.
"""

from lowrank_sys._ops.rules import define

SCHEMAS = {
    # tensors, numbers: the state of one matrix after the other, as keys and number_keys name it (lowrank_sys.subspace.refresh).
    "refresh_": "(Tensor(a!)[] tensors, Tensor[] gradients, int[] numbers, Tensor lr, *, str kind, str select, str transport, "
    "str[] keys, str[] number_keys, str[] moments, bool[] signed, str[] hyper_keys, float[] hyper, bool left, "
    "bool sketched=False, str sums='', Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
}

define(SCHEMAS)
