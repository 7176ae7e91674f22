"""
Watching a run: how good is the policy on held-out prompts, while it trains?

    watch = Watch(cfg, model, world, tasks, rank, world_size, device)
    log({"iter": it + 1, **row, **watch(policy, average, it + 1)}, watch.pictures)

Every --eval-every iterations, --eval-images held-out prompts of each task are drawn with the ODE,
from noise that never changes: the first noise of eval.py with its --seed 0, and its first prompts.
(Of a folder of prompts they are spread evenly, so eval.py may have others.)
"""
import numpy as np
import torch

import scorers
from plumbing import cli, dist
from plumbing.log import import_tracker
from rewards import check_rewards, score
from sampler import draw, schedule

SHOWN = 4                # pictures of each task for the tracker


def check_watch(cfg, world, tasks):
    """ValueError if the options do not fit. Returns the tasks that can be watched.

    These have held-out prompts, and a score of the world's.
    """
    import_tracker(cfg.track)
    if not cfg.eval_every:
        return []
    cli.positive(cfg, "eval_images", "eval_steps")
    able = world.tasks_with_prompts("eval")
    watched = [task for task in tasks if task in able and task in world.score]
    if not watched:
        raise ValueError(f"--eval-every {cfg.eval_every}: none of {', '.join(tasks)} has held-out "
                         "prompts and a score of its own; expected such a task, or --eval-every 0")
    return watched


def tag_rows(metas, world):
    """GenEval prompts -> {tag: the indices of its prompts}, in the order of the world."""
    rows = {tag: [i for i, meta in enumerate(metas) if meta["tag"] == tag] for tag in world.tags}
    return {tag: its for tag, its in rows.items() if its}


class Watch:
    """Draws and scores held-out prompts of the tasks.

    texts: the prompts, for the run's text.prepare.
    pictures: {name: (image, caption)} of the last call, on rank 0, as plumbing.log.Log takes them.
    """

    def __init__(self, cfg, model, world, tasks, rank, world_size, device):
        self.cfg = cfg
        self.model = model
        self.world = world
        self.rank = rank
        self.world_size = world_size
        watched = check_watch(cfg, world, tasks)
        self.times = schedule(cfg.eval_steps).to(device)
        self.metas = {task: world.eval_prompts(task, cfg.eval_images) for task in watched}
        self.texts = [meta["prompt"] for metas in self.metas.values() for meta in metas]
        self.pictures = {}
        if not watched:
            return
        left_out = [task for task in tasks if task not in watched]
        if left_out and rank == 0:
            print(f"--eval-every: leaves out {', '.join(left_out)}, which lacks held-out prompts "
                  "or a score of its own")
        specs = {task: {world.score[task]: 1.0} for task in watched}
        check_rewards(specs, model, world, "eval", device)
        scorers.offload()

    def __call__(self, policy, average, it):
        """{"eval_TASK": mean score} after iteration it, or {} if it is not time yet.

        All ranks have to call it, and get the same numbers.
        """
        self.pictures = {}
        if not self.metas or it % self.cfg.eval_every:
            return {}
        with average.applied():
            row = {f"eval_{task}": self.mean_score(policy, task) for task in self.metas}
        scorers.offload()                # they are not needed for a while, and memory is
        return row

    def mean_score(self, policy, task):
        """The mean score of a task's images: of GenEval first the mean of each tag, as eval.py."""
        metas = self.metas[task]
        # Every rank needs equally many forward passes (FSDP). So some images are drawn twice.
        share = -(-len(metas) // self.world_size)
        mine = torch.arange(self.rank * share, (self.rank + 1) * share) % len(metas)
        values = np.concatenate([self.scores(policy, task, part.tolist())
                                 for part in mine.split(self.cfg.micro)])
        values = dist.gather(torch.from_numpy(values).to(self.times.device)).cpu().numpy()
        rows = tag_rows(metas, self.world) if task == "geneval" else {}
        means = [values[its].mean() for its in rows.values() or [range(len(metas))]]
        return float(np.mean(means))

    def scores(self, policy, task, part):
        """Draw and score the prompts number part (b): (b,) scores, as reported."""
        metas = [self.metas[task][j] for j in part]
        keys = [(0, "eval", task, j) for j in part]
        prompts = [meta["prompt"] for meta in metas]
        images = self.model.images(draw(self.model, policy, prompts, keys, self.times,
                                        self.cfg.amp))
        name = self.world.score[task]
        values = score({name: 1.0}, images, metas, self.world)[name]
        for j, image, meta, value in zip(part, images, metas, values):
            if self.rank == 0 and j < SHOWN:
                caption = f"{meta['prompt']} ({value:.2f})"
                self.pictures[f"eval_{task}/{j}"] = (image.cpu(), caption)
        return values
