"""The blocks a tile visits, for any cut of a row into documents."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jsft.kernels.flash.ranges import (
    TILE,
    key_blocks,
    order_of_documents,
    order_of_keys,
    order_of_queries,
    query_blocks,
)

rows = st.tuples(
    st.integers(1, 6),  # tiles
    st.lists(st.integers(0, 6 * TILE - 1) | st.integers(0, 6).map(lambda n: n * TILE), max_size=12),
    st.sampled_from([64, 128]),
)


def make(tiles, cuts):
    T = tiles * TILE
    bounds = np.unique([0, *(c for c in cuts if c < T), T])
    index = np.searchsorted(bounds, np.arange(T), side="right") - 1
    i = np.arange(T)
    start, end = bounds[index], bounds[index + 1]
    return T, start, end, (i[:, None] >= i) & (i >= start[:, None])


def check(visible, blocks, block):
    """visible: [TILE, T] or [T, TILE] moved so that the walked axis is last."""
    by_block = visible.reshape(TILE, -1, block)
    any_visible, all_visible = by_block.any((0, 2)), by_block.all((0, 2))
    visited = np.zeros(len(any_visible), bool)
    visited[blocks.first : blocks.last] = True
    plain = np.zeros_like(visited)
    plain[blocks.plain_first : blocks.plain_last] = True
    assert blocks.first <= blocks.plain_first <= blocks.plain_last <= blocks.last
    np.testing.assert_array_equal(visited, any_visible)  # nothing is missed, nothing visited in vain
    assert all_visible[plain].all()  # no mask is missed


@settings(max_examples=150, deadline=None)
@given(rows)
def test_every_visible_pair_is_visited_and_plain_blocks_need_no_mask(row):
    tiles, cuts, block = row
    T, start, end, visible = make(tiles, cuts)
    for t0 in range(0, T, TILE):
        tile, t1 = slice(t0, t0 + TILE), t0 + TILE - 1
        check(visible[tile], key_blocks(t0, start[t0], start[t1], block), block)
        check(visible[:, tile].T, query_blocks(t0, end[t0], end[t1], block), block)


def test_one_document_masks_only_the_diagonal():
    T, start, end, _ = make(4, [])
    blocks = key_blocks(2 * TILE, 0, 0, 128)
    assert (blocks.first, blocks.plain_first, blocks.plain_last, blocks.last) == (0, 0, 2, 3)
    blocks = query_blocks(TILE, T, T, 64)
    assert (blocks.first, blocks.plain_first, blocks.plain_last, blocks.last) == (2, 4, 8, 8)


def test_orders_deal_every_tile_once_long_documents_first():
    lengths = [[128, 300, 212], [500, 140]]
    end = np.stack([np.repeat(np.cumsum(row), row) for row in lengths])
    start = end - np.stack([np.repeat(row, row) for row in lengths])
    assert order_of_documents(end).tolist() == [5, 6, 7, 1, 2, 3, 4, 8, 9, 0]  # by the last key
    by_work = np.asarray(order_of_keys(end))
    assert sorted(by_work) == list(range(10)) == sorted(np.asarray(order_of_queries(start)))
    work = (end[:, TILE - 1 :: TILE] - np.arange(0, 640, TILE)).ravel()
    assert (np.diff(work[by_work]) <= 0).all()
