"""Samples of questions for `--limit`: the same ones in every run and for every model, and smaller samples within larger ones."""

import hashlib
from collections.abc import Mapping
from itertools import zip_longest


def sample_of(strata: Mapping[str, str], limit: int | None) -> set[str]:
    """Return `limit` keys, or all if there are fewer or `limit` is None.

    Keys are drawn at random without replacement, equally from each stratum as long as it has any. The draw is by the SHA-256 of the
    keys, so it depends on nothing else, and the sample for a smaller limit is part of that for a larger one: raising the limit asks
    only the questions that are new.

    Args:
        strata: key → its stratum.
    """
    if limit is None or limit >= len(strata):
        return set(strata)
    members: dict[str, list[str]] = {}
    for key in sorted(strata, key=lambda key: hashlib.sha256(key.encode()).digest()):
        members.setdefault(strata[key], []).append(key)
    turns = zip_longest(*(members[stratum] for stratum in sorted(members)))
    order = [key for turn in turns for key in turn if key is not None]
    return set(order[:limit])
