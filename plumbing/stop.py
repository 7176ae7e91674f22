"""Stopping. A signal ends a run after its iteration, when its state is saved."""
import os
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from plumbing import dist

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# A batch system may signal every process, and torchrun passes the signal on. So what comes within
# this many seconds of the first signal is the same one.
SAME = 2.0


class Stop:
    """Make it right before a loop. From then on, the first signal only leaves a mark.

    A second signal ends the process at once. Without a Stop, each signal does what it always does.
    """

    def __init__(self):
        self.signum = 0
        self.when = 0.0
        self.torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.parent = os.getppid()
        if threading.current_thread() is not threading.main_thread():
            return                                      # Python allows handlers there only
        for signum in SIGNALS:
            # What nohup ignores stays ignored. But torchrun passes on what it does not ignore.
            if self.torchrun or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self.receive)

    def receive(self, signum, frame):
        now = time.monotonic()
        if not self.signum:
            self.signum = signum
            self.when = now
        elif now - self.when > SAME:
            os._exit(128 + signum)

    def asked(self):
        """Has any rank got a signal? All ranks get the same answer; every rank has to call it."""
        if self.torchrun and os.getppid() != self.parent:
            self.signum = self.signum or signal.SIGHUP  # torchrun itself was killed
        heard = torch.tensor([float(signum == self.signum) for signum in SIGNALS])
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            heard = heard.cuda()
        heard = dist.sync_sum(heard)
        if heard.any():
            self.signum = SIGNALS[heard.argmax()]
        return bool(heard.any())

    def leave(self, done, path, rank):
        """End every rank with the code 128 + signal. The state of iteration done is in path."""
        # If a rank ended while rank 0 writes, torchrun would signal rank 0 once more.
        dist.barrier()
        if rank == 0:
            name = signal.Signals(self.signum).name
            tqdm.write(f"stopped by {name} after iteration {done}: state saved in {path}; the same "
                       "command goes on", file=sys.stderr)
        raise SystemExit(128 + self.signum)
