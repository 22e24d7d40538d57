# Every target installs into .venv first; only Python, make and git have to be there.
# Variables may hold spaces. FLAGS and RUNS are read by the shell: quote the paths in them that hold spaces.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO ?= demo
DATA ?= Dataset

.PHONY: install demo study report test lint docs bench clean

demo: $(READY)
	$(BIN)/python dataset/dataset_prep.py "$(DEMO)/data" --synthetic 480
	rm -rf "$(DEMO)/unet"
	$(BIN)/python unet/train.py --data "$(DEMO)/data" --out "$(DEMO)/unet" --device cpu \
		--image-size 96 --base-channels 16 --batch-size 8 --lr 1e-3 --epochs 18 --patience 0
	$(BIN)/python unet/test.py --data "$(DEMO)/data" --checkpoint "$(DEMO)/unet/best.pt" --device cpu

# The whole study on DATA; more flags of study/run.py in FLAGS.
study: $(READY)
	$(BIN)/python study/run.py --data "$(DATA)" $(FLAGS)

# Tables and figures of tested runs: make report RUNS="runs/unet 'runs/second unet'"
report: $(READY)
	$(BIN)/python study/report.py $(RUNS) $(FLAGS)

install: $(READY)

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# docs/flags.md from the scripts' Configs.
docs: $(READY)
	$(BIN)/python docs/make_flags.py

bench: $(READY)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv "$(DEMO)" .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt constraints.txt
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
