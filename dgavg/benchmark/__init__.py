"""Leave-one-domain-out runs: training, records, resume, tables."""

from dgavg.benchmark.leave_one_out import leave_one_domain_out
from dgavg.benchmark.table import Table

__all__ = ["Table", "leave_one_domain_out"]
