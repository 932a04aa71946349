"""How kernels on integer activations find their way through memory, from shapes alone.

Plain arithmetic on plain integers, and no function calls another, so that each can be compiled as it is.
"""

__all__ = ["bound", "lines", "of_few_rows", "plan"]

_OVERREAD = 48
"""Bytes behind a row's codes that a vector may read where codes cross words."""
_WHOLE_ROW = 1 << 40
"""Elements of a group that is the whole row."""


def lines(size: int) -> int:
    """A size rounded up to cache lines."""
    return size + 63 & -64


def bound(outputs: int, width: int) -> int:
    """Squared error of a row of x over its squared length up to which integers of a width serve, times 1e18.

    The contract's bound on the error of a row of the result (1e-12 for 24 bits, 1e-8 for 16, 1e-4 for 8), divided by
    how far that error comes above its expectation once in a million. It is the error of rounding x seen through the
    rows of the weight, a sum of squares: Wilson and Hilferty, "The distribution of chi-square" (1931).

    Parameters
    ----------
    outputs : int
        Rows of the weight.
    width : int
        Bits of an integer of x.
    """
    variance = 2 / (9 * max(1, outputs))
    spread = (1 - variance + 4.75 * variance**0.5) ** 3
    return int((1e6 if width == 24 else 1e10 if width == 16 else 1e14) / spread)


def of_few_rows(
    columns: int, groups: int, bits: int, group: int, step: int, lanes: int, width: int
) -> tuple[int, int, int, int, int]:
    """What the kernels of few rows read: `group_shift`, bytes of a packed row, of x's codes, of its scales and sums.

    Parameters
    ----------
    columns, groups : int
        Of a row of the weight.
    bits, group : int
        Of the scheme; 0 where the row is one group.
    step, lanes, width : int
        Of the kernel: codes at a time, lanes of a vector, bits of an integer of x.
    """
    codes = -(-columns // step) * step
    shift = 0
    while step << (shift + 1) <= group:
        shift += 1
    spread = codes // step * lanes * 4
    return (
        shift,
        codes * bits // 8,
        codes * width // 8,
        spread,
        groups * 4 if width < 24 else spread + (groups * 4 + 63 & -64),
    )


def plan(
    outputs: int,
    columns: int,
    words: int,
    groups: int,
    packed_row: int,
    scale_row: int,
    kind: int,
    bits: int,
    group: int,
    run: int,
    shift: int,
    reads: int,
    codes: int,
    code_scales: int,
    sums: int,
    tile_words: int,
    scratch: int,
    bound: int,
) -> tuple[int, ...]:
    """Values of `job.PLAN`, in its order.

    Parameters
    ----------
    outputs, columns, words, groups : int
        Rows of the weight, and what a row has of elements, words and groups.
    packed_row, scale_row : int
        Bytes from row to row.
    kind : int
        Of the scales: 0 is float32, 1 is float16, 2 is bfloat16.
    bits, group : int
        Of the scheme; 0 where the row is one group.
    run : int
        Elements of x that share a scale.
    shift, reads, codes, code_scales, sums : int
        As of :func:`of_few_rows`.
    tile_words, scratch : int
        Of the kernels in tiles; else 0.
    bound : int
        As of :func:`bound`.
    """
    beyond = reads + (_OVERREAD if 32 % bits else 0) - 4 * words
    copied = 0
    if beyond > 0:
        copied = min(outputs, -(-beyond // packed_row)) if packed_row else outputs
    size = 4 if kind == 0 else 2
    elements = group if group else _WHOLE_ROW
    return (
        outputs,
        columns,
        groups,
        4 * outputs,
        packed_row,
        scale_row,
        size if group else 0,
        kind,
        elements,
        shift,
        elements // run,
        outputs - copied,
        4 * words + max(0, beyond) + 63 & -64,
        codes,
        code_scales,
        sums,
        tile_words,
        scratch,
        bound,
    )
