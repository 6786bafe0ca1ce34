"""The fake's own clock: the real one and an offset that a test moves."""

import time


class Clock:
    def __init__(self):
        self.offset = 0.0

    def now(self):
        return time.time() + self.offset

    def seconds(self):
        return int(self.now())

    def advance(self, seconds):
        self.offset += seconds

    def set(self, moment):
        self.offset = moment - time.time()
