"""A look at a run of the training application, complete or not: a page to keep, and a status to watch.

Both only read what the run writes, and add one file to its folder, report.html, which no run reads.
"""

from gaussnet.run_report.folder import Run
from gaussnet.run_report.page import write_page
from gaussnet.run_report.status import Status
from gaussnet.run_report.watching import watch

__all__ = ["Run", "Status", "watch", "write_page"]
