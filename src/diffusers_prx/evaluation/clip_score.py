"""CLIP score: agreement of images and captions (arXiv 2104.08718). torchmetrics' own fails with transformers 5."""

from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics import Metric
from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from ..fingerprints import fingerprint
from .distances import centered_interval, resampled_counts
from .extractors import FeatureExtractor, VisionExtractor, load_extractor, projection_width

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class CLIPScore(Metric):
    """Mean of 100 max(cos, 0) between the embeddings of each image and its caption.

    Args:
        extractor: extractor of CLIP's projected image embeddings.
        text_model: text model of the same CLIP.
        tokenizer: tokenizer of the same CLIP.

    Attributes:
        name: name in reports.

    Example:
        >>> import torch
        >>> from diffusers_prx.evaluation.clip_score import load_clip_score
        >>> metric = load_clip_score()
        >>> metric.update(torch.zeros(1, 3, 336, 336, dtype=torch.uint8), ["a black image"])
        >>> metric.compute()
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    scores: list[torch.Tensor]
    truncated: torch.Tensor

    def __init__(
        self, extractor: FeatureExtractor, text_model: CLIPTextModelWithProjection, tokenizer: PreTrainedTokenizerBase
    ):
        super().__init__()
        self.extractor = extractor
        self.text_model = text_model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.max_tokens: int = text_model.config.max_position_embeddings
        self.name = "CLIP score" if extractor.name == DEFAULT_CLIP else f"CLIP score ({extractor.name})"
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.scores.append(
            torch.zeros(0, dtype=torch.float64)
        )  # a process without images takes part in the synchronization
        self.add_state("truncated", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, captions: list[str]) -> None:
        """Add images and their captions. Captions beyond CLIP's 77 tokens are truncated and counted.

        Args:
            images: images, uint8 (B, 3, H, W).
            captions: B captions.

        Raises:
            ValueError: if the images are not as described, or the number of captions differs.
        """
        self.scores.append(self.score(images, captions))
        full = self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        self.truncated = self.truncated + sum(len(ids) > self.max_tokens for ids in full)

    def score(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Return the score of each image, float64 (B,), without adding it. The arguments are those of `update`."""
        embeds = self.extractor(images)  # (B, E)
        if len(captions) != len(images):
            raise ValueError(
                f"`captions` has {len(captions)} entries; accepted: one for each of {len(images)} images."
            )
        encoded = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        text = self.text_model(
            input_ids=encoded["input_ids"].to(images.device),
            attention_mask=encoded["attention_mask"].to(images.device),
        ).text_embeds  # (B, E)
        cosine = (embeds.double() * F.normalize(text.double(), dim=-1)).sum(dim=-1)  # (B,)
        return 100 * cosine.clamp(min=0)

    def compute(self) -> torch.Tensor:
        """Return the mean over all processes, a float64 scalar. Raises `ValueError` without images."""
        return self._all().mean()

    def details(self, resamples: int = 0, seed: int = 0) -> dict[str, Any]:
        """Return the same entries as `FeatureDistance.details`, with "captions_cut" instead of "num_reference"."""
        with self.sync_context():
            scores = self._all()
            value, interval = scores.mean().item(), None
            if resamples:
                counts = resampled_counts(len(scores), resamples, seed)
                # sorted, so that the interval does not depend on the distribution over processes
                interval = list(centered_interval(value, counts @ scores.sort().values.cpu() / len(scores)))
            truncated = int(self.truncated)
        return {"value": value, "interval": interval, "num_images": len(scores), "captions_cut": truncated}

    def reset(self) -> None:
        super().reset()
        self.scores.append(torch.zeros(0, dtype=torch.float64, device=self.device))

    def _all(self) -> torch.Tensor:
        scores = self.scores if isinstance(self.scores, torch.Tensor) else torch.cat(self.scores)
        if not len(scores):
            raise ValueError(f"{self.name} needs at least 1 image, got 0.")
        return scores.double()

    def describe(self) -> dict[str, Any]:
        """Return the facts about the model for reports."""
        return {**self.extractor.describe(), "text_fingerprint": fingerprint(self.text_model)}


def load_clip_score(name_or_path: str = DEFAULT_CLIP, revision: str | None = None) -> CLIPScore:
    """Load a CLIP model and its tokenizer on the CPU as a metric.

    Args:
        name_or_path: Hub id, or folder with model, tokenizer and preprocessor_config.json.
        revision: revision on the Hub.

    Raises:
        OSError: if the folder or repository does not exist.
        ValueError: if it is not a CLIP with projections.
    """
    extractor = load_extractor(name_or_path, revision)
    refusal = f"`metrics` has {name_or_path!r}; accepted: a CLIP with projections of images and text."
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
    if report["missing_keys"]:  # transformers initializes them at random and only warns
        raise ValueError(refusal)
    return CLIPScore(extractor, text_model, AutoTokenizer.from_pretrained(name_or_path, revision=revision))
