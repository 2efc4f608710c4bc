"""Limits of the memory that an example may take, and how much it takes."""

import re
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")


def read(field):
    """Bytes of this process: VmRSS are in memory, VmHWM were at most, VmData can be written to."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", STATUS.read_text(), re.MULTILINE)[1])


class MemoryLimit:
    """Limit of what this process may take beside what it has, in a block, and the peaks of what it takes.

    A hard limit makes whatever goes beyond it a MemoryError. Linux alone has it, and tells the peaks, in bytes.
    """

    def __init__(self, size, hard):
        self.size, self.peaks = size, []
        self.knows = STATUS.exists()
        self.hard = hard and self.knows

    def __enter__(self):
        if self.hard:
            import resource

            self.before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (read("VmData") + self.size, self.before[1]))
        if self.knows:
            self.start = read("VmRSS")
            self.look()
        self.peaks.clear()
        return self

    def look(self):
        """Add the peak since the last look to the list of peaks."""
        if self.knows:
            self.peaks.append(read("VmHWM") - self.start)
            with suppress(OSError):  # some containers forbid it: then this is the peak so far
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def __exit__(self, *error):
        if self.hard:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, self.before)
