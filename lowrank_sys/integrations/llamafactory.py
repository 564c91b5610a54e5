"""LLaMA-Factory v1: its registry of optimizers gets every method of `lowrank train --method`, under lowrank-NAME.

    optim_config: {name: lowrank-q-galore, lr: 1.0e-4, rank: 128}

in the YAML, and this module imported before `run_sft`. Keys are as lowrank_sys.integrations.building.build.
"""

import functools

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

from lowrank_sys.integrations.building import build
from lowrank_sys.optim.preset import METHODS

for _name, _method in METHODS.items():

    @OptimizerPlugin(f"lowrank-{_name}").register()
    def _optimizer(model, config, method=_method):
        return build(method, functools.partial(method.groups, model), **{k: v for k, v in config.items() if k != "name"})
