"""How kernels on integer activations find their way through memory, from shapes alone.

Plain arithmetic on plain integers, and no function calls another, so that each can be compiled as it is.
"""

__all__ = [
    "CONFIGURATION",
    "FLOAT_WIDTH",
    "MATRIX_COLUMNS",
    "MATRIX_HEIGHT",
    "MATRIX_TILES",
    "SPARE",
    "SPILL",
    "UNPACKED_COLUMNS",
    "UNPACKED_TILES",
    "VECTORS",
    "bound",
    "of_few_rows",
    "of_tiles",
    "places",
    "plan",
    "together",
    "turns",
]

_OVERREAD = 48
"""Bytes behind a row's codes that a vector may read where codes cross words."""
_WHOLE_ROW = 1 << 40
"""Elements of a group that is the whole row."""
VECTORS = 2
"""Vectors of the weight's rows in a tile."""
SPARE = 64
"""Bytes between widened rows: what a vector may write past their end, and more, lest rows share cache sets."""
MATRIX_HEIGHT = 16
"""Rows of a block in matrix units. Kernels for vectors have lower ones."""
MATRIX_COLUMNS = 1024
"""Columns of the weight that are laid for them in one go."""
MATRIX_TILES = 16
"""Tiles, of LANES of the weight's rows, that they take in one go: x is read so many times less."""
SPILL = 4096
"""Bytes through which sums go from the units to vectors: those of two runs, of two layers each."""
FLOAT_WIDTH = 32
"""What stands for floats where others are widths of integers."""
UNPACKED_COLUMNS = 512
"""Columns of the weight that are laid in one go where codes are unpacked before; of floats, half as many."""
UNPACKED_TILES = 8
"""Tiles that are taken in one go there: x comes from memory so many times less."""
CONFIGURATION = 64
"""Bytes that say how large the units' registers are."""
_ROUNDED_TOGETHER = 8
"""Rows of x from which threads share in rounding them."""


def bound(outputs: int, width: int) -> int:
    """Squared error of a row of x over its squared length up to which integers of a width serve, times 1e18.

    The contract's bound on the error of a row of the result (1e-12 for 24 bits, 1e-8 for 16, 1e-4 for 8), divided by
    how far that error comes above its expectation once in a million, if roundings are as good as random. It is the
    error of rounding x seen through the rows of the weight, a sum of squares: Wilson and Hilferty, "The distribution of
    chi-square" (1931).

    Parameters
    ----------
    outputs : int
        Rows of the weight, as many as are independent.
    width : int
        Bits of an integer of x.
    """
    variance = 2 / (9 * max(1, outputs))
    spread = (1 - variance + 4.75 * variance**0.5) ** 3
    return int((1e6 if width == 24 else 1e10 if width == 16 else 1e14) / spread)


def together(rows: int, few: int) -> int:
    """How many rows of x the kernels for `rows` of them take at a time: two or one of up to `few`; 0 means tiles."""
    if rows > few:
        return 0
    return 1 if rows % 2 else 2


def of_few_rows(
    columns: int, groups: int, bits: int, group: int, run: int, step: int, lanes: int, width: int
) -> tuple[int, int, int, int, int, int, int]:
    """What the kernels of few rows read and write, beginning with `group_shift`.

    Then bytes of a packed row, of a row of x's codes, of its scales and of its sums; `tile_words`, which is 0; and
    bytes of scratch memory for each thread: for each of two rows of x a vector of scales of each of four rows; with 24
    bits, of each of four rows its scales, its raised biases and its codes of 0, each in whole vectors, and one to read
    past.

    Parameters
    ----------
    columns, groups : int
        Of a row of the weight.
    bits, group : int
        Of the scheme; 0 where the row is one group.
    run : int
        Elements of x that share a scale.
    step, lanes, width : int
        Of the kernel: codes at a time, lanes of a vector, bits of an integer of x.
    """
    codes = -(-columns // step) * step
    shift = 0
    while step << (shift + 1) <= group:
        shift += 1
    of_runs, of_groups = codes // run * 4 + 63 & -64, groups * 4 + 63 & -64
    wide = width == 24
    return (
        shift,
        codes * bits // 8,
        codes * width // 8,
        of_runs,
        codes // step * lanes * 4 + of_groups if wide else of_runs,
        0,
        12 * ((-(-groups // lanes) + 1) * lanes * 4) if wide else 2 * 4 * lanes * 4,
    )


def of_tiles(
    rows: int, columns: int, groups: int, bits: int, run: int, lanes: int, width: int, height: int
) -> tuple[int, int, int, int, int, int, int]:
    """What the kernels in tiles read and write, as :func:`of_few_rows` has it; each row has whole vectors of words.

    Parameters
    ----------
    rows : int
        Of x.
    columns, groups : int
        Of a row of the weight.
    bits, run : int
        Of a code; elements of x that share a scale.
    lanes, width, height : int
        Of the kernel: lanes of a vector, bits of an integer of x, rows of a block.
    """
    held = bits if 32 % bits == 0 else 8
    runs = -(-columns // run)
    words = -(-(runs * run * held // 32) // lanes) * lanes
    if height == MATRIX_HEIGHT:
        low = height // 2
        tile = lanes * (MATRIX_COLUMNS + MATRIX_COLUMNS // run * 8 + 4 * (-(-rows // low) * low))
        scratch = MATRIX_TILES * tile + SPILL + CONFIGURATION + lanes * (8 + MATRIX_COLUMNS + SPARE)
    elif lanes < 16 or width == FLOAT_WIDTH:
        laid = (
            4 * UNPACKED_COLUMNS
            + 8 * (UNPACKED_COLUMNS // run + lanes)
            + (8 if width == FLOAT_WIDTH else 4) * UNPACKED_TILES * (rows + 8)
        )
        scratch = VECTORS * lanes * laid + lanes * (8 + 4 * lanes + UNPACKED_COLUMNS + SPARE)
    else:
        laid_groups = -(-groups // lanes) * lanes
        tile, addresses = 4 * VECTORS * lanes * (words + lanes + 2 * laid_groups + rows + 4), 8 * lanes
        scratch = tile + addresses + lanes * (4 * words + SPARE) + 64
    return 0, words * 32 // held * bits // 8, runs * run * width // 8, runs * 8, 0, words, scratch + 63 & -64


def places(
    record: int, rows: int, height: int, codes: int, code_scales: int, sums: int, copy: int
) -> tuple[int, int, int, int, int]:
    """Where behind a job codes, scales, sums and the copy of the weight's last rows start, and where they end.

    Parameters
    ----------
    record : int
        Bytes of a job.
    rows, height : int
        Of x, and of a block of them, if there are blocks.
    codes, code_scales, sums : int
        Bytes of each row of x: as of :func:`of_few_rows`.
    copy : int
        Bytes of the copy.
    """
    unit = max(4, height // 2)
    space = -(-rows // unit) * unit
    at_codes = record + 63 & -64
    at_scales = at_codes + (codes * space + 63 & -64)
    at_sums = at_scales + (code_scales * space + 63 & -64)
    at_copy = at_sums + (sums * space + 63 & -64)
    return at_codes, at_scales, at_sums, at_copy, at_copy + (copy + 63 & -64)


def turns(rows: int, outputs: int, height: int, lanes: int, threads: int) -> tuple[int, int, int]:
    """How threads share in a product: rows of x that one rounds at a time; parts of the weight, and how many at a time.

    Parameters
    ----------
    rows, outputs : int
        Of x and of the weight.
    height : int
        Rows of a block where the parts are tiles; 0 where they are rows of the weight.
    lanes : int
        Of a vector.
    threads : int
    """
    unit = max(4, height // 2)
    rounded = max(unit, rows // (4 * threads) // unit * unit) if rows >= _ROUNDED_TOGETHER else rows
    if height == 0:
        return rounded, outputs, max(16, outputs // (8 * threads) // 4 * 4)
    tiles = -(-outputs // (lanes if height == MATRIX_HEIGHT else VECTORS * lanes))
    return rounded, tiles, max(1, tiles // (8 * threads))


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
    shift, reads, codes, code_scales, sums, tile_words, scratch : int
        As of :func:`of_few_rows` or :func:`of_tiles`.
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
        max(1, elements // run),
        outputs - copied,
        4 * words + max(0, beyond) + 63 & -64,
        codes,
        code_scales,
        sums,
        tile_words,
        scratch,
        bound,
    )
