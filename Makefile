# `make demo` and `make test` need Python 3.11 to 3.13, make and a network connection. They install everything else.
PYTHON ?= python3
# An additional package index for torch, for example one with CPU-only builds: make setup TORCH_INDEX=URL
TORCH_INDEX ?=
# The OpenCV that FFCV is built with. Empty: Debian or Ubuntu packages that are downloaded but not installed. "system":
# the installed one. A folder such as $CONDA_PREFIX: the one in it. "no": FFCV is not built.
FFCV ?=

.PHONY: demo test test-slow test-slurm test-all test-oldest chaos check format setup venv peers lock clean

# Trains on generated images, evaluates the encoder and draws plots.
demo: venv
	.venv/bin/python -m launch.demo

# Two workers side by side: each starts with half of the files, and takes tests of the other when it is done.
PYTEST = .venv/bin/python -m pytest
WORKERS ?= 2
SIDE_BY_SIDE = $(PYTEST) --numprocesses=$(WORKERS) --dist=worksteal

test: venv
	$(SIDE_BY_SIDE) -m "not slow and not slurm"

# Three at once, since they wait for processes and signals half of the time.
test-slow: WORKERS = 3
test-slow: venv
	$(SIDE_BY_SIDE) -m "slow and not slurm"

# On a real SLURM, which SIMCLR_SLURM_DIR stands for; without one they are skipped. One by one: they share its nodes.
test-slurm: venv
	$(PYTEST) -m slurm

test-all: test test-slow test-slurm

# The lowest versions that setup.cfg allows, on Python 3.11, in an environment of their own (6 GB, made once).
OLDEST = config/test_options data/test_draws data/test_augmentations data/test_beton runs/test_checkpoint \
	distributed/test_collectives losses/test_kernel_info_nce training/test_optim distributed/test_watchdog \
	losses/test_triton_log_sums
test-oldest:
	@PYTHON="$(PYTHON)" tools/oldest $(OLDEST:%=tests/%.py)

# Causes a hundred faults during two training runs, on 2 and on 4 ranks. Takes up to an hour on two busy cores.
chaos: venv
	.venv/bin/python -m tests.chaos --faults 50 --ranks 2 4 --out benchmarks/results/chaos.json

# Lint, format and types. `make format` fixes what can be fixed automatically.
check: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	[ ! -x .venv/bin/shellcheck ] || .venv/bin/shellcheck -x $$(git ls-files '*.sh' '*.sbatch')

format: venv
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Creates .venv with this checkout and the packages of requirements.lock, and builds FFCV (tools/build-ffcv-wheel). If
# FFCV can't be built, a message says why, and everything else works.
setup: venv
	@echo "Installed. Type  . .venv/bin/activate  and then  make demo  for a first run, or  simclr  for all commands"

venv:
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" FFCV="$(FFCV)" tools/setup

# Installs the tools that the benchmarks `step` and `loss` are compared with, into .peers, which nothing else uses.
peers: venv
	.venv/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --target .peers --no-deps \
		-r benchmarks/peers.txt

# Rewrites requirements.lock with the newest versions that setup.cfg allows.
lock:
	@PYTHON="$(PYTHON)" tools/lock

clean:
	rm -rf .venv .peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
