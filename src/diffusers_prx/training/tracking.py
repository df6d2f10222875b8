"""Experiment trackers, which tell what a run does and must not stop it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..config.training_config import TrainingConfig


class Tracking:
    """accelerate's trackers. One that raises, as when its server has gone away, is named and counted; the run goes on.

    Args:
        accelerator: with the trackers of `report_to`.
        counts: "tracker_failures" is counted in it.
    """

    def __init__(self, accelerator: Accelerator, counts: Counter[str]):
        self.accelerator, self.counts = accelerator, counts

    def start(self, cfg: TrainingConfig) -> None:
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in cfg.to_dict().items()
        }
        self._tell(self.accelerator.init_trackers, "prx", config=plain)

    def log(self, values: dict[str, float], step: int) -> None:
        self._tell(self.accelerator.log, values, step=step)

    def image(self, name: str, image: PIL.Image.Image, step: int) -> None:
        self._tell(self._image, name, image, step)

    def end(self) -> None:
        self._tell(self.accelerator.end_training)

    def _image(self, name: str, image: PIL.Image.Image, step: int) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.array(image)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=step)
            elif tracker.name == "trackio":
                import trackio  # an optional dependency, there when --report_to asks for it

                tracker.log({name: trackio.Image(image)}, step=step)

    def _tell(self, call: Callable[..., None], *told: Any, **options: Any) -> None:
        try:
            call(*told, **options)
        except Exception as error:  # whatever a tracker and its server may raise
            self.counts["tracker_failures"] += 1
            tqdm.write(f"the tracker failed, the run goes on: {error!r}")
