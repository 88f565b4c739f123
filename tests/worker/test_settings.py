"""Settings: which source wins, what is refused and in which words, and what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from streams.contracts import FEATURE_SETS
from streams.messages import AGENTS
from worker.errors import UsageError
from worker.settings import Settings, load, mask


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a settings file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_flags_win_over_the_environment_over_the_file_over_the_defaults(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "quartet.toml").write_text("batch_size = 11\nmax_gap_bars = 11\nquorum = 1\n")
    monkeypatch.setenv("QUARTET_BATCH_SIZE", "22")
    monkeypatch.setenv("QUARTET_MAX_GAP_BARS", "22")
    found = load(batch_size=33, http_port=None)
    assert (found.batch_size, found.max_gap_bars, found.quorum, found.http_port) == (33, 22, 1, 9464)


def test_a_named_file_replaces_the_one_in_the_working_directory(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "quartet.toml").write_text("quorum = 1\n")
    (elsewhere / "other.toml").write_text("batch_size = 7\n")
    (elsewhere / "third.toml").write_text("batch_size = 8\n")
    monkeypatch.setenv("QUARTET_CONFIG", "third.toml")
    assert (load().quorum, load().batch_size) == (3, 8)
    assert load(Path("other.toml")).batch_size == 7


def test_settings_themselves_read_neither_environment_nor_file(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "quartet.toml").write_text("quorum = 1\n")
    monkeypatch.setenv("QUARTET_QUORUM", "2")
    assert Settings().quorum == 3


def test_tables_merge_entry_by_entry_over_all_sources(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "quartet.toml").write_text("[weights]\nnhits = 0.5\npatchtst = 0.5\n[warmup_bars]\nv3 = 50\n")
    monkeypatch.setenv("QUARTET_WEIGHTS__PATCHTST", "0.6")
    found = load()
    assert dict(found.weights) == {"xgboost": 0.3, "lightgbm": 0.3, "nhits": 0.5, "patchtst": 0.6}
    assert dict(found.warmup_bars) == {"v2": 100, "v3": 50, "v6": 250}


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_AGENTS", "patchtst, nhits")
    monkeypatch.setenv("QUARTET_QUORUM", "2")
    monkeypatch.setenv("QUARTET_INTERVALS", "1m,4h")
    found = load()
    assert (found.agents, found.intervals) == (("nhits", "patchtst"), ("1m", "4h"))


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_QUORUM", "")
    assert load().quorum == 3


def test_bars_are_read_from_the_namespace_unless_keys_are_given() -> None:
    assert Settings(namespace="a").input_keys == ("a:bars",)
    assert Settings(namespace="a", bars=("x", "y")).input_keys == ("x", "y")


def test_a_setting_cannot_be_changed_afterwards() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.quorum = 1
    with pytest.raises(TypeError):
        settings.weights["nhits"] = 1.0


def test_an_unknown_setting_in_the_file_names_the_nearest_and_the_file(elsewhere: Path) -> None:
    (elsewhere / "quartet.toml").write_text("quorom = 2\n")
    with pytest.raises(UsageError, match=r"^unknown setting quorom \(quartet\.toml\); did you mean quorum\?$"):
        load()


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("QUARTET_BATCHSIZE", "QUARTET_BATCH_SIZE"),
        ("QUARTET_REDIS_FIL", "QUARTET_REDIS_FILE"),
        ("QUARTET_WEIGHT__NHITS", "QUARTET_WEIGHTS"),
    ],
)
def test_an_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UsageError, match=rf"^unknown setting {variable} \(environment\); did you mean {nearest}\?$"):
        load()


def test_variables_of_tests_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_TEST_ANYTHING", "1")
    assert load() == Settings()


@pytest.mark.parametrize("content", [b"quorum = \n", b"\xff\xfe", b"[weights\n"])
def test_a_file_that_is_no_toml_is_one_clear_line(elsewhere: Path, content: bytes) -> None:
    (elsewhere / "broken.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"^cannot read settings from broken\.toml: [^\n]+$"):
        load(Path("broken.toml"))


def test_a_named_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"^cannot read settings from absent\.toml: .*No such file"):
        load(Path("absent.toml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quorum": 0}, r"setting quorum \(flags\): input should be greater than or equal to 1; found 0"),
        ({"quorum": 5}, r"setting quorum .* less than or equal to 4; found 5"),
        ({"agents": ("nhits",)}, "quorum is 3 but only 1 agents are configured: set quorum to 1 or less"),
        ({"agents": ()}, "setting agents .* at least 1 item"),
        ({"agents": ("dummy",)}, "unknown agent dummy; the agents are xgboost, lightgbm, nhits, patchtst"),
        ({"weights": {"dummy": 1}}, "unknown name dummy; the names are xgboost"),
        ({"weights": {"nhits": -0.1}}, r"setting weights\.nhits .*greater than or equal to 0; found -0\.1"),
        ({"weights": {"nhits": float("nan")}}, "setting weights.nhits .*finite"),
        ({"weights": {"nhits": float("inf")}}, "setting weights.nhits .*finite"),
        ({"weights": dict.fromkeys(AGENTS, 0)}, "weights of the configured agents are all 0"),
        ({"weights": {"nhits": 1e7}}, r"setting weights\.nhits"),
        ({"warmup_bars": {"v6": 49}}, "v6 needs at least 50 bars, its longest window; found 49"),
        ({"warmup_bars": {"v9": 100}}, "unknown name v9"),
        ({"batch_size": 0}, "setting batch_size"),
        ({"batch_size": 1025}, "setting batch_size"),
        ({"http_port": 65536}, "setting http_port"),
        ({"intervals": ("1m", "1w")}, "1w: expected a number with s, m, h or d"),
        ({"intervals": ("0m",)}, "0m: expected"),
        ({"redis": "localhost:6379"}, "expected `embedded` or a URL that begins with redis://"),
        ({"lease_s": 0}, "setting lease_s"),
        ({"residual_std": {"nhits": 0}}, r"setting residual_std\.nhits"),
        ({"allow_unscaled": ("v3",)}, "unknown agent v3"),
        ({"nonsense": 1}, "unknown setting nonsense"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_where_what_and_why(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        load(**flags)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["", "a b", "a{b}", "a\nb", "a\x00b", "a\x7fb", "x" * 129])
def test_a_namespace_that_would_make_odd_keys_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="without spaces, control characters or braces"):
        load(namespace=name)


def test_warm_up_may_be_as_short_as_the_longest_window_of_each_set() -> None:
    least = {name: s.longest_window for name, s in FEATURE_SETS.items()}
    assert dict(Settings(warmup_bars=least).warmup_bars) == least


def test_a_subset_of_agents_keeps_the_order_of_the_ensemble() -> None:
    assert Settings(agents=("patchtst", "xgboost", "nhits")).agents == ("xgboost", "nhits", "patchtst")


def test_the_password_is_in_no_text_about_the_settings() -> None:
    settings = Settings(redis="rediss://user:hunter2@host:6380/1")
    for text in (repr(settings), str(settings), str(settings.describe())):
        assert "hunter2" not in text
        assert "rediss://user:***@host:6380/1" in text
    assert settings.redis == "rediss://user:hunter2@host:6380/1"


def test_the_password_is_not_in_an_error_either() -> None:
    with pytest.raises(UsageError) as failure:
        load(redis="http://user:hunter2@host")
    assert "hunter2" not in str(failure.value)


@given(password=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=12, max_size=20))
def test_a_mask_hides_every_password_wherever_a_client_would_read_it(password: str) -> None:
    for url in (f"redis://:{password}@h:1/0", f"redis://u:{password}/@h", f"unix:///s?password={password}&db=1"):
        assert password not in mask(url)


@pytest.mark.parametrize("url", ["embedded", "redis://host:6379/0", "unix:///tmp/s?db=1", "redis://user@host"])
def test_a_mask_leaves_a_url_without_a_password_as_it_is(url: str) -> None:
    assert mask(url) == url


def test_a_secret_may_come_from_a_file(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "secret").write_text("redis://:pw@host\n")
    monkeypatch.setenv("QUARTET_REDIS_FILE", str(elsewhere / "secret"))
    assert load().redis == "redis://:pw@host"
    assert load(redis="embedded").redis == "embedded"


def test_a_secret_from_two_places_or_from_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_REDIS_FILE", "absent")
    with pytest.raises(UsageError, match="QUARTET_REDIS_FILE: cannot read absent"):
        load()
    monkeypatch.setenv("QUARTET_REDIS", "redis://host")
    with pytest.raises(UsageError, match="both QUARTET_REDIS and QUARTET_REDIS_FILE are set"):
        load()


def test_every_setting_has_a_description_or_speaks_for_itself() -> None:
    silent = {name for name, field in Settings.model_fields.items() if not field.description}
    assert silent <= {"log_level"}


def test_limits_of_quality_are_for_all_agents_and_an_agents_own_table_replaces_single_ones(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "quartet.toml").write_text(
        'probation = "shadow"\n[quality]\naction_share = 0.8\nminimum = 300\n[quality.nhits]\naction_share = 0.9\n'
    )
    monkeypatch.setenv("QUARTET_QUALITY__NHITS__PROBATION", "vote")
    monkeypatch.setenv("QUARTET_QUALITY__HOLD_SHARE", "0.6")
    found = load().quality
    assert set(found) == set(AGENTS)
    assert (found["xgboost"].action_share, found["nhits"].action_share) == (0.8, 0.9)
    assert (found["xgboost"].minimum, found["nhits"].minimum, found["nhits"].hold_share) == (300, 300, 0.6)
    assert (found["xgboost"].probation, found["nhits"].probation) == ("shadow", "vote")
    assert load().describe()["quality"]["nhits"]["action_share"] == 0.9


def test_unless_set_the_limits_are_the_documented_ones() -> None:
    limits = Settings().quality["patchtst"]
    assert (limits.minimum, limits.action_share, limits.hold_share) == (200, 0.70, 0.85)
    assert (limits.confidence_stddev, limits.confidence_range, limits.probation) == (0.05, 0.12, "vote")
    assert (limits.non_finite_run, limits.error_share) == (20, 0.05)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"action_shear": 0.5}, "unknown limit action_shear; the limits are minimum"),
        ({"nhits": {"windows": 5}}, "unknown limit nhits.windows"),
        ({"action_share": 1.5}, "action_share: input should be less than or equal to 1; found 1.5"),
        ({"nhits": {"minimum": 501}}, "nhits.minimum: input should be less than or equal to 500; found 501"),
        ({"nhits": 5}, "nhits: a table of limits was expected; found 5"),
    ],
)
def test_a_wrong_limit_is_named_with_its_table(table: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match="setting quality") as raised:
        load(quality=table)
    assert words in str(raised.value)
