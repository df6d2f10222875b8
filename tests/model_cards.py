"""The Hub's checks of model cards, as far as they are possible offline."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from diffusers_prx.hub.cards import linked_files

# Possible licenses of our weights, from https://huggingface.co/docs/hub/repositories-licenses.
LICENSES = {
    "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "gemma", "other", "unknown",
}  # fmt: skip
PIPELINE_TAGS = {"text-to-image", "unconditional-image-generation", "image-to-image"}
# Values that the Hub accepts as `dataset.type` of a result.
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")


def check_card(file: Path) -> ModelCard:
    """Read a card, and check its metadata, its links and that no template syntax is left."""
    card = ModelCard.load(file)
    data = card.data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag in PIPELINE_TAGS
    assert data.license in LICENSES
    assert data.tags
    assert len(set(data.tags)) == len(data.tags)
    assert data.language in (None, "en")
    for name in (data.base_model, *(data.datasets or [])):
        assert name is None or name.count("/") == 1
        validate_repo_id(name)
    for result in data.eval_results or []:
        assert result.task_type == data.pipeline_tag
        assert DATASET_TYPE.fullmatch(result.dataset_type)
        assert isinstance(result.metric_value, float)
        assert result.metric_args["num_inference_steps"] >= 1
    if data.eval_results:
        index = eval_results_to_model_index(data.model_name, data.eval_results)
        assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
    for example in data.get("widget") or []:
        assert example["text"]
        assert set(example) <= {"text", "output"}
    for link in linked_files(card):
        assert (file.parent / link).is_file(), f"{file} links to {link}, which does not exist"
    assert not re.search(r"\{\{|\{%|\bNone\b|Undefined", card.text)
    for part in ("## Use", "## Training", "## Measured", "## Limits", "## License and attribution"):
        assert part in card.text
    return card
