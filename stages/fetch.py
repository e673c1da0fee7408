"""Fetch the pinned data set, or several.

Reads the sources that params.yaml names (and data/sample, data/local for local ones).
Writes data/raw/1/, data/raw/2/, … (each data set's files; a hub repository as one parquet file a split) and
data/raw/source.json, a list that records where they came from. Run: `dvc repro fetch`
"""

from pathlib import Path

from stages.common.artifacts import write_json, write_whole
from stages.common.downloads import fetch_source
from stages.common.params import load_params
from stages.common.schema import FetchParams
from stages.common.sources import parse_sources

RAW = Path("data/raw")


def main() -> None:
    params = load_params(FetchParams)
    datasets = parse_sources(params.dataset, params.dataset_revision)
    with write_whole(RAW) as raw:
        records = [fetch_source(dataset, "dataset", raw / str(i)) for i, dataset in enumerate(datasets, 1)]
        write_json(raw / "source.json", records)
    print(f"fetch: {', '.join(dataset.text for dataset in datasets)} -> {RAW}/")
