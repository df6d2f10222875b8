"""The installed package: lazy names, wheel and sdist, dependencies, no patched libraries, no warnings."""

import ast
import email
import inspect
import os
import re
import site
import socket
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import diffusers_prx

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# import name -> distribution, where the names differ
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "markdown_it": "markdown-it-py"}

# declared but not imported by our code -> reason
USED_WITHOUT_IMPORT = {
    "peft": "diffusers' PeftAdapterMixin needs it for add_adapter and load_lora_adapter",
    "safetensors": "save_pretrained and from_pretrained write and read with it",
    "tensorboard": "accelerate's tracker for --report_to tensorboard",
    "wandb": "accelerate's tracker for --report_to wandb",
    "trackio": "accelerate's tracker for --report_to trackio",
    "pytest-xdist": "pytest -n 2 in the Makefile",
    "ruff": "`make quality`",
    "mypy": "`make quality`",
    "types-pyyaml": "stubs that mypy reads",
    "build": "run by these tests",
    "torchao": "loaded by the quantization of diffusers",
    "gguf": "diffusers reads .gguf files with it",
    "hatchling": "the build backend",
    "pre-commit": "run by git",
    "pre-commit-hooks": "run by pre-commit",
    "myst-parser": "an extension that docs/conf.py names",
    "furo": "the theme that docs/conf.py names",
}

# modules that work without the training extra: everything that sampling needs
CORE = ("__init__.py", "compat.py", "models", "schedulers", "pipelines", "latents.py", "text.py", "convert.py")
CORE += ("checkpoint_files.py", "cli.py", "files.py", "prompt_cleaning.py")


def run_python(code: str, *arguments: str, **kwargs) -> str:
    """Run code in a fresh interpreter, with library warnings turned off; return its output."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def normalized(distribution: str) -> str:
    """Normalize the name of a distribution, as PyPI does."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def third_party_imports(path: Path) -> set[str]:
    """Return the top-level third-party modules that a file, or the files of a folder, import anywhere."""
    names: set[str] = set()
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    ours = {"diffusers_prx", "training", "tests", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
    ours |= {file.stem for folder in ("training", "spaces", "docs") for file in (ROOT / folder).rglob("*.py")}
    return {normalized(DISTRIBUTIONS.get(name, name)) for name in names - ours - sys.stdlib_module_names}


# --- lazy public names


def test_import_loads_no_other_library():
    loaded = run_python(
        """
        import sys
        before = set(sys.modules)
        import diffusers_prx
        assert set(diffusers_prx.__all__) <= set(dir(diffusers_prx))
        print(*{name.partition(".")[0] for name in set(sys.modules) - before})
        """
    ).split()
    assert set(loaded) - sys.stdlib_module_names == {"diffusers_prx"}


@pytest.mark.parametrize("name", [name for name in diffusers_prx.__all__ if name != "__version__"])
def test_public_name_resolves_and_is_documented(name):
    value = getattr(diffusers_prx, name)
    assert value.__name__ == name
    assert value.__module__ == f"diffusers_prx.{diffusers_prx._MODULES[name]}"
    own = value.__doc__ if inspect.isfunction(value) else vars(value).get("__doc__")
    assert "Example:" in (own or ""), f"{name} has no docstring of its own with an example"
    if "__call__" in vars(value):
        assert inspect.getdoc(vars(value)["__call__"]), f"{name}.__call__ has no docstring"
    assert value.__doc__ != f"{name}{inspect.signature(value)}", f"{name} has only the docstring that dataclass writes"


def test_names_for_type_checkers_are_the_lazy_names():
    tree = ast.parse((SRC / "diffusers_prx/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == diffusers_prx._MODULES
    assert diffusers_prx.__all__ == sorted([*imported, "__version__"])


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PRXNothing'"):
        diffusers_prx.PRXNothing  # noqa: B018


def test_importing_everything_patches_no_other_library():
    """Functions, classes and methods of the libraries are the same objects before and after."""
    output = run_python(
        """
        import importlib, pkgutil, sys, types

        LIBRARIES = ("torch", "diffusers", "transformers", "huggingface_hub", "accelerate", "datasets", "PIL", "numpy")
        CALLABLE = (type, types.FunctionType, types.BuiltinFunctionType, staticmethod, classmethod, property)

        def snapshot():
            found = {}
            for name, module in list(sys.modules.items()):
                if name.partition(".")[0] not in LIBRARIES or not isinstance(module, types.ModuleType):
                    continue
                for key, value in list(vars(module).items()):
                    if isinstance(value, CALLABLE):
                        found[name, key] = value
                    if isinstance(value, type) and value.__module__ == name:
                        for method, body in list(vars(value).items()):
                            if isinstance(body, CALLABLE):
                                found[name, key, method] = body
            return found

        def ours(value):
            value = getattr(value, "__func__", getattr(value, "fget", value))
            return str(getattr(value, "__module__", "")).startswith("diffusers_prx")

        def violations(before, after):
            changed = {key for key in before if key in after and before[key] is not after[key]}
            deleted = {key for key in before if key not in after}
            return sorted(changed | deleted | {key for key in after if key not in before and ours(after[key])})

        for library in LIBRARIES:
            importlib.import_module(library)
        import diffusers_prx

        names = [module.name for module in pkgutil.walk_packages(diffusers_prx.__path__, "diffusers_prx.")]
        # the modules that ours import, so that the snapshot holds everything that could be patched
        import diffusers.loaders, diffusers.models.modeling_utils, diffusers.pipelines.pipeline_utils
        import diffusers.models.attention_dispatch, diffusers.schedulers, diffusers.training_utils
        import transformers.models.t5gemma.modeling_t5gemma

        before = snapshot()
        for name in names:
            importlib.import_module(name)
        print(len(before), len(names), violations(before, snapshot()))

        # the check detects a patched method, a patched function and an added one
        before = snapshot()
        exec(
            "def forward(self): ...\\n"
            "torch.nn.Linear.forward = diffusers.ModelMixin.extra = torch.nn.functional.linear = forward",
            {"torch": sys.modules["torch"], "diffusers": sys.modules["diffusers"], "__name__": "diffusers_prx.patch"},
        )
        print([".".join(key) for key in violations(before, snapshot())])
        """
    )
    first, second = output.splitlines()[-2:]
    objects, modules, found = first.split(maxsplit=2)
    assert int(objects) > 10_000
    assert int(modules) > 5
    assert found == "[]"
    for patched in ("Linear.forward", "ModelMixin.extra", "functional.linear"):
        assert patched in second


# --- wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the sdist and a wheel from it, without a download."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    info = f"diffusers_prx-{diffusers_prx.__version__}.dist-info"
    package = {name for name in names if not name.startswith(info)}
    on_disk = {
        str(file.relative_to(SRC))
        for file in (SRC / "diffusers_prx").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert package == on_disk
    assert "diffusers_prx/py.typed" in package
    assert f"{info}/licenses/LICENSE" in names


def test_sdist_holds_what_a_user_needs_to_train_and_test(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "LICENSE",
        "README.md",
        "Makefile",
        "pyproject.toml",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "docs/conf.py",
        "docs/train/your_pictures.md",
        "src/diffusers_prx/py.typed",
        "tests/conftest.py",
        "tests/test_package.py",
        "training/train_prx.py",
        "training/recipes/quickstart.yaml",
        "spaces/prx/app.py",
        "spaces/prx/requirements.txt",
    ):
        assert name in names
    waste = {".git", ".venv", "outputs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".ci"}
    assert not {name for name in names if waste & set(Path(name).parts)}
    assert not {name for name in names if name.startswith("docs/reference/")}, "generated pages"


def test_metadata(metadata):
    assert metadata["Version"] == diffusers_prx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_wheel_installs_and_imports_in_a_fresh_process(built, tmp_path):
    """Without the checkout on the path and without an index."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*command, str(built[1])], check=True, timeout=120)
    output = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import diffusers_prx
        for name in diffusers_prx.__all__:
            getattr(diffusers_prx, name)
        print(*sorted({module.__file__ for name, module in sys.modules.items() if name.startswith("diffusers_prx")}))
        """,
        str(tmp_path),
        cwd=tmp_path,
    )
    files = output.split()
    assert len(files) > 5
    assert all(Path(file).is_relative_to(tmp_path) for file in files)


# --- dependencies


def declared(metadata: Message, *extras: str) -> set[str]:
    """Return the distributions that an installation with these extras brings."""
    found = set()
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            found.add(normalized(requirement.name))
    return found


def test_every_import_is_declared(metadata):
    core = {name for part in CORE for name in third_party_imports(SRC / "diffusers_prx" / part)}
    assert core <= declared(metadata), "only training needs the extras"
    training = declared(metadata, "training", "mds", "wandb", "trackio")
    assert third_party_imports(SRC) <= training
    assert third_party_imports(ROOT / "training") <= training | declared(metadata, "emoji", "vision", "quantization")
    # gradio requires fastapi, starlette and anyio; only ZeroGPU has spaces
    others = {"anyio", "fastapi", "starlette", "spaces"}
    assert third_party_imports(ROOT / "spaces") - others <= declared(metadata, "demo")
    assert third_party_imports(ROOT / "docs") <= declared(metadata, "training", "docs")
    # packaging is a dependency of both huggingface_hub and pytest; gradio is made with the others
    assert third_party_imports(ROOT / "tests") - {"packaging", "fastapi", "httpx", "starlette"} <= declared(
        metadata, "training", "mds", "emoji", "vision", "quantization", "dev"
    )


def test_every_dependency_is_used_or_has_a_reason(metadata):
    everything = declared(metadata, *metadata.get_all("Provides-Extra")) - {"diffusers-prx"}
    imported = {name for folder in ("src", "training", "tests", "docs") for name in third_party_imports(ROOT / folder)}
    unused = everything - imported
    assert unused <= set(USED_WITHOUT_IMPORT), f"declared and not used: {sorted(unused - set(USED_WITHOUT_IMPORT))}"
    assert set(USED_WITHOUT_IMPORT) <= everything, "a reason for what is not declared"


def test_every_dependency_has_a_range_and_says_why():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    requirements = [line for line in lines if re.match(r'\s*(\w+ = \[)?"[\w.-]+>=', line)]
    assert len(requirements) > 15
    for line in requirements:
        assert re.search(r"#\s*\S{2}", line), f"no reason: {line}"
        assert "==" not in line, f"a version is pinned: {line}"


def test_the_lower_bounds_that_are_tested_are_those_that_are_declared(metadata):
    lines = (ROOT / "tests" / "lower-bounds.txt").read_text().splitlines()
    tested = {normalized(name): floor for name, _, floor in (line.partition("==") for line in lines if "==" in line)}
    found = {}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        extra = re.findall(r'extra == "([\w-]+)"', str(requirement.marker))
        floors = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        name = normalized(requirement.name)
        if floors and (extra in ([], ["training"], ["evaluation"], ["demo"]) or name in tested):
            found.setdefault(name, floors[0])
    assert {name: Version(floor) for name, floor in tested.items()} == {n: Version(f) for n, f in found.items()}


@pytest.mark.parametrize(
    ("installed", "message"),
    [({"peft": "0.17.1"}, "peft>=0.18"), ({"torchao": "0.18.0", "torch": "2.9.1+cpu"}, "torch>=2.11")],
)
def test_an_installed_version_that_cannot_be_imported_is_named(tmp_path, installed, message):
    for name, version in installed.items():
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    shown = run_python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        try:
            import diffusers_prx
        except ImportError as error:
            print(error)
        """,
        str(tmp_path),
    )
    assert message in shown
    assert all(version in shown for version in installed.values())


def test_importing_and_asking_for_help_print_no_warnings():
    """Neither ours nor those of other libraries. torchao, which prints some on import, is not in the environment."""
    if any((Path(folder) / "torchao").is_dir() for folder in site.getsitepackages()):
        pytest.skip("torchao is installed beside the other libraries")
    path = [folder for folder in sys.path if not (Path(folder) / "torchao").is_dir()]  # see the Makefile
    code = """
        import contextlib, io, runpy, sys
        import diffusers_prx
        for name in diffusers_prx.__all__:
            getattr(diffusers_prx, name)
        for script in sys.argv[1:]:
            sys.argv = [script, "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                try:
                    runpy.run_path(script, run_name="__main__")
                except SystemExit as end:
                    assert not end.code, script
            assert "--help" in shown.getvalue(), script
    """
    scripts = sorted(map(str, [*(ROOT / "training").glob("*.py"), *(ROOT / "training" / "tools").glob("*.py")]))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *scripts],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SRC), *path])},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")


# --- the tests' guard


def test_the_network_guard_detects_a_swallowed_attempt(no_network):
    with pytest.raises(OSError, match="tests run offline"):
        socket.create_connection(("huggingface.co", 443), timeout=1)
    with pytest.raises(OSError, match="tests run offline"), socket.socket() as sock:
        sock.connect(("192.0.2.1", 443))
    assert no_network == ["huggingface.co", "192.0.2.1"]
    no_network.clear()  # or the guard would fail this test too


def test_the_network_guard_allows_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.sendall(b"x")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1) == b"x"
