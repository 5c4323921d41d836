"""Real image data: found in a folder, the cache, at official addresses or in a package; checked, then cached."""

from molehunt.datasets.cache import ChecksumError, DataError
from molehunt.datasets.catalog import DATASETS, Dataset, Row, fetch, list_datasets, load, verify
from molehunt.datasets.decode import Arrays
from molehunt.datasets.sources import Progress

__all__ = [
    "DATASETS",
    "Arrays",
    "ChecksumError",
    "DataError",
    "Dataset",
    "Progress",
    "Row",
    "fetch",
    "list_datasets",
    "load",
    "verify",
]
