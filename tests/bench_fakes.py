"""Stands in for the machine in tests of the benchmark."""

from bench.disturbance import Snapshot


class Watch:
    """Disturbed in the rounds that it is told, and as often as told when it is asked whether all is quiet."""

    def __init__(self, disturbed=(), signs=(), looks=0):
        self.rounds, self.round, self.of_all, self.patience = disturbed, -1, list(signs), 40.0
        self.disturbed, self.looks = False, looks

    def begin(self):
        self.round += 1

    def end(self):
        self.disturbed = self.round in self.rounds
        return (["something ran"] if self.disturbed else []), Snapshot(1.0)

    def quiet(self):
        self.looks -= 1
        return self.looks < 0

    def signs(self, spent):
        self.quiet_seconds = spent.clock
        return self.of_all


class Clock:
    """Stands still until somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
