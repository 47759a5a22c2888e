# Needs only Python (3.11 to 3.13) and make: everything is installed into .venv beside this file.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow test-distributed notebooks chaos doctor coverage lint docs smoke-configs camvid bccd pennfudan sweep pretraining ablations overfit bench bench-gpu clean

demo: .venv/done  ## learn human pose from drawn scenes: a few minutes on a laptop's CPU
	$(PY) -m tasks.pose fit

test: .venv/done  ## the suite; test-slow, test-distributed and notebooks have the rest
	$(PY) -m pytest -n 2 --dist worksteal

notebooks: .venv/done  ## runs every notebook, small
	$(PY) -m pytest -n 2 -m notebooks

test-slow: .venv/done  ## what the suite leaves out of its ten minutes: every width beside timm, a real compiler, Ctrl-C
	$(PY) -m pytest -n 2 -m slow

test-distributed: .venv/done  ## two and three processes: every task, uneven data, a process that dies
	$(PY) -m pytest -m distributed tests/test_distributed.py

chaos: .venv/done  ## a run that is killed fifty times ends with the weights of one that is not (half an hour)
	$(PY) benchmarks/chaos.py

doctor: .venv/done  ## what this machine has, and whether a run of three steps works on it
	$(PY) -m tasks.doctor

coverage: .venv/done  ## the same with coverage of the three packages, whose tracing slows every call down
	$(PY) -m pytest -n 2 --cov=hrnet --cov=tasks --cov=datamodules --cov-report=term

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/docs  ## the documentation as pages in site/, every link and anchor in it checked
	.venv/bin/mkdocs build --strict

smoke-configs: .venv/done  ## build every config of the project and push one fake batch through it
	$(PY) -m pytest -q -m 'slow or not slow' tests/test_configs.py

DATA ?= data
camvid: .venv/done  ## train on CamVid below DATA (an hour on two CPU cores), then judge the best epoch on test, once
	$(PY) -m tasks.segmentation fit -c configs/segmentation/camvid.yaml --data.root $(DATA)/camvid
	$(PY) -m tasks.segmentation test -c configs/segmentation/camvid.yaml --data.root $(DATA)/camvid --ckpt_path best \
	    --model.evaluation.flip true --model.evaluation.scales '[0.75, 1.0, 1.25]'

bccd: .venv/done  ## train on the blood cells below DATA, then judge the best epoch on test, once
	$(PY) -m tasks.detection fit -c configs/detection/bccd.yaml --data.root $(DATA)/bccd
	$(PY) -m tasks.detection test -c configs/detection/bccd.yaml --data.root $(DATA)/bccd --ckpt_path best

pennfudan: .venv/done  ## train on the pedestrians below DATA, boxes and masks
	$(PY) -m tasks.detection fit -c configs/detection/pennfudan.yaml --data.root $(DATA)/pennfudan

sweep: .venv/bench  ## a sweep of configs/sweeps without an account: make sweep SWEEP=width ARGS='--jobs 2'
	$(PY) -m tasks.sweep configs/sweeps/$(SWEEP).yaml $(ARGS)

pretraining: .venv/done  ## what configs/sweeps/pretraining.yaml starts from: the embedded scenes, classified
	$(PY) -m tasks.classification fit --trainer.default_root_dir runs/pretraining --ckpt_path auto

ablations: .venv/bench  ## the paper's ablations on the embedded data, beside its numbers
	$(PY) benchmarks/ablations.py $(ARGS)

overfit: .venv/done  ## every detector learns eight pictures of DATA/coco-sample by heart
	$(PY) benchmarks/overfit.py $(DATA)/coco-sample

bench: .venv/bench  ## every benchmark on the CPU with the pictures of DATA/coco-sample: less than 20 minutes on two cores
	$(PY) benchmarks/forward.py
	$(PY) benchmarks/training.py
	$(PY) benchmarks/loader.py $(DATA)/coco-sample
	$(PY) benchmarks/evaluation.py
	$(PY) benchmarks/scaling.py $(DATA)/coco-sample
	$(PY) benchmarks/plots.py

bench-gpu: .venv/done  ## forward passes and training steps on a GPU, with the share of what it can do
	$(PY) -m hrnet.bench --device cuda --network w32 --compile
	$(PY) -m hrnet.bench --device cuda --network w32 --batch 64 --compile
	$(PY) benchmarks/training.py --device cuda

clean:  ## removes what the targets above made, but no runs: those are yours
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage *.egg-info build site

# uv installs in seconds what takes pip minutes; it is itself only a wheel. Compiled at once, the packages load in less than
# half the time, also where Python may not write bytecode (PYTHONDONTWRITEBYTECODE, read-only folders).
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --compile-bytecode --python $(PY) -c constraints.txt -e '.[dev]'
	touch $@

.venv/bench: .venv/done
	.venv/bin/uv pip install --quiet --compile-bytecode --python $(PY) -c constraints.txt -e '.[bench]'
	touch $@

.venv/docs: .venv/done
	.venv/bin/uv pip install --quiet --compile-bytecode --python $(PY) -c constraints.txt -e '.[docs]'
	touch $@
