"""The hyper-parameters that every AdamW of the family shares."""


def adam_defaults(lr, betas, eps, weight_decay):
    """Defaults of an optimizer whose inner rule is Adam; raises a ValueError that names the bad one."""
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    return {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
