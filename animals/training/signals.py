"""What a training run does when a signal or --max_hours ends it: it saves; its data workers live until then."""

import atexit
import math
import multiprocessing
import os
import signal
import time

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from animals.ranks import STOPPING, end_with_parent, say


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGHUP or Ctrl-C: all ranks finish the step, save a checkpoint and end. A second Ctrl-C ends at once.

    One Ctrl-C can arrive twice, from the terminal and from the launcher: a second one comes a second later at least.
    When max_hours have passed, SIGALRM comes: the run ends the same way, and train.py then publishes its model.
    """

    def __init__(self, max_hours=None):
        self.received = self.agreed = 0  # signal numbers: that this rank got; that all ranks stop for, 0: none
        self.interrupted = math.inf  # when the first Ctrl-C came
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.on_signal)
        if max_hours:
            signal.signal(signal.SIGALRM, self.on_signal)
            signal.setitimer(signal.ITIMER_REAL, 3600 * max_hours)

    def on_signal(self, number, frame):
        now, first = time.monotonic(), not self.received
        if number == signal.SIGINT:
            if now > self.interrupted + 1:
                os._exit(128 + number)
            self.interrupted = min(now, self.interrupted)
        if first or number != signal.SIGALRM:
            self.received = number
        if first:
            name = "--max_hours" if number == signal.SIGALRM else signal.Signals(number).name
            say(f"\n{name}: a checkpoint is saved at the end of this step (Ctrl-C ends at once)")

    def on_step_end(self, args, state, control, **kwargs):
        received = gather(torch.tensor([self.received], device=args.device)).tolist()  # all stop at the same step
        self.agreed = max(received, key=lambda number: (number > 0) + (number not in (0, signal.SIGALRM)))
        if self.agreed and not control.should_training_stop:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed and state.global_step < state.max_steps:  # the library also calls this where training stops
            control.should_evaluate = control.should_save = False  # the checkpoint of this step is there already


def protect_data_workers():
    """Data workers, which are forks of this rank, get none of the signals in STOPPING, and end with the rank.

    systemd, Slurm or a terminal may send a signal to all processes of a run. Blocked in a worker, it has no effect,
    although torch sets a handler there. multiprocessing would end the workers by SIGTERM, too, and then wait for them
    without end: the rank kills them before that.
    """
    os.register_at_fork(after_in_child=end_with_parent)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING))

    def kill_workers():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error when a worker is killed
        for worker in multiprocessing.active_children():
            worker.kill()

    atexit.register(kill_workers)  # after multiprocessing's own function, therefore called before it
