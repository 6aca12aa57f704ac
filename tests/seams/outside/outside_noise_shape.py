"""Much noise at first, and less later."""


class Fading:
    least = 1.0

    def scale(self, round_index: int, step: int) -> float:
        return 1.0 + 9.0 / round_index**4
