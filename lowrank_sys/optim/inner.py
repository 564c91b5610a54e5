"""Inner rules: the state of a (low-rank) gradient and the fused op that advances it and updates the weight.

A rule keeps its hyper-parameters in the group and does no arithmetic of its own. `states` are the state dicts of `params`,
`guards` the keyword arguments grad_scale, found_inf and skipped of the ops. `categories` says what each state key is to the
ledger (lowrank_sys.memory).
"""

import torch

from lowrank_sys.subspace.basis import load


def _field(states, key):
    return [state[key] for state in states]


def _bases(params, states):
    """Yield (slice, bases as matrices): all at once if they are, one by one if each is decoded for its step."""
    if all(state["basis"].is_floating_point() for state in states):
        yield slice(None), _field(states, "basis")
        return
    for i, (param, state) in enumerate(zip(params, states)):
        yield slice(i, i + 1), [load(state, param)]


class Adam:
    """AdamW (torch.optim.AdamW's order: decay before the update, eps after bias correction); moments in fp32."""

    transports = ("keep", "reset", "rotate")
    int4_basis = True  # serves bases in INT4
    int8_gemm = True  # and products in INT8
    categories = {"exp_avg": "moments", "exp_avg_sq": "moments"}

    def init(self, state, shape, param, group):
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros(shape, dtype=torch.float32, device=param.device)

    def hyper(self, group):
        """The ops' names of the group's keys."""
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}

    def plain_step(self, group, params, grads, states, lr, guards):
        torch.ops.lowrank.adamw_step(
            params,
            grads,
            _field(states, "exp_avg"),
            _field(states, "exp_avg_sq"),
            _field(states, "step"),
            lr=lr,
            **self.hyper(group),
            **guards,
        )

    def low_rank_step(self, group, params, grads, states, lr, left, guards):
        self._low_rank(torch.ops.lowrank.galore_step.list, group, params, grads, states, lr, left, guards)

    def subspace_step(self, group, params, low_rank_grads, states, lr, left, guards):
        """low_rank_step from R, where the rule needs nothing else of G: what per_layer='accumulate' calls."""
        self._low_rank(torch.ops.lowrank.subspace_step.list, group, params, low_rank_grads, states, lr, left, guards)

    def _low_rank(self, op, group, params, gradients, states, lr, left, guards):
        for part, bases in _bases(params, states):
            own = states[part]
            op(
                params[part],
                gradients[part],
                bases,
                _field(own, "exp_avg"),
                _field(own, "exp_avg_sq"),
                _field(own, "step"),
                lr=lr,
                scale=group["scale"],
                left=left,
                int8_gemm=group["int8_gemm"],
                **self.hyper(group),
                **guards,
            )


class Adafactor:
    """Adafactor with factored second moments of R for matrices; `beta1=None` keeps no first moment."""

    transports = ("keep",)
    int4_basis = True
    categories = dict.fromkeys(("exp_avg", "exp_avg_sq", "row", "col"), "moments")

    def init(self, state, shape, param, group):
        def zeros(*size):
            return torch.zeros(size, dtype=torch.float32, device=param.device)

        if group["beta1"] is not None:
            state["exp_avg"] = zeros(*shape)
        if len(shape) == 2:
            state["row"], state["col"] = zeros(shape[0], 1), zeros(1, shape[1])
        else:
            state["exp_avg_sq"] = zeros(*shape)

    def _step(self, group, params, grads, states, lr, left, guards):
        if guards["found_inf"] is not None or guards["grad_scale"] is not None:
            raise ValueError("GaLoreAdafactor takes no GradScaler: unscale_ before the step, or train in bfloat16")
        for param, grad, state in zip(params, grads, states):
            torch.ops.lowrank.adafactor_step(
                param,
                grad,
                load(state, param) if "basis" in state else None,
                state.get("exp_avg"),
                state.get("row"),
                state.get("col"),
                state.get("exp_avg_sq"),
                state["step"],
                lr=lr,
                beta1=group["beta1"] or 0.0,
                decay_rate=group["decay_rate"],
                eps1=group["eps"][0],
                eps2=group["eps"][1],
                clip_threshold=group["clip_threshold"],
                weight_decay=group["weight_decay"],
                scale=group.get("scale", 1.0),
                scale_parameter=group["scale_parameter"],
                relative_step=group["relative_step"],
                warmup_init=group["warmup_init"],
                left=left,
                skipped=guards["skipped"],
            )

    def plain_step(self, group, params, grads, states, lr, guards):
        self._step(group, params, grads, states, lr, False, guards)

    def low_rank_step(self, group, params, grads, states, lr, left, guards):
        self._step(group, params, grads, states, lr, left, guards)
