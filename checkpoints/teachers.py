"""Checkpoints at work: the teachers of a run, read and checked as a set; a model to draw with."""
import torch
from torch import nn

from checkpoints.formats import read, split_label
from plumbing.files import fingerprint
from sampler import Policy

# The student's adapter and the base have these names, so no task can.
TAKEN = ("student", "base")


def check_side(whole, side, spec):
    """ValueError unless a whole teacher can see latents of this side. It may not be the base's."""
    patch = whole.cfg.patch
    if side % patch or side // patch > whole.cfg.pos_max:
        raise ValueError(f"{spec}: is a transformer with patches of {patch} and a position table "
                         f"of {whole.cfg.pos_max} x {whole.cfg.pos_max}, into which latents of "
                         f"{side} x {side} do not fit")


def read_teachers(specs, net, tasks, side=None):
    """{task: teacher} of --teachers. ValueError if a file or the set of them will not do.

    specs: "PATH" or "TASK=PATH" each; net: the base; tasks: those that prompts can be routed to;
    side: of the latents, if it is known.
    """
    if not specs:
        raise ValueError("--teachers: got none, expected adapters written by train_grpo.py, "
                         "e.g. --teachers ckpt/*.pt")
    teachers = {}
    paths = {}
    for spec in specs:
        label, path = split_label(spec)
        teacher = read(path, net, label)
        task = teacher["task"]
        if task not in tasks:
            hint = "" if task else "; say TASK=PATH"
            raise ValueError(f"{spec}: is trained on '{task}', expected one of "
                             f"{', '.join(tasks)}, to which prompts can be routed{hint}")
        # An adapter has the name of its task, in a ParameterDict beside the student's.
        if "." in task or task in TAKEN or hasattr(nn.ParameterDict(), task):
            raise ValueError(f"{spec}: '{task}' cannot be the name of an adapter; expected a task "
                             "of another name, without a dot")
        if task in teachers:
            raise ValueError(f"{path}: is a second teacher of '{task}', after {paths[task]}; "
                             "a prompt is routed to one")
        if "net" in teacher and side:
            check_side(teacher["net"], side, spec)
        teachers[task] = teacher
        paths[task] = path
    return teachers


def attach(teachers, net):
    """Add the teachers that are adapters to net, each under the name of its task.

    Returns {task: fingerprint} of all of them, by which a resumed run knows its teachers.
    """
    known = {}
    for task, teacher in teachers.items():
        if "net" in teacher:
            known[task] = teacher["net"].fingerprint
        else:
            net.add_adapter(task, teacher["r"], teacher["alpha"], teacher["tensors"])
            scale = torch.tensor(teacher["alpha"] / teacher["r"])
            known[task] = fingerprint({**teacher["tensors"], "scale": scale})
    return known


def policy_on(net, found, name, guidance=1.0, both=False):
    """The Policy of a checkpoint that was read: its own net, or net with its adapter `name`."""
    if "net" in found:
        return Policy(found["net"], None, guidance, both)
    return Policy(net, name, guidance, both)


def policy_of(path, net, name, guidance=1.0):
    """The Policy of a checkpoint, to draw with it. ValueError as read gives.

    path: of any form, or "base". net: the base; an adapter is added to it under `name`.
    """
    if path == "base":
        return Policy(net, None, guidance)
    found = read(path, net)
    if "net" not in found:
        net.add_adapter(name, found["r"], found["alpha"], found["tensors"])
    return policy_on(net, found, name, guidance)


def find_anchor(name, lam, teachers):
    """The anchor of all prompts (MAR): a teacher's task, "base", or None without one (lam = 0).

    It is the one that --anchor names, or else the teacher that was trained as the anchor.
    """
    anchors = [*teachers, "base"]
    if name and (name not in anchors or not lam):
        raise ValueError(f"--anchor {name}: expected the task of a teacher or the base "
                         f"({', '.join(anchors)}), and --lam > 0; got --lam {lam}")
    if not lam:
        return None
    if name:
        return name
    marked = [task for task, teacher in teachers.items() if teacher["anchor"]]
    if len(marked) != 1:
        raise ValueError(f"{len(marked)} of the teachers are marked as the anchor; expected one: "
                         "say --anchor TASK, --anchor base, or --lam 0 for none")
    return marked[0]
