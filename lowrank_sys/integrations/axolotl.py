"""axolotl: a plugin by which its YAML trains by this package's optimizers.

    plugins: [lowrank_sys.integrations.axolotl.LowRank]

makes its `optimizer: galore_adamw`, `apollo_adamw`, `q_galore_adamw8bit`, ... this package's, with no peer installed. And

    lowrank: {method: fira, rank: 128}

takes any method of `lowrank train --method` in the place of `optimizer`, with the keywords of
lowrank_sys.integrations.building.build; rate and decay are axolotl's.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from lowrank_sys.integrations import shims
from lowrank_sys.integrations.building import optimizer


class Arguments(BaseModel):
    lowrank: dict[str, Any] | None = None


class LowRank(BasePlugin):
    def register(self, cfg):
        shims.install()

    def get_input_args(self):
        return f"{__name__}.Arguments"

    def post_trainer_create(self, cfg, trainer):
        if cfg.lowrank:
            keywords = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay, **cfg.lowrank}
            trainer.optimizer_cls_and_kwargs = (optimizer(keywords.pop("method", None)), keywords)
