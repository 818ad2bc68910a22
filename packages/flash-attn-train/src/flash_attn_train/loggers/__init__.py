"""Where metrics are written."""

from flash_attn_train.loggers.build import build_loggers, check_loggers
from flash_attn_train.loggers.metrics_csv import MetricsCSV, read_metrics

__all__ = ["MetricsCSV", "build_loggers", "check_loggers", "read_metrics"]
