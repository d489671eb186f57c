# The two commands of a new user are `make demo` and `make test`; each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NVRTC := $(VENV)/.nvrtc

.PHONY: demo test test-slow check format build clean

demo: $(READY)
	$(BIN)/weaveinf demo

test: $(READY) $(NVRTC)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(READY)
	$(BIN)/python setup.py -q build_ext --inplace

clean:
	rm -rf build dist weaveinf/_native *.egg-info

# Without an NVIDIA GPU, Linux gets torch's CPU build (which has an index of its own: PyPI's is the
# CUDA build, gigabytes larger) and triton for the tests in its interpreter.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
TORCH := $(if $(shell command -v nvidia-smi),torch==2.13.0,\
	$(if $(filter Linux,$(shell uname)),--retries 1 --extra-index-url $(TORCH_INDEX) torch==2.13.0+cpu triton==3.6.0,\
	torch==2.13.0))
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

$(READY): pyproject.toml setup.py requirements.lock Makefile $(wildcard csrc/cpu/* csrc/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -r requirements.lock
	$(PIP) --no-build-isolation --no-deps -e .
	touch $(READY)

# The tests compile csrc/cuda for GPUs that need not be here. Where it cannot be had, they skip.
$(NVRTC): $(READY)
	-$(PIP) nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-nvcc==13.5.37
	touch $(NVRTC)
