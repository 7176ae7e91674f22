"""A moving average of the weights that learn (EMA). It is what a run saves and evaluates."""
import contextlib

import torch

from plumbing.files import shapes_of
from plumbing.state import check_tensors, learning, states, weights


class Average:
    """After every `every` optimiser steps: average += (1 - decay) (weights - average).

    Early on the decay is smaller, n / (n + 9) after n steps (in flow_grpo/ema.py n is one more).
    With decay 0 there is no average, and nothing here does anything.
    net: after plumbing.dist.distribute; saved: the state of a stopped run, or None.
    """

    def __init__(self, net, decay, every, saved=None):
        self.net = net
        self.decay = decay
        self.every = every
        self.steps = 0
        if decay and saved:
            self.steps = saved["average"]["steps"]
            check_tensors(shapes_of(learning(net)), saved["average"]["weights"], saved["path"],
                          "average.")
            # The net holds the average for a moment. plumbing.state.restore then sets the weights.
            dcp, _, partial = states()
            dcp.set_model_state_dict(net, saved["average"]["weights"], options=partial)
        self.params = list(learning(net).values()) if decay else []
        self.means = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def step(self):
        """Call this after every optimiser step."""
        self.steps += 1
        if self.steps % self.every == 0:
            decay = min(self.decay, self.steps / (self.steps + 9))
            for mean, p in zip(self.means, self.params):
                mean.lerp_(p, 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchange the weights and their averages."""
        for mean, p in zip(self.means, self.params):
            kept = p.clone()
            p.copy_(mean)
            mean.copy_(kept)

    @contextlib.contextmanager
    def applied(self):
        """Inside a with statement, the net has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state(self):
        """What the state of a run keeps: {"steps", "weights"}, or None. Every rank has to call."""
        if not self.decay:
            return None
        with self.applied():
            mean = {name: tensor.clone() for name, tensor in weights(self.net).items()}
        return {"steps": self.steps, "weights": mean}
