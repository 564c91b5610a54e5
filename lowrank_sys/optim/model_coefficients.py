"""The coefficients in a model that per_layer="accumulate" trains: where they are put, and how they follow their weights."""

from lowrank_sys.nn.coefficient import (
    CONTAINER,
    LowRankGradients,
    coefficient_like,
    give_back,
    leave_to_us,
    put_last,
    restore_order,
    zero,
)
from lowrank_sys.nn.projected_linear import ProjectedLinear, ours_in_ddp
from lowrank_sys.nn.quant_weight import is_quantized, names_of


class ModelCoefficients:
    """The coefficient of every weight that is served: a projected layer's own, or one that joins the module of the weight.

    model: that holds them, or None until it is known. dtype: of R. of: {weight: its coefficient}; layers: {weight: its
    ProjectedLinear}, of those in one.
    """

    def __init__(self, model, dtype):
        self.model, self.dtype = model, dtype
        self.of, self.layers = {}, {}
        self._names = {}  # weight -> its name in the model, and its coefficient's

    def places(self, group, names):
        """{parameter: its name in the model}; ValueError for a parameter of a new group that is no matrix of it."""
        if self.model is None:
            raise ValueError(
                "per_layer='accumulate' needs the model: give the groups of param_groups(model) as they are, or "
                "per_layer=Accumulate(model=model)"
            )
        where = {p: name for name, p in self.model.named_parameters()}
        for name, weight in zip(names, group["params"]):
            if weight not in where:
                raise ValueError(f"{name} is not a parameter of the model")
            if weight.dim() != 2:
                raise ValueError(f"per_layer='accumulate' takes matrices, got {name} of shape {tuple(weight.shape)}")
        return where

    def add(self, weight, full_name, shape):
        """The coefficient of a weight and its name; shape: of R."""
        path, _, name = full_name.rpartition(".")
        owner = self.model.get_submodule(path)
        if isinstance(owner, ProjectedLinear):
            self.layers[weight], coefficient = owner, owner.coefficient
        else:
            coefficient = coefficient_like(shape, self.dtype, weight.device)
            if not hasattr(owner, CONTAINER):
                owner.add_module(CONTAINER, LowRankGradients())
            getattr(owner, CONTAINER).add(name, coefficient)
            put_last(self.model, path)
        self.of[weight] = coefficient
        self._names[weight] = (full_name, ".".join(filter(None, (path, CONTAINER, name))))
        return coefficient, self._names[weight][1]

    def name_of(self, weight):
        """In the model."""
        return self._names[weight][0]

    def leave_to_us(self, weight):
        leave_to_us(self.model, self._ours_in_ddp(weight))

    def _ours_in_ddp(self, weight):
        """Names: DistributedDataParallel would hand a weight without a gradient one of zeros, and cannot broadcast into a
        coefficient or a handle of INT8."""
        name, coefficient = self._names[weight]
        if weight in self.layers:
            return ours_in_ddp(name.rpartition(".")[0], self.layers[weight])
        return [coefficient, *(names_of(name) if is_quantized(weight) else [name])]

    def drop(self, weight):
        """Take the coefficient of a weight out of the model."""
        ours = self._ours_in_ddp(weight)
        coefficient, _ = self.of.pop(weight), self._names.pop(weight)
        coefficient.grad = None
        layer = self.layers.pop(weight, None)
        if layer is not None:
            layer.projection.clear()
            return
        give_back(self.model, ours)
        for owner in list(self.model.modules()):
            held = owner._modules.get(CONTAINER)
            if held is not None:
                held.remove(coefficient)
                if not held._parameters:
                    delattr(owner, CONTAINER)
        restore_order(self.model)

    def fit(self, weight, shape):
        """Give a coefficient the shape of R: a model that was moved, cast or copied carries its coefficients along as full tensors,
        and a loaded state may have another rank."""
        coefficient = self.of[weight]
        if (coefficient.shape, coefficient.dtype, coefficient.device) != (shape, self.dtype, weight.device) or (
            coefficient.untyped_storage().nbytes() > coefficient.element_size()
        ):
            coefficient.grad = None
            coefficient.data = zero(shape, self.dtype, weight.device)
