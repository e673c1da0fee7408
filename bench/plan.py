"""Compare the plan with what the stages take: peak resident memory, planned and measured, for params.yaml as it is.

Runs train (two steps of it), merge, evaluate and export in a copy of the project; needs the outputs up to tokenize
(`dvc repro tokenize`). Fails when training's plan is not within 15 % of its peak. Run: `python -m bench.plan`
"""

import shutil
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

from bench.phi2_full_size import ROOT, check, measured
from commands import needs, plan
from stages.common.artifacts import read_json, read_parquet
from stages.common.memory import GIB
from stages.common.params import read_params


def main() -> None:
    params = read_params(ROOT / "params.yaml").model_copy(
        update={"max_steps": 2, "logging_steps": 1, "save_steps": 2, "eval_steps": 2}
    )
    config = plan.configuration(read_json(ROOT / "models/base/config.json"))
    splits = (read_parquet(ROOT / f"data/tokenized/{split}.parquet") for split in ("train", "validation"))
    planned = needs.peaks(config, params, max(int(rows["length"].max()) for rows in splits))
    rows = []
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        project = Path(folder)
        for name in ("stages", "data/raw", "data/tokenized", "models/base"):
            shutil.copytree(ROOT / name, project / name)
        for name in ("dvc.yaml", "requirements.lock"):
            shutil.copyfile(ROOT / name, project / name)
        with (project / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(params.model_dump(), file)
        for stage in ("train", "merge", "evaluate", "export"):
            rows.append((stage, planned[stage].cpu, measured(project, stage)))
    print("\n| stage | planned, GiB | measured, GiB | planned / measured |\n| --- | --- | --- | --- |")
    for stage, ours, theirs in rows:
        print(f"| {stage} | {ours / GIB:.2f} | {theirs.peak:.2f} | {ours / GIB / theirs.peak:.2f} |")
    check([row for row in rows if row[0] == "train"])


if __name__ == "__main__":
    main()
