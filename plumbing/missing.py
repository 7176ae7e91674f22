"""Missing ranks: who is stuck or dead when the ranks wait for each other in vain.

Each rank says in the store how far it is (begin). The store is where the ranks found each other
(plumbing.dist.open_store). An exchange fails when a rank is dead, or does not come within the
time-out. The ranks that see it fail say so in the store. Those that do not say so are missing.
"""
import contextlib
import os
import socket
import sys
import threading
import time

import torch.distributed as dist

# Seconds in which all ranks that are alive see that an exchange failed: its connections are closed.
GRACE = 3.0
# Seconds after which a store that does not answer is itself lost, with the rank that keeps it.
STORE = 10.0


class Roll:
    """What this rank tells the others, and what it can say of them.

    store: of torch.distributed. A store that cannot be reached is not tried again.
    """

    def __init__(self, store, rank, world_size):
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.exchanges = 0
        self.iteration = 0              # of the last update, counted from 1
        self.began = time.monotonic()
        self.usual = sys.excepthook     # torch's, which says the rank of a traceback
        store.set(f"who-{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.begin("start")

    def begin(self, what):
        """Say that this rank begins an exchange. Measured: 5 microseconds."""
        if self.store is None:
            return
        self.exchanges += 1
        self.began = time.monotonic()
        where = f"exchange {self.exchanges} ({what}; last update: iteration {self.iteration})"
        try:
            self.store.set(f"at-{self.rank}", where)
        except dist.DistError:          # torchrun, which keeps it, was killed
            self.store = None

    def look(self, waited, answer):
        """Fill answer: {"alive": {rank that saw an exchange fail: seconds that it waited},
        rank: [who, where it is]}."""
        store = self.store
        store.set(f"alive-{self.rank}", f"{waited:.0f}")
        ranks = range(self.world_size)
        until = time.monotonic() + GRACE
        alive = [self.rank]
        while len(alive) < self.world_size and time.monotonic() < until:
            time.sleep(0.1)
            alive = [rank for rank in ranks if store.check([f"alive-{rank}"])]
        for rank in ranks:
            answer[rank] = [store.get(f"{key}-{rank}").decode() for key in ("who", "at")]
        answer["alive"] = {rank: store.get(f"alive-{rank}").decode() for rank in alive}

    def explain(self, error):
        """One line about an exchange that failed. Empty where a lower rank says it."""
        waited = time.monotonic() - self.began
        answer = {}
        # In a thread, because nothing ends a call to a store whose process is stopped.
        thread = threading.Thread(target=ignoring, args=(self.look, waited, answer),
                                  daemon=True)
        thread.start()
        thread.join(GRACE + STORE)
        if "alive" not in answer:
            return (f"an exchange of rank {self.rank} failed after {waited:.0f} s, and the store "
                    "cannot be reached: torchrun, or without it rank 0, is stuck or has ended")
        alive = answer["alive"]
        if self.rank > min(alive):
            return ""
        missing = [rank for rank in range(self.world_size) if rank not in alive]
        if not missing:
            places = ", ".join(f"rank {rank} waited {seconds} s in {answer[rank][1]}"
                               for rank, seconds in alive.items())
            return (f"an exchange failed, but all ranks answer: {places}. A rank that waited less "
                    "than the others came too late; else the network between them is broken")
        state, look = "gone", "See its own output, and whether its machine is short of memory"
        if "Timed out" in str(error):
            state, look = "stuck", ("Look there for a reward that does not answer, a disk or "
                                    "network that hangs, or a fault of a GPU")
        signs = ", ".join(f"rank {rank} ({answer[rank][0]}) is {answer[rank][1]}"
                          for rank in missing)
        return (f"rank(s) {missing} of {self.world_size} {state}: after {waited:.0f} s in "
                f"{answer[self.rank][1]}, the last sign of {signs}. {look}. The same command goes "
                "on from the last state")


def ignoring(look, *args):
    """Call look. A store that is gone leaves the answer as it is."""
    with contextlib.suppress(dist.DistError):
        look(*args)


def is_lost_exchange(error):
    """Is this an error of an exchange over gloo? (With NCCL, torch ends the process instead.)"""
    over_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    return over_gloo or isinstance(error, dist.DistError)


ROLL = None                             # this process's, if there are several ranks


def begin(what):
    """Call it before each exchange between the ranks."""
    if ROLL:
        ROLL.begin(what)


def updated(it):
    """Call it after each update of iteration it, counted from 0."""
    if ROLL:
        ROLL.iteration = it + 1


def call_roll(store, rank, world_size):
    """From now on, an exchange that fails ends this process with one line and the code 1."""
    global ROLL
    ROLL = Roll(store, rank, world_size)
    sys.excepthook = name_missing


def name_missing(kind, error, traceback):
    """Print who is missing in place of a traceback. Other errors get theirs."""
    lost = is_lost_exchange(error) and ROLL.store is not None
    if not lost or os.environ.get("DEBUG"):
        ROLL.usual(kind, error, traceback)
    line = ROLL.explain(error) if lost else ""
    if line:
        print(f"error (rank {ROLL.rank}): {line}", file=sys.stderr, flush=True)
