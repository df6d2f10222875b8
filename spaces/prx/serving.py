"""How the page is served: what can be read and sent, and what programs are told that call it wrongly."""

from typing import Any

import gradio as gr
from fastapi import Request
from fastapi.responses import JSONResponse
from gradio.route_utils import FnIndexInferError

from page_parts import CSS, THEME


class Page(gr.Blocks):
    """A page that says in a sentence that values are missing; gradio would print the objects that it expects."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        needed = len(block_fn.inputs)
        if len(inputs) < needed:
            raise gr.Error(f"{len(inputs)} values came; {needed} are needed.", print_exception=False)


async def no_such_endpoint(request: Request, error: Exception) -> JSONResponse:
    """Without it an unknown name is an error inside the server, 500."""
    return JSONResponse({"detail": "There is no such endpoint; there are /draw and /compare."}, status_code=404)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page: no file outside of it can be read, nothing can be uploaded, no history is kept."""
    return page.launch(
        theme=THEME,
        css=CSS,
        allowed_paths=[],
        max_file_size=1,
        run_history=False,
        ssr_mode=False,
        show_error=True,
        state_session_capacity=300,  # a program makes a new session with each request
        footer_links=["api"],
        app_kwargs={"exception_handlers": {FnIndexInferError: no_such_endpoint}},
        **options,
    )
