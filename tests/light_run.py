"""train.py with the task of `light_task`, at ten steps a second.

python tests/light_run.py --config configs/tiny.py --workdir RUN …
"""

import sys
import time
from pathlib import Path

from light_task import ColourFeed, LightTask

from kontext_jax.training.tasks.table import TASKS

STEP_S = 0.1


class SlowFeed(ColourFeed):
    def __call__(self, batch):
        time.sleep(STEP_S)
        return super().__call__(batch)


class SlowTask(LightTask):
    def make_feed(self, devices, null_text):
        return SlowFeed(devices, self.poison)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import train

    TASKS["flow_matching"] = SlowTask
    sys.exit(train.main())
