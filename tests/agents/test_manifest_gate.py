"""Where a folder has a manifest, only what it vouches for is parsed; and numbers of numpy in checkpoints."""

import io

import numpy as np
import pytest
import torch

from agents import manifest
from agents.agent import Refused
from agents.artifacts import LoadOptions, load
from streams.messages import Reason
from tests.agents.builders import Parts


def refused(candidate):
    with pytest.raises(Refused) as caught:
        load(candidate, LoadOptions())
    return caught.value.refusal


def test_files_that_the_manifest_lists_load(tmp_path):
    candidate = Parts().write(tmp_path)
    manifest.record(tmp_path, [file.name for file in tmp_path.iterdir()])
    assert load(candidate, LoadOptions()).agent == candidate.agent


def test_a_model_that_the_manifest_does_not_list_is_not_parsed(tmp_path):
    candidate = Parts().write(tmp_path)
    candidate.file.write_bytes(b"not even a checkpoint")
    manifest.record(tmp_path, [file.name for file in tmp_path.iterdir() if file != candidate.file])
    found = refused(candidate)
    assert found.reason is Reason.UNSAFE_ARTIFACT
    assert "is not listed" in found.detail


@pytest.mark.parametrize("ending", ["", "_scaler.json", "_meta.json"])
def test_one_changed_byte_of_any_file_is_refused(tmp_path, ending):
    candidate = Parts().write(tmp_path)
    manifest.record(tmp_path, [file.name for file in tmp_path.iterdir()])
    file = candidate.beside(ending) if ending else candidate.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    found = refused(candidate)
    assert found.reason is Reason.CORRUPT_ARTIFACT
    assert "SHA-256" in found.detail


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.5), np.int64(7), np.bool_(True)])
def test_a_loss_saved_as_a_number_of_numpy_is_read_as_a_plain_number(tmp_path, number):
    parts = Parts()
    saved = io.BytesIO()
    torch.save({"model_state_dict": parts.state, "val_loss": number}, saved)
    parts.model_bytes = saved.getvalue()
    model = load(parts.write(tmp_path), LoadOptions())
    assert model.facts["metadata"]["val_loss"] == number.item()


def test_a_numpy_object_scalar_is_refused(tmp_path):
    parts = Parts()
    saved = io.BytesIO()
    torch.save({"model_state_dict": parts.state, "val_loss": np.array([{"a": 1}], dtype=object)}, saved)
    parts.model_bytes = saved.getvalue()
    assert refused(parts.write(tmp_path)).reason is Reason.UNSAFE_ARTIFACT
