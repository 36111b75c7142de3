"""A small closed set of shapes: the number of compiled programs does not grow with the data."""


def bucket(size: int, *, multiple: int = 1) -> int:
    """The smallest allowed size that holds ``size``: ``multiple`` times 1, 2, 3, 4, 6, 8, 12, 16...

    At most a third of it is padding, beyond the first few.

    >>> [bucket(n) for n in (1, 5, 9, 13, 100)], bucket(70, multiple=16)
    ([1, 6, 12, 16, 128], 96)
    """
    units = max(1, -(-size // multiple))
    power = 1 << (units - 1).bit_length()
    three_quarters = power // 4 * 3
    return multiple * (three_quarters if three_quarters >= units else power)


def bucket_below(size: int, *, multiple: int = 1) -> int:
    """The largest allowed size of at most ``size``, and at least ``multiple``.

    >>> bucket_below(100), bucket_below(70, multiple=16), bucket_below(3, multiple=8)
    (96, 64, 8)
    """
    units = max(1, size // multiple)
    power = 1 << (units.bit_length() - 1)
    half_more = power // 2 * 3
    return multiple * (half_more if power > 1 and half_more <= units else power)


def levels(slots: int, *, smallest: int) -> tuple[int, ...]:
    """Numbers of slots for which a program exists, from ``slots`` down by halves.

    >>> levels(64, smallest=8), levels(6, smallest=8)
    ((64, 32, 16, 8), (6,))
    """
    found = [slots]
    while found[-1] % 2 == 0 and found[-1] // 2 >= smallest:
        found.append(found[-1] // 2)
    return tuple(found)


def greatest_divisor(length: int, *, most: int) -> int:
    """The largest divisor of ``length`` that is at most ``most``.

    >>> greatest_divisor(384, most=256)
    192
    """
    return max(n for n in range(1, min(length, most) + 1) if length % n == 0)
