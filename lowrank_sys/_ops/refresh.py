"""The schedule of bases: one op for every kind of subspace, so that a compiled step meets no branch."""

import torch

from lowrank_sys._ops.rules import check_lists, define, expect, expect_number, fake

SCHEMAS = {
    # tensors, numbers: the state of one matrix after the other, as keys and number_keys name it (lowrank_sys.subspace.refresh).
    "refresh_": "(Tensor(a!)[] tensors, Tensor[] gradients, int[] numbers, Tensor lr, *, str kind, str select, str transport, "
    "str[] keys, str[] number_keys, str[] moments, bool[] signed, str[] hyper_keys, float[] hyper, bool left, "
    "bool sketched=False) -> ()"
}


def check_refresh(
    tensors, gradients, numbers, lr, *, keys, number_keys, moments, signed, hyper_keys, hyper, op="refresh_", **names
):
    count = len(gradients)
    for name, got, per in (("tensors", tensors, keys), ("numbers", numbers, number_keys)):
        expect(
            len(got) == count * len(per),
            op,
            lambda: f"{name} must have {len(per)} for each of {count} gradients ({', '.join(per)}), got {len(got)}",
        )
    check_lists(op, moments=moments, signed=signed)
    check_lists(op, hyper_keys=hyper_keys, hyper=hyper)
    expect("countdown" in keys, op, lambda: f"keys must name a countdown, got {', '.join(keys)}")
    expect_number(op, "lr", lr, lr.device)
    # Every step of every matrix comes by here: one comparison each, and a message only for a bad one.
    for i, c in enumerate(tensors[keys.index("countdown") :: len(keys)]):
        fits = c.dtype is torch.int64 and c.dim() == 0 and c.is_cpu
        if not fits:
            expect(
                fits,
                op,
                lambda: (
                    f"the countdown of matrix {i} must be a 0-dim int64 tensor on the CPU, got shape {tuple(c.shape)}, "
                    f"{c.dtype} on {c.device}"
                ),
            )


define(SCHEMAS)


@fake("refresh_")
def _(tensors, gradients, numbers, lr, *, sketched=False, **options):
    check_refresh(tensors, gradients, numbers, lr, **options)
