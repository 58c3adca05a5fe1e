"""How the family of a checkpoint is found."""

import pytest
from toy_family import ToyExecutor, make_checkpoint

from joint_controller.executor import executor_family, families, load_executor


def test_a_family_of_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", {"molmo": "joint_controller.molmo.family"})
    checkpoint = make_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="no executor for models of the type 'toy_thinker': choose one of molmo, or"):
        load_executor(checkpoint)
    installed = tmp_path / "site" / "toy-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        f"[{families.ENTRY_POINT_GROUP}]\ntoy_thinker = toy_family:TOY_FAMILY\n"
    )
    monkeypatch.syspath_prepend(installed.parent)
    assert isinstance(load_executor(checkpoint), ToyExecutor)
    assert executor_family("toy_thinker").random_names == ("toy-tiny",)
    with pytest.raises(ValueError, match="`model_path` 'random:none' is unknown: choose .*random:toy-tiny"):
        load_executor("random:none")
