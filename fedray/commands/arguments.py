"""What the sub-commands' argument parsers share: bad arguments are an InputError of one sentence."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fedray.errors import InputError


class Arguments(argparse.ArgumentParser):
    """A parser that raises instead of printing a usage message and leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the parser's complaint.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{message}; see {self.prog} --help.")
