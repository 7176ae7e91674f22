# Two commands do everything: `make demo` and `make test`. Both make .venv first, from requirements.txt.
PYTHON ?= python3.11
RANKS ?= 2
ARGS ?= --compile
export OMP_NUM_THREADS ?= 1
BIN = .venv/bin
RUN = $(BIN)/torchrun --nproc_per_node=$(RANKS)
MODELS = base ckpt/geneval.pt ckpt/ocr.pt ckpt/quality.pt merge=runs/demo/init.pt student=runs/demo/student.pt

.PHONY: demo test oracles teachers base reproduce

demo: .venv/done                  # stage 2 from the shipped teachers, then the table and the picture
	rm -rf runs/demo
	$(RUN) train_opd.py --teachers ckpt/*.pt --name demo
	$(RUN) eval.py --ckpts $(MODELS) --out runs/demo/eval

test: .venv/done
	$(BIN)/python -m pytest -q

oracles: .venv/oracles            # diffusers, peft, ...: what the tests of SD3.5's side compare with (skipped without)

teachers: .venv/done              # stage 1, from the shipped base (under an hour on two cores; resumes)
	$(RUN) train_grpo.py --tasks geneval --batch 192 --lr 2e-3 --iters 250
	$(RUN) train_grpo.py --tasks ocr --iters 225
	$(RUN) train_grpo.py --tasks quality --anchor --iters 50

reproduce: .venv/done             # the paper's findings with several seeds (about six hours on two cores; resumes; needs a C++ compiler, or ARGS=)
	$(BIN)/python reproduce.py --ranks $(RANKS) $(ARGS)

base: .venv/done                  # the tiny VAE and base, from nothing (resumes)
	$(RUN) tiny.py
	$(RUN) tiny.py --steps 8500 --batch 128 --lr 2e-3

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/oracles: .venv/done requirements-oracles.txt
	$(BIN)/python -m pip install -r requirements-oracles.txt
	$(BIN)/python -m pip install --no-deps open_clip_torch==3.3.0
	touch $@
