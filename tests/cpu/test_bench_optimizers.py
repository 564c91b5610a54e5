"""`lowrank bench optimizers`: steps, states, and refreshes amortised."""

import json

import pytest
import torch
from benched import quick, run  # noqa: F401

from lowrank_sys.bench import optimizers


def test_optimizers(capsys, tmp_path):
    path = tmp_path / "rows.json"
    names = [name for name in optimizers.CONTENDERS if not optimizers.why_missing(name) and not name.startswith("torchao")]
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "24x16",
        "16x24",
        "--rank",
        "4",
        "--gap",
        "3",
        "--base",
        "adamw-fused",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--optimizers",
        ",".join(names),
        "--json",
        str(path),
    )
    assert (code, err) == (0, "")
    rows = {row["optimizer"]: row for row in json.loads(path.read_text())}
    ours = rows["lowrank"]
    assert ours["worst_s"] >= ours["amortised_s"] > 0 and ours["first_s"] > 0 and ours["overhead_s"] > 0
    assert ours["ratio"] > 0 and rows["adamw-fused"]["ratio"] is None
    assert ours["matrices"] == 2 and ours["rank"] == 4 and ours["device"]
    assert ours["command"] in out
    # two moments and a basis a matrix, and a few scalars
    assert 0 <= ours["state_bytes"] - 4 * 2 * (2 * 24 * 4 + 16 * 4) < 100
    assert rows["adamw-fused"]["state_bytes"] >= 2 * 2 * 4 * 24 * 16
    assert rows["gemms"]["state_bytes"] == 0
    for name, row in rows.items():
        periodic = optimizers.CONTENDERS[name].periodic and name != "galore-torch"
        assert [row[key] is not None for key in ("refresh_s", "amortised_s", "worst_s")] == [periodic] * 3, name
        assert row["command"].startswith("lowrank bench optimizers --shape 24x16 16x24")
        assert f"--optimizers {name}" in row["command"]
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["spread"] >= 0


def test_states_in_fewer_bits_are_smaller(capsys, tmp_path):
    path = tmp_path / "rows.json"
    names = ("q-galore", "galore8bit", "lowrank", "adamw-fused")
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "320x256",
        "--rank",
        "64",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--optimizers",
        ",".join(names),
        "--json",
        str(path),
    )
    sizes = {row["optimizer"]: row["state_bytes"] for row in json.loads(path.read_text())}
    assert code == 0 and sorted(names, key=sizes.get) == list(names) and len(set(sizes.values())) == 4


def test_a_refresh_is_amortised_over_a_gap_that_the_steps_do_not_cover(capsys, tmp_path):
    path = tmp_path / "rows.json"
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "24x16",
        "--rank",
        "4",
        "--gap",
        "50",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--optimizers",
        "lowrank",
        "--json",
        str(path),
    )
    (row,) = json.loads(path.read_text())
    assert row["worst_s"] is None and row["base"] == "lowrank"
    assert row["amortised_s"] == pytest.approx(row["median_s"] + row["refresh_s"] / 50)


def test_the_state_of_a_tensor_subclass_is_that_of_its_parts():
    class Codes(torch.Tensor):
        @staticmethod
        def __new__(cls, codes):
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes = codes
            return made

        def __tensor_flatten__(self):
            return ["codes"], []

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(function)

    optimizer = type("Optimizer", (), {"state": {0: {"exp_avg": Codes(torch.zeros(100, dtype=torch.uint8)), "step": 3}}})
    assert optimizers.state_bytes(optimizer) == 100


@pytest.mark.parametrize("svd", [False, True])
def test_galore_torch_shows_its_refresh_only_with_its_svd(capsys, tmp_path, svd):
    pytest.importorskip("galore_torch")
    path = tmp_path / "rows.json"
    code, out, err = run(
        capsys,
        "optimizers",
        "--shape",
        "24x16",
        "--rank",
        "4",
        "--gap",
        "2",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--optimizers",
        "galore-torch,lowrank",
        "--json",
        str(path),
        *["--svd"] * svd,
    )
    assert code == 0
    rows = {row["optimizer"]: row for row in json.loads(path.read_text())}
    shown = [rows["galore-torch"][key] is not None for key in ("first_s", "worst_s", "amortised_s")]
    assert shown == [svd] * 3 and (rows["lowrank"]["amortised_ratio"] is not None) == svd
    assert ("random bases" in out) != svd


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_random_bases_have_the_layout_of_the_svds(shape):
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    gradient = torch.randn(shape)

    def basis():
        p = projector(4)
        p.project(gradient, 0)
        return p.ortho_matrix

    real = basis()
    with optimizers.random_bases():
        random = basis()
    assert random.shape == real.shape and random.stride() == real.stride()
    assert random.untyped_storage().nbytes() == real.untyped_storage().nbytes()
    assert torch.equal(basis(), real)
    wide = random if random.shape[0] < random.shape[1] else random.T
    torch.testing.assert_close(wide @ wide.T, torch.eye(4))


def test_a_base_that_is_not_installed_says_how_to_install_it(capsys, monkeypatch):
    missing = optimizers.CONTENDERS["galore-torch"]._replace(module="nonexistent_module")
    monkeypatch.setitem(optimizers.CONTENDERS, "galore-torch", missing)
    for more in ([], ["--optimizers", "lowrank,galore-torch"], ["--optimizers", "lowrank", "--base", "galore-torch"]):
        code, out, err = run(capsys, "optimizers", "--shape", "8x8", "--rank", "2", *more)
        assert code == 2
        assert err.count("\n") == 1 and "pip install galore-torch" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--optimizers", "lowrank,adma"], "unknown 'adma'; valid: lowrank, "),
        (["--shape", "8x8", "--rank", "9", "--optimizers", "lowrank"], "--rank 9 is too large for shape 8x8"),
        (["--model", "llama-70b"], "'llama-7b'"),
        (["--optimizers", "lowrank", "--csv", "missing/rows.csv"], "cannot write"),
    ],
    ids=" ".join,
)
def test_bad_input_of_optimizers(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "optimizers", *argv)
    assert code == 2
    assert err.count("\n") == 1 and message in err
