"""Chunks in files are those that Zarr would write, and reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import zarr

from pyro_hamflow.mcmc.chains import Rows
from pyro_hamflow.mcmc.chunks import Chunks, layout
from pyro_hamflow.mcmc.files import put_in_place

ROOM = 23


def made(folder, value, together):
    """An array without draws; of chains so many of which lie together."""
    rows = Rows(0, together, len(value), together)
    each = together * value[:1, :1].nbytes
    array = zarr.create_array(
        folder,
        shape=(len(value), ROOM, *value.shape[2:]),
        dtype=value.dtype,
        fill_value=math.nan if value.dtype.kind == "f" else 0,
        config={"write_empty_chunks": True},
        **layout(value, rows, ROOM, 5 * each, 100),
    )
    assert array.chunks[:2] == (together, 5 if value.size else 1)
    return array


def values(kind, inner):
    generator = np.random.default_rng(0)
    return (100.0 * generator.normal(size=(6, ROOM, *inner))).astype(kind)


@pytest.mark.parametrize("kind", ["f8", "f4", "i8", "?"])
@pytest.mark.parametrize("inner", [(), (3,), (2, 4), (0,)])
def test_draws_come_back_and_files_are_those_of_zarr(tmp_path, kind, inner):
    """Whichever way they come: some at a time, over chunks, by chains of which the last are few."""
    value = values(kind, inner)
    array = made(tmp_path / "ours", value, 4)
    chunks = Chunks(tmp_path / "ours", array)
    for first, stop in ((0, 1), (1, 3), (3, 17), (17, 20), (20, 23)):
        for start, end in ((0, 4), (4, 6)):
            rows, part = Rows(start, end, 6, 4), value[start:end, first:stop]
            put_in_place(chunks.write(rows, first, part))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "ours", mode="r")[:], value)
    theirs = made(tmp_path / "theirs", value, 4)
    theirs[:] = value
    for file in (tmp_path / "theirs" / "c").rglob("*"):
        if file.is_file() and value.size:
            assert (tmp_path / "ours" / file.relative_to(tmp_path / "theirs")).read_bytes() == (
                file.read_bytes()
            )


def test_a_chunk_begun_by_another_process_is_gone_on_with(tmp_path):
    value = values("f8", (2,))
    array = made(tmp_path / "run", value, 6)
    rows = Rows(0, 6, 6, 6)
    put_in_place(Chunks(tmp_path / "run", array).write(rows, 0, value[:, :7]))
    put_in_place(Chunks(tmp_path / "run", array).write(rows, 7, value[:, 7:9]))
    np.testing.assert_array_equal(array[:, :9], value[:, :9])


def test_draws_are_where_they_belong_only_when_the_disk_has_them(tmp_path):
    value = values("f8", ())
    array = made(tmp_path / "run", value, 6)
    chunks, rows = Chunks(tmp_path / "run", array), Rows(0, 6, 6, 6)
    put_in_place(chunks.write(rows, 0, value[:, :3]))
    before = chunks.file(0, 0).read_bytes()
    files = chunks.write(rows, 3, value[:, 3:5])
    assert files == [chunks.file(0, 0)] and chunks.file(0, 0).read_bytes() == before
    put_in_place(files)
    np.testing.assert_array_equal(array[:, :5], value[:, :5])
    assert chunks.first_damaged(5, None) == 5
