"""Chunks of whole groups within the budget, as few and as even as possible; offsets on the device."""

import pytest
import torch
from kernel_cases import DEVICE

from madpo.kernels.chunks import plan_chunks, row_chunks
from madpo.kernels.layout import GroupLayout

NONE = torch.empty(0, dtype=torch.int64)
V = 1024


def plan(lengths, group_sequences, group_edges, rows, narrow=torch.bfloat16):
    groups = GroupLayout(lengths, group_sequences, group_edges, NONE, NONE)
    return plan_chunks(groups, V, rows * V * 4, torch.float32, narrow)


def test_chunks_hold_whole_groups_within_the_budget():
    chunks = plan([2, 2, 3, 1, 9, 9, 1, 1], [2, 2, 2, 2], [1, 2, 1, 0], rows=8)
    group_ranges = [chunk.group_range for chunk in chunks]
    assert [(s.rows.start, s.rows.stop) for s in group_ranges] == [(0, 8), (8, 26), (26, 28)]
    assert [(s.sequences.start, s.sequences.stop) for s in group_ranges] == [(0, 4), (4, 6), (6, 8)]
    assert [(s.edges.start, s.edges.stop) for s in group_ranges] == [(0, 3), (3, 4), (4, 4)]
    assert [(s.groups.start, s.groups.stop) for s in group_ranges] == [(0, 2), (2, 3), (3, 4)]
    assert [chunk.columns for chunk in chunks] == [V, 256, V]


def test_chunks_are_even():
    chunks = plan([10] * 14, [2] * 7, [1] * 7, rows=60)
    assert [chunk.group_range.num_rows for chunk in chunks] == [60, 60, 20]
    chunks = plan([10] * 16, [2] * 8, [1] * 8, rows=60)
    assert [chunk.group_range.num_rows for chunk in chunks] == [60, 60, 40]
    chunks = plan([10] * 20, [2] * 10, [1] * 10, rows=160)
    assert [chunk.group_range.num_rows for chunk in chunks] == [100, 100]


@pytest.mark.parametrize(
    ("rows", "dtype", "columns"),
    [
        (20, torch.float32, V),
        (19, torch.bfloat16, V),
        (10, torch.bfloat16, V),
        (9, torch.float32, 256),
        (1, torch.float32, 256),
    ],
)
def test_a_large_group_is_narrow_then_walked_in_blocks(rows, dtype, columns):
    (chunk,) = plan([10, 10], [2], [1], rows)
    assert (chunk.logits_dtype, chunk.columns) == (dtype, columns)


def test_blocks_fill_the_budget():
    groups = GroupLayout([4096, 4096], [2], [1], NONE, NONE)
    (chunk,) = plan_chunks(groups, 256_000, 2**30, torch.float32, torch.bfloat16)
    assert chunk.columns == 32_768 and chunk.columns * 8192 * 4 == 2**30


def test_empty_groups_and_empty_batches():
    assert plan([], [], [], rows=8) == []
    (chunk,) = plan([0, 0], [2], [1], rows=8)
    assert chunk.group_range.num_rows == 0 and chunk.columns == V


def test_row_chunks_cover_all_rows_evenly():
    assert row_chunks(0, V, 10, 4) == []
    assert row_chunks(10, V, 4 * V * 4, 4) == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert row_chunks(3, V, 1, 4) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_row_chunks_count_the_padding_of_rows():
    """A row of 1003 logits takes the memory of 1008."""
    budget = 10 * 1008 * 4 - 1
    chunks = row_chunks(20, 1003, budget, 4)
    assert [chunk.stop - chunk.start for chunk in chunks] == [6, 7, 7]
    assert row_chunks(20, 1003, budget + 1, 4) == [slice(0, 10), slice(10, 20)]


def test_offsets_on_the_device():
    groups = GroupLayout.pairs((3, 0, 2, 4), DEVICE)
    assert groups.ranges.rows.tolist() == [0, 3, 3, 5, 9]
    assert groups.ranges.sequences.tolist() == [0, 2, 4]
    assert groups.ranges.edges.tolist() == [0, 1, 2]
    assert groups.group_of_row.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    alone = GroupLayout.alone((3, 2), DEVICE)
    alone.check(5)
    assert len(alone.ranges.edges) == 3 and not len(alone.chosen)
