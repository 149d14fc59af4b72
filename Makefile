# One command per chore, the same here and in CI. Everything goes into .venv; nothing outside the checkout is touched.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CMAKE := $(firstword $(wildcard $(BIN)/cmake) cmake)
DYNAMO := ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
PROMPT ?= a red apple on a blue background

.PHONY: help setup demo host test test-all lint format demo-pair demo-eval demo-graphs demo-calibration results pictures bench beside-others ray triton clean

help:  ## Say what there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## Make the environment: this checkout, with all it takes to export and test.

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DYNAMO)
	touch $@

demo: setup  ## Export the demo pair's graphs, build its bundle, draw a picture and print its path.
	$(BIN)/hst-trt export --gpu cpu --pair demo
	$(BIN)/hst-trt build --gpu cpu --pair demo
	$(BIN)/hst-trt run --bundle demo-cpu --prompt "$(PROMPT)" --seed 7

host:  ## Build the C++ host in build/out/host: the library, its programs, and what tests use. Needs CMake, a C++ compiler, zlib.
	$(CMAKE) -S hst_trt/csrc --preset release -B build/out/host
	$(CMAKE) --build build/out/host --parallel $$(nproc)

test: setup lint  ## Everything that CI runs; at most 12 minutes on two cores.
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: setup lint  ## test, and what takes longer; the result is kept in docs/test-all.txt.
	scripts/test-all $(BIN)

lint: setup  ## Style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## Put the code into shape.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-pair: setup  ## Train the demo pair anew from its two npm packages: hours on two cores; goes on where it was stopped.
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=33554432 $(BIN)/python -m demo.make
	$(BIN)/python scripts/ship_demo_graphs.py
	$(BIN)/python -m demo.sheet

demo-eval: setup  ## Judge the demo pair that ships, three quarters of an hour on two cores; writes the model card's figures.
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=33554432 $(BIN)/python -m demo.evaluate

demo-graphs: setup  ## Export the demo pair's graphs anew into the package, after its weights have changed.
	$(BIN)/python scripts/ship_demo_graphs.py

demo-calibration: setup  ## Measure the demo pair's schedules for `plan --speedup`, an hour and a half on one core; goes on where it was stopped.
	$(BIN)/hst-trt build --gpu cpu --pair demo
	$(BIN)/hst-trt calibrate --bundle demo-cpu --prompts-file benchmarks/prompts/calibration.txt --schedules 400 --baseline-steps 28 --threads 1
	$(BIN)/python scripts/ship_demo_graphs.py engines/demo-cpu.hstb

results: setup host beside-others  ## Measure what docs/results.md shows, two hours on two cores; goes on where it was stopped.
	$(BIN)/python benchmarks/frontier.py
	$(BIN)/python benchmarks/planner_check.py
	$(BIN)/python benchmarks/cost_fits.py
	$(BIN)/python benchmarks/variants.py
	$(BIN)/python benchmarks/text_cache.py
	$(BIN)/python benchmarks/host_beside_python.py
	$(BIN)/python benchmarks/serve_load.py
	$(BIN)/python benchmarks/page.py

pictures: setup  ## Draw the pictures of the README anew; that of the server's page needs Chromium.
	$(BIN)/python scripts/readme_pictures.py
	$(BIN)/python scripts/page_picture.py

bench: setup  ## Time calls, whole runs and start-up, beside the cost model.
	$(BIN)/hst-trt build --gpu cpu --pair demo
	$(BIN)/python benchmarks/cost_model.py
	$(BIN)/python benchmarks/startup.py --bundle demo-cpu

OPTIMUM := build/out/optimum

$(OPTIMUM)/.ready: benchmarks/optimum.txt
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/optimum.txt
	touch $@

beside-others: setup $(OPTIMUM)/.ready  ## Time hst_trt beside diffusers, torch.compile and optimum-onnx (which gets its own environment), six minutes.
	$(BIN)/python benchmarks/beside_others.py --threads 1

RAY := build/out/ray

$(RAY)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[serve]" "ray[serve]==2.60.0"
	touch $@

ray: setup $(RAY)/.ready  ## Test the example for Ray Serve with two replicas; Ray gets its own environment, 0.7 GB.
	$(BIN)/python -m pytest -q tests/test_ray_serve.py

TRITON := build/out/triton

$(TRITON)/.ready: tests/triton.txt
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/triton.txt
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

triton: setup $(TRITON)/.ready  ## Load an exported repository in a real Triton (which gets its own environment) and ask it, two minutes.
	$(BIN)/python -m pytest -q tests/test_triton.py

clean:  ## Remove bundles and work files; pictures and the environment stay.
	rm -rf build/out dist engines/*.hstb engines/.*.hstb.*
