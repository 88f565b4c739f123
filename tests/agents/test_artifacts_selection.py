"""Which artifact serves, what is told of the others, and the rows of `quartet models list`."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from agents import artifacts
from agents.artifacts import LoadOptions, discover, inspect, judge_newer, load, load_agent, load_exact
from streams.contracts import V2, V3
from streams.messages import AGENTS, Reason
from tests.agents import builders
from tests.agents.builders import Parts

PLAIN = LoadOptions()
COLUMNS = (
    "agent file version contract state reason detail features parameters input_shape outputs sha256 selected".split()
)


def good(stem, seed=1):
    return Parts(builders.nhits_state(32, (16, 16), 2, 12, seed=seed), stem=stem)


def bad(stem):
    parts = good(stem, seed=9)
    parts.metadata["contract"] = "0" * 64
    return parts


def sha256(candidate):
    return hashlib.sha256(candidate.file.read_bytes()).hexdigest()


def test_the_best_by_rule_serves(tmp_path):
    good("v20270101_000000").write(tmp_path)
    best = good("v20260101_000000_v3", seed=2).write(tmp_path)
    loading = load_agent(tmp_path, "nhits", PLAIN)
    assert (loading.candidate, loading.refusal, loading.passed_over) == (best, None, None)
    assert loading.model.sha256 == loading.facts["sha256"] == sha256(best)


def test_no_artifact_is_a_refusal_that_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        loading = load_agent(folder, "nhits", PLAIN)
        assert (loading.model, loading.candidate) == (None, None)
        assert loading.refusal.reason is Reason.NO_ARTIFACT
        assert "quartet train" in loading.refusal.detail


def test_a_misnamed_file_is_reported_with_or_without_an_artifact(tmp_path):
    (tmp_path / "nhits_final.pth").write_bytes(b"x")
    assert "nhits_final.pth" in load_agent(tmp_path, "nhits", PLAIN).refusal.detail
    good("v20260101_000000").write(tmp_path)
    loading = load_agent(tmp_path, "nhits", PLAIN)
    assert loading.model is not None
    assert "nhits_final.pth" in loading.note


def test_a_refused_newest_is_never_replaced_by_an_older_one_in_silence(tmp_path):
    good("v20260101_000000").write(tmp_path)
    newest = bad("v20260102_000000").write(tmp_path)
    loading = load_agent(tmp_path, "nhits", PLAIN)
    assert (loading.model, loading.candidate) == (None, newest)
    assert loading.refusal.reason is Reason.CONTRACT_MISMATCH


def exact(models, candidate, sha=None):
    return load_exact(models, "nhits", str(candidate.file), sha or sha256(candidate), PLAIN)


def test_the_artifact_in_use_serves_on_and_the_note_says_so(tmp_path):
    good("v20260101_000000", seed=1).write(tmp_path)
    used = good("v20260102_000000", seed=2).write(tmp_path)
    good("v20260103_000000", seed=3).write(tmp_path)
    newest = bad("v20260104_000000").write(tmp_path)
    loading = judge_newer(exact(tmp_path, used), tmp_path, PLAIN)
    assert (loading.candidate, loading.model.sha256, loading.refusal) == (used, sha256(used), None)
    assert loading.passed_over[0] == newest
    assert loading.passed_over[1].reason is Reason.CONTRACT_MISMATCH
    for said in (used.file.name, newest.file.name, "contract_mismatch"):
        assert said in loading.note


def test_nothing_is_said_of_a_newer_one_that_passes_or_of_an_older_one_that_does_not(tmp_path):
    bad("v20260101_000000").write(tmp_path)
    used = good("v20260102_000000").write(tmp_path)
    assert judge_newer(exact(tmp_path, used), tmp_path, PLAIN).note == ""
    good("v20260103_000000", seed=2).write(tmp_path)
    assert judge_newer(exact(tmp_path, used), tmp_path, PLAIN).passed_over is None


def test_an_artifact_in_use_that_no_longer_passes_does_not_serve(tmp_path):
    used = bad("v20260101_000000").write(tmp_path)
    loading = exact(tmp_path, used)
    assert (loading.model, loading.refusal.reason) == (None, Reason.CONTRACT_MISMATCH)


def test_a_link_to_the_artifact_in_use_does_not_serve(tmp_path):
    (tmp_path / "store").mkdir()
    real = good("v20260101_000000").write(tmp_path / "store")
    link = tmp_path / real.file.name
    link.symlink_to(real.file)
    assert load_exact(tmp_path, "nhits", str(link), sha256(real), PLAIN).model is None


def test_a_file_swapped_after_its_hash_was_compared_does_not_serve_as_the_one_in_use(tmp_path, monkeypatch):
    used = good("v20260101_000000").write(tmp_path)
    expected, real = sha256(used), artifacts._sha256

    def swap(candidate, options):
        found = real(candidate, options)
        good("v20260101_000000", seed=5).write(tmp_path)
        return found

    monkeypatch.setattr(artifacts, "_sha256", swap)
    assert exact(tmp_path, used, expected).model is None


def rows_of(models):
    rows = inspect(models, PLAIN)
    assert json.loads(json.dumps(rows)) == rows
    assert all(list(row) == COLUMNS for row in rows)
    assert all(isinstance(row["parameters"], int) and isinstance(row["selected"], bool) for row in rows)
    return rows


def test_the_rows_tell_every_artifact_best_first_and_mark_the_selected(tmp_path):
    old, new = good("v20260101_000000").write(tmp_path), bad("v20260102_000000").write(tmp_path)
    newer, older = rows_of(tmp_path)
    assert older == {
        "agent": "nhits",
        "file": str(old.file),
        "version": "v20260101_000000",
        "contract": V2.contract,
        "state": "active",
        "reason": "",
        "detail": older["detail"],
        "features": list(V2.features),
        "parameters": 2 * (32 * 16 + 16 + 16 * 16 + 16 + 16 * 12 + 12) + 24 * 12 + 12,
        "input_shape": [4, 8],
        "outputs": 12,
        "sha256": sha256(old),
        "selected": False,
    }
    assert (newer["file"], newer["state"], newer["reason"]) == (str(new.file), "refused", "contract_mismatch")
    assert newer["selected"]


def test_what_could_be_inferred_is_told_of_refused_ones_too(tmp_path):
    bad("v20260105_000000").write(tmp_path)
    Parts(scaler=None, stem="v20260104_000000").write(tmp_path)
    foreign = builders.nhits_state(32, (16, 16), 2, 12) | {"stacks.0.weight": torch.zeros(5, 5)}
    Parts(foreign, stem="v20260103_000000").write(tmp_path)
    Parts(model_bytes=b"cut", stem="v20260102_000000").write(tmp_path)
    contract, scaler, architecture, corrupt = rows_of(tmp_path)
    for row in (contract, scaler):
        assert (row["features"], row["input_shape"], row["outputs"]) == (list(V2.features), [4, 8], 12)
    assert scaler["reason"] == "scaler_missing"
    assert (architecture["reason"], architecture["outputs"]) == ("unknown_architecture", 0)
    assert architecture["parameters"] == sum(value.numel() for value in foreign.values())
    assert "stacks.0.weight" in architecture["detail"]
    assert (corrupt["reason"], corrupt["parameters"]) == ("corrupt_artifact", 0)
    assert corrupt["sha256"] == hashlib.sha256(b"cut").hexdigest()


def test_a_misnamed_file_has_a_row_that_is_never_selected(tmp_path):
    (tmp_path / "patchtst_best.pth").write_bytes(b"x")
    (row,) = rows_of(tmp_path)
    assert (row["agent"], row["state"], row["selected"]) == ("patchtst", "refused", False)
    assert "patchtst_best.pth" in row["detail"]


def test_an_empty_folder_has_no_rows(tmp_path):
    assert rows_of(tmp_path) == []


def frame(n, names):
    import pandas as pd

    return pd.DataFrame(np.random.default_rng(0).normal(100.0, 5.0, (n, len(names))), columns=list(names))


def fitted(prefix, names, classes):
    """A tree model and its scaler, trained as the field trains them: on scaled frames with names."""
    import pandas as pd
    from sklearn.preprocessing import StandardScaler

    raw = frame(300, names)
    scaler = StandardScaler().fit(raw)
    x = pd.DataFrame(scaler.transform(raw), columns=list(names))
    y = x.iloc[:, 0] * 0.01 + x.iloc[:, 5] * 0.02
    if classes:
        y = np.digitize(y, [-0.01, 0.01])
    if prefix == "xgboost":
        from xgboost import XGBClassifier, XGBRegressor

        model = (XGBClassifier if classes else XGBRegressor)(n_estimators=8, max_depth=3, n_jobs=1, random_state=0)
    else:
        from lightgbm import LGBMClassifier, LGBMRegressor

        kind = LGBMClassifier if classes else LGBMRegressor
        model = kind(n_estimators=8, num_leaves=7, n_jobs=1, verbose=-1, random_state=0)
    return model.fit(x, y), scaler, raw, x


@pytest.mark.parametrize("prefix", ["xgboost", "lightgbm"])
@pytest.mark.parametrize("names", [V3.features, V3.features[:22], V3.features[::-1]], ids=["23", "22", "reversed"])
@pytest.mark.parametrize("classes", [False, True])
def test_legacy_trees_over_any_ordered_subset_vote_as_their_library_does(tmp_path, prefix, names, classes):
    model, scaler, raw, x = fitted(prefix, names, classes)
    parts = Parts(
        prefix=prefix,
        stem="v20260101_120000_v3",
        suffix=".pkl",
        model_bytes=builders.dumped(model),
        scaler=builders.dumped(scaler),
        scaler_ending="_scaler.pkl",
        metadata=None,
    )
    loaded = load(parts.write(tmp_path), PLAIN)
    assert (loaded.features, loaded.feature_set, loaded.contract) == (tuple(names), "v3", "names-only")
    outputs = loaded.predict(raw.to_numpy())
    if classes:
        softmax = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(softmax, model.predict_proba(x), atol=1e-6)
    else:
        np.testing.assert_allclose(outputs[:, 0], model.predict(x), atol=1e-6)


@pytest.mark.parametrize("prefix", ["xgboost", "lightgbm"])
def test_22_unnamed_features_of_a_tree_are_a_feature_mismatch_unless_its_scaler_names_them(tmp_path, prefix):
    names = V3.features[:22]
    model, _, _, x = fitted(prefix, names, classes=False)
    unnamed = type(model)(**model.get_params()).fit(x.to_numpy(), x.iloc[:, 0])
    parts = Parts(prefix=prefix, suffix=".pkl", model_bytes=builders.dumped(unnamed), metadata=None)
    parts.scaler = builders.json_scaler(22)
    parts.write(tmp_path)
    loading = load_agent(tmp_path, prefix, PLAIN)
    assert loading.refusal.reason is Reason.FEATURE_MISMATCH
    parts.metadata = {"features": list(names[:21])}
    parts.write(tmp_path)
    assert load_agent(tmp_path, prefix, PLAIN).refusal.reason is Reason.FEATURE_MISMATCH
    parts.metadata, parts.scaler = {}, builders.json_scaler(22, names)
    parts.write(tmp_path)
    assert load_agent(tmp_path, prefix, PLAIN).model.features == tuple(names)


def test_a_network_must_read_a_whole_set_a_tree_need_not(tmp_path):
    names = list(V3.features[:22])
    state = builders.nhits_state(64 * 22, (8, 8), 2, 3)
    Parts(state, {"features": names}, builders.json_scaler(22, names)).write(tmp_path)
    assert load_agent(tmp_path, "nhits", PLAIN).refusal.reason is Reason.FEATURE_MISMATCH


def test_names_that_fit_several_sets_are_taken_for_v3_unless_the_metadata_tell_another(tmp_path):
    shared = ["close", "high", "low", "volume", "macd"]  # in v2 and v3
    from lightgbm import LGBMRegressor

    x = frame(200, shared)
    tree = LGBMRegressor(n_estimators=5, num_leaves=5, n_jobs=1, verbose=-1).fit((x - 100) / 5, x["close"])
    parts = Parts(
        prefix="lgbm", suffix=".pkl", model_bytes=builders.dumped(tree), scaler=builders.json_scaler(5, shared)
    )
    for metadata, expected in (
        ({}, "v3"),
        ({"feature_set": "v2"}, "v2"),
        ({"contract": V2.contract}, "v2"),
        ({"contract": V3.contract}, "v3"),
    ):
        parts.metadata = metadata
        assert load(parts.write(tmp_path), PLAIN).feature_set == expected


def test_the_known_shapes_of_the_field_load_at_full_size(tmp_path):
    """Three networks as the field has them, with legacy pickled scalers fitted to named or unnamed columns."""
    shapes = [
        ("nhits", "v20260101_000000_v1", builders.nhits_state(), 49, [64, 49], 5_625_312, 12),
        ("patchtst", "v20260101_000000_v1", builders.patchtst_state(), 49, [64, 49], 709_644, 12),
        ("patchtst", "v20260101_000000_v3", builders.token_state(), 23, [23], 268_675, 3),
    ]
    for prefix, stem, state, width, _, _, _ in shapes:
        Parts(state, None, builders.json_scaler(width), prefix=prefix, stem=stem).write(tmp_path)
    rows = {(row["agent"], row["version"]): row for row in rows_of(tmp_path)}
    for prefix, stem, _, width, shape, parameters, outputs in shapes:
        row = rows[prefix, stem]
        assert (row["state"], row["input_shape"], row["parameters"], row["outputs"]) == (
            "active",
            shape,
            parameters,
            outputs,
        )
        assert len(row["features"]) == width
        assert row["selected"] == (stem.endswith("_v3") or prefix == "nhits")


def test_every_agent_has_a_family_that_loads(tmp_path):
    """Each agent's name leads to a module that parses: bytes of nothing are refused as damaged or foreign, not lost."""
    for agent in AGENTS:
        (tmp_path / f"{agent}_v20260101_000000.pkl").write_bytes(b"nothing")
        assert len(discover(tmp_path, agent)) == 1
        assert load_agent(tmp_path, agent, PLAIN).refusal.reason in {Reason.CORRUPT_ARTIFACT, Reason.UNSAFE_ARTIFACT}


def test_the_flattened_input_is_not_read_as_a_window(tmp_path):
    """`input_size` as N-HiTS libraries write it: 4 bars x 8 features."""
    parts = good("v20260101_000000")
    parts.metadata |= {"input_size": 32}
    assert load(parts.write(tmp_path), PLAIN).window == 4


def test_a_refusal_for_want_of_names_tells_of_a_scaler_of_another_width(tmp_path):
    parts = Parts(builders.nhits_state(4 * 9, (16, 16), 2, 12), stem="v20260101_000000")
    parts.metadata, parts.scaler = {"window": 4}, builders.json_scaler(8, V2.features)
    parts.write(tmp_path)
    refusal = load_agent(tmp_path, "nhits", PLAIN).refusal
    assert refusal.reason is Reason.FEATURE_MISMATCH
    assert "_scaler.json beside it is of 8 features" in refusal.detail
