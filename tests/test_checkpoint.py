"""Checkpoints: no committed one is lost, values are read back unchanged, and no file executes code."""

import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import traceback
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.errors import RunError
from train.data.store import atomic
from train.data.store.atomic import atomic_file, atomic_folder, recover
from train.engine import checkpoint
from train.engine.checkpoint import Checkpoints, load_tree, pack_tree

FILES = ["state.safetensors", "state.json", "manifest.json"]


def small_tree(seed):
    g = torch.Generator().manual_seed(seed)
    weights = {"weight": torch.randn(5, 7, generator=g), "bias": torch.randn(5, generator=g).bfloat16()}
    return {"module": weights, "optimizer": {"state": {0: {"step": torch.tensor(float(seed))}}}, "lr": 0.1 / (seed + 3)}


def same(a, b):
    """Return whether two trees are equal: types, order of keys, dtypes, shapes, strides and every bit."""
    if isinstance(a, torch.Tensor):
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and torch.equal(*raw)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack("<d", a) == struct.pack("<d", b) if isinstance(a, float) else a == b


def there_and_back(tree, folder):
    folder.mkdir()
    pack_tree(tree).write(folder)
    return load_tree(folder)


def valid(folder):
    """Return the valid checkpoints of a folder by step, as a new process would find them."""
    found = {}
    for path in sorted(folder.glob("step-*")):
        if checkpoint._fault(int(path.name[5:]), path) is None:
            found[int(path.name[5:])] = load_tree(path)
    return found


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# -- a tree comes back bit for bit --


def test_every_dtype_shape_and_stride_comes_back(tmp_path):
    g = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (6, 4, 8), generator=g, dtype=torch.uint8)  # all bit patterns, including NaN payloads
    tree = {str(d): raw.view(d) for d in checkpoint._DTYPES if d != torch.bool}
    tree["bool"] = raw > 128
    tree |= {f"empty {shape}": torch.empty(shape) for shape in [(0,), (0, 3), (2, 0, 3)]}
    tree |= {f"0-d {d}": torch.ones((), dtype=d) for d in checkpoint._DTYPES}
    tree["parameter"] = nn.Parameter(torch.ones(2))
    tree["channels last"] = torch.randn(4, 3, 2, 5, generator=g).contiguous(memory_format=torch.channels_last)
    tree["channels last, 1 x 1"] = torch.randn(4, 3, 1, 1, generator=g).to(memory_format=torch.channels_last)
    tree["transposed"] = torch.randn(3, 5, generator=g).T
    assert same(there_and_back(tree, tmp_path / "a"), tree)
    holes = {"slice": raw[:, ::2, 1:5], "expanded": torch.randn(3, 1, generator=g).expand(3, 4), "row": raw[2]}
    back = there_and_back(holes, tmp_path / "b")
    assert all(torch.equal(back[name], holes[name]) for name in holes)


def test_python_values_come_back(tmp_path):
    nan = struct.unpack("<d", bytes.fromhex("0123456789abf8ff"))[0]  # a negative NaN with a payload
    tree = {
        "floats": [0.1, 1e-320, -0.0, math.inf, -math.inf, math.nan, nan, 1e308, 2.0],
        "others": [None, True, False, 0, 1, -(2**70), "", "é\n\0\ud800 \"'/", [], (), {}, ((),), [[1], (2,)]],
        1: {"a": 1},
        "1": {"a": 2},
        -3: "int",
        "": "empty",
        "dict": {"dict": [["tensor", "float"]]},
        "tensor": {1: torch.ones(1), "1": torch.zeros(1), "1'": torch.ones(2)},
        "/": torch.ones(3),
        "\ud800": torch.ones(4),
    }
    assert same(there_and_back(tree, tmp_path / "a"), tree)
    assert same(there_and_back(torch.ones(2), tmp_path / "b"), torch.ones(2))
    assert there_and_back(OrderedDict(a=1), tmp_path / "c") == {"a": 1}


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
arrays = st.lists(st.floats(width=32), max_size=5).map(torch.tensor)
trees = st.recursive(
    scalars | arrays,
    lambda t: (
        st.lists(t, max_size=4)
        | st.lists(t, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(), t, max_size=4)
    ),
    max_leaves=15,
)


@settings(max_examples=100, deadline=None)
@given(trees)
def test_any_tree_comes_back(tmp_path_factory, tree):
    assert same(there_and_back(tree, tmp_path_factory.mktemp("t") / "a"), tree)


def test_a_tensor_that_is_shared_stays_shared_and_is_written_once(tmp_path):
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    back = there_and_back({"in": w, "out": w.detach(), "part": w[:10]}, tmp_path / "a")
    assert back["in"] is back["out"]
    assert same(back, {"in": w, "out": w, "part": w[:10]})
    assert (tmp_path / "a" / "state.safetensors").stat().st_size < 6000


def test_other_tools_read_the_tensors_by_their_place(tmp_path):
    tree = small_tree(1)
    pack_tree(tree).write(tmp_path)
    read = load_file(tmp_path / "state.safetensors")
    assert same(read["state/module/weight"], tree["module"]["weight"])
    assert set(read) == {"state/module/weight", "state/module/bias", "state/optimizer/state/0/step"}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_bit_for_bit(tmp_path, fused, memory_format):
    """Fused AdamW ignores strides: moments that were read back in another order would be wrong without an error."""

    def build():
        g = torch.Generator().manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).to(memory_format=memory_format)
        for p in net.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g))
        optimizer = torch.optim.AdamW([{"params": [p]} for p in net.parameters()], lr=1e-2, fused=fused)
        return net, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def train(net, optimizer, scaler, steps):
        for step in steps:
            g = torch.Generator().manual_seed(step)
            scaler.scale(net(torch.randn(2, 3, 6, 6, generator=g)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def state(parts):
        return [part.state_dict() for part in parts]

    uncut, first, second = build(), build(), build()
    train(*uncut, range(7))
    train(*first, range(4))
    back = there_and_back(state(first), tmp_path / "a")
    assert same(back, state(first))
    for part, saved in zip(second, back, strict=True):
        part.load_state_dict(saved)
    train(*second, range(4, 7))
    assert same(state(second), state(uncut))


@pytest.mark.parametrize(
    "value",
    [
        {1},
        b"x",
        np.float64(1),
        np.ones(2),
        1j,
        object(),
        torch.ones(2, dtype=torch.complex64),
        torch.Size([1]),
        torch.ones(2, 2).to_sparse(),
        torch.empty(2, device="meta"),
        {1.0: 1},
        {None: 1},
        {True: 1},
        {(1,): 1},
    ],
    ids=lambda v: f"{type(v).__name__}-{v}"[:24],
)
def test_unsupported_values_are_refused_by_their_path(tmp_path, value):
    with pytest.raises(TypeError, match=r"state/a/1\b"):
        Checkpoints(tmp_path / "c").save(1, {"a": [0, value]})
    assert not (tmp_path / "c").exists()


# -- killed after every operation --


def killed_after(count, work, half=False):
    """Run `work` in a child that kills itself after `count` operations. Return whether it was killed.

    Operations: each write, fsync and rename, and each file or folder removed. half: kill in the middle of the next one.
    """
    child = os.fork()
    if child == 0:
        try:
            done = 0

            def counted(call):
                def run(*arguments, **keywords):
                    nonlocal done
                    if done == count:
                        if half and getattr(call, "__name__", "") == "write":
                            call(arguments[0][: len(arguments[0]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    done += 1
                    return call(*arguments, **keywords)

                return run

            atomic._do = lambda call, *arguments: counted(call)(*arguments)
            os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed: see its traceback"
    return os.WIFSIGNALED(status)


def damage(path, at=None, flip=1):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= flip
    path.write_bytes(raw)


def use_exchange(exchange, folder, monkeypatch):
    """Exchange folders in one step (skip if the system can't), or with plain renames as on other systems."""
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
        return
    names = [folder / "a", folder / "b"]
    for name in names:
        name.mkdir()
    exchanged = atomic._exchange(*names)
    for name in names:
        name.rmdir()
    if not exchanged:
        pytest.skip("this system cannot exchange two names")


@pytest.fixture
def memory(tmp_path):
    """A folder in memory if the system has one, so hundreds of saves don't wait for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("case", ["first", "next", "again", "over a damaged one"])
def test_a_save_killed_at_any_operation_loses_no_checkpoint(memory, case, exchange, monkeypatch, record_property):
    use_exchange(exchange, memory, monkeypatch)
    start, new = memory / "start", small_tree(9)
    start.mkdir()
    before = {} if case == "first" else {1: small_tree(1), 2: small_tree(2)}
    for step, tree in before.items():
        Checkpoints(start).save(step, tree)
    step = {"first": 1, "next": 3, "again": 2, "over a damaged one": 2}[case]
    if case == "over a damaged one":
        damage(start / "step-00000002" / "state.safetensors")
        del before[2]

    for half in (False, True):
        count, killed = 0, True
        while killed:
            folder = memory / f"{half}-{count}"
            shutil.copytree(start, folder)
            killed = killed_after(count, lambda at=folder: Checkpoints(at).save(step, new), half)
            found = Checkpoints(folder).latest()
            after = valid(folder)
            assert all(same(tree, new if s == step and same(tree, new) else before[s]) for s, tree in after.items())
            # Everything committed before is there. A finished save may prune step 1, after step 3 is committed.
            assert set(before) - set(after) <= ({1} if 3 in after else set()), (count, sorted(after))
            assert (found.step if found else None) == max(after, default=None)
            halves = {int(p.name[5:]) for p in folder.glob("step-*")} - set(after)
            assert halves <= ({2} if case == "over a damaged one" else set())
            assert killed or (same(after[step], new) and not leftovers(folder))
            Checkpoints(folder).save(step + 1, small_tree(10))
            assert same(Checkpoints(folder).load(Checkpoints(folder).latest()), small_tree(10))
            assert not leftovers(folder)
            shutil.rmtree(folder)
            count += 1
        record_property("points", count - 1)
        assert count > 15


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_a_result_folder_is_replaced_atomically(tmp_path, exchange, monkeypatch):
    use_exchange(exchange, tmp_path, monkeypatch)

    def refresh(final, text):
        with atomic_folder(final) as folder:
            (folder / "unet").mkdir()
            for name in ("unet/weights", "index"):
                atomic.write_new(folder / name, [text.encode()])

    def read(final):
        return {str(p.relative_to(final)): p.read_text() for p in final.rglob("*") if p.is_file()}

    count, killed, final = 0, True, tmp_path / "model"
    old, new = ({"unet/weights": t, "index": t} for t in ("old", "new"))
    while killed:
        refresh(final, "old")
        killed = killed_after(count, lambda: refresh(final, "new"))
        if not exchange:
            recover(final)
        assert read(final) in (old, new)
        assert killed or read(final) == new
        count += 1
    assert count > 15
    assert not leftovers(tmp_path)


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def refresh(text):
        with atomic_file(path) as file:
            file.write(text)

    count, killed = 0, True
    while killed:
        refresh(b"old")
        killed = killed_after(count, lambda: refresh(b"new"))
        assert path.read_bytes() in (b"old", b"new")
        assert killed or path.read_bytes() == b"new"
        count += 1
    assert count == 4  # fsync, rename, fsync of the folder; then no further operation
    refresh(b"newer")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_killed_at_random_times_loses_no_checkpoint(tmp_path):
    """A run that saves without pause is killed twenty times. Each start continues from the last reported step."""
    rng, folder, kills, committed = random.Random(0), tmp_path / "c", 0, 0
    while kills < 20:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                checkpoints = Checkpoints(folder)
                found = checkpoints.latest()
                for step in range(found.step + 1 if found else 1, 10**6):
                    checkpoints.save(step, small_tree(step))
                    os.write(write, struct.pack("<q", step))
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with os.fdopen(read, "rb") as file:
            steps = [s for (s,) in struct.iter_unpack("<q", file.read())]
        committed = max([committed, *steps])
        found = Checkpoints(folder).latest()
        if found:
            assert committed <= found.step <= committed + 1  # a run may be killed after a save and before its report
            assert same(load_tree(found.folder), small_tree(found.step))
            committed = found.step
        assert len(valid(folder)) >= min(2, committed)
        kills += 1
    assert committed > 20


def test_the_order_of_operations_survives_a_power_cut(tmp_path, monkeypatch):
    """Each file is fsynced after its last write, then its folder; then the rename, then fsync of the parent."""
    log, do, fault = [], atomic._do, checkpoint._fault

    def recorded(call, *arguments):
        name = getattr(call, "__name__", "?")
        match name:
            case "write":
                log.append(("write", Path(call.__self__.name)))
            case "fsync":
                log.append(("fsync", Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))))
            case _:
                log.append((name, *arguments))
        return do(call, *arguments)

    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, small_tree(1))
    checkpoints.save(2, small_tree(2))
    monkeypatch.setattr(atomic, "_do", recorded)
    monkeypatch.setattr(checkpoint, "_fault", lambda *a: (log.append(("read", a[1])), fault(*a))[1])
    final = checkpoints.save(3, small_tree(3))
    temporary = final.with_name(".tmp-step-00000003")
    commit = log.index(("rename", temporary, final))
    for name in FILES:
        last_write = max(i for i, entry in enumerate(log) if entry == ("write", temporary / name))
        assert last_write < log.index(("fsync", temporary / name)) < log.index(("fsync", temporary)) < commit
    synced, read = log.index(("fsync", tmp_path / "c")), log.index(("read", final))
    pruned = log.index(("rename", tmp_path / "c" / "step-00000001", tmp_path / "c" / ".tmp-step-00000001"))
    assert commit < synced < read < pruned


# -- errors of the system --


def test_an_error_at_any_operation_loses_no_checkpoint(tmp_path, monkeypatch):
    folder, before, count, failed = tmp_path / "c", {1: small_tree(1), 2: small_tree(2)}, 0, True
    while failed:
        shutil.rmtree(folder, ignore_errors=True)
        for step, tree in before.items():
            Checkpoints(folder).save(step, tree)
        left = count

        def failing(call, *arguments):
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_do", failing)
            message = ""
            try:
                Checkpoints(folder).save(2, small_tree(9))
            except RunError as error:
                message = str(error)
        failed = left < 0
        assert not failed or re.match(".*step-00000002 can't be written: .*Input/output error", message)
        after = valid(folder)
        assert set(after) == {1, 2}
        assert same(after[1], before[1])
        assert same(after[2], small_tree(9)) or (failed and same(after[2], before[2]) and not leftovers(folder))
        count += 1
    assert count > 10


def test_a_disk_full_at_any_offset_loses_no_checkpoint(tmp_path, monkeypatch):
    checkpoints, tree = Checkpoints(tmp_path / "c"), small_tree(3)
    checkpoints.save(1, small_tree(1))
    checkpoints.save(2, small_tree(2))
    total = sum(p.stat().st_size for p in Checkpoints(tmp_path / "measured").save(3, tree).iterdir())
    for space in [*range(0, total, 37), total - 1, total]:
        left = space

        def full(call, *arguments):
            nonlocal left
            if call.__name__ != "write":
                return call(*arguments)
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = call(arguments[0][:left])  # a full disk first writes a part
            left -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_do", full)
            if space < total:
                with pytest.raises(RunError, match=r"^disk full while writing .*-00000003: 0.0 MB needed, .* MB free$"):
                    checkpoints.save(3, tree)
                assert not leftovers(tmp_path / "c")
                assert same(valid(tmp_path / "c"), {1: small_tree(1), 2: small_tree(2)})
            else:
                checkpoints.save(3, tree)
    assert same(valid(tmp_path / "c"), {2: small_tree(2), 3: tree})


def test_a_full_file_system_is_an_error_in_one_line(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        checkpoints = Checkpoints(tmp_path / "c")
        checkpoints.save(1, torch.ones(100_000))
        checkpoints.save(2, torch.ones(100_000))
        with pytest.raises(RunError, match=r"disk full .*step-00000003: 0\.4 MB needed, 0\.2 MB free$"):
            checkpoints.save(3, torch.ones(100_000))
        full = pytest.raises(RunError, match=r"disk full while writing .*model: 0\.2 MB free$")
        with full, atomic_folder(tmp_path / "model") as model:
            save_file({"a": torch.ones(100_000)}, model / "a.safetensors")  # safetensors raises its own error
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
        assert set(valid(tmp_path / "c")) == {1, 2}
        checkpoints.save(3, torch.ones(1000))
        assert checkpoints.latest().step == 3
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_failure_while_writing_leaves_the_old_result(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_folder(tmp_path / "model") as folder:  # noqa: PT012
            (folder / "a").write_text("new")
            raise error
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert not leftovers(tmp_path)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for error, raised, message in (
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(errno.ENOSPC, "No space left on device"), RunError, "disk full while writing .*/a: .* MB free"),
        (OSError(errno.EIO, "Input/output error"), RunError, ".*/a can't be written: .*Input/output error"),
    ):
        with pytest.raises(raised, match=message), atomic_file(path) as file:  # noqa: PT012
            file.write(b"new")
            raise error
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


# -- damage --


@pytest.fixture
def two(tmp_path):
    """Checkpoints 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, small_tree(1))
    checkpoints.save(2, small_tree(2))
    return checkpoints


def is_skipped(checkpoints, reason=""):
    """Return whether checkpoint 2 is skipped with a reason for the intact 1, and not deleted."""
    found = Checkpoints(checkpoints.folder).latest()
    assert found.step == 1
    assert len(found.invalid) == 1
    assert found.invalid[0].startswith("step-00000002: ")
    assert reason in found.invalid[0]
    assert same(checkpoints.load(found), small_tree(1))
    assert os.path.lexists(checkpoints.folder / "step-00000002")
    return True


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_detected(two, name):
    path = two.folder / "step-00000002" / name
    size = path.stat().st_size
    for at in range(0, size, 3):
        flip = 1 << at % 8
        damage(path, at, flip)
        assert is_skipped(two), at
        damage(path, at, flip)
    assert two.latest().step == 2


@pytest.mark.parametrize("name", FILES)
def test_truncated_missing_linked_or_unknown_files_are_detected(two, name, tmp_path, caplog):
    path = two.folder / "step-00000002" / name
    raw = path.read_bytes()
    for size in range(0, len(raw), 11):
        path.write_bytes(raw[:size])
        assert is_skipped(two), size
    path.write_bytes(raw + b"\0")
    assert is_skipped(two)
    path.unlink()
    assert is_skipped(two, f"{name} is missing")
    (tmp_path / "elsewhere").write_bytes(raw)
    path.symlink_to(tmp_path / "elsewhere")
    assert is_skipped(two, "not a plain file")
    path.unlink()
    os.mkfifo(path)
    assert is_skipped(two, "not a plain file")
    path.unlink()
    path.mkdir()
    assert is_skipped(two, "not a plain file")
    path.rmdir()
    path.write_bytes(raw)
    assert two.latest().invalid == ()
    assert "step-00000002 is not valid" in caplog.text


def test_a_folder_that_is_a_link_a_file_empty_or_of_another_step_is_skipped(two, tmp_path):
    folder = two.folder / "step-00000002"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert is_skipped(two, "not a plain folder")
    folder.unlink()
    folder.write_bytes(b"")
    assert is_skipped(two, "not a plain folder")
    folder.unlink()
    folder.mkdir()
    assert is_skipped(two, "missing")
    folder.rmdir()
    shutil.copytree(two.folder / "step-00000001", folder)
    assert is_skipped(two, "does not belong to step 2")


def test_forged_manifests_are_refused(two, tmp_path):
    path = two.folder / "step-00000002" / "manifest.json"
    good = json.loads(path.read_text())
    state = good["files"]["state.json"]
    outside = tmp_path / "x"
    outside.write_bytes((two.folder / "step-00000002" / "state.json").read_bytes())
    forged = [
        [],
        {},
        None,
        1,
        "x",
        {"step": 2},
        {"files": good["files"]},
        {**good, "step": 3},
        {**good, "files": {}},
        {**good, "files": ["state.json", "state.safetensors"]},
        {**good, "files": {**good["files"], "../../../x": state}},
        {**good, "files": {**good["files"], str(outside): state}},
        {**good, "files": {"../../../x": state, "state.safetensors": good["files"]["state.safetensors"]}},
        {**good, "files": {**good["files"], "state.json": {**state, "size": state["size"] + 1}}},
        {**good, "files": {**good["files"], "state.json": {"size": state["size"]}}},
        {**good, "files": {**good["files"], "state.json": None}},
        {**good, "padding": "x" * 2**17},
    ]
    for manifest in forged:
        path.write_text(json.dumps(manifest))
        assert is_skipped(two), manifest
    for text in ("[" * 60_000, "{", "NaN", "\xff"):
        path.write_text(text, encoding="latin-1")
        assert is_skipped(two)


def test_a_run_without_a_valid_checkpoint_is_an_error(two):
    for step in (1, 2):
        damage(two.folder / f"step-0000000{step}" / "state.json")
    with pytest.raises(RunError, match=r"no checkpoint .* is valid \(step-00000002: state.json .*step-00000001: state"):
        two.latest()
    assert len(list(two.folder.glob("step-*"))) == 2
    assert Checkpoints(two.folder.parent / "none").latest() is None


# -- pickles --


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def pickles(canary, folder):
    torch.save(Malicious(canary), folder / "zip")
    torch.save(Malicious(canary), folder / "legacy", _use_new_zipfile_serialization=False)
    pure = [pickle.dumps(Malicious(canary), protocol) for protocol in (0, 2, 5)]
    return [*pure, (folder / "zip").read_bytes(), (folder / "legacy").read_bytes()]


@pytest.mark.parametrize("forged", [False, True], ids=["sums as they were", "sums forged"])
@pytest.mark.parametrize("slot", FILES)
def test_pickles_are_never_executed(two, tmp_path, slot, forged):
    canary, folder = tmp_path / "canary", two.folder / "step-00000002"
    attacks = pickles(canary, tmp_path)
    pickle.loads(attacks[1])  # the pickle does execute code when loaded
    canary.rmdir()
    with pytest.raises(FileNotFoundError):
        canary.rmdir()
    for attack in attacks:
        (folder / slot).write_bytes(attack)
        for extension in ("pt", "bin", "ckpt", "pkl", "pth"):
            (folder / f"state.{extension}").write_bytes(attack)
        if forged and slot != "manifest.json":
            files = {name: checkpoint._checksum(folder / name) for name in FILES[:2]}
            (folder / "manifest.json").write_text(json.dumps({"step": 2, "files": files}))
        assert is_skipped(two)
        if slot != "manifest.json":
            with pytest.raises(RunError, match="does not contain a valid saved state"):
                load_tree(folder)
        assert not canary.exists()


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"tree": 1},
        {"tree": {"tensor": "absent"}, "strides": {}},
        {"tree": {"code": "x"}, "strides": {}},
        {"tree": 1, "strides": {"state/module/weight": [-7, 1]}},
        {"tree": 1, "strides": {"state/module/weight": [2**60, 1]}},
        {"tree": {"float": "00"}, "strides": {}},
        {"tree": {"dict": [[[], 1]]}, "strides": {}},
    ],
)
def test_a_forged_tree_is_refused(tmp_path, state):
    pack_tree(small_tree(1)).write(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match="does not contain a valid saved state"):
        load_tree(tmp_path)


# -- what is kept --


def test_pruning_keeps_the_newest_valid_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (5, 10, 15, 20):
        checkpoints.save(step, step)
    assert valid(tmp_path) == {10: 10, 15: 15, 20: 20}
    damage(tmp_path / "step-00000015" / "state.json")  # no longer counted, and not deleted
    checkpoints.save(25, 25)
    assert valid(tmp_path) == {10: 10, 20: 20, 25: 25}
    assert (tmp_path / "step-00000015").exists()
    checkpoints.save(30, 30)
    assert valid(tmp_path) == {20: 20, 25: 25, 30: 30}
    checkpoints.save(1, 1)  # just written, so kept although three are newer
    assert valid(tmp_path) == {1: 1, 20: 20, 25: 25, 30: 30}
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="step is -1"):
        checkpoints.save(-1, 0)


def test_replacing_a_damaged_checkpoint_is_reported(two, caplog):
    damage(two.folder / "step-00000002" / "state.json")
    two.save(2, small_tree(9))
    assert "step-00000002 was not valid" in caplog.text
    assert same(valid(two.folder), {1: small_tree(1), 2: small_tree(9)})


def test_a_checkpoint_that_reads_back_wrong_prunes_nothing(two, monkeypatch):
    def corrupting(call, *arguments):
        if call.__name__ == "write":
            call(bytes(len(arguments[0])))
            return len(arguments[0])
        return call(*arguments)

    monkeypatch.setattr(atomic, "_do", corrupting)
    with pytest.raises(RunError, match="can't be read back as it was written"):
        two.save(3, small_tree(3))
    assert same(valid(two.folder), {1: small_tree(1), 2: small_tree(2)})


def test_a_loaded_tree_does_not_keep_its_file_open(tmp_path):
    """Otherwise a pruned checkpoint would keep its disk space until the process ends."""
    tree = there_and_back({"a": torch.arange(10.0)}, tmp_path / "a")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert tree["a"].sum() == 45


# -- checkpoints that are not used any more --


def test_checkpoints_set_aside_are_not_found_and_removed_at_the_next_save(two):
    damage(two.folder / "step-00000002/state.json")
    assert two.set_aside(0) == [two.folder / "diverged-step-00000001"]  # damaged ones stay where they are
    damage(two.folder / "step-00000002/state.json")
    assert two.latest().step == 2
    assert two.latest(before=2) is None
    two.save(3, small_tree(3))
    assert sorted(path.name for path in two.folder.iterdir()) == ["step-00000002", "step-00000003"]
