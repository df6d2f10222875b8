# From a fresh clone: `make quickstart` or `make test`. Variables and their defaults:
#   PYTHON=python3    Python (3.10 or newer) that creates the environment
#   VENV=.venv        folder of the environment
#   PIP_ARGS=         further arguments for pip install
#   PYTEST_ARGS=      further arguments for pytest
#   QUICKSTART_ARGS=  further flags for the training of the quickstart, e.g. --max_train_steps 100
#   EMOJI_ARGS=       further flags for the training of `make emoji`
#   GPU_ARGS=         further flags for `make gpu-check` or `make gpu-study`

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
EMOJI_ARGS ?=
GPU_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCHAO := $(VENV)/.torchao
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$(abspath $(VENV))/torchao:$$PYTHONPATH"
VERSIONS := torch|torchvision|diffusers|transformers|accelerate|datasets|peft|huggingface.hub|safetensors|tokenizers|numpy|pillow|gradio
VERSIONS_TESTS := tests/models tests/pipelines tests/schedulers tests/data tests/test_latents.py tests/test_text.py tests/test_convert.py
CPU_INDEX := https://download.pytorch.org/whl/cpu

# the default of `accelerate launch` is one thread; a model of this size gains nothing from more than eight
THREADS = $(shell $(BIN)/python -c "import os; print(min(os.cpu_count() or 1, 8))")

TRAIN = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS) training/train_prx.py
GRADE_EMOJI := --num_inference_steps 16 \
	--emoji data/emoji --emoji_network data/networks/lite0 data/networks/lite2 --num_prompts 128 \
	--metrics fid:data/networks/lite2 mmd:data/networks/lite2 \
	--reference data/emoji/64 --reference_split heldout_pairs --num_images 512
EMOJI_DATA := data/emoji/64 data/networks/lite0 data/networks/lite2 data/networks/minilm-small

.DEFAULT_GOAL := help
.PHONY: help install quickstart emoji demo gpu-check gpu-train gpu-study test test-lower test-upper test-versions soak quality docs bench bench-sampling clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[A-Za-z0-9_-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create the environment in .venv and install the package with its development tools

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: PYTHON is $(PYTHON), which was not found: install Python 3.10 or newer, or pass PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('error: PYTHON is $(PYTHON), version %d.%d; accepted: 3.10 or newer. Pass PYTHON=/path/to/python' % sys.version_info[:2])"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) cannot create an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(PIP_ARGS)" ] && ! command -v nvidia-smi >/dev/null; then \
		echo "No NVIDIA GPU was found. pip installs the CUDA build of PyTorch anyway (several GB); the CPU build is smaller:"; \
		echo "    make install PIP_ARGS='--extra-index-url $(CPU_INDEX)'"; \
	fi
	$(BIN)/python -m pip install $(PIP_ARGS) -e ".[dev]"
	@touch $@

quickstart: $(STAMP) ## train a small PRX on drawn scenes, grade it on held-out prompts, save it in outputs/quickstart
	$(TRAIN) --config training/recipes/quickstart.yaml --resume_from_checkpoint latest \
		$(QUICKSTART_ARGS)
	$(BIN)/python training/evaluate_prx.py --model outputs/quickstart --scenes
	@echo; echo "Report and pictures: outputs/quickstart/report.json, samples.png, loss_curve.png. In $(BIN)/python:"; echo
	@echo '    from diffusers_prx import PRXPixelPipeline'
	@echo '    pipeline = PRXPixelPipeline.from_pretrained("outputs/quickstart")'
	@echo '    pipeline("a big red circle at the top left on a white background.", guidance_scale=3.0).images[0].save("scene.png")'

# Both tools rename a folder when it is complete, so that these targets never exist half-made.
data/emoji/64:
	$(BIN)/python training/tools/fetch_emoji.py --sizes 64 --output_dir data/emoji

data/networks/lite0 data/networks/lite2:
	$(BIN)/python training/tools/fetch_networks.py $(@F) --output_dir $@

data/networks/minilm-small: | data/emoji/64
	$(BIN)/python training/tools/fetch_networks.py minilm --num_layers 4 --vocab_size 10000 --captions data/emoji/64 \
		--output_dir $@

emoji: $(STAMP) | $(EMOJI_DATA) ## fetch real drawings, train a small PRX on them, grade what it draws, save it in outputs/emoji_small
	$(TRAIN) --config training/recipes/emoji_small.yaml --resume_from_checkpoint latest \
		--max_train_steps 600 $(EMOJI_ARGS)
	$(BIN)/python training/evaluate_prx.py --model outputs/emoji_small $(GRADE_EMOJI)
	@echo; echo "Report and pictures: outputs/emoji_small/report.md, emoji.png, comparison.png, loss_curve.png."
	@echo 'To train longer, repeat the command with another number of steps: make emoji EMOJI_ARGS="--max_train_steps 6000"'

demo: $(STAMP) ## serve the demo in spaces/prx: draw in a browser with the models of this machine
	$(BIN)/python spaces/prx/app.py

# diffusers, transformers and peft import torchao if it is installed, which prints warnings: it has its own folder, which
# only the tests see
$(TORCHAO): $(STAMP)
	$(BIN)/python -m pip install $(PIP_ARGS) --upgrade --no-deps --target $(VENV)/torchao \
		"$$($(BIN)/python -c 'import importlib.metadata as m; print(next(r.partition(";")[0] for r in m.requires("diffusers-prx") if r.startswith("torchao")))')"
	@touch $@

# worksteal keeps the tests of a file, and its shared fixtures, on one worker until the other is idle
test: $(STAMP) $(TORCHAO) ## run the whole test suite, offline, on two cores
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-lower: ## install the lowest versions that pyproject.toml allows in .venv-lower, test models, pipelines and data, train three steps
	$(MAKE) test-versions VENV=.venv-lower PIP_ARGS="--constraint tests/lower-bounds.txt $(PIP_ARGS)"

test-upper: ## the same with the newest versions, in .venv-upper
	$(MAKE) test-versions VENV=.venv-upper PIP_ARGS="--upgrade --upgrade-strategy eager $(PIP_ARGS)"

test-versions: $(STAMP)
	$(BIN)/python -m pip list --format=freeze | grep -iE '^($(VERSIONS))=='
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(VERSIONS_TESTS) $(PYTEST_ARGS)
	rm -rf $(VENV)/three_steps
	HF_HUB_OFFLINE=1 $(BIN)/python training/train_prx.py --config training/recipes/quickstart.yaml \
		--output_dir $(VENV)/three_steps --max_train_steps 3 --lr_warmup_steps 1 --lr_decay_steps 1
	HF_HUB_OFFLINE=1 $(BIN)/python training/evaluate_prx.py --model $(VENV)/three_steps --scenes --num_prompts 4

soak: $(STAMP) $(TORCHAO) ## run the slow tests: CPU versions of all recipes, a hundred kills of one run, the demo under load
	RUN_SLOW=1 $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m slow \
		--ignore tests/training/test_faults.py $(PYTEST_ARGS)
	RUN_SLOW=1 $(TEST_ENV) $(BIN)/python -m pytest -m slow tests/training/test_faults.py

quality: $(STAMP) ## check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build the pages of docs/ into build/docs; a broken link or an undocumented public name is an error
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --jobs 2 -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

gpu-check: $(STAMP) $(TORCHAO) ## compare losses, gradients and pictures of a GPU with float64 on the CPU, then time PRX-1.2B on it
	PYTHONPATH="$(abspath $(VENV))/torchao:$$PYTHONPATH" $(BIN)/python training/benchmarks/gpu_check.py --fp8 $(GPU_ARGS)

gpu-train: $(STAMP) | $(EMOJI_DATA) ## train and grade the quickstart and the emoji model on a GPU, in outputs/gpu_train
	$(TRAIN) --config training/recipes/quickstart.yaml --resume_from_checkpoint latest \
		--output_dir outputs/gpu_train/quickstart --compile --mixed_precision bf16
	$(BIN)/python training/evaluate_prx.py --model outputs/gpu_train/quickstart --scenes
	$(TRAIN) --config training/recipes/emoji_small.yaml --resume_from_checkpoint latest \
		--output_dir outputs/gpu_train/emoji_small --compile --mixed_precision bf16 --max_train_steps 40000
	$(BIN)/python training/evaluate_prx.py --model outputs/gpu_train/emoji_small $(GRADE_EMOJI)

gpu-study: $(STAMP) ## run the study of scenes on one GPU, six runs at a time; the same command continues
	$(BIN)/python training/ablate_prx.py --study training/studies/scenes.yaml --output_dir outputs/gpu_study \
		--jobs 6 --remove_checkpoints $(GPU_ARGS)

bench: $(STAMP) ## time the model against diffusers', the techniques, Muon and data loading
	$(BIN)/python training/benchmarks/bench_model.py
	$(BIN)/python training/benchmarks/bench_techniques.py
	$(BIN)/python training/benchmarks/bench_muon.py
	$(BIN)/python training/benchmarks/bench_loader.py

bench-sampling: $(STAMP) ## time pipeline calls against diffusers' pipeline, and measure their peak memory
	$(BIN)/python training/benchmarks/bench_sampling.py

clean: ## remove the environment, build files and caches, but not outputs/
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests training spaces -name __pycache__ -type d -prune -exec rm -rf {} +
