"""`lowrank bench quality`: what every method reaches in miniature, over seeds: `lowrank bench train` of a small model."""

from lowrank_sys.bench import train

DEFAULTS = {"model": "llama-1m", "seeds": "0,1,2", "out": "runs/quality"}
run = train.run


def add_arguments(parser):
    train.add_arguments(parser)
    parser.set_defaults(**DEFAULTS)
