"""Sphinx configuration: `make docs` builds the pages into build/docs."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]  # generate.py, and the scripts in training/
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import generate

import diffusers_prx

project = "diffusers-prx"
author = "the diffusers-prx authors"
copyright = author
version = release = diffusers_prx.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
nitpicky = True
# A name of this package that is not found fails the build. Types of other libraries, private bases and type variables
# have no page here.
nitpick_ignore_regex = [(r"py:.*", pattern) for pattern in (r"(?!diffusers_prx).*", r".*\._\w+", r".*\.[A-Z]")]
smartquotes_action = "D"  # dashes only

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = f"diffusers-prx {release}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def read_markdown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the Markdown of a docstring (code, tables, fenced examples) into what autodoc reads."""
    lines[:] = markdown_to_rst(lines)


def markdown_to_rst(lines: list[str]) -> list[str]:
    found, in_fence = [], False
    for number, line in enumerate(lines):
        text, indent = line.strip(), line[: len(line) - len(line.lstrip())]
        if text.startswith("```"):
            in_fence = not in_fence
            found += ["", f"{indent}.. code-block:: python", ""] if in_fence else [""]
        elif in_fence:
            found.append(f"    {line}")
        elif text.startswith((">>>", "...")):
            found.append(line)
        elif text.startswith("|") and text.endswith("|"):
            if not (number and lines[number - 1].strip().startswith("|")):
                found += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            if set(text) - set("|-: "):
                cells = [markdown_line(cell.strip()) for cell in text.strip("|").split("|")]
                found += [f"{indent}   {'  -' if cell else '* -'} {text}" for cell, text in enumerate(cells)]
        else:
            found.append(markdown_line(line))
    return found


def markdown_line(line: str) -> str:
    """A line with `code` as ``code``, and everything else that reStructuredText would read as markup escaped."""
    parts = line.replace("``", "`").split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([*|])", r"\\\1", parts[number])
        parts[number] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", parts[number])
    if len(parts) % 2 == 0:  # a backtick without its other half: code that goes on in the next line
        return line.replace("`", "\\`")
    text = parts[0]
    for code, after in zip(parts[1::2], parts[2::2]):
        before = "\\ " if text and (text[-1].isalnum() or text[-1] in "_") else ""
        behind = "\\ " if after and (after[0].isalnum() or after[0] in "_") else ""
        text += f"{before}``{code}``{behind}{after}" if code else after
    return text


def setup(app: Sphinx) -> None:
    generate.write_pages(DOCS / "reference" / "generated")
    app.connect("autodoc-process-docstring", read_markdown, priority=400)  # before napoleon
