"""The hyper-parameters that every AdamW of the family shares."""


def adam_defaults(lr, betas, eps, weight_decay):
    """Defaults of an optimizer whose inner rule is Adam."""
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
