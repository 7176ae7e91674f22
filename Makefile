# Two commands do everything: `make demo` and `make test`. Both make .venv first, from pyproject.toml.
PYTHON ?= python3.11
RANKS ?= 2
ARGS ?= --compile
export OMP_NUM_THREADS ?= 1
BIN = .venv/bin
RUN = $(BIN)/torchrun --nproc_per_node=$(RANKS)
MODELS = base ckpt/*.pt merge=runs/demo/init.pt student=runs/demo/student.pt
# The base before guidance is folded into it.
GUIDED = runs/tiny/guided.safetensors
# What the teachers of GenEval and OCR share.
LONG = --batch 192 --lr 2e-3 --decay 0.4
# The dependencies of an extra, or of the project itself: tomllib reads them from pyproject.toml.
DEPS = $(PYTHON) -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*(p['optional-dependencies'][sys.argv[1]] if sys.argv[1:] else p['dependencies']))"

.PHONY: demo test lint oracles teachers base reproduce doctor speedrun bench

demo: .venv/done                  # stage 2 from the shipped teachers, then the table and the picture
	rm -rf runs/demo
	$(RUN) train_opd.py --teachers ckpt/*.pt --iters 90 --name demo
	$(RUN) eval.py --ckpts $(MODELS) --per-task 180 --steps 10 --rows 4 --out runs/demo/eval

test: .venv/done
	$(BIN)/python -m pytest -q

lint: .venv/lint                  # widths, names, imports; the rules are in pyproject.toml
	$(BIN)/ruff check .

oracles: .venv/oracles            # diffusers, peft, ...: what some tests compare with (else skipped)

teachers: .venv/done              # stage 1, from the shipped base (27 minutes on two cores; resumes)
	$(RUN) train_grpo.py --tasks geneval $(LONG) --iters 250 --out ckpt/geneval.pt
	$(RUN) train_grpo.py --tasks ocr $(LONG) --iters 80 --out ckpt/ocr.pt
	$(RUN) train_grpo.py --tasks preference --lr 1e-3 --iters 50 --out ckpt/preference.pt
	$(RUN) train_grpo.py --tasks quality --anchor --lr 1e-3 --iters 30 --out ckpt/quality.pt

doctor: .venv/done               # check the shipped model, teachers and rewards, one line a check
	$(BIN)/python -m experiments.doctor --teachers ckpt/*.pt

reproduce: .venv/done             # the paper's findings with several seeds (nineteen hours on two cores)
	$(BIN)/python -m experiments.reproduce --ranks $(RANKS) $(ARGS)

speedrun: .venv/done              # the fewest passes to 95% of the teachers' gains (docs/speedrun.md)
	$(BIN)/python -m experiments.speedrun four-steps --ranks $(RANKS) --out runs/speedrun

bench: .venv/oracles              # speed, memory, FLOPs: a table and results/bench-MACHINE.json
	$(BIN)/python -m experiments.bench

base: .venv/done                  # VAE and base from nothing, then guidance is folded in (resumes)
	$(RUN) -m worlds.tiny_base --out $(GUIDED)
	$(RUN) train_opd.py --name fold --model $(GUIDED) --init none --full --lr 6e-4 --lam 0 \
		--teachers geneval=$(GUIDED) ocr=$(GUIDED) preference=$(GUIDED) quality=$(GUIDED) \
		--ratio geneval=3 ocr=1 preference=1 quality=1 --batch 64 --steps 8 --noisy 0 5 --iters 150 \
		--match fold --guidance 5 --objective velocity --supervised 0 8
	$(BIN)/python -m checkpoints runs/fold/student.safetensors --model $(GUIDED) --to merged \
		--out ckpt/tiny.safetensors

.venv/done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $$($(DEPS))
	touch $@

.venv/lint: .venv/done
	$(BIN)/python -m pip install $$($(DEPS) lint)
	touch $@

.venv/oracles: .venv/done
	$(BIN)/python -m pip install $$($(DEPS) oracles)
	$(BIN)/python -m pip install --no-deps open_clip_torch==3.3.0
	touch $@
