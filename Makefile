# `make help` lists the targets. Everything is installed by the targets themselves: see scripts/setup.sh.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cluster test test-cluster lint format lock settings manifests image bench flavors clean

python := .venv/bin/python
export PYTHONDONTWRITEBYTECODE :=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what the other targets need: Debian packages (as root) and .venv
	@scripts/setup.sh test

demo: ## register, publish and run two real models, with real servers, from nothing
	@scripts/setup.sh demo
	@$(python) -m examples.demo

demo-cluster: ## the same in a Kubernetes that is started for it: from a tag to a prediction (as root)
	@scripts/setup.sh cluster
	@$(python) -m scripts.cluster build >/dev/null
	@$(python) -m examples.demo_cluster

test: ## run all other tests, with coverage before the summary (PYTEST_ADDOPTS is respected)
	@scripts/setup.sh test
	@scripts/test.sh

test-cluster: ## run the tests that need a Kubernetes, on one that is built and started for them (as root)
	@scripts/setup.sh cluster
	@scripts/test.sh cluster

lint: ## check style, types, import contracts and generated documents
	@scripts/setup.sh python
	@scripts/lint.sh

format: ## format the code, and fix what ruff can fix
	@scripts/setup.sh python
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .

lock: ## regenerate the lock files (UPGRADE=1 takes the newest versions)
	@scripts/lock.sh

settings: ## write docs/settings.md from the code
	@scripts/setup.sh python
	@$(python) -m scripts.settings_table

manifests: ## write k8s/job.yaml and k8s/cronjob.yaml from the base and the overlay with Dockerfiles
	@scripts/setup.sh python
	@$(python) -m scripts.manifests

image: ## build the builder image, and report its size (KANIKO_IMAGE=scratch leaves out the engine)
	@scripts/image.sh

bench: ## measure the claims about speed, and write docs/benchmarks.md
	@scripts/setup.sh test
	@$(python) -m benchmarks

flavors: ## publish, run and query a model of every MLflow flavor, and write the results into docs/flavors.md
	@scripts/setup.sh test
	@$(python) -m scripts.flavors

clean: ## remove generated files from this checkout; caches outside it stay
	rm -rf .venv .demo .cache .coverage .coverage.* htmlcov dist .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
