"""`quartet models list|import|verify`, run as users run them, over real legacy artifacts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from agents import importing, manifest
from agents.agent import Refused
from agents.artifacts import LoadOptions, discover, load
from streams.contracts import V3
from streams.messages import Reason
from tests.agents import legacy
from worker.cli.app import invoke

VERSION = "v20240102_030405"
STEM = {"xgboost": f"xgb_{VERSION}", "lightgbm": f"lgbm_{VERSION}"}


@pytest.fixture
def source(tmp_path):
    """A folder of pickles, as other programs leave them."""
    folder = tmp_path / "legacy"
    folder.mkdir()
    models = {"xgboost": legacy.xgboosts()["classifier"], "lightgbm": legacy.lightgbms()["regressor"]}
    for agent, model in models.items():
        (folder / f"{STEM[agent]}.pkl").write_bytes(legacy.pack(model, "zlib"))
        (folder / f"{STEM[agent]}_scaler.pkl").write_bytes(legacy.pack(legacy.scalers()["standard"], "joblib"))
    (folder / f"{STEM['lightgbm']}_meta.json").write_text(json.dumps({"contract": V3.contract, "threshold": 0.002}))
    return folder


def run(capsys, *arguments):
    code = invoke(["models", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_pickles_become_plain_files_that_compute_the_same_bits(source, tmp_path):
    out = tmp_path / "models"
    results = importing.import_models(source, out, LoadOptions())
    assert [(r.agent, r.state, r.detail) for r in results] == [
        ("xgboost", "imported", ""),
        ("lightgbm", "imported", ""),
    ]
    names = {file.name for file in out.iterdir()}
    assert names == {
        "manifest.json",
        f"{STEM['xgboost']}.ubj",
        f"{STEM['xgboost']}_scaler.json",
        f"{STEM['lightgbm']}.txt",
        f"{STEM['lightgbm']}_scaler.json",
        f"{STEM['lightgbm']}_meta.json",
    }
    for agent in ("xgboost", "lightgbm"):
        before, after = (load(discover(folder, agent)[0], LoadOptions()) for folder in (source, out))
        assert after.predict(legacy.ROWS).tobytes() == before.predict(legacy.ROWS).tobytes()
        assert (after.features, after.contract, after.version) == (before.features, before.contract, before.version)


def test_importing_again_changes_nothing(source, tmp_path):
    out = tmp_path / "models"
    importing.import_models(source, out, LoadOptions())
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert {r.state for r in importing.import_models(source, out, LoadOptions())} == {"unchanged"}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_file_of_another_content_is_never_overwritten(source, tmp_path):
    out = tmp_path / "models"
    out.mkdir()
    theirs = out / f"{STEM['xgboost']}.ubj"
    theirs.write_bytes(b"theirs")
    results = importing.import_models(source, out, LoadOptions())
    assert [r.state for r in results] == ["refused", "imported"]
    assert "not overwritten" in results[0].detail
    assert theirs.read_bytes() == b"theirs"
    assert not (out / f"{STEM['xgboost']}_scaler.json").exists()


def test_what_does_not_load_is_refused_with_its_reason_and_the_rest_is_imported(source, tmp_path):
    (source / f"{STEM['xgboost']}.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (source / f"{STEM['lightgbm']}_scaler.pkl").unlink()
    results = importing.import_models(source, tmp_path / "models", LoadOptions())
    assert [(r.state, r.reason) for r in results] == [("refused", "unsafe_artifact"), ("refused", "scaler_missing")]
    unscaled = LoadOptions(allow_unscaled=frozenset({"lightgbm"}))
    assert [r.state for r in importing.import_models(source, tmp_path / "models", unscaled)] == ["refused", "imported"]


def test_a_conversion_that_computes_something_else_is_refused(source, tmp_path, monkeypatch):
    other = bytes(legacy.xgboosts()["forest"].get_booster().save_raw("ubj"))
    monkeypatch.setattr(importing.xgb, "to_ubj", lambda *_: other)
    first = importing.import_models(source, tmp_path / "models", LoadOptions())[0]
    assert (first.state, first.reason) == ("refused", "corrupt_artifact")
    assert "does not compute the same" in first.detail
    assert not (tmp_path / "models" / f"{STEM['xgboost']}.ubj").exists()


def test_verify_names_what_is_missing_changed_and_unlisted(source, tmp_path, capsys):
    out = tmp_path / "models"
    importing.import_models(source, out, LoadOptions())
    assert run(capsys, "verify", "--models", out)[0] == 0
    model, scaler = out / f"{STEM['xgboost']}.ubj", out / f"{STEM['xgboost']}_scaler.json"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    scaler.unlink()
    (out / "stranger.pkl").write_bytes(b"")
    code, text, _ = run(capsys, "verify", "--models", out, "--json")
    assert code == 1
    assert {(f["file"], f["problem"]) for f in json.loads(text)} == {
        (model.name, "changed"),
        (scaler.name, "missing"),
        ("stranger.pkl", "unlisted"),
    }


def test_verify_does_not_follow_a_symbolic_link(source, tmp_path):
    out = tmp_path / "models"
    importing.import_models(source, out, LoadOptions())
    model = out / f"{STEM['xgboost']}.ubj"
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    assert [(f.file, f.problem) for f in manifest.verify(out)] == [(model.name, "changed")]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format":"other","files":{}}', b'{"format":"quartet-manifest/1"}'])
def test_a_manifest_that_is_none_is_corrupt(content, tmp_path):
    (tmp_path / manifest.NAME).write_bytes(content)
    with pytest.raises(Refused) as refused:
        manifest.verify(tmp_path)
    assert refused.value.refusal.reason is Reason.CORRUPT_ARTIFACT


def test_list_prints_what_would_vote_and_fails_where_one_would_not(source, tmp_path, capsys):
    code, text, _ = run(capsys, "list", "--models", source, "--json")
    rows = json.loads(text)
    assert (code, [row["state"] for row in rows]) == (0, ["active", "active"])
    keys = "agent file version contract state reason detail features parameters input_shape outputs sha256 selected"
    assert list(rows[0]) == keys.split()
    (source / f"{STEM['xgboost']}.pkl").write_bytes(b"broken")
    code, text, _ = run(capsys, "list", "--models", source)
    assert code == 1
    assert "corrupt_artifact" in text


def test_an_empty_folder_fails_and_says_how_to_fill_it(tmp_path, capsys):
    for command in (("list", "--models", tmp_path), ("import", tmp_path, "--models", tmp_path / "out")):
        code, _, error = run(capsys, *command)
        assert code == 1
        assert str(tmp_path) in error
    assert "quartet train" in run(capsys, "list", "--models", tmp_path)[2]
    assert run(capsys, "verify", "--models", tmp_path)[0] == 1


def test_import_as_a_command_prints_json(source, tmp_path, capsys):
    code, text, _ = run(capsys, "import", source, "--models", tmp_path / "models", "--json")
    assert (code, [row["state"] for row in json.loads(text)]) == (0, ["imported", "imported"])


def test_help_imports_no_model_library():
    code = (
        "import sys; from worker.cli.app import invoke; invoke(['models', 'list', '--help']);"
        "print(sorted({'torch', 'xgboost', 'lightgbm', 'pandas', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
