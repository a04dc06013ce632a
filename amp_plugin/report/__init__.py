"""What a run has to show: its figures as a table and a ledger, its curves and test predictions as pictures."""

from amp_plugin.report.confusion import plot_confusion
from amp_plugin.report.curves import plot_curves, series
from amp_plugin.report.ledger import append_to_ledger, read_ledger
from amp_plugin.report.reliability import plot_reliability
from amp_plugin.report.table import table

__all__ = ["append_to_ledger", "plot_confusion", "plot_curves", "plot_reliability", "read_ledger", "series", "table"]
