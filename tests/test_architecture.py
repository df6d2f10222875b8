"""Rules of the package that a parser can check: dependencies point one way; nothing is patched or hooked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "diffusers_prx"

# layers of the package, lowest first: a part may import parts of lower layers, anywhere in its files
LAYERS: tuple[set[str], ...] = (
    {"compat", "files", "resolution_bins", "prompt_cleaning", "checkpoint_files"},
    {"models", "schedulers", "latents", "text"},
    {"cli", "config", "fingerprints"},
    {"pipelines"},
    {"convert", "data", "techniques"},
    {"evaluation"},
    {"hub"},
    {"training"},
    {"planning", "study"},
)
MAY_IMPORT = {part: set().union(*LAYERS[:layer]) for layer, parts in enumerate(LAYERS) for part in parts}

HOOKS = {
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
}
# Methods that are tempting to wrap from outside. Names that are data as well (`loss`, `step`) cannot be told apart.
METHODS = {"forward", "generate", "backward", "__call__"}
# Switches that libraries publish as attributes; only scripts turn them.
SWITCHES = ("torch.backends.",)


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def module_of(file: Path) -> tuple[str, ...]:
    """`models/transformer_prx.py` is ("models", "transformer_prx"), `models/__init__.py` is ("models",)."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(file): file for file in sources("src")}


def own_imports(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> set[tuple[str, ...]]:
    """The modules of this package that a module imports anywhere, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(tree):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                package = module if is_package else module[:-1]
                base = ("diffusers_prx", *package[: len(package) - node.level + 1], *base)
            targets = [(*base, alias.name) for alias in node.names]
        for target in targets:
            if target[0] != "diffusers_prx":
                continue
            name = target[1:]
            while name and name not in MODULES:  # the last part is a name in a module
                name = name[:-1]
            found.add(name)
    return found


def imports_of(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    file = MODULES[module]
    return own_imports(ast.parse(file.read_text()), module, file.name == "__init__.py")


def test_own_imports_reads_every_form():
    code = """
from ..models import transformer_prx
from ..models.transformer_prx import PRXTransformer2DModel
from .. import latents
import diffusers_prx.text
def inside():
    from .loading import anything
"""
    expected = {("models", "transformer_prx"), ("latents",), ("text",), ("pipelines", "loading")}
    assert own_imports(ast.parse(code), ("pipelines", "pipeline_prx"), False) == expected


@pytest.mark.parametrize("module", sorted(MODULES), ids=".".join)
def test_dependencies_point_one_way(module):
    if not module:
        return  # the public names may come from anywhere
    part = module[0]
    assert part in MAY_IMPORT, (
        f"{part} has no place in the order of dependencies: say in MAY_IMPORT what it may import"
    )
    others = {name[0] if name else "diffusers_prx" for name in imports_of(module)} - {part}
    assert others <= MAY_IMPORT[part], f"{'.'.join(module)} imports {sorted(others - MAY_IMPORT[part])}"


def test_the_order_of_parts_has_no_circle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {part for part, below in MAY_IMPORT.items() if part not in done and below <= done}
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_a_model_file_needs_only_token_routing_single_file_and_compat():
    allowed = {("models", "token_routing"), ("models", "single_file"), ("compat",)}
    for module in MODULES:
        if module[:1] == ("models",) and len(module) > 1:
            assert imports_of(module) <= allowed, ".".join(module)


# modules deeper than these levels are internals: `diffusers.hooks` is documented, `diffusers.hooks.pag` is not
PUBLIC_LEVELS = {"diffusers": 2, "transformers": 2, "torch": 99}


def private_imports(tree: ast.AST) -> set[str]:
    """Names that a file imports from the internals of a library in `PUBLIC_LEVELS`."""
    found = set()
    for node in ast.walk(tree):
        names: list[tuple[str, str]] = []  # (module, imported name)
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [(str(node.module), alias.name) for alias in node.names]
        for module, name in names:
            parts = module.split(".")
            private = any(part.startswith("_") for part in (*parts, name))
            if parts[0] in PUBLIC_LEVELS and (private or len(parts) > PUBLIC_LEVELS[parts[0]]):
                found.add(f"{module}.{name}")
    return found


@pytest.mark.parametrize(
    ("code", "private"),
    [
        ("from diffusers.hooks import apply_context_parallel", False),
        ("import torch.distributed.checkpoint.filesystem", False),
        ("from diffusers.hooks.pag import anything", True),
        ("def f():\n    from diffusers.hooks import _helpers", True),
        ("import torch._dynamo", True),
        ("from transformers.models.bert.modeling_bert import BertModel", True),
    ],
)
def test_private_imports_are_recognized(code, private):
    assert bool(private_imports(ast.parse(code))) == private


def test_private_imports_stand_in_compat_only():
    found = {
        relative(file): private_imports(ast.parse(file.read_text())) for file in sources("src", "training", "spaces")
    }
    assert found.pop("src/diffusers_prx/compat.py")
    assert {file: names for file, names in found.items() if names} == {}


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module: imports_of(module) - {module, ()} for module in MODULES if module}
    done: set[tuple[str, ...]] = set()
    while len(done) < len(graph):
        ready = {module for module, below in graph.items() if module not in done and below <= done}
        assert ready, f"a circle among {sorted('.'.join(module) for module in set(graph) - done)}"
        done |= ready


def test_the_package_imports_no_script_and_no_test():
    for file in sources("src"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not {name.partition(".")[0] for name in names} & {"training", "tests", "spaces"}, relative(file)


# --- nothing is patched or hooked


def dotted(node: ast.AST) -> str:
    """`torch.nn.Linear.forward` of the expression; an empty string where it does not start from a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def imported_names(tree: ast.AST) -> dict[str, str]:
    """The name in the file -> what it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                names[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"
    return names


def patches(tree: ast.AST, switches: tuple[str, ...] = ()) -> list[str]:
    """What a file does to objects that it does not own, as a list of complaints."""
    found = []
    imported = imported_names(tree)

    def complain(node: ast.AST, what: str) -> None:
        found.append(f"line {node.lineno}: {what}")

    def check_target(node: ast.AST) -> None:
        if isinstance(node, (ast.Tuple, ast.List)):
            for element in node.elts:
                check_target(element)
        elif isinstance(node, ast.Subscript):
            if dotted(node.value) == "sys.modules":
                complain(node, "sys.modules is written to")
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            root, _, rest = name.partition(".")
            resolved = f"{imported.get(root, root)}.{rest}"
            if node.attr in METHODS:
                complain(node, f"the method {name or node.attr} is reassigned")
            elif root in imported and not resolved.startswith(switches or ("\0",)):
                complain(node, f"an attribute of the imported {name} is assigned")

    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.Delete)):
            for target in node.targets:
                check_target(target)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            check_target(node.target)
        elif isinstance(node, ast.Attribute) and node.attr in HOOKS:
            complain(node, f"a hook: {node.attr}")
        elif "MethodType" in (getattr(node, "id", None), getattr(node, "attr", None)):
            complain(node, "a method is made at run time")
        elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr"):
            target = node.args[0]
            name = dotted(target.value if isinstance(target, ast.Subscript) else target)
            method = isinstance(node.args[1], ast.Constant) and node.args[1].value in METHODS
            if name == "sys.modules" or name.partition(".")[0] in imported or method:
                complain(node, f"{dotted(node.func)} on {name or 'a method'}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "model.forward = other",
        "def f(self, block): block.attn.forward, x = other, 1",
        "import torch\ntorch.nn.Linear.bias = None",
        "from diffusers import ModelMixin\nModelMixin.extra = 1",
        "import diffusers as d\nsetattr(d.ModelMixin, 'extra', 1)",
        "import sys\nsys.modules['diffusers'] = None",
        "import sys\nsetattr(sys.modules['diffusers'], 'x', 1)",
        "setattr(model, 'generate', wrapped)",
        "import types\nx.y = types.MethodType(f, x)",
        "from types import MethodType\nx.y = MethodType(f, x)",
        "block.register_forward_hook(f)",
        "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True",
    ],
)
def test_the_check_sees(code):
    assert patches(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "self.weight = 1",
        "def f(x):\n    x.value += 1",
        "self.register_buffer('a', b)",
        "import os\nos.environ['A'] = '1'",
    ],
)
def test_the_check_lets_through(code):
    assert not patches(ast.parse(code))


@pytest.mark.parametrize("file", sources("src", "training", "spaces"), ids=relative)
def test_nothing_is_patched_or_hooked(file):
    switches = () if file.is_relative_to(PACKAGE) else SWITCHES
    assert patches(ast.parse(file.read_text()), switches) == []
