"""The report as a page: tables, figures, settings and environments of runs, in one HTML file."""

from dgavg.report.page import page, write_figures, write_page
from dgavg.report.section import Section

__all__ = ["Section", "page", "write_figures", "write_page"]
