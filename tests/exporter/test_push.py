"""Publishing an artifact with the Hub's own client, on a Hub of this machine."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from pos2d import exporter, runtime
from pos2d.errors import HubError, InputError, OutputError, UsageError
from pos2d.manifest import read_manifest
from tests.hub_server import TOKEN, XET, Failure, Hub, serving

REPO = "someone/my-model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, to which the client sends by HTTP alone, and without waiting before it tries again."""
    with serving() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # a server in this process sets it
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield hub


@pytest.fixture
def artifact(talking: Path, tmp_path: Path) -> Path:
    """A copy of a merged directory."""
    return Path(shutil.copytree(talking / "merged", tmp_path / "artifact"))


def names_of(directory: Path) -> set[str]:
    return {*read_manifest(directory).files, "manifest.json"}


def test_the_artifact_is_there_in_one_commit(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    (artifact / "notes.txt").write_text("mine", encoding="utf-8")
    (artifact / "README.md").write_text("---\nlicense: mit\n---\n\nMy words.\n", encoding="utf-8")
    report = exporter.push(artifact, REPO, message="First")
    assert report.published is not None
    assert (report.published.created, report.published.changed, report.published.private) == (True, True, False)
    assert report.unlisted == ("notes.txt",)
    assert "notes.txt is not part of the artifact, and not sent" in report.warnings
    branch = hub.repositories[REPO].branches["main"]
    assert branch.messages == ["First"]
    assert set(branch.files) == {".gitattributes", *names_of(artifact)}
    assert report.published.commit == branch.sha
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in branch.files.items():
        assert name == ".gitattributes" or data == (artifact / name).read_bytes(), name
        (copy / name).write_bytes(data)
    assert runtime.verify(copy).passed

    again = exporter.push(artifact, REPO, message="Second")
    assert again.published is not None
    assert not again.published.changed
    assert branch.messages == ["First"]
    assert "nothing was committed" in again.summary()


def test_a_dry_run_asks_nothing(hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    report = exporter.push(artifact, REPO, dry_run=True, private=True)
    assert report.published is None
    assert {file.name for file in report.files} == names_of(artifact)
    assert report.bytes == sum((artifact / file.name).stat().st_size for file in report.files)
    assert {file.name for file in report.files if file.large} == {"model.safetensors"}
    assert f"{hub.url}/{REPO}, branch main, private" in report.summary()
    assert "the Hub was not asked" in report.summary()
    assert hub.requests == []
    with pytest.raises(HubError, match=r"no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"):
        exporter.push(artifact, REPO)
    assert hub.requests == []


def test_the_command_line(hub: Hub, artifact: Path, call: Callable[..., Result]) -> None:
    shown = call("push", artifact, REPO, "--dry-run").stdout
    assert "model.safetensors" in shown
    assert "large file" in shown
    done = call("push", artifact, REPO, "--branch", "trial", "--private", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["published"]["private"]
    assert set(hub.repositories[REPO].branches) == {"main", "trial"}
    assert "model.safetensors" in hub.files(REPO, "trial")
    assert "model.safetensors" not in hub.files(REPO)
    refused = call("push", artifact, "nobody/x")
    assert refused.exit_code == 8
    assert refused.stderr.count("\n") == 1
    assert "take a token that may write to nobody/x, or another repository" in refused.stderr


@pytest.mark.parametrize("name", ["model", "a/b/c", "./x", "someone/my model", "someone/x--y", "hf://someone/x", ""])
def test_names_that_no_repository_has(hub: Hub, artifact: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a repository on the Hub; give ORG/NAME"):
        exporter.push(artifact, name)
    assert hub.requests == []


def test_a_damaged_artifact_is_not_published(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    weights = artifact / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"model\.safetensors changed after the artifact was written"):
        exporter.push(artifact, REPO)
    weights.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"the manifest says"):
        exporter.push(artifact, REPO)
    with pytest.raises(InputError, match=r"is not an artifact"):
        exporter.push(tmp_path, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("pattern", "status", "said", "sentence"),
    [
        ("preupload", 401, "Expired.", r"refuses .*\(401 .*hf auth login"),
        ("preupload", 403, "Forbidden.", r"refuses .*\(403 .*take a token that may write to someone/my-model"),
        ("batch", 403, "Private repository storage limit reached.", r"storage limit reached\); free some space"),
        ("PUT", 413, "Too large.", r"413 Too large\); free some space"),
        ("PUT", 0, "", r"the connection to the Hub at http://127.*; the same command continues"),
        ("commit", 0, "", r"the connection to the Hub at http://127.*; the same command continues"),
        (
            "commit",
            500,
            "Internal error.",
            r"failed at the upload to someone/my-model \(500 Internal error\); the same",
        ),
        ("commit", 412, "A commit has happened.", r"another commit was made meanwhile; run the same command again"),
        ("commit", 429, "Slow down.", r"wait a few minutes"),
        (
            "validate",
            400,
            "license is no licence",
            r"Invalid metadata in README\.md\. - license is no licence; correct",
        ),
    ],
)
def test_a_failure_publishes_nothing_and_the_same_call_continues(
    hub: Hub, artifact: Path, pattern: str, status: int, said: str, sentence: str
) -> None:
    before = {".gitattributes": b"", "LICENSE": b"free"}
    hub.add(REPO, before)
    hub.failures.append(Failure(pattern, status, said, times=10))
    with pytest.raises(HubError, match=sentence):
        exporter.push(artifact, REPO)
    assert hub.files(REPO) == before
    hub.failures.clear()
    sent = hub.asked("PUT")
    exporter.push(artifact, REPO)
    assert set(hub.files(REPO)) == {*before, *names_of(artifact)}
    if pattern in ("commit", "validate"):
        assert hub.asked("PUT") == sent == 1


def test_an_unreachable_hub(hub: Hub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the connection to the Hub at http://127\.0\.0\.1:9 failed: .*refused"):
        exporter.push(artifact, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    with pytest.raises(HubError, match=r"401 .*hf auth login"):
        exporter.push(artifact, REPO)


def test_what_may_be_created(hub: Hub, artifact: Path) -> None:
    with pytest.raises(HubError, match=r"someone/my-model does not exist on the Hub.*`no_create`"):
        exporter.push(artifact, REPO, no_create=True)
    assert hub.repositories == {}
    hub.add(REPO, {})
    with pytest.raises(HubError, match="has no branch 'other'"):
        exporter.push(artifact, REPO, no_create=True, revision="other")
    with pytest.raises(OutputError, match="exists on the Hub and is public"):
        exporter.push(artifact, REPO, private=True)
    assert hub.files(REPO) == {}
    exporter.push(artifact, REPO, no_create=True)
    assert names_of(artifact) == set(hub.files(REPO))


def test_every_file_is_sent_whatever_the_repository_ignores(hub: Hub, artifact: Path) -> None:
    hub.add(REPO, {".gitignore": b"*.safetensors\n"})
    hub.ignored = ("model.safetensors",)
    exporter.push(artifact, REPO)
    assert "model.safetensors" in hub.files(REPO)


def test_a_new_artifact_replaces_the_former_one(hub: Hub, talking: Path, artifact: Path) -> None:
    """Files of the former one would be loaded in place of the new ones; those of others stay."""
    hub.add(REPO, {"LICENSE": b"free", "images/cup.png": b"\x89"})
    exporter.push(artifact, REPO)
    report = exporter.push(talking / "onnx", REPO)
    assert report.published is not None
    assert report.published.deleted == tuple(sorted(names_of(artifact) - names_of(talking / "onnx")))
    assert "model.safetensors" in report.published.deleted
    assert set(hub.files(REPO)) == {"LICENSE", "images/cup.png", *names_of(talking / "onnx")}
    assert len(hub.repositories[REPO].branches["main"].messages) == 2

    hub.add("someone/other", {"model-00001-of-00002.safetensors": b"w", "manifest.json": b"{"})
    with pytest.raises(OutputError, match=r"holds model-00001-of-00002\.safetensors, which is not part of this"):
        exporter.push(artifact, "someone/other")
    assert set(hub.files("someone/other")) == {"model-00001-of-00002.safetensors", "manifest.json"}


def test_paths_of_this_machine_stay_here(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    leaks = {
        "config.json": {"_name_or_path": "/home/alice/models/tiny", "nested": {"list": ["C:\\Users\\alice\\tiny"]}},
        "tokenizer_config.json": {"special_tokens_map_file": "~/cache/map.json", "eos_token": "/a/token/of/the/model"},
    }
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    for name, more in leaks.items():
        block = json.loads((artifact / name).read_text(encoding="utf-8")) | more
        (artifact / name).write_text(json.dumps(block), encoding="utf-8")
        data = (artifact / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["base"]["name"] = "/home/alice/models/tiny"
    (artifact / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    here = {path.name: path.read_bytes() for path in artifact.iterdir()}

    report = exporter.push(artifact, REPO)
    assert report.paths == {
        "config.json": ("_name_or_path", "nested.list.0"),
        "manifest.json": ("base.name",),
        "tokenizer_config.json": ("special_tokens_map_file",),
    }
    assert "manifest.json names a path of this machine (base.name)" in " ".join(report.warnings)
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == here
    sent = hub.files(REPO)
    assert not any(b"alice" in data for data in sent.values())
    assert json.loads(sent["tokenizer_config.json"])["eos_token"] == "/a/token/of/the/model"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in sent.items():
        (copy / name).write_bytes(data)
    assert runtime.verify(copy).files == len(read_manifest(artifact).checked_files)
    assert read_manifest(copy).base["name"] == "tiny"


def test_a_card_that_cannot_be_read_is_not_sent(hub: Hub, artifact: Path) -> None:
    (artifact / "README.md").write_text("---\nlicense: [mit\n---\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"README\.md has metadata that cannot be read"):
        exporter.push(artifact, REPO)
    assert hub.requests == []
    (artifact / "README.md").unlink()
    exporter.push(artifact, REPO)
    assert "README.md" not in hub.files(REPO)


def test_a_token_in_the_card_is_found(hub: Hub, artifact: Path) -> None:
    with (artifact / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nHF_TOKEN={TOKEN}\n")
    with pytest.raises(InputError, match=r"README\.md holds what looks like a token of the Hub"):
        exporter.push(artifact, REPO)
    assert hub.requests == []


def test_with_the_storage_of_xet(hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of Xet, which writes here into a directory in place of the Hub's storage."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.xet = f"local://{tmp_path / 'storage'}"
    exporter.push(artifact, REPO)
    digest = hashlib.sha256((artifact / "model.safetensors").read_bytes()).hexdigest()
    assert hub.files(REPO)["model.safetensors"] == XET + digest.encode()
    assert hub.asked("PUT") == 0
    assert not exporter.push(artifact, REPO).published.changed  # type: ignore[union-attr]
    hub.add("someone/new", {})
    hub.failures.append(Failure("xet-write-token", 403, "No.", times=10))
    with pytest.raises(HubError, match="someone/new"):
        exporter.push(artifact, "someone/new")
    assert hub.files("someone/new") == {}
