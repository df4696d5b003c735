"""The project's Dockerfile on a real container engine, through the project's own invoke tasks."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from image_support import BASE, ROOT, Engine

pytestmark = pytest.mark.slow

SMOKE = ("tests/data/test_parquet.py", "tests/rewards/test_equality.py", "tests/trainer/test_parity.py")
"""Where the smoke tests are: collecting all tests would take longer than running these."""


def in_image(engine: Engine, image: str, command: str, *flags: str, **variables: str) -> tuple[int, str]:
    return engine.invoke("shell", "--no-gpus", "--image", image, *flags, "--command", command, **variables)


def test_provenance_and_labels(engine: Engine, image: str, lock: Path) -> None:
    import docker

    status, output = in_image(engine, image, "cat /opt/recipe/provenance.json")
    assert status == 0, output
    provenance = json.loads(output.partition("\n")[2])
    digest = subprocess.run(["sha256sum", lock], capture_output=True, text=True, check=True).stdout.split()[0]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert provenance["lock_sha256"] == digest
    assert provenance["git_commit"].startswith(head.strip())
    assert provenance["base_image"] == BASE
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", provenance["build_date"])
    client = docker.DockerClient(base_url=engine.host)
    labels = client.images.get(image).labels
    client.close()
    assert labels["grpo.recipe.lock.sha256"] == digest
    assert labels["org.opencontainers.image.revision"] == provenance["git_commit"]
    assert labels["org.opencontainers.image.created"] == provenance["build_date"]
    assert labels["org.opencontainers.image.base.name"] == BASE


def test_the_user_is_not_root_and_the_image_is_healthy(engine: Engine, image: str) -> None:
    status, output = in_image(engine, image, "sh -c 'id -u && python -m recipe.container.health && cc --version'")
    assert status == 0, output
    assert "\n10001\nhealthy\n" in output


def test_tokens_go_by_environment_only_and_statuses_come_back(engine: Engine, image: str) -> None:
    status, output = in_image(engine, image, "sh -c 'echo token=$HF_TOKEN; exit 7'", HF_TOKEN="hf_secret")
    assert status == 7, output
    command, *printed = output.splitlines()
    assert "token=hf_secret" in printed
    assert "hf_secret" not in command
    assert "--env HF_TOKEN" in command


def test_a_gpu_target_asks_for_gpus_and_shared_memory(engine: Engine, image: str) -> None:
    """The engine is one that grants GPUs and has none."""
    import docker

    from recipe.container.run import ContainerRun

    client = docker.DockerClient(base_url=engine.host)
    container = client.containers.create(**ContainerRun(["true"], image).options())
    try:
        host = container.attrs["HostConfig"]
        assert host["DeviceRequests"][0]["Count"] == -1
        assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
        assert host["ShmSize"] == 64 << 30
        assert {limit["Name"]: limit["Hard"] for limit in host["Ulimits"]}["memlock"] == -1
        container.start()
        assert container.wait()["StatusCode"] == 0
    finally:
        container.remove(force=True)
        client.close()


def test_train_tiny_runs_inside(engine: Engine, image: str, tmp_path: Path) -> None:
    few = "--num-rollout 2 --skip-eval-before-train --actor-num-gpus-per-node 1 --rollout-num-gpus 1"
    train = f"make train-tiny WARMUP_ARGS='{few}' ARGS='{few}'"
    status, output = in_image(engine, image, train, "--work-dir", str(tmp_path))
    assert status == 0, output[-5000:]
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["outcome"] == "finished"
    assert (tmp_path / "runs" / "tiny").stat().st_uid == 10001
    manifest = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())
    provenance = json.loads(in_image(engine, image, "cat /opt/recipe/provenance.json")[1].partition("\n")[2])
    assert manifest["image"] == provenance


def test_the_smoke_tests_pass_inside(engine: Engine, image: str, tmp_path: Path) -> None:
    command = f"make test ARGS='-n 0 -m smoke -p no:cacheprovider {' '.join(SMOKE)}'"
    status, output = in_image(engine, image, command, "--work-dir", str(tmp_path))
    assert status == 0, output[-5000:]
    assert re.search(r"\d+ passed", output)


def test_a_tampered_hash_fails_the_build(engine: Engine, lock: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered.lock"
    text = lock.read_text()
    package = re.search(r"^annotated-doc==.*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    assert package
    broken = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, package[0])
    tampered.write_text(broken)
    status, output = engine.invoke("image", "--tag", "tampered", "--base-image", BASE, "--lock", tampered)
    assert status == 2
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in output
    assert "the image was not built" in output.splitlines()[-1]
