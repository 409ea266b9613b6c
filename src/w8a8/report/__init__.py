"""One page that shows what quantising did to a model: plain records in, one self-contained HTML file out.

Nothing in here imports torch: a page is made from a file of records alone, on any machine.
"""

from w8a8.report.collect import collect
from w8a8.report.page import report, write_report
from w8a8.report.records import Records, read_records

__all__ = ["Records", "collect", "read_records", "report", "write_report"]
