"""How well images fit their captions by CLIP (arXiv 2104.08718). torchmetrics' own fails under transformers 5."""

from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics import Metric
from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

from ..fingerprints import fingerprint
from .distances import centered_interval, resampled_counts
from .extractors import FeatureExtractor, VisionExtractor, load_extractor, projection_width

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class CLIPScore(Metric):
    """The mean of 100 max(cos, 0) between the embeddings of each image and its caption.

    Args:
        extractor: gives CLIP's projected image embeddings.
        text_model, tokenizer: the other half of the same CLIP.

    Attributes:
        name: as it stands in reports.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[torch.Tensor]
    cut: torch.Tensor

    def __init__(self, extractor: FeatureExtractor, text_model: Any, tokenizer: Any):
        super().__init__()
        self.extractor = extractor
        self.text_model = text_model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_tokens: int = text_model.config.max_position_embeddings
        self.name = "CLIP score" if extractor.name == DEFAULT_CLIP else f"CLIP score ({extractor.name})"
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.scores.append(torch.zeros(0, dtype=torch.float64))  # a process without images has to join the others
        self.add_state("cut", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, captions: list[str]) -> None:
        """Add images and the caption of each. What a caption has beyond CLIP's 77 tokens is cut, and counted.

        Args:
            images: uint8 (B, 3, H, W).
            captions: B of them.

        Raises:
            ValueError: for images that are not as described, or another number of captions.
        """
        embeds = self.extractor(images)  # (B, E)
        if len(captions) != len(images):
            raise ValueError(f"`captions` has {len(captions)} entries for {len(images)} images.")
        encoded = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        full = self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        self.cut = self.cut + sum(len(ids) > self.max_tokens for ids in full)
        text = self.text_model(
            input_ids=encoded["input_ids"].to(images.device),
            attention_mask=encoded["attention_mask"].to(images.device),
        ).text_embeds  # (B, E)
        cosine = (embeds.double() * F.normalize(text.double(), dim=-1)).sum(dim=-1)  # (B,)
        self.scores.append(100 * cosine.clamp(min=0))

    def compute(self) -> torch.Tensor:
        """The mean over all processes, a float64 scalar; raises `ValueError` without images."""
        return self._all().mean()

    def details(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """As `FeatureDistance.details`, with "captions_cut" in place of the reference."""
        with self.sync_context():
            scores = self._all()
            value, interval = scores.mean().item(), None
            if resamples:
                counts = resampled_counts(len(scores), resamples, seed)
                # in order, so that the interval does not depend on which process had which image
                interval = list(centered_interval(value, counts @ scores.sort().values.cpu() / len(scores)))
            cut = int(self.cut)
        return {"value": value, "interval": interval, "num_images": len(scores), "captions_cut": cut}

    def reset(self) -> None:
        super().reset()
        self.scores.append(torch.zeros(0, dtype=torch.float64, device=self.device))

    def _all(self) -> torch.Tensor:
        scores = self.scores if isinstance(self.scores, torch.Tensor) else torch.cat(self.scores)
        if not len(scores):
            raise ValueError(f"{self.name} needs at least 1 image, got 0.")
        return scores.double()

    def describe(self) -> dict[str, Any]:
        """For reports."""
        return {**self.extractor.describe(), "text_fingerprint": fingerprint(self.text_model)}


def load_clip_score(name_or_path: str = DEFAULT_CLIP, revision: str | None = None) -> CLIPScore:
    """CLIP score with a CLIP model and its tokenizer, on the CPU.

    Args:
        name_or_path: a folder that holds both, with its preprocessor_config.json, or a Hub id.
        revision: on the Hub.

    Raises:
        OSError: if there is no such folder or repository.
        ValueError: if it holds no CLIP.
    """
    extractor = load_extractor(name_or_path, revision)
    refusal = f"{name_or_path!r} holds no CLIP with projections of images and of text."
    if not isinstance(extractor, VisionExtractor) or not hasattr(extractor.model, "visual_projection"):
        raise ValueError(refusal)
    cls: Any = CLIPTextModelWithProjection
    text_model, report = cls.from_pretrained(
        name_or_path,
        revision=revision,
        dtype=torch.float32,
        output_loading_info=True,
        **projection_width(AutoConfig.from_pretrained(name_or_path, revision=revision)),
    )
    if report["missing_keys"]:  # transformers draws them at random and only warns
        raise ValueError(refusal)
    return CLIPScore(extractor, text_model, AutoTokenizer.from_pretrained(name_or_path, revision=revision))
