"""DomainBed's records and tables: read, written, and joined with those of dgavg.

Gulrajani and Lopez-Paz 2021, "In Search of Lost Domain Generalization" (arXiv 2007.01434).
"""

from dgavg.benchmark.domainbed.convert import Conversion, ForeignRun, convert
from dgavg.benchmark.domainbed.export import export
from dgavg.benchmark.domainbed.records import Records, read_folder
from dgavg.benchmark.domainbed.selection import RULES, select
from dgavg.benchmark.domainbed.tables import render

__all__ = [
    "RULES",
    "Conversion",
    "ForeignRun",
    "Records",
    "convert",
    "export",
    "read_folder",
    "render",
    "select",
]
