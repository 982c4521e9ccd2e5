"""What a caller may reach: a stranger's request nothing of the operator's, unless the operator opens it."""

import pytest

from lora_utils.errors import UserError
from lora_utils.io.access import CALLER, OWNER, client_access
from lora_utils.io.files import locked_folder, new_process_folder
from lora_utils.training import launch

SWITCHES = ("ALLOW_LOCAL_PATHS", "ALLOW_PRIVATE_ADDRESSES", "ALLOW_OPERATORS_HF_TOKEN")


@pytest.fixture(autouse=True)
def _operators_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_operator")
    for name in (*SWITCHES, "RUN_ROOT"):
        monkeypatch.delenv(name, raising=False)


def test_a_request_reaches_nothing_of_the_operators_by_default():
    access = client_access()
    assert (access.local_paths, access.private_addresses, access.operators_token) == (False, False, False)
    assert access.hub_token(None) is None
    assert access.hub_token("hf_client") == "hf_client"
    with pytest.raises(UserError, match="run_dir isn't open to requests"):
        access.run_dir("mine")
    assert access.run_dir("") == ""


def test_the_operators_token_is_used_by_its_owner_alone(monkeypatch):
    assert OWNER.hub_token(None) == "hf_operator"
    assert CALLER.hub_token(None) is None
    monkeypatch.setenv("ALLOW_OPERATORS_HF_TOKEN", "1")
    assert client_access().hub_token(None) == "hf_operator"


@pytest.mark.parametrize("given", ["..", "../x", "/etc", ".", "", "a/../..", "out"])
def test_a_run_dir_stays_below_the_operators_root(given, tmp_path, monkeypatch):
    root = tmp_path / "runs"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    monkeypatch.setenv("RUN_ROOT", str(root))
    if not given:
        assert client_access().run_dir(given) == ""
        return
    with pytest.raises(UserError, match="must be a folder below") as refused:
        client_access().run_dir(given)
    assert str(tmp_path) not in str(refused.value)


def test_names_and_paths_below_the_root_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    for given in ("mine", "a/b", str(tmp_path / "mine")):
        assert client_access().run_dir(given) == str(tmp_path / given)
    assert OWNER.run_dir("/any/where") == "/any/where"


def test_a_training_is_refused_before_it_makes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "train_in_process", lambda *_: pytest.fail("started"))
    given = {"dataset": "d.zip", "run_dir": str(tmp_path / "victim")}
    with pytest.raises(UserError, match="run_dir isn't open to requests"):
        launch.train(given, access=client_access())
    with pytest.raises(UserError, match="hub_repo me/it needs hub_token"):
        launch.train({"dataset": "d.zip", "hub_repo": "me/it"}, access=client_access())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_one_runs_at_a_time_and_the_lock_leaves_no_file(tmp_path):
    with locked_folder(tmp_path, "run_dir x"):
        with pytest.raises(UserError, match="run_dir x is in use by another run"), locked_folder(tmp_path, "run_dir x"):
            pass
        assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path, "run_dir x"):
        pass


def test_what_dead_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    names = ("predict-999999999", "predict-999999999-abc", "predict-1", "x-5")
    dead, dead_too, alive, other = (tmp_path / f"qwen-image-lora-{name}" for name in names)
    for folder in (dead, dead_too, alive, other):
        folder.mkdir()
        (folder / "weights.zip").write_bytes(b"x")
    own = new_process_folder("predict")
    (own / "old.png").write_bytes(b"x")
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, other.name, own.name}
    assert list(new_process_folder("predict").iterdir()) == []


@pytest.mark.parametrize("given", ["x" * 5000, "a\0b"])
def test_a_run_dir_that_no_file_system_takes_is_refused_in_a_sentence(given, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="must be a folder below"):
        client_access().run_dir(given)


def test_a_folder_with_a_number_that_no_process_has_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / f"qwen-image-lora-predict-{'9' * 40}").mkdir()
    assert [new_process_folder("predict")] == list(tmp_path.iterdir())
