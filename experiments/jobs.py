"""The plan: which job runs which command.

A job is a training run and the evaluation of its result. Some jobs only evaluate a checkpoint, or
the snapshots of another run. A job's name ends in -sN, where N is its seed. The teachers are the
shipped ones (ckpt/), except where the text says "second".

Parts:
    cost         the second teachers, trained like the first, with snapshots; and their students
    main         the models that the main table compares
    seesaw       other settings of GRPO on several rewards
    mar, cold, objectives, states, beyond      variants at half of the default's budget
    curves       evaluation of the snapshots of main and cost
    fixed        KL to the teachers at the same states for all (fixed_states.py)

A variant gets as many forward passes as the default (passes.py). The passes of a cold start by SFT
are not part of that budget. The main table and the cost table add them.
"""
import math
from dataclasses import dataclass

TASKS = ("geneval", "ocr", "quality")
TEACHERS = {task: f"ckpt/{task}.pt" for task in TASKS}
# The second teachers, which the part cost trains.
SECOND = {f"{task}-second": f"runs/rep-{task}-again-s1/adapter.pt" for task in TASKS}

# Forward passes of a whole distillation with its defaults (100 iterations of 64 images, 33 passes
# per image), and of one image in GRPO.
BUDGET = 100 * 64 * 33
GRPO_PASSES = 28
# Images that the three shipped teachers were trained on.
TEACHER_IMAGES = 250 * 192 + 225 * 96 + 50 * 96
# Number of images on which GRPO costs as much as those teachers and the distillation together.
WHOLE = TEACHER_IMAGES + BUDGET / GRPO_PASSES

# Estimated seconds on two CPU cores. Those of training are with --compile; without it they are
# multiplied by WITHOUT_COMPILE.
SECONDS_OPD = 200
SECONDS_SFT = 120                                       # of 300 iterations
SECONDS_GRPO_IMAGE = 16 / 1000
SECONDS_EVAL = 50                                       # of three tasks, on both splits
WITHOUT_COMPILE = 1.5


# ------------------------------------------------------------------ commands

# A rollout has several updates, and only in the first is the ratio 1. The paper's clip of 1e-4
# would stop the others. So a run turns clipping off, or makes one update per rollout.
NO_CLIP = "--clip 1"
# No anchor: its weight relative to the loss would differ from objective to objective.
ALONE = "--lam 0"
# A tenth of the default learning rate. The default is too high for a noisy policy gradient.
SLOW = "--lr 3e-4"
PG = "--objective pg"
SAMPLED = "--step-reward sampled"
FUTURE = "--credit future"
ODE = "--rollout ode"
FROM_SFT = "--init runs/rep-sft-s{seed}/student.pt"
RANK_48 = "--lora-r 48 --lora-alpha 48"
RANK_16 = "--lora-r 16 --lora-alpha 16"


def opd(options="", passes=33, budget=BUDGET, teachers=TEACHERS):
    """The command of stage 2, with as many iterations as the budget allows.

    passes: forward passes of one image; budget: forward passes of the whole run.
    """
    iters = round(budget / passes / 64)
    return f"train_opd.py --teachers {' '.join(teachers.values())} --iters {iters} {options}"


def half(options="", passes=33):
    """Stage 2 at half of the default's budget, where a slower variant is still behind."""
    return opd(options, passes, BUDGET / 2)


def mix(images, tasks=TASKS, options=""):
    """The command of one GRPO run on several rewards, with this number of images.

    For the results in the repository, every batch mixes the tasks, and each task has only its own
    reward. The released mix, now the default, alternates tasks and adds 0.2 of quality.
    """
    share = {"geneval": 3, "ocr": 1, "quality": 1}
    own = {"geneval": "geneval=0.5,geneval_strict=0.5", "ocr": "ocr", "quality": "quality"}
    rewards = " ".join(own[task] for task in tasks)
    ratio = " ".join(f"{task}={share[task]}" for task in tasks)
    iters = math.ceil(images / 192)
    return (f"train_grpo.py --tasks {' '.join(tasks)} --ratio {ratio} --mix batch "
            f"--reward {rewards} --batch 192 --lr 2e-3 --iters {iters} {options}")


def sft(options=""):
    """The command of SFT. The results in the repository have plain times, not the released ones."""
    teachers = " ".join(TEACHERS.values())
    return f"train_sft.py --teachers {teachers} --times plain {RANK_48} {options}"


# Part -> job -> its training command, where "{seed}" stands for the seed of the job.
TRAINED = {
    "cost": {
        "quality-again": "train_grpo.py --tasks quality --iters 50 --keep 5",
        "ocr-again": "train_grpo.py --tasks ocr --iters 225 --keep 25",
        "geneval-again":
            "train_grpo.py --tasks geneval --batch 192 --lr 2e-3 --iters 250 --keep 25",
        "opd-second": opd("--anchor quality --keep 5", teachers=SECOND),
    },
    "main": {
        "opd-merge": opd("--keep 5"),
        "sft": sft(),
        "opd-sft": opd(f"{FROM_SFT} --keep 5"),
        # SFT (off policy) with the compute of distillation.
        "sft-equal": sft("--samples 4320 --iters 650"),
        "mix-small": mix(BUDGET / GRPO_PASSES),
        "mix-whole": mix(WHOLE),
        "mix-whole-group": mix(WHOLE, options="--adv-std group"),
    },
    "seesaw": {
        # With --adv-std group, a task whose rewards differ little weighs as much as the others.
        "mix-group": mix(BUDGET / GRPO_PASSES, options="--adv-std group"),
        "mix-geneval-ocr": mix(48000, ("geneval", "ocr")),
    },
    "mar": {
        "half": half(),
        "half-lam0": half("--lam 0", passes=28),
        "half-lam0.1": half("--lam 0.1"),
        "half-lam0.5": half("--lam 0.5"),
    },
    "cold": {
        "half-sft": half(FROM_SFT),
        "half-none": half(f"--init none {RANK_48}"),
        "half-truncate": half(f"--init truncate {RANK_16}"),
        "half-factors": half("--init factors"),
    },
    "objectives": {
        "half-velocity-lam0": half(f"--objective velocity {ALONE}", passes=28),
        "half-released-lam0": half(f"--objective released {NO_CLIP} {ALONE}", passes=28),
        "half-slow-lam0": half(f"{ALONE} {SLOW}", passes=28),
        "half-pg-dense-slow-lam0": half(f"{PG} {NO_CLIP} {ALONE} {SLOW}", passes=28),
        "half-pg-dense-future-slow-lam0":
            half(f"{PG} {FUTURE} {NO_CLIP} {ALONE} {SLOW}", passes=28),
        "half-pg-sampled-slow-lam0": half(f"{PG} {SAMPLED} {NO_CLIP} {ALONE} {SLOW}", passes=28),
        "half-pg-sampled-future-slow-lam0":
            half(f"{PG} {SAMPLED} {FUTURE} {NO_CLIP} {ALONE} {SLOW}", passes=28),
        # The default learning rate, to see its effect on a policy gradient.
        "half-pg-dense-lam0": half(f"{PG} {NO_CLIP} {ALONE}", passes=28),
        "half-pg-sampled-lam0": half(f"{PG} {SAMPLED} {NO_CLIP} {ALONE}", passes=28),
        # As the paper prints it, with the anchor. With one update the ratio is 1, so the clip does
        # nothing.
        "half-paper": half(f"{PG} --updates 1"),
        "half-paper-slow": half(f"{PG} --updates 1 {SLOW}"),
    },
    "states": {
        "half-cps": half("--rollout cps"),
        # The same steps are supervised as by default, but the rollout has no noise.
        "half-ode": half(f"{ODE} --supervised 0 5"),
        "half-ode-all": half(ODE, passes=48),
        "half-all": half("--noisy 0 8", passes=48),
        "half-one":
            half(f"{ODE} --objective velocity --one --steps 16 --noisy 0 1", passes=21),
    },
    "beyond": {
        "half-extrapolate": half("--extrapolate 1.25", passes=38),
        "half-blend": half("--blend 0.1", passes=43),
    },
}
# Part -> job -> a checkpoint that is only evaluated.
READY = {
    "cost": {**SECOND, "merge-second": "runs/rep-opd-second-s{seed}/init.pt"},
    "main": {"base": "base", **TEACHERS, "merge": "runs/rep-opd-merge-s{seed}/init.pt"},
}
# Run -> the iterations whose snapshots the part curves evaluates.
SNAPSHOTS = {
    "quality-again": (5, 10, 20, 30, 40),
    "ocr-again": (25, 50, 100, 150, 200),
    "geneval-again": (25, 50, 100, 150, 200, 225),
    "opd-merge": (25, 50, 75),
    "opd-second": (25, 50, 75),
    "opd-sft": (25, 50, 75),
}
PARTS = [*TRAINED, "curves", "fixed"]


# ------------------------------------------------------------------ jobs


@dataclass
class Job:
    part: str
    seed: int
    checkpoints: dict                                   # label -> checkpoint to evaluate
    seconds: float                                      # estimated, on two cores
    command: tuple = ()                                 # of training; (): no training
    # Only for the evaluation of snapshots: the job that wrote them, and the tasks to evaluate.
    source: str = ""
    tasks: tuple = TASKS


def trained(name, part, seed, text, compile):
    """The Job that runs a training command (text) and evaluates its result."""
    run = f"rep-{name}-s{seed}"
    command = [*text.replace("{seed}", str(seed)).split(), "--seed", str(seed), "--name", run]
    result = f"runs/{run}/student.pt"
    if command[0] == "train_grpo.py":
        result = f"runs/{run}/adapter.pt"
        command += ["--out", result]
    if compile:
        command.append("--compile")
    seconds = SECONDS_EVAL + training_seconds(name, command)
    return Job(part, seed, {"it": result}, seconds, tuple(command))


def snapshots(run, seed):
    """The Job that evaluates the snapshots of a run. A teacher is evaluated only on its task."""
    teacher = run.endswith("again")
    file = "adapter" if teacher else "student"
    tasks = (run.removesuffix("-again"),) if teacher else TASKS
    shots = {str(it): f"runs/rep-{run}-s{seed}/{file}-{it}.pt" for it in SNAPSHOTS[run]}
    seconds = SECONDS_EVAL / 4 * len(shots) * len(tasks)
    return Job("curves", seed, shots, seconds, source=f"{run}-s{seed}", tasks=tasks)


def seeds_of(name, seeds, grpo_seeds):
    """The seeds with which the plan runs this job."""
    if name.endswith("again"):
        return [1]
    if name in ("half-pg-dense-lam0", "half-pg-sampled-lam0", "half-paper-slow"):
        return [0]
    if name in ("mix-whole", "mix-whole-group", "mix-group", "mix-geneval-ocr"):
        return grpo_seeds
    return seeds


def plan(seeds=(0, 1, 2), grpo_seeds=(0,), compile=False):
    """{name: Job}, in the order in which they run.

    grpo_seeds: the seeds of the long GRPO runs on several rewards.
    """
    jobs = {}
    for part in TRAINED:
        for name, text in TRAINED[part].items():
            for seed in seeds_of(name, seeds, grpo_seeds):
                jobs[f"{name}-s{seed}"] = trained(name, part, seed, text, compile)
        for name, path in READY.get(part, {}).items():
            for seed in seeds_of(name, seeds, grpo_seeds):
                checkpoint = path.replace("{seed}", str(seed))
                jobs[f"{name}-s{seed}"] = Job(part, seed, {"it": checkpoint}, SECONDS_EVAL)
    for run in SNAPSHOTS:
        for seed in seeds_of(run, seeds, grpo_seeds):
            jobs[f"curve-{run}-s{seed}"] = snapshots(run, seed)
    return jobs


def commands():
    """{job without its seed: its training command, with the last of its seeds}."""
    found = {}
    for name, job in plan().items():
        if job.command:
            found[name.rsplit("-s", 1)[0]] = job.command
    return found


def option(command, flag, default):
    """The integer after a flag of a command, or the default."""
    if flag not in command:
        return default
    return int(command[command.index(flag) + 1])


def training_seconds(name, command):
    """Estimated seconds of a training command on two cores."""
    iters = option(command, "--iters", 300)
    if command[0] == "train_grpo.py":
        seconds = iters * option(command, "--batch", 96) * SECONDS_GRPO_IMAGE
    elif command[0] == "train_sft.py":
        seconds = SECONDS_SFT * iters / 300
    elif name.startswith("half"):
        seconds = SECONDS_OPD / 2
    else:
        seconds = SECONDS_OPD
    if "--compile" not in command:
        seconds *= WITHOUT_COMPILE
    return seconds
