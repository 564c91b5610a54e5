"""The named steps, which custom loops call: aliases of `step` and `step.rows`, from one table of their policies.

Each has three forms: `.tensor` and the plain one take one matrix, with step and lr as 0-dim tensors or as numbers; `.list` takes
lists, advances its counters `steps` by one, and has the guards. The tensor form comes first: a 0-dim tensor given to an int
argument would be accepted through .item(), a synchronisation that nobody sees.
"""

from typing import NamedTuple

import torch

from lowrank_sys._ops.rules import ADAM, GUARDS, check_lists, define, expect, fake, implement
from lowrank_sys._ops.step import BASES, MOMENTS, RULES


class Named(NamedTuple):
    """What a named step fills in. bases: the kinds that its arguments may be; rest, options: keywords of its own, without and with
    defaults; renamed: what `step` calls them, where that differs."""

    weight: str = "float"
    bases: tuple = ("dense",)
    moments: str = "fp32"
    remainder: str = "none"
    projected: bool = False
    rest: str = "float scale, bool left"
    options: tuple = ()
    renamed: dict = {}
    forms: tuple = (".tensor", "", ".list")

    @property
    def fields(self):
        """{name of a tensor: (whether it is written, whether it may be None)}, in the order of the arguments."""
        weight = ("codes", "weight_scale") if self.weight == "int8" else ("param",)
        fields = dict.fromkeys(weight, (True, False))
        fields["low_rank_grad" if self.projected else "grad"] = (False, False)
        fields["indices" if self.bases == ("rows",) else "basis"] = (False, False)
        optional = len(self.bases) > 1
        for kind in self.bases:
            fields |= dict.fromkeys(BASES.get(kind, ()), (False, optional))
        if self.bases == ("rows",):
            fields["row_scale"] = (False, True)
        return fields | dict.fromkeys(MOMENTS[self.moments], (True, False))

    @property
    def last(self):
        """The same of the tensors that a caller may leave away."""
        limiter = {"limiter": (True, True)} if self.remainder.startswith("scaled") else {}
        return limiter | ({"gram": (False, True)} if self.remainder == "scaled-residual" else {})


_ADAM_8BIT = {"moments": "8bit"}
_APOLLO = {
    "bases": ("dense", "key"),
    "remainder": "scaled-gradient",
    "options": ("bool per_tensor=False", "bool scale_front=False", "float growth=1.01"),
}
_Q_GALORE = {"weight": "int8", "bases": ("dense", "int4"), **_ADAM_8BIT}
_INT4 = {"bases": ("int4",), "options": ("int group_size=256",), "renamed": {"group_size": "basis_group_size"}, "forms": (".int4",)}

NAMED = {
    # GaLore (Zhao et al. 2024), and the same from a gradient that is already projected.
    "galore_step": [Named(options=("bool int8_gemm=False",))],
    "subspace_step": [Named(projected=True, options=("bool int8_gemm=False",))],
    "galore_step_8bit": [Named(**_ADAM_8BIT), Named(**_ADAM_8BIT, **_INT4)],
    "subspace_step_8bit": [Named(**_ADAM_8BIT, projected=True, forms=(".list",)), Named(**_ADAM_8BIT, **_INT4, projected=True)],
    # Q-GaLore (Zhang et al. 2024).
    "qgalore_step": [Named(**_Q_GALORE)],
    "qgalore_subspace_step": [Named(**_Q_GALORE, projected=True)],
    # APOLLO (Zhu et al. 2024); a basis is a matrix, or the key of a Gaussian one.
    "apollo_step": [Named(**_APOLLO)],
    "apollo_int8_step": [Named(weight="int8", **_APOLLO)],
    # Fira (Chen et al. 2024); its alpha is the scale.
    "fira_step": [
        Named(
            remainder="scaled-residual", rest="float alpha, bool left", options=("float growth=1.01",), renamed={"alpha": "scale"}
        )
    ],
    # FRUGAL (Zmushko et al. 2024).
    "frugal_step": [Named(remainder="state-free", rest="float scale, float residual_scale, bool sign, bool left")],
    # Grass (Muhamed et al. 2024).
    "grass_step": [Named(bases=("rows",))],
}
FORMS = {f"{name}{form}": (name, named) for name, rows in NAMED.items() for named in rows for form in named.forms}

_PLURALS = {"codes": "codes", "basis": "bases", "indices": "indices"}


def plural(name):
    """The name of a list of such tensors."""
    return _PLURALS.get(name) or name + ("es" if name.endswith("absmax") else "s")


def is_list(form):
    return form.endswith((".list", ".int4"))


def _schema(form):
    _, named = FORMS[form]
    fields, many = {**named.fields, **named.last}, is_list(form)
    letters, tensors = iter("abcdefghijk"), []
    for name, (written, optional) in fields.items():
        kind = f"Tensor({next(letters)}!)" if written else "Tensor"
        if many:
            tensors.append(f"{kind}[] {plural(name)}")
        else:
            tensors.append(f"{kind}{'?' if optional else ''} {name}{'=None' if name in named.last else ''}")
    if many:
        tensors.append(f"Tensor({next(letters)}!)[] steps")
    required = ["Tensor lr" if many else "Tensor step, Tensor lr" if form.endswith(".tensor") else "SymInt step, float lr"]
    required += [ADAM, named.rest]
    options = list(named.options)
    if named.weight == "int8":
        required.append("int seed, int[] parameters" if many else "int seed, int parameter")
        options += ["int[] offsets=[]" if many else "SymInt offset=0", "int group_size=256"]
        options += ["int basis_group_size=256"] if "int4" in named.bases else []
    if many:
        options.append(GUARDS)
    return f"({', '.join(tensors)}, *, {', '.join(required + options)}) -> ()"


SCHEMAS = {form: _schema(form) for form in FORMS}


def _kind(named, lists):
    """Which of its kinds the bases are."""
    if len(named.bases) == 1:
        return named.bases[0]
    if "int4" in named.bases:
        return "int4" if lists["basis_scale"] or lists["basis_offset"] else "dense"
    return "key" if any(basis.dtype == torch.int64 for basis in lists["basis"]) else "dense"


def _call(op, named, lists, options, steps):
    """(lists of tensors, keywords) of `step`, or of `step.rows`."""
    options = {named.renamed.get(key, key): value for key, value in options.items()}
    weights = lists["codes" if named.weight == "int8" else "param"]
    gradients = lists["low_rank_grad" if named.projected else "grad"]
    if named.bases == ("rows",):
        moments = [lists[name] for name in MOMENTS[named.moments]]
        return (weights, gradients, lists["indices"], lists["row_scale"], *moments, steps), {**options, "op": op}
    kind = _kind(named, lists)
    parts = [tensor for name in (*BASES[kind], "gram") for tensor in lists.get(name, [])]
    states = [tensor for name in (*MOMENTS[named.moments], "limiter") for tensor in lists.get(name, [])]
    policies = {"weight": named.weight, "basis": kind, "moments": named.moments, "remainder": named.remainder}
    policies |= {"rule": RULES[named.remainder], "projected": named.projected, "op": op}
    return (weights, lists.get("weight_scale", []), gradients, lists["basis"], parts, states, steps), {**options, **policies}


def _number(value, device):
    """A number as a 0-dim tensor; a symbol's value does not matter, as nothing is computed."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return torch.empty((), dtype=torch.float64, device=device)
    return torch.full((), value, dtype=torch.float64, device=device)


def _tensors(fields, args, options, name_of=str):
    """The tensor arguments, given by place or by name, taken out of `options`; what is left away is None."""
    return {name: args[i] if i < len(args) else options.pop(name_of(name), None) for i, name in enumerate(fields)}


def bound(form, step, rows=None):
    """The function of a named step over an implementation of `step`, or of `step.rows`."""
    op, named = FORMS[form]
    run = rows if named.bases == ("rows",) else step
    fields = {**named.fields, **named.last}

    def one(*args, step, lr, **options):
        tensors = _tensors(fields, args, options)
        if "int4" in named.bases and len(named.bases) > 1:
            together = (tensors["basis_scale"] is None) == (tensors["basis_offset"] is None)
            expect(together, op, lambda: "basis_scale and basis_offset must be given together")
        if not isinstance(step, torch.Tensor):
            expect(step >= 1, op, lambda: f"step counts from 1, got {step}")
        lists = {name: [] if tensor is None else [tensor] for name, tensor in tensors.items()}
        for name, many in (("parameter", "parameters"), ("offset", "offsets")):
            if name in options:
                options[many] = [options.pop(name)]
        device = next(iter(tensors.values())).device
        lists, options = _call(op, named, lists, options, [_number(step, device)])
        run(*lists, lr=_number(lr, device), **options, advance=False)

    def many(*args, **options):
        lists = _tensors((*fields, "step"), args, options, plural)
        kept = {name: tensors for name, tensors in lists.items() if tensors or not fields.get(name, (False, False))[1]}
        if "basis_scale" in kept or "basis_offset" in kept:
            kept |= {name: lists[name] for name in BASES["int4"]}
        check_lists(op, **{plural(name): kept[name] for name in lists if name in kept})
        steps = lists.pop("step")
        lists, options = _call(op, named, {name: tensors or [] for name, tensors in lists.items()}, options, steps)
        run(*lists, **options)

    return many if is_list(form) else one


define(SCHEMAS)

ALIASES = {form: bound(form, torch.ops.lowrank.step.default, torch.ops.lowrank.step.rows) for form in FORMS}
for _form, _alias in ALIASES.items():
    fake(_form)(_alias)


def served_by(form):
    """The op behind a named step."""
    return "step.rows" if FORMS[form][1].bases == ("rows",) else "step"


def register():
    """Serve every named step on every device."""
    for form, alias in ALIASES.items():
        implement(form, alias, "CompositeExplicitAutograd")
