"""Index arrays that every device refuses, in the same words."""

INT32_MAX = 2**31 - 1

BAD_INDICES = [  # crow, col, message; for a matrix of 2 x 3 blocks
    ([0, 1, 2], [0, 3], r"col_indices must lie in \[0, 3\), got 3 in block row 1"),
    ([0, 1, 2], [-1, 0], r"col_indices must lie in \[0, 3\), got -1 in block row 0"),
    ([0, 1, 2], [INT32_MAX, 0], r"col_indices must lie in \[0, 3\), got 2147483647 in block row 0"),
    ([0, 1, 2], [-INT32_MAX - 1, 0], r"col_indices must lie in \[0, 3\), got -2147483648 in block row 0"),
    ([0, 2, 2], [1, 1], "col_indices must ascend within a block row without duplicates, got 1 then 1 in block row 0"),
    ([0, 2, 2], [2, 1], "col_indices must ascend within a block row without duplicates, got 2 then 1 in block row 0"),
    ([0, 2, 1], [0], "crow_indices must not decrease, got 0 then 2 at row 0"),
    ([0, 3, 2], [0, 1], "crow_indices must not decrease, got 0 then 3 at row 0"),
    ([0, -1, 2], [0, 1], "crow_indices must not decrease, got 0 then -1 at row 0"),
    ([1, 1, 2], [0, 1], "crow_indices must begin with 0, got 1"),
    ([-1, 1, 2], [0, 1], "crow_indices must begin with 0, got -1"),
    ([0, 1, 3], [0, 1], "crow_indices must end with the number of blocks 2, got 3"),
    ([0, 1, 1], [0, 1], "crow_indices must end with the number of blocks 2, got 1"),
    ([0, 1, INT32_MAX], [0, 1], "crow_indices must end with the number of blocks 2, got 2147483647"),
    ([0, 2], [0, 1], r"crow_indices must have 3 entries \(block rows \+ 1\), got 2"),
    ([0, 1, 2, 2], [0, 1], r"crow_indices must have 3 entries \(block rows \+ 1\), got 4"),
    ([], [], r"crow_indices must have 3 entries \(block rows \+ 1\), got 0"),
]
