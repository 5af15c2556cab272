"""Packing documents into rows that are nearly full, and rows into micro batches of nearly equal cost.

Two or three long reasoning documents fill a packed row; best-fit then wastes 4-7 %. Here each row takes the longest
remaining document and the one, two or three others that fill it best. The slack goes to the last rows, where documents
are spread by cost. Rows are then ranked by cost, so that the rows of a micro batch cost about the same.
"""

import numpy as np

# Room a row may leave in order to take one long document instead of several short ones, which fill later rows
# better; as fractions of a row, in the order tried.
_TOLERANCES = (1 / 200, 1 / 640, 1 / 80)
_TRIPLES = 12  # smallest documents tried as the third of a triple


def pack(
    lengths: np.ndarray, costs: np.ndarray, full_rows: int, length: int, last_rows: int, last_length: int
) -> list[list[int]] | None:
    """Documents of each of `full_rows` rows of `length`, then of `last_rows` rows of `last_length`; None: no fit.

    lengths: int64 [B], none above `length`; costs: float64 [B]. Deterministic.
    """
    if lengths.sum() > full_rows * length + last_rows * last_length:
        return None
    for tolerance in _TOLERANCES if full_rows else (0,):
        rows = _fill(lengths, costs, full_rows, length, last_rows, last_length, int(tolerance * length))
        if rows is not None:
            return rows
    return None


def rank_by_cost(rows: list[list[int]], costs: np.ndarray, group: int, devices: int) -> list[list[int]]:
    """Rows reordered so that each `group` of them, and each device's share of a group, has nearly equal cost.

    A device holds group / devices consecutive rows. Rows are assigned to devices in snake order (0, 1, ..., 1, 0).
    """
    row_costs = np.array([costs[row].sum() for row in rows])
    ranked = np.argsort(-row_costs, kind="stable")
    order = np.arange(group).reshape(-1, devices)
    order[1::2] = order[1::2, ::-1]
    place = order.T.ravel()  # place[i]: rank of the i-th row of a micro batch
    return [rows[ranked[start + rank]] for start in range(0, len(rows), group) for rank in place]


def _fill(lengths, costs, full_rows, length, last_rows, last_length, tolerance) -> list[list[int]] | None:
    index = np.argsort(lengths, kind="stable")
    left = lengths[index]  # ascending: documents not yet packed
    rows: list[list[int]] = []
    for _ in range(full_rows):
        chosen = _fill_row(left, length, tolerance)
        rows.append(index[chosen].tolist())
        keep = np.ones(len(left), bool)
        keep[chosen] = False
        left, index = left[keep], index[keep]
    last = _spread(lengths, costs, index[::-1], last_rows, last_length)
    if last is None:  # too tight to be balanced: best fit over all rows
        room = [length - int(lengths[row].sum()) for row in rows] + [last_length] * last_rows
        rows += [[] for _ in range(last_rows)]
        return _best_fit(rows, np.array(room), lengths, index[::-1])
    return rows + last


def _fill_row(left: np.ndarray, room: int, tolerance: int) -> list[int]:
    """Places in `left` (ascending lengths) of the documents of one row with `room` positions."""
    chosen: list[int] = []
    end = len(left)  # longest first: documents at `end` and above are taken or do not fit
    while True:
        end = int(np.searchsorted(left[:end], room, side="right"))
        if end == 0:
            return chosen
        longest = int(left[end - 1])
        if chosen and (room - longest <= tolerance or room <= 3 * longest):
            break
        end -= 1
        chosen.append(end)
        room -= longest
    if room - longest <= tolerance:
        return [*chosen, end - 1]
    return chosen + _best_completion(left[:end], room)


def _best_completion(candidates: np.ndarray, room: int) -> list[int]:
    """Places of the one to three documents with the largest sum within `room`; all candidates fit alone."""
    count = len(candidates)
    best, best_sum = [count - 1], int(candidates[-1])
    place = np.arange(count)
    for third in range(-1, min(count, _TRIPLES)):  # -1: pairs
        base = int(candidates[third]) if third >= 0 else 0
        partner = np.searchsorted(candidates, room - base - candidates, side="right") - 1
        partner = np.minimum(partner, place - 1)
        sums = np.where(partner > third, candidates + candidates[partner] + base, -1)
        first = int(sums.argmax())
        if best_sum < sums[first] <= room:
            best, best_sum = [first, int(partner[first])], int(sums[first])
            if third >= 0:
                best.append(third)
        if best_sum == room or base + 2 * int(candidates[0]) > room:
            break
    return best


def _spread(lengths, costs, documents, rows: int, length: int) -> list[list[int]] | None:
    """Documents, longest first, each to the cheapest row that has room."""
    result: list[list[int]] = [[] for _ in range(rows)]
    room, cost = np.full(rows, length), np.zeros(rows)
    for document in documents:
        row = int(np.where(room >= lengths[document], cost, np.inf).argmin())
        if room[row] < lengths[document]:
            return None
        result[row].append(int(document))
        room[row] -= lengths[document]
        cost[row] += costs[document]
    return result


def _best_fit(rows, room: np.ndarray, lengths, documents) -> list[list[int]] | None:
    """Documents, longest first, each to the fullest row that has room."""
    for document in documents:
        row = int(np.where(room >= lengths[document], room, np.iinfo(np.int64).max).argmin())
        if room[row] < lengths[document]:
            return None
        rows[row].append(int(document))
        room[row] -= lengths[document]
    return rows
