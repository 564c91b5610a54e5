"""The optimizers beside GaLore's, as functions of a model: what every optimizer promises is tested on them too."""

from lowrank_sys.optim import APOLLOAdamW, FiraAdamW, FrugalAdamW, GrassAdamW, param_groups


def groups(model, **keys):
    return param_groups(model, **{"rank": 16, "update_proj_gap": 7, **keys})


FAMILY = {
    "apollo": lambda model, **options: APOLLOAdamW(groups(model), lr=1e-2, **options),
    "apollo svd": lambda model, **options: APOLLOAdamW(groups(model, proj="svd"), lr=1e-2, **options),
    "apollo-mini": lambda model, **options: APOLLOAdamW(groups(model, **APOLLOAdamW.mini), lr=1e-2, **options),
    "fira": lambda model, **options: FiraAdamW(groups(model), lr=1e-2, **options),
    "grass": lambda model, **options: GrassAdamW(groups(model), lr=1e-2, **options),
    "grass sampled": lambda model, **options: GrassAdamW(groups(model, subspace="sample"), lr=1e-2, **options),
    "frugal": lambda model, **options: FrugalAdamW(groups(model), lr=1e-2, **options),
}
