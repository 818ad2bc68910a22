"""Where metrics are written."""

from flash_attn_train.loggers.metrics_csv import MetricsCSV, read_metrics

__all__ = ["MetricsCSV", "read_metrics"]
