"""A DVC remote on S3: one pushes, another clones and pulls, and has nothing to run. The S3 is moto's, on loopback."""

import subprocess
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

from stages.common.artifacts import digest_files
from tests.support.project import STAGES, Project, outputs_of, stages_run

pytestmark = pytest.mark.slow
MADE = [path for stage in STAGES for path in outputs_of(stage)]
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATEST",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture
def s3():
    """The address of an S3 with an empty bucket `team`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urlopen(Request(f"{address}/team", method="PUT")).close()
    yield address
    server.stop()


def test_who_pulls_has_nothing_to_run(finished_project, s3, tmp_path):
    ours = finished_project
    ours.run("dvc", "remote", "add", "--default", "team", "s3://team/chat")
    ours.run("dvc", "remote", "modify", "team", "endpointurl", s3)
    # What git ignores is shared by DVC: the data, and here the base model.
    for path in ("data/local/trees.jsonl", "models/local/tiny"):
        ours.run("dvc", "add", path)
    assert stages_run(ours.run("dvc", "repro").stdout) == ["fetch", "fetch_model"]
    ours.commit("a remote")
    pushed = ours.run("dvc", "push", **KEYS)
    assert "pushed" in pushed.stdout
    written = pushed.stdout + pushed.stderr + (ours.folder / ".dvc/config").read_text()
    assert not [secret for name, secret in KEYS.items() if "KEY" in name and secret in written]

    theirs = Project(tmp_path / "another clone")
    subprocess.run(["git", "clone", "--quiet", ours.folder, theirs.folder], check=True)
    assert not (theirs.folder / "models/adapter").exists()
    theirs.run("dvc", "pull", **KEYS)
    again = theirs.run("dvc", "repro", **KEYS).stdout
    assert "Running stage" not in again and "up to date" in again
    made = [digest_files([folder / name for name in MADE]) for folder in (ours.folder, theirs.folder)]
    assert made[0] == made[1]


# Long: DVC's own refusal, which no code of this project shapes.
@pytest.mark.long
def test_without_keys_it_is_refused_and_nothing_is_lost(finished_project, s3):
    ours = finished_project
    ours.run("dvc", "remote", "add", "--default", "team", "s3://team/chat")
    ours.run("dvc", "remote", "modify", "team", "endpointurl", s3)
    before = digest_files([ours.folder / name for name in MADE])
    refused = ours.run("dvc", "push", check=False, AWS_EC2_METADATA_DISABLED="true")
    assert refused.returncode != 0 and "credentials" in refused.stderr
    assert digest_files([ours.folder / name for name in MADE]) == before
