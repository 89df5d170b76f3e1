"""The report's page: a report in, one HTML file out. Pure but for `redraw`; knows neither tensors nor the queue."""

from abliterated.report.document import page
from abliterated.report.redraw import redraw

__all__ = ["page", "redraw"]
