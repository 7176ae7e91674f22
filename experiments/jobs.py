"""The plan: which job runs which command.

A job is a training run and the evaluation of its result. Some jobs only evaluate a checkpoint, or
the snapshots of another run. A job's name ends in -sN, where N is its seed. A seed stands for all
that is drawn: seed N has its own teachers, its own training and its own noise in the evaluation.

Parts:
    teachers     stage 1, for each reward alone
    main         the models that the main table compares
    seesaw       rewards added one by one to GRPO; each task has the GenEval teacher's passes
    objectives   the losses of stage 2 side by side, with all of its iterations
    controls     teachers that are wrong (controls.py), from the same start, with half of its
                 iterations, which reach the score of all
    states, mar, cold, targets      variants, with a quarter, where a slower one is still behind
    early        stage 2 from teachers that were stopped half-way: can a student surpass them?
    curves       evaluation of the snapshots of teachers and of main

The teachers of seed 0 are the shipped ones, ckpt/TASK.pt. Those of seed N go to ckpt/N/TASK.pt.
"""
from dataclasses import dataclass

import train_opd
from experiments.passes import passes

TASKS = ("geneval", "ocr", "preference", "quality")
# The tasks whose prompts are taught by their own teacher. The teacher of quality only anchors.
ROUTED = ("geneval", "ocr", "preference")
# task -> the job that trains its teacher.
TEACHER_JOBS = {task: f"teacher-{task}" for task in TASKS}
# The shipped teachers, of seed 0.
TEACHERS = {task: f"ckpt/{task}.pt" for task in TASKS}

# Estimated seconds on two CPU cores: of a million forward passes with --compile, of the start of a
# training run, and of an evaluation of four tasks on both splits.
SECONDS_MILLION = 700
SECONDS_START = 75
SECONDS_EVAL = 90
WITHOUT_COMPILE = 1.5                                   # training then takes so many times as long
# Compiling takes a minute. So a run that trains for fewer seconds than these is not compiled.
COMPILE_FROM = 300


def teacher_file(task, seed):
    """The shipped teachers have seed 0. Those of other seeds lie in a folder of their own."""
    return f"ckpt/{task}.pt" if seed == 0 else f"ckpt/{seed}/{task}.pt"


# ------------------------------------------------------------------ commands
# "{seed}" stands for the job's seed, "{teachers}" for its teachers, "{ocr}" for one of them.


def fill(text, seed):
    files = {task: teacher_file(task, seed) for task in TASKS}
    return text.format(seed=seed, teachers=" ".join(files.values()), **files)


# What GRPO on GenEval, on OCR and on several rewards share. The rate falls at the end, since
# otherwise the noise of the steps stops GenEval's teacher (docs/tiny.md).
LONG = "--batch 192 --lr 2e-3 --decay 0.4"
GRPO = {
    "geneval": f"train_grpo.py --tasks geneval {LONG} --iters 250 --keep 25",
    "ocr": f"train_grpo.py --tasks ocr {LONG} --iters 80 --keep 8",
    "preference": "train_grpo.py --tasks preference --lr 1e-3 --iters 50 --keep 5",
    "quality": "train_grpo.py --tasks quality --anchor --lr 1e-3 --iters 30 --keep 3",
}
OPD = "train_opd.py --teachers {teachers}"
# The best of nine merges, by training prompts (results/trials/merges.md). From there, stage 2 has
# the best of four settings.
SUM = "--merge geneval=0.75 ocr=0.75 preference=0.75 quality=0.75"
SFT = "train_sft.py --teachers {teachers}"
# Forward passes: of stage 2, and of stage 1 and 2 together.
BUDGET = passes(fill(OPD, 0).split())
WHOLE = sum(passes(command.split()) for command in GRPO.values()) + BUDGET
SEESAW = passes(GRPO["geneval"].split())


def fitted(command, budget):
    """The command with as many iterations as the budget of forward passes allows."""
    one = passes([*fill(command, 0).split(), "--iters", "1"])
    return f"{command} --iters {round(budget / one)}"


HALF = f"--iters {train_opd.Config.iters // 2}"
SHORT = f"--iters {train_opd.Config.iters // 4}"


def short(options=""):
    """Stage 2 with a quarter of its iterations."""
    return f"{OPD} {SHORT} {options}".strip()


def mix(tasks, budget, options=""):
    """GRPO on several rewards in one run, with the settings of GenEval's teacher.

    As released, each task has 0.8 of its own reward and 0.2 of quality.
    """
    command = f"train_grpo.py --tasks {' '.join(tasks)} {LONG} {options}"
    return fitted(command.strip(), budget)


FROM_SFT = "--init runs/rep-sft-s{seed}/student.pt"
# No anchor: its weight relative to the loss would differ from objective to objective.
ALONE = f"{OPD} --lam 0"
# Several updates of one rollout would be stopped by the paper's clip of 1e-4.
PG = f"{ALONE} --objective pg --clip 1 --group 4"
# A tenth of the KL's rate, with which a policy gradient breaks (alone-sampled-faster).
SLOW = "--lr 3e-4"
# Teachers of a control lie in a folder of their own; the start and the anchor are the true ones.
CONTROLS = "runs/rep-controls-s{seed}"
MAKE_CONTROLS = f"-m experiments.controls {{teachers}} --out {CONTROLS}"
# The prompts of a mix come in the shares of stage 2.
SHARES = "--ratio geneval=3 ocr=1 preference=1"
# What a mix of more rewards has for GenEval, for a run on GenEval alone.
OF_A_MIX = "--reward geneval=0.4,geneval_strict=0.4,quality=0.2"
# As large an adapter as the merge has.
RANK = "--lora-r 64 --lora-alpha 64"
# Snapshots with 0.4 to 0.7 of their teachers' gains, by the rewards in training (seed 0).
EARLY = {"geneval": 75, "ocr": 8, "preference": 15}
HALF_WAY = " ".join(f"runs/rep-{TEACHER_JOBS[task]}-s{{seed}}/adapter-{it}.pt"
                    for task, it in EARLY.items())


def control(kind):
    """Stage 2 from the true start, with the wrong, shuffled or noised teachers of its tasks."""
    files = " ".join(f"{CONTROLS}/{kind}-{task}.pt" for task in ROUTED)
    return (f"train_opd.py --teachers {files} {{quality}} --anchor quality "
            f"--init runs/rep-opd-s{{seed}}/init.pt {HALF}")


# Part -> job -> its training command.
TRAINED = {
    "teachers": {TEACHER_JOBS[task]: GRPO[task] for task in TASKS},
    "main": {
        "opd": f"{OPD} --keep 15",
        # Half the rate scored higher on training prompts (results/trials/stage-2.md).
        "opd-slow": f"{OPD} --lr 1.5e-3",
        "opd-velocity": f"{OPD} --objective velocity",
        "opd-sum": f"{OPD} {SUM} --objective velocity --lr 1e-3",
        "sft": SFT,
        "sft-merge": f"{SFT} --init merge",
        "opd-sft": f"{OPD} {FROM_SFT} --keep 15",
        # With three times the passes of stage 2; and as many pictures, each the best of eight.
        "sft-long": f"{SFT} --samples 4000 --iters 550",
        "sft-best": f"{SFT} --samples 4000 --iters 550 --best 8",
        "mix": mix(ROUTED, WHOLE, SHARES),
        "mix-batch": mix(ROUTED, WHOLE, f"{SHARES} --mix batch --adv-std group"),
        "mix-rank": mix(ROUTED, WHOLE, f"{SHARES} {RANK}"),
    },
    # Tasks take turns, so every run sees the same number of GenEval's images.
    "seesaw": {
        "seesaw-1": mix(ROUTED[:1], SEESAW, OF_A_MIX),
        "seesaw-2": mix(ROUTED[:2], 2 * SEESAW),
        "seesaw-3": mix(ROUTED, 3 * SEESAW),
    },
    "objectives": {
        "alone-kl": ALONE,
        "alone-kl-slow": f"{ALONE} --lr 1.5e-3",
        "alone-velocity": f"{ALONE} --objective velocity",
        "alone-dance": f"{ALONE} --objective velocity --rollout ode --one",
        "alone-released": f"{ALONE} --objective released --clip 1",
        "alone-sampled": f"{PG} {SLOW} --step-reward sampled",
        "alone-sampled-fast": f"{PG} --lr 1e-3 --step-reward sampled",
        "alone-sampled-faster": f"{PG} --lr 3e-3 --step-reward sampled",
        "alone-sampled-future": f"{PG} {SLOW} --step-reward sampled --credit future",
        "alone-dense": f"{PG} {SLOW}",
    },
    "states": {
        "short": short(),
        "short-teacher": short("--states teacher"),
        "short-pictures": short("--states pictures"),
        "short-ode": short("--rollout ode --supervised 1 3"),
    },
    "mar": {
        "short-lam0": short("--lam 0"),
        "short-lam0.1": short("--lam 0.1"),
        "short-lam0.5": short("--lam 0.5"),
        "short-base": short("--anchor base"),
    },
    "cold": {
        "short-none": short(f"--init none {RANK}"),
        # The merge has the anchor in it. So here is a start without it, and no anchor either.
        "short-none-lam0": short(f"--init none {RANK} --lam 0"),
        "short-sft": short(FROM_SFT),
        "short-factors": short("--init factors"),
    },
    "targets": {
        "short-extrapolate": short("--extrapolate 1.25"),
        "short-blend": short("--blend 0.1"),
    },
    "controls": {
        "half": f"{OPD} {HALF}",
        **{f"half-{kind}": control(kind) for kind in ("wrong", "shuffled", "noised")},
    },
    "early": {"opd-early": f"train_opd.py --teachers {HALF_WAY} {{quality}}"},
}
# Part -> job -> a checkpoint that is only evaluated.
READY = {
    "main": {"base": "base", "merge": "runs/rep-opd-s{seed}/init.pt",
             "merge-sum": "runs/rep-opd-sum-s{seed}/init.pt"},
}
# Run -> the iterations whose snapshots the part curves evaluates.
SNAPSHOTS_AT = {
    "teacher-geneval": (75, 150, 200, 225),
    "teacher-ocr": (8, 16, 32, 48, 64),
    "teacher-preference": (5, 15, 25, 35, 45),
    "teacher-quality": (3, 6, 12, 18, 24),
    "opd": (15, 30, 60, 90, 120),
    "opd-sft": (15, 30, 60, 90, 120),
}
PARTS = [*TRAINED, "curves"]


# ------------------------------------------------------------------ jobs


@dataclass
class Job:
    part: str
    seed: int
    checkpoints: dict                                   # label -> checkpoint to evaluate
    seconds: float                                      # estimated, on two cores
    command: tuple = ()                                 # of training; (): no training
    before: tuple = ()                                  # what to run before it, if anything
    # Only for the evaluation of snapshots: the job that wrote them, and the tasks to evaluate.
    source: str = ""
    tasks: tuple = TASKS


def trained(name, part, seed, text, compile):
    """The Job that runs a training command (text) and evaluates its result."""
    run = f"rep-{name}-s{seed}"
    command = [*fill(text, seed).split(), "--seed", str(seed), "--name", run]
    result = f"runs/{run}/student.pt"
    if command[0] == "train_grpo.py":
        result = f"runs/{run}/adapter.pt"
        if part == "teachers":
            result = teacher_file(name.removeprefix("teacher-"), seed)
        command += ["--out", result]
    seconds = SECONDS_MILLION * passes(command) / 1e6
    if compile and seconds > COMPILE_FROM:
        command.append("--compile")
    else:
        seconds *= WITHOUT_COMPILE
    seconds += SECONDS_START
    before = fill(MAKE_CONTROLS, seed).split() if CONTROLS in text else ()
    return Job(part, seed, {"it": result}, SECONDS_EVAL + seconds, tuple(command), tuple(before))


def snapshots(run, seed):
    """The Job that evaluates the snapshots of a run. A teacher is evaluated only on its task."""
    teacher = run.startswith("teacher-")
    file = "adapter" if teacher else "student"
    tasks = (run.removeprefix("teacher-"),) if teacher else TASKS
    shots = {str(it): f"runs/rep-{run}-s{seed}/{file}-{it}.pt" for it in SNAPSHOTS_AT[run]}
    seconds = SECONDS_EVAL / 5 * len(shots) * len(tasks)
    return Job("curves", seed, shots, seconds, source=f"{run}-s{seed}", tasks=tasks)


def plan(seeds=(0, 1, 2), compile=False):
    """{name: Job}, in the order in which they run."""
    jobs = {}
    for part in TRAINED:
        for name, text in TRAINED[part].items():
            for seed in seeds:
                jobs[f"{name}-s{seed}"] = trained(name, part, seed, text, compile)
        for name, path in READY.get(part, {}).items():
            for seed in seeds:
                jobs[f"{name}-s{seed}"] = Job(part, seed, {"it": fill(path, seed)}, SECONDS_EVAL)
    for run in SNAPSHOTS_AT:
        for seed in seeds:
            jobs[f"curve-{run}-s{seed}"] = snapshots(run, seed)
    return jobs


def commands():
    """{job without its seed: its training command, with the last of its seeds}."""
    found = {}
    for name, job in plan().items():
        if job.command:
            found[name.rsplit("-s", 1)[0]] = job.command
    return found
