"""A small closed set of shapes, so that the number of compiled programs does not grow with the data."""


def bucket(size: int, *, multiple: int = 1) -> int:
    """The smallest allowed size that holds ``size``: ``multiple`` times 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (at most half is padding).

    >>> [bucket(n) for n in (1, 5, 9, 13, 100)], bucket(70, multiple=16)
    ([1, 6, 12, 16, 128], 96)
    """
    units = max(1, -(-size // multiple))
    power = 1 << (units - 1).bit_length()
    three_quarters = power // 4 * 3
    return multiple * (three_quarters if three_quarters >= units else power)


def levels(slots: int, *, smallest: int) -> tuple[int, ...]:
    """Numbers of slots for which a program exists, from ``slots`` down by halves.

    >>> levels(64, smallest=8), levels(6, smallest=8)
    ((64, 32, 16, 8), (6,))
    """
    found = [slots]
    while found[-1] % 2 == 0 and found[-1] // 2 >= smallest:
        found.append(found[-1] // 2)
    return tuple(found)


def piece_rows(prompts: int, chunk: int, *, tokens: int) -> int:
    """Prompts in one prefill piece: the largest divisor of ``prompts`` that keeps ``rows * chunk`` within ``tokens``.

    >>> piece_rows(12, 256, tokens=1024)
    4
    """
    return greatest_divisor(prompts, most=max(1, tokens // chunk))


def greatest_divisor(length: int, *, most: int) -> int:
    """The largest divisor of ``length`` that is at most ``most``.

    >>> greatest_divisor(384, most=256)
    192
    """
    return max(n for n in range(1, min(length, most) + 1) if length % n == 0)
