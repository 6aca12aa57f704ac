"""Counts the steps and rounds that each gateway was charged, by ranges of gateways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedray.privacy.accounting import Charges

Ranges = tuple[tuple[int, int], ...]

_WIDE = 4096  # gateways; shorter charges are counted gateway by gateway


def ranges_of(gateways: Sequence[int]) -> Ranges:
    """Return sorted ids as inclusive ranges."""
    if isinstance(gateways, range):
        return ((gateways.start, gateways.stop - 1),) if gateways else ()
    ranges: list[tuple[int, int]] = []
    for gateway in gateways:
        if ranges and gateway == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], gateway)
        else:
            ranges.append((gateway, gateway))
    return tuple(ranges)


class Tally:
    """Steps and rounds of each gateway, kept so that the maximum costs little after every round."""

    def __init__(self) -> None:
        self._wide: Counter[tuple[int, int]] = Counter()  # steps and rounds by range, for charges of very many
        self._wide_rounds: Counter[tuple[int, int]] = Counter()
        self._steps: Counter[int] = Counter()
        self._rounds: Counter[int] = Counter()
        self._most = Charges(steps=0, rounds=0)

    def most(self) -> Charges:
        """Return the most steps and the most rounds that any gateway was charged."""
        return self._most

    def add(self, gateways: Ranges, steps: int) -> None:
        """Charge one round of `steps` local steps to all gateways in the ranges."""
        if sum(last - first + 1 for first, last in gateways) > _WIDE:
            for pair in gateways:
                self._wide[pair] += steps
                self._wide_rounds[pair] += 1
            ends = {end for pair in self._wide for end in pair}
            changed = [g for g in {*self._steps, *ends} if any(first <= g <= last for first, last in gateways)]
        else:
            changed = [gateway for first, last in gateways for gateway in range(first, last + 1)]
            self._steps.update(dict.fromkeys(changed, steps))
            self._rounds.update(changed)
        for gateway in changed:
            covering = [pair for pair in self._wide if pair[0] <= gateway <= pair[1]]
            self._most = Charges(
                steps=max(self._most.steps, self._steps[gateway] + sum(self._wide[pair] for pair in covering)),
                rounds=max(
                    self._most.rounds, self._rounds[gateway] + sum(self._wide_rounds[pair] for pair in covering)
                ),
            )
