# Thin calls; what they do stands in scripts/.
.PHONY: help setup check format types docs test test-slow test-gpu bench-gpu kernels

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## make .venv and install the project with its tools
	scripts/setup_env.sh all docs dev

check: setup  ## lint and formatting
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

format: setup  ## mend what lint and formatting can mend
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

types: setup  ## mypy, as pyproject.toml configures it
	.venv/bin/python -m mypy

docs: setup  ## the site in runs/site, with broken links as errors
	.venv/bin/python -m mkdocs build --strict

test:  ## the default tests: CPU, offline
	scripts/test.sh

test-slow:  ## the tests marked slow
	scripts/test.sh -m "slow and not gpu"

test-gpu:  ## the tests marked gpu, one process
	scripts/test.sh -m gpu -n 0

bench-gpu:  ## kernels on this GPU: parity, then the benchmarks, in 8 minutes
	scripts/bench_gpu.sh

kernels:  ## what the kernels take of a GPU, compiled without one
	.venv/bin/python kernels/aot/table.py --full
