"""Certificates for people: a table for the terminal, a figure, a page."""

from saelens_certify.report.comparison import print_comparison
from saelens_certify.report.figure import certificate_figure
from saelens_certify.report.page import write_report
from saelens_certify.report.picture import check_picture, write_picture
from saelens_certify.report.plan import print_plan
from saelens_certify.report.table import certificate_tables, print_certificate

__all__ = [
    "certificate_figure",
    "certificate_tables",
    "check_picture",
    "print_certificate",
    "print_comparison",
    "print_plan",
    "write_picture",
    "write_report",
]
