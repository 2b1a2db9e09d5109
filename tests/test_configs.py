"""Which configuration serves which call: files of measurements, refused ones, and the shipped table."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from logpe_kernels import configs
from logpe_kernels.configs import Config, Traits
from logpe_kernels.options import Options
from logpe_kernels.plan import Plan

import logpe
from bench.speed.compile_report import TARGETS
from logpe.tuning import doctor
from logpe.tuning import trial as measure

NAME = "NVIDIA H100 80GB HBM3"
FILE = "NVIDIA-H100-80GB-HBM3.json"
DEVICE = torch.device("cuda", 0)
CALL = Traits(DEVICE, 2, 128, power=True, causal=True, log2_length=12)
RUN = dict(date="2026-01-02T03:04:05Z", command="python -m logpe tune", logpe="0", torch="0", triton="0", driver="0")


def forget() -> None:
    """What is cached."""
    for function in list(vars(configs).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The user's folder and the one for shipped files, empty, on a machine that says it has an H100."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    user.mkdir()
    shipped.mkdir()
    forget()
    monkeypatch.setenv("LOGPE_CONFIG_DIR", str(user))
    monkeypatch.setattr(configs, "SHIPPED", shipped)
    monkeypatch.setattr(configs, "name_of", lambda device: NAME)
    monkeypatch.setattr(configs, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(configs, "shared_memory", lambda device: 227 * 1024)
    yield user, shipped
    forget()


def make_entry(length: int = 4096, config: Any = (64, 64, 4, 3), **changes: Any) -> dict[str, Any]:
    entry = dict(
        kernel="forward", itemsize=2, head_dim=128, parts=["power"], causal=True, length=length, batch=4, heads=16,
        kv_heads=16, config=config, milliseconds=1.0, default=[128, 128, 8, 2], default_milliseconds=1.5,
        tried=[[[64, 64, 4, 3], 1.0], [[128, 128, 4, 2], "spills"]], run=0,
    )  # fmt: skip
    return {**entry, **changes}


def write(folder: Path, *entries: dict[str, Any], **changes: Any) -> Path:
    """A file of these entries."""
    content = dict(format=1, device=NAME, target="sm_90", runs=[RUN], entries=list(entries))
    path = folder / FILE
    path.write_text(json.dumps({**content, **changes}))
    return path


def default(traits: Traits = CALL, kernel: str = "forward") -> Config:
    return configs.shipped(kernel, "sm_90", traits.itemsize, traits.head_dim, traits.heavy)


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_user_file_before_shipped_file_before_table(folders: tuple[Path, Path]) -> None:
    user, shipped = folders
    ours = write(user, make_entry(config=[64, 32, 4, 2]))
    theirs = write(shipped, make_entry(config=[64, 64, 4, 2]))
    assert configs.choose("forward", CALL)[:2] == (Config(64, 32, 4, 2), ours)
    assert configs.lookup("forward", CALL) == Config(64, 32, 4, 2)
    ours.unlink()
    forget()
    assert configs.choose("forward", CALL)[:2] == (Config(64, 64, 4, 2), theirs)
    theirs.unlink()
    assert configs.lookup("forward", CALL) == Config(64, 64, 4, 2)  # a call does not read files again
    forget()
    assert configs.choose("forward", CALL) == (default(), configs.TABLE, "for sm_90")


def test_a_file_without_a_fitting_entry_leaves_it_to_the_next(folders: tuple[Path, Path]) -> None:
    user, shipped = folders
    path = write(user, make_entry(causal=False))
    theirs = write(shipped, make_entry(config=[64, 64, 4, 2]))
    assert configs.choose("forward", CALL)[:2] == (Config(64, 64, 4, 2), theirs)
    theirs.unlink()
    forget()
    assert configs.choose("forward", CALL) == (default(), configs.TABLE, f"for sm_90, nothing like it in {path}")


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "nearest"),
    [
        (1, 1, 1024),
        (1024, 1024, 1024),
        (1025, 1025, 4096),  # 2048 is as near to 1024 as to 4096: the longer one
        (2049, 2049, 4096),
        (1, 4097, 4096),
        (8193, 4, 32768),
        (10**6, 10**6, 32768),
    ],
)
def test_nearest_length(folders: tuple[Path, Path], num_queries: int, num_keys: int, nearest: int) -> None:
    lengths = {1024: [64, 32, 4, 2], 4096: [64, 64, 4, 2], 32768: [128, 64, 4, 2]}
    write(folders[0], *(make_entry(n, config) for n, config in lengths.items()))
    traits = CALL._replace(log2_length=configs.log2_length(num_queries, num_keys))
    choice = configs.choose("forward", traits)
    assert choice.config == Config(*lengths[nearest])
    assert choice.why == f"measured at {nearest} tokens, the nearest of 3"


def test_lengths_are_keys_by_powers_of_two() -> None:
    assert [configs.log2_length(n, 1) for n in (0, 1, 2, 3, 4, 2049, 4096, 4097)] == [0, 0, 1, 2, 2, 12, 12, 13]
    assert configs.log2_length(3, 4096) == configs.log2_length(4096, 3) == 12


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        ("backward_dq", {}),
        ("forward", dict(itemsize=4)),
        ("forward", dict(head_dim=64)),
        ("forward", dict(head_dim=96)),  # rows of another width
        ("forward", dict(power=False)),
        ("forward", dict(sharpness=True)),
        ("forward", dict(alpha=True)),
        ("forward", dict(key_bias=True)),
        ("forward", dict(causal=False)),
    ],
)
def test_an_entry_serves_its_own_kind_only(folders: tuple[Path, Path], kernel: str, changes: dict[str, Any]) -> None:
    write(folders[0], make_entry(config=[64, 16, 4, 2]))
    assert configs.lookup("forward", CALL) == Config(64, 16, 4, 2)
    other = CALL._replace(**changes)
    assert configs.choose(kernel, other)[:2] == (default(other, kernel), configs.TABLE)


def test_head_dims_are_rounded_up(folders: tuple[Path, Path]) -> None:
    write(folders[0], make_entry(head_dim=80, config=[64, 16, 4, 2]))
    for head_dim, found in ((65, True), (80, True), (127, True), (64, False), (128, False), (129, False)):
        assert (configs.choose("forward", CALL._replace(head_dim=head_dim)).file != configs.TABLE) == found, head_dim


def test_a_file_of_other_versions_is_used(folders: tuple[Path, Path]) -> None:
    write(folders[0], make_entry(config=[64, 16, 4, 2]), runs=[{**RUN, "triton": "3.0.0"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.lookup("forward", CALL) == Config(64, 16, 4, 2)


def test_a_call_finds_its_entry(folders: tuple[Path, Path], device: torch.device) -> None:
    """From log_attention to the launch: the traits that the launchers make are those of the entry."""
    if device.type == "cuda":
        pytest.skip("the tiles of a real GPU are its own")
    common = dict(itemsize=4, head_dim=16, parts=["power", "alpha"], causal=True, length=64)
    tiles = {"forward": (16, 32), "backward_dq": (32, 16), "backward_dkdv": (64, 32)}
    write(folders[0], *(make_entry(kernel=name, config=[*tile, 4, 1], **common) for name, tile in tiles.items()))
    position = logpe.LogPosition(2, 16, "log-rotary-bias", query_gain=True)
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    with measure.recorded() as launches:
        logpe.log_attention(q, q, q, position, is_causal=True, backend="triton").sum().backward()
    for name, tile in tiles.items():
        (launch,) = launches[name]
        assert (launch.keywords["BLOCK_M"], launch.keywords["BLOCK_N"]) == tile, name


def test_wide_values_have_tiles_of_their_own() -> None:
    """With the others the compiler spills kilobytes, or warps repeat products; the compile report builds them."""
    wide = CALL._replace(head_dim=256, wide_values=True)
    for target in ("sm_80", "sm_89", "sm_90", "sm_120"):
        chosen = configs.shipped("backward_dkdv", target, 2, 256, wide_values=True)
        assert chosen.BLOCK_N == 64
        assert chosen != configs.shipped("backward_dkdv", target, 2, 256)
        assert configs.shipped("backward_dkdv", target, 2, 256, True, True) == chosen  # heavy ones too
    assert configs.lookup("backward_dkdv", wide).BLOCK_N == 64
    assert configs.lookup("forward", wide) == configs.lookup("forward", wide._replace(wide_values=False))
    q, k, v = (torch.empty(1, 1, 8, size, device="meta") for size in (32, 32, 128))
    assert Plan(q, k, v, Options()).traits.wide_values
    assert not Plan(v, v, q, Options()).traits.wide_values
    assert not Plan(q, k, v[..., :64], Options()).traits.wide_values


def test_another_kernel_is_one_line(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Decode(NamedTuple):
        BLOCK_N: int
        num_warps: int
        num_stages: int

    monkeypatch.setitem(configs.KERNELS, "decode", Decode(32, 4, 1))
    write(folders[0], make_entry(kernel="decode", config=[128, 4, 2], default=[64, 4, 2]))
    assert configs.lookup("decode", CALL) == Decode(128, 4, 2)
    with configs.override(Config(16, 16, 4, 1)):
        assert configs.lookup("decode", CALL) == Decode(128, 4, 2)  # it takes no such configuration
        assert configs.lookup("forward", CALL) == Config(16, 16, 4, 1)


def test_override(folders: tuple[Path, Path]) -> None:
    a, b, c = Config(16, 16, 4, 1), Config(16, 32, 4, 1), Config(32, 16, 4, 1)
    with configs.override(a, b, c):
        assert [configs.lookup(kernel, CALL) for kernel in configs.KERNELS] == [a, b, c]
        with configs.override(backward_dq=a):
            assert [configs.lookup(kernel, CALL) for kernel in configs.KERNELS] == [a, a, c]
        assert configs.lookup("backward_dq", CALL) == b
    assert configs.lookup("forward", CALL) == default()


def test_the_keywords_of_a_launch() -> None:
    assert Config(64, 32, 4, 2).launch() == dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2)
    assert Config(64, 32, 4, 2, TMA=True, SPECIALIZED=True).launch() == Config(64, 32, 4, 2).launch()


def test_json_has_lists_and_objects() -> None:
    whole = Config(64, 32, 4, 2, TMA=True)
    assert configs.make_config("forward", [64, 32, 4, 2, True]) == whole
    assert configs.make_config("forward", [64, 32, 4, 2]) == Config(64, 32, 4, 2)
    assert configs.make_config("forward", whole._asdict()) == whole
    assert configs.make_config("forward", json.loads(json.dumps(whole))) == whole


def test_every_shipped_configuration_passes_the_checks() -> None:
    table = json.loads(configs.TABLE.read_text())
    for target, kernels in table.items():
        for kernel in kernels:
            for itemsize in (2, 4):
                for head_dim in (16, 32, 64, 128, 256):
                    for heavy, wide_values in itertools.product((False, True), repeat=2):
                        config = configs.shipped(kernel, target, itemsize, head_dim, heavy, wide_values)
                        configs.check_values(kernel, config)
                        facts = (itemsize, head_dim, target, TARGETS[target].shared)
                        assert configs.cannot_launch(kernel, config, *facts) is None, (kernel, config, facts)


# ---- files -----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "it is no JSON": [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000],
    "it is not of format 1": [[], 3, None, {}, dict(format=2), dict(format="1")],
    "it is for NVIDIA A100": dict(device="NVIDIA A100"),
    "it is for NVIDIA H100 80GB HBM3 (sm_80)": dict(target="sm_80"),
    "it is for ['x']": dict(device=["x"]),
    "unknown fields ['surprise']": [dict(surprise=1), dict(entries=[make_entry(surprise=1)])],
    "runs must be a list": [dict(runs=3), dict(runs=["x"]), dict(runs=[dict(date=3)])],
    "entries must be a list": [dict(entries={}), dict(entries=None)],
    "entry 1: it must be an object": dict(entries=[make_entry(), []]),
    "entry 0: kernel must be one of": [dict(kernel="sideways"), dict(kernel=["forward"]), dict(kernel=None)],
    "entry 0: itemsize must be": [dict(itemsize=3), dict(itemsize="2")],
    "entry 0: head_dim must be": [dict(head_dim=0), dict(head_dim=512), dict(head_dim=64.0), dict(head_dim=True)],
    "entry 0: parts must be": [dict(parts="power"), dict(parts=["rate"]), dict(parts=[["power"]]), dict(parts=None)],
    "entry 0: causal must be": [dict(causal=1), dict(causal="yes")],
    "entry 0: length must be": [dict(length=0), dict(length=-5), dict(length=2**40), dict(length="4096")],
    "entry 0: run must be": [dict(run=1), dict(run=-1)],
    "entry 0: milliseconds must be": [dict(milliseconds=x) for x in (0, -1.0, float("nan"), float("inf"), "fast")],
    "entry 0: tried must be": dict(tried=3),
    "is no configuration of forward": [dict(config=x) for x in (3, None, [64], [1] * 9, dict(BLOCK_M=64), {"x": 1})],
    "BLOCK_M must be one of": [dict(config=[x, 64, 4, 2]) for x in (48, 0, -64, 512, "64", 64.0, True, [64])],
    "num_warps must be one of": [dict(config=[64, 64, x, 2]) for x in (0, 3, 64)],
    "num_stages must be one of": [dict(config=[64, 64, 4, x]) for x in (0, 10**9, None)],
    "TMA must be one of": [dict(config=[64, 64, 4, 2, x]) for x in (1, "no", None)],
    "SEPARATE is for backward_dkdv, this is forward": dict(config=[64, 64, 4, 2, False, True]),
    "SPECIALIZED needs BLOCK_M 128, this is 64": dict(config=[64, 64, 8, 2, False, False, True]),
    "SPECIALIZED needs num_warps 8, this is 4": dict(config=[128, 64, 4, 2, False, False, True]),
    "SPECIALIZED needs TMA False, this is True": dict(config=[128, 64, 8, 2, True, False, True]),
    "SPECIALIZED needs kernel forward": dict(config=[128, 64, 8, 2, False, False, True], kernel="backward_dq"),
    "SPECIALIZED needs BLOCK_N of 64 or more": dict(config=[128, 32, 8, 2, False, False, True]),
    "of shared memory or more, sm_90 has": dict(config=[64, 128, 4, 6]),
}
CASES = [
    (reason, case) for reason, cases in HOSTILE.items() for case in (cases if isinstance(cases, list) else [cases])
]


@pytest.mark.parametrize(("reason", "content"), CASES)
def test_a_bad_file_is_refused_with_one_warning(folders: tuple[Path, Path], reason: str, content: Any) -> None:
    path = write(folders[0], make_entry())
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif not isinstance(content, dict) or not content or "format" in content:
        path.write_text(json.dumps(content))
    elif content.keys() <= {"device", "target", "runs", "entries", "surprise"}:
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    else:
        write(folders[0], make_entry(**content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert configs.choose("forward", CALL)[:2] == (default(), configs.TABLE)
        assert configs.choose("backward_dq", CALL)[:2] == (default(kernel="backward_dq"), configs.TABLE)
    (warning,) = caught
    assert str(path) in str(warning.message)
    assert reason in str(warning.message)


@pytest.mark.parametrize("field", ["device", "entries", "kernel", "config", "run"])
def test_missing_fields_are_named(folders: tuple[Path, Path], field: str) -> None:
    path = write(folders[0], make_entry())
    content = json.loads(path.read_text())
    (content if field in content else content["entries"][0]).pop(field)
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=rf"\['{field}'\] are missing"):
        assert configs.lookup("forward", CALL) == default()


def test_a_target_without_tensor_descriptors(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folders[0], make_entry(config=[64, 64, 4, 2, True]))
    assert configs.lookup("forward", CALL) == Config(64, 64, 4, 2, TMA=True)
    forget()
    for target in ("sm_80", "gfx942"):
        monkeypatch.setattr(configs, "target_of", lambda device, target=target: target)
        with pytest.raises(ValueError, match="it is for"):
            configs.read(path, DEVICE)
        write(folders[0], make_entry(config=[64, 64, 4, 2, True]), target=target)
        with pytest.raises(ValueError, match=f"TMA needs sm_90 or later, this is {target}"):
            configs.read(path, DEVICE)


def test_a_folder_or_a_file_in_the_way(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = folders[0] / FILE
    path.mkdir()
    with pytest.warns(UserWarning, match="directory"):
        assert configs.lookup("forward", CALL) == default()
    forget()
    monkeypatch.setenv("LOGPE_CONFIG_DIR", str(write(folders[1], make_entry())))  # a file
    with pytest.warns(UserWarning, match="irectory"):
        assert configs.lookup("forward", CALL) == Config(64, 64, 4, 3)  # the shipped file, all the same


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert configs.user_folder() == Path(os.environ["LOGPE_CONFIG_DIR"])
    monkeypatch.delenv("LOGPE_CONFIG_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.user_folder() == tmp_path / "logpe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.user_folder() == tmp_path / ".cache" / "logpe"
    assert configs.file_name(NAME) == FILE
    assert "/" not in configs.file_name("../../A/B (R) GPU")


def test_only_gpus_have_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for device in ("cpu", "meta"):
        assert configs.files(torch.device(device)) == ({}, {})
        traits = CALL._replace(device=torch.device(device))
        assert configs.choose("forward", traits)[:2] == (configs.KERNELS["forward"], configs.TABLE)


def test_write_and_read_agree(folders: tuple[Path, Path]) -> None:
    tuned = configs.read(write(folders[0], make_entry(), make_entry(1024, [64, 64, 4, 2, True])), DEVICE)
    path = folders[0] / "new" / "copy.json"
    configs.write(path, tuned)
    assert configs.read(path, DEVICE) == tuned
    assert len(path.read_text().splitlines()) < 30  # a line for each entry
    configs.write(path, tuned._replace(entries=[]))
    assert configs.read(path, DEVICE).entries == []
    assert os.listdir(path.parent) == ["copy.json"]


@pytest.mark.parametrize("where", ["json.dumps", "os.replace"])
def test_an_interrupted_write_leaves_the_old_file(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = write(folders[0], make_entry())
    before, tuned = path.read_bytes(), configs.read(path, DEVICE)

    def interrupted(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    module, name = where.split(".")
    monkeypatch.setattr(getattr(configs, module), name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        configs.write(path, tuned._replace(entries=[]))
    assert path.read_bytes() == before


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_says_which_entry_serves_what(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    doctor.print_configs(DEVICE)
    text = capsys.readouterr().out
    assert f"not tuned: python -m logpe tune writes {folders[0] / FILE}" in text
    assert "default.json, entry sm_90 (listed)" in text
    forget()

    path = write(folders[0], make_entry(), make_entry(32768, [64, 32, 4, 2]), runs=[{**RUN, "triton": "3.0.0"}])
    doctor.print_configs(DEVICE)
    text = capsys.readouterr().out
    assert f"{path}: 2 entries" in text
    assert "measured on 2026-01-02T03:04:05Z with torch 0, triton 3.0.0, logpe 0; used all the same" in text
    lines = text.splitlines()

    def served(call: str, kernel: str) -> str:
        start = lines.index(f"  {call}")
        return next(line.strip() for line in lines[start + 1 :] if line.startswith(f"    {kernel}"))

    tile = "BLOCK_M=64 BLOCK_N=64 num_warps=4 num_stages=3"
    where = served("2 bytes, D 128, power, causal, 4096 tokens", "forward")
    assert where == f"forward       {tile}: {FILE}, measured at 4096 tokens, the nearest of 2"
    where = served("2 bytes, D 128, power, causal, 65536 tokens", "forward")
    assert "BLOCK_N=32" in where
    assert where.endswith(f"{FILE}, measured at 32768 tokens, the nearest of 2")
    where = served("2 bytes, D 128, no position, causal, 4096 tokens", "forward")
    assert where.endswith(f"default.json, for sm_90, nothing like it in {path}")


def test_doctor_lists_refused_files(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folders[0], make_entry(), device="NVIDIA A100")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doctor.print_configs(DEVICE)
    text = capsys.readouterr().out
    assert f"REFUSED     {path}: it is for NVIDIA A100 (sm_90), this is {NAME} (sm_90)" in text
    assert "measured" not in text


def test_doctor_on_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    from logpe import __main__ as command

    assert command.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "WRONG" not in text
    assert "tiles       " in text


def test_doctor_reports_a_check_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(doctor, "_self_check", fail)
    from logpe import __main__ as command

    assert command.main(["doctor"]) == 1
    assert "blocked     FAILED: RuntimeError: no compiler\n" in capsys.readouterr().out


def test_entries_name_what_was_measured() -> None:
    """An entry's traits are those of the task that made it, and what the file says survives a copy."""
    task = measure.Task("forward", "bfloat16", 128, "log-invariant+gain", True, 3000, 4, 16, 4)
    entry = configs.Entry(**make_entry(3000, parts=task.parts))
    assert entry.traits(DEVICE) == task.traits(DEVICE)
    assert entry.traits(DEVICE).parts == ["power", "sharpness", "alpha"]
    assert copy.deepcopy(entry) == entry
    assert dataclasses.replace(task, length=4096).traits(DEVICE) == task.traits(DEVICE)
