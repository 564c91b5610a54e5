"""ms-swift: its table of optimizers gets every method of `lowrank train --method`, under lowrank-NAME.

    swift sft ... --external_plugins plugin.py --optimizer lowrank-q-galore --optim_args "rank=128, betas=(0.9, 0.95)"

where plugin.py imports this module. Rate and decay are swift's; --optim_args, as lowrank_sys.integrations.building.build, have all
else.
"""

import functools

from swift.optimizers import OptimizerCallback, optimizers_map

from lowrank_sys.integrations.building import build, parsed
from lowrank_sys.optim.preset import METHODS


def _callback(method):
    class LowRank(OptimizerCallback):
        def create_optimizer(self, model=None):
            groups = functools.partial(method.groups, self.trainer.model if model is None else model)
            options = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, **parsed(self.args.optim_args)}
            return build(method, groups, **options)

    return LowRank


optimizers_map.update({f"lowrank-{name}": _callback(method) for name, method in METHODS.items()})
