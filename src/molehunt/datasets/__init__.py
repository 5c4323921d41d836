"""Real image data: found in a folder, the cache, at official addresses or in a package; checked, then cached."""

from molehunt.datasets.cache import ChecksumError, DataError
from molehunt.datasets.catalog import DATASETS, Dataset
from molehunt.datasets.decode import Arrays
from molehunt.datasets.folder import Folder, read_folder
from molehunt.datasets.npz import read_npz
from molehunt.datasets.retrieval import Row, fetch, list_datasets, load, verify
from molehunt.datasets.sources import Progress

__all__ = [
    "DATASETS",
    "Arrays",
    "ChecksumError",
    "DataError",
    "Dataset",
    "Folder",
    "Progress",
    "Row",
    "fetch",
    "list_datasets",
    "load",
    "read_folder",
    "read_npz",
    "verify",
]
