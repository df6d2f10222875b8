"""Gradio page for PRX, on a laptop (`make demo`) and as a Hugging Face Space."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import argparse
from collections.abc import Mapping

try:
    from spaces import GPU  # only on ZeroGPU, where it must be imported before torch
except ImportError:
    GPU = None
import gradio as gr
import torch

import page_parts as parts
from compare_tab import CompareTab
from diffusers_prx import PromptEnhancer
from draw_tab import DrawTab
from edit_tab import EditTab
from handlers import Handlers
from model_cache import CAPACITY, ModelCache, ModelInfo, find_loras, find_models, report_skipped
from pictures import share_image
from serving import Page, launch
from tab_parts import KEPT_SECONDS

QUEUE_SIZE = 24  # waiting requests; further ones are refused

NO_MODEL = """# PRX
**The demo found no model.** Do one of these, then start the demo again:

- `make quickstart` trains a small model on this machine and saves it in `outputs/quickstart`;
- `PRX_MODELS=/path/to/folder` names a folder with saved pipelines (folders with a `model_index.json`);
- `PRX_HUB_MODELS=Photoroom/prx-512-t2i-sft` names models on the Hugging Face Hub, which need a GPU.
"""


def build(models: Mapping[str, ModelInfo], cache: ModelCache, enhancer: PromptEnhancer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        models: models on offer, by name.
        cache: cache over the same models, and the LoRAs.
        enhancer: function that rewrites prompts; None for a page without its button.
    """
    if not models:
        with Page("Text to image with PRX", title="PRX", analytics_enabled=False) as page:
            gr.Markdown(NO_MODEL)
        return page
    handlers = Handlers(models, cache, GPU)
    showcase = handlers.showcases[handlers.initial_model.name]
    with Page(
        showcase.description,
        share_image([file for _, file in showcase.examples]) if showcase.examples else b"",
        title=showcase.title,
        analytics_enabled=False,
        delete_cache=(600, KEPT_SECONDS),
    ) as page:
        header = gr.HTML(parts.header(showcase), elem_classes="header")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                drawing = DrawTab(page, handlers, header, enhancer)
            with gr.Tab("Edit", id="edit") as edit:
                EditTab(handlers, drawing, tabs, edit)
            with gr.Tab("Compare", id="compare"):
                CompareTab(handlers)
    return page.queue(max_size=QUEUE_SIZE, api_open=False)


def load_enhancer() -> PromptEnhancer | None:
    """Load the language model that `PRX_ENHANCER` names, if it is set."""
    name = os.environ.get("PRX_ENHANCER")
    if not name:
        return None
    # ZeroGPU gives CUDA to requests that draw only
    return PromptEnhancer.from_pretrained(name, device="cuda" if torch.cuda.is_available() and GPU is None else None)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # configured by environment variables, see README.md
    models = find_models()
    if GPU is None:
        cache = ModelCache(models, find_loras())
    else:
        # ZeroGPU provides CUDA to the main thread only, and `launch` packs what is loaded by then for its workers.
        # These are forks that are reused: each loads the LoRAs that it needs, and keeps them.
        cache = ModelCache(models, find_loras(), capacity=max(CAPACITY, len(models) + 1))
        for name in list(models):
            try:
                cache.get(name)
            except Exception as error:  # one broken model must not stop the page
                report_skipped(models.pop(name).source, error)
    launch(build(models, cache, load_enhancer()))


if __name__ == "__main__":
    main()
