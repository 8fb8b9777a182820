"""train.py with the task of `light_task`, at ten steps a second.

python tests/light_run.py --config configs/tiny.py --workdir RUN …
"""

import sys
import time
from pathlib import Path

from light_task import ColourFeed, light_task

from kontext_jax.training.tasks.table import TASKS

STEP_S = 0.1


class SlowFeed(ColourFeed):
    def __call__(self, batch):
        time.sleep(STEP_S)
        return super().__call__(batch)


def slow_task(config, open_weights):
    return light_task(config, open_weights)._replace(
        make_feed=lambda devices, null_text: SlowFeed(devices, ())
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train

    TASKS["flow_matching"] = slow_task
    sys.exit(train.main())
