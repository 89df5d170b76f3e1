"""The report's page: a run's report in, one HTML file out. Pure; knows neither tensors nor the queue."""

from abliterated.report.document import page

__all__ = ["page"]
