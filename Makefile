# `make demo` and `make test` need Python 3.11 to 3.13, make and network; everything else they install themselves.
PYTHON ?= python3
# Another package index for torch, for example a CPU-only one: make setup TORCH_INDEX=...
TORCH_INDEX ?=
# The OpenCV that FFCV is built against: nothing for packages of Debian or Ubuntu that are downloaded, not installed;
# "system" for the installed one; a folder such as $CONDA_PREFIX; "no" builds none.
FFCV ?=

.PHONY: demo test test-slow test-slurm test-all test-oldest chaos check format setup peers lock clean

demo: setup
	.venv/bin/python -m launch.demo

test: setup
	.venv/bin/python -m pytest -m "not slow and not slurm"

test-slow: setup
	.venv/bin/python -m pytest -m "slow and not slurm"

# On a real SLURM, which SIMCLR_SLURM_DIR stands for; without one they are skipped.
test-slurm: setup
	.venv/bin/python -m pytest -m slurm

test-all: test test-slow test-slurm

# The lowest versions that setup.cfg allows, on Python 3.11, in an environment of their own (6 GB, made once).
OLDEST = config draws augmentations beton checkpoint distributed info_nce optim watch triton
test-oldest:
	@PYTHON="$(PYTHON)" tools/oldest $(OLDEST:%=tests/test_%.py)

# A hundred faults over two training runs, on 2 and on 4 ranks: up to an hour on two busy cores.
chaos: setup
	.venv/bin/python -m tests.chaos --faults 50 --ranks 2 4 --out benchmarks/results/chaos.json

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Makes .venv: the packages of requirements.lock, and FFCV, which is built here (tools/build-ffcv-wheel). Where that
# fails it says why, and everything but FFCV works.
setup:
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" FFCV="$(FFCV)" tools/setup

# Other tools that the benchmarks `step` and `loss` are measured beside, into .peers, where nothing else looks.
peers: setup
	.venv/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --target .peers --no-deps \
		-r benchmarks/peers.txt

# Writes requirements.lock anew from the newest versions that setup.cfg allows.
lock:
	@PYTHON="$(PYTHON)" tools/lock

clean:
	rm -rf .venv .peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
