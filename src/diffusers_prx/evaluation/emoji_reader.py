"""Reading of name and style of an emoji drawing from an image, by the features of a vision network.

An image is compared with the real drawings of the data set. The name is read among the drawings of all other styles
than the requested one, and the style among the drawings of all other names. The requested drawing itself is left out,
so that memorizing it gives no advantage, and held-out drawings are judged by the same rule. Real images, read in the
same way, give an upper bound. `version` is the style of the nearest drawing of the requested name; here the requested
drawing is included.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import tqdm
from diffusers.utils import logging

from ..data.emoji import EmojiDrawing, EmojiDrawings
from ..files import read_hashed_tensors, write_hashed_tensors
from ..techniques.teachers import VisionTeacher

logger = logging.get_logger(__name__)

# Input size of the network in pixels, rounded down to a multiple of its patch size.
VIEW = 128
# Features are averaged to a grid of at most this side. Of real drawings (600, of 387 names; EfficientNet-Lite0, stage
# with 112 channels) the name is best for 0.863 and among five for 0.925; without averaging 0.857 and 0.920, and by
# Euclidean distance 0.845 and 0.908. Stage with 192 channels: 0.857 and 0.943, with 320: 0.817 and 0.943. Cut out of
# scenes with their colored ground (256 drawings, 29 pixels) 0.836 and 0.922; with the ground replaced by white, 0.820
# and 0.906.
SIDE = 4
WHITE = (255, 255, 255)
TOP = 5
# Divisor of the fits before their softmax. Of real drawings (1,500 of four styles, EfficientNet-Lite0) it gives the
# right name and style the highest likelihood. Their mean probabilities are 0.64 and 0.75; the best fits are right for
# 0.77 and 0.82.
TEMPERATURE = 0.025


@dataclass(frozen=True)
class Reading:
    """Result of reading one image.

    Args:
        rank: number of names that match better than the requested one.
        labels: the five best names, in words.
        style: best style among the drawings of all other names.
        version: best style among the drawings of the requested name.
        name_probability: probability of the requested name among all names.
        style_probability: probability of the requested style among all styles.
    """

    rank: int
    labels: tuple[str, ...]
    style: str
    version: str
    name_probability: float
    style_probability: float


class EmojiReader:
    """Reads pictures with one network.

    Features of a grid of P places are standardized per channel over the data set and compared by their cosine.

    Args:
        drawings: the data set; the features of all its drawings on white are computed once.
        teacher: network, see `techniques.teachers.load_teacher`.
        cache_dir: folder that keeps the features of the drawings, by network and content.
        batch_size: pictures that the network sees at once.
    """

    def __init__(self, drawings: EmojiDrawings, teacher: VisionTeacher, cache_dir: Path, batch_size: int = 32):
        self.teacher, self.batch_size = teacher, batch_size
        side = max(1, VIEW // teacher.patch_size)
        self.grid = (side, side)
        everything = [drawing for part in drawings.splits.values() for drawing in part]
        self.labels = {drawing.name: drawing.label for drawing in everything}
        self.names, self.styles = sorted(self.labels), sorted({drawing.style for drawing in everything})
        self._name_of = torch.tensor([self.names.index(drawing.name) for drawing in everything])  # (N,)
        self._style_of = torch.tensor([self.styles.index(drawing.style) for drawing in everything])  # (N,)
        features = self._known(drawings, everything, cache_dir)  # (N, P, E)
        self._mean, self._std = features.mean((0, 1)), features.std((0, 1)).clamp(min=1e-6)  # (E,)
        self._known_features = self._compared(features)  # (N, P * E)

    def _known(self, drawings: EmojiDrawings, everything: Sequence[EmojiDrawing], cache_dir: Path) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self.teacher.fingerprint} {self.grid} {drawings.size}".encode(), digest_size=16)
        for drawing in everything:
            digest.update(f"{drawing.name} {drawing.style} ".encode() + drawings.stored(drawing))
        file = cache_dir / f"emoji-{digest.hexdigest()}.safetensors"
        if file.is_file():
            try:
                return read_hashed_tensors(file)["features"].float()
            except ValueError as error:
                logger.warning(f"{error} The features of the drawings are computed anew.")
        found = []
        batches = range(0, len(everything), self.batch_size)
        for first in tqdm(batches, desc=f"Looking at the drawings with {self.teacher.name}", unit="batch"):
            part = everything[first : first + self.batch_size]
            pictures = np.stack([drawings.on_ground(drawing, WHITE, drawings.size) for drawing in part])
            found.append(self._look(pictures))
        features = torch.cat(found)  # (N, P, E)
        write_hashed_tensors(file, {"features": features.half()})
        return features

    @torch.no_grad()
    def _look(self, pictures: np.ndarray) -> torch.Tensor:
        """Return the features (B, P, E) of pictures, uint8 (B, h, w, 3)."""
        device = next(self.teacher.parameters()).device
        pixels_pm1 = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, h, w)
        with torch.autocast(device.type, enabled=False):
            features = self.teacher(pixels_pm1, self.grid)  # (B, rows * columns, E)
        maps = features.unflatten(1, self.grid).movedim(-1, 1)  # (B, E, rows, columns)
        pooled = F.adaptive_avg_pool2d(maps, min(SIDE, self.grid[0]))  # (B, E, SIDE, SIDE)
        return pooled.flatten(2).transpose(1, 2).cpu()  # (B, P, E)

    def _compared(self, features: torch.Tensor) -> torch.Tensor:
        """Standardize features (B, P, E) per channel, and scale each picture's to unit length: (B, P * E)."""
        return F.normalize(((features - self._mean) / self._std).flatten(1), dim=1)

    def read(self, pictures: Sequence[np.ndarray], asked: Sequence[EmojiDrawing]) -> list[Reading]:
        """Read pictures.

        Args:
            pictures: uint8 (h, w, 3), of any sizes; on any ground.
            asked: for each picture the drawing that it should show.

        Raises:
            ValueError: if a name is drawn in no other style.
        """
        order = sorted(range(len(pictures)), key=lambda place: pictures[place].shape)  # a batch has one size
        readings: dict[int, Reading] = {}
        while order:
            batch = [place for place in order[: self.batch_size] if pictures[place].shape == pictures[order[0]].shape]
            order = order[len(batch) :]
            fit = self._compared(self._look(np.stack([pictures[place] for place in batch]))) @ self._known_features.T
            for place, row in zip(batch, fit):
                readings[place] = self._read(row, asked[place])
        return [readings[place] for place in range(len(pictures))]

    def _read(self, fit: torch.Tensor, asked: EmojiDrawing) -> Reading:
        """Read one picture from the fit of each drawing to it, (N,)."""
        name, style = self.names.index(asked.name), self.styles.index(asked.style)
        by_name = self._best(fit.masked_fill(self._style_of == style, -torch.inf), self._name_of, len(self.names))
        if by_name[name] == -torch.inf:
            raise ValueError(f"`asked` has {asked.name!r} in the style {asked.style}, which no other style has.")
        by_style = self._best(fit.masked_fill(self._name_of == name, -torch.inf), self._style_of, len(self.styles))
        versions = self._best(fit.masked_fill(self._name_of != name, -torch.inf), self._style_of, len(self.styles))
        nearest = by_name.topk(min(TOP, len(self.names))).indices.tolist()
        return Reading(
            rank=int((by_name > by_name[name]).sum()),
            labels=tuple(self.labels[self.names[place]] for place in nearest),
            style=self.styles[int(by_style.argmax())],
            version=self.styles[int(versions.argmax())],
            name_probability=float((by_name / TEMPERATURE).softmax(0)[name]),
            style_probability=float((by_style / TEMPERATURE).softmax(0)[style]),
        )

    @staticmethod
    def _best(fit: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
        """Return the best fit (count,) in each group of drawings; -inf in one without any."""
        return torch.full((count,), -torch.inf).scatter_reduce(0, groups, fit, "amax")
