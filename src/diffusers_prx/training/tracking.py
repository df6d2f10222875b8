"""Experiment trackers whose failures do not stop a run."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..config.training_config import TrainingConfig


class Tracking:
    """Trackers of accelerate. Errors, for example of a server, are printed and counted.

    Args:
        accelerator: accelerator with the trackers of `report_to`.
        counts: counter whose entry "tracker_failures" is increased.
    """

    def __init__(self, accelerator: Accelerator, counts: Counter[str]):
        self.accelerator, self.counts = accelerator, counts

    def start(self, cfg: TrainingConfig) -> None:
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in cfg.to_dict().items()
        }
        self._call(self.accelerator.init_trackers, "prx", config=plain)

    def log(self, values: dict[str, float], step: int) -> None:
        self._call(self.accelerator.log, values, step=step)

    def image(self, name: str, image: PIL.Image.Image, step: int) -> None:
        self._call(self._image, name, image, step)

    def end(self) -> None:
        self._call(self.accelerator.end_training)

    def _image(self, name: str, image: PIL.Image.Image, step: int) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.array(image)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=step)
            elif tracker.name == "trackio":
                import trackio  # optional dependency of --report_to trackio

                tracker.log({name: trackio.Image(image)}, step=step)

    def _call(self, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:  # trackers raise many types
            self.counts["tracker_failures"] += 1
            tqdm.write(f"the experiment tracker failed; training continues: {error!r}")
